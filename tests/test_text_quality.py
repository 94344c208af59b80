"""Long stages: texts that loop or are cut are counted and told, progress is lines in a log file."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY

from mllmrec.evaluation.texts import repeated_share
from mllmrec.generation.text_quality import (
    asked_opening,
    report_quality,
    text_quality,
)
from mllmrec.models.loading import load_text
from mllmrec.prompts import mllm_msr as prompts
from mllmrec.stage import progress
from mllmrec.stage.jsonl import read_rows

STAGE = "Inference/preference_recurrent.py"


def run(small_run, folder, *words):
    """stage 3 with outputs in `folder`; return (its run record, its rows)."""
    summaries = str(small_run.system / "image_summaries.jsonl")
    small_run.run(STAGE, "--output_dir", str(folder), "--summaries", summaries, *words)
    out = folder / "mllm_msr" / "user_preferences.jsonl"
    return json.loads(out.with_suffix(".run.json").read_text()), read_rows(out)


def test_repetition_is_counted_and_a_plain_text_has_none():
    assert repeated_share("a viewer likes music and red squares on every cover they choose") == 0
    assert repeated_share("music and red " * 20) > 0.9
    assert repeated_share("too short") == 0
    assert asked_opening(prompts.PREFERENCE_FIRST) == "The user appears to have a preference for"
    assert asked_opening("Write what you like.") == ""
    texts = ["The user likes it", "It is music and red " + "music and red " * 20]
    assert text_quality(texts, 1, "The user") == {
        "texts": 2,
        "mean_words": 34.5,
        "cut": 1,
        "loops": 1,
        "begin_as_asked": 1,
    }
    assert "begin_as_asked" not in text_quality(texts, 0)


def test_texts_that_are_cut_are_counted_and_told(small_run, tmp_path, capsys, caplog):
    record, rows = run(small_run, tmp_path, "--max_new_tokens", "6")
    blocks = sum(len(row["blocks"]) for row in rows)
    assert record["texts"]["texts"] == record["texts"]["cut"] == blocks
    assert all(row["cut"] == len(row["blocks"]) for row in rows)
    assert f"{blocks} of {blocks} texts were cut; raise --max_new_tokens" in caplog.text
    assert f"{blocks:,} cut at --max_new_tokens" in capsys.readouterr().err
    whole = json.loads((small_run.system / "user_preferences.run.json").read_text())["texts"]
    assert (whole["cut"], whole["loops"]) == (0, 0)
    assert whole["unchanged"] < whole["later_blocks"] / 2 > 30
    assert whole["begin_as_asked"] == whole["texts"] == blocks


def test_a_model_that_loops_is_told(small_run, tmp_path, caplog):
    """One direction of every embedding is large, and the LM head reads it as one word."""
    model, tokenizer = load_text(str(TINY / "llama"))
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = 1000.0
        model.lm_head.weight.zero_()
        model.lm_head.weight[tokenizer.encode(" music", add_special_tokens=False)[0], 0] = 1.0
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    record, _ = run(small_run, tmp_path, "--model", str(tmp_path / "model"))
    quality = record["texts"]
    assert quality["loops"] == quality["cut"] == quality["texts"]
    assert quality["begin_as_asked"] == 0
    assert "texts repeat themselves; ask for shorter answers, or try a larger" in caplog.text
    later = quality["later_blocks"]
    assert later == quality["unchanged"] == quality["texts"] - 30
    assert f"{later} of {later} later blocks have the text of the block before" in caplog.text
    assert (quality["users"], quality["shared"], quality["most_common"]) == (30, 30, 30)
    assert "30 of 30 users have one and the same text, which says nothing" in caplog.text


@pytest.mark.parametrize(("unchanged", "warnings"), [(10, 1), (7, 0)])
@pytest.mark.parametrize(
    ("prompt_format", "remedy"),
    [("", "ask for shorter"), ("{text}", "use an instruction-tuned --model")],
)
def test_the_remedy_fits_the_model(caplog, unchanged, warnings, prompt_format, remedy):
    counts = {"texts": 20, "mean_words": 9.0, "cut": 0, "loops": 5}
    counts |= {"later_blocks": 14, "unchanged": unchanged}
    options = SimpleNamespace(prompt_format=prompt_format)
    job = SimpleNamespace(options=options)
    report_quality(SimpleNamespace(measured={"texts": counts}, job=job))
    assert f"5 of 20 texts repeat themselves; {remedy}" in caplog.text
    assert caplog.text.count("later blocks have the text of the block before") == warnings


def test_it_is_told_in_advance_that_stage_5_would_cut_preferences(small_run, tmp_path, caplog):
    run(small_run, tmp_path, "--max_new_tokens", "600", "--limit", "1")
    assert re.search(r"may have 600 tokens, stage 5 keeps about \d{3} of them", caplog.text)
    caplog.clear()
    run(small_run, tmp_path / "short", "--max_new_tokens", "40", "--limit", "1")
    assert "stage 5 keeps" not in caplog.text


def test_a_log_without_a_terminal_has_few_lines_and_counts_blocks(small_run, tmp_path, capsys):
    _, rows = run(small_run, tmp_path, "--limit", "20")
    out, err = capsys.readouterr()
    assert len((out + err).splitlines()) <= 100 and "\r" not in out + err
    blocks = sum(len(row["blocks"]) for row in rows)
    assert f"preferences: {blocks} of {blocks} blocks, 100%" in err


@pytest.mark.parametrize(("seconds", "lines"), [(0.0, 11), (3600.0, 1)])
def test_progress_is_a_line_now_and_then_and_one_at_the_end(monkeypatch, capsys, seconds, lines):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", seconds)
    with progress.progress_bar(20, "scores", "row", initial=10) as bar:
        for _ in range(10):
            bar.update()
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == lines
    assert printed[-1].startswith("scores: 20 of 20 rows, 100%")
    if lines > 1:
        assert printed[0].startswith("scores: 11 of 20 rows, 55%")


def test_the_time_left_is_not_that_of_the_first_batch(monkeypatch, capsys):
    """Two rows after 95 s, which are prepared once, then two a second."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.progress_bar(420, "scores", "row") as bar:
        for second, n in ((95.0, 1), (95.1, 1), (110.0, 30), (125.1, 30)):
            now[0] = second
            bar.update(n)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "scores: 1 of 420 rows, 0%, 01:35 elapsed, about ? left"
    assert lines[1] == "scores: 62 of 420 rows, 15%, 02:05 elapsed, about 02:59 left"


def test_the_time_left_is_not_that_of_the_rest_of_a_batch(monkeypatch, capsys):
    """The 40 rows of a first batch are counted in 4 s, the next batch is not done after 36 s."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.progress_bar(400, "scores", "row") as bar:
        for second, n in ((20.0, 30), (22.0, 9), (60.0, 1)):
            now[0] = second
            bar.update(n)
    assert capsys.readouterr().err.splitlines()[0].endswith("about 09:00 left")
