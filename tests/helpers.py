"""What several test files share beside the fixtures of conftest.py: datasets, token ids, a server and archives."""

import io
import itertools
import json
import os
import pkgutil
import re
import subprocess
import sys
import tarfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from torch.optim.optimizer import register_optimizer_step_post_hook

from dialogs import read_dataset
from splits import Split
from turns import Dialog, Utterance
from utils import SpecialIds, number_strings

ROOT = Path(__file__).resolve().parent.parent


def run_python(*arguments, **options) -> subprocess.CompletedProcess:
    """`python ARGUMENTS` in the project's folder until it ends, with its output as text."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", **options)


def signal_after(number: int, steps: int, calls: int = 0, function: str = "") -> None:
    """Let this process send itself a signal, after so many optimiser steps and then so many calls of functions.

    So a signal meets a training at any moment, and yet at the same one on every machine, however slow. A return counts
    as a call.

    Args:
        function: its name, such as "train.main": count how often it is entered in place of steps.
    """
    steps_taken, calls_made = itertools.count(1), itertools.count()

    def count_step(*_) -> None:
        if next(steps_taken) == steps:
            sys.setprofile(count_call)

    def count_call(*_) -> None:
        if next(calls_made) == calls:
            sys.setprofile(None)
            os.kill(os.getpid(), number)

    if not function:
        register_optimizer_step_post_hook(count_step)
        return
    place, _, name = function.rpartition(".")
    owner = pkgutil.resolve_name(place)
    entered = getattr(owner, name)
    setattr(owner, name, lambda *args, **options: (count_step(), entered(*args, **options))[1])


# ------------------------------------------------------------------------------------------------------------
# Dialogs and their tokens
# ------------------------------------------------------------------------------------------------------------

DIALOG = Dialog(["i like cats.", "é"], [Utterance(["hi"], ["hello"]), Utterance(["hi", "hello", "bye"], ["see you"])])
TURNS = {"personality": ["i like cats.", "é"], "dialog": ["hi", "hello", "bye", "see you"]}


def read(path: str) -> dict[str, list[Dialog]]:
    return {split: list(dialogs) for split, dialogs in read_dataset(path).items()}


def json_lines(*records) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


class CountingTokenizer:
    """The ids of a text are its characters; `seen` is every text it was asked for."""

    def __init__(self, name: str = "characters"):
        self.name, self.seen = name, []

    def encode(self, texts: list[str]) -> list[list[int]]:
        self.seen += texts
        return [[ord(c) for c in text] for text in texts]

    def fingerprint(self) -> str:
        return self.name


IDS = SpecialIds(bos=90, eos=91, pad=92, speaker1=93, speaker2=94, all=frozenset(range(90, 95)))


def make_split(dialogs) -> Split:
    """A split as the cache holds it. dialogs: (persona, [(history, candidates), ...]), all in lists of token ids."""

    def strings(texts: list[list[int]]) -> list[tuple[int, ...]]:
        return list(map(tuple, texts))

    numbers: dict[tuple[int, ...], int] = {}
    parsed = [
        Dialog(strings(persona), [Utterance(strings(history), strings(candidates)) for history, candidates in turns])
        for persona, turns in dialogs
    ]
    arrays = number_strings("x", parsed, numbers) | {
        "tokens": np.array(sum(numbers, ()), np.int32),
        "token_offsets": np.cumsum([0, *map(len, numbers)]),
        "texts": np.zeros(0, np.uint8),
        "text_offsets": np.zeros(len(numbers) + 1, np.int64),
    }
    return Split(arrays, "x")


# ------------------------------------------------------------------------------------------------------------
# Downloads and archives
# ------------------------------------------------------------------------------------------------------------

CONTENT = bytes(range(256)) * 100


class Server(ThreadingHTTPServer):
    """Serves `content`, each answer in the next of the ways in `answers` ("whole" where there is none left)."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/data.json"
        self.content, self.answers, self.ranges = CONTENT, [], []
        self.late = lambda: None  # what an answer that is "late" waits for


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):  # noqa: N802
        wanted, content = self.headers["Range"], self.server.content
        self.server.ranges.append(wanted)
        answer = self.server.answers.pop(0) if self.server.answers else "whole"
        if answer.isdecimal():
            self.send_error(int(answer))
            return
        if answer == "late":
            self.server.late()
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and answer != "without ranges" else 0
        if start and start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        self.wfile.write(content[start : start + 5000] if answer == "cut" else content[start:])

    def log_message(self, *args):
        pass


def rewrite_json(path: Path, **changes) -> None:
    """Change some keys of an object in a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def kept(cache: Path) -> list[str]:
    """The names in the cache, without locks."""
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def write_tar(path: Path, *members: tarfile.TarInfo | str) -> Path:
    """A .tar.gz; every file in it holds {}."""
    with tarfile.open(path, "w:gz") as tar:
        for info in members:
            info = member(info) if isinstance(info, str) else info
            info.size = 2 if info.isreg() else 0
            tar.addfile(info, io.BytesIO(b"{}"))
    return path
