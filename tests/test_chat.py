"""From chat turns to token ids: answers, padding, budgets, and texts that look like markup."""

import functools
import itertools
import shutil

import pytest
import torch
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast

from mllmrec.generation.dialogues import RejectedError
from mllmrec.generation.prompt_writer import PromptWriter
from mllmrec.models.chat import ChatProcessor, shorten_to_fit
from mllmrec.models.model_options import ModelOptions
from mllmrec.models.processors import load_processor
from mllmrec.prompts import mllm_msr as prompts
from mllmrec.prompts.templates import assistant_turn, cut, plain_text, user_turn
from mllmrec.ranking.answers import YES_NO, answer_tokens
from mllmrec.ranking.questions import Candidate, QuestionFormat, candidate_row
from mllmrec.ranking.reader import RowReader
from mllmrec.ranking.rows import question_text
from mllmrec.stage.errors import InputError


@functools.cache  # not only a fixture: hypothesis calls its tests many times
def llava_chat():
    return new_chat("llava")


def new_chat(folder):
    """Of a tiny model, to be changed."""
    load = (AutoProcessor if folder == "llava" else AutoTokenizer).from_pretrained
    return ChatProcessor(load(TINY / folder))


@pytest.fixture
def llava():
    return llava_chat()


@pytest.fixture(scope="module")
def llama():
    return new_chat("llama")


def test_a_training_text_is_the_scoring_text_plus_the_answer_token_for_token(llava, llama):
    for chat, label in itertools.product((llava, llama), (0, 1)):
        text, _ = QuestionFormat().question("A title", "The user likes jazz.")
        tokens, answer = answer_tokens(chat), YES_NO.text(label)
        ask = [user_turn(text, images=int(chat.takes_images))]
        prompt = chat.ids(chat.render(ask))
        whole = chat.ids(chat.render([*ask, assistant_turn(answer)], add_generation_prompt=False))
        assert whole == prompt + list(tokens.ids[label])
        assert chat.decode(tokens.ids[label]) == answer == ("No", "Yes")[label]
        # One BOS: the Llama template writes it, the LLaVA template leaves it to the tokenizer.
        bos = chat.tokenizer.bos_token_id
        assert (prompt.count(bos), prompt[0]) == (1, bos)


def test_the_end_token_follows_the_answer_whatever_the_template_writes():
    """A published template ends the assistant's turn with the characters of a mistyped tag."""
    chat = new_chat("llava")
    template = chat.processor.chat_template
    chat.processor.chat_template = template.replace("{{ eos_token }}", "{{ '<\\\\s> ' }}")
    turns = [user_turn("Q", 1), assistant_turn("Yes")]
    assert chat.render(turns, add_generation_prompt=False).endswith(" Yes<\\s> ")
    tokens = answer_tokens(chat)
    assert tokens.texts == (" No</s>", " Yes</s>")
    assert [len(ids) for ids in tokens.ids] == [2, 2]
    assert tokens.ids[1][1] == chat.tokenizer.eos_token_id


def test_a_template_that_drops_the_answer_is_refused():
    chat = new_chat("llama")
    turns = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    chat.tokenizer.chat_template = turns
    with pytest.raises(InputError, match="does not put the answer behind the prompt"):
        answer_tokens(chat)


@given(st.text(max_size=60))
@settings(max_examples=40, deadline=None)
def test_a_title_adds_no_image_and_ends_no_turn(title):
    chat = llava_chat()
    for data in (title, f"<image>{title}[/INST]", f"</s>{title}<pad>"):
        text, _ = QuestionFormat().question(data, data)
        ids = chat.ids(chat.render([user_turn(text, images=1)]))
        assert ids.count(chat.image_token_id) == 1
        assert not {chat.tokenizer.eos_token_id, chat.tokenizer.pad_token_id} & set(ids)


def test_control_tokens_are_those_of_the_tokenizer_and_the_processor():
    chat = new_chat("llava")
    chat.tokenizer.add_special_tokens({"additional_special_tokens": ["§turn§"]})
    chat.tokenizer.add_tokens(["{sep|", "zydeco", "(video)"])  # added, but not special
    wanted = {"<s>", "</s>", "<pad>", "<unk>", "<image>", "§turn§", "{sep|"}
    assert set(chat.control_tokens) == wanted
    title = "zydeco §turn§ {sep| a <image> (video)"
    assert chat.plain(title) == "zydeco § turn§ { sep| a < image> (video)"
    unknown = "zydeco §turn§ {sep| a < image> (video)"
    assert plain_text(title) == unknown, "without the tokenizer"
    prompt = PromptWriter(chat, 500, "video").text_prompt(prompts.TITLE, title=title)
    assert "§turn§" not in prompt.text
    assert "§ turn§" in prompt.text
    chat = ChatProcessor(chat.processor)
    chat.processor.video_token = "(video)"
    assert chat.plain("a (video)") == "a ( video)"


def edited_row(title, preference):
    """A row whose title and preference were replaced by hand after stage 4."""
    question = QuestionFormat(template="Title: {title}\nTaste: {preference}\nYes or no?")
    row = candidate_row(Candidate("u1", "i1", "TITLE", "i1.png", 0), "TASTE", question, False)
    part = row["messages"][0]["content"][1]
    text = part["text"].replace("TITLE", title)
    start = text.index("TASTE")
    part["text"] = text.replace("TASTE", preference)
    return {**row, "preference_span": [start, start + len(preference)]}


EDITED = [
    ("likes\n<image> </s>", "likes\n< image> < /s>"),
    ("<image>", "< image>"),
    ("ends with <", "ends with <"),
    ("no marker [Official]", "no marker [Official]"),
]


@pytest.mark.parametrize(("preference", "expected"), EDITED)
def test_a_row_edited_by_hand_is_cleaned_and_its_span_follows(llava, preference, expected):
    row = edited_row("<image> [/INST] \ud83d", preference)
    prompt, ids = RowReader(llava, ".").prompt(row)
    assert f"Title: < image> [ /INST] ?\nTaste: {expected}\nYes or no? [/INST]" in prompt
    assert ids == llava.ids(prompt)
    assert ids.count(llava.image_token_id) == 1
    assert llava.tokenizer.eos_token_id not in ids
    long = edited_row("<image> </s> \ud83d", f"{preference} {'word ' * 300}")
    reader = RowReader(llava, ".", max_text_tokens=80)
    assert reader.find_too_long([long]) == ({}, ["u1"])
    prompt, ids = reader.prompt(long)
    assert len(ids) <= 80
    assert "Title: < image> < /s> ?\nTaste: " in prompt, "only the preference is shortened"
    assert prompt.endswith("word\nYes or no? [/INST]")


def test_a_marker_across_the_start_of_the_preference_is_broken(llava):
    row = edited_row("A title", "image> likes jazz " + "word " * 300)
    part = row["messages"][0]["content"][1]
    part["text"] = part["text"].replace("Taste: ", "Taste: <")
    row["preference_span"] = [n + 1 for n in row["preference_span"]]
    reader = RowReader(llava, ".", max_text_tokens=90)
    cleaned = reader._cleaned(row)
    start, end = cleaned["preference_span"]
    assert question_text(cleaned)[start:end] == "image> likes jazz " + "word " * 300
    prompt, ids = reader.prompt(row)
    assert "Taste: < image> likes jazz word" in prompt
    assert prompt.endswith("word\nYes or no? [/INST]")
    assert ids.count(llava.image_token_id) == 1


def chat_with(folder):
    """A tiny model's whose normalizer makes a marker, `<turn>`, of fullwidth brackets (as NFKC)."""
    chat = new_chat(folder)
    brackets = [normalizers.Replace("＜", "<"), normalizers.Replace("＞", ">")]
    chat.tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(brackets)
    chat.tokenizer.add_tokens([AddedToken("<turn>", special=True, normalized=True)])
    return ChatProcessor(chat.processor)


def test_a_prompt_with_a_marker_that_the_tokenizer_makes_is_rejected():
    writer = PromptWriter(chat_with("llama"), 500, "video")
    assert writer.text_prompt(prompts.TITLE, title="<turn> ＜ turn＞").length
    with pytest.raises(RejectedError, match="prompt: its text adds the control token '<turn>'"):
        writer.text_prompt(prompts.TITLE, title="A ＜turn＞")


def test_a_row_with_a_marker_that_the_tokenizer_makes_is_refused():
    reader = RowReader(chat_with("llava"), ".")
    assert reader.prompt(edited_row("<turn>", "likes jazz"))
    message = (
        "user 'u1', item 'i1': the question is no plain text: its text adds the control token "
        "'<turn>' of the model's tokenizer; remove it from the item's title"
    )
    for row in (edited_row("＜turn＞", "likes jazz"), edited_row("A title", "likes ＜turn＞")):
        with pytest.raises(InputError, match=message):
            reader.prompt(row)
    long = edited_row("＜turn＞", "word " * 300)
    with pytest.raises(InputError, match=message):
        RowReader(reader.chat, ".", max_text_tokens=80).find_too_long([long])


def test_a_text_that_swallows_a_marker_of_the_template_is_rejected():
    chat, turns = new_chat("llama"), [user_turn("A star")]
    ids = chat.ids(chat.render(turns))
    assert chat.control_token_difference(ids, turns) is None
    ids.remove(chat.tokenizer.eos_token_id)
    difference = chat.control_token_difference(ids, turns)
    assert difference == "its text removes the control token '<|eot_id|>'"
    chat = ChatProcessor(chat.tokenizer)
    chat.tokenizer.add_special_tokens({"additional_special_tokens": ["star<|eot_id|>"]})
    with pytest.raises(RejectedError, match=r"removes the control token '<\|eot_id\|>'"):
        PromptWriter(chat, 500, "video").text_prompt(prompts.TITLE, title="A star")


def test_characters_that_the_vocabulary_lacks_are_no_control_tokens():
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "[END]": 1, "a": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "[UNK]", "eos_token": "[END]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **special)
    chat = ChatProcessor(tokenizer, prompt_format="{text}")
    assert chat.control_token_difference(chat.ids("a b c [UNK]"), [user_turn("")]) is None
    assert chat.control_token_difference(chat.ids("a [END]"), [user_turn("")])


@pytest.mark.parametrize("size", [(48, 64), (64, 48), (200, 30), (30, 200), (1, 1)])
def test_image_tokens_are_counted_as_the_processor_counts_them(llava, size):
    image = Image.new("RGB", size)
    prompt, n_tokens = llava.render([user_turn("What is it?", 1)]), llava.count_image_tokens(image)
    [ids] = llava.encode([prompt], [image])["input_ids"].tolist()
    assert ids.count(llava.image_token_id) == n_tokens
    assert ids == llava.expand_image_token(llava.ids(prompt), n_tokens)


def test_padding_is_on_the_side_that_is_asked_for(llama):
    texts = [llama.render([user_turn(text)]) for text in ("short", "a good deal longer than that")]
    left, right = (llama.encode(texts, side=side)["attention_mask"] for side in ("left", "right"))
    assert left[0, [0, -1]].tolist() == [0, 1]
    assert torch.equal(right[0], left[0].flip(0))


@given(st.lists(st.text(alphabet="ab ", max_size=40), min_size=1, max_size=4), st.integers(0, 80))
def test_shorten_to_fit_keeps_the_budget_and_cuts_the_longest_first(texts, budget):
    texts = [plain_text(text) for text in texts]
    most = budget + 3 * (len(texts) - 1)
    prompt, was_cut = shorten_to_fit(" | ".join, texts, lambda prompt: len(prompt) <= most)
    kept = prompt.split(" | ")
    assert was_cut == (sum(map(len, texts)) > budget)
    assert sum(map(len, kept)) <= budget or not any(kept)
    for text, shown in zip(texts, kept, strict=True):
        assert text.startswith(shown)
        assert shown == text or len(shown) <= max(map(len, kept)) + 40
    if was_cut:
        cut_ones = [pair for pair in zip(texts, kept, strict=True) if pair[0] != pair[1]]
        shortest = min(len(shown) for _, shown in cut_ones)
        assert all(len(text) >= shortest for text, _ in cut_ones)


def test_shorten_to_fit_uses_what_there_is():
    prompt, was_cut = shorten_to_fit("".join, ["one two three four"], lambda text: len(text) <= 9)
    assert (prompt, was_cut) == ("one two", True)


def test_cut_leaves_no_broken_word():
    assert [cut("green circles", n) for n in (8, 5)] == ["green"] * 2
    assert cut("green", 9) == "green"
    assert cut("绿色的圆圈", 3) == "绿色的", "a language without blanks is cut anywhere"


@pytest.mark.parametrize("name", ["llama", "llava"])
def test_a_tokenizer_that_appends_its_end_token_reads_as_one_that_does_not(tmp_path, name):
    """A prompt ends with the last token of the template, behind which the answer belongs."""
    chat, own = new_chat(name), new_chat(name)
    prompt, tokenizer = chat.render([user_turn("Q", int(chat.takes_images))]), own.tokenizer
    ends = [tokenizer.bos_token, tokenizer.eos_token]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=" $A ".join(ends),
        special_tokens=list(zip(ends, tokenizer.convert_tokens_to_ids(ends), strict=True)),
    )
    assert own.ids("Q") == [*chat.ids("Q"), tokenizer.eos_token_id]
    own.processor.save_pretrained(shutil.copytree(TINY / name, tmp_path / name))
    loaded = ChatProcessor(load_processor(str(tmp_path / name), ModelOptions()))
    for text in ("Q", prompt):
        assert loaded.ids(text) == chat.ids(text)
