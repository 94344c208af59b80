"""Stage 6 against the published procedure, and the cost of a pair as more users are offered the same item.

    bash scripts/benchmark.sh scoring --size 100m

Published: one pair at a time, picture and prompt through `generate` for 30 tokens, of which the first one's logits are
read (our own re-implementation). Plain: one forward pass per pair, also one at a time. Ours: `Inference/scoring.py`, what
an item's prompts share computed once. Same random weights, same pairs, same process, in turns; medians. The plain
procedure's logits are compared with ours, so that nothing is gained by being wrong.

Out: outputs/benchmark/scoring.json.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from bench_tools import PREFERENCE, SHAPES, item_with_cover, taste, timed
from PIL import Image

from data_processing import prompts
from data_processing.errors import run
from data_processing.jsonl import write_json
from data_processing.pairs import PairArgs, pair_row
from data_processing.run_record import machine
from Inference.chat import Chat, on_device
from Inference.models import DTYPES, pick_device
from Inference.pair_reader import PairReader
from Inference.random_models import LLAVA_SIZES, random_llava
from Inference.scoring import score_pairs

OUTPUT = Path("outputs/benchmark/scoring.json")


def make_pairs(folder, n_items, n_users):
    """Rows of test.jsonl: each of `n_items` items with a cover of noise, offered to `n_users` users."""
    rows = []
    for n in range(n_items):
        item = item_with_cover(n, folder)
        rows += [
            pair_row(f"u{u}", item, 0, f"{n}.png", taste(u + n), PairArgs(), with_answer=False)
            for u in range(n_users)
        ]
    return rows


@torch.inference_mode()
def one_by_one(model, reader, rows, new_tokens):
    """(pairs, 2) yes and no logits, a pair at a time; new_tokens > 0: by generating so many tokens."""
    chat, found = reader.chat, []
    for row in rows:
        batch = on_device(chat.encode([reader.prompt(row)[0]], [reader.image(row)]), model)
        if new_tokens:
            options = {
                "do_sample": False,
                "output_logits": True,
                "return_dict_in_generate": True,
                "pad_token_id": chat.tokenizer.pad_token_id,
            }
            logits = model.generate(
                **batch, max_new_tokens=new_tokens, min_new_tokens=new_tokens, **options
            ).logits[0][0]
        else:
            logits = model(**batch, logits_to_keep=1).logits[0, -1]
        found.append([logits[chat.answer_ids[1][0]].item(), logits[chat.answer_ids[0][0]].item()])
    return np.array(found)


def ours(model, reader, rows, batch_tokens):
    found = {index: (yes, no) for index, yes, no in score_pairs(model, reader, rows, batch_tokens)}
    return np.array([found[n] for n in range(len(rows))])


def compare(model, chat, folder, n_items, n_users, args):
    """One row of the report."""
    rows = make_pairs(folder, n_items, n_users)
    reader = PairReader(chat, folder)
    seconds = {"published": [], "plain": [], "ours": []}
    for turn in range(args.repeats):
        for name, work in (
            ("published", lambda: one_by_one(model, reader, rows, 30)),
            ("plain", lambda: one_by_one(model, reader, rows, 0)),
            ("ours", lambda: ours(model, reader, rows, args.batch_tokens)),
        ):
            if (name == "published" and n_users not in args.published_at) or (
                name == "plain" and turn
            ):
                continue  # the plain pass is timed once; it is there for its logits
            took, logits = timed(work)
            seconds[name].append(took)
            if name == "plain":
                wanted = logits
    median = {name: statistics.median(times) for name, times in seconds.items() if times}
    row = {"case": f"{n_users} users per item, {n_items} items", "ours_s": round(median["ours"], 3),
           "ours_ms_per_pair": round(1000 * median["ours"] / len(rows), 1), "plain_s": round(median["plain"], 3),
           "ratio_to_plain": round(median["plain"] / median["ours"], 2),
           "largest_logit_difference": float(np.abs(logits - wanted).max())}  # fmt: skip
    if "published" in median:
        row |= {
            "baseline_s": round(median["published"], 3),
            "ratio": round(median["published"] / median["ours"], 2),
        }
    return row


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--size", default="100m", choices=LLAVA_SIZES, help="of the random-weight LLaVA-NeXT"
    )
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--pairs", type=int, default=16, help="pairs in each case")
    parser.add_argument(
        "--users",
        type=int,
        nargs="+",
        default=[1, 2, 4, 8, 16],
        help="users per item, one case for each",
    )
    parser.add_argument(
        "--published_at",
        type=int,
        nargs="*",
        default=[4, 16],
        help="cases that the published procedure is timed on",
    )
    parser.add_argument(
        "--batch_tokens",
        type=int,
        default=2048,
        help="small on a CPU: padding costs more there than batching brings",
    )
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    model, processor = random_llava(args.size, dtype=DTYPES[args.dtype], device=pick_device())
    chat, rows = Chat(processor), []
    with tempfile.TemporaryDirectory() as folder:
        picture_tokens = [chat.image_tokens(Image.new("RGB", shape)) for shape in SHAPES]
        for n_users in args.users:
            rows.append(compare(model, chat, folder, max(1, args.pairs // n_users), n_users, args))
            print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    about = {"model": f"random LLaVA-NeXT, {parameters / 1e6:.0f}M parameters, {args.dtype}", "picture_tokens": picture_tokens,
             "question_tokens": chat.count(prompts.RECOMMEND + PREFERENCE)}  # fmt: skip
    write_json(OUTPUT, {"rows": rows, **about, **machine()})
    print(f"wrote {OUTPUT}")


if __name__ == "__main__":
    run(main)
