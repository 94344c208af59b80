"""Stage 6 compared with the published procedure, and the cost of a row as more users share an item.

    bash scripts/benchmark.sh scoring --size 100m

Published: six rows at a time, their images padded with black to the largest, through `generate`,
of which the first token's logits are used (our own re-implementation). It asks for at most 30
tokens; a model that says yes or no and then its end token stops after two, one that does not (its
training texts have no end token) writes all 30. Both are measured: `stop` and `30 tokens`. Plain:
one forward pass per row, one row at a time. Ours: `mllmrec/ranking/scoring.py`, which computes what
the prompts of an item share once. All have the same random weights and rows, and run alternately in
one process; medians. The logits of the plain procedure are compared with ours, so that no time is
saved by wrong scores; those of the published one depend on the padding. `share_of_limit`: the least
time for the operations of ours (`limits.py`), divided by its time.

Out: outputs/benchmark/scoring.json.
"""

from mllmrec.stage.main import run_main

import tempfile
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import tools
import torch
from limits import Speeds, measure_speeds, prefill_seconds, vision_passes
from PIL import Image

from mllmrec.data.images import pad_to_largest
from mllmrec.models.chat import ChatProcessor, to_model
from mllmrec.models.loading import DTYPES, pick_device
from mllmrec.prompts import mllm_msr as prompts
from mllmrec.ranking.reader import RowReader
from mllmrec.ranking.rows import group_rows
from mllmrec.ranking.scoring import ScoringOptions, score_rows
from mllmrec.ranking.token_counts import scoring_tokens
from mllmrec.stage.jsonl import PathLike
from mllmrec.stage.schema import Row
from mllmrec.stage.scripts import load_script

MODELS = load_script("tests/random_models.py")
PUBLISHED_ROWS = 6  # in a batch
PUBLISHED_TOKENS = {"stop": 2, "30 tokens": 30}  # generated per row


@dataclass
class Options:
    """Of the command line."""

    size: Annotated[Literal["tiny", "100m", "7b"], "of the LLaVA-NeXT"] = "100m"
    dtype: Annotated[tools.Dtype, "of the model"] = "float32"
    rows: Annotated[int, "of each case"] = 24
    users: Annotated[tuple[int, ...], "users per item, one case for each"] = (1, 2, 4, 8, 24)
    published_at: Annotated[tuple[int, ...], "cases in which the published one is timed"] = (4,)
    # Small: on a CPU padding costs more than larger batches save.
    batch_tokens: Annotated[int, "of ours, in a batch"] = 2048
    repeats: Annotated[int, "of which the median is taken"] = 3


def make_rows(folder: PathLike, n_items: int, n_users: int) -> list[Row]:
    """Rows of test.jsonl: each of `n_items` items for each of `n_users` users."""
    for item in range(n_items):
        tools.save_cover(item, folder)
    return [
        tools.question_row(f"u{user}", item, tools.preference(user + item))
        for item in range(n_items)
        for user in range(n_users)
    ]


@torch.inference_mode()
def score_plain(model: Any, reader: RowReader, rows: list[Row]) -> np.ndarray:
    """(rows, 2) logits of No and Yes, one forward pass per row."""
    chat, scored = reader.chat, []
    for row in rows:
        batch = to_model(chat.encode([reader.prompt(row)[0]], [reader.image(row)]), model)
        logits = model(**batch, logits_to_keep=1).logits[0, -1]
        scored.append(logits[reader.answer_tokens.first_ids].tolist())
    return np.array(scored)


@torch.inference_mode()
def score_published(model: Any, reader: RowReader, rows: list[Row], new_tokens: int) -> np.ndarray:
    """(rows, 2) logits of No and Yes, by generating `new_tokens` for six padded rows at a time."""
    chat, scored = reader.chat, []
    for start in range(0, len(rows), PUBLISHED_ROWS):
        batch = rows[start : start + PUBLISHED_ROWS]
        padded = pad_to_largest([reader.image(row) for row in batch])
        generated = model.generate(
            **to_model(chat.encode([reader.prompt(row)[0] for row in batch], padded), model),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=chat.tokenizer.pad_token_id,
        )
        scored += generated.logits[0][:, reader.answer_tokens.first_ids].tolist()
    return np.array(scored)


def score_ours(model: Any, reader: RowReader, rows: list[Row], batch_tokens: int) -> np.ndarray:
    """The same, by this repository."""
    scored = dict(score_rows(model, reader, rows, ScoringOptions(batch_tokens)))
    return np.array([scored[index] for index in range(len(rows))])


def least_seconds(model: Any, reader: RowReader, rows: list[Row], speeds: Speeds) -> float:
    """Each item's image and the beginning that its prompts share once, and the rest of each."""
    lengths: list[float] = []
    prompts = []
    for group in group_rows(rows):
        members = [rows[n] for n in group]
        first = scoring_tokens(members[:1], reader).prompt
        others = len(members) - 1
        lengths.append(first)
        if others:
            rest = scoring_tokens(members, reader).computed - first
            lengths += [rest / others] * others
        prompts.append((reader.prompt(members[0])[0], reader.image(members[0])))
    return prefill_seconds(model, lengths, speeds, vision_passes(model, reader.chat, prompts))


def compare(
    model: Any, reader: RowReader, n_users: int, args: Options, speeds: Speeds
) -> list[dict[str, Any]]:
    """Rows of the report: `n_users` users per item, each published procedure."""
    n_items = max(1, args.rows // n_users)
    rows = make_rows(reader.folder, n_items, n_users)
    works = {
        "plain": lambda: score_plain(model, reader, rows),
        "ours": lambda: score_ours(model, reader, rows, args.batch_tokens),
    }
    published = PUBLISHED_TOKENS if n_users in args.published_at else {}
    for name, new_tokens in published.items():
        works[name] = partial(score_published, model, reader, rows, new_tokens)
    # Plain is timed once; it is there for its logits.
    seconds, logits = tools.timed_interleaved(works, args.repeats, once=("plain",))
    limit = least_seconds(model, reader, rows, speeds)
    common = {
        "ours_s": round(seconds["ours"], 3),
        "limit_s": round(limit, 4),
        "share_of_limit": round(limit / seconds["ours"], 4),
        "ours_ms_per_row": round(1000 * seconds["ours"] / len(rows), 1),
        "plain_s": round(seconds["plain"], 3),
        "ratio_to_plain": round(seconds["plain"] / seconds["ours"], 2),
        "largest_logit_difference": float(np.abs(logits["ours"] - logits["plain"]).max()),
    }
    case, report = f"{n_users} users per item, {n_items} items", []
    for name in published or [""]:
        row: dict[str, Any] = {"case": case}
        if name:
            row["case"] += f"; published: {name}"
            row["baseline_s"] = round(seconds[name], 3)
            row["ratio"] = round(seconds[name] / seconds["ours"], 2)
        report.append(row | common)
        tools.print_row(report[-1])
    return report


def main(argv: list[str] | None = None) -> None:
    """Measure all cases and write the report."""
    args = tools.read_options(Options, __doc__, argv)
    device, dtype = pick_device(), DTYPES[args.dtype]
    speeds = measure_speeds(device, dtype)
    model, processor = MODELS.random_llava(args.size, dtype=dtype, device=device)
    chat = ChatProcessor(processor)
    with tempfile.TemporaryDirectory() as folder:
        reader = RowReader(chat, folder)
        rows = [
            row for n_users in args.users for row in compare(model, reader, n_users, args, speeds)
        ]
    millions = tools.count_parameters(model) / 1e6
    tools.write_report(
        "scoring",
        rows,
        gflops=round(speeds.flops / 1e9),
        model=f"random LLaVA-NeXT, {millions:.0f}M parameters, {args.dtype}",
        image_tokens=[chat.count_image_tokens(Image.new("RGB", shape)) for shape in tools.SHAPES],
        question_tokens=chat.count(prompts.RECOMMEND + tools.PREFERENCE),
    )


if __name__ == "__main__":
    run_main(main)
