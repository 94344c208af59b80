"""Outputs of a stage and their records: shared, resumed, refused or up to date.

Kills and other faults are in test_kills.py.
"""

import json
import re

import pytest
from toy_jobs import (
    IDS,
    append_rows,
    open_files,
    open_rows,
    open_training,
    toy_job,
    train_adapter,
    write_files,
)

from mllmrec.stage import provenance
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import read_rows, write_json, write_rows
from mllmrec.stage.output import RowOutput, WholeOutput
from mllmrec.stage.provenance import file_digest
from mllmrec.stage.record import read_record, read_state

OPEN = {"files": open_files, "rows": open_rows, "training": open_training}
FINISH = {"files": write_files, "rows": append_rows, "training": train_adapter}
NAMES = {"files": "one.jsonl", "rows": "x.jsonl", "training": "adapter"}


@pytest.fixture
def interrupted(tmp_path):
    """A folder with the rows i0, i1, i3 and a rejected one."""
    with pytest.raises(RuntimeError):
        append_rows(tmp_path, stop_after=4)
    return tmp_path


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_smaller_pilot_afterwards_removes_nothing(tmp_path):
    assert append_rows(tmp_path, limit=3) == IDS[:3]
    assert len(read_rows(tmp_path / "x.jsonl")) == 2
    assert append_rows(tmp_path) == IDS[3:]
    before = contents(tmp_path)
    assert append_rows(tmp_path, limit=3) == []
    assert contents(tmp_path) == before


def test_the_record_says_what_was_done(tmp_path):
    output = RowOutput(tmp_path / "x.jsonl", "item_id", IDS, toy_job({"model.json": "abc"}))
    with output:
        for item_id in IDS[1:]:
            output.write({"item_id": item_id})
        output.reject("i0", "bad")
    with pytest.raises(InputError, match=r"other inputs \(model.json was abc, is None\); choose"):
        open_rows(tmp_path)
    written = read_record(tmp_path / "x.jsonl")
    assert written["arguments"]["tone"] == "low"
    assert written["inputs"] == {"model.json": "abc"}
    assert written["rows"] == {"asked": 12, "out": 11, "rejected": 1, "written_by_this_run": 11}
    assert {"git_commit", "packages", "device", "seconds", "python"} <= written.keys()
    assert read_rows(tmp_path / "x.rejected.jsonl") == [{"item_id": "i0", "reason": "bad"}]


def test_generation_is_stopped_when_a_row_cannot_be_written(tmp_path, monkeypatch):
    stopped = []

    def results():
        try:
            yield from ((item_id, {"item_id": item_id}, None) for item_id in IDS)
        finally:
            stopped.append(True)

    def full(self, row):
        raise OSError("No space left on device")

    monkeypatch.setattr(RowOutput, "write", full)
    with pytest.raises(OSError, match="No space left") as caught:
        open_rows(tmp_path).write_results(results(), "rows", "row")
    assert stopped, "while the error is still being raised"
    assert caught


def test_an_id_that_is_there_twice_is_an_error(tmp_path):
    with pytest.raises(InputError, match="would hold an id twice; the input names one id in two"):
        RowOutput(tmp_path / "x.jsonl", "item_id", ["a", "b", "a"], toy_job())


# Another job


@pytest.mark.parametrize("stop_after", [2, None])
@pytest.mark.parametrize("kind", ["rows", "training"])
def test_another_job_is_refused_and_with_overwrite_deletes_when_it_begins(
    tmp_path, kind, stop_after
):
    finish, opened, name = FINISH[kind], OPEN[kind], NAMES[kind]
    try:
        finish(tmp_path, stop_after=stop_after)
    except RuntimeError:
        assert stop_after
    message = rf"{name} was made with other settings \(tone was low, is high\); choose another "
    with pytest.raises(InputError, match=f"{message}--output_dir, or delete it with --overwrite"):
        finish(tmp_path, tone="high")
    before = contents(tmp_path)
    overwriting = opened(tmp_path, tone="high", overwrite=True)
    assert contents(tmp_path) == before, "while a model is loaded, which may fail, nothing goes"
    with overwriting:
        assert before.items() <= contents(tmp_path).items()
        if kind == "training":
            overwriting.begin()
        else:
            overwriting.write({"item_id": "i0", "summary": "high i0"})
        left = {path.name for path in contents(tmp_path) if path.suffix != ".lock"}
        assert left <= {"state.json", "rank-0.jsonl", "rejected-0.jsonl"}
        assert not (tmp_path / name).exists()
    finish(tmp_path, tone="high", overwrite=True)
    assert read_record(tmp_path / name)["settings"]["tone"] == "high"


def test_files_are_written_again_for_another_job_or_when_one_is_missing(tmp_path):
    write_files(tmp_path)
    before = contents(tmp_path)
    write_files(tmp_path)
    assert contents(tmp_path) == before
    (tmp_path / "two.jsonl").unlink()
    write_files(tmp_path)
    assert contents(tmp_path).keys() == before.keys()
    with open_files(tmp_path, tone="high") as output:
        assert output.is_needed
        assert contents(tmp_path).keys() == before.keys(), "what fails before begin() costs nothing"
        output.begin()
        assert read_record(output.path) is None, "it goes before the files are touched"


@pytest.mark.parametrize("owner", ["gru/scores.run.json", "gru/run.json", "gru/state.json"])
@pytest.mark.parametrize("kind", ["files", "rows"])
def test_what_another_stage_wrote_is_not_replaced(tmp_path, kind, owner):
    """The same file, or a folder that is an output: an adapter, a model, checkpoints."""
    path = tmp_path / "gru" / "scores.jsonl"
    record = {"stage": "gru4rec", "outputs": {"scores.jsonl": "abc"}, "settings": {}, "inputs": {}}
    write_json(tmp_path / owner, record | {"rows": {}})
    job = toy_job(stage="sasrec")
    with pytest.raises(InputError, match=f"would replace what another stage wrote .*{owner}"):
        if kind == "rows":
            RowOutput(path, "item_id", IDS, job)
        else:
            with WholeOutput(job, [path]):
                pass


def test_scores_of_a_training_are_replaced_only_when_asked(tmp_path):
    path = tmp_path / "gru" / "scores.jsonl"
    for tone, overwrite in (("low", False), ("low", False), ("high", True)):
        job = toy_job(tone=tone, overwrite=overwrite)
        with WholeOutput(job, [path], takes_long=True) as output:
            if output.is_needed:
                output.begin()
                write_rows(path, [])
                output.finish({})
    with (
        pytest.raises(InputError, match=r"tone was high, is low\); choose another --variant"),
        WholeOutput(toy_job(tone="low"), [path], takes_long=True),
    ):
        pass


@pytest.mark.parametrize("name", ["adapter", "checkpoints", "merged", "export"])
def test_scores_do_not_go_where_another_stage_writes(tmp_path, name):
    with pytest.raises(InputError, match=f"{name} is for another stage; choose another --variant"):
        RowOutput(tmp_path / name / "scores.jsonl", "item_id", IDS, toy_job())


# Lines that know what they were made from


def made_from(texts, folder, **options):
    """Rows of these texts, id -> text; returns the ids that were computed."""
    job = toy_job(**options)
    sources = {item_id: job.source(text) for item_id, text in texts.items()}
    output, computed = RowOutput(folder / "x.jsonl", "item_id", sources, job), []
    if not output.is_up_to_date():
        with output:
            for item_id in output.todo:
                computed.append(item_id)
                if texts[item_id] == "bad":
                    output.reject(item_id, "bad")
                else:
                    output.write({"item_id": item_id, "summary": texts[item_id]})
    return computed


def test_lines_whose_source_changed_are_computed_again_and_the_others_kept(tmp_path, caplog):
    texts = {"a": "one", "b": "bad", "c": "three", "d": "four"}
    assert made_from(texts, tmp_path) == list("abcd")
    changed = {"new": "five", "c": "three", "a": "other", "b": "good"}
    assert made_from(changed, tmp_path) == ["new", "a", "b"]
    message = (
        "x.jsonl: 1 lines are kept, 1 are computed again .* changed, 1 have an id that is gone"
    )
    assert re.search(message, caplog.text)
    fresh = tmp_path / "fresh"
    made_from(changed, fresh)
    names = ("x.jsonl", "x.rejected.jsonl")
    assert [contents(fresh).get(fresh / n) for n in names] == [
        contents(tmp_path).get(tmp_path / n) for n in names
    ]
    assert made_from(dict(reversed(changed.items())), tmp_path) == [], "another order"
    ids = [row["item_id"] for row in read_rows(tmp_path / "x.jsonl")]
    assert ids == list(reversed(changed))
    assert made_from(texts, tmp_path) == ["b"], "lines that hold again; one that was rejected"
    assert {row["summary"] for row in read_rows(tmp_path / "x.jsonl")} == {"one", "three", "four"}
    assert made_from(changed, tmp_path) == []
    assert made_from(changed, tmp_path) == []
    assert (tmp_path / "x.jsonl").read_bytes() == (fresh / "x.jsonl").read_bytes()
    with pytest.raises(InputError, match=r"none of the 4 lines of .* was made from today's inputs"):
        made_from({"a": "x", "q": "y"}, tmp_path)
    with pytest.raises(InputError, match="other settings"):
        made_from(changed, tmp_path, tone="high")


def test_lines_without_a_source_are_kept_with_a_warning(tmp_path, caplog):
    append_rows(tmp_path)
    texts = {item_id: "text" for item_id in IDS}
    assert made_from(texts, tmp_path) == []
    assert "11 lines have no `source`, so it is unknown" in caplog.text


def test_a_training_that_another_number_of_processes_began_is_refused(tmp_path, monkeypatch):
    with open_training(tmp_path) as output:
        output.begin()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"other settings \(processes was 1, is 2\)"):
        train_adapter(tmp_path)
    with pytest.raises(InputError, match=r"--overwrite cannot be used with several processes; del"):
        train_adapter(tmp_path, overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", OPEN)
def test_a_second_process_does_not_write_the_same_output(tmp_path, kind, overwrite):
    message = f"{NAMES[kind]} is being written by another process; wait for it or stop it"
    with OPEN[kind](tmp_path), pytest.raises(InputError, match=message):
        FINISH[kind](tmp_path, overwrite=overwrite)


# Damaged files and records


@pytest.mark.parametrize("kind", FINISH)
def test_a_changed_file_or_a_missing_record_is_refused(tmp_path, kind):
    FINISH[kind](tmp_path)
    path = tmp_path / NAMES[kind]
    path = path / "weights.json" if path.is_dir() else path
    content = path.read_bytes()
    path.write_bytes(content + b"\n")
    message = r" was changed after it was written: .*run.json describes another file; restore it, "
    with pytest.raises(InputError, match=f"{path.name}{message}choose another --output_dir"):
        FINISH[kind](tmp_path)
    path.write_bytes(content)
    for record_or_state in (*tmp_path.rglob("*run.json"), *tmp_path.glob("*/state.json")):
        record_or_state.unlink()
    if kind == "files":  # written again
        FINISH[kind](tmp_path)
        return
    with pytest.raises(InputError, match=r"has no run record \(.*run.json\), so .*; move it away"):
        FINISH[kind](tmp_path)


NO_RECORD = [b"", b"[]", b"<html>", b"\xff\xfe", b'{"settings": {}', b'{"settings": 5}']


@pytest.mark.parametrize("content", NO_RECORD)
def test_a_damaged_record_is_one_sentence(tmp_path, content):
    append_rows(tmp_path)
    (tmp_path / "x.run.json").write_bytes(content)
    message = r"x.run.json is damaged, or .*: no .*; delete it together with .*jsonl"
    with pytest.raises(InputError, match=message):
        append_rows(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"), [("settings", None), ("inputs", 5), ("outputs", []), ("rows", 5)]
)
def test_a_record_of_another_version_is_one_sentence(tmp_path, key, value):
    append_rows(tmp_path)
    written = read_record(tmp_path / "x.jsonl")
    for changed in ({**written, key: value}, {k: v for k, v in written.items() if k != key}):
        (tmp_path / "x.run.json").write_text(json.dumps(changed))
        with pytest.raises(InputError, match=rf"x.run.json is damaged, .*: no '{key}'"):
            append_rows(tmp_path)


@pytest.mark.parametrize("content", NO_RECORD)
def test_a_damaged_state_is_one_sentence(interrupted, content):
    state = interrupted / "x.jsonl.parts" / "state.json"
    state.write_bytes(content)
    with pytest.raises(
        InputError,
        match=r"state.json is damaged, .*; start again with --overwrite",
    ):
        append_rows(interrupted)
    state.unlink()
    with pytest.raises(InputError, match=r"has rows, but no state.json that says how they were ma"):
        append_rows(interrupted)
    assert append_rows(interrupted, overwrite=True) == IDS
    assert read_state(state) is None


@pytest.mark.parametrize("line", [b'{"item_id": ', b"[]", b"\xff", b'{"summary": "a"}', b""])
def test_a_damaged_part_is_one_sentence(interrupted, line):
    part = interrupted / "x.jsonl.parts" / "rank-0.jsonl"
    lines = part.read_bytes().split(b"\n")
    part.write_bytes(b"\n".join([*lines[:1], line, *lines[2:]]))
    message = r"rank-0.jsonl, line 2: no row of this stage; remove the line, or start with --overwr"
    with pytest.raises(InputError, match=message):
        append_rows(interrupted)


def test_very_large_files_of_one_size_have_different_digests(tmp_path, monkeypatch):
    """Weights of two models of one shape; parts of them are read instead of all."""
    whole, one, two = (tmp_path / name for name in ("whole", "one", "two"))
    for path in (whole, one):
        path.write_bytes(bytes(4000))
    two.write_bytes(bytes(3999) + b"1")
    digest = file_digest(whole)
    monkeypatch.setattr(provenance, "HASH_LIMIT", 1000)
    assert len({digest, file_digest(one), file_digest(two)}) == 3
