"""What a stage asks of a model, whichever engine runs the model.

A stage describes ONE item or user as a dialogue: a Python generator that yields a `Prompt`,
receives the text that the model generated, as often as it needs, and returns its result. An engine
runs many dialogues together: as soon as one has its text, its next prompt can be asked. No user
waits for the slowest one, and a stage reads like the paper's recurrence.
"""

import hashlib
import json
import re
from collections.abc import Generator, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mllmrec.models.chat import Arrays
from mllmrec.prompts.templates import Turn


@dataclass
class Prompt:
    """One prompt.

    text: rendered; length: in tokens, an image's included; inputs: of a prompt with an image, text
    and image as `ChatProcessor.encode_arrays` gives them; turns: what was rendered, for a server,
    which renders itself; image_url: the image for it, as a data: URL.
    """

    text: str
    length: int
    inputs: Arrays | None = None
    turns: Sequence[Turn] = ()
    image_url: str = ""

    @property
    def nbytes(self) -> int:
        """Memory that the encoded image takes."""
        return sum(array.nbytes for array in (self.inputs or {}).values()) + len(self.image_url)


NO_PROMPT = Prompt("", 0)  # of a dialogue that has not begun
Dialogue = Generator[Prompt, str, Any]
Result = tuple[Any, Any, str | None]
REASONING = re.compile(r"[<\[]/?think(ing)?[>\]]", re.IGNORECASE)


class RejectedError(Exception):
    """Raised inside a dialogue that cannot go on; the message is the reason of the rejected row."""


class GeneratedText(str):
    """A generated text. cut: it has max_new_tokens tokens and no end token."""

    cut: bool = False


def usable_text(text: GeneratedText) -> GeneratedText:
    """`text`; raises RejectedError if it is empty or holds a model's reasoning, closed or not.

    Reasoning is not removed: it took tokens of the answer, and was asked not to be.
    """
    if not text:
        raise RejectedError("the model generated an empty text")
    if REASONING.search(text):
        raise RejectedError(
            "the model reasons before it answers (<think>); turn that off, on a server where it is "
            "started, or name another --model, then pass --retry_rejected true"
        )
    return text


@dataclass
class Request:
    """A dialogue that waits for its text number `number` (0 = the first)."""

    row_id: Hashable
    number: int
    dialogue: Dialogue
    prompt: Prompt
    cut: int = 0  # texts of the dialogue that were cut at max_new_tokens


def first_request(row_id: Hashable, dialogue: Dialogue) -> Request:
    """A dialogue that has not begun: `advance` it without a text."""
    return Request(row_id, -1, dialogue, NO_PROMPT)


def advance(
    waiting: list[Request], request: Request, text: GeneratedText | None
) -> Iterator[Result]:
    """Send a text to a request's dialogue; yield its end, or add its next request to `waiting`.

    A row whose texts were cut has their number as `cut`.
    """
    cut = request.cut + getattr(text, "cut", False)
    try:
        dialogue = request.dialogue
        prompt = next(dialogue) if text is None else dialogue.send(usable_text(text))
        waiting.append(replace(request, number=request.number + 1, prompt=prompt, cut=cut))
    except StopIteration as end:
        row = end.value
        if cut and isinstance(row, dict):
            row = row | {"cut": cut}
        yield request.row_id, row, None
    except RejectedError as reason:
        yield request.row_id, None, str(reason)


def stream_id(*names: Any) -> int:
    """31-bit number of the random numbers that belong to `names`, e.g. (seed, user id, block)."""
    digest = hashlib.sha256(json.dumps(names).encode()).digest()
    return int.from_bytes(digest[:4]) & ((1 << 31) - 1)
