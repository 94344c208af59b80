"""Raw files are checked when they are read: bad ones end in one sentence, and no row is lost."""

import bz2
import gzip
import json
import lzma
import re
from decimal import Decimal

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from conftest import REAL, skip_without_real_data
from hypothesis import given, settings
from hypothesis import strategies as st
from mllmrec.data.columns import BLANKS, clean_ids, require_rows
from mllmrec.data.tables import (
    first_fields,
    read_table,
    read_text_table,
    stream_jsonl,
    stream_table,
)
from mllmrec.data.timestamps import parse_timestamps

from mllmrec.data import raw_files, tables
from mllmrec.data.raw_files import check_raw_file
from mllmrec.stage.errors import InputError

COLUMNS = ("user", "item", "timestamp")
KINDS = {
    "id": pa.string(),
    "n": pa.int64(),
    "texts": pa.list_(pa.string()),
    "images": pa.list_(pa.struct({"large": pa.string()})),
}
PLAIN = b"user,item,timestamp\nu1,a,1\nu2,b,2\n"


@pytest.fixture
def write(tmp_path):
    def write(content, name="x.csv"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def error_of(work, *arguments):
    """The message of the InputError: one sentence."""
    with pytest.raises(InputError) as caught:
        work(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def rows_of(path, columns=COLUMNS, **form):
    frame, rejected = read_table(path, columns, **form)
    return frame.to_numpy().tolist(), rejected


def streamed(path, columns=COLUMNS):
    rejected = []
    batches = list(stream_table(path, columns, rejected))
    return [list(row.values()) for batch in batches for row in batch.to_pylist()], rejected


def json_rows(path, kinds=KINDS):
    return [row for batch in stream_jsonl(path, kinds) for row in batch.to_pylist()]


# What kind of file it is


@pytest.mark.parametrize("name", ["x.csv", "x.csv.gz"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_file_is_recognised_by_its_content(write, name, pack, mark):
    path = write(pack(mark + PLAIN), name)
    expected = [["u1", "a", "1", 2], ["u2", "b", "2", 3]]
    assert rows_of(path) == streamed(path) == (expected, [])
    assert first_fields(path) == ["user", "item", "timestamp"]
    lines = write(pack(mark + b'{"id": "a"}\n{"id": "b"}\n'), "x.jsonl")
    assert [(row["id"], row["line"]) for row in json_rows(lines)] == [("a", 1), ("b", 2)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; fetch it again"),
        (b"\xef\xbb\xbf", "is empty; fetch it again"),
        (gzip.compress(b"", mtime=0), "is empty; fetch it again"),
        (bz2.compress(PLAIN), r"is packed \(bzip2\); unpack it"),
        (lzma.compress(PLAIN), r"is packed \(xz\); unpack it"),
        (b"PK\x03\x04" + bytes(30), r"is packed \(zip\); unpack it"),
        (b"x.csv".ljust(257, b"\0") + b"ustar", r"is packed \(tar\); unpack it"),
        (
            gzip.compress(gzip.compress(PLAIN, mtime=0), mtime=0),
            r"is packed \(gzip, twice\); unpack it",
        ),
        (
            gzip.compress(PLAIN, mtime=0)[:6],
            r"truncated or damaged after line 0 .*; fetch it again",
        ),
        (b"\x1f\x8b", r"truncated or damaged after line 0 .*; fetch it again"),
        (
            gzip.compress(PLAIN, mtime=0)[:-3],
            r"truncated or damaged after line 3 .*; fetch it again",
        ),
        (
            gzip.compress(PLAIN, mtime=0) + b"rest",
            r"truncated or damaged after line 3 .*; fetch it again",
        ),
        (b"\x1f\x8b\x08" + bytes(40), r"truncated or damaged after line 0 .*; fetch it again"),
        (PLAIN.decode().encode("utf-16"), "is UTF-16 text; save it as UTF-8"),
        (PLAIN.decode().encode("utf-16-le"), "holds NUL bytes, .*; save it as UTF-8"),
        (b"\n <!DOCTYPE html><html>", "is a web page and not the data; fetch"),
        (b'<?xml version="1.0"?><Error>', "is a web page and not the data; fetch"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "is a git-lfs pointer .*git lfs pull"),
    ],
)
def test_another_kind_of_file_is_one_sentence(write, content, message):
    for name in ("x.csv", "x.csv.gz"):
        path = write(content, name)
        for work in (
            lambda path: read_table(path, COLUMNS),
            lambda path: read_text_table(path, COLUMNS),
            lambda path: streamed(path),
            lambda path: json_rows(path),
        ):
            assert re.search(rf"{name} {message}|{name} is {message}", error_of(work, path))


def test_a_folder_or_a_missing_file_is_one_sentence(tmp_path):
    (tmp_path / "x.csv").mkdir()
    assert "x.csv is a folder; put the file" in error_of(check_raw_file, tmp_path / "x.csv")
    assert "y.csv is missing; the README" in error_of(check_raw_file, tmp_path / "y.csv")


# Headers and ids


def test_blanks_around_names_and_fields_are_removed(write):
    path = write("user, item ,\u00a0timestamp\nu1, a,\t5\n u1\u3000,\ufeffa ,5 \n")
    assert rows_of(path) == streamed(path) == ([["u1", "a", "5", 2], ["u1", "a", "5", 3]], [])
    assert first_fields(path) == ["user", "item", "timestamp"]


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("user;item;timestamp", "line 1: the header has one column, 'user;item;timestamp'; sep"),
        ("\n\nuser,item", "line 3: column 'timestamp' is missing; the file has user, item"),
        ("user,item,timestamp, user ", "line 1: column 'user' is there 2 times; rename or remove"),
    ],
)
def test_a_wrong_header_is_one_sentence(write, header, message):
    path = write(header + "\nu,i,1\n")
    for work in (read_table, read_text_table, lambda path, _: streamed(path)):
        assert message in error_of(work, path, COLUMNS)


def test_other_columns_may_repeat(write):
    assert rows_of(write("z,user,item,timestamp,z,\n1,u,i,5,2,3\n"))[0] == [["u", "i", "5", 2]]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("", "the user is empty"),
        (" \u2003", "the user is empty"),
        ("u\x07", "the user has a control character or half a surrogate pair"),
        ("u\u2028v", "the user has a control character or half a surrogate pair"),
        ("u\ufffd", "the user has a control character or half a surrogate pair"),
    ],
)
def test_bad_ids_are_rejected(bad, reason):
    frame = pd.DataFrame({"user": ["x", bad, " x\u00a0", "é y"], "item": list("abcd"), "line": 9})
    frame, rejected = clean_ids(frame, ("user", "item"), "f", [])
    assert frame["user"].to_list() == ["x", "x", "é y"]
    assert [(row["file"], row["line"], row["reason"]) for row in rejected] == [("f", 9, reason)]


# Quotes and line numbers

OPEN = "a double quote opens a field and is not closed in it; close it, or write it twice"


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ('u1,a,1\nu2,"b,2\nu3,c,3\n', 3),
        ('u1,a,1\nu2,"b,2\nu3,c",3\n', 3),
        ('u1,a,1\n"u2\n",b,2\n', 3),
        ('u1,a,1\n\n"u2",b,"2\n', 4),
        ('u1,a,1\r\n"u2",b,"2', 3),
        ('u1,a,1\n"u2\n', 3),
        ('u1,"a" b,1\n"', 3),
    ],
)
def test_a_quote_that_is_not_closed_in_its_line_is_an_error(write, rows, line, monkeypatch):
    path = write("user,item,timestamp\n" + rows)
    for block in (raw_files.BLOCK, 7):
        monkeypatch.setattr(raw_files, "BLOCK", block)
        for work in (rows_of, streamed):
            assert f"line {line}: {OPEN}" in error_of(work, path)


def test_quoted_fields_and_unquoted_quotes_are_read(write):
    path = write('"user","item",timestamp\n"u,1","a ""b""",1\nu2,5" c,"2"\n')
    rows = [["u,1", 'a "b"', "1", 2], ["u2", '5" c', "2", 3]]
    assert rows_of(path) == streamed(path) == (rows, [])
    path = write('u1\t"a b\nu2\tc\n')
    assert rows_of(path, ("u", "i"), delimiter="\t", header=False, quoted=False)[0] == [
        ["u1", '"a b', 1],
        ["u2", "c", 2],
    ]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("block", [raw_files.BLOCK, 5])
def test_lines_are_those_of_the_file(write, end, block, monkeypatch):
    monkeypatch.setattr(raw_files, "BLOCK", block)
    lines = ["", "user,item,timestamp", "u1,a,1", "", "", "u2,b", "u3,c,3", "", "u4,d,4", "x"]
    path = write(end.join(lines))
    for kept, rejected in (rows_of(path), streamed(path)):
        assert kept == [["u1", "a", "1", 3], ["u3", "c", "3", 7], ["u4", "d", "4", 9]]
        assert [(row["line"], row["row"], row["reason"]) for row in rejected] == [
            (6, "u2,b", "2 fields instead of 3"),
            (10, "x", "1 fields instead of 3"),
        ]
    path = write(b'\n{"id": "a"}\n\r\n{"id": "b"}\n{"id": "c"}', "x.jsonl")
    assert [(row["id"], row["line"]) for row in json_rows(path)] == [("a", 2), ("b", 4), ("c", 5)]


def test_an_undecodable_byte_is_named_with_its_line(write, monkeypatch):
    path = write(PLAIN + b"u3,\xc3\xa9\xff,3\n")
    for block in (raw_files.BLOCK, 5):
        monkeypatch.setattr(raw_files, "BLOCK", block)
        for work in (rows_of, streamed, lambda path: read_text_table(path, COLUMNS)):
            assert "x.csv, line 4: byte 6 is not UTF-8; save" in error_of(work, path)
        path_json = write(b'{"id": "a"}\n{"id": "\xff"}\n', "x.jsonl")
        assert "x.jsonl, line 2: byte 9 is not UTF-8; save" in error_of(json_rows, path_json)


def test_texts_may_have_line_breaks_and_keep_their_blanks(write):
    content = (
        'item,title\n\na," two\nlines"\nb,one "quoted" word \nc,"x" y\nd\ne,"z\r\n\r\n""z"""\nf,g'
    )
    frame, rejected = read_text_table(write(content), ("item", "title"))
    assert frame.to_numpy().tolist() == [
        ["a", " two\nlines", 3],
        ["b", 'one "quoted" word ', 5],
        ["c", "x y", 6],
        ["e", 'z\r\n\r\n"z"', 8],
        ["f", "g", 11],
    ]
    assert rejected == [{"file": "x.csv", "line": 7, "row": "d", "reason": "1 fields instead of 2"}]


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ('a,"b\nc,d\n', 2),
        ('a,b\nc,"d', 3),
        ('a,"b\nc,"d"\n', 2),
        ('a,b\n"c\nd","e\nf,g\n', 4),
        ('a,"' + "b\n" * 11 + '"\n', 2),
        ('a,"' + "b\n" * 10 + '"\nc,"d', 13),
        ('a,"' + "b" * 140_000 + '"\n', 2),
    ],
)
def test_an_open_quote_of_a_text_is_named_where_it_opens(write, rows, line):
    path = write("item,title\n" + rows)
    message = error_of(read_text_table, path, ("item", "title"))
    assert f"line {line}: {OPEN}" in message


@skip_without_real_data
def test_the_real_titles_are_read_as_arrow_reads_them():
    path = REAL / "MicroLens-50k_titles.csv"
    frame, rejected = read_text_table(path, ("item", "title"))
    expected, _ = read_table(path, ("item", "title"))
    assert len(frame) == 19_220
    assert rejected == []
    assert frame["item"].to_list() == expected["item"].to_list()
    assert frame["title"].str.strip().to_list() == expected["title"].to_list()


# JSONL


def test_half_a_surrogate_pair_becomes_a_replacement_character(write, monkeypatch):
    lines = [r'{"id": "\ud83d x", "n": 1}', r'{"id": "\ud83d\ude00", "texts": ["\ude00", null]}']
    lines += [r'{"id": "a", "images": [{"large": "\udfff", "b": 1}, {"c": "\ud800"}, null]}']
    rows = json_rows(write("\n".join(lines), "x.jsonl"))
    assert [row["id"] for row in rows] == ["\ufffd x", "\U0001f600", "a"]
    assert rows[1]["texts"] == ["\ufffd", None]
    assert rows[2]["images"] == [{"large": "\ufffd"}, {"large": None}, None]


def test_only_the_block_with_a_half_surrogate_pair_is_read_again(write, monkeypatch):
    calls, read_again = [], tables._json_table_by_line
    monkeypatch.setattr(
        tables, "_json_table_by_line", lambda *call: calls.append(call[2]) or read_again(*call)
    )
    monkeypatch.setattr(raw_files, "BLOCK", 400)
    lines = [json.dumps({"id": f"i{n}", "n": n}) for n in range(100)]
    lines[50] = r'{"id": "\ud83d", "n": 50}'
    rows = json_rows(write("\n".join(lines) + "\n", "x.jsonl"))
    assert [row["n"] for row in rows] == list(range(100))
    assert [row["line"] for row in rows] == list(range(1, 101))
    assert len(calls) == 1
    assert 30 < calls[0] <= 51


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("null", "a line must hold one object"),
        ("[1]", "a line must hold one object"),
        ('{"id": "x"} {"id": "y"}', "not valid JSON (Extra data)"),
        ('{"id": "x"', "not valid JSON"),
        ('{"n": ' + "1" * 5000 + "}", "not valid JSON (an integer has too many digits)"),
        ('{"id": ' + "[" * 100_000, "not valid JSON (too many nested brackets)"),
        ('{"n": 9223372036854775808}', "n must be int64, not '9223372036854775808'"),
        ('{"n": 1.0}', "n must be int64, not '1.0'"),
        ('{"n": true}', "n must be int64, not 'True'"),
        ('{"id": 5}', "id must be string, not '5'"),
        ('{"texts": "abc"}', "texts must be list<item: string>, not 'abc'"),
        ('{"texts": [5]}', "texts must be list<item: string>, not '[5]'"),
        ('{"images": [["large", "x"]]}', "images must be list"),
    ],
)
def test_a_bad_line_is_named(write, line, message):
    for before in ("", '{"id": "a"}\n'):
        path = write(before + line + "\n", "x.jsonl")
        found = error_of(json_rows, path)
        assert f"x.jsonl, line {2 if before else 1}: {message}" in found
        assert len(found) < 400


def test_large_values_of_other_keys_do_not_matter(write):
    path = write('{"id": "a", "z": ' + "[" * 5000 + "]" * 5000 + "}\n", "x.jsonl")
    assert json_rows(path)[0]["id"] == "a"


# Timestamps


def parsed(timestamps):
    frame = pd.DataFrame({"timestamp": timestamps, "line": range(2, len(timestamps) + 2)})
    frame, rejected = parse_timestamps(frame.astype({"timestamp": "str"}), "dir/x.csv", [])
    return frame, {row["line"]: row["reason"] for row in rejected}


def test_whole_timestamps_stay_as_they_are():
    frame, rejected = parsed(["9223372036854775807", "9223372036854775806", "1589233210123456789"])
    assert frame["time"].to_list() == [2**63 - 1, 2**63 - 2, 1589233210123456789]
    assert rejected == {}
    frame, _ = parsed(["3", "0", "007"])
    assert frame["time"].to_list() == [3, 0, 7]


def test_the_order_of_fractions_is_exact():
    times = ["1589233210.123456789", "1589233210.123456788", "1589233210", "1.589233210e9"]
    times += ["+1589233210.000", "1589233210.1234567880", "1589233210.000000000000000001"]
    assert parsed(times)[0]["time"].to_list() == [3, 2, 0, 0, 0, 2, 1]


def test_bad_timestamps_are_rejected_with_their_reason():
    bad = {
        "soon": "is not a number",
        "nan": "is not a number",
        "inf": "is not a number",
        "": "is not a number",
        "0x10": "is not a number",
        "1_000": "is not a number",
        "٣": "is not a number",
        "-1": "is negative",
        "-0.5": "is negative",
        "1e30": "is too large",
        "9223372036854775808": "is too large",
        "1e999999": "is too large",
        "1" * 5000: "is too large",
        "1e99999999999999999999999": "is not a number of usual size",
        "1.0000000000000000001": "has more than 18 digits after the point",
        "1e-999999": "has more than 18 digits after the point",
    }
    frame, rejected = parsed([*bad, "5", "7.5", "5.0", "-0", "5.00000000000000000000000"])
    assert list(rejected.values()) == [f"the timestamp {reason}" for reason in bad.values()]
    assert frame["time"].to_list() == [1, 2, 1, 0, 1]


def test_mixed_units_are_an_error_with_the_first_line_of_each():
    message = error_of(parsed, ["1589233210", "5", "1589233210123", "1589233210123456", "7e18"])
    assert message.startswith(
        "dir/x.csv mixes units of time: line 2 has seconds, line 4 has milliseconds, line 5 has "
        "microseconds, line 6 has nanoseconds"
    )
    assert message.endswith("convert all timestamps to one unit")
    assert "line 2 has seconds, line 3 has milli" in error_of(parsed, ["99999999999", str(10**11)])
    assert "line 2 has milliseconds, line 3 has micro" in error_of(parsed, [str(10**13), "1e14"])
    assert "line 2 has microseconds, line 3 has nano" in error_of(parsed, [str(10**16), "1e17"])


@pytest.mark.parametrize("value", ["2020-05-11", "May 5", "", "-1"])
def test_a_file_without_any_timestamp_is_one_error(value):
    reason = "is negative" if value == "-1" else "is not a number"
    assert f"dir/x.csv, line 2: the timestamp {reason} ({value!r}), nor is" in error_of(
        parsed, [value, "soon"]
    )
    assert "seconds or milliseconds since 1970" in error_of(parsed, [value])


def test_if_every_row_is_rejected_the_first_reason_is_the_message():
    rows = [{"file": "x.csv", "line": n, "reason": f"reason {n}"} for n in (7, 3, 9)]
    rows += [{"file": "y.csv", "line": 1, "reason": "another file"}]
    message = error_of(require_rows, 0, "dir/x.csv", rows)
    assert message.startswith("dir/x.csv, line 3: reason 3; none of the 3 rows can be used")
    assert error_of(require_rows, 0, "x.csv", []) == "x.csv has no rows; fetch it again"
    require_rows(1, "x.csv", rows)


# Properties: every row is kept or rejected, or the file is an InputError

FAST = settings(max_examples=100, deadline=None, derandomize=True)
CELL = st.one_of(
    st.sampled_from(
        ["u1", " u1 ", "", "5", "1.5", "-1", "1e30", '"', '""', '"x"', "a\nb", "\ufeff"]
    ),
    st.text(max_size=4),
)
TABLES = st.lists(st.lists(CELL, min_size=1, max_size=4).map(",".join), max_size=8).map("\n".join)
CONTENTS = st.one_of(
    st.binary(max_size=60),
    TABLES.map(lambda text: ("user,item,timestamp\n" + text).encode(errors="surrogatepass")),
    TABLES.map(
        lambda text: gzip.compress(("user,item,timestamp\r\n" + text).encode("utf-8", "replace"))
    ),
)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | CELL,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=4,
)
JSON_LINES = st.one_of(
    st.dictionaries(st.sampled_from([*KINDS, "z"]), JSON_VALUES, max_size=3).map(json.dumps),
    st.sampled_from(["null", "{}", "[]", " ", "", '{"id": "a"}{}', '{"id": "a"}', '{"n": 5}', "{"]),
    st.text(max_size=8),
)


def lines_with_text(content):
    """Lines of a table after its header, without blank ones."""
    content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    return [line for line in content.removeprefix(b"\xef\xbb\xbf").splitlines() if line][1:]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("raw") / "x"


@given(CONTENTS, st.sampled_from([9, raw_files.BLOCK]))
@FAST
def test_every_row_of_a_table_is_kept_or_rejected(file, content, block):
    file.write_bytes(content)
    results = []
    for work in (rows_of, streamed):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(raw_files, "BLOCK", block)
            try:
                kept, rejected = work(file)
            except InputError as error:
                assert "\n" not in str(error)
                results.append(str(error))
                continue
        results.append((kept, rejected))
        assert len(kept) + len(rejected) == len(lines_with_text(content))
        numbers = [row[-1] for row in kept] + [row["line"] for row in rejected]
        assert len(set(numbers)) == len(numbers)
    assert results[0] == results[1]


@given(CONTENTS)
@FAST
def test_every_row_of_a_text_table_is_kept_or_rejected(file, content):
    file.write_bytes(content)
    try:
        frame, rejected = read_text_table(file, COLUMNS)
    except InputError as error:
        assert "\n" not in str(error)
        return
    texts = [text for column in COLUMNS for text in frame[column]]
    breaks = sum(len(re.findall("\r\n|\r|\n", text)) for text in texts)
    breaks += sum(len(re.findall("\r\n|\r|\n", row["row"])) for row in rejected)
    assert len(frame) + len(rejected) + breaks >= len(lines_with_text(content))
    numbers = [*frame["line"], *(row["line"] for row in rejected)]
    assert len(set(numbers)) == len(numbers)


@given(st.lists(JSON_LINES, max_size=6).map("\n".join), st.sampled_from([9, raw_files.BLOCK]))
@FAST
def test_every_line_of_jsonl_is_a_row_or_an_error(file, text, block):
    file.write_bytes(text.encode(errors="surrogatepass"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(raw_files, "BLOCK", block)
        try:
            rows = json_rows(file)
        except InputError as error:
            assert "\n" not in str(error)
            return
    lines = [(n, line) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
    assert [row["line"] for row in rows] == [n for n, _ in lines]
    for row, (_, line) in zip(rows, lines, strict=True):
        value = json.loads(line).get("id")
        assert row["id"] == (re.sub("[\ud800-\udfff]", "\ufffd", value) if value else value)


NUMBERS = st.one_of(
    st.integers(0, 10**10).map(str),
    st.decimals(0, 10**10, allow_nan=False, places=9).map(str),
    st.decimals(0, 5, allow_nan=False, places=18).map(str),
    st.floats(0, 10**10, allow_subnormal=False).map(repr),
)


@given(st.lists(NUMBERS | CELL, min_size=1, max_size=12))
@FAST
def test_times_have_the_order_of_the_exact_decimals(texts):
    try:
        frame, rejected = parsed(texts)
    except InputError as error:
        assert "\n" not in str(error)
        return
    assert len(frame) + len(rejected) == len(texts)
    exact = [Decimal(texts[line - 2].strip(BLANKS)) for line in frame["line"]]
    ranks = {value: rank for rank, value in enumerate(sorted(set(exact)))}
    expected = [ranks[value] for value in exact]
    assert np.unique(frame["time"], return_inverse=True)[1].tolist() == expected
