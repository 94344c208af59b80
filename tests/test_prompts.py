"""Prompts: data stays text, and a bad template is an error of one sentence."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllmrec.prompts import mllm4rec
from mllmrec.prompts import mllm_msr as prompts
from mllmrec.prompts.mllm_msr import block_text
from mllmrec.prompts.templates import DOMAINS, break_markers, fill, marker_pattern, plain_text
from mllmrec.ranking.questions import Candidate, QuestionFormat, candidate_row
from mllmrec.ranking.rows import question_text
from mllmrec.stage.errors import InputError

MARKERS = [
    "<image>",
    "[/INST]",
    "[INST]",
    "<|eot_id|>",
    "<s>",
    "</s>",
    "<<SYS>>",
    "<|im_start|>",
    "<unk>",
    "<|image_pad|>",
    "[IMG]",
    "<｜User｜>",
    "[gMASK]",
    "[UNUSED_TOKEN_145]",
    "[control_8]",
    "[unused7]",
]


@pytest.mark.parametrize("marker", MARKERS)
def test_no_marker_survives(marker):
    text = plain_text(f"before {marker}\nafter {marker}{marker}")
    assert marker not in text
    assert "\n" not in text
    assert marker.strip("<>[]|/") in text, "the text stays readable"


@given(st.text(), st.sampled_from(MARKERS), st.text())
def test_plain_text_is_one_line_without_markers_and_stays_so(before, marker, after):
    text = plain_text(before + marker + after)
    assert marker not in text
    assert len(text.splitlines()) <= 1
    assert plain_text(text) == text


def test_ordinary_brackets_are_unchanged():
    assert plain_text("I < 3 you [live] (1<2) 5 > 4") == "I < 3 you [live] (1<2) 5 > 4".replace(
        "1<2", "1< 2"
    )
    for title in ("[Official] [HD 4K]", "[2021] [Mask]", "[a1] [b-2]", "｜ a | b ｜", "【官方】"):
        assert plain_text(title) == title


def test_markers_of_a_tokenizer_are_broken_wherever_they_begin():
    pattern = marker_pattern(["<<a>>", "<a>", "{x}", "{xy}", "§"])
    assert break_markers("<<a>> {xy}{x}{ x} 1§2", pattern) == "< < a>> { xy}{ x}{ x} 1 2"
    untouched = " two\nlines\t[Official]  "
    assert break_markers(untouched, pattern) == untouched, "blanks and line breaks stay"


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_prompt_fills_in_every_domain(domain):
    texts = {
        prompts.IMAGE: {},
        prompts.TITLE: {"title": "T"},
        prompts.FUSION: {"image_summary": "S", "text_summary": "X"},
        prompts.PREFERENCE_FIRST: {"block": "B"},
        prompts.PREFERENCE_NEXT: {"preference": "P", "block": "B"},
        prompts.RECOMMEND: {"title": "T", "preference": "P"},
    }
    for template, values in texts.items():
        filled = fill(template, domain, **values)
        assert "{" not in filled
        for value in values.values():
            assert value in filled


def test_braces_in_data_are_text():
    assert "{item} {0}" in fill(prompts.TITLE, "video", title="{item} {0}")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("Say {nonsense} of {title}", "unknown place 'nonsense'"),
        ("Say something", "lacks the place {title}"),
        ("Say {title", "cannot be parsed"),
    ],
)
def test_a_bad_template_is_one_sentence(template, message):
    with pytest.raises(InputError, match=message):
        fill(template, "video", title="T")


def test_an_unknown_domain_names_the_known_ones():
    with pytest.raises(InputError, match="choose one of: movie, product, video"):
        fill(prompts.IMAGE, "songs")


def test_a_block_lists_items_in_order_with_or_without_summaries():
    text = block_text([("First.", "A red star."), ("Second\n<image>", "")], "video")
    assert (
        text == "1. Title: First. Cover: A red star.\n2. Title: Second < image>. Cover: not known."
    )


def test_a_line_of_a_block_may_be_worded_and_may_name_the_item():
    items = [("First.", "Red."), ("Second {item_id}", "")]
    line = "Item {item_id} ({number}): '{title}' {summary}"
    text = block_text(items, "video", template=line, item_ids=["i1", "<image>"])
    assert text == "Item i1 (1): 'First.' Red.\nItem < image> (2): 'Second {item_id}' not known."
    assert block_text(items, "video", item_ids=["i1", "i2"]) == block_text(items, "video")
    with pytest.raises(InputError, match="unknown place 'subtitle'"):
        block_text(items, "video", template="{subtitle}")


def test_a_question_may_be_worded_and_may_name_user_and_item():
    released = "User {user_id} likes: {preference} Next: '{title}' ({item_id})?"
    candidate = Candidate("u1", "i<s>2", "A title", None, 1)
    row = candidate_row(candidate, "red {title}", QuestionFormat(template=released), True)
    text = question_text(row)
    assert text == "User u1 likes: red {title} Next: 'A title' (i< s>2)?"
    start, end = row["preference_span"]
    assert text[start:end] == "red {title}"
    with pytest.raises(InputError, match=r"lacks the place {title}"):
        candidate_row(candidate, "red", QuestionFormat(template="{preference} {item_id}"), True)


def test_the_preference_span_is_where_the_preference_is():
    text, (start, end) = QuestionFormat("video").question(
        "the taste of {preference}", "likes\nred <image> stars"
    )
    assert text[start:end] == "likes red < image> stars"
    assert text.index("the taste of {preference}") < start, "the title comes first, by the image"


def test_the_wording_of_the_prompts_is_the_one_that_the_results_were_made_with():
    """A changed prompt changes every text: these are the first digits of their SHA-256."""
    digests = {
        (prompts, "IMAGE"): "ca76c922b26a2035",
        (prompts, "TITLE"): "41716fc5ae2ef5e9",
        (prompts, "FUSION"): "f881835c61f60320",
        (prompts, "BLOCK_LINE"): "35f6da26c6bde736",
        (prompts, "PREFERENCE_FIRST"): "5ef09d937fe7bc54",
        (prompts, "PREFERENCE_NEXT"): "d1238f982a14bbe3",
        (prompts, "RECOMMEND"): "ae63dae9bae4a1a3",
        (mllm4rec, "ROLE"): "ce8cba51fff16c5b",
        (mllm4rec, "INSTRUCTION"): "b37dc29e8491c0eb",
        (mllm4rec, "BARE"): "411f39107c5010b4",
    }
    for (module, name), digest in digests.items():
        text = getattr(module, name).encode()
        assert hashlib.sha256(text).hexdigest().startswith(digest), name
