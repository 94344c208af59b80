"""Outputs of a stage and their records: resumed, refused or up to date, in a process of its own.

Kills and other faults are in test_kills.py.
"""

import json

import pytest
from pydantic.dataclasses import dataclass

from mllmrec.stage import record
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import read_rows, write_json, write_rows
from mllmrec.stage.options import CommonOptions
from mllmrec.stage.output import RowOutput, WholeOutput, new_folder
from mllmrec.stage.record import Job, file_digests, read_record, read_state

IDS = [f"i{n}" for n in range(10)]


@dataclass
class Options(CommonOptions):
    tone: str = "low"


def job(inputs=None, **options):
    return Job.of(Options(config="none", **options), inputs or {})


def open_output(tmp_path, ids=IDS, inputs=None, retry_rejected=False, **options):
    return RowOutput(tmp_path / "x.jsonl", "item_id", ids, job(inputs, **options), retry_rejected)


def work(output, stop_after=None, bad=()):
    """Write a row per id; return the ids that were processed. Crash after `stop_after` rows."""
    done = []
    with output:
        for item_id in output.todo:
            if stop_after is not None and len(done) == stop_after:
                raise RuntimeError("crash")
            if item_id in bad:
                output.reject(item_id, "bad")
            else:
                output.write({"item_id": item_id, "summary": f"of {item_id}"})
            done.append(item_id)
    return done


@pytest.fixture
def interrupted(tmp_path):
    """A folder with four finished rows of an output."""
    with pytest.raises(RuntimeError):
        work(open_output(tmp_path), stop_after=4)
    return tmp_path


def undisturbed(tmp_path):
    folder = tmp_path / "undisturbed"
    folder.mkdir()
    work(open_output(folder))
    return (folder / "x.jsonl").read_bytes()


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Rows


def test_a_crash_loses_nothing_and_repeats_nothing(interrupted):
    assert not (interrupted / "x.jsonl").exists(), "no incomplete file under the final name"
    assert not open_output(interrupted).is_up_to_date()
    assert work(open_output(interrupted)) == IDS[4:]
    assert (interrupted / "x.jsonl").read_bytes() == undisturbed(interrupted)
    assert open_output(interrupted).is_up_to_date()
    assert not (interrupted / "x.jsonl.parts").exists()


def test_a_truncated_last_line_is_dropped_and_computed_again(interrupted):
    part = interrupted / "x.jsonl.parts" / "rank-0.jsonl"
    part.write_bytes(part.read_bytes()[:-7])
    assert work(open_output(interrupted)) == IDS[3:]
    assert (interrupted / "x.jsonl").read_bytes() == undisturbed(interrupted)


def test_processes_share_the_work_and_another_number_of_them_resumes(tmp_path, monkeypatch):
    expected, worked = undisturbed(tmp_path), []
    for rank, world in (("1", "2"), ("2", "3"), ("1", "3"), ("0", "3")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", world)
        assert not (tmp_path / "x.jsonl").exists()
        worked += work(open_output(tmp_path))
    assert sorted(worked) == IDS
    assert (tmp_path / "x.jsonl").read_bytes() == expected
    assert read_record(tmp_path / "x.jsonl")["processes"] == 3


def test_a_pilot_is_kept_by_the_full_run(tmp_path):
    assert work(open_output(tmp_path, limit=3)) == IDS[:3]
    assert len(read_rows(tmp_path / "x.jsonl")) == 3
    assert work(open_output(tmp_path)) == IDS[3:]
    assert (tmp_path / "x.jsonl").read_bytes() == undisturbed(tmp_path)
    smaller = open_output(tmp_path, limit=3)
    assert smaller.is_up_to_date(), "a smaller pilot afterwards removes nothing"


def test_rejected_rows_are_kept_with_their_reason_and_can_be_retried(tmp_path):
    work(open_output(tmp_path), bad=("i2",))
    assert read_rows(tmp_path / "x.rejected.jsonl") == [{"item_id": "i2", "reason": "bad"}]
    assert read_record(tmp_path / "x.jsonl")["rows"]["rejected"] == 1
    assert open_output(tmp_path).is_up_to_date()
    assert work(open_output(tmp_path, retry_rejected=True)) == ["i2"]
    assert (tmp_path / "x.jsonl").read_bytes() == undisturbed(tmp_path)
    assert not (tmp_path / "x.rejected.jsonl").exists()


@pytest.mark.parametrize("stop_after", [4, None])
def test_other_settings_or_inputs_are_an_error_unless_overwritten(tmp_path, stop_after):
    try:
        work(open_output(tmp_path), stop_after)
    except RuntimeError:
        assert stop_after
    message = r"x.jsonl was made with other settings \(tone was low, is high\); choose another "
    with pytest.raises(InputError, match=f"{message}--output_dir, or delete it with --overwrite"):
        open_output(tmp_path, tone="high")
    with pytest.raises(InputError, match=r"other inputs \(items.jsonl was None, is abc\); choose"):
        open_output(tmp_path, inputs={"items.jsonl": "abc"})
    before = contents(tmp_path)
    overwriting = open_output(tmp_path, tone="high", overwrite=True)
    assert contents(tmp_path) == before, "nothing is deleted before the new output begins"
    assert work(overwriting) == IDS
    assert read_record(tmp_path / "x.jsonl")["settings"]["tone"] == "high"


def test_an_id_that_is_there_twice_is_an_error(tmp_path):
    with pytest.raises(InputError, match="would hold an id twice; the input names one id in two"):
        open_output(tmp_path, ids=["a", "b", "a"])


def test_generation_is_stopped_when_a_row_cannot_be_written(tmp_path, monkeypatch):
    stopped = []

    def results():
        try:
            yield from ((item, {"item_id": item}, None) for item in "ab")
        finally:
            stopped.append(True)

    def full(self, row):
        raise OSError("No space left on device")

    monkeypatch.setattr(RowOutput, "write", full)
    with pytest.raises(OSError, match="No space left") as caught:
        open_output(tmp_path, ["a", "b"]).write_results(results(), "rows", "row")
    assert stopped, "while the error is still being raised"
    assert caught


def test_the_record_says_what_was_done(tmp_path):
    work(open_output(tmp_path, inputs={"items.jsonl": "abc"}))
    written = read_record(tmp_path / "x.jsonl")
    assert written["arguments"]["tone"] == "low"
    assert written["inputs"] == {"items.jsonl": "abc"}
    assert written["rows"] == {"asked": 10, "out": 10, "rejected": 0, "written_by_this_run": 10}
    assert {"git_commit", "packages", "device", "seconds", "python"} <= written.keys()


# Files, and a folder that takes long


def write_files(folder, **options):
    """Whether there was something to do."""
    paths = [folder / "one.jsonl", folder / "two.jsonl"]
    with WholeOutput(job(**options), paths) as output:
        if output.is_needed:
            for path in paths:
                write_rows(path, [{"tone": options.get("tone", "low")}])
            output.finish({"out": 1})
        return output.is_needed


def open_training(folder, **options):
    checkpoints = folder / "checkpoints"
    return WholeOutput(job(**options), [folder / "adapter"], [folder / "log"], checkpoints)


def train(folder, **options):
    with open_training(folder, **options) as output:
        if output.is_needed:
            output.begin()
            (folder / "log").write_text("log")
            with new_folder(folder / "adapter") as temporary:
                write_json(temporary / "weights.json", options)
                output.finish({}, temporary)
        return output.is_needed


def test_files_are_written_again_for_another_job_or_when_one_is_missing(tmp_path):
    assert write_files(tmp_path)
    assert not write_files(tmp_path)
    assert write_files(tmp_path, tone="high")
    assert read_rows(tmp_path / "two.jsonl") == [{"tone": "high"}]
    (tmp_path / "two.jsonl").unlink()
    assert write_files(tmp_path, tone="high")
    assert write_files(tmp_path, tone="high", overwrite=True)


def test_the_record_goes_before_the_files_are_touched(tmp_path):
    write_files(tmp_path)
    paths = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    with WholeOutput(job(tone="high"), paths) as output:
        assert output.is_needed
        assert read_record(paths[0]) is None


def test_what_takes_long_is_refused_for_another_job_and_deleted_when_the_new_one_begins(tmp_path):
    assert train(tmp_path)
    assert not train(tmp_path)
    with pytest.raises(InputError, match=r"adapter was made with other settings \(tone was low"):
        train(tmp_path, tone="high")
    before = contents(tmp_path)
    with open_training(tmp_path, tone="high", overwrite=True) as output:
        assert contents(tmp_path) == before, "a model that cannot be loaded costs nothing"
        output.begin()
        left = {path.name for path in contents(tmp_path)}
        assert left == {".adapter.lock", "state.json"}


def test_a_training_that_another_number_of_processes_began_is_refused(tmp_path, monkeypatch):
    with open_training(tmp_path) as output:
        output.begin()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"other settings \(processes was 1, is 2\)"):
        train(tmp_path)
    with pytest.raises(InputError, match=r"--overwrite cannot be used with several processes; del"):
        train(tmp_path, overwrite=True)


@pytest.mark.parametrize(
    ("opened", "again"),
    [
        (open_output, lambda folder: work(open_output(folder))),
        (open_training, train),
        (lambda folder: WholeOutput(job(), [folder / "one.jsonl"]), write_files),
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_second_process_does_not_write_the_same_output(tmp_path, opened, again, overwrite):
    message = "is being written by another process; wait for it or stop it"
    with opened(tmp_path), pytest.raises(InputError, match=message):
        again(tmp_path)
    with opened(tmp_path), pytest.raises(InputError, match=message):
        if opened is open_output:
            work(open_output(tmp_path, overwrite=overwrite))
        else:
            again(tmp_path, overwrite=overwrite)


# Damaged records


@pytest.mark.parametrize("finish", [write_files, train, lambda folder: work(open_output(folder))])
def test_a_changed_file_or_a_missing_record_is_refused(tmp_path, finish):
    finish(tmp_path)
    written = next(p for p in (*tmp_path.glob("*/weights.json"), *tmp_path.glob("*.jsonl")))
    content = written.read_bytes()
    written.write_bytes(content + b"\n")
    message = r" was changed after it was written: .*run.json describes another file; restore it, "
    with pytest.raises(InputError, match=f"{written.name}{message}choose another --output_dir"):
        finish(tmp_path)
    written.write_bytes(content)
    for path in (*tmp_path.rglob("*run.json"), *tmp_path.glob("checkpoints/*")):
        path.unlink()
    if finish is not write_files:  # written again
        with pytest.raises(InputError, match=r"has no run record \(.*run.json\), so .*; move it aw"):
            finish(tmp_path)


NO_RECORD = [b"", b"[]", b"<html>", b"\xff\xfe", b'{"settings": {}']


@pytest.mark.parametrize("content", NO_RECORD)
def test_a_damaged_record_is_one_sentence(tmp_path, content):
    work(open_output(tmp_path))
    (tmp_path / "x.run.json").write_bytes(content)
    message = r"x.run.json is no run record of this version \(.*\); delete it together with .*jsonl"
    with pytest.raises(InputError, match=message):
        open_output(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"), [("settings", None), ("inputs", 5), ("outputs", []), ("rows", {"out": "a"})]
)
def test_a_record_of_another_version_is_one_sentence(tmp_path, key, value):
    work(open_output(tmp_path))
    written = read_record(tmp_path / "x.jsonl")
    for changed in ({**written, key: value}, {k: v for k, v in written.items() if k != key}):
        (tmp_path / "x.run.json").write_text(json.dumps(changed))
        with pytest.raises(InputError, match=rf"no run record of this version \(.*{key}"):
            open_output(tmp_path)


@pytest.mark.parametrize("content", [*NO_RECORD, b'{"settings": 5, "inputs": {}}'])
def test_a_damaged_state_is_one_sentence(interrupted, content):
    state = interrupted / "x.jsonl.parts" / "state.json"
    state.write_bytes(content)
    with pytest.raises(InputError, match=r"state.json is damaged .*; start again with --overwrite"):
        open_output(interrupted)
    state.unlink()
    with pytest.raises(InputError, match=r"has rows, but no state.json that says how they were ma"):
        open_output(interrupted)
    assert work(open_output(interrupted, overwrite=True)) == IDS
    assert read_state(state) is None


@pytest.mark.parametrize("line", [b'{"item_id": ', b"[]", b"\xff", b'{"summary": "a"}', b""])
def test_a_damaged_part_is_one_sentence(interrupted, line):
    part = interrupted / "x.jsonl.parts" / "rank-0.jsonl"
    lines = part.read_bytes().split(b"\n")
    part.write_bytes(b"\n".join([*lines[:2], line, *lines[3:]]))
    message = r"rank-0.jsonl, line 3: no row of this stage; remove the line, or start with --overwr"
    with pytest.raises(InputError, match=message):
        open_output(interrupted)


def test_very_large_files_of_one_size_have_different_digests(tmp_path, monkeypatch):
    """Weights of two models of one shape; parts of them are read instead of all."""
    (tmp_path / "one").write_bytes(bytes(4000))
    whole = file_digests(tmp_path / "one")
    monkeypatch.setattr(record, "HASH_LIMIT", 1000)
    one = file_digests(tmp_path / "one")
    assert one == file_digests(tmp_path / "one") != whole
    (tmp_path / "one").write_bytes(bytes(3999) + b"1")
    assert file_digests(tmp_path / "one") != one
