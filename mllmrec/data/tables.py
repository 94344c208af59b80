"""Raw files as columns: CSV and JSONL, with one clear sentence if a file is not what it should be.

A block of whole lines is parsed by Arrow; a block of JSONL that Arrow refuses is read again line by
line. Line numbers are those of the unpacked file, counted from 1, blank lines included. Lines of
tables end with \\n, \\r\\n or \\r, those of JSONL files with \\n.
"""

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.json as pajson

from mllmrec.data import raw_files
from mllmrec.data.columns import BLANKS, trimmed
from mllmrec.data.raw_files import blocks_of, check_utf8
from mllmrec.data.timestamps import LARGEST
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import PathLike, whole_characters
from mllmrec.stage.schema import Row

Array = np.ndarray[Any, Any]
MOST_LINE_BREAKS = 10  # of one field of a text table
OPENS_QUOTE = (
    "a double quote opens a field and is not closed in it; close it, or write it twice if it "
    "belongs to the text"
)


def read_table(
    path: PathLike,
    columns: Sequence[str],
    delimiter: str = ",",
    header: bool = True,
    quoted: bool = True,
) -> tuple[pd.DataFrame, list[Row]]:
    """(DataFrame of strings with the named columns and `line`, list of rejected rows).

    For ids and numbers: fields lose surrounding blanks, and a line break inside a field is an
    error. path: UTF-8 file, gzipped or not; columns: names that are wanted, in file order if there
    is no header; a row with another number of fields is rejected. Raises InputError for a file
    that is no such table or lacks a column.
    """
    rejected: list[Row] = []
    form = _TableForm(Path(path), list(columns), delimiter, quoted)
    if not header:
        form.names = list(columns)
    batches = list(_table_batches(form, rejected))
    schema = pa.schema([*((name, pa.string()) for name in columns), ("line", pa.int64())])
    return pa.Table.from_batches(batches, schema).to_pandas(), rejected


def stream_table(
    path: PathLike, columns: Sequence[str], rejected: list[Row]
) -> Iterator[pa.RecordBatch]:
    """Yield Arrow record batches of strings with the named columns and `line` (int64).

    As `read_table`, for a file with a header. Memory does not grow with the file. Rows with another
    number of fields are appended to `rejected`.
    """
    yield from _table_batches(_TableForm(Path(path), list(columns)), rejected)


def read_text_table(
    path: PathLike, columns: Sequence[str], header: bool = True
) -> tuple[pd.DataFrame, list[Row]]:
    """As `read_table`, for texts: quoted fields may hold line breaks, and blanks are kept.

    `line` is where the row starts. Raises InputError, naming the line where the quote opens, for a
    quote that is never closed, text after the closing quote of a field with line breaks, and a
    field with more than `MOST_LINE_BREAKS` of them.
    """
    path = Path(path)
    content = b"".join(blocks_of(path))
    check_utf8(path, content, 1)
    lines = list(io.StringIO(content.decode(), newline=""))
    names, rows, rejected = None if header else list(columns), [], []
    for start, end, fields in _text_records(path, lines):
        if names is None:
            names = _header_names(path, start, fields, columns)
        elif len(fields) != len(names):
            reason = f"{len(fields)} fields instead of {len(names)}"
            text = "".join(lines[start - 1 : end]).rstrip("\r\n")
            rejected.append({"file": path.name, "line": start, "row": text, "reason": reason})
        else:
            rows.append((*fields, start))
    frame = pd.DataFrame(rows, columns=[*(names or columns), "line"])
    types = {**dict.fromkeys(columns, "str"), "line": "int64"}
    return frame[[*columns, "line"]].astype(types), rejected


def stream_jsonl(path: PathLike, columns: Mapping[str, pa.DataType]) -> Iterator[pa.RecordBatch]:
    """Yield Arrow record batches with the named columns (name -> type) and `line` (int64).

    path: JSONL file, gzipped or not. Memory does not grow with the file; keys that a line lacks are
    null; half a surrogate pair becomes U+FFFD. Raises InputError with the line number for a line
    that is no JSON object or has a value of another type.
    """
    path, first = Path(path), 1
    for block in blocks_of(path):
        content = np.frombuffer(block, dtype=np.uint8)
        starts = np.append(0, np.flatnonzero(content == ord("\n")) + 1)
        starts = starts[: len(starts) - block.endswith(b"\n")]
        n_lines, table = len(starts), None
        if (content[starts] == ord("{")).all():  # Arrow 26 crashes on a block that starts with null
            table = _json_table(block, n_lines, columns)
        if table is None:
            table = _json_table_by_line(path, block, first, columns)
        else:
            table = table.append_column("line", pa.array(np.arange(first, first + n_lines)))
        yield from table.to_batches()
        first += n_lines


def first_fields(path: PathLike) -> list[str]:
    """The fields of a CSV file's first line, to find out whether it is a header."""
    form = _TableForm(Path(path), [])
    for block in blocks_of(form.path):
        line = _first_line(block)[1]
        if line:
            return _split_header(form, line.decode("utf-8", "replace"))
    return [""]


@dataclass
class _TableForm:
    """A table's file and form; names: of its columns, None until the header has been read."""

    path: Path
    columns: list[str]
    delimiter: str = ","
    quoted: bool = True
    names: list[str] | None = None


def _table_batches(form: _TableForm, rejected: list[Row]) -> Iterator[pa.RecordBatch]:
    first = 1
    for block in blocks_of(form.path):
        check_utf8(form.path, block, first)
        n_lines, has_blank_lines = _table_lines(block)
        next_first = first + n_lines
        if form.names is None:
            n_blank, line, block = _first_line(block)
            first += n_blank
            if line:
                fields = _split_header(form, line.decode())
                form.names = _header_names(form.path, first, fields, form.columns)
                first += 1
        numbers = np.arange(first, next_first)
        if has_blank_lines:  # Arrow skips them
            lines = block.splitlines()
            numbers = numbers[[bool(line) for line in lines]]
            block = b"\n".join(line for line in lines if line)
        if block:
            yield from _parsed_block(form, block, numbers, rejected)
        first = next_first


def _parsed_block(
    form: _TableForm, block: bytes, numbers: Array, rejected: list[Row]
) -> Iterator[pa.RecordBatch]:
    """Record batches of lines without blank ones. numbers: their line numbers."""
    assert form.names is not None
    skipped: list[Any] = []

    def skip(row: Any) -> str:
        skipped.append(row)
        return "skip"

    has_quotes = form.quoted and b'"' in block
    text = block
    if has_quotes:  # one more row, which an open quote in the last line would swallow
        end = b"" if block.endswith((b"\n", b"\r")) else b"\n"
        text = block + end + form.delimiter.encode() * (len(form.names) - 1) + b"\n"
    try:
        table = pacsv.read_csv(
            pa.BufferReader(text),
            read_options=pacsv.ReadOptions(
                column_names=form.names, use_threads=False, block_size=len(text) + 1
            ),
            parse_options=pacsv.ParseOptions(
                delimiter=form.delimiter,
                quote_char='"' if form.quoted else False,
                invalid_row_handler=skip,
            ),
            convert_options=pacsv.ConvertOptions(
                column_types=dict.fromkeys(form.columns, pa.string()),
                include_columns=form.columns,
                strings_can_be_null=False,
            ),
        )
    except pa.ArrowException as error:
        raise _unreadable(form, block, numbers, " ".join(str(error).split())) from None
    if table.num_rows + len(skipped) != len(numbers) + has_quotes:
        raise _unreadable(form, block, numbers, "a field holds a line break")
    keep = np.ones(len(numbers), dtype=bool)
    for row in skipped:
        keep[row.number - 1] = False
        rejected.append(
            {
                "file": form.path.name,
                "line": int(numbers[row.number - 1]),
                "row": row.text,
                "reason": f"{row.actual_columns} fields instead of {row.expected_columns}",
            }
        )
    for batch in table.slice(0, int(keep.sum())).combine_chunks().to_batches():
        arrays = [trimmed(column) for column in batch.columns]
        yield pa.RecordBatch.from_arrays(
            [*arrays, pa.array(numbers[keep], pa.int64())], [*form.columns, "line"]
        )


def _unreadable(form: _TableForm, block: bytes, numbers: Array, reason: str) -> InputError:
    """The error for a block: an open quote with its line if there is one, else `reason`."""
    lines = [*io.StringIO(block.decode(), newline=""), "x\n"]
    if not lines[-2].endswith(("\n", "\r")):
        lines[-2] += "\n"
    start, reader = 1, csv.reader(lines, delimiter=form.delimiter)
    try:
        for _ in reader:
            if reader.line_num > start:
                break
            start += 1
    except csv.Error:  # a field of more than 131,072 characters
        pass
    if form.quoted and start < len(lines):
        return InputError(f"{form.path}, line {numbers[start - 1]}: {OPENS_QUOTE}")
    return InputError(
        f"{form.path} cannot be read as a table between lines {numbers[0]} and {numbers[-1]}: "
        f"{reason}; correct the file or fetch it again"
    )


def _first_line(block: bytes) -> tuple[int, bytes, bytes]:
    """(number of blank lines before it, first line that is not blank, what follows it)."""
    start = len(block) - len(block.lstrip(b"\r\n"))
    line = re.compile(rb"[^\r\n]*").match(block, start)
    assert line is not None
    rest = block[line.end() :]
    for end in (b"\r\n", b"\n", b"\r"):
        if rest.startswith(end):
            rest = rest[len(end) :]
            break
    return _table_lines(block[:start])[0], line.group(), rest


def _split_header(form: _TableForm, line: str) -> list[str]:
    """The names of a header without surrounding blanks."""
    try:
        fields = next(csv.reader([line], delimiter=form.delimiter))
    except csv.Error as error:
        raise InputError(
            f"{form.path}, line 1: no header ({error}); fetch the file again"
        ) from None
    return [name.strip(BLANKS) for name in fields]


def _header_names(path: Path, line: int, fields: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """Names without surrounding blanks; InputError if a wanted one is missing or there twice."""
    fields = [name.strip(BLANKS) for name in fields]
    if len(fields) < 2:
        raise InputError(
            f"{path}, line {line}: the header has one column, {fields[0][:80]!r}; separate the "
            "columns by commas"
        )
    for name in wanted:
        if name not in fields:
            raise InputError(
                f"{path}, line {line}: column {name!r} is missing; the file has "
                f"{', '.join(fields)[:300]}; rename the column or see the README (Real data) for "
                "the expected form"
            )
        if fields.count(name) > 1:
            raise InputError(
                f"{path}, line {line}: column {name!r} is there {fields.count(name)} times; rename "
                "or remove the others"
            )
    return fields


def _text_records(path: Path, lines: list[str]) -> Iterator[tuple[int, int, list[str]]]:
    """(first line, last line, fields) of each row that is not blank; quotes are checked."""
    reader, start = csv.reader(lines), 1
    while start <= len(lines):
        try:
            fields = next(reader)
        except csv.Error:  # a field of more than 131,072 characters
            raise InputError(f"{path}, line {start}: {OPENS_QUOTE}") from None
        end = reader.line_num
        if end > start or end == len(lines):
            _check_quotes(path, start, lines[start - 1 : end], fields)
        if fields:
            yield start, end, fields
        start = end + 1


def _check_quotes(path: Path, start: int, lines: list[str], fields: list[str]) -> None:
    """Raise InputError if the quotes of one row, which starts in line `start`, are unbalanced."""
    line = opening = start
    with_breaks = []  # lines where fields with line breaks open
    for text in fields:
        opening = line
        n_breaks = len(re.findall("\r\n|\r|\n", text))
        with_breaks += [line] if n_breaks else []
        if n_breaks > MOST_LINE_BREAKS:
            raise InputError(f"{path}, line {line}: {OPENS_QUOTE}")
        line += n_breaks
    try:
        list(csv.reader(lines, strict=True))
    except csv.Error as error:
        if "unexpected end" in str(error):
            raise InputError(f"{path}, line {opening}: {OPENS_QUOTE}") from None
        if with_breaks:  # text after the closing quote: one of two rows, perhaps
            raise InputError(f"{path}, line {with_breaks[0]}: {OPENS_QUOTE}") from None


def _table_lines(block: bytes) -> tuple[int, bool]:
    """(number of lines that end with \\n, \\r\\n or \\r, whether there are blank ones).

    The last line may lack its end.
    """
    if b"\r" in block:
        lines = block.splitlines()
        return len(lines), b"" in lines
    ends = np.flatnonzero(np.frombuffer(block, dtype=np.uint8) == ord("\n"))
    is_blank = block.startswith(b"\n") or bool((np.diff(ends) == 1).any())
    return len(ends) + (not block.endswith(b"\n") and block != b""), is_blank


def _json_table(block: bytes, n_lines: int, columns: Mapping[str, pa.DataType]) -> pa.Table | None:
    """The block as Arrow reads it; None if Arrow refuses it or not every line is one object."""
    options = pajson.ParseOptions(
        explicit_schema=pa.schema(columns), unexpected_field_behavior="ignore"
    )
    try:
        table = pajson.read_json(
            pa.BufferReader(block),
            read_options=pajson.ReadOptions(block_size=raw_files.BLOCK // 4),
            parse_options=options,
        )
        table.validate(full=True)  # is it UTF-8
    except pa.ArrowException:
        return None
    return table.select(list(columns)) if table.num_rows == n_lines else None


def _json_table_by_line(
    path: Path, block: bytes, first: int, columns: Mapping[str, pa.DataType]
) -> pa.Table:
    """The block as Python reads it, with half surrogate pairs replaced, and the column line."""
    values: dict[str, list[Any]] = {name: [] for name in (*columns, "line")}
    for number, line in enumerate(block.split(b"\n"), start=first):
        if not line.strip():
            continue
        row = _json_object(path, number, line)
        for name, kind in columns.items():
            if not _fits(row.get(name), kind):
                raise InputError(
                    f"{path}, line {number}: {name} must be {kind}, not {str(row[name])[:40]!r}; "
                    "correct or remove the line"
                )
            values[name].append(whole_characters(row.get(name)))
        values["line"].append(number)
    schema = pa.schema([*columns.items(), ("line", pa.int64())])
    return pa.table(values, schema=schema)


def _json_object(path: Path, number: int, line: bytes) -> Row:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}, line {number}: byte {error.start + 1} is not UTF-8; save the file as UTF-8"
        ) from None
    except (ValueError, RecursionError) as error:
        reason = "an integer has too many digits"
        if isinstance(error, RecursionError):
            reason = "too many nested brackets"
        raise InputError(
            f"{path}, line {number}: not valid JSON ({getattr(error, 'msg', reason)}); fetch the "
            "file again or remove the line"
        ) from None
    if not isinstance(row, dict):
        raise InputError(
            f"{path}, line {number}: a line must hold one object; fetch the file again or remove "
            "the line"
        )
    return row


def _fits(value: Any, kind: pa.DataType) -> bool:
    """Whether Arrow's JSON reader takes the value for the type: string, int64, list or struct."""
    if value is None:
        return True
    if pa.types.is_list(kind):
        return isinstance(value, list) and all(_fits(part, kind.value_type) for part in value)
    if pa.types.is_struct(kind):
        return isinstance(value, dict) and all(_fits(value.get(f.name), f.type) for f in kind)
    if pa.types.is_string(kind):
        return isinstance(value, str)
    return isinstance(value, int) and not isinstance(value, bool) and -LARGEST <= value <= LARGEST
