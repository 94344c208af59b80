"""Stages 2 and 3 against the published procedure: image summaries and recurrent preferences.

    bash scripts/benchmark.sh inference --size 100m

Published (our own re-implementation). Stage 2: eight pictures at a time in the order of the file, each set on a black ground
as wide and as high as the largest of the eight. Stage 3: one prompt at a time, user by user, block by block. Ours: the
stages' own dialogues, played by `Inference/engine.py`. Same random weights, same items and histories, same process, in
turns; medians. No text ends before its last token, so both sides write equally many.

At full size (7b, 8b; a GPU) the decoding rate is also put beside the limit of the memory's bandwidth: a step must read all
weights and every row's keys and values once, so at best  rows x bandwidth / (weights + rows x bytes of keys and values)
tokens a second. The bandwidth is measured on the spot by copying a large tensor.

Out: outputs/benchmark/inference.json.
"""

import argparse
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
from bench_tools import cover, timed, title
from PIL import Image

from data_processing import prompts
from data_processing.errors import run
from data_processing.jsonl import write_json
from data_processing.run_record import machine
from Inference.chat import Chat, on_device, user_turn
from Inference.engine import BATCHING, Engine, Prompt, run_dialogues
from Inference.models import DTYPES, pick_device
from Inference.preference_recurrent import Args, recurrent_preference
from Inference.preferences import Asker
from Inference.prefill import bytes_per_token
from Inference.random_models import random_llama, random_llava

OUTPUT = Path("outputs/benchmark/inference.json")
SUMMARY = "A bright cover with one person in the middle, large yellow lettering and a plain blue ground; calm and friendly. "
PICTURES_AT_ONCE = 8  # the published procedure


def make_histories(n, n_items, summary_words):
    """(item_id, title, summary) lists; summaries of mixed lengths around `summary_words` words."""
    rng = np.random.default_rng(1)
    words = (SUMMARY * 20).split()

    def item(k):
        return str(k), title(k), " ".join(words[: int(summary_words * rng.uniform(0.6, 1.4))])

    return [[item(int(k)) for k in rng.integers(0, 10_000, n_items)] for _ in range(n)]


@torch.inference_mode()
def written(model, chat, batch, new_tokens):
    """Texts that `generate` writes, `new_tokens` long."""
    batch = on_device(batch, model)
    ids = model.generate(
        **batch,
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=chat.tokenizer.pad_token_id,
    )
    return [chat.decode(row) for row in ids[:, batch["input_ids"].shape[1] :]]


def published_summaries(model, chat, text, covers, new_tokens):
    found = []
    for start in range(0, len(covers), PICTURES_AT_ONCE):
        part = covers[start : start + PICTURES_AT_ONCE]
        ground = (max(picture.width for picture in part), max(picture.height for picture in part))
        padded = []
        for picture in part:
            padded.append(Image.new("RGB", ground))
            padded[-1].paste(
                picture, ((ground[0] - picture.width) // 2, (ground[1] - picture.height) // 2)
            )
        found += written(model, chat, chat.encode([text] * len(part), padded), new_tokens)
    return found


def our_summaries(model, chat, text, covers, new_tokens, batch_tokens):
    engine = Engine(model, chat, new_tokens, batch_tokens)

    def dialogue(picture):
        inputs = chat.encode_one(text, picture)
        return (yield Prompt(text, inputs["input_ids"].shape[1], inputs))

    return [
        text
        for _, text, _ in run_dialogues(
            engine, ((n, dialogue(picture)) for n, picture in enumerate(covers))
        )
    ]


def published_preferences(model, chat, histories, new_tokens):
    found = []
    for history in histories:
        dialogue = recurrent_preference(history, Asker(chat, 100_000, "video").ask, Args())
        answer = None
        try:
            while True:
                prompt = dialogue.send(answer)
                [answer] = written(model, chat, chat.encode([prompt.text]), new_tokens)
        except StopIteration as end:
            found.append(end.value)
    return found


def our_preferences(model, chat, histories, new_tokens, batch_tokens, continuous):
    engine = Engine(model, chat, new_tokens, batch_tokens, continuous=continuous)
    asker = Asker(chat, 100_000, "video")
    dialogues = (
        (n, recurrent_preference(history, asker.ask, Args())) for n, history in enumerate(histories)
    )
    found = {n: result for n, result, _ in run_dialogues(engine, dialogues)}
    return [found[n] for n in range(len(histories))]


def compare(case, published, ours, tokens, repeats):
    """One row of the report: medians of `repeats` turns of both. tokens: how many each of them writes."""
    seconds, results = {"published": [], "ours": []}, {}
    for _ in range(repeats):
        for name, work in (("published", published), ("ours", ours)):
            took, results[name] = timed(work)
            seconds[name].append(took)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    row = {
        "case": case, "baseline_s": round(median["published"], 2), "ours_s": round(median["ours"], 2),
        "ratio": round(median["published"] / median["ours"], 2), "baseline_tokens_per_s": round(tokens / median["published"], 1),
        "ours_tokens_per_s": round(tokens / median["ours"], 1),
    }  # fmt: skip
    print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return row, results


def bandwidth(device):
    """Bytes a second that the memory reads and writes, measured by copying."""
    source = torch.empty(
        1 << 30 if device.type == "cuda" else 1 << 27, dtype=torch.uint8, device=device
    )
    target = torch.empty_like(source)
    times = [timed(lambda: target.copy_(source))[0] for _ in range(6)][1:]
    return 2 * source.numel() / min(times)


def decoding_limit(model, rows, length, bytes_per_second):
    """Tokens a second that no decoding of `rows` texts of `length` tokens can exceed on this memory; see above."""
    weights = (
        sum(p.numel() * p.element_size() for p in model.get_decoder().layers.parameters())
        + model.lm_head.weight.nbytes
    )
    return rows * bytes_per_second / (weights + rows * length * bytes_per_token(model))


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--size",
        default="100m",
        choices=("tiny", "100m", "full"),
        help="of the random-weight models; full: 7B and 8B",
    )
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--items", type=int, default=16, help="covers to describe")
    parser.add_argument("--users", type=int, default=12)
    parser.add_argument(
        "--history", type=int, default=6, help="items in a history, in blocks of three"
    )
    parser.add_argument(
        "--new_tokens", type=int, default=200, help="length of every text that is written"
    )
    parser.add_argument(
        "--batch_tokens", type=int, default=0, help="as in the stages: 0 = what fits"
    )
    parser.add_argument("--batching", default="auto", choices=tuple(BATCHING))
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    device, dtype, rows = pick_device(), DTYPES[args.dtype], []

    model, processor = random_llava(
        {"full": "7b"}.get(args.size, args.size), dtype=dtype, device=device
    )
    model.generation_config.eos_token_id = -1  # no text ends early
    chat, covers = (
        Chat(processor),
        [cover(n) for n in np.random.default_rng(0).permutation(args.items)],
    )
    text = chat.render([user_turn(prompts.fill(prompts.IMAGE, "video"), images=1)])
    row, _ = compare(
        f"image summaries, {args.items} covers",
        lambda: published_summaries(model, chat, text, covers, args.new_tokens),
        lambda: our_summaries(model, chat, text, covers, args.new_tokens, args.batch_tokens),
        args.items * args.new_tokens, args.repeats,
    )  # fmt: skip
    rows.append(
        row
        | {
            "parameters": sum(p.numel() for p in model.parameters()),
            "picture_tokens": [chat.image_tokens(c) for c in covers],
        }
    )
    del model

    model, tokenizer = random_llama(
        {"full": "8b"}.get(args.size, args.size), dtype=dtype, device=device
    )
    model.generation_config.eos_token_id = -1
    chat, histories = Chat(tokenizer), make_histories(args.users, args.history, summary_words=40)
    blocks = -(-args.history // 3)
    row, results = compare(
        f"recurrent preferences, {args.users} users of {blocks} blocks",
        lambda: published_preferences(model, chat, histories, args.new_tokens),
        lambda: our_preferences(model, chat, histories, args.new_tokens, args.batch_tokens, BATCHING[args.batching]),
        args.users * blocks * args.new_tokens, args.repeats,
    )  # fmt: skip
    same = np.mean([a == b for a, b in zip(results["published"], results["ours"], strict=True)])
    prompt_tokens = (
        Asker(chat, 100_000, "video").ask(prompts.PREFERENCE_FIRST, histories[0][:3]).length
    )
    row |= {"first_prompt_tokens": prompt_tokens}
    rows.append(
        row
        | {
            "parameters": sum(p.numel() for p in model.parameters()),
            "share_of_users_with_equal_texts": float(same),
        }
    )
    if args.size == "full":
        length = chat.count(histories[0][0][2]) * 3 + 2 * args.new_tokens
        speed = bandwidth(device)
        limit = decoding_limit(model, args.users, length, speed)
        rows[-1] |= {"bandwidth_gb_per_s": round(speed / 1e9), "limit_tokens_per_s": round(limit)}
    write_json(OUTPUT, {"rows": rows, "options": vars(args), **machine()})
    print(f"wrote {OUTPUT}")


if __name__ == "__main__":
    run(main)
