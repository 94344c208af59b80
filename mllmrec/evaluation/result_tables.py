"""Finding the scores of all systems, and the tables of their metrics."""

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from math import nan
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from mllmrec.evaluation.metrics import SHOWN, USER_GROUPS
from mllmrec.evaluation.paired import Scored, paired_differences
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import PathLike, read_json, read_rows
from mllmrec.stage.provenance import describing_records
from mllmrec.stage.schema import Row, problem

DIFFERENCES = (
    "Difference to {reference} on the same candidates, x100, with the 95% interval of a paired "
    "bootstrap over users; * 0 is outside."
)
GROUPS = {
    "systems": "Recommenders of this run; zero_shot is the model before, sft after its training.",
    "ablations": "The trained model with one of its inputs hidden.",
    "baselines": "Simple recommenders on the same candidates.",
    "bounds": "Rules that know how the sample's users choose; no recommender can know more.",
    "published": "Reported elsewhere, each on its own candidates.",
}
# Variants with lists of their own, where no run record says so (key or setting `lists`).
OWN_LISTS = [f"popularity_{how}_negatives" for how in ("uniform", "weighted")]
OWN_LISTS += ["retriever_order", "random_order", "retrieved_title_only", "retrieved_caption_only"]
OWN_LISTS += ["retrieved_counted", "retrieved_ceiling"]
FIRST = ("zero_shot", "sft")  # these rows lead a table, the others follow by name
Metrics = Mapping[str, Mapping[str, Any]]
MetricRow = tuple[str, str, Sequence[str]]  # (system, source, cells)
Published = Sequence[Sequence[Any]]  # (system, source, AUC, HR@5, MRR@5), x100
_Number = Annotated[float, Field(allow_inf_nan=False)]
_Interval = Annotated[list[_Number], Field(min_length=2, max_length=2)]
_METRICS: TypeAdapter[Any] = TypeAdapter(
    dict[str, dict[str, _Number | _Interval]], config=ConfigDict(strict=True)
)


def read_metrics(path: PathLike) -> dict[str, dict[str, Any]]:
    """metrics.json, variant -> its metrics. Raises InputError if it holds anything else."""
    metrics, remedy = read_json(path), "delete it and make it again with scripts/07_report.sh"
    try:
        _METRICS.validate_python(metrics)
    except ValidationError as error:
        raise InputError(f"{path}: {problem(error)}; {remedy}") from None
    for variant, row in metrics.items():
        for name in (*SHOWN, "users"):
            value = row.get(name)
            if not isinstance(value, int | float) or (name != "users" and not 0 <= value <= 1):
                raise InputError(f"{path}: {variant} has no {name!r} from 0 to 1; {remedy}")
    return metrics


def score_files(output_dir: PathLike) -> dict[str, Path]:
    """dict variant -> its scores.jsonl, of all systems, in the order of the table.

    Scores are in {output_dir}/{system}/{variant}/scores.jsonl. Raises InputError if two systems
    have a variant of one name, since a row of the table could then mean either.
    """
    files: dict[str, Path] = {}
    for path in sorted(Path(output_dir).glob("*/*/scores.jsonl")):
        name = path.parent.name
        if name in files:
            raise InputError(
                f"{files[name]} and {path} are two variants of one name; score one of them again "
                "with another --variant"
            )
        files[name] = path
    order = sorted(files, key=lambda n: (FIRST.index(n) if n in FIRST else len(FIRST), n))
    return {name: files[name] for name in order}


def own_lists(scores: Path) -> str:
    """How a variant's lists differ from the table's (redrawn, retrieved); "" if they do not."""
    for _, record in describing_records(scores):
        lists = record.get("lists") or record["settings"].get("lists")
        if lists in ("redrawn", "retrieved"):
            return str(lists)
    return "redrawn" if scores.parent.name in OWN_LISTS else ""


def list_digests(rows: Iterable[Row]) -> dict[str, int]:
    """user -> hash of the candidates and labels, to compare lists within one process."""
    lists: dict[str, list[tuple[str, int]]] = {}
    for row in rows:
        lists.setdefault(row["user_id"], []).append((row["item_id"], row["label"]))
    return {user: hash(frozenset(candidates)) for user, candidates in lists.items()}


def share_lists(own: Mapping[str, int], other: Mapping[str, int]) -> bool:
    """Whether two variants have users in common, and the same candidates for all of these.

    own, other: `list_digests` of each.
    """
    shared = own.keys() & other.keys()
    return bool(shared) and all(own[user] == other[user] for user in shared)


def check_same_lists(digests: Mapping[Path, Mapping[str, int]]) -> None:
    """Raise InputError unless the variants of one table have the same candidates for each user.

    digests: scores.jsonl -> its `list_digests`. A variant may have fewer users, as a pilot has.
    """
    if not digests:
        return
    largest = max(digests, key=lambda path: len(digests[path]))
    for path, own in digests.items():
        for user, digest in own.items():
            if digests[largest].get(user) != digest:
                has = "no such user" if user not in digests[largest] else "other candidates for it"
                raise InputError(
                    f"{path} has user {user!r}, and {largest} has {has}, so that they cannot stand "
                    "in one table; score one of them again, with the users.jsonl of the other"
                )


def group_of(variant: str, system: str) -> str:
    """The group of GROUPS that a row belongs to. system: folder of the variant."""
    if system in ("baselines", "bounds"):
        return system
    return "ablations" if "_no_" in variant else "systems"


def half_width(row: Mapping[str, Any], name: str) -> float | None:
    """Half the width of a metric's 95% interval, x100; None if there is no interval."""
    low, high = row.get(f"{name}_ci95", (None, None))
    return None if low is None or high is None else 50 * (high - low)


def difference_cell(found: Mapping[str, Any]) -> str:
    """A difference x100 with its interval; * where no interval holds 0."""
    low, high = 100 * found["low"], 100 * found["high"]
    return f"{100 * found['value']:+.1f} [{low:+.1f}, {high:+.1f}]" + "*" * found["is_real"]


def difference_rows(
    scores: Mapping[str, Path], resamples: int = 1000
) -> tuple[str, list[tuple[str, list[str]]]]:
    """(reference, [(variant, cells)]): each variant minus the reference, sft if it is there.

    scores: variant -> scores.jsonl. Paired over users: variants with lists of their own are left
    out, and those with fewer users.
    ("", []) if there is nothing to compare.
    """
    scores = {name: path for name, path in scores.items() if not own_lists(path)}
    reference = "sft" if "sft" in scores else next(iter(scores), "")
    rows: list[tuple[str, list[str]]] = []
    if len(scores) < 2:
        return "", rows
    scored = {name: Scored.of(read_rows(path), path) for name, path in scores.items()}
    for name, own in scored.items():
        if name != reference and own.same == scored[reference].same:
            found = paired_differences([(own, scored[reference])], resamples)
            cells = [{**asdict(found[m]), "is_real": found[m].is_real} for m in SHOWN]
            rows.append((name, [difference_cell(cell) for cell in cells]))
    return (reference, rows) if rows else ("", rows)


def print_metrics(metrics: Metrics) -> None:
    """The variants as lines, x100, with half the width of the 95% interval where there is one."""
    width, counts = max(map(len, metrics)) + 2, ["users", *_unequal(metrics)]
    header = [f"{name.upper():>16}" for name in SHOWN] + [
        f"{name:>{len(name) + 3}}" for name in counts
    ]
    print(" " * width + "".join(header))
    for variant, row in metrics.items():
        cells = []
        for name in SHOWN:
            half = half_width(row, name)
            cells.append(
                f"{100 * row[name]:>9.2f}" + (f" ±{half:>5.2f}" if half is not None else " " * 7)
            )
        cells += [f"{row.get(name, 0):>{len(name) + 3},}" for name in counts]
        print(f"{variant:{width}}{''.join(cells)}")
    names = [f"{name}_{group}" for group in USER_GROUPS for name in ("auc", "hr@5", "users")]
    if rows := {variant: row for variant, row in metrics.items() if "auc_new" in row}:
        print("\nUsers whose target is known from training, and users whose target is new:")
        print(" " * width + "".join(f"{name:>16}" for name in names))
        for variant, row in rows.items():
            cells = [100 * row.get(name, nan) for name in names]
            values = [
                f"{row.get(name, 0):>16,}" if "users" in name else f"{cell:>16.2f}"
                for name, cell in zip(names, cells, strict=True)
            ]
            print(f"{variant:{width}}{''.join(values)}")


def _unequal(metrics: Metrics) -> list[str]:
    """Counts to print because the rows differ in them; runs also where they do not."""
    found = {name: {row.get(name) for row in metrics.values()} for name in ("runs", "candidates")}
    return [n for n, values in found.items() if len(values) > 1 or (n == "runs" and any(values))]


def metric_rows(
    metrics: Metrics, published: Published, systems: Mapping[str, str] | None = None
) -> dict[str, list[MetricRow]]:
    """{group of GROUPS: [(system, source, cells)]}: this run's variants, and the published rows.

    systems: variant -> its folder; cells are texts.
    """
    groups: dict[str, list[MetricRow]] = {name: [] for name in GROUPS}
    for variant, row in metrics.items():
        rows = groups[group_of(variant, (systems or {}).get(variant, ""))]
        cells = []
        for name in SHOWN:
            half = half_width(row, name)
            cells.append(f"{100 * row[name]:.2f}" + ("" if half is None else f" ± {half:.2f}"))
        counts = [
            f"{row[name]:,} {name if row[name] > 1 else name[:-1]}"
            for name in ("users", *_unequal(metrics))
            if name in row
        ]
        source = "mean" if "runs" in row else "this run"
        rows.append((variant, f"{source}, {', '.join(counts)}", cells))
    for variant in FIRST:
        if variant not in metrics:
            groups["systems"].append((variant, "this run", ["not run"] * len(SHOWN)))
    for system, source, *values in published:
        cells = [f"{value:.2f}" for value in values] + ["-"]
        groups["published"].append((system, source, cells))
    return {name: rows for name, rows in groups.items() if rows}


def as_markdown(
    facts: Mapping[str, str],
    groups: Mapping[str, Sequence[MetricRow]],
    differences: tuple[str, Sequence[tuple[str, Sequence[str]]]],
    stages: Sequence[Sequence[str]],
) -> str:
    """The facts, the metrics, the differences of `difference_rows` and the stages as Markdown."""
    lines = ["# Report", "", "| | |", "|---|---|", *(_line(fact) for fact in facts.items()), ""]
    lines += [
        "Metrics x100, with half the width of the 95% interval over users, of a mean over runs."
    ]
    for group, rows in groups.items():
        lines += ["", f"{group.capitalize()}. {GROUPS[group]}", ""]
        lines += [f"| system | source | {' | '.join(name.upper() for name in SHOWN)} |"]
        lines += ["|---|---|" + "---:|" * len(SHOWN)]
        lines += [_line([system, source, *cells]) for system, source, cells in rows]
    reference, compared = differences
    if compared:
        lines += ["", DIFFERENCES.format(reference=reference), ""]
        lines += [f"| minus {reference} | {' | '.join(name.upper() for name in SHOWN)} |"]
        lines += ["|---|" + "---:|" * len(SHOWN)]
        lines += [_line([name, *cells]) for name, cells in compared]
    lines += ["", "| stage | seconds | rows | device |", "|---|---:|---|---|"]
    return "\n".join(lines + [_line(stage) for stage in stages]) + "\n"


def _line(cells: Sequence[str]) -> str:
    """A line of a Markdown table. Names of folders are text, whatever characters they have."""
    texts = [html.escape(" ".join(cell.split())).replace("|", "&#124;") for cell in cells]
    return f"| {' | '.join(texts)} |"
