"""The paper's Table 2: users, items, interactions of each data set, ours beside the paper's.

    bash scripts/reproduce_table2.sh configs/microlens.yaml configs/amazon_games.yaml

In:  configs; the raw files of stage 1
Out: {output}/{config}/          the data files, one folder per config
     {output}/table2.json, .md, .csv

A data set whose raw files are not there is "not run", its reason is printed, and the exit code is 1
at the end.
"""

from mllmrec.stage.main import run_main

import argparse
import subprocess
import sys
from pathlib import Path

from tables import write_files

from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import read_json
from mllmrec.stage.options import load_config
from mllmrec.stage.record import machine

COLUMNS = ("users", "items", "interactions", "average_length", "sparsity")


def prepare(config, folder):
    """Run stage 1; return (stats.json, "") or (None, the reason why it failed)."""
    command = ["bash", "scripts/01_prepare_data.sh", str(config), "--data_dir", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        return None, lines[-1] if lines else f"exit code {done.returncode}"
    return read_json(folder / "stats.json"), ""


def lines_of(report):
    """The table as lists of cells, the header first: our row and the paper's for each config."""
    lines = [["data set", "", *(name.replace("_", " ") for name in COLUMNS)]]
    for name, row in report["data_sets"].items():
        ours = row["ours"]
        cells = [f"{ours[c]:,}" for c in COLUMNS] if ours else ["not run"] * len(COLUMNS)
        lines.append([name, "here", *cells])
        if any(row["paper"].values()):
            lines.append([name, "paper", *(f"{row['paper'][c]:,}" for c in COLUMNS)])
    return lines


def markdown(report):
    """The table of `lines_of` in Markdown."""
    header, *lines = (f"| {' | '.join(cells)} |" for cells in lines_of(report))
    return "\n".join([header, "|---|---|" + "---:|" * len(COLUMNS), *lines, ""])


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configs", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, default=Path("outputs/reproduce/table2"))
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_arguments(argv)
    report, reasons = {"table": "table2", "data_sets": {}}, {}
    for config in args.configs:
        section = load_config(config).get("data", {})
        ours, reason = prepare(config, args.output / config.stem)
        paper = {name: section.get(f"paper_{name}", 0) for name in COLUMNS}
        report["data_sets"][config.stem] = {"ours": ours, "paper": paper}
        if reason:
            reasons[config.stem] = reason
    report |= machine()
    text = markdown(report)
    write_files(args.output / "table2", report, text, lines_of(report))
    print(text)
    for name, reason in reasons.items():
        print(f"not run: {name}: {reason}", file=sys.stderr)
    if reasons:
        raise InputError(f"{len(reasons)} of {len(args.configs)} data sets were not run")


if __name__ == "__main__":
    run_main(main)
