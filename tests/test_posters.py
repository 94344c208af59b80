"""Slow: real posters through stages 1 and 2."""

import pytest
from conftest import REAL, ROOT, TINY

from mllmrec.data.images import open_image
from mllmrec.stage.jsonl import read_rows
from mllmrec.stage.scripts import load_script

FOLDER = REAL.resolve().parent if REAL else ROOT / "data/raw"
POSTERS, RATINGS = FOLDER / "posters", FOLDER / "ml-latest-small"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (POSTERS.exists() and RATINGS.exists()), reason="no real posters here"),
]


def test_every_real_poster_is_described_and_its_movie_says_so(tmp_path):
    words = ["--config", str(ROOT / "configs/ml_latest_small.yaml"), "--with_images", "true"]
    words += ["--data_dir", str(tmp_path), "--output_dir", str(tmp_path / "out")]
    words += ["--image_roots", str(POSTERS)]
    more = ["--raw_dir", str(RATINGS), "--image_folder", str(POSTERS), "--require_image", "true"]
    load_script("data_processing/movielens.py").main([*words, *more, "--item_core", "1"])
    items = {item["item_id"]: item for item in read_rows(tmp_path / "items.jsonl")}
    names = {path.stem for path in POSTERS.iterdir()}
    assert items.keys() <= names and len(items) > 1800
    sizes = {open_image(tmp_path / item["image"]).size for item in items.values()}
    assert len(sizes) > 20, "real images have many sizes"
    stage = load_script("Inference/image_summary.py")
    stage.main([*words, "--model", str(TINY / "llava"), "--max_new_tokens", "16"])
    rows = read_rows(tmp_path / "out/mllm_msr/image_summaries.jsonl")
    assert [row["item_id"] for row in rows] == list(items), "none is rejected"
    assert len({row["summary"] for row in rows}) > 10, "they are looked at"
