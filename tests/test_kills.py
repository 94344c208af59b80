"""kill -9 at every moment, and other faults: the next start finishes the job or refuses it.

Toy jobs of all kinds of output run in forked processes, which are killed before each call that
changes a folder. Real stages are killed in the middle of their work in test_pipeline.py (2, 3, 6),
test_training_run.py (5) and at the end of this file (the download).
"""

from mllmrec.stage.main import RESUME, run_main

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
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import ROOT
from fork_server import LIGHT, ForkServer, kill_after
from test_download import Server
from toy_jobs import IDS, append_rows, open_rows, train_adapter, write_files, write_folder

from mllmrec.stage import record
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import write_rows

CALLS = ("replace", "rename", "unlink", "remove", "rmdir", "mkdir")  # of os: what changes a folder
JOBS = {
    "files": write_files,
    "folder": write_folder,
    "rows": append_rows,
    "training": train_adapter,
}
RESUMES = ("rows", "training")  # other options are refused without --overwrite
REFUSAL, NO_RECORD = "was made with other ", "has no run record"
NOBODY = 65534  # a user id
ALL_KINDS = pytest.mark.parametrize("kind", JOBS)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Nothing that takes time and changes no file."""
    monkeypatch.setattr(record, "machine", lambda: {"device": "toy"})


# What is in a folder


def snapshot(folder):
    """dict name -> content of all files but locks; of a record, what it says of job and outputs.

    Without checkpoints: how many of them an interrupted training leaves is of no concern. Asserts
    that every file which a record lists has its digest; folders that are being made or removed have
    hidden names, under which nobody looks for them.
    """
    found = {}
    for path in folder.rglob("*"):
        if not path.is_file() or path.suffix == ".lock":
            continue
        name, content = path.relative_to(folder).as_posix(), path.read_bytes()
        if path.name.endswith("run.json"):
            row = json.loads(content)
            content = {key: row[key] for key in ("settings", "inputs", "outputs")}
            for described, digest in () if "/." in f"/{name}" else row["outputs"].items():
                beside = (path.parent / described).read_bytes()
                assert hashlib.sha256(beside).hexdigest() == digest, f"{path}: {described}"
        if not name.startswith("checkpoints/checkpoint-"):
            found[name] = content
    return found


def finished_ids(folder):
    """Ids of the whole lines of x.jsonl and its parts."""
    paths = [folder / "x.jsonl", *folder.glob("x.jsonl.parts/rank-*.jsonl")]
    lines = [line for p in paths if p.exists() for line in p.read_bytes().split(b"\n")[:-1]]
    return [json.loads(line)["item_id"] for line in lines]


def fresh_copy(source, target):
    shutil.rmtree(target, ignore_errors=True)
    return shutil.copytree(source, target)


def finished(tmp_path, *actions):
    """(a new folder, snapshot) after `actions`, undisturbed but for those that stop themselves."""
    folder = tmp_path / f"finished-{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    for action in actions:
        try:
            action(folder)
        except RuntimeError as error:
            assert str(error) == "stop"
    return folder, snapshot(folder)


def restarted(state, action):
    """What action(folder) makes of a copy of `state`: a snapshot, or the sentence that refuses."""
    folder = fresh_copy(state, state.with_name("restarted"))
    try:
        action(folder)
    except InputError as refusal:
        return str(refusal)
    return snapshot(folder)


# Forked processes


def started(action, prepare=lambda: None, **environment):
    """(process id, its stderr) of a forked process with `action()` as the main of a script."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return pid, reading
    code = 1
    try:
        os.dup2(writing, 2)
        sys.stderr = os.fdopen(2, "w", closefd=False)
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


def signal_at(number, folder, signal_number):
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


def every_state(start, action, signal_number):
    """Yield (folder, exit code, stderr) for every call of action(folder) at which it gets a signal,
    and for the run that ends. folder: at first a copy of `start`.
    """
    for number in itertools.count(1):
        folder = fresh_copy(start, start.with_name("killed"))
        prepare = partial(signal_at, number, folder, signal_number)
        code, text = ended(*started(partial(action, folder), prepare))
        yield folder, code, text
        if code == 0:
            assert number > 2, "there were calls"
            return


def every_kill(start, action):
    """The folders of `every_state` after kill -9."""
    for folder, code, text in every_state(start, action, signal.SIGKILL):
        assert code in (0, -signal.SIGKILL), text
        snapshot(folder)
        yield folder


# kill -9

SCENARIOS = [(kind, "first") for kind in JOBS]
SCENARIOS += [(kind, "resumed") for kind in RESUMES]
OTHERS = [(kind, name) for kind in JOBS for name in ("other", "same again")]
OTHERS += [(kind, "other over unfinished") for kind in RESUMES] + [("rows", "after a pilot")]
SCENARIOS += [pytest.param(*other, marks=pytest.mark.slow) for other in OTHERS]


@pytest.mark.parametrize(("kind", "scenario"), SCENARIOS)
def test_a_job_killed_at_any_call_is_finished_or_refused(tmp_path, kind, scenario):
    """Killed: the first run; one that resumes; one with other options over a finished or an
    unfinished output, with --overwrite where that is needed; the same options with --overwrite.
    """
    job, refuses = JOBS[kind], kind in RESUMES
    other = partial(job, tone="high")
    again = partial(job, tone="high", overwrite=True) if refuses else other
    unfinished = partial(job, stop_after=2)
    before, killed, tone = {
        "first": ([], job, "low"),
        "resumed": ([unfinished], job, "low"),
        "after a pilot": ([partial(job, limit=4)], job, "low"),
        "other": ([job], again, "high"),
        "other over unfinished": ([unfinished], again, "high"),
        "same again": ([job], partial(job, overwrite=True), "low"),
    }[scenario]
    start, found = finished(tmp_path, *before)
    wanted = {"low": finished(tmp_path, job)[1], "high": finished(tmp_path, other)[1]}
    assert (found in wanted.values()) == (before == [job])
    allowed = [REFUSAL] * refuses + [NO_RECORD] * (refuses and before == [job])
    outcomes = {job: ("low", allowed), other: ("high", allowed), again: ("high", [])}
    outcomes[killed] = (tone, [])
    for state in every_kill(start, killed):
        for action, (tone, sentences) in outcomes.items():
            found = restarted(state, action)
            assert found == wanted[tone] or any(words in found for words in sentences), found


def test_a_killed_retry_of_rejected_rows_loses_no_row(tmp_path):
    retry = partial(append_rows, retry=True)
    start, before = finished(tmp_path, append_rows)
    _, after = finished(tmp_path, append_rows, retry)
    assert "x.rejected.jsonl" in before and "x.rejected.jsonl" not in after
    for state in every_kill(start, retry):
        assert {*IDS} - {"i2"} <= {*finished_ids(state)}
        assert restarted(state, retry) == after
        assert restarted(state, append_rows) in (before, after)


def shard(folder, rank, world, kill=None):
    """A started process of several; killed in the middle of a row if `kill` rows are given."""
    prepare = partial(kill_after, kill) if kill else lambda: None
    return started(partial(append_rows, folder), prepare, RANK=str(rank), WORLD_SIZE=str(world))


def test_processes_that_share_an_output_may_all_be_killed_and_change_in_number(tmp_path):
    """Amid a row each; no row that was finished is lost or computed again."""
    _, whole = finished(tmp_path, append_rows)
    folder, before = finished(tmp_path)[0], []
    for world in (3, 2, 1):
        processes = [shard(folder, rank, world, kill=1) for rank in range(world)]
        assert [ended(*process)[0] for process in processes] == [-signal.SIGKILL] * world
        after = finished_ids(folder)
        assert {*before} < {*after} and len(after) == len({*after}) == len(before) + world
        before = after
    processes = [shard(folder, rank, 3) for rank in range(3)]
    assert [ended(*process)[0] for process in processes] == [0, 0, 0]
    assert snapshot(folder) == whole


def test_a_job_that_begins_while_another_one_waits_is_not_mixed_with_it(tmp_path):
    """Both start in an empty folder; while one loads its model, the other one writes."""
    waiting = [open_rows(tmp_path, tone="high"), open_rows(tmp_path, tone="high", limit=2)]
    overwriting = open_rows(tmp_path, tone="high", overwrite=True)

    def refused():
        for other in waiting:
            with pytest.raises(InputError, match=REFUSAL), other:
                pass

    with open_rows(tmp_path, tone="low"):
        refused()
        with pytest.raises(InputError, match="being written by another process"), overwriting:
            pass
    append_rows(tmp_path)
    refused()
    with overwriting:
        overwriting.write({"item_id": "i1", "summary": "high i1"})
        assert finished_ids(tmp_path) == ["i1"]


# Other faults


@ALL_KINDS
@pytest.mark.parametrize(
    ("number", "code", "message"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_a_signal_at_any_call_is_one_sentence(tmp_path, kind, number, code, message):
    job, outcomes = JOBS[kind], []
    start, _ = finished(tmp_path)
    _, whole = finished(tmp_path, job)
    for folder, *outcome in every_state(start, job, number):
        assert not [name for name in snapshot(folder) if ".tmp-" in name]
        assert restarted(folder, job) == whole
        outcomes.append(outcome)
    assert outcomes.pop()[0] == 0
    assert all(outcome == [code, f"{message}; {RESUME}\n"] for outcome in outcomes)


@ALL_KINDS
def test_a_disk_that_is_full_at_any_byte_is_one_sentence(tmp_path, kind):
    """By a limit of the size of files: what does not fit is cut, as on a full disk."""
    job = JOBS[kind]
    _, whole = finished(tmp_path, job)
    for size in range(0, 10_000, 20):
        folder, _ = finished(tmp_path)
        limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
        code, text = ended(*started(partial(job, folder), limit))
        assert not [name for name in snapshot(folder) if ".tmp-" in name]
        if code == 0:
            break
        assert (code, text.count("\n")) == (1, 1), text
        assert text.startswith(f"error: {folder}/"), text
        assert text.endswith(f": File too large; {RESUME}\n")
        assert restarted(folder, job) == whole
    assert size > 200
    assert snapshot(folder) == whole


@ALL_KINDS
def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path, kind):
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o555)

    def prepare():
        os.chdir(folder)
        if os.geteuid() == 0:  # who may write anywhere
            os.seteuid(NOBODY)

    code, text = ended(*started(partial(JOBS[kind], Path()), prepare))
    folder.chmod(0o755)
    assert (code, text.count("\n"), text[:7]) == (1, 1, "error: "), text
    assert f"Permission denied; make it accessible, or name another folder; {RESUME}" in text
    assert list(folder.iterdir()) == []


OBSTACLES = [("files", "one.jsonl/"), ("files", "one.run.json/"), ("folder", "merged")]
OBSTACLES += [("rows", name) for name in ("x.jsonl/", "x.jsonl.parts", "x.rejected.jsonl/")]
OBSTACLES += [("training", name) for name in ("adapter", "checkpoints", "training_log.jsonl/")]


@pytest.mark.parametrize(("kind", "name"), [*OBSTACLES, ("rows", ".x.jsonl.lock/")])
def test_a_file_where_a_folder_belongs_and_the_reverse(tmp_path, kind, name):
    """name: with a slash behind it, a folder where a file belongs."""
    job, folder = JOBS[kind], tmp_path / "work"
    mine = folder / name / "mine" if name.endswith("/") else folder / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    code, text = ended(*started(partial(job, folder)))
    assert (code, text.count("\n"), text[:7]) == (1, 1, "error: "), text
    assert name.strip("/") in text and "move it away" in text
    assert mine.read_text() == "mine"
    shutil.rmtree(folder / name) if name.endswith("/") else mine.unlink()
    assert restarted(folder, job) == finished(tmp_path, job)[1]


# A real stage


def test_a_killed_download_downloads_only_what_is_left(tmp_path):
    """Amid a line, with other images on their way."""
    images = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=images.serve_forever, args=(0.05,), daemon=True).start()
    address = f"http://127.0.0.1:{images.server_port}/good"
    server = ForkServer(tmp_path, LIGHT, ROOT)
    (tmp_path / "c.yaml").write_text("common:\n")

    def download(folder, **fault):
        lines = [{"item_id": f"i{n}", "url": f"{address}?n={n}"} for n in range(8)]
        write_rows(folder / "image_urls.jsonl", lines)
        words = ["--config", str(tmp_path / "c.yaml"), "--data_dir", str(folder)]
        words += ["--allow_private", "true", "--workers", "2"]
        return server.run("data_processing/download_images.py", *words, **fault)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    try:
        assert download(whole).returncode == 0
        assert download(killed, kill_after=3).returncode == -signal.SIGKILL
        assert "8 rows, 5 of them now" in download(killed).stderr
        assert snapshot(killed) == snapshot(whole)
    finally:
        server.close()
        images.shutdown()
        images.server_close()
