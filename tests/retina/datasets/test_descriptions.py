"""Sentences of drawn eyes say what is drawn, can be read again, and follow mirror images; so do fine classes."""

import functools
import math
from collections import Counter
from dataclasses import replace

import pytest

from retina.datasets import descriptions, synthetic
from retina.datasets.descriptions import describe, facts, fine_class, mirrored, read, sentence, signs, words, write
from retina.datasets.records import LABELS
from retina.datasets.synthetic import Blob, Eye
from retina.training.config import side_notes
from tasks import make_tasks


@functools.cache
def eyes(series: int = 0) -> list[Eye]:
    """1,200 of a series; 0 is that of training."""
    return [synthetic.plan(series, i) for i in range(1200)]


# ---- what is drawn, in words and back ----

def test_what_is_written_is_read():
    for eye in eyes(0) + eyes(1) + eyes(2):
        said = facts(eye)
        assert read(write(said)) == said and list(said) == list(descriptions.SLOTS)
        assert sentence(words(write(said))) == write(said) == describe(eye)


def test_how_many_sentences_and_words_there_are():
    texts = [describe(eye) for eye in eyes()]
    assert len(set(texts)) == 535
    assert {word for text in texts for word in words(text)} == descriptions.GRAMMAR_WORDS
    assert len(descriptions.GRAMMAR_WORDS) == 44
    lengths = [len(words(text)) for text in texts]
    assert (min(lengths), max(lengths), round(sum(lengths) / 1200, 1)) == (6, 42, 18.3)


def brute_facts(eye):
    """By turning each point into the frame in which the fovea lies straight to the right of the disc."""
    def below(points):
        angle = math.atan2(eye.fovea[1] - eye.disc[1], eye.fovea[0] - eye.disc[0])
        turned = [(y - eye.disc[1]) * math.cos(angle) - (x - eye.disc[0]) * math.sin(angle) for x, y in points]
        return [y * (1 if eye.left_disc else -1) > 0 for y in turned]  # where the fovea lies left, that was half a turn

    def half(points):
        return {(): None, (False,): "above", (True,): "below", (False, True): "above and below"}[
            tuple(sorted(set(below(points))))]

    at = {c: [(b.x, b.y) for b in eye.lesions if b.lesion_class == c] for c in ("MA", "HE", "EX", "SE")}
    number = {c: None if not spots else "few" if len(spots) <= 4 else "several" if len(spots) <= 9 else "many"
              for c, spots in at.items()}
    corners = Counter((x > 0.5, y > 0.5) for x, y in at["HE"])
    near = any(math.dist(spot, eye.fovea) <= 0.15 for spot in at["EX"])
    return {
        "side": "left" if eye.disc[0] < eye.fovea[0] else "right", "microaneurysms": number["MA"],
        "haemorrhages": number["HE"],
        "every_quadrant": "in every quadrant" if len([n for n in corners.values() if n >= 5]) == 4 else None,
        "hard_exudates": half(at["EX"]), "fovea": None if not at["EX"] else "near" if near else "far from",
        "soft_exudates": {0: None, 1: "one", 2: "two", 3: "three"}[len(at["SE"])], "soft_half": half(at["SE"]),
        "beading": {0: None, 2: "two", 3: "three", 4: "four"}[len(eye.beaded)], "shunts": "shunt" if eye.irma else None,
        "new_vessels": None if not eye.new_vessels else "at the disc" if any(
            v == eye.disc for v in eye.new_vessels) else "elsewhere",
        "grade": ["no", "mild", "moderate", "severe", "proliferative"][eye.grade]}


def test_facts_equal_brute_force():
    seen = Counter()
    for eye in eyes(0) + eyes(1) + eyes(2):
        assert facts(eye) == brute_facts(eye)
        seen.update(facts(eye).items())
    assert len(seen) == 41 and min(seen.values()) > 50  # all values of all slots occur


def test_a_sentence_by_hand():
    eye = Eye((0, 0), False, (0.7, 0.5), (0.35, 0.53), 0.48, [
        *[Blob("MA", 0.4, 0.4, 0.01)] * 5, *[Blob("HE", x, y, 0.01) for x in (0.4, 0.6) for y in (0.4, 0.6)] * 5,
        Blob("EX", 0.35, 0.67, 0.01), Blob("SE", 0.5, 0.51, 0.01)], {0, 3}, [(0.2, 0.5)], [(0.7, 0.5), (0.1, 0.5)])
    assert describe(eye) == (
        "right eye. several microaneurysms. many haemorrhages in every quadrant. hard exudates below, near the fovea. "
        "one soft exudate above. beaded veins in two quadrants. shunt vessels. new vessels at the disc. "
        "proliferative retinopathy.")
    assert fine_class(eye) == "right, grade 4, edema risk 2, soft exudates" and set(signs(eye).values()) == {1}
    assert describe(Eye((0, 0), True, (0.3, 0.5), (0.65, 0.5), 0.48)) == "left eye. no retinopathy."


def test_classes_and_signs_are_what_sentences_say():
    columns = {"beaded veins": "beading", "shunt vessels": "shunts"}
    for eye in eyes():
        f = facts(eye)
        assert signs(eye) == {name: int(f[columns.get(name, name.replace(" ", "_"))] is not None)
                              for name in signs(eye)}
        edema = (None, "far from", "near").index(f["fovea"])
        assert fine_class(eye) == (f"{f['side']}, grade {eye.grade}, edema risk {edema}, "
                                   f"{'soft' if f['soft_exudates'] else 'no soft'} exudates")
    assert len({fine_class(eye) for eye in eyes()}) == 40


# ---- in the mirror ----

def in_mirror(eye, left_right, top_bottom):
    """The eye itself, mirrored."""
    def point(p):
        return 1 - p[0] if left_right else p[0], 1 - p[1] if top_bottom else p[1]

    lesions = [replace(b, x=x, y=y) for b in eye.lesions for x, y in [point((b.x, b.y))]]
    return replace(eye, left_disc=eye.left_disc != left_right, disc=point(eye.disc), fovea=point(eye.fovea),
                   lesions=lesions, beaded={q ^ (left_right + 2 * top_bottom) for q in eye.beaded},
                   irma=[point(p) for p in eye.irma], new_vessels=[point(p) for p in eye.new_vessels])


@pytest.mark.parametrize("sides", [(True, False), (False, True), (True, True), (False, False)])
def test_what_is_said_of_a_mirror_image_is_what_is_drawn_in_it(sides):
    changed = 0
    for eye in eyes():
        text, image = describe(eye), in_mirror(eye, *sides)
        assert mirrored(text, *sides) == describe(image)
        assert mirrored(mirrored(text, *sides), *sides) == text
        assert mirrored(fine_class(eye), *sides) == fine_class(image) and signs(eye) == signs(image)
        changed += describe(image) != text
    assert (changed == len(eyes())) == sides[0] and (changed > 0) == any(sides)


@pytest.mark.parametrize("text,left_right,top_bottom", [
    ("Left eye, upper half.", "Right eye, upper half.", "Left eye, lower half."),
    ("ABOVE and below, above", "ABOVE and below, above", "ABOVE and below, below"),
    ("left_eye superior; rightmost, leftover", "right_eye superior; rightmost, leftover",
     "left_eye inferior; rightmost, leftover"),
    ("nasal and temporal, OD", "nasal and temporal, OD", "nasal and temporal, OD"),
    ("left and right, above", "left and right, above", "left and right, below")])
def test_mirror_images_of_other_texts(text, left_right, top_bottom):
    assert (mirrored(text, True, False), mirrored(text, False, True)) == (left_right, top_bottom)
    assert all(mirrored(mirrored(text, *sides), *sides) == text for sides in ((True, False), (False, True)))
    assert mirrored(text, False, False) == text


def test_words_of_other_texts():
    assert words("Mild  non-proliferative; 2 Drüsen (ca. 50%)") == [
        "mild", "non", "-", "proliferative", ";", "2", "drüsen", "(", "ca", ".", "50", "%", ")"]
    assert sentence(["a", "b", ",", "c", ".", "d", "!"]) == "a b, c. d!"


@pytest.mark.parametrize("text", [
    "", "left eye.", "no retinopathy.", "left eye. no retinopathy", "left eye no retinopathy.",
    "Left eye. no retinopathy.", "left eye. no retinopathy. ", "left right eye. no retinopathy.",
    "left eye. left eye. no retinopathy.", "left eye. no retinopathy. mild retinopathy.",
    "left eye. many haemorrhages. few microaneurysms. mild retinopathy.",  # another order
    "left eye. microaneurysms. mild retinopathy.", "left eye. hard exudates above. moderate retinopathy.",
    "left eye. hard exudates below and above, near the fovea. moderate retinopathy.",
    "left eye. one soft exudates. moderate retinopathy.", "left eye. beaded veins in one quadrants. mild retinopathy.",
    "left eye. new vessels at the disc elsewhere. proliferative retinopathy."])
def test_a_broken_sentence_is_not_read(text):
    assert read(text) is None


def test_fine_classes_are_warned_of_where_the_mirror_cannot_help():
    def notes(*names):
        return side_notes(make_tasks(["fine"], {"fine": names}))
    assert notes(*sorted({fine_class(eye) for eye in eyes()})) == notes("left mild", "right mild", "lower") == []
    found, = notes("lefteye", "righteye", "left", "right")
    assert found.startswith("classes lefteye, righteye sound like sides")


def test_words_and_signs_are_warned_of_where_the_mirror_cannot_help():
    def notes(**names):
        return side_notes(make_tasks(list(names), names))
    assert notes(text=["left", "right", "superior", "nasal", "od"], signs=["drusen"]) == []  # OD alone is the disc
    found, = notes(text=["left", "os", "od", "eye"])
    assert found.startswith("words od, os sound like sides")
    found, = notes(signs=["drusen", "left eye"])
    assert found.startswith("signs left eye sound like sides")


def test_mirror_images_of_fine_classes_are_classes_themselves():
    fine = LABELS["fine"]
    assert fine.names(["x", "Left upper"]) == ["Left lower", "Left upper", "Right lower", "Right upper", "x"]
    some = {fine_class(eye) for eye in eyes() if eye.left_disc}
    assert len(some) == 20 and set(fine.names(some)) == {fine_class(eye) for eye in eyes()}
