"""What people wrote: every dataset format in, dialogs out. The only room that sees a dataset's name."""

import hashlib
import mmap
import re
import textwrap
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import msgspec
import numpy as np

from cli import UserError, first_line, log
from files import Unzipped, download, forget, is_url, typed_path

PERSONACHAT_URL = "https://s3.amazonaws.com/datasets.huggingface.co/personachat/personachat_self_original.json"


class Utterance(msgspec.Struct):
    history: list[str]
    candidates: list[str]  # the gold reply is the last one; alone, it asks for sampled distractors


class Dialog(msgspec.Struct):
    personality: list[str]
    utterances: list[Utterance]


class Message(msgspec.Struct):
    role: str
    content: str


class Record(msgspec.Struct):
    """A dialog as a file may hold it: one of `utterances`, `dialog` and `messages` is there."""

    personality: list[str] = []
    utterances: list[Utterance] | None = None
    dialog: list[str] | None = None
    messages: list[Message] | None = None


NO_JSON = (ValueError, RecursionError)  # what a decoder raises; the second for brackets nested too deep
FORMATS = "expected PersonaChat JSON, JSON lines or ParlAI text (see 'Data formats' in the README)"


def replies_of(turns: list[tuple[bool, str]]) -> list[Utterance]:
    """Every turn of the bot as the reply to all before it. turns: (spoken by the bot, text) pairs."""
    merged: list[tuple[bool, str]] = []
    for by_bot, text in turns:  # two turns of one speaker in a row are one utterance: speakers must alternate
        if merged and merged[-1][0] == by_bot:
            merged[-1] = (by_bot, f"{merged[-1][1]} {text}")
        else:
            merged.append((by_bot, text))
    texts = [text for _, text in merged]
    return [Utterance(texts[:i], [texts[i]]) for i, (by_bot, _) in enumerate(merged) if by_bot]


def dialog_of(record: Record) -> Dialog:
    """The dialog in a JSON record. Raises ValueError with what is wrong."""
    if record.utterances is not None:
        for i, utterance in enumerate(record.utterances):
            if not utterance.candidates:
                raise ValueError(f"no candidates (the last one is the gold reply) - at `$.utterances[{i}].candidates`")
        return Dialog(record.personality, record.utterances)
    if record.dialog is not None:
        return Dialog(record.personality, replies_of([(i % 2 == 1, text) for i, text in enumerate(record.dialog)]))
    if record.messages is not None:
        personality, turns = list(record.personality), []
        for i, message in enumerate(record.messages):
            if message.role in ("system", "developer"):
                personality += split_sentences(message.content)
            elif message.role in ("user", "assistant"):
                turns.append((message.role == "assistant", message.content))
            else:
                raise ValueError(f"expected role system, user or assistant, got {message.role} - at `$.messages[{i}]`")
        return Dialog(personality, replies_of(turns))
    raise ValueError("a dialog needs one of the keys utterances, dialog or messages - at `$`")


def split_sentences(text: str) -> list[str]:
    """Persona sentences from running text: one per line, and cut after . ! or ?"""
    return [part.strip() for part in re.split(r"\n|(?<=[.!?])\s", text) if part.strip()]


def json_dialogs(records: Iterable[tuple[int, msgspec.Raw | bytes]], where: Callable[[int], str]) -> Iterator[Dialog]:
    """Decode numbered records one at a time, so that a large file never stands in memory as Python objects."""
    decode = msgspec.json.Decoder(Record).decode
    for number, raw in records:
        try:
            yield dialog_of(decode(raw))
        except NO_JSON as error:  # msgspec's errors and UnicodeDecodeError are ValueErrors too
            raise UserError(f"{where(number)}: {first_line(error)}; {FORMATS}") from error


def parlai_dialogs(path: str, lines: Iterable[bytes]) -> Iterator[Dialog]:
    """ParlAI text: numbered lines, a new dialog where the number falls back."""
    dialog, history, last, answered = Dialog([], []), [], 0, True
    for count, raw in enumerate(lines, 1):
        try:
            line = raw.decode().rstrip("\r\n").replace("\\n", "\n")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}, line {count}: not UTF-8 ({error.reason}); save the file as UTF-8") from error
        if not line.strip():
            continue
        head, _, rest = line.partition(" ")
        if not head.isdecimal() or len(head) > 9:
            raise UserError(f"{path}, line {count}: expected a line number first, found '{head[:20]}'; {FORMATS}")
        if int(head) <= last:
            if dialog.utterances or dialog.personality:
                yield dialog
            dialog, history, answered = Dialog([], []), [], True
        last = int(head)
        if rest.startswith("your persona:"):
            dialog.personality.append(rest.removeprefix("your persona:").strip())
        elif not rest.startswith("partner's persona:"):
            text, label, candidates = parlai_turn(rest)
            if text and text != "__SILENCE__":
                if answered:
                    history.append(text)
                else:  # two turns of the other person in a row are one utterance: speakers must alternate
                    history[-1] += f" {text}"
                answered = False
            if label:
                distractors = [candidate for candidate in candidates if candidate != label]
                dialog.utterances.append(Utterance(list(history), [*distractors, label]))
                history.append(label)
                answered = True
    if dialog.utterances or dialog.personality:
        yield dialog


def parlai_turn(text: str) -> tuple[str, str, list[str]]:
    """`text<TAB>label[<TAB>reward<TAB>candidate|candidate|...]` as (text, label, candidates)."""
    text, label, _, candidates = (*text.split("\t"), "", "", "")[:4]
    return text.strip(), label.strip(), [part.strip() for part in candidates.split("|") if part.strip()]


def read_bytes(path: Path) -> bytes | mmap.mmap:
    """A file's content, unzipped where it is gzip, else mapped into memory and not read before it is used."""
    try:
        if path.is_dir():
            raise UserError(f"{path} is a folder; expected a dataset file: {FORMATS}")
        with open(path, "rb") as file:
            if file.read(2) == b"\x1f\x8b":
                with Unzipped(path) as unzipped:
                    return b"".join(iter(partial(unzipped.read, 2**20), b""))
            if path.stat().st_size == 0:
                raise UserError(f"{path} is empty; {FORMATS}")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError as error:
        raise UserError(f"no such dataset: {path}; pass --dataset_path a file or a URL") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {first_line(error)}; expected a whole, readable file") from error


def file_digest(path: Path) -> str:
    data = read_bytes(path)  # for its clear errors
    return hashlib.sha256(data).hexdigest()


def iter_lines(data: bytes | mmap.mmap, offset: int) -> Iterator[bytes]:
    """The lines of `data` from `offset` on."""
    while offset < len(data):
        end = data.find(b"\n", offset) + 1 or len(data)
        yield data[offset:end]
        offset = end


def is_record(line: bytes) -> bool:
    """Whether a line is a JSON object with a dialog in it (JSON lines), not the start of a larger document."""
    try:
        keys = msgspec.json.decode(line, type=dict[str, msgspec.Raw])
    except NO_JSON:
        return False
    return bool(keys.keys() & {"personality", "utterances", "dialog", "messages"})


def read_dataset(name: str) -> dict[str, Iterator[Dialog]]:
    """The dialogs of a dataset by split, read lazily: {"train": ..., "valid": ...}, or {"all": ...} without splits.

    Args:
        name: a path, a URL, or "" for PersonaChat. The format is told apart by content, not by name.
    """
    path = dataset_file(name)
    data = read_bytes(path)
    start = data[:4096].removeprefix(b"\xef\xbb\xbf")  # a byte order mark
    offset = len(data[:4096]) - len(start)
    first = start.lstrip()[:1]
    if first.isdigit():
        return {"all": parlai_dialogs(str(path), iter_lines(data, offset))}
    if first not in (b"{", b"["):
        forget(path)  # maybe a page of the network that asks to log in
        raise UserError(f"{path}: begins with {start.lstrip()[:20]!r}; {FORMATS}")
    first_record = next(line for line in iter_lines(data, offset) if line.strip())
    if first == b"{" and is_record(first_record):
        lines = ((count, line) for count, line in enumerate(iter_lines(data, offset), 1) if line.strip())
        return {"all": json_dialogs(lines, lambda count: f"{path}, line {count}")}
    try:
        view = memoryview(data)[offset:]
        if first == b"[":
            splits = {"all": msgspec.json.decode(view, type=list[msgspec.Raw])}
        else:
            splits = msgspec.json.decode(view, type=dict[str, list[msgspec.Raw]])
    except NO_JSON as error:
        raise UserError(f"{path}: {first_line(error)}; {FORMATS}") from error
    if "all" not in splits and "train" not in splits and "valid" not in splits:
        keys = textwrap.shorten(", ".join(splits), 100, placeholder=" ...") or "(none)"
        raise UserError(f"{path}: has the keys {keys}, expected train and valid; {FORMATS}")
    return {
        split: json_dialogs(
            enumerate(raws), lambda i, split=split: f"{path}, {'$' if split == 'all' else '$.' + split}[{i}]"
        )
        for split, raws in splits.items()
        if split in ("all", "train", "valid")
    }


def dataset_file(name: str) -> Path:
    """The dataset as a local file, downloaded where it is a URL or nothing was named."""
    url = name or PERSONACHAT_URL
    return download(url, "pass --dataset_path a local file") if is_url(url) else typed_path(name)


def load_personas(name: str) -> list[list[str]]:
    """The non-empty personas of a dataset, all splits, without tokenising anything."""
    personas = [dialog.personality for dialogs in read_dataset(name).values() for dialog in dialogs]
    personas = [persona for persona in personas if persona]
    if not personas:
        raise UserError(f"{name or 'PersonaChat'} holds no persona; pass --personality 'i like cats.'")
    return personas


SPLIT_SEED = 0  # fixed, so that training and evaluation hold out the same dialogs


def split_dialogs(name: str | None, valid_name: str) -> dict[str, Iterable[Dialog]]:
    """The dialogs of "train" and "valid"; a validation split is cut off by dialog where there is none."""
    splits = {} if name is None else read_dataset(name)
    if valid_name:
        held_out = read_dataset(valid_name)
        valid = held_out.get("valid") or held_out.get("all") or held_out["train"]
        return {"train": splits.get("train") or splits.get("all") or [], "valid": valid}
    if "valid" in splits:
        return {"train": splits.get("train", []), "valid": splits["valid"]}
    dialogs = list(next(iter(splits.values())))
    if len(dialogs) < 2:
        raise UserError(
            f"{name} holds {len(dialogs)} dialog; expected one to train on and one to validate on, or --valid_path"
        )
    held_out = np.random.default_rng(SPLIT_SEED).permutation(len(dialogs))[: max(1, min(len(dialogs) // 10, 500))]
    log.info(f"{name} has no validation split: {len(held_out)} of its {len(dialogs)} dialogs are held out for it")
    chosen = set(held_out.tolist())
    return {
        "train": [dialog for i, dialog in enumerate(dialogs) if i not in chosen],
        "valid": [dialog for i, dialog in enumerate(dialogs) if i in chosen],
    }


def training_texts(name: str, valid_name: str) -> Iterator[str]:
    """Every text of the training split, for learning a vocabulary."""
    for dialog in split_dialogs(name, valid_name)["train"]:
        yield from dialog.personality
        for utterance in dialog.utterances:
            yield from utterance.history[-1:]
            yield utterance.candidates[-1]


MAX_MESSAGE = 2000  # characters that a person may say at once: about a page, and more than a model sees


def check_message(text: str) -> str:
    """`text` as it can be answered. Raises UserError where it is empty or too long."""
    text = text.strip()
    if not text:
        raise UserError("the message is empty; type something")
    if len(text) > MAX_MESSAGE:
        raise UserError(f"the message has {len(text)} characters; expected at most {MAX_MESSAGE}, so shorten it")
    return text
