"""What a person waits for: preparing a dataset, opening its cache, the first prompt of interact.py, --help."""

import copy
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common import Bench, Row, seconds

TOP = Path(__file__).resolve().parent.parent
PREPARE = """
import sys, time
from dialogs import Dialogs
from model_files import find_model
from utils import load_dataset, load_tokenizer
model, dataset, valid, cache = sys.argv[1:]
tokenizer = load_tokenizer(find_model(model))
started = time.perf_counter()
load_dataset(Dialogs(dataset, valid), tokenizer, cache, progress=False)
print(time.perf_counter() - started)
print(*[line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")])  # kB, held at most
"""


def measure(bench: Bench) -> list[Row]:
    options = bench.options
    with tempfile.TemporaryDirectory() as folder:
        model = copy.deepcopy(bench.model)
        # A vocabulary learned from the sample is smaller than openai-gpt's, which no folder that is whole has.
        model.lm.resize_token_embeddings(len(bench.tokenizer), mean_resizing=False)
        model.save(Path(folder))
        bench.tokenizer.save(Path(folder))

        def prepare() -> list[float]:
            command = [sys.executable, "-c", PREPARE, options.tokenizer or folder]
            paths = [options.dataset_path, options.valid_path, f"{folder}/cache.bin"]
            done = subprocess.run([*command, *paths], cwd=TOP, check=True, stdout=subprocess.PIPE, text=True)
            return [float(word) for word in done.stdout.split()]

        def first_prompt() -> float:
            options_of_chat = ["--model", folder, "--personality", "i like cats.", "--device", options.device]
            started = time.perf_counter()
            chat = subprocess.Popen(
                [sys.executable, "interact.py", *options_of_chat],
                cwd=TOP,
                # a user's second start reads the scripts compiled
                env={name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"},
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
            next(line for line in chat.stderr if line.startswith(b"Persona:"))  # what it prints before it reads
            taken = time.perf_counter() - started
            chat.communicate()
            return taken

        def show_help(script: str) -> None:
            subprocess.run([sys.executable, script, "--help"], cwd=TOP, check=True, stdout=subprocess.DEVNULL)

        (preparing, *held), (opening, *_) = prepare(), prepare()
        replies = sum(map(len, bench.splits.values()))
        starting = min(first_prompt() for _ in range(3))
        helping = max(
            min(seconds(show_help, script) for _ in range(2))
            for script in ("train.py", "interact.py", "convai_evaluation.py")
        )
    size = sum(weight.numel() for weight in model.parameters()) / 1e6
    memory = {"": 1024 * held[0] / 1e9} if held else {}
    return [
        Row(f"preparing {replies:,} replies", "s", {"": preparing}, must="60 s (all of ConvAI2)"),
        Row("peak memory of that, torch included", "GB", memory, must="1 GB"),
        Row("opening its cache", "s", {"": opening}, must="0.5 s"),
        Row(f"interact.py to its first prompt, {size:.0f}M parameters", "s", {"": starting}, must="4 s"),
        Row("--help of the slowest script", "s", {"": helping}, must="3 s"),
    ]
