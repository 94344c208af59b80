"""kill -9 at every moment, and other faults: the next start finishes the job or refuses it.

The fast tests kill toy jobs in forked processes before every call that changes a folder; the slow
ones do that to every stage. With KILL_REPORT=FILE each slow test appends a line to that file.
"""

import hashlib
import itertools
import json
import os
import shutil
import signal
import traceback
from pathlib import Path

import pytest
from fork_server import CALLS, signal_at
from pydantic.dataclasses import dataclass

from mllmrec.ranking.checkpoints import is_trained, last_complete_checkpoint, training_lock
from mllmrec.stage import record
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import rejected_path, write_json, write_rejected, write_rows
from mllmrec.stage.options import CommonOptions
from mllmrec.stage.output import ResumableOutput
from mllmrec.stage.record import Job, write_record, write_state
from mllmrec.stage.transaction import delete_output, finish_deletion, new_folder, writing

REFUSAL = "was made with other "
IDS = [f"i{n}" for n in range(6)]


def files_of(folder):
    """(path relative to `folder`, path) of all files but links and locks."""
    for parent, _, names in os.walk(folder):
        for name in sorted(names):
            path = Path(parent, name)
            if not path.is_symlink() and path.suffix != ".lock":
                yield path.relative_to(folder).as_posix(), path


def is_record(path):
    return path.name == "run.json" or path.name.endswith(".run.json")


def snapshot(folder):
    """dict name -> content of all files; of a run record, what it says of job and outputs."""
    found = {}
    for name, path in files_of(folder):
        content = path.read_bytes()
        if is_record(path):
            row = json.loads(content)
            content = {key: row[key] for key in ("settings", "inputs", "outputs")}
        found[name] = content
    return found


def check_records(folder):
    """Assert that every file which a run record lists has its digest; return the records.

    Folders that are being made or removed have hidden names, under which nobody looks for them.
    """
    records = [
        path for name, path in files_of(folder) if is_record(path) and "/." not in f"/{name}"
    ]
    for path in records:
        for name, digest in json.loads(path.read_bytes())["outputs"].items():
            described = path.parent / name
            assert described.exists(), f"{path} describes {name}, which is missing"
            content = described.read_bytes()
            assert hashlib.sha256(content).hexdigest() == digest, f"{path}: {name}"
    return records


# The library, with toy rows


@dataclass
class Toy(CommonOptions):
    tone: str = "low"


def toy_job(**options):
    return Job.of(Toy(config="none", **options), {})


def rows_of(tone):
    """Rows of the job, and those that it rejects."""
    rejected = ["i2"] if tone == "low" else []
    rows = [{"item_id": i, "summary": f"{tone} {i}"} for i in IDS if i not in rejected]
    return rows, [{"item_id": i, "reason": tone} for i in rejected]


def write_files(folder, tone="low", **options):
    """A stage with two outputs and an optional third."""
    one, two = folder / "one.jsonl", folder / "two.jsonl"
    with writing(toy_job(tone=tone, **options), [one, two], [rejected_path(one)]) as output:
        if output.is_needed:
            rows, rejected = rows_of(tone)
            write_rows(one, rows)
            write_rejected(rejected_path(one), rejected)
            write_rows(two, rows[:2])
            output.finish({"out": len(rows)})


def write_folder(folder, tone="low", **options):
    """A stage with a folder as its output."""
    target = folder / "merged"
    with writing(toy_job(tone=tone, **options), [target]) as output:
        if output.is_needed:
            with new_folder(target) as temporary:
                for number, row in enumerate(rows_of(tone)[0][:2]):
                    write_json(temporary / f"{tone}-{number}.json", row)
                output.finish({}, temporary)


def append_rows(folder, tone="low", retry=False, **options):
    """A stage that resumes."""
    job = toy_job(tone=tone, **options)
    output = ResumableOutput(folder / "x.jsonl", "item_id", IDS, job, retry)
    if output.is_up_to_date():
        return
    rows, rejected = rows_of("high" if retry else tone)
    rows, rejected = ({row["item_id"]: row for row in some} for some in (rows, rejected))
    with output:
        for item_id in output.todo:
            if item_id in rows:
                output.write({**rows[item_id], "summary": tone})
            else:
                output.reject(item_id, rejected[item_id]["reason"])


def train_adapter(folder, tone="low", **options):
    """A stage that resumes from checkpoints, with a folder as its output."""
    job, adapter = toy_job(tone=tone, **options), folder / "adapter"
    checkpoints = folder / "checkpoints"
    with training_lock(adapter):
        if is_trained(adapter, job):
            return
        last_complete_checkpoint(checkpoints)
        rows, rejected = rows_of(tone)
        write_state(checkpoints / "state.json", job, processes=1)
        write_rejected(folder / "training.rejected.jsonl", rejected)
        (checkpoints / "checkpoint-3").mkdir(exist_ok=True)
        (checkpoints / "checkpoint-3" / "trainer_state.json").write_text(tone)
        write_rows(folder / "training_log.jsonl", [{"step": len(rejected)}])
        with new_folder(adapter) as temporary:
            write_json(temporary / "weights.json", rows[0])
            write_record(temporary, job, 0.0, {})


JOBS = {
    "files": write_files,
    "folder": write_folder,
    "rows": append_rows,
    "training": train_adapter,
}
REFUSES = ("rows", "training")  # a job whose options differ, without --overwrite


@pytest.fixture
def quick(monkeypatch):
    """Nothing that takes time and changes no file: no fsync, no git."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    monkeypatch.setattr(record, "machine", lambda: {"device": "toy"})


def killed_at(number, folder, action):
    """Exit code of a forked process that is killed before its `number`-th call in `folder`."""
    pid = os.fork()
    if pid == 0:
        try:
            signal_at(number, folder, calls=(*CALLS, "mkdir"))
            action()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def every_kill(tmp_path, start, action):
    """Yield a copy of the folder `start` for every call of action(folder) before which it is
    killed, and one for the run that ends.
    """
    for number in itertools.count(1):
        folder = tmp_path / "killed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(start, folder)
        code = killed_at(number, folder, lambda folder=folder: action(folder))
        assert code in (0, -signal.SIGKILL), f"call {number}"
        yield folder
        if code == 0:
            assert number > 5, "there were calls"
            return


def restarted(tmp_path, state, action):
    """What action(folder) makes of a copy of `state`: a snapshot, or None if it is refused."""
    folder = tmp_path / "restarted"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(state, folder)
    try:
        action(folder)
    except InputError as refusal:
        assert REFUSAL in str(refusal)
        return None
    check_records(folder)
    return snapshot(folder)


def finished(tmp_path, name, *actions):
    """(folder, snapshot) after `actions`, undisturbed."""
    folder = tmp_path / name
    folder.mkdir()
    for action in actions:
        action(folder)
    return folder, snapshot(folder)


@pytest.mark.parametrize("rerun", [False, True], ids=["first run", "other options"])
@pytest.mark.parametrize("kind", JOBS)
def test_a_job_killed_at_any_call_is_finished_or_refused(quick, tmp_path, kind, rerun):
    """Killed: the first run, or one with other options over its finished output."""
    job, refuses = JOBS[kind], kind in REFUSES
    old, low = finished(tmp_path, "old", job)
    empty, _ = finished(tmp_path, "empty")
    _, high = finished(tmp_path, "high", lambda folder: job(folder, "high"))
    assert low != high

    def again(folder):  # only what resumes needs leave to delete
        job(folder, "high", overwrite=refuses)

    start, killed = (old, again) if rerun else (empty, job)
    for state in every_kill(tmp_path, start, killed):
        check_records(state)
        assert restarted(tmp_path, state, again) == high
        old_job = restarted(tmp_path, state, job)
        assert old_job == low or (rerun and refuses and old_job is None)
        new_job = restarted(tmp_path, state, lambda folder: job(folder, "high"))
        assert new_job == high or (refuses and new_job is None)
        assert restarted(tmp_path, state, lambda f: job(f, overwrite=True)) == low


def test_a_killed_pilot_and_full_run_give_the_rows_of_one_run(quick, tmp_path):
    _, whole = finished(tmp_path, "whole", append_rows)
    empty, _ = finished(tmp_path, "empty")
    pilot, some = finished(tmp_path, "pilot", lambda folder: append_rows(folder, limit=3))
    assert some["x.jsonl"] != whole["x.jsonl"]
    for state in every_kill(tmp_path, empty, lambda folder: append_rows(folder, limit=3)):
        check_records(state)
        assert restarted(tmp_path, state, append_rows) == whole
        assert restarted(tmp_path, state, lambda f: append_rows(f, limit=3)) == some
    for state in every_kill(tmp_path, pilot, append_rows):
        check_records(state)
        assert restarted(tmp_path, state, append_rows) == whole
        again = restarted(tmp_path, state, lambda folder: append_rows(folder, limit=3))
        assert again["x.jsonl"] in (some["x.jsonl"], whole["x.jsonl"])


def test_a_killed_retry_of_rejected_rows_loses_no_row(quick, tmp_path):
    def retry(folder):
        append_rows(folder, retry=True)

    start, before = finished(tmp_path, "start", append_rows)
    _, after = finished(tmp_path, "retried", append_rows, retry)
    assert "x.rejected.jsonl" in before and "x.rejected.jsonl" not in after
    for state in every_kill(tmp_path, start, retry):
        check_records(state)
        assert restarted(tmp_path, state, retry) == after
        assert restarted(tmp_path, state, append_rows) in (before, after)


@pytest.mark.parametrize("world", [1, 3])
def test_a_killed_process_of_several_leaves_the_rows_of_the_others(
    quick, tmp_path, monkeypatch, world
):
    """The other shards are done; then another number of processes finishes the job."""
    _, whole = finished(tmp_path, "whole", append_rows)

    def shards(folder, *ranks, count=2):
        for rank in ranks:
            with monkeypatch.context() as patch:
                patch.setenv("WORLD_SIZE", str(count))
                patch.setenv("RANK", str(rank))
                append_rows(folder)

    start, _ = finished(tmp_path, "start", lambda folder: shards(folder, 1))
    for state in every_kill(tmp_path, start, lambda folder: shards(folder, 0)):
        check_records(state)
        assert restarted(tmp_path, state, lambda f: shards(f, *range(world), count=world)) == whole


def test_a_killed_deletion_is_finished_by_the_next_start(quick, tmp_path):
    """Either nothing is deleted, or all of it, and nothing else."""

    def parts(folder):
        return [folder / name for name in ("x", "x.jsonl", "x.run.json", "gone.jsonl")]

    def prepare(folder):
        for name in ("x/one", "x/two", "x/more/three", "x.jsonl", "x.run.json", "other.jsonl"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(name)
        (folder / "x.run.json").write_text(
            json.dumps({key: {} for key in ("settings", "inputs", "outputs")})
        )

    start, before = finished(tmp_path, "start", prepare)
    outcomes = []
    for state in every_kill(tmp_path, start, lambda f: delete_output(f / "x.jsonl", parts(f))):
        after = restarted(tmp_path, state, lambda f: finish_deletion(f / "x.jsonl", parts(f)))
        assert after in (before, {"other.jsonl": b"other.jsonl"})
        outcomes.append(after == before)
    assert outcomes[-1] is False
    assert outcomes == sorted(outcomes, reverse=True)
