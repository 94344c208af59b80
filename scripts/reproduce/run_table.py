"""Run the rows of a table of configs/tables/ over several seeds, and write it with intervals.

    bash scripts/reproduce.sh deviations configs/sample.yaml
    bash scripts/reproduce.sh table3 configs/sample.yaml --folds 5 --seeds 42
    bash scripts/reproduce.sh table2 configs/microlens.yaml configs/amazon_games.yaml

In:  a config (table2: one or more); the stages' own inputs
Out: {output}/{world}-{seed}/   one run per seed (and per world: other options of stage 1); with
                                --folds 5 five of them per seed, each tested on another fold
     {output}/logs/             what the stages print
     {output}/{table}.json      metrics of each row and run, differences, commands, versions
     {output}/{table}.md, .csv  the table: mean over the runs with its 95% interval (Student's t;
                                with one run bootstrap over users), and the difference to the row
                                that it is compared with (bootstrap over users, paired)
     {output}/{table}.png       the same as a chart
     {output}/{table}_costs.png AUC over seconds per user, of a table with costs

Started again, it resumes, as the stages do. A row with a stage that fails is "not run" in the
table, its reason is printed, and the exit code is 1 at the end.
"""

from mllmrec.stage.main import run_main

import argparse
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_statistics import report_statistics
from definitions import Table, TableRow, read_table, table_names
from table_writer import (
    COLD,
    RETRIEVED,
    cost_chart,
    dot_chart,
    markdown,
    table_lines,
    write_files,
)

from mllmrec.data.candidates import cold_users
from mllmrec.evaluation.metrics import SHOWN, aggregate, evaluate, evaluate_groups, of_group
from mllmrec.evaluation.paired import Scored, paired_differences
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import atomic_file, read_rows
from mllmrec.stage.options import load_config
from mllmrec.stage.record import machine, read_record

LAST_STAGE = ("seconds", "epochs", "peak_gb", "device", "git_commit")  # of the run that scored


@dataclass(frozen=True)
class SeedAndFold:
    """What splits, negatives and weights of a run depend on; fold: the one to test on, if any."""

    seed: int
    fold: int | None

    def __str__(self) -> str:
        return str(self.seed) if self.fold is None else f"{self.seed}-fold{self.fold}"


class Run:
    """A seed and fold in one world: a folder, and the steps that were done in it."""

    def __init__(self, repeat: SeedAndFold, world: str, args: argparse.Namespace) -> None:
        self.repeat, self.world, self.args = repeat, world, args
        self.folder = args.output / f"{world}-{repeat}"
        self.log = args.output / "logs" / f"{self.folder.name}.log"
        self.failed: dict[str, str] = {}
        self.done: set[str] = set()
        self.process: subprocess.Popen[bytes] | None = None
        self.stopped, self.lock = False, threading.Lock()

    def stop(self) -> None:
        """End the step that runs, with all its processes, and start no other one."""
        with self.lock:
            self.stopped = True
            if self.process and self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGTERM)

    def row(self, key: str, row: TableRow) -> None:
        """Run the steps of a row; a failure is kept in `failed`."""
        stage_1 = f"01_prepare_data {row.stage_1}"
        if self.args.folds:
            stage_1 += f" --folds {self.args.folds} --test_fold {self.repeat.fold}"
        for step in (stage_1, *row.steps):
            if step not in self.done:
                reason = self.start(self.command(step))
                if reason:
                    self.failed[key] = f"{step}: {reason}"
                    return
                self.done.add(step)

    def command(self, step: str) -> list[str]:
        """The words of a step's command."""
        places = {name: str(self.folder / name) for name in ("mllm_msr", "mllm4rec")}
        for name, value in (places | {"text_model": self.args.text_model}).items():
            step = step.replace(f"{{{name}}}", value)
        script, *words = shlex.split(step)
        if script.endswith(".py"):
            launch = shlex.split(os.environ.get("ACCELERATE", ""))
            module = ["-m", "accelerate.commands.launch", "--quiet", *launch] if launch else []
            program = [sys.executable, *module, script, "--config"]
        else:
            program = ["bash", f"scripts/{script}.sh"]
        words += ["--seed", str(self.repeat.seed), "--output_dir", str(self.folder)]
        return [*program, str(self.args.config), *words, "--data_dir", str(self.folder / "data")]

    def start(self, command: list[str]) -> str | None:
        """Run a command; return the last line that it printed if it failed, else None."""
        threads = str(max(1, len(os.sched_getaffinity(0)) // self.args.jobs))
        environment = os.environ | {"OMP_NUM_THREADS": threads, "PYTHON": sys.executable}
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "a", encoding="utf-8") as log:
            log.write(f"$ {shlex.join(command)}\n")
            log.flush()
            with self.lock:
                if self.stopped:
                    return "stopped"
                self.process = subprocess.Popen(
                    command, stdout=log, stderr=log, env=environment, start_new_session=True
                )
            code = self.process.wait()
        if code == 0:
            return None
        # A progress bar ends its lines with a carriage return.
        text = self.log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
        printed = [line.strip() for line in text.split("\n") if line.strip()]
        return next((line for line in reversed(printed) if "error" in line.lower()), printed[-1])


Runs = dict[tuple[SeedAndFold, str], Run]  # (seed and fold, world) -> its run


def run_rows(rows: dict[str, TableRow], args: argparse.Namespace) -> Runs:
    """Each row run for each seed and fold; `args.jobs` runs at once."""
    worlds = dict.fromkeys(row.world for row in rows.values())
    runs = {(own, world): Run(own, world, args) for own in args.repeats for world in worlds}
    total, finished, started = len(rows) * len(args.repeats), [], time.monotonic()

    def work(run: Run) -> None:
        for key, row in rows.items():
            if row.world == run.world:
                run.row(key, row)
                finished.append(key)
                n, minutes = len(finished), (time.monotonic() - started) / 60
                left = minutes / n * (total - n)
                state = f"{run.folder.name}, {key}: {run.failed.get(key, 'done')}"
                print(f"{n} of {total} rows, {minutes:.0f} min, {left:.0f} min left: {state}")

    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            list(pool.map(work, runs.values()))
        except BaseException:  # Ctrl-C, SIGTERM
            for run in runs.values():
                run.stop()
            raise
    return runs


def measure(
    table: Table, rows: dict[str, TableRow], runs: Runs, args: argparse.Namespace
) -> dict[str, Any]:
    """{key: row of the report} of the rows whose steps were done for every seed and fold."""
    scored, report = {}, {}
    for key, row in rows.items():
        own = [runs[repeat, row.world] for repeat in args.repeats]
        if any(key in run.failed for run in own):
            continue
        folders = [run.folder for run in own]
        paths = [folder / row.scores / "scores.jsonl" for folder in folders]
        scored[key], per_seed = [], []
        for folder, path in zip(folders, paths, strict=True):
            lines = read_rows(path)
            found = evaluate(lines, path, retrieved=table.retrieved)
            if table.cold:  # differences are those of the users of new items
                cold = cold_users(folder / "data/users.jsonl")
                found |= evaluate_groups(lines, cold, path)
                lines = of_group(lines, cold, "new")
            per_seed.append(found)
            scored[key].append(Scored.of(lines, path, retrieved=table.retrieved))
        records = [read_record(path) or {} for path in paths]
        report[key] = {
            "label": row.label,
            "metrics": per_seed[0] if len(per_seed) == 1 else aggregate(per_seed),
            "per_seed": dict(zip(map(str, args.repeats), per_seed, strict=True)),
            "steps": row.steps,
            "stage_1": row.stage_1,
            "last_stage": [last_stage(record) for record in records],
            "validations": list(map(learning_curve, records, paths)),
        }
        if table.costs:
            from costs import costs_per_user  # which loads torch

            report[key]["costs"] = [costs_per_user(row, folder) for folder in folders]
    for key, measured in report.items():
        against = rows[key].against
        if against in scored:
            pairs = list(zip(scored[key], scored[against], strict=True))
            found = paired_differences(pairs, args.resamples)
            measured["against"] = rows[against].label
            measured["differences"] = {
                name: {**asdict(value), "is_real": value.is_real} for name, value in found.items()
            }
    return report


def last_stage(record: dict[str, Any]) -> dict[str, Any]:
    """What a table's file keeps of the run that scored: LAST_STAGE, and the digests of weights."""
    kept = {key: record[key] for key in LAST_STAGE if key in record}
    inputs = record.get("inputs", {})
    weights = {name: digest for name, digest in inputs.items() if name.endswith(".safetensors")}
    return kept | ({"weights": weights} if weights else {})


def learning_curve(record: dict[str, Any], scores: Path) -> list[dict[str, Any]]:
    """The validations of the training whose adapter scored; none without an adapter."""
    if not any(name.endswith("adapter_model.safetensors") for name in record.get("inputs", {})):
        return []
    lines = read_rows(scores.parent.parent / "training_log.jsonl")
    return [line for line in lines if any(key.startswith("eval_") for key in line)]


def write_report(
    table: Table, rows: dict[str, TableRow], measured: dict[str, Any], args: argparse.Namespace
) -> None:
    """Write the table as JSON, Markdown, CSV and PNG, and print it. measured: see `measure`."""
    path = args.output / args.table
    report = {
        "table": args.table,
        "config": str(args.config),
        "seeds": args.seeds,
        "folds": args.folds,
        "columns": RETRIEVED if table.retrieved else COLD if table.cold else SHOWN,
        "rows": measured,
        "not_run": {key: row.label for key, row in rows.items() if key not in measured},
        **machine(),
    }
    text = markdown(report)
    write_files(path, report, text, table_lines(report))
    if measured:
        with atomic_file(f"{path}.png") as file:
            file.write(dot_chart(report))
    if measured and table.costs:
        with atomic_file(f"{path}_costs.png") as file:
            file.write(cost_chart(report))
    print(text)
    print(f"wrote {path}.json, .md, .csv{' and .png' if measured else ''}")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line. Raises InputError for arguments that do not fit together."""
    listed = "\n".join(f"  {name:12} {read_table(name).about}" for name in table_names())
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"tables:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("table", help="name of a file of configs/tables/")
    parser.add_argument("configs", type=Path, nargs="*", help="one; table2 takes several")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--folds", type=int, default=0, help="5: each seed in five folds (paper)")
    parser.add_argument("--rows", nargs="+", default=[], help="keys of the rows; none = all")
    parser.add_argument("--output", type=Path, help="default: outputs/reproduce/NAME of the config")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, which share the cores")
    parser.add_argument("--resamples", type=int, default=1000, help="of the bootstrap")
    args = parser.parse_args(argv)
    if args.folds < 0 or args.folds == 1:
        raise InputError("--folds must be 0 or at least 2")
    folds = range(args.folds) if args.folds else [None]
    args.repeats = [SeedAndFold(seed, fold) for seed in dict.fromkeys(args.seeds) for fold in folds]
    return args


def main(argv: list[str] | None = None) -> None:
    """Run the rows, measure them and write the table."""
    args = parse_arguments(argv)
    table = read_table(args.table)
    if len(args.configs) != 1 and not (table.statistics and args.configs):
        raise InputError(f"name one config for the table {args.table}, not {len(args.configs)}")
    if table.statistics:
        output = args.output or Path("outputs/reproduce") / args.table
        report_statistics(table.statistics, args.configs, output / args.table)
        return
    [args.config] = args.configs
    args.output = args.output or Path("outputs/reproduce") / args.config.stem
    args.text_model = load_config(args.config).get("preference", {}).get("model", "")
    for key in args.rows:
        if key not in table.rows:
            known = ", ".join(table.rows)
            raise InputError(f"--rows: there is no row {key!r}; choose from {known}")
    rows = {key: row for key, row in table.rows.items() if not args.rows or key in args.rows}
    runs = run_rows(rows, args)
    write_report(table, rows, measure(table, rows, runs, args), args)
    failed = {key: reason for run in runs.values() for key, reason in run.failed.items()}
    for key, reason in failed.items():
        print(f"not run: {key}: {reason}", file=sys.stderr)
    if failed:
        raise InputError(f"{len(failed)} of {len(rows)} rows were not run; see {args.output}/logs")


if __name__ == "__main__":
    run_main(main)
