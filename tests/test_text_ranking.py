"""Rows without images, other answer sets: a text model through the same trainer and scorer."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, saved
from random_models import random_llama

from mllmrec.data.candidates import candidates, users_of_split
from mllmrec.evaluation.metrics import CandidateLists, evaluate, pooled_auc
from mllmrec.models.chat import ChatProcessor
from mllmrec.models.loading import load_text
from mllmrec.prompts.templates import user_turn
from mllmrec.ranking.answers import LETTERS, YES_NO, AnswerSet, answer_tokens
from mllmrec.ranking.batches import Collator, EpochSampler, EpochSettings
from mllmrec.ranking.questions import list_row
from mllmrec.ranking.reader import RowReader
from mllmrec.ranking.rows import check_training_rows
from mllmrec.ranking.scoring import ScoringOptions, candidate_scores, score_rows
from mllmrec.ranking.trainer import RankingTrainer, load_with_lora
from mllmrec.ranking.training_options import FineTuningOptions
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import read_by_id, read_rows

pytestmark = pytest.mark.filterwarnings("ignore")
TRAIN, SCORE = "MLLM-MSR/train/train_llava_sft.py", "MLLM-MSR/test/test_with_llava_sft.py"
QUESTION = "Watched: {preference}. Candidate: {title}. Yes or no?"


@pytest.fixture(scope="module")
def titles(small_run):
    """(users, item id -> title) of the small run."""
    items = read_by_id(small_run.folder / "items.jsonl", "item_id")
    users = read_rows(small_run.folder / "users.jsonl")
    return users, {item_id: row["title"] for item_id, row in items.items()}


def letter_row(user, titles, answers=None):
    """A user's history, and all candidates with a letter each, in the order of their ids."""
    listed = sorted(item_id for item_id, _ in candidates(user))[:20]
    lines = [f"{letter}: {titles[i]}" for letter, i in zip(LETTERS.answers, listed, strict=False)]
    history = ", ".join(titles[i] for i in user["history"][-5:])
    question = f"Watched: {history}. Which one next? {'; '.join(lines)}. Answer with the letter."
    place = listed.index(user["target"]) if user["target"] in listed else None
    return list_row(user["user_id"], listed, question, place, answers)


@pytest.fixture(scope="module")
def text_run(small_run, tmp_path_factory):
    """Stages 4 to 6 with a text model, on titles and preferences only."""
    folder = tmp_path_factory.mktemp("text")
    where = ["--output_dir", str(folder), "--system", "text"]
    preferences = small_run.system / "user_preferences.jsonl"
    words = [*where, "--preferences", str(preferences), "--recommend_prompt", QUESTION]
    words += ["--with_images", "false"]
    for stage in ("MLLM-MSR/train/dataset_create.py", "MLLM-MSR/test/multi_col_dataset.py"):
        small_run.run(stage, *words)
    base = ["--model", str(TINY / "llama"), *where]
    small_run.run(
        TRAIN, *base, "--group_by", "item", "--batch_size", "4", "--learning_rate", "5e-3"
    )
    small_run.run(SCORE, *base, "--hide", "nothing")
    for stage in ("baselines/popularity.py", "test/compute_metrics.py", "test/report.py"):
        more = where[:2] if "popularity" in stage else where
        small_run.run(f"MLLM-MSR/{stage}", *more)
    return SimpleNamespace(folder=folder / "text")


def test_a_text_model_trains_and_scores_through_the_same_stages(text_run, small_run):
    rows, scores = read_rows(text_run.folder / "test.jsonl"), text_run.folder / "text_sft"
    scored = read_rows(scores / "scores.jsonl")
    assert all(row["images"] == [] for row in rows)
    assert not any(
        part["type"] == "image" for row in rows for part in row["messages"][0]["content"]
    )
    assert [(row["user_id"], row["item_id"]) for row in rows] == [
        (row["user_id"], row["item_id"]) for row in scored
    ]
    assert all(set(row["logits"]) == {"No", "Yes"} for row in scored)
    assert 0 < evaluate(scored, resamples=2)["auc"] < 1
    page = (text_run.folder.parent / "report.html").read_text()
    assert "text_sft" in page
    assert 'class="block"' in page, "histories are shown without preferences, too"
    log = read_rows(text_run.folder / "training_log.jsonl")
    assert [row for row in log if "eval_auc" in row], "validated by ranking"
    model, _ = load_with_lora(FineTuningOptions(model=str(TINY / "llama"), lora_layers=["q_proj"]))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all("q_proj" in name for name in trained)


def test_rows_with_images_are_refused_by_a_text_model(small_run):
    with pytest.raises(
        InputError, match="have images, but the model takes none; name a multimodal"
    ):
        words = ("--model", str(TINY / "llama"), "--adapter", "none", "--variant", "no_images")
        small_run.run(SCORE, *words)


@pytest.fixture(scope="module")
def llama():
    model, tokenizer = load_text(str(TINY / "llama"))
    return model, ChatProcessor(tokenizer)


def test_the_letters_are_different_tokens_in_rendered_text(llama):
    _, chat = llama
    tokens = answer_tokens(chat, LETTERS)
    assert len(set(tokens.first_ids)) == len(LETTERS.answers) == 26
    for letter, text, ids in zip(LETTERS.answers, tokens.texts, tokens.ids, strict=True):
        assert text == f"{letter}<|eot_id|>"
        assert chat.decode(ids) == letter


def test_an_answer_set_whose_answers_start_alike_is_refused(llama):
    with pytest.raises(InputError, match="starts 'Yes' and 'Yes, please' with the same token"):
        answer_tokens(llama[1], AnswerSet(("No", "Yes", "Yes, please")))


def test_the_same_users_are_trained_and_scored_with_letters(text_run, titles, tmp_path):
    """The trainer learns which letter is right (always the same one), and scores rank by it."""
    users, names = titles
    options = FineTuningOptions(
        model=str(TINY / "llama"),
        output_dir=str(tmp_path),
        epochs=4,
        batch_size=4,
        accumulation=1,
        learning_rate=1e-2,
        lora_dropout=0.0,
        group_by="item",
    )
    rows = [letter_row(user, names, LETTERS.answers) for user in users]
    rows = [row for row in rows if row["label"] is not None]
    for row in rows:  # the target moves to place B, so that there is something to learn
        listed, place = row["item_ids"], row["label"]
        listed[1], listed[place], row["label"] = listed[place], listed[1], 1
        row["messages"][1]["content"][0]["text"] = "B"
    train = [row for row in rows if len(row["item_ids"]) == 2]
    held_out = [row for row in rows if len(row["item_ids"]) == 20]
    assert len(train) > 10
    assert len(held_out) > 10
    assert check_training_rows(rows, "train.jsonl", LETTERS.answers) == {}
    model, chat = load_with_lora(options)
    reader = RowReader(chat, tmp_path, answers=LETTERS)
    batch = Collator(reader, "answer")(train[:2])
    letter = answer_tokens(chat, LETTERS).first_ids[1]
    assert batch["labels"][:, 0].tolist() == [letter, letter]
    sampler = EpochSampler(train, None, EpochSettings.of(options))
    collator = Collator(reader, share_prefix=True)
    trainer = RankingTrainer(model, sampler, collator, held_out, options, best_by="auc")
    before = trainer.evaluate()["eval_auc"]
    trainer.train()
    assert trainer.evaluate()["eval_auc"] > max(before, 0.95)
    question_only = [{**row, "messages": row["messages"][:1]} for row in held_out]
    lines = [
        line
        for index, logits in score_rows(trainer.model.eval(), reader, question_only)
        for line in candidate_scores(question_only[index], logits, LETTERS)
    ]
    assert len(lines) == sum(len(row["item_ids"]) for row in held_out)
    for user_id, group in itertools.groupby(lines, key=lambda line: line["user_id"]):
        own = list(group)
        assert sum(line["score"] for line in own) == pytest.approx(1.0), user_id
        assert [letter for line in own for letter in line["logits"]] == list(LETTERS.answers)[
            : len(own)
        ]
    assert pooled_auc(CandidateLists.of(lines)) > 0.95


def test_a_retrieved_list_without_its_target_is_scored_and_counts_as_a_miss(llama, titles):
    model, chat = llama
    users, names = titles
    rows = [letter_row(user, names) for user in users_of_split(users, "test")[:4]]
    rows[0] |= {"label": None}
    rows[1] |= {"item_ids": rows[1]["item_ids"][:7], "label": 3}
    reader = RowReader(chat, ".", answers=LETTERS)
    lines = [
        line
        for index, logits in score_rows(model, reader, rows)
        for line in candidate_scores(rows[index], logits, LETTERS)
    ]
    metrics = evaluate(lines, resamples=5, retrieved=True)
    with_target = sum(row["label"] is not None for row in rows)
    assert (metrics["users"], metrics["auc_users"]) == (4, with_target)
    assert metrics["hr@10"] <= with_target / 4
    with pytest.raises(InputError, match="has 0 positives and 20 negatives"):
        evaluate([line for line in lines if line["user_id"] == rows[0]["user_id"]])


@pytest.mark.parametrize("share_prefix", [False, True])
def test_text_rows_of_a_user_share_their_prefix_without_changing_a_score_or_a_loss(
    text_run, llama, share_prefix
):
    model, chat = llama
    reader = RowReader(chat, text_run.folder)
    rows = read_rows(text_run.folder / "test.jsonl")[:42]
    options = ScoringOptions(reuse_prefix=share_prefix)
    scored = dict(score_rows(model, reader, rows, options))
    tokens = answer_tokens(chat, YES_NO).first_ids
    for index in (0, 7, 41):
        batch = chat.encode([chat.render(rows[index]["messages"])])
        with torch.no_grad():
            logits = model(**batch).logits[0, -1, tokens].tolist()
        assert scored[index] == pytest.approx(logits, abs=1e-4)
    training = read_rows(text_run.folder / "train.jsonl")[:6]
    losses = []
    for shared in (False, True):
        collator = Collator(reader, "answer", share_prefix=shared)
        collator.in_parts = False
        with torch.no_grad():
            losses.append(model(**collator(training)).loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_prefixes_of_text_rows_are_computed_once_per_user(text_run, llama):
    model, chat = llama
    rows = read_rows(text_run.folder / "test.jsonl")[:63]
    sizes = []
    hook = model.model.embed_tokens.register_forward_hook(
        lambda _, inputs, __: sizes.append(inputs[0].numel())
    )
    reader = RowReader(chat, text_run.folder)
    list(score_rows(model, reader, rows, ScoringOptions(reuse_prefix=True)))
    shared = sum(sizes)
    sizes.clear()
    list(score_rows(model, reader, rows, ScoringOptions(reuse_prefix=False)))
    hook.remove()
    assert shared < sum(sizes) / 2


class Watched:
    """A reader that remembers which rows it rendered and which images it decoded."""

    def __init__(self, reader, monkeypatch):
        self.prompts, self.images = [], []
        whole_prompt, whole_image = reader.prompt, reader.image
        monkeypatch.setattr(
            reader, "prompt", lambda row: self.prompts.append(row["item_id"]) or whole_prompt(row)
        )
        monkeypatch.setattr(
            reader, "image", lambda row: self.images.append(row["item_id"]) or whole_image(row)
        )


def test_only_rows_that_are_scored_are_rendered_and_decoded(small_run, monkeypatch):
    """Of two processes each takes its chunks; a resumed run leaves finished chunks alone."""
    from mllmrec.models.loading import load_multimodal
    from mllmrec.ranking import scoring

    monkeypatch.setattr(scoring, "GROUPS_PER_CHUNK", 8)
    model, processor = load_multimodal(str(TINY / "llava"))
    rows = read_rows(small_run.system / "test.jsonl")
    reader = RowReader(ChatProcessor(processor), small_run.system)
    watched = Watched(reader, monkeypatch)
    whole = dict(score_rows(model, reader, rows))
    assert len(watched.prompts) == len(rows)
    all_images, parts = set(watched.images), []
    for process in (0, 1):
        watched.prompts.clear(), watched.images.clear()
        part = dict(score_rows(model, reader, rows, ScoringOptions(shard=(process, 2))))
        assert len(watched.prompts) == len(part) < len(rows)
        assert len(set(watched.images)) < len(all_images)
        parts.append(part)
    assert parts[0] | parts[1] == whole
    left = {index for index in whole if rows[index]["item_id"] == rows[-1]["item_id"]}
    watched.prompts.clear(), watched.images.clear()
    assert dict(score_rows(model, reader, rows, wanted=left)) == {i: whole[i] for i in left}
    assert 0 < len(set(watched.images)) <= 8
    watched.prompts.clear(), watched.images.clear()
    assert list(score_rows(model, reader, rows, wanted=set())) == []
    assert watched.prompts == watched.images == []


def test_a_model_without_chat_template_takes_a_prompt_format(small_run, text_run, tmp_path):
    """A base Llama in stages 3 and 6; without the format it is refused with the remedy."""
    model, tokenizer = random_llama("tiny")
    tokenizer.chat_template = None
    name = saved((model, tokenizer), tmp_path / "model")
    words = ("--model", name, "--output_dir", str(tmp_path), "--limit", "2")
    summaries = ("--summaries", str(small_run.system / "image_summaries.jsonl"))
    stage = "Inference/preference_recurrent.py"
    with pytest.raises(InputError, match=r"has no chat template; .* or give a --prompt_format"):
        small_run.run(stage, *words, *summaries)
    prompt_format = ("--prompt_format", "Request: {text} Response:")
    small_run.run(stage, *words, *summaries, *prompt_format, "--max_new_tokens", "4")
    assert len(read_rows(tmp_path / "mllm_msr" / "user_preferences.jsonl")) == 2
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "test.jsonl").symlink_to(text_run.folder / "test.jsonl")
    score = (*words, *prompt_format, "--system", "text", "--adapter", "none")
    small_run.run(SCORE, *score)
    assert len(read_rows(tmp_path / "text" / "text_zero_shot" / "scores.jsonl")) == 42
    chat = ChatProcessor(tokenizer, prompt_format="Request: {text} Response:")
    tokens = answer_tokens(chat, YES_NO)
    assert tokens.texts == (f" No{tokenizer.eos_token}", f" Yes{tokenizer.eos_token}")
    rendered = chat.render([user_turn("a {text} in braces {image}")])
    assert rendered == "Request: a {text} in braces {image} Response:"
    with pytest.raises(InputError, match=r"lacks the place \{text\}"):
        ChatProcessor(tokenizer, prompt_format="Request:")


def test_a_blip_2_processor_describes_images_through_a_prompt_format(small_run, tmp_path):
    name = random_blip2(tmp_path / "model")
    words = ("--model", name, "--output_dir", str(tmp_path), "--limit", "6")
    prompt_format = ("--prompt_format", "Question: {text} Answer:")
    small_run.run("Inference/image_summary.py", *words, *prompt_format, "--max_new_tokens", "5")
    together = read_rows(tmp_path / "mllm_msr" / "image_summaries.jsonl")
    assert len(together) == 6
    assert len({row["summary"] for row in together}) > 1, "the image is attended to"
    more = ("--batch_tokens", "1", "--system", "single")
    small_run.run(
        "Inference/image_summary.py", *words, *prompt_format, "--max_new_tokens", "5", *more
    )
    assert read_rows(tmp_path / "single" / "image_summaries.jsonl") == together


def random_blip2(folder):
    """Folder of a random tiny Blip2ForConditionalGeneration; it has no chat template."""
    from transformers import (
        AutoTokenizer,
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2Processor,
        BlipImageProcessorPil,
    )

    tokenizer = AutoTokenizer.from_pretrained(TINY / "llama")
    tokenizer.chat_template = None
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    text = {
        "model_type": "opt",
        "vocab_size": len(tokenizer),
        "ffn_dim": 64,
        "word_embed_proj_dim": 32,
        "max_position_embeddings": 512,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **size,
    }
    config = Blip2Config(
        vision_config={**size, "intermediate_size": 64, "image_size": 32, "patch_size": 8},
        qformer_config={
            **size,
            "intermediate_size": 64,
            "encoder_hidden_size": 32,
            "vocab_size": 32,
        },
        text_config=text,
        num_query_tokens=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(0)
    model = Blip2ForConditionalGeneration(config)
    with (
        torch.no_grad()
    ):  # at the usual scale of weights this small, images hardly change the logits
        for parameter in model.parameters():
            parameter.mul_(6)
    image_processor = BlipImageProcessorPil(size={"height": 32, "width": 32})
    processor = Blip2Processor(image_processor, tokenizer, num_query_tokens=4)
    return saved((model, processor), folder)


@pytest.mark.parametrize("kind", ["gpt2", "opt", "llama"])
def test_memory_per_token_without_num_key_value_heads(kind):
    """GPT-2 and OPT have one key and value head per attention head, and their configs name none."""
    from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

    from mllmrec.generation.prefill import kv_bytes_per_token

    sizes = {
        "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 50},
        "opt": {
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "ffn_dim": 64,
            "vocab_size": 50,
            "word_embed_proj_dim": 32,
        },
        "llama": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 50,
        },
    }[kind]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).eval()
    assert hasattr(model.config, "num_key_value_heads") == (kind == "llama")
    ids = torch.arange(10)[None]
    with torch.no_grad():
        cache = model(input_ids=ids, past_key_values=DynamicCache(), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert kv_bytes_per_token(model) == held / ids.numel()
    assert np.isfinite(kv_bytes_per_token(model))
