"""Pictures of runs: what they show against what is known, what is missing, nothing cut off, a page on its own."""

import base64
import datetime
import html
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import evaluate
import model
import train
import visualize
from conftest import TINY, busy_net, real_idrid, rendered
from model import Routing
from retina import drawing
from retina.datasets import readers, records
from retina.evaluation import metrics, scoring, tables
from retina.figures import answers, charts, context, internals, routing
from retina.files import InputError
from retina.training import checkpoint
from tasks import TASKS, Signs


pytestmark = pytest.mark.usefixtures("few_drawings", "few_resamples", "shallow")
ALL = replace(TINY, tasks=tuple(TASKS), image_size=64)


@pytest.fixture
def made(whole):
    """A run of all tasks, or of other options."""
    return lambda options=ALL: whole(options)


@pytest.fixture
def words(monkeypatch):
    """All words that are drawn, each of which must lie within its picture."""
    drawn, whole = [], ImageDraw.ImageDraw.text

    def watched(pen, at, text, *rest, **more):
        font = rest[1] if len(rest) > 1 else more["font"]
        left, top, right, bottom = pen.textbbox(at, text, font)
        wide, high = pen.im.size
        assert left >= 0 and top >= 0 and right <= wide and bottom <= high, f"{text!r} is cut off"
        drawn.append(text)
        return whole(pen, at, text, *rest, **more)
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", watched)
    return drawn


def context_of(folder: Path, *flags: str) -> context.FigureContext:
    return visualize.gather(visualize.parse([str(folder), *flags]))


def copied(run: Path, to: Path) -> Path:
    """The same run elsewhere, without its pictures."""
    return shutil.copytree(run, to, ignore=shutil.ignore_patterns("pictures"))


# ---- all of them ----

def test_all_pictures_of_a_run_and_the_page(made, words, capsys):
    run = made()
    visualize.main([str(run)])
    lines = capsys.readouterr().out.splitlines()
    names = [f"{name}.{form}" for name, (_, form) in visualize.FIGURES.items()]
    assert [Path(line).name for line in lines[:-1]] == names and "index.html" in lines[-1]
    assert sorted(p.name for p in (run / "pictures").iterdir()) == sorted([*names, "index.html"])
    page = (run / "pictures" / "index.html").read_text()
    embedded = re.findall(r'src="data:image/(?:png|jpeg);base64,([^"]+)"', page)
    assert [base64.b64decode(e) for e in embedded] == [(run / "pictures" / name).read_bytes() for name in names]
    bare = re.sub('base64,[^"]+', "", page)
    assert bare.count("src=") == len(names) and not [x for x in ("<script", "http", "url(", "<link") if x in bare]
    assert "Not drawn" not in page and "DRAWN photographs" in page
    config = json.loads((run / "config.json").read_text())
    options, begun = config["options"], datetime.datetime.fromisoformat(config["begun"])
    assert datetime.timedelta() <= datetime.datetime.now(begun.tzinfo) - begun < datetime.timedelta(hours=1)
    assert all(f" {word}" in html.unescape(page) for word in (config["begun"], torch.__version__, *sys.argv[1:]))
    assert f"<code>python {Path(sys.argv[0]).name}" in page
    assert all(f"<span>{k}</span>" in page for k in options) and "<th>Dice, mean over images<td>" in page
    stored = evaluate.load_run(run, torch.device("cpu"))
    values, limits = scoring.summary([context_of(run).here[0]], [stored.calibration])
    assert f"<td>{tables.number_cell(values['seg']['dice_MA'], limits['seg'].get('dice_MA'))}<td>" in page
    log = checkpoint.read_log(run)
    assert log[context.best_epoch_of(log)]["epoch"] == stored.epoch
    assert f"run, epoch {stored.epoch}, 6 DRAWN validation" in " ".join(words)


def test_pictures_do_not_change_from_one_time_to_the_next(made):
    for name in ("routing", "tsne", "feature_maps"):
        first, again = (visualize.encoded(visualize.FIGURES[name][0](context_of(made())), "png") for _ in range(2))
        assert first == again


@pytest.mark.parametrize("change,missing", [
    ({"tasks": ("cls",), "num_experts": 0, "balance_weight": 0.0},
     {"overlays": "trained for cls, which answers neither with lesions", "routing": "--num-experts 0",
      "sentences": "for cls, which says no sentences"}),
    ({"tasks": ("seg",), "num_experts": 16},
     {"confusion": "for seg, which tells no classes", "gradcam": "tells no classes", "sentences": "no sentences"}),
    ({"tasks": ("loc",), "moe_at": "decoder"},
     {"confusion": "for loc, which tells no", "gradcam": "no classes", "reliability": "which gives no prob",
      "sentences": "no sentences"}),
    ({"tasks": ("text",)}, {"overlays": "neither", "confusion": "for text, which", "gradcam": "", "reliability": ""}),
    ({"tasks": ("fine", "signs")}, {"overlays": "neither", "sentences": "no sentences"})])
def test_what_is_missing_is_said_and_not_drawn(made, words, capsys, change, missing):
    run = made(replace(ALL, **change, epochs=1))
    visualize.main([str(run)])
    said = capsys.readouterr().out
    page = html.unescape((run / "pictures" / "index.html").read_text())
    for name, (_, form) in visualize.FIGURES.items():
        assert (run / "pictures" / f"{name}.{form}").exists() == (name not in missing)
    for name, reason in missing.items():
        assert re.search(f"not drawn: {name}: .*{reason}", said)
        assert re.search(f'id="{name}">[^/]*</h2><p class="missing">Not drawn: [^<]*{reason}', page)
    assert page.count("<img") == len(visualize.FIGURES) - len(missing)


def test_folders_of_classes(tmp_path, words):
    """More classes than colours."""
    for i in range(40):
        folder = tmp_path / "classes" / ("val" if i % 2 else "train") / f"class {i // 4}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((64, 64), 5 + i).convert("RGB").save(folder / f"{i}.png")
    options = replace(ALL, tasks=("cls",), data=str(tmp_path / "classes"), epochs=1, names={
        "category": [f"class {k}" for k in range(10)]})
    train.fit(options, tmp_path / "run", quiet=True)
    visualize.main([str(tmp_path / "run"), "--only", "tsne", "confusion",
                   "gradcam", "routing", "feature_maps", "curves"])
    text = " ".join(words)
    assert "other classes (12)" in text and "class class 0 (4)" in text and "no label" not in text
    assert "by class" in text and "label-shuffled control" in text and "grade" not in text


def test_the_test_part_has_its_own_names_and_is_noted(made, tmp_path, capsys):
    run = copied(made(), tmp_path / "run")
    visualize.main([str(run), "--split", "test", "--only", "confusion"])
    assert [p.name for p in (run / "pictures").iterdir()] == ["confusion_test.jpg"]
    assert len((run / "test_opened.jsonl").read_text().splitlines()) == 1
    assert "the test split of drawn photographs is opened" in capsys.readouterr().out


def test_curves_of_several_runs(made, tmp_path, words):
    runs = [copied(made(), tmp_path / place / name) for place, name in (("x", "a"), ("y", "a"), ("x", "b"))]
    visualize.main([*map(str, runs), "--only", "curves"])
    assert (runs[0] / "pictures" / "curves.png").exists() and not (runs[1] / "pictures" / "curves.png").exists()
    assert {str(runs[0]), str(runs[1]), "b"} <= {w.strip() for w in words}


def test_curves_without_a_score_or_without_a_choice(made, tmp_path):
    """Validation without a lesion, and a run of which no epoch answered with finite numbers."""
    runs = [copied(made(), tmp_path / name) for name in "ab"]
    for run, chosen in zip(runs, (True, False)):
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        for line in lines:
            line |= {"score": None, "best": chosen and line["best"]}
            line["val"] = {"seg": {"loss": 1.0, "dice": None}} if chosen else {}
        (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    visualize.main([*map(str, runs), "--only", "curves"])
    assert (runs[0] / "pictures" / "curves.png").exists()


def test_curves_of_signs_that_are_more_than_colours(made):
    m = context_of(made())
    m.logs = {"run": [{"best": True, "val": {"signs": dict.fromkeys(["auc", *(f"auc_{c}" for c in "abcdefgh")], 0.5)}}]}
    for signs, drawn in (("abcdefg", 8), ("abcdefgh", 1)):
        lines = answers.metric_lines(m, Signs({"signs": signs}))
        assert len(lines) == len({tuple(line.colour) for line in lines}) == drawn


# ---- mistakes ----

@pytest.mark.parametrize("spoil,message", [
    (lambda run: shutil.rmtree(run), "no such checkpoint; expected a folder made by train.py"),
    (lambda run: (run / "best.pt").write_bytes(b"junk"), "best.pt: damaged"),
    (lambda run: torch.save({"options": {"tasks": ["cls"]}}, run / "best.pt"), "another version .* lacks 'encoder'"),
    (lambda run: (run / "log.jsonl").unlink(), "log.jsonl: no such file; expected a folder made by train.py"),
    (lambda run: (run / "log.jsonl").write_text(""), "log.jsonl: empty; expected a line for each epoch"),
    (lambda run: (run / "log.jsonl").write_text('{"epoch":'), "log.jsonl: damaged .*; expected a line of JSON"),
    (lambda run: (run / "log.jsonl").write_text('{"epoch": 1}'), "another version .*, it lacks 'train'")])
def test_no_run_is_one_line(made, tmp_path, spoil, message):
    run = copied(made(), tmp_path / "run")
    spoil(run)
    with pytest.raises(InputError, match=message):
        visualize.main([str(run), "--only", "curves"])
    assert not (run / "pictures").exists()


@pytest.mark.parametrize("flags,message", [
    (["--perplexity", "0.5"], "--perplexity 0.5: expected at least 1 and less than 29, with 30 photographs; leave it "
                              "out for 10"),
    (["--perplexity", "29"], "less than 29"), (["--perplexity", "nan"], "--perplexity nan"),
    (["--seed", "-1"], "--seed -1: expected a number from 0"),
    (["--data", "/nowhere"], "/nowhere")])
def test_numbers_out_of_range(made, flags, message):
    with pytest.raises(InputError, match=message):
        visualize.main([str(made()), "--only", "tsne", *flags])


def test_runs_named_twice_and_too_many(made, tmp_path):
    with pytest.raises(InputError, match="named twice; expected different runs"):
        visualize.main([str(made()), f"{made()}/"])
    with pytest.raises(InputError, match="9 runs; expected at most 8"):
        visualize.logs_of([tmp_path / str(k) for k in range(9)])


def test_no_picture_of_that_name(made, capsys):
    with pytest.raises(SystemExit) as ended:
        visualize.main([str(made()), "--only", "overlay"])
    assert ended.value.code == 2 and "choose from overlays, curves" in capsys.readouterr().err.replace("'", "")


# ---- what they show ----

def test_best_median_and_worst():
    assert context.best_median_worst({"a": 0.2, "b": 0.9, "c": 0.1, "d": 0.4, "e": 0.5}) == {
        "b": "best", "d": "median", "c": "worst"}
    assert context.best_median_worst({"a": 1, "b": 2}) == {"b": "best", "a": "worst"}
    assert context.best_median_worst({"a": 1}) == {"a": "best"}


def test_photographs_are_ranked_by_the_dice_of_their_lesions(made):
    """Against masks of the network's own, thresholded here."""
    m = context_of(made())
    m.run.calibration["seg"] = dict(zip(TASKS["seg"].classes, (0.02, 0.03, 0.01, 0.02, 0.5)))
    values, _, _ = answers.judged(m)
    ill = {name for name in m.numbers if (m.sample(name).masks[:4] == 1).any()}
    assert values.keys() == ill and 3 <= len(ill) < len(m.numbers)  # what is found on a healthy one does not count
    for name, value in values.items():
        predicted = m.answers(name)["seg"][:4] >= torch.tensor((0.02, 0.03, 0.01, 0.02)).view(4, 1, 1)
        true = m.sample(name).masks[:4] == 1
        both, either = float((predicted & true).sum()), float(predicted.sum() + true.sum())
        assert value == pytest.approx(2 * both / either, abs=0.01)


def test_the_most_frequent_confusions_are_named(made, words):
    m = context_of(made(replace(ALL, tasks=("cls",))))
    scores_, _ = m.here
    m.run.calibration["cls"]["temperature"] = 1.0
    names = [f"p{k}" for k in range(9)]
    truth, said = [0, 0, 0, 0, 1, 1, 3, 4, 4], [2, 2, 2, 0, 0, 0, 3, 4, 1]
    sure = torch.linspace(0.6, 0.8, 9)
    p = ((1 - sure) / 4)[:, None].repeat(1, 5)
    p[range(9), said] = sure
    scores_.names["cls"], scores_.stats["cls"] = names, torch.cat([p, torch.tensor(truth)[:, None]], 1).double()
    scores_.eyes |= {name: name for name in names}
    m.numbers = {name: k % len(m.photographs) for k, name in enumerate(names)}
    answers.confusion(m)
    text = " ".join(words)
    for expected in ("true 0, predicted 2: 3 of 4", "p2, p 0.65", "true 1, predicted 0: 2 of 2", "p5, p 0.7",
                     "true 4, predicted 1: 1 of 2", "75%", "quadratic weighted kappa"):
        assert expected in text
    assert text.index("true 0, pred") < text.index("true 1, pred") < text.index("true 4, pred")


def test_signs_and_sentences_in_words(made):
    """Of all photographs: signs on the wrong side of a threshold are named, a sentence beside the true one."""
    m = context_of(made())
    signs, text = m.run.tasks[-2:]
    m.run.calibration["signs"] = {f"sign_{name}": 0.5 for name in signs.classes}
    for name in m.numbers:
        said, sample, known = answers.in_words(m, name), m.sample(name), m.answers(name)
        p = dict(zip(signs.classes, known["signs"].tolist()))
        wrong = [sign for sign in signs.classes if (p[sign] >= 0.5) != bool(sample.signs[sign])]
        assert ", ".join(sign for sign in signs.classes if p[sign] >= 0.5) in said
        assert (f"wrong about {', '.join(wrong)};" if wrong else ", right;") in said
        answer = text.text(known["text"])
        assert f'"{answer}", ' + ("right" if answer == sample.text else f'true "{sample.text}"') in said


def test_sentences_and_where_their_words_look(made, words):
    m = context_of(made())
    head, many = m.run.net.heads["text"], m.run.options["names"]["text"].index("many") + model.EOS + 1
    with torch.no_grad():  # it learned little: let it say a word
        head.norm.weight.zero_()
        head.norm.bias.copy_(5 * head.embedding.weight[many])
    visualize.FIGURES["sentences"][0](m)
    assert words.count("true sentence") == 3 and words.count("many") >= 3 * model.LONGEST
    assert sum('"many"' in w for w in words) == 9 and any("Heat" in w for w in words)
    words.clear()
    m = context_of(made(replace(ALL, tasks=("text",), text_decoder="gru", epochs=1)))
    visualize.FIGURES["sentences"][0](m)
    assert words.count("true sentence") == 3 and not any('"' in w or "Heat" in w for w in words)


def test_grad_cam_adds_up_to_the_logit():
    """What all positions of all maps add, and the bias; and each position adds what it does: without it, it is gone."""
    torch.manual_seed(0)
    net, tasks, photographs = busy_net(tasks=("cls", "seg"))
    image, head = photographs[0].image, net.heads["cls"]
    with torch.no_grad():
        logits = net(image[None])[0]["cls"][0]
        convolved = head.convolved(net.routed_maps(image[None])[0]["cls"])
    for c, maps in zip((3, 0), internals.grad_cam(net, tasks[0], image, (3, 0))):
        assert [m.shape for m in maps] == [a.shape[2:] for a in convolved]
        added = sum(float(m.sum()) for m in maps) + float(head.linear.bias[c].detach())
        assert added == pytest.approx(float(logits[c]), abs=1e-4)
        level, y, x = 2, 3, 5
        less = [a.clone() for a in convolved]
        less[level][0, :, y, x] = 0
        with torch.no_grad():
            assert float(logits[c] - head.classify(less)[0, c]) == pytest.approx(float(maps[level][y, x]), abs=1e-5)


def test_shares_of_heat():
    even, where, within = torch.ones(8, 8), *torch.zeros(2, 8, 8, dtype=torch.bool)
    where[2:4, :4], within[:, :2] = True, True
    assert internals.share_on(even, where, ~within | within) == pytest.approx(8 / 64)
    assert internals.share_on(even, where, within) == pytest.approx(4 / 16)
    assert internals.share_on(0 * even, where, within) == 0
    heat = internals.heat([torch.full((2, 2), 3.0), torch.full((4, 4), -1.0)], 8)  # 12 - 16 < 0
    assert heat.eq(0).all()
    heat = internals.heat([torch.full((2, 2), 3.0), torch.full((4, 4), -0.5)], 8)
    assert float(heat.sum()) == pytest.approx(12 - 8)
    heat = internals.heat([torch.tensor([[5.0, 0.0], [0.0, 0.0]])], 8)  # spread over a quarter, and softly beyond
    assert float(heat.sum()) == pytest.approx(5, rel=0.15) and heat.argmax() == 0 and not heat[6:, 6:].any()


def test_principal_colours_are_those_of_the_covariance():
    torch.manual_seed(0)
    x = torch.randn(6, 9, 7) * torch.tensor([5.0, 3, 2, 1, 0.5, 0.1]).view(6, 1, 1)
    colours, share = internals.principal_colours(x)
    flat = x.flatten(1).T.numpy().astype(float)
    values, vectors = np.linalg.eigh(np.cov(flat.T))  # ascending
    assert share == pytest.approx(values[-3:].sum() / values.sum())
    components = (flat @ vectors[:, :-4:-1]).reshape(9, 7, 3)
    for k in range(3):
        middle = (colours[..., k] > 0) & (colours[..., k] < 255)  # percentiles cut the ends off
        fit = np.corrcoef(colours[..., k][middle], components[..., k][middle])[0, 1]
        assert abs(fit) > 0.9999
    constant, _ = internals.principal_colours(torch.ones(4, 3, 3))
    assert len(np.unique(constant)) == 1
    for few in (torch.randn(1, 3, 3), torch.randn(9, 2, 1)):  # one channel, two positions
        one, share = internals.principal_colours(few)
        assert one.shape == (*few.shape[1:], 3) and not one[..., 1:].any() and share == pytest.approx(1)


@pytest.mark.parametrize("side,chosen,second", [(8, 2, True), (8, 1, False), (64, 2, False), (256, 2, False)])
def test_token_grids_of_any_size(side, chosen, second):
    r = Routing(torch.arange(chosen).expand(side * side, -1), *[None] * 3, (1, side, side))
    picture = routing.token_grid(torch.zeros(3, 32, 32, dtype=torch.uint8), r, [(255, 0, 0), (0, 255, 0)], 240)
    assert routing.has_room(r) == second == bool((np.asarray(picture)[..., 1] > 200).any())
    assert (np.asarray(picture)[..., 0] > 100).mean() > 0.3


def test_tokens_lie_where_they_belong():
    indices = torch.tensor([[0, 1], [1, 0], [2, 0], [0, 2], [1, 2], [2, 1]])
    r = Routing(indices, *[None] * 3, (1, 2, 3))
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    picture = np.asarray(routing.token_grid(torch.zeros(3, 32, 32, dtype=torch.uint8), r, colours, 240)).astype(int)
    for i, (first, second) in enumerate(indices.tolist()):
        y, x = divmod(i, 3)
        assert picture[120 * y + 60, 80 * x + 40].tolist() == list(colours[second])
        around = picture[120 * y + 10, 80 * x + 10]
        assert around.argmax() == first and 120 < around.max() < 255


def test_heatmaps_of_routes_show_what_routes_tell_and_lose_it_when_shuffled(made, monkeypatch):
    """Routes planted by grade and by task: the real ones show it, those of shuffled photographs do not."""
    seen = []
    monkeypatch.setattr(routing, "two_heatmaps", lambda titles, rows, real, shuffled, experts: seen.append(
        (titles[0], rows, real, shuffled)) or Image.new("RGB", (1, 1)))
    m = context_of(made())
    m.photographs.records = 200 * [r.with_labels(grade=k % 4) for k, r in enumerate(m.photographs.records[:4])]
    one = torch.eye(4)
    shares = torch.stack([one.repeat(200, 1), *(one[k:k + 1].expand(800, 4) for k in range(3))])
    routing.by_label(m, shares, range(4))
    routing.by_task(m, shares[[1, 2, 3]], range(4))
    (title, rows, real, shuffled), _, _, _, (_, _, tasks, mixed) = seen
    assert title == "by retinopathy grade" and rows == [f"grade {k}" for k in range(4)]
    torch.testing.assert_close(real, torch.eye(4))
    assert (shuffled - 0.25).abs().max() < 0.1
    torch.testing.assert_close(tasks, torch.eye(4)[:3])
    assert (mixed[:, :3] - 1 / 3).abs().max() < 0.05
    torch.testing.assert_close(mixed.sum(1), torch.ones(3))


def test_exchanged_photographs_keep_their_images_and_have_the_next_ones_masks(made):
    photographs = context_of(made()).photographs
    other, n = routing.LabelShuffled(photographs), len(photographs)
    for i in range(n):
        assert torch.equal(other[i].image, photographs[i].image)
        assert torch.equal(other[i].masks, photographs[(i + 1) % n].masks)
    assert not torch.equal(photographs[0].masks, photographs[1].masks)


def test_entropy_is_in_bits(made, monkeypatch):
    lines = []
    monkeypatch.setattr(routing, "epochs_chart", lambda m, title, words, found, *rest: lines.extend(found) or
                        context.epochs_chart(m, title, words, found, *rest))
    m = context_of(made())
    usage = [[0.5, 0.5, 0.5, 0.5], [1, 1, 0, 0], [2, 0, 0, 0]]
    m.logs = {"run": [{"expert_usage": {"cls": {"tokens": u}}} for u in usage] + [{"expert_usage": {}}]}
    routing.entropy_chart(m, 4)
    assert lines[0].values == [2.0, 1.0, 0.0, None] and lines[1].values == [None] * 4


def test_rare_classes_lie_on_top(monkeypatch):
    """One place: what is seen there is the rarest class, wherever the legend has it; never what has no label."""
    task = TASKS["cls"]
    labels = [None, 4, *5 * [0], *3 * [2]]
    groups = internals.groups_by_label(task, labels)
    order = []
    monkeypatch.setattr(charts.Chart, "dots", lambda chart, x, *rest: order.append(len(x)))
    internals.map_of("", torch.zeros(10, 2), groups)
    assert order == [1, 5, 3, 1] and [len(which) for *_, which in groups if which] == [1, 5, 3, 1]
    order.clear()
    internals.map_of("", torch.zeros(10, 2), internals.groups_by_label(task, [4, 0, 0, 0, 2, 2, 4, 4, 4, 4]))
    assert order == [5, 3, 2]  # of grades 4, 0, 2


def test_neighbours_kept():
    y = torch.rand(40, 2, generator=torch.Generator().manual_seed(0))
    assert internals.neighbours_kept(torch.cat([y, 0 * y], 1), y) == 1
    other = torch.rand(40, 2, generator=torch.Generator().manual_seed(1))
    assert 0.1 < internals.neighbours_kept(y, other) < 0.4  # 10 of 39 by chance
    assert internals.neighbours_kept(y[:3], y[:3]) == 1


def test_features_are_the_deepest_map_averaged(made):
    m = context_of(made())
    _, pooled = m.passed(m.photographs)
    with torch.no_grad():
        alone = torch.cat([m.run.net.encoder((m.photographs[i].image[None] - m.run.net.mean) / m.run.net.std)[-1]
                           .mean((2, 3)) for i in range(len(m.photographs))])
    torch.testing.assert_close(pooled, alone, rtol=1e-4, atol=1e-5)
    assert not m.run.net.encoder._forward_hooks


def test_training_photographs_are_those_that_the_run_learned_from(made, monkeypatch):
    run = made()
    m = context_of(run)
    names = {r.name for r in m.training.records}
    assert len(names) == 24 and not names & set(m.run.validation) and len(m.run.validation) == 6
    monkeypatch.setattr(context, "MOST", 10)
    fewer = context_of(run).training.records
    assert len(fewer) == 10 and {r.name for r in fewer} < names


def test_a_training_part_that_has_changed_is_said(made, tmp_path, capsys, monkeypatch):
    run = copied(made(), tmp_path / "run")
    context_of(run)
    assert "warning" not in capsys.readouterr().out
    monkeypatch.setattr(readers, "DRAWN", {"train": (0, 33), "test": (1, 10)})
    m = context_of(run)
    assert "the training split is not what it was" in capsys.readouterr().out
    assert not {r.name for r in m.training.records} & set(m.run.validation)


def test_pictures_of_other_data_are_files_of_their_own_and_say_whose_they_are(made, tmp_path, shared_tree, words):
    run = copied(made(), tmp_path / "run")
    visualize.main([str(run), "--only", "confusion", "--split", "test", "--data", str(shared_tree)])
    picture, = (run / "pictures").iterdir()
    assert re.fullmatch(r"confusion_test_IDRiD_[0-9a-f]{8}\.jpg", picture.name)
    said = " ".join(" ".join(words).split())
    assert "Not the test split beside which the run was trained" in said and "DRAWN" not in said
    line, = (run / "test_opened.jsonl").read_text().splitlines()
    assert json.loads(line)["data"] == str(shared_tree)


# ---- calibration, precision and recall ----

def test_bins_of_calibration_by_hand():
    p = torch.tensor([[0.95, 0.05], [0.94, 0.06], [0.3, 0.7], [0.45, 0.55], [0.5, 0.5]])
    truth = torch.tensor([0, 1, 1, 0, 0])
    bins = metrics.calibration_bins(p, truth, 10).tolist()
    expected = [(0.5, 1, 1), (0.55, 0, 1), (0.7, 1, 1), (0.945, 0.5, 2)]
    assert [tuple(b) for b in bins] == [pytest.approx(e) for e in expected]
    torch.manual_seed(0)
    p, truth = torch.rand(200, 4).softmax(1), torch.randint(0, 4, (200,))
    bins = metrics.calibration_bins(p, truth)
    error = float((bins[:, 2] * (bins[:, 0] - bins[:, 1]).abs()).sum() / 200)
    assert error == pytest.approx(float(metrics.calibration_error(p, truth, torch.ones(1, 200).double())))


def test_precision_and_recall_by_counting_pixels(made, monkeypatch):
    """The curve and the dot of each kind, against all pixels at a threshold."""
    lines, dots = {}, {}
    monkeypatch.setattr(charts.Chart, "line", lambda chart, x, y, colour, *rest: lines.update({tuple(colour): (x, y)}))
    monkeypatch.setattr(charts.Chart, "dots", lambda chart, x, y, colour, *rest: dots.update({tuple(colour): (x, y)}))
    m = context_of(made())
    half = float(torch.cat([m.answers(name)["seg"].flatten() for name in m.numbers]).median())
    m.run.calibration["seg"] = dict.fromkeys(TASKS["seg"].classes, half)
    answers.precision_recall_chart(m, TASKS["seg"])
    names = m.here[0].names["seg"]
    p = torch.stack([m.answers(name)["seg"] for name in names])
    true = torch.stack([m.sample(name).masks for name in names]) == 1
    at = metrics.threshold_at(metrics.level_of(half))
    for i, kind in enumerate(TASKS["seg"].classes):
        colour, found = records.LESION_COLOURS[kind], p[:, i] >= at
        both = float((found & true[:, i]).sum())
        expected = both / float(true[:, i].sum()), both / max(1.0, float(found.sum()))
        recall, precision = lines[colour]
        assert recall[-1] == 1 and precision[-1] == pytest.approx(float(true[:, i].double().mean()), rel=1e-3)
        assert np.all(np.diff(recall) >= 0)
        if found.any():
            assert (dots[colour][0][0], dots[colour][1][0]) == pytest.approx(expected, abs=0.01)
    assert len(dots) >= 3


# ---- masks of which not all are known, labels that are missing ----

def table_of(folder: Path, cells: list[str], header: str) -> Path:
    """Drawn photographs with the disc's mask and one of microaneurysms; -> a table with these cells."""
    folder.mkdir(exist_ok=True)
    for i in range(len(cells)):
        picture, masks = rendered(5, i, 64)
        Image.fromarray(picture).save(folder / f"{i}.png")
        for k, kind in ((0, "ma"), (4, "od")):
            Image.fromarray(255 * np.pad(masks[k], 0).astype(np.uint8)).save(folder / f"{i}_{kind}.png")
    lines = [cell.format(i=i) for i, cell in enumerate(cells)]
    (folder / "t.csv").write_text("\n".join([header, *(f"{i}.png,{line}" for i, line in enumerate(lines))]) + "\n")
    return folder / "t.csv"


def test_masks_that_are_not_known_are_neither_drawn_nor_counted(tmp_path, words):
    cells = ["{i}_od.png,,2,train"] * 6 + ["{i}_od.png,,1,val", "{i}_od.png,none,2,val", "{i}_od.png,none,0,val"]
    table = table_of(tmp_path / "data", cells, "image,mask_od,mask_ma,grade,split")
    train.fit(replace(ALL, tasks=("cls", "seg"), data=str(table), epochs=1), tmp_path / "run", quiet=True)
    m = context_of(tmp_path / "run")
    assert [set(drawing.masks_of(m.sample(name))) for name in m.numbers] == [{"OD"}, {"OD", "MA"}, {"OD", "MA"}]
    m.run.calibration["seg"] = dict.fromkeys(TASKS["seg"].classes, 1 - 1e-6) | {"MA": 1e-6}  # finds them everywhere
    seen = [np.asarray(answers.panels_of(m, name)[2])[:context.PANEL] for name in m.numbers]
    blue = [(picture == records.LESION_COLOURS["MA"]).all(2).sum() for picture in seen]
    assert blue[0] == 0 and min(blue[1:]) > 500
    assert "masks of MA, HE, EX, SE not known" in answers.in_words(m, next(iter(m.numbers)))
    visualize.main([str(tmp_path / "run")])
    text = " ".join(words)
    assert "lesions not all known" in text and "no lesions" not in text and "not one true pixel" in text
    assert "Mean over" not in text


def test_a_split_without_some_labels_says_so(tmp_path, capsys):
    cells = ["{i}_od.png,2,train"] * 5 + ["{i}_od.png,1,val", ",1,test", ",3,test"]
    table = table_of(tmp_path / "data", cells, "image,mask_od,grade,split")
    train.fit(replace(ALL, tasks=("cls", "seg"), data=str(table), epochs=1), tmp_path / "run", quiet=True)
    visualize.main([str(tmp_path / "run"), "--split", "test"])
    assert "not drawn: overlays: none of the 2 test photographs has a label for seg" in capsys.readouterr().out
    visualize.main([str(tmp_path / "run")])  # one validation photograph
    assert re.findall("not drawn: (.*):", capsys.readouterr().out) == ["sentences"]


# ---- the page in a browser ----

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-quic"]


def looked_at(page: str, folder: Path, wide: int) -> dict:
    """What a browser makes of a page in a frame so many pixels wide."""
    frame = folder / "frame.html"
    frame.write_text(f"""<!DOCTYPE html><iframe width="{wide}" height="900" style="border:0"
        srcdoc="{html.escape(page, quote=True)}"></iframe><pre id="found"></pre><script>
        const frame = document.querySelector("iframe");
        frame.onload = () => {{
            const page = frame.contentDocument, images = [...page.images];
            document.getElementById("found").textContent = JSON.stringify({{
                seen: page.documentElement.clientWidth, wide: page.documentElement.scrollWidth,
                images: images.length, missing: images.filter(i => !i.complete || !i.naturalWidth).length,
                unnamed: images.filter(i => !i.alt).length,
                beyond: [...page.querySelectorAll("body *")].filter(
                    e => e.getBoundingClientRect().right > page.documentElement.clientWidth + 1).length}});
        }};</script>""")
    result = subprocess.run([BROWSER, *FLAGS, f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=20000",
                             "--dump-dom", frame.as_uri()], capture_output=True, text=True, timeout=120)
    return json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', result.stdout)[1]))


@pytest.mark.skipif(BROWSER is None, reason="wants Chromium (Debian: apt-get install chromium)")
@pytest.mark.parametrize("wide", [1280, 390])
def test_the_page_in_a_browser(made, tmp_path, wide):
    run = made()
    if not (run / "pictures" / "index.html").exists():
        visualize.main([str(run)])
    page = (run / "pictures" / "index.html").read_text()
    found = looked_at(page, tmp_path, wide)
    assert found.pop("seen") in range(wide - 20, wide + 1)
    assert found.pop("wide") <= wide
    assert found == {"images": len(visualize.FIGURES), "missing": 0, "unnamed": 0, "beyond": 0}
    spoiled = page.replace("base64,", "base64,AAAA", 1).replace("<h2", '<p style="width: 1500px">wide</p><h2', 1)
    found = looked_at(spoiled, tmp_path, wide)  # the look itself can fail
    assert found["missing"] == 1 and found["wide"] >= 1500 and found["beyond"] >= 1


# ---- real photographs ----

def test_overlays_of_real_photographs(tmp_path, monkeypatch):
    """One epoch at 64 pixels: poor answers, but real photographs, masks and points through all of it."""
    whole = readers.read_idrid
    monkeypatch.setattr(readers, "read_idrid", lambda root: replace(  # every fifth will do
        found := whole(root), records=found.records[::5]))
    options = replace(ALL, tasks=("cls", "dme", "seg", "loc"), data=str(real_idrid("idrid")), epochs=1, batch_size=8,
                      crops=2.0)
    train.fit(options, tmp_path / "run", quiet=True)
    visualize.main([str(tmp_path / "run")])
    found = {p.name: Image.open(p) for p in (tmp_path / "run" / "pictures").glob("*.*g")}
    page = (tmp_path / "run" / "pictures" / "index.html").read_text()
    assert len(found) == len(visualize.FIGURES) - 1 and page.count("Not drawn") == 1  # sentences
    # the architecture is drawn larger, for a README that shows it at half its width
    assert all(image.width <= 1280 for name, image in found.items() if name != "architecture.png")
