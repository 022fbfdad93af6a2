"""Sentences about photographs: their words, their mirror images, and what a drawn eye's sentence says.

    words, sentence        text -> words, and back
    mirrored               what a text says of the mirror image
    describe, read         a drawn eye -> its sentence -> what that says
    fine_class, signs      the same eye as one of 40 classes, and as seven yes/no signs
"""

import itertools
import re
from collections.abc import Sequence

from retina.datasets.synthetic import SEVERE_HAEMORRHAGES, Eye, quadrant


# ---- any text ----

def words(text: str) -> list[str]:
    """Words in lower case, and punctuation marks."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def sentence(words: Sequence[str]) -> str:
    """Words as a person would write them, without a space before . and ,"""
    return re.sub(r" ([.,;:!?])", r"\1", " ".join(words))


# what a mirror image changes in words; nasal and temporal stay, since the disc moves along
LEFT_RIGHT = {"left": "right", "right": "left"}
TOP_BOTTOM = {a: b for pair in (("above", "below"), ("upper", "lower"), ("superior", "inferior"))
              for a, b in (pair, pair[::-1])}


MIRRORS = tuple(itertools.product((False, True), repeat=2))  # what may have changed places: sides, top and bottom


def mirrored(text: str, left_right: bool, top_bottom: bool) -> str:
    """What `text` says of a photograph whose sides, or whose top and bottom, have changed places.

    "above and below" says the same of both, and stays; "Left" becomes "Right".
    """
    pairs = (LEFT_RIGHT if left_right else {}) | (TOP_BOTTOM if top_bottom else {})

    def other(found: re.Match) -> str:
        word, new = found[0], pairs.get(found[0].lower())
        return word if new is None else new.upper() if word.isupper() else new.title() if word.istitle() else new

    both = "|".join(f"{a} and {b}" for a, b in pairs.items())
    return re.sub(rf"\b(?:{both})\b|[a-z]+" if both else "[a-z]+", other, text, flags=re.IGNORECASE)


# ---- drawn eyes ----

GRADE_WORDS = "no", "mild", "moderate", "severe", "proliferative"
COUNTS = "no", "one", "two", "three", "four"
NUMBER, HALF = "few|several|many", "above and below|above|below"
# each slot of the sentence is a group; one that is left out says that there is nothing of the kind
GRAMMAR = re.compile(
    r"(?P<side>left|right) eye\."
    rf"( (?P<microaneurysms>{NUMBER}) microaneurysms\.)?"
    rf"( (?P<haemorrhages>{NUMBER}) haemorrhages( (?P<every_quadrant>in every quadrant))?\.)?"
    rf"( hard exudates (?P<hard_exudates>{HALF}), (?P<fovea>near|far from) the fovea\.)?"
    rf"( (?P<soft_exudates>one|two|three) soft exudates? (?P<soft_half>{HALF})\.)?"
    r"( beaded veins in (?P<beading>two|three|four) quadrants\.)?"
    r"( (?P<shunts>shunt) vessels\.)?"
    r"( new vessels (?P<new_vessels>at the disc|elsewhere)\.)?"
    rf" (?P<grade>{'|'.join(GRADE_WORDS)}) retinopathy\.")
SLOTS = tuple(GRAMMAR.groupindex)
GRAMMAR_WORDS = {"exudate", ".", ",", *re.findall(r"[a-z]+", re.sub(r"\?P<\w+>", "", GRAMMAR.pattern))}


def facts(eye: Eye) -> dict[str, str | None]:
    """The value of each of SLOTS; None: there is nothing of the kind.

    Above and below are meant of the line from disc to fovea, which turns with the photograph.
    """
    spots = {c: [(b.x, b.y) for b in eye.lesions if b.lesion_class == c] for c in ("MA", "HE", "EX", "SE")}
    (x, y), direction = eye.disc, 1 if eye.left_disc else -1
    along = eye.fovea[0] - x, eye.fovea[1] - y

    def number(n):
        return None if n == 0 else "few" if n < 5 else "several" if n < 10 else "many"

    def half(points):
        below = {direction * (along[0] * (py - y) - along[1] * (px - x)) > 0 for px, py in points}
        return " and ".join(word for word, there in (("above", False), ("below", True)) if there in below) or None

    quadrants = [quadrant(*spot) for spot in spots["HE"]]
    everywhere = min(quadrants.count(q) for q in range(4)) >= SEVERE_HAEMORRHAGES
    return {"side": "left" if eye.left_disc else "right", "microaneurysms": number(len(spots["MA"])),
            "haemorrhages": number(len(spots["HE"])), "every_quadrant": "in every quadrant" if everywhere else None,
            "hard_exudates": half(spots["EX"]), "fovea": (None, "far from", "near")[eye.edema_risk],
            "soft_exudates": COUNTS[len(spots["SE"])] if spots["SE"] else None, "soft_half": half(spots["SE"]),
            "beading": COUNTS[len(eye.beaded)] if eye.beaded else None, "shunts": "shunt" if eye.irma else None,
            "new_vessels": None if not eye.new_vessels else "at the disc" if eye.disc in eye.new_vessels
            else "elsewhere", "grade": GRADE_WORDS[eye.grade]}


def write(f: dict[str, str | None]) -> str:
    """The sentence that says these facts; see GRAMMAR."""
    parts = [f"{f['side']} eye", f["microaneurysms"] and f"{f['microaneurysms']} microaneurysms",
             f["haemorrhages"] and f"{f['haemorrhages']} haemorrhages {f['every_quadrant'] or ''}".rstrip(),
             f["hard_exudates"] and f"hard exudates {f['hard_exudates']}, {f['fovea']} the fovea",
             f["soft_exudates"] and f"{f['soft_exudates']} soft exudate{'s' * (f['soft_exudates'] != 'one')} "
             f"{f['soft_half']}", f["beading"] and f"beaded veins in {f['beading']} quadrants",
             f["shunts"] and "shunt vessels", f["new_vessels"] and f"new vessels {f['new_vessels']}",
             f"{f['grade']} retinopathy"]
    return " ".join(f"{part}." for part in parts if part)


def read(text: str) -> dict[str, str | None] | None:
    """What a sentence says, the value of each of SLOTS; None: it is no sentence of the GRAMMAR."""
    match = GRAMMAR.fullmatch(text)
    return match and match.groupdict()


def describe(eye: Eye) -> str:
    """The sentence about a drawn eye, which says all that its grade depends on."""
    return write(facts(eye))


def fine_class(eye: Eye) -> str:
    """One of 40 classes: side, grade, edema risk, whether there is a soft exudate."""
    soft = any(b.lesion_class == "SE" for b in eye.lesions)
    return (f"{'left' if eye.left_disc else 'right'}, grade {eye.grade}, edema risk {eye.edema_risk}, "
            f"{'' if soft else 'no '}soft exudates")


def signs(eye: Eye) -> dict[str, int]:
    """{sign: 1 where the eye has it, else 0}."""
    classes = {b.lesion_class for b in eye.lesions}
    return {"microaneurysms": int("MA" in classes), "haemorrhages": int("HE" in classes),
            "hard exudates": int("EX" in classes), "soft exudates": int("SE" in classes),
            "beaded veins": int(bool(eye.beaded)), "shunt vessels": int(bool(eye.irma)),
            "new vessels": int(bool(eye.new_vessels))}
