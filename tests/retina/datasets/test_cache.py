"""Photographs are decoded once, and again when their files have changed."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
from retina.datasets import cache, readers, synthetic
from retina.datasets.readers import read_idrid
from retina.datasets.records import Record


def training_part(root: Path) -> list[Record]:
    return [r for r in read_idrid(root).records if r.split == "train"]


def drawn(number: int) -> list[Record]:
    return [r for r in readers.read_drawn().records if r.split == "test"][:number]


# ---- cache ----

def test_cache_is_used_and_follows_the_file(tree, monkeypatch):
    found = training_part(tree)
    first = data.FundusDataset(found, 64)
    calls = []
    monkeypatch.setattr(cache, "fill_cache", lambda record, path, size: calls.append(record))
    monkeypatch.setattr(cache, "ProcessPoolExecutor", InProcess)
    data.FundusDataset(found, 64)
    assert not calls
    assert first[0].image.shape == (3, 64, 64)
    path = found[0].image
    Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
    cache.build_cache(found, 64)
    assert [r.name for r in calls] == [found[0].name]
    assert cache.cache_path(found[1], 64) != cache.cache_path(found[1], 96)


class InProcess:
    """Stands in for a process pool, so that what is patched here is what runs."""
    def __init__(self, **_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def map(self, f, *items, chunksize):
        return map(f, *items)


def test_masks_survive_the_cache_bit_for_bit():
    found = drawn(4)
    photographs = data.FundusDataset(found, 64)
    for i, record in enumerate(found):
        image, masks = synthetic.render(synthetic.plan(*record.drawing), 64)
        sample = photographs[i]
        assert torch.equal(sample.masks, torch.from_numpy(masks).to(torch.uint8))
        assert torch.equal(sample.image, torch.from_numpy(image).permute(2, 0, 1))
        assert (sample.grade, sample.edema_risk) == (record.grade, record.edema_risk)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_data_set(tmp_path):
    """5000 photographs on disk, of mixed sizes: what is resident after the first 1000 is so after the last."""
    sizes = np.random.default_rng(0).integers(24, 120, (50, 2))
    for i, (width, height) in enumerate(sizes):
        noise = np.random.default_rng(i).integers(0, 255, (height, width, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{i}.jpg")
    for i in range(50, 5000):
        os.link(tmp_path / f"{i % 50}.jpg", tmp_path / f"{i}.jpg")
    code = """
import os, re, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import data
from retina.datasets import cache, records
cache.CACHE = Path(sys.argv[2]) / "cache"
def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
found = [records.Record(str(i), Path(sys.argv[2]) / f"{i}.jpg") for i in range(5000)]
# equal pixels have equal cache files, so that 50 photographs are decoded
for i, path in enumerate(data.FundusDataset(found[:50], 64).paths):
    for record in found[i + 50::50]:
        there = cache.cache_path(record, 64)
        there.parent.mkdir(exist_ok=True)
        os.link(path, there)
photographs, seen = data.FundusDataset(found, 64), []
for i in range(5000):
    photographs[i]
    if i + 1 in (1000, 5000):
        seen.append(resident())
print(*seen, sum(p.stat().st_size for p in photographs.paths) // 1024)
"""
    result = subprocess.run([sys.executable, "-c", code, Path(data.__file__).parent, tmp_path], capture_output=True,
                            text=True)
    assert result.returncode == 0, result.stderr
    early, late, cached = map(int, result.stdout.split())  # KiB
    assert late - early < 10 * 1024 < cached / 5
