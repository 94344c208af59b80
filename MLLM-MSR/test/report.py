"""Stage 7, second half: one page to look at, report.html, and its tables as report.md.

In:  everything in {output_dir}, and {data_dir}/users.jsonl, items.jsonl
Out: {output_dir}/report.html   self-contained, opens offline
     {output_dir}/report.md     the tables

    python MLLM-MSR/test/report.py --config configs/microlens.yaml

It shows the metrics of all systems beside the paper's and independent re-runs' (`published.yaml`),
which differences between this run's systems are real (paired bootstrap over users), ROC curve,
score histogram, training curve and time per stage; all test users in a table; of each user the
history, the preference after each block, and the candidates under two variants side by side; where
the model errs; the items with their summaries; rejected rows. `report.html#user-17` opens at one
user. `--compare DIR` puts the variants of another run on the same candidates beside. CPU, seconds.
"""

from mllmrec.stage.main import run_main

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic.dataclasses import dataclass

from mllmrec.evaluation.report_data import RunFiles, rejected_files, report_data
from mllmrec.evaluation.result_tables import (
    DIFFERENCES,
    GROUPS,
    as_markdown,
    difference_rows,
    group_of,
    list_digests,
    metric_rows,
    read_metrics,
    score_files,
    share_lists,
)
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import atomic_file, read_rows, require
from mllmrec.stage.options import CommonOptions, option, parse_options, print_options
from mllmrec.stage.output import WholeOutput
from mllmrec.stage.record import Job, file_digests, named_digests, read_record

logger = logging.getLogger(__name__)

SECTION = "report"
SHOWN_FIRST = ("sft", "zero_shot", "ranker", "ranked", "retriever")  # the first that is there leads


@dataclass
class Options(CommonOptions):
    published: str = option(
        "", "compare with the published rows for: microlens, amazon_games or amazon_baby"
    )
    compare: str = option("", "the --output_dir of another run on the same candidates")


def stage_outputs(options: Options) -> list[tuple[str, Path]]:
    """[(stage, its main output)], in order."""
    system = options.system_dir
    return [
        ("1 data", Path(options.data_dir) / "users.jsonl"),
        ("2 image summaries", system / "image_summaries.jsonl"),
        ("3 preferences", system / "user_preferences.jsonl"),
        ("4 rows", system / "train.jsonl"),
        ("5 training", system / "adapter"),
        ("6 scoring", system / "sft" / "scores.jsonl"),
    ]


def in_order(scores: dict[str, Path]) -> dict[str, Path]:
    """The variants as the page has them: SHOWN_FIRST, other systems, popularity, the others."""

    def place(variant: str) -> tuple[int, bool, str]:
        if variant in SHOWN_FIRST:
            return SHOWN_FIRST.index(variant), False, variant
        is_system = group_of(variant, scores[variant].parent.parent.name) == "systems"
        return len(SHOWN_FIRST) + (not is_system), variant != "popularity", variant

    return {variant: scores[variant] for variant in sorted(scores, key=place)}


def read_published(name: str) -> list[Any]:
    """[(system, source, AUC, HR@5, MRR@5)] of one data set, x100."""
    text = (Path(__file__).parent / "published.yaml").read_text(encoding="utf-8")
    known = yaml.safe_load(text)
    if name and name not in known:
        raise InputError(
            f"there are no published results for {name!r}; choose one of: {', '.join(known)}"
        )
    return known.get(name, [])


def compared(folder: Path, scores: dict[str, Path]) -> tuple[dict[str, Path], dict[str, Any]]:
    """(scores, metrics) of the variants of another run, called FOLDER/VARIANT.

    scores: of this run. Raises InputError if no variant has the candidates of this run's.
    """
    path = require(folder / "metrics.json", maker="scripts/07_report.sh")
    if any(own.resolve().is_relative_to(folder.resolve()) for own in scores.values()):
        raise InputError(f"--compare {folder} is this run's own folder; name that of another run")
    check_metrics(path)
    metrics, first = read_metrics(path), next(iter(scores))
    own = list_digests(read_rows(scores[first]))
    found, left_out = {}, []
    for name, other in in_order(score_files(folder)).items():
        if name in metrics and share_lists(own, list_digests(read_rows(other))):
            found[f"{folder.resolve().name}/{name}"] = other
        else:
            left_out.append(name)
    if not found:
        raise InputError(f"--compare {folder}: no variant there has the lists of {scores[first]}")
    if left_out:
        logger.info(f"--compare: other lists than {first}, left out: {', '.join(left_out)}")
    return found, {name: metrics[name.rpartition("/")[2]] for name in found}


def check_metrics(metrics_path: Path) -> None:
    """Raise InputError if metrics.json is not of the scores beside it."""
    record = read_record(metrics_path)
    if record is None:  # metrics from elsewhere
        return
    scores = named_digests(score_files(metrics_path.parent))
    made_from = {Path(name).name: digest for name, digest in record["inputs"].items()}
    if scores != made_from and not record["settings"].get("runs"):
        raise InputError(
            f"{metrics_path} is not of the scores in {metrics_path.parent}, which were made or "
            "changed later; make it again with scripts/07_report.sh"
        )


def write_report(
    metrics_path: Path, output: WholeOutput, published: list[Any], options: Options
) -> int:
    """Write report.html and report.md; return the number of variants. published: rows to show."""
    from mllmrec.evaluation import report_page as report

    folder, data_dir = Path(options.output_dir), Path(options.data_dir)
    metrics, scores = read_metrics(metrics_path), in_order(score_files(folder))
    if options.compare:
        others, other_metrics = compared(Path(options.compare), scores)
        scores, metrics = scores | others, metrics | other_metrics
    systems = {variant: path.parent.parent.name for variant, path in scores.items()}
    groups = metric_rows(metrics, published, systems)
    stages = report.stage_rows(stage_outputs(options))
    differences = difference_rows(scores)
    files = RunFiles(data_dir, options.system_dir, scores, options.image_roots)
    facts = report.run_facts(files)
    page = report.render_page(
        facts=facts,
        groups=groups,
        explanations=GROUPS,
        differences=differences,
        explained=DIFFERENCES.format(reference=differences[0]),
        stages=stages,
        plots=report.plot_urls(files),
        data=report_data(files),
        output_dir=options.output_dir,
    )
    markdown = as_markdown(facts, groups, differences, stages)
    output.begin()
    for path, text in zip(output.outputs, (page, markdown), strict=True):
        with atomic_file(path) as file:
            file.write(text.encode())
    return len(metrics)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_options(Options, SECTION, argv, __doc__)
    print_options(options, "stage 7, report")
    published = read_published(options.published)
    folder, data_dir = Path(options.output_dir), Path(options.data_dir)
    metrics_path = require(folder / "metrics.json", maker="scripts/07_report.sh")
    check_metrics(metrics_path)
    outputs = [folder / "report.html", folder / "report.md"]
    inputs = file_digests(
        metrics_path,
        options.system_dir / "training_log.jsonl",
        data_dir / "users.jsonl",
        data_dir / "items.jsonl",
        options.system_dir / "user_preferences.jsonl",
        options.system_dir / "image_summaries.jsonl",
        *rejected_files(data_dir, options.system_dir),
        *([Path(options.compare) / "metrics.json"] if options.compare else []),
    )
    job = Job.of(options, inputs, stage=SECTION)
    with WholeOutput(job, outputs) as output:
        if output.is_needed:
            n_variants = write_report(metrics_path, output, published, options)
            output.finish({"variants": n_variants})
            print(f"wrote {outputs[0]} and {outputs[1]}")


if __name__ == "__main__":
    run_main(main)
