"""The files between the stages: complete lines, and an error of one sentence for a bad line."""

import json

import pytest

from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import encode, read_by_id, read_rows, relative_path, write_rows


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
