"""scripts/estimate.sh: tokens are those of a run, memory is that of models that were measured."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY
from PIL import Image
from random_models import llama_config, llava_config

from mllmrec.estimate.command import (
    CARDS,
    StageEstimate,
    estimate_stage,
    lines,
    main,
    scoring_bytes,
    training_bytes,
)
from mllmrec.estimate.tokens import (
    StageTokens,
    preference_tokens,
    ranking_tokens,
    stage_options,
    stand_in,
    summary_tokens,
)
from mllmrec.generation.dialogues import Prompt, RejectedError
from mllmrec.generation.engine import GenerationEngine
from mllmrec.models.chat import ChatProcessor
from mllmrec.models.loading import load_multimodal, load_processor, load_text, read_config
from mllmrec.models.lora import add_lora
from mllmrec.models.model_options import LoraOptions, ModelOptions
from mllmrec.models.size import model_size
from mllmrec.ranking.token_counts import TokenCounts, dialogue_tokens
from mllmrec.ranking.training_options import FineTuningOptions
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import read_rows

GB = 1e9
# Of results/benchmarks/cpu_rehearsal.json: stage -> (section, model).
MEASURED_STEPS = {
    "stage 2, image summaries": ("image_summary", "llava"),
    "stage 3, preferences": ("preference", "llama3"),
    "stage 5, one optimizer step": ("train", "llava"),
    "stage 6, scores": ("score", "llava"),
    "MLLM4Rec's ranker": ("ranker", "llama2"),
}


@pytest.fixture
def seen(monkeypatch):
    """Tokens that the engine hands to a model: [prompt, generated, prompts], counted up."""
    counts, generate = [0, 0, 0], GenerationEngine._generate

    def counted(engine, requests):
        own = engine.model.generate

        def noted(**batch):
            ids, length = own(**batch), batch["input_ids"].shape[1]
            new = ids[:, length:] != engine.chat.tokenizer.pad_token_id
            counts[0] += int(batch["attention_mask"].sum())
            counts[1] += int(new.sum())
            counts[2] += len(ids)
            return ids

        engine.model.generate = noted
        try:
            return generate(engine, requests)
        finally:
            engine.model.generate = own

    monkeypatch.setattr(GenerationEngine, "_generate", counted)
    return counts


def config_of(small_run, folder):
    """A config whose outputs are in `folder`."""
    path = folder / "config.yaml"
    path.write_text(f"base: {small_run.config}\ncommon:\n  output_dir: {folder}\n")
    return path


@pytest.mark.parametrize("summary", ["image", "fused"])
def test_tokens_of_summaries_are_those_of_the_run(small_run, tmp_path, seen, summary):
    config = config_of(small_run, tmp_path)
    words = ["--output_dir", str(tmp_path), "--summary", summary]
    before = summary_tokens(options := stage_options("image_summary", config, words))
    small_run.run("Inference/image_summary.py", *words)
    after = summary_tokens(options)
    assert before.missing == ("image_summaries.jsonl",) and before.rows == after.rows == 60
    assert before.counts.requests == after.counts.requests == seen[2]
    assert after.counts.image == 60 * 36
    found = (after.counts.prompt, after.counts.generated)
    if summary == "image":
        assert found == tuple(seen[:2]) and not after.missing
        assert before.counts.prompt == after.counts.prompt, "images alone decide"
    else:  # the two texts that are not kept are counted as long as they may be
        assert found[0] > seen[0] and found[1] > seen[1] and after.missing
    assert before.counts.generated >= after.counts.generated


def test_a_limit_and_padded_images_count_as_in_the_run(small_run, tmp_path, seen):
    data, config = tmp_path / "data", config_of(small_run, tmp_path)
    shutil.copytree(small_run.folder / "covers", data / "covers")
    (data / "items.jsonl").write_bytes((small_run.folder / "items.jsonl").read_bytes())
    for row in read_rows(data / "items.jsonl")[:20:3]:
        cover = Image.open(data / row["image"])
        cover.resize((150, 40)).save(data / row["image"])
    words = ["--data_dir", str(data), "--output_dir", str(tmp_path), "--limit", "10"]
    plain = summary_tokens(stage_options("image_summary", config, words))
    padded = [*words, "--pad_images", "4"]
    small_run.run("Inference/image_summary.py", *padded)
    found = summary_tokens(stage_options("image_summary", config, padded))
    assert found.rows == plain.rows == 10
    assert (found.counts.prompt, found.counts.generated, found.counts.requests) == tuple(seen)
    assert found.counts.image != plain.counts.image, "padded images have other shapes"


def test_rows_that_share_nothing_are_computed_whole(small_run):
    def tokens(section, *words):
        split = "train" if section == "train" else "test"
        return ranking_tokens(stage_options(section, small_run.config, words), split)

    few = tokens("score", "--limit", "2")
    assert few.rows == 2 * 21 < tokens("score").rows
    plain = tokens("score", "--limit", "2", "--reuse_prefix", "false").counts
    assert plain.computed == plain.prompt == few.counts.prompt > few.counts.computed
    assert tokens("train", "--limit", "7").rows == 7
    apart, together = tokens("train").counts, tokens("train", "--group_by", "item").counts
    assert apart.computed == apart.prompt == together.prompt > together.computed


def test_training_needs_what_its_largest_pass_needs(full_size):
    llava = full_size["llava"]
    tokens = StageTokens(100, TokenCounts(100, 100_000, 0, 100_000), 1_000)

    def needed(**options):
        return training_bytes(llava, FineTuningOptions(**options), tokens, 2)

    micro_batch = llava.training(1_000, 8, checkpointing=True)
    checkpointing = {"gradient_checkpointing": True, "batch_size": 1, "lora_r": 8}
    assert needed(**checkpointing, score_batch_tokens=1) == micro_batch
    validation = llava.pass_through(16_384) + llava.kv(16_384)
    assert needed(**checkpointing) == llava.training(0, 8, checkpointing=True) + validation
    logits = needed(**checkpointing, score_batch_tokens=1, loss="sequence") - micro_batch
    assert logits >= 4 * 1_000 * 32_064


def test_tokens_of_a_rejected_dialogue_are_those_until_then():
    chat = ChatProcessor(load_processor(str(TINY / "llama"), ModelOptions()))

    def dialogue():
        yield Prompt("a", 7)
        raise RejectedError("too long")

    counts = dialogue_tokens([(dialogue(), ["yes", "no"])], chat, 5)
    assert (counts.requests, counts.prompt) == (1, 7)


def test_tokens_of_preferences_are_those_of_the_run(small_run, tmp_path, seen):
    config, system = config_of(small_run, tmp_path), tmp_path / "mllm_msr"
    options = stage_options("preference", config)
    first = preference_tokens(options)
    assert first.missing == ("image_summaries.jsonl", "user_preferences.jsonl")
    system.mkdir()
    for name in ("image_summaries.jsonl", "image_summaries.run.json"):
        (system / name).write_bytes((small_run.system / name).read_bytes())
    second = preference_tokens(options)
    assert second.missing == ("user_preferences.jsonl",)
    small_run.run("Inference/preference_recurrent.py", "--output_dir", str(tmp_path))
    third = preference_tokens(options)
    assert third.missing == () and third.rows == 30
    assert (third.counts.prompt, third.counts.generated, third.counts.requests) == tuple(seen)
    assert first.counts.prompt > second.counts.prompt > third.counts.prompt
    assert second.counts.generated == 40 * third.counts.requests > third.counts.generated
    assert first.longest > third.longest


def test_rows_of_training_and_scoring_are_those_of_stage_4(small_run, tmp_path):
    config, system = config_of(small_run, tmp_path), tmp_path / "mllm_msr"
    before = {s: estimate_stage(s, config).tokens for s in ("train", "score")}
    system.mkdir()
    for name in ("train.jsonl", "test.jsonl"):
        (system / name).write_text((small_run.system / name).read_text())
    # The rows name their images relative to the file.
    (tmp_path / "covers").symlink_to(small_run.folder / "covers")
    after = {s: estimate_stage(s, config).tokens for s in ("train", "score")}
    for section in ("train", "score"):
        assert before[section].missing and not after[section].missing
        assert before[section].rows == after[section].rows > 0
        assert before[section].counts.image == after[section].counts.image
        assert before[section].counts.prompt > after[section].counts.prompt
    assert after["score"].counts.computed < after["score"].counts.prompt


@pytest.mark.parametrize("tokens", [10, 500])
def test_a_stand_in_has_about_so_many_tokens(tokens):
    chat = ChatProcessor(load_processor(str(TINY / "llama"), ModelOptions()))
    assert 0.8 * tokens <= chat.count(stand_in(chat, tokens)) <= tokens + 1


def loaded_bytes(model):
    """Bytes of all weights, with the scales of quantised ones."""
    total = 0
    for parameter in model.parameters():
        total += parameter.nbytes
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            total += state.absmax.nbytes + state.state2.absmax.nbytes
    return total


def test_the_numbers_of_a_model_are_those_of_the_loaded_one():
    model, _ = load_multimodal(str(TINY / "llava"), ModelOptions(dtype="float32"))
    size = model_size(read_config(str(TINY / "llava")))
    assert size.parameters == sum(p.numel() for p in model.parameters())
    assert size.weights(itemsize=4) == loaded_bytes(model)
    cache = model(input_ids=torch.ones(1, 7, dtype=torch.long)).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert size.kv(7, itemsize=4) == held
    adapted = add_lora(model, LoraOptions(lora_r=4))
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert size.adapter(4) == trained


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantised_weights_take_what_bitsandbytes_takes(quantization):
    model, _ = load_text(str(TINY / "llama"), ModelOptions("", quantization=quantization))
    size = model_size(read_config(str(TINY / "llama")))
    assert size.weights(quantization, itemsize=4) == pytest.approx(loaded_bytes(model), rel=0.02)


@pytest.fixture(scope="module")
def full_size():
    """By the published shapes."""
    processor, tokenizer = (
        load_processor(str(TINY / name), ModelOptions("")) for name in ("llava", "llama")
    )
    configs = {
        "llava": llava_config("7b", processor),
        "llama3": llama_config("8b", tokenizer),
        "llama2": llama_config("7b", tokenizer),
    }
    return {name: model_size(config) for name, config in configs.items()}


def test_full_size_takes_what_a_gpu_was_seen_to_take(full_size):
    """Peaks of one H200 with random weights, docs/benchmarks.md ("Full size"): within 15%."""
    llava, llama = full_size["llava"], full_size["llama3"]
    measured = json.loads((ROOT / "results/benchmarks/h200_train.json").read_text())
    assert llava.parameters == pytest.approx(measured["parameters"], rel=0.01)
    assert llama.parameters == 8_030_261_248
    row = round(measured["mean_length"])
    peak = measured["rows"][0]["baseline_peak_gb"]
    training = llava.training(row, 8, checkpointing=True)
    assert (llava.weights() + training) / GB == pytest.approx(peak, rel=0.15)
    # Rows of 1,000 tokens in parts: the validation's batches of 16,384 tokens need more.
    tokens = StageTokens(60, TokenCounts(60, 60_000, 0, 60_000), 1_000)
    options = FineTuningOptions(gradient_checkpointing=True, batch_size=1)
    rest = training_bytes(llava, options, tokens, 2)
    assert (llava.weights() + rest) / GB == pytest.approx(19.1, rel=0.15)
    quantised = llava.weights("nf4", training=True)
    assert (quantised + rest) / GB == pytest.approx(11.0, rel=0.15)
    scoring = llava.weights() + llava.pass_through(16384) + llava.kv(16384)
    assert scoring / GB == pytest.approx(19.2, rel=0.15)


def needed_in_rehearsal(section, found, size):
    """Bytes by the arithmetic of the estimate, in float32, from the recorded tokens."""
    rows, longest, prompt = found["rows"], found["longest"], found["prompt_tokens"]
    tokens = StageTokens(rows, TokenCounts(rows, prompt, 0, prompt), longest)
    trained = section in ("train", "ranker")
    if trained:
        options = FineTuningOptions(gradient_checkpointing=True, batch_size=1)
        rest = training_bytes(size, options, tokens, 4)
    elif section == "score":
        rest = scoring_bytes(size, prompt, 4)
    else:
        rest = size.pass_through(min(max(1024, longest), rows * longest), 4)
        rest += size.kv(longest * (rows + 1), 4)
    layer = 4 * size.hidden * size.intermediate
    return size.weights("nf4", 4, training=trained) + rest + layer


@pytest.mark.parametrize("step", MEASURED_STEPS)
def test_full_size_takes_what_the_dress_rehearsal_was_seen_to_take(step, full_size):
    """Peaks of processes on a CPU, nf4 and float32, docs/benchmarks.md: within 15%."""
    recorded = json.loads((ROOT / "results/benchmarks/cpu_rehearsal.json").read_text())
    found, (section, model) = recorded[step], MEASURED_STEPS[step]
    assert recorded["size"] == "full"
    needed = needed_in_rehearsal(section, found, full_size[model]) / GB
    assert sum(found["memory_gb"].values()) == pytest.approx(needed, rel=0.05)
    assert needed + recorded["base_gb"] == pytest.approx(found["peak_gb"], rel=0.15)


def test_the_command_shows_every_stage_with_its_arithmetic(small_run, tmp_path, capsys):
    main(["--config", str(small_run.config), "--json", str(tmp_path / "found.json")])
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found) == ["image_summary", "preference", "train", "score", "ranker"]
    assert [stage["exact"] for stage in found.values()] == [True] * 4 + [False]
    assert "train.jsonl missing" in printed, "the ranker has not run"
    assert printed.count("measured on this machine") == 4
    assert all(printed.count(card.name) == 5 for card in CARDS)
    assert f"{found['preference']['prompt']:,} of prompts" in printed


def test_a_card_without_room_for_one_row_is_named(full_size):
    tokens = StageTokens(10, TokenCounts(10, 30_000, 0, 30_000, 2_000), 3_200)
    llama = full_size["llama3"]

    def estimate(quantization):
        fixed = {"weights": llama.weights(quantization), "activations": llama.pass_through(16384)}
        read = llama.weights(quantization)
        return StageEstimate(
            *("preference", "llama", llama, tokens, 1, fixed, llama.kv(1), read),
            Path("none.jsonl"),
        )

    small, large = CARDS[0], CARDS[-1]
    assert small.memory < 30e9
    whole, quantised = estimate("none"), estimate("nf4")
    assert whole.texts_at_once(large) > quantised.texts_at_once(small) > whole.texts_at_once(small)
    tight = replace(whole, fixed=whole.fixed | {"weights": 24e9})
    assert f"{small.name}: does not fit; try --quantization nf4" in "\n".join(lines(tight))
    # Decoding reads the weights for every token of a text, and its keys and values.
    alone = replace(whole, tokens=StageTokens(1, TokenCounts(1, 3_000, 0, 3_000, 2_000), 5_000))
    assert alone.least_seconds(small) > 2_000 * llama.weights() / small.bandwidth


def test_an_estimate_before_stage_1_names_what_is_missing(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text(f"base: {ROOT / 'configs/sample.yaml'}\ncommon:\n  data_dir: {tmp_path}\n")
    with pytest.raises(InputError, match=r"items\.jsonl is missing"):
        main(["--config", str(config)])
    with pytest.raises(InputError, match="--stages 1: choose of image_summary, preference"):
        main(["--config", str(config), "--stages", "1"])
