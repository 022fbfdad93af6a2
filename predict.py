"""Answers in the pixels of the photograph's own file: for photographs without labels, and to score masks at full size.

    refusal             why a picture is no photograph of a retina that can be graded, if it is none
    answer, in_tiles    one photograph through the network: whole, or its lesions in overlapping tiles
    in_file_pixels      a map of the sample -> the pixels of the file
    tally_at_full_size  masks against masks, in those pixels
    predict_all         python evaluate.py RUN --images ... --out FOLDER: a table, overlays, masks

Research use only: this is no medical device.
"""

import csv
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from tqdm import tqdm

import data
import metrics
from files import InputError
from model import Net
from records import IMAGE_SUFFIXES, Record, files_in
from tasks import Landmarks, Lesions, Task

# S side of the sample in pixels, L kinds of lesion, H W height and width of the file

NOTE = "research use only, no medical device"
LOOK = 256  # pixels: side of the field of view when its quality is judged
SMALLEST = 64  # pixels of the field of view
AHEAD, BEHIND = 2, 2  # photographs read before the network is at them, and still written after it: see overlapped
DARKEST, PALEST, PLAINEST, SOFTEST = 30, 1.1, 0.006, 0.33  # see refusal


# ---- is it a retina? ----

@dataclass
class Look:
    """How a picture looks within its field of view, without the rim."""
    brightness: float  # median of the brightest channel, of 255
    redness: float  # mean red / mean green
    structure: float  # deviation of what is 1 to 2 % of the field wide, over the mean green
    sharpness: float  # deviation of what is half as wide / the same


def look(image: Image.Image, field: tuple[float, float, float, float]) -> Look | None:
    """Judge the field of view (left, top, right, bottom) of a picture; None where too little of it is lit."""
    picture = image.convert("RGB").resize((LOOK, LOOK), Image.BOX, field)
    lit = torch.from_numpy(data.lit_pixels(picture)).float()
    pixels = torch.from_numpy(np.array(picture)).float()  # (LOOK, LOOK, 3)

    def blurred(layer, sigma):
        weights = torch.exp(-torch.arange(-20, 21).square() / (2 * sigma ** 2))
        wide = nn.functional.conv2d(layer[None, None], weights.view(1, 1, 1, 41) / weights.sum(), padding=(0, 20))
        return nn.functional.conv2d(wide, weights.view(1, 1, 41, 1) / weights.sum(), padding=(20, 0))[0, 0]

    def local_mean(sigma):  # of green, over the lit pixels around
        return blurred(pixels[..., 1] * lit, sigma) / blurred(lit, sigma).clamp(min=1e-3)

    inside = blurred(lit, 4.0) > 0.99
    if not inside.any():
        return None
    fine, middle, coarse = (local_mean(sigma) for sigma in (1.0, 2.5, 6.0))
    red, green, _ = pixels[inside].mean(0).clamp(min=1e-3).tolist()
    structure = float((middle - coarse)[inside].std())
    return Look(float(pixels[inside].amax(1).median()), red / green, structure / green,
                float((fine - middle)[inside].std()) / max(structure, 1e-6))


def refusal(image: Image.Image) -> str:
    """Why a picture cannot be graded, or "".

    Noise passes for detail, and whatever is lit, round, red and structured passes for a retina. Of IDRiD's 467 training
    photographs none is refused: their brightness is 61 to 233, redness 1.5 to 3.9, structure 1.1 to 8.1 %, sharpness
    0.39 to 1.17. Blurred with a sigma of 1.6 % of the field's width, all that were tried are: sharpness 0.26 to 0.32.
    """
    field = data.field_of_view(image)
    found = None if field is None else look(image, field)
    if found is None:
        return "no field of view found: expected the lit circle of a fundus photograph on a dark ground"
    if min(field[2] - field[0], field[3] - field[1]) < SMALLEST:
        return (f"too small: its field of view measures {field[2] - field[0]:.0f}x{field[3] - field[1]:.0f} pixels, "
                f"expected at least {SMALLEST} a side")
    if found.brightness < DARKEST:
        return f"too dark: the median brightness is {found.brightness:.0f} of 255, expected at least {DARKEST}"
    if found.redness < PALEST:
        return f"not the colours of a retina: red is {found.redness:.2f} times green, expected at least {PALEST}"
    if found.structure < PLAINEST:
        return (f"nothing to be seen: brightness varies by {found.structure:.2%} of its mean, expected at least "
                f"{PLAINEST:.1%}")
    if found.sharpness < SOFTEST:
        return (f"too blurred: fine detail is {found.sharpness:.2f} of what is twice as wide, expected at least "
                f"{SOFTEST}")
    return ""


# ---- one photograph ----

def sample_of(record: Record, size: int, small: data.Decoded | None = None) -> data.Sample:
    """A photograph as the network sees it, without labels; `small`: see data.prepare."""
    plain = replace(record, masks=None, points=None)
    return data.to_sample(plain, data.prepare(plain, size, alone=True, small=small))


def rows(net: Net, tasks: Sequence[Task], number: int, device: torch.device) -> dict[str, Tensor]:
    """For Net.forward: these tasks answer for all of `number` photographs, the others for none."""
    wanted = {t.name for t in tasks}
    return {name: torch.arange(number if name in wanted else 0, device=device) for name in net.heads}


@torch.inference_mode()
def answer(net: Net, tasks: Sequence[Task], image: Tensor, device: torch.device) -> dict[str, Tensor]:
    """What the network says of one sample (3, S, S) uint8: {task: decoded answer, one row}."""
    outputs, _ = net(image[None].to(device), rows(net, tasks, 1, device))
    return {t.name: t.decode(outputs[t.name].float())[0].cpu() for t in tasks}


@torch.inference_mode()
def in_tiles(net: Net, task: Task, image: Tensor, size: int, device: torch.device, batch: int = 8) -> Tensor:
    """Masks (L, Z, Z) of a sample (3, Z, Z) larger than the network's, from tiles (size, size) that overlap by half.

    Where tiles overlap, their probabilities are averaged with weights that fall off towards a tile's border, where the
    network sees least of what is around.
    """
    side = image.shape[-1]
    number = -(-2 * (side - size) // size) + 1
    starts = [round(k * (side - size) / max(1, number - 1)) for k in range(number)]
    corners = [(y, x) for y in starts for x in starts]
    window = torch.sin(torch.pi * (torch.arange(size) + 0.5) / size).square()
    window = window[:, None] * window
    total, weight = torch.zeros(len(task.classes), side, side), torch.zeros(side, side)
    for k in range(0, len(corners), batch):
        part = corners[k:k + batch]
        tiles = torch.stack([image[:, y:y + size, x:x + size] for y, x in part]).to(device)
        outputs, _ = net(tiles, rows(net, [task], len(part), device))
        for (y, x), masks in zip(part, task.decode(outputs[task.name].float()).cpu()):
            total[:, y:y + size, x:x + size] += window * masks
            weight[y:y + size, x:x + size] += window
    return total.div_(weight)


def masks_of(net: Net, task: Task, record: Record, size: int, tiles: float | None, device: torch.device,
             batch: int) -> tuple[np.ndarray, data.Geometry]:
    """Masks (L, Z, Z) of a photograph and where they lie in its file: predicted whole, or in tiles of a larger one."""
    sample = sample_of(record, size if tiles is None else round(size * tiles))
    masks = answer(net, [task], sample.image, device)[task.name] if tiles is None else \
        in_tiles(net, task, sample.image, size, device, batch)
    return masks.numpy(), sample.geometry


def in_file_pixels(map_: np.ndarray, geometry: data.Geometry) -> np.ndarray:
    """A map of the sample (Z, Z) float32 -> of the file (H, W), bilinear; 0 outside of the sample.

    To the last bit what Pillow's Image.transform gives, in a fifth of its time: it goes along x for every pixel of the
    file, this for every row of the sample.
    """
    g, side = geometry, len(map_)

    def places(number, scale, shift):  # of pixels of the file: sample's pixel before, how far behind it, inside?
        at = (np.arange(number) + 0.5) * scale + shift
        before = np.floor(at - 0.5)
        return before.astype(int), at - 0.5 - before, (at >= 0) & (at < side)

    x, dx, inside_x = places(g.width, g.scale_x, g.shift_x)
    y, dy, inside_y = places(g.height, g.scale_y, g.shift_y)

    def along_x(row):
        left, right = (map_[min(max(row, 0), side - 1)].take(x + i, mode="clip") for i in (0, 1))
        return np.where(inside_x, left + (right - left) * dx, 0)  # (W,)

    found = np.zeros((g.height, g.width), np.float32)
    for row in np.unique(y[inside_y]):
        upper, lower, here = along_x(row), along_x(row + 1), np.flatnonzero(inside_y & (y == row))
        found[here] = upper + (lower - upper) * dy[here, None]
    return found


# ---- masks against masks ----

def tally_at_full_size(net: Net, task: Lesions, records: Sequence[Record], size: int, tiles: float | None,
                       device: torch.device, batch: int, pool: metrics.Ranking) -> tuple[list[str], Tensor]:
    """Names and tallies (see Lesions.tally) of photographs with masks, in the pixels of their files."""
    tallies = []
    with ThreadPoolExecutor(2) as threads:  # two at a time: decoding and sorting leave Python's lock alone
        for record in tqdm(records, desc="masks at full size", unit="photo", leave=False, disable=None):
            maps, geometry = masks_of(net, task, record, size, tiles, device, batch)

            def tally(kind, record=record, maps=maps, geometry=geometry):
                if task.classes[kind] not in record.masks:
                    return task.count(kind, maps[kind], None, pool)
                path = record.masks[task.classes[kind]]
                shape = geometry.height, geometry.width
                truth = np.zeros(shape, bool) if path is None else np.asarray(data.read_mask(path, shape[::-1])[0]) > 0
                return task.count(kind, in_file_pixels(maps[kind], geometry), truth, pool)

            tallies.append(torch.stack(list(threads.map(tally, range(len(task.classes))))))
    return [r.name for r in records], torch.stack(tallies)


# ---- new photographs ----

def find_photographs(paths: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """The photographs that are named and those in the folders that are; what in these is left out.

    InputError: no such file, a folder without a photograph.
    """
    found, notes = [], []
    for path in paths:
        if not path.exists():
            raise InputError(f"--images {path}: no such file or folder; expected photographs, or folders of them")
        if path.is_dir():
            inside = files_in(path)
            images = [p for p in inside if p.is_file() and p.suffix.lower() in IMAGE_SUFFIXES]
            if not images:
                raise InputError(f"--images {path}: holds no photograph; expected files that end in "
                                 f"{' '.join(IMAGE_SUFFIXES)}")
            if others := [p.name for p in inside if p not in images]:
                notes.append(f"left out, as no photographs or as folders: {len(others)} in {path} "
                             f"({', '.join(others[:3])}{', ...' * (len(others) > 3)})")
            found += images
        else:
            found.append(path)
    return list(dict.fromkeys(found)), notes


def names_for(paths: Sequence[Path]) -> Iterator[str]:
    """A name for each, without its suffix; a number is added where two would have the same."""
    names = set()
    for path in paths:
        stem = path.stem.encode("utf-8", "replace").decode()[:60]
        name, number = stem, 1
        while name.lower() in names:
            number += 1
            name = f"{stem}_{number}"
        names.add(name.lower())
        yield name


@dataclass
class Photo:
    """A photograph on its way through a Predictor. Without a sample, its row says why it is not answered."""
    row: dict  # of predictions.csv, as far as it is known
    lit: float = 0.0  # share of the picture that shows retina
    sample: data.Sample | None = None
    large: data.Sample | None = None  # to cut tiles from
    picture: Image.Image | None = None  # as large as its file, to draw on
    found: dict[str, Tensor] | None = None  # what the network says: {task: decoded answer, one row}


@dataclass
class Predictor:
    """What turns photographs into rows of predictions.csv and pictures: write(ask(read(path, name))) for each."""
    net: Net
    tasks: Sequence[Task]
    chosen: Mapping[str, Mapping[str, float]]  # task -> temperature and thresholds, from validation
    size: int
    tiles: float | None
    batch: int  # of tiles
    device: torch.device
    out: Path
    retinas: bool  # False: trained on folders of classes, which may show anything

    def read(self, path: Path, name: str) -> Photo:
        """All that is needed of a file: a JPEG is decoded once for each purpose, others once; see data.read_image."""
        row = {"photograph": str(path), "name": name, "status": "answered", "reason": "", "note": NOTE}
        shown = folders(self.tasks)
        try:
            small = data.read_image(path, 512)
            row |= dict(zip(("width", "height"), small.size))
            if self.retinas and (reason := refusal(small.image)):
                return Photo(row | {"status": "refused", "reason": reason})
            record, tiles = Record(name, path), self.tiles if "masks" in shown else None
            return Photo(row, float(data.lit_pixels(small.image).mean()), sample_of(record, self.size, small),
                         None if tiles is None else sample_of(record, round(self.size * tiles), small),
                         data.read_image(path, 1 << 30, small).image if shown else None)
        except InputError as error:
            reason = str(error).removeprefix(f"{path}: ").partition("; replace the file")[0]
            return Photo(row | {"status": "unreadable", "reason": reason})

    def ask(self, photo: Photo) -> Photo:
        """The same photograph with what the network says of it."""
        if photo.sample is None:
            return photo
        found = answer(self.net, self.tasks, photo.sample.image, self.device)
        if photo.large is not None:
            found |= {t.name: in_tiles(self.net, t, photo.large.image, self.size, self.device, self.batch)
                      for t in self.tasks if isinstance(t, Lesions)}
        return replace(photo, found=found)

    def write(self, photo: Photo) -> dict:
        """The row of a photograph, with columns of all tasks; its pictures are written."""
        if photo.found is None:
            return photo.row
        row, masks, points, lines = photo.row, {}, None, []
        for task in self.tasks:
            found = photo.found[task.name]
            if isinstance(task, Lesions):
                masks = self.write_masks(row["name"], task, found.numpy(), (photo.large or photo.sample).geometry)
                row |= {f"area_{kind}": round(np.count_nonzero(mask) / mask.size / photo.lit, 6)
                        for kind, mask in masks.items()}
                continue
            columns = task.answers(found, photo.sample, self.chosen[task.name])
            row |= columns
            lines += task.caption(columns)
            if isinstance(task, Landmarks):
                points = [(columns[f"{p}_x"], columns[f"{p}_y"]) for p in task.classes]
        if photo.picture is not None:
            overlay(photo.picture, masks, points, [*lines, NOTE]).save(
                self.out / "overlays" / f"{row['name']}.png", compress_level=1)
        return row

    def write_masks(self, name: str, task: Lesions, maps: np.ndarray, geometry: data.Geometry) -> dict[str, np.ndarray]:
        """{kind: (H, W) bool} at the chosen thresholds, each written as a PNG of 0 and 255."""
        masks = {}
        for kind, map_ in zip(task.classes, maps):
            masks[kind] = in_file_pixels(map_, geometry) >= self.chosen[task.name][kind]
            Image.fromarray(masks[kind]).convert("L").save(self.out / "masks" / f"{name}_{kind}.png", compress_level=1)
        return masks


def folders(tasks: Sequence[Task]) -> list[str]:
    """Of the pictures that answers to these tasks are shown in."""
    masks = any(isinstance(t, Lesions) for t in tasks)
    return ["overlays"] * (masks or any(isinstance(t, Landmarks) for t in tasks)) + ["masks"] * masks


def tinted(image: Image.Image, masks: Mapping[str, np.ndarray]) -> Image.Image:
    """A photograph with its lesions tinted and outlined, the optic disc outlined; masks {kind: (H, W) bool}."""
    pixels, stroke = np.array(image), max(1, round(min(image.size) / 700))
    flat = pixels.reshape(-1, 3)  # numbers of pixels find the few of a mask faster than truth values do
    for kind, mask in masks.items():
        inner = np.zeros_like(mask)  # less a stroke on all sides
        s, middle = stroke, slice(stroke, -stroke)
        inner[middle, middle] = mask[middle, middle] & mask[:-2 * s, middle] & mask[2 * s:, middle] & \
            mask[middle, :-2 * s] & mask[middle, 2 * s:]
        colour = np.array(data.COLOURS[kind], np.float32)
        if kind != "OD":
            inside = np.flatnonzero(inner)
            flat[inside] = (0.7 * flat[inside] + 0.3 * colour).astype(np.uint8)
        flat[np.flatnonzero(mask & ~inner)] = colour
    return Image.fromarray(pixels)


def overlay(image: Image.Image, masks: Mapping[str, np.ndarray], points: Sequence | None,
            lines: Sequence[str]) -> Image.Image:
    """A photograph with its lesions shown, its landmarks marked and a legend in its corner."""
    picture = tinted(image, masks)
    pen, height = ImageDraw.Draw(picture), max(9, round(min(image.size) / 45))
    if points is not None:
        data.mark(pen, points, min(image.size) / 60)
        lines = [*lines, "+ optic disc, x fovea"]
    legend = [(line, "white") for line in lines] + [(f"{k} {data.KINDS[k]}", data.COLOURS[k]) for k in masks]
    if 2.6 * height * len(legend) > picture.height:  # it would hide what there is to see
        legend = legend[:1]
    for k, (line, colour) in enumerate(legend):
        pen.text((height // 2, round((0.5 + 1.3 * k) * height)), line, colour, ImageFont.load_default(height),
                 stroke_width=max(1, height // 10), stroke_fill="black")
    return picture


def write_rows(path: Path, rows: Iterator[Mapping]) -> list[Mapping]:
    """Write rows as they come, so that none is lost; -> all of them. The header is that of the first answered one."""
    done, waiting, writer = [], [], None
    # names of files need not be text
    with open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        def write(columns):
            new = csv.DictWriter(file, columns, restval="")
            new.writeheader()
            return new

        try:
            for row in rows:
                done.append(row)
                waiting.append(row)
                if writer is None and row["status"] == "answered":
                    writer = write(row)
                if writer is not None:
                    writer.writerows(waiting)
                    waiting.clear()
                    file.flush()
        finally:
            if waiting:
                (writer or write(max(waiting, key=len))).writerows(waiting)
    return done


def overlapped(predictor: Predictor, photographs: Iterable[tuple[Path, str]]) -> Iterator[Mapping]:
    """Rows in order; while the network has one photograph, threads read the next ones and write the last ones.

    After an error or Ctrl-C, what is being written is written to its end and has its row.
    """
    waiting, reading, writing = iter(photographs), deque(), deque()

    def settled(most):  # rows of what is written, until no more than `most` photographs are being written
        while len(writing) > most or writing and writing[0].done():
            row = writing[0].result()  # Ctrl-C may end the wait: not taken out before
            writing.popleft()
            yield row

    # one reader: open_image turns a warning into an error, and two threads would undo that for each other
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(BEHIND) as writers:
        try:
            while True:
                reading += [reader.submit(predictor.read, *p) for p in islice(waiting, 1 + AHEAD - len(reading))]
                if not reading:
                    break
                writing.append(writers.submit(predictor.write, predictor.ask(reading.popleft().result())))
                yield from settled(BEHIND)
            yield from settled(0)
        except (Exception, KeyboardInterrupt):
            for unwanted in reading:
                unwanted.cancel()
            yield from (w.result() for w in writing if w.exception() is None)
            raise


def predict_all(predictor: Predictor, paths: Sequence[Path]) -> list[Mapping]:
    """Answer for all photographs; -> the rows of predictions.csv. InputError: `out` is in use."""
    out = predictor.out
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: a file; expected a folder, new or empty")
    if out.exists() and any(out.iterdir()):
        raise InputError(f"--out {out}: holds {next(out.iterdir()).name} and perhaps more; expected a folder, new or "
                         "empty")
    for folder in (".", *folders(predictor.tasks)):
        (out / folder).mkdir(parents=True, exist_ok=True)
    predictor.net.eval()
    rows = overlapped(predictor, zip(paths, names_for(paths)))
    bar = tqdm(rows, total=len(paths), desc="predicting", unit="photo", leave=False, disable=None)
    return write_rows(out / "predictions.csv", bar)
