"""Stage 5 compared with the published procedure: speed and peak memory at equal steps.

    bash scripts/benchmark.sh train --size 100m

Published (our own re-implementation): one row in a micro-batch, the loss on every token of the
text, rows in random order, LoRA also on the vision tower's layers of the same names; fp16 on a GPU,
float32 on a CPU, which cannot train in fp16. Ours: the loss on the answer, and rows of one item
together, whose image is computed once (`group_by: item`), or, with `--ours length`, rows of similar
length. TRL: its SFTTrainer on prompts and completions, one row in a micro-batch, LoRA on the
language model; "not run" without the package (pip install trl==1.16.0). All have the same random
weights, rows, LoRA rank and number of rows in an optimizer step. Each repeat is a process of its
own, so that its peak memory is its own; medians.

How many rows share an item follows the training rows of MicroLens-50k, 40,658 rows of 10,818 items:
cut into groups of at most four, 22% of the groups have one row, 22% two, 17% three and 39% four.

Ours and published state their share of the machine's limit, the model-FLOPs utilisation: 4 x
parameters of the language model x tokens of all rows (forward, and backward through frozen weights)
over the time, divided by what a large matrix product reaches in the same run.

Out: outputs/benchmark/train.json.
"""

from mllmrec.stage.main import run_main

import importlib.util
import multiprocessing
import resource
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tools
import torch
from limits import measure_speeds
from peft.helpers import disable_input_dtype_casting

from mllmrec.models.chat import ChatProcessor, to_model
from mllmrec.models.loading import pick_device, pick_dtype
from mllmrec.models.lora import add_lora
from mllmrec.models.model_options import LoraOptions
from mllmrec.prompts.templates import assistant_turn
from mllmrec.ranking.batches import Collator, EpochSampler, EpochSettings
from mllmrec.ranking.reader import RowReader
from mllmrec.stage.schema import Row
from mllmrec.stage.scripts import load_script

MODELS = load_script("tests/random_models.py")
GROUP_FRACTIONS = (0.22, 0.22, 0.17, 0.39)  # of groups of one to four rows, MicroLens-50k
GROUP_BY: dict[str, Literal["none", "length", "item"]] = {
    "published": "none",
    "length": "length",
    "item": "item",
}


@dataclass
class Options:
    """Of the command line."""

    size: Annotated[Literal["tiny", "100m", "7b"], "of the LLaVA-NeXT"] = "100m"
    dtype: Annotated[Literal["auto", tools.Dtype], "of ours; published: float16 on a GPU"] = "auto"
    step: Annotated[int, "rows in an optimizer step of each procedure (paper: 1 x 8)"] = 8
    batch: Annotated[int, "rows in a micro-batch of ours"] = 4
    steps: Annotated[int, "optimizer steps that are timed"] = 3
    ours: Annotated[tuple[Literal["length", "item"], ...], "group_by of ours"] = ("item",)
    gradient_checkpointing: Annotated[bool, "of each procedure"] = False
    repeats: Annotated[int, "of which the median is taken"] = 3


def make_rows(folder: str, n_rows: int) -> list[Row]:
    """Rows of train.jsonl about items with covers of noise."""
    rng, item = np.random.default_rng(0), 0
    rows: list[Row] = []
    while len(rows) < n_rows:
        tools.save_cover(item, folder)
        for _ in range(rng.choice((1, 2, 3, 4), p=GROUP_FRACTIONS)):
            number = len(rows)
            rows.append(
                tools.question_row(f"u{number}", item, tools.preference(number), label=number % 2)
            )
        item += 1
    return rows[:n_rows]


class Training:
    """A model, its rows and the loop that trains it by one procedure.

    procedure: published, length or item; folder: for the covers.
    """

    def __init__(self, procedure: str, args: Options, folder: str) -> None:
        self.published = published = procedure == "published"
        device = pick_device()
        self.dtype = pick_dtype(args.dtype, device)
        if published and device.type == "cuda":
            self.dtype = torch.float16
        model, processor = MODELS.random_llava(args.size, dtype=self.dtype, device=device)
        self.rows = make_rows(folder, args.step * args.steps)
        reader = RowReader(ChatProcessor(processor), folder)
        images = {Path(folder) / row["images"][0]: reader.image(row) for row in self.rows}
        sizes = {path: image.size for path, image in images.items() if image}
        self.lengths = reader.lengths(self.rows, sizes)
        self.pad_token_id = reader.chat.tokenizer.pad_token_id
        self.model = add_lora(model, LoraOptions(lora_vision=published)).train()
        if args.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.weights = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, lr=2e-5)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        loss: Literal["sequence", "answer"] = "sequence" if published else "answer"
        self.collator = Collator(reader, loss, share_prefix=procedure == "item")
        size = 1 if published else args.batch
        settings = EpochSettings(args.step, size, GROUP_BY[procedure], seed=0)
        order = list(EpochSampler(self.rows, self.lengths, settings))
        # Row numbers: optimizer step -> micro-batch -> rows.
        self.steps = [cut(step, size) for step in cut(order, args.step)]

    def run(self) -> tuple[float, int]:
        """(seconds, tokens) of one epoch.

        What happens once, such as the allocation of memory, is not timed: the largest micro-batch
        is computed before.
        """
        micro_batches = [part for step in self.steps for part in step]
        items = [row["item_id"] for row in self.rows]

        def size(part: list[int]) -> tuple[int, int]:
            return len({items[n] for n in part}), max(self.lengths[n] for n in part)

        # As RankingTrainer does.
        with nullcontext() if self.published else disable_input_dtype_casting(self.model):
            self._backward(max(micro_batches, key=size), 1.0)
            self.optimizer.zero_grad()
            steps = (self._optimizer_step(step) for step in self.steps)
            seconds, tokens = tools.timed(lambda: sum(steps))
        return seconds, tokens

    def _optimizer_step(self, micro_batches: list[list[int]]) -> int:
        rows = sum(map(len, micro_batches))
        tokens = sum(self._backward(part, len(part) / rows) for part in micro_batches)
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return tokens

    def _backward(self, numbers: list[int], weight: float) -> int:
        """Add the gradients of one micro-batch; return its number of tokens."""
        batch = self.collator([self.rows[number] for number in numbers])
        parts, device, tokens = batch.get("parts", [batch]), self.model.device, 0
        answers = [(part["labels"] != -100).sum().item() for part in parts]
        for part, answer_tokens in zip(parts, answers, strict=True):
            tokens += (part["input_ids"] != self.pad_token_id).sum().item()
            with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
                loss = self.model(**to_model(part, self.model)).loss
            self.scaler.scale(loss * weight * answer_tokens / sum(answers)).backward()
        return tokens


def trl_dataset(chat: ChatProcessor, args: Options, folder: str) -> Any:
    """The rows as prompts and completions; first those of the step that is not timed."""
    from datasets import Dataset, Image, List

    answers = RowReader(chat, folder).answer_tokens.texts
    n_timed = args.step * args.steps
    made = make_rows(folder, n_timed + args.step)
    rows = [
        {
            "prompt": row["messages"][:1],
            "completion": [assistant_turn(answers[row["label"]].strip())],
            "images": [str(Path(folder) / name) for name in row["images"]],
        }
        for row in made[n_timed:] + made[:n_timed]
    ]
    return Dataset.from_list(rows).cast_column("images", List(Image()))


def train_with_trl(args: Options, folder: str) -> tuple[Any, float]:
    """(model, seconds) of `args.steps` optimizer steps of TRL's SFTTrainer after a first one.

    The first step, which is not timed, is where memory is allocated. In float32 or bfloat16.
    """
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    device = pick_device()
    dtype = pick_dtype(args.dtype, device)
    model, processor = MODELS.random_llava(args.size, dtype=dtype, device=device)
    model = add_lora(model, LoraOptions())
    data = trl_dataset(ChatProcessor(processor), args, folder)
    moments = []

    class StepClock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            tools.synchronize()
            moments.append(time.perf_counter())

    settings = SFTConfig(
        output_dir=str(Path(folder) / "trl"),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=args.step,
        max_steps=args.steps + 1,
        learning_rate=2e-5,
        max_length=None,
        train_sampling_strategy="sequential",
        bf16=dtype == torch.bfloat16,
        use_cpu=device.type == "cpu",
        gradient_checkpointing=args.gradient_checkpointing,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    words = {"train_dataset": data, "processing_class": processor, "callbacks": [StepClock()]}
    SFTTrainer(model, settings, **words).train()
    return model, moments[-1] - moments[0]


def cut(numbers: list[int], size: int) -> list[list[int]]:
    """`numbers` in pieces of `size`."""
    return [numbers[start : start + size] for start in range(0, len(numbers), size)]


def measure(procedure: str, args: Options) -> dict[str, float]:
    """Train in this process: seconds, rows/s, peak memory and, but for TRL, sizes and MFU."""
    with tempfile.TemporaryDirectory() as folder:
        if procedure == "trl":
            model, seconds = train_with_trl(args, folder)
        else:
            training = Training(procedure, args, folder)
            seconds, tokens = training.run()
            model = training.model
    on_gpu = model.device.type == "cuda"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result = {
        "s": seconds,
        "rows_per_s": args.step * args.steps / seconds,
        "peak_gb": (torch.cuda.max_memory_allocated() if on_gpu else peak) / 1e9,
    }
    if procedure != "trl":
        operations = 4 * tools.count_parameters(model.get_decoder().layers) * tokens
        result["mfu"] = operations / seconds / measure_speeds(model.device, model.dtype).flops
        result["parameters"] = tools.count_parameters(model)
        result["mean_length"] = sum(training.lengths) / len(training.lengths)
    return result


def measure_in_processes(args: Options) -> dict[str, dict[str, float]]:
    """{procedure: medians of what `measure` found, of the peak the maximum}; they alternate."""
    peers = ["trl"] if importlib.util.find_spec("trl") else []
    results: dict[str, list[dict[str, float]]] = {
        procedure: [] for procedure in ("published", *peers, *args.ours)
    }
    for _ in range(args.repeats):
        for procedure, measured in results.items():
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                found = process.submit(measure, procedure, args).result()
            measured.append(found)
            print(f"{procedure}: {found['rows_per_s']:.3f} rows/s, {found['peak_gb']:.1f} GB")
    return {
        procedure: {
            key: (max if key == "peak_gb" else statistics.median)(run[key] for run in measured)
            for key in measured[0]
        }
        for procedure, measured in results.items()
    }


def report_row(
    baseline: str, procedure: str, results: dict[str, dict[str, float]], args: Options
) -> dict[str, Any]:
    """One row of the report: a procedure of ours compared with `baseline`, published or trl."""
    case = f"{baseline}; ours: group_by {procedure}, {args.batch} rows in a micro-batch"
    row: dict[str, Any] = {"case": case}
    if baseline not in results:
        return row | {"baseline_s": "not run"}
    other, ours = results[baseline], results[procedure]
    for key in ("s", "rows_per_s", "peak_gb", "mfu"):
        sides = (("baseline", other), ("ours", ours))
        row |= {f"{side}_{key}": round(found[key], 3) for side, found in sides if key in found}
    row["ratio"] = round(other["s"] / ours["s"], 2)
    row["memory_ratio"] = round(ours["peak_gb"] / other["peak_gb"], 2)
    tools.print_row(row)
    return row


def main(argv: list[str] | None = None) -> None:
    """Measure all procedures and write the report."""
    args = tools.read_options(Options, __doc__, argv)
    results = measure_in_processes(args)
    rows = [
        report_row(baseline, procedure, results, args)
        for procedure in args.ours
        for baseline in ("published", "trl")
    ]
    sizes = {key: results["published"][key] for key in ("parameters", "mean_length")}
    tools.write_report("train", rows, options=vars(args), **sizes)


if __name__ == "__main__":
    run_main(main)
