"""What a data set holds and what is wrong with it, before anyone trains on it."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from retina.datasets import leaks, splits
from retina.datasets.cache import build_cache, cache_path, cached_arrays, cached_sample
from retina.datasets.leaks import Comparison, compare
from retina.datasets.records import LABELS, LESION_NAMES, DataSet, LandmarkLabel, Record
from retina.datasets.synthetic import LESIONS
from retina.drawing import captioned, column, grid, label_legend, masks_of, photograph, row, tinted, titled
from retina.files import InputError


EXAMINED_SIZE = 256  # pixels; the default of training, which then finds its cache
MAX_GROUPS = 36  # on a contact sheet
Group = tuple[str, Sequence[Record]]  # a caption, and photographs to be seen together


def labelled(records: Sequence[Record]) -> dict[str, int]:
    """How many records carry each label that occurs at all."""
    last = sorted(LABELS.values(), key=lambda label: isinstance(label, LandmarkLabel))  # points stand last
    return {label.name: n for label in last if (n := len(label.known(records)))}


def overview(records: Sequence[Record]) -> dict:
    """Counts of photographs by subset, counts of labels, and a summary of each label."""
    subsets = Counter(r.name.removeprefix("test/").rpartition("/")[0] for r in records)
    result = {"photographs": len(records), "subsets": dict(subsets), "labels": labelled(records), "classes": {},
              "masks": {}}
    for label in LABELS.values():
        if summary := label.summary(records):
            result.setdefault(label.section, {}).update(summary)
    return result


def stored_forms(records: Sequence[Record]) -> tuple[Counter, list[tuple[Record, str]], list[str]]:
    """How masks are stored, with counts; masks stored unlike most; and photographs without a field of view."""
    if all(r.drawing is not None for r in records):
        return Counter(), [], []
    stored, quality = zip(*(cached_arrays(r, cache_path(r, EXAMINED_SIZE), EXAMINED_SIZE, "stored", "quality")
                            for r in records))
    masks = [(r, f"{lesion} {form}") for r, here in zip(records, stored) for lesion, form, *_ in here]  # "OD P 0 1"
    forms = Counter(mask.partition(" ")[2] for _, mask in masks)
    usual = max(forms, key=forms.get, default="")
    return (forms, [(r, mask) for r, mask in masks if mask.partition(" ")[2] != usual],
            [r.name for r, (has_field, *_) in zip(records, quality) if not has_field])


def lost_masks(records: Sequence[Record]) -> tuple[list[str], list[str]]:
    """Of mask files: those that are black, and others of which EXAMINED_SIZE leaves nothing."""
    files = [(r, lesion, file) for r in records for lesion, file in (r.masks or {}).items() if file is not None]
    black = [f"{r.name} {lesion}" for r, lesion, file in files if not file]
    masks = {r.name: cached_sample(r, cache_path(r, EXAMINED_SIZE), EXAMINED_SIZE).masks for r, *_ in files}
    return black, [f"{r.name} {lesion}" for r, lesion, file in files
                   if file and not masks[r.name][LESIONS.index(lesion)].any()]


def examine(data_set: DataSet, root: Path | None, fold: str) -> tuple[dict, dict[str, tuple[str, list[Group]]]]:
    """Look at a data set as training would: counts, files, copies, eyes, leaks, conflicts, the split.

    -> The report as JSON holds it, see `format_report`; {name: (title, groups)} for `contact_sheets`. InputError: none
    of the photographs can be used.
    """
    problems = build_cache(data_set.records, EXAMINED_SIZE)
    records = [r for r in data_set.records if r.name not in problems]
    if not records:
        raise InputError(f"{root}: none of its {len(problems)} photographs can be used; first: "
                         f"{next(iter(problems.values()))}")
    try:
        records = leaks.settle_masks(records, EXAMINED_SIZE)
    except InputError as error:  # the rest is worth knowing
        problems |= {"masks": str(error)}
    comparison = compare(records, EXAMINED_SIZE)
    joined, conflicts = comparison.join(records)
    black, vanished = lost_masks(records)
    counted = {r.name: r for r in [*data_set.records, *records]}.values()
    split = splits.split(joined, fold)
    forms, odd, without_field = stored_forms(records)
    groups = defaultdict(list)
    for r in joined:
        groups[r.eye].append(r.name)
    training_eyes = {r.eye for r in joined if r.split == "train"}
    scores = comparison.scores
    pairs = [{"photographs": [records[i].name for i in comparison.pairs[k]], "score": round(float(scores[k]), 3)}
             for k in np.argsort(-scores, kind="stable")]
    number_same = int((scores >= leaks.SAME_EYE).sum())
    report = {
        "data": "drawn" if root is None else str(root), "notes": list(data_set.notes),
        "splits": {name: overview(members) for name in ("train", "val", "test")
                  if (members := [r for r in counted if r.split == name])},
        "unreadable": problems,
        "sizes": dict(Counter(f"{w}x{h}" for w, h in comparison.sizes.tolist()).most_common()),
        "mask_formats": dict(forms.most_common()), "odd_masks": [f"{r.name} {mask}" for r, mask in odd],
        "black_masks": black, "vanished_masks": vanished,
        "without_field_of_view": without_field, "not_compared": comparison.notes.tolist(),
        "copies": [[records[i].name, records[j].name] for i, j in comparison.copies],
        "turned_copies": [[records[i].name, records[j].name] for i, j in comparison.turned],
        "same_eye": {"threshold": leaks.SAME_EYE, "pairs": pairs[:number_same],
                     "closest_below": pairs[number_same:number_same + 12],
                     "photographs": len(joined), "eyes": len(groups),
                     "groups": [names for names in groups.values() if len(names) > 1]},
        "conflicts": [c.as_dict() for c in conflicts],
        "leaks": {"validated": [r.name for r in split.validated],
                  "training": [r.name for r in split.leaks], "training_labels": labelled(split.leaks),
                  "test_labels": labelled([r for r in split.test if r.eye in training_eyes])},
        "split": {"fold": fold, "training": overview(split.training),
                  "validation": overview(split.validation)}}
    return report, contact_sheet_groups(report, records, comparison, odd)


def contact_sheet_groups(report: Mapping, records: Sequence[Record], comparison: Comparison,
                         odd: Sequence[tuple[Record, str]]) -> dict[str, tuple[str, list[Group]]]:
    """{name: (title, groups)} for each sort of finding; `records` are those before copies are joined."""
    by_name = {r.name: r for r in records}

    def group(names, caption=""):
        return caption, [by_name[name] for name in names]

    eyes, strata = defaultdict(list), defaultdict(list)
    for r in splits.name_eyes(records, comparison.same_eye()):
        eyes[r.eye].append(r)
    for r in records:
        strata[splits.stratum(r)].append(r)
    return {
        "labels": ("labels as they lie on the photographs", [
            (", ".join(f"{name} {v}" for name, v in r.labels.items()
                       if isinstance(v, (int, float, str))), [r])  # masks and points are in the picture
            for _, members in sorted(strata.items(), key=lambda item: str(item[0])) for r in members[:6]]),
        "copies": ("files that show one photograph", list(map(group, report["copies"]))),
        "turned_copies": ("copies that were mirrored or turned", list(map(group, report["turned_copies"]))),
        **{name: (title, [group(p["photographs"], f"score {p['score']:.2f}") for p in report["same_eye"][key]])
           for name, title, key in (("same_eye", "photographs of one eye", "pairs"),
                                    ("just_below", "pairs closest below the threshold", "closest_below"))},
        "conflicts": ("one photograph, different labels", [
            group(c["photographs"], f"{c['label']} {' | '.join(map(str, c['values']))}; training uses {c['used']}")
            for c in report["conflicts"]]),
        "leaks": ("an eye of the test split in the training split", [
            ("", [next(r for r in eye if (r.split == "test") == is_test) for is_test in (True, False)])
            for eye in eyes.values() if {"test"} < {r.split for r in eye}]),
        "odd_masks": ("masks stored unlike the others", [(mask, [r]) for r, mask in odd]),
        "no_field": ("photographs without a round field of view",
                     [group([name]) for name in report["without_field_of_view"]])}


# ---- words ----

def listing(title: str, items: Sequence[str], most: int = 12) -> list[str]:
    """Lines of text: how many there are, and the first of them."""
    rest = [f"    ... and {len(items) - most} more (--json lists all)"] if len(items) > most else []
    return [f"{title}: {len(items)}", *(f"    {item}" for item in items[:most]), *rest]


def by_task(labels: Mapping[str, int]) -> str:
    """Counts of labels, each with the task that learns from it."""
    return ", ".join(f"{LABELS[label].task} ({label}) {n}" for label, n in labels.items()) or "none"


def overview_lines(title: str, counts: Mapping) -> list[str]:
    """An `overview` as lines of text."""
    subsets = ", ".join(f"{name} {n}" for name, n in list(counts["subsets"].items())[:12])
    lines = [f"{title}: {counts['photographs']} photographs ({subsets}); labelled: {by_task(counts['labels'])}"]
    for label in LABELS.values():
        lines += label.lines(counts.get(label.section, {}))
    return lines


def format_report(report: Mapping) -> str:
    """A report as text for the screen."""
    lines = [report["data"], *report["notes"], ""]
    for name, counts in report["splits"].items():
        lines += overview_lines(name, counts)
    lines += ["", "sizes: " + ", ".join(f"{size} ({n})" for size, n in list(report["sizes"].items())[:8])]
    if report["mask_formats"]:
        lines.append(f"masks ({', '.join(f'{k} {name}' for k, name in LESION_NAMES.items())}) are stored as "
                     + ", ".join(f"mode {form.replace(' ', ' with values ', 1)} ({n} files)"
                                 for form, n in report["mask_formats"].items()))
    lines += listing("masks stored unlike the others", report["odd_masks"])
    lines += listing("mask files without a set pixel (they count as none)", report["black_masks"])
    lines += listing(f"masks of which nothing is left at {EXAMINED_SIZE} pixels", report["vanished_masks"])
    lines += listing("photographs that cannot be used", list(report["unreadable"].values()))
    lines += listing("photographs without a round field of view (taken whole, not compared by vessels)",
                     report["without_field_of_view"], 3)
    lines += report["not_compared"]
    same = report["same_eye"]
    lines += ["", *listing("copies: pairs of files that show one photograph",
                           [" = ".join(pair) for pair in report["copies"]], 4)]
    lines += listing("copies that were mirrored or turned (not joined; they stay on one side of every split)",
                     [" = ".join(pair) for pair in report["turned_copies"]], 4)
    lines += listing(f"other pairs that show one eye (score {same['threshold']} and up)",
                     [f"{p['score']:.2f}  {' = '.join(p['photographs'])}" for p in same["pairs"]])
    lines += [f"    closest below: {p['score']:.2f}  {' / '.join(p['photographs'])}"
              for p in same["closest_below"][:1]]
    lines.append(
        f"after joining copies in the training split: {same['photographs']} photographs of {same['eyes']} eyes")
    lines += listing("labels that contradict each other", [
        f"{c['label']} {' or '.join(map(str, c['values']))} of {' = '.join(c['photographs'])}; training uses "
        f"{c['used']}" for c in report["conflicts"]])
    leaks = report["leaks"]
    if "test" in report["splits"]:
        lines += ["", f"leaks: training photographs of an eye in the test split: {len(leaks['training'])}; by task: "
                  f"{by_task(leaks['training_labels'])}",
                  f"    test photographs of an eye in the training split, by task: {by_task(leaks['test_labels'])}"]
        lines += ["    train.py leaves those training photographs out, unless --keep-leaks"] * bool(leaks["training"])
    else:
        lines += ["", "leaks: there is no test split here to look for in the training split"]
    if leaks["validated"]:
        lines += listing("training photographs of an eye in the validation split (train.py leaves them out)",
                         leaks["validated"])
    how = "validation as the data set says" if "val" in report["splits"] else f"fold {report['split']['fold']}"
    lines += ["", f"the split of train.py, {how}, copies joined:"]
    for name in ("training", "validation"):
        lines += overview_lines(f"  {name}", report["split"][name])
    return "\n".join(lines)


# ---- contact sheets ----

def contact_sheet(title: str, groups: Sequence[Group], labels: bool) -> Image.Image:
    """A picture of groups of photographs, each group with a caption, each photograph with its name.

    With `labels`, masks and points are drawn on the photographs.
    """
    def tile(record):
        sample = cached_sample(record, cache_path(record, EXAMINED_SIZE), EXAMINED_SIZE)
        picture = photograph(sample.image, EXAMINED_SIZE)
        return captioned(tinted(picture, masks_of(sample), sample.landmarks) if labels else picture, record.name)

    wide = max(len(members) for _, members in groups)
    tiles = [captioned(row([tile(r) for r in members], 0), caption) for caption, members in groups]
    return titled(title, column([*[label_legend()] * labels, grid(tiles, max(1, 6 // wide))]))


def contact_sheets(sheets: Mapping[str, tuple[str, Sequence[Group]]], folder: Path) -> list[str]:
    """Write one sheet for each sort of finding to `folder`; -> lines with their names and titles."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for name, (title, groups) in sheets.items():
        if groups:
            title += f" ({min(len(groups), MAX_GROUPS)} of {len(groups)})"
            contact_sheet(title, groups[:MAX_GROUPS], name in ("labels", "odd_masks")).save(folder / f"{name}.png")
            lines.append(f"{folder / name}.png: {title}")
    return lines
