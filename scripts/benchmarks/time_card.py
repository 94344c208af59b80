"""A check of one card in a few minutes: are its numbers right, and how near is it to its limits?

    bash scripts/gpu_check.sh

Numbers: a LLaVA-NeXT of 88M parameters. In float32, scores of shared prefixes and texts of batches
must be those of one prompt at a time; in bfloat16, scores must be those of float32 but for `BOUND`
of their range. Speeds, with random weights of the published shapes (7B, 8B) in bfloat16: a step of
decoding, by our loop and by CUDA graphs, stages 2 and 3, scoring, training; each beside the least
time that the card allows (`limits.py`), and its peak memory. Each part is a process of its own.
What does not fit into the memory, fails, or would begin after `--minutes`, is "not run", with its
reason; so is TRL without its package. With `--size tiny` it runs on a CPU, as a test of itself.

Out: outputs/benchmark/gpu_check.json and gpu_check.md.
"""

from mllmrec.stage.main import run_main

import importlib.util
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Literal, get_args

import numpy as np
import time_inference
import time_scoring
import time_train
import tools
import torch
from limits import decoding_seconds, generation_seconds, measure_speeds, vision_passes
from transformers import LogitsProcessor, LogitsProcessorList

from mllmrec.generation.prefill import chunked_prefill
from mllmrec.models.chat import ChatProcessor
from mllmrec.models.compat import is_out_of_memory
from mllmrec.models.loading import DTYPES, pick_device
from mllmrec.prompts import mllm_msr as prompts
from mllmrec.prompts.templates import fill, user_turn
from mllmrec.ranking.reader import RowReader
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import atomic_file

Part = Literal["numbers", "text", "images", "training", "graphs", "trl"]
BOUND = 0.02  # of the range of the logits, what bfloat16 may change
UNTIMED = 4  # new tokens
STEP = "a step of decoding, {} rows of {:,} tokens, ms"
Line = dict[str, Any]  # what, value, and where there is one: limit, share, note


@dataclass
class Options:
    """Of the command line."""

    size: Annotated[Literal["tiny", "full"], "of the models whose speed is measured"] = "full"
    minutes: Annotated[float, "in which a part may begin"] = 9.0
    parts: Annotated[tuple[Part, ...], "what is measured"] = get_args(Part)


@dataclass(frozen=True)
class Sizes:
    """How much is measured: of a full card, or of a test."""

    batch: tuple[int, int]  # rows decoded together, tokens of their prompts
    steps: int  # of decoding
    users: int
    new_tokens: int
    covers: int
    scored: int


SIZES = {
    "full": Sizes((60, 1500), 32, 60, 200, 32, 48),
    "tiny": Sizes((3, 40), 4, 2, 4, 2, 8),
}


def line(what: str, value: float, limit: float | None = None) -> Line:
    """One line of the report. limit: the same quantity as the card allows it."""
    found: Line = {"what": what, "value": float(f"{value:.3g}")}
    if limit:
        share = min(value, limit) / max(value, limit)
        found |= {"limit": float(f"{limit:.3g}"), "share": round(share, 3)}
    return found


def numbers(args: Options) -> Iterator[Line]:
    """Scores and texts in float32 and bfloat16."""
    size: Literal["tiny", "100m"] = "tiny" if args.size == "tiny" else "100m"
    device = pick_device()
    scores: dict[str, np.ndarray[Any, Any]] = {}
    for name in ("float32", "bfloat16"):
        model, processor = time_scoring.MODELS.random_llava(size, dtype=DTYPES[name], device=device)
        with tempfile.TemporaryDirectory() as folder:
            reader = RowReader(ChatProcessor(processor), folder)
            rows = time_scoring.make_rows(folder, 4, 4)
            scores[name] = time_scoring.score_ours(model, reader, rows, 4096)
            if name == "float32":
                scores["plain"] = time_scoring.score_plain(model, reader, rows)
    spread = np.ptp(scores["plain"])
    for what, name, bound in (
        ("a shared prefix", "float32", 1e-4),
        ("bfloat16", "bfloat16", BOUND),
    ):
        changed = np.abs(scores[name] - scores["plain"]).max() / spread
        found = line(f"largest change of a logit by {what}, share of their range", changed)
        yield found | {"note": "right" if changed <= bound else f"WRONG: above {bound}"}
    text_args = time_inference.Options(size=size, users=4, new_tokens=24)
    model, chat = time_inference.new_model(time_inference.MODELS.random_llama, "8b", text_args)
    users = time_inference.make_histories(4, 6)
    wanted = time_inference.published_preferences(model, chat, users, 24)
    dialogues = (time_inference.preference_dialogue(user, chat) for user in users)
    batched, _ = time_inference.ours(model, chat, dialogues, text_args)
    equal = np.mean([a["blocks"] == b["blocks"] for a, b in zip(batched, wanted, strict=True)])
    yield line("users with equal texts, batched and one by one", float(equal)) | {
        "note": "right" if equal == 1 else "WRONG: greedy texts depend on the batch"
    }


def text(args: Options) -> Iterator[Line]:
    """A step of decoding, and stage 3."""
    sizes = SIZES[args.size]
    options = time_inference.Options(args.size, "bfloat16", new_tokens=sizes.new_tokens)
    model, chat = time_inference.new_model(time_inference.MODELS.random_llama, "8b", options)
    speeds = measure_speeds(model.device, model.dtype)
    yield line("matrix products, TFLOP/s", speeds.flops / 1e12)
    yield line("reading of weights, GB/s", speeds.bandwidth / 1e9)
    ids = torch.randint(5, 500, sizes.batch, device=model.device)
    chunks = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids.split(4)]

    with torch.inference_mode():
        batch = chunked_prefill(model, chunks, 0, sizes.steps + UNTIMED)
        step = step_seconds(model, sizes.steps, **batch)
    limit = decoding_seconds(model, [[sizes.batch[1]] * sizes.batch[0]], 1, speeds)
    yield line(STEP.format(*sizes.batch), 1000 * step, 1000 * limit)
    users = time_inference.make_histories(sizes.users, 6)
    dialogues = [time_inference.preference_dialogue(user, chat) for user in users]
    seconds, (_, batches) = tools.timed(
        lambda: time_inference.ours(model, chat, dialogues, options)
    )
    least = sum(generation_seconds(model, batches, sizes.new_tokens, speeds))
    yield line("stage 3, blocks/s", 2 * len(users) / seconds, 2 * len(users) / least)


def step_seconds(model: Any, steps: int, **inputs: Any) -> float:
    """The median of `steps` decoding steps behind the first UNTIMED tokens, which may compile."""
    times: list[float] = []

    class Clock(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            tools.synchronize()
            times.append(time.perf_counter())
            return scores

    clock = LogitsProcessorList([Clock()])
    words = {"max_new_tokens": steps + UNTIMED, "do_sample": False, "pad_token_id": 0}
    model.generate(**inputs, **words, logits_processor=clock)
    return statistics.median(after - before for before, after in pairwise(times[UNTIMED - 1 :]))


def graphs(args: Options) -> Iterator[Line]:
    """A step of decoding by transformers' own static cache, on a card compiled to CUDA graphs."""
    sizes = SIZES[args.size]
    options = time_inference.Options(args.size, "bfloat16")
    model, _ = time_inference.new_model(time_inference.MODELS.random_llama, "8b", options)
    ids = torch.randint(5, 500, sizes.batch, device=model.device)
    mask = torch.ones_like(ids)
    mask[1:, 0] = 0  # padding, as in a batch of prompts of several lengths
    inputs = {"input_ids": ids, "attention_mask": mask, "cache_implementation": "static"}
    name = STEP.format(*sizes.batch) + ", CUDA graphs"
    yield line(name, 1000 * step_seconds(model, sizes.steps, **inputs))


def images(args: Options) -> Iterator[Line]:
    """Stage 2, and scoring with four users per item."""
    sizes = SIZES[args.size]
    options = time_inference.Options(args.size, "bfloat16", new_tokens=sizes.new_tokens)
    model, chat = time_inference.new_model(time_inference.MODELS.random_llava, "7b", options)
    speeds = measure_speeds(model.device, model.dtype)
    prompt = chat.render([user_turn(fill(prompts.IMAGE, "video"), images=1)])
    covers = [tools.cover(number) for number in range(sizes.covers)]
    dialogues = (
        time_inference.summary_dialogue(n, image, prompt, chat) for n, image in enumerate(covers)
    )
    seconds, (_, batches) = tools.timed(
        lambda: time_inference.ours(model, chat, dialogues, options)
    )
    passes = vision_passes(model, chat, [(prompt, image) for image in covers])
    least = sum(generation_seconds(model, batches, sizes.new_tokens, speeds, passes))
    yield line("stage 2, images/s", sizes.covers / seconds, sizes.covers / least)
    with tempfile.TemporaryDirectory() as folder:
        reader = RowReader(chat, folder)
        rows = time_scoring.make_rows(folder, sizes.scored // 4, 4)
        time_scoring.score_ours(model, reader, rows[:4], 16384)
        seconds, _ = tools.timed(lambda: time_scoring.score_ours(model, reader, rows, 16384))
        least = time_scoring.least_seconds(model, reader, rows, speeds)
    ms = 1000 / len(rows)
    yield line("scoring, four users per item, ms per row", ms * seconds, ms * least)


def training(args: Options, procedure: str = "item") -> Iterator[Line]:
    """Rows a second of ours, and the model-FLOPs utilisation."""
    size: Literal["tiny", "7b"] = "tiny" if args.size == "tiny" else "7b"
    steps = 1 if args.size == "tiny" else 4
    options = time_train.Options(size, "bfloat16", steps=steps, gradient_checkpointing=True)
    found = time_train.measure(procedure, options)
    name = "TRL" if procedure == "trl" else "ours"
    yield line(f"training, {name}, rows/s", found["rows_per_s"])
    if "mfu" in found:
        yield line("training, ours, model-FLOPs utilisation", found["mfu"], 1.0)


def trl(args: Options) -> Iterator[Line]:
    """The same by TRL."""
    missing = [name for name in ("trl", "datasets") if not importlib.util.find_spec(name)]
    if missing:
        raise InputError(f"no package {' and '.join(missing)}")
    yield from training(args, "trl")


PARTS: dict[str, Callable[[Options], Iterator[Line]]] = {
    "numbers": numbers,
    "text": text,
    "images": images,
    "training": training,
    "graphs": graphs,
    "trl": trl,
}


def measure(part: str, args: Options) -> list[Line]:
    """The lines of a part, in a process of its own, with the peak of its memory on the card."""
    found: list[Line] = []
    try:
        found += PARTS[part](args)
    except (InputError, RuntimeError) as error:
        reason = "out of memory" if is_out_of_memory(error) else " ".join(str(error).split())[:200]
        return [*found, {"what": part, "value": "not run", "note": reason}]
    peak = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0
    return [*found, line(f"{part}, peak memory, GB", peak)] if peak else found


def markdown(lines: list[Line]) -> str:
    """The report as a table."""
    head = ["| what | value | limit of this card | share | |", "|---|---:|---:|---:|---|"]
    keys = ("what", "value", "limit", "share", "note")
    cells = (" | ".join(str(row.get(key, "")) for key in keys) for row in lines)
    return "\n".join([*head, *(f"| {row} |" for row in cells)])


def refuse_wrong(lines: list[Line]) -> None:
    """Raise InputError if a number is wrong."""
    wrong = [row["what"] for row in lines if row.get("note", "").startswith("WRONG")]
    if wrong:
        raise InputError(f"wrong numbers on this card: {'; '.join(wrong)}")


def main(argv: list[str] | None = None) -> None:
    """Measure the parts one after the other; what was found so far is written after each."""
    args = tools.read_options(Options, __doc__, argv)
    if args.size == "full" and not torch.cuda.is_available():
        raise InputError("there is no GPU that torch can use; --size tiny runs on a CPU")
    started, lines = time.monotonic(), []
    for part in args.parts:
        if time.monotonic() - started > 60 * args.minutes:
            lines.append({"what": part, "value": "not run", "note": f"after {args.minutes:g} min"})
        else:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                lines += process.submit(measure, part, args).result()
        tools.write_report("gpu_check", lines, options=vars(args))
        with atomic_file(tools.OUTPUT_FOLDER / "gpu_check.md") as file:
            file.write(markdown(lines).encode() + b"\n")
    print(markdown(lines))
    refuse_wrong(lines)


if __name__ == "__main__":
    run_main(main)
