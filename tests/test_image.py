"""The Docker image as far as its files tell: what gets into it, and that the words about it agree."""

import ast
import re
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from model_files import FINETUNED_URL

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
ARGS = dict(re.findall(r"^ARG (\w+)=(.*)$", DOCKERFILE, re.MULTILINE))
ENTRIES = ["train.py", "interact.py", "convai_evaluation.py", "export.py"]


def in_image(path: str) -> bool:
    """Whether .dockerignore lets a path through: the last pattern that fits it, or a folder it is in, decides."""
    parts, kept = path.split("/"), True
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = line.removeprefix("!").split("/")
        if line and not line.startswith("#") and len(pattern) <= len(parts):
            if all(map(fnmatchcase, parts, pattern)):  # of a deeper path, its beginning: the folder
                kept = line.startswith("!")
    return kept


def imported_files(script: str) -> set[str]:
    """The project's own files that a script needs: itself, what it imports (also inside functions), and so on."""
    needed, todo = set(), [script]
    while todo:
        needed.add(file := todo.pop())
        for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            paths = {name.replace(".", "/") + ".py" for name in names}
            todo += [path for path in paths - needed if (ROOT / path).exists()]
    return needed


@pytest.mark.parametrize("script", ENTRIES)
def test_scripts_are_in_the_image_with_all_they_import(script):
    needed = imported_files(script)
    assert {script, "utils.py", "model.py"} <= needed
    assert [file for file in needed if not in_image(file)] == []


@pytest.mark.parametrize(
    "path",
    [
        *["Dockerfile", "LICENCE", "README.md", "requirements.txt", *ENTRIES],
        *[
            "utils.py",
            "data/sample.json",
            "data/tiny-gpt/config.json",
            "data/smollm2-persona/adapter_model.safetensors",
        ],
    ],
)
def test_what_the_readme_shows_is_in_the_image(path):
    assert (ROOT / path).is_file() and in_image(path)


@pytest.mark.parametrize(
    "path",
    [
        *[".git/config", ".env", ".venv/lib/python3.11/site.py", "__pycache__/utils.cpython-311.pyc"],
        *["runs/latest/model.safetensors", "models/pytorch_model.bin", "models/README.md", "smollm2.gguf"],
        *["dataset_cache_633a91ad66cf.bin", "my_chats.jsonl", "data/private.json", "tests/test_image.py"],
        "data/smollm2-persona/model-q8_0.gguf",
    ],
)
def test_what_lies_about_is_not(path):
    assert not in_image(path)


def test_files_named_in_the_dockerfile_exist_and_reach_the_builder():
    named = re.findall(r"^COPY (?:--\S+ )*(\S+) ", DOCKERFILE, re.MULTILINE)
    named += re.findall(r"--mount=type=bind,source=([^,\s]+)", DOCKERFILE)
    assert set(named) == {".", "requirements.txt", "cli.py", "files.py"}
    assert all(in_image(name) and (ROOT / name).is_file() for name in set(named) - {"."})


def test_torch_is_pinned_in_the_one_way_that_the_dockerfile_looks_for():
    pins = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert "grep '^torch==' requirements.txt" in DOCKERFILE
    (pin,) = [pin for pin in pins if pin.startswith("torch==")]
    assert re.fullmatch(r"torch==[\d.]+", pin)  # the build, as in +cpu, is put behind it


def test_the_model_in_the_image_is_the_published_one():
    assert ARGS == {"TORCH": "cpu", "MODEL_URL": FINETUNED_URL}


def test_the_lent_modules_import_nothing_that_is_not_there_yet():
    """The step that fetches the model has these two alone."""
    assert imported_files("files.py") == {"cli.py", "files.py"}


def test_build_arguments_and_mounts_in_words_are_those_of_the_image():
    words = README + DOCKERFILE
    assert set(re.findall(r"--build-arg (\w+)=", words)) <= ARGS.keys()
    home = re.search(r"^WORKDIR (\S+)$", DOCKERFILE, re.MULTILINE)[1]
    assert set(re.findall(r'-v "?[^\s:]+:(/\w+)', words)) == {home}


def test_the_image_runs_as_a_user_who_is_not_root():
    assert re.findall(r"^USER (.+)$", DOCKERFILE, re.MULTILINE) == ["convai"]
    assert "RUN useradd --home-dir /convai convai" in DOCKERFILE
