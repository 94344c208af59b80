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

import numpy as np
import torch
from limits import decoding_seconds, measure_speeds, prefill_seconds, vision_passes
from tools import (
    count_parameters,
    cover,
    new_parser,
    parse,
    print_row,
    timed_interleaved,
    title,
    write_report,
)

from mllmrec.data.images import pad_to_largest
from mllmrec.generation.dialogues import Prompt
from mllmrec.generation.engine import GenerationEngine, run_dialogues
from mllmrec.generation.preferences import HistoryItem, UserHistory
from mllmrec.generation.prompt_writer import EncodedImage, PromptWriter
from mllmrec.models.chat import ChatProcessor, to_model
from mllmrec.models.loading import DTYPES, pick_device
from mllmrec.models.model_options import GenerationStageOptions
from mllmrec.models.random_models import random_llama, random_llava
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


def make_histories(args):
    """Users with histories of random items; summaries of mixed lengths around 40 words."""
    rng = np.random.default_rng(1)
    words = (SUMMARY * 20).split()

    def item(number):
        length = int(40 * rng.uniform(0.6, 1.4))
        return HistoryItem(str(number), title(number), " ".join(words[:length]))

    return [
        UserHistory(
            {"user_id": str(user)}, [item(int(k)) for k in rng.integers(0, 10_000, args.history)]
        )
        for user in range(args.users)
    ]


@torch.inference_mode()
def generate(model, chat, batch, new_tokens):
    """The texts of a batch, each of `new_tokens` tokens."""
    batch = to_model(batch, model)
    ids = model.generate(
        **batch,
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=chat.tokenizer.pad_token_id,
    )
    return [chat.decode(row) for row in ids[:, batch["input_ids"].shape[1] :]]


class NotingEngine(GenerationEngine):
    """Leaves the lengths of the prompts of each batch in `batches`."""

    def __init__(self, model, chat, args, batches):
        super().__init__(
            model,
            chat,
            GenerationStageOptions(max_new_tokens=args.new_tokens, batch_tokens=args.batch_tokens),
        )
        self.batches = batches
        batches.clear()

    def _generate(self, requests):
        texts = super()._generate(requests)  # without those that did not fit into the memory
        self.batches.append([request.prompt.length for request in requests])
        return texts


def published_summaries(model, chat, prompt, covers, new_tokens):
    summaries = []
    for start in range(0, len(covers), PUBLISHED_IMAGES):
        images = pad_to_largest(covers[start : start + PUBLISHED_IMAGES])
        batch = chat.encode([prompt] * len(images), images)
        summaries += generate(model, chat, batch, new_tokens)
    return summaries


def our_summaries(model, chat, prompt, covers, args, batches):
    writer, options = PromptWriter(chat, LIMIT, "video"), STAGE_2.Options()

    def dialogue(number, image):
        item_id = str(number)
        inputs = chat.encode_arrays(prompt, image)
        encoded = EncodedImage(item_id, Prompt(prompt, inputs["input_ids"].shape[1], inputs), None)
        return STAGE_2.summarise({"item_id": item_id}, encoded, writer, options)

    dialogues = ((number, dialogue(number, image)) for number, image in enumerate(covers))
    rows = run_dialogues(NotingEngine(model, chat, args, batches), dialogues)
    return [row["summary"] for _, row, _ in rows]


def preference_dialogue(user, chat):
    return STAGE_3.recurrent_preference(user, PromptWriter(chat, LIMIT, "video"), STAGE_3.Options())


def published_preferences(model, chat, users, new_tokens):
    rows = []
    for user in users:
        dialogue, text = preference_dialogue(user, chat), None
        try:
            while True:
                prompt = dialogue.send(text)
                [text] = generate(model, chat, chat.encode([prompt.text]), new_tokens)
        except StopIteration as end:
            rows.append(end.value)
    return rows


def our_preferences(model, chat, users, args, batches):
    dialogues = ((number, preference_dialogue(user, chat)) for number, user in enumerate(users))
    engine = NotingEngine(model, chat, args, batches)
    rows = {n: row for n, row, _ in run_dialogues(engine, dialogues)}
    return [rows[number] for number in range(len(users))]


def compare(case, works, tokens, repeats):
    """(row of the report, results). works: published and ours; tokens: how many each generates."""
    seconds, results = timed_interleaved(works, repeats)
    row = {
        "case": case,
        "baseline_s": round(seconds["published"], 2),
        "ours_s": round(seconds["ours"], 2),
        "ratio": round(seconds["published"] / seconds["ours"], 2),
        "baseline_tokens_per_s": round(tokens / seconds["published"], 1),
        "ours_tokens_per_s": round(tokens / seconds["ours"], 1),
    }
    print_row(row)
    return row, results


def with_limit(row, model, batches, args, speeds, passes=()):
    """The row with the least time of ours, and its share."""
    lengths = [length for batch in batches for length in batch]
    prefill = prefill_seconds(model, lengths, speeds, passes)
    decoding = decoding_seconds(model, batches, args.new_tokens, speeds)
    limit = prefill + decoding
    row |= {
        "limit_s": round(limit, 2),
        "limit_prefill_s": round(prefill, 2),
        "share_of_limit": round(limit / row["ours_s"], 2),
        "batches": [len(batch) for batch in batches],
        "gflops": round(speeds.flops / 1e9),
        "bandwidth_gb_per_s": round(speeds.bandwidth / 1e9, 1),
    }
    print_row({key: row[key] for key in ("limit_s", "limit_prefill_s", "share_of_limit")})
    return row


def summary_row(args, dtype, device, speeds):
    """Row of the report for stage 2."""
    size = "7b" if args.size == "full" else args.size
    model, processor = random_llava(size, dtype=dtype, device=device)
    model.generation_config.eos_token_id = -1  # no text ends early
    chat = ChatProcessor(processor)
    covers = [cover(number) for number in np.random.default_rng(0).permutation(args.items)]
    prompt = chat.render([user_turn(fill(prompts.IMAGE, "video"), images=1)])
    batches = []
    works = {
        "published": lambda: published_summaries(model, chat, prompt, covers, args.new_tokens),
        "ours": lambda: our_summaries(model, chat, prompt, covers, args, batches),
    }
    case, tokens = f"image summaries, {args.items} covers", args.items * args.new_tokens
    row, _ = compare(case, works, tokens, args.repeats)
    passes = vision_passes(model, chat, [(prompt, image) for image in covers])
    return with_limit(row, model, batches, args, speeds, passes) | {
        "parameters": count_parameters(model),
        "image_tokens": [chat.count_image_tokens(image) for image in covers],
    }


def preference_row(args, dtype, device, speeds):
    """Row of the report for stage 3."""
    size = "8b" if args.size == "full" else args.size
    model, tokenizer = random_llama(size, dtype=dtype, device=device)
    model.generation_config.eos_token_id = -1
    chat, users = ChatProcessor(tokenizer), make_histories(args)
    batches = []
    blocks = -(-args.history // STAGE_3.Options().block_size)
    works = {
        "published": lambda: published_preferences(model, chat, users, args.new_tokens),
        "ours": lambda: our_preferences(model, chat, users, args, batches),
    }
    case = f"recurrent preferences, {args.users} users of {blocks} blocks"
    tokens = args.users * blocks * args.new_tokens
    row, results = compare(case, works, tokens, args.repeats)
    pairs = zip(results["published"], results["ours"], strict=True)
    equal = [a["blocks"] == b["blocks"] for a, b in pairs]
    row |= {
        "first_prompt_tokens": next(preference_dialogue(users[0], chat)).length,
        "parameters": count_parameters(model),
        "share_of_users_with_equal_texts": float(np.mean(equal)),
    }
    return with_limit(row, model, batches, args, speeds)


def parse_arguments(argv):
    parser = new_parser(__doc__)
    sizes = ("tiny", "100m", "full")
    text = "of the random-weight models; full: 7B and 8B"
    parser.add_argument("--size", default="100m", choices=sizes, help=text)
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--items", type=int, default=16, help="covers to describe")
    parser.add_argument("--users", type=int, default=12)
    text = "items in a history, in blocks of three"
    parser.add_argument("--history", type=int, default=6, help=text)
    parser.add_argument("--new_tokens", type=int, default=200, help="length of every text")
    text = "as in the stages: 0 = what fits"
    parser.add_argument("--batch_tokens", type=int, default=0, help=text)
    parser.add_argument("--repeats", type=int, default=3)
    return parse(parser, argv)


def main(argv=None):
    args = parse_arguments(argv)
    device, dtype = pick_device(), DTYPES[args.dtype]
    speeds = measure_speeds(device, dtype)
    rows = [summary_row(args, dtype, device, speeds), preference_row(args, dtype, device, speeds)]
    write_report("inference", rows, options=vars(args))


if __name__ == "__main__":
    run_main(main)
