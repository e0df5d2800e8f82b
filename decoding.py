"""How the next tokens of replies are chosen: sampling, beam search, and which of several replies is the best.

Shapes: R rows (a reply each), V vocabulary.
"""

import os
from dataclasses import dataclass, field, replace
from itertools import dropwhile
from typing import NamedTuple

import torch
from torch import Tensor

from options import Decoding

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
    """Temperature, then top-k, nucleus sampling and min-p. (R, V) -> (R, V)

    min-p leaves the tokens whose probability is at least its share of the largest one (Nguyen et al. 2024, arXiv
    2407.01082).
    """
    logits = logits / decoding.temperature
    if decoding.top_k > 0:
        likeliest = logits.topk(min(decoding.top_k, logits.shape[-1])).values
        logits = logits.masked_fill(logits < likeliest[:, -1:], float("-inf"))
    probabilities = logits.softmax(-1)
    if 0 < decoding.top_p < 1:
        probabilities = nucleus(probabilities, decoding.top_p)
    if decoding.min_p > 0:
        least = decoding.min_p * probabilities.amax(-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0)
    return probabilities / probabilities.sum(-1, keepdim=True)


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """The smallest set of likeliest tokens whose probability reaches top_p; 0 for all others. (R, V) -> (R, V)

    It is never empty (Holtzman et al. 2020, section 3.1).
    """
    vocabulary = probabilities.shape[-1]
    # Sorting a whole vocabulary costs more than the model itself, and the nucleus is nearly always small.
    for size in (*NUCLEUS_SIZES, vocabulary):
        ordered, tokens = probabilities.topk(min(size, vocabulary))
        if bool((ordered.sum(-1) >= top_p).all()):
            break
    likelier = ordered.cumsum(-1) - ordered  # the probability of all likelier tokens
    kept = ordered.masked_fill(likelier >= max(top_p, 1e-6), 0)  # float32 rounds less than that to 0
    return torch.zeros_like(probabilities).scatter_(-1, tokens, kept)


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


def extend_rows(logits: Tensor, rows: list[Row], decoding: Decoding, special: frozenset[int]) -> None:
    """Draw a token for the reply of every row, from logits (R, V). special: the tokens that end a reply."""
    tokens = sample(logits, rows, decoding, special)
    log_likelihoods = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    for row, token, log_likelihood in zip(rows, tokens.tolist(), log_likelihoods.tolist(), strict=True):
        row.reply = row.reply.extended(token, log_likelihood, special)


# ------------------------------------------------------------------------------------------------------------
# Beam search
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hypothesis:
    """A reply of a beam search."""

    reply: Reply = Reply()
    score: float = 0.0  # its log-likelihood, changed by penalties


class Beams:
    """The hypotheses of one prefix: the best that grow, and the best that have ended; `num_beams` of each at most.

    Its rules are those of transformers' `generate` with early_stopping=False, so the replies are too.
    """

    def __init__(self, decoding: Decoding):
        self.decoding = decoding
        # All beams are copies of one at first: only one of them may be extended.
        self.growing = [Hypothesis(), *[Hypothesis(score=float("-inf"))] * (decoding.num_beams - 1)]
        self.ended: list[Hypothesis] = []

    def rank(self, hypothesis: Hypothesis) -> float:
        """The score over the length, a special token at the end included, to the power of the length penalty."""
        length = len(hypothesis.reply.tokens) + hypothesis.reply.complete
        return hypothesis.score / max(length, 1) ** self.decoding.length_penalty

    @property
    def goes_on(self) -> bool:
        """Whether what grows may still be better than the worst of what has ended."""
        full = len(self.ended) == self.decoding.num_beams
        return bool(self.growing) and not (full and self.rank(self.growing[0]) <= self.rank(self.ended[-1]))

    def step(self, best: list[Hypothesis], unended: list[Hypothesis]) -> None:
        """Go on with the extensions of the growing hypotheses: the best of all, and of those without a special token.

        What ends must be among the best of all, so that a poor end does not take the place of a good beginning.
        """
        ended = [hypothesis for hypothesis in best if not hypothesis.reply.can_grow(self.decoding)]
        self.ended = sorted([*self.ended, *ended], key=self.rank, reverse=True)[: self.decoding.num_beams]
        self.growing = [hypothesis for hypothesis in unended if hypothesis.reply.can_grow(self.decoding)]

    def agreed(self) -> Reply:
        """The beginning that all hypotheses share, which no later step changes."""
        return Reply(os.path.commonprefix([each.reply.tokens for each in (*self.growing, *self.ended)]))

    def best(self, count: int) -> list[Reply]:
        """The best replies: those that have ended, and where the search was stopped too early for that, others."""
        found = self.ended if len(self.ended) >= count else [*self.ended, *self.growing]
        return [hypothesis.reply for hypothesis in sorted(found, key=self.rank, reverse=True)[:count]]


class Extension(NamedTuple):
    """A hypothesis and one more token."""

    row: int  # the hypothesis's
    token: int
    log_likelihood: float  # of the token, without penalties
    score: float  # of the hypothesis with it


def extend_beams(logits: Tensor, rows: list[Row], beams: list[Beams], special: frozenset[int]) -> list[int]:
    """Extend the beams of every prefix by a token, from logits (R, V); the row that each row now goes on from.

    Penalties change log-likelihoods here, as in transformers, since these are what is summed.
    """
    decoding = beams[0].decoding
    log_likelihoods = logits.log_softmax(-1)
    penalised = log_likelihoods.clone()
    for row, row_scores in zip(rows, penalised, strict=True):
        apply_penalties(row_scores, row, decoding, special)
    # What is best for a prefix is among the best of each row, also when all that would end a reply is left out.
    enough = min(decoding.num_beams + len(special), logits.shape[1])
    scores, tokens = penalised.topk(enough)  # (R, enough): sorting whole vocabularies would take longer than the model
    columns = tokens.tolist(), log_likelihoods.gather(1, tokens).tolist(), scores.tolist()
    of_rows = list(zip(*columns, strict=True))

    def extended(extension: Extension) -> Hypothesis:
        reply = rows[extension.row].reply.extended(extension.token, extension.log_likelihood, special)
        return Hypothesis(reply, extension.score)

    parents = list(range(len(rows)))
    for number, of_prefix in enumerate(beams):
        if not of_prefix.goes_on:
            continue
        first = number * decoding.num_beams
        extensions = [
            Extension(row, token, log_likelihood, hypothesis.score + score)
            for row, hypothesis in enumerate(of_prefix.growing, first)
            for token, log_likelihood, score in zip(*of_rows[row], strict=True)
        ]
        extensions.sort(key=lambda extension: extension.score, reverse=True)
        best = extensions[: decoding.num_beams]
        unended = [extension for extension in extensions if extension.token not in special][: decoding.num_beams]
        of_prefix.step(list(map(extended, best)), list(map(extended, unended)))
        parents[first : first + decoding.num_beams] = [extension.row for extension in unended]
        for row, hypothesis in zip(rows[first:], of_prefix.growing, strict=False):  # at the longest length none grows
            row.reply = hypothesis.reply
    return parents
