"""Stage 7, second half: one page to look at, report.html, and its tables as report.md.

In:  everything in {output_dir}, and {data_dir}/users.jsonl, items.jsonl
Out: {output_dir}/report.html   self-contained, opens offline
     {output_dir}/report.md     the tables

    python MLLM-MSR/test/report.py --config configs/microlens.yaml

It shows the run's metrics beside the paper's and independent re-runs' (`published.yaml`), ROC curve, score histogram,
training curve, where the time went, and for a dozen users the story: covers of the history, the preference after each
block, and the candidates in rank order; users can be filtered and picked, `report.html#user-17` opens at one.
CPU, seconds.
"""

import base64
import io
import json
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

from data_processing.config import CommonArgs, option, parse_args, show
from data_processing.errors import InputError, run
from data_processing.images import ImageError, open_image
from data_processing.jsonl import read_by_id, read_rows, require, whole_file
from data_processing.metrics import SHOWN
from data_processing.run_record import digests, is_up_to_date, record_path, settings_of, write_record

STAGES = (
    ("1 data", "users.jsonl"), ("2 image summaries", "image_summaries.jsonl"), ("3 preferences", "user_preferences.jsonl"),
    ("4 pairs", "train.jsonl"), ("5 training", "adapter"), ("6 scoring", "sft/scores.jsonl"),
)  # fmt: skip


@dataclass
class Args(CommonArgs):
    published: str = option("", "compare with the published rows for: microlens, amazon_games or amazon_baby")
    users: int = option(12, "users whose story is told")


def metric_rows(metrics, published):
    """[(system, source, cells)]: this run's variants, then the published rows; cells are texts, «not run» what is missing."""
    rows = []
    for variant, found in metrics.items():
        cells = []
        for name in SHOWN:
            interval = found.get(f"{name}_ci95")
            half = f" ± {50 * (interval[1] - interval[0]):.2f}" if interval else ""
            cells.append(f"{100 * found[name]:.2f}{half}")
        rows.append((variant, f"this run, {found['users']:,} users", cells))
    for variant in ("zero_shot", "sft"):
        if variant not in metrics:
            rows.append((variant, "this run", ["not run"] * len(SHOWN)))
    for system, source, *values in published:
        rows.append((system, source, [f"{value:.2f}" for value in values] + ["-"]))
    return rows


def stage_rows(args):
    """[(stage, seconds, rows, device)] from the run records; «not run» where there is none."""
    rows = []
    for stage, name in STAGES:
        folder = args.data_dir if stage.startswith("1") else args.output_dir
        path = record_path(Path(folder) / name)
        if not path.exists():
            rows.append((stage, "not run", "", ""))
            continue
        record = json.loads(path.read_text(encoding="utf-8"))
        counts = ", ".join(f"{value:,} {key.replace('_', ' ')}" for key, value in record["rows"].items())
        rows.append((stage, f"{record['seconds']:,.1f}", counts, record["device"]))
    return rows


def read_published(name):
    """[(system, source, AUC, HR@5, MRR@5)] of one data set, x100. Raises InputError for an unknown one."""
    known = yaml.safe_load((Path(__file__).parent / "published.yaml").read_text(encoding="utf-8"))
    if name and name not in known:
        raise InputError(f"there are no published results for {name!r}; choose one of: {', '.join(known)}")
    return known.get(name, [])


def pictures(folder, variants):
    """dict heading -> PNG as a data: URL. variants: those of which the curves are drawn, the main one first."""
    from data_processing import figures

    pooled = {}
    for variant in variants:
        rows = read_rows(folder / variant / "scores.jsonl")
        pooled[variant] = ([row["label"] for row in rows], [row["score"] for row in rows])
    found = {"ROC": figures.roc(pooled), f"Scores of {variants[0]}": figures.histogram(*pooled[variants[0]])} if variants else {}
    log = folder / "training_log.jsonl"
    if log.exists():
        found["Training"] = figures.training(read_rows(log))
    return {name: data_url("image/png", png) for name, png in found.items()}


def stories(args, variant):
    """The first users of the test set, as the page shows them."""
    users = read_by_id(Path(args.data_dir) / "users.jsonl", "user_id")
    items_path = Path(args.data_dir) / "items.jsonl"
    items = read_by_id(items_path, "item_id")
    preferences = read_by_id(Path(args.output_dir) / "user_preferences.jsonl", "user_id")
    lists = {}
    for row in read_rows(Path(args.output_dir) / variant / "scores.jsonl"):
        lists.setdefault(row["user_id"], []).append(row)

    def shown(item_id):
        item = items[item_id]
        picture = thumbnail(items_path.parent / item["image"]) if item["image"] else None
        return {"title": item["title"], "picture": picture}

    told = []
    for user_id in list(lists)[: args.users]:
        ranked = sorted(lists[user_id], key=lambda row: -row["score"])
        blocks = preferences[user_id]["blocks"]
        told.append(
            {
                "user_id": user_id,
                "left_out": users[user_id]["history"][: preferences[user_id].get("items_left_out", 0)],
                "blocks": [{"items": [shown(i) for i in block["items"]], "preference": block["preference"]} for block in blocks],
                "candidates": [{**shown(row["item_id"]), "score": row["score"], "label": row["label"]} for row in ranked],
            }
        )
    return told


def thumbnail(path):
    """A small JPEG of the picture as a data: URL, or None if it cannot be opened."""
    try:
        image = open_image(path)
    except ImageError:
        return None
    image.thumbnail((96, 96))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=80)
    return data_url("image/jpeg", buffer.getvalue())


def data_url(kind, content):
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def as_markdown(rows, stages):
    """report.md: the two tables."""
    lines = ["# Report", "", "Metrics x100, with half the width of the 95% interval over users.", ""]
    lines += ["| system | source | " + " | ".join(name.upper() for name in SHOWN) + " |", "|---|---|" + "---:|" * len(SHOWN)]
    lines += [f"| {system} | {source} | {' | '.join(cells)} |" for system, source, cells in rows]
    lines += ["", "| stage | seconds | rows | device |", "|---|---:|---|---|"]
    return "\n".join(lines + [f"| {' | '.join(stage)} |" for stage in stages]) + "\n"


def main(argv=None):
    started = time.monotonic()
    args = parse_args(Args, "report", argv, __doc__)
    show(args, "stage 7, report")
    published = read_published(args.published)
    folder = Path(args.output_dir)
    metrics_path = require(folder / "metrics.json", maker="scripts/07_report.sh")
    outputs = [folder / "report.html", folder / "report.md"]
    shown = [Path(args.data_dir) / "users.jsonl", Path(args.data_dir) / "items.jsonl", folder / "user_preferences.jsonl"]
    settings, inputs = settings_of(args), digests(metrics_path, folder / "training_log.jsonl", *shown)
    if is_up_to_date(outputs, settings, inputs, args.overwrite):
        print(f"{outputs[0]} is up to date, nothing to do")
        return
    from jinja2 import Environment

    metrics = json.loads(metrics_path.read_text(encoding="utf-8"))
    rows, stages = metric_rows(metrics, published), stage_rows(args)
    drawn = [variant for variant in ("sft", "zero_shot", "popularity") if (folder / variant / "scores.jsonl").exists()]
    template = Environment(autoescape=True).from_string((Path(__file__).parent / "report.html.j2").read_text(encoding="utf-8"))
    page = template.render(
        names=[name.upper() for name in SHOWN], rows=rows, stages=stages, pictures=pictures(folder, drawn),
        stories=stories(args, drawn[0]) if drawn else [], variant=drawn[0] if drawn else None, output_dir=args.output_dir,
    )  # fmt: skip
    for path, text in zip(outputs, (page, as_markdown(rows, stages)), strict=True):
        with whole_file(path) as file:
            file.write(text.encode())
    write_record(outputs[0], args, settings, inputs, time.monotonic() - started, {"variants": len(metrics)})
    print(f"wrote {outputs[0]} and {outputs[1]}")


if __name__ == "__main__":
    run(main)
