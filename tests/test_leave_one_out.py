"""A leave-one-out split through stages 1, 3, 4 and 7: one line per user and split."""

import pytest
from conftest import report_data_of

from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import read_rows, write_rows

pytestmark = pytest.mark.filterwarnings("ignore")
SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def folder(small_run, tmp_path_factory):
    """Stages 1, 3 and 4 on the small world's items, split leave-one-out."""
    folder = tmp_path_factory.mktemp("leave_one_out")
    where = ["--data_dir", str(folder), "--output_dir", str(folder)]
    split = ["--split_by", "leave_one_out", "--user_core", "4", "--n_users", "6"]
    small_run.run("data_processing/sample.py", *where, *split)
    summaries = ["--summaries", str(small_run.system / "image_summaries.jsonl")]
    small_run.run("Inference/preference_recurrent.py", *where, *summaries)
    for stage in ("MLLM-MSR/train/dataset_create.py", "MLLM-MSR/test/multi_col_dataset.py"):
        small_run.run(stage, *where)
    for stage in ("baselines/popularity.py", "test/compute_metrics.py", "test/report.py"):
        small_run.run(f"MLLM-MSR/{stage}", *where)
    return folder


def test_each_split_has_a_preference_of_its_own_history(folder):
    users = {(u["user_id"], u["split"]): u for u in read_rows(folder / "users.jsonl")}
    rows = read_rows(folder / "mllm_msr" / "user_preferences.jsonl")
    assert len(users) == len(rows) == 6 * len(SPLITS)
    for row in rows:
        user = users[row["user_id"], row["split"]]
        assert [i for block in row["blocks"] for i in block["items"]] == user["history"]
        assert user["target"] not in user["history"]
    for user_id in {user_id for user_id, _ in users}:
        train, validation, test = (users[user_id, split] for split in SPLITS)
        assert validation["history"] == [*train["history"], train["target"]]
        assert test["history"] == [*validation["history"], validation["target"]]


def test_rows_ask_about_the_splits_own_target_and_preference(folder):
    users = {(u["user_id"], u["split"]): u for u in read_rows(folder / "users.jsonl")}
    preferences = {
        (row["user_id"], row["split"]): row["preference"]
        for row in read_rows(folder / "mllm_msr" / "user_preferences.jsonl")
    }
    for split, n_candidates in (("train", 2), ("validation", 21), ("test", 21)):
        rows = read_rows(folder / "mllm_msr" / f"{split}.jsonl")
        assert len(rows) == 6 * n_candidates
        for row in rows:
            key = (row["user_id"], split)
            assert row["label"] == int(row["item_id"] == users[key]["target"])
            start, end = row["preference_span"]
            text = row["messages"][0]["content"][1]["text"]
            assert text[start:end] == preferences[key]


def test_the_report_shows_the_test_lines(folder):
    shown = report_data_of(folder / "report.html")["users"]
    users = {u["user_id"]: u for u in read_rows(folder / "users.jsonl") if u["split"] == "test"}
    blocks = sum(-(-len(user["history"]) // 3) for user in users.values())
    assert sum(len(user["details"]["blocks"]) for user in shown) == blocks


def test_a_repeated_line_is_refused(folder, small_run, tmp_path):
    users = read_rows(folder / "users.jsonl")
    write_rows(tmp_path / "users.jsonl", [*users, users[0]])
    (tmp_path / "items.jsonl").symlink_to(folder / "items.jsonl")
    words = ["--data_dir", str(tmp_path), "--output_dir", str(tmp_path)]
    words += ["--summaries", str(small_run.system / "image_summaries.jsonl")]
    with pytest.raises(
        InputError, match=r"line 19: user 'u0000' is already in line 1 with the split 'train'"
    ):
        small_run.run("Inference/preference_recurrent.py", *words)
