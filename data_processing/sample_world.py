"""The sample's world: items with a cover and a title, users whose taste drifts, and what can be known about them.

Five colours and five shapes are seen only in the cover, five topics are read only in the title. A user has a
favourite of each; every favourite changes once, with probability .8, in the middle third of the user's life. So the
image, the title and recency are each needed to tell what the user takes next. The same world serves three ends: the
sample data set (`data_processing/sample.py`), the training of the tiny models (`Inference/tiny_models/`), and the
rules that the learned system is read against.

No torch, no file access: everything here is a pure function of its arguments and a numpy Generator.
"""

import math

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {
    "red": (214, 40, 40), "green": (44, 160, 60), "blue": (40, 80, 210), "yellow": (240, 200, 30), "purple": (140, 50, 170),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "star", "cross")
TOPICS = ("cooking", "music", "travel", "football", "science")
ADJECTIVES = ("quiet", "little", "golden", "hidden", "last", "early", "broken", "secret", "long", "bright")
NOUNS = ("garden", "river", "winter", "house", "road", "morning", "letter", "island", "story", "window")
ATTRIBUTES = ("colour", "shape", "topic")
VALUES = {"colour": tuple(COLOURS), "shape": SHAPES, "topic": TOPICS}

COVER_SIZE = (48, 64)  # pixels, width x height
DRIFT_PROBABILITY = 0.8
CHOICE_SHARPNESS = 4.0  # an item is chosen with weight exp(CHOICE_SHARPNESS x number of favourites that fit)
OPENING = "The user appears to have a preference for"


# ---------------------------------------------------------------------------------------------------- items
def random_item(rng):
    """One item: a dict with colour, shape, topic and a title that tells the topic and nothing of the cover."""
    item = {attribute: str(rng.choice(VALUES[attribute])) for attribute in ATTRIBUTES}
    return {**item, "title": title_of(item["topic"], rng)}


def title_of(topic, rng):
    return f"{topic}: {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"


def catalogue(n_items, rng):
    """`n_items` items that use every (colour, shape, topic) about equally often, in random order."""
    combinations = [(c, s, t) for c in COLOURS for s in SHAPES for t in TOPICS]
    order = [combinations[i] for _ in range(math.ceil(n_items / len(combinations))) for i in rng.permutation(len(combinations))]
    return [{"colour": c, "shape": s, "topic": t, "title": title_of(t, rng)} for c, s, t in order[:n_items]]


def draw_cover(colour, shape, rng):
    """An RGB image of COVER_SIZE: one large shape on a plain light ground; place, size and tint vary."""
    width, height = COVER_SIZE
    ground = tuple(int(v) for v in rng.integers(215, 250, size=3))
    fill = tuple(int(np.clip(v + rng.integers(-15, 16), 0, 255)) for v in COLOURS[colour])
    image = Image.new("RGB", COVER_SIZE, ground)
    radius = rng.uniform(0.36, 0.46) * width
    x, y = width / 2 + rng.uniform(-3, 3), height / 2 + rng.uniform(-6, 6)
    draw = ImageDraw.Draw(image)
    if shape == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    elif shape == "square":
        side = radius * 0.88
        draw.rectangle((x - side, y - side, x + side, y + side), fill=fill)
    elif shape == "triangle":
        draw.polygon([(x, y - radius), (x + radius, y + radius * 0.8), (x - radius, y + radius * 0.8)], fill=fill)
    elif shape == "star":
        points = [
            (x + r * math.sin(math.pi * k / 5), y - r * math.cos(math.pi * k / 5)) for k, r in enumerate([radius * 1.1, radius * 0.45] * 5)
        ]
        draw.polygon(points, fill=fill)
    elif shape == "cross":
        arm = radius * 0.3
        draw.rectangle((x - radius, y - arm, x + radius, y + arm), fill=fill)
        draw.rectangle((x - arm, y - radius, x + arm, y + radius), fill=fill)
    else:
        raise ValueError(f"unknown shape {shape!r}")
    return image


def caption(item):
    """What a perfect stage 2 says of a cover (`summary: image`)."""
    return f"A {item['colour']} {item['shape']} on a plain ground."


def title_note(item):
    """What a perfect text summary says of a title."""
    return f"It is about {item['topic']}."


def fused_caption(item):
    """What a perfect fusion of both says (`summary: fused`)."""
    return f"It is about {item['topic']} and shows a {item['colour']} {item['shape']} on a plain ground."


# ------------------------------------------------------------------------------------------------ preferences
def preference_text(values):
    """`values`: dict attribute -> value. One sentence with the opening that the prompt asks for."""
    return f"{OPENING} {values['topic']} with a {values['colour']} {values['shape']} on the cover."


def update_preference(previous, block):
    """The block rule: what a perfect stage 3 keeps after one more block.

    previous: dict attribute -> value, or None before the first block; block: items, oldest first. The value so far
    counts 1.2, the i-th item of the block 1 + i/10 (i = 1, 2, …); the heaviest value stays.
    """
    kept = {}
    for attribute in ATTRIBUTES:
        weight = {previous[attribute]: 1.2} if previous else {}
        for place, item in enumerate(block, start=1):
            weight[item[attribute]] = weight.get(item[attribute], 0.0) + 1.0 + 0.1 * place
        kept[attribute] = max(weight, key=weight.get)
    return kept


def rolled_preferences(history, block_size=3):
    """The block rule over a whole history: one dict per block."""
    preference, kept = None, []
    for start in range(0, len(history), block_size):
        preference = update_preference(preference, history[start : start + block_size])
        kept.append(preference)
    return kept


# ------------------------------------------------------------------------------------------------------ users
def simulate_user(items, length, rng):
    """One user's life: (indices of `length` distinct items in order, final favourites as dict attribute -> value).

    Each item is drawn from what the user has not had yet, with weight exp(CHOICE_SHARPNESS x favourites that fit).
    """
    taste = {attribute: str(rng.choice(VALUES[attribute])) for attribute in ATTRIBUTES}
    changes = {}
    for attribute in ATTRIBUTES:
        if rng.random() < DRIFT_PROBABILITY:
            others = [value for value in VALUES[attribute] if value != taste[attribute]]
            changes[attribute] = (int(rng.integers(length // 3, 2 * length // 3 + 1)), str(rng.choice(others)))
    chosen = []
    for step in range(length):
        for attribute, (when, value) in changes.items():
            if step == when:
                taste[attribute] = value
        weight = np.exp(CHOICE_SHARPNESS * fits(items, taste))
        weight[chosen] = 0.0
        chosen.append(int(rng.choice(len(items), p=weight / weight.sum())))
    return chosen, taste


def fits(items, values, attributes=ATTRIBUTES):
    """How many of `attributes` each item shares with `values`: int array of shape (len(items),)."""
    return sum(np.array([item[a] for item in items]) == values[a] for a in attributes)


def counted_scores(history, candidates, attributes=ATTRIBUTES, decay=1.0):
    """Scores by counting: for each attribute, how often the history holds the candidate's value.

    The item k steps before the end counts decay**k: 1.0 is blind to recency. Returns shape (len(candidates),).
    """
    weights = decay ** np.arange(len(history) - 1, -1, -1)
    scores = np.zeros(len(candidates))
    for attribute in attributes:
        values = np.array([item[attribute] for item in history])
        scores += [weights[values == candidate[attribute]].sum() for candidate in candidates]
    return scores / weights.sum()
