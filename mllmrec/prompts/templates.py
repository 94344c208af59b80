"""What the prompts of all systems share: filling templates, data as plain text, chat turns.

A template has named {places}. Titles, summaries and preferences are data: `plain_text` makes sure
that they stay text inside a prompt, so a title that holds `<image>`, `[/INST]`, `<|eot_id|>` or a
line break can neither add an image nor end a turn. It knows the kinds of markers that tokenizers
use; where the tokenizer is known, `ChatProcessor.plain` also breaks that tokenizer's own.
"""

import itertools
import re
import string
from collections.abc import Iterable, Mapping
from typing import Any

from mllmrec.stage.errors import InputError

Turn = dict[str, Any]  # one chat turn in the Hugging Face multimodal format

# What changes between catalogues.
DOMAINS = {
    "video": {
        "item": "video",
        "items": "videos",
        "image": "cover",
        "person": "viewer",
        "past": "watched",
        "act": "watch",
    },
    "movie": {
        "item": "movie",
        "items": "movies",
        "image": "poster",
        "person": "viewer",
        "past": "watched",
        "act": "watch",
    },
    "product": {
        "item": "product",
        "items": "products",
        "image": "photo",
        "person": "shopper",
        "past": "bought",
        "act": "buy",
    },
}

# Characters that tokenizers read as markup when they open a marker: <image>, <|eot_id|>, <s>,
# <｜User｜>, [INST], [gMASK], [UNUSED_TOKEN_145], [control_8], [unused7]. Titles such as
# "[Official] [HD 4K] [2021]" have none.
_KNOWN_KINDS = r"<(?=[<|｜/!\w])|\[(?=/?(?:[A-Z_]+|[a-z]MASK|[A-Za-z_]+_[0-9]+|unused[0-9]+)\])"
_SPACE = re.compile(r"[\s\x00-\x1f\x7f]+")  # control characters, too


def marker_pattern(markers: Iterable[str] = ()) -> re.Pattern[str]:
    """Pattern of the first character of each marker in a text: the known kinds, and `markers`.

    Markers of one character are the group `single`. The rest of a marker is not consumed, so
    overlapping markers are all found.
    """
    whole = sorted({marker for marker in markers if marker})
    single = [re.escape(marker) for marker in whole if len(marker) == 1]
    kinds = [f"(?P<single>{'|'.join(single)})"] if single else []
    longer = (marker for marker in whole if len(marker) > 1)
    for first, group in itertools.groupby(longer, key=lambda marker: marker[0]):
        kinds.append(f"{re.escape(first)}(?={'|'.join(re.escape(m[1:]) for m in group)})")
    return re.compile("|".join([*kinds, _KNOWN_KINDS]))


_MARKUP = marker_pattern()


def break_markers(text: str, pattern: re.Pattern[str] = _MARKUP) -> str:
    """`text` with a blank behind the first character of each marker; nothing else changes.

    `<image>` becomes `< image>`, `[/INST]` becomes `[ /INST]`; a marker of one character becomes a
    blank.
    """
    text = valid_text(text)
    return pattern.sub(lambda m: " " if m.lastgroup == "single" else f"{m.group()} ", text)


def valid_text(text: str) -> str:
    """`text` with a question mark for each half of a surrogate pair, which has no tokens."""
    return str(text).encode("utf-8", "replace").decode()


def plain_text(text: str) -> str:
    """`text` as one line that no chat template or tokenizer can read as a control token.

    Line breaks and runs of blanks become one blank; a bracket that would open a marker is followed
    by a blank, so the text stays readable.
    """
    return _SPACE.sub(" ", break_markers(text)).strip()


def user_turn(text: str, images: int = 0) -> Turn:
    """One user turn: images first, then the text."""
    parts: list[dict[str, str]] = [{"type": "image"} for _ in range(images)]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def assistant_turn(text: str) -> Turn:
    """One assistant turn."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def turn_text(turn: Turn) -> str:
    """The text of a turn, without its images."""
    return "".join(part.get("text", "") for part in turn["content"])


def count_images(turn: Turn) -> int:
    """How many images a turn has a place for."""
    return sum(part["type"] == "image" for part in turn["content"])


def cut(text: str, length: int) -> str:
    """The first `length` characters of `text`, without a word that the cut has broken."""
    if len(text) <= length:
        return text
    kept = text[:length]
    whole = kept.rstrip() if text[length].isspace() else kept.rpartition(" ")[0] or kept
    return whole.rstrip()


def check_template(template: str, domain: str, optional: Iterable[str], *texts: str) -> None:
    """Raise InputError as `fill` would. optional, texts: names of the places."""
    fill(template, domain, dict.fromkeys(optional, ""), **dict.fromkeys(texts, ""))


def fill(
    template: str, domain: str, optional: Mapping[str, str] | None = None, **texts: str
) -> str:
    """`template` with its places filled: domain words from `DOMAINS[domain]`, data from `texts`.

    Data is inserted as given (callers pass it through `plain_text`), and only once: braces in data
    are text. optional: further data, e.g. ids, that a template need not have a place for. Raises
    InputError if the template has an unknown place, or lacks one of the data texts.
    """
    if domain not in DOMAINS:
        raise InputError(f"unknown domain {domain!r}; choose one of: {', '.join(sorted(DOMAINS))}")
    values = {**DOMAINS[domain], **(optional or {}), **texts}
    try:
        places = {
            # {item:>9} or {item!r} would change what is inserted; they are no places
            f"{name}{'!' * bool(how)}{how or ''}{':' * bool(form)}{form or ''}"
            for _, name, form, how in string.Formatter().parse(template)
            if name is not None
        }
    except ValueError as error:
        raise InputError(
            f"a prompt cannot be parsed ({error}): {template!r}; write a literal brace twice"
        ) from None
    unknown, lacking = sorted(places - set(values)), sorted(set(texts) - places)
    if unknown:
        raise InputError(
            f"a prompt has the unknown place {unknown[0]!r}: {template!r}; it can use: "
            f"{', '.join(sorted(values))}"
        )
    if lacking:
        raise InputError(f"a prompt lacks the place {{{lacking[0]}}}: {template!r}; add it")
    return template.format(**values)
