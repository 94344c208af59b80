"""The lines of train.jsonl, validation.jsonl and test.jsonl: questions about candidates.

A row about one candidate holds `item_id`, a row about a list of candidates `item_ids`; `label` is
the index of the right answer (see `answers`), null where a retrieved list lacks the target.
`images` may be empty. They are made in `questions.py` and checked in `row_checks.py`.
"""

from collections.abc import Sequence
from typing import Any

from mllmrec.prompts.templates import turn_text
from mllmrec.stage.schema import Row

YES_NO_ANSWERS = ("No", "Yes")
LETTER_ANSWERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")  # published: A to T, for 20 candidates
ANSWERS = {"yes_no": YES_NO_ANSWERS, "letters": LETTER_ANSWERS}
MAKE_AGAIN = "make the file again with scripts/04_datasets.sh"


class EpochRows(Sequence[Row]):
    """Training rows that are made when they are asked for, and are others in each epoch."""

    def __init__(self) -> None:
        self.epoch = 0


def replace_preference(row: Row, preference: str) -> Row:
    """A row with another preference in its question; answers are left out."""
    turn, (start, end) = row["messages"][0], row["preference_span"]
    *images, question = turn["content"]
    text = question["text"][:start] + preference + question["text"][end:]
    return {
        **row,
        "messages": [{**turn, "content": [*images, {"type": "text", "text": text}]}],
        "preference_span": [start, start + len(preference)],
    }


def question_text(row: Row) -> str:
    """The text of a row's question."""
    return turn_text(row["messages"][0])


def item_ids(row: Row) -> list[str]:
    """The candidates of a row, one or several."""
    return row["item_ids"] if "item_ids" in row else [row["item_id"]]


def row_name(row: Row) -> str:
    """A row as messages name it."""
    items = item_ids(row)
    if len(items) == 1:
        return f"user {row['user_id']!r}, item {items[0]!r}"
    return f"user {row['user_id']!r}"


def prefix_key(row: Row) -> tuple[Any, ...]:
    """Rows with the same key begin alike: with an image those of one item, else of one user."""
    if row["images"]:
        return (*item_ids(row), *row["images"])
    return ("user", row["user_id"])


def group_rows(rows: Sequence[Row]) -> list[list[int]]:
    """Indices of `rows`, grouped by `prefix_key`, groups in order of first appearance."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(prefix_key(row), []).append(index)
    return list(groups.values())


def first_users(rows: Sequence[Row], n: int) -> list[Row]:
    """The lines of the first `n` users, each with the whole candidate list; 0 = all."""
    users = set(list(dict.fromkeys(row["user_id"] for row in rows))[: n or None])
    return [row for row in rows if row["user_id"] in users]
