"""Full training beside --lora 16: utterances a second and peak memory, each in a process of its own."""

import multiprocessing
import resource
from concurrent.futures import ProcessPoolExecutor

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import Bench, Row
from benchmarks.training import our_rate, training_rows
from model import DialogModel, with_choice_head
from train import TrainingSettings

SMOLLM2 = dict(
    vocab_size=49157,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)
BILLION = dict(
    vocab_size=128261,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    tie_word_embeddings=True,
)


def measure(bench: Bench) -> list[Row]:
    cases = [("SmolLM2-135M's shape", SMOLLM2, 0), ("SmolLM2-135M's shape", SMOLLM2, 16)]
    if bench.device.type == "cuda" or bench.options.billion:
        cases.append(("a Llama of 1.2 billion", BILLION, 16))
    rows = []
    for name, shape, lora in cases:
        subject = f"{name}, " + (f"--lora {lora}" if lora else "all weights")
        rates, memory = {}, {}
        for precision in bench.precisions:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
                found = alone.submit(train, bench.options, shape, lora, precision == "bf16").result()
            rates[precision], memory[precision] = found
        rows.append(Row(subject, "utterances/s", rates, memory=memory, must="12 GB" if shape is BILLION else ""))
    return rows


def train(options, shape: dict, lora: int, bf16: bool) -> tuple[float, float]:
    """The rate of a randomly initialised Llama's steps, and the most memory (GB) that this process has held."""
    bench = Bench(options)
    torch.set_num_threads(multiprocessing.cpu_count())
    with torch.device(bench.device):
        lm = with_choice_head(LlamaForCausalLM)(LlamaConfig(**shape, max_position_embeddings=2048))
    settings = TrainingSettings(n_epochs=1, lora=lora, bf16=bf16, gradient_accumulation_steps=2)
    rate = our_rate(DialogModel(lm, bench.ids), training_rows(bench, "window rows", 2), settings, steps=3)
    if bench.device.type == "cuda":
        return rate, torch.cuda.max_memory_allocated(bench.device) / 1e9
    return rate, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
