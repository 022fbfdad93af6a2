"""What is known of each photograph before it is opened: paths and labels."""

from dataclasses import dataclass, field
from pathlib import Path

from retina.datasets.synthetic import LESIONS

HERE = Path(__file__).parents[2]  # the project's folder: data/ and runs/ lie in it
POINTS = ("disc", "fovea")  # centres of the optic disc and of the fovea
GRADES, EDEMA_RISKS = 5, 3
UNKNOWN = 255  # in a mask: whether this kind of lesion is there is not known
LABELS = {"grade": "cls", "edema": "dme", "category": "cls", "masks": "seg", "points": "loc"}  # and their tasks
KINDS = dict(zip(LESIONS, ("microaneurysms", "haemorrhages", "hard exudates", "soft exudates", "optic disc")))
COLOURS = dict(zip(LESIONS, ((86, 180, 233), (213, 94, 0), (0, 158, 115), (204, 121, 167), (240, 228, 66))))


@dataclass(frozen=True)
class Record:
    """Paths and labels of one photograph."""
    name: str  # unique in the data set, e.g. "grading/IDRiD_001"; those of the test part begin with "test/"
    image: Path | None  # None: drawn
    part: str = "train"  # "train", "val" (where the data set says so itself) or "test"
    grade: int | None = None  # diabetic retinopathy, 0..4
    edema: int | None = None  # risk of macular edema, 0..2
    category: int | None = None  # number of its folder, in data sets that are folders of classes
    # kind -> file, or None where the kind was looked for and is not there; a kind that is absent is not known
    masks: dict[str, Path | None] | None = field(default=None, hash=False)
    # POINTS -> (x, y) in pixels of the file; one that is absent is not known
    points: dict[str, tuple[float, float]] | None = field(default=None, hash=False)
    eye: str = ""  # photographs with the same eye stay on one side of every split
    where: str = ""  # the row of a table that it comes from, for messages
    drawing: tuple[int, int] | None = None  # seed and index for synthetic.plan


@dataclass(frozen=True)
class DataSet:
    """All records of all parts, and what the reader has to say."""
    records: list[Record]
    classes: tuple[str, ...] = ()  # names of the categories, where there are any
    notes: tuple[str, ...] = ()
