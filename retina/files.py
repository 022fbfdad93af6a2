"""Safe reading and writing of files, and errors of one line. Imports nothing of ours.

    InputError, RunError, run_cli     errors are one line; exit status 2 for a user's mistake, 1 for a failed run
    home                              where data and runs are kept
    init_worker                       processes that this project starts end with the one that started them
    atomic_write, lock_folder         a file is written whole or not at all; one process at a time trains in a folder
    load_tensors, open_image          reading runs no code, and memory has a limit
"""

import contextlib
import errno
import io
import math
import multiprocessing
import os
import secrets
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from PIL import ExifTags, Image


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


# ---- errors ----

class OneLine(Exception):
    """An error whose text is one line: what, where, what was expected, what to do."""

    def __init__(self, text: str):
        # a loader's worker hands on its whole traceback as the text; what was meant is behind the name
        super().__init__(text.rpartition(f"{__name__}.{type(self).__name__}: ")[2].strip())


class InputError(OneLine, ValueError):
    """A user's mistake."""


class RunError(OneLine, RuntimeError):
    """What ends a run that was set up well: a number that is not finite, lack of memory, a killed process."""


class NotFiniteError(RunError):
    """A network's output is not finite, so nothing is answered."""


def home() -> Path:
    """The folder of data/ and runs/: what the environment variable RETINA_HOME names, else the project's own."""
    return Path(os.path.abspath(os.path.expanduser(os.environ.get("RETINA_HOME") or Path(__file__).parents[1])))


def check_home() -> None:
    """InputError: RETINA_HOME names no folder, or one that cannot be written to."""
    folder = home()
    if os.environ.get("RETINA_HOME") and not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        problem = "a folder without permission to write" if folder.is_dir() else "no such folder"
        raise InputError(f"RETINA_HOME {folder}: {problem}; expected one for data/, runs/ and the cache; make it, or "
                         "unset the variable")


def run_cli(main: Callable[[], None]) -> None:
    """Run a program's main function; what goes wrong becomes one line on stderr and an exit status, no traceback.

    A character of a file's name that a stream cannot print is written as \\u and its number.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        check_home()
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except PermissionError as error:
        print(f"error: {error.filename or 'a file'}: no permission; expected to be allowed to read data and to write "
              "runs, cache and --out; change the permissions of that path", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # whoever reads the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # 128 + SIGPIPE
    except OSError as error:  # a link to nothing, a name too long, a full disk
        what = error.strerror or str(error).strip().rpartition("\n")[2]  # a loader's worker sends its traceback
        print(f"error: {error.filename or 'a file'}: {what}", file=sys.stderr)
        sys.exit(2)


LOST_PIPE = EOFError, ConnectionError  # what a process sees when the one at the other end of a pipe was killed


def init_worker(*worker) -> None:
    """For helper processes: they leave Ctrl-C to the main process, and end when it does, even if it is killed.

    A data loader passes the number of its `worker`; none may end before the main process has saved the run, so SIGTERM
    is ignored. A pool passes nothing, and ends its processes by SIGTERM.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN if worker else signal.SIG_DFL)

    def lost(error_class, error, trace):
        # multiprocessing's thread that hands over tensors calls this when the main process is killed meanwhile
        if not isinstance(error, LOST_PIPE):
            sys.__excepthook__(error_class, error, trace)
    sys.excepthook = lost

    follow_parent()


def follow_parent() -> None:
    """End this process as soon as the one that started it has ended, however that happens."""
    def follow(parent):
        parent.join()
        os._exit(1)
    threading.Thread(target=follow, args=(multiprocessing.parent_process(),), daemon=True).start()


# ---- writing ----

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def atomic_write(path: Path, lasting: bool = True) -> Iterator[BinaryIO]:
    """A file to write to; it replaces `path` when the block ends, so that `path` is never half written.

    A killed process leaves the old file, and a file of another name that ends in .part. With `lasting` this holds for a
    power cut too, at the cost of waiting for the disk. OSError: a full disk and the like.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")  # two processes may write the same file
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            if lasting:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:
            full = "; what was there before is as it was; make room and go on" * (error.errno in FULL)
            raise OSError(error.errno, os.strerror(error.errno) + full, str(path)) from error
        raise


def lock_folder(folder: Path) -> contextlib.AbstractContextManager:
    """Lock a folder until this context, or the process, ends. InputError: another process has locked it."""
    if fcntl is None:
        return contextlib.nullcontext()
    file = open(folder / ".lock", "ab")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise InputError(f"{folder}: another process is training in it; wait for its end, or stop it") from None
        return contextlib.nullcontext()  # a file system without locks
    return file


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with atomic_write(path) as file:
        file.write(text.encode(errors="backslashreplace"))  # names of files need not be text


def jsonable(value):
    """The same value with None in place of nan and infinity, which JSON does not have."""
    if isinstance(value, Mapping):
        return {k: jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- reading ----

def load_tensors(path: Path | str, device: str | torch.device = "cpu"):
    """Load what torch.save wrote, if it is tensors, numbers, strings and containers: no code in the file is executed.

    OSError: no such file, no permission. InputError: it is damaged, or holds something else.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles unlike torch's own, which are refused
            return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # whatever a damaged or foreign file provokes in torch.load
        system = isinstance(error, OSError) and error.errno != errno.EINVAL  # EINVAL: a file that is cut short
        if system or isinstance(error, MemoryError | torch.OutOfMemoryError):
            raise
        raise InputError(f"{path}: damaged, or no file of tensors and plain types, as torch.save writes it "
                         f"({type(error).__name__})") from error


OPENING = threading.Lock()  # filters of warnings belong to the process: two threads would undo them for each other


@contextlib.contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """Open an image file, lazily. InputError: whatever is wrong with it, now or while the caller decodes it."""
    try:
        with OPENING, warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path)
        with image:
            yield image
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise InputError(f"{path}: claims more than {Image.MAX_IMAGE_PIXELS // 10 ** 6} million pixels, more than any "
                         "photograph has; replace the file or remove it and its labels") from None
    except Exception as error:  # damaged files provoke all kinds in the decoders
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path}: not a readable image ({reason}); replace the file or remove it and its "
                         "labels") from None


def channel_bits(image: Image.Image) -> int:
    """Bits of a channel in the file. Of 16 Pillow decodes the upper 8 where there are colours, and does not say so."""
    if image.format == "TIFF":
        return max(image.tag_v2.get(ExifTags.Base.BitsPerSample, (1,)))
    how = image.tile[0].args if image.tile else ""
    if image.format == "PPM" and not isinstance(how, str):
        return how[1].bit_length()  # of its highest value
    return 16 if image.mode[0] in "IF" or image.format == "PNG" and ";16" in how else 8


def page_count(image: Image.Image) -> int:
    """Pages or frames of a file; what cameras put behind a JPEG (MPO) does not count."""
    return 1 if image.format == "MPO" else getattr(image, "n_frames", 1)


SIDEWAYS = (5, 6, 7, 8)  # orientations in which a viewer swaps width and height


def exif_orientation(image: Image.Image) -> int:
    """How the camera was held, of a picture that is not decoded yet; 1 is upright.

    InputError: a PNG says that it was turned, which viewers do not agree to see.
    """
    if image.format == "PNG":  # its getexif() decodes the whole file
        exif = Image.Exif()
        exif.load(image.info.get("exif", b""))
        if (value := exif.get(ExifTags.Base.Orientation, 1)) != 1:
            raise InputError(f"{image.filename}: a PNG with EXIF orientation {value}, which viewers treat unlike each "
                             "other; save it upright")
        return 1
    value = image.getexif().get(ExifTags.Base.Orientation, 1)
    return value if value in range(2, 9) else 1


def orientation(image: Image.Image) -> int:
    """The same, where it is left to do: TIFF is turned by Pillow as it is decoded."""
    return 1 if image.format == "TIFF" else exif_orientation(image)


def shown_size(size: tuple[int, int], turned: int) -> str:
    """Width and height as a viewer shows them, for messages, and that an EXIF orientation has to do with it."""
    width, height = size[::-1] if turned in SIDEWAYS else size
    note = f" (as EXIF orientation {turned} turns it; stored as {width}x{height})" if turned > 1 else ""
    return f"{size[0]}x{size[1]}{note}"


def image_size(path: Path) -> tuple[int, int] | None:
    """(width, height) in pixels, as a viewer shows it; None where the file is no image, which decoding will report."""
    try:
        with open_image(path) as image:
            return image.size[::-1] if orientation(image) in SIDEWAYS else image.size
    except InputError:
        return None
