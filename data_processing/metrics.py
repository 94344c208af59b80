"""AUC, HR, MRR and NDCG over each user's candidate list (paper, "Evaluation Protocols").

A list has one positive and n negatives. Ties count as what a random order of the tied candidates gives on average, so
that it plays no role in which order the candidates were listed: with a constant score, HR@5 over 21 is 5/21.
HR@k is also Recall@k here, since there is one positive.
"""

import numpy as np
from scipy import stats
from sklearn.metrics import roc_auc_score

from data_processing.errors import InputError

CUTOFFS = (3, 5, 10)
SHOWN = ("auc", "hr@5", "mrr@5", "ndcg@5")  # the columns of every table


def by_user(rows, where="scores.jsonl"):
    """dict user_id -> (scores, labels) as float64 and int arrays, positive first, negatives by item id.

    rows: dicts with user_id, item_id, label, score. The order of the rows does not matter. Raises InputError naming the
    user for a candidate that stands twice, a label that is not 0 or 1, a score that is no number, or a list that does
    not have exactly one positive and as many negatives as the other users' lists.
    """
    lists = {}
    for row in rows:
        if row.get("label") not in (0, 1):
            raise InputError(
                f"{where}: user {row['user_id']!r}, item {row['item_id']!r} has the label {row.get('label')!r}; it must be 0 or 1"
            )
        if not isinstance(row["score"], int | float) or not np.isfinite(row["score"]):
            raise InputError(
                f"{where}: user {row['user_id']!r}, item {row['item_id']!r} has the score {row['score']!r}; score the pair again"
            )
        mine = lists.setdefault(row["user_id"], {})
        if row["item_id"] in mine:
            raise InputError(f"{where}: user {row['user_id']!r} has the candidate {row['item_id']!r} twice; remove one of the two lines")
        mine[row["item_id"]] = (row["label"], float(row["score"]))
    if not lists:
        raise InputError(f"{where} holds no scores")
    length = max(len(mine) for mine in lists.values())
    checked = {}
    for user in sorted(lists):
        values = [lists[user][item] for item in sorted(lists[user], key=lambda item: (-lists[user][item][0], item))]
        if len(values) != length or sum(label for label, _ in values) != 1 or length < 2:
            positives = sum(label for label, _ in values)
            raise InputError(
                f"{where}: user {user!r} has {positives} positives and {len(values) - positives} negatives in place of 1 and "
                f"{length - 1}; score the missing pairs or take the user out"
            )
        checked[user] = (np.array([score for _, score in values]), np.array([label for label, _ in values]))
    return checked


def ranking(scores):
    """(greater, tied): per user how many negatives score above the positive, and how many the same.

    scores: shape (users, candidates), the positive in column 0. The positive's rank is uniform on
    greater + 1 … greater + tied + 1.
    """
    positive, negatives = scores[:, :1], scores[:, 1:]
    return (negatives > positive).sum(1), (negatives == positive).sum(1)


def per_user(scores, cutoffs=CUTOFFS):
    """dict metric -> float array of shape (users,): hr@k, mrr@k, ndcg@k and auc_per_user.

    scores: shape (users, candidates), the positive in column 0.
    """
    greater, tied = ranking(scores)
    n_candidates = scores.shape[1]
    ranks = np.arange(1, n_candidates + 1)
    values = {"auc_per_user": 1.0 - (greater + tied / 2) / (n_candidates - 1)}
    for name, gain in (("hr", np.ones(n_candidates)), ("mrr", 1 / ranks), ("ndcg", 1 / np.log2(ranks + 1))):
        for k in cutoffs:
            summed = np.concatenate([[0.0], np.cumsum(np.where(ranks <= k, gain, 0.0))])
            values[f"{name}@{k}"] = (summed[greater + tied + 1] - summed[greater]) / (tied + 1)
    return values


def pooled_auc(scores, labels):
    """The paper's AUC: over all pairs of all users together. scores, labels: any shape, the same for both."""
    return float(roc_auc_score(np.ravel(labels), np.ravel(scores)))


def evaluate(rows, where="scores.jsonl", cutoffs=CUTOFFS, resamples=1000, seed=0):
    """All metrics of one scored variant, each with a 95% interval by bootstrap over users.

    Returns dict: auc, auc_per_user, hr@k, mrr@k, ndcg@k, users, candidates, and NAME_ci95: [low, high] for each.
    """
    lists = by_user(rows, where)
    scores, labels = map(np.stack, zip(*lists.values(), strict=True))
    n_users, n_candidates = scores.shape
    values = per_user(scores, cutoffs)
    result = {"auc": pooled_auc(scores, labels), **{name: float(value.mean()) for name, value in values.items()}}
    rng = np.random.default_rng(seed)
    draws = {name: np.empty(resamples) for name in result}
    pooled = _PooledAuc(scores)
    stacked = np.stack(list(values.values()))
    for draw in range(resamples):
        weight = np.bincount(rng.integers(0, n_users, n_users), minlength=n_users)  # how often each user is drawn
        draws["auc"][draw] = pooled.weighted(weight)
        for name, mean in zip(values, stacked @ weight / n_users, strict=True):
            draws[name][draw] = mean
    intervals = {f"{name}_ci95": [float(v) for v in np.percentile(draw, [2.5, 97.5])] for name, draw in draws.items()}
    return {**result, "users": n_users, "candidates": n_candidates, **intervals}


class _PooledAuc:
    """Pooled AUC of one score matrix under changing user weights: sorted once, a sum for each resample."""

    def __init__(self, scores):
        _, group = np.unique(scores, return_inverse=True)
        self.group = group.reshape(scores.shape)
        self.n_groups = int(group.max()) + 1

    def weighted(self, weight):
        positive = np.bincount(self.group[:, 0], weights=weight, minlength=self.n_groups)
        every = np.bincount(self.group.ravel(), weights=np.repeat(weight, self.group.shape[1]), minlength=self.n_groups)
        negative = every - positive
        below = np.cumsum(negative) - negative
        return float((positive * (below + negative / 2)).sum() / (positive.sum() * negative.sum()))


def aggregate(runs):
    """Several runs (folds or seeds) of one variant -> mean of each metric and the 95% interval of that mean.

    runs: results of `evaluate`. The interval is Student's t over the runs; with one run it is left out.
    """
    names = [name for name in runs[0] if name not in ("users", "candidates") and not name.endswith("_ci95")]
    result = {name: float(np.mean([run[name] for run in runs])) for name in names}
    if len(runs) > 1:
        for name in names:
            values = np.array([run[name] for run in runs])
            half = stats.t.ppf(0.975, len(runs) - 1) * values.std(ddof=1) / np.sqrt(len(runs))
            result[f"{name}_ci95"] = [float(values.mean() - half), float(values.mean() + half)]
    return {**result, "users": sum(run["users"] for run in runs), "candidates": runs[0]["candidates"], "runs": len(runs)}
