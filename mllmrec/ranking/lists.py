"""Rows about a list of candidates, for rankers that answer with a letter (MLLM4Rec)."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mllmrec.data.candidates import training_negatives
from mllmrec.prompts import mllm4rec as prompts
from mllmrec.prompts.templates import assistant_turn, plain_text
from mllmrec.ranking.questions import list_row
from mllmrec.stage.errors import InputError
from mllmrec.stage.schema import Row


@dataclass(frozen=True)
class ListFormat:
    """How a question about a list is worded.

    texts: item id -> its text, see `item_texts`; letters: one per candidate; role: "" leaves it
    out; hybrid: False leaves the words of the instruction out; max_history: last items that are
    listed; fits: False for a question that is too long, which then loses the oldest items.
    counts["shortened"]: questions that did.
    """

    texts: Mapping[str, str]
    letters: Sequence[str]
    role: str
    hybrid: bool = True
    max_history: int = 20
    fits: Callable[[str], bool] = lambda question: True
    counts: Counter[str] = field(default_factory=Counter)

    def question(self, history: Sequence[str], candidates: Sequence[str]) -> str:
        """The text of a question, the history's oldest items left out until it fits.

        Without any history if nothing fits; `RowReader` rejects such a question. Raises InputError
        for more candidates than letters.
        """
        if len(candidates) > len(self.letters):
            raise InputError(
                f"{len(candidates)} candidates are more than the {len(self.letters)} letters; "
                f"list at most {len(self.letters)} (--retrieved of the retriever, or --negatives)"
            )
        shown = list(history[-self.max_history :])
        text = self._text(shown, candidates)
        if not self.fits(text):
            self.counts["shortened"] += 1
            while shown and not self.fits(text):
                del shown[0]
                text = self._text(shown, candidates)
        return text

    def _text(self, shown: Sequence[str], candidates: Sequence[str]) -> str:
        numbered = (f"{n}. {self.texts[item]}" for n, item in enumerate(shown, start=1))
        lettered = (
            f"{letter}. {self.texts[item]}"
            for letter, item in zip(self.letters, candidates, strict=False)
        )
        lists = {"history": "\n".join(numbered), "candidates": "\n".join(lettered)}
        role = prompts.ROLE.format(role=self.role) if self.role else ""
        template = prompts.INSTRUCTION if self.hybrid else prompts.BARE
        return role + template.format(**lists)


def item_texts(
    items: Mapping[str, Row], captions: Mapping[str, str], tokenizer: Any, max_tokens: int
) -> dict[str, str]:
    """item id -> its title, and a caption behind it if there is one, each cut to `max_tokens`.

    captions: item id -> text, may lack items; tokenizer: a fast one, it says where a token ends.
    """
    texts = {}
    for item_id, item in items.items():
        parts = [item["title"], captions.get(item_id, "")]
        cut = (cut_to_tokens(plain_text(part), tokenizer, max_tokens) for part in parts if part)
        texts[item_id] = ": ".join(filter(None, cut))
    return texts


def cut_to_tokens(text: str, tokenizer: Any, max_tokens: int) -> str:
    """The first `max_tokens` tokens of a text, as text."""
    if len(text.encode()) <= max_tokens:  # no token is shorter than a byte
        return text
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ends = [end for _, end in found["offset_mapping"]]
    return text if len(ends) <= max_tokens else text[: ends[max_tokens - 1]].rstrip()


def training_rows(
    users: Iterable[Row], list_format: ListFormat, how_many: int, rng: np.random.Generator
) -> list[Row]:
    """Rows with answers: the target among random negatives, at a random place.

    users: lines of users.jsonl; how_many: candidates of a row, the target included. Raises
    InputError for a line with fewer negatives.
    """
    rows = []
    for user in users:
        listed = [user["target"], *training_negatives(user, how_many - 1)]
        rows.append(_row(user["user_id"], user["history"], listed, 0, list_format, rng))
    return rows


def shuffle_labels(
    rows: Iterable[Row], letters: Sequence[str], rng: np.random.Generator
) -> list[Row]:
    """The rows with a random place as their label, and its letter as the answer."""
    shuffled = []
    for row in rows:
        label = int(rng.integers(len(row["item_ids"])))
        messages = [row["messages"][0], assistant_turn(letters[label])]
        shuffled.append({**row, "label": label, "messages": messages})
    return shuffled


def own_candidates(user: Row) -> Row:
    """The candidates of a line of users.jsonl, in the form of a line of candidates.jsonl."""
    listed = [user["target"], *user["negatives"]]
    return {
        "user_id": user["user_id"],
        "split": user["split"],
        "item_ids": listed,
        "has_target": True,
    }


def list_rows(
    lists: Iterable[Row],
    users: Mapping[str, Row],
    list_format: ListFormat,
    rng: np.random.Generator,
    with_answer: bool,
) -> list[Row]:
    """Rows about the lists that have their target, in a random order of candidates.

    lists: lines of candidates.jsonl; users: id -> line of users.jsonl of the same split. A random
    order, so that a letter does not tell the retriever's rank.
    """
    rows = []
    for line in lists:
        user = users[line["user_id"]]
        if line["has_target"]:
            listed = line["item_ids"]
            label = listed.index(user["target"])
            row = _row(user["user_id"], user["history"], listed, label, list_format, rng)
            rows.append(row if with_answer else {**row, "messages": row["messages"][:1]})
    return rows


def _row(
    user_id: str,
    history: Sequence[str],
    listed: Sequence[str],
    label: int,
    list_format: ListFormat,
    rng: np.random.Generator,
) -> Row:
    """One row with its answer, the candidates shuffled. label: place of the target in `listed`."""
    order = rng.permutation(len(listed)).tolist()
    shuffled = [listed[place] for place in order]
    question = list_format.question(history, shuffled)
    return list_row(user_id, shuffled, question, order.index(label), list_format.letters)
