"""Scores: one forward pass per row, and shared prefixes computed once, are the same to 1e-5."""

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image
from random_models import random_llava

from mllmrec.data import sample_world as world
from mllmrec.models.adapters import load_adapter
from mllmrec.models.chat import ChatProcessor
from mllmrec.models.loading import load_multimodal
from mllmrec.ranking.answers import answer_tokens
from mllmrec.ranking.questions import Candidate, QuestionFormat, candidate_row
from mllmrec.ranking.reader import PromptTooLongError, RowReader
from mllmrec.ranking.rows import group_rows
from mllmrec.ranking.scoring import ScoringOptions, probability, score_rows
from mllmrec.stage.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore")


def question_row(user_id, item, label, image, preference):
    """A line of test.jsonl."""
    candidate = Candidate(user_id, item["item_id"], item["title"], image, label)
    return candidate_row(candidate, preference, QuestionFormat(), with_answer=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """(folder, rows): 10 items with covers of mixed shapes, 6 users; texts of mixed lengths."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(4)
    items = [{**world.random_item(rng), "item_id": str(n)} for n in range(10)]
    for n, item in enumerate(items):
        cover = world.draw_cover(item["colour"], item["shape"], rng)
        cover.resize((48 + 30 * (n % 3), 64 - 9 * (n % 4))).save(folder / f"{n}.png")
    rows = []
    for user in range(6):
        preference = world.preference_text(
            world.random_item(rng)
        ) + " And of other things, too." * (user % 3)
        for n, item in enumerate(items):
            if (user + n) % 2 or n == 3:
                rows.append(question_row(f"u{user}", item, int(n == 0), f"{n}.png", preference))
    rows.append(question_row("u9", items[4], 0, "4.png", "Alone."))
    return folder, rows


@pytest.fixture(scope="module")
def model():
    return load_multimodal(str(TINY / "llava"))


def scored(model, processor, folder, rows, **options):
    reader = RowReader(
        ChatProcessor(processor),
        folder,
        **{k: options.pop(k) for k in ("max_text_tokens", "gray_images") if k in options},
    )
    scores = dict(score_rows(model, reader, rows, ScoringOptions(**options)))
    assert sorted(scores) == list(range(len(rows))), "every row once"
    return np.array([scores[index] for index in range(len(rows))])


def one_by_one(model, processor, folder, rows):
    """Logits of the last position, each rendered prompt alone through the processor."""
    token_ids, found = answer_tokens(ChatProcessor(processor)).first_ids, []
    for row in rows:
        text = processor.apply_chat_template(row["messages"], add_generation_prompt=True)
        batch = processor(
            text=[text],
            images=[Image.open(folder / row["images"][0]).convert("RGB")],
            return_tensors="pt",
        )
        with torch.no_grad():
            logits = model(**batch).logits[0, -1]
        found.append(logits[token_ids].tolist())
    return np.array(found)


@pytest.fixture(scope="module")
def wanted(model, data):
    """The logits that scoring is to give."""
    return one_by_one(*model, *data)


@pytest.mark.parametrize("batch_tokens", [1, 400, 65536])
def test_prefix_reuse_and_batches_change_no_score(model, data, wanted, batch_tokens):
    folder, rows = data
    for reuse in (True, False):
        found = scored(*model, folder, rows, batch_tokens=batch_tokens, reuse_prefix=reuse)
        assert np.abs(found - wanted).max() < 1e-5 * max(1, np.abs(wanted).max())


@pytest.mark.parametrize("kind", ["next", "1.5"])
def test_prefix_reuse_changes_no_score_of_another_model(data, kind):
    """Random weights, grouped-query attention; several tiles (next) or one square image (1.5)."""
    model, processor = random_llava("tiny", kind)
    folder, rows = data
    wanted = one_by_one(model, processor, folder, rows)
    found = scored(model, processor, folder, rows)
    assert np.abs(found - wanted).max() < 1e-5
    difference = wanted[:, 0] - wanted[:, 1]
    assert difference.std() > 1e-3
    assert (np.argsort(found[:, 0] - found[:, 1]) == np.argsort(difference)).mean() > 0.99


def test_logits_keep_their_digits_where_training_computes_in_16_bit(model, data):
    """In bfloat16 a logit near 20 has a resolution of an eighth: candidates would tie."""
    folder, rows = data
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.from_numpy(scored(*model, folder, rows)).float()
    assert (found != found.bfloat16().float()).float().mean() > 0.9


def test_prefix_reuse_changes_no_score_with_an_adapter(data, tmp_path):
    from peft import LoraConfig, get_peft_model

    model, processor = load_multimodal(str(TINY / "llava"))
    torch.manual_seed(1)
    config = LoraConfig(
        r=4,
        target_modules=r".*language_model.*\.(q_proj|v_proj|down_proj)",
        init_lora_weights=False,
    )
    get_peft_model(model, config).save_pretrained(tmp_path)
    folder, rows = data
    plain, processor = load_multimodal(str(TINY / "llava"))
    before = scored(plain, processor, folder, rows)
    adapted = load_adapter(plain, tmp_path, str(TINY / "llava"))
    wanted = one_by_one(adapted, processor, folder, rows)
    assert np.abs(wanted - before).max() > 0.1, "the adapter does something"
    assert (
        np.abs(scored(adapted, processor, folder, rows) - wanted).max()
        < 1e-5 * np.abs(wanted).max()
    )


def test_the_prefix_of_an_item_is_computed_once(model, data, monkeypatch):
    folder, rows = data
    seen = []
    tower = model[0].model.vision_tower
    hook = tower.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args or list(kwargs.values()))[0].shape[0]),
        with_kwargs=True,
    )
    scored(*model, folder, rows)
    hook.remove()
    assert sum(seen) == 2 * len(group_rows(rows)) < 2 * len(rows), (
        "overview and one tile of each item, not of each row"
    )


def test_the_image_is_attended_to(model, data):
    folder, rows = data
    assert (
        np.abs(scored(*model, folder, rows) - scored(*model, folder, rows, gray_images=True)).max()
        > 0.1
    )


def test_a_long_preference_loses_its_tail_only(model, data):
    folder, _ = data
    chat = ChatProcessor(model[1])
    reader = RowReader(chat, folder, max_text_tokens=70)
    row = question_row(
        "u", {"item_id": "0", "title": "A title"}, 0, "0.png", "word " * 300 + "tail"
    )
    prompt, ids = reader.prompt(row)
    assert len(ids) == chat.count(prompt) <= 70
    assert len(ids) > 60, "as much as fits is kept"
    assert reader.shortened == 1
    whole, _ = RowReader(chat, folder).prompt(row)
    head, end = whole[: whole.index("word")], whole[whole.index("tail") + 4 :]
    assert prompt.startswith(head)
    assert prompt.endswith(end), "title, question and what closes the turn stay"
    with pytest.raises(
        PromptTooLongError,
        match="longer than 9 tokens even without a preference; raise --max_text_tokens",
    ):
        RowReader(chat, folder, max_text_tokens=9).prompt(row)


def test_a_missing_image_is_named(model, data):
    folder, rows = data
    with pytest.raises(InputError, match=r"gone.png, item '0': the file is missing"):
        scored(*model, folder, [{**rows[0], "item_id": "0", "images": ["gone.png"]}])


def test_probability_is_equation_1():
    for yes, no in ((0.0, 0.0), (2.0, -1.0), (-30.0, 30.0)):
        assert probability(yes, no) == pytest.approx(
            np.exp(yes) / (np.exp(yes) + np.exp(no)), rel=1e-12
        )


def test_a_user_whose_question_cannot_fit_is_found_beforehand(model, data):
    folder, rows = data
    endless = question_row("u7", {"item_id": "0", "title": "word " * 60}, 0, "0.png", "A taste.")
    reader = RowReader(ChatProcessor(model[1]), folder, max_text_tokens=100)
    assert set(reader.find_too_long([*rows, endless])[0]) == {"u7"}
    assert reader.shortened == 0, "looking ahead is not counted"
    assert RowReader(ChatProcessor(model[1]), folder).find_too_long([endless]) == ({}, [])


def test_a_title_of_a_whole_page_is_cut_in_stage_4():
    row = question_row("u", {"item_id": "0", "title": "word " * 600}, 0, "0.png", "A taste.")
    text = row["messages"][0]["content"][1]["text"]
    assert text.count("word") == 60
    start, end = row["preference_span"]
    assert text[start:end] == "A taste."


def test_in_bfloat16_candidates_do_not_tie(data):
    """Logits of a bfloat16 LM head near 20 are an eighth apart; ours are computed in float32."""
    model, processor = random_llava("tiny", dtype=torch.bfloat16)
    model.lm_head.weight.data *= 300
    folder, rows = data
    found = scored(model, processor, folder, rows)
    assert np.abs(found).max() > 16
    assert not (found * 256 == np.round(found * 256)).all(axis=1).any(), (
        "no logit is on the grid of bfloat16"
    )


def test_a_template_that_does_not_start_with_the_image_takes_the_plain_pass(data):
    model, processor = load_multimodal(str(TINY / "llava"))
    part = "{%% for part in message['content'] if part['type'] == '%s' %%}{{ %s }}{%% endfor %%}"
    text_part = part % ("text", "part['text']")
    image_part = part % ("image", "'<image>\\n'")
    assert image_part + text_part in processor.chat_template
    processor.chat_template = processor.chat_template.replace(
        image_part + text_part, text_part + image_part
    )
    folder, rows = data
    wanted = one_by_one(model, processor, folder, rows)
    assert (
        np.abs(scored(model, processor, folder, rows) - wanted).max() < 1e-5 * np.abs(wanted).max()
    )
