"""Runs of a comparison in processes of their own."""

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import baselines
from conftest import ROOT, SMALL_NET, TINY
from retina.comparison import jobs
from retina.comparison.jobs import Job
from retina.datasets import cache


pytestmark = pytest.mark.usefixtures("few_drawings", "shallow")
SMALL = replace(TINY, image_size=64, epochs=1, log_gradients=True)

# baselines.py with few drawings, a small network, another home and the cache of the test
SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
import baselines, model
from retina import files
from retina.datasets import cache, readers, records
{small_net}
records.HERE, cache.CACHE = Path({home!r}), Path({cache!r})
readers.DRAWN = {{"train": (0, 30), "test": (1, 10)}}
files.run_cli(baselines.main)
"""


@pytest.fixture
def script(tmp_path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.format(root=str(ROOT), home=str(tmp_path), cache=str(cache.CACHE), small_net=SMALL_NET))
    return path


def test_a_process_of_its_own_tells_why_it_failed(tmp_path):
    job = Job("hard", replace(SMALL, data=str(tmp_path / "nowhere")), tmp_path / "run", [])
    assert jobs.start(job, baselines.__file__, 1).wait() == 2 and "nowhere: no such file or folder" in job.failure(2)
    process = jobs.start(job, baselines.__file__, 1)
    process.kill()
    assert "killed by SIGKILL" in job.failure(process.wait())


def test_a_process_of_its_own_ends_when_told_to_and_with_the_main_process(tmp_path, script):
    job = Job("hard", replace(SMALL, epochs=200), tmp_path / "run", [])
    process = jobs.start(job, script, 1)
    assert os.getpgid(process.pid) == process.pid
    while not (job.folder / "last.pt").exists() and process.poll() is None:
        time.sleep(0.1)
    process.terminate()
    assert process.wait() == 130 and job.failure(130) == "interrupted"
    process = jobs.start(job, script, 1)
    process.stdin.close()  # as it is where the main process is killed
    assert process.wait() == 1 and job.failure(1) == "ended with status 1" and job.measured() is None


def test_two_runs_at_once_come_to_what_they_come_to_single(tmp_path, monkeypatch, script, shared_tree):
    """In processes of their own, with half of the threads each; what one leaves does not hang on the other.

    The single ones are run here.
    """
    base = replace(SMALL, data=str(shared_tree))
    configurations = [c for c in baselines.configurations_for(base.tasks) if c.name in ("hard", "cls_single")]
    both, single = (baselines.jobs_for(configurations, base, 1, ["1/5"], tmp_path / name) for name in ("both", "one"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for job in single:
            baselines.finish(job)
    finally:
        torch.set_num_threads(threads)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 2)
        assert jobs.run_all(both, script, 2) == {}
    for one, other in zip(*([job.measured() for job in asked] for asked in (both, single)), strict=True):
        assert one["threads"] == other["threads"] == 1
        assert torch.equal(one["scores"]["stats"]["cls"], other["scores"]["stats"]["cls"])


def test_a_student_waits_for_all_of_its_teachers():
    """Of four jobs, listed with the student first: whatever is unfinished or running holds it back."""
    def job(name, *teachers):
        return Job(name, replace(SMALL, teachers=tuple(str(Path(t)) for t in teachers)), Path(name), [])
    student, a, b, other = waiting = [job("student", "a", "b"), job("a"), job("b"), job("other", "elsewhere")]
    assert jobs.first_ready(waiting, []) is a
    assert jobs.first_ready([student, b, other], [a]) is b
    assert jobs.first_ready([student, other], [b]) is other
    assert jobs.first_ready([student], [b]) is None and jobs.first_ready([], [b]) is None
    assert jobs.first_ready([student], [other]) is student
