"""Rules that know the sample's attributes rank the retrieved lists: what a ranker could reach.

In:  {data_dir}/users.jsonl, {output_dir}/mllm4rec/retriever/candidates.jsonl
Out: {output_dir}/list_rules/retrieved_{rule}/scores.jsonl, of test users with their target:
     title_only    counts the topics of the history, recent ones more: what titles say
     caption_only  likewise colours and shapes: what captions say
     counted       all three
     ceiling       knows the favourites that drew the user's last item

    python scripts/reproduce/list_rules.py --config configs/mllm4rec/sample.yaml
"""

from mllmrec.stage.main import run_main

from collections.abc import Sequence
from pathlib import Path

from mllmrec.data.candidates import read_users
from mllmrec.stage.jsonl import read_rows, write_rows
from mllmrec.stage.options import parse_options
from mllmrec.stage.scripts import load_script

SAMPLE = load_script("data_processing/sample.py")
Options, SECTION = SAMPLE.Options, SAMPLE.SECTION
RULES = ("title_only", "caption_only", "counted", "ceiling")


def main(argv: Sequence[str] | None = None) -> None:
    """Write the scores."""
    options = parse_options(Options, SECTION, argv, __doc__)
    folder, users = Path(options.output_dir), read_users(Path(options.data_dir) / "users.jsonl")
    by_id = {user["user_id"]: user for user in users if user["split"] == "test"}
    lists = [
        (by_id[line["user_id"]], line["item_ids"])
        for line in read_rows(folder / "mllm4rec/retriever/candidates.jsonl")
        if line["split"] == "test" and line["has_target"]
    ]
    labelled = ((user, [(i, int(i == user["target"])) for i in listed]) for user, listed in lists)
    drawn = SAMPLE.build_world(options)
    for rule, rows in SAMPLE.rule_scores(labelled, drawn, RULES).items():
        write_rows(folder / "list_rules" / f"retrieved_{rule}" / "scores.jsonl", rows)


if __name__ == "__main__":
    run_main(main)
