"""Faults of machine and operator end a stage with one line, and shell scripts pass words on."""

from mllmrec.stage.main import RESUME, cpu_quota, run_main, set_thread_defaults, set_up_logging

import errno
import logging
import os
import signal
import subprocess
import sys
import warnings

import pytest
from conftest import ROOT, call
from torch.utils.data import DataLoader

from mllmrec.ranking.training_options import FineTuningOptions, check_training_options
from mllmrec.stage.errors import InputError, UsageError, machine_fault
from mllmrec.stage.scripts import load_script


@pytest.fixture(autouse=True)
def keep_handler():
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


class OutOfMemoryError(RuntimeError):
    """As torch.OutOfMemoryError is called."""


ON_GPU = OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
CUT = RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/0")
FULL = OSError(errno.ENOSPC, "No space left on device", "x.jsonl")
READ_ONLY = OSError(errno.EROFS, "Read-only file system", "out")
FOLDER = IsADirectoryError(errno.EISDIR, "Is a directory", "x")
LESS = "free some, or lower the batch size"
FAULTS = [
    (FULL, "x.jsonl: No space left on device; free some space"),
    (READ_ONLY, "out: Read-only file system; make it writable, or name another folder"),
    (FOLDER, "x: Is a directory; a folder is where a file belongs; move it away"),
    (MemoryError(), f"out of memory (MemoryError); {LESS}"),
    (ON_GPU, f"out of memory (CUDA out of memory. Tried to allocate 2 GiB); {LESS}"),
    (CUT, f"a file cannot be written ({CUT}); free some space"),
]
OUTCOMES = [(error, 1, f"error: {text}; {RESUME}") for error, text in FAULTS]
OUTCOMES += [(InputError("a.csv, line 3: no"), 1, "error: a.csv, line 3: no")]
OUTCOMES += [(UsageError("--epochs: no"), 2, "error: --epochs: no")]
OUTCOMES += [(KeyboardInterrupt(), 130, f"interrupted; {RESUME}")]


@pytest.mark.parametrize(("error", "code", "line"), OUTCOMES)
def test_a_fault_is_one_line_and_an_exit_code(capsys, error, code, line):
    def main():
        raise error

    with pytest.raises(SystemExit) as caught:
        run_main(main)
    assert (caught.value.code, capsys.readouterr().err) == (code, line + "\n")


def test_a_mistake_in_the_code_keeps_its_traceback():
    assert machine_fault(ValueError("x")) is None

    def main():
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        run_main(main)


@pytest.mark.parametrize("stage", ["data_processing/split.py", "MLLM-MSR/test/report.py"])
def test_ctrl_c_while_libraries_are_imported_is_one_line(tmp_path, stage):
    """A module `yaml` that does not end."""
    (tmp_path / "yaml.py").write_text("print('here', flush=True)\nwhile True: pass\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, stage], cwd=ROOT, env=environment, **pipes)
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    # Python ends itself by the signal, which a shell reports as 130.
    assert process.returncode == -signal.SIGINT
    assert stderr == "interrupted; the same command resumes\n"


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["--no_such_option", "1"], 2, "unknown option"),
        (["--seed", "-1"], 2, "--seed: "),
        (["--config", "nowhere.yaml"], 1, "there is no config"),
        (["--version"], 0, "mllmrec 0."),
    ],
)
def test_a_wrong_command_line_ends_with_2_and_wrong_input_with_1(capsys, words, code, text):
    with pytest.raises(SystemExit) as caught:
        run_main(lambda: load_script("data_processing/sample.py").main(words))
    assert caught.value.code == code
    printed = capsys.readouterr()
    assert text in printed.out + printed.err


@pytest.fixture
def script(tmp_path):
    """Runs a shell script of scripts/; its Python only prints its words, one line per call."""
    stub = tmp_path / "python"
    stub.write_text('#!/bin/sh\n[ "$2" = mllmrec.stage.options ] && echo "$DATASET" || echo "$@"\n')
    stub.chmod(0o755)

    def run(name, *words, **environment):
        environment = {**os.environ, "PYTHON": str(stub), **environment}
        command = ["bash", f"scripts/{name}", *words]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

    return run


def test_the_config_and_common_options_reach_every_script_of_a_stage(script):
    for words in ("c.yaml --limit 3", "--limit 3 --config c.yaml", "--config=c.yaml --limit 3"):
        lines = script("06_score.sh", *words.split()).stdout.splitlines()
        assert len(lines) == 3
        assert all(line.split()[1:5] == ["--config", "c.yaml", "--limit", "3"] for line in lines)
    words = ["--output_dir", "o", "--image_roots", "a", "b", "--users", "3", "--overwrite"]
    metrics, report = script("07_report.sh", "c.yaml", *words).stdout.splitlines()
    assert metrics.endswith("--config c.yaml --output_dir o --image_roots a b --overwrite")
    assert report.endswith("--config c.yaml " + " ".join(words))


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("07_report.sh c.yaml --output_dir", 2, "--output_dir needs a value"),
        ("07_report.sh c.yaml --output_dir --seed 3", 2, "--output_dir needs a value"),
        ("07_report.sh c.yaml --config d.yaml", 2, "two configs are named, c.yaml and by --config"),
        ("07_report.sh --config", 2, "--config needs a value"),
        ("benchmark.sh ../common", 1, "there is no benchmark 'common'; choose one of"),
        ("benchmark.sh tools", 1, "there is no benchmark 'tools'; choose one of"),
    ],
)
def test_a_wrapper_says_what_is_wrong(script, words, code, message):
    done = script(*words.split())
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith(f"error: {message}")


@pytest.mark.parametrize("name", ["", "nonsense", "../Inference/image_summary", "['sample']"])
def test_a_config_names_a_loader(script, name):
    """No other script is run by the name."""
    done = script("01_prepare_data.sh", "c.yaml", DATASET=name)
    assert (done.returncode, done.stdout) == (1, "")
    assert "'dataset: NAME' of c.yaml is missing or names no loader; choose one of" in done.stderr
    started = script("01_prepare_data.sh", "c.yaml", DATASET="sample").stdout
    assert started == "data_processing/sample.py --config c.yaml\n"


@pytest.mark.parametrize("word", ["--num_processes 2", "--num_processes=2"])
def test_the_number_of_processes_is_passed_on_to_be_compared(script, tmp_path, word):
    stub = tmp_path / "python"
    stub.write_text('#!/bin/sh\necho "$MLLM_MSR_PROCESSES" "$@"\n')
    done = script("02_image_summary.sh", "c.yaml", ACCELERATE=f"--cpu {word}")
    assert done.stdout.startswith("2 -m accelerate.commands.launch --quiet --cpu")


@pytest.mark.parametrize("name", ["04_datasets", "06_score", "07_report"])
def test_only_the_last_script_of_a_stage_says_what_comes_next(script, tmp_path, name):
    (tmp_path / "python").write_text('#!/bin/sh\necho "$MLLM_MSR_PART"\n')
    lines = script(f"{name}.sh", "c.yaml").stdout.splitlines()
    assert len(lines) > 1 and lines == ["true"] * (len(lines) - 1) + [""]


def test_amazon_says_what_comes_next_once(script, tmp_path):
    stub = '#!/bin/sh\n[ "$2" = mllmrec.stage.options ] && echo amazon || echo "$MLLM_MSR_PART"\n'
    (tmp_path / "python").write_text(stub)
    assert script("01_prepare_data.sh", "c.yaml").stdout.splitlines() == ["true", "true", ""]


POPULARITY = "MLLM-MSR/baselines/popularity.py"


@pytest.mark.parametrize("stream", [">&-", "2>&-"])
def test_a_closed_stream_is_one_sentence(stream):
    command = [f'"$0" "$1" --help {stream}', sys.executable, POPULARITY]
    done = subprocess.run(["bash", "-c", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    message = "error: stdout or stderr is closed; send it to a file, or to /dev/null\n"
    assert done.stdout + done.stderr == message


def test_what_the_encoding_of_stdout_lacks_is_escaped(small_run, tmp_path):
    words = ["--config", str(small_run.config), "--output_dir", str(tmp_path / "bücher")]
    done = call(POPULARITY, *words, PYTHONIOENCODING="ascii")
    assert (done.returncode, "Traceback" in done.stderr) == (0, False)
    assert "b\\xfccher/baselines/popularity/scores.jsonl" in done.stdout
    assert (tmp_path / "bücher/baselines/popularity/scores.jsonl").exists()


def test_waiting_threads_soon_sleep_and_a_quota_limits_their_number(tmp_path, monkeypatch):
    """Unless the environment says otherwise."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    for quota, threads in ((None, None), (8.0, None), (3.0, "3"), (1.5, "2"), (0.5, "1")):
        environment = {}
        set_thread_defaults(environment, quota)
        assert environment.get("OMP_NUM_THREADS") == threads
        assert environment["GOMP_SPINCOUNT"] == "10000"
    for name, value in (("OMP_WAIT_POLICY", "ACTIVE"), ("GOMP_SPINCOUNT", "7")):
        environment = {name: value, "OMP_NUM_THREADS": "5"}
        set_thread_defaults(environment, 1.0)
        assert environment == {name: value, "OMP_NUM_THREADS": "5"}
    assert cpu_quota(tmp_path) is None
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert cpu_quota(tmp_path) == 1.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cpu_quota(tmp_path) is None
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    for name, value in (("quota", 200000), ("period", 100000)):
        (tmp_path / f"cpu/cpu.cfs_{name}_us").write_text(f"{value}\n")
    assert cpu_quota(tmp_path) == 2.0


@pytest.mark.parametrize("script", sorted(ROOT.glob("scripts/**/*.sh")), ids=lambda p: p.name)
def test_help_of_a_shell_script_is_its_head(script, tmp_path):
    """Nothing but the shell runs."""
    if script.stem in ("common", "setup_env", "usage"):  # sourced by the others
        return
    environment = {**os.environ, "PYTHON": "false"}
    words = ["bash", str(script), "--help"]
    done = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(script.read_text().splitlines()[1].removeprefix("# "))
    assert "Usage: bash scripts/" in done.stdout


def test_libraries_do_not_warn_of_what_is_meant_and_the_folder_of_tensorboard_is_named(capsys):
    with warnings.catch_warnings(record=True) as caught:
        set_up_logging("INFO")
        DataLoader([0], num_workers=1000)
    assert caught == []
    kernels = logging.getLogger("bitsandbytes.backends.cpu.ops")
    assert not kernels.isEnabledFor(logging.WARNING), "nor of a kernel that nobody can act on"
    check_training_options(FineTuningOptions(report_to="tensorboard", output_dir="o"))
    assert "tensorboard --logdir o/mllm_msr/tensorboard\n" in capsys.readouterr().err


def test_messages_go_to_stderr_from_the_chosen_level_on(capsys):
    logger = logging.getLogger("mllmrec.stage.record")
    set_up_logging("WARNING")
    try:
        logger.info("wrote x.jsonl")
        logger.warning("12 of 20 texts were cut")
    finally:
        set_up_logging("INFO")
    logger.info("x.jsonl is up to date")
    assert capsys.readouterr() == ("", "WARNING: 12 of 20 texts were cut\nx.jsonl is up to date\n")
    with pytest.raises(UsageError, match="choose DEBUG, INFO, WARNING or ERROR"):
        set_up_logging("LOUD")
