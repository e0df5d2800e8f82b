"""Evaluation: replies a second for Hits@1, word perplexity and F1.

Both ways' figures are compared, so that speed is not bought with other numbers.
"""

import contextlib
import io
from functools import partial

import torch

import convai_evaluation as evaluation
from benchmarks import plain
from benchmarks.common import Bench, Row, parse_options, seconds, table, times_as_long
from generation import Decoding
from inputs import Instances
from metrics import WordModel
from model import DialogModel

PLAIN, OURS, RANKED = 2, 64, 16  # replies that each way evaluates; that are ranked in both of our ways


def measure(bench: Bench) -> list[Row]:
    words = WordModel(bench.splits, bench.tokenizer)
    extras = {gold: spelling.tokens for gold, spelling in words.spelled.items()}
    ranking, wording = bench.instances("valid"), bench.instances("valid", num_candidates=1, extras=extras)
    split, ids = bench.splits["valid"], bench.ids
    width = int(ranking.lengths().max())  # the longest row of the dataset
    decoding, seed, batch_size = Decoding(max_length=20, min_length=20), 42, 4

    def plain_scores(i: int) -> list[float]:
        return plain.scores(bench.reference, ranking[i], width, ids).tolist()

    def plain_likelihoods(i: int) -> list[float]:
        return plain.log_likelihoods(bench.reference, ranking[i], width, ids)

    def plain_words(i: int) -> list[float]:
        gold = int(split.candidates[i][-1])
        return [plain.word_nll(bench.reference, wording[i], words, gold, ids.speaker1)]

    def plain_reply(i: int) -> list[int]:
        generator = evaluation.reply_generator(seed, i)
        reply = plain.reply(bench.reference, ranking, i, decoding, generator)
        return [token + 1 for token in reply]

    def score(model: DialogModel, results: evaluation.Results) -> None:
        evaluation.score(model, ranking, None, "mc", batch_size, results)

    def score_likelihoods(model: DialogModel, results: evaluation.Results) -> None:
        evaluation.score(model, ranking, None, "lm", batch_size, results)

    def score_words(model: DialogModel, results: evaluation.Results) -> None:
        evaluation.score(model, wording, words, "mc", batch_size, results)

    def generate(model: DialogModel, results: evaluation.Results) -> None:
        evaluation.generate_all(model, ranking, decoding, seed, batch_size, results)

    rows = []
    for subject, aim, run_plain, run_ours, column in (
        ("scoring (Hits@1), all candidates", "18x / 40x", plain_scores, score, "scores"),
        ("ranking by likelihood, all candidates", "", plain_likelihoods, score_likelihoods, "scores"),
        ("word perplexity", "10x", plain_words, score_words, "word_nll"),
        ("F1, replies of 20 tokens", "20x", plain_reply, generate, "replies"),
    ):
        with torch.inference_mode():
            found = []
            plain_rate = PLAIN / seconds(found.extend, map(run_plain, range(PLAIN)))
            rates, columns = {}, {}
            for name, model in bench.models.items():
                candidates = int(split.candidates.sizes.max())
                results = evaluation.Results.empty(min(OURS, len(split)), candidates, decoding.max_length)
                with contextlib.redirect_stderr(io.StringIO()):  # progress bars
                    rates[name] = len(results.nll) / seconds(run_ours, model, results)
                columns[name] = torch.as_tensor(getattr(results, column)[:PLAIN]).flatten()
        difference = float((columns["fp32"] - torch.tensor(found).flatten().double()).abs().max())
        rows.append(Row(subject, "replies/s", rates, plain_rate, aim, difference))
    return [*rows, likelihood_against_head(bench, ranking, batch_size)]


@torch.inference_mode()
def likelihood_against_head(bench: Bench, instances: Instances, batch_size: int) -> Row:
    """What the LM head costs at every token of all candidates, above one score for each."""

    def rank(model: DialogModel, rank_by: str) -> None:
        size, candidates = min(RANKED, len(instances)), int(instances.split.candidates.sizes.max())
        results = evaluation.Results.empty(size, candidates, 0)
        with contextlib.redirect_stderr(io.StringIO()):  # progress bars
            evaluation.score(model, instances, None, rank_by, batch_size, results)

    times = {
        name: times_as_long(partial(rank, model, "lm"), partial(rank, model, "mc"))
        for name, model in bench.models.items()
    }
    return Row("ranking by likelihood against ranking by the head", "times as long", times, must="2 at most")


if __name__ == "__main__":
    print(table(measure(Bench(parse_options(__doc__)))))
