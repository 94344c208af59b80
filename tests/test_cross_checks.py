"""Files that are right alone but do not belong together are refused before a model is loaded."""

import pytest
from conftest import write_unchecked
from toy_jobs import toy_job

from mllmrec.data.candidates import read_candidates
from mllmrec.generation.preferences import PreferenceOptions, read_histories
from mllmrec.ranking.datasets import DatasetOptions, Sources, write_splits
from mllmrec.ranking.questions import Candidate, QuestionFormat, candidate_row
from mllmrec.ranking.row_checks import check_rows_source, check_training_rows, row_inputs
from mllmrec.stage.errors import InputError
from mllmrec.stage.options import CommonOptions

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
    *(
        (read_stage_4, PREFERENCES, [LIKES[0] | {"blocks": blocks}], "line 1: .* other items than")
        for blocks in (
            [{"items": ["c"], "preference": "p"}],
            [*BLOCKS, BLOCKS[0] | {"items": ["b"]}],
        )
    ),
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


LOO = {"negatives": [], "fold": None, "user_id": "u"}
TWO = [
    {**LOO, "history": ["a"], "target": "b", "split": "validation"},
    {**LOO, "history": ["a", "b"], "target": "c", "split": "test"},
]
LISTED = {"user_id": "u", "split": "test", "item_ids": ["c", "d"], "scores": [2.0, 1.0]}
LISTED |= {"has_target": True}


@pytest.mark.parametrize(
    "changed",
    [
        {"user_id": "other"},
        {"item_ids": ["a", "d"]},
        {"item_ids": ["c", "unknown"]},
        {"source": toy_job().source(["a"], "c")},
    ],
)
def test_candidates_of_another_data_set_are_refused(tmp_path, changed):
    path, items = tmp_path / "candidates.jsonl", {"a", "b", "c", "d"}
    right = LISTED | {"source": toy_job().source(["a", "b"], "c")}
    write_unchecked(path, [right])
    assert read_candidates(path, TWO, items) == [right]
    write_unchecked(path, [right | changed])
    with pytest.raises(
        InputError, match=r"line 1 \(\w+ test\): the list is of another users.jsonl"
    ):
        read_candidates(path, TWO, items)


def test_a_question_about_an_image_needs_rows_with_one(tmp_path):
    own = "{image} of {title}, {preference}"
    options = DatasetOptions(data_dir=str(tmp_path), with_images=False, recommend_prompt=own)
    with pytest.raises(InputError, match="--with_images false: the question speaks of an image"):
        write_splits(("test",), options, with_answer=False)


def scored_rows_of(tmp_path):
    """One row about u and b, with the users, items and preferences it is from."""
    for file, right in RIGHT.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        write_unchecked(tmp_path / file, right)
    candidate = Candidate("u", "b", "t", None, 1)
    row = candidate_row(candidate, "p", QuestionFormat(), with_answer=False)
    return [row | {"source": toy_job().source(*row_inputs("p", "t", None, 1))}]


@pytest.mark.parametrize(
    ("file", "rows", "message"),
    [
        ("users.jsonl", [USER | {"split": "train"}], "is no candidate of a test user in"),
        ("users.jsonl", [USER | {"target": "c", "negatives": ["b"]}], "is no candidate of a test"),
        (
            "items.jsonl",
            [{**item, "title": "new"} for item in ITEMS],
            "from another title or image",
        ),
        (PREFERENCES, [{**LIKES[0], "preference": "q"}], "has another preference than in user_pre"),
    ],
)
def test_rows_are_compared_with_what_they_were_made_from(tmp_path, file, rows, message):
    path, options = tmp_path / "mllm_msr/test.jsonl", CommonOptions(data_dir=str(tmp_path))
    made = scored_rows_of(tmp_path)
    check_rows_source(made, path, "test", options)
    write_unchecked(tmp_path / file, rows)
    with pytest.raises(InputError, match=f"test.jsonl, line 1.*{message}"):
        check_rows_source(made, path, "test", options)


def test_rows_without_their_data_set_give_a_warning(tmp_path, caplog):
    made = scored_rows_of(tmp_path)
    del made[0]["source"]
    options = CommonOptions(data_dir=str(tmp_path))
    check_rows_source(made, tmp_path / "mllm_msr/test.jsonl", "test", options)
    assert "1 lines have no `source`" in caplog.text
    (tmp_path / "users.jsonl").unlink()
    check_rows_source(made, tmp_path / "mllm_msr/test.jsonl", "test", options)
    assert "is not compared with its data set" in caplog.text
