"""From files to samples: geometry, reduced decoding."""

import math
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
from conftest import photograph, real_idrid, save_palette_mask
from retina.datasets import preprocess, readers, synthetic
from retina.datasets.masks import MaskFile, read_mask
from retina.datasets.readers import read_idrid
from retina.datasets.records import Record
from retina.files import InputError


def training_records(root: Path) -> list[Record]:
    return [r for r in read_idrid(root).records if r.split == "train"]


def drawn_records(number: int) -> list[Record]:
    return [r for r in readers.read_drawn().records if r.split == "test"][:number]


# ---- masks ----

def test_no_mask_file_means_no_lesion(shared_tree):
    found = [r for r in training_records(shared_tree) if r.masks is not None]
    photographs = data.FundusDataset(found, 64)
    lacking = [(i, k) for i, r in enumerate(found) for k in synthetic.LESIONS if not r.masks[k]]
    assert lacking
    for i, lesion in lacking:
        assert not photographs[i].masks[synthetic.LESIONS.index(lesion)].any()
    for i, r in enumerate(found):
        assert photographs[i].masks[synthetic.LESIONS.index("HE")].any()


# ---- geometry ----

def disc_photograph(width=600, height=400, centre=(330, 190), radius=150) -> tuple[Image.Image, tuple]:
    y, x = np.mgrid[:height, :width]
    inside = np.hypot(x + 0.5 - centre[0], y + 0.5 - centre[1]) < radius
    pixels = np.where(inside[..., None], (180, 90, 40), (4, 3, 3)).astype(np.uint8)
    box = (centre[0] - radius, centre[1] - radius, centre[0] + radius, centre[1] + radius)
    return Image.fromarray(pixels), box


def test_field_of_view_is_the_circle():
    image, box = disc_photograph()
    assert np.abs(np.array(preprocess.field_of_view(image)) - box).max() < 600 / 256 * 2


@pytest.mark.parametrize("shape", ["whole", "spot", "frame", "bar"])
def test_pictures_without_a_field_of_view_are_taken_whole(shape):
    pixels = np.zeros((200, 300, 3), np.uint8)
    y, x = np.mgrid[:200, :300]
    x, y = abs(x - 150), abs(y - 100)
    inside = {"whole": y >= 0, "spot": np.hypot(x, y) < 30, "frame": (x < 90) & (y < 80), "bar": (x < 20) & (y < 80)}
    pixels[inside[shape]] = 180
    assert preprocess.field_of_view(Image.fromarray(pixels)) is None


def test_field_of_view_of_a_black_image():
    assert preprocess.field_of_view(Image.new("RGB", (300, 200), (2, 2, 2))) is None


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_points_and_masks_follow_the_image(tmp_path, suffix):
    """A white dot: found in the sample where geometry says, found in the mask there too, and mapped back."""
    image, _ = disc_photograph(2000, 1400, (1100, 650), 500)
    pixels, mask = np.array(image), np.zeros((1400, 2000), bool)
    dot = (1240, 470)
    pixels[dot[1] - 20:dot[1] + 20, dot[0] - 20:dot[0] + 20] = 255
    mask[dot[1] - 20:dot[1] + 20, dot[0] - 20:dot[0] + 20] = True
    Image.fromarray(pixels).save(tmp_path / f"photo.{suffix}", quality=95)
    save_palette_mask(tmp_path / "m.tif", mask)
    record = Record("x", tmp_path / f"photo.{suffix}", labels={"masks": {"EX": MaskFile(tmp_path / "m.tif")}})
    sample = data.FundusDataset([record], 128)[0]
    assert sample.image.shape == (3, 128, 128) and (sample.geometry.width, sample.geometry.height) == (2000, 1400)
    for found in (sample.image[2] > 150, sample.masks[synthetic.LESIONS.index("EX")] == 1):
        y, x = (v.float().mean().item() + 0.5 for v in found.nonzero(as_tuple=True))
        assert math.dist((x, y), sample.geometry.to_sample(np.array(dot))) < 0.6
        assert math.dist(dot, sample.geometry.to_file(np.array((x, y)))) < 0.6 * 1000 / 128
    assert np.allclose(sample.geometry.to_file(sample.geometry.to_sample(np.array([[3.0, 5.0]]))), [[3, 5]])
    assert abs(sample.geometry.scale_x / sample.geometry.scale_y - 1) < 0.02  # the aspect is kept


@pytest.mark.parametrize("size", [4097, 2051, 1025])
def test_reduced_decoding_moves_nothing(tmp_path, size):
    """A JPEG reduced to a fraction of a pixel: a dot near the far corner still lies where geometry says."""
    pixels = np.zeros((size, size, 3), np.uint8)
    at = size - 8 * size // 100
    pixels[at - size // 50:at + size // 50, at - size // 50:at + size // 50] = 255
    Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=95)
    sample = data.FundusDataset([Record("x", tmp_path / "a.jpg", labels={"landmarks": {"disc": (at, at)}})], 256)[0]
    light = sample.image.float().mean(0)
    x = float((light * (torch.arange(256) + 0.5)).sum() / light.sum())
    assert abs(x - float(sample.landmarks[0, 0])) < 0.05


@pytest.mark.parametrize("point,fits", [
    ((330, 190), True), ((185, 190), True), ((330, 45), True), ((435, 295), True),  # 150 pixels around (330, 190)
    ((1, 190), False), ((170, 190), False), ((330, 30), False), ((330, 395), False),  # left, above, below
    ((445, 305), False)])  # in a corner of the box, 163 from the centre
def test_a_point_outside_of_the_field_of_view_is_one_line(tmp_path, point, fits):
    disc_photograph()[0].save(tmp_path / "a.png")
    points = {"disc": (320, 100), "fovea": point}
    record = Record("x", tmp_path / "a.png", labels={"landmarks": points}, where="t line 2")
    if fits:
        assert not data.FundusDataset([record], 64)[0].landmarks.isnan().any()
        return
    data.FundusDataset([record.with_labels(landmarks={"disc": (320, 100)})], 64)  # what was decoded is checked again
    with pytest.raises(InputError) as caught:
        data.FundusDataset([record], 64)
    found = re.fullmatch(rf"t line 2: the fovea of {tmp_path}/a.png is at \({point[0]}, {point[1]}\), "
                         r"outside of its lit field, which lies in x (\d+) to (\d+), y (\d+) to (\d+); expected.*",
                         str(caught.value))
    assert np.abs(np.array(found.groups(), int) - (180, 480, 40, 340)).max() < 5


def test_points_of_a_picture_without_a_field_of_view_may_lie_anywhere_in_it(tmp_path):
    Image.new("RGB", (300, 200), (180, 90, 40)).save(tmp_path / "a.png")
    points = {"disc": (2, 199), "fovea": (299, 3)}
    sample = data.FundusDataset([Record("x", tmp_path / "a.png", labels={"landmarks": points})], 64)[0]
    assert not sample.landmarks.isnan().any()


def test_a_dark_fovea_and_a_dark_rim_do_not_move_points_out_of_the_field(tmp_path):
    image = np.array(disc_photograph()[0])
    image[150:230, 290:370], image[100:140, 190:230] = 3, 3
    Image.fromarray(image).save(tmp_path / "a.png")
    points = {"disc": (215, 125), "fovea": (330, 190)}
    assert not data.FundusDataset([Record("x", tmp_path / "a.png", labels={"landmarks": points})],
                                  64)[0].landmarks.isnan().any()


def test_which_masks_are_black_is_known_of_the_files(tmp_path):
    """A lesion of 3 x 2 pixels vanishes at the size of the sample, but its mask is not black."""
    disc_photograph()[0].save(tmp_path / "a.png")
    mask = np.zeros((400, 600), bool)
    mask[200:202, 300:303] = True
    save_palette_mask(tmp_path / "ma.tif", mask)
    save_palette_mask(tmp_path / "he.tif", mask & False)
    masks = {"MA": MaskFile(tmp_path / "ma.tif"), "HE": MaskFile(tmp_path / "he.tif"), "EX": None}
    arrays = preprocess.preprocess(Record("x", tmp_path / "a.png", labels={"masks": masks}), 32)
    assert not arrays["masks"].any()
    assert arrays["stored"].tolist() == [["MA", "P 0 1", "#ff0000", "#000000"], ["HE", "P 0", "", "#000000"]]


@pytest.mark.parametrize("width,height", [(1000, 667), (1001, 701), (997, 1333)])
def test_odd_sizes_and_a_retina_that_touches_the_edge(tmp_path, width, height):
    image, _ = disc_photograph(width, height, (width // 2, height // 2), max(width, height) // 2)
    image.save(tmp_path / "photo.jpg", quality=95)
    y, x = np.mgrid[:height, :width]
    save_palette_mask(tmp_path / "m.tif", (abs(y - height // 2) < 30) | (abs(x - width // 2) < 30))  # from edge to edge
    record = Record("x", tmp_path / "photo.jpg", labels={"masks": {"OD": MaskFile(tmp_path / "m.tif")}})
    sample = data.FundusDataset([record], 64)[0]
    corners = sample.geometry.to_sample(np.array([(0, 0), (width, height)]))
    inside = sample.masks[-1].nonzero()
    assert np.abs(corners[0] - inside.min(0).values.flip(0).numpy()).max() < 0.6
    assert np.abs(corners[1] - inside.max(0).values.flip(0).numpy() - 1).max() < 0.6


def test_size_does_not_move_the_split(tmp_path):
    record = photograph(tmp_path / "a.jpg", 0)
    for key in ("thumbnail", "vessels"):
        assert np.array_equal(*(preprocess.preprocess(record, size)[key] for size in (64, 512)))


def test_reduced_decoding_is_close_to_full_decoding(tmp_path):
    drawn = Image.fromarray(synthetic.render(synthetic.plan(0, 3), 1024)[0])
    drawn.save(tmp_path / "a.jpg", quality=92), Image.open(tmp_path / "a.jpg").save(tmp_path / "a.png")
    fast, full = (preprocess.preprocess(Record("x", tmp_path / f"a.{s}"), 128)["image"].astype(float)
                  for s in ("jpg", "png"))
    assert 10 * math.log10(255 ** 2 / ((fast - full) ** 2).mean()) > 38  # dB


# ---- photographs of other kinds ----

def write_png(path: Path, pixels: np.ndarray, colour_type: int) -> None:
    """Grey 0, RGB 2, grey and opacity 4, RGBA 6; 8 or 16 bits a channel, as the type of the pixels (h, w, c) says."""
    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    height, width = pixels.shape[:2]
    head = struct.pack(">IIBBBBB", width, height, 8 * pixels.itemsize, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(row.dtype.newbyteorder(">")).tobytes() for row in pixels)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) +
                     chunk(b"IEND", b""))


def write_tiff(path: Path, pixels: np.ndarray, planar: bool = False) -> None:
    """RGB of the pixels (h, w, 3), colour by colour within each pixel or, `planar`, one colour after the other."""
    height, width, size = *pixels.shape[:2], pixels.nbytes // 3
    lists = 8 + 2 + 12 * 10 + 4  # where tags with more than one number keep them: bits, offsets and lengths of strips
    strips = [(lists + 30 + k * size, size) for k in range(3)] if planar else [(lists + 30, 3 * size)]
    tags = {256: (4, 1, width), 257: (4, 1, height), 258: (3, 3, lists), 259: (3, 1, 1), 262: (3, 1, 2),
            273: (4, len(strips), lists + 6 if planar else lists + 30), 277: (3, 1, 3), 278: (4, 1, height),
            279: (4, len(strips), lists + 18 if planar else 3 * size), 284: (3, 1, 1 + planar)}
    content = b"II*\0" + struct.pack("<IH", 8, len(tags))
    content += b"".join(struct.pack("<HHII", tag, *entry) for tag, entry in tags.items())
    content += struct.pack("<I3H", 0, *[8 * pixels.itemsize] * 3)
    content += struct.pack("<6I", *[o for o, _ in strips], *[n for _, n in strips]) if planar else bytes(24)
    path.write_bytes(content + (pixels.transpose(2, 0, 1) if planar else pixels).tobytes())


def stored_as(path: Path, form: str, pixels: np.ndarray) -> None:
    """Write RGB pixels, 8 or 16 bits a channel, of which grey forms take the first channel."""
    grey, opaque = pixels[..., :1], np.full_like(pixels[..., :1], np.iinfo(pixels.dtype).max)
    if form.startswith("PNG"):
        what = {"PNG grey": (grey, 0), "PNG RGB": (pixels, 2), "PNG grey, opacity": (np.dstack([grey, opaque]), 4),
                "PNG RGBA": (np.dstack([pixels, opaque]), 6)}[form]
        write_png(path, *what)
    elif form.startswith("TIFF RGB"):
        write_tiff(path, pixels, form.endswith("planar"))
    elif form == "TIFF grey":
        Image.fromarray(grey[..., 0]).save(path, "TIFF")
    else:
        kind, channels = (b"P6", pixels) if form == "PPM" else (b"P5", grey)
        most = 255 if pixels.itemsize == 1 else 4095
        path.write_bytes(b"%s 30 20 %d\n" % (kind, most) + channels.astype(channels.dtype.newbyteorder(">")).tobytes())


@pytest.mark.parametrize("form", ["PNG grey", "PNG RGB", "PNG grey, opacity", "PNG RGBA", "TIFF RGB", "TIFF RGB planar",
                                  "TIFF grey", "PPM", "PGM"])
def test_more_than_eight_bits_a_channel_are_refused_whatever_the_format(tmp_path, form):
    """12 bits in 16, which would look almost black; the same with 8 bits is read as it is."""
    pixels = np.random.default_rng(0).integers(0, 4096, (20, 30, 3), np.uint16)
    stored_as(tmp_path / "deep", form, pixels)
    bits = 12 if form in ("PPM", "PGM") else 16
    with pytest.raises(InputError, match=f"deep: {bits} bits a channel; expected 8: convert it, scaled to its bright"):
        preprocess.read_image(tmp_path / "deep", 512)
    stored_as(tmp_path / "usual", form, (pixels // 16).astype(np.uint8))
    read = np.asarray(preprocess.read_image(tmp_path / "usual", 512).image)
    grey = form in ("PNG grey", "PNG grey, opacity", "TIFF grey", "PGM")
    assert np.array_equal(read, (pixels[..., [0, 0, 0]] if grey else pixels) // 16)


@pytest.mark.parametrize("suffix", ["gif", "tif", "webp", "png"])
def test_a_photograph_has_one_page(tmp_path, suffix):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8))
    image.save(tmp_path / f"a.{suffix}", save_all=True, append_images=[image.rotate(180)])
    with pytest.raises(InputError, match=f"a.{suffix}: 2 pages; expected one: save the one to use as a file of its ow"):
        preprocess.read_image(tmp_path / f"a.{suffix}", 512)


def test_what_a_camera_puts_behind_a_jpeg_does_not_count_as_a_page(tmp_path):
    image = Image.fromarray(synthetic.render(synthetic.plan(0, 3), 64)[0])
    image.save(tmp_path / "a.jpg")
    image.save(tmp_path / "b.jpg", "MPO", save_all=True, append_images=[image.rotate(9)])
    with Image.open(tmp_path / "b.jpg") as both:
        assert (both.format, both.n_frames) == ("MPO", 2)
    one, two = (np.asarray(preprocess.read_image(tmp_path / f"{name}.jpg", 512).image).astype(int) for name in "ab")
    assert abs(one - two).mean() < 2


# ---- the real photographs, where they are at hand ----

@pytest.mark.parametrize("name", ["idrid", "idrid-original"])
def test_real_photographs_crop_to_the_retina_and_masks_fit(name):
    root = real_idrid(name)
    found = [r for r in training_records(root) if r.masks is not None][:6]
    found += [r for r in training_records(root) if r.masks is None][:6]
    photographs = data.FundusDataset(found, 256)
    for i, record in enumerate(found):
        sample = photographs[i]
        lit = sample.image.amax(0) > 30
        assert 0.6 < lit.float().mean() < 0.9  # a circle that fills its square, cut at top and bottom
        assert lit.any(0).float().mean() > 0.95
        assert abs(sample.geometry.scale_x / sample.geometry.scale_y - 1) < 0.01
        if record.masks is None:
            continue
        disc = sample.masks[synthetic.LESIONS.index("OD")] == 1
        assert 0.01 < disc.float().mean() < 0.05
        green = sample.image[1].float()
        assert green[disc].mean() > 1.2 * green[lit].mean()  # the disc is bright where its mask says
        for mask in filter(None, record.masks.values()):
            assert np.asarray(read_mask(mask, Image.open(record.image).size)[0]).any()


def test_real_originals_and_reductions_give_the_same_sample():
    """The same photograph at 4288x2848 and at 1072x712 lands on the same pixels of the sample."""
    originals = {r.name: r for r in training_records(real_idrid("idrid-original"))}
    reduced = {r.name: r for r in training_records(real_idrid("idrid"))}
    for name in list(originals)[:8]:
        a, b = (preprocess.preprocess(r, 256)["image"].astype(float) for r in (originals[name], reduced[name]))
        assert 10 * math.log10(255 ** 2 / ((a - b) ** 2).mean()) > 30  # dB
