"""Stage 7, second half: one page to look at, report.html, and its tables as report.md.

In:  everything in {output_dir}, and {data_dir}/users.jsonl, items.jsonl
Out: {output_dir}/report.html   self-contained, opens offline
     {output_dir}/report.md     the tables

    python MLLM-MSR/test/report.py --config configs/microlens.yaml

It shows the run's metrics beside the paper's and independent re-runs', the training curve, where the time went, and for
a dozen users the story: their history, the preference after each block, and their candidates in rank order.
CPU, seconds.
"""

import base64
import io
import json
import time
from dataclasses import dataclass
from pathlib import Path

from data_processing.config import CommonArgs, option, parse_args, show
from data_processing.errors import InputError, run
from data_processing.images import ImageError, open_image
from data_processing.jsonl import read_by_id, read_rows, require, whole_file
from data_processing.run_record import digests, is_up_to_date, record_path, settings_of, write_record

SHOWN = ("auc", "hr@5", "mrr@5", "ndcg@5")
# Published results, x100: data set -> [(system, source, AUC, HR@5, MRR@5)].
PUBLISHED = {
    "microlens": [
        ("LLaVA, no SFT", "paper, Table 3", 52.75, 28.21, 17.33),
        ("TALLREC", "paper, Table 3", 81.25, 71.23, 58.22),
        ("MLLM-MSR", "paper, Table 3", 83.17, 78.23, 60.38),
        ("LLaVA, no SFT", "re-run by MGRASRec's authors", 51.07, 25.60, 13.89),
        ("MLLM-MSR", "re-run by MGRASRec's authors", 82.16, 74.00, 48.30),
    ],
    "amazon_games": [
        ("LLaVA, no SFT", "paper, Table 3", 53.57, 33.24, 18.73),
        ("TALLREC", "paper, Table 3", 81.79, 72.36, 57.38),
        ("MLLM-MSR", "paper, Table 3", 84.39, 77.42, 63.25),
        ("LLaVA, no SFT", "re-run by MGRASRec's authors", 55.07, 30.40, 15.26),
        ("MLLM-MSR", "re-run by MGRASRec's authors", 83.61, 73.73, 53.72),
    ],
    "amazon_baby": [
        ("LLaVA, no SFT", "paper, Table 3", 55.86, 34.82, 20.96),
        ("TALLREC", "paper, Table 3", 82.16, 74.31, 60.15),
        ("MLLM-MSR", "paper, Table 3", 85.69, 79.58, 63.77),
        ("LLaVA, no SFT", "re-run by MGRASRec's authors", 52.27, 30.00, 14.99),
        ("MLLM-MSR", "re-run by MGRASRec's authors", 78.10, 62.00, 46.48),
    ],
}  # fmt: skip
STAGES = (
    ("1 data", "users.jsonl"), ("2 image summaries", "image_summaries.jsonl"), ("3 preferences", "user_preferences.jsonl"),
    ("4 pairs", "train.jsonl"), ("5 training", "adapter"), ("6 scoring", "sft/scores.jsonl"),
)  # fmt: skip


@dataclass
class Args(CommonArgs):
    published: str = option("", f"compare with the published rows for: {', '.join(PUBLISHED)}")
    users: int = option(12, "users whose story is told")


def metric_rows(metrics, published):
    """[(system, source, cells)]: this run's variants, then the published rows; cells are texts."""
    rows = []
    for variant, found in metrics.items():
        cells = []
        for name in SHOWN:
            interval = found.get(f"{name}_ci95")
            half = f" ± {50 * (interval[1] - interval[0]):.2f}" if interval else ""
            cells.append(f"{100 * found[name]:.2f}{half}")
        rows.append((variant, f"this run, {found['users']:,} users", cells))
    for system, source, *values in PUBLISHED.get(published, []):
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


def training_curve(path):
    """The training log as a PNG (bytes), or None: loss per step on the left axis, validation AUC on the right."""
    if not path.exists():
        return None
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    log = read_rows(path)
    figure, left = plt.subplots(figsize=(7, 3), layout="constrained")
    losses = [(row["step"], row["loss"]) for row in log if "loss" in row]
    left.plot(*zip(*losses, strict=True), color="#47a", label="loss") if losses else None
    left.set(xlabel="step", ylabel="loss")
    scored = [(row["step"], row["eval_auc"]) for row in log if "eval_auc" in row]
    if scored:
        right = left.twinx()
        right.plot(*zip(*scored, strict=True), "o-", color="#c60")
        right.set(ylabel="validation AUC", ylim=(0.4, 1))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return buffer.getvalue()


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
        told.append(
            {
                "user_id": user_id,
                "history": [shown(item_id) for item_id in users[user_id]["history"]],
                "blocks": preferences[user_id]["blocks"],
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
    if args.published and args.published not in PUBLISHED:
        raise InputError(f"there are no published results for {args.published!r}; choose one of: {', '.join(PUBLISHED)}")
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
    rows, stages = metric_rows(metrics, args.published), stage_rows(args)
    variant = next((name for name in ("sft", "zero_shot") if name in metrics), None)
    curve = training_curve(folder / "training_log.jsonl")
    template = Environment(autoescape=True).from_string((Path(__file__).parent / "report.html.j2").read_text(encoding="utf-8"))
    page = template.render(
        names=[name.upper() for name in SHOWN], rows=rows, stages=stages, curve=data_url("image/png", curve) if curve else None,
        stories=stories(args, variant) if variant else [], variant=variant, output_dir=args.output_dir,
    )  # fmt: skip
    for path, text in zip(outputs, (page, as_markdown(rows, stages)), strict=True):
        with whole_file(path) as file:
            file.write(text.encode())
    write_record(outputs[0], args, settings, inputs, time.monotonic() - started, {"variants": len(metrics)})
    print(f"wrote {outputs[0]} and {outputs[1]}")


if __name__ == "__main__":
    run(main)
