"""Rows without images, other answer sets: a text model through the same trainer and scorer."""

import itertools
import re
from collections import Counter
from unittest.mock import Mock

import pytest
import torch
import transformers
from conftest import TINY, report_data_of, saved
from random_models import random_llama, special_ids

from mllmrec.data.candidates import candidates, users_of_split
from mllmrec.evaluation.metrics import CandidateLists, evaluate, pooled_auc
from mllmrec.generation.preferences import PreferenceOptions
from mllmrec.generation.prefill import kv_bytes_per_token
from mllmrec.models.chat import ChatProcessor
from mllmrec.models.loading import load_multimodal, load_text
from mllmrec.prompts import mllm_msr as prompts
from mllmrec.prompts.templates import user_turn
from mllmrec.ranking import scoring
from mllmrec.ranking.answers import LETTERS, YES_NO, AnswerSet, answer_tokens
from mllmrec.ranking.batches import Collator, EpochSampler, EpochSettings
from mllmrec.ranking.questions import list_row
from mllmrec.ranking.reader import RowReader
from mllmrec.ranking.row_checks import check_training_rows
from mllmrec.ranking.rows import question_text
from mllmrec.ranking.scoring import ScoringOptions, candidate_scores, score_rows, write_scores
from mllmrec.ranking.trainer import RankingTrainer, load_with_lora
from mllmrec.ranking.training_options import FineTuningOptions
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import read_by_id, read_rows
from mllmrec.stage.options import CommonOptions
from mllmrec.stage.output import RowOutput
from mllmrec.stage.provenance import file_digest
from mllmrec.stage.record import Job, read_record

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


def scored_lines(model, reader, rows):
    """Lines of scores.jsonl for rows whose answers are letters."""
    found = score_rows(model, reader, rows)
    return [line for n, logits in found for line in candidate_scores(rows[n], logits, LETTERS)]


@pytest.fixture(scope="module")
def text_run(small_run, tmp_path_factory):
    """Folder of stages 4 to 6 with a text model, on titles and preferences only."""
    folder = tmp_path_factory.mktemp("text")
    where = ["--output_dir", str(folder), "--system", "text"]
    preferences = small_run.system / "user_preferences.jsonl"
    words = [*where, "--preferences", str(preferences), "--recommend_prompt", QUESTION]
    for stage in ("MLLM-MSR/train/dataset_create.py", "MLLM-MSR/test/multi_col_dataset.py"):
        small_run.run(stage, *words, "--with_images", "false")
    base = ["--model", str(TINY / "llama"), *where]
    by_item = ["--group_by", "item", "--batch_size", "4", "--learning_rate", "5e-3"]
    small_run.run(TRAIN, *base, *by_item)
    small_run.run(SCORE, *base, "--hide", "nothing")
    small_run.run("MLLM-MSR/baselines/popularity.py", *where[:2])
    for stage in ("compute_metrics.py", "report.py"):
        small_run.run(f"MLLM-MSR/test/{stage}", *where)
    return folder / "text"


def test_a_text_model_trains_and_scores_through_the_same_stages(text_run):
    rows, scored = (read_rows(text_run / f) for f in ("test.jsonl", "text_sft/scores.jsonl"))
    assert all(row["images"] == [] for row in rows)
    assert {part["type"] for row in rows for part in row["messages"][0]["content"]} == {"text"}
    assert [ids(row) for row in rows] == [ids(row) for row in scored]
    assert all(set(row["logits"]) == {"No", "Yes"} for row in scored)
    assert 0 < evaluate(scored, resamples=2)["auc"] < 1
    page = (text_run.parent / "report.html").read_text()
    assert "text_sft" in page
    users = report_data_of(text_run.parent / "report.html")["users"]
    assert users[0]["details"]["blocks"][0]["items"], "histories are shown without preferences, too"
    log = read_rows(text_run / "training_log.jsonl")
    assert [row for row in log if "eval_auc" in row], "validated by ranking"
    model, _ = load_with_lora(FineTuningOptions(model=str(TINY / "llama"), lora_layers=["q_proj"]))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all("q_proj" in name for name in trained)


def test_without_images_no_prompt_speaks_of_one_and_nothing_waits_for_stage_2(
    small_run, tmp_path, capsys
):
    words = ["--output_dir", str(tmp_path), "--with_images", "false", "--domain", "movie"]
    small_run.run("Inference/image_summary.py", *words)
    out, err = capsys.readouterr()
    assert "there is no image to describe" in out
    assert "next: " in err and "scripts/03_preference.sh" in err
    words += ["--limit", "2"]
    small_run.run("Inference/preference_recurrent.py", *words, "--model", str(TINY / "llama"))
    rows = read_rows(tmp_path / "mllm_msr/user_preferences.jsonl")
    users = read_by_id(small_run.folder / "users.jsonl", "user_id")
    counts = Counter(users[row["user_id"]]["split"] for row in rows)
    assert counts == {"train": 2, "validation": 2, "test": 2}, "of each split"
    given = read_record(tmp_path / "mllm_msr/user_preferences.jsonl")["arguments"]
    assert given["first_prompt"] == prompts.WITHOUT_IMAGES["first_prompt"]
    small_run.run("MLLM-MSR/test/multi_col_dataset.py", *words)
    asked = read_rows(tmp_path / "mllm_msr/test.jsonl")
    assert len(asked) == 42 and all(row["images"] == [] for row in asked)
    text = question_text(asked[0])
    shared = text[: asked[0]["preference_span"][1]]
    likes = {row["user_id"]: row["preference"] for row in rows}
    assert shared == f"The taste of a viewer: {likes[asked[0]['user_id']]}"
    assert all(question_text(row).startswith(shared) for row in asked[:21])
    assert "Will this viewer watch the movie called " in text
    for template in prompts.WITHOUT_IMAGES.values():
        assert not re.search("image|cover|poster|visual|summary", template)
    own = PreferenceOptions(with_images=False, first_prompt="my own {block}")
    assert own.first_prompt == "my own {block}"


def ids(row):
    return row["user_id"], row["item_id"]


def test_rows_with_images_are_refused_by_a_text_model(small_run):
    words = ("--model", str(TINY / "llama"), "--adapter", "none", "--variant", "no_images")
    message = "have images, but the model takes none; name a multimodal"
    with pytest.raises(InputError, match=message):
        small_run.run(SCORE, *words)


@pytest.fixture(scope="module")
def llama():
    model, tokenizer = load_text(str(TINY / "llama"))
    return model, ChatProcessor(tokenizer)


def test_the_letters_are_different_tokens_in_rendered_text(llama):
    tokens = answer_tokens(llama[1], LETTERS)
    assert len(set(tokens.first_ids)) == len(LETTERS.answers) == 26
    assert list(tokens.texts) == [f"{letter}<|eot_id|>" for letter in LETTERS.answers]
    assert [llama[1].decode(ids) for ids in tokens.ids] == list(LETTERS.answers)


def test_an_answer_set_whose_answers_start_alike_is_refused(llama):
    with pytest.raises(InputError, match="starts 'Yes' and 'Yes, please' with the same token"):
        answer_tokens(llama[1], AnswerSet(("No", "Yes", "Yes, please")))


def test_the_same_users_are_trained_and_scored_with_letters(titles, tmp_path):
    """The trainer learns which letter is right (always the same one), and scores rank by it."""
    where = {"model": str(TINY / "llama"), "output_dir": str(tmp_path), "group_by": "item"}
    steps = {"epochs": 2, "batch_size": 4, "accumulation": 1, "learning_rate": 1e-2}
    options = FineTuningOptions(**where, **steps, lora_dropout=0.0)
    rows = [letter_row(user, titles[1], LETTERS.answers) for user in titles[0]]
    rows = [row for row in rows if row["label"] is not None]
    for row in rows:  # the target moves to place B, so that there is something to learn
        listed, place = row["item_ids"], row["label"]
        listed[1], listed[place], row["label"] = listed[place], listed[1], 1
        row["messages"][1]["content"][0]["text"] = "B"
    train, held_out = ([row for row in rows if len(row["item_ids"]) == n] for n in (2, 20))
    assert min(len(train), len(held_out)) > 10
    assert check_training_rows(rows, "train.jsonl", LETTERS.answers) == {}
    model, chat = load_with_lora(options)
    reader = RowReader(chat, tmp_path, answers=LETTERS)
    letter = answer_tokens(chat, LETTERS).first_ids[1]
    assert Collator(reader, "answer")(train[:2])["labels"][:, 0].tolist() == [letter, letter]
    sampler = EpochSampler(train, None, EpochSettings.of(options))
    collator = Collator(reader, share_prefix=True)
    trainer = RankingTrainer(model, sampler, collator, held_out, options, best_by="auc")
    before = trainer.evaluate()["eval_auc"]
    trainer.train()
    assert trainer.evaluate()["eval_auc"] > max(before, 0.95)
    questions = [{**row, "messages": row["messages"][:1]} for row in held_out]
    lines = scored_lines(trainer.model.eval(), reader, questions)
    assert len(lines) == sum(len(row["item_ids"]) for row in held_out)
    for user_id, group in itertools.groupby(lines, key=lambda line: line["user_id"]):
        own = list(group)
        assert sum(line["score"] for line in own) == pytest.approx(1.0), user_id
        letters = [letter for line in own for letter in line["logits"]]
        assert letters == list(LETTERS.answers)[: len(own)]
    assert pooled_auc(CandidateLists.of(lines)) > 0.95


def test_a_retrieved_list_without_its_target_is_scored_and_counts_as_a_miss(llama, titles):
    model, chat = llama
    users, names = titles
    rows = [letter_row(user, names) for user in users_of_split(users, "test")[:4]]
    rows[0] |= {"label": None}
    rows[1] |= {"item_ids": rows[1]["item_ids"][:7], "label": 3}
    lines = scored_lines(model, RowReader(chat, ".", answers=LETTERS), rows)
    metrics = evaluate(lines, resamples=5, retrieved=True)
    with_target = sum(row["label"] is not None for row in rows)
    assert (metrics["users"], metrics["auc_users"]) == (4, with_target)
    assert metrics["hr@10"] <= with_target / 4
    with pytest.raises(InputError, match="has 0 positives and 20 negatives"):
        evaluate([line for line in lines if line["user_id"] == rows[0]["user_id"]])


def test_text_rows_of_a_user_share_their_prefix_without_changing_a_score_or_a_loss(text_run, llama):
    """The prefix is computed once for a user."""
    model, chat = llama
    reader, rows = RowReader(chat, text_run), read_rows(text_run / "test.jsonl")[:63]
    n_tokens = {True: 0, False: 0}
    for shared in n_tokens:

        def count(_, inputs, __, shared=shared):
            n_tokens[shared] += inputs[0].numel()

        hook = model.model.embed_tokens.register_forward_hook(count)
        scored = dict(score_rows(model, reader, rows, ScoringOptions(reuse_prefix=shared)))
        hook.remove()
        for index in (0, 7, 41):
            batch = chat.encode([chat.render(rows[index]["messages"])])
            with torch.no_grad():
                logits = model(**batch).logits[0, -1, answer_tokens(chat, YES_NO).first_ids]
            assert scored[index] == pytest.approx(logits.tolist(), abs=1e-4)
    assert n_tokens[True] < n_tokens[False] / 2
    training, losses = read_rows(text_run / "train.jsonl")[:6], []
    for shared in (False, True):
        collator = Collator(reader, "answer", share_prefix=shared)
        collator.in_parts = False
        with torch.no_grad():
            losses.append(model(**collator(training)).loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_half_written_list_is_completed_without_a_line_twice(tmp_path, titles, llama):
    model, chat = llama
    users, names = titles
    rows = [letter_row(user, names) for user in users_of_split(users, "test")[:2]]
    reader = RowReader(chat, tmp_path, answers=LETTERS)
    wanted = sorted(scored_lines(model, reader, rows), key=lambda line: line["user_id"])
    keys = [(line["user_id"], line["item_id"]) for line in wanted]
    job = Job.of(CommonOptions(config=""), {})
    for n_before in (0, 7):  # lines that an interrupted run wrote
        path = tmp_path / f"{n_before}/scores.jsonl"
        if n_before:
            with RowOutput(path, ("user_id", "item_id"), keys, job) as output:
                for line in wanted[:n_before]:
                    output.write(line)
        with RowOutput(path, ("user_id", "item_id"), keys, job) as output:
            write_scores(model, reader, rows, output, ScoringOptions(), Mock())
        assert read_rows(path) == wanted
        assert output.rows_written == len(wanted) - n_before


def test_only_rows_that_are_scored_are_rendered_and_decoded(small_run, monkeypatch):
    """Of two processes each takes its chunks; a resumed run leaves finished chunks alone."""
    monkeypatch.setattr(scoring, "GROUPS_PER_CHUNK", 8)
    model, processor = load_multimodal(str(TINY / "llava"))
    rows = read_rows(small_run.system / "test.jsonl")
    reader = RowReader(ChatProcessor(processor), small_run.system)
    seen = {}
    for name in ("prompt", "image"):
        watched = Mock(wraps=getattr(reader, name))
        monkeypatch.setattr(reader, name, watched)
        seen[name] = watched.call_args_list

    def score(options=None, wanted=None):
        """(scores, number of rows that were rendered, number of items that were decoded)"""
        seen["prompt"].clear(), seen["image"].clear()
        scores = dict(score_rows(model, reader, rows, options or ScoringOptions(), wanted=wanted))
        items = {call.args[0]["item_id"] for call in seen["image"]}
        return scores, len(seen["prompt"]), len(items)

    whole, n_rendered, n_items = score()
    assert n_rendered == len(rows) == len(whole)
    parts = {}
    for process in (0, 1):
        part, n_rendered, n_decoded = score(ScoringOptions(shard=(process, 2)))
        assert n_rendered == len(part) < len(rows)
        assert n_decoded < n_items
        parts |= part
    assert parts == whole
    left = {index for index in whole if rows[index]["item_id"] == rows[-1]["item_id"]}
    scores, _, n_decoded = score(wanted=left)
    assert scores == {index: whole[index] for index in left}
    assert 0 < n_decoded <= 8
    assert score(wanted=set()) == ({}, 0, 0)


def test_a_model_without_chat_template_takes_a_prompt_format(small_run, text_run, tmp_path):
    """A base Llama in stages 3 and 6; without the format it is refused with the remedy."""
    model, tokenizer = random_llama("tiny")
    tokenizer.chat_template = None
    name = saved((model, tokenizer), tmp_path / "model")
    words = ["--model", name, "--output_dir", str(tmp_path), "--limit", "2"]
    summaries = ("--summaries", str(small_run.system / "image_summaries.jsonl"))
    stage = "Inference/preference_recurrent.py"
    with pytest.raises(InputError, match=r"has no chat template; .* or give a --prompt_format"):
        small_run.run(stage, *words, *summaries)
    words += ["--prompt_format", "Request: {text} Response:"]
    small_run.run(stage, *words, *summaries, "--max_new_tokens", "4")
    assert len(read_rows(tmp_path / "mllm_msr" / "user_preferences.jsonl")) == 6
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "test.jsonl").symlink_to(text_run / "test.jsonl")
    small_run.run(SCORE, *words, "--system", "text", "--adapter", "none")
    assert len(read_rows(tmp_path / "text" / "text_zero_shot" / "scores.jsonl")) == 42
    chat = ChatProcessor(tokenizer, prompt_format="Request: {text} Response:")
    tokens = answer_tokens(chat, YES_NO)
    assert tokens.texts == (f" No{tokenizer.eos_token}", f" Yes{tokenizer.eos_token}")
    rendered = chat.render([user_turn("a {text} in braces {image}")])
    assert rendered == "Request: a {text} in braces {image} Response:"
    with pytest.raises(InputError, match=r"lacks the place \{text\}"):
        ChatProcessor(tokenizer, prompt_format="Request:")


def test_a_blip_2_processor_describes_images_through_a_prompt_format(small_run, tmp_path):
    words = ["--model", random_blip2(tmp_path / "model"), "--output_dir", str(tmp_path)]
    words += ["--prompt_format", "Question: {text} Answer:", "--max_new_tokens", "5"]
    stage, found = "Inference/image_summary.py", []
    for system, batch_tokens in (("together", "20000"), ("single", "1")):
        more = ("--limit", "6", "--system", system, "--batch_tokens", batch_tokens)
        small_run.run(stage, *words, *more)
        found.append(read_rows(tmp_path / system / "image_summaries.jsonl"))
    assert found[0] == found[1]
    assert len(found[0]) == 6
    assert len({row["summary"] for row in found[0]}) > 1, "the image is attended to"


def test_images_are_described_without_a_prompt_and_placeholders_are_not(small_run, tmp_path):
    """MLLM4Rec's released code: BLIP-2 sees the image alone, and knows the shop's placeholder."""
    words = ["--model", random_blip2(tmp_path / "model"), "--output_dir", str(tmp_path)]
    words += ["--prompt_format", "{text}", "--image_prompt", "", "--max_new_tokens", "5"]
    items = read_rows(small_run.folder / "items.jsonl")[:4]
    placeholder = file_digest(small_run.folder / items[1]["image"])
    more = ["--limit", "4", "--system", "m", "--placeholders"]
    with pytest.raises(InputError, match="--placeholders 0x1 is no sha256 digest"):
        small_run.run("Inference/image_summary.py", *words, *more, "0x1")
    more += [placeholder]
    small_run.run("Inference/image_summary.py", *words, *more)
    found = {row["item_id"] for row in read_rows(tmp_path / "m/image_summaries.jsonl")}
    (rejected,) = read_rows(tmp_path / "m/image_summaries.rejected.jsonl")
    assert found == {items[n]["item_id"] for n in (0, 2, 3)}
    assert rejected["item_id"] == items[1]["item_id"] and "placeholder" in rejected["reason"]


def random_blip2(folder):
    """Folder of a random tiny Blip2ForConditionalGeneration; it has no chat template."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY / "llama")
    tokenizer.chat_template = None
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = size | {"model_type": "opt", "vocab_size": len(tokenizer), "ffn_dim": 64}
    text |= {"word_embed_proj_dim": 32, "max_position_embeddings": 512, **special_ids(tokenizer)}
    size |= {"intermediate_size": 64}
    config = transformers.Blip2Config(
        vision_config={**size, "image_size": 32, "patch_size": 8},
        qformer_config={**size, "encoder_hidden_size": 32, "vocab_size": 32},
        text_config=text,
        num_query_tokens=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(0)
    model = transformers.Blip2ForConditionalGeneration(config)
    # At the usual scale of weights this small, images hardly change the logits.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6)
    image_processor = transformers.BlipImageProcessorPil(size={"height": 32, "width": 32})
    processor = transformers.Blip2Processor(image_processor, tokenizer, num_query_tokens=4)
    return saved((model, processor), folder)


SIZE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 50}
SIZES = {
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 50},
    "opt": {**SIZE, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "llama": {**SIZE, "intermediate_size": 64, "num_key_value_heads": 2},
}


@pytest.mark.parametrize("kind", SIZES)
def test_memory_per_token_without_num_key_value_heads(kind):
    """GPT-2 and OPT have one key and value head per attention head, and their configs name none."""
    config = transformers.AutoConfig.for_model(kind, **SIZES[kind])
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    assert hasattr(model.config, "num_key_value_heads") == (kind == "llama")
    ids, cache = torch.arange(10)[None], transformers.DynamicCache()
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert kv_bytes_per_token(model) == held / ids.numel() > 0
