"""Evaluate a model as the ConvAI2 competition did: Hits@1, word perplexity and F1, without ParlAI."""

import hashlib
import json
import math
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version

import ignite.distributed as idist
import msgspec
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from cli import (
    RERANK,
    DatasetSettings,
    Decoding,
    Parser,
    UserError,
    first_line,
    join_processes,
    log,
    option,
    run_script,
)
from dialogs import Dialogs
from files import ModelFiles, find_finetuned_model, typed_path
from inputs import Batch, Instances, batches_by_length
from metrics import Figure, Spelling, WordModel, distinct, figures_of, gold_ranks, reply_columns
from utils import DialogTokenizer, Split, load_dataset, load_tokenizer

# Published figures, for context: (Hits@1 in %, PPL per word by the original toolkit's table, F1 in %).
ANCHORS = {
    "TransferTransfo, hidden test set (competition leaderboard)": ("80.7", "16.28", "19.5"),
    "original README, validation set": ("> 79", "20.5", "16.5"),
    "published checkpoint, validation set": ("71.5", "-", "-"),
}
ANCHORED = ("hits@1", "original_word_ppl", "f1")
LOGITS = 2**25  # at a time, 128 MB: with a vocabulary of 260,000, those of a hundred candidates come to 1 GB
GENERATION_BATCH = 8  # a generated row has one continuation where a scored one has twenty: it takes more of them


@dataclass(frozen=True)
class EvaluationSettings(DatasetSettings):
    """Options of convai_evaluation.py."""

    eval_type: str = option("hits@1", "what to measure", choices=("hits@1", "ppl", "f1", "all"))
    rank_by: str | None = option(
        None,
        "rank by the head, by likelihood per token, or by their sum; default: mc where the head is trained, else lm",
        choices=RERANK,
    )
    valid_batch_size: int = option(4, "utterances per forward pass", low=1)
    limit: int = option(0, "evaluate the first so many replies (0: all)", low=0)
    output: str = option("", "write every figure, with settings and versions, to this JSON file")
    compare: str = option("", "report of another model: show what differs, with standard errors")
    predictions: str = option("", "JSON lines file for replies, ranks and scores")


def parse_settings() -> tuple[EvaluationSettings, Decoding]:
    args = Parser(__doc__, EvaluationSettings, Decoding).parse_args()
    return EvaluationSettings.from_args(args), Decoding.from_args(args)


# ------------------------------------------------------------------------------------------------------------
# Passes over the split. Each rank fills the rows of its utterances; a sum over ranks completes them.
# ------------------------------------------------------------------------------------------------------------


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


def join_ranks(results: Results, device: torch.device) -> Results:
    """The sum over ranks: every row was filled by one of them."""
    if dist.is_initialized():
        for column in vars(results).values():
            whole = torch.as_tensor(column).to(device)
            dist.all_reduce(whole)
            column[:] = whole.cpu().numpy()
    return results


@torch.inference_mode()
def score(
    model, instances: Instances, words: WordModel | None, rank_by: str, batch_size: int, results: Results
) -> None:
    """Scores of candidates and likelihoods of tokens and words; each prefix is encoded once for all of them."""
    loader = rank_loader(instances, batch_size, len(results.nll))
    with progress("score", loader) as bar:
        for rows, batch in zip(loader.batch_sampler, loader, strict=True):
            batch = batch.to(model.device)
            if rank_by != "mc":
                batch = reading_candidates(batch)
            hidden = model.hidden(batch)
            output = model.heads(hidden, batch)
            scores = output.mc_logits
            if rank_by != "mc":
                likelihoods = token_log_likelihoods(model, hidden, batch)
                scores = likelihoods if rank_by == "lm" else likelihoods + scores
            results.scores[rows, : scores.shape[1]] = scores.cpu()
            owners = (batch.lm_positions // batch.input_ids.shape[1]).cpu()  # the row of each labelled token
            results.nll[rows] = np.bincount(owners, output.lm_nll.cpu().double(), len(rows))
            results.tokens[rows] = np.bincount(owners, minlength=len(rows))
            if words:
                golds = [instances.split.candidates[row][-1] for row in rows]
                score_words(model, hidden, batch, rows, [words.spelled[gold] for gold in golds], words, results)
            bar.update(len(rows))


def choose_ranking(model, rank_by: str | None) -> str:
    """What candidates are ranked by. A multiple-choice head that no checkpoint holds would rank them at random."""
    trained = model.lm.choice_head_trained
    if not trained and rank_by is None:
        log.info("this model has no trained multiple-choice head: ranking by likelihood per token (--rank_by lm)")
    elif not trained and rank_by != "lm":
        log.warning(f"warning: this model has no trained multiple-choice head; --rank_by {rank_by} uses a random one")
    return rank_by or ("mc" if trained else "lm")


def reading_candidates(batch: Batch) -> Batch:
    """The batch with the hidden states of all candidates' tokens among those that are wanted."""
    continuations = (batch.segments > 0).flatten().nonzero()[:, 0]
    return replace(batch, head_positions=torch.cat([continuations, batch.prefix_ends()]).sort().values)


def token_log_likelihoods(model, hidden: Tensor, batch: Batch) -> Tensor:
    """The log-likelihood per token, <eos> included, of each candidate: (B, N); -inf where a row has fewer than N."""
    of_candidate = (batch.segments > 0) & (batch.segments <= batch.n_candidates[:, None])
    tokens = of_candidate.flatten().nonzero()[:, 0]  # (K,) flat indices
    segments = batch.segments.flatten()
    row, candidate = tokens // batch.segments.shape[1], segments[tokens] - 1
    # The prefix's last token predicts the first one of every candidate, and each of these the next.
    is_first = segments[tokens - 1] != segments[tokens]
    predicting = torch.where(is_first, batch.prefix_ends()[row], tokens - 1)
    labels = batch.input_ids.flatten()[tokens]
    nll = [F.cross_entropy(logits, labels[k], reduction="none") for k, logits in slices(model, hidden, predicting)]
    sums, counts = torch.zeros(2, *batch.ends.shape, device=hidden.device)
    sums.index_put_((row, candidate), torch.cat(nll), accumulate=True)
    counts.index_put_((row, candidate), torch.ones_like(sums[0, 0]), accumulate=True)
    return (-sums / counts).masked_fill(counts == 0, float("-inf"))


def slices(model, hidden: Tensor, positions: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Logits (k, V) after flat positions (K,) of hidden states (B, T, D), some at a time, with the slice of K."""
    size = max(1, LOGITS // model.lm.config.get_text_config().vocab_size)
    for start in range(0, len(positions), size):
        part = slice(start, start + size)
        yield part, model.lm_logits(hidden.flatten(0, 1)[positions[part]]).float()


def score_words(model, hidden, batch, rows: list[int], spellings: list[Spelling], words: WordModel, results) -> None:
    """Word likelihoods of a batch whose instances have their gold reply's words as `extra`."""
    room = (batch.segments == batch.n_candidates[:, None] + 1).sum(1).tolist()  # a long reply may be truncated
    starts, prefix_ends = batch.extra_starts.tolist(), batch.prefix_ends().tolist()
    for inside in (0, 1):
        # A reply's first token is predicted by the prefix's last, any other by the one before it.
        scored = [
            (starts[row] + offset - 1 if offset else prefix_ends[row], word, rows[row])
            for row, spelling in enumerate(spellings)
            for offset, word, is_inside in spelling.positions
            if is_inside == inside and offset < room[row]
        ]
        if not scored:
            continue
        predicting, numbers, owners = map(torch.tensor, zip(*scored, strict=True))
        np.add.at(results.words, owners.numpy(), 1)
        for part, logits in slices(model, hidden, predicting.to(hidden.device)):
            for name, tables in words.tables.items():
                log_probabilities = tables[inside].log_probabilities(logits, numbers[part])
                np.add.at(getattr(results, name), owners[part].numpy(), -log_probabilities.numpy())


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


def evaluate(
    model, splits: dict[str, Split], tokenizer: DialogTokenizer, settings: EvaluationSettings, decoding: Decoding
) -> Evaluation:
    """Measure what was asked for of the first replies of the validation split."""
    split = splits["valid"].with_alternatives()
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
    rank_by = choose_ranking(model, settings.rank_by) if "hits@1" in wanted else "mc"
    if wanted & {"hits@1", "ppl"}:
        score(model, instances, words, rank_by, settings.valid_batch_size, results)
    if "f1" in wanted:
        generate_all(model, instances, decoding, settings.seed, settings.valid_batch_size, results)
    results = join_ranks(results, model.device)

    columns, counts, replies = {}, {"utterances": size}, []
    if "hits@1" in wanted:
        columns["rank"] = gold_ranks(results.scores, split) + 1
    if words:
        columns |= {name: getattr(results, name) for name in LIKELIHOODS}
        counts |= {"words": int(results.words.sum()), "tokens": int(results.tokens.sum())}
        counts["dictionary"] = len(words.words)
    if "f1" in wanted:
        replies = [tokenizer.decode([token - 1 for token in row if token]) for row in results.replies.tolist()]
        columns |= reply_columns(replies, split)
        counts |= {f"distinct_{n}": distinct(replies, n) for n in (1, 2)}
    return Evaluation(split, rank_by, results, columns, counts, replies)


# ------------------------------------------------------------------------------------------------------------
# The report
# ------------------------------------------------------------------------------------------------------------


class Evaluated(msgspec.Struct):
    """The replies that were evaluated."""

    dataset: str
    split: str
    digest: list[str]  # of the files with training and validation data
    replies: int
    of: int


def evaluated_replies(dialogs: Dialogs, settings: EvaluationSettings, size: int) -> Evaluated:
    """What settings say of the validation split, which has `size` replies."""
    name = settings.valid_path or settings.dataset_path or "PersonaChat"
    return Evaluated(name, "valid", list(dialogs.digest), min(size, settings.limit or size), size)


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
    figures = figures_of(evaluation.columns)
    errors = {name: figure.standard_error for name, figure in figures.items()}
    rows = [["metric", "this model", *(f"({i})" for i in range(1, len(ANCHORS) + 1))]]
    for name in [name for name in NAMES if name in evaluation.figures]:
        anchors = [""] * len(ANCHORS)
        if name in ANCHORED:
            anchors = [published[ANCHORED.index(name)] for published in ANCHORS.values()]
        rows.append([NAMES[name], shown(name, evaluation.figures[name], errors.get(name, math.nan)), *anchors])
    print(
        f"\nThe first {evaluated.replies:,} of the {evaluated.of:,} replies of {evaluated.dataset}, {evaluated.split}."
    )
    if "rank" in evaluation.columns:
        print(f"Candidates are ranked by {RANKED_BY[evaluation.rank_by]}.")
    print("After ±: the standard error.\n")
    print_rows(rows)
    for i, name in enumerate(ANCHORS, 1):
        print(f"({i}) {name}")
    print()


def compare(columns: dict[str, np.ndarray], other: OtherReport) -> dict[str, tuple[Figure, Figure, Figure]]:
    """Each figure that both have: of this model, of the other, and their paired difference."""
    ours, theirs = figures_of(columns), figures_of({name: np.array(c) for name, c in other.utterances.items()})
    return {
        name: (ours[name], theirs[name], ours[name] - theirs[name]) for name in NAMES if name in ours.keys() & theirs
    }


def print_comparison(path: str, differences: dict[str, tuple[Figure, Figure, Figure]]) -> None:
    rows = [["metric", "this model", "the other", "difference"]]
    for name, (ours, theirs, difference) in differences.items():
        values = shown(name, ours.value), shown(name, theirs.value)
        rows.append([NAMES[name], *values, shown(name, difference.value, difference.standard_error, sign="+")])
    print(f"Against {path}, reply by reply:\n")
    print_rows(rows)


def read_report(path: str, evaluated: Evaluated) -> OtherReport:
    """A report of the same replies.

    Raises:
        UserError: it is none, or one of others.
    """
    try:
        other = msgspec.json.decode(typed_path(path).read_bytes(), type=OtherReport)
    except (OSError, ValueError) as error:  # msgspec's errors are ValueErrors
        raise UserError(f"--compare {path}: {first_line(error)}; expected a report that --output wrote") from error
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
    errors = {name: figure.standard_error for name, figure in figures_of(evaluation.columns).items()}
    versions = {name: version(name) for name in ("torch", "transformers", "tokenizers")}
    report = {
        "figures": json_numbers(evaluation.figures),
        "standard_errors": json_numbers(errors),
        **about,
        "versions": {"python": platform.python_version()} | versions,
    }
    # indent would give each of many thousand numbers a line of its own
    lines = [f'    "{name}": [{", ".join(f"{x:.7g}" for x in column)}]' for name, column in evaluation.columns.items()]
    text = json.dumps(report, indent=2).removesuffix("\n}")
    write_text(path, text + ',\n  "utterances": {\n' + ",\n".join(lines) + "\n  }\n}\n")


def json_numbers(figures: dict[str, float]) -> dict[str, float | None]:
    """JSON knows neither nan nor infinity."""
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}


def write_predictions(path: str, evaluation: Evaluation) -> None:
    lines, split = [], evaluation.split
    for utterance in range(evaluation.counts["utterances"]):
        line = {
            "persona": split.persona_texts(utterance),
            "history": split.history_texts(utterance),
            "gold": split.gold_text(utterance),
        }
        if alternatives := split.right_texts(utterance)[1:]:
            line["alternatives"] = alternatives
        if evaluation.replies:
            line["reply"] = evaluation.replies[utterance]
        if "rank" in evaluation.columns:
            candidates = split.candidate_texts(utterance)
            scores = evaluation.results.scores[utterance, : len(candidates)].tolist()
            line |= {"rank": int(evaluation.columns["rank"][utterance]), "candidates": candidates, "scores": scores}
        lines.append(json.dumps(line, ensure_ascii=False))
    write_text(path, "\n".join(lines) + "\n")


def write_text(path: str, text: str, mode: str = "w") -> None:
    try:
        with open(typed_path(path), mode, encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; pass a file you can write to") from error


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
        dialogs = Dialogs(training, settings.valid_path, whole=True)
        splits = load_dataset(dialogs, tokenizer, settings.dataset_cache, progress=idist.get_rank() == 0)
        evaluated = evaluated_replies(dialogs, settings, len(splits["valid"]))
        other = read_report(settings.compare, evaluated) if settings.compare else None
        from cpu import optimize_for_cpu_inference
        from model import load_model

        model = load_model(files, tokenizer, device)
    if settings.bf16:
        model.bfloat16()
    optimize_for_cpu_inference(model)
    if not tokenizer.fine_tuned:
        log.warning("warning: this model was not fine-tuned on dialogs; train it with train.py")
    evaluation = evaluate(model, splits, tokenizer, settings, decoding)
    if idist.get_rank() == 0:
        print_table(evaluation, evaluated)
        if other:
            print_comparison(settings.compare, compare(evaluation.columns, other))
        for name, line in FINAL.items():
            if name in evaluation.figures:
                print(line.format(evaluation.figures[name]))
        if settings.output:
            about = {
                "evaluated": msgspec.to_builtins(evaluated),
                "model": {"name": settings.model, "digest": weights_digest(files)},
                "settings": asdict(settings) | asdict(decoding) | {"rank_by": evaluation.rank_by},
                "seconds": round(time.monotonic() - started, 1),
            }
            write_report(settings.output, evaluation, about)
        if settings.predictions:
            write_predictions(settings.predictions, evaluation)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run_script(main)
