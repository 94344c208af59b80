"""Trains the tiny Llama of the sample from scratch: to write and to update a user's preference.

In: nothing but `mllmrec/data/sample_world.py`. Out: a model folder (fp16 safetensors, tokenizer,
chat template).

    python scripts/tiny_models/train_llama.py --output Inference/tiny_models/llama

The training prompts are those of stage 3 with histories of simulated users, in blocks of one to
three items (a few with a whole history, for the direct ablation); the answers are what the block
rule of the sample world gives. The preference before a later block is random, so the model has to
read it from the prompt. One CPU core, about 12 minutes.
"""

from typing import Any

import numpy as np
import torch
from build import new_llama
from numpy.random import Generator
from train_llava import train, train_and_save

from mllmrec.data import sample_world as world
from mllmrec.models.chat import ChatProcessor
from mllmrec.prompts import mllm_msr as prompts
from mllmrec.prompts.templates import Turn, assistant_turn, fill, user_turn

STEPS, BATCH, DIRECT_BATCH = 1500, 32, 8
FIRST_FRACTION = 0.25  # of the prompts: for a first block; the others are for later blocks
# Of the batches: of whole histories. Those are long, so they are not mixed with the others.
DIRECT_FRACTION = 0.05


def random_block(n_items: int, rng: Generator) -> list[dict[str, str]]:
    """Items as one user chooses them: two thirds of the values are set to the favourite ones."""
    favourite = world.random_item(rng)
    block = [world.random_item(rng) for _ in range(n_items)]
    for item in block:
        for attribute in world.ATTRIBUTES:
            if rng.random() < 2 / 3:
                item[attribute] = favourite[attribute]
        item["title"] = world.title_of(item["topic"], rng)
    return block


def random_summary(item: dict[str, str], rng: Generator) -> str:
    """What stage 2 may have written: of the image only, or fused."""
    return world.caption(item) if rng.random() < 0.7 else world.fused_caption(item)


def random_block_size(rng: Generator, direct: bool) -> int:
    """Number of items in a prompt; direct: of a whole history."""
    if direct:
        return int(rng.integers(4, 16))
    return int(rng.choice([1, 2, 3], p=[0.15, 0.15, 0.7]))


def random_turns(rng: Generator, direct: bool) -> tuple[Turn, Turn]:
    """(user turn, assistant turn) of a random prompt of stage 3; direct: with a whole history."""
    previous = None
    if not direct and rng.random() > FIRST_FRACTION:
        previous = {
            attribute: str(rng.choice(world.VALUES[attribute])) for attribute in world.ATTRIBUTES
        }
    block = random_block(random_block_size(rng, direct), rng)
    if previous:  # it often agrees with the block, as it does for a real user
        for attribute in world.ATTRIBUTES:
            if rng.random() < 0.5:
                previous[attribute] = block[int(rng.integers(len(block)))][attribute]
    items = [(item["title"], random_summary(item, rng)) for item in block]
    texts = {"block": prompts.block_text(items, "video")}
    template = prompts.PREFERENCE_FIRST
    if previous:
        texts["preference"] = world.preference_text(previous)
        template = prompts.PREFERENCE_NEXT
    if direct:
        wanted = world.rolled_preferences(block)[-1]
    else:
        wanted = world.update_preference(previous, block)
    prompt = fill(template, "video", None, **texts)
    return user_turn(prompt), assistant_turn(world.preference_text(wanted))


def random_batch(chat: ChatProcessor, rng: Generator) -> Any:
    """Random prompts with their answers."""
    direct = rng.random() < DIRECT_FRACTION
    return answer_batch(
        chat, [random_turns(rng, direct) for _ in range(DIRECT_BATCH if direct else BATCH)]
    )


def answer_batch(chat: ChatProcessor, turns: list[tuple[Turn, Turn]]) -> Any:
    """A padded batch of dialogues (user turn, assistant turn); labels on the answers alone."""
    texts = [chat.render(both, add_generation_prompt=False) for both in turns]
    batch = chat.encode(texts, side="right")
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for row, (user, _) in enumerate(turns):
        batch["labels"][row, : chat.count(chat.render([user]))] = -100
    return batch


def trained(seed: int = 0) -> tuple[Any, Any]:
    """(model, tokenizer) after the training."""
    torch.set_num_threads(1)  # so that the result does not depend on the number of cores
    rng = np.random.default_rng([seed, 2])
    model, tokenizer = new_llama(seed)
    chat = ChatProcessor(tokenizer)
    batches = (random_batch(chat, rng) for _ in range(STEPS))
    train(model, list(model.parameters()), batches, STEPS, "preference")
    return model, tokenizer


def main(argv: list[str] | None = None) -> None:
    """Train the model and save it."""
    train_and_save(trained, __doc__, argv)


if __name__ == "__main__":
    main()
