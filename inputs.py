"""What the model reads: truncated instances and packed batches (Wolf et al. 2019, arXiv 1901.08149, section 3)."""

from dataclasses import dataclass, field, fields
from functools import partial

import numpy as np
import torch

from cli import log
from utils import SpecialIds, Split


@dataclass
class Instance:
    """A packed row before it is a tensor: a prefix and the candidates that share it."""

    prefix: list[int]  # <bos> persona, each history utterance behind its speaker, the reply's <speaker1>
    token_types: list[int]  # of the prefix: every token's speaker
    candidates: list[list[int]]  # reply tokens and <eos>; the gold one is the last
    extra: list[int] = field(default_factory=list)  # one more continuation, in no loss and no ranking


def fit(
    persona: list[list[int]], history: list[list[int]], reply: int, limit: int
) -> tuple[list[list[int]], list[list[int]], int]:
    """Cut persona, history and reply so that a row fits a model.

    Whole oldest utterances go first, then the front of the oldest one left, then the end of the reply. The persona
    stays whole unless it alone leaves no room; then its last sentences go.

    Args:
        reply: tokens of the longest candidate (or to be generated), `<eos>` not counted.
        limit: tokens the model takes.
    Returns:
        persona, history and the tokens left for a reply (at least one).
    """
    room = limit - 3  # <bos>, the reply's speaker, <eos>
    while persona and sum(map(len, persona)) > room - 1:
        persona = persona[:-1]
    room -= sum(map(len, persona))
    over = sum(len(utterance) + 1 for utterance in history) + reply - room
    while over > 0 and len(history) > 1:
        over -= len(history[0]) + 1
        history = history[1:]
    if over > 0 and history:
        if over < len(history[0]):
            history, over = [history[0][over:]], 0
        else:
            history, over = [], over - len(history[0]) - 1
    return persona, history, reply - max(over, 0)


def build_prefix(persona: list[list[int]], history: list[list[int]], ids: SpecialIds) -> tuple[list[int], list[int]]:
    """The tokens before a reply, and each one's token type (the id of the speaker of its segment).

    Speakers alternate backwards from the reply, which is `<speaker1>`'s; the persona is `<speaker1>`'s too.
    """
    tokens = [ids.bos, *(token for sentence in persona for token in sentence)]
    types = [ids.speaker1] * len(tokens)
    for distance, utterance in zip(range(len(history), 0, -1), history, strict=True):
        speaker = ids.speaker2 if distance % 2 else ids.speaker1
        tokens += [speaker, *utterance]
        types += [speaker] * (len(utterance) + 1)
    return [*tokens, ids.speaker1], [*types, ids.speaker1]


class Instances(torch.utils.data.Dataset):
    """The instances of a split, built when they are asked for.

    Args:
        max_history: exchanges; the last `2 * max_history + 1` utterances are kept.
        num_candidates: keep this many, the last ones; <= 0 keeps all.
        permutations: rotations of the persona's sentences; instance i is utterance `i % len(split)`, rotated by
            `i // len(split)` sentences.
        limit: tokens the model takes.
        extras: by the string number of a gold reply, tokens that the instance gets as `extra`.
    """

    def __init__(
        self,
        split: Split,
        ids: SpecialIds,
        max_history: int,
        limit: int,
        num_candidates: int = 0,
        permutations: int = 1,
        extras: dict[int, list[int]] | None = None,
    ):
        self.split, self.special_ids, self.limit = split, ids, limit
        self.n_history = 2 * max_history + 1
        self.num_candidates, self.permutations = max(num_candidates, 0), permutations
        self.extras = extras or {}

    def __len__(self) -> int:
        return len(self.split) * self.permutations

    def __getitem__(self, index: int) -> Instance:
        if not 0 <= index < len(self):
            raise IndexError(index)
        candidates = self.split.strings("candidates", index % len(self.split))
        longest = int(self.split.sizes[candidates].max())  # of all: the cut does not depend on how many are kept
        candidates = candidates[-self.num_candidates :]
        replies = [self.split.ids(candidate) for candidate in candidates]
        (prefix, types), room = self.prefix(index, longest)
        extra = self.extras.get(int(candidates[-1]), [])[: self.limit - len(prefix)]
        return Instance(prefix, types, [[*ids[:room], self.special_ids.eos] for ids in replies], extra)

    def prefix(self, index: int, reply: int) -> tuple[tuple[list[int], list[int]], int]:
        """The prefix (tokens, types) of an instance, cut for `reply` tokens to come, and how many of them may."""
        rotation, utterance = divmod(index, len(self.split))
        split = self.split
        persona = [split.ids(s) for s in split.strings("persona", split.dialogs[utterance])]
        if persona:
            rotation %= len(persona)
            persona = persona[len(persona) - rotation :] + persona[: len(persona) - rotation]
        history = [split.ids(s) for s in split.strings("history", utterance)[-self.n_history :]]
        persona, history, room = fit(persona, history, reply, self.limit)
        return build_prefix(persona, history, self.special_ids), room

    def lengths(self) -> np.ndarray:
        """Tokens of each utterance's longest row (prefix and longest candidate, of all) before anything is cut."""
        split, sizes = self.split, self.split.sizes
        history_offsets, history = split._lists["history"]
        first = np.maximum(history_offsets[1:] - self.n_history, history_offsets[:-1])
        return (
            3  # <bos>, the reply's speaker, <eos>
            + span_sums(sizes, *split._lists["persona"])[split.dialogs]
            + span_sums(sizes + 1, history_offsets, history, first)
            + span_maxima(sizes, *split._lists["candidates"])
        )

    def report_cuts(self, name: str) -> None:
        """Say once how many rows are too long for the model."""
        cut = int((self.lengths() > self.limit).sum())
        if cut:
            log.info(f"{name}: {cut} of {len(self.split)} utterances are longer than {self.limit} tokens and are cut")


def span_sums(
    sizes: np.ndarray, offsets: np.ndarray, numbers: np.ndarray, first: np.ndarray | None = None
) -> np.ndarray:
    """For each list of string numbers, from `first` (by default its start) on, the sum of the strings' sizes."""
    running = np.concatenate([[0], np.cumsum(sizes[numbers])])
    return running[offsets[1:]] - running[offsets[:-1] if first is None else first]


def span_maxima(sizes: np.ndarray, offsets: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """For each list of string numbers (none empty), the size of the largest string."""
    return np.maximum.reduceat(sizes[numbers], offsets[:-1]) if len(offsets) > 1 else np.zeros(0, np.int64)


@dataclass
class Batch:
    """Packed rows as tensors. B rows of T tokens: a prefix, then up to N candidates, then padding.

    A token of candidate n sees the prefix and candidate n; positions restart after the prefix. The gold reply is
    each row's last candidate.
    """

    input_ids: torch.Tensor  # (B, T)
    token_types: torch.Tensor  # (B, T) every token's speaker
    positions: torch.Tensor  # (B, T)
    segments: torch.Tensor  # (B, T) 0 prefix, n candidate n (from 1), -1 padding
    ends: torch.Tensor  # (B, N) where each candidate's <eos> stands; 0 where a row has fewer candidates
    n_candidates: torch.Tensor  # (B,)
    lm_positions: torch.Tensor  # (L,) positions, in the flattened (B * T), that predict a token of a gold reply
    lm_labels: torch.Tensor  # (L,) the tokens they predict: the gold replies and their <eos>
    extra_starts: torch.Tensor  # (B,) where each row's extra continuation begins, in the flattened (B * T); 0: none
    read: torch.Tensor  # (R,) positions, in the flattened (B * T), that are read: ends, lm_positions, all of the extras

    def prefix_ends(self) -> torch.Tensor:
        """(B,) where each row's prefix ends, in the flattened (B * T)."""
        rows = torch.arange(len(self.segments), device=self.segments.device)
        return rows * self.segments.shape[1] + (self.segments == 0).sum(1) - 1

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)))


def collate(instances: list[Instance], ids: SpecialIds) -> Batch:
    """Pack instances into a batch as wide as its longest row."""
    rows = [len(i.prefix) + sum(map(len, i.candidates)) + len(i.extra) for i in instances]
    shape = len(instances), max(rows)
    width = max(len(instance.candidates) for instance in instances)
    tokens, types = np.full(shape, ids.pad), np.full(shape, ids.pad)
    positions, segments = np.zeros(shape, np.int64), np.full(shape, -1)
    ends, extra_starts = np.zeros((len(instances), width), np.int64), np.zeros(len(instances), np.int64)
    lm_positions, lm_labels, read = [], [], []
    for row, instance in enumerate(instances):
        start = at = len(instance.prefix)
        tokens[row, :at], types[row, :at] = instance.prefix, instance.token_types
        positions[row, :at], segments[row, :at] = range(at), 0
        types[row, at : rows[row]] = ids.speaker1
        for n, continuation in enumerate([*instance.candidates, instance.extra]):
            span = slice(at, at + len(continuation))
            tokens[row, span], segments[row, span] = continuation, n + 1
            positions[row, span] = range(start, start + len(continuation))
            if n < len(instance.candidates):
                ends[row, n] = span.stop - 1
                read.append(row * shape[1] + span.stop - 1)
            elif instance.extra:
                extra_starts[row] = row * shape[1] + at
                read += range(row * shape[1] + at, row * shape[1] + span.stop)
            at = span.stop
        gold = instance.candidates[-1]  # its first token is predicted by the prefix's last, the next by the one before
        end = row * shape[1] + ends[row, len(instance.candidates) - 1]
        lm_positions += [row * shape[1] + start - 1, *range(end - len(gold) + 1, end)]
        lm_labels += gold
    counts = [len(instance.candidates) for instance in instances]
    read = sorted(read + lm_positions)
    columns = (tokens, types, positions, segments, ends, counts, lm_positions, lm_labels, extra_starts, read)
    return Batch(*map(torch.as_tensor, columns))


def batches_by_length(
    instances: Instances, batch_size: int, size: int | None = None, rank: int = 0, world: int = 1
) -> torch.utils.data.DataLoader:
    """The first `size` utterances of a split in batches of like length; for what does not depend on the order.

    Of `world` processes, `rank` gets its share of the batches; every utterance is in one of them.
    """
    order = np.argsort(instances.lengths()[:size], kind="stable").tolist()
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)][rank::world]
    collate_batch = partial(collate, ids=instances.special_ids)
    return torch.utils.data.DataLoader(instances, batch_sampler=batches, collate_fn=collate_batch)
