"""Metrics against hand-worked cases, scikit-learn and brute force over tie patterns."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from data_processing.errors import InputError
from data_processing.metrics import aggregate, evaluate, per_user, pooled_auc


def rows_of(scores):
    """scores: one list per user, the positive first."""
    return [
        {"user_id": f"u{u}", "item_id": f"i{i}", "label": int(i == 0), "score": float(s)}
        for u, line in enumerate(scores)
        for i, s in enumerate(line)
    ]


def test_hand_worked_ranks():
    # Ranks of the positive: 1, 3 and 6 of 7.
    found = evaluate(
        rows_of([[9, 1, 2, 3, 4, 5, 6], [5, 6, 7, 1, 1, 2, 2], [1, 2, 3, 4, 5, 6, 0]]), resamples=5
    )
    assert found["hr@3"] == pytest.approx(2 / 3)
    assert found["hr@5"] == pytest.approx(2 / 3)
    assert found["hr@10"] == 1.0
    assert found["mrr@5"] == pytest.approx((1 + 1 / 3) / 3)
    assert found["mrr@10"] == pytest.approx((1 + 1 / 3 + 1 / 6) / 3)
    assert found["ndcg@5"] == pytest.approx((1 + 1 / math.log2(4)) / 3)
    assert found["auc_per_user"] == pytest.approx((1 + 4 / 6 + 1 / 6) / 3)
    assert found["users"] == 3


def test_constant_scorer_is_chance():
    found = evaluate(rows_of([[0.3] * 21] * 4), resamples=5)
    assert found["auc"] == pytest.approx(0.5, abs=1e-9)
    for k in (3, 5, 10):
        assert found[f"hr@{k}"] == pytest.approx(k / 21, abs=1e-9)


def test_auc_is_scikit_learns():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 6, size=(30, 21)).astype(float)
    found = evaluate(rows_of(scores.tolist()), resamples=5)
    labels = np.zeros(scores.shape)
    labels[:, 0] = 1
    assert abs(found["auc"] - roc_auc_score(labels.ravel(), scores.ravel())) < 1e-12
    assert (
        abs(
            found["auc_per_user"]
            - np.mean([roc_auc_score(a, b) for a, b in zip(labels, scores, strict=True)])
        )
        < 1e-12
    )


@given(st.lists(st.integers(0, 2), min_size=2, max_size=6))
@settings(max_examples=60, deadline=None)
def test_ties_are_the_mean_over_all_orders(line):
    """Every order of the tied candidates, worked out one by one."""
    values = {"hr@3": [], "mrr@3": [], "ndcg@3": []}
    for order in itertools.permutations(range(len(line))):
        ranked = sorted(order, key=lambda i: -line[i])  # stable: ties stay in the permuted order
        rank = ranked.index(0) + 1
        values["hr@3"].append(float(rank <= 3))
        values["mrr@3"].append(1 / rank if rank <= 3 else 0.0)
        values["ndcg@3"].append(1 / math.log2(rank + 1) if rank <= 3 else 0.0)
    found = per_user(np.array([line], dtype=float))
    for name, brute in values.items():
        assert found[name][0] == pytest.approx(np.mean(brute), abs=1e-12)


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=4, max_size=4), min_size=2, max_size=6),
    st.randoms(),
)
@settings(max_examples=40, deadline=None)
def test_order_of_lines_changes_nothing(scores, random):
    rows = rows_of(scores)
    before = evaluate(rows, resamples=20)
    random.shuffle(rows)
    assert evaluate(rows, resamples=20) == before


def test_bootstrap_interval_is_that_of_scikit_learn_on_the_same_draws():
    rng = np.random.default_rng(1)
    scores = rng.integers(0, 8, size=(25, 6)).astype(float)
    found = evaluate(rows_of(scores.tolist()), resamples=50, seed=3)
    lists = scores[np.argsort([f"u{u}" for u in range(25)])]  # users in the order of their ids
    lists = np.concatenate([lists[:, :1], lists[:, 1:]], axis=1)
    draws, again = [], np.random.default_rng(3)
    for _ in range(50):
        drawn = lists[again.integers(0, 25, 25)]
        labels = np.zeros(drawn.shape)
        labels[:, 0] = 1
        draws.append(roc_auc_score(labels.ravel(), drawn.ravel()))
    assert found["auc_ci95"] == pytest.approx(np.percentile(draws, [2.5, 97.5]).tolist(), abs=1e-12)


def test_interval_covers_the_truth():
    """Scores with a known AUC: about 95 of 100 intervals hold it (bootstrap over users, users independent)."""
    rng = np.random.default_rng(5)
    truth, covered = (
        0.5 * (1 + math.erf(0.5)),
        0,
    )  # positives N(1,1), negatives N(0,1): P(pos > neg) = Phi(1/sqrt 2)
    for trial in range(40):
        scores = rng.normal(size=(60, 6))
        scores[:, 0] += 1
        low, high = evaluate(rows_of(scores.tolist()), resamples=200, seed=trial)["auc_ci95"]
        covered += low <= truth <= high
    assert covered >= 33


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.pop(), "user 'u1' has 1 positives and 1 negatives in place of 1 and 2"),
        (lambda rows: rows.append(dict(rows[-1])), "user 'u1' has the candidate 'i2' twice"),
        (lambda rows: rows[-1].update(label=None), "user 'u1', item 'i2' has the label None"),
        (lambda rows: rows[-1].update(label=1), "user 'u1' has 2 positives"),
        (
            lambda rows: rows[-1].update(score=float("nan")),
            "user 'u1', item 'i2' has the score nan",
        ),
    ],
)
def test_a_broken_list_is_an_error_that_names_the_user(change, message):
    rows = rows_of([[3, 1, 2], [3, 1, 2]])
    change(rows)
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        evaluate(rows, resamples=2)


def test_no_scores_is_an_error():
    with pytest.raises(InputError, match="holds no scores"):
        evaluate([])


def test_aggregate_is_mean_and_students_interval():
    runs = [
        {"auc": a, "auc_ci95": [0, 1], "users": 10, "candidates": 21} for a in (0.8, 0.82, 0.87)
    ]
    found = aggregate(runs)
    assert found["auc"] == pytest.approx(0.83)
    half = 4.302652729 * np.std([0.8, 0.82, 0.87], ddof=1) / np.sqrt(3)
    assert found["auc_ci95"] == pytest.approx([0.83 - half, 0.83 + half], abs=1e-6)
    assert (found["users"], found["runs"]) == (30, 3)


def test_pooled_and_per_user_auc_differ_where_users_differ_in_level():
    """A user-constant shift leaves each user's ranking alone but moves the pooled AUC: the paper's is the pooled one."""
    scores = np.array([[1.0, 0.0, 0.0], [11.0, 10.0, 10.0]])
    labels = np.array([[1, 0, 0], [1, 0, 0]])
    assert per_user(scores)["auc_per_user"].mean() == 1.0
    assert pooled_auc(scores, labels) == pytest.approx(6 / 8)
