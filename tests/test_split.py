"""The rules of stage 1 on small logs, against brute force, and on the whole real log."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import REAL, skip_without_real_data
from hypothesis import given, settings
from hypothesis import strategies as st

from data_processing import microlens, split
from data_processing.errors import InputError
from data_processing.jsonl import read_rows
from data_processing.split import (
    Log,
    SplitArgs,
    histories,
    k_core,
    prepare,
    sample_negatives,
    split_users,
)


def small_log(rows, images=None):
    """rows: (user, item, time); images: items that have one, default all."""
    users, items, times = zip(*rows, strict=True)
    names = sorted(set(items))
    catalogue = pd.DataFrame(
        {
            "title": [f"title {n}" for n in names],
            "image": [f"{n}.jpg" if images is None or n in images else None for n in names],
        },
        index=names,
    )
    return Log.from_ids(users, items, times), catalogue


def told(rows, images=None, **options):
    """dict user -> (history, target, negatives, split) after `prepare`."""
    args = SplitArgs(
        **{"user_core": 2, "item_core": 1, "negatives": 0, "train_negatives": 0, **options}
    )
    items, users, stats = prepare(*small_log(rows, images), args)
    found = {}
    for row, history, target in histories(users, args):
        negatives = users["negatives"][row]
        ids = users["item_ids"]
        found[users["ids"][row]] = (
            ids[history].tolist(),
            ids[target],
            ids[negatives[negatives >= 0]].tolist(),
            users["split"][row],
        )
    return found, items, stats


def test_time_order_ties_in_file_order_and_the_last_is_the_target():
    found, _, _ = told([("u", "c", 5), ("u", "a", 1), ("u", "z", 3), ("u", "b", 3)])
    assert found["u"][:2] == (["a", "z", "b"], "c")


def test_of_repeats_the_earliest_stays():
    found, _, _ = told([("u", "a", 9), ("u", "b", 2), ("u", "a", 1), ("u", "c", 3)])
    assert found["u"][:2] == (["a", "b"], "c")


def test_items_without_an_image_leave_before_the_core():
    rows = [("u", i, n) for n, i in enumerate("abcd")] + [("v", i, n) for n, i in enumerate("abc")]
    found, items, _ = told(rows, images="abc", user_core=3)
    assert set(items.index) == set("abc")
    found, items, _ = told(rows, images="abc", user_core=4, require_image=False)
    assert list(found) == ["u"]
    with pytest.raises(
        InputError,
        match="no interaction is left after the filters: 7 read, 1 items without an image",
    ):
        told(rows, images="abc", user_core=4)


def test_max_history_keeps_the_latest_and_released_the_most_popular():
    rows = (
        [("u", i, n) for n, i in enumerate("abcdefgh")]
        + [("v", i, n) for n, i in enumerate("bcx")]
        + [("w", "c", 1), ("w", "x", 2)]
    )
    assert told(rows, max_history=2)[0]["u"][:2] == (["f", "g"], "h")
    history, target, *_ = told(rows, history="released")[0]["u"]
    assert (history, target) == (["c", "b", "a", "d", "e", "f"], "h")


def brute_core(rows, user_core, item_core):
    rows = list(rows)
    while True:
        users, items = Counter(u for u, _ in rows), Counter(i for _, i in rows)
        kept = [(u, i) for u, i in rows if users[u] >= user_core and items[i] >= item_core]
        if len(kept) == len(rows):
            return kept
        rows = kept


@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=60),
    st.integers(1, 4),
    st.integers(1, 4),
)
@settings(deadline=None)
def test_k_core_is_that_of_a_plain_loop(rows, user_core, item_core):
    user, item = np.array(rows).T
    kept = k_core(user, item, user_core, item_core)
    assert [tuple(map(int, row)) for row in np.array(rows)[kept]] == brute_core(
        rows, user_core, item_core
    )


def test_negatives_are_distinct_never_touched_and_uniform():
    touched = np.array([0 * 10 + 3, 0 * 10 + 7, 1 * 10 + 0])
    counts = Counter()
    for seed in range(400):
        drawn = sample_negatives(touched, np.array([0, 1]), 10, 3, np.random.default_rng(seed))
        assert len(set(drawn[0])) == len(set(drawn[1])) == 3
        assert not set(drawn[0]) & {3, 7}
        assert 0 not in drawn[1]
        counts.update(drawn[0].tolist())
    assert set(counts) == {0, 1, 2, 4, 5, 6, 8, 9}
    assert max(counts.values()) - min(counts.values()) < 75, "150 each on average"


def test_negatives_come_from_tiny_catalogues_too_or_are_refused():
    touched = np.arange(5)
    assert sorted(
        sample_negatives(touched, np.array([0]), 25, 20, np.random.default_rng(0))[0]
    ) == list(range(5, 25))
    assert (sample_negatives(touched, np.array([0]), 24, 20, np.random.default_rng(0)) == -1).all()
    rows = [("u", i, n) for n, i in enumerate("abc")] + [("v", "d", 1), ("v", "c", 2)]
    with pytest.raises(
        InputError, match="has touched so many of the 4 items that 2 negatives cannot be drawn"
    ):
        told(rows, train_negatives=2, negatives=2)


def test_negatives_avoid_what_was_touched_outside_the_core_and_the_history():
    """`x` leaves the history of u (max_history), v touched `y` only in a repeat that left: neither may be offered."""
    rows = (
        [("u", i, n) for n, i in enumerate("xabcd")]
        + [("v", i, n) for n, i in enumerate("yabcd")]
        + [("w", i, n) for n, i in enumerate("zxy")]
    )
    for seed in range(20):
        found, _, _ = told(rows, max_history=2, negatives=1, train_negatives=1, seed=seed)
        assert set(found["u"][2]) <= {"y", "z"}
        assert set(found["v"][2]) <= {"x", "z"}


def test_split_sizes_and_folds():
    split, fold = split_users(1000, 0.8, 0.1, 0, 0, np.random.default_rng(0))
    assert Counter(split) == {"train": 800, "validation": 100, "test": 100}
    assert set(fold) == {-1}
    tests = []
    for test_fold in range(5):
        split, fold = split_users(1003, 0.8, 0.1, 5, test_fold, np.random.default_rng(0))
        assert set(np.flatnonzero(split == "test")) == set(np.flatnonzero(fold == test_fold))
        assert (split == "validation").sum() == 100
        tests.append(np.flatnonzero(split == "test"))
    assert sorted(np.concatenate(tests)) == list(range(1003)), "every user is tested once"


def test_a_pilot_has_its_share_of_every_split():
    rows = [(f"u{u}", f"i{(u + i) % 40}", i) for u in range(100) for i in range(4)]
    options = {
        "train_fraction": 0.3,
        "validation_fraction": 0.1,
        "negatives": 3,
        "train_negatives": 1,
    }
    pilot, _, stats = told(rows, limit=20, **options)
    assert stats["written_users"] == {"train": 6, "validation": 2, "test": 12}
    whole, _, _ = told(rows, **options)
    assert pilot == {user: whole[user] for user in pilot}, (
        "a pilot's users are those of the full run"
    )


def test_the_order_of_the_raw_file_is_no_order_of_the_output():
    rows = [(f"u{u}", f"i{i}", 10 * u + i) for u in range(12) for i in range(u % 5, u % 5 + 8)]
    options = {"negatives": 2, "train_negatives": 1}
    assert told(rows, **options)[0] == told(rows[::-1], **options)[0]


def run_real(tmp_path, *options):
    microlens.main(
        [
            "--config",
            "configs/microlens.yaml",
            "--raw_dir",
            str(REAL),
            "--data_dir",
            str(tmp_path),
            "--require_image",
            "false",
            *options,
        ]
    )
    return json.loads((tmp_path / "stats.json").read_text())


@skip_without_real_data
def test_the_real_log_gives_the_papers_number_of_users(tmp_path, monkeypatch):
    """25,411 is the paper's own number (Table 2); every rule is checked on all users."""
    monkeypatch.chdir(Path(__file__).parent.parent)
    stats = run_real(tmp_path)
    assert (stats["users"], stats["items"], stats["interactions"]) == (25411, 11896, 220472)
    users = read_rows(tmp_path / "users.jsonl")
    items = {row["item_id"] for row in read_rows(tmp_path / "items.jsonl")}
    raw = dict(
        line.split("\t") for line in (REAL / "MicroLens-50k_pairs.tsv").read_text().splitlines()
    )
    assert len(users) == 25411
    assert Counter(user["split"] for user in users) == {
        "train": 20329,
        "validation": 2541,
        "test": 2541,
    }
    for user in users:
        whole_log = raw[user["user_id"]].split()
        in_core = [item for item in whole_log if item in items]
        assert [*user["history"], user["target"]] == in_core
        candidates = [user["target"], *user["negatives"]]
        assert len(candidates) == len(set(candidates)) == (2 if user["split"] == "train" else 21)
        assert not set(user["negatives"]) & set(whole_log)
        assert set(user["negatives"]) <= items
        assert user["target"] not in user["history"]


@skip_without_real_data
def test_the_real_log_at_the_released_notebooks_core(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)
    stats = run_real(tmp_path, "--user_core", "7")
    assert (stats["users"], stats["items"], stats["interactions"]) == (14323, 9535, 145835)


@skip_without_real_data
def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)
    bytes_of = {}
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        run_real(tmp_path / name, "--seed", seed, "--limit", "300")
        bytes_of[name] = (tmp_path / name / "users.jsonl").read_bytes()
    assert bytes_of["a"] == bytes_of["b"] != bytes_of["c"]


def test_your_own_files_go_through_and_unusable_rows_are_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)
    raw, data = tmp_path / "raw", tmp_path / "data"
    raw.mkdir()
    rows = [f"u{n % 4},i{(n * 3) % 5},{100 - n}" for n in range(20)]
    (raw / "interactions.csv").write_text(
        "user,item,timestamp\n" + "\n".join([*rows, "u1,nowhere,5", "u1,i1,soon"]) + "\n"
    )
    (raw / "covers").mkdir()
    for n in range(5):
        (raw / "covers" / f"{n}.jpg").write_bytes(b"any file will do here")
    catalogue = [
        f'{{"item_id": "i{n}", "title": "Title {n}", "image": "covers/{n}.jpg"}}' for n in range(5)
    ]
    (raw / "catalogue.jsonl").write_text("\n".join(catalogue) + "\n")
    options = ["--user_core", "2", "--item_core", "1", "--negatives", "0", "--train_negatives", "0"]
    split.main(
        [
            "--config",
            "configs/microlens.yaml",
            "--require_image",
            "true",
            "--raw_dir",
            str(raw),
            "--data_dir",
            str(data),
            *options,
        ]
    )
    users = read_rows(data / "users.jsonl")
    assert len(users) == 4
    by_time = [f"i{(n * 3) % 5}" for n in range(19, -1, -1) if n % 4 == 0]
    assert [*users[0]["history"], users[0]["target"]] == by_time
    assert read_rows(data / "items.jsonl")[2] == {
        "item_id": "i2",
        "title": "Title 2",
        "image": "../raw/covers/2.jpg",
    }
    reasons = {
        row["line"]: row["reason"] for row in read_rows(data / "interactions.rejected.jsonl")
    }
    assert reasons == {
        22: "the item is not in catalogue.jsonl",
        23: "the timestamp is not a number",
    }


def test_everything_filtered_away_is_told_with_the_numbers():
    with pytest.raises(
        InputError,
        match=r"no interaction is left after the filters: 2 read, 0 items without an image, at least 9 per user",
    ):
        told([("u", "a", 1), ("u", "b", 2)], user_core=9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"user_core": 1}, "--user_core must be at least 2"),
        ({"train_fraction": 0.9, "validation_fraction": 0.2}, "leave users for the test"),
        ({"folds": 2, "test_fold": 2}, "--test_fold one of them"),
        ({"folds": 1}, "--folds must be 0 or at least 2"),
    ],
)
def test_options_that_leave_nothing_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        told([("u", "a", 1), ("u", "b", 2)], **options)
