"""Mask files: which of the values that a file stores mean the lesion, and whether that can be true.

    MaskFile, split_cell      a mask as a table names it: its path, and the values that mean the lesion, if declared
    read_mask                 file -> picture of 0 and 255, and what stood for what
    check_plausible           a mask of half of the retina, or of the dark ground around it, is an error
    check_meanings            a value means the same in all files of a data set

What is not declared is found out only where there is one answer: two values of which one is brighter, or the smooth
outline of such a mask. Everything else is asked for.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from retina.files import SIDEWAYS, InputError, channel_bits, exif_orientation, open_image, orientation, page_count, \
    shown_size


# H W height and width of a mask, n distinct values in its file

# The most that a mask may set of the retina, the same where its value is declared, and of the dark ground. In IDRiD
# one reaches 0.22 of the retina, and one of the official test, a stripe drawn by mistake, 0.012 of the ground.
RETINA, DECLARED, GROUND = 0.5, 0.9, 0.1
HOW = "say which value means the lesion in the mask's cell of a table, as in"


# ---- a mask as a table names it ----

@dataclass(frozen=True)
class MaskFile:
    """A mask's file, and which of its stored values mean the lesion; (): to be found out.

    It is true as long as it may set a pixel: a black file says no more than "none".
    """
    path: Path
    values: tuple[str, ...] = ()  # numbers such as "3", colours such as "#ff0000", "transparent"
    black: bool = False  # known to set no pixel, see leaks.settle_masks

    def __bool__(self):
        return not self.black

    def __str__(self):
        return str(self.path) + f"={'+'.join(self.values)}" * bool(self.values)


def split_cell(cell: str, folder: Path, what: str) -> tuple[str, tuple[str, ...]]:
    """ "lesions.png=3+#ff0000" -> ("lesions.png", ("#ff0000", "3")); a file in `folder` of the whole name goes first.

    InputError: what follows the "=" is no value; `what` names the cell.
    """
    name, sign, text = (part.strip() for part in cell.rpartition("="))
    values = [value.strip().lower() for value in text.split("+")]
    wrong = [v for v in values if not re.fullmatch(r"-?\d{1,10}|#[0-9a-f]{6}|transparent", v, re.ASCII)]
    if not sign or (folder / cell).is_file() or wrong and not (folder / name).is_file():
        return cell, ()
    if wrong:
        raise InputError(f"{what} {cell!r}: {wrong[0]!r} is no value of a pixel; expected a number, as in {name}=3, a "
                         f"colour, as in {name}=#ff0000, or several joined by +")
    return name, tuple(sorted({str(int(v)) if is_number(v) else v for v in values}))


def is_number(value: str) -> bool:
    """Whether a declared value is a number, not a colour."""
    return value.lstrip("-").isdecimal()


def check_distinct(masks: Mapping[str, MaskFile | None], where: str) -> None:
    """InputError: a file is the mask of two lesions of one photograph, and not by different values."""
    for (one, a), (two, b) in itertools.combinations(masks.items(), 2):
        if a and b and a.path.resolve() == b.path.resolve() and (not a.values or not b.values or a.values == b.values):
            raise InputError(f"{where}: {a.path.name} is the mask of {one} and of {two}; expected a file for each, or "
                             f"different values of one, as in {a.path.name}=1 and {a.path.name}=2")


# ---- what a file stores ----

@dataclass
class Stored:
    """The n distinct values of a picture, and where they are."""
    picture: Image.Image | np.ndarray  # of `codes`: a picture of bytes, or (H, W)
    codes: np.ndarray  # (n,) ascending
    counts: np.ndarray  # (n,) pixels
    numbers: np.ndarray  # (n,) what a declared number means; nan: a colour, or transparent
    colours: list[str]  # n, what a declared colour, or "transparent", means; "": a number without a colour
    levels: np.ndarray  # (n, 3) what tells lesion from background: a colour, or three times a number or an opacity
    mode: str  # of the file, Pillow's
    lossy: bool  # it is a JPEG

    @property
    def by_place(self) -> bool:
        """Whether the numbers are places in a palette."""
        return self.mode in ("1", "P")

    def mask(self, rows: np.ndarray) -> Image.Image:
        """A picture of 255 where one of the values `rows` (n,) bool is, else 0."""
        if isinstance(self.picture, Image.Image):  # 10 ms where numpy takes 60
            table = np.zeros(256, np.uint8)
            table[self.codes[rows]] = 255
            return self.picture.point(table.tolist(), "L")
        return Image.fromarray((rows * np.uint8(255))[np.searchsorted(self.codes, self.picture)])

    def name(self, i: int) -> str:
        """A value as a table may declare it."""
        if self.by_place or np.isnan(self.numbers[i]):
            return self.colours[i] or "nan"
        return f"{self.numbers[i]:g}"

    def commonest(self, rows: np.ndarray, most: int) -> np.ndarray:
        """Of the values `rows` (n,) bool at most so many, the commonest first."""
        return np.flatnonzero(rows)[np.argsort(-self.counts[rows], kind="stable")][:most]

    def listing(self) -> str:
        """The values with their shares of the picture, at most eight of them."""
        shares = [f"{self.numbers[i]:g} " * self.by_place + f"{self.name(i)} "
                  f"({100 * self.counts[i] / self.counts.sum():.3g} %)" for i in self.commonest(self.counts > 0, 8)]
        return ", ".join(shares + [f"{len(self.codes) - 8} more"] * (len(self.codes) > 8))


def stored_values(image: Image.Image, lossy: bool = False) -> Stored:
    """What a picture of any mode stores; `lossy`: it comes from a JPEG."""
    mode = image.mode
    if mode[0] in "IF":  # numbers, not colours
        picture = np.asarray(image)
        codes, counts = np.unique(picture, return_counts=True)
        return Stored(picture, codes, counts, codes.astype(float), [""] * len(codes), as_levels(codes), mode, lossy)
    if mode in ("1", "L", "P"):
        # look at the few values in place of the many pixels: 16 ms instead of 300 for IDRiD's
        picture = image.convert("L") if mode == "1" else image
        counts = np.array(picture.histogram())
        codes = np.flatnonzero(counts)
        counts, image = counts[codes], picture.crop((0, 0, len(codes), 1))
        image.putdata(codes.tolist())
        colours = np.asarray(image.convert("RGBA"))[0]
    else:
        image = image if mode in ("RGB", "RGBA", "LA", "PA", "RGBa", "La") else image.convert("RGB")
        picture = np.asarray(image.convert("RGBA")).view(np.uint32)[..., 0]
        codes, counts = np.unique(picture, return_counts=True)
        colours = codes.view(np.uint8).reshape(-1, 4)
    opacity, grey = colours[:, 3].astype(int), np.ptp(colours[:, :3], 1) == 0
    seen = 2 * opacity >= max(opacity.max(), 1)
    numbers = codes // 255 if mode == "1" else codes if mode == "P" else np.where(grey & seen, colours[:, 0], np.nan)
    levels = np.where(seen[:, None], colours[:, :3].astype(float), -1)
    if not opacity.any():
        levels = as_levels(opacity - (len(codes) > 1))  # nothing to be seen, and perhaps a drawing that somebody erased
    elif np.ptp(opacity) and not np.ptp(colours[opacity == opacity.max(), :3], 0).any():
        levels = as_levels(opacity)  # one colour drawn on nothing, whatever colour the nothing hides
    elif mode == "P" and not np.ptp(levels, 0).any():
        levels = as_levels(codes)
    names = [f"#{r:02x}{g:02x}{b:02x}" if s else "transparent" for (r, g, b, _), s in zip(colours, seen)]
    return Stored(picture, codes, counts, numbers.astype(float), names, levels, mode, lossy)


def as_levels(numbers: np.ndarray) -> np.ndarray:
    """Numbers (n,) as levels (n, 3)."""
    return np.repeat(numbers.astype(float)[:, None], 3, 1)


# ---- which values mean the lesion ----

def declared_rows(stored: Stored, mask: MaskFile, value: str) -> np.ndarray:
    """Which values (n,) a declared one means. InputError: a number means two of a palette."""
    if not is_number(value):
        return np.isin(stored.colours, value)
    rows, grey = stored.numbers == int(value), np.isin(stored.colours, "#" + 3 * f"{int(value):02x}")
    if stored.by_place and (grey & ~rows).any():
        raise InputError(f"{mask}: the grey {value} is not the number {value} of this file's palette, "
                         f"{stored.listing()}; expected one meaning; declare the colour, as in "
                         f"{mask.path.name}={stored.colours[grey.argmax()]}")
    return rows


def check_exact(stored: Stored, rows: np.ndarray, mask: MaskFile) -> None:
    """InputError: beside the declared values, `rows` (n,) bool, a picture of many values holds nearly the same ones."""
    if not rows.any() or len(stored.codes) <= 32:
        return
    declared = np.unique(stored.levels[rows], axis=0)
    apart = np.min([np.abs(stored.levels - level).max(1) for level in declared], 0)  # (n,) from the nearest of these
    seen = np.array(stored.colours) != "transparent"
    nearly, exact = (stored.counts[r].sum() for r in (~rows & seen & (apart <= 64), rows))
    if nearly > 0.1 * exact:
        raise InputError(f"{mask}: {exact} pixels hold what is declared, and {nearly} nearly the same; expected one "
                         "value for all pixels of a lesion; save the file without smoothing or compression")


def lesion_rows(stored: Stored) -> np.ndarray | None:
    """Which values (n,) mean the lesion, where nobody says so; None: cannot be known.

    All zero is an empty mask. Of two values it is the brighter one, if no channel says otherwise.
    """
    levels, place = np.unique(stored.levels, axis=0, return_inverse=True)
    place = place.ravel()
    if not np.isfinite(levels).all():
        return None
    if len(levels) > 2:
        return smooth_rows(stored)
    if len(levels) == 2 and (levels >= 0).all() and (levels[0] <= levels[1]).all():
        return place == 1
    return None if levels.any() else np.zeros(len(place), bool)


def smooth_rows(stored: Stored) -> np.ndarray | None:
    """Which values (n,) are the brighter half, if a picture is the smooth or compressed outline of a mask; else None.

    Such a picture has many values, all on the way from one colour to another, and nearly all pixels at its ends. Those
    between gather at no value of their own, and lie in a thin band.
    """
    counts, top = stored.counts, stored.levels.max(1)
    share = (top - top.min()) / np.ptp(top) if np.ptp(top) >= 100 else np.full(len(top), np.nan)
    low, bright, high = share <= 0.1, share > 0.5, share >= 0.9
    between = ~(low | high)
    number, area = counts[between].sum(), counts[bright].sum()
    halved = len(share) == 5 and np.allclose(np.sort(share), (0, 0.25, 0.5, 0.75, 1), atol=0.01)  # means of four
    if len(counts) < (3 if stored.lossy or halved else 9) or number > area:
        return None
    one, two = (stored.levels[stored.commonest(end, 1)] for end in (low, high))
    histogram = np.histogram(share[between], 16, (0.1, 0.9), weights=counts[between])[0]
    if np.abs(stored.levels - one - share[:, None] * (two - one)).max() > 80 or \
            number > 0.1 * area and (histogram[1:] + histogram[:-1]).max() > 0.6 * number:
        return None
    dark, light, band = (np.asarray(stored.mask(rows)) > 0 for rows in (low, high, between))
    reach = max(3, min(band.shape) // 128)
    return bright if (band & ~(near(dark, reach) & near(light, reach))).sum() <= 0.05 * area else None


def near(there: np.ndarray, reach: int) -> np.ndarray:
    """Where (H, W) a pixel of `there` is at most `reach` rows and columns away."""
    for _ in range(2):
        sums = np.cumsum(np.pad(there, ((reach + 1, reach), (0, 0))), 0, np.int32)
        there = (sums[2 * reach + 1:] > sums[:-2 * reach - 1]).T
    return there


# ---- a file ----

@dataclass(frozen=True)
class Meaning:
    """How a mask is stored ("P 0 1"), and the names of values that are set and of those that are not: "0, 1, 2"."""
    form: str
    lesion: str
    ground: str


def read_mask(mask: MaskFile, size: tuple[int, int], turned: int | None = None) -> tuple[Image.Image, Meaning]:
    """A lesion mask as an image of 0 and 255, as a viewer shows it, and what stands for what.

    `size` (width, height) and `turned`, the EXIF orientation, are those of its photograph; None: not compared.
    InputError: not readable, of another size or orientation, of several pages, or of values that do not tell which of
    them mean the lesion.
    """
    with open_image(mask.path) as image:
        held = exif_orientation(image)
        if (pages := page_count(image)) > 1:
            raise InputError(f"{mask.path}: {pages} pages; expected one; save the page of each lesion as its own file")
        lossy = image.format == "JPEG"
        if mask.values and lossy:
            raise InputError(f"{mask}: JPEG, which changes values; expected a format that keeps them; save it as PNG")
        if image.mode[0] not in "IF" and (bits := channel_bits(image)) > 8:
            raise InputError(f"{mask.path}: {bits} bits per colour; expected 8, or one channel of 16; convert it")
        image = ImageOps.exif_transpose(image) if orientation(image) > 1 else image.copy()
    check_fit(mask, image.size, held, size, held if turned is None else turned)
    return find_lesion(stored_values(image, lossy), mask)


def find_lesion(stored: Stored, mask: MaskFile) -> tuple[Image.Image, Meaning]:
    """See read_mask."""
    if mask.values:
        declared = {v: declared_rows(stored, mask, v) for v in mask.values}
        rows, form = np.any([*declared.values()], 0), "declared in the table"
        check_exact(stored, rows, mask)
        lesion, most = [v for v, there in declared.items() if there.any()], 8
    else:
        rows, number, name = lesion_rows(stored), len(stored.codes), mask.path.name
        if rows is None:
            raise InputError(f"{mask.path}: {number} value{'s' * (number > 1)}: {stored.listing()}; expected two, such "
                             "as 0 and 255, not smoothed or compressed; " + (
                                 "save it as PNG of two values" if stored.lossy else
                                 f"{HOW} {name}=3, {name}=#ff0000 or {name}=1+2"))
        form = " ".join(f"{stored.numbers[i]:g}" if stored.by_place else stored.name(i) for i in range(number)) \
            if number < 4 else f"{number} values"
        lesion, most = map(stored.name, stored.commonest(rows, 1)), 1
    ground = map(stored.name, stored.commonest(~rows, most))
    return stored.mask(rows), Meaning(f"{stored.mode} {form}", ", ".join(lesion), ", ".join(ground))


def check_fit(mask: MaskFile, size: tuple[int, int], held: int, photograph: tuple[int, int], turned: int) -> None:
    """InputError: mask and photograph, as a viewer shows them, differ in size, or perhaps in which side is up.

    `held` and `turned` are the EXIF orientations of mask and photograph.
    """
    if size != photograph:
        hint = ", as a viewer shows them; save both upright" * (max(held, turned) > 1)
        raise InputError(f"{mask.path}: a mask of {shown_size(size, held)} for a photograph of "
                         f"{shown_size(photograph, turned)}; both must have the same size{hint}")
    upright, other = sorted((held, turned))
    if upright != other and not (upright == 1 and other in SIDEWAYS and size[0] != size[1]):  # sizes tell these
        raise InputError(f"{mask.path}: EXIF orientation {held}, its photograph's is {turned}: the mask may lie on it "
                         "turned or mirrored; expected the same; save both upright, or give the mask that orientation")


def check_plausible(mask: MaskFile, picture: Image.Image, lit: np.ndarray, meaning: Meaning) -> None:
    """InputError: a mask sets too much of the retina, or of the dark ground around it.

    lit (h, w) bool is where the retina is, in a reduced photograph; all of it, where there is no dark ground.
    """
    there = np.asarray(picture.resize(lit.shape[::-1], Image.NEAREST)) > 0
    retina, ground = (there[part].mean() if part.mean() > 0.02 else 0 for part in (lit, ~lit))
    if retina <= (DECLARED if mask.values else RETINA) and ground <= GROUND:
        return
    where = f"{retina:.0%} of the retina" + f" and {ground:.0%} of the dark ground around it" * bool(ground)
    if mask.values:
        raise InputError(f"{mask}: sets {where}; expected a lesion; declare the value of the lesion, not of what is "
                         f"around it; the file also holds {meaning.ground or 'nothing else'}")
    raise InputError(f"{mask.path}: with {meaning.lesion} for the lesion it sets {where}; expected a lesion; is it "
                     f"inside out? {HOW} {mask.path.name}={meaning.ground} or {mask.path.name}={meaning.lesion}, of a "
                     "PNG and not of a JPEG")


# ---- a data set ----

def check_meanings(masks: Sequence[tuple[str, str, MaskFile, Meaning]]) -> None:
    """InputError: a value is the lesion in one file and background in another, or a declared one is in no file.

    `masks` are those of a data set: the row that names it, the lesion, the file, and what stands for what.
    """
    def grey(name):  # a colour that is grey is that number
        return re.sub(r"^#(..)\1\1$", lambda match: str(int(match[1], 16)), name)

    declared = [m for m in masks if m[2].values]
    found = {(lesion, v) for _, lesion, _, meaning in declared for v in meaning.lesion.split(", ")}
    beside = {(lesion, v) for _, lesion, _, meaning in declared if meaning.lesion for v in meaning.ground.split(", ")}
    for where, lesion, mask, meaning in declared:
        absent, others = [v for v in mask.values if (lesion, v) not in found], meaning.ground.split(", ")
        strange = [v for v in others[1:] if (lesion, v) not in beside | found]
        if absent or not meaning.lesion and strange == others[1:] != []:
            raise InputError(f"{where}: {mask}: the file holds {meaning.ground}, and "
                             + (f"no file of {lesion} holds {absent[0]}" if absent else
                                f"those of {lesion} with {' or '.join(mask.values)} hold other values")
                             + "; correct the value, or write none where the lesion is not there")
    plain = [(lesion, mask, meaning) for _, lesion, mask, meaning in masks if not mask.values]
    lesion_in = {grey(meaning.lesion): mask for _, mask, meaning in plain if meaning.lesion}
    numbers = {}  # of lesions, by lesion: 1 and 255 may both mean "there", 1 and 2 are two things
    for lesion, mask, meaning in plain:
        value = grey(meaning.lesion)
        if value.isdecimal() and value != "255":
            other, before = numbers.setdefault(lesion, (mask, value))
            if before != value:
                raise InputError(f"{mask.path}: {value} would be {lesion} here, and {before} in {other.path}; expected "
                                 f"one number for a lesion; {HOW} {mask.path.name}={value}")
    for _, mask, meaning in plain:
        if other := lesion_in.get(grey(meaning.ground)):
            raise InputError(f"{mask.path}: {meaning.ground} would be background here, and the lesion in {other.path}; "
                             f"expected one meaning in all files; {HOW} {mask.path.name}={meaning.ground}")
