"""Stage 7, first half: scores become AUC, HR, MRR and NDCG (paper, "Evaluation Protocols").

In:  {output_dir}/*/scores.jsonl   one folder per scored variant: zero_shot, sft, popularity, …
Out: {output_dir}/metrics.json     variant -> auc (pooled over all pairs, as in the paper), auc_per_user, hr@k, mrr@k,
                                   ndcg@k for k = 3, 5, 10, users, candidates, and NAME_ci95 for each metric

    python MLLM-MSR/test/compute_metrics.py --config configs/microlens.yaml
    python MLLM-MSR/test/compute_metrics.py --output_dir outputs/all --runs outputs/seed1 outputs/seed2 outputs/seed3

HR@k is also Recall@k. Ties count as a random order would on average. Intervals: 95%, bootstrap over users; over
several runs (folds or seeds) Student's t over the runs. CPU, seconds.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

from data_processing.config import CommonArgs, option, parse_args, show
from data_processing.errors import InputError, run
from data_processing.jsonl import read_rows, write_json
from data_processing.metrics import SHOWN, aggregate, evaluate
from data_processing.run_record import is_up_to_date, named_digests, settings_of, write_record

FIRST = ("zero_shot", "sft")  # these rows lead the table, the others follow by name


@dataclass
class Args(CommonArgs):
    runs: list[str] = option([], "output folders of several runs to average; empty = only {output_dir}")
    resamples: int = option(1000, "bootstrap samples of the users")


def score_files(folder):
    """dict variant -> path of its scores.jsonl in one run's folder, in the order of the table."""
    found = {path.parent.name: path for path in sorted(Path(folder).glob("*/scores.jsonl"))}
    return {name: found[name] for name in sorted(found, key=lambda n: (FIRST.index(n) if n in FIRST else len(FIRST), n))}


def print_table(metrics):
    """The variants as lines, x100, with the half-width of the 95% interval."""
    width = max(map(len, metrics)) + 2
    print(f"{'':{width}}" + "".join(f"{name.upper():>16}" for name in SHOWN) + f"{'users':>8}")
    for variant, found in metrics.items():
        cells = ""
        for name in SHOWN:
            low, high = found.get(f"{name}_ci95", (0.0, 0.0))
            cells += f"{100 * found[name]:>9.2f} ±{50 * (high - low):>5.2f}"
        print(f"{variant:{width}}{cells}{found['users']:>8,}")


def main(argv=None):
    started = time.monotonic()
    args = parse_args(Args, "metrics", argv, __doc__)
    show(args, "stage 7, metrics")
    folders = args.runs or [args.output_dir]
    files = {str(folder): score_files(folder) for folder in folders}
    for folder, found in files.items():
        if not found:
            raise InputError(f"{folder} holds no */scores.jsonl; scripts/06_score.sh makes them")
    output = Path(args.output_dir) / "metrics.json"
    settings = settings_of(args)
    inputs = named_digests({f"{folder}/{name}": path for folder, found in files.items() for name, path in found.items()})
    if is_up_to_date([output], settings, inputs, args.overwrite):
        print_table(json.loads(output.read_text()))
        print(f"{output} is up to date, nothing to do")
        return
    results = {}
    for found in files.values():
        for variant, path in found.items():
            results.setdefault(variant, []).append(evaluate(read_rows(path), str(path), resamples=args.resamples, seed=args.seed))
    metrics = {variant: runs[0] if len(folders) == 1 else aggregate(runs) for variant, runs in results.items()}
    write_json(output, metrics)
    write_record(output, args, settings, inputs, time.monotonic() - started, {"variants": len(metrics)})
    print_table(metrics)
    print(f"wrote {output}\nnext: python MLLM-MSR/test/report.py --config {args.config} --output_dir {args.output_dir}")


if __name__ == "__main__":
    run(main)
