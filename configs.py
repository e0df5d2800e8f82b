"""A model's configuration: read, and refused where no model can be made of it."""

import json
import os
from pathlib import Path

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
    from transformers import CONFIG_MAPPING, AutoConfig

    config = load_config_dict(files)
    path = files.folder / "config.json"
    if str(config["model_type"]) not in CONFIG_MAPPING:
        own = " and asks for code of its own (auto_map), which is never run" if "auto_map" in config else ""
        raise UserError(
            f"{path} names the model type '{config['model_type']}', which transformers does not "
            f"know{own}; use another model, such as gpt2"
        )
    # transformers raises many types for a configuration it cannot use.
    with explain_errors(str(path), "expected a configuration of transformers"):
        loaded = AutoConfig.for_model(**config)
    check_sizes(loaded.get_text_config(), path)
    return loaded


# More than any model has; what is below is tried, and then fits into memory or not.
MOST = {"num_hidden_layers": 10**4, "num_attention_heads": 10**4, "hidden_size": 10**6, "vocab_size": 10**8}


def check_sizes(config, path: Path) -> None:
    """Refuse sizes of which no model can be made, before it is tried: it would take hours, or all of the memory."""
    sizes = {name: getattr(config, name, None) for name in MOST}
    sizes = {name: size for name, size in sizes.items() if type(size) is int}
    for name, size in sizes.items():
        if not 1 <= size <= MOST[name]:
            raise UserError(f"{path}: {config.attribute_map.get(name, name)} is {size}; expected 1 to {MOST[name]}")
    if len(sizes) < len(MOST) or not hasattr(os, "sysconf"):
        return
    # At least: two square matrices of attention and two of the feed-forward layer, in float32.
    width, inner = sizes["hidden_size"], getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    inner = inner if type(inner) is int and inner > 0 else 4 * width
    layers = 2 * sizes["num_hidden_layers"] * width * (width + inner)
    needed, there = 4 * (layers + sizes["vocab_size"] * width), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise UserError(
            f"{path}: a model of these sizes takes at least {needed / 2**30:.0f} GB, and this machine has "
            f"{there / 2**30:.0f}; use a smaller one"
        )
