"""What an evaluation found, and how it is told: the table, the comparison of two models, the report to repeat it by.

U: utterances.
"""

import hashlib
import json
import math
import platform
from dataclasses import dataclass
from importlib.metadata import version

import msgspec
import numpy as np

from cli import UserError, explain_errors
from files import typed_path
from metrics import figures_of
from model_files import ModelFiles
from splits import Split

# Published figures, for context: (Hits@1 in %, PPL per word by the original toolkit's table, F1 in %).
ANCHORS = {
    "TransferTransfo, hidden test set (competition leaderboard)": ("80.7", "16.28", "19.5"),
    "original README, validation set": ("> 79", "20.5", "16.5"),
    "published checkpoint, validation set": ("71.5", "-", "-"),
}
ANCHORED = ("hits@1", "original_word_ppl", "f1")


LIKELIHOODS = ("nll", "tokens", "word_nll", "original_word_nll", "words")


@dataclass
class Results:
    """What was measured of each of U utterances; zero where another rank measured it."""

    scores: np.ndarray  # (U, N) by which candidates are ranked
    nll: np.ndarray  # (U,) of the gold reply's tokens and <eos>, summed
    tokens: np.ndarray  # (U,)
    word_nll: np.ndarray  # (U,) of the gold reply's words, summed
    original_word_nll: np.ndarray  # (U,) of the same words by the original toolkit's table
    words: np.ndarray  # (U,)
    replies: np.ndarray  # (U, max_length) generated tokens + 1; 0 after a reply's end

    @classmethod
    def empty(cls, utterances: int, candidates: int, max_length: int) -> "Results":
        columns = [np.zeros(utterances) for _ in LIKELIHOODS]
        return cls(np.zeros((utterances, candidates)), *columns, np.zeros((utterances, max_length), np.int64))


@dataclass
class Evaluation:
    """What was measured of a split's first U replies."""

    split: Split  # with all right replies among its candidates
    rank_by: str
    results: Results
    columns: dict[str, np.ndarray]  # (U,) each: what the figures are made of
    counts: dict[str, float]  # of all replies together
    replies: list[str]  # as text; empty where none were generated

    @property
    def figures(self) -> dict[str, float]:
        return {name: figure.value for name, figure in figures_of(self.columns).items()} | self.counts

    @property
    def standard_errors(self) -> dict[str, float]:
        return {name: figure.standard_error for name, figure in figures_of(self.columns).items()}


class Evaluated(msgspec.Struct):
    """The replies that were evaluated."""

    dataset: str
    split: str  # as the file calls it; "all" where it has none
    digest: list[str]  # of the files with training and validation data
    replies: int  # the first so many
    of: int

    def __str__(self) -> str:
        count = f"all {self.of:,}" if self.replies == self.of else f"the first {self.replies:,} of the {self.of:,}"
        where = "which has no splits" if self.split == "all" else f"its split '{self.split}'"
        return f"{count} replies of {self.dataset}, {where}"


class OtherReport(msgspec.Struct):
    """What a comparison needs of a report."""

    evaluated: Evaluated
    utterances: dict[str, list[float]]


NAMES = {
    "hits@1": "Hits@1",
    "hits@5": "Hits@5",
    "hits@10": "Hits@10",
    "original_word_ppl": "PPL per word, original toolkit's table",
    "word_ppl": "PPL per word, the reply's own tokens",
    "token_ppl": "PPL per token",
    "f1": "F1",
    "mean_length": "words per reply",
    "distinct_1": "distinct words",
    "distinct_2": "distinct word pairs",
    "questions": "questions",
    "repeats_utterance": "repeat an utterance",
    "repeats_history_3gram": "repeat a 3-gram of the history",
    "repeats_persona": "repeat a persona sentence",
}


# They end the output, as ParlAI's scripts end theirs.
FINAL = {
    "hits@1": "FINAL Hits@1: {:.3f}",
    "original_word_ppl": "FINAL PPL: {:.1f}",
    "f1": "FINAL F1: {:.3f}",
}

RANKED_BY = {
    "mc": "the multiple-choice head",
    "lm": "likelihood per token",
    "both": "the sum of the multiple-choice head's score and the log-likelihood per token",
}


def shown(name: str, value: float, error: float = math.nan, sign: str = "") -> str:
    """A figure as people read it, with its standard error where it has one."""
    is_share = name not in ("original_word_ppl", "word_ppl", "token_ppl", "mean_length")
    scale, digits, unit = (100, 1, " %") if is_share else (1, 2, "")
    spread = "" if math.isnan(error) else f" ± {scale * error:.{digits}f}"
    return f"{scale * value:{sign}.{digits}f}{spread}{unit}"


def print_rows(rows: list[list[str]]) -> None:
    """Cells under each other, the first column to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    print()


def print_table(evaluation: Evaluation, evaluated: Evaluated) -> None:
    """What was evaluated, and this model's figures beside the published ones."""
    print(f"\nEvaluated: {evaluated}.")
    if "rank" in evaluation.columns:
        print(f"Candidates are ranked by {RANKED_BY[evaluation.rank_by]}.")
    print("After ±: the standard error.\n")
    numbers = [f"({i})" for i in range(1, len(ANCHORS) + 1)]
    published = [dict(zip(ANCHORED, figures, strict=True)) for figures in ANCHORS.values()]
    rows = [["metric", "this model", *numbers]]
    figures, errors = evaluation.figures, evaluation.standard_errors
    for name, title in NAMES.items():
        if name in figures:
            value = shown(name, figures[name], errors.get(name, math.nan))
            rows.append([title, value, *(anchor.get(name, "") for anchor in published)])
    print_rows(rows)
    for number, anchor in zip(numbers, ANCHORS, strict=True):
        print(number, anchor)
    print()


def print_comparison(path: str, columns: dict[str, np.ndarray], other: OtherReport) -> None:
    """Each figure that both have: of this model, of the other, and their paired difference."""
    ours = figures_of(columns)
    theirs = figures_of({name: np.array(column) for name, column in other.utterances.items()})
    rows = [["metric", "this model", "the other", "difference"]]
    for name, title in NAMES.items():
        if name in ours and name in theirs:
            difference = ours[name] - theirs[name]
            spread = shown(name, difference.value, difference.standard_error, sign="+")
            rows.append([title, shown(name, ours[name].value), shown(name, theirs[name].value), spread])
    print(f"Against {path}, reply by reply:\n")
    print_rows(rows)


def read_report(path: str, evaluated: Evaluated) -> OtherReport:
    """A report of the same replies.

    Raises:
        UserError: it is none, or one of others.
    """
    # msgspec's errors are ValueErrors.
    with explain_errors(f"--compare {path}", "expected a report that --output wrote", OSError, ValueError):
        other = msgspec.json.decode(typed_path(path).read_bytes(), type=OtherReport)
    theirs = other.evaluated
    if (theirs.digest, theirs.replies) != (evaluated.digest, evaluated.replies):
        same = "the same" if theirs.digest == evaluated.digest else "another"
        raise UserError(
            f"--compare {path}: {theirs.replies} replies of {same} dataset; expected the {evaluated.replies} that are "
            "evaluated now, so that replies can be paired: evaluate both models with the same data and --limit"
        )
    return other


def weights_digest(files: ModelFiles) -> str:
    """SHA-256 of the model's weights, one file after the other."""
    digest = hashlib.sha256()
    for path in files.weights:
        with open(path, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def write_report(path: str, evaluation: Evaluation, about: dict) -> None:
    """Write every figure with what it takes to repeat it, and what was measured of each reply, to compare with."""
    versions = {name: version(name) for name in ("torch", "transformers", "tokenizers")}
    report = {
        "figures": json_numbers(evaluation.figures),
        "standard_errors": json_numbers(evaluation.standard_errors),
        **about,
        "versions": {"python": platform.python_version()} | versions,
    }
    text = json.dumps(report, indent=2).removesuffix("\n}")
    # indent would give each of many thousand numbers a line of its own.
    lines = []
    for name, column in evaluation.columns.items():
        numbers = ", ".join(f"{x:.7g}" for x in column)
        lines.append(f'    "{name}": [{numbers}]')
    write_text(path, text + ',\n  "utterances": {\n' + ",\n".join(lines) + "\n  }\n}\n")


def json_numbers(figures: dict[str, float]) -> dict[str, float | None]:
    """JSON knows neither nan nor infinity."""
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}


def write_predictions(path: str, evaluation: Evaluation) -> None:
    """Write a line of JSON for each utterance: what was said, what was right, what the model made of it."""
    split = evaluation.split
    lines = []
    for utterance in range(evaluation.counts["utterances"]):
        gold, *alternatives = split.right_texts(utterance)
        line = {
            "persona": split.persona_texts(utterance),
            "history": split.history_texts(utterance),
            "gold": gold,
        }
        if alternatives:
            line["alternatives"] = alternatives
        if evaluation.replies:
            line["reply"] = evaluation.replies[utterance]
        if "rank" in evaluation.columns:
            candidates = split.candidate_texts(utterance)
            line["rank"] = int(evaluation.columns["rank"][utterance])
            line["candidates"] = candidates
            line["scores"] = evaluation.results.scores[utterance, : len(candidates)].tolist()
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_text(path, "".join(lines))


def write_text(path: str, text: str, mode: str = "w") -> None:
    with explain_errors(f"cannot write {path}", "pass a file you can write to", OSError):
        with open(typed_path(path), mode, encoding="utf-8") as file:
            file.write(text)
