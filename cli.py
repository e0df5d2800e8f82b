"""What people type and are told: options, errors, exit status, joining the process group."""

import argparse
import contextlib
import gc
import logging
import math
import os
import pickle
import re
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from dataclasses import Field, dataclass, field, fields, replace
from datetime import timedelta
from functools import partial
from types import NoneType
from typing import Self, get_args, get_origin

import torch
import torch.distributed as dist

log = logging.getLogger("improvedflend")


# ------------------------------------------------------------------------------------------------------------
# Errors and exit status
# ------------------------------------------------------------------------------------------------------------


class UserError(Exception):
    """Something the user can mend. The message says what is wrong, what was expected and what to do."""


@contextlib.contextmanager
def explain_errors(failure: str, advice: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn an error of the body into one line for the user: "failure: why; advice".

    Args:
        failure: what could not be done, and with what: "cannot read x.json".
        advice: what was expected, or what to do.
        kinds: the exceptions to explain, by default all. A `UserError` says enough and passes.
    """
    kinds = kinds or (Exception,)
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        raise UserError(f"{failure}: {first_line(error)}; {advice}") from error


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
    """Shorten an exception to one line: its first line, joined with the next if it ends in a colon.

    An empty one is its type's name. An OSError is its reason alone: whoever reports it names the file.
    """
    if isinstance(error, pickle.UnpicklingError):  # torch's own text tells how to run what it refused to run
        return "its pickle is damaged, or holds more than tensors, such as code to run"
    text = getattr(error, "strerror", None) or str(error)
    line = re.match(r"(.*:\s*\n)*.*", text.strip())[0]
    return textwrap.shorten(line, 300, placeholder=" ...") or type(error).__name__


# Control characters, and those that turn the direction of writing around; white space stays.
UNPRINTABLE = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Text that cannot command a terminal: without control characters."""
    return UNPRINTABLE.sub("", text)


# ------------------------------------------------------------------------------------------------------------
# What an option is
# ------------------------------------------------------------------------------------------------------------

LARGEST = 2**31 - 1  # more than any option makes sense with, and what every library's integers hold


def option(
    default,
    help: str,
    low: float = -LARGEST,
    high: float = LARGEST,
    choices: tuple[str, ...] = (),
    aliases: tuple[str, ...] = (),
    slider: tuple[float, float, float] | None = None,
    may_change: bool = False,
):
    """A field of a `Settings` class: all there is to know of an option, declared once.

    Args:
        help: what it means, with its unit.
        low, high: bounds of a number, both included.
        choices: the values that a text may have.
        aliases: further names on the command line.
        slider: lowest value, highest value and step of its slider on the chat page.
        may_change: a resumed run takes another value than it was started with.
    """
    about = locals()
    del about["default"]
    return field(default=default, metadata=about)


def kind_of(option: Field) -> type:
    """bool, int, float, str or list: the type that an option's annotation names, `None` left out."""
    kind = next((kind for kind in get_args(option.type) if kind is not NoneType), option.type)
    return get_origin(kind) or kind


def expected(option: Field, value) -> str:
    """The values that an option takes, in words, of which `value` is none."""
    kind, low, high = kind_of(option), option.metadata["low"], option.metadata["high"]
    if kind is bool:
        return "on or off"
    if kind not in (int, float):
        return f"one of {', '.join(filter(None, option.metadata['choices']))}" if option.metadata["choices"] else "text"
    bounds = [f"at least {low}"] * (low > -LARGEST) + [f"at most {high}"] * (
        high < LARGEST or (type(value) in (int, float) and value > high)
    )
    number = "a whole number" if kind is int else "a number"
    return f"{number} of {' and '.join(bounds)}" if bounds else number


def accepts(option: Field, value) -> bool:
    """Whether an option takes `value`, of which JSON or a caller may have made any type."""
    kind = kind_of(option)
    if value is None:
        return option.default is None
    if kind in (int, float):  # True counts as a whole number in Python; nan is outside of all bounds
        return type(value) in (int, kind) and option.metadata["low"] <= value <= option.metadata["high"]
    return isinstance(value, kind) and (not option.metadata["choices"] or value in option.metadata["choices"])


def parse_value(option: Field, text: str):
    """The value of an option from what was typed.

    Raises:
        ArgumentTypeError: the option has no such value. argparse prints its text, which says what was expected.
    """
    kind = kind_of(option)
    try:
        value = {"on": True, "true": True, "off": False, "false": False}[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        value = math.nan
    if not accepts(option, value):
        raise argparse.ArgumentTypeError(f"expected {expected(option, value)}, found '{text}'")
    return value


@dataclass(frozen=True)
class Settings:
    """Options, declared as the fields of a subclass. Values are checked wherever they come from."""

    def __post_init__(self):
        for name, option in self.options().items():
            value = getattr(self, name)
            if not accepts(option, value):
                raise UserError(f"{name}: expected {expected(option, value)}, found {value!r}")

    @classmethod
    def options(cls) -> dict[str, Field]:
        """The fields that are options, by name."""
        return {field.name: field for field in fields(cls) if field.metadata}

    @classmethod
    def add_to(cls, parser: argparse.ArgumentParser) -> None:
        """Let `parser` read these options. --help shows them as a group, headed by the class's first line."""
        group = parser.add_argument_group(cls.__doc__.split("\n")[0].rstrip("."))
        for name, option in cls.options().items():
            kind = kind_of(option)
            if kind is bool and option.default is None:  # as it is by itself, on or off
                group.add_argument(f"--no_{name}", dest=name, action="store_false", default=None, help="the opposite")
            how = {
                bool: {"action": "store_true"},
                list: {"action": "append"},
            }.get(kind, {"type": partial(parse_value, option), "choices": option.metadata["choices"] or None})
            names = [f"--{each}" for each in (name, *option.metadata["aliases"])]
            group.add_argument(*names, default=option.default, help=option.metadata["help"], **how)

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Self:
        """The settings that a parser read. args: may hold the options of other classes too."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in vars(args).items() if name in known})

    def changed(self, name: str, text: str) -> Self:
        """These settings with the option `name` set to what a user typed.

        Raises:
            UserError: there is no such option, or it has no such value.
        """
        options = self.options()
        if name not in options:
            raise UserError(f"no option '{name}'; there are {', '.join(options)}")
        try:
            return replace(self, **{name: parse_value(options[name], text)})
        except argparse.ArgumentTypeError as error:
            raise UserError(f"{name}: {error}") from error


class Parser(argparse.ArgumentParser):
    """An argument parser that shows every default and reports a mistake in one line."""

    def __init__(self, description: str, *settings: type[Settings]):
        super().__init__(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        for each in settings:
            each.add_to(self)

    def error(self, message: str):
        print(f"error: {message} (see: python {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


# ------------------------------------------------------------------------------------------------------------
# Options of more than one script
# ------------------------------------------------------------------------------------------------------------


BF16 = option(False, "compute in bfloat16; weights that are trained stay in float32")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MAX_HISTORY = 2  # exchanges, as published
RERANK = ("mc", "lm", "both")  # how the best of several replies is chosen


@dataclass(frozen=True)
class CommonSettings(Settings):
    """Options of all three scripts."""

    model: str = option(
        "openai-gpt", "short name, hub id, folder, .tar.gz, .gguf, or URL of one", aliases=("model_checkpoint",)
    )
    pre_tokenizer: str | None = option(
        None, "how openai-gpt's text is cut into words; default: as its folder says", choices=("spacy", "basic")
    )
    dataset_path: str = option("", "path or URL of a dataset; empty: download PersonaChat", may_change=True)
    dataset_cache: str = option("./dataset_cache.bin", "where the tokenised dataset is kept", may_change=True)
    max_history: int | None = option(
        None,
        f"exchanges of history to keep; -1: the whole dialog; default: {MAX_HISTORY} in training, then as in training",
        low=-1,
    )
    device: str = option(DEVICE, "cuda, cuda:1, cpu or mps", may_change=True)
    bf16: bool = BF16
    seed: int = option(42, "of everything random; in a chat 0 is another one each time", low=0)


@dataclass(frozen=True)
class DatasetSettings(CommonSettings):
    """Options of the scripts that read a whole dataset, in one process or many."""

    valid_path: str = option("", "path or URL of the validation data, if --dataset_path has none", may_change=True)
    local_rank: int = option(-1, "set by launchers", aliases=("local-rank",), may_change=True)


@dataclass(frozen=True)
class Decoding(Settings):
    """How a reply is drawn."""

    no_sample: bool = option(False, "greedy decoding: always the likeliest token")
    num_beams: int = option(1, "above 1: beam search, of so many beams; nothing is drawn", 1, 64, slider=(1, 16, 1))
    length_penalty: float = option(
        1.0, "a beam's log-likelihood is divided by length to this power", low=-10.0, high=10.0, slider=(-1, 2, 0.1)
    )
    max_length: int = option(20, "longest reply, in tokens", low=1, slider=(1, 200, 1))
    min_length: int = option(1, "shortest reply, in tokens", low=0)
    temperature: float = option(0.7, "below 1 sharpens, above 1 flattens", low=1e-6, slider=(0.05, 2, 0.05))
    top_k: int = option(0, "sample among the k likeliest tokens (<= 0: off)", slider=(0, 200, 1))
    top_p: float = option(0.9, "sample in the nucleus of this probability (<= 0: off)", high=1.0, slider=(0, 1, 0.01))
    min_p: float = option(
        0.0,
        "drop tokens less likely than this share of the likeliest (0: off)",
        low=0.0,
        high=1.0,
        slider=(0, 0.5, 0.01),
    )
    n_replies: int = option(1, "draw this many replies and give the best", low=1, high=64, slider=(1, 16, 1))
    rerank: str = option("both", "best by the head, by likelihood per token, or by their sum", choices=RERANK)
    no_repeat_ngram: int = option(0, "never repeat so many tokens of what was said (0: off)", low=0, slider=(0, 8, 1))
    repetition_penalty: float = option(
        1.0, "above 1: tokens of what was said are less likely", low=1.0, high=10.0, slider=(1, 2, 0.05)
    )

    def __post_init__(self):
        super().__post_init__()
        if self.num_beams > 1:
            if self.n_replies > self.num_beams:
                raise UserError(
                    f"n_replies {self.n_replies} with num_beams {self.num_beams}: a beam search ends with a reply for "
                    "each beam; lower the one or raise the other"
                )
        elif self.no_sample and self.n_replies > 1:
            raise UserError(f"n_replies {self.n_replies} with no_sample would be the same reply each time; drop one")


# ------------------------------------------------------------------------------------------------------------
# Processes: one, or those that torchrun started
# ------------------------------------------------------------------------------------------------------------


def check_device(name: str) -> torch.device:
    """The device of that name, tried out so that a missing one is a clear line and not a late traceback."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"--device {name} cannot be used here: {first_line(error)}; try --device cpu") from error
    return device


def launched_rank(local_rank: int) -> int | None:
    """This process's number on its machine, from the launcher's environment or --local_rank; None without a launcher.

    Raises:
        UserError: a rank is given, but not the rest of what a launcher sets.
    """
    environment = dict(os.environ)
    if local_rank != -1:
        environment["LOCAL_RANK"] = str(local_rank)
    if not environment.keys() & {"LOCAL_RANK", "RANK"}:
        return None
    needed = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if not environment.get(name)]
    if missing:
        raise UserError(
            f"a rank is given but not {', '.join(missing)}, which a launcher sets in the environment; "
            "start with torchrun --nproc_per_node=N before the script, or without any rank for one process"
        )
    os.environ["LOCAL_RANK"] = environment["LOCAL_RANK"]
    return int(environment["LOCAL_RANK"])


def join_processes(device_name: str, local_rank: int) -> torch.device:
    """Join the process group that a launcher described in the environment, if one did; this process's device."""
    device, local_rank = check_device(device_name), launched_rank(local_rank)
    if local_rank is None:
        return device
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if device.index is not None or local_rank >= count:
            raise UserError(
                f"--device {device_name} with a process of local rank {local_rank} on a machine of {count} GPUs; "
                "each process needs a GPU of its own: start as many as there are, with --device cuda"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    # The timeout must allow for a download; a process that dies is noticed by torchrun, or by its closed sockets.
    timeout = timedelta(minutes=30)
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    # torchrun's store outlives a restart of the processes. Without a prefix of their own they would read what the
    # processes before them wrote.
    store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    if rank != 0:
        log.setLevel(logging.ERROR)
    return device
