"""Progress of long work: a bar on a terminal; elsewhere a line now and then, for log files."""

import sys
import time
from typing import TypeAlias

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30.0
LINE = (
    "{desc}: {n_fmt} of {total_fmt} {unit}s, {percentage:.0f}%, {elapsed} elapsed, "
    "about {remaining} left"
)


def progress_bar(total: int, description: str, unit: str, initial: int = 0) -> "Progress":
    """Progress on stderr. unit: singular; initial: units that an earlier run has done."""
    if sys.stderr.isatty():
        return tqdm(total=total, desc=description, unit=unit, initial=initial)
    return ProgressLines(total, description, unit, initial)


class ProgressLines:
    """Progress as lines, one every 30 seconds and one at the end, with the time that is left."""

    def __init__(self, total: int, description: str, unit: str, initial: int = 0) -> None:
        self.total, self.description, self.unit = total, description, unit
        self.initial = self.done = initial
        self.started = self.printed = time.monotonic()

    def update(self, n: int = 1) -> None:
        """Count `n` more units; print a line if the last one is old enough."""
        self.done += n
        if time.monotonic() - self.printed >= SECONDS_BETWEEN_LINES:
            self._print()

    def _print(self) -> None:
        self.printed = time.monotonic()
        line = tqdm.format_meter(
            self.done,
            self.total,
            self.printed - self.started,
            prefix=self.description,
            unit=self.unit,
            initial=self.initial,
            bar_format=LINE,
        )
        print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Print the last line."""
        self._print()

    def __enter__(self) -> "ProgressLines":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


Progress: TypeAlias = tqdm | ProgressLines
