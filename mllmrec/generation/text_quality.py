"""What generated texts look like: how long, cut, repeating themselves, beginning as asked."""

import logging
import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from mllmrec.evaluation.texts import loops
from mllmrec.generation.preferences import PreferenceOptions
from mllmrec.models.chat import ChatProcessor
from mllmrec.models.model_options import MAX_TEXT_TOKENS
from mllmrec.prompts.mllm_msr import RECOMMEND
from mllmrec.stage.options import load_config
from mllmrec.stage.output import RowOutput
from mllmrec.stage.schema import Row

WARN_ABOVE = 0.1  # share of the texts that are cut or loop
UNCHANGED = 0.5  # share of the later blocks that change nothing
ASKED = re.compile(r"Begin with: (?P<opening>.+)$")

logger = logging.getLogger(__name__)


def asked_opening(template: str) -> str:
    """The words that a prompt asks an answer to begin with, "" if it does not."""
    found = ASKED.search(template)
    return found["opening"] if found else ""


def text_quality(texts: Sequence[str], cut: int, opening: str = "") -> dict[str, Any]:
    """Counts over generated texts, for a run record.

    cut: how many reached max_new_tokens; opening: what the texts were asked to begin with.
    """
    quality: dict[str, Any] = {
        "texts": len(texts),
        "mean_words": round(sum(len(text.split()) for text in texts) / max(1, len(texts)), 1),
        "cut": cut,
        "loops": sum(map(loops, texts)),
    }
    if opening:
        quality["begin_as_asked"] = sum(text.startswith(opening) for text in texts)
    return quality


def row_texts(row: Row, key: str) -> list[str]:
    """All generated texts of a row: of each block, or the one called `key`."""
    return [block[key] for block in row["blocks"]] if "blocks" in row else [row[key]]


def measure_texts(output: RowOutput, key: str, template: str, engine: Any = None) -> None:
    """Have the quality of an output's texts measured for its run record.

    key: of a row's text; template: of the prompt, which may ask for an opening; engine: what it
    knows of its server stands in the record, too.
    """

    def measure(rows: list[Row]) -> dict[str, Any]:
        texts = [text for row in rows for text in row_texts(row, key)]
        cut = sum(row.get("cut", 0) for row in rows)
        quality = text_quality(texts, cut, asked_opening(template))
        pairs = [pair for row in rows for pair in pairwise(row_texts(row, key))]
        if pairs:
            quality |= {"later_blocks": len(pairs), "unchanged": sum(a == b for a, b in pairs)}
        users = Counter(row["preference"] for row in rows if "blocks" in row).most_common()
        if users:
            shared = sum(count for _, count in users if count > 1)
            quality |= {"users": len(rows), "shared": shared, "most_common": users[0][1]}
        server = getattr(engine, "described", None)
        return {"texts": quality} | ({"server": server} if server else {})

    output.measure = measure


def warn_of_long_texts(chat: ChatProcessor, options: PreferenceOptions) -> None:
    """Warn if a preference may be longer than the part of it that stage 5 keeps."""
    train = load_config(Path(options.config)).get("train", {})
    longest = int(train.get("max_text_tokens", MAX_TEXT_TOKENS))
    kept = longest - chat.count(RECOMMEND)
    if longest and options.max_new_tokens > kept:
        logger.warning(
            "a preference may have %s tokens, stage 5 keeps about %s of them (max_text_tokens %s) "
            "and cuts the rest; lower --max_new_tokens or raise max_text_tokens of train and score",
            f"{options.max_new_tokens:,}",
            f"{max(kept, 0):,}",
            f"{longest:,}",
        )


def report_quality(output: RowOutput) -> None:
    """Print what `measure_texts` found; warn where too many texts are cut or loop."""
    if "texts" not in output.measured:  # other processes are not done yet
        return
    quality = output.measured["texts"]
    texts = quality["texts"]
    shown = (
        f"{texts:,} texts of {quality['mean_words']} words on average; {quality['cut']:,} cut at"
    )
    shown += f" --max_new_tokens, {quality['loops']:,} repeat themselves"
    if "begin_as_asked" in quality:
        shown += f", {quality['begin_as_asked']:,} begin as asked"
    later, unchanged = quality.get("later_blocks", 0), quality.get("unchanged", 0)
    if unchanged:
        shown += f", {unchanged:,} of {later:,} later blocks change nothing"
    users, same = quality.get("users", 0), quality.get("most_common", 0)
    if quality.get("shared"):
        shown += f", {quality['shared']:,} of {users:,} users share theirs with another user"
    logger.info(shown)
    better = "ask for shorter answers, or try a larger --model"
    if getattr(output.job.options, "prompt_format", ""):
        better = "use an instruction-tuned --model with its own chat template"
    for name, remedy in (
        ("cut", "were cut; raise --max_new_tokens, or ask for shorter answers"),
        ("loops", f"repeat themselves; {better}"),
    ):
        if quality[name] > WARN_ABOVE * texts:
            logger.warning("%d of %d texts %s", quality[name], texts, remedy)
    if unchanged > UNCHANGED * later:
        logger.warning(
            f"{unchanged:,} of {later:,} later blocks have the text of the block before: the model "
            "does not use what is new in them; change --next_prompt, or try a larger --model"
        )
    if same > 1 and same > WARN_ABOVE * users:
        logger.warning(
            f"{same:,} of {users:,} users have one and the same text, which says nothing of any of "
            "them; change --first_prompt, or try a larger --model"
        )
