"""Does the comparison find what is known to be there, and nothing where nothing is? Three experiments on drawings.

    python tests/known_truths.py [few shuffled equal] [--epochs 12] [--seeds 5]

    few         24 photographs with a grade and 400 with masks, which tell what grades follow from: a network that
                shares its encoder with the masks must grade better than the same whose masks have no weight
    shuffled    the same with grades dealt out by lot: nobody can do better than chance
    equal       the same network with other seeds: no difference

Each takes minutes; runs lie below a temporary folder, or below --folder, where they are gone on with.
"""

import argparse
import random
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image


sys.path.insert(0, str(Path(__file__).parent.parent))
import baselines  # noqa: E402
import train  # noqa: E402
from retina.comparison import analysis, jobs, report  # noqa: E402
from retina.datasets import cache, records, synthetic  # noqa: E402
from retina.files import run_cli  # noqa: E402
from tasks import make_tasks  # noqa: E402


SIDE, GRADED, MASKED, JUDGED = 64, 24, 400, 240


def write_table(folder: Path, shuffled: bool) -> Path:
    """Drawn photographs with masks, some with a grade too, and those on which grades are judged; -> the table."""
    path = folder / "table.csv"
    if path.exists():
        return path
    folder.mkdir(parents=True)
    header = f"image,grade,split,{','.join(f'mask_{lesion.lower()}' for lesion in synthetic.LESIONS)}"
    masks_of, grades = [], []
    for i in range(MASKED + JUDGED):
        eye = synthetic.plan(11, i)
        picture, masks = synthetic.render(eye, SIDE)
        Image.fromarray(picture).save(folder / f"{i}.png")
        cells = []
        for lesion, mask in zip(synthetic.LESIONS, masks):
            cells.append(f"{i}_{lesion}.png" if mask.any() else "none")
            if mask.any():
                Image.fromarray(mask.astype(np.uint8) * 255).save(folder / cells[-1])
        grades.append(eye.grade)
        masks_of.append(cells)
    if shuffled:
        random.Random(0).shuffle(grades)
    lines = [header]
    for i, cells in enumerate(masks_of):
        judged = i >= MASKED
        grade = grades[i] if judged or i < GRADED else ""
        lines.append(f"{i}.png,{grade},{'val' if judged else 'train'},{','.join(cells)}")
    path.write_text("\n".join(lines) + "\n")
    return path


def measure(table: Path, folder: Path, names: list[str], seeds: int, epochs: int) -> tuple[list, dict]:
    """Train these configurations; -> tasks, and the Measurements of each."""
    options, _ = train.configure(["--tasks", "cls", "seg", "--data", str(table), "--image-size", str(SIDE),
                                  "--encoder-weights", "none", "--epochs", str(epochs), "--crops", "1"])
    every = {c.name: c for c in baselines.configurations_for(options.tasks)}
    # the network for one task sees the same batches as the shared one, of which no mask counts: nothing else differs,
    # the statistics of norms least of all
    every["cls_single"] = replace(every["cls_single"], words="masks without weight",
                                  changes={**every["hard"].changes, "loss_weights": ("seg=0",)})
    configurations = [every[name] for name in names]
    base = replace(options, stochastic_depth=0.05, log_gradients=True)
    asked = baselines.jobs_for(configurations, base, seeds, ["1/5"], folder)
    failed = jobs.run_all(asked, baselines.__file__, min(2, torch.get_num_threads()))
    assert not failed, failed
    tasks = make_tasks(options.tasks)
    return tasks, baselines.finished(asked, configurations, tasks)


def print_report(tasks: list, measured: dict) -> None:
    """Print scores, and what may be claimed about grades."""
    asked = {name: m.words for name, m in measured.items()}
    print(report.screen(analysis.summarize(measured, tasks[:1], {"what": "", "asked": asked, "failed": {}})))


def main() -> None:
    """Run the experiments that are named."""
    parser = argparse.ArgumentParser()
    parser.add_argument("which", nargs="*", default=["few", "shuffled", "equal"])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None)
    args = parser.parse_args()
    home = args.folder or Path(tempfile.mkdtemp())
    records.HERE, cache.CACHE = home, home / "cache"
    both = ["cls_single", "hard"]
    for experiment, words, place, configurations, seeds in (
            ("few", f"{GRADED} grades, {MASKED} masks; sharing must help to grade", "few", both, args.seeds),
            ("shuffled", "grades by lot; kappa must be 0 within its interval", "shuffled", both, 1),
            ("equal", "two names for one way of training; nothing must be claimed", "few", ["hard"], 2 * args.seeds)):
        if experiment not in args.which:
            continue
        print(f"{experiment}: {words}")
        table = write_table(home / place, place == "shuffled")
        tasks, measured = measure(table, home / "runs" / place, configurations, seeds, args.epochs)
        if experiment == "equal":
            hard, halves = measured["hard"], (slice(0, args.seeds), slice(args.seeds, None))
            measured = {name: replace(hard, words=f"{which} seeds", seeds=list(range(args.seeds)),
                                      **{k: getattr(hard, k)[half] for k in ("scores", "gaps", "shifts")})
                        for name, which, half in zip(both, ("first", "other"), halves)}
        print_report(tasks, measured)


if __name__ == "__main__":
    run_cli(main)
