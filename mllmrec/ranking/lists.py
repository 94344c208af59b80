"""Rows about a list of candidates, for rankers that answer with a letter (MLLM4Rec)."""

from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mllmrec.data.candidates import training_negatives
from mllmrec.data.summaries import read_summaries
from mllmrec.evaluation.metrics import evaluate
from mllmrec.models.loading import load_processor
from mllmrec.prompts import mllm4rec as prompts
from mllmrec.prompts.templates import assistant_turn, plain_text, user_turn
from mllmrec.ranking.list_options import ListOptions
from mllmrec.ranking.questions import list_row
from mllmrec.ranking.reader import chat_processor
from mllmrec.ranking.rows import LETTER_ANSWERS
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import PathLike, read_by_id, read_rows, write_json, write_rows
from mllmrec.stage.output import WholeOutput
from mllmrec.stage.provenance import check_lines_source
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


def list_format(paths: Mapping[str, Path], options: ListOptions) -> ListFormat:
    """How the options say that questions are worded; their length is counted for the model.

    paths: see `ListOptions.input_paths`. Raises InputError if the data set's role is not known.
    """
    if options.role and not options.dataset_code:
        raise InputError(
            f"the config {options.config} is not called like a data set, so the role is unknown; "
            f"pass --dataset_code {'|'.join(prompts.ROLES)} or --role false"
        )
    chat = chat_processor(load_processor(options.model, options), options)
    tokens = options.text_tokens
    texts = item_texts(paths["items"], paths.get("captions"), chat.tokenizer, tokens)

    def fits(question: str) -> bool:
        longest = options.max_text_tokens
        return not longest or chat.count(chat.render([user_turn(question)])) <= longest

    role = prompts.ROLES[options.dataset_code] if options.role else ""
    return ListFormat(texts, LETTER_ANSWERS, role, options.hybrid, options.max_history, fits)


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


def read_candidates(path: Path, users: Sequence[Row], items: Container[str]) -> list[Row]:
    """The lines of candidates.jsonl.

    users: lines of users.jsonl; items: known ids. Raises InputError for the first line that is not
    about their histories and targets, or names another item.
    """
    lines = read_by_id(path, ("user_id", "split"))
    known = {(user["user_id"], user["split"]): user for user in users}
    fault = "the list is of another users.jsonl; run MLLM4Rec/train_retriever.py again"
    for number, (key, line) in enumerate(lines.items(), start=1):
        listed, user = line["item_ids"], known.get(key)
        is_own = user is not None and line["has_target"] == (user["target"] in listed)
        if not is_own or not all(item in items for item in listed):
            raise InputError(f"{path}, line {number} ({' '.join(key)}): {fault}")
    inputs = {key: [[user["history"], user["target"]]] for key, user in known.items()}
    check_lines_source(lines, inputs, path, fault)
    return list(lines.values())


def list_rows(
    lists: Iterable[Row],
    users: Iterable[Row],
    list_format: ListFormat,
    rng: np.random.Generator,
    with_answer: bool,
) -> list[Row]:
    """Rows about the lists that have their target, in a random order of candidates.

    lists: lines of candidates.jsonl; users: lines of users.jsonl of the same split. A random order,
    so that a letter does not tell the retriever's rank.
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
    rng: np.random.Generator,
) -> Row:
    """One row with its answer, the candidates shuffled. label: place of the target in `listed`."""
    order = rng.permutation(len(listed)).tolist()
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
