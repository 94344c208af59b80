"""Stage 5: LoRA teaches the multimodal model to say yes or no to (preference, candidate) (paper, "Supervised Fine-Tuning").

In:  {output_dir}/train.jsonl, {output_dir}/validation.jsonl
Out: {output_dir}/adapter/                LoRA weights that plain PEFT loads, processor, run.json
     {output_dir}/training_log.jsonl      step, epoch, loss, learning rate, validation AUC and HR@5
     {output_dir}/training_curve.png      the same as a picture
     {output_dir}/checkpoints/            what the same command goes on from
     {output_dir}/training.rejected.jsonl users with a question that is too long even without a preference

    python MLLM-MSR/train/train_llava_sft.py --config configs/microlens.yaml

Sample: 552 steps in about 55 seconds on 2 CPU cores. LLaVA-v1.6-Mistral-7B: a GPU (README, "Which card for what"); time: not
measured yet.
"""

import importlib.util
import os
import shutil
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from data_processing.config import option, parse_args, show
from data_processing.errors import InputError, run
from data_processing.jsonl import read_rows, write_json, write_rejected, write_rows
from data_processing.metrics import by_user
from data_processing.pairs import check_pairs, first_users
from data_processing.run_record import check_same_job, digests, read_record, read_state, settings_of, world_size, write_record
from Inference.recommender import RecommenderArgs, add_lora, fingerprint, layer_class, load_recommender

# Another value of these gives the same adapter.
SPEED_OPTIONS = ("score_batch_tokens", "workers", "save_total", "checkpoint_steps", "logging_steps", "tensorboard")


@dataclass
class Args(RecommenderArgs):
    epochs: int = option(10, "passes over train.jsonl (paper: 10, released code: 4)")
    learning_rate: float = option(2e-5, "of AdamW (paper and released code: 2e-5)")
    batch_size: int = option(1, "pairs in one pass (paper: 1)")
    accumulation: int = option(8, "passes per step (paper: 8, released code: 4 on each of 6 GPUs)")
    group_by: Literal["none", "length", "item"] = option(
        "none", "what shares a pass: length: like lengths; item: pairs of one item, whose common beginning is then read once"
    )
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
    gradient_checkpointing: bool = option(False, "recompute instead of store: slower, less memory")
    patience: int = option(0, "stop after so many epochs without a better validation AUC, 0 = never")
    validation_users: int = option(0, "users whose candidate lists are scored after each epoch, 0 = all")
    score_batch_tokens: int = option(16384, "tokens in a batch of the validation")
    workers: int = option(0, "processes that read images ahead of the model")
    checkpoint_steps: int = option(200, "a checkpoint every so many steps, besides the one after each epoch")
    save_total: int = option(2, "checkpoints kept; the best is one of them")
    logging_steps: int = option(10, "the training log has the mean loss of every so many steps")
    tensorboard: bool = option(False, "also log for TensorBoard, into {output_dir}/tensorboard")


def main(argv=None):
    args = parse_args(Args, "train", argv, __doc__)
    show(args, "stage 5, supervised fine-tuning")
    folder = Path(args.output_dir)
    paths = [folder / "train.jsonl", folder / "validation.jsonl"]
    rows, validation = map(read_rows, paths)
    if not rows:
        raise InputError(f"{paths[0]} is empty; make it again with scripts/04_datasets.sh and look into train.rejected.jsonl")
    if args.quantization != "none" and os.environ.get("ACCELERATE_USE_FSDP") == "true":
        raise InputError("FSDP cannot split a model that is loaded with --quantization; use configs/accelerate/multi_gpu.yaml")
    if args.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise InputError("--tensorboard true wants the package tensorboard; pip install tensorboard, or leave the option out")
    settings, inputs = settings_of(args, SPEED_OPTIONS, limit=args.limit), digests(*paths, args.model)
    if is_done(folder / "adapter", settings, inputs, args):
        print(f"{folder / 'adapter'} is up to date, nothing to do")
    else:
        rows, validation = rows[: args.limit or None], first_users(validation, args.validation_users)
        sizes = check_pairs(rows, paths[0]) | check_pairs(validation, paths[1])
        if validation:
            by_user([{**row, "score": 0.0} for row in validation], paths[1])  # lists that could not be ranked
        train(rows, validation, sizes, folder, settings, inputs, args)
    print(f"next: bash scripts/06_score.sh {args.config}")


def is_done(adapter, settings, inputs, args):
    """True if the adapter was trained with these settings. Raises InputError if it, or a checkpoint, was not."""
    started = adapter.parent / "checkpoints" / "state.json"
    if args.overwrite and world_size() > 1:
        raise InputError(f"--overwrite cannot be used with several processes; delete {adapter} and {started.parent} first")
    if args.overwrite:
        for path in (adapter, started.parent):
            shutil.rmtree(path, ignore_errors=True)
    record = read_record(adapter)
    check_same_job(adapter, (record,), settings, inputs, "trained", "it")
    if record is None:  # with another number of processes the rest would be another order of the pairs
        check_same_job(adapter, (read_state(started),), settings | {"processes": world_size()}, inputs, "begun", "it")
    return record is not None


def last_whole_checkpoint(folder, may_delete=True):
    """Path of the last checkpoint that was written to its end, or None; what a killed process left behind is removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]))
    # The main process writes trainer_state.json last; each process has its own state of chance.
    whole = [p for p in found if (p / "trainer_state.json").exists() and len(list(p.glob("rng_state*"))) == world_size()]
    for path in set(found) - set(whole) if may_delete else ():
        shutil.rmtree(path)
    return str(whole[-1]) if whole else None


def epochs_until_stop(checkpoint):
    """Number of epochs after which the run of this checkpoint was told to stop, or None: it was not."""
    from transformers import TrainerState

    state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
    return round(state.epoch) if state.stateful_callbacks["TrainerControl"]["args"]["should_training_stop"] else None


def training_arguments(args, folder, device_type, dtype, with_validation):
    """transformers' TrainingArguments for `args`; epochs end with a validation and a checkpoint."""
    import torch
    from transformers import TrainingArguments

    several_on_cpu = device_type == "cpu" and world_size() > 1
    options = TrainingArguments(
        output_dir=str(folder), num_train_epochs=args.epochs, learning_rate=args.learning_rate,
        per_device_train_batch_size=args.batch_size, gradient_accumulation_steps=args.accumulation,
        warmup_steps=args.warmup_ratio, lr_scheduler_type=args.schedule, max_grad_norm=args.clip, seed=args.seed,
        bf16=dtype == torch.bfloat16, fp16=dtype == torch.float16, use_cpu=device_type == "cpu",
        activation_checkpointing=args.gradient_checkpointing, dataloader_num_workers=args.workers,
        save_strategy="epoch", eval_strategy="epoch" if with_validation else "no", save_total_limit=args.save_total,
        load_best_model_at_end=with_validation, metric_for_best_model="auc" if with_validation else None, greater_is_better=True,
        logging_steps=args.logging_steps, report_to="tensorboard" if args.tensorboard else "none", include_num_input_tokens_seen="all",
        remove_unused_columns=False, label_names=["labels"],
        ddp_find_unused_parameters=False, ddp_backend="gloo" if several_on_cpu else None, restore_callback_states_from_checkpoint=True,
    )  # fmt: skip
    options._n_gpu = min(options.n_gpu, 1)  # a process that sees several GPUs would wrap the model for all of them by itself
    return options


def set_too_long_aside(rows, reader, path):
    """(rows without the users with a question that is too long even without a preference, dict user_id -> reason, pairs cut).

    Raises InputError if nothing is left of the file `path`.
    """
    too_long, cut = reader.look_through(rows)
    kept = [row for row in rows if row["user_id"] not in too_long]
    if rows and not kept:
        raise InputError(f"{path}: no question fits, the first one: {too_long[rows[0]['user_id']]}")
    return kept, too_long, sum(user_id not in too_long for user_id in cut)


def train(rows, validation, sizes, folder, settings, inputs, args):
    """Trains, validates after every epoch, and saves the best adapter. sizes: see `check_pairs`."""
    # Imported here, so that --help and a missing input answer at once.
    import torch
    from transformers import EarlyStoppingCallback, set_seed

    from data_processing import figures
    from Inference.models import pick_device, pick_dtype
    from Inference.pair_reader import PairReader
    from Inference.trainer import (
        AfterLog,
        Collator,
        EverySteps,
        Order,
        RecommenderTrainer,
        TellEpoch,
        check_positions,
        check_sharing,
        mean_loss,
    )

    started = time.monotonic()
    warnings.filterwarnings("ignore", category=FutureWarning)  # renamings announced inside transformers and peft
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "tensorboard")
    set_seed(args.seed)
    device = pick_device()
    dtype = pick_dtype(args.dtype, device)
    if dtype == torch.float16 and device.type == "cpu":
        raise InputError("a CPU does not train in float16; pass --dtype float32")
    if args.group_by == "item":
        check_sharing(args)
        args = replace(args, attention="sdpa")
    model, chat = load_recommender(args)
    if args.group_by == "item":
        check_positions(model)
    os.environ.setdefault("FSDP_TRANSFORMER_CLS_TO_WRAP", layer_class(model))  # else PEFT looks for layers that no tower has
    reader = PairReader(chat, folder, args.max_text_tokens)
    rows, too_long, shortened = set_too_long_aside(rows, reader, folder / "train.jsonl")
    validation, more_too_long, _ = set_too_long_aside(validation, reader, folder / "validation.jsonl")
    too_long |= more_too_long  # a user is in one of the two
    lengths = reader.lengths(rows, sizes) if args.group_by == "length" else None
    model = add_lora(model, args)
    options = training_arguments(args, folder / "checkpoints", device.type, dtype, bool(validation))

    def write_log(log):
        write_rows(folder / "training_log.jsonl", log)
        if "loss" not in log[-1]:
            (folder / "training_curve.png").write_bytes(figures.training(log))

    step = options.world_size * args.batch_size * args.accumulation
    order = Order(rows, lengths, step, args.batch_size, args.group_by, args.seed)
    callbacks = [AfterLog(write_log), EverySteps(args.checkpoint_steps), TellEpoch(order)]
    if args.patience and validation:
        callbacks.append(EarlyStoppingCallback(args.patience))
    trainer = RecommenderTrainer(
        model=model, args=options, train_dataset=rows, eval_dataset=validation, callbacks=callbacks, reader=reader,
        data_collator=Collator(reader, args.loss, share=args.group_by == "item"), order=order, score_batch_tokens=args.score_batch_tokens,
    )  # fmt: skip
    main_process = trainer.is_world_process_zero()
    last = last_whole_checkpoint(folder / "checkpoints", main_process)
    if main_process:
        write_json(folder / "checkpoints" / "state.json", {"settings": settings | {"processes": world_size()}, "inputs": inputs})
        write_rejected(folder / "training.rejected.jsonl", [{"user_id": user_id, "reason": reason} for user_id, reason in too_long.items()])
    if last:
        options.num_train_epochs = epochs_until_stop(last) or args.epochs
    trainer.train(resume_from_checkpoint=last)
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped) if trainer.is_fsdp_enabled else None
    if not main_process:
        return
    adapter, best = folder / "adapter", trainer.state.best_metric
    trainer.model.save_pretrained(adapter, state_dict=weights)
    chat.processor.save_pretrained(adapter)
    counts = {"in": len(rows), "shortened": shortened, "validation_pairs": len(validation), "rejected_users": len(too_long)}
    more = {"base": fingerprint(args.model), "dtype": str(dtype).removeprefix("torch."), "loss": mean_loss(trainer.state.log_history)}
    more |= {"best_validation_auc": best, "steps": trainer.state.global_step}
    write_record(adapter, args, settings, inputs, time.monotonic() - started, counts, **more)
    cut = f"; of {shortened:,} pairs the preference was shortened to fit" if shortened else ""
    cut += f"; {len(too_long):,} users were set aside, each with its reason in {folder / 'training.rejected.jsonl'}" if too_long else ""
    print(f"wrote {adapter}: {len(rows):,} pairs, best validation AUC {best or float('nan'):.4f}{cut}")


if __name__ == "__main__":
    run(main)
