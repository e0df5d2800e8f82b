"""How far long work is: bars at a terminal, a line now and then where nobody watches (a log file, a cluster, CI)."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

from cli import log

EVERY = 30.0  # seconds between two lines
Item = TypeVar("Item")


class ProgressLines:
    """The part of tqdm's interface that is used here, as lines in the log: one every 30 seconds, and one at the end.

    Args:
        total: how much there is to do; None: not known.
        unit: of what there is, in the plural.
    """

    def __init__(self, total: int | None, desc: str, unit: str, clock: Callable[[], float] = time.monotonic):
        self.total, self.desc, self.unit, self.clock = total, desc, unit, clock
        self.done, self.figures = 0, {}
        self.started = self.told = clock()

    def __enter__(self) -> "ProgressLines":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def set_postfix(self, figures: dict[str, float]) -> None:
        self.figures = figures

    def update(self, count: int = 1) -> None:
        self.done += count
        if self.done == self.total or self.clock() - self.told >= EVERY:
            self.tell()

    def close(self) -> None:
        if self.total is None:  # else the last update was the end
            self.tell()

    def tell(self) -> None:
        """Such as "train [1/3]: 20/60 steps, loss 3.2, 0.5 steps/s, 01:20 left"."""
        self.told = self.clock()
        rate = self.done / max(self.told - self.started, 1e-9)
        figures = [f"{name} {value:.4g}" for name, value in self.figures.items()]
        parts = [f"{self.done}/{self.total} {self.unit}" if self.total else f"{self.done} {self.unit}", *figures]
        parts.append(f"{rate:.3g} {self.unit}/s")
        if self.total and rate:
            parts.append(f"{tqdm.format_interval((self.total - self.done) / rate)} left")
        log.info(f"{self.desc}: {', '.join(parts)}")


def progress_of(total: int | None, desc: str, unit: str, shown: bool = True) -> tqdm | ProgressLines:
    """What is told how much of some work is done, by `update(count)`; a context manager."""
    if shown and not sys.stderr.isatty():
        return ProgressLines(total, desc, unit)
    return tqdm(total=total, desc=desc, unit=f" {unit}", disable=not shown)


def track(items: Iterable[Item], desc: str, unit: str, shown: bool = True) -> Iterator[Item]:
    """The items, with the progress of the loop over them."""
    total = len(items) if hasattr(items, "__len__") else None
    with progress_of(total, desc, unit, shown) as progress:
        for item in items:
            yield item
            progress.update(1)


@contextlib.contextmanager
def training_progress(trainer, evaluator) -> Iterator[None]:
    """Show the steps of an epoch, and the batches of an evaluation (ignite's engines), while the body runs."""

    def figures(engine) -> dict[str, float]:
        output = engine.state.output
        skipped = {"skipped": output["skipped"]} if output["skipped"] else {}
        return {name: output[name] for name in ("loss", "utterances/s")} | skipped

    if sys.stderr.isatty():
        shown = show_bars(trainer, evaluator, figures)
    else:
        shown = show_lines(trainer, evaluator, figures)
    with shown:
        yield


@contextlib.contextmanager
def show_bars(trainer, evaluator, figures: Callable) -> Iterator[None]:
    from ignite.handlers import ProgressBar  # heavy: only where a model is trained

    layout = "{desc} {n_fmt}/{total_fmt} {percentage:3.0f}%|{bar}|{postfix} [{elapsed}<{remaining}, {rate_fmt}]"
    bars = [
        ProgressBar(bar_format=layout, desc="train", unit="step"),
        ProgressBar(bar_format=layout, desc="evaluate", unit="batch"),
    ]
    bars[0].attach(trainer, output_transform=lambda _: figures(trainer))
    bars[1].attach(evaluator)
    try:
        yield
    finally:
        for bar in bars:
            if bar.pbar is not None:
                bar.pbar.close()  # so that what is said next begins a line of its own


@contextlib.contextmanager
def show_lines(trainer, evaluator, figures: Callable) -> Iterator[None]:
    from ignite.engine import Events

    lines: dict[object, ProgressLines] = {}

    def begin(engine, name: str, unit: str) -> None:
        state = engine.state
        epoch = f" [{state.epoch}/{state.max_epochs}]" if state.max_epochs > 1 else ""
        # What a run that goes on had done of this epoch counts neither as done here nor in the rate.
        done = state.iteration % state.epoch_length
        lines[engine] = ProgressLines(state.epoch_length - done, f"{name}{epoch}", unit)

    def advance(engine) -> None:
        if engine is trainer:
            lines[engine].set_postfix(figures(engine))
        lines[engine].update()

    with contextlib.ExitStack() as handlers:
        for engine, name, unit in ((trainer, "train", "steps"), (evaluator, "evaluate", "batches")):
            handlers.enter_context(engine.add_event_handler(Events.EPOCH_STARTED, begin, name, unit))
            handlers.enter_context(engine.add_event_handler(Events.ITERATION_COMPLETED, advance))
        yield
