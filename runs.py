"""What a run leaves: its folder, settings, log, checkpoints to resume from, curves and model card."""

import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

import ignite.distributed as idist
import torch

from cli import UserError, first_line, log
from files import make_folder, whole_files

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
    """Make `latest` beside a run folder a link to it, or a text file with its name where links are not possible."""
    partial = folder.with_name(f".latest-{folder.name}")
    try:
        try:
            partial.symlink_to(folder.name)
        except OSError:  # Windows, and file systems without links
            partial.write_text(folder.name, encoding="utf-8")
        os.replace(partial, folder.with_name("latest"))
    except OSError as error:
        raise UserError(f"cannot write {folder.parent}/latest: {error.strerror}; remove it") from error


def launcher() -> str:
    """Names the torchrun agent that started this process, alike after an elastic restart; "" without one."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ""
    # An agent logs the errors of its processes in a folder of its own, <name>/attempt_<n>/<local rank>/error.json
    agent_folder = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", "")).parent.parent.parent
    return f"{socket.gethostname()}:{os.getppid()}:{agent_folder.name}"


def run_of_launchers(launchers: set[str], runs: Path) -> Path | None:
    """The run folder that one of these launchers has begun."""
    for path in runs.resolve().glob("*/launchers.txt") if launchers else ():
        if launchers & set(path.read_text(encoding="utf-8").splitlines()):
            return path.parent
    return None


def open_log(folder: Path, step: int) -> Callable[[dict], None]:
    """A function that adds a record, as a line of JSON, to `log.jsonl` in a run folder.

    Args:
        step: where the run goes on from. Lines are dropped that it will write again: those of later steps, and a
            validation after this one.
    """
    path = folder / "log.jsonl"

    def stands(line: bytes) -> bool:
        try:
            record = json.loads(line)
        except ValueError:  # cut short
            return False
        return record["step"] < step + ("loss" in record)

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


def newest_checkpoint(folder: Path) -> dict | None:
    """What `save_checkpoint` wrote last, in every process; where that is damaged, what it wrote before.

    None where it was never called. Rank 0 says which file to read.
    """
    state, name = None, ""
    if idist.get_rank() == 0:
        for path in reversed(checkpoints(folder)):
            try:
                state, name = read_checkpoint(path), path.name
                break
            except Exception as error:  # torch.load raises many types for a damaged file
                log.warning(f"warning: {path} cannot be read ({first_line(error)}); trying the one before it")
        if state is None and checkpoints(folder):
            raise UserError(f"no checkpoint in {folder}/checkpoints can be read; start a new run")
    name = idist.all_gather(name)[0]
    if name and state is None:
        try:
            state = read_checkpoint(folder / "checkpoints" / name)
        except Exception as error:  # as above; rank 0 could read it
            raise UserError(
                f"cannot read {folder}/checkpoints/{name}: {first_line(error)}; every node needs the same --runs_dir"
            ) from error
    return state


def read_checkpoint(path: Path) -> dict:
    return torch.load(path, map_location="cpu", weights_only=True)


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
