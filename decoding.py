"""How the next tokens of replies are chosen: sampling, beam search, and which of several replies is the best.

Shapes: R rows (a reply each), V vocabulary.
"""

import os
from dataclasses import dataclass, field
from itertools import dropwhile

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
    beam_score: float = 0.0  # in a beam search: its log-likelihood, changed by penalties

    @property
    def token_log_likelihood(self) -> float:
        """The log-likelihood per token. A sum would favour short replies, since each token makes it less."""
        return self.log_likelihood / max(self.length, 1)

    @property
    def length(self) -> int:
        """Its tokens, with the special one that ended it: that was drawn, and scored, like the others."""
        return len(self.tokens) + self.complete

    def can_grow(self, decoding: Decoding) -> bool:
        return not self.complete and len(self.tokens) < decoding.max_length

    def extended(self, token: int, log_likelihood: float, special: frozenset[int], beam_score: float = 0.0) -> "Reply":
        """With one more token. A special one ends the reply, and a reply that has ended stays as it is."""
        if self.complete:
            return self
        total = self.log_likelihood + log_likelihood
        if token in special:
            return Reply(self.tokens, complete=True, log_likelihood=total, beam_score=beam_score)
        return Reply([*self.tokens, token], log_likelihood=total, beam_score=beam_score)


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
        """The prefix without its persona: a reply may, and should, repeat what the persona says."""
        # A speaker token is the only one that is its own token type; the first one begins the history.
        since_speaker = dropwhile(lambda pair: pair[0] != pair[1], self.prefix)
        return [token for token, _ in since_speaker]


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
        size = min(decoding.top_k, logits.shape[-1])
        likeliest = logits.topk(size).values
        least = likeliest[:, -1:]  # tokens that tie with the k-th stay too
        logits = logits.masked_fill(logits < least, float("-inf"))
    probabilities = logits.softmax(-1)
    if 0 < decoding.top_p < 1:
        probabilities = nucleus(probabilities, decoding.top_p)
    if decoding.min_p > 0:
        largest = probabilities.amax(-1, keepdim=True)
        least = decoding.min_p * largest
        probabilities = probabilities.masked_fill(probabilities < least, 0)
    total = probabilities.sum(-1, keepdim=True)
    return probabilities / total


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """The smallest set of likeliest tokens whose probability reaches top_p; 0 for all others. (R, V) -> (R, V)

    It is never empty (Holtzman et al. 2020, section 3.1).
    """
    vocabulary = probabilities.shape[-1]
    # Sorting a whole vocabulary costs more than the model itself, and the nucleus is nearly always small.
    for size in (*NUCLEUS_SIZES, vocabulary):
        ordered, tokens = probabilities.topk(min(size, vocabulary))
        reached = ordered.sum(-1) >= top_p
        if bool(reached.all()):
            break
    # A token belongs to the nucleus if the likelier ones do not reach top_p without it. The likeliest always does.
    likelier = ordered.cumsum(-1) - ordered
    top_p = max(top_p, 1e-6)  # float32 may round a smaller one to 0, which all tokens reach
    kept = ordered.masked_fill(likelier >= top_p, 0)
    return torch.zeros_like(probabilities).scatter_(-1, tokens, kept)


def draw(probabilities: Tensor, generators: list[torch.Generator]) -> Tensor:
    """One token for each row (R, V) -> (R,), by inverting the cumulative distribution.

    torch.multinomial draws all rows with one generator, so that a reply would depend on the others in its batch. Here
    every row has its own, which is on the CPU whatever the device.
    """
    numbers = [torch.rand(1, generator=generator) for generator in generators]
    uniform = torch.cat(numbers).to(probabilities).clamp(max=1 - 1e-6)
    cumulative = probabilities.cumsum(-1)
    # In float32 probabilities do not sum up to 1. A point at or past their total would be a token past the vocabulary.
    total = cumulative[:, -1:]
    points = uniform[:, None] * total
    # right=True: a point on a boundary belongs to the token after it, so one of probability 0 is never drawn.
    return torch.searchsorted(cumulative, points, right=True)[:, 0]


def repeating(history: list[int], reply: list[int], n: int) -> set[int]:
    """The tokens that would end a sequence of `n` tokens which the history or the reply already holds."""
    begun = n - 1  # tokens of the sequence that stand already
    if len(reply) < begun:  # it would begin before the reply
        return set()
    tokens = [*history, *reply]
    last = len(tokens) - begun
    tail = tokens[last:]
    earlier = [start for start in range(last) if tokens[start : start + begun] == tail]
    return {tokens[start + begun] for start in earlier}


def apply_penalties(logits: Tensor, row: Row, decoding: Decoding, special: frozenset[int]) -> None:
    """Change one row's logits (V,) in place: what is repeated becomes less likely or impossible, an early end too."""
    tokens = row.reply.tokens
    if decoding.repetition_penalty != 1.0:  # Keskar et al. 2019, section 4.1
        # Speaker tokens stand in every history. They too end a reply, and a penalty would only make it longer.
        used = {*row.history(), *tokens} - special
        used = torch.tensor(sorted(used), device=logits.device).long()
        # Divide positive logits and multiply negative ones: either becomes less.
        direction = -logits[used].sign()
        logits[used] *= decoding.repetition_penalty**direction
    if decoding.no_repeat_ngram:
        forbidden = repeating(row.history(), tokens, decoding.no_repeat_ngram)
        logits[list(forbidden)] = float("-inf")
    if len(tokens) < decoding.min_length:
        logits[sorted(special)] = float("-inf")


def sample(logits: Tensor, rows: list[Row], decoding: Decoding, special: frozenset[int]) -> Tensor:
    """The next token of every row (R, V) -> (R,). special: the tokens that end a reply."""
    logits = logits.clone()
    for row, row_logits in zip(rows, logits, strict=True):
        apply_penalties(row_logits, row, decoding, special)
    if decoding.no_sample:
        return logits.argmax(-1)
    probabilities = filtered_probabilities(logits, decoding)
    return draw(probabilities, [row.generator for row in rows])


def extend_rows(logits: Tensor, rows: list[Row], decoding: Decoding, special: frozenset[int]) -> None:
    """Draw a token for the reply of every row, from logits (R, V). special: the tokens that end a reply."""
    tokens = sample(logits, rows, decoding, special)
    # Of the model, before temperature, filters and penalties: replies are ranked by what the model finds likely.
    log_likelihoods = logits.log_softmax(-1)
    log_likelihoods = log_likelihoods.gather(1, tokens[:, None])[:, 0]
    drawn = zip(rows, tokens.tolist(), log_likelihoods.tolist(), strict=True)
    for row, token, log_likelihood in drawn:
        row.reply = row.reply.extended(token, log_likelihood, special)


# ------------------------------------------------------------------------------------------------------------
# Beam search
# ------------------------------------------------------------------------------------------------------------


class Beams:
    """The replies to one prefix: the best that grow, and the best that have ended; `num_beams` of each at most.

    Its rules are those of transformers' `generate` with early_stopping=False, so the replies are too.

    Args:
        rows: hold what grows, best first.
    """

    def __init__(self, rows: list[Row], decoding: Decoding):
        self.rows, self.decoding = rows, decoding
        # All beams are copies of one at first. Only one of them may be extended, or all would stay the same.
        for row in rows[1:]:
            row.reply = Reply(beam_score=float("-inf"))
        self.growing = [row.reply for row in rows]  # best first, by beam score: they are all of one length
        self.ended: list[Reply] = []  # best first, by `rank`

    def rank(self, reply: Reply) -> float:
        """The beam score over the length, a special token at the end included, to the power of the length penalty."""
        return reply.beam_score / max(reply.length, 1) ** self.decoding.length_penalty

    @property
    def goes_on(self) -> bool:
        """Whether what grows may still be better than the worst of what has ended."""
        if not self.growing:
            return False
        if len(self.ended) < self.decoding.num_beams:
            return True
        # As if the best one ended now. Made longer, it may still rank higher: this is transformers' heuristic.
        best_growing, worst_ended = self.growing[0], self.ended[-1]
        return self.rank(best_growing) > self.rank(worst_ended)

    def step(self, extensions: list[tuple[int, Reply]]) -> list[int]:
        """Go on with the best extensions by a token, best first; the rows that those which grow come from.

        What ends must be among the first `num_beams` of all, so that a poor end does not take the place of a good
        beginning.
        """
        size = self.decoding.num_beams
        # At the longest length all of them end, with a special token or without.
        ended = [reply for _, reply in extensions[:size] if not reply.can_grow(self.decoding)]
        ended = sorted([*self.ended, *ended], key=self.rank, reverse=True)
        self.ended = ended[:size]
        growing = [(row, reply) for row, reply in extensions if reply.can_grow(self.decoding)]
        growing = growing[:size]
        self.growing = [reply for _, reply in growing]
        for row, reply in zip(self.rows, self.growing, strict=False):
            row.reply = reply
        return [row for row, _ in growing]

    def agreed(self) -> Reply:
        """The beginning that all replies share, which no later step changes."""
        replies = [*self.growing, *self.ended]
        shared = os.path.commonprefix([reply.tokens for reply in replies])  # of any lists
        return Reply(shared)

    def best(self, count: int) -> list[Reply]:
        """The best replies: those that have ended, and where the search was stopped too early for that, others."""
        found = self.ended
        if len(found) < count:
            found = sorted([*self.ended, *self.growing], key=self.rank, reverse=True)
        return found[:count]


def extend_beams(logits: Tensor, beams: list[Beams], special: frozenset[int]) -> list[int]:
    """Extend the beams of every prefix by a token, from logits (R, V); the row that each row now goes on from."""
    rows = [row for of_prefix in beams for row in of_prefix.rows]
    decoding, vocabulary = beams[0].decoding, logits.shape[1]
    log_likelihoods = logits.log_softmax(-1)
    # Penalties change log-likelihoods here, as in transformers, since these are what is summed.
    penalised = log_likelihoods.clone()
    for row, row_scores in zip(rows, penalised, strict=True):
        apply_penalties(row_scores, row, decoding, special)
    scores = torch.tensor([row.reply.beam_score for row in rows], device=logits.device)
    scores = (scores[:, None] + penalised).view(len(beams), -1)  # (P, beams * V) for P prefixes
    # So many that enough are left without those that end: each row has one for each special token.
    count = decoding.num_beams * (1 + len(special))
    scores, places = scores.topk(min(count, scores.shape[1]))
    log_likelihoods = log_likelihoods.view(len(beams), -1).gather(1, places)
    # As lists, copied from the device once: what follows reads them number by number.
    likeliest = zip(beams, places.tolist(), log_likelihoods.tolist(), scores.tolist(), strict=True)
    parents = list(range(len(rows)))
    for number, (of_prefix, *columns) in enumerate(likeliest):
        if not of_prefix.goes_on:  # its rows are computed on with the others', and nothing is drawn for them
            continue
        first = number * decoding.num_beams
        extensions = []
        for place, log_likelihood, score in zip(*columns, strict=True):
            row, token = divmod(place, vocabulary)
            reply = of_prefix.rows[row].reply.extended(token, log_likelihood, special, score)
            extensions.append((first + row, reply))
        grown_from = of_prefix.step(extensions)
        parents[first : first + len(grown_from)] = grown_from
    return parents
