"""Predictions in the pixels of the photograph's own file, and masks scored there."""

import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from retina.datasets import preprocess
from retina.datasets.masks import read_mask
from retina.datasets.preprocess import Decoded, Geometry, Sample
from retina.datasets.records import Record
from retina.evaluation.metrics import PRCurveAccumulator
from retina.evaluation.scoring import SplitScores
from retina.evaluation.task_metrics import MaskMetrics, TaskMetrics


LARGEST = 4096  # pixels: side of a photograph that is predicted in tiles


def unlabelled_sample(record: Record, size: int, small: Decoded | None = None) -> Sample:
    """A photograph as the network sees it, without labels; `small`: see preprocess.preprocess."""
    unlabelled = replace(record, labels={})
    return preprocess.to_sample(unlabelled, preprocess.preprocess(unlabelled, size, image_only=True, small=small))


def all_indices(net: nn.Module, tasks: Sequence[TaskMetrics], number: int, device: torch.device) -> dict[str, Tensor]:
    """`indices` for Net.forward: these tasks on all of `number` photographs, the others on none."""
    wanted = {t.name for t in tasks}
    return {name: torch.arange(number if name in wanted else 0, device=device) for name in net.heads}


@torch.inference_mode()
def predict_sample(net: nn.Module, tasks: Sequence[TaskMetrics], image: Tensor,
                   device: torch.device) -> dict[str, Tensor]:
    """Predictions for one sample (3, S, S) uint8: {task: decoded prediction, without the batch dimension}.

    NotFiniteError: an output is not finite.
    """
    outputs, _ = net(image[None].to(device), all_indices(net, tasks, 1, device))
    return {t.name: t.answer(outputs[t.name].float())[0].cpu() for t in tasks}


@torch.inference_mode()
def predict_in_tiles(net: nn.Module, task: TaskMetrics, image: Tensor, size: int, device: torch.device,
                     batch: int = 8) -> Tensor:
    """Masks (L, Z, Z) of a sample (3, Z, Z) larger than the network's, from tiles that overlap by half.

    A tile has twice the `size` of training, where there is as much: lesions look no larger in it, and fewer pixels are
    seen again and again. `batch` counts what is of the size of training. Where tiles overlap, their probabilities are
    averaged with weights that fall towards a tile's border, where the network sees least of the surroundings.
    """
    side = image.shape[-1]
    if side >= 2 * size:
        size, batch = 2 * size, max(1, batch // 4)
    number = -(-2 * (side - size) // size) + 1
    starts = [round(k * (side - size) / max(1, number - 1)) for k in range(number)]
    corners = [(y, x) for y in starts for x in starts]
    window = torch.sin(torch.pi * (torch.arange(size) + 0.5) / size).square()
    window = window[:, None] * window
    total, weight = torch.zeros(len(task.classes), side, side), torch.zeros(side, side)
    for k in range(0, len(corners), batch):
        chunk = corners[k:k + batch]
        tiles = torch.stack([image[:, y:y + size, x:x + size] for y, x in chunk]).to(device)
        outputs, _ = net(tiles, all_indices(net, [task], len(chunk), device))
        for (y, x), masks in zip(chunk, task.answer(outputs[task.name].float()).cpu()):
            total[:, y:y + size, x:x + size] += window * masks
            weight[y:y + size, x:x + size] += window
    return total.div_(weight)


def blend(whole: Tensor, tiled: Tensor, of_whole: Geometry, of_tiled: Geometry) -> Tensor:
    """The mean (L, Z, Z) of masks predicted at once (L, S, S), brought to the larger sample's pixels, and in tiles.

    Tiles show small lesions, the whole photograph what surrounds large ones: the mean has more average precision than
    either (docs/predict.md).
    """
    places = np.arange(tiled.shape[-1])[:, None] + 0.5  # of the larger sample's pixels, along both axes
    places = of_whole.to_sample(of_tiled.to_file(places.repeat(2, 1)))  # in the smaller sample
    x, y = torch.from_numpy(2 * places / whole.shape[-1] - 1).float().unbind(1)  # from -1 to 1, as grid_sample counts
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)[None]
    return (F.grid_sample(whole[None], grid, padding_mode="border", align_corners=False)[0] + tiled) / 2


def predict_masks(net: nn.Module, task: TaskMetrics, record: Record, size: int, tiles: float | None,
                  device: torch.device, batch: int) -> tuple[np.ndarray, Geometry]:
    """Masks (L, Z, Z) of a photograph and their geometry; with `tiles`, see `blend`, those of a larger sample."""
    sample = unlabelled_sample(record, size)
    masks = predict_sample(net, [task], sample.image, device)[task.name]
    if tiles is None:
        return masks.numpy(), sample.geometry
    large = unlabelled_sample(record, round(size * tiles))
    tiled = predict_in_tiles(net, task, large.image, size, device, batch)
    return blend(masks, tiled, sample.geometry, large.geometry).numpy(), large.geometry


def to_file_pixels(map_: np.ndarray, geometry: Geometry, threshold: float | None = None) -> np.ndarray:
    """A map of the sample (Z, Z) float32 -> of the file (H, W), bilinear; 0 outside of the sample.

    With a `threshold`: where that is reached, (H, W) bool; what lies between four values below it is not computed.
    Equal to Pillow's Image.transform to the last bit, in a fifth of the time: Pillow interpolates along x for every
    pixel of the file, this for every row of the sample.
    """
    g, side = geometry, len(map_)

    def places(number, scale, shift):  # of the file's pixels: those inside; for each the map's pixel before, a fraction
        at = (np.arange(number) + 0.5) * scale + shift
        inside = slice(*np.searchsorted(at, (0, side)))
        before = np.floor(at[inside] - 0.5)
        return inside, before.astype(int) + 1, at[inside] - 0.5 - before

    (columns, x, dx), (rows, y, dy) = places(g.width, g.scale_x, g.shift_x), places(g.height, g.scale_y, g.shift_y)
    padded = np.pad(map_, 1, mode="edge")  # (Z + 2, Z + 2), whose pixels x and y count
    filled = np.zeros((g.height, g.width), np.float32) if threshold is None else \
        np.full((g.height, g.width), 0 >= threshold)
    high = padded >= (-np.inf if threshold is None else threshold)
    some = high[1:, 1:] | high[1:, :-1] | high[:-1, 1:] | high[:-1, :-1]  # of a pixel, the next, the two below
    starts = np.flatnonzero(np.diff(y, prepend=-1))
    for begin, end in itertools.pairwise([*starts.tolist(), len(y)]):  # rows of the file between two rows of the map
        row = y[begin]
        if not some[row].any():
            continue
        at = slice(None) if threshold is None else np.flatnonzero(some[row].take(x))
        left, right = padded[row:row + 2].take(x[at], 1), padded[row:row + 2].take(x[at] + 1, 1)
        upper, lower = left + (right - left) * dx[at]  # (w,) each
        values = upper + (lower - upper) * dy[begin:end, None]
        filled[rows, columns][begin:end, at] = values if threshold is None else np.float32(values) >= threshold
    return filled


def mask_stats_at_full_size(net: nn.Module, task: MaskMetrics, records: Sequence[Record], size: int,
                            tiles: float | None, device: torch.device, batch: int,
                            accumulator: PRCurveAccumulator) -> tuple[list[str], Tensor]:
    """Names of the photographs, and their MaskMetrics.image_stats in the pixels of their files."""
    stats = []
    with ThreadPoolExecutor(2) as threads:  # two at a time: decoding and sorting leave Python's lock alone
        for record in tqdm(records, desc="masks at full size", unit="photo", leave=False, disable=None):
            maps, geometry = predict_masks(net, task, record, size, tiles, device, batch)

            def of_class(lesion, record=record, maps=maps, geometry=geometry):
                if task.classes[lesion] not in record.masks:
                    return task.count(lesion, maps[lesion], None, accumulator)
                mask = record.masks[task.classes[lesion]]
                shape = geometry.height, geometry.width
                truth = np.zeros(shape, bool) if mask is None else np.asarray(read_mask(mask, shape[::-1])[0]) > 0
                return task.count(lesion, to_file_pixels(maps[lesion], geometry), truth, accumulator)

            stats.append(torch.stack(list(threads.map(of_class, range(len(task.classes))))))
    return [r.name for r in records], torch.stack(stats)


def score_at_full_size(net: nn.Module, tasks: Sequence[TaskMetrics], records: Sequence[Record], size: int,
                       tiles: float | None, device: torch.device, batch: int) -> SplitScores | None:
    """Scores of masks in the pixels of their files; None where no masks are files, as with drawn photographs.

    `size` is that of training. With `tiles`, photographs are read at `tiles` times that size as well and predicted in
    tiles, `batch` of them at a time; see `blend`.
    """
    task = next((t for t in tasks if isinstance(t, MaskMetrics)), None)
    records = [r for r in records if r.masks is not None and r.image is not None]
    if task is None or not records:
        return None
    t, accumulator = task.name, task.accumulator()
    names, stats = mask_stats_at_full_size(net.eval(), task, records, size, tiles, device, batch, accumulator)
    return SplitScores([task], {t: names}, {t: stats}, accumulators={t: accumulator},
                       eyes={r.name: r.eye or r.name for r in records})
