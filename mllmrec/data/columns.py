"""Columns of raw files: rejected rows, and ids without surrounding blanks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import PathLike
from mllmrec.stage.schema import Row

BLANKS = "\t\n\v\f\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000"
BLANKS += "".join(map(chr, range(0x2000, 0x200C))) + "\u2060\ufeff"  # with those of no width
NO_ID_CHARACTERS = "[\\p{Cc}\u2028\u2029\ufffd]"  # U+FFFD: half a surrogate pair


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
        ids = as_arrow(frame[column])
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
    return column if bytes_within(column, "!", "~") else pc.utf8_trim(column, BLANKS)


def id_reasons(column: pa.Array, name: str) -> dict[int, str]:
    """Row -> reason, in the order of the rows, for ids that cannot be used.

    name: what is identified, for the reason.
    """
    filled = pc.fill_null(pc.greater(pc.binary_length(column), 0), False)
    bad = {n: f"the {name} is empty" for n in places(pc.invert(filled))}
    if not bytes_within(column, "!", "~"):
        strange = pc.fill_null(pc.match_substring_regex(column, NO_ID_CHARACTERS), False)
        reason = f"the {name} has a control character or half a surrogate pair"
        bad |= dict.fromkeys(places(strange), reason)
    return dict(sorted(bad.items()))


def bytes_within(column: pa.Array, low: str, high: str) -> bool:
    """Whether every byte of a column of strings is in the range (of ASCII characters)."""
    if not len(column):
        return True
    _, offsets, data = column.buffers()
    ends = np.frombuffer(offsets, dtype=np.int32)[[column.offset, column.offset + len(column)]]
    if data is None or ends[0] == ends[1]:
        return True
    found = np.frombuffer(data, dtype=np.uint8)[ends[0] : ends[1]]
    return bool(found.min() >= ord(low) and found.max() <= ord(high))


def places(mask: pa.Array) -> list[int]:
    """Row numbers where a mask is true."""
    return np.flatnonzero(mask.to_numpy(zero_copy_only=False)).tolist()


def as_arrow(column: pd.Series) -> pa.Array:
    """A column of a DataFrame as one Arrow array of strings."""
    array = pa.array(column, from_pandas=True)
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
    return array.cast(pa.string())
