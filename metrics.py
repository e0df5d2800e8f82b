"""What ConvAI2 measures, as its own scripts compute it: F1, Hits@k and perplexity per word.

Those scripts stood in ParlAI (projects/convai2) until June 2020; nothing of it is needed here. This room sees texts,
scores and logits, and no model.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils import DialogTokenizer, Split

# ------------------------------------------------------------------------------------------------------------
# F1 and ranks: texts as ParlAI compares them
# ------------------------------------------------------------------------------------------------------------

PUNCTUATION = re.compile(r"[!\"#$%&()*+,\-./:;<=>?@\[\]\\^`{|}~_']")
ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalize(text: str) -> str:
    """Lower case, punctuation to spaces, articles removed, white space folded."""
    return " ".join(ARTICLES.sub(" ", PUNCTUATION.sub(" ", text.lower())).split())


def f1(reply: str, gold: str) -> float:
    """Harmonic mean of precision and recall of the normalised words, as bags."""
    predicted, expected = normalize(reply).split(), normalize(gold).split()
    common = sum((Counter(predicted) & Counter(expected)).values())
    return 2 * common / (len(predicted) + len(expected)) if common else 0.0


def gold_rank(scores: np.ndarray, texts: list[str]) -> int:
    """The rank of the gold reply among the candidates, of which it is the last; 0 is the best.

    ParlAI sorts candidates by score, and looks for the first one with the gold reply's normalised text. Equal scores
    keep the order of the candidates, so a tie counts against the gold reply.
    """
    texts = [normalize(text) for text in texts]
    order = np.argsort(-scores, kind="stable")
    return next(rank for rank, candidate in enumerate(order) if texts[candidate] == texts[-1])


def ranking_figures(scores: np.ndarray, split: Split) -> tuple[dict[str, float], list[int]]:
    """Hits@k, and each gold reply's rank.

    Args:
        scores: (U, N) of the candidates of the first U utterances. Where candidates have the same tokens, they get
            the first one's score: what differs is rounding, which depends on a candidate's place in its row.
    """
    ranks = []
    for utterance, row in enumerate(scores):
        first_with: dict[tuple, int] = {}
        for n, candidate in enumerate(split.candidates[utterance]):
            row[n] = row[first_with.setdefault(tuple(split.ids(candidate)), n)]
        texts = split.candidate_texts(utterance)
        ranks.append(gold_rank(row[: len(texts)], texts))
    return {f"hits@{k}": float(np.mean(np.array(ranks) < k)) for k in (1, 5, 10)}, ranks


# ------------------------------------------------------------------------------------------------------------
# Perplexity per word
# ------------------------------------------------------------------------------------------------------------

# ParlAI puts these into every dictionary, with frequencies that sort them to its front.
PARLAI_SPECIAL = {"__null__": 10**9 + 3, "__start__": 10**9 + 2, "__end__": 10**9 + 1, "__unk__": 10**9}


def split_words(text: str) -> list[str]:
    """ParlAI's `split` tokenizer, lower-cased: white space, after putting spaces around . , ; : ! ?"""
    return re.sub(r"([.,;:!?])", r" \1 ", text.lower()).split()


def dictionary_texts(splits: dict[str, Split]) -> Iterator[str]:
    """The texts that ConvAI2's dictionary is made of: what a model is shown, and what it is trained on.

    These are the personas, once a dialog, and the other person's utterances of both splits, and the replies of the
    training split. ParlAI hides the replies of a validation split, so a word that stands only there is not scored.
    """
    for name, split in splits.items():
        for sentence in split.persona.values:
            yield f"your persona: {split.text(sentence)}"
        for utterance in range(len(split)):
            # A reply to nothing answers this word in ParlAI's files.
            yield from split.history_texts(utterance)[-1:] or ["__SILENCE__"]
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

    SMOOTHING = 5

    def __init__(self, first_tokens: list[int], frequencies: list[int]):
        first, weights = np.array(first_tokens), np.array(frequencies, float) + self.SMOOTHING
        has_token = first >= 0
        totals = np.bincount(first[has_token], weights[has_token])
        self.first = torch.as_tensor(first)  # (W,)
        self.log_share = torch.as_tensor(np.where(has_token, weights / totals[first], 0)).log()  # (W,)
        self.tokens = torch.as_tensor(np.unique(first[has_token]))

    def log_probabilities(self, logits: Tensor, words: Tensor) -> Tensor:
        """Of each row's word (K,), from the logits (K, V) that predict its first token; float64, on the CPU."""
        total = logits[:, self.tokens.to(logits.device)].cpu().double().logsumexp(-1)
        first = self.first[words].clamp(min=0).to(logits.device)
        return logits.gather(1, first[:, None])[:, 0].cpu().double() - total + self.log_share[words]


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
        frequencies = [counts[word] for word in self.words]
        self.encoders = tokenizer.encode, tokenizer.encode_inside  # of words at a reply's start, and after a word
        self.spellings = [encode(self.words) for encode in self.encoders]
        first_tokens = [[ids[0] if ids else -1 for ids in spellings] for spellings in self.spellings]
        original = WordTable(
            [tokenizer.first_bare_token(word) for word in self.words],
            [PARLAI_SPECIAL.get(word, frequency) for word, frequency in zip(self.words, frequencies, strict=True)],
        )
        self.tables = {  # for words at a reply's start, and after a word
            "word_nll": [WordTable(tokens, frequencies) for tokens in first_tokens],
            "original_word_nll": [original] * 2,
        }
        valid = splits["valid"]
        golds = {int(valid.candidates[utterance][-1]) for utterance in range(len(valid))}
        self.spelled = {gold: self.spell(valid.text(gold)) for gold in golds}  # by the gold reply's string number

    def spell(self, text: str) -> Spelling:
        """A reply as the tokens of its words, and where those stand that are scored: the dictionary's."""
        tokens, positions = [], []
        for word in split_words(text):
            inside, number = int(bool(tokens)), self.number.get(word)
            spelling = self.encoders[inside]([word])[0] if number is None else self.spellings[inside][number]
            if spelling and number is not None:
                positions.append(WordPosition(len(tokens), number, inside))
            tokens += spelling
        return Spelling(tokens, positions)


def perplexity(nll: np.ndarray, counts: np.ndarray) -> float:
    """exp of the summed negative log-likelihood over the count; nan where nothing was counted."""
    return math.exp(min(nll.sum() / counts.sum(), 700)) if counts.sum() else math.nan


# ------------------------------------------------------------------------------------------------------------
# What a person would notice
# ------------------------------------------------------------------------------------------------------------


def reply_figures(replies: list[str], split: Split) -> dict[str, float]:
    """F1 of generated replies to a split's first utterances, and their length, variety, questions and repetitions."""
    words = [normalize(reply).split() for reply in replies]
    grams = {n: [gram for reply in words for gram in ngrams(reply, n)] for n in (1, 2)}
    repeats = {"repeats_utterance": 0, "repeats_history_3gram": 0, "repeats_persona": 0}
    for utterance, reply in enumerate(words):
        history = [normalize(text).split() for text in split.history_texts(utterance)]
        history_grams = {gram for text in history for gram in ngrams(text, 3)}
        persona = [normalize(text).split() for text in split.persona_texts(utterance)]
        repeats["repeats_utterance"] += bool(reply) and reply in history
        repeats["repeats_history_3gram"] += not history_grams.isdisjoint(ngrams(reply, 3))
        repeats["repeats_persona"] += any(text and tuple(text) in ngrams(reply, len(text)) for text in persona)
    return {
        "f1": float(np.mean([f1(reply, split.gold_text(i)) for i, reply in enumerate(replies)])),
        "mean_length": float(np.mean([len(reply) for reply in words])),
        "distinct_1": len(set(grams[1])) / max(1, len(grams[1])),
        "distinct_2": len(set(grams[2])) / max(1, len(grams[2])),
        "questions": float(np.mean([reply.rstrip().endswith("?") for reply in replies])),
    } | {name: count / len(replies) for name, count in repeats.items()}


def ngrams(words: list[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
