"""What a training has left on disk: a finished adapter, or checkpoints to resume from."""

import json
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from mllmrec.stage.errors import InputError
from mllmrec.stage.record import (
    Job,
    check_described,
    process_rank,
    read_record,
    read_state,
    record_path,
    report_up_to_date,
    world_size,
)
from mllmrec.stage.transaction import (
    DELETED,
    delete_output,
    finish_deletion,
    output_lock,
    remove_folder,
    remove_temporary,
)

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
    """Path of the last checkpoint that was written to its end, or None.

    Incomplete ones, of a killed process, are deleted if `may_delete`.
    """
    found = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.rsplit("-", 1)[1]))
    complete = [path for path in found if _is_complete(path)]
    if may_delete:
        for path in set(found) - set(complete):
            remove_folder(path)
        for path in folder.glob(f".checkpoint-*{DELETED}"):  # of a process that was killed
            shutil.rmtree(path)
    return str(complete[-1]) if complete else None


def _is_complete(checkpoint: Path) -> bool:
    """False for a checkpoint of a process that was killed, or that a power loss cut short.

    The main process writes trainer_state.json last; each process has an RNG state of its own. A
    truncated file of tensors has a wrong size (safetensors) or no directory at its end (zip).
    """
    rng_states = list(checkpoint.glob("rng_state*"))
    try:
        json.loads((checkpoint / "trainer_state.json").read_bytes())
        for path in checkpoint.glob("*.safetensors"):
            with safe_open(path, "numpy"):
                pass
    except (OSError, ValueError, SafetensorError):
        return False
    archives = [*checkpoint.glob("*.pt"), *checkpoint.glob("*.bin"), *rng_states]
    return len(rng_states) == world_size() and all(map(zipfile.is_zipfile, archives))
