"""Prompts of stages 2 and 3 that fit the model: texts give way before a prompt becomes too long."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from mllmrec.data.images import ImageError, data_url, open_image, pad_black
from mllmrec.generation.dialogues import Prompt, RejectedError
from mllmrec.generation.preferences import HistoryItem
from mllmrec.models.chat import ChatProcessor, shorten_to_fit
from mllmrec.prompts.mllm_msr import BLOCK_LINE, block_text
from mllmrec.prompts.templates import Turn, fill, user_turn
from mllmrec.stage.schema import Row


class EncodedImage(NamedTuple):
    """The prompt for an item's image, or the reason why there is none."""

    item_id: str
    prompt: Prompt | None
    reason: str | None


class ImagePrompts:
    """A data set that worker processes read ahead of the model: one EncodedImage per item.

    items: rows of items.jsonl; folder: what image paths are relative to; turn: the turn that asks
    about an image; sizes: item_id -> size to which its image is padded with black, for those it
    holds; as_url: images as data: URLs for a server, not as arrays for a model in this process.
    """

    def __init__(
        self,
        items: Sequence[Row],
        folder: Path,
        chat: ChatProcessor,
        turn: Turn,
        sizes: Mapping[str, tuple[int, int] | None] | None = None,
        as_url: bool = False,
    ) -> None:
        self.items, self.folder, self.chat, self.turn = list(items), folder, chat, turn
        self.sizes, self.as_url = dict(sizes or {}), as_url
        self.text = chat.render([turn])

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, n: int) -> EncodedImage:
        item_id, name = self.items[n]["item_id"], self.items[n]["image"]
        if name is None:
            return EncodedImage(item_id, None, "image: the item has none")
        try:
            image = pad_black(open_image(self.folder / name), self.sizes.get(item_id))
            return EncodedImage(item_id, self._prompt(image), None)
        # ValueError: some processors refuse the narrowest images
        except (ImageError, ValueError) as error:
            return EncodedImage(item_id, None, f"image {name}: {error}")

    def _prompt(self, image: Image.Image) -> Prompt:
        chat, text = self.chat, self.text
        if self.as_url:
            length = chat.count(text) - 1 + chat.count_image_tokens(image)
            return Prompt(text, length, turns=[self.turn], image_url=data_url(image))
        inputs = chat.encode_arrays(text, image)
        return Prompt(text, inputs["input_ids"].shape[1], inputs)


class PromptWriter:
    """Writes the prompts of one item or user, at most `max_prompt_tokens` tokens long.

    Titles, summaries and preferences are data and stay text: their markers are broken for the
    model's tokenizer, and a prompt whose token ids still show another chat structure is rejected.
    ids: what templates may name, e.g. user_id; block_line: template of one item of a block.
    counts["shortened"]: how many prompts had to be shortened.
    """

    def __init__(
        self,
        chat: ChatProcessor,
        max_prompt_tokens: int,
        domain: str,
        ids: Mapping[str, str] | None = None,
        block_line: str = BLOCK_LINE,
    ) -> None:
        self.chat, self.max_prompt_tokens, self.domain, self.block_line = (
            chat,
            max_prompt_tokens,
            domain,
            block_line,
        )
        self.ids = {name: chat.plain(text) for name, text in (ids or {}).items()}
        self.counts: Counter[str] = Counter()

    def image_prompt(self, image: EncodedImage) -> Prompt:
        """The prompt with an item's image.

        Raises RejectedError if there is none, or it is too long.
        """
        if image.prompt is None:
            raise RejectedError(image.reason or "image: none")
        length = image.prompt.length
        if length > self.max_prompt_tokens:
            raise RejectedError(
                f"image: its prompt takes {length} tokens, the model has room for "
                f"{self.max_prompt_tokens}"
            )
        return image.prompt

    def text_prompt(self, template: str, **texts: str) -> Prompt:
        """The filled template as a prompt; if it is too long, the longest of `texts` are cut.

        Raises RejectedError if a text adds a control token.
        """

        def write(values: list[str]) -> str:
            return self._fill(template, **dict(zip(texts, values, strict=True)))

        plain = [self.chat.plain(text) for text in texts.values()]
        content, shortened = shorten_to_fit(write, plain, self._fits)
        self.counts["shortened"] += shortened
        return self._checked(content)

    def history_prompt(self, template: str, items: Sequence[HistoryItem], **texts: str) -> Prompt:
        """The prompt for some items of a history: summaries give way first, then titles.

        Raises RejectedError if it is too long even without titles, or a text adds a control token.
        """
        titles, summaries = [i.title for i in items], [i.summary for i in items]

        def write(titles: list[str], summaries: list[str]) -> str:
            return self._fill_history(template, items, (titles, summaries), texts)

        content, shortened = shorten_to_fit(lambda kept: write(titles, kept), summaries, self._fits)
        if shortened and not self._fits(content):
            no_summaries = [""] * len(items)
            content, _ = shorten_to_fit(lambda kept: write(kept, no_summaries), titles, self._fits)
            if not self._fits(content):
                raise RejectedError(
                    f"a prompt for {len(items)} items is longer than {self.max_prompt_tokens} "
                    "tokens even without titles"
                )
        self.counts["shortened"] += shortened
        return self._checked(content)

    def fits_whole(self, template: str, items: Sequence[HistoryItem]) -> bool:
        """True if the prompt for these items fits without shortening any text."""
        titles, summaries = [i.title for i in items], [i.summary for i in items]
        return self._fits(self._fill_history(template, items, (titles, summaries), {}))

    def nonzero_counts(self) -> dict[str, int]:
        """The counts for the output row."""
        return {key: count for key, count in self.counts.items() if count}

    def _fill_history(
        self,
        template: str,
        items: Sequence[HistoryItem],
        kept: tuple[list[str], list[str]],
        texts: dict[str, Any],
    ) -> str:
        """kept: what is left of the titles and summaries."""
        pairs, ids = list(zip(*kept, strict=True)), [item.item_id for item in items]
        block = block_text(pairs, self.domain, self.chat.plain, self.block_line, ids)
        data = {name: self.chat.plain(text) for name, text in texts.items()}
        return self._fill(template, block=block, **data)

    def _fill(self, template: str, **texts: str) -> str:
        """What the user's turn says."""
        return fill(template, self.domain, self.ids, **texts)

    def _fits(self, content: str) -> bool:
        return self.chat.count(self.chat.render([user_turn(content)])) <= self.max_prompt_tokens

    def _checked(self, content: str) -> Prompt:
        turns = [user_turn(content)]
        prompt = self.chat.render(turns)
        ids = self.chat.ids(prompt)
        difference = self.chat.control_token_difference(ids, [user_turn("")])
        if difference is not None:
            raise RejectedError(f"prompt: {difference}")
        return Prompt(prompt, len(ids), turns=turns)
