"""What people are told, and how a script ends: errors, exit status; joining the process group."""

import contextlib
import gc
import logging
import os
import pickle
import re
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

log = logging.getLogger("improvedflend")


# ------------------------------------------------------------------------------------------------------------
# Errors and exit status
# ------------------------------------------------------------------------------------------------------------


class UserError(Exception):
    """Something the user can mend. The message says what is wrong, what was expected and what to do."""


@contextlib.contextmanager
def explain_errors(failure: str, advice: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn an error of the body into one line for the user: "failure: why; advice".

    Args:
        failure: what could not be done, and with what: "cannot read x.json".
        advice: what was expected, or what to do.
        kinds: the exceptions to explain, by default all. A `UserError` says enough and passes. A panic of a library in
            Rust is always explained.
    """
    kinds = kinds or (Exception,)
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        # A panic is no Exception, and its class cannot be imported.
        if not isinstance(error, kinds) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{failure}: {first_line(error)}; {advice}") from error


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main`; a `UserError` or a full GPU ends it with one line and status 2, Ctrl-C with 130."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)
    warnings.filterwarnings("ignore", "Detected pickle protocol")  # torch's, of files that it then refuses
    # A kernel and its buffers are kept for each shape, 1024 of them by default: 6 GB after an hour's training.
    for cache in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):  # torch's and oneDNN's own
        os.environ.setdefault(cache, "32")
    gc.set_threshold(200_000)  # importing makes a million objects that stay; looking for garbage among them takes long
    try:
        main()
    except (UserError, torch.cuda.OutOfMemoryError) as error:
        message = str(error)
        if not isinstance(error, UserError):
            message = f"{first_line(error)}; try smaller batches, or another --device (see the README)"
        print("error: " + printable(" ".join(message.split())), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        gc.freeze()  # the interpreter's last search for garbage would take a second


def first_line(error: BaseException) -> str:
    """Shorten an exception to one line: its first line, joined with the next if it ends in a colon.

    An empty one is its type's name. An OSError is its reason alone: whoever reports it names the file.
    """
    if isinstance(error, pickle.UnpicklingError):  # torch's own text tells how to run what it refused to run
        return "its pickle is damaged, or holds more than tensors, such as code to run"
    text = getattr(error, "strerror", None) or str(error)
    line = re.match(r"(.*:\s*\n)*.*", text.strip())[0]
    return textwrap.shorten(line, 300, placeholder=" ...") or type(error).__name__


def quiet_transformers() -> None:
    """Leave out transformers' load reports and its progress bars: we say ourselves what matters in them."""
    from transformers import logging  # heavy: only where a model is loaded

    logging.set_verbosity_error()
    logging.disable_progress_bar()  # of tensors: seconds, and a line each in a log


# Control characters, and those that turn the direction of writing around; white space stays.
UNPRINTABLE = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Text that cannot command a terminal: without control characters."""
    return UNPRINTABLE.sub("", text)


# ------------------------------------------------------------------------------------------------------------
# Processes: one, or those that torchrun started
# ------------------------------------------------------------------------------------------------------------


def check_device(name: str) -> torch.device:
    """The device of that name, tried out so that a missing one is a clear line and not a late traceback."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"--device {name} cannot be used here: {first_line(error)}; try --device cpu") from error
    return device


def launched_rank(local_rank: int) -> int | None:
    """This process's number on its machine, from the launcher's environment or --local_rank; None without a launcher.

    Raises:
        UserError: a rank is given, but not the rest of what a launcher sets.
    """
    environment = dict(os.environ)
    if local_rank != -1:
        environment["LOCAL_RANK"] = str(local_rank)
    if not environment.keys() & {"LOCAL_RANK", "RANK"}:
        return None
    needed = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if not environment.get(name)]
    if missing:
        raise UserError(
            f"a rank is given but not {', '.join(missing)}, which a launcher sets in the environment; "
            "start with torchrun --nproc_per_node=N before the script, or without any rank for one process"
        )
    os.environ["LOCAL_RANK"] = environment["LOCAL_RANK"]
    return int(environment["LOCAL_RANK"])


def join_processes(device_name: str, local_rank: int) -> torch.device:
    """Join the process group that a launcher described in the environment, if one did; this process's device."""
    device, local_rank = check_device(device_name), launched_rank(local_rank)
    if local_rank is None:
        return device
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if device.index is not None or local_rank >= count:
            raise UserError(
                f"--device {device_name} with a process of local rank {local_rank} on a machine of {count} GPUs; "
                "each process needs a GPU of its own: start as many as there are, with --device cuda"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    # The timeout must allow for a download; a process that dies is noticed by torchrun, or by its closed sockets.
    timeout = timedelta(minutes=30)
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    # torchrun's store outlives a restart of the processes. Without a prefix of their own they would read what the
    # processes before them wrote.
    store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    if rank != 0:
        log.setLevel(logging.ERROR)
    return device
