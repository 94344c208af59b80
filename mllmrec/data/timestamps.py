"""Exact timestamps of raw files: integers of one unit, or ranks where there are fractions."""

import re
from dataclasses import dataclass, field
from decimal import Context, Decimal, Inexact, InvalidOperation
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from mllmrec.data.columns import as_arrow, bytes_within, places, reject_rows, trimmed
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import PathLike
from mllmrec.stage.schema import Row

Array = np.ndarray[Any, Any]

TIMESTAMP_FORM = "seconds or milliseconds since 1970, e.g. 1589233210 or 1589233210.25"
UNITS = ("seconds", "milliseconds", "microseconds", "nanoseconds")
UNIT_ENDS = np.array([10**11, 10**14, 10**17])  # smallest values of the last three units
FRACTION_DIGITS = 18  # of a timestamp; as an integer they fit into int64
LARGEST = 2**63 - 1
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE | re.ASCII)
EXACT = Context(prec=60, traps=[Inexact, InvalidOperation])


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
        reasons = dict.fromkeys(places(column.is_null()), "the timestamp is missing")
        negative = dict.fromkeys(np.flatnonzero(whole < 0).tolist(), "the timestamp is negative")
        return TimeColumn(whole, None, reasons | negative)
    if bytes_within(column, "0", "9"):
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
    for n in places(pc.invert(simple)):
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
    found = read_times(trimmed(as_arrow(frame["timestamp"])))
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
