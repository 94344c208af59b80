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
import itertools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from limits import measure_speeds
from tools import (
    count_parameters,
    new_parser,
    parse,
    preference,
    print_row,
    question_row,
    save_cover,
    synchronize,
    write_report,
)

from mllmrec.models.chat import ChatProcessor, to_model
from mllmrec.models.loading import DTYPES, pick_device, pick_dtype
from mllmrec.models.lora import add_lora
from mllmrec.models.model_options import LoraOptions
from mllmrec.models.random_models import LLAVA_SIZES, random_llava
from mllmrec.ranking.batches import Collator, EpochSampler, EpochSettings
from mllmrec.ranking.reader import RowReader

GROUP_FRACTIONS = (0.22, 0.22, 0.17, 0.39)  # of groups of one to four rows, MicroLens-50k
GROUP_BY = {"published": "none", "length": "length", "item": "item"}
PROCEDURES = (*GROUP_BY, "trl")


def make_rows(folder, n_rows):
    """Rows of train.jsonl about items with covers of noise."""
    rng, rows = np.random.default_rng(0), []
    for item in itertools.count():
        save_cover(item, folder)
        for _ in range(rng.choice((1, 2, 3, 4), p=GROUP_FRACTIONS)):
            number = len(rows)
            rows.append(question_row(f"u{number}", item, preference(number), label=number % 2))
            if len(rows) == n_rows:
                return rows


class Training:
    """A model, its rows and the loop that trains it by one procedure.

    procedure: published, length or item; folder: for the covers.
    """

    def __init__(self, procedure, args, folder):
        published, device = procedure == "published", pick_device()
        self.dtype = pick_dtype(args.dtype, device)
        if published and device.type == "cuda":
            self.dtype = torch.float16
        model, processor = random_llava(args.size, dtype=self.dtype, device=device)
        self.rows, self.step = make_rows(folder, args.step * args.steps), args.step
        reader = RowReader(ChatProcessor(processor), folder)
        sizes = {Path(folder) / row["images"][0]: reader.image(row).size for row in self.rows}
        self.lengths = reader.lengths(self.rows, sizes)
        self.pad_token_id = reader.chat.tokenizer.pad_token_id
        self.model = add_lora(model, LoraOptions(lora_vision=published)).train()
        if args.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.weights = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, lr=2e-5)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.micro_batch = 1 if published else args.batch
        loss = "sequence" if published else "answer"
        self.collator = Collator(reader, loss, share_prefix=procedure == "item")
        settings = EpochSettings(args.step, self.micro_batch, GROUP_BY[procedure], seed=0)
        order = list(EpochSampler(self.rows, self.lengths, settings))
        self.steps = cut(order, args.step)

    def run(self):
        """(seconds, tokens) of one epoch.

        What happens once, such as the allocation of memory, is not timed: the largest micro-batch
        is computed before.
        """
        micro_batches = [part for step in self.steps for part in cut(step, self.micro_batch)]
        self._backward(max(micro_batches, key=self._images_and_length), self.step)
        self.optimizer.zero_grad()
        synchronize()
        started = time.perf_counter()
        tokens = sum(self._optimizer_step(step) for step in self.steps)
        synchronize()
        return time.perf_counter() - started, tokens

    def _images_and_length(self, indices):
        """What makes a micro-batch large: its number of images, then its longest row."""
        return len({self.rows[i]["item_id"] for i in indices}), max(
            self.lengths[i] for i in indices
        )

    def _optimizer_step(self, indices):
        tokens = sum(self._backward(part, len(indices)) for part in cut(indices, self.micro_batch))
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return tokens

    def _backward(self, indices, rows_in_step):
        """Add the gradients of one micro-batch; return its number of tokens."""
        batch = self.collator([self.rows[index] for index in indices])
        parts, device, tokens = batch.get("parts", [batch]), self.model.device, 0
        answers = [(part["labels"] != -100).sum().item() for part in parts]
        for part, answer_tokens in zip(parts, answers, strict=True):
            tokens += (part["input_ids"] != self.pad_token_id).sum().item()
            share = answer_tokens / sum(answers) * len(indices) / rows_in_step
            part = to_model(part, self.model)
            with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
                loss = self.model(**part).loss * share
            self.scaler.scale(loss).backward()
        return tokens


def trl_dataset(chat, args, folder):
    """The rows as prompts and completions; first those of the step that is not timed."""
    from datasets import Dataset, Image, List

    answers = RowReader(chat, folder).answer_tokens.texts
    n_timed = args.step * args.steps
    made = make_rows(folder, n_timed + args.step)
    rows = []
    for row in made[n_timed:] + made[:n_timed]:
        answer = {"type": "text", "text": answers[row["label"]].strip()}
        rows.append(
            {
                "prompt": row["messages"][:1],
                "completion": [{"role": "assistant", "content": [answer]}],
                "images": [str(Path(folder) / name) for name in row["images"]],
            }
        )
    return Dataset.from_list(rows).cast_column("images", List(Image()))


def train_with_trl(args, folder):
    """(model, seconds) of `args.steps` optimizer steps of TRL's SFTTrainer after a first one.

    The first step, which is not timed, is where memory is allocated. In float32 or bfloat16.
    """
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    device = pick_device()
    dtype = pick_dtype(args.dtype, device)
    model, processor = random_llava(args.size, dtype=dtype, device=device)
    model = add_lora(model, LoraOptions())
    data = trl_dataset(ChatProcessor(processor), args, folder)
    moments = []

    class StepClock(TrainerCallback):
        def on_step_end(self, *_, **__):
            synchronize()
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
    SFTTrainer(
        model=model,
        args=settings,
        train_dataset=data,
        processing_class=processor,
        callbacks=[StepClock()],
    ).train()
    return model, moments[-1] - moments[0]


def cut(indices, size):
    """`indices` in pieces of `size`."""
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def measure(procedure, args):
    """Train in this process; return dict of seconds, peak memory and sizes."""
    with tempfile.TemporaryDirectory() as folder:
        if procedure == "trl":
            model, seconds = train_with_trl(args, folder)
            result = {"seconds": seconds}
        else:
            training = Training(procedure, args, folder)
            seconds, tokens = training.run()
            model, lengths = training.model, training.lengths
            result = {
                "seconds": seconds,
                "tokens": tokens,
                "parameters": count_parameters(model),
                "mean_length": sum(lengths) / len(lengths),
            }
    on_gpu = model.device.type == "cuda"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result["peak_gb"] = (torch.cuda.max_memory_allocated() if on_gpu else peak) / 1e9
    if procedure != "trl":
        language_model = count_parameters(model.get_decoder().layers)
        speed = measure_speeds(model.device, model.dtype).flops
        result["mfu"] = 4 * language_model * tokens / seconds / speed
    return result


def measure_in_processes(args):
    """{procedure: results of `measure`, one per repeat}; procedures alternate."""
    words = [
        f"--{name}={value}"
        for name, value in vars(args).items()
        if name not in ("measure", "ours", "gradient_checkpointing")
    ]
    words += ["--gradient_checkpointing"] if args.gradient_checkpointing else []
    peers = ["trl"] if importlib.util.find_spec("trl") else []
    results = {procedure: [] for procedure in ("published", *peers, *args.ours)}
    for _ in range(args.repeats):
        for procedure, measured in results.items():
            command = [sys.executable, __file__, *words, "--measure", procedure]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            measured.append(json.loads(done.stdout.splitlines()[-1]))
            rate = args.step * args.steps / measured[-1]["seconds"]
            print(f"{procedure}: {rate:.3f} rows/s, {measured[-1]['peak_gb']:.1f} GB", flush=True)
    return results


def report_row(baseline, procedure, results, args):
    """One row of the report: a procedure of ours compared with `baseline`, published or trl."""
    n_rows = args.step * args.steps
    row = {"case": f"{baseline}; ours: group_by {procedure}, {args.batch} rows in a micro-batch"}
    if baseline not in results:
        return row | {"baseline_s": "not run"}
    sides = {"baseline": results[baseline], "ours": results[procedure]}
    seconds = {side: median_of(measured, "seconds") for side, measured in sides.items()}
    peaks = {side: max(result["peak_gb"] for result in sides[side]) for side in sides}
    row |= {f"{side}_s": round(value, 2) for side, value in seconds.items()}
    row["ratio"] = round(seconds["baseline"] / seconds["ours"], 2)
    row |= {f"{side}_rows_per_s": round(n_rows / value, 3) for side, value in seconds.items()}
    row |= {f"{side}_peak_gb": round(value, 2) for side, value in peaks.items()}
    row["memory_ratio"] = round(peaks["ours"] / peaks["baseline"], 2)
    for side, measured in sides.items():
        if "mfu" in measured[0]:
            row[f"{side}_mfu"] = round(median_of(measured, "mfu"), 3)
    print_row(row)
    return row


def median_of(results, key):
    return statistics.median(result[key] for result in results)


def parse_arguments(argv):
    parser = new_parser(__doc__)
    text = "of the random-weight LLaVA-NeXT"
    parser.add_argument("--size", default="100m", choices=LLAVA_SIZES, help=text)
    text = "of ours; published: fp16 on a GPU"
    parser.add_argument("--dtype", default="auto", choices=("auto", *DTYPES), help=text)
    text = "rows in an optimizer step of either procedure (paper: 1 x 8)"
    parser.add_argument("--step", type=int, default=8, help=text)
    parser.add_argument("--batch", type=int, default=4, help="rows in a micro-batch of ours")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps that are timed")
    text, choices = "group_by of ours, one case for each", ("length", "item")
    parser.add_argument("--ours", nargs="+", default=["item"], choices=choices, help=text)
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    text = "measure one procedure in this process, print JSON; the script calls itself with it"
    parser.add_argument("--measure", choices=PROCEDURES, help=text)
    return parse(parser, argv)


def main(argv=None):
    args = parse_arguments(argv)
    if args.measure:
        print(json.dumps(measure(args.measure, args)))
        return
    results = measure_in_processes(args)
    rows = [
        report_row(baseline, procedure, results, args)
        for procedure in args.ours
        for baseline in ("published", "trl")
    ]
    sizes = {key: results["published"][0][key] for key in ("parameters", "mean_length")}
    write_report("train", rows, options=vars(args), **sizes)


if __name__ == "__main__":
    run_main(main)
