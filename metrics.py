"""What ConvAI2 measures, as its own scripts compute it: F1, Hits@k and perplexity per word.

Those scripts stood in ParlAI (projects/convai2) until June 2020; nothing of it is needed here. This room sees texts,
scores and logits, and no model. U: utterances.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from splits import Split
from utils import DialogTokenizer

# ------------------------------------------------------------------------------------------------------------
# F1 and ranks: texts as ParlAI compares them
# ------------------------------------------------------------------------------------------------------------

# All that string.punctuation holds, as ParlAI lists it.
PUNCTUATION = re.compile(r"[!\"#$%&()*+,\-./:;<=>?@\[\]\\^`{|}~_']")
ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalize(text: str) -> str:
    """Lower case, punctuation to spaces, articles removed, white space folded."""
    return " ".join(normalized_words(text))


def normalized_words(text: str) -> list[str]:
    text = PUNCTUATION.sub(" ", text.lower())
    text = ARTICLES.sub(" ", text)
    return text.split()


def f1(reply: str, gold: str) -> float:
    """Harmonic mean of precision and recall of the normalised words, as bags."""
    predicted = normalized_words(reply)
    expected = normalized_words(gold)
    common = (Counter(predicted) & Counter(expected)).total()
    if not common:  # both may be empty, and the quotient 0 / 0
        return 0.0
    return 2 * common / (len(predicted) + len(expected))


def gold_rank(scores: np.ndarray, texts: list[str], right: list[str]) -> int:
    """The rank of the first right reply among the candidates, of which the gold one is the last; 0 is the best.

    ParlAI sorts candidates by score, and looks for the first one with the normalised text of any right reply. Equal
    scores keep the order of the candidates, so a tie counts against the gold reply.
    """
    wanted = set(map(normalize, right))
    order = np.argsort(-scores, kind="stable")
    rank = 0
    while normalize(texts[order[rank]]) not in wanted:  # one after the other: most gold ranks are small
        rank += 1
    return rank


def gold_ranks(scores: np.ndarray, split: Split) -> np.ndarray:
    """The ranks (U,) of the right replies of a split's first U utterances, from the scores (U, N) of their candidates.

    Candidates of the same tokens get the first one's score, in `scores` too. What differs is rounding, which depends on
    a candidate's place in its row, and is coarse in bf16.
    """
    ranks = []
    for utterance, row in enumerate(scores):
        tokens = [split.ids(candidate) for candidate in split.candidates[utterance]]
        first_places = [tokens.index(candidate) for candidate in tokens]
        of_utterance = row[: len(tokens)]  # a view: rows have as many columns as the most candidates
        of_utterance[:] = of_utterance[first_places]
        texts = split.candidate_texts(utterance)
        right = split.right_texts(utterance)
        ranks.append(gold_rank(of_utterance, texts, right))
    return np.array(ranks)


# ------------------------------------------------------------------------------------------------------------
# Perplexity per word
# ------------------------------------------------------------------------------------------------------------

# ParlAI puts these into every dictionary, with frequencies that sort them to its front.
PARLAI_SPECIAL = {
    "__null__": 10**9 + 3,
    "__start__": 10**9 + 2,
    "__end__": 10**9 + 1,
    "__unk__": 10**9,
}


def split_words(text: str) -> list[str]:
    """ParlAI's `split` tokenizer, lower-cased: white space, after putting spaces around . , ; : ! ?"""
    spaced = re.sub(r"([.,;:!?])", r" \1 ", text.lower())
    return spaced.split()


def dictionary_texts(splits: dict[str, Split]) -> Iterator[str]:
    """The texts that ConvAI2's dictionary is made of: what a model is shown, and what it is trained on.

    These are the personas, once a dialog, and the other person's utterances of both splits, and the replies of the
    training split. ParlAI hides the replies of a validation split, so a word that stands only there is not scored.
    """
    for name, split in splits.items():
        for sentence in split.persona.values:
            yield f"your persona: {split.text(sentence)}"
        for utterance in range(len(split)):
            message = split.history_texts(utterance)[-1:]
            # A reply to nothing answers this word in ParlAI's files.
            yield from message or ["__SILENCE__"]
            if name == "train":
                yield split.gold_text(utterance)


class WordTable:
    """A distribution over words, made from one over tokens by each word's first token.

    With t the first token of word w, and n the frequency of a word,

        P(w) = P(t) / Z * (n(w) + 5) / sum of n(v) + 5 over all words v that begin with t

    where Z is the sum of P over all tokens with which a word begins: what a model gives to others is left out.

    Args:
        first_tokens: of each word; -1 where it has none, and so no probability.
        frequencies: of each word.
    """

    SMOOTHING = 5  # the original toolkit's

    def __init__(self, first_tokens: Iterable[int], frequencies: Iterable[int]):
        first = np.fromiter(first_tokens, int)
        weights = np.fromiter(frequencies, float) + self.SMOOTHING
        has_token = first >= 0
        beginnings = first[has_token]
        token_weights = np.bincount(beginnings, weights[has_token])  # (V,) sums over the words that begin with a token
        share = np.where(has_token, weights / token_weights[first], 0)
        self.first = torch.as_tensor(first)  # (W,)
        self.log_share = torch.as_tensor(share).log()  # (W,)
        self.tokens = torch.as_tensor(np.unique(beginnings))

    def log_probabilities(self, logits: Tensor, words: Tensor) -> Tensor:
        """Of each row's word (K,), from the logits (K, V) that predict its first token; float64, on the CPU."""
        device = logits.device
        first = self.first[words].clamp(min=0)  # a word without one has a share of 0, so any token will do
        first = first[:, None].to(device)
        first_logits = logits.gather(1, first)[:, 0]
        # Selected where the logits are, so that only these are copied. No GPU of Apple's has float64.
        beginnings = logits[:, self.tokens.to(device)].cpu().double()
        log_total = beginnings.logsumexp(-1)  # log Z, but for the softmax's denominator: that cancels
        return first_logits.cpu().double() - log_total + self.log_share[words]


class WordPosition(NamedTuple):
    offset: int  # of its first token among the reply's
    word: int
    inside: int  # 1 after another word, 0 at the reply's start


class Spelling(NamedTuple):
    tokens: list[int]
    positions: list[WordPosition]


class WordModel:
    """The words of replies that ConvAI2 scores, and two distributions over the words of its dictionary.

    "word_nll" goes by the token with which a word begins in a reply. Inside a reply that is another one than at its
    start where, as in byte-level vocabularies, a token carries the space before it.

    "original_word_nll" goes by the word table of the original toolkit, and is comparable with what that toolkit
    published. It merges a whole word by BPE alone, while its replies are split before. So it looks for "i'm" under the
    token "i'm", which openai-gpt's vocabulary has, where the model has learned to predict "i". With GPT-2 it looks
    for every word without its space. ParlAI's four special words take part with their frequencies of a billion.
    """

    def __init__(self, splits: dict[str, Split], tokenizer: DialogTokenizer):
        counts = Counter(dict.fromkeys(PARLAI_SPECIAL, 0))
        for text in dictionary_texts(splits):
            counts.update(split_words(text))
        self.words = list(counts)
        self.number = {word: i for i, word in enumerate(self.words)}
        # Two of each of these: for words at a reply's start, and after a word.
        self.encoders = tokenizer.encode, tokenizer.encode_inside
        self.spellings = [encode(self.words) for encode in self.encoders]
        own = []
        for spellings in self.spellings:
            first_tokens = [ids[0] if ids else -1 for ids in spellings]
            own.append(WordTable(first_tokens, counts.values()))
        bare_tokens = map(tokenizer.first_bare_token, self.words)
        with_special = {**counts, **PARLAI_SPECIAL}
        original = WordTable(bare_tokens, with_special.values())
        self.tables = {"word_nll": own, "original_word_nll": [original, original]}
        valid = splits["valid"]
        golds = {int(candidates[-1]) for candidates in valid.candidates}
        self.spelled = {gold: self.spell(valid.text(gold)) for gold in golds}  # by the gold reply's string number

    def spell(self, text: str) -> Spelling:
        """A reply as the tokens of its words, and where those stand that are scored: the dictionary's."""
        tokens, positions = [], []
        for word in split_words(text):
            inside = int(bool(tokens))
            number = self.number.get(word)
            if number is None:
                (spelling,) = self.encoders[inside]([word])
            else:
                spelling = self.spellings[inside][number]
                if spelling:  # a tokenizer may leave out what its vocabulary lacks
                    positions.append(WordPosition(len(tokens), number, inside))
            tokens += spelling
        return Spelling(tokens, positions)


# ------------------------------------------------------------------------------------------------------------
# Generated replies
# ------------------------------------------------------------------------------------------------------------


def reply_columns(replies: list[str], split: Split) -> dict[str, np.ndarray]:
    """F1 (U,) of generated replies to a split's first U utterances, and what a person would notice of each."""
    rows = []
    for utterance, reply in enumerate(replies):
        history = list(map(normalized_words, split.history_texts(utterance)))
        persona = list(map(normalized_words, split.persona_texts(utterance)))
        row = traits(reply, history, persona)
        # ParlAI's F1 is that of the right reply it is nearest to.
        row["f1"] = max(f1(reply, right) for right in split.right_texts(utterance))
        rows.append([row[name] for name in MEANS])
    columns = np.array(rows, float).T
    return dict(zip(MEANS, columns, strict=True))


def traits(reply: str, history: list[list[str]], persona: list[list[str]]) -> dict[str, float]:
    """What a person would notice of a reply: whether it asks, and what it repeats. History and persona as words."""
    words = normalized_words(reply)
    trigrams = set(ngrams(words, 3))
    # A sentence of the persona counts as a whole, in one piece.
    repeated = [sentence for sentence in persona if sentence and tuple(sentence) in ngrams(words, len(sentence))]
    return {
        "mean_length": len(words),
        "questions": reply.rstrip().endswith("?"),
        "repeats_utterance": len(words) > 0 and words in history,
        "repeats_history_3gram": any(not trigrams.isdisjoint(ngrams(utterance, 3)) for utterance in history),
        "repeats_persona": len(repeated) > 0,
    }


def distinct(replies: list[str], n: int) -> float:
    """The share of different ones among all sequences of `n` words (Li et al. 2016, section 5.3)."""
    grams = []
    for reply in replies:
        grams += ngrams(normalized_words(reply), n)
    return len(set(grams)) / max(1, len(grams))


def ngrams(words: list[str], n: int) -> list[tuple[str, ...]]:
    starts = range(len(words) - n + 1)
    return [tuple(words[start : start + n]) for start in starts]


# ------------------------------------------------------------------------------------------------------------
# Figures and their standard errors
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """A figure of U utterances, which are taken as drawn independently of each other.

    Args:
        influence: (U,) the share of each utterance in the figure's deviation, to first order (the delta method). Their
            sum is 0; of a mean they are (x - mean) / U.
    """

    value: float
    influence: np.ndarray

    @property
    def standard_error(self) -> float:
        """Of a mean it is the sample's standard deviation over the root of U. nan for a single utterance."""
        size = len(self.influence)
        if size < 2:
            return math.nan
        variance = float(np.square(self.influence).sum())
        unbiased = size / (size - 1) * variance  # Bessel's correction
        return math.sqrt(unbiased)

    def __sub__(self, other: "Figure") -> "Figure":
        """The paired difference of a figure of the same utterances, whose errors largely cancel."""
        return Figure(self.value - other.value, self.influence - other.influence)


def ratio(sums: np.ndarray, counts: np.ndarray) -> Figure:
    """The mean over all that was counted, of which each utterance has its number: sum of sums / sum of counts."""
    total = counts.sum()
    if not total:
        return Figure(math.nan, np.full(len(sums), math.nan))
    mean = sums.sum() / total
    # The delta method: to first order, an utterance moves the ratio by its deviation from what its count predicts.
    return Figure(mean, (sums - mean * counts) / total)


def average(values: np.ndarray) -> Figure:
    """The mean over utterances."""
    return ratio(values.astype(float), np.ones(len(values)))


def perplexity(nll: np.ndarray, counts: np.ndarray) -> Figure:
    """exp of the mean negative log-likelihood, whose derivative is the perplexity itself."""
    mean = ratio(nll, counts)
    value = math.exp(min(mean.value, 700))  # math.exp raises OverflowError from 710 on
    return Figure(value, value * mean.influence)


MEANS = ("f1", "mean_length", "questions", "repeats_utterance", "repeats_history_3gram", "repeats_persona")


def figures_of(columns: dict[str, np.ndarray]) -> dict[str, Figure]:
    """Every figure that a report's columns (U,) allow: `rank` (1: the best), likelihoods with counts, means."""
    figures = {}
    if "rank" in columns:
        for k in (1, 5, 10):
            figures[f"hits@{k}"] = average(columns["rank"] <= k)
    if "nll" in columns:
        figures["original_word_ppl"] = perplexity(columns["original_word_nll"], columns["words"])
        figures["word_ppl"] = perplexity(columns["word_nll"], columns["words"])
        figures["token_ppl"] = perplexity(columns["nll"], columns["tokens"])
    for name in MEANS:
        if name in columns:
            figures[name] = average(columns[name])
    return figures
