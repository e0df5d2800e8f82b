"""Rows as tensors: packed, laid out column by column, padded to the longest."""

from dataclasses import dataclass, fields
from functools import partial

import numpy as np
import torch

from inputs import Branch, DialogRow, Instance, Instances
from utils import SpecialIds


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
        size = len(row.trunk)
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
