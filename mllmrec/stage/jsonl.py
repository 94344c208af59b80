"""Reading and writing the JSONL files that the stages exchange.

A line is complete or absent; a finished file is replaced as a whole. Ids are strings everywhere.
"""

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from mllmrec.stage.errors import InputError
from mllmrec.stage.schema import ID_KEYS, SCHEMAS

Row = dict[str, Any]
PathLike = str | os.PathLike[str]
_ENCODER = json.JSONEncoder(ensure_ascii=False)


def require(path: PathLike, maker: str | None = None) -> Path:
    """`path` as a Path. Raises InputError naming the script that writes it if it does not exist."""
    path = Path(path)
    if not path.exists():
        maker = maker or (SCHEMAS[path.name].maker if path.name in SCHEMAS else None)
        raise InputError(f"{path} is missing" + (f"; {maker} makes it" if maker else ""))
    return path


def read_lines(path: PathLike, keys: Sequence[str] | None = None) -> Iterator[tuple[int, Row]]:
    """Yield (line number, row) for each line of a JSONL file.

    keys: those that every line must have; default: as `SCHEMAS` says for a file of this name.
    Raises InputError with file, line and remedy for a missing file, broken JSON, an undecodable
    byte, a missing key or an id that is not a string.
    """
    path = require(path)
    schema = SCHEMAS.get(path.name)
    maker = schema.maker if schema else "the script that wrote it"
    if keys is None:
        keys = schema.keys if schema else ()
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            yield number, _parsed_line(raw, keys, f"{path}, line {number}", maker)


def _parsed_line(raw: bytes, keys: Sequence[str], where: str, maker: str) -> Row:
    try:
        row = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: byte {error.start + 1} is not UTF-8; save the file as UTF-8 or make it "
            f"again "
            f"with {maker}"
        ) from None
    except json.JSONDecodeError as error:
        raise InputError(
            f"{where}: not valid JSON ({error.msg}); delete the file and make it again with {maker}"
        ) from None
    if not isinstance(row, dict):
        example = (list(keys) or ["id"])[0]
        raise InputError(f'{where}: a line must hold one object like {{"{example}": ...}}')
    for key in keys:
        if key not in row:
            raise InputError(f"{where}: key {key!r} is missing; make the file again with {maker}")
        if key in ID_KEYS and not isinstance(row[key], str):
            raise InputError(
                f"{where}: {key} must be a string, not {row[key]!r}; write it in quotes"
            )
    return row


def read_rows(path: PathLike, keys: Sequence[str] | None = None) -> list[Row]:
    """All lines of a JSONL file as dicts, checked as in `read_lines`."""
    return [row for _, row in read_lines(path, keys)]


def read_by_id(path: PathLike, key: str, keys: Sequence[str] | None = None) -> dict[str, Row]:
    """A JSONL file as dict id -> row, checked as in `read_lines`.

    Raises InputError for a repeated id.
    """
    rows: dict[str, Row] = {}
    lines: dict[str, int] = {}
    for number, row in read_lines(path, keys):
        if row[key] in rows:
            raise InputError(
                f"{path}, line {number}: {key} {row[key]!r} is already in line {lines[row[key]]}; "
                "remove one of the two"
            )
        rows[row[key]], lines[row[key]] = row, number
    return rows


def read_rejected(path: PathLike, key: str) -> dict[str, Row]:
    """The rejected rows of the output `path` (X.rejected.jsonl) by id; empty where there are
    none.
    """
    rejected = rejected_path(path)
    return read_by_id(rejected, key, keys=(key, "reason")) if rejected.exists() else {}


def rejected_path(path: PathLike) -> Path:
    """X.jsonl -> X.rejected.jsonl"""
    return Path(path).with_suffix(".rejected.jsonl")


def encode(row: Row) -> bytes:
    """One row as one line of bytes, with its line break. Text stays readable in any language."""
    try:
        return _ENCODER.encode(row).encode() + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair, from broken scrapers: kept as an escape
        return json.dumps(row).encode() + b"\n"


def write_rows(path: PathLike, rows: Iterable[Row]) -> None:
    """Write a JSONL file whole or not at all."""
    with atomic_file(path) as file:
        for row in rows:
            file.write(encode(row))


def write_rejected(path: PathLike, rows: Sequence[Row]) -> None:
    """Write the rejected rows to `path`, if there are any; else remove the file of an earlier
    run.
    """
    if rows:
        write_rows(path, rows)
    else:
        Path(path).unlink(missing_ok=True)


def write_json(path: PathLike, value: Any) -> None:
    """Write one indented JSON document whole or not at all."""
    with atomic_file(path) as file:
        file.write((json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


@contextmanager
def atomic_file(path: PathLike) -> Iterator[BinaryIO]:
    """A binary file to write to, which replaces `path` only when everything has been written."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def relative_path(target: PathLike, of_file: PathLike) -> str:
    """`target` as the JSONL file `of_file` holds it: relative to its folder, with forward
    slashes.
    """
    folder, name = os.path.split(target)
    return (
        _relative_folder(os.path.abspath(folder), os.path.dirname(os.path.abspath(of_file))) + name
    )


@cache  # thousands of images lie in one folder
def _relative_folder(folder: str, start: str) -> str:
    relative = Path(os.path.relpath(folder, start)).as_posix()
    return "" if relative == "." else relative + "/"


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
