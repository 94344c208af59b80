"""docs/results.md, written from docs/results.md.j2 and the files of results/.

    python scripts/reproduce/results_page.py

No figure of the page is typed: `table("sample/deviations")` in the template becomes the table of
results/sample/deviations.json with its command, commit, device and date, and
`value("microlens/table3", "sasrec", "auc")` one figure of it, x100.
"""

from mllmrec.stage.main import run_main

from pathlib import Path

from jinja2 import Environment, StrictUndefined
from tables import markdown

from mllmrec.stage.jsonl import atomic_file, read_json
from mllmrec.stage.options import ROOT

RESULTS = ROOT / "results"
TEMPLATE = ROOT / "docs/results.md.j2"


def table(name):
    """The table of results/NAME.json, and how it was made."""
    report = read_json(RESULTS / f"{name}.json")
    commit = str(report["git_commit"])[:7]
    script = f"bash scripts/reproduce_{report['table']}.sh {report['config']}"
    packages = report["packages"]
    made = (
        f"`{script}`, {report['date']}, commit {commit}, {report['device']}, torch "
        f"{packages['torch']}, transformers {packages['transformers']}."
    )
    return f"{made}\n{markdown(report)}".rstrip("\n")


def value(name, row, metric, digits=1):
    """One figure of results/NAME.json, x100."""
    metrics = read_json(RESULTS / f"{name}.json")["rows"][row]["metrics"]
    return f"{100 * metrics[metric]:.{digits}f}"


def difference(name, row, metric):
    """By how much a row is below the row that it is compared with, x100."""
    found = read_json(RESULTS / f"{name}.json")["rows"][row]["differences"][metric]
    return f"{-100 * found['value']:.1f}"


def gap(name, row, other, metric):
    """By how much `other` is below `row`, x100."""
    rows = read_json(RESULTS / f"{name}.json")["rows"]
    return f"{100 * (rows[row]['metrics'][metric] - rows[other]['metrics'][metric]):.1f}"


def costs(name, row):
    """Minutes of the stage that wrote the row's scores and its peak memory, means of the seeds."""
    runs = read_json(RESULTS / f"{name}.json")["rows"][row]["last_stage"]
    minutes = sum(run["seconds"] for run in runs) / len(runs) / 60
    return f"{minutes:.1f} min, {max(run['peak_gb'] for run in runs):.1f} GB"


def render():
    """The page as text. Raises an error for a file, row or metric that is not there."""
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    functions = (table, value, difference, gap, costs)
    return template.render({function.__name__: function for function in functions})


def main():
    page = Path(ROOT / "docs/results.md")
    with atomic_file(page) as file:
        file.write(render().encode())
    print(f"wrote {page.relative_to(ROOT)}")


if __name__ == "__main__":
    run_main(main)
