"""What a training has left on disk: a finished adapter, or checkpoints to resume from."""

import shutil
from pathlib import Path

from mllmrec.stage.errors import InputError
from mllmrec.stage.record import Job, read_record, read_state, report_up_to_date, world_size


def is_trained(adapter: Path, job: Job) -> bool:
    """True, with a message, if the adapter is of this job.

    Raises InputError if it, or a checkpoint, is of another job. With `overwrite` both are deleted.
    """
    checkpoints = adapter.parent / "checkpoints"
    overwrite = job.options.overwrite
    if overwrite and world_size() > 1:
        raise InputError(
            f"--overwrite cannot be used with several processes; delete {adapter} and "
            f"{checkpoints} "
            "first"
        )
    if overwrite:
        for path in (adapter, checkpoints):
            shutil.rmtree(path, ignore_errors=True)
    record = read_record(adapter)
    job.check_same(adapter, (record,))
    if record is not None:
        report_up_to_date(adapter)
        return True
    # With another number of processes the remaining rows would come in another order.
    with_processes = Job(job.options, job.settings | {"processes": world_size()}, job.inputs)
    with_processes.check_same(adapter, (read_state(checkpoints / "state.json"),))
    return False


def last_complete_checkpoint(folder: Path, may_delete: bool = True) -> str | None:
    """Path of the last checkpoint that was written to its end, or None.

    Incomplete ones, of a killed process, are deleted if `may_delete`.
    """
    found = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.rsplit("-", 1)[1]))
    # The main process writes trainer_state.json last; each process has an RNG state of its own.
    complete = [
        path
        for path in found
        if (path / "trainer_state.json").exists()
        and len(list(path.glob("rng_state*"))) == world_size()
    ]
    if may_delete:
        for path in set(found) - set(complete):
            shutil.rmtree(path)
    return str(complete[-1]) if complete else None
