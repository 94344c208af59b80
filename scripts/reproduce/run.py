"""Run the rows of a table over several seeds, and write the table with intervals.

    bash scripts/reproduce_deviations.sh configs/sample.yaml
    bash scripts/reproduce_table3.sh configs/sample.yaml --folds 5 --seeds 42

In:  a config; the stages' own inputs
Out: {output}/{world}-{seed}/   one run per seed (and per world: other options of stage 1); with
                                --folds 5 five of them per seed, each tested on another fold
     {output}/logs/             what the stages print
     {output}/{table}.json      metrics of each row and run, differences, commands, versions
     {output}/{table}.md, .csv  the table: mean over the runs with its 95% interval (Student's t;
                                with one run bootstrap over users), and the difference to the row
                                that it is compared with (bootstrap over users, paired)
     {output}/{table}.png       the same as a chart

Started again, it resumes, as the stages do. A row whose stages do not end well is "not
run" in the table, its reason is printed, and the exit code is 1 at the end.
"""

from mllmrec.stage.main import run_main

import argparse
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from charts import dot_chart
from rows import TABLES, WORLDS
from tables import RETRIEVED, markdown, table_lines, write_files

from mllmrec.evaluation.metrics import SHOWN, aggregate, evaluate
from mllmrec.evaluation.paired import Scored, paired_differences
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import atomic_file, read_rows
from mllmrec.stage.options import load_config
from mllmrec.stage.record import machine, read_record


@dataclass(frozen=True)
class Sample:
    """One draw of split, negatives and weights: a seed and, with folds, the fold to test on."""

    seed: int
    fold: int | None

    def __str__(self):
        return str(self.seed) if self.fold is None else f"{self.seed}-fold{self.fold}"


class Run:
    """One sample in one world: a folder, and the steps that were done in it."""

    def __init__(self, sample, world, args):
        self.sample, self.world, self.args = sample, world, args
        self.folder = args.output / f"{world}-{sample}"
        self.log = args.output / "logs" / f"{self.folder.name}.log"
        self.failed, self.done = {}, set()

    def row(self, key, row):
        """Run the steps of a row; a failure is kept in `failed`."""
        stage_1 = f"01_prepare_data {WORLDS[self.world]}"
        if self.args.folds:
            stage_1 += f" --folds {self.args.folds} --test_fold {self.sample.fold}"
        for step in (stage_1, *row.steps):
            if step not in self.done:
                reason = self._step(step)
                if reason:
                    self.failed[key] = f"{step}: {reason}"
                    return
                self.done.add(step)

    def _step(self, step):
        """Run one step; return the last line that it printed if it failed, else None."""
        places = {
            "{full}": self.folder / "mllm_msr",
            "{second}": self.folder / "mllm4rec",
            "{text_model}": self.args.text_model,
        }
        for place, value in places.items():
            step = step.replace(place, str(value))
        words = shlex.split(step)
        command = self._program(words[0]) + words[1:]
        command += ["--seed", str(self.sample.seed), "--output_dir", str(self.folder)]
        command += ["--data_dir", str(self.folder / "data")]
        threads = str(max(1, len(os.sched_getaffinity(0)) // self.args.jobs))
        environment = os.environ | {"OMP_NUM_THREADS": threads, "PYTHON": sys.executable}
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "a", encoding="utf-8") as log:
            log.write(f"$ {shlex.join(command)}\n")
            log.flush()
            done = subprocess.run(command, stdout=log, stderr=log, env=environment)
        if done.returncode == 0:
            return None
        # A progress bar ends its lines with a carriage return.
        lines = (
            self.log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").split("\n")
        )
        printed = [line.strip() for line in lines if line.strip()]
        return next((line for line in reversed(printed) if "error" in line.lower()), printed[-1])

    def _program(self, script):
        """The words that start a step's script with the config."""
        config = str(self.args.config)
        if script.endswith(".py"):
            launch = shlex.split(os.environ.get("ACCELERATE", ""))
            module = ["-m", "accelerate.commands.launch", "--quiet", *launch] if launch else []
            return [sys.executable, *module, script, "--config", config]
        return ["bash", f"scripts/{script}.sh", config]


def run_rows(rows, args):
    """{(row, sample): Run}, each row run for each sample; `args.jobs` runs at once."""
    worlds = dict.fromkeys(row.world for row in rows.values())
    runs = {
        (sample, world): Run(sample, world, args) for sample in args.samples for world in worlds
    }
    total, finished, started = len(rows) * len(args.samples), [], time.monotonic()

    def work(run):
        for key, row in rows.items():
            if row.world == run.world:
                run.row(key, row)
                finished.append(key)
                minutes = (time.monotonic() - started) / 60
                left = minutes / len(finished) * (total - len(finished))
                print(
                    f"{len(finished)} of {total} rows, {minutes:.0f} min, about {left:.0f} min "
                    f"left: {run.folder.name}, {key}: {run.failed.get(key, 'done')}",
                    flush=True,
                )

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(work, runs.values()))
    return {(key, own): runs[own, row.world] for key, row in rows.items() for own in args.samples}


def last_stage(scores):
    """Seconds, and what else is known of the run that wrote scores.jsonl, from its record."""
    record = read_record(scores) or {}
    known = ("seconds", "epochs", "peak_gb", "device", "git_commit")
    return {key: record[key] for key in known if key in record}


def measure(rows, runs, args):
    """{key: row of the report} of the rows whose steps were done for every sample."""
    scored, report = {}, {}
    for key, row in rows.items():
        if any(key in runs[key, sample].failed for sample in args.samples):
            continue
        paths = [runs[key, own].folder / row.scores / "scores.jsonl" for own in args.samples]
        lines = [read_rows(path) for path in paths]
        if not row.retrieved:  # retrieved lists differ from row to row
            scored[key] = [Scored.of(own, path) for own, path in zip(lines, paths, strict=True)]
        per_seed = [
            evaluate(own, path, retrieved=row.retrieved)
            for own, path in zip(lines, paths, strict=True)
        ]
        report[key] = {
            "label": row.label,
            "metrics": per_seed[0] if len(per_seed) == 1 else aggregate(per_seed),
            "per_seed": dict(zip(map(str, args.samples), per_seed, strict=True)),
            "steps": row.steps,
            "stage_1": WORLDS[row.world],
            "last_stage": [last_stage(path) for path in paths],
        }
        if args.table == "systems":
            from costs import costs_per_user  # which loads torch

            folders = [runs[key, own].folder for own in args.samples]
            report[key]["costs"] = [costs_per_user(row, folder) for folder in folders]
    for key, own in report.items():
        against = rows[key].against
        if against in scored:
            pairs = list(zip(scored[key], scored[against], strict=True))
            found = paired_differences(pairs, args.resamples)
            own["against"] = rows[against].label
            own["differences"] = {
                name: {**asdict(found[name]), "is_real": found[name].is_real} for name in found
            }
    return report


def write_report(rows, measured, args):
    """Write the table as JSON, Markdown, CSV and PNG, and print it. measured: see `measure`."""
    path = args.output / args.table
    report = {
        "table": args.table,
        "config": str(args.config),
        "seeds": args.seeds,
        "folds": args.folds,
        "columns": RETRIEVED if any(row.retrieved for row in rows.values()) else SHOWN,
        "rows": measured,
        "not_run": {key: row.label for key, row in rows.items() if key not in measured},
        **machine(),
    }
    text = markdown(report)
    write_files(path, report, text, table_lines(report))
    if measured:
        with atomic_file(f"{path}.png") as file:
            file.write(dot_chart(report))
    print(text)
    print(f"wrote {path}.json, .md, .csv{' and .png' if measured else ''}")


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--folds", type=int, default=0, help="5: each seed in five folds (paper)")
    parser.add_argument("--rows", nargs="+", default=[], help="keys of the rows; none = all")
    parser.add_argument("--output", type=Path, help="default: outputs/reproduce/NAME of the config")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, which share the cores")
    parser.add_argument("--resamples", type=int, default=1000, help="of the bootstrap")
    args = parser.parse_args(argv)
    args.output = args.output or Path("outputs/reproduce") / args.config.stem
    if args.folds < 0 or args.folds == 1:
        raise InputError("--folds must be 0 or at least 2")
    folds = range(args.folds) if args.folds else [None]
    args.samples = [Sample(seed, fold) for seed in dict.fromkeys(args.seeds) for fold in folds]
    return args


def main(argv=None):
    args = parse_arguments(argv)
    args.text_model = load_config(args.config).get("preference", {}).get("model", "")
    known = TABLES[args.table]
    unknown = [key for key in args.rows if key not in known]
    if unknown:
        raise InputError(f"--rows: there is no row {unknown[0]!r}; choose from {', '.join(known)}")
    rows = {key: row for key, row in known.items() if not args.rows or key in args.rows}
    runs = run_rows(rows, args)
    write_report(rows, measure(rows, runs, args), args)
    failed = {key: run.failed[key] for (key, _), run in runs.items() if key in run.failed}
    for key, reason in failed.items():
        print(f"not run: {key}: {reason}", file=sys.stderr)
    if failed:
        raise InputError(f"{len(failed)} of {len(rows)} rows were not run; see {args.output}/logs")


if __name__ == "__main__":
    run_main(main)
