"""The files between the stages: complete lines, and an error of one sentence for a bad line."""

import json
import math
import os

import pytest
from conftest import write_unchecked
from hypothesis import given, settings
from hypothesis import strategies as st

from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import read_by_id, read_json, read_rows, relative_path, write_rows
from mllmrec.stage.options import load_config
from mllmrec.stage.record import read_record, read_state
from mllmrec.stage.schema import SCHEMAS, schema_of

PROPERTY = settings(max_examples=100, deadline=None, derandomize=True)
NAN = math.nan


@pytest.fixture(scope="module", autouse=True)
def no_fsync():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


def item(item_id="1", **more):
    return {"item_id": item_id, "title": "a title", "image": None, **more}


# Whole files

GOOD = json.dumps(item()).encode() + b"\n"
AGAIN = "; make the file again with scripts/01_prepare_data.sh"
UTF8 = "is not UTF-8; save the file as UTF-8 or make the file again with"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", f" is empty{AGAIN[:6]} it again with scripts/01_prepare_data.sh"),
        (GOOD + b'{"item_id": "2"', ", line 2: not valid JSON ("),
        (GOOD + GOOD.strip() + GOOD, ", line 2: not valid JSON ("),
        (GOOD + b"\n" + GOOD, ", line 2: not valid JSON ("),
        (GOOD + bytes(80), ", line 2: not valid JSON ("),
        (b'{"a": ' + b"[" * 100_000, ", line 1: not valid JSON ("),
        (b"<!DOCTYPE html>", ", line 1: not valid JSON ("),
        (b"\xef\xbb\xbf" + GOOD, ", line 1: not valid JSON ("),
        (GOOD.replace(b"title", rb"\ud83d"), ", line 1: not valid JSON ("),
        (GOOD.replace(b"title", b"\xff", 1), f", line 1: byte 19 {UTF8}"),
        (GOOD.decode().encode("utf-16"), f", line 1: byte 1 {UTF8}"),
        (GOOD + b"[1]\n", f", line 2: a line must hold one object, not [1]{AGAIN}"),
        (b"null\n", f", line 1: a line must hold one object, not None{AGAIN}"),
        (GOOD.replace(b"title", b"t"), f", line 1: key 'title' is missing{AGAIN}"),
    ],
)
def test_a_bad_file_is_one_sentence_with_line_and_remedy(tmp_path, content, message):
    path = tmp_path / "items.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_rows(path)
    assert str(caught.value).startswith(f"{path}{message}")
    assert str(caught.value).endswith("scripts/01_prepare_data.sh")
    assert "\n" not in str(caught.value)


def test_a_missing_file_names_the_script_that_makes_it_and_a_folder_is_none(tmp_path):
    path = tmp_path / "user_preferences.jsonl"
    with pytest.raises(InputError, match=r"es.jsonl is missing; scripts/03_preference.sh makes it"):
        read_rows(path)
    path.mkdir()
    with pytest.raises(InputError, match=r"is a folder, but must be a file; move it away"):
        read_rows(path)


def test_a_repeated_id_names_both_lines(tmp_path):
    write_rows(tmp_path / "items.jsonl", [item("1"), item("2"), item("1")])
    with pytest.raises(InputError, match=r"line 3: item_id '1' is already in line 1; remove one"):
        read_by_id(tmp_path / "items.jsonl", "item_id")


def test_any_text_survives_the_round_trip(tmp_path):
    titles = ["日本語 🎉", "a\nb\r\n\u2028c", '"quoted" <image> [/INST]', "half a pair \ud83d"]
    path = tmp_path / "items.jsonl"
    write_rows(path, [item(str(n), title=title) for n, title in enumerate(titles)])
    read = [row["title"] for row in read_rows(path)]
    assert read == [*titles[:3], "half a pair ?"], "no UTF-8 file can hold half a pair"
    assert path.read_bytes().count(b"\n") == len(titles)
    assert "日本語".encode() in path.read_bytes(), "readable text, no escapes"


def test_paths_in_files_are_relative_to_the_file(tmp_path):
    image, file = tmp_path / "raw" / "1.jpg", tmp_path / "data" / "items.jsonl"
    assert relative_path(image, file) == "../raw/1.jpg"


# Valid rows of each file, and wrong values of each key

ID, TEXT = st.text(min_size=1, max_size=6), st.text(max_size=12)
IDS = st.lists(ID, min_size=1, max_size=4, unique=True)
COUNT, NUMBER = st.integers(0, 9), st.floats(allow_nan=False, allow_infinity=False)
ANYTHING = st.sampled_from([None, 0.5, "a\n", [1, {"a": None}], {"b": [], "c": "\u2028"}, 10**30])
NO_TEXT = (None, 5, 0.5, True, NAN, [], {})
NO_LIST = (None, 5, "a", {}, [5], [None])
NO_IDS = (*NO_LIST, [""], [["a"]])
NO_COUNT = (None, -1, "1", 0.5, NAN, [], True)
NO_NUMBER = (None, "0.5", NAN, math.inf, -math.inf, [], True)
KINDS = {  # name: (valid values, wrong values)
    "id": (ID, (*NO_TEXT, "")),
    "text": (TEXT, NO_TEXT),
    "ids": (IDS, (*NO_IDS, [])),
    "count": (COUNT, NO_COUNT),
    "size": (st.integers(1, 99), (*NO_COUNT, 0)),
    "number": (NUMBER, NO_NUMBER),
    "bit": (st.integers(0, 1), (*NO_COUNT, 2)),
    "flag": (st.booleans(), (None, 0, "true")),
    "split": (
        st.sampled_from(["train", "validation", "test"]),
        (None, "valid", "Train", "", 5, []),
    ),
    "negatives": (st.just([]), NO_IDS),
    "scores": (st.just([]), (None, 5, "a", {}, [None], [NAN], ["0.5"], [])),
    "logits": (
        st.none() | st.dictionaries(TEXT, NUMBER, max_size=2),
        (5, [], {"Yes": "a"}, {"Yes": NAN}, {"Yes": None}),
    ),
    "blocks": (
        st.lists(st.fixed_dictionaries({"items": IDS, "preference": TEXT}), min_size=1, max_size=3),
        (*NO_LIST, [], [{"items": ["a"]}], [{"items": [], "preference": "a"}]),
    ),
    "label": (COUNT, (3, -1, "1", 0.5, NAN, [], True)),
    "images": (st.just([]), (*NO_IDS, ["a", "b"])),
    "messages": (st.just([]), (*NO_LIST, [])),
    "span": (st.just([0, 0]), (None, 5, [], [5], [-1, 3], [2, 1], [0, 99], ["0", "5"], [0, 1.5])),
    "anything": (ANYTHING, ()),
}
MODEL_ROW = "user_id: id, label: label, images: images, messages: messages, preference_span?: span"
FILES = {  # ?: may be missing; or null: not wrong
    "items.jsonl": "item_id: id, title: text, image: text or null",
    "users.jsonl": "user_id: id, history: ids, target: id, negatives: negatives, split: split, "
    "fold: count or null",
    "image_urls.jsonl": "item_id: id, url: anything",
    "images.jsonl": "item_id: id, url: text, bytes: size, width: size, height: size",
    "image_summaries.jsonl": "item_id: id, summary: text",
    "user_preferences.jsonl": "user_id: id, preference: text, blocks: blocks, split?: split",
    "train.jsonl": MODEL_ROW,
    "validation.jsonl": MODEL_ROW,
    "test.jsonl": MODEL_ROW,
    "training_log.jsonl": "step: count, loss?: number, eval_auc?: number",
    "candidates.jsonl": "user_id: id, split: split, item_ids: ids, scores: scores, "
    "has_target: flag",
    "scores.jsonl": "user_id: id, item_id: id, label: bit, score: number, logits: logits or null",
    "x.rejected.jsonl": "reason: id, item_id?: anything",
}
PAIRS = {name: dict(pair.split(": ") for pair in keys.split(", ")) for name, keys in FILES.items()}


@st.composite
def rows_of(draw, name):
    """A valid row of the file, perhaps with a key that no schema names."""
    required, optional = {}, {"more": ANYTHING}
    for key, kind in PAIRS[name].items():
        values = KINDS[kind.removesuffix(" or null")][0]
        values = values | st.none() if kind.endswith("null") else values
        (optional if key.endswith("?") else required)[key.rstrip("?")] = values
    row = draw(st.fixed_dictionaries(required, optional=optional))
    if name == "users.jsonl":
        row["target"], *row["negatives"] = draw(IDS)
    if name == "candidates.jsonl":
        size = len(row["item_ids"])
        row["scores"] = draw(st.lists(NUMBER, min_size=size, max_size=size))
    if "messages" in row:  # about one candidate with an image, or about a list without
        row |= draw(st.sampled_from([ROW, LETTERS]))
    return row


def wrong_rows(row, key, kind):
    """Copies of a valid row with each wrong value of a key, and without it."""
    if not key.endswith("?"):
        yield {name: value for name, value in row.items() if name != key}
    for value in KINDS[kind.removesuffix(" or null")][1]:
        if value is not None or not kind.endswith("null"):
            yield {**row, key.rstrip("?"): value}


@settings(PROPERTY, max_examples=10)
@given(data=st.data())
@pytest.mark.parametrize("name", FILES)
def test_valid_rows_keep_their_bytes(tmp_path_factory, data, name):
    path = tmp_path_factory.getbasetemp() / name
    rows = data.draw(st.lists(rows_of(name), min_size=1, max_size=3))
    write_rows(path, rows)
    read = read_rows(path)
    assert json.dumps(read, sort_keys=True) == json.dumps(rows, sort_keys=True)
    write_rows(path, read)  # with the keys in the order of the schema
    content = path.read_bytes()
    write_rows(path, read_rows(path))
    assert path.read_bytes() == content


@settings(PROPERTY, max_examples=4)
@given(data=st.data())
@pytest.mark.parametrize(("name", "key"), [(name, key) for name in PAIRS for key in PAIRS[name]])
def test_a_wrong_value_is_one_sentence_when_it_is_read_and_when_it_is_written(
    tmp_path_factory, data, name, key
):
    path = tmp_path_factory.getbasetemp() / name
    *rows, last = data.draw(st.lists(rows_of(name), min_size=1, max_size=2))
    for wrong in wrong_rows(last, key, PAIRS[name][key]):
        write_unchecked(path, [*rows, wrong])
        sentences = []
        for action in (lambda: read_rows(path), lambda row=wrong: write_rows(path, [*rows, row])):
            with pytest.raises(InputError) as caught:
                action()
            sentences.append(str(caught.value))
            assert key.rstrip("?") in sentences[-1] and "\n" not in sentences[-1]
        assert sentences[0].startswith(f"{path}, line {len(rows) + 1}: ")
        assert sentences[0].endswith(f"; make the file again with {schema_of(name).maker}")
        assert sentences[1].startswith(f"{path}: the row ")


def test_every_file_has_its_keys():
    assert {*FILES} == {*SCHEMAS, "x.rejected.jsonl"}


USER = {"history": ["a"], "target": "t", "negatives": ["x", "y"]}
USER |= {"split": "test", "fold": None}
QUESTION = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "A question"}]}
ROW = {"item_id": "i", "label": 1, "images": ["1.png"], "messages": [QUESTION]}
LETTERS = {"item_ids": ["a", "b"], "label": None, "images": []}
LETTERS["messages"] = [{"role": "user", "content": QUESTION["content"][1:]}]
LIST = {"split": "test", "item_ids": ["a", "b"], "scores": [1.0, 0.5]}
LIST["has_target"] = True
ANSWER = [{**QUESTION, "role": "assistant"}]
NO_CONTENT = [{"role": "user", "content": "text"}]


@pytest.mark.parametrize(
    ("name", "valid", "change", "message"),
    [
        ("users.jsonl", USER, {"target": "x"}, "the target 'x' is among the negatives"),
        ("users.jsonl", USER, {"negatives": ["x", "x"]}, "the negative 'x' is listed twice"),
        ("users.jsonl", USER, {"history": ["a", 5]}, "history[1] must be a string, not 5"),
        (
            "users.jsonl",
            USER,
            {"split": "valid"},
            "split: input should be 'train', 'valid",
        ),
        ("test.jsonl", ROW, {"label": 2}, "the label is 2, it must be 0 or 1"),
        ("test.jsonl", ROW, {"label": None}, "the label is None, it must be 0 or 1"),
        ("test.jsonl", ROW, {"images": []}, "there are 0 images and 1 places for them"),
        (
            "test.jsonl",
            ROW,
            {"messages": NO_CONTENT},
            "messages[0].content: input should be",
        ),
        ("test.jsonl", ROW, {"messages": ANSWER}, "the first message must be the user's question"),
        ("test.jsonl", ROW, {"preference_span": [0, 99]}, "is not a part of the question"),
        ("test.jsonl", ROW, {"item_ids": ["a", "b"]}, "it must have one of item_id and item_ids"),
        ("test.jsonl", LETTERS, {"item_ids": ["a", "a"]}, "the candidate 'a' is listed twice"),
        ("test.jsonl", LETTERS, {"label": 2}, "the label is 2, it must be 0 to 1"),
        ("candidates.jsonl", LIST, {"scores": [1.0]}, "there are 2 items and 1 scores"),
        ("candidates.jsonl", LIST, {"item_ids": ["a", "a"]}, "the item 'a' is listed twice"),
    ],
)
def test_keys_of_a_row_are_checked_against_each_other(tmp_path, name, valid, change, message):
    path, valid = tmp_path / name, {"user_id": "u", **valid}
    write_rows(path, [valid])
    write_unchecked(path, [valid, {**valid, **change}])
    with pytest.raises(InputError) as caught:
        read_rows(path)
    assert str(caught.value).startswith(f"{path}, line 2: ")
    assert message in str(caught.value)


# Any content

LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
JSON = st.recursive(LEAVES, lambda v: st.lists(v) | st.dictionaries(TEXT, v), max_leaves=6)
ANY = st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode())


@PROPERTY
@given(ANY)
def test_any_file_is_read_or_one_sentence(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp()
    for name in ("x.run.json", "state.json", "c.yaml", "scores.jsonl"):
        (folder / name).write_bytes(content)
    readers = (
        lambda: read_record(folder / "x.jsonl"),
        lambda: read_state(folder / "state.json"),
        lambda: load_config(folder / "c.yaml"),
        lambda: read_json(folder / "state.json"),
        lambda: dict(enumerate(read_rows(folder / "scores.jsonl"))),
    )
    for read in readers:
        try:
            assert isinstance(read(), dict)
        except InputError as error:
            assert "\n" not in str(error)
