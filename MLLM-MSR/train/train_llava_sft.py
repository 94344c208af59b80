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
CPU cores. LLaVA-v1.6-Mistral-7B: a GPU (docs/gpu.md); 2 to 3 rows a second on an
H200 (docs/benchmarks.md).
"""

from mllmrec.stage.main import run_main

from collections.abc import Sequence
from pathlib import Path

from mllmrec.evaluation.metrics import CandidateLists
from mllmrec.ranking.row_checks import check_row_images, check_rows_source, check_training_rows
from mllmrec.ranking.rows import first_users
from mllmrec.ranking.training_options import (
    TRAINING_SPEED_OPTIONS,
    FineTuningOptions,
    check_training_options,
    training_files,
)
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import read_rows
from mllmrec.stage.options import parse_options, print_next, print_options
from mllmrec.stage.output import WholeOutput
from mllmrec.stage.record import Job, file_digests
from mllmrec.stage.schema import Row

SECTION = "train"


def fine_tune(
    rows: list[Row], validation: list[Row], output: WholeOutput, options: FineTuningOptions
) -> None:
    """The paper's supervised fine-tuning.

    A row is the question x about a user's preference and a candidate, and its answer y, Yes or No.
    LoRA learns the weights W_k + B_k A_k that minimise  -sum log p(y_t | x, y_<t)  over the tokens
    t of the answer, or with `--loss sequence` of all text (equation 2). After every epoch the
    validation users' candidates are ranked by p(yes); the adapter of the best epoch is kept.
    """
    # Imported here, so that --help and a missing input are answered at once.
    from transformers import set_seed

    from mllmrec.ranking.answers import answer_set
    from mllmrec.ranking.batches import Collator, EpochSampler, EpochSettings
    from mllmrec.ranking.reader import RowReader
    from mllmrec.ranking.trainer import RankingTrainer, load_with_lora, save_adapter

    train_path, validation_path = row_paths(options)
    sizes = check_training_rows(rows, train_path)
    check_training_rows(validation, validation_path)

    # 1. The frozen model, with LoRA on the linear layers of its language model.
    set_seed(options.seed)
    model, chat = load_with_lora(options)

    # 2. Rows as token ids; users with a question that cannot fit are rejected with all their rows.
    answers = answer_set("yes_no", options)
    reader = RowReader(chat, options.system_dir, options.max_text_tokens, answers=answers)
    rows, rejected, shortened = reader.fitting_rows(rows, train_path)
    validation, more, _ = reader.fitting_rows(validation, validation_path)
    counts = {"in": len(rows), "shortened": shortened, "validation_rows": len(validation)}

    # 3. The order of each epoch, and its batches: right-padded, with the loss on the answer.
    lengths = reader.lengths(rows, sizes) if options.group_by == "length" else None
    sampler = EpochSampler(rows, lengths, EpochSettings.of(options))
    shares_prefix, pads_images = options.group_by == "item", options.pad_images > 0
    collator = Collator(reader, options.loss, shares_prefix, pads_images)

    # 4. Training, with a validation and a checkpoint after each epoch; resumes after a kill.
    trainer = RankingTrainer(model, sampler, collator, validation, options, best_by="auc")
    trainer.train_or_resume(output)

    # 5. The adapter of the best epoch, with its record.
    save_adapter(trainer, chat, output, counts, rejected | more)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_options(FineTuningOptions, SECTION, argv, __doc__)
    print_options(options, "stage 5, supervised fine-tuning")
    check_training_options(options)
    train_path, validation_path = row_paths(options)
    rows, validation = read_rows(train_path), read_rows(validation_path)
    if not rows:
        raise InputError(
            f"{train_path} is empty; make it again with scripts/04_datasets.sh "
            "and see train.rejected.jsonl"
        )
    for split, path, own in (
        ("train", train_path, rows),
        ("validation", validation_path, validation),
    ):
        check_row_images(own, path, options)
        check_rows_source(own, path, split, options)
    inputs = file_digests(train_path, validation_path, options.model)
    job = Job.of(options, inputs, TRAINING_SPEED_OPTIONS, stage=SECTION, limit=options.limit)
    adapter, checkpoints = options.system_dir / "adapter", options.system_dir / "checkpoints"
    with WholeOutput(job, [adapter], training_files(options), checkpoints) as output:
        if output.is_needed:
            rows = first_users(rows, options.limit)
            validation = first_users(validation, options.validation_users)
            if validation:  # lists that cannot be ranked are refused before the model is loaded
                CandidateLists.of([{**row, "score": 0.0} for row in validation], validation_path)
            fine_tune(rows, validation, output, options)
    print_next("scripts/06_score.sh", options.config, options.words)


def row_paths(options: FineTuningOptions) -> tuple[Path, Path]:
    """train.jsonl and validation.jsonl."""
    return options.system_dir / "train.jsonl", options.system_dir / "validation.jsonl"


if __name__ == "__main__":
    run_main(main)
