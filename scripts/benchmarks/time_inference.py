"""Stages 2 and 3 compared with the published procedure: image summaries, recurrent preferences.

    bash scripts/benchmark.sh inference --size 100m

Published (our own re-implementation). Stage 2: eight images in a batch in the order of the file,
each padded with black to the width and height of the largest of the eight. Stage 3: one prompt at a
time, user by user, block by block. Ours: the stages' own dialogues, run by
`mllmrec/generation/engine.py`. Both have the same random weights, items and histories, and run
alternately in one process; medians. No text ends before its last token, so both generate equally
many.

Ours is also compared with the least time that the machine allows (`limits.py`): `share_of_limit` is
that time divided by ours. Unlike the ratio it does not depend on how slow the other procedure is.

Out: outputs/benchmark/inference.json.
"""

from mllmrec.stage.main import run_main

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal
from unittest import mock

import numpy as np
import tools
import torch
from limits import Pass, generation_seconds, measure_speeds, vision_passes
from PIL.Image import Image

from mllmrec.data.images import pad_to_largest
from mllmrec.generation.dialogues import Dialogue, Prompt
from mllmrec.generation.local_engine import GenerationEngine
from mllmrec.generation.preferences import HistoryItem, UserHistory
from mllmrec.generation.prompt_writer import EncodedImage, PromptWriter
from mllmrec.models.chat import ChatProcessor, to_model
from mllmrec.models.loading import DTYPES, pick_device
from mllmrec.models.model_options import GenerationStageOptions
from mllmrec.prompts import mllm_msr as prompts
from mllmrec.prompts.templates import fill, user_turn
from mllmrec.stage.scripts import load_script

SUMMARY = (
    "A bright cover with one person in the middle, large yellow lettering and a plain blue ground; "
    "calm and friendly. "
)
PUBLISHED_IMAGES = 8  # in a batch of the published procedure
LIMIT = 100_000  # tokens of a prompt: none is shortened
STAGE_2 = load_script("Inference/image_summary.py")
STAGE_3 = load_script("Inference/preference_recurrent.py")
MODELS = load_script("tests/random_models.py")
Works = dict[str, Callable[[], Any]]  # published and ours


@dataclass
class Options:
    """Of the command line."""

    size: Annotated[Literal["tiny", "100m", "full"], "of the models; full: 7B and 8B"] = "100m"
    dtype: Annotated[tools.Dtype, "of the models"] = "float32"
    items: Annotated[int, "covers to describe"] = 16
    users: Annotated[int, "whose preferences are generated"] = 12
    history: Annotated[int, "items in a history, in blocks of three"] = 6
    new_tokens: Annotated[int, "length of every text"] = 200
    batch_tokens: Annotated[int, "as in the stages: 0 = what fits"] = 0
    repeats: Annotated[int, "of which the median is taken"] = 3


def make_histories(n_users: int, n_items: int) -> list[UserHistory]:
    """Users with histories of random items; summaries of mixed lengths around 40 words."""
    rng = np.random.default_rng(1)
    words = (SUMMARY * 20).split()

    def item(number: int) -> HistoryItem:
        length = int(40 * rng.uniform(0.6, 1.4))
        return HistoryItem(str(number), tools.title(number), " ".join(words[:length]))

    return [
        UserHistory(
            {"user_id": str(user)}, [item(int(k)) for k in rng.integers(0, 10_000, n_items)]
        )
        for user in range(n_users)
    ]


def summary_dialogue(number: int, image: Image, prompt: str, chat: ChatProcessor) -> Dialogue:
    """Stage 2 for the cover of one item."""
    inputs = chat.encode_arrays(prompt, image)
    encoded = EncodedImage(str(number), Prompt(prompt, inputs["input_ids"].shape[1], inputs), None)
    writer = PromptWriter(chat, LIMIT, "video")
    return STAGE_2.summarise({"item_id": str(number)}, encoded, writer, STAGE_2.Options())


def preference_dialogue(user: UserHistory, chat: ChatProcessor) -> Dialogue:
    """Stage 3 for one user."""
    return STAGE_3.recurrent_preference(user, PromptWriter(chat, LIMIT, "video"), STAGE_3.Options())


@torch.inference_mode()
def generate(model: Any, chat: ChatProcessor, batch: Any, new_tokens: int) -> list[str]:
    """The texts of a batch, each of `new_tokens` tokens."""
    batch, pad = to_model(batch, model), chat.tokenizer.pad_token_id
    ids = model.generate(**batch, max_new_tokens=new_tokens, do_sample=False, pad_token_id=pad)
    return [chat.decode(row) for row in ids[:, batch["input_ids"].shape[1] :]]


def published_summaries(
    model: Any, chat: ChatProcessor, prompt: str, covers: list[Image], new_tokens: int
) -> list[str]:
    """The summaries, by the published procedure."""
    summaries = []
    for start in range(0, len(covers), PUBLISHED_IMAGES):
        images = pad_to_largest(covers[start : start + PUBLISHED_IMAGES])
        batch = chat.encode([prompt] * len(images), images)
        summaries += generate(model, chat, batch, new_tokens)
    return summaries


def published_preferences(
    model: Any, chat: ChatProcessor, users: list[UserHistory], new_tokens: int
) -> list[dict[str, Any]]:
    """The rows of user_preferences.jsonl, by the published procedure."""
    rows = []
    for user in users:
        dialogue = preference_dialogue(user, chat)
        try:
            prompt = next(dialogue)
            while True:
                [text] = generate(model, chat, chat.encode([prompt.text]), new_tokens)
                prompt = dialogue.send(text)
        except StopIteration as end:
            rows.append(end.value)
    return rows


def ours(
    model: Any, chat: ChatProcessor, dialogues: Iterable[Dialogue], args: Options
) -> tuple[list[dict[str, Any]], list[list[int]]]:
    """(rows in the order of the dialogues, lengths of the prompts of each batch)."""
    options = GenerationStageOptions(max_new_tokens=args.new_tokens, batch_tokens=args.batch_tokens)
    engine = GenerationEngine(model, chat, options)
    batches, generate_batch = [], model.generate

    def noted(**batch: Any) -> torch.Tensor:
        ids = generate_batch(**batch)  # an error if it does not fit: such batches are not noted
        batches.append(batch["attention_mask"].sum(1).tolist())
        return ids

    with mock.patch.object(model, "generate", noted):
        rows = {number: row for number, row, _ in engine.run(enumerate(dialogues))}
    return [rows[number] for number in sorted(rows)], batches


def report_row(
    case: str, works: Works, n_texts: int, model: Any, passes: list[Pass], args: Options
) -> tuple[dict[str, Any], Any, Any]:
    """(row of the report, what the published procedure returned, rows of ours).

    passes: through parts that see the images only.
    """
    speeds = measure_speeds(model.device, model.dtype)
    seconds, results = tools.timed_interleaved(works, args.repeats)
    rows, batches = results["ours"]
    prefill, decoding = generation_seconds(model, batches, args.new_tokens, speeds, passes)
    limit = prefill + decoding
    tokens = n_texts * args.new_tokens
    row = {
        "case": case,
        "baseline_s": round(seconds["published"], 2),
        "ours_s": round(seconds["ours"], 2),
        "ratio": round(seconds["published"] / seconds["ours"], 2),
        "baseline_tokens_per_s": round(tokens / seconds["published"], 1),
        "ours_tokens_per_s": round(tokens / seconds["ours"], 1),
        "limit_s": round(limit, 2),
        "limit_prefill_s": round(prefill, 2),
        "share_of_limit": round(limit / seconds["ours"], 4),
    }
    tools.print_row(row)
    row |= {
        "batches": [len(batch) for batch in batches],
        "gflops": round(speeds.flops / 1e9),
        "bandwidth_gb_per_s": round(speeds.bandwidth / 1e9, 1),
        "parameters": tools.count_parameters(model),
    }
    return row, results["published"], rows


def new_model(build: Callable[..., tuple[Any, Any]], full: str, args: Options) -> tuple[Any, Any]:
    """(model that ends no text early, ChatProcessor). full: the published size."""
    size, dtype = full if args.size == "full" else args.size, DTYPES[args.dtype]
    model, processor = build(size, dtype=dtype, device=pick_device())
    model.generation_config.eos_token_id = -1
    return model, ChatProcessor(processor)


def summary_row(args: Options) -> dict[str, Any]:
    """Row of the report for stage 2."""
    model, chat = new_model(MODELS.random_llava, "7b", args)
    covers = [tools.cover(number) for number in np.random.default_rng(0).permutation(args.items)]
    prompt = chat.render([user_turn(fill(prompts.IMAGE, "video"), images=1)])

    def dialogues() -> Iterator[Dialogue]:
        return (summary_dialogue(n, image, prompt, chat) for n, image in enumerate(covers))

    works = {
        "published": lambda: published_summaries(model, chat, prompt, covers, args.new_tokens),
        "ours": lambda: ours(model, chat, dialogues(), args),
    }
    passes = vision_passes(model, chat, [(prompt, image) for image in covers])
    case = f"image summaries, {args.items} covers"
    row, _, _ = report_row(case, works, args.items, model, passes, args)
    return row | {"image_tokens": [chat.count_image_tokens(image) for image in covers]}


def preference_row(args: Options) -> dict[str, Any]:
    """Row of the report for stage 3."""
    model, chat = new_model(MODELS.random_llama, "8b", args)
    users = make_histories(args.users, args.history)
    works = {
        "published": lambda: published_preferences(model, chat, users, args.new_tokens),
        "ours": lambda: ours(model, chat, (preference_dialogue(u, chat) for u in users), args),
    }
    blocks = -(-args.history // STAGE_3.Options().block_size)
    case = f"recurrent preferences, {args.users} users of {blocks} blocks"
    row, published, rows = report_row(case, works, args.users * blocks, model, [], args)
    equal = [a["blocks"] == b["blocks"] for a, b in zip(published, rows, strict=True)]
    return row | {
        "first_prompt_tokens": next(preference_dialogue(users[0], chat)).length,
        "share_of_users_with_equal_texts": float(np.mean(equal)),
    }


def main(argv: list[str] | None = None) -> None:
    """Measure both stages and write the report."""
    args = tools.read_options(Options, __doc__, argv)
    tools.write_report("inference", [summary_row(args), preference_row(args)], options=vars(args))


if __name__ == "__main__":
    run_main(main)
