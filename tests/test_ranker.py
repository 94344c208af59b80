"""MLLM4Rec's ranker: questions about lists, and the whole second system on a small sample."""

import gc
import json
import pickle
import weakref
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import REAL, ROOT, TINY, skip_without_real_data

from mllmrec.data.candidates import own_candidates
from mllmrec.evaluation.metrics import evaluate
from mllmrec.models.chat import ChatProcessor
from mllmrec.models.loading import load_text
from mllmrec.models.processors import load_processor
from mllmrec.ranking import reader, trainer
from mllmrec.ranking.batches import EpochSampler, EpochSettings
from mllmrec.ranking.list_options import ListOptions
from mllmrec.ranking.lists import (
    ListFormat,
    PrefixRows,
    cut_to_tokens,
    item_texts,
    list_format,
    list_rows,
    training_users,
)
from mllmrec.ranking.row_checks import check_training_rows
from mllmrec.ranking.rows import LETTER_ANSWERS, question_text
from mllmrec.stage.errors import InputError
from mllmrec.stage.jsonl import read_rows, write_rows
from mllmrec.stage.options import parse_options
from mllmrec.stage.provenance import file_digest
from mllmrec.stage.record import read_record
from mllmrec.stage.scripts import load_script

TEXTS = {f"i{n}": f"title {n}" for n in range(60)}
FORM = ListFormat(TEXTS, LETTER_ANSWERS, "a movie fan", max_history=3)


def user_line(split="train", negatives=19):
    return {
        "user_id": "u",
        "history": [f"i{n}" for n in range(5)],
        "target": "i9",
        "negatives": [f"i{n}" for n in range(20, 20 + negatives)],
        "split": split,
        "fold": None,
    }


def test_rows_go_to_workers_of_any_kind_and_unknown_negatives_are_named():
    options = ListOptions(data_dir="d", output_dir="o", dataset_code="sample", max_history=3)
    _, tokenizer = load_text(str(TINY / "list_llama"))
    form = list_format(TEXTS, ChatProcessor(tokenizer), options)
    rows = PrefixRows(training_users([user_line()]), form, options)
    assert pickle.loads(pickle.dumps(rows))[2] == rows[2], "spawned workers receive a copy"
    with pytest.raises(InputError, match="user 'u': the negative 'i20' is not in items"):
        own_candidates(user_line(), {"i9"})


def test_a_question_has_the_role_the_latest_items_and_a_letter_for_each_candidate():
    text = FORM.question(["i0", "i1", "i2", "i3"], ["i9", "i8"])
    assert text.startswith("You are a movie fan. ")
    assert "1. title 1\n2. title 2\n3. title 3\n" in text, "the oldest first, at most three"
    assert "A. title 9\nB. title 8\n" in text
    assert "title 0" not in text
    no_role = ListFormat(TEXTS, LETTER_ANSWERS, "").question(["i1"], ["i9"])
    assert "You are" not in no_role and "the oldest first" in no_role
    bare = ListFormat(TEXTS, LETTER_ANSWERS, "a fan", hybrid=False).question(["i1"], ["i9"])
    assert bare == "You are a fan. 1. title 1\n\nA. title 9\n\nLetter:"
    with pytest.raises(InputError, match="27 candidates are more than the 26 letters"):
        FORM.question(["i0"], [f"i{n}" for n in range(27)])


def test_a_question_that_is_too_long_loses_the_oldest_items_and_is_counted():
    history, short = ["i0", "i1", "i2"], ListFormat(TEXTS, LETTER_ANSWERS, "", max_history=3)
    whole = short.question(history, ["i9"])
    fits = len(whole) - 1
    form = ListFormat(TEXTS, LETTER_ANSWERS, "", max_history=3, fits=lambda t: len(t) <= fits)
    assert form.question(history, ["i9"]) == short.question(history[1:], ["i9"])
    assert form.question(history[1:], ["i9"]) == short.question(history[1:], ["i9"])
    assert (form.counts["shortened"], short.counts["shortened"]) == (1, 0)
    nothing = ListFormat(TEXTS, LETTER_ANSWERS, "", fits=lambda text: False)
    assert "title 9" in nothing.question(history, ["i9"]), "the candidates stay"


def train_rows(users, form=FORM, **options):
    return PrefixRows(training_users(users), form, ListOptions(**options))


def test_every_item_from_the_second_on_is_a_target_after_those_before_it():
    users = [user_line(), {**user_line(), "user_id": "v", "history": ["i7"]}]
    rows = train_rows(users)
    assert len(rows) == 5 + 1 and rows.lengths() == [1, 2, 3, 3, 3, 1]
    had = [f"i{n}" for n in (0, 1, 2, 3, 4, 9)]
    for place, row in enumerate(map(rows.__getitem__, range(5)), start=1):
        assert row["user_id"] == "u" and row["item_ids"][row["label"]] == had[place]
        assert set(row["item_ids"]).isdisjoint({*had} - {had[place]}), "nothing else it had"
        shown = [f"{n}. {TEXTS[item]}" for n, item in enumerate(had[:place][-3:], start=1)]
        assert "\n".join(shown) + "\n" in question_text(row)
        assert check_training_rows([row], "x", LETTER_ANSWERS) == {}
    last = train_rows(users, train_rows="last")
    assert len(last) == 2
    assert [last[n]["item_ids"][last[n]["label"]] for n in (0, 1)] == ["i9", "i9"]


def test_each_epoch_has_other_negatives_and_places_decided_by_the_seed():
    rows, again = (train_rows([user_line()] * 40, train_rows="last") for _ in range(2))
    epochs = []
    for epoch in (0, 1):
        rows.epoch = again.epoch = epoch
        epochs.append([rows[n] for n in range(40)])
        assert epochs[-1] == [again[n] for n in reversed(range(40))][::-1]
    assert not any(a == b for a, b in zip(*epochs, strict=True))
    assert train_rows([user_line()], seed=1, train_rows="last")[0] != epochs[0][0]
    drawn = Counter(item for row in epochs[0] + epochs[1] for item in row["item_ids"])
    assert drawn.pop("i9") == 80 and len(drawn) == 54 and max(drawn.values()) < 60
    sampler = EpochSampler(rows, None, EpochSettings(8, 1, "none", 0))
    sampler.set_epoch(1)
    assert rows.epoch == 1


def test_lists_that_cannot_be_drawn_or_asked_are_refused():
    few = ListFormat({f"i{n}": "x" for n in range(20)}, LETTER_ANSWERS, "")
    with pytest.raises(InputError, match="has 20 items and a user 6 of them, so that 19 negatives"):
        train_rows([user_line()], few)
    long = ListFormat(TEXTS, LETTER_ANSWERS, "", fits=lambda text: len(text) < 250)
    with pytest.raises(InputError, match="20 items without a history may be longer than 1536"):
        train_rows([user_line()], long)
    assert len(train_rows([user_line()], long, candidates=3)) == 5


def test_shuffled_labels_are_random_letters_of_the_same_questions():
    users = [user_line()] * 40
    rows, shuffled = train_rows(users), train_rows(users, control="shuffled_labels")
    pairs = [(rows[n], shuffled[n]) for n in range(len(rows))]
    assert all(question_text(a) == question_text(b) for a, b in pairs)
    assert check_training_rows([pairs[0][1]], "x", LETTER_ANSWERS) == {}
    same = sum(a["label"] == b["label"] for a, b in pairs)
    assert 0 < same < 30 and {b["label"] for _, b in pairs} == set(range(20))


@skip_without_real_data
def test_rows_on_ml_latest_small_are_those_of_the_released_code(tmp_path):
    """88,444: 90,274 interactions less the first and two held out of each of 610 users."""
    raw = REAL.parent / "ml-latest-small"
    words = ["--config", str(ROOT / "configs/mllm4rec/ml-100k.yaml"), "--raw_dir", str(raw)]
    load_script("data_processing/movielens.py").main([*words, "--data_dir", str(tmp_path)])
    users, titles = read_rows(tmp_path / "users.jsonl"), read_rows(tmp_path / "items.jsonl")
    form = ListFormat({row["item_id"]: row["title"] for row in titles}, LETTER_ANSWERS, "")
    rows = train_rows(users, form)
    assert len(rows) == 88_444 and len(titles) == 3650
    log = pd.read_csv(raw / "ratings.csv", dtype={"userId": str, "movieId": str})
    log = log[log["movieId"].isin(form.texts)].sort_values("timestamp", kind="stable")
    first = 0
    for line in rows.users[:20]:
        own = log[log["userId"] == line["user_id"]]["movieId"].tolist()
        assert line["item_ids"] == own[:-2], "oldest first, without validation and test target"
        for place in (1, len(own) // 2, len(own) - 3):
            row = rows[first + place - 1]
            assert row["item_ids"][row["label"]] == own[place]
            assert set(row["item_ids"]).isdisjoint({*own[:-2]} - {own[place]})
            shown = [form.texts[item] for item in own[max(0, place - 20) : place]]
            assert question_text(row).count("\n") == 2 + len(shown) + 20
            assert f"{len(shown)}. {shown[-1]}\n" in question_text(row)
        first += len(own) - 3


def test_the_lists_of_users_jsonl_are_asked_about_without_a_retriever(tmp_path, capfd):
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    splits = ("train", "validation", "test")
    users = [{**user_line(split, 20), "user_id": split} for split in splits]
    write_rows(data / "users.jsonl", users)
    items = [{"item_id": item, "title": TEXTS[item], "image": None} for item in TEXTS]
    write_rows(data / "items.jsonl", items)
    stage = load_script("MLLM4Rec/train_ranker.py")
    words = ["--config", str(ROOT / "configs/sample.yaml"), "--data_dir", str(data)]
    words += ["--output_dir", str(out), "--lists", "users", "--candidates", "21"]
    options = parse_options(ListOptions, stage.SECTION, words)
    assert options.dataset_code == "sample", "from the config's name"
    stage.write_questions(options)
    assert read_rows(out / "mllm4rec/train_users.jsonl") == training_users(users)
    texts = {row["item_id"]: row["text"] for row in read_rows(out / "mllm4rec/item_texts.jsonl")}
    assert texts.keys() == TEXTS.keys()
    assert all(TEXTS[item].startswith(text) for item, text in texts.items()), "four tokens"
    splits = splits[1:]
    rows = {split: read_rows(out / f"mllm4rec/{split}.jsonl") for split in splits}
    for split, user in zip(splits, users[1:], strict=True):
        (row,) = rows[split]
        assert set(row["item_ids"]) == {user["target"], *user["negatives"]}
        assert row["item_ids"][row["label"]] == user["target"]
        assert "U. title" in question_text(row) and "a viewer who chooses" in question_text(row)
        assert len(row["messages"]) == 1 + (split != "test")
    chat = ChatProcessor(load_processor(options.model, options))
    lengths = [chat.count(chat.render(rows[split][0]["messages"][:1])) for split in splits]
    limit = str(min(lengths) - 1)
    stage.write_questions(
        parse_options(ListOptions, stage.SECTION, [*words, "--max_text_tokens", limit])
    )
    (short,) = read_rows(out / "mllm4rec/test.jsonl")
    assert "1. title 0\n" in question_text(rows["test"][0])
    assert "title 0\n" not in question_text(short), "the oldest item is left out"
    assert "1. title 1\n" in question_text(short), "and no more than needed"
    assert "2 shortened" in capfd.readouterr().out


def test_only_retrieved_users_are_asked_and_the_rank_is_not_told():
    users = [user_line("test"), {**user_line("test"), "user_id": "v"}]
    found = ["i9", *(f"i{n}" for n in range(30, 49))]
    lines = [
        {"user_id": "u", "item_ids": found, "has_target": True},
        {"user_id": "v", "item_ids": found[1:], "has_target": False},
    ]
    rows = [
        list_rows(lines, users, FORM, np.random.default_rng(seed), False)[0] for seed in range(40)
    ]
    assert all(sorted(row["item_ids"]) == sorted(found) for row in rows)
    assert all(row["item_ids"][row["label"]] == "i9" for row in rows)
    assert all(len(row["messages"]) == 1 for row in rows), "no answer in the test"
    assert len({row["label"] for row in rows}) > 10
    (kept,) = list_rows(lines, users, FORM, None, False)
    assert (kept["item_ids"], kept["label"]) == (found, 0), "the retriever's order"
    asked = list_rows(lines, users, FORM, np.random.default_rng(0), True)
    assert [row["user_id"] for row in asked] == ["u"]
    assert len(asked[0]["messages"]) == 2


def test_titles_and_captions_are_cut_to_tokens_and_stay_text(tmp_path):
    tokenizer = load_processor(str(TINY / "llama"), SimpleNamespace(prompt_format=""))
    long = "calm music video " * 30
    cut = cut_to_tokens(long, tokenizer, 7)
    assert long.startswith(cut)
    assert len(tokenizer(cut, add_special_tokens=False)["input_ids"]) <= 7
    assert len(cut) > 7
    assert cut_to_tokens("short", tokenizer, 7) == "short"
    titles = {"a": "A <image> [/INST]", "b": "B"}
    items = [{"item_id": i, "title": title, "image": None} for i, title in titles.items()]
    write_rows(tmp_path / "items.jsonl", items)
    captions = tmp_path / "image_summaries.jsonl"
    write_rows(captions, [{"item_id": "a", "summary": "a red\ncover"}])
    texts = item_texts(tmp_path / "items.jsonl", captions, tokenizer, 32)
    assert texts == {"a": "A < image> [ /INST]: a red cover", "b": "B"}
    assert item_texts(tmp_path / "items.jsonl", None, tokenizer, 32)["a"] == "A < image> [ /INST]"


def run(name, config, *words):
    load_script(f"MLLM4Rec/{name}.py").main(["--config", str(config), *words])


@pytest.mark.slow
def test_both_parts_of_the_second_system_on_a_small_sample(tmp_path, capfd):
    """From the raw world to the table; what is up to date is not done again."""
    config, out = tmp_path / "c.yaml", tmp_path / "out" / "mllm4rec"
    base = str(ROOT / "configs/mllm4rec/sample.yaml")
    folders = {"data_dir": str(tmp_path / "data"), "output_dir": str(tmp_path / "out")}
    small = {"n_users": 60, "item_core": 1}
    settings = {"base": base, "dataset": "sample", "common": folders, "data": small}
    config.write_text(yaml.safe_dump(settings))
    run("process_item", config)
    run("process_item_blip2", config)
    words = ("--dataset_code", "sample")
    run("train_retriever", config, *words, "--epochs", "20", "--retrieved", "20")
    ranker = (*words, "--epochs", "1", "--logging_steps", "1")
    run("train_ranker", config, *ranker)
    captions = {row["item_id"]: row["summary"] for row in read_rows(out / "image_summaries.jsonl")}
    rows, lines = read_rows(out / "test.jsonl"), read_rows(out / "retriever" / "candidates.jsonl")
    found = {line["user_id"] for line in lines if line["split"] == "test" and line["has_target"]}
    assert {row["user_id"] for row in rows} == found and found
    first = rows[0]["item_ids"][0]
    assert captions[first][:12] in question_text(rows[0]), "captions are part of an item's text"
    metrics = json.loads((out / "ranker" / "metrics.json").read_text())
    overall = read_rows(out / "ranker" / "scores.jsonl")
    assert len({row["user_id"] for row in overall}) == 60
    share = len(found) / 60
    assert metrics["overall"]["hr@5"] == pytest.approx(
        share * metrics["ranker_on_ranked"]["hr@5"]
    ), "a user whose target was not retrieved is a miss"
    assert metrics["overall"] == evaluate(overall, retrieved=True)
    logits = [row["logits"] for row in overall if row["user_id"] in found]
    assert all(len(one) == 1 and set(one) <= set(LETTER_ANSWERS) for one in logits)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.json*")}
    run("train_ranker", config, *ranker)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.json*")} == before
    plain = ("--reuse_prefix", "false", "--ranked", "plain", "--variant", "plain_ranker")
    run("train_ranker", config, *ranker, *plain)
    again = {
        (row["user_id"], row["item_id"]): row["score"]
        for row in read_rows(out / "plain_ranker" / "scores.jsonl")
    }
    for row in overall:
        assert again[row["user_id"], row["item_id"]] == pytest.approx(row["score"], abs=1e-5)
    capfd.readouterr()


def test_the_ranker_says_what_is_missing(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump({"common": {"data_dir": str(tmp_path)}}))
    words = ("--dataset_code", "sample")
    with pytest.raises(InputError, match=r"users\.jsonl is missing.*MLLM4Rec/process_item\.py"):
        run("train_ranker", config, *words, "--output_dir", str(tmp_path))
    with pytest.raises(InputError, match="dataset_code"):
        run("process_item", config, "--dataset_code", "books")


def test_stage_4_takes_the_first_training_negatives_only(small_run, tmp_path):
    users = read_rows(small_run.folder / "users.jsonl")
    names = sorted({user["target"] for user in users})
    for user in users:
        if user["split"] == "train":
            free = [i for i in names if i not in (*user["history"], user["target"])]
            user["negatives"] = free[:3]
    for name in ("items.jsonl", "covers"):
        (tmp_path / name).symlink_to(small_run.folder / name)
    write_rows(tmp_path / "users.jsonl", users)
    preferences = str(small_run.system / "user_preferences.jsonl")
    words = ["--data_dir", str(tmp_path), "--output_dir", str(tmp_path / "out")]
    words += ["--image_roots", str(small_run.folder), "--preferences", preferences]
    stage = "MLLM-MSR/train/dataset_create.py"
    small_run.run(stage, *words, "--train_negatives", "2")
    rows = read_rows(tmp_path / "out" / "mllm_msr" / "train.jsonl")
    train = [user for user in users if user["split"] == "train"]
    assert [(row["user_id"], row["item_id"]) for row in rows] == [
        (user["user_id"], item)
        for user in train
        for item in (user["target"], *user["negatives"][:2])
    ]
    with pytest.raises(InputError, match="has 3 negatives in its training line, 4 are needed"):
        small_run.run(stage, *words, "--train_negatives", "4")


def test_the_tiny_list_model_counts_in_lists():
    """Documents that were not in its training, no mark shown."""
    train = load_script("scripts/tiny_models/train_list_llama.py")
    model, tokenizer = load_text(str(TINY / "list_llama"))
    rng, right = np.random.default_rng(99), []
    learner = train.Learner(model, train.Writer(tokenizer))
    for level in (train.Level(8, 5, 4), train.Level(15, 10, 3)):
        documents = [train.Document(learner.writer, rng, level) for _ in range(24)]
        with torch.inference_mode():
            right.append(learner.losses(documents)[1:])
    (short_marks, short), (_, long) = right
    assert short_marks > 0.4 and short > 0.65 and long > 0.5


@pytest.mark.parametrize(("limit", "combined"), [("0", True), ("3", False)])
def test_a_pilot_does_not_mix_its_lists_with_the_retrievers(monkeypatch, capsys, limit, combined):
    stage, done = load_script("MLLM4Rec/train_ranker.py"), []
    for name in ("write_questions", "fine_tune", "score", "combine"):
        monkeypatch.setattr(stage, name, lambda *_, name=name: done.append(name))
    stage.main(["--dataset_code", "sample", "--limit", limit])
    assert ("combine" in done) == combined
    assert ("run without --limit" in capsys.readouterr().out) != combined


def ids_of(rows):
    return [(row["user_id"], row["item_id"]) for row in rows]


def test_one_model_is_in_memory_at_a_time(small_run, tmp_path, monkeypatch):
    """The ranker trains and then scores in one process: twice 7B need not fit."""
    loaded, loads, load = [], [], reader.load_ranker

    def noted(options):
        assert all(part() is None for part in loaded), "the trained model is still there"
        model, chat = load(options)
        loads.append(options.model)
        loaded.extend(weakref.ref(part) for part in (model, *model.parameters()))
        return model, chat

    monkeypatch.setattr(reader, "load_ranker", noted)
    monkeypatch.setattr(trainer, "load_ranker", noted)
    words = [
        *("--config", str(small_run.config), "--output_dir", str(tmp_path)),
        *("--summaries", str(small_run.system / "image_summaries.jsonl")),
        *("--lists", "users", "--candidates", "2", "--dataset_code", "sample"),
        *("--epochs", "1", "--quantization", "nf4", "--gradient_checkpointing", "true"),
        *("--limit", "8"),
    ]
    gc.disable()  # else chance decides
    try:
        load_script("MLLM4Rec/train_ranker.py").main(words)
    finally:
        gc.enable()
    assert len(loads) == 2
    assert len(loaded) > 2
    scores = read_rows(tmp_path / "mllm4rec/ranked/scores.jsonl")
    found = evaluate(scores, resamples=1)
    assert (found["users"], found["candidates"]) == (8, 21), "--limit counts users"
    assert read_record(tmp_path / "mllm4rec/adapter")["rows"]["users"] == 8
    with pytest.raises(InputError, match=r"other settings \(limit was 8, is 0\); choose another"):
        load_script("MLLM4Rec/train_ranker.py").main([*words[:-1], "0"])
    monkeypatch.undo()
    adapter = tmp_path / "mllm4rec/adapter"
    before = file_digest(adapter / "adapter_model.safetensors")
    load_script("MLLM4Rec/train_ranker.py").main([*words, "--adapter", "none"])
    zero_shot = read_rows(tmp_path / "mllm4rec/zero_shot_ranked/scores.jsonl")
    assert ids_of(zero_shot) == ids_of(scores) and zero_shot != scores
    given = [*words[:-1], "9", "--adapter", str(adapter), "--ranked", "again"]
    load_script("MLLM4Rec/train_ranker.py").main(given)
    again = read_rows(tmp_path / "mllm4rec/again/scores.jsonl")
    assert again[: len(scores)] == scores and len(again) == len(scores) + 21, "no pilot trains"
    assert file_digest(adapter / "adapter_model.safetensors") == before
