"""What the benchmarks share: covers, questions and preferences of realistic size, timing, output.

No torch at import: the benchmark of stage 1 measures the memory of a process that does not need it.
"""

import statistics
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_type_hints

import numpy as np
from PIL import Image

from mllmrec.ranking.questions import Candidate, QuestionFormat, candidate_row
from mllmrec.stage.jsonl import PathLike, write_json
from mllmrec.stage.record import machine
from mllmrec.stage.schema import Row

T = TypeVar("T")
Dtype = Literal["float32", "float16", "bfloat16"]
OUTPUT_FOLDER = Path("outputs/benchmark")
# Of the covers, (width, height) in pixels.
SHAPES = ((400, 300), (300, 400), (360, 360), (500, 280), (280, 500), (640, 360))
PREFERENCE = (
    "The user appears to have a preference for short documentaries on travel and food, "
    "told in a calm voice, with bright covers, large lettering and one person "
    "in the middle of the picture; lately more music, less sport, and warmer colours than before."
)


def cover(number: int) -> Image.Image:
    """An image of noise; `number` decides shape and content."""
    width, height = SHAPES[number % len(SHAPES)]
    return Image.fromarray(
        np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )


def title(number: int) -> str:
    """The title of item `number`."""
    return f"Number {number}: a day in the mountains"


def preference(number: int) -> str:
    """A preference of 20 to 39 words; those of different numbers start with different words."""
    words = PREFERENCE.split()
    start = 7 * number % len(words)
    return " ".join((words[start:] + words[:start])[: 20 + 11 * number % 20])


def save_cover(number: int, folder: PathLike) -> None:
    """Write the cover of item `number` to where its rows expect it."""
    cover(number).save(Path(folder) / f"{number}.png")


def question_row(user_id: str, number: int, preference: str, label: int | None = None) -> Row:
    """A row about item `number`: of train.jsonl if there is a label, else of test.jsonl."""
    candidate = Candidate(user_id, str(number), title(number), f"{number}.png", label or 0)
    return candidate_row(candidate, preference, QuestionFormat(), with_answer=label is not None)


def count_parameters(model: Any) -> int:
    """Of a model or a part of one."""
    return sum(parameter.numel() for parameter in model.parameters())


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds, result) of `work()`, kernels that are still running on a GPU included."""
    synchronize()
    started = time.perf_counter()
    result = work()
    synchronize()
    return time.perf_counter() - started, result


def synchronize() -> None:
    """Wait until the GPU is idle."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed_interleaved(
    works: dict[str, Callable[[], Any]], repeats: int, once: Container[str] = ()
) -> tuple[dict[str, float], dict[str, Any]]:
    """({name: median seconds}, {name: last result}) of functions that are called alternately.

    works: {name: function}; once: names of those that are called in the first repeat only.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    results = {}
    for repeat in range(repeats):
        for name, work in works.items():
            if repeat == 0 or name not in once:
                took, results[name] = timed(work)
                seconds[name].append(took)
    return {name: statistics.median(times) for name, times in seconds.items()}, results


def read_options(kind: type[T], description: str, argv: list[str] | None) -> T:
    """An object of the dataclass `kind`, each field an option of the command line.

    A field is annotated with its type and its help; of a tuple the option takes several values.
    """
    parser = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    for name, hint in get_type_hints(kind, include_extras=True).items():
        default, (value_type, text) = getattr(kind, name), get_args(hint)
        if isinstance(default, bool):
            parser.add_argument(f"--{name}", action="store_true", help=text)
            continue
        several = isinstance(default, tuple)
        first = default[0] if several else default
        choices = get_args(get_args(value_type)[0] if several else value_type) or None
        text = f"{text} (default: {default})"
        words = {"type": type(first), "choices": choices, "default": default, "help": text}
        parser.add_argument(f"--{name}", nargs="*" if several else None, **words)
    return kind(**vars(parser.parse_args(argv)))


def print_row(row: dict[str, Any]) -> None:
    """A row of a report as one line."""
    print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)


def write_report(name: str, rows: list[dict[str, Any]], **more: Any) -> None:
    """Write outputs/benchmark/NAME.json: the rows, `more`, and what they were measured on."""
    output = OUTPUT_FOLDER / f"{name}.json"
    write_json(output, {"rows": rows, **more, **machine()})
    print(f"wrote {output}")
