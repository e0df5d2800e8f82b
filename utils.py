"""Strings, ids and paths: everything the three scripts share that is not a neural network.

Read top to bottom: errors and logging, command-line options, downloads, dataset formats, tokenisation,
the dataset cache, input building and collation, run folders.
"""

import argparse
import contextlib
import gc
import gzip
import hashlib
import io
import json
import logging
import mmap
import os
import pickle
import random
import re
import shutil
import socket
import sys
import tarfile
import tempfile
import textwrap
import time
import warnings
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from datetime import timedelta
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
import numpy as np
import torch
import torch.distributed as dist
from filelock import FileLock
from tqdm import tqdm

PERSONACHAT_URL = "https://s3.amazonaws.com/datasets.huggingface.co/personachat/personachat_self_original.json"
FINETUNED_URL = "https://s3.amazonaws.com/models.huggingface.co/transfer-learning-chatbot/gpt_personachat_cache.tar.gz"
HUB_NAMES = {"openai-gpt": "openai-community/openai-gpt", "gpt2": "openai-community/gpt2"}

log = logging.getLogger("improvedflend")


# ------------------------------------------------------------------------------------------------------------
# Errors and logging
# ------------------------------------------------------------------------------------------------------------


class UserError(Exception):
    """Something the user can mend. The message says what is wrong, what was expected and what to do."""


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main`; a `UserError` or a full GPU ends it with one line and status 2, Ctrl-C with 130."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)
    warnings.filterwarnings("ignore", "Detected pickle protocol")  # torch's, of files that it then refuses
    gc.set_threshold(200_000)  # importing makes a million objects that stay; looking for garbage among them takes long
    try:
        main()
    except (UserError, torch.cuda.OutOfMemoryError) as error:
        message = str(error)
        if not isinstance(error, UserError):
            message = f"{first_line(error)}; try smaller batches, or another --device (see the README)"
        print("error: " + printable(" ".join(message.split())), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        gc.freeze()  # the interpreter's last search for garbage would take a second


def first_line(error: BaseException) -> str:
    """The first line of an exception's text (and the next, behind a colon), or its type where it has none; cut."""
    if isinstance(error, pickle.UnpicklingError):  # torch's own text tells how to run what it refused to run
        return "its pickle is damaged, or holds more than tensors, such as code to run"
    line = re.match(r"(.*:\s*\n)*.*", str(error).strip())[0]
    return textwrap.shorten(line, 300, placeholder=" ...") or type(error).__name__


# ------------------------------------------------------------------------------------------------------------
# Command-line options
# ------------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An argument parser that shows every default and reports a mistake in one line."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def error(self, message: str):
        print(f"error: {message} (see: python {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


LARGEST = 2**31 - 1  # more than any option makes sense with, and what every library's integers hold


def number(kind: type, low: float = -LARGEST, high: float = LARGEST) -> Callable[[str], float]:
    """An argparse type: a number of `kind` between `low` and `high`, both included."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            what = "a whole number" if kind is int else "a number"
            bounds = [f"at least {low}"] * (low > -LARGEST) + [f"at most {high}"] * (high < LARGEST or value > high)
            of = f" of {' and '.join(bounds)}" if bounds else ""
            raise argparse.ArgumentTypeError(f"expected {what}{of}, found '{text}'")
        return value

    return parse


FINETUNED_NOTE = "; openai-gpt: the published model, fine-tuned on PersonaChat"


def add_model_options(parser: argparse.ArgumentParser, note: str = "") -> None:
    """The options that say which model, which data and which machine: the same in all three scripts."""
    parser.add_argument(
        "--model",
        "--model_checkpoint",
        default="openai-gpt",
        help="short name or hub id (openai-gpt, gpt2, ...), folder, .tar.gz, .gguf, or URL of one" + note,
    )
    parser.add_argument(
        "--pre_tokenizer",
        choices=["spacy", "basic"],
        help="how text is cut into words before openai-gpt's BPE; default: what the checkpoint says, else spacy",
    )
    parser.add_argument("--dataset_path", default="", help="path or URL of a dataset; empty: download PersonaChat")
    parser.add_argument("--dataset_cache", default="./dataset_cache.bin", help="where the tokenised dataset is kept")
    parser.add_argument("--max_history", type=number(int, 0), default=2, help="exchanges of history to keep")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cuda:1, cpu or mps"
    )


def add_valid_path(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--valid_path", default="", help="path or URL of the validation data, if --dataset_path has none"
    )


def add_seed(parser: argparse.ArgumentParser, note: str) -> None:
    parser.add_argument("--seed", type=number(int, 0), default=42, help=note)


def add_local_rank(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--local_rank", "--local-rank", type=int, default=-1, help="set by launchers")


def add_decoding_options(parser: argparse.ArgumentParser) -> None:
    """The options that say how a reply is drawn."""
    parser.add_argument("--no_sample", action="store_true", help="greedy decoding: always the likeliest token")
    parser.add_argument("--max_length", type=number(int, 1), default=20, help="longest reply, in tokens")
    parser.add_argument("--min_length", type=number(int, 0), default=1, help="shortest reply, in tokens")
    parser.add_argument(
        "--temperature", type=number(float, 1e-6), default=0.7, help="below 1 sharpens, above 1 flattens"
    )
    parser.add_argument("--top_k", type=number(int), default=0, help="sample among the k likeliest tokens (<= 0: off)")
    parser.add_argument(
        "--top_p",
        type=number(float, high=1.0),
        default=0.9,
        help="sample among the likeliest tokens that together reach this probability (<= 0: off)",
    )
    parser.add_argument("--n_replies", type=number(int, 1, 64), default=1, help="draw this many and take the best")
    parser.add_argument(
        "--rerank",
        choices=["mc", "lm", "both"],
        default="both",
        help="the best by the multiple-choice head, by likelihood per token, or by the sum of both (log-probabilities)",
    )
    parser.add_argument(
        "--no_repeat_ngram",
        type=number(int, 0),
        default=0,
        help="never a sequence of this many tokens that the reply or the history already holds (0: off)",
    )
    parser.add_argument(
        "--repetition_penalty",
        type=number(float, 1.0, 10.0),
        default=1.0,
        help="above 1: tokens that the reply or the history already holds are less likely (Keskar et al. 2019)",
    )


class LineParser(Parser):
    """A parser of what is typed while the program runs: a mistake is a `UserError`."""

    def error(self, message: str):
        raise UserError(message)


def decoding_option(name: str, text: str):
    """The value of the decoding option `name` from what was typed.

    Raises:
        UserError: there is no such option, or it has no such value; it says what is possible.
    """
    parser = LineParser("decoding options")
    add_decoding_options(parser)
    defaults = vars(parser.parse_args([]))
    if name not in defaults:
        raise UserError(f"no option '{name}'; there are {', '.join(defaults)}")
    if not isinstance(defaults[name], bool):
        return getattr(parser.parse_args([f"--{name}={text}"]), name)
    if text.lower() not in ("on", "off", "true", "false"):
        raise UserError(f"{name}: expected on or off, found '{text}'")
    return text.lower() in ("on", "true")


def check_device(name: str) -> torch.device:
    """The device of that name, tried out so that a missing one is a clear line and not a late traceback."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"--device {name} cannot be used here: {first_line(error)}; try --device cpu") from error
    return device


def set_seed(seed: int) -> None:
    """Seed Python, numpy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


# ------------------------------------------------------------------------------------------------------------
# Processes: one, or those that torchrun started
# ------------------------------------------------------------------------------------------------------------


def join_processes(args: argparse.Namespace) -> torch.device:
    """Join the process group that a launcher described in the environment, if one did; this process's device."""
    given = dict(os.environ)
    if args.local_rank != -1:
        given["LOCAL_RANK"] = str(args.local_rank)
    if not given.keys() & {"LOCAL_RANK", "RANK"}:
        return check_device(args.device)
    needed = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if not given.get(name)]
    if missing:
        raise UserError(
            f"a rank is given but not {', '.join(missing)}, which a launcher sets in the environment; "
            "start with torchrun --nproc_per_node=N before the script, or without any rank for one process"
        )
    os.environ["LOCAL_RANK"] = given["LOCAL_RANK"]
    device, local_rank = check_device(args.device), int(given["LOCAL_RANK"])
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if device.index is not None or local_rank >= count:
            raise UserError(
                f"--device {args.device} with a process of local rank {local_rank} on a machine of {count} GPUs; "
                "each process needs a GPU of its own: start as many as there are, with --device cuda"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    # The timeout must allow for a download; a process that dies is noticed by torchrun, or by its closed sockets.
    timeout = timedelta(minutes=30)
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    # torchrun's store outlives a restart, and what the processes before wrote there would be taken for news.
    store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    if rank != 0:
        log.setLevel(logging.ERROR)
    return device


def rank_and_size() -> tuple[int, int]:
    """This process's number, and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(value) -> list:
    """Every process's value, in every process."""
    values = [value] * rank_and_size()[1]
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def all_sum(*values: float, device: torch.device) -> list[float]:
    """The sum of each value over all processes, in float64."""
    if not dist.is_initialized():
        return [float(value) for value in values]
    sums = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return sums.tolist()


# ------------------------------------------------------------------------------------------------------------
# Files: atomic writing, downloads, archives
# ------------------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where downloads are kept: `$XDG_CACHE_HOME/improvedflend`, by default `~/.cache/improvedflend`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "improvedflend"


def make_folder(folder: Path) -> None:
    """Create a folder and its parents; a failure is a `UserError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create the folder {folder}: {error.strerror}; choose one you can write to") from error


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold `path`.lock while the body runs, so that two processes never prepare the same thing at once."""
    make_folder(path.parent)
    try:
        held = FileLock(str(path) + ".lock")
        held.acquire()
    except OSError as error:
        raise UserError(f"cannot write beside {path}: {error.strerror}; choose a folder you can write to") from error
    with held:
        yield


@contextlib.contextmanager
def whole_files(folder: Path) -> Iterator[Path]:
    """A temporary folder whose files move into `folder` when the body is done: each appears there whole or not at all.

    Raises:
        UserError: something could not be written; what `folder` held before is untouched.
    """
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=UNFINISHED) as partial:
            yield Path(partial)
            mask = os.umask(0)
            os.umask(mask)
            for file in sorted(os.listdir(partial)):
                with open(Path(partial, file), "rb+") as written:
                    os.fsync(written.fileno())  # on the disk before it has its name: machines lose power
                Path(partial, file).chmod(0o666 & ~mask)  # as a new file's are: safetensors makes its own private
                os.replace(Path(partial, file), folder / file)
    except UserError:
        raise
    except Exception as error:  # safetensors and torch have their own errors for a full disk
        raise UserError(f"cannot write to {folder}: {first_line(error)}; free some space or choose another") from error


UNFINISHED = ".saving-"  # begins the names of the folders that `whole_files` writes in


def remove_unfinished(folder: Path) -> None:
    """Remove what a process that was killed while it wrote has left in `folder`."""
    for leftover in folder.glob(UNFINISHED + "*"):
        shutil.rmtree(leftover, ignore_errors=True)


def typed_path(name: str) -> Path:
    """A path as people type it: ~ is the home folder."""
    return Path(os.path.expanduser(name))  # pathlib's raises where there is no such user


def is_url(name: str) -> bool:
    return name.lower().startswith(("http://", "https://"))


class Part(io.BufferedWriter):
    """What is here of a download. A server that breaks off and can only begin anew is given up after a few times."""

    anew = 0

    def truncate(self, size: int | None = None) -> int:
        self.anew += 1
        if self.anew > 5:
            raise OSError("the connection breaks off each time")
        return super().truncate(size)


def download(url: str, instead: str) -> Path:
    """Fetch `url` into the cache folder, once; a part left by an earlier attempt is continued.

    Raises:
        UserError: it cannot be fetched; `instead` tells the user what to pass in its place.
    """
    last = Path(re.split("[?#]", url)[0]).name[-50:]  # file systems take names of 255 bytes, four to a character
    name = f"{hashlib.sha256(os.fsencode(url)).hexdigest()[:16]}-{last or 'file'}"
    path = cache_folder() / name
    if path.exists():
        return path
    from huggingface_hub.file_download import http_get  # heavy: only where something is fetched
    from huggingface_hub.utils import HfHubHTTPError
    from huggingface_hub.utils import logging as hub_logging

    hub_logging.set_verbosity_error()
    part = path.with_name(name + ".incomplete")
    with lock(path):
        if path.exists():  # another process fetched it while this one waited
            return path
        try:
            with Part(io.FileIO(part, "ab")) as file:
                try:
                    http_get(url, file, resume_size=file.tell(), displayed_filename=path.name[17:])
                except HfHubHTTPError as error:
                    if error.response.status_code != 416:  # 416: nothing lies behind what we hold; start anew
                        raise
                    file.truncate(0)
                    http_get(url, file, displayed_filename=path.name[17:])
            os.replace(part, path)
        except Exception as error:  # the network's errors have many types, and all mean the same to the user
            raise UserError(f"cannot fetch {url}: {first_line(error)}; {instead}") from error
    return path


def forget(path: Path) -> None:
    """Remove a file that is not what it should be, where it was downloaded: the next attempt fetches it anew."""
    if path.parent == cache_folder():
        with contextlib.suppress(OSError):
            path.unlink()


class Unzipped(gzip.GzipFile):
    """A gzip file, read in pieces until it proves a bomb: text and weights pack to a tenth, a bomb to a thousandth."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.bound = self.left = 100 * path.stat().st_size + 100 * 2**20

    def read(self, size: int) -> bytes:
        data = super().read(size)
        self.left -= len(data)
        if self.left < 0:
            raise UserError(
                f"{self.name} unpacks to more than {self.bound >> 20} MB, a hundred times its size; "
                "if that is right, unpack it yourself"
            )
        return data


def extract(archive: Path, folder: str) -> None:
    """Write the files of a .tar.gz to `folder`. Links, devices and paths that lead outside are refused."""
    with Unzipped(archive) as unzipped, tarfile.open(fileobj=unzipped, mode="r|") as tar:
        for member in tar:
            if not (member.isfile() or member.isdir()) or member.issparse():
                raise UserError(f"{archive}: '{member.name}' is a link or a device; expected plain files")
            if member.name.startswith("/"):
                raise UserError(f"{archive}: '{member.name}' leads outside; expected relative paths")
            tar.extract(member, folder, filter="data")
        while unzipped.read(2**20):  # behind the last file comes the checksum of all
            pass


def unpack(archive: Path) -> Path:
    """Unpack a model's .tar.gz beside the cache's other files, once, and return the folder with its config.json."""
    stat = archive.stat()
    key = hashlib.sha256(f"{archive.resolve()}{stat.st_size}{stat.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = cache_folder() / f"{key}-{archive.name.split('.tar')[0]}"
    with lock(folder):
        if not folder.exists():
            try:
                with tempfile.TemporaryDirectory(dir=folder.parent, prefix=folder.name + ".") as partial:
                    extract(archive, partial)
                    os.replace(partial, folder)
            except (UserError, tarfile.TarError, EOFError, OSError, zlib.error) as error:
                if not isinstance(error, OSError) or isinstance(error, gzip.BadGzipFile):  # not for want of room
                    forget(archive)
                if isinstance(error, UserError):
                    raise
                raise UserError(
                    f"{archive} cannot be unpacked: {first_line(error)}; expected a .tar.gz, whole, and room for it"
                ) from error
    configs = sorted(folder.rglob("config.json"), key=lambda path: len(path.parts))
    if not configs:
        forget(archive)
        raise UserError(f"{archive} holds no config.json; expected an archive of a model folder")
    return configs[0].parent


# ------------------------------------------------------------------------------------------------------------
# Dataset formats
# ------------------------------------------------------------------------------------------------------------


class Utterance(msgspec.Struct):
    history: list[str]
    candidates: list[str]  # the gold reply is the last one; alone, it asks for sampled distractors


class Dialog(msgspec.Struct):
    personality: list[str]
    utterances: list[Utterance]


class Message(msgspec.Struct):
    role: str
    content: str


class Record(msgspec.Struct):
    """A dialog as a file may hold it: one of `utterances`, `dialog` and `messages` is there."""

    personality: list[str] = []
    utterances: list[Utterance] | None = None
    dialog: list[str] | None = None
    messages: list[Message] | None = None


NO_JSON = (ValueError, RecursionError)  # what a decoder raises; the second for brackets nested too deep

FORMATS = "expected PersonaChat JSON, JSON lines or ParlAI text (see 'Data formats' in the README)"


def replies_of(turns: list[tuple[bool, str]]) -> list[Utterance]:
    """Every turn of the bot as the reply to all before it. turns: (spoken by the bot, text) pairs."""
    merged: list[tuple[bool, str]] = []
    for by_bot, text in turns:  # two turns of one speaker in a row are one utterance: speakers must alternate
        if merged and merged[-1][0] == by_bot:
            merged[-1] = (by_bot, f"{merged[-1][1]} {text}")
        else:
            merged.append((by_bot, text))
    texts = [text for _, text in merged]
    return [Utterance(texts[:i], [texts[i]]) for i, (by_bot, _) in enumerate(merged) if by_bot]


def dialog_of(record: Record) -> Dialog:
    """The dialog in a JSON record. Raises ValueError with what is wrong."""
    if record.utterances is not None:
        for i, utterance in enumerate(record.utterances):
            if not utterance.candidates:
                raise ValueError(f"no candidates (the last one is the gold reply) - at `$.utterances[{i}].candidates`")
        return Dialog(record.personality, record.utterances)
    if record.dialog is not None:
        return Dialog(record.personality, replies_of([(i % 2 == 1, text) for i, text in enumerate(record.dialog)]))
    if record.messages is not None:
        personality, turns = list(record.personality), []
        for i, message in enumerate(record.messages):
            if message.role in ("system", "developer"):
                personality += split_sentences(message.content)
            elif message.role in ("user", "assistant"):
                turns.append((message.role == "assistant", message.content))
            else:
                raise ValueError(f"expected role system, user or assistant, got {message.role} - at `$.messages[{i}]`")
        return Dialog(personality, replies_of(turns))
    raise ValueError("a dialog needs one of the keys utterances, dialog or messages - at `$`")


def split_sentences(text: str) -> list[str]:
    """Persona sentences from running text: one per line, and cut after . ! or ?"""
    return [part.strip() for part in re.split(r"\n|(?<=[.!?])\s", text) if part.strip()]


def json_dialogs(records: Iterable[tuple[int, msgspec.Raw | bytes]], where: Callable[[int], str]) -> Iterator[Dialog]:
    """Decode numbered records one at a time, so that a large file never stands in memory as Python objects."""
    decode = msgspec.json.Decoder(Record).decode
    for number, raw in records:
        try:
            yield dialog_of(decode(raw))
        except NO_JSON as error:  # msgspec's errors and UnicodeDecodeError are ValueErrors too
            raise UserError(f"{where(number)}: {first_line(error)}; {FORMATS}") from error


def parlai_dialogs(path: str, lines: Iterable[bytes]) -> Iterator[Dialog]:
    """ParlAI text: numbered lines, a new dialog where the number falls back."""
    dialog, history, last, answered = Dialog([], []), [], 0, True
    for count, raw in enumerate(lines, 1):
        try:
            line = raw.decode().rstrip("\r\n").replace("\\n", "\n")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}, line {count}: not UTF-8 ({error.reason}); save the file as UTF-8") from error
        if not line.strip():
            continue
        head, _, rest = line.partition(" ")
        if not head.isdecimal() or len(head) > 9:
            raise UserError(f"{path}, line {count}: expected a line number first, found '{head[:20]}'; {FORMATS}")
        if int(head) <= last:
            if dialog.utterances or dialog.personality:
                yield dialog
            dialog, history, answered = Dialog([], []), [], True
        last = int(head)
        if rest.startswith("your persona:"):
            dialog.personality.append(rest.removeprefix("your persona:").strip())
        elif not rest.startswith("partner's persona:"):
            text, label, candidates = parlai_turn(rest)
            if text and text != "__SILENCE__":
                if answered:
                    history.append(text)
                else:  # two turns of the other person in a row are one utterance: speakers must alternate
                    history[-1] += f" {text}"
                answered = False
            if label:
                distractors = [candidate for candidate in candidates if candidate != label]
                dialog.utterances.append(Utterance(list(history), [*distractors, label]))
                history.append(label)
                answered = True
    if dialog.utterances or dialog.personality:
        yield dialog


def parlai_turn(text: str) -> tuple[str, str, list[str]]:
    """`text<TAB>label[<TAB>reward<TAB>candidate|candidate|...]` as (text, label, candidates)."""
    text, label, _, candidates = (*text.split("\t"), "", "", "")[:4]
    return text.strip(), label.strip(), [part.strip() for part in candidates.split("|") if part.strip()]


def read_bytes(path: Path) -> bytes | mmap.mmap:
    """A file's content, unzipped where it is gzip, else mapped into memory and not read before it is used."""
    try:
        if path.is_dir():
            raise UserError(f"{path} is a folder; expected a dataset file: {FORMATS}")
        with open(path, "rb") as file:
            if file.read(2) == b"\x1f\x8b":
                with Unzipped(path) as unzipped:
                    return b"".join(iter(partial(unzipped.read, 2**20), b""))
            if path.stat().st_size == 0:
                raise UserError(f"{path} is empty; {FORMATS}")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError as error:
        raise UserError(f"no such dataset: {path}; pass --dataset_path a file or a URL") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {first_line(error)}; expected a whole, readable file") from error


def read_dataset(name: str) -> dict[str, Iterator[Dialog]]:
    """The dialogs of a dataset by split, read lazily: {"train": ..., "valid": ...}, or {"all": ...} without splits.

    Args:
        name: a path, a URL, or "" for PersonaChat. The format is told apart by content, not by name.
    """
    path = dataset_file(name)
    data = read_bytes(path)
    start = data[:4096].removeprefix(b"\xef\xbb\xbf")  # a byte order mark
    offset = len(data[:4096]) - len(start)
    first = start.lstrip()[:1]
    if first.isdigit():
        return {"all": parlai_dialogs(str(path), iter_lines(data, offset))}
    if first not in (b"{", b"["):
        forget(path)  # maybe a page of the network that asks to log in
        raise UserError(f"{path}: begins with {start.lstrip()[:20]!r}; {FORMATS}")
    first_record = next(line for line in iter_lines(data, offset) if line.strip())
    if first == b"{" and is_record(first_record):
        lines = ((count, line) for count, line in enumerate(iter_lines(data, offset), 1) if line.strip())
        return {"all": json_dialogs(lines, lambda count: f"{path}, line {count}")}
    try:
        view = memoryview(data)[offset:]
        if first == b"[":
            splits = {"all": msgspec.json.decode(view, type=list[msgspec.Raw])}
        else:
            splits = msgspec.json.decode(view, type=dict[str, list[msgspec.Raw]])
    except NO_JSON as error:
        raise UserError(f"{path}: {first_line(error)}; {FORMATS}") from error
    if "all" not in splits and "train" not in splits and "valid" not in splits:
        keys = textwrap.shorten(", ".join(splits), 100, placeholder=" ...") or "(none)"
        raise UserError(f"{path}: has the keys {keys}, expected train and valid; {FORMATS}")
    return {
        split: json_dialogs(
            enumerate(raws), lambda i, split=split: f"{path}, {'$' if split == 'all' else '$.' + split}[{i}]"
        )
        for split, raws in splits.items()
        if split in ("all", "train", "valid")
    }


def dataset_file(name: str) -> Path:
    """The dataset as a local file, downloaded where it is a URL or nothing was named."""
    url = name or PERSONACHAT_URL
    return download(url, "pass --dataset_path a local file") if is_url(url) else typed_path(name)


def iter_lines(data: bytes | mmap.mmap, offset: int) -> Iterator[bytes]:
    """The lines of `data` from `offset` on."""
    while offset < len(data):
        end = data.find(b"\n", offset) + 1 or len(data)
        yield data[offset:end]
        offset = end


def is_record(line: bytes) -> bool:
    """Whether a line is a JSON object with a dialog in it (JSON lines), not the start of a larger document."""
    try:
        keys = msgspec.json.decode(line, type=dict[str, msgspec.Raw])
    except NO_JSON:
        return False
    return bool(keys.keys() & {"personality", "utterances", "dialog", "messages"})


def load_personas(name: str) -> list[list[str]]:
    """The non-empty personas of a dataset, all splits, without tokenising anything."""
    personas = [dialog.personality for dialogs in read_dataset(name).values() for dialog in dialogs]
    personas = [persona for persona in personas if persona]
    if not personas:
        raise UserError(f"{name or 'PersonaChat'} holds no persona; pass --personality 'i like cats.'")
    return personas


# ------------------------------------------------------------------------------------------------------------
# Where a model's files are
# ------------------------------------------------------------------------------------------------------------


@dataclass
class ModelFiles:
    """A model on this machine: a folder, and the name of the .gguf file in it if it is one."""

    folder: Path
    gguf: str | None = None

    @property
    def has_weights(self) -> bool:
        return bool(self.gguf) or any(self.folder.glob("*.safetensors")) or any(self.folder.glob("pytorch_model*.bin"))

    @property
    def has_tokenizer(self) -> bool:
        names = (
            "tokenizer.json",
            "vocab.json",
            "tokenizer.model",
            "spiece.model",
            "vocab.txt",
            "tokenizer_config.json",
        )
        return bool(self.gguf) or any((self.folder / name).exists() for name in names)


def find_finetuned_model(name: str) -> ModelFiles:
    """As `find_model`, for talking and evaluating: there openai-gpt is the published model fine-tuned from it."""
    return find_model(FINETUNED_URL if name == "openai-gpt" else name)


def find_model(name: str) -> ModelFiles:
    """The files of a model given by folder, .gguf or .tar.gz file, URL of one, short name or hub id.

    Raises:
        UserError: there is no such file, or it cannot be fetched.
    """
    path = download(name, "pass --model a local folder or file") if is_url(name) else typed_path(name)
    if os.path.isdir(path):  # pathlib's raises for names that are too long
        if not os.path.exists(path / "config.json"):
            raise UserError(f"{path} holds no config.json; expected a model folder, such as one that train.py wrote")
        files = ModelFiles(path)
        if not files.has_weights and os.path.exists(path / "training_args.json"):
            raise UserError(
                f"{path} holds no weights, as before a run's first evaluation; "
                f"go on with it: python train.py --resume {path}"
            )
        return files
    if os.path.isfile(path):
        try:
            with open(path, "rb") as file:
                magic = file.read(4)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}; choose a model that you can read") from error
        if magic == b"GGUF":
            return ModelFiles(path.parent, gguf=path.name)
        if magic[:2] == b"\x1f\x8b":
            return ModelFiles(unpack(path))
        if path.name == "latest":  # a text file, where links are not possible
            return find_model(str(find_run(name)))
        forget(path)
        raise UserError(f"{path} is neither a .gguf nor a .tar.gz file; expected one of these or a model folder")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(("/", ".gguf", ".gz")) or "\\" in name:
        raise UserError(f"no such model: {name}; expected a folder, a .tar.gz or .gguf file, a URL or a hub id")
    return ModelFiles(fetch_from_hub(HUB_NAMES.get(name, name)))


def fetch_from_hub(repo: str) -> Path:
    """A snapshot of a hub repository's config, tokenizer and weights (safetensors, or .bin where there are none)."""
    from huggingface_hub import snapshot_download  # heavy: only where something is fetched

    texts = ["*.json", "*.txt", "*.model"]
    try:
        folder = Path(snapshot_download(repo, allow_patterns=[*texts, "*.safetensors"], ignore_patterns=["*/*"]))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(repo, allow_patterns=["pytorch_model*.bin"])
    except Exception as error:  # the hub's and the network's errors have many types; all mean the same to the user
        raise UserError(
            f"cannot fetch '{repo}' from the hub: {first_line(error)}; pass --model a local folder"
        ) from error
    return folder


# ------------------------------------------------------------------------------------------------------------
# Tokenisation
# ------------------------------------------------------------------------------------------------------------

# In the order in which the original toolkit added them: it decides their ids.
SPECIAL_TOKENS = {
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "pad_token": "<pad>",
    "extra_special_tokens": ["<speaker1>", "<speaker2>"],
}


@dataclass(frozen=True)
class SpecialIds:
    bos: int
    eos: int
    pad: int
    speaker1: int  # the bot
    speaker2: int  # the other person
    all: frozenset[int]  # these and the base model's own: a reply ends at any of them


class DialogTokenizer:
    """A tokenizer of transformers with the five special tokens of a dialog, and the text around it.

    Args:
        hf: the tokenizer, with or without the special tokens.
        pre_tokenizer: "spacy" or "basic" for openai-gpt's vocabulary; None asks for the default: what the folder
            says; "basic" for one that has our special tokens and does not say (fine-tuned by the original toolkit);
            else "spacy". Other tokenizers cut text in their own way.
    """

    def __init__(self, hf, pre_tokenizer: str | None = None):
        self.hf = hf
        self.fine_tuned = "<speaker1>" in hf.get_vocab()
        if type(hf).__name__ == "OpenAIGPTTokenizer":
            saved = hf.init_kwargs.get("pre_tokenizer")
            self.pre_tokenizer = pre_tokenizer or saved or ("basic" if self.fine_tuned else "spacy")
            hf.init_kwargs["pre_tokenizer"] = self.pre_tokenizer  # saved with the tokenizer, and read back here
        elif pre_tokenizer:
            raise UserError("--pre_tokenizer is for openai-gpt's vocabulary only; leave it out for this model")
        else:
            self.pre_tokenizer = None
        hf.add_special_tokens(SPECIAL_TOKENS)
        if self.pre_tokenizer == "spacy":
            self._use_words_as_they_are()
        ours = hf.convert_tokens_to_ids(["<bos>", "<eos>", "<pad>", "<speaker1>", "<speaker2>"])
        self.ids = SpecialIds(*ours, all=frozenset([*ours, *hf.all_special_ids]))

    def _use_words_as_they_are(self) -> None:
        # The tokenizer's own rules would cut spaCy's words again (n't into n, ', t), also after a save and a load.
        from tokenizers import normalizers, pre_tokenizers

        self.hf.backend_tokenizer.normalizer = normalizers.Sequence([])
        self.hf.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()

    def __len__(self) -> int:
        """The number of rows an embedding needs for every id of this tokenizer."""
        return max(len(self.hf), max(self.hf.get_vocab().values()) + 1)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text. Special tokens that stand in a text are text: none comes out."""
        if not texts:
            return []
        texts = [text.encode(errors="replace").decode() for text in texts]  # bytes that were no text in a terminal
        if self.pre_tokenizer == "spacy":
            texts = [spacy_words(text) for text in texts]
        return self.hf(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def encode_inside(self, words: list[str]) -> list[list[int]]:
        """The ids of words that stand behind another one: in byte-level vocabularies they carry their space."""
        before = self.encode(["a"])[0]
        return [ids[len(before) :] for ids in self.encode([f"a {word}" for word in words])]

    def decode(self, ids: list[int]) -> str:
        """Text as people write it, without special tokens and control characters."""
        return detokenize(self._raw(ids))

    def decode_start(self, ids: list[int]) -> str:
        """The start of `decode(ids + more)` that is the same whatever ids come behind: what can be shown already."""
        raw = self._raw(ids).rstrip("\ufffd")  # the first bytes of a character
        return os.path.commonprefix([detokenize(raw + more) for more in CONTINUATIONS])

    def _raw(self, ids: list[int]) -> str:
        ids = [i for i in ids if i not in self.ids.all]
        return printable(self.hf.decode(ids, clean_up_tokenization_spaces=False))

    def fingerprint(self) -> str:
        """Changes whenever the ids of some text could change."""
        backend = getattr(self.hf, "backend_tokenizer", None)
        rules = backend.to_str() if backend else json.dumps(self.hf.get_vocab(), sort_keys=True)
        return hashlib.sha256(f"{self.pre_tokenizer}{rules}".encode()).hexdigest()

    def save(self, folder: Path) -> None:
        self.hf.save_pretrained(folder)


def load_tokenizer(
    files: ModelFiles, pre_tokenizer: str | None = None, texts: Callable[[], Iterable[str]] | None = None
) -> DialogTokenizer:
    """The tokenizer of a model, or one learned from `texts` where the model's folder has none.

    Raises:
        UserError: there is none and no text to learn one from, or it cannot be read.
    """
    if not files.has_tokenizer:
        if texts is None:
            raise UserError(
                f"{files.folder} holds no tokenizer; train it first: python train.py --model {files.folder}"
            )
        size = load_config_dict(files).get("vocab_size", 8000)
        if type(size) is not int or not 5 <= size <= 10**6:
            raise UserError(
                f"{files.folder}/config.json: vocab_size is {size!r}; expected 5 to 1000000, as a vocabulary is learned"
            )
        return DialogTokenizer(learn_bpe(texts(), size), pre_tokenizer)
    from transformers import AutoTokenizer

    gguf = {"gguf_file": files.gguf} if files.gguf else {"config": load_config(files)}
    try:
        hf = AutoTokenizer.from_pretrained(files.folder, trust_remote_code=False, **gguf)
    except Exception as error:  # transformers raises many types for a tokenizer it cannot read
        raise UserError(
            f"cannot read the tokenizer in {files.folder}: {first_line(error)}; expected one of transformers'"
        ) from error
    return DialogTokenizer(hf, pre_tokenizer)


def load_config_dict(files: ModelFiles) -> dict:
    """A folder's config.json; `model_type`, which those of 2019 lack, is inferred."""
    path = files.folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not a JSON object")
    except (OSError, *NO_JSON) as error:
        raise UserError(f"cannot read {path}: {first_line(error)}; expected a model's configuration in JSON") from error
    if "model_type" not in config:
        # afn is openai-gpt's name of its activation function; GPT-2 has no such key
        config["model_type"] = "openai-gpt" if "afn" in config else "gpt2"
    return config


def load_config(files: ModelFiles):
    """The transformers configuration of a model folder."""
    from transformers import CONFIG_MAPPING, AutoConfig

    config = load_config_dict(files)
    if str(config["model_type"]) not in CONFIG_MAPPING:
        own = " and asks for code of its own (auto_map), which is never run" if "auto_map" in config else ""
        raise UserError(
            f"{files.folder}/config.json names the model type '{config['model_type']}', which transformers does not "
            f"know{own}; use another model, such as gpt2"
        )
    try:
        return AutoConfig.for_model(**config)
    except Exception as error:  # transformers raises many types for a configuration it cannot use
        raise UserError(
            f"{files.folder}/config.json: {first_line(error)}; expected a configuration of transformers"
        ) from error


def learn_bpe(texts: Iterable[str], vocab_size: int):
    """A byte-level BPE learned from `texts`: any language works, and no text is unknown to it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 5, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


# openai-gpt's pretraining text was standardised like this (Radford et al. 2018, section 4.1: ftfy and spaCy).
STANDARD_CHARACTERS = str.maketrans({"—": "-", "–": "-", "―": "-", "…": "...", "´": "'"})
SPACED_OUT = re.compile(r"""(-+|~+|!+|"+|;+|\?+|\++|,+|\)+|\(+|\\+|/+|\*+|\[+|\]+|\}+|\{+|\|+|_+)""")
_spacy_english = None


def spacy_words(text: str) -> str:
    """Text cut into words as openai-gpt's pretraining text was: `i'm` is `i 'm`, `don't` is `do n't`."""
    global _spacy_english
    import ftfy

    if _spacy_english is None:  # a second to import, so only where openai-gpt is used
        import spacy

        _spacy_english = spacy.blank("en").tokenizer
    text = ftfy.fix_text(text).translate(STANDARD_CHARACTERS)
    text = " ".join(SPACED_OUT.sub(r" \1 ", text).split())
    return " ".join(word.text for word in _spacy_english(text)).lower()


DETOKENIZE = [
    (re.compile(r"(\w) ?n ' t\b"), r"\1n't"),  # don ' t, ca n ' t
    (re.compile(r"(\w) ' (s|m|t|d|re|ve|ll)\b", re.I), r"\1'\2"),  # i ' m
    (re.compile(r"(\w) (n't|'(?:s|m|t|d|re|ve|ll))\b", re.I), r"\1\2"),  # do n't, i 'm
    (re.compile(r"\b(gon|wan|got) (na|ta)\b"), r"\1\2"),  # as spaCy cuts gonna, wanna, gotta
    (re.compile(r"(?<=\.) (?=\.)"), ""),  # . . .
    (re.compile(r" ([.,!?;:%]+)(?=\s|$)"), r"\1"),
    (re.compile(r'(^|\s)" ([^"]+?) "(?=\W|$)'), r'\1"\2"'),
    (re.compile(r"([(\[]) (.*?) ([)\]])"), r"\1\2\3"),
    (re.compile(r"\s+"), " "),
]


def detokenize(text: str) -> str:
    """Tokenised English put back as people write it: `i 'm fine , thanks .` becomes `i'm fine, thanks.`"""
    for pattern, replacement in DETOKENIZE:
        text = pattern.sub(replacement, text)
    return text.strip()


# What a text may go on with, to bring each rule of DETOKENIZE about; a text's start that is the same before all of
# them is settled.
CONTINUATIONS = ["", "x", " x", "t", " t", "'t", "' t", " ' t", "n't", " n't", "n ' t", " n ' t"]
CONTINUATIONS += ["s", " 's", " ' s", "m", "e", "l", ".", " .", '"', ' "', ' x "', ")", " )", "]", " ]"]
# Control characters, and those that turn the direction of writing around; white space stays.
UNPRINTABLE = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Text that cannot command a terminal: without control characters."""
    return UNPRINTABLE.sub("", text)


MAX_MESSAGE = 2000  # characters that a person may say at once: about a page, and more than a model sees


def check_message(text: str) -> str:
    """`text` as it can be answered. Raises UserError where it is empty or too long."""
    text = text.strip()
    if not text:
        raise UserError("the message is empty; type something")
    if len(text) > MAX_MESSAGE:
        raise UserError(f"the message has {len(text)} characters; expected at most {MAX_MESSAGE}, so shorten it")
    return text


# ------------------------------------------------------------------------------------------------------------
# The dataset cache: tokens, texts and who says what, in one memory-mapped file
# ------------------------------------------------------------------------------------------------------------

CACHE_VERSION = 1
N_DISTRACTORS = 19  # sampled where a reply comes without candidates, as many as ConvAI2 gives
SPLIT_SEED = 0  # fixed, so that training and evaluation hold out the same dialogs


class Split:
    """One split of a tokenised dataset; every array lies in the mapped cache file.

    Strings are numbered. `tokens[token_offsets[s]:token_offsets[s + 1]]` are the ids of string s, and its UTF-8
    text lies in `texts` in the same way. Utterance u belongs to dialog `dialogs[u]`; its history and candidates
    (the gold one last), and a dialog's persona, are lists of string numbers behind offsets too.
    """

    def __init__(self, arrays: dict[str, np.ndarray], split: str):
        self.token_offsets, self.tokens = arrays["token_offsets"], arrays["tokens"]
        self.text_offsets, self.texts = arrays["text_offsets"], arrays["texts"]
        self.sizes = np.diff(self.token_offsets)  # tokens of each string
        self.dialogs = arrays[f"{split}.dialogs"]
        self._lists = {
            name: (arrays[f"{split}.{name}_offsets"], arrays[f"{split}.{name}"])
            for name in ("persona", "history", "candidates")
        }

    def __len__(self) -> int:
        return len(self.dialogs)

    def strings(self, name: str, index: int) -> np.ndarray:
        """The string numbers of a list: of "persona" by dialog, of "history" and "candidates" by utterance."""
        offsets, numbers = self._lists[name]
        return numbers[offsets[index] : offsets[index + 1]]

    def ids(self, string: int) -> list[int]:
        return self.tokens[self.token_offsets[string] : self.token_offsets[string + 1]].tolist()

    def text(self, string: int) -> str:
        return self.texts[self.text_offsets[string] : self.text_offsets[string + 1]].tobytes().decode()

    def persona_texts(self, utterance: int) -> list[str]:
        return [self.text(string) for string in self.strings("persona", self.dialogs[utterance])]

    def history_texts(self, utterance: int) -> list[str]:
        return [self.text(string) for string in self.strings("history", utterance)]

    def candidate_texts(self, utterance: int) -> list[str]:
        return [self.text(string) for string in self.strings("candidates", utterance)]

    def gold_text(self, utterance: int) -> str:
        return self.text(self.strings("candidates", utterance)[-1])

    @property
    def n_dialogs(self) -> int:
        return len(self._lists["persona"][0]) - 1

    def most_candidates(self) -> int:
        return int(np.diff(self._lists["candidates"][0]).max())


def load_dataset(
    name: str | None, valid_name: str, cache: str, tokenizer: DialogTokenizer, progress: bool = True
) -> dict[str, Split]:
    """The splits "train" and "valid" of a dataset, tokenised once and then mapped from the cache file.

    Args:
        name: path or URL; "" is PersonaChat, None no training data at all.
        valid_name: a dataset whose "valid" split, or all of it, is the validation split; "" takes that of `name`,
            or cuts one off by dialog.
        cache: where the cache is kept; a key is put before the ending, so that datasets and models do not evict
            each other.
    """
    path = typed_path(cache)
    if not path.name:
        raise UserError(f"--dataset_cache '{cache}' names no file; expected one such as ./dataset_cache.bin")
    content = [
        name is not None and file_digest(dataset_file(name)),
        valid_name and file_digest(dataset_file(valid_name)),
    ]
    key = hashlib.sha256(json.dumps([CACHE_VERSION, content, tokenizer.fingerprint()]).encode()).hexdigest()
    path = path.with_name(f"{path.stem}_{key[:12]}{path.suffix}")
    with lock(path):
        arrays = read_cache(path, key)
        if arrays is None:
            started = time.monotonic()
            arrays = tokenize_dataset(name, valid_name, tokenizer, progress)
            write_cache(path, key, arrays)
            log.info(
                f"tokenised {name or valid_name or 'PersonaChat'} into {path} in {time.monotonic() - started:.1f} s"
            )
            arrays = read_cache(path, key) or arrays  # mapped from the file, so that processes share the memory
    return {split: Split(arrays, split) for split in ("train", "valid")}


def file_digest(path: Path) -> str:
    data = read_bytes(path)  # for its clear errors
    return hashlib.sha256(data).hexdigest()


def split_dialogs(name: str | None, valid_name: str) -> dict[str, Iterable[Dialog]]:
    """The dialogs of "train" and "valid"; a validation split is cut off by dialog where there is none."""
    splits = {} if name is None else read_dataset(name)
    if valid_name:
        held_out = read_dataset(valid_name)
        valid = held_out.get("valid") or held_out.get("all") or held_out["train"]
        return {"train": splits.get("train") or splits.get("all") or [], "valid": valid}
    if "valid" in splits:
        return {"train": splits.get("train", []), "valid": splits["valid"]}
    dialogs = list(next(iter(splits.values())))
    if len(dialogs) < 2:
        raise UserError(
            f"{name} holds {len(dialogs)} dialog; expected one to train on and one to validate on, or --valid_path"
        )
    held_out = np.random.default_rng(SPLIT_SEED).permutation(len(dialogs))[: max(1, min(len(dialogs) // 10, 500))]
    log.info(f"{name} has no validation split: {len(held_out)} of its {len(dialogs)} dialogs are held out for it")
    chosen = set(held_out.tolist())
    return {
        "train": [dialog for i, dialog in enumerate(dialogs) if i not in chosen],
        "valid": [dialog for i, dialog in enumerate(dialogs) if i in chosen],
    }


def training_texts(name: str, valid_name: str) -> Iterator[str]:
    """Every text of the training split, for learning a vocabulary."""
    for dialog in split_dialogs(name, valid_name)["train"]:
        yield from dialog.personality
        for utterance in dialog.utterances:
            yield from utterance.history[-1:]
            yield utterance.candidates[-1]


def tokenize_dataset(
    name: str | None, valid_name: str, tokenizer: DialogTokenizer, progress: bool
) -> dict[str, np.ndarray]:
    """The arrays of a cache file (see `Split`). Every distinct string is tokenised once."""
    numbers: dict[str, int] = {}
    arrays: dict[str, np.ndarray] = {}
    for split, dialogs in split_dialogs(name, valid_name).items():
        arrays |= index_split(split, tqdm(dialogs, f"read {split}", unit=" dialogs", disable=not progress), numbers)
    if not len(arrays["valid.dialogs"]):
        raise UserError(f"the validation split of {valid_name or name or 'PersonaChat'} holds no reply; {FORMATS}")
    strings = list(numbers)
    tokens, token_offsets = array("i"), array("q", [0])
    with tqdm(total=len(strings), desc="tokenise", unit=" strings", disable=not progress) as bar:
        for start in range(0, len(strings), 4096):
            chunk = strings[start : start + 4096]
            for ids in tokenizer.encode(chunk):
                tokens.extend(ids)
                token_offsets.append(len(tokens))
            bar.update(len(chunk))
    encoded = [string.encode("utf-8", "replace") for string in strings]
    arrays["tokens"] = np.frombuffer(tokens, np.int32) if tokens else np.zeros(0, np.int32)
    arrays["token_offsets"] = np.frombuffer(token_offsets, np.int64)
    arrays["texts"] = np.frombuffer(b"".join(encoded), np.uint8)
    arrays["text_offsets"] = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    return arrays


def index_split(split: str, dialogs: Iterable[Dialog], numbers: dict[str, int]) -> dict[str, np.ndarray]:
    """One split's lists of string numbers; new strings get the next number in `numbers`."""
    columns = {name: (array("q", [0]), array("i")) for name in ("persona", "history", "candidates")}
    utterance_dialogs = array("i")

    def add(name: str, texts: list[str]) -> None:
        offsets, flat = columns[name]
        flat.extend([numbers.setdefault(text, len(numbers)) for text in texts])
        offsets.append(len(flat))

    for count, dialog in enumerate(dialogs):
        add("persona", dialog.personality)
        for utterance in dialog.utterances:
            utterance_dialogs.append(count)
            add("history", utterance.history)
            add("candidates", utterance.candidates)
    offsets, candidates = (
        np.array(column, kind) for column, kind in zip(columns["candidates"], (np.int64, np.int32), strict=True)
    )
    offsets, candidates = with_distractors(offsets, candidates)
    arrays = {f"{split}.dialogs": np.array(utterance_dialogs, np.int32)}
    for name, (column_offsets, flat) in columns.items():
        arrays[f"{split}.{name}_offsets"] = np.array(column_offsets, np.int64)
        arrays[f"{split}.{name}"] = np.array(flat, np.int32)
    return arrays | {f"{split}.candidates_offsets": offsets, f"{split}.candidates": candidates}


def with_distractors(offsets: np.ndarray, candidates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Give every utterance that has only its gold reply distinct distractors drawn from the other gold replies."""
    counts = np.diff(offsets)
    gold = candidates[offsets[1:] - 1]
    pool = np.unique(gold)
    n = min(N_DISTRACTORS, len(pool) - 1)
    alone = np.flatnonzero(counts == 1)
    if not len(alone) or n < 1:
        return offsets, candidates
    rng = np.random.default_rng(SPLIT_SEED)
    if len(pool) < 4 * N_DISTRACTORS:  # few replies: draw without replacement from the others
        drawn = np.stack([rng.permutation(pool[pool != own])[:n] for own in gold[alone]])
    else:  # many: draw freely, and again where a row holds a reply twice or its own gold reply
        drawn = np.empty((len(alone), n), pool.dtype)
        redo = np.arange(len(alone))
        while len(redo):
            drawn[redo] = pool[rng.integers(len(pool), size=(len(redo), n))]
            rows = np.sort(drawn[redo], axis=1)
            clash = (rows[:, 1:] == rows[:, :-1]).any(axis=1) | (rows == gold[alone[redo], None]).any(axis=1)
            redo = redo[clash]
    new_counts = counts.copy()
    new_counts[alone] = n + 1
    new_offsets = np.concatenate([[0], np.cumsum(new_counts)])
    filled = np.empty(new_offsets[-1], candidates.dtype)
    filled[new_offsets[alone][:, None] + np.arange(n)] = drawn
    filled[new_offsets[alone + 1] - 1] = gold[alone]
    others = np.repeat(counts != 1, new_counts)
    filled[others] = candidates[np.repeat(counts != 1, counts)]
    return new_offsets, filled


def write_cache(path: Path, key: str, arrays: dict[str, np.ndarray]) -> None:
    """Write a cache file (safetensors: a JSON header, then flat arrays)."""
    from safetensors.numpy import save_file

    with whole_files(path.parent) as partial:
        save_file(arrays, partial / path.name, metadata={"key": key, "checksum": checksum(arrays)})


def read_cache(path: Path, key: str) -> dict[str, np.ndarray] | None:
    """Map a cache file into memory; None where there is none, or, with a warning, where it is stale or damaged."""
    if not path.exists():
        return None
    try:
        with open(path, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        start = 8 + int.from_bytes(data[:8], "little")
        header = msgspec.json.decode(data[8:start])
        metadata = header.pop("__metadata__")
        kinds = {"I32": np.int32, "I64": np.int64, "U8": np.uint8}
        arrays = {}
        for name, entry in header.items():
            low, high = entry["data_offsets"]
            kind = np.dtype(kinds[entry["dtype"]])
            arrays[name] = np.frombuffer(data, kind, (high - low) // kind.itemsize, start + low)
        if metadata["key"] == key and metadata["checksum"] == checksum(arrays):
            return arrays
        reason = "does not match its key or checksum"
    except (OSError, *NO_JSON, KeyError, TypeError, AttributeError, OverflowError) as error:
        reason = first_line(error)
    log.warning(f"warning: {path} is damaged or of another kind ({reason}); it is built anew")
    return None


def checksum(arrays: dict[str, np.ndarray]) -> str:
    value = 0
    for name in sorted(arrays):
        value = zlib.crc32(np.ascontiguousarray(arrays[name]).view(np.uint8), zlib.crc32(name.encode(), value))
    return str(value)


# ------------------------------------------------------------------------------------------------------------
# Input building (Wolf et al. 2019, arXiv 1901.08149, section 3)
# ------------------------------------------------------------------------------------------------------------


@dataclass
class Instance:
    """A packed row before it is a tensor: a prefix and the candidates that share it."""

    prefix: list[int]  # <bos> persona, each history utterance behind its speaker, the reply's <speaker1>
    token_types: list[int]  # of the prefix: every token's speaker
    candidates: list[list[int]]  # reply tokens and <eos>; the gold one is the last
    extra: list[int] = field(default_factory=list)  # one more continuation, in no loss and no ranking


def fit(
    persona: list[list[int]], history: list[list[int]], reply: int, limit: int
) -> tuple[list[list[int]], list[list[int]], int]:
    """Cut persona, history and reply so that a row fits a model.

    Whole oldest utterances go first, then the front of the oldest one left, then the end of the reply. The persona
    stays whole unless it alone leaves no room; then its last sentences go.

    Args:
        reply: tokens of the longest candidate (or to be generated), `<eos>` not counted.
        limit: tokens the model takes.
    Returns:
        persona, history and the tokens left for a reply (at least one).
    """
    room = limit - 3  # <bos>, the reply's speaker, <eos>
    while persona and sum(map(len, persona)) > room - 1:
        persona = persona[:-1]
    room -= sum(map(len, persona))
    over = sum(len(utterance) + 1 for utterance in history) + reply - room
    while over > 0 and len(history) > 1:
        over -= len(history[0]) + 1
        history = history[1:]
    if over > 0 and history:
        if over < len(history[0]):
            history, over = [history[0][over:]], 0
        else:
            history, over = [], over - len(history[0]) - 1
    return persona, history, reply - max(over, 0)


def build_prefix(persona: list[list[int]], history: list[list[int]], ids: SpecialIds) -> tuple[list[int], list[int]]:
    """The tokens before a reply, and each one's token type (the id of the speaker of its segment).

    Speakers alternate backwards from the reply, which is `<speaker1>`'s; the persona is `<speaker1>`'s too.
    """
    tokens = [ids.bos, *(token for sentence in persona for token in sentence)]
    types = [ids.speaker1] * len(tokens)
    for distance, utterance in zip(range(len(history), 0, -1), history, strict=True):
        speaker = ids.speaker2 if distance % 2 else ids.speaker1
        tokens += [speaker, *utterance]
        types += [speaker] * (len(utterance) + 1)
    return [*tokens, ids.speaker1], [*types, ids.speaker1]


class Instances(torch.utils.data.Dataset):
    """The instances of a split, built when they are asked for.

    Args:
        max_history: exchanges; the last `2 * max_history + 1` utterances are kept.
        num_candidates: keep this many, the last ones; <= 0 keeps all.
        permutations: rotations of the persona's sentences; instance i is utterance `i % len(split)`, rotated by
            `i // len(split)` sentences.
        limit: tokens the model takes.
        extras: by the string number of a gold reply, tokens that the instance gets as `extra`.
    """

    def __init__(
        self,
        split: Split,
        ids: SpecialIds,
        max_history: int,
        limit: int,
        num_candidates: int = 0,
        permutations: int = 1,
        extras: dict[int, list[int]] | None = None,
    ):
        self.split, self.special_ids, self.limit = split, ids, limit
        self.n_history = 2 * max_history + 1
        self.num_candidates, self.permutations = max(num_candidates, 0), permutations
        self.extras = extras or {}

    def __len__(self) -> int:
        return len(self.split) * self.permutations

    def __getitem__(self, index: int) -> Instance:
        if not 0 <= index < len(self):
            raise IndexError(index)
        candidates = self.split.strings("candidates", index % len(self.split))
        longest = int(self.split.sizes[candidates].max())  # of all: the cut does not depend on how many are kept
        candidates = candidates[-self.num_candidates :]
        replies = [self.split.ids(candidate) for candidate in candidates]
        (prefix, types), room = self.prefix(index, longest)
        extra = self.extras.get(int(candidates[-1]), [])[: self.limit - len(prefix)]
        return Instance(prefix, types, [[*ids[:room], self.special_ids.eos] for ids in replies], extra)

    def prefix(self, index: int, reply: int) -> tuple[tuple[list[int], list[int]], int]:
        """The prefix (tokens, types) of an instance, cut for `reply` tokens to come, and how many of them may."""
        rotation, utterance = divmod(index, len(self.split))
        split = self.split
        persona = [split.ids(s) for s in split.strings("persona", split.dialogs[utterance])]
        if persona:
            rotation %= len(persona)
            persona = persona[len(persona) - rotation :] + persona[: len(persona) - rotation]
        history = [split.ids(s) for s in split.strings("history", utterance)[-self.n_history :]]
        persona, history, room = fit(persona, history, reply, self.limit)
        return build_prefix(persona, history, self.special_ids), room

    def lengths(self) -> np.ndarray:
        """Tokens of each utterance's longest row (prefix and longest candidate, of all) before anything is cut."""
        split, sizes = self.split, self.split.sizes
        history_offsets, history = split._lists["history"]
        first = np.maximum(history_offsets[1:] - self.n_history, history_offsets[:-1])
        return (
            3  # <bos>, the reply's speaker, <eos>
            + span_sums(sizes, *split._lists["persona"])[split.dialogs]
            + span_sums(sizes + 1, history_offsets, history, first)
            + span_maxima(sizes, *split._lists["candidates"])
        )

    def report_cuts(self, name: str) -> None:
        """Say once how many rows are too long for the model."""
        cut = int((self.lengths() > self.limit).sum())
        if cut:
            log.info(f"{name}: {cut} of {len(self.split)} utterances are longer than {self.limit} tokens and are cut")


def span_sums(
    sizes: np.ndarray, offsets: np.ndarray, numbers: np.ndarray, first: np.ndarray | None = None
) -> np.ndarray:
    """For each list of string numbers, from `first` (by default its start) on, the sum of the strings' sizes."""
    running = np.concatenate([[0], np.cumsum(sizes[numbers])])
    return running[offsets[1:]] - running[offsets[:-1] if first is None else first]


def span_maxima(sizes: np.ndarray, offsets: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """For each list of string numbers (none empty), the size of the largest string."""
    return np.maximum.reduceat(sizes[numbers], offsets[:-1]) if len(offsets) > 1 else np.zeros(0, np.int64)


@dataclass
class Batch:
    """Packed rows as tensors. B rows of T tokens: a prefix, then up to N candidates, then padding.

    A token of candidate n sees the prefix and candidate n; positions restart after the prefix. The gold reply is
    each row's last candidate.
    """

    input_ids: torch.Tensor  # (B, T)
    token_types: torch.Tensor  # (B, T) every token's speaker
    positions: torch.Tensor  # (B, T)
    segments: torch.Tensor  # (B, T) 0 prefix, n candidate n (from 1), -1 padding
    ends: torch.Tensor  # (B, N) where each candidate's <eos> stands; 0 where a row has fewer candidates
    n_candidates: torch.Tensor  # (B,)
    lm_positions: torch.Tensor  # (L,) positions, in the flattened (B * T), that predict a token of a gold reply
    lm_labels: torch.Tensor  # (L,) the tokens they predict: the gold replies and their <eos>
    extra_starts: torch.Tensor  # (B,) where each row's extra continuation begins, in the flattened (B * T); 0: none
    read: torch.Tensor  # (R,) positions, in the flattened (B * T), that are read: ends, lm_positions, all of the extras

    def prefix_ends(self) -> torch.Tensor:
        """(B,) where each row's prefix ends, in the flattened (B * T)."""
        rows = torch.arange(len(self.segments), device=self.segments.device)
        return rows * self.segments.shape[1] + (self.segments == 0).sum(1) - 1

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)))


def collate(instances: list[Instance], ids: SpecialIds) -> Batch:
    """Pack instances into a batch as wide as its longest row."""
    rows = [len(i.prefix) + sum(map(len, i.candidates)) + len(i.extra) for i in instances]
    shape = len(instances), max(rows)
    width = max(len(instance.candidates) for instance in instances)
    tokens, types = np.full(shape, ids.pad), np.full(shape, ids.pad)
    positions, segments = np.zeros(shape, np.int64), np.full(shape, -1)
    ends, extra_starts = np.zeros((len(instances), width), np.int64), np.zeros(len(instances), np.int64)
    lm_positions, lm_labels, read = [], [], []
    for row, instance in enumerate(instances):
        start = at = len(instance.prefix)
        tokens[row, :at], types[row, :at] = instance.prefix, instance.token_types
        positions[row, :at], segments[row, :at] = range(at), 0
        types[row, at : rows[row]] = ids.speaker1
        for n, continuation in enumerate([*instance.candidates, instance.extra]):
            span = slice(at, at + len(continuation))
            tokens[row, span], segments[row, span] = continuation, n + 1
            positions[row, span] = range(start, start + len(continuation))
            if n < len(instance.candidates):
                ends[row, n] = span.stop - 1
                read.append(row * shape[1] + span.stop - 1)
            elif instance.extra:
                extra_starts[row] = row * shape[1] + at
                read += range(row * shape[1] + at, row * shape[1] + span.stop)
            at = span.stop
        gold = instance.candidates[-1]  # its first token is predicted by the prefix's last, the next by the one before
        end = row * shape[1] + ends[row, len(instance.candidates) - 1]
        lm_positions += [row * shape[1] + start - 1, *range(end - len(gold) + 1, end)]
        lm_labels += gold
    counts = [len(instance.candidates) for instance in instances]
    read = sorted(read + lm_positions)
    columns = (tokens, types, positions, segments, ends, counts, lm_positions, lm_labels, extra_starts, read)
    return Batch(*map(torch.as_tensor, columns))


def batches_by_length(
    instances: Instances, batch_size: int, size: int | None = None, rank: int = 0, world: int = 1
) -> torch.utils.data.DataLoader:
    """The first `size` utterances of a split in batches of like length; for what does not depend on the order.

    Of `world` processes, `rank` gets its share of the batches; every utterance is in one of them.
    """
    order = np.argsort(instances.lengths()[:size], kind="stable").tolist()
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)][rank::world]
    collate_batch = partial(collate, ids=instances.special_ids)
    return torch.utils.data.DataLoader(instances, batch_sampler=batches, collate_fn=collate_batch)


# ------------------------------------------------------------------------------------------------------------
# Run folders
# ------------------------------------------------------------------------------------------------------------


RUNS = Path(__file__).resolve().parent / "runs"


def new_run_folder(model: str, runs: Path = RUNS, launchers: Iterable[str] = ()) -> Path:
    """Create `<runs>/<Mon><DD>_<HH-MM-SS>_<host>_<model>` under a name no other run has, and point `latest` to it.

    Args:
        launchers: names of the launchers that start its processes, for `run_of_launchers`.
    """
    runs = runs.resolve()
    short = re.sub(r"[^\w.-]+", "_", Path(urlsplit(model).path.rstrip("/")).name or "model")
    base = runs / f"{time.strftime('%b%d_%H-%M-%S')}_{socket.gethostname()}_{short}"
    make_folder(base.parent)
    for attempt in range(100):
        folder = base if attempt == 0 else base.with_name(f"{base.name}_{attempt}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"cannot create {folder}: {error.strerror}; pass another --runs_dir") from error
        with whole_files(folder) as partial:
            (partial / "launchers.txt").write_text("\n".join(sorted(launchers)), encoding="utf-8")
        point_latest_to(folder)
        return folder
    raise UserError(f"{base} exists a hundred times; remove some runs")


def point_latest_to(folder: Path) -> None:
    """Make `latest` beside a run folder a link to it, or a text file with its name where links are not possible."""
    partial = folder.with_name(f".latest-{folder.name}")
    try:
        try:
            partial.symlink_to(folder.name)
        except OSError:  # Windows, and file systems without links
            partial.write_text(folder.name, encoding="utf-8")
        os.replace(partial, folder.with_name("latest"))
    except OSError as error:
        raise UserError(f"cannot write {folder.parent}/latest: {error.strerror}; remove it") from error


def find_run(name: str) -> Path:
    """The run folder of that name, which may be `.../latest`. Raises UserError where train.py left none there."""
    folder = typed_path(name)
    try:
        if folder.is_file():
            folder = folder.parent / folder.read_text(encoding="utf-8").strip()
        folder = folder.resolve()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {folder}: {first_line(error)}; expected a run folder of train.py") from error
    if not (folder / "training_args.json").is_file():
        raise UserError(f"{folder} holds no training_args.json; expected a run folder of train.py, such as runs/latest")
    return folder


def launcher() -> str:
    """Names the torchrun agent that started this process, alike after an elastic restart; "" without one."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ""
    # An agent logs the errors of its processes in a folder of its own, <name>/attempt_<n>/<local rank>/error.json
    agent_folder = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", "")).parent.parent.parent
    return f"{socket.gethostname()}:{os.getppid()}:{agent_folder.name}"


def run_of_launchers(launchers: set[str], runs: Path) -> Path | None:
    """The run folder that one of these launchers has begun."""
    for path in runs.resolve().glob("*/launchers.txt") if launchers else ():
        if launchers & set(path.read_text(encoding="utf-8").splitlines()):
            return path.parent
    return None


def open_log(folder: Path, step: int) -> Callable[[dict], None]:
    """A function that adds a record, as a line of JSON, to `log.jsonl` in a run folder.

    Args:
        step: where the run goes on from. Lines are dropped that it will write again: those of later steps, and a
            validation after this one.
    """
    path = folder / "log.jsonl"

    def stands(line: bytes) -> bool:
        try:
            record = json.loads(line)
        except ValueError:  # cut short
            return False
        return record["step"] < step + ("loss" in record)

    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    with whole_files(folder) as partial:
        (partial / path.name).write_bytes(b"".join(filter(stands, lines)))

    def append(record: dict) -> None:
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise UserError(f"cannot write to {path}: {error.strerror}; free some space") from error

    return append
