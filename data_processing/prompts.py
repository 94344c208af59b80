"""Every prompt of the system, in one place.

The paper gives the idea of each prompt and, for some, the wording; the wording here is our own (paper, section
"Methodology"; facts in README, "Deviations"). A prompt is a template with named {places}; what changes between a
video and a product catalogue is a handful of words (`DOMAINS`). Any template can be replaced from a config
(`image_prompt: "..."` and so on); `fill` then says which place is unknown or missing.

Titles, summaries and preferences are data. `plain_text` makes sure that they stay text inside a prompt: a title
that holds `<image>`, `[/INST]`, `<|eot_id|>` or a line break can neither add an image nor end a turn.
"""

import re
import string

from data_processing.errors import InputError

DOMAINS = {
    "video": {
        "item": "video", "items": "videos", "image": "cover", "person": "viewer", "past": "watched", "act": "watch",
    },
    "product": {
        "item": "product", "items": "products", "image": "photo", "person": "shopper", "past": "bought", "act": "buy",
    },
}  # fmt: skip

# Stage 2, image summary. The released code describes the image only; the paper joins image and text by a third prompt.
IMAGE = "Describe the {image} of this {item} in one short paragraph: what it shows, its colours and its style."
TITLE = "Say in one sentence what this {item} is about, judging by its title. Title: {title}"
FUSION = (
    "Two notes tell of the same {item}. From its {image}: {image_summary} From its title: {text_summary} "
    "Join them into one short paragraph that leaves both notes equal room."
)

# Stage 3, user preference: the first block of a history, and every later one.
BLOCK_LINE = "{number}. Title: {title}. {image_word}: {summary}"
PREFERENCE_FIRST = (
    "A {person} {past} these {items}, oldest first:\n{block}\n"
    "Say in one paragraph what this {person} likes now, in content and in visual style. Speak of the taste, do not list "
    "the {items}. Begin with: The user appears to have a preference for"
)
PREFERENCE_NEXT = (
    "The taste of a {person} so far: {preference}\nThen the {person} {past}, oldest first:\n{block}\n"
    "Bring the paragraph up to date, in content and in visual style: keep what still holds, let newer {items} weigh more, "
    "do not list the {items}. Begin with: The user appears to have a preference for"
)

# Stages 5 and 6. The image comes first, so everything up to it can be computed once per item.
RECOMMEND = (
    "The picture is the {image} of a {item}. Its title: {title}\nThe taste of a {person}: {preference}\n"
    "Will this {person} {act} this {item} next? Answer with yes or no only."
)
ANSWERS = {1: "Yes", 0: "No"}

# Characters that tokenizers read as markup when they open a marker: <image>, <|eot_id|>, <s>, <<SYS>>, [INST], [/INST].
_MARKUP = re.compile(r"<(?=[<|/!\w])|\[(?=/?[A-Z_]+\])")
_SPACE = re.compile(r"[\s\x00-\x1f\x7f]+")  # control characters, too


def plain_text(text):
    """`text` as one line that no chat template or tokenizer can read as a control token.

    Line breaks and runs of blanks become one blank; a bracket that would open a marker gets a blank behind it, so a
    person still reads what was written: `<image>` becomes `< image>`, `[/INST]` becomes `[ /INST]`.
    """
    text = str(text).encode("utf-8", "replace").decode()  # half a surrogate pair cannot be tokenized
    return _SPACE.sub(" ", _MARKUP.sub(lambda match: match.group() + " ", text)).strip()


def user_turn(text, images=0):
    """One user turn in the Hugging Face multimodal format: pictures first, then the text."""
    return {"role": "user", "content": [*({"type": "image"} for _ in range(images)), {"type": "text", "text": text}]}


def answer_turn(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def cut(text, length):
    """The first `length` characters of `text`, less a word that the cut has broken (if words are parted by blanks)."""
    if len(text) <= length:
        return text
    kept = text[:length]
    whole = kept.rstrip() if text[length].isspace() else kept.rpartition(" ")[0] or kept
    return whole.rstrip()


def fill(template, domain, **texts):
    """`template` with its places filled: domain words from `DOMAINS[domain]`, data texts from `texts`.

    Data is inserted as it is given (callers pass it through `plain_text`), and only once: braces in data are text.
    Raises InputError when the template has a place that nothing fills, or lacks one of the data texts.
    """
    if domain not in DOMAINS:
        raise InputError(f"unknown domain {domain!r}; choose one of: {', '.join(sorted(DOMAINS))}")
    values = {**DOMAINS[domain], **texts}
    try:
        places = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise InputError(f"a prompt cannot be read ({error}): {template!r}; write a literal brace twice") from None
    if places - set(values):
        raise InputError(
            f"a prompt names the unknown place {sorted(places - set(values))[0]!r}: {template!r}; it can use: {', '.join(sorted(values))}"
        )
    if set(texts) - places:
        raise InputError(f"a prompt lacks the place {{{sorted(set(texts) - places)[0]}}}: {template!r}")
    return template.format(**values)


def block_text(items, domain):
    """The lines of one block of a history, oldest first. `items`: list of (title, summary); either may be empty."""
    lines = []
    for number, (title, summary) in enumerate(items, start=1):
        line = BLOCK_LINE.format(
            number=number,
            title=plain_text(title).rstrip("."),
            image_word=DOMAINS[domain]["image"].capitalize(),
            summary=plain_text(summary) if summary else "not known.",
        )
        lines.append(line)
    return "\n".join(lines)
