"""Stage 5: LoRA teaches the multimodal model to say yes or no to (preference, candidate) (paper, "Supervised Fine-Tuning").

In:  {output_dir}/train.jsonl, {output_dir}/validation.jsonl
Out: {output_dir}/adapter/                LoRA weights that plain PEFT loads, processor, run.json
     {output_dir}/training_log.jsonl      step, epoch, loss, learning rate, validation AUC and HR@5
     {output_dir}/checkpoints/            what the same command goes on from
     {output_dir}/training.rejected.jsonl users with a question that is too long even without a preference

    python MLLM-MSR/train/train_llava_sft.py --config configs/microlens.yaml

Sample: 276 steps in about 45 seconds on 2 CPU cores. LLaVA-v1.6-Mistral-7B: a GPU; memory and time: not measured yet.
"""

import shutil
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_processing.config import ModelArgs, option, parse_args, show
from data_processing.errors import InputError, run
from data_processing.jsonl import read_rows, write_json, write_rows
from data_processing.metrics import by_user, per_user, pooled_auc
from data_processing.run_record import check_same_job, digests, read_record, read_state, settings_of, write_record

SPEED_OPTIONS = ("score_batch_tokens", "workers")  # another value of these gives the same adapter


@dataclass
class Args(ModelArgs):
    model: str = option("llava-hf/llava-v1.6-mistral-7b-hf", "multimodal chat model, hub id or folder (paper: LLaVA-v1.6-Mistral-7B)")
    epochs: int = option(10, "passes over train.jsonl (paper: 10, released code: 4)")
    learning_rate: float = option(2e-5, "of AdamW (paper and released code: 2e-5)")
    batch_size: int = option(1, "pairs in one forward pass (paper: 1)")
    accumulation: int = option(8, "passes per step (paper: 8, released code: 4 on each of 6 GPUs)")
    warmup_ratio: float = option(0.0, "share of the steps in which the learning rate rises")
    schedule: Literal["linear", "cosine", "constant"] = option("linear", "of the learning rate")
    clip: float = option(1.0, "gradient clipping (released code: 1.0)")
    lora_r: int = option(8, "rank (paper: 8, released code: 16)")
    lora_alpha: int = option(32, "scale (released code: 32; the paper does not say)")
    lora_dropout: float = option(0.1, "released code: 0.1; the paper does not say")
    lora_layers: list[str] = option([], "linear layers of the language model, e.g. q_proj v_proj; empty = all (released code)")
    loss: Literal["answer", "sequence"] = option(
        "answer", "answer: on the answer only; sequence: on all text (paper, equation 2, and released code)"
    )
    max_text_tokens: int = option(512, "of one pair, the picture counted as one token (paper: 512, released code: 1024)")
    gradient_checkpointing: bool = option(False, "recompute instead of store: slower, less memory")
    score_batch_tokens: int = option(16384, "tokens in a batch of the validation")
    workers: int = option(0, "processes that read images ahead of the model")
    save_total: int = option(2, "checkpoints kept; the best is one of them")


class Collator:
    """Lines of train.jsonl -> one right-padded batch with the loss on the answer, or on the whole text.

    The training text is the scoring text plus the answer. With loss "answer", logits are computed for the answer's
    positions only: `logits_to_keep` (batch, answer length) holds the positions before the answer tokens and
    `shift_labels` the tokens themselves, which is how transformers takes labels that need no shifting.
    """

    def __init__(self, reader, loss):
        self.reader, self.chat, self.loss = reader, reader.chat, loss

    def text(self, row):
        """The rendered pair, question and answer."""
        return self.reader.prompt(row)[0] + self.chat.answer_texts[row["label"]]

    def __call__(self, rows):
        import torch

        batch = self.chat.encode([self.text(row) for row in rows], [self.reader.image(row) for row in rows], side="right")
        answers = [self.chat.answer_ids[row["label"]] for row in rows]
        lengths = batch["attention_mask"].sum(1).tolist()
        for row, length, answer, ids in zip(rows, lengths, answers, batch["input_ids"].tolist(), strict=True):
            if ids[length - len(answer) : length] != answer:
                raise InputError(
                    f"user {row['user_id']!r}, item {row['item_id']!r}: the rendered text does not end with the answer's tokens"
                )
        if self.loss == "sequence":
            not_text = (batch["attention_mask"] == 0) | (batch["input_ids"] == self.chat.image_token_id)
            batch["labels"] = batch["input_ids"].masked_fill(not_text, -100)
            return batch
        longest = max(map(len, answers))
        place = [
            [length - len(a) - 1 + k for k in range(len(a))] + [0] * (longest - len(a)) for length, a in zip(lengths, answers, strict=True)
        ]
        wanted = [a + [-100] * (longest - len(a)) for a in answers]
        batch["logits_to_keep"] = torch.tensor(place)
        batch["labels"] = batch["shift_labels"] = torch.tensor(wanted)
        return batch


def add_lora(model, args):
    """`model` with LoRA on the linear layers of its language model and nowhere else; prints what is adapted."""
    from peft import LoraConfig, get_peft_model

    from Inference.models import language_model_linears

    pattern, chosen = language_model_linears(model, args.lora_layers)
    config = LoraConfig(
        r=args.lora_r, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout, target_modules=pattern, task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(model, config)
    trainable = {name: p.numel() for name, p in adapted.named_parameters() if p.requires_grad}
    strays = [name for name in trainable if not any(f".{layer}." in name for layer in chosen)]
    if strays:
        raise InputError(f"LoRA would also train {strays[0]}, which is no part of the language model; set --lora_layers")
    print(f"LoRA on {len(chosen)} linear layers, {pattern}: {sum(trainable.values()):,} trainable parameters")
    return adapted


def validation_metrics(model, reader, rows, args):
    """dict auc, hr@5 over the validation users' whole candidate lists."""
    import numpy as np

    from Inference.scoring import probability, score_pairs

    scored = [{**rows[i], "score": probability(yes, no)} for i, yes, no in score_pairs(model, reader, rows, args.score_batch_tokens)]
    scores, labels = map(np.stack, zip(*by_user(scored, "validation.jsonl").values(), strict=True))
    return {"auc": pooled_auc(scores, labels), "hr@5": float(per_user(scores)["hr@5"].mean())}


def main(argv=None):
    args = parse_args(Args, "train", argv, __doc__)
    show(args, "stage 5, supervised fine-tuning")
    folder = Path(args.output_dir)
    train_path, validation_path, adapter = folder / "train.jsonl", folder / "validation.jsonl", folder / "adapter"
    rows, validation = read_rows(train_path), read_rows(validation_path)
    if not rows:
        raise InputError(f"{train_path} is empty; make it again with scripts/04_datasets.sh and look into train.rejected.jsonl")
    settings = settings_of(args, SPEED_OPTIONS, limit=args.limit)
    inputs = digests(train_path, validation_path, args.model)
    if is_done(adapter, settings, inputs, args):
        print(f"{adapter} is up to date, nothing to do")
    else:
        train(rows[: args.limit or None], validation, folder, settings, inputs, args)
    print(f"next: bash scripts/06_score.sh {args.config}")


def is_done(adapter, settings, inputs, args):
    """True if the adapter was trained with these settings. Raises InputError if it, or a checkpoint, was not."""
    started = adapter.parent / "checkpoints" / "state.json"
    if args.overwrite:
        for path in (adapter, started.parent):
            shutil.rmtree(path, ignore_errors=True)
    record = read_record(adapter)
    check_same_job(adapter, (record, read_state(started)), settings, inputs, "trained", "it")
    return record is not None


def last_whole_checkpoint(folder):
    """Path of the last checkpoint that was written to its end, or None; what a killed process left behind is removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]))
    whole = [path for path in found if (path / "trainer_state.json").exists()]  # the Trainer writes this file last
    for path in set(found) - set(whole):
        shutil.rmtree(path)
    return str(whole[-1]) if whole else None


def train(rows, validation, folder, settings, inputs, args):
    """Trains, validates after every epoch, and saves the best adapter."""
    # Imported here, so that --help and a missing input answer at once.
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

    from Inference.chat import Chat
    from Inference.models import load_multimodal, pick_device, pick_dtype
    from Inference.scoring import PairReader

    started = time.monotonic()
    warnings.filterwarnings("ignore", category=FutureWarning)  # renamings announced inside transformers and peft
    set_seed(args.seed)
    model, processor = load_multimodal(args.model, args.dtype, args.attention)
    reader = PairReader(Chat(processor), folder, args.max_text_tokens)
    too_long = reader.too_long([*rows, *validation])
    rows, validation = ([row for row in part if row["user_id"] not in too_long] for part in (rows, validation))
    write_rows(folder / "training.rejected.jsonl", [{"user_id": user_id, "reason": reason} for user_id, reason in too_long.items()])
    model = add_lora(model, args)
    dtype = pick_dtype(args.dtype, pick_device())

    class Recommender(Trainer):
        def evaluate(self, *_, **__):
            """Ranking metrics in place of a loss: they are what the model is chosen by."""
            self.model.eval()
            found = validation_metrics(self.model, reader, validation, args)
            metrics = {f"eval_{name}": value for name, value in found.items()}
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    class Log(TrainerCallback):
        def on_log(self, _, state, *__, **___):
            write_rows(folder / "training_log.jsonl", state.log_history)

    checkpoints = folder / "checkpoints"
    options = TrainingArguments(
        output_dir=str(checkpoints), num_train_epochs=args.epochs, learning_rate=args.learning_rate,
        per_device_train_batch_size=args.batch_size, gradient_accumulation_steps=args.accumulation,
        warmup_steps=args.warmup_ratio, lr_scheduler_type=args.schedule, max_grad_norm=args.clip, seed=args.seed,
        bf16=dtype == torch.bfloat16, fp16=dtype == torch.float16, use_cpu=model.device.type == "cpu",
        activation_checkpointing=args.gradient_checkpointing, dataloader_num_workers=args.workers,
        logging_steps=10, save_strategy="epoch", eval_strategy="epoch" if validation else "no", save_total_limit=args.save_total,
        load_best_model_at_end=bool(validation), metric_for_best_model="auc" if validation else None, greater_is_better=True,
        remove_unused_columns=False, report_to="none", label_names=["labels"],
    )  # fmt: skip
    trainer = Recommender(
        model=model, args=options, train_dataset=rows, eval_dataset=validation, data_collator=Collator(reader, args.loss),
        callbacks=[Log()],
    )  # fmt: skip
    last = last_whole_checkpoint(checkpoints)
    write_json(checkpoints / "state.json", {"settings": settings, "inputs": inputs})
    result = trainer.train(resume_from_checkpoint=last)
    adapter = folder / "adapter"
    trainer.model.save_pretrained(adapter)
    processor.save_pretrained(adapter)
    best = trainer.state.best_metric
    counts = {"in": len(rows), "shortened": reader.shortened, "validation_pairs": len(validation), "rejected_users": len(too_long)}
    write_record(adapter, args, settings, inputs, time.monotonic() - started, counts, loss=result.training_loss, best_validation_auc=best)
    shortened = f"; {reader.shortened:,} times a preference was shortened to fit" if reader.shortened else ""
    print(f"wrote {adapter}: {len(rows):,} pairs, best validation AUC {best or float('nan'):.4f}{shortened}")


if __name__ == "__main__":
    run(main)
