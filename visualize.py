"""Every picture of a run, and one page with all of them.

    python visualize.py runs/NAME                     # all, into runs/NAME/pictures/, and index.html
    python visualize.py runs/NAME --only curves       # one of them
    python visualize.py runs/A runs/B --only curves   # of several runs in one picture

What each picture shows and how it is made stands in figures.py and insides.py; here is what they are made of, and the
page.
"""

import argparse
import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

import charts
import data
import evaluate
import figures
import insides
import predict
import scores
import speed
from figures import MOST, Material, Missing
from files import InputError, command, replacing, write_text

# name -> the function, and the format: photographs as JPEG, lines and dots as PNG
FIGURES = {"overlays": (figures.overlays, "jpg"), "curves": (figures.curves, "png"),
           "confusion": (figures.confusion, "jpg"), "reliability": (figures.reliability, "png"),
           "routing": (insides.routing, "jpg"), "tsne": (insides.tsne, "png"), "gradcam": (insides.gradcam, "jpg"),
           "filters": (insides.filters, "jpg")}


# ---- what pictures are made of ----

def read_log(folder: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl. InputError: there is none, or it is no such file."""
    path = folder / "metrics.jsonl"
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError:
        raise InputError(f"{path}: no such file; expected a folder made by train.py, such as runs/cls_seg_1") from None
    except ValueError as error:
        raise InputError(f"{path}: damaged ({error}); expected a line of JSON for each epoch; train again") from None
    if not lines:
        raise InputError(f"{path}: empty; expected a line for each epoch; wait for the end of the first one")
    for line in lines:
        if lost := [k for k in ("train", "val", "score", "expert_usage", "epoch") if k not in line]:
            raise InputError(f"{path}: made by another version of this project, it lacks {lost[0]!r}; train again")
    return lines


def logs_of(folders: Sequence[Path]) -> dict[str, list[dict]]:
    """{name of a run: its log}; its whole path where two have one name. InputError: one is named twice, or too many."""
    paths = [folder.resolve() for folder in folders]
    if twice := [p for k, p in enumerate(paths) if p in paths[:k]]:
        raise InputError(f"{twice[0]}: named twice; expected different runs")
    if len(paths) > len(charts.COLOURS):
        raise InputError(f"{len(paths)} runs; expected at most {len(charts.COLOURS)}, as many as there are colours")
    names = [p.name for p in paths]
    return {(p.name if names.count(p.name) == 1 else str(folder)): read_log(folder)
            for p, folder in zip(paths, folders)}


def gather(args: argparse.Namespace) -> Material:
    """All that figures need of the runs that are named. InputError: see load_run, split_records, read_log."""
    device = evaluate.pick_device(args.device)
    run = evaluate.load_run(args.runs[0], device)
    logs = logs_of(args.runs)
    run.net = speed.folded(run.net)
    root = args.data or run.options["data"]
    root = None if root is None else Path(root)
    photographs = data.Photographs(evaluate.split_records(run, root, args.split), run.options["size"])
    learned = data.Photographs(evaluate.split_records(run, root, "train"), run.options["size"])
    if run.learned_from not in (None, learned.fingerprint()):
        print("warning: the training part is not what it was when this run was trained; what is called training "
              "photographs may hold some that it has not seen")
    some = sorted(np.random.default_rng(0).permutation(len(learned))[:MOST].tolist())
    training = data.Photographs([learned.records[i] for i in some], run.options["size"])
    points = len(training) + min(MOST, len(photographs))
    if args.perplexity is not None and not 1 <= args.perplexity < points - 1:
        raise InputError(f"--perplexity {args.perplexity:g}: expected at least 1 and less than {points - 1}, with "
                         f"{points} photographs; leave it out for {min(30, points // 3)}")
    return Material(run, args.split, photographs, training, device, run.options["batch"], logs, args.perplexity,
                    args.seed)


# ---- the page ----

STYLE = """
body { margin: 0 auto; max-width: 1280px; padding: 16px; box-sizing: border-box; color: #212529; background: #fff;
       font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
img { display: block; max-width: 100%; height: auto; border: 1px solid #dee2e6 }
h1, h2 { line-height: 1.2; margin: 1.6em 0 .5em } h1 { margin-top: .4em }
nav a { display: inline-block; margin-right: 1em } a { color: #0072b2 }
.numbers { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); gap: 0 24px }
.numbers div { display: flex; justify-content: space-between; gap: 8px; border-bottom: 1px solid #e9ecef }
.numbers span:first-child { color: #5f6770 } .numbers span:last-child { text-align: right }
.missing { border-left: 4px solid #e69f00; padding: 8px 12px; background: #fff8e6 }
"""


def numbers(pairs: Mapping[str, str]) -> str:
    """Names and values beside each other, in as many columns as there is room for."""
    return '<div class="numbers">' + "".join(f"<div><span>{html.escape(k)}</span><span>{html.escape(v)}</span></div>"
                                             for k, v in pairs.items()) + "</div>"


def measured(m: Material) -> str:
    """All measures of the split with their intervals, task by task."""
    values, limits = scores.summary([m.here[0]], [m.run.chosen])
    parts = []
    for task in m.here[0].scored():
        found = values[task.name]
        parts.append(f"<h3>{html.escape(task.name)}: {found['photographs']} photographs of {found['eyes']} eyes</h3>" +
                     numbers({k.replace("_", " "): scores.shown(v, limits[task.name].get(k))
                              for k, v in found.items() if isinstance(v, float)}))
    return "".join(parts)


def about(name: str) -> str:
    """What a figure is about: the first line of its function's docstring."""
    return FIGURES[name][0].__doc__.splitlines()[0].rstrip(".:;,")


def page(m: Material, drawn: Mapping[str, bytes | str]) -> str:
    """One page that needs no other file: pictures (or why there is none), measures, configuration."""
    run = m.run
    source = "DRAWN photographs, which are no photographs of eyes" if run.options["data"] is None else \
        f"photographs of {Path(run.options['data']).name}"
    sections = []
    for name, content in drawn.items():
        words = about(name)
        kind = "jpeg" if FIGURES[name][1] == "jpg" else "png"
        shown = f'<p class="missing">Not drawn: {html.escape(content)}.</p>' if isinstance(content, str) else \
            f'<img alt="{html.escape(words)}" src="data:image/{kind};base64,{base64.b64encode(content).decode()}">'
        sections.append(f'<h2 id="{name}">{html.escape(words)}</h2>{shown}')
    links = "".join(f'<a href="#{name}">{name}</a>' for name in (*drawn, "measures", "configuration"))
    options = {k: " ".join(map(str, v)) if isinstance(v, list) else str(v) for k, v in run.options.items()}
    options["data"] = "drawn" if run.options["data"] is None else Path(run.options["data"]).name
    title = f"{m.name}: {' '.join(run.options['tasks'])}"
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
<p>Checkpoint of epoch {run.epoch}; {len(m.photographs)} {m.words} photographs; {html.escape(source)}.
{predict.NOTE.capitalize()}.</p>
<nav>{links}</nav>
{"".join(sections)}
<h2 id="measures">Measures</h2>
<p>On the {m.words} photographs; in brackets 95 % of draws of eyes.{m.caution}</p>
{measured(m)}
<h2 id="configuration">Configuration</h2>{numbers(options)}
</body></html>
"""


# ---- command line ----

def encoded(picture: Image.Image, form: str) -> bytes:
    """A picture as the content of a file."""
    memory = io.BytesIO()
    if form == "jpg":
        picture.save(memory, "JPEG", quality=85, subsampling=0)
    else:
        picture.save(memory, "PNG", optimize=True)
    return memory.getvalue()


def draw(m: Material, names: Sequence[str], folder: Path, suffix: str = "") -> dict[str, bytes | str]:
    """Draw figures into a folder and say so; -> {name: content of the file, or why there is none}."""
    drawn = {}
    folder.mkdir(exist_ok=True)
    for name in names:
        figure, form = FIGURES[name]
        try:
            drawn[name] = encoded(figure(m), form)
        except Missing as reason:
            drawn[name] = str(reason)
            print(f"not drawn: {name}: {reason}", flush=True)
            continue
        path = folder / f"{name}{suffix}.{form}"
        with replacing(path, lasting=False) as file:
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
                        help="test: the test part of the data set (default: val, what the run was chosen on)")
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
    speed.keep_memory()
    m = gather(args)
    if args.split == "test":
        evaluate.announce_opening(m.run, args.data or m.run.options["data"])
    folder, suffix = args.runs[0] / "pictures", "_test" * (args.split == "test")
    drawn = draw(m, args.only or list(FIGURES), folder, suffix)
    if not args.only:
        write_text(folder / f"index{suffix}.html", page(m, drawn))
        print(f"{folder / f'index{suffix}.html'}: all of them, the measures and the configuration, for any browser")


if __name__ == "__main__":
    command(main)
