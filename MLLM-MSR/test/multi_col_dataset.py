"""Stage 4, test half: every test user's whole candidate list becomes pairs to be scored (paper, "Evaluation Protocols").

In:  {data_dir}/users.jsonl, {data_dir}/items.jsonl, {output_dir}/user_preferences.jsonl
Out: {output_dir}/test.jsonl   user_id, item_id, label (0/1), images: [path], messages: user (image + text),
                               preference_span: where in the text the preference stands
     test.rejected.jsonl       user_id, reason: users whose list would have a hole

    python MLLM-MSR/test/multi_col_dataset.py --config configs/microlens.yaml

CPU, seconds.
"""

from data_processing.config import parse_args, show
from data_processing.errors import run
from data_processing.pairs import PairArgs, make_splits


def main(argv=None):
    args = parse_args(PairArgs, "datasets", argv, __doc__)
    show(args, "stage 4, test pairs")
    make_splits(("test",), args, with_answer=False)
    print(f"next: bash scripts/05_train.sh {args.config}")


if __name__ == "__main__":
    run(main)
