"""Stage 4, test half: every test user's whole candidate list becomes rows.

(Paper, "Evaluation Protocols".)

In:  {data_dir}/users.jsonl, {data_dir}/items.jsonl, {output_dir}/{system}/user_preferences.jsonl
Out: {output_dir}/{system}/test.jsonl   user_id, item_id, label (0/1), images: [path], messages:
                                        user (image and text), preference_span: where in the text
                                        the preference is
     test.rejected.jsonl                user_id, reason: users whose list would be incomplete

    python MLLM-MSR/test/multi_col_dataset.py --config configs/microlens.yaml

CPU, seconds.
"""

from mllmrec.stage.main import run_main

from collections.abc import Sequence

from mllmrec.ranking.datasets import DatasetOptions, write_splits
from mllmrec.stage.options import parse_options, print_next, print_options

SECTION = "datasets"


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_options(DatasetOptions, SECTION, argv, __doc__)
    print_options(options, "stage 4, test rows")
    write_splits(("test",), options, with_answer=False)
    print_next("scripts/05_train.sh", options.config, options.words)


if __name__ == "__main__":
    run_main(main)
