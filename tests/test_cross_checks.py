"""Files that are right alone but do not belong together are refused before a model is loaded."""

import pytest
from conftest import write_unchecked

from mllmrec.generation.preferences import PreferenceOptions, read_histories
from mllmrec.ranking.datasets import DatasetOptions, Sources
from mllmrec.ranking.rows import check_training_rows
from mllmrec.stage.errors import InputError

USER = {"user_id": "u", "history": ["a"], "target": "b", "negatives": ["c"]}
USER |= {"split": "test", "fold": None}
ITEMS = [{"item_id": item_id, "title": "t", "image": None} for item_id in "abc"]
TEXTS = [{"item_id": item_id, "summary": "s"} for item_id in "abc"]
BLOCKS = [{"items": ["a"], "preference": "p"}]
LIKES = [{"user_id": "u", "preference": "p", "blocks": BLOCKS}]
SUMMARIES, PREFERENCES = "mllm_msr/image_summaries.jsonl", "mllm_msr/user_preferences.jsonl"
RIGHT = {"users.jsonl": [USER], "items.jsonl": ITEMS, SUMMARIES: TEXTS, PREFERENCES: LIKES}


def read_stage_3(folder):
    return read_histories(PreferenceOptions(data_dir=str(folder), output_dir=str(folder)))


def read_stage_4(folder):
    names = ("users.jsonl", "items.jsonl", PREFERENCES)
    options = DatasetOptions(data_dir=str(folder), with_images=False)
    sources = Sources(tuple(folder / name for name in names), options)
    return [sources.preference(user) for user in sources.users]


NO_ITEM = "users.jsonl, line 1: item '{}' is not in .*items.jsonl; scripts/01_prepare_data.sh"
REPEATED = "line {}: {} is already in line 1.*; remove one"
WRONG = [
    (read_stage_3, "users.jsonl", [USER] * 2, REPEATED.format(2, "user 'u'")),
    (read_stage_3, "items.jsonl", ITEMS[1:], NO_ITEM.format("a")),
    (read_stage_3, "items.jsonl", ITEMS * 2, REPEATED.format(4, "item_id 'a'")),
    (read_stage_3, SUMMARIES, TEXTS[1:], "item 'a' has no line in .*; finish scripts/02_image"),
    (read_stage_3, SUMMARIES, TEXTS * 2, REPEATED.format(4, "item_id 'a'")),
    (read_stage_4, "items.jsonl", ITEMS[:2], NO_ITEM.format("c")),
    (read_stage_4, "users.jsonl", [USER | {"negatives": []}], "'u' has no negatives, .*; make"),
    (read_stage_4, PREFERENCES, [], "user 'u' has no line in .*; finish stage 3 with"),
    (read_stage_4, PREFERENCES, LIKES * 2, REPEATED.format(2, "user_id 'u'")),
]


@pytest.mark.parametrize(("read", "name", "rows", "message"), WRONG)
def test_files_that_do_not_belong_together(tmp_path, read, name, rows, message):
    (tmp_path / "mllm_msr").mkdir()
    for file, right in RIGHT.items():
        write_unchecked(tmp_path / file, right)
    assert len(read(tmp_path)) == 1
    write_unchecked(tmp_path / name, rows)
    with pytest.raises(InputError, match=message):
        read(tmp_path)


def training_row(item_id, answer):
    turns = [("user", "A question"), ("assistant", answer)]
    turns = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    return {"user_id": "u", "item_id": item_id, "label": 1, "images": [], "messages": turns}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (training_row("a", "Yes"), "user 'u', item 'a' is already in line 1"),
        (training_row("b", "No"), "the answer is 'No', for the label 1 it must be 'Yes'"),
        ({**training_row("b", "Yes"), "label": 2}, "the label is 2, it must be 0 or 1"),
        ({**training_row("b", "Yes"), "images": ["x.png"]}, "image x.png: .*; restore it, or"),
    ],
)
def test_training_rows_are_checked_before_a_model_is_loaded(tmp_path, row, message):
    rows = [training_row("a", "Yes"), row]
    assert check_training_rows(rows[:1], tmp_path / "train.jsonl") == {}
    with pytest.raises(InputError, match=f"train.jsonl, line 2: {message}.* make the file again"):
        check_training_rows(rows, tmp_path / "train.jsonl")
