"""A report of run_table.py as a table and as a chart, and the files of a table."""

import csv
import io
from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from mllmrec.evaluation.metrics import SHOWN
from mllmrec.evaluation.plots import COLOURS, png
from mllmrec.evaluation.result_tables import difference_cell, half_width
from mllmrec.stage.jsonl import atomic_file, write_json

RETRIEVED = ("hr@5", "ndcg@5", "mrr@5", "hr@10", "ndcg@10", "mrr@10")  # hr = recall
COLD = ("auc_known", "hr@5_known", "auc_new", "hr@5_new")  # differences: of users of new items
COMPARED = ("auc", "hr@5")  # metrics whose differences are in the table
COMPARED_RETRIEVED = ("hr@5", "ndcg@5")  # of retrieved lists
COSTS = {
    "requests": "requests",
    "prompt": "prompt tokens",
    "image": "of these of images",
    "computed": "computed",
    "generated": "generated tokens",
    "seconds": "seconds",
}
Report = dict[str, Any]


def write_files(path: Path, report: Report, text: str, lines: list[list[str]]) -> None:
    """Write {path}.json, .md and .csv. text: the Markdown; lines: lists of cells."""
    write_json(f"{path}.json", report)
    buffer = io.StringIO()
    csv.writer(buffer).writerows(lines)
    for ending, content in (("md", text), ("csv", buffer.getvalue())):
        with atomic_file(f"{path}.{ending}") as file:
            file.write(content.encode())


def table_lines(report: Report) -> list[list[str]]:
    """The table as lists of cells, the header first; rows that were not run say so."""
    shown = report.get("columns", SHOWN)
    compared = COMPARED_RETRIEVED if "ndcg@10" in shown else COMPARED
    header = ["row", *(name.upper() for name in shown)]
    header += [f"difference in {name.upper()}" for name in compared] + ["compared with"]
    lines = [header]
    for row in report["rows"].values():
        differences = row.get("differences", {})
        cells = [metric_cell(row["metrics"], name) for name in shown]
        cells += [difference_cell(differences[n]) if differences else "" for n in compared]
        lines.append([row["label"], *cells, row.get("against", "")])
    for label in report["not_run"].values():
        lines.append([label, *["not run"] * len(shown), *[""] * (len(compared) + 1)])
    if not any("differences" in row for row in report["rows"].values()):
        lines = [line[: len(shown) + 1] for line in lines]
    return lines


def markdown_table(lines: list[list[str]], texts: int = 1) -> list[str]:
    """Lines of Markdown. lines: of cells, the header first; the first `texts` columns are texts."""
    rows = [f"| {' | '.join(cells)} |" for cells in lines]
    return [rows[0], "|" + "---|" * texts + "---:|" * (len(lines[0]) - texts), *rows[1:]]


def metric_cell(metrics: Mapping[str, Any], name: str) -> str:
    """A metric x100 with half of its 95% interval."""
    half = half_width(metrics, name)
    return f"{100 * metrics[name]:.1f}" + ("" if half is None else f" ± {half:.1f}")


def markdown(report: Report) -> str:
    """What the figures are, and the table."""
    seeds, folds = ", ".join(map(str, report["seeds"])), report.get("folds", 0)
    lines = table_lines(report)
    if len(report["seeds"]) > 1 or folds:
        kind = "folds" if folds else "seeds"
        mean = f"mean of the {f'{folds} folds, seed' if folds else 'seeds'} {seeds}"
        interval = f"over the {kind} (Student's t)"
        note = f"no interval holds 0, nor does that over the {kind}"
    else:
        mean, interval, note = f"seed {seeds}", "(bootstrap over users)", "0 is outside"
    text = [f"Metrics x100, {mean}, ± half of the 95% interval {interval}."]
    rows = markdown_table(lines)
    if "compared with" in lines[0]:
        text.append(f"Differences: paired bootstrap over users, 95%; * {note}.")
        rows[1] = rows[1].removesuffix("---:|") + "---|"
    text += ["", *rows, ""]
    if any("costs" in row for row in report["rows"].values()):
        text += costs_table(report)
    return "\n".join(text)


def mean_cost(row: Mapping[str, Any], name: str) -> float:
    """Mean over a row's runs of what a user takes. name: of COSTS."""
    return float(sum(run[name] for run in row["costs"]) / len(row["costs"]))


def costs_table(report: Report) -> list[str]:
    """Lines of Markdown: what ranking one user's candidates takes, mean of the runs."""
    lines = [["row", *COSTS.values()]]
    for row in report["rows"].values():
        means = [mean_cost(row, name) for name in COSTS]
        cells = [f"{mean:,.{3 if mean < 1 else 0}f}" if mean else "0" for mean in means]
        lines.append([row["label"], *cells])
    return [
        "Per test user; *computed*: prompt tokens where a prefix that prompts share is computed",
        "once; seconds of the stages on the device above, loading included.",
        "",
        *markdown_table(lines),
        "",
    ]


def dot_chart(report: Report) -> bytes:
    """A PNG: a panel per metric, a line per row; the bars are the 95% intervals, x100."""
    rows, names = list(report["rows"].values()), report["columns"][:3]
    size = (10, 1 + 0.32 * len(rows))
    figure, panels = plt.subplots(1, len(names), sharey=True, figsize=size, layout="constrained")
    for axes, name, colour in zip(panels, names, COLOURS, strict=False):
        values = [100 * row["metrics"][name] for row in rows]
        halves = [half_width(row["metrics"], name) or 0.0 for row in rows]
        axes.errorbar(values, range(len(rows)), xerr=halves, fmt="o", color=colour, capsize=3)
        axes.set(title=f"{name.upper()} x100")
        axes.grid(axis="x", color="#ddd")
    panels[0].set_yticks(range(len(rows)), [row["label"] for row in rows])
    panels[0].invert_yaxis()
    return png(figure, dpi=120)


def cost_chart(report: Report) -> bytes:
    """A PNG: AUC over the seconds that one user takes, a point per row with its 95% interval."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for row, marker in zip(report["rows"].values(), cycle("osD^v<>Pp*"), strict=False):
        auc, half = 100 * row["metrics"]["auc"], half_width(row["metrics"], "auc") or 0.0
        seconds, words = mean_cost(row, "seconds"), {"fmt": marker, "capsize": 3}
        axes.errorbar(seconds, auc, yerr=half, label=row["label"], **words)
    figure.legend(loc="outside right upper", frameon=False)
    axes.set(xscale="log", xlabel="seconds per user", ylabel="AUC x100")
    axes.set_ylim(max(0, axes.get_ylim()[0]), min(101, axes.get_ylim()[1]))
    axes.grid(color="#ddd")
    return png(figure, dpi=120)
