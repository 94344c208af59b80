"""Stage 4, training half: users, items and preferences become the yes/no pairs that the recommender learns from.

(Paper, "Supervised Fine-Tuning".)

In:  {data_dir}/users.jsonl, {data_dir}/items.jsonl, {output_dir}/user_preferences.jsonl
Out: {output_dir}/train.jsonl, {output_dir}/validation.jsonl
     user_id, item_id, label (0/1), images: [path], messages: user (image + text) and assistant (Yes/No),
     preference_span: where in the text the preference stands, the only part that is ever shortened
     *.rejected.jsonl   user_id, reason: users whose preference or whose candidate's image is missing

    python MLLM-MSR/train/dataset_create.py --config configs/microlens.yaml

The messages are chat turns in the Hugging Face multimodal format, so other trainers can read the files as they are.
CPU, seconds.
"""

from data_processing.config import parse_args, show
from data_processing.errors import run
from data_processing.pairs import PairArgs, make_splits


def main(argv=None):
    args = parse_args(PairArgs, "datasets", argv, __doc__)
    show(args, "stage 4, training and validation pairs")
    make_splits(("train", "validation"), args, with_answer=True)
    print(f"next: bash scripts/05_train.sh {args.config}")


if __name__ == "__main__":
    run(main)
