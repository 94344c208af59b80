"""Trains the sample's tiny Llama from nothing: it learns to write and to rewrite a user's preference.

In: nothing but `data_processing/sample_world.py`. Out: a model folder (fp16 safetensors, tokenizer, chat template).

    python Inference/tiny_models/train_llama.py --output Inference/tiny_models/llama

It sees the prompts of stage 3 with histories of simulated users, blocks of one to three items (a few prompts with a
whole history, for the direct ablation), and learns what the block rule of the sample's world answers. The preference
before a block is the rule's for a random earlier life, so the model must read it, not guess it.
One CPU core, about 12 minutes.
"""

import numpy as np
import torch

from data_processing import prompts
from data_processing import sample_world as world
from Inference.chat import Chat, answer_turn, user_turn
from Inference.tiny_models.build import new_llama
from Inference.tiny_models.train_llava import train, train_and_save

STEPS, BATCH, DIRECT_BATCH = 1500, 32, 8
SHARE_FIRST = 0.25  # of the prompts; the others are later blocks
SHARE_DIRECT = (
    0.05  # of the batches hold whole histories; they are long, so they do not mix with the others
)


def random_block(n_items, rng):
    """Items as a user takes them: each attribute keeps to a favourite two times out of three."""
    favourite = world.random_item(rng)
    block = [world.random_item(rng) for _ in range(n_items)]
    for item in block:
        for attribute in world.ATTRIBUTES:
            if rng.random() < 2 / 3:
                item[attribute] = favourite[attribute]
        item["title"] = world.title_of(item["topic"], rng)
    return block


def random_summary(item, rng):
    """What stage 2 may have written: image only, or fused."""
    return world.caption(item) if rng.random() < 0.7 else world.fused_caption(item)


def random_turns(rng, direct):
    """(user turn, answer turn) of one random prompt of stage 3; direct: over a whole history."""
    previous = None
    if not direct and rng.random() > SHARE_FIRST:
        previous = {
            attribute: str(rng.choice(world.VALUES[attribute])) for attribute in world.ATTRIBUTES
        }
    block = random_block(
        int(rng.integers(4, 16)) if direct else int(rng.choice([1, 2, 3], p=[0.15, 0.15, 0.7])), rng
    )
    if previous:  # often it agrees with the block, as it does in a life
        for attribute in world.ATTRIBUTES:
            if rng.random() < 0.5:
                previous[attribute] = block[int(rng.integers(len(block)))][attribute]
    lines = prompts.block_text(
        [(item["title"], random_summary(item, rng)) for item in block], "video"
    )
    if previous:
        text = prompts.fill(
            prompts.PREFERENCE_NEXT,
            "video",
            preference=world.preference_text(previous),
            block=lines,
        )
    else:
        text = prompts.fill(prompts.PREFERENCE_FIRST, "video", block=lines)
    wanted = (
        world.rolled_preferences(block)[-1] if direct else world.update_preference(previous, block)
    )
    return user_turn(text), answer_turn(world.preference_text(wanted))


def random_batch(chat, rng):
    """Random prompts with their answers; labels on the answers, -100 elsewhere."""
    direct = rng.random() < SHARE_DIRECT
    pairs = [random_turns(rng, direct) for _ in range(DIRECT_BATCH if direct else BATCH)]
    prompts_only = [chat.render([user]) for user, _ in pairs]
    texts = [chat.render([user, answer], answer_follows=False) for user, answer in pairs]
    batch = chat.encode(texts, side="right")
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for row, prompt in enumerate(prompts_only):
        batch["labels"][row, : chat.count(prompt)] = -100
    return batch


def trained(seed=0):
    """(model, tokenizer)"""
    torch.set_num_threads(1)  # so that the result does not depend on the number of cores
    rng = np.random.default_rng([seed, 2])
    model, tokenizer = new_llama(seed)
    chat = Chat(tokenizer)
    train(model, model.parameters(), STEPS, lambda step: random_batch(chat, rng), "preference")
    return model, tokenizer


def main(argv=None):
    train_and_save(trained, __doc__, argv)


if __name__ == "__main__":
    main()
