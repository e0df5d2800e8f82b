"""Training: utterances a second of whole optimiser steps, by the loop of train.py and by the plain one."""

from dataclasses import replace
from functools import partial

import torch
from torch.utils.data import DataLoader

import checkpoints
import learner as learning
from benchmarks import plain
from benchmarks.common import Bench, Row, peak_flops, seconds
from train import StopSignal, TrainingSettings, build_trainer

AIMS = {2: "4x / 12x", 4: "6x / 16x"}


def measure(bench: Bench) -> list[Row]:
    rows, shares = [], []
    for candidates, aim in AIMS.items():
        settings = TrainingSettings(n_epochs=1)
        instances, subject = bench.instances("train", num_candidates=candidates), f"training, {candidates} candidates"
        ours = {name: our_rate(bench, instances, settings, name == "bf16") for name in bench.precisions}
        rows.append(Row(subject, "utterances/s", ours, plain_rate(bench, instances, settings), aim))
        flops = flops_of_utterance(bench, instances)
        peaks = {"fp32": torch.float32, "bf16": torch.bfloat16}
        share = {name: rate * flops / peak_flops(bench.device, peaks[name]) for name, rate in ours.items()}
        shares.append(Row(f"{subject}, against a large matrix product", "share", share))
    return rows + shares


def our_rate(bench: Bench, instances, settings: TrainingSettings, bf16: bool) -> float:
    """The last of three steps of train.py."""
    settings = replace(settings, bf16=bf16)
    learner = learning.Learner(
        plain.random_model(bench.tokenizer, bench.shape).to(bench.device), settings, bench.device
    )
    size = settings.step_size
    sampler = learning.StepSampler([1] * 3 * size, size, settings.seed)
    sampler.size = min(sampler.size, len(instances))
    collate = partial(learning.collate_step, batch_size=settings.train_batch_size, ids=bench.ids, filler=instances[0])
    loader = DataLoader(instances, batch_sampler=sampler, collate_fn=collate)
    trainer = build_trainer(learner, sampler, checkpoints.Progress(), StopSignal(), settings)
    trainer.run(loader, max_epochs=1)
    return trainer.state.output["utterances/s"]


def plain_rate(bench: Bench, instances, settings: TrainingSettings) -> float:
    """One optimiser step of the plain way, after one batch to warm up."""
    reference = plain.double_heads(bench.model).train()
    optimizer = torch.optim.AdamW(reference.parameters(), lr=settings.lr, eps=1e-6, weight_decay=0.0)
    width, batch = int(instances.lengths().max()), settings.train_batch_size  # the longest row of the dataset
    cuts = [range(start, start + batch) for start in range(0, settings.step_size, batch)]

    def backward(cut: range) -> None:
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


def flops_of_utterance(bench: Bench, instances) -> float:
    """6 times the parameters that each token passes (the LM head at labels only), and attention."""
    sample = [instances[i] for i in range(min(len(instances), 256))]
    tokens = sum(len(i.prefix) + sum(map(len, i.candidates)) for i in sample) / len(sample)
    labels = sum(len(i.candidates[-1]) for i in sample) / len(sample)
    width, layers = bench.shape["n_embd"], bench.shape["n_layer"]
    return 6 * (tokens * 12 * layers * width**2 + labels * plain.ROWS * width) + 12 * layers * width * tokens**2 / 2
