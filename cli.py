"""What people type and are told: options, errors, exit status, joining the process group."""

import argparse
import gc
import logging
import os
import pickle
import random
import re
import sys
import textwrap
import warnings
from collections.abc import Callable
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

log = logging.getLogger("improvedflend")


# ------------------------------------------------------------------------------------------------------------
# Errors and exit status
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


# Control characters, and those that turn the direction of writing around; white space stays.
UNPRINTABLE = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Text that cannot command a terminal: without control characters."""
    return UNPRINTABLE.sub("", text)


# ------------------------------------------------------------------------------------------------------------
# Options
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
