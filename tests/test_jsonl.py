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
from mllmrec.stage.record import file_digests, read_record, read_state
from mllmrec.stage.schema import SCHEMAS, schema_of

PROPERTY = settings(max_examples=100, deadline=None, derandomize=True)


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

QUESTION = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "A question"}]}
ROW = {"user_id": "u", "item_id": "i", "label": 1, "images": ["1.png"], "messages": [QUESTION]}
ROW["preference_span"] = [0, 3]
LETTERS = {"user_id": "u", "item_ids": ["a", "b"], "label": None, "images": []}
LETTERS["messages"] = [{"role": "user", "content": QUESTION["content"][1:]}]
USER = {"user_id": "u\n", "history": ["a"], "target": "t", "negatives": ["x", "y"]}
USER |= {"split": "test", "fold": 0}
LIST = {"user_id": "u", "split": "test", "item_ids": ["a", "b"], "scores": [1.0, 0.5]}
LIST["has_target"] = True
PREFERENCE = {"user_id": "u", "preference": "p", "blocks": [{"items": ["a"], "preference": "p"}]}
SCORE = {"user_id": "u", "item_id": "i", "label": 1, "score": 0.5, "logits": {"No": 1.0}}
ROWS = {
    "items.jsonl": item(image="1.png"),
    "users.jsonl": USER,
    "image_urls.jsonl": {"item_id": "i", "url": "u"},
    "images.jsonl": {"item_id": "i", "url": "u", "bytes": 1, "width": 1, "height": 1},
    "image_summaries.jsonl": {"item_id": "i", "summary": "s"},
    "user_preferences.jsonl": PREFERENCE,
    **dict.fromkeys(("train.jsonl", "validation.jsonl", "test.jsonl"), ROW),
    "train_users.jsonl": {"user_id": "u", "item_ids": ["a", "b"]},
    "item_texts.jsonl": {"item_id": "a", "text": "A: a red star"},
    "training_log.jsonl": {"step": 1, "loss": 0.5, "eval_auc": 0.5},
    "candidates.jsonl": LIST,
    "touched.jsonl": {"user_id": "u", "item_ids": ["a"]},
    **dict.fromkeys(("scores.jsonl", "validation_scores.jsonl"), SCORE),
    "x.rejected.jsonl": {"reason": "r"},
}
URL = ("image_urls.jsonl", "url")
NULL_OR = ("image", "fold", "logits")
NOT_NEEDED = ("loss", "eval_auc", "preference_span")
WRONG = {  # by the type of the right value
    str: (None, 5, 0.5, True, math.nan, [], {}),
    int: (None, -1, "1", 0.5, math.nan, [], True),
    float: (None, "0.5", math.nan, math.inf, -math.inf, [], True),
    list: (None, 5, "a", {}, [None], [[]], [{}], [math.nan]),
    bool: (None, 0, 1.0, "true", []),
    dict: (5, "a", [], {"No": "a"}, {"No": math.nan}, {"No": None}),
}


def valid_rows(name):
    """Rows with other texts and numbers than those of ROWS, perhaps with a further key."""
    kinds = {str: lambda v: st.text(max_size=9).map(lambda text: v + text)}
    kinds[float] = lambda v: st.floats(allow_nan=False, allow_infinity=False)
    varied = {key: kinds.get(type(v), st.just)(v) for key, v in ROWS[name].items()}
    if "split" in varied:
        varied["split"] = st.sampled_from(["train", "validation", "test"])
    more = st.sampled_from([None, 0.5, "a\n", [1, {"a": None}], {"b": "\u2028"}, 10**30])
    return st.fixed_dictionaries(varied, optional={"more": more})


def wrong_rows(row, key):
    """Copies of a valid row with each wrong value of a key, and without it."""
    if key not in NOT_NEEDED:
        yield {name: value for name, value in row.items() if name != key}
    for value in WRONG[type(row[key])]:
        if value is not None or key not in NULL_OR:
            yield {**row, key: value}
    if key.endswith("_id") or key in ("target", "reason"):
        yield {**row, key: ""}
    if key in ("history", "messages", "blocks", "item_ids", "scores", "preference_span"):
        yield {**row, key: []}


@settings(PROPERTY, max_examples=10)
@given(data=st.data())
@pytest.mark.parametrize("name", ROWS)
def test_valid_rows_keep_their_bytes(tmp_path_factory, data, name):
    path = tmp_path_factory.getbasetemp() / name
    rows = data.draw(st.lists(valid_rows(name), min_size=1, max_size=3))
    write_rows(path, rows)
    read = read_rows(path)
    assert json.dumps(read, sort_keys=True) == json.dumps(rows, sort_keys=True)
    write_rows(path, read)  # with the keys in the order of the schema
    content = path.read_bytes()
    write_rows(path, read_rows(path))
    assert path.read_bytes() == content


# Of image_urls.jsonl any url is taken: a wrong one rejects its image.
KEYS = [(name, key) for name in ROWS for key in ROWS[name] if (name, key) != URL]


@settings(PROPERTY, max_examples=4)
@given(data=st.data())
@pytest.mark.parametrize(("name", "key"), KEYS)
def test_a_wrong_value_is_one_sentence_when_it_is_read_and_when_it_is_written(
    tmp_path_factory, data, name, key
):
    path = tmp_path_factory.getbasetemp() / name
    *rows, last = data.draw(st.lists(valid_rows(name), min_size=1, max_size=2))
    for wrong in wrong_rows(last, key):
        write_unchecked(path, [*rows, wrong])
        sentences = []
        for action in (lambda: read_rows(path), lambda row=wrong: write_rows(path, [*rows, row])):
            with pytest.raises(InputError) as caught:
                action()
            sentences.append(str(caught.value))
            assert key in sentences[-1] and "\n" not in sentences[-1]
        assert sentences[0].startswith(f"{path}, line {len(rows) + 1}: ")
        assert sentences[0].endswith(f"; make the file again with {schema_of(name).maker}")
        assert sentences[1].startswith(f"{path}: the row ")


def test_every_file_has_its_keys():
    assert {*ROWS} == {*SCHEMAS, "x.rejected.jsonl"}


ANSWER = [{**QUESTION, "role": "assistant"}]
NO_CONTENT = [{"role": "user", "content": "text"}]


IMAGE = ROWS["images.jsonl"]
NO_WIDTH = "width: input should be greater than or equal to 1, not 0"
CHANGES = [
    ("users.jsonl", USER, {"target": "x"}, "the target 'x' is among the negatives"),
    ("users.jsonl", USER, {"negatives": ["x", "x"]}, "the negative 'x' is listed twice"),
    ("users.jsonl", USER, {"history": ["a", 5]}, "history[1] must be a string, not 5"),
    ("users.jsonl", USER, {"split": "valid"}, "split: input should be 'train', 'validation'"),
    ("images.jsonl", IMAGE, {"width": 0}, NO_WIDTH),
    ("scores.jsonl", SCORE, {"label": 2}, "label: input should be less than or equal to 1, not 2"),
    ("test.jsonl", ROW, {"label": 2}, "the label is 2, it must be 0 or 1"),
    ("test.jsonl", ROW, {"label": None}, "the label is None, it must be 0 or 1"),
    ("test.jsonl", ROW, {"images": []}, "there are 0 images and 1 places for them"),
    ("test.jsonl", ROW, {"messages": NO_CONTENT}, "messages[0].content: input should be"),
    ("test.jsonl", ROW, {"messages": ANSWER}, "the first message must be the user's question"),
    ("test.jsonl", ROW, {"preference_span": [3, 2]}, "is not a part of the question"),
    ("test.jsonl", ROW, {"preference_span": [0, 99]}, "is not a part of the question"),
    ("test.jsonl", ROW, {"item_ids": ["a", "b"]}, "it must have one of item_id and item_ids"),
    ("test.jsonl", LETTERS, {"item_ids": ["a", "a"]}, "the candidate 'a' is listed twice"),
    ("test.jsonl", LETTERS, {"label": 2}, "the label is 2, it must be 0 to 1"),
    ("candidates.jsonl", LIST, {"scores": [1.0]}, "there are 2 items and 1 scores"),
    ("candidates.jsonl", LIST, {"item_ids": ["a", "a"]}, "the item 'a' is listed twice"),
]


@pytest.mark.parametrize(("name", "valid", "change", "message"), CHANGES)
def test_ranges_and_keys_that_depend_on_each_other(tmp_path, name, valid, change, message):
    path = tmp_path / name
    write_rows(path, [valid])
    write_unchecked(path, [valid, {**valid, **change}])
    with pytest.raises(InputError) as caught:
        read_rows(path)
    assert str(caught.value).startswith(f"{path}, line 2: ")
    assert message in str(caught.value)


# Any content

LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
JSON = st.recursive(LEAVES, lambda v: st.lists(v) | st.dictionaries(st.text(), v), max_leaves=6)
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


def test_what_has_no_end_is_refused(tmp_path):
    os.mkfifo(tmp_path / "users.jsonl")
    (tmp_path / "weights.safetensors").symlink_to("/dev/zero")
    with pytest.raises(InputError, match=r"users.jsonl is no regular file"):
        read_rows(tmp_path / "users.jsonl")
    with pytest.raises(InputError, match=r"weights.safetensors is no regular file"):
        file_digests(tmp_path)
