"""Outputs and their run record change together, one writer at a time, whatever kills the process.

A run record describes exactly the files whose digests it holds. So it is removed before one of them
is replaced, and written when all of them stand: a process that is killed in between leaves outputs
without a record, and the next start writes them again.

    with writing(job, [path, rejected]) as output:     # the record is the first path's
        if output.is_needed:
            ...
            output.finish({"rows": 3})

Deleting an output that consists of several files begins with a marker; whoever finds the marker
finishes the deletion.
"""

import glob
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import TEMPORARY, PathLike, sync_folder
from mllmrec.stage.record import (
    Job,
    check_described,
    read_record,
    record_path,
    report_up_to_date,
    write_record,
)

DELETED = ".deleted"  # end of the name of a folder that is being removed


class Writing:
    """A cheap output in progress. is_needed: False if the outputs are those of the job already."""

    def __init__(self, job: Job, outputs: Sequence[PathLike]) -> None:
        self.job, self.outputs = job, [Path(path) for path in outputs]
        self.started = time.monotonic()
        self.is_needed = not _is_up_to_date(job, self.outputs)

    def finish(self, rows: Mapping[str, int], folder: PathLike | None = None, **more: Any) -> None:
        """Write the record, when all outputs are written.

        rows: counts; folder: of a folder that gets its name later (`new_folder`), where it is now;
        more: for the record.
        """
        seconds = time.monotonic() - self.started
        outputs = [folder] if folder else self.outputs
        write_record(outputs[0], self.job, seconds, rows, outputs, **more)


@contextmanager
def writing(
    job: Job, outputs: Sequence[PathLike], optional: Sequence[PathLike] = ()
) -> Iterator[Writing]:
    """The outputs of a stage that runs again as a whole when they are not of `job`.

    outputs: files, or one folder; optional: further files that are not always written. Raises
    InputError if another process is writing them, or if one was changed after it was written.
    """
    first = Path(outputs[0])
    with output_lock(first):
        remove_temporary(first)
        output = Writing(job, outputs)
        if output.is_needed:
            for path in (*outputs, *optional, record_path(first)):
                remove_temporary(path)
            if record_path(first).parent != first:  # that of a folder is in it, and goes with it
                remove_file(record_path(first))
        output.outputs += [Path(path) for path in optional]
        yield output


def _is_up_to_date(job: Job, outputs: Sequence[Path]) -> bool:
    record = read_record(outputs[0])
    if record is None or job.options.overwrite or not all(path.exists() for path in outputs):
        return False
    if record["settings"] != job.settings or record["inputs"] != job.inputs:
        return False
    check_described(outputs[0], record)
    report_up_to_date(outputs[0])
    return True


@contextmanager
def output_lock(output: PathLike, wait: bool = False) -> Iterator[None]:
    """Hold the lock of an output. Raises InputError if another process holds it, unless `wait`.

    The lock file stays; the operating system frees the lock when a process ends, however it ends.
    """
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(output.with_name(f".{output.name}.lock"), timeout=-1 if wait else 0)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(
            f"{output} is being written by another process; wait for it or stop it"
        ) from None
    try:
        yield
    finally:
        lock.release()


def remove_file(path: PathLike) -> None:
    """Remove a file, if it is there, and bring that to the disk."""
    path = Path(path)
    if path.exists():
        path.unlink()
        sync_folder(path.parent)


def remove_folder(folder: PathLike) -> None:
    """Remove a folder such that it is there whole or not at all."""
    folder = Path(folder)
    deleted = _deleted(folder)
    shutil.rmtree(deleted, ignore_errors=True)  # of a process that was killed
    if folder.is_dir():
        os.replace(folder, deleted)
        shutil.rmtree(deleted)


def remove_temporary(output: PathLike) -> None:
    """Remove what killed processes left of an output; only for the holder of its lock."""
    output = Path(output)
    shutil.rmtree(_deleted(output), ignore_errors=True)
    for path in output.parent.glob(f".{glob.escape(output.name)}{TEMPORARY}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def new_folder(folder: PathLike) -> Iterator[Path]:
    """A folder to write to, which takes the place of `folder` when everything is written."""
    folder = Path(folder)
    temporary = folder.with_name(f".{folder.name}{TEMPORARY}folder")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in filter(Path.is_file, temporary.iterdir()):
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        remove_folder(folder)
        os.replace(temporary, folder)
        sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def delete_output(output: PathLike, parts: Sequence[PathLike]) -> None:
    """Delete an output of several files and folders; only for the holder of its lock.

    parts: all that belongs to it, the output itself included. A process that is killed meanwhile
    leaves a marker, and `finish_deletion` does the rest.
    """
    marker = _marker(output)
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.touch()
    sync_folder(marker.parent)
    finish_deletion(output, parts)


def finish_deletion(output: PathLike, parts: Sequence[PathLike]) -> None:
    """Finish a deletion that was interrupted, if there is one."""
    marker = _marker(output)
    if not marker.exists():
        return
    for part in map(Path, parts):
        if part.is_dir() or _deleted(part).exists():
            remove_folder(part)
        else:
            remove_file(part)
    remove_file(marker)


def _deleted(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}{DELETED}")


def _marker(output: PathLike) -> Path:
    output = Path(output)
    return output.with_name(f".{output.name}.deleting")
