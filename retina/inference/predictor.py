"""Predictions for photographs without labels: a table, overlays, masks. Research use only: this is no medical device.

    python evaluate.py RUN --images ... --out FOLDER
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
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from retina.datasets import preprocess
from retina.datasets.preprocess import Sample
from retina.datasets.records import Record
from retina.datasets.splits import connected_components
from retina.datasets.tables import IMAGE_SUFFIXES, files_in
from retina.drawing import overlay
from retina.evaluation.task_metrics import LandmarkMetrics, MaskMetrics, TaskMetrics
from retina.files import InputError, NotFiniteError
from retina.inference.full_size import blend, predict_in_tiles, predict_sample, to_file_pixels, unlabelled_sample
from retina.inference.quality import refusal
from retina.training.precision import autocast


NOTE = "research use only, no medical device"
MOST = 8  # photographs at once: each holds 0.3 GiB, if it has 12 million pixels


def find_photographs(paths: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """The photographs among `paths` and in folders among them; and notes of what in these is left out.

    InputError: no such file, a folder without a photograph.
    """
    photographs, notes = [], []
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
            photographs += images
        else:
            photographs.append(path)
    return list(dict.fromkeys(photographs)), notes


def names_for(paths: Sequence[Path]) -> Iterator[str]:
    """A name for each path, without its suffix; a number is added where two would have the same name."""
    names = set()
    for path in paths:
        stem = path.stem.encode("utf-8", "replace").decode()[:60]
        name, number = stem, 1
        while name.lower() in names:
            number += 1
            name = f"{stem}_{number}"
        names.add(name.lower())
        yield name


def runs_of(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Pixels of a mask (h, w) that stand beside each other in a row: of each such run first, last + 1, component.

    Places count through rows that are one pixel wider. Runs that touch, also at a corner, are of one component.
    """
    wide = mask.shape[1] + 1
    edges = np.flatnonzero(np.diff(np.pad(mask, ((0, 0), (0, 1))).ravel(), prepend=False))
    first, end = edges[::2], edges[1::2]
    below, behind = np.searchsorted(end, first + wide), np.searchsorted(first, end + wide, side="right")
    pairs = [(i, j) for i, (a, b) in enumerate(zip(below.tolist(), behind.tolist())) for j in range(a, b)]
    return first, end, connected_components(pairs, len(first))


def only_disc(map_: np.ndarray, threshold: float, centre: Sequence[float] | None) -> np.ndarray:
    """A map (Z, Z) of probabilities of the optic disc, of which an eye has one: 0 in all its components but one.

    That is the one at or nearest to the `centre` (x, y) in pixels of the map, or without it the one with the largest
    sum of probabilities.
    """
    mask = map_ >= threshold
    first, end, component = runs_of(mask)
    if len(set(component)) < 2:
        return map_
    of_run = np.array(component)
    if centre is None:
        sums = np.bincount(of_run, np.add.reduceat(np.pad(np.where(mask, map_, 0), ((0, 0), (0, 1))).ravel(), first))
        kept = sums.argmax()
    else:
        y, x = divmod(first, map_.shape[1] + 1)
        gap_x = np.maximum(0, np.maximum(x + 0.5 - centre[0], centre[0] - (x + end - first - 0.5)))
        kept = of_run[np.hypot(gap_x, y + 0.5 - centre[1]).argmin()]
    steps = np.zeros(mask.size + len(mask), int)
    steps[first[of_run != kept]], steps[end[of_run != kept]] = 1, -1
    return np.where(steps.cumsum().reshape(len(mask), -1)[:, :-1], 0, map_)


@dataclass
class Photo:
    """A photograph on its way through a Predictor. Without a sample, its row says why there is no prediction."""
    row: dict  # of predictions.csv, as far as it is known
    retina_share: float = 0.0  # share of the picture that shows retina
    sample: Sample | None = None
    large: Sample | None = None  # to cut tiles from
    picture: Image.Image | None = None  # as large as its file, to draw on
    predictions: dict[str, Tensor] | None = None  # see predict_sample


@dataclass
class Predictor:
    """Turns photographs into rows of predictions.csv and pictures, see `answer`; several threads may share it."""
    net: nn.Module
    tasks: Sequence[TaskMetrics]
    calibration: Mapping[str, Mapping[str, float]]  # task -> temperature and thresholds, from validation
    size: int
    tiles: float | None
    batch: int  # of tiles
    device: torch.device
    out: Path
    seen: Mapping[str, float]  # see quality.refusal
    precision: str = "fp32"  # one of precision.DTYPES
    check: bool = True  # False: answer for pictures that would be refused, too, and say why they would be

    def answer(self, path: Path, name: str) -> dict:
        """The row of a photograph, whose pictures are written under this name."""
        return self.write(self.predict(self.read(path, name)))

    def read(self, path: Path, name: str) -> Photo:
        """Decode a file for each purpose: a JPEG once for each size, others once; see read_image."""
        row = {"photograph": str(path), "name": name, "status": "answered", "reason": "", "note": NOTE}
        folders = picture_folders(self.tasks)
        try:
            small = preprocess.read_image(path, 512)
            row |= dict(zip(("width", "height"), small.size))
            if (reason := refusal(small.image, self.seen, small.foreground)):
                if self.check:
                    return Photo(row | {"status": "refused", "reason": reason})
                row["reason"] = f"would be refused: {reason}"
            record, tiles = Record(name, path), self.tiles if "masks" in folders else None
            return Photo(row, float(small.foreground.mean()) or 1.0,  # 1: nothing is lit
                         unlabelled_sample(record, self.size, small),
                         None if tiles is None else unlabelled_sample(record, round(self.size * tiles), small),
                         preprocess.read_image(path, 1 << 30, small).image if folders else None)
        except InputError as error:
            reason = str(error).removeprefix(f"{path}: ").partition("; replace the file")[0]
            return Photo(row | {"status": "unreadable", "reason": reason})

    def predict(self, photo: Photo) -> Photo:
        """The same photograph with the network's predictions, or with what is wrong with these."""
        if photo.sample is None:
            return photo
        try:
            with autocast(self.device, self.precision):
                predictions = predict_sample(self.net, self.tasks, photo.sample.image, self.device)
                for t in (t for t in self.tasks if photo.large is not None and isinstance(t, MaskMetrics)):
                    tiled = predict_in_tiles(self.net, t, photo.large.image, self.size, self.device, self.batch)
                    predictions[t.name] = blend(predictions[t.name], tiled, photo.sample.geometry, photo.large.geometry)
        except NotFiniteError as error:
            return replace(photo, row=photo.row | {"status": "failed", "reason": str(error)})
        return replace(photo, predictions=predictions)

    def write(self, photo: Photo) -> dict:
        """The row of a photograph, with columns of all tasks; writes its pictures."""
        if photo.predictions is None:
            return photo.row
        row, masks, points, lines = photo.row, {}, None, []
        centre = next((photo.predictions[t.name][t.classes.index("disc")] for t in self.tasks
                       if isinstance(t, LandmarkMetrics) and "disc" in t.classes), None)  # as shares of the side
        for task in self.tasks:
            prediction = photo.predictions[task.name]
            if isinstance(task, MaskMetrics):
                geometry = (photo.large or photo.sample).geometry
                for lesion, map_ in zip(task.classes, prediction.numpy()):
                    threshold = self.calibration[task.name][lesion]
                    if lesion == "OD":
                        map_ = only_disc(map_, threshold, None if centre is None else (len(map_) * centre).tolist())
                    masks[lesion] = mask = to_file_pixels(map_, geometry, threshold)  # (H, W)
                    Image.fromarray(mask).save(self.out / "masks" / f"{row['name']}_{lesion}.png", compress_level=1)
                    row[f"area_{lesion}"] = round(np.count_nonzero(mask) / mask.size / photo.retina_share, 6)
                continue
            columns = task.predicted_columns(prediction, photo.sample, self.calibration[task.name])
            row |= columns
            lines += task.caption(columns)
            if isinstance(task, LandmarkMetrics):
                points = [(columns[f"{p}_x"], columns[f"{p}_y"]) for p in task.classes]
        if photo.picture is not None:
            lines += [*filter(None, [row["reason"]]), NOTE]
            overlay(photo.picture, masks, points, lines, photo.retina_share).save(
                self.out / "overlays" / f"{row['name']}.jpg", quality=90, subsampling=0)
        return row


def picture_folders(tasks: Sequence[TaskMetrics]) -> list[str]:
    """The folders below `out` for the pictures of these tasks."""
    masks = any(isinstance(t, MaskMetrics) for t in tasks)
    return ["overlays"] * (masks or any(isinstance(t, LandmarkMetrics) for t in tasks)) + ["masks"] * masks


def write_rows(path: Path, rows: Iterator[Mapping]) -> list[Mapping]:
    """Write rows as they come, so that none is lost; -> all of them. The first answered row gives the header."""
    done, waiting = [], []
    # names of files need not be text
    with open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.DictWriter(file, (), restval="")

        def write(columns):
            if not writer.fieldnames:
                writer.fieldnames = columns
                writer.writeheader()
            writer.writerows(waiting)
            waiting.clear()
            file.flush()

        try:
            for row in rows:
                done.append(row)
                waiting.append(row)
                if writer.fieldnames or row["status"] == "answered":
                    write(list(row))
        finally:
            if waiting:
                write(list(max(waiting, key=len)))
    return done


def in_threads(predictor: Predictor, photographs: Iterable[tuple[Path, str]], threads: int) -> Iterator[Mapping]:
    """Rows in order; each of the threads takes a photograph from its file to its pictures, then the next one.

    So all are busy whatever takes longest. After an error or Ctrl-C, what was begun is finished and has its row.
    """
    waiting, begun = iter(photographs), deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            while True:
                begun += [pool.submit(predictor.answer, *p) for p in islice(waiting, 2 * threads - len(begun))]
                if not begun:
                    break
                row = begun[0].result()  # Ctrl-C may end the wait: not taken out before
                begun.popleft()
                yield row
        except (Exception, KeyboardInterrupt):
            left = [future for future in begun if not future.cancel()]
            yield from (future.result() for future in left if future.exception() is None)
            raise


def predict_all(predictor: Predictor, paths: Sequence[Path]) -> list[Mapping]:
    """Predict all photographs; -> the rows of predictions.csv. InputError: `out` is a file or not empty."""
    out = predictor.out
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: a file; expected a folder, new or empty")
    if out.exists() and any(out.iterdir()):
        raise InputError(f"--out {out}: holds {next(out.iterdir()).name} and perhaps more; expected a folder, new or "
                         "empty")
    for folder in (".", *picture_folders(predictor.tasks)):
        (out / folder).mkdir(parents=True, exist_ok=True)
    predictor.net.eval()
    cores = torch.get_num_threads()
    threads = min(len(paths), cores, MOST)
    rows = in_threads(predictor, zip(paths, names_for(paths)), threads)
    bar = tqdm(rows, total=len(paths), desc="predicting", unit="photo", leave=False, disable=None)
    torch.set_num_threads(cores // threads)  # for each: several on one core would wait for each other
    try:
        return write_rows(out / "predictions.csv", bar)
    finally:
        torch.set_num_threads(cores)
