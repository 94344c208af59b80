"""What the benchmarks share: covers, questions and preferences of realistic size, timing, output.

No torch at import: the benchmark of stage 1 measures the memory of a process that does not need it.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from mllmrec.ranking.questions import Candidate, QuestionFormat, candidate_row
from mllmrec.stage.jsonl import write_json
from mllmrec.stage.record import machine

OUTPUT_FOLDER = Path("outputs/benchmark")
# Of the covers, (width, height) in pixels.
SHAPES = ((400, 300), (300, 400), (360, 360), (500, 280), (280, 500), (640, 360))
PREFERENCE = (
    "The user appears to have a preference for short documentaries on travel and food, "
    "told in a calm voice, with bright covers, large lettering and one person "
    "in the middle of the picture; lately more music, less sport, and warmer colours than before."
)


def cover(number):
    """An image of noise; `number` decides shape and content."""
    width, height = SHAPES[number % len(SHAPES)]
    return Image.fromarray(
        np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )


def title(number):
    return f"Number {number}: a day in the mountains"


def preference(number):
    """A preference of 20 to 39 words; those of different numbers start with different words."""
    words = PREFERENCE.split()
    start = 7 * number % len(words)
    return " ".join((words[start:] + words[:start])[: 20 + 11 * number % 20])


def save_cover(number, folder):
    """Write the cover of item `number` to where its rows expect it."""
    cover(number).save(Path(folder) / f"{number}.png")


def question_row(user_id, number, preference, label=None):
    """A row about item `number`: of train.jsonl if there is a label, else of test.jsonl."""
    candidate = Candidate(user_id, str(number), title(number), f"{number}.png", label or 0)
    return candidate_row(candidate, preference, QuestionFormat(), with_answer=label is not None)


def count_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def timed(work):
    """(seconds, result) of `work()`, kernels that are still running on a GPU included."""
    synchronize()
    started = time.perf_counter()
    result = work()
    synchronize()
    return time.perf_counter() - started, result


def synchronize():
    """Wait until the GPU is idle."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed_interleaved(works, repeats, once=()):
    """({name: median seconds}, {name: last result}) of functions that are called alternately.

    works: {name: function}; once: names of those that are called in the first repeat only.
    """
    seconds, results = {name: [] for name in works}, {}
    for repeat in range(repeats):
        for name, work in works.items():
            if repeat == 0 or name not in once:
                took, results[name] = timed(work)
                seconds[name].append(took)
    return {name: statistics.median(times) for name, times in seconds.items()}, results


def new_parser(description):
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def parse(parser, argv):
    """The options of a benchmark; argv: None for those of the command line."""
    return parser.parse_args(sys.argv[1:] if argv is None else argv)


def print_row(row):
    print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)


def write_report(name, rows, **more):
    """Write outputs/benchmark/NAME.json: the rows, `more`, and what they were measured on."""
    output = OUTPUT_FOLDER / f"{name}.json"
    write_json(output, {"rows": rows, **more, **machine()})
    print(f"wrote {output}")
