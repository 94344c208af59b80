"""Statistics of the data of several configs, ours beside the paper's (Table 2)."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from table_writer import markdown_table, write_files

from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import read_json
from mllmrec.stage.options import load_config
from mllmrec.stage.record import machine


def report_statistics(columns: list[str], configs: list[Path], path: Path) -> None:
    """Write {path}.json, .md, .csv, with the data files of each config in a folder beside them.

    columns: names of stats.json. Raises InputError at the end if a data set could not be prepared.
    """
    report: dict[str, Any] = {"table": path.name, "data_sets": {}}
    reasons = {}
    for config in configs:
        folder = path.parent / config.stem
        # Not into the config's own folders: the sample also writes scores.
        where = ["--data_dir", str(folder), "--output_dir", str(folder)]
        command = ["bash", "scripts/01_prepare_data.sh", str(config), *where]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            printed = (done.stderr or done.stdout).strip().splitlines()
            reasons[config.stem] = printed[-1] if printed else f"exit code {done.returncode}"
        section = load_config(config).get("data", {})
        report["data_sets"][config.stem] = {
            "ours": None if done.returncode else read_json(folder / "stats.json"),
            "paper": {name: json.loads(section.get(f"paper_{name}", "0")) for name in columns},
        }
    report |= machine()
    text = markdown(report)
    write_files(path, report, text, lines_of(report))
    print(text)
    for name, reason in reasons.items():
        print(f"not run: {name}: {reason}", file=sys.stderr)
    if reasons:
        raise InputError(f"{len(reasons)} of {len(configs)} data sets were not run")


def lines_of(report: dict[str, Any]) -> list[list[str]]:
    """The table as lists of cells, the header first: our row and the paper's for each config."""
    data_sets = report["data_sets"]
    columns = next(iter(data_sets.values()))["paper"]
    lines = [["data set", "", *(name.replace("_", " ") for name in columns)]]
    for name, row in data_sets.items():
        ours = row["ours"]
        cells = [f"{ours[c]:,}" for c in columns] if ours else ["not run"] * len(columns)
        lines.append([name, "here", *cells])
        if any(row["paper"].values()):
            lines.append([name, "paper", *(f"{value:,}" for value in row["paper"].values())])
    return lines


def markdown(report: dict[str, Any]) -> str:
    """The table of `lines_of` in Markdown."""
    return "\n".join([*markdown_table(lines_of(report), texts=2), ""])
