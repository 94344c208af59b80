"""Fine-tuning: the loss and LoRA are where they should be, and it learns from labels only."""

import json
import random
import shutil

import pytest
import torch
from conftest import TINY, saved, small_config
from random_models import random_llava, random_qwen_vl
from safetensors.torch import load_file
from transformers import AutoConfig

from mllmrec.models.adapters import check_adapter
from mllmrec.models.chat import ChatProcessor
from mllmrec.models.loading import load_multimodal
from mllmrec.models.lora import add_lora, decoder_layer_class
from mllmrec.ranking.answers import answer_tokens
from mllmrec.ranking.batches import Collator, EpochSampler, EpochSettings, pack_into_batches
from mllmrec.ranking.reader import RowReader, load_ranker
from mllmrec.ranking.trainer import TrainingEvents, load_with_lora, mean_loss, training_arguments
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
def stage():
    return load_script("MLLM-MSR/train/train_llava_sft.py")


@pytest.fixture(scope="module")
def data(small_run):
    """(folder, rows) of train.jsonl."""
    return small_run.system, read_rows(small_run.system / "train.jsonl")


@pytest.fixture
def collators(data):
    _, processor = load_multimodal(str(TINY / "llava"))
    reader = RowReader(ChatProcessor(processor), data[0])
    return Collator(reader, "answer"), Collator(reader, "sequence")


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
    return loss.item(), {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


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
    assert len({row["messages"][0]["content"][1]["text"] for row in rows}) == 5
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


def of_one_item(rows):
    """Rows about the item of the second row, made from other users' rows."""
    first, title = rows[1], rows[1]["messages"][0]["content"][1]["text"].partition("\n")[0]
    made = []
    for n, row in enumerate(rows[2:6]):
        own = row["messages"][0]["content"][1]["text"].partition("\n")[2]
        turn = {
            **first["messages"][0],
            "content": [{"type": "image"}, {"type": "text", "text": f"{title}\n{own[n:]}"}],
        }
        made.append(
            {
                **row,
                "item_id": first["item_id"],
                "images": first["images"],
                "messages": [turn, row["messages"][1]],
            }
        )
    return made


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
    check_training_options(FineTuningOptions(group_by="item", batch_size=8))
    with pytest.raises(InputError, match=message):
        check_training_options(FineTuningOptions(**{"group_by": "item", "batch_size": 8} | options))


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

    assert len(order(1, 0)) == 104, "whole steps"
    assert sorted(order(1, 0)[:100]) == list(range(100)), "every row once"
    assert order(1, 0)[100:] == order(1, 0)[:4], "and the first ones again"
    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4
    batches = [order(1, 0)[start : start + 8] for start in range(0, 100, 8)]
    spread = sum(
        max(lengths[n] for n in batch) - min(lengths[n] for n in batch) for batch in batches
    ) / len(batches)
    items = sum(len({rows[n]["item_id"] for n in batch}) for batch in batches) / len(batches)
    assert (spread < 15) == (group_by == "length")
    assert (items < 4) == (group_by == "item")


def test_chunks_are_packed_into_full_micro_batches():
    chunks = [[1, 2, 3], [4, 5], [6], [7, 8, 9, 10], [11, 12], [13, 14, 15]]
    assert pack_into_batches(chunks, 4) == [
        [1, 2, 3, 6],
        [7, 8, 9, 10],
        [4, 5, 11, 12],
        [13, 14, 15],
    ]
    assert pack_into_batches([[1], [2]], 1) == [[1], [2]]


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_step_of_qlora_trains_the_adapter_only(data, quantization):
    args = FineTuningOptions(
        model=str(TINY / "llava"), quantization=quantization, gradient_checkpointing=True
    )
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


def test_a_single_tile_is_the_whole_image(data, tmp_path):
    """Its tokens are the first ones of the full form, and the end-of-row token."""
    name = str(TINY / "llava")
    (whole, full_chat), (model, chat) = (
        load_ranker(RankerOptions(model=name, image_tiles=tiles)) for tiles in ("full", "single")
    )
    image = RowReader(chat, data[0]).image(data[1][0])
    assert (chat.count_image_tokens(image), full_chat.count_image_tokens(image)) == (17, 36)
    reader = RowReader(chat, data[0])
    batch = Collator(reader, "answer")(data[1][:3])
    assert (batch["input_ids"] == chat.image_token_id).sum(1).tolist() == [17, 17, 17]
    assert batch["pixel_values"].shape[1] == 1
    with torch.no_grad():
        assert model(**batch).loss.isfinite()
        seen = model.model.get_image_features(
            batch["pixel_values"], batch["image_sizes"]
        ).pooler_output[0]
        full = Collator(RowReader(full_chat, data[0]), "answer")(data[1][:3])
        everything = whole.model.get_image_features(
            full["pixel_values"], full["image_sizes"]
        ).pooler_output[0]
    assert torch.allclose(seen[:16], everything[:16], atol=1e-5)
    random_qwen_vl()[0].save_pretrained(tmp_path)
    with pytest.raises(
        InputError, match=r"--image_tiles single is for LLaVA-NeXT; the model .* has no tiles"
    ):
        load_ranker(RankerOptions(model=str(tmp_path), image_tiles="single"))


def test_the_answer_loss_is_the_full_loss_at_the_answer(collators, data):
    """Logits at the answer's positions give the loss of full logits with other labels masked."""
    model, _ = load_multimodal(str(TINY / "llava"))
    collator, rows = collators[0], of_mixed_lengths(data[1])
    batch = collator(rows)
    assert batch["logits_to_keep"].shape == (6, 2), "Yes or No, and what ends the turn"
    full = collator.chat.encode(
        [collator.text(row) for row in rows],
        [collator.reader.image(row) for row in rows],
        side="right",
    )
    full["labels"] = torch.full_like(full["input_ids"], -100)
    for n, (row, length) in enumerate(
        zip(rows, full["attention_mask"].sum(1).tolist(), strict=True)
    ):
        answer = collator.answer_ids(row)
        full["labels"][n, length - len(answer) : length] = torch.tensor(answer)
    with torch.no_grad():
        short, long = model(**batch), model(**full)
    assert short.logits.shape[:2] == (6, 2), "no other position's logits are computed"
    assert short.loss.item() == pytest.approx(long.loss.item(), abs=1e-5)


def of_mixed_lengths(rows):
    """Six rows, the first one's question shortened."""
    (turn, answer), words = (
        rows[0]["messages"],
        rows[0]["messages"][0]["content"][1]["text"].split(),
    )
    shorter = {
        **turn,
        "content": [turn["content"][0], {"type": "text", "text": " ".join(words[:-3])}],
    }
    return [{**rows[0], "messages": [shorter, answer]}, *rows[1:6]]


def test_the_sequence_loss_counts_all_text_and_no_image_or_padding(collators, data):
    batch = collators[1](of_mixed_lengths(data[1]))
    ids, labels = batch["input_ids"], batch["labels"]
    is_image, is_padding = ids == collators[1].chat.image_token_id, batch["attention_mask"] == 0
    assert is_image.any()
    assert is_padding.any()
    assert torch.equal(labels == -100, is_image | is_padding)
    assert torch.equal(labels[labels != -100], ids[labels != -100])


def test_a_batch_is_padded_on_the_right(collators, data):
    mask = collators[0](of_mixed_lengths(data[1]))["attention_mask"]
    assert (mask == 0).any()
    assert (mask.diff(dim=1) <= 0).all()


def tiny_llava_15():
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
    )
    text = LlamaConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=98)
    )


def tiny_qwen_25_vl():
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "vocab_size": 99,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 32,
    }
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    )


@pytest.mark.parametrize(
    "make",
    [lambda: load_multimodal(str(TINY / "llava"))[0], tiny_llava_15, tiny_qwen_25_vl],
    ids=["next", "1.5", "qwen"],
)
def test_lora_is_on_the_language_model_and_nowhere_else(make):
    model = add_lora(make(), FineTuningOptions())
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable
    assert all("language_model" in name and "lora_" in name for name in trainable)
    assert not any(
        word in name
        for name in trainable
        for word in ("vision", "visual", "projector", "merger", "lm_head")
    )
    kinds = {name.split(".lora_")[0].rsplit(".", 1)[1] for name in trainable}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_lora_layers_can_be_chosen_and_unknown_ones_are_refused(stage):
    model = add_lora(tiny_llava_15(), FineTuningOptions(lora_layers=["q_proj", "v_proj"]))
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert {name.split(".lora_")[0].rsplit(".", 1)[1] for name in trainable} == {"q_proj", "v_proj"}
    with pytest.raises(InputError, match="no linear layers called 'query'; it has down_proj"):
        add_lora(tiny_llava_15(), FineTuningOptions(lora_layers=["query"]))


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """Metrics of three trainings in a world with preferences by the rule, as a perfect stage 3."""
    from mllmrec.data import sample_world as world
    from mllmrec.evaluation.metrics import evaluate

    folder = tmp_path_factory.mktemp("learned")
    config = small_config(folder)
    text = (
        config.read_text()
        .replace("n_users: 30", "n_users: 500")
        .replace("n_items: 60", "n_items: 200")
    )
    config.write_text(
        text.replace("epochs: 1", "epochs: 2").replace(
            "validation_fraction: 0.2", "validation_fraction: 0.0"
        )
    )
    options = ["--config", str(config)]
    load_script("data_processing/sample.py").main(options)
    items = world_items(folder)
    rows = []
    for user in read_rows(folder / "users.jsonl"):
        kept = world.rolled_preferences([items[i] for i in user["history"]])
        rows.append(
            {
                "user_id": user["user_id"],
                "preference": world.preference_text(kept[-1]),
                "blocks": [{"items": user["history"], "preference": "any"}],
            }
        )
    system = folder / "mllm_msr"
    write_rows(system / "user_preferences.jsonl", rows)
    load_script("MLLM-MSR/train/dataset_create.py").main(options)
    load_script("MLLM-MSR/test/multi_col_dataset.py").main([*options, "--limit", "160"])
    train, score = (
        load_script("MLLM-MSR/train/train_llava_sft.py"),
        load_script("MLLM-MSR/test/test_with_llava_sft.py"),
    )
    options += ["--hide", "nothing"]
    score.main([*options, "--adapter", "none"])
    train.main(options[:2])
    score.main(options)
    shuffled = read_rows(system / "train.jsonl")
    labels = [row["label"] for row in shuffled]
    random.Random(0).shuffle(labels)
    for row, label in zip(shuffled, labels, strict=True):
        row["label"] = label
        row["messages"][1]["content"][0]["text"] = ["No", "Yes"][label]
    write_rows(system / "train.jsonl", shuffled)
    (system / "adapter").rename(system / "adapter_of_true_labels")
    train.main([*options[:2], "--overwrite", "true"])
    score.main([*options, "--variant", "shuffled"])
    return {
        name: evaluate(read_rows(system / name / "scores.jsonl"), resamples=1)
        for name in ("zero_shot", "sft", "shuffled")
    }


def world_items(folder):
    """dict item_id -> colour, shape, topic, as the world of `folder` was drawn."""
    sample = load_script("data_processing/sample.py")
    items, _, _ = sample.build_world(sample.Options(seed=42, n_items=200, n_users=500))
    return {f"i{n:03d}": item for n, item in enumerate(items)}


@pytest.mark.slow
def test_training_teaches_the_task(learned):
    assert learned["sft"]["users"] == 160
    assert learned["zero_shot"]["auc"] <= 0.68
    assert learned["sft"]["auc"] >= learned["zero_shot"]["auc"] + 0.1
    assert learned["sft"]["auc"] >= 0.75


@pytest.mark.slow
def test_shuffled_labels_give_no_gain(learned):
    """160 users: the standard error of an AUC is about .02."""
    gain = learned["sft"]["auc"] - learned["zero_shot"]["auc"]
    assert learned["shuffled"]["auc"] - learned["zero_shot"]["auc"] <= min(0.06, gain / 3)


def test_other_settings_are_not_mixed_into_an_adapter(small_run):
    before = (small_run.system / "adapter" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(InputError, match=r"was made with other settings \(lora_r was 16, is 4\)"):
        small_run.run("MLLM-MSR/train/train_llava_sft.py", "--lora_r", "4")
    assert (small_run.system / "adapter" / "adapter_model.safetensors").read_bytes() == before


def test_an_empty_training_file_is_refused_before_the_model_is_loaded(
    small_run, tmp_path, monkeypatch
):
    (tmp_path / "mllm_msr").mkdir()
    for name in ("train", "validation"):
        (tmp_path / "mllm_msr" / f"{name}.jsonl").write_text("")
    monkeypatch.setattr("mllmrec.models.loading._load_model", None)
    with pytest.raises(
        InputError, match=r"train.jsonl is empty; make it again with scripts/04_datasets.sh"
    ):
        small_run.run("MLLM-MSR/train/train_llava_sft.py", "--output_dir", str(tmp_path))


def test_vllm_finds_every_layer_of_the_adapter(small_run):
    """By the rules of vLLM 0.32.0: how it renames a LoRA key for LLaVA-NeXT, and what it takes."""
    adapter = small_run.system / "adapter"
    served = set()
    for key in load_file(adapter / "adapter_model.safetensors"):
        name, _, part = key.removeprefix("base_model.model.").rpartition(".lora_")
        assert name.startswith("model.language_model.")
        assert part in ("A.weight", "B.weight")
        served.add(name.replace("model.language_model.", "language_model.model.", 1))
    layers = range(AutoConfig.from_pretrained(TINY / "llava").text_config.num_hidden_layers)
    parts = {f"self_attn.{name}_proj" for name in "qkvo"}
    parts |= {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert served == {f"language_model.model.layers.{n}.{part}" for n in layers for part in parts}
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert not config["modules_to_save"] and not config["use_dora"] and config["bias"] == "none"
    assert config["init_lora_weights"] in (True, "gaussian")
    assert config["r"] in (1, 8, 16, 32, 64, 128, 256, 320, 512)  # values of --max-lora-rank


def test_the_adapter_of_another_base_is_refused(small_run, tmp_path, monkeypatch):
    adapter = small_run.system / "adapter"
    check_adapter(adapter, str(TINY / "llava"), "full")
    with pytest.raises(
        InputError, match=r"was trained with --image_tiles full, not single; score with the same"
    ):
        check_adapter(adapter, str(TINY / "llava"), "single")
    moved = tmp_path / "moved"
    shutil.copytree(TINY / "llava", moved)
    check_adapter(adapter, str(moved), "full")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": "someone/other-model"})
    )
    shutil.copy(adapter / "adapter_model.safetensors", tmp_path)
    with pytest.raises(
        InputError, match=r"was trained on someone/other-model, not on .*llava; pass the matching"
    ):
        check_adapter(tmp_path, str(TINY / "llava"))
    other = tmp_path / "llava"
    saved(random_llava("tiny"), other)
    with pytest.raises(
        InputError,
        match=r"which is another model than .*llava \(hidden_size was 128, is 64\); "
        r"pass the matching",
    ):
        check_adapter(adapter, str(other))
    hub = tmp_path / "hub"
    shutil.copytree(adapter, hub)
    (hub / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": "one/model"})
    )
    record = json.loads((hub / "run.json").read_text())
    record["inputs"] = {
        name: digest for name, digest in record["inputs"].items() if "/" not in name
    }
    record["outputs"] |= file_digests(hub / "adapter_config.json")
    (hub / "run.json").write_text(json.dumps(record))
    with monkeypatch.context() as patch:
        patch.setattr("mllmrec.models.adapters.model_identity", lambda name: record["base"])
        check_adapter(hub, "one/model")
        with pytest.raises(
            InputError,
            match=r"which is another model than other/model "
            r"\(the name was one/model, is other/model\)",
        ):
            check_adapter(hub, "other/model")
    weights = bytearray((moved / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (moved / "model.safetensors").write_bytes(weights)
    with pytest.raises(
        InputError, match=r"which is another model than .*moved \(model.safetensors was"
    ):
        check_adapter(adapter, str(moved))


def test_fsdp_wraps_layers_that_every_model_has(monkeypatch):
    """PEFT takes the names from the environment, else from a list that LLaVA does not match."""
    from peft.utils.other import fsdp_auto_wrap_policy

    for make in MODELS.values():
        model = add_lora(make()[0], FineTuningOptions())
        monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", decoder_layer_class(model))
        assert fsdp_auto_wrap_policy(model)


def test_with_several_gpus_in_sight_a_process_uses_one(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "transformers.TrainingArguments.n_gpu", property(lambda self: getattr(self, "_n_gpu", 4))
    )
    options = training_arguments(FineTuningOptions(output_dir=str(tmp_path)), True, "auc")
    assert options.n_gpu <= 1


def test_no_checkpoint_is_saved_between_an_epochs_last_step_and_its_validation():
    from types import SimpleNamespace

    from transformers import TrainerControl, TrainerState

    saves, logs = [], []
    for step in range(1, 21):
        control = TrainerControl()
        TrainingEvents(None, FineTuningOptions(checkpoint_steps=5)).on_step_end(
            SimpleNamespace(num_train_epochs=2.0),
            TrainerState(global_step=step, max_steps=20),
            control,
        )
        saves += [step] if control.should_save else []
        logs += [step] if control.should_log else []
    assert saves == logs == [5, 15]


def test_the_mean_loss_counts_every_step_once():
    log = [
        {"step": 10, "loss": 1.0},
        {"step": 13, "loss": 3.0},
        {"step": 13, "eval_auc": 0.5},
        {"step": 20, "loss": 2.0},
    ]
    assert mean_loss(log) == pytest.approx((10 * 1 + 3 * 3 + 7 * 2) / 20)


def test_the_options_of_the_config_reach_the_trainer(tmp_path):
    args = FineTuningOptions(
        output_dir=str(tmp_path),
        dtype="bfloat16",
        epochs=3,
        learning_rate=1e-4,
        batch_size=2,
        accumulation=4,
        warmup_ratio=0.1,
        schedule="cosine",
        clip=0.5,
        seed=7,
        gradient_checkpointing=True,
        workers=3,
        save_total=5,
        logging_steps=6,
    )
    options = training_arguments(args, True, "auc")
    assert (options.num_train_epochs, options.learning_rate, options.seed) == (3, 1e-4, 7)
    assert (options.per_device_train_batch_size, options.gradient_accumulation_steps) == (2, 4)
    assert (options.get_warmup_steps(100), options.lr_scheduler_type, options.max_grad_norm) == (
        10,
        "cosine",
        0.5,
    )
    assert (options.bf16, options.fp16, options.activation_checkpointing) == (True, False, True)
    assert (options.dataloader_num_workers, options.save_total_limit, options.logging_steps) == (
        3,
        5,
        6,
    )
    assert options.output_dir == str(tmp_path / "mllm_msr" / "checkpoints")
    args.dtype = "float16"
    assert training_arguments(args, True, "auc").fp16


def test_a_text_model_is_refused_where_images_are_needed():
    with pytest.raises(InputError, match=r"\(llama\) takes no images; name a multimodal --model"):
        load_multimodal(str(TINY / "llama"))
