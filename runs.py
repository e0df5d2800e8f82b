"""What a run leaves: its folder, settings and log; and what it tells while it trains."""

import contextlib
import json
import math
import os
import re
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from urllib.parse import urlsplit

import ignite.distributed as idist
from ignite.engine import Engine, Events
from ignite.handlers import ProgressBar

from checkpoints import Progress
from cli import UserError, explain_errors, log, printable
from files import lock, make_folder, remove_unfinished, unfinished_folder, whole_files
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
    last = Path(urlsplit(model).path.rstrip("/")).name
    short = re.sub(r"[^\w.-]+", "_", last or "model")
    name = f"{time.strftime('%b%d_%H-%M-%S')}_{socket.gethostname()}_{short}"
    folder = runs.resolve() / name
    make_folder(folder.parent)
    attempt = 0
    while not make_new_folder(folder):
        attempt += 1
        folder = folder.with_name(f"{name}_{attempt}")
    with whole_files(folder) as unfinished:
        (unfinished / "launchers.txt").write_text("\n".join(sorted(launchers)), encoding="utf-8")
    point_latest_to(folder)
    return folder


def make_new_folder(folder: Path) -> bool:
    """Create a folder; False where there is one already, such as that of a run begun in the same second."""
    with explain_errors(f"cannot create {folder}", "pass another --runs_dir", OSError):
        try:
            folder.mkdir()
        except FileExistsError:
            return False
    return True


def point_latest_to(folder: Path) -> None:
    """Make `latest` beside a run folder a link to it, or a text file with its name where links are not possible.

    It is made in the run folder, under the name of what `hold_run` removes, so that a process which is killed here
    leaves nothing beside it.
    """
    latest = folder.with_name("latest")
    with explain_errors(f"cannot write {latest}", "remove it", OSError):
        with unfinished_folder(folder) as unfinished:
            link = Path(unfinished) / "latest"
            try:
                link.symlink_to(folder.name)
            except OSError:  # Windows, and file systems without links
                link.write_text(folder.name, encoding="utf-8")
            os.replace(link, latest)


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
    # All processes end with it: those that went on would wait for the first one for ever.
    refusal = idist.all_gather(refusal)[0]
    if refusal:
        raise UserError(refusal)


def run_of_launchers(launchers: set[str], runs: Path) -> Path | None:
    """The run folder that one of these launchers has begun."""
    for path in runs.resolve().glob("*/launchers.txt") if launchers else ():
        if launchers.intersection(path.read_text(encoding="utf-8").splitlines()):
            return path.parent
    return None


# The numbers of a record that holds the first of them: of a step, and of a validation.
FIGURES = {"loss": ("loss", "lm_loss", "mc_loss"), "nll": ("nll", "token_ppl", "hits@1")}


def parse_record(line: bytes) -> dict | None:
    """A line of `log.jsonl`; None for one that train.py did not write so, or that is cut short."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int or type(record.get("epoch")) is not int:
        return None
    for mark, names in FIGURES.items():
        if mark in record and not all(type(record.get(name)) in (int, float) for name in names):
            return None
    return record


def open_log(folder: Path, step: int) -> Callable[[dict], None]:
    """A function that adds a record, as a line of JSON, to `log.jsonl` in a run folder.

    Args:
        step: where the run goes on from. Lines are dropped that it will write again: those of later steps, and a
            validation after this one.
    """
    path = folder / "log.jsonl"

    def stands(line: bytes) -> bool:
        record = parse_record(line)
        if record is None:
            return False
        return record["step"] <= step if "loss" in record else record["step"] < step

    with explain_errors(f"cannot read {path}", "expected the log that train.py wrote", OSError):
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    with whole_files(folder) as unfinished:
        (unfinished / path.name).write_bytes(b"".join(filter(stands, lines)))

    def append(record: dict) -> None:
        with explain_errors(f"cannot write to {path}", "free some space", OSError):
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

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
