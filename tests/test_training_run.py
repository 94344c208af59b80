"""Stage 5 as a command: resume, several processes, early stopping, logs, bad input, merging."""

import re
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, call, free_port, saved
from fork_server import HEAVY, ForkServer
from peft import PeftModel
from peft.utils import load_peft_weights
from random_models import random_llava, random_qwen_vl
from transformers import AutoModelForImageTextToText, AutoTokenizer, Trainer

from mllmrec.models.adapters import check_use
from mllmrec.ranking.trainer import RankingTrainer
from mllmrec.ranking.training_options import RankerOptions
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


def train(command, *more):
    """Stage 5 in this process; command: of `prepared`."""
    load_script(STAGE).main([*command[1:], *more])


def log_of(folder):
    return read_rows(folder / "mllm_msr" / "training_log.jsonl")


def record_of(folder):
    return read_record(folder / "mllm_msr" / "adapter")


def values(folder, name):
    """`name` of each line of the training log that has it."""
    return [row[name] for row in log_of(folder) if name in row]


def weights(folder):
    return load_peft_weights(str(folder / "mllm_msr" / "adapter"))


def assert_same_training(one, other, loss, weight):
    assert len(values(one, "loss")) == len(values(other, "loss")) > 1
    assert values(one, "loss") == pytest.approx(values(other, "loss"), abs=loss)
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys() != set()
    for name in first:
        assert torch.allclose(first[name], second[name], atol=weight, rtol=0), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("group_by", "batch_size", "kills"), [("none", 2, (9, 16)), ("item", 4, (5, 8))]
)
def test_a_killed_training_resumes_to_the_same_losses_and_weights(
    small_run, server, tmp_path, group_by, batch_size, kills
):
    """Killed in mid-epoch twice, with dropout: losses to 1e-6, weights to 1e-5."""
    undisturbed, resumed = tmp_path / "undisturbed", tmp_path / "killed"
    more = ["--epochs", "2", "--checkpoint_steps", "3", "--logging_steps", "2"]
    more += ["--batch_size", str(batch_size), "--accumulation", str(4 // batch_size)]
    more += ["--lora_dropout", "0.1", "--group_by", group_by, "--limit", "24"]
    more += ["--validation_users", "2"]
    train(prepared(small_run, undisturbed), *more)
    command = [*prepared(small_run, resumed), *more]
    for micro_batches in kills:
        killed = server.run(str(server.folder / "killed.py"), str(micro_batches), *command)
        assert killed.returncode == -9
        assert not (resumed / "mllm_msr" / "adapter").exists()
    done = server.run(*command)
    assert done.returncode == 0, done.stderr
    assert_same_training(undisturbed, resumed, 1e-6, 1e-5)
    assert values(undisturbed, "step") == values(resumed, "step")
    assert values(undisturbed, "eval_auc") == values(resumed, "eval_auc") != []
    losses = [record_of(folder)["loss"] for folder in (undisturbed, resumed)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def distributed(rank, world_size, port):
    """The environment that a launcher gives to one of several processes."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in names.items()}


@pytest.mark.slow
def test_two_processes_train_like_one_with_twice_the_accumulation(small_run, server, tmp_path):
    """Also when they are killed in the middle of the second epoch and resumed.

    They are resumed by `accelerate launch` with a config of configs/accelerate/.
    """
    one, two = tmp_path / "one", tmp_path / "two"
    more = ["--batch_size", "2", "--lora_dropout", "0", "--epochs", "2", "--logging_steps", "1"]
    more += ["--group_by", "item"]  # so that the processes' micro-batches have different parts
    train(prepared(small_run, one), *more, "--accumulation", "4")
    command = [*prepared(small_run, two), *more, "--accumulation", "2", "--checkpoint_steps", "1"]
    epoch, port = record_of(one)["steps"] // 2, free_port()
    words = [str(server.folder / "killed.py"), str(2 * epoch + 5), *command]
    job = {"words": words, "kill_after": 0}
    killed = server.run_together(*({**job, "environment": distributed(r, 2, port)} for r in (0, 1)))
    assert -9 in [process.returncode for process in killed]
    assert all(process.returncode != 0 for process in killed)
    assert (two / "mllm_msr" / "checkpoints" / f"checkpoint-{epoch + 2}").exists()
    launch = ["-m", "accelerate.commands.launch", "--num_processes", "2"]
    launch += ["--config_file", "configs/accelerate/multi_gpu.yaml"]
    done = call(*launch, *command, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert_same_training(one, two, 1e-4, 1e-3)
    records = [record_of(folder) for folder in (one, two)]
    assert records[0]["steps"] == records[1]["steps"], "as many steps, each over as many rows"
    assert [record["processes"] for record in records] == [1, 2]
    seen = [max(values(folder, "num_input_tokens_seen")) for folder in (one, two)]
    assert seen[0] == seen[1] > 0, "the same rows were trained on"
    assert values(one, "eval_auc") == pytest.approx(values(two, "eval_auc"), abs=0.02)
    assert len(values(one, "eval_auc")) == 2


def test_the_items_of_a_micro_batch_train_one_after_the_other_as_in_one_pass(
    small_run, tmp_path, monkeypatch
):
    """`group_by: item`: the same losses and weights, but never two images in a pass."""
    more = ["--group_by", "item", "--epochs", "1", "--limit", "12", "--validation_users", "2"]
    more += ["--batch_size", "6", "--accumulation", "2", "--lora_dropout", "0"]
    images = {"apart": [], "together": []}
    for name, passes in images.items():

        def compute_loss(self, model, inputs, *args, passes=passes, **kwargs):
            passes.append(len(inputs["pixel_values"]))
            return Trainer.compute_loss(self, model, inputs, *args, **kwargs)

        command = prepared(small_run, tmp_path / name)
        with monkeypatch.context() as patch:
            patch.setattr(RankingTrainer, "compute_loss", compute_loss, raising=False)
            if name == "together":
                patch.setattr("mllmrec.ranking.trainer.needs_equal_passes", lambda _: True)
            train(command, *more, "--logging_steps", "1")
    assert max(images["apart"]) == 1 < max(images["together"])
    assert sum(images["apart"]) == sum(images["together"])
    assert_same_training(tmp_path / "apart", tmp_path / "together", 1e-5, 1e-5)


@pytest.mark.parametrize("by_steps", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_training_that_does_not_get_better_stops_early(small_run, tmp_path, by_steps):
    command, system = prepared(small_run, tmp_path / "run"), tmp_path / "run" / "mllm_msr"
    command += ["--epochs", "6", "--learning_rate", "0", "--patience", "2"]
    command += ["--report_to", "tensorboard", "--limit", "8", "--validation_users", "3"]
    command += ["--accumulation", "1", "--validation_steps", "3"] if by_steps else []
    train(command)
    log = log_of(tmp_path / "run")
    validated = [row for row in log if "eval_auc" in row]
    assert len(validated) == 3, "the first one, and two that were no better"
    assert not by_steps or [row["step"] for row in validated] == [3, 6, 9]
    assert not by_steps or validated[-1]["epoch"] == 4.5, "in the middle of an epoch"
    assert all("eval_hr@5" in row for row in validated)
    assert (system / "training_curve.png").read_bytes().startswith(b"\x89PNG")
    assert list((system / "tensorboard").rglob("events.out.tfevents.*"))
    before = weights(tmp_path / "run")
    # As if killed after the last checkpoint: nothing is trained again.
    shutil.rmtree(system / "adapter")
    train(command)
    again = [row for row in log_of(tmp_path / "run") if "train_runtime" not in row]
    assert again == [row for row in log if "train_runtime" not in row]
    after = weights(tmp_path / "run")
    assert all(torch.equal(before[name], after[name]) for name in after)


def test_validations_by_steps_are_every_so_many_and_at_the_end(small_run, tmp_path, capsys):
    words = ["--epochs", "1", "--limit", "8", "--batch_size", "2", "--accumulation", "1"]
    words += ["--validation_users", "2", "--validation_steps", "3", "--warmup_steps", "4"]
    train(prepared(small_run, tmp_path), *words, "--logging_steps", "1")
    rows = log_of(tmp_path)
    assert [row["step"] for row in rows if "eval_auc" in row] == [3, 6, 8]
    assert "step 3 of 8: loss " in capsys.readouterr().out
    rates = values(tmp_path, "learning_rate")
    assert np.argmax(rates) == 4 and rates[0] == 0, "four steps of warm-up"


def test_max_steps_end_a_training_in_the_order_of_its_epochs(small_run, tmp_path):
    words = ["--limit", "8", "--batch_size", "2", "--accumulation", "1", "--validation_users", "2"]
    words += ["--logging_steps", "1", "--schedule", "constant"]
    train(prepared(small_run, tmp_path / "two"), *words, "--epochs", "2")
    train(prepared(small_run, tmp_path / "some"), *words, "--epochs", "1", "--max_steps", "11")
    wanted, found = values(tmp_path / "two", "loss"), values(tmp_path / "some", "loss")
    assert (len(wanted), len(found)) == (16, 11)
    assert found == wanted[:11], "the second epoch has an order of its own"
    assert "eval_auc" in log_of(tmp_path / "some")[-2]
    with pytest.raises(InputError, match="leave --max_steps out"):
        train(prepared(small_run, tmp_path / "both"), "--max_steps", "3", "--patience", "1")


@pytest.mark.parametrize("keep", ["best", pytest.param("last", marks=pytest.mark.slow)])
def test_the_best_adapter_is_kept_or_the_last(small_run, tmp_path, monkeypatch, keep):
    aucs = iter([0.6, 0.9, 0.7, 0.8])
    monkeypatch.setattr("mllmrec.ranking.trainer.pooled_auc", lambda *_: next(aucs))
    small = ["--epochs", "4", "--limit", "8", "--validation_users", "2"]
    train(prepared(small_run, tmp_path), *small, "--keep", keep)
    record, kept = record_of(tmp_path), weights(tmp_path)
    assert record["best_validation_auc"] == 0.9
    for name, epoch in (("best", 2), ("last", 4)):
        number = record["steps"] // 4 * epoch
        folder = tmp_path / "mllm_msr" / "checkpoints" / f"checkpoint-{number}"
        checkpoint = load_peft_weights(str(folder))
        assert all(torch.equal(kept[key], checkpoint[key]) for key in kept) == (name == keep)


KINDS = {
    "qwen2.5-vl, sequence": (random_qwen_vl, "--loss sequence --batch_size 2 --accumulation 2"),
    "llava-1.5, bfloat16": (
        lambda: random_llava("tiny", kind="1.5"),
        "--gradient_checkpointing true --dtype bfloat16 --workers 2",
    ),
    "QLoRA": (None, "--quantization nf4 --gradient_checkpointing true"),
    "single tile": (None, "--image_tiles single --group_by length"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_training_ends_with_an_adapter_that_plain_peft_loads(
    small_run, tmp_path, kind
):
    make, options = KINDS[kind]
    command, folder = prepared(small_run, tmp_path / "run"), tmp_path / "run"
    base = saved(make(), tmp_path / "model") if make else str(TINY / "llava")
    small = ["--limit", "4", "--validation_users", "2", "--warmup_ratio", "0"]
    train(command, "--model", base, *small, *options.split())
    adapter = folder / "mllm_msr" / "adapter"
    assert PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), adapter)
    trained = [tensor for name, tensor in weights(folder).items() if "lora_B" in name]
    assert any(tensor.abs().max() > 0 for tensor in trained)
    assert AutoTokenizer.from_pretrained(adapter).chat_template
    assert np.isfinite(values(folder, "loss")).all()
    assert len(values(folder, "eval_auc")) == 1


def test_preferences_are_shortened_and_users_that_cannot_fit_rejected_and_both_counted(
    small_run, tmp_path, capsys
):
    command, path = prepared(small_run, tmp_path), tmp_path / "mllm_msr" / "train.jsonl"
    rows = read_rows(path)
    for row in rows[:3]:
        part, (_, end) = row["messages"][0]["content"][1], row["preference_span"]
        part["text"] = part["text"][:end] + " word" * 500 + part["text"][end:]
        row["preference_span"][1] = end + 2500
    rows[6]["messages"][0]["content"][1]["text"] += " word" * 600  # no preference to cut there
    path.unlink()
    write_rows(path, rows)
    train(command, "--limit", "4", "--batch_size", "6")
    told = "; 3 rows with a shortened preference; 1 users were rejected, each with its reason"
    assert told in capsys.readouterr().err
    counts = record_of(tmp_path)["rows"]
    assert (counts["in"], counts["shortened"], counts["rejected_users"]) == (6, 3, 1)
    (rejected,) = read_rows(tmp_path / "mllm_msr" / "training.rejected.jsonl")
    assert rejected["user_id"] == rows[6]["user_id"]
    assert "longer than 512 tokens even without a preference" in rejected["reason"]


def no_image(rows):
    rows[4]["images"] = ["covers/gone.png"]


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("train", list.clear, " is empty; make it again with scripts/04_datasets.sh"),
        ("train", no_image, ", line 5: image covers/gone.png: the file is missing; restore it, or"),
        ("validation", list.pop, ": user .* has 1 positives and 19 negatives instead of 1 and 20"),
    ],
)
def test_bad_rows_are_refused_before_the_model_is_loaded(
    small_run, tmp_path, monkeypatch, name, damage, message
):
    command, path = prepared(small_run, tmp_path), tmp_path / "mllm_msr" / f"{name}.jsonl"
    rows = read_rows(path)
    damage(rows)
    path.unlink()
    write_rows(path, rows)
    monkeypatch.setattr("mllmrec.models.loading._load_model", None)
    with pytest.raises(InputError, match=f"{name}.jsonl{message}"):
        train(command)


UNFIT = "train.jsonl: no question fits, the first: item .* longer than 9 tokens even without"
FLOAT16 = "a CPU does not train in float16; pass --dtype float32"


@pytest.mark.parametrize(
    ("words", "message"), [("--max_text_tokens 9", UNFIT), ("--dtype float16", FLOAT16)]
)
def test_options_that_cannot_work_are_refused_in_one_sentence(small_run, tmp_path, words, message):
    with pytest.raises(InputError, match=message):
        train(prepared(small_run, tmp_path), *words.split())


@pytest.mark.parametrize(("group_by", "attention"), [("item", "sdpa"), ("none", "auto")])
def test_a_shared_prefix_uses_the_attention_that_takes_its_mask(
    small_run, tmp_path, monkeypatch, group_by, attention
):
    """Left to itself, a model would be loaded with FlashAttention where that is installed."""

    def load(args):
        raise InputError(f"asked for {args.attention}")

    monkeypatch.setattr("mllmrec.ranking.trainer.load_ranker", load)
    with pytest.raises(InputError, match=f"asked for {attention}"):
        train(prepared(small_run, tmp_path), "--group_by", group_by)


def test_an_adapter_of_other_settings_is_refused(small_run):
    with pytest.raises(InputError, match=r"was made with other settings \(lora_r was 16, is 4\)"):
        small_run.run(STAGE, "--lora_r", "4")


@pytest.mark.parametrize(
    "words",
    [
        "--lora_layers nope",
        "--group_by item --batch_size 1",
        "--model Inference/tiny_models/nope",
        "--attention flash_attention_2",
    ],
)
def test_an_option_that_cannot_work_costs_no_finished_adapter(small_run, words):
    before = {path: path.read_bytes() for path in (small_run.system / "adapter").iterdir()}
    with pytest.raises(InputError):
        small_run.run(STAGE, "--overwrite", "true", *words.split())
    assert {path: path.read_bytes() for path in before} == before


def test_an_adapter_is_overwritten_by_the_first_step_and_not_before(
    small_run, tmp_path, monkeypatch
):
    where = [*prepared(small_run, tmp_path), "--limit", "8", "--validation_users", "2"]
    train(where)
    before = {path: path.read_bytes() for path in (tmp_path / "mllm_msr/adapter").iterdir()}

    def diverges(*args, **kwargs):
        raise InputError("the training diverged")

    monkeypatch.setattr(Trainer, "training_step", diverges)
    with pytest.raises(InputError, match="diverged"):
        train(where, "--overwrite", "true", "--learning_rate", "1")
    assert {path: path.read_bytes() for path in before} == before
    monkeypatch.undo()
    train(where, "--overwrite", "true", "--epochs", "2")
    assert record_of(tmp_path)["settings"]["epochs"] == 2


USED_OTHERWISE = {
    "quantization": "nf4",
    "prompt_format": "{image}{text}",
    "image_tiles": "single",
    "pad_images": 2,
    "answer_token": "bare",
    "end_token": False,
    "max_text_tokens": 100,
}


@pytest.mark.parametrize("name", USED_OTHERWISE)
def test_an_adapter_is_scored_as_it_was_trained(small_run, name):
    adapter, value = small_run.system / "adapter", USED_OTHERWISE[name]
    options = RankerOptions(**{name: value})
    check_use(adapter, RankerOptions(), [])
    with pytest.raises(InputError, match=f"trained with --{name} .*, not .*--allow_other {name}"):
        check_use(adapter, options, [])
    check_use(adapter, options, [name])
    words = ["--variant", "otherwise", f"--{name}", str(value)]
    with pytest.raises(InputError, match=f"trained with --{name} "):
        small_run.run("MLLM-MSR/test/test_with_llava_sft.py", *words)


def test_an_adapter_of_a_quantised_model_is_merged_only_when_asked(small_run, tmp_path, capsys):
    where = prepared(small_run, tmp_path)
    train(where, "--quantization", "nf4", "--limit", "8")
    words = ["MLLM-MSR/train/merge_adapter.py", *where[3:]]
    with pytest.raises(
        InputError, match=r"--quantization nf4: merged .* pass --allow_other quantization"
    ):
        small_run.run(*words)
    small_run.run(*words, "--allow_other", "quantization")
    found = re.search(r"of a trial question by up to (\S+)", capsys.readouterr().out)
    assert 0.001 < float(found[1]) < 10


def test_a_merge_does_not_replace_its_adapter(small_run):
    adapter = small_run.system / "adapter"
    before = {path: path.read_bytes() for path in adapter.iterdir()}
    with pytest.raises(InputError, match="is no merged model of this script, so it would be lost"):
        small_run.run("MLLM-MSR/train/merge_adapter.py", "--merged", str(adapter))
    assert {path: path.read_bytes() for path in adapter.iterdir()} == before


def test_a_merged_model_scores_like_base_and_adapter(small_run, tmp_path, caplog):
    merged = tmp_path / "merged"
    small_run.run("MLLM-MSR/train/merge_adapter.py", "--merged", str(merged))
    assert f"--model {merged} --adapter none --variant sft_merged" in caplog.text
    where = ["--model", str(merged), "--adapter", "none", "--variant", "sft_merged"]
    with pytest.raises(InputError, match="merged was trained with --max_text_tokens 512, not 300"):
        small_run.run("MLLM-MSR/test/test_with_llava_sft.py", *where, "--max_text_tokens", "300")
    small_run.run("MLLM-MSR/test/test_with_llava_sft.py", *where, "--hide", "nothing")

    def scores(variant):
        rows = read_rows(small_run.system / variant / "scores.jsonl")
        return {(row["user_id"], row["item_id"]): row["score"] for row in rows}

    wanted, base = scores("sft"), scores("zero_shot")
    assert scores("sft_merged") == pytest.approx(wanted, abs=1e-4)
    assert max(abs(base[row] - wanted[row]) for row in wanted) > 0.01, "the adapter does something"
    shutil.rmtree(small_run.system / "sft_merged")
    assert not list(merged.glob("adapter*"))
