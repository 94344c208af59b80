"""What a run of a config will cost: rows, tokens, memory and time of each stage.

    bash scripts/estimate.sh configs/microlens.yaml

Needs stage 1, and of the models their configuration and tokenizer (no weights). Texts that are not
yet written count as long as they may be. Time is that of a pilot, a run with `--limit N`.
"""

from mllmrec.stage.main import run_main

import argparse
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from mllmrec.data.candidates import read_users, users_of_split
from mllmrec.data.images import size_or_none
from mllmrec.generation.preferences import PreferenceOptions
from mllmrec.models.chat import ChatProcessor
from mllmrec.models.model_options import ModelOptions
from mllmrec.models.processors import load_processor, read_config
from mllmrec.models.size import WEIGHT_BYTES, ModelSize, model_size
from mllmrec.prompts.mllm_msr import BLOCK_LINE, IMAGE, PREFERENCE_NEXT
from mllmrec.prompts.templates import user_turn
from mllmrec.ranking.rows import question_text
from mllmrec.ranking.training_options import FineTuningOptions
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import read_by_id, read_rows
from mllmrec.stage.options import REPEATED, load_config, option
from mllmrec.stage.output import duration
from mllmrec.stage.record import read_record
from mllmrec.stage.schema import problem

BATCH_TOKENS = 16384  # of a chunk of prefill on a GPU, and of a batch of scoring
STAGES = {  # section of a config -> (script, output)
    "image_summary": ("02_image_summary", "image_summaries.jsonl"),
    "preference": ("03_preference", "user_preferences.jsonl"),
    "train": ("05_train", "adapter"),
    "score": ("06_score", "sft/scores.jsonl"),
    "ranker": ("mllm4rec/04_ranker", "adapter"),
}
GENERATED = ("image_summary", "preference")
RANKER = {"system": "mllm4rec", "max_text_tokens": 1536}


@dataclass
class Options(PreferenceOptions, FineTuningOptions):
    """What decides the cost of any stage."""

    block_size: int = option(3, "items in a block", ge=1)


def stage_options(
    section: str, config: dict[str, Any], given: Mapping[str, str] | None = None
) -> Options:
    """The options of a section. given: those of the command line."""
    own = RANKER if section == "ranker" or "preference" not in config else {}
    values = own | (config.get("common") or {}) | (config.get(section) or {}) | dict(given or {})
    known = {name: values[name] for name in Options.__dataclass_fields__ if name in values}
    try:
        return TypeAdapter(Options).validate_python(known)
    except ValidationError as error:
        raise InputError(f"section {section!r}: {problem(error)}; correct the config") from None


def lengths(chat: ChatProcessor, texts: Iterable[str]) -> list[int]:
    """Tokens of each text."""
    return [len(chat.tokenizer(text, add_special_tokens=False).input_ids) for text in texts]


def image_lengths(chat: ChatProcessor, paths: list[Path]) -> list[int]:
    """Tokens of each image, 0 for one that cannot be read or that the model does not take."""
    sizes = {path: size_or_none(path) for path in set(paths) if chat.takes_images}
    return [chat.image_tokens_of_size(*size) if (size := sizes.get(p)) else 0 for p in paths]


def item_images(options: Any, chat: ChatProcessor) -> list[int]:
    """Tokens of the image of each item that has one."""
    folder = Path(options.data_dir)
    rows = read_rows(folder / "items.jsonl")
    return image_lengths(chat, [folder / row["image"] for row in rows if row["image"]])


def preference_prompts(options: Any, chat: ChatProcessor, new_tokens: int) -> list[int]:
    """Tokens of each prompt of stage 3: the question, the last preference, a block of items.

    new_tokens: of a summary that is not yet written.
    """
    folder, path = Path(options.data_dir), options.system_dir / "image_summaries.jsonl"
    items, users = read_by_id(folder / "items.jsonl", "item_id"), read_users(folder / "users.jsonl")
    titles = [BLOCK_LINE + row["title"] for row in items.values()]
    own = dict(zip(items, lengths(chat, titles), strict=True))
    written = read_by_id(path, "item_id") if path.exists() else {}
    texts = dict(zip(written, lengths(chat, (r["summary"] for r in written.values())), strict=True))
    question, size = chat.count(chat.render([user_turn(PREFERENCE_NEXT)])), options.block_size
    return [
        question
        + (options.max_new_tokens if start else 0)
        + sum(own[i] + texts.get(i, new_tokens) for i in user["history"][start : start + size])
        for user in users
        for start in range(0, len(user["history"]), size)
    ]


def ranking_prompts(options: Any, chat: ChatProcessor, split: str, per_user: int) -> list[int]:
    """Tokens of each row of train.jsonl or test.jsonl, or of as many rows as stage 4 will write.

    per_user: rows of a user; 0: one for each candidate.
    """
    path, longest = options.system_dir / f"{split}.jsonl", options.max_text_tokens
    if path.exists():
        rows = list(read_rows(path))
        images = image_lengths(chat, [path.parent.joinpath(*row["images"]) for row in rows])
        texts = lengths(chat, map(question_text, rows))
        return [i + min(n, longest or n) for i, n in zip(images, texts, strict=True)]
    users = users_of_split(read_users(Path(options.data_dir) / "users.jsonl"), split)
    n_rows = sum(per_user or 1 + len(user["negatives"]) for user in users)
    return [longest + max(item_images(options, chat), default=0)] * n_rows


def bytes_beside_weights(section: str, options: Any, size: ModelSize, longest: int) -> int:
    """What a stage holds for one row or micro-batch, and for what every batch needs."""
    if section in GENERATED:
        return size.inference(BATCH_TOKENS, longest + options.max_new_tokens)
    scoring = size.inference(*[max(BATCH_TOKENS, longest)] * 2)  # after each epoch, too
    if section == "score":
        return scoring
    rank, checkpointing = options.lora_r, options.gradient_checkpointing
    micro_batch = size.training(longest * options.batch_size, rank, checkpointing)
    return max(micro_batch, size.training(0, rank, checkpointing) + scoring)


def time_line(section: str, options: Any, rows: int, config: str) -> str:
    """How long all rows take at the rate of the run that the output's record describes."""
    script, name = STAGES[section]
    record = read_record(options.system_dir / name) or {"rows": {}}
    done = record["rows"].get("written_by_this_run") or record["rows"].get("in")
    if not done:
        return f"no run yet; a pilot: bash scripts/{script}.sh {config} --limit 50"
    seconds = record["seconds"] / done * rows
    return f"{duration(seconds)} at the rate of {done:,} rows on {record['device']}"


def lines(section: str, config: dict[str, Any], given: Mapping[str, str]) -> Iterator[str]:
    """The estimate of a section in words. given: options of the command line."""
    options, is_trained = stage_options(section, config, given), section in ("train", "ranker")
    processor = load_processor(options.model, ModelOptions(prompt_format=options.prompt_format))
    chat = ChatProcessor(processor, options.image_tiles == "single", options.prompt_format)
    if section == "image_summary":
        question = chat.count(chat.render([user_turn(IMAGE, images=1)]))
        prompts = [image + question for image in item_images(options, chat)]
    elif section == "preference":
        new_tokens = stage_options("image_summary", config).max_new_tokens
        prompts = preference_prompts(options, chat, new_tokens)
    else:
        negatives = int((config.get("data") or {}).get("train_negatives", 1))
        per_user = 1 if section == "ranker" else (1 + negatives) * is_trained
        prompts = ranking_prompts(options, chat, "train" if is_trained else "test", per_user)
    rows, generated = len(prompts), len(prompts) * options.max_new_tokens
    if section == "preference":
        rows = len(read_users(Path(options.data_dir) / "users.jsonl"))
    size, longest = model_size(read_config(options.model)), max(prompts, default=0)
    yield f"{section}: {options.model}, {size.parameters / 1e6:,.0f} million weights"
    texts = f", at most {generated:,} of texts" if section in GENERATED else ""
    yield f"  {rows:,} rows; tokens: {sum(prompts):,} of prompts{texts}; longest {longest:,}"
    rest = bytes_beside_weights(section, options, size, longest) / 1e9
    for name in WEIGHT_BYTES:
        weights = size.weights(name, is_trained) / 1e9
        yield f"  {name}: {weights:.1f} GB of weights + {rest:.1f} GB = {weights + rest:.1f} GB"
    yield f"  time: {time_line(section, options, rows, given['config'])}"


def main(argv: list[str] | None = None) -> None:
    """Print the estimate of every stage that a config has."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True)
    for name in REPEATED:
        parser.add_argument(f"--{name}", default=argparse.SUPPRESS)
    given = vars(parser.parse_args(argv))
    config = load_config(Path(given["config"]))
    for section in STAGES:
        if section in config:
            print(*lines(section, config, given), sep="\n", flush=True)


if __name__ == "__main__":
    run_main(main)
