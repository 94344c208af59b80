"""What files and lines were made from: digests of files, and the key `source` of derived lines.

`source` has 16 hex digits: eight of the settings (options, model), eight of the inputs of this very
line (texts, images). A stage that resumes compares all of them and computes again what differs; a
stage that reads the line knows its inputs, not its settings, and compares the last eight.
"""

import hashlib
import itertools
import json
import logging
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from mllmrec.stage.errors import InputError

logger = logging.getLogger(__name__)

HASH_LIMIT = 1 << 30  # bytes; of a larger file only parts are read
HALF = 8  # hex digits


def file_digest(path: Path) -> str:
    """sha256 of a file, read again only when its size or time of change is another one."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path} is no regular file; put the file there")
    return _file_digest(path, status.st_size, status.st_mtime_ns, status.st_ino)


@cache
def _file_digest(path: Path, size: int, *state: int) -> str:
    with open(path, "rb") as file:
        if size <= HASH_LIMIT:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256(str(size).encode())
        # A part of each 64th: all of 15 GB would take a minute at every start.
        for position in range(0, size, size // 64):
            file.seek(position)
            digest.update(file.read(1 << 20))
        return digest.hexdigest()


def short_digest(value: Any) -> str:
    """HALF hex digits that stand for a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:HALF]


def describing_records(path: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """(path, content) of the run records beside a file that describe it, its own one first.

    The others are those of files that were written together with it. A damaged one is passed over:
    the stage that owns it refuses it.
    """
    own = path.with_suffix(".run.json")
    for found in sorted(path.parent.glob("*.run.json"), key=lambda found: found != own):
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            record = json.loads(found.read_bytes())
            if record["outputs"].get(path.name) is not None:
                yield found, record


def check_unedited(path: Path) -> None:
    """Raise InputError if a run record beside a file describes another content."""
    for found, record in itertools.islice(describing_records(path), 1):
        if record["outputs"][path.name] != file_digest(path):
            raise InputError(
                f"{path} was changed after it was written: {found} describes another file; "
                "restore it, or run its stage again with --overwrite true"
            )


def check_lines_source(
    lines: Mapping[Any, Mapping[str, Any]],
    inputs: Mapping[Any, Iterable[Any]],
    path: Path,
    fault: str,
) -> None:
    """Raise InputError for the first line of a file that was not made from these inputs.

    lines: id -> line, all lines of the file `path`; inputs: id -> what its inputs may be; fault:
    the rest of the message. Lines without `source`, as of published files, give one warning.
    """
    unknown = 0
    for number, (name, line) in enumerate(lines.items(), start=1):
        if name not in inputs:
            continue
        if "source" not in line:
            unknown += 1
        elif line["source"][HALF:] not in map(short_digest, inputs[name]):
            shown = name if isinstance(name, str) else " ".join(name)
            raise InputError(f"{path}, line {number} ({shown}): {fault}")
    if unknown:
        logger.warning(
            f"{path}: {unknown:,} lines have no `source`, so it is unknown what they were made from"
        )
