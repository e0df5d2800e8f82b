"""Fine-tune a causal language model on dialogs with two heads: language modelling and multiple choice."""

import argparse
import json
import logging
import math
import shlex
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from utils import (
    Batch,
    Instance,
    Instances,
    Parser,
    SpecialIds,
    UserError,
    add_model_options,
    add_valid_path,
    batches_by_length,
    check_device,
    collate,
    find_model,
    load_dataset,
    load_tokenizer,
    log,
    new_run_folder,
    number,
    run_script,
    set_seed,
    training_texts,
)


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    add_model_options(parser)
    add_valid_path(parser)
    parser.add_argument("--num_candidates", type=number(int, 1), default=2, help="candidates per training utterance")
    parser.add_argument("--train_batch_size", type=number(int, 1), default=4, help="utterances per forward pass")
    parser.add_argument("--valid_batch_size", type=number(int, 1), default=4, help="the same for validation")
    parser.add_argument("--gradient_accumulation_steps", type=number(int, 1), default=8, help="batches per step")
    parser.add_argument("--lr", type=number(float, 0), default=6.25e-5, help="learning rate, falling to 0 linearly")
    parser.add_argument("--lm_coef", type=number(float, 0), default=1.0, help="weight of the language-modelling loss")
    parser.add_argument("--mc_coef", type=number(float, 0), default=1.0, help="weight of the multiple-choice loss")
    parser.add_argument("--max_norm", type=number(float, 0), default=1.0, help="gradients are clipped to this norm")
    parser.add_argument("--n_epochs", type=number(int, 0), default=3, help="passes over the data (0: evaluate, save)")
    parser.add_argument("--personality_permutations", type=number(int, 1), default=1, help="rotations of each persona")
    parser.add_argument("--eval_before_start", action="store_true", help="evaluate before the first step too")
    parser.add_argument("--seed", type=int, default=42, help="of everything random")
    parser.add_argument("--fp16", choices=["", "O0", "O1", "O2", "O3"], default="", help="mixed precision (not yet)")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=-1, help="set by launchers (not yet)")
    return parser.parse_args()


# ------------------------------------------------------------------------------------------------------------
# Batches
# ------------------------------------------------------------------------------------------------------------


class StepSampler:
    """The instances of each optimiser step, in an order that depends on seed and epoch alone."""

    def __init__(self, size: int, step_size: int, seed: int):
        self.size, self.step_size, self.seed = size, step_size, seed
        self.epoch = 0

    def __len__(self) -> int:
        return math.ceil(self.size / self.step_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.size).tolist()
        return iter([order[i : i + self.step_size] for i in range(0, self.size, self.step_size)])


def collate_step(instances: list[Instance], batch_size: int, ids: SpecialIds) -> list[Batch]:
    """An optimiser step as micro-batches, instances of like length together.

    The losses are means over the whole step, so how it is cut does not change it.
    """
    instances = sorted(instances, key=lambda instance: len(instance.prefix) + sum(map(len, instance.candidates)))
    return [collate(instances[i : i + batch_size], ids) for i in range(0, len(instances), batch_size)]


# ------------------------------------------------------------------------------------------------------------
# Trainer and evaluator
# ------------------------------------------------------------------------------------------------------------


def build_trainer(model, optimizer, args: argparse.Namespace, device: torch.device):
    """An ignite engine whose iteration is one optimiser step, its batch the list of micro-batches."""
    from ignite.engine import Engine

    def step(engine: Engine, micro_batches: list[Batch]) -> dict[str, torch.Tensor]:
        model.train()
        tokens = sum(len(batch.lm_labels) for batch in micro_batches)
        utterances = sum(len(batch.n_candidates) for batch in micro_batches)
        lm_loss, mc_loss = torch.zeros(2, device=device)
        for batch in micro_batches:
            batch = batch.to(device)
            output = model(batch)
            lm_part = output.lm_nll.sum() / tokens
            mc_part = F.cross_entropy(output.mc_logits, batch.n_candidates - 1, reduction="sum") / utterances
            (args.lm_coef * lm_part + args.mc_coef * mc_part).backward()
            lm_loss, mc_loss = lm_loss + lm_part.detach(), mc_loss + mc_part.detach()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss = args.lm_coef * lm_loss + args.mc_coef * mc_loss
        return {"loss": loss, "lm_loss": lm_loss, "mc_loss": mc_loss, "gradient_norm": norm}

    return Engine(step)


def build_evaluator(model, device: torch.device):
    """An ignite engine that leaves nll, token_ppl and hits@1 of a whole split in `state.metrics`."""
    from ignite.engine import Engine, Events

    from model import gold_ranks

    @torch.inference_mode()
    def evaluate(engine: Engine, batch: Batch) -> None:
        batch = batch.to(device)
        output = model(batch)
        sums = engine.state.sums  # exact sums and counts: no average of averages
        sums["nll"] += output.lm_nll.double().sum().item()
        sums["tokens"] += len(batch.lm_labels)
        sums["hits"] += (gold_ranks(output, batch) == 0).sum().item()
        sums["utterances"] += len(batch.n_candidates)

    evaluator = Engine(evaluate)

    @evaluator.on(Events.STARTED)
    def reset(engine: Engine) -> None:
        model.eval()
        engine.state.sums = dict.fromkeys(("nll", "tokens", "hits", "utterances"), 0.0)

    @evaluator.on(Events.COMPLETED)
    def compute(engine: Engine) -> None:
        sums = engine.state.sums
        nll = sums["nll"] / sums["tokens"]
        hits = sums["hits"] / sums["utterances"]
        engine.state.metrics |= {"nll": nll, "token_ppl": math.exp(min(nll, 700)), "hits@1": hits}

    return evaluator


# ------------------------------------------------------------------------------------------------------------
# The run
# ------------------------------------------------------------------------------------------------------------


def save(model, tokenizer, args: argparse.Namespace, folder: Path) -> None:
    """Make `folder` a checkpoint that loads here and in plain transformers."""
    try:
        (folder / "training_args.json").write_text(json.dumps(vars(args), indent=2) + "\n", encoding="utf-8")
        tokenizer.save(folder)
        model.save(folder)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error}; free some space there") from error


def attach_logging(trainer, evaluator, optimizer, folder: Path):
    """Progress bars and TensorBoard events; the events' writer, to be closed at the end."""
    from ignite.engine import Events
    from ignite.handlers import ProgressBar
    from ignite.handlers.tensorboard_logger import TensorboardLogger

    bar = "{desc} {n_fmt}/{total_fmt} {percentage:3.0f}%|{bar}|{postfix} [{elapsed}<{remaining}, {rate_fmt}]"
    ProgressBar(bar_format=bar, desc="train", unit="step").attach(
        trainer, output_transform=lambda output: {"loss": output["loss"].item()}
    )
    ProgressBar(bar_format=bar, desc="evaluate", unit="batch").attach(evaluator)
    board = TensorboardLogger(log_dir=folder)
    board.attach_output_handler(trainer, Events.ITERATION_COMPLETED, "training", output_transform=lambda output: output)
    board.attach_opt_params_handler(trainer, Events.ITERATION_STARTED, optimizer)
    board.attach_output_handler(
        evaluator,
        Events.COMPLETED,
        "validation",
        metric_names=["nll", "token_ppl", "hits@1"],
        global_step_transform=lambda *_: trainer.state.iteration,
    )
    return board


def refuse_unfinished(args: argparse.Namespace) -> None:
    if args.fp16:
        raise UserError(f"--fp16 {args.fp16} is not there yet; leave it out to train in fp32")
    if args.local_rank != -1:
        raise UserError(
            "--local_rank: training on several processes is not there yet; start train.py without a launcher"
        )


def main() -> None:
    args = parse_args()
    refuse_unfinished(args)
    device = check_device(args.device)
    set_seed(args.seed)

    # Heavy imports come after the options are known to be right, so that a mistake is told at once.
    from ignite.engine import Events
    from ignite.handlers import PiecewiseLinear

    from model import load_model

    logging.getLogger("ignite").setLevel(logging.WARNING)
    files = find_model(args.model)
    tokenizer = load_tokenizer(files, args.pre_tokenizer, lambda: training_texts(args.dataset_path, args.valid_path))
    splits = load_dataset(args.dataset_path, args.valid_path, args.dataset_cache, tokenizer)
    model = load_model(files, tokenizer, device, from_scratch=True)

    build = partial(Instances, ids=tokenizer.ids, max_history=args.max_history, limit=model.limit)
    train = build(splits["train"], num_candidates=args.num_candidates, permutations=args.personality_permutations)
    valid = build(splits["valid"])
    if not len(train) and args.n_epochs:
        raise UserError(f"the training split of {args.dataset_path or 'PersonaChat'} holds no reply; nothing to learn")
    for name, instances in (("training", train), ("validation", valid)):
        instances.report_cuts(name)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    log.info(
        f"{parameters / 1e6:.1f}M parameters, {len(train)} training and {len(valid)} validation utterances, {device}"
    )

    step_size = args.train_batch_size * args.gradient_accumulation_steps
    sampler = StepSampler(len(train), step_size, args.seed)
    collate_micro = partial(collate_step, batch_size=args.train_batch_size, ids=tokenizer.ids)
    train_loader = DataLoader(train, batch_sampler=sampler, collate_fn=collate_micro)
    valid_loader = batches_by_length(valid, args.valid_batch_size)

    # AdamW as the original's library had it: no weight decay, epsilon 1e-6 (torch's defaults differ).
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, eps=1e-6, weight_decay=0.0)
    trainer = build_trainer(model, optimizer, args, device)
    evaluator = build_evaluator(model, device)
    folder = new_run_folder(args.model)
    board = attach_logging(trainer, evaluator, optimizer, folder)

    total = max(1, args.n_epochs * len(sampler))
    trainer.add_event_handler(Events.ITERATION_STARTED, PiecewiseLinear(optimizer, "lr", [(0, args.lr), (total, 0.0)]))
    trainer.add_event_handler(Events.EPOCH_STARTED, lambda engine: setattr(sampler, "epoch", engine.state.epoch))

    def evaluate_and_save() -> None:
        metrics = evaluator.run(valid_loader).metrics
        log.info(
            f"epoch {trainer.state.epoch}: validation Hits@1 {metrics['hits@1']:.3f}, "
            f"token PPL {metrics['token_ppl']:.2f} (nll {metrics['nll']:.4f})"
        )
        save(model, tokenizer, args, folder)

    with board:
        if args.eval_before_start or not args.n_epochs:
            evaluate_and_save()
        trainer.add_event_handler(Events.EPOCH_COMPLETED, evaluate_and_save)
        if args.n_epochs:
            trainer.run(train_loader, max_epochs=args.n_epochs)
    dataset = f" --dataset_path {shlex.quote(args.dataset_path)}" if args.dataset_path else ""
    log.info(
        f"saved in {folder}\ntalk to it: python interact.py --model_checkpoint {shlex.quote(str(folder))}{dataset}"
    )


if __name__ == "__main__":
    run_script(main)
