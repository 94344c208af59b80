"""Stages 2 and 3 as users run them: batches and processes change no byte."""

import json
import random

import pytest
from conftest import ROOT, TINY, call, saved, unusual_images
from PIL import Image
from random_models import random_llava, random_qwen3, random_qwen_vl

from mllmrec.models.loading import load_multimodal, load_text
from mllmrec.models.model_options import ModelOptions
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import read_rows, write_rows
from mllmrec.stage.output import duration
from mllmrec.stage.record import read_record
from mllmrec.stage.scripts import load_script

pytestmark = pytest.mark.filterwarnings("ignore")

STAGE_2, STAGE_3 = "Inference/image_summary.py", "Inference/preference_recurrent.py"
OUTPUTS = {STAGE_2: "image_summaries.jsonl", STAGE_3: "user_preferences.jsonl"}
N_ROWS = {STAGE_2: 60, STAGE_3: 30}  # of small_run
SLOW = pytest.mark.slow
SAMPLED = ("--temperature", "0.9", "--top_p", "0.95")
ACCELERATE = ["-m", "accelerate.commands.launch", "--num_processes", "2"]
ACCELERATE += ["--config_file", "configs/accelerate/multi_gpu.yaml"]


def stage_options(small_run, stage, folder, *more):
    summaries = ["--summaries", str(small_run.system / OUTPUTS[STAGE_2])]
    where = ["--config", str(small_run.config), "--output_dir", str(folder)]
    return [*where, *(summaries if stage == STAGE_3 else []), *more]


def output_path(stage, folder):
    return folder / "mllm_msr" / OUTPUTS[stage]


def run_stage(small_run, stage, folder, *more):
    """Run the stage in this process; return the bytes of its output, None if it is not complete."""
    load_script(stage).main(stage_options(small_run, stage, folder, *more))
    path = output_path(stage, folder)
    return path.read_bytes() if path.exists() else None


@pytest.mark.parametrize(
    ("how", "stage", "launched"),
    [
        pytest.param((), STAGE_2, True, marks=SLOW),
        (("--limit", "2"), STAGE_3, False),
        ((*SAMPLED, "--limit", "24"), STAGE_2, False),
        pytest.param(SAMPLED, STAGE_3, True, marks=SLOW),
    ],
    ids=["greedy-2", "greedy-3", "sampled-2", "sampled-3"],
)
def test_batches_workers_pilots_and_processes_give_the_same_bytes(
    small_run, tmp_path, monkeypatch, stage, how, launched
):
    single = run_stage(small_run, stage, tmp_path / "single", *how, "--batch_tokens", "1")
    if SAMPLED[0] in how:
        assert run_stage(small_run, stage, tmp_path / "batched", *how) == single
    else:
        whole = (small_run.system / OUTPUTS[stage]).read_bytes().splitlines()
        assert set(single.splitlines()) <= set(whole)
    per_limit = 3 if stage == STAGE_3 else 1  # of each split
    rows = per_limit * int(how[-1]) if "--limit" in how else N_ROWS[stage]
    assert single.count(b"\n") == rows
    other = ("--workers", "2") if stage == STAGE_2 else ("--batch_tokens", "2000")
    run_stage(small_run, stage, tmp_path / "pilot", *how, *other, "--limit", "1")
    assert run_stage(small_run, stage, tmp_path / "pilot", *how, *other) == single
    two, small_batches = tmp_path / "two", (*how, "--batch_tokens", "900")
    if launched:
        words = stage_options(small_run, stage, two, *small_batches)
        done = call(*ACCELERATE, stage, *words, OMP_NUM_THREADS="1")
        assert done.returncode == 0, done.stderr
    else:  # one after the other, with the variables that `accelerate launch` sets
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", "1")
        assert run_stage(small_run, stage, two, *small_batches) is None
        monkeypatch.setenv("RANK", "0")
        run_stage(small_run, stage, two, *small_batches)
    assert output_path(stage, two).read_bytes() == single
    assert read_record(output_path(stage, two))["processes"] == 2


@pytest.fixture
def unusual_items(tmp_path, monkeypatch):
    """items.jsonl over unusual images: (options, folder, ids with a summary, rejected ids)."""
    monkeypatch.chdir(ROOT)  # model folders in the configs are relative to it
    good, broken = unusual_images(tmp_path / "covers")
    names = [*good, *broken, "gone.jpg"]
    rows = [{"item_id": n, "title": f"Title of {n}", "image": f"covers/{n}"} for n in names]
    rows.append({"item_id": "none", "title": "x", "image": None})
    random.Random(0).shuffle(rows)
    write_rows(tmp_path / "items.jsonl", rows)
    where = ["--config", str(ROOT / "configs/sample.yaml"), "--data_dir", str(tmp_path)]
    where += ["--output_dir", str(tmp_path)]
    return where, tmp_path, set(good), {*broken, "gone.jpg", "none"}


def summarised_and_rejected(folder):
    """(ids with a summary, reasons of the rejected ones by id)."""
    path = output_path(STAGE_2, folder)
    rejected = read_rows(path.with_suffix(".rejected.jsonl"))
    reasons = {row["item_id"]: row["reason"] for row in rejected}
    return {row["item_id"] for row in read_rows(path)}, reasons


@pytest.mark.parametrize("workers", ["0", "2"])
def test_unusual_images_are_described_or_rejected(unusual_items, capsys, workers):
    where, folder, good, broken = unusual_items
    load_script(STAGE_2).main([*where, "--workers", workers, "--max_new_tokens", "5"])
    summarised, reasons = summarised_and_rejected(folder)
    assert summarised == good
    assert reasons.keys() == broken
    assert all(reason.startswith("image") and "\n" not in reason for reason in reasons.values())
    assert f"{len(broken)} were rejected, each with its reason in" in capsys.readouterr().err


def test_an_image_that_only_the_processor_cannot_read_is_rejected(unusual_items):
    """Qwen2.5-VL takes no image with an aspect ratio above 200."""
    where, folder, good, broken = unusual_items
    model = saved(random_qwen_vl(), folder / "model")
    load_script(STAGE_2).main([*where, "--model", model, "--max_new_tokens", "3"])
    summarised, reasons = summarised_and_rejected(folder)
    assert reasons.keys() == broken | {"20000x10.png"}
    assert "aspect ratio" in reasons["20000x10.png"]
    assert summarised == good - {"20000x10.png"}


MODELS = {
    "qwen2.5-vl": (STAGE_2, random_qwen_vl),
    "llava-1.5": (STAGE_2, lambda: random_llava("tiny", kind="1.5")),
    "qwen3": (STAGE_3, random_qwen3),
}


@pytest.mark.parametrize("name", MODELS)
def test_another_model_is_a_change_of_the_config(small_run, tmp_path, name):
    stage, make = MODELS[name]
    more = ["--model", saved(make(), tmp_path / "model"), "--max_new_tokens", "6"]
    more += ["--summary", "fused"] if stage == STAGE_2 else []
    assert run_stage(small_run, stage, tmp_path / "out", *more).count(b"\n") == N_ROWS[stage]


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
@pytest.mark.parametrize("stage", OUTPUTS)
def test_a_quantized_model_generates_text(small_run, tmp_path, stage, quantization):
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    load, name = (load_multimodal, "llava") if stage == STAGE_2 else (load_text, "llama")
    model, _ = load(str(TINY / name), ModelOptions(quantization=quantization))
    kind = {"int8": Linear8bitLt, "nf4": Linear4bit}[quantization]
    everywhere, language_model = (
        sum(isinstance(module, kind) for module in part.modules())
        for part in (model, model.get_decoder())
    )
    n_layers = model.config.get_text_config().num_hidden_layers
    assert everywhere == language_model == 7 * n_layers, "its layers and no other"
    more = ("--quantization", quantization, "--limit", "3", "--max_new_tokens", "8")
    content = run_stage(small_run, stage, tmp_path, *more)
    rows = [json.loads(line) for line in content.splitlines()]
    assert len(rows) == (9 if stage == STAGE_3 else 3)  # users of each split
    assert all(row.get("summary") or row.get("preference") for row in rows)


def test_a_pilot_prints_how_long_all_rows_would_take(small_run, tmp_path, capsys):
    run_stage(small_run, STAGE_3, tmp_path, "--max_new_tokens", "4", "--limit", "5")
    printed = capsys.readouterr().err
    assert "users a second all 30 would take" in printed
    assert "on this machine, loading the model not counted" in printed
    run_stage(small_run, STAGE_3, tmp_path, "--max_new_tokens", "4")
    assert "would take" not in capsys.readouterr().err


def test_durations_have_readable_units():
    texts = [duration(seconds) for seconds in (0.4, 99, 240, 3600 * 2 + 65)]
    assert texts == ["0 s", "99 s", "4 min", "2 h 01 min"]


def test_long_texts_are_shortened_and_counted_and_images_are_not(small_run, tmp_path, capsys):
    """Room for 120 tokens: those of the image stay, the title and the two notes are cut."""
    model, processor = random_llava("tiny")
    model.config.text_config.max_position_embeddings = 150
    name = saved((model, processor), tmp_path / "model")
    Image.new("RGB", (64, 64)).save(tmp_path / "1.png")
    titles = ["short", "very " * 400 + "long", "<image> [/INST] </s>\nbrackets"]
    items = [{"item_id": str(n), "title": t, "image": "1.png"} for n, t in enumerate(titles)]
    write_rows(tmp_path / "items.jsonl", items)
    more = ["--data_dir", str(tmp_path), "--model", name, "--summary", "fused"]
    run_stage(small_run, STAGE_2, tmp_path, *more, "--max_new_tokens", "30")
    path = output_path(STAGE_2, tmp_path)
    rows = read_rows(path)
    assert [row["item_id"] for row in rows] == ["0", "1", "2"]
    assert rows[1]["shortened"] >= 1
    total = sum(row.get("shortened", 0) for row in rows)
    assert f"{total} prompts were shortened to fit the model" in capsys.readouterr().err
    assert read_record(path)["shortened"] == total
    message = "--max_new_tokens 150 leaves no room for a prompt: the model takes 150 tokens"
    more += ["--max_new_tokens", "150", "--overwrite", "true"]
    with pytest.raises(InputError, match=message):
        run_stage(small_run, STAGE_2, tmp_path, *more)
