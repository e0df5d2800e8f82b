"""The host alone: utterances a second that become batches, in this process and in two others."""

from collections import deque
from functools import partial

from batches import WORKERS, load_batches
from benchmarks.common import Bench, Row, seconds
from benchmarks.training import training_rows
from learner import StepSampler, collate_step
from train import TrainingSettings

UTTERANCES = 20_000


def measure(bench: Bench) -> list[Row]:
    settings, rows = TrainingSettings(), []
    for kind in ("window rows", "dialog rows"):
        data = training_rows(bench, kind, 2, UTTERANCES)
        sampler = StepSampler(data.sizes, settings.step_size, settings.seed)
        steps = list(sampler)[: UTTERANCES // settings.step_size]
        collate = partial(collate_step, batch_size=settings.train_batch_size, ids=bench.ids, filler=data[0])
        for workers in (0, WORKERS):
            batches = iter(load_batches(data, steps, collate, bench.device, workers))
            next(batches)  # the processes have started
            utterances = sum(int(data.sizes[step].sum()) for step in steps[1:])
            rate = utterances / seconds(deque, batches, 0)
            subject = f"batches of {kind}, 2 candidates, {workers} workers"
            rows.append(Row(subject, "utterances/s", {"": rate}, must="10,000" if workers else ""))
    return rows
