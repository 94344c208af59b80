"""Stage 6 compared with the published procedure, and the cost of a row as more users share an item.

    bash scripts/benchmark.sh scoring --size 100m

Published: one row at a time, image and prompt through `generate` for 30 tokens, of which the first
one's logits are used (our own re-implementation). Plain: one forward pass per row, also one row at
a time. Ours: `mllmrec/ranking/scoring.py`, which computes what the prompts of an item share once.
All have the same random weights and rows, and run alternately in one process; medians. The logits
of the plain procedure are compared with ours, so that no time is saved by wrong scores.

Out: outputs/benchmark/scoring.json.
"""

from mllmrec.stage.main import run_main

import tempfile

import numpy as np
import torch
from PIL import Image
from tools import (
    PREFERENCE,
    SHAPES,
    count_parameters,
    new_parser,
    parse,
    preference,
    print_row,
    question_row,
    save_cover,
    timed_interleaved,
    write_report,
)

from mllmrec.models.chat import ChatProcessor, to_model
from mllmrec.models.loading import DTYPES, pick_device
from mllmrec.models.random_models import LLAVA_SIZES, random_llava
from mllmrec.prompts import mllm_msr as prompts
from mllmrec.ranking.reader import RowReader
from mllmrec.ranking.scoring import ScoringOptions, score_rows

PUBLISHED_TOKENS = 30


def make_rows(folder, n_items, n_users):
    """Rows of test.jsonl: each of `n_items` items for each of `n_users` users."""
    for item in range(n_items):
        save_cover(item, folder)
    return [
        question_row(f"u{user}", item, preference(user + item))
        for item in range(n_items)
        for user in range(n_users)
    ]


@torch.inference_mode()
def score_one_by_one(model, reader, rows, new_tokens=0):
    """(rows, 2) logits of No and Yes, a row at a time; new_tokens > 0: by generating so many."""
    chat, token_ids, scored = reader.chat, reader.answer_tokens.first_ids, []
    for row in rows:
        batch = to_model(chat.encode([reader.prompt(row)[0]], [reader.image(row)]), model)
        if new_tokens:
            generated = model.generate(
                **batch,
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
                pad_token_id=chat.tokenizer.pad_token_id,
            )
            logits = generated.logits[0][0]
        else:
            logits = model(**batch, logits_to_keep=1).logits[0, -1]
        scored.append(logits[token_ids].tolist())
    return np.array(scored)


def score_ours(model, reader, rows, batch_tokens):
    """The same, by this repository."""
    scored = dict(score_rows(model, reader, rows, ScoringOptions(batch_tokens)))
    return np.array([scored[index] for index in range(len(rows))])


def compare(model, reader, n_users, args):
    """One row of the report: `n_users` users per item."""
    n_items = max(1, args.rows // n_users)
    rows = make_rows(reader.folder, n_items, n_users)
    works = {
        "published": lambda: score_one_by_one(model, reader, rows, PUBLISHED_TOKENS),
        "plain": lambda: score_one_by_one(model, reader, rows),
        "ours": lambda: score_ours(model, reader, rows, args.batch_tokens),
    }
    if n_users not in args.published_at:
        works.pop("published")
    # Plain is timed once; it is there for its logits.
    seconds, logits = timed_interleaved(works, args.repeats, once=("plain",))
    row = {
        "case": f"{n_users} users per item, {n_items} items",
        "ours_s": round(seconds["ours"], 3),
        "ours_ms_per_row": round(1000 * seconds["ours"] / len(rows), 1),
        "plain_s": round(seconds["plain"], 3),
        "ratio_to_plain": round(seconds["plain"] / seconds["ours"], 2),
        "largest_logit_difference": float(np.abs(logits["ours"] - logits["plain"]).max()),
    }
    if "published" in seconds:
        row["baseline_s"] = round(seconds["published"], 3)
        row["ratio"] = round(seconds["published"] / seconds["ours"], 2)
    print_row(row)
    return row


def parse_arguments(argv):
    parser = new_parser(__doc__)
    text = "of the random-weight LLaVA-NeXT"
    parser.add_argument("--size", default="100m", choices=LLAVA_SIZES, help=text)
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--rows", type=int, default=16, help="rows of each case")
    text = "users per item, one case for each"
    parser.add_argument("--users", type=int, nargs="+", default=[1, 2, 4, 8, 16], help=text)
    text = "cases (users per item) for which the published procedure is timed"
    parser.add_argument("--published_at", type=int, nargs="*", default=[4, 16], help=text)
    text = "small on a CPU, where padding costs more than larger batches save"
    parser.add_argument("--batch_tokens", type=int, default=2048, help=text)
    parser.add_argument("--repeats", type=int, default=3)
    return parse(parser, argv)


def main(argv=None):
    args = parse_arguments(argv)
    model, processor = random_llava(args.size, dtype=DTYPES[args.dtype], device=pick_device())
    chat = ChatProcessor(processor)
    with tempfile.TemporaryDirectory() as folder:
        reader = RowReader(chat, folder)
        rows = [compare(model, reader, n_users, args) for n_users in args.users]
    millions = count_parameters(model) / 1e6
    write_report(
        "scoring",
        rows,
        model=f"random LLaVA-NeXT, {millions:.0f}M parameters, {args.dtype}",
        image_tokens=[chat.count_image_tokens(Image.new("RGB", shape)) for shape in SHAPES],
        question_tokens=chat.count(prompts.RECOMMEND + PREFERENCE),
    )


if __name__ == "__main__":
    run_main(main)
