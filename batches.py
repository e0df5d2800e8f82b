"""Rows as tensors: packed, laid out column by column, padded to the longest."""

import os
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from inputs import DialogRow, Instance, Instances
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
        height, width = self.segments.shape
        starts = width * torch.arange(height, device=self.segments.device)
        sizes = (self.segments == 0).sum(1)
        return starts + sizes - 1

    def to(self, device: torch.device) -> "Batch":
        return self.map(lambda column: column.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Where a GPU can copy it from while the program goes on."""
        return self.map(torch.Tensor.pin_memory)

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        return Batch(*map(change, vars(self).values()))

    def __reduce__(self):
        # Between the processes of a loader each tensor would be a file of its own; as arrays they go through its pipe.
        return batch_of_arrays, tuple(column.numpy() for column in vars(self).values())


def batch_of_arrays(*columns: np.ndarray) -> Batch:
    return Batch(*map(torch.from_numpy, columns))


def collate(rows: list[Instance | DialogRow], ids: SpecialIds) -> Batch:
    """Pack rows into a batch as wide as its longest one.

    Rows are first laid out one after the other, without padding. They are made of parts, the trunk and its branches.
    """
    tokens, types = [], []
    parts, widths = [], []
    ends, lm_places, lm_labels = [], [], []
    extras = []  # row, places
    for number, row in enumerate(rows):
        first = len(tokens)
        tokens += row.trunk
        types += row.token_types
        parts.append((len(row.trunk), 0, -1))
        segment = 0
        for reply in row.replies:
            for branch in reply.candidates:
                segment += 1
                parts.append((len(branch.tokens), segment, branch.fork))
                tokens += branch.tokens
                ends.append(len(tokens) - 1)
            gold = branch
            # A gold reply begins in the trunk and ends in a branch; in a row of one reply all of it is the branch.
            # Each place predicts the next token of the reply: the fork the branch's first one, and <eos> none.
            lm_places += range(first + reply.start, first + gold.fork + 1)
            lm_places += range(len(tokens) - len(gold.tokens), len(tokens) - 1)
            lm_labels += row.trunk[reply.start + 1 : gold.fork + 1]
            lm_labels += gold.tokens
        if row.extra:
            parts.append((len(row.extra), segment + 1, len(row.trunk) - 1))
            extras.append((number, range(len(tokens), len(tokens) + len(row.extra))))
            tokens += row.extra
        types += [ids.speaker1] * (len(tokens) - len(types))  # branches are the bot's
        widths.append(len(tokens) - first)

    inside = first_columns(np.array(widths))  # (B, T) where no padding is
    flat = np.flatnonzero(inside)  # of each token its flat index
    positions, segments, forks = describe_tokens(parts)
    ends = flat[ends]
    lm_positions = flat[lm_places]
    extra_starts = np.zeros(len(rows), dtype=np.int64)
    extra_positions = []
    for number, places in extras:
        extra_starts[number] = flat[places[0]]
        extra_positions.append(flat[places])
    n_candidates = np.array([len(reply.candidates) for row in rows for reply in row.replies])
    return batch_of_arrays(
        lay_out(tokens, inside, ids.pad),
        lay_out(types, inside, ids.pad),
        lay_out(positions, inside, 0),
        lay_out(segments, inside, -1),
        lay_out(forks, inside, 0),
        lay_out(ends, first_columns(n_candidates), 0),
        n_candidates,
        lm_positions,
        np.array(lm_labels, dtype=np.int64),  # int64 also where there is none: an empty list would be float64
        extra_starts,
        np.unique(np.concatenate([ends, lm_positions, *extra_positions])),
    )


def describe_tokens(parts: list[tuple[int, int, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each token's position, segment and fork, from its part's size, segment and fork; a trunk leaves column -1."""
    sizes, segments, forks = np.array(parts).T
    starts = np.cumsum(sizes) - sizes
    # A part's first token is at position fork + 1, wherever it stands among all tokens.
    shifts = starts - (forks + 1)
    positions = np.arange(sizes.sum()) - np.repeat(shifts, sizes)
    segments = np.repeat(segments, sizes)
    # A token of a trunk sees it up to itself.
    forks = np.where(segments == 0, positions, np.repeat(forks, sizes))
    return positions, segments, forks


def first_columns(counts: np.ndarray) -> np.ndarray:
    """A mask (B, largest count) that is True in the first `counts[row]` columns of each row."""
    return np.arange(counts.max()) < counts[:, None]


def lay_out(values, mask: np.ndarray, padding: int) -> np.ndarray:
    """A table that holds `values`, row after row, where `mask` is True, and padding elsewhere."""
    table = np.full(mask.shape, padding)
    table[mask] = values
    return table


CPU = torch.device("cpu")
WORKERS = 2  # processes that build batches for a GPU, each many thousand replies a second


class Loader(torch.utils.data.DataLoader):
    """A DataLoader whose workers no signal to stop reaches: the training ends them once it has saved.

    Such a signal goes to all processes of a terminal or a job. Where the training is killed, its workers see that after
    some seconds, and end. They do not hold its run folder: filelock lets go of a lock in a process that is forked.
    """

    STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]

    def __iter__(self):
        if not self.num_workers or not hasattr(signal, "pthread_sigmask"):
            return super().__iter__()
        # Blocked here, before they are forked: a worker that blocked them itself would begin without.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, self.STOPS)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def load_batches(
    rows: torch.utils.data.Dataset,
    batches: Iterable[list[int]],
    collate_rows: Callable,
    device: torch.device,
    workers: int | None = None,
) -> torch.utils.data.DataLoader:
    """What `collate_rows` makes of the rows of each batch, in order.

    For a GPU, other processes build them ahead, in memory that it copies from while it computes. A processor that
    trains would only have its own time taken by them.

    Args:
        batches: the numbers of each batch's rows.
        workers: processes, where `device` is not to decide it.
    """
    gpu = device.type == "cuda"
    if workers is None:
        workers = WORKERS if gpu else 0
    return Loader(
        rows,
        batch_sampler=batches,
        collate_fn=collate_rows,
        # Its own: each pass draws a seed, which must not move the generator that dropout draws from.
        generator=torch.Generator(),
        num_workers=workers,
        pin_memory=gpu,
        multiprocessing_context="fork" if workers and hasattr(os, "fork") else None,  # it shares what is mapped
    )


def batches_by_length(
    instances: Instances,
    batch_size: int,
    size: int | None = None,
    rank: int = 0,
    world: int = 1,
    device: torch.device = CPU,
) -> torch.utils.data.DataLoader:
    """The first `size` utterances of a split in batches of like length; for what does not depend on the order.

    Of `world` processes, `rank` gets its share of the batches; every utterance is in one of them.
    """
    lengths = instances.lengths()[:size]
    order = np.argsort(lengths, kind="stable").tolist()
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    own = batches[rank::world]
    return load_batches(instances, own, partial(collate, ids=instances.ids), device)
