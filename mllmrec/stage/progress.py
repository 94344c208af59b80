"""Progress of long work: a bar on a terminal; elsewhere a line now and then, for log files."""

import sys
import time
from typing import TypeAlias

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30.0
FIRST_BATCH = 1.0  # seconds from the first update on; rows of a batch come together
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
    """Progress as lines, one every 30 seconds and one at the end, with the time that is left.

    It is computed from the rate after the first batch, which also waits for what is prepared once,
    or from that of the whole run where that is higher: of a second batch little may be counted yet.
    Before the second batch it is "?".
    """

    def __init__(self, total: int, description: str, unit: str, initial: int = 0) -> None:
        self.total, self.description, self.unit = total, description, unit
        self.initial = self.done = initial
        self.started = self.printed = time.monotonic()
        self.first = 0.0  # time of the first update
        self.rate_from = self.started, initial  # (time, units done) at the end of the first batch

    def update(self, n: int = 1) -> None:
        """Count `n` more units; print a line if the last one is old enough."""
        self.done += n
        now = time.monotonic()
        self.first = self.first or now
        if now - self.first < FIRST_BATCH:
            self.rate_from = now, self.done
        if now - self.printed >= SECONDS_BETWEEN_LINES:
            self._print()

    def _print(self) -> None:
        self.printed = time.monotonic()
        start, done = self.rate_from
        rate = (self.done - done) / max(self.printed - start, 1e-9)
        if rate:
            whole = (self.done - self.initial) / max(self.printed - self.started, 1e-9)
            rate = max(rate, whole)
        line = tqdm.format_meter(
            self.done,
            self.total,
            self.printed - self.started,
            prefix=self.description,
            unit=self.unit,
            initial=self.initial,
            rate=rate or self.done >= self.total,
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
