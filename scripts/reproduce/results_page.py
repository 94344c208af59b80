"""docs/results.md, written from docs/results.md.j2 and the files of results/.

    python scripts/reproduce/results_page.py

No figure of the page is typed: `table("sample/deviations")` in the template becomes the table of
results/sample/deviations.json with its command, commit, device and date, and
`figures(row("microlens/table3", "sasrec").metrics, "auc")` one figure of it, x100. Commands are
those of today; the commit is that of the run.
"""

from mllmrec.stage.main import run_main

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from data_statistics import markdown as statistics_table
from definitions import read_table
from jinja2 import Environment, StrictUndefined
from table_writer import cost_chart, markdown, markdown_table

from mllmrec.stage.jsonl import atomic_file, read_json
from mllmrec.stage.options import ROOT

RESULTS = ROOT / "results"
TEMPLATE = ROOT / "docs/results.md.j2"
PAGE = ROOT / "docs/results.md"
FIGURES = ROOT / "docs/figures"
CHARTS: dict[Path, str] = {}  # file -> name of the results that it shows


def result(name: str) -> dict[str, Any]:
    """The content of results/NAME.json."""
    return read_json(RESULTS / f"{name}.json")


def row(name: str, key: str) -> dict[str, Any]:
    """A row of results/NAME.json."""
    return result(name)["rows"][key]


def made_by(report: dict[str, Any], table: str, configs: str) -> str:
    """The command of today that makes a table, date and commit of the run."""
    command = f"bash scripts/reproduce.sh {table} {configs}"
    return f"`{command}`, {report['date']}, commit {str(report['git_commit'])[:7]}"


def table(name: str) -> str:
    """The table of results/NAME.json, and how it was made."""
    report, packages = result(name), result(name)["packages"]
    words = f"{report['config']} --seeds {' '.join(map(str, report['seeds']))}"
    keys = [*report["rows"], *report["not_run"]]
    if len(keys) < len(read_table(report["table"]).rows):
        words += f" --rows {' '.join(keys)}"
    versions = f"torch {packages['torch']}, transformers {packages['transformers']}"
    made = f"{made_by(report, report['table'], words)}, {devices(report)}, {versions}."
    return f"{made}\n{markdown(report)}".rstrip("\n")


def chart(name: str) -> str:
    """AUC over the seconds of a user, of results/NAME.json; the file is written by `main`."""
    file = f"{name.replace('/', '_')}_costs.png"
    CHARTS[FIGURES / file] = name
    return f"![AUC over seconds per user, a point per row](figures/{file})"


def learning_curve(name: str, key: str, step: int) -> str:
    """The validations of a row's training as a table. step: rows in an optimizer step."""
    lines = [["rows of training", "AUC", "NDCG@10"]]
    for found in row(name, key)["validations"][0]:
        lines.append(
            [
                f"{step * found['step']:,}",
                figures(found, "eval_auc"),
                figures(found, "eval_ndcg@10"),
            ]
        )
    return "\n".join(markdown_table(lines))


def statistics(name: str) -> str:
    """The table of data statistics of results/NAME.json."""
    report = result(name)
    configs = " ".join(f"configs/{config}.yaml" for config in report["data_sets"])
    return f"{made_by(report, 'table2', configs)}.\n\n{statistics_table(report)}".rstrip()


def devices(report: dict[str, Any]) -> str:
    """Where the table was made, and the rows whose last stage ran elsewhere."""
    here: str = report["device"]
    elsewhere: dict[str, dict[str, None]] = {}
    for own in report["rows"].values():
        for run in own.get("last_stage", ()):
            if run.get("device", here) != here:
                elsewhere.setdefault(run["device"], {})[own["label"]] = None
    parts = [f"{device} for the rows {', '.join(rows)}" for device, rows in elsewhere.items()]
    return "; ".join([here, *parts])


def figures(values: dict[str, float], *metrics: str, digits: int = 1) -> str:
    """Metrics x100."""
    return " / ".join(f"{100 * values[metric]:.{digits}f}" for metric in metrics)


def per_seed(name: str, key: str, metric: str) -> str:
    """The metric of each seed, x100."""
    return ", ".join(figures(run, metric) for run in row(name, key)["per_seed"].values())


def gap(name: str, key: str, other: str, metric: str) -> str:
    """By how much `other` is below the row `key`, x100."""
    above, below = (row(name, own)["metrics"][metric] for own in (key, other))
    return f"{100 * (above - below):.1f}"


def difference_over_seeds(name: str, key: str, metric: str) -> str:
    """The difference to the row that it is compared with, x100: its interval over the seeds."""
    found = row(name, key)["differences"][metric]
    return f"[{100 * found['seeds_low']:+.1f}, {100 * found['seeds_high']:+.1f}]"


def cost(*runs: dict[str, float]) -> str:
    """Mean minutes and peak memory of some runs of a stage."""
    minutes = sum(run["seconds"] for run in runs) / len(runs) / 60
    return f"{minutes:.1f} min, {max(run['peak_gb'] for run in runs):.1f} GB"


def published(data_set: str, system: str, source: str) -> str:
    """AUC / HR@5 / MRR@5 of MLLM-MSR/test/published.yaml. source: the start of the row's."""
    rows = yaml.safe_load((ROOT / "MLLM-MSR/test/published.yaml").read_text(encoding="utf-8"))
    [found] = [own[2:] for own in rows[data_set] if own[0] == system and own[1].startswith(source)]
    return " / ".join(f"{value:.2f}" for value in found)


def published_lists() -> str:
    """Recall@10 / NDCG@10, x100, of all systems of MLLM4Rec/published.yaml, as a table."""
    content = yaml.safe_load((ROOT / "MLLM4Rec/published.yaml").read_text(encoding="utf-8"))
    places = [content["columns"].index(name) for name in ("recall@10", "ndcg@10")]
    lines = [["system", "source", *content["datasets"]]]
    for found in content["rows"]:
        cells = []
        for data_set in content["datasets"]:
            values = found.get(data_set, [])
            pair = values if len(values) < 3 else [values[place] for place in places]
            cells.append(" / ".join(f"{100 * value:.2f}" for value in pair) or "-")
        lines.append([found["system"], found["source"], *cells])
    return "\n".join(markdown_table(lines))


def by_validation(name: str) -> list[dict[str, Any]]:
    """The settings of results/NAME.json that were tried, those best in validation first."""
    report = result(name)
    return sorted(report["runs"], key=lambda run: -run["best"][report["columns"][0]])


def chosen(name: str) -> dict[str, Any]:
    """The settings that are best in validation."""
    return by_validation(name)[0]


def choice(name: str) -> str:
    """The table of the settings that were tried on the validation users: results/NAME.json."""
    report = result(name)
    lines = [["settings", "epochs", *(column.upper() for column in report["columns"])]]
    for run in by_validation(name):
        cells = [figures(run["best"], column, digits=2) for column in report["columns"]]
        settings = ", ".join(f"{k} {v}" for k, v in run["options"].items())
        lines.append([settings, f"{run['best']['epoch']:.0f}", *cells])
    return "\n".join([report["made"], "", *markdown_table(lines)])


def render() -> str:
    """The page as text. Raises an error for a file, row or metric that is not there."""
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    functions: list[Callable[..., Any]] = [result, row, table, statistics, figures, per_seed, gap]
    functions += [difference_over_seeds, cost, published, published_lists, chosen, choice, chart]
    functions += [learning_curve]
    return template.render({function.__name__: function for function in functions})


def main() -> None:
    """Write the page, and the figures that it shows."""
    with atomic_file(PAGE) as file:
        file.write(render().encode())
    for path, name in CHARTS.items():
        with atomic_file(path) as file:
            file.write(cost_chart(result(name)))
    print(f"wrote {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    run_main(main)
