"""Baseline: the titles of a user's history stand where the preference would stand.

(Independent re-runs of MLLM-MSR; with rows without images it is TALLRec: Bao et al., RecSys 2023.)

In:  {data_dir}/users.jsonl, items.jsonl
Out: {output_dir}/{system}/user_preferences.jsonl    preference = the titles, oldest first

    python MLLM-MSR/baselines/title_history.py --config configs/microlens.yaml --system titles
    bash scripts/04_datasets.sh configs/microlens.yaml --system titles
    bash scripts/05_train.sh configs/microlens.yaml --system titles
    bash scripts/06_score.sh configs/microlens.yaml --system titles

For TALLRec add `--with_images false` and a `--recommend_prompt` without the image in stage 4, and a
text model (`--model`) in stages 5 and 6. No frozen model reads or writes anything, so this row says
what stages 2 and 3 are worth. CPU, seconds.
"""

from mllmrec.stage.main import run_main

from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic.dataclasses import dataclass

from mllmrec.data.candidates import is_leave_one_out, read_users_and_items
from mllmrec.prompts.templates import cut
from mllmrec.stage.jsonl import require, write_rows
from mllmrec.stage.options import CommonOptions, option, parse_options, print_options
from mllmrec.stage.output import WholeOutput
from mllmrec.stage.record import Job, file_digests
from mllmrec.stage.schema import Row

SECTION = "title_history"


@dataclass
class Options(CommonOptions):
    max_titles: int = option(20, "last items of a history whose titles are listed, 0 = all", ge=0)
    max_title_characters: int = option(100, "longer titles are cut, 0 = no limit", ge=0)


def title_history(titles: Sequence[str], options: Options) -> str:
    """One text with the titles of a history, oldest first."""
    shown = titles[-options.max_titles :] if options.max_titles else titles
    if options.max_title_characters:
        shown = [cut(title, options.max_title_characters) for title in shown]
    return "; ".join(f"{number}. {title}" for number, title in enumerate(shown, start=1))


def history_rows(users_path: Path, items_path: Path, options: Options) -> Iterator[Row]:
    """Lines of user_preferences.jsonl, from users.jsonl and items.jsonl."""
    users, items = read_users_and_items(users_path, items_path, ("history",))
    leave_one_out = is_leave_one_out(users)
    job = Job.of(options, {}, stage=SECTION)
    for user in users:
        text = title_history([items[item]["title"] for item in user["history"]], options)
        row = {"user_id": user["user_id"], "preference": text}
        row["blocks"] = [{"items": user["history"], "preference": text}]
        row["source"] = job.source(*((item, items[item]["title"], "") for item in user["history"]))
        yield row | ({"split": user["split"]} if leave_one_out else {})


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_options(Options, SECTION, argv, __doc__)
    print_options(options, "baseline: titles of the history")
    users_path = Path(options.data_dir) / "users.jsonl"
    items_path = Path(options.data_dir) / "items.jsonl"
    inputs = file_digests(require(users_path), require(items_path))
    job = Job.of(options, inputs, stage=SECTION)
    path = options.system_dir / "user_preferences.jsonl"
    with WholeOutput(job, [path]) as output:
        if output.is_needed:
            rows = list(history_rows(users_path, items_path, options))
            output.begin()
            write_rows(path, rows)
            output.finish({"out": len(rows)})
            print(f"wrote {path}: {len(rows):,} users")


if __name__ == "__main__":
    run_main(main)
