"""What a dialog looks like in other people's data: a record in, by whatever keys; its messages, and a `Dialog`, out.

A record is an object of JSON or a row of a table. Its keys tell its form (`RECORDS`, at the end), a reader makes
messages of it, and `dialog_from` makes a dialog of any messages. Only PersonaChat's utterances, each of which holds its
whole history, are taken as they are.
"""

import ast
import contextlib
import json
import re
import textwrap
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from turns import (
    PERSONA_LINE,
    ROLE_OF,
    SIDES,
    SILENCE,
    Dialog,
    Message,
    Notes,
    Utterance,
    before_reply,
    dialog_from,
    joined_turns,
    normal,
    roles_of,
    split_sentences,
    spoken_in,
    with_roles,
)

# The one list of what people call the same thing. Capitals, spaces and what else is no letter do not count.
KEYS = {
    "persona": "personality persona personas yourpersona botpersona assistantpersona user2personas user2persona "
    "persona2 personab profile",
    "system": "system systemprompt systemmessage systeminstruction",
    "character": "name charname",  # who a character card is of
    "turns": "utterances dialog dialogue messages conversations conversation turns chat items contents "
    "bestgeneratedconversation",
    "history": "history context",
    "candidates": "candidates labelcandidates",
    "reply": "reply response utterance completion output answer label labels evallabels chosen",
    "prompt": "prompt instruction question query",
    "input": "input",
    "id": "convid conversationid dialogid dialogueid conversationhash sessionid",
    "place": "utteranceidx turnid turnidx turn index",
    "speaker": "role from speaker author sender speakerid speakeridx user",
    "content": "content value text message utterance parts",
    "weight": "weight train trainable",
    "tool call": "toolcalls functioncall",
    "free": "freemessages",
    "guided": "guidedmessages",
    "rows": "data dialogs dialogues conversations rows examples",
    "train": "train training",
    "valid": "validation valid val dev eval test",  # where there are several, the first of these
    "all": "all",  # of a file without splits
}
SYNONYMS = {name: words.split() for name, words in KEYS.items()}
# Whose words an object holds under a key that is a side, or a name for what a side says.
SIDE_OF = ROLE_OF | dict.fromkeys(SYNONYMS["prompt"] + SYNONYMS["input"], "user")
SIDE_OF |= dict.fromkeys(set(SYNONYMS["reply"]).difference(SYNONYMS["content"]), "assistant")
UNSPOKEN = re.compile(f"{SILENCE.pattern}|{PERSONA_LINE.pattern}", re.I)  # what a history may hold beside utterances
NO_JSON = (ValueError, RecursionError)  # what a decoder raises; the second for brackets nested too deep
FORMATS = "expected PersonaChat JSON, JSON lines, CSV, parquet or ParlAI text (see 'Data formats' in the README)"

# ------------------------------------------------------------------------------------------------------------
# Keys and values
# ------------------------------------------------------------------------------------------------------------


class Fields:
    """An object whose keys are found by any of their synonyms.

    Args:
        where: the object's place in its record, for messages.
        notes: where what is not read of it is counted.
    """

    def __init__(self, record: dict[str, Any], where: str = "$", notes: Notes | None = None):
        self.record, self.where, self.notes = record, where, notes
        self.keys = {normal(str(key)): key for key in record}  # Python's literals have keys of any type
        self.read: set[str] = set()

    def key(self, name: str) -> str | None:
        """The key, as it is written, that holds what `KEYS` calls `name`."""
        for word in SYNONYMS[name]:
            if word in self.keys:
                return self.keys[word]
        return None

    def has(self, *names: str) -> bool:
        return all(self.key(name) is not None for name in names)

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a key, which counts as read; the default where there is none, or null."""
        key = self.key(name)
        self.read.add(key)
        value = self.record.get(key)
        return default if value is None else value

    def place(self, name: str) -> str:
        return f"{self.where}.{self.key(name)}"

    def texts(self, name: str) -> list[str]:
        return texts_in(self.get(name, []), self.place(name))

    def messages(self, name: str) -> list[Message]:
        return messages_of(self.get(name, []), self.place(name), self.notes)

    def note_unread(self) -> None:
        for key, value in self.record.items():
            if key not in self.read and value not in (None, "", [], {}):
                self.notes[f"the key {key}"] += 1


def keys_found(keys: Iterable[str]) -> str:
    return textwrap.shorten(", ".join(keys), 100, placeholder=" ...") or "(none)"


def typed(value: Any, kind: Any, where: str) -> Any:
    """`value`, checked to be a `kind`. Raises ValueError with the place in the record."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        message, _, inner = str(error).partition(" - at `$")  # msgspec's place inside the value
        raise ValueError(f"{message} - at `{where}{inner or '`'}") from error


def texts_in(value: Any, where: str) -> list[str]:
    """A list of texts, maybe in one text. A null in it is nothing."""
    value = unpacked(value)
    if isinstance(value, list):
        value = [text for text in value if text is not None]
    return typed(value, list[str], where)


# A text as Python writes it, and the space before the next, between which numpy sets no comma.
LITERAL = re.compile(r"""('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")(\s+(?=['"]))?""", re.DOTALL)


def python_literal(text: str) -> Any:
    return ast.literal_eval(LITERAL.sub(lambda found: found[1] + ("," if found[2] else ""), text))


def unpacked(value: Any) -> Any:
    """A list that a table holds as text, in JSON or as Python and numpy print it. Other values are as they are."""
    if isinstance(value, str) and value.startswith(("[", "{")):
        for parse in (json.loads, python_literal):
            with contextlib.suppress(*NO_JSON, SyntaxError, MemoryError):
                found = parse(value)
                if isinstance(found, list | dict):  # Python's sets and tuples are none
                    return found
    return value


def rows_of(value: Any) -> Any:
    """As `unpacked`; an object of lists, Arrow's form and the hub's for a list of objects, is that list."""
    value = unpacked(value)
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        return [dict(zip(value, row, strict=False)) for row in zip(*value.values(), strict=False)]
    return value


# ------------------------------------------------------------------------------------------------------------
# Personas and messages
# ------------------------------------------------------------------------------------------------------------


def persona_in(fields: Fields) -> list[str]:
    """The sentences of the keys for a persona and for a system prompt."""
    sentences = []
    for name in ("persona", "system"):
        if value := fields.get(name):
            sentences += persona_of(value, fields.place(name))
    return sentences


def persona_of(value: Any, where: str) -> list[str]:
    """Persona sentences from a list, running text, or both speakers' personas, of which the second is the bot's."""
    value = unpacked(value)
    if isinstance(value, str):
        return split_sentences(value)
    if value == {}:
        return []
    if isinstance(value, dict):
        roles = roles_of([str(name) for name in value])
        ours = [name for name in value if roles[str(name)] == "assistant"]
        bot = ours[0] if ours else list(value)[0]
        return persona_of(value[bot], f"{where}.{bot}")
    if isinstance(value, list) and any(isinstance(each, list | dict) for each in value):
        bot = min(1, len(value) - 1)
        return persona_of(value[bot], f"{where}[{bot}]")
    return texts_in(value, where)


def messages_of(value: Any, where: str, notes: Notes) -> list[Message]:
    """Messages from a list of what `message_of` reads, in any of the ways to write such a list, or from one text."""
    items = rows_of(value)
    if isinstance(items, str):
        return lines_of_chat(items)
    messages = []
    for i, item in enumerate(flat(typed(items, list, where))):
        # A null is a turn without text: where turns alternate, it must not change whose the next ones are.
        messages.append(message_of("" if item is None else item, f"{where}[{i}]", notes))
    return messages


def lines_of_chat(text: str) -> list[Message]:
    """A conversation in one text: a line a turn, each after a name and a colon where two names are in all of them."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [re.fullmatch(r"([^:]{1,40}):\s*(.*)", line) for line in lines]
    if all(named) and len({match[1] for match in named}) == 2:
        return [Message(match[1], match[2]) for match in named]
    return [Message(None, line) for line in lines]


def flat(items: list) -> list:
    """Turns in one list, where they are given as [turn, answer] pairs, in lists of lists, or as {side: turn}."""
    pairs = [item for item in items if item is not None]
    if all(isinstance(item, list) and len(item) == 2 for item in pairs) and are_speakers([item[0] for item in pairs]):
        return items
    turns = []
    for item in items:
        if isinstance(item, dict) and item and None not in (sides := sides_of(item)):
            item = [[side, text] for side, text in zip(sides, item.values(), strict=True)]
        turns += item if isinstance(item, list) else [item]
    return turns


def sides_of(item: dict[str, Any]) -> list[str | None]:
    """Who says what an object holds under each key, as in {"human": "hi", "assistant": "hello"}; None: not told."""
    return [SIDE_OF.get(normal(str(key))) for key in item]


def are_speakers(firsts: list) -> bool:
    """Whether the first items of pairs name speakers: they are numbers, roles, or two names that come again."""
    if all(isinstance(first, int) or normal(str(first)) in ROLE_OF for first in firsts):
        return True
    names = {str(first) for first in firsts if not isinstance(first, dict)}
    return 0 < len(names) <= 2 < len(firsts)


def message_of(item: Any, where: str, notes: Notes) -> Message:
    """A message from a text, a [speaker, text] pair or an object."""
    if isinstance(item, str):
        return Message(None, item)
    if isinstance(item, list):
        speaker, text = typed(item, tuple[str | int, str | None], where)
        return Message(str(speaker), text or "")
    return message_in(Fields(typed(item, str | dict[str, Any], where), where, notes))


def message_in(fields: Fields) -> Message:
    """The message that an object holds."""
    if not fields.has("content") and not fields.has("tool call"):
        found = keys_found(fields.record)
        raise ValueError(f"a message has the keys {found}, expected role and content - at `{fields.where}`")
    fields.read.add("id")  # of the speaker in ParlAI's acts, of the message elsewhere
    speaker = fields.get("speaker", fields.record.get("id"))
    if isinstance(speaker, dict):
        speaker = speaker.get("name") or speaker.get("role")
    if speaker is not None:
        key = fields.key("speaker") or "id"
        speaker = str(typed(speaker, str | int | bool, f"{fields.where}.{key}"))
    text = text_in(fields, "content")
    learned = str(fields.get("weight", 1)).lower() not in ("0", "0.0", "false")
    distractors = fields.texts("candidates")
    fields.note_unread()
    return Message(speaker, text, learned, distractors)


def text_in(fields: Fields, name: str) -> str:
    """The text under a key: a string, a number, nothing, or parts of which some may be pictures."""
    content = fields.get(name, "")
    if isinstance(content, str | int | float):
        return str(content)
    texts = []
    for i, part in enumerate(content if isinstance(content, list) else [content]):
        text = part.get("text") if isinstance(part, dict) else typed(part, str, f"{fields.place(name)}[{i}]")
        if isinstance(text, str):
            texts.append(text)
        else:
            fields.notes["parts of messages that are no text"] += 1
    return " ".join(texts)


# ------------------------------------------------------------------------------------------------------------
# Records
# ------------------------------------------------------------------------------------------------------------


def read_chat(fields: Fields) -> Dialog:
    """`dialog`, `messages`, `conversations` and the like: turns of many kinds, or PersonaChat's utterances."""
    personality = persona_in(fields)
    items = rows_of(fields.get("turns", []))
    if items and isinstance(items, list) and isinstance(items[0], dict) and is_utterance(Fields(items[0])):
        return read_utterances(personality, items, fields)
    messages = fields.messages("turns")
    acts = fields.record.get(fields.key("history"))
    if isinstance(acts, list) and all(isinstance(act, dict) for act in acts):  # the context of ParlAI's conversations
        messages = fields.messages("history") + messages
    return dialog_from(personality, messages, fields.notes)


def read_utterances(personality: list[str], items: list, fields: Fields) -> Dialog:
    """PersonaChat's utterances: each has its whole history, and maybe the persona."""
    dialog = Dialog(personality, [])
    for i, item in enumerate(items):
        row = read_utterance(Fields(item, f"{fields.place('turns')}[{i}]", fields.notes))
        dialog.personality = dialog.personality or row.personality
        dialog.utterances += row.utterances
    return dialog


def is_utterance(fields: Fields) -> bool:
    return fields.has("history") or (fields.has("candidates") and not fields.has("content"))


def read_utterance(fields: Fields) -> Dialog:
    """One reply with its history and candidates, as PersonaChat has it: a dialog of one utterance, or of none."""
    personality = persona_in(fields)
    persona, history = read_history(fields)
    right, wrong = read_candidates(fields)
    dialog = Dialog(personality + persona, [])
    if right and right[0].strip() and not SILENCE.fullmatch(right[0]):
        dialog.utterances.append(Utterance(history, [*wrong, right[0]], right[1:]))
    else:
        fields.notes["empty replies"] += 1
    return dialog


def read_history(fields: Fields) -> tuple[list[str], list[str]]:
    """The persona in a reply's history, and the utterances."""
    if not fields.has("history"):
        raise ValueError(f"Object missing required field `history` - at `{fields.where}`")
    history = rows_of(fields.get("history", []))
    if isinstance(history, list) and all(isinstance(text, str) and not UNSPOKEN.match(text) for text in history):
        return [], history  # nearly always; a dataset has a million of them
    messages = before_reply(fields.messages("history"))
    persona, spoken = spoken_in(with_roles(messages), fields.notes)
    return persona, [text for _, text, _ in joined_turns(spoken)]


def read_candidates(fields: Fields) -> tuple[list[str], list[str]]:
    """The right replies and the distractors. Without a key for the reply, the last candidate is the right one."""
    reply, candidates = fields.get("reply"), fields.texts("candidates")
    if reply is not None:
        right = texts_in(reply if isinstance(reply, list) else [reply], fields.place("reply"))
        return right, [text for text in candidates if text not in right]
    if fields.get("candidates") is None:
        raise ValueError(f"Object missing required field `candidates` - at `{fields.where}`")
    if not candidates:
        raise ValueError(f"Expected `array` of length >= 1 - at `{fields.place('candidates')}`")
    return candidates[-1:], candidates[:-1]


def read_pair(fields: Fields) -> Dialog:
    """Prompt and completion, or instruction, input and output; any of them may be messages."""
    asked = "prompt" if fields.has("prompt") else "input"
    history, prompt, reply = told(fields, "history"), told(fields, asked), told(fields, "reply")
    several = isinstance(reply, list) and len(reply) > 1 and all(message.speaker is None for message in reply)
    if isinstance(prompt, str):
        about = text_in(fields, "input") if asked == "prompt" else ""  # of Alpaca's
        prompt = [Message("user", joined_lines(prompt, about))]
    elif several:  # the columns of a table: many prompts, and a reply to each
        typed(fields.get("reply"), str, fields.place("reply"))
    if isinstance(reply, str):
        reply = [Message("assistant", reply)]
    elif several:  # each of them is right
        reply = [Message("assistant", reply[0].text, alternatives=[message.text for message in reply[1:]])]
    if isinstance(history, str):  # Dolly's context: what the last message is about
        *earlier, last = prompt or [Message("user", "")]
        messages = before_reply([*earlier, last._replace(text=joined_lines(last.text, history))])
    else:
        messages = before_reply(history + prompt)
    if messages and messages[-1].text in [message.text for message in reply[:-1]]:
        messages = []  # in preference data, the reply's messages begin with those of the prompt
    messages += [message._replace(speaker=message.speaker or "assistant") for message in reply]
    return dialog_from(persona_in(fields), messages, fields.notes)


def joined_lines(*texts: str) -> str:
    return "\n".join(filter(None, texts))


def told(fields: Fields, name: str) -> str | list[Message]:
    """The text that a key holds, or its messages. A text that looks like a list of anything else is a text.

    The text of a history is a line a turn, where that of a context is what the message is about.
    """
    value = fields.get(name, "")
    found = unpacked([value] if isinstance(value, dict) else value)
    is_turns = name == "history" and "history" in fields.keys
    if isinstance(found, list):
        has_messages = all(isinstance(item, dict) and Fields(item).has("content") for item in found)
        is_turns = is_turns or not isinstance(value, str) or (found and has_messages)
    return messages_of(found, fields.place(name), fields.notes) if is_turns else text_in(fields, name)


def read_blended(fields: Fields) -> Dialog:
    """The hub's BlendedSkillTalk: what each speaker said in a list of its own; the guided one has the persona."""
    messages = []
    for texts in zip(fields.texts("free"), fields.texts("guided"), strict=False):
        messages += map(Message, SIDES, texts)
    return dialog_from(persona_in(fields), messages, fields.notes)


def read_exchange(fields: Fields) -> Dialog:
    """What each side says, under a key of its own."""
    fields.read |= set(fields.record)
    return dialog_from([], messages_of([fields.record], fields.where, fields.notes), fields.notes)


# What a record must hold, and its reader; the first that fits.
RECORDS = [
    (("free", "guided"), read_blended),
    (("turns",), read_chat),
    (("history", "candidates"), read_utterance),
    (("prompt", "reply"), read_pair),
    (("input", "reply"), read_pair),
    (("history", "reply"), read_utterance),
]
EXPECTED = (
    "a dialog needs one of the keys utterances, dialog or messages, history and candidates, or prompt and completion"
)


def reader_of(fields: Fields) -> Callable[[Fields], Dialog] | None:
    for names, reader in RECORDS:
        if fields.has(*names):
            return reader
    sides = sides_of(fields.record)
    return read_exchange if set(SIDES).issubset(sides) and None not in sides else None


def is_turn(fields: Fields) -> bool:
    """Whether a record is one message, the others of its conversation on lines of their own."""
    if not fields.has("content"):
        return False
    if fields.has("id", "place") and fields.key("reply") == fields.key("content"):  # EmpatheticDialogues' utterance
        return not fields.has("turns")
    return reader_of(fields) is None and (fields.has("id") or fields.has("speaker")) and not is_utterance(fields)


def holds_dialog(fields: Fields) -> bool:
    """Whether a record holds a dialog, or a turn of one."""
    return reader_of(fields) is not None or is_turn(fields)


def dialog_of(fields: Fields) -> Dialog:
    """The dialog in a record. Raises ValueError with what is wrong."""
    reader = reader_of(fields)
    if reader is None:
        raise ValueError(f"has the keys {keys_found(fields.record)}; {EXPECTED} - at `$`")
    dialog = reader(fields)
    fields.read |= {fields.key("id"), fields.key("place")}
    fields.note_unread()
    return dialog
