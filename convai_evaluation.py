"""Evaluate a model on the validation split of a dataset: Hits@1."""

import argparse

import torch
from tqdm import tqdm

from utils import (
    FINETUNED_NOTE,
    Instances,
    Parser,
    add_model_options,
    batches_by_length,
    check_device,
    find_finetuned_model,
    load_dataset,
    load_tokenizer,
    log,
    number,
    run_script,
)


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    add_model_options(parser, note=FINETUNED_NOTE)
    parser.add_argument("--valid_path", default="", help="dataset to evaluate on, if not a part of --dataset_path")
    parser.add_argument("--eval_type", choices=["hits@1"], default="hits@1", help="what to measure")
    parser.add_argument("--valid_batch_size", type=number(int, 1), default=4, help="utterances per forward pass")
    return parser.parse_args()


@torch.inference_mode()
def hits_at_1(model, instances: Instances, batch_size: int, device: torch.device) -> float:
    """The share of utterances whose gold reply gets the highest multiple-choice score of all its candidates."""
    from model import gold_ranks

    hits = 0
    with tqdm(total=len(instances), desc="Hits@1", unit=" replies") as bar:
        for batch in batches_by_length(instances, batch_size):
            batch = batch.to(device)
            hits += int((gold_ranks(model(batch), batch) == 0).sum())
            bar.update(len(batch.n_candidates))
    return hits / len(instances)


def main() -> None:
    args = parse_args()
    device = check_device(args.device)

    from model import load_model  # heavy: after all that can be told to be wrong at once

    files = find_finetuned_model(args.model)
    tokenizer = load_tokenizer(files, args.pre_tokenizer)
    dataset = args.dataset_path or args.valid_path  # with the validation data alone, nothing else is needed
    splits = load_dataset(dataset, args.valid_path, args.dataset_cache, tokenizer)
    model = load_model(files, tokenizer, device)
    if not tokenizer.fine_tuned:
        log.warning("warning: this model was not fine-tuned on dialogs; train it with train.py")
    instances = Instances(splits["valid"], tokenizer.ids, args.max_history, model.limit)
    instances.report_cuts("validation")
    print(f"FINAL Hits@1: {hits_at_1(model, instances, args.valid_batch_size, device):.3f}")


if __name__ == "__main__":
    run_script(main)
