"""What a run is resumed from: the files of `checkpoints/`, written, read, checked and put back."""

from dataclasses import asdict, dataclass
from pathlib import Path

import ignite.distributed as idist
import torch

from cli import UserError, first_line, log
from files import make_folder, whole_files


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
    older = [path for path in checkpoint_files(folder) if path.name < name]
    for path in checkpoint_files(folder):
        if path.name != name and path not in older[-1:]:
            path.unlink()


def checkpoint_files(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints").glob("step-*.pt"))


def newest_checkpoint(folder: Path, learner) -> dict:
    """What `save_checkpoint` wrote last, in every process; where that is damaged or of another model, what it wrote
    before. Rank 0 says which file to read.

    Raises:
        UserError: none can be used.
    """
    state, name = None, ""
    if idist.get_rank() == 0:
        for path in reversed(checkpoint_files(folder)):
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
