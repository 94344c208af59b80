"""kill -9 at every moment, and other faults: the next start finishes the job or refuses it.

The fast tests kill toy jobs in forked processes before every call that changes a folder; the slow
ones do that to every stage. With KILL_REPORT=FILE each slow test appends a line to that file.
"""

import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from conftest import ROOT
from fork_server import CALLS, HEAVY, ForkServer, signal_at
from pydantic.dataclasses import dataclass
from safetensors.numpy import load as load_tensors
from test_download import Server

from mllmrec.ranking.checkpoints import is_trained, last_complete_checkpoint, training_lock
from mllmrec.stage import record
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import rejected_path, write_json, write_rejected, write_rows
from mllmrec.stage.options import CommonOptions
from mllmrec.stage.output import RowOutput, WholeOutput, delete_output, finish_deletion, new_folder
from mllmrec.stage.record import Job, write_record, write_state

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


def append_rows(folder, tone="low", retry=False, **options):
    """A stage that resumes."""
    job = toy_job(tone=tone, **options)
    output = RowOutput(folder / "x.jsonl", "item_id", IDS, job, retry)
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
            assert number > 1, "there was a call"
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


def test_a_file_killed_while_it_is_replaced_is_the_old_or_the_new_one(quick, tmp_path):
    start, _ = finished(tmp_path, "start", lambda folder: write_json(folder / "x.json", "old"))
    for state in every_kill(tmp_path, start, lambda folder: write_json(folder / "x.json", "new")):
        assert json.loads((state / "x.json").read_bytes()) in ("old", "new")


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


def test_a_job_that_begins_while_another_one_waits_is_not_mixed_with_it(quick, tmp_path):
    """Both start in an empty folder; while one loads its model, the other one writes."""

    def opened(tone, **options):
        job = toy_job(tone=tone, **options)
        return RowOutput(tmp_path / "x.jsonl", "item_id", IDS, job)

    for begun in (False, True):
        waiting = [opened("high"), opened("high", limit=2), opened("high", overwrite=True)]
        if begun:
            with opened("low") as output:
                output.write(rows_of("low")[0][0])
        else:
            append_rows(tmp_path, "low")
        before = snapshot(tmp_path)
        for output in waiting:
            with pytest.raises(InputError, match=REFUSAL), output:
                pass
        assert {name: before[name] for name in snapshot(tmp_path)} == before
        append_rows(tmp_path, "low", overwrite=True)
        shutil.rmtree(tmp_path / "x.jsonl.parts", ignore_errors=True)
        for path in tmp_path.glob("x.*"):
            path.unlink()


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


# All stages


class Stage(NamedTuple):
    """How a stage is run in a folder of its own.

    inputs: files and folders of the small run that it reads; other: options of another job;
    options: of every run; few: options of a run of a few rows; resumes: a job with other options
    is refused without --overwrite true.
    """

    script: str
    output: str
    inputs: tuple = ()
    other: tuple = ()
    options: tuple = ()
    few: tuple = ()
    resumes: bool = False

    @property
    def record(self):
        output = Path(self.output)
        return str(output.with_suffix(".run.json") if output.suffix else output / "run.json")

    @property
    def overwriting(self):
        """Options of the other job, with leave to delete where that is needed."""
        return (*self.other, "--overwrite", "true") if self.resumes else self.other


DATA = ("users.jsonl", "items.jsonl", "covers")
STAGES = {
    "sample": Stage(
        "data_processing/sample.py",
        "users.jsonl",
        other=("--seed", "43"),
        few=("--n_items", "32", "--max_length", "9"),  # few covers
    ),
    "split": Stage("data_processing/split.py", "users.jsonl", other=("--seed", "43")),
    "download": Stage(
        "data_processing/download_images.py",
        "images.jsonl",
        other=("--max_megabytes", "5"),
        options=("--allow_private", "true", "--workers", "2"),
        few=("--limit", "4"),
        resumes=True,
    ),
    "image_summary": Stage(
        "Inference/image_summary.py",
        "mllm_msr/image_summaries.jsonl",
        DATA,
        ("--max_new_tokens", "12"),
        ("--max_new_tokens", "6", "--batch_tokens", "700"),
        ("--limit", "4"),
        resumes=True,
    ),
    "preference": Stage(
        "Inference/preference_recurrent.py",
        "mllm_msr/user_preferences.jsonl",
        (*DATA, "mllm_msr/image_summaries.jsonl"),
        ("--block_size", "2"),
        ("--max_new_tokens", "6", "--batch_tokens", "3000"),
        ("--limit", "4"),
        resumes=True,
    ),
    "training rows": Stage(
        "MLLM-MSR/train/dataset_create.py",
        "mllm_msr/train.jsonl",
        (*DATA, "mllm_msr/user_preferences.jsonl"),
        ("--max_title_characters", "5"),
    ),
    "test rows": Stage(
        "MLLM-MSR/test/multi_col_dataset.py",
        "mllm_msr/test.jsonl",
        (*DATA, "mllm_msr/user_preferences.jsonl"),
        ("--max_title_characters", "5"),
    ),
    "train": Stage(
        "MLLM-MSR/train/train_llava_sft.py",
        "mllm_msr/adapter",
        ("covers", "mllm_msr/train.jsonl", "mllm_msr/validation.jsonl"),
        ("--lora_r", "4"),
        (
            *("--limit", "4", "--validation_users", "1", "--batch_size", "2", "--save_total", "1"),
            *("--checkpoint_steps", "1", "--logging_steps", "1", "--lora_dropout", "0.1"),
        ),
        resumes=True,
    ),
    "merge": Stage(
        "MLLM-MSR/train/merge_adapter.py",
        "mllm_msr/merged",
        ("mllm_msr/adapter",),
        ("--dtype", "bfloat16"),
    ),
    "score": Stage(
        "MLLM-MSR/test/test_with_llava_sft.py",
        "mllm_msr/sft/scores.jsonl",
        ("covers", "mllm_msr/test.jsonl", "mllm_msr/adapter"),
        ("--max_text_tokens", "500"),
        ("--hide", "nothing", "--batch_tokens", "2000"),
        ("--limit", "1"),
        resumes=True,
    ),
    "popularity": Stage(
        "MLLM-MSR/baselines/popularity.py",
        "baselines/popularity/scores.jsonl",
        ("users.jsonl",),
        ("--seed", "7"),
    ),
    "metrics": Stage(
        "MLLM-MSR/test/compute_metrics.py",
        "metrics.json",
        ("mllm_msr", "baselines", "bounds"),
        ("--resamples", "5"),
    ),
    "report": Stage(
        "MLLM-MSR/test/report.py",
        "report.html",
        (*DATA, "users.run.json", "mllm_msr", "baselines", "bounds", "metrics.json"),
        ("--users", "3"),
    ),
}
RESUMABLE = ("image_summary", "preference", "score")
ROWS = (*RESUMABLE, "download")
# What the stages import when they work; imported once.
MODULES = ["evaluation.report", "generation.engine", "generation.prompt_writer", "models.lora"]
MODULES += ["models.loading", "ranking.callbacks", "ranking.collator", "ranking.reader"]
MODULES += ["ranking.scoring", "ranking.trainer"]
MODULES = ("matplotlib.pyplot", *(f"mllmrec.{name}" for name in MODULES))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    server = ForkServer(folder, (*HEAVY, *MODULES), ROOT, OMP_NUM_THREADS="1")
    yield server
    server.close()


@pytest.fixture(scope="module")
def images():
    """Address of a server of images."""
    running = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    running.socket.listen(64)
    threading.Thread(target=running.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}/"
    running.shutdown()
    running.server_close()


@pytest.fixture
def bench(request, small_run, server, images, tmp_path):
    """The stage that the parameter names, with a folder to run it in."""
    return Bench(small_run, server, images, tmp_path, request.param)


class Bench:
    """One stage in the folder `work`, always the same one: it is part of the report."""

    def __init__(self, small_run, server, images, folder, name):
        self.small_run, self.server, self.images, self.name = small_run, server, images, name
        self.stage, self.folder, self.work = STAGES[name], folder, folder / "work"
        self.tried = self.refused = self.lost = 0

    def fresh(self):
        """Empty the folder but for the inputs."""
        self.clear()
        for name in self.stage.inputs:
            (self.work / name).parent.mkdir(parents=True, exist_ok=True)
            (self.work / name).symlink_to(self.small_run.folder / name)
        if self.name == "download":
            urls = {f"i{n}": f"{self.images}good?n={n}" for n in range(8)}
            urls["gone"] = f"{self.images}gone"
            lines = [{"item_id": name, "url": url} for name, url in urls.items()]
            write_rows(self.work / "image_urls.jsonl", lines)
        if self.name == "split":
            self.write_raw_files(self.work / "raw")

    def write_raw_files(self, raw):
        raw.mkdir()
        rng = random.Random(0)
        lines = [
            f"u{user},i{item},{1_600_000_000 + 86_400 * day}"
            for user in range(20)
            for day, item in enumerate(rng.sample(range(40), 6))
        ]
        lines.append("u0,unknown,1600000000")
        (raw / "interactions.csv").write_text("\n".join(["user,item,timestamp", *lines]) + "\n")
        items = [{"item_id": f"i{n}", "title": f"title {n}", "image": None} for n in range(40)]
        (raw / "catalogue.jsonl").write_text("".join(json.dumps(i) + "\n" for i in items))

    def clear(self):
        self.work.mkdir(exist_ok=True)
        for path in self.work.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def save(self, name):
        shutil.rmtree(self.folder / name, ignore_errors=True)
        shutil.copytree(self.work, self.folder / name, symlinks=True)

    def restore(self, name):
        self.clear()
        shutil.copytree(self.folder / name, self.work, symlinks=True, dirs_exist_ok=True)

    def command(self, *more):
        folders = ["--data_dir", str(self.work), "--output_dir", str(self.work)]
        config = self.small_run.config
        if self.name == "split":
            config = self.folder / "split.yaml"
            config.write_text("data: {user_core: 2, item_core: 1, train_fraction: 0.5}\n")
            folders += ["--raw_dir", str(self.work / "raw"), "--require_image", "false"]
        words = [self.stage.script, "--config", str(config), *folders]
        return [*words, *self.stage.options, *more]

    def run(self, *more, fault=None, **environment):
        return self.server.run(*self.command(*more), fault=fault, **environment)

    def undisturbed(self, *more):
        """Snapshot after a run in a fresh folder, which it leaves there."""
        self.fresh()
        done = self.run(*more)
        assert done.returncode == 0, done.stderr
        check_records(self.work)
        return snapshot(self.work)

    def assert_same(self, wanted):
        """Assert that the folder holds what an undisturbed run has written."""
        found = snapshot(self.work)
        assert found.keys() == wanted.keys()
        if self.name != "train":
            assert [name for name in found if found[name] != wanted[name]] == []
            return
        for name in ("settings", "inputs"):
            assert found[self.stage.record][name] == wanted[self.stage.record][name]
        logs = [files["mllm_msr/training_log.jsonl"].splitlines() for files in (found, wanted)]
        losses = [[json.loads(row).get("loss", -1) for row in log] for log in logs]
        assert losses[0] == pytest.approx(losses[1], abs=1e-6)
        adapter = f"{self.stage.output}/adapter_model.safetensors"
        ours, theirs = load_tensors(found[adapter]), load_tensors(wanted[adapter])
        assert ours.keys() == theirs.keys() != set()
        assert all(np.allclose(ours[k], theirs[k], atol=1e-5, rtol=0) for k in ours)

    def assert_whole(self, wanted):
        """Assert that no file is half-written: each is that of an undisturbed run, or absent."""
        check_records(self.work)
        for name, content in snapshot(self.work).items():
            is_growing = any(w in name for w in (".parts/", "training", "checkpoints/", "adapter/"))
            assert name not in wanted or is_growing or content == wanted[name], name

    def assert_finishes(self, wanted, *more):
        """The same command, until it ends; no finished row is computed again.

        But with leave to overwrite, all are.
        """
        before = self.finished_rows()
        done = self.run(*more)
        assert done.returncode == 0, done.stderr
        self.assert_same(wanted)
        if self.name in ROWS and "--overwrite" not in more:
            now = re.search(r"([\d,]+) of them now", done.stderr)
            now = int(now[1].replace(",", "")) if now else 0
            self.lost += now + len(before) - len(self.finished_rows())
            assert self.lost == 0

    def finished_rows(self):
        """Whole lines of the output and its parts."""
        return set(self.finished_lines())

    def finished_lines(self):
        """`finished_rows` as a list, with those that are there twice."""
        if self.name not in ROWS:
            return []
        output = self.work / self.stage.output
        parts = output.with_name(f"{output.name}.parts").glob("rank-*.jsonl")
        files = [output, *(path for path in parts if path.name.count(".") == 1)]
        return [line for f in files if f.exists() for line in f.read_bytes().split(b"\n")[:-1]]

    def report(self, fault):
        """A line for KILL_REPORT."""
        path = os.environ.get("KILL_REPORT")
        line = {"stage": self.name, "fault": fault, "tried": self.tried}
        line |= {"lost_rows": self.lost if self.name in ROWS else None, "refused": self.refused}
        if path:
            with open(path, "a") as file:
                file.write(json.dumps(line) + "\n")


def assert_one_sentence(done, code, start):
    """Assert the exit code, and one message on stderr beside progress bars."""
    lines = [line.rsplit("\r", 1)[-1] for line in done.stderr.split("\n")]
    lines = [line for line in lines if line.strip() and not re.search(r"\d+%\|| \d+it \[", line)]
    assert done.returncode == code, (done.returncode, done.stderr)
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith(start), done.stderr
    return lines[0]


def for_stages(*names):
    """Mark a slow test that runs once for each of the stages; default: all."""

    def decorate(test):
        test = pytest.mark.parametrize("bench", names or STAGES, indirect=True)(test)
        return pytest.mark.filterwarnings("ignore")(pytest.mark.slow(test))

    return decorate


@for_stages()
@pytest.mark.parametrize("rerun", [False, True], ids=["first run", "other options"])
def test_a_stage_killed_at_any_call_is_finished_or_refused(bench, rerun):
    stage, few = bench.stage, bench.stage.few
    high = bench.undisturbed(*stage.other, *few)
    bench.fresh()
    bench.save("start")
    low = bench.undisturbed(*few)
    if rerun:
        bench.save("start")
    old, new = few, (*(stage.overwriting if rerun else stage.other), *few)
    killed = new if rerun else old
    for number in itertools.count(1):
        bench.restore("start")
        fault = {"kill_at": number, "kill_within": str(bench.work)}
        done = bench.run(*killed, fault=fault)
        check_records(bench.work)
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        bench.tried += 1
        bench.save("state")
        for words, wanted in ((old, low), (new, high)):
            if words is killed:
                bench.assert_finishes(wanted, *words)
            else:
                done = bench.run(*words)
                if done.returncode and stage.resumes:
                    assert REFUSAL in assert_one_sentence(done, 1, "error: ")
                    bench.refused += 1
                else:
                    assert done.returncode == 0, done.stderr
                    bench.assert_same(wanted)
            bench.restore("state")
    assert bench.tried > 1
    bench.report(f"kill -9 before each call, {'other options' if rerun else 'first run'}")


@for_stages()
def test_twenty_kills_at_random_moments(bench):
    started = time.monotonic()
    low = bench.undisturbed()
    seconds = time.monotonic() - started
    rng = random.Random(bench.name)
    bench.fresh()
    while bench.tried < 20:
        before = bench.finished_rows()
        done = bench.run(fault={"send": [rng.uniform(0, seconds), signal.SIGKILL]})
        check_records(bench.work)
        assert before <= bench.finished_rows(), "finished rows stay"
        if done.returncode == 0:
            bench.assert_same(low)
            bench.fresh()
        else:
            assert done.returncode == -signal.SIGKILL, done.stderr
            bench.tried += 1
    bench.assert_finishes(low)
    bench.report("kill -9 at random moments")


@for_stages()
@pytest.mark.parametrize(
    ("number", "code", "message"),
    [
        (signal.SIGINT, 130, "interrupted; the same command resumes"),
        (signal.SIGTERM, 143, "terminated; the same command resumes"),
    ],
    ids=["SIGINT", "SIGTERM"],
)
def test_a_signal_amid_the_work_is_one_sentence(bench, number, code, message):
    bench.fresh()
    within = {"kill_within": str(bench.work), "signal": number}
    calls = int(bench.run(fault=within).calls)
    low = snapshot(bench.work)
    moments = [{**within, "kill_at": at} for at in sorted({1, (calls + 1) // 2, calls})]
    if bench.name in ROWS:
        moments = [moments[0], {"kill_after": len(bench.finished_rows()) // 2, "signal": number}]
    for fault in moments:
        bench.fresh()
        done = bench.run(fault=fault)
        assert assert_one_sentence(done, code, message) == message
        bench.assert_whole(low)
        assert not [name for name in snapshot(bench.work) if ".tmp-" in name]
        bench.tried += 1
        bench.assert_finishes(low)
    bench.report(number.name)


@pytest.mark.slow
def test_ctrl_c_while_libraries_are_imported_is_one_sentence(tmp_path):
    """A module `yaml`, which every stage imports, that takes long."""
    (tmp_path / "yaml.py").write_text("print('here', flush=True)\nimport time; time.sleep(60)\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    for stage in STAGES.values():
        words = [sys.executable, stage.script, "--output_dir", str(tmp_path / "out")]
        process = subprocess.Popen(words, cwd=ROOT, env=environment, **pipes)
        assert process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGINT
        assert stderr == "interrupted; the same command resumes\n", stage.script
    assert not (tmp_path / "out").exists()


@pytest.fixture
def disk(bench):
    """The bench's folder on a small file system of its own."""
    bench.work.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(bench.work)]
    try:
        done = subprocess.run(words, capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"no file system can be mounted: {error}")
    if done.returncode:
        pytest.skip(f"no file system can be mounted: {done.stderr.strip()}")
    yield bench
    subprocess.run(["umount", "--lazy", str(bench.work)], check=True)


def free_bytes(folder):
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


@for_stages()
def test_a_full_disk_is_one_sentence_and_afterwards_the_same_command_ends(disk):
    disk.fresh()
    before = free_bytes(disk.work)
    low = disk.undisturbed()
    used = (before - free_bytes(disk.work)) // 4096
    for pages in sorted({0, 2, used // 2, used - 1}):
        disk.fresh()
        with open(disk.work / "filler", "wb") as file:
            file.write(bytes(max(0, free_bytes(disk.work) - pages * 4096)))
        done = disk.run()
        if done.returncode == 0:
            assert pages > used // 2
        else:
            message = assert_one_sentence(done, 1, "error: ")
            assert "free some space; the same command resumes" in message
            disk.tried += 1
        disk.assert_whole(low)
        (disk.work / "filler").unlink()
        disk.assert_finishes(low)
    disk.report("disk full")


@for_stages()
def test_a_read_only_folder_is_one_sentence(disk):
    low = disk.undisturbed()
    disk.fresh()
    remount = ["mount", "-o"]
    subprocess.run([*remount, "remount,ro", str(disk.work)], check=True)
    done = disk.run()
    subprocess.run([*remount, "remount,rw", str(disk.work)], check=True)
    message = assert_one_sentence(done, 1, "error: ")
    assert "Read-only file system; make it writable, or name another folder" in message
    disk.tried += 1
    disk.assert_finishes(low)
    disk.report("read-only folder")


def obstacles(stage):
    """(path, is a folder) of what must not be there when the stage starts."""
    output = Path(stage.output)
    found = [(output, output.suffix != ""), (output.with_name(f".{output.name}.lock"), True)]
    if output.suffix:
        found.append((Path(stage.record), True))
        if output.parent != Path():
            found.append((output.parent, False))
    if stage.resumes and output.suffix:
        found += [(output.with_name(output.name + ".parts"), False)]
        found += [(output.with_suffix(".rejected.jsonl"), True)]
    extra = {"sample": ("covers", "bounds"), "download": ("images",), "split": ()}
    found += [(Path(name), False) for name in extra.get(Path(stage.script).stem, ())]
    if output.name == "adapter":
        found += [(output.with_name("checkpoints"), False)]
        found += [(output.with_name("training_log.jsonl"), True)]
    return found


@for_stages()
def test_a_file_where_a_folder_belongs_and_the_reverse_are_one_sentence(bench):
    low = bench.undisturbed()
    for path, is_folder in obstacles(bench.stage):
        bench.fresh()
        path = bench.work / path
        if path.exists():  # with inputs in it
            continue
        if is_folder:
            path.mkdir(parents=True)
            (path / "something").write_text("mine")
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text("mine")
        done = bench.run()
        message = assert_one_sentence(done, 1, "error: ")
        assert any(w in message for w in ("belongs", "must be", "move it away")), message
        bench.tried += 1
        assert (path / "something" if is_folder else path).read_text() == "mine"
        shutil.rmtree(path) if is_folder else path.unlink()
        bench.assert_finishes(low)
    bench.report("a file where a folder belongs, or the reverse")


@for_stages()
@pytest.mark.parametrize("other", [False, True], ids=["same options", "other options"])
def test_two_writers_end_with_one_job(bench, other):
    stage, few = bench.stage, bench.stage.few
    high = bench.undisturbed(*stage.other, *few)
    low = bench.undisturbed(*few)
    overwrite = ("--overwrite", "true")
    bench.save("old")
    for _ in range(2):
        if other:
            bench.restore("old")
            both = ((*few, *overwrite), (*stage.other, *few, *overwrite))
        else:
            bench.fresh()
            both = (few, few)
        jobs = [{"words": bench.command(*words), "environment": {}} for words in both]
        ended = bench.server.run_together(*({**job, "kill_after": 0} for job in jobs))
        for done in ended:
            if done.returncode:
                message = assert_one_sentence(done, 1, "error: ")
                assert "being written by another process" in message or REFUSAL in message
                bench.refused += 1
        bench.tried += 1
        assert 0 in [done.returncode for done in ended]
        check_records(bench.work)
        is_low = snapshot(bench.work)[stage.record]["settings"] == low[stage.record]["settings"]
        assert is_low or other
        bench.assert_same(low if is_low else high)
    bench.report(f"two writers, {'other' if other else 'same'} options")


@for_stages(*RESUMABLE)
def test_another_number_of_processes_after_each_kill_changes_no_byte(bench):
    low = bench.undisturbed()
    rows = len(bench.finished_rows())
    bench.fresh()
    for world, kill_after in ((2, rows // 6), (1, rows // 4), (3, rows // 12)):
        before = bench.finished_rows()
        jobs = [
            {
                "words": bench.command(),
                "environment": {"RANK": str(rank), "WORLD_SIZE": str(world)},
                "kill_after": kill_after,
            }
            for rank in range(world)
        ]
        ended = bench.server.run_together(*jobs)
        codes = [done.returncode for done in ended]  # 0: of a process with few rows in stage 6
        assert -signal.SIGKILL in codes and {*codes} <= {0, -signal.SIGKILL}, ended[0].stderr
        check_records(bench.work)
        after = bench.finished_rows()
        assert before < after
        assert len(after) >= len(before) + codes.count(-signal.SIGKILL) * kill_after
        assert len(bench.finished_lines()) == len(after), "no row is computed twice"
        bench.tried += codes.count(-signal.SIGKILL)
    environments = [{"RANK": str(rank), "WORLD_SIZE": "3"} for rank in range(3)]
    job = {"words": bench.command(), "kill_after": 0}
    before = bench.finished_rows()
    ended = bench.server.run_together(*({**job, "environment": e} for e in environments))
    assert [done.returncode for done in ended] == [0, 0, 0], ended[0].stderr
    assert before <= bench.finished_rows()
    bench.assert_same(low)
    bench.report("2, 1 and 3 processes, each killed")
