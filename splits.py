"""A tokenised split as arrays: who says what, as numbers of strings, and the tokens of each string."""

from array import array
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass, field

import numpy as np

from dialogs import SPLIT_SEED

LISTS = "persona", "candidates", "alternatives"  # as a split has them, beside the history
N_DISTRACTORS = 19  # sampled where a reply comes without candidates, as many as ConvAI2 gives


@dataclass
class Ragged:
    """Rows of different length in two flat arrays: row i is values[offsets[i]:offsets[i + 1]]."""

    offsets: Sequence[int] = field(default_factory=lambda: array("q", [0]))
    values: Sequence[int] = field(default_factory=lambda: array("i"))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> Sequence[int]:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    def append(self, row: Iterable[int]) -> None:
        self.values.extend(row)
        self.offsets.append(len(self.values))

    @property
    def starts(self) -> Sequence[int]:
        return self.offsets[:-1]

    @property
    def ends(self) -> Sequence[int]:
        return self.offsets[1:]

    @property
    def sizes(self) -> np.ndarray:
        return np.diff(self.offsets)


@dataclass
class Views:
    """Rows that are ranges of one flat array, and may overlap: row i is values[starts[i]:ends[i]].

    Histories grow with every turn of a dialog. As rows of their own they would take memory that grows with the square
    of its length.
    """

    starts: Sequence[int]
    ends: Sequence[int]
    values: Sequence[int]

    def __getitem__(self, row: int) -> Sequence[int]:
        return self.values[self.starts[row] : self.ends[row]]


def ragged(arrays: dict[str, np.ndarray], name: str) -> Ragged:
    """Rows of different length by their name in a cache file, where each of their arrays has its own."""
    return Ragged(arrays[f"{name}_offsets"], arrays[name])


def ragged_arrays(rows: Ragged, name: str) -> dict[str, np.ndarray]:
    """What `ragged` reads."""
    return {f"{name}_offsets": np.asarray(rows.offsets), name: np.asarray(rows.values)}


class Split:
    """One split of a tokenised dataset.

    Strings are numbered: string s has the ids `tokens[s]` and the UTF-8 bytes `texts[s]`. Utterance u belongs to dialog
    `dialogs[u]`. The string numbers of its history are `history[u]`, of its candidates `candidates[u]`, the gold one
    last, of replies that are as right as that one `alternatives[u]`, and of a dialog's persona `persona[dialog]`.
    Histories that start at the same place of `history.values` go on from one another.
    """

    def __init__(self, arrays: dict[str, np.ndarray], split: str):
        self.tokens = Ragged(arrays["token_offsets"], arrays["tokens"])
        self.texts = Ragged(arrays["text_offsets"], arrays["texts"])
        self.sizes = self.tokens.sizes  # tokens of each string
        self.dialogs = arrays[f"{split}.dialogs"]
        self.persona, self.candidates, self.alternatives = (ragged(arrays, f"{split}.{name}") for name in LISTS)
        self.history = Views(
            starts=arrays[f"{split}.history_starts"],
            ends=arrays[f"{split}.history_ends"],
            values=arrays[f"{split}.history_values"],
        )

    def __len__(self) -> int:
        return len(self.dialogs)

    def ids(self, string: int) -> list[int]:
        return self.tokens[string].tolist()

    def text(self, string: int) -> str:
        return self.texts[string].tobytes().decode()

    def persona_texts(self, utterance: int) -> list[str]:
        dialog = self.dialogs[utterance]
        return [self.text(string) for string in self.persona[dialog]]

    def history_texts(self, utterance: int) -> list[str]:
        return [self.text(string) for string in self.history[utterance]]

    def candidate_texts(self, utterance: int) -> list[str]:
        return [self.text(string) for string in self.candidates[utterance]]

    def gold_text(self, utterance: int) -> str:
        return self.text(self.candidates[utterance][-1])

    def right_texts(self, utterance: int) -> list[str]:
        """The gold reply and those that are as right."""
        return [self.gold_text(utterance), *map(self.text, self.alternatives[utterance])]

    def with_alternatives(self) -> "Split":
        """This split with all right replies among the candidates.

        An evaluation ranks them, as ParlAI does. A training must not: to its loss they would be wrong.
        """
        rows = Ragged()
        for right, candidates in zip(self.alternatives, self.candidates, strict=True):
            *distractors, gold = candidates
            rows.append([*distractors, *right, gold])
        other = copy(self)
        other.candidates = Ragged(np.asarray(rows.offsets), np.asarray(rows.values))
        return other


def with_distractors(candidates: Ragged) -> Ragged:
    """Give every utterance that has only its gold reply distinct distractors drawn from the other gold replies."""
    gold = candidates.values[candidates.ends - 1]
    alone = candidates.sizes == 1
    drawn = draw_distractors(gold[alone], np.unique(gold))  # (A, n)
    sizes = candidates.sizes + drawn.shape[1] * alone
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    # Of each place in the new rows, whether it holds a candidate that was there, or one drawn.
    given = np.repeat(~alone, sizes)
    given[offsets[1:] - 1] = True  # the gold replies, each in its row's last place
    values = np.empty(len(given), np.int32)
    values[given] = candidates.values
    values[~given] = drawn.ravel()
    return Ragged(offsets, values)


def draw_distractors(gold: np.ndarray, pool: np.ndarray) -> np.ndarray:
    """Up to `N_DISTRACTORS` distinct replies from `pool` for each of A gold replies, never the same one: (A, n)."""
    rng = np.random.default_rng(SPLIT_SEED)
    count = min(N_DISTRACTORS, len(pool) - 1)
    drawn = np.empty((len(gold), max(count, 0)), pool.dtype)
    if len(pool) < 4 * N_DISTRACTORS:  # few replies: draw without replacement
        for row, own in zip(drawn, gold, strict=True):
            others = pool[pool != own]
            row[:] = rng.permutation(others)[: len(row)]
        return drawn
    # Many: draw freely, and again where a row holds a reply twice or its own gold reply. A permutation of them for
    # each row would take time that grows with the square of their number.
    redo = np.arange(len(gold))
    while len(redo):
        places = rng.integers(len(pool), size=drawn[redo].shape)
        drawn[redo] = pool[places]
        rows = np.sort(drawn[redo], axis=1)
        twice = (rows[:, 1:] == rows[:, :-1]).any(axis=1)
        holds_gold = (rows == gold[redo, None]).any(axis=1)
        redo = redo[twice | holds_gold]
    return drawn
