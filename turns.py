"""What people say to each other: messages of any speakers in, a `Dialog` out.

All data is brought to one form, a list of `Message`s. `dialog_from` then tells the bot from the other person, takes the
persona out, and makes every utterance of the bot a reply to be learned.
"""

import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import chain, groupby
from pathlib import Path
from typing import NamedTuple

import msgspec

from cli import log

ROLES = {
    "user": "user human prompter customer client localhuman you",
    "assistant": "assistant bot gpt chatgpt model ai agent chatbot char character",
    "system": "system developer context",
    "tool": "tool function functioncall functionresponse toolcall toolresponse observation environment ipython",
}
ROLE_OF = {word: role for role, words in ROLES.items() for word in words.split()}
SIDES = ("user", "assistant")

SILENCE = re.compile(r"\s*__ ?SILENCE ?__\s*", re.I)  # ParlAI's word for a turn without words
PERSONA_LINE = re.compile(r"\s*(your|partner'?s)\s+persona\s*:\s*(.*?)\s*", re.I)


@cache
def normal(key: str) -> str:
    return re.sub(r"[\W_]+", "", key).lower()


class Prefix(Sequence):
    """The first `length` texts of a list that all replies of a dialog share.

    A list for each reply would take memory that grows with the square of the dialog.
    """

    def __init__(self, texts: list[str], length: int):
        self.texts, self.length = texts, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, place):
        found = range(self.length)[place]
        return [self.texts[i] for i in found] if isinstance(place, slice) else self.texts[found]

    def __eq__(self, other) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def __repr__(self) -> str:
        return repr(self[:])


class Utterance(msgspec.Struct):
    history: Sequence[str]
    candidates: list[str]  # the gold reply is the last one; alone, it asks for sampled distractors
    alternatives: list[str] = []  # replies that are as right as the gold one


class Dialog(msgspec.Struct):
    personality: list[str]
    utterances: list[Utterance]


class Message(NamedTuple):
    """A turn, in the one form that all data is brought to."""

    speaker: str | None  # as the data calls it: a role, a name, a number, or nothing
    text: str
    learned: bool = True  # False: the model reads it and does not learn to say it
    distractors: Sequence[str] = ()
    alternatives: Sequence[str] = ()


class Notes(Counter):
    """How often what of a file was not read. Said once, after all of it is read."""

    def say(self, path: Path) -> None:
        if found := +self:  # those above 0
            counts = ", ".join(f"{what} ({count})" for what, count in sorted(found.items()))
            warn_once(f"warning: {path}: not read: {textwrap.shorten(counts, 400, placeholder=' ...')}")
        self.clear()


@cache
def warn_once(message: str) -> None:
    log.warning(message)


# ------------------------------------------------------------------------------------------------------------
# From messages to a dialog
# ------------------------------------------------------------------------------------------------------------


def joined_turns(messages: Iterable[tuple]) -> Iterator[tuple[str, str, list]]:
    """What one side says in a row as one utterance, since utterances alternate.

    Args:
        messages: tuples that begin with a side and a text.
    Yields:
        the side, the joined text, and the messages that were joined.
    """
    for side, run in groupby(messages, key=lambda message: message[0]):
        run = list(run)
        yield side, " ".join(message[1] for message in run), run


def replies_of(messages: Iterable[Message]) -> list[Utterance]:
    """Every utterance of the assistant as the reply to all before it. The speakers are user and assistant."""
    texts: list[str] = []
    utterances = []
    for side, text, run in joined_turns(messages):
        if side == "assistant" and all(message.learned for message in run):
            right = {text, *chain.from_iterable((message.text, *message.alternatives) for message in run)}
            distractors = [wrong for message in run for wrong in message.distractors if wrong and wrong not in right]
            # An alternative to a part of an utterance is none to the whole.
            alternatives = list(run[0].alternatives) if len(run) == 1 else []
            utterances.append(Utterance(Prefix(texts, len(texts)), [*distractors, text], alternatives))
        texts.append(text)
    return utterances


def dialog_from(personality: list[str], messages: list[Message], notes: Notes) -> Dialog:
    """A dialog from messages of any speakers."""
    persona, spoken = spoken_in(with_roles(messages), notes)
    replies = replies_of(spoken)
    if spoken and not replies:
        notes["dialogs without a reply to learn"] += 1
    return Dialog([*personality, *persona], replies)


def with_roles(messages: list[Message]) -> list[Message]:
    """Messages whose speakers are roles, or are unchanged where they are nobody that is known."""
    names = list(dict.fromkeys(message.speaker for message in messages))
    if names == [None]:  # they alternate, the other person first
        return [message._replace(speaker=SIDES[i % 2]) for i, message in enumerate(messages)]
    roles = roles_of(names)
    return [message._replace(speaker=roles[message.speaker]) for message in messages]


def before_reply(messages: list[Message]) -> list[Message]:
    """Messages whose speakers, where they have none, are counted backwards from the reply that follows."""
    sides = [SIDES[i % 2] for i in reversed(range(len(messages)))]
    return [message._replace(speaker=message.speaker or side) for message, side in zip(messages, sides, strict=True)]


def roles_of(speakers: list[str | None]) -> dict[str | None, str | None]:
    """The role of each speaker, in the order in which they first speak.

    Where no name tells who the assistant is, it is the second to speak, or the second by number where numbers count
    the speakers. Where names tell both sides, others have no part in the dialog, and are left as they are.
    """
    roles = {speaker: ROLE_OF.get(normal(speaker or ""), speaker) for speaker in speakers}
    roles |= {speaker: speaker for speaker in speakers if roles[speaker] == "tool"}
    known = set(roles.values()) & set(SIDES)
    unknown = [speaker for speaker in speakers if speaker and normal(speaker) not in ROLE_OF]
    if known == set(SIDES):
        return roles
    roles |= dict.fromkeys(unknown, "user")
    if "assistant" not in known:
        numbers = {speaker: int(found[0]) for speaker in unknown if (found := re.search(r"\d{1,9}$", speaker))}
        # Speaker 2 is the second, though it may begin. Numbers of people, such as 12 and 7, say nothing of that.
        if sorted(numbers.values()) in (list(range(len(unknown))), list(range(1, len(unknown) + 1))):
            unknown.sort(key=numbers.get)
        second = unknown[:1] if "user" in known else unknown[1:2]
        roles |= dict.fromkeys(second, "assistant")
    return roles


def spoken_in(messages: list[Message], notes: Notes) -> tuple[list[str], list[Message]]:
    """The bot's persona in messages with roles, and what both sides say in them, without silence and nothing."""
    personality, spoken = [], []
    for message in messages:
        role, text = message.speaker, message.text
        if role == "system" and not PERSONA_LINE.match(text):
            personality += split_sentences(text)
        elif not text.strip():
            notes["messages without text"] += 1
        elif role not in (*SIDES, "system"):
            notes[f"messages of the role {(role or '(none)')[:40]}"] += 1
        else:
            persona, text = without_persona(text)
            personality += persona
            # Nothing is left where a message was persona lines alone.
            if text and not SILENCE.fullmatch(text):
                # After persona lines, ParlAI's context holds what the other person says.
                spoken.append(message._replace(speaker="user" if role == "system" else role, text=text))
    return personality, spoken


def without_persona(text: str) -> tuple[list[str], str]:
    """The sentences of ParlAI's lines `your persona: ...` in a text, and the text without both sides' such lines."""
    if "persona" not in text.lower():
        return [], text
    lines = [(line, PERSONA_LINE.fullmatch(line)) for line in text.splitlines()]
    found = [match for _, match in lines if match]
    if not found:
        return [], text
    persona = [match[2] for match in found if match[1].lower() == "your" and match[2]]
    return persona, "\n".join(line for line, match in lines if not match).strip()


# ------------------------------------------------------------------------------------------------------------
# Personas
# ------------------------------------------------------------------------------------------------------------

# A full stop after these ends no sentence: Dr. Smith, the U.S. government, J. Smith.
ABBREVIATION = re.compile(
    r"\b(?i:dr|mr|mrs|ms|prof|st|jr|sr|vs|gen|rev)\.$|(?:\b[A-Za-z]\.)+[A-Za-z]\.$|\b(?!I)[A-Z]\.$"
)
SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[.!?][\"”’)])\s+|(?<=[。！？])\s*")


def split_sentences(text: str) -> list[str]:
    """Persona sentences from running text: one per line, and a new one after . ! or ? and their like."""
    sentences = []
    for line in text.splitlines():
        begun = ""
        for part in SENTENCE_END.split(line.strip()):
            begun = f"{begun} {part}".strip()
            if not ABBREVIATION.search(begun[-20:]):
                sentences.append(begun)
                begun = ""
        sentences.append(begun)
    return [sentence for sentence in sentences if sentence]
