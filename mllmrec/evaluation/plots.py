"""The report's plots, each as the bytes of a PNG: ROC curve, score histogram, training curve."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from sklearn.metrics import roc_curve

from mllmrec.stage.schema import Row

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = ("#c60", "#47a", "#2a7", "#a4a")


def roc(variants: Mapping[str, tuple[Sequence[int], Sequence[float]]]) -> bytes:
    """variants: name -> (labels, scores), pooled over all users as in the paper's AUC."""
    figure, axes = plt.subplots(figsize=(4, 4), layout="constrained")
    for colour, (name, (labels, scores)) in zip(COLOURS, variants.items(), strict=False):
        false_positive, true_positive, _ = roc_curve(labels, scores)
        axes.plot(false_positive, true_positive, color=colour, label=name)
    axes.plot([0, 1], [0, 1], ":", color="#999")
    axes.set(xlabel="false positive rate", ylabel="true positive rate", xlim=(0, 1), ylim=(0, 1))
    axes.legend(frameon=False, loc="lower right")
    return png(figure)


def histogram(labels: Sequence[int], scores: Sequence[float]) -> bytes:
    """Distribution of the scores over positives and over negatives; each of the two sums to one."""
    label_array, score_array = np.asarray(labels), np.asarray(scores)
    figure, axes = plt.subplots(figsize=(5, 4), layout="constrained")
    low, high = score_array.min(), max(score_array.max(), score_array.min() + 1e-9)
    bins = np.linspace(low, high, 31)
    for label, name, colour in ((0, "negatives", COLOURS[1]), (1, "positives", COLOURS[0])):
        part = score_array[label_array == label]
        weights = np.full(len(part), 1 / max(len(part), 1))
        axes.hist(part, list(bins), weights=weights, color=colour, alpha=0.6, label=name)
    axes.set(xlabel="score, p(yes)", ylabel="share of the rows")
    axes.legend(frameon=False)
    return png(figure)


def training_curve(log: Sequence[Row]) -> bytes:
    """log: rows of training_log.jsonl.

    Loss per step on the left axis, validation AUC on the right.
    """
    figure, left = plt.subplots(figsize=(7, 3), layout="constrained")
    losses = [(row["step"], row["loss"]) for row in log if "loss" in row]
    if losses:
        left.plot(*zip(*losses, strict=True), color=COLOURS[1], label="loss")
    left.set(xlabel="step", ylabel="loss")
    scored = [(row["step"], row["eval_auc"]) for row in log if "eval_auc" in row]
    lines = list(left.lines)
    if scored:
        right = left.twinx()
        lines += right.plot(
            *zip(*scored, strict=True), "o-", color=COLOURS[0], label="validation AUC"
        )
        right.set(ylabel="validation AUC", ylim=(0.4, 1))
        epoch, (step, _) = max(enumerate(scored, start=1), key=lambda found: found[1][1])
        label = f"best validation, epoch {epoch}"
        lines.append(left.axvline(step, color="#999", linestyle=":", label=label))
    left.legend(handles=lines, frameon=False, loc="center right")
    return png(figure)


def png(figure: Any, dpi: int = 110) -> bytes:
    """A figure as the bytes of a PNG; it is closed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    plt.close(figure)
    return buffer.getvalue()
