"""The contents of report.html: tables, plots, and some users' whole path to their ranking."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment

from mllmrec.data.candidates import read_users, users_of_split
from mllmrec.data.images import (
    ImageError,
    check_item_images,
    data_url,
    encoded_url,
    open_image,
)
from mllmrec.evaluation import plots
from mllmrec.evaluation.metrics import SHOWN, ranking_scores
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import read_by_id, read_rows
from mllmrec.stage.record import read_record
from mllmrec.stage.schema import Row

TEMPLATE = Path(__file__).parent / "report.html.j2"
THUMBNAIL = (96, 96)  # pixels


@dataclass
class RunFiles:
    """Where the files of a run are.

    scores: variant -> scores.jsonl, the main variant first; image_roots: see CommonOptions.
    """

    data_dir: Path
    system_dir: Path
    scores: Mapping[str, Path]
    image_roots: Sequence[str] = ()


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
    for variant, path in files.scores.items():
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


def user_examples(files: RunFiles, n_users: int) -> list[dict[str, Any]]:
    """The first users of the main variant: history, preference by block, ranked candidates."""
    if not files.scores:
        return []
    users_path, items_path = files.data_dir / "users.jsonl", files.data_dir / "items.jsonl"
    preferences_path = files.system_dir / "user_preferences.jsonl"
    scores_path = next(iter(files.scores.values()))
    test_users = users_of_split(read_users(users_path), "test")
    users = {user["user_id"]: user for user in test_users}
    items = read_by_id(items_path, "item_id")
    check_item_images(items, items_path, files.data_dir, files.image_roots)
    preferences = _read_preferences(preferences_path)
    lists: dict[str, list[tuple[float, Row]]] = {}
    rows = read_rows(scores_path)
    for score, row in zip(ranking_scores(rows), rows, strict=True):
        lists.setdefault(row["user_id"], []).append((score, row))

    def shown(item_id: str, named_by: Path) -> dict[str, Any]:
        item = _known(item_id, items, items_path, named_by)
        image = _thumbnail(items_path.parent / item["image"]) if item["image"] else None
        return {"title": item["title"], "image": image}

    examples = []
    for user_id in list(lists)[:n_users]:
        history = _known(user_id, users, users_path, scores_path)["history"]
        # A system without preferences: the history as one block.
        whole = {"blocks": [{"items": history, "preference": ""}]}
        preference = preferences.get(user_id, whole)
        named_by = preferences_path if user_id in preferences else users_path
        ranked = sorted(lists[user_id], key=lambda listed: -listed[0])
        left_out = preference.get("items_left_out", 0)
        examples.append(
            {
                "user_id": user_id,
                "left_out": history[:left_out],
                "blocks": [
                    {**block, "items": [shown(i, named_by) for i in block["items"]]}
                    for block in preference["blocks"]
                ],
                "candidates": [
                    {
                        **shown(row["item_id"], scores_path),
                        "score": row["score"],
                        "label": row["label"],
                    }
                    for _, row in ranked
                ],
            }
        )
    return examples


def _known(row_id: str, rows: Mapping[str, Row], path: Path, named_by: Path) -> Row:
    """The row of an id. Raises InputError if `path`, where the rows are from, has none."""
    if row_id not in rows:
        raise InputError(
            f"{named_by} names {row_id!r}, which is not in {path}; the two are not of one run, "
            "make the first again"
        )
    return rows[row_id]


def _read_preferences(path: Path) -> dict[str, Row]:
    """user_id -> line of user_preferences.jsonl for the test; empty if there is no file."""
    rows = read_rows(path) if path.exists() else []
    # Leave-one-out: one line per user and split.
    return {row["user_id"]: row for row in rows if row.get("split", "test") == "test"}


def render_page(**values: Any) -> str:
    """report.html.j2, filled; every value is escaped."""
    template = Environment(autoescape=True).from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(names=[name.upper() for name in SHOWN], **values)


def _thumbnail(path: Path) -> str | None:
    """A small JPEG of the image as a data: URL, or None if it cannot be opened."""
    try:
        image = open_image(path)
    except ImageError:
        return None
    image.thumbnail(THUMBNAIL)
    return data_url(image, "JPEG", quality=80)
