"""A report of run.py as a chart."""

import io

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from mllmrec.evaluation.plots import COLOURS
from mllmrec.evaluation.result_tables import half_width


def dot_chart(report):
    """PNG bytes: a panel per metric, a line per row; the bars are the 95% intervals, x100."""
    rows = list(report["rows"].values())
    names = report["columns"][:3]
    figure, panels = plt.subplots(
        1, len(names), sharey=True, figsize=(10, 1 + 0.32 * len(rows)), layout="constrained"
    )
    for axes, name, colour in zip(panels, names, COLOURS, strict=False):
        values = [100 * row["metrics"][name] for row in rows]
        halves = [half_width(row["metrics"], name) or 0.0 for row in rows]
        axes.errorbar(values, range(len(rows)), xerr=halves, fmt="o", color=colour, capsize=3)
        axes.set(title=f"{name.upper()} x100")
        axes.grid(axis="x", color="#ddd")
    panels[0].set_yticks(range(len(rows)), [row["label"] for row in rows])
    panels[0].invert_yaxis()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()
