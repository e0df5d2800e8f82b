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
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec

from cli import UserError, explain_errors
from messengers import messenger_of
from records import (
    FORMATS,
    NO_JSON,
    Fields,
    dialog_of,
    holds_dialog,
    is_turn,
    keys_found,
    message_in,
    persona_in,
    reader_of,
)
from turns import Dialog, Message, Notes, dialog_from, warn_once

Content = bytes | mmap.mmap  # of a file
Rows = Iterator[tuple[str, Any]]  # records, decoded or as JSON, each after its place for messages


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
    if data[:4] == b"PAR1":
        rows = parquet_rows
    elif PARLAI.match(line):
        return {"all": Lazy(partial(read_parlai, path, data))}
    elif is_json_lines(line):
        rows = lines_of
    elif re.match(rb"[{[]", line):
        return read_json(path, data)
    elif is_table(line):
        rows = table_rows
    else:
        raise UserError(f"{path}: begins with {bytes(line[:20])!r}; {FORMATS}")
    return {"all": lazy_records(path, rows, path, data)}


def lazy_records(path: Path, rows: Callable[..., Rows], *source: Any, split: str = "") -> Lazy:
    """The dialogs of the records that `rows` makes of its source."""
    return Lazy(lambda: dialogs_in(path, rows(*source)), split)


def reading(place: str) -> AbstractContextManager:
    """Name the place of what cannot be read, and what was expected there."""
    return explain_errors(place, FORMATS, *NO_JSON)


def lines_of(path: Path, data: Content) -> Iterator[tuple[str, bytes]]:
    """The lines that are not blank, each after its place for messages: of JSON lines, the records."""
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
            record = row if isinstance(row, dict) else decode(row, dict[str, Any] | list[Any])
            fields = Fields(record if isinstance(record, dict) else {"dialog": record}, notes=notes)
            name = fields.get("id")
            if is_turn(fields):
                conversations.setdefault(str(name), []).append((fields, place))
                continue
            dialog = dialog_of(fields)
        if last and dialog.personality == last.personality:
            same_name = name is not None and name == last_name
            if same_name or goes_on(last, dialog):
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
    if not dialog.utterances or not other.utterances:
        return False
    said = dialog.turns
    return other.utterances[0].history[: len(said)] == said


def conversation(turns: list[tuple[Fields, str]], notes: Notes) -> Dialog:
    """A dialog of which each turn is a record, by the numbers of the turns where all have one."""
    numbers = [str(fields.get("place", 0)) for fields, _ in turns]
    if all(number.isdecimal() for number in numbers):
        order = sorted(range(len(turns)), key=lambda i: int(numbers[i]))
        turns = [turns[i] for i in order]
    personality, messages = [], []
    for fields, place in turns:
        with reading(place):
            persona = persona_in(fields)  # of every turn: what is not asked for counts as not read
            personality = personality or persona
            messages.append(message_in(fields))
    return dialog_from(personality, messages, notes)


# ------------------------------------------------------------------------------------------------------------
# JSON
# ------------------------------------------------------------------------------------------------------------


def is_json_lines(line: bytes | memoryview) -> bool:
    """Whether the first line is an object that is no document of splits or of a list."""
    fields = Fields(object_in(line))
    if holds_dialog(fields):
        return True
    is_document = any(map(fields.has, ("train", "valid", "all", "rows")))
    return bool(fields.record) and not is_document


def is_record(line: bytes | memoryview) -> bool:
    """Whether a line is a JSON object with a dialog in it, or with a turn of one."""
    return holds_dialog(Fields(object_in(line)))


def object_in(line: bytes | memoryview) -> dict[str, msgspec.Raw]:
    """The keys of a line that is a JSON object; none where it is something else."""
    try:
        return decode(line, dict[str, msgspec.Raw])
    except NO_JSON:
        return {}


def read_json(path: Path, data: Content) -> Splits:
    """A list of records, an object that holds such a list, maybe one for each split, or one record."""
    with reading(str(path)):
        found = decode(data, list[msgspec.Raw] | dict[str, msgspec.Raw])
    if isinstance(found, list):
        return {"all": lazy_records(path, list_rows, path, "$", found)}
    fields = Fields(found)
    keys, rows = name_splits(found, path), fields.key("rows")
    if not keys and rows and holds_records(found[rows]):
        keys = {"all": rows}
    splits = {}
    for split, key in keys.items():
        with reading(f"{path}, $.{key}"):
            records = decode(found[key], list[msgspec.Raw])
        splits[split] = lazy_records(path, list_rows, path, f"$.{key}", records, split=key)
    if splits:
        return splits
    if reader_of(fields) is None:
        raise UserError(f"{path}: has the keys {keys_found(found)}, expected train and valid; {FORMATS}")
    return {"all": lazy_records(path, iter, [(f"{path}, $", data[:])])}


def holds_records(value: msgspec.Raw) -> bool:
    """Whether a value is a list of records, and not of a dialog's turns."""
    return re.match(rb"\[\s*\{", value) is not None and is_record(decode(value, list[msgspec.Raw])[0])


def list_rows(path: Path, where: str, records: list[msgspec.Raw]) -> Rows:
    for i, record in enumerate(records):
        yield f"{path}, {where}[{i}]", record


def name_splits(found: Iterable[str], path: Path) -> dict[str, str]:
    """Which of the names that were found is "train", "valid" or "all". Others are named, as they are not read."""
    names = Fields(dict.fromkeys(found))
    splits = {split: names.key(split) for split in ("train", "valid", "all") if names.has(split)}
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
    return len(header) > 1 and holds_dialog(Fields(dict.fromkeys(filter(None, header))))


def delimiter_of(line: bytes) -> str:
    return max("\t,;", key=lambda delimiter: line.count(delimiter.encode()))


def table_rows(path: Path, data: Content) -> Rows:
    """CSV or TSV, its columns named in the first line."""
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


def parquet_rows(path: Path, data: Content) -> Rows:
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError(f"{path} is parquet, for which a package is missing: pip install -r requirements-data.txt")
    from pyarrow import ArrowException, BufferReader
    from pyarrow.parquet import ParquetFile

    with explain_errors(f"cannot read {path}", "expected a whole parquet file", ArrowException, OSError):
        batches = ParquetFile(BufferReader(data)).iter_batches(1000)
        rows = chain.from_iterable(batch.to_pylist() for batch in batches)
        for i, row in enumerate(rows):
            yield f"{path}, row {i}", row


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
    said, right = parlai_texts([text]), parlai_texts(labels.split("|"))
    messages = [Message("user", *said)] if said else []
    if right:
        distractors = parlai_texts(candidates.split("|"))
        messages.append(Message("assistant", right[0], distractors=distractors, alternatives=right[1:]))
    return number, messages, ends


def parlai_texts(texts: list[str]) -> list[str]:
    """Those of some texts that are not blank, without the escapes that ParlAI writes for line breaks."""
    return [text.strip().replace("\\n", "\n") for text in texts if text.strip()]
