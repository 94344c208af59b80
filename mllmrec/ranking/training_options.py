"""Options that training and scoring share. No torch, so that --help answers at once."""

import importlib.util
import logging
import os
from pathlib import Path
from typing import Literal

from pydantic.dataclasses import dataclass

from mllmrec.models.model_options import MAX_TEXT_TOKENS, LoraOptions, ModelOptions
from mllmrec.stage.errors import InputError
from mllmrec.stage.options import option

logger = logging.getLogger(__name__)

# These change speed or what is logged, not the adapter.
TRAINING_SPEED_OPTIONS = (
    "score_batch_tokens",
    "workers",
    "save_total",
    "checkpoint_steps",
    "logging_steps",
    "report_to",
)


@dataclass
class RankerOptions(ModelOptions):
    """What training and scoring must agree on."""

    model: str = option(
        "llava-hf/llava-v1.6-mistral-7b-hf",
        "model that ranks, hub id or folder; a text model takes rows without "
        "images (paper: LLaVA-v1.6-Mistral-7B)",
    )
    max_text_tokens: int = option(
        MAX_TEXT_TOKENS,
        "of one row, the image counted as one token (paper: 512, released code: 1024)",
        ge=0,
    )
    answer_token: Literal["rendered", "bare", "alone"] = option(
        "rendered",
        "what is scored: rendered: the token that follows the prompt, e.g. ▁Yes; bare: the one "
        "called Yes, which the model may never emit (MLLM-MSR's released code); alone: the first "
        "token of the answer as a text of its own, ▁A where A was trained (MLLM4Rec's)",
    )
    end_token: bool = option(
        True, "the answer is followed by the end token in training (released code: false)"
    )
    pad_images: int = option(
        0,
        "pad the images of N consecutive rows with black to the largest, in training those of a "
        "micro-batch (released code: 6 in scoring, 12 without adapter); 0 = none",
        ge=0,
    )
    image_tiles: Literal["full", "single"] = option(
        "full",
        "single: LLaVA-NeXT gets the whole image only, 577 tokens instead of up to 2,900, "
        "for 24 GB",
    )


@dataclass
class FineTuningOptions(RankerOptions, LoraOptions):
    """How a ranker is fine-tuned."""

    epochs: int = option(10, "epochs over train.jsonl (paper: 10, released code: 4)", ge=1)
    max_steps: int = option(
        0,
        "stop after this many optimizer steps, which the schedule ends with; 0 = as epochs says",
        ge=0,
    )
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
    warmup_steps: int = option(0, "the same as a number of steps; 0 = as the ratio says", ge=0)
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
        "best", "adapter that is kept: that of the best validation, or the last (released code)"
    )
    patience: int = option(
        0, "stop after this many validations without a better one, 0 = never", ge=0
    )
    validation_steps: int = option(
        0, "steps between validations, each with a checkpoint; 0 = after each epoch", ge=0
    )
    validation_users: int = option(
        0, "users whose candidate lists are scored in a validation, 0 = all", ge=0
    )
    score_batch_tokens: int = option(16384, "tokens in a batch of the validation", ge=1)
    workers: int = option(0, "processes that read images ahead of the model", ge=0, le=256)
    checkpoint_steps: int = option(
        200, "steps between checkpoints, besides the one after each epoch", ge=0
    )
    save_total: int = option(2, "checkpoints kept; the best is one of them", ge=1)
    logging_steps: int = option(10, "steps between the means of the loss in the log", ge=1)
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = option(
        "none", "also log there; the package must be installed (tensorboard: into tensorboard/)"
    )


def training_files(options: FineTuningOptions) -> list[Path]:
    """What a training writes beside adapter/ and checkpoints/."""
    names = ("training_log.jsonl", "training_curve.png", "training.rejected.jsonl")
    return [options.system_dir / name for name in names]


def check_training_options(options: FineTuningOptions) -> None:
    """Raise InputError for combinations that cannot work, before a model is loaded."""
    if options.quantization != "none" and os.environ.get("ACCELERATE_USE_FSDP") == "true":
        raise InputError(
            "FSDP cannot shard a model that is loaded with "
            "--quantization; use configs/accelerate/multi_gpu.yaml"
        )
    if options.patience and options.keep == "last":
        raise InputError("--patience stops at the best epoch, which --keep last would not keep")
    if options.patience and options.max_steps:
        raise InputError("--patience stops a training of whole epochs; leave --max_steps out")
    if options.report_to != "none" and importlib.util.find_spec(options.report_to) is None:
        raise InputError(
            f"--report_to {options.report_to} needs the package {options.report_to}; pip install "
            f"{options.report_to}, or leave the option out"
        )
    if options.report_to == "tensorboard":
        logger.info(f"to see the logs: tensorboard --logdir {options.system_dir / 'tensorboard'}")
    if options.pad_images and options.group_by != "none":
        raise InputError("--pad_images needs --group_by none: rows of a batch would depend on it")
    if options.group_by == "item":
        _check_shared_prefix(options)


def _check_shared_prefix(options: FineTuningOptions) -> None:
    if options.loss != "answer":
        raise InputError(
            "--group_by item needs --loss answer: one position cannot predict the next words "
            "of several texts"
        )
    if options.batch_size < 2:
        raise InputError(
            "--group_by item shares nothing with one row in a batch; set --batch_size to 2 or more"
        )
    if options.attention not in ("auto", "sdpa"):
        raise InputError(
            "--group_by item needs --attention sdpa, which takes a mask of its own for each "
            f"row, not {options.attention}"
        )
