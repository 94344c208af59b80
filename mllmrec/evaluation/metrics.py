"""AUC, HR, MRR and NDCG over each user's candidate list (paper, "Evaluation Protocols").

A list has one target (the positive) and n negatives. Ties count as what a random order of the tied
candidates gives on average, so the order in which candidates are listed has no influence: with a
constant score, HR@5 over 21 is 5/21. HR@k is also Recall@k, since there is one positive. Retrieved
lists may differ in length and may lack the target, which counts as a miss; AUC is then over the
users whose list has it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats
from scipy.special import expit
from sklearn.metrics import roc_auc_score

from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import PathLike
from mllmrec.stage.schema import Row

CUTOFFS = (3, 5, 10)
YES_NO = {"No", "Yes"}  # the answers about one candidate
SHOWN = ("auc", "hr@5", "mrr@5", "ndcg@5")  # the columns of every table
USER_GROUPS = {"known": False, "new": True}  # of users, by whether the target is a cold item

Array = np.ndarray[Any, Any]


@dataclass
class CandidateLists:
    """Scored lists of several users, concatenated.

    users: ids; user: index into `users` of each candidate; scores, is_target: of each candidate;
    retrieved: lists may differ in length and lack their target.
    """

    users: list[str]
    user: Array
    scores: Array
    is_target: Array
    retrieved: bool = False

    @classmethod
    def of(
        cls, rows: Iterable[Row], where: PathLike = "scores.jsonl", retrieved: bool = False
    ) -> "CandidateLists":
        """From lines of scores.jsonl in any order; where: the file, for messages.

        Raises InputError naming the user for a candidate that is listed twice, a label that is not
        0 or 1, a score that is not a finite number, more than one positive, and, unless
        `retrieved`, for a list without its target or with another number of negatives than the
        other users' lists.
        """
        lists: dict[str, dict[str, tuple[int, float]]] = {}
        rows = list(rows)
        for row in rows:
            _check_score(row, where)
        for row, score in zip(rows, ranking_scores(rows), strict=True):
            own = lists.setdefault(row["user_id"], {})
            if row["item_id"] in own:
                raise InputError(
                    f"{where}: user {row['user_id']!r} has the candidate {row['item_id']!r} twice; "
                    "remove one of the two lines"
                )
            own[row["item_id"]] = (row["label"], score)
        if not lists:
            raise InputError(f"{where} holds no scores; make it again with scripts/06_score.sh")
        length = max(map(len, lists.values()))
        users, labels, scores, user = sorted(lists), [], [], []
        for number, name in enumerate(users):
            # The target first, then negatives by item id: the result does not depend on the line
            # order.
            values = [v for _, v in sorted(lists[name].items(), key=lambda e: (-e[1][0], e[0]))]
            _check_list(name, [label for label, _ in values], length, (where, retrieved))
            labels += [label for label, _ in values]
            scores += [score for _, score in values]
            user += [number] * len(values)
        found = cls(users, np.array(user), np.array(scores), np.array(labels) == 1, retrieved)
        if not found.has_auc.any():
            raise InputError(
                f"{where}: no list holds its target beside a negative, so nothing can be measured"
            )
        return found

    @classmethod
    def of_matrix(cls, scores: Array) -> "CandidateLists":
        """From scores of shape (users, candidates), the target in column 0."""
        n_users, n_candidates = scores.shape
        is_target = np.zeros(scores.shape, dtype=bool)
        is_target[:, 0] = True
        user = np.repeat(np.arange(n_users), n_candidates)
        return cls([str(n) for n in range(n_users)], user, scores.ravel(), is_target.ravel())

    @property
    def lengths(self) -> Array:
        """Candidates of each user."""
        return np.bincount(self.user, minlength=len(self.users))

    @property
    def has_target(self) -> Array:
        """Whether each user's list holds the target."""
        return np.bincount(self.user[self.is_target], minlength=len(self.users)) == 1

    @property
    def has_auc(self) -> Array:
        """Whether each user's list holds the target and at least one negative."""
        return self.has_target & (self.lengths > 1)

    def ranking(self) -> tuple[Array, Array]:
        """(greater, tied): per user how many negatives score above the target, and how many equal.

        The target's rank is uniform on greater + 1 ... greater + tied + 1. Without target: all
        above.
        """
        target = np.full(len(self.users), -np.inf)
        target[self.user[self.is_target]] = self.scores[self.is_target]
        threshold, negative = target[self.user], ~self.is_target
        counts = [
            np.bincount(self.user[negative & condition], minlength=len(self.users))
            for condition in (self.scores > threshold, self.scores == threshold)
        ]
        return counts[0], counts[1]


def ranking_scores(rows: Sequence[Row]) -> list[float]:
    """What the lines of scores.jsonl are ranked by: `score`, or the logit of Yes minus that of No.

    The latter where each score is the p(yes) of its logits. The order is the same, but p(yes) is 1
    for all differences from 37 on.
    """
    scores = np.array([row["score"] for row in rows], dtype=float)
    if all(set(row.get("logits") or ()) == YES_NO for row in rows):
        margins = np.array([row["logits"]["Yes"] - row["logits"]["No"] for row in rows])
        if np.allclose(expit(margins), scores, rtol=0, atol=1e-5):
            return [float(margin) for margin in margins]
    return [float(score) for score in scores]


def _check_score(row: Row, where: PathLike) -> None:
    name = f"{where}: user {row['user_id']!r}, item {row['item_id']!r}"
    if row.get("label") not in (0, 1):
        raise InputError(f"{name} has the label {row.get('label')!r}; it must be 0 or 1")
    if not isinstance(row["score"], int | float) or not np.isfinite(row["score"]):
        raise InputError(f"{name} has the score {row['score']!r}; score the row again")


def _check_list(
    user: str, labels: Sequence[int], length: int, source: tuple[PathLike, bool]
) -> None:
    (where, retrieved), positives = source, sum(labels)
    whole = len(labels) == length and positives == 1 and length >= 2
    if not whole and not (retrieved and positives <= 1):
        raise InputError(
            f"{where}: user {user!r} has {positives} positives and {len(labels) - positives} "
            f"negatives instead of 1 and {length - 1}; score the missing rows or remove the user"
        )


def per_user(lists: CandidateLists, cutoffs: Sequence[int] = CUTOFFS) -> dict[str, Array]:
    """dict metric -> float array of shape (users,): auc_per_user, hr@k, mrr@k, ndcg@k.

    A list without its target has 0 everywhere and NaN as its AUC.
    """
    greater, tied = lists.ranking()
    has_target, n_negatives = lists.has_target, lists.lengths - 1
    ranks = np.arange(1, lists.lengths.max() + 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        auc = 1.0 - (greater + tied / 2) / n_negatives
    values = {"auc_per_user": np.where(lists.has_auc, auc, np.nan)}
    greater, tied = np.where(has_target, greater, 0), np.where(has_target, tied, 0)
    gains = (("hr", np.ones(len(ranks))), ("mrr", 1 / ranks), ("ndcg", 1 / np.log2(ranks + 1)))
    for name, gain in gains:
        for k in cutoffs:
            summed = np.concatenate([[0.0], np.cumsum(np.where(ranks <= k, gain, 0.0))])
            mean = (summed[greater + tied + 1] - summed[greater]) / (tied + 1)
            values[f"{name}@{k}"] = np.where(has_target, mean, 0.0)
    return values


def hit_rate(lists: CandidateLists, k: int) -> Array:
    """HR@k of each user."""
    return per_user(lists, (k,))[f"hr@{k}"]


def pooled_auc(lists: CandidateLists) -> float:
    """The paper's AUC: over the candidates of all users together whose list has its target."""
    used = lists.has_target[lists.user]
    return float(roc_auc_score(lists.is_target[used], lists.scores[used]))


def evaluate(
    rows: Iterable[Row],
    where: PathLike = "scores.jsonl",
    resamples: int = 1000,
    seed: int = 0,
    retrieved: bool = False,
) -> dict[str, Any]:
    """All metrics of one scored variant, each with a 95% interval by bootstrap over users.

    Returns auc, auc_per_user, hr@k, mrr@k, ndcg@k, users, candidates, and NAME_ci95: [low, high]
    for each, unless there is one resample or one user; of retrieved lists also auc_users, the
    number of users whose list has its target.
    """
    lists = CandidateLists.of(rows, where, retrieved)
    values, n_users = per_user(lists), len(lists.users)
    result = {"auc": pooled_auc(lists)}
    result |= {name: float(np.nanmean(value)) for name, value in values.items()}
    intervals = {}
    if resamples > 1 and n_users > 1:
        samples = _bootstrap(lists, values, resamples, np.random.default_rng(seed))
        intervals = {f"{name}_ci95": _interval(sample) for name, sample in samples.items()}
    counts = {"users": n_users, "candidates": int(lists.lengths.max())}
    if retrieved:
        counts["auc_users"] = int(lists.has_target.sum())
    return {**result, **counts, **intervals}


def of_group(rows: Iterable[Row], cold: Mapping[str, bool], group: str) -> list[Row]:
    """The lines of a group of USER_GROUPS. cold: user -> whether its target is a cold item."""
    return [row for row in rows if cold[row["user_id"]] == USER_GROUPS[group]]


def evaluate_groups(
    rows: Sequence[Row], cold: Mapping[str, bool], where: PathLike, resamples: int = 1000
) -> dict[str, Any]:
    """NAME_known and NAME_new of each shown metric: of users whose target is known, or cold.

    rows: lines of scores.jsonl; cold: as in `of_group`. With NAME_new_ci95 and users_new.
    """
    found: dict[str, Any] = {}
    for group in USER_GROUPS:
        own = of_group(rows, cold, group)
        metrics = evaluate(own, where, resamples) if own else {}
        for name in (*SHOWN, "users"):
            for key in (name, f"{name}_ci95"):
                if key in metrics:
                    found[key.replace(name, f"{name}_{group}")] = metrics[key]
    return found


def _bootstrap(
    lists: CandidateLists, values: Mapping[str, Array], resamples: int, rng: np.random.Generator
) -> dict[str, Array]:
    """metric -> its value in each resample of the users, NaN where it is not defined."""
    n_users = len(lists.users)
    samples = {name: np.empty(resamples) for name in ("auc", *values)}
    pooled, stacked = PooledAuc(lists), np.stack(list(values.values()))
    defined = np.isfinite(stacked)
    stacked = np.where(defined, stacked, 0.0)
    for number in range(resamples):
        weight = np.bincount(rng.integers(0, n_users, n_users), minlength=n_users)
        samples["auc"][number] = pooled.weighted(weight)
        n_defined = defined @ weight
        means = np.where(n_defined > 0, stacked @ weight / np.maximum(n_defined, 1), np.nan)
        for name, mean in zip(values, means, strict=True):
            samples[name][number] = mean
    return samples


def _interval(sample: Array) -> list[float]:
    """The middle 95% of the resamples that define a metric; its whole range if none does."""
    defined = sample[~np.isnan(sample)]
    return [float(v) for v in np.percentile(defined, [2.5, 97.5])] if len(defined) else [0.0, 1.0]


class PooledAuc:
    """Pooled AUC under changing user weights: sorted once, a sum for each resample."""

    def __init__(self, lists: CandidateLists) -> None:
        used = lists.has_target[lists.user]
        self.user, self.is_target = lists.user[used], lists.is_target[used]
        _, self.group = np.unique(lists.scores[used], return_inverse=True)
        self.n_groups = int(self.group.max()) + 1

    def weighted(self, weight: Array) -> float:
        """weight: how often each user counts."""
        weights, target = weight[self.user], self.is_target
        positive = np.bincount(self.group[target], weights[target], self.n_groups)
        negative = np.bincount(self.group[~target], weights[~target], self.n_groups)
        below = np.cumsum(negative) - negative
        pairs = positive.sum() * negative.sum()
        return float((positive * (below + negative / 2)).sum() / pairs) if pairs else float("nan")


def aggregate(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several runs (folds or seeds) of one variant -> mean of each metric and its 95% interval.

    runs: results of `evaluate`. The interval is Student's t over the runs; with one run it is left
    out.
    """
    counts = ("users", "candidates", "auc_users")
    names = [name for name in runs[0] if name not in counts and not name.endswith("_ci95")]
    result: dict[str, Any] = {name: float(np.mean([run[name] for run in runs])) for name in names}
    if len(runs) > 1:
        for name in names:
            values = np.array([run[name] for run in runs])
            half = stats.t.ppf(0.975, len(runs) - 1) * values.std(ddof=1) / np.sqrt(len(runs))
            result[f"{name}_ci95"] = [float(values.mean() - half), float(values.mean() + half)]
    users = sum(run["users"] for run in runs)
    return {**result, "users": users, "candidates": runs[0]["candidates"], "runs": len(runs)}
