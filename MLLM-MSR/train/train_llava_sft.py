"""Stage 5: LoRA teaches the model to say yes or no to (preference, candidate).

(Paper, "Supervised Fine-Tuning".)

In:  {output_dir}/{system}/train.jsonl, validation.jsonl
Out, all in {output_dir}/{system}/:
     adapter/                  LoRA weights that plain PEFT loads, processor, run.json
     training_log.jsonl        step, epoch, loss, learning rate, validation AUC and HR@5
     training_curve.png        the same as a plot
     checkpoints/              what the same command resumes from
     training.rejected.jsonl   users with a question that is too long even without a preference

    python MLLM-MSR/train/train_llava_sft.py --config configs/microlens.yaml

A text model (`--model`) trains on rows without images. Sample: 552 steps in about 55 seconds on 2
CPU cores. LLaVA-v1.6-Mistral-7B: a GPU (README, "Which card for what"); 2 to 3 rows a second on an
H200 (docs/benchmarks.md).
"""

from mllmrec.stage.main import run_main

import importlib.util
import os
import time
import warnings
from dataclasses import replace
from typing import Literal, NamedTuple

from pydantic.dataclasses import dataclass

from mllmrec.data.images import check_image_paths
from mllmrec.evaluation.metrics import CandidateLists
from mllmrec.models.options import LoraOptions
from mllmrec.ranking.checkpoints import is_trained, last_complete_checkpoint, training_lock
from mllmrec.ranking.options import RankerOptions
from mllmrec.ranking.rows import check_training_rows, first_users, image_names
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import read_rows, write_rejected
from mllmrec.stage.options import option, parse_options, print_options
from mllmrec.stage.record import Job, file_digests, world_size, write_record, write_state
from mllmrec.stage.transaction import new_folder

SECTION = "train"
# These change speed or what is logged, not the adapter.
SPEED_OPTIONS = (
    "score_batch_tokens",
    "workers",
    "save_total",
    "checkpoint_steps",
    "logging_steps",
    "tensorboard",
)


@dataclass
class Options(RankerOptions, LoraOptions):
    epochs: int = option(10, "epochs over train.jsonl (paper: 10, released code: 4)", ge=1)
    learning_rate: float = option(
        2e-5, "of AdamW (paper and released code: 2e-5)", ge=0, allow_inf_nan=False
    )
    batch_size: int = option(1, "rows in a micro-batch (paper: 1)", ge=1)
    accumulation: int = option(
        8, "micro-batches per step (paper: 8, released code: 4 on each of 6 GPUs)", ge=1
    )
    group_by: Literal["none", "length", "item"] = option(
        "none",
        "rows that share a micro-batch: length: of similar length; item: of one item, whose common "
        "prefix is then computed once",
    )
    warmup_ratio: float = option(
        0.0, "fraction of the steps in which the learning rate rises", ge=0, le=1
    )
    schedule: Literal["linear", "cosine", "constant"] = option(
        "linear", "of the learning rate (released code: constant)"
    )
    weight_decay: float = option(0.0, "of AdamW (released code: 0.01)", ge=0)
    clip: float = option(1.0, "gradient clipping (released code: 1.0)", gt=0, allow_inf_nan=False)
    loss: Literal["answer", "sequence"] = option(
        "answer",
        "answer: on the answer only; sequence: on all text (paper, equation 2, and released code)",
    )
    keep: Literal["best", "last"] = option(
        "best", "adapter that is kept: best validation AUC, or the last epoch's (released code)"
    )
    patience: int = option(
        0, "stop after this many epochs without a better validation AUC, 0 = never", ge=0
    )
    validation_users: int = option(
        0, "users whose candidate lists are scored after each epoch, 0 = all", ge=0
    )
    score_batch_tokens: int = option(16384, "tokens in a batch of the validation", ge=1)
    workers: int = option(0, "processes that read images ahead of the model", ge=0, le=256)
    checkpoint_steps: int = option(
        200, "steps between checkpoints, besides the one after each epoch", ge=0
    )
    save_total: int = option(2, "checkpoints kept; the best is one of them", ge=1)
    logging_steps: int = option(10, "steps between the means of the loss in the log", ge=1)
    tensorboard: bool = option(False, "also log for TensorBoard, into tensorboard/")


def training_arguments(options, with_validation):
    """transformers' TrainingArguments; epochs end with a validation and a checkpoint."""
    import torch
    from transformers import TrainingArguments

    from mllmrec.models.compat import one_device_per_process
    from mllmrec.models.loading import pick_device, pick_dtype

    device = pick_device()
    dtype = pick_dtype(options.dtype, device)
    several_on_cpu = device.type == "cpu" and world_size() > 1
    arguments = TrainingArguments(
        output_dir=str(options.system_dir / "checkpoints"),
        num_train_epochs=options.epochs,
        learning_rate=options.learning_rate,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulation,
        warmup_steps=options.warmup_ratio,  # below 1 it is a fraction
        lr_scheduler_type=options.schedule,
        weight_decay=options.weight_decay,
        max_grad_norm=options.clip,
        seed=options.seed,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu=device.type == "cpu",
        activation_checkpointing=options.gradient_checkpointing,
        dataloader_num_workers=options.workers,
        save_strategy="epoch",
        eval_strategy="epoch" if with_validation else "no",
        save_total_limit=options.save_total,
        load_best_model_at_end=with_validation and options.keep == "best",
        metric_for_best_model="auc" if with_validation else None,
        greater_is_better=True,
        logging_steps=options.logging_steps,
        report_to="tensorboard" if options.tensorboard else "none",
        include_num_input_tokens_seen="all",
        remove_unused_columns=False,
        label_names=["labels"],
        ddp_find_unused_parameters=False,
        ddp_backend="gloo" if several_on_cpu else None,
        restore_callback_states_from_checkpoint=True,
    )
    return one_device_per_process(arguments)


def without_too_long(rows, reader, path):
    """(rows without users whose question is too long, user_id -> reason, rows that are shortened).

    Raises InputError if nothing is left of the file `path`.
    """
    too_long, shortened = reader.find_too_long(rows)
    kept = [row for row in rows if row["user_id"] not in too_long]
    if rows and not kept:
        raise InputError(f"{path}: no question fits, the first: {too_long[rows[0]['user_id']]}")
    return kept, too_long, sum(user_id not in too_long for user_id in shortened)


class TrainingRows(NamedTuple):
    """Rows with answers. lengths: tokens of each training row, for group_by length, else None."""

    train: list[dict]
    validation: list[dict]
    lengths: list[int] | None = None


def supervised_fine_tuning(model, reader, rows, arguments, options):
    """The trainer of the paper's supervised fine-tuning: LoRA, AdamW, loss of equation 2.

    model: with LoRA on its language model; reader: RowReader; rows: TrainingRows.
    """
    from transformers import EarlyStoppingCallback

    from mllmrec.ranking.callbacks import CheckpointCallback, LogFileCallback, SetEpochCallback
    from mllmrec.ranking.collator import Collator
    from mllmrec.ranking.sampler import EpochSampler, EpochSettings
    from mllmrec.ranking.trainer import RankingTrainer

    step = arguments.world_size * options.batch_size * options.accumulation
    settings = EpochSettings(step, options.batch_size, options.group_by, options.seed)
    sampler = EpochSampler(rows.train, rows.lengths, settings)
    callbacks = [
        LogFileCallback(options.system_dir),
        CheckpointCallback(options.checkpoint_steps),
        SetEpochCallback(sampler),
    ]
    if options.pad_images and options.group_by != "none":
        raise InputError("--pad_images needs --group_by none: rows of a batch would depend on it")
    if options.patience and rows.validation:
        callbacks.append(EarlyStoppingCallback(options.patience))
    collator = Collator(
        reader,
        options.loss,
        share_prefix=options.group_by == "item",
        pad_images=options.pad_images > 0,
    )
    trainer = RankingTrainer(
        model=model,
        args=arguments,
        train_dataset=rows.train,
        eval_dataset=rows.validation,
        callbacks=callbacks,
        data_collator=collator,
        sampler=sampler,
        reader=reader,
        batch_tokens=options.score_batch_tokens,
    )
    if needs_equal_passes(trainer):
        collator.in_parts = False
    return trainer


def needs_equal_passes(trainer):
    """True if a micro-batch must be one pass through the model.

    Sharded training, where all processes run the same passes, and models whose loss is a mean over
    the pass and not over the step.
    """
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    return sharded or not trainer.model_accepts_loss_kwargs


def check_options(options):
    """Raise InputError for combinations that cannot work, before a model is loaded."""
    if options.quantization != "none" and os.environ.get("ACCELERATE_USE_FSDP") == "true":
        raise InputError(
            "FSDP cannot shard a model that is loaded with --quantization; use "
            "configs/accelerate/multi_gpu.yaml"
        )
    if options.patience and options.keep == "last":
        raise InputError("--patience stops at the best epoch, which --keep last would not keep")
    if options.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise InputError(
            "--tensorboard true needs the package tensorboard; pip install tensorboard, or leave "
            "the "
            "option out"
        )


def load_model(options):
    """(model with LoRA, ChatProcessor), checked against the options.

    With group_by item, attention must take a mask of its own for each row: SDPA.
    """
    import torch

    from mllmrec.models.loading import pick_device, pick_dtype
    from mllmrec.models.lora import add_lora, decoder_layer_class
    from mllmrec.ranking.reader import load_ranker
    from mllmrec.ranking.trainer import check_plain_positions, check_shared_prefix

    device = pick_device()
    if pick_dtype(options.dtype, device) == torch.float16 and device.type == "cpu":
        raise InputError("a CPU does not train in float16; pass --dtype float32")
    shared = options.group_by == "item"
    if shared:
        check_shared_prefix(options.loss, options.batch_size, options)
        options = replace(options, attention="sdpa")
    model, chat = load_ranker(options)
    if shared:
        check_plain_positions(model)
    # Else PEFT looks for layers that a vision tower may not have.
    os.environ.setdefault("FSDP_TRANSFORMER_CLS_TO_WRAP", decoder_layer_class(model))
    return add_lora(model, options), chat


def train(rows, validation, sizes, job, options):
    """Train, validate after every epoch, save the best adapter with its record.

    sizes: image path -> (width, height), see `check_training_rows`.
    """
    from transformers import set_seed

    from mllmrec.models.compat import stopped_after
    from mllmrec.ranking.answers import yes_no
    from mllmrec.ranking.reader import RowReader

    started, folder = time.monotonic(), options.system_dir
    warnings.filterwarnings("ignore", category=FutureWarning)  # renamings inside transformers, peft
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "tensorboard")
    set_seed(options.seed)
    model, chat = load_model(options)
    reader = RowReader(chat, folder, options.max_text_tokens, answers=yes_no(options))
    rows, rejected, shortened = without_too_long(rows, reader, folder / "train.jsonl")
    validation, more, _ = without_too_long(validation, reader, folder / "validation.jsonl")
    rejected |= more  # no user is in both files
    lengths = reader.lengths(rows, sizes) if options.group_by == "length" else None
    arguments = training_arguments(options, bool(validation))
    training_rows = TrainingRows(rows, validation, lengths)
    trainer = supervised_fine_tuning(model, reader, training_rows, arguments, options)
    checkpoints, main_process = folder / "checkpoints", trainer.is_world_process_zero()
    last = last_complete_checkpoint(checkpoints, may_delete=main_process)
    if main_process:
        write_state(checkpoints / "state.json", job, processes=world_size())
        lines = [{"user_id": user_id, "reason": reason} for user_id, reason in rejected.items()]
        write_rejected(folder / "training.rejected.jsonl", lines)
    if last:
        arguments.num_train_epochs = stopped_after(last) or options.epochs
    trainer.train(resume_from_checkpoint=last)
    counts = {
        "in": len(rows),
        "shortened": shortened,
        "validation_rows": len(validation),
        "rejected_users": len(rejected),
    }
    save_adapter(trainer, chat, counts, job, started)


def save_adapter(trainer, chat, counts, job, started):
    """Write adapter/ with its record, from the main process."""
    from mllmrec.models.loading import check_finite
    from mllmrec.models.lora import model_identity
    from mllmrec.ranking.callbacks import mean_loss

    # With FSDP, all processes must take part in collecting the weights.
    sharded = trainer.is_fsdp_enabled
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped) if sharded else None
    if not trainer.is_world_process_zero():
        return
    options, state = job.options, trainer.state
    adapter = options.system_dir / "adapter"
    check_finite("the trained adapter", trainer.model, only="lora_")
    dtype = "bfloat16" if trainer.args.bf16 else "float16" if trainer.args.fp16 else "float32"
    with new_folder(adapter) as folder:
        trainer.model.save_pretrained(folder, state_dict=weights)
        chat.processor.save_pretrained(folder)
        write_record(
            folder,
            job,
            time.monotonic() - started,
            counts,
            base=model_identity(options.model),
            dtype=dtype,
            loss=mean_loss(state.log_history),
            best_validation_auc=state.best_metric,
            steps=state.global_step,
        )
    note = (
        f"; {counts['shortened']:,} rows with a shortened preference" if counts["shortened"] else ""
    )
    if counts["rejected_users"]:
        path = options.system_dir / "training.rejected.jsonl"
        note += (
            f"; {counts['rejected_users']:,} users were rejected, each with its reason in {path}"
        )
    best = state.best_metric or float("nan")
    print(f"wrote {adapter}: {counts['in']:,} rows, best validation AUC {best:.4f}{note}")


def main(argv=None):
    options = parse_options(Options, SECTION, argv, __doc__)
    print_options(options, "stage 5, supervised fine-tuning")
    paths = [options.system_dir / "train.jsonl", options.system_dir / "validation.jsonl"]
    rows, validation = map(read_rows, paths)
    if not rows:
        raise InputError(
            f"{paths[0]} is empty; make it again with scripts/04_datasets.sh and see "
            "train.rejected.jsonl"
        )
    check_options(options)
    inputs = file_digests(*paths, options.model)
    job = Job.of(options, inputs, SPEED_OPTIONS, limit=options.limit)
    adapter = options.system_dir / "adapter"
    with training_lock(adapter):
        if not is_trained(adapter, job):
            rows = rows[: options.limit or None]
            validation = first_users(validation, options.validation_users)
            for split, path in zip((rows, validation), paths, strict=True):
                names = image_names(split)
                check_image_paths(names, path, options.data_dir, options.image_roots)
            sizes = check_training_rows(rows, paths[0]) | check_training_rows(validation, paths[1])
            if validation:  # lists that cannot be ranked are refused here
                CandidateLists.of([{**row, "score": 0.0} for row in validation], paths[1])
            train(rows, validation, sizes, job, options)
    print(f"next: bash scripts/06_score.sh {options.config}")


if __name__ == "__main__":
    run_main(main)
