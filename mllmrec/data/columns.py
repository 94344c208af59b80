"""Columns as lines of JSON, joined by Arrow: millions of lines in seconds.

A column is an Arrow array of bytes, each value as it stands in the file.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mllmrec.data.interactions import Array
from mllmrec.stage.jsonl import atomic_file

LINES = 100_000  # that are text at a time
ESCAPED = r'["\\\x00-\x1f]'  # what JSON writes in another way


def encoded(values: Any) -> pa.Array:
    """Texts, an array or list of them, as JSON; None becomes null."""
    texts = pa.array(values, pa.string())
    special = pc.fill_null(pc.match_substring_regex(texts, ESCAPED), False)
    quoted = pc.binary_join_element_wise('"', texts, '"', "")
    encode = json.JSONEncoder(ensure_ascii=False).encode
    others = pa.array([encode(text) for text in texts.filter(special).to_pylist()], pa.string())
    quoted = pc.fill_null(pc.replace_with_mask(quoted, special, others), "null")
    return quoted.cast(pa.binary())


def numbers(values: Array) -> pa.Array:
    """Whole numbers as JSON."""
    return pa.array(values, pa.int64()).cast(pa.string()).cast(pa.binary())


def encoded_lists(values: pa.Array, ends: Array) -> pa.Array:
    """Lists of encoded values, the n-th up to the value `ends[n]`."""
    offsets = pa.array(np.append(0, ends), pa.int32())
    joined = pc.binary_join(pa.ListArray.from_arrays(offsets, values), b", ")
    return pc.binary_join_element_wise(b"[", joined, b"]", b"")


def json_lines(**columns: pa.Array) -> Iterator[bytes]:
    """Lines with these keys, many at a time, as `json.dumps` writes them."""
    number = len(next(iter(columns.values())))
    for start in range(0, number, LINES):
        parts: list[pa.Array | bytes] = []
        for name, column in columns.items():
            parts += [f'{", " if parts else "{"}"{name}": '.encode(), column[start : start + LINES]]
        lines = pc.binary_join_element_wise(*parts, b"}\n", b"")
        whole = pa.ListArray.from_arrays(pa.array([0, len(lines)], pa.int32()), lines)
        yield pc.binary_join(whole, b"")[0].as_py()


def write_lines(path: Path, lines: Iterable[bytes]) -> None:
    """Write lines, each item one or many, to a file that is whole or not there."""
    with atomic_file(path) as file:
        file.writelines(lines)
