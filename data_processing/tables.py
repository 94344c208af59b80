"""Reading raw files as columns, with one clear sentence when a file is not what it should be."""

import gzip
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.json as pajson

from data_processing.errors import InputError

BLOCK = 16 << 20  # bytes that are parsed at a time when a file is streamed


def read_table(path, columns, delimiter=",", header=True, quoted=True):
    """(DataFrame of strings with the named columns and `line`, list of refused rows).

    path: UTF-8 file; columns: names that are wanted, in file order if there is no header; a row with another number of
    fields is refused. `line` is the row's number among the file's records, counted from 1 (a quoted line break does
    not count). Raises InputError for a missing or empty file, an undecodable byte or a missing column.
    """
    path, refused = _there(path), []
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
                invalid_row_handler=_refuser(path, refused),
            ),
            convert_options=pacsv.ConvertOptions(column_types=types, strings_can_be_null=False),
        )
    except pa.ArrowInvalid as error:
        raise InputError(_undecodable(path) or f"{path} cannot be read as a table: {' '.join(str(error).split())}") from None
    _check_columns(path, columns, table.column_names)
    frame = table.select(list(columns)).to_pandas()
    bad_lines = {row["line"] for row in refused}
    numbers = (n for n in range(2 if header else 1, len(frame) + len(refused) + 2) if n not in bad_lines)
    frame["line"] = pd.Series([next(numbers) for _ in range(len(frame))], dtype="int64")
    return frame, refused


def stream_table(path, columns, refused):
    """Yields Arrow record batches of strings with the named columns of a CSV file with a header, gzipped or not.

    Memory does not grow with the file. Rows with another number of fields are appended to `refused`.
    """
    path = _there(path)
    _check_columns(path, columns, first_fields(path))
    try:
        with pa.input_stream(str(path)) as file:
            yield from pacsv.open_csv(
                file,
                read_options=pacsv.ReadOptions(block_size=BLOCK, use_threads=False),
                parse_options=pacsv.ParseOptions(newlines_in_values=True, invalid_row_handler=_refuser(path, refused)),
                convert_options=pacsv.ConvertOptions(
                    column_types=dict.fromkeys(columns, pa.string()), include_columns=list(columns), strings_can_be_null=False
                ),
            )
    except (pa.ArrowException, OSError) as error:
        raise InputError(_undecodable(path) or f"{path} cannot be read as a table: {' '.join(str(error).split())}") from None


def stream_jsonl(path, columns):
    """Yields Arrow record batches with the named columns (dict name -> Arrow type) of a JSONL file, gzipped or not.

    Memory does not grow with the file; keys that a line lacks are null. Raises InputError with the line for a line that
    is no JSON object or has a value of another type.
    """
    path = _there(path)
    options = pajson.ParseOptions(explicit_schema=pa.schema(columns), unexpected_field_behavior="ignore")
    try:
        with pa.input_stream(str(path)) as file:
            for batch in pajson.open_json(file, read_options=pajson.ReadOptions(block_size=BLOCK), parse_options=options):
                batch.validate(full=True)  # is it UTF-8
                yield batch
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            _undecodable(path) or _broken_json(path, columns) or f"{path} cannot be read as JSONL: {' '.join(str(error).split())}"
        ) from None


def set_aside(frame, bad, reason, name, refused):
    """(`frame` less the rows of mask `bad`, `refused` plus one entry for each of them). name: of the file, for the entry."""
    added = [
        {"file": name, "line": row.line, "row": " ".join(str(v) for v in row if v is not row.line), "reason": reason}
        for row in frame.loc[bad].itertuples(index=False)
    ]
    return frame.loc[~bad].reset_index(drop=True), refused + added


def with_time(frame, name, refused):
    """(`frame` with a column time from its column timestamp, `refused` plus the rows where that is no finite number)."""
    frame["time"] = pd.to_numeric(frame["timestamp"], errors="coerce")
    return set_aside(frame, ~np.isfinite(frame["time"]), "the timestamp is not a number", name, refused)


def first_fields(path, delimiter=","):
    """The fields of a file's first line, to find out whether it is a header."""
    with _opened(path) as file:
        return [field.strip('"') for field in file.readline().decode("utf-8-sig", "replace").strip().split(delimiter)]


def _there(path):
    """`path` as a Path. Raises InputError if there is nothing to read."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path} is missing; the README, section «Real data», says where to get it and where to put it")
    with _opened(path) as file:
        if not file.read(1):
            raise InputError(f"{path} is empty; fetch it again")
    return path


def _opened(path):
    return gzip.open(path) if Path(path).suffix == ".gz" else open(path, "rb")


def _lines(path):
    """(line number, bytes) of a file; raises InputError where a gzipped one breaks off or is none."""
    with _opened(path) as file:
        number = 0
        try:
            for number, line in enumerate(file, start=1):
                yield number, line
        except (OSError, EOFError) as error:
            raise InputError(f"{path} breaks off or is damaged after line {number} ({error}); fetch it again") from None


def _refuser(path, refused):
    """For pyarrow: keeps a row with a wrong number of fields in `refused` and goes on."""

    def refuse(row):
        reason = f"{row.actual_columns} fields in place of {row.expected_columns}"
        refused.append({"file": path.name, "line": row.number, "row": row.text, "reason": reason})
        return "skip"

    return refuse


def _check_columns(path, wanted, found):
    missing = [name for name in wanted if name not in found]
    if missing:
        raise InputError(
            f"{path}, line 1: column {missing[0]!r} is missing; the file has {', '.join(found)}; rename the column or "
            "see the README, section «Real data», for the expected form"
        )


def _undecodable(path):
    for number, line in _lines(path):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as error:
            return f"{path}, line {number}: byte {error.start + 1} is not UTF-8; save the file as UTF-8"
    return None


def _broken_json(path, columns):
    """What is wrong with the first line that is no object, or has a value of a type that Arrow does not take."""
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            return f"{path}, line {number}: not valid JSON ({error.msg}); fetch the file again or remove the line"
        if not isinstance(row, dict):
            return f"{path}, line {number}: a line must hold one object; fetch the file again or remove the line"
        for name, kind in columns.items():
            try:
                pa.array([row.get(name)], type=kind)
            except (pa.ArrowInvalid, pa.ArrowTypeError):
                return f"{path}, line {number}: {name} must be {kind}, not {str(row[name])[:40]!r}; correct or remove the line"
    return None
