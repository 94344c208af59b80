"""One question to a model that was just loaded, before hours of work depend on it.

A damaged config, processor, tokenizer or chat template mostly loads without a word and fails, or
gives meaningless answers, at the first batch, in any line of transformers.
"""

from typing import Any

import torch
from PIL import Image

from mllmrec.models.chat import ChatProcessor, to_model
from mllmrec.models.processors import REMEDY, cannot
from mllmrec.prompts.templates import user_turn
from mllmrec.stage.errors import InputError

TEXTS = ("A question.", "A longer question, so that the other one is padded.")
GRAY = (128, 128, 128)


def check_trial(name: str, model: Any, chat: ChatProcessor) -> None:
    """Raise InputError unless the model `name` reads two questions, with an image each if it can.

    The prompts must hold the questions and one image token each, the tokens must be in the
    vocabulary, and the logits must be finite.
    """
    has_place = not chat.takes_images or "{image}" in (chat.prompt_format or "{image}")
    remedy = REMEDY if has_place else "add the place {image} to --prompt_format"
    try:
        prompts, rows = _prompts(chat), model.get_input_embeddings().weight.shape[0]
        fault = _prompt_fault(prompts, chat) or _vocabulary_fault(prompts, chat, rows)
        if fault is None:
            fault = _logits_fault(trial_logits(model, chat), chat)
    except InputError:
        raise
    except Exception as error:
        raise cannot(f"the model {name} cannot answer a question", error, remedy) from None
    if fault:
        raise InputError(f"the model {name} cannot answer a question: {fault}; {REMEDY}")


def trial_logits(model: Any, chat: ChatProcessor) -> torch.Tensor:
    """(questions, vocabulary): logits of what follows each question."""
    images = [Image.new("RGB", (64, 48), GRAY)] * len(TEXTS) if chat.takes_images else None
    batch = to_model(chat.encode(_prompts(chat), images), model)
    with torch.inference_mode():
        return model(**batch).logits[:, -1]


def _prompts(chat: ChatProcessor) -> list[str]:
    return [chat.render([user_turn(text, images=int(chat.takes_images))]) for text in TEXTS]


def _prompt_fault(prompts: list[str], chat: ChatProcessor) -> str | None:
    if any(text not in prompt for text, prompt in zip(TEXTS, prompts, strict=True)):
        return "its chat template leaves out the text of the question"
    image = chat.image_token_id
    # The processor of BLIP-2 adds the image tokens itself.
    has_place = chat.takes_images and (not chat.prompt_format or "{image}" in chat.prompt_format)
    if has_place and any(image is None or chat.ids(p).count(image) != 1 for p in prompts):
        return "its chat template has no place for an image, or its tokenizer no image token"
    return None


def _vocabulary_fault(prompts: list[str], chat: ChatProcessor, rows: int) -> str | None:
    """rows: of the model's embedding. Tokens that were added and are never used may lie beyond."""
    added = chat.tokenizer.added_tokens_decoder
    used = {i for i in chat.tokenizer.get_vocab().values() if i not in added}
    largest = max(used.union(*map(chat.ids, prompts)) - {chat.image_token_id})
    if largest < rows:
        return None
    return f"its tokenizer has the token {largest:,}, its embedding {rows:,} rows: of another model"


def check_end_tokens(name: str, model: Any) -> None:
    """Raise InputError for end tokens in the generation config that are none of the vocabulary."""
    eos, rows = model.generation_config.eos_token_id, model.get_input_embeddings().weight.shape[0]
    ids = eos if isinstance(eos, list) else [eos]
    if eos is not None and not (ids and all(type(i) is int and 0 <= i < rows for i in ids)):
        raise InputError(
            f"the eos_token_id {eos!r} in generation_config.json of the model {name} is no token "
            "of its vocabulary; correct it"
        )


def _logits_fault(logits: torch.Tensor, chat: ChatProcessor) -> str | None:
    for kind in ("bos", "eos", "pad"):
        token_id = getattr(chat.tokenizer, f"{kind}_token_id")
        if token_id is not None and token_id >= logits.shape[-1]:
            return f"the {kind} token of its tokenizer is outside of the model's vocabulary"
    if not torch.isfinite(logits).all():
        return "its logits are not all finite numbers"
    return None
