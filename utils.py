"""From dialogs to tokens: the tokeniser, and the tokenised dataset with its cache."""

import hashlib
import json
import mmap
import os
import re
import time
import zlib
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from tqdm import tqdm

from cli import UserError, first_line, log, printable
from dialogs import FORMATS, NO_JSON, SPLIT_SEED, Dialog, dataset_file, file_digest, split_dialogs
from files import ModelFiles, lock, typed_path, whole_files

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


# ------------------------------------------------------------------------------------------------------------
# The dataset cache: tokens, texts and who says what, in one file
# ------------------------------------------------------------------------------------------------------------


CACHE_VERSION = 1
N_DISTRACTORS = 19  # sampled where a reply comes without candidates, as many as ConvAI2 gives


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
