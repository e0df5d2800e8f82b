"""What people say to each other: messages of any speakers in, a `Dialog` out.

All data is brought to one form, a list of `Message`s. `dialog_from` then tells the bot from the other person, takes the
persona out, and makes every utterance of the bot a reply to be learned.
"""

import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import dropwhile, groupby
from pathlib import Path
from typing import NamedTuple

import msgspec

from cli import log

# What speakers are called that have a part in a dialog. A tool's messages are left out.
ROLES = {
    "user": "user human prompter customer client localhuman you",
    "assistant": "assistant bot gpt chatgpt model ai agent chatbot char character",
    "system": "system developer context",
    "tool": "tool function functioncall functionresponse toolcall toolresponse observation environment ipython",
}
ROLE_OF = {word: role for role, words in ROLES.items() for word in words.split()}
SIDES = ("user", "assistant")

SILENCE = re.compile(r"\s*__ ?SILENCE ?__\s*", re.I)  # ParlAI's word for a turn without words
PERSONA_LINE = re.compile(r"\s*(your|partner'?s)\s+persona\s*:\s*(.*?)\s*", re.I)  # ParlAI's, of both sides


@cache
def normal(key: str) -> str:
    """A name as it is compared: capitals, spaces and what else is no letter or digit do not count."""
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
        places = range(self.length)[place]  # bounds and negative places as in a list of that length
        if isinstance(place, slice):
            return [self.texts[i] for i in places]
        return self.texts[places]

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

    @property
    def turns(self) -> list[str]:
        """What both sides say, up to the last reply. Later histories hold all of the earlier ones."""
        if not self.utterances:
            return []
        last = self.utterances[-1]
        return [*last.history, last.candidates[-1]]


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
        if self:
            counts = ", ".join(f"{what} ({count})" for what, count in sorted(self.items()))
            warn_once(f"warning: {path}: not read: {textwrap.shorten(counts, 400, placeholder=' ...')}")


@cache  # a file is parsed anew in every loop over its dialogs
def warn_once(message: str) -> None:
    log.warning(message)


# ------------------------------------------------------------------------------------------------------------
# From messages to a dialog
# ------------------------------------------------------------------------------------------------------------


def dialog_from(personality: list[str], messages: list[Message], notes: Notes) -> Dialog:
    """A dialog from messages of any speakers."""
    persona, spoken = spoken_in(with_roles(messages), notes)
    replies = replies_of(spoken)
    if spoken and not replies:
        notes["dialogs without a reply to learn"] += 1
    return Dialog([*personality, *persona], replies)


def replies_of(messages: Iterable[Message]) -> list[Utterance]:
    """Every utterance of the assistant as the reply to all before it. The speakers are user and assistant."""
    texts: list[str] = []
    utterances = []
    for side, text, run in joined_turns(messages):
        if side == "assistant" and all(message.learned for message in run):
            utterances.append(reply_of(Prefix(texts, len(texts)), text, run))
        texts.append(text)
    return utterances


def reply_of(history: Sequence[str], text: str, messages: list[Message]) -> Utterance:
    """The reply that the assistant gives in one or more messages, which `text` joins."""
    right, distractors = {text}, []
    for message in messages:
        right |= {message.text, *message.alternatives}
        distractors += message.distractors
    wrong = [distractor for distractor in distractors if distractor and distractor not in right]
    # An alternative to a part of an utterance is none to the whole.
    alternatives = list(messages[0].alternatives) if len(messages) == 1 else []
    return Utterance(history, [*wrong, text], alternatives)


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


# ------------------------------------------------------------------------------------------------------------
# Who speaks
# ------------------------------------------------------------------------------------------------------------


def with_roles(messages: list[Message]) -> list[Message]:
    """Messages whose speakers are roles, or are unchanged where they are nobody that is known."""
    names = list(dict.fromkeys(message.speaker for message in messages))  # in the order in which they first speak
    if names == [None]:  # they alternate, the other person first
        return [message._replace(speaker=SIDES[i % 2]) for i, message in enumerate(messages)]
    roles = roles_of(names)
    from_user = dropwhile(lambda speaker: roles[speaker] != "user", (message.speaker for message in messages))
    if "assistant" not in roles.values() and any(roles[speaker] == "system" for speaker in from_user):
        # Data of tasks, such as bookings, call the bot the system. OpenAI's system messages answer nobody.
        roles = {name: "assistant" if role == "system" else role for name, role in roles.items()}
    return [message._replace(speaker=roles[message.speaker]) for message in messages]


def before_reply(messages: list[Message]) -> list[Message]:
    """Messages whose speakers, where they have none, are counted backwards from the reply that follows."""
    sides = sides_before_reply(len(messages))
    return [message._replace(speaker=message.speaker or side) for message, side in zip(messages, sides, strict=True)]


def sides_before_reply(count: int) -> list[str]:
    """Who says each of the `count` utterances before a reply of the assistant: sides alternate, the user's is last."""
    return [SIDES[i % 2] for i in reversed(range(count))]


def roles_of(speakers: list[str | None]) -> dict[str | None, str | None]:
    """The role of each speaker, in the order in which they first speak.

    Where no name tells who the assistant is, it is the second to speak, or the second by number where numbers count
    the speakers. Where names tell both sides, others have no part in the dialog, and are left as they are.
    """
    roles = {speaker: speaker for speaker in speakers}
    unknown = []
    for speaker in filter(None, speakers):
        role = ROLE_OF.get(normal(speaker))
        if role is None:
            unknown.append(speaker)
        elif role != "tool":  # what kind of tool is told where its messages are counted
            roles[speaker] = role
    known = set(roles.values()).intersection(SIDES)
    if len(known) == 2:
        return roles
    roles |= dict.fromkeys(unknown, "user")
    if "assistant" not in known:
        second = 0 if "user" in known else 1
        roles |= dict.fromkeys(counted(unknown)[second : second + 1], "assistant")
    return roles


def counted(speakers: list[str]) -> list[str]:
    """Speakers that numbers count, from 0 or 1, in that order: speaker 2 is the second, though it may begin.

    Others are left in their order. Numbers of people, such as 12 and 7, say nothing of it.
    """
    numbered = {}
    for speaker in speakers:
        if number := re.search(r"\d{1,9}$", speaker):
            numbered[int(number[0])] = speaker
    numbers, size = sorted(numbered), len(speakers)
    if numbers in (list(range(size)), list(range(1, size + 1))):
        return [numbered[number] for number in numbers]
    return speakers


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
            if role == "system":  # after persona lines, ParlAI's context holds what the other person says
                role = "user"
            # Nothing is left where a message was persona lines alone.
            if text and not SILENCE.fullmatch(text):
                spoken.append(message._replace(speaker=role, text=text))
    return personality, spoken


# ------------------------------------------------------------------------------------------------------------
# Personas
# ------------------------------------------------------------------------------------------------------------


def without_persona(text: str) -> tuple[list[str], str]:
    """The sentences of ParlAI's lines `your persona: ...` in a text, and the text without both sides' such lines."""
    lines = text.splitlines()
    persona, others = [], []
    for line in lines:
        sentence = persona_line(line)
        if sentence is None:
            others.append(line)
        elif sentence:
            persona.append(sentence)
    if len(others) < len(lines):
        text = "\n".join(others).strip()
    return persona, text


def persona_line(line: str) -> str | None:
    """The sentence of a line `your persona: ...`, "" of one of the partner's; None of a line of another kind."""
    match = PERSONA_LINE.fullmatch(line)
    if match is None:
        return None
    return match[2] if match[1].lower() == "your" else ""


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
        sentences.append(begun)  # of a line that ends with an abbreviation
    return list(filter(None, sentences))
