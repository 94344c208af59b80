"""The files between the stages: complete lines, and an error of one sentence for a bad line."""

import json
import math

import pytest
from conftest import write_unchecked
from hypothesis import given, settings
from hypothesis import strategies as st

from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import (
    encode,
    read_by_id,
    read_json,
    read_rows,
    relative_path,
    write_rows,
)
from mllmrec.stage.options import load_config
from mllmrec.stage.record import read_record, read_state
from mllmrec.stage.schema import SCHEMAS


def item(item_id="1", **more):
    return {"item_id": item_id, "title": "a title", "image": None, **more}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b'{"item_id": "1", "title": "t", "image": null}\n{"item_id": "2"',
            r"items.jsonl, line 2: not valid JSON .*01_prepare_data.sh",
        ),
        (b'{"item_id": "1", "title": "\xff", "image": null}\n', r"line 1: byte 28 is not UTF-8"),
        (b'{"item_id": "1", "image": null}\n', r"line 1: key 'title' is missing"),
        (
            b'{"item_id": 1, "title": "t", "image": null}\n',
            r"line 1: item_id must be a string, not 1",
        ),
        (b"[1]\n", r"line 1: a line must hold one object"),
    ],
)
def test_bad_lines_name_file_line_and_remedy(tmp_path, content, message):
    path = tmp_path / "items.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_rows(path)


def test_a_missing_file_names_the_script_that_makes_it(tmp_path):
    with pytest.raises(
        InputError, match=r"user_preferences.jsonl is missing; scripts/03_preference.sh makes it"
    ):
        read_rows(tmp_path / "user_preferences.jsonl")


def test_a_repeated_id_names_both_lines(tmp_path):
    write_rows(tmp_path / "items.jsonl", [item("1"), item("2"), item("1")])
    with pytest.raises(InputError, match=r"line 3: item_id '1' is already in line 1"):
        read_by_id(tmp_path / "items.jsonl", "item_id")


def test_any_text_survives_the_round_trip(tmp_path):
    titles = ["日本語 🎉", "a\nb\r\n\u2028c", '"quoted" <image> [/INST]', "half a pair \ud83d"]
    path = tmp_path / "items.jsonl"
    write_rows(path, [item(str(n), title=title) for n, title in enumerate(titles)])
    read = [row["title"] for row in read_rows(path)]
    assert read == [*titles[:3], "half a pair \ufffd"], "no UTF-8 file can hold half a pair"
    assert path.read_bytes().count(b"\n") == len(titles)
    assert "日本語".encode() in path.read_bytes(), "readable text, no escapes"


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "items.jsonl"
    write_rows(path, [item("1")])

    def rows():
        yield item("2")
        raise RuntimeError("a crash")

    with pytest.raises(RuntimeError):
        write_rows(path, rows())
    assert [row["item_id"] for row in read_rows(path)] == ["1"]
    assert list(tmp_path.iterdir()) == [path], "no temporary file is left"


def test_encoded_rows_are_one_line():
    assert encode({"a": "x\ny"}).count(b"\n") == 1
    assert json.loads(encode({"a": "x\ny"})) == {"a": "x\ny"}


def test_paths_in_files_are_relative_to_the_file(tmp_path):
    assert (
        relative_path(tmp_path / "raw" / "1.jpg", tmp_path / "data" / "items.jsonl")
        == "../raw/1.jpg"
    )


USER = {
    "user_id": "u",
    "history": ["a", "b"],
    "target": "t",
    "negatives": ["x", "y"],
    "split": "test",
    "fold": None,
}
QUESTION = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "A question"}]}
ROW = {
    "user_id": "u",
    "item_id": "i",
    "label": 1,
    "images": ["1.png"],
    "messages": [QUESTION],
    "preference_span": [0, 3],
}
SCORE = {"user_id": "u", "item_id": "i", "label": 0, "score": 0.5, "logits": {"No": 1.0}}
LETTERS = {**ROW, "item_ids": ["a", "b"], "images": [], "messages": [QUESTION]}
LETTERS["messages"] = [{"role": "user", "content": [{"type": "text", "text": "Which?"}]}]
del LETTERS["item_id"]
BAD_ROWS = [
    ("users.jsonl", USER, {"split": "valid"}, "split: input should be 'train', 'validation' or"),
    ("users.jsonl", USER, {"target": "x"}, "the target 'x' is among the negatives"),
    ("users.jsonl", USER, {"negatives": ["x", "x"]}, "the negative 'x' is listed twice"),
    ("users.jsonl", USER, {"history": []}, "history: list should have at least 1 item"),
    ("users.jsonl", USER, {"history": ["a", 5]}, r"history\[1\] must be a string, not 5"),
    ("users.jsonl", USER, {"history": 5}, "history: input should be a valid list|array"),
    ("users.jsonl", USER, {"fold": -1}, "fold: input should be greater than or equal to 0"),
    ("users.jsonl", USER, {"user_id": ""}, "user_id: string should have at least 1 character"),
    ("items.jsonl", item(), {"title": None}, "title must be a string, not None"),
    ("items.jsonl", item(), {"image": 5}, "image must be a string, not 5"),
    (
        "image_summaries.jsonl",
        {"item_id": "1", "summary": "s"},
        {"summary": ["a"]},
        "summary must be a string",
    ),
    ("test.jsonl", ROW, {"label": 2}, "the label is 2, it must be 0 or 1"),
    ("test.jsonl", ROW, {"label": None}, "the label is None, it must be 0 or 1"),
    ("test.jsonl", ROW, {"label": "1"}, "label: input should be a valid integer, not '1'"),
    ("test.jsonl", ROW, {"label": True}, "label: input should be a valid integer, not True"),
    ("test.jsonl", ROW, {"images": None}, "images: input should be a valid list|array"),
    ("test.jsonl", ROW, {"images": []}, "there are 0 images and 1 places for them"),
    ("test.jsonl", ROW, {"images": ["a", "b"]}, "images: list should have at most 1 item"),
    ("test.jsonl", ROW, {"messages": None}, "messages: input should be a valid list|array"),
    (
        "test.jsonl",
        ROW,
        {"messages": [{"role": "user", "content": "text"}]},
        r"messages\[0\].content: input should be a valid list|array",
    ),
    ("test.jsonl", ROW, {"preference_span": [3, 2]}, "is not a part of the question"),
    ("test.jsonl", ROW, {"preference_span": [0, 99]}, "is not a part of the question"),
    ("test.jsonl", ROW, {"item_ids": ["a", "b"]}, "one of item_id and item_ids"),
    ("test.jsonl", LETTERS, {"item_ids": ["a", "a"]}, "the candidate 'a' is listed twice"),
    ("test.jsonl", LETTERS, {"label": 2}, "the label is 2, it must be 0 to 1"),
    ("scores.jsonl", SCORE, {"score": math.nan}, "score: input should be a finite number"),
    ("scores.jsonl", SCORE, {"logits": {"No": math.inf}}, "logits.No: input should be a finite"),
    ("scores.jsonl", SCORE, {"label": 2}, "label: input should be less than or equal to 1, not 2"),
    (
        "x.rejected.jsonl",
        {"item_id": "1", "reason": "r"},
        {"reason": ""},
        "reason: string should have at least",
    ),
]


@pytest.mark.parametrize(("name", "row", "change", "message"), BAD_ROWS)
def test_a_row_is_checked_when_it_is_read_and_when_it_is_written(
    tmp_path, name, row, change, message
):
    path, bad = tmp_path / name, {**row, **change}
    write_rows(path, [row])
    assert read_rows(path) == [row]
    with pytest.raises(InputError, match=rf"{name}: the row .* cannot be written: .*{message}"):
        write_rows(path, [bad])
    write_unchecked(path, [row, bad])
    with pytest.raises(InputError, match=rf"{name}, line 2: .*{message}"):
        read_rows(path)


KEYS = sorted({key for row in (USER, ROW, SCORE, item()) for key in row})
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
CONTENTS = st.binary(max_size=60) | st.lists(
    st.dictionaries(st.sampled_from(KEYS), VALUES).map(lambda row: json.dumps(row).encode())
    | st.sampled_from([json.dumps(row).encode() for row in (USER, ROW, SCORE, item())]),
    max_size=3,
).map(b"\n".join)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.sampled_from([*SCHEMAS, "other.jsonl", "x.rejected.jsonl"]), CONTENTS)
def test_any_content_is_rows_or_one_sentence(tmp_path_factory, name, content):
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(content)
    try:
        rows = read_rows(path)
    except InputError as error:
        assert str(error).startswith((f"{path}, line ", f"{path} is empty"))
        assert "\n" not in str(error)
    else:
        write_rows(path, rows)
        assert read_rows(path) == rows


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.binary(max_size=40) | VALUES.map(lambda value: json.dumps(value).encode()))
def test_any_record_state_or_config_is_read_or_one_sentence(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp()
    for name in ("x.run.json", "state.json", "c.yaml"):
        (folder / name).write_bytes(content)
    readers = (
        lambda: read_record(folder / "x.jsonl"),
        lambda: read_state(folder / "state.json"),
        lambda: load_config(folder / "c.yaml"),
        lambda: read_json(folder / "state.json"),
    )
    for read in readers:
        try:
            assert isinstance(read(), dict)
        except InputError as error:
            assert "\n" not in str(error)
