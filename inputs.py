"""What the model reads: truncated instances and packed batches (Wolf et al. 2019, arXiv 1901.08149, section 3)."""

from dataclasses import dataclass, field, fields
from functools import partial
from itertools import accumulate, chain

import numpy as np
import torch

from cli import log
from utils import Ragged, SpecialIds, Split

Prefix = tuple[list[int], list[int]]  # the tokens before a reply, and each one's token type


@dataclass
class Instance:
    """A packed row before it is a tensor: a prefix and the candidates that share it."""

    prefix: list[int]  # <bos> persona, each history utterance after its speaker, the reply's <speaker1>
    token_types: list[int]  # of the prefix: every token's speaker
    candidates: list[list[int]]  # reply tokens and <eos>; the gold one is the last
    extra: list[int] = field(default_factory=list)  # one more continuation, in no loss and no ranking


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


@dataclass(eq=False)
class Instances(torch.utils.data.Dataset):
    """The instances of a split, built when they are indexed.

    Args:
        max_history: exchanges; the last `2 * max_history + 1` utterances are kept.
        limit: tokens the model takes.
        num_candidates: keep this many, the last ones; <= 0 keeps all.
        permutations: rotations of the persona's sentences; instance i is utterance `i % len(split)`, rotated by
            `i // len(split)` sentences.
        extras: by the string number of a gold reply, tokens that the instance gets as `extra`.
    """

    split: Split
    ids: SpecialIds
    max_history: int
    limit: int
    num_candidates: int = 0
    permutations: int = 1
    extras: dict[int, list[int]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.split) * self.permutations

    def __getitem__(self, index: int) -> Instance:
        if index not in range(len(self)):
            raise IndexError(index)
        candidates = self.split.candidates[index % len(self.split)]
        longest = int(self.split.sizes[candidates].max())  # of all: truncation does not depend on how many are kept
        (prefix, types), room = self.prefix(index, longest)
        candidates = candidates[-max(self.num_candidates, 0) :]
        replies = [[*self.split.ids(candidate)[:room], self.ids.eos] for candidate in candidates]
        extra = self.extras.get(int(candidates[-1]), [])[: self.limit - len(prefix)]
        return Instance(prefix, types, replies, extra)

    def prefix(self, index: int, reply: int) -> tuple[Prefix, int]:
        """The prefix of an instance, truncated for `reply` tokens to come, and how many of them may."""
        rotation, utterance = divmod(index, len(self.split))
        persona = self.split.persona[self.split.dialogs[utterance]]
        if rotation:
            persona = np.roll(persona, rotation)
        history = self.split.history[utterance][-self.n_history :]
        persona, history = ([self.split.ids(string) for string in strings] for strings in (persona, history))
        persona, history, room = truncate(persona, history, reply, self.limit)
        return build_prefix(persona, history, self.ids), room

    @property
    def n_history(self) -> int:
        return 2 * self.max_history + 1

    def lengths(self) -> np.ndarray:
        """Tokens of each utterance's prefix and longest candidate, of all, before anything is truncated."""
        split = self.split
        return (
            3  # <bos>, the reply's speaker, <eos>
            + row_sums(split.persona, split.sizes)[split.dialogs]
            + row_sums(split.history, split.sizes + 1, last=self.n_history)
            + np.maximum.reduceat(split.sizes[split.candidates.values], split.candidates.offsets[:-1])
        )

    def report_truncation(self, name: str) -> None:
        """Say once how many rows are too long for the model."""
        count = int((self.lengths() > self.limit).sum())
        if count:
            size = len(self.split)
            log.info(f"{name}: {count} of {size} utterances are longer than {self.limit} tokens and are truncated")


def row_sums(strings: Ragged, sizes: np.ndarray, last: int | None = None) -> np.ndarray:
    """For each row of string numbers, or for its `last` ones, the sum of the strings' sizes."""
    starts, ends = strings.offsets[:-1], strings.offsets[1:]
    if last is not None:
        starts = np.maximum(starts, ends - last)
    running = np.concatenate([[0], np.cumsum(sizes[strings.values])])
    return running[ends] - running[starts]


@dataclass
class Batch:
    """Packed rows as tensors. B rows of T tokens: a prefix, then up to N candidates, then padding.

    A token of candidate n sees the prefix and candidate n; positions restart after the prefix. The gold reply is
    each row's last candidate. "Flat" indices are into the flattened (B * T).
    """

    input_ids: torch.Tensor  # (B, T)
    token_types: torch.Tensor  # (B, T) every token's speaker
    positions: torch.Tensor  # (B, T)
    segments: torch.Tensor  # (B, T) 0 prefix, n candidate n (from 1), -1 padding
    ends: torch.Tensor  # (B, N) columns of the candidates' <eos>; 0 where a row has fewer candidates
    n_candidates: torch.Tensor  # (B,)
    lm_positions: torch.Tensor  # (L,) flat indices that predict a token of a gold reply
    lm_labels: torch.Tensor  # (L,) the tokens they predict: the gold replies and their <eos>
    extra_starts: torch.Tensor  # (B,) flat indices of where each row's extra continuation begins; 0: none
    head_positions: torch.Tensor  # (R,) flat indices of the hidden states that a head needs: ends, lm_positions, extras

    def prefix_ends(self) -> torch.Tensor:
        """(B,) flat indices of where each row's prefix ends."""
        rows = torch.arange(len(self.segments), device=self.segments.device)
        return rows * self.segments.shape[1] + (self.segments == 0).sum(1) - 1

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)))


def collate(instances: list[Instance], ids: SpecialIds) -> Batch:
    """Pack instances into a batch as wide as its longest row."""
    rows = [[instance.prefix, *instance.candidates, instance.extra] for instance in instances]
    sizes = [list(map(len, row)) for row in rows]
    n_candidates = np.array([len(instance.candidates) for instance in instances])
    inside = first_columns(np.array(list(map(sum, sizes))))  # (B, T) where no padding is

    numbers = [number for row in rows for number in range(len(row))]
    segments = lay_out(np.repeat(numbers, list(chain(*sizes))), inside, -1)
    types = [i.token_types + [ids.speaker1] * sum(row[1:]) for i, row in zip(instances, sizes, strict=True)]
    # Every continuation goes on from the prefix, as if there were no other.
    positions = [[range(row[0]), *(range(row[0], row[0] + size) for size in row[1:])] for row in sizes]

    # What the heads read and learn, as masks (B, T).
    is_last = np.diff(segments, append=-1) != 0  # of its segment
    gold, extra = segments == n_candidates[:, None], segments > n_candidates[:, None]
    is_end = is_last & (segments > 0) & ~extra
    predicts = is_last & (segments == 0) | gold & ~is_last  # the prefix's last token predicts the reply's first one
    input_ids = lay_out(list(chain(*chain(*rows))), inside, ids.pad)
    columns = dict(
        input_ids=input_ids,
        token_types=lay_out(list(chain(*types)), inside, ids.pad),
        positions=lay_out(list(chain(*chain(*positions))), inside, 0),
        segments=segments,
        ends=lay_out(np.nonzero(is_end)[1], first_columns(n_candidates), 0),
        n_candidates=n_candidates,
        lm_positions=np.flatnonzero(predicts),
        lm_labels=input_ids[gold],
        extra_starts=np.where(extra.any(1), np.arange(len(rows)) * inside.shape[1] + extra.argmax(1), 0),
        head_positions=np.flatnonzero(predicts | is_end | extra),
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
