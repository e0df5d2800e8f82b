"""Evaluate a model as the ConvAI2 competition did: Hits@1, word perplexity and F1, without ParlAI."""

import json
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version

import ignite.distributed as idist
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from cli import RERANK, DatasetSettings, Decoding, Parser, UserError, join_processes, log, option, run_script
from dialogs import Dialogs
from files import typed_path
from inputs import Batch, Instances, batches_by_length, sentences_inside
from metrics import Spelling, WordModel, perplexity, ranking_figures, reply_figures
from model_files import find_finetuned_model
from utils import DialogTokenizer, Split, load_dataset, load_tokenizer

# Published figures, for context: (Hits@1 in %, PPL per word by the original toolkit's table, F1 in %).
ANCHORS = {
    "TransferTransfo, hidden test set (competition leaderboard)": ("80.7", "16.28", "19.5"),
    "original README, validation set": ("> 79", "20.5", "16.5"),
    "published checkpoint, validation set": ("71.5", "-", "-"),
}
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
    predictions: str = option("", "JSON lines file for replies, ranks and scores")


def parse_settings() -> tuple[EvaluationSettings, Decoding]:
    args = Parser(__doc__, EvaluationSettings, Decoding).parse_args()
    return EvaluationSettings.from_args(args), Decoding.from_args(args)


# ------------------------------------------------------------------------------------------------------------
# Passes over the split. Each rank fills the rows of its utterances; a sum over ranks completes them.
# ------------------------------------------------------------------------------------------------------------


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
        columns = [np.zeros(utterances) for _ in range(5)]
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
    """Every figure that was asked for, and what it was made of."""

    figures: dict[str, float]
    results: Results
    rank_by: str
    ranks: list[int]  # of the gold replies; empty where candidates were not ranked
    replies: list[str]  # empty where none were generated


def evaluate(
    model, splits: dict[str, Split], tokenizer: DialogTokenizer, settings: EvaluationSettings, decoding: Decoding
) -> Evaluation:
    """Measure what was asked for of the first replies of the validation split."""
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
        inside=sentences_inside(split, tokenizer),
    )
    instances.report_truncation("validation")
    rank_by = choose_ranking(model, settings.rank_by) if "hits@1" in wanted else "mc"
    if wanted & {"hits@1", "ppl"}:
        score(model, instances, words, rank_by, settings.valid_batch_size, results)
    if "f1" in wanted:
        generate_all(model, instances, decoding, settings.seed, settings.valid_batch_size, results)
    results = join_ranks(results, model.device)

    figures, ranks, replies = {"utterances": size}, [], []
    if "hits@1" in wanted:
        hits, ranks = ranking_figures(results.scores, split)
        figures |= hits
    if words:
        figures |= {
            "word_ppl": perplexity(results.word_nll, results.words),
            "original_word_ppl": perplexity(results.original_word_nll, results.words),
            "token_ppl": perplexity(results.nll, results.tokens),
            "words": int(results.words.sum()),
            "tokens": int(results.tokens.sum()),
            "dictionary": len(words.words),
        }
    if "f1" in wanted:
        replies = [tokenizer.decode([token - 1 for token in row if token]) for row in results.replies.tolist()]
        figures |= reply_figures(replies, split)
    return Evaluation(figures, results, rank_by, ranks, replies)


# ------------------------------------------------------------------------------------------------------------
# The report
# ------------------------------------------------------------------------------------------------------------

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


RANKED_BY = {
    "mc": "the multiple-choice head",
    "lm": "likelihood per token",
    "both": "the sum of the multiple-choice head's score and the log-likelihood per token",
}


def print_table(figures: dict[str, float], rank_by: str) -> None:
    """This model's figures beside the published ones."""
    width = max(map(len, NAMES.values()))
    columns = {"hits@1": 0, "original_word_ppl": 1, "f1": 2}
    print(f"\n{'metric':{width}}  this model   " + "  ".join(f"({i})" for i in range(1, len(ANCHORS) + 1)))
    for key in [key for key in NAMES if key in figures]:
        value, anchors = figures[key], [""] * len(ANCHORS)
        if key in columns:
            anchors = [published[columns[key]] for published in ANCHORS.values()]
        percent = key not in ("original_word_ppl", "word_ppl", "token_ppl", "mean_length")
        shown = f"{100 * value:9.1f} %" if percent else f"{value:9.2f}  "
        print(f"{NAMES[key]:{width}}  {shown}  " + " ".join(f"{anchor:>5}" for anchor in anchors))
    for i, name in enumerate(ANCHORS, 1):
        print(f"({i}) {name}")
    if "hits@1" in figures:
        print(f"Candidates were ranked by {RANKED_BY[rank_by]}.")
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


def write_predictions(path: str, split: Split, evaluation: Evaluation) -> None:
    lines = []
    for utterance in range(evaluation.figures["utterances"]):
        line = {
            "persona": split.persona_texts(utterance),
            "history": split.history_texts(utterance),
            "gold": split.gold_text(utterance),
        }
        if evaluation.replies:
            line["reply"] = evaluation.replies[utterance]
        if evaluation.ranks:
            candidates = split.candidate_texts(utterance)
            scores = evaluation.results.scores[utterance, : len(candidates)].tolist()
            line |= {"rank": evaluation.ranks[utterance] + 1, "candidates": candidates, "scores": scores}
        lines.append(json.dumps(line, ensure_ascii=False))
    write_text(path, "\n".join(lines) + "\n")


def write_text(path: str, text: str, mode: str = "w") -> None:
    try:
        with open(typed_path(path), mode, encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; pass a file you can write to") from error


def report(
    evaluation: Evaluation, split: Split, settings: EvaluationSettings, decoding: Decoding, seconds: float
) -> None:
    """The table, the FINAL lines, and the files that were asked for."""
    figures = evaluation.figures
    print_table(figures, evaluation.rank_by)
    if "hits@1" in figures:
        print(f"FINAL Hits@1: {figures['hits@1']:.3f}")
    if "original_word_ppl" in figures:
        print(f"FINAL PPL: {figures['original_word_ppl']:.1f}")
    if "f1" in figures:
        print(f"FINAL F1: {figures['f1']:.3f}")
    if settings.output:
        settings_used = asdict(settings) | asdict(decoding) | {"rank_by": evaluation.rank_by}
        write_report(settings.output, figures, settings_used, seconds)
    if settings.predictions:
        write_predictions(settings.predictions, split, evaluation)


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
        settings = replace(settings, max_history=tokenizer.choose_max_history(settings.max_history))
        dialogs = Dialogs(training, settings.valid_path, whole=True)
        splits = load_dataset(dialogs, tokenizer, settings.dataset_cache, progress=idist.get_rank() == 0)
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
        report(evaluation, splits["valid"], settings, decoding, time.monotonic() - started)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run_script(main)
