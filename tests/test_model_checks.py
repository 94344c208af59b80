"""A model is what it claims to be, or is refused: keys, shapes, digests, finite numbers.

transformers initialises missing weights at random and PEFT leaves keys out that do not fit; both
only warn, and every figure after that would be of another model.
"""

import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer

from mllmrec.generation.dialogues import Prompt
from mllmrec.generation.engine import load_engine
from mllmrec.generation.local_engine import GenerationEngine
from mllmrec.models.adapters import adapter_base, check_adapter, load_adapter
from mllmrec.models.chat import ChatProcessor
from mllmrec.models.loading import load_multimodal, load_text
from mllmrec.models.model_options import GenerationStageOptions
from mllmrec.prompts.templates import user_turn
from mllmrec.ranking.reader import RowReader
from mllmrec.ranking.scoring import score_rows
from mllmrec.ranking.trainer import load_with_lora, save_adapter
from mllmrec.ranking.training_options import FineTuningOptions
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import read_rows
from mllmrec.stage.output import WholeOutput
from mllmrec.stage.record import Job

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def copy_of(tmp_path):
    """A function that copies a tiny model, and returns the copy's folder."""
    return lambda name: shutil.copytree(TINY / name, tmp_path / "model")


def change_weights(path, change):
    weights = load_file(path)
    CHANGES[change](weights)
    save_file(weights, path, metadata={"format": "pt"})


def change_config(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def a_key(weights):
    """A key of a linear layer of the language model, else of LoRA."""
    return next(key for key in sorted(weights) if "layers.1.mlp.down_proj" in key)


def rename(weights):
    for key in sorted(weights):
        weights[key.replace("layers", "blocks")] = weights.pop(key)


def with_number(number):
    """A change that puts `number` into a weight."""

    def change(weights):
        weights[a_key(weights)][0, 0] = number

    return change


CHANGES = {
    "remove": lambda weights: weights.pop(a_key(weights)),
    "rename": rename,
    "add": lambda weights: weights.update({"another.weight": np.zeros((2, 2), np.float32)}),
    "reshape": lambda weights: weights.update(
        {a_key(weights): weights[a_key(weights)][:-1].copy()}
    ),
    "nan": with_number(np.nan),
    "inf": with_number(np.inf),
}


BASE_DAMAGES = [
    ("remove", r"does not hold the weights of its model \(1 missing: .*layers.1.mlp.down_proj"),
    ("rename", r"\(\d+ missing: .*, \d+ unexpected: .*blocks.0"),
    ("add", r"\(1 unexpected: another.weight\); fetch it again or name another --model"),
    ("reshape", r"\(1 of another shape: .*layers.1.mlp.down_proj.weight\)"),
    ("nan", r"down_proj.weight of .* are not all finite numbers"),
    ("inf", r"down_proj.weight of .* are not all finite numbers"),
]


@pytest.mark.parametrize("model", ["llama", "llava"])
@pytest.mark.parametrize(("change", "message"), BASE_DAMAGES)
def test_a_base_whose_weights_do_not_fit_is_refused(copy_of, capfd, model, change, message):
    folder = copy_of(model)
    change_weights(folder / "model.safetensors", change)
    with pytest.raises(InputError, match=message):
        (load_multimodal if model == "llava" else load_text)(str(folder))
    assert "LOAD REPORT" not in capfd.readouterr().err, "one sentence, and no table"


def test_a_folder_with_code_of_its_own_is_refused_without_a_question(copy_of):
    folder = copy_of("llama")
    own = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    change_config(folder / "config.json", **own)
    (folder / "mine.py").write_text("raise SystemExit('this code was run')\n")
    with pytest.raises(InputError, match="cannot be read"):
        load_text(str(folder))


def test_weights_that_can_hold_code_are_refused(copy_of):
    folder = copy_of("llama")
    weights = {name: torch.tensor(a) for name, a in load_file(folder / "model.safetensors").items()}
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="cannot be loaded"):
        load_text(str(folder))


@pytest.mark.parametrize("eos", [["a"], "a", 5000, [1, 5000], -1, True, [], 1.0])
def test_end_tokens_outside_of_the_vocabulary_are_refused(copy_of, eos):
    folder = copy_of("llama")
    change_config(folder / "generation_config.json", eos_token_id=eos)
    message = rf"the eos_token_id {re.escape(repr(eos))} in generation_config.json .* is no token"
    with pytest.raises(InputError, match=message):
        load_engine(str(folder), GenerationStageOptions(), multimodal=False)


def test_a_tokenizer_of_another_model_is_refused(copy_of):
    folder, tokenizer = copy_of("llama"), AutoTokenizer.from_pretrained(TINY / "llama")
    size = len(tokenizer)
    tokenizer.add_tokens(["never used"])
    tokenizer.save_pretrained(folder)
    load_engine(str(folder), GenerationStageOptions(), multimodal=False)
    tokens = json.loads((folder / "tokenizer.json").read_text())
    tokens["model"]["vocab"]["another token"] = size + 5
    (folder / "tokenizer.json").write_text(json.dumps(tokens))
    message = f"its tokenizer has the token {size + 5:,}, its embedding {size:,} rows: of another"
    with pytest.raises(InputError, match=message):
        load_engine(str(folder), GenerationStageOptions(), multimodal=False)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (
            TINY / "llava",
            {"prompt_format": "Q: {text}"},
            r"; add the place \{image\} to --prompt_f",
        ),
        ("", {}, "--model is empty; name a folder or a hub id"),
    ],
)
def test_what_a_model_lacks_is_named(model, options, message):
    with pytest.raises(InputError, match=message):
        load_engine(str(model), GenerationStageOptions(**options), multimodal=True)


ADAPTER_DAMAGES = [
    ("remove", r"1 of the model are not in the file: .*lora_A.weight; pass the matching"),
    ("rename", r"\d+ of the file are not in the model: .*blocks.0.*, \d+ of the model are not in"),
    ("add", r"1 of the file are not in the model: another.weight"),
    ("reshape", r"does not fit the model .*size mismatch"),
    ("nan", r"lora_A.default.weight of .* are not all finite numbers"),
]


@pytest.fixture
def adapter(small_run, tmp_path):
    """A copy of the run's adapter without its record, as one from elsewhere has none."""
    folder = shutil.copytree(small_run.system / "adapter", tmp_path / "adapter")
    (folder / "run.json").unlink()
    return folder


def refused(adapter, message):
    model, _ = load_multimodal(str(TINY / "llava"))
    with pytest.raises(InputError, match=message):
        adapter_base(adapter)
        load_adapter(model, adapter, "llava")


@pytest.mark.parametrize(("change", "message"), ADAPTER_DAMAGES)
def test_an_adapter_whose_weights_do_not_fit_is_refused(adapter, change, message):
    change_weights(adapter / "adapter_model.safetensors", change)
    refused(adapter, message)


@pytest.mark.parametrize("other", [{"target_modules": ["q_proj"]}, {"r": 3}])
def test_an_adapter_whose_config_is_of_other_weights_is_refused(adapter, other):
    change_config(adapter / "adapter_config.json", **other)
    refused(adapter, "does not fit the model")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("content", [b"", b"version https://git-lfs", None])
def test_a_damaged_file_of_an_adapter_is_refused(adapter, name, content):
    (adapter / name).unlink()
    if content is not None:
        (adapter / name).write_bytes(content)
    refused(adapter, name)


def test_an_adapter_that_is_not_what_its_record_says_is_refused(small_run, tmp_path):
    folder = shutil.copytree(small_run.system / "adapter", tmp_path / "adapter")
    check_adapter(folder, str(TINY / "llava"))
    change_config(folder / "adapter_config.json", lora_alpha=1)
    with pytest.raises(InputError, match=r"adapter_config.json was changed after it was written"):
        check_adapter(folder, str(TINY / "llava"))


@pytest.fixture
def broken_head():
    """(model, chat) of the tiny Llama with a weight that makes every logit NaN."""
    model, tokenizer = load_text(str(TINY / "llama"))
    with torch.no_grad():
        model.get_decoder().norm.weight[0] = torch.nan
    return model, ChatProcessor(tokenizer)


def test_generation_stops_at_logits_that_are_not_finite(broken_head):
    model, chat = broken_head
    engine = GenerationEngine(model, chat, GenerationStageOptions(max_new_tokens=3))

    def dialogue():
        text = chat.render([user_turn("A question.")])
        return (yield Prompt(text, chat.count(text)))

    with pytest.raises(InputError, match="logits for 'item 7' are not finite"):
        list(engine.run([("item 7", dialogue())]))


def test_scoring_stops_at_logits_that_are_not_finite(small_run, broken_head):
    model, chat = broken_head
    row = {**read_rows(small_run.system / "test.jsonl")[0], "images": []}
    row["messages"] = [user_turn("Yes or no?")]
    row["preference_span"] = [0, 0]
    name = f"user '{row['user_id']}', item '{row['item_id']}': the logits"
    with pytest.raises(InputError, match=rf"{name} .*are not finite"):
        list(score_rows(model, RowReader(chat, small_run.system), [row]))


def test_a_training_that_diverges_stops_and_writes_no_adapter(small_run, tmp_path):
    (tmp_path / "mllm_msr").mkdir()
    for name in ("mllm_msr/train.jsonl", "mllm_msr/validation.jsonl", "covers"):
        (tmp_path / name).symlink_to(small_run.folder / name)
    words = ("--output_dir", str(tmp_path), "--clip", "1e30", "--learning_rate", "1e30")
    with pytest.raises(InputError, match=r"the loss in step \d+ is nan \(user 'u.*diverged"):
        small_run.run("MLLM-MSR/train/train_llava_sft.py", *words)
    assert not (tmp_path / "mllm_msr" / "adapter").exists()


def test_an_adapter_is_checked_before_it_is_saved(tmp_path):
    options = FineTuningOptions(model=str(TINY / "llama"), lora_layers=["q_proj"])
    model, _ = load_with_lora(options)
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad)[0, 0] = torch.inf
    trainer = SimpleNamespace(is_fsdp_enabled=False, model=model, state=None)
    trainer.is_world_process_zero = lambda: True
    output = WholeOutput(Job.of(options, {}), [tmp_path / "adapter"])
    with pytest.raises(InputError, match="of the trained adapter are not all finite"):
        save_adapter(trainer, None, output, {}, {})
    assert not output.path.exists()
