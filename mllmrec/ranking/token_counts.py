"""How many tokens a stage sends through its model, counted from its files.

Prompts are rendered again with the model's own processor; no weights are loaded. The counts are
those of the run, whether it was interrupted or not; those of generated texts are of the texts as
they were written.
"""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass

from mllmrec.generation.dialogues import Dialogue, RejectedError
from mllmrec.models.chat import ChatProcessor
from mllmrec.ranking.reader import RowReader
from mllmrec.ranking.scoring import shared_prefix_length
from mllmrec.stage.schema import Row


@dataclass(frozen=True)
class TokenCounts:
    """Sums over some rows.

    requests: prompts; prompt: their tokens, images included; image: those of images alone;
    computed: prompt tokens where a prefix that prompts share is computed once; generated: tokens
    of the texts, 0 where an answer is one position's logits.
    """

    requests: int = 0
    prompt: int = 0
    image: int = 0
    computed: int = 0
    generated: int = 0

    def __add__(self, other: "TokenCounts") -> "TokenCounts":
        pairs = zip(astuple(self), astuple(other), strict=True)
        return TokenCounts(*(one + more for one, more in pairs))


def scoring_tokens(
    rows: Sequence[Row], reader: RowReader, reuse_prefix: bool = True
) -> TokenCounts:
    """The tokens of scoring these rows, see `mllmrec.ranking.scoring.score_rows`."""
    chat, total = reader.chat, TokenCounts()
    for group in reader.groups(rows):
        n_image = chat.count_image_tokens(reader.image(rows[group[0]]))
        prompts = [chat.expand_image_token(reader.prompt(rows[n])[1], n_image) for n in group]
        lengths = [len(ids) for ids in prompts]
        shared = shared_prefix_length(prompts, chat.image_token_id) if reuse_prefix else 0
        total += TokenCounts(
            requests=len(group),
            prompt=sum(lengths),
            image=n_image * len(group),
            computed=sum(lengths) - (len(group) - 1) * shared,
        )
    return total


def dialogue_tokens(
    dialogues: Iterable[tuple[Dialogue, Sequence[str]]], chat: ChatProcessor, max_new_tokens: int
) -> TokenCounts:
    """The tokens of dialogues that were run before.

    dialogues: (as it is handed to the engine, the texts that the model generated, in order);
    max_new_tokens: of the run, where a text is cut and has no end token.
    """
    total = TokenCounts()
    for dialogue, texts in dialogues:
        with suppress(RejectedError):  # from here on the stage asks nothing more
            prompt = next(dialogue)
            for number, text in enumerate(texts, start=1):
                own = len(chat.tokenizer(text, add_special_tokens=False)["input_ids"]) + 1
                length = prompt.length
                total += TokenCounts(1, length, 0, length, min(own, max_new_tokens))
                if number < len(texts):
                    prompt = dialogue.send(text)
    return total
