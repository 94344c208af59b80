"""Stage 5 as its users run it: going on after a death, several processes, early stopping, logs, bad input, merging."""

import shutil

import numpy as np
import pytest
import torch
from conftest import TINY, saved, script
from peft import PeftModel
from peft.utils import load_peft_weights
from test_pipeline import call
from transformers import AutoModelForImageTextToText, AutoTokenizer

from data_processing.errors import InputError
from data_processing.jsonl import read_rows, write_rows
from data_processing.run_record import read_record
from Inference.random_models import random_llava, random_qwen_vl

pytestmark = pytest.mark.filterwarnings("ignore")

STAGE = "MLLM-MSR/train/train_llava_sft.py"
# Dies at the start of pass number argv[1], as kill -9 would have it.
KILLED = """
import os, runpy, signal, sys
from transformers import Trainer
whole, left = Trainer.training_step, int(sys.argv[1])
def training_step(self, *args, **options):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(self, *args, **options)
Trainer.training_step = training_step
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def prepared(small_run, folder):
    """A folder with the pairs of the small run, and the command that trains there."""
    folder.mkdir(exist_ok=True)
    for name in ("train.jsonl", "validation.jsonl", "covers"):
        (folder / name).symlink_to(small_run.folder / name)
    return [
        STAGE,
        "--config",
        str(small_run.config),
        "--data_dir",
        str(folder),
        "--output_dir",
        str(folder),
    ]


def losses(folder):
    return [row["loss"] for row in read_rows(folder / "training_log.jsonl") if "loss" in row]


def weights(folder):
    return load_peft_weights(str(folder / "adapter"))


def assert_same_training(one, other, loss, weight):
    assert len(losses(one)) == len(losses(other)) > 1
    assert losses(one) == pytest.approx(losses(other), abs=loss)
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys() != set()
    for name in first:
        assert torch.allclose(first[name], second[name], atol=weight, rtol=0), name


@pytest.mark.parametrize(
    ("group_by", "batch_size", "deaths"),
    [("none", 2, (9, 16)), pytest.param("item", 4, (5, 8), marks=pytest.mark.slow)],
)
def test_a_killed_training_goes_on_as_if_nothing_had_happened(
    small_run, tmp_path, group_by, batch_size, deaths
):
    """Killed in the middle of the first and of the second epoch, with dropout; losses to 1e-6 and weights to 1e-5."""
    more = [
        "--epochs",
        "2",
        "--batch_size",
        str(batch_size),
        "--accumulation",
        str(4 // batch_size),
        "--checkpoint_steps",
        "3",
    ]
    more += ["--logging_steps", "2", "--lora_dropout", "0.1", "--group_by", group_by]
    script(STAGE).main([*prepared(small_run, tmp_path / "undisturbed")[1:], *more])
    command = prepared(small_run, tmp_path / "killed")
    for passes in deaths:
        assert call("-c", KILLED, str(passes), *command, *more).returncode == -9
        assert not (tmp_path / "killed" / "adapter").exists()
    done = call(*command, *more)
    assert done.returncode == 0, done.stderr
    assert_same_training(tmp_path / "undisturbed", tmp_path / "killed", 1e-6, 1e-5)
    logs = [read_rows(tmp_path / name / "training_log.jsonl") for name in ("undisturbed", "killed")]
    assert [row["step"] for row in logs[0]] == [row["step"] for row in logs[1]]
    assert [row.get("eval_auc") for row in logs[0]] == [row.get("eval_auc") for row in logs[1]]
    records = [read_record(tmp_path / name / "adapter") for name in ("undisturbed", "killed")]
    assert records[0]["loss"] == pytest.approx(records[1]["loss"], abs=1e-6)


def test_two_processes_train_like_one_with_twice_the_accumulation(small_run, tmp_path):
    """Also when they are killed in the middle of the second epoch and started again."""
    more = ["--batch_size", "2", "--lora_dropout", "0", "--epochs", "2", "--logging_steps", "1"]
    one, two = prepared(small_run, tmp_path / "one"), prepared(small_run, tmp_path / "two")
    script(STAGE).main([*one[1:], *more, "--accumulation", "4"])
    launch = [
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        "configs/accelerate/multi_gpu.yaml",
        "--num_processes",
        "2",
    ]
    (tmp_path / "killed.py").write_text(KILLED)
    two_more = [*two, *more, "--accumulation", "2", "--checkpoint_steps", "1"]
    epoch = read_record(tmp_path / "one" / "adapter")["steps"] // 2
    assert (
        call(
            *launch, str(tmp_path / "killed.py"), str(2 * epoch + 5), *two_more, OMP_NUM_THREADS="1"
        ).returncode
        != 0
    )
    assert (tmp_path / "two" / "checkpoints" / f"checkpoint-{epoch + 2}").exists()
    done = call(*launch, *two_more, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert_same_training(tmp_path / "one", tmp_path / "two", 1e-4, 1e-3)
    records = [read_record(tmp_path / name / "adapter") for name in ("one", "two")]
    assert records[0]["steps"] == records[1]["steps"], "as many steps, each over as many pairs"
    assert [record["processes"] for record in records] == [1, 2]
    logs = [read_rows(tmp_path / name / "training_log.jsonl") for name in ("one", "two")]
    seen = [max(row.get("num_input_tokens_seen", 0) for row in log) for log in logs]
    assert seen[0] == seen[1] > 0, "the same pairs were seen"
    aucs = [[row["eval_auc"] for row in log if "eval_auc" in row] for log in logs]
    assert aucs[0] == pytest.approx(aucs[1], abs=0.02)
    assert len(aucs[0]) == 2


def test_a_training_that_does_not_get_better_stops_early(small_run, tmp_path, capsys):
    command = prepared(small_run, tmp_path / "run")
    more = ["--epochs", "6", "--learning_rate", "0", "--patience", "2", "--tensorboard", "true"]
    script(STAGE).main([*command[1:], *more])
    log = read_rows(tmp_path / "run" / "training_log.jsonl")
    assert len([row for row in log if "eval_auc" in row]) == 3, (
        "the first one, and two that were no better"
    )
    assert all({"eval_auc", "eval_hr@5"} <= row.keys() for row in log if "eval_auc" in row)
    assert (tmp_path / "run" / "training_curve.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "run" / "tensorboard").rglob("events.out.tfevents.*"))
    before = weights(tmp_path / "run")
    shutil.rmtree(
        tmp_path / "run" / "adapter"
    )  # a death after the last checkpoint: nothing is trained again
    script(STAGE).main([*command[1:], *more])
    again = read_rows(tmp_path / "run" / "training_log.jsonl")
    assert [row for row in again if "train_runtime" not in row] == [
        row for row in log if "train_runtime" not in row
    ]
    assert all(
        torch.equal(before[name], tensor) for name, tensor in weights(tmp_path / "run").items()
    )


def test_the_best_adapter_is_kept_not_the_last(small_run, tmp_path, monkeypatch):
    aucs = iter([0.6, 0.9, 0.7, 0.8])
    monkeypatch.setattr("Inference.trainer.pooled_auc", lambda *_: next(aucs))
    command = prepared(small_run, tmp_path / "run")
    script(STAGE).main([*command[1:], "--epochs", "4"])
    record = read_record(tmp_path / "run" / "adapter")
    assert record["best_validation_auc"] == 0.9
    best, last = (
        load_peft_weights(
            str(tmp_path / "run" / "checkpoints" / f"checkpoint-{record['steps'] * n // 4}")
        )
        for n in (2, 4)
    )
    kept = weights(tmp_path / "run")
    assert all(torch.equal(kept[name], best[name]) for name in kept)
    assert not all(torch.equal(kept[name], last[name]) for name in kept)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (random_qwen_vl, ("--loss", "sequence", "--batch_size", "2", "--accumulation", "2")),
        (
            lambda: random_llava("tiny", kind="1.5"),
            ("--gradient_checkpointing", "true", "--dtype", "bfloat16", "--workers", "2"),
        ),
        (None, ("--quantization", "nf4", "--gradient_checkpointing", "true")),
        (None, ("--image_tiles", "single", "--group_by", "length")),
    ],
    ids=["qwen2.5-vl, sequence", "llava-1.5, bfloat16", "QLoRA", "one tile"],
)
def test_every_kind_of_training_ends_with_an_adapter_that_plain_peft_loads(
    small_run, tmp_path, make, options
):
    command, base = (
        prepared(small_run, tmp_path / "run"),
        saved(make(), tmp_path / "model") if make else str(TINY / "llava"),
    )
    script(STAGE).main(
        [
            *command[1:],
            "--model",
            base,
            "--limit",
            "8",
            "--validation_users",
            "2",
            "--warmup_ratio",
            "0",
            *options,
        ]
    )
    adapter = tmp_path / "run" / "adapter"
    assert PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), adapter)
    assert any(
        tensor.abs().max() > 0
        for name, tensor in weights(tmp_path / "run").items()
        if "lora_B" in name
    ), "it was trained"
    assert AutoTokenizer.from_pretrained(adapter).chat_template
    log = read_rows(tmp_path / "run" / "training_log.jsonl")
    assert all(np.isfinite(row["loss"]) for row in log if "loss" in row)
    assert len([row for row in log if "eval_auc" in row]) == 1


def test_what_is_cut_is_the_preference_and_who_cannot_fit_is_set_aside_and_both_are_counted(
    small_run, tmp_path, capsys
):
    command = prepared(small_run, tmp_path / "run")
    rows = read_rows(tmp_path / "run" / "train.jsonl")
    (tmp_path / "run" / "train.jsonl").unlink()
    for row in rows[:3]:
        turn, (_, end) = row["messages"][0], row["preference_span"]
        text = turn["content"][1]["text"]
        turn["content"][1]["text"] = text[:end] + " word" * 500 + text[end:]
        row["preference_span"][1] = end + 2500
    rows[6]["messages"][0]["content"][1]["text"] += " word" * 600  # no preference to cut there
    write_rows(tmp_path / "run" / "train.jsonl", rows)
    script(STAGE).main([*command[1:], "--limit", "8"])
    printed = capsys.readouterr().out
    assert "of 3 pairs the preference was shortened to fit; 1 users were set aside" in printed
    counts = read_record(tmp_path / "run" / "adapter")["rows"]
    assert (counts["in"], counts["shortened"], counts["rejected_users"]) == (6, 3, 1)
    (aside,) = read_rows(tmp_path / "run" / "training.rejected.jsonl")
    assert aside["user_id"] == rows[6]["user_id"]
    assert "longer than 512 tokens even without a preference" in aside["reason"]


def spoilt(rows, how):
    row = rows[4]
    if how == "picture":
        row["images"] = ["covers/gone.png"]
    elif how == "answer":
        row["messages"][1]["content"][0]["text"] = "Maybe"
    elif how == "other answer":
        row["messages"][1]["content"][0]["text"] = {1: "No", 0: "Yes"}[row["label"]]
    elif how == "label":
        row["label"] = 2
    return rows


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            "picture",
            r"train.jsonl, line 5: image covers/gone.png: the file is missing; restore it, or make the file again",
        ),
        (
            "answer",
            r"train.jsonl, line 5: the answer is 'Maybe', for the label . it must be '(Yes|No)'; make the file again",
        ),
        (
            "other answer",
            r"train.jsonl, line 5: the answer is '(Yes|No)', for the label . it must be",
        ),
        ("label", r"train.jsonl, line 5: the label is 2, it must be 0 or 1; make the file again"),
    ],
)
def test_bad_pairs_are_told_before_the_model_is_loaded(
    small_run, tmp_path, monkeypatch, how, message
):
    command = prepared(small_run, tmp_path / "run")
    rows = read_rows(tmp_path / "run" / "train.jsonl")
    (tmp_path / "run" / "train.jsonl").unlink()
    write_rows(tmp_path / "run" / "train.jsonl", spoilt(rows, how))
    monkeypatch.setattr("Inference.models._load", None)
    with pytest.raises(InputError, match=message):
        script(STAGE).main(command[1:])


def test_validation_lists_that_cannot_be_ranked_are_told_before_the_model_is_loaded(
    small_run, tmp_path, monkeypatch
):
    command = prepared(small_run, tmp_path / "run")
    rows = read_rows(tmp_path / "run" / "validation.jsonl")
    (tmp_path / "run" / "validation.jsonl").unlink()
    write_rows(tmp_path / "run" / "validation.jsonl", rows[:-1])
    monkeypatch.setattr("Inference.models._load", None)
    with pytest.raises(
        InputError,
        match=r"validation.jsonl: user .* has 1 positives and 19 negatives in place of 1 and 20",
    ):
        script(STAGE).main(command[1:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--max_text_tokens", "9"),
            r"train.jsonl: no question fits, the first one: item .* longer than 9 tokens even without",
        ),
        (("--dtype", "float16"), "a CPU does not train in float16; pass --dtype float32"),
        (("--group_by", "item", "--loss", "sequence"), "--group_by item needs --loss answer"),
    ],
)
def test_options_that_cannot_be_had_are_told_in_a_sentence(small_run, tmp_path, options, message):
    command = prepared(small_run, tmp_path / "run")
    with pytest.raises(InputError, match=message):
        script(STAGE).main([*command[1:], *options])


@pytest.mark.parametrize(("group_by", "attention"), [("item", "sdpa"), ("none", "auto")])
def test_sharing_asks_for_the_attention_that_can_do_it(
    small_run, tmp_path, monkeypatch, group_by, attention
):
    """Left to itself, a model would be loaded with FlashAttention where that is installed."""
    stage, asked = script(STAGE), []

    def load(args):
        asked.append(args.attention)
        raise InputError("seen")

    monkeypatch.setattr(stage, "load_recommender", load)
    with pytest.raises(InputError, match="seen"):
        stage.main([*prepared(small_run, tmp_path / "run")[1:], "--group_by", group_by])
    assert asked == [attention]


def test_a_checkpoint_of_other_settings_is_not_gone_on_from(small_run, tmp_path, monkeypatch):
    command = prepared(small_run, tmp_path / "run")
    assert (
        call("-c", KILLED, "6", *command, "--batch_size", "2", "--checkpoint_steps", "3").returncode
        == -9
    )
    assert list((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))
    with pytest.raises(InputError, match=r"begun with other settings \(batch_size was 2, is 8\)"):
        script(STAGE).main(command[1:])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"begun with other settings \(processes was 1, is 2\)"):
        script(STAGE).main([*command[1:], "--batch_size", "2"])


def test_a_merged_model_scores_like_base_and_adapter(small_run, tmp_path):
    merged = tmp_path / "merged"
    small_run.run("MLLM-MSR/train/merge_adapter.py", "--merged", str(merged))
    where = [
        "--model",
        str(merged),
        "--adapter",
        "none",
        "--variant",
        "merged",
        "--hide",
        "nothing",
    ]
    small_run.run("MLLM-MSR/test/test_with_llava_sft.py", *where)
    wanted = {
        (row["user_id"], row["item_id"]): row["score"]
        for row in read_rows(small_run.folder / "sft" / "scores.jsonl")
    }
    found = {
        (row["user_id"], row["item_id"]): row["score"]
        for row in read_rows(small_run.folder / "merged" / "scores.jsonl")
    }
    assert found == pytest.approx(wanted, abs=1e-4)
    base = {
        (row["user_id"], row["item_id"]): row["score"]
        for row in read_rows(small_run.folder / "zero_shot" / "scores.jsonl")
    }
    assert max(abs(base[pair] - wanted[pair]) for pair in wanted) > 0.01, (
        "the adapter does something"
    )
    (small_run.folder / "merged" / "scores.jsonl").unlink()
    (small_run.folder / "merged" / "scores.run.json").unlink()
    (small_run.folder / "merged").rmdir()
    assert not list(merged.glob("adapter*"))
