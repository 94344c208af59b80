"""Checkpoints of a training: sealed when they are complete, resumed from only if they are whole."""

import logging
import zipfile
from pathlib import Path

from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import read_json, write_json
from mllmrec.stage.output import delete
from mllmrec.stage.record import named_digests, world_size

logger = logging.getLogger(__name__)

DIGESTS = "digests.json"  # of a checkpoint's files, written last


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
            delete([path])
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
