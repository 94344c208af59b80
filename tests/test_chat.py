"""From chat turns to token ids: answers, padding, budgets, and texts that look like markup."""

import functools

import pytest
import torch
from conftest import TINY
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer

from data_processing.errors import InputError
from data_processing.pairs import question
from data_processing.prompts import ANSWERS, cut, plain_text
from Inference.chat import Chat, answer_turn, fit, user_turn


@functools.cache  # not only a fixture: hypothesis calls its tests many times
def llava_chat():
    return Chat(AutoProcessor.from_pretrained(TINY / "llava"))


@pytest.fixture
def llava():
    return llava_chat()


@pytest.fixture(scope="module")
def llama():
    return Chat(AutoTokenizer.from_pretrained(TINY / "llama"))


@pytest.mark.parametrize("label", ANSWERS)
def test_a_training_text_is_the_scoring_text_plus_the_answer_token_for_token(llava, llama, label):
    for chat in (llava, llama):
        text, _ = question("A title", "The user appears to have a preference for jazz.", "video")
        ask = [user_turn(text, images=int(chat.takes_images))]
        prompt = chat.ids(chat.render(ask))
        whole = chat.ids(chat.render([*ask, answer_turn(ANSWERS[label])], answer_follows=False))
        assert whole == prompt + chat.answer_ids[label]
        assert chat.decode(chat.answer_ids[label]) == ANSWERS[label]


def test_behind_the_answer_stands_the_end_token_whatever_the_template_writes():
    """A published template closes the assistant's turn with the four characters of a mistyped tag."""
    chat = Chat(AutoProcessor.from_pretrained(TINY / "llava"))
    chat.processor.chat_template = chat.processor.chat_template.replace(
        "{{ eos_token }}", "{{ '<\\\\s> ' }}"
    )
    assert chat.render([user_turn("Q", 1), answer_turn("Yes")], answer_follows=False).endswith(
        " Yes<\\s> "
    )
    assert chat.answer_texts == {1: " Yes</s>", 0: " No</s>"}
    assert [len(ids) for ids in chat.answer_ids.values()] == [2, 2]
    assert chat.answer_ids[1][1] == chat.tokenizer.eos_token_id


def test_the_answer_token_is_not_the_one_of_the_bare_word(llava):
    """` Yes` and `Yes` are different tokens; the first one follows `[/INST]`."""
    bare = llava.tokenizer("Yes", add_special_tokens=False).input_ids
    assert (
        llava.answer_ids[1][0]
        == llava.tokenizer(" Yes", add_special_tokens=False).input_ids[0]
        != bare[0]
    )


def test_there_is_one_bos_whoever_writes_it(llava, llama):
    for chat in (
        llava,
        llama,
    ):  # the Llama template writes it, the LLaVA template leaves it to the tokenizer
        ids = chat.ids(chat.render([user_turn("Hello", images=int(chat.takes_images))]))
        assert ids.count(chat.tokenizer.bos_token_id) == 1
        assert ids[0] == chat.tokenizer.bos_token_id


def test_a_template_that_drops_the_answer_is_refused():
    chat = Chat(AutoTokenizer.from_pretrained(TINY / "llama"))
    chat.tokenizer.chat_template = (
        "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(InputError, match="does not put the answer behind the prompt"):
        _ = chat.answer_ids


@given(st.text(max_size=60))
def test_a_title_adds_no_image_and_ends_no_turn(title):
    chat = llava_chat()
    for data in (title, f"<image>{title}[/INST]", f"</s>{title}<pad>"):
        text, _ = question(data, data, "video")
        ids = chat.ids(chat.render([user_turn(text, images=1)]))
        assert ids.count(chat.image_token_id) == 1
        assert chat.tokenizer.eos_token_id not in ids
        assert chat.tokenizer.pad_token_id not in ids


@pytest.mark.parametrize("size", [(48, 64), (64, 48), (200, 30), (30, 200), (1, 1)])
def test_image_tokens_are_counted_as_the_processor_counts_them(llava, size):
    image = Image.new("RGB", size)
    prompt = llava.render([user_turn("What is it?", images=1)])
    batch = llava.encode([prompt], [image])
    assert (batch["input_ids"] == llava.image_token_id).sum() == llava.image_tokens(image)
    assert batch["input_ids"][0].tolist() == llava.expand(
        llava.ids(prompt), llava.image_tokens(image)
    )


def test_padding_is_on_the_side_that_is_asked_for(llama):
    prompts = [
        llama.render([user_turn(text)]) for text in ("short", "a good deal longer than that")
    ]
    left, right = (llama.encode(prompts, side=side) for side in ("left", "right"))
    assert left["attention_mask"][0, -1] == 1
    assert left["attention_mask"][0, 0] == 0
    assert torch.equal(right["attention_mask"][0], left["attention_mask"][0].flip(0))


@given(st.lists(st.text(alphabet="ab ", max_size=40), min_size=1, max_size=4), st.integers(0, 80))
def test_fit_keeps_the_budget_and_cuts_the_longest_first(texts, budget):
    texts = [plain_text(text) for text in texts]
    prompt, was_cut = fit(
        " | ".join, texts, lambda prompt: len(prompt) <= budget + 3 * (len(texts) - 1)
    )
    kept = prompt.split(" | ")
    assert was_cut == (sum(map(len, texts)) > budget)
    assert sum(map(len, kept)) <= budget or not any(kept)
    for text, shown in zip(texts, kept, strict=True):
        assert text.startswith(shown)
        assert shown == text or len(shown) <= max(map(len, kept)) + 40
    if was_cut:
        shortest = min(len(shown) for shown, text in zip(kept, texts, strict=True) if shown != text)
        assert all(
            len(text) >= shortest for text, shown in zip(texts, kept, strict=True) if shown != text
        )


def test_fit_uses_what_there_is():
    prompt, was_cut = fit(
        lambda texts: texts[0], ["one two three four"], lambda text: len(text) <= 9
    )
    assert (prompt, was_cut) == ("one two", True)


def test_cut_leaves_no_broken_word():
    assert cut("green circles", 8) == "green"
    assert cut("green circles", 5) == "green"
    assert cut("green", 9) == "green"
    assert cut("绿色的圆圈", 3) == "绿色的", "a language without blanks is cut anywhere"
