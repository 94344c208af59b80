"""Stage 5 as a command: resume, several processes, early stopping, logs, bad input, merging."""

import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, call, free_port, saved, write_unchecked
from fork_server import HEAVY, ForkServer
from peft import PeftModel
from peft.utils import load_peft_weights
from random_models import random_llava, random_qwen_vl
from transformers import AutoModelForImageTextToText, AutoTokenizer, Trainer

from mllmrec.ranking.trainer import RankingTrainer
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import read_rows, write_rows
from mllmrec.stage.record import read_record
from mllmrec.stage.scripts import load_script

pytestmark = pytest.mark.filterwarnings("ignore")

STAGE = "MLLM-MSR/train/train_llava_sft.py"
TRAINING_MODULES = ("mllmrec.ranking.trainer",)
# Kills itself at the start of micro-batch number argv[1], with SIGKILL.
KILLED = """
import os, runpy, signal, sys
from mllmrec.ranking.trainer import RankingTrainer
whole, left = RankingTrainer.training_step, int(sys.argv[1])
def training_step(self, *args, **options):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(self, *args, **options)
RankingTrainer.training_step = training_step
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Runs the stage in processes of their own that do not import torch again."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "killed.py").write_text(KILLED)
    server = ForkServer(folder, (*HEAVY, *TRAINING_MODULES), ROOT)
    yield server
    server.close()


def prepared(small_run, folder):
    """The command that trains in `folder`, on the rows of the small run."""
    system = folder / "mllm_msr"
    system.mkdir(parents=True)
    (folder / "covers").symlink_to(small_run.folder / "covers")
    for name in ("train.jsonl", "validation.jsonl"):
        (system / name).symlink_to(small_run.system / name)
    folders = ["--data_dir", str(folder), "--output_dir", str(folder)]
    return [STAGE, "--config", str(small_run.config), *folders]


def losses(folder):
    return [
        row["loss"]
        for row in read_rows(folder / "mllm_msr" / "training_log.jsonl")
        if "loss" in row
    ]


def weights(folder):
    return load_peft_weights(str(folder / "mllm_msr" / "adapter"))


def assert_same_training(one, other, loss, weight):
    assert len(losses(one)) == len(losses(other)) > 1
    assert losses(one) == pytest.approx(losses(other), abs=loss)
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys() != set()
    for name in first:
        assert torch.allclose(first[name], second[name], atol=weight, rtol=0), name


@pytest.mark.parametrize(
    ("group_by", "batch_size", "kills"),
    [("none", 2, (9, 16)), pytest.param("item", 4, (5, 8), marks=pytest.mark.slow)],
)
def test_a_killed_training_resumes_to_the_same_losses_and_weights(
    small_run, server, tmp_path, group_by, batch_size, kills
):
    """Killed in mid-epoch twice, with dropout: losses to 1e-6, weights to 1e-5."""
    more = ["--epochs", "2", "--checkpoint_steps", "3", "--logging_steps", "2"]
    more += ["--batch_size", str(batch_size), "--accumulation", str(4 // batch_size)]
    more += ["--lora_dropout", "0.1", "--group_by", group_by]
    load_script(STAGE).main([*prepared(small_run, tmp_path / "undisturbed")[1:], *more])
    command = prepared(small_run, tmp_path / "killed")
    for micro_batches in kills:
        killed = server.run(str(server.folder / "killed.py"), str(micro_batches), *command, *more)
        assert killed.returncode == -9
        assert not (tmp_path / "killed" / "mllm_msr" / "adapter").exists()
    done = server.run(*command, *more)
    assert done.returncode == 0, done.stderr
    assert_same_training(tmp_path / "undisturbed", tmp_path / "killed", 1e-6, 1e-5)
    logs = [
        read_rows(tmp_path / name / "mllm_msr" / "training_log.jsonl")
        for name in ("undisturbed", "killed")
    ]
    assert [row["step"] for row in logs[0]] == [row["step"] for row in logs[1]]
    assert [row.get("eval_auc") for row in logs[0]] == [row.get("eval_auc") for row in logs[1]]
    records = [
        read_record(tmp_path / name / "mllm_msr" / "adapter") for name in ("undisturbed", "killed")
    ]
    assert records[0]["loss"] == pytest.approx(records[1]["loss"], abs=1e-6)


def distributed(rank, world_size, port):
    """The environment that a launcher gives to one of several processes."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in names.items()}


@pytest.mark.slow
def test_two_processes_train_like_one_with_twice_the_accumulation(small_run, server, tmp_path):
    """Also when they are killed in the middle of the second epoch and resumed.

    They are resumed by `accelerate launch` with a config of configs/accelerate/.
    """
    more = ["--batch_size", "2", "--lora_dropout", "0", "--epochs", "2", "--logging_steps", "1"]
    more += ["--group_by", "item"]  # so that the processes' micro-batches have different parts
    one, two = prepared(small_run, tmp_path / "one"), prepared(small_run, tmp_path / "two")
    load_script(STAGE).main([*one[1:], *more, "--accumulation", "4"])
    two_more = [*two, *more, "--accumulation", "2", "--checkpoint_steps", "1"]
    epoch = read_record(tmp_path / "one" / "mllm_msr" / "adapter")["steps"] // 2
    port = free_port()
    words = [str(server.folder / "killed.py"), str(2 * epoch + 5), *two_more]
    killed = server.run_together(
        *[
            {"words": words, "kill_after": 0, "environment": distributed(rank, 2, port)}
            for rank in range(2)
        ]
    )
    assert -9 in [process.returncode for process in killed]
    assert all(process.returncode != 0 for process in killed)
    assert (tmp_path / "two" / "mllm_msr" / "checkpoints" / f"checkpoint-{epoch + 2}").exists()
    launch = ["-m", "accelerate.commands.launch", "--num_processes", "2"]
    launch += ["--config_file", "configs/accelerate/multi_gpu.yaml"]
    done = call(*launch, *two_more, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert_same_training(tmp_path / "one", tmp_path / "two", 1e-4, 1e-3)
    records = [read_record(tmp_path / name / "mllm_msr" / "adapter") for name in ("one", "two")]
    assert records[0]["steps"] == records[1]["steps"], "as many steps, each over as many rows"
    assert [record["processes"] for record in records] == [1, 2]
    logs = [
        read_rows(tmp_path / name / "mllm_msr" / "training_log.jsonl") for name in ("one", "two")
    ]
    seen = [max(row.get("num_input_tokens_seen", 0) for row in log) for log in logs]
    assert seen[0] == seen[1] > 0, "the same rows were trained on"
    aucs = [[row["eval_auc"] for row in log if "eval_auc" in row] for log in logs]
    assert aucs[0] == pytest.approx(aucs[1], abs=0.02)
    assert len(aucs[0]) == 2


def test_the_items_of_a_micro_batch_train_one_after_the_other_as_in_one_pass(
    small_run, tmp_path, monkeypatch
):
    """`group_by: item`: the same losses and weights, but never two images in a pass."""
    more = ["--group_by", "item", "--epochs", "1", "--limit", "24", "--validation_users", "2"]
    more += ["--batch_size", "6", "--accumulation", "2", "--lora_dropout", "0"]
    images = {}
    for name in ("apart", "together"):
        command, passes = prepared(small_run, tmp_path / name), images.setdefault(name, [])

        def compute_loss(self, model, inputs, *args, passes=passes, **kwargs):
            passes.append(len(inputs["pixel_values"]))
            return Trainer.compute_loss(self, model, inputs, *args, **kwargs)

        stage = load_script(STAGE)
        with monkeypatch.context() as patch:
            patch.setattr(RankingTrainer, "compute_loss", compute_loss, raising=False)
            if name == "together":
                patch.setattr("mllmrec.ranking.trainer.needs_equal_passes", lambda _: True)
            stage.main([*command[1:], *more, "--logging_steps", "1"])
    assert max(images["apart"]) == 1 < max(images["together"])
    assert sum(images["apart"]) == sum(images["together"])
    assert_same_training(tmp_path / "apart", tmp_path / "together", 1e-5, 1e-5)


def test_a_training_that_does_not_get_better_stops_early(small_run, tmp_path, capsys):
    command = prepared(small_run, tmp_path / "run")
    more = [
        "--epochs",
        "6",
        "--learning_rate",
        "0",
        "--patience",
        "2",
        "--report_to",
        "tensorboard",
    ]
    more += ["--limit", "16", "--validation_users", "3"]
    load_script(STAGE).main([*command[1:], *more])
    log = read_rows(tmp_path / "run" / "mllm_msr" / "training_log.jsonl")
    assert len([row for row in log if "eval_auc" in row]) == 3, (
        "the first one, and two that were no better"
    )
    assert all({"eval_auc", "eval_hr@5"} <= row.keys() for row in log if "eval_auc" in row)
    assert (
        (tmp_path / "run" / "mllm_msr" / "training_curve.png").read_bytes().startswith(b"\x89PNG")
    )
    assert list((tmp_path / "run" / "mllm_msr" / "tensorboard").rglob("events.out.tfevents.*"))
    before = weights(tmp_path / "run")
    # As if killed after the last checkpoint: nothing is trained again.
    shutil.rmtree(tmp_path / "run" / "mllm_msr" / "adapter")
    load_script(STAGE).main([*command[1:], *more])
    again = read_rows(tmp_path / "run" / "mllm_msr" / "training_log.jsonl")
    assert [row for row in again if "train_runtime" not in row] == [
        row for row in log if "train_runtime" not in row
    ]
    assert all(
        torch.equal(before[name], tensor) for name, tensor in weights(tmp_path / "run").items()
    )


@pytest.mark.parametrize("keep", ["best", "last"])
def test_the_best_adapter_is_kept_or_the_last(small_run, tmp_path, monkeypatch, keep):
    aucs = iter([0.6, 0.9, 0.7, 0.8])
    monkeypatch.setattr("mllmrec.ranking.trainer.pooled_auc", lambda *_: next(aucs))
    command = prepared(small_run, tmp_path / "run")
    load_script(STAGE).main(
        [*command[1:], "--epochs", "4", "--limit", "16", "--validation_users", "2", "--keep", keep]
    )
    record = read_record(tmp_path / "run" / "mllm_msr" / "adapter")
    assert record["best_validation_auc"] == 0.9
    checkpoints, epoch = tmp_path / "run" / "mllm_msr" / "checkpoints", record["steps"] // 4
    numbers = {"best": 2, "last": 4}
    found = {
        name: load_peft_weights(str(checkpoints / f"checkpoint-{epoch * n}"))
        for name, n in numbers.items()
    }
    kept = weights(tmp_path / "run")
    for name, checkpoint in found.items():
        assert all(torch.equal(kept[key], checkpoint[key]) for key in kept) == (name == keep)


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
    ids=["qwen2.5-vl, sequence", "llava-1.5, bfloat16", "QLoRA", "single tile"],
)
def test_every_kind_of_training_ends_with_an_adapter_that_plain_peft_loads(
    small_run, tmp_path, make, options
):
    command, base = (
        prepared(small_run, tmp_path / "run"),
        saved(make(), tmp_path / "model") if make else str(TINY / "llava"),
    )
    small = ["--limit", "8", "--validation_users", "2", "--warmup_ratio", "0"]
    load_script(STAGE).main([*command[1:], "--model", base, *small, *options])
    adapter = tmp_path / "run" / "mllm_msr" / "adapter"
    assert PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), adapter)
    assert any(
        tensor.abs().max() > 0
        for name, tensor in weights(tmp_path / "run").items()
        if "lora_B" in name
    ), "it was trained"
    assert AutoTokenizer.from_pretrained(adapter).chat_template
    log = read_rows(tmp_path / "run" / "mllm_msr" / "training_log.jsonl")
    assert all(np.isfinite(row["loss"]) for row in log if "loss" in row)
    assert len([row for row in log if "eval_auc" in row]) == 1


def test_preferences_are_shortened_and_users_that_cannot_fit_rejected_and_both_counted(
    small_run, tmp_path, capsys
):
    command = prepared(small_run, tmp_path / "run")
    rows = read_rows(tmp_path / "run" / "mllm_msr" / "train.jsonl")
    (tmp_path / "run" / "mllm_msr" / "train.jsonl").unlink()
    for row in rows[:3]:
        turn, (_, end) = row["messages"][0], row["preference_span"]
        text = turn["content"][1]["text"]
        turn["content"][1]["text"] = text[:end] + " word" * 500 + text[end:]
        row["preference_span"][1] = end + 2500
    rows[6]["messages"][0]["content"][1]["text"] += " word" * 600  # no preference to cut there
    write_rows(tmp_path / "run" / "mllm_msr" / "train.jsonl", rows)
    load_script(STAGE).main([*command[1:], "--limit", "8"])
    printed = capsys.readouterr().err
    assert (
        "; 3 rows with a shortened preference; 1 users were rejected, each with its reason"
        in printed
    )
    counts = read_record(tmp_path / "run" / "mllm_msr" / "adapter")["rows"]
    assert (counts["in"], counts["shortened"], counts["rejected_users"]) == (6, 3, 1)
    (rejected,) = read_rows(tmp_path / "run" / "mllm_msr" / "training.rejected.jsonl")
    assert rejected["user_id"] == rows[6]["user_id"]
    assert "longer than 512 tokens even without a preference" in rejected["reason"]


def damaged(rows, how):
    row = rows[4]
    if how == "image":
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
            "image",
            r"train.jsonl, line 5: image covers/gone.png: the file is missing; restore it, or make "
            r"the file again",
        ),
        (
            "answer",
            r"train.jsonl, line 5: the answer is 'Maybe', for the label . it must be '(Yes|No)'; "
            r"make the file again",
        ),
        (
            "other answer",
            r"train.jsonl, line 5: the answer is '(Yes|No)', for the label . it must be",
        ),
        ("label", r"train.jsonl, line 5: the label is 2, it must be 0 or 1; make the file again"),
    ],
)
def test_bad_rows_are_refused_before_the_model_is_loaded(
    small_run, tmp_path, monkeypatch, how, message
):
    command = prepared(small_run, tmp_path / "run")
    rows = read_rows(tmp_path / "run" / "mllm_msr" / "train.jsonl")
    (tmp_path / "run" / "mllm_msr" / "train.jsonl").unlink()
    write_unchecked(tmp_path / "run" / "mllm_msr" / "train.jsonl", damaged(rows, how))
    monkeypatch.setattr("mllmrec.models.loading._load_model", None)
    with pytest.raises(InputError, match=message):
        load_script(STAGE).main(command[1:])


def test_validation_lists_that_cannot_be_ranked_are_refused_before_the_model_is_loaded(
    small_run, tmp_path, monkeypatch
):
    command = prepared(small_run, tmp_path / "run")
    rows = read_rows(tmp_path / "run" / "mllm_msr" / "validation.jsonl")
    (tmp_path / "run" / "mllm_msr" / "validation.jsonl").unlink()
    write_rows(tmp_path / "run" / "mllm_msr" / "validation.jsonl", rows[:-1])
    monkeypatch.setattr("mllmrec.models.loading._load_model", None)
    with pytest.raises(
        InputError,
        match=r"validation.jsonl: user .* has 1 positives and 19 negatives instead of 1 and 20",
    ):
        load_script(STAGE).main(command[1:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--max_text_tokens", "9"),
            r"train.jsonl: no question fits, the first: item .* longer than 9 tokens even without",
        ),
        (("--dtype", "float16"), "a CPU does not train in float16; pass --dtype float32"),
        (("--group_by", "item", "--loss", "sequence"), "--group_by item needs --loss answer"),
    ],
)
def test_options_that_cannot_work_are_refused_in_one_sentence(
    small_run, tmp_path, options, message
):
    command = prepared(small_run, tmp_path / "run")
    with pytest.raises(InputError, match=message):
        load_script(STAGE).main([*command[1:], *options])


@pytest.mark.parametrize(("group_by", "attention"), [("item", "sdpa"), ("none", "auto")])
def test_a_shared_prefix_uses_the_attention_that_takes_its_mask(
    small_run, tmp_path, monkeypatch, group_by, attention
):
    """Left to itself, a model would be loaded with FlashAttention where that is installed."""
    stage, asked = load_script(STAGE), []

    def load(args):
        asked.append(args.attention)
        raise InputError("seen")

    monkeypatch.setattr("mllmrec.ranking.trainer.load_ranker", load)
    with pytest.raises(InputError, match="seen"):
        stage.main([*prepared(small_run, tmp_path / "run")[1:], "--group_by", group_by])
    assert asked == [attention]


def test_a_checkpoint_of_other_settings_is_not_resumed(small_run, server, tmp_path, monkeypatch):
    command = prepared(small_run, tmp_path / "run")
    more = ["--batch_size", "2", "--checkpoint_steps", "3"]
    killed = server.run(str(server.folder / "killed.py"), "6", *command, *more)
    assert killed.returncode == -9
    assert list((tmp_path / "run" / "mllm_msr" / "checkpoints").glob("checkpoint-*"))
    with pytest.raises(InputError, match=r"made with other settings \(batch_size was 2, is 8\)"):
        load_script(STAGE).main(command[1:])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"made with other settings \(processes was 1, is 2\)"):
        load_script(STAGE).main([*command[1:], "--batch_size", "2"])


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
        for row in read_rows(small_run.system / "sft" / "scores.jsonl")
    }
    found = {
        (row["user_id"], row["item_id"]): row["score"]
        for row in read_rows(small_run.system / "merged" / "scores.jsonl")
    }
    assert found == pytest.approx(wanted, abs=1e-4)
    base = {
        (row["user_id"], row["item_id"]): row["score"]
        for row in read_rows(small_run.system / "zero_shot" / "scores.jsonl")
    }
    assert max(abs(base[row] - wanted[row]) for row in wanted) > 0.01, "the adapter does something"
    shutil.rmtree(small_run.system / "merged")
    assert not list(merged.glob("adapter*"))
