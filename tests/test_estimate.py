"""scripts/estimate.sh: tokens beside those of a run, memory beside that of models and GPUs."""

import json
import re

import pytest
import torch
from conftest import ROOT, TINY
from random_models import llama_config, llava_config

from mllmrec.estimate import bytes_beside_weights, main, stage_options
from mllmrec.models.loading import load_multimodal, load_text
from mllmrec.models.lora import add_lora
from mllmrec.models.model_options import LoraOptions, ModelOptions
from mllmrec.models.processors import load_processor, read_config
from mllmrec.models.size import model_size
from mllmrec.stage.errors import InputError
from mllmrec.stage.options import load_config
from mllmrec.stage.scripts import load_script

GB = 1e9


@pytest.fixture
def estimated(capsys):
    """Function config -> {section: (its lines, rows, tokens of prompts, of the longest)}."""

    def run(config):
        main(["--config", str(config)])
        found = {}
        for part in re.split(r"\n(?=\w)", capsys.readouterr().out):
            patterns = (r"([\d,]+) rows", r"([\d,]+) of prompts", r"longest ([\d,]+)")
            numbers = (int(re.search(p, part)[1].replace(",", "")) for p in patterns)
            found[part.split(":")[0]] = (part, *numbers)
        return found

    return run


def config_of(small_run, folder, **common):
    """A config of the small run whose outputs are in `folder`."""
    path, text = folder / "config.yaml", "".join(f"  {k}: {v}\n" for k, v in common.items())
    path.write_text(f"base: {small_run.config}\ncommon:\n  output_dir: {folder}\n{text}")
    return path


def test_tokens_are_at_least_those_of_the_run_and_not_many_more(small_run, estimated):
    costs, found = load_script("scripts/reproduce/costs.py"), estimated(small_run.config)
    assert list(found) == ["image_summary", "preference", "train", "score", "ranker"]
    _, rows, prompts, _ = found["preference"]
    run = costs.preference_costs(small_run.system / "user_preferences.jsonl")
    assert rows == 30 and run["prompt"] * rows <= prompts <= 2 * run["prompt"] * rows
    _, rows, prompts, longest = found["score"]
    run = costs.scoring_costs(small_run.system / "sft/scores.jsonl")
    assert rows == 9 * 21 and prompts == pytest.approx(9 * run["prompt"], rel=0.15)
    assert longest >= prompts / rows
    assert all("at the rate of" in found[name][0] for name in list(found)[:4])
    assert "a pilot: bash scripts/mllm4rec/04_ranker.sh" in found["ranker"][0]


def test_tokens_before_a_stage_are_upper_bounds(small_run, tmp_path, estimated):
    before = estimated(config_of(small_run, tmp_path))
    after = estimated(small_run.config)
    for section in ("image_summary", "preference", "train", "score"):
        assert before[section][1] == after[section][1], f"rows of {section}"
        assert before[section][2] >= after[section][2], f"tokens of {section}"
    assert before["preference"][2] > after["preference"][2], (
        "summaries are shorter than they may be"
    )
    assert before["train"][2] > after["train"][2] and "no run yet" in before["train"][0]


def test_an_estimate_is_of_the_folders_that_are_named(small_run, tmp_path, capsys):
    """Of another output_dir: no run yet; of a data_dir without data: an error."""
    words = ["--config", str(small_run.config)]
    main([*words, "--output_dir", str(tmp_path)])
    assert capsys.readouterr().out.count("no run yet") == 5
    with pytest.raises(InputError, match=r"items\.jsonl is missing"):
        main([*words, "--data_dir", str(tmp_path)])
    config = config_of(small_run, tmp_path, seed="many")
    with pytest.raises(InputError, match="section 'image_summary': seed: input should be a valid"):
        main(["--config", str(config)])


def test_an_estimate_before_stage_1_names_what_is_missing(small_run, tmp_path):
    with pytest.raises(InputError, match=r"items\.jsonl is missing"):
        main(["--config", str(config_of(small_run, tmp_path, data_dir=tmp_path))])


def loaded_bytes(model):
    """Bytes of all weights, with the scales of quantised ones."""
    states = [getattr(parameter, "quant_state", None) for parameter in model.parameters()]
    scales = [state.absmax.nbytes + state.state2.absmax.nbytes for state in states if state]
    return sum(parameter.nbytes for parameter in model.parameters()) + sum(scales)


def test_the_numbers_of_a_model_are_those_of_the_loaded_one():
    model, _ = load_multimodal(str(TINY / "llava"), ModelOptions(dtype="bfloat16"))
    size = model_size(read_config(str(TINY / "llava")))
    assert size.weights() == loaded_bytes(model)
    cache = model(input_ids=torch.ones(1, 7, dtype=torch.long)).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert size.inference(0, 7) == held
    adapted = add_lora(model, LoraOptions(lora_r=4))
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert size.training(0, 4, checkpointing=True) == 16 * trained


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantised_weights_take_what_bitsandbytes_takes(quantization):
    options = ModelOptions("", quantization=quantization, dtype="bfloat16")
    found = model_size(read_config(str(TINY / "llama"))).weights(quantization)
    assert found == pytest.approx(
        loaded_bytes(load_text(str(TINY / "llama"), options)[0]), rel=0.02
    )


def test_full_size_takes_what_a_gpu_was_seen_to_take():
    """Peaks of one H200 with random weights, docs/benchmarks.md ("Full size"): within 15%."""
    processor, tokenizer = (
        load_processor(str(TINY / name), ModelOptions("")) for name in ("llava", "llama")
    )
    llava, llama = (
        model_size(llava_config("7b", processor)),
        model_size(llama_config("8b", tokenizer)),
    )
    measured = json.loads((ROOT / "results/benchmarks/h200_train.json").read_text())
    assert llava.parameters == pytest.approx(measured["parameters"], rel=0.01)
    assert llama.parameters == 8_030_261_248
    peak = measured["rows"][0]["baseline_peak_gb"]
    micro_batch = llava.training(round(measured["mean_length"]), 8, checkpointing=True)
    assert (llava.weights() + micro_batch) / GB == pytest.approx(peak, rel=0.15)
    options = stage_options("train", load_config(ROOT / "configs/microlens.yaml"))
    rest = bytes_beside_weights("train", options, llava, 1_000)
    assert (llava.weights() + rest) / GB == pytest.approx(19.1, rel=0.15), "the validation's"
    assert (llava.weights("nf4", training=True) + rest) / GB == pytest.approx(11.0, rel=0.15)
    rest = bytes_beside_weights("score", options, llava, 1_000)
    assert (llava.weights() + rest) / GB == pytest.approx(19.2, rel=0.15)
