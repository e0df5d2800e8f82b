"""What people wrote: every dataset in, one `Dialogs` out. The only room that sees a dataset's name."""

import codecs
import hashlib
import mmap
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache, cached_property, partial
from itertools import chain
from pathlib import Path

import numpy as np

from cli import UserError, explain_errors, log
from files import Unzipped, download, forget, is_url, typed_path
from formats import Content, Lazy, Splits, name_splits, read_content
from records import FORMATS, SYNONYMS, keys_found
from turns import Dialog

PERSONACHAT_URL = "https://s3.amazonaws.com/datasets.huggingface.co/personachat/personachat_self_original.json"
PERSONACHAT_ON_HUB = "AlekseyKorshuk/persona-chat"

# ------------------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------------------

# owner/name[:config][@revision], and not the path of a file with one of the usual endings.
HUB_ID = re.compile(r"([\w.-]+)/([\w.-]+?)(?::([\w.-]+))?(?:@([\w./-]+))?")
LIKE_A_FILE = re.compile(r"\.(json|jsonl|txt|csv|tsv|parquet|gz)$")


def dataset_files(name: str) -> list[tuple[str, Path]]:
    """A dataset's local files, each after the split that its name tells ("" where it tells none).

    Args:
        name: the path of a file or a folder, a URL, the id of a dataset on the hub, or "" for PersonaChat.
    """
    if is_url(name or PERSONACHAT_URL):
        instead = "pass --dataset_path a local file" + ("" if name else f", or {PERSONACHAT_ON_HUB} (from the hub)")
        return [("", download(name or PERSONACHAT_URL, instead))]
    path = typed_path(name)
    found = HUB_ID.fullmatch(name)
    if found and not os.path.exists(path) and not os.path.isdir(path.parent) and not LIKE_A_FILE.search(name):
        return fetch_from_hub(f"{found[1]}/{found[2]}", found[3], found[4])
    if not os.path.exists(path):  # pathlib's own raises for names that are too long
        raise UserError(f"no such dataset: {path}; pass --dataset_path a file, a URL or a hub id")
    if path.is_dir():
        return files_in_folder(path)
    if not path.is_file():
        path = Path(spooled(path).name, path.name)
    return [("", path)]


@cache  # holds the folder, which goes when this process ends
def spooled(path: Path) -> tempfile.TemporaryDirectory:
    """A copy of what comes through a pipe, such as <(zcat chats.gz): it is read more than once, a pipe only once."""
    folder = tempfile.TemporaryDirectory()
    with explain_errors(f"cannot read {path}", "expected a readable file", OSError):
        with open(path, "rb") as pipe, open(Path(folder.name, path.name), "wb") as file:
            shutil.copyfileobj(pipe, file)
    return folder


def fetch_from_hub(repo: str, config: str | None, revision: str | None) -> list[tuple[str, Path]]:
    """The parquet files of a dataset on the hub, or those that the hub made of it."""
    from huggingface_hub import HfApi, snapshot_download  # heavy: only where something is fetched

    with explain_errors(f"cannot fetch the dataset '{repo}' from the hub", "pass --dataset_path a local file or a URL"):
        for branch in dict.fromkeys((revision, revision or "refs/convert/parquet")):
            names = HfApi().list_repo_files(repo, repo_type="dataset", revision=branch)
            names = [name for name in names if name.endswith(".parquet")]
            if names:
                break
        else:
            raise UserError(
                f"the dataset '{repo}' holds no parquet files, nor has the hub made any; download its files"
            )
        names = files_of_config(repo, names, config)
        folder = snapshot_download(repo, repo_type="dataset", revision=branch, allow_patterns=names)
    return files_by_split(Path(folder), names, repo)


def files_in_folder(folder: Path) -> list[tuple[str, Path]]:
    """The files of a folder that holds one for each split, maybe in numbered parts, as datasets of the hub are."""
    paths = chain(folder.glob("*"), folder.glob("*/*"))  # no deeper: it may be somebody's whole disk
    names = [str(path.relative_to(folder)) for path in paths if LIKE_A_FILE.search(path.name) and path.is_file()]
    whole = {re.sub(r"\d{4,}(-of-\d+)?", "", name) for name in names}
    words = list(filter(None, map(split_in, whole)))
    if len(set(words)) < len(words) or not words and len(whole) != 1:
        raise UserError(
            f"the folder {folder} holds {keys_found(sorted(names))}; expected one file for each split, such as "
            "train.jsonl and valid.jsonl, or pass --dataset_path one of its files"
        )
    return files_by_split(folder, names, str(folder))


def files_by_split(folder: Path, names: list[str], label: str) -> list[tuple[str, Path]]:
    """A dataset's files in a folder, each after the split that its name tells. label: of the dataset, for messages."""
    words = {name: split_in(name) or name for name in sorted(names)}
    splits = name_splits(dict.fromkeys(words.values()), Path(label))
    if not splits:  # no file's name tells one
        return [("", folder / name) for name in words]
    split_of = {word: split for split, word in splits.items()}
    return [(split_of[word], folder / name) for name, word in words.items() if word in split_of]


def files_of_config(repo: str, names: list[str], config: str | None) -> list[str]:
    """Those of a dataset's files that belong to a configuration: each has a folder, where there are several."""
    folders = {name.split("/")[0] for name in names if "/" in name}
    configs = sorted(folder for folder in folders if folder != "data" and split_in(folder) is None)
    if config is None:
        if not configs:
            return names
        config = configs[0] if len(configs) == 1 else "default"
        if config not in configs:
            raise UserError(f"the dataset '{repo}' has the configurations {keys_found(configs)}; pass '{repo}:NAME'")
    if config not in configs:
        raise UserError(f"the dataset '{repo}' has no configuration {config}, but {keys_found(configs)}")
    return [name for name in names if name.startswith(f"{config}/")]


def split_in(name: str) -> str | None:
    """The word for a split in a file's name: of several the last, as folders come before files."""
    words = re.split(r"[^a-z]+", name.lower())
    known = [word for word in words if word in SYNONYMS["train"] or word in SYNONYMS["valid"]]
    return known[-1] if known else None


def read_bytes(path: Path) -> Content:
    """A file's content: unzipped where it is gzip, else mapped into memory and not read before it is used."""
    expected = "expected a whole, readable file"
    with explain_errors(f"cannot read {path}", expected, OSError, EOFError, zlib.error), open(path, "rb") as file:
        magic = file.read(2)
        if not magic:
            raise UserError(f"{path} is empty; {FORMATS}")
        if magic == b"\x1f\x8b":
            with Unzipped(path) as unzipped:
                data = b"".join(iter(partial(unzipped.read, 2**20), b""))
        else:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return data[3:] if data[:3] == codecs.BOM_UTF8 else data


def dataset_digest(name: str) -> str:
    """A hash of a dataset's content. Takes no parsing."""
    digests = [hashlib.sha256(read_bytes(path)).hexdigest() for _, path in dataset_files(name)]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def read_dataset(name: str) -> Splits:
    """The dialogs of a dataset by split: {"train": ..., "valid": ...}, or {"all": ...} without splits.

    Args:
        name: a path, a URL, the id of a dataset on the hub, or "" for PersonaChat.
    """
    files: dict[str, list[Lazy]] = {}  # of each split
    for split, path in dataset_files(name):
        try:
            splits = read_content(path, read_bytes(path))
        except UserError:
            forget(path)  # maybe a page of the network that asks to log in
            raise
        for key, dialogs in splits.items():
            if split:  # the file's name tells it, by the word that its dataset has for it
                key, dialogs = split, replace(dialogs, split=split_in(str(path)))
            files.setdefault(key, []).append(dialogs)
    return {split: Lazy(partial(chain.from_iterable, several), several[0].split) for split, several in files.items()}


# ------------------------------------------------------------------------------------------------------------
# Datasets
# ------------------------------------------------------------------------------------------------------------

SPLIT_SEED = 0  # fixed, so that training and evaluation hold out the same dialogs


class Dialogs:
    """The dialogs of a dataset: training and validation split, read when they are first needed.

    A tokenised dataset is found by `digest` alone, so a file whose tokens are in the cache is never parsed.

    Args:
        dataset_path: a path or URL; "" is PersonaChat, None no training data at all.
        valid_path: the file whose "valid" split, or whose dialogs where it has no splits, are the validation split.
            "" takes the split of `dataset_path`, or holds out some of its dialogs.
        whole: where there is no validation split, all dialogs are it, as nothing is to be trained.
    """

    def __init__(self, dataset_path: str | None, valid_path: str = "", whole: bool = False):
        self.dataset_path, self.valid_path, self.whole = dataset_path, valid_path, whole
        self.name = "PersonaChat" if dataset_path == "" else dataset_path or valid_path  # in messages

    @cached_property
    def given(self) -> Splits:
        """The dialogs of `dataset_path`, by the splits that it has."""
        return {} if self.dataset_path is None else read_dataset(self.dataset_path)

    @cached_property
    def validation(self) -> tuple[str, Lazy] | None:
        """The split to validate on, after its name; None where there is none, and some dialogs are to be held out."""
        if self.valid_path:
            given, order = read_dataset(self.valid_path), ("valid", "all", "train")
        else:
            given, order = self.given, ("valid", "train", "all") if self.whole else ("valid",)
        for split in order:
            if split in given:
                return split, given[split]
        return None

    @cached_property
    def digest(self) -> tuple[str, str]:
        """The SHA-256 of the content of `dataset_path` and `valid_path`; "" for one that is not given."""
        names = self.dataset_path, self.valid_path or None
        if self.whole and not self.valid_path and "valid" not in self.given:
            names = None, self.dataset_path  # other splits than a training makes of it
        return tuple("" if name is None else dataset_digest(name) for name in names)

    @cached_property
    def splits(self) -> dict[str, Iterable[Dialog]]:
        """The dialogs of "train" and "valid": lists where some were held out, and parsed in every loop where not."""
        train = self.given.get("train", self.given.get("all", []))
        if self.validation is None:
            return hold_out(list(train), self.name)
        _, valid = self.validation
        return {"train": [] if valid is train else train, "valid": valid}

    @property
    def valid_source(self) -> tuple[str, str]:
        """The name of the dataset that the validation dialogs are of, and its split that they are.

        The split is called as the file calls it; it is "all" where a file has none, and "held out" where `hold_out`
        made it.
        """
        if self.validation is None:
            return self.name, "held out"
        split, dialogs = self.validation
        return self.valid_path or self.name, dialogs.split or split

    @cached_property
    def personas(self) -> list[list[str]]:
        """The personas of all splits of `dataset_path`, without the empty ones."""
        everything = chain.from_iterable(self.given.values())
        personas = [dialog.personality for dialog in everything if dialog.personality]
        if not personas:
            raise UserError(f"{self.name} holds no persona; pass --personality 'i like cats.'")
        return personas

    def training_texts(self) -> Iterator[str]:
        """Every text of the training split, for learning a vocabulary."""
        for dialog in self.splits["train"]:
            yield from dialog.personality
            for utterance in dialog.utterances:
                yield from utterance.history[-1:]
                yield utterance.candidates[-1]


def hold_out(dialogs: list[Dialog], name: str) -> dict[str, list[Dialog]]:
    """Hold out a tenth of the dialogs for validation, at most 500: the same ones every time.

    Dialogs of one conversation stay together, as the one tells what is said in the other.
    """
    if len(dialogs) == 1 and len(dialogs[0].utterances) > 1:  # a chat that was saved, say
        log.info(f"{name} holds 1 dialog: its last reply is held out for validation")
        return cut_last_reply(dialogs[0])
    conversations = number_conversations(dialogs)
    sizes = np.bincount(conversations, minlength=1)  # dialogs of each
    if len(sizes) < 2:
        count = min(len(dialogs), 1)
        raise UserError(
            f"{name} holds {count} dialog; expected one to train on and one to validate on, or --valid_path"
        )
    room, held_out = max(1, min(len(dialogs) // 10, 500)), set()
    for conversation in np.random.default_rng(SPLIT_SEED).permutation(len(sizes)).tolist():
        if sizes[conversation] <= room:
            held_out.add(conversation)
            room -= sizes[conversation]
    held_out = held_out or {int(sizes.argmin())}
    splits = {"train": [], "valid": []}
    for dialog, conversation in zip(dialogs, conversations, strict=True):
        splits["valid" if conversation in held_out else "train"].append(dialog)
    held = f"{len(splits['valid'])} of its {len(dialogs)} dialogs"
    log.info(f"{name} has no validation split: {held} are held out for it")
    return splits


def cut_last_reply(dialog: Dialog) -> dict[str, list[Dialog]]:
    """A dialog without its last reply, which no history before it holds, and one of that reply alone."""
    *earlier, last = dialog.utterances
    return {"train": [Dialog(dialog.personality, earlier)], "valid": [Dialog(dialog.personality, [last])]}


def number_conversations(dialogs: list[Dialog]) -> list[int]:
    """The number of the conversation that each dialog is of.

    ConvAI2 has each conversation twice, each time with another of its speakers as the bot. The turns are the same, but
    the last one is missing on the side of who did not say it. A transcript has one in several dialogs where the persona
    was changed in it, or where it was written beside another: each begins with all turns of the one before.
    """
    numbers: list[int] = []
    count = 0
    seen: dict[tuple, int] = {}  # (turns, whether they are all of a dialog or all but its last) -> its number
    for dialog in dialogs:
        turns = tuple(dialog.turns)
        before = tuple(dialog.utterances[0].history[:-1]) if turns else ()  # of a transcript that goes on
        others = []
        if len(turns) > 1:
            others.append((turns, "but the last"))
        if len(turns) > 2:
            others.append((turns[:-1], "all"))
        if len(before) > 1:
            others.append((before, "all"))
        known = [seen[other] for other in others if other in seen]
        number = known[0] if known else count
        if not known:
            count += 1
        numbers.append(number)
        seen.setdefault((turns, "all"), number)
        seen.setdefault((turns[:-1], "but the last"), number)
    return numbers


# ------------------------------------------------------------------------------------------------------------
# Messages
# ------------------------------------------------------------------------------------------------------------

MAX_MESSAGE = 2000  # characters that a person may say at once: about a page, and more than a model sees


def check_message(text: str) -> str:
    """`text` as it can be answered. Raises UserError where it is empty or too long."""
    text = text.strip()
    if not text:
        raise UserError("the message is empty; type something")
    if len(text) > MAX_MESSAGE:
        raise UserError(f"the message has {len(text)} characters; expected at most {MAX_MESSAGE}, so shorten it")
    return text
