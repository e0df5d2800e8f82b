"""Exports of messengers: WhatsApp's text; JSON of Telegram, Messenger, Instagram, and of Discord by its exporter."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import msgspec


@dataclass(frozen=True)
class Message:
    time: datetime
    name: str  # of who wrote it
    text: str


# 31.12.20, 22:15 - Anna: hello     [12/31/20, 10:15:30 PM] Anna: hello
WHATSAPP = re.compile(
    r"^[\u200e\u200f]*\[?(\d{1,4})[./-](\d{1,2})[./-](\d{1,4}),?\s+(\d{1,2})[:.](\d{2})(?:[:.]\d{2})?\s*([ap]\.?m\.?)?"
    r"\]?\s*(?:-\s)?([^:]{1,60}):\s(.*)$",
    re.IGNORECASE,
)
# Lines that WhatsApp writes itself begin alike, without a name.
NOTICE = re.compile(r"^[\u200e\u200f]*\[?\d{1,4}[./-]\d{1,2}[./-]\d{1,4},?\s+\d{1,2}[:.]\d{2}")
LEFT_OUT = re.compile(
    r"^\u200e|^<.*>$|^null$|^This message was deleted$|^You deleted this message$"
    r"|^.{1,60} sent an attachment\.$|^Reacted .{1,20} to your message\s*$|^Liked a message$",
    re.IGNORECASE,
)


def read_whatsapp(text: str) -> Iterator[Message]:
    """The messages of an exported chat. A message of several lines goes on until the next that begins with a date."""
    found: list[tuple[tuple[str, ...], str, list[str]]] = []
    for line in text.splitlines():
        if match := WHATSAPP.match(line):
            *date, name, words = match.groups()
            found.append((tuple(part or "" for part in date), name.strip(), [words]))
        elif found and not NOTICE.match(line):
            found[-1][2].append(line)
    # Which of the first two numbers is the day depends on the phone: one that is above 12 in any line tells.
    month_first = any(int(date[1]) > 12 for date, _, _ in found) and not any(int(date[0]) > 12 for date, _, _ in found)
    for (first, second, third, hour, minute, half), name, lines in found:
        year, month, day = (first, second, third) if len(first) == 4 else (third, second, first)
        if month_first:
            month, day = first, second
        hours = int(hour) % 12 + 12 * half.lower().startswith("p") if half else int(hour)
        time = datetime(int(year) % 100 + 2000, int(month), int(day), hours, int(minute))
        yield Message(time, name, "\n".join(lines).strip())


def read_telegram(export: dict[str, Any]) -> Iterator[Message]:
    """The messages of `result.json`, of one chat or of an account's export with many."""
    chats = export.get("chats", {}).get("list", [export])
    for chat in chats:
        for message in chat.get("messages", []):
            text = message.get("text", "")
            if isinstance(text, list):  # pieces; those with a format of their own are objects
                text = "".join(piece if isinstance(piece, str) else piece.get("text", "") for piece in text)
            if message.get("type") == "message":
                yield Message(datetime.fromisoformat(message["date"]), str(message.get("from") or ""), text)


def read_discord(export: dict[str, Any]) -> Iterator[Message]:
    for message in export["messages"]:
        author = message["author"]
        time = datetime.fromisoformat(message["timestamp"]).replace(tzinfo=None)
        if message.get("type", "Default") in ("Default", "Reply"):
            yield Message(time, author.get("nickname") or author["name"], message["content"])


def read_meta(export: dict[str, Any]) -> Iterator[Message]:
    """The messages of Messenger and Instagram, which have the newest first. Encrypted chats have keys of their own."""
    for message in reversed(export["messages"]):
        name = message.get("sender_name") or message["senderName"]
        text = message.get("content") or message.get("text") or ""
        milliseconds = message.get("timestamp_ms") or message["timestamp"]
        time = datetime.fromtimestamp(milliseconds / 1000, UTC).replace(tzinfo=None)
        yield Message(time, utf8_text(name), utf8_text(text))


def utf8_text(text: str) -> str:
    """A text of which the export has each byte as a character; any other text as it is."""
    try:
        return text.encode("latin-1").decode()
    except UnicodeError:
        return text


# What can be read, for people.
EXPORTS = "WhatsApp's text, or the JSON of Telegram, Messenger, Instagram or DiscordChatExporter"
# How the start of each JSON export looks, and its reader.
JSON_EXPORTS = {
    "Messenger or Instagram": (
        re.compile(r'"sender_?name":\s*".*"timestamp|"timestamp.*"sender_?name"', re.I | re.S),
        read_meta,
    ),
    "Telegram": (
        re.compile(r'"type":\s*"(personal|bot|private|public|saved)_\w+"|"about":\s*"Here is the data you'),
        read_telegram,
    ),
    "Discord": (re.compile(r'"guild":\s*\{|"channel":\s*\{'), read_discord),
}


def messenger_of(start: str) -> str:
    """Which messenger exported a chat that starts so; "" where it is no such export."""
    if any(map(WHATSAPP.match, start.splitlines())):
        return "WhatsApp"
    if not start.lstrip().startswith("{"):
        return ""
    return next((name for name, (looks, _) in JSON_EXPORTS.items() if looks.search(start)), "")


def read_export(messenger: str, text: str) -> Iterator[Message]:
    """The messages of an exported chat. Many errors where it is not what a messenger writes."""
    if messenger == "WhatsApp":
        return read_whatsapp(text)
    return JSON_EXPORTS[messenger][1](msgspec.json.decode(text))
