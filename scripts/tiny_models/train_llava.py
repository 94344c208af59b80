"""Trains the sample's tiny LLaVA-NeXT from nothing: it learns to see, to describe covers and to compare words.

In: nothing but `data_processing/sample_world.py`. Out: a model folder (fp16 safetensors, processor, chat template).

    python Inference/tiny_models/train_llava.py --output Inference/tiny_models/llava

Three steps, the loss on answers only (one CPU core, about 6 minutes):
1. text: the caption stands where the picture will be. Questions of the kind "does this fit: star?" teach the language
   model to compare words; a mix of single questions, several words at once and captions follows.
2. sight: the vision tower alone learns to tell colours and shapes.
3. both: the language model is frozen; tower and projector learn to put a picture where the caption was.

The recommendation prompt (`prompts.RECOMMEND`) is not in the training: that task is left for SFT, as in the paper.
"""

import argparse
import time

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from data_processing import prompts
from data_processing import sample_world as world
from Inference.tiny_models.build import new_llava

COUNTS = ("None", "One", "Two", "Three")
NOTES = (
    "Note: {topic}, {colour} {shape}.",
    "Somebody wrote of {topic} and of a {colour} {shape}.",
    "A {colour} {shape} came up, and {topic} as well.",
    "On the list: a {shape}, {topic}, something {colour}.",
)
TEXT_STEPS, SIGHT_STEPS, PICTURE_STEPS = 1600, 350, 900
FIRST_STEPS_SINGLE = (
    300  # of TEXT_STEPS: single questions only; a mix from the start stays at chance
)
LEARNING_RATE = 1e-3


# ------------------------------------------------------------------------------------------- what is asked
def words_for(item, rng, fit_probability=0.5):
    """One word per attribute in random order; each fits the item with `fit_probability`. Returns (words, fits)."""
    words, fits = [], []
    for attribute in rng.permutation(world.ATTRIBUTES):
        fit = rng.random() < fit_probability
        others = [value for value in world.VALUES[attribute] if value != item[attribute]]
        words.append(item[attribute] if fit else str(rng.choice(others)))
        fits.append(bool(fit))
    return words, fits


def single(item, rng):
    words, fits = words_for(item, rng)
    return f"Title: {item['title']}\nDoes this fit: {words[0]}?", "Yes" if fits[0] else "No"


def several(item, rng):
    words, fits = words_for(item, rng)
    return f"Title: {item['title']}\nHow many of these fit: {', '.join(words)}?", COUNTS[sum(fits)]


def words_first(item, rng):
    words, fits = words_for(item, rng)
    return f"Words: {', '.join(words)}\nTitle: {item['title']}\nHow many of these fit?", COUNTS[
        sum(fits)
    ]


def note(item, rng):
    fits = {attribute: bool(rng.random() < 0.5) for attribute in world.ATTRIBUTES}
    others = {a: [value for value in world.VALUES[a] if value != item[a]] for a in world.ATTRIBUTES}
    words = {a: item[a] if fits[a] else str(rng.choice(others[a])) for a in world.ATTRIBUTES}
    sentence = NOTES[rng.integers(len(NOTES))].format(**words)
    lines = (
        (sentence, f"Title: {item['title']}")
        if rng.integers(2)
        else (f"Title: {item['title']}", sentence)
    )
    return f"{lines[0]}\n{lines[1]}\nHow many of its words fit?", COUNTS[sum(fits.values())]


def described(item, rng):
    return prompts.fill(prompts.IMAGE, "video"), world.caption(item)


def title_told(item, rng):
    return prompts.fill(prompts.TITLE, "video", title=item["title"]), world.title_note(item)


def fused(item, rng):
    text = prompts.fill(
        prompts.FUSION,
        "video",
        image_summary=world.caption(item),
        text_summary=world.title_note(item),
    )
    return text, world.fused_caption(item)


# Share of each kind of question in each step. The last two have no picture in front of them.
SINGLE_MIX = {single: 1.0}
TEXT_MIX = {
    single: 0.2,
    several: 0.3,
    words_first: 0.1,
    note: 0.25,
    described: 0.05,
    title_told: 0.05,
    fused: 0.05,
}
PICTURE_MIX = {described: 0.35, single: 0.25, several: 0.15, words_first: 0.05, note: 0.2}
WITHOUT_PICTURE = (title_told, fused)


# ------------------------------------------------------------------------------------------------ training
def batch_of(processor, mix, size, rng, pictures):
    """`size` random questions, rendered by the chat template, with labels on the answers (-100 elsewhere)."""
    texts, answers, images = [], [], []
    kinds = list(mix)
    for _ in range(size):
        item = world.random_item(rng)
        ask = kinds[rng.choice(len(kinds), p=list(mix.values()))]
        question, answer = ask(item, rng)
        content = [{"type": "text", "text": question}]
        if ask not in WITHOUT_PICTURE and pictures:
            content.insert(0, {"type": "image"})
            images.append(world.draw_cover(item["colour"], item["shape"], rng))
        elif ask not in WITHOUT_PICTURE:
            content[0]["text"] = f"{world.caption(item)}\n{question}"
        prompt = processor.apply_chat_template([{"role": "user", "content": content}])
        texts.append(f"{prompt} {answer}{processor.tokenizer.eos_token}")
        answers.append(
            len(
                processor.tokenizer(
                    f" {answer}{processor.tokenizer.eos_token}", add_special_tokens=False
                ).input_ids
            )
        )
    batch = processor(
        text=texts, images=images or None, return_tensors="pt", padding=True, padding_side="right"
    )
    batch["labels"] = torch.full_like(batch["input_ids"], -100)
    for row, (length, n) in enumerate(
        zip(batch["attention_mask"].sum(1).tolist(), answers, strict=True)
    ):
        batch["labels"][row, length - n : length] = batch["input_ids"][row, length - n : length]
    return batch


def train(model, parameters, steps, make_batch, name):
    """`steps` steps of AdamW with one-cycle learning rate on batches from `make_batch(step)`."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.05
    )
    model.train()
    started, losses = time.time(), []
    for step in range(steps):
        loss = model(**make_batch(step)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            print(
                f"{name}: step {step + 1} of {steps}, loss {np.mean(losses[-100:]):.3f}, {time.time() - started:.0f} s",
                flush=True,
            )
    model.eval()


def train_sight(model, processor, rng):
    """Step 2: colour and shape from the tower's mean patch feature, through a classifier that is thrown away."""
    tower = model.model.vision_tower
    classes = {"colour": list(world.COLOURS), "shape": list(world.SHAPES)}
    heads = torch.nn.ModuleDict(
        {a: torch.nn.Linear(tower.config.hidden_size, len(v)) for a, v in classes.items()}
    )
    parameters = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE)
    for step in range(SIGHT_STEPS):
        items = [world.random_item(rng) for _ in range(64)]
        covers = [world.draw_cover(item["colour"], item["shape"], rng) for item in items]
        pixels = processor.image_processor(images=covers, return_tensors="pt")["pixel_values"][:, 1]
        features = tower(pixels).last_hidden_state[:, 1:].mean(1)
        loss, right = 0.0, {}
        for attribute, values in classes.items():
            wanted = torch.tensor([values.index(item[attribute]) for item in items])
            logits = heads[attribute](features)
            loss = loss + cross_entropy(logits, wanted)
            right[attribute] = (logits.argmax(-1) == wanted).float().mean().item()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            print(
                f"sight: step {step + 1} of {SIGHT_STEPS}, loss {loss.item():.3f}, right {right}",
                flush=True,
            )


def trained(seed=0):
    """(model, processor) after the three steps."""
    torch.set_num_threads(1)  # so that the result does not depend on the number of cores
    torch.set_flush_denormal(True)
    rng = np.random.default_rng([seed, 1])
    model, processor = new_llava(seed)

    def text_batch(step):
        return batch_of(
            processor,
            SINGLE_MIX if step < FIRST_STEPS_SINGLE else TEXT_MIX,
            24,
            rng,
            pictures=False,
        )

    def picture_batch(step):
        return batch_of(processor, PICTURE_MIX, 24, rng, pictures=True)

    train(model, model.parameters(), TEXT_STEPS, text_batch, "text")
    train_sight(model, processor, rng)
    seeing = [
        *model.model.vision_tower.parameters(),
        *model.model.multi_modal_projector.parameters(),
        model.model.image_newline,
    ]
    model.requires_grad_(False)
    for parameter in seeing:
        parameter.requires_grad_(True)
    train(model, seeing, PICTURE_STEPS, picture_batch, "picture")
    return model.requires_grad_(True), processor


def train_and_save(trained, description, argv=None):
    """The command line of both training scripts. trained: (seed) -> (model, processor or tokenizer)."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", required=True, help="folder for the model")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    model, processor = trained(args.seed)
    model.half().save_pretrained(args.output)
    processor.save_pretrained(args.output)
    print(f"saved {args.output}")


def main(argv=None):
    train_and_save(trained, __doc__, argv)


if __name__ == "__main__":
    main()
