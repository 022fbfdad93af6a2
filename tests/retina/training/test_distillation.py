"""Teachers: the divergences against formulas, who may teach whom, which labels are hidden, what is asked of a part."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY
from PIL import Image

import data
import model
import tasks
import train
from retina.datasets import readers, splits
from retina.files import InputError
from retina.training import distillation
from retina.training.distillation import Teachers
from tasks import TASKS, Classification, Task, build_net, class_divergence, make_tasks, yes_no_divergence


def random(*shape, seed=0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- divergences ----

@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_gradient_is_that_of_the_paper(temperature):
    """T (p - q) / N by finite differences, N photographs; by autograd, too."""
    z, v, n, step = random(4, 5).requires_grad_(), random(4, 5, seed=1), 4, 1e-5
    loss = class_divergence(z, [v], temperature).sum() / n
    loss.backward()
    expected = temperature * ((z / temperature).softmax(1) - (v / temperature).softmax(1)) / n
    for i in range(4):
        for j in range(5):
            moved = torch.zeros(4, 5, dtype=torch.float64)
            moved[i, j] = step
            up, down = (class_divergence((z + s * moved).detach(), [v], temperature).sum() / n for s in (1, -1))
            assert float((up - down) / (2 * step)) == pytest.approx(float(expected[i, j].detach()), abs=1e-8)
    assert torch.allclose(z.grad, expected, atol=1e-12)


def test_at_a_high_temperature_it_is_a_mean_square():
    """|z - v|^2 / (2 C) for centred logits (section 2.1 of the paper)."""
    z, v = (random(3, 6, seed=k) for k in (0, 1))
    z, v = z - z.mean(1, keepdim=True), v - v.mean(1, keepdim=True)
    assert torch.allclose(class_divergence(z, [v], 1e4), (z - v).square().sum(1) / 12, rtol=1e-3)


def test_several_teachers_are_the_mean_of_their_probabilities():
    """The mean of the divergences from each of them differs from it by what does not depend on the student."""
    first, *teachers = (random(3, 5, seed=k) for k in range(4))
    gaps = [torch.stack([class_divergence(z, [v]) for v in teachers]).mean(0) - class_divergence(z, teachers)
            for z in (first, random(3, 5, seed=9))]
    assert torch.allclose(gaps[0], gaps[1], atol=1e-12) and (gaps[0] > 1e-3).all()
    logits = class_divergence(first, [torch.stack(teachers).mean(0)])
    assert (logits - class_divergence(first, teachers)).abs().max() > 1e-3


def test_yes_and_no_equal_two_classes():
    z, v = random(3, 4), random(3, 4, seed=1)
    two = [torch.stack([x, torch.zeros_like(x)], 2) for x in (z, v)]
    assert torch.allclose(yes_no_divergence(z, [v]), class_divergence(two[0], [two[1]]).mean(1), atol=1e-12)


NAMES = {"text": ["left", "right", "eye", "."], "fine": ["a", "b", "c"], "signs": ["x", "y"]}
LENGTH = 6


def raw_output(task, seed=0) -> torch.Tensor:
    shapes = {"cls": (3, 5), "dme": (3, 3), "seg": (3, 5, 8, 8), "loc": (3, 2, 4, 4), "fine": (3, 3), "signs": (3, 2),
              "text": (3, 1, LENGTH, model.EOS + 5)}
    return random(*shapes[task.name], seed=seed)


@pytest.mark.parametrize("task", make_tasks(TASKS, NAMES), ids=list(TASKS))
def test_who_answers_as_the_teacher_does_has_nothing_to_learn(task):
    v = raw_output(task)
    z = v.clone().requires_grad_()
    loss = task.teacher_loss(z, [v, v], 2.0)
    loss.sum().backward()
    assert loss.shape == (3,) and loss.abs().max() < 1e-12 and z.grad.abs().max() < 1e-12
    other = raw_output(task, seed=1).requires_grad_()
    task.teacher_loss(other, [v], 2.0).sum().backward()
    assert other.grad.abs().max() > 1e-4


def test_words_after_the_end_of_the_teachers_sentence_do_not_count():
    task, = make_tasks(["text"], NAMES)
    answer = torch.full((1, 1, LENGTH, model.EOS + 5), -9.0)
    for place, word in enumerate([4, 6, model.EOS, 5, 5, 5]):
        answer[0, 0, place, word] = 9.0
    z = torch.zeros_like(answer)
    loss = task.teacher_loss(z, [answer], 1.0)
    z[:, :, 3:] = random(LENGTH - 3, model.EOS + 5).float()
    assert torch.equal(task.teacher_loss(z, [answer], 1.0), loss)
    z[:, :, 2] = 5 * random(model.EOS + 5).float()
    assert not torch.equal(task.teacher_loss(z, [answer], 1.0), loss)
    # as long as the student's words in training, which may end before the teacher's
    assert task.teacher_loss(z[:, :, :2], [answer], 1.0).isfinite().all()


# ---- a batch ----

@pytest.fixture
def batch():
    """Six photographs: 0 and 1 with all labels, 2 with a grade, 3 without any, 4 a part with masks, 5 one without."""
    task_list = make_tasks(["cls", "seg", "text"], NAMES)
    dataset = data.FundusDataset(readers.read_drawn().records[:6], TINY.image_size)
    samples = [dataset[i] for i in range(6)]
    kept = [("grade", "masks", "text"), ("grade", "masks", "text"), ("grade",), (), ("masks",), ()]
    samples = [replace(s, labels={k: s.labels[k] for k in names}, part=i > 3)
               for i, (s, names) in enumerate(zip(samples, kept))]
    return data.collate(samples, task_list), task_list


def teachers_of(task_list, number=1, **changed) -> Teachers:
    config = replace(TINY, tasks=tuple(t.name for t in task_list), names=NAMES, **changed)
    runs = []
    for seed in range(number):
        torch.manual_seed(seed)
        runs.append(SimpleNamespace(net=build_net(vars(config))[0]))
    return Teachers(runs, task_list, config, 10)


@pytest.mark.usefixtures("shallow")
def test_what_the_student_is_asked(batch):
    batch, task_list = batch
    lesson = teachers_of(task_list, 2).prepare(batch, "fp32")
    assert {t: i.tolist() for t, i in lesson.indices.items()} == {
        "cls": [0, 1, 2, 3], "seg": [0, 1, 2, 3, 4, 5], "text": [0, 1, 0, 1, 2, 3]}
    assert {t: i.tolist() for t, i in lesson.labelled.items()} == {"cls": [0, 1, 2], "seg": [0, 1, 4], "text": [0, 1]}
    assert {t: i.tolist() for t, i in lesson.asked.items()} == {
        "cls": [0, 1, 2, 3], "seg": [0, 1, 2, 3, 4, 5], "text": [2, 3, 4, 5]}
    assert {t: i.tolist() for t, i in lesson.unlabelled.items()} == {
        "cls": [0, 0, 0, 1], "seg": [0, 0, 1, 1, 0, 1], "text": [0, 0, 1, 1]}
    assert {t: [len(a) for a in answers] for t, answers in lesson.answers.items()} == {
        "cls": [4, 4], "seg": [6, 6], "text": [4, 4]}
    assert torch.equal(lesson.targets["text"][:2], batch.targets["text"])
    mixed = teachers_of(task_list, 2)  # each teacher for other tasks
    del mixed.nets[0].heads["seg"], mixed.nets[1].heads["text"], mixed.nets[1].heads["cls"]
    part = mixed.prepare(batch, "fp32")
    assert {t: len(answers) for t, answers in part.answers.items()} == {"cls": 1, "text": 1, "seg": 1}
    assert all(torch.equal(part.indices[t], rows) for t, rows in lesson.indices.items())
    assert torch.equal(lesson.targets["text"][2:], task_list[2].decode(lesson.answers["text"][0]))


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("precision,error", [("fp32", 1e-6), ("bf16", 1e-3)])
def test_the_student_that_is_its_teacher_learns_from_labels_alone(batch, precision, error):
    """In evaluation mode, in which nothing is random: the loss of labels is that without teachers, the other is 0."""
    batch, task_list = batch
    teachers = teachers_of(task_list, precision=precision)
    torch.manual_seed(0)
    net, _ = build_net(vars(teachers.config))
    state = train.make_state(net.eval(), task_list, teachers.config, 10, torch.device("cpu"))
    alone = train.task_losses(state, batch, task_list, teachers.config)
    taught = train.task_losses(state, batch, task_list, teachers.config, teachers=teachers)
    assert taught.keys() - alone.keys() == {"cls teachers", "seg teachers", "text teachers"}
    for t in ("cls", "seg", "text"):
        assert taught[t].dtype == taught[f"{t} teachers"].dtype == torch.float32
        assert float(taught[t].detach()) == pytest.approx(float(alone[t].detach()), rel=100 * error)
        assert float(taught[f"{t} teachers"].detach()) == pytest.approx(0, abs=error)
    assert not any(p.requires_grad for net in teachers.nets for p in net.parameters())
    assert not any(m.training for net in teachers.nets for m in net.modules() if isinstance(m, (
        torch.nn.BatchNorm2d, torch.nn.Dropout, model.NoisyTopKRouter, model.TextHead)))


def test_annealing_goes_from_teachers_to_labels():
    """Of photographs without a label teachers keep their whole weight."""
    task, = make_tasks(["cls"])
    teachers = Teachers([], [task], replace(TINY, anneal=True, distil_weight=3.0), 10)
    z, v = random(4, 5), random(4, 5, seed=1)
    each = task.teacher_loss(z, [v], TINY.temperature)
    lesson = distillation.Lesson({}, {}, {}, {"cls": torch.arange(4)}, {"cls": torch.tensor([0.0, 1.0, 1.0, 0.0])},
                                 {"cls": [v]})
    for step in (0, 4, 10):
        trust = teachers.trust_in_labels(step)
        assert trust == step / 10
        weights = torch.tensor([1 - trust, 1, 1, 1 - trust])
        assert float(teachers.loss(task, z, lesson, trust, model.identity)) == pytest.approx(
            3 * float((weights * each).mean()))
    teachers.config = replace(TINY, anneal=False)
    assert teachers.trust_in_labels(3) == 1
    assert float(teachers.loss(task, z, lesson, 1.0, model.identity)) == pytest.approx(float(each.mean()))


# ---- labels that are hidden ----

def test_labels_are_hidden_by_eye_and_a_larger_share_has_those_of_a_smaller():
    found = [replace(r, eye=f"eye {i // 2}") for i, r in enumerate(readers.read_series("train", 0, 400))]
    kept = {}
    for share in (0.05, 0.15, 0.5, 1.0):
        hidden = splits.hide_labels(found[::-1], share)[::-1]
        assert [r.name for r in hidden] == [r.name for r in found]
        assert all(r.labels in ({}, before.labels) for r, before in zip(hidden, found))
        kept[share] = {r.eye for r in hidden if r.labels}
        assert {r.eye for r in hidden if not r.labels}.isdisjoint(kept[share])
        assert len(kept[share]) == pytest.approx(200 * share, abs=5)
    assert kept[0.05] < kept[0.15] < kept[0.5] < kept[1.0]
    strata = Counter(splits.stratum(r) for r in found[::2])
    half = Counter(splits.stratum(r) for r in found[::2] if r.eye in kept[0.5])
    assert all(abs(half[s] - n / 2) <= 1 for s, n in strata.items())


# ---- who may teach ----

SHORT = replace(TINY, tasks=("cls",), epochs=1)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A run on thirty drawings."""
    patch = pytest.MonkeyPatch()
    patch.setattr(readers, "DRAWN", {"train": (0, 30), "test": (1, 10)})
    home = tmp_path_factory.mktemp("teacher")
    train.fit(SHORT, home / "run", quiet=True)
    patch.undo()
    return home / "run"


@pytest.mark.usefixtures("few_drawings")
@pytest.mark.parametrize("change,word", [
    ({"tasks": ("seg",)}, "it was trained for cls; expected one of --tasks seg"),
    ({"image_size": 64}, "it was trained at --image-size 32, the student at 64"),
    ({"fold": "2/5"}, r"it learned from 6 photographs of eyes that the student is judged on \(drawn/0_00")])
def test_who_cannot_teach_is_refused(teacher, tmp_path, change, word):
    with pytest.raises(InputError, match=word):
        train.fit(replace(SHORT, teachers=(str(teacher),), **change), tmp_path / "run", quiet=True)


@pytest.mark.usefixtures("few_drawings")
def test_a_student_remembers_what_its_teachers_learned(teacher, tmp_path):
    """Its own share of labels is small; as a teacher of others it is refused where its teacher would be."""
    train.fit(replace(SHORT, teachers=(str(teacher),), labelled=0.3, tasks=("cls", "loc")), tmp_path / "run",
              quiet=True)
    stored = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert len(stored["learned"]) == 24 and len(stored["teachers"]) == 1
    log = (tmp_path / "run" / "log.jsonl").read_text()
    assert '"cls teachers"' in log and '"loc teachers"' not in log
    with pytest.raises(InputError, match="other weights than when the run was begun"):
        train.fit(SHORT, tmp_path / "other", quiet=True)
        again = torch.load(tmp_path / "other" / "best.pt", weights_only=True)
        again["net"]["heads.cls.linear.bias"] += 1
        torch.save(again, tmp_path / "other" / "best.pt")
        train.fit(replace(SHORT, teachers=(str(tmp_path / "other"),), labelled=0.3, tasks=("cls", "loc")),
                  tmp_path / "run", quiet=True, resume=True)


def test_other_classes_are_refused():
    config = replace(TINY, tasks=("fine",), names={"fine": ["a", "b"]})
    task_list = make_tasks(["fine"], config.names)
    run = SimpleNamespace(folder="runs/a", tasks=task_list, learned=[], options={
        "image_size": TINY.image_size, "names": {"fine": ["b", "a"]}})
    with pytest.raises(InputError, match="for fine it has other classes or words than the student"):
        distillation.check_teachers([run], task_list, config.names, [])


@pytest.mark.parametrize("words,word", [
    ("--anneal", "--anneal: nobody teaches; expected --teachers RUN as well"),
    ("--unlabelled .", "--unlabelled: nobody teaches"),
    ("--teachers nowhere", "--teachers .*nowhere/best.pt: no such checkpoint"),
    ("--teachers a --unlabelled nowhere", "--unlabelled nowhere: no such folder"),
    ("--labelled 0", "--labelled 0.0: expected at least"), ("--labelled 1.5", "--labelled 1.5: expected at most 1")])
def test_flags_that_cannot_be(words, word, capsys):
    with pytest.raises(InputError, match=word):
        config, _ = train.configure(words.split())
        train.fit(config, None, quiet=True)


@pytest.mark.usefixtures("few_drawings")
def test_a_task_that_cannot_learn_from_teachers_is_told_before_training(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(Classification, "teacher_loss", Task.teacher_loss)
    with pytest.raises(InputError, match="the task cls cannot learn from it; expected a method teacher_loss"):
        train.fit(replace(SHORT, teachers=(str(teacher),)), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_the_same_eyes_keep_their_labels_whatever_the_tasks(shared_tree):
    """Of IDRiD, where photographs carry grades, masks or both; without teachers the others are left out."""
    kept = []
    for words in ("seg", "cls seg", "cls dme loc seg"):
        for teachers in ((), ("run",)):
            config = replace(TINY, tasks=words.split(), data=str(shared_tree), labelled=0.5, teachers=teachers)
            training = data.load_datasets(config, make_tasks(config.tasks))[0].records
            kept.append({r.name for r in training if TASKS["seg"].labelled(r)})
            assert any(not r.labels for r in training) == bool(teachers)
    everything = data.load_datasets(replace(TINY, tasks=("seg",), data=str(shared_tree)), [TASKS["seg"]])[0].records
    assert all(names == kept[0] for names in kept) and 0 < len(kept[0]) < len(everything)


# ---- photographs without labels ----

def test_photographs_of_eyes_that_are_judged_are_left_out(tmp_path):
    """A table of eight pictures with grades; among those without labels is a copy of each, and one that is new."""
    for folder in ("labelled", "new"):
        (tmp_path / folder).mkdir()
    for i in range(9):
        noise = Image.effect_noise((96, 96), 20 + 5 * i).convert("RGB")
        noise.save(tmp_path / "new" / f"x{i}.png")
        if i < 8:
            noise.save(tmp_path / "labelled" / f"{i}.png")
    table = tmp_path / "labelled" / "labels.csv"
    table.write_text("image,grade,split\n" + "".join(f"{i}.png,{i % 2},{'val' if i < 2 else 'train'}\n"
                                                     for i in range(8)))
    config = replace(TINY, tasks=("cls",), data=str(table), unlabelled=str(tmp_path / "new"), teachers=("run",))
    training, validation, findings = data.load_datasets(config, [TASKS["cls"]])
    assert [r.name for r in training.records if not r.labels] == [f"unlabelled/x{i}" for i in range(2, 9)]
    assert len(validation) == 2
    assert "7 of 9 photographs without labels are used" in " ".join(findings["notes"])
    assert sorted(r.name for r in findings["judged"]) == ["0.png", "1.png", "unlabelled/x0", "unlabelled/x1"] or \
        len(findings["judged"]) == 4
    sampler = data.MultiTaskBatchSampler(training.records, [TASKS["cls"]], 6, 0, True, unlabelled=True)
    for number in range(4):
        drawn = [training.records[d.index].labels for d in sampler.step(number)]
        assert 0 < sum(map(bool, drawn)) < 6
    assert tasks.TASKS["cls"].labelled(training.records[0])
