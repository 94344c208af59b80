"""From chat turns to model inputs, for every stage: one class renders, counts, shortens and pads.

The model's own chat template renders the turns, so another model is a change of config; a model
without one takes a plain prompt format. Images are never truncated: texts are shortened before
rendering until the prompt fits (`shorten_to_fit`). Padding is on the left wherever the last
position is read (generation, scoring) and on the right for training.

Text that is data stays data: `plain` and `break_markers` break the control tokens of the model's
own tokenizer in a text, and `control_token_difference` compares the token ids of a rendered prompt
with those of the same turns without data.

Imports torch only where tensors are made: a client of a server needs none.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from mllmrec.prompts.templates import (
    Turn,
    break_markers,
    count_images,
    cut,
    marker_pattern,
    plain_text,
    turn_text,
    user_turn,
)
from mllmrec.stage.errors import InputError

if TYPE_CHECKING:
    from transformers import BatchFeature

Arrays = dict[str, Any]  # name -> NumPy array
# Characters of markup: an added token with one of them is a control token, even if it is not marked
# as special; one without (a word that was added to the vocabulary) may occur in any text.
_MARKUP_CHARACTERS = frozenset("<>[]|｜")


class ChatProcessor:
    """A transformers processor (for a text model, a tokenizer) as this repository uses it.

    single_tile: LLaVA-NeXT gets the image once, as a whole, and not also cut into tiles: 577 tokens
    instead of up to 2,900. prompt_format: for models without a chat template, a string with the
    place {text} and, for models whose prompt holds an image token, {image}; an answer follows after
    a blank, or where the string ends with white space behind that.
    """

    def __init__(self, processor: Any, single_tile: bool = False, prompt_format: str = "") -> None:
        self.processor, self.single_tile, self.prompt_format = processor, single_tile, prompt_format
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.takes_images = self.tokenizer is not processor
        self._counts_without_data: dict[tuple[tuple[str, int], ...], Counter[int]] = {}
        if prompt_format and "{text}" not in prompt_format:
            raise InputError(f"--prompt_format {prompt_format!r} lacks the place {{text}}; add it")
        if self.takes_images and getattr(processor, "patch_size", 0) is None:
            raise InputError(
                "the processor lacks patch_size; add it to its processor_config.json as the "
                "model's config has it"
            )

    def render(self, messages: Sequence[Turn], add_generation_prompt: bool = True) -> str:
        """The prompt as a string.

        add_generation_prompt: the prompt ends where the answer starts; else the turns hold the
        answer.
        """
        if self.prompt_format:
            return self._render_plain(messages)
        if self.takes_images:
            return self.processor.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        plain = [{**turn, "content": turn_text(turn)} for turn in messages]
        # Templates of models that can reason first (Qwen3) use enable_thinking, all others ignore
        # it.
        return self.tokenizer.apply_chat_template(
            plain,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            enable_thinking=False,
        )

    def _render_plain(self, messages: Sequence[Turn]) -> str:
        user, *answers = messages
        image = self.processor.image_token if self.takes_images and count_images(user) else ""
        places = {"{image}": str(image), "{text}": turn_text(user)}
        # One substitution for both places, so that data that holds "{image}" stays text.
        prompt = re.sub(r"\{image\}|\{text\}", lambda match: places[match[0]], self.prompt_format)
        blank = "" if prompt[-1:].isspace() else " "
        return prompt + "".join(f"{blank}{turn_text(a)}{self.tokenizer.eos_token}" for a in answers)

    @cached_property
    def control_tokens(self) -> dict[str, int]:
        """Control tokens of this tokenizer and processor -> their ids.

        Special tokens, added tokens that look like markup, and the tokens of images and videos.
        """
        tokens = {str(token) for token in self.tokenizer.all_special_tokens}
        for added in self.tokenizer.added_tokens_decoder.values():
            if added.special or _MARKUP_CHARACTERS & set(added.content):
                tokens.add(added.content)
        for name in ("image_token", "video_token"):
            tokens.add(str(getattr(self.processor, name, None) or ""))
        ids = {t: self.tokenizer.convert_tokens_to_ids(t) for t in sorted(tokens - {""})}
        unknown = self.tokenizer.unk_token
        return {
            token: token_id
            for token, token_id in ids.items()
            # The vocabulary lacks a token if it has no id or that of the unknown token.
            if token_id is not None and (token == unknown or token_id != ids.get(unknown))
        }

    @cached_property
    def marker_pattern(self) -> re.Pattern[str]:
        """Pattern of the first character of each marker: known kinds, and this tokenizer's."""
        return marker_pattern(self.control_tokens)

    def plain(self, text: str) -> str:
        """`plain_text`, with the control tokens of this tokenizer broken, too."""
        return self.break_markers(plain_text(text)).strip()

    def break_markers(self, text: str) -> str:
        """`text` with each marker broken by a blank; a text without markers stays as it is."""
        return break_markers(text, self.marker_pattern)

    def control_token_difference(self, ids: Sequence[int], messages: Sequence[Turn]) -> str | None:
        """Which control token the texts of a prompt add or remove; None if they do neither.

        ids: token ids of the rendered `messages`. Their control tokens are compared with those of
        the same turns with a neutral text. This also finds what breaking markers in the text cannot
        prevent, such as a tokenizer that turns other characters into a marker.
        """
        expected = self._count_without_data(
            tuple((turn["role"], count_images(turn)) for turn in messages)
        )
        counts = self._count_control_tokens(ids)
        if counts == expected:
            return None
        token_id = min(i for i in counts | expected if counts[i] != expected[i])
        change = "adds" if counts[token_id] > expected[token_id] else "removes"
        return f"its text {change} the control token {self._checked_ids[token_id]!r}"

    @cached_property
    def _checked_ids(self) -> dict[int, str]:
        """Ids of the control tokens that are counted -> tokens."""
        checked = {token_id: token for token, token_id in self.control_tokens.items()}
        tokenizer = self.tokenizer
        if tokenizer.unk_token not in (None, tokenizer.bos_token, tokenizer.eos_token):
            # Characters that the vocabulary lacks become this token, too, and harm nothing.
            checked.pop(tokenizer.unk_token_id, None)
        return checked

    def _count_control_tokens(self, ids: Sequence[int]) -> Counter[int]:
        checked = self._checked_ids
        return Counter(token_id for token_id in ids if token_id in checked)

    def _count_without_data(self, structure: tuple[tuple[str, int], ...]) -> Counter[int]:
        """Control tokens of turns (role, number of images) with a neutral text."""
        if structure not in self._counts_without_data:
            turns = [
                {**user_turn("A text.", images=images), "role": role} for role, images in structure
            ]
            ids = self.ids(self.render(turns))
            self._counts_without_data[structure] = self._count_control_tokens(ids)
        return self._counts_without_data[structure]

    def count(self, text: str) -> int:
        """Number of tokens of a rendered prompt, an image counted as one."""
        return len(self.ids(text))

    def ids(self, text: str) -> list[int]:
        """Token ids of a rendered prompt, an image as one token."""
        return self.tokenizer(text, add_special_tokens=self.adds_bos(text)).input_ids

    @cached_property
    def image_token_id(self) -> int | None:
        """Id of the token that stands for an image; None for a text model."""
        if not self.takes_images:
            return None
        return self.tokenizer.convert_tokens_to_ids(str(self.processor.image_token))

    def expand_image_token(self, ids: list[int], n_image_tokens: int) -> list[int]:
        """Token ids as the model gets them: the one image token repeated; 0: without image."""
        if not n_image_tokens:
            return ids
        assert self.image_token_id is not None
        place = ids.index(self.image_token_id)
        return [*ids[:place], *[self.image_token_id] * n_image_tokens, *ids[place + 1 :]]

    def count_image_tokens(self, image: Image.Image | None) -> int:
        """Number of tokens that an image takes in the prompt; 0 without image."""
        return 0 if image is None else self.image_tokens_of_size(image.width, image.height)

    def image_tokens_of_size(self, width: int, height: int) -> int:
        """Number of tokens that an image of this size in pixels takes in the prompt."""
        if self.single_tile:
            side = self._tile_size // self.processor.patch_size
            return side * side + 1  # the model also appends its end-of-row token to the only tile
        from mllmrec.models import compat

        return compat.num_image_tokens(self.processor, width, height)

    def encode(
        self,
        texts: Sequence[str],
        images: Sequence[Image.Image | None] | None = None,
        side: str = "left",
    ) -> Any:
        """Rendered prompts, with at most one image each, as a padded batch of tensors.

        side: of the padding. Nothing is truncated.
        """
        options = {
            "padding": True,
            "padding_side": side,
            "return_tensors": "pt",
            "add_special_tokens": self.adds_bos(texts[0]),
        }
        given = [image for image in images or () if image is not None]
        if not self.takes_images:
            return self.tokenizer(list(texts), **options)
        if self.single_tile and given:
            return self._encode_single_tiles(texts, given, options)
        return self.processor(text=list(texts), images=given or None, **options)

    @property
    def _tile_size(self) -> int:
        """Width and height of a tile in pixels."""
        return self.processor.image_processor.crop_size["height"]

    def _encode_single_tiles(
        self, texts: Sequence[str], images: Sequence[Image.Image], options: dict[str, Any]
    ) -> "BatchFeature":
        from transformers import BatchFeature

        token, tile = self.processor.image_token, self._tile_size
        encoded = self.processor.image_processor(
            images, image_grid_pinpoints=[[tile, tile]], return_tensors="pt"
        )
        n_tokens = self.image_tokens_of_size(tile, tile)  # the same for every image
        expanded = [text.replace(token, token * n_tokens) for text in texts]
        pixels = {
            "pixel_values": encoded["pixel_values"][
                :, :1
            ],  # the whole image; behind it are the tiles
            "image_sizes": encoded["image_sizes"],
        }
        return BatchFeature({**self.tokenizer(expanded, **options), **pixels})

    def encode_arrays(self, text: str, image: Image.Image) -> Arrays:
        """A rendered prompt with its image as NumPy arrays: cheap to pass between processes."""
        return dict(
            self.processor(
                text=[text],
                images=[image],
                return_tensors="np",
                add_special_tokens=self.adds_bos(text),
            )
        )

    def collate_arrays(self, encoded: Sequence[Arrays]) -> "BatchFeature":
        """What `encode_arrays` made of several prompts, as the left-padded batch of `encode`."""
        import torch
        from transformers import BatchFeature

        from mllmrec.models.padding import pad_rows

        batch = {}
        for name, first in encoded[0].items():
            arrays = [one[name] for one in encoded]
            if first.shape == encoded[0]["input_ids"].shape:  # one value per token
                value = self.tokenizer.pad_token_id if name == "input_ids" else 0
                batch[name] = pad_rows([array[0].tolist() for array in arrays], value)
                continue
            if first.ndim == 5:  # LLaVA-NeXT, (image, tile, colour, height, width)
                most = max(
                    array.shape[1] for array in arrays
                )  # padding tiles are never attended to
                arrays = [
                    np.pad(a, ((0, 0), (0, most - a.shape[1]), (0, 0), (0, 0), (0, 0)))
                    for a in arrays
                ]
            batch[name] = torch.from_numpy(np.concatenate(arrays))
        return BatchFeature(batch)

    def decode(self, ids: Any) -> str:
        """Generated token ids as one line of text without special tokens."""
        return " ".join(self.tokenizer.decode(ids, skip_special_tokens=True).split())

    def adds_bos(self, text: str) -> bool:
        """False if the template has written the BOS token itself: a second would be too many."""
        bos = self.tokenizer.bos_token
        return not (bos and text.startswith(bos))


def shorten_to_fit(
    render: Callable[[list[str]], str], texts: Sequence[str], fits: Callable[[str], bool]
) -> tuple[str, bool]:
    """(prompt, was shortened): `render(texts)` with the longest texts cut until it fits.

    The longest texts are cut first, all to the same length. If even empty texts do not fit, the
    prompt with empty texts is returned, and the caller decides.
    """
    prompt = render(list(texts))
    if fits(prompt):
        return prompt, False
    low, high = 0, max(map(len, texts), default=0)
    while low < high:  # the largest number of characters per text that fits
        middle = (low + high + 1) // 2
        if fits(render([cut(text, middle) for text in texts])):
            low = middle
        else:
            high = middle - 1
    return render([cut(text, low) for text in texts]), True


def to_model(batch: Any, model: Any) -> Any:
    """`batch` on the model's device, its images in the model's dtype."""
    batch = batch.to(model.device)
    if "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"].to(model.dtype)
    return batch
