"""Fixtures of all tests: fixed seeds, tiny models, and a file, a cache and a server of a test's own."""

import os

# Before torch and tokenizers are imported, here and in the processes that tests start. Tiny models are fastest on one
# thread, sums keep their order, and threads do not wait for each other on a busy machine. What is slow has not failed:
# only faulthandler_timeout, in pyproject.toml, ends what hangs.
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ |= {"HF_HUB_DOWNLOAD_TIMEOUT": "3600", "HF_HUB_ETAG_TIMEOUT": "3600"}

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from ignite.utils import manual_seed

import files
from helpers import Server
from model import DialogModel
from tiny_models import load_folder, write_model
from utils import DialogTokenizer


@pytest.fixture(autouse=True)
def seed_and_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test starts from the same seed, with an empty cache of downloads and an empty history of what was typed."""
    manual_seed(0)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / ".state"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".cache"))


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Path]:
    """`make_model(folder, kind, weights=True, **config)` writes a tiny pretrained model: see `write_model`."""
    return write_model


@pytest.fixture(scope="session")
def load() -> Callable[..., tuple[DialogModel, DialogTokenizer]]:
    """`load(folder)` gives the model and the tokenizer of a folder."""
    return load_folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny(kind)` is a tiny pretrained model's folder, made once for all tests: read it, never write into it."""
    folders: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in folders:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(len(kind))
                folders[kind] = write_model(tmp_path_factory.mktemp(kind), kind)
        return folders[kind]

    return folder


@pytest.fixture(scope="session")
def dialog_model(tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`dialog_model(kind)` is the same as a folder that train.py would write: special tokens and both heads."""
    folders: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in folders:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(len(kind))
                model, tokenizer = load_folder(tiny(kind))
                folders[kind] = tmp_path_factory.mktemp(f"dialog-{kind}")
                model.save(folders[kind])
                tokenizer.save(folders[kind])
        return folders[kind]

    return folder


@pytest.fixture
def write(tmp_path):
    """`write(content)` puts bytes, or text, into a file whose name says nothing and returns its path."""

    def write(content: bytes | str, name: str = "dataset") -> str:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(tmp_path / name)

    return write


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    """A server in this process."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)  # written whole or not at all
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)  # between two attempts
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """The folder that downloads go into."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    return tmp_path / "caches" / "improvedflend"


@pytest.fixture
def lock_asked(monkeypatch) -> threading.Semaphore:
    """Goes up by one each time that the lock of a file is asked for."""
    asked = threading.Semaphore(0)

    def lock(path: str, **options) -> FileLock:
        asked.release()
        return FileLock(path, **options)

    monkeypatch.setattr(files, "FileLock", lock)
    return asked
