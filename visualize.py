"""Every picture of a run, and one page with all of them.

    python visualize.py runs/NAME                     # all, into runs/NAME/pictures/, and index.html
    python visualize.py runs/NAME --only curves       # one of them
    python visualize.py runs/A runs/B --only curves   # of several runs in one picture

What each picture shows and how it is made stands in retina/figures.
"""

import argparse
import functools
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

import evaluate
from data import FundusDataset, eval_loader
from retina import drawing
from retina.figures import answers, architecture, context, internals, routing, sentences
from retina.figures.context import FigureContext, FigureUnavailable
from retina.figures.page import page
from retina.files import InputError, atomic_write, run_cli, write_text
from retina.training import precision
from retina.training.checkpoint import read_log
from tasks import TASKS


# name -> the function, and the format: photographs as JPEG, lines and dots as PNG
FIGURES = {"overlays": (answers.overlays, "jpg"), "curves": (answers.curves, "png"),
           "confusion": (answers.confusion, "jpg"), "reliability": (answers.reliability, "png"),
           "sentences": (sentences.sentences, "jpg"),
           "routing": (routing.routing, "jpg"), "tsne": (internals.tsne_map, "png"),
           "gradcam": (internals.gradcam, "jpg"), "feature_maps": (internals.feature_maps, "jpg"),
           "architecture": (architecture.architecture, "png")}


def logs_of(folders: Sequence[Path]) -> dict[str, list[dict]]:
    """{name of a run: its log}; its whole path where two have one name. InputError: one is named twice, or too many."""
    paths = [folder.resolve() for folder in folders]
    if twice := [p for k, p in enumerate(paths) if p in paths[:k]]:
        raise InputError(f"{twice[0]}: named twice; expected different runs")
    if len(paths) > len(drawing.COLOURS):
        raise InputError(f"{len(paths)} runs; expected at most {len(drawing.COLOURS)}, as many as there are colours")
    names = [p.name for p in paths]
    return {(p.name if names.count(p.name) == 1 else str(folder)): read_log(folder)
            for p, folder in zip(paths, folders)}


def gather(args: argparse.Namespace) -> FigureContext:
    """All that figures need of the runs that are named. InputError: see load_run, split_records, read_log."""
    device = precision.pick_device(args.device)
    run = evaluate.load_run(args.runs[0], device)
    logs = logs_of(args.runs)
    run.net = precision.fuse_conv_bn(run.net)
    root, photographs = evaluate.load_split(run, args.data, args.split)
    _, learned = evaluate.load_split(run, args.data, "train")
    if evaluate.not_its_own(run, root, "train", learned):
        print("warning: the training split is not what it was when this run was trained; what is called training "
              "photographs may hold some that it has not seen")
    some = sorted(np.random.default_rng(0).permutation(len(learned))[:context.MOST].tolist())
    training = FundusDataset([learned.records[i] for i in some], run.options["image_size"])
    points = len(training) + min(context.MOST, len(photographs))
    if args.perplexity is not None and not 1 <= args.perplexity < points - 1:
        raise InputError(f"--perplexity {args.perplexity:g}: expected at least 1 and less than {points - 1}, with "
                         f"{points} photographs; leave it out for {min(30, points // 3)}")
    batches = functools.partial(eval_loader, batch=run.options["batch_size"])
    other = evaluate.not_its_own(run, root, args.split, photographs)
    return FigureContext(run, args.split, photographs, training, root, other, evaluate.cautions(run, args.split, other),
                         device, batches, TASKS, logs, args.perplexity, args.seed)


# ---- command line ----

def encoded(picture: Image.Image, form: str) -> bytes:
    """A picture as the content of a file."""
    memory = io.BytesIO()
    picture.save(memory, {"jpg": "JPEG", "png": "PNG"}[form], quality=85, subsampling=0, optimize=form == "png")
    return memory.getvalue()


def draw_figures(ctx: FigureContext, names: Sequence[str], folder: Path, suffix: str = "") -> dict[str, bytes | str]:
    """Draw figures into a folder and say so; -> {name: content of the file, or why there is none}."""
    drawn = {}
    folder.mkdir(exist_ok=True)
    for name in names:
        figure, form = FIGURES[name]
        try:
            drawn[name] = encoded(figure(ctx), form)
        except FigureUnavailable as reason:
            drawn[name] = str(reason)
            print(f"not drawn: {name}: {reason}", flush=True)
            continue
        path = folder / f"{name}{suffix}.{form}"
        with atomic_write(path, lasting=False) as file:
            file.write(drawn[name])
        print(path, flush=True)
    return drawn


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line. InputError: a number out of its range."""
    parser = argparse.ArgumentParser(description="Draw every picture of a run into RUN/pictures/.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN",
                        help="folder made by train.py; curves show all that are named, the other pictures the first")
    parser.add_argument("--only", nargs="+", choices=FIGURES, metavar="NAME",
                        help=f"of {', '.join(FIGURES)} (default: all, and index.html)")
    parser.add_argument("--split", choices=("val", "test"), default="val",
                        help="test: the test split of the data set (default: val, what the run was chosen on)")
    parser.add_argument("--perplexity", type=float,
                        help="of t-SNE: how many neighbours count (default: 30, or a third of the photographs)")
    parser.add_argument("--seed", type=int, default=0, help="of t-SNE's random start (default: 0)")
    parser.add_argument("--data", help="the data set, if it has moved since the run was trained")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto",
                        help="auto: the GPU if there is one (default: auto)")
    args = parser.parse_args(argv)
    if not 0 <= args.seed < 1 << 63:
        raise InputError(f"--seed {args.seed}: expected a number from 0 to {(1 << 63) - 1}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Draw what is asked for; say what cannot be drawn, and why."""
    args = parse(argv)
    precision.tune_malloc()
    ctx = gather(args)
    if args.split == "test":
        evaluate.announce_opening(ctx.run, ctx.root, ctx.photographs)
    folder, suffix = args.runs[0] / "pictures", "_test" * (args.split == "test") + ctx.other
    drawn = draw_figures(ctx, args.only or list(FIGURES), folder, suffix)
    if not args.only:
        write_text(folder / f"index{suffix}.html", page(ctx, drawn, FIGURES))
        print(f"{folder / f'index{suffix}.html'}: all of them, the measures and the configuration, for any browser")


if __name__ == "__main__":
    run_cli(main)
