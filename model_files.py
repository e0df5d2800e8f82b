"""A model by its name: a folder, file, URL, short name or hub id in, the files to load it from out.

A folder that is not whole is refused, with a line that says what it lacks.
"""

import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cli import UserError, explain_errors, log
from files import download, forget, is_url, typed_path, unpack
from options import Decoding, check_value
from smollm2 import fetch_smollm2

FINETUNED_URL = "https://s3.amazonaws.com/models.huggingface.co/transfer-learning-chatbot/gpt_personachat_cache.tar.gz"
HUB_NAMES = {"openai-gpt": "openai-community/openai-gpt", "gpt2": "openai-community/gpt2"}

TENSORS = re.compile(r"\.(safetensors|bin|pt|pth|ckpt)$")
# Files that end like weights but are none: what trainers and this toolkit leave beside them.
NO_WEIGHTS = re.compile(
    r"multiple_choice_head|training_args|optimizer|scheduler|scaler|rng_state|adapter_model|dataset_cache"
)
# transformers' own names, which need no guess.
USUAL = re.compile(r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?")
# What may lie beside a config.json from which a model is made from scratch: texts that are surely no weights.
TEXTS = re.compile(
    r"^(\.|README|NOTICE|LICEN[CS]E)|\.(json|jsonl|txt|csv|log|md|py|ya?ml|png|svg|jinja|model|bpe|spm|vocab|tiktoken)$"
)
# What to do with weights that are not read here, by their names; the first that fits.
INSTEAD = {
    r"^adapter_model": "an adapter needs its base; merge the two, as peft's merge_and_unload does, and save the result",
    r"\.gguf$": "pass that file itself as --model",
    r"\.(h5|msgpack)$|\.ckpt\b": "convert it to safetensors, as transformers 4 does (from_tf=True or from_flax=True)",
    r"": "expected safetensors or a state dict of torch; to train from scratch nothing but config.json and a tokenizer",
}
TOKENIZER = re.compile(
    r"(tokenizer|tokenizer_config|encoder.*)\.json|(tokenizer|spiece)\.model|merges\.txt|vocab\..*|vocab.*\.bpe"
)
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # peft's names
ADAPTER = "adapter"  # the folder with these in a run folder
# The multiple-choice head, where the rest is a plain model: other engines refuse tensors that they do not know.
HEAD_WEIGHTS = "multiple_choice_head.safetensors"


@dataclass
class ModelFiles:
    """A model on this machine: a folder, and the name of the .gguf file in it if it is one.

    Attributes:
        adapters: folders of peft's adapters, to be merged into it one after the other.
    """

    folder: Path
    gguf: str | None = None
    adapters: tuple[Path, ...] = ()

    @property
    def weights(self) -> list[Path]:
        """The files of the weights; none where there are none. Raises UserError as `find_weights` does."""
        if self.gguf:
            return [self.folder / self.gguf]
        weights = find_weights(self.folder)
        head = self.folder / HEAD_WEIGHTS
        if weights and head.exists():
            weights.append(head)
        return weights

    @property
    def has_tokenizer(self) -> bool:
        return bool(self.gguf) or any(TOKENIZER.fullmatch(name) for name in os.listdir(self.folder))

    @property
    def tokenizer_folder(self) -> Path:
        """The newest adapter's, where it has a tokenizer: it may have tokens that the base has not."""
        for folder in reversed(self.adapters):
            if (folder / "tokenizer_config.json").exists():
                return folder
        return self.folder

    @property
    def openai_vocabulary(self) -> dict[str, str]:
        """The files of a BPE vocabulary under OpenAI's own names, by transformers' arguments for them."""
        files = {}
        for argument, pattern in (("vocab_file", "encoder*.json"), ("merges_file", "vocab*.bpe")):
            for path in self.folder.glob(pattern):
                files[argument] = str(path)
        return files


def find_weights(folder: Path) -> list[Path]:
    """The files of a folder that hold a model's weights: one, or all shards. transformers' own names go first.

    Raises:
        UserError: shards are missing, a file is a Git LFS pointer, or several files may be the ones.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    usual = [name for name in names if USUAL.fullmatch(name)]
    found = usual or [name for name in names if TENSORS.search(name) and not NO_WEIGHTS.search(name)]
    if not found:
        return []
    sets = {shards(folder / name) for name in found}
    whole = [files for files in sets if files.issubset(names)]
    if not whole:
        files = min(sets, key=sorted)
        missing = sorted(files.difference(names))
        raise UserError(
            f"{folder} lacks {len(missing)} of the {len(files)} files of its weights, such as {missing[0]}; "
            "copy them into it, or fetch the model again"
        )
    if len(whole) > 1 and not usual:
        raise UserError(
            f"{folder} holds weights in {len(whole)} files, such as {found[0]} and {found[-1]}; "
            "rename the one to use to pytorch_model.bin"
        )
    # safetensors before pickles, one file before shards
    best = min(whole, key=lambda files: (min(files).endswith(".bin"), len(files)))
    paths = [folder / name for name in sorted(best)]
    for path in paths:
        refuse_pointer(path)
    return paths


def shards(path: Path) -> frozenset[str]:
    """The names of all files that belong together with this one, or that this one names as an index."""
    if path.name.endswith(".index.json"):
        with explain_errors(f"cannot read {path}", "expected an index of transformers"):
            index = json.loads(path.read_text(encoding="utf-8"))
            names = frozenset(index["weight_map"].values())
            if {type(name) for name in names} != {str}:
                raise ValueError("it names no files")
            return names
    numbered = re.fullmatch(r"(.+)-\d{5}-of-(\d{5})(\.\w+)", path.name)
    if not numbered:
        return frozenset([path.name])
    start, count, end = numbered.groups()
    all_shards = [f"{start}-{number:05}-of-{count}{end}" for number in range(1, int(count) + 1)]
    return frozenset([path.name, *all_shards])


def refuse_pointer(path: Path) -> None:
    """Raise UserError where a file is the text that Git leaves in the place of a large one."""
    with explain_errors(f"cannot read {path}", "choose a model that you can read", OSError), open(path, "rb") as file:
        if file.read(24) == b"version https://git-lfs.":
            raise UserError(f"{path} is a Git LFS pointer, not the file itself; run git lfs pull in {path.parent}")


def check_folder(folder: Path) -> ModelFiles:
    """The files of a model's folder; of a run with an adapter alone, those of the adapter's folder.

    Raises:
        UserError: it holds no configuration, or no weights that are read here but something that may be weights.
    """
    if is_adapter(folder):
        return ModelFiles(folder)
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} holds no config.json; expected a model folder, such as one that train.py wrote")
    contents = sorted(folder.iterdir())
    for path in contents:
        if path.suffix in (".json", ".txt", ".model", ".bpe"):
            refuse_pointer(path)
    if find_weights(folder):
        return ModelFiles(folder)
    if is_adapter(folder / ADAPTER):  # a run of train.py --lora_save adapter
        return ModelFiles(folder / ADAPTER)
    if (folder / "training_args.json").exists():
        reason = "as before a run's first evaluation"
        raise UserError(f"{folder} holds no weights, {reason}; go on with it: python train.py --resume {folder}")
    # A model is made from scratch only where nothing else is there that may be its weights.
    for path in contents:
        if not TEXTS.search(path.name):
            advice = [text for pattern, text in INSTEAD.items() if re.search(pattern, path.name)]
            raise UserError(f"{folder} holds no weights that are read here, but {path.name}; {advice[0]}")
    return ModelFiles(folder)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter of peft's and no model."""
    return (folder / ADAPTER_CONFIG).exists() and not find_weights(folder)


def base_of(folder: Path) -> str:
    """The name of the model that an adapter is to be merged into. Raises UserError where its configuration has none."""
    path = folder / ADAPTER_CONFIG
    with explain_errors(f"cannot read {path}", "expected peft's JSON, with the name of a base model"):
        config = json.loads(path.read_text(encoding="utf-8"))
        base = config["base_model_name_or_path"]
        if not isinstance(base, str) or not base:
            raise ValueError(f"the base is {base!r}")
    if revision := config.get("revision"):
        log.warning(f"warning: {path}: not read: the revision {revision!r} of the base; its newest one is taken")
    return base


def lasting_name(name: str) -> str:
    """A model's name by which it is found from any working folder, and later on: `latest` moves."""
    path = typed_path(name)
    if is_url(name) or not os.path.exists(path):
        return HUB_NAMES.get(name, name)
    return str(find_run(name) if path.name == "latest" else path.resolve())


def find_finetuned_model(name: str) -> ModelFiles:
    """As `find_model`, for talking and evaluating: there openai-gpt is the published model fine-tuned from it."""
    if name != "openai-gpt":
        return find_model(name)
    instead = "pass --model a local folder or file, such as data/smollm2-persona, a model that comes with the toolkit"
    return find_model_in_file(download(FINETUNED_URL, instead))


# Options that have another name in transformers' generation config.
DECODING_NAMES = {"max_new_tokens": "max_length", "no_repeat_ngram_size": "no_repeat_ngram"}


def decoding_defaults(files: ModelFiles) -> dict[str, Any]:
    """How a model's replies are drawn where nobody asks for another way: options of `Decoding` by name.

    Raises UserError where its generation config is not transformers' JSON, or has a value that no option takes.
    """
    path = files.tokenizer_folder / "generation_config.json"
    if files.gguf or not path.exists():
        return {}
    with explain_errors(f"cannot read {path}", "expected a generation config of transformers"):
        config = json.loads(path.read_text(encoding="utf-8"))
        config = {DECODING_NAMES.get(name, name): value for name, value in config.items()}
    options = Decoding.options()
    defaults = {name: config[name] for name in options if config.get(name) is not None}
    for name, value in defaults.items():
        check_value(options[name], value, f"{path}: ")
    return defaults


# Names that nobody means for the hub: ./x, ~/x, a/b/c, x/, a\b, x.gguf, x.tar.gz.
LIKE_A_PATH = re.compile(r"^[./~]|/.*/|/$|\\|\.gguf$|\.gz$")


def find_model(name: str) -> ModelFiles:
    """The files of a model given by folder, .gguf or .tar.gz file, URL of one, short name or hub id.

    An adapter's are those of its base, which may be an adapter too. Raises UserError where there is no such model, or
    where it cannot be fetched.
    """
    files, adapters = find_files(name), ()
    while not files.gguf and is_adapter(files.folder):
        path = files.folder / ADAPTER_CONFIG
        if files.folder in adapters:
            raise UserError(f"the base that {path} names is an adapter of this one; expected a model")
        adapters = (files.folder, *adapters)
        base = base_of(files.folder)
        try:
            files = find_files(base)
        except UserError as error:
            raise UserError(f"the base that {path} names: {error}") from error
    return replace(files, adapters=adapters)


def find_files(name: str) -> ModelFiles:
    """As `find_model`, but of an adapter its own files."""
    path = download(name, "pass --model a local folder or file") if is_url(name) else typed_path(name)
    if os.path.isfile(path):  # pathlib's own raises for names that are too long
        return find_model_in_file(path)
    if os.path.isdir(path):
        return check_folder(path)
    if name == "smollm2":
        return check_folder(fetch_smollm2())
    if LIKE_A_PATH.search(name):
        raise UserError(f"no such model: {name}; expected a folder, a .tar.gz or .gguf file, a URL or a hub id")
    return check_folder(fetch_from_hub(HUB_NAMES.get(name, name)))


def find_model_in_file(path: Path) -> ModelFiles:
    """As `find_files`, of a file: it is told apart by its first bytes, not by its name."""
    refuse_pointer(path)
    with open(path, "rb") as file:
        magic = file.read(4)
    if magic == b"GGUF":
        return ModelFiles(path.parent, gguf=path.name)
    if magic[:2] == b"\x1f\x8b":
        return check_folder(unpack(path))
    if path.name == "latest":  # a text file, where links are not possible
        return find_files(str(find_run(str(path))))
    forget(path)
    raise UserError(f"{path} is neither a .gguf nor a .tar.gz file; expected one of these or a model folder")


def fetch_from_hub(repo: str) -> Path:
    """A snapshot of a hub repository's config, tokenizer and weights (safetensors, or .bin where there are none)."""
    from huggingface_hub import snapshot_download  # heavy: only where something is fetched

    wanted = ["*.json", "*.txt", "*.model", "*.jinja", "*.safetensors"]
    # The hub's errors have many types, as the network's.
    with explain_errors(f"cannot fetch '{repo}' from the hub", "pass --model a local folder"):
        folder = Path(snapshot_download(repo, allow_patterns=wanted, ignore_patterns=["*/*"]))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(repo, allow_patterns=["pytorch_model*.bin"])
            if not any(folder.glob("pytorch_model*.bin")):
                raise UserError(f"'{repo}' has neither safetensors nor pytorch_model.bin on the hub; use another model")
    return folder


def find_run(name: str) -> Path:
    """The run folder of that name, which may be `.../latest`. Raises UserError where train.py left none there."""
    folder = typed_path(name)
    kinds = OSError, ValueError, RuntimeError  # a loop of links, a name that is too long or holds a NUL, bytes
    with explain_errors(f"cannot read {folder}", "expected a run folder of train.py", *kinds):
        if folder.is_file():
            folder = folder.parent / folder.read_text(encoding="utf-8").strip()
        folder = folder.resolve()
        begun = (folder / "training_args.json").is_file()
    if not begun:
        raise UserError(f"{folder} holds no training_args.json; expected a run folder of train.py, such as runs/latest")
    return folder
