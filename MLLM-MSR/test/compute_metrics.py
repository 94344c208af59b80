"""Stage 7, first half: scores become AUC, HR, MRR and NDCG (paper, "Evaluation Protocols").

In:  {output_dir}/*/*/scores.jsonl  one folder per system and scored variant: mllm_msr/sft, ...
Out: {output_dir}/metrics.json      variant -> auc (pooled over all rows, as in the paper),
                                    auc_per_user, hr@k, mrr@k, ndcg@k for k = 3, 5, 10, users,
                                    candidates, and NAME_ci95 for each metric; with cold items
                                    (stage 1) also NAME_new and NAME_known

    python MLLM-MSR/test/compute_metrics.py --config configs/microlens.yaml
    python MLLM-MSR/test/compute_metrics.py --output_dir outputs/all --runs outputs/1 outputs/2

HR@k is also Recall@k. Ties count as a random order would on average. Intervals: 95%, bootstrap over
users; over several runs (folds or seeds) Student's t over the runs, in which equal scores count
once; one run has no interval. The variants of a run must have the same candidates for each user;
only popularity's redrawn lists and retrieved lists are their own. CPU, seconds.
"""

from mllmrec.stage.main import run_main

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from pydantic.dataclasses import dataclass

from mllmrec.data.candidates import candidates, cold_users, read_users, users_of_split
from mllmrec.evaluation.metrics import aggregate, evaluate, evaluate_groups
from mllmrec.evaluation.result_tables import (
    check_same_lists,
    list_digests,
    own_lists,
    print_metrics,
    read_metrics,
    score_files,
)
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import read_rows, write_json
from mllmrec.stage.options import CommonOptions, option, parse_options, print_next, print_options
from mllmrec.stage.output import WholeOutput
from mllmrec.stage.record import Digests, Job, named_digests
from mllmrec.stage.schema import Row

SECTION = "metrics"


@dataclass
class Options(CommonOptions):
    runs: list[str] = option(
        [], "output folders of several runs to average; none = only {output_dir}"
    )
    resamples: int = option(1000, "bootstrap samples of the users", ge=1)


Files = Mapping[str, Mapping[str, Path]]  # folder of a run -> variant -> scores.jsonl


def measure(files: Files, digests: Digests, options: Options) -> dict[str, Any]:
    """dict variant -> its metrics, of several runs their means. digests: of "folder/variant"."""
    runs: dict[str, dict[str, dict[str, Any]]] = {}  # variant -> digest of scores -> metrics
    items: dict[str, set[str]] = {folder: set() for folder in files}
    targets: dict[str, dict[str, str]] = {folder: {} for folder in files}
    users_path = Path(options.data_dir) / "users.jsonl"  # of one run; several have their own
    cold = {} if options.runs else cold_users(users_path)
    for folder, variants in files.items():
        lists = {}
        for name, path in variants.items():
            rows, own = read_rows(path), own_lists(path)
            items[folder] |= {row["item_id"] for row in rows}
            targets[folder] |= {row["user_id"]: row["item_id"] for row in rows if row["label"]}
            if not own:
                lists[path] = list_digests(rows)
            metrics = evaluate(rows, path, options.resamples, options.seed, own == "retrieved")
            if cold and not own:
                metrics |= evaluate_groups(rows, cold, path, options.resamples)
            runs.setdefault(name, {})[digests[f"{folder}/{name}"]] = metrics
        if not options.runs and users_path.exists():
            lists[users_path] = list_digests(test_candidates(users_path))
        check_same_lists(lists)
    if len(files) == 1:
        return {name: metrics for name, found in runs.items() for metrics in found.values()}
    check_same_data_set(items, targets)
    for name, found in runs.items():
        lengths = sorted({metrics["candidates"] for metrics in found.values()})
        if len(lengths) > 1:
            raise InputError(
                f"the lists of {name} have {lengths[0]} candidates in one of the runs and "
                f"{lengths[-1]} in another; average runs with the same number of negatives"
            )
    return {name: aggregate(list(found.values())) for name, found in runs.items()}


def test_candidates(users_path: Path) -> list[Row]:
    """user_id, item_id and label of the candidates of all test users."""
    return [
        {"user_id": user["user_id"], "item_id": item_id, "label": label}
        for user in users_of_split(read_users(users_path), "test")
        for item_id, label in candidates(user)
    ]


def check_same_data_set(
    items: Mapping[str, set[str]], targets: Mapping[str, Mapping[str, str]]
) -> None:
    """Raise InputError for two runs of two data sets, which may number users and items alike.

    items: of each run's candidates; targets: of each run, user -> target. Most common users must
    have the same target: `--ties hash` may change that of a few between seeds.
    """
    for a, b in combinations(items, 2):
        reason = "no item in common" if items[a].isdisjoint(items[b]) else ""
        common = targets[a].keys() & targets[b].keys()
        same = sum(targets[a][user] == targets[b][user] for user in common)
        if not reason and same < len(common) / 2:
            reason = f"{len(common):,} users in common, of whom {same:,} have the same target"
        if reason:
            raise InputError(
                f"--runs: {a} and {b} have {reason}, so they are of two data sets; average folds "
                "or seeds of one (each seed of the bundled sample draws a world of its own; "
                "scripts/reproduce.sh averages those)"
            )


def check_different_runs(files: Files, digests: Digests) -> None:
    """Raise InputError for two runs with no variant that they scored differently: a copy."""
    for a, b in combinations(files, 2):
        common = files[a].keys() & files[b].keys()
        if all(digests[f"{a}/{name}"] == digests[f"{b}/{name}"] for name in common):
            raise InputError(
                f"--runs: {a} and {b} have no variant with different scores, so there is nothing "
                "to average; each run counts once, a copy of it does not"
            )


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_options(Options, SECTION, argv, __doc__)
    print_options(options, "stage 7, metrics")
    folders = options.runs or [options.output_dir]
    files = {str(folder): score_files(folder) for folder in folders}
    if len({Path(folder).resolve() for folder in folders}) < len(folders):
        raise InputError("--runs names one folder twice; each run counts once")
    for folder, variants in files.items():
        if not variants:
            raise InputError(
                f"the output folder {folder!r} has no */*/scores.jsonl; "
                "scripts/06_score.sh makes them"
            )
    path = Path(options.output_dir) / "metrics.json"
    inputs = named_digests(
        {
            f"{folder}/{name}": path
            for folder, variants in files.items()
            for name, path in variants.items()
        }
    )
    check_different_runs(files, inputs)
    job = Job.of(options, inputs, stage=SECTION)
    with WholeOutput(job, [path]) as output:
        if output.is_needed:
            metrics = measure(files, inputs, options)
            output.begin()
            write_json(path, metrics)
            output.finish({"variants": len(metrics)})
    print_metrics(read_metrics(path))
    print_next("MLLM-MSR/test/report.py", options.config, options.words)


if __name__ == "__main__":
    run_main(main)
