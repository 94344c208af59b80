"""Raw files as tables: DuckDB parses them, strictly, and one sentence says what is wrong.

A file may be plain or gzipped, with or without a UTF-8 byte order mark, whatever its name says. A
CSV file with a line that is no row is refused. Lines are counted from 1, blank ones included.
"""

import csv
import gzip
import io
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import duckdb
import pandas as pd
from pydantic_core import from_json

from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import PathLike
from mllmrec.stage.schema import Row

GZIP, BOM = b"\x1f\x8b", b"\xef\xbb\xbf"
HEAD = 4096  # bytes that show what kind of file it is
# How files start whose text cannot be read, and what to do about it.
KINDS = {
    rb"\s*$": "is empty; fetch it again",
    rb"BZh[1-9]": "is packed (bzip2); unpack it",
    rb"PK\x03\x04": "is packed (zip); unpack it",
    rb"\xfd7zXZ\x00": "is packed (xz); unpack it",
    rb"\x28\xb5\x2f\xfd": "is packed (zstd); unpack it",
    GZIP: "is packed (gzip, twice); unpack it once",
    rb"\xff\xfe|\xfe\xff": "is UTF-16 text; save it as UTF-8",
    rb"\s*<(?i:!doctype|html|head|body|\?xml|!--)": "is a web page, not the data; fetch it again",
    rb"(?s).*\x00": "holds NUL bytes, as UTF-16 text and binary files do; save it as UTF-8 text",
    rb"[^\n]*\r[^\n]": "has lines that end with \\r alone; save it with \\n",
}
# DuckDB's names for lines that are no rows.
FAULTS = {
    "MISSING COLUMNS": "too few fields",
    "TOO MANY COLUMNS": "too many fields",
    "UNQUOTED VALUE": "a double quote opens a field and is not closed at its end",
    "INVALID ENCODING": "bytes that are not UTF-8",
}
SHOWN = 200  # characters of a rejected row


def check_raw_file(path: PathLike) -> Path:
    """`path` as a Path. Raises InputError if it is no file whose text can be read."""
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder; put the file of this name there")
    if not path.exists():
        raise InputError(
            f"{path} is missing; docs/data.md says where to get it and where to put it"
        )
    if not path.is_file():  # a pipe or a device could be read for ever
        raise InputError(f"{path} is no regular file; put a copy of the data there")
    with open_raw(path) as file:
        head = file.read(HEAD)
    for start, problem in KINDS.items():
        if re.match(start, head):
            raise InputError(f"{path} {problem}")
    return path


def only_file(folder: Path, names: Sequence[str], missing: str) -> Path:
    """The one of the files `names` that is in the folder, checked.

    missing: message of the InputError if none is. Raises InputError if there are two, too.
    """
    paths = [folder / name for name in names if (folder / name).exists()]
    if not paths:
        raise InputError(missing)
    if len(paths) > 1:
        raise InputError(
            f"{folder} has both {paths[0].name} and {paths[1].name}; keep one of them there"
        )
    return check_raw_file(paths[0])


@contextmanager
def open_raw(path: Path) -> Iterator[IO[bytes]]:
    """The unpacked bytes of a raw file, after a byte order mark.

    Raises InputError where the file turns out to be truncated.
    """
    opener: Any = gzip.open if _is_gzipped(path) else open
    try:
        with opener(path, "rb") as file:
            file.seek(len(BOM) if file.read(len(BOM)) == BOM else 0)
            yield file
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path} is truncated or damaged ({error}); fetch it again") from None


def _is_gzipped(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(len(GZIP)) == GZIP


@dataclass(frozen=True)
class RawTable:
    """A raw file and how DuckDB reads it.

    columns: name -> SQL of its text; scan: SQL of the table, of which $path is the file; form: of a
    CSV file, options of csv.reader; None: JSONL; row: SQL of a row's number, from 0.
    """

    path: Path
    columns: Mapping[str, str]
    scan: str
    form: Mapping[str, Any] | None = None
    has_header: bool = False
    row: str = "rowid"

    def frame(self) -> pd.DataFrame:
        """The columns as strings; fields may have line breaks."""
        fields = ", ".join(f'{sql} AS "{name}"' for name, sql in self.columns.items())
        with duckdb.connect() as database:
            self.create(database, f"SELECT {fields} FROM {self.scan}")
            return run(database, "SELECT * FROM raw ORDER BY rowid").df().astype("str")

    def create(self, database: duckdb.DuckDBPyConnection, query: str, **parameters: Any) -> None:
        """Create the table `raw` of a query about the scan.

        Raises InputError, naming the first line that is no row, for a file that is no such table.
        """
        parameters |= {"path": str(self.path)}
        try:
            run(database, f"CREATE TABLE raw AS {query}", **parameters)
        except duckdb.OutOfMemoryException as error:
            raise MemoryError(str(error)) from None
        except duckdb.Error as error:
            if self.form is None:
                self._check_json()
            reason = str(error).splitlines()[0].partition("Error: ")[2]
            raise InputError(
                f"{self.path}: {reason}; check its quotes and line ends, or fetch it again"
            ) from None
        if self.form is not None:
            self._check_no_faults(database)

    def _check_no_faults(self, database: duckdb.DuckDBPyConnection) -> None:
        first = "arg_min(error_type, byte_position), min(byte_position)"
        faults = f"SELECT count(DISTINCT line), {first} FROM reject_errors"
        number, kind, position = run(database, faults).fetchall()[0]
        if number:
            with open_raw(self.path) as file:  # DuckDB does not count line breaks inside fields
                line = 1 + file.read(position - 1 - file.tell()).count(b"\n")
            more = f" (and {number - 1} more such lines)" if number > 1 else ""
            raise InputError(
                f"{self.path}, line {line}: {FAULTS.get(kind, kind.lower())}{more}; correct the "
                "file or fetch it again"
            )

    def _check_json(self) -> None:
        """Raise InputError for the first line that is not JSON."""
        with open_raw(self.path) as file:
            for number, line in enumerate(file, start=1):
                try:
                    from_json(line.strip() or b"null")
                except ValueError as error:
                    raise InputError(
                        f"{self.path}, line {number}: not valid JSON ({error}); fetch the file "
                        "again or remove the line"
                    ) from None

    def rejected(self, reasons: Iterable[tuple[int, str]]) -> list[Row]:
        """Entries of X.rejected.jsonl. reasons: (row number from 0, reason), in this order."""
        entries: list[Row] = []
        with open_raw(self.path) as file:
            records = enumerate(self._records(file), start=-self.has_header)
            row, (line, text) = next(records)
            for wanted, reason in reasons:
                while row < wanted:
                    row, (line, text) = next(records)
                entry = {"file": self.path.name, "line": line, "row": text[:SHOWN]}
                entries.append(entry | {"reason": reason})
        return entries

    def _records(self, file: IO[bytes]) -> Iterator[tuple[int, str]]:
        """(line, text) of the header and the rows, without blank lines."""
        lines = io.TextIOWrapper(file, "utf-8", newline="")
        if self.form is None:
            yield from ((n, line.strip()) for n, line in enumerate(lines, 1) if line.strip())
            return
        csv.field_size_limit(1 << 30)
        reader, start = csv.reader(lines, **self.form), 1
        for fields in reader:
            if fields:
                yield start, self.form["delimiter"].join(fields)
            start = reader.line_num + 1


def csv_table(
    path: PathLike,
    columns: Sequence[str],
    names: Sequence[str] = (),
    delimiter: str = ",",
    quoted: bool = True,
) -> RawTable:
    """The columns of a CSV file. names: of all its columns, for a file without a header.

    Raises InputError for a file of another kind or a header that lacks a column.
    """
    path = check_raw_file(path)
    found = names or header_of(path, columns, delimiter)
    kinds = ", ".join(f"'c{n}': 'VARCHAR'" for n in range(len(found)))
    quote = '"' if quoted else ""
    scan = (
        f"read_csv($path, columns={{{kinds}}}, auto_detect=false, header={not names}, "
        f"delim='{delimiter}', quote='{quote}', escape='{quote}', strict_mode=true, "
        f"store_rejects=true, compression='{'gzip' if _is_gzipped(path) else 'none'}')"
    )
    fields = {name: f"coalesce(c{found.index(name)}, '')" for name in columns}
    form = {"delimiter": delimiter, "quoting": csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE}
    return RawTable(path, fields, scan, form, has_header=not names)


def header_of(path: PathLike, wanted: Sequence[str] = (), delimiter: str = ",") -> list[str]:
    """The fields of a CSV file's first line. Raises InputError if a wanted one is missing."""
    with open_raw(check_raw_file(path)) as file:
        line = file.readline().decode("utf-8", "replace")
    names = [name.strip() for name in next(csv.reader([line], delimiter=delimiter), [""])]
    between = "tabs" if delimiter == "\t" else "commas"
    for name in wanted:
        if names.count(name) != 1:
            problem = "is missing" if name not in names else "is there twice"
            raise InputError(
                f"{path}, line 1: column {name!r} {problem}; the header is {line.strip()[:300]!r}, "
                f"docs/data.md has the expected form, with {between} between columns"
            )
    return names


def json_table(path: PathLike, keys: Sequence[str]) -> RawTable:
    """Keys of the objects in a JSONL file; what is no string is JSON text."""
    path = check_raw_file(path)
    kinds = ", ".join(f"'{key}': 'VARCHAR'" for key in keys)
    scan = (
        f"read_json($path, columns={{{kinds}}}, format='newline_delimited', "
        f"compression='{'gzip' if _is_gzipped(path) else 'none'}')"
    )
    return RawTable(path, {key: f"coalesce(\"{key}\", '')" for key in keys}, scan)


def run(
    database: duckdb.DuckDBPyConnection, query: str, **parameters: Any
) -> duckdb.DuckDBPyConnection:
    """The result of a query, from a thread: in the main one DuckDB would swallow Ctrl-C."""
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(database.execute, query, parameters or None)
        try:
            return result.result()
        except BaseException:
            database.interrupt()
            raise
