"""The one error that a user of this repository is meant to see, and how a script reports faults.

Stage scripts import this module first: from then on Ctrl-C ends a script with one line, also while
the libraries are still being imported.
"""

import errno
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import NoReturn

RESUME = "the same command resumes"
REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space of your quota",
    errno.EROFS: "make it writable, or name another folder",
    errno.EACCES: "make it accessible, or name another folder",
    errno.EPERM: "make it accessible, or name another folder",
    errno.EISDIR: "a folder is where a file belongs; move it away",
    errno.ENOTDIR: "a file is where a folder belongs; move it away",
    errno.EEXIST: "a file is where a folder belongs; move it away",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}
OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "Cannot allocate memory",
    "DataLoader worker",  # that was killed: by the kernel, for its memory
)
CANNOT_WRITE = ("No space left on device", "PytorchStreamWriter failed")


class InputError(Exception):
    """Bad input or a bad option. The message is one sentence that names file, line and remedy."""


class Terminated(BaseException):
    """SIGTERM, as schedulers send it before they kill a job."""


def run_main(main: Callable[[], object]) -> None:
    """Call `main()`; a fault of input, machine or operator becomes one line on stderr.

    Exit code 1: bad input, a full disk, a lack of memory; 130: Ctrl-C; 143: SIGTERM. An error that
    is none of these is a mistake in this repository: its traceback is printed.
    """
    signal.signal(signal.SIGTERM, _terminate)
    try:
        main()
        sys.stdout.flush()
    except InputError as error:
        _fail(f"error: {error}")
    except KeyboardInterrupt:
        _fail(f"interrupted; {RESUME}", 130)
    except Terminated:
        _fail(f"terminated; {RESUME}", 143)
    except BrokenPipeError:  # e.g. `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _fail(f"error: nobody reads the output any more; {RESUME}")
    except Exception as error:
        fault = machine_fault(error)
        if fault is None:
            raise
        _fail(f"error: {fault}; {RESUME}")


def machine_fault(error: Exception) -> str | None:
    """What the machine lacks, in one sentence with the remedy; None for an error of another kind.

    Libraries that are not written in Python say so by the text of an error of their own.
    """
    if isinstance(error, OSError):
        return _file_fault(error)
    text = str(error)
    out_of_memory = any(part in text for part in OUT_OF_MEMORY)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        out_of_memory = True
    if out_of_memory:
        return f"out of memory ({_first_line(error)}); free some, or lower the batch size"
    if any(part in text for part in CANNOT_WRITE):
        return f"a file cannot be written ({_first_line(error)}); free some space"
    return None


def _file_fault(error: OSError) -> str:
    name = error.filename2 or error.filename
    where = f"{os.fsdecode(name)}: " if isinstance(name, str | bytes) else ""
    remedy = REMEDIES.get(error.errno or 0)
    reason = error.strerror or _first_line(error) or type(error).__name__
    return f"{where}{reason}" + (f"; {remedy}" if remedy else "")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _fail(message: str, code: int = 1) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(code)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


def _excepthook(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    if issubclass(kind, KeyboardInterrupt):  # python then exits with 130 by itself
        print(f"interrupted; {RESUME}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _excepthook
