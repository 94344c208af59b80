"""Fine-tuning: the loss and LoRA are where they should be, and it learns from labels only."""

import json
import random
import shutil

import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from conftest import TINY, saved, small_config
from peft.utils.other import fsdp_auto_wrap_policy
from random_models import random_llava, random_qwen_vl
from safetensors.torch import load_file
from transformers import AutoConfig, TrainerControl, TrainerState, TrainingArguments

from mllmrec.data import sample_world as world
from mllmrec.evaluation.metrics import evaluate
from mllmrec.models.adapters import check_adapter
from mllmrec.models.chat import ChatProcessor
from mllmrec.models.loading import load_multimodal, load_text
from mllmrec.models.lora import add_lora, decoder_layer_class
from mllmrec.ranking.answers import answer_tokens
from mllmrec.ranking.batches import Collator, EpochSampler, EpochSettings, pack_into_batches
from mllmrec.ranking.reader import RowReader, load_ranker
from mllmrec.ranking.rows import question_text
from mllmrec.ranking.trainer import load_with_lora, training_arguments
from mllmrec.ranking.training_events import TrainingEvents, mean_loss
from mllmrec.ranking.training_options import (
    FineTuningOptions,
    RankerOptions,
    check_training_options,
)
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import read_rows, write_rows
from mllmrec.stage.record import file_digests
from mllmrec.stage.scripts import load_script

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def data(small_run):
    """(folder, rows) of train.jsonl."""
    return small_run.system, read_rows(small_run.system / "train.jsonl")


@pytest.fixture(scope="module")
def llava():
    """(model, chat) of the tiny LLaVA, not to be changed."""
    model, processor = load_multimodal(str(TINY / "llava"))
    return model, ChatProcessor(processor)


MODELS = {
    "next": lambda: load_multimodal(str(TINY / "llava")),
    "1.5": lambda: random_llava("tiny", kind="1.5"),
    "qwen2.5-vl": random_qwen_vl,
}


@pytest.mark.parametrize("kind", MODELS)
def test_the_training_text_is_the_scoring_text_plus_the_answer(kind, data):
    chat = ChatProcessor(MODELS[kind]()[1])
    answers = answer_tokens(chat)
    collator = Collator(RowReader(chat, data[0]), "answer")
    for row in data[1][:10]:
        scoring_text, ids = collator.reader.prompt(row)
        assert collator.text(row) == scoring_text + answers.texts[row["label"]]
        answer = list(answers.ids[row["label"]])
        assert chat.ids(collator.text(row)) == ids + answer, "token for token"
        whole = chat.render(row["messages"], add_generation_prompt=False)
        assert whole.startswith(collator.text(row).removesuffix(chat.tokenizer.eos_token))
        batch = collator([row])
        asked = chat.expand_image_token(ids, chat.count_image_tokens(collator.reader.image(row)))
        assert batch["input_ids"][0].tolist() == asked + answer


def gradients(model, batch):
    """(loss, dict name -> gradient) of one batch."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.item(), found


@pytest.mark.parametrize("kind", ["next", "1.5"])
def test_a_shared_prefix_changes_neither_loss_nor_gradients(kind, data):
    """Rows of one item with texts of different lengths, beside an item with one row."""
    model, processor = MODELS[kind]()
    model = add_lora(model, FineTuningOptions(lora_dropout=0.0)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # they start as zeros, and so would half of the gradients
                parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(len(name)))
    reader = RowReader(ChatProcessor(processor), data[0])
    many = of_one_item(data[1])
    rows = [many[0], data[1][0], *many[1:4]]
    assert len({question_text(row) for row in rows}) == 5
    collator = Collator(reader, "answer", share_prefix=True)
    collator.in_parts = False
    shared = collator(rows)
    assert len(shared["input_ids"]) == 2, "two items"
    loss, found = gradients(model, shared)
    wanted_loss, wanted = gradients(model, Collator(reader, "answer")(rows))
    assert loss == pytest.approx(wanted_loss, abs=1e-5)
    assert found.keys() == wanted.keys() != set()
    for name in wanted:
        assert torch.allclose(found[name], wanted[name], atol=1e-5, rtol=1e-3), name


def with_question(row, text):
    """`row` with another text of its question."""
    image, part = row["messages"][0]["content"]
    turn = {**row["messages"][0], "content": [image, {**part, "text": text}]}
    return {**row, "messages": [turn, *row["messages"][1:]]}


def of_one_item(rows):
    """Rows about the item of the second row, made from other users' rows."""
    title, made = question_text(rows[1]).partition("\n")[0], []
    for n, row in enumerate(rows[2:6]):
        own = question_text(row).partition("\n")[2]
        made.append(with_question(row, f"{title}\n{own[n:]}"))
        made[-1] |= {"item_id": rows[1]["item_id"], "images": rows[1]["images"]}
    return made


def of_mixed_lengths(rows):
    """Six rows, the first one's question shortened."""
    return [with_question(rows[0], question_text(rows[0]).rsplit(maxsplit=3)[0]), *rows[1:6]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "sequence"}, "--group_by item needs --loss answer"),
        ({"batch_size": 1}, "--group_by item shares nothing with one row in a batch; set --batch"),
        # There a mask of True and False would be added.
        ({"attention": "eager"}, r"needs --attention sdpa, .* not eager"),
        ({"pad_images": 2}, "--pad_images needs --group_by none"),
    ],
)
def test_a_shared_prefix_is_refused_where_it_cannot_work(options, message):
    by_item = {"group_by": "item", "batch_size": 8}
    check_training_options(FineTuningOptions(**by_item))
    with pytest.raises(InputError, match=message):
        check_training_options(FineTuningOptions(**by_item | options))


def test_a_shared_prefix_needs_plain_positions(tmp_path):
    model = saved(random_qwen_vl(), tmp_path)
    with pytest.raises(InputError, match=r"needs a model without M-RoPE, not qwen2_5_vl"):
        load_with_lora(FineTuningOptions(model=model, group_by="item", batch_size=8))


@pytest.mark.parametrize("group_by", ["none", "length", "item"])
def test_an_epochs_order_is_a_permutation_that_seed_and_epoch_decide(group_by):
    rows = [{"item_id": str(n % 9), "images": [str(n % 9)]} for n in range(100)]
    lengths = [50 + (7 * n) % 31 for n in range(100)]

    def order(seed, epoch):
        sampler = EpochSampler(rows, lengths, EpochSettings(8, 8, group_by, seed))
        sampler.set_epoch(epoch)
        return list(sampler)

    first = order(1, 0)
    assert len(first) == 104, "whole steps"
    assert sorted(first[:100]) == list(range(100)), "every row once"
    assert first[100:] == first[:4], "and the first ones again"
    assert order(1, 0) == first
    assert len({tuple(order(seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4
    batches = [first[start : start + 8] for start in range(0, 100, 8)]
    spread = np.mean([np.ptp([lengths[n] for n in batch]) for batch in batches])
    items = np.mean([len({rows[n]["item_id"] for n in batch}) for batch in batches])
    assert (spread < 15) == (group_by == "length")
    assert (items < 4) == (group_by == "item")


def test_a_step_with_more_rows_than_there_are_is_refused():
    EpochSampler([{}] * 8, None, EpochSettings(8, 1, "none", 0))
    message = "a step takes 8 rows .*, the training has 7; lower --accumulation or --batch_size"
    with pytest.raises(InputError, match=message):
        EpochSampler([{}] * 7, None, EpochSettings(8, 1, "none", 0))


def test_chunks_are_packed_into_full_micro_batches():
    chunks = [[1, 2, 3], [4, 5], [6], [7, 8, 9, 10], [11, 12], [13, 14, 15]]
    packed = [[1, 2, 3, 6], [7, 8, 9, 10], [4, 5, 11, 12], [13, 14, 15]]
    assert pack_into_batches(chunks, 4) == packed
    assert pack_into_batches([[1], [2]], 1) == [[1], [2]]


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_step_of_qlora_trains_the_adapter_only(data, quantization):
    options = {"model": str(TINY / "llava"), "quantization": quantization}
    args = FineTuningOptions(**options, gradient_checkpointing=True)
    model, chat = load_ranker(args)
    model = add_lora(model, args).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    loss = model(**Collator(RowReader(chat, data[0]), "answer")(data[1][:4])).loss
    loss.backward()
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert loss.isfinite()
    assert changed
    assert all("lora_" in name and "language_model" in name for name in changed)


def test_gradients_pass_through_4_bit_weights_on_a_cpu():
    """Also after a pass without gradients, in which bitsandbytes would repack them."""
    args = FineTuningOptions(model=str(TINY / "list_llama"), quantization="nf4", lora_dropout=0.0)
    model = add_lora(load_ranker(args)[0], args).train()
    ids = torch.arange(5, 45)[None]
    with torch.inference_mode():
        model.eval()(input_ids=ids)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear4bit):
            whole = torch.nn.Linear(module.in_features, module.out_features, bias=False)
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
            whole.weight = torch.nn.Parameter(weight.float(), requires_grad=False)
            model.set_submodule(name, whole)
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    wanted = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(torch.allclose(found[name], wanted[name], atol=1e-6) for name in wanted)
    assert sum(bool(grad.any()) for grad in wanted.values()) == len(wanted) / 2, "B starts at 0"


def test_a_single_tile_is_the_whole_image(data, llava, tmp_path):
    """Its tokens are the first ones of the full form, and the end-of-row token."""
    model, chat = load_ranker(RankerOptions(model=str(TINY / "llava"), image_tiles="single"))
    image = RowReader(chat, data[0]).image(data[1][0])
    assert (chat.count_image_tokens(image), llava[1].count_image_tokens(image)) == (17, 36)
    batch, full = (Collator(RowReader(c, data[0]), "answer")(data[1][:3]) for c in (chat, llava[1]))
    assert (batch["input_ids"] == chat.image_token_id).sum(1).tolist() == [17, 17, 17]
    assert batch["pixel_values"].shape[1] == 1
    with torch.no_grad():
        assert model(**batch).loss.isfinite()
        seen, everything = (
            m.model.get_image_features(b["pixel_values"], b["image_sizes"]).pooler_output[0]
            for m, b in ((model, batch), (llava[0], full))
        )
    assert torch.allclose(seen[:16], everything[:16], atol=1e-5)
    random_qwen_vl()[0].save_pretrained(tmp_path)
    message = r"--image_tiles single is for LLaVA-NeXT; the model .* has no tiles"
    with pytest.raises(InputError, match=message):
        load_ranker(RankerOptions(model=str(tmp_path), image_tiles="single"))


def test_the_answer_loss_is_the_full_loss_at_the_answer(llava, data):
    """Logits at the answer's positions give the loss of full logits with other labels masked."""
    (model, chat), rows = llava, of_mixed_lengths(data[1])
    reader = RowReader(chat, data[0])
    collator = Collator(reader, "answer")
    batch = collator(rows)
    assert batch["logits_to_keep"].shape == (6, 2), "Yes or No, and what ends the turn"
    assert batch["attention_mask"].min() == 0
    assert (batch["attention_mask"].diff(dim=1) <= 0).all(), "padded on the right"
    texts = [collator.text(row) for row in rows]
    full = chat.encode(texts, [reader.image(row) for row in rows], side="right")
    full["labels"] = torch.full_like(full["input_ids"], -100)
    lengths = full["attention_mask"].sum(1).tolist()
    for n, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        answer = collator.answer_ids(row)
        full["labels"][n, length - len(answer) : length] = torch.tensor(answer)
    with torch.no_grad():
        short, long = model(**batch), model(**full)
    assert short.logits.shape[:2] == (6, 2), "no other position's logits are computed"
    assert short.loss.item() == pytest.approx(long.loss.item(), abs=1e-5)


def test_the_sequence_loss_counts_all_text_and_no_image_or_padding(llava, data):
    batch = Collator(RowReader(llava[1], data[0]), "sequence")(of_mixed_lengths(data[1]))
    ids, labels, mask = batch["input_ids"], batch["labels"], batch["attention_mask"]
    is_image = ids == llava[1].image_token_id
    assert is_image.any()
    assert (mask == 0).any()
    assert (mask.diff(dim=1) <= 0).all(), "padded on the right"
    assert torch.equal(labels == -100, is_image | (mask == 0))
    assert torch.equal(labels[labels != -100], ids[labels != -100])


LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("kind", MODELS)
def test_lora_is_on_the_language_model_and_nowhere_else(kind, monkeypatch):
    model = add_lora(MODELS[kind]()[0], FineTuningOptions())
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable
    assert all("language_model" in name and "lora_" in name for name in trainable)
    others = ("vision", "visual", "projector", "merger", "lm_head")
    assert not any(word in name for name in trainable for word in others)
    assert {name.split(".lora_")[0].rsplit(".", 1)[1] for name in trainable} == LAYERS
    # FSDP: PEFT takes the layers from the environment, else from a list that LLaVA does not match.
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", decoder_layer_class(model))
    assert fsdp_auto_wrap_policy(model)


def test_lora_layers_can_be_chosen_and_unknown_ones_are_refused():
    model = add_lora(MODELS["1.5"]()[0], FineTuningOptions(lora_layers=["q_proj", "v_proj"]))
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert {name.split(".lora_")[0].rsplit(".", 1)[1] for name in trainable} == {"q_proj", "v_proj"}
    with pytest.raises(InputError, match="no linear layers called 'query'; it has down_proj"):
        add_lora(MODELS["1.5"]()[0], FineTuningOptions(lora_layers=["query"]))


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """Metrics of three trainings in a world with preferences by the rule, as a perfect stage 3."""
    folder = tmp_path_factory.mktemp("learned")
    config = small_config(folder)
    text = config.read_text()
    changes = {"n_users: 30": "n_users: 500", "n_items: 60": "n_items: 200"}
    changes |= {"epochs: 1": "epochs: 2", "validation_fraction: 0.2": "validation_fraction: 0.0"}
    for old, new in changes.items():
        text = text.replace(old, new)
    config.write_text(text)
    options = ["--config", str(config)]
    load_script("data_processing/sample.py").main(options)
    system = folder / "mllm_msr"
    write_rows(system / "user_preferences.jsonl", perfect_preferences(folder))
    load_script("MLLM-MSR/train/dataset_create.py").main(options)
    load_script("MLLM-MSR/test/multi_col_dataset.py").main([*options, "--limit", "160"])
    train = load_script("MLLM-MSR/train/train_llava_sft.py")
    score = load_script("MLLM-MSR/test/test_with_llava_sft.py").main
    seen = [*options, "--hide", "nothing"]
    score([*seen, "--adapter", "none"])
    train.main(options)
    score(seen)
    rows = read_rows(system / "train.jsonl")
    labels = [row["label"] for row in rows]
    random.Random(0).shuffle(labels)
    for row, label in zip(rows, labels, strict=True):
        row["label"] = label
        row["messages"][1]["content"][0]["text"] = ["No", "Yes"][label]
    write_rows(system / "train.jsonl", rows)
    (system / "train.run.json").unlink()
    (system / "adapter").rename(system / "adapter_of_true_labels")
    # As rows from elsewhere: beside their users.jsonl they would be refused.
    train.main([*options, "--data_dir", str(folder / "elsewhere"), "--overwrite", "true"])
    score([*seen, "--variant", "shuffled"])
    names = ("zero_shot", "sft", "shuffled")
    files = {name: read_rows(system / name / "scores.jsonl") for name in names}
    return {name: evaluate(rows, resamples=1) for name, rows in files.items()}


def perfect_preferences(folder):
    """Rows of user_preferences.jsonl by the rule of the world that was drawn in `folder`."""
    sample = load_script("data_processing/sample.py")
    items, _, _ = sample.build_world(sample.Options(seed=42, n_items=200, n_users=500))
    rows = []
    for user in read_rows(folder / "users.jsonl"):
        kept = world.rolled_preferences([items[int(i[1:])] for i in user["history"]])
        row = {"user_id": user["user_id"], "preference": world.preference_text(kept[-1])}
        rows.append({**row, "blocks": [{"items": user["history"], "preference": "any"}]})
    return rows


@pytest.mark.slow
def test_training_teaches_the_task_and_shuffled_labels_give_no_gain(learned):
    """160 users: the standard error of an AUC is about .02."""
    assert learned["sft"]["users"] == 160
    zero_shot, sft, shuffled = (found["auc"] for found in learned.values())
    assert zero_shot <= 0.68
    assert sft >= max(zero_shot + 0.1, 0.75)
    assert shuffled - zero_shot <= min(0.06, (sft - zero_shot) / 3)


def test_vllm_finds_every_layer_of_the_adapter(small_run):
    """By the rules of vLLM 0.32.0: how it renames a LoRA key for LLaVA-NeXT, and what it takes."""
    adapter = small_run.system / "adapter"
    served = set()
    for key in load_file(adapter / "adapter_model.safetensors"):
        name, _, part = key.removeprefix("base_model.model.").rpartition(".lora_")
        assert name.startswith("model.language_model.")
        assert part in ("A.weight", "B.weight")
        served.add(name.replace("model.language_model.layers.", "", 1))
    layers = range(AutoConfig.from_pretrained(TINY / "llava").text_config.num_hidden_layers)
    parts = {f"self_attn.{name}_proj" for name in "qkvo"}
    parts |= {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert served == {f"{n}.{part}" for n in layers for part in parts}
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert not config["modules_to_save"] and not config["use_dora"] and config["bias"] == "none"
    assert config["init_lora_weights"] in (True, "gaussian")
    assert config["r"] in (1, 8, 16, 32, 64, 128, 256, 320, 512)  # values of --max-lora-rank


def refused(message, *words):
    with pytest.raises(InputError, match=message):
        check_adapter(*words)


def with_base(adapter, folder, base):
    """A copy of `adapter` in `folder` whose config names another base."""
    shutil.copytree(adapter, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = base
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_the_adapter_of_another_base_is_refused(small_run, tmp_path):
    adapter, base = small_run.system / "adapter", str(TINY / "llava")
    check_adapter(adapter, base)
    moved = tmp_path / "moved"
    shutil.copytree(TINY / "llava", moved)
    check_adapter(adapter, str(moved))
    weights = bytearray((moved / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (moved / "model.safetensors").write_bytes(weights)
    message = r"which is another model than .*moved \(model.safetensors was"
    refused(message, adapter, str(moved))
    foreign = with_base(adapter, tmp_path / "foreign", "someone/other-model")
    (foreign / "run.json").unlink()
    message = r"was trained on someone/other-model, not on .*llava; pass the matching"
    refused(message, foreign, base)
    other = saved(random_llava("tiny"), tmp_path / "llava")
    message = r"is another model than .*llava \(hidden_size was 128, is 64\); pass the matching"
    refused(message, adapter, other)


def test_the_adapter_of_a_base_of_the_hub_is_known_by_its_name(small_run, tmp_path, monkeypatch):
    hub = with_base(small_run.system / "adapter", tmp_path / "hub", "one/model")
    record = json.loads((hub / "run.json").read_text())
    record["inputs"] = {name: d for name, d in record["inputs"].items() if "/" not in name}
    record["outputs"] |= file_digests(hub / "adapter_config.json")
    (hub / "run.json").write_text(json.dumps(record))
    monkeypatch.setattr("mllmrec.models.adapters.model_identity", lambda name: record["base"])
    check_adapter(hub, "one/model")
    message = r"another model than other/model \(the name was one/model, is other/model\)"
    refused(message, hub, "other/model")


def test_with_several_gpus_in_sight_a_process_uses_one(tmp_path, monkeypatch):
    four = property(lambda self: getattr(self, "_n_gpu", 4))
    monkeypatch.setattr("transformers.TrainingArguments.n_gpu", four)
    options = training_arguments(FineTuningOptions(output_dir=str(tmp_path)), True, "auc")
    assert options.n_gpu <= 1


def test_no_checkpoint_is_saved_between_an_epochs_last_step_and_its_validation():
    saves, logs, two_epochs = [], [], TrainingArguments("x", num_train_epochs=2)
    sampler = EpochSampler([{}] * 80, None, EpochSettings(8, 8, "none", 0))  # ten steps
    events = TrainingEvents(sampler, FineTuningOptions(checkpoint_steps=5))
    for step in range(1, 21):
        control, state = TrainerControl(), TrainerState(global_step=step, max_steps=20)
        events.on_step_end(two_epochs, state, control)
        saves += [step] if control.should_save else []
        logs += [step] if control.should_log else []
    assert saves == logs == [5, 15]


def test_the_mean_loss_counts_every_step_once():
    log = [{"step": 10, "loss": 1.0}, {"step": 13, "loss": 3.0}, {"step": 13, "eval_auc": 0.5}]
    log.append({"step": 20, "loss": 2.0})
    assert mean_loss(log) == pytest.approx((10 * 1 + 3 * 3 + 7 * 2) / 20)


def test_the_options_of_the_config_reach_the_trainer(tmp_path):
    given = {
        **{"epochs": 3, "learning_rate": 1e-4, "seed": 7, "batch_size": 2, "accumulation": 4},
        **{"clip": 0.5, "workers": 3, "save_total": 5, "logging_steps": 6, "schedule": "cosine"},
    }
    args = FineTuningOptions(output_dir=str(tmp_path), warmup_ratio=0.1, dtype="bfloat16", **given)
    options = training_arguments(args, True, "auc")
    names = ("num_train_epochs", "learning_rate", "seed", "per_device_train_batch_size")
    names += ("gradient_accumulation_steps", "max_grad_norm", "dataloader_num_workers")
    names += ("save_total_limit", "logging_steps", "lr_scheduler_type")
    assert [getattr(options, name) for name in names] == list(given.values())
    assert options.get_warmup_steps(100) == 10
    assert (options.bf16, options.fp16, options.activation_checkpointing) == (True, False, False)
    assert options.output_dir == str(tmp_path / "mllm_msr" / "checkpoints")
    args.dtype, args.gradient_checkpointing = "float16", True
    options = training_arguments(args, True, "auc")
    assert (options.fp16, options.activation_checkpointing) == (True, True)


def test_a_text_model_is_refused_where_images_are_needed():
    with pytest.raises(InputError, match=r"\(llama\) takes no images; name a multimodal --model"):
        load_multimodal(str(TINY / "llama"))
    with pytest.raises(InputError, match=r"\(llava_next\) takes images; name a text --model"):
        load_text(str(TINY / "llava"))
