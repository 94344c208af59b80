"""What several test files need: the stage scripts as modules, and one small run of all stages."""

import importlib.util
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may look for a model elsewhere
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).parent.parent
TINY = Path(os.environ.get("TINY_MODELS", ROOT / "Inference/tiny_models"))  # another folder: see test_tiny_models.py
PLACES = (ROOT / "data" / "raw" / "microlens", ROOT.parent / "shared" / "data" / "microlens")
REAL = next((place for place in PLACES if (place / "MicroLens-50k_pairs.tsv").exists()), None)
needs_real_data = pytest.mark.skipif(
    REAL is None, reason="MicroLens-50k_pairs.tsv and _titles.csv are not in data/raw/microlens (README, «Real data»)"
)
STAGES = (
    "data_processing/sample.py",
    "Inference/image_summary.py",
    "Inference/preference_recurrent.py",
    "MLLM-MSR/train/dataset_create.py",
    "MLLM-MSR/test/multi_col_dataset.py",
    "MLLM-MSR/train/train_llava_sft.py",
    "MLLM-MSR/test/test_with_llava_sft.py",
    "MLLM-MSR/baselines/popularity.py",
    "MLLM-MSR/test/compute_metrics.py",
    "MLLM-MSR/test/report.py",
)


def script(path):
    """A stage script as a module; `MLLM-MSR` cannot be imported by name."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def small_config(folder):
    """configs/sample.yaml with a world of 30 users and one epoch, in `folder`; returns its path."""
    text = (ROOT / "configs/sample.yaml").read_text()
    text = text.replace("outputs/sample", str(folder)).replace("n_users: 1100", "n_users: 30\n  n_items: 60")
    text = text.replace("epochs: 4", "epochs: 1").replace("validation_fraction: 0.06", "validation_fraction: 0.2")
    path = Path(folder) / "small.yaml"
    path.write_text(text)
    return path


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """All stages once, in this process, on a small world: folder, config, and run(stage, *options) to run one again."""
    folder = tmp_path_factory.mktemp("small_run")
    config = small_config(folder)
    before = Path.cwd()
    os.chdir(ROOT)

    def run(stage, *options):
        script(stage).main(["--config", str(config), *options])

    for stage in STAGES[:6]:
        run(stage)
    run(STAGES[6], "--adapter", "none", "--hide", "nothing")
    for stage in STAGES[6:]:
        run(stage)
    yield SimpleNamespace(folder=folder, config=config, run=run)
    os.chdir(before)
