"""What people wrote: every dataset format in, one `Dialogs` out. The only room that sees a dataset's name."""

import codecs
import hashlib
import mmap
import os
import re
import textwrap
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

from cli import UserError, explain_errors, log
from files import Unzipped, download, forget, is_url, typed_path

PERSONACHAT_URL = "https://s3.amazonaws.com/datasets.huggingface.co/personachat/personachat_self_original.json"


class Utterance(msgspec.Struct):
    history: list[str]
    # The gold reply is the last one; alone, it asks for sampled distractors.
    candidates: Annotated[list[str], msgspec.Meta(min_length=1)]


class Dialog(msgspec.Struct):
    personality: list[str]
    utterances: list[Utterance]


class Message(msgspec.Struct):
    role: str
    content: str


class Record(msgspec.Struct):
    """A dialog as JSON may hold it: one of `utterances`, `dialog` and `messages` is there."""

    personality: list[str] = []
    utterances: list[Utterance] | None = None
    dialog: list[str] | None = None
    messages: list[Message] | None = None


NO_JSON = (ValueError, RecursionError)  # what a decoder raises; the second for brackets nested too deep
SPLITS = ("train", "valid", "all")
FORMATS = "expected PersonaChat JSON, JSON lines or ParlAI text (see 'Data formats' in the README)"


def replies_of(turns: Iterable[tuple[bool, str]]) -> list[Utterance]:
    """Every turn of the bot as the reply to all before it. turns: (spoken by the bot, text) pairs."""
    # Turns of one speaker in a row are one utterance: speakers must alternate.
    runs = [(by_bot, " ".join(text for _, text in run)) for by_bot, run in groupby(turns, key=itemgetter(0))]
    texts = [text for _, text in runs]
    return [Utterance(texts[:i], [text]) for i, (by_bot, text) in enumerate(runs) if by_bot]


def dialog_of(record: Record) -> Dialog:
    """The dialog in a JSON record. Raises ValueError with what is wrong."""
    if record.utterances is not None:
        return Dialog(record.personality, record.utterances)
    if record.dialog is not None:
        return Dialog(record.personality, replies_of((i % 2 == 1, text) for i, text in enumerate(record.dialog)))
    if record.messages is None:
        raise ValueError("a dialog needs one of the keys utterances, dialog or messages - at `$`")
    personality, turns = list(record.personality), []
    for i, message in enumerate(record.messages):
        if message.role in ("system", "developer"):
            personality += split_sentences(message.content)
        elif message.role in ("user", "assistant"):
            turns.append((message.role == "assistant", message.content))
        else:
            raise ValueError(f"expected role system, user or assistant, got {message.role} - at `$.messages[{i}]`")
    return Dialog(personality, replies_of(turns))


def split_sentences(text: str) -> list[str]:
    """Persona sentences from running text: one per line, and a new one after . ! or ?"""
    return [part.strip() for part in re.split(r"\n|(?<=[.!?])\s", text) if part.strip()]


# ------------------------------------------------------------------------------------------------------------
# Formats. A reader takes a file's path, for messages, and its content, and returns the dialogs of each split.
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lazy:
    """Dialogs that every loop parses again, so that a large file is never held in memory as Python objects."""

    parse: Callable[[], Iterator[Dialog]]

    def __iter__(self) -> Iterator[Dialog]:
        return self.parse()


Content = bytes | mmap.mmap  # of a file
Splits = dict[str, Lazy]  # "train" and "valid", or "all" of a file without splits


def lines_of(path: Path, data: Content) -> Iterator[tuple[str, bytes]]:
    """(place, line) pairs of the lines that are not blank. The place is for messages."""
    for count, line in enumerate(re.finditer(rb".*\n?", data), 1):
        if line[0].strip():
            yield f"{path}, line {count}", line[0]


def json_dialogs(records: Iterable[tuple[str, msgspec.Raw | bytes]]) -> Iterator[Dialog]:
    """Decode (place, JSON record) pairs one at a time."""
    decode = msgspec.json.Decoder(Record).decode
    for place, record in records:
        with explain_errors(place, FORMATS, *NO_JSON):
            dialog = dialog_of(decode(record))
        yield dialog


def read_json_lines(path: Path, data: Content) -> Splits:
    return {"all": Lazy(lambda: json_dialogs(lines_of(path, data)))}


def read_json(path: Path, data: Content) -> Splits:
    """A list of records, or an object that holds such a list for each split."""

    def dialogs_in(records: list[msgspec.Raw], place: str) -> Lazy:
        return Lazy(lambda: json_dialogs((f"{path}, {place}[{i}]", record) for i, record in enumerate(records)))

    with explain_errors(str(path), FORMATS, *NO_JSON):
        document = msgspec.json.decode(data, type=list[msgspec.Raw] | dict[str, list[msgspec.Raw]])
    if isinstance(document, list):
        return {"all": dialogs_in(document, "$")}
    if document.keys().isdisjoint(SPLITS):
        keys = textwrap.shorten(", ".join(document), 100, placeholder=" ...") or "(none)"
        raise UserError(f"{path}: has the keys {keys}, expected train and valid; {FORMATS}")
    return {split: dialogs_in(records, f"$.{split}") for split, records in document.items() if split in SPLITS}


def read_parlai(path: Path, data: Content) -> Splits:
    return {"all": Lazy(lambda: parlai_dialogs(parlai_lines(path, data)))}


def parlai_dialogs(lines: Iterable[tuple[int, str]]) -> Iterator[Dialog]:
    """ParlAI text: numbered lines, a new dialog where the number falls back."""
    texts: list[str] = []
    last = 0
    for number, text in chain(lines, [(0, "")]):
        if number <= last:
            dialog = parlai_dialog(texts)
            if dialog.personality or dialog.utterances:
                yield dialog
            texts = []
        texts.append(text)
        last = number


def parlai_lines(path: Path, data: Content) -> Iterator[tuple[int, str]]:
    """(number, text) pairs of the lines."""
    for place, line in lines_of(path, data):
        try:
            number, _, text = line.decode().rstrip("\r\n").partition(" ")
        except UnicodeDecodeError as error:
            raise UserError(f"{place}: not UTF-8 ({error.reason}); save the file as UTF-8") from error
        if not number.isdecimal() or len(number) > 9:
            raise UserError(f"{place}: expected a line number first, found '{number[:20]}'; {FORMATS}")
        yield int(number), text.replace("\\n", "\n")


def parlai_dialog(lines: Iterable[str]) -> Dialog:
    """A dialog from its lines, each a sentence of a persona or a turn of both speakers.

    A turn is `text<TAB>reply[<TAB>reward<TAB>candidate|candidate|...]`.
    """
    dialog, history, unanswered = Dialog([], []), [], []
    for line in lines:
        if line.startswith("your persona:"):
            dialog.personality.append(line.removeprefix("your persona:").strip())
        elif not line.startswith("partner's persona:"):
            text, reply, _, candidates = (*map(str.strip, line.split("\t")), "", "", "")[:4]
            if text and text != "__SILENCE__":
                unanswered.append(text)
            if reply:
                # Turns of the other person in a row are one utterance: speakers must alternate.
                history += [" ".join(unanswered)] if unanswered else []
                distractors = [text for text in map(str.strip, candidates.split("|")) if text not in ("", reply)]
                dialog.utterances.append(Utterance(history[:], [*distractors, reply]))
                history, unanswered = [*history, reply], []
    return dialog


# ------------------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------------------


def dataset_file(name: str) -> Path:
    """A dataset as a local file, downloaded where `name` is a URL, or "" for PersonaChat."""
    url = name or PERSONACHAT_URL
    return download(url, "pass --dataset_path a local file") if is_url(url) else typed_path(name)


def read_bytes(path: Path) -> Content:
    """A file's content: unzipped where it is gzip, else mapped into memory and not read before it is used."""
    if not os.path.exists(path):  # pathlib's own raises for names that are too long
        raise UserError(f"no such dataset: {path}; pass --dataset_path a file or a URL")
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


def file_digest(path: Path) -> str:
    return hashlib.sha256(read_bytes(path)).hexdigest()


def is_record(line: bytes | memoryview) -> bool:
    """Whether a line is a JSON object with a dialog in it (JSON lines), not the start of a larger document."""
    try:
        keys = msgspec.json.decode(line, type=dict[str, msgspec.Raw])
    except NO_JSON:
        return False
    return not keys.keys().isdisjoint(Record.__struct_fields__)


def read_dataset(name: str) -> Splits:
    """The dialogs of a dataset by split: {"train": ..., "valid": ...}, or {"all": ...} without splits.

    Args:
        name: a path, a URL, or "" for PersonaChat. The format is told apart by content, not by name.
    """
    path = dataset_file(name)
    data = read_bytes(path)
    start, end = re.search(rb"\S.*|\Z", data).span()  # of the first line that is not blank
    first = data[start : min(end, start + 20)]
    if first[:1].isdigit():
        return read_parlai(path, data)
    if is_record(memoryview(data)[start:end]):  # a view, as the line may be the whole file
        return read_json_lines(path, data)
    if first[:1] in (b"{", b"["):
        return read_json(path, data)
    forget(path)  # maybe a page of the network that asks to log in
    raise UserError(f"{path}: begins with {first!r}; {FORMATS}")


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
    """

    def __init__(self, dataset_path: str | None, valid_path: str = ""):
        self.dataset_path, self.valid_path = dataset_path, valid_path
        self.name = "PersonaChat" if dataset_path == "" else dataset_path or valid_path  # in messages

    @cached_property
    def digest(self) -> tuple[str, str]:
        """The SHA-256 of the content of `dataset_path` and `valid_path`; "" for one that is not given."""
        names = self.dataset_path, self.valid_path or None
        return tuple("" if name is None else file_digest(dataset_file(name)) for name in names)

    @cached_property
    def splits(self) -> dict[str, Iterable[Dialog]]:
        """The dialogs of "train" and "valid": lists where some were held out, and parsed in every loop where not."""
        given = {} if self.dataset_path is None else read_dataset(self.dataset_path)
        train, valid = given.get("train") or given.get("all") or [], given.get("valid")
        if self.valid_path:
            given = read_dataset(self.valid_path)
            valid = given.get("valid") or given.get("all") or given["train"]
        return hold_out(list(train), self.name) if valid is None else {"train": train, "valid": valid}

    @cached_property
    def personas(self) -> list[list[str]]:
        """The personas of all splits of `dataset_path`, without the empty ones."""
        splits = read_dataset(self.dataset_path).values()
        personas = [dialog.personality for dialogs in splits for dialog in dialogs if dialog.personality]
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
    """Hold out a tenth of the dialogs for validation, at most 500: the same ones every time."""
    count = len(dialogs)
    if count < 2:
        raise UserError(
            f"{name} holds {count} dialog; expected one to train on and one to validate on, or --valid_path"
        )
    size = max(1, min(count // 10, 500))
    held_out = set(np.random.default_rng(SPLIT_SEED).permutation(count)[:size].tolist())
    log.info(f"{name} has no validation split: {size} of its {count} dialogs are held out for it")
    train = [dialog for number, dialog in enumerate(dialogs) if number not in held_out]
    return {"train": train, "valid": [dialogs[number] for number in sorted(held_out)]}


MAX_MESSAGE = 2000  # characters that a person may say at once: about a page, and more than a model sees


def check_message(text: str) -> str:
    """`text` as it can be answered. Raises UserError where it is empty or too long."""
    text = text.strip()
    if not text:
        raise UserError("the message is empty; type something")
    if len(text) > MAX_MESSAGE:
        raise UserError(f"the message has {len(text)} characters; expected at most {MAX_MESSAGE}, so shorten it")
    return text
