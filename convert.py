"""Make training data of a messenger's exported chat: the model learns to write as one of its people."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise

from cli import UserError, explain_errors, log, run_script
from files import typed_path, whole_files
from messengers import EXPORTS, LEFT_OUT, Message, messenger_of, read_export
from options import Parser, Settings, option
from turns import joined_turns


@dataclass(frozen=True)
class ConversionSettings(Settings):
    """Options of convert.py."""

    chat: str = option("", f"an exported chat: {EXPORTS}")
    me: str = option("", "the name, in the chat, of who the model learns to write as")
    output: str = option("my_chats.jsonl", "the file for the dialogs, as JSON lines")
    pause: float = option(8.0, "hours without a message after which another dialog begins", low=0.0)


def read_messages(name: str) -> list[Message]:
    """The messages of an exported chat, in order, without those that hold no text."""
    if not name:
        raise UserError("no --chat is given; expected the file that a messenger exported, such as --chat result.json")
    path = typed_path(name)
    with explain_errors(f"cannot read {path}", "expected an exported chat", OSError, UnicodeDecodeError):
        text = path.read_text(encoding="utf-8-sig")
    messenger = messenger_of(text[:5000])
    if not messenger:
        raise UserError(f"{path} is no export that is known here; expected {EXPORTS}")
    expected = f"expected an export of {messenger} as it writes them"
    with explain_errors(
        f"cannot read {path}", expected, KeyError, ValueError, TypeError, AttributeError, OverflowError
    ):
        messages = [message for message in read_export(messenger, text) if message.text.strip() and message.name]
    kept = [message for message in messages if not LEFT_OUT.match(message.text)]
    log.info(f"{path}: {len(kept)} messages of {messenger}, {len(messages) - len(kept)} left out that hold no text")
    return sorted(kept, key=lambda message: message.time)


def split_at_pauses(messages: list[Message], pause: timedelta) -> Iterator[list[Message]]:
    """The messages of each dialog: another one begins where nobody wrote for so long."""
    dialog = messages[:1]
    for before, message in pairwise(messages):
        if message.time - before.time > pause:
            yield dialog
            dialog = []
        dialog.append(message)
    yield dialog


def dialog_of(messages: list[Message], me: str) -> list[dict[str, str]]:
    """A dialog in OpenAI's form. All people but `me` are one side."""
    turns = [("assistant" if message.name == me else "user", " ".join(message.text.split())) for message in messages]
    return [{"role": role, "content": text} for role, text, _ in joined_turns(turns)]


def main() -> None:
    settings = ConversionSettings.from_args(Parser(__doc__, ConversionSettings).parse_args())
    messages = read_messages(settings.chat)
    names = Counter(message.name for message in messages)
    if settings.me not in names:
        known = ", ".join(f"'{name}' ({count})" for name, count in names.most_common(10)) or "nobody"
        raise UserError(
            f"--me '{settings.me}' wrote nothing in {settings.chat}; expected one of those who did: {known}"
        )
    pause = timedelta(hours=settings.pause)
    dialogs = [dialog_of(dialog, settings.me) for dialog in split_at_pauses(messages, pause)]
    # A reply to nobody, or nobody's reply, teaches nothing.
    useful = [dialog for dialog in dialogs if {message["role"] for message in dialog} == {"user", "assistant"}]
    path = typed_path(settings.output)
    with whole_files(path.parent) as partial:
        lines = [json.dumps({"messages": dialog}, ensure_ascii=False) + "\n" for dialog in useful]
        (partial / path.name).write_text("".join(lines), encoding="utf-8")
    replies = sum(message["role"] == "assistant" for dialog in useful for message in dialog)
    log.info(f"{len(useful)} dialogs with {replies} messages of {settings.me} in {path}")
    log.info(f"train on them: python train.py --model smollm2 --lora 16 --dataset_path {path}")


if __name__ == "__main__":
    run_script(main)
