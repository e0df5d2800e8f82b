"""What the model reads: truncated instances and packed batches (Wolf et al. 2019, arXiv 1901.08149, section 3)."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import accumulate, chain

import numpy as np
import torch

from cli import log
from utils import DialogTokenizer, Ragged, SpecialIds, Split

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
    def size(self) -> int:
        """Tokens."""
        return len(self.prefix) + sum(map(len, self.candidates))

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

    @property
    def size(self) -> int:
        """Tokens."""
        return len(self.trunk) + sum(len(branch.tokens) for reply in self.replies for branch in reply.candidates)


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
    beside_message = room - sum(len(utterance) + 1 for utterance in history[-1:])
    persona = persona[: sum(size <= beside_message for size in accumulate(map(len, persona)))]
    too_many = sum(map(len, persona)) + sum(len(utterance) + 1 for utterance in history) - room
    while too_many > 0 and history:
        oldest, *later = history
        if not later and too_many < len(oldest):
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
        speaker = ids.speaker2 if (len(history) - place) % 2 else ids.speaker1
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

    @property
    def n_replies(self) -> int:
        return len(self)

    def __getitem__(self, index: int) -> Instance:
        if index not in range(len(self)):
            raise IndexError(index)
        candidates = self.split.candidates[index % len(self.split)]
        longest = int(self.split.sizes[candidates].max())  # of all: truncation does not depend on how many are kept
        (prefix, types), room = self.prefix(index, longest)
        candidates = self.kept(candidates)
        replies = [[*self.split.ids(candidate)[:room], self.ids.eos] for candidate in candidates]
        extra = self.extras.get(int(candidates[-1]), [])[: self.limit - len(prefix)]
        return Instance(prefix, types, replies, extra)

    def kept(self, candidates: np.ndarray) -> np.ndarray:
        """Those of an utterance's candidates that are shown."""
        return candidates[-max(self.num_candidates, 0) :]

    def prefix(self, index: int, reply: int, shown: int | None = None) -> tuple[Prefix, int]:
        """The prefix of an instance, truncated for `reply` tokens to come, and how many of them may.

        Args:
            shown: the last utterances of history that are shown, where they are not `n_history`.
        """
        rotation, utterance = divmod(index, len(self.split))
        persona = self.split.persona[self.split.dialogs[utterance]]
        if rotation:
            persona = np.roll(persona, rotation)
        history = self.split.history[utterance][-(shown or self.n_history) :]
        later = [self.inside.get(string) or self.split.ids(string) for string in persona[1:].tolist()]
        persona = [*map(self.split.ids, persona[:1]), *later]
        history = [self.split.ids(string) for string in history]
        persona, history, room = truncate(persona, history, reply, self.limit)
        return build_prefix(persona, history, self.ids), room

    @property
    def n_history(self) -> int:
        return utterances_shown(self.max_history)

    def lengths(self) -> np.ndarray:
        """Tokens of each utterance's prefix and longest candidate, of all, before anything is truncated.

        With `inside` a persona may come out a token longer than it is, for its first sentence.
        """
        split, persona_sizes = self.split, self.split.sizes
        if self.inside:
            persona_sizes = persona_sizes.copy()
            persona_sizes[list(self.inside)] = list(map(len, self.inside.values()))
        return (
            3  # <bos>, the reply's speaker, <eos>
            + row_sums(split.persona, persona_sizes)[split.dialogs]
            + row_sums(split.history, split.sizes + 1, last=self.n_history)
            + np.maximum.reduceat(split.sizes[split.candidates.values], split.candidates.offsets[:-1])
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
    return dict(zip(strings, tokenizer.encode_inside(list(map(split.text, strings))), strict=True))


@dataclass
class RowPlan:
    """Which replies a dialog row holds: `count` utterances from `first`, after a part of that one's history."""

    first: int
    history: int  # place of the first utterance that is shown
    count: int = 1


class DialogRows(torch.utils.data.Dataset):
    """The dialogs of a split, each as one row, or as several where it is too long. Built when they are indexed.

    Each row of a dialog begins with its persona. A later one shows as much of what was said before as fits half of the
    model. Histories that do not go on from one another, as some datasets have them, begin rows of their own.

    Args:
        instances: whose replies they are; its history must be the whole one.
        most: replies in a row.
    Attributes:
        sizes: replies of each row.
        shortened: replies whose row lacks a part of their history.
    """

    def __init__(self, instances: Instances, most: int):
        self.instances, self.most, self.shortened = instances, most, 0
        self.plans = list(self.plan())
        self.sizes = np.tile([plan.count for plan in self.plans], instances.permutations)

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def n_replies(self) -> int:
        return len(self.instances)

    @property
    def ids(self) -> SpecialIds:
        return self.instances.ids

    def plan(self) -> Iterator[RowPlan]:
        """Divide the replies into rows, in order."""
        split, limit = self.instances.split, self.instances.limit
        longest = np.maximum.reduceat(split.sizes[split.candidates.values], split.candidates.offsets[:-1])
        row, length = None, 0  # of the trunk, up to the next reply's speaker
        for utterance in range(len(split)):
            news = self.news(utterance) if row and row.count < self.most else None
            if news is not None:
                gold = int(split.sizes[split.candidates[utterance - 1][-1]])
                length += gold + int((split.sizes[news] + 1).sum()) + 1
            if news is None or length + longest[utterance] + 1 > limit:
                if row:
                    yield row
                history, persona = split.history[utterance], split.persona[split.dialogs[utterance]]
                shown = np.cumsum(split.sizes[history[::-1]] + 1)
                first = not (row and split.dialogs[row.first] == split.dialogs[utterance])
                # One more for the space before each sentence of a persona.
                room = (limit if first else limit // 2) - int((split.sizes[persona] + 1).sum()) - 3
                room -= int(longest[utterance]) if first else 0
                kept = max(1, int(np.searchsorted(shown, room, side="right")))
                row = RowPlan(utterance, max(0, len(history) - kept))
                length = (
                    2 + int((split.sizes[persona] + 1).sum()) + int((split.sizes[history[row.history :]] + 1).sum())
                )
            else:
                row.count += 1
            self.shortened += row.history > 0
        if row:
            yield row

    def news(self, utterance: int) -> np.ndarray | None:
        """What is said between the last utterance's reply and this one's; None where its history does not go on so.

        The bot's and the other person's utterances must alternate, as they do backwards from every reply.
        """
        split = self.instances.split
        if split.dialogs[utterance] != split.dialogs[utterance - 1]:
            return None
        before, history = split.history[utterance - 1], split.history[utterance]
        size = len(before) + 1
        known = np.array_equal(history[: size - 1], before) and len(history) > size
        known = known and history[size - 1] == split.candidates[utterance - 1][-1]
        return history[size:] if known and (len(history) - size) % 2 else None

    def __getitem__(self, index: int) -> DialogRow:
        if index not in range(len(self)):
            raise IndexError(index)
        rotation, number = divmod(index, len(self.plans))
        instances, plan = self.instances, self.plans[number]
        split, ids = instances.split, instances.ids
        shown = len(split.history[plan.first]) - plan.history
        longest = int(split.sizes[split.candidates[plan.first]].max())
        at = plan.first + rotation * len(split)
        (tokens, types), room = instances.prefix(at, longest, shown)
        row = DialogRow([*tokens], [*types])
        for utterance in range(plan.first, plan.first + plan.count):
            if utterance > plan.first:
                for place, text in enumerate(self.news(utterance)):
                    speaker = ids.speaker1 if place % 2 else ids.speaker2
                    said = [speaker, *split.ids(text)]
                    row.trunk += said
                    row.token_types += [speaker] * len(said)
                row.trunk.append(ids.speaker1)
                row.token_types.append(ids.speaker1)
                room = instances.limit - len(row.trunk) - 1
            *distractors, gold = (split.ids(text)[:room] for text in instances.kept(split.candidates[utterance]))
            start = len(row.trunk) - 1
            row.trunk += gold
            row.token_types += [ids.speaker1] * len(gold)
            branches = [Branch(start, [*tokens, ids.eos]) for tokens in distractors]
            row.replies.append(Reply(start, [*branches, Branch(len(row.trunk) - 1, [ids.eos])]))
        return row

    def report_truncation(self, name: str) -> None:
        """Say once how many replies have lost a part of their history."""
        if self.shortened:
            size = len(self.instances.split)
            log.info(f"{name}: {self.shortened} of {size} replies are in rows that begin after their dialog's start")


def row_sums(strings: Ragged, sizes: np.ndarray, last: int | None = None) -> np.ndarray:
    """For each row of string numbers, or for its `last` ones, the sum of the strings' sizes."""
    starts, ends = strings.offsets[:-1], strings.offsets[1:]
    if last is not None:
        starts = np.maximum(starts, ends - last)
    running = np.concatenate([[0], np.cumsum(sizes[strings.values])])
    return running[ends] - running[starts]


@dataclass
class Batch:
    """Packed rows as tensors. B rows of T tokens: a trunk, then its branches, then padding. U replies of N candidates.

    A token sees the trunk up to its fork, and its own branch; positions go on from the fork. The gold reply is the
    last candidate of each reply. "Flat" indices are into the flattened (B * T). In rows of one reply the trunk is its
    prefix, the branches its candidates, and U is B.
    """

    input_ids: torch.Tensor  # (B, T)
    token_types: torch.Tensor  # (B, T) every token's speaker
    positions: torch.Tensor  # (B, T)
    segments: torch.Tensor  # (B, T) 0 trunk, n branch n (from 1), -1 padding
    forks: torch.Tensor  # (B, T) the last column of the trunk that a token sees
    ends: torch.Tensor  # (U, N) flat indices of the candidates' <eos>; 0 where a reply has fewer candidates
    n_candidates: torch.Tensor  # (U,)
    lm_positions: torch.Tensor  # (L,) flat indices that predict a token of a gold reply
    lm_labels: torch.Tensor  # (L,) the tokens they predict: the gold replies and their <eos>
    extra_starts: torch.Tensor  # (B,) flat indices of where each row's extra continuation begins; 0: none
    head_positions: torch.Tensor  # (R,) flat indices of the hidden states that a head needs: ends, lm_positions, extras

    def prefix_ends(self) -> torch.Tensor:
        """(B,) flat indices of where each row's trunk ends."""
        rows = torch.arange(len(self.segments), device=self.segments.device)
        return rows * self.segments.shape[1] + (self.segments == 0).sum(1) - 1

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)))


class Layout:
    """Rows laid out column by column, as flat lists."""

    def __init__(self):
        self.tokens, self.types, self.positions, self.segments, self.forks, self.sizes = [], [], [], [], [], []

    def add(self, row: Instance | DialogRow, branches: list[Branch], speaker: int) -> None:
        size, number = len(row.trunk), 0
        self.tokens += row.trunk
        self.types += row.token_types
        self.positions += range(size)
        self.segments += [0] * size
        self.forks += range(size)
        for number, branch in enumerate(branches, 1):
            self.tokens += branch.tokens
            self.positions += range(branch.fork + 1, branch.fork + 1 + len(branch.tokens))
            self.segments += [number] * len(branch.tokens)
            self.forks += [branch.fork] * len(branch.tokens)
            size += len(branch.tokens)
        self.types += [speaker] * (size - len(row.trunk))
        self.sizes.append(size)


def collate(instances: list[Instance | DialogRow], ids: SpecialIds) -> Batch:
    """Pack rows into a batch as wide as its longest one."""
    layout, ends, n_candidates, lm_columns, lm_labels, extras = Layout(), [], [], [], [], []
    for number, row in enumerate(instances):
        replies, column = row.replies, len(row.trunk)
        branches = [branch for reply in replies for branch in reply.candidates]
        for reply in replies:
            sizes = [len(branch.tokens) for branch in reply.candidates]
            last_columns = np.cumsum(sizes) + (column - 1)
            column += sum(sizes)
            gold = reply.candidates[-1]
            ends += [(number, end) for end in last_columns.tolist()]
            n_candidates.append(len(sizes))
            in_trunk = range(reply.start, gold.fork + 1)
            lm_columns += [(number, at) for at in [*in_trunk, *range(column - sizes[-1], column - 1)]]
            lm_labels += [*row.trunk[reply.start + 1 : gold.fork + 1], *gold.tokens]
        if row.extra:
            extras.append((number, column, len(row.extra)))
            branches.append(Branch(len(row.trunk) - 1, row.extra))
        layout.add(row, branches, ids.speaker1)

    inside = first_columns(np.array(layout.sizes))  # (B, T) where no padding is
    width = inside.shape[1]

    def flat(places: list[tuple[int, int]]) -> np.ndarray:
        return np.array(places, dtype=np.int64).reshape(-1, 2) @ [width, 1]

    ends, lm_positions = flat(ends), flat(lm_columns)
    extra_starts = np.zeros(len(instances), dtype=np.int64)
    extra_positions = []
    for number, column, size in extras:
        extra_starts[number] = number * width + column
        extra_positions.append(extra_starts[number] + np.arange(size))
    columns = dict(
        input_ids=lay_out(layout.tokens, inside, ids.pad),
        token_types=lay_out(layout.types, inside, ids.pad),
        positions=lay_out(layout.positions, inside, 0),
        segments=lay_out(layout.segments, inside, -1),
        forks=lay_out(layout.forks, inside, 0),
        ends=lay_out(ends, first_columns(np.array(n_candidates)), 0),
        n_candidates=np.array(n_candidates),
        lm_positions=lm_positions,
        lm_labels=np.array(lm_labels, dtype=np.int64),
        extra_starts=extra_starts,
        head_positions=np.unique(np.concatenate([ends, lm_positions, *extra_positions])),
    )
    return Batch(**{name: torch.from_numpy(column) for name, column in columns.items()})


def first_columns(counts: np.ndarray) -> np.ndarray:
    """A mask (B, largest count) that is True in the first `counts[row]` columns of each row."""
    return np.arange(counts.max()) < counts[:, None]


def lay_out(values, mask: np.ndarray, padding: int) -> np.ndarray:
    """A table that holds `values`, row after row, where `mask` is True, and padding elsewhere."""
    table = np.full(mask.shape, padding)
    table[mask] = values
    return table


def batches_by_length(
    instances: Instances, batch_size: int, size: int | None = None, rank: int = 0, world: int = 1
) -> torch.utils.data.DataLoader:
    """The first `size` utterances of a split in batches of like length; for what does not depend on the order.

    Of `world` processes, `rank` gets its share of the batches; every utterance is in one of them.
    """
    order = np.argsort(instances.lengths()[:size], kind="stable").tolist()
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)][rank::world]
    collate_batch = partial(collate, ids=instances.ids)
    return torch.utils.data.DataLoader(instances, batch_sampler=batches, collate_fn=collate_batch)
