"""A raw table becomes a log of interactions or a catalogue; rows that cannot be used are rejected.

Ids are texts: `007`, `1e5`, `NA` and `null` stay what they are; blanks around them are removed.
Times are numbers of one unit, seconds or smaller, with at most six digits after the point.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd

from mllmrec.data.interactions import InteractionLog
from mllmrec.data.raw_files import RawTable, run
from mllmrec.stage.errors import InputError
from mllmrec.stage.schema import Row

logger = logging.getLogger(__name__)

UNITS = ("seconds", "milliseconds", "microseconds", "nanoseconds")
UNIT_ENDS = (10**11, 10**14, 10**17)  # smallest times of the last three units
CONTROL = r"[\x00-\x1f\x7f-\x9f]"
INVISIBLE = r"[\s\u00ad\u200b-\u200f\u2060\ufeff]*"  # of a title without a character to see
MOST_WITH_FRACTION = 9 * 10**12  # as millionths it fits into 64 bit
BLANKS = "".join(character for character in map(chr, range(0x3001)) if character.isspace())
NO_TIME = "the timestamp is not a number such as 1589233210 or 1589233210.25 (at most six digits)"
# A log with its times as whole numbers and millionths; anything but digits takes longer.
RAW = """
SELECT {row}{user} AS user_id, {item} AS item_id,
    try_cast(CASE WHEN regexp_full_match(text, '[0-9]{{1,19}}') THEN text
        ELSE regexp_extract(text, '^\\s*([0-9]{{1,19}})([.][0-9]{{0,6}}0*)?\\s*$', 1)
        END AS BIGINT) AS whole,
    CASE WHEN contains(text, '.')
        THEN try_cast(rpad(regexp_extract(text, '[.]([0-9]{{0,6}})', 1), 6, '0') AS INTEGER)
        ELSE 0 END AS millionths
FROM (SELECT *, {time} AS text FROM {scan})
"""
# The ids of a column: as in the file, without blanks, why it cannot be used, and its code. Codes
# count up in the order of the ids, shorter ones first, those that cannot be used last.
IDS = """
CREATE TABLE {column}s AS
SELECT *, dense_rank() OVER (ORDER BY reason IS NOT NULL, length(id), id)::INTEGER - 1 AS code
FROM (SELECT *, CASE WHEN id = '' THEN 'the {name} is empty'
        WHEN NOT is_plain AND regexp_matches(id, '\\p{{Cc}}')
        THEN 'the {name} has a line break or control character'
        {more} END AS reason
    FROM (SELECT {column} AS raw_id, min(rowid) AS first_row,
            regexp_full_match(raw_id, '[!-~]*') AS is_plain,
            CASE WHEN is_plain THEN raw_id ELSE trim(raw_id, $blanks) END AS id
        FROM raw GROUP BY raw_id))
"""
UNKNOWN = "WHEN id NOT IN (SELECT id FROM known) THEN concat('the item ', id, ' ', $unknown)"
REJECTED = """
SELECT {row} AS row, coalesce(CASE WHEN whole IS NULL THEN $no_time END, u.reason, i.reason) AS why
FROM raw LEFT JOIN (FROM user_ids WHERE reason IS NOT NULL) u ON user_id = u.raw_id
    LEFT JOIN (FROM item_ids WHERE reason IS NOT NULL) i ON item_id = i.raw_id
WHERE why IS NOT NULL ORDER BY raw.rowid
"""
CODED = """
CREATE TABLE coded AS SELECT u.code AS user, i.code AS item, {time} AS time, raw.rowid AS row
FROM raw JOIN user_ids u ON user_id = u.raw_id JOIN item_ids i ON item_id = i.raw_id
WHERE whole IS NOT NULL AND u.reason IS NULL AND i.reason IS NULL
"""
# Calendar days as whole numbers: 20200131 sorts, 31012020 (or 01312020) does not.
DAYS = """(whole BETWEEN 19900101 AND 20691231 AND whole // 100 % 100 BETWEEN 1 AND 12
    AND whole % 100 BETWEEN 1 AND 31)"""
REVERSED_DAYS = """(whole % 10000 BETWEEN 1990 AND 2069 AND whole // 10000 % 100 BETWEEN 1 AND 31
    AND whole // 1000000 BETWEEN 1 AND 31)"""
SECONDS = 5 * 10**8  # of 1985; days as numbers are smaller
# Groups of ids that differ in case, blanks, leading zeros, `.0` or in how accents are composed.
ALIKE = "SELECT bool_and(regexp_full_match(id, '[A-Z1-9][A-Z0-9]*')) FROM {column}s"  # cannot
SPELLINGS = """
SELECT count(*), min(one), arg_min(other, one) FROM (
    SELECT min(id) AS one, max(id) AS other FROM {column}s WHERE reason IS NULL
    GROUP BY regexp_replace(regexp_replace(lower(nfc_normalize(id)), '[\\s\\p{{Z}}]+', ' ', 'g'),
        '^0*([0-9]+)([.]0+)?$', '\\1')
    HAVING one != other)
"""


def read_log(
    table: RawTable, known: Sequence[str] | None = None, unknown: str = ""
) -> tuple[InteractionLog, list[Row]]:
    """(log, rejected rows) of a table whose columns are user, item and time, in this order.

    known: ids of the items that may occur, None: any; unknown: what is wrong with another one, as
    "has no title". Raises InputError if no row can be used or the times are of several units.
    """
    user, item, _ = table.columns
    with duckdb.connect() as database:
        extra = "" if table.row == "rowid" else f"{table.row}, "
        fields = dict(zip(("user", "item", "time"), table.columns.values(), strict=True))
        table.create(database, RAW.format(row=extra, scan=table.scan, **fields))
        run(database, IDS.format(column="user_id", name=user, more=""), blanks=BLANKS)
        more: dict[str, Any] = {}
        if known is not None:
            database.register("known", pd.DataFrame({"id": known}, dtype="str"))
            more = {"unknown": unknown}
        query = IDS.format(column="item_id", name=item, more=UNKNOWN if more else "")
        run(database, query, blanks=BLANKS, **more)
        bad = run(database, REJECTED.format(row=table.row), no_time=NO_TIME).fetchall()
        rejected = table.rejected(bad)
        run(database, CODED.format(time=_time_in_one_unit(database, table)))
        run(database, "DROP TABLE raw")
        log = run(database, "SELECT user, item, time FROM coded ORDER BY user, time, row")
        columns = log.fetchnumpy()
        for column, kind in (("user_id", user), ("item_id", item)):
            _warn_of_spellings(database, table, column, kind)
        users, items = (
            run(
                database,
                f"SELECT id, min(first_row) AS first_row FROM {name} WHERE reason IS NULL "
                "GROUP BY code, id ORDER BY code",
            ).fetchnumpy()
            for name in ("user_ids", "item_ids")
        )
    require_rows(len(columns["user"]), table, rejected)
    codes = (columns["user"], columns["item"], columns["time"])
    return InteractionLog(users["id"], items["id"], *codes, users["first_row"]), rejected


def require_dates(log: InteractionLog, path: Path) -> None:
    """Raise InputError for times of a published log that are no time since 1970, as ratings are."""
    if log.time.max() < SECONDS:
        raise InputError(
            f"{path}: no time is after 1985; check that its columns are those of the published file"
        )


def _time_in_one_unit(database: duckdb.DuckDBPyConnection, table: RawTable) -> str:
    """SQL of the time as an integer. Raises InputError if the file mixes units of time."""
    extremes = "SELECT max(millionths), min(whole), max(whole) FROM raw WHERE whole IS NOT NULL"
    fraction, least, most = run(database, extremes).fetchall()[0]
    if not most:
        return "whole"
    first, last = np.searchsorted(UNIT_ENDS, [least, most], side="right")
    if first != last:
        query = f"SELECT min({table.row}) FROM raw WHERE whole IS NOT NULL GROUP BY whole < $end"
        rows = run(database, f"{query} ORDER BY 1", end=UNIT_ENDS[first]).fetchall()
        lines = [entry["line"] for entry in table.rejected((row, "") for (row,) in rows)]
        raise InputError(
            f"{table.path} mixes units of time, {UNITS[first]} and {UNITS[last]} by their size, as "
            f"in lines {lines[0]} and {lines[1]}; convert all times to one unit"
        )
    if first == 0 and least < 10**8 and most >= 10**6:  # what days as numbers may be
        _check_days(database, table)
    if fraction and most > MOST_WITH_FRACTION:
        raise InputError(f"{table.path} has fractions of {UNITS[last]}; round them")
    return "whole * 1000000 + millionths" if fraction else "whole"


def _check_days(database: duckdb.DuckDBPyConnection, table: RawTable) -> None:
    """Raise InputError for calendar days among seconds, and for days that do not sort."""
    query = f"""SELECT min({table.row}) FILTER ({DAYS} OR {REVERSED_DAYS}),
        min({table.row}) FILTER (whole >= {SECONDS}), bool_and({REVERSED_DAYS})
        FROM raw WHERE whole IS NOT NULL"""
    day, second, is_reversed = run(database, query).fetchall()[0]
    if day is not None and (second is not None or is_reversed):
        rows = sorted(row for row in (day, second) if row is not None)
        lines = " and line ".join(str(row["line"]) for row in table.rejected((n, "") for n in rows))
        problem = "days among its seconds" if second is not None else "days that do not sort"
        raise InputError(
            f"{table.path} has {problem} in its times, as in line {lines}; write all times as "
            "seconds, or all as days of the form 20200131"
        )


def _warn_of_spellings(
    database: duckdb.DuckDBPyConnection, table: RawTable, column: str, kind: str
) -> None:
    """Warn of ids that are probably one: each of their spellings counts as an id of its own."""
    if run(database, ALIKE.format(column=column)).fetchall()[0][0]:
        return
    number, one, other = run(database, SPELLINGS.format(column=column)).fetchall()[0]
    if number:
        logger.warning(
            f"{table.path.name}: {number:,} ids of the column {kind} occur in several spellings, "
            f"as {one!r} and {other!r}, and each counts as one of its own; if they are the same, "
            "write them alike"
        )


def read_titles(table: RawTable) -> tuple[pd.DataFrame, list[Row]]:
    """(catalogue, rejected rows) of a table whose first columns are the item's id and its title.

    catalogue: indexed by item id, column title and the further ones. Raises InputError if no row
    can be used.
    """
    frame = table.frame()
    name, title = frame.columns[:2]
    ids, blank = frame[name].str.strip(), frame[title].str.fullmatch(INVISIBLE)
    reason = pd.Series("", index=frame.index)
    reason[ids.where(~blank).duplicated()] = "the item has a title already"
    reason[blank] = "the title is empty"
    has_control = ids.str.contains(CONTROL, regex=True)
    reason[has_control] = f"the {name} has a line break or control character"
    reason[ids == ""] = f"the {name} is empty"
    bad = reason[reason != ""]
    rejected = table.rejected(zip(bad.index.tolist(), bad, strict=True))
    require_rows(len(frame) - len(bad), table, rejected)
    frame = frame[reason == ""].set_index(ids[reason == ""]).drop(columns=name)
    return frame.rename(columns={title: "title"}), rejected


def require_rows(number: int, table: RawTable, rejected: Sequence[Row]) -> None:
    """Raise InputError with the first reason if no row of a table is left."""
    if number == 0 and not rejected:
        raise InputError(f"{table.path} has no rows; fetch it again")
    if number == 0:
        raise InputError(
            f"{table.path}, line {rejected[0]['line']}: {rejected[0]['reason']}; none of the "
            f"{len(rejected)} rows can be used, correct the file"
        )


def require_unique(table: RawTable, *names: str) -> None:
    """Raise InputError, naming both lines, for a value that a column of a table has twice."""
    frame = table.frame()
    for name in names:
        values = frame[name].str.strip()
        for value in values[values.duplicated() & (values != "")].head(1):
            rows = np.flatnonzero(values == value)[:2].tolist()
            first, second = (row["line"] for row in table.rejected((n, "") for n in rows))
            raise InputError(
                f"{table.path}, line {second}: {name} {value!r} is already in line {first}; keep "
                "one of the two"
            )
