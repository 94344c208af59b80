"""Raw files are checked when they are read: bad ones end in one sentence, and no row is lost."""

import bz2
import gzip
import json
import lzma

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllmrec.data.raw_files import check_raw_file, csv_table, header_of, json_table, only_file
from mllmrec.data.raw_log import NO_TIME, read_log, read_titles
from mllmrec.stage.errors import InputError

COLUMNS = ("user", "item", "timestamp")
HEADER = "user,item,timestamp\n"
PLAIN = HEADER + "u1,a,1\nu2,b,2\n"
CONTROL = "has a line break or control character"


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


def log_of(path, **known):
    """(list of (user, item, time) as sorted, dict line -> reason)."""
    table = json_table(path, COLUMNS) if path.suffix == ".jsonl" else csv_table(path, COLUMNS)
    log, rejected = read_log(table, **known)
    ids = zip(log.user_ids[log.user], log.item_ids[log.item], log.time.tolist(), strict=True)
    return list(ids), {row["line"]: row["reason"] for row in rejected}


def texts_of(path):
    return csv_table(path, ("item", "title")).frame().to_numpy().tolist()


# What kind of file it is


@pytest.mark.parametrize("name", ["x.csv", "x.csv.gz", "x[*]'.csv"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_file_is_recognised_by_its_content(write, name, pack, mark):
    path = write(pack(mark + PLAIN.encode()), name)
    assert log_of(path) == ([("u1", "a", 1), ("u2", "b", 2)], {})
    assert header_of(path) == list(COLUMNS)
    lines = write(pack(mark + b'{"user": "u", "item": "a", "timestamp": 7}'), "x.jsonl")
    assert log_of(lines) == ([("u", "a", 7)], {})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; fetch it again"),
        (b"\xef\xbb\xbf\n", "is empty; fetch it again"),
        (gzip.compress(b"", mtime=0), "is empty; fetch it again"),
        (bz2.compress(PLAIN.encode()), "is packed (bzip2); unpack it"),
        (lzma.compress(PLAIN.encode()), "is packed (xz); unpack it"),
        (b"PK\x03\x04" + bytes(30), "is packed (zip); unpack it"),
        (b"\x28\xb5\x2f\xfdabc", "is packed (zstd); unpack it"),
        (
            gzip.compress(gzip.compress(PLAIN.encode(), mtime=0), mtime=0),
            "is packed (gzip, twice); unpack it once",
        ),
        (gzip.compress(PLAIN.encode(), mtime=0)[:20], "is truncated or damaged"),
        (b"\x1f\x8b\x08" + bytes(40), "is truncated or damaged"),
        (PLAIN.encode("utf-16"), "is UTF-16 text; save it as UTF-8"),
        (PLAIN.encode("utf-16-le"), "holds NUL bytes"),
        (b"\n <!DOCTYPE html><html>", "is a web page, not the data; fetch it again"),
        (b'<?xml version="1.0"?><Error>', "is a web page, not the data; fetch it again"),
        (PLAIN.replace("\n", "\r").encode(), "has lines that end with \\r alone"),
    ],
)
def test_another_kind_of_file_is_one_sentence(write, content, message):
    for name in ("x.csv.gz", "x.jsonl"):
        path = write(content, name)
        assert f"{name} {message}" in error_of(log_of, path)
        assert f"{name} {message}" in error_of(check_raw_file, path)


def test_a_folder_a_missing_file_and_two_of_a_kind_are_one_sentence(tmp_path, write):
    (tmp_path / "x.csv").mkdir()
    assert "x.csv is a folder; put the file" in error_of(check_raw_file, tmp_path / "x.csv")
    (tmp_path / "w.csv").symlink_to("/dev/zero")
    assert "w.csv is no regular file; put a copy" in error_of(check_raw_file, tmp_path / "w.csv")
    assert "y.csv is missing; docs/data.md" in error_of(check_raw_file, tmp_path / "y.csv")
    names = ("z.csv", "z.csv.gz")
    assert error_of(only_file, tmp_path, names, "there is none") == "there is none"
    path = write(PLAIN, "z.csv")
    assert only_file(tmp_path, names, "there is none") == path
    write(PLAIN, "z.csv.gz")
    assert "has both z.csv and z.csv.gz; keep one" in error_of(only_file, tmp_path, names, "none")


def test_a_gzipped_file_that_ends_early_is_one_sentence(write):
    for name, text in (("x.csv", PLAIN * 9999), ("x.jsonl", '{"user": "u"}\n' * 9999)):
        path = write(gzip.compress(text.encode())[:-30], name)
        message = error_of(log_of, path)
        assert f"{name}: Unexpected end of GZIP" in message or "truncated or damaged" in message
        assert "fetch it again" in message


# CSV


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("user;item;timestamp", "line 1: column 'user' is missing; the header is 'user;item;time"),
        ("user,item", "line 1: column 'timestamp' is missing; the header is 'user,item'"),
        ("user,item,timestamp, user ", "line 1: column 'user' is there twice"),
        ("\nuser,item,timestamp", "line 1: column 'user' is missing; the header is ''"),
    ],
)
def test_a_wrong_header_is_one_sentence(write, header, message):
    assert message in error_of(log_of, write(header + "\nu,i,1\n"))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("u1,a,1\n\nu2,b\nu3,c\n", "line 4: too few fields (and 1 more such lines)"),
        ("u1,a,1\nu2,b,2,3\n", "line 3: too many fields; correct the file or fetch it again"),
        ('u1,a,1\nu2,"b,2\nu3,c,3\n', "line 3: a double quote opens a field and is not closed"),
        ('u1,a,1\nu2,"b,2\nu3,"c",3\n', "line 3: a double quote opens a field and is not closed"),
        ('u1,a,1\nu2,"b" c,2\n', "line 3: a double quote opens a field and is not closed"),
        (b"u1,a,1\nu2,\xc3\xa9\xff,2\n", "line 3: bytes that are not UTF-8"),
        ("u1,a,1\r\nu2,b,2\n", "x.csv: The CSV Parser state machine reached an invalid state"),
    ],
)
def test_a_line_that_is_no_row_is_an_error(write, rows, message):
    rows = rows if isinstance(rows, bytes) else rows.encode()
    assert message in error_of(log_of, write(HEADER.encode() + rows))


def test_lines_are_those_of_the_file_whatever_ends_them(write):
    text = HEADER + "u1,a,1\n\nu2,b,x\n\n\nu3,c,3\nu4,d,-4"
    for end in ("\n", "\r\n"):
        rows, rejected = log_of(write(text.replace("\n", end)))
        assert rows == [("u1", "a", 1), ("u3", "c", 3)]
        assert rejected == {4: NO_TIME, 8: NO_TIME}


def test_other_columns_may_repeat_and_fields_may_be_quoted(write):
    path = write('z,"user",item, timestamp,z,\n1,"u,1","a ""b""",1,2,3\n,u2,5" c,"2",,\n')
    assert log_of(path) == ([("u2", '5" c', 2), ("u,1", 'a "b"', 1)], {})
    path = write('u1\t"a b\nu2\tc\n')
    table = csv_table(path, ("i",), names=("u", "i"), delimiter="\t", quoted=False)
    assert table.frame()["i"].to_list() == ['"a b', "c"]


def test_texts_may_have_line_breaks_and_keep_their_blanks(write):
    rows = 'a," two\nlines"\nb,one "quoted" word \nc,"z\n\n""z"""\n\n d ,\na,x\n"",y\n'
    path = write("item,title\n" + rows)
    assert texts_of(path)[:3] == [
        ["a", " two\nlines"],
        ["b", 'one "quoted" word '],
        ["c", 'z\n\n"z"'],
    ]
    catalogue, rejected = read_titles(csv_table(path, ("item", "title")))
    assert catalogue.index.to_list() == ["a", "b", "c"]
    assert [(row["line"], row["row"], row["reason"]) for row in rejected] == [
        (9, " d ,", "the title is empty"),
        (10, "a,x", "the item has a title already"),
        (11, ",y", "the item is empty"),
    ]
    message = error_of(texts_of, write("item,title\n" + rows + "only one\n"))
    assert "line 12: too few fields" in message, "line breaks inside fields are counted"


# JSONL


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", "in line 2: Expected OBJECT, but got ARRAY"),
        ('{"user": "x"} {"user": "y"}', "line 2: not valid JSON (trailing characters"),
        ('{"user": "x"', "line 2: not valid JSON (EOF while parsing"),
        ('{"user": "\\ud83d"}', "line 2: not valid JSON (unexpected end of hex escape"),
        (b'{"user": "\xff"}', "line 2: not valid JSON (invalid unicode"),
    ],
)
def test_a_bad_line_of_jsonl_is_named(write, line, message):
    line = line if isinstance(line, bytes) else line.encode()
    path = write(b'{"user": "a"}\n' + line + b"\n", "x.jsonl")
    assert message in error_of(log_of, path)


def test_values_of_jsonl_are_texts(write):
    values = [("u", "a", 5), ("v", "b", "7"), (None, "c", 5), ("w", "d", True), ("x\0", "e", 1)]
    lines = [json.dumps(dict(zip(COLUMNS, value, strict=True))) for value in values]
    rows, rejected = log_of(write("\n\n".join([*lines, "null"]), "x.jsonl"))
    assert rows == [("u", "a", 5), ("v", "b", 7)]
    empty = "the user is empty"
    assert rejected == {5: empty, 7: NO_TIME, 9: f"the user {CONTROL}", 11: NO_TIME}


# Ids and times


def test_ids_keep_their_text_without_surrounding_blanks(write):
    rows = ["007,1e5,5", "NA,null,4", " NULL,\u00a0nan\u3000,7", "7,é x,1", '"",a,2', '"a\nb",a,2']
    rows, rejected = log_of(write(HEADER + "\n".join([*rows, "u\x07,a,3", "7,\u2003,3"])))
    expected = [("7", "é x", 1), ("NA", "null", 4), ("007", "1e5", 5), ("NULL", "nan", 7)]
    assert rows == expected, "shorter ids first"
    assert rejected == {
        6: "the user is empty",
        7: f"the user {CONTROL}",
        9: f"the user {CONTROL}",
        10: "the item is empty",
    }


def test_unknown_items_are_rejected_with_their_reason(write):
    rows, rejected = log_of(write(PLAIN), known=["a"], unknown="is not in it's file")
    assert rows == [("u1", "a", 1)]
    assert rejected == {3: "the item b is not in it's file"}


def test_the_log_is_sorted_by_user_and_time_ties_in_raw_order(write):
    table = csv_table(write(HEADER + "w,a,3\nu,c,5\nu,b,1\nw,d,3\nu,a,1\n"), COLUMNS)
    log, _ = read_log(table)
    items = log.item_ids[log.item].tolist()
    assert (log.user.tolist(), items) == ([0, 0, 0, 1, 1], ["b", "a", "c", "a", "d"])
    assert log.first_row.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        (
            ["1589233210123456789", "1589233210123456788"],
            [1589233210123456789, 1589233210123456788],
        ),
        (["3", "0", "007", " 5 "], [3, 0, 7, 5]),
        (
            ["5.25", "5", "5.125000000", "5.", "4.000001"],
            [5250000, 5000000, 5125000, 5000000, 4000001],
        ),
    ],
)
def test_times_are_exact(write, times, expected):
    rows, rejected = log_of(write(HEADER + "".join(f"u,i{n},{t}\n" for n, t in enumerate(times))))
    assert [time for *_, time in sorted(rows, key=lambda row: row[1])] == expected
    assert rejected == {}


def test_what_is_no_time_is_rejected(write):
    bad = ["soon", "nan", "", "0x10", "1_000", "٣", "-1", "1e5", "5.1234567", "9" * 20, ".5", "1,5"]
    text = HEADER + "u,a,5\n" + "".join(f'u,b,"{time}"\n' for time in bad)
    rows, rejected = log_of(write(text))
    assert rows == [("u", "a", 5)]
    assert rejected == dict.fromkeys(range(3, 3 + len(bad)), NO_TIME)
    message = error_of(log_of, write(HEADER + "u,a,2020-01-01\n"))
    assert f"line 2: {NO_TIME}; none of the 1 rows can be used" in message
    assert "x.csv has no rows; fetch it again" in error_of(log_of, write(HEADER))


def test_units_of_time_are_not_mixed(write):
    rows = "u,a,1589233210\n\nu,b,1589233210123\nu,c,1589233210\n"
    message = error_of(log_of, write(HEADER + rows))
    assert "x.csv mixes units of time, seconds and milliseconds by their size" in message
    assert "as in lines 2 and 4; convert all times to one unit" in message
    message = error_of(log_of, write(HEADER + "u,a,1589233210123456.5\n"))
    assert "x.csv has fractions of microseconds; round them" in message


@pytest.mark.parametrize(
    ("times", "problem"),
    [
        (("1589233210", "20200101"), "has days among its seconds in its times, as in line 2 and"),
        (("01012020", "1589233210"), "has days among its seconds in its times, as in line 2 and"),
        (("01022020", "31012020"), "has days that do not sort in its times, as in line 2; write"),
        (("20200101", "20200201"), None),
        (("01022020", "5000000"), None),
    ],
)
def test_days_as_numbers_are_not_seconds(write, times, problem):
    path = write(HEADER + "".join(f"u,i{n},{time}\n" for n, time in enumerate(times)))
    if problem is None:
        assert len(log_of(path)[0]) == len(times)
    else:
        assert problem in error_of(log_of, path)


SPELLINGS = [("1", "1.0"), ("1", "01"), ("U1", "u1"), ("e\u0301", "\u00e9"), ("a b", "a\u00a0b")]


@pytest.mark.parametrize(("one", "other"), SPELLINGS)
def test_an_id_in_two_spellings_is_warned_of(write, caplog, one, other):
    rows, _ = log_of(write(HEADER + f"{one},a,1\n{other},a,2\nu2,b,3\n{one},B,4\n"))
    assert len({user for user, _, _ in rows}) == 3
    assert "1 ids of the column user occur in several spellings, as" in caplog.text
    assert "1 ids of the column item occur in several spellings, as 'B' and 'b'" in caplog.text


CELL = st.sampled_from(["u1", " u1", "", "5", "1.5", "-1", "1e30", "x", '"', '"x"', "\ufeff", "é"])
CELL |= st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n\r\0"), max_size=3)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("raw") / "x.csv"


@given(st.lists(st.lists(CELL, min_size=3, max_size=3).map(",".join), max_size=6))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_every_row_is_kept_or_rejected(path, rows):
    path.write_text(HEADER + "".join(f"{row}\n" for row in rows), newline="\n")
    try:
        kept, rejected = log_of(path)
    except InputError as error:
        assert "\n" not in str(error)
        return
    assert len(kept) + len(rejected) == len(rows)
    assert set(rejected) <= set(range(2, 2 + len(rows)))
