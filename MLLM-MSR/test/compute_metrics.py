"""Stage 7, first half: scores become AUC, HR, MRR and NDCG (paper, "Evaluation Protocols").

In:  {output_dir}/*/*/scores.jsonl  one folder per system and scored variant: mllm_msr/sft, ...
Out: {output_dir}/metrics.json      variant -> auc (pooled over all rows, as in the paper),
                                    auc_per_user, hr@k, mrr@k, ndcg@k for k = 3, 5, 10, users,
                                    candidates, and NAME_ci95 for each metric

    python MLLM-MSR/test/compute_metrics.py --config configs/microlens.yaml
    python MLLM-MSR/test/compute_metrics.py --output_dir outputs/all --runs outputs/1 outputs/2

HR@k is also Recall@k. Ties count as a random order would on average. Intervals: 95%, bootstrap over
users; over several runs (folds or seeds) Student's t over the runs. CPU, seconds.
"""

from mllmrec.stage.main import run_main

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic.dataclasses import dataclass

from mllmrec.evaluation.metrics import aggregate, evaluate
from mllmrec.evaluation.result_tables import print_metrics, read_metrics, score_files
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import read_rows, write_json
from mllmrec.stage.options import CommonOptions, option, parse_options, print_options
from mllmrec.stage.output import WholeOutput
from mllmrec.stage.record import Job, check_described, named_digests, read_record

SECTION = "metrics"


@dataclass
class Options(CommonOptions):
    runs: list[str] = option(
        [], "output folders of several runs to average; none = only {output_dir}"
    )
    resamples: int = option(1000, "bootstrap samples of the users", ge=1)


def measure(files: Mapping[str, Mapping[str, Path]], options: Options) -> dict[str, Any]:
    """dict variant -> its metrics, of several runs their means.

    files: dict folder of a run -> dict variant -> scores.jsonl.
    """
    runs: dict[str, list[dict[str, Any]]] = {}  # variant -> its metrics in each run
    for variants in files.values():
        for name, path in variants.items():
            metrics = evaluate(
                read_rows(path), str(path), resamples=options.resamples, seed=options.seed
            )
            runs.setdefault(name, []).append(metrics)
    return {
        name: values[0] if len(files) == 1 else aggregate(values) for name, values in runs.items()
    }


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_options(Options, SECTION, argv, __doc__)
    print_options(options, "stage 7, metrics")
    folders = options.runs or [options.output_dir]
    files = {str(folder): score_files(folder) for folder in folders}
    if len(files) < len(folders):
        raise InputError("--runs names one folder twice; each run counts once")
    for folder, variants in files.items():
        if not variants:
            raise InputError(
                f"the output folder {folder!r} has no */*/scores.jsonl; "
                "scripts/06_score.sh makes them"
            )
    for variants in files.values():
        for scores in variants.values():
            record = read_record(scores)
            if record:  # scores from elsewhere have none
                check_described(scores, record)
    path = Path(options.output_dir) / "metrics.json"
    inputs = named_digests(
        {
            f"{folder}/{name}": path
            for folder, variants in files.items()
            for name, path in variants.items()
        }
    )
    job = Job.of(options, inputs, stage=SECTION)
    with WholeOutput(job, [path]) as output:
        if output.is_needed:
            metrics = measure(files, options)
            output.begin()
            write_json(path, metrics)
            output.finish({"variants": len(metrics)})
    print_metrics(read_metrics(path))
    print(
        "next: python MLLM-MSR/test/report.py --config "
        f"{options.config} --output_dir {options.output_dir}"
    )


if __name__ == "__main__":
    run_main(main)
