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
from torch.utils.data import DataLoader

from batches import Batch, batches_by_length
from cli import UserError, join_processes, log, run_script
from dialogs import Dialogs
from inputs import Instances, sentences_inside
from metrics import Spelling, WordModel, distinct, gold_ranks, reply_columns
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
    compare,
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
# Passes over the split. Each rank fills the rows of its utterances; a sum over ranks completes them.
# ------------------------------------------------------------------------------------------------------------


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


def progress(name: str, loader: DataLoader):
    total = sum(map(len, loader.batch_sampler))
    return progress_bar(total=total, desc=name, unit=" replies", disable=idist.get_rank() > 0)


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
    wanted = {"hits@1", "ppl", "f1"} if settings.eval_type == "all" else {settings.eval_type}
    results = Results.empty(size, int(split.candidates.sizes.max()) if "hits@1" in wanted else 1, decoding.max_length)
    words = WordModel(splits, tokenizer) if "ppl" in wanted else None
    if template:
        model.ids, model.untrained = template.ids(), tokenizer.added
    make_instances = partial(ChatInstances, template=template) if template else Instances
    instances = make_instances(
        split,
        model.ids,
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
            print_comparison(settings.compare, compare(evaluation.columns, other))
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
