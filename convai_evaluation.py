"""Evaluate a model as the ConvAI2 competition did: Hits@1, word perplexity and F1, without ParlAI."""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial

import ignite.distributed as idist
import msgspec
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from batches import Batch, batches_by_length, collate
from cli import UserError, join_processes, log, run_script
from dialogs import Dialogs
from inputs import Instances, Prefix, sentences_inside
from metrics import WordModel, distinct, gold_ranks, reply_columns
from model_files import find_finetuned_model
from options import RERANK, DatasetSettings, Decoding, Parser, option
from progress import progress_bar
from prompts import ChatInstances, ChatTemplate, read_instructions
from report import (
    FINAL,
    LIKELIHOODS,
    Evaluated,
    Evaluation,
    Results,
    print_comparison,
    print_table,
    read_report,
    weights_digest,
    write_predictions,
    write_report,
    write_text,
)
from splits import Split
from utils import DialogTokenizer, load_dataset, load_tokenizer

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
    prompt: str = option(
        "dialog", "what the model reads: rows as in training, or its own chat template's", choices=("dialog", "chat")
    )
    instructions: str = option("", "with --prompt chat: a text file for the system message, with {persona} in it")
    valid_batch_size: int = option(4, "utterances per forward pass", low=1)
    limit: int = option(0, "evaluate the first so many replies (0: all)", low=0)
    output: str = option("", "write every figure, with settings and versions, to this JSON file")
    compare: str = option("", "report of another model: show what differs, with standard errors")
    predictions: str = option("", "JSON lines file for replies, ranks and scores")

    def __post_init__(self):
        super().__post_init__()
        if self.instructions and self.prompt != "chat":
            raise UserError("--instructions is for --prompt chat; give both, or neither")


def parse_settings() -> tuple[EvaluationSettings, Decoding]:
    args = Parser(__doc__, EvaluationSettings, Decoding).parse_args()
    return EvaluationSettings.from_args(args), Decoding.from_args(args)


# ------------------------------------------------------------------------------------------------------------
# Scores and likelihoods
# ------------------------------------------------------------------------------------------------------------


def own_rows(name: str, instances: Instances, batch_size: int, size: int) -> Iterator[list[int]]:
    """The numbers of this process's rows, in batches of like length: its share of the first `size` utterances.

    Args:
        name: of the pass, for the progress bar.
    """
    rank = idist.get_rank()
    batches = batches_by_length(instances, batch_size, size, rank, idist.get_world_size()).batch_sampler
    total = sum(map(len, batches))
    with progress_bar(total=total, desc=name, unit=" replies", disable=rank > 0) as bar:
        for rows in batches:
            yield rows
            bar.update(len(rows))


@torch.inference_mode()
def score(
    model, instances: Instances, words: WordModel | None, rank_by: str, batch_size: int, results: Results
) -> None:
    """Scores of candidates and likelihoods of tokens and words; each prefix is encoded once for all of them."""
    for rows in own_rows("score", instances, batch_size, len(results.nll)):
        batch = collate([instances[row] for row in rows], instances.ids).to(model.device)
        if rank_by != "mc":
            ids, predicting, candidate = candidate_tokens(batch)
            needed = torch.cat([predicting, batch.head_positions]).unique()
            batch = replace(batch, head_positions=needed)
        hidden = model.hidden(batch)
        output = model.heads(hidden, batch)
        scores = output.mc_logits.cpu().double().numpy()
        if rank_by != "mc":
            nll = [F.cross_entropy(logits, ids[k], reduction="none") for k, logits in slices(model, hidden, predicting)]
            likelihoods = -means(torch.cat(nll), candidate, scores.size).reshape(scores.shape)
            scores = likelihoods if rank_by == "lm" else likelihoods + scores
        results.scores[rows, : scores.shape[1]] = scores
        owners = (batch.lm_positions // batch.input_ids.shape[1]).cpu()  # the row of each labelled token
        results.nll[rows] = np.bincount(owners, output.lm_nll.cpu().double(), len(rows))
        results.tokens[rows] = np.bincount(owners, minlength=len(rows))
        if words:
            score_words(model, hidden, batch, rows, instances.split, words, results)


def choose_ranking(model, rank_by: str | None) -> str:
    """What candidates are ranked by. A multiple-choice head that no checkpoint holds would rank them at random."""
    if model.lm.choice_head_trained:
        return rank_by or "mc"
    if rank_by is None:
        log.info("this model has no trained multiple-choice head: ranking by likelihood per token (--rank_by lm)")
    elif rank_by != "lm":
        log.warning(f"warning: this model has no trained multiple-choice head; --rank_by {rank_by} uses a random one")
    return rank_by or "lm"


def candidate_tokens(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens (K,) of all candidates, their <eos> included.

    Returns:
        Their ids; the flat indices of the hidden states that predict them; the candidate that each is of, as a flat
        index into (B, N).
    """
    width, most = batch.segments.shape[1], batch.ends.shape[1]
    is_candidate = (batch.segments > 0) & (batch.segments <= batch.n_candidates[:, None])
    tokens = is_candidate.flatten().nonzero()[:, 0]  # flat indices
    row = tokens // width
    # The prefix's last token predicts the first one of every candidate, and each of these the next.
    fork = batch.forks.flatten()[tokens]
    is_first = batch.positions.flatten()[tokens] == fork + 1
    predicting = torch.where(is_first, row * width + fork, tokens - 1)
    candidate = row * most + batch.segments.flatten()[tokens] - 1
    return batch.input_ids.flatten()[tokens], predicting, candidate


def means(values: Tensor, owners: Tensor, size: int) -> np.ndarray:
    """The mean (size,) of each owner's values, from the values (K,) and their owners (K,); 0 where there is none."""
    owners = owners.cpu()
    sums = np.bincount(owners, values.cpu().double(), size)
    counts = np.bincount(owners, minlength=size)
    return sums / np.maximum(counts, 1)


def slices(model, hidden: Tensor, positions: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Logits (k, V) after flat positions (K,) of hidden states (B, T, D), some at a time, with the slice of K."""
    size = max(1, LOGITS // model.lm.config.get_text_config().vocab_size)
    for start in range(0, len(positions), size):
        part = slice(start, start + size)
        yield part, model.lm_logits(hidden.flatten(0, 1)[positions[part]]).float()


def score_words(
    model, hidden: Tensor, batch: Batch, rows: list[int], split: Split, words: WordModel, results: Results
) -> None:
    """Word likelihoods of a batch whose instances have their gold reply's words as `extra`."""
    sizes = (batch.segments == batch.n_candidates[:, None] + 1).sum(1).tolist()  # a long reply may be truncated
    starts, prefix_ends = batch.extra_starts.tolist(), batch.prefix_ends().tolist()
    scored = {0: [], 1: []}  # words at a reply's start, and those after another word
    for place, row in enumerate(rows):
        spelling = words.spelled[split.candidates[row][-1]]
        for offset, word, inside in spelling.positions:
            if offset < sizes[place]:
                # The last token of the prefix predicts a reply's first one, and each of these the next.
                predicting = starts[place] + offset - 1 if offset else prefix_ends[place]
                scored[inside].append((predicting, word, row))
    for inside, of_kind in scored.items():
        if not of_kind:
            continue
        predicting, numbers, owners = torch.tensor(of_kind).unbind(1)
        np.add.at(results.words, owners.numpy(), 1)
        for part, logits in slices(model, hidden, predicting.to(hidden.device)):
            for name, tables in words.tables.items():
                log_probabilities = tables[inside].log_probabilities(logits, numbers[part])
                np.add.at(getattr(results, name), owners[part].numpy(), -log_probabilities.numpy())


# ------------------------------------------------------------------------------------------------------------
# Replies
# ------------------------------------------------------------------------------------------------------------


def generate_all(model, instances: Instances, decoding: Decoding, seed: int, batch_size: int, results: Results) -> None:
    """A reply to every utterance, in batches of prefixes of like length."""
    from generation import generate_replies

    longest = min(decoding.max_length, model.limit // 2)
    for batch in own_rows("generate", instances, GENERATION_BATCH * batch_size, len(results.nll)):
        # A persona may leave less room than `longest`. A reply's room must not depend on its batch's other rows, so
        # rows of the same room are generated together.
        by_room: dict[int, dict[int, Prefix]] = {}
        for row in batch:
            prefix, room = instances.prefix(row, longest)
            by_room.setdefault(room, {})[row] = prefix
        for room, prefixes in by_room.items():
            generators = [reply_generator(seed, row) for row in prefixes]
            options = replace(decoding, max_length=room)
            replies = generate_replies(model, list(prefixes.values()), options, generators)
            for row, reply in zip(prefixes, replies, strict=True):
                results.replies[row, : len(reply)] = np.array(reply, np.int64) + 1


def reply_generator(seed: int, utterance: int) -> torch.Generator:
    """A reply's own: it does not depend on the batch, the order or the number of processes."""
    (number,) = np.random.SeedSequence([seed, utterance]).generate_state(1)
    return torch.Generator().manual_seed(int(number))


# ------------------------------------------------------------------------------------------------------------
# The evaluation
# ------------------------------------------------------------------------------------------------------------


def join_ranks(results: Results, device: torch.device) -> None:
    """Complete the results in every process. Each row was filled by one of them and is zero in the others."""
    if idist.get_world_size() > 1:
        for column in vars(results).values():
            whole = idist.all_reduce(torch.as_tensor(column).to(device))
            column[:] = whole.cpu().numpy()


def evaluate(
    model,
    splits: dict[str, Split],
    tokenizer: DialogTokenizer,
    settings: EvaluationSettings,
    decoding: Decoding,
    template: ChatTemplate | None = None,
) -> Evaluation:
    """Measure what was asked for of the first replies of the validation split.

    Args:
        template: of the prompts of a model that was not fine-tuned on dialogs. Its special tokens become the model's.
    """
    split = splits["valid"].with_alternatives()
    size = min(len(split), settings.limit or len(split))
    hits, ppl, f1 = (settings.eval_type in (name, "all") for name in ("hits@1", "ppl", "f1"))
    results = Results.empty(size, int(split.candidates.sizes.max()) if hits else 1, decoding.max_length)
    words = WordModel(splits, tokenizer) if ppl else None
    if template:
        model.ids, model.untrained = template.ids(), tokenizer.added
    make_instances = partial(ChatInstances, template=template) if template else Instances
    instances = make_instances(
        split,
        model.ids,
        settings.max_history,
        model.limit,
        num_candidates=0 if hits else 1,
        extras={gold: spelling.tokens for gold, spelling in words.spelled.items()} if words else {},
        inside=sentences_inside(split, tokenizer),
    )
    instances.report_truncation("validation")
    rank_by = choose_ranking(model, settings.rank_by) if hits else "mc"
    if hits or ppl:
        score(model, instances, words, rank_by, settings.valid_batch_size, results)
    if f1:
        generate_all(model, instances, decoding, settings.seed, settings.valid_batch_size, results)
    join_ranks(results, model.device)

    evaluation = Evaluation(split, rank_by, results, columns={}, counts={"utterances": size}, replies=[])
    if hits:
        evaluation.columns["rank"] = gold_ranks(results.scores, split) + 1
    if words:
        evaluation.columns |= {name: getattr(results, name) for name in LIKELIHOODS}
        totals = {"words": int(results.words.sum()), "tokens": int(results.tokens.sum())}
        evaluation.counts |= totals | {"dictionary": len(words.words)}
    if f1:
        for row in results.replies.tolist():
            evaluation.replies.append(tokenizer.decode([token - 1 for token in row if token]))
        evaluation.columns |= reply_columns(evaluation.replies, split)
        evaluation.counts |= {f"distinct_{n}": distinct(evaluation.replies, n) for n in (1, 2)}
    return evaluation


def main() -> None:
    settings, decoding = parse_settings()
    device = join_processes(settings.device, settings.local_rank)
    started = time.monotonic()
    for path in filter(None, (settings.output, settings.predictions)):
        write_text(path, "", "a")  # an hour later would be late to hear that it cannot be written
    instructions = read_instructions(settings.instructions)
    training = settings.dataset_path or (None if settings.valid_path else "")  # None: no training data is needed
    with idist.one_rank_first(local=True):  # of each node: it downloads and tokenises, the others find it done
        files = find_finetuned_model(settings.model)
        tokenizer = load_tokenizer(files, settings.pre_tokenizer)
        settings = replace(settings, max_history=tokenizer.choose_max_history(settings.max_history))
        template = ChatTemplate(tokenizer, instructions) if settings.prompt == "chat" else None
        dialogs = Dialogs(training, settings.valid_path, whole=True)
        splits = load_dataset(dialogs, tokenizer, settings.dataset_cache, progress=idist.get_rank() == 0)
        size = len(splits["valid"])
        evaluated = Evaluated(*dialogs.valid_source, list(dialogs.digest), min(size, settings.limit or size), size)
        other = read_report(settings.compare, evaluated) if settings.compare else None
        from cpu import optimize_for_cpu_inference
        from loading import load_model

        model = load_model(files, tokenizer, device)
    if settings.bf16:
        model.bfloat16()
    optimize_for_cpu_inference(model)
    if not tokenizer.fine_tuned and not template:
        log.warning("warning: this model was not fine-tuned on dialogs; train it with train.py")
    evaluation = evaluate(model, splits, tokenizer, settings, decoding, template)
    if idist.get_rank() == 0:
        print_table(evaluation, evaluated)
        if template:
            print(f"The model read this through its chat template:\n\n{instructions}\n")
        if other:
            print_comparison(settings.compare, evaluation.columns, other)
        for name, line in FINAL.items():
            if name in evaluation.figures:
                print(line.format(evaluation.figures[name]))
        if settings.output:
            about = {
                "evaluated": msgspec.to_builtins(evaluated),
                "model": {"name": settings.model, "digest": weights_digest(files)},
                "settings": asdict(settings) | asdict(decoding) | {"rank_by": evaluation.rank_by},
                "instructions": template and instructions,
                "seconds": round(time.monotonic() - started, 1),
            }
            write_report(settings.output, evaluation, about)
        if settings.predictions:
            write_predictions(settings.predictions, evaluation)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run_script(main)
