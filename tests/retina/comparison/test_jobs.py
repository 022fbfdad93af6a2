"""Runs of a comparison in processes of their own."""

import os
import time
from dataclasses import replace

import pytest
import torch

import baselines
from conftest import TINY, official_tree
from retina.comparison import jobs
from retina.comparison.jobs import Job


pytestmark = pytest.mark.usefixtures("few_drawings", "shallow")
SMALL = replace(TINY, image_size=64, epochs=1, log_gradients=True)


def test_a_process_of_its_own_tells_why_it_failed(tmp_path):
    job = Job("hard", replace(SMALL, data=str(tmp_path / "nowhere")), tmp_path / "run", [])
    assert jobs.start(job, baselines.__file__, 1).wait() == 2 and "nowhere: no such file or folder" in job.failure(2)
    process = jobs.start(job, baselines.__file__, 1)
    process.kill()
    assert "killed by SIGKILL" in job.failure(process.wait())


def test_a_process_of_its_own_ends_when_told_to_and_with_the_main_process(tmp_path):
    job = Job("hard", SMALL, tmp_path / "run", [])
    process = jobs.start(job, baselines.__file__, 1)
    assert os.getpgid(process.pid) == process.pid
    while not (job.folder / "last.pt").exists() and process.poll() is None:
        time.sleep(0.1)
    process.terminate()
    assert process.wait() == 130 and job.failure(130) == "interrupted"
    process = jobs.start(job, baselines.__file__, 1)
    process.stdin.close()  # as it is where the main process is killed
    assert process.wait() == 1 and job.failure(1) == "ended with status 1" and job.measured() is None


def test_two_runs_at_once_come_to_what_they_come_to_single(tmp_path, monkeypatch):
    """In processes of their own, with half of the threads each; what one leaves does not hang on the other."""
    base = replace(SMALL, data=str(official_tree(tmp_path / "IDRiD", test=False)))
    configurations = [c for c in baselines.configurations_for(base.tasks) if c.name in ("hard", "cls_single")]
    left = {}
    for name, number in (("both", 2), ("one", 1)):
        asked = baselines.jobs_for(configurations, base, 1, ["1/5"], tmp_path / name)
        monkeypatch.setattr(torch, "get_num_threads", lambda number=number: number)
        assert jobs.run_all(asked, baselines.__file__, number) == {}
        left[name] = [job.measured() for job in asked]
    for one, other in zip(*left.values()):
        assert one["threads"] == other["threads"] == 1
        assert torch.equal(one["scores"]["stats"]["cls"], other["scores"]["stats"]["cls"])
