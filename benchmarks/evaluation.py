"""How much faster the evaluation is than the plain way, in one run on the same replies: python -m benchmarks.evaluation

The model has the openai-gpt shape and random weights. Both ways' figures are compared, so that speed is not bought
with other numbers.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch

import convai_evaluation as evaluation
from benchmarks import plain
from model import Decoding
from utils import DialogTokenizer, Instances, learn_bpe, load_dataset, training_texts

DATASET = str(Path(__file__).resolve().parent.parent / "data" / "sample.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small shape")
    parser.add_argument("--dataset_path", default=DATASET)
    parser.add_argument("--plain", type=int, default=3, help="replies that the plain way evaluates")
    parser.add_argument("--ours", type=int, default=48, help="replies that the toolkit evaluates")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()

    tokenizer = DialogTokenizer(learn_bpe(training_texts(options.dataset_path, ""), 8000))
    with tempfile.TemporaryDirectory() as folder:
        splits = load_dataset(options.dataset_path, "", f"{folder}/cache.bin", tokenizer, progress=False)
    model = plain.random_model(tokenizer, plain.QUICK if options.quick else plain.FULL).to(options.device)
    model = model.bfloat16() if options.bf16 else model
    reference = plain.double_heads(model)
    words = evaluation.WordModel(splits, tokenizer)
    extras = {gold: spelling.tokens for gold, spelling in words.spelled.items()}
    split, ids = splits["valid"], tokenizer.ids
    ranking = Instances(split, ids, 2, model.limit)
    wording = Instances(split, ids, 2, model.limit, num_candidates=1, extras=extras)
    width = int(ranking.lengths().max())  # the longest row of the dataset
    args = argparse.Namespace(valid_batch_size=4, seed=42, **vars(Decoding(max_length=20, min_length=20)))

    def results() -> evaluation.Results:
        return evaluation.Results.empty(min(options.ours, len(split)), split.most_candidates(), args.max_length)

    def plain_scores(i: int) -> list[float]:
        return plain.scores(reference, ranking[i], width, ids.speaker1, ids.pad).tolist()

    def plain_words(i: int) -> list[float]:
        return [plain.word_nll(reference, wording[i], words, int(split.strings("candidates", i)[-1]), ids.speaker1)]

    def plain_reply(i: int) -> list[int]:
        generator = evaluation.reply_generator(args.seed, i)
        found = plain.reply(reference, ranking, i, Decoding.from_args(args), generator)
        return [token + 1 for token in found]

    subjects = {
        "Hits@1, 20 candidates": (plain_scores, lambda r: evaluation.score(model, ranking, None, args, r), "scores"),
        "word perplexity": (plain_words, lambda r: evaluation.score(model, wording, words, args, r), "word_nll"),
        "F1, replies of 20 tokens": (
            plain_reply,
            lambda r: evaluation.generate_all(model, ranking, args, r),
            "replies",
        ),
    }
    rows = []
    with torch.inference_mode():
        for name, (run_plain, run_ours, column) in subjects.items():
            started = time.perf_counter()
            found = [run_plain(i) for i in range(options.plain)]
            plain_rate = options.plain / (time.perf_counter() - started)
            ours, started = results(), time.perf_counter()
            run_ours(ours)
            our_rate = len(ours.nll) / (time.perf_counter() - started)
            expected = torch.tensor(found).flatten().double()
            difference = (torch.as_tensor(getattr(ours, column)[: options.plain]).flatten() - expected).abs().max()
            rows.append(
                f"| {name} | {plain_rate:.3f} | {our_rate:.2f} | {our_rate / plain_rate:.1f}x | {difference:.1e} |"
            )
    print(
        "| subject | plain, replies/s | ours, replies/s | ratio | largest difference |\n| --- | --- | --- | --- | --- |"
    )
    print("\n".join(rows))


if __name__ == "__main__":
    main()
