"""How many tokens a stage sends through its model, before or after it has run.

Prompts are rendered by the stage's own code from the files that exist. Where a text is not yet
written, a stand-in of `max_new_tokens` tokens takes its place, so the count is an upper bound; with
all files it is that of the run.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllmrec.data.candidates import is_leave_one_out, read_users, user_key, users_of_split
from mllmrec.data.images import image_size, largest, padded_sizes, size_or_none
from mllmrec.generation.dialogues import Dialogue, Prompt
from mllmrec.generation.engine import load_chat
from mllmrec.generation.preferences import (
    UserHistory,
    read_histories,
    read_summaries,
    user_history,
)
from mllmrec.generation.prompt_writer import EncodedImage, PromptWriter
from mllmrec.models.chat import ChatProcessor
from mllmrec.models.loading import load_processor
from mllmrec.prompts.templates import fill, user_turn
from mllmrec.ranking.reader import RowReader, chat_processor
from mllmrec.ranking.rows import first_users, image_names
from mllmrec.ranking.token_counts import TokenCounts, dialogue_tokens, scoring_tokens
from mllmrec.ranking.training_options import RankerOptions
from mllmrec.stage.jsonl import PathLike, read_by_id, read_rows
from mllmrec.stage.options import load_config, parse_options
from mllmrec.stage.schema import Row
from mllmrec.stage.scripts import load_script

# Section of a config -> the stage that loads its model.
SCRIPTS = {
    "image_summary": "Inference/image_summary.py",
    "preference": "Inference/preference_recurrent.py",
    "train": "MLLM-MSR/train/train_llava_sft.py",
    "score": "MLLM-MSR/test/test_with_llava_sft.py",
    "ranker": "MLLM4Rec/train_ranker.py",
}


@dataclass(frozen=True)
class StageTokens:
    """What one stage asks of its model.

    rows: of its output; counts: their sums; longest: prompt with its text; missing: files whose
    texts a stand-in replaces, empty if the counts are exact.
    """

    rows: int
    counts: TokenCounts
    longest: int
    missing: tuple[str, ...] = ()


def stand_in(chat: ChatProcessor, tokens: int) -> str:
    """A text of about so many tokens."""
    per_word = len(chat.tokenizer(" a" * 100, add_special_tokens=False)["input_ids"]) / 100
    return " ".join(["a"] * max(1, int(tokens / per_word)))


class _Longest:
    """Dialogues that pass through here leave the length of their longest prompt."""

    def __init__(self) -> None:
        self.prompt = 0

    def watch(self, dialogue: Dialogue) -> Dialogue:
        text = None
        while True:
            try:
                prompt = next(dialogue) if text is None else dialogue.send(text)
            except StopIteration as end:
                return end.value
            self.prompt = max(self.prompt, prompt.length)
            text = yield prompt


def summary_tokens(options: Any) -> StageTokens:
    """Tokens of stage 2. options: its Options."""
    stage = load_script("Inference/image_summary.py")
    data, path = Path(options.data_dir), options.system_dir / "image_summaries.jsonl"
    items = read_by_id(data / "items.jsonl", "item_id")
    written = {row["item_id"]: [row["summary"]] for row in _rows(path)}
    chat, limit = load_chat(options.model, options)
    turn = user_turn(fill(options.image_prompt, options.domain), images=1)
    text, longest, images = chat.render([turn]), _Longest(), 0
    before, filler = chat.count(text) - 1, stand_in(chat, options.max_new_tokens)
    todo: list[tuple[Dialogue, list[str]]] = []
    paths = [data / item["image"] if item["image"] else None for item in items.values()]
    sizes = padded_sizes(paths, max(1, options.pad_images))
    listed = list(zip(items.items(), sizes, strict=True))
    for (item_id, item), size in listed[: options.limit or None]:
        if size is None:
            continue
        tokens = chat.image_tokens_of_size(*size)
        images += tokens
        image = EncodedImage(item_id, Prompt(text, before + tokens), None)
        writer = PromptWriter(chat, limit, options.domain, {"item_id": item_id})
        # Of the three texts of `summary: fused` only the last one is kept.
        known = written.get(item_id, [filler])
        texts = known if options.summary == "image" else [filler, filler, *known]
        todo.append((longest.watch(stage.summarise(item, image, writer, options)), texts))
    counts = dialogue_tokens(todo, chat, options.max_new_tokens) + TokenCounts(image=images)
    exact = options.summary == "image" and len(written) >= len(todo)
    missing = () if exact else (path.name,)
    return StageTokens(len(todo), counts, longest.prompt + options.max_new_tokens, missing)


def preference_tokens(options: Any) -> StageTokens:
    """Tokens of stage 3, recurrent. options: its Options."""
    stage = load_script("Inference/preference_recurrent.py")
    path = options.system_dir / "user_preferences.jsonl"
    chat, limit = load_chat(options.model, options)
    limit = min(options.max_prompt_tokens or limit, limit)
    histories, missing = _histories(options, chat)
    histories = dict(list(histories.items())[: options.limit or None])
    written = {
        user_key(row, "split" in row): [block["preference"] for block in row["blocks"]]
        for row in _rows(path)
    }
    longest, filler = _Longest(), stand_in(chat, options.max_new_tokens)

    def dialogues() -> Iterator[tuple[Dialogue, Sequence[str]]]:
        for user, history in histories.items():
            writer = PromptWriter(chat, limit, options.domain, history.ids, options.block_line)
            dialogue = stage.recurrent_preference(history, writer, options)
            texts = written.get(user, [filler] * stage.n_blocks(history, options))
            yield longest.watch(dialogue), texts

    counts = dialogue_tokens(dialogues(), chat, options.max_new_tokens)
    if not histories.keys() <= written.keys():
        missing = (*missing, path.name)
    return StageTokens(len(histories), counts, longest.prompt + options.max_new_tokens, missing)


def _histories(options: Any, chat: ChatProcessor) -> tuple[dict[Any, UserHistory], tuple[str, ...]]:
    """(histories as stage 3 reads them, files that are missing): with stand-ins for summaries."""
    path = Path(options.summaries or options.system_dir / "image_summaries.jsonl")
    data = Path(options.data_dir)
    items, users = read_by_id(data / "items.jsonl", "item_id"), read_users(data / "users.jsonl")
    summaries = read_summaries(path) if path.exists() else {}
    if summaries.keys() >= items.keys():
        return read_histories(options), ()
    filler = stand_in(chat, stage_options("image_summary", options.config).max_new_tokens)
    texts, leave_one_out = dict.fromkeys(items, filler) | summaries, is_leave_one_out(users)
    histories = {
        user_key(user, leave_one_out): user_history(user, items, texts, leave_one_out)
        for user in users
    }
    return histories, (path.name,)


def ranking_tokens(options: Any, split: str, lists: bool = False) -> StageTokens:
    """Tokens of one pass over the rows of stage 5 (split train) or stage 6 (split test).

    options: FineTuningOptions for train, else those of stage 6; lists: a row asks about a user's
    whole list, as in MLLM4Rec's ranker.
    """
    path = options.system_dir / f"{split}.jsonl"
    chat = chat_processor(load_processor(options.model, options), options)
    if not path.exists():
        return _expected_ranking_tokens(options, split, chat, lists)
    rows = list(_rows(path))
    reader = RowReader(chat, path.parent, options.max_text_tokens)
    if split == "train":  # a micro-batch shares at most what all rows of an item share
        reuse, padded, rows = options.group_by == "item", 0, rows[: options.limit or None]
    else:
        reuse, padded = options.reuse_prefix, options.pad_images
        rows = first_users(rows, options.limit)
    reader.pad_images(rows, padded)
    counts = scoring_tokens(rows, reader, reuse)
    sizes = {path.parent / name: image_size(path.parent / name) for name in image_names(rows)}
    if padded:
        paths = [path.parent / row["images"][0] if row["images"] else None for row in rows]
        for image, size in zip(paths, padded_sizes(paths, padded), strict=True):
            if image is not None:
                sizes[image] = largest([sizes[image], size]) or sizes[image]
    return StageTokens(len(rows), counts, max(reader.lengths(rows, sizes), default=0))


def _expected_ranking_tokens(
    options: RankerOptions, split: str, chat: ChatProcessor, lists: bool
) -> StageTokens:
    """An upper bound before stage 4: every question as long as it may be."""
    data = Path(options.data_dir)
    items = read_by_id(data / "items.jsonl", "item_id").values()
    paths = [data / item["image"] if item["image"] else None for item in items]
    sizes = [size for size in map(size_or_none, paths) if size]
    images = [chat.image_tokens_of_size(*size) for size in sizes] if chat.takes_images else []
    negatives = load_config(Path(options.config)).get("data", {}).get("train_negatives", 1)
    users = users_of_split(read_users(data / "users.jsonl"), split)
    per_user = [1 + (negatives if split == "train" else len(u["negatives"])) for u in users]
    rows, text = len(users) if lists else sum(per_user), options.max_text_tokens
    image = round(rows * sum(images) / max(1, len(images)))
    counts = TokenCounts(rows, rows * text + image, image, rows * text + image)
    return StageTokens(rows, counts, text + max(images, default=0), (f"{split}.jsonl",))


def stage_options(section: str, config: PathLike, words: Sequence[str] = ()) -> Any:
    """The options of a stage, as its script reads them from a config and further words."""
    stage = load_script(SCRIPTS[section])
    return parse_options(stage.Options, stage.SECTION, ["--config", str(config), *words])


def _rows(path: Path) -> Iterable[Row]:
    return read_rows(path) if path.exists() else ()
