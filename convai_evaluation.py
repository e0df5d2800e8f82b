"""Evaluate a model as the ConvAI2 competition did: Hits@1, word perplexity and F1, without ParlAI."""

import json
import math
import platform
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import NamedTuple

import ignite.distributed as idist
import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from tqdm import tqdm

from cli import DatasetSettings, Decoding, Parser, UserError, join_processes, log, option, run_script
from dialogs import Dialogs
from files import find_finetuned_model, typed_path
from inputs import Instances, batches_by_length
from utils import DialogTokenizer, Split, load_dataset, load_tokenizer

# Published figures, for context: (Hits@1 in %, word PPL, F1 in %).
ANCHORS = {
    "TransferTransfo, hidden test set (competition leaderboard)": ("80.7", "16.28", "19.5"),
    "original README, validation set": ("> 79", "20.5", "16.5"),
    "published checkpoint, validation set": ("71.5", "-", "-"),
}
TIE = 1e-5  # scores this close are equal: what differs is rounding, which depends on a candidate's place in its row
GENERATION_BATCH = 8  # a generated row has one continuation where a scored one has twenty: it takes more of them


@dataclass(frozen=True)
class EvaluationSettings(DatasetSettings):
    """Options of convai_evaluation.py."""

    eval_type: str = option("hits@1", "what to measure", choices=("hits@1", "ppl", "f1", "all"))
    valid_batch_size: int = option(4, "utterances per forward pass", low=1)
    limit: int = option(0, "evaluate the first so many replies (0: all)", low=0)
    output: str = option("", "write every figure, with settings and versions, to this JSON file")
    predictions: str = option("", "JSON lines file for replies, ranks and scores")


def parse_settings() -> tuple[EvaluationSettings, Decoding]:
    args = Parser(__doc__, EvaluationSettings, Decoding).parse_args()
    return EvaluationSettings.from_args(args), Decoding.from_args(args)


# ------------------------------------------------------------------------------------------------------------
# Text metrics, as ParlAI defined them
# ------------------------------------------------------------------------------------------------------------

PUNCTUATION = re.compile(r"[!\"#$%&()*+,\-./:;<=>?@\[\]\\^`{|}~_']")
ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalize(text: str) -> str:
    """Lower case, punctuation to spaces, articles removed, white space folded."""
    return " ".join(ARTICLES.sub(" ", PUNCTUATION.sub(" ", text.lower())).split())


def f1(reply: str, gold: str) -> float:
    """Harmonic mean of precision and recall of the normalised words, as bags."""
    found, expected = normalize(reply).split(), normalize(gold).split()
    common = sum((Counter(found) & Counter(expected)).values())
    return 2 * common / (len(found) + len(expected)) if common else 0.0


def split_words(text: str) -> list[str]:
    """ParlAI's `split` tokenizer, lower-cased: white space, after putting spaces around . , ; : ! ?"""
    return re.sub(r"([.,;:!?])", r" \1 ", text.lower()).split()


# ------------------------------------------------------------------------------------------------------------
# Word perplexity
# ------------------------------------------------------------------------------------------------------------


class WordPosition(NamedTuple):
    offset: int  # of its first token among the reply's
    word: int
    inside: int  # 1 behind another word, 0 at the reply's start


class Spelling(NamedTuple):
    tokens: list[int]
    positions: list[WordPosition]


class WordModel:
    """A distribution over dictionary words from one over tokens.

    A word's probability is that of its first token, times its share, by frequency + 5, among the words that begin
    with this token; normalised over the dictionary. A word's first token is another one at the start of a reply
    than behind a word, where in byte-level vocabularies it carries the space.
    """

    SMOOTHING = 5
    PARLAI_SPECIAL = ("__null__", "__start__", "__end__", "__unk__")

    def __init__(self, splits: dict[str, Split], tokenizer: DialogTokenizer):
        frequencies = Counter(dict.fromkeys(self.PARLAI_SPECIAL, 0))
        for text in dictionary_texts(splits.values()):
            frequencies.update(split_words(text))
        self.words = list(frequencies)
        self.number = {word: i for i, word in enumerate(self.words)}
        smoothed = np.array([frequencies[word] for word in self.words]) + float(self.SMOOTHING)
        self.encoders = tokenizer.encode, tokenizer.encode_inside  # of words at a reply's start, and behind a word
        self.spellings = [encode(self.words) for encode in self.encoders]
        self.first, self.log_share, self.first_tokens = [], [], []
        for spelling in self.spellings:
            first = np.array([ids[0] if ids else -1 for ids in spelling])
            totals = np.bincount(first[first >= 0], smoothed[first >= 0])
            share = np.where(first >= 0, smoothed / totals[first], 0)  # a word without tokens cannot be said
            self.first.append(torch.as_tensor(first))
            self.log_share.append(torch.as_tensor(share).log())
            self.first_tokens.append(torch.as_tensor(np.unique(first[first >= 0])))
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

    def log_probabilities(self, logits: torch.Tensor, words: torch.Tensor, inside: int) -> torch.Tensor:
        """Of each row's word (K,), from the logits (K, V) at the position before it; float64, on the CPU."""
        first_tokens = self.first_tokens[inside].to(logits.device)
        first = self.first[inside][words].to(logits.device)
        total = logits[:, first_tokens].cpu().double().logsumexp(-1)
        return logits.gather(1, first[:, None])[:, 0].cpu().double() - total + self.log_share[inside][words]


def dictionary_texts(splits: Iterable[Split]) -> Iterator[str]:
    """What ParlAI built its dictionary from: personas, the other person's utterances and gold replies."""
    for split in splits:
        for sentence in split.persona.values:
            yield f"your persona: {split.text(sentence)}"
        for utterance in range(len(split)):
            for string in split.history[utterance][-1:]:
                yield split.text(string)
            yield split.gold_text(utterance)


# ------------------------------------------------------------------------------------------------------------
# Passes over the split. Each rank fills the rows of its utterances; a sum over ranks completes them.
# ------------------------------------------------------------------------------------------------------------


@dataclass
class Results:
    """What was measured of each of U utterances; zero where another rank measured it."""

    scores: np.ndarray  # (U, N) multiple-choice scores
    nll: np.ndarray  # (U,) of the gold reply's tokens and <eos>, summed
    tokens: np.ndarray  # (U,)
    word_nll: np.ndarray  # (U,) of the gold reply's words, summed
    words: np.ndarray  # (U,)
    replies: np.ndarray  # (U, max_length) generated tokens + 1; 0 behind a reply's end

    @classmethod
    def empty(cls, utterances: int, candidates: int, max_length: int) -> "Results":
        columns = [np.zeros(utterances) for _ in range(4)]
        return cls(np.zeros((utterances, candidates)), *columns, np.zeros((utterances, max_length), np.int64))


def join_ranks(results: Results, device: torch.device) -> Results:
    """The sum over ranks: every row was filled by one of them."""
    if dist.is_initialized():
        for column in vars(results).values():
            whole = torch.as_tensor(column).to(device)
            dist.all_reduce(whole)
            column[:] = whole.cpu().numpy()
    return results


@torch.inference_mode()
def score(model, instances: Instances, words: WordModel | None, batch_size: int, results: Results) -> None:
    """Multiple-choice scores and likelihoods of tokens and words; each prefix is encoded once for all of them."""
    loader = rank_loader(instances, batch_size, len(results.nll))
    with progress("score", loader) as bar:
        for rows, batch in zip(loader.batch_sampler, loader, strict=True):
            batch = batch.to(model.device)
            hidden = model.hidden(batch)
            output = model.heads(hidden, batch)
            results.scores[rows, : output.mc_logits.shape[1]] = output.mc_logits.cpu()
            owner = (batch.lm_positions // batch.input_ids.shape[1]).cpu()  # the row of each labelled token
            results.nll[rows] = np.bincount(owner, output.lm_nll.cpu().double(), len(rows))
            results.tokens[rows] = np.bincount(owner, minlength=len(rows))
            if words:
                golds = [instances.split.candidates[row][-1] for row in rows]
                score_words(model, hidden, batch, rows, [words.spelled[gold] for gold in golds], words, results)
            bar.update(len(rows))


def score_words(model, hidden, batch, rows: list[int], spelled: list[Spelling], words: WordModel, results) -> None:
    """Word likelihoods of a batch whose instances have their gold reply's words as `extra`."""
    room = (batch.segments == batch.n_candidates[:, None] + 1).sum(1).tolist()  # a long reply may have been cut
    starts = batch.extra_starts.tolist()
    before = batch.prefix_ends().tolist()  # the position that predicts a reply's first token
    for inside in (0, 1):
        found = [
            (starts[row] + position.offset - 1 if position.offset else before[row], rows[row], position.word)
            for row, spelling in enumerate(spelled)
            for position in spelling.positions
            if position.inside == inside and position.offset < room[row]
        ]
        if found:
            at, owners, numbers = map(torch.tensor, zip(*found, strict=True))
            logits = model.lm_logits(hidden.flatten(0, 1)[at.to(hidden.device)]).float()
            np.add.at(results.word_nll, owners.numpy(), -words.log_probabilities(logits, numbers, inside).numpy())
            np.add.at(results.words, owners.numpy(), 1)


def generate_all(model, instances: Instances, decoding: Decoding, seed: int, batch_size: int, results: Results) -> None:
    """A reply to every utterance, in batches of prefixes of like length."""
    from generation import generate_replies

    longest = min(decoding.max_length, model.limit // 2)
    loader = rank_loader(instances, GENERATION_BATCH * batch_size, len(results.nll))
    with progress("generate", loader) as bar:
        for batch in loader.batch_sampler:
            prefixes = {row: instances.prefix(row, longest) for row in batch}
            # A persona may leave less room than `longest`. A reply's room must not depend on its batch's other rows.
            for room in {room for _, room in prefixes.values()}:
                rows = [row for row in batch if prefixes[row][1] == room]
                generators = [reply_generator(seed, row) for row in rows]
                of_rows, options = [prefixes[row][0] for row in rows], replace(decoding, max_length=room)
                for row, reply in zip(rows, generate_replies(model, of_rows, options, generators), strict=True):
                    results.replies[row, : len(reply)] = np.array(reply, np.int64) + 1
            bar.update(len(batch))


def reply_generator(seed: int, utterance: int) -> torch.Generator:
    """A reply's own: it does not depend on the batch, the order or the number of processes."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, utterance]).generate_state(1)[0]))


def rank_loader(instances: Instances, batch_size: int, size: int) -> DataLoader:
    """This process's batches of the first `size` utterances."""
    return batches_by_length(instances, batch_size, size, idist.get_rank(), idist.get_world_size())


def progress(name: str, loader: DataLoader) -> tqdm:
    total = sum(map(len, loader.batch_sampler))
    return tqdm(total=total, desc=name, unit=" replies", disable=idist.get_rank() > 0)


# ------------------------------------------------------------------------------------------------------------
# Figures from results
# ------------------------------------------------------------------------------------------------------------


def gold_rank(scores: np.ndarray, texts: list[str]) -> int:
    """The gold reply's rank, 0 the best, among candidates whose last is gold.

    Ties count against it, but not candidates with the gold reply's normalised text: ParlAI matches by text.
    """
    texts = [normalize(text) for text in texts]
    gold = np.array([text == texts[-1] for text in texts])
    return int((scores[~gold] >= scores[gold].max() - TIE).sum())


def ranking_figures(results: Results, split: Split) -> tuple[dict[str, float], list[int]]:
    """Hits@k, and each gold reply's rank; `results.scores` are evened out where candidates have the same tokens."""
    ranks = []
    for utterance, scores in enumerate(results.scores):
        same: dict[tuple, int] = {}  # the scores of equal tokens differ by rounding alone, which is coarse in bf16
        for n, candidate in enumerate(split.candidates[utterance]):
            scores[n] = scores[same.setdefault(tuple(split.ids(candidate)), n)]
        texts = split.candidate_texts(utterance)
        ranks.append(gold_rank(scores[: len(texts)], texts))
    return {f"hits@{k}": float(np.mean(np.array(ranks) < k)) for k in (1, 5, 10)}, ranks


def perplexity_figures(results: Results) -> dict[str, float]:
    """Word and token perplexity: exp of the summed negative log-likelihood over the count."""
    words, tokens = results.words.sum(), results.tokens.sum()
    return {
        "word_ppl": math.exp(min(results.word_nll.sum() / words, 700)) if words else float("nan"),
        "token_ppl": math.exp(min(results.nll.sum() / tokens, 700)),
        "words": int(words),
        "tokens": int(tokens),
    }


def reply_figures(replies: list[str], split: Split) -> dict[str, float]:
    """F1, and what a person would notice of the replies."""
    words = [normalize(reply).split() for reply in replies]
    grams = {n: [gram for reply in words for gram in ngrams(reply, n)] for n in (1, 2)}
    repeats = {"repeats_utterance": 0, "repeats_history_3gram": 0, "repeats_persona": 0}
    for utterance, reply in enumerate(words):
        history = [normalize(text).split() for text in split.history_texts(utterance)]
        said = {gram for text in history for gram in ngrams(text, 3)}
        persona = [normalize(text).split() for text in split.persona_texts(utterance)]
        repeats["repeats_utterance"] += bool(reply) and reply in history
        repeats["repeats_history_3gram"] += not said.isdisjoint(ngrams(reply, 3))
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


# ------------------------------------------------------------------------------------------------------------
# The report
# ------------------------------------------------------------------------------------------------------------

NAMES = {
    "hits@1": "Hits@1",
    "hits@5": "Hits@5",
    "hits@10": "Hits@10",
    "word_ppl": "PPL per word (the competition's)",
    "token_ppl": "PPL per token (the trainer's)",
    "f1": "F1",
    "mean_length": "words per reply",
    "distinct_1": "distinct words",
    "distinct_2": "distinct word pairs",
    "questions": "questions",
    "repeats_utterance": "repeat an utterance",
    "repeats_history_3gram": "repeat a 3-gram of the history",
    "repeats_persona": "repeat a persona sentence",
}


def print_table(figures: dict[str, float]) -> None:
    """This model's figures beside the published ones."""
    width = max(map(len, NAMES.values()))
    columns = {"hits@1": 0, "word_ppl": 1, "f1": 2}
    print(f"\n{'metric':{width}}  this model   " + "  ".join(f"({i})" for i in range(1, len(ANCHORS) + 1)))
    for key in [key for key in NAMES if key in figures]:
        value, anchors = figures[key], [""] * len(ANCHORS)
        if key in columns:
            anchors = [published[columns[key]] for published in ANCHORS.values()]
        percent = key not in ("word_ppl", "token_ppl", "mean_length")
        shown = f"{100 * value:9.1f} %" if percent else f"{value:9.2f}  "
        print(f"{NAMES[key]:{width}}  {shown}  " + " ".join(f"{anchor:>5}" for anchor in anchors))
    for i, name in enumerate(ANCHORS, 1):
        print(f"({i}) {name}; PPL per word")
    print()


def write_report(path: str, figures: dict[str, float], settings: dict, seconds: float) -> None:
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }
    known = {name: None if value != value else value for name, value in figures.items()}  # JSON knows no nan
    report = {"figures": known, "settings": settings, "versions": versions, "seconds": round(seconds, 1)}
    write_text(path, json.dumps(report, indent=2) + "\n")


def write_predictions(path: str, split: Split, results: Results, ranks: list[int], replies: list[str]) -> None:
    lines = []
    for utterance in range(len(results.nll)):
        line = {
            "persona": split.persona_texts(utterance),
            "history": split.history_texts(utterance),
            "gold": split.gold_text(utterance),
        }
        if replies:
            line["reply"] = replies[utterance]
        if ranks:
            candidates = split.candidate_texts(utterance)
            scores = results.scores[utterance, : len(candidates)].tolist()
            line |= {"rank": ranks[utterance] + 1, "candidates": candidates, "scores": scores}
        lines.append(json.dumps(line, ensure_ascii=False))
    write_text(path, "\n".join(lines) + "\n")


def write_text(path: str, text: str, mode: str = "w") -> None:
    try:
        with open(typed_path(path), mode, encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; pass a file you can write to") from error


def evaluate(
    model, splits: dict[str, Split], tokenizer: DialogTokenizer, settings: EvaluationSettings, decoding: Decoding
):
    """Every figure that was asked for, and what it was made of: (figures, results, ranks, replies)."""
    split = splits["valid"]
    size = min(len(split), settings.limit or len(split))
    wanted = {"hits@1", "ppl", "f1"} if settings.eval_type == "all" else {settings.eval_type}
    results = Results.empty(size, int(split.candidates.sizes.max()) if "hits@1" in wanted else 1, decoding.max_length)
    words = WordModel(splits, tokenizer) if "ppl" in wanted else None
    instances = Instances(
        split,
        tokenizer.ids,
        settings.max_history,
        model.limit,
        num_candidates=0 if "hits@1" in wanted else 1,
        extras={gold: spelling.tokens for gold, spelling in words.spelled.items()} if words else {},
    )
    instances.report_truncation("validation")
    if wanted & {"hits@1", "ppl"}:
        score(model, instances, words, settings.valid_batch_size, results)
    if "f1" in wanted:
        generate_all(model, instances, decoding, settings.seed, settings.valid_batch_size, results)
    results = join_ranks(results, model.device)

    figures, ranks, replies = {"utterances": size}, [], []
    if "hits@1" in wanted:
        hits, ranks = ranking_figures(results, split)
        figures |= hits
    if words:
        figures |= perplexity_figures(results) | {"dictionary": len(words.words)}
    if "f1" in wanted:
        replies = [tokenizer.decode([token - 1 for token in row if token]) for row in results.replies.tolist()]
        figures |= reply_figures(replies, split)
    return figures, results, ranks, replies


def report(
    figures, results, ranks, replies, split: Split, settings: EvaluationSettings, decoding: Decoding, seconds: float
) -> None:
    """The table, the FINAL lines, and the files that were asked for."""
    print_table(figures)
    if "hits@1" in figures:
        print(f"FINAL Hits@1: {figures['hits@1']:.3f}")
    if "word_ppl" in figures:
        print(f"FINAL PPL: {figures['word_ppl']:.1f}")
    if "f1" in figures:
        print(f"FINAL F1: {figures['f1']:.3f}")
    if settings.output:
        write_report(settings.output, figures, asdict(settings) | asdict(decoding), seconds)
    if settings.predictions:
        write_predictions(settings.predictions, split, results, ranks, replies)


def main() -> None:
    settings, decoding = parse_settings()
    device = join_processes(settings.device, settings.local_rank)
    started = time.monotonic()
    for path in filter(None, (settings.output, settings.predictions)):
        write_text(path, "", "a")  # an hour later would be late to hear that it cannot be written
    training = settings.dataset_path or (None if settings.valid_path else "")  # None: no training data is needed
    with idist.one_rank_first(local=True):  # of each node: it downloads and tokenises, the others find it done
        files = find_finetuned_model(settings.model)
        tokenizer = load_tokenizer(files, settings.pre_tokenizer)
        dialogs = Dialogs(training, settings.valid_path)
        splits = load_dataset(dialogs, tokenizer, settings.dataset_cache, progress=idist.get_rank() == 0)
        from cpu import optimize_for_cpu_inference
        from model import load_model

        model = load_model(files, tokenizer, device)
    if settings.bf16:
        model.bfloat16()
    optimize_for_cpu_inference(model)
    if not tokenizer.fine_tuned:
        log.warning("warning: this model was not fine-tuned on dialogs; train it with train.py")
    figures, results, ranks, replies = evaluate(model, splits, tokenizer, settings, decoding)
    if idist.get_rank() == 0:
        report(figures, results, ranks, replies, splits["valid"], settings, decoding, time.monotonic() - started)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run_script(main)
