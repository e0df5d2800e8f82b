"""What the model reads: rows of a reply each, truncated to fit it (Wolf et al. 2019, arXiv 1901.08149, section 3)."""

from dataclasses import dataclass, field
from itertools import accumulate, chain

import numpy as np
import torch

from cli import log
from splits import Ragged, Split, Views
from utils import DialogTokenizer, SpecialIds

Prefix = tuple[list[int], list[int]]  # the tokens before a reply, and each one's token type


@dataclass
class Branch:
    """A continuation of a row's trunk. It sees the trunk up to column `fork`, and itself."""

    fork: int
    tokens: list[int]


@dataclass
class Reply:
    """A reply to learn: the trunk's column `start` predicts its first token.

    The gold candidate is the trunk after `start`, up to where the last branch leaves it, and that branch.
    """

    start: int
    candidates: list[Branch]  # each ends with <eos>; the gold one is the last


@dataclass
class Instance:
    """A packed row before it is a tensor: a prefix and the candidates that share it."""

    prefix: list[int]  # <bos> persona, each history utterance after its speaker, the reply's <speaker1>
    token_types: list[int]  # of the prefix: every token's speaker
    candidates: list[list[int]]  # reply tokens and <eos>; the gold one is the last
    extra: list[int] = field(default_factory=list)  # one more continuation, in no loss and no ranking

    @property
    def trunk(self) -> list[int]:
        return self.prefix

    @property
    def replies(self) -> list[Reply]:
        end = len(self.prefix) - 1
        return [Reply(end, [Branch(end, tokens) for tokens in self.candidates])]


@dataclass
class DialogRow:
    """A whole dialog as one row: what its replies share is there once.

    The trunk is the persona and all utterances, gold replies included. A reply's distractors, and the <eos> of the gold
    one, are branches. Attention is causal, so all hidden states are those of a row for each reply with its whole
    history. (For candidates alone: Uni-Encoder, arXiv 2106.01263; for preference pairs: arXiv 2410.20305.)
    """

    trunk: list[int]
    token_types: list[int]  # of the trunk
    replies: list[Reply] = field(default_factory=list)
    extra: list[int] = field(default_factory=list)  # none: an instance's


def truncate(
    persona: list[list[int]], history: list[list[int]], reply: int, limit: int
) -> tuple[list[list[int]], list[list[int]], int]:
    """Truncate persona, history and reply so that a row fits a model.

    Whole oldest utterances go first. The persona loses its last sentences only where it does not fit beside the newest
    utterance, and that one its front only where it does not fit alone: without what it answers, a reply is about
    nothing. The end of the reply goes last.

    Args:
        reply: tokens of the longest candidate (or to be generated), `<eos>` not counted.
        limit: tokens the model takes.
    Returns:
        persona, history and the tokens left for a reply (at least one).
    """
    room = limit - 3 - reply  # <bos>, the reply's speaker, <eos>
    utterance_sizes = [len(utterance) + 1 for utterance in history]  # each after its speaker
    beside_message = room - sum(utterance_sizes[-1:])
    # Whole sentences: half of one may say the opposite.
    ends = accumulate(map(len, persona))
    sentences = sum(end <= beside_message for end in ends)
    persona = persona[:sentences]
    too_many = sum(map(len, persona)) + sum(utterance_sizes) - room
    while too_many > 0 and history:
        oldest, *later = history
        if not later and too_many < len(oldest):
            # Its front goes, since a reply answers most of all how a message ends.
            return persona, [oldest[too_many:]], reply
        too_many -= len(oldest) + 1
        history = later
    return persona, history, reply - max(too_many, 0)


def build_prefix(persona: list[list[int]], history: list[list[int]], ids: SpecialIds) -> Prefix:
    """The tokens before a reply, with the speaker of each one's segment as its token type.

    Speakers alternate backwards from the reply, which is `<speaker1>`'s; the persona is `<speaker1>`'s too.
    """
    tokens = [ids.bos, *chain(*persona)]
    types = [ids.speaker1] * len(tokens)
    for place, utterance in enumerate(history):
        # Counted from the end, so that an utterance keeps its speaker whatever was truncated before it.
        to_go = len(history) - place
        speaker = ids.speaker2 if to_go % 2 else ids.speaker1
        tokens += [speaker, *utterance]
        types += [speaker] * (len(utterance) + 1)
    return [*tokens, ids.speaker1], [*types, ids.speaker1]


def utterances_shown(max_history: int) -> int:
    """Utterances of history that a model sees, for a number of exchanges; -1: all (a number larger than any)."""
    return 2 * max_history + 1 if max_history >= 0 else 2**31


@dataclass(eq=False)
class Instances(torch.utils.data.Dataset):
    """The instances of a split, built when they are indexed.

    Args:
        max_history: exchanges; the last `2 * max_history + 1` utterances are kept. -1: all.
        limit: tokens the model takes.
        num_candidates: keep this many, the last ones; <= 0 keeps all.
        permutations: rotations of the persona's sentences; instance i is utterance `i % len(split)`, rotated by
            `i // len(split)` sentences.
        extras: by the string number of a gold reply, tokens that the instance gets as `extra`.
        inside: by the string number of a sentence of a persona, its tokens where it follows another; where it has none,
            they are the same (see `DialogTokenizer.encode_persona`).
    """

    split: Split
    ids: SpecialIds
    max_history: int
    limit: int
    num_candidates: int = 0
    permutations: int = 1
    extras: dict[int, list[int]] = field(default_factory=dict)
    inside: dict[int, list[int]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.split) * self.permutations

    @property
    def sizes(self) -> np.ndarray:
        """Replies of each row: one."""
        return np.ones(len(self), dtype=int)

    def __getitem__(self, index: int) -> Instance:
        if index not in range(len(self)):
            raise IndexError(index)
        split = self.split
        candidates = split.candidates[index % len(split)]
        longest = int(split.sizes[candidates].max())  # of all: truncation does not depend on how many are kept
        (prefix, types), room = self.prefix(index, longest)
        kept = self.kept(candidates)
        # The prefix is shared, so all of them get the room that was made for the longest.
        replies = [[*split.ids(candidate)[:room], self.ids.eos] for candidate in kept]
        gold = int(kept[-1])
        extra = self.extras.get(gold, [])
        left = self.limit - len(prefix)
        return Instance(prefix, types, replies, extra[:left])

    def kept(self, candidates: np.ndarray) -> np.ndarray:
        """Those of an utterance's candidates that are shown."""
        last = max(self.num_candidates, 0)
        return candidates[-last:]  # [-0:] is all of them

    def prefix(self, index: int, reply: int, shown: int | None = None) -> tuple[Prefix, int]:
        """The prefix of an instance, truncated for `reply` tokens to come, and how many of them may.

        Args:
            shown: the last utterances of history that are shown, where they are not `n_history`.
        """
        split = self.split
        rotation, utterance = divmod(index, len(split))
        persona = split.persona[split.dialogs[utterance]]
        if rotation:  # most have none, and np.roll is slow
            persona = np.roll(persona, rotation)
        last = shown or self.n_history
        history = split.history[utterance][-last:]
        first, later = persona[:1], persona[1:].tolist()
        persona = [split.ids(string) for string in first]
        persona += [self.inside.get(string) or split.ids(string) for string in later]
        history = [split.ids(string) for string in history]
        persona, history, room = truncate(persona, history, reply, self.limit)
        return build_prefix(persona, history, self.ids), room

    @property
    def n_history(self) -> int:
        return utterances_shown(self.max_history)

    def longest(self) -> np.ndarray:
        """Tokens of each utterance's longest candidate, of all that it has."""
        candidates = self.split.candidates
        sizes = self.split.sizes[candidates.values]
        return np.maximum.reduceat(sizes, candidates.starts)

    def lengths(self) -> np.ndarray:
        """Tokens of each utterance's prefix and longest candidate, of all, before anything is truncated.

        With `inside` a persona may come out a token longer than it is, for its first sentence.
        """
        split = self.split
        persona_sizes = split.sizes
        if self.inside:
            persona_sizes = persona_sizes.copy()
            inside_sizes = map(len, self.inside.values())
            persona_sizes[list(self.inside)] = list(inside_sizes)
        personas = row_sums(split.persona, persona_sizes)  # of each dialog
        return (
            3  # <bos>, the reply's speaker, <eos>
            + personas[split.dialogs]
            + row_sums(split.history, split.sizes + 1, last=self.n_history)  # each utterance after its speaker
            + self.longest()
        )

    def report_truncation(self, name: str) -> None:
        """Say once how many rows are too long for the model."""
        count = int((self.lengths() > self.limit).sum())
        if count:
            size = len(self.split)
            log.info(f"{name}: {count} of {size} utterances are longer than {self.limit} tokens and are truncated")


def sentences_inside(split: Split, tokenizer: DialogTokenizer) -> dict[int, list[int]]:
    """The argument `inside` of `Instances`."""
    if tokenizer.ids.token_types:
        return {}
    strings = np.unique(split.persona.values).tolist()
    sentences = [split.text(string) for string in strings]
    tokens = tokenizer.encode_inside(sentences)
    return dict(zip(strings, tokens, strict=True))


def running_sums(strings: Ragged | Views, sizes: np.ndarray) -> np.ndarray:
    """At place i the sum of the sizes of the first i strings, of all rows of string numbers one after the other."""
    return np.concatenate([[0], np.cumsum(sizes[strings.values])])


def row_sums(strings: Ragged | Views, sizes: np.ndarray, last: int | None = None) -> np.ndarray:
    """For each row of string numbers, or for its `last` ones, the sum of the strings' sizes.

    Rows of histories overlap. A difference of running sums takes the same time for each, however long it is.
    """
    starts, ends = strings.starts, strings.ends
    if last is not None:
        starts = np.maximum(starts, ends - last)
    running = running_sums(strings, sizes)
    return running[ends] - running[starts]
