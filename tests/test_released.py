"""The released code's lists, split and negatives, against a re-implementation from the facts.

The facts are those of docs/fidelity.md: six most popular items of a user, the last of them is the
target; `train_test_split` with seed 42 over users in the order of their first interaction.
"""

from collections import Counter

import numpy as np
import pandas as pd
import pytest
from conftest import REAL, ROOT, skip_without_real_data
from sklearn.model_selection import train_test_split

from mllmrec.data.candidates import candidates, score_row
from mllmrec.data.data_split import SplitOptions, prepare
from mllmrec.data.interactions import sample_negatives
from mllmrec.evaluation.metrics import evaluate
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import read_rows
from mllmrec.stage.scripts import load_script

MICROLENS = "data_processing/microlens.py"
PLAIN_USERS = 300  # of the 25,411 in the plain suite


@pytest.fixture(scope="module")
def real_log():
    """(InteractionLog, catalogue) of MicroLens-50k."""
    stage = load_script(MICROLENS)
    log, catalogue, _ = stage.load(*stage.find_files(REAL, ""))
    return log, catalogue


def real_lines(real_log, **options):
    chosen = SplitOptions(config="", require_image=False, history="released", **options)
    return list(prepare(*real_log, chosen).lines())


@pytest.fixture(scope="module")
def core_frame(real_log):
    """The (6, 5) core as a DataFrame of user, item and time, by plain pandas."""
    log, _ = real_log
    frame = pd.DataFrame({"user": log.user_ids[log.user], "item": log.item_ids[log.item]})
    frame["time"] = log.time
    while True:
        users, items = frame["user"].value_counts(), frame["item"].value_counts()
        kept = frame[frame["user"].map(users).ge(6) & frame["item"].map(items).ge(5)]
        if len(kept) == len(frame):
            return frame
        frame = kept


@skip_without_real_data
@pytest.mark.parametrize("order", ["time", "popularity"])
@pytest.mark.parametrize("users", [PLAIN_USERS, pytest.param(None, marks=pytest.mark.slow)])
def test_released_lists_equal_a_re_implementation(real_log, core_frame, order, users):
    """Up to ties in popularity."""
    popularity = core_frame.groupby("item").size()
    lines = real_lines(real_log, released_order=order)
    assert len(lines) == 25411
    lines = lines[:users]
    frame = core_frame[core_frame["user"].isin([line["user_id"] for line in lines])]
    by_user = dict(iter(frame.groupby("user")))
    for line in lines:
        own = by_user[line["user_id"]].sort_values("time", kind="stable")
        counts = own["item"].map(popularity).sort_values(ascending=False)
        listed = [*line["history"], line["target"]]
        assert len(listed) == len(set(listed)) == 6
        assert sorted(popularity[listed], reverse=True) == list(counts[:6])
        if order == "popularity":
            assert list(popularity[listed]) == list(counts[:6])
        else:
            assert own.set_index("item")["time"][listed].is_monotonic_increasing
        assert not set(line["negatives"]) & set(own["item"])


def auc_and_hits(lines, popularity):
    """Metrics of the candidates' popularity as a score."""
    candidate_lists = ((line, item, label) for line in lines for item, label in candidates(line))
    rows = [
        score_row(u["user_id"], i, label, float(popularity[i])) for u, i, label in candidate_lists
    ]
    return evaluate(rows, resamples=1)


@pytest.mark.slow
@skip_without_real_data
@pytest.mark.parametrize(
    ("order", "auc", "hr"), [("time", 0.783, 0.635), ("popularity", 0.562, 0.289)]
)
def test_popularity_alone_on_released_lists_is_near_the_facts(real_log, core_frame, order, auc, hr):
    """Measured on the authors' own lists, whose negatives were drawn without a seed."""
    lines = real_lines(real_log, released_order=order, train_negatives=20)
    metrics = auc_and_hits(lines, core_frame.groupby("item").size())
    assert metrics["users"] == 25411
    assert metrics["auc_per_user"] == pytest.approx(auc, abs=0.004)
    assert metrics["hr@5"] == pytest.approx(hr, abs=0.006)


def raw_folder(folder, with_times=True):
    """40 users with eight items each, whose first interactions are in an order of their own."""
    rng = np.random.default_rng(0)
    rows = [
        (f"u{u}", f"i{i}", int(t))
        for u in range(40)
        for i, t in zip(rng.permutation(30)[:8], rng.permutation(10_000)[:8], strict=True)
    ]
    folder.mkdir()
    frame = pd.DataFrame(rows, columns=["user", "item", "timestamp"])
    if with_times:
        frame.to_csv(folder / "Small_pairs.csv", index=False)
    else:
        lists = frame.groupby("user", sort=False)["item"].agg(" ".join)
        lists.to_csv(folder / "Small_pairs.tsv", sep="\t", header=False)
    titles = "".join(f"i{n},title {n}\n" for n in range(30))
    (folder / "Small_titles.csv").write_text(titles)
    return frame


def stage_1(tmp_path, *words):
    options = ["--config", "configs/microlens.yaml", "--raw_dir", str(tmp_path / "raw")]
    options += ["--data_dir", str(tmp_path / "data"), "--require_image", "false"]
    load_script(MICROLENS).main([*options, "--item_core", "2", "--split_by", "released", *words])
    return read_rows(tmp_path / "data" / "users.jsonl")


def test_the_released_split_is_train_test_split_over_users_by_first_interaction(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(ROOT)
    frame = raw_folder(tmp_path / "raw")
    lines = stage_1(tmp_path, "--history", "released", "--negatives", "5")
    users = frame.sort_values("timestamp", kind="stable")["user"].unique()
    for name, expected in zip(("train", "validation", "test"), released_split(users), strict=True):
        found = [line["user_id"] for line in lines if line["split"] == name]
        assert found == list(expected), "in its shuffled order"
    assert Counter(line["split"] for line in lines) == {"train": 32, "validation": 4, "test": 4}
    again = stage_1(tmp_path, "--history", "released", "--negatives", "5", "--seed", "7")
    assert [line["user_id"] for line in again] != [line["user_id"] for line in lines]
    # The sizes of the saved outputs.
    assert [len(part) for part in released_split(np.arange(25411))] == [20328, 2541, 2542]


def released_split(users):
    """(train, validation, test) as the released code has it."""
    train, rest = train_test_split(np.array(users), test_size=0.2, random_state=42)
    return [train, *train_test_split(rest, test_size=0.5, random_state=42)]


def test_sequences_without_times_have_no_released_split(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    raw_folder(tmp_path / "raw", with_times=False)
    with pytest.raises(InputError, match=r"has no timestamps.*give Small_pairs.csv"):
        stage_1(tmp_path)


def test_weighted_negatives_are_drawn_in_proportion_to_popularity_without_replacement():
    weights, touched = np.array([0, 1, 2, 5, 50, 2]), np.array([4], dtype=np.int64)
    counts = np.zeros(6)
    for seed in range(3000):
        rng = np.random.default_rng(seed)
        (drawn,) = sample_negatives(touched, np.array([0]), 6, 1, rng, weights)
        counts[drawn] += 1
    # The first has no weight, the fifth was touched.
    assert counts / 3000 == pytest.approx([0, 0.1, 0.2, 0.5, 0, 0.2], abs=0.03)
    assert counts[0] == counts[4] == 0
    rng = np.random.default_rng(0)
    drawn = sample_negatives(touched, np.zeros(50, dtype=int), 6, 4, rng, weights)
    assert all(sorted(row) == [1, 2, 3, 5] for row in drawn.tolist())


@skip_without_real_data
def test_popularity_alone_no_longer_ranks_among_weighted_negatives(real_log):
    found = {}
    for sampling in ("uniform", "popularity"):
        options = SplitOptions(config="", require_image=False, negative_sampling=sampling)
        data = prepare(*real_log, options)
        counts = dict(zip(data.item_ids, data.popularity, strict=True))
        lines = [line for line in data.lines() if line["split"] == "test"]
        assert [len(line["negatives"]) for line in lines] == [20] * 2541
        found[sampling] = auc_and_hits(lines, counts)["auc_per_user"]
    assert found["uniform"] > 0.65
    assert 0.4 < found["popularity"] < 0.55


@skip_without_real_data
def test_a_thousand_negatives_can_be_drawn(real_log):
    options = SplitOptions(config="", require_image=False, negatives=1000, limit=200)
    lines = prepare(*real_log, options).lines()
    n_negatives = [len(set(line["negatives"])) for line in lines if line["split"] == "test"]
    assert set(n_negatives) == {1000}
