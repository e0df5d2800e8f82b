"""What a file of dialogs may look like: what it begins with tells its format, whose reader makes dialogs of it.

Read are parquet, both of ParlAI's forms of text, JSON lines, JSON, and tables (CSV, TSV). All but ParlAI's are records,
of which records.py makes dialogs.
"""

import csv
import importlib.util
import io
import mmap
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from cli import UserError, explain_errors
from messengers import messenger_of
from records import (
    FORMATS,
    NO_JSON,
    SYNONYMS,
    Fields,
    dialog_of,
    is_turn,
    keys_found,
    message_in,
    persona_in,
    reader_of,
)
from turns import Dialog, Message, Notes, dialog_from, normal, warn_once

Content = bytes | mmap.mmap  # of a file
Rows = Iterable[tuple[str, Any]]  # records, decoded or as JSON, each after its place for messages


@dataclass(frozen=True)
class Lazy:
    """Dialogs that are parsed anew in every loop over them: a large file never stands in memory as Python objects."""

    parse: Callable[[], Iterator[Dialog]]
    split: str = ""  # as the file calls it

    def __iter__(self) -> Iterator[Dialog]:
        return self.parse()


Splits = dict[str, Lazy]  # "train" and "valid", or "all" of a file without splits


def read_content(path: Path, data: Content) -> Splits:
    """The dialogs in a file by split. Raises UserError where its format is none that is known."""
    messenger = messenger_of(bytes(data[:5000]).decode(errors="replace"))
    if messenger:
        raise UserError(
            f"{path} is an export of {messenger}, which does not say who of its people the bot is; "
            f"convert it first: python convert.py --chat {path} --me NAME"
        )
    start, end = re.search(rb"\S.*|\Z", data).span()  # of the first line that is not blank
    line = memoryview(data)[start:end]  # a view, as the line may be the whole file
    read = None
    if data[:4] == b"PAR1":
        read = read_parquet
    elif PARLAI.match(line):
        read = read_parlai
    elif is_json_lines(line):
        read = read_json_lines
    elif re.match(rb"[{[]", line):
        return read_json(path, data)
    elif is_table(line):
        read = read_table
    if read is None:
        raise UserError(f"{path}: begins with {bytes(line[:20])!r}; {FORMATS}")
    return {"all": Lazy(partial(read, path, data))}


def reading(place: str) -> AbstractContextManager:
    """Name the place of what cannot be read, and what was expected there."""
    return explain_errors(place, FORMATS, *NO_JSON)


def lines_of(path: Path, data: Content) -> Iterator[tuple[str, bytes]]:
    """The lines that are not blank, each after its place for messages."""
    for count, line in enumerate(re.finditer(rb".*\n?", data), 1):
        if line[0].strip():
            yield f"{path}, line {count}", line[0]


# ------------------------------------------------------------------------------------------------------------
# From records to dialogs
# ------------------------------------------------------------------------------------------------------------

# An escaped pair of surrogates (one emoji), half of one, or another escape.
ESCAPE = re.compile(rb"\\(?:u[dD][89abAB]..\\u[dD][c-fC-F]|(u[dD][89a-fA-F][0-9a-fA-F]{2})|.)", re.DOTALL)


def decode(data: bytes | memoryview | msgspec.Raw, kind: Any = dict[str, Any]) -> Any:
    """`data` as JSON. Half an emoji, as JavaScript cuts them, is U+FFFD."""
    try:
        return msgspec.json.decode(data, type=kind)
    except NO_JSON:
        mended = ESCAPE.sub(lambda found: b"\\ufffd" if found[1] else found[0], bytes(data))
        if mended == data:
            raise
        return msgspec.json.decode(mended, type=kind)


def dialogs_in(path: Path, rows: Rows) -> Iterator[Dialog]:
    """The dialogs of records. Those that are one turn or one reply of a conversation are put together."""
    notes = Notes()
    conversations: dict[str, list[tuple[Fields, str]]] = {}  # of which each turn is a record, after its name
    last, last_name = None, None
    for place, row in rows:
        with reading(place):
            fields = Fields(row if isinstance(row, dict) else decode(row))
            name = fields.get("id")
            if is_turn(fields):
                conversations.setdefault(str(name), []).append((fields, place))
                continue
            dialog = dialog_of(fields, notes)
        named = name is not None and name == last_name
        if last and (goes_on(last, dialog) or (named and dialog.personality == last.personality)):
            last.utterances += dialog.utterances
            continue
        if last:
            yield last
        last, last_name = dialog, name
    if last:
        yield last
    for turns in conversations.values():
        yield conversation(turns, notes)
    notes.say(path)


def goes_on(dialog: Dialog, other: Dialog) -> bool:
    """Whether `other` begins with all of `dialog`: each line of a transcript is the next reply of one chat."""
    if not dialog.utterances or not other.utterances or dialog.personality != other.personality:
        return False
    last, longer = dialog.utterances[-1], other.utterances[0].history
    said = [*last.history, last.candidates[-1]]
    return len(longer) >= len(said) and longer[: len(said)] == said


def conversation(turns: list[tuple[Fields, str]], notes: Notes) -> Dialog:
    """A dialog of which each turn is a record, by the numbers of the turns where all have one."""
    numbers = [str(fields.get("place", 0)) for fields, _ in turns]
    if all(map(str.isdecimal, numbers)):
        turns = [turns[i] for i in sorted(range(len(turns)), key=lambda i: int(numbers[i]))]
    personality, messages = [], []
    for fields, place in turns:
        with reading(place):
            persona = persona_in(fields)
            messages.append(message_in(fields, notes))
        personality = personality or persona
    return dialog_from(personality, messages, notes)


# ------------------------------------------------------------------------------------------------------------
# JSON
# ------------------------------------------------------------------------------------------------------------


def is_json_lines(line: bytes | memoryview) -> bool:
    """Whether the first line is an object that is no document of splits or of a list."""
    found = object_in(line)
    documents = SYNONYMS["training split"] + SYNONYMS["validation split"] + SYNONYMS["rows"] + ["all"]
    return is_record(line) or (bool(found) and not any(normal(key) in documents for key in found))


def is_record(line: bytes | memoryview) -> bool:
    """Whether a line is a JSON object with a dialog in it, or with a turn of one."""
    fields = Fields(object_in(line))
    return reader_of(fields) is not None or is_turn(fields)


def object_in(line: bytes | memoryview) -> dict[str, msgspec.Raw]:
    """The keys of a line that is a JSON object; none where it is something else."""
    try:
        return decode(line, dict[str, msgspec.Raw])
    except NO_JSON:
        return {}


def read_json_lines(path: Path, data: Content) -> Iterator[Dialog]:
    return dialogs_in(path, lines_of(path, data))


def read_json(path: Path, data: Content) -> Splits:
    """A list of records, an object that holds such a list, maybe one for each split, or one record."""
    with reading(str(path)):
        found = decode(data, list[msgspec.Raw] | dict[str, msgspec.Raw])
    if isinstance(found, list):
        return {"all": Lazy(partial(read_list, path, "$", found))}
    fields = Fields(found)
    keys, rows = name_splits(found, path), fields.key("rows")
    if not keys and rows and holds_records(found[rows]):
        keys = {"all": rows}
    if keys:
        return {split: list_under(path, key, found[key]) for split, key in keys.items()}
    if reader_of(fields) is None:
        raise UserError(f"{path}: has the keys {keys_found(found)}, expected train and valid; {FORMATS}")
    return {"all": Lazy(partial(dialogs_in, path, [(f"{path}, $", data[:])]))}


def holds_records(value: msgspec.Raw) -> bool:
    """Whether a value is a list of records, and not of a dialog's turns."""
    return re.match(rb"\[\s*\{", value) is not None and is_record(decode(value, list[msgspec.Raw])[0])


def list_under(path: Path, key: str, value: msgspec.Raw) -> Lazy:
    with reading(f"{path}, $.{key}"):
        return Lazy(partial(read_list, path, f"$.{key}", decode(value, list[msgspec.Raw])), key)


def read_list(path: Path, where: str, records: list[msgspec.Raw]) -> Iterator[Dialog]:
    return dialogs_in(path, ((f"{path}, {where}[{i}]", record) for i, record in enumerate(records)))


def name_splits(found: Iterable[str], path: Path) -> dict[str, str]:
    """Which of the names that were found is "train", "valid" or "all". Others are named, as they are not read."""
    words = {normal(name): name for name in found}
    synonyms = {"train": SYNONYMS["training split"], "valid": SYNONYMS["validation split"], "all": ["all"]}
    splits = {}
    for split, names in synonyms.items():
        present = [words[name] for name in names if name in words]
        if present:
            splits[split] = present[0]
    others = [name for name in found if name not in splits.values()]
    if splits and others:
        read = ", ".join(splits.values())
        warn_once(f"warning: {path}: of its splits {read} are read, and {keys_found(others)} are not")
    return splits


# ------------------------------------------------------------------------------------------------------------
# Tables
# ------------------------------------------------------------------------------------------------------------


def is_table(line: bytes | memoryview) -> bool:
    """Whether the first line names columns that hold a dialog, or a turn of one."""
    try:
        header = next(csv.reader([bytes(line[:10_000]).decode()], delimiter=delimiter_of(bytes(line))), [])
    except (UnicodeDecodeError, csv.Error):
        return False
    fields = Fields(dict.fromkeys(filter(None, header)))
    return len(header) > 1 and (reader_of(fields) is not None or is_turn(fields))


def delimiter_of(line: bytes) -> str:
    return max("\t,;", key=lambda delimiter: line.count(delimiter.encode()))


def read_table(path: Path, data: Content) -> Iterator[Dialog]:
    """CSV or TSV, its columns named in the first line."""
    return dialogs_in(path, table_rows(path, data))


def table_rows(path: Path, data: Content) -> Rows:
    csv.field_size_limit(2**31 - 1)  # a cell may hold a dialog
    delimiter = delimiter_of(data[: data.find(b"\n") + 1 or len(data)])
    lines = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8", newline="")
    reader = csv.DictReader(lines, delimiter=delimiter)
    while True:
        with explain_errors(f"{path}, line {reader.line_num + 1}", FORMATS, csv.Error, ValueError):
            row = next(reader, None)
        if row is None:
            return
        place = f"{path}, line {reader.line_num}"
        if any(row.pop(None, ())):  # else a text that is cut at a comma would be learned in part
            raise UserError(f"{place}: has more cells than there are columns; expected quotes around texts with commas")
        yield place, {name: cell for name, cell in row.items() if name}


def read_parquet(path: Path, data: Content) -> Iterator[Dialog]:
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError(f"{path} is parquet, for which a package is missing: pip install -r requirements-data.txt")
    return dialogs_in(path, ((f"{path}, row {i}", row) for i, row in enumerate(parquet_rows(path, data))))


def parquet_rows(path: Path, data: Content) -> Iterator[dict[str, Any]]:
    from pyarrow import ArrowException, BufferReader
    from pyarrow.parquet import ParquetFile

    with explain_errors(f"cannot read {path}", "expected a whole parquet file", ArrowException, OSError):
        for batch in ParquetFile(BufferReader(data)).iter_batches(1000):
            yield from batch.to_pylist()


# ------------------------------------------------------------------------------------------------------------
# ParlAI
# ------------------------------------------------------------------------------------------------------------

# `text:...<TAB>labels:...`, where episode_done ends a dialog.
PARLAI_FIELDS = re.compile(rb"(?:\w+:[^\t\n]*\t)*(?:text|labels|eval_labels):")
# That, or `1 text<TAB>labels<TAB>reward<TAB>candidates`, where a number that falls back begins a dialog.
PARLAI = re.compile(rb"\d|" + PARLAI_FIELDS.pattern)


def read_parlai(path: Path, data: Content) -> Iterator[Dialog]:
    notes = Notes()
    for messages in parlai_episodes(path, data):
        dialog = dialog_from([], messages, notes)
        if dialog.personality or dialog.utterances:
            yield dialog
    notes.say(path)


def parlai_episodes(path: Path, data: Content) -> Iterator[list[Message]]:
    messages, last = [], 0
    for place, line in lines_of(path, data):
        number, said, ends = parlai_line(place, line)
        if 0 < number <= last:
            yield messages
            messages = []
        messages, last = messages + said, number
        if ends:
            yield messages
            messages = []
    yield messages


def parlai_line(place: str, line: bytes) -> tuple[int, list[Message], bool]:
    """The number of a line (0: it has none), what both sides say in it, and whether it ends its dialog."""
    try:
        content = line.decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not UTF-8 ({error.reason}); save the file as UTF-8") from error
    number, ends = 0, False
    if PARLAI_FIELDS.match(line):
        fields = dict(field.partition(":")[::2] for field in content.split("\t"))
        text, labels = fields.get("text", ""), fields.get("labels") or fields.get("eval_labels", "")
        candidates, ends = fields.get("label_candidates", ""), fields.get("episode_done", "").strip() == "True"
    else:
        digits, _, content = content.partition(" ")
        if not digits.isdecimal() or len(digits) > 9:
            raise UserError(f"{place}: expected a line number first, found '{digits[:20]}'; {FORMATS}")
        number = int(digits)
        text, labels, _, candidates = (*content.split("\t"), "", "", "")[:4]
    text, labels, candidates = (
        [part.strip().replace("\\n", "\n") for part in parts if part.strip()]
        for parts in ([text], labels.split("|"), candidates.split("|"))
    )
    messages = [Message("user", *text)] if text else []
    if labels:
        messages.append(Message("assistant", labels[0], distractors=candidates, alternatives=labels[1:]))
    return number, messages, ends
