"""Photographs are decoded once: what preprocess() makes of each is kept below data/cache."""

import functools
import hashlib
import sys
import time
import zipfile
from collections.abc import Collection, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from retina.datasets import records, synthetic
from retina.datasets.preprocess import Sample, preprocess, to_sample
from retina.datasets.records import LABELS, Record
from retina.files import InputError, RunError, atomic_write, init_worker


CACHE = records.HERE / "data" / "cache"
FEW = 8  # photographs that are read without other processes
CACHE_VERSION = 8  # stored in every cache file: raise it when preprocess(), or what it calls, makes other arrays


def input_files(record: Record) -> list[tuple[Path, int, int]]:
    """The files that preprocess() reads, each with its size in bytes and its time of modification in ns."""
    masks = dict.fromkeys(m.path for m in (record.masks or {}).values() if m is not None)  # one may hold several
    paths = [record.image, *masks] if record.drawing is None else []
    return [(path, (status := path.stat()).st_size, status.st_mtime_ns) for path in paths]


def cache_path(record: Record, size: int) -> Path:
    """The cache file of a record: its name changes with every input that preprocess() reads."""
    lesions = sorted((lesion, str(m.path.resolve()), m.values) for lesion, m in (record.masks or {}).items()
                     if m is not None)
    if record.drawing is not None:
        inputs = [record.drawing, hashlib.sha256(Path(synthetic.__file__).read_bytes()).hexdigest()]
    else:
        inputs = [(str(path.resolve()), *rest) for path, *rest in input_files(record)]
    points = sorted((record.landmarks or {}).items())  # which preprocess() checks
    name = hashlib.sha256(repr((size, record.masks is not None, lesions, points, inputs)).encode()).hexdigest()
    return CACHE / name[:2] / f"{name[2:34]}.npz"


def write_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Write a cache file; no reader ever sees half of one, and of two writers at once the second wins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, lasting=False) as file:  # what a power cut spoils is made anew
        np.savez(file, version=CACHE_VERSION, **arrays)


def read_arrays(path: Path, *keys: str) -> list[np.ndarray]:
    """Arrays of a cache file. FileNotFoundError; ValueError: it is damaged or was made by another version."""
    try:
        with np.load(path) as stored:
            version, *arrays = (stored[key] for key in ("version", *keys))
    except (FileNotFoundError, PermissionError, MemoryError):
        raise
    except Exception as error:  # whatever a damaged file provokes in zipfile, zlib and numpy
        raise ValueError(f"{path} is damaged ({type(error).__name__})") from error
    if version != CACHE_VERSION:
        raise ValueError(f"{path} was made by another version")
    return arrays


def read_or_none(path: Path, *keys: str) -> list[np.ndarray] | None:
    """Arrays of a cache file; None, with a message, if it is damaged or missing: the caller makes it anew."""
    try:
        return read_arrays(path, *keys)
    except (FileNotFoundError, ValueError) as error:
        print(f"cache: {error}: made anew", file=sys.stderr)
        return None


def fill_cache(record: Record, path: Path, size: int) -> str:
    """Preprocess one record and store it; -> what is wrong with its files, "" if nothing."""
    try:
        write_arrays(path, **preprocess(record, size))
        return ""
    except InputError as error:
        return f"{record.where}: {error}" if record.where else str(error)


def cached_arrays(record: Record, path: Path, size: int, *keys: str) -> list[np.ndarray]:
    """Arrays of a record from its cache file, which is made anew, with a message, if it is damaged or missing.

    InputError: the photograph itself cannot be read any more.
    """
    if (arrays := read_or_none(path, *keys)) is not None:
        return arrays
    if problem := fill_cache(record, path, size):
        raise InputError(problem)
    return read_arrays(path, *keys)


def build_cache(records: Sequence[Record], size: int) -> dict[str, str]:
    """Preprocess all records that the cache lacks, in parallel; -> {name: what is wrong} of those that are unusable."""
    todo, damaged = [], []
    for record, path in ((r, cache_path(r, size)) for r in records):
        try:
            read_arrays(path)
        except (FileNotFoundError, ValueError) as error:
            todo.append((record, path))
            damaged += [error] * isinstance(error, ValueError)
    if not todo:
        return {}
    if damaged:
        print(f"cache: {damaged[0]}{f', and {len(damaged) - 1} more' * (len(damaged) > 1)}: made anew", file=sys.stderr)
    for temporary in CACHE.glob("*/*.part"):  # of a process that was killed
        if time.time() - temporary.stat().st_mtime > 24 * 3600:
            temporary.unlink()
    if len(todo) <= FEW:  # done before the processes would have started
        return {r.name: problem for r, path in todo if (problem := fill_cache(r, path, size))}
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


def ensure_cached(records: Sequence[Record], size: int) -> list[Path]:
    """Fill the cache and return the cache file of each record. InputError: a record that cannot be used."""
    for problem in build_cache(records, size).values():
        raise InputError(problem)
    return [cache_path(r, size) for r in records]


SAMPLE = "image", "masks", "geometry"  # the arrays that make a sample


def cached_sample(record: Record, path: Path, size: int) -> Sample:
    """The sample of a record from its cache file; see `cached_arrays`."""
    return to_sample(record, dict(zip(SAMPLE, cached_arrays(record, path, size, *SAMPLE))))


def fingerprint(records: Sequence[Record], paths: Sequence[Path]) -> str:
    """SHA-256 over names, labels and contents of all samples, but not over the paths of their files."""
    digest = hashlib.sha256()
    for r, path in zip(records, paths):
        with zipfile.ZipFile(path) as stored:  # an npz, which has a checksum of each of its arrays
            sums = [stored.getinfo(f"{key}.npy").CRC for key in SAMPLE]
        labels = [(name, LABELS[name].fingerprint(value)) for name, value in sorted(r.labels.items())]
        digest.update(repr((r.name, labels, sums)).encode())
    return digest.hexdigest()


@functools.cache
def file_digest(path: Path, *_: int) -> bytes:
    """SHA-256 of a file; see input_files for the rest of the arguments."""
    return hashlib.sha256(path.read_bytes()).digest()


def content(record: Record, labels: Collection[str]) -> tuple:
    """What a photograph is and what some `labels` say of it, wherever its files lie and whatever its size in a run."""
    kept = {name: value for name, value in sorted(record.labels.items()) if name in labels}
    files = [file_digest(*file) for file in input_files(replace(record, labels=kept))]
    masks = [(lesion, file and file.values) for lesion, file in sorted((kept.get("masks") or {}).items())]
    return record.drawing, files, masks, [(name, LABELS[name].fingerprint(value)) for name, value in kept.items()]


def check_files(files: Sequence[tuple[Path, int, int]]) -> None:
    """InputError: one of the `files` of a record was changed or removed since `input_files` listed them."""
    for path, *before in files:
        try:
            status = path.stat()
            problem = "changed" if [status.st_size, status.st_mtime_ns] != before else ""
        except OSError as error:  # the other errors: a drive that is gone
            problem = "removed" if isinstance(error, FileNotFoundError) else error.strerror
        if problem:
            raise InputError(f"{path}: {problem} while it was in use; expected the file to stay as it was; put it "
                             "back, with its time of change")
