"""The persona in a file: sentences, a list in Markdown or YAML, JSON, a dataset, a character card."""

import base64
import re
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec

from cli import UserError, explain_errors, log
from files import typed_path
from formats import decode, is_record, read_content
from records import NO_JSON, SYNONYMS, Fields, persona_in, persona_of, texts_in, typed
from turns import normal, persona_line

PNG = b"\x89PNG\r\n\x1a\n"
PERSONA_FILES = "expected a sentence in each line, JSON, a dataset or a character card"
BULLET = re.compile(r"(?:[-*+•]|\d{1,3}[.)])\s+")
# Keys of character cards, compared as `normal` has them: what is the persona, and the rest.
CARD_KEYS = ("description", "personality", "scenario", "charpersona", "worldscenario")
UNREAD_KEYS = ("firstmes", "mesexample", "systemprompt", "characterbook", "greeting", "chargreeting", "exampledialogue")


def read_persona(name: str, option: str) -> list[str]:
    """The persona in a file: sentences, JSON, a dataset, or a character card (JSON or PNG).

    Args:
        option: what named the file, for messages.
    """
    path, source = typed_path(name), f"{option} {name}"
    try:
        data = path.read_bytes()
        text = card_in_png(data) if data.startswith(PNG) else data.decode("utf-8-sig")
    except (OSError, ValueError) as error:  # the second of base64 too
        raise UserError(f"cannot read {source}: {error}; expected UTF-8 text") from error
    if text.lstrip()[:1] in ("{", "["):
        sentences = persona_in_json(text, source, path)
    elif re.match(r"\s*\d+ (your|partner'?s) persona\s*:", text, re.I):
        sentences = persona_in_dataset(text, source, path)
    else:
        sentences = persona_in_lines(text, source)
    sentences = [sentence.strip() for sentence in sentences if sentence.strip()]
    if not sentences:
        raise UserError(f"{source} holds no persona; {PERSONA_FILES}")
    return sentences


def persona_in_lines(text: str, source: str) -> list[str]:
    """The sentences in lines of text. YAML's key of what is no persona, such as a greeting, ends at the next key."""
    sentences, unread, is_read, name = [], [], True, ""
    for line in text.splitlines():
        if found := re.match(r"(\w+):\s*(.*)", line):
            key = normal(found[1])
            is_read = key not in UNREAD_KEYS
            if not is_read:
                unread.append(found[1])
            elif key in SYNONYMS["character"]:
                name = unquoted(found[2].strip())
        if is_read:
            sentences += persona_in_line(line.strip())
    say_unread(unread, source)
    return with_names(sentences, name)


def with_names(sentences: list[str], name: str) -> list[str]:
    """Sentences in which a card's macros for its character and for who talks to it are words."""
    macros = {"{{char}}": name or "I", "<bot>": name or "I", "{{user}}": "you", "<user>": "you"}
    pattern = re.compile("|".join(macros), re.I)
    return [pattern.sub(lambda macro: macros[macro[0].lower()], sentence) for sentence in sentences]


def say_unread(keys: list[str], source: str) -> None:
    if keys:
        log.info(f"{source}: a character card; not read: {', '.join(keys)}")


def persona_in_line(line: str) -> list[str]:
    """The sentence in a line of text, of a Markdown or YAML list, or of ParlAI; none in a heading or a fence."""
    if re.match(r"#+ |---|\.\.\.$|```", line):
        return []
    line = BULLET.sub("", line, count=1) if BULLET.match(line) else line
    sentence = persona_line(line)
    if sentence is not None:
        return [sentence]
    key, colon, value = line.partition(":")
    key, value = normal(key), value.strip()
    if colon and key in SYNONYMS["character"] and value:
        return [f"My name is {unquoted(value)}."]
    # A card of text-generation-webui calls the persona the context.
    if not colon or key not in (*SYNONYMS["persona"], *CARD_KEYS, "context"):
        return [unquoted(line)]
    if value in ("", "|", ">", "|-", ">-"):  # the sentences follow on lines of their own
        return []
    if value[0] + value[-1] == "[]":
        return re.findall(r"[^\s,\"'][^,\"']*", value[1:-1])
    return [unquoted(value)]


def unquoted(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text


def persona_in_json(text: str, source: str, path: Path) -> list[str]:
    with explain_errors(source, PERSONA_FILES, *NO_JSON):
        try:
            found = decode(text.encode(), dict[str, Any] | list[Any])
        except msgspec.DecodeError:
            if is_record(text.encode().lstrip().partition(b"\n")[0]):  # JSON lines
                return persona_in_dataset(text, source, path)
            raise
        if isinstance(found, list):
            nested = any(isinstance(each, list | dict) for each in found)
            return persona_in_dataset(text, source, path) if nested else texts_in(found, "$")
        card = found["data"] if isinstance(found.get("data"), dict) else found
        if any(isinstance(value, str) and normal(key) in CARD_KEYS for key, value in card.items()):
            return persona_in_card(card, source)
        return persona_in(Fields(found)) or persona_in_dataset(text, source, path)


def persona_in_card(card: dict[str, Any], source: str) -> list[str]:
    """The persona of a character card, version 1, 2 or 3 (https://github.com/malfoyslastname/character-card-spec-v2)."""
    fields = Fields({key: value for key, value in card.items() if value})
    name = str(typed(fields.get("character", ""), str | int | float, fields.place("character")))
    sentences = [f"My name is {name}."] if name else []
    for key in CARD_KEYS:
        if key in fields.keys:
            sentences += persona_of(card[fields.keys[key]], f"$.{fields.keys[key]}")
    say_unread([fields.keys[key] for key in UNREAD_KEYS if key in fields.keys], source)
    return with_names(sentences, name)


def card_in_png(data: bytes) -> str:
    """The JSON of a character card in a picture: base64 in a text chunk, `ccv3` before `chara`."""
    for keyword in (b"ccv3", b"chara"):
        chunk = re.search(b"(.{4})tEXt" + keyword + b"\0", data, re.DOTALL | re.IGNORECASE)
        if chunk:
            size = int.from_bytes(chunk[1], "big") - len(keyword) - 1  # the chunk's data, without keyword and 0
            return base64.b64decode(data[chunk.end() : chunk.end() + size]).decode("utf-8-sig")
    raise OSError("a picture without a character card")


def persona_in_dataset(text: str, source: str, path: Path) -> list[str]:
    """The first persona of a dataset. The path is for messages: what comes through a pipe is read only once."""
    dialogs = chain.from_iterable(read_content(path, text.encode()).values())
    personas = [dialog.personality for dialog in dialogs if dialog.personality]
    if not personas:
        return []
    if any(persona != personas[0] for persona in personas):
        log.info(f"{source} is a dataset of {len(personas)} personas: the first one is taken")
    return personas[0]
