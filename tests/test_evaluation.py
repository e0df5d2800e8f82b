"""The ConvAI2 evaluation against hand-worked cases and against a slow and obvious reference."""

import hashlib
import json
import logging
import math
import re
import string
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import convai_evaluation
from batches import batches_by_length, collate
from cli import UserError
from convai_evaluation import evaluate, main, parse_settings
from dialogs import Dialogs
from helpers import run_python
from inputs import Instances
from metrics import WordModel, distinct, f1, figures_of, gold_rank, gold_ranks, normalize, reply_columns, split_words
from tiny_models import embed
from utils import load_dataset

KINDS = ("openai-gpt", "gpt2", "llama")
PADDED = "bloom"  # its packed rows are not exact: every candidate has a row of its own


def dialog(persona: list[str], *utterances: tuple[list[str], list[str]]) -> dict:
    """A dialog of PersonaChat JSON; utterances are (history, candidates), the gold candidate last."""
    turns = [{"history": history, "candidates": candidates} for history, candidates in utterances]
    return {"personality": persona, "utterances": turns}


SAID = [
    "hello , how are you doing today ?",
    "i'm fine , thanks . i like green .",
    "do you like rain ?",
    "i do not like rain , but i like the sea .",
    "what do you do for a living ?",
    "i teach music to children .",
    "that sounds like fun !",
    "my sister has two cats . don't you ?",
]
WRONG = ["what do you do ?", "no", "i love to eat fish .", "my brother drives a red car ."]
TRAIN = [
    dialog(["i work as a cook .", "i love fish ."], (["hi there , you"], ["unseen", "i work , and i love to work ."])),
    dialog([], ([], ["zebra", "hello , how are you ? i'm in Zürich , and my sister is ."])),
]
ORDINARY = dialog(
    ["i have three dogs .", "my favorite color is green ."],
    *((SAID[:i], [*WRONG[: i - 1], SAID[i]] if i > 1 else [*WRONG, SAID[i]]) for i in (1, 3, 5, 7)),
)
ODD = dialog(
    [],
    ([], ["hello", "bye now", "Well,hello THERE...how's it going?I'm Ann!"]),  # no persona, no history; unspaced
    ([""], ["no", "Zürich?  naïve 42:17 ☃"]),  # letters, digits and signs that the vocabulary never saw
    # Seven turns, of which five are kept; the gold reply twice, as text.
    (["Bye", "no", "Hi!", "ok", "so?", "sea", "HOW are you?"], ["I'm  fine, thanks", "NO!", "I'm FINE , thanks."]),
    (["well ?"], ["wordless"]),  # gold alone
)
DATA = {"train": TRAIN, "valid": [ORDINARY, ODD]}


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`options("--x", 1)` are the arguments of such a command line."""

    def parse(*arguments):
        base = ["--device", "cpu", "--dataset_cache", tmp_path / "cache.bin"]
        monkeypatch.setattr(sys, "argv", ["convai_evaluation.py", *map(str, [*base, *arguments])])
        settings, *others = parse_settings()
        return replace(settings, max_history=2), *others

    return parse


@pytest.fixture
def splits_of(tmp_path: Path):
    """`splits_of(data, tokenizer)` are the splits of PersonaChat JSON."""

    def load_splits(data: dict, tokenizer):
        (tmp_path / "data.json").write_text(json.dumps(data))
        dialogs = Dialogs(str(tmp_path / "data.json"))
        return load_dataset(dialogs, tokenizer, str(tmp_path / "cache.bin"), progress=False)

    return load_splits


@pytest.fixture
def run(load, options, splits_of):
    """`run(folder, data, "--x", 1)` gives what is in an `Evaluation`, .figures, .ranks, .split and .tokenizer."""

    def run_evaluation(folder: Path, data: dict, *arguments) -> SimpleNamespace:
        model, tokenizer = load(folder)
        splits = splits_of(data, tokenizer)
        found = evaluate(model, splits, tokenizer, *options(*arguments))
        ranks = (found.columns["rank"] - 1).tolist() if "rank" in found.columns else []
        about = {"figures": found.figures, "ranks": ranks, "tokenizer": tokenizer}
        return SimpleNamespace(**vars(found), **about)

    return run_evaluation


@pytest.fixture
def command(options, capsys):
    """`command("--x", 1)` runs the script in this process and gives what it wrote: .out and .err."""

    def run_command(*arguments):
        options(*arguments)
        main()
        return capsys.readouterr()

    return run_command


# ------------------------------------------------------------------------------------------------------------
# The reference: the definitions, word for word. Nothing of the project's but the tokenizer's text to ids and back.
# ------------------------------------------------------------------------------------------------------------


def plain(text: str) -> list[str]:
    """ParlAI's normalised words."""
    text = "".join(" " if letter in string.punctuation else letter for letter in text.lower())
    return [word for word in text.split() if word not in ("a", "an", "the")]


def parlai_words(text: str) -> list[str]:
    for mark in ".,;:!?":
        text = text.replace(mark, f" {mark} ")
    return text.lower().split()


SPECIAL = {"__null__": 1000000003, "__start__": 1000000002, "__end__": 1000000001, "__unk__": 1000000000}


def count_words(data: dict) -> Counter:
    """ParlAI's dictionary. A reply to nothing answers __SILENCE__ in its files; replies to validate on are hidden."""
    counts = Counter(dict.fromkeys(SPECIAL, 0))
    for split in ("train", "valid"):
        for each in data[split]:
            for line in each["personality"]:
                counts.update(parlai_words("your persona: " + line))
            for utterance in each["utterances"]:
                counts.update(parlai_words((utterance["history"] or ["__SILENCE__"])[-1]))
                if split == "train":
                    counts.update(parlai_words(utterance["candidates"][-1]))
    return counts


def bare_bpe(folder: Path, word: str) -> int:
    """The first token of a word by BPE alone: of all pairs that may be merged, the first in the list of merges is."""
    bpe = json.loads((folder / "tokenizer.json").read_text())["model"]
    order = {tuple(pair): place for place, pair in enumerate(bpe["merges"])}
    pieces = [*word[:-1], word[-1] + (bpe["end_of_word_suffix"] or "")]
    while len(pieces) > 1:
        place, i = min((order.get(pair, math.inf), i) for i, pair in enumerate(zip(pieces, pieces[1:], strict=False)))
        if place == math.inf:
            break
        pieces[i : i + 2] = ["".join(pieces[i : i + 2])]
    return bpe["vocab"].get(pieces[0], bpe["vocab"].get("<unk>"))


class Slow:
    """One unpadded row at a time through transformers' own model of a folder's weights.

    Args:
        counts: the dictionary with its frequencies.
    """

    def __init__(self, folder: Path, tokenizer, counts: Counter):
        self.lm = AutoModelForCausalLM.from_pretrained(folder).eval()
        head = "model" if tokenizer.ids.token_types else "multiple_choice_head"
        weights = load_file(folder / f"{head}.safetensors")
        self.summary = weights["multiple_choice_head.summary.weight"][0], weights["multiple_choice_head.summary.bias"]
        self.ids, self.encode_all, self.decode = tokenizer.ids, tokenizer.encode, tokenizer.decode
        self.counts, self.firsts = counts, {}
        self.bare = {word: bare_bpe(folder, word) for word in counts}

    def encode(self, text: str) -> list[int]:
        return self.encode_all([text])[0]

    def row(self, persona: list[str], history: list[str]) -> tuple[list[int], list[int]]:
        sentences = persona if self.ids.token_types else [" ".join(persona)]
        tokens = [self.ids.bos, *(token for line in sentences for token in self.encode(line))]
        types = [self.ids.speaker1] * len(tokens)
        kept = history[-5:]  # --max_history 2
        for i, text in enumerate(kept):
            speaker = self.ids.speaker2 if (len(kept) - i) % 2 else self.ids.speaker1
            segment = [speaker, *self.encode(text)]
            tokens, types = tokens + segment, types + [speaker] * len(segment)
        return [*tokens, self.ids.speaker1], [*types, self.ids.speaker1]

    @torch.no_grad()
    def ask(self, prefix: tuple[list[int], list[int]], reply: list[int]) -> tuple[torch.Tensor, float]:
        """Logits (R + 1, V) at the tokens that predict each of the reply's and the next, and the choice score."""
        tokens, types = prefix[0] + reply, prefix[1] + [self.ids.speaker1] * len(reply)
        output = self.lm(inputs_embeds=embed(self.lm, self.ids, tokens, types), output_hidden_states=True)
        weight, bias = self.summary
        score = output.hidden_states[-1][0, -1] @ weight + bias
        return output.logits[0, len(prefix[0]) - 1 :].double(), score.item()

    def first_tokens(self, before: str) -> dict[str, int]:
        """The first token of every dictionary word that stands behind these words."""
        if before not in self.firsts:
            known = self.encode(before)
            longer = self.encode_all([f"{before} {word}".strip() for word in self.counts])
            tails = {word: ids[len(known) :] for word, ids in zip(self.counts, longer, strict=True)}
            self.firsts[before] = {word: ids[0] for word, ids in tails.items() if ids}
        return self.firsts[before]

    def word_nll(self, prefix, reply: str, original: bool = False) -> list[float]:
        """original: by the original toolkit's word table."""
        found, words, counts = [], parlai_words(reply), self.counts
        if original:
            counts = self.counts | SPECIAL
        for i, word in enumerate(words):
            if word not in self.counts:
                continue
            before = " ".join(words[:i])
            first = self.bare if original else self.first_tokens(before)
            total = Counter()
            for other, token in first.items():
                total[token] += counts[other] + 5
            p = self.ask(prefix, self.encode(before))[0][-1].softmax(-1).tolist()
            said = {other: p[token] * (counts[other] + 5) / total[token] for other, token in first.items()}
            found.append(-math.log(said[word] / sum(said.values())))
        return found

    def token_nll(self, prefix, reply: str) -> list[float]:
        tokens = [*self.encode(reply), self.ids.eos]
        logits = self.ask(prefix, tokens[:-1])[0]
        return [-logits[i].log_softmax(-1)[token].item() for i, token in enumerate(tokens)]

    def score(self, prefix, text: str, rank_by: str = "mc") -> float:
        choice, likelihood = (
            self.ask(prefix, [*self.encode(text), self.ids.eos])[1],
            -np.mean(self.token_nll(prefix, text)),
        )
        return {"mc": choice, "lm": likelihood, "both": choice + likelihood}[rank_by]

    def rank(self, prefix, candidates: list[str], rank_by: str = "mc") -> int:
        scores = [self.score(prefix, text, rank_by) for text in candidates]
        gold = plain(candidates[-1])
        best = max(score for score, text in zip(scores, candidates, strict=True) if plain(text) == gold)
        return sum(score >= best for score, text in zip(scores, candidates, strict=True) if plain(text) != gold)

    def reply(self, prefix) -> str:
        """Greedy; at least one token, at most twenty."""
        tokens = []
        while len(tokens) < 20:
            logits = self.ask(prefix, tokens)[0][-1]
            if not tokens:
                logits[list(self.ids.all)] = -math.inf
            token = logits.argmax().item()
            if token in self.ids.all:
                break
            tokens.append(token)
        return self.decode(tokens)


def rows_of(slow: Slow, data: dict, split) -> list[tuple]:
    """(prefix, candidates) of every utterance; where there is only the gold reply, with what was drawn for it."""
    rows = []
    for each in data["valid"]:
        for utterance in each["utterances"]:
            given, found = utterance["candidates"], split.candidate_texts(len(rows))
            assert found[-1] == given[-1] and (len(given) == 1 or found == given)
            rows.append((slow.row(each["personality"], utterance["history"]), found))
    return rows


def f1_by_hand(reply: str, gold: str) -> float:
    reply, gold = plain(reply), plain(gold)
    common = sum(min(reply.count(word), gold.count(word)) for word in set(reply))
    if not common:
        return 0.0
    precision, recall = common / len(reply), common / len(gold)
    return 2 * precision * recall / (precision + recall)


def perplexity(nlls: list[list[float]]) -> float:
    flat = [nll for row in nlls for nll in row]
    return math.exp(sum(flat) / len(flat))


# ------------------------------------------------------------------------------------------------------------
# Hand-worked cases
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The cat's  on a-mat, AN hour!", "cat s on mat hour"),
        ("a an the A The", ""),
        ("another theme ana", "another theme ana"),  # articles only as whole words
        ("it's_a (test) [x] {y} <z> #1 $2 50% a/b\\c ~`^@&*+=|\"'", "it s test x y z 1 2 50 b c"),
        ("\t so\n it goes \u00a0", "so it goes"),
        ("“naïve” – 3 × 4…", "“naïve” – 3 × 4…"),  # ParlAI knows no other punctuation than ASCII's
    ],
)
def test_normalisation(text: str, expected: str) -> None:
    assert normalize(text) == expected


@pytest.mark.parametrize(
    ("reply", "gold", "expected"),
    [
        ("I like the cats.", "i like cats", 1.0),
        ("cats", "i like cats", 2 * 1 * (1 / 3) / (1 + 1 / 3)),
        ("no no no", "no , no way", 2 * (2 / 3) * (2 / 3) / (4 / 3)),  # bags: only two of the three are matched
        ("way no", "no way", 1.0),  # the order does not matter
        ("dogs", "cats", 0.0),
        ("", "cats", 0.0),
        ("cats", "", 0.0),
        ("the", "a .", 0.0),  # nothing is left of either: no word in common
    ],
)
def test_f1(reply: str, gold: str, expected: float) -> None:
    assert f1(reply, gold) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hi,I'm ANN.", ["hi", ",", "i'm", "ann", "."]),
        ("well...no?!", ["well", ".", ".", ".", "no", "?", "!"]),
        ("at 10:30;ok", ["at", "10", ":", "30", ";", "ok"]),
        ('a-b (c) "d" e/f', ["a-b", "(c)", '"d"', "e/f"]),  # other signs stay
        (" \t\n", []),
    ],
)
def test_words(text: str, expected: list[str]) -> None:
    assert split_words(text) == expected


@pytest.mark.parametrize(
    ("scores", "texts", "expected"),
    [
        ([5.0], ["x"], 0),
        ([1.0, 2.0], ["x", "gold"], 0),
        ([2.0, 1.0], ["x", "gold"], 1),
        ([1.0, 1.0], ["x", "gold"], 1),  # a tie keeps the order of the candidates
        ([1.0, 1.0, 2.0, 1.0], ["x", "y", "z", "gold"], 3),
        ([1.0, 1.0 + 1e-9], ["x", "gold"], 0),  # nearly the same is not the same
        ([1.0, 1.0], ["The GOLD !", "gold."], 0),  # either is the gold reply
        ([1.0, 1.0, 1.0], ["Gold.", "x", "gold"], 0),
        ([1.0, 1.0, 1.0], ["x", "Gold.", "gold"], 1),
        ([3.0, 2.0, 1.0], ["Gold.", "x", "gold"], 0),  # ParlAI matches by text: the first hit is the gold reply
        ([3.0, 4.0, 1.0], ["Gold.", "x", "gold"], 1),
        ([0.0, 0.0, 3.0], ["Gold", "golden", "gold"], 0),
        ([-1.0, -2.0, -3.0], ["", "x", "the"], 0),  # nothing is left of the gold reply, nor of the first
        (list(range(20)), [*map(str, range(20))], 0),
        ([*range(19), 9], [*map(str, range(20))], 10),  # 9 to 18 are no worse
        ([*range(99, -1, -1)], [*map(str, range(100))], 99),
    ],
)
def test_rank(scores: list[float], texts: list[str], expected: int) -> None:
    assert gold_rank(np.array(scores, float), texts, texts[-1:]) == expected


@pytest.mark.parametrize(
    ("scores", "expected"),
    [([3, 2, 1, 0], 1), ([2, 3, 1, 0], 0), ([3, 1, 2, 0], 1), ([3, 0, 1, 2], 1), ([3, 1, 0, 0], 1), ([2, 0, 2, 1], 1)],
)
def test_any_right_reply_at_the_first_place_is_a_hit(scores: list[int], expected: int) -> None:
    right = ["gold", "Hey!", "hello there"]
    assert gold_rank(np.array(scores, float), ["no", "hey", "hello there", "gold"], right) == expected


class Letters:
    """A stand-in for a tokenizer whose tokens are letters; inside a reply they are other tokens.

    Words merged as they stand begin with their last letter.
    """

    def encode(self, words: list[str]) -> list[list[int]]:
        return [[ord(letter) for letter in word] for word in words]

    def encode_inside(self, words: list[str]) -> list[list[int]]:
        return [[ord(letter) + 128 for letter in word] for word in words]

    def first_bare_token(self, word: str) -> int:
        return ord(word[-1])


def test_dictionary_and_its_distribution(dialog_model, load, splits_of) -> None:
    """Counts and probabilities by hand.

    The dictionary: your 1, persona 1, : 2, a 1, cat 4, car 2, cup 1, ? 1, __silence__ 1 and four special entries with
    0. "dog" and "bird" are distractors, "cow" is a reply to validate on; the persona counts once for its dialog, every
    turn once.
    """
    train = dialog(["a cat"], (["Cat: car"], ["dog", "car"]), (["Cat: car", "car", "cup?"], ["dog", "CAT cat"]))
    data = {"train": [train], "valid": [dialog([], ([], ["bird", "cat cow"]))]}
    words = WordModel(splits_of(data, load(dialog_model("gpt2"))[1]), Letters())
    counted = ["your", "persona", ":", "a", "cat", "car", "cup", "?", "__silence__"]
    assert sorted(words.words) == sorted([*counted, *SPECIAL])
    (spelling,) = words.spelled.values()
    assert [(p.offset, words.words[p.word], p.inside) for p in spelling.positions] == [(0, "cat", 0)]
    odds = dict.fromkeys("yp:a?_", 1.0) | {"c": 4.0, "z": 50.0}  # no word begins with z: it has no part in the 10
    shares = {"cat": 0.4 * 9 / 22, "car": 0.4 * 7 / 22, "cup": 0.4 * 6 / 22, "__unk__": 0.1 * 5 / 26, ":": 0.1}
    odds_of_last = {"r": 3.0, "a": 1.0, ":": 1.0, "t": 2.0, "p": 1.0, "?": 1.0, "_": 1.0, "z": 50.0}
    billions = 4_000_000_006 + 5 * 4
    original = {"your": 0.3 * 6 / 13, "car": 0.3 * 7 / 13, "cat": 0.2, "__silence__": 0.1 * 6 / (billions + 6)}
    tables = [("word_nll", inside, odds, shares) for inside in (0, 1)]
    tables += [("original_word_nll", inside, odds_of_last, original) for inside in (0, 1)]
    for name, inside, odds, expected in tables:
        logits = torch.full((256,), 3.0)  # nor have these
        for letter, odd in odds.items():
            logits[ord(letter) + 128 * (inside and name == "word_nll")] = math.log(odd)

        def probability(word: str, logits=logits, table=words.tables[name][inside]) -> float:
            return table.log_probabilities(logits[None], torch.tensor([words.words.index(word)])).exp().item()

        assert {word: probability(word) for word in expected} == pytest.approx(expected)
        assert sum(map(probability, words.words)) == pytest.approx(1)


def test_what_a_person_would_notice(dialog_model, load, splits_of) -> None:
    history = ["what do you like", "i like tea", "Where do you live?"]
    persona = ["i like green tea.", "my dog is old."]
    golds = ["i like tea", "paris", "to where we go", "!"]
    split = splits_of(
        {"train": [], "valid": [dialog(persona, *(([*history], ["no", gold]) for gold in golds))]},
        load(dialog_model("gpt2"))[1],
    )["valid"]
    replies = ["I like GREEN tea!", "where do you live ?", "so, where do you go", ""]
    columns = reply_columns(replies, split)
    expected = {
        "f1": [6 / 7, 0, 4 / 9, 0],
        "mean_length": [4, 4, 5, 0],
        "questions": [0, 1, 0, 0],
        "repeats_utterance": [0, 1, 0, 0],
        "repeats_history_3gram": [0, 1, 1, 0],
        "repeats_persona": [1, 0, 0, 0],
    }
    assert columns.keys() == expected.keys()
    assert np.stack(list(columns.values())) == pytest.approx(np.array([expected[name] for name in columns]))
    assert {name: figure.value for name, figure in figures_of(columns).items()} == pytest.approx(
        {name: sum(column) / 4 for name, column in expected.items()}
    )
    assert (distinct(replies, 1), distinct(replies, 2)) == (10 / 13, 8 / 10)


def test_standard_errors_by_hand() -> None:
    ranks = np.array([1, 2, 1, 1, 6])
    columns = {"rank": ranks, "f1": np.array([0.1, 0.5, 0.0, 0.0, 0.9])}
    columns |= {"nll": np.array([2.0, 6.0, 4.0, 0, 0]), "tokens": np.array([1, 3, 2, 0, 0])}  # 2 each: no deviation
    columns |= {"word_nll": np.array([1.0, 4.0, 0, 0, 0]), "words": np.array([1, 1, 0, 0, 0])}
    columns |= {"original_word_nll": np.zeros(5)}
    figures = figures_of(columns)
    values = {
        "hits@1": 0.6,
        "hits@5": 0.8,
        "hits@10": 1,
        "f1": 0.3,
        "token_ppl": math.exp(2),
        "word_ppl": math.exp(2.5),
    }
    errors = {name: np.std(ranks <= k, ddof=1) / math.sqrt(5) for name, k in (("hits@1", 1), ("hits@5", 5))}
    errors |= {"hits@10": 0, "f1": np.std(columns["f1"], ddof=1) / math.sqrt(5), "token_ppl": 0}
    errors["word_ppl"] = math.exp(2.5) * math.sqrt(5 / 4 * ((1.5 / 2) ** 2 + (1.5 / 2) ** 2))
    assert {name: figures[name].value for name in values} == pytest.approx(values)
    assert {name: figures[name].standard_error for name in errors} == pytest.approx(errors)
    alone = figures_of({name: column[:1] for name, column in columns.items()})
    assert math.isnan(alone["hits@1"].standard_error) and alone["token_ppl"].value == pytest.approx(math.exp(2))


def test_standard_errors_are_those_of_drawing_other_replies() -> None:
    """Of two models whose likelihoods go together, as those of one reply do: the bootstrap's spread, within a tenth."""
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 20, 400)
    hard = rng.gamma(4, 0.8, 400)
    ours, theirs = (
        {"nll": counts * (hard + rng.normal(0, 0.3, 400)), "tokens": counts, "word_nll": hard, "words": counts}
        | {"original_word_nll": hard, "rank": rng.integers(1, 3, 400)}
        for _ in range(2)
    )
    draws = [rng.integers(400, size=400) for _ in range(2000)]
    for name in ("token_ppl", "hits@1"):
        figures, others = figures_of(ours)[name], figures_of(theirs)[name]
        drawn = [[figures_of({n: c[draw] for n, c in m.items()})[name].value for draw in draws] for m in (ours, theirs)]
        assert figures.standard_error == pytest.approx(np.std(drawn[0]), rel=0.1)
        difference = figures - others
        assert difference.value == figures.value - others.value
        assert difference.standard_error == pytest.approx(np.std(np.subtract(*drawn)), rel=0.1)
    apart = figures_of(ours)["token_ppl"].standard_error + figures_of(theirs)["token_ppl"].standard_error
    assert (figures_of(ours)["token_ppl"] - figures_of(theirs)["token_ppl"]).standard_error < apart / 2


# ------------------------------------------------------------------------------------------------------------
# Against the reference
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, PADDED])
def test_every_figure_is_the_references(kind: str, dialog_model, run) -> None:
    found = run(dialog_model(kind), DATA, "--eval_type", "all", "--no_sample")
    counts = count_words(DATA)
    slow = Slow(dialog_model(kind), found.tokenizer, counts)
    rows = rows_of(slow, DATA, found.split)
    golds = [candidates[-1] for _, candidates in rows]
    word_nll, original = (
        [slow.word_nll(prefix, candidates[-1], table) for prefix, candidates in rows] for table in (False, True)
    )
    token_nll = [slow.token_nll(prefix, candidates[-1]) for prefix, candidates in rows]
    ranks = [slow.rank(*row) for row in rows]
    replies = [slow.reply(prefix) for prefix, _ in rows]

    assert found.ranks == ranks
    assert found.replies == replies
    expected = {f"hits@{k}": sum(rank < k for rank in ranks) / len(ranks) for k in (1, 5, 10)} | {
        "f1": np.mean([f1_by_hand(*pair) for pair in zip(replies, golds, strict=True)]),
        "utterances": len(rows),
        "dictionary": len(counts),
        "words": sum(map(len, word_nll)),
        "tokens": sum(map(len, token_nll)),
    }
    assert {name: found.figures[name] for name in expected} == pytest.approx(expected)
    assert found.figures["token_ppl"] == pytest.approx(perplexity(token_nll), rel=1e-4)
    assert found.figures["word_ppl"] == pytest.approx(perplexity(word_nll), rel=1e-4)
    assert found.figures["original_word_ppl"] == pytest.approx(perplexity(original), rel=1e-4)


@pytest.mark.parametrize("kind", [*KINDS, PADDED])
@pytest.mark.parametrize("rank_by", ["lm", "both"])
def test_ranking_by_likelihood(kind: str, rank_by: str, dialog_model, run, monkeypatch) -> None:
    """Of every candidate, whatever logits are computed at a time; the other figures stay as they are."""
    monkeypatch.setattr(convai_evaluation, "LOGITS", 3000)  # less than a row's
    found = run(dialog_model(kind), DATA, "--eval_type", "all", "--rank_by", rank_by)
    slow = Slow(dialog_model(kind), found.tokenizer, Counter())
    rows = rows_of(slow, DATA, found.split)
    expected = [[slow.score(prefix, text, rank_by) for text in candidates] for prefix, candidates in rows]
    for scores, of_row in zip(found.results.scores, expected, strict=True):
        assert scores[: len(of_row)] == pytest.approx(of_row, rel=1e-4)
    assert found.ranks == [slow.rank(*row, rank_by) for row in rows]
    plain = run(dialog_model(kind), DATA, "--eval_type", "all").figures
    measured = {name: value for name, value in found.figures.items() if not name.startswith("hits")}
    assert measured == pytest.approx({name: plain[name] for name in measured}, rel=1e-5)


def test_candidates_are_ranked_by_the_head_where_it_is_trained(tiny, dialog_model, run, caplog) -> None:
    caplog.set_level(logging.INFO)
    said = "this model has no trained multiple-choice head"
    assert run(dialog_model("gpt2"), DATA).rank_by == "mc" and said not in caplog.text
    assert run(tiny("gpt2"), DATA).rank_by == "lm" and f"{said}: ranking by likelihood" in caplog.text
    caplog.clear()
    assert run(tiny("gpt2"), DATA, "--rank_by", "lm").rank_by == "lm" and said not in caplog.text
    assert run(tiny("gpt2"), DATA, "--rank_by", "mc").rank_by == "mc" and f"warning: {said}" in caplog.text
    caplog.clear()
    assert run(tiny("gpt2"), DATA, "--eval_type", "ppl").ranks == [] and said not in caplog.text


def test_words_outside_the_dictionary_are_context_and_not_scored(dialog_model, run) -> None:
    found = run(dialog_model("gpt2"), DATA, "--eval_type", "ppl")
    counts = count_words(DATA)
    slow = Slow(dialog_model("gpt2"), found.tokenizer, counts)
    rows = rows_of(slow, DATA, found.split)
    words = [word for _, candidates in rows for word in parlai_words(candidates[-1])]
    unknown = [word for word in words if word not in counts]
    assert {"fine", "cats", "☃"} <= set(unknown) and "sister" not in unknown
    assert found.figures["words"] == len(words) - len(unknown)
    expected = [slow.word_nll(prefix, candidates[-1]) for prefix, candidates in rows]
    assert found.figures["word_ppl"] == pytest.approx(perplexity(expected), rel=1e-4)


@pytest.mark.parametrize("kind", ("gpt2", "llama"))
def test_a_word_inside_a_reply_begins_with_its_space(kind: str, tiny, load, run, splits_of, tmp_path: Path) -> None:
    """On a model that has learned the replies, the bare first token (the original's way) gives far too much."""
    model, tokenizer = load(tiny(kind))
    data = {"train": TRAIN, "valid": [ORDINARY]}
    instances = Instances(splits_of(data, tokenizer)["valid"], tokenizer.ids, 2, model.limit, num_candidates=1)
    batch = collate([instances[i] for i in range(len(instances))], tokenizer.ids)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(30):
        model(batch).lm_nll.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save(tmp_path)
    tokenizer.save(tmp_path)

    found = run(tmp_path, data, "--eval_type", "ppl")
    slow = Slow(tmp_path, found.tokenizer, count_words(data))
    right, wrong = (
        perplexity([slow.word_nll(prefix, texts[-1], table) for prefix, texts in rows_of(slow, data, found.split)])
        for table in (False, True)
    )
    assert found.figures["word_ppl"] == pytest.approx(right, rel=1e-4)
    assert found.figures["original_word_ppl"] == pytest.approx(wrong, rel=1e-4)
    assert right < 10 and wrong > 5 * right


def test_any_number_of_candidates(dialog_model, run) -> None:
    """1 (others are drawn), 2, 20 and 100 candidates, in one dataset and so in one batch."""
    replies = [f"i like {a} and {b} ." for a in "cats dogs fish rain music tea you".split() for b in range(15)]
    counts = (20, 1, 100, 2)
    chosen = [replies[i * n % 5 : i * n % 5 + n - 1] for i, n in enumerate(counts)]
    utterances = [([f"what {i} ?"], [*chosen[i], f"gold {i} ."]) for i in range(len(counts))]
    data = {"train": [], "valid": [dialog(["i like fish ."], *utterances)]}
    found = run(dialog_model("gpt2"), data)
    slow = Slow(dialog_model("gpt2"), found.tokenizer, Counter())
    rows = rows_of(slow, data, found.split)
    assert [len(candidates) for _, candidates in rows] == [20, 4, 100, 2]  # three other replies to draw from
    assert found.ranks == [slow.rank(*row) for row in rows]
    assert {k: found.figures[f"hits@{k}"] for k in (1, 5, 10)} == {
        k: sum(rank < k for rank in found.ranks) / 4 for k in (1, 5, 10)
    }


def test_a_gold_reply_without_rivals_is_a_hit(dialog_model, run) -> None:
    found = run(dialog_model("gpt2"), {"train": [], "valid": [dialog([], (["hi"], ["hello"]))]}, "--eval_type", "all")
    assert found.figures["hits@1"] == 1.0


def test_a_tie_in_a_model_counts_against(dialog_model, run) -> None:
    """Other signs that are one token to the model: the same row, so a tie, in whichever place of a batch it stands."""
    turns = ["hello , how are"[: 4 + i] for i in range(11)]
    utterances = [([turn], ["the snow ☂", *WRONG[:3], "the snow ☃"]) for turn in turns]
    data = {"train": [], "valid": [dialog(["i like fish ."], *utterances)]}
    ranks = {size: run(dialog_model("openai-gpt"), data, "--valid_batch_size", size).ranks for size in (1, 2, 3, 5)}
    tokenizer = run(dialog_model("openai-gpt"), data, "--limit", 1).tokenizer
    assert tokenizer.encode(["the snow ☂"]) == tokenizer.encode(["the snow ☃"])  # else there is no tie
    assert 0 not in sum(ranks.values(), [])
    assert all(found == ranks[1] for found in ranks.values())


def test_a_tie_is_one_in_coarse_arithmetic_too(dialog_model, run) -> None:
    utterances = [([turn], ["the snow ☂", "no .", "the snow ☃"]) for turn in ("hi", "hello")]
    found = run(dialog_model("openai-gpt"), {"train": [], "valid": [dialog([], *utterances)]})
    found.results.scores[:] = [[2.0, 1.0, 2.0078125], [1.0, 2.0, 0.9921875]]  # bf16 rounds to such steps
    assert gold_ranks(found.results.scores, found.split).tolist() == [1, 2]


# ------------------------------------------------------------------------------------------------------------
# What figures must not depend on
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_batch_size_and_order_change_nothing(kind: str, dialog_model, run, monkeypatch) -> None:
    def reversed_batches(*args):
        loader = batches_by_length(*args)
        loader.batch_sampler.reverse()
        return loader

    arguments = ["--eval_type", "all", "--seed", 3]
    found = {size: run(dialog_model(kind), DATA, *arguments, "--valid_batch_size", size) for size in (1, 4, 64)}
    monkeypatch.setattr(convai_evaluation, "batches_by_length", reversed_batches)
    found["reversed"] = run(dialog_model(kind), DATA, *arguments)
    for other in found.values():
        assert other.ranks == found[4].ranks
        assert other.replies == found[4].replies
        assert other.figures == pytest.approx(found[4].figures, rel=1e-4)
    assert run(dialog_model(kind), DATA, *arguments[:2], "--seed", 4).replies != found[4].replies  # they are sampled


def test_the_order_of_dialogs_changes_nothing(dialog_model, run) -> None:
    arguments = ["--eval_type", "all", "--no_sample"]
    data = {"train": TRAIN, "valid": [ORDINARY, ODD | {"utterances": ODD["utterances"][:-1]}]}  # nothing is drawn
    found = run(dialog_model("gpt2"), data, *arguments)
    turned = run(dialog_model("gpt2"), data | {"valid": data["valid"][::-1]}, *arguments)
    assert turned.ranks == found.ranks[4:] + found.ranks[:4]
    assert turned.figures == pytest.approx(found.figures, rel=1e-4)


def test_each_reply_has_its_own_generator(dialog_model, run) -> None:
    same = (["what do you do ?"], ["no", "yes"])
    replies = run(dialog_model("gpt2"), {"train": [], "valid": [dialog([], *[same] * 4)]}, "--eval_type", "f1").replies
    assert len(set(replies)) == 4


def test_limit(dialog_model, run) -> None:
    """The first so many utterances, with the dictionary of all."""
    whole, some = (run(dialog_model("gpt2"), DATA, "--eval_type", "all", "--limit", n) for n in (0, 3))
    beyond = run(dialog_model("gpt2"), DATA, "--eval_type", "all", "--limit", 1000)
    assert beyond.figures == whole.figures
    assert (some.figures["utterances"], len(some.ranks), len(some.replies)) == (3, 3, 3)
    assert (some.ranks, some.replies) == (whole.ranks[:3], whole.replies[:3])
    assert some.figures["dictionary"] == whole.figures["dictionary"]
    nll, words = whole.results.word_nll[:3].sum(), whole.results.words[:3].sum()
    assert some.figures["word_ppl"] == pytest.approx(math.exp(nll / words), rel=1e-4)


LONG = dialog(["i like fish ."], (["hello there , friend . " * 12], [WRONG[0] * 3, "yes , i do ."]))  # > 128 tokens


@pytest.mark.parametrize("extra", [[], [LONG]], ids=["short", "cut"])
def test_figures_asked_for_alone_are_those_of_all(extra: list[dict], dialog_model, run) -> None:
    data = DATA | {"valid": [*DATA["valid"], *extra]}
    whole = run(dialog_model("gpt2"), data, "--eval_type", "all").figures
    seen = set()
    for kind, name in (("hits@1", "hits@1"), ("ppl", "word_ppl"), ("f1", "f1")):
        part = run(dialog_model("gpt2"), data, "--eval_type", kind).figures
        assert part == pytest.approx({key: whole[key] for key in part}, rel=1e-4)
        assert name in part and not (seen & part.keys())
        seen |= part.keys() - {"utterances"}
    assert seen == whole.keys() - {"utterances"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("sentences", "arguments"),
    [(0, ["--max_length", 150, "--min_length", 150]), (40, [])],
    ids=["long reply", "long persona"],
)
def test_a_reply_ends_where_the_model_does(kind: str, sentences: int, arguments: list, dialog_model, run) -> None:
    """128 tokens is all that these models take, prefix and reply together."""
    data = {"train": [], "valid": [dialog(["i like fish ."] * sentences, (["hi"], ["yes", "no"])), ORDINARY]}
    found, other = (
        run(dialog_model(kind), data, "--eval_type", "f1", *arguments, "--valid_batch_size", size) for size in (1, 64)
    )
    sentence, message = map(len, found.tokenizer.encode(["i like fish .", "hi"]))
    # The persona keeps whole sentences, and leaves room for the message, a reply of 20 tokens, <eos> and the like.
    persona = min(sentences, (128 - 20 - message - 4) // sentence) * sentence
    assert 0 < (found.results.replies[0] > 0).sum() <= 128 - 3 - message - persona
    assert found.replies == other.replies


# ------------------------------------------------------------------------------------------------------------
# The command and its report
# ------------------------------------------------------------------------------------------------------------


def final_lines(figures: dict[str, float]) -> list[str]:
    lines = {
        "hits@1": ("FINAL Hits@1: {:.3f}", r"FINAL Hits@1: [01]\.\d{3}"),
        "original_word_ppl": ("FINAL PPL: {:.1f}", r"FINAL PPL: \d+\.\d"),
        "f1": ("FINAL F1: {:.3f}", r"FINAL F1: [01]\.\d{3}"),
    }
    found = [(line.format(figures[key]), pattern) for key, (line, pattern) in lines.items() if key in figures]
    assert all(re.fullmatch(pattern, line) for line, pattern in found)
    return [line for line, _ in found]


@pytest.mark.parametrize(
    ("arguments", "finals"),
    [([], 1), (["--eval_type", "ppl"], 1), (["--eval_type", "f1"], 1), (["--eval_type", "all"], 3)],
    ids=["default", "ppl", "f1", "all"],
)
def test_final_lines(arguments: list[str], finals: int, dialog_model, command, caplog, tmp_path: Path) -> None:
    """They end the output; Hits@1, the default, is its last line."""
    (tmp_path / "data.json").write_text(json.dumps(DATA))
    output = tmp_path / "report.json"
    base = ["--model_checkpoint", dialog_model("gpt2"), "--dataset_path", tmp_path / "data.json", "--output", output]
    caplog.set_level(logging.INFO, "improvedflend")
    written = command(*base, *arguments)
    expected = final_lines(json.loads(output.read_text())["figures"])
    assert len(expected) == finals
    assert [line for line in written.out.splitlines() if "FINAL" in line] == expected
    assert written.out.splitlines()[-finals:] == expected
    assert "8 of 8" in caplog.text  # how far it was


def test_table_names_the_published_figures(dialog_model, command, tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps(DATA))
    arguments = ["--model", dialog_model("gpt2"), "--dataset_path", tmp_path / "data.json", "--eval_type", "all"]
    table = command(*arguments, "--limit", 8).out
    assert f"Evaluated: all 8 replies of {tmp_path / 'data.json'}, its split 'valid'." in table
    published = ("80.7", "16.28", "19.5", "> 79", "20.5", "16.5", "71.5")
    assert [figure for figure in published if figure not in table] == []
    assert all(re.search(f"(?i)ppl per {unit}", table) for unit in ("word", "token"))


def test_report_and_predictions(dialog_model, command, tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps(DATA))
    output, predictions = tmp_path / "report.json", tmp_path / "predictions.jsonl"
    weights = dialog_model("gpt2") / "model.safetensors"
    command(
        *("--model", dialog_model("gpt2"), "--dataset_path", tmp_path / "data.json", "--eval_type", "all"),
        *("--output", output, "--predictions", predictions, "--limit", 7, "--top_k", 7, "--seed", 5),
    )
    report = json.loads(output.read_text())
    figures = report["figures"]
    noticed = {"mean_length", "distinct_1", "distinct_2", "questions"}
    noticed |= {"repeats_utterance", "repeats_history_3gram", "repeats_persona"}
    counts = {"utterances", "words", "tokens", "dictionary"}
    measured = {"hits@1", "hits@5", "hits@10", "word_ppl", "original_word_ppl", "token_ppl", "f1"}
    assert figures.keys() == measured | noticed | counts
    assert figures["utterances"] == 7
    columns = {name: np.array(column) for name, column in report["utterances"].items()}
    assert {len(column) for column in columns.values()} == {7}
    of_columns = figures_of(columns)
    assert {name: figures[name] for name in of_columns} == pytest.approx({n: f.value for n, f in of_columns.items()})
    assert report["standard_errors"] == pytest.approx({n: f.standard_error for n, f in of_columns.items()}, rel=1e-4)
    assert max(map(len, output.read_text().splitlines())) > 8 * 5  # a column has one line
    expected = {"limit": 7, "top_k": 7, "seed": 5, "eval_type": "all", "model": str(dialog_model("gpt2"))}
    assert report["settings"] == report["settings"] | expected
    assert report["versions"]["torch"] == torch.__version__ and "transformers" in report["versions"]
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "data.json", weights)]
    assert report["model"] == {"name": str(dialog_model("gpt2")), "digest": digests[1]}
    about = {"dataset": str(tmp_path / "data.json"), "split": "valid", "replies": 7, "of": 8}
    assert report["evaluated"] == about | {"digest": [digests[0], ""]}

    lines = [json.loads(line) for line in predictions.read_text().splitlines()]
    given = [(each, turn) for each in DATA["valid"] for turn in each["utterances"]][:7]
    assert len(lines) == len(given)
    for line, (each, turn) in zip(lines, given, strict=True):
        assert (line["persona"], line["history"]) == (each["personality"], turn["history"])
        assert (line["candidates"], line["gold"]) == (turn["candidates"], turn["candidates"][-1])
        assert line["rank"] == 1 + gold_rank(np.array(line["scores"]), line["candidates"], [line["gold"]])
        assert math.isfinite(sum(line["scores"])) and len(line["scores"]) == len(line["candidates"])
    assert figures["hits@1"] == pytest.approx(np.mean([line["rank"] == 1 for line in lines]))
    assert figures["f1"] == pytest.approx(np.mean([f1_by_hand(line["reply"], line["gold"]) for line in lines]))


def test_two_models_are_compared_reply_by_reply(dialog_model, command, tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps(DATA))
    base = ["--dataset_path", tmp_path / "data.json", "--eval_type", "all", "--limit", 6]
    other = tmp_path / "other.json"
    command("--model", dialog_model("gpt2"), *base, "--output", other)
    reports = {"gpt2": json.loads(other.read_text())}
    for kind in ("gpt2", "llama"):
        output = tmp_path / f"{kind}.json"
        written = command("--model", dialog_model(kind), *base, "--output", output, "--compare", other)
        reports[kind] = json.loads(output.read_text())
        assert f"Against {other}" in written.out
        rows = re.findall(
            r"^(F1|Hits@1|PPL per token) +(\S+)(?: %)? +(\S+)(?: %)? +([+-]\S+) ± (\S+)", written.out, re.M
        )
        assert [row[0] for row in rows] == ["Hits@1", "PPL per token", "F1"]
        for (_, *cells), name, scale in zip(rows, ("hits@1", "token_ppl", "f1"), (100, 1, 100), strict=True):
            ours, theirs, difference, error = map(float, cells)
            expected = [scale * reports[k]["figures"][name] for k in (kind, "gpt2")]
            assert [ours, theirs, difference] == pytest.approx([*expected, expected[0] - expected[1]], abs=0.06)
            assert error == 0 if kind == "gpt2" else error > 0 or name != "token_ppl"  # no model has a hit


def test_a_report_that_cannot_be_compared(dialog_model, command, tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps(DATA))
    (tmp_path / "other.json").write_text(json.dumps(DATA | {"train": []}))
    base = ["--model", dialog_model("gpt2"), "--eval_type", "f1", "--max_length", 2]
    report = tmp_path / "report.json"
    command(*base, "--dataset_path", tmp_path / "data.json", "--output", report)
    for arguments, line in {
        ("data.json", 4, report): "8 replies of the same dataset; expected the 4 that are evaluated now",
        ("other.json", 0, report): "8 replies of another dataset; expected the 8 that are evaluated now",
        ("data.json", 0, tmp_path / "data.json"): "missing required field `evaluated`; expected a report",
        ("data.json", 0, tmp_path / "none.json"): "No such file or directory.*; expected a report",
    }.items():
        name, limit, other = arguments
        with pytest.raises(UserError, match=f"^--compare {other}: .*{line}"):
            command(*base, "--dataset_path", tmp_path / name, "--limit", limit, "--compare", other)


def parlai_text(dialogs: list[dict]) -> str:
    lines = []
    for each in dialogs:
        texts = [f"your persona: {line}" for line in each["personality"]]
        for turn in each["utterances"]:
            cells = [turn["history"][-1], turn["candidates"][-1]]
            texts.append("\t".join(cells + (["", "|".join(turn["candidates"])] if turn["candidates"][1:] else [])))
        lines += [f"{i} {text}" for i, text in enumerate(texts, 1)]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("bare", [False, True], ids=["candidates", "no candidates"])
@pytest.mark.parametrize("train", [TRAIN, []], ids=["training data", "validation data alone"])
def test_parlai_text_is_as_good_as_json(bare: bool, train: list[dict], dialog_model, command, tmp_path: Path) -> None:
    """Validation data alone counts once in the dictionary, as JSON with an empty training split does."""
    first, last = (1, 3), (5, 7)
    valid = [
        dialog(persona, *((SAID[:i], [SAID[i]] if bare else [*WRONG, SAID[i]]) for i in turns))
        for persona, turns in ((ORDINARY["personality"], first), (["i love fish ."], last))
    ]
    for each in valid:  # ParlAI's history begins with the dialog
        start = len(each["utterances"][0]["history"]) - 1
        for turn in each["utterances"]:
            turn["history"] = turn["history"][start:]
    files = {name: tmp_path / name for name in ("data.json", "train.json", "valid.txt")}
    files["data.json"].write_text(json.dumps({"train": train, "valid": valid}))
    files["train.json"].write_text(json.dumps(train))
    files["valid.txt"].write_text(parlai_text(valid))
    as_text = ["--valid_path", files["valid.txt"], *(["--dataset_path", files["train.json"]] if train else [])]
    found = {}
    for name, source in (("json", ["--dataset_path", files["data.json"]]), ("text", as_text)):
        output, predictions = tmp_path / f"{name}.report", tmp_path / f"{name}.jsonl"
        base = ["--model", dialog_model("gpt2"), "--eval_type", "all", "--output", output]
        command(*base, *source, "--predictions", predictions)
        lines = [json.loads(line) for line in predictions.read_text().splitlines()]
        keys = ("persona", "history", "gold", "reply", "rank")
        found[name] = [[line[key] for key in keys] for line in lines], json.loads(output.read_text())["figures"]
        candidates = [line["candidates"] for line in lines]
        assert all(len(texts) == len(set(texts)) == (4 if bare else 5) for texts in candidates)
    assert found["text"][0] == found["json"][0]
    assert found["text"][1] == pytest.approx(found["json"][1], rel=1e-6)


def test_other_right_labels_of_parlai_count(dialog_model, load, tmp_path: Path, command, monkeypatch) -> None:
    """`a|b`: the first is learned and predicted; each is ranked, and F1 is that of the nearest (as in ParlAI)."""
    data, predictions, report = tmp_path / "data.txt", tmp_path / "lines.jsonl", tmp_path / "report.json"
    data.write_text("1 hi\ti like tea|green tea\t\tno|i like tea|green tea\n2 so ?\tyes\t\tno|yes\n")
    replies = {"hi": "Green tea!", "so ?": "green tea"}
    model, tokenizer = load(dialog_model("gpt2"))

    def generate_all(model, instances, decoding, seed, batch_size, results) -> None:
        for row, text in enumerate(replies.values()):
            tokens = np.array(tokenizer.encode([text])[0])
            results.replies[row, : len(tokens)] = tokens + 1

    def score(model, instances, words, rank_by, batch_size, results) -> None:
        assert [len(instances[row].candidates) for row in range(2)] == [3, 2]
        results.scores[:] = [[1, 2, 0], [1, 0, 0]]  # no, green tea, i like tea; no, yes
        results.tokens[:] = results.words[:] = 1

    monkeypatch.setattr(convai_evaluation, "generate_all", generate_all)
    monkeypatch.setattr(convai_evaluation, "score", score)
    base = ["--model", dialog_model("gpt2"), "--dataset_path", data, "--eval_type", "all"]
    command(*base, "--output", report, "--predictions", predictions)
    figures = json.loads(report.read_text())["figures"]
    assert (figures["hits@1"], figures["f1"]) == (0.5, 0.5)
    first, second = [json.loads(line) for line in predictions.read_text().splitlines()]
    assert (first["gold"], first["alternatives"], first["rank"]) == ("i like tea", ["green tea"], 1)
    assert first["candidates"] == ["no", "green tea", "i like tea"] and "alternatives" not in second


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}{{ bos_token }}" + CHATML


@pytest.fixture
def instruct_model(make_model, tmp_path: Path):
    """`instruct_model(template)` is the folder of a tiny Llama with a chat template, as it was downloaded."""

    def make(template: str) -> Path:
        folder = make_model(tmp_path / "instruct", "llama", vocab_size=320)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        model.save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize("template", [CHATML, NO_SYSTEM], ids=["system message", "no system message"])
def test_an_instruct_model_as_it_is(template: str, instruct_model, command, tmp_path: Path) -> None:
    """Perplexity and ranks are those of plain transformers on the text that its template gives."""
    folder, report, lines = instruct_model(template), tmp_path / "report.json", tmp_path / "lines.jsonl"
    (tmp_path / "words.txt").write_text("You are:\n{persona}")
    valid = [dialog(["i bake .", "i sail ."], (["hi", "yes ?", "so <|im_end|>"], ["no", "i bake bread ."]))]
    (tmp_path / "data.json").write_text(json.dumps({"train": TRAIN, "valid": valid}))
    base = ["--model", folder, "--dataset_path", tmp_path / "data.json", "--eval_type", "all", "--prompt", "chat"]
    base += ["--instructions", tmp_path / "words.txt", "--no_sample", "--max_length", 5]
    written = command(*base, "--output", report, "--predictions", lines)
    assert "You are:\n{persona}" in written.out and "not fine-tuned" not in written.err

    said = [("user", "hi"), ("assistant", "yes ?"), ("user", "so <\u2060|im_end|>")]
    persona = "You are:\ni bake .\ni sail ."
    if template == CHATML:
        said = [("system", persona), *said]
    else:
        said[0] = ("user", f"{persona}\n\nhi")
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in said)
    tokenizer, plain = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    prefix = tokenizer(text + "<|im_start|>assistant\n")["input_ids"]
    scores = []
    for reply in ("no", "i bake bread ."):
        ids = tokenizer(reply + "<|im_end|>")["input_ids"]
        with torch.no_grad():
            logits = plain(torch.tensor([prefix + ids])).logits[0, len(prefix) - 1 : -1]
        scores.append(logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).mean().item())
    found, line = json.loads(report.read_text()), json.loads(lines.read_text())
    assert line["scores"] == pytest.approx(scores, abs=1e-4)
    assert found["figures"]["token_ppl"] == pytest.approx(math.exp(-scores[1]), rel=1e-4)
    options = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 1, "pad_token_id": 0}
    ends = [tokenizer.eos_token_id, *tokenizer("<|im_end|>")["input_ids"]]
    out = plain.generate(torch.tensor([prefix]), eos_token_id=ends, **options)[0, len(prefix) :]
    assert line["reply"].split() == tokenizer.decode(out, skip_special_tokens=True).split()
    assert found["instructions"] == "You are:\n{persona}" and found["settings"]["rank_by"] == "lm"


@pytest.mark.parametrize(
    ("kind", "arguments", "said"),
    [
        ("gpt2", ["--prompt", "chat"], "has no chat template"),
        ("gpt2", ["--instructions", "words.txt"], "--instructions is for --prompt chat"),
        ("gpt2", ["--prompt", "chat", "--instructions", "none.txt"], "cannot read --instructions none.txt"),
        ("gpt2", ["--prompt", "chat", "--instructions", "LICENCE"], "holds no {persona}"),
    ],
)
def test_what_cannot_be_a_prompt(kind, arguments, said, dialog_model, command) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        command("--model", dialog_model(kind), "--dataset_path", "data/sample.json", *arguments)


def test_bf16_gives_nearly_the_same(dialog_model, command, tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps(DATA))
    found = []
    for extra in ([], ["--bf16"]):
        base = ["--model", dialog_model("llama"), "--dataset_path", tmp_path / "data.json", "--eval_type", "ppl"]
        command(*base, "--output", tmp_path / "report.json", *extra)
        found.append(json.loads((tmp_path / "report.json").read_text())["figures"])
    assert found[1] == pytest.approx(found[0], rel=0.05)
    assert found[1]["token_ppl"] != found[0]["token_ppl"]


def test_two_processes_split_the_work_and_give_the_same_figures(dialog_model, command, tmp_path: Path) -> None:
    """Three batches to score, so that one process has more, and one to generate, so that the other has none."""
    (tmp_path / "data.json").write_text(json.dumps(DATA))
    arguments = ["--model", dialog_model("gpt2"), "--dataset_path", tmp_path / "data.json", "--eval_type", "all"]
    arguments += ["--valid_batch_size", "4", "--dataset_cache", tmp_path / "cache.bin", "--device", "cpu"]
    command(*arguments, "--output", tmp_path / "one.json")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = run_python(*launcher, "convai_evaluation.py", *arguments, "--output", tmp_path / "two.json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("FINAL") == 3  # one process reports
    one, two = (json.loads((tmp_path / f"{name}.json").read_text())["figures"] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-6)
