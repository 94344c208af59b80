"""How a stage script starts and ends: faults become one line, with an exit code.

Stage scripts import this module before all others: from then on Ctrl-C ends a script with one line,
also while the libraries are still being imported, and threads of torch that wait soon leave their
core to others (`set_thread_defaults`). These are the only side effects of an import here.
"""

import io
import logging
import math
import os
import signal
import sys
import warnings
from collections.abc import Callable, MutableMapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn

from mllmrec.stage.errors import InputError, UsageError, machine_fault

SPINS = "10000"  # turns of a waiting thread before it sleeps; GNU OpenMP's default: 300,000
LOG_LEVEL = "MLLMREC_LOG_LEVEL"  # environment variable
RESUME = "the same command resumes"


class Terminated(BaseException):
    """SIGTERM, as schedulers send it before they kill a job."""


def run_main(main: Callable[[], object]) -> None:
    """Call `main()`; a fault of input, machine or operator becomes one line on stderr.

    Exit code 1: bad input, a full disk, a lack of memory; 2: a wrong command line; 130: Ctrl-C;
    143: SIGTERM. An error that is none of these is a mistake in this repository: its traceback is
    printed.
    """
    signal.signal(signal.SIGTERM, _terminate)
    try:
        if sys.stdout is None or sys.stderr is None:  # the next file that is opened would be it
            raise UsageError("stdout or stderr is closed; send it to a file, or to /dev/null")
        set_up_logging(os.environ.get(LOG_LEVEL, "INFO"))
        # Line by line also into a file, so that results stand among the messages of their stage.
        # What the encoding lacks is escaped, as Python does it on stderr.
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
        main()
        sys.stdout.flush()
    except InputError as error:
        _fail(f"error: {error}", 2 if isinstance(error, UsageError) else 1)
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


def set_up_logging(level: str) -> None:
    """Messages of this library on stderr, from this level on. Raises UsageError for another one.

    What a stage script prints as its result goes to stdout; other libraries keep their settings,
    but torch does not repeat for each loader that --workers are more than the cores, and
    bitsandbytes does not warn of a kernel for 4-bit products on a CPU that it does without.
    """
    warnings.filterwarnings("ignore", "This DataLoader will create")
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    if level not in logging.getLevelNamesMapping():
        raise UsageError(f"{LOG_LEVEL}={level}: choose DEBUG, INFO, WARNING or ERROR")
    logger = logging.getLogger("mllmrec")
    logger.setLevel(level)
    if not logger.handlers:
        logger.addHandler(_StderrHandler())


class _StderrHandler(logging.Handler):
    """A line on what sys.stderr is at that moment; from warnings on with the name of the level."""

    def emit(self, record: logging.LogRecord) -> None:
        level = f"{record.levelname}: " if record.levelno >= logging.WARNING else ""
        _write_line(f"{level}{record.getMessage()}")


def _write_line(line: str) -> None:
    bars = sys.modules.get("tqdm")
    if bars is None:
        print(line, file=sys.stderr, flush=True)
    else:  # on a line of its own, not behind an unfinished progress bar
        bars.tqdm.write(line, file=sys.stderr)


def _fail(message: str, code: int = 1) -> NoReturn:
    _write_line(message)
    sys.exit(code)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


def _excepthook(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    if issubclass(kind, KeyboardInterrupt):  # a shell then sees the exit code 130
        print(f"interrupted; {RESUME}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def cpu_quota(folder: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Cores that the control group of this process (a container, a job) may use; None: no limit."""
    try:
        quota, period = (folder / "cpu.max").read_text().split()  # version 2
    except (OSError, ValueError):
        try:
            quota, period = (
                (folder / f"cpu/cpu.cfs_{name}_us").read_text() for name in ("quota", "period")
            )
        except OSError:
            return None
    try:
        cores = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):  # "max"
        return None
    return cores if cores > 0 else None


def set_thread_defaults(environment: MutableMapping[str, str], quota: float | None) -> None:
    """Environment variables of OpenMP, which torch reads when it is imported; yours win.

    Waiting threads soon sleep instead of spinning: with other processes on the same cores a
    training step of the sample took many times as long. They do not sleep at once, which would
    make it twice as long on idle cores. No more threads than the quota has cores.
    """
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", SPINS)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if quota is not None and math.ceil(quota) < (cores or 1):
        environment.setdefault("OMP_NUM_THREADS", str(math.ceil(quota)))


sys.excepthook = _excepthook
set_thread_defaults(os.environ, cpu_quota())
