"""Photographs are decoded once: what preprocess() makes of each is kept below data/cache."""

import functools
import hashlib
import sys
import time
import zipfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from tqdm import tqdm

from retina.datasets import records, synthetic
from retina.datasets.preprocess import Sample, preprocess, to_sample
from retina.datasets.records import LABELS, Record
from retina.files import InputError, RunError, atomic_write, init_worker


CACHE = records.HERE / "data" / "cache"
PREPROCESSING = 6  # stored in every cache file: raise it when preprocess() or what it calls changes what it makes


def files_of(record: Record) -> list[tuple[Path, int, int]]:
    """The files that preprocess() reads, each with its size in bytes and its time of change in ns."""
    paths = [record.image, *filter(None, (record.masks or {}).values())] if record.drawing is None else []
    return [(path, (status := path.stat()).st_size, status.st_mtime_ns) for path in paths]


def cache_path(record: Record, size: int) -> Path:
    """File of the cache for this record: its name changes with every input that preprocess() reads."""
    kinds = sorted(kind for kind, path in (record.masks or {}).items() if path is not None)
    if record.drawing is not None:
        inputs = [record.drawing, hashlib.sha256(Path(synthetic.__file__).read_bytes()).hexdigest()]
    else:
        inputs = [(str(path.resolve()), *rest) for path, *rest in files_of(record)]
    name = hashlib.sha256(repr((size, record.masks is not None, kinds, inputs)).encode()).hexdigest()
    return CACHE / name[:2] / f"{name[2:34]}.npz"


def write_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Write a cache file; no reader ever sees half of one, and of two writers at once the second wins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, lasting=False) as file:  # what a power cut spoils is made anew
        np.savez(file, version=PREPROCESSING, **arrays)


def read_arrays(path: Path, *keys: str) -> list[np.ndarray]:
    """Arrays of a cache file. FileNotFoundError; ValueError: it is damaged or of another version, in words."""
    try:
        with np.load(path) as stored:
            version, *arrays = (stored[key] for key in ("version", *keys))
    except (FileNotFoundError, PermissionError, MemoryError):
        raise
    except Exception as error:  # whatever a damaged file provokes in zipfile, zlib and numpy
        raise ValueError(f"{path} is damaged ({type(error).__name__})") from error
    if version != PREPROCESSING:
        raise ValueError(f"{path} was made by another version")
    return arrays


def intact(path: Path, *keys: str) -> list[np.ndarray] | None:
    """Arrays of a cache file; None, and said, where they are to be made anew: it is damaged, or not there."""
    try:
        return read_arrays(path, *keys)
    except (FileNotFoundError, ValueError) as error:
        print(f"cache: {error}: made anew", file=sys.stderr)
        return None


def fill_cache(record: Record, path: Path, size: int) -> str:
    """Prepare one record and store it; -> what is wrong with its files, "" if nothing."""
    try:
        write_arrays(path, **preprocess(record, size))
        return ""
    except InputError as error:
        return f"{record.where}: {error}" if record.where else str(error)


def cached(record: Record, path: Path, size: int, *keys: str) -> list[np.ndarray]:
    """Arrays of a record from its cache file; made anew, and said, if that was damaged or removed since it was made.

    InputError: made anew, that is, but its photograph cannot be read any more.
    """
    if (arrays := intact(path, *keys)) is not None:
        return arrays
    if problem := fill_cache(record, path, size):
        raise InputError(problem)
    return read_arrays(path, *keys)


def build_cache(records: Sequence[Record], size: int) -> dict[str, str]:
    """Prepare all records that the cache lacks, in parallel; -> {name: what is wrong} for those that cannot be used."""
    todo, spoiled = [], []
    for record, path in ((r, cache_path(r, size)) for r in records):
        try:
            read_arrays(path)
        except (FileNotFoundError, ValueError) as error:
            todo.append((record, path))
            spoiled += [error] * isinstance(error, ValueError)
    if not todo:
        return {}
    if spoiled:
        print(f"cache: {spoiled[0]}{f', and {len(spoiled) - 1} more' * (len(spoiled) > 1)}: made anew", file=sys.stderr)
    for part in CACHE.glob("*/*.part"):  # of a process that was killed
        if time.time() - part.stat().st_mtime > 24 * 3600:
            part.unlink()
    verb = "drawing" if todo[0][0].drawing is not None else "reading"
    try:
        with ProcessPoolExecutor(initializer=init_worker) as pool:
            jobs = pool.map(functools.partial(fill_cache, size=size), *zip(*todo), chunksize=4)
            problems = list(tqdm(jobs, total=len(todo), desc=f"{verb} photographs, once", unit="photo", leave=False,
                                 disable=None))
    except BrokenProcessPool:
        raise RunError("a process that was reading photographs was killed, perhaps for want of memory; what was read "
                       "is kept: start again") from None
    return {r.name: problem for (r, _), problem in zip(todo, problems) if problem}


def want_cache(records: Sequence[Record], size: int) -> list[Path]:
    """Cache files of all records. InputError: the first of them that cannot be used."""
    for problem in build_cache(records, size).values():
        raise InputError(problem)
    return [cache_path(r, size) for r in records]


SAMPLE = "image", "masks", "geometry"  # the arrays of which samples are made


def cached_sample(record: Record, path: Path, size: int) -> Sample:
    """The sample of a record from its cache file; see `cached`."""
    return to_sample(record, dict(zip(SAMPLE, cached(record, path, size, *SAMPLE))))


def fingerprint(records: Sequence[Record], paths: Sequence[Path]) -> str:
    """SHA-256 over names, labels and contents of all samples, but not over where the files lie."""
    digest = hashlib.sha256()
    for r, path in zip(records, paths):
        with zipfile.ZipFile(path) as stored:  # an npz, which has a checksum of each of its arrays
            sums = [stored.getinfo(f"{key}.npy").CRC for key in SAMPLE]
        labels = [(name, LABELS[name].fingerprint(value)) for name, value in sorted(r.labels.items())]
        digest.update(repr((r.name, labels, sums)).encode())
    return digest.hexdigest()


def check_files(files: Sequence[tuple[Path, int, int]]) -> None:
    """InputError: one of the `files` of a record is not the one any more that was there at first; see `files_of`."""
    for path, *before in files:
        try:
            status = path.stat()
            problem = "changed" if [status.st_size, status.st_mtime_ns] != before else ""
        except OSError as error:  # the other errors: a drive that is gone
            problem = "removed" if isinstance(error, FileNotFoundError) else error.strerror
        if problem:
            raise InputError(f"{path}: {problem} while it was in use; expected the file to stay as it was; put it "
                             "back, with its time of change")
