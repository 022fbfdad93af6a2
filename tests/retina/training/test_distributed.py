"""Several processes learn what one would: gradients, streams, scores, and what happens when one of them dies."""

import json
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

import data
import evaluate
import train
from conftest import PROGRAM, ROOT, SMALL_NET, TINY, ended_alike, start
from retina.datasets import readers
from retina.evaluation import metrics
from retina.files import InputError
from retina.training import distributed
from retina.training.distributed import SINGLE_PROCESS, World
from tasks import TASKS, build_net
from train import Config


pytestmark = pytest.mark.usefixtures("few_drawings")

# two steps in float64 with nothing left to chance, then scores: -> FILE_RANK.pt with all gradients and measures
STEP = """
import sys
sys.path.insert(0, sys.argv[1])
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
import torch
import data, model, tasks, train
from train import Config
from retina.datasets import cache, readers
from retina.evaluation import scoring
from retina.files import jsonable
from retina.training import distillation, distributed
torch.randn_like = torch.zeros_like  # the noise of the gates
SMALL_NET
cache.CACHE = Path(sys.argv[2]).parent / "home" / "cache"
readers.DRAWN = {"train": (0, 22)}
found = readers.read_drawn().records[:8]
for i in range(8):  # masks here, points there, some grades: each share of two lacks a task
    masks = None if i % 2 else {k: v for k, v in found[i].masks.items() if i != 6 or k != "MA"}
    found[i] = found[i].with_labels(masks=masks, landmarks=found[i].landmarks if i % 2 else None,
                                    grade=None if i in (1, 2, 4) else found[i].grade,
                                    text=found[i].text if i % 2 else None, fine=None if i % 2 else found[i].fine,
                                    signs=found[i].signs if i in (1, 2) else None)
NAMES = {"text": data.vocabulary(found, [], True)[0], **readers.read_drawn().names(["fine", "signs"])}

def learn(world, options):
    torch.manual_seed(0)
    net, task_list = tasks.build_net(asdict(replace(options, names=NAMES)))
    net.double()
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    with torch.no_grad():  # experts that answer, gates that prefer
        for name, p in net.named_parameters():
            if name.startswith("experts") and p.ndim > 1:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=p.dtype) * 0.1)
    hidden = found if options.labelled == 1 else [replace(r, labels={} if i % 2 else r.labels)
                                                  for i, r in enumerate(found)]
    photographs = data.FundusDataset(hidden, options.image_size)
    empty_targets = data.make_empty_targets(photographs, task_list) if world.size > 1 else {}
    state = train.make_state(net, task_list, options, 10, torch.device("cpu"), world)
    net.train()
    runs = []
    for k in range(len(options.teachers)):
        torch.manual_seed(5 + k)
        runs.append(SimpleNamespace(net=tasks.build_net(asdict(replace(options, names=NAMES)))[0].double()))
    teachers = distillation.Teachers(runs, task_list, options, 10) if runs else None
    share = [photographs[i] for i in range(8)][world.rank::world.size]
    batches = [data.collate(share, task_list, empty_targets=empty_targets) for _ in range(2)]
    losses = [train.train_step(state, batch, task_list, options, world, teachers) for batch in batches]
    return {"losses": losses, "gradients": {n: p.grad for n, p in net.named_parameters() if p.requires_grad},
            "others": {**dict(net.named_buffers()), **state.loss_weights.state_dict()}}

def scored(world):
    torch.manual_seed(0)
    net, task_list = tasks.build_net(asdict(Config(tasks=tuple(tasks.TASKS), names=NAMES)))
    photographs = data.FundusDataset(readers.read_drawn().records, 64)
    loader = data.eval_loader(photographs, task_list, 4, world=world)
    found = scoring.evaluate_split(net, loader, task_list, world=world)
    return found and {"metrics": jsonable(found.metrics()), "names": found.names, "usage": found.usage,
                      "calibration": found.calibrate()}

with distributed.init_world() as world:
    learned = [learn(world, Config(**changed)) for changed in eval(sys.argv[4])]
    torch.save({"learned": learned, "scores": scored(world)}, f"{sys.argv[3]}_{world.rank}.pt")
""".replace("SMALL_NET", SMALL_NET)


# as torchrun, but its processes are forked and need not import torch: python -c FORKED PROCESSES PROGRAM ARGUMENTS
FORKED = """
import sys
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
_, processes, program, *sys.argv[1:] = sys.argv
config, *_ = run.config_from_args(run.parse_args(
    ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", f"--nproc_per_node={processes}", "--start_method=fork", ""]))
try:
    run.elastic_launch(config, exec)(program, {})
except ChildFailedError as error:
    sys.exit(str(error))
"""
# torchrun itself
TORCHRUN = """
import sys
from torch.distributed import run
run.main(["--standalone", f"--nproc_per_node={sys.argv[1]}", "--no_python", sys.executable, "-c", *sys.argv[2:]])
"""


def run(folder: Path, processes: int, program: str, *words, launcher: str = FORKED) -> tuple[int, str, str]:
    """python -c PROGRAM WORDS in several processes; -> its status, output and errors."""
    output, errors = folder / "output", folder / "errors"
    words = (launcher, processes, program, *words) if processes > 1 else (program, *words)
    process = start(*words, output=output, errors=errors)
    try:
        process.join(120)
    finally:  # torchrun ends what it has started
        process.terminate()
    texts = [path.read_text() for path in (output, errors)]
    output.unlink(), errors.unlink()
    return process.exitcode, *texts


# ---- gradients ----

CHANGES = [{}, {"loss_weights": ("uncertainty",), "router": "shared", "moe_at": "decoder"}, {"num_experts": 0},
           {"router": "private", "num_experts": 7, "top_k": 1, "balance_weight": 0.0, "text_decoder": "gru"},
           # two teachers of all tasks; one, and all photographs without labels in one process
           {"teachers": ("a", "b"), "anneal": True},
           {"teachers": ("a",), "labelled": 0.5, "tasks": ("cls", "seg", "fine")}]


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """What one process, and each of two, learned and scored."""
    same = {"tasks": tuple(TASKS), "image_size": 64, "num_experts": 4, "stochastic_depth": 0.0,
            "expert_dropout": 0.0}
    home = tmp_path_factory.mktemp("learned")
    for n in (1, 2):  # the first without torchrun
        status, _, errors = run(home, n, STEP, ROOT, home, home / f"{n}", [same | c for c in CHANGES])
        assert status == 0, errors
    return [torch.load(home / f"{n}.pt", weights_only=True) for n in ("1_0", "2_0", "2_1")]


def test_one_process_with_8_photographs_and_two_with_4_give_the_same_gradient(learned):
    for change, one, two, other in zip(CHANGES, *(found["learned"] for found in learned)):
        assert two["losses"] == other["losses"] and all(
            torch.equal(g, other["gradients"][n]) for n, g in two["gradients"].items())
        for step in (0, 1):
            assert one["losses"][step] == pytest.approx(two["losses"][step], rel=1e-9)
        assert one["gradients"].keys() == two["gradients"].keys()
        groups = defaultdict(list)
        for name in one["gradients"]:
            groups[name.split(".")[0] if name.startswith("e") else name.split(".")[1]].append(name)
        experts = set() if change == {"num_experts": 0} else {"experts"}
        assert groups.keys() == {"encoder", *change.get("tasks", TASKS)} | experts | ({"blocks"} & groups.keys())
        for group, names in groups.items():
            largest = max(float(one["gradients"][n].abs().max()) for n in names)
            apart = max(float((one["gradients"][n] - two["gradients"][n]).abs().max()) for n in names)
            assert apart < 1e-9 * largest, (change, group)
        for name, value in one["others"].items():  # statistics of norms, weights of tasks
            torch.testing.assert_close(value, two["others"][name], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_group_of_one_process_has_the_gradient_of_none(tmp_path, monkeypatch, device):
    """Through DistributedDataParallel, sums over processes and norms over the batch; on a GPU by NCCL."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # it rounds to ten bits
    tasks, gradients = [TASKS["cls"], TASKS["seg"]], []
    options = replace(TINY, expert_dropout=0.0, stochastic_depth=0.0, device=device)
    photographs = data.FundusDataset(readers.read_drawn().records[:6], options.image_size)
    batch = data.collate([photographs[i] for i in range(6)], tasks).to(torch.device(device))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", rank=0, world_size=1,
                            store=dist.FileStore(str(tmp_path / "store"), 1))
    try:
        for world in (SINGLE_PROCESS, World(0, 2)):  # who believes to be one of two takes no shortcut
            torch.manual_seed(0)
            net, _ = build_net(asdict(options))
            for module in net.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
            state = train.make_state(net, tasks, options, 10, torch.device(device), world)
            torch.manual_seed(1)
            losses = train.task_losses(state, batch, tasks, options, world)
            state.loss_weights(losses).backward()
            gradients.append({n: p.grad for n, p in net.named_parameters() if p.grad is not None})
    finally:
        dist.destroy_process_group()
    assert gradients[0].keys() == gradients[1].keys()
    largest = max(float(g.abs().max()) for g in gradients[0].values())
    apart = {n: float((gradients[0][n] - g).abs().max()) / largest for n, g in gradients[1].items()}
    assert max(apart.values()) < 1e-3, sorted(apart.items(), key=lambda item: -item[1])[:5]


# ---- who sees what ----

@pytest.mark.parametrize("batch,size", [(8, 2), (7, 3), (4, 4)])
def test_every_photograph_of_a_step_falls_to_one_process(batch, size):
    found = readers.read_drawn().records
    found = [r.with_labels(masks=r.masks if i % 4 == 0 else None) for i, r in enumerate(found)]
    sampler = data.MultiTaskBatchSampler(found, [TASKS["cls"], TASKS["seg"]], batch, 0, True)
    shares = [list(sampler.range(3, 9, rank, size)) for rank in range(size)]
    for number, step_shares in enumerate(zip(*shares)):
        whole = sampler.step(3 + number)
        assert sorted(i for share in step_shares for i in share) == sorted(whole)
        assert max(map(len, step_shares)) - min(map(len, step_shares)) <= 1


def test_pixels_ranked_in_parts_are_ranked_as_a_whole(monkeypatch):
    """Three accumulators, of which one has begun to count; all pixels in one are the oracle."""
    rng = np.random.default_rng(0)
    pixels = [(rng.random(4000).astype(np.float32), rng.random(4000) < share) for share in (0.1, 0.5, 0.02, 0.0, 0.3)]
    whole = metrics.PRCurveAccumulator(1)
    for probability, truth in pixels:
        whole.add(0, probability, truth)
    for most, counted in ((1 << 23, False), (7000, True)):
        monkeypatch.setattr(metrics.PRCurveAccumulator, "most", most)
        accumulators = [metrics.PRCurveAccumulator(1) for _ in range(3)]
        for k, (probability, truth) in enumerate(pixels):
            accumulators[k % 3 if k < 4 else 0].add(0, probability, truth)
        assert (accumulators[0].counts[0] is not None) == counted and accumulators[1].counts[0] is None
        # one that counts is merged into one that does not
        first, *others = accumulators[::-1] if counted else accumulators
        for other in others:
            first.merge(other)
        assert (first.counts[0] is not None) == counted
        assert first.area(0) == pytest.approx(whole.area(0), abs=1e-6 if counted else 1e-12)


def test_scores_of_two_processes_are_those_of_one(learned):
    one, first, second = (found["scores"] for found in learned)
    assert one == first and second is None and one["metrics"]["seg"]["photographs"] == 22


# ---- a whole run ----

# rank 1 of a run meets its end, or a fault, at step 5
FATAL = PROGRAM.replace("files.run_cli", """
import os, signal
whole = train.train_step
def step(state, batch, tasks, config, world, *teachers):
    if state.step == 5 and world.rank == 1:
        END
    return whole(state, batch, tasks, config, world, *teachers)
train.train_step = step
checkpoint.RunFolder.due = lambda run: run.state.step % 4 == 0
files.run_cli""")
# the same processes resume a run and train another: python -c BOTH ROOT HOME RUN FLAGS
BOTH = PROGRAM.replace("files.run_cli(lambda: train.main(sys.argv[3:]))", """
import contextlib
from retina.training import distributed

def both():
    with distributed.init_world() as world:
        distributed.init_world = lambda: contextlib.nullcontext(world)
        train.main(["--resume", sys.argv[3]])
        train.main(sys.argv[4:])
files.run_cli(both)""")
FLAGS = "--image-size 64 --epochs 2 --batch-size 8".split()


def test_three_processes_train_one_run_and_survive_the_death_of_one(tmp_path, shallow):
    """Three add in an order that two do not have."""
    fatal = FATAL.replace("END", "os.kill(os.getpid(), signal.SIGKILL)")
    status, output, errors = run(tmp_path, 3, fatal, ROOT, tmp_path, *FLAGS, "--name", "killed", launcher=TORCHRUN)
    assert status != 0 and "Signal 9 (SIGKILL)" in errors
    assert errors.count("Traceback") == 1 and "Warning" not in errors  # torchrun's own
    killed = tmp_path / "runs" / "killed"
    assert torch.load(killed / "last.pt", weights_only=True)["state"]["step"] == 4

    status, output, errors = run(tmp_path, 3, BOTH, ROOT, tmp_path, killed, *FLAGS, "--name", "whole")
    assert status == 0, errors
    resumed, output = output.split("best checkpoint: epoch", 1)
    assert resumed.count("| score") == 1 and f"going on with {killed}\n" in resumed
    assert output.count("best checkpoint: epoch") == 1 and output.count("| score") == 2 and "3 processes" in output
    whole = tmp_path / "runs" / "whole"
    lines = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2] and lines[0]["val"]["cls"]["photographs"] == 6
    stored = torch.load(whole / "last.pt", weights_only=True)
    first, second, third = (g["torch"] for g in stored["generators"])
    assert stored["machine"]["processes"] == 3 and not torch.equal(first, second) and not torch.equal(second, third)
    assert evaluate.load_run(whole, torch.device("cpu")).epoch > 0  # by one process
    ended_alike(killed, whole)


@pytest.mark.parametrize("program,flags,reason", [
    (FATAL.replace("END", "raise files.RunError('the reason')"), FLAGS, "error: the reason"),
    (PROGRAM, ["--tasks", "fly"], "error: --tasks fly: no such task")], ids=["in a step", "on the command line"])
def test_a_fault_in_one_process_is_told_and_ends_all(tmp_path, program, flags, reason):
    status, _, errors = run(tmp_path, 2, program, ROOT, tmp_path, *flags)
    assert status != 0 and errors.count(reason) == 1 and errors.count("Traceback") == 1  # torchrun's own


def test_each_process_needs_a_photograph(tmp_path):
    with pytest.raises(InputError, match="--batch-size 2: 3 processes share it; expected at least one photograph for "
                                         "each"):
        train.fit(Config(batch_size=2), tmp_path / "run", world=World(0, 3))


def test_without_torchrun_there_is_one_process(monkeypatch):
    assert distributed.init_world() is SINGLE_PROCESS
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run"), monkeypatch.setenv("WORLD_SIZE", "1")  # torchrun's, for one
    assert distributed.init_world() is SINGLE_PROCESS
    one, x, cuda = SINGLE_PROCESS, torch.ones(2), torch.device("cuda", 1)
    assert one.gather(3) == [3] and one.broadcast(4) == 4 and one.any([False], None) == [False]
    assert one.all_reduce_sum(x) is x and one.device(cuda) == cuda
    with pytest.raises(InputError, match="process 2 of a machine that has 1 GPUs; expected at most one process"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "device_count", lambda: 1)
            World(1, 2, 1).device(torch.device("cuda"))
