"""What the benchmarks share: options, data, a model each way, rows and the machine's limits."""

import argparse
import copy
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks import plain
from cpu import cpu_has_bf16, optimize_for_cpu_inference
from dialogs import Dialogs
from inputs import Instances
from model import DialogModel
from model_files import find_model
from utils import DialogTokenizer, learn_bpe, load_dataset, load_tokenizer

SUBJECTS = "evaluation", "generation", "training", "adapters", "host", "waiting", "gpu"
SAMPLE = str(Path(__file__).resolve().parent.parent / "data" / "sample.json")


@dataclass
class Row:
    """One subject: a rate of the plain way (fp32) and ours by precision, or one figure of ours alone."""

    subject: str
    unit: str
    ours: dict[str, float]
    plain: float | None = None
    must: str = ""  # the ratio (or the figure) that was aimed at, fp32 / bf16
    difference: float | None = None  # largest, between what both ways computed in fp32
    share: dict[str, float] = field(default_factory=dict)  # of the rate of a large matrix product, by precision
    memory: dict[str, float] = field(default_factory=dict)  # GB held at most, by precision

    def cells(self) -> list[str]:
        def shown(value: float | None) -> str:
            return "" if value is None else f"{value:.3g}"

        ratios = ["" if self.plain is None else f"{rate / self.plain:.1f}x" for rate in self.ours.values()]
        ratios, rates = (ratios + ["", ""])[:2], [*map(shown, self.ours.values()), "", ""][:2]
        cells = [self.subject, self.unit, shown(self.plain), rates[0], ratios[0], rates[1], ratios[1], self.must]
        cells.append("" if self.difference is None else f"{self.difference:.0e}")
        return [*cells, *(" / ".join(map(shown, column.values())) for column in (self.share, self.memory))]


HEAD = [
    *("subject", "unit", "plain, fp32", "ours, fp32", "ratio", "ours, bf16", "ratio", "aim", "largest difference"),
    *("share of a large product", "peak GB"),
]


def table(rows: list[Row]) -> str:
    lines = [HEAD, ["---"] * len(HEAD), *(row.cells() for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def seconds(run: Callable, *args) -> float:
    """How long `run(*args)` takes, with what it left to do on a GPU."""
    synchronise = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronise()
    started = time.perf_counter()
    run(*args)
    synchronise()
    return time.perf_counter() - started


def times_as_long(run: Callable, other: Callable, repeats: int = 3) -> float:
    """How many times as long `run()` takes as `other()`.

    They take turns, and the least time of each counts: a machine's speed changes from one minute to the next.
    """
    times = [(seconds(run), seconds(other)) for _ in range(repeats)]
    return min(ours for ours, _ in times) / min(others for _, others in times)


def parse_options(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("subjects", nargs="*", help="of those above; default: all but gpu")
    parser.add_argument("--quick", action="store_true", help="a small shape, in under two minutes; ratios are smaller")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dataset_path", default=SAMPLE, help="any dataset that the toolkit reads")
    parser.add_argument("--valid_path", default="", help="its validation data, if it has none")
    parser.add_argument("--billion", action="store_true", help="adapters: 1.2 billion weights without a GPU too")
    parser.add_argument("--tokenizer", default="", help="a model folder's; default: a BPE learned from the dataset")
    options = parser.parse_args()
    if unknown := set(options.subjects) - set(SUBJECTS):
        parser.error(f"no subject {', '.join(unknown)}; there are {', '.join(SUBJECTS)}")
    if "gpu" in options.subjects and not options.device.startswith("cuda"):
        parser.error(f"the subject gpu needs one; --device is {options.device}")
    return options


@dataclass
class Bench:
    """The data and both models, which are made when they are asked for. Nothing but the weights is random."""

    options: argparse.Namespace
    device: torch.device = field(init=False)

    def __post_init__(self):
        options, self.device = self.options, torch.device(self.options.device)
        dialogs = Dialogs(options.dataset_path, options.valid_path)
        if options.tokenizer:
            self.tokenizer = load_tokenizer(find_model(options.tokenizer))
        else:
            self.tokenizer = DialogTokenizer(learn_bpe(dialogs.training_texts(), 8000))
        with tempfile.TemporaryDirectory() as folder:
            self.splits = load_dataset(dialogs, self.tokenizer, f"{folder}/cache.bin", progress=False)
        self.ids = self.tokenizer.ids
        self.shape = plain.QUICK if options.quick else plain.FULL
        self.precisions = ["fp32", "bf16"] if has_bf16(self.device) else ["fp32"]

    @cached_property
    def model(self) -> DialogModel:
        return plain.random_model(self.tokenizer, self.shape).to(self.device)

    @cached_property
    def reference(self) -> plain.OpenAIGPTDoubleHeadsModel:
        """transformers' own class with the same weights."""
        return plain.double_heads(self.model)

    @cached_property
    def models(self) -> dict[str, DialogModel]:
        """Ours by precision, as the scripts make them ready for inference."""
        models = {}
        for precision in self.precisions:
            model = copy.deepcopy(self.model)
            models[precision] = model.bfloat16() if precision == "bf16" else model
            optimize_for_cpu_inference(models[precision])
        return models

    def instances(self, split: str, max_history: int = 2, **options) -> Instances:
        return Instances(self.splits[split], self.ids, max_history, plain.POSITIONS, **options)


def has_bf16(device: torch.device) -> bool:
    """Whether bf16 is computed by the processor, and not imitated."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and cpu_has_bf16()


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second in a large matrix product."""
    size = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    torch.mm(left, right)
    return 2 * size**3 / min(seconds(torch.mm, left, right) for _ in range(5))


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second of reading memory: the sum of an array far larger than the caches."""
    array = torch.ones(2**28 if device.type == "cuda" else 2**26, device=device)
    array.sum()
    return array.nbytes / min(seconds(array.sum) for _ in range(5))


def machine(bench: Bench) -> str:
    """The machine in words and in its measured limits."""
    device = bench.device
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        name = (
            f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
        )
    peaks = [
        f"{peak_flops(device, dtype) / 1e9:,.0f} GFLOP/s in {precision}"
        for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
        if precision in bench.precisions
    ]
    return (
        f"{name}; large matrix products {' and '.join(peaks)}; memory read at {read_bandwidth(device) / 1e9:.0f} GB/s; "
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {version('transformers')}"
    )
