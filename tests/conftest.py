"""What several test files need: one small run of all stages, unusual images, the real data."""

from mllmrec.stage.main import set_up_logging

import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from mllmrec.stage.options import CommonOptions
from mllmrec.stage.scripts import load_script

# One thread per pytest-xdist worker: more threads than cores would wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may look for a model elsewhere
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
set_up_logging("INFO")  # as `run_main` does it for a script
os.fsync = lambda handle: None  # no test is about power that fails

ROOT = Path(__file__).parent.parent
TINY = Path(
    os.environ.get("TINY_MODELS", ROOT / "Inference/tiny_models")
)  # another folder: see test_tiny_models.py
PLACES = (ROOT / "data" / "raw" / "microlens", ROOT.parent / "shared" / "data" / "microlens")
REAL = next((place for place in PLACES if (place / "MicroLens-50k_pairs.tsv").exists()), None)
skip_without_real_data = pytest.mark.skipif(
    REAL is None,
    reason="MicroLens-50k_pairs.tsv and _titles.csv are not in data/raw/microlens (docs/data.md)",
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


def saved(model_and_processor, folder):
    """The folder's name, with the model and its processor in it."""
    for part in model_and_processor:
        part.save_pretrained(folder)
    return str(folder)


def write_unchecked(path, rows):
    """A JSONL file with rows that the schema would refuse to write."""
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def small_config(folder):
    """configs/sample.yaml with a world of 30 users and one epoch, in `folder`; returns its path."""
    text = (ROOT / "configs/sample.yaml").read_text()
    text = text.replace("outputs/sample", str(folder)).replace(
        "n_users: 1100", "n_users: 30\n  n_items: 60"
    )
    text = text.replace("epochs: 4", "epochs: 1").replace(
        "validation_fraction: 0.06", "validation_fraction: 0.2"
    )
    # Tests make copies of the run elsewhere, with links to its covers.
    text = text.replace("  domain: video", f"  domain: video\n  image_roots: [{folder}]")
    path = Path(folder) / "small.yaml"
    path.write_text(text)
    return path


def free_port():
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def options_class(stage):
    """The options of a stage script: of the classes in it the one that has most fields."""
    classes = [value for value in vars(stage).values() if isinstance(value, type)]
    kinds = [kind for kind in classes if issubclass(kind, CommonOptions)]
    return max(kinds, key=lambda kind: len(kind.__dataclass_fields__))


def call(*words, **environment):
    """Run Python on `words` in a process of its own, from the root of the repository."""
    return subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """All stages once, in this process, on a small world.

    folder, system (its subfolder mllm_msr), config, and run(stage, *options) to run a stage again.
    """
    folder = tmp_path_factory.mktemp("small_run")
    config = small_config(folder)
    before = Path.cwd()
    os.chdir(ROOT)

    def run(stage, *options):
        load_script(stage).main(["--config", str(config), *options])

    for stage in STAGES[:6]:
        run(stage)
    run(STAGES[6], "--adapter", "none", "--hide", "nothing")
    for stage in STAGES[6:]:
        run(stage)
    yield SimpleNamespace(folder=folder, system=folder / "mllm_msr", config=config, run=run)
    os.chdir(before)


def unusual_images(folder):
    """Write images that break naive code; return (names that can be opened, names that cannot)."""
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    image, exif = Image.fromarray(noise), Image.Exif()
    exif[0x0112] = 6  # rotated by a quarter
    image.save(folder / "plain.jpg")
    image.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(noise[..., 0].astype(np.uint16) * 257).save(folder / "16bit.png")
    image.convert("P").save(folder / "palette.png", transparency=7)
    image.save(folder / "rotated.jpg", exif=exif)
    image.save(folder / "animated.gif", save_all=True, append_images=[image.rotate(90)])
    image.resize((1, 1)).save(folder / "1x1.png")
    image.resize((20000, 10)).save(folder / "20000x10.png")
    good = [path.name for path in sorted(folder.iterdir())]
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "half.jpg").write_bytes((folder / "plain.jpg").read_bytes()[:900])
    (folder / "text.jpg").write_text("<html>not found</html>")
    (folder / "bomb.png").write_bytes(bomb())
    return good, [path.name for path in sorted(folder.iterdir()) if path.name not in good]


def bomb():
    """A PNG of 60,000 x 60,000 pixels in a few bytes of header."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


def report_data_of(path):
    """The JSON in a report.html."""
    return json.loads(re.search(r'id="data">(.*?)</script>', path.read_text())[1])


@pytest.fixture
def browser():
    """A Chromium without a window."""
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next((path for name in names if (path := shutil.which(name))), None)
    driver_program = shutil.which("chromedriver")
    if not (program and driver_program):
        pytest.skip("no Chromium and chromedriver on this machine")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1300,900"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, Service(driver_program))
    yield driver
    driver.quit()
