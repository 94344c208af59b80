"""The files between the stages: complete lines, and an error of one sentence for a bad line."""

import copy
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
MISSING, NAN = object(), math.nan


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


def test_paths_in_files_are_relative_to_the_file(tmp_path):
    image, file = tmp_path / "raw" / "1.jpg", tmp_path / "data" / "items.jsonl"
    assert relative_path(image, file) == "../raw/1.jpg"


# Valid rows of each file

ID, TEXT = st.text(min_size=1, max_size=6), st.text(max_size=12)
IDS = st.lists(ID, min_size=1, max_size=4, unique=True)
COUNT, NUMBER = st.integers(0, 9), st.floats(allow_nan=False, allow_infinity=False)
SPLIT = st.sampled_from(["train", "validation", "test"])
MORE = st.sampled_from([None, 0.5, "a\n", [1, {"a": None}], {"b": [], "c": "\u2028"}, 10**30])


def row(optional=None, **keys):
    """Rows with these keys, perhaps those of `optional`, and perhaps one that no schema names."""
    return st.fixed_dictionaries(keys, optional={**(optional or {}), "more": MORE})


@st.composite
def users(draw):
    target, *negatives = draw(IDS)
    return draw(
        row(
            user_id=ID,
            history=st.lists(ID, min_size=1, max_size=4),
            target=st.just(target),
            negatives=st.just(negatives),
            split=SPLIT,
            fold=st.none() | COUNT,
        )
    )


@st.composite
def candidates(draw):
    ids = draw(IDS)
    scores = st.lists(NUMBER, min_size=len(ids), max_size=len(ids))
    keys = {"user_id": ID, "split": SPLIT, "item_ids": st.just(ids), "scores": scores}
    return draw(row(**keys, has_target=st.booleans()))


@st.composite
def model_rows(draw):
    """About one candidate with an image, or about a list without."""
    text = draw(TEXT)
    content, ids = [{"type": "text", "text": text}], draw(st.none() | st.just(["a", "b", "c"]))
    keys = {"user_id": ID, "label": st.sampled_from([0, 1] if ids is None else [None, 0, 1, 2])}
    if ids is None:
        content.insert(0, {"type": "image"})
        keys |= {"item_id": ID, "images": st.lists(ID, min_size=1, max_size=1)}
    else:
        keys |= {"item_ids": st.just(ids), "images": st.just([])}
    turns = [{"role": "user", "content": content}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "Yes"}]}
    span = st.lists(st.integers(0, len(text)), min_size=2, max_size=2).map(sorted)
    keys["messages"] = st.sampled_from([turns, [*turns, answer]])
    return draw(row({"preference_span": span}, **keys))


BLOCKS = st.lists(row(items=IDS, preference=TEXT), min_size=1, max_size=3)
VALID = {
    "items.jsonl": row(item_id=ID, title=TEXT, image=st.none() | ID),
    "users.jsonl": users(),
    "image_urls.jsonl": row(item_id=ID, url=MORE),
    "images.jsonl": row(
        item_id=ID, url=TEXT, **dict.fromkeys(("bytes", "width", "height"), st.integers(1, 99))
    ),
    "image_summaries.jsonl": row(item_id=ID, summary=TEXT),
    "user_preferences.jsonl": row({"split": SPLIT}, user_id=ID, preference=TEXT, blocks=BLOCKS),
    **dict.fromkeys(("train.jsonl", "validation.jsonl", "test.jsonl"), model_rows()),
    "training_log.jsonl": row({"loss": NUMBER, "eval_auc": NUMBER}, step=COUNT),
    "candidates.jsonl": candidates(),
    "scores.jsonl": row(
        user_id=ID,
        item_id=ID,
        label=st.integers(0, 1),
        score=NUMBER,
        logits=st.none() | st.dictionaries(TEXT, NUMBER, max_size=2),
    ),
    "x.rejected.jsonl": row({"item_id": ID}, reason=ID),
}


@PROPERTY
@given(st.data(), st.sampled_from(sorted(VALID)))
def test_valid_rows_keep_their_bytes(tmp_path_factory, data, name):
    path = tmp_path_factory.getbasetemp() / name
    rows = data.draw(st.lists(VALID[name], min_size=1, max_size=3))
    write_rows(path, rows)
    read = read_rows(path)
    assert json.dumps(read, sort_keys=True) == json.dumps(rows, sort_keys=True)
    write_rows(path, read)  # with the keys in the order of the schema
    content = path.read_bytes()
    write_rows(path, read_rows(path))
    assert path.read_bytes() == content


# One wrong value in a valid row

NO_TEXT = (MISSING, None, 5, 0.5, True, NAN, [], {})
NO_ID = (*NO_TEXT, "")
NO_LIST = (MISSING, None, 5, "a", {}, [5], [None])
NO_IDS = (*NO_LIST, [""], [["a"]])
NO_NUMBER = (None, "0.5", NAN, math.inf, -math.inf, [], True)
NO_COUNT = (-1, "1", 0.5, NAN, [], True)
NO_SIZE = (MISSING, None, 0, *NO_COUNT)
NO_SPLIT = (MISSING, None, "valid", "Train", "", 5, [])
MODEL_ROW = {
    "user_id": NO_ID,
    "label": (MISSING, 3, *NO_COUNT),
    "images": (*NO_IDS, ["a", "b"]),
    "messages": (*NO_LIST, []),
    "messages.0.role": (MISSING, None, 5, "boss"),
    "messages.0.content": (*NO_LIST, [], [{"type": "audio"}], [{"type": "image"}] * 2),
    "messages.0.content.-1.text": NO_TEXT,
    "preference_span": (None, 5, [], [5], [-1, 3], [2, 1], [0, 10**9], ["0", "5"], [0, 1.5]),
}
WRONG = {
    "items.jsonl": {"item_id": NO_ID, "title": NO_TEXT, "image": (MISSING, 5, 0.5, True, [])},
    "users.jsonl": {
        "user_id": NO_ID,
        "history": (*NO_IDS, []),
        "target": NO_ID,
        "negatives": (*NO_IDS, ["a", "a"]),
        "split": NO_SPLIT,
        "fold": (MISSING, *NO_COUNT),
    },
    "image_urls.jsonl": {"item_id": NO_ID, "url": (MISSING,)},
    "images.jsonl": {"url": NO_TEXT, "bytes": NO_SIZE, "width": NO_SIZE, "height": NO_SIZE},
    "image_summaries.jsonl": {"item_id": NO_ID, "summary": NO_TEXT},
    "user_preferences.jsonl": {
        "user_id": NO_ID,
        "preference": NO_TEXT,
        "split": NO_SPLIT[1:],
        "blocks": (*NO_LIST, []),
        "blocks.0.items": (*NO_IDS, []),
        "blocks.0.preference": NO_TEXT,
    },
    **dict.fromkeys(("train.jsonl", "validation.jsonl", "test.jsonl"), MODEL_ROW),
    "training_log.jsonl": {
        "step": (MISSING, None, *NO_COUNT),
        "loss": NO_NUMBER,
        "eval_auc": NO_NUMBER,
    },
    "candidates.jsonl": {
        "split": NO_SPLIT,
        "item_ids": (*NO_IDS, [], ["a", "a"]),
        "scores": (MISSING, None, 5, [], [NAN], ["0.5"]),
        "has_target": (MISSING, None, 0, "true"),
    },
    "scores.jsonl": {
        "label": (MISSING, None, 2, *NO_COUNT),
        "score": (MISSING, *NO_NUMBER),
        "logits": (MISSING, 5, [], {"Yes": "a"}, {"Yes": NAN}, {"Yes": None}),
    },
    "x.rejected.jsonl": {"reason": NO_ID},
}


def changed(valid, key, value):
    """A copy with another value, or without it; key: with dots, numbers are indices."""
    whole = inner = copy.deepcopy(valid)
    *outer, last = key.split(".")
    for part in outer:
        inner = inner[int(part)] if isinstance(inner, list) else inner[part]
    inner[last] = value
    if value is MISSING:
        del inner[last]
    return whole


def test_every_file_has_valid_and_wrong_rows():
    assert VALID.keys() == WRONG.keys() == {*SCHEMAS, "x.rejected.jsonl"}


@PROPERTY
@given(st.data(), st.sampled_from([(name, key) for name in WRONG for key in WRONG[name]]))
def test_a_wrong_value_is_one_sentence_when_it_is_read_and_when_it_is_written(
    tmp_path_factory, data, name_and_key
):
    name, key = name_and_key
    path = tmp_path_factory.getbasetemp() / name
    rows = data.draw(st.lists(VALID[name], min_size=1, max_size=2))
    for value in WRONG[name][key]:
        bad = [*rows[:-1], changed(rows[-1], key, value)]
        write_unchecked(path, bad)
        sentences = []
        for action in (lambda: read_rows(path), lambda rows=bad: write_rows(path, rows)):
            with pytest.raises(InputError) as caught:
                action()
            sentences.append(str(caught.value))
            assert "\n" not in sentences[-1]
            assert any(part in sentences[-1] for part in key.split(".")), sentences[-1]
        assert sentences[0].startswith(f"{path}, line {len(rows)}: ")
        assert sentences[0].endswith(f"; make the file again with {schema_of(name).maker}")
        assert sentences[1].startswith(f"{path}: the row ")


USER = {"user_id": "u", "history": ["a"], "target": "t", "negatives": ["x", "y"]}
USER |= {"split": "test", "fold": None}
QUESTION = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "A question"}]}
ROW = {"user_id": "u", "item_id": "i", "label": 1, "images": ["1.png"], "messages": [QUESTION]}
LETTERS = {"user_id": "u", "item_ids": ["a", "b"], "label": 0, "images": []}
LETTERS["messages"] = [{"role": "user", "content": QUESTION["content"][1:]}]
LIST = {"user_id": "u", "split": "test", "item_ids": ["a", "b"], "scores": [1.0, 0.5]}
LIST["has_target"] = True
ANSWER = [{**QUESTION, "role": "assistant"}]


@pytest.mark.parametrize(
    ("name", "valid", "change", "message"),
    [
        ("users.jsonl", USER, {"target": "x"}, "the target 'x' is among the negatives"),
        ("users.jsonl", USER, {"negatives": ["x", "x"]}, "the negative 'x' is listed twice"),
        ("users.jsonl", USER, {"history": ["a", 5]}, "history[1] must be a string, not 5"),
        ("users.jsonl", USER, {"split": "valid"}, "split: input should be 'train', 'validation' or"),
        ("test.jsonl", ROW, {"label": 2}, "the label is 2, it must be 0 or 1"),
        ("test.jsonl", ROW, {"label": None}, "the label is None, it must be 0 or 1"),
        ("test.jsonl", ROW, {"images": []}, "there are 0 images and 1 places for them"),
        ("test.jsonl", ROW, {"messages": ANSWER}, "the first message must be the user's question"),
        ("test.jsonl", ROW, {"preference_span": [3, 2]}, "is not a part of the question"),
        ("test.jsonl", ROW, {"preference_span": [0, 99]}, "is not a part of the question"),
        ("test.jsonl", ROW, {"item_ids": ["a", "b"]}, "it must have one of item_id and item_ids"),
        ("test.jsonl", LETTERS, {"item_ids": ["a", "a"]}, "the candidate 'a' is listed twice"),
        ("test.jsonl", LETTERS, {"label": 2}, "the label is 2, it must be 0 to 1"),
        ("candidates.jsonl", LIST, {"scores": [1.0]}, "there are 2 items and 1 scores"),
        ("candidates.jsonl", LIST, {"item_ids": ["a", "a"]}, "the item 'a' is listed twice"),
    ],
)
def test_keys_of_a_row_are_checked_against_each_other(tmp_path, name, valid, change, message):
    path = tmp_path / name
    write_rows(path, [valid])
    write_unchecked(path, [valid, {**valid, **change}])
    with pytest.raises(InputError) as caught:
        read_rows(path)
    assert str(caught.value).startswith(f"{path}, line 2: ")
    assert message in str(caught.value)


# Any content

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
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
