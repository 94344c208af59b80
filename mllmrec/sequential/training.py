"""Training and scoring of sequential models; the models are in MLLM-MSR/baselines/.

A model maps item numbers (users, length) to states (users, length, width), the state at a position
from the items up to there; the score of an item is the product of a state and the item's vector
(`model.items()`, all vectors).
"""

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

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
    """A trained model at its best validation, and the metrics of every validation."""

    model: Any
    chosen_by: str
    log: list[Metrics] = field(default_factory=list)

    @property
    def best(self) -> Metrics:
        """The line that was kept: without validation users the last one."""
        return max(self.log, key=lambda line: line.get(self.chosen_by, line["step"]))


def fit(
    model: Any,
    data: SequenceData,
    validate: Callable[[], Metrics],
    options: Any,
    chosen_by: str = CHOSEN_BY,
    report: Callable[[Metrics], None] = lambda _: None,
) -> Fit:
    """Train until the validation metric `chosen_by` stops rising; keep the weights of the best.

    Learns from `data.training` alone, on the model's device. validate: the model's metrics on the
    validation users, after each epoch or every `validation_steps` batches; where it has none, the
    last weights are kept. report: is called with the line of each validation.
    """
    device = model_device(model)
    if options.init == "truncated_normal":
        start_truncated_normal(model)
    generator = torch.Generator().manual_seed(options.seed)
    optimizer, result, best_weights = new_optimizer(model, options), Fit(model, chosen_by), {}
    losses: list[torch.Tensor] = []
    started, waited = time.monotonic(), 0
    for batch in training_batches(data, options, generator):
        model.train()
        inputs, targets = batch.inputs.to(device), batch.targets.to(device)
        loss = next_item_loss(model, inputs, targets, options, generator)
        optimizer.zero_grad()
        loss.backward()
        if options.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        optimizer.step()
        losses.append(loss.detach())  # .item() here would wait for the GPU at every step
        if not batch.is_validated:
            continue
        line: Metrics = {"epoch": batch.epoch, "step": batch.step}
        line["loss"] = torch.stack(losses).mean().item()
        if not math.isfinite(line["loss"]):
            raise InputError(
                f"the loss of epoch {batch.epoch} is {line['loss']}: the training "
                "diverged; lower --learning_rate"
            )
        line |= validate()
        line["seconds"] = time.monotonic() - started
        losses, started = [], time.monotonic()
        result.log.append(line)
        report(line)
        if result.best is line:
            best_weights, waited = copy.deepcopy(model.state_dict()), 0
        elif chosen_by in line:
            waited += 1
            if waited == options.patience:
                break
    model.load_state_dict(best_weights)
    return result


class Batch(NamedTuple):
    """inputs, targets: (sequences, length); step: number from 1 on; is_validated: after it."""

    inputs: torch.Tensor
    targets: torch.Tensor
    epoch: int
    step: int
    is_validated: bool


def training_batches(
    data: SequenceData, options: Any, generator: torch.Generator
) -> Iterator[Batch]:
    """The batches of all epochs; the last one is always validated."""
    step, every = 0, options.validation_steps
    for epoch in range(1, options.epochs + 1):
        batches = list(data.training_batches(options, generator))
        for number, (inputs, targets) in enumerate(batches, start=1):
            step, ends_epoch = step + 1, number == len(batches)
            is_validated = (ends_epoch and (not every or epoch == options.epochs)) or (
                every > 0 and step % every == 0
            )
            yield Batch(inputs, targets, epoch, step, is_validated)


def new_optimizer(model: Any, options: Any) -> torch.optim.Optimizer:
    """AdamW; with `decay_norms: false` without weight decay on biases and norms."""
    decayed: list[Any] = []
    spared: list[Any] = []
    for name, parameter in model.named_parameters():
        is_spared = not options.decay_norms and ("bias" in name or "norm" in name)
        (spared if is_spared else decayed).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=options.learning_rate,
        weight_decay=options.weight_decay,
    )


@torch.no_grad()
def start_truncated_normal(model: Any, deviation: float = 0.02) -> None:
    """Draw all weights but those of norms and of LRURec's decays, within two deviations."""
    for name, parameter in model.named_parameters():
        if "norm" not in name and "log_" not in name:
            torch.nn.init.trunc_normal_(parameter, 0.0, deviation, -2 * deviation, 2 * deviation)


def model_device(model: Any) -> torch.device:
    """Where the model's parameters are."""
    return next(model.parameters()).device


def next_item_loss(
    model: Any,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    options: Any,
    generator: torch.Generator,
) -> torch.Tensor:
    """Mean over all positions that have a next item.

    cross_entropy: of the next item among all items, with `padding_class` also number 0. bce: binary
    cross-entropy of the next item and of one random item, as published for SASRec (a random item
    may be one that the user had).
    """
    real = targets != PADDING
    states, wanted, vectors = model(inputs)[real], targets[real], model.items()
    if options.loss == "cross_entropy":  # number 0, the padding, is no item
        first = 0 if options.padding_class else 1
        return functional.cross_entropy(states @ vectors[first:].T, wanted - first)
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
