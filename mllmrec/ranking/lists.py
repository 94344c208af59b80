"""Rows about a list of candidates, for rankers that answer with a letter (MLLM4Rec)."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mllmrec.data.candidates import users_of_split
from mllmrec.data.summaries import read_summaries
from mllmrec.evaluation.metrics import evaluate
from mllmrec.models.chat import ChatProcessor
from mllmrec.prompts import mllm4rec as prompts
from mllmrec.prompts.templates import assistant_turn, plain_text, user_turn
from mllmrec.ranking.list_options import ListOptions
from mllmrec.ranking.questions import list_row
from mllmrec.ranking.reader import TEMPLATE_TOKENS
from mllmrec.ranking.rows import LETTER_ANSWERS, EpochRows
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import PathLike, read_by_id, read_rows, write_json, write_rows
from mllmrec.stage.output import WholeOutput
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
                f"{len(candidates)} candidates are more than the {len(self.letters)} letters; list "
                f"at most {len(self.letters)} (--retrieved of the retriever, or --negatives)"
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


def list_format(texts: Mapping[str, str], chat: ChatProcessor, options: ListOptions) -> ListFormat:
    """How the options say that questions are worded; their length is counted for the model.

    texts: see `item_texts`. Raises InputError if the data set's role is not known.
    """
    if options.role and not options.dataset_code:
        raise InputError(
            f"the config {options.config} is not called like a data set, so the role is unknown; "
            f"pass --dataset_code {'|'.join(prompts.ROLES)} or --role false"
        )
    role = prompts.ROLES[options.dataset_code] if options.role else ""
    fits = partial(_fits, chat=chat, longest=options.max_text_tokens)
    return ListFormat(texts, LETTER_ANSWERS, role, options.hybrid, options.max_history, fits)


def _fits(question: str, chat: ChatProcessor, longest: int) -> bool:
    """Whether a question has at most `longest` tokens; 0: any number."""
    if not longest or len(question.encode()) + TEMPLATE_TOKENS <= longest:
        return True  # no token is shorter than a byte
    return chat.count(chat.render([user_turn(question)])) <= longest


def item_texts(
    items_path: PathLike, captions_path: PathLike | None, tokenizer: Any, max_tokens: int
) -> dict[str, str]:
    """item id -> its title, and a caption behind it if there is one, each cut to `max_tokens`.

    captions_path: of image_summaries.jsonl, which may lack items; None: titles only; tokenizer: a
    fast one, it says where a token ends.
    """
    items = read_by_id(items_path, "item_id")
    captions: dict[str, str] = {}
    if captions_path:
        captions = read_summaries(Path(captions_path), items, items_path, items)
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


class PrefixRows(EpochRows):
    """Training rows: an item that a user had is the target, after those before it.

    `train_rows: prefixes` makes a row of every item from the second on, as the released code does,
    `last` of the last one. The other candidates are random items that the user's line lacks, the
    target stands at a random place: both are drawn again in each epoch, from seed, epoch and row
    alone. A row is made when it is asked for; written out, those of Beauty would be half a
    gigabyte.

    users: lines of train_users.jsonl. Raises InputError if the catalogue is too small for the
    lists, or their texts for the prompt.
    """

    def __init__(self, users: Sequence[Row], list_format: ListFormat, options: ListOptions) -> None:
        super().__init__()
        self.users, self.list_format, self.options = users, list_format, options
        self.items = list(list_format.texts)
        ends = np.array([len(user["item_ids"]) for user in users], dtype=int)
        starts = ends - 1 if options.train_rows == "last" else np.ones_like(ends)
        counts = ends - starts
        self.user = np.repeat(np.arange(len(users)), counts)
        self.place = np.arange(counts.sum()) - np.repeat(counts.cumsum() - ends, counts)
        most = max((len(set(user["item_ids"])) for user in users), default=0)
        if len(self.items) - most < options.candidates - 1:
            raise InputError(
                f"the catalogue has {len(self.items)} items and a user {most} of them, so that "
                f"{options.candidates - 1} negatives cannot be drawn; lower --candidates"
            )
        longest = sorted(self.items, key=lambda item: -len(list_format.texts[item]))
        if not list_format.fits(list_format.question([], longest[: options.candidates])):
            raise InputError(
                f"{options.candidates} items without a history may be longer than "
                f"{options.max_text_tokens} tokens; raise --max_text_tokens, or lower --candidates "
                "or --text_tokens"
            )

    def __len__(self) -> int:
        return len(self.user)

    def __getitem__(self, index: int) -> Row:  # type: ignore[override]
        rng = np.random.default_rng([self.options.seed, 5, self.epoch, index])
        user, place = self.users[self.user[index]], int(self.place[index])
        had, items = set(user["item_ids"]), self.items
        drawn: dict[str, None] = {}
        while len(drawn) < self.options.candidates - 1:
            more = (items[n] for n in rng.integers(len(items), size=self.options.candidates))
            drawn |= dict.fromkeys(item for item in more if item not in had)
        listed = [user["item_ids"][place], *list(drawn)[: self.options.candidates - 1]]
        row = _row(user["user_id"], user["item_ids"][:place], listed, 0, self.list_format, rng)
        if self.options.control == "shuffled_labels":
            label = int(rng.integers(len(listed)))
            answer = assistant_turn(self.list_format.letters[label])
            row |= {"label": label, "messages": [row["messages"][0], answer]}
        return row

    def lengths(self) -> list[int]:
        """How many items each row's history lists, which its tokens grow with."""
        return np.minimum(self.place, self.list_format.max_history).tolist()


def training_users(users: Iterable[Row]) -> list[Row]:
    """Lines of train_users.jsonl: the items of each training line of users.jsonl, oldest first."""
    return [
        {"user_id": user["user_id"], "item_ids": [*user["history"], user["target"]]}
        for user in users_of_split(users, "train")
    ]


def list_rows(
    lists: Iterable[Row],
    users: Iterable[Row],
    list_format: ListFormat,
    rng: np.random.Generator | None,
    with_answer: bool,
) -> list[Row]:
    """Rows about the lists that have their target.

    lists: lines of candidates.jsonl; users: lines of users.jsonl of the same split; rng: for a
    random order of the candidates; None: the retriever's, so that a letter tells its rank.
    """
    rows, by_id = [], {user["user_id"]: user for user in users}
    for line in lists:
        user = by_id[line["user_id"]]
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
    rng: np.random.Generator | None,
) -> Row:
    """One row with its answer. label: place of the target in `listed`; rng: to shuffle that."""
    order = list(range(len(listed))) if rng is None else rng.permutation(len(listed)).tolist()
    shuffled = [listed[place] for place in order]
    question = list_format.question(history, shuffled)
    return list_row(user_id, shuffled, question, order.index(label), list_format.letters)


def write_overall_lists(
    ranked_path: Path, retrieved_path: Path, output: WholeOutput
) -> dict[str, dict[str, Any]]:
    """Write the lists of all test users, the ranker's where it ranked; return their metrics.

    ranked_path, retrieved_path: scores.jsonl of the ranker and of the retriever; output: the new
    scores.jsonl and metrics.json, and the ranker's lists in the retriever's order and at random.
    """
    ranked, retrieved = read_rows(ranked_path), read_rows(retrieved_path)
    users = {row["user_id"] for row in ranked}
    same_lists = [row for row in retrieved if row["user_id"] in users]
    overall = ranked + [row for row in retrieved if row["user_id"] not in users]
    scores_path, metrics_path, retriever_order, random_order = output.outputs
    output.begin()
    write_rows(scores_path, overall)
    write_rows(retriever_order, same_lists)
    # Ties count as a random order does on average.
    write_rows(random_order, ({**row, "score": 0.0} for row in same_lists))
    metrics = {
        "retriever": evaluate(retrieved, retrieved_path, retrieved=True),
        "retriever_on_ranked": evaluate(same_lists, retriever_order),
        "ranker_on_ranked": evaluate(ranked, ranked_path),
        "overall": evaluate(overall, scores_path, retrieved=True),
    }
    write_json(metrics_path, metrics)
    n_users = len({row["user_id"] for row in retrieved})
    output.finish({"users": n_users, "ranked": len(users)}, metrics=metrics)
    return metrics
