"""Reading raw files as columns, with one clear sentence if a file is not what it should be.

A file is recognised by its content, not by its name: plain or gzipped, with or without a UTF-8
byte order mark. It is read in blocks of whole lines that Arrow parses; a block of JSONL that Arrow
refuses is read again line by line.

Line numbers are those of the unpacked file, counted from 1, blank lines included. Lines of tables
end with \\n, \\r\\n or \\r, those of JSONL files with \\n.
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from decimal import Context, Decimal, Inexact, InvalidOperation
from pathlib import Path
from typing import IO, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.json as pajson

from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import PathLike, Row

Array = np.ndarray[Any, Any]

BLOCK = 16 << 20  # bytes that are parsed at a time
HEAD = 4096  # bytes that show what kind of file it is
BOM = b"\xef\xbb\xbf"
MOST_LINE_BREAKS = 10  # of one field of a text table
BLANKS = "\t\n\v\f\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000"
BLANKS += "".join(map(chr, range(0x2000, 0x200C))) + "\u2060\ufeff"  # with those of no width
NO_ID_CHARACTERS = "[\\p{Cc}\u2028\u2029\ufffd]"  # U+FFFD: half a surrogate pair
SURROGATE = re.compile("[\ud800-\udfff]")
PACKED = {
    rb"BZh[1-9](1AY&SY|\x17rE8P)": "bzip2",
    rb"PK\x03\x04": "zip",
    rb"\xfd7zXZ\x00": "xz",
    rb"\x28\xb5\x2f\xfd": "zstd",
    rb"7z\xbc\xaf\x27\x1c": "7z",
    rb"(?s).{257}ustar": "tar",
    rb"\x1f\x8b": "gzip, twice",
}
WEB_PAGE = re.compile(rb"\s*<(!doctype|html|head|body|\?xml|!--)", re.IGNORECASE)
LFS_POINTER = b"version https://git-lfs"
TIMESTAMP_FORM = "seconds or milliseconds since 1970, e.g. 1589233210 or 1589233210.25"
UNITS = ("seconds", "milliseconds", "microseconds", "nanoseconds")
UNIT_ENDS = np.array([10**11, 10**14, 10**17])  # smallest values of the last three units
FRACTION_DIGITS = 18  # of a timestamp; as an integer they fit into int64
LARGEST = 2**63 - 1
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE | re.ASCII)
EXACT = Context(prec=60, traps=[Inexact, InvalidOperation])
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
    content = b"".join(_blocks(path))
    _check_utf8(path, content, 1)
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
    for block in _blocks(path):
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
    for block in _blocks(form.path):
        line = _first_line(block)[1]
        if line:
            return _split_header(form, line.decode("utf-8", "replace"))
    return [""]


def check_raw_file(path: PathLike) -> Path:
    """`path` as a Path. Raises InputError if it is no file whose text can be read."""
    with _opened(Path(path)):
        return Path(path)


def reject_rows(
    frame: pd.DataFrame, bad: Any, reason: str | Sequence[str], name: str, rejected: list[Row]
) -> tuple[pd.DataFrame, list[Row]]:
    """(`frame` without the rows of mask `bad`, `rejected` plus one entry for each of them).

    reason: one for all, or one for each bad row; name: of the file, for the entry.
    """
    bad = np.asarray(bad, dtype=bool)
    if not bad.any():
        return frame, rejected
    rows = frame.loc[bad]
    reasons = [reason] * len(rows) if isinstance(reason, str) else reason
    texts = rows.drop(columns="line").itertuples(index=False)
    added = [
        {"file": name, "line": line, "row": " ".join(map(str, text)), "reason": why}
        for line, text, why in zip(rows["line"].tolist(), texts, reasons, strict=True)
    ]
    return frame.loc[~bad].reset_index(drop=True), rejected + added


def clean_ids(
    frame: pd.DataFrame, columns: Sequence[str], name: str, rejected: list[Row]
) -> tuple[pd.DataFrame, list[Row]]:
    """(`frame` with ids without surrounding blanks, `rejected` plus the rows with a bad id).

    Bad: empty, or with control characters. columns: of the ids, also used in the reasons; name: of
    the file.
    """
    for column in columns:
        ids = _as_arrow(frame[column])
        clean = trimmed(ids)
        if clean is not ids:
            frame[column] = pd.Series(clean.to_pandas(), dtype="str")
        reasons = id_reasons(clean, column)
        if reasons:
            bad = np.zeros(len(frame), dtype=bool)
            bad[list(reasons)] = True
            frame, rejected = reject_rows(frame, bad, list(reasons.values()), name, rejected)
    return frame, rejected


def require_rows(n_rows: int, path: PathLike, rejected: Sequence[Row]) -> None:
    """Raise InputError with the first reason if no row of the file `path` is left."""
    if n_rows:
        return
    rows = [row for row in rejected if row["file"] == Path(path).name]
    if not rows:
        raise InputError(f"{path} has no rows; fetch it again")
    first = min(rows, key=lambda row: row["line"])
    raise InputError(
        f"{path}, line {first['line']}: {first['reason']}; none of the {len(rows)} rows can be "
        "used, correct the file"
    )


def trimmed(column: pa.Array) -> pa.Array:
    """A column of strings without surrounding blanks of any kind."""
    return column if _bytes_within(column, "!", "~") else pc.utf8_trim(column, BLANKS)


def id_reasons(column: pa.Array, name: str) -> dict[int, str]:
    """Row -> reason, in the order of the rows, for ids that cannot be used.

    name: what is identified, for the reason.
    """
    filled = pc.fill_null(pc.greater(pc.binary_length(column), 0), False)
    bad = {n: f"the {name} is empty" for n in _places(pc.invert(filled))}
    if not _bytes_within(column, "!", "~"):
        strange = pc.fill_null(pc.match_substring_regex(column, NO_ID_CHARACTERS), False)
        reason = f"the {name} has a control character or half a surrogate pair"
        bad |= dict.fromkeys(_places(strange), reason)
    return dict(sorted(bad.items()))


@dataclass
class TimeColumn:
    """Timestamps as `whole` plus `fraction` units of 10^-18 (None: all 0); both int64.

    reasons: row -> why it has no timestamp.
    """

    whole: Array
    fraction: Array | None
    reasons: dict[int, str]


def read_times(column: pa.Array) -> TimeColumn:
    """The exact timestamps of a column of integers or of strings without surrounding blanks."""
    if pa.types.is_integer(column.type):
        whole = column.fill_null(0).to_numpy()
        reasons = dict.fromkeys(_places(column.is_null()), "the timestamp is missing")
        negative = dict.fromkeys(np.flatnonzero(whole < 0).tolist(), "the timestamp is negative")
        return TimeColumn(whole, None, reasons | negative)
    if _bytes_within(column, "0", "9"):
        try:
            return TimeColumn(pc.cast(column, pa.int64()).to_numpy(), None, {})
        except (pa.ArrowInvalid, ValueError):  # an empty or null field, or too large
            pass
    return _read_decimals(column.fill_null(""))


def _read_decimals(texts: pa.Array) -> TimeColumn:
    form = f"^(?P<whole>[0-9]{{1,19}})(?:\\.(?P<fraction>[0-9]{{0,{FRACTION_DIGITS}}}))?$"
    parts = pc.extract_regex(texts, form)
    digits = pc.struct_field(parts, "whole")
    simple = pc.fill_null(
        pc.or_(pc.less(pc.binary_length(digits), 19), pc.less_equal(digits, str(LARGEST))), False
    )
    fraction_digits = pc.if_else(simple, pc.struct_field(parts, "fraction"), "")
    whole = pc.cast(pc.if_else(simple, digits, "0"), pa.int64()).to_numpy().copy()
    padded = pc.utf8_rpad(fraction_digits, FRACTION_DIGITS, "0")
    fraction = pc.cast(padded, pa.int64()).to_numpy().copy()
    reasons = {}
    for n in _places(pc.invert(simple)):
        try:
            whole[n], fraction[n] = _exact_time(texts[n].as_py())
        except ValueError as error:
            reasons[n] = f"the timestamp {error}"
    return TimeColumn(whole, fraction if fraction.any() else None, reasons)


def _exact_time(text: str) -> tuple[int, int]:
    """(whole, units of 10^-18) of a number in any notation; ValueError says why it cannot be."""
    if not NUMBER.fullmatch(text):
        raise ValueError("is not a number")
    too_long = f"has more than {FRACTION_DIGITS} digits after the point"
    try:
        value = Decimal(text, EXACT)
    except InvalidOperation:  # an exponent of more digits than Decimal allows
        raise ValueError("is not a number of usual size") from None
    if value < 0:
        raise ValueError("is negative")
    if value > LARGEST:
        raise ValueError("is too large")
    try:
        value = EXACT.quantize(value, Decimal(1).scaleb(-FRACTION_DIGITS))
    except (Inexact, InvalidOperation):
        raise ValueError(too_long) from None
    return divmod(int(value.scaleb(FRACTION_DIGITS, EXACT)), 10**FRACTION_DIGITS)


@dataclass
class Times:
    """The timestamps of one file, batch by batch; `values` gives them as integers."""

    path: PathLike
    whole: list[Array] = field(default_factory=list)
    fraction: list[Array | None] = field(default_factory=list)
    unit_lines: dict[int, int] = field(default_factory=dict)  # unit -> first line that has it

    def append(self, times: TimeColumn, keep: Array, lines: Array) -> None:
        """Add the rows of mask `keep`; lines: line numbers of all rows."""
        if not keep.all():
            lines, whole = lines[keep], times.whole[keep]
            fraction = None if times.fraction is None else times.fraction[keep]
        else:
            whole, fraction = times.whole, times.fraction
        self.whole.append(whole)
        self.fraction.append(fraction)
        if not len(whole):
            return
        unit, highest = np.searchsorted(UNIT_ENDS, [whole.min(), whole.max()], side="right")
        if unit == highest:
            self.unit_lines.setdefault(int(unit), int(lines[0]))
            return
        units = np.searchsorted(UNIT_ENDS, whole, side="right")
        for unit in np.unique(units):
            self.unit_lines.setdefault(int(unit), int(lines[np.argmax(units == unit)]))

    def values(self) -> Array:
        """int64 in the order of the timestamps, equal where they are equal.

        The timestamps themselves if all are integers, else their ranks. Raises InputError if the
        file mixes units of time.
        """
        if len(self.unit_lines) > 1:
            by_line = sorted((line, UNITS[unit]) for unit, line in self.unit_lines.items())
            raise InputError(
                f"{self.path} mixes units of time: "
                + ", ".join(f"line {line} has {unit}" for line, unit in by_line)
                + ", as far as the size of a number tells; convert all timestamps to one unit"
            )
        whole = np.concatenate([np.empty(0, dtype=np.int64), *self.whole])
        if all(fraction is None for fraction in self.fraction):
            return whole
        fractions = [
            np.zeros(len(one), dtype=np.int64) if fraction is None else fraction
            for one, fraction in zip(self.whole, self.fraction, strict=True)
        ]
        fraction = np.concatenate(fractions)
        order = np.lexsort((fraction, whole))
        is_new = (np.diff(whole[order]) != 0) | (np.diff(fraction[order]) != 0)
        rank = np.zeros(len(whole), dtype=np.int64)
        rank[order[1:]] = np.cumsum(is_new)
        return rank


def parse_timestamps(
    frame: pd.DataFrame, path: PathLike, rejected: list[Row]
) -> tuple[pd.DataFrame, list[Row]]:
    """(`frame` with a column time made of its column timestamp, `rejected` plus the rows without
    one).

    time: as in `Times.values`. Raises InputError if no row has a timestamp, or if units are mixed.
    """
    lines = frame["line"].to_numpy()
    found = read_times(trimmed(_as_arrow(frame["timestamp"])))
    keep = np.ones(len(frame), dtype=bool)
    keep[list(found.reasons)] = False
    if len(frame) and not keep.any():
        value, reason = str(frame["timestamp"].iloc[0])[:40], found.reasons[0]
        raise InputError(
            f"{path}, line {lines[0]}: {reason} ({value!r}), nor is that of any other row usable; "
            f"give {TIMESTAMP_FORM}"
        )
    times = Times(path)
    times.append(found, keep, lines)
    reasons = [found.reasons[n] for n in sorted(found.reasons)]
    frame, rejected = reject_rows(frame, ~keep, reasons, Path(path).name, rejected)
    frame["time"] = times.values()
    return frame, rejected


def _opened(path: Path) -> IO[bytes]:
    """The unpacked bytes of a raw file, after a byte order mark.

    Raises InputError if it is missing, empty, packed in another way, or no UTF-8 text at all.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder; put the file of this name there")
    if not path.exists():
        raise InputError(
            f"{path} is missing; the README (Real data) says where to get it and where to put it"
        )
    try:
        with open(path, "rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        opener: Any = gzip.open if packed else open
        file = opener(path, "rb")
        head = file.read(HEAD)
        file.seek(len(BOM) if head.startswith(BOM) else 0)
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged(path, error) from None
    fault = _fault_of(head)
    if fault:
        file.close()
        raise InputError(f"{path} {fault}")
    return file


def _fault_of(head: bytes) -> str | None:
    """What is wrong with a file that starts like this, with the remedy."""
    if not head.removeprefix(BOM):
        return "is empty; fetch it again"
    for magic, name in PACKED.items():
        if re.match(magic, head):
            return f"is packed ({name}); unpack it and give the unpacked file this name"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "is UTF-16 text; save it as UTF-8"
    if WEB_PAGE.match(head.removeprefix(BOM)):
        return "is a web page and not the data; fetch the file again"
    if head.startswith(LFS_POINTER):
        return "is a git-lfs pointer and not the data; fetch the file with `git lfs pull`"
    if b"\0" in head:
        return "holds NUL bytes, as UTF-16 text and binary files do; save it as UTF-8 text"
    return None


def _damaged(path: Path, error: Exception) -> InputError:
    """The error for a file that cannot be read to its end."""
    if isinstance(error, PermissionError):
        return InputError(f"{path} cannot be opened ({error.strerror}); make it readable")
    line = 0
    try:
        with gzip.open(path) as file:
            for _ in file:
                line += 1
    except (OSError, EOFError, zlib.error):
        pass
    return InputError(f"{path} is truncated or damaged after line {line} ({error}); fetch it again")


def _blocks(path: Path) -> Iterator[bytes]:
    """The content of a raw file in blocks of whole lines (that end with \\n).

    The next block is read and unpacked in a thread while the caller works on the last one.
    """
    blocks = _read_blocks(path)
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(next, blocks, b"")
        while block := ahead.result():
            ahead = pool.submit(next, blocks, b"")
            yield block


def _read_blocks(path: Path) -> Iterator[bytes]:
    rest: list[bytes] = []
    with _opened(path) as file:
        while True:
            try:
                piece = file.read(BLOCK)
            except (OSError, EOFError, zlib.error) as error:
                raise _damaged(path, error) from None
            if not piece:
                break
            end = piece.rfind(b"\n") + 1
            if end:
                yield b"".join([*rest, memoryview(piece)[:end]])
                rest = []
            if end < len(piece):
                rest.append(piece[end:])
    if rest:
        yield b"".join(rest)


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
    for block in _blocks(form.path):
        _check_utf8(form.path, block, first)
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


def _check_utf8(path: Path, block: bytes, first: int) -> None:
    """Raise InputError naming line and byte. first: line number of the block's start."""
    if block.isascii():
        return
    try:
        block.decode()
    except UnicodeDecodeError as error:
        before = (block[: error.start] + b"x").splitlines()
        raise InputError(
            f"{path}, line {first + len(before) - 1}: byte {len(before[-1])} is not UTF-8; save "
            "the file as UTF-8"
        ) from None


def _json_table(block: bytes, n_lines: int, columns: Mapping[str, pa.DataType]) -> pa.Table | None:
    """The block as Arrow reads it; None if Arrow refuses it or not every line is one object."""
    options = pajson.ParseOptions(
        explicit_schema=pa.schema(columns), unexpected_field_behavior="ignore"
    )
    try:
        table = pajson.read_json(
            pa.BufferReader(block),
            read_options=pajson.ReadOptions(block_size=BLOCK // 4),
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
            values[name].append(_without_surrogates(row.get(name)))
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


def _without_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return SURROGATE.sub("\ufffd", value)
    if isinstance(value, list):
        return [_without_surrogates(part) for part in value]
    if isinstance(value, dict):
        return {key: _without_surrogates(part) for key, part in value.items()}
    return value


def _bytes_within(column: pa.Array, low: str, high: str) -> bool:
    """Whether every byte of a column of strings is in the range (of ASCII characters)."""
    if not len(column):
        return True
    _, offsets, data = column.buffers()
    ends = np.frombuffer(offsets, dtype=np.int32)[[column.offset, column.offset + len(column)]]
    if data is None or ends[0] == ends[1]:
        return True
    found = np.frombuffer(data, dtype=np.uint8)[ends[0] : ends[1]]
    return bool(found.min() >= ord(low) and found.max() <= ord(high))


def _places(mask: pa.Array) -> list[int]:
    return np.flatnonzero(mask.to_numpy(zero_copy_only=False)).tolist()


def _as_arrow(column: pd.Series) -> pa.Array:
    """A column of a DataFrame as one Arrow array of strings."""
    array = pa.array(column, from_pandas=True)
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
    return array.cast(pa.string())
