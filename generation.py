"""How a reply is drawn: prefill, decode, sample, rank. Ids in, ids out.

Shapes: R rows (a reply each), T new tokens, S columns that are attended to, D hidden size, V vocabulary.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import dropwhile

import torch
from torch import Tensor
from transformers.cache_utils import Cache, StaticLayer

from cli import Decoding
from model import DialogModel

# ------------------------------------------------------------------------------------------------------------
# Replies
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reply:
    """A reply as far as it is drawn. It never changes: a longer one is another object."""

    tokens: list[int] = field(default_factory=list)
    complete: bool = False  # it ended with a special token, not at its longest length
    log_likelihood: float = 0.0  # summed over its tokens and that special one; of the model, not of the sampler
    mc_score: float | None = None  # the multiple-choice head's; None until the reply is scored

    @property
    def token_log_likelihood(self) -> float:
        """The log-likelihood per token."""
        return self.log_likelihood / max(len(self.tokens) + self.complete, 1)

    def can_grow(self, decoding: Decoding) -> bool:
        return not self.complete and len(self.tokens) < decoding.max_length

    def extended(self, token: int, log_likelihood: float, special: frozenset[int]) -> "Reply":
        """With one more token. A special one ends the reply, and a reply that has ended stays as it is."""
        if self.complete:
            return self
        ends = token in special
        tokens = self.tokens if ends else [*self.tokens, token]
        return replace(self, tokens=tokens, complete=ends, log_likelihood=self.log_likelihood + log_likelihood)


def rank_replies(replies: list[Reply], rerank: str) -> list[Reply]:
    """The best first: by the multiple-choice head (ties by likelihood), by likelihood per token, or by their sum."""
    keys = {
        "mc": lambda reply: (reply.mc_score, reply.token_log_likelihood),
        "lm": lambda reply: reply.token_log_likelihood,
        # A score ranks like its log-softmax, which subtracts the same from each.
        "both": lambda reply: reply.mc_score + reply.token_log_likelihood,
    }
    return sorted(replies, key=keys[rerank], reverse=True)


Token = tuple[int, int]  # its id, and its token type (the id of its speaker)


@dataclass
class Row:
    """A reply in the making, and what is its own: the rows of a batch do not depend on each other."""

    prefix: list[Token]
    generator: torch.Generator
    reply: Reply = field(default_factory=Reply)

    def history(self) -> list[int]:
        """The prefix without its persona: from the first speaker token on, which is its own token type."""
        return [token for token, _ in dropwhile(lambda token: token[0] != token[1], self.prefix)]


# ------------------------------------------------------------------------------------------------------------
# Sampling
# ------------------------------------------------------------------------------------------------------------

NUCLEUS_SIZES = 64, 1024  # tokens: so many of the likeliest are sorted before the whole vocabulary is


def filtered_probabilities(logits: Tensor, decoding: Decoding) -> Tensor:
    """Temperature, then top-k, then nucleus sampling (Holtzman et al. 2020, section 3.1). (R, V) -> (R, V)

    The nucleus is the smallest set of likeliest tokens whose probability reaches top_p; it is never empty.
    """
    logits = logits / decoding.temperature
    if decoding.top_k > 0:
        least = logits.topk(min(decoding.top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    probabilities = logits.softmax(-1)
    if 0 < decoding.top_p < 1:
        # Sorting a whole vocabulary costs more than the model itself, and the nucleus is nearly always small.
        for size in (*NUCLEUS_SIZES, probabilities.shape[-1]):
            ordered, order = probabilities.topk(min(size, probabilities.shape[-1]))
            if bool((ordered.sum(-1) >= decoding.top_p).all()):
                break
        likelier = ordered.cumsum(-1) - ordered  # the probability of all likelier tokens
        nucleus = ordered.masked_fill(likelier >= max(decoding.top_p, 1e-6), 0)  # float32 rounds less than that to 0
        probabilities = torch.zeros_like(probabilities).scatter_(-1, order, nucleus)
    return probabilities / probabilities.sum(-1, keepdim=True)


def draw(probabilities: Tensor, generators: list[torch.Generator]) -> Tensor:
    """One token for each row (R, V) -> (R,), by inverting the cumulative distribution.

    torch.multinomial draws all rows with one generator, so that a reply would depend on the others in its batch. Here
    every row has its own, which is on the CPU whatever the device.
    """
    uniform = torch.cat([torch.rand(1, generator=generator) for generator in generators]).to(probabilities)
    cumulative = probabilities.cumsum(-1)
    point = uniform[:, None].clamp(max=1 - 1e-6) * cumulative[:, -1:]  # below the total, however it is rounded
    return torch.searchsorted(cumulative, point, right=True)[:, 0]


def repeating(history: list[int], reply: list[int], n: int) -> set[int]:
    """The tokens that would end a sequence of `n` tokens which the history or the reply already holds."""
    if len(reply) < n - 1:  # the sequence would begin before the reply
        return set()
    tokens, tail = [*history, *reply], reply[len(reply) - n + 1 :]
    return {tokens[i] for i in range(n - 1, len(tokens)) if tokens[i - n + 1 : i] == tail}


def apply_penalties(logits: Tensor, row: Row, decoding: Decoding, special: frozenset[int]) -> None:
    """Change one row's logits (V,) in place: what is repeated becomes less likely or impossible, an early end too."""
    tokens = row.reply.tokens
    if decoding.repetition_penalty != 1.0:  # Keskar et al. 2019, section 4.1
        used = torch.tensor(sorted({*row.history(), *tokens} - special), device=logits.device).long()
        logits[used] *= decoding.repetition_penalty ** -logits[used].sign()
    if decoding.no_repeat_ngram:
        logits[list(repeating(row.history(), tokens, decoding.no_repeat_ngram))] = float("-inf")
    if len(tokens) < decoding.min_length:
        logits[sorted(special)] = float("-inf")


def sample(logits: Tensor, rows: list[Row], decoding: Decoding, special: frozenset[int]) -> Tensor:
    """The next token of every row (R, V) -> (R,). special: the tokens that end a reply."""
    logits = logits.clone()
    for row, row_logits in zip(rows, logits, strict=True):
        apply_penalties(row_logits, row, decoding, special)
    if decoding.no_sample:
        return logits.argmax(-1)
    return draw(filtered_probabilities(logits, decoding), [row.generator for row in rows])


# ------------------------------------------------------------------------------------------------------------
# Key-value cache
# ------------------------------------------------------------------------------------------------------------

Layers = list[tuple[Tensor, Tensor]]  # each layer's keys and values, (R, heads, S, head size)


def new_cache(layers: Layers, columns: int) -> Cache:
    """A cache with room for `columns` columns, of which the first are given.

    transformers' default cache has no room to spare: it copies everything for each new token, which takes a third of
    a decoding step of 32 rows.
    """
    cache = Cache(layer_class_to_replicate=partial(StaticLayer, columns))
    for index, (keys, values) in enumerate(layers):
        cache.update(keys, values, index)
    return cache


def cached_layers(cache: Cache, rows: list[int], columns: int) -> Layers:
    """A copy of what a cache holds of some rows, in its first columns."""
    return [(layer.keys[rows, :, :columns], layer.values[rows, :, :columns]) for layer in cache.layers]


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
            shared = len(os.path.commonprefix([row[:-1], kept]))  # it compares any sequences, not just paths
            if shared > length:
                length, layers = shared, kept_layers
        return [(keys[:, :, :length], values[:, :, :length]) for keys, values in layers]

    def keep(self, row: list[Token], layers: Layers) -> None:
        """Keep a row in the place of those that it continues, else of the oldest."""
        others = [kept for kept in self.rows if kept[0] != row[: len(kept[0])]]
        self.rows = [*others, (row, layers)][-self.size :]


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
        if copies > 1:
            repeated = [row for row in range(len(rows)) for _ in range(copies)]
            self.cache = new_cache(cached_layers(self.cache, repeated, self.width), self.real.shape[1])
            self.real, hidden = self.real[repeated], hidden[repeated]
        return hidden

    def extend_to(self, rows: list[list[Token]]) -> Tensor:
        """Compute the tokens that are new in each row; the hidden state of its last new one, if it has any (R, D)."""
        device, padding = self.model.device, (self.model.ids.pad, self.model.ids.pad)
        new = [row[length:] for row, length in zip(rows, self.real.sum(1).tolist(), strict=True)]
        longest = max(map(len, new))
        padded = torch.tensor([row + [padding] * (longest - len(row)) for row in new], device=device)
        tokens, types = padded.unbind(-1)  # (R, T)
        real = types != self.model.ids.pad  # a token's type is a speaker
        columns = slice(self.width, self.width + longest)
        self.real[:, columns] = real
        causal = torch.ones(longest, self.real.shape[1], dtype=torch.bool, device=device).tril(self.width)
        last = torch.arange(0, real.numel(), longest, device=device) + (real.sum(1) - 1).clamp(min=0)  # flat, in (R*T)
        hidden = self.model.run_body(
            tokens,
            types,
            positions=self.real.cumsum(1)[:, columns] - 1,
            visible=self.real[:, None] & causal,  # (R, T, S)
            needed=last,
            cache=self.cache,
        )
        return hidden.flatten(0, 1)[last]


def last_hidden(model: DialogModel, rows: list[list[Token]]) -> Tensor:
    """The hidden state of each row's last token (R, D), for architectures that cannot use our cache.

    A row is computed whole each time, and alone, since such an architecture may not be exact with padding either.
    """
    inputs = [torch.tensor([row], device=model.device).unbind(-1) for row in rows]
    return torch.cat([model.body(inputs_embeds=model.embed(*row), use_cache=False)[0][:, -1] for row in inputs])


# ------------------------------------------------------------------------------------------------------------
# Generation
# ------------------------------------------------------------------------------------------------------------


class Generation:
    """Replies to a batch of prefixes (tokens and token types, as `inputs.build_prefix` makes them).

    Iterating draws one token of every reply at a time and yields the replies so far: for each prefix a list of
    `n_replies`. A reply ends before its first special token, or after `max_length` tokens. Iterating may stop at any
    token and go on later; `finish` ends it.

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
        self.prefix_cache = prefix_cache if len(prefixes) == 1 and model.packed else None
        self.rows = [
            Row(list(zip(*prefix, strict=True)), generator)
            for prefix, generator in zip(prefixes, generators, strict=True)
            for _ in range(decoding.n_replies)
        ]
        self.state: DecodeState | None = None
        self.ranked: list[list[Reply]] | None = None

    @property
    def replies(self) -> list[list[Reply]]:
        """The replies to each prefix as far as they are drawn, in the order of their rows."""
        replies, n = [row.reply for row in self.rows], self.decoding.n_replies
        return [replies[i : i + n] for i in range(0, len(replies), n)]

    @torch.inference_mode()
    def __iter__(self) -> Iterator[list[list[Reply]]]:
        special = self.model.ids.all
        while self.ranked is None and any(row.reply.can_grow(self.decoding) for row in self.rows):
            logits = self.model.lm_logits(self._hidden()).float()  # (R, V)
            tokens = sample(logits, self.rows, self.decoding, special)
            log_likelihoods = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
            for row, token, log_likelihood in zip(self.rows, tokens.tolist(), log_likelihoods.tolist(), strict=True):
                row.reply = row.reply.extended(token, log_likelihood, special)
            yield self.replies

    @torch.inference_mode()
    def finish(self) -> list[list[Reply]]:
        """End the generation here: the replies to each prefix, scored by both heads, best first."""
        if self.ranked is None:
            # The head reads the hidden state at a reply's <eos>. Here all of them are computed, in one pass.
            scores = self.model.lm.multiple_choice_head(self._hidden(self.model.ids.eos))[:, 0]
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
        copies, columns = self.decoding.n_replies, max(map(len, rows)) + self.decoding.max_length + 1  # with <eos>
        layers = self.prefix_cache.longest_match(rows[0]) if self.prefix_cache else ()
        self.state = DecodeState(self.model, len(self.prefixes), columns, layers)
        return self.state.prefill(rows[::copies], copies)

    def _tokens(self, row: Row, *ending: int) -> list[Token]:
        speaker = self.model.ids.speaker1
        return row.prefix + [(token, speaker) for token in (*row.reply.tokens, *ending)]


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
