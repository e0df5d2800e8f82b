"""How a reply is drawn: sampling, key-value cache, ranking, a conversation. Ids in, ids out.

Shapes: B rows, T tokens, R rows that are drawn, D hidden size, V vocabulary.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from cli import Decoding
from inputs import build_prefix, fit
from model import DialogModel
from utils import DialogTokenizer

# ------------------------------------------------------------------------------------------------------------
# Sampling
# ------------------------------------------------------------------------------------------------------------


NUCLEI = 64, 1024  # tokens: sizes to try before the whole vocabulary


def filtered_probabilities(logits: Tensor, decoding: Decoding) -> Tensor:
    """Temperature, then top-k, then nucleus sampling (Holtzman et al. 2020, section 3.1). (B, V) -> (B, V)

    The nucleus is the smallest set of likeliest tokens whose probability reaches top_p; it is never empty.
    """
    logits = logits / decoding.temperature
    if decoding.top_k > 0:
        least = logits.topk(min(decoding.top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    probabilities = logits.softmax(-1)
    if 0 < decoding.top_p < 1:
        # Sorting a whole vocabulary costs more than the model itself, and the nucleus is nearly always small.
        for size in (*NUCLEI, probabilities.shape[-1]):
            ordered, order = probabilities.topk(min(size, probabilities.shape[-1]))
            if bool((ordered.sum(-1) >= decoding.top_p).all()):
                break
        before = ordered.cumsum(-1) - ordered  # the probability of all likelier tokens
        nucleus = ordered.masked_fill(before >= max(decoding.top_p, 1e-6), 0)  # float32 rounds less than that to none
        probabilities = torch.zeros_like(probabilities).scatter_(-1, order, nucleus)
    return probabilities / probabilities.sum(-1, keepdim=True)


def draw(probabilities: Tensor, generators: list[torch.Generator]) -> Tensor:
    """One token for each row (B, V) -> (B,), each by its own (CPU) generator: rows do not depend on their batch."""
    uniform = torch.cat([torch.rand(1, generator=generator) for generator in generators]).to(probabilities)
    heights = probabilities.cumsum(-1)
    below = uniform[:, None].clamp(max=1 - 1e-6) * heights[:, -1:]  # rounded, but never up to the last height
    return torch.searchsorted(heights, below, right=True)[:, 0]


def repeating(said: list[int], reply: list[int], n: int) -> set[int]:
    """The tokens that would end a sequence of `n` tokens which `said` or the reply already holds."""
    if len(reply) < n - 1:  # the sequence would begin before the reply
        return set()
    said, tail = [*said, *reply], reply[len(reply) - n + 1 :]
    return {said[i] for i in range(n - 1, len(said)) if said[i - n + 1 : i] == tail}


# ------------------------------------------------------------------------------------------------------------
# Key-value cache
# ------------------------------------------------------------------------------------------------------------


class RoomyLayer(DynamicLayer):
    """A layer of a cache with room behind its keys and values, so that a token is added without copying the others."""

    ROOM = 64  # columns
    buffers: tuple[Tensor, Tensor] | None = None  # keys and values are the beginning of these

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, new = self.get_seq_length(), (key_states, value_states)
        end = start + key_states.shape[-2]
        if self.buffers is None or self.buffers[0].shape[-2] < end:
            wide = [states.new_empty(*states.shape[:-2], end + self.ROOM, states.shape[-1]) for states in new]
            if start:
                wide[0][..., :start, :], wide[1][..., :start, :] = self.keys, self.values
            self.buffers = tuple(wide)
        for buffer, states in zip(self.buffers, new, strict=True):
            buffer[..., start:end, :] = states
        self.keys, self.values = (buffer[..., :end, :] for buffer in self.buffers)
        return self.keys, self.values

    def batch_repeat_interleave(self, repeats: int) -> None:
        if repeats > 1:
            super().batch_repeat_interleave(repeats)
            self.buffers = None


def new_cache() -> Cache:
    return Cache(layer_class_to_replicate=RoomyLayer)


class PrefixCache:
    """Keys and values of the last rows, so that a prefix which begins like one of them is computed only from there.

    They depend on the tokens and token types of the row alone, so rows of different conversations may share them.

    Args:
        size: rows to keep.
    """

    def __init__(self, size: int = 1):
        self.size = size
        self.kept: list[tuple[list[tuple[int, int]], list[tuple[Tensor, Tensor]]]] = []  # the newest is the last

    def beginning(self, prefix: tuple[list[int], list[int]]) -> Cache:
        """A cache of the longest beginning that `prefix` has in common with a kept row, short of its last token."""
        row = list(zip(*prefix, strict=True))[:-1]
        cache, length, layers = new_cache(), 0, []
        for other, other_layers in self.kept:
            shared = len(os.path.commonprefix([row, other]))
            if shared > length:
                length, layers = shared, other_layers
        for layer, (keys, values) in enumerate(layers):
            cache.update(keys[:, :, :length], values[:, :, :length], layer)
        return cache

    def keep(self, row: list[tuple[int, int]], cache: Cache, index: int) -> None:
        """Keep row `index` of a cache, whose tokens and token types begin with `row`."""
        row = row[: cache.get_seq_length()]
        layers = [(each.keys[[index], :, : len(row)], each.values[[index], :, : len(row)]) for each in cache.layers]
        others = [kept for kept in self.kept if kept[0] != row[: len(kept[0])]]  # it holds what those held
        self.kept = [*others, (row, layers)][-self.size :]


class Continuation:
    """Prefixes, padded on the right, and the tokens that are added to them one column at a time.

    With a cache only new tokens are computed. Where the architecture does not allow that (`model.packed` is False),
    every row is computed anew each time.

    Args:
        kept: where the beginning of a prefix that stands alone may be found.
    """

    def __init__(
        self, model: DialogModel, prefixes: list[tuple[list[int], list[int]]], kept: PrefixCache | None = None
    ):
        self.model = model
        sizes = [len(tokens) for tokens, _ in prefixes]
        self.lengths = torch.tensor(sizes, device=model.device)
        self.width, self.ragged = max(sizes), min(sizes) < max(sizes)
        padded = [
            [row + [model.ids.pad] * (self.width - len(row)) for row in column]
            for column in zip(*prefixes, strict=True)
        ]
        self.tokens, self.types = torch.tensor(padded, device=model.device)  # (B, T) each
        self.cache = None
        if model.packed:
            self.cache = kept.beginning(prefixes[0]) if kept and len(prefixes) == 1 else new_cache()

    def start(self, copies: int = 1) -> Tensor:
        """The hidden state of every prefix's last token; each prefix becomes `copies` rows (B, D)."""
        hidden = self._compute()
        self.tokens, self.types, self.lengths, hidden = (
            tensor.repeat_interleave(copies, dim=0) for tensor in (self.tokens, self.types, self.lengths, hidden)
        )
        if self.cache is not None:
            self.cache.batch_repeat_interleave(copies)
        return hidden

    def _compute(self) -> Tensor:
        """The hidden state of every row's last token (B, D), computed from where the cache ends."""
        done = self.cache.get_seq_length() if self.cache is not None else 0
        embeds = self.model.embed(self.tokens[:, done:], self.types[:, done:])
        behind = {}
        if done:
            columns = torch.arange(self.width, device=embeds.device)
            hidden = columns > columns[done:, None]  # (T - done, T)
            mask = torch.zeros_like(hidden, dtype=embeds.dtype).masked_fill_(hidden, torch.finfo(embeds.dtype).min)
            behind = {"position_ids": columns[None, done:], "attention_mask": mask[None, None]}
        ends = torch.arange(len(embeds), device=embeds.device) * embeds.shape[1] + self.lengths - 1 - done
        inputs = behind | self.model.reading(ends) | self._cache_options()
        return self.model.body(inputs_embeds=embeds, **inputs)[0].flatten(0, 1)[ends]

    def extend(self, tokens: list[int], speaker: int) -> Tensor:
        """Add one token to every row; their hidden states (B, D)."""
        new = torch.tensor(tokens, device=self.model.device)[:, None]
        if self.cache is None:
            column = new.new_full(new.shape, self.model.ids.pad)
            self.tokens = torch.cat([self.tokens, column], dim=1).scatter_(1, self.lengths[:, None], new)
            self.types = torch.cat([self.types, torch.full_like(new, speaker)], dim=1)
            self.types.scatter_(1, self.lengths[:, None], speaker)
            self.lengths = self.lengths + 1
            return self._compute()
        embeds = self.model.embed(new, torch.full_like(new, speaker))
        added = self.cache.get_seq_length() - self.width
        hidden = self.model.body(
            inputs_embeds=embeds,
            position_ids=self.lengths[:, None] + added,
            attention_mask=self._mask(embeds.dtype, self.width + added + 1) if self.ragged else None,
            **self._cache_options(),
        )[0]
        return hidden[:, 0]

    def _cache_options(self) -> dict:
        return {"use_cache": False} if self.cache is None else {"use_cache": True, "past_key_values": self.cache}

    def _mask(self, dtype: torch.dtype, columns: int) -> Tensor:
        """(B, 1, 1, columns): the new token sees its row's own prefix and what was added, not the padding between."""
        column = torch.arange(columns, device=self.lengths.device)
        hidden = (column >= self.lengths[:, None]) & (column < self.width)
        return torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, torch.finfo(dtype).min)[:, None, None]


# ------------------------------------------------------------------------------------------------------------
# Replies
# ------------------------------------------------------------------------------------------------------------


@dataclass
class Reply:
    tokens: list[int]
    complete: bool  # it ended of itself, not at its longest length
    lm: float  # log-likelihood per token, of the model's own distribution, <eos> included
    mc: float  # the multiple-choice head's score


def rank(replies: list[Reply], rerank: str) -> list[Reply]:
    """The best first: by the multiple-choice head (ties by likelihood), by likelihood, or by the sum of both logs."""
    if rerank == "mc":
        return sorted(replies, key=lambda reply: (reply.mc, reply.lm), reverse=True)
    # The head's softmax takes the same from each score, so the score itself ranks like its log-probability.
    weight = 1.0 if rerank == "both" else 0.0
    return sorted(replies, key=lambda reply: reply.lm + weight * reply.mc, reverse=True)


class Generation:
    """Replies to a batch of prefixes (tokens and token types, as `utils.build_prefix` makes them).

    Each prefix gets `n_replies` rows. Iterating draws one token for every row at a time and yields them; None for a
    row that has ended. A reply ends before its first special token, or after `max_length` tokens. Special tokens are
    barred for the first `min_length`. Iterating may be given up at any token.

    Args:
        generators: one for each prefix.
        kept: prefixes computed before; a single prefix begins there, and its best reply is kept for the next turn.
    """

    def __init__(
        self,
        model: DialogModel,
        prefixes: list[tuple[list[int], list[int]]],
        decoding: Decoding,
        generators: list[torch.Generator],
        kept: PrefixCache | None = None,
    ):
        self.model, self.prefixes, self.decoding, self.kept = model, prefixes, decoding, kept
        self.generators = [generator for generator in generators for _ in range(decoding.n_replies)]
        self.rows = Continuation(model, prefixes, kept)
        speakers = model.ids.speaker1, model.ids.speaker2
        histories = [tokens[next(i for i, t in enumerate(tokens) if t in speakers) :] for tokens, _ in prefixes]
        self.said = [history for history in histories for _ in range(decoding.n_replies)]  # the persona is not said
        self.replies = [Reply([], False, 0.0, float("nan")) for _ in self.generators]
        self.drawn: list[int] | None = None  # the last column, not computed yet

    @torch.inference_mode()
    def __iter__(self) -> Iterator[list[int | None]]:
        for count in range(self.decoding.max_length):
            logits = self.model.lm_logits(self._advance()).float()
            tokens = self._draw(logits, count)
            likelihoods = logits.log_softmax(-1)[torch.arange(len(tokens)), tokens].tolist()
            for reply, token, likelihood in zip(self.replies, tokens, likelihoods, strict=True):
                if not reply.complete:
                    reply.lm += likelihood
                    reply.complete = token in self.model.ids.all
                    reply.tokens += [] if reply.complete else [token]
            column = [None if reply.complete else reply.tokens[-1] for reply in self.replies]
            self.drawn = [self.model.ids.eos if token is None else token for token in column]
            if all(reply.complete for reply in self.replies):
                return
            yield column

    def _advance(self) -> Tensor:
        """Compute the tokens drawn last, at first the prefixes: the hidden states that predict the next ones (R, D).

        A row that ended in this column has its <eos> computed, which is what the multiple-choice head reads.
        """
        if self.drawn is None:
            return self.rows.start(self.decoding.n_replies)
        hidden = self.rows.extend(self.drawn, self.model.ids.speaker1)
        scores = self.model.lm.multiple_choice_head(hidden).float().tolist()
        for reply, token, score in zip(self.replies, self.drawn, scores, strict=True):
            if token == self.model.ids.eos and reply.mc != reply.mc:  # not a number: it has no score yet
                reply.mc = score
        return hidden

    def _draw(self, logits: Tensor, count: int) -> list[int]:
        decoding, logits = self.decoding, logits.clone()
        for row, (said, reply) in enumerate(zip(self.said, self.replies, strict=True)):
            if decoding.repetition_penalty != 1.0:
                used = torch.tensor(sorted({*said, *reply.tokens} - self.model.ids.all), device=logits.device).long()
                scores = logits[row, used]
                logits[row, used] = scores * decoding.repetition_penalty ** -scores.sign()
            if decoding.no_repeat_ngram:
                logits[row, list(repeating(said, reply.tokens, decoding.no_repeat_ngram))] = float("-inf")
        if count < decoding.min_length:
            logits[:, sorted(self.model.ids.all)] = float("-inf")
        if decoding.no_sample:
            return logits.argmax(-1).tolist()
        return draw(filtered_probabilities(logits, decoding), self.generators).tolist()

    @torch.inference_mode()
    def finish(self) -> list[list[Reply]]:
        """The replies to each prefix, best first, as far as they were drawn."""
        while any(reply.mc != reply.mc for reply in self.replies):
            self._advance()
            self.drawn = [self.model.ids.eos] * len(self.replies)
        for reply in self.replies:
            reply.lm /= max(len(reply.tokens) + reply.complete, 1)
        n = self.decoding.n_replies
        ranked = [rank(self.replies[i : i + n], self.decoding.rerank) for i in range(0, len(self.replies), n)]
        if self.kept is not None and self.rows.cache is not None and len(ranked) == 1:
            best, (tokens, types) = ranked[0][0], self.prefixes[0]
            row = [*zip(tokens, types, strict=True), *((token, self.model.ids.speaker1) for token in best.tokens)]
            self.kept.keep(row, self.rows.cache, next(i for i, reply in enumerate(self.replies) if reply is best))
        return ranked


def generate_replies(*args) -> list[list[int]]:
    """The tokens of the best reply to each prefix of a `Generation`."""
    generation = Generation(*args)
    for _ in generation:
        pass
    if generation.decoding.n_replies == 1:  # nothing to choose from, so nothing to score
        return [reply.tokens for reply in generation.replies]
    return [replies[0].tokens for replies in generation.finish()]


# ------------------------------------------------------------------------------------------------------------
# Conversations
# ------------------------------------------------------------------------------------------------------------


@dataclass
class Turn:
    text: str | None  # of the other person; None where the bot spoke first
    reply: str
    ids: list[list[int]]  # of what was said, as the model sees it
    candidates: list[tuple[str, Reply]]  # distinct replies, best first: the first was given


class Conversation:
    """A persona and what was said; what a terminal and a browser share.

    Args:
        persona: sentences, as text.
        max_history: exchanges that the model is shown.
        seed: of the replies.
        kept: prefixes computed before, where conversations share them.
    """

    def __init__(
        self,
        model: DialogModel,
        tokenizer: DialogTokenizer,
        persona: list[str],
        decoding: Decoding,
        max_history: int,
        seed: int,
        kept: PrefixCache | None = None,
    ):
        self.model, self.tokenizer, self.decoding = model, tokenizer, decoding
        self.persona = persona
        self.n_history = 2 * max_history + 1
        self.turns: list[Turn] = []
        self.generator = torch.Generator().manual_seed(seed)
        self.kept = kept or PrefixCache()

    @property
    def said(self) -> list[str]:
        """All utterances, oldest first."""
        return [text for turn in self.turns for text in (turn.text, turn.reply) if text is not None]

    def record(self) -> dict:
        """Persona and messages, as a dialog to train on (`utils.Record`)."""
        roles = [("user", "assistant")[(len(self.said) - i) % 2] for i in range(len(self.said))]  # the bot spoke last
        messages = [{"role": role, "content": text} for role, text in zip(roles, self.said, strict=True)]
        return {"personality": self.persona, "messages": messages}

    def resume(self, dialog: list[str]) -> None:
        """Put an earlier conversation, ending with the bot's reply, in the place of this one."""
        texts = [None, *dialog] if len(dialog) % 2 else dialog
        pairs = [texts[i : i + 2] for i in range(0, len(texts), 2)]
        self.turns = [
            Turn(*pair, self.tokenizer.encode([text for text in pair if text is not None]), []) for pair in pairs
        ]

    def generation(self, text: str) -> Generation:
        """The replies to `text`, to be drawn."""
        history = [ids for turn in self.turns for ids in turn.ids] + self.tokenizer.encode([text])
        longest = min(self.decoding.max_length, self.model.limit // 2)  # leave room for what it replies to
        persona_ids = self.tokenizer.encode(self.persona)  # each time: a persona may change, and it takes no time
        persona, kept, longest = fit(persona_ids, history[-self.n_history :], longest, self.model.limit)
        prefix = build_prefix(persona, kept, self.model.ids)
        decoding = replace(self.decoding, max_length=longest)
        return Generation(self.model, [prefix], decoding, [self.generator], self.kept)

    def stream(self, text: str, stopped: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """Say `text`; yields the bot's reply piece by piece, and remembers the turn once it is whole.

        The best of several replies is known, and yielded, only at the end. There is a (maybe empty) piece for every
        token: after each `stopped` is asked, and where it says so the reply ends. One stopped before its first word
        is no turn.
        """
        generation, shown = self.generation(text), ""
        for _ in generation:
            start = self.tokenizer.decode_start(generation.replies[0].tokens) if len(generation.replies) == 1 else ""
            yield start[len(shown) :]
            shown = start
            if stopped():
                break
        candidates: dict[str, Reply] = {}
        for candidate in generation.finish()[0]:
            candidates.setdefault(self.tokenizer.decode(candidate.tokens), candidate)
        reply, best = next(iter(candidates.items()))
        if reply or not stopped():
            ids = [*self.tokenizer.encode([text]), best.tokens]
            self.turns.append(Turn(text, reply, ids, list(candidates.items())))
        yield reply[len(shown) :]

    def reply(self, text: str) -> str:
        """Say `text`; the bot's reply."""
        return "".join(self.stream(text))
