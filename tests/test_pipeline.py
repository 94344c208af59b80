"""All stages together: their files, the published commands, real data, and other tools."""

import json
import re
import shutil
import zipfile
import zlib
from collections import Counter
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from conftest import REAL, ROOT, STAGES, call, skip_without_real_data, small_config
from fork_server import HEAVY, LIGHT, ForkServer
from PIL import Image

from mllmrec.ranking.checkpoints import last_complete_checkpoint, seal_checkpoint
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import read_by_id, read_rows, write_rows
from mllmrec.stage.schema import SCHEMAS
from mllmrec.stage.scripts import load_script

LAUNCHERS = ["Inference/microlens/image_summary.py"]
LAUNCHERS += ["Inference/microlens/preferece_inference_recurrent.py"]
PUBLISHED_COMMANDS = (*LAUNCHERS, *STAGES[3:7])
ALL_SCRIPTS = [*STAGES, *LAUNCHERS, "Inference/preference_direct.py"]
ALL_SCRIPTS += ["MLLM-MSR/train/merge_adapter.py", "data_processing/split.py"]
ALL_SCRIPTS += [f"data_processing/{name}.py" for name in ("microlens", "amazon", "download_images")]


@pytest.fixture(scope="module")
def light_server(tmp_path_factory):
    """Runs scripts that are not to import torch."""
    with closing(ForkServer(tmp_path_factory.mktemp("light"), LIGHT, ROOT)) as server:
        yield server


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Runs any script; strings have other hashes than in this process."""
    folder = tmp_path_factory.mktemp("heavy")
    with closing(ForkServer(folder, HEAVY, ROOT, PYTHONHASHSEED="7")) as server:
        yield server


def folders(path):
    """The options for data and outputs in one folder."""
    return ["--data_dir", str(path), "--output_dir", str(path)]


def files_and_times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def link_all(source, target, *left_out):
    """Symbolic links in `target` to all that is in `source`, but for the names in `left_out`."""
    target.mkdir(exist_ok=True)
    for path in source.iterdir():
        if path.name not in left_out and not path.name.startswith("."):
            (target / path.name).symlink_to(path)


def test_every_file_is_complete(small_run):
    folder, system = small_run.folder, small_run.system
    users = read_by_id(folder / "users.jsonl", "user_id")
    items = read_by_id(folder / "items.jsonl", "item_id")
    assert set(read_by_id(system / "image_summaries.jsonl", "item_id")) == set(items)
    preferences = read_by_id(system / "user_preferences.jsonl", "user_id")
    assert set(preferences) == set(users)
    for user_id, row in preferences.items():
        blocks = [block["items"] for block in row["blocks"]]
        assert [item for block in blocks for item in block] == users[user_id]["history"]
        assert all(len(block) == 3 for block in blocks[:-1])
        assert row["preference"] == row["blocks"][-1]["preference"]
    for split, n_candidates in (("train", 2), ("validation", 21), ("test", 21)):
        rows = read_rows(system / f"{split}.jsonl")
        of_split = {user_id: user for user_id, user in users.items() if user["split"] == split}
        assert len(rows) == n_candidates * len(of_split) > 0
        for row in rows:
            user = of_split[row["user_id"]]
            assert row["label"] == int(row["item_id"] == user["target"])
            assert row["item_id"] in {user["target"], *user["negatives"]}
            assert (system / row["images"][0]).is_file()
            roles = ["user"] if split == "test" else ["user", "assistant"]
            assert [turn["role"] for turn in row["messages"]] == roles
    test_rows = {(row["user_id"], row["item_id"]) for row in read_rows(system / "test.jsonl")}
    metrics = json.loads((folder / "metrics.json").read_text())
    assert {"zero_shot", "sft", "popularity", "ceiling"} <= set(metrics)
    for variant in ("zero_shot", "sft"):
        scores = read_rows(system / variant / "scores.jsonl")
        assert {(row["user_id"], row["item_id"]) for row in scores} == test_rows
        for row in scores:
            yes = 1 / (1 + np.exp(row["logits"]["No"] - row["logits"]["Yes"]))
            assert row["score"] == pytest.approx(yes, abs=1e-9)
        assert {"auc", "hr@5", "mrr@5", "ndcg@5", "users", "auc_ci95"} <= set(metrics[variant])
        assert metrics[variant]["users"] == 9


def test_every_output_has_its_record(small_run):
    wanted = {"arguments", "settings", "inputs", "rows", "seconds", "git_commit"}
    wanted |= {"packages", "device"}
    names = ["users", "baselines/popularity/scores", "metrics", "report"]
    names += [f"mllm_msr/{name}" for name in ("image_summaries", "user_preferences", "train")]
    names += [f"mllm_msr/{name}" for name in ("validation", "test", "zero_shot/scores")]
    for name in [*names, "mllm_msr/sft/scores"]:
        assert wanted <= set(json.loads((small_run.folder / f"{name}.run.json").read_text())), name
    record = json.loads((small_run.system / "adapter" / "run.json").read_text())
    assert record["rows"]["in"] == 30


def test_a_preference_does_not_depend_on_the_target(small_run, tmp_path):
    """Another title and summary of an item change preferences of users with it in their history.

    They do not change those of users whose target it is.
    """
    users = read_by_id(small_run.folder / "users.jsonl", "user_id")
    seen = {item for user in users.values() for item in user["history"]}
    targets = Counter(user["target"] for user in users.values())
    changed = next(item for item, _ in targets.most_common() if item in seen)
    (tmp_path / "users.jsonl").write_bytes((small_run.folder / "users.jsonl").read_bytes())
    for name, key in (("items.jsonl", "title"), ("mllm_msr/image_summaries.jsonl", "summary")):
        rows = read_rows(small_run.folder / name)
        for row in rows:
            row.pop("source", None)  # the covers are not here
            if row["item_id"] == changed:
                row[key] = "football purple cross " * 9
        write_rows(tmp_path / name, rows)
    small_run.run(STAGES[2], *folders(tmp_path))
    name = "mllm_msr/user_preferences.jsonl"
    before, after = (read_by_id(f / name, "user_id") for f in (small_run.folder, tmp_path))
    differ = {user_id for user_id in users if before[user_id] != after[user_id]}
    assert differ, "preferences of users with the item in their history"
    assert all(changed in users[user_id]["history"] for user_id in differ)
    assert not any(users[user_id]["target"] == changed for user_id in differ)


@pytest.mark.parametrize(
    ("stage", "option"),
    [
        (1, "--fusion_prompt"),
        (2, "--first_prompt"),
        (2, "--next_prompt"),
        (2, "--block_line"),
        (3, "--recommend_prompt"),
    ],
)
def test_a_template_is_checked_before_a_model_is_loaded(small_run, monkeypatch, stage, option):
    monkeypatch.setattr("mllmrec.generation.engine.load_engine", None)
    before = {path: path.read_bytes() for path in small_run.system.glob("*.json*")}
    with pytest.raises(InputError, match="unknown place 'foo'"):
        small_run.run(STAGES[stage], option, "{foo}", "--overwrite", "true")
    assert {path: path.read_bytes() for path in before} == before


def test_without_the_raw_log_no_list_is_redrawn(small_run, tmp_path, capsys):
    for name in ("users.jsonl", "items.jsonl"):
        shutil.copy(small_run.folder / name, tmp_path)
    small_run.run("MLLM-MSR/baselines/popularity.py", *folders(tmp_path))
    assert [path.name for path in (tmp_path / "baselines").iterdir()] == ["popularity"]
    assert "no list is redrawn: " in capsys.readouterr().err


def test_rejecting_all_rows_overwrites_nothing(small_run):
    before = {path: path.read_bytes() for path in small_run.system.glob("user_pref*.json*")}
    with pytest.raises(InputError, match=r"none of the 30 rows could be made, the first: .*titles"):
        small_run.run(STAGES[2], "--max_prompt_tokens", "5", "--overwrite", "true")
    assert {path: path.read_bytes() for path in before} == before


def test_started_again_nothing_is_computed(small_run, capsys):
    times = files_and_times(small_run.folder)
    for stage in STAGES:
        small_run.run(stage)
        assert "up to date" in capsys.readouterr().err, stage
    small_run.run(STAGES[6], "--adapter", "none", "--hide", "nothing")
    assert times == files_and_times(small_run.folder)


@pytest.mark.slow
def test_the_published_commands_run_verbatim_and_give_the_same_bytes(small_run, server, tmp_path):
    """From the root, without options; an environment variable names the small config.

    They run in processes where strings have other hashes than here.
    """
    config = small_config(tmp_path)
    for path in (STAGES[0], *PUBLISHED_COMMANDS):
        done = server.run(path, MLLM_MSR_CONFIG=str(config))
        assert done.returncode == 0, done.stderr
    assert len(read_rows(tmp_path / "mllm_msr/sft/scores.jsonl")) == 9 * 21
    names = ("image_summaries", "user_preferences", "train", "test")
    for name in ("users.jsonl", *(f"mllm_msr/{name}.jsonl" for name in names)):
        assert (tmp_path / name).read_bytes() == (small_run.folder / name).read_bytes(), name
    # Not in the fork server but in an interpreter of its own, which finds the finished output.
    done = call(PUBLISHED_COMMANDS[0], MLLM_MSR_CONFIG=str(config))
    assert done.returncode == 0, done.stderr
    assert "image_summaries.jsonl is up to date, nothing to do" in done.stderr


DATA = "scripts/01_prepare_data.sh"
MISSING = [
    ("data_processing/download_images.py", "image_urls.jsonl", "data_processing/amazon.py"),
    *[(path, "items.jsonl" if path == STAGES[1] else "users.jsonl", DATA) for path in STAGES[1:5]],
    (STAGES[5], "train.jsonl", "scripts/04_datasets.sh"),
    (STAGES[6], "test.jsonl", "scripts/04_datasets.sh"),
    (STAGES[7], "users.jsonl", DATA),
    (STAGES[8], None, None),
    (STAGES[9], "metrics.json", "scripts/07_report.sh"),
]


def assert_at_once(done):
    assert not {"torch", "transformers"} & set(done.modules.split())


@pytest.mark.parametrize("path", ALL_SCRIPTS)
def test_help_answers_at_once(light_server, path):
    done = light_server.run(path, "--help")
    assert done.returncode == 0
    assert "--output_dir" in done.stdout
    assert any(words in done.stdout for words in ("In:", "In,", "In and out", "entry point"))
    assert_at_once(done)


@pytest.mark.parametrize(("path", "name", "maker"), MISSING)
def test_a_missing_input_is_reported_at_once(light_server, path, name, maker, tmp_path):
    done = light_server.run(path, "--config", "configs/sample.yaml", *folders(tmp_path))
    assert done.returncode == 1
    missing = f"{name} is missing; {maker} makes it" if name else "has no */*/scores.jsonl; scripts"
    assert missing in done.stderr
    _, error = done.stderr.splitlines()  # a heading, one sentence, no traceback
    assert error.startswith("error: ")
    assert_at_once(done)


def test_other_trainers_can_read_the_rows(small_run):
    """With `datasets` and the model's processor alone."""
    from datasets import load_dataset
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(ROOT / "Inference/tiny_models/llava")
    files = {split: str(small_run.system / f"{split}.jsonl") for split in ("train", "test")}
    for split, name in files.items():
        where = {"split": "train", "cache_dir": str(small_run.folder / "cache")}
        rows = load_dataset("json", data_files=name, **where)
        text = processor.apply_chat_template(rows[0]["messages"])
        image = Image.open(small_run.system / rows[0]["images"][0])
        batch = processor(text=[text], images=[image], return_tensors="pt")
        assert batch["pixel_values"].shape[0] == 1
        assert text.count("<image>") == 1
        assert text.rstrip().endswith("Yes</s>" if split == "train" else "[/INST]")


FOREIGN = """
import sys
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor
base = AutoModelForImageTextToText.from_pretrained("Inference/tiny_models/llava")
model = PeftModel.from_pretrained(base, sys.argv[1])
layer = model.get_base_model().model.language_model.layers[0].self_attn.q_proj
assert layer.lora_B["default"].weight.abs().sum() > 0
AutoProcessor.from_pretrained(sys.argv[1])
assert not any(name.startswith("mllmrec") for name in sys.modules)
print("loaded")
"""


def test_the_adapter_loads_in_plain_peft(small_run, server, tmp_path):
    (tmp_path / "foreign.py").write_text(FOREIGN)
    done = server.run(str(tmp_path / "foreign.py"), str(small_run.system / "adapter"))
    assert "loaded" in done.stdout, done.stderr
    assert done.returncode == 0


@pytest.mark.slow
@skip_without_real_data
def test_real_data_passes_all_stages(tmp_path, monkeypatch):
    """12 test users of MicroLens-50k and 8 others, covers of one colour, tiny models."""
    monkeypatch.chdir(ROOT)
    raw, plan = tmp_path / "raw", tmp_path / "plan"
    (raw / "MicroLens-50k_covers").mkdir(parents=True)
    for name in ("MicroLens-50k_pairs.tsv", "MicroLens-50k_titles.csv"):
        (raw / name).symlink_to(REAL / name)
    pilot = ["--limit", "20", "--train_fraction", "0.3", "--validation_fraction", "0.1"]
    pilot += ["--raw_dir", str(raw), "--require_image", "false"]
    load = load_script("data_processing/microlens.py").main
    load([*pilot, "--config", "configs/microlens.yaml", "--data_dir", str(plan)])
    for row in read_rows(plan / "items.jsonl"):  # covers for the pilot's items, not for all 11,896
        cover = Image.new("RGB", (48, 64), tuple(zlib.crc32(row["title"].encode()).to_bytes(4)[:3]))
        cover.save(raw / "MicroLens-50k_covers" / f"{row['item_id']}.jpg")
    data, outputs = tmp_path / "data", tmp_path / "outputs"
    config = tmp_path / "small.yaml"
    config.write_text(f"""
base: {ROOT}/configs/microlens.yaml
common: {{data_dir: {data}, output_dir: {outputs}, image_roots: [{raw}]}}
image_summary: {{model: Inference/tiny_models/llava, max_new_tokens: 20}}
preference: {{model: Inference/tiny_models/llama, max_new_tokens: 40}}
train: {{model: Inference/tiny_models/llava, epochs: 1, workers: 0}}
score: {{model: Inference/tiny_models/llava}}
""")
    load([*pilot, "--config", str(config)])
    statistics = json.loads((data / "stats.json").read_text())
    assert [statistics[k] for k in ("users", "items", "interactions")] == [25411, 11896, 220472]
    for stage in STAGES[1:]:
        load_script(stage).main(["--config", str(config)])
    users, system = read_by_id(data / "users.jsonl", "user_id"), outputs / "mllm_msr"
    assert len(users) == len(read_rows(system / "user_preferences.jsonl")) == 20
    tested = {user_id for user_id, user in users.items() if user["split"] == "test"}
    assert len(tested) == 12
    rejected_file = system / "test.rejected.jsonl"
    rejected = set(read_by_id(rejected_file, "user_id")) if rejected_file.exists() else set()
    scores = read_rows(system / "sft" / "scores.jsonl")
    assert {row["user_id"] for row in scores} == tested - rejected
    assert len(scores) == 21 * len(tested - rejected) > 0
    assert (outputs / "report.html").stat().st_size > 10_000


def test_users_with_a_candidate_without_readable_image_are_rejected_whole(small_run, tmp_path):
    """In stage 4, not in stages 5 and 6, after hours of GPU time."""
    (tmp_path / "mllm_msr").mkdir()
    for name in ("users.jsonl", "items.jsonl", "mllm_msr/user_preferences.jsonl"):
        (tmp_path / name).write_bytes((small_run.folder / name).read_bytes())
    shutil.copytree(small_run.folder / "covers", tmp_path / "covers")
    users = [user for user in read_rows(tmp_path / "users.jsonl") if user["split"] == "test"]
    without, broken = users[0]["negatives"][5], users[1]["target"]
    items = read_rows(tmp_path / "items.jsonl")
    next(item for item in items if item["item_id"] == without)["image"] = None
    write_rows(tmp_path / "items.jsonl", items)
    cover = tmp_path / "covers" / f"{broken}.png"
    cover.write_bytes(cover.read_bytes()[:50])
    small_run.run(STAGES[4], *folders(tmp_path))
    hit = {u["user_id"] for u in users if {without, broken} & {u["target"], *u["negatives"]}}
    rows = read_rows(tmp_path / "mllm_msr/test.jsonl")
    assert {row["user_id"] for row in rows} == {user["user_id"] for user in users} - hit
    assert len(rows) == 21 * (len(users) - len(hit))
    rejected = read_by_id(tmp_path / "mllm_msr/test.rejected.jsonl", "user_id")
    assert rejected.keys() == hit
    unreadable = f"candidate {broken}: image {broken}.png: not a readable image"
    assert rejected[users[1]["user_id"]]["reason"].startswith(unreadable)
    reasons = (f"candidate {without}: it has no image", unreadable)
    assert all(row["reason"].startswith(reasons) for row in rejected.values())
    assert any(row["reason"] == reasons[0] for row in rejected.values())


def test_the_schemas_name_scripts_that_exist():
    assert all((ROOT / schema.maker).is_file() for schema in SCHEMAS.values())
    assert (ROOT / "scripts" / "quickstart.sh").stat().st_mode & 0o100


KILLED = [
    (STAGES[1], "image_summaries.jsonl", 24, "--limit 24 --batch_tokens 700"),
    (STAGES[2], "user_preferences.jsonl", 12, "--limit 4 --batch_tokens 2000 --temperature 0.9"),
    (STAGES[6], "sft/scores.jsonl", 84, "--limit 4 --batch_tokens 2000 --hide nothing"),
]


@pytest.mark.parametrize(("stage", "name", "n_rows", "options"), KILLED)
def test_killed_and_resumed_gives_the_same_bytes(
    small_run, server, tmp_path, stage, name, n_rows, options
):
    """kill -9 twice, in the middle of a row; then the same command.

    The bytes are those of an undisturbed run, and no row is computed twice.
    """

    def command(folder):
        link_all(small_run.folder, folder, "mllm_msr")
        link_all(small_run.system, folder / "mllm_msr", Path(name).name, Path(name).parts[0])
        (folder / "mllm_msr" / Path(name).with_suffix(".run.json")).unlink(missing_ok=True)
        return [stage, "--config", str(small_run.config), *folders(folder), *options.split()]

    assert server.run(*command(tmp_path / "undisturbed")).returncode == 0
    words, output = command(tmp_path / "killed"), tmp_path / "killed" / "mllm_msr" / name
    done_rows = 0
    for kill_after in (n_rows // 5, n_rows // 3):
        done = server.run(*words, kill_after=kill_after)
        assert done.returncode == -9, done.stderr
        done_rows += kill_after
        assert not output.exists()
    done = server.run(*words)
    assert done.returncode == 0, done.stderr
    assert f"{n_rows - done_rows} of them now" in done.stderr
    assert output.read_bytes() == (tmp_path / "undisturbed" / "mllm_msr" / name).read_bytes()


def test_two_scoring_processes_give_the_bytes_of_one(small_run, server, tmp_path):
    """Started together, as `accelerate launch --num_processes 2` would.

    A user with a question that is too long is rejected whole.
    """
    rows = read_rows(small_run.system / "test.jsonl")
    too_long = rows[30]["user_id"]
    rows[30]["messages"][0]["content"][1]["text"] += " word" * 600
    command = [STAGES[6], "--config", str(small_run.config)]
    command += ["--batch_tokens", "2000", "--hide", "nothing"]
    command += ["--adapter", str(small_run.system / "adapter")]
    for name in ("one", "two"):
        link_all(small_run.folder, tmp_path / name, "mllm_msr")
        write_rows(tmp_path / name / "mllm_msr/test.jsonl", rows)
    assert server.run(*command, *folders(tmp_path / "one")).returncode == 0
    job = {"words": [*command, *folders(tmp_path / "two")], "kill_after": 0}
    environments = [{"RANK": rank, "WORLD_SIZE": "2"} for rank in "01"]
    ended = server.run_together(*({**job, "environment": e} for e in environments))
    assert [done.returncode for done in ended] == [0, 0], ended[0].stderr + ended[1].stderr
    one, two = (tmp_path / name / "mllm_msr/sft/scores.jsonl" for name in ("one", "two"))
    assert two.read_bytes() == one.read_bytes()
    said = [re.search(r"(\d+) (?:rows;|of them now)", done.stderr) for done in ended]
    n_written = [int(found[1]) for found in said]
    assert all(n_written) and sum(n_written) == len(read_rows(two)), "each scores its share"
    rejected = read_rows(two.with_suffix(".rejected.jsonl"))
    assert [row["user_id"] for row in rejected] == [too_long] * 21
    assert not any(row["user_id"] == too_long for row in read_rows(two))


CHECKPOINT = ("rng_state.pth", "optimizer.pt", "adapter_model.safetensors", "trainer_state.json")


def write_checkpoint(folder, step, best=None, sealed=True):
    """checkpoint-`step` with files of one kind; best: the step of the best checkpoint."""
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir()
    for name in CHECKPOINT[:-1]:
        with zipfile.ZipFile(checkpoint / name, "w") as file:
            file.writestr("data", bytes(range(100)))
    best = best and str(folder / f"checkpoint-{best}")
    (checkpoint / CHECKPOINT[-1]).write_text(json.dumps({"best_model_checkpoint": best}))
    if sealed:
        seal_checkpoint(checkpoint)
    return checkpoint


def test_an_incomplete_or_damaged_checkpoint_is_removed(tmp_path, capsys):
    write_checkpoint(tmp_path, 9)
    good = write_checkpoint(tmp_path, 18)
    for step, name in enumerate(CHECKPOINT, start=20):
        damaged = write_checkpoint(tmp_path, step) / name
        content = bytearray(damaged.read_bytes())
        content[len(content) // 2] ^= 1
        damaged.write_bytes(content)
        (write_checkpoint(tmp_path, step + 10) / name).unlink()
    write_checkpoint(tmp_path, 99, sealed=False)
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / "checkpoint-100").write_text("")
    assert last_complete_checkpoint(tmp_path, may_delete=False) == str(good)
    assert len(list(tmp_path.iterdir())) == 13
    assert last_complete_checkpoint(tmp_path) == str(good)
    left = ["checkpoint-18", "checkpoint-9", "checkpoint-x"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left
    told = capsys.readouterr().err
    for name in CHECKPOINT:
        assert f"({name} is damaged or missing) and is removed" in told
    assert "checkpoint-99 cannot be resumed from (it is incomplete)" in told


def test_a_checkpoint_without_the_best_one_is_not_resumed_from(tmp_path):
    """The Trainer would keep the last adapter and only warn."""
    best, last = (write_checkpoint(tmp_path, step, best=3) for step in (3, 6))
    assert last_complete_checkpoint(tmp_path) == str(last)
    shutil.rmtree(best)
    assert last_complete_checkpoint(tmp_path) is None
