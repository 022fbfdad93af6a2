"""Numbers and tables as text: scores, differences, changes; rows of cells for the screen, Markdown and CSV."""

import csv
import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from retina.evaluation.task_metrics import Joint, TaskMetrics


# ---- cells ----

def around(limits: Sequence[float] | None, form: str = ".2f") -> str:
    """An interval, to stand behind its number; "" where there is none."""
    return "" if limits is None else f" ({limits[0]:{form}} to {limits[1]:{form}})"


def shown(value: float | None, limits: Sequence[float] | None = None) -> str:
    """A number, with its interval where there is one."""
    if value is None or math.isnan(value):
        return "-"
    digits = 3 if abs(value) < 10 else 0
    return f"{value:.{digits}f}" + around(limits, ".2f" if digits else ".0f")


# ---- rows of cells, the first of which is the header ----

def aligned(rows: Sequence[Sequence]) -> str:
    """For the screen: the first column to the left, the others to the right."""
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows)]
    lines = ([f"   {first:{widths[0]}}", *(f"{x:>{w}}" for x, w in zip(rest, widths[1:]))] for first, *rest in rows)
    return "\n".join("  ".join(line).rstrip() for line in lines)


def as_markdown(rows: Sequence[Sequence[str]]) -> str:
    """For Markdown."""
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|---" * len(rows[0]) + "|", *body])


def as_csv(rows: Sequence[Sequence]) -> str:
    """For spreadsheets; None is an empty cell."""
    memory = io.StringIO()
    csv.writer(memory).writerows(rows)
    return memory.getvalue()


# ---- what is shown ----

def table(found: Mapping[str, dict], tasks: Sequence[TaskMetrics],
          limits: Mapping[str, Mapping] = MappingProxyType({})) -> str:
    """Metrics as lines of text; per task, the primary metric first, then what there is for each kind or class."""
    lines = []
    for task in (t for t in [*tasks, Joint()] if t.name in found):
        values, known = found[task.name], limits.get(task.name, {})
        numbers = {k: shown(v, known.get(k)) for k, v in values.items() if isinstance(v, float)}
        kinds = task.classes if isinstance(getattr(task, "classes", None), tuple) else ()
        rows, rest = {}, []  # dice_MA_per_image stands in the row dice_per_image, in the column MA
        for k, x in numbers.items():
            words = k.split("_")
            if kind := next((word for word in words if word in kinds), None):
                rows.setdefault("_".join(word for word in words if word != kind), {})[kind] = x
            elif k != task.primary:
                rest.append(f"{k} {x}")
        lines.append(f"{task.name}   {values['photographs']} photographs of {values['eyes']} eyes   {task.primary} "
                     + numbers[task.primary])
        cells = textwrap.wrap("   ".join(cell.replace(" ", "\0") for cell in rest), 117)  # not to be torn apart
        lines += [f"   {line}".replace("\0", " ") for line in cells]
        if rows:
            lines.append(aligned([["", *kinds], *([row, *(of.get(kind, "-") for kind in kinds)]
                                                  for row, of in rows.items())]))
        if values.get("lesions", 4) < 4:
            lines.append("   kinds without a true pixel in this split, at this size, are left out of the means")
        if len(values.get("confusion", range(99))) <= 12:
            names = [str(task.word(k))[:12] for k in range(task.classes)]
            lines.append(aligned([["truth \\ predicted", *names], *([n, *row] for n, row in zip(
                names, values["confusion"]))]))
    return "\n".join(lines)


def table_of_differences(compared: Mapping[str, Mapping]) -> str:
    """What compare() found, as lines of text."""
    rows, exact = [], []
    for task, measures in compared.items():
        rows.append([task, "first", "second", "difference (95 %)", "p"])
        rows += [[f"   {name}", shown(row["first"]), shown(row["second"]), "-" if row["interval"] is None else
                  f"{row['difference']:+.3f}{around(row['interval'], '+.3f')}", f"{row['p']:.3f}"]
                 for name, row in measures.items()]
        if found := measures.get("accuracy", {}).get("mcnemar"):
            exact.append(f"   {task}: only the first is right {found['only_first_right']} times, only the second "
                         f"{found['only_second_right']}: McNemar's exact p = {found['p']:.3f} "
                         "(as if no two photographs showed one eye)")
    return "\n".join([aligned(rows), *exact])


def table_of_changes(changes: Mapping[str, Mapping[str, dict]], tasks: Sequence[TaskMetrics]) -> str:
    """What rerouted() found, as lines of text."""
    known = [t for t in tasks if any(t.name in row for row in changes.values())]
    return aligned([["change (standard error) of", *(f"{t.name} {t.primary}" for t in known)]] + [
        [title, *(f"{v['change']:+.3f} ({v['standard_error']:.3f})" if (v := row.get(t.name)) else "-" for t in known)]
        for title, row in changes.items()])
