"""Every option, declared once: default, bounds, unit, help. The command line, /set and the sliders come of it."""

import argparse
import math
import sys
from dataclasses import Field, dataclass, field, fields, replace
from functools import partial
from types import NoneType
from typing import Self, get_args, get_origin

import torch

from cli import UserError

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
    kind, about = kind_of(option), option.metadata
    if kind is bool:
        return "on or off"
    if kind not in (int, float):
        choices = ", ".join(filter(None, about["choices"]))
        return f"one of {choices}" if choices else "text"
    bounds = []
    if about["low"] > -LARGEST:
        bounds.append(f"at least {about['low']}")
    if about["high"] < LARGEST or (type(value) in (int, float) and value > LARGEST):
        bounds.append(f"at most {about['high']}")
    number = "a whole number" if kind is int else "a number"
    return f"{number} of {' and '.join(bounds)}" if bounds else number


def accepts(option: Field, value) -> bool:
    """Whether an option takes `value`, of which JSON or a caller may have made any type."""
    kind, about = kind_of(option), option.metadata
    if value is None:
        return option.default is None
    if kind in (int, float):  # True counts as a whole number in Python; nan is outside of all bounds
        return type(value) in (int, kind) and about["low"] <= value <= about["high"]
    return isinstance(value, kind) and (not about["choices"] or value in about["choices"])


SWITCH = {"on": True, "true": True, "off": False, "false": False}  # what people type for a bool


def check_value(option: Field, value, place: str = "") -> None:
    """Raise UserError where an option does not take `value`. place: where it was read, to begin the message with."""
    if not accepts(option, value):
        raise UserError(f"{place}{option.name}: expected {expected(option, value)}, found {value!r}")


def parse_value(option: Field, text: str):
    """The value of an option from what was typed.

    Raises:
        ArgumentTypeError: the option has no such value. argparse prints its text, which says what was expected.
    """
    kind = kind_of(option)
    try:
        value = SWITCH[text.lower()] if kind is bool else kind(text)
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
            check_value(option, getattr(self, name))

    @classmethod
    def options(cls) -> dict[str, Field]:
        """The fields that are options, by name."""
        return {field.name: field for field in fields(cls) if field.metadata}

    @classmethod
    def add_to(cls, parser: argparse.ArgumentParser) -> None:
        """Let `parser` read these options. --help shows them as a group, headed by the class's first line."""
        group = parser.add_argument_group(cls.__doc__.split("\n")[0].rstrip("."))
        for name, option in cls.options().items():
            kind, about = kind_of(option), option.metadata
            if kind is bool:
                how = {"action": "store_true"}
                if option.default is None:  # without either it is as the other options have it
                    opposite = {"dest": name, "action": "store_false", "default": None}
                    group.add_argument(f"--no_{name}", **opposite, help="the opposite")
            elif kind is list:
                how = {"action": "append"}
            else:
                how = {"type": partial(parse_value, option), "choices": about["choices"] or None}
            names = [f"--{each}" for each in (name, *about["aliases"])]
            group.add_argument(*names, default=option.default, help=about["help"], **how)

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
