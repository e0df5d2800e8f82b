"""What a file of dialogs may look like: a table tells the formats apart, a reader makes dialogs of each."""

import csv
import importlib.util
import io
import mmap
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from cli import UserError, explain_errors
from messengers import messenger_of
from records import (
    FORMATS,
    NO_JSON,
    SYNONYMS,
    Dialog,
    Fields,
    Notes,
    Turn,
    dialog_from,
    dialog_of,
    is_turn,
    keys_found,
    normal,
    persona_in,
    reader_of,
    said,
    turns_of,
    warn_once,
)


@dataclass(frozen=True)
class Lazy:
    """Dialogs that are parsed anew in every loop over them: a large file never stands in memory as Python objects."""

    parse: Callable[[], Iterator[Dialog]]
    split: str = ""  # as the file calls it

    def __iter__(self) -> Iterator[Dialog]:
        return self.parse()


Content = bytes | mmap.mmap  # of a file
Splits = dict[str, Lazy]  # "train" and "valid", or "all" of a file without splits
Rows = Iterable[tuple[str, Any]]  # records, decoded or as JSON, each after its place for messages


def lines_of(path: Path, data: Content) -> Iterator[tuple[str, bytes]]:
    """The lines that are not blank, each after its place for messages."""
    for count, line in enumerate(re.finditer(rb".*\n?", data), 1):
        if line[0].strip():
            yield f"{path}, line {count}", line[0]


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
    notes, conversations = Notes(), {}
    last, last_id = None, None
    for place, row in rows:
        with explain_errors(place, FORMATS, *NO_JSON):
            record = row if isinstance(row, dict) else decode(row)
            fields = Fields(record)
            if reader_of(fields) is None and is_turn(fields):
                conversations.setdefault(str(fields.get("id")), []).append((fields.get("place", 0), fields, place))
                continue
            dialog, name = dialog_of(record, notes), fields.get("id")
        if last and (
            goes_on(last, dialog) or (name is not None and (name, dialog.personality) == (last_id, last.personality))
        ):
            last.utterances += dialog.utterances
            continue
        if last:
            yield last
        last, last_id = dialog, name
    if last:
        yield last
    for turns in conversations.values():
        yield conversation(turns, notes)
    notes.say(path)


def goes_on(dialog: Dialog, other: Dialog) -> bool:
    """Whether `other` begins with all of `dialog`: each line of a transcript is the next reply of one chat."""
    if not dialog.utterances or not other.utterances or dialog.personality != other.personality:
        return False
    last, first = dialog.utterances[-1], other.utterances[0].history
    return len(first) > len(last.history) and first[: len(last.history) + 1] == [*last.history, last.candidates[-1]]


def conversation(rows: list[tuple[Any, Fields, str]], notes: Notes) -> Dialog:
    """A dialog of which each turn is a record."""
    if all(isinstance(number, int) or str(number).isdecimal() for number, _, _ in rows):
        rows = sorted(rows, key=lambda row: int(row[0]))
    personality, messages = [], []
    for _, fields, place in rows:
        with explain_errors(place, FORMATS, *NO_JSON):
            messages.append(said(fields.record, "$", notes))
            personality = personality or persona_in(fields)
    of_system, turns = turns_of(messages, notes)
    return dialog_from(personality + of_system, turns, notes)


def read_json_lines(path: Path, data: Content) -> Splits:
    return {"all": Lazy(lambda: dialogs_in(path, lines_of(path, data)))}


def read_json(path: Path, data: Content) -> Splits:
    """A list of records, an object that holds such a list, maybe one for each split, or one record."""
    with explain_errors(str(path), FORMATS, *NO_JSON):
        found = decode(data, list[msgspec.Raw] | dict[str, msgspec.Raw])

    def list_at(place: str, records: list[msgspec.Raw]) -> Lazy:
        return Lazy(lambda: dialogs_in(path, ((f"{path}, {place}[{i}]", record) for i, record in enumerate(records))))

    if isinstance(found, list):
        return {"all": list_at("$", found)}
    splits = name_splits(found, path)
    if not splits:
        key = Fields(found).key("rows")
        if (
            key
            and re.match(rb"\[\s*\{", bytes(found[key])[:100])
            and is_record(decode(found[key], list[msgspec.Raw])[0])
        ):
            splits = {"all": key}
        elif reader_of(Fields(found)):
            return {"all": Lazy(lambda: dialogs_in(path, [(f"{path}, $", data[:])]))}
        else:
            raise UserError(f"{path}: has the keys {keys_found(found)}, expected train and valid; {FORMATS}")
    lists = {}
    for split, key in splits.items():
        with explain_errors(f"{path}, $.{key}", FORMATS, *NO_JSON):
            lists[split] = replace(list_at(f"$.{key}", decode(found[key], list[msgspec.Raw])), split=key)
    return lists


def name_splits(found: Iterable[str], path: Path) -> dict[str, str]:
    """Which of the names that were found is "train", which "valid". Others are named, as they are not read."""
    words = {normal(name): name for name in found}
    splits = {}
    for split, name in ("train", "training split"), ("valid", "validation split"):
        present = [words[word] for word in SYNONYMS[name] if word in words]
        if present:
            splits[split] = present[0]
    if "all" in words:
        splits["all"] = words["all"]
    others = [name for name in found if name not in splits.values()]
    if splits and others:
        read = ", ".join(splits.values())
        warn_once(f"warning: {path}: of its splits {read} are read, and {keys_found(others)} are not")
    return splits


def read_table(path: Path, data: Content) -> Splits:
    """CSV or TSV, its columns named in the first line."""
    delimiter = delimiter_of(data[: data.find(b"\n") + 1 or len(data)])

    def rows() -> Rows:
        csv.field_size_limit(2**31 - 1)  # a cell may hold a dialog
        lines = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8", newline="")
        reader = csv.DictReader(lines, delimiter=delimiter)
        while True:
            with explain_errors(f"{path}, line {reader.line_num + 1}", FORMATS, csv.Error, ValueError):
                row = next(reader, None)
            if row is None:
                return
            yield f"{path}, line {reader.line_num}", {key: value for key, value in row.items() if key}

    return {"all": Lazy(lambda: dialogs_in(path, rows()))}


def delimiter_of(line: bytes) -> str:
    return max("\t,;", key=lambda delimiter: line.count(delimiter.encode()))


def read_parquet(path: Path, data: Content) -> Splits:
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError(f"{path} is parquet, for which a package is missing: pip install -r requirements-data.txt")
    from pyarrow import ArrowException, BufferReader
    from pyarrow.parquet import ParquetFile

    def rows() -> Rows:
        with explain_errors(f"cannot read {path}", "expected a whole parquet file", ArrowException, OSError):
            for batch in ParquetFile(BufferReader(data)).iter_batches(1000):
                for row in batch.to_pylist():
                    yield str(path), row

    return {
        "all": Lazy(lambda: dialogs_in(path, ((f"{place}, row {i}", row) for i, (place, row) in enumerate(rows()))))
    }


# ParlAI's two forms of text: `1 text<TAB>labels<TAB>reward<TAB>candidates`, and `text:...<TAB>labels:...`, where a
# number that falls back, or episode_done, ends a dialog.


def read_parlai(path: Path, data: Content) -> Splits:
    return {"all": Lazy(lambda: parlai_dialogs(path, data))}


def parlai_dialogs(path: Path, data: Content) -> Iterator[Dialog]:
    notes, turns, last = Notes(), [], 0
    for place, line in lines_of(path, data):
        number, turn, ends = parlai_turn(place, line)
        if number and number <= last:
            yield from filter(None, [parlai_dialog(turns, notes)])
            turns = []
        turns += turn
        last = number
        if ends:
            yield from filter(None, [parlai_dialog(turns, notes)])
            turns, last = [], 0
    yield from filter(None, [parlai_dialog(turns, notes)])
    notes.say(path)


def parlai_dialog(turns: list[Turn], notes: Notes) -> Dialog | None:
    dialog = dialog_from([], turns, notes)
    return dialog if dialog.personality or dialog.utterances else None


PARLAI_FIELDS = re.compile(rb"(?:\w+:[^\t\n]*\t)*(?:text|labels|eval_labels):")


def parlai_turn(place: str, line: bytes) -> tuple[int, list[Turn], bool]:
    """The number of a line (0: it has none), what both speakers say in it, and whether it ends its dialog."""
    try:
        content = line.decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not UTF-8 ({error.reason}); save the file as UTF-8") from error
    if PARLAI_FIELDS.match(line):
        fields = dict(field.partition(":")[::2] for field in content.split("\t"))
        number, text = 0, fields.get("text", "")
        labels, candidates = fields.get("labels") or fields.get("eval_labels") or "", fields.get("label_candidates", "")
        ends = fields.get("episode_done", "").strip() == "True"
    else:
        digits, _, content = content.partition(" ")
        if not digits.isdecimal() or len(digits) > 9:
            raise UserError(f"{place}: expected a line number first, found '{digits[:20]}'; {FORMATS}")
        number, ends = int(digits), False
        text, labels, _, candidates = (*content.split("\t"), "", "", "")[:4]

    def texts(field: str) -> list[str]:
        return [part.strip().replace("\\n", "\n") for part in field.split("|") if part.strip()]

    turns = [Turn(False, text.strip().replace("\\n", "\n"))] if text.strip() else []
    if right := texts(labels):
        turns.append(Turn(True, right[0], distractors=texts(candidates), alternatives=right[1:]))
    return number, turns, ends


def is_record(line: bytes | memoryview) -> bool:
    """Whether a line is a JSON object with a dialog in it (JSON lines), not the start of a larger document."""
    fields = Fields(object_in(line))
    return reader_of(fields) is not None or is_turn(fields)


def object_in(line: bytes | memoryview) -> dict[str, msgspec.Raw]:
    """The keys of a line that is a JSON object; none where it is something else."""
    try:
        return decode(line, dict[str, msgspec.Raw])
    except NO_JSON:
        return {}


# ------------------------------------------------------------------------------------------------------------
# Telling formats apart
# ------------------------------------------------------------------------------------------------------------


def is_parquet(data: Content, line: bytes | memoryview) -> bool:
    return data[:4] == b"PAR1"


def is_parlai(data: Content, line: bytes | memoryview) -> bool:
    return bytes(line[:1]).isdigit() or PARLAI_FIELDS.match(line) is not None


def is_json_lines(data: Content, line: bytes | memoryview) -> bool:
    """Whether the first line is an object that is no document of splits or of a list."""
    if bytes(line[:1]) != b"{":
        return False
    found = object_in(line)
    return bool(found) and (is_record(line) or not is_document(found))


def is_document(found: dict[str, msgspec.Raw]) -> bool:
    names = SYNONYMS["training split"] + SYNONYMS["validation split"] + SYNONYMS["rows"] + ["all"]
    return any(normal(key) in names for key in found)


def is_json(data: Content, line: bytes | memoryview) -> bool:
    return bytes(line[:1]) in (b"{", b"[")


def is_table(data: Content, line: bytes | memoryview) -> bool:
    """Whether the first line names columns that hold a dialog, or a turn of one."""
    try:
        header = next(csv.reader([bytes(line[:10_000]).decode()], delimiter=delimiter_of(bytes(line))), [])
    except (UnicodeDecodeError, csv.Error):
        return False
    fields = Fields(dict.fromkeys(filter(None, header)))
    return len(header) > 1 and (reader_of(fields) is not None or is_turn(fields))


# The first that fits: (whether it is in a file's content and first line, its reader).
READERS: list[tuple[Callable[[Content, bytes | memoryview], bool], Callable[[Path, Content], Splits]]] = [
    (is_parquet, read_parquet),
    (is_parlai, read_parlai),
    (is_json_lines, read_json_lines),
    (is_json, read_json),
    (is_table, read_table),
]


def read_content(path: Path, data: Content) -> Splits:
    """The dialogs in a file by split. The format is told apart by content. Raises UserError where it is none."""
    start, end = re.search(rb"\S.*|\Z", data).span()  # of the first line that is not blank
    line = memoryview(data)[start:end]  # a view, as the line may be the whole file
    messenger = messenger_of(bytes(data[:5000]).decode(errors="replace"))
    if messenger:
        raise UserError(
            f"{path} is an export of {messenger}, which does not say who of its people the bot is; "
            f"convert it first: python convert.py --chat {path} --me NAME"
        )
    for fits, read in READERS:
        if fits(data, line):
            return read(path, data)
    raise UserError(f"{path}: begins with {bytes(line[:20])!r}; {FORMATS}")
