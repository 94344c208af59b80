"""Stage 5 against the published procedure: samples a second and peak memory at the same effective batch.

    bash scripts/benchmark.sh train --size 100m

Published (our own re-implementation): one pair in a pass, the loss on every token of the text, pairs in random order; fp16 on
a GPU, float32 on a CPU, which does not train in fp16. Ours: the loss on the answer, and pairs of one item in a pass, whose
picture is read once (`group_by: item`), or, with `--ours length`, pairs of like length in a pass. Same random weights, same
pairs, the same number of pairs in a step; each turn is a process of its own, so that its peak memory is its own; medians.

How many pairs share an item is drawn as in the training pairs of MicroLens-50k, 40,658 pairs over 10,818 items: dealt out in
fours, 22% of an item's lots have one pair, 22% two, 17% three and 39% four.
On a GPU also the model-FLOPs utilisation: 4 x parameters of the language model x tokens that pass through it (forward, and
backward through frozen weights) a second, over what a large bf16 product of matrices reaches on the spot.

Out: outputs/benchmark/train.json.
"""

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from bench_tools import item_with_cover, synchronize, taste, timed

from data_processing.errors import run
from data_processing.jsonl import write_json
from data_processing.pairs import PairArgs, pair_row
from data_processing.run_record import machine
from Inference.chat import Chat, on_device
from Inference.models import DTYPES, pick_device, pick_dtype
from Inference.pair_reader import PairReader
from Inference.random_models import LLAVA_SIZES, random_llava
from Inference.recommender import add_lora
from Inference.trainer import Collator, Order

OUTPUT = Path("outputs/benchmark/train.json")
MICROLENS_LOTS = (0.22, 0.22, 0.17, 0.39)
LORA = SimpleNamespace(
    lora_r=8,
    lora_alpha=32,
    lora_dropout=0.1,
    lora_layers=[],
    quantization="none",
    gradient_checkpointing=False,
)


def make_pairs(folder, n_pairs):
    """Lines of train.jsonl over items with a cover of noise."""
    chance, rows = np.random.default_rng(0), []
    for number in itertools.count():
        item = item_with_cover(number, folder)
        for _ in range(chance.choice((1, 2, 3, 4), p=MICROLENS_LOTS)):
            rows.append(
                pair_row(
                    f"u{len(rows)}",
                    item,
                    len(rows) % 2,
                    f"{number}.png",
                    taste(len(rows)),
                    PairArgs(),
                    with_answer=True,
                )
            )
            if len(rows) == n_pairs:
                return rows


def one_turn(how, args):
    """Trains on all pairs once in this process; returns dict of seconds, tokens and peak memory.

    What a run does once, such as fetching its memory, is not timed: the largest pass is made before.
    """
    device = pick_device()
    dtype = pick_dtype(args.dtype, device)
    if how == "published" and device.type == "cuda":
        dtype = torch.float16
    model, processor = random_llava(args.size, dtype=dtype, device=device)
    with tempfile.TemporaryDirectory() as folder:
        rows = make_pairs(folder, args.step * args.steps)
        chat = Chat(processor)
        reader = PairReader(chat, folder)
        sizes = {Path(folder) / row["images"][0]: reader.image(row).size for row in rows}
        lengths = reader.lengths(rows, sizes)
        model = add_lora(model, LORA).train()
        if args.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        weights = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=2e-5)
        group_by = {"published": "none", "length": "length", "item": "item"}[how]
        in_pass = 1 if how == "published" else args.batch
        collator = Collator(
            reader, "sequence" if how == "published" else "answer", share=how == "item"
        )
        order = list(Order(rows, lengths, args.step, in_pass, group_by, seed=0))
        steps = in_parts(order, args.step)
        scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

        def one_pass(numbers, pairs_in_step):
            batch = collator([rows[n] for n in numbers])
            tokens = (batch["input_ids"] != chat.tokenizer.pad_token_id).sum().item()
            batch = on_device(batch, model)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = model(**batch).loss * len(numbers) / pairs_in_step
            scaler.scale(loss).backward()
            return tokens

        def pictures_and_length(numbers):
            return len({rows[n]["item_id"] for n in numbers}), max(lengths[n] for n in numbers)

        one_pass(
            max(
                (part for step in steps for part in in_parts(step, in_pass)),
                key=pictures_and_length,
            ),
            args.step,
        )
        optimizer.zero_grad()
        synchronize()
        started, tokens = time.perf_counter(), 0
        for step in steps:
            tokens += sum(one_pass(part, len(step)) for part in in_parts(step, in_pass))
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        synchronize()
        seconds = time.perf_counter() - started
    on_gpu = device.type == "cuda"
    peak = (
        torch.cuda.max_memory_allocated()
        if on_gpu
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    found = {
        "seconds": seconds,
        "tokens": tokens,
        "peak_gb": peak / 1e9,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    found["mean_length"] = sum(lengths) / len(lengths)
    if on_gpu:
        language = sum(p.numel() for p in model.get_decoder().layers.parameters())
        found["mfu"] = 4 * language * tokens / seconds / matmul_flops(device)
    return found


def in_parts(numbers, size):
    return [numbers[start : start + size] for start in range(0, len(numbers), size)]


def matmul_flops(device):
    """Operations a second of a large product of bf16 matrices."""
    a = torch.randn(8192, 8192, dtype=torch.bfloat16, device=device)
    times = [timed(lambda: a @ a)[0] for _ in range(10)]
    return 2 * 8192**3 / min(times)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--size", default="100m", choices=LLAVA_SIZES, help="of the random-weight LLaVA-NeXT"
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", *DTYPES),
        help="of ours; published: fp16 on a GPU",
    )
    parser.add_argument(
        "--step", type=int, default=8, help="pairs in a step, on both sides (paper: 1 x 8)"
    )
    parser.add_argument("--batch", type=int, default=4, help="pairs in a pass of ours")
    parser.add_argument("--steps", type=int, default=3, help="steps that are timed")
    parser.add_argument(
        "--ours",
        nargs="+",
        default=["item"],
        choices=("length", "item"),
        help="group_by of ours, one case for each",
    )
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--turn",
        choices=("published", "length", "item"),
        help="one turn in this process, as JSON; for the script itself",
    )
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    if args.turn:
        print(json.dumps(one_turn(args.turn, args)))
        return
    words = [
        f"--{name}={value}"
        for name, value in vars(args).items()
        if name not in ("turn", "ours", "gradient_checkpointing")
    ]
    words += ["--gradient_checkpointing"] if args.gradient_checkpointing else []
    found = {"published": []} | {how: [] for how in args.ours}
    for _ in range(args.repeats):
        for how, turns in found.items():
            done = subprocess.run(
                [sys.executable, __file__, *words, "--turn", how],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            turns.append(json.loads(done.stdout.splitlines()[-1]))
            print(
                f"{how}: {args.step * args.steps / turns[-1]['seconds']:.3f} pairs/s, {turns[-1]['peak_gb']:.1f} GB",
                flush=True,
            )
    median = {
        how: statistics.median(turn["seconds"] for turn in turns) for how, turns in found.items()
    }
    pairs, rows = args.step * args.steps, []
    for how in args.ours:
        row = {
            "case": f"ours, group_by {how}, {args.batch} pairs in a pass", "baseline_s": round(median["published"], 2),
            "ours_s": round(median[how], 2), "ratio": round(median["published"] / median[how], 2),
            "baseline_pairs_per_s": round(pairs / median["published"], 3), "ours_pairs_per_s": round(pairs / median[how], 3),
            "baseline_peak_gb": round(max(t["peak_gb"] for t in found["published"]), 2),
            "ours_peak_gb": round(max(t["peak_gb"] for t in found[how]), 2),
        }  # fmt: skip
        for name, key in (("baseline", "published"), ("ours", how)):
            if "mfu" in found[key][0]:
                row[f"{name}_mfu"] = round(statistics.median(turn["mfu"] for turn in found[key]), 3)
        rows.append(row)
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    about = {key: found["published"][0][key] for key in ("parameters", "mean_length")}
    write_json(OUTPUT, {"rows": rows, "options": vars(args), **about, **machine()})
    print(f"wrote {OUTPUT}")


if __name__ == "__main__":
    run(main)
