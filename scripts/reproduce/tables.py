"""A report of run.py as a table, and the files of a table."""

import csv
import io

from mllmrec.evaluation.metrics import SHOWN
from mllmrec.evaluation.result_tables import difference_cell, half_width
from mllmrec.stage.jsonl import atomic_file, write_json

RETRIEVED = ("hr@5", "ndcg@5", "mrr@5", "hr@10", "ndcg@10", "mrr@10")  # hr = recall
COMPARED = ("auc", "hr@5")  # metrics whose differences are in the table
COSTS = {
    "requests": "requests",
    "prompt": "prompt tokens",
    "image": "of these of images",
    "computed": "computed",
    "generated": "generated tokens",
    "seconds": "seconds",
}


def write_files(path, report, text, lines):
    """Write {path}.json, .md and .csv. text: the Markdown; lines: lists of cells."""
    write_json(f"{path}.json", report)
    buffer = io.StringIO()
    csv.writer(buffer).writerows(lines)
    for ending, content in (("md", text), ("csv", buffer.getvalue())):
        with atomic_file(f"{path}.{ending}") as file:
            file.write(content.encode())


def table_lines(report):
    """The table as lists of cells, the header first; rows that were not run say so."""
    shown = report.get("columns", SHOWN)
    header = ["row", *(name.upper() for name in shown)]
    header += [f"difference in {name.upper()}" for name in COMPARED] + ["compared with"]
    lines = [header]
    for row in report["rows"].values():
        differences = row.get("differences", {})
        lines.append(
            [
                row["label"],
                *(metric_cell(row["metrics"], name) for name in shown),
                *(difference_cell(differences[n]) if differences else "" for n in COMPARED),
                row.get("against", ""),
            ]
        )
    for label in report["not_run"].values():
        lines.append([label, *["not run"] * len(shown), *[""] * (len(COMPARED) + 1)])
    if not any("differences" in row for row in report["rows"].values()):
        lines = [line[: len(shown) + 1] for line in lines]
    return lines


def metric_cell(metrics, name):
    """A metric x100 with half of its 95% interval."""
    half = half_width(metrics, name)
    return f"{100 * metrics[name]:.1f}" + ("" if half is None else f" ± {half:.1f}")


def markdown(report):
    """What the figures are, and the table."""
    seeds = ", ".join(map(str, report["seeds"]))
    folds = report.get("folds", 0)
    several = len(report["seeds"]) > 1 or folds > 0
    kind = "folds" if folds else "seeds"
    mean = f"mean of the {f'{folds} folds, seed' if folds else 'seeds'} {seeds}"
    lines = table_lines(report)
    text = [
        f"Metrics x100, {mean}, ± half of the 95% interval over the {kind} (Student's t)."
        if several
        else f"Metrics x100, seed {seeds}, ± half of the 95% interval (bootstrap over users).",
    ]
    if "compared with" in lines[0]:
        note = f"no interval holds 0, nor does that over the {kind}" if several else "0 is outside"
        text.append(f"Differences: paired bootstrap over users, 95%; * {note}.")
    shown = report.get("columns", SHOWN)
    bars = "|---|" + "---:|" * len(shown) + "---:|---:|---|" * ("compared with" in lines[0])
    rows = [f"| {' | '.join(cells)} |" for cells in lines]
    text += ["", rows[0], bars, *rows[1:], ""]
    if any("costs" in row for row in report["rows"].values()):
        text += costs_table(report)
    return "\n".join(text)


def costs_table(report):
    """Lines of Markdown: what ranking one user's candidates takes, mean of the runs."""
    lines = [
        "Per test user; *computed*: prompt tokens where a prefix that prompts share is computed",
        "once; seconds of the stages on the device above, loading included.",
        "",
        f"| row | {' | '.join(COSTS.values())} |",
        "|---|" + "---:|" * len(COSTS),
    ]
    for row in report["rows"].values():
        means = (sum(run[name] for run in row["costs"]) / len(row["costs"]) for name in COSTS)
        cells = (f"{mean:,.{3 if mean < 1 else 0}f}" if mean else "0" for mean in means)
        lines.append(f"| {row['label']} | {' | '.join(cells)} |")
    return [*lines, ""]
