"""What stage 3 shares between its recurrent and its direct form: options, histories, the output."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from pydantic.dataclasses import dataclass as options_dataclass

from mllmrec.data.candidates import (
    is_leave_one_out,
    read_users_and_items,
    user_key,
    users_of_split,
)
from mllmrec.data.summaries import read_summaries
from mllmrec.models.model_options import GENERATION_SPEED_OPTIONS, GenerationStageOptions
from mllmrec.prompts import mllm_msr as prompts
from mllmrec.prompts.templates import check_template
from mllmrec.stage.errors import InputError
from mllmrec.stage.options import option
from mllmrec.stage.output import SHORTENED, RowId, RowOutput
from mllmrec.stage.record import Job, file_digests
from mllmrec.stage.schema import Row

SPEED_OPTIONS = (*GENERATION_SPEED_OPTIONS, "summaries")  # these change no preference
COUNTERS = SHORTENED | {"items_left_out": "items were left out of a prompt"}


@options_dataclass
class PreferenceOptions(GenerationStageOptions):
    """Options of both forms of stage 3."""

    model: str = option(
        "meta-llama/Meta-Llama-3-8B-Instruct",
        "text model, hub id or folder (paper: Llama-3-8B-Instruct)",
    )
    summaries: str = option("", "default: {output_dir}/{system}/image_summaries.jsonl")
    max_new_tokens: int = option(1024, "length of a preference (released code: 1024)", ge=1)
    max_prompt_tokens: int = option(0, "0: as many as the model takes beside the answer", ge=0)
    temperature: float = option(0.6, "0 = greedy (released code: 0.6)", ge=0, allow_inf_nan=False)
    top_p: float = option(
        0.9, "nucleus sampling, if temperature > 0 (released code: 0.9)", gt=0, le=1
    )
    first_prompt: str = option(
        prompts.PREFERENCE_FIRST, "template of a history's first block; it may name {user_id}"
    )
    block_line: str = option(
        prompts.BLOCK_LINE,
        "template of one item of a block: {number}, {title}, {image_word}, {summary}, {item_id}",
    )

    def __post_init__(self) -> None:
        prompts.drop_images(self)


class HistoryItem(NamedTuple):
    """One item of a history as the prompts describe it."""

    item_id: str
    title: str
    summary: str


@dataclass
class UserHistory:
    """A user's history, oldest item first.

    ids: user_id, and split where a user has several lines; is_wanted: one of the first `--limit`
    users of its split.
    """

    ids: Row
    items: list[HistoryItem]
    is_wanted: bool = True


def read_histories(options: PreferenceOptions) -> dict[RowId, UserHistory]:
    """Histories by user, checked so that every item of those that are wanted is known.

    An item that stage 2 rejected has an empty summary, without images all have: its title is used
    alone. Raises InputError for an item that is unknown or that stage 2 has not processed, and for
    a summary of another image than the item has now.
    """
    data = Path(options.data_dir)
    users_path, items_path = data / "users.jsonl", data / "items.jsonl"
    summaries_path = Path(options.summaries or options.system_dir / "image_summaries.jsonl")
    users, items = read_users_and_items(users_path, items_path, ("history", "negatives"))
    leave_one_out = is_leave_one_out(users)
    splits = {user["split"] for user in users}
    first = [user for split in splits for user in users_of_split(users, split, options.limit)]
    wanted = {user_key(user, leave_one_out) for user in first}
    used = {item for user in first for item in user["history"]}
    summaries = dict.fromkeys(items, "")
    if options.with_images:
        summaries = read_summaries(summaries_path, items, items_path, used)
    histories: dict[RowId, UserHistory] = {}
    for number, user in enumerate(users, start=1):
        key = user_key(user, leave_one_out)
        missing = [item for item in user["history"] if item not in summaries]
        if missing and key in wanted:
            raise InputError(
                f"{users_path}, line {number}: item {missing[0]!r} has no line in "
                f"{summaries_path}; finish scripts/02_image_summary.sh"
            )
        history = user_history(user, items, summaries, leave_one_out)
        histories[key] = replace(history, is_wanted=key in wanted)
    return histories


def user_history(
    user: Row, items: Mapping[str, Row], summaries: Mapping[str, str], leave_one_out: bool
) -> UserHistory:
    """A line of users.jsonl with its items' titles and summaries; unknown items are left out."""
    known = [i for i in user["history"] if i in items and i in summaries]
    ids = {"user_id": user["user_id"]} | ({"split": user["split"]} if leave_one_out else {})
    return UserHistory(ids, [HistoryItem(i, items[i]["title"], summaries[i]) for i in known])


def open_preferences(
    histories: dict[RowId, UserHistory], stage: str, options: PreferenceOptions
) -> RowOutput:
    """The output user_preferences.jsonl of these users. stage: the name of the script.

    Raises InputError for a template that cannot be filled.
    """
    first = next(iter(histories.values()), None)
    key: str | tuple[str, ...] = "user_id"
    prompts.block_text([("", "")], options.domain, template=options.block_line, item_ids=[""])
    check_template(options.first_prompt, options.domain, ["user_id"], "block")
    if first is not None and "split" in first.ids:
        key = ("user_id", "split")
    job = Job.of(options, file_digests(options.model), SPEED_OPTIONS, stage=stage)
    job = replace(job, wanted={user for user, own in histories.items() if own.is_wanted})
    return RowOutput(
        options.system_dir / "user_preferences.jsonl",
        key,
        {user: job.source(*history.items) for user, history in histories.items()},
        job,
        options.retry_rejected,
        COUNTERS,
    )
