"""What the benchmarks share: covers and preferences of realistic size, and a stopwatch."""

import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

SHAPES = (
    (400, 300),
    (300, 400),
    (360, 360),
    (500, 280),
    (280, 500),
    (640, 360),
)  # pixels; covers of mixed shapes
PREFERENCE = (
    "The user appears to have a preference for short documentaries on travel and food, told in a calm voice, with bright covers, "
    "large lettering and one person in the middle of the picture; lately more music, less sport, and warmer colours than before."
)


def cover(number):
    """A picture of noise, of a shape and content that `number` decides."""
    width, height = SHAPES[number % len(SHAPES)]
    return Image.fromarray(
        np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )


def title(number):
    return f"Number {number}: a day in the mountains"


def item_with_cover(number, folder):
    """Item `number` as in items.jsonl, less its image; that lies in `folder` afterwards."""
    cover(number).save(Path(folder) / f"{number}.png")
    return {"item_id": str(number), "title": title(number)}


def taste(number):
    """A preference of 20 to 39 words; another number's starts with another word."""
    words = PREFERENCE.split()
    start = 7 * number % len(words)
    return " ".join((words[start:] + words[:start])[: 20 + 11 * number % 20])


def timed(work):
    """(seconds, result) of `work()`, what a GPU still has to do included."""
    synchronize()
    started = time.perf_counter()
    result = work()
    synchronize()
    return time.perf_counter() - started, result


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
