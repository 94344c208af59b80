"""All stages together: the files they hand each other, the published commands, real data, and other people's tools."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import REAL, ROOT, STAGES, script, skip_without_real_data, small_config
from PIL import Image, ImageDraw

from data_processing.jsonl import CONTRACT, read_by_id, read_rows, write_rows

PUBLISHED_COMMANDS = (
    "Inference/microlens/image_summary.py",
    "Inference/microlens/preferece_inference_recurrent.py",
    "MLLM-MSR/train/dataset_create.py",
    "MLLM-MSR/test/multi_col_dataset.py",
    "MLLM-MSR/train/train_llava_sft.py",
    "MLLM-MSR/test/test_with_llava_sft.py",
)
ALL_SCRIPTS = (
    *STAGES,
    *PUBLISHED_COMMANDS[:2],
    "Inference/preference_direct.py",
    "data_processing/microlens.py",
    "data_processing/amazon.py",
    "data_processing/download_images.py",
    "data_processing/split.py",
)


def call(*words, **environment):
    return subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_every_file_is_whole(small_run):
    folder = small_run.folder
    users, items = (
        read_by_id(folder / "users.jsonl", "user_id"),
        read_by_id(folder / "items.jsonl", "item_id"),
    )
    assert set(read_by_id(folder / "image_summaries.jsonl", "item_id")) == set(items)
    preferences = read_by_id(folder / "user_preferences.jsonl", "user_id")
    assert set(preferences) == set(users)
    for user_id, row in preferences.items():
        assert [item for block in row["blocks"] for item in block["items"]] == users[user_id][
            "history"
        ]
        assert all(len(block["items"]) == 3 for block in row["blocks"][:-1])
        assert row["preference"] == row["blocks"][-1]["preference"]
    for split, n_candidates in (("train", 2), ("validation", 21), ("test", 21)):
        rows = read_rows(folder / f"{split}.jsonl")
        mine = {user_id: user for user_id, user in users.items() if user["split"] == split}
        assert len(rows) == n_candidates * len(mine) > 0
        for row in rows:
            user = mine[row["user_id"]]
            assert row["label"] == int(row["item_id"] == user["target"])
            assert row["item_id"] in {user["target"], *user["negatives"]}
            assert (folder / row["images"][0]).is_file()
            assert [turn["role"] for turn in row["messages"]] == (
                ["user"] if split == "test" else ["user", "assistant"]
            )
    test_pairs = {(row["user_id"], row["item_id"]) for row in read_rows(folder / "test.jsonl")}
    for variant in ("zero_shot", "sft"):
        scores = read_rows(folder / variant / "scores.jsonl")
        assert {(row["user_id"], row["item_id"]) for row in scores} == test_pairs
        for row in scores:
            assert row["score"] == pytest.approx(
                1 / (1 + np.exp(row["no_logit"] - row["yes_logit"])), abs=1e-9
            )
    metrics = json.loads((folder / "metrics.json").read_text())
    assert {"zero_shot", "sft", "popularity", "ceiling"} <= set(metrics)
    for variant in ("zero_shot", "sft"):
        assert {"auc", "hr@5", "mrr@5", "ndcg@5", "users", "auc_ci95"} <= set(metrics[variant])
        assert metrics[variant]["users"] == 9


def test_every_output_has_its_record(small_run):
    for name in (
        "users",
        "image_summaries",
        "user_preferences",
        "train",
        "validation",
        "test",
        "zero_shot/scores",
        "sft/scores",
        "metrics",
    ):
        record = json.loads((small_run.folder / f"{name}.run.json").read_text())
        assert {
            "arguments",
            "settings",
            "inputs",
            "rows",
            "seconds",
            "git_commit",
            "packages",
            "device",
        } <= set(record), name
    assert json.loads((small_run.folder / "adapter" / "run.json").read_text())["rows"]["in"] == 30


def test_a_preference_does_not_know_the_target(small_run, tmp_path):
    """With another title and summary of an item, the preferences change of those who had it, not of those who will take it."""
    users = read_by_id(small_run.folder / "users.jsonl", "user_id")
    targets = Counter(user["target"] for user in users.values())
    changed = next(
        item
        for item, _ in targets.most_common()
        if any(item in user["history"] for user in users.values())
    )
    (tmp_path / "users.jsonl").write_bytes((small_run.folder / "users.jsonl").read_bytes())
    for name, key in (("items.jsonl", "title"), ("image_summaries.jsonl", "summary")):
        rows = read_rows(small_run.folder / name)
        write_rows(
            tmp_path / name,
            [
                {**row, key: "football purple cross " * 9} if row["item_id"] == changed else row
                for row in rows
            ],
        )
    small_run.run(
        "Inference/preference_recurrent.py",
        "--data_dir",
        str(tmp_path),
        "--output_dir",
        str(tmp_path),
    )
    before, after = (
        read_by_id(folder / "user_preferences.jsonl", "user_id")
        for folder in (small_run.folder, tmp_path)
    )
    differ = {user_id for user_id in users if before[user_id] != after[user_id]}
    assert differ, "who had the item reads otherwise now"
    assert all(changed in users[user_id]["history"] for user_id in differ)
    assert not any(users[user_id]["target"] == changed for user_id in differ)


def test_started_again_nothing_is_computed(small_run, capsys):
    times = {
        path: path.stat().st_mtime_ns for path in small_run.folder.rglob("*") if path.is_file()
    }
    for stage in STAGES:
        small_run.run(stage)
        assert "up to date" in capsys.readouterr().out, stage
    small_run.run(STAGES[6], "--adapter", "none", "--hide", "nothing")
    assert times == {
        path: path.stat().st_mtime_ns for path in small_run.folder.rglob("*") if path.is_file()
    }


IN_ONE_PROCESS = """
import runpy, sys
config, *stages = sys.argv[1:]
for stage in stages:
    sys.argv = [stage, "--config", config]
    runpy.run_path(stage, run_name="__main__")
"""


def test_the_same_seed_gives_the_same_bytes(small_run, tmp_path):
    """In another process, whose hashes of strings are other ones."""
    done = call("-c", IN_ONE_PROCESS, str(small_config(tmp_path)), *STAGES[:5], PYTHONHASHSEED="7")
    assert done.returncode == 0, done.stderr
    for name in (
        "users.jsonl",
        "image_summaries.jsonl",
        "user_preferences.jsonl",
        "train.jsonl",
        "test.jsonl",
    ):
        assert (tmp_path / name).read_bytes() == (small_run.folder / name).read_bytes(), name


def test_the_published_commands_run_verbatim(small_run, tmp_path):
    """From the root, without options; the environment names the small config."""
    config = small_config(tmp_path)
    config.write_text(config.read_text() + "\nreport: {users: 1}\n")
    for name in ("users", "items"):
        (tmp_path / f"{name}.jsonl").write_bytes((small_run.folder / f"{name}.jsonl").read_bytes())
    (tmp_path / "covers").symlink_to(small_run.folder / "covers")
    for command in PUBLISHED_COMMANDS:
        done = call(command, MLLM_MSR_CONFIG=str(config))
        assert done.returncode == 0, done.stderr
    assert len(read_rows(tmp_path / "sft" / "scores.jsonl")) == 9 * 21


@pytest.mark.parametrize("path", ALL_SCRIPTS)
def test_help_answers_at_once(path):
    started = time.monotonic()
    done = call(path, "--help")
    assert done.returncode == 0
    assert "--output_dir" in done.stdout
    assert any(words in done.stdout for words in ("In:", "In,", "In and out", "entry point"))
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("path", "missing"),
    [
        (
            "data_processing/download_images.py",
            "image_urls.jsonl is missing; data_processing/amazon.py makes it",
        ),
        (
            "Inference/image_summary.py",
            "items.jsonl is missing; scripts/01_prepare_data.sh makes it",
        ),
        (
            "Inference/preference_recurrent.py",
            "users.jsonl is missing; scripts/01_prepare_data.sh makes it",
        ),
        (
            "MLLM-MSR/train/dataset_create.py",
            "users.jsonl is missing; scripts/01_prepare_data.sh makes it",
        ),
        (
            "MLLM-MSR/test/multi_col_dataset.py",
            "users.jsonl is missing; scripts/01_prepare_data.sh makes it",
        ),
        (
            "MLLM-MSR/train/train_llava_sft.py",
            "train.jsonl is missing; scripts/04_datasets.sh makes it",
        ),
        (
            "MLLM-MSR/test/test_with_llava_sft.py",
            "test.jsonl is missing; scripts/04_datasets.sh makes it",
        ),
        (
            "MLLM-MSR/baselines/popularity.py",
            "users.jsonl is missing; scripts/01_prepare_data.sh makes it",
        ),
        (
            "MLLM-MSR/test/compute_metrics.py",
            "holds no */scores.jsonl; scripts/06_score.sh makes them",
        ),
        ("MLLM-MSR/test/report.py", "metrics.json is missing; scripts/07_report.sh makes it"),
    ],
)
def test_a_missing_input_is_told_at_once(path, missing, tmp_path):
    started = time.monotonic()
    done = call(
        path,
        "--config",
        "configs/sample.yaml",
        "--data_dir",
        str(tmp_path),
        "--output_dir",
        str(tmp_path),
    )
    assert time.monotonic() - started < 5
    assert done.returncode == 1
    assert missing in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, "one sentence, no traceback"


def test_the_pairs_feed_other_trainers_as_they_are(small_run):
    """`datasets` loads them, and the model's own processor renders and reads them, with nothing of ours."""
    from datasets import load_dataset
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(ROOT / "Inference/tiny_models/llava")
    for split in ("train", "test"):
        rows = load_dataset(
            "json",
            data_files=str(small_run.folder / f"{split}.jsonl"),
            split="train",
            cache_dir=str(small_run.folder / "cache"),
        )
        text = processor.apply_chat_template(rows[0]["messages"])
        image = Image.open(small_run.folder / rows[0]["images"][0])
        batch = processor(text=[text], images=[image], return_tensors="pt")
        assert batch["pixel_values"].shape[0] == 1
        assert text.count("<image>") == 1
        assert text.rstrip().endswith("Yes</s>" if split == "train" else "[/INST]")


FOREIGN = """
import sys
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor
adapter = sys.argv[1]
base = AutoModelForImageTextToText.from_pretrained("Inference/tiny_models/llava")
before = base.model.language_model.layers[0].self_attn.q_proj.weight.clone()
model = PeftModel.from_pretrained(base, adapter)
layer = model.get_base_model().model.language_model.layers[0].self_attn.q_proj
assert layer.lora_B["default"].weight.abs().sum() > 0
AutoProcessor.from_pretrained(adapter)
assert not any(name.split(".")[0] in ("Inference", "data_processing") for name in sys.modules)
print("loaded")
"""


def test_the_adapter_loads_in_plain_peft(small_run):
    done = call("-c", FOREIGN, str(small_run.folder / "adapter"))
    assert "loaded" in done.stdout, done.stderr


def cover_from(title, size=(48, 64)):
    """A picture that depends on a title, for data whose own covers may not be passed on."""
    rng = np.random.default_rng(list(title.encode()))
    image = Image.new("RGB", size, tuple(int(v) for v in rng.integers(0, 256, 3)))
    ImageDraw.Draw(image).ellipse(
        (8, 16, 40, 48), fill=tuple(int(v) for v in rng.integers(0, 256, 3))
    )
    return image


@skip_without_real_data
def test_real_data_goes_through_all_stages(tmp_path, monkeypatch):
    """60 test users of MicroLens-50k (and 40 to train with), covers drawn from the titles, tiny models: every file whole."""
    raw, plan = tmp_path / "raw", tmp_path / "plan"
    (raw / "MicroLens-50k_covers").mkdir(parents=True)
    for name in ("MicroLens-50k_pairs.tsv", "MicroLens-50k_titles.csv"):
        (raw / name).symlink_to(REAL / name)
    pilot = ("--limit", "100", "--train_fraction", "0.3", "--validation_fraction", "0.1")
    loader = (
        "data_processing/microlens.py",
        "--raw_dir",
        str(raw),
        "--require_image",
        "false",
        *pilot,
        "--config",
    )
    done = call(*loader, "configs/microlens.yaml", "--data_dir", str(plan))
    assert done.returncode == 0, done.stderr
    for row in read_rows(plan / "items.jsonl"):  # covers for the pilot's items, not for all 11,896
        cover_from(row["title"]).save(raw / "MicroLens-50k_covers" / f"{row['item_id']}.jpg")
    data, outputs = tmp_path / "data", tmp_path / "outputs"
    config = tmp_path / "small.yaml"
    text = (ROOT / "configs/microlens.yaml").read_text()
    text = text.replace("llava-hf/llava-v1.6-mistral-7b-hf", "Inference/tiny_models/llava")
    text = text.replace("meta-llama/Meta-Llama-3-8B-Instruct", "Inference/tiny_models/llama")
    text = text.replace("epochs: 10", "epochs: 1").replace("workers: 4", "workers: 0")
    text = text.replace("max_new_tokens: 1024", "max_new_tokens: 40").replace(
        "max_new_tokens: 200", "max_new_tokens: 40"
    )
    config.write_text(
        text.replace("data_dir: data/microlens", f"data_dir: {data}").replace(
            "outputs/microlens", str(outputs)
        )
    )
    done = call(*loader, str(config))
    assert done.returncode == 0, done.stderr
    stats = json.loads((data / "stats.json").read_text())
    assert (stats["users"], stats["items"], stats["interactions"]) == (25411, 11896, 220472)
    monkeypatch.chdir(ROOT)
    for stage in STAGES[1:]:
        script(stage).main(["--config", str(config)])
    users = read_by_id(data / "users.jsonl", "user_id")
    assert len(users) == len(read_rows(outputs / "user_preferences.jsonl")) == 100
    tested = {user_id for user_id, user in users.items() if user["split"] == "test"}
    assert len(tested) == 60
    rejected = outputs / "test.rejected.jsonl"
    set_aside = set(read_by_id(rejected, "user_id")) if rejected.exists() else set()
    scores = read_rows(outputs / "sft" / "scores.jsonl")
    assert {row["user_id"] for row in scores} == tested - set_aside
    assert len(scores) == 21 * len(tested - set_aside) > 0
    assert (outputs / "report.html").stat().st_size > 10_000


def test_a_user_whose_candidate_has_no_image_is_set_aside_whole(small_run, tmp_path):
    for name in ("users", "items", "user_preferences"):
        (tmp_path / f"{name}.jsonl").write_bytes((small_run.folder / f"{name}.jsonl").read_bytes())
    (tmp_path / "covers").symlink_to(small_run.folder / "covers")
    users = [user for user in read_rows(tmp_path / "users.jsonl") if user["split"] == "test"]
    gone = users[0]["negatives"][5]
    items = [
        {**row, "image": None} if row["item_id"] == gone else row
        for row in read_rows(tmp_path / "items.jsonl")
    ]
    write_rows(tmp_path / "items.jsonl", items)
    small_run.run(
        "MLLM-MSR/test/multi_col_dataset.py",
        "--data_dir",
        str(tmp_path),
        "--output_dir",
        str(tmp_path),
    )
    hit = {user["user_id"] for user in users if gone in {user["target"], *user["negatives"]}}
    rows = read_rows(tmp_path / "test.jsonl")
    assert {row["user_id"] for row in rows} == {user["user_id"] for user in users} - hit
    assert len(rows) == 21 * (len(users) - len(hit))
    refused = read_by_id(tmp_path / "test.rejected.jsonl", "user_id")
    assert {user: row["reason"] for user, row in refused.items()} == dict.fromkeys(
        hit, f"candidate {gone}: it has no image"
    )


def test_the_contract_names_scripts_that_are_there():
    for _, maker in CONTRACT.values():
        assert (ROOT / maker).is_file()
    assert Path(ROOT / "scripts" / "quickstart.sh").stat().st_mode & 0o100


KILLED = """
import os, runpy, signal, sys
from data_processing.stage_output import StageOutput
whole_write, left = StageOutput.write, int(sys.argv[1])
def write(self, row):
    global left
    whole_write(self, row)
    left -= 1
    if left == 0:
        self.rows.write(b'{"half a li')  # what a death in the middle of a write leaves
        self.rows.flush()
        os.kill(os.getpid(), signal.SIGKILL)
StageOutput.write = write
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    ("stage", "name", "n_rows", "batch"),
    [
        pytest.param(
            "Inference/image_summary.py", "image_summaries.jsonl", 60, "700", marks=pytest.mark.slow
        ),
        ("Inference/preference_recurrent.py", "user_preferences.jsonl", 30, "3000"),
        ("MLLM-MSR/test/test_with_llava_sft.py", "sft/scores.jsonl", 189, "2000"),
    ],
)
def test_killed_and_started_again_gives_the_same_bytes(
    small_run, tmp_path, stage, name, n_rows, batch
):
    """kill -9 twice, in the middle of a row; then the same command: the bytes of an undisturbed run, no row computed twice."""
    for path in small_run.folder.iterdir():
        if path.name != Path(name).name and path.name != Path(name).parts[0]:
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / Path(name).with_suffix(".run.json").name).unlink(missing_ok=True)
    command = [
        stage,
        "--config",
        str(small_run.config),
        "--data_dir",
        str(tmp_path),
        "--output_dir",
        str(tmp_path),
        "--batch_tokens",
        batch,
    ]
    undisturbed = small_run.folder / name
    if "score" in name:  # the last digits of a score depend on what shares its batch
        command += ["--hide", "nothing"]
        script(stage).main([*command[1:], "--variant", "undisturbed"])
        undisturbed = tmp_path / "undisturbed" / "scores.jsonl"
    done_rows = 0
    for kill_after in (n_rows // 5, n_rows // 3):
        done = call("-c", KILLED, str(kill_after), *command)
        assert done.returncode == -9, done.stderr
        done_rows += kill_after
        assert not (tmp_path / name).exists()
    done = call(*command)
    assert done.returncode == 0, done.stderr
    assert f"{n_rows - done_rows} of them now" in done.stdout
    assert (tmp_path / name).read_bytes() == undisturbed.read_bytes()


def test_two_scoring_processes_give_the_bytes_of_one(small_run, tmp_path):
    """Started together, as `accelerate launch --num_processes 2` would; a user whose question cannot fit is set aside whole."""
    name = "sft/scores.jsonl"
    for path in small_run.folder.iterdir():
        if path.name not in ("sft", "test.jsonl"):
            (tmp_path / path.name).symlink_to(path)
    rows = read_rows(small_run.folder / "test.jsonl")
    too_long = rows[30]["user_id"]
    rows[30]["messages"][0]["content"][1]["text"] += " word" * 600
    write_rows(tmp_path / "test.jsonl", rows)
    command = [
        "MLLM-MSR/test/test_with_llava_sft.py",
        "--config",
        str(small_run.config),
        "--data_dir",
        str(tmp_path),
    ]
    command += [
        "--batch_tokens",
        "2000",
        "--hide",
        "nothing",
        "--adapter",
        str(small_run.folder / "adapter"),
    ]
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "test.jsonl").symlink_to(tmp_path / "test.jsonl")
    (tmp_path / "one" / "covers").symlink_to(small_run.folder / "covers")
    assert call(*command, "--output_dir", str(tmp_path / "one")).returncode == 0
    started = [
        subprocess.Popen(
            [sys.executable, *command, "--output_dir", str(tmp_path)],
            cwd=ROOT,
            env={**os.environ, "RANK": rank, "WORLD_SIZE": "2"},
        )
        for rank in "01"
    ]
    assert [process.wait(timeout=300) for process in started] == [0, 0]
    assert (tmp_path / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    rejected = read_rows((tmp_path / name).with_suffix(".rejected.jsonl"))
    assert len(rejected) == 21
    assert {row["user_id"] for row in rejected} == {too_long}
    assert not any(row["user_id"] == too_long for row in read_rows(tmp_path / name))


def test_a_limit_in_scoring_counts_users(small_run):
    small_run.run(
        "MLLM-MSR/test/test_with_llava_sft.py",
        "--limit",
        "2",
        "--hide",
        "nothing",
        "--variant",
        "pilot",
    )
    rows = read_rows(small_run.folder / "pilot" / "scores.jsonl")
    assert len(rows) == 2 * 21
    assert len({row["user_id"] for row in rows}) == 2
    for path in (small_run.folder / "pilot").iterdir():
        path.unlink()
    (small_run.folder / "pilot").rmdir()


def test_a_broken_cover_is_told_in_stage_4(small_run, tmp_path):
    """Not in stages 5 and 6, after hours of GPU time."""
    for name in ("users", "items", "user_preferences"):
        (tmp_path / f"{name}.jsonl").write_bytes((small_run.folder / f"{name}.jsonl").read_bytes())
    (tmp_path / "covers").mkdir()
    for cover in (small_run.folder / "covers").iterdir():
        (tmp_path / "covers" / cover.name).write_bytes(cover.read_bytes())
    user = next(user for user in read_rows(tmp_path / "users.jsonl") if user["split"] == "test")
    broken = tmp_path / "covers" / f"{user['target']}.png"
    broken.write_bytes(broken.read_bytes()[:50])
    small_run.run(
        "MLLM-MSR/test/multi_col_dataset.py",
        "--data_dir",
        str(tmp_path),
        "--output_dir",
        str(tmp_path),
    )
    reasons = {row["user_id"]: row["reason"] for row in read_rows(tmp_path / "test.rejected.jsonl")}
    assert reasons[user["user_id"]].startswith(
        f"candidate {user['target']}: image {user['target']}.png: not a readable image"
    )


def test_a_half_written_checkpoint_is_removed(tmp_path):
    stage = script("MLLM-MSR/train/train_llava_sft.py")
    for step, files in ((9, ("rng_state.pth", "trainer_state.json")), (18, ("rng_state.pth", "trainer_state.json")),
                        (99, ("trainer_state.json",)), (100, ("rng_state.pth",))):  # fmt: skip
        (tmp_path / f"checkpoint-{step}").mkdir()
        for name in files:
            (tmp_path / f"checkpoint-{step}" / name).write_text("{}")
    assert stage.last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-18")
    assert not (tmp_path / "checkpoint-99").exists()
    assert not (tmp_path / "checkpoint-100").exists()
    assert stage.last_whole_checkpoint(tmp_path / "nowhere") is None
