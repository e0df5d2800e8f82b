"""Training: utterances a second of whole optimiser steps, by the loop of train.py and by the plain one, for each kind
of row and number of candidates; and the tokens that an epoch of each has.
"""

import statistics
from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import torch
from ignite.engine import Events

import checkpoints
import learner as learning
from batches import load_batches
from benchmarks import plain
from benchmarks.common import Bench, Row, peak_flops, seconds
from inputs import Instances
from model import DialogModel
from rows import DialogRows
from train import StopSignal, TrainingSettings, build_trainer

KINDS = {"window rows": 2, "whole-history rows": -1, "dialog rows": -1}  # and their --max_history
CANDIDATES = 1, 2, 4
AIMS = {2: "4x / 12x", 4: "6x / 16x"}  # of window rows, against the plain way


def measure(bench: Bench) -> list[Row]:
    rows, sizes = [], []
    for kind in KINDS:
        for candidates in CANDIDATES:
            settings, data = TrainingSettings(n_epochs=1), training_rows(bench, kind, candidates)
            subject = f"{kind}, {candidates} candidates"
            rates, shares = {}, {}
            for name in bench.precisions:
                model = plain.random_model(bench.tokenizer, bench.shape).to(bench.device)
                rates[name] = our_rate(model, data, replace(settings, bf16=name == "bf16"), steps=2)
                peak = peak_flops(bench.device, {"fp32": torch.float32, "bf16": torch.bfloat16}[name])
                shares[name] = rates[name] * flops_of_utterance(bench, data) / peak
            aim = AIMS.get(candidates, "") if kind == "window rows" else ""
            rate = plain_rate(bench, data, settings) if aim else None
            rows.append(Row(f"training, {subject}", "utterances/s", rates, rate, aim, share=shares))
            tokens = sum(map(learning.row_size, map(data.__getitem__, range(len(data)))))
            sizes.append(Row(f"an epoch, {subject}", "million tokens", {"": tokens / 1e6}))
    return rows + sizes


def training_rows(bench: Bench, kind: str, candidates: int, at_least: int = 1) -> Instances | DialogRows:
    """The training data as rows of a kind. Where they are fewer than `at_least`, personas are rotated to have more."""
    rotations = -(-at_least // len(bench.splits["train"]))
    instances = bench.instances("train", KINDS[kind], num_candidates=candidates, permutations=rotations)
    return DialogRows(instances, TrainingSettings().step_size) if kind == "dialog rows" else instances


def our_rate(model: DialogModel, rows: Instances | DialogRows, settings: TrainingSettings, steps: int) -> float:
    """The usual rate of train.py's steps, of which the first third are to warm up."""
    learner, rates = learning.Learner(model, settings, model.device), []
    sampler = learning.StepSampler(rows.sizes, settings.step_size, settings.seed)
    collate = partial(learning.collate_step, batch_size=settings.train_batch_size, ids=rows.ids, filler=rows[0])
    trainer = build_trainer(learner, sampler, checkpoints.Progress(), StopSignal(), settings)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: rates.append(trainer.state.output["utterances/s"]))
    trainer.run(load_batches(rows, list(sampler)[:steps], collate, model.device), max_epochs=1)
    return statistics.median(rates[-(-steps // 3) :])


def plain_rate(bench: Bench, instances: Instances, settings: TrainingSettings) -> float:
    """One optimiser step of the plain way, after one batch to warm up."""
    reference = plain.double_heads(bench.model).train()
    optimizer = torch.optim.AdamW(reference.parameters(), lr=settings.lr, eps=1e-6, weight_decay=0.0)
    width, batch = int(instances.lengths().max()), settings.train_batch_size  # the longest row of the dataset
    cuts = [range(start, start + batch) for start in range(0, settings.step_size, batch)]

    def backward(cut: Iterable[int]) -> None:
        loss = plain.loss(reference, [instances[i % len(instances)] for i in cut], width, bench.ids)
        (loss / settings.gradient_accumulation_steps).backward()

    def step() -> None:
        for cut in cuts:
            backward(cut)
            torch.nn.utils.clip_grad_norm_(reference.parameters(), settings.max_norm)
        optimizer.step()
        optimizer.zero_grad()

    backward(cuts[0])
    optimizer.zero_grad()
    return len(cuts) * batch / seconds(step)


def flops_of_utterance(bench: Bench, rows: Instances | DialogRows) -> float:
    """6 times the parameters that each token passes (the LM head at labels only), and attention."""
    sample = [rows[i] for i in range(min(len(rows), 256))]
    sizes = [learning.row_size(row) for row in sample]
    golds = [(reply.start, reply.candidates[-1]) for row in sample for reply in row.replies]
    labels = sum(gold.fork - start + len(gold.tokens) for start, gold in golds)
    width, layers = bench.shape["n_embd"], bench.shape["n_layer"]
    attention = 12 * layers * width * sum(size**2 for size in sizes) / 2
    return (6 * (sum(sizes) * 12 * layers * width**2 + labels * plain.ROWS * width) + attention) / len(golds)
