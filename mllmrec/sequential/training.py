"""Training and scoring of sequential models; the models are in MLLM-MSR/baselines/.

A model maps item numbers (users, length) to states (users, length, width), the state at a position
from the items up to there; the score of an item is the product of a state and the item's vector
(`model.items()`, all vectors).
"""

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional

from mllmrec.evaluation.metrics import CandidateLists, per_user
from mllmrec.sequential.sequences import PADDING, CandidateNumbers, SequenceData, padded
from mllmrec.stage.errors import InputError

CHOSEN_BY = "ndcg@5"  # of the validation users
SCORED = 512  # users in a batch of scoring

Metrics = dict[str, float]


@dataclass
class Fit:
    """A trained model at its best epoch, and the validation metrics of every epoch."""

    model: Any
    chosen_by: str
    log: list[Metrics] = field(default_factory=list)

    @property
    def best(self) -> Metrics:
        """The line of the epoch that was kept: without validation users the last one."""
        return max(self.log, key=lambda line: line.get(self.chosen_by, line["epoch"]))


def fit(
    model: Any,
    data: SequenceData,
    validate: Callable[[], Metrics],
    options: Any,
    chosen_by: str = CHOSEN_BY,
    report: Callable[[Metrics], None] = lambda _: None,
) -> Fit:
    """Train until the validation metric `chosen_by` stops rising; keep the best epoch's weights.

    Learns from `data.training` alone, on the model's device. validate: the model's metrics on the
    validation users; where it has none, the last epoch is kept. report: is called with the line of
    each epoch.
    """
    device = model_device(model)
    generator = torch.Generator().manual_seed(options.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay
    )
    result, best_weights = Fit(model, chosen_by), None
    for epoch in range(1, options.epochs + 1):
        started, losses = time.monotonic(), []
        model.train()
        for inputs, targets in data.training_batches(options, generator):
            inputs, targets = inputs.to(device), targets.to(device)
            loss = next_item_loss(model, inputs, targets, options.loss, generator)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())  # .item() here would wait for the GPU at every step
        line = {"epoch": epoch, "loss": torch.stack(losses).mean().item()}
        if not math.isfinite(line["loss"]):
            raise InputError(
                f"the loss of epoch {epoch} is {line['loss']}: the training "
                "diverged; lower --learning_rate"
            )
        line |= validate()
        line["seconds"] = time.monotonic() - started
        result.log.append(line)
        report(line)
        if result.best is line:
            best_weights = copy.deepcopy(model.state_dict())
        elif chosen_by in line and epoch - result.best["epoch"] >= options.patience:
            break
    assert best_weights is not None
    model.load_state_dict(best_weights)
    return result


def model_device(model: Any) -> torch.device:
    """Where the model's parameters are."""
    return next(model.parameters()).device


def next_item_loss(
    model: Any,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    loss: str,
    generator: torch.Generator,
) -> torch.Tensor:
    """Mean over all positions that have a next item.

    cross_entropy: of the next item among all items. bce: binary cross-entropy of the next item and
    of one random item, as published for SASRec (a random item may be one that the user had).
    """
    real = targets != PADDING
    states, wanted, vectors = model(inputs)[real], targets[real], model.items()
    if loss == "cross_entropy":  # number 0, the padding, is no item
        return functional.cross_entropy(states @ vectors[1:].T, wanted - 1)
    negative = torch.randint(1, len(vectors), wanted.shape, generator=generator).to(wanted.device)
    positive_logits = (states * vectors[wanted]).sum(1)
    negative_logits = (states * vectors[negative]).sum(1)
    return -(
        functional.logsigmoid(positive_logits) + functional.logsigmoid(-negative_logits)
    ).mean()


def item_products(
    model: Any, vectors: torch.Tensor, histories: Sequence[Sequence[int]], max_length: int
) -> torch.Tensor:
    """(users, items + 1): products of the state behind each history and all items' vectors.

    vectors: `model.items()`; number 0 is no item.
    """
    rows = [row[-max_length:] for row in histories]
    states = model(padded(rows).to(vectors.device))
    last = states[torch.arange(len(rows)), [len(row) - 1 for row in rows]]
    return last @ vectors.T


@torch.inference_mode()
def score_candidates(model: Any, lists: CandidateNumbers, options: Any) -> list[list[float]]:
    """Scores of each user's candidates: the log-probability of being the next of all items.

    With the binary loss: the logit. A user's ranking is that of the products; the normalisation
    makes the scores of different users comparable, which the pooled AUC needs.
    """
    model.eval()
    vectors, scores = model.items(), []
    for start in range(0, len(lists.users), SCORED):
        part = slice(start, start + SCORED)
        logits = item_products(model, vectors, lists.histories[part], options.max_length)
        if options.loss == "cross_entropy":
            logits = logits - logits[:, 1:].logsumexp(1, keepdim=True)
        for row, chosen in zip(logits.cpu(), lists.candidates[part], strict=True):
            scores.append(row[chosen].tolist())
    return scores


def validation_metrics(model: Any, lists: CandidateNumbers, options: Any) -> Metrics:
    """AUC per user, HR@5, MRR@5 and NDCG@5 of the validation users; nothing without users."""
    if not lists.users:
        return {}
    rows = score_candidates(model, lists, options)
    scored = [
        {"user_id": user, "item_id": str(n), "label": int(n == 0), "score": score}
        for user, own in zip(lists.users, rows, strict=True)
        for n, score in enumerate(own)
    ]
    values = per_user(CandidateLists.of(scored, "validation users"), (5,))
    return {name: float(value.mean()) for name, value in values.items()}
