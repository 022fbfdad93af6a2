"""Several processes learn what one would: gradients, streams, scores, and what happens when one of them dies."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import evaluate
import metrics
import records
from conftest import ROOT
from parallel import ALONE, Group
from tasks import TASKS
from test_train import PROGRAM, TINY, few_drawings  # noqa: F401
from train import Trainer

# two steps in float64 with nothing left to chance, in as many processes as torchrun says: -> FILE with all gradients
STEP = """
import sys
sys.path.insert(0, sys.argv[1])
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path
import torch
import data, evaluate, parallel, records, train
from flags import Options
torch.randn_like = torch.zeros_like  # the noise of the gates
data.CACHE = Path(sys.argv[2])
found = records.read_drawn().records[:8]
for i in range(8):  # masks here, points there, two kinds of grade: each share of two lacks a task
    masks = None if i % 2 else {k: v for k, v in found[i].masks.items() if i != 6 or k != "MA"}
    found[i] = replace(found[i], masks=masks, points=found[i].points if i % 2 else None,
                       grade=None if i in (1, 2, 4) else found[i].grade)

def learn(group, options):
    torch.manual_seed(0)
    net, tasks = evaluate.build_net(asdict(options))
    net.double()
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    with torch.no_grad():  # experts that answer, gates that prefer
        for name, p in net.named_parameters():
            if name.startswith("experts") and p.ndim > 1:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=p.dtype) * 0.1)
    photographs = data.Photographs(found, options.size)
    blanks = data.blanks(photographs, tasks) if group.size > 1 else {}
    trainer = train.Trainer(net, tasks, options, 10, torch.device("cpu"), group, blanks)
    net.train()
    mine = [photographs[i, None] for i in range(8)][group.rank::group.size]
    losses = [trainer.step(data.collate(mine, tasks)) for _ in range(2)]
    return {"losses": losses, "gradients": {n: p.grad for n, p in net.named_parameters() if p.requires_grad},
            "others": {**dict(net.named_buffers()), **trainer.weigh.state_dict()}}

with parallel.join() as group:
    learned = [learn(group, Options(**changed)) for changed in eval(sys.argv[4])]
    if group.rank == 0:
        torch.save(learned, sys.argv[3])
"""


def torchrun(processes: int, *arguments, **how) -> subprocess.Popen:
    """python -c PROGRAM ARGUMENTS in several processes; torchrun itself takes files and modules only."""
    program, *arguments = map(str, arguments)
    file = Path(arguments[1]) / f"program_{abs(hash(program))}.py"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(program)
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone",
                             f"--nproc_per_node={processes}", file, *arguments], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, start_new_session=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, **how)


def run(processes: int, *arguments) -> tuple[int, str, str]:
    process = torchrun(processes, *arguments)
    output, errors = process.communicate(timeout=240)
    return process.returncode, output, errors


# ---- gradients ----

def test_one_process_with_8_photographs_and_two_with_4_give_the_same_gradient(tmp_path):
    same = {"tasks": ("cls", "dme", "seg", "loc"), "size": 64, "experts": 4, "stochastic_depth": 0.0,
            "expert_dropout": 0.0}
    changes = [{}, {"loss_weights": ("uncertainty",), "router": "shared"}, {"experts_at": "decoder"}, {"experts": 0},
               {"router": "private", "chosen": 1, "balance": 0.0}]
    for processes in (1, 2):
        status, _, errors = run(processes, STEP, ROOT, tmp_path / "cache", tmp_path / f"{processes}.pt",
                                [same | c for c in changes])
        assert status == 0, errors
    for change, one, two in zip(changes, *(torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in (1, 2))):
        for step in (0, 1):
            assert one["losses"][step] == pytest.approx(two["losses"][step], rel=1e-9)
        assert one["gradients"].keys() == two["gradients"].keys()
        parts = defaultdict(list)
        for name in one["gradients"]:
            parts[name.split(".")[0] if name.startswith("e") else name.split(".")[1]].append(name)
        assert parts.keys() == {"encoder", "cls", "dme", "seg", "loc"} | ({"experts"} if change != {"experts": 0} else
                                                                         set()) | ({"blocks"} & parts.keys())
        for part, names in parts.items():
            largest = max(float(one["gradients"][n].abs().max()) for n in names)
            apart = max(float((one["gradients"][n] - two["gradients"][n]).abs().max()) for n in names)
            assert apart < 1e-9 * largest, (change, part)
        for name, value in one["others"].items():  # statistics of norms, weights of tasks
            torch.testing.assert_close(value, two["others"][name], rtol=1e-7, atol=1e-9)
