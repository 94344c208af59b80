"""Trains the tiny LLaVA-NeXT of the sample from scratch: to describe covers and to compare words.

In: nothing but `mllmrec/data/sample_world.py`. Out: a model folder (fp16 safetensors, processor,
chat template).

    python scripts/tiny_models/train_llava.py --output Inference/tiny_models/llava

Three phases, with the loss on the answers only (one CPU core, about 6 minutes):
1. text: a caption stands in the place of the image. Questions of the kind "does this fit: star?"
   teach the language model to compare words; then single questions, questions about several words
   and captions are mixed.
2. vision: the vision tower alone is trained to classify colours and shapes.
3. image: the language model is frozen; tower and projector are trained with images instead of
   captions.

The recommendation prompt (`prompts.RECOMMEND`) is not in the training: that task is left for SFT,
as in the paper.
"""

import argparse
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from build import new_llava
from numpy.random import Generator
from torch.nn import Parameter
from torch.nn.functional import cross_entropy

from mllmrec.data import sample_world as world
from mllmrec.prompts import mllm_msr as prompts
from mllmrec.prompts.templates import fill

COUNTS = ("None", "One", "Two", "Three")
NOTES = (
    "Note: {topic}, {colour} {shape}.",
    "Somebody wrote of {topic} and of a {colour} {shape}.",
    "A {colour} {shape} came up, and {topic} as well.",
    "On the list: a {shape}, {topic}, something {colour}.",
)
TEXT_STEPS, VISION_STEPS, IMAGE_STEPS = 1600, 350, 900
# The first of TEXT_STEPS have single questions only: with a mix from the start nothing is learned.
SINGLE_STEPS = 300
BATCH, VISION_BATCH = 24, 64
LEARNING_RATE = 1e-3
Item = dict[str, str]
Turns = tuple[str, str]  # question, answer
Mix = dict[Callable[[Item, Generator], Turns], float]


def words_for(item: Item, rng: Generator) -> tuple[list[str], list[bool]]:
    """(words, fits): one word per attribute in random order, half of which fit the item."""
    words, fits = [], []
    for attribute in rng.permutation(world.ATTRIBUTES):
        fit = rng.random() < 0.5
        others = [value for value in world.VALUES[attribute] if value != item[attribute]]
        words.append(item[attribute] if fit else str(rng.choice(others)))
        fits.append(bool(fit))
    return words, fits


def one_word(item: Item, rng: Generator) -> Turns:
    words, fits = words_for(item, rng)
    question = f"Title: {item['title']}\nDoes this fit: {words[0]}?"
    return question, "Yes" if fits[0] else "No"


def several_words(item: Item, rng: Generator) -> Turns:
    words, fits = words_for(item, rng)
    question = f"Title: {item['title']}\nHow many of these fit: {', '.join(words)}?"
    return question, COUNTS[sum(fits)]


def words_first(item: Item, rng: Generator) -> Turns:
    words, fits = words_for(item, rng)
    question = f"Words: {', '.join(words)}\nTitle: {item['title']}\nHow many of these fit?"
    return question, COUNTS[sum(fits)]


def note(item: Item, rng: Generator) -> Turns:
    fits = {attribute: bool(rng.random() < 0.5) for attribute in world.ATTRIBUTES}
    others = {a: [value for value in world.VALUES[a] if value != item[a]] for a in world.ATTRIBUTES}
    words = {a: item[a] if fits[a] else str(rng.choice(others[a])) for a in world.ATTRIBUTES}
    sentence = NOTES[rng.integers(len(NOTES))].format(**words)
    lines = [sentence, f"Title: {item['title']}"]
    if not rng.integers(2):
        lines.reverse()
    return f"{lines[0]}\n{lines[1]}\nHow many of its words fit?", COUNTS[sum(fits.values())]


def image_prompt(item: Item, rng: Generator) -> Turns:
    return fill(prompts.IMAGE, "video"), world.caption(item)


def title_prompt(item: Item, rng: Generator) -> Turns:
    return fill(prompts.TITLE, "video", title=item["title"]), world.title_note(item)


def fusion_prompt(item: Item, rng: Generator) -> Turns:
    image, text = world.caption(item), world.title_note(item)
    question = fill(prompts.FUSION, "video", image_summary=image, text_summary=text)
    return question, world.fused_caption(item)


# Kind of question -> its fraction, of each phase.
SINGLE_MIX: Mix = {one_word: 1.0}
TEXT_MIX: Mix = {
    one_word: 0.2,
    several_words: 0.3,
    words_first: 0.1,
    note: 0.25,
    image_prompt: 0.05,
    title_prompt: 0.05,
    fusion_prompt: 0.05,
}
IMAGE_MIX: Mix = {
    image_prompt: 0.35,
    one_word: 0.25,
    several_words: 0.15,
    words_first: 0.05,
    note: 0.2,
}
WITHOUT_IMAGE = (title_prompt, fusion_prompt)  # these have no image, nor a caption instead


def random_batch(processor: Any, mix: Mix, rng: Generator, with_images: bool) -> Any:
    """Random questions, rendered by the chat template; labels on the answers, -100 elsewhere."""
    tokenizer = processor.tokenizer
    texts, answer_lengths, images = [], [], []
    kinds = list(mix)
    for _ in range(BATCH):
        item = world.random_item(rng)
        kind = kinds[rng.choice(len(kinds), p=list(mix.values()))]
        question, answer = kind(item, rng)
        content = [{"type": "text", "text": question}]
        if kind not in WITHOUT_IMAGE and with_images:
            content.insert(0, {"type": "image"})
            images.append(world.draw_cover(item["colour"], item["shape"], rng))
        elif kind not in WITHOUT_IMAGE:
            content[0]["text"] = f"{world.caption(item)}\n{question}"
        prompt = processor.apply_chat_template([{"role": "user", "content": content}])
        answer = f" {answer}{tokenizer.eos_token}"
        texts.append(prompt + answer)
        answer_lengths.append(len(tokenizer(answer, add_special_tokens=False).input_ids))
    batch = processor(
        text=texts, images=images or None, return_tensors="pt", padding=True, padding_side="right"
    )
    batch["labels"] = torch.full_like(batch["input_ids"], -100)
    ends = batch["attention_mask"].sum(1).tolist()
    for row, (end, length) in enumerate(zip(ends, answer_lengths, strict=True)):
        batch["labels"][row, end - length : end] = batch["input_ids"][row, end - length : end]
    return batch


def train(
    model: Any, parameters: list[Parameter], batches: Iterable[Any], steps: int, name: str
) -> None:
    """One step of AdamW on each batch, with a one-cycle learning rate over `steps` steps."""
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.05
    )
    model.train()
    losses = []
    for step, batch in enumerate(batches, start=1):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 100 == 0:
            loss = np.mean(losses[-100:])
            print(f"{name}: step {step} of {steps}, loss {loss:.3f}", flush=True)
    model.eval()


def train_vision(model: Any, processor: Any, rng: Generator) -> None:
    """Phase 2: colour and shape from the tower's mean patch feature.

    The linear classifiers are not kept.
    """
    tower = model.model.vision_tower
    classes = {"colour": list(world.COLOURS), "shape": list(world.SHAPES)}
    heads = torch.nn.ModuleDict(
        {a: torch.nn.Linear(tower.config.hidden_size, len(v)) for a, v in classes.items()}
    )
    parameters = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE)
    for step in range(VISION_STEPS):
        items = [world.random_item(rng) for _ in range(VISION_BATCH)]
        features = tower(cover_tiles(processor, items, rng)).last_hidden_state[:, 1:].mean(1)
        losses, right = [], {}
        for attribute, values in classes.items():
            wanted = torch.tensor([values.index(item[attribute]) for item in items])
            logits = heads[attribute](features)
            losses.append(cross_entropy(logits, wanted))
            right[attribute] = (logits.argmax(-1) == wanted).float().mean().item()
        torch.stack(losses).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            print(f"vision: step {step + 1} of {VISION_STEPS}, accuracy {right}", flush=True)


def cover_tiles(processor: Any, items: list[Item], rng: Generator) -> torch.Tensor:
    """Pixels of a random cover of each item, (items, 3, height, width): its one tile."""
    covers = [world.draw_cover(item["colour"], item["shape"], rng) for item in items]
    return processor.image_processor(images=covers, return_tensors="pt")["pixel_values"][:, 1]


def trained(seed: int = 0) -> tuple[Any, Any]:
    """(model, processor) after the three phases."""
    torch.set_num_threads(1)  # so that the result does not depend on the number of cores
    torch.set_flush_denormal(True)
    rng = np.random.default_rng([seed, 1])
    model, processor = new_llava(seed)
    mixes = [SINGLE_MIX] * SINGLE_STEPS + [TEXT_MIX] * (TEXT_STEPS - SINGLE_STEPS)
    batches = (random_batch(processor, mix, rng, with_images=False) for mix in mixes)
    train(model, list(model.parameters()), batches, TEXT_STEPS, "text")
    train_vision(model, processor, rng)
    vision_parameters = [
        *model.model.vision_tower.parameters(),
        *model.model.multi_modal_projector.parameters(),
        model.model.image_newline,
    ]
    model.requires_grad_(False)
    for parameter in vision_parameters:
        parameter.requires_grad_(True)
    mixes = [IMAGE_MIX] * IMAGE_STEPS
    batches = (random_batch(processor, mix, rng, with_images=True) for mix in mixes)
    train(model, vision_parameters, batches, IMAGE_STEPS, "image")
    return model.requires_grad_(True), processor


def train_and_save(
    trained: Callable[..., tuple[Any, Any]], description: str, argv: list[str] | None, **more: str
) -> None:
    """The command line of the training scripts.

    trained: (seed, and what is in `more`: option -> default) -> (model, processor or tokenizer).
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", required=True, help="folder for the model")
    parser.add_argument("--seed", type=int, default=0)
    for name, default in more.items():
        parser.add_argument(f"--{name}", default=default, help=f"default: {default}")
    options = vars(parser.parse_args(argv))
    output = options.pop("output")
    model, processor = trained(**options)
    model.half().save_pretrained(output)
    processor.save_pretrained(output)
    print(f"saved {output}")


def main(argv: list[str] | None = None) -> None:
    """Train the model and save it."""
    train_and_save(trained, __doc__, argv)


if __name__ == "__main__":
    main()
