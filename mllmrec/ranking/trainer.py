"""Supervised fine-tuning with LoRA: the model, the Trainer that ranks candidate lists, the adapter.

The order of a training is in the stage scripts (`MLLM-MSR/train/train_llava_sft.py`,
`MLLM4Rec/train_ranker.py`); here are its parts.
"""

import contextlib
import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import gather_object
from peft.helpers import disable_input_dtype_casting
from torch.utils.data import DataLoader
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from mllmrec.evaluation.metrics import CandidateLists, hit_rate, per_user, pooled_auc
from mllmrec.models.adapters import make_portable, model_identity
from mllmrec.models.chat import ChatProcessor
from mllmrec.models.compat import has_plain_positions, one_device_per_process, stopped_after
from mllmrec.models.loading import check_finite, pick_device, pick_dtype
from mllmrec.models.lora import add_lora, decoder_layer_class
from mllmrec.models.model_card import write_model_card
from mllmrec.ranking.batches import Collator, EpochSampler
from mllmrec.ranking.checkpoints import last_complete_checkpoint
from mllmrec.ranking.reader import load_ranker
from mllmrec.ranking.scoring import ScoringOptions, candidate_scores, score_rows
from mllmrec.ranking.training_events import TrainingEvents, mean_loss
from mllmrec.ranking.training_options import FineTuningOptions
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import write_rejected
from mllmrec.stage.output import WholeOutput, new_folder
from mllmrec.stage.record import world_size
from mllmrec.stage.schema import Row

logger = logging.getLogger(__name__)


def load_with_lora(options: FineTuningOptions) -> tuple[Any, ChatProcessor]:
    """(model with LoRA on its language model, ChatProcessor).

    With group_by item, attention must take a mask of its own for each row: SDPA.
    """
    warnings.filterwarnings("ignore", category=FutureWarning)  # renamings in transformers, peft
    device = pick_device()
    if pick_dtype(options.dtype, device) == torch.float16 and device.type == "cpu":
        raise InputError("a CPU does not train in float16; pass --dtype float32")
    shares_prefix = options.group_by == "item"
    model, chat = load_ranker(replace(options, attention="sdpa") if shares_prefix else options)
    if shares_prefix and not has_plain_positions(model):
        raise InputError(
            f"--group_by item needs a model without M-RoPE, not {model.config.model_type}; "
            "use --group_by length"
        )
    # Else PEFT looks for layers that a vision tower may not have.
    os.environ.setdefault("FSDP_TRANSFORMER_CLS_TO_WRAP", decoder_layer_class(model))
    return add_lora(model, options), chat


def training_arguments(
    options: FineTuningOptions, with_validation: bool, best_by: str
) -> TrainingArguments:
    """transformers' TrainingArguments; a validation goes with a checkpoint."""
    by_steps = with_validation and options.validation_steps > 0
    device = pick_device()
    dtype = pick_dtype(options.dtype, device)
    arguments = TrainingArguments(
        output_dir=str(options.system_dir / "checkpoints"),
        num_train_epochs=options.epochs,
        max_steps=options.max_steps or -1,
        learning_rate=options.learning_rate,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulation,
        warmup_steps=options.warmup_steps or options.warmup_ratio,  # below 1 it is a fraction
        lr_scheduler_type=options.schedule,
        weight_decay=options.weight_decay,
        max_grad_norm=options.clip,
        seed=options.seed,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu=device.type == "cpu",
        activation_checkpointing=options.gradient_checkpointing,
        dataloader_num_workers=options.workers,
        save_strategy="steps" if by_steps else "epoch",
        save_steps=options.validation_steps if by_steps else 500,
        eval_strategy="steps" if by_steps else "epoch" if with_validation else "no",
        eval_steps=options.validation_steps if by_steps else None,
        save_total_limit=options.save_total,
        load_best_model_at_end=with_validation and options.keep == "best",
        metric_for_best_model=best_by if with_validation else None,
        greater_is_better=True,
        logging_steps=options.logging_steps,
        disable_tqdm=True,  # see TrainingEvents
        report_to=options.report_to,
        include_num_input_tokens_seen="all",
        remove_unused_columns=False,
        label_names=["labels"],
        ddp_find_unused_parameters=False,
        ddp_backend="gloo" if device.type == "cpu" and world_size() > 1 else None,
        restore_callback_states_from_checkpoint=True,
    )
    return one_device_per_process(arguments)


class RankingTrainer(Trainer):
    """A Trainer that keeps the epoch whose adapter ranks the validation lists best.

    model: with LoRA; sampler: the training rows, in the order of each epoch; collator: makes
    batches of them; validation: rows of whole candidate lists; best_by: auc or ndcg@10, the metric
    that chooses the epoch.
    """

    def __init__(
        self,
        model: Any,
        sampler: EpochSampler,
        collator: Collator,
        validation: Sequence[Row],
        options: FineTuningOptions,
        best_by: str,
    ) -> None:
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(options.system_dir / "tensorboard")
        self.events = TrainingEvents(sampler, options)
        callbacks: list[TrainerCallback] = [self.events]
        if options.patience and validation:
            callbacks.append(EarlyStoppingCallback(options.patience))
        super().__init__(
            model=model,
            args=training_arguments(options, bool(validation), best_by),
            train_dataset=sampler.rows,
            eval_dataset=list(validation),
            data_collator=collator,
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)
        self.sampler, self.reader, self.best_by = sampler, collator.reader, best_by
        self.batch_tokens = options.score_batch_tokens
        if needs_equal_passes(self):
            collator.in_parts = False

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The training rows in the sampler's order, shared by the processes."""
        loader: DataLoader[Any] = DataLoader(
            self.sampler.rows,  # type: ignore[arg-type]
            self.args.per_device_train_batch_size,
            sampler=self.sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One micro-batch, its parts one after the other (see Collator).

        Raises InputError, naming its rows, if the loss is not finite.
        """
        names, parts = inputs.pop("row_names"), inputs.pop("parts", None) or [inputs]
        losses = []
        for number, part in enumerate(parts, start=1):
            # Processes with different numbers of parts exchange gradients once, with the last.
            last = number == len(parts)
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                losses.append(super().training_step(model, part, *args, **kwargs))
        loss = torch.stack(losses).sum()  # each is divided by the answer tokens of the whole step
        if not torch.isfinite(loss):
            others = " and others" if len(names) > 1 else ""
            raise InputError(
                f"the loss in step {self.state.global_step + 1} is {loss.item()} "
                f"({names[0]}{others}): the training diverged; start again with a lower "
                "--learning_rate, or with --dtype float32"
            )
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Score the validation rows; the processes share them, but with FSDP each scores all."""
        rows: Any = self.eval_dataset
        # FSDP: every process must run the same forward passes.
        all_score_all = self.is_fsdp_enabled or self.args.world_size == 1
        model: Any = self.model_wrapped if self.is_fsdp_enabled else self.model
        model.eval()
        shard = (0, 1) if all_score_all else (self.args.process_index, self.args.world_size)
        options = ScoringOptions(self.batch_tokens, shard=shard)
        scored = [
            line
            for index, logits in score_rows(model, self.reader, rows, options)
            for line in candidate_scores(rows[index], logits, self.reader.answers)
        ]
        scored = scored if all_score_all else gather_object(scored)
        lists = CandidateLists.of(scored, "validation.jsonl")
        metrics = {"eval_auc": pooled_auc(lists), "eval_hr@5": float(np.mean(hit_rate(lists, 5)))}
        metrics["eval_ndcg@10"] = float(np.mean(per_user(lists, (10,))["ndcg@10"]))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def train_or_resume(self, output: WholeOutput) -> None:
        """Train to the end, from the last complete checkpoint if there is one.

        output: of the adapter; an old one that is to be overwritten is deleted by the first step.
        """
        assert output.checkpoints is not None
        is_first, last = self.is_world_process_zero(), None
        if output.job.options.overwrite:
            self.events.overwritten = output if is_first else None
        else:
            if is_first:
                output.begin()
            last = last_complete_checkpoint(output.checkpoints, may_delete=is_first)
        stopped = stopped_after(last) if last and self.args.max_steps < 0 else None
        if stopped is not None:  # a run that stopped early goes no further
            self.args.num_train_epochs = stopped
        # PEFT would convert each input of LoRA to float32, and autocast back to 16 bit.
        with disable_input_dtype_casting(cast(Any, self.model)):
            self.train(resume_from_checkpoint=last)


def needs_equal_passes(trainer: Trainer) -> bool:
    """True if a micro-batch must be one pass through the model.

    Sharded training, where all processes run the same passes, and models whose loss is a mean over
    the pass and not over the step.
    """
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    return bool(sharded or not trainer.model_accepts_loss_kwargs)


def save_adapter(
    trainer: RankingTrainer,
    chat: ChatProcessor,
    output: WholeOutput,
    counts: dict[str, int],
    rejected: Mapping[str, str],
) -> None:
    """Write adapter/ with its record, and training.rejected.jsonl, from the first process.

    counts: for the record; rejected: user_id -> reason.
    """
    # With FSDP, all processes must take part in collecting the weights.
    sharded = trainer.is_fsdp_enabled
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped) if sharded else None
    if not trainer.is_world_process_zero():
        return
    adapter, state, model = output.path, trainer.state, cast(Any, trainer.model)
    base = cast(FineTuningOptions, output.job.options).model
    rejected_path = adapter.with_name("training.rejected.jsonl")
    lines = [{"user_id": user_id, "reason": reason} for user_id, reason in rejected.items()]
    write_rejected(rejected_path, lines)
    check_finite("the trained adapter", model, only="lora_")
    dtype = "bfloat16" if trainer.args.bf16 else "float16" if trainer.args.fp16 else "float32"
    with new_folder(adapter) as folder:
        model.save_pretrained(folder, state_dict=weights)
        make_portable(folder, base)
        chat.processor.save_pretrained(folder)
        record = output.finish(
            counts | {"rejected_users": len(rejected)},
            folder,
            base=model_identity(base),
            dtype=dtype,
            loss=mean_loss(state.log_history),
            **{f"best_validation_{trainer.best_by}": state.best_metric},
            steps=state.global_step,
        )
        write_model_card(folder, record)
    text = f"wrote {adapter}: {counts['in']:,} rows, best validation {trainer.best_by.upper()} "
    text += f"{state.best_metric or float('nan'):.4f}"
    if counts.get("shortened"):
        text += f"; {counts['shortened']:,} rows with a shortened preference"
    if rejected:
        text += f"; {len(rejected):,} users were rejected, each with its reason in {rejected_path}"
    logger.info(text)
