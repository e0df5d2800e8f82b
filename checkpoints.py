"""What a run is resumed from: the files of `checkpoints/`, written, read, checked and put back."""

from dataclasses import asdict, dataclass
from pathlib import Path

import ignite.distributed as idist
import torch

from cli import UserError, explain_errors, first_line, log
from files import make_folder, whole_files
from options import LARGEST


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
    state = {
        "progress": asdict(progress),
        "size": size,
        "dataset": digest,
        "generators": generators,
        "learner": learner.state_dict(),
    }
    make_folder(folder / "checkpoints")
    name = f"step-{progress.step:09d}.pt"
    with whole_files(folder / "checkpoints") as unfinished:
        torch.save(state, unfinished / name)
    files = [path for path in checkpoint_files(folder) if not path.is_dir()]
    before = [path for path in files if path.name < name]
    kept = [folder / "checkpoints" / name, *before[-1:]]
    for path in files:
        if path not in kept:  # those after it too: a run that went back from a damaged one writes them again
            path.unlink()


def checkpoint_files(folder: Path) -> list[Path]:
    """The checkpoints in a run folder, oldest first."""
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
                state = read_checkpoint(path, learner)
            except Exception as error:  # torch.load raises many types for a damaged file
                log.warning(f"warning: {path} cannot be read ({first_line(error)}); trying the one before it")
            else:
                name = path.name
                break
    name = idist.all_gather(name)[0]
    if not name:
        raise UserError(f"no checkpoint in {folder}/checkpoints can be read; start a new run")
    if state is None:
        path = folder / "checkpoints" / name
        with explain_errors(f"cannot read {path}", "every node needs the same --runs_dir"):  # rank 0 could read it
            state = read_checkpoint(path, learner)
    return state


def read_checkpoint(path: Path, learner) -> dict:
    """Read a checkpoint, and check that all of it has the form that this learner writes: torch crashes on some others.

    Raises:
        ValueError: it has another form. Other types where the file is damaged.
    """
    state = torch.load(path, map_location="cpu", weights_only=True)
    saved, expected = dict(state["learner"]), learner.state_dict()
    optimizer, expected_optimizer = saved.pop("optimizer"), expected.pop("optimizer")
    check_form(saved, expected, "learner")
    # The rest of a group is settings, which are this program's own.
    numbers = [group["params"] for group in optimizer["param_groups"]]
    check_form(numbers, [group["params"] for group in expected_optimizer["param_groups"]], "params")
    for number, moments in optimizer["state"].items():
        weight = learner.weights[number]
        check_form(moments, {"step": torch.zeros(()), "exp_avg": weight, "exp_avg_sq": weight}, f"optimizer.{number}")
    check_progress(Progress(**state["progress"]), state["size"])
    own = random_states(learner.device)
    for states in state["generators"]:
        for device in own.keys() & states.keys():
            torch.Generator(device).set_state(states[device])  # raises where it is none
    return state


def check_form(found, expected, place: str) -> None:
    """Raise ValueError unless both have the same keys, lengths, types, and tensors of the same shapes and types.

    Args:
        place: names what is checked, in messages.
    """
    if isinstance(expected, torch.Tensor):
        if not isinstance(found, torch.Tensor) or found.is_meta or tensor_form(found) != tensor_form(expected):
            raise ValueError(f"{place} is not a Tensor {tuple(expected.shape)} of {expected.dtype}")
        return
    kind = dict if isinstance(expected, dict) else type(expected)  # a state dict is a dict too
    if not isinstance(found, kind):
        raise ValueError(f"{place} is not a {kind.__name__}")
    if isinstance(expected, list):
        found, expected = dict(enumerate(found)), dict(enumerate(expected))
    if not isinstance(expected, dict):
        return
    for key in found.keys() ^ expected.keys():
        fault = "lacks" if key in expected else "has a surplus"
        raise ValueError(f"it {fault} {place}.{key}")
    for key, value in expected.items():
        check_form(found[key], value, f"{place}.{key}")


def tensor_form(tensor: torch.Tensor) -> tuple:
    return tensor.shape, tensor.dtype, tensor.layout


def check_progress(progress: Progress, size: int) -> None:
    """Raise ValueError unless a run can have come so far. size: utterances of its training data."""
    counts = [progress.step, progress.epoch - 1, progress.done, progress.skipped, progress.skipped_in_a_row, size]
    possible = all(type(count) is int and 0 <= count <= LARGEST for count in counts)
    best = progress.best or (0.0, 0.0)
    if not possible or progress.done > size or [type(score) for score in best] != [float, float]:
        raise ValueError("no run comes so far as it says")


def restore(state: dict, learner, progress: Progress, size: int, settings) -> None:
    """Put a run where a checkpoint left it, on the same device and as many processes, or on others.

    Args:
        size: utterances of the training data.
    """
    digest = state.get("dataset", settings.dataset_digest)
    changed = state["size"] != size or digest != settings.dataset_digest
    if changed and not settings.changed_dataset:
        raise UserError(
            f"the run was trained on other data, of {state['size']} utterances where there are {size} now; "
            "resume with the dataset it had, or pass --changed_dataset to go on with this one"
        )
    learner.load_state_dict(state["learner"])
    vars(progress).update(state["progress"])
    if changed:  # of other utterances it is not known which ones were seen
        progress.done = size if progress.done == state["size"] else 0
        log.warning("warning: the run goes on with other data, an epoch under way from its start")
    if progress.epoch > settings.n_epochs > 0:
        raise UserError(
            f"--n_epochs {settings.n_epochs}: the run is in epoch {progress.epoch} already; pass that or more"
        )
    rank, device = idist.get_rank(), learner.device
    # On another number of processes, or another kind of device, chance begins anew.
    states = state["generators"][rank] if len(state["generators"]) == idist.get_world_size() else {}
    if device.type not in states:
        torch.manual_seed(hash((settings.seed, progress.step, rank)))
        return
    torch.set_rng_state(states["cpu"])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[device.type])
