"""What rows must be before a model is loaded for them: of this data set, with answers that fit."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mllmrec.data.candidates import candidates, read_users, users_of_split
from mllmrec.data.images import ImageError, check_image_paths, image_digests, image_size
from mllmrec.prompts.templates import plain_text, turn_text
from mllmrec.ranking.rows import MAKE_AGAIN, YES_NO_ANSWERS, item_ids, question_text, row_name
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import PathLike, read_by_id, read_lines
from mllmrec.stage.options import CommonOptions
from mllmrec.stage.provenance import check_lines_source
from mllmrec.stage.record import read_record
from mllmrec.stage.schema import Row

logger = logging.getLogger(__name__)


def check_row_images(rows: Sequence[Row], path: Path, options: CommonOptions) -> None:
    """Raise InputError if an image of the rows of the file `path` lies outside its folders."""
    names = [name for row in rows for name in row["images"]]
    check_image_paths(names, path, options.data_dir, options.image_roots)


def check_training_rows(
    rows: Sequence[Row], path: PathLike, answers: Sequence[str] = YES_NO_ANSWERS
) -> dict[Path, tuple[int, int]]:
    """Check rows with answers before a model is loaded; return image path -> (width, height).

    Raises InputError naming the line for a question that is there twice, an unknown label, an
    answer that is not the label's, or an image without a readable header; the number of images is
    checked by the file's schema.
    """
    sizes: dict[Path, tuple[int, int]] = {}
    lines: dict[tuple[str, ...], int] = {}
    for number, row in enumerate(rows, start=1):
        where = f"{path}, line {number}"
        first = lines.setdefault((row["user_id"], *item_ids(row)), number)
        if first < number:
            raise InputError(f"{where}: {row_name(row)} is already in line {first}; {MAKE_AGAIN}")
        n_answers = len(item_ids(row)) if "item_ids" in row else 2
        label, most = row["label"], min(len(answers), n_answers)
        if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < most:
            allowed = "0 or 1" if most == 2 else f"0 to {most - 1}"
            raise InputError(f"{where}: the label is {label!r}, it must be {allowed}; {MAKE_AGAIN}")
        answer = "".join(turn_text(turn) for turn in row["messages"][1:])
        if answer != answers[label]:
            raise InputError(
                f"{where}: the answer is {answer[:40]!r}, for the label {label} it must "
                f"be {answers[label]!r}; {MAKE_AGAIN}"
            )
        for name in row["images"]:
            image = Path(path).parent / name
            if image not in sizes:
                sizes[image] = _readable_size(image, f"{where}: image {name}")
    return sizes


def row_inputs(preference: str, title: str, image_digest: str | None, label: int) -> list[Any]:
    """What a row about one candidate is made from, see `provenance`."""
    return [plain_text(preference), title, image_digest, label]


def check_rows_source(rows: Sequence[Row], path: Path, split: str, options: CommonOptions) -> None:
    """Raise InputError for the first row of the file `path` that does not fit what it is made from.

    It must be about a candidate of a user of `split`, with its label, and hold the preference, the
    title and the image that they have now. Without users.jsonl, as for rows from elsewhere, nothing
    can be compared, with a warning.
    """
    users_path, items_path = (Path(options.data_dir, f"{n}.jsonl") for n in ("users", "items"))
    if not (users_path.exists() and items_path.exists()):
        logger.warning(f"{path} is not compared with its data set: {users_path} is missing")
        return
    users, items = read_users(users_path), read_by_id(items_path, "item_id")
    labels = {u["user_id"]: dict(candidates(u)) for u in users_of_split(users, split)}
    preferences = _preferences_of(path, split)
    digests = image_digests(path.parent / name for row in rows for name in row["images"])
    inputs: dict[tuple[str, str], list[list[Any]]] = {}
    for number, row in enumerate(rows, start=1):
        user_id, item_id, label = row["user_id"], row["item_id"], row["label"]
        if labels.get(user_id, {}).get(item_id) != label or item_id not in items:
            raise InputError(
                f"{path}, line {number}: {row_name(row)} with the label {label} is no candidate of "
                f"a {split} user in {users_path}; {MAKE_AGAIN}"
            )
        start, end = row.get("preference_span", (0, 0))
        preference = question_text(row)[start:end]
        if preferences.get(user_id, preference) != preference:
            raise InputError(
                f"{path}, line {number}: {row_name(row)} has another preference than in "
                f"user_preferences.jsonl; {MAKE_AGAIN}"
            )
        digest = next((digests[path.parent / name] for name in row["images"]), None)
        own = row_inputs(preference, items[item_id]["title"], digest, label)
        inputs[user_id, item_id] = [own]
    lines = {(row["user_id"], row["item_id"]): row for row in rows}
    fault = f"made from another title or image than {items_path} names; {MAKE_AGAIN}"
    check_lines_source(lines, inputs, path, fault)


def _preferences_of(path: Path, split: str) -> dict[str, str]:
    """User id -> preference as rows hold it; empty where the file is not there any more.

    path: of the rows, whose record names another file than the one beside them, if it was read.
    """
    named = (read_record(path) or {}).get("arguments", {}).get("preferences")
    source = Path(named or path.with_name("user_preferences.jsonl"))
    if not source.exists():
        return {}
    return {
        row["user_id"]: plain_text(row["preference"])
        for _, row in read_lines(source)
        if row.get("split", split) == split
    }


def _readable_size(image: Path, where: str) -> tuple[int, int]:
    try:
        return image_size(image)
    except ImageError as reason:
        raise InputError(f"{where}: {reason}; restore it, or {MAKE_AGAIN}") from None
