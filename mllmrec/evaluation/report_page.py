"""The contents of report.html: tables, plots, and the data that report.js shows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from mllmrec.data.images import encoded_url
from mllmrec.evaluation import plots
from mllmrec.evaluation.metrics import SHOWN, ranking_scores
from mllmrec.evaluation.report_data import RunFiles, as_script
from mllmrec.stage.jsonl import read_rows
from mllmrec.stage.record import read_record

FOLDER = Path(__file__).parent
PLOTTED = 3  # variants with curves, the first ones


def stage_rows(stages: Sequence[tuple[str, Path]]) -> list[tuple[str, str, str, str]]:
    """[(stage, seconds, rows, device)] from the run records; "not run" where there is none.

    stages: (name, its main output).
    """
    rows = []
    for stage, output in stages:
        record = read_record(output)
        if record is None:
            rows.append((stage, "not run", "", ""))
            continue
        counts = ", ".join(f"{n:,} {key.replace('_', ' ')}" for key, n in record["rows"].items())
        if "texts" in record:  # see text_quality
            counts += "; " + ", ".join(
                f"{name.replace('_', ' ')} {value:,}" for name, value in record["texts"].items()
            )
        rows.append((stage, f"{record['seconds']:,.1f}", counts, record["device"]))
    return rows


def run_facts(files: RunFiles) -> dict[str, str]:
    """What the page is about: model, seed, config, commit, date and device of the main variant."""
    path = next(iter(files.scores.values()), None)
    record = (read_record(path) if path else None) or {}
    arguments = record.get("arguments", {})
    found = {
        "model": arguments.get("model"),
        "seed": arguments.get("seed"),
        "config": record.get("config"),
        "commit": record.get("git_commit"),
        "date": record.get("date"),
        "device": record.get("device"),
    }
    return {name: str(value) if value is not None else "not run" for name, value in found.items()}


def plot_urls(files: RunFiles) -> dict[str, str]:
    """dict heading -> PNG as a data: URL."""
    pooled, p_yes = {}, {}
    for variant, path in list(files.scores.items())[:PLOTTED]:
        rows = read_rows(path)
        labels, p_yes[variant] = [row["label"] for row in rows], [row["score"] for row in rows]
        pooled[variant] = (labels, ranking_scores(rows))
    images = {}
    if pooled:
        main = next(iter(pooled))
        histogram = plots.histogram(pooled[main][0], p_yes[main])
        images = {"ROC": plots.roc(pooled), f"Scores of {main}": histogram}
    log = files.system_dir / "training_log.jsonl"
    if log.exists():
        images["Training"] = plots.training_curve(read_rows(log))
    return {name: encoded_url("image/png", png) for name, png in images.items()}


def render_page(data: Mapping[str, Any] | None, **values: Any) -> str:
    """report.html.j2, filled; every value is escaped. data: of `report_data`, for report.js."""
    environment = Environment(autoescape=True, loader=FileSystemLoader(FOLDER))
    return environment.get_template("report.html.j2").render(
        names=[name.upper() for name in SHOWN],
        style=(FOLDER / "report.css").read_text(encoding="utf-8"),
        script=(FOLDER / "report.js").read_text(encoding="utf-8"),
        data=as_script(data) if data else None,
        **values,
    )
