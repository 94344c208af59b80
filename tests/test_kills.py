"""kill -9 at every moment, and other faults: the next start finishes the job or refuses it.

Toy jobs of all kinds of output run in forked processes, which are killed before each call that
changes a folder. Real stages are killed amid their work in test_pipeline.py (2, 3, 6),
test_training_run.py (5) and at the end of this file (the download).
"""

from mllmrec.stage.main import run_main

import functools
import hashlib
import itertools
import json
import os
import resource
import shutil
import signal
import sys
import threading
import traceback
import zipfile
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import ROOT
from fork_server import LIGHT, ForkServer, kill_after
from pydantic.dataclasses import dataclass
from test_download import Server

from mllmrec.ranking.checkpoints import last_complete_checkpoint, seal_checkpoint
from mllmrec.stage import record
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import rejected_path, write_json, write_rejected, write_rows
from mllmrec.stage.options import CommonOptions
from mllmrec.stage.output import RowOutput, WholeOutput, delete, new_folder
from mllmrec.stage.record import Job

CALLS = ("replace", "rename", "unlink", "remove", "rmdir", "mkdir")  # of os: what changes a folder
REFUSAL, NO_RECORD = "was made with other ", "has no run record"
IDS = [f"i{n}" for n in range(12)]
STEPS = (1, 2, 3)
NOBODY = 65534  # a user id


# Toy jobs


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
    with WholeOutput(toy_job(tone=tone, **options), [one, two], [rejected_path(one)]) as output:
        if output.is_needed:
            rows, rejected = rows_of(tone)
            write_rows(one, rows)
            write_rejected(rejected_path(one), rejected)
            write_rows(two, rows[:2])
            output.finish({"out": len(rows)})


def write_folder(folder, tone="low", **options):
    """A stage with a folder as its output."""
    target = folder / "merged"
    with WholeOutput(toy_job(tone=tone, **options), [target]) as output:
        if output.is_needed:
            with new_folder(target) as temporary:
                for number, row in enumerate(rows_of(tone)[0][:2]):
                    write_json(temporary / f"{tone}-{number}.json", row)
                output.finish({}, temporary)


def append_rows(folder, tone="low", retry=False, stop_after=None, **options):
    """A stage that resumes; returns the ids that it computed."""
    output = RowOutput(folder / "x.jsonl", "item_id", IDS, toy_job(tone=tone, **options), retry)
    if output.is_up_to_date():
        return []
    rejected = {} if retry else {row["item_id"]: row["reason"] for row in rows_of(tone)[1]}
    computed = []
    with output:
        for item_id in output.todo:
            if len(computed) == stop_after:
                raise RuntimeError("stop")
            if item_id in rejected:
                output.reject(item_id, rejected[item_id])
            else:
                output.write({"item_id": item_id, "summary": f"{tone} {item_id}"})
            computed.append(item_id)
    return computed


def train_adapter(folder, tone="low", stop_after=None, **options):
    """A stage that resumes from checkpoints: each step adds to what the last one holds."""
    adapter, checkpoints = folder / "adapter", folder / "checkpoints"
    log, rejected = folder / "training_log.jsonl", folder / "training.rejected.jsonl"
    job = toy_job(tone=tone, **options)
    with WholeOutput(job, [adapter], [log, rejected], checkpoints) as output:
        if not output.is_needed:
            return
        output.begin()
        last = last_complete_checkpoint(checkpoints)
        weights = json.loads(Path(last, "weights.json").read_bytes()) if last else []
        for step in STEPS[len(weights) :]:
            if len(weights) == stop_after:
                write_checkpoint(checkpoints / f"checkpoint-{step}", [])
                (checkpoints / f"checkpoint-{step}" / "digests.json").unlink()
                raise RuntimeError("stop")
            weights.append(f"{tone} {step}")
            write_checkpoint(checkpoints / f"checkpoint-{step}", weights)
            for old in checkpoints.glob(f"checkpoint-{step - 2}"):
                shutil.rmtree(old)  # as transformers does
        write_rows(log, [{"step": step} for step in STEPS])
        write_rejected(rejected, rows_of(tone)[1])
        with new_folder(adapter) as temporary:
            write_json(temporary / "weights.json", weights)
            output.finish({}, temporary)


def write_checkpoint(folder, weights):
    """As the Trainer does, not at once and over what is there."""
    folder.mkdir(exist_ok=True)
    (folder / "weights.json").write_text(json.dumps(weights))
    (folder / "trainer_state.json").write_text('{"best_model_checkpoint": null}')
    with zipfile.ZipFile(folder / "rng_state.pth", "w") as file:
        file.writestr(zipfile.ZipInfo("data"), "state")
    seal_checkpoint(folder)


JOBS = {
    "files": write_files,
    "folder": write_folder,
    "rows": append_rows,
    "training": train_adapter,
}
RESUMES = ("rows", "training")  # other options are refused without --overwrite


# What is in a folder


def files_of(folder):
    """(path relative to `folder`, path) of all files but locks."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix != ".lock":
            yield path.relative_to(folder).as_posix(), path


def is_record(path):
    return path.name == "run.json" or path.name.endswith(".run.json")


def snapshot(folder):
    """dict name -> content of all files; of a run record, what it says of job and outputs.

    Without checkpoints: how many an interrupted training leaves is of no concern.
    """
    found = {}
    for name, path in files_of(folder):
        if name.startswith("checkpoints/checkpoint-"):
            continue
        content = path.read_bytes()
        if is_record(path):
            row = json.loads(content)
            content = {key: row[key] for key in ("settings", "inputs", "outputs")}
        found[name] = content
    return found


def check_records(folder):
    """Assert that every file which a run record lists has its digest.

    Folders that are being made or removed have hidden names, under which nobody looks for them.
    """
    for name, path in files_of(folder):
        if not is_record(path) or "/." in f"/{name}":
            continue
        for described, digest in json.loads(path.read_bytes())["outputs"].items():
            content = path.parent / described
            assert content.exists(), f"{path} describes {described}, which is missing"
            assert hashlib.sha256(content.read_bytes()).hexdigest() == digest, f"{path}: {described}"


def finished_ids(folder):
    """Ids of the whole lines of x.jsonl and its parts, each once."""
    paths = [folder / "x.jsonl", *folder.glob("x.jsonl.parts/rank-*.jsonl")]
    lines = [n for p in paths if p.exists() for n in p.read_bytes().split(b"\n")[:-1]]
    return {json.loads(line)["item_id"] for line in lines}


# Forked processes


def started(action, environment=(), prepare=lambda: None):
    """(process id, its stderr) of a forked process with `action()` as the main of a script."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return pid, reading
    code = 1
    try:
        os.dup2(writing, 2)
        sys.stderr = open(2, "w", closefd=False)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.update(environment)
        prepare()
        run_main(action)
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)


def ended(pid, reading):
    """(exit code, negative: of a signal, stderr) of a forked process that has ended."""
    with open(reading) as file:
        text = file.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text


def signal_at(number, folder, signal_number=signal.SIGKILL):
    """Make this process get a signal right before its `number`-th call of CALLS in `folder`."""
    count, inside = 0, os.path.abspath(folder)

    def counted(call):
        @functools.wraps(call)
        def count_and_call(*paths, **options):
            nonlocal count
            is_relative = options.get("dir_fd") is not None  # as rmtree calls
            count += is_relative or any(os.path.abspath(p).startswith(inside) for p in paths[:2])
            if count == number:
                count += 1
                os.kill(os.getpid(), signal_number)
            return call(*paths, **options)

        return count_and_call

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))


def every_state(tmp_path, start, action, signal_number=signal.SIGKILL):
    """Yield (folder, exit code, stderr) for every call of action(folder) at which it gets a signal,
    and for the run that ends. folder: at first a copy of `start`.
    """
    for number in itertools.count(1):
        folder = fresh_copy(start, tmp_path / "killed")
        prepare = functools.partial(signal_at, number, folder, signal_number)
        code, text = ended(*started(functools.partial(action, folder), prepare=prepare))
        yield folder, code, text
        if code == 0:
            assert number > 2, "there were calls"
            return


def every_kill(tmp_path, start, action):
    """The folders of `every_state`, with records that describe what is beside them."""
    for folder, code, text in every_state(tmp_path, start, action):
        assert code in (0, -signal.SIGKILL), text
        check_records(folder)
        yield folder


def fresh_copy(source, target):
    shutil.rmtree(target, ignore_errors=True)
    return shutil.copytree(source, target)


def restarted(tmp_path, state, action):
    """What action(folder) makes of a copy of `state`: a snapshot, or the sentence that refuses."""
    folder = fresh_copy(state, tmp_path / "restarted")
    try:
        action(folder)
    except InputError as refusal:
        return str(refusal)
    check_records(folder)
    return snapshot(folder)


def finished(tmp_path, name, *actions):
    """(folder, snapshot) after `actions`, undisturbed but for those that stop themselves."""
    folder = tmp_path / name
    folder.mkdir()
    for action in actions:
        try:
            action(folder)
        except RuntimeError as error:
            assert str(error) == "stop"
    return folder, snapshot(folder)


@pytest.fixture
def quick(monkeypatch):
    """Nothing that takes time and changes no file: no fsync, no git."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    monkeypatch.setattr(record, "machine", lambda: {"device": "toy"})


# kill -9

SCENARIOS = [(kind, scenario) for kind in JOBS for scenario in ("first", "other", "same again")]
SCENARIOS += [(kind, name) for kind in RESUMES for name in ("resumed", "other over unfinished")]


@pytest.mark.parametrize(("kind", "scenario"), SCENARIOS)
def test_a_job_killed_at_any_call_is_finished_or_refused(quick, tmp_path, kind, scenario):
    """Killed: the first run; one that resumes; one with other options over a finished or an
    unfinished output, with --overwrite where that is needed; the same options with --overwrite.
    """
    job, refuses = JOBS[kind], kind in RESUMES

    def other(folder):
        job(folder, "high")

    def other_overwriting(folder):
        job(folder, "high", overwrite=True)

    again = other_overwriting if refuses else other
    empty, _ = finished(tmp_path, "empty")
    old, low = finished(tmp_path, "old", job)
    _, high = finished(tmp_path, "high", other)
    assert low != high
    start, killed, same = {
        "first": (empty, job, low),
        "other": (old, again, high),
        "same again": (old, lambda folder: job(folder, overwrite=True), low),
        "resumed": (None, job, low),
        "other over unfinished": (None, again, high),
    }[scenario]
    if start is None:
        start, state = finished(tmp_path, "unfinished", lambda folder: job(folder, stop_after=2))
        assert state and state.items() != low.items()
    allowed = (REFUSAL,) if scenario in ("first", "resumed") else (REFUSAL, NO_RECORD)
    allowed = allowed if refuses else ()
    outcomes = {job: (low, allowed), other: (high, allowed), again: (high, ()), killed: (same, ())}
    for state in every_kill(tmp_path, start, killed):
        for action, (wanted, sentences) in outcomes.items():
            found = restarted(tmp_path, state, action)
            assert found == wanted or any(words in found for words in sentences), found


def test_a_file_killed_while_it_is_replaced_is_the_old_or_the_new_one(quick, tmp_path):
    start, _ = finished(tmp_path, "start", lambda folder: write_json(folder / "x.json", "old"))

    def replace(folder):
        for value in ("new", "newer"):
            write_json(folder / "x.json", value)

    found = [(state / "x.json").read_text() for state in every_kill(tmp_path, start, replace)]
    assert [text for text, _ in itertools.groupby(found)] == ['"old"\n', '"new"\n', '"newer"\n']


def test_a_killed_deletion_leaves_each_file_and_folder_whole_or_not_at_all(quick, tmp_path):
    def prepare(folder):
        (folder / "x" / "more").mkdir(parents=True)
        for name in ("x/one", "x/more/two", "x.run.json"):
            (folder / name).write_text('{"settings": {}, "inputs": {}, "outputs": {}}')

    start, before = finished(tmp_path, "start", prepare)
    visible = []
    for state in every_kill(
        tmp_path, start, lambda folder: delete([folder / "x.run.json", folder / "x"])
    ):
        visible.append({name for name, _ in files_of(state) if not name.startswith(".")})
    assert [*map(len, visible)] == sorted(map(len, visible), reverse=True)
    assert {frozenset(names) for names in visible} == {
        frozenset(before),
        frozenset(("x/one", "x/more/two")),
        frozenset(),
    }


def test_a_row_that_was_finished_when_the_process_was_killed_is_not_computed_again(quick, tmp_path):
    """Killed amid the line of every row but the first."""
    _, whole = finished(tmp_path, "whole", append_rows)
    written = [i for i in IDS if i != "i2"]
    for number in range(1, len(written)):
        folder, _ = finished(tmp_path, f"killed-{number}")
        kill = functools.partial(kill_after, number)
        code, text = ended(*started(functools.partial(append_rows, folder), prepare=kill))
        assert code == -signal.SIGKILL, text
        assert finished_ids(folder) == {*written[:number]}
        computed = append_rows(folder)
        assert [i for i in computed if i != "i2"] == written[number:]
        assert snapshot(folder) == whole


def test_a_killed_pilot_and_full_run_give_the_rows_of_one_run(quick, tmp_path):
    def pilot(folder):
        append_rows(folder, limit=4)

    _, whole = finished(tmp_path, "whole", append_rows)
    empty, _ = finished(tmp_path, "empty")
    start, some = finished(tmp_path, "pilot", pilot)
    assert some["x.jsonl"] != whole["x.jsonl"]
    for state in every_kill(tmp_path, empty, pilot):
        assert restarted(tmp_path, state, append_rows) == whole
        assert restarted(tmp_path, state, pilot) == some
    for state in every_kill(tmp_path, start, append_rows):
        assert {"i0", "i1", "i3"} <= finished_ids(state)
        assert restarted(tmp_path, state, append_rows) == whole
        assert restarted(tmp_path, state, pilot)["x.jsonl"] in (some["x.jsonl"], whole["x.jsonl"])


def test_a_killed_retry_of_rejected_rows_loses_no_row(quick, tmp_path):
    def retry(folder):
        append_rows(folder, retry=True)

    start, before = finished(tmp_path, "start", append_rows)
    _, after = finished(tmp_path, "retried", append_rows, retry)
    assert "x.rejected.jsonl" in before and "x.rejected.jsonl" not in after
    for state in every_kill(tmp_path, start, retry):
        assert {*IDS} - {"i2"} <= finished_ids(state)
        assert restarted(tmp_path, state, retry) == after
        assert restarted(tmp_path, state, append_rows) in (before, after)


def shard(folder, rank, world, kill=None):
    """A started process of several; killed amid a row if `kill` rows are given."""
    environment = {"RANK": str(rank), "WORLD_SIZE": str(world)}
    prepare = functools.partial(kill_after, kill) if kill else lambda: None
    return started(functools.partial(append_rows, folder), environment, prepare)


@pytest.mark.parametrize("world", [1, 3])
def test_a_killed_process_of_several_leaves_the_rows_of_the_others(
    quick, tmp_path, monkeypatch, world
):
    """The other shard is done; then another number of processes finishes the job."""
    _, whole = finished(tmp_path, "whole", append_rows)
    start, _ = finished(tmp_path, "start")
    assert ended(*shard(start, 1, 2))[0] == 0
    monkeypatch.setenv("WORLD_SIZE", "2")

    def finish(folder):
        monkeypatch.setenv("WORLD_SIZE", str(world))
        for rank in range(world):
            monkeypatch.setenv("RANK", str(rank))
            append_rows(folder)
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "2")

    for state in every_kill(tmp_path, start, append_rows):
        assert {*IDS[1::2]} <= finished_ids(state)
        assert restarted(tmp_path, state, finish) == whole


def test_processes_that_share_an_output_may_all_be_killed_and_change_in_number(quick, tmp_path):
    _, whole = finished(tmp_path, "whole", append_rows)
    folder, _ = finished(tmp_path, "killed")
    before = set()
    for world in (3, 2):
        processes = [shard(folder, rank, world, kill=1) for rank in range(world)]
        for process in processes:
            assert ended(*process)[0] == -signal.SIGKILL
        assert len(finished_ids(folder)) == len(before) + world, "each finished another row"
        assert before < (before := finished_ids(folder))
    processes = [shard(folder, rank, 3) for rank in range(3)]
    assert [ended(*process)[0] for process in processes] == [0, 0, 0]
    assert snapshot(folder) == whole


def test_a_job_that_begins_while_another_one_waits_is_not_mixed_with_it(quick, tmp_path):
    """Both start in an empty folder; while one loads its model, the other one writes."""

    def opened(tone, **options):
        job = toy_job(tone=tone, **options)
        return RowOutput(tmp_path / "x.jsonl", "item_id", IDS, job)

    waiting = [opened("high"), opened("high", limit=2)]
    overwriting = opened("high", overwrite=True)
    with opened("low") as output:
        output.write(rows_of("low")[0][0])
        for other in waiting:
            with pytest.raises(InputError, match=REFUSAL), other:
                pass
        with pytest.raises(InputError, match="being written by another process"), overwriting:
            pass
    append_rows(tmp_path, "low")
    for other in waiting:
        with pytest.raises(InputError, match=REFUSAL), other:
            pass
    with overwriting:
        assert finished_ids(tmp_path) == set()


# Other faults


@pytest.mark.parametrize("kind", JOBS)
@pytest.mark.parametrize(
    ("number", "code", "message"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_a_signal_at_any_call_is_one_sentence(quick, tmp_path, kind, number, code, message):
    job = JOBS[kind]
    empty, _ = finished(tmp_path, "empty")
    _, whole = finished(tmp_path, "whole", job)
    *interrupted, last = [
        (state_code, text, restarted(tmp_path, folder, job), {*snapshot(folder)})
        for folder, state_code, text in every_state(tmp_path, empty, job, number)
    ]
    assert last[0] == 0
    for state_code, text, again, names in interrupted:
        assert (state_code, text) == (code, f"{message}; the same command resumes\n")
        assert not [name for name in names if ".tmp-" in name]
        assert again == whole


@pytest.mark.parametrize("kind", JOBS)
def test_a_disk_that_is_full_at_any_byte_is_one_sentence(quick, tmp_path, kind):
    """By a limit of the size of files: what does not fit is cut, as on a full disk."""
    job = JOBS[kind]
    _, whole = finished(tmp_path, "whole", job)
    for size in range(0, 10_000, 20):
        folder = tmp_path / "full"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
        code, text = ended(*started(functools.partial(job, folder), prepare=limit))
        check_records(folder)
        assert not [name for name in snapshot(folder) if ".tmp-" in name]
        if code == 0:
            break
        assert (code, text.count("\n")) == (1, 1), text
        assert text.startswith(f"error: {folder}/"), text
        assert text.endswith(": File too large; the same command resumes\n")
        assert restarted(tmp_path, folder, job) == whole
    assert size > 200
    assert snapshot(folder) == whole


@pytest.mark.parametrize("kind", JOBS)
def test_a_folder_that_cannot_be_written_is_one_sentence(quick, tmp_path, kind):
    job, folder = JOBS[kind], tmp_path / "closed"
    folder.mkdir(mode=0o555)

    def prepare():
        os.chdir(folder)
        if os.geteuid() == 0:  # who may write anywhere
            os.seteuid(NOBODY)

    code, text = ended(*started(functools.partial(job, Path()), prepare=prepare))
    folder.chmod(0o755)
    assert code == 1
    remedy = "Permission denied; make it accessible, or name another folder; the same command"
    assert text.startswith("error: ") and remedy in text and text.count("\n") == 1, text
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "name", "is_folder"),
    [
        ("files", "one.jsonl", True),
        ("files", "one.run.json", True),
        ("folder", "merged", False),
        ("rows", "x.jsonl", True),
        ("rows", "x.jsonl.parts", False),
        ("rows", "x.rejected.jsonl", True),
        ("rows", ".x.jsonl.lock", True),
        ("training", "adapter", False),
        ("training", "checkpoints", False),
        ("training", "training_log.jsonl", True),
    ],
)
def test_a_file_where_a_folder_belongs_and_the_reverse(quick, tmp_path, kind, name, is_folder):
    job, folder = JOBS[kind], tmp_path / "work"
    _, whole = finished(tmp_path, "whole", job)
    mine = folder / name / "mine" if is_folder else folder / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    code, text = ended(*started(functools.partial(job, folder)))
    assert (code, text.count("\n"), text[:7]) == (1, 1, "error: "), text
    assert name in text and "move it away" in text
    assert mine.read_text() == "mine"
    shutil.rmtree(folder / name) if is_folder else mine.unlink()
    assert restarted(tmp_path, folder, job) == whole


def test_a_killed_download_downloads_only_what_is_left(tmp_path):
    """Amid a line, with other images on their way."""
    images = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=images.serve_forever, args=(0.05,), daemon=True).start()
    lines = [
        {"item_id": f"i{n}", "url": f"http://127.0.0.1:{images.server_port}/good?n={n}"}
        for n in range(8)
    ]
    server = ForkServer(tmp_path, LIGHT, ROOT)
    (tmp_path / "c.yaml").write_text("common:\n")

    def download(name, **fault):
        write_rows(tmp_path / name / "image_urls.jsonl", lines)
        words = ["--config", str(tmp_path / "c.yaml"), "--data_dir", str(tmp_path / name)]
        words += ["--allow_private", "true", "--workers", "2"]
        return server.run("data_processing/download_images.py", *words, **fault)

    try:
        assert download("whole").returncode == 0
        killed = download("killed", kill_after=3)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert "8 rows, 5 of them now" in download("killed").stderr
        assert snapshot(tmp_path / "killed") == snapshot(tmp_path / "whole")
    finally:
        server.close()
        images.shutdown()
        images.server_close()
