"""docs/results.md, written from docs/results.md.j2 and the files of results/.

    python scripts/reproduce/results_page.py

No figure of the page is typed: `table("sample/deviations")` in the template becomes the table of
results/sample/deviations.json with its command, commit, device and date, and
`value("microlens/table3", "sasrec", "auc")` one figure of it, x100. Commands are those of today;
the commit is that of the run.
"""

from mllmrec.stage.main import run_main

from typing import Any

import yaml
from data_statistics import markdown as statistics_table
from definitions import read_table
from jinja2 import Environment, StrictUndefined
from tables import markdown

from mllmrec.stage.jsonl import atomic_file, read_json
from mllmrec.stage.options import ROOT

RESULTS = ROOT / "results"
TEMPLATE = ROOT / "docs/results.md.j2"
PAGE = ROOT / "docs/results.md"


def result(name: str) -> dict[str, Any]:
    """The content of results/NAME.json."""
    return read_json(RESULTS / f"{name}.json")


def rows_of(name: str) -> dict[str, Any]:
    """The rows of results/NAME.json."""
    return result(name)["rows"]


def table(name: str) -> str:
    """The table of results/NAME.json, and how it was made."""
    report = result(name)
    seeds = " ".join(map(str, report["seeds"]))
    command = f"bash scripts/reproduce.sh {report['table']} {report['config']} --seeds {seeds}"
    keys = [*report["rows"], *report["not_run"]]
    if len(keys) < len(read_table(report["table"]).rows):
        command += f" --rows {' '.join(keys)}"
    packages = report["packages"]
    made = (
        f"`{command}`, {report['date']}, commit {str(report['git_commit'])[:7]}, "
        f"{devices(report)}, torch {packages['torch']}, transformers {packages['transformers']}."
    )
    return f"{made}\n{markdown(report)}".rstrip("\n")


def statistics(name: str) -> str:
    """The table of data statistics of results/NAME.json."""
    report = result(name)
    configs = " ".join(f"configs/{config}.yaml" for config in report["data_sets"])
    made = f"`bash scripts/reproduce.sh table2 {configs}`, {report['date']}"
    return f"{made}, commit {str(report['git_commit'])[:7]}.\n\n{statistics_table(report)}".rstrip()


def devices(report: dict[str, Any]) -> str:
    """Where the table was made, and the rows whose last stage ran elsewhere."""
    here: str = report["device"]
    elsewhere: dict[str, dict[str, None]] = {}
    for row in report["rows"].values():
        for run in row.get("last_stage", ()):
            if run.get("device", here) != here:
                elsewhere.setdefault(run["device"], {})[row["label"]] = None
    parts = [f"{device} for the rows {', '.join(rows)}" for device, rows in elsewhere.items()]
    return "; ".join([here, *parts])


def published(data_set: str, system: str, source: str) -> str:
    """AUC / HR@5 / MRR@5 of MLLM-MSR/test/published.yaml. source: the start of the row's."""
    rows = yaml.safe_load((ROOT / "MLLM-MSR/test/published.yaml").read_text(encoding="utf-8"))
    found = [
        values
        for name, where, *values in rows[data_set]
        if name == system and where.startswith(source)
    ]
    if len(found) != 1:
        raise KeyError((data_set, system, source))
    return " / ".join(f"{value:.2f}" for value in found[0])


def figures(name: str, row: str) -> str:
    """AUC / HR@5 / MRR@5 of a row of results/NAME.json, x100."""
    return " / ".join(value(name, row, metric) for metric in ("auc", "hr@5", "mrr@5"))


def choice(name: str) -> str:
    """The table of the settings that were tried on the validation users: results/NAME.json."""
    report = result(name)
    columns = report["columns"]
    lines = [f"| settings | epochs | {' | '.join(column.upper() for column in columns)} |"]
    lines += ["|---|---:|" + "---:|" * len(columns)]
    for run in sorted(report["runs"], key=lambda run: -run["best"][columns[0]]):
        cells = (f"{100 * run['best'][column]:.2f}" for column in columns)
        settings = ", ".join(f"{k} {v}" for k, v in run["options"].items())
        lines.append(f"| {settings} | {run['best']['epoch']:.0f} | {' | '.join(cells)} |")
    return f"{report['made']}\n\n" + "\n".join(lines)


def chosen_test(name: str, *metrics: str) -> str:
    """Test metrics, x100, of the settings of results/NAME.json that are best in validation."""
    report = result(name)
    best = max(report["runs"], key=lambda run: run["best"][report["columns"][0]])
    return " / ".join(f"{100 * best['test'][metric]:.2f}" for metric in metrics)


def from_paper(name: str, *metrics: str, source: str = "published") -> str:
    """Metrics of others, x100, that results/NAME.json has beside its own."""
    found = result(name)[source]
    return " / ".join(f"{100 * found[metric]:.2f}" for metric in metrics)


def value(name: str, row: str, metric: str) -> str:
    """One figure of results/NAME.json, x100."""
    return f"{100 * rows_of(name)[row]['metrics'][metric]:.1f}"


def difference(name: str, row: str, metric: str) -> str:
    """By how much a row is below the row that it is compared with, x100."""
    return f"{-100 * rows_of(name)[row]['differences'][metric]['value']:.1f}"


def over_seeds(name: str, row: str, metric: str) -> str:
    """The difference to the row that it is compared with, x100: its interval over the seeds."""
    found = rows_of(name)[row]["differences"][metric]
    return f"[{100 * found['seeds_low']:+.1f}, {100 * found['seeds_high']:+.1f}]"


def per_seed(name: str, row: str, metric: str) -> str:
    """The metric of each seed, x100."""
    runs = rows_of(name)[row]["per_seed"].values()
    return ", ".join(f"{100 * run[metric]:.1f}" for run in runs)


def gap(name: str, row: str, other: str, metric: str) -> str:
    """By how much `other` is below `row`, x100."""
    rows = rows_of(name)
    return f"{100 * (rows[row]['metrics'][metric] - rows[other]['metrics'][metric]):.1f}"


def requests(name: str, row: str) -> str:
    """Prompts per user of a row of results/NAME.json."""
    found = [costs["requests"] for costs in rows_of(name)[row]["costs"]]
    return f"{sum(found) / len(found):.0f}"


def costs(name: str, row: str) -> str:
    """Minutes of the stage that wrote the row's scores and its peak memory, means of the seeds."""
    runs = rows_of(name)[row]["last_stage"]
    minutes = sum(run["seconds"] for run in runs) / len(runs) / 60
    return f"{minutes:.1f} min, {max(run['peak_gb'] for run in runs):.1f} GB"


def timed(name: str, row: str) -> str:
    """Minutes, memory and epochs of one run of results/NAME.json, which was run for its time."""
    run = rows_of(name)[row]
    return f"{run['seconds'] / 60:.1f} min, {run['peak_gb']:.1f} GB ({run['epochs_run']} epochs)"


def render() -> str:
    """The page as text. Raises an error for a file, row or metric that is not there."""
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    functions = (table, statistics, value, figures, published, choice, difference)
    functions += (chosen_test, from_paper, over_seeds, per_seed, gap, requests, costs, timed)
    return template.render({function.__name__: function for function in functions})


def main() -> None:
    """Write the page."""
    with atomic_file(PAGE) as file:
        file.write(render().encode())
    print(f"wrote {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    run_main(main)
