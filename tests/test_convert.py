"""Exports of messengers become dialogs of one of their people."""

import json
import sys
from datetime import datetime

import pytest

import convert
import messengers
from cli import UserError
from dialogs import read_dataset

ANDROID = """\
31.12.20, 22:14 - Messages and calls are end-to-end encrypted.
31.12.20, 22:15 - Anna: happy new
year: soon!
31.12.20, 22:16 - Ben: you too
31.12.20, 22:17 - Ben: <Media omitted>
31.12.20, 22:17 - Ben: where are you?
01.01.21, 12:00 - Ben: hello?
01.01.21, 12:01 - Anna: asleep
01.01.21, 12:02 - Ben: ok
"""
IPHONE = """\
[12/31/20, 10:15:30 PM] Anna: happy new
year: soon!
[12/31/20, 10:16:00 PM] Ben: you too
\u200e[12/31/20, 10:16:30 PM] Ben: \u200eimage omitted
[12/31/20, 10:17:00 PM] Ben: where are you?
[1/1/21, 12:00:00 PM] Ben: hello?
[1/1/21, 12:01:00 PM] Anna: asleep
[1/1/21, 12:02:00 PM] Ben: ok
"""
SAID = [
    ("2020-12-31T22:15:00", "Anna", "happy new\nyear: soon!"),
    ("2020-12-31T22:16:00", "Ben", "you too"),
    ("2020-12-31T22:17:00", "Ben", "where are you?"),
    ("2021-01-01T12:00:00", "Ben", "hello?"),
    ("2021-01-01T12:01:00", "Anna", "asleep"),
    ("2021-01-01T12:02:00", "Ben", "ok"),
]
TELEGRAM = {
    "name": "Ben",
    "type": "personal_chat",
    "id": 1,
    "messages": [
        {"id": 0, "type": "service", "date": "2020-12-31T22:00:00", "actor": "Ben", "text": ""},
        *({"id": 1, "type": "message", "date": time, "from": name, "text": text} for time, name, text in SAID[:-1]),
        {"id": 2, "type": "message", "date": SAID[-1][0], "from": "Ben", "text": ["o", {"type": "bold", "text": "k"}]},
    ],
}
ACCOUNT = {"about": "Here is the data you requested.", "chats": {"list": [TELEGRAM]}}
DISCORD = {
    "guild": {"name": "us"},
    "channel": {"name": "talk"},
    "messages": [
        {
            "timestamp": f"{time}.000+00:00",
            "type": "Default",
            "content": text,
            "author": {"name": name.lower(), "nickname": name},
        }
        for time, name, text in SAID
    ],
}


def milliseconds(time: str) -> int:
    return round(datetime.fromisoformat(f"{time}+00:00").timestamp() * 1000)


# The newest first, with UTF-8's bytes as characters; the second as encrypted chats are exported.
MESSENGER = {
    "participants": [{"name": "Anna"}, {"name": "Ben"}],
    "messages": [
        {
            "sender_name": "Ben",
            "timestamp_ms": milliseconds(SAID[-1][0]) + 1,
            "content": "Reacted \u00f0\u009f\u0098\u0086 to your message ",
        },
        *(
            {"sender_name": name, "timestamp_ms": milliseconds(time), "content": text}
            for time, name, text in reversed(SAID)
        ),
        {"sender_name": "Anna", "timestamp_ms": milliseconds(SAID[0][0]) - 1, "photos": [{"uri": "photos/1.jpg"}]},
    ],
    "title": "Ben",
}
ENCRYPTED = {
    "participants": ["Anna", "Ben"],
    "messages": [
        {"isUnsent": False, "senderName": name, "text": text, "timestamp": milliseconds(time), "type": "text"}
        for time, name, text in reversed(SAID)
    ],
    "threadName": "Ben_1",
}
DIALOGS = [
    [("user", "happy new year: soon!"), ("assistant", "you too where are you?")],
    [("assistant", "hello?"), ("user", "asleep"), ("assistant", "ok")],
]


def run(monkeypatch, *options) -> None:
    monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, options)])
    convert.main()


@pytest.mark.parametrize(
    "export",
    [
        ANDROID,
        IPHONE,
        json.dumps(TELEGRAM, indent=1),
        json.dumps({"about": "Here is the data you requested.", "chats": {"list": [TELEGRAM]}}),
        json.dumps(DISCORD),
        json.dumps(MESSENGER, indent=2),
        json.dumps(ENCRYPTED),
    ],
    ids=[
        "WhatsApp on Android",
        "WhatsApp on an iPhone",
        "Telegram",
        "a Telegram account",
        "Discord",
        "Messenger",
        "an encrypted chat of Messenger",
    ],
)
def test_what_a_person_wrote_becomes_the_replies_of_a_dataset(export, write, tmp_path, monkeypatch):
    run(monkeypatch, "--chat", write(export), "--me", "Ben", "--output", tmp_path / "chats.jsonl")
    lines = [json.loads(line)["messages"] for line in (tmp_path / "chats.jsonl").read_text().splitlines()]
    assert [[(turn["role"], turn["content"]) for turn in dialog] for dialog in lines] == DIALOGS
    dialogs = read_dataset(str(tmp_path / "chats.jsonl"))
    assert sum(len(dialog.utterances) for split in dialogs.values() for dialog in split) == 3


@pytest.mark.parametrize(
    ("export", "me", "line"),
    [
        (ANDROID, "Carl", "--me 'Carl' wrote nothing in .*: 'Ben' \\(4\\), 'Anna' \\(2\\)"),
        ("hello", "Ben", "is no export that is known here"),
        (json.dumps(TELEGRAM | {"messages": [{"type": "message"}]}), "Ben", "expected an export of Telegram"),
        ("31.12.20, 22:15 - Ben: hi\n99.99.20, 22:15 - Ben: hi", "Ben", "expected an export of WhatsApp"),
        (ANDROID.encode("utf-16"), "Ben", "expected an exported chat"),
    ],
)
def test_what_cannot_be_converted(export, me, line, write, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=line):
        run(monkeypatch, "--chat", write(export), "--me", me, "--output", tmp_path / "chats.jsonl")
    assert not (tmp_path / "chats.jsonl").exists()


@pytest.mark.parametrize("export", [ANDROID, IPHONE, *map(json.dumps, (TELEGRAM, DISCORD, MESSENGER))])
def test_an_export_as_a_dataset_is_named_as_what_it_is(export, write):
    with pytest.raises(
        UserError, match=r"is an export of (WhatsApp|Telegram|Discord|Messenger.*), .*python convert.py --chat"
    ):
        read_dataset(write(export))


def test_bytes_that_messenger_writes_as_characters_are_text_again():
    written = json.loads('"na\\u00c3\\u00afve \\u00f0\\u009f\\u0098\\u0086"')
    assert messengers.utf8_text(written) == "na\u00efve \U0001f606"
    assert messengers.utf8_text("na\u00efve \U0001f606") == "na\u00efve \U0001f606"
