"""Is the difference between two scored variants real? Paired over users, and over seeds.

Two variants that scored the same candidates of the same users are compared user by user: the
bootstrap draws users, and each drawn user counts in both. That leaves out what makes one user's
list harder than another's, so the interval of a difference is narrower than those of its two sides.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from mllmrec.evaluation.metrics import CandidateLists, PooledAuc, per_user
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import PathLike
from mllmrec.stage.schema import Row

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Difference:
    """One metric of a variant minus that of another, mean over the seeds.

    low, high: 95% interval, bootstrap over the users of every seed; seeds_low, seeds_high:
    Student's t over the seeds, None with one seed.
    """

    value: float
    low: float
    high: float
    seeds_low: float | None = None
    seeds_high: float | None = None

    @property
    def is_real(self) -> bool:
        """True if no interval holds 0."""
        intervals = [(self.low, self.high)]
        if self.seeds_low is not None and self.seeds_high is not None:
            intervals.append((self.seeds_low, self.seeds_high))
        return all(low > 0 or high < 0 for low, high in intervals)


@dataclass(frozen=True)
class Scored:
    """The scores of one variant, and what must be the same in another one to compare it."""

    lists: CandidateLists
    same: frozenset[tuple[Any, ...]]

    @classmethod
    def of(
        cls, rows: Sequence[Row], where: PathLike = "scores.jsonl", retrieved: bool = False
    ) -> "Scored":
        """From lines of scores.jsonl; where: the file, for messages.

        retrieved: each variant has lists of its own, of the same users.
        """
        names = ("user_id",) if retrieved else ("user_id", "item_id", "label")
        same = frozenset(tuple(row[name] for name in names) for row in rows)
        return cls(CandidateLists.of(rows, where, retrieved), same)


def paired_differences(
    pairs: Sequence[tuple[Scored, Scored]], resamples: int = 1000, seed: int = 0
) -> dict[str, Difference]:
    """metric -> difference of the first variant minus the second; metrics as in `evaluate`.

    pairs: the two variants of each seed; of retrieved lists there is no AUC. Raises InputError if
    they are not about the same candidates, or for a single resample, which has no interval.
    """
    if resamples < 2:
        raise InputError(f"an interval needs at least 2 resamples, not {resamples}")
    for a, b in pairs:
        if a.same != b.same:
            raise InputError(
                "the two variants did not score the same candidates, so they cannot be compared "
                "user by user; make both from one users.jsonl"
            )
    rng = np.random.default_rng(seed)
    values, samples = [], []
    for a, b in pairs:
        weights = np.ones((1, len(a.lists.users)))
        values.append(_differences(a.lists, b.lists, weights))
        samples.append(_differences(a.lists, b.lists, _resamples(a.lists, resamples, rng)))
    found = {}
    for name in values[0]:
        per_seed = np.array([value[name][0] for value in values])
        low, high = np.percentile(np.mean([s[name] for s in samples], axis=0), [2.5, 97.5])
        seeds: tuple[float | None, float | None] = (None, None)
        if len(pairs) > 1:
            half = stats.t.ppf(0.975, len(pairs) - 1) * per_seed.std(ddof=1) / len(pairs) ** 0.5
            seeds = (float(per_seed.mean() - half), float(per_seed.mean() + half))
        found[name] = Difference(float(per_seed.mean()), float(low), float(high), *seeds)
    return found


def _resamples(lists: CandidateLists, resamples: int, rng: np.random.Generator) -> Array:
    """(resamples, users): how often each user was drawn."""
    n_users = len(lists.users)
    drawn = rng.integers(0, n_users, (resamples, n_users))
    return np.stack([np.bincount(row, minlength=n_users) for row in drawn])


def _differences(a: CandidateLists, b: CandidateLists, weights: Array) -> dict[str, Array]:
    """metric -> its difference for each row of `weights`, which says how often a user counts."""
    first, second = per_user(a), per_user(b)
    if a.retrieved:
        del first["auc_per_user"]
    means = {name: weights @ (first[name] - second[name]) / weights.sum(1) for name in first}
    if a.retrieved:
        return means
    pooled = PooledAuc(a), PooledAuc(b)
    auc = np.array([[side.weighted(weight) for weight in weights] for side in pooled])
    return {"auc": auc[0] - auc[1], **means}
