"""The output of a long stage: neither interruptions nor the number of processes change a byte."""

import json
import os
import signal
import subprocess
import sys

import pytest
from pydantic.dataclasses import dataclass

from mllmrec.stage import record
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import read_rows
from mllmrec.stage.options import CommonOptions
from mllmrec.stage.output import RowOutput
from mllmrec.stage.record import Job, file_digests, read_record

IDS = [f"i{n}" for n in range(10)]


@dataclass
class Options(CommonOptions):
    tone: str = "low"


def open_output(tmp_path, ids=IDS, inputs=None, retry_rejected=False, **options):
    job = Job.of(Options(config="none", **options), inputs or {})
    return RowOutput(tmp_path / "x.jsonl", "item_id", ids, job, retry_rejected)


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


def undisturbed(tmp_path):
    folder = tmp_path / "undisturbed"
    folder.mkdir()
    work(open_output(folder))
    return (folder / "x.jsonl").read_bytes()


def test_a_crash_loses_nothing_and_repeats_nothing(tmp_path):
    with pytest.raises(RuntimeError):
        work(open_output(tmp_path), stop_after=4)
    assert not (tmp_path / "x.jsonl").exists(), "no incomplete file under the final name"
    assert not open_output(tmp_path).is_up_to_date()
    assert work(open_output(tmp_path)) == IDS[4:]
    assert (tmp_path / "x.jsonl").read_bytes() == undisturbed(tmp_path)
    assert open_output(tmp_path).is_up_to_date()
    assert not (tmp_path / "x.jsonl.parts").exists()


def test_a_truncated_last_line_is_dropped_and_computed_again(tmp_path):
    with pytest.raises(RuntimeError):
        work(open_output(tmp_path), stop_after=4)
    part = tmp_path / "x.jsonl.parts" / "rank-0.jsonl"
    part.write_bytes(part.read_bytes()[:-7])
    assert work(open_output(tmp_path)) == IDS[3:]
    assert (tmp_path / "x.jsonl").read_bytes() == undisturbed(tmp_path)


def test_processes_share_the_work_and_the_bytes(tmp_path, monkeypatch):
    expected, worked = undisturbed(tmp_path), []
    for rank in ("1", "0", "2"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "3")
        worked += work(open_output(tmp_path))
    assert sorted(worked) == IDS
    assert (tmp_path / "x.jsonl").read_bytes() == expected


def test_another_number_of_processes_resumes(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    first = work(open_output(tmp_path))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert sorted(first + work(open_output(tmp_path))) == IDS
    assert (tmp_path / "x.jsonl").read_bytes() == undisturbed(tmp_path)


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


@pytest.mark.parametrize("crash", [True, False])
def test_other_settings_or_inputs_are_an_error_unless_overwritten(tmp_path, crash):
    if crash:
        with pytest.raises(RuntimeError):
            work(open_output(tmp_path), stop_after=4)
    else:
        work(open_output(tmp_path))
    message = r"other settings \(tone was low, is high\).*--overwrite true"
    with pytest.raises(InputError, match=message):
        open_output(tmp_path, tone="high")
    with pytest.raises(InputError, match=r"other inputs \(items.jsonl was None, is abc\)"):
        open_output(tmp_path, inputs={"items.jsonl": "abc"})
    assert work(open_output(tmp_path, tone="high", overwrite=True)) == IDS
    assert read_record(tmp_path / "x.jsonl")["settings"]["tone"] == "high"


def test_two_processes_of_one_rank_do_not_write_together(tmp_path):
    with open_output(tmp_path), pytest.raises(InputError, match="being written by another process"):
        work(open_output(tmp_path))


def test_an_output_without_a_record_is_an_error(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"item_id": "i0"}\n')
    with pytest.raises(InputError, match="no run record"):
        open_output(tmp_path)


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


KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_output import open_output
output = open_output(Path(sys.argv[1]))
with output:
    for n, item_id in enumerate(output.todo):
        output.write({"item_id": item_id, "summary": f"of {item_id}"})
        print(n, flush=True)
        time.sleep(0.02)
"""


def test_kill_9_loses_no_finished_row(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path), os.path.dirname(__file__)],
        stdout=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.strip() == "4":
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    output = open_output(tmp_path)
    assert output.todo[0] in IDS[5:7], "the five rows that were reported are done"
    work(output)
    assert (tmp_path / "x.jsonl").read_bytes() == undisturbed(tmp_path)


def test_the_record_says_what_was_done(tmp_path):
    work(open_output(tmp_path, inputs={"items.jsonl": "abc"}))
    written = read_record(tmp_path / "x.jsonl")
    assert written["arguments"]["tone"] == "low"
    assert written["inputs"] == {"items.jsonl": "abc"}
    assert written["rows"] == {"asked": 10, "out": 10, "rejected": 0, "written_by_this_run": 10}
    for key in ("git_commit", "packages", "device", "seconds", "python"):
        assert key in written
    json.dumps(written)


def test_very_large_files_of_one_size_have_different_digests(tmp_path, monkeypatch):
    """Weights of two models of one shape; parts of them are read instead of all."""
    (tmp_path / "one").write_bytes(bytes(4000))
    whole = file_digests(tmp_path / "one")
    monkeypatch.setattr(record, "HASH_LIMIT", 1000)
    one = file_digests(tmp_path / "one")
    assert one == file_digests(tmp_path / "one") != whole
    (tmp_path / "one").write_bytes(bytes(3999) + b"1")
    assert file_digests(tmp_path / "one") != one
