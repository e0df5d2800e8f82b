"""How far long work is: a bar at a terminal, a line now and then in a log."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager

from tqdm import tqdm

from cli import log

EVERY = 30  # seconds between the lines of a log


def progress_bar(iterable: Iterable | None = None, desc: str = "", disable: bool = False, **options):
    """tqdm's bar, or where standard error is not a terminal a stand-in that logs lines."""
    if disable or sys.stderr.isatty():
        return tqdm(iterable, desc, disable=disable, **options)
    return ProgressLines(iterable, desc, **options)


class ProgressLines(AbstractContextManager):
    """Stands in for a bar, which would write a line each time it moves: a line every half minute and at the end.

    Each says how much is done, figures such as the loss, the rate and the time left.

    Args:
        iterable, desc, total, unit, initial: as tqdm's; its other options are about the looks of a bar.
        clock: tells the time, in seconds.
    """

    def __init__(
        self,
        iterable: Iterable | None = None,
        desc: str = "",
        total: int | None = None,
        unit: str = "it",
        initial: int = 0,
        clock: Callable[[], float] = time.monotonic,
        **looks,
    ):
        self.iterable, self.desc, self.unit = iterable, desc, unit.strip()
        self.n, self.total = initial, total
        if total is None and hasattr(iterable, "__len__"):
            self.total = len(iterable)
        self.clock = clock
        self.told = clock()
        self.first: tuple[float, int] | None = None  # when the first update came, and how much was done by then
        self.figures = ""
        self.closed = False

    def __iter__(self) -> Iterator:
        for item in self.iterable:
            yield item
            self.update()
        self.close()

    def __exit__(self, *exception) -> None:
        self.close()

    def set_postfix(self, figures: dict[str, float]) -> None:
        self.figures = "".join(f", {name} {value:.4g}" for name, value in figures.items())

    def update(self, count: int = 1) -> None:
        """So much more is done."""
        self.n += count
        now = self.clock()
        if self.first is None:
            self.first = now, self.n
        if now - self.told >= EVERY and self.n != self.total:  # `close` tells of the end
            self.told = now
            self.tell(now)

    def tell(self, now: float) -> None:
        of_all = f" of {self.total}" if self.total else ""
        line = f"{self.desc}: {self.n}{of_all}{self.figures}"
        # The rate is that since the first update, which may count what an earlier run has done, and takes longer.
        since, before = self.first or (now, self.n)
        if self.n > before and now > since:
            rate = (self.n - before) / (now - since)
            line += f", {rate:.3g} {self.unit}/s"
            left = (self.total or 0) - self.n
            if left > 0:
                line += f", {tqdm.format_interval(left / rate)} left"
        log.info(line)

    def close(self) -> None:
        """The end of the work, or of what is done of it."""
        if not self.closed:
            self.closed = True
            self.tell(self.clock())
