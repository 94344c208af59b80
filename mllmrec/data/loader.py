"""What all loaders do alike: the log that one has read becomes the files of stage 1, recorded."""

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

from mllmrec.data.columns import encoded, json_lines, write_lines
from mllmrec.data.data_split import DataOptions, PreparedData, SplitOptions, prepare
from mllmrec.data.images import check_image_paths
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import (
    read_by_id,
    read_rejected,
    rejected_path,
    relative_path,
    write_json,
    write_rejected,
)
from mllmrec.stage.options import print_next
from mllmrec.stage.output import WholeOutput
from mllmrec.stage.record import Job, file_digests
from mllmrec.stage.schema import Row

logger = logging.getLogger(__name__)


def run_loader(
    options: DataOptions,
    raw_files: Iterable[Path],
    load: Callable[[], tuple[Any, pd.DataFrame, list[Row]]],
    rules: Callable[..., Any] = prepare,
    has_urls: bool = False,
    **settings: Any,
) -> None:
    """Write users.jsonl, items.jsonl and stats.json, unless they are those of the raw files.

    load: gives (log, catalogue, rejected rows); rules: make of (log, catalogue, options) what is
    written; has_urls: the catalogue has a column url instead of image, so image_urls.jsonl is
    written, too; settings: what else decides the content.
    """
    data_dir, outputs, files = Path(options.data_dir), data_outputs(options), list(raw_files)
    images_path, urls_path = data_dir / "images.jsonl", data_dir / "image_urls.jsonl"
    failed = set(read_rejected(images_path, "item_id")) if has_urls else set()  # downloads
    files += [rejected_path(images_path)] if failed else []
    outputs += [urls_path] if has_urls else []
    settings |= {"limit": options.limit, "raw_dir": options.raw_dir}
    job = Job.of(options, file_digests(*files), stage="data", **settings)
    with WholeOutput(job, outputs, [rejected_rows_path(options)]) as output:
        if output.is_needed:
            log, catalogue, rejected = load()
            if has_urls:
                catalogue["image"] = _image_files(catalogue["url"], failed, options)
            data = rules(log, catalogue, options)
            del log  # a large one takes a gigabyte
            output.begin()
            counts = write_data_set(data, rejected, options)
            if has_urls:
                _write_urls(data.items["url"].dropna(), failed, urls_path)
            output.finish(counts)
            report(data.statistics, options)
    download = has_urls and not images_path.exists()
    script = "scripts/02_image_summary.sh" if options.with_images else "scripts/03_preference.sh"
    script = "data_processing/download_images.py" if download else script
    print_next(script, options.config, options.words)


def _image_files(urls: pd.Series, failed: set[str], options: DataOptions) -> list[str | None]:
    """Where the images are after the download; None for items without one."""
    folder, there = f"{options.data_dir}/images", urls.notna() & ~urls.index.isin(list(failed))
    if failed and not there.any():
        raise InputError(
            f"no image could be fetched ({options.data_dir}/images.rejected.jsonl says why); when "
            f"that is fixed: python data_processing/download_images.py --config {options.config} "
            f"--data_dir {options.data_dir} --retry_rejected true"
        )
    names = zip(urls.index.tolist(), there.tolist(), strict=True)
    return [f"{folder}/{item_id}.jpg" if is_there else None for item_id, is_there in names]


def _write_urls(urls: pd.Series, failed: set[str], path: Path) -> None:
    """Write image_urls.jsonl. URLs of failed downloads stay, so that they can be tried again."""
    earlier = (
        read_by_id(path, "item_id", keys=("item_id", "url")) if failed and path.exists() else {}
    )
    kept = {item_id: row["url"] for item_id, row in earlier.items() if item_id in failed}
    merged = kept | dict(zip(urls.index.tolist(), urls.tolist(), strict=True))
    write_lines(path, json_lines(item_id=encoded(list(merged)), url=encoded(list(merged.values()))))


def data_outputs(options: DataOptions) -> list[Path]:
    """users.jsonl, items.jsonl, stats.json and, of a log, touched.jsonl in the data folder."""
    names = ["users.jsonl", "items.jsonl", "stats.json"]
    names += ["touched.jsonl"] if isinstance(options, SplitOptions) else []
    return [Path(options.data_dir) / name for name in names]


def rejected_rows_path(options: DataOptions) -> Path:
    """Where the rejected rows of the raw files go."""
    return Path(options.data_dir) / "interactions.rejected.jsonl"


def write_data_set(data: Any, rejected: Sequence[Row], options: DataOptions) -> dict[str, int]:
    """Write all outputs of a loader; return the counts for the record.

    data: PreparedData or another object with items, statistics and encoded_lines().
    """
    statistics, paths = data.statistics, data_outputs(options)
    for name in ("train", "test"):  # without validation users, the last epoch is kept
        if statistics["written_users"][name] == 0 and not options.limit:
            raise InputError(
                f"of {statistics['users']} users none is in the {name} split; change "
                "--train_fraction, --validation_fraction or --folds"
            )
    statistics["rejected_rows"] = len(rejected)
    _write_items(data.items, paths[1], options)
    write_lines(paths[0], data.encoded_lines())
    write_json(paths[2], statistics)
    touched = Path(options.data_dir) / "touched.jsonl"
    if isinstance(data, PreparedData):
        write_lines(touched, data.touched_lines())
    else:  # lists without a log: one of another data set must not stay beside them
        touched.unlink(missing_ok=True)
    write_rejected(rejected_rows_path(options), rejected)
    return {
        "in": statistics["raw"]["interactions"],
        "out": sum(statistics["written_users"].values()),
        "items": len(data.items),
        "rejected": len(rejected),
    }


def _write_items(items: pd.DataFrame, path: Path, options: DataOptions) -> None:
    """Write items.jsonl. Raises InputError for an image outside the folders that are allowed."""
    start = cache(lambda folder: relative_path(os.path.join(folder, "x"), path)[:-1])
    parts = [
        image.rpartition("/") if isinstance(image, str) else None
        for image in items["image"].tolist()
    ]
    names = [start(part[0]) + part[2] if part else None for part in parts]
    given = [name for name in names if name]
    try:
        check_image_paths(given, path, options.data_dir, options.image_roots)
    except InputError as reason:  # here the images of the raw files are those that were named
        check_image_paths(given, path, options.data_dir, [options.raw_dir])
        logger.info(f"note: {reason}")
    columns = {"item_id": items.index, "title": items["title"], "image": names}
    write_lines(path, json_lines(**{name: encoded(values) for name, values in columns.items()}))


def report(statistics: dict[str, Any], options: DataOptions) -> None:
    """Print the core's numbers, beside the paper's if the config names them, and what is where."""
    names = ("users", "items", "interactions", "average_length", "sparsity")
    papers = {name: getattr(options, f"paper_{name}") for name in names}
    has_paper = any(papers.values())
    print(f"{'':16}{'raw log':>12}{'this core':>12}{'the paper' if has_paper else '':>12}".rstrip())
    for name, paper in papers.items():
        shown = format(paper, ",") if paper else "-" if has_paper else ""
        line = f"{name:16}{statistics['raw'][name]:>12,}{statistics[name]:>12,}{shown:>12}"
        print(line.rstrip())
    without = statistics.get("items_without_image")
    if without and isinstance(options, SplitOptions) and options.with_images:
        removed = "removed before the k-core" if options.require_image else "kept"
        print(f"{without:,} items of the raw log have no image: {removed} (--require_image)")
    if tied := statistics.get("tied_interactions"):
        by_hash = isinstance(options, SplitOptions) and options.ties == "hash"
        order = "in an order of the seed" if by_hash else "in the raw file's order"
        print(
            f"ties: {tied / statistics['interactions']:.2%} of the interactions, "
            f"{statistics['tied_test_targets']:,} of {statistics['test_targets']:,} test targets, "
            f"have the time of the user's interaction before; they are {order} (--ties)"
        )
    if users := statistics.get("users_with_one_time"):
        logger.warning(f"{users:,} users have one time for all their items, so no known order")
    if cold := statistics.get("cold_items"):
        left_out = statistics["left_out_users"]
        print(
            f"{cold:,} cold items, which no training line has; {left_out:,} training users keep "
            "fewer than two items and are left out"
        )
    written = statistics["written_users"].items()
    print(", ".join(f"{count:,} {name}" for name, count in written) + " users written")
    if count := statistics["rejected_rows"]:
        where = rejected_rows_path(options)
        logger.info(f"{count:,} rows of the raw files were rejected; each is in {where}, with why")
    logger.info("wrote " + " and ".join(map(str, data_outputs(options)[:2])))
