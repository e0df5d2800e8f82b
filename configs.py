"""A model's configuration: read, and refused where no model can be made of it."""

import base64
import json
import math
import os
import re
from pathlib import Path

import msgspec

from cli import UserError, explain_errors
from model_files import ModelFiles
from records import NO_JSON


def load_config_dict(files: ModelFiles) -> dict:
    """A folder's config.json; `model_type`, which those of 2019 lack, is inferred."""
    path = files.folder / "config.json"
    with explain_errors(f"cannot read {path}", "expected a model's configuration in JSON", OSError, *NO_JSON):
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not a JSON object")
    config.pop("return_dict", None)  # false would give tuples, where the code reads objects
    if "model_type" not in config:
        # afn is openai-gpt's name of its activation function; GPT-2 has no such key
        config["model_type"] = "openai-gpt" if "afn" in config else "gpt2"
    return config


def load_config(files: ModelFiles):
    """The transformers configuration of a model folder."""
    from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

    config = load_config_dict(files)
    path = files.folder / "config.json"
    if str(config["model_type"]) not in CONFIG_MAPPING:
        own = ""
        if "auto_map" in config:
            own = " and asks for code of its own (auto_map), which is never run"
        raise UserError(
            f"{path} names the model type '{config['model_type']}', which transformers does not "
            f"know{own}; use another model, such as gpt2"
        )
    # transformers raises many types for a configuration it cannot use.
    with explain_errors(str(path), "expected a configuration of transformers"):
        loaded = AutoConfig.for_model(**config)
        for name in config:
            if callable(getattr(type(loaded), name, None)):
                raise ValueError(f"{name} is no setting")
        text = loaded.get_text_config()
        if not isinstance(text, PreTrainedConfig):
            raise ValueError(f"its text_config is a {type(text).__name__}")
    check_sizes(text, path)
    return loaded


# Larger than in any model.
MOST = {"num_hidden_layers": 10**4, "num_attention_heads": 10**4, "hidden_size": 10**6, "vocab_size": 10**8}


def check_sizes(config, path: Path) -> None:
    """Refuse sizes of which no model can be made, before it is tried: it would take hours, or all of the memory."""
    sizes = []
    for name, most in MOST.items():
        size = getattr(config, name, None)
        if type(size) is not int:
            continue
        if not 1 <= size <= most:
            raise UserError(f"{path}: {config.attribute_map.get(name, name)} is {size}; expected 1 to {most}")
        sizes.append(size)
    if len(sizes) < len(MOST) or not hasattr(os, "sysconf"):
        return
    layers, _, width, vocabulary = sizes
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    if type(inner) is not int or inner < 1:
        inner = 4 * width
    # At least: in each layer two square matrices of attention and two of the feed-forward part, in float32.
    parameters = layers * 2 * width * (width + inner) + vocabulary * width
    needed = 4 * parameters  # bytes
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise UserError(
            f"{path}: a model of these sizes takes at least {needed / 2**30:.0f} GB, and this machine has "
            f"{memory / 2**30:.0f}; use a smaller one"
        )


# ------------------------------------------------------------------------------------------------------------
# What a tokenizer does with text
# ------------------------------------------------------------------------------------------------------------

MOST_GROWTH = 10_000  # times; those of pretrained models are at 1 to 18
CHARACTERS_OF_ONE = {"Precompiled": 18, "ByteLevel": 4}  # at most: of Unicode's U+FDFA, and of bytes as characters


class TokenizerRules(msgspec.Struct):
    """The parts of a tokenizer.json that change text."""

    normalizer: dict | None = None
    pre_tokenizer: dict | None = None
    decoder: dict | None = None


def check_rules(path: Path) -> None:
    """Refuse a tokenizer.json whose rules would end the process, before the library reads it.

    They make a text longer, one after the other, until there is no memory; or hold a table of characters that is cut
    off. Raises ValueError where there are such rules, and other types where the file cannot be read.
    """
    if not path.exists():
        return
    rules = msgspec.json.decode(path.read_bytes(), type=TokenizerRules)
    for rule in (rules.normalizer, rules.pre_tokenizer, rules.decoder):
        if rule and growth(rule) > MOST_GROWTH:
            raise ValueError(f"its rules can make a text more than {MOST_GROWTH} times as long")


def growth(rule: dict) -> float:
    """How many times as long a text becomes at most by a rule, or by several that come one after the other."""
    for name in ("normalizers", "pretokenizers", "decoders"):
        if name in rule:
            return math.prod(map(growth, rule[name]))
    if rule["type"] == "Replace":
        return replacement_growth(rule["pattern"], len(rule["content"]))
    if rule["type"] == "Precompiled":
        table = base64.b64decode(rule["precompiled_charsmap"])
        size = int.from_bytes(table[:4], "little")  # of what comes next
        if len(table) < 4 + size:
            raise ValueError("its table of characters is cut off")
    return CHARACTERS_OF_ONE.get(rule["type"], 1 + len(rule.get("prepend", "")))


def replacement_growth(pattern: dict[str, str], size: int) -> float:
    """As `growth`, where `size` characters replace what a pattern matches."""
    if pattern.get("String"):
        return max(1, size / len(pattern["String"]))
    try:
        between_characters = re.search(pattern.get("Regex", ""), "") is not None
    except re.error:  # the library's patterns are not quite Python's
        between_characters = True
    return max(1, size + between_characters)
