"""Fine-tune a causal language model on dialogs with two heads: language modelling and multiple choice.

One process, or many under torchrun: every process has the whole model and a share of each batch.
"""

import argparse
import contextlib
import gc
import json
import logging
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from cli import (
    Parser,
    UserError,
    add_local_rank,
    add_model_options,
    add_seed,
    add_valid_path,
    all_sum,
    first_line,
    gather,
    join_processes,
    log,
    number,
    printable,
    rank_and_size,
    run_script,
    set_seed,
)
from dialogs import training_texts
from files import (
    HUB_NAMES,
    ModelFiles,
    find_model,
    find_run,
    is_url,
    remove_unfinished,
    typed_path,
    whole_files,
)
from inputs import Batch, Instance, Instances, batches_by_length, collate
from runs import (
    RUNS,
    Progress,
    launcher,
    new_run_folder,
    newest_checkpoint,
    open_log,
    restore,
    run_of_launchers,
    save_checkpoint,
    write_settings,
)
from utils import SpecialIds, load_dataset, load_tokenizer


def build_parser() -> Parser:
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
    add_seed(parser, "of everything random")
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument(
        "--fp16",
        choices=["", "O0", "O1", "O2", "O3"],
        default="",
        help="mixed precision by apex's names. O0: none; O1: autocast; O2: fp16 weights, fp32 master weights; O3: fp16",
    )
    precision.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="use less memory and more time")
    parser.add_argument("--runs_dir", default=str(RUNS), help="where run folders are made")
    parser.add_argument(
        "--save_every", type=number(int, 0), default=500, help="steps between checkpoints (0: only after epochs)"
    )
    parser.add_argument("--keep_best", action="store_true", help="keep the epoch of best Hits@1, and not the last one")
    parser.add_argument("--resume", default="", help="go on with this run folder, such as runs/latest, and its options")
    add_local_rank(parser)
    return parser


def parse_args() -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_args()
    local = is_url(args.model) or os.path.exists(os.path.expanduser(args.model))
    args.base_model = "" if local else HUB_NAMES.get(args.model, args.model)  # kept: a run may go on in another folder
    return resumed_args(parser, args) if args.resume else args


# What a run may change when it goes on. The rest decides what its steps compute.
CHANGEABLE = {
    "resume",
    "local_rank",
    "runs_dir",
    "device",
    "dataset_cache",
    "n_epochs",
    "save_every",
    "keep_best",
    "eval_before_start",
    "gradient_checkpointing",
    "valid_batch_size",
    "train_batch_size",
    "gradient_accumulation_steps",
}


def resumed_args(parser: Parser, args: argparse.Namespace) -> argparse.Namespace:
    """The options that a run was started with, and those of this command line that may differ from them."""
    path = find_run(args.resume) / "training_args.json"
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        before = argparse.Namespace(**{"base_model": ""} | saved)  # older runs do not say what they started from
        args = parser.parse_args(namespace=before)  # only what was given replaces what was saved
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot read {path}: {first_line(error)}; expected what train.py wrote") from error
    for name, value in saved.items():
        if name not in CHANGEABLE and getattr(args, name) != value:
            raise UserError(
                f"--{name} {getattr(args, name)}: {path.parent} was started with '{value}', and a run cannot change "
                "that; leave the option out, or start a new run"
            )
    return args


# ------------------------------------------------------------------------------------------------------------
# Processes
# ------------------------------------------------------------------------------------------------------------


def leave_processes(learner: "Learner") -> None:
    """Leave the process group, if this process is in one."""
    if dist.is_initialized():
        learner.parallel = learner.model
        gc.collect()  # DDP goes first: as the last to hold the group it can wait for the group's threads for ever
        dist.destroy_process_group()


class Stopped(Exception):
    """Training was asked to end, and all processes stand between the same two steps."""


class StopSignal:
    """Notes SIGTERM and Ctrl-C while it is entered, for training to end at the next step; a second Ctrl-C kills."""

    number = 0

    def __enter__(self) -> "StopSignal":
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number: int, frame) -> None:
        self.number = number
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if os.environ.get("RANK", "0") == "0":  # os.write: a signal may come amid another write
            os.write(2, b"\nstopping after this step; Ctrl-C again stops at once, without saving\n")

    def __exit__(self, *exception) -> None:
        for which, handler in self.before.items():
            signal.signal(which, handler)


# ------------------------------------------------------------------------------------------------------------
# Batches
# ------------------------------------------------------------------------------------------------------------


class StepSampler:
    """This process's share of each optimiser step, in an order that depends on seed and epoch alone.

    Args:
        size: utterances in an epoch.
        step_size: utterances of a step, over all processes. Process `rank` gets each `world_size`-th of them; of
            an epoch's last step maybe none.
    """

    def __init__(self, size: int, step_size: int, seed: int, rank: int = 0, world_size: int = 1):
        self.size, self.step_size, self.seed = size, step_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch, self.start = 0, 0  # the epoch's first `start` utterances are left out

    def __len__(self) -> int:
        return math.ceil(self.size / self.step_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.size).tolist()
        steps = [order[i : i + self.step_size] for i in range(self.start, self.size, self.step_size)]
        return iter([step[self.rank :: self.world_size] for step in steps])

    def steps_left(self) -> int:
        """Steps from `start` to the epoch's end."""
        return math.ceil((self.size - self.start) / self.step_size)


def collate_step(
    instances: list[Instance], batch_size: int, ids: SpecialIds, filler: Instance
) -> tuple[list[Batch], int]:
    """A process's share of an optimiser step as micro-batches, instances of like length together; and their weight.

    The losses are means over the whole step, so how it is cut does not change it. Every process must take part in
    every step, so an empty share is the filler, of weight 0.
    """
    weight = 1 if instances else 0
    instances = sorted(instances, key=lambda instance: len(instance.prefix) + sum(map(len, instance.candidates)))
    instances = instances or [filler]
    return [collate(instances[i : i + batch_size], ids) for i in range(0, len(instances), batch_size)], weight


# ------------------------------------------------------------------------------------------------------------
# Precision
# ------------------------------------------------------------------------------------------------------------


class Learner:
    """A model, its optimiser and loss scaler, at one of apex's levels of precision (or bf16).

    O0: all fp32. O1: fp32 weights, autocast to fp16, a loss scaler. O2: fp16 weights, fp32 master weights that the
    optimiser works on, a loss scaler. O3: all fp16, no scaler. bf16: fp32 weights, autocast.

    Attributes:
        model: to save and to look into.
        parallel: the same to call; under a launcher its backward pass averages the gradients over all processes.
    """

    def __init__(self, model, args: argparse.Namespace, device: torch.device):
        self.model, self.device = model, device
        self.weights = list(model.parameters())  # what the optimiser works on
        self.autocast_to = torch.float16 if args.fp16 == "O1" else torch.bfloat16 if args.bf16 else None
        self.has_masters = args.fp16 == "O2"
        if self.has_masters:
            self.weights = [weight.detach().clone().requires_grad_() for weight in self.weights]
        if args.fp16 in ("O2", "O3"):
            model.half()
        # AdamW as the original's library had it: no weight decay, epsilon 1e-6 (torch's defaults differ). In O3 the
        # squared gradients are often 0 in fp16 and such an epsilon makes endless steps: seen NaN from step 2 with 1e-8
        # and 1e-6, a rising loss with 1e-5, and the lowest losses with 1e-4.
        epsilon = 1e-4 if args.fp16 == "O3" else 1e-6
        self.optimizer = torch.optim.AdamW(self.weights, lr=args.lr, eps=epsilon, weight_decay=0.0, fused=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=args.fp16 in ("O1", "O2"))
        if args.gradient_checkpointing:
            model.checkpoint_gradients()
        self.parallel = model
        if dist.is_initialized():
            self.parallel = DistributedDataParallel(model, gradient_as_bucket_view=True)

    def autocast(self):
        return torch.autocast(self.device.type, self.autocast_to, enabled=self.autocast_to is not None)

    def synchronised(self, last: bool):
        """Around a forward and backward pass: gradients are averaged over the processes in a step's last one only."""
        return contextlib.nullcontext() if last or self.parallel is self.model else self.parallel.no_sync()

    def clip_gradients(self, max_norm: float) -> float:
        """Undo the loss scale, clip to `max_norm`; the norm before."""
        if self.has_masters:
            for master, weight in zip(self.weights, self.model.parameters(), strict=True):
                master.grad = None if weight.grad is None else weight.grad.float()
        self.scaler.unscale_(self.optimizer)
        return torch.nn.utils.clip_grad_norm_(self.weights, max_norm).item()

    def update(self, finite: bool) -> None:
        """Take a step with the gradients, or only adapt the loss scale to their not being finite; forget them."""
        if finite:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.has_masters:
            with torch.no_grad():
                for weight, master in zip(self.model.parameters(), self.weights, strict=True):
                    weight.copy_(master)
        self.optimizer.zero_grad(set_to_none=True)
        self.model.zero_grad(set_to_none=True)

    def state_dict(self) -> dict:
        return {
            "model": self.model.state_dict(),
            "masters": self.weights if self.has_masters else [],
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        with torch.no_grad():
            for master, saved in zip(self.weights, state["masters"], strict=False):  # none are saved but in O2
                master.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])


# ------------------------------------------------------------------------------------------------------------
# Trainer and evaluator
# ------------------------------------------------------------------------------------------------------------

PATIENCE = 10  # steps in a row that are not finite


def build_trainer(
    learner: Learner, sampler: StepSampler, progress: Progress, stop: StopSignal, args: argparse.Namespace
):
    """An ignite engine whose iteration is one optimiser step, its batch this process's micro-batches."""
    from ignite.engine import Engine, Events

    device, world_size = learner.device, sampler.world_size

    def step(engine: Engine, share: tuple[list[Batch], int]) -> dict[str, float]:
        learner.model.train()
        batches, weight = share
        tokens, utterances, stops = all_sum(
            weight * sum(len(batch.lm_labels) for batch in batches),
            weight * sum(len(batch.n_candidates) for batch in batches),
            bool(stop.number),
            device=device,
        )
        if stops:
            raise Stopped
        lm_loss, mc_loss = torch.zeros(2, device=device)
        for batch in batches:
            with learner.synchronised(last=batch is batches[-1]):
                batch = batch.to(device)
                with learner.autocast():
                    output = learner.parallel(batch)
                lm_part = weight * output.lm_nll.sum() / tokens
                mc_sum = F.cross_entropy(output.mc_logits, batch.n_candidates - 1, reduction="sum")
                mc_part = weight * mc_sum / utterances
                loss = world_size * (args.lm_coef * lm_part + args.mc_coef * mc_part)  # to be averaged over processes
                learner.scaler.scale(loss).backward()
            lm_loss, mc_loss = lm_loss + lm_part.detach(), mc_loss + mc_part.detach()
        lm_loss, mc_loss = all_sum(lm_loss.item(), mc_loss.item(), device=device)
        loss, norm = args.lm_coef * lm_loss + args.mc_coef * mc_loss, learner.clip_gradients(args.max_norm)
        finite = math.isfinite(loss) and math.isfinite(norm)
        learner.update(finite)
        progress.step += 1
        progress.done = min(progress.done + sampler.step_size, sampler.size)
        progress.skipped += not finite
        progress.skipped_in_a_row = 0 if finite else progress.skipped_in_a_row + 1
        if progress.skipped_in_a_row == PATIENCE:
            raise UserError(
                f"the loss or its gradients were not finite in {PATIENCE} steps in a row, up to step {progress.step}; "
                "expected numbers: try a lower --lr, or --bf16 or no --fp16, in a new run"
            )
        return {
            "loss": loss,
            "lm_loss": lm_loss,
            "mc_loss": mc_loss,
            "gradient_norm": norm,
            "lr": learner.optimizer.param_groups[0]["lr"],
            "utterances/s": utterances / (time.monotonic() - engine.state.asked),
            "skipped": progress.skipped,
        }

    trainer = Engine(step)

    @trainer.on(Events.EPOCH_STARTED)
    def begin_epoch() -> None:
        if progress.done == sampler.size:
            progress.epoch, progress.done = progress.epoch + 1, 0
        sampler.epoch, sampler.start = progress.epoch, progress.done

    @trainer.on(Events.GET_BATCH_STARTED)
    def start_clock() -> None:
        trainer.state.asked = time.monotonic()

    @trainer.on(Events.ITERATION_STARTED)
    def set_learning_rate() -> None:
        # In steps of this run's size, of which a run that was on another number of processes may hold a part.
        taken = (progress.epoch - 1) * len(sampler) + progress.done / sampler.step_size
        for group in learner.optimizer.param_groups:
            group["lr"] = args.lr * (1 - taken / (args.n_epochs * len(sampler)))

    return trainer


def build_evaluator(learner: Learner, stop: StopSignal):
    """An ignite engine that leaves nll, token_ppl and hits@1 of a whole split in `state.metrics`, in every process."""
    from ignite.engine import Engine, Events

    from model import gold_ranks

    @torch.inference_mode()
    def evaluate(engine: Engine, batch: Batch | None) -> None:
        if stop.number:
            engine.terminate()
        elif batch is not None:
            batch = batch.to(learner.device)
            with learner.autocast():
                output = learner.model(batch)
            sums = engine.state.sums  # exact sums and counts: no average of averages
            sums["nll"] += output.lm_nll.cpu().double().sum().item()  # not every device has float64
            sums["tokens"] += len(batch.lm_labels)
            sums["hits"] += (gold_ranks(output, batch) == 0).sum().item()
            sums["utterances"] += len(batch.n_candidates)

    evaluator = Engine(evaluate)

    @evaluator.on(Events.STARTED)
    def reset(engine: Engine) -> None:
        learner.model.eval()
        engine.state.sums = dict.fromkeys(("nll", "tokens", "hits", "utterances"), 0.0)

    @evaluator.on(Events.COMPLETED)
    def compute(engine: Engine) -> None:
        sums = engine.state.sums.values()
        nll, tokens, hits, utterances, stops = all_sum(*sums, bool(stop.number), device=learner.device)
        if stops:
            raise Stopped
        nll, hits = nll / tokens, hits / utterances
        engine.state.metrics |= {"nll": nll, "token_ppl": math.exp(min(nll, 700)), "hits@1": hits}

    return evaluator


SAMPLES = 4  # validation utterances that each evaluation shows a reply to


def sample_replies(model, valid: Instances, tokenizer, seed: int) -> list[dict]:
    """Replies to a few utterances, always the same ones, drawn as interact.py does by default.

    Each has a generator of its own, so that nothing else that is random changes.
    """
    from generation import Decoding, generate_replies

    rows = range(0, len(valid), math.ceil(len(valid) / SAMPLES))
    prefixes, rooms = zip(*(valid.prefix(row, min(Decoding.max_length, model.limit // 2)) for row in rows), strict=True)
    generators = [torch.Generator().manual_seed(seed + row) for row in rows]
    replies = generate_replies(model, prefixes, replace(Decoding(), max_length=min(rooms)), generators)
    return [
        {
            "persona": valid.split.persona_texts(row),
            "history": (valid.split.history_texts(row) or [""])[-1],
            "gold": valid.split.gold_text(row),
            "reply": tokenizer.decode(reply),
        }
        for row, reply in zip(rows, replies, strict=True)
    ]


# ------------------------------------------------------------------------------------------------------------
# Checkpoints
# ------------------------------------------------------------------------------------------------------------


# ------------------------------------------------------------------------------------------------------------
# The run folder
# ------------------------------------------------------------------------------------------------------------


def run_to_go_on_with(args: argparse.Namespace, launchers: set[str]) -> Path | None:
    """The folder of --resume, or of the run that these launchers had begun before a restart; in every process."""
    if args.resume:
        return find_run(args.resume)
    found = run_of_launchers(launchers, typed_path(args.runs_dir)) if rank_and_size()[0] == 0 else None
    return gather(found)[0]


def begin_run(args: argparse.Namespace, launchers: set[str]) -> Path:
    """Make a run folder, on rank 0; its path, in every process."""
    made = new_run_folder(args.model, typed_path(args.runs_dir), launchers) if rank_and_size()[0] == 0 else None
    return gather(made)[0]


def launch_command() -> str:
    """What starts as many processes as there are now."""
    size = rank_and_size()[1]
    return "python" if size == 1 else f"torchrun --nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE', size)}"


def training_command(args: argparse.Namespace) -> str:
    """The command that trains so, with the options that are not as by default; where files are kept is left out."""
    words = []
    for name, default in vars(build_parser().parse_args([])).items():
        value = getattr(args, name)
        if value != default and name not in ("resume", "local_rank", "runs_dir", "dataset_cache", "device"):
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return f"{launch_command()} train.py {shlex.join(words)}".rstrip()


@contextlib.contextmanager
def logging_to(
    folder: Path, trainer, evaluator, progress: Progress, sample: Callable[[], list[dict]]
) -> Iterator[None]:
    """Progress bars, `log.jsonl` and TensorBoard events while the body runs; what `sample` gives at each evaluation."""
    from ignite.engine import Events
    from ignite.handlers import ProgressBar
    from tensorboardX import SummaryWriter

    bar = "{desc} {n_fmt}/{total_fmt} {percentage:3.0f}%|{bar}|{postfix} [{elapsed}<{remaining}, {rate_fmt}]"

    def shown(output: dict[str, float]) -> dict[str, float]:
        return {name: output[name] for name in ("loss", "utterances/s", "skipped") if name != "skipped" or output[name]}

    bars = (
        ProgressBar(bar_format=bar, desc="train", unit="step"),
        ProgressBar(bar_format=bar, desc="evaluate", unit="batch"),
    )
    bars[0].attach(trainer, output_transform=shown)
    bars[1].attach(evaluator)
    append = open_log(folder, progress.step)
    board = SummaryWriter(str(folder), purge_step=progress.step + 1 if progress.step else None)

    def record(tag: str, found: dict[str, float]) -> None:
        append({"step": progress.step, "epoch": progress.epoch} | found)
        for name, value in found.items():
            board.add_scalar(f"{tag}/{name}", value, progress.step)

    @trainer.on(Events.ITERATION_COMPLETED)
    def tell_step() -> None:
        record("training", trainer.state.output)

    @evaluator.on(Events.COMPLETED)
    def tell_validation() -> None:
        metrics = evaluator.state.metrics
        record("validation", metrics)
        log.info(
            f"epoch {progress.epoch if progress.step else 0}: validation Hits@1 {metrics['hits@1']:.3f}, "
            f"token PPL {metrics['token_ppl']:.2f} (nll {metrics['nll']:.4f})"
        )
        replies = sample() if math.isfinite(metrics["nll"]) else []  # else there is nothing to draw from
        append({"step": progress.step, "epoch": progress.epoch, "replies": replies})
        for i, reply in enumerate(replies, 1):
            log.info(f"  {printable(reply['history'])[-60:]} -> {reply['reply']}")
            lines = [f"    {name}: {' '.join(text) if name == 'persona' else text}" for name, text in reply.items()]
            board.add_text(f"replies/{i}", "\n".join(lines), progress.step)

    try:
        with board:
            yield
    finally:
        for each in bars:
            if each.pbar is not None:
                each.pbar.close()  # what is said next begins a line of its own


# ------------------------------------------------------------------------------------------------------------
# The run
# ------------------------------------------------------------------------------------------------------------


def main() -> None:
    args = parse_args()
    device = join_processes(args)
    set_seed(args.seed)

    from ignite.distributed import one_rank_first

    logging.getLogger("ignite").setLevel(logging.CRITICAL)  # it logs exceptions that are raised all the same
    logging.getLogger("matplotlib").setLevel(logging.CRITICAL)  # it tells of its caches where HOME cannot be written
    rank, world_size = rank_and_size()
    launchers = set(gather(launcher())) - {""}
    folder = run_to_go_on_with(args, launchers)
    state = newest_checkpoint(folder) if folder else None
    with one_rank_first(local=True):  # of each node: it downloads and tokenises, the others find it done
        files = ModelFiles(folder) if state else find_model(args.model)
        texts = partial(training_texts, args.dataset_path, args.valid_path)
        tokenizer = load_tokenizer(files, args.pre_tokenizer, texts)
        splits = load_dataset(args.dataset_path, args.valid_path, args.dataset_cache, tokenizer, progress=rank == 0)
        from model import load_model

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
        + (f" and {world_size - 1} more" if world_size > 1 else "")
    )

    learner, progress = Learner(model, args, device), Progress()
    set_seed(args.seed + rank)  # dropout differs between processes
    if state:
        restore(state, learner, progress, len(train), args)
        log.info(f"going on with {folder} after step {progress.step}, in epoch {progress.epoch}")
    del state
    folder = folder or begin_run(args, launchers)
    if rank == 0:
        remove_unfinished(folder)
        remove_unfinished(folder / "checkpoints")
        write_settings(folder, model, tokenizer, args)
    fit(learner, progress, train, valid, args, folder, tokenizer)
    dataset = f" --dataset_path {shlex.quote(args.dataset_path)}" if args.dataset_path else ""
    log.info(
        f"saved in {folder}\ntalk to it: python interact.py --model_checkpoint {shlex.quote(str(folder))}{dataset}"
    )
    leave_processes(learner)


def fit(
    learner: Learner,
    progress: Progress,
    train: Instances,
    valid: Instances,
    args: argparse.Namespace,
    folder: Path,
    tokenizer,
) -> None:
    """Train from `progress` to the end, with an evaluation after every epoch; or to a signal, and exit."""
    from ignite.engine import Events

    from runs import describe

    rank, world_size = rank_and_size()
    step_size = args.train_batch_size * args.gradient_accumulation_steps * world_size
    sampler = StepSampler(len(train), step_size, args.seed, rank, world_size)
    filler = train[0] if len(train) else None
    collate_micro = partial(collate_step, batch_size=args.train_batch_size, ids=train.special_ids, filler=filler)
    # A generator of its own: each pass draws a seed, which must not move the generator that dropout draws from.
    train_loader = DataLoader(train, batch_sampler=sampler, collate_fn=collate_micro, generator=torch.Generator())
    valid_loader = batches_by_length(valid, args.valid_batch_size, rank=rank, world=world_size)

    stop = StopSignal()
    trainer = build_trainer(learner, sampler, progress, stop, args)
    evaluator = build_evaluator(learner, stop)

    def save_state() -> None:
        save_checkpoint(folder, learner, progress, len(train))

    def save_state_in_between() -> None:
        if args.save_every and progress.step % args.save_every == 0 and progress.done < len(train):
            save_state()

    def evaluate_and_save() -> None:
        # No batches become an empty one: every process must take part in the sums.
        metrics = evaluator.run(valid_loader if len(valid_loader) else [None]).metrics
        score = metrics["hits@1"], -metrics["nll"]
        better = not args.keep_best or progress.best is None or score > tuple(progress.best)
        if better:
            progress.best = score if progress.step else None  # what stood before the first step is no epoch
        if rank == 0:
            with whole_files(folder) as partial:  # which has its place right after the weights that it describes
                describe(partial, folder, progress.best, args, training_command(args), tokenizer.pre_tokenizer)
                if better:
                    learner.model.save(folder)

    def save_state_and_evaluate() -> None:
        save_state()  # first: what is resumed from here evaluates again
        evaluate_and_save()

    with stop:
        try:
            sample = partial(sample_replies, learner.model, valid, tokenizer, args.seed)
            logs = logging_to(folder, trainer, evaluator, progress, sample)
            with logs if rank == 0 else contextlib.nullcontext():
                # Behind the logging: a step that a checkpoint holds is in the log.
                trainer.add_event_handler(Events.ITERATION_COMPLETED, save_state_in_between)
                trainer.add_event_handler(Events.EPOCH_COMPLETED, save_state_and_evaluate)
                if (progress.done == len(train)) if progress.step else (args.eval_before_start or not args.n_epochs):
                    evaluate_and_save()
                if args.n_epochs and (progress.epoch < args.n_epochs or progress.done < len(train)):
                    sampler.start = progress.done
                    done = progress.epoch * len(sampler) - sampler.steps_left()
                    trainer.load_state_dict(
                        {"iteration": done, "epoch_length": len(sampler), "max_epochs": args.n_epochs}
                    )
                    trainer.run(train_loader, max_epochs=args.n_epochs)
        except Stopped:
            save_state()
            gather("saved")  # a launcher ends all processes when the first one ends
            log.info(
                f"stopped after step {progress.step}, saved in {folder}\n"
                f"go on with: {launch_command()} train.py --resume {shlex.quote(str(folder))}"
            )
            leave_processes(learner)
            sys.exit(128 + (stop.number or signal.SIGTERM))


if __name__ == "__main__":
    run_script(main)
