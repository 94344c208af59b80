"""Supervised fine-tuning of a ranker with LoRA, the same for both systems.

No torch at import, so that a stage answers --help at once.
"""

import importlib.util
import logging
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from mllmrec.data.images import check_image_paths
from mllmrec.evaluation.metrics import CandidateLists
from mllmrec.ranking.checkpoints import is_trained, last_complete_checkpoint, training_lock
from mllmrec.ranking.options import TRAINING_SPEED_OPTIONS, FineTuningOptions
from mllmrec.ranking.rows import (
    ANSWERS,
    check_training_rows,
    first_users,
    image_names,
)
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import PathLike, read_rows, write_rejected
from mllmrec.stage.record import (
    Job,
    file_digests,
    world_size,
    write_record,
    write_state,
)
from mllmrec.stage.schema import Row
from mllmrec.stage.transaction import new_folder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """What is learned.

    answers: yes_no or letters, see `answers.answer_set`; best_by: the validation metric by which
    the best epoch is chosen; maker: the script that makes the rows; ignore: further options of the
    stage that do not change the adapter.
    """

    answers: str = "yes_no"
    best_by: str = "auc"
    maker: str = "scripts/04_datasets.sh"
    ignore: Sequence[str] = ()


def training_arguments(
    options: FineTuningOptions, with_validation: bool, best_by: str = "auc"
) -> Any:
    """transformers' TrainingArguments; epochs end with a validation and a checkpoint.

    best_by: the validation metric by which the best epoch is chosen.
    """
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
        metric_for_best_model=best_by if with_validation else None,
        greater_is_better=True,
        logging_steps=options.logging_steps,
        disable_tqdm=True,  # see ProgressCallback
        report_to=options.report_to,
        include_num_input_tokens_seen="all",
        remove_unused_columns=False,
        label_names=["labels"],
        ddp_find_unused_parameters=False,
        ddp_backend="gloo" if several_on_cpu else None,
        restore_callback_states_from_checkpoint=True,
    )
    return one_device_per_process(arguments)


def without_too_long(
    rows: Sequence[Row], reader: Any, path: PathLike
) -> tuple[list[Row], dict[str, str], int]:
    """(rows without users whose question is too long, user_id -> reason, rows that are shortened).

    Raises InputError if nothing is left of the file `path`.
    """
    too_long, shortened = reader.find_too_long(rows)
    kept = [row for row in rows if row["user_id"] not in too_long]
    if rows and not kept:
        raise InputError(f"{path}: no question fits, the first: {too_long[rows[0]['user_id']]}")
    return kept, too_long, sum(user_id not in too_long for user_id in shortened)


@dataclass(frozen=True)
class TrainingRows:
    """Rows with answers. lengths: tokens of each training row, for group_by length, else None."""

    train: list[Row]
    validation: list[Row]
    lengths: list[int] | None = None


def supervised_fine_tuning(
    model: Any, reader: Any, rows: TrainingRows, arguments: Any, options: FineTuningOptions
) -> Any:
    """The trainer of the paper's supervised fine-tuning: LoRA, AdamW, loss of equation 2.

    model: with LoRA on its language model; reader: RowReader; rows: TrainingRows.
    """
    from transformers import EarlyStoppingCallback, PrinterCallback

    from mllmrec.ranking.callbacks import (
        CheckpointCallback,
        LogFileCallback,
        ProgressCallback,
        SetEpochCallback,
    )
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
        ProgressCallback(),
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
    trainer.remove_callback(PrinterCallback)
    if needs_equal_passes(trainer):
        collator.in_parts = False
    return trainer


def needs_equal_passes(trainer: Any) -> bool:
    """True if a micro-batch must be one pass through the model.

    Sharded training, where all processes run the same passes, and models whose loss is a mean over
    the pass and not over the step.
    """
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    return bool(sharded or not trainer.model_accepts_loss_kwargs)


def check_options(options: FineTuningOptions) -> None:
    """Raise InputError for combinations that cannot work, before a model is loaded."""
    if options.quantization != "none" and os.environ.get("ACCELERATE_USE_FSDP") == "true":
        raise InputError(
            "FSDP cannot shard a model that is loaded with --quantization; use "
            "configs/accelerate/multi_gpu.yaml"
        )
    if options.patience and options.keep == "last":
        raise InputError("--patience stops at the best epoch, which --keep last would not keep")
    if options.report_to != "none" and importlib.util.find_spec(options.report_to) is None:
        raise InputError(
            f"--report_to {options.report_to} needs the package {options.report_to}; pip install "
            f"{options.report_to}, or leave the option out"
        )


def load_model(options: FineTuningOptions) -> tuple[Any, Any]:
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


def train(
    rows: list[Row],
    validation: list[Row],
    sizes: Mapping[Path, tuple[int, int]],
    job: Job,
    task: Task,
) -> None:
    """Train, validate after every epoch, save the best adapter with its record.

    sizes: image path -> (width, height), see `check_training_rows`.
    """
    from transformers import set_seed

    from mllmrec.models.compat import stopped_after
    from mllmrec.ranking.answers import answer_set
    from mllmrec.ranking.reader import RowReader

    options = cast(FineTuningOptions, job.options)
    started, folder = time.monotonic(), options.system_dir
    warnings.filterwarnings("ignore", category=FutureWarning)  # renamings inside transformers, peft
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "tensorboard")
    set_seed(options.seed)
    model, chat = load_model(options)
    reader = RowReader(
        chat, folder, options.max_text_tokens, answers=answer_set(task.answers, options)
    )
    rows, rejected, shortened = without_too_long(rows, reader, folder / "train.jsonl")
    validation, more, _ = without_too_long(validation, reader, folder / "validation.jsonl")
    rejected |= more  # no user is in both files
    lengths = reader.lengths(rows, sizes) if options.group_by == "length" else None
    arguments = training_arguments(options, bool(validation), task.best_by)
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
    save_adapter(trainer, chat, counts, job, started, task.best_by)


def save_adapter(
    trainer: Any, chat: Any, counts: dict[str, int], job: Job, started: float, best_by: str = "auc"
) -> None:
    """Write adapter/ with its record, from the main process. best_by: see `training_arguments`."""
    from mllmrec.models.loading import check_finite
    from mllmrec.models.lora import make_portable, model_identity
    from mllmrec.models.model_card import write_model_card
    from mllmrec.ranking.callbacks import mean_loss

    # With FSDP, all processes must take part in collecting the weights.
    sharded = trainer.is_fsdp_enabled
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped) if sharded else None
    if not trainer.is_world_process_zero():
        return
    options, state = cast(FineTuningOptions, job.options), trainer.state
    adapter = options.system_dir / "adapter"
    check_finite("the trained adapter", trainer.model, only="lora_")
    dtype = "bfloat16" if trainer.args.bf16 else "float16" if trainer.args.fp16 else "float32"
    with new_folder(adapter) as folder:
        trainer.model.save_pretrained(folder, state_dict=weights)
        make_portable(folder, options.model)
        chat.processor.save_pretrained(folder)
        record = write_record(
            folder,
            job,
            time.monotonic() - started,
            counts,
            base=model_identity(options.model),
            dtype=dtype,
            loss=mean_loss(state.log_history),
            **{f"best_validation_{best_by}": state.best_metric},
            steps=state.global_step,
        )
        write_model_card(folder, record)
    note = (
        f"; {counts['shortened']:,} rows with a shortened preference" if counts["shortened"] else ""
    )
    if counts["rejected_users"]:
        path = options.system_dir / "training.rejected.jsonl"
        note += (
            f"; {counts['rejected_users']:,} users were rejected, each with its reason in {path}"
        )
    best = f"best validation {best_by.upper()} {state.best_metric or float('nan'):.4f}"
    logger.info(f"wrote {adapter}: {counts['in']:,} rows, {best}{note}")


def fine_tune(options: FineTuningOptions, task: Task = Task()) -> None:
    """train.jsonl and validation.jsonl of the system's folder -> adapter/, unless it is there.

    Raises InputError for rows, images or options that do not fit, before a model is loaded.
    """
    paths = [options.system_dir / "train.jsonl", options.system_dir / "validation.jsonl"]
    rows, validation = map(read_rows, paths)
    if not rows:
        raise InputError(
            f"{paths[0]} is empty; make it again with {task.maker} and see train.rejected.jsonl"
        )
    check_options(options)
    inputs = file_digests(*paths, options.model)
    ignore = (*TRAINING_SPEED_OPTIONS, *task.ignore)
    job = Job.of(options, inputs, ignore, limit=options.limit)
    adapter = options.system_dir / "adapter"
    with training_lock(adapter):
        if is_trained(adapter, job):
            return
        rows = rows[: options.limit or None]
        validation = first_users(validation, options.validation_users)
        for split, path in zip((rows, validation), paths, strict=True):
            names = image_names(split)
            check_image_paths(names, path, options.data_dir, options.image_roots)
        texts = ANSWERS[task.answers]
        sizes = check_training_rows(rows, paths[0], texts)
        sizes |= check_training_rows(validation, paths[1], texts)
        if validation and task.answers == "yes_no":  # lists that cannot be ranked are refused here
            CandidateLists.of([{**row, "score": 0.0} for row in validation], paths[1])
        train(rows, validation, sizes, job, task)
    # The trainer's objects refer to each other; a script that scores next loads a model again.
    from mllmrec.models.compat import empty_device_cache

    empty_device_cache(collect_garbage=True)
