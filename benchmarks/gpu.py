"""A GPU in bf16, under ten minutes, without a network: python -m benchmarks gpu.

Training at batch sizes 4 to 256, its share of the rate of a large matrix product, and its peak memory; scoring;
generation of one reply and of 64 at once.
"""

import contextlib
import copy
import io

import torch

import convai_evaluation as evaluation
from benchmarks.common import Bench, Row, peak_flops, seconds
from benchmarks.generation import TOKENS, steps
from benchmarks.training import flops_of_utterance, our_rate, training_rows
from generation import Decoding
from train import TrainingSettings

BATCHES = 4, 16, 64, 256
STEPS = 12


def measure(bench: Bench) -> list[Row]:
    return [*training(bench), *scoring(bench), *generation(bench)]


def training(bench: Bench) -> list[Row]:
    peak, rows = peak_flops(bench.device, torch.bfloat16), []
    for kind in ("window rows", "dialog rows"):
        for candidates in (2, 4):
            for size in BATCHES:
                data = training_rows(bench, kind, candidates, at_least=STEPS * size)
                settings = TrainingSettings(n_epochs=1, bf16=True, train_batch_size=size, gradient_accumulation_steps=1)
                torch.cuda.reset_peak_memory_stats(bench.device)
                try:
                    rate = our_rate(copy.deepcopy(bench.model), data, settings, STEPS)
                except torch.OutOfMemoryError:
                    break
                share = {"bf16": rate * flops_of_utterance(bench, data) / peak}
                subject = f"training, {kind}, {candidates} candidates, batches of {size}"
                aim = "0.4 of the peak, at the best" if size == BATCHES[-1] else ""
                rows.append(Row(subject, "utterances/s", {"": rate}, must=aim, share=share, memory=held(bench)))
    return rows


def held(bench: Bench) -> dict[str, float]:
    return {"bf16": torch.cuda.max_memory_allocated(bench.device) / 1e9}


def scoring(bench: Bench) -> list[Row]:
    ranking, rates = bench.instances("valid"), {}
    torch.cuda.reset_peak_memory_stats(bench.device)
    for name, model in bench.models.items():
        candidates = int(ranking.split.candidates.sizes.max())
        results = evaluation.Results.empty(len(ranking), candidates, 1)
        with contextlib.redirect_stderr(io.StringIO()):  # progress bars
            taken = [seconds(evaluation.score, model, ranking, None, "mc", 16, results) for _ in range(2)]
        rates[name] = len(ranking) / min(taken)
    return [Row("scoring (Hits@1), all candidates, batches of 16", "replies/s", rates, memory=held(bench))]


def generation(bench: Bench) -> list[Row]:
    decoding = Decoding(max_length=TOKENS, min_length=TOKENS)
    prefix, rows = bench.instances("valid").prefix(0, TOKENS)[0], []
    for batch in (1, 64):
        torch.cuda.reset_peak_memory_stats(bench.device)
        rates = {}
        for name, model in bench.models.items():
            taken = [sum(steps(model, prefix, decoding, batch)) for _ in range(3)]
            rates[name] = batch * TOKENS / min(taken)
        rows.append(Row(f"{batch} replies of {TOKENS} tokens at once", "tokens/s", rates, memory=held(bench)))
    return rows
