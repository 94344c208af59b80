"""Trains the tiny Llama that MLLM4Rec's ranker starts from on the sample: to read lettered lists.

In: nothing but `mllmrec/data/sample_world.py`. Out: a model folder (fp16 safetensors, tokenizer,
chat template).

    python scripts/tiny_models/train_list_llama.py --output Inference/tiny_models/list_llama

A large model knows what a lettered list is; the tiny Llama of stage 3 has never seen a letter as an
answer, and LoRA alone does not teach it (chance after three epochs). So this one learns from other
questions: which line has these values, which is most like one item, which has what some items
have in common. The ranker's question, roles and order in time are not among them. Lists become
longer in three phases. One CPU core, about 30 minutes.
"""

import numpy as np
import torch
from build import new_llama
from train_llama import answer_batch
from train_llava import train, train_and_save

from mllmrec.data import sample_world as world
from mllmrec.models.chat import ChatProcessor
from mllmrec.prompts.templates import assistant_turn, user_turn

LETTERS = "ABCDEFGHIJKLMNOPQRSTU"
# (steps, batch, most lines of a list, most items of a question)
PHASES = ((1200, 32, 4, 1), (800, 24, 12, 6), (700, 24, 21, 14))
TITLES_ONLY = 0.15  # of the questions: without captions
AGREE = 0.7  # of the values of items that have something in common


def random_item(rng, favourite=None):
    """An item of the sample world; favourite: values that most of its own are set to."""
    item = world.random_item(rng)
    for attribute in world.ATTRIBUTES:
        if favourite and rng.random() < AGREE:
            item[attribute] = favourite[attribute]
    return item | {"title": world.title_of(item["topic"], rng)}


def item_text(item, with_caption):
    """An item as the ranker's lists show it on the sample (text_tokens 4)."""
    caption = f": A {item['colour']} {item['shape']} on" if with_caption else ""
    return item["title"] + caption


def random_query(rng, most_items, with_caption):
    """(text that says what is wanted, the wanted values by attribute)."""
    attributes = world.ATTRIBUTES if with_caption else ("topic",)
    favourite, kind = world.random_item(rng), rng.random()
    if kind < 0.4:
        chosen = rng.permutation(attributes)[: int(rng.integers(1, len(attributes) + 1))]
        wanted = {str(attribute): favourite[attribute] for attribute in chosen}
        return f"Wanted: {', '.join(wanted.values())}.", wanted
    if kind < 0.6 or most_items == 1:
        item = random_item(rng)
        wanted = {attribute: item[attribute] for attribute in attributes}
        return f"Like this one: {item_text(item, with_caption)}", wanted
    items = [random_item(rng, favourite) for _ in range(int(rng.integers(2, most_items + 1)))]
    wanted = {
        # Of equally frequent values, the favourite one.
        attribute: max(
            world.VALUES[attribute],
            key=lambda value, a=attribute: (
                sum(item[a] == value for item in items) + 0.5 * (value == favourite[a])
            ),
        )
        for attribute in attributes
    }
    lines = [f"{n}. {item_text(item, with_caption)}" for n, item in enumerate(items, start=1)]
    return "In common:\n" + "\n".join(lines), wanted


def random_turns(rng, most_lines, most_items):
    """(user turn, assistant turn): a question about a list in which one line fits best."""
    with_caption = rng.random() >= TITLES_ONLY
    while True:
        query, wanted = random_query(rng, most_items, with_caption)
        lines = [random_item(rng) for _ in range(int(rng.integers(2, most_lines + 1)))]
        best = lines[int(rng.integers(len(lines)))]
        best |= {attribute: value for attribute, value in wanted.items() if rng.random() < 0.9}
        best["title"] = world.title_of(best["topic"], rng)
        fits = [sum(line[a] == value for a, value in wanted.items()) for line in lines]
        if fits.count(max(fits)) == 1:
            break
    listed = (
        f"{letter}. {item_text(line, with_caption)}"
        for letter, line in zip(LETTERS, lines, strict=False)
    )
    question = f"{query}\nLines:\n" + "\n".join(listed) + "\nWhich line? Letter only."
    return user_turn(question), assistant_turn(LETTERS[int(np.argmax(fits))])


def trained(seed=0):
    """(model, tokenizer) after the training."""
    torch.set_num_threads(1)  # so that the result does not depend on the number of cores
    rng = np.random.default_rng([seed, 3])
    model, tokenizer = new_llama(seed)
    chat = ChatProcessor(tokenizer)
    for steps, batch, most_lines, most_items in PHASES:

        def make_batch(step, size=batch, lines=most_lines, items=most_items):
            return answer_batch(chat, [random_turns(rng, lines, items) for _ in range(size)])

        train(model, model.parameters(), steps, make_batch, f"lists of up to {most_lines} lines")
    return model, tokenizer


def main(argv=None):
    train_and_save(trained, __doc__, argv)


if __name__ == "__main__":
    main()
