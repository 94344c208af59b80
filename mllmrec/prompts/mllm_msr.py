"""The prompts of MLLM-MSR.

The paper gives the idea of each prompt and, for some, the wording; the wording here is our own
(paper, section "Methodology"). Any template can be replaced from a config (`image_prompt: "..."`
and so on). Besides the places that it shows, a template may use {user_id} (stages 3 to 6) and
{item_id} (the question and the lines of a block), as the prompts of the released code do.
"""

from collections.abc import Callable, Sequence
from typing import Any

from mllmrec.prompts.templates import DOMAINS, fill, plain_text

# Stage 2, image summary. The released code describes the image only; the paper adds the text.
IMAGE = """\
Describe the {image} of this {item} in one short paragraph: what it shows, its colours and its \
style."""

TITLE = """\
Say in one sentence what this {item} is about, judging by its title. Title: {title}"""

FUSION = """\
Two notes tell of the same {item}. From its {image}: {image_summary} From its title: \
{text_summary} Join them into one short paragraph that leaves both notes equal room."""

# Stage 3, user preference: the first block of a history, and every later one.
BLOCK_LINE = "{number}. Title: {title}. {image_word}: {summary}"

PREFERENCE_FIRST = """\
A {person} {past} these {items}, oldest first:
{block}
Say in one paragraph what this {person} likes now, in content and in visual style. Speak of the \
taste, do not list the {items}. Begin with: The user appears to have a preference for"""

PREFERENCE_NEXT = """\
The taste of a {person} so far: {preference}
Then the {person} {past}, oldest first:
{block}
Bring the paragraph up to date, in content and in visual style: keep what still holds, let newer \
{items} weigh more, do not list the {items}. \
Begin with: The user appears to have a preference for"""

# Stages 5 and 6. The image comes first, so everything up to it can be computed once per item.
RECOMMEND = """\
The picture is the {image} of a {item}. Its title: {title}
The taste of a {person}: {preference}
Will this {person} {act} this {item} next? Answer with yes or no only."""

# The same without images, chosen by `with_images: false`. The preference comes first, so that a
# user's questions share their beginning.
WITHOUT_IMAGES = {
    "block_line": "{number}. {title}",
    "first_prompt": """\
A {person} {past} these {items}, oldest first:
{block}
Say in one paragraph what this {person} likes now. Speak of the taste, do not list the {items}. \
Begin with: The user appears to have a preference for""",
    "next_prompt": """\
The taste of a {person} so far: {preference}
Then the {person} {past}, oldest first:
{block}
Bring the paragraph up to date: keep what still holds, let newer {items} weigh more, do not list \
the {items}. Begin with: The user appears to have a preference for""",
    "recommend_prompt": """\
The taste of a {person}: {preference}
Will this {person} {act} the {item} called {title} next? Answer with yes or no only.""",
}

_WITH_IMAGES = {
    "block_line": BLOCK_LINE,
    "first_prompt": PREFERENCE_FIRST,
    "next_prompt": PREFERENCE_NEXT,
    "recommend_prompt": RECOMMEND,
}


def drop_images(options: Any) -> None:
    """Give options with `with_images: false` the prompts without images, but for those of a user.

    options: have some of the names in WITHOUT_IMAGES as attributes.
    """
    for name, template in WITHOUT_IMAGES.items():
        if not options.with_images and getattr(options, name, "") == _WITH_IMAGES[name]:
            setattr(options, name, template)


def block_text(
    items: Sequence[tuple[str, str]],
    domain: str,
    plain: Callable[[str], str] = plain_text,
    template: str = BLOCK_LINE,
    item_ids: Sequence[str] = (),
) -> str:
    """The lines of one block of a history, oldest first; items: (title, summary), may be empty.

    plain: makes titles and summaries plain text, for one tokenizer or for any; template: of a line;
    item_ids: for templates with the place {item_id}.
    """
    lines = []
    for number, (title, summary) in enumerate(items, start=1):
        places = {
            "number": str(number),
            "title": plain(title).rstrip("." if "{title}." in template else ""),
            "image_word": DOMAINS[domain]["image"].capitalize(),
            "summary": plain(summary) if summary else "not known.",
        }
        if item_ids:
            places["item_id"] = plain(item_ids[number - 1])
        lines.append(fill(template, domain, places))
    return "\n".join(lines)
