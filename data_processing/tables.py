"""Reading delimited raw files as columns, with one clear sentence when a file is not what it should be."""

from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.csv as pacsv

from data_processing.errors import InputError


def read_table(path, columns, delimiter=",", header=True, quoted=True):
    """(DataFrame of strings with the named columns and `line`, list of refused rows).

    path: UTF-8 file; columns: names that are wanted, in file order if there is no header; a row with another number of
    fields is refused. `line` is the row's number among the file's records, counted from 1 (a quoted line break does
    not count). Raises InputError for a missing or empty file, an undecodable byte or a missing column.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path} is missing; the README, section «Real data», says where to get it and where to put it")
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty; fetch it again")
    refused = []

    def refuse(row):
        line = (row.number or 0) - 0
        refused.append(
            {"file": path.name, "line": line, "row": row.text, "reason": f"{row.actual_columns} fields in place of {row.expected_columns}"}
        )
        return "skip"

    names = None if header else list(columns)
    types = dict.fromkeys(columns, pa.string())
    try:
        table = pacsv.read_csv(
            path,
            read_options=pacsv.ReadOptions(column_names=names, use_threads=False),
            parse_options=pacsv.ParseOptions(
                delimiter=delimiter, quote_char='"' if quoted else False, newlines_in_values=quoted, invalid_row_handler=refuse
            ),
            convert_options=pacsv.ConvertOptions(column_types=types, strings_can_be_null=False),
        )
    except pa.ArrowInvalid as error:
        raise InputError(_undecodable(path) or f"{path} cannot be read as a table: {' '.join(str(error).split())}") from None
    missing = [name for name in columns if name not in table.column_names]
    if missing:
        raise InputError(
            f"{path}, line 1: column {missing[0]!r} is missing; the file has {', '.join(table.column_names)}; rename the column or "
            "see the README, section «Real data», for the expected form"
        )
    frame = table.select(list(columns)).to_pandas()
    bad_lines = {row["line"] for row in refused}
    numbers = (n for n in range(2 if header else 1, len(frame) + len(refused) + 2) if n not in bad_lines)
    frame["line"] = pd.Series([next(numbers) for _ in range(len(frame))], dtype="int64")
    return frame, refused


def first_fields(path, delimiter=","):
    """The fields of a file's first line, to find out whether it is a header."""
    with open(path, "rb") as file:
        return file.readline().decode("utf-8-sig", "replace").strip().split(delimiter)


def _undecodable(path):
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return f"{path}, line {number}: byte {error.start + 1} is not UTF-8; save the file as UTF-8"
    return None
