"""What a training has left on disk: a finished adapter, or checkpoints to resume from."""

import logging
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import read_json, write_json
from mllmrec.stage.record import (
    Job,
    check_described,
    named_digests,
    process_rank,
    read_record,
    read_state,
    record_path,
    report_up_to_date,
    world_size,
)
from mllmrec.stage.output import (
    delete_output,
    finish_deletion,
    output_lock,
    remove_file,
    remove_folder,
    remove_temporary,
)

logger = logging.getLogger(__name__)

DIGESTS = "digests.json"  # of a checkpoint's files, written last
TRAINING_FILES = ("training_log.jsonl", "training_curve.png", "training.rejected.jsonl")


@contextmanager
def training_lock(adapter: Path) -> Iterator[None]:
    """Hold the lock of the adapter while it is trained; of several processes the first holds it.

    Raises InputError if another training holds it.
    """
    if process_rank() > 0:
        yield
        return
    with output_lock(adapter):
        for name in ("adapter", *TRAINING_FILES):
            remove_temporary(adapter.with_name(name))
        remove_temporary(adapter.parent / "checkpoints" / "state.json")
        yield


def is_trained(adapter: Path, job: Job) -> bool:
    """True, with a message, if the adapter is of this job.

    Raises InputError if it, or a checkpoint, is of another job. With `overwrite` both are deleted.
    """
    with output_lock(adapter.parent / "checkpoints", wait=True):  # one of several processes
        return _is_trained(adapter, job)


def _is_trained(adapter: Path, job: Job) -> bool:
    checkpoints = adapter.parent / "checkpoints"
    belonging = (adapter, checkpoints, *map(adapter.with_name, TRAINING_FILES))
    finish_deletion(adapter, belonging)
    overwrite = job.options.overwrite
    if overwrite and world_size() > 1:
        raise InputError(
            f"--overwrite cannot be used with several processes; delete {adapter} and "
            f"{checkpoints} "
            "first"
        )
    if overwrite:
        delete_output(adapter, belonging)
    record = read_record(adapter)
    job.check_same(adapter, (record,))
    if record is not None:
        check_described(adapter, record)
        report_up_to_date(adapter)
        return True
    if adapter.exists():
        raise InputError(
            f"{adapter} has no {record_path(adapter).name}, so it is unknown how it was made; move "
            "it away, or delete it with --overwrite true"
        )
    # With another number of processes the remaining rows would come in another order.
    with_processes = Job(job.options, job.settings | {"processes": world_size()}, job.inputs)
    with_processes.check_same(adapter, (read_state(checkpoints / "state.json"),))
    return False


def last_complete_checkpoint(folder: Path, may_delete: bool = True) -> str | None:
    """Path of the last checkpoint that can be resumed from, or None.

    Incomplete ones, of a killed process, and damaged ones are reported and deleted if `may_delete`.
    """
    found = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdecimal()]
    found.sort(key=lambda path: int(path.name[11:]))
    faults = {path: _fault(path) for path in found}
    for path, fault in faults.items():
        if fault and may_delete:
            logger.info(f"{path} cannot be resumed from ({fault}) and is removed")
            remove_folder(path) if path.is_dir() else remove_file(path)
    complete = [path for path in found if faults[path] is None]
    for path in reversed(complete):
        best = read_json(path / "trainer_state.json").get("best_model_checkpoint")
        if best is None or Path(best).absolute() in [p.absolute() for p in complete]:
            return str(path)
    return None


def seal_checkpoint(checkpoint: Path) -> None:
    """Write the digests of a checkpoint's files: it is complete, and this is what it holds.

    The RNG states of several processes are left out, since each process writes its own.
    """
    files = [path for path in sorted(checkpoint.iterdir()) if path.is_file()]
    named = {p.name: p for p in files if p.name != DIGESTS and not p.name.startswith("rng_state_")}
    write_json(checkpoint / DIGESTS, named_digests(named))


def _fault(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be resumed from: its process was killed, or a file is damaged."""
    if not (checkpoint / DIGESTS).is_file():
        return "it is incomplete"
    try:
        digests = read_json(checkpoint / DIGESTS)
    except InputError:
        return f"{DIGESTS} is damaged"
    for name, digest in digests.items():
        path = checkpoint / name
        if not path.is_file() or named_digests({name: path})[name] != digest:
            return f"{name} is damaged or missing"
    rng_states = list(checkpoint.glob("rng_state*"))
    if len(rng_states) != world_size() or not all(map(zipfile.is_zipfile, rng_states)):
        return f"it has {len(rng_states)} RNG states for {world_size()} processes"
    return None
