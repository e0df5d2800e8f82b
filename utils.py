"""From dialogs to tokens: the tokeniser, and the tokenised dataset with its cache."""

import hashlib
import json
import os
import time
import zlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cli import UserError, explain_errors, first_line, log, printable
from configs import check_rules, load_config, load_config_dict
from dialogs import Dialogs
from files import lock, remove_unfinished, typed_path, whole_files
from model_files import ModelFiles
from options import MAX_HISTORY, CommonSettings, check_value
from progress import progress_bar
from records import FORMATS
from splits import LISTS, Ragged, Split, Views, ragged, ragged_arrays, with_distractors
from turns import Dialog, Prefix
from words import CONTINUATIONS, detokenize, spacy_words

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
COPY_TOKENIZER = "copy that of the base model into it (tokenizer.json, or vocab.json and merges.txt)"


@dataclass(frozen=True)
class SpecialIds:
    bos: int
    eos: int
    pad: int
    speaker1: int  # the bot
    speaker2: int  # the other person
    all: frozenset[int]  # these and the base model's own: a reply ends at any of them
    token_types: bool = True  # whether each token's embedding has that of its speaker added


class DialogTokenizer:
    """A tokenizer of transformers with the five special tokens of a dialog, and the text around it.

    Args:
        hf: the tokenizer, with or without the special tokens.
        pre_tokenizer: "spacy" or "basic" for openai-gpt's vocabulary; None asks for the default: what the folder
            says; "basic" for one that has our special tokens and does not say (fine-tuned by the original toolkit);
            else "spacy". Other tokenizers split text in their own way.
        token_types: whether the model adds the embedding of its speaker to each token's; None asks for the default:
            what the folder says; yes for one that has our special tokens and does not say; else `base_types`.
    """

    def __init__(self, hf, pre_tokenizer: str | None = None, token_types: bool | None = None, base_types: bool = True):
        self.hf = hf
        known = hf.get_vocab()
        self.fine_tuned = "<speaker1>" in known
        if type(hf).__name__ == "OpenAIGPTTokenizer":
            saved = hf.init_kwargs.get("pre_tokenizer")
            self.pre_tokenizer = pre_tokenizer or saved or ("basic" if self.fine_tuned else "spacy")
            hf.init_kwargs["pre_tokenizer"] = self.pre_tokenizer  # saved with the tokenizer, and read back here
        elif pre_tokenizer:
            raise UserError("--pre_tokenizer is for openai-gpt's vocabulary only; leave it out for this model")
        else:
            self.pre_tokenizer = None
        if token_types is None:
            token_types = hf.init_kwargs.get("token_types", self.fine_tuned or base_types)
        hf.init_kwargs["token_types"] = token_types
        # The special tokens that the model's own chat template was written for. It may print one that the model lacks.
        none = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "")
        self.own_special = none | hf.special_tokens_map
        hf.add_special_tokens(SPECIAL_TOKENS)
        if self.pre_tokenizer == "spacy":
            use_words_as_they_are(hf)
        ours = hf.convert_tokens_to_ids(["<bos>", "<eos>", "<pad>", "<speaker1>", "<speaker2>"])
        self.added = sorted(set(ours) - set(known.values()))  # a base model knows none of these
        # Ours took the roles of some of the base model's own, which transformers then no longer lists as special.
        special = [number for number, token in hf.added_tokens_decoder.items() if token.special]
        self.ids = SpecialIds(*ours, all=frozenset([*hf.all_special_ids, *special]), token_types=token_types)

    @property
    def max_history(self) -> int | None:
        """The exchanges of history that the model was trained to see; None where that is not known."""
        return self.hf.init_kwargs.get("max_history")

    @max_history.setter
    def max_history(self, exchanges: int) -> None:
        self.hf.init_kwargs["max_history"] = exchanges  # saved with the tokenizer: an adapter has no config.json

    def choose_max_history(self, asked: int | None) -> int:
        """The exchanges of history to show. asked: as many as the user wants; None: as the model was trained."""
        trained = self.max_history
        if asked is None:
            return MAX_HISTORY if trained is None else trained
        if trained not in (None, asked):
            log.info(f"--max_history {asked}: the model was trained with {trained}")
        return asked

    def __len__(self) -> int:
        """The number of rows an embedding needs for every id of this tokenizer. Ids may have gaps."""
        top = max(self.hf.get_vocab().values())
        return max(len(self.hf), top + 1)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text. Special tokens in a text are read as text, so none comes out."""
        if not texts:
            return []
        texts = [text.encode(errors="replace").decode() for text in texts]  # a terminal's bytes may not be UTF-8
        if self.pre_tokenizer == "spacy":
            texts = [spacy_words(text) for text in texts]
        with self._explained():
            return self.hf(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def encode_inside(self, words: list[str]) -> list[list[int]]:
        """Token ids of words in mid-sentence. Byte-level BPEs encode " word" differently from "word"."""
        (before,) = self.encode(["a"])
        texts = [f"a {word}" for word in words]
        return [ids[len(before) :] for ids in self.encode(texts)]

    def encode_persona(self, sentences: list[str]) -> list[list[int]]:
        """The ids of each sentence of a persona. Without token types they are those of one text with spaces between:
        a chat template knows no other."""
        if self.ids.token_types:
            return self.encode(sentences)
        first, later = sentences[:1], sentences[1:]
        return self.encode(first) + self.encode_inside(later)

    def first_bare_token(self, word: str) -> int:
        """The first token of a word by BPE's merges alone, without cutting it into words first; -1 where there is none.

        It need not be the first that `encode` gives: openai-gpt has a token "i'm", which no text is encoded to.
        """
        backend = getattr(self.hf, "backend_tokenizer", None)
        for first in backend.model.tokenize(word)[:1] if backend else ():
            if word.startswith(first.value.removesuffix("</w>")):
                return first.id
        if self.hf.unk_token_id is not None:  # for signs that the vocabulary lacks; not every tokenizer has it
            return self.hf.unk_token_id
        (ids,) = self.encode([word])
        return ids[0] if ids else -1

    def decode(self, ids: list[int]) -> str:
        """Text as people write it, without special tokens and control characters."""
        return detokenize(self._raw(ids))

    def decode_start(self, ids: list[int]) -> str:
        """The start of `decode(ids + more)` that is the same whatever ids come after: what can be shown already."""
        raw = self._raw(ids).rstrip("\ufffd")  # the first bytes of a character
        # Detokenising joins "do n't" and "hello ." again, so what comes next decides about the space before it.
        texts = [detokenize(raw + more) for more in CONTINUATIONS]
        return os.path.commonprefix(texts)

    def _raw(self, ids: list[int]) -> str:
        ids = [i for i in ids if i not in self.ids.all]
        with self._explained():
            text = self.hf.decode(ids, clean_up_tokenization_spaces=False)
        return printable(text)

    def _explained(self):
        """Tell in one line what the library cannot do with a text by this tokenizer's rules."""
        return explain_errors(f"the tokenizer in {self.hf.name_or_path} fails", "use another, or mend its rules")

    def fingerprint(self) -> str:
        """A digest that changes whenever the ids of some text could: a part of the key of the dataset cache."""
        backend = getattr(self.hf, "backend_tokenizer", None)
        rules = backend.to_str() if backend else json.dumps(self.hf.get_vocab(), sort_keys=True)
        # The library's rules do not say that spaCy cuts the text first.
        content = f"{self.pre_tokenizer}{rules}"
        return hashlib.sha256(content.encode()).hexdigest()

    def save(self, folder: Path) -> None:
        self.hf.save_pretrained(folder)


def use_words_as_they_are(hf) -> None:
    """Split text at white space only: a tokenizer's own rules would split spaCy's words again (n't into n, ', t).

    A tokenizer that is saved and loaded has its own rules again, so this is done after each load.
    """
    from tokenizers import normalizers, pre_tokenizers

    hf.backend_tokenizer.normalizer = normalizers.Sequence([])
    hf.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()


# These were made for token types: the paper's method, and the original toolkit's checkpoints. No other base model has
# seen such a sum in its pretraining.
WITH_TOKEN_TYPES = ("openai-gpt", "gpt2")


def load_tokenizer(
    files: ModelFiles,
    pre_tokenizer: str | None = None,
    texts: Iterable[str] | None = None,
    token_types: bool | None = None,
) -> DialogTokenizer:
    """The tokenizer of a model, or one learned from `texts` where the model's folder has none.

    Raises:
        UserError: there is none and no text to learn one from, or it cannot be read, or is not that of the weights.
    """
    base_types = not files.gguf and load_config_dict(files)["model_type"] in WITH_TOKEN_TYPES
    hf = read_tokenizer(files) if files.has_tokenizer else learn_tokenizer(files, texts)
    return DialogTokenizer(hf, pre_tokenizer, token_types, base_types)


def learn_tokenizer(files: ModelFiles, texts: Iterable[str] | None):
    """A vocabulary for a model that is trained from scratch, of the size that its config.json has."""
    if files.weights:  # a vocabulary that is learned would give other words to the rows of their embedding
        raise UserError(f"{files.folder} holds weights but no tokenizer; {COPY_TOKENIZER}")
    if texts is None:
        raise UserError(f"{files.folder} holds no tokenizer; train it first: python train.py --model {files.folder}")
    size = load_config_dict(files).get("vocab_size", 8000)
    if type(size) is not int or not 5 <= size <= 10**6:
        raise UserError(
            f"{files.folder}/config.json: vocab_size is {size!r}; expected 5 to 1000000, as a vocabulary is learned"
        )
    load_config(files)  # what is wrong with it is told before a vocabulary is learned
    return learn_bpe(texts, size)


def read_tokenizer(files: ModelFiles):
    """A model's own tokenizer."""
    from transformers import AutoTokenizer

    folder = files.tokenizer_folder
    if not files.gguf:
        source = {"config": load_config(files), **files.openai_vocabulary}
    elif folder == files.folder:
        source = {"gguf_file": files.gguf}
    else:  # an adapter's, which has tokens that its base's .gguf does not know
        source = {}
    # transformers raises many types for a tokenizer it cannot read.
    with explain_errors(f"cannot read the tokenizer in {folder}", "expected one of transformers'"):
        check_rules(folder / "tokenizer.json")
        hf = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **source)
        hf("Hello, I'm fine!")  # rules that fail with any text are told of here
        check_own_settings(hf.init_kwargs, folder)
    if not files.gguf:  # it has no config.json to compare with
        check_vocabulary(hf, files)
    return hf


def check_own_settings(saved: dict, folder: Path) -> None:
    """Refuse values that `DialogTokenizer` never saves in a tokenizer's settings. Raises ValueError or UserError."""
    if not isinstance(saved.get("token_types", True), bool):
        raise ValueError(f"token_types is {saved['token_types']!r}, not true or false")
    for name in ("pre_tokenizer", "max_history"):
        check_value(CommonSettings.options()[name], saved.get(name), f"{folder}/tokenizer_config.json: ")


def check_vocabulary(hf, files: ModelFiles) -> None:
    """Refuse an incomplete tokenizer: where its vocabulary is missing, transformers makes an empty one without a word.

    An embedding may have more rows than there are tokens, as some are padded, but not twice as many.
    """
    vocabulary = hf.get_vocab()
    size = len(vocabulary)
    top = max(vocabulary.values(), default=0)
    if not 0 <= top < 2 * size + 1000:  # the embedding needs a row for each id up to it
        raise UserError(f"the tokenizer in {files.folder} has an id of {top} for {size} tokens; expected them in a row")
    words = len(vocabulary.keys() - hf.get_added_vocab().keys() - set(hf.all_special_tokens))
    if not words:
        raise UserError(f"the tokenizer in {files.folder} is empty; {COPY_TOKENIZER}")
    rows = load_config(files).get_text_config().vocab_size if files.weights else 0
    if 2 * len(hf) < rows:
        raise UserError(
            f"the tokenizer in {files.folder} has {words} tokens for an embedding of {rows}; {COPY_TOKENIZER}"
        )


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


# ------------------------------------------------------------------------------------------------------------
# The dataset cache: tokens, texts and who says what, in one file
# ------------------------------------------------------------------------------------------------------------


CACHE_VERSION = 4
CHUNK = 4096  # strings that are tokenised at once


def load_dataset(dialogs: Dialogs, tokenizer: DialogTokenizer, cache: str, progress: bool = True) -> dict[str, Split]:
    """The splits "train" and "valid" of a dataset, tokenised once and then read from the cache file.

    Args:
        cache: path of the cache file. A key is put before its ending, so that datasets and models do not evict
            each other.
        progress: show progress bars.
    """
    path = typed_path(cache)
    if not path.name:
        raise UserError(f"--dataset_cache '{cache}' names no file; expected one such as ./dataset_cache.bin")
    content = json.dumps([CACHE_VERSION, dialogs.digest, tokenizer.fingerprint()])
    key = hashlib.sha256(content.encode()).hexdigest()
    path = path.with_name(f"{path.stem}_{key[:12]}{path.suffix}")
    # Of a node's processes one tokenises, and the others wait for it.
    with lock(path):
        remove_unfinished(path.parent, path.name)
        arrays = read_cache(path, key)
        if arrays is None:
            started = time.monotonic()
            arrays = tokenize_dataset(dialogs, tokenizer, progress)
            write_cache(path, key, arrays)
            log.info(f"tokenised {dialogs.name} into {path} in {time.monotonic() - started:.1f} s")
    return {split: Split(arrays, split) for split in ("train", "valid")}


def tokenize_dataset(dialogs: Dialogs, tokenizer: DialogTokenizer, progress: bool) -> dict[str, np.ndarray]:
    """The arrays of a cache file (see `Split`). Every distinct string is tokenised once."""
    numbers: dict[str, int] = {}
    arrays: dict[str, np.ndarray] = {}
    for split, split_dialogs in dialogs.splits.items():
        bar = progress_bar(split_dialogs, f"read {split}", unit=" dialogs", disable=not progress)
        arrays |= number_strings(split, bar, numbers)
        name = f"{split}.candidates"
        candidates = with_distractors(ragged(arrays, name))
        arrays |= ragged_arrays(candidates, name)
    del dialogs.splits  # what was parsed: from here on the distinct strings are enough
    if not len(arrays["valid.dialogs"]):
        raise UserError(f"the validation split of {dialogs.valid_path or dialogs.name} holds no reply; {FORMATS}")
    tokens = Ragged()
    strings = list(numbers)
    with progress_bar(total=len(strings), desc="tokenise", unit=" strings", disable=not progress) as bar:
        # The library works on many texts in parallel. Python's lists of the ids of all of them would fill memory.
        for start in range(0, len(strings), CHUNK):
            chunk = strings[start : start + CHUNK]
            for ids in tokenizer.encode(chunk):
                tokens.append(ids)
            bar.update(len(chunk))  # not before: the rate is that of the work
    texts = [string.encode("utf-8", "replace") for string in numbers]
    text_offsets = np.cumsum([0, *map(len, texts)], dtype=np.int64)
    return arrays | {
        "tokens": np.asarray(tokens.values),
        "token_offsets": np.asarray(tokens.offsets),
        "texts": np.frombuffer(b"".join(texts), np.uint8),
        "text_offsets": text_offsets,
    }


def number_strings(split: str, dialogs: Iterable[Dialog], numbers: dict[str, int]) -> dict[str, np.ndarray]:
    """A split's arrays: its texts as string numbers, of which a new string gets the next in `numbers`."""
    owners = array("i")  # of each utterance its dialog
    lists = {name: Ragged() for name in LISTS}
    history = Views(starts=array("q"), ends=array("q"), values=array("i"))

    def number(texts: Sequence[str]) -> list[int]:
        return [numbers.setdefault(text, len(numbers)) for text in texts]

    for count, dialog in enumerate(dialogs):
        lists["persona"].append(number(dialog.personality))
        before, start = [], len(history.values)
        for utterance in dialog.utterances:
            owners.append(count)
            if not goes_on(utterance.history, before):
                before, start = [], len(history.values)
            # Only what is new is stored: a history that goes on begins at the same place, and ends later.
            added = utterance.history[len(before) :]
            history.values.extend(number(added))
            history.starts.append(start)
            history.ends.append(len(history.values))
            before = utterance.history
            lists["candidates"].append(number(utterance.candidates))
            lists["alternatives"].append(number(utterance.alternatives))
    arrays = {f"{split}.dialogs": np.asarray(owners)}
    arrays |= {f"{split}.history_{name}": np.asarray(column) for name, column in vars(history).items()}
    for name, rows in lists.items():
        arrays |= ragged_arrays(rows, f"{split}.{name}")
    return arrays


def goes_on(history: Sequence[str], before: Sequence[str]) -> bool:
    """Whether a history begins with the whole of the one before it.

    Views of one list are not compared text by text: of a long dialog's many histories that would take for ever.
    """
    if isinstance(history, Prefix) and isinstance(before, Prefix) and history.texts is before.texts:
        return len(history) >= len(before)
    return history[: len(before)] == before


def write_cache(path: Path, key: str, arrays: dict[str, np.ndarray]) -> None:
    """Write a cache file, which `read_cache` reads for the same key only."""
    from safetensors.numpy import save_file

    with whole_files(path.parent, owner=path.name) as unfinished:
        save_file(arrays, unfinished / path.name, metadata={"key": key, "checksum": checksum(arrays)})


def read_cache(path: Path, key: str) -> dict[str, np.ndarray] | None:
    """The arrays of a cache file; None where there is none, or, with a warning, where it is stale or damaged."""
    from safetensors import safe_open

    if not path.exists():
        return None
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata()
            arrays = {name: file.get_tensor(name) for name in file.keys()}
        if metadata == {"key": key, "checksum": checksum(arrays)}:
            return arrays
        reason = "does not match its key or checksum"
    except Exception as error:  # safetensors and numpy have many types for what they cannot read
        reason = first_line(error)
    log.warning(f"warning: {path} is damaged or of another kind ({reason}); it is built anew")
    return None


def checksum(arrays: dict[str, np.ndarray]) -> str:
    value = 0
    for name in sorted(arrays):
        value = zlib.crc32(arrays[name], zlib.crc32(name.encode(), value))
    return str(value)
