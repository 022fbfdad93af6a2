"""Mask files: what is found out, what is declared, what is asked for; and which side is up."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

import data
from conftest import photograph, real_idrid, rendered, save_palette_mask
from retina.datasets import cache, leaks, readers, synthetic
from retina.datasets.masks import MaskFile, read_mask, stored_values
from retina.files import InputError


LESIONS, SIZE = synthetic.LESIONS, (60, 40)
SPOTS = np.random.default_rng(0).random((40, 60)) > 0.7


def read(path: Path, *values: str) -> np.ndarray:
    with Image.open(path) as image:
        size = image.size
    return np.asarray(read_mask(MaskFile(path, values), size)[0]) > 0


def colours(mask: np.ndarray, inside: tuple, outside: tuple) -> Image.Image:
    return Image.fromarray(np.where(mask[..., None], inside, outside).astype(np.uint8))


def levels(*values: int) -> np.ndarray:
    """Areas of equal size that store these numbers."""
    return np.repeat(np.array(values, np.uint8), 2400 // len(values)).reshape(40, 60)


def rings(side: int = 200) -> np.ndarray:
    """A cup in a disc: 0 outside, 1 the rim, 2 the cup."""
    y, x = np.mgrid[:side, :side] / side
    return sum((np.hypot(x - 0.5, y - 0.5) < r).astype(np.uint8) for r in (0.15, 0.1))


# ---- what is found out ----

@pytest.mark.parametrize("encode", [
    lambda m: Image.fromarray(m.astype(np.uint8) * 76),  # a palette mask that somebody converted to grey
    lambda m: Image.fromarray(m.astype(np.uint8)),
    lambda m: Image.fromarray(m.astype(np.uint8) + 1),
    lambda m: Image.fromarray(m.astype(np.uint8) * 255),
    lambda m: Image.fromarray(m),  # one bit
    lambda m: colours(m, (255, 0, 0, 255), (0, 0, 0, 255)),
    lambda m: colours(m, (255, 0, 0), (0, 0, 0)),
    lambda m: colours(m, (0, 128, 0), (0, 0, 0)),  # drawn in green
    lambda m: colours(m, (0, 0, 0, 255), (0, 0, 0, 0)),  # in the opacity
    lambda m: colours(m, (255, 0, 0, 255), (255, 255, 255, 0)),  # red on nothing, and the nothing hides white
    lambda m: colours(m, (0, 0, 0, 255), (255, 255, 255, 0)),
    lambda m: Image.fromarray(np.stack([np.full(m.shape, 255), m * 200], 2).astype(np.uint8)),  # grey and opacity
    lambda m: colours(m, (255, 255, 255), (0, 0, 0)).convert("CMYK"),
    lambda m: colours(m, (255, 0, 0), (0, 0, 0)).convert("CMYK"),
    lambda m: colours(m, (255,) * 3, (0,) * 3).quantize(2),  # palette, white first
    lambda m: Image.fromarray(m.astype(np.uint16) * 65535),
    lambda m: Image.fromarray(m.astype(np.int32) * 100000),
    lambda m: Image.fromarray(m.astype(np.float32)),
    lambda m: Image.fromarray((m * 250 + np.random.default_rng(0).integers(0, 5, m.shape)).astype(np.uint8)),
])
def test_every_encoding_of_a_mask_reads_the_same(tmp_path, encode):
    encode(SPOTS).save(tmp_path / "mask.tif")
    assert np.array_equal(read(tmp_path / "mask.tif"), SPOTS)


def test_a_palette_goes_by_its_colours_and_what_is_transparent_in_it(tmp_path):
    save_palette_mask(tmp_path / "mask.tif", SPOTS)
    assert np.unique(np.asarray(Image.open(tmp_path / "mask.tif").convert("L"))).tolist() == [0, 76]
    assert np.array_equal(read(tmp_path / "mask.tif"), SPOTS)
    image = Image.fromarray((~SPOTS).astype(np.uint8), "P")  # number 0 is the lesion, 1 a transparent white
    image.putpalette([200, 0, 0, 255, 255, 255])
    image.save(tmp_path / "a.png", transparency=1), image.save(tmp_path / "a.gif", transparency=1)
    assert np.array_equal(read(tmp_path / "a.png"), SPOTS) and np.array_equal(read(tmp_path / "a.gif"), SPOTS)


@pytest.mark.parametrize("mode,colour,empty", [
    ("L", "black", True), ("1", "black", True), ("RGB", "black", True), ("RGBA", "black", True), ("P", 0, True),
    ("RGBA", (255, 255, 255, 0), True), ("L", "white", False), ("L", 1, False), ("1", "white", False),
    ("RGB", "white", False), ("RGBA", "red", False), ("CMYK", (0, 0, 0, 0), False), ("I", -1, False)])
def test_a_file_of_one_value_is_an_empty_mask_or_asked_for(tmp_path, mode, colour, empty):
    Image.new(mode, SIZE, colour).save(tmp_path / "mask.tif")
    if empty:
        assert not read(tmp_path / "mask.tif").any()
    else:
        with pytest.raises(InputError, match=r"mask.tif: 1 value: .* \(100 %\); expected two, such as 0 and 255"):
            read(tmp_path / "mask.tif")


@pytest.mark.parametrize("save", [
    lambda mask, path: mask.filter(ImageFilter.GaussianBlur(0.7)).save(path.with_suffix(".png")),
    lambda mask, path: mask.convert("RGB").resize((800, 800), Image.BICUBIC).resize((400, 400), Image.BICUBIC).save(
        path.with_suffix(".png")),
    lambda mask, path: mask.save(path.with_suffix(".jpg"), quality=75),
    lambda mask, path: Image.merge("RGB", [mask, *[Image.new("L", mask.size)] * 2]).save(path.with_suffix(".jpg")),
    lambda mask, path: Image.merge("RGBA", [*[Image.new("L", mask.size, 90)] * 3, mask.filter(
        ImageFilter.GaussianBlur(0.7))]).save(path.with_suffix(".png"))])
@pytest.mark.parametrize("lesion", ["HE", "OD"])
def test_a_smooth_or_compressed_outline_is_allowed(tmp_path, save, lesion):
    truth = synthetic.render(synthetic.plan(11, 5), 400)[1][LESIONS.index(lesion)]
    save(Image.fromarray(truth.astype(np.uint8) * 255), tmp_path / "mask")
    found = read(next(tmp_path.glob("mask.*")))
    assert 2 * (found & truth).sum() > 0.98 * (found.sum() + truth.sum())


# ---- what is asked for ----

RGB = np.array([(0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255)], np.uint8)


@pytest.mark.parametrize("picture,found", [
    (lambda: Image.fromarray(np.array([255, 128, 0], np.uint8)[rings()]), r"3 values: 255 \(93 %\), 128 .*, 0 \("),
    (lambda: Image.fromarray(rings() * np.uint8(100)), r"3 values: 0 \(93 %\), 100 .*, 200 \("),
    (lambda: Image.fromarray(rings() * np.uint8(127)).filter(ImageFilter.GaussianBlur(0.7)), "[0-9]+ values: 0"),
    (lambda: Image.fromarray(levels(0, 1, 2, 3)), r"4 values: 0 \(25 %\), 1 .*, 3 \(25 %\); expected two"),
    (lambda: Image.fromarray(levels(*range(12))), r"12 values: 0 \(8.33 %\), .*, 7 .*, 4 more;"),
    (lambda: Image.fromarray(levels(0, 100, 200).astype(np.uint16) * 100), "3 values: 0 .*, 10000 .*, 20000"),
    (lambda: Image.fromarray(RGB[levels(0, 1, 2, 3)]), "4 values: .*#00ff00 .*#ff0000"),
    (lambda: Image.fromarray(RGB[levels(1, 3)]), r"2 values: #ff0000 \(50 %\), #0000ff"),  # neither is brighter
    (lambda: Image.fromarray(RGB[levels(0, 1, 1, 1, 1, 2)].repeat(9, 0).repeat(9, 1)).filter(
        ImageFilter.GaussianBlur(0.7)), "[0-9]+ values: #ff0000"),  # smooth borders of a colour map
    (lambda: Image.fromarray(np.dstack([RGB[levels(0, 1, 2)], 255 * (levels(0, 1, 2) > 0).astype(np.uint8)])),
     "3 values: transparent .33.3 %., .*#00ff00"),
    (lambda: Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60), np.uint8)), "256 values: "),
    (lambda: Image.fromarray(np.where(SPOTS, np.nan, 1).astype(np.float32)), "2 values: .*nan"),
    (lambda: Image.fromarray(np.where(SPOTS, np.inf, 0).astype(np.float32)), "2 values: 0 .*inf"),
    (lambda: Image.fromarray(np.where(SPOTS, -1, 0).astype(np.int32)), "2 values: 0 .*, -1 "),
    (lambda: colours(SPOTS, (255, 0, 0, 0), (0, 0, 0, 0)), "2 values: transparent .*, transparent"),  # all erased
])
def test_what_cannot_be_known_is_asked_for(tmp_path, picture, found):
    picture().save(tmp_path / "mask.tif")
    with pytest.raises(InputError, match=f"mask.tif: {found}") as caught:
        read(tmp_path / "mask.tif")
    assert "say which value means the lesion in the mask's cell of a table, as in mask.tif=3" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_compressed_discs_and_cups_are_asked_for(tmp_path):
    for side in (96, 400):
        Image.fromarray(rings(side) * np.uint8(127)).save(tmp_path / "mask.jpg", quality=90)
        with pytest.raises(InputError, match="mask.jpg: [0-9]+ values"):
            read(tmp_path / "mask.jpg")


def test_pages_and_deep_colours_are_refused(tmp_path):
    pages = [Image.fromarray(np.roll(SPOTS, k, 1).astype(np.uint8) * 255) for k in range(4)]
    for name in ("mask.tif", "mask.gif"):
        pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
        with pytest.raises(InputError, match=f"{name}: 4 pages; expected one"):
            read(tmp_path / name)
    deep = np.repeat(SPOTS.astype(">u2")[..., None], 3, 2)  # 0 and 1 of 65535, which Pillow reads as 0
    rows = b"".join(b"\0" + row.tobytes() for row in deep)
    parts = [(b"IHDR", struct.pack(">IIBBBBB", *SIZE, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    (tmp_path / "deep.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(p)) + k + p + struct.pack(">I", zlib.crc32(k + p)) for k, p in parts))
    with pytest.raises(InputError, match="deep.png: 16 bits per colour; expected 8"):
        read(tmp_path / "deep.png")


# ---- what a table declares ----

def eye(folder: Path, index: int) -> np.ndarray:
    """A drawn photograph of 300 pixels, folder/INDEX.jpg; -> its labels (300, 300), 0, or 1 and up as in LESIONS."""
    photograph(folder / f"{index}.jpg", index)
    labels = np.zeros((300, 300), np.uint8)
    for k, mask in enumerate(rendered(11, index, 300)[1]):
        labels[mask] = k + 1
    return labels


def table(folder: Path, *lines: str) -> list:
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return readers.read_data(folder / "labels.csv").records


def masks_of(records: list, size: int = 64) -> list[np.ndarray]:
    """The masks of each photograph, as training would see them."""
    found, *_ = leaks.find_eyes(records, size)
    return [data.FundusDataset([r], size)[0].masks.numpy() for r in found]


HEADER = "image," + ",".join(f"mask_{lesion.lower()}" for lesion in LESIONS)
TINTS = np.array([(0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (128, 0, 0)], np.uint8)


@pytest.mark.parametrize("name,draw,values", [
    ("map.png", Image.fromarray, "12345"),
    ("map.tif", lambda labels: Image.fromarray(labels.astype(np.uint16) * 1000), [1000, 2000, 3000, 4000, 5000]),
    ("map=1.png", lambda labels: Image.fromarray(TINTS[labels]), [
        "#ff0000", "#00FF00", "#0000ff", "#ffff00", "#800000"]),
    ("map.gif", lambda labels: Image.fromarray(TINTS[labels]).quantize(6), [
        "#ff0000", "#00ff00", "#0000ff", "#ffff00", "#800000"]),
    ("map.png", lambda labels: Image.fromarray(np.dstack([TINTS[labels], 255 * (labels > 0).astype(np.uint8)])), [
        "#ff0000", "#00ff00", "#0000ff", "#ffff00", "#800000"])])
def test_a_map_of_all_lesions_equals_a_file_for_each(tmp_path, name, draw, values):
    lines = {"one": [HEADER], "each": [HEADER]}
    for index in (17, 9):  # the second one has no soft exudates, so that its file lacks their value
        labels = eye(tmp_path, index)
        draw(labels).save(tmp_path / f"{index}{name}")
        for k, lesion in enumerate(LESIONS):
            Image.fromarray((labels == k + 1).astype(np.uint8) * 255).save(tmp_path / f"{index}{lesion}.png")
        lines["one"].append(f"{index}.jpg," + ",".join(f"{index}{name}={v}" for v in values))
        lines["each"].append(f"{index}.jpg," + ",".join(f"{index}{lesion}.png" for lesion in LESIONS))
    one, each = (np.stack(masks_of(table(tmp_path, *lines[key]))) for key in ("one", "each"))
    assert np.array_equal(one, each) and one.any((2, 3)).tolist() == [[True] * 5, [True, True, True, False, True]]


@pytest.mark.parametrize("value,draw", [("#ff0000", lambda labels: Image.fromarray(TINTS[labels])),
                                        ("240", lambda labels: Image.fromarray(labels * np.uint8(240)))])
def test_a_smoothed_map_has_no_exact_values(tmp_path, value, draw):
    """What is declared would be the core of each lesion; of a smoothed map nearly half of small ones would be lost."""
    labels = (eye(tmp_path, 9) == 2).astype(np.uint8)
    draw(labels).save(tmp_path / "map.png")
    assert np.array_equal(read(tmp_path / "map.png", value), labels > 0)
    draw(labels).filter(ImageFilter.GaussianBlur(0.7)).save(tmp_path / "map.png")
    with pytest.raises(InputError, match=f"map.png={value}: [0-9]+ pixels hold what is declared, and [0-9]+ nearly"):
        read(tmp_path / "map.png", value)


def test_a_smooth_opacity_is_half_opaque_where_its_colour_is_declared(tmp_path):
    labels = eye(tmp_path, 9) == 2
    soft = Image.fromarray(labels.astype(np.uint8) * 255).filter(ImageFilter.GaussianBlur(0.7))
    Image.merge("RGBA", [Image.new("L", (300, 300), c) for c in (255, 0, 0)] + [soft]).save(tmp_path / "m.png")
    for values in ([], ["#ff0000"]):
        found = read(tmp_path / "m.png", *values)
        assert 2 * (found & labels).sum() > 0.98 * (found.sum() + labels.sum())


def test_several_values_together_are_a_mask(tmp_path):
    """A disc with its cup, 0 the cup, 128 the rim, 255 elsewhere; and 0, 100, 200."""
    eye(tmp_path, 0), eye(tmp_path, 1)
    disc = rings(300) > 0
    for index, values in enumerate(([255, 128, 0], [0, 100, 200])):
        Image.fromarray(np.array(values, np.uint8)[rings(300)]).save(tmp_path / f"{index}.png")
    records = table(tmp_path, "image,mask_od", "0.jpg,0.png=0+128", "1.jpg,1.png = 100+200 ")
    assert records[0].masks == {"OD": MaskFile(tmp_path / "0.png", ("0", "128"))}
    assert all(np.array_equal(read(r.masks["OD"].path, *r.masks["OD"].values), disc) for r in records)
    assert masks_of(records)[0][-1].any()


def test_declared_values_name_the_cache_file(tmp_path):
    eye(tmp_path, 9)
    Image.fromarray(rings(300)).save(tmp_path / "m.png")
    paths = [cache.cache_path(table(tmp_path, "image,mask_ex,mask_od", row)[0], 64) for row in (
        "9.jpg,m.png=1,", "9.jpg,m.png=2,", "9.jpg,,m.png=1", "9.jpg,m.png=1,m.png=2", "9.jpg,m.png=2,m.png=1")]
    assert len(set(paths)) == 5
    record = table(tmp_path, "image,mask_ex,mask_od", "9.jpg,m.png=1,m.png=2")[0]
    assert [path.name for path, *_ in cache.input_files(record)] == ["9.jpg", "m.png"]


@pytest.mark.parametrize("cell,message", [
    ("m.png=red", "mask_ex 'm.png=red': 'red' is no value of a pixel; expected a number, as in m.png=3, a colour"),
    ("m.png=", "'' is no value of a pixel"), ("m.png=1+", "'' is no value"), ("m.png=1.5", "'1.5' is no value"),
    ("m.png=#ff00", "'#ff00' is no value"), ("m.png=\u0663", "is no value"), ("m.png==1", "'m.png==1': no such file"),
    ("none=3", "mask_ex 'none=3': no such file"), ("=3", "mask_ex '=3': "), ("a=b.png", "'a=b.png': no such file"),
    ("m.png=9", "m.png=9: the file holds 0, 1, 2, and no file of EX holds 9; correct the value, or write none"),
    ("m.png=1+300", "no file of EX holds 300"), ("m.png=#0000ff", "no file of EX holds #0000ff"),
    ("m.png=0", "m.png=0: sets 86% of the retina and 100% of the dark ground around it; expected a lesion; declare"),
    ("white.tif=255", "white.tif=255: the grey 255 is not the number 255 of this file's palette, 0 #000000 .*=#ffffff"),
    ("m.jpg=1", "m.jpg=1: JPEG, which changes values"),
    ("m.png=1,m.png", "m.png is the mask of EX and of OD; expected a file for each, or different values"),
    ("m.png=1,m.png=01", "m.png is the mask of EX and of OD"), ("m.png,m.png", "m.png is the mask of EX and of OD"),
    ("white.tif,x/../white.tif", "white.tif is the mask of EX and of OD"),
])
def test_what_is_declared_wrongly_is_one_line(tmp_path, cell, message):
    eye(tmp_path, 9), (tmp_path / "x").mkdir()
    Image.fromarray(rings(300)).save(tmp_path / "m.png"), Image.fromarray(rings(300)).save(tmp_path / "m.jpg")
    Image.fromarray(rings(300) > 0).save(tmp_path / "white.tif")
    with pytest.raises(InputError, match=f"labels.csv line 2: .*{message}".replace("+", "[+]")) as caught:
        masks_of(table(tmp_path, "image,mask_ex,mask_od", f"9.jpg,{cell}{',' * (',' not in cell)}"))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_called_like_a_declaration_is_that_file(tmp_path):
    eye(tmp_path, 9)
    for name in ("m.png=3", "a=3.png"):
        Image.fromarray(rings(300) > 0).save(tmp_path / name, "PNG")
        assert table(tmp_path, "image,mask_ex", f"9.jpg,{name}")[0].masks == {"EX": MaskFile(tmp_path / name)}
    record = table(tmp_path, "image,mask_ex", "9.jpg,a=3.png=1")[0]
    assert record.masks == {"EX": MaskFile(tmp_path / "a=3.png", ("1",))}


# ---- what cannot be true ----

@pytest.mark.parametrize("draw,message", [
    (lambda m: Image.fromarray((~m).astype(np.uint8) * 255), "with 255 for the lesion it sets 9[0-9]% of the retina "
     "and 100% of the dark ground around it; expected a lesion; is it inside out. .*, as in m.png=0"),
    (lambda m: colours(m, (255, 0, 0), (255, 255, 255)), "as in m.png=#ff0000"),
    (lambda m: colours(m, (255, 0, 0), (255, 255, 255)).quantize(2), "as in m.png=#ff0000"),
    (lambda m: colours(m, (255, 0, 0, 0), (255, 255, 255, 255)), "as in m.png=transparent"),
    (lambda m: Image.fromarray(np.hypot(*(np.mgrid[:300, :300] - 149.5)) > 130), "sets 0% of the retina and [0-9]+%"),
    (lambda m: Image.fromarray(np.hypot(*(np.mgrid[:300, :300] - 149.5)) < 120), "sets [19][0-9]+% of the retina"),
])
def test_a_mask_that_cannot_be_true_is_an_error(tmp_path, draw, message):
    labels = eye(tmp_path, 9)
    draw(labels == 3).save(tmp_path / "m.png")
    with pytest.raises(InputError, match=f"labels.csv line 2: .*m.png: .*{message}"):
        masks_of(table(tmp_path, "image,mask_ex", "9.jpg,m.png"))


def test_the_official_layout_asks_for_a_table(tree):
    path = next(tree.rglob("IDRiD_01_EX.tif"))
    save_palette_mask(path, np.asarray(Image.open(path)) == 0)
    with pytest.raises(InputError, match="IDRiD_01_EX.tif: with #ff0000 for the lesion it sets .* of a table, as in"):
        masks_of(readers.read_data(tree).records)


def test_what_the_message_says_to_declare_is_then_right(tmp_path):
    labels = eye(tmp_path, 9)
    for image, value in ((colours(labels != 3, (255, 255, 255), (0, 0, 0)), "0"),
                         (colours(labels == 3, (255, 0, 0, 0), (255, 255, 255, 255)), "transparent")):
        image.save(tmp_path / "m.png")
        mask = table(tmp_path, "image,mask_ex", f"9.jpg,m.png={value}")[0].masks["EX"]
        assert np.array_equal(read(mask.path, *mask.values), labels == 3)


def test_a_disc_that_fills_a_cropped_photograph_must_be_declared(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(90, 250, (40, 60, 3), np.uint8)).save(tmp_path / "a.png")
    disc = np.hypot(*(np.mgrid[:40, :60] - [[[20]], [[30]]])) < 24
    Image.fromarray(disc).save(tmp_path / "m.png")
    with pytest.raises(InputError, match="sets 6[0-9]% of the retina; expected a lesion"):
        masks_of(table(tmp_path, "image,mask_od", "a.png,m.png"))
    assert masks_of(table(tmp_path, "image,mask_od", "a.png,m.png=1"))[0][-1].any()
    Image.fromarray(~disc[12:28, 18:42]).save(tmp_path / "all.png")
    Image.open(tmp_path / "a.png").crop((18, 12, 42, 28)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="all.png=0: sets 100% of the retina; expected a lesion; declare the value of"):
        masks_of(table(tmp_path, "image,mask_od", "a.png,all.png=0"))


# ---- one meaning in a data set ----

@pytest.mark.parametrize("draw,row", [
    (lambda m: Image.fromarray(m + np.uint8(1)), "b.png: 1 would be background here, and the lesion in .*a.png"),
    (lambda m: Image.fromarray(m * np.uint8(254) + np.uint8(1)), "b.png: 1 would be background here"),
    (lambda m: colours(m, (255, 255, 255), (1, 1, 1)).quantize(2), "b.png: #010101 would be background here"),
])
def test_a_value_means_the_same_in_all_files(tmp_path, draw, row):
    a, b = (eye(tmp_path, index) == 3 for index in (9, 17))
    Image.fromarray(a.astype(np.uint8)).save(tmp_path / "a.png"), draw(b).save(tmp_path / "b.png")
    records = table(tmp_path, "image,mask_ex,mask_se", "9.jpg,a.png,", "17.jpg,,b.png")
    for ignore in (False, True):
        with pytest.raises(InputError, match=row):
            leaks.find_eyes(records, 64, ignore)


def test_other_encodings_of_the_same_may_stand_beside_each_other(tmp_path):
    truth = [eye(tmp_path, index) == 3 for index in (9, 17, 6, 2)]
    save_palette_mask(tmp_path / "0.tif", truth[0])
    colours(truth[1], (255, 0, 0, 255), (0, 0, 0, 255)).save(tmp_path / "1.tif")
    Image.fromarray(truth[2].astype(np.uint8) * 255).save(tmp_path / "2.tif")
    Image.fromarray(truth[3]).save(tmp_path / "3.tif")
    records = table(tmp_path, "image,mask_ex", *(f"{index}.jpg,{k}.tif" for k, index in enumerate((9, 17, 6, 2))))
    assert all(m[2].any() for m in masks_of(records))


def test_a_label_map_of_other_numbers_is_no_empty_mask(tmp_path):
    for index, factor in ((9, 1), (17, 50)):
        Image.fromarray(eye(tmp_path, index) * np.uint8(factor)).save(tmp_path / f"{index}.png")
    with pytest.raises(InputError, match="line 3: .*17.png=3: the file holds 0, 100, .*those of EX with 3 hold other"):
        masks_of(table(tmp_path, "image,mask_ex", "9.jpg,9.png=3", "17.jpg,17.png=3"))


@pytest.mark.parametrize("value,said", [(2, True), (255, False)])
def test_a_lesion_has_one_number(tmp_path, value, said):
    """1 is the lesion here and 2 there: label maps of which each holds one lesion. 1 and 255 both say "there"."""
    for index, number in ((9, 1), (17, value)):
        Image.fromarray((eye(tmp_path, index) == 3) * np.uint8(number)).save(tmp_path / f"{index}.png")
    records = table(tmp_path, "image,mask_ex", "9.jpg,9.png", "17.jpg,17.png")
    if said:
        with pytest.raises(InputError, match="17.png: 2 would be EX here, and 1 in .*9.png; expected one number"):
            leaks.find_eyes(records, 64)
    else:
        assert len(leaks.find_eyes(records, 64)[0]) == 2


def test_a_mask_halved_by_means_of_four_pixels_is_smooth(tmp_path):
    """Five values, 0, 64, 128, 191 and 255, as bilinear interpolation leaves them."""
    y, x = np.mgrid[:200, :200]
    whole = Image.fromarray((np.hypot(x - 90, y - 110) < 31.3).astype(np.uint8) * 255)
    half = whole.reduce(2)
    half.save(tmp_path / "m.png")
    assert len(np.unique(half)) == 5 and np.array_equal(read(tmp_path / "m.png"), np.asarray(half) > 127)


def test_a_mask_belongs_to_one_photograph(tmp_path):
    eye(tmp_path, 9), eye(tmp_path, 17)
    with pytest.raises(InputError, match="labels.csv line 3: 9.jpg is the mask of 9.jpg already, see .* line 2"):
        table(tmp_path, "image,mask_ex,mask_se", "9.jpg,9.jpg=1,", "17.jpg,,9.jpg=2")


# ---- which side is up ----

def turned(image: Image.Image, path: Path, orientation: int) -> None:
    """Save a picture with an EXIF orientation, its pixels as they are."""
    exif = Image.Exif()
    exif[0x112] = orientation
    image.save(path, exif=exif, quality=95, subsampling=0)


BACK = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90", 7: "TRANSVERSE",
        8: "ROTATE_270"}  # what makes the stored picture of what a viewer shows


@pytest.mark.parametrize("orientation", BACK)
@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_masks_lie_on_what_a_viewer_shows(tmp_path, orientation, suffix):
    """A bright spot in the corner: mask and photograph turned alike, and, where the sizes tell, an upright mask."""
    spot = np.zeros((90, 120), np.uint8)
    spot[10:30, 10:40] = 255
    stored = Image.fromarray(spot).transpose(Image.Transpose[BACK[orientation]])
    turned(stored.convert("RGB"), tmp_path / f"a.{suffix}", orientation)
    turned(stored, tmp_path / "m.jpg", orientation)
    Image.fromarray(spot).save(tmp_path / "upright.png"), stored.save(tmp_path / "stored.png")

    def sample(mask):
        return data.FundusDataset(table(tmp_path, "image,mask_ex", f"a.{suffix},{mask}"), 120)[0]

    both = sample("m.jpg")
    assert np.array_equal(both.masks[2].numpy() == 1, both.image[0].numpy() > 127) and both.masks[2, 30, 30]
    if orientation < 5:
        for name in ("upright.png", "stored.png"):  # which of them is meant, nobody can know
            with pytest.raises(InputError, match=f"{name}: EXIF orientation 1, its photograph's is {orientation}: the "
                                                 "mask may lie on it turned or mirrored"):
                sample(name)
    else:
        assert np.array_equal(sample("upright.png").masks, both.masks)
        with pytest.raises(InputError, match=f"a mask of 90x120 for a photograph of 120x90 .as EXIF orientation "
                                             f"{orientation} turns it; stored as 90x120.; both must have"):
            sample("stored.png")


@pytest.mark.parametrize("image,mask", [("a.jpg", "m.png"), ("a.png", "m.jpg")])
def test_a_png_that_says_it_was_turned_is_refused(tmp_path, image, mask):
    """Some viewers turn it, others do not."""
    spot = Image.fromarray(np.pad(np.full((20, 20), 255, np.uint8), ((10, 60), (10, 90))))
    turned(spot.convert("RGB"), tmp_path / image, 3), turned(spot, tmp_path / mask, 3)
    with pytest.raises(InputError, match="[am].png: a PNG with EXIF orientation 3, which .*; save it upright"):
        data.FundusDataset(table(tmp_path, "image,mask_ex", f"{image},{mask}"), 64)


def test_an_upright_photograph_with_a_turned_mask_and_a_square_one(tmp_path):
    spot = Image.fromarray(np.pad(np.full((20, 20), 255, np.uint8), ((10, 60), (10, 60))))
    spot.convert("RGB").save(tmp_path / "up.jpg"), spot.save(tmp_path / "m.png")
    turned(spot, tmp_path / "m.jpg", 3), turned(spot.convert("RGB"), tmp_path / "side.jpg", 6)
    for row, message in (("up.jpg,m.jpg", "m.jpg: EXIF orientation 3, its photograph's is 1"),
                         ("side.jpg,m.png", "m.png: EXIF orientation 1, its photograph's is 6"),
                         ("side.jpg,m.jpg", "m.jpg: EXIF orientation 3, its photograph's is 6")):
        with pytest.raises(InputError, match=message):
            data.FundusDataset(table(tmp_path, "image,mask_ex", row), 64)


def test_a_point_outside_of_a_turned_photograph_names_the_orientation(tmp_path):
    turned(Image.new("RGB", (90, 120), "red"), tmp_path / "a.jpg", 6)
    with pytest.raises(InputError, match="outside a.jpg with its 120x90 .as EXIF orientation 6 turns it; stored as "
                                         "90x120. pixels; expected pixels of this file; scale"):
        table(tmp_path, "image,disc_x,disc_y", "a.jpg,50,110")


# ---- the simple version, and the real files ----

@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "I;16"])
def test_values_and_counts_are_those_of_all_pixels(tmp_path, mode):
    """A histogram and a table in place of the pixels are faster; what each pixel stores is what counts."""
    image = Image.fromarray(levels(0, 7, 9, 255)).point(lambda v: 255 * (v > 8)).convert(mode) if mode == "1" else \
        Image.fromarray(levels(0, 7, 9, 255)).convert(mode)
    stored, pixels = stored_values(image), np.asarray(image)
    for i in range(len(stored.codes)):
        here = (pixels.reshape(40, 60, -1)[..., 0] == (stored.numbers[i] if mode != "P" else stored.codes[i]))
        assert here.sum() == stored.counts[i]
        assert np.array_equal(np.asarray(stored.mask(np.arange(len(stored.codes)) == i)) > 0, here)


@pytest.mark.parametrize("name", ["idrid", "idrid-original"])
def test_the_real_masks_are_what_is_not_zero(name):
    found = [r for r in readers.read_idrid(real_idrid(name)).records if r.masks][:3]
    for mask in (m for r in found for m in r.masks.values() if m):
        with Image.open(mask.path) as image:
            pixels = np.asarray(image)
        assert np.array_equal(read(mask.path), pixels.reshape(*pixels.shape[:2], -1)[..., 0] > 0)
