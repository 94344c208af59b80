"""Stage 4, training half: users, items and preferences become yes/no rows to learn from.

(Paper, "Supervised Fine-Tuning".)

In:  {data_dir}/users.jsonl, {data_dir}/items.jsonl, {output_dir}/{system}/user_preferences.jsonl
Out: {output_dir}/{system}/train.jsonl, validation.jsonl
                         user_id, item_id, label (0/1), images: [path], messages: user (image and
                         text) and assistant (Yes/No), preference_span: where in the text the
                         preference is, the only part that is ever shortened
     *.rejected.jsonl    user_id, reason: users whose preference or whose candidate's image is
                         missing

    python MLLM-MSR/train/dataset_create.py --config configs/microlens.yaml

The messages are chat turns in the Hugging Face multimodal format, so other trainers can read the
files. CPU, seconds.
"""

from mllmrec.stage.main import run_main

from collections.abc import Sequence

from mllmrec.ranking.datasets import DatasetOptions, write_splits
from mllmrec.stage.options import parse_options, print_next, print_options

SECTION = "datasets"


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_options(DatasetOptions, SECTION, argv, __doc__)
    print_options(options, "stage 4, training and validation rows")
    write_splits(("train", "validation"), options, with_answer=True)
    print_next("MLLM-MSR/test/multi_col_dataset.py", options.config, options.words)


if __name__ == "__main__":
    run_main(main)
