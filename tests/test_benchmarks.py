"""Benchmarks run, and the limits that they compare with are those of the operations."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from random_models import random_llama, random_llava
from torch.utils.flop_counter import FlopCounterMode

from mllmrec.models.chat import ChatProcessor
from mllmrec.prompts.templates import user_turn
from mllmrec.stage.errors import InputError
from mllmrec.stage.scripts import load_script

limits = load_script("scripts/benchmarks/limits.py")
inference = load_script("scripts/benchmarks/time_inference.py")
scoring = load_script("scripts/benchmarks/time_scoring.py")
card = load_script("scripts/benchmarks/time_card.py")
SPEEDS = limits.Speeds(flops=1e9, bandwidth=1e8)


def counted(work):
    """Operations of `work()` as torch counts them."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        work()
    return counter.get_total_flops()


def test_prefill_is_as_many_operations_as_torch_counts():
    model, _ = random_llama("tiny")
    model.set_attn_implementation("eager")  # of SDPA on a CPU torch counts nothing
    ids = torch.ones(1, 300, dtype=torch.long)
    operations = counted(lambda: model(input_ids=ids, logits_to_keep=1))
    text = model.config
    # torch counts attention over all pairs, not only those of earlier tokens
    other_half = 2 * text.num_hidden_layers * text.hidden_size * 300**2
    seconds = limits.prefill_seconds(model, [300], SPEEDS)
    assert seconds * SPEEDS.flops + other_half == pytest.approx(operations, rel=0.01)
    assert limits.prefill_seconds(model, [300] * 3, SPEEDS) == pytest.approx(3 * seconds)


def test_the_vision_tower_is_as_many_operations_as_torch_counts():
    model, processor = random_llava("tiny")
    chat, image = ChatProcessor(processor), Image.fromarray(np.zeros((64, 64, 3), np.uint8))
    prompt = chat.render([user_turn("What?", images=1)])
    pixels = chat.encode([prompt], [image])
    operations = counted(
        lambda: model.get_image_features(
            pixel_values=pixels["pixel_values"], image_sizes=pixels["image_sizes"]
        )
    )
    passes = limits.vision_passes(model, chat, [(prompt, image)])
    found = sum(2 * weights * tokens for weights, tokens in passes)
    assert found == pytest.approx(operations, rel=0.1)  # without attention, with embeddings


def test_decoding_is_bound_by_reading_or_by_products():
    model, _ = random_llama("tiny")
    number, nbytes = limits.layer_weights(model)
    assert nbytes == 4 * number
    one = limits.decoding_seconds(model, [[100]], 10, SPEEDS)
    assert one == pytest.approx(10 * nbytes / SPEEDS.bandwidth, rel=0.2)
    many = limits.decoding_seconds(model, [[100] * 1000], 10, limits.Speeds(1e9, 1e15))
    assert many == pytest.approx(10 * 1000 * 2 * number / 1e9)
    longer = limits.decoding_seconds(model, [[10_000]], 10, SPEEDS)
    assert longer > 1.5 * one, "keys and values are read, too"


def test_the_benchmark_of_stages_2_and_3_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = "--size tiny --items 2 --users 2 --history 3 --new_tokens 4 --repeats 1"
    inference.main(words.split())
    report = json.loads((tmp_path / "outputs/benchmark/inference.json").read_text())
    assert [row["batches"] for row in report["rows"]] == [[2], [2]]
    assert all(0 < row["share_of_limit"] < 1 for row in report["rows"])
    assert report["rows"][1]["share_of_users_with_equal_texts"] == 1.0


def test_the_benchmark_of_stage_6_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = "--size tiny --rows 4 --users 1 4 --published_at 4 --repeats 1 --batch_tokens 512"
    scoring.main(words.split())
    alone, *shared = json.loads((tmp_path / "outputs/benchmark/scoring.json").read_text())["rows"]
    assert len(shared) == 2 and all(row["largest_logit_difference"] < 1e-4 for row in shared)
    assert all(0 < row["share_of_limit"] < 1 for row in (alone, *shared))
    # Four users of one item and four items of one user each: the image is needed once.
    assert shared[0]["limit_s"] < 0.8 * alone["limit_s"]


@pytest.mark.slow
def test_the_benchmark_of_stage_5_runs(tmp_path):
    words = ["--size", "tiny", "--steps", "1", "--step", "2", "--batch", "2", "--repeats", "1"]
    script = str(ROOT / "scripts/benchmarks/time_train.py")
    done = subprocess.run([sys.executable, script, *words], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    [row, *_] = json.loads((tmp_path / "outputs/benchmark/train.json").read_text())["rows"]
    assert 0 < row["ours_mfu"] < 1 and 0 < row["baseline_mfu"] < 1


@pytest.mark.slow
def test_the_check_of_a_card_runs(tmp_path):
    words = ["--size", "tiny", "--parts", "numbers", "text", "images", "training", "graphs"]
    script = str(ROOT / "scripts/benchmarks/time_card.py")
    done = subprocess.run([sys.executable, script, *words], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    rows = json.loads((tmp_path / "outputs/benchmark/gpu_check.json").read_text())["rows"]
    assert [row.get("note") for row in rows[:3]] == ["right"] * 3
    speeds = {row["what"]: row["value"] for row in rows[3:]}
    assert len(speeds) == 9 and all(value > 0 for value in speeds.values())
    assert all(0 < row["share"] < 1 for row in rows if "share" in row)
    assert (tmp_path / "outputs/benchmark/gpu_check.md").read_text().count("\n") == 2 + len(rows)


def test_parts_of_the_check_that_do_not_run_say_why(tmp_path, monkeypatch, capsys):
    def full(args):
        yield card.line("a speed", 3, 4)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    def missing(args):
        raise InputError("no package trl")
        yield

    monkeypatch.setattr(card, "PARTS", {"text": full, "trl": missing})
    args = card.Options("tiny")
    first = {"what": "a speed", "value": 3.0, "limit": 4.0, "share": 0.75}
    stopped = {"what": "text", "value": "not run", "note": "out of memory"}
    assert card.measure("text", args) == [first, stopped]
    assert card.measure("trl", args)[0]["note"] == "no package trl"
    monkeypatch.chdir(tmp_path)
    card.main(["--size", "tiny", "--minutes", "0"])
    assert capsys.readouterr().out.count("| not run |  |  | after 0 min |") == 6
    wrong = card.line("a change", 1.0) | {"note": "WRONG: above 0.02"}
    with pytest.raises(InputError, match="wrong numbers on this card: a change"):
        card.refuse_wrong([first, wrong])
