"""Trains the tiny Llama that MLLM4Rec's ranker starts from on the sample: to read lettered lists.

In: the tiny Llama of stage 3, `mllmrec/data/sample_world.py`. Out: a model folder (fp16
safetensors, tokenizer, chat template).

    python scripts/tiny_models/train_list_llama.py --output Inference/tiny_models/list_llama

A large model knows what a lettered list is; the tiny Llama of stage 3 has never seen a letter as an
answer, and LoRA alone does not teach it that. So this one learns from other questions: which line
has these values, which is most like one item, which has what some items have in common. The
ranker's question, its roles and the order in time are not among them. Lists become longer as soon
as those of one length are read well. The matrices of the layers are trained with Muon, which took
a third of AdamW's steps here. One CPU core, about 45 minutes.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from torch.nn.functional import cross_entropy
from train_llava import train_and_save

from mllmrec.data import sample_world as world
from mllmrec.models.chat import ChatProcessor
from mllmrec.models.loading import load_text
from mllmrec.prompts.templates import Turn, assistant_turn, user_turn

START = Path(__file__).parents[2] / "Inference/tiny_models/llama"
Item = dict[str, str]
Wanted = dict[str, dict[str, int]]  # attribute -> wanted value -> its weight
LETTERS = "ABCDEFGHIJKLMNOPQRSTU"
# (questions of a batch, most lines of a list, most items of a question); the last as in the ranker.
LEVELS = ((32, 4, 1), (24, 8, 4), (24, 14, 8), (24, 21, 14))
GOOD, WINDOW = 0.72, 50  # share of right answers in that many steps that leads to the next level
MATRIX_RATE, RATE = 2e-3, 1e-3  # of Muon, and of AdamW for embeddings, LM head and norms


@dataclass(frozen=True)
class Phase:
    """tokens: of an answer that are learned, 1: the letter, 2: its end, too; rate: of the rates."""

    steps: int
    levels: tuple[tuple[int, int, int], ...]
    tokens: int
    rate: float
    warm_up: int


PHASES = (Phase(2400, LEVELS, 1, 1.0, 100), Phase(300, LEVELS[-1:], 2, 0.25, 20))
TITLES_ONLY = 0.1  # of the questions: without captions
AGREE = 0.7  # of the values of items that have something in common


def random_item(rng: Generator, favourite: Item | None = None) -> Item:
    """An item of the sample world; favourite: values that most of its own are set to."""
    item = world.random_item(rng)
    for attribute in world.ATTRIBUTES:
        if favourite and rng.random() < AGREE:
            item[attribute] = favourite[attribute]
    return item | {"title": world.title_of(item["topic"], rng)}


def item_text(item: Item, with_caption: bool) -> str:
    """An item as the ranker's lists show it on the sample (text_tokens 4)."""
    caption = f": A {item['colour']} {item['shape']} on" if with_caption else ""
    return item["title"] + caption


def random_query(rng: Generator, most_items: int, with_caption: bool) -> tuple[str, Wanted]:
    """(text that says what is wanted, {attribute: {wanted value: its weight}})."""
    attributes = world.ATTRIBUTES if with_caption else ("topic",)
    favourite, kind = world.random_item(rng), rng.random()
    if kind < 0.4 or (most_items == 1 and kind < 0.7):
        chosen = rng.permutation(attributes)[: int(rng.integers(1, len(attributes) + 1))]
        values = [favourite[attribute] for attribute in chosen]
        wanted = {str(a): {value: 1} for a, value in zip(chosen, values, strict=True)}
        return f"Wanted: {', '.join(values)}.", wanted
    if kind < 0.55 or most_items == 1:
        item = random_item(rng)
        wanted = {attribute: {item[attribute]: 1} for attribute in attributes}
        return f"Like this one: {item_text(item, with_caption)}", wanted
    items = [random_item(rng, favourite) for _ in range(int(rng.integers(2, most_items + 1)))]
    lines = [f"{n}. {item_text(item, with_caption)}" for n, item in enumerate(items, start=1)]
    wanted = {attribute: Counter(item[attribute] for item in items) for attribute in attributes}
    return "In common:\n" + "\n".join(lines), wanted


def random_turns(rng: Generator, most_lines: int, most_items: int) -> tuple[Turn, Turn]:
    """(user turn, assistant turn): a question about a list in which one line fits best."""
    with_caption = rng.random() >= TITLES_ONLY
    while True:
        query, wanted = random_query(rng, most_items, with_caption)
        lines = [random_item(rng) for _ in range(int(rng.integers(2, most_lines + 1)))]
        best = lines[int(rng.integers(len(lines)))]
        for attribute, weights in wanted.items():
            if rng.random() < 0.9:
                best[attribute] = max(weights, key=weights.__getitem__)
        best["title"] = world.title_of(best["topic"], rng)
        fits = [sum(weights.get(line[a], 0) for a, weights in wanted.items()) for line in lines]
        if fits.count(max(fits)) == 1:
            break
    listed = (
        f"{letter}. {item_text(line, with_caption)}"
        for letter, line in zip(LETTERS, lines, strict=False)
    )
    question = f"{query}\nLines:\n" + "\n".join(listed) + "\nWhich line? Letter only."
    return user_turn(question), assistant_turn(LETTERS[int(np.argmax(fits))])


def new_optimizers(model: Any) -> list[torch.optim.Optimizer]:
    """[Muon for the matrices of the layers, AdamW for everything else]."""
    named = dict(sorted(model.named_parameters()))
    matrices = {name for name, p in named.items() if p.ndim == 2 and ".layers." in name}
    inner = [p for name, p in named.items() if name in matrices]
    outer = [p for name, p in model.named_parameters() if name not in matrices]
    return [
        torch.optim.Muon(inner, lr=MATRIX_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, lr=RATE, weight_decay=0.01),
    ]


def answer_logits(
    model: Any, chat: ChatProcessor, turns: list[tuple[Turn, Turn]], tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits (rows, tokens, vocabulary), ids (rows, tokens)) of each answer's first tokens."""
    texts = [chat.render(list(both), add_generation_prompt=False) for both in turns]
    batch = chat.encode(texts, side="right")
    starts = torch.tensor([chat.count(chat.render([user])) for user, _ in turns])
    places = starts[:, None] + torch.arange(tokens)
    rows = torch.arange(len(turns))[:, None]
    # The LM head is needed at these places only.
    states = model.model(**batch).last_hidden_state[rows, places - 1]
    return model.lm_head(states), batch["input_ids"][rows, places]


def train(model: Any, chat: ChatProcessor, rng: Generator, phase: Phase) -> None:
    """Train on the phase's levels, in place."""
    optimizers = new_optimizers(model)

    def rate(step: int) -> float:
        return phase.rate * min((step + 1) / phase.warm_up, max(0.05, 1 - step / phase.steps))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    model.train()
    level, right = 0, []
    for step in range(1, phase.steps + 1):
        size, most_lines, most_items = phase.levels[level]
        turns = [random_turns(rng, most_lines, most_items) for _ in range(size)]
        logits, ids = answer_logits(model, chat, turns, phase.tokens)
        cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        model.zero_grad()
        right.append((logits[:, 0].argmax(-1) == ids[:, 0]).float().mean().item())
        if step % 50 == 0:
            share = np.mean(right[-WINDOW:])
            print(f"up to {most_lines} lines: step {step}, {share:.2f} right", flush=True)
        good = len(right) >= WINDOW and np.mean(right[-WINDOW:]) > GOOD
        if good and level + 1 < len(phase.levels):
            level, right = level + 1, []
    model.eval()


def trained(seed: int = 0, start: str = str(START)) -> tuple[Any, Any]:
    """(model, tokenizer) after the training. start: folder of the tiny Llama of stage 3."""
    torch.set_num_threads(1)  # so that the result does not depend on the number of cores
    model, tokenizer = load_text(start)
    chat = ChatProcessor(tokenizer)
    for number, phase in enumerate(PHASES):
        train(model, chat, np.random.default_rng([seed, 3 + number]), phase)
        model.half().float()  # as it is saved: a phase can also go on from a folder
    return model, tokenizer


def main(argv: list[str] | None = None) -> None:
    """Train the model and save it."""
    train_and_save(trained, __doc__, argv, start=str(START))


if __name__ == "__main__":
    main()
