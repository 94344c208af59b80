"""From chat turns to model inputs, for every stage: one place renders, counts, shortens and pads.

The model's own chat template renders the turns, so another model is a change of config. Images are never cut: texts
are shortened before rendering until the prompt fits (`fit`). Padding is on the left wherever the last position is
read (generation, scoring) and on the right for training.
"""

from functools import cached_property

import numpy as np
import torch
from transformers import BatchFeature

from data_processing.errors import InputError
from data_processing.prompts import ANSWERS, answer_turn, cut, user_turn


class Chat:
    """A processor (or, for a text model, a tokenizer) as this repository uses it.

    one_tile: LLaVA-NeXT sees the picture once, as a whole, and not also cut into tiles: 577 tokens in place of up to 2,900.
    """

    def __init__(self, processor, one_tile=False):
        self.processor, self.one_tile = processor, one_tile
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.takes_images = self.tokenizer is not processor
        if self.takes_images and getattr(processor, "patch_size", 0) is None:
            raise InputError("the processor lacks patch_size; add it to its processor_config.json as the model's config has it")

    def render(self, messages, answer_follows=True):
        """The prompt as a string. answer_follows: ends where the answer starts; else the turns hold the answer already."""
        if not self.takes_images:  # templates of text models want plain strings
            messages = [{**turn, "content": "".join(part["text"] for part in turn["content"])} for turn in messages]
            # Templates of models that can think aloud first (Qwen3) take the last option, all others pass over it.
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer_follows, enable_thinking=False)
        return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer_follows)

    def count(self, text):
        """Number of tokens of a rendered prompt, a picture counted as one."""
        return len(self.ids(text))

    def ids(self, text):
        """Token ids of a rendered prompt, a picture as one token."""
        return self.tokenizer(text, add_special_tokens=self._adds_bos(text)).input_ids

    @property
    def image_token_id(self):
        return self.processor.image_token_id

    def expand(self, ids, image_tokens):
        """Token ids as the model sees them: the picture's one token repeated `image_tokens` times."""
        place = ids.index(self.image_token_id)
        return ids[:place] + [self.image_token_id] * image_tokens + ids[place + 1 :]

    def image_tokens(self, image):
        """Number of tokens that a PIL image takes in the prompt."""
        return self.tokens_of_size(image.width, image.height)

    def tokens_of_size(self, width, height):
        if self.one_tile:
            side = self._tile // self.processor.patch_size
            return side * side + 1  # what the model puts at the end of a picture's row it puts behind the only tile, too
        return self.processor._get_num_multimodal_tokens(image_sizes=[(height, width)]).num_image_tokens[0]

    def encode(self, texts, images=None, side="left"):
        """Rendered prompts (and one PIL image each, or None) as a padded batch of tensors; nothing is truncated."""
        options = {"padding": True, "padding_side": side, "return_tensors": "pt", "add_special_tokens": self._adds_bos(texts[0])}
        if not self.takes_images:
            return self.tokenizer(texts, **options)
        if self.one_tile and images is not None:
            return self._encode_one_tile(texts, images, options)
        return self.processor(text=texts, images=images, **options)

    @property
    def _tile(self):
        """Width and height of a tile in pixels."""
        return self.processor.image_processor.crop_size["height"]

    def _encode_one_tile(self, texts, images, options):
        token = self.processor.image_token
        pictures = self.processor.image_processor(images, image_grid_pinpoints=[[self._tile, self._tile]], return_tensors="pt")
        texts = [text.replace(token, token * self.image_tokens(image)) for text, image in zip(texts, images, strict=True)]
        whole = {"pixel_values": pictures["pixel_values"][:, :1], "image_sizes": pictures["image_sizes"]}
        return BatchFeature({**self.tokenizer(texts, **options), **whole})

    def encode_one(self, text, image):
        """A rendered prompt with its PIL image as NumPy arrays: cheap to hand from process to process; see `join`."""
        return dict(self.processor(text=[text], images=[image], return_tensors="np", add_special_tokens=self._adds_bos(text)))

    def join(self, singles):
        """Prompts that were encoded one by one, as the left-padded batch of tensors that `encode` makes of all at once."""
        longest, joined = max(single["input_ids"].shape[1] for single in singles), {}
        for name in singles[0]:
            parts = [single[name] for single in singles]
            if parts[0].shape == singles[0]["input_ids"].shape:  # one value per token
                fill = self.tokenizer.pad_token_id if name == "input_ids" else 0
                parts = [np.pad(part, ((0, 0), (longest - part.shape[1], 0)), constant_values=fill) for part in parts]
            elif parts[0].ndim == 5:  # LLaVA-NeXT, (picture, tile, colour, height, width): the tiles that one lacks are never looked at
                most = max(part.shape[1] for part in parts)
                parts = [np.pad(part, ((0, 0), (0, most - part.shape[1]), (0, 0), (0, 0), (0, 0))) for part in parts]
            joined[name] = torch.from_numpy(np.concatenate(parts))
        return BatchFeature(joined)

    def decode(self, ids):
        """Generated token ids as one line of text without special tokens."""
        return " ".join(self.tokenizer.decode(ids, skip_special_tokens=True).split())

    @cached_property
    def answer_texts(self):
        """dict label -> what a rendered turn with this answer adds to the turn without it, up to what ends the turn.

        Behind the answer stands the tokenizer's end token and nothing else, whatever the template writes there: some
        published ones close with characters that are no token at all, and those would be learned for nothing.
        """
        ask = [user_turn("A question.", images=int(self.takes_images))]
        prompt = self.render(ask)
        whole = {label: self.render([*ask, answer_turn(answer)], answer_follows=False) for label, answer in ANSWERS.items()}
        if not all(text.startswith(prompt) and len(text) > len(prompt) for text in whole.values()):
            raise InputError("the chat template does not put the answer behind the prompt, so the model cannot be trained with it")
        added = {label: text[len(prompt) :] for label, text in whole.items()}
        if not all(ANSWERS[label] in text for label, text in added.items()):
            raise InputError("the chat template changes the answer, so the model cannot be trained with it")
        return {label: text.partition(ANSWERS[label])[0] + ANSWERS[label] + self.tokenizer.eos_token for label, text in added.items()}

    @cached_property
    def answer_ids(self):
        """dict label -> token ids that the answer adds to a rendered prompt.

        Not looked up by a string: `Yes` and ` Yes` are different tokens, and which one follows is the template's affair.
        """
        prompt = self.render([user_turn("A question.", images=int(self.takes_images))])
        before = self.ids(prompt)
        after = {label: self.ids(prompt + answer) for label, answer in self.answer_texts.items()}
        if any(ids[: len(before)] != before for ids in after.values()):
            raise InputError("the tokenizer joins the end of the prompt and the answer into one token; use another model")
        found = {label: ids[len(before) :] for label, ids in after.items()}
        if found[0][0] == found[1][0]:
            raise InputError(f"the tokenizer starts {ANSWERS[0]!r} and {ANSWERS[1]!r} with the same token; use another model")
        return found

    def _adds_bos(self, text):
        """False if the template has put the first token there itself: two of them would be one too many."""
        bos = self.tokenizer.bos_token
        return not (bos and text.startswith(bos))


def fit(make, texts, fits):
    """(prompt, was shortened): `make(texts)` with the longest texts cut at their ends until `fits(prompt)`.

    texts: list of strings; the longest are cut first, all to the same length. If even empty texts do not fit, the
    prompt with empty texts is returned, and the caller decides.
    """
    prompt = make(texts)
    if fits(prompt):
        return prompt, False
    low, high = 0, max(map(len, texts), default=0)
    while low < high:  # the largest number of characters per text that fits
        middle = (low + high + 1) // 2
        if fits(make([cut(text, middle) for text in texts])):
            low = middle
        else:
            high = middle - 1
    return make([cut(text, low) for text in texts]), True


def on_device(batch, model):
    """`batch` on the model's device, its pictures in the model's number format."""
    batch = batch.to(model.device)
    if "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"].to(model.dtype)
    return batch
