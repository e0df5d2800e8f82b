"""What a run leaves to be resumed: its folder, settings, log and checkpoints; and what it tells while it trains."""

import contextlib
import json
import math
import os
import re
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from ignite.handlers import ProgressBar

from cli import UserError, explain_errors, first_line, log, printable
from files import UNFINISHED, lock, make_folder, remove_unfinished, whole_files
from model_files import ADAPTER
from progress import progress_bar

RUNS = Path(__file__).resolve().parent / "runs"


# ------------------------------------------------------------------------------------------------------------
# The run folder
# ------------------------------------------------------------------------------------------------------------


def new_run_folder(model: str, runs: Path = RUNS, launchers: Iterable[str] = ()) -> Path:
    """Create `<runs>/<Mon><DD>_<HH-MM-SS>_<host>_<model>` under a name no other run has, and point `latest` to it.

    Args:
        launchers: names of the launchers that start its processes, for `run_of_launchers`.
    """
    runs = runs.resolve()
    short = re.sub(r"[^\w.-]+", "_", Path(urlsplit(model).path.rstrip("/")).name or "model")
    base = runs / f"{time.strftime('%b%d_%H-%M-%S')}_{socket.gethostname()}_{short}"
    make_folder(base.parent)
    for attempt in range(100):
        folder = base if attempt == 0 else base.with_name(f"{base.name}_{attempt}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"cannot create {folder}: {error.strerror}; pass another --runs_dir") from error
        with whole_files(folder) as partial:
            (partial / "launchers.txt").write_text("\n".join(sorted(launchers)), encoding="utf-8")
        point_latest_to(folder)
        return folder
    raise UserError(f"{base} exists a hundred times; remove some runs")


def point_latest_to(folder: Path) -> None:
    """Make `latest` beside a run folder a link to it, or a text file with its name where links are not possible.

    It is made in the run folder, under the name of what `hold_run` removes, so that a process which is killed here
    leaves nothing beside it.
    """
    latest = folder.with_name("latest")
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=f"{UNFINISHED}.") as unfinished:
            link = Path(unfinished) / "latest"
            try:
                link.symlink_to(folder.name)
            except OSError:  # Windows, and file systems without links
                link.write_text(folder.name, encoding="utf-8")
            os.replace(link, latest)
    except OSError as error:
        raise UserError(f"cannot write {latest}: {error.strerror}; remove it") from error


def hold_run(folder: Path, held: contextlib.ExitStack) -> None:
    """Let nobody else write to a run folder until `held` ends; what a killed process left there is removed.

    Every process must call it.

    Raises:
        UserError: another training uses the folder.
    """
    refusal = ""
    if idist.get_rank() == 0:
        try:
            held.enter_context(lock(folder / ".run", wait=False))
            for each in (folder, folder / "checkpoints", folder / ADAPTER):
                remove_unfinished(each)
        except UserError as error:
            refusal = str(error)
    refusal = idist.all_gather(refusal)[0]
    if refusal:
        raise UserError(refusal)


def run_of_launchers(launchers: set[str], runs: Path) -> Path | None:
    """The run folder that one of these launchers has begun."""
    for path in runs.resolve().glob("*/launchers.txt") if launchers else ():
        if launchers & set(path.read_text(encoding="utf-8").splitlines()):
            return path.parent
    return None


FIGURES = {"loss": ("loss", "lm_loss", "mc_loss"), "nll": ("nll", "token_ppl", "hits@1")}  # of a step, of a validation


def parse_record(line: bytes) -> dict | None:
    """A line of `log.jsonl`; None for one that train.py did not write so, or that is cut short."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or any(type(record.get(name)) is not int for name in ("step", "epoch")):
        return None
    numbers = [name for mark, names in FIGURES.items() if mark in record for name in names]
    return record if all(type(record.get(name)) in (int, float) for name in numbers) else None


def open_log(folder: Path, step: int) -> Callable[[dict], None]:
    """A function that adds a record, as a line of JSON, to `log.jsonl` in a run folder.

    Args:
        step: where the run goes on from. Lines are dropped that it will write again: those of later steps, and a
            validation after this one.
    """
    path = folder / "log.jsonl"

    def stands(line: bytes) -> bool:
        record = parse_record(line)
        return record is not None and record["step"] < step + ("loss" in record)

    with explain_errors(f"cannot read {path}", "expected the log that train.py wrote", OSError):
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    with whole_files(folder) as partial:
        (partial / path.name).write_bytes(b"".join(filter(stands, lines)))

    def append(record: dict) -> None:
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise UserError(f"cannot write to {path}: {error.strerror}; free some space") from error

    return append


def recognize_dataset(settings, dialogs):
    """The settings with the digest of their dataset: a run goes on with the same content, wherever it lies now.

    Raises:
        UserError: the content is not that of the dataset that the run was started with.
    """
    digest = " ".join(dialogs.digest).strip()
    if settings.dataset_digest not in ("", digest) and not settings.changed_dataset:
        raise UserError(
            f"the content of {dialogs.name} is not what {settings.resume} was started with; pass --dataset_path that "
            "dataset, or --changed_dataset to go on with this one"
        )
    return replace(settings, dataset_digest=digest)


OF_ONE_START = "resume", "local_rank", "changed_dataset"  # options that are not the run's


def write_settings(folder: Path, model, tokenizer, settings) -> None:
    """All of a run folder but the weights."""
    options = {name: value for name, value in asdict(settings).items() if name not in OF_ONE_START}
    with whole_files(folder) as partial:
        (partial / "training_args.json").write_text(json.dumps(options, indent=2) + "\n", encoding="utf-8")
        tokenizer.save(partial)
        model.lm.config.save_pretrained(partial)


# ------------------------------------------------------------------------------------------------------------
# Checkpoints
# ------------------------------------------------------------------------------------------------------------


@dataclass
class Progress:
    """How far a run is. The same in every process."""

    step: int = 0  # optimiser steps, skipped ones included
    epoch: int = 1  # the one under way
    done: int = 0  # utterances of this epoch that steps have seen; all of them until the next epoch begins
    skipped: int = 0  # steps without an update, because the loss or a gradient was not finite
    skipped_in_a_row: int = 0
    best: tuple[float, float] | None = None  # Hits@1 and -nll of the best epoch

    def count_step(self, sampler, finite: bool) -> None:
        """One more step. sampler: says how many utterances a step and an epoch have."""
        self.step += 1
        self.done = min(self.done + sampler.step_size, sampler.size)
        self.skipped += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1


def random_states(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of torch's generators, which dropout draws from; the order of the data is a matter of the seed."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state()
    return states


def save_checkpoint(folder: Path, learner, progress: Progress, size: int, digest: str) -> None:
    """Write all that training needs to go on from here to `folder`/checkpoints; the last two are kept.

    Every process must call it. The file holds tensors and plain containers only.

    Args:
        size: utterances of the training data.
        digest: of the dataset's content.
    """
    generators = idist.all_gather(random_states(learner.device))
    if idist.get_rank() != 0:
        return
    state = {"progress": asdict(progress), "size": size, "dataset": digest}
    state |= {"generators": generators, "learner": learner.state_dict()}
    make_folder(folder / "checkpoints")
    name = f"step-{progress.step:09d}.pt"
    with whole_files(folder / "checkpoints") as partial:
        torch.save(state, partial / name)
    older = [path for path in checkpoints(folder) if path.name < name]
    for path in checkpoints(folder):
        if path.name != name and path not in older[-1:]:
            path.unlink()


def checkpoints(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints").glob("step-*.pt"))


def newest_checkpoint(folder: Path, learner) -> dict:
    """What `save_checkpoint` wrote last, in every process; where that is damaged or of another model, what it wrote
    before. Rank 0 says which file to read.

    Raises:
        UserError: none can be used.
    """
    state, name = None, ""
    if idist.get_rank() == 0:
        for path in reversed(checkpoints(folder)):
            try:
                state, name = read_checkpoint(path, learner), path.name
                break
            except Exception as error:  # torch.load raises many types for a damaged file
                log.warning(f"warning: {path} cannot be read ({first_line(error)}); trying the one before it")
    name = idist.all_gather(name)[0]
    if not name:
        raise UserError(f"no checkpoint in {folder}/checkpoints can be read; start a new run")
    if state is None:
        try:
            state = read_checkpoint(folder / "checkpoints" / name, learner)
        except Exception as error:  # as above; rank 0 could read it
            raise UserError(
                f"cannot read {folder}/checkpoints/{name}: {first_line(error)}; every node needs the same --runs_dir"
            ) from error
    return state


def read_checkpoint(path: Path, learner) -> dict:
    """A checkpoint, of which all is as this learner would write it: torch itself crashes on some that are not.

    Raises:
        ValueError: it is not. Other types where the file is damaged.
    """
    state = torch.load(path, map_location="cpu", weights_only=True)
    form = learner.state_dict()
    optimizer = form.pop("optimizer")
    check_form(state, {"size": 0, "progress": {"step": 0, "epoch": 1, "done": 0}, "generators": [], "learner": form})
    check_form(state["learner"], {"optimizer": {"param_groups": [], "state": {}}})
    groups = [{"params": group["params"]} for group in optimizer["param_groups"]]
    saved = state["learner"]["optimizer"]
    if len(saved["param_groups"]) != len(groups) or not saved["state"].keys() <= set(range(len(learner.weights))):
        raise ValueError("its optimiser is of other weights")
    for found, expected in zip(saved["param_groups"], groups, strict=True):
        check_form(found, expected)
        if len(found["params"]) != len(expected["params"]):
            raise ValueError("its optimiser is of other weights")
    for number, moments in saved["state"].items():
        weight = learner.weights[number]
        check_form(moments, {"step": torch.zeros(()), "exp_avg": weight, "exp_avg_sq": weight})
    for states in state["generators"]:
        check_form(states, {name: value for name, value in random_states(learner.device).items() if name in states})
    return state


def check_form(found, expected, place: str = "") -> None:
    """Raise ValueError unless there is all of `expected`: its keys, of the same types, tensors of the same shapes."""
    if isinstance(expected, torch.Tensor):
        alike = isinstance(found, torch.Tensor) and (found.shape, found.is_floating_point()) == (
            expected.shape,
            expected.is_floating_point(),
        )
        if not alike:
            raise ValueError(f"{place or 'it'} is not a tensor of shape {tuple(expected.shape)}")
    elif not isinstance(found, type(expected)) or isinstance(found, bool) != isinstance(expected, bool):
        raise ValueError(f"{place or 'it'} is not a {type(expected).__name__}")
    elif isinstance(expected, dict):
        for key, value in expected.items():
            if key not in found:
                raise ValueError(f"it lacks {place}{key}")
            check_form(found[key], value, f"{place}{key}")
    elif isinstance(expected, list) and expected:
        check_form(dict(enumerate(found)), dict(enumerate(expected)), f"{place} ")


def restore(state: dict, learner, progress: Progress, size: int, settings) -> None:
    """Put a run where a checkpoint left it, on the same device and as many processes, or on others."""
    changed = (state["size"], state.get("dataset", settings.dataset_digest)) != (size, settings.dataset_digest)
    if changed and not settings.changed_dataset:
        raise UserError(
            f"the run was trained on other data, of {state['size']} utterances where there are {size} now; "
            "resume with the dataset it had, or pass --changed_dataset to go on with this one"
        )
    learner.load_state_dict(state["learner"])
    for name, value in state["progress"].items():
        setattr(progress, name, value)
    if changed:  # of other utterances it is not known which ones were seen
        progress.done = size if progress.done == state["size"] else 0
        log.warning("warning: the run goes on with other data, an epoch under way from its start")
    if progress.epoch > settings.n_epochs > 0:
        raise UserError(
            f"--n_epochs {settings.n_epochs}: the run is in epoch {progress.epoch} already; pass that or more"
        )
    rank, world_size = idist.get_rank(), idist.get_world_size()
    states = state["generators"][rank] if len(state["generators"]) == world_size else {}
    if learner.device.type in states:
        torch.set_rng_state(states["cpu"])
        if learner.device.type != "cpu":
            torch.get_device_module(learner.device).set_rng_state(states[learner.device.type])
    else:
        torch.manual_seed(hash((settings.seed, progress.step, rank)))


# ------------------------------------------------------------------------------------------------------------
# What is told while it trains
# ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def progress_bars(trainer: Engine, evaluator: Engine) -> Iterator[None]:
    """A bar for the steps of an epoch and one for the batches of an evaluation, while the body runs;
    lines, where standard error is no terminal."""
    layout = "{desc} {n_fmt}/{total_fmt} {percentage:3.0f}%|{bar}|{postfix} [{elapsed}<{remaining}, {rate_fmt}]"
    bars = [
        ProgressBar(bar_format=layout, desc="train", unit="step"),
        ProgressBar(bar_format=layout, desc="evaluate", unit="batch"),
    ]
    for bar in bars:
        bar.pbar_cls = progress_bar

    def postfix(output: dict[str, float]) -> dict[str, float]:
        skipped = {"skipped": output["skipped"]} if output["skipped"] else {}
        return {name: output[name] for name in ("loss", "utterances/s")} | skipped

    bars[0].attach(trainer, output_transform=postfix)
    bars[1].attach(evaluator)
    try:
        yield
    finally:
        for bar in bars:
            if bar.pbar is not None:
                bar.pbar.close()  # so that what is said next begins a line of its own


@contextlib.contextmanager
def logging_to(
    folder: Path, trainer: Engine, evaluator: Engine, progress: Progress, sample: Callable[[], list[dict]]
) -> Iterator[None]:
    """Write `log.jsonl` and TensorBoard events while the body runs.

    Args:
        sample: gives the replies that are shown after each evaluation.
    """
    from tensorboardX import SummaryWriter

    append = open_log(folder, progress.step)
    board = SummaryWriter(str(folder), purge_step=progress.step + 1 if progress.step else None)

    def record(tag: str, scalars: dict[str, float]) -> None:
        append({"step": progress.step, "epoch": progress.epoch} | scalars)
        for name, value in scalars.items():
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

    with board:
        yield
