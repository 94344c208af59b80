"""The report's figures, each as the bytes of a PNG: ROC curve, score histogram, training curve."""

import io

import matplotlib
import numpy as np
from sklearn.metrics import roc_curve

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = ("#c60", "#47a", "#2a7", "#a4a")


def roc(variants):
    """variants: dict name -> (labels, scores), pooled over all pairs as in the paper's AUC."""
    figure, axes = plt.subplots(figsize=(4, 4), layout="constrained")
    for colour, (name, (labels, scores)) in zip(COLOURS, variants.items(), strict=False):
        false_positive, true_positive, _ = roc_curve(labels, scores)
        axes.plot(false_positive, true_positive, color=colour, label=name)
    axes.plot([0, 1], [0, 1], ":", color="#999")
    axes.set(xlabel="share of negatives above the threshold", ylabel="share of positives above it", xlim=(0, 1), ylim=(0, 1))
    axes.legend(frameon=False, loc="lower right")
    return _png(figure)


def histogram(labels, scores):
    """How scores are spread over positives and over negatives; each of the two sums to one."""
    labels, scores = np.asarray(labels), np.asarray(scores)
    figure, axes = plt.subplots(figsize=(5, 4), layout="constrained")
    bins = np.linspace(scores.min(), max(scores.max(), scores.min() + 1e-9), 31)
    for label, name, colour in ((0, "negatives", COLOURS[1]), (1, "positives", COLOURS[0])):
        mine = scores[labels == label]
        axes.hist(mine, bins, weights=np.full(len(mine), 1 / max(len(mine), 1)), color=colour, alpha=0.6, label=name)
    axes.set(xlabel="score, p(yes)", ylabel="share of the pairs")
    axes.legend(frameon=False)
    return _png(figure)


def training(log):
    """log: rows of training_log.jsonl. Loss per step on the left axis, validation AUC on the right."""
    figure, left = plt.subplots(figsize=(7, 3), layout="constrained")
    losses = [(row["step"], row["loss"]) for row in log if "loss" in row]
    if losses:
        left.plot(*zip(*losses, strict=True), color=COLOURS[1], label="loss")
    left.set(xlabel="step", ylabel="loss")
    scored = [(row["step"], row["eval_auc"]) for row in log if "eval_auc" in row]
    if scored:
        right = left.twinx()
        right.plot(*zip(*scored, strict=True), "o-", color=COLOURS[0])
        right.set(ylabel="validation AUC", ylim=(0.4, 1))
    return _png(figure)


def _png(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return buffer.getvalue()
