"""The Trainer of stage 5: its validation ranks candidate lists instead of computing a loss."""

import contextlib
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object

from mllmrec.evaluation.metrics import CandidateLists, hit_rate, per_user, pooled_auc
from mllmrec.models.compat import SamplerTrainer, has_plain_positions
from mllmrec.ranking.options import RankerOptions
from mllmrec.ranking.reader import RowReader
from mllmrec.ranking.sampler import EpochSampler
from mllmrec.ranking.scoring import ScoringOptions, candidate_scores, score_rows
from mllmrec.stage.errors import InputError


class RankingTrainer(SamplerTrainer):
    """Chooses the best model by a metric over whole candidate lists."""

    def __init__(
        self, *args: Any, sampler: EpochSampler, reader: RowReader, batch_tokens: int, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.train_sampler, self.reader, self.batch_tokens = sampler, reader, batch_tokens

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
            raise InputError(
                f"the loss in step {self.state.global_step + 1} is {loss.item()} ({names[0]}"
                f"{' and others' if len(names) > 1 else ''}): the training diverged; start again "
                "with a lower --learning_rate, or with --dtype float32"
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


def check_shared_prefix(loss: str, batch_size: int, options: RankerOptions) -> None:
    """Raise InputError if `--group_by item` cannot be used with these options."""
    if loss != "answer":
        raise InputError(
            "--group_by item needs --loss answer: one position cannot predict the next words of "
            "several "
            "texts"
        )
    if batch_size < 2:
        raise InputError(
            "--group_by item shares nothing with one row in a batch; set --batch_size to 2 or more"
        )
    if options.attention not in ("auto", "sdpa"):
        raise InputError(
            "--group_by item needs --attention sdpa, which takes a mask of its own for each row, "
            "not "
            f"{options.attention}"
        )


def check_plain_positions(model: Any) -> None:
    """Raise InputError if the model computes its own position ids, which packing cannot follow."""
    if not has_plain_positions(model):
        raise InputError(
            f"--group_by item needs a model without M-RoPE, not {model.config.model_type}; use "
            "--group_by length"
        )
