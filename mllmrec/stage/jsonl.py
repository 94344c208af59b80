"""Reading and writing the JSONL files that the stages exchange.

A line is complete or absent; a finished file is replaced as a whole. Ids are strings everywhere.
Every row is checked by the schema of its file, when it is read and when it is written.
"""

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import TypeAdapter, ValidationError

from mllmrec.stage.errors import InputError
from mllmrec.stage.provenance import check_unedited
from mllmrec.stage.schema import SCHEMAS, FileSchema, Row, problem, schema_of

PathLike = str | os.PathLike[str]
TEMPORARY = ".tmp-"  # in the names of files that are not finished
_ENCODER = json.JSONEncoder(ensure_ascii=False)
_ANY_ROW = FileSchema(TypeAdapter(Row), "the script that wrote it")


def require(path: PathLike, maker: str | None = None) -> Path:
    """`path` as a Path. Raises InputError naming the script that writes it if it does not exist."""
    path = Path(path)
    maker = maker or (SCHEMAS[path.name].maker if path.name in SCHEMAS else None)
    if not path.exists():
        raise InputError(
            f"{path} is missing; {f'{maker} makes it' if maker else 'correct its path'}"
        )
    if path.is_dir():
        raise InputError(f"{path} is a folder, but must be a file; move it away")
    if not path.is_file():  # a pipe or a device, whose end may never come
        raise InputError(f"{path} is no regular file; put the file there")
    return path


def read_lines(path: PathLike, keys: Sequence[str] | None = None) -> Iterator[tuple[int, Row]]:
    """Yield (line number, row) for each line of a JSONL file.

    keys: check only that these are there; default: the schema of a file of this name.
    Raises InputError with file, line and remedy for a missing file, broken JSON, an undecodable
    byte, a missing key, a value of a wrong type or outside its range, no line where some are
    needed, or another content than the run record beside the file describes.
    """
    path = require(path)
    check_unedited(path)
    named = schema_of(path.name)
    schema = named if named and keys is None else _ANY_ROW
    maker = (named or schema).maker
    number = 0
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            yield number, parse_line(raw, schema, f"{path}, line {number}", (keys or (), maker))
    if number == 0 and not schema.may_be_empty:
        raise InputError(f"{path} is empty; make it again with {maker}")


def parse_line(
    raw: bytes, schema: FileSchema, where: str, source: tuple[Sequence[str], str] = ((), "")
) -> Row:
    """One line of a JSONL file as a row, checked.

    where: file and line, for messages; source: (keys that must be there, who writes the file).
    """
    keys, maker = source[0], source[1] or schema.maker
    remedy = f"make the file again with {maker}"
    try:
        row: Row = schema.row.validate_json(raw)
    except ValidationError as error:
        undecodable = _undecodable_byte(raw)
        if undecodable:
            raise InputError(
                f"{where}: byte {undecodable} is not UTF-8; save the file as UTF-8 or {remedy}"
            ) from None
        raise InputError(f"{where}: {problem(error)}; {remedy}") from None
    for key in keys:
        if key not in row:
            raise InputError(f"{where}: key {key!r} is missing; {remedy}")
    return row


def _undecodable_byte(raw: bytes) -> int | None:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start + 1
    return None


def read_rows(path: PathLike, keys: Sequence[str] | None = None) -> list[Row]:
    """All lines of a JSONL file as dicts, checked as in `read_lines`."""
    return [row for _, row in read_lines(path, keys)]


def read_by_id(
    path: PathLike, key: str | tuple[str, ...], keys: Sequence[str] | None = None
) -> dict[Any, Row]:
    """A JSONL file as dict id -> row, checked as in `read_lines`.

    key: name of the id, or a tuple of names whose values are the id. Raises InputError for an id
    that is repeated, or no string.
    """
    names = (key,) if isinstance(key, str) else key
    rows: dict[Any, Row] = {}
    lines: dict[Any, int] = {}
    for number, row in read_lines(path, keys):
        values = tuple(row.get(name) for name in names)
        shown = values[0] if isinstance(key, str) else values
        if not all(isinstance(value, str) for value in values):
            raise InputError(
                f"{path}, line {number}: {' and '.join(names)} must be a string, not {shown!r}; "
                "write it in quotes, or make the file again"
            )
        if shown in rows:
            raise InputError(
                f"{path}, line {number}: {' and '.join(names)} {shown!r} is already in line "
                f"{lines[shown]}; remove one of the two"
            )
        rows[shown], lines[shown] = row, number
    return rows


def read_rejected(path: PathLike, key: str | tuple[str, ...]) -> dict[Any, Row]:
    """The rejected rows of the output `path` (X.rejected.jsonl) by id, none without that file."""
    rejected = rejected_path(path)
    return read_by_id(rejected, key) if rejected.exists() else {}


def read_json(path: PathLike) -> dict[str, Any]:
    """A file that holds one JSON object, unedited. Raises InputError if it holds anything else."""
    path = require(path)
    check_unedited(path)
    try:
        return _ANY_ROW.row.validate_json(path.read_bytes())
    except ValidationError as error:
        raise InputError(f"{path}: {problem(error)}; delete it and make it again") from None


def rejected_path(path: PathLike) -> Path:
    """X.jsonl -> X.rejected.jsonl"""
    return Path(path).with_suffix(".rejected.jsonl")


def encode(row: Row) -> bytes:
    """One row as one line of bytes, with its line break. Text stays readable in any language.

    Half of a surrogate pair, which UTF-8 cannot express, becomes a question mark.
    """
    return _ENCODER.encode(row).encode("utf-8", "replace") + b"\n"


def encode_checked(row: Row, schema: FileSchema | None, path: PathLike) -> bytes:
    """`encode(row)`. Raises InputError, which names `path`, if the row breaks the schema."""
    if schema is not None:
        try:
            schema.row.validate_python(row)
        except ValidationError as error:
            ids = " ".join(repr(row[k]) for k in ("user_id", "item_id") if k in row)
            raise InputError(
                f"{path}: the row {ids} is wrong and cannot be written: {problem(error)}"
            ) from None
    return encode(row)


def write_rows(path: PathLike, rows: Iterable[Row]) -> None:
    """Write a JSONL file whole or not at all.

    Raises InputError for a row that breaks the schema of a file of this name.
    """
    schema = schema_of(Path(path).name)  # looked up once: there may be millions of rows
    with atomic_file(path) as file:
        for row in rows:
            file.write(encode_checked(row, schema, path))


def write_rejected(path: PathLike, rows: Sequence[Row]) -> None:
    """Write rejected rows to `path`; without rows, remove the file of an earlier run."""
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
    """A binary file to write to, which replaces `path` only when everything has been written.

    The file is on the disk before it gets its name, so that after a power loss `path` is the old or
    the new file, whole.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}{TEMPORARY}")
    try:
        with naming(path), os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def naming(path: PathLike) -> Iterator[None]:
    """Name the file in the error of a write that fails, e.g. on a full disk: Python does not."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def relative_path(target: PathLike, of_file: PathLike) -> str:
    """`target` as the file `of_file` names it: relative to its folder, with forward slashes."""
    folder, name = os.path.split(target)
    start = os.path.dirname(os.path.abspath(of_file))
    return _relative_folder(os.path.abspath(folder), start) + name


@cache  # thousands of images lie in one folder
def _relative_folder(folder: str, start: str) -> str:
    relative = Path(os.path.relpath(folder, start)).as_posix()
    return "" if relative == "." else relative + "/"


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
