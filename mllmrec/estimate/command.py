"""What a run of a config will cost: rows, tokens, memory and time of each stage.

    python -m mllmrec.estimate.command --config configs/microlens.yaml

Needs stage 1, and of the models their configuration and tokenizer (no weights). Texts that are not
yet written count as long as they may be, so tokens are upper bounds until the stage before has run.
Time: a pilot's measured rate if there is one (`--limit 50` in a stage leaves a run record), and the
least that the card allows: floating-point operations of all tokens that are processed, and the
bytes that decoding must read for each new token.
"""

from mllmrec.stage.main import run_main

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from mllmrec.estimate.tokens import (
    SCRIPTS,
    StageTokens,
    preference_tokens,
    ranking_tokens,
    stage_options,
    summary_tokens,
)
from mllmrec.models.loading import read_config
from mllmrec.models.size import ModelSize, model_size
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import read_rows
from mllmrec.stage.options import load_config
from mllmrec.stage.output import duration
from mllmrec.stage.record import read_record

GB = 1e9
ITEMSIZE = 2  # bfloat16
CHUNK_TOKENS = 16384  # of prefill on a GPU, see GenerationEngine
RESERVED = 1.5 * GB  # what the driver, the allocator and the kernels take
# Sections of a config whose stage generates texts -> its output; those whose stage trains.
GENERATED = {"image_summary": "image_summaries.jsonl", "preference": "user_preferences.jsonl"}
TRAINED = ("train", "ranker")


@dataclass(frozen=True)
class Card:
    """A GPU by its data sheet. flops: bfloat16 matrix products, dense, a second; bandwidth: bytes
    a second.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float


CARDS = (
    Card("24 GB (RTX 4090)", 24 * GB, 165e12, 1.01e12),
    Card("48 GB (L40S)", 48 * GB, 362e12, 0.864e12),
    Card("80 GB (H100)", 80 * GB, 989e12, 3.35e12),
)


@dataclass(frozen=True)
class StageEstimate:
    """One stage of a config.

    section: of the config; passes: how often its rows go through the model; fixed: memory by part
    in bytes, whatever the card; per_token: bytes that each token of a batch of texts adds;
    read_bytes: of the weights that each step of decoding reads; steps: of the optimizer, in all.
    """

    section: str
    model: str
    size: ModelSize
    tokens: StageTokens
    passes: int
    fixed: dict[str, float]
    per_token: float
    read_bytes: float
    output: Path
    steps: int = 0

    @property
    def memory(self) -> float:
        """The least that it runs with: one row at a time."""
        return sum(self.fixed.values()) + self.per_token * self.tokens.longest

    def texts_at_once(self, card: Card) -> int:
        """How many texts a card decodes at a time; 0: not one."""
        free = card.memory - RESERVED - sum(self.fixed.values())
        return max(0, int(free / (self.per_token * self.tokens.longest)))

    def least_seconds(self, card: Card) -> float:
        """No implementation is faster: every operation at the card's full speed.

        A forward pass takes 2 operations for each token and weight of the language model's layers,
        and the LM head once for each prompt and new token; training takes twice that for the
        gradients of the activations. Each step of decoding reads these weights, and all keys and
        values. Vision tower and attention come on top.
        """
        counts, size = self.tokens.counts, self.size
        computed = size.linear * (counts.computed + counts.generated)
        heads = size.head * (counts.requests + counts.generated)
        operations = 2 * (computed + heads) * self.passes * (2 if self.section in TRAINED else 1)
        seconds = operations / card.flops
        if counts.generated:
            length = (counts.prompt + counts.generated) / max(1, counts.requests)
            free = card.memory - self.read_bytes
            at_once = min(counts.requests, max(1.0, free / (self.per_token * length)))
            held = (counts.prompt + counts.generated / 2) / max(1, counts.requests)
            read = counts.generated * (self.read_bytes / at_once + held * self.per_token)
            seconds = max(seconds, read / card.bandwidth)
        return seconds


def estimate_stage(
    section: str, config: Path, itemsize: int = ITEMSIZE, chunk_tokens: int = CHUNK_TOKENS
) -> StageEstimate:
    """The estimate of one section of a config.

    itemsize: bytes of a number that is not quantised; chunk_tokens: of a prefill chunk.
    """
    # MLLM4Rec's captions have the options of stage 2 and a folder of their own.
    captions = section == "image_summary" and "preference" not in load_config(config)
    options = stage_options(section, config, ("--system", "mllm4rec") if captions else ())
    size = model_size(read_config(options.model))
    training = section in TRAINED
    fixed = {"weights": size.weights(options.quantization, itemsize, training)}
    passes, per_token, steps = 1, 0.0, 0
    if section in GENERATED:
        tokens = (summary_tokens if section == "image_summary" else preference_tokens)(options)
        fixed["activations"] = size.pass_through(chunk_tokens, itemsize)
        output, per_token = options.system_dir / GENERATED[section], size.kv(1, itemsize)
    elif training:
        tokens = ranking_tokens(options, "train", lists=section == "ranker")
        fixed["LoRA, optimizer, activations"] = training_bytes(size, options, tokens, itemsize)
        output, passes = options.system_dir / "adapter", math.ceil(options.epochs)
        steps = passes * math.ceil(tokens.rows / (options.batch_size * options.accumulation))
    else:
        tokens = ranking_tokens(options, "test")
        batch = min(max(options.batch_tokens, tokens.longest), tokens.counts.computed)
        fixed["activations, keys and values"] = scoring_bytes(size, batch, itemsize)
        variants = sorted(options.system_dir.glob("*/scores.jsonl"))
        output = variants[0] if variants else options.system_dir / "sft" / "scores.jsonl"
        passes = 2  # scripts/06_score.sh: without and with the adapter
    return StageEstimate(
        section=section,
        model=options.model,
        size=size,
        tokens=tokens,
        passes=passes,
        fixed=fixed,
        per_token=per_token,
        read_bytes=size.read_per_step(options.quantization, itemsize),
        output=output,
        steps=steps,
    )


def scoring_bytes(size: ModelSize, batch: int, itemsize: int) -> float:
    """What scoring holds beside the weights for a batch of so many tokens."""
    return size.pass_through(batch, itemsize) + size.kv(batch, itemsize)


def training_bytes(size: ModelSize, options: Any, tokens: StageTokens, itemsize: int) -> float:
    """What training holds beside the weights: a micro-batch, or a batch of the validation.

    options: FineTuningOptions. With `--loss sequence` there are logits at all positions of a row.
    """
    batch = tokens.longest * options.batch_size
    checkpointing = options.gradient_checkpointing
    micro_batch = size.training(batch, options.lora_r, checkpointing, itemsize)
    if options.loss == "sequence":
        micro_batch += size.logits(batch)
    validation = min(max(options.score_batch_tokens, tokens.longest), tokens.counts.prompt)
    adapter = size.training(0, options.lora_r, checkpointing, itemsize)
    return max(micro_batch, adapter + scoring_bytes(size, validation, itemsize))


def measured_seconds(estimate: StageEstimate) -> tuple[float, str] | None:
    """(seconds for all rows, of what the rate is) of a run or a pilot; None if there was none."""
    if estimate.section in TRAINED:
        return _measured_training(estimate)
    record = read_record(estimate.output) if estimate.output.exists() else None
    if record is None:
        return None
    rows = record["rows"]
    done = rows.get("written_by_this_run", rows.get("out", 0))
    if not done:
        return None
    seconds = record["seconds"] / done * estimate.tokens.rows * estimate.passes
    return seconds, f"{done:,} rows"


def _measured_training(estimate: StageEstimate) -> tuple[float, str] | None:
    """By the steps before the first validation; validations are not counted."""
    log = estimate.output.with_name("training_log.jsonl")
    steps = takewhile(lambda line: "loss" in line, read_rows(log) if log.exists() else ())
    last = max(steps, key=lambda line: line["step"], default=None)
    if last is None or "train_runtime" not in last:
        return None
    return last["train_runtime"] / last["step"] * estimate.steps, f"{last['step']:,} steps"


def lines(estimate: StageEstimate) -> Iterator[str]:
    """The estimate in words, with the arithmetic."""
    size, tokens, counts = estimate.size, estimate.tokens, estimate.tokens.counts
    bound = f"at most, {' and '.join(tokens.missing)} missing" if tokens.missing else "exact"
    yield f"{estimate.section}: {estimate.model}, {size.parameters / 1e9:.2f} billion weights"
    yield (
        f"  {tokens.rows:,} rows, {counts.requests:,} prompts; tokens ({bound}): {counts.prompt:,} "
        f"of prompts ({counts.image:,} of images), {counts.generated:,} generated; longest row "
        f"{tokens.longest:,}"
        + (f"; {estimate.passes} passes over them" if estimate.passes > 1 else "")
    )
    if counts.computed < counts.prompt:
        yield f"  {counts.computed:,} tokens are computed, shared beginnings once"
    parts = " + ".join(f"{value / GB:.2f} {name}" for name, value in estimate.fixed.items())
    if estimate.per_token:
        parts += (
            f" + {estimate.per_token / 1e3:.0f} kB x {tokens.longest:,} keys and values of a text"
        )
    yield f"  memory: {parts} = {estimate.memory / GB:.1f} GB"
    for card in CARDS:
        if estimate.memory + RESERVED > card.memory:
            yield f"  {card.name}: does not fit; try --quantization nf4, or fewer or shorter rows"
            continue
        texts = estimate.texts_at_once(card) if estimate.per_token else 0
        at_once = f"{texts} texts at once; " if texts else ""
        yield f"  {card.name}: {at_once}at least {duration(estimate.least_seconds(card))}"
    found = measured_seconds(estimate)
    if found:
        seconds, what = found
        yield f"  measured on this machine: {duration(seconds)}, at the rate of {what}"


def main(argv: Sequence[str] | None = None) -> None:
    """Print the estimate of every stage that a config has."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("--stages", nargs="+", help="sections of the config; default: all")
    parser.add_argument("--json", default="", help="write the numbers there, too")
    args = parser.parse_args(argv)
    sections = tuple(SCRIPTS)
    config = load_config(Path(args.config))
    wanted = args.stages or [name for name in sections if name in config]
    unknown = sorted(set(wanted) - set(sections))
    if unknown:
        raise InputError(f"--stages {' '.join(unknown)}: choose of {', '.join(sections)}")
    print(
        "Memory in GB (1e9 bytes) in bfloat16. `At least`: at the full speed of the card's data "
        "sheet, which no program reaches."
    )
    found: dict[str, Any] = {}
    for section in wanted:
        estimate = estimate_stage(section, Path(args.config))
        print("\n".join(lines(estimate)), flush=True)
        found[section] = {
            "rows": estimate.tokens.rows,
            "exact": not estimate.tokens.missing,
            **asdict(estimate.tokens.counts),
            "longest": estimate.tokens.longest,
            "memory": {**estimate.fixed, "of a text": estimate.per_token * estimate.tokens.longest},
            "least_seconds": {card.name: estimate.least_seconds(card) for card in CARDS},
        }
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    run_main(main)
