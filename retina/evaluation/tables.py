"""Scores, differences and changes as lines of text."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from retina.evaluation.task_metrics import Joint, TaskMetrics


def shown(value: float | None, limits: Sequence[float] | None = None) -> str:
    """A number, with its interval where there is one."""
    if value is None or math.isnan(value):
        return "-"
    digits = 3 if abs(value) < 10 else 0
    text = f"{value:.{digits}f}"
    return text if limits is None else text + " ({:.{d}f}..{:.{d}f})".format(*limits, d=2 if digits else 0)


def table(found: Mapping[str, dict], tasks: Sequence[TaskMetrics],
          limits: Mapping[str, Mapping] = MappingProxyType({})) -> str:
    """Metrics as lines of text; per task, the primary metric first, then what there is for each kind or class."""
    lines = []
    for task in (t for t in [*tasks, Joint()] if t.name in found):
        values, around = found[task.name], limits.get(task.name, {})
        numbers = {k: v for k, v in values.items() if isinstance(v, float)}
        kinds = task.classes if isinstance(getattr(task, "classes", None), tuple) else ()
        # the row of a number that belongs to one kind: dice_MA_per_image stands in dice_*_per_image
        row_of = {k: "_".join("*" if word in kinds else word for word in k.split("_")) for k in numbers}
        rest = [k for k in numbers if k != task.primary and "*" not in row_of[k]]
        lines.append(f"{task.name}   {values['photographs']} photographs of {values['eyes']} eyes   {task.primary} "
                     + shown(numbers[task.primary], around.get(task.primary)))
        cells = [f"{k} {shown(numbers[k], around.get(k))}".replace(" ", "\0") for k in rest]  # not to be torn apart
        lines += [line.replace("\0", " ") for line in textwrap.wrap("   ".join(cells), 117, initial_indent="   ",
                                                                     subsequent_indent="   ")]
        rows = [row for row in dict.fromkeys(row_of.values()) if "*" in row]
        if rows:
            lines.append(" " * 18 + "".join(f"{kind:>20}" for kind in kinds))
            for row in rows:
                names = ("_".join(kind if word == "*" else word for word in row.split("_")) for kind in kinds)
                lines.append(f"   {row.replace('_*', ''):15}" + "".join(
                    f"{shown(numbers.get(k), around.get(k)):>20}" for k in names))
        if values.get("lesions", 4) < 4:
            lines.append("   kinds without a true pixel in this split, at this size, are left out of the means")
        if len(values.get("confusion", range(99))) <= 12:
            names = [str(task.word(k))[:12] for k in range(task.classes)]
            width = max(6, *(len(n) + 2 for n in names))
            lines.append("   truth \\ predicted" + "".join(f"{n:>{width}}" for n in names))
            lines += [f"   {n:>17}" + "".join(f"{c:>{width}}" for c in row)
                      for n, row in zip(names, values["confusion"])]
    return "\n".join(lines)


def table_of_differences(compared: Mapping[str, Mapping]) -> str:
    """What compare() found, as lines of text."""
    lines = []
    for task, rows in compared.items():
        lines.append(f"{task:32}{'first':>9}{'second':>9}{'difference (95 %)':>28}{'p':>8}")
        for name, row in rows.items():
            gap = "-" if row["interval"] is None else "{:+.3f} ({:+.3f}..{:+.3f})".format(row["difference"],
                                                                                       *row["interval"])
            lines.append(f"   {name:29}{shown(row['first']):>9}{shown(row['second']):>9}{gap:>28}{row['p']:8.3f}")
        if found := rows.get("accuracy", {}).get("mcnemar"):
            lines.append(f"   only the first is right {found['only_first_right']} times, only the second "
                         f"{found['only_second_right']}: McNemar's exact p = {found['p']:.3f} "
                         "(as if no two photographs showed one eye)")
    return "\n".join(lines)


def table_of_changes(changes: Mapping[str, Mapping[str, dict]], tasks: Sequence[TaskMetrics]) -> str:
    """What rerouted() found, as lines of text."""
    shown = [t for t in tasks if any(t.name in row for row in changes.values())]
    lines = [f"   {'change (standard error) of':30}" + "".join(f"{f'{t.name} {t.primary}':>20}" for t in shown)]
    for title, row in changes.items():
        cells = (f"{v['change']:+.3f} ({v['standard_error']:.3f})" if (v := row.get(t.name)) else "-" for t in shown)
        lines.append(f"   {title:30}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join(lines)
