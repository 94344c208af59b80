"""Slow: the limits that the sample's tiny models must meet, as shipped and trained again.

    bash scripts/run_tests.sh -m slow tests/test_tiny_models.py

What they do on their own (captions, recurrence) is in test_engine.py and runs always.
"""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, TINY

from mllmrec.stage.scripts import load_script

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("seed", [42, 43, 44])
def test_tiny_sft_teaches_the_task(tmp_path, seed):
    """Zero-shot AUC at most .65, after SFT at least .80, 480 test users.

    Each seed has a world and a training of its own.
    """
    options = ["--config", "configs/sample.yaml", "--seed", str(seed)]
    options += ["--data_dir", str(tmp_path), "--output_dir", str(tmp_path)]
    llava, llama = ["--model", str(TINY / "llava")], ["--model", str(TINY / "llama")]
    load_script("data_processing/sample.py").main(options)
    load_script("Inference/image_summary.py").main([*options, *llava])
    load_script("Inference/preference_recurrent.py").main([*options, *llama])
    load_script("MLLM-MSR/train/dataset_create.py").main(options)
    load_script("MLLM-MSR/test/multi_col_dataset.py").main(options)
    load_script("MLLM-MSR/train/train_llava_sft.py").main([*options, *llava])
    score = load_script("MLLM-MSR/test/test_with_llava_sft.py")
    score.main([*options, *llava, "--adapter", "none", "--hide", "nothing"])
    score.main([*options, *llava])
    load_script("MLLM-MSR/test/compute_metrics.py").main(options)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    print({name: round(found["auc"], 3) for name, found in metrics.items()})
    assert metrics["sft"]["users"] >= 480
    assert metrics["zero_shot"]["auc"] <= 0.65
    assert metrics["sft"]["auc"] >= 0.80
    assert metrics["sft_no_image"]["auc"] <= metrics["sft"]["auc"] - 0.05
    assert metrics["sft_no_preference"]["auc"] <= metrics["sft"]["auc"] - 0.05


def test_trained_again_they_meet_the_same_limits(tmp_path):
    if "TINY_MODELS" in os.environ:
        pytest.skip("this is the inner run")
    for name in ("llava", "llama", "list_llama"):
        script = load_script(f"scripts/tiny_models/train_{name}.py")
        script.main(["--output", str(tmp_path / name)])
    tests = [
        "tests/test_engine.py",
        "tests/test_ranker.py",
        "tests/test_tiny_models.py",
        "-k",
        "tiny",
        "-m",
        "slow or not slow",
        "-s",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *tests],
        cwd=ROOT,
        env={**os.environ, "TINY_MODELS": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    print(done.stdout[-3000:])
    assert done.returncode == 0
