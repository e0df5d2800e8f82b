"""The scripts as a user runs them: who imports whom, the quick start in small, and mistakes told in one line."""

import ast
import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from helpers import ROOT, run_python

# Each room may import those before it; scripts never import each other, but interact.py the page that it serves.
ROOMS = """
    cli options progress files smollm2 model_files messengers turns records configs formats dialogs personas
    transcript terminal words splits utils inputs rows batches template prompts adapters model loading cpu decoding
    generation conversation metrics report learner processes checkpoints runs card gguf_file
""".split()
SCRIPTS = ["convert", "train", "interact", "convai_evaluation", "export", "worker", "endpoint", "page", "web"]
MAY_IMPORT = {room: set(ROOMS[:place]) for place, room in enumerate(ROOMS)} | {name: set(ROOMS) for name in SCRIPTS}
MAY_IMPORT["interact"].add("web")
for name in ("endpoint", "page", "web"):
    MAY_IMPORT[name].add("worker")
MAY_IMPORT["web"] |= {"endpoint", "page"}


def imported(path: Path) -> set[str]:
    """The modules that a file imports, at its top or anywhere in it."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_imports_run_one_way(name):
    assert imported(ROOT / f"{name}.py") & MAY_IMPORT.keys() <= MAY_IMPORT[name]


@pytest.mark.parametrize("path", sorted((ROOT / "tests").glob("*.py")), ids=lambda path: path.stem)
def test_nobody_imports_a_test_file(path):
    assert not [name for name in imported(path) if name.startswith("test_") or name == "conftest"]


def test_only_the_page_imports_what_only_it_needs():
    assert "gradio" not in (ROOT / "interact.py").read_text(encoding="utf-8").replace('find_spec("gradio")', "")


def test_train_evaluate_and_talk(tmp_path):
    """Two epochs on the embedded sample: the loss falls, and the checkpoint serves everything."""
    cache = ["--dataset_path", "data/sample.json", "--dataset_cache", tmp_path / "cache.bin"]
    options = ["--lr", "1e-3", "--n_epochs", "2", "--gradient_accumulation_steps", "1", "--train_batch_size", "8"]
    trained = run_python("train.py", "--model", "data/tiny-gpt", *cache, *options, "--runs_dir", tmp_path / "runs")
    assert trained.returncode == 0, trained.stderr
    assert "data/tiny-gpt holds a configuration alone: from scratch, random weights" in trained.stderr
    (run,) = [path for path in (tmp_path / "runs").iterdir() if not path.is_symlink()]
    assert f"python interact.py --model_checkpoint {run} --dataset_path data/sample.json" in trained.stderr
    losses = [json.loads(line).get("loss") for line in (run / "log.jsonl").read_text().splitlines()]
    losses = [loss for loss in losses if loss is not None]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    expected = "config.json model.safetensors tokenizer.json training_args.json README.md curves.png".split()
    assert set(expected) <= {file.name for file in run.iterdir()}
    assert any(run.glob("events.*"))
    assert AutoModelForCausalLM.from_pretrained(run).config.vocab_size == 2000

    evaluated = run_python("convai_evaluation.py", "--model_checkpoint", run, *cache, "--limit", "8")
    assert evaluated.returncode == 0, evaluated.stderr
    assert evaluated.stdout.splitlines()[-1].startswith("FINAL Hits@1: 0.")
    said = run_python("interact.py", "--model", run, "--dataset_path", "data/sample.json", input="Hi!\nHow are you?\n")
    assert said.returncode == 0, said.stderr
    assert len(said.stdout.splitlines()) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train.py", "--model", "./nowhere"], "no such model: ./nowhere"),
        (["train.py", "--model", "data/tiny-gpt", "--dataset_path", "nowhere.json"], "no such dataset: nowhere.json"),
        (["train.py", "--n_epochs", "x"], "expected a whole number of at least 0, found 'x'"),
        (["train.py", "--lr", "-1"], "expected a number of at least 0, found '-1'"),
        (["train.py", "--local_rank", "0"], "a launcher sets"),
        (["train.py", "--resume", "nowhere"], "expected a run folder of train.py"),
        (["interact.py", "--model", "data/tiny-gpt", "--personality", "hi"], "train it first: python train.py"),
        (["interact.py", "--top_p", "3"], "at most 1.0, found '3'"),
        (["convai_evaluation.py", "--eval_type", "bleu"], "expected one of hits@1, ppl, f1, all, found 'bleu'"),
        (["convai_evaluation.py", "--model", "data/sample.json"], "neither a .gguf nor a .tar.gz file"),
        (["export.py", "./nowhere"], "no such folder: ./nowhere; expected a run folder of train.py"),
        (["export.py", "--gguf", "q2_k"], "expected one of f32, f16, bf16, q8_0, q4_0, found 'q2_k'"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_a_mistake_is_one_line_and_status_2(arguments, said):
    done = run_python(*arguments)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and said in line
