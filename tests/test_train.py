"""Fine-tuning: the loss is where it should be, LoRA is where it should be, and it learns from labels only."""

import json
import random

import pytest
import torch
from conftest import TINY, script, small_config

from data_processing.jsonl import read_rows, write_rows
from Inference.chat import Chat
from Inference.models import load_multimodal
from Inference.scoring import PairReader

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def stage():
    return script("MLLM-MSR/train/train_llava_sft.py")


@pytest.fixture(scope="module")
def pairs(small_run):
    return small_run.folder, read_rows(small_run.folder / "train.jsonl")


@pytest.fixture
def collators(stage, pairs):
    _, processor = load_multimodal(str(TINY / "llava"))
    reader = PairReader(Chat(processor), pairs[0])
    return stage.Collator(reader, "answer"), stage.Collator(reader, "sequence")


def test_the_training_text_is_the_scoring_text_plus_the_answer(collators, pairs):
    collator = collators[0]
    for row in pairs[1][:20]:
        scoring_text, _ = collator.reader.prompt(row)
        assert collator.text(row) == scoring_text + collator.chat.answer_texts[row["label"]]
        assert collator.text(row) == collator.chat.render(row["messages"], answer_follows=False)


def test_the_answer_loss_is_the_full_loss_at_the_answer(collators, pairs):
    """Logits for the answer's positions only give the loss that full logits with all other labels masked give."""
    model, _ = load_multimodal(str(TINY / "llava"))
    collator, rows = collators[0], of_mixed_lengths(pairs[1])
    batch = collator(rows)
    assert batch["logits_to_keep"].shape == (6, 2), "Yes or No, and what ends the turn"
    full = collator.chat.encode([collator.text(row) for row in rows], [collator.reader.image(row) for row in rows], side="right")
    full["labels"] = torch.full_like(full["input_ids"], -100)
    for n, (row, length) in enumerate(zip(rows, full["attention_mask"].sum(1).tolist(), strict=True)):
        answer = collator.chat.answer_ids[row["label"]]
        full["labels"][n, length - len(answer) : length] = torch.tensor(answer)
    with torch.no_grad():
        short, long = model(**batch), model(**full)
    assert short.logits.shape[:2] == (6, 2), "no other position's logits are computed"
    assert short.loss.item() == pytest.approx(long.loss.item(), abs=1e-5)


def of_mixed_lengths(rows):
    """Six rows, the first one's question shortened."""
    (turn, answer), words = rows[0]["messages"], rows[0]["messages"][0]["content"][1]["text"].split()
    shorter = {**turn, "content": [turn["content"][0], {"type": "text", "text": " ".join(words[:-3])}]}
    return [{**rows[0], "messages": [shorter, answer]}, *rows[1:6]]


def test_the_sequence_loss_counts_all_text_and_no_image_or_padding(collators, pairs):
    batch = collators[1](of_mixed_lengths(pairs[1]))
    ids, labels = batch["input_ids"], batch["labels"]
    is_image, is_padding = ids == collators[1].chat.image_token_id, batch["attention_mask"] == 0
    assert is_image.any()
    assert is_padding.any()
    assert torch.equal(labels == -100, is_image | is_padding)
    assert torch.equal(labels[labels != -100], ids[labels != -100])


def test_a_batch_is_padded_on_the_right(collators, pairs):
    mask = collators[0](of_mixed_lengths(pairs[1]))["attention_mask"]
    assert (mask == 0).any()
    assert (mask.diff(dim=1) <= 0).all()


def tiny_llava_15():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16
    )
    text = LlamaConfig(vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=98))


def tiny_qwen_25_vl():
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    }  # fmt: skip
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))


@pytest.mark.parametrize(
    "make", [lambda: load_multimodal(str(TINY / "llava"))[0], tiny_llava_15, tiny_qwen_25_vl], ids=["next", "1.5", "qwen"]
)
def test_lora_is_on_the_language_model_and_nowhere_else(stage, make):
    model = stage.add_lora(make(), stage.Args())
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable
    assert all("language_model" in name and "lora_" in name for name in trainable)
    assert not any(word in name for name in trainable for word in ("vision", "visual", "projector", "merger", "lm_head"))
    kinds = {name.split(".lora_")[0].rsplit(".", 1)[1] for name in trainable}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_lora_layers_can_be_chosen_and_unknown_ones_are_refused(stage):
    from data_processing.errors import InputError

    model = stage.add_lora(tiny_llava_15(), stage.Args(lora_layers=["q_proj", "v_proj"]))
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert {name.split(".lora_")[0].rsplit(".", 1)[1] for name in trainable} == {"q_proj", "v_proj"}
    with pytest.raises(InputError, match="no linear layers called 'query'; it has down_proj"):
        stage.add_lora(tiny_llava_15(), stage.Args(lora_layers=["query"]))


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A world of 400 users with preferences by the rule (what a perfect stage 3 writes): metrics of three trainings."""
    from data_processing import sample_world as world
    from data_processing.metrics import evaluate

    folder = tmp_path_factory.mktemp("learned")
    config = small_config(folder)
    text = config.read_text().replace("n_users: 30", "n_users: 700").replace("n_items: 60", "n_items: 200")
    config.write_text(text.replace("epochs: 1", "epochs: 3").replace("validation_fraction: 0.2", "validation_fraction: 0.0"))
    options = ["--config", str(config)]
    script("data_processing/sample.py").main(options)
    items = world_items(folder)
    rows = []
    for user in read_rows(folder / "users.jsonl"):
        kept = world.rolled_preferences([items[i] for i in user["history"]])
        rows.append({"user_id": user["user_id"], "preference": world.preference_text(kept[-1]), "blocks": []})
    write_rows(folder / "user_preferences.jsonl", rows)
    script("MLLM-MSR/train/dataset_create.py").main(options)
    script("MLLM-MSR/test/multi_col_dataset.py").main([*options, "--limit", "160"])
    train, score = script("MLLM-MSR/train/train_llava_sft.py"), script("MLLM-MSR/test/test_with_llava_sft.py")
    options += ["--hide", "nothing"]
    score.main([*options, "--adapter", "none"])
    train.main(options[:2])
    score.main(options)
    shuffled = read_rows(folder / "train.jsonl")
    labels = [row["label"] for row in shuffled]
    random.Random(0).shuffle(labels)
    for row, label in zip(shuffled, labels, strict=True):
        row["label"] = label
        row["messages"][1]["content"][0]["text"] = ["No", "Yes"][label]
    write_rows(folder / "train.jsonl", shuffled)
    (folder / "adapter").rename(folder / "adapter_of_true_labels")
    train.main([*options[:2], "--overwrite", "true"])
    score.main([*options, "--variant", "shuffled"])
    return {name: evaluate(read_rows(folder / name / "scores.jsonl"), resamples=1) for name in ("zero_shot", "sft", "shuffled")}


def world_items(folder):
    """dict item_id -> colour, shape, topic, as the world of `folder` was drawn."""
    from data_processing import sample

    items, _, _ = sample.build_world(sample.Args(seed=42, n_items=200, n_users=700))
    return {f"i{n:03d}": item for n, item in enumerate(items)}


def test_training_teaches_the_task(learned):
    assert learned["sft"]["users"] == 160
    assert learned["zero_shot"]["auc"] <= 0.68
    assert learned["sft"]["auc"] >= learned["zero_shot"]["auc"] + 0.1
    assert learned["sft"]["auc"] >= 0.75


def test_shuffled_labels_give_no_gain(learned):
    """160 users: the standard error of an AUC is about .02."""
    gain = learned["sft"]["auc"] - learned["zero_shot"]["auc"]
    assert learned["shuffled"]["auc"] - learned["zero_shot"]["auc"] <= min(0.06, gain / 3)


def test_other_settings_are_not_mixed_into_an_adapter(small_run):
    from data_processing.errors import InputError

    before = (small_run.folder / "adapter" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(InputError, match=r"was trained with other settings \(lora_r was 16, is 4\)"):
        small_run.run("MLLM-MSR/train/train_llava_sft.py", "--lora_r", "4")
    assert (small_run.folder / "adapter" / "adapter_model.safetensors").read_bytes() == before


def test_an_empty_training_file_is_refused_before_the_model_is_loaded(small_run, tmp_path, monkeypatch):
    from data_processing.errors import InputError

    for name in ("train", "validation"):
        (tmp_path / f"{name}.jsonl").write_text("")
    monkeypatch.setattr("Inference.models.load_multimodal", None)
    with pytest.raises(InputError, match=r"train.jsonl is empty; make it again with scripts/04_datasets.sh"):
        small_run.run("MLLM-MSR/train/train_llava_sft.py", "--output_dir", str(tmp_path))


def test_the_adapter_of_another_base_is_refused(small_run, tmp_path):
    from data_processing.errors import InputError
    from Inference.models import attach_adapter

    config = json.loads((small_run.folder / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "someone/other-model"}))
    with pytest.raises(InputError, match=r"was trained on someone/other-model, not on .*llava; pass the matching"):
        attach_adapter(None, tmp_path, str(TINY / "llava"))


def test_a_text_model_is_refused_as_a_recommender():
    from data_processing.errors import InputError

    with pytest.raises(InputError, match=r"\(llama\) takes no pictures; name a multimodal --model"):
        load_multimodal(str(TINY / "llama"))
