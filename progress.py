"""How far long work is: a bar at a terminal, a line now and then in a log."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager

from tqdm import tqdm

from cli import log

EVERY = 30  # seconds between the lines of a log


def progress_bar(iterable: Iterable | None = None, desc: str = "", disable: bool = False, **options):
    """A bar of tqdm's; where standard error is no terminal, what looks like one and writes lines."""
    if disable or sys.stderr.isatty():
        return tqdm(iterable, desc, disable=disable, **options)
    return ProgressLines(iterable, desc, **options)


class ProgressLines(AbstractContextManager):
    """In the place of a bar, which would be a line of its own each time it moves: a line every half minute and at the
    end, with what is done of how much, figures such as the loss, the rate and the time left.

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
        self.iterable, self.desc, self.unit, self.n, self.clock = iterable, desc, unit.strip(), initial, clock
        self.total = len(iterable) if total is None and hasattr(iterable, "__len__") else total
        self.figures, self.closed = "", False
        self.began = self.told = clock()
        self.first: tuple[float, int] | None = None  # when the first update came, and how much was done by then

    def __iter__(self) -> Iterator:
        for item in self.iterable:
            yield item
            self.update()
        self.close()

    def __exit__(self, *exception) -> None:
        self.close()

    def set_description(self, desc: str) -> None:
        self.desc = desc

    def set_postfix(self, figures: dict[str, float | str]) -> None:
        values = {name: value if isinstance(value, str) else f"{value:.4g}" for name, value in figures.items()}
        self.figures = "".join(f", {name} {value}" for name, value in values.items())

    def update(self, count: int = 1) -> None:
        """So much more is done."""
        self.n += count
        now = self.clock()
        self.first = self.first or (now, self.n)
        if now - self.told >= EVERY and self.n != self.total:  # `close` tells of the end
            self.told = now
            self.tell(now)

    def tell(self, now: float) -> None:
        done = f"{self.n} of {self.total}" if self.total else str(self.n)
        # The first update may count what an earlier run has done, and takes longer than others.
        since, before = self.first or (self.began, self.n)
        rate = (self.n - before) / (now - since) if now > since else 0
        speed = f", {rate:.3g} {self.unit}/s" if rate else ""
        left = (self.total or 0) - self.n
        time_left = f", {tqdm.format_interval(left / rate)} left" if rate and left > 0 else ""
        log.info(f"{self.desc}: {done}{self.figures}{speed}{time_left}")

    def close(self) -> None:
        """The end of the work, or of what is done of it."""
        if not self.closed:
            self.closed = True
            self.tell(self.clock())
