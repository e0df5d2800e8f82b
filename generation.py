"""How replies are made: prefill, decode a token at a time, score. Ids in, ids out.

Shapes: R rows (a reply each), T new tokens, S columns that are attended to, D hidden size, V vocabulary.
"""

import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from transformers.cache_utils import Cache, StaticLayer

from cli import UserError
from decoding import Beams, Reply, Row, Token, extend_beams, extend_rows, rank_replies
from model import NOT_FINITE, DialogModel
from options import Decoding

# ------------------------------------------------------------------------------------------------------------
# Key-value cache
# ------------------------------------------------------------------------------------------------------------

Layers = list[tuple[Tensor, Tensor]]  # each layer's keys and values, (R, heads, S, head size)


class CacheLayer(StaticLayer):
    """Keys and values in columns that are there from the start. Under autocast, some models' are of different types."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.values = self.values.to(value_states.dtype)


def new_cache(layers: Layers, columns: int) -> Cache:
    """A cache with room for `columns` columns, of which the first are given.

    transformers' default cache has no room to spare: it copies everything for each new token, which takes a third of
    a decoding step of 32 rows.
    """
    cache = Cache(layer_class_to_replicate=partial(CacheLayer, columns))
    for index, (keys, values) in enumerate(layers):
        cache.update(keys, values, index)
    return cache


def cached_layers(cache: Cache, rows: list[int], columns: int) -> Layers:
    """A copy of what a cache holds of some rows, in its first columns."""
    kept = (rows, slice(None), slice(columns))  # [rows, :, :columns]; indexing by a list copies
    return [(layer.keys[kept], layer.values[kept]) for layer in cache.layers]


class PrefixCache:
    """Keys and values of the last rows, so that a prefix that begins like one of them is computed only from there on.

    They depend on a row's tokens and token types alone, so conversations may share a cache.

    Args:
        size: rows to keep.
    """

    def __init__(self, size: int = 1):
        self.size = size
        self.rows: list[tuple[list[Token], Layers]] = []

    def longest_match(self, row: list[Token]) -> Layers:
        """Keys and values of the longest beginning that this row shares with a kept one.

        The row's last token is left out: its hidden state predicts the next token, and is not kept.
        """
        length, layers = 0, []
        for kept, kept_layers in self.rows:
            shared = os.path.commonprefix([row[:-1], kept])  # it compares any sequences, not just paths
            if len(shared) > length:
                length, layers = len(shared), kept_layers
        return [(keys[:, :, :length], values[:, :, :length]) for keys, values in layers]

    def keep(self, row: list[Token], layers: Layers) -> None:
        """Keep a row in the place of those that it continues, else of the oldest."""
        others = [(kept, of_kept) for kept, of_kept in self.rows if row[: len(kept)] != kept]
        rows = [*others, (row, layers)]  # oldest first
        self.rows = rows[-self.size :]


class DecodeState:
    """Rows of tokens and their keys and values, so that only new tokens are computed.

    All rows get a column at the same time, but not all get a token in it: the others have padding there, which is
    hidden from them.

    Args:
        columns: how many there will be at most.
        layers: keys and values of the first columns, if they are known; the same in all rows.
    """

    def __init__(self, model: DialogModel, rows: int, columns: int, layers: Layers = ()):
        self.model, self.cache = model, new_cache(layers, columns)
        # (R, S): where a row has a token
        self.real = torch.zeros(rows, columns, dtype=torch.bool, device=model.device)
        self.real[:, : self.width] = True

    @property
    def width(self) -> int:
        """How many columns are computed."""
        return int(self.cache.get_seq_length())

    def prefill(self, rows: list[list[Token]], copies: int) -> Tensor:
        """Compute the first tokens and make `copies` rows of each; the hidden state of each row's last token (R, D)."""
        hidden = self.extend_to(rows)
        self.prefix_columns = self.width
        if copies > 1:  # only now: until here they are the same
            repeated = [row for row in range(len(rows)) for _ in range(copies)]
            self.rewind(repeated)
            hidden = hidden[repeated]
        return hidden

    def rewind(self, rows: list[int]) -> None:
        """Keep these rows alone, as they were after `prefill`; a row may be named more than once."""
        columns = self.real.shape[1]
        layers = cached_layers(self.cache, rows, self.prefix_columns)
        self.cache = new_cache(layers, columns)
        self.real = self.real[rows]
        self.real[:, self.prefix_columns :] = False

    def reorder(self, rows: list[int]) -> None:
        """Let each row continue the row given for it. Both have the same prefix, so only later columns are copied."""
        new = slice(self.prefix_columns, self.width)
        for layer in self.cache.layers:
            keys = layer.keys[:, :, new]  # a view, as below: what is assigned to it stands in the cache
            keys[:] = keys[rows]
            values = layer.values[:, :, new]
            values[:] = values[rows]
        # `real` stays: the rows of one prefix have their tokens in the same columns.

    def extend_to(self, rows: list[list[Token]]) -> Tensor:
        """Compute the tokens that are new in each row; the hidden state of its last new one, if it has any (R, D)."""
        device = self.model.device
        pad = self.model.ids.pad
        padding = [(pad, pad)]
        computed = self.real.sum(1).tolist()
        new = [row[length:] for row, length in zip(rows, computed, strict=True)]
        longest = max(map(len, new))
        padded = [row + padding * (longest - len(row)) for row in new]
        tokens, types = torch.tensor(padded, device=device).unbind(-1)  # (R, T)
        real = types != pad  # a token's type is a speaker
        columns = slice(self.width, self.width + longest)
        self.real[:, columns] = real
        # A row's tokens are numbered without the padding between them, so no position depends on the other rows.
        positions = self.real.cumsum(1)[:, columns] - 1
        # Also over the columns that are still empty: the cache's layers are of their full size from the start.
        causal = torch.ones(longest, self.real.shape[1], dtype=torch.bool, device=device)
        causal = causal.tril(self.width)
        row_starts = torch.arange(0, real.numel(), longest, device=device)
        last_places = (real.sum(1) - 1).clamp(min=0)  # of a row without new tokens, any
        last = row_starts + last_places  # flat, in (R*T)
        hidden = self.model.run_body(
            tokens,
            types,
            positions=positions,
            visible=self.real[:, None] & causal,  # (R, T, S)
            needed=last,
            cache=self.cache,
        )
        return hidden.flatten(0, 1)[last]


def last_hidden(model: DialogModel, rows: list[list[Token]]) -> Tensor:
    """The hidden state of each row's last token (R, D), for architectures that cannot use our cache.

    A row is computed whole each time, and alone, since such an architecture may not be exact with padding either.
    """
    last = []
    for row in rows:
        tokens, types = torch.tensor([row], device=model.device).unbind(-1)  # (1, T)
        hidden = model.body(inputs_embeds=model.embed(tokens, types), use_cache=False)[0]  # (1, T, D)
        last.append(hidden[:, -1])
    return torch.cat(last)


# ------------------------------------------------------------------------------------------------------------
# Generation
# ------------------------------------------------------------------------------------------------------------


class Generation:
    """Replies to a batch of prefixes (tokens and token types, as `inputs.build_prefix` makes them).

    Iterating draws one token of every reply at a time and yields the replies so far: for each prefix a list of
    `n_replies`. A reply ends before its first special token, or after `max_length` tokens. Iterating may stop at any
    token and go on later; `finish` ends it. In a beam search the replies so far are what all beams agree on.

    Args:
        generators: one for each prefix.
        prefix_cache: where to look for the beginning of a prefix that stands alone, and to keep it with its best
            reply for the next turn.
    """

    def __init__(
        self,
        model: DialogModel,
        prefixes: list[tuple[list[int], list[int]]],
        decoding: Decoding,
        generators: list[torch.Generator],
        prefix_cache: PrefixCache | None = None,
    ):
        self.model, self.prefixes, self.decoding = model, prefixes, decoding
        # For one prefix alone: those of a batch would share beginnings of different length with the rows kept.
        self.prefix_cache = prefix_cache if len(prefixes) == 1 and model.packed else None
        copies = max(decoding.n_replies, decoding.num_beams)
        self.rows: list[Row] = []
        self.beams: list[Beams] = []  # in a beam search those of each prefix, until it ends
        for (tokens, types), generator in zip(prefixes, generators, strict=True):
            prefix = list(zip(tokens, types, strict=True))
            rows = [Row(prefix, generator) for _ in range(copies)]
            self.rows += rows
            if decoding.num_beams > 1:
                self.beams.append(Beams(rows, decoding))
        self.state: DecodeState | None = None
        self.ranked: list[list[Reply]] | None = None

    @property
    def replies(self) -> list[list[Reply]]:
        """The replies to each prefix as far as they are drawn, in the order of their rows."""
        n = self.decoding.n_replies
        if self.beams:
            return [[beams.agreed()] * n for beams in self.beams]
        replies = [row.reply for row in self.rows]
        return [replies[first : first + n] for first in range(0, len(replies), n)]

    @torch.inference_mode()
    def __iter__(self) -> Iterator[list[list[Reply]]]:
        special = self.model.ids.all
        while self.ranked is None and self._goes_on():
            logits = self.model.lm_logits(self._hidden()).float()  # (R, V)
            if logits.isnan().any():  # nothing can be drawn, and what is likeliest means nothing
                raise UserError(NOT_FINITE)
            if self.beams:
                parents = extend_beams(logits, self.beams, special)
                if self.state is not None:
                    self.state.reorder(parents)
            else:
                extend_rows(logits, self.rows, self.decoding, special)
            yield self.replies
        self._end_search()

    def _goes_on(self) -> bool:
        if self.beams:
            return any(beams.goes_on for beams in self.beams)
        return any(row.reply.can_grow(self.decoding) for row in self.rows)

    def _end_search(self) -> None:
        """Put the best replies of each prefix in the place of the beams."""
        if not self.beams:
            return
        size, n = self.decoding.num_beams, self.decoding.n_replies
        kept = [row for row in range(len(self.rows)) if row % size < n]  # the first n of each prefix
        self.rows = [self.rows[row] for row in kept]
        for beams in self.beams:
            for row, reply in zip(beams.rows[:n], beams.best(n), strict=True):
                row.reply = reply
        self.beams = []
        if self.state is not None:  # the best may have ended many steps ago: their keys and values are overwritten
            self.state.rewind(kept)

    @torch.inference_mode()
    def finish(self) -> list[list[Reply]]:
        """End the generation here: the replies to each prefix, scored by both heads, best first."""
        if self.ranked is None:
            self._end_search()
            # The head reads the hidden state at a reply's <eos>. Here all of them are computed, in one pass.
            ends = self._hidden(self.model.ids.eos)
            scores = self.model.lm.multiple_choice_head(ends)[:, 0]
            for row, score in zip(self.rows, scores.tolist(), strict=True):
                row.reply = replace(row.reply, mc_score=score)
            self.ranked = [rank_replies(replies, self.decoding.rerank) for replies in self.replies]
            if self.prefix_cache is not None:  # the next turn begins with this prefix and the best reply
                best = self.replies[0].index(self.ranked[0][0])
                tokens = self._tokens(self.rows[best])
                self.prefix_cache.keep(tokens, cached_layers(self.state.cache, [best], len(tokens)))
        return self.ranked

    def _hidden(self, *ending: int) -> Tensor:
        """Compute the tokens drawn last, and `ending` after them; the hidden state of each row's last token (R, D)."""
        rows = [self._tokens(row, *ending) for row in self.rows]
        if not self.model.packed:
            return last_hidden(self.model, rows)
        if self.state is not None:
            return self.state.extend_to(rows)
        copies = len(rows) // len(self.prefixes)
        columns = max(map(len, rows)) + self.decoding.max_length + 1  # <eos>
        layers = self.prefix_cache.longest_match(rows[0]) if self.prefix_cache else ()
        self.state = DecodeState(self.model, len(self.prefixes), columns, layers)
        return self.state.prefill(rows[::copies], copies)

    def _tokens(self, row: Row, *ending: int) -> list[Token]:
        speaker = self.model.ids.speaker1
        reply = [*row.reply.tokens, *ending]
        return row.prefix + [(token, speaker) for token in reply]


def generate_replies(
    model: DialogModel,
    prefixes: list[tuple[list[int], list[int]]],
    decoding: Decoding,
    generators: list[torch.Generator],
) -> list[list[int]]:
    """The tokens of the best reply to each prefix; arguments as in `Generation`."""
    generation = Generation(model, prefixes, decoding, generators)
    for _ in generation:
        pass
    # With one reply there is nothing to choose, so no need for its scores.
    ranked = generation.replies if decoding.n_replies == 1 else generation.finish()
    return [replies[0].tokens for replies in ranked]
