"""What report.js shows: each test user's way to the ranking, the items, the rejected rows."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scipy.stats import rankdata

from mllmrec.data.candidates import read_users, users_of_split
from mllmrec.data.images import ImageError, check_item_images, data_url, open_image
from mllmrec.evaluation.metrics import ranking_scores
from mllmrec.evaluation.result_tables import list_digests, share_lists
from mllmrec.evaluation.texts import loops
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import read_by_id, read_lines, read_rows
from mllmrec.stage.schema import Row

LIMIT = 14_000_000  # bytes of the data; what else is in the page has less than a megabyte
THUMBNAIL = (96, 96)  # pixels
MOST = 20  # negatives that are named, those most often above a target
MOST_REJECTED = 200  # rejected rows that are shown of a file


@dataclass
class RunFiles:
    """Where the files of a run are.

    scores: variant -> scores.jsonl, the main variant first; image_roots: see CommonOptions.
    """

    data_dir: Path
    system_dir: Path
    scores: Mapping[str, Path]
    image_roots: Sequence[str] = ()


@dataclass
class _List:
    """A user's candidates under one variant: item -> rank from 1 (ties: their mean), and score."""

    ranks: dict[str, float]
    scores: dict[str, float]
    target: str | None

    @property
    def target_rank(self) -> float | None:
        return None if self.target is None else self.ranks[self.target]


def _lists(rows: Sequence[Row]) -> dict[str, _List]:
    """user -> its ranked list."""
    own: dict[str, list[tuple[float, Row]]] = {}
    for score, row in zip(ranking_scores(rows), rows, strict=True):
        own.setdefault(row["user_id"], []).append((score, row))
    found = {}
    for user, scored in own.items():
        ranks = rankdata([-score for score, _ in scored]).tolist()
        items = [row["item_id"] for _, row in scored]
        target = next((row["item_id"] for _, row in scored if row["label"]), None)
        scores = {row["item_id"]: row["score"] for _, row in scored}
        found[user] = _List(dict(zip(items, ranks, strict=True)), scores, target)
    return found


def comparable_lists(scores: Mapping[str, Path]) -> dict[str, dict[str, _List]]:
    """variant -> user -> ranked list, of the variants with the candidates of the first one.

    A variant may have fewer or more users than another one, as a pilot has.
    """
    found: dict[str, dict[str, _List]] = {}
    digests: dict[str, int] = {}
    for variant, path in scores.items():
        rows = read_rows(path)
        own = list_digests(rows)
        if not digests or share_lists(own, digests):
            found[variant] = _lists(rows)
            digests |= own
    return found


@dataclass
class _Items:
    """The items of the page, in the order in which they are first named."""

    files: RunFiles
    popularity: Counter[str]
    rows: list[dict[str, Any]] = field(default_factory=list)
    size: int = 0  # of the rows, in bytes
    numbers: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.path = self.files.data_dir / "items.jsonl"
        self.known = read_by_id(self.path, "item_id")
        check_item_images(self.known, self.path, self.files.data_dir, self.files.image_roots)
        summaries = self.files.system_dir / "image_summaries.jsonl"
        self.summaries = read_by_id(summaries, "item_id") if summaries.exists() else {}

    def number(self, item_id: str, named_by: Path) -> int:
        """Place of an item in `rows`, where it is put if it is not there."""
        if item_id not in self.numbers:
            item = _known(item_id, self.known, self.path, named_by)
            summary = self.summaries.get(item_id, {})
            text, name = summary.get("summary", ""), item["image"]
            self.numbers[item_id] = len(self.rows)
            row = {
                "id": item_id,
                "title": item["title"],
                "image": _thumbnail(self.path.parent / name) if name else None,
                "summary": text,
                "loops": loops(text),
                "cut": bool(summary.get("cut")),
                "popularity": self.popularity[item_id],
            }
            self.rows.append(row)
            self.size += _size(row)
        return self.numbers[item_id]


def report_data(files: RunFiles, limit: int = LIMIT) -> dict[str, Any] | None:
    """The data of report.js; None without scores.

    All users that a variant has scored are in `users`. As many of them as fit into `limit` bytes,
    with the items that they need, have their `details`.
    """
    lists = comparable_lists(files.scores)
    if not lists:
        return None
    users_path, scores_path = files.data_dir / "users.jsonl", next(iter(files.scores.values()))
    lines = read_users(users_path)
    train = [item for u in users_of_split(lines, "train") for item in (*u["history"], u["target"])]
    popularity = Counter(train)
    test = {user["user_id"]: user for user in users_of_split(lines, "test")}
    items = _Items(files, popularity)
    users: list[dict[str, Any]] = []
    everyone: dict[str, _List] = {}  # user -> its list under the first variant that has one
    for found in lists.values():
        for user_id, own in found.items():
            everyone.setdefault(user_id, own)
    for user_id, own in everyone.items():
        user = _known(user_id, test, users_path, scores_path)
        target = None if own.target is None else items.known.get(own.target, {}).get("title", "")
        ranks = [variant.get(user_id) for variant in lists.values()]
        row: dict[str, Any] = {"id": user_id, "length": len(user["history"]), "target": target}
        row["popularity"] = popularity[user["target"]]
        row["ranks"] = [found and found.target_rank for found in ranks]
        users.append(row)
    data = {
        "variants": list(lists),
        "users": users,
        "items": items.rows,
        "above": {name: _most_above(found, items.known) for name, found in lists.items()},
        "rejected": _rejected(files),
    }
    size = _size(data)
    for row, details in zip(users, _details(files, test, lists, everyone, items), strict=True):
        size += _size(details)
        if size + items.size > limit:
            break
        row["details"] = details
    return data


def _size(content: Mapping[str, Any]) -> int:
    """Bytes of a part of the page."""
    return len(as_script(content).encode())


def as_script(content: Any) -> str:
    """JSON that may stand in a script element, which "<" would end, or begin a comment in."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _details(
    files: RunFiles,
    test: Mapping[str, Row],
    lists: Mapping[str, Mapping[str, _List]],
    everyone: Mapping[str, _List],
    items: _Items,
) -> Iterator[dict[str, Any]]:
    """Of each user: blocks of the history with the preference after them, candidates, scores.

    everyone: user -> one of its lists.
    """
    preferences_path = files.system_dir / "user_preferences.jsonl"
    preferences = _read_preferences(preferences_path)
    users_path, scores_path = files.data_dir / "users.jsonl", next(iter(files.scores.values()))
    for user_id, own in everyone.items():
        history = test[user_id]["history"]
        # A system without preferences: the history as one block.
        whole = {"blocks": [{"items": history, "preference": ""}]}
        row = preferences.get(user_id, whole)
        named_by = preferences_path if user_id in preferences else users_path
        left_out = history[: row.get("items_left_out", 0)]
        candidates = sorted(own.ranks, key=lambda item: (item != own.target, item))
        found = [variant.get(user_id) for variant in lists.values()]
        yield {
            "left_out": [items.number(item, named_by) for item in left_out],
            "blocks": [
                {
                    "items": [items.number(item, named_by) for item in block["items"]],
                    "text": block["preference"],
                    "loops": loops(block["preference"]),
                }
                for block in row["blocks"]
            ],
            "has_target": own.target is not None,
            "candidates": [items.number(item, scores_path) for item in candidates],
            "ranks": [one and [one.ranks[item] for item in candidates] for one in found],
            "scores": [one and [round(one.scores[i], 4) for i in candidates] for one in found],
        }


def _most_above(lists: Mapping[str, _List], items: Mapping[str, Row]) -> list[list[Any]]:
    """[[title, lists in which it is above the target, lists that have it as a negative]]."""
    above, had = Counter[str](), Counter[str]()
    for own in lists.values():
        if own.target is not None:
            negatives = [item for item in own.ranks if item != own.target]
            had.update(negatives)
            above.update(item for item in negatives if own.ranks[item] < own.ranks[own.target])
    return [
        [items[item]["title"] if item in items else item, times, had[item]]
        for item, times in above.most_common(MOST)
    ]


def _rejected(files: RunFiles) -> list[dict[str, Any]]:
    """Of each file of rejected rows: name, number of rows, and the first rows with reasons."""
    found = []
    for path in rejected_files(files.data_dir, files.system_dir):
        first: list[list[str]] = []
        number = 0
        for number, row in read_lines(path):
            if number <= MOST_REJECTED:
                ids = [str(value) for key, value in row.items() if key != "reason"]
                first.append([", ".join(ids), row["reason"]])
        found.append({"file": path.name, "rows": number, "first": first})
    return found


def rejected_files(data_dir: Path, system_dir: Path) -> list[Path]:
    """The rejected rows of the data and of the system."""
    found = [*data_dir.glob("*.rejected.jsonl"), *system_dir.glob("**/*.rejected.jsonl")]
    return list({path.resolve(): path for path in sorted(found)}.values())


def _known(row_id: str, rows: Mapping[str, Row], path: Path, named_by: Path) -> Row:
    """The row of an id. Raises InputError if `path`, where the rows are from, has none."""
    if row_id not in rows:
        raise InputError(
            f"{named_by} names {row_id!r}, which is not in {path}; the two are not of one run, "
            "make the first again"
        )
    return rows[row_id]


def _read_preferences(path: Path) -> dict[str, Row]:
    """user_id -> line of user_preferences.jsonl for the test; empty if there is no file."""
    rows = read_rows(path) if path.exists() else []
    # Leave-one-out: one line per user and split.
    return {row["user_id"]: row for row in rows if row.get("split", "test") == "test"}


def _thumbnail(path: Path) -> str | None:
    """A small WEBP of the image as a data: URL, or None if it cannot be opened."""
    try:
        image = open_image(path)
    except ImageError:
        return None
    image.thumbnail(THUMBNAIL)
    return data_url(image, "WEBP", quality=60)
