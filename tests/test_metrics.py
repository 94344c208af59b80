"""Metrics against cases by hand, scikit-learn and brute force over ties and list lengths."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from mllmrec.evaluation.metrics import CandidateLists, aggregate, evaluate, per_user
from mllmrec.evaluation.paired import Scored, paired_differences
from mllmrec.stage.errors import InputError


def rows_of(scores):
    """scores: one list per user, the positive first."""
    return [
        {"user_id": f"u{u}", "item_id": f"i{i}", "label": int(i == 0), "score": float(s)}
        for u, line in enumerate(scores)
        for i, s in enumerate(line)
    ]


def test_ranks_by_hand():
    # Ranks of the positive: 1, 3 and 6 of 7.
    rows = rows_of([[9, 1, 2, 3, 4, 5, 6], [5, 6, 7, 1, 1, 2, 2], [1, 2, 3, 4, 5, 6, 0]])
    found = evaluate(rows, resamples=5)
    assert found["hr@3"] == found["hr@5"] == pytest.approx(2 / 3)
    assert found["hr@10"] == 1.0
    assert found["mrr@5"] == pytest.approx((1 + 1 / 3) / 3)
    assert found["mrr@10"] == pytest.approx((1 + 1 / 3 + 1 / 6) / 3)
    assert found["ndcg@5"] == pytest.approx((1 + 1 / math.log2(4)) / 3)
    assert found["auc_per_user"] == pytest.approx((1 + 4 / 6 + 1 / 6) / 3)
    assert found["users"] == 3


def scored(matrix):
    return Scored.of(rows_of(matrix))


def test_a_paired_difference_is_that_of_the_metrics_and_its_interval_is_narrower():
    """One user's list is as hard for both variants, so the difference varies less than they do."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=(120, 21))
    a[:, 0] += rng.normal(1, 2, 120)
    b = a + rng.normal(0, 0.1, a.shape)
    b[:, 0] += 0.4
    found = paired_differences([(scored(b), scored(a))], resamples=200)
    metrics = [evaluate(rows_of(m), resamples=200) for m in (b, a)]
    for name, difference in found.items():
        assert difference.value == pytest.approx(metrics[0][name] - metrics[1][name], abs=1e-9)
        assert difference.low <= difference.value <= difference.high
    low, high = metrics[0]["auc_ci95"]
    assert found["auc"].high - found["auc"].low < (high - low) / 2
    assert found["auc"].is_real
    same = paired_differences([(scored(a), scored(a))], resamples=50)
    assert not any(difference.is_real for difference in same.values())
    assert {(d.value, d.low, d.high) for d in same.values()} == {(0.0, 0.0, 0.0)}


def test_a_difference_that_changes_sign_between_seeds_is_not_real():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(60, 21))
    up, down = a.copy(), a.copy()
    up[:, 0] += 2
    down[:, 0] -= 1
    pairs = [(scored(up), scored(a)), (scored(down), scored(a)), (scored(up), scored(a))]
    found = paired_differences(pairs, resamples=100)["auc"]
    assert found.low > 0, "the users' bootstrap alone would call it real"
    assert found.seeds_low < 0 < found.seeds_high
    assert not found.is_real


def test_retrieved_lists_of_two_variants_are_compared_user_by_user():
    """The lists differ in items and length, and some lack the target; the users are the same."""
    rows = rows_of([[3, 2, 1], [1, 2, 3], [0, 5, 4]])
    short = [row for row in rows if (row["user_id"], row["item_id"]) != ("u2", "i0")]
    long = [row | {"item_id": f"x{row['item_id']}"} for row in rows_of([[3, 2, 1, 0, -1]] * 3)]
    pair = [Scored.of(rows, retrieved=True) for rows in (long, short)]
    found = paired_differences([tuple(pair)], resamples=50)
    assert "auc" not in found and "auc_per_user" not in found
    means = [evaluate(rows, resamples=1, retrieved=True) for rows in (long, short)]
    assert found["hr@3"].value == pytest.approx(means[0]["hr@3"] - means[1]["hr@3"])
    assert found["hr@3"].value > 0
    assert found["ndcg@3"].value == pytest.approx(means[0]["ndcg@3"] - means[1]["ndcg@3"])
    fewer = Scored.of([row for row in long if row["user_id"] != "u0"], retrieved=True)
    with pytest.raises(InputError, match="did not score the same candidates"):
        paired_differences([(pair[1], fewer)], resamples=50)


def with_logits(scores, logits):
    """Lines of one user, ranked by (logit of No, logit of Yes); `scores` are the p(yes)."""
    both = [{"logits": {"No": float(no), "Yes": float(yes)}} for no, yes in logits]
    return [{**row, **pair} for row, pair in zip(rows_of([scores]), both, strict=True)]


def test_saturated_probabilities_are_ranked_by_their_logits():
    """Three of four p(yes) are 1; scores that are not those of the logits are taken as they are."""
    logits = [(-20, 20), (-20, 19), (-20, 18), (0, -5)]
    saturated = with_logits([1.0, 1.0, 1.0, 0.0066928509], logits)
    assert evaluate(saturated)["auc"] == 1.0
    without = [{**row, "logits": None} for row in saturated[:1]] + saturated[1:]
    assert evaluate(without)["auc"] == pytest.approx(2 / 3), "one has no logits: all by p(yes)"
    assert evaluate(with_logits([0.1, 0.2, 0.3, 0.4], logits))["auc"] == 0.0, "other scores"


@pytest.mark.parametrize(("users", "resamples"), [(1, 100), (3, 1), (3, 2)])
def test_one_user_or_one_resample_has_no_interval(users, resamples):
    found = evaluate(rows_of([[3, 1, 2]] * users), resamples=resamples)
    assert ("auc_ci95" in found) == (users > 1 and resamples > 1)
    if resamples == 1:
        with pytest.raises(InputError, match="needs at least 2 resamples, not 1"):
            paired_differences([(scored([[3, 1]]), scored([[3, 1]]))], resamples)


def test_variants_with_other_candidates_are_not_compared():
    rows = rows_of([[1, 0, 0], [0, 1, 0]])
    other = [{**row, "item_id": row["item_id"] + "x"} for row in rows]
    with pytest.raises(InputError, match="did not score the same candidates"):
        paired_differences([(Scored.of(rows), Scored.of(other))])


def test_constant_scorer_is_chance():
    found = evaluate(rows_of([[0.3] * 21] * 4), resamples=5)
    assert found["auc"] == pytest.approx(0.5, abs=1e-9)
    for k in (3, 5, 10):
        assert found[f"hr@{k}"] == pytest.approx(k / 21, abs=1e-9)


def test_auc_is_scikit_learns():
    scores = np.random.default_rng(0).integers(0, 6, size=(30, 21)).astype(float)
    found = evaluate(rows_of(scores.tolist()), resamples=5)
    labels = np.zeros(scores.shape)
    labels[:, 0] = 1
    assert abs(found["auc"] - roc_auc_score(labels.ravel(), scores.ravel())) < 1e-12
    per_user = np.mean([roc_auc_score(a, b) for a, b in zip(labels, scores, strict=True)])
    assert abs(found["auc_per_user"] - per_user) < 1e-12


def over_all_orders(line, k=3):
    """(hr@k, mrr@k, ndcg@k) of the target, line[0]: the mean over all orders of the candidates."""
    values = []
    for order in itertools.permutations(range(len(line))):
        ranked = sorted(order, key=lambda i: -line[i])  # stable: ties stay in the permuted order
        rank = ranked.index(0) + 1
        values.append((1.0, 1 / rank, 1 / math.log2(rank + 1)) if rank <= k else (0.0, 0.0, 0.0))
    return np.mean(values, axis=0)


@given(st.lists(st.integers(0, 2), min_size=2, max_size=6))
@settings(max_examples=60, deadline=None)
def test_ties_are_the_mean_over_all_orders(line):
    """Every order of the tied candidates, one by one."""
    found = per_user(CandidateLists.of_matrix(np.array([line], dtype=float)))
    for name, brute in zip(("hr@3", "mrr@3", "ndcg@3"), over_all_orders(line), strict=True):
        assert found[name][0] == pytest.approx(brute, abs=1e-12)


@given(st.lists(st.lists(st.integers(0, 3), min_size=4, max_size=4), min_size=2), st.randoms())
@settings(max_examples=40, deadline=None)
def test_order_of_lines_changes_nothing(scores, random):
    rows = rows_of(scores)
    before = evaluate(rows, resamples=20)
    random.shuffle(rows)
    assert evaluate(rows, resamples=20) == before


BROKEN = [
    (lambda rows: rows.pop(), "user 'u1' has 1 positives and 1 negatives instead of 1 and 2"),
    (lambda rows: rows.append(dict(rows[-1])), "user 'u1' has the candidate 'i2' twice"),
    (lambda rows: rows[-1].update(label=None), "user 'u1', item 'i2' has the label None"),
    (lambda rows: rows[-1].update(label=1), "user 'u1' has 2 positives"),
    (lambda rows: rows[-1].update(score=math.nan), "user 'u1', item 'i2' has the score nan"),
    (lambda rows: rows.clear(), "holds no scores"),
]


@pytest.mark.parametrize(("change", "message"), BROKEN)
def test_a_broken_list_is_an_error_that_names_the_user(change, message):
    rows = rows_of([[3, 1, 2], [3, 1, 2]])
    change(rows)
    with pytest.raises(InputError, match=message):
        evaluate(rows, resamples=2)


def test_aggregate_is_mean_and_students_interval():
    aucs, fixed = (0.8, 0.82, 0.87), {"auc_ci95": [0, 1], "users": 10, "candidates": 21}
    found = aggregate([{"auc": auc, **fixed} for auc in aucs])
    assert found["auc"] == pytest.approx(0.83)
    half = 4.302652729 * np.std(aucs, ddof=1) / np.sqrt(3)
    assert found["auc_ci95"] == pytest.approx([0.83 - half, 0.83 + half], abs=1e-6)
    assert (found["users"], found["runs"]) == (30, 3)


def without_target(rows, *users):
    """`rows` without the targets of the named users."""
    return [row for row in rows if row["user_id"] not in users or row["label"] == 0]


LIST = st.lists(st.integers(0, 2), min_size=1, max_size=5)
RETRIEVED = st.lists(st.tuples(LIST, st.booleans()), min_size=1, max_size=6)


@given(RETRIEVED)
@settings(max_examples=80, deadline=None)
def test_retrieved_lists_are_as_by_brute_force(drawn):
    """Lists of any length, some without target: a miss for all but AUC, which leaves them out."""
    lists = [line for line, _ in drawn]
    missing = [n for n, (line, has_target) in enumerate(drawn) if not has_target and len(line) > 1]
    with_target = [line for n, line in enumerate(lists) if n not in missing]
    assume(any(len(line) > 1 for line in with_target))  # else there is no AUC
    rows = without_target(rows_of(lists), *(f"u{n}" for n in missing))
    found = evaluate(rows, resamples=3, retrieved=True)
    missed = (0.0, 0.0, 0.0)
    ranked = [missed if n in missing else over_all_orders(line) for n, line in enumerate(lists)]
    means = np.mean(ranked, axis=0)
    assert [found["hr@3"], found["mrr@3"], found["ndcg@3"]] == pytest.approx(means, abs=1e-12)
    assert (found["auc"], found["auc_per_user"]) == pytest.approx(aucs(with_target), abs=1e-12)
    assert (found["users"], found["auc_users"]) == (len(lists), len(with_target))
    lengths = [len(line) - (n in missing) for n, line in enumerate(lists)]
    assert found["candidates"] == max(lengths)


def aucs(lists):
    """(pooled, mean of the users') AUC by scikit-learn of lists whose targets come first."""
    labels = [[1] + [0] * (len(line) - 1) for line in lists]
    pairs = [pair for pair in zip(labels, lists, strict=True) if len(pair[1]) > 1]
    pooled = roc_auc_score(np.concatenate(labels), np.concatenate(lists))
    return pooled, np.mean([roc_auc_score(*pair) for pair in pairs])


@pytest.mark.parametrize("missing", [set(), {2, 5, 7}])
def test_intervals_are_over_the_users_that_have_the_metric(missing):
    """Bootstrap by brute force: of each drawn set of users the metrics as scikit-learn has them."""
    rng = np.random.default_rng(4)
    sizes = rng.integers(2, 6, size=12) if missing else [6] * 12
    lists = [rng.integers(0, 5, size=size).astype(float) for size in sizes]
    rows = without_target(rows_of(lists), *(f"u{n}" for n in missing))
    found = evaluate(rows, resamples=20, seed=3, retrieved=bool(missing))
    order = sorted(range(12), key=lambda n: f"u{n}")  # users in the order of their ids
    hit = [0.0 if n in missing else over_all_orders(lists[n])[0] for n in range(12)]
    samples, again = [], np.random.default_rng(3)
    for _ in range(20):
        drawn = [order[n] for n in again.integers(0, 12, 12)]
        of_drawn = aucs([lists[n] for n in drawn if n not in missing])
        samples.append([*of_drawn, np.mean([hit[n] for n in drawn])])
    for name, values in zip(("auc", "auc_per_user", "hr@3"), np.transpose(samples), strict=True):
        interval = np.percentile(values, [2.5, 97.5]).tolist()
        assert found[f"{name}_ci95"] == pytest.approx(interval, abs=1e-12), name


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        (rows_of([[3, 1, 2], [3, 1]]), "1 positives and 1 negatives"),
        (without_target(rows_of([[3, 1, 2], [3, 1, 2]]), "u1"), "0 positives and 2 negatives"),
    ],
)
def test_lists_that_differ_are_rejected_unless_they_are_retrieved(rows, found):
    for check in (evaluate, CandidateLists.of):
        with pytest.raises(InputError, match=f"user 'u1' has {found} instead of 1 and 2"):
            check(rows)
    assert CandidateLists.of(rows, retrieved=True).lengths.tolist() == [3, 2]
    assert evaluate(rows, resamples=2, retrieved=True)["users"] == 2


def test_retrieved_lists_with_two_targets_or_none_at_all_are_rejected():
    rows = rows_of([[3, 1, 2], [3, 1]])
    with pytest.raises(InputError, match="user 'u0' has 3 positives"):
        CandidateLists.of([{**row, "label": 1} for row in rows[:3]], retrieved=True)
    with pytest.raises(InputError, match="no list holds its target"):
        evaluate(without_target(rows, "u0", "u1"), resamples=2, retrieved=True)


def test_with_few_hits_the_interval_of_auc_is_over_resamples_that_have_one():
    """One of six lists holds its target, ranked first: AUC 1, in every resample that defines it."""
    rows = without_target(rows_of([[3.0, 1.0, 2.0]] * 6), "u1", "u2", "u3", "u4", "u5")
    metrics = evaluate(rows, resamples=40, retrieved=True)
    for name in ("auc", "auc_per_user"):
        assert (metrics[name], metrics[f"{name}_ci95"]) == (1.0, [1.0, 1.0])
    assert metrics["hr@3"] == pytest.approx(1 / 6)


def test_a_retrieved_list_of_the_target_alone_has_no_auc_of_its_own():
    rows = [*rows_of([[3.0, 1.0]]), {"user_id": "u9", "item_id": "x", "label": 1, "score": 0.0}]
    metrics = evaluate(rows, resamples=10, retrieved=True)
    assert (metrics["users"], metrics["auc_users"]) == (2, 2)
    assert (metrics["auc_per_user"], metrics["auc"]) == (1.0, 0.5), "pooled: 3 and 0 against 1"
    with pytest.raises(InputError, match="no list holds its target beside a negative"):
        evaluate(rows[2:], resamples=2, retrieved=True)
