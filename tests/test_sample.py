"""The sample's world: deterministic, and image, title and recency are each needed."""

import numpy as np
import pytest

from mllmrec.data import sample_world as world
from mllmrec.data.candidates import candidates, score_row
from mllmrec.evaluation.metrics import evaluate
from mllmrec.stage.jsonl import read_rows
from mllmrec.stage.scripts import load_script


def make_sample(folder, *options):
    """The sample in `folder`; returns what the script drew: items, covers, users."""
    script = load_script("data_processing/sample.py")
    build_world, drawn = script.build_world, []
    script.build_world = lambda options: drawn.append(build_world(options)) or drawn[0]
    folders = ["--data_dir", str(folder), "--output_dir", str(folder)]
    script.main(["--config", "configs/sample.yaml", *folders, *options])
    return drawn[0]


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """(folder of the shipped sample, made again; its world)."""
    folder = tmp_path_factory.mktemp("sample")
    return folder, make_sample(folder)


def test_the_same_seed_gives_the_same_files_and_another_seed_others(tmp_path):
    for name, seed in (("first", "42"), ("same", "42"), ("other", "7")):
        make_sample(tmp_path / name, "--seed", seed, "--n_users", "150")
    for file in (
        "users.jsonl",
        "items.jsonl",
        "covers/i000.png",
        "covers/i150.png",
        "bounds/ceiling/scores.jsonl",
    ):
        wanted = (tmp_path / "first" / file).read_bytes()
        assert (tmp_path / "same" / file).read_bytes() == wanted
        assert (tmp_path / "other" / file).read_bytes() != wanted


def test_there_are_enough_test_users(sample):
    folder, _ = sample
    assert sum(user["split"] == "test" for user in read_rows(folder / "users.jsonl")) >= 480


def test_the_world_needs_image_title_and_recency(sample):
    folder, drawn = sample
    auc = {
        rule: evaluate(read_rows(folder / "bounds" / rule / "scores.jsonl"), resamples=1)["auc"]
        for rule in ("ceiling", "title_only", "no_recency")
    }
    assert auc["ceiling"] > 0.92
    assert auc["title_only"] < auc["ceiling"] - 0.15, "covers are needed"
    assert auc["no_recency"] < auc["ceiling"] - 0.15, "recency is needed"
    image_only = image_only_auc(folder, drawn)
    assert image_only < auc["ceiling"] - 0.05, "titles are needed"


def image_only_auc(folder, drawn):
    """AUC of the favourites that drew the target, without the topic."""
    items, _, simulated = drawn
    rows = []
    for user in read_rows(folder / "users.jsonl"):
        if user["split"] == "test":
            _, favourites = simulated[int(user["user_id"][1:])]
            listed = candidates(user)
            offered = [items[int(item_id[1:])] for item_id, _ in listed]
            scores = world.fits(offered, favourites, ("colour", "shape"))
            rows += [
                score_row(user["user_id"], i, label, float(s))
                for (i, label), s in zip(listed, scores, strict=True)
            ]
    return evaluate(rows, resamples=1)["auc"]


def test_a_title_names_the_topic_and_nothing_of_the_cover():
    rng = np.random.default_rng(0)
    for item in world.catalogue(300, rng):
        assert item["topic"] in item["title"]
        assert not any(value in item["title"].split() for value in (*world.COLOURS, *world.SHAPES))


def test_an_extended_cover_holds_the_whole_cover_and_nothing_new():
    cover = world.draw_cover("red", "star", np.random.default_rng(0))
    sizes = [world.extended(cover, number).size for number in range(3)]
    assert sizes == [(48, 64), (72, 64), (48, 96)]
    wide = np.asarray(world.extended(cover, 1))
    assert (wide[:, 12:60] == np.asarray(cover)).all()
    assert (wide[:, :12] == wide[0, 0]).all() and (wide[:, 60:] == wide[0, 0]).all()


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


def test_favourites_change():
    rng = np.random.default_rng(1)
    items = world.catalogue(200, rng)
    early_late = []
    for _ in range(200):
        chosen, favourites = world.simulate_user(items, 12, rng)
        assert len(set(chosen)) == 12
        fits = world.fits([items[i] for i in chosen], favourites)
        early_late.append((fits[:4].mean(), fits[-4:].mean()))
    early, late = np.mean(early_late, axis=0)
    assert late > 2.0
    assert early < late - 0.8
