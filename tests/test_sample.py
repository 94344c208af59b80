"""The sample's world: deterministic, and image, title and recency are each needed."""

import numpy as np
import pytest
from conftest import script

from data_processing import sample_world as world
from data_processing.jsonl import read_rows
from data_processing.metrics import evaluate


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """Folder of the shipped sample, made anew."""
    folder = tmp_path_factory.mktemp("sample")
    script("data_processing/sample.py").main(
        ["--config", "configs/sample.yaml", "--data_dir", str(folder), "--output_dir", str(folder)]
    )
    return folder


def test_the_same_seed_gives_the_same_files_and_another_seed_others(sample, tmp_path):
    for name, seed in (("same", "42"), ("other", "7")):
        options = [
            "--data_dir",
            str(tmp_path / name),
            "--output_dir",
            str(tmp_path / name),
            "--seed",
            seed,
        ]
        script("data_processing/sample.py").main(["--config", "configs/sample.yaml", *options])
    for file in (
        "users.jsonl",
        "items.jsonl",
        "covers/i000.png",
        "covers/i150.png",
        "ceiling/scores.jsonl",
    ):
        wanted = (sample / file).read_bytes()
        assert (tmp_path / "same" / file).read_bytes() == wanted
        assert (tmp_path / "other" / file).read_bytes() != wanted


def test_there_are_enough_test_users(sample):
    assert sum(user["split"] == "test" for user in read_rows(sample / "users.jsonl")) >= 480


def test_the_world_needs_image_title_and_recency(sample):
    auc = {
        rule: evaluate(read_rows(sample / rule / "scores.jsonl"), resamples=1)["auc"]
        for rule in ("ceiling", "title_only", "no_recency")
    }
    assert auc["ceiling"] > 0.92
    assert auc["title_only"] < auc["ceiling"] - 0.15, "covers are needed"
    assert auc["no_recency"] < auc["ceiling"] - 0.15, "recency is needed"
    image_only = image_only_auc(sample)
    assert image_only < auc["ceiling"] - 0.05, "titles are needed"


def image_only_auc(folder):
    """AUC of the taste that drew the target, less its topic."""
    from data_processing import sample
    from data_processing.candidates import candidates, score_row

    items, _, lives = sample.build_world(sample.Args(seed=42, n_users=1100))
    rows = []
    for user in read_rows(folder / "users.jsonl"):
        if user["split"] == "test":
            taste = lives[int(user["user_id"][1:])][1]
            listed = candidates(user)
            scores = world.fits(
                [items[int(item_id[1:])] for item_id, _ in listed], taste, ("colour", "shape")
            )
            rows += [
                score_row(user["user_id"], i, label, float(s))
                for (i, label), s in zip(listed, scores, strict=True)
            ]
    return evaluate(rows, resamples=1)["auc"]


def test_the_title_tells_the_topic_and_nothing_of_the_cover():
    rng = np.random.default_rng(0)
    for item in world.catalogue(300, rng):
        assert item["topic"] in item["title"]
        assert not any(value in item["title"].split() for value in (*world.COLOURS, *world.SHAPES))


@pytest.mark.parametrize("shape", world.SHAPES)
def test_covers_of_one_kind_differ(shape):
    rng = np.random.default_rng(0)
    first, second = (np.asarray(world.draw_cover("red", shape, rng)) for _ in range(2))
    assert first.shape == (64, 48, 3)
    assert (first != second).any()


def test_the_rule_by_hand():
    red, blue = (
        {"colour": "red", "shape": "star", "topic": "music"},
        {"colour": "blue", "shape": "star", "topic": "travel"},
    )
    assert world.update_preference(None, [red, blue]) == {
        "colour": "blue",
        "shape": "star",
        "topic": "travel",
    }, "1.1 against 1.2"
    assert world.update_preference(red, [blue]) == red, "one new item, 1.1, does not outweigh 1.2"
    assert world.update_preference(red, [blue, blue])["colour"] == "blue"
    assert world.update_preference(red, [blue, red])["colour"] == "red"
    assert world.rolled_preferences([red, red, red, blue])[-1] == red


def test_tastes_drift():
    rng = np.random.default_rng(1)
    items = world.catalogue(200, rng)
    early_late = []
    for _ in range(200):
        chosen, taste = world.simulate_user(items, 12, rng)
        assert len(set(chosen)) == 12
        fits = world.fits([items[i] for i in chosen], taste)
        early_late.append((fits[:4].mean(), fits[-4:].mean()))
    early, late = np.mean(early_late, axis=0)
    assert late > 2.0
    assert early < late - 0.8
