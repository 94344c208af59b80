"""Image summaries as the later stages read them, compared with the items that they describe."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mllmrec.data.images import image_digests, item_images
from mllmrec.stage.jsonl import PathLike, read_by_id, read_rejected, rejected_path
from mllmrec.stage.provenance import check_lines_source
from mllmrec.stage.schema import Row


def summary_inputs(items: Mapping[str, Row], items_path: PathLike) -> dict[str, list[Any]]:
    """Item id -> what its summary is made from: the digest of its image, None without one.

    items: lines of items.jsonl by id; items_path: of that file.
    """
    paths = item_images(items, items_path)
    digests = image_digests(paths.values())
    return {item_id: [digests[path]] for item_id, path in paths.items()}


def read_summaries(
    path: Path, items: Mapping[str, Row], items_path: PathLike, wanted: Iterable[str]
) -> dict[str, str]:
    """Item id -> its summary, empty for an item that stage 2 rejected.

    items: lines of items.jsonl by id. Raises InputError if the summary of a wanted item was made
    from another image, or, if the prompts used it, from another title than the item has now.
    """
    rows, rejected = read_by_id(path, "item_id"), read_rejected(path, "item_id")
    used = {item_id: items[item_id] for item_id in wanted if item_id in items}
    inputs = {
        item_id: (image, [*image, items[item_id]["title"]])
        for item_id, image in summary_inputs(used, items_path).items()
    }
    fault = f"made from another image or title than {items_path} names; run stage 2 again, or name "
    fault += "the summaries of this data set"
    check_lines_source(rows, inputs, path, fault)
    check_lines_source(rejected, inputs, rejected_path(path), fault)
    return {item_id: row["summary"] for item_id, row in rows.items()} | dict.fromkeys(rejected, "")
