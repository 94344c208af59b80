"""Reading raw files as columns, with one clear sentence if a file is not what it should be."""

import gzip
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.json as pajson

from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import PathLike, Row

BLOCK = 16 << 20  # bytes that are parsed at a time when a file is streamed


def read_table(
    path: PathLike,
    columns: Sequence[str],
    delimiter: str = ",",
    header: bool = True,
    quoted: bool = True,
) -> tuple[pd.DataFrame, list[Row]]:
    """(DataFrame of strings with the named columns and `line`, list of rejected rows).

    path: UTF-8 file; columns: names that are wanted, in file order if there is no header; a row
    with another number of fields is rejected. `line` is the row's number among the file's records,
    counted from 1 (a quoted line break does not count). Raises InputError for a missing or empty
    file, an undecodable byte or a missing column.
    """
    path = _checked_path(path)
    rejected: list[Row] = []
    names = None if header else list(columns)
    types = dict.fromkeys(columns, pa.string())
    try:
        table = pacsv.read_csv(
            path,
            read_options=pacsv.ReadOptions(column_names=names, use_threads=False),
            parse_options=pacsv.ParseOptions(
                delimiter=delimiter,
                quote_char='"' if quoted else False,
                newlines_in_values=quoted,
                invalid_row_handler=_row_rejecter(path, rejected),
            ),
            convert_options=pacsv.ConvertOptions(column_types=types, strings_can_be_null=False),
        )
    except pa.ArrowInvalid as error:
        raise InputError(
            _undecodable(path)
            or f"{path} cannot be read as a table: {' '.join(str(error).split())}"
        ) from None
    _check_columns(path, columns, table.column_names)
    frame = table.select(list(columns)).to_pandas()
    bad_lines = {row["line"] for row in rejected}
    numbers = (
        n for n in range(2 if header else 1, len(frame) + len(rejected) + 2) if n not in bad_lines
    )
    frame["line"] = pd.Series([next(numbers) for _ in range(len(frame))], dtype="int64")
    return frame, rejected


def stream_table(
    path: PathLike, columns: Sequence[str], rejected: list[Row]
) -> Iterator[pa.RecordBatch]:
    """Yield Arrow record batches of strings with the named columns of a CSV file, gzipped or not.

    The file has a header. Memory does not grow with the file. Rows with another number of fields
    are appended to `rejected`.
    """
    path = _checked_path(path)
    _check_columns(path, columns, first_fields(path))
    try:
        with pa.input_stream(str(path)) as file:
            yield from pacsv.open_csv(
                file,
                read_options=pacsv.ReadOptions(block_size=BLOCK, use_threads=False),
                parse_options=pacsv.ParseOptions(
                    newlines_in_values=True, invalid_row_handler=_row_rejecter(path, rejected)
                ),
                convert_options=pacsv.ConvertOptions(
                    column_types=dict.fromkeys(columns, pa.string()),
                    include_columns=list(columns),
                    strings_can_be_null=False,
                ),
            )
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            _undecodable(path)
            or f"{path} cannot be read as a table: {' '.join(str(error).split())}"
        ) from None


def stream_jsonl(path: PathLike, columns: Mapping[str, pa.DataType]) -> Iterator[pa.RecordBatch]:
    """Yield Arrow record batches with the named columns (name -> type) of a JSONL file, gzipped or
    not.

    Memory does not grow with the file; keys that a line lacks are null. Raises InputError with the
    line number for a line that is no JSON object or has a value of another type.
    """
    path = _checked_path(path)
    options = pajson.ParseOptions(
        explicit_schema=pa.schema(columns), unexpected_field_behavior="ignore"
    )
    try:
        with pa.input_stream(str(path)) as file:
            for batch in pajson.open_json(
                file, read_options=pajson.ReadOptions(block_size=BLOCK), parse_options=options
            ):
                batch.validate(full=True)  # is it UTF-8
                yield batch
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            _undecodable(path)
            or _broken_json(path, columns)
            or f"{path} cannot be read as JSONL: {' '.join(str(error).split())}"
        ) from None


def reject_rows(
    frame: pd.DataFrame, bad: pd.Series, reason: str, name: str, rejected: list[Row]
) -> tuple[pd.DataFrame, list[Row]]:
    """(`frame` without the rows of mask `bad`, `rejected` plus one entry for each of them).

    name: of the file, for the entry.
    """
    added = [
        {
            "file": name,
            "line": row.line,
            "row": " ".join(str(v) for v in row if v is not row.line),
            "reason": reason,
        }
        for row in frame.loc[bad].itertuples(index=False)
    ]
    return frame.loc[~bad].reset_index(drop=True), rejected + added


def parse_timestamps(
    frame: pd.DataFrame, name: str, rejected: list[Row]
) -> tuple[pd.DataFrame, list[Row]]:
    """(`frame` with a column time made of its column timestamp, `rejected` plus the rows without
    one).
    """
    frame["time"] = pd.to_numeric(frame["timestamp"], errors="coerce")
    return reject_rows(
        frame, ~np.isfinite(frame["time"]), "the timestamp is not a number", name, rejected
    )


def first_fields(path: PathLike, delimiter: str = ",") -> list[str]:
    """The fields of a file's first line, to find out whether it is a header."""
    with _opened(path) as file:
        return [
            field.strip('"')
            for field in file.readline().decode("utf-8-sig", "replace").strip().split(delimiter)
        ]


def _checked_path(path: PathLike) -> Path:
    """`path` as a Path. Raises InputError if there is nothing to read."""
    path = Path(path)
    if not path.exists():
        raise InputError(
            f"{path} is missing; the README (Real data) says where to get it and where to put it"
        )
    with _opened(path) as file:
        if not file.read(1):
            raise InputError(f"{path} is empty; fetch it again")
    return path


def _opened(path: PathLike) -> IO[bytes]:
    opener: Any = gzip.open if Path(path).suffix == ".gz" else open
    return opener(path, "rb")


def _lines(path: PathLike) -> Iterator[tuple[int, bytes]]:
    """(line number, bytes) of a file; raises InputError if a gzipped one is truncated or not
    gzipped.
    """
    with _opened(path) as file:
        number = 0
        try:
            for number, line in enumerate(file, start=1):
                yield number, line
        except (OSError, EOFError) as error:
            raise InputError(
                f"{path} is truncated or damaged after line {number} ({error}); fetch it again"
            ) from None


def _row_rejecter(path: Path, rejected: list[Row]) -> Callable[[Any], str]:
    """For pyarrow: appends a row with a wrong number of fields to `rejected` and skips it."""

    def reject(row: Any) -> str:
        reason = f"{row.actual_columns} fields instead of {row.expected_columns}"
        rejected.append({"file": path.name, "line": row.number, "row": row.text, "reason": reason})
        return "skip"

    return reject


def _check_columns(path: Path, wanted: Sequence[str], found: Sequence[str]) -> None:
    missing = [name for name in wanted if name not in found]
    if missing:
        raise InputError(
            f"{path}, line 1: column {missing[0]!r} is missing; the file has {', '.join(found)}; "
            f"rename the column or "
            "see the README (Real data) for the expected form"
        )


def _undecodable(path: Path) -> str | None:
    for number, line in _lines(path):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as error:
            return (
                f"{path}, line {number}: byte {error.start + 1} is not UTF-8; save the file as "
                "UTF-8"
            )
    return None


def _broken_json(path: Path, columns: Mapping[str, pa.DataType]) -> str | None:
    """What is wrong with the first line that is no object or has a value of another type."""
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            return (
                f"{path}, line {number}: not valid JSON ({error.msg}); fetch the file again or "
                "remove the line"
            )
        if not isinstance(row, dict):
            return (
                f"{path}, line {number}: a line must hold one object; fetch the file again or "
                "remove the line"
            )
        for name, kind in columns.items():
            try:
                pa.array([row.get(name)], type=kind)
            except (pa.ArrowInvalid, pa.ArrowTypeError):
                return (
                    f"{path}, line {number}: {name} must be {kind}, not "
                    f"{str(row[name])[:40]!r}; correct or remove the line"
                )
    return None
