"""The world of the sample data set: items with a cover and a title, users whose preferences drift.

Five colours and five shapes are visible only in the cover, five topics are named only in the title.
A user has a favourite of each; every favourite changes once, with probability .8, in the middle
third of the history. So the image, the title and recency are each needed to predict the next item.
The world is used by the sample data set (`data_processing/sample.py`), by the training of the tiny
models (`scripts/tiny_models/`) and by the rules that bound what a recommender can reach.

No torch, no file access: everything here is a pure function of its arguments and a numpy Generator.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {
    "red": (214, 40, 40),
    "green": (44, 160, 60),
    "blue": (40, 80, 210),
    "yellow": (240, 200, 30),
    "purple": (140, 50, 170),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
TOPICS = ("cooking", "music", "travel", "football", "science")
ADJECTIVES = "quiet little golden hidden last early broken secret long bright".split()
NOUNS = "garden river winter house road morning letter island story window".split()
ATTRIBUTES = ("colour", "shape", "topic")
VALUES = {"colour": tuple(COLOURS), "shape": SHAPES, "topic": TOPICS}

COVER_SIZE = (48, 64)  # pixels, width x height
DRIFT_PROBABILITY = 0.8
CHOICE_SHARPNESS = 4.0  # an item's weight is exp(CHOICE_SHARPNESS x favourites that fit)
OPENING = "The user appears to have a preference for"

Item = dict[str, str]  # colour, shape, topic, title
Values = dict[str, str]  # attribute -> value
Rng = np.random.Generator


def random_item(rng: Rng) -> Item:
    """One item: colour, shape, topic and a title that names the topic and nothing of the cover."""
    item = {attribute: str(rng.choice(VALUES[attribute])) for attribute in ATTRIBUTES}
    return {**item, "title": title_of(item["topic"], rng)}


def title_of(topic: str, rng: Rng) -> str:
    """A title that names the topic."""
    return f"{topic}: {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"


def catalogue(n_items: int, rng: Rng) -> list[Item]:
    """`n_items` items in random order, every (colour, shape, topic) about equally often."""
    combinations = [(c, s, t) for c in COLOURS for s in SHAPES for t in TOPICS]
    order = [
        combinations[i]
        for _ in range(math.ceil(n_items / len(combinations)))
        for i in rng.permutation(len(combinations))
    ]
    return [
        {"colour": c, "shape": s, "topic": t, "title": title_of(t, rng)}
        for c, s, t in order[:n_items]
    ]


def draw_cover(colour: str, shape: str, rng: Rng) -> Image.Image:
    """An RGB image of COVER_SIZE: a large shape on a light ground; position, size, tint vary."""
    width, height = COVER_SIZE
    background = tuple(int(v) for v in rng.integers(215, 250, size=3))
    fill = tuple(int(np.clip(v + rng.integers(-15, 16), 0, 255)) for v in COLOURS[colour])
    image = Image.new("RGB", COVER_SIZE, background)
    radius = rng.uniform(0.36, 0.46) * width
    x, y = width / 2 + rng.uniform(-3, 3), height / 2 + rng.uniform(-6, 6)
    draw = ImageDraw.Draw(image)
    if shape == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    elif shape == "square":
        side = radius * 0.88
        draw.rectangle((x - side, y - side, x + side, y + side), fill=fill)
    elif shape == "triangle":
        draw.polygon(
            [(x, y - radius), (x + radius, y + radius * 0.8), (x - radius, y + radius * 0.8)],
            fill=fill,
        )
    elif shape == "star":
        points = [
            (x + r * math.sin(math.pi * k / 5), y - r * math.cos(math.pi * k / 5))
            for k, r in enumerate([radius * 1.1, radius * 0.45] * 5)
        ]
        draw.polygon(points, fill=fill)
    elif shape == "cross":
        arm = radius * 0.3
        draw.rectangle((x - radius, y - arm, x + radius, y + arm), fill=fill)
        draw.rectangle((x - arm, y - radius, x + arm, y + radius), fill=fill)
    else:
        raise ValueError(f"unknown shape {shape!r}")
    return image


def extended(cover: Image.Image, number: int) -> Image.Image:
    """The cover as it is, or half as wide again, or half as high again, as `number` decides.

    What is added has the colour of its ground, so it shows nothing new.
    """
    width, height = cover.size
    size = ((width, height), (3 * width // 2, height), (width, 3 * height // 2))[number % 3]
    canvas = Image.new("RGB", size, cover.getpixel((0, 0)))
    canvas.paste(cover, ((size[0] - width) // 2, (size[1] - height) // 2))
    return canvas


def caption(item: Item) -> str:
    """What a perfect stage 2 writes about a cover (`summary: image`)."""
    return f"A {item['colour']} {item['shape']} on a plain ground."


def title_note(item: Item) -> str:
    """What a perfect text summary writes about a title."""
    return f"It is about {item['topic']}."


def fused_caption(item: Item) -> str:
    """What a perfect fusion of both writes (`summary: fused`)."""
    cover = f"a {item['colour']} {item['shape']} on a plain ground"
    return f"It is about {item['topic']} and shows {cover}."


def preference_text(values: Values) -> str:
    """`values`: dict attribute -> value. One sentence with the opening that the prompt asks for."""
    return f"{OPENING} {values['topic']} with a {values['colour']} {values['shape']} on the cover."


def update_preference(previous: Values | None, block: Sequence[Item]) -> Values:
    """The block rule: what a perfect stage 3 keeps after one more block.

    previous: dict attribute -> value, or None before the first block; block: items, oldest first.
    The value so far counts 1.2, the i-th item of the block 1 + i/10 (i = 1, 2, …); the heaviest
    value stays.
    """
    kept = {}
    for attribute in ATTRIBUTES:
        weight = {previous[attribute]: 1.2} if previous else {}
        for place, item in enumerate(block, start=1):
            weight[item[attribute]] = weight.get(item[attribute], 0.0) + 1.0 + 0.1 * place
        kept[attribute] = max(weight, key=lambda value: weight[value])
    return kept


def rolled_preferences(history: Sequence[Item], block_size: int = 3) -> list[Values]:
    """The block rule over a whole history: one dict per block."""
    preference: Values | None = None
    kept = []
    for start in range(0, len(history), block_size):
        preference = update_preference(preference, history[start : start + block_size])
        kept.append(preference)
    return kept


def simulate_user(items: Sequence[Item], length: int, rng: Rng) -> tuple[list[int], Values]:
    """(indices of `length` distinct items in time order, final favourites) of one user.

    Each item is drawn from those that are left, with weight exp(CHOICE_SHARPNESS x favourites that
    fit).
    """
    favourites = {attribute: str(rng.choice(VALUES[attribute])) for attribute in ATTRIBUTES}
    changes = {}
    for attribute in ATTRIBUTES:
        if rng.random() < DRIFT_PROBABILITY:
            others = [value for value in VALUES[attribute] if value != favourites[attribute]]
            changes[attribute] = (
                int(rng.integers(length // 3, 2 * length // 3 + 1)),
                str(rng.choice(others)),
            )
    chosen: list[int] = []
    for step in range(length):
        for attribute, (when, value) in changes.items():
            if step == when:
                favourites[attribute] = value
        weight = np.exp(CHOICE_SHARPNESS * fits(items, favourites))
        weight[chosen] = 0.0
        chosen.append(int(rng.choice(len(items), p=weight / weight.sum())))
    return chosen, favourites


def fits(items: Sequence[Item], values: Values, attributes: Sequence[str] = ATTRIBUTES) -> Any:
    """How many of `attributes` each item shares with `values`: int array of shape (len(items),)."""
    return sum(np.array([item[a] for item in items]) == values[a] for a in attributes)


def counted_scores(
    history: Sequence[Item],
    candidates: Sequence[Item],
    attributes: Sequence[str] = ATTRIBUTES,
    decay: float = 1.0,
) -> Any:
    """Scores by counting: for each attribute, how often the history holds the candidate's value.

    The item k steps before the end counts decay**k: 1.0 ignores recency. Returns shape
    (len(candidates),).
    """
    weights = decay ** np.arange(len(history) - 1, -1, -1)
    scores = np.zeros(len(candidates))
    for attribute in attributes:
        values = np.array([item[attribute] for item in history])
        scores += [weights[values == candidate[attribute]].sum() for candidate in candidates]
    return scores / weights.sum()
