"""One page with all figures of a run, its measures and its configuration."""

import base64
import html
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from retina.evaluation import scoring, tables
from retina.figures.context import FigureContext
from retina.inference import predictor


STYLE = """
body { margin: 0 auto; max-width: 1280px; padding: 16px; box-sizing: border-box; color: #212529; background: #fff;
       font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
img { display: block; max-width: 100%; height: auto; border: 1px solid #dee2e6 }
h1, h2 { line-height: 1.2; margin: 1.6em 0 .5em } h1 { margin-top: .4em }
nav a { display: inline-block; margin-right: 1em } a { color: #0072b2 }
table { border-collapse: collapse; margin-bottom: 1em; font-size: 14px } th, td { padding: 2px 6px; text-align: right }
tr { border-bottom: 1px solid #e9ecef } th { color: #5f6770; font-weight: normal } th:first-child { text-align: left }
@media (max-width: 600px) { table { font-size: 11px } th, td { padding: 1px 3px } }
.numbers { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); gap: 0 24px }
.numbers div { display: flex; justify-content: space-between; gap: 8px; border-bottom: 1px solid #e9ecef }
.numbers span:first-child { color: #5f6770 } .numbers span:last-child { text-align: right }
.missing { border-left: 4px solid #e69f00; padding: 8px 12px; background: #fff8e6 }
"""


def numbers(pairs: Mapping[str, str]) -> str:
    """Names and values beside each other, in as many columns as there is room for."""
    return '<div class="numbers">' + "".join(f"<div><span>{html.escape(k)}</span><span>{html.escape(v)}</span></div>"
                                             for k, v in pairs.items()) + "</div>"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells; the first cell of each names it, and a first row whose first cell is empty names the columns."""
    def line(name, *cells):
        tag = "td" if name else "th"
        return "".join([f"<tr><th>{html.escape(name)}", *(f"<{tag}>{html.escape(cell)}" for cell in cells)])

    return f"<table>{''.join(line(*row) for row in rows)}</table>"


def measured(ctx: FigureContext) -> str:
    """All measures of the split with their intervals, a table for each task."""
    values, limits = scoring.summary([ctx.here[0]], [ctx.run.calibration])
    for kept, of_masks in zip((values, limits), scoring.summary([ctx.masks], [ctx.run.calibration])):
        kept |= of_masks
    return "".join(f"<h3>{html.escape(t.name)}: {values[t.name]['photographs']} photographs of "
                   f"{values[t.name]['eyes']} eyes</h3>" +
                   table(tables.measure_rows(t, values[t.name], limits[t.name])) for t in ctx.here[0].scored())


def page(ctx: FigureContext, drawn: Mapping[str, bytes | str], figures: Mapping[str, tuple[Callable, str]]) -> str:
    """One page that needs no other file: pictures (or why there is none), measures, configuration.

    `figures`: name -> function, format. The first line of a function's docstring is its picture's heading.
    """
    run = ctx.run
    begun = json.loads((run.folder / "config.json").read_text(encoding="utf-8"))
    source = "DRAWN photographs, which are no photographs of eyes" if ctx.root is None else \
        f"photographs of {ctx.root.name}"
    sections = []
    for name, content in drawn.items():
        words = figures[name][0].__doc__.splitlines()[0].rstrip(".:;,")
        form = "jpeg" if figures[name][1] == "jpg" else "png"
        content = f'<p class="missing">Not drawn: {html.escape(content)}.</p>' if isinstance(content, str) else \
            f'<img alt="{html.escape(words)}" src="data:image/{form};base64,{base64.b64encode(content).decode()}">'
        sections.append(f'<h2 id="{name}">{html.escape(words)}</h2>{content}')
    links = "".join(f'<a href="#{name}">{name}</a>' for name in (*drawn, "measures", "configuration"))
    options = {k: " ".join(map(str, v)) if isinstance(v, list) else str(v) for k, v in run.options.items()}
    options["data"] = "drawn" if run.options["data"] is None else Path(run.options["data"]).name
    title = f"{ctx.name}: {' '.join(run.options['tasks'])}"
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
<p>Checkpoint of epoch {run.epoch}; {len(ctx.photographs)} {ctx.words} photographs; {html.escape(source)}.
{predictor.NOTE.capitalize()}.</p>
<p>Trained by <code>{html.escape(begun["command"])}</code>, begun {begun["begun"]}; machine:
{html.escape(", ".join(f"{k} {v}" for k, v in begun["machine"].items()))}.</p>
<nav>{links}</nav>
{"".join(sections)}
<h2 id="measures">Measures</h2>
<p>On the {ctx.words} photographs, masks in pixels of their files; in brackets 95 % intervals, by bootstrap over eyes.
{ctx.caution}</p>
{measured(ctx)}
<h2 id="configuration">Configuration</h2>{numbers(options)}
</body></html>
"""
