"""The processes of a training: who launched them, and how they are told to end."""

import gc
import os
import signal
import socket
from pathlib import Path

import ignite.distributed as idist
import torch.distributed as dist


def launcher() -> str:
    """Names the torchrun agent that started this process, alike after an elastic restart; "" without one."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ""
    # An agent logs the errors of its processes in a folder of its own, <name>/attempt_<n>/<local rank>/error.json
    agent_folder = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", "")).parent.parent.parent
    return f"{socket.gethostname()}:{os.getppid()}:{agent_folder.name}"


def launch_command() -> str:
    """What starts as many processes as there are now."""
    size = idist.get_world_size()
    return "python" if size == 1 else f"torchrun --nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE', size)}"


def leave_processes(learner) -> None:
    """Leave the process group, if this process is in one."""
    if dist.is_initialized():
        # DDP must go before the group. As the last to hold the group, it can wait for the group's threads for ever.
        learner.parallel = learner.model
        gc.collect()
        dist.destroy_process_group()


class StopSignal:
    """Notes SIGTERM, Ctrl-C and a closed terminal while it is entered, so that training ends at the next step.

    A second Ctrl-C kills. Where a closed terminal is ignored already (nohup), it stays so. A launcher that is gone
    counts as a signal too: its processes would go on beside the run that is resumed.
    """

    def __init__(self):
        self.number, self.launcher = 0, launcher()

    @property
    def asked(self) -> bool:
        """Whether training is to end."""
        return bool(self.number) or launcher() != self.launcher

    def __enter__(self) -> "StopSignal":
        numbers = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        self.before = {number: signal.signal(number, self.note) for number in numbers}
        return self

    def note(self, number: int, frame) -> None:
        self.number = number
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if os.environ.get("RANK", "0") == "0":
            try:  # os.write, since a signal may come in the middle of another write
                os.write(2, b"\nstopping after this step; Ctrl-C again stops at once, without saving\n")
            except OSError:  # the terminal is gone: nothing that is written from now on may end the run before it saves
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, 1), os.dup2(nowhere, 2)

    def __exit__(self, *exception) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
