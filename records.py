"""What a dialog looks like in other people's data: their keys, their speakers, their turns; a `Dialog` out."""

import ast
import json
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import chain, groupby
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from cli import log

# The one list of what people call the same thing. Capitals, spaces and what else is no letter do not count.
KEYS = {
    "persona": "personality persona personas yourpersona botpersona assistantpersona user2personas user2persona "
    "persona2 personab profile",
    "system": "system systemprompt systemmessage",
    "turns": "utterances dialog dialogue messages conversations conversation turns chat bestgeneratedconversation",
    "history": "history context",
    "candidates": "candidates labelcandidates",
    "reply": "reply response utterance completion output answer label labels evallabels chosen",
    "prompt": "prompt instruction question query",
    "input": "input",
    "id": "convid conversationid dialogid dialogueid conversationhash sessionid",
    "place": "utteranceidx turnid turnidx turn index",
    "speaker": "role from speaker author sender speakerid user",
    "content": "content value text message utterance",
    "weight": "weight train trainable",
    "free": "freemessages",
    "guided": "guidedmessages",
    "rows": "data dialogs dialogues conversations rows examples",
    "training split": "train training",
    "validation split": "validation valid val dev eval test",  # where there are several, the first of these
}
SYNONYMS = {name: words.split() for name, words in KEYS.items()}
# A key that is named where it is not read: what it holds was probably meant for the model.
TELLING = re.compile(
    r"persona|character|system|speaker|role|author|dialog|conversation|session|split|^bio|profile|trait|background|scenario|facts"
)
SPEAKERS = {
    "other": "user human prompter customer client localhuman you",
    "bot": "assistant bot gpt chatgpt model ai agent chatbot char character",
    "system": "system developer context",
    "tool": "tool function functioncall functionresponse toolcall toolresponse observation environment ipython",
}
PART_OF = {word: part for part, words in SPEAKERS.items() for word in words.split()}

NO_JSON = (ValueError, RecursionError)  # what a decoder raises; the second for brackets nested too deep
FORMATS = "expected PersonaChat JSON, JSON lines, CSV, parquet or ParlAI text (see 'Data formats' in the README)"
SILENCE = re.compile(r"\s*__ ?SILENCE ?__\s*", re.I)  # ParlAI's word for a turn without words
PERSONA_LINE = re.compile(r"\s*(your|partner'?s)\s+persona\s*:\s*(.*?)\s*", re.I)


class Prefix(Sequence):
    """The first `length` of a list of texts that all replies of a dialog share: histories of their own would take
    memory that grows with the square of the dialog."""

    def __init__(self, texts: list[str], length: int):
        self.texts, self.length = texts, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, place):
        if isinstance(place, slice):
            return [self.texts[i] for i in range(*place.indices(self.length))]
        return self.texts[range(self.length)[place]]

    def __eq__(self, other) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def __add__(self, other: list[str]) -> list[str]:
        return self[:] + other

    def __repr__(self) -> str:
        return repr(self[:])


class Utterance(msgspec.Struct):
    history: Sequence[str]
    candidates: list[str]  # the gold reply is the last one; alone, it asks for sampled distractors
    alternatives: list[str] = []  # replies that are as right as the gold one


class Dialog(msgspec.Struct):
    personality: list[str]
    utterances: list[Utterance]


class Turn(NamedTuple):
    by_bot: bool
    text: str
    learned: bool = True  # False: the model reads it and does not learn to say it
    distractors: Sequence[str] = ()
    alternatives: Sequence[str] = ()


def replies_of(turns: Iterable[Turn]) -> list[Utterance]:
    """Every turn of the bot as the reply to all before it."""
    texts: list[str] = []
    utterances = []
    for by_bot, run in groupby(turns, key=lambda turn: turn.by_bot):
        # Turns of one speaker in a row are one utterance: speakers must alternate.
        run = list(run)
        text = " ".join(turn.text for turn in run)
        if by_bot and all(turn.learned for turn in run):
            parts = {text, *(turn.text for turn in run), *(right for turn in run for right in turn.alternatives)}
            distractors = [wrong for turn in run for wrong in turn.distractors if wrong and wrong not in parts]
            alternatives = list(run[0].alternatives) if len(run) == 1 else []
            utterances.append(Utterance(Prefix(texts, len(texts)), [*distractors, text], alternatives))
        texts.append(text)
    return utterances


class Notes(Counter):
    """How often what of a file was not read. Said once, after all of it is read."""

    def say(self, path: Path) -> None:
        if self:
            counts = ", ".join(f"{what} ({count})" for what, count in sorted(self.items()))
            warn_once(f"warning: {path}: not read: {textwrap.shorten(counts, 400, placeholder=' ...')}")
        self.clear()


@cache
def warn_once(message: str) -> None:
    log.warning(message)


def dialog_from(personality: Iterable[str], turns: Iterable[Turn], notes: Notes) -> Dialog:
    """A dialog from turns in which there may be lines of the persona, silence and nothing."""
    personality, spoken = list(personality), []
    for turn in turns:
        text = turn.text
        if "persona" in text.lower():
            lines = [(line, PERSONA_LINE.fullmatch(line)) for line in text.splitlines()]
            if any(found for _, found in lines):
                personality += [found[2] for _, found in lines if found and found[1].lower() == "your" and found[2]]
                text = "\n".join(line for line, found in lines if not found).strip()
                if not text:
                    continue
        if not text.strip():
            notes["messages without text"] += 1
        elif not SILENCE.fullmatch(text):
            spoken.append(turn._replace(text=text))
    return Dialog(personality, replies_of(spoken))


# A full stop after these ends no sentence: Dr. Smith, the U.S. government, J. Smith.
ABBREVIATION = re.compile(
    r"\b(?i:dr|mr|mrs|ms|prof|st|jr|sr|vs|gen|rev)\.$|(?:\b[A-Za-z]\.)+[A-Za-z]\.$|\b(?!I)[A-Z]\.$"
)


def split_sentences(text: str) -> list[str]:
    """Persona sentences from running text: one per line, and a new one after . ! or ? and their like."""
    sentences = []
    for line in text.splitlines():
        begun = ""
        for part in re.split(r"(?<=[.!?])\s+|(?<=[.!?][\"”’)])\s+|(?<=[。！？])\s*", line.strip()):
            begun = f"{begun} {part}".strip()
            if not ABBREVIATION.search(begun[-20:]):
                sentences.append(begun)
                begun = ""
        sentences.append(begun)
    return [sentence for sentence in sentences if sentence]


# ------------------------------------------------------------------------------------------------------------
# Records: a dialog, or a turn of one, as JSON and tables hold it
# ------------------------------------------------------------------------------------------------------------


@cache
def normal(key: str) -> str:
    return re.sub(r"[\W_]+", "", key).lower()


class Fields:
    """The keys of an object, found by any of their synonyms."""

    def __init__(self, record: dict[str, Any]):
        self.record = record
        self.keys = {normal(key): key for key in record}
        self.read: set[str] = set()

    def key(self, name: str) -> str | None:
        """The key, as it is written, that holds what `KEYS` calls `name`."""
        return next((self.keys[word] for word in SYNONYMS[name] if word in self.keys), None)

    def has(self, *names: str) -> bool:
        return all(self.key(name) is not None for name in names)

    def get(self, name: str, default: Any = None) -> Any:
        key = self.key(name)
        self.read.add(key)
        return default if key is None or self.record[key] is None else self.record[key]

    def note_unread(self, notes: Notes) -> None:
        for word, key in self.keys.items():
            if key not in self.read and TELLING.search(word) and self.record[key] not in (None, "", [], {}):
                notes[f"the key {key}"] += 1


def typed(value: Any, kind: Any, where: str) -> Any:
    """`value`, checked to be a `kind`. Raises ValueError with the place in the record."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        message, _, inner = str(error).partition(" - at `$")
        raise ValueError(f"{message} - at `{where}{inner or '`'}") from error


def keys_found(keys: Iterable[str]) -> str:
    return textwrap.shorten(", ".join(keys), 100, placeholder=" ...") or "(none)"


def text_of(content: Any, where: str, notes: Notes) -> str:
    """The text of a message: a string, nothing, or parts of which some may be pictures."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        content = [content]
    texts = []
    for i, part in enumerate(content):
        text = part.get("text") if isinstance(part, dict) else typed(part, str, f"{where}[{i}]")
        if isinstance(text, str):
            texts.append(text)
        else:
            notes["parts of messages that are no text"] += 1
    return " ".join(texts)


class Said(NamedTuple):
    """A message as it is given."""

    speaker: str | None
    text: str
    learned: bool = True
    distractors: Sequence[str] = ()
    alternatives: Sequence[str] = ()


def said(item: Any, where: str, notes: Notes) -> Said:
    """A message from a text, a [speaker, text] pair or an object."""
    if isinstance(item, str):
        return Said(None, item)
    if isinstance(item, list):
        speaker, text = typed(item, tuple[str | int, str], where)
        return Said(str(speaker), text)
    fields = Fields(typed(item, str | dict[str, Any], where))
    speaker, content = fields.get("speaker"), fields.get("content")
    if speaker is None:
        speaker = fields.record.get("id")  # of ParlAI's acts
    if isinstance(speaker, dict):
        speaker = speaker.get("name") or speaker.get("role")
    if content is None and not fields.has("content") and fields.keys.keys().isdisjoint(("toolcalls", "functioncall")):
        raise ValueError(
            f"a message has the keys {keys_found(fields.record)}, expected role and content - at `{where}`"
        )
    place = f"{where}.{fields.key('content')}"
    speaker = None if speaker is None else typed(speaker, str | int, f"{where}.{fields.key('speaker') or 'id'}")
    candidates = [text for text in fields.get("candidates", []) if isinstance(text, str)]
    return Said(
        None if speaker is None else str(speaker),
        text_of(content, place, notes),
        fields.get("weight", 1) not in (0, "0"),
        candidates,
    )


def flat(items: list) -> list:
    """Turns in one list, where they are given as [turn, answer] pairs."""
    pairs = [item for item in items if isinstance(item, list) and len(item) == 2]
    if not pairs or len(pairs) < len(items):
        return list(chain.from_iterable(item if isinstance(item, list) else [item] for item in items))
    firsts = {str(first) for first, _ in pairs if not isinstance(first, dict)}
    # [speaker, text] and not [turn, answer]: the first ones are numbers, or names that come again.
    named = all(isinstance(first, int) or normal(str(first)) in PART_OF for first, _ in pairs)
    named = named or (0 < len(firsts) <= 2 < len(pairs))
    return items if named else list(chain.from_iterable(items))


def bot_of(speakers: list[str]) -> tuple[set[str], bool]:
    """Which of the speakers are the bot, and whether the others must be known by name to be the other person."""
    parts = {speaker: PART_OF.get(normal(speaker)) for speaker in speakers}
    bots = {speaker for speaker, part in parts.items() if part == "bot"}
    others = {speaker for speaker, part in parts.items() if part == "other"}
    unknown = [speaker for speaker, part in parts.items() if part is None]
    if not bots:
        if all(speaker[-1:].isdigit() for speaker in unknown):
            unknown.sort(key=lambda speaker: int(re.search(r"\d+$", speaker)[0]))  # Speaker 2 is the second
        return set(unknown[:1] if others else unknown[1:2]), False
    return bots, bool(others)


def turns_of(messages: list[Said], notes: Notes) -> tuple[list[str], list[Turn]]:
    """The persona sentences of the system's messages, and the turns of both speakers."""
    if all(message.speaker is None for message in messages):  # they alternate, the other person first
        return [], [Turn(i % 2 == 1, *message[1:]) for i, message in enumerate(messages)]
    personality, turns = [], []
    bots, strict = bot_of(list(dict.fromkeys(message.speaker for message in messages if message.speaker is not None)))
    for message in messages:
        part = PART_OF.get(normal(message.speaker or ""))
        if part == "tool":
            notes[f"messages of the role {message.speaker[:40]}"] += 1
        elif part == "system":
            if "persona" in message.text.lower() and PERSONA_LINE.match(message.text):
                turns.append(Turn(False, *message[1:]))  # ParlAI's context
            else:
                personality += split_sentences(message.text)
        elif message.speaker in bots:
            turns.append(Turn(True, *message[1:]))
        elif part == "other" or (message.speaker is not None and not strict):
            turns.append(Turn(False, *message[1:]))
        else:
            notes[f"messages of the role {(message.speaker or '(none)')[:40]}"] += 1
    return personality, turns


def rows_of(value: Any) -> Any:
    """An object of lists as a list of objects: Arrow's way and the hub's for the same thing."""
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        return [dict(zip(value, row, strict=False)) for row in zip(*value.values(), strict=False)]
    return unpacked(value)


def unpacked(value: Any) -> Any:
    """A list that a table holds as text, in JSON or as Python prints it."""
    if isinstance(value, str) and value[:1] in ("[", "{"):
        for parse in (json.loads, ast.literal_eval):
            try:
                found = parse(value)
            except (*NO_JSON, SyntaxError, MemoryError):
                continue
            if isinstance(found, list | dict):
                return found
    return value


def persona_of(value: Any, where: str) -> list[str]:
    """Persona sentences from a list, running text, or both speakers' personas, of which the second is the bot's."""
    value = unpacked(value)
    if isinstance(value, str):
        return split_sentences(value)
    if isinstance(value, dict):
        part = Fields(value)
        bots = bot_of(list(value))[0] or set(part.record)
        return persona_of(next((value[name] for name in value if name in bots), []), where)
    if isinstance(value, list) and any(isinstance(each, list | dict) for each in value):
        return persona_of(value[min(1, len(value) - 1)], f"{where}[{min(1, len(value) - 1)}]")
    return typed(value, list[str], where)


def lines_of_chat(text: str) -> list[Said]:
    """A conversation in one text: a line a turn, maybe each after a name and a colon."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [re.fullmatch(r"([^:]{1,40}):\s*(.*)", line) for line in lines]
    names = Counter(found[1] for found in named if found)
    if len(names) == 2 and sum(names.values()) == len(lines):
        return [Said(found[1], found[2]) for found in named]
    return [Said(None, line) for line in lines]


def persona_in(fields: Fields) -> list[str]:
    found = [(name, fields.get(name)) for name in ("persona", "system")]
    return [line for name, value in found if value for line in persona_of(value, f"$.{fields.key(name)}")]


def read_turns(fields: Fields, notes: Notes) -> Dialog:
    """`dialog`, `messages`, `conversations` and the like: turns of many kinds, or PersonaChat's utterances."""
    where, items = f"$.{fields.key('turns')}", rows_of(fields.get("turns", []))
    personality = persona_in(fields)
    if isinstance(items, str):
        messages = lines_of_chat(items)
    else:
        items = typed(items, list, where)
        if items and isinstance(items[0], dict) and is_utterance(Fields(items[0])):
            replies = [read_reply(Fields(item), f"{where}[{i}]", notes) for i, item in enumerate(items)]
            return Dialog(personality, [reply for reply in replies if reply])
        messages = [said(item, f"{where}[{i}]", notes) for i, item in enumerate(flat(items))]
    context = fields.get("history") if isinstance(fields.record.get("context"), list) else None
    if context and all(isinstance(act, dict) for act in context):  # of a ParlAI conversation
        messages = [said(act, f"$.context[{i}]", notes) for i, act in enumerate(context)] + messages
    of_system, turns = turns_of(messages, notes)
    return dialog_from(personality + of_system, turns, notes)


def is_utterance(fields: Fields) -> bool:
    return fields.has("history") or (fields.has("candidates") and not fields.has("content"))


def read_reply(fields: Fields, where: str, notes: Notes) -> Utterance | None:
    """A reply with its history and candidates; None where there is nothing to learn."""
    history = rows_of(fields.get("history"))
    if history is None:
        raise ValueError(f"Object missing required field `history` - at `{where}`")
    if isinstance(history, str):
        history = [line.strip() for line in history.splitlines() if line.strip()]
    history = typed(history, list[str], f"{where}.{fields.key('history')}")
    if any(SILENCE.fullmatch(text) for text in history):
        # Whose turn it was is counted from the reply backwards, and must stay so without the silent ones.
        turns = [Turn((len(history) - i) % 2 == 0, text) for i, text in enumerate(history)]
        spoken = [turn for turn in turns if not SILENCE.fullmatch(turn.text)]
        history = [" ".join(turn.text for turn in run) for _, run in groupby(spoken, key=lambda turn: turn.by_bot)]
    candidates, reply = fields.get("candidates"), fields.get("reply")
    if candidates is None and reply is None:
        raise ValueError(f"Object missing required field `candidates` - at `{where}`")
    candidates = typed(unpacked(candidates) or [], list[str], f"{where}.{fields.key('candidates')}")
    right = reply if isinstance(reply, list) else [reply]
    if reply is None:
        if not candidates:
            raise ValueError(f"Expected `array` of length >= 1 - at `{where}.{fields.key('candidates')}`")
        right = candidates[-1:]
        candidates = candidates[:-1]
    else:
        right = typed(right, list[str], f"{where}.{fields.key('reply')}")
        candidates = [text for text in candidates if text not in right]
    if not right or not right[0].strip() or SILENCE.fullmatch(right[0]):
        notes["empty replies"] += 1
        return None
    return Utterance(history, [*candidates, right[0]], right[1:])


def read_utterance(fields: Fields, notes: Notes) -> Dialog:
    """A row that is one reply, as the hub's PersonaChat has it."""
    personality, reply = persona_in(fields), read_reply(fields, "$", notes)
    return Dialog(personality, [reply] if reply else [])


def read_pair(fields: Fields, notes: Notes) -> Dialog:
    """Prompt and completion, or instruction, input and output; either may be a list of messages."""
    personality, messages = persona_in(fields), []
    earlier = fields.get("history", [])
    messages += [said(item, "$.history", notes) for item in (flat(earlier) if isinstance(earlier, list) else [])]
    for name, speaker in ("prompt", "user"), ("reply", "assistant"):
        where, value = f"$.{fields.key(name)}", unpacked(fields.get(name, ""))
        if isinstance(value, list):
            items = [said(item, f"{where}[{i}]", notes) for i, item in enumerate(value)]
        else:
            more = fields.get("input", "") if name == "prompt" else ""
            items = [Said(speaker, "\n".join(filter(None, (typed(value, str, where), more))))]
        messages += items
    numbered = [
        message._replace(speaker=message.speaker or ("user", "assistant")[i % 2]) for i, message in enumerate(messages)
    ]
    of_system, turns = turns_of(numbered, notes)
    return dialog_from(personality + of_system, turns, notes)


def read_blended(fields: Fields, notes: Notes) -> Dialog:
    """The hub's BlendedSkillTalk: what each speaker said in a list of its own; the guided one has the persona."""
    free, guided = (typed(fields.get(name, []), list[str], f"$.{fields.key(name)}") for name in ("free", "guided"))
    turns = [Turn(by_bot, text) for pair in zip(free, guided, strict=False) for by_bot, text in enumerate(pair)]
    return dialog_from(persona_in(fields), [turn._replace(by_bot=bool(turn.by_bot)) for turn in turns], notes)


# What a record must hold, and its reader; the first that fits.
RECORDS = [
    (("free", "guided"), read_blended),
    (("turns",), read_turns),
    (("history", "candidates"), read_utterance),
    (("prompt", "reply"), read_pair),
    (("history", "reply"), read_utterance),
    (("input", "reply"), read_pair),
]
EXPECTED = (
    "a dialog needs one of the keys utterances, dialog or messages, history and candidates, or prompt and completion"
)


def is_turn(fields: Fields) -> bool:
    """Whether a record is one message, the others of its conversation on lines of their own."""
    return fields.has("content") and (fields.has("id") or fields.has("speaker")) and not is_utterance(fields)


def reader_of(fields: Fields) -> Callable[[Fields, Notes], Dialog] | None:
    return next((reader for names, reader in RECORDS if fields.has(*names)), None)


def dialog_of(record: dict[str, Any], notes: Notes | None = None) -> Dialog:
    """The dialog in a record. Raises ValueError with what is wrong."""
    fields, notes = Fields(record), Notes() if notes is None else notes
    reader = reader_of(fields)
    if reader is None:
        raise ValueError(f"has the keys {keys_found(record)}; {EXPECTED} - at `$`")
    dialog = reader(fields, notes)
    fields.get("id"), fields.get("place")
    fields.note_unread(notes)
    return dialog
