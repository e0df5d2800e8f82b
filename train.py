"""Fine-tune a causal language model on dialogs with two heads: language modelling and multiple choice.

One process, or many under torchrun: every process holds the whole model and takes a share of every step.
"""

import contextlib
import json
import logging
import math
import os
import shlex
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from ignite.utils import manual_seed

from adapters import save_adapter
from batches import Batch, batches_by_length, load_batches
from card import describe
from checkpoints import Progress, checkpoint_files, newest_checkpoint, restore, save_checkpoint
from cli import UserError, first_line, join_processes, log, run_script
from dialogs import Dialogs
from files import is_url, typed_path, whole_files
from inputs import Instances, sentences_inside
from learner import Learner, LearningSettings, StepSampler, Stopped, collate_step, optimizer_step, sum_over_processes
from model_files import ADAPTER, HUB_NAMES, ModelFiles, find_model, find_run, lasting_name
from options import MAX_HISTORY, DatasetSettings, Decoding, Parser, option
from processes import StopSignal, launch_command, launcher, leave_processes
from rows import DialogRows
from runs import (
    OF_ONE_START,
    RUNS,
    hold_run,
    logging_to,
    new_run_folder,
    progress_bars,
    recognize_dataset,
    run_of_launchers,
    write_settings,
)
from splits import Split
from template import set_template
from utils import load_dataset, load_tokenizer

# ------------------------------------------------------------------------------------------------------------
# Settings
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingSettings(LearningSettings, DatasetSettings):
    """Options of train.py."""

    num_candidates: int = option(2, "candidates per training utterance", low=1)
    train_batch_size: int = option(4, "utterances per forward pass", low=1, may_change=True)
    valid_batch_size: int = option(4, "the same for validation", low=1, may_change=True)
    gradient_accumulation_steps: int = option(8, "forward passes per optimiser step", low=1, may_change=True)
    n_epochs: int = option(3, "passes over the data (0: evaluate and save)", low=0, may_change=True)
    token_types: bool | None = option(
        None,
        "add its speaker's embedding to each token's, as the paper does; default: on for openai-gpt and gpt2, off for "
        "other base models, whose checkpoints then work in every engine; a fine-tuned one's own choice",
    )
    personality_permutations: int = option(1, "rotations of each persona", low=1)
    eval_before_start: bool = option(False, "evaluate before the first step too", may_change=True)
    save_every: int = option(500, "steps between checkpoints (0: only after epochs)", low=0, may_change=True)
    keep_best: bool = option(False, "keep the epoch of best Hits@1, and not the last one", may_change=True)
    runs_dir: str = option(str(RUNS), "where run folders are made", may_change=True)
    resume: str = option("", "go on with this run folder, such as runs/latest, and its options", may_change=True)
    lora_save: str = option(
        "both",
        "with --lora: write the merged model and the adapter, or the adapter only",
        choices=("both", "adapter"),
    )
    changed_dataset: bool = option(
        False, "with --resume: go on though the dataset is not the one it was started with", may_change=True
    )
    dataset_digest: str = ""  # of the dataset's content, by which a run knows it
    base_model: str = ""  # the hub's id of what training started from; "" where it has none
    lora_base: str = ""  # what the adapter of --lora names as its base

    def __post_init__(self):
        super().__post_init__()
        for name in ("dataset_digest", "base_model", "lora_base"):
            if not isinstance(value := getattr(self, name), str):
                raise UserError(f"{name}: expected text, found {value!r}")
        if self.max_history is None:
            object.__setattr__(self, "max_history", MAX_HISTORY)
        if self.lora_save == "adapter" and not self.lora:
            raise UserError("--lora_save adapter without --lora; give a rank, such as --lora 16")

    @property
    def step_size(self) -> int:
        """Utterances that one process takes in one optimiser step."""
        return self.train_batch_size * self.gradient_accumulation_steps


def parse_settings() -> TrainingSettings:
    """The options of the command line; of a run that is resumed, with the options that it was started with."""
    parser = Parser(__doc__, TrainingSettings)
    settings = TrainingSettings.from_args(parser.parse_args())
    if settings.resume:
        return resumed_settings(parser, find_run(settings.resume))
    local = is_url(settings.model) or os.path.exists(os.path.expanduser(settings.model))
    base_model = "" if local else HUB_NAMES.get(settings.model, settings.model)
    return replace(settings, base_model=base_model, lora_base=lasting_name(settings.model) if settings.lora else "")


def resumed_settings(parser: Parser, folder: Path) -> TrainingSettings:
    """The options that a run was started with, and those of this command line that may differ from them.

    Raises:
        UserError: training_args.json is not what train.py wrote, or an option differs that decides what steps compute.
    """
    path = folder / "training_args.json"
    try:
        saved = TrainingSettings(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError, UserError) as error:
        raise UserError(f"cannot read {path}: {first_line(error)}; expected what train.py wrote") from error
    parser.set_defaults(**asdict(saved))  # so that only what was given replaces what was saved
    settings = TrainingSettings.from_args(parser.parse_args())
    for name, known in TrainingSettings.options().items():
        before, now = getattr(saved, name), getattr(settings, name)
        if now != before and not known.metadata["may_change"]:
            raise UserError(
                f"--{name} {now}: {folder} was started with '{before}', and a run cannot change that; "
                "leave the option out, or start a new run"
            )
    return settings


def training_command(settings: TrainingSettings) -> str:
    """The command that trains so: the options that differ from their defaults, without those that only name places."""
    words = []
    for name, known in settings.options().items():
        value = getattr(settings, name)
        left_out = value == known.default
        if known.default is None:  # then the other options decide it
            left_out = replace(settings, **{name: None}) == settings
        if not left_out and name not in (*OF_ONE_START, "runs_dir", "dataset_cache", "device"):
            flag = [f"--{name}"] if value else [f"--no_{name}"]
            words += flag if isinstance(value, bool) else [f"--{name}", str(value)]
    return f"{launch_command()} train.py {shlex.join(words)}".rstrip()


# ------------------------------------------------------------------------------------------------------------
# Trainer and evaluator
# ------------------------------------------------------------------------------------------------------------

PATIENCE = 10  # steps in a row that are not finite


def build_trainer(
    learner: Learner, sampler: StepSampler, progress: Progress, stop: StopSignal, settings: TrainingSettings
) -> Engine:
    """An ignite engine whose iteration is one optimiser step, its batch this process's micro-batches."""

    def step(engine: Engine, share: tuple[list[Batch], int]) -> dict[str, float]:
        learner.model.train()
        output = optimizer_step(learner, *share, stop.asked, settings)
        progress.count_step(sampler, math.isfinite(output["loss"]) and math.isfinite(output["gradient_norm"]))
        if progress.skipped_in_a_row == PATIENCE:
            raise UserError(
                f"the loss or its gradients were not finite in {PATIENCE} steps in a row, up to step {progress.step}; "
                "expected numbers: try a lower --lr, or --bf16 or no --fp16, in a new run"
            )
        seconds = time.monotonic() - engine.state.asked  # waiting for the batch is part of it
        utterances = output.pop("utterances")
        return output | {"utterances/s": utterances / seconds, "skipped": progress.skipped}

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
        # In steps of this run's size. A run that was on another number of processes may have done a part of one.
        taken = (progress.epoch - 1) * len(sampler) + progress.done / sampler.step_size
        for group in learner.optimizer.param_groups:
            group["lr"] = settings.lr * (1 - taken / (settings.n_epochs * len(sampler)))

    return trainer


def build_evaluator(learner: Learner, stop: StopSignal) -> Engine:
    """An ignite engine that leaves nll, token_ppl and hits@1 of a whole split in `state.metrics`, in every process."""
    from model import gold_ranks

    # A GPU keeps the sums until the end, so that it need not be waited for. Not every device has float64.
    place = learner.device if learner.device.type == "cuda" else torch.device("cpu")

    @torch.inference_mode()
    def evaluate(engine: Engine, batch: Batch | None) -> None:
        if stop.asked:
            engine.terminate()
        elif batch is not None:
            batch = batch.to(learner.device)
            with learner.autocast():
                output = learner.model(batch)
            sums = engine.state.sums  # sums and counts are exact; an average of averages is not
            sums["nll"] += output.lm_nll.to(place).double().sum()
            sums["tokens"] += len(batch.lm_labels)
            sums["hits"] += (gold_ranks(output, batch) == 0).sum().to(place)
            sums["utterances"] += len(batch.n_candidates)

    evaluator = Engine(evaluate)

    @evaluator.on(Events.STARTED)
    def reset(engine: Engine) -> None:
        learner.model.eval()
        engine.state.sums = dict.fromkeys(("nll", "tokens", "hits", "utterances"), 0.0)

    @evaluator.on(Events.COMPLETED)
    def compute(engine: Engine) -> None:
        sums = map(float, engine.state.sums.values())
        nll, tokens, hits, utterances, stops = sum_over_processes(*sums, stop.asked, device=learner.device)
        if stops:
            raise Stopped
        nll, hits = nll / tokens, hits / utterances
        engine.state.metrics |= {"nll": nll, "token_ppl": math.exp(min(nll, 700)), "hits@1": hits}

    return evaluator


SAMPLES = 4  # validation utterances that each evaluation shows a reply to


def sample_replies(learner: Learner, valid: Instances, tokenizer, seed: int) -> list[dict]:
    """Replies to a few utterances, always the same ones, drawn as interact.py does by default.

    Each has a generator of its own, so that nothing else that is random changes.
    """
    from generation import generate_replies

    rows = range(0, len(valid), math.ceil(len(valid) / SAMPLES))
    longest = min(Decoding.max_length, learner.model.limit // 2)
    prefixes, rooms = zip(*(valid.prefix(row, longest) for row in rows), strict=True)
    generators = [torch.Generator().manual_seed(seed + row) for row in rows]
    with learner.autocast():
        replies = generate_replies(learner.model, prefixes, Decoding(max_length=min(rooms)), generators)
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
# The run
# ------------------------------------------------------------------------------------------------------------


class Run:
    """A training: what is trained, on what, and the folder that it is written to."""

    def __init__(
        self,
        settings: TrainingSettings,
        folder: Path,
        tokenizer,
        learner: Learner,
        progress: Progress,
        train: Instances | DialogRows,
        valid: Instances,
    ):
        self.settings, self.folder, self.tokenizer = settings, folder, tokenizer
        self.learner, self.progress, self.valid_set = learner, progress, valid
        self.stop = StopSignal()

        rank, world_size = idist.get_rank(), idist.get_world_size()
        self.sampler = StepSampler(train.sizes, settings.step_size * world_size, settings.seed, rank, world_size)
        collate_micro = partial(
            collate_step,
            batch_size=settings.train_batch_size,
            ids=train.ids,
            filler=train[0] if len(train) else None,
        )
        self.train_loader = load_batches(train, self.sampler, collate_micro, learner.device)
        self.valid_loader = batches_by_length(valid, settings.valid_batch_size, None, rank, world_size, learner.device)
        self.trainer = build_trainer(learner, self.sampler, progress, self.stop, settings)
        self.evaluator = build_evaluator(learner, self.stop)

    def save_state(self) -> None:
        data = self.sampler.size, self.settings.dataset_digest
        save_checkpoint(self.folder, self.learner, self.progress, *data)

    def save_state_between_epochs(self) -> None:
        every, progress = self.settings.save_every, self.progress
        if every and progress.step % every == 0 and progress.done < self.sampler.size:
            self.save_state()

    def evaluate_and_save(self) -> None:
        """Evaluate; write weights and model card, where this is the epoch to keep."""
        # A process without batches gets an empty one: every process must take part in the sums.
        metrics = self.evaluator.run(self.valid_loader if len(self.valid_loader) else [None]).metrics
        score, progress = (metrics["hits@1"], -metrics["nll"]), self.progress
        better = not self.settings.keep_best or progress.best is None or score > tuple(progress.best)
        if better:
            progress.best = score if progress.step else None  # what stood before the first step is no epoch
        if idist.get_rank() == 0:
            command = training_command(self.settings)
            with whole_files(self.folder) as partial:
                describe(partial, self.folder, progress.best, self.settings, command, self.tokenizer)
                if better:
                    self.save_model()  # first, so that the card never describes older weights

    def save_model(self) -> None:
        settings, model = self.settings, self.learner.model
        if settings.lora:
            save_adapter(model.lm, self.folder / ADAPTER, self.tokenizer, settings.lora_base)
        if settings.lora_save == "both":
            model.save(self.folder)

    def end_epoch(self) -> None:
        self.save_state()  # first: a run that is resumed from here evaluates again
        self.evaluate_and_save()

    def train(self) -> None:
        """Train from where `progress` is to the end, with an evaluation after every epoch.

        Raises:
            Stopped: a signal asked for the end. The state is not saved yet.
        """
        settings, progress, trainer = self.settings, self.progress, self.trainer
        sample = partial(sample_replies, self.learner, self.valid_set, self.tokenizer, settings.seed)
        with contextlib.ExitStack() as stack:
            if idist.get_rank() == 0:
                stack.enter_context(progress_bars(trainer, self.evaluator))
                stack.enter_context(logging_to(self.folder, trainer, self.evaluator, progress, sample))
            # After the logging, so that every step in a checkpoint is already in log.jsonl.
            trainer.add_event_handler(Events.ITERATION_COMPLETED, self.save_state_between_epochs)
            trainer.add_event_handler(Events.EPOCH_COMPLETED, self.end_epoch)

            epoch_is_done = progress.done == self.sampler.size
            if epoch_is_done if progress.step else (settings.eval_before_start or not settings.n_epochs):
                self.evaluate_and_save()
            if settings.n_epochs and (progress.epoch < settings.n_epochs or not epoch_is_done):
                self.sampler.start = progress.done
                steps = len(self.sampler)
                done = progress.epoch * steps - self.sampler.steps_left()
                trainer.load_state_dict({"iteration": done, "epoch_length": steps, "max_epochs": settings.n_epochs})
                trainer.run(self.train_loader, max_epochs=settings.n_epochs)

    def train_or_stop(self) -> None:
        """As `train`; a signal saves the state and ends the program."""
        with self.stop:
            try:
                self.train()
            except Stopped:
                self.save_state()
                idist.barrier()  # a launcher ends all processes when the first one ends
                log.info(
                    f"stopped after step {self.progress.step}, saved in {self.folder}\n"
                    f"go on with: {launch_command()} train.py --resume {shlex.quote(str(self.folder))}"
                )
                leave_processes(self.learner)
                sys.exit(128 + (self.stop.number or signal.SIGTERM))


def run_to_go_on_with(settings: TrainingSettings, launchers: set[str]) -> Path | None:
    """The folder of --resume, or of the run that these launchers had begun before a restart; in every process."""
    if settings.resume:
        return find_run(settings.resume)
    folder = run_of_launchers(launchers, typed_path(settings.runs_dir)) if idist.get_rank() == 0 else None
    return idist.all_gather(folder)[0]


def begin_run(settings: TrainingSettings, launchers: set[str]) -> Path:
    """Make a run folder, on rank 0; its path, in every process."""
    first = idist.get_rank() == 0
    folder = new_run_folder(settings.model, typed_path(settings.runs_dir), launchers) if first else None
    return idist.all_gather(folder)[0]


def prepare(settings: TrainingSettings, dialogs: Dialogs, files: ModelFiles, device: torch.device):
    """The model, its tokenizer, and the instances to train and to validate on."""
    tokenizer = load_tokenizer(files, settings.pre_tokenizer, dialogs.training_texts(), settings.token_types)
    tokenizer.max_history = settings.max_history
    splits = load_dataset(dialogs, tokenizer, settings.dataset_cache, progress=idist.get_rank() == 0)
    from loading import load_model  # heavy: after all that can be told to be wrong at once

    if settings.lora and not files.weights:
        raise UserError(f"{files.folder} holds no weights that --lora could keep; leave it out to train from scratch")
    model = load_model(files, tokenizer, device, from_scratch=True)

    def build(split: Split, **options) -> Instances:
        inside = sentences_inside(split, tokenizer)
        return Instances(split, tokenizer.ids, settings.max_history, model.limit, inside=inside, **options)

    rotations = settings.personality_permutations
    train = build(splits["train"], num_candidates=settings.num_candidates, permutations=rotations)
    if not len(train) and settings.n_epochs:
        raise UserError(f"the training split of {dialogs.name} holds no reply; nothing to learn")
    valid = build(splits["valid"])
    set_template(tokenizer, valid)
    if settings.max_history == -1 and model.packed:
        train = DialogRows(train, settings.step_size)
    return model, tokenizer, train, valid


def tell_sizes(learner: Learner, train: Instances | DialogRows, valid: Instances, settings: TrainingSettings) -> None:
    """What will be trained, on what, and where."""
    for name, instances in (("training", train), ("validation", valid)):
        instances.report_truncation(name)
    all_weights, others = sum(weight.numel() for weight in learner.model.parameters()), idist.get_world_size() - 1
    log.info(
        f"{all_weights / 1e6:.1f}M parameters, {train.sizes.sum()} training and {len(valid)} validation utterances, "
        f"{learner.device}" + (f" and {others} more" if others else "")
    )
    if settings.lora:
        trained = sum(weight.numel() for weight in learner.weights)
        log.info(
            f"trained are {trained:,} of them: adapters of rank {settings.lora}, the multiple-choice head and the "
            f"embeddings of five tokens; learning rate {settings.lr:.3g}"
        )


def train_run(settings: TrainingSettings, device: torch.device, held: contextlib.ExitStack) -> None:
    """Begin a run or go on with one, and train to its end.

    Args:
        held: gets the lock of the run folder.
    """
    launchers = set(idist.all_gather(launcher())) - {""}
    folder = run_to_go_on_with(settings, launchers)
    if folder:
        hold_run(folder, held)
    saved = idist.all_gather(bool(folder and checkpoint_files(folder)))[0]
    dialogs = Dialogs(settings.dataset_path, settings.valid_path)
    with idist.one_rank_first(local=True):  # of each node: it downloads and tokenises, the others find it done
        # The run folder has it all but, with --lora, the frozen weights as they were.
        files = ModelFiles(folder) if saved and not settings.lora else find_model(settings.lora_base or settings.model)
        settings = recognize_dataset(settings, dialogs)
        model, tokenizer, train, valid = prepare(settings, dialogs, files, device)
    learner, progress = Learner(model, settings, device), Progress()
    tell_sizes(learner, train, valid, settings)
    manual_seed(settings.seed + idist.get_rank())  # dropout differs between processes
    if saved:
        restore(newest_checkpoint(folder, learner), learner, progress, int(train.sizes.sum()), settings)
        log.info(f"going on with {folder} after step {progress.step}, in epoch {progress.epoch}")
    if not folder:
        folder = begin_run(settings, launchers)
        hold_run(folder, held)
    if idist.get_rank() == 0:
        write_settings(folder, model, tokenizer, settings)
    Run(settings, folder, tokenizer, learner, progress, train, valid).train_or_stop()
    dataset = f" --dataset_path {shlex.quote(settings.dataset_path)}" if settings.dataset_path else ""
    log.info(
        f"saved in {folder}\ntalk to it: python interact.py --model_checkpoint {shlex.quote(str(folder))}{dataset}"
    )
    leave_processes(learner)


def main() -> None:
    settings = parse_settings()
    device = join_processes(settings.device, settings.local_rank)
    manual_seed(settings.seed)
    logging.getLogger("ignite").setLevel(logging.CRITICAL)  # it logs exceptions that are raised all the same
    logging.getLogger("matplotlib").setLevel(logging.CRITICAL)  # it tells of its caches where HOME cannot be written

    with contextlib.ExitStack() as held:  # a lock of the run folder
        train_run(settings, device, held)


if __name__ == "__main__":
    run_script(main)
