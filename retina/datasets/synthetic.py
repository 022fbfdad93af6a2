"""Drawn fundus photographs with every label exact: the data on which everything runs before IDRiD is at hand.

    plan(seed, index) -> Eye      what is there: left or right, disc, fovea, lesions. Grades follow from this alone.
    render(eye, size) -> pixels   how a camera sees it: vessels, colour, exposure, blur, noise; and the exact masks

Grades follow the International Clinical Diabetic Retinopathy scale (Wilkinson et al. 2003, Ophthalmology 110:1677),
edema risk IDRiD's rule (hard exudates within one disc diameter of the fovea). Lesions are larger than life and their
counts smaller, so that 128 pixels show them. These are drawings to test and to learn with, not a model of disease.

    python retina/datasets/synthetic.py drawn.png      # a contact sheet to look at
"""

import math
import sys
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw, ImageFilter


# Coordinates are shares of the image's side, x to the right, y down. S is that side in pixels.
LESIONS = ("MA", "HE", "EX", "SE", "OD")  # microaneurysms, haemorrhages, hard and soft exudates; optic disc
CENTRE, FIELD_RADIUS = 0.5, 0.48
DISC_DIAMETER = 0.15
SEVERE_HAEMORRHAGES = 5  # "more than 20 in each quadrant" in a real eye, at the drawn scale


# ---- what is there ----

@dataclass
class Blob:
    """One lesion: an ellipse with a wavy outline."""
    lesion_class: str  # one of LESIONS
    x: float
    y: float
    radius: float
    stretch: float = 1.0
    angle: float = 0.0
    wave: tuple[float, float] = (0.0, 0.0)  # amplitude and phase of the outline's third harmonic


@dataclass
class Stroke:
    """One vessel: points (n, 2) and widths (n,)."""
    points: np.ndarray
    widths: np.ndarray


@dataclass
class Eye:
    """Everything that is known of one drawn photograph."""
    key: tuple[int, int]
    left_disc: bool  # the side of the image on which the disc lies
    disc: tuple[float, float]
    fovea: tuple[float, float]
    half_height: float  # of the visible field; below FIELD_RADIUS it is cut off at top and bottom
    lesions: list[Blob] = field(default_factory=list)
    beaded: set[int] = field(default_factory=set)  # quadrants with venous beading
    irma: list[tuple[float, float]] = field(default_factory=list)  # intraretinal microvascular abnormalities
    new_vessels: list[tuple[float, float]] = field(default_factory=list)

    @property
    def grade(self) -> int:
        """DR grade 0..4: none; microaneurysms only; more; the 4-2-1 rule; new vessels."""
        if self.new_vessels:
            return 4
        haemorrhages = [0] * 4
        for lesion in self.lesions:
            if lesion.lesion_class == "HE":
                haemorrhages[quadrant(lesion.x, lesion.y)] += 1
        if min(haemorrhages) >= SEVERE_HAEMORRHAGES or len(self.beaded) >= 2 or self.irma:
            return 3
        classes = {lesion.lesion_class for lesion in self.lesions}
        return 2 if classes - {"MA"} else len(classes)

    @property
    def edema_risk(self) -> int:
        """Macular-edema risk 0..2: no hard exudates; all further than a disc diameter from the fovea; one within."""
        gaps = [math.hypot(s.x - self.fovea[0], s.y - self.fovea[1]) for s in self.lesions if s.lesion_class == "EX"]
        return 0 if not gaps else 2 if min(gaps) <= DISC_DIAMETER else 1


def quadrant(x: float, y: float) -> int:
    """Quadrant 0..3 of the photograph's field in which a point lies."""
    return int(x > CENTRE) + 2 * int(y > CENTRE)


def plan(seed: int, index: int) -> Eye:
    """Decide what photograph number `index` of the series `seed` shows; the same arguments give the same eye."""
    rng = np.random.default_rng((seed, index))
    left = bool(rng.random() < 0.5)
    direction = 1 if left else -1
    disc = (CENTRE - direction * rng.uniform(0.17, 0.30), CENTRE + rng.uniform(-0.06, 0.06))
    fovea = (disc[0] + direction * rng.uniform(2.3, 2.7) * DISC_DIAMETER, disc[1] + rng.uniform(0.0, 0.06))
    half_height = float(rng.choice([FIELD_RADIUS, rng.uniform(0.38, 0.46)]))
    eye = Eye((seed, index), left, disc, fovea, half_height)
    plan_lesions(eye, rng)
    return eye


def plan_lesions(eye: Eye, rng: np.random.Generator) -> None:
    """Choose how ill the eye is, each level equally often, and place what belongs to that level."""
    level = int(rng.integers(5))
    if level == 0:
        return

    def add(lesion_class, x, y, radius, **shape):
        eye.lesions.append(Blob(lesion_class, x, y, radius, **shape))

    for _ in range(rng.integers(4, 13) if level == 1 else rng.integers(3, 19)):
        add("MA", *place(eye, rng), rng.uniform(0.012, 0.016))
    if level == 1:
        return
    signs = set()
    while level == 3 and not signs:
        signs = {s for s, p in (("haemorrhages", 0.75), ("beading", 0.3), ("irma", 0.4)) if rng.random() < p}
    many = "haemorrhages" in signs or (level == 4 and rng.random() < 0.4)
    if many:  # in each quadrant
        spots = [place(eye, rng, within=q) for q in range(4) for _ in range(rng.integers(SEVERE_HAEMORRHAGES, 9))]
    elif rng.random() < 0.15:  # as many, but not in each quadrant
        spots = [place(eye, rng, within=q) for q in rng.choice(4, 2, replace=False) for _ in range(rng.integers(5, 8))]
    else:
        spots = [place(eye, rng) for _ in range(rng.integers(2, 9))]
    for x, y in spots:
        add("HE", x, y, rng.uniform(0.018, 0.03), stretch=rng.uniform(1.0, 1.8), angle=rng.uniform(0, math.pi),
            wave=(rng.uniform(0.05, 0.3), rng.uniform(0, 6.3)))
    if rng.random() < 0.7:
        for _ in range(rng.integers(1, 4)):
            macular = rng.random() < 0.4
            x, y = place(eye, rng, near=eye.fovea, reach=DISC_DIAMETER) if macular else place(eye, rng)
            for _ in range(rng.integers(3, 13)):
                spot = place(eye, rng, near=(x, y), reach=0.06)
                add("EX", *spot, rng.uniform(0.008, 0.017), stretch=rng.uniform(1, 1.5),
                    angle=rng.uniform(0, math.pi), wave=(0.2, rng.uniform(0, 6.3)))
    if rng.random() < (0.3 if level == 2 else 0.6):
        for _ in range(rng.integers(1, 4)):
            add("SE", *place(eye, rng), rng.uniform(0.025, 0.042), stretch=rng.uniform(1, 1.5),
                angle=rng.uniform(0, math.pi), wave=(0.12, rng.uniform(0, 6.3)))
    if "beading" in signs:
        eye.beaded = {int(q) for q in rng.choice(4, rng.integers(2, 5), replace=False)}
    if "irma" in signs:
        eye.irma = [place(eye, rng) for _ in range(rng.integers(2, 5))]
    if level == 4:
        eye.new_vessels = [eye.disc if rng.random() < 0.3 else place(eye, rng) for _ in range(rng.integers(2, 5))]


def place(eye: Eye, rng: np.random.Generator, within: int | None = None, near: tuple[float, float] = (CENTRE, CENTRE),
          reach: float = 0.42) -> tuple[float, float]:
    """A visible point off the disc, less than `reach` from `near`, in quadrant `within` if one is named."""
    while True:
        angle, away = rng.uniform(0, 2 * math.pi), math.sqrt(rng.random())
        x, y = near[0] + reach * away * math.cos(angle), near[1] + reach * away * math.sin(angle)
        if math.hypot(x - eye.disc[0], y - eye.disc[1]) > 0.7 * DISC_DIAMETER and \
                math.hypot(x - CENTRE, y - CENTRE) < 0.43 and abs(y - CENTRE) < eye.half_height - 0.04 and \
                within in (None, quadrant(x, y)):
            return x, y


def grow_vessels(eye: Eye) -> list[Stroke]:
    """Two arcades around the macula and two bundles to the nasal side, each an artery and a vein with branches."""
    rng = np.random.default_rng((*eye.key, 2))
    direction = 1 if eye.left_disc else -1
    vessels = []

    def grow(x, y, heading, bend, width, length, depth):
        step = 0.018
        n = max(4, int(length / step))
        headings = heading + bend * step * np.arange(n) + np.cumsum(rng.normal(0, 0.09, n))
        xs = x + direction * step * np.concatenate([[0], np.cumsum(np.cos(headings[:-1]))])
        ys = y + step * np.concatenate([[0], np.cumsum(np.sin(headings[:-1]))])
        widths = width * np.linspace(1, 0.45, n)
        vessels.append(Stroke(np.stack([xs, ys], 1), widths))
        if depth:
            for i in range(3 + int(rng.integers(3)), n - 2, 5 + int(rng.integers(3))):
                turn = rng.choice([-1, 1]) * rng.uniform(0.5, 1.1)
                grow(xs[i], ys[i], headings[i] + turn, rng.uniform(-2, 2), widths[i] * 0.65,
                     length * rng.uniform(0.25, 0.5), depth - 1)

    for up in (-1, 1):
        for start, bend, length in ((1.35, -2.6, 0.85), (2.3, 0.4, 0.4)):  # temporal arcade, nasal bundle
            for width in (0.016, 0.011):  # vein, artery
                grow(*eye.disc, up * (start + rng.normal(0, 0.12)), up * (bend + rng.normal(0, 0.35)),
                     width * rng.uniform(0.85, 1.15), length, 2 if width > 0.012 else 1)
    for stroke in vessels:  # venous beading: wide vessels swell and narrow like a string of pearls
        if stroke.widths[0] > 0.0125:
            beads = np.array([quadrant(*p) in eye.beaded for p in stroke.points])
            stroke.widths = stroke.widths * np.where(beads, 1 + 0.9 * np.sin(2.1 * np.arange(len(beads))), 1)
    return vessels


# ---- how a camera sees it ----

def render(eye: Eye, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Photograph `eye` at S = `size` pixels: image (S, S, 3) uint8 RGB and masks (5, S, S) bool in LESIONS' order."""
    rng = np.random.default_rng((*eye.key, 1))  # the camera's own luck
    cover = {lesion_class: np.zeros((size, size), np.float32) for lesion_class in LESIONS}
    cover["OD"] = blob(np.zeros((size, size), np.float32),
                       Blob("OD", *eye.disc, DISC_DIAMETER / 2, 1.08, math.pi / 2, (0.02, 1.0)), 0.012 * size)
    for lesion in eye.lesions:
        blob(cover[lesion.lesion_class], lesion, size * (0.03 if lesion.lesion_class == "SE" else 0.004) + 0.6)
    masks = np.stack([cover[lesion_class] >= 0.5 for lesion_class in LESIONS])
    image = paint(eye, size, cover, rng)
    return expose(image, eye, size, rng), masks


def blob(layer: np.ndarray, b: Blob, edge: float) -> np.ndarray:
    """Raise `layer` (S, S), in place, to the lesion's cover: 1 inside, 0 outside, 0.5 on its outline; `edge` pixels."""
    size = len(layer)
    x, y, r = b.x * size - 0.5, b.y * size - 0.5, b.radius * size
    reach = r * b.stretch * (1 + b.wave[0]) + edge
    x0, x1, y0, y1 = (int(np.clip(v, 0, size)) for v in (x - reach, x + reach + 2, y - reach, y + reach + 2))
    dx, dy = np.meshgrid(np.arange(x0, x1) - x, np.arange(y0, y1) - y)
    cos, sin = math.cos(b.angle), math.sin(b.angle)
    u, v = (cos * dx + sin * dy) / b.stretch, cos * dy - sin * dx
    outline = r if b.wave[0] == 0 else r * (1 + b.wave[0] * np.cos(3 * np.arctan2(v, u) + b.wave[1]))
    window = layer[y0:y1, x0:x1]
    np.maximum(window, np.clip((outline - np.hypot(u, v)) / edge + 0.5, 0, 1), out=window)
    return layer


def paint(eye: Eye, size: int, cover: dict, rng: np.random.Generator) -> np.ndarray:
    """The retina in linear colours: (3, S, S) float32 in 0..1, before the camera."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    texture = smooth_noise(rng, size, 9) * np.float32(0.10) + smooth_noise(rng, size, 40) * np.float32(0.05)
    far = (axis - CENTRE)[None] ** 2 + (axis - CENTRE)[:, None] ** 2
    light = (1.05 - np.float32(rng.uniform(0.8, 2.2)) * far) * (1 + texture)
    fovea = np.exp(-((axis - eye.fovea[0])[None] ** 2 + (axis - eye.fovea[1])[:, None] ** 2) / (2 * 0.045 ** 2))
    light = light * (1 - np.float32(rng.uniform(0.2, 0.4)) * fovea)
    base = (0.78, rng.uniform(0.32, 0.46), rng.uniform(0.12, 0.24))
    image = np.stack([light * np.float32(c) for c in base])

    def mix(layer, colour, strength):  # image <- image + layer * (colour - image)
        if layer.any():
            for channel, c in zip(image, colour):
                channel += np.float32(strength) * layer * (np.float32(c) * light - channel)

    def absorb(layer, shares):
        for channel, share in zip(image, shares):
            channel *= 1 - np.float32(share) * layer

    mix(cover["OD"], (0.98, rng.uniform(0.75, 0.85), 0.5), 0.85)
    vessels, fresh = strokes(eye, size, rng)
    mix(cover["SE"], (0.95, 0.84, 0.62), rng.uniform(0.55, 0.75))
    absorb(vessels, (0.35, 0.55, 0.45))
    absorb(cover["HE"], (0.45, 0.75, 0.6))
    absorb(cover["MA"], (0.4, 0.7, 0.6))
    mix(cover["EX"], (1.0, 0.92, 0.45), rng.uniform(0.75, 0.95))
    mix(fresh, (0.75, 0.10, 0.08), 0.8)
    return image


def strokes(eye: Eye, size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Cover (S, S) of ordinary vessels (with beading and IRMA), and of new vessels; drawn large, then reduced."""
    zoom = max(1, round(512 / size))
    layers = []
    for tangles, reach, coils in ((eye.irma, 0.03, 2), (eye.new_vessels, 0.08, 12)):
        canvas = Image.new("L", (size * zoom, size * zoom))
        pen, scale = ImageDraw.Draw(canvas), size * zoom
        for stroke in (grow_vessels(eye) if not layers else []):
            for a, b, width in zip(stroke.points[:-1] * scale, stroke.points[1:] * scale, stroke.widths * scale):
                pen.line([*a, *b], fill=255, width=max(1, round(width)))
        for x, y in tangles:
            for _ in range(coils):  # a curl: a walk whose heading turns all the time
                heading = rng.uniform(0, 6.3) + np.cumsum(rng.normal(0.5 * rng.choice([-1, 1]), 0.5, 14))
                points = np.stack([np.cumsum(np.cos(heading)), np.sin(heading).cumsum()], 1) * reach * 0.35 + (x, y)
                pen.line([tuple(p) for p in points * scale], fill=255, width=max(1, round(0.008 * scale)))
        layers.append(np.asarray(canvas.reduce(zoom) if zoom > 1 else canvas, np.float32) / 255)
    return layers[0], layers[1]


def expose(image: np.ndarray, eye: Eye, size: int, rng: np.random.Generator) -> np.ndarray:
    """Colour cast, exposure, blur, noise, the edge of the field of view: (3, S, S) float -> (S, S, 3) uint8."""
    gain = 255 * rng.uniform(0.88, 1.12, (3, 1, 1)).astype(np.float32) * np.float32(rng.uniform(0.75, 1.2))
    image = np.minimum(np.clip(image, 0, 1) ** np.float32(rng.uniform(0.8, 1.25)) * gain, 255).astype(np.uint8)
    picture = Image.merge("RGB", [Image.fromarray(channel) for channel in image])
    blur = rng.uniform(0, 0.005) * size
    if blur > 0.3:
        picture = picture.filter(ImageFilter.GaussianBlur(blur))
    noise = np.float32(rng.uniform(1, 5)) * rng.standard_normal((size, size, 1), np.float32)
    image = np.asarray(picture, np.float32) + noise
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size - CENTRE
    away = np.hypot(axis[None], axis[:, None])
    inside = np.clip((FIELD_RADIUS - away) * size + 0.5, 0, 1)
    inside = inside * (np.abs(axis) < eye.half_height)[:, None]
    return np.clip(image * inside[..., None], 0, 255).astype(np.uint8)


def smooth_noise(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """Clouds (S, S) of unit variance at the grid points, `cells` of them along a side."""
    grid = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
    return np.asarray(grid.resize((size, size), Image.BICUBIC))


def main(path: str) -> None:
    """Write a contact sheet of 24 drawn photographs."""
    sheet = Image.new("RGB", (6 * 256, 4 * 256))
    for i in range(24):
        sheet.paste(Image.fromarray(render(plan(0, i), 256)[0]), (i % 6 * 256, i // 6 * 256))
    sheet.save(path)


if __name__ == "__main__":
    main(*sys.argv[1:2] or ["drawn.png"])
