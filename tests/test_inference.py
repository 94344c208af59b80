"""Stages 2 and 3 as their users run them: any batches, processes and interruptions give the same bytes; nothing is dropped."""

import json
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, TINY, pictures_from_the_wild, saved, script
from PIL import Image
from test_pipeline import call

from data_processing.errors import InputError
from data_processing.jsonl import read_rows, write_rows
from data_processing.stage_output import duration
from Inference.random_models import random_llava, random_qwen3, random_qwen_vl

pytestmark = pytest.mark.filterwarnings("ignore")

STAGE_2, STAGE_3 = "Inference/image_summary.py", "Inference/preference_recurrent.py"
OUTPUTS = {STAGE_2: "image_summaries.jsonl", STAGE_3: "user_preferences.jsonl"}
SLOW = pytest.mark.slow
SAMPLED = ("--temperature", "0.9", "--top_p", "0.95")


def options(small_run, stage, folder, *more):
    summaries = (
        ["--summaries", str(small_run.folder / "image_summaries.jsonl")] if stage == STAGE_3 else []
    )
    return [
        stage,
        "--config",
        str(small_run.config),
        "--output_dir",
        str(folder),
        *summaries,
        *more,
    ]


def outcome(small_run, stage, folder, *more):
    script(stage).main(options(small_run, stage, folder, *more)[1:])
    return (folder / OUTPUTS[stage]).read_bytes()


@pytest.mark.parametrize(
    ("how", "stage"),
    [
        pytest.param((), STAGE_2, marks=SLOW),
        ((), STAGE_3),
        (SAMPLED, STAGE_2),
        pytest.param(SAMPLED, STAGE_3, marks=SLOW),
    ],
    ids=["greedy-2", "greedy-3", "sampled-2", "sampled-3"],
)
def test_batches_workers_pilots_and_processes_give_the_same_bytes(small_run, tmp_path, stage, how):
    single = outcome(small_run, stage, tmp_path / "single", *how, "--batch_tokens", "1")
    assert outcome(small_run, stage, tmp_path / "batched", *how) == single
    if not how:
        assert single == (small_run.folder / OUTPUTS[stage]).read_bytes()
    other = ("--workers", "2") if stage == STAGE_2 else ("--batching", "continuous")
    outcome(small_run, stage, tmp_path / "pilot", *how, *other, "--limit", "7")
    assert outcome(small_run, stage, tmp_path / "pilot", *how, *other) == single
    launch = [
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        "configs/accelerate/multi_gpu.yaml",
        "--num_processes",
        "2",
    ]
    done = call(
        *launch,
        *options(small_run, stage, tmp_path / "two", *how, "--batch_tokens", "900"),
        OMP_NUM_THREADS="1",
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "two" / OUTPUTS[stage]).read_bytes() == single
    assert (
        json.loads((tmp_path / "two" / OUTPUTS[stage].replace(".jsonl", ".run.json")).read_text())[
            "processes"
        ]
        == 2
    )


@pytest.mark.slow
@pytest.mark.parametrize("stage", OUTPUTS)
@pytest.mark.parametrize("how", [(), SAMPLED], ids=["greedy", "sampled"])
def test_ten_deaths_at_random_moments_change_no_byte(small_run, tmp_path, stage, how):
    """One at a time, so that there are many moments; what a dead run has finished is never done again."""
    how = (*how, "--batch_tokens", "1")
    wanted = outcome(small_run, stage, tmp_path / "undisturbed", *how)
    command = [sys.executable, *options(small_run, stage, tmp_path / "killed", *how)]
    part, final = (
        tmp_path / "killed" / f"{OUTPUTS[stage]}.parts" / "rank-0.jsonl",
        tmp_path / "killed" / OUTPUTS[stage],
    )
    work = json.loads(
        (tmp_path / "undisturbed" / OUTPUTS[stage].replace(".jsonl", ".run.json")).read_text()
    )["seconds"]
    chance, before, deaths = random.Random(len(how)), b"", 0
    for _ in range(10):
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        if (
            chance.random() < 0.8
        ):  # in the midst of the work; else at any moment, loading the model among them
            while process.poll() is None and (
                not part.exists() or part.stat().st_size <= len(before)
            ):
                time.sleep(0.01)
        time.sleep(chance.uniform(0, work / 10))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            deaths += 1
        process.wait()
        if final.exists():
            break
        after = part.read_bytes() if part.exists() else b""
        whole = after[: after.rfind(b"\n") + 1]
        assert whole.startswith(before), "finished rows stay as they are"
        before = whole
        ids = [line[:20] for line in whole.splitlines()]
        assert len(set(ids)) == len(ids), "no row is done twice"
    assert deaths == 10
    done = call(*command[1:])
    assert done.returncode == 0, done.stderr
    rows = wanted.count(b"\n")
    assert f"{rows} rows, {rows - before.count(bytes([10]))} of them now" in done.stdout
    assert final.read_bytes() == wanted


@pytest.fixture
def wild_items(tmp_path):
    """items.jsonl over pictures of all sorts: (folder, ids that can be described, ids that cannot)."""
    good, broken = pictures_from_the_wild(tmp_path / "covers")
    names = [*good, *broken]
    rows = [
        {"item_id": name, "title": f"Title of {name}", "image": f"covers/{name}"} for name in names
    ]
    rows += [
        {"item_id": "gone.jpg", "title": "x", "image": "covers/gone.jpg"},
        {"item_id": "none", "title": "x", "image": None},
    ]
    random.Random(0).shuffle(rows)
    write_rows(tmp_path / "items.jsonl", rows)
    return tmp_path, set(good), {*broken, "gone.jpg", "none"}


@pytest.mark.parametrize("workers", ["0", "2"])
def test_pictures_from_the_wild_are_described_or_set_aside(wild_items, capsys, workers):
    folder, good, broken = wild_items
    where = [
        "--config",
        "configs/sample.yaml",
        "--data_dir",
        str(folder),
        "--output_dir",
        str(folder),
        "--workers",
        workers,
    ]
    script(STAGE_2).main([*where, "--max_new_tokens", "5"])
    assert {row["item_id"] for row in read_rows(folder / "image_summaries.jsonl")} == good
    rejected = {
        row["item_id"]: row["reason"]
        for row in read_rows(folder / "image_summaries.rejected.jsonl")
    }
    assert rejected.keys() == broken
    assert all(reason.startswith("image") and "\n" not in reason for reason in rejected.values())
    assert f"{len(broken)} were set aside, each with its reason in" in capsys.readouterr().out


def test_a_picture_that_only_the_processor_refuses_is_set_aside(wild_items):
    """Qwen2.5-VL takes no picture whose sides differ more than two hundredfold."""
    folder, good, broken = wild_items
    saved(random_qwen_vl(), folder / "model")
    where = [
        "--config",
        "configs/sample.yaml",
        "--data_dir",
        str(folder),
        "--output_dir",
        str(folder),
        "--model",
        str(folder / "model"),
    ]
    script(STAGE_2).main([*where, "--max_new_tokens", "3"])
    rejected = {
        row["item_id"]: row["reason"]
        for row in read_rows(folder / "image_summaries.rejected.jsonl")
    }
    assert rejected.keys() == broken | {"20000x10.png"}
    assert "aspect ratio" in rejected["20000x10.png"]
    assert {row["item_id"] for row in read_rows(folder / "image_summaries.jsonl")} == good - {
        "20000x10.png"
    }


@pytest.mark.parametrize(
    ("stage", "make"),
    [
        (STAGE_2, random_qwen_vl),
        (STAGE_2, lambda: random_llava("tiny", kind="1.5")),
        (STAGE_3, random_qwen3),
    ],
    ids=["qwen2.5-vl", "llava-1.5", "qwen3"],
)
def test_another_model_is_a_change_of_the_config(small_run, tmp_path, stage, make):
    model = saved(make(), tmp_path / "model")
    more = ["--summary", "fused"] if stage == STAGE_2 else []
    outcome(small_run, stage, tmp_path / "out", "--model", model, "--max_new_tokens", "6", *more)
    assert len(read_rows(tmp_path / "out" / OUTPUTS[stage])) == (60 if stage == STAGE_2 else 30)


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
@pytest.mark.parametrize("stage", OUTPUTS)
def test_a_quantised_model_answers_too(small_run, tmp_path, stage, quantization):
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    from Inference.models import load_multimodal, load_text

    load, name = (load_multimodal, "llava") if stage == STAGE_2 else (load_text, "llama")
    model, _ = load(str(TINY / name), quantization=quantization)
    kind = {"int8": Linear8bitLt, "nf4": Linear4bit}[quantization]
    small = {name for name, module in model.named_modules() if isinstance(module, kind)}
    linear = {
        name
        for name, module in model.get_decoder().named_modules()
        if hasattr(module, "weight") and module.__class__ is kind
    }
    assert len(small) == len(linear) > 0, "the language model's layers and no other"
    assert len(linear) == 7 * model.config.get_text_config().num_hidden_layers
    outcome(
        small_run,
        stage,
        tmp_path,
        "--quantization",
        quantization,
        "--limit",
        "3",
        "--max_new_tokens",
        "8",
    )
    rows = [json.loads(line) for line in (tmp_path / OUTPUTS[stage]).read_text().splitlines()]
    assert len(rows) == 3
    assert all(row.get("summary") or row.get("preference") for row in rows)


def test_a_pilot_says_what_the_whole_would_take(small_run, tmp_path, capsys):
    outcome(small_run, STAGE_3, tmp_path, "--limit", "5")
    said = capsys.readouterr().out
    assert "users a second all 30 would take" in said
    assert "on this machine, loading the model not counted" in said
    outcome(small_run, STAGE_3, tmp_path)
    assert "would take" not in capsys.readouterr().out


def test_durations_are_said_as_a_person_says_them():
    assert [duration(seconds) for seconds in (0.4, 99, 240, 3600 * 2 + 65)] == [
        "0 s",
        "99 s",
        "4 min",
        "2 h 01 min",
    ]


def test_long_texts_are_shortened_and_counted_and_pictures_are_not(small_run, tmp_path, capsys):
    """A model with room for 120 tokens: the picture's stay, the title and the two notes give way."""
    model, processor = random_llava("tiny")
    model.config.text_config.max_position_embeddings = 150
    name = saved((model, processor), tmp_path / "model")
    (tmp_path / "covers").mkdir()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "covers" / "1.png")
    titles = ["short", "very " * 400 + "long", "<image> [/INST] </s>\nbrackets"]
    write_rows(
        tmp_path / "items.jsonl",
        [{"item_id": str(n), "title": t, "image": "covers/1.png"} for n, t in enumerate(titles)],
    )
    where = [
        "--config",
        str(small_run.config),
        "--data_dir",
        str(tmp_path),
        "--output_dir",
        str(tmp_path),
        "--model",
        name,
    ]
    script(STAGE_2).main([*where, "--summary", "fused", "--max_new_tokens", "30"])
    rows = read_rows(tmp_path / "image_summaries.jsonl")
    assert [row["item_id"] for row in rows] == ["0", "1", "2"]
    assert rows[1]["shortened"] >= 1
    total = sum(row.get("shortened", 0) for row in rows)
    assert f"{total} prompts were shortened to fit the model" in capsys.readouterr().out
    assert json.loads((tmp_path / "image_summaries.run.json").read_text())["shortened"] == total
    with pytest.raises(
        InputError,
        match="--max_new_tokens 150 leaves no room for a prompt: the model takes 150 tokens",
    ):
        script(STAGE_2).main([*where, "--max_new_tokens", "150", "--overwrite", "true"])
