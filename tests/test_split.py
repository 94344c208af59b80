"""The rules of stage 1 on small logs, against brute force, and on the whole real log."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from conftest import REAL, ROOT, skip_without_real_data
from hypothesis import given, settings
from hypothesis import strategies as st

from mllmrec.data import columns
from mllmrec.data.candidates import (
    candidates,
    cold_users,
    item_popularity,
    popularity_scores,
    read_touched,
    read_users,
    redraw_negatives,
    score_row,
)
from mllmrec.data.data_split import SPLITS, SplitOptions, prepare
from mllmrec.data.interactions import InteractionLog, k_core, sample_negatives, split_users
from mllmrec.data.loader import write_data_set
from mllmrec.data.raw_log import NO_TIME
from mllmrec.evaluation.metrics import evaluate, evaluate_groups, of_group
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import encode, read_rows, write_rows
from mllmrec.stage.options import parse_options
from mllmrec.stage.scripts import load_script


def small_log(rows, images=None):
    """(log, catalogue). rows: (user, item, time); images: items that have one, default all."""
    users, items, times = zip(*rows, strict=True)
    names = sorted(set(items))
    catalogue = pd.DataFrame(
        {
            "title": [f"title {n}" for n in names],
            "image": [f"{n}.jpg" if images is None or n in images else None for n in names],
        },
        index=names,
    )
    return InteractionLog.from_ids(users, items, times), catalogue


def prepared(rows, images=None, **options):
    """(PreparedData, SplitOptions) of a small log."""
    small = {"user_core": 2, "item_core": 1, "negatives": 0, "train_negatives": 0}
    options = SplitOptions(**{**small, **options})
    return prepare(*small_log(rows, images), options), options


def split_log(rows, images=None, **options):
    """dict user -> (history, target, negatives, split) of the lines of users.jsonl."""
    data, options = prepared(rows, images, **options)
    return {
        line["user_id"]: (line["history"], line["target"], line["negatives"], line["split"])
        for line in data.lines()
    }


def test_time_order_ties_in_file_order_and_the_last_is_the_target():
    found = split_log([("u", "c", 5), ("u", "a", 1), ("u", "z", 3), ("u", "b", 3)])
    assert found["u"][:2] == (["a", "z", "b"], "c")


def test_of_repeats_the_earliest_is_kept():
    found = split_log([("u", "a", 9), ("u", "b", 2), ("u", "a", 1), ("u", "c", 3)])
    assert found["u"][:2] == (["a", "b"], "c")


def test_items_without_an_image_are_removed_before_the_core():
    rows = [("u", i, n) for n, i in enumerate("abcd")] + [("v", i, n) for n, i in enumerate("abc")]
    data, _ = prepared(rows, images="abc", user_core=3)
    assert set(data.items.index) == set("abc")
    found = split_log(rows, images="abc", user_core=4, require_image=False)
    assert list(found) == ["u"]
    with pytest.raises(
        InputError,
        match="no interaction is left after the filters: 7 read, 1 items without an image",
    ):
        split_log(rows, images="abc", user_core=4)


def test_max_history_keeps_the_latest_and_released_the_most_popular():
    rows = (
        [("u", i, n) for n, i in enumerate("abcdefgh")]
        + [("v", i, n) for n, i in enumerate("bcx")]
        + [("w", "c", 1), ("w", "x", 2)]
    )
    assert split_log(rows, max_history=2)["u"][:2] == (["f", "g"], "h")
    history, target, *_ = split_log(rows, history="released")["u"]
    assert (history, target) == (["a", "b", "c", "d", "e"], "f"), "in the order of time"
    by_popularity = {"history": "released", "released_order": "popularity"}
    history, target, *_ = split_log(rows, **by_popularity)["u"]
    assert (history, target) == (["c", "b", "a", "d", "e"], "f")


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


def test_negatives_come_from_tiny_catalogues_too_or_are_an_error():
    touched = np.arange(5)
    assert sorted(
        sample_negatives(touched, np.array([0]), 25, 20, np.random.default_rng(0))[0]
    ) == list(range(5, 25))
    assert (sample_negatives(touched, np.array([0]), 24, 20, np.random.default_rng(0)) == -1).all()
    rows = [("u", i, n) for n, i in enumerate("abc")] + [("v", "d", 1), ("v", "c", 2)]
    with pytest.raises(
        InputError, match="a user touched so many of the 4 items that 2 negatives cannot be drawn"
    ):
        split_log(rows, train_negatives=2, negatives=2)


def test_negatives_avoid_what_was_touched_outside_the_core_and_the_history():
    """`x` is not in the history of u (max_history), v touched `y`: neither may be offered."""
    rows = (
        [("u", i, n) for n, i in enumerate("xabcd")]
        + [("v", i, n) for n, i in enumerate("yabcd")]
        + [("w", i, n) for n, i in enumerate("zxy")]
    )
    for seed in range(20):
        found = split_log(rows, max_history=2, negatives=1, train_negatives=1, seed=seed)
        assert set(found["u"][2]) <= {"y", "z"}
        assert set(found["v"][2]) <= {"x", "z"}


def test_split_sizes_and_folds():
    split, fold = split_users(1000, (0.8, 0.1), (0, 0), np.random.default_rng(0))
    assert Counter(split) == {"train": 800, "validation": 100, "test": 100}
    assert set(fold) == {-1}
    tests = []
    for test_fold in range(5):
        split, fold = split_users(1003, (0.8, 0.1), (5, test_fold), np.random.default_rng(0))
        assert set(np.flatnonzero(split == "test")) == set(np.flatnonzero(fold == test_fold))
        assert (split == "validation").sum() == 100
        tests.append(np.flatnonzero(split == "test"))
    assert sorted(np.concatenate(tests)) == list(range(1003)), "every user is tested once"


def test_a_pilot_has_users_of_every_split_in_proportion():
    rows = [(f"u{u}", f"i{(u + i) % 40}", i) for u in range(100) for i in range(4)]
    options = {
        "train_fraction": 0.3,
        "validation_fraction": 0.1,
        "negatives": 3,
        "train_negatives": 1,
    }
    data, _ = prepared(rows, limit=20, **options)
    assert data.statistics["written_users"] == {"train": 6, "validation": 2, "test": 12}
    pilot, whole = split_log(rows, limit=20, **options), split_log(rows, **options)
    assert Counter(split for *_, split in pilot.values()) == {
        "train": 6,
        "validation": 2,
        "test": 12,
    }
    assert pilot == {user: whole[user] for user in pilot}, (
        "a pilot's users are those of the full run"
    )
    fewer = split_log(rows, validation_users=1, test_users=5, **options)
    counts = Counter(split for *_, split in whole.values())
    assert Counter(split for *_, split in fewer.values()) == {
        "train": counts["train"],
        "validation": 1,
        "test": 5,
    }
    assert fewer == {user: whole[user] for user in fewer}
    data, _ = prepared(rows, validation_users=1, test_users=5, **options)
    assert len(data.items) == len(prepared(rows, **options)[0].items), "the catalogue stays"


def test_lines_keep_the_times_of_their_items_and_targets():
    rows = [("u", "c", 50), ("u", "a", 10), ("u", "b", 30), ("u", "d", 30)]
    data, _ = prepared(rows, max_history=2)
    [line] = data.lines()
    assert (line["history"], line["times"]) == (["b", "d"], [30, 30])
    assert (line["target"], line["target_time"]) == ("c", 50)
    for order in ("time", "popularity"):
        rows = [(f"u{u}", f"i{i}", 100 * u + i) for u in range(6) for i in range(u, u + 9)]
        data, _ = prepared(rows, history="released", released_order=order)
        known = {(user, item): time for user, item, time in rows}
        for line in data.lines():
            items = [*line["history"], line["target"]]
            times = [known[line["user_id"], item] for item in items]
            assert [*line["times"], line["target_time"]] == times
    log = replace(small_log(rows)[0], has_times=False)
    data = prepare(log, small_log(rows)[1], prepared(rows)[1])
    assert "times" not in next(data.lines())


def test_no_training_line_has_a_cold_item_and_lists_are_all_cold_or_all_known():
    rng = np.random.default_rng(0)
    rows = [
        (f"u{u}", f"i{i}", n) for u in range(300) for n, i in enumerate(rng.permutation(90)[:8])
    ]
    options = {"negatives": 20, "train_negatives": 2, "train_fraction": 0.5}
    data, _ = prepared(rows, cold_items=0.3, **options)
    cold = set(data.item_ids[data.cold])
    assert len(cold) == 27 == data.statistics["cold_items"]
    counts = Counter()
    for line in data.lines():
        listed = {line["target"], *line["negatives"]}
        counts[line["split"], line["cold"]] += 1
        assert line["cold"] == (line["target"] in cold)
        assert listed <= cold if line["cold"] else not listed & cold
        if line["split"] == "train":
            assert not listed & cold and not cold.intersection(line["history"])
            assert len(line["negatives"]) == 2
        else:
            assert len(line["negatives"]) == 20
    assert counts["train", True] == 0 < min(counts["test", True], counts["test", False])
    assert any(cold.intersection(line["history"]) for line in data.lines())
    known = {line["user_id"]: line for line in prepared(rows, **options)[0].lines()}
    for line in data.lines():  # otherwise nothing changes
        assert line["split"] == known[line["user_id"]]["split"]
        kept = [item for item in known[line["user_id"]]["history"] if item not in cold]
        if line["split"] != "train":
            assert line["history"] == known[line["user_id"]]["history"]
        else:
            assert line["history"] == kept[: len(line["history"])]
    data, _ = prepared(rows, cold_items=0.8, **options | {"negatives": 2})
    lines = list(data.lines())
    assert all(line["history"] for line in lines), "a target and at least one item before it"
    assert len(lines) + data.statistics["left_out_users"] == 300 > len(lines)
    wrong = ({"split_by": "released"}, {"history": "released"}, {"negative_sampling": "period"})
    for more in wrong:
        with pytest.raises(InputError, match="--cold_items needs"):
            prepared(rows, cold_items=0.3, **options, **more)


def test_being_known_from_training_tells_nothing_within_a_list(tmp_path):
    """The rule `was it in training` has AUC .5 for known and for new targets; so has chance."""
    rng = np.random.default_rng(3)
    orders = [rng.permutation(90)[:12] for _ in range(400)]
    rows = [(f"u{u}", f"i{i}", n) for u, items in enumerate(orders) for n, i in enumerate(items)]
    data, _ = prepared(rows, cold_items=0.4, negatives=20, train_negatives=1, train_fraction=0.5)
    lines = list(data.lines())
    write_rows(tmp_path / "users.jsonl", lines)
    trained = {
        item
        for line in lines
        if line["split"] == "train"
        for item in (*line["history"], line["target"])
    }
    assert len(trained) == 54
    cold = cold_users(tmp_path / "users.jsonl")
    listed = [(line, *own) for line in lines if line["split"] == "test" for own in candidates(line)]
    for score in (lambda item: float(item in trained), lambda item: rng.random()):
        scored = [score_row(line["user_id"], i, label, score(i)) for line, i, label in listed]
        found = evaluate_groups(scored, cold, "x", resamples=1)
        assert min(found["users_new"], found["users_known"]) > 30
        for group in ("new", "known"):
            own = evaluate(of_group(scored, cold, group), resamples=1)
            assert found[f"hr@5_{group}"] == own["hr@5"]
            assert own["auc_per_user"] == pytest.approx(0.5, abs=0.06)
        if score("i0") in (0, 1):
            assert own["auc_per_user"] == 0.5, "all candidates of a list are alike"


def test_the_order_of_the_raw_file_does_not_change_the_output():
    rows = [(f"u{u}", f"i{i}", 10 * u + i) for u in range(12) for i in range(u % 5, u % 5 + 8)]
    options = {"negatives": 2, "train_negatives": 1}
    assert split_log(rows, **options) == split_log(rows[::-1], **options)


def run_real(tmp_path, *options):
    words = ["--config", "configs/microlens.yaml", "--raw_dir", str(REAL)]
    words += ["--data_dir", str(tmp_path), "--require_image", "false", *options]
    load_script("data_processing/microlens.py").main(words)
    return json.loads((tmp_path / "stats.json").read_text())


@skip_without_real_data
def test_the_real_log_gives_the_papers_number_of_users(tmp_path, monkeypatch):
    """25,411 is the paper's own number (Table 2); every rule is checked on all users."""
    monkeypatch.chdir(ROOT)
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


def test_own_files_are_read_and_rejected_rows_are_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
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
    words = ["--config", "configs/microlens.yaml", "--require_image", "true"]
    words += ["--raw_dir", str(raw), "--data_dir", str(data), "--user_core", "2"]
    words += ["--item_core", "1", "--negatives", "0", "--train_negatives", "0"]
    load_script("data_processing/split.py").main(words)
    users = read_rows(data / "users.jsonl")
    assert len(users) == 4
    by_time = [f"i{(n * 3) % 5}" for n in range(19, -1, -1) if n % 4 == 0]
    assert [*users[0]["history"], users[0]["target"]] == by_time
    assert read_rows(data / "items.jsonl")[2] == {
        "item_id": "i2",
        "title": "Title 2",
        "image": "../raw/covers/2.jpg",
    }
    rejected = read_rows(data / "interactions.rejected.jsonl")
    reasons = {row["line"]: row["reason"] for row in rejected}
    assert reasons == {22: "the item nowhere is not in catalogue.jsonl", 23: NO_TIME}


def load_own(folder, rows, catalogue):
    """What split.py loads from interactions.csv and catalogue.jsonl of these lines."""
    pairs, items = folder / "interactions.csv", folder / "catalogue.jsonl"
    pairs.write_text("\n".join(["user,item,timestamp", *rows]), newline="\n")
    items.write_text("\n".join(catalogue), newline="\n")
    return load_script("data_processing/split.py").load(pairs, items)


CATALOGUE = ['{"item_id": "a", "title": "A", "image": null}', '{"item_id": "b", "title": "B"}']


def test_items_of_own_catalogues_are_checked(tmp_path):
    catalogue = [*CATALOGUE, '{"item_id": " a", "title": "again"}', '{"item_id": "", "title": "x"}']
    catalogue += ['{"item_id": "d", "title": " \\u200b"}', '{"item_id": "e"}', '{"title": "f"}']
    catalogue += ['{"item_id": " c\u00a0", "title": "C", "image": "' + "x" * 5000 + '"}']
    log, items, rejected = load_own(tmp_path, ["u, a,5", " u ,b,4", "u,c,9", "u,d,1"], catalogue)
    assert (log.user_ids.tolist(), log.item_ids.tolist()) == (["u"], ["a", "b", "c"])
    assert items.loc["c"].to_dict() == {"title": "C", "image": None}
    assert [(row["file"], row["line"], row["reason"]) for row in rejected] == [
        ("catalogue.jsonl", 3, "the item has a title already"),
        ("catalogue.jsonl", 4, "the item_id is empty"),
        ("catalogue.jsonl", 5, "the title is empty"),
        ("catalogue.jsonl", 6, "the title is empty"),
        ("catalogue.jsonl", 7, "the item_id is empty"),
        ("interactions.csv", 5, "the item d is not in catalogue.jsonl"),
    ]


def test_images_that_are_not_there_are_counted(tmp_path, caplog):
    images = ("https://x/a.jpg", "images\\\\1.jpg", "catalogue.jsonl")
    catalogue = [
        f'{{"item_id": "{n}", "title": "t", "image": "{i}"}}' for n, i in enumerate(images)
    ]
    _, items, _ = load_own(tmp_path, ["u,0,1"], catalogue)
    assert items["image"].notna().tolist() == [False, False, True]
    assert "2 of its images are not there, the first is 'https://x/a.jpg'" in caplog.text


@pytest.mark.parametrize(
    ("rows", "catalogue", "message"),
    [
        (["u,a,2020-01-01", "u,b,soon"], CATALOGUE, "interactions.csv, line 2: the timestamp is"),
        (["u,x,1", "u,y,2"], CATALOGUE, "line 2: the item x is not in .*; none of the 2 rows can"),
        (["u,a,1", "u,b"], CATALOGUE, "interactions.csv, line 3: too few fields"),
        ([], CATALOGUE, "interactions.csv has no rows"),
        (["u,a,1"], [*CATALOGUE, "[]"], "catalogue.jsonl.* in line 3: Expected OBJECT"),
        (["u,a,1"], [], "catalogue.jsonl is empty"),
        (["u,a,1"], ['{"item_id": "", "title": ""}'], "line 1: the item_id is empty; none of"),
    ],
)
def test_bad_own_files_are_one_sentence(tmp_path, rows, catalogue, message):
    with pytest.raises(InputError, match=message) as caught:
        load_own(tmp_path, rows, catalogue)
    assert "\n" not in str(caught.value)


def test_a_log_without_a_core_is_an_error_with_the_numbers():
    with pytest.raises(
        InputError,
        match="no interaction is left after the filters: 2 read, 0 items without an image, "
        "at least 9 per user",
    ):
        split_log([("u", "a", 1), ("u", "b", 2)], user_core=9)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--user_core 1", "--user_core: Input should be greater than or equal to 2"),
        ("--train_fraction 0.9 --validation_fraction 0.2", "leave users for the test"),
        ("--folds 2 --test_fold 2", "--test_fold one of them"),
        ("--folds 7", "--folds 7 are more than the 6 users"),
        ("--test_fold 1", "--test_fold needs --folds"),
        ("--split_by leave_one_out --user_core 3", "needs --user_core 4 or more"),
        ("--split_by leave_one_out --history released", "needs --history chronological"),
        ("--split_by leave_one_out --folds 5", "leave_one_out cannot be used with --folds"),
        ("--split_by released --train_fraction 0.5", "has fractions of its own"),
    ],
)
def test_options_that_leave_nothing_are_rejected(words, message, tmp_path):
    config = tmp_path / "small.yaml"
    config.write_text("data: {user_core: 4, item_core: 1, negatives: 0, train_negatives: 0}")
    log = small_log([(user, item, n) for user in "uvwxyz" for n, item in enumerate("abcdef")])
    words = ["--config", str(config), *words.split()]
    with pytest.raises(InputError, match=message):
        prepare(*log, parse_options(SplitOptions, "data", words))


def leave_one_out(rows, **options):
    """The lines of users.jsonl with `split_by: leave_one_out`."""
    data, options = prepared(rows, split_by="leave_one_out", **{"user_core": 4, **options})
    return list(data.lines())


def test_leave_one_out_by_hand():
    """Three lines per user: the third last, second last and last item are the targets."""
    rows = [("v", i, n) for n, i in enumerate("dcba")]
    rows += [("u", i, time) for i, time in zip("ebcadb", (50, 20, 30, 10, 40, 60), strict=True)]
    lines = leave_one_out(rows)
    found = [
        (line["user_id"], line["split"], "".join(line["history"]), line["target"]) for line in lines
    ]
    assert found == [
        ("u", "train", "ab", "c"),
        ("u", "validation", "abc", "d"),
        ("u", "test", "abcd", "e"),
        ("v", "train", "d", "c"),
        ("v", "validation", "dc", "b"),
        ("v", "test", "dcb", "a"),
    ]
    assert [line["fold"] for line in lines] == [None] * 6
    last = [line["history"] for line in leave_one_out(rows, max_history=2)][:3]
    assert last == [["a", "b"], ["b", "c"], ["c", "d"]]


@given(
    st.lists(
        st.lists(st.integers(0, 19), min_size=4, max_size=8, unique=True), min_size=1, max_size=8
    ),
    st.integers(0, 3),
    st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_leave_one_out_by_brute_force(sequences, max_history, seed):
    """Every history ends before its target; negatives are distinct, and the user touched none."""
    sequences = dict(enumerate([*sequences, range(10), range(10, 20)]))  # the last two: all items
    rows = [
        (f"{user}", f"{item}", n) for user in sequences for n, item in enumerate(sequences[user])
    ]
    options = {"negatives": 4, "train_negatives": 2, "max_history": max_history, "seed": seed}
    lines = leave_one_out(rows, **options)
    assert [line["split"] for line in lines] == list(SPLITS) * len(sequences)
    assert [line["user_id"] for line in lines] == [str(u) for u in sequences for _ in SPLITS]
    for number, line in enumerate(lines):
        items = [str(item) for item in sequences[int(line["user_id"])]]
        place = len(items) - len(SPLITS) + number % len(SPLITS)
        assert line["target"] == items[place]
        assert line["history"] == items[:place][-max_history or None :]
        assert len(set(line["negatives"])) == len(line["negatives"])
        assert len(line["negatives"]) == (2 if line["split"] == "train" else 4)
        assert not set(line["negatives"]) & set(items)


def test_a_limit_keeps_whole_users_of_a_leave_one_out_split(tmp_path):
    rows = [(f"u{u}", f"i{(u * 7 + n) % 40}", n) for u in range(30) for n in range(5)]
    options = {"negatives": 3, "train_negatives": 1, "data_dir": str(tmp_path), "raw_dir": "."}
    data, pilot = prepared(rows, split_by="leave_one_out", user_core=4, limit=7, **options)
    assert data.statistics["written_users"] == dict.fromkeys(SPLITS, 7)
    write_data_set(data, [], pilot)
    items = data.items
    lines = read_rows(tmp_path / "users.jsonl")
    assert len(lines) == 21
    assert set(Counter(line["user_id"] for line in lines).values()) == {3}
    whole = leave_one_out(rows, **options)
    assert [line for line in whole if line in lines] == lines
    needed = {i for line in lines for i in (*line["history"], line["target"], *line["negatives"])}
    assert set(items.index) == needed == {r["item_id"] for r in read_rows(tmp_path / "items.jsonl")}
    assert len(needed) < 40


def test_popularity_counts_training_lines_of_a_leave_one_out_split_only():
    """The histories of the other lines have targets of validation and test."""
    rows = [("u", i, n) for n, i in enumerate("abcde")] + [
        ("v", i, n) for n, i in enumerate("dcba")
    ]
    lines = leave_one_out(rows)
    assert item_popularity(lines) == {"a": 1, "b": 1, "c": 2, "d": 1}
    assert [(row["user_id"], row["item_id"], row["score"]) for row in popularity_scores(lines)] == [
        ("u", "e", 0.0),
        ("v", "a", 1.0),
    ]


def user_line(user, history, target, split, negatives=()):
    line = {"user_id": user, "history": list(history), "target": target}
    return line | {"negatives": list(negatives), "split": split}


@pytest.mark.parametrize(("sampling", "expected"), [("uniform", 0.13), ("popularity", 0.39)])
def test_redrawn_negatives_are_unseen_and_as_frequent_as_their_kind_says(sampling, expected):
    """200 users, half of all interactions with 10 of 60 items; targets and other splits stay."""
    rng = np.random.default_rng(0)
    share = np.repeat([0.05, 0.01], [10, 50])
    lines = []
    for number in range(200):
        *history, target = (f"i{k}" for k in rng.choice(60, 5, replace=False, p=share / sum(share)))
        split = "test" if number % 2 else "train"
        lines.append(user_line(f"u{number}", history, target, split, ["i0"] * 8))
    had = {line["user_id"]: ["i0", "i59", "elsewhere"] for line in lines}
    items = {f"i{n}" for n in range(60)} | {"i60"}  # in no line
    redrawn = redraw_negatives(lines, items, had, sampling, seed=1)
    assert redrawn == redraw_negatives(lines, items, had, sampling, seed=1)
    drawn = {item for line in redrawn if line["split"] == "test" for item in line["negatives"]}
    assert ("i60" in drawn) == (sampling == "uniform"), "items of a pilot's other users"
    popular = 0
    for before, after in zip(lines, redrawn, strict=True):
        assert {**after, "negatives": []} == {**before, "negatives": []}
        if before["split"] == "train":
            assert after == before
            continue
        assert len(set(after["negatives"])) == 8
        touched = {*before["history"], before["target"], *had[before["user_id"]]}
        assert not touched & set(after["negatives"])
        popular += sum(int(item[1:]) < 10 for item in after["negatives"])
    assert popular / 800 == pytest.approx(expected, abs=0.06)


@pytest.mark.parametrize(
    "more", [{"max_history": 2}, {"limit": 5}, {"history": "released", "item_core": 2}]
)
def test_touched_lines_hold_all_that_a_test_user_had(more):
    rows = [(f"u{n}", f"i{(n * k) % 17}", k) for n in range(1, 12) for k in range(1, 9)]
    data, _ = prepared(rows, train_fraction=0.4, **more)
    read = [json.loads(line) for part in data.touched_lines() for line in part.splitlines()]
    lines, touched = list(data.lines()), {row["user_id"]: row["item_ids"] for row in read}
    assert set(touched) == {line["user_id"] for line in lines if line["split"] == "test"} != set()
    core = set(data.item_ids)
    for user, items in touched.items():
        assert sorted(items) == sorted(core & {item for u, item, _ in rows if u == user})


def test_columns_become_the_lines_that_json_writes(monkeypatch):
    monkeypatch.setattr(columns, "LINES", 3)
    texts = ["a", "b\n\u2028é", 'q"', None, "\\x", "\x01\x7f", "", "ü\t"]
    lists = [texts[:2], [], texts[2:3], *[[]] * 4, texts[3:]]
    encoded = columns.encoded(texts)
    ends = np.cumsum([len(own) for own in lists])
    lines = columns.json_lines(x=encoded, y=columns.encoded_lists(encoded, ends))
    rows = [{"x": text, "y": own} for text, own in zip(texts, lists, strict=True)]
    assert b"".join(lines) == b"".join(map(encode, rows))


def test_touched_lines_of_other_users_are_refused(tmp_path):
    write_rows(tmp_path / "touched.jsonl", [{"user_id": "u", "item_ids": ["a", "b", "x"]}])
    assert read_touched(tmp_path / "touched.jsonl", [user_line("u", "a", "b", "test")])["u"]
    for line in (user_line("v", "a", "b", "test"), user_line("u", "ac", "b", "test")):
        with pytest.raises(InputError, match=r"touched.jsonl lacks items of user '[uv]' in users"):
            read_touched(tmp_path / "touched.jsonl", [line])


LEAVE_ONE_OUT = [
    user_line("u", "a", "b", "train"),
    user_line("u", "ab", "c", "validation"),
    user_line("u", "bc", "d", "test"),  # max_history 2
]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([user_line("u", "ab", "a", "test")], "line 1: the target 'a' of user 'u' is in its hist"),
        ([user_line("u", "ab", "c", "test", "b")], "line 1: the negative 'b' of user 'u' is in"),
        ([*LEAVE_ONE_OUT[:2], user_line("v", "a", "b", "test")], r"of user 'u' \(train, valid"),
        ([*LEAVE_ONE_OUT, user_line("v", "a", "b", "test")], r"lines of user 'v' \(test\) do not"),
        ([*LEAVE_ONE_OUT[:2], user_line("u", "b", "d", "test")], "user 'u' .* whose history con"),
    ],
)
def test_lines_that_do_not_fit_their_user_are_refused(tmp_path, lines, message):
    path = tmp_path / "users.jsonl"
    write_rows(path, [{**line, "fold": None} for line in LEAVE_ONE_OUT])
    assert len(read_users(path)) == 3
    write_rows(path, [{**line, "fold": None} for line in lines])
    with pytest.raises(InputError, match=message):
        read_users(path)


def test_ties_in_time_are_counted_and_their_order_is_drawn_on_request():
    rows = [(f"u{n}", f"i{k}", k // 2) for n in range(6) for k in range(5)]
    options = {"split_by": "leave_one_out", "user_core": 5}
    statistics = prepared(rows, **options)[0].statistics
    names = ("tied_interactions", "tied_test_targets", "test_targets")
    assert [statistics[name] for name in names] == [12, 0, 6]

    def orders(rows, **more):
        lines = prepared(rows, **options, **more)[0].lines()
        return [[*line["history"], line["target"]] for line in lines if line["split"] == "test"]

    drawn = orders(rows, ties="hash")
    assert drawn == orders(rows[::-1], ties="hash") != orders(rows, ties="hash", seed=1)
    assert orders(rows[::-1]) != orders(rows) != drawn
    assert len({tuple(order) for order in drawn}) > 1
    assert all({*o[:2]} == {"i0", "i1"} and {*o[2:4]} == {"i2", "i3"} for o in drawn)


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([0] * 6, "the interactions of 5 of 5 users, as 'u0', all have one time"),
        ([4, 5, 4, 3, 5, 4], "the times have only 3 different values, as ratings have"),
    ],
)
def test_times_that_are_none_are_refused(times, message):
    rows = [(f"u{n}", f"i{k}", time) for n in range(5) for k, time in enumerate(times)]
    options = {"train_fraction": 0.6}
    with pytest.raises(InputError, match=message):
        prepared(rows, **options)
    if not any(times):
        assert len(prepared(rows, ties="hash", **options)[0].target) == 5
        other = [(f"w{n}", f"i{k}", k + 20) for n in range(5) for k in range(12)]
        assert prepared(rows + other, **options)[0].statistics["users_with_one_time"] == 5


def test_popularity_of_a_split_by_user_counts_histories_and_training_targets():
    lines = [user_line("u", "ab", "c", "train"), user_line("v", "ac", "d", "validation")]
    lines.append(user_line("w", "c", "a", "test"))
    assert item_popularity(lines) == {"a": 2, "b": 1, "c": 3}
    assert [row["score"] for row in popularity_scores(lines)] == [2.0]


def test_negatives_of_the_period_are_items_that_others_had_at_the_time_of_the_target(monkeypatch):
    """Two eras of 40 users and 60 items each; a user of one era never had an item of the other."""
    monkeypatch.setattr("mllmrec.data.interactions.PERIOD", 60)
    rng = np.random.default_rng(0)
    rows = [
        (f"u{user}", f"{'old' if user < 40 else 'new'}{item}", 1000 * (user >= 40) + n)
        for user in range(80)
        for n, item in enumerate(rng.choice(60, 8, replace=False))
    ]
    common = {"user_core": 6, "negatives": 10, "train_negatives": 5}
    found = split_log(rows, negative_sampling="period", **common)
    for user, (history, target, negatives, split) in found.items():
        own_era = target[:3]
        assert len(set(negatives)) == (5 if split == "train" else 10)
        assert {item[:3] for item in negatives} == {own_era}, user
        assert not {*history, target} & set(negatives)
    uniform = split_log(rows, **common)
    assert any({i[:3] for i in own[2]} == {"old", "new"} for own in uniform.values())


def test_negatives_of_the_period_reach_further_where_the_user_had_what_is_near(monkeypatch):
    monkeypatch.setattr("mllmrec.data.interactions.PERIOD", 2)
    rows = [("u", f"i{n}", n) for n in range(12)] + [("v", f"j{n}", 100 + n) for n in range(12)]
    found = split_log(rows, negative_sampling="period", negatives=10, train_negatives=10)
    assert all(item.startswith("j") for item in found["u"][2])
    with pytest.raises(InputError, match="that 13 negatives cannot be drawn"):
        split_log(rows, negative_sampling="period", negatives=13, train_negatives=13)
    with pytest.raises(InputError, match="period needs --history chronological"):
        split_log(rows, negative_sampling="period", history="released")
