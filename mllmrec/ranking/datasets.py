"""Stage 4: users, items and preferences become rows to train on and to score.

A user's rows are written whole or not at all, so every scored list has all its candidates.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic.dataclasses import dataclass

from mllmrec.data.candidates import (
    candidates,
    is_leave_one_out,
    read_users_and_items,
    training_negatives,
    user_key,
    users_of_split,
)
from mllmrec.data.images import (
    ImageError,
    check_item_images,
    image_digests,
    item_images,
    open_image,
)
from mllmrec.data.summaries import read_summaries
from mllmrec.prompts import mllm_msr as prompts
from mllmrec.prompts.templates import check_template
from mllmrec.ranking.questions import Candidate, QuestionFormat, candidate_row
from mllmrec.ranking.row_checks import row_inputs
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import (
    read_by_id,
    read_rejected,
    rejected_path,
    relative_path,
    require,
    write_rejected,
    write_rows,
)
from mllmrec.stage.options import CommonOptions, option
from mllmrec.stage.output import WholeOutput
from mllmrec.stage.progress import progress_bar
from mllmrec.stage.provenance import check_lines_source, short_digest
from mllmrec.stage.record import Job, file_digests, read_record
from mllmrec.stage.schema import Row

logger = logging.getLogger(__name__)

SECTION = "datasets"
INPUT_OPTIONS = ("preferences", "summaries")  # these say where, not what


@dataclass
class DatasetOptions(CommonOptions):
    """Options of stage 4."""

    preferences: str = option("", "default: {output_dir}/{system}/user_preferences.jsonl")
    summaries: str = option(
        "",
        "what the preferences were made from, to compare; default: the one that stage 3 read, else "
        "image_summaries.jsonl beside them, if there is one",
    )
    recommend_prompt: str = option(
        prompts.RECOMMEND,
        "template of the yes/no question: {title} and {preference} in any order; it may name "
        "{user_id} and {item_id}",
    )
    max_title_characters: int = option(
        300, "longer titles are cut, 0 = no limit; a few real ones are whole pages", ge=0
    )
    train_negatives: int = option(
        0, "negatives of a training user that become rows, 0 = all of users.jsonl", ge=0
    )

    def __post_init__(self) -> None:
        prompts.drop_images(self)


class Sources:
    """What rows are made of. users: lines of users.jsonl; items, preferences: by id."""

    def __init__(self, paths: tuple[Path, Path, Path], options: DatasetOptions) -> None:
        users_path, self.items_path, self.preferences_path = map(require, paths)
        self.job = Job.of(options, {}, INPUT_OPTIONS, stage=SECTION)
        parts = ("target", "negatives")
        self.users, self.items = read_users_and_items(users_path, self.items_path, parts)
        check_item_images(self.items, self.items_path, options.data_dir, options.image_roots)
        self.leave_one_out = is_leave_one_out(self.users)
        key = ("user_id", "split") if self.leave_one_out else "user_id"
        self.preferences = read_by_id(self.preferences_path, key)
        self.rejected = read_rejected(self.preferences_path, key)
        self._check_preferences(users_path, options.summaries)
        self.paths: dict[str, Path | None] = {}  # of the candidates' images
        if options.with_images:
            listed = {item for user in self.users for item, _ in candidates(user)}
            used = {item_id: item for item_id, item in self.items.items() if item_id in listed}
            self.paths = item_images(used, self.items_path)
        self.digests = image_digests(self.paths.values())
        self._image_problems: dict[Path | None, str | None] = {}

    def _check_preferences(self, users_path: Path, summaries: str) -> None:
        """Raise InputError for a preference that was made from another history than its user has.

        summaries: see DatasetOptions.
        """
        path = self.preferences_path
        record = read_record(path) or {}
        named = summaries or record.get("arguments", {}).get("summaries")
        summaries_path = Path(named or path.with_name("image_summaries.jsonl"))
        reads_summaries, texts = record.get("stage") != "title_history", dict[str, str]()
        reads_summaries &= record.get("arguments", {}).get("with_images", True)
        if reads_summaries and summaries_path.exists():
            used = {item for user in self.users for item in user["history"]}
            texts = read_summaries(summaries_path, self.items, self.items_path, used)
        inputs = {}
        for user in self.users:
            key, history = user_key(user, self.leave_one_out), user["history"]
            titles = [self.items[i]["title"] if i in self.items else None for i in history]
            own = [texts.get(i, "") for i in history]
            inputs[key] = [list(zip(history, titles, own, strict=True))]
            row = self.preferences.get(key, {"blocks": [{"items": history}]})
            read = [item for block in row["blocks"] for item in block["items"]]
            if read != history[row.get("items_left_out", 0) :]:
                raise InputError(
                    f"{path}, line {list(self.preferences).index(key) + 1}: the preference of user "
                    f"{key!r} was made from other items than its history in {users_path}; run "
                    "stage 3 again"
                )
        if reads_summaries and not summaries_path.exists():
            logger.warning(f"{path}: texts are not compared, {summaries_path} is missing")
            return
        fault = f"made from other titles or summaries than {self.items_path} and {summaries_path} "
        fault += "have; run stage 3 again, or name the --summaries that it read"
        check_lines_source(self.preferences, inputs, path, fault)
        check_lines_source(self.rejected, inputs, rejected_path(path), fault)

    def preference(self, user: Row) -> tuple[str, str | None]:
        """(preference, None), or ("", reason) for a user that stage 3 rejected."""
        key = user_key(user, self.leave_one_out)
        if key in self.rejected:
            return "", f"no preference: {self.rejected[key]['reason']}"
        if key not in self.preferences:
            raise InputError(
                f"user {key!r} has no line in {self.preferences_path}; finish stage "
                "3 with scripts/03_preference.sh"
            )
        return self.preferences[key]["preference"], None

    def image(self, item: Row) -> tuple[Path | None, str | None]:
        """(path of an item's image, reason why it cannot be used or None).

        Checked here, in seconds, so that the stages on a GPU do not stop at it.
        """
        path = self.paths[item["item_id"]]
        if path not in self._image_problems:  # an item is a candidate of many users
            self._image_problems[path] = _image_problem(path)
        return path, self._image_problems[path]


def _image_problem(path: Path | None) -> str | None:
    if path is None:
        return "it has no image"
    try:
        open_image(path)
    except ImageError as reason:
        return f"image {path.name}: {reason}"
    return None


def user_rows(
    user: Row, sources: Sources, path: Path, options: DatasetOptions, with_answer: bool
) -> tuple[list[Row], str | None]:
    """(one row per candidate, None), or ([], reason) if the preference or an image is missing.

    path: of the file that the rows go to; image paths are relative to it.
    """
    preference, reason = sources.preference(user)
    if reason:
        return [], reason
    question_format = QuestionFormat(
        options.domain, options.recommend_prompt, options.max_title_characters
    )
    if user["split"] == "train" and options.train_negatives:
        user = {**user, "negatives": training_negatives(user, options.train_negatives)}
    rows = []
    for item_id, label in candidates(user):
        item, image, image_path = sources.items[item_id], None, None
        if options.with_images:
            image_path, problem = sources.image(item)
            if problem or image_path is None:
                return [], f"candidate {item_id}: {problem}"
            image = relative_path(image_path, path)
        candidate = Candidate(user["user_id"], item_id, item["title"], image, label)
        row = candidate_row(candidate, preference, question_format, with_answer)
        digest = sources.digests.get(image_path)
        inputs = row_inputs(preference, item["title"], digest, label)
        rows.append({**row, "source": sources.job.source(*inputs)})
    return rows, None


def write_splits(splits: Sequence[str], options: DatasetOptions, with_answer: bool) -> None:
    """Write {output_dir}/{system}/{split}.jsonl for each split, unless they are up to date."""
    if not options.with_images and "{image" in options.recommend_prompt:
        raise InputError(
            "--with_images false: the question speaks of an image ({image}), which the rows have "
            "not; give a --recommend_prompt without it"
        )
    ids = ("user_id", "item_id")
    check_template(options.recommend_prompt, options.domain, ids, "title", "preference")
    data = Path(options.data_dir)
    paths = (
        data / "users.jsonl",
        data / "items.jsonl",
        Path(options.preferences or options.system_dir / "user_preferences.jsonl"),
    )
    sources = Sources(paths, options)
    inputs = file_digests(*paths) | {"images": short_digest(list(sources.digests.values()))}
    job = Job.of(options, inputs, INPUT_OPTIONS, stage=SECTION, limit=options.limit)
    users = [u for s in splits for u in users_of_split(sources.users, s, options.limit)]
    reasons = [sources.preference(user)[1] for user in users]
    if users and all(reasons):
        raise InputError(f"{paths[2]}: no user has a preference, the first: {reasons[0]}")
    for split in splits:
        path = options.system_dir / f"{split}.jsonl"
        with WholeOutput(job, [path], [rejected_path(path)]) as output:
            if output.is_needed:
                output.begin()
                output.finish(_write_split(split, path, sources, options, with_answer))


def _write_split(
    split: str, path: Path, sources: Sources, options: DatasetOptions, with_answer: bool
) -> Counter[str]:
    """Write the rows of one split; rejected users go to {split}.rejected.jsonl.

    Returns the counts.
    """
    users = users_of_split(sources.users, split, options.limit)
    counts: Counter[str] = Counter(rows=0, users=0, rejected=0)
    rejected: list[Row] = []
    longest = options.max_title_characters

    def rows() -> Iterator[Row]:
        for user in users:
            progress.update()
            made, reason = user_rows(user, sources, path, options, with_answer)
            if reason:
                rejected.append({"user_id": user["user_id"], "reason": reason})
                counts["rejected"] += 1
                continue
            counts["rows"] += len(made)
            counts["users"] += 1
            titles = [sources.items[row["item_id"]]["title"] for row in made]
            counts["titles_shortened"] += sum(0 < longest < len(title) for title in titles)
            yield from made

    with progress_bar(len(users), f"{split} rows", "user") as progress:
        write_rows(path, rows())
    write_rejected(rejected_path(path), rejected)
    note = ""
    if rejected:
        note = f"; {len(rejected):,} users were rejected, with reasons in {rejected_path(path)}"
    if counts["titles_shortened"]:
        note += f"; {counts['titles_shortened']:,} titles were shortened"
    logger.info(f"wrote {path}: {counts['rows']:,} rows of {counts['users']:,} users{note}")
    return counts
