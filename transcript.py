"""Chats as files: a transcript that grows by each turn, a chat that is saved, and the last dialog of a file."""

import contextlib
import json
import os
import shutil
from collections import deque
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from cli import UserError, explain_errors, log
from dialogs import read_dataset
from files import is_url, typed_path, whole_files
from formats import is_record


def check_dialogs(file: BinaryIO, name: str) -> None:
    """Refuse to write into a file that holds something else than dialogs in JSON lines."""
    file.seek(0)
    first = file.readline()
    if first.strip() and not is_record(first):
        raise UserError(f"{name} holds something else; expected a new file or dialogs in JSON lines")


def append_line(file: BinaryIO, record: dict) -> tuple[int, int]:
    """Write a record as the last line of a file open for reading and writing; where it begins and ends, in bytes."""
    line = json.dumps(record, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
    start = file.seek(0, os.SEEK_END)
    file.seek(max(start - 1, 0))
    if file.read() not in (b"", b"\n"):  # whoever wrote the line before did not end it
        line = b"\n" + line
    file.write(line)
    return start, start + len(line)


class Transcript:
    """A JSON lines file, each turn of the chat a line: a reply with its persona and history, for training.

    The readers of datasets make one dialog of the lines of one chat.
    """

    def __init__(self, name: str):
        self.path = typed_path(name)
        with self.opened() as file:
            check_dialogs(file, f"--transcript {name}")
        self.lines: list[tuple[int, int]] = []  # where the lines of this chat begin and end, in bytes

    @contextlib.contextmanager
    def opened(self) -> Iterator[BinaryIO]:
        """The file; where writing fails, it is left as it was."""
        end = None  # where it ended before
        with explain_errors(f"cannot write --transcript {self.path}", "choose a file you can", OSError):
            try:
                with open(self.path, "a+b") as file:
                    end = file.seek(0, os.SEEK_END)
                    yield file
            except OSError:  # also of the close, which writes what is still in the buffer
                if end is not None:
                    with contextlib.suppress(OSError):  # what cannot be written may not be truncated either
                        os.truncate(self.path, end)
                raise

    def add(self, chat) -> None:
        """Write the last turn of a `Conversation`."""
        *history, reply = chat.history
        record = {"personality": chat.persona, "utterances": [{"history": history, "candidates": [reply]}]}
        with self.opened() as file:
            line = append_line(file, record)
        self.lines.append(line)

    def take_back(self) -> None:
        """Drop the last line: its turn was undone. It stays where another chat has written after it."""
        if self.lines:
            start, end = self.lines.pop()
            with self.opened() as file:
                if file.seek(0, os.SEEK_END) == end:
                    file.truncate(start)
                else:
                    log.warning(f"warning: another chat writes to {self.path} too, so the turn stays in it")

    def end_chat(self) -> None:
        """What was said so far stays: the next line is of another chat."""
        self.lines = []


class SavedChat:
    """The file that a chat was saved in, as its last line. Saved again, the chat takes the place of that line."""

    def __init__(self, name: str):
        # The file that a link leads to: it is replaced, the link is not. What is no file (a folder, a device) stays.
        self.path = Path(os.path.realpath(typed_path(name)))
        if not os.path.isdir(self.path.parent):  # pathlib's own raise for a name that is too long
            raise UserError(f"no such folder: {self.path.parent}; make it first, or choose another")
        if os.path.exists(self.path) and not os.path.isfile(self.path):
            raise UserError(f"{name} is not a file; choose another name")
        self.line: tuple[int, int] | None = None  # where the chat begins and ends, in bytes; None: not written yet

    def write(self, record: dict) -> None:
        """Add the chat to what the file holds. The file is replaced: a failure leaves it as it was."""
        with whole_files(self.path.parent) as partial, open(partial / self.path.name, "w+b") as file:
            if os.path.exists(self.path):
                with open(self.path, "rb") as before:
                    check_dialogs(before, str(self.path))
                    before.seek(0)
                    shutil.copyfileobj(before, file)
                if self.line and file.tell() == self.line[1]:  # nobody else has written after it
                    file.truncate(self.line[0])
            line = append_line(file, record)
            file.flush()  # before it is moved
        self.line = line


def last_dialog(name: str) -> tuple[list[str], list[str]]:
    """Persona and utterances of the last dialog in a file of any format that the toolkit reads."""
    if not is_url(name) and not os.path.exists(typed_path(name)):
        raise UserError(f"no such file: {name}; expected one that /save wrote, or another dataset")
    last = deque(chain.from_iterable(read_dataset(name).values()), maxlen=1)
    if not last:
        raise UserError(f"{name} holds no dialog; choose another file")
    (dialog,) = last
    return dialog.personality, dialog.turns
