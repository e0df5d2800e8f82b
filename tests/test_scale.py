"""Many processes, mixed precision, and going on after a stop.

Most runs here are train.py's `main` in processes forked from a server that has imported everything already, in the
environment that a launcher would give them. What a launcher itself does is tested under torchrun.
"""

import contextlib
import functools
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import batches
import checkpoints
import cli
import files
import learner
import runs
import train
from cli import UserError
from files import whole_files
from helpers import signal_after
from inputs import Instance
from model_files import find_run
from runs import new_run_folder
from utils import SpecialIds

SCRIPT = Path(train.__file__)
WORDS = "hello i like cats dogs fish and my red car is fast do you work at the school today no yes what fun".split()

forkserver = multiprocessing.get_context("forkserver")
forkserver.set_forkserver_preload(["train", "runs", "tensorboardX", "ignite.distributed", "ignite.handlers"])


def write_dataset(path: Path, n_train: int, n_valid: int) -> Path:
    """A dataset of random words: that many utterances, of few words and three candidates."""
    rng = random.Random(0)

    def sentence() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(2, 6)))

    def dialogs(size: int) -> list[dict]:
        return [
            {
                "personality": [sentence(), sentence()],
                "utterances": [{"history": [sentence()], "candidates": [sentence() for _ in range(3)]}],
            }
            for _ in range(size)
        ]

    path.write_text(json.dumps({"train": dialogs(n_train), "valid": dialogs(n_valid)}))
    return path


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_train(
    options: list[str],
    environment: dict[str, str],
    output: Path,
    largest_file: int | None,
    signalled: dict | None,
    workers: int,
) -> None:
    """In a forked process: train.py, as its command line would start it."""
    written = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(written, 1)
    os.dup2(written, 2)
    os.environ.update(environment)
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    if signalled:
        signal_after(**signalled)
    sys.argv = ["train.py", *options]
    train.load_batches = functools.partial(batches.load_batches, workers=workers)
    cli.run_script(train.main)


def training(
    folder: Path,
    *options,
    world_size: int = 1,
    status: int | None = 0,
    largest_file: int | None = None,
    signalled: dict | None = None,
    workers: int = 0,
) -> str:
    """Run train.py on `world_size` processes until all have ended; what they printed.

    Args:
        status: with which each of them must end; None: any.
        largest_file: the bytes that a file can have.
        signalled: for `signal_after`, in each process.
        workers: processes that build the batches of each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    output = folder / "output.txt"
    output.unlink(missing_ok=True)
    options = [*map(str, options), "--device", "cpu", "--dataset_cache", str(folder / "cache.bin")]
    processes, port = [], str(free_port())
    for rank in range(world_size):
        group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
        group = {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in group.items()}
        arguments = (options, group if world_size > 1 else {}, output, largest_file, signalled, workers)
        processes.append(forkserver.Process(target=run_train, args=arguments, daemon=not workers))
        processes[-1].start()
    for process in processes:
        process.join()
    statuses, text = [process.exitcode for process in processes], output.read_text()
    assert status is None or statuses == [status] * world_size, f"{statuses}\n{text}"
    return text


def resume(folder: Path, *options, **how) -> str:
    return training(folder, "--resume", folder / "runs" / "latest", *options, **how)


def errors(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(("error:", "Traceback"))]


def records(folder: Path) -> list[dict]:
    path = folder / "runs" / "latest" / "log.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def losses(folder: Path) -> dict[int, float]:
    """The loss of each step of the newest run."""
    steps = [record for record in records(folder) if "loss" in record]
    found = {record["step"]: record["loss"] for record in steps}
    assert len(found) == len(steps), "a step is logged twice"
    return found


def validations(folder: Path) -> list[dict]:
    return [record for record in records(folder) if "nll" in record]


def assert_same_losses(found: dict[int, float], expected: dict[int, float], within: float) -> None:
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, abs=within)


# Steps of 4 utterances: 6 in each epoch, the last of them of a single utterance. A learning rate that tells.
SETTINGS = ["--train_batch_size", 1, "--lr", 3e-3, "--save_every", 2, "--n_epochs", 4]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "data.json", n_train=21, n_valid=7)


@pytest.fixture(scope="module")
def options(tiny, data: Path):
    """`options(folder, world_size)`: the same global batch on any number of processes up to 4; with dropout."""

    def options(folder: Path, world_size: int = 1, model: Path | None = None) -> list:
        accumulation = ["--gradient_accumulation_steps", 4 // world_size]
        paths = ["--model", model or tiny("gpt2"), "--dataset_path", data, "--runs_dir", folder / "runs"]
        return [*paths, *SETTINGS, *accumulation]

    return options


@pytest.fixture(scope="module")
def uninterrupted(options, tmp_path_factory: pytest.TempPathFactory):
    """`uninterrupted(world_size)`: the folder of a run that nothing stops."""
    known: dict[int, Path] = {}

    def run(world_size: int) -> Path:
        if world_size not in known:
            folder = tmp_path_factory.mktemp(f"uninterrupted-{world_size}")
            training(folder, *options(folder, world_size), world_size=world_size)
            assert list(losses(folder)) == list(range(1, 25))
            known[world_size] = folder
        return known[world_size]

    return run


# ------------------------------------------------------------------------------------------------------------
# Many processes
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", [[], ["--lora", 4]], ids=["all weights", "an adapter"])
def test_same_losses_on_one_and_two_processes(what, options, make_model, tmp_path):
    """Dropout off, the same global batch: 24 steps, with an epoch's last step leaving nothing to the second process."""
    no_dropout = {name: 0.0 for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop", "summary_first_dropout")}
    model = make_model(tmp_path / "model", "gpt2", **no_dropout)
    for world_size in (1, 2):
        folder = tmp_path / str(world_size)
        training(folder, *options(folder, world_size, model), *what, world_size=world_size)
    one, two = losses(tmp_path / "1"), losses(tmp_path / "2")
    assert len(one) == 24 and one[24] < 0.9 * one[1]
    assert_same_losses(two, one, within=1e-4)
    for found, expected in zip(validations(tmp_path / "2"), validations(tmp_path / "1"), strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
    text = (tmp_path / "2" / "output.txt").read_text()
    assert text.count("talk to it") == 1 and text.count("epoch 1: validation") == 1  # one process speaks
    assert len(list((tmp_path / "2" / "runs").iterdir())) == 2  # one run, and `latest`


@pytest.mark.parametrize("n_valid", [7, 2], ids=["uneven", "fewer batches than processes"])
def test_same_validation_on_one_two_and_three_processes(options, tmp_path, n_valid):
    data = write_dataset(tmp_path / "data.json", n_train=1, n_valid=n_valid)
    found = []
    for world_size in (1, 2, 3):
        folder = tmp_path / str(world_size)
        chosen = ["--n_epochs", 0, "--valid_batch_size", 2, "--dataset_path", data]
        training(folder, *options(folder), *chosen, world_size=world_size)
        found += validations(folder)
    assert len(found) == 3
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-6, abs=1e-6)


def test_sampler_deals_every_utterance_once():
    """To any number of processes, from any position; the order does not depend on either."""
    whole = [sorted(step) for step in learner.StepSampler([1] * 21, 4, seed=1)]
    assert sorted(sum(whole, [])) == list(range(21)) and [len(step) for step in whole] == [4, 4, 4, 4, 4, 1]
    for world_size in (2, 3, 4):
        samplers = [learner.StepSampler([1] * 21, 4, 1, rank, world_size) for rank in range(world_size)]
        assert [sorted(sum(shares, [])) for shares in zip(*samplers, strict=True)] == whole
    resumed = learner.StepSampler([1] * 21, 6, seed=1)
    resumed.start = 8
    assert resumed.steps_left() == len(list(resumed)) == 3
    assert sorted(sum(resumed, [])) == sorted(sum(whole[2:], []))
    other = learner.StepSampler([1] * 21, 4, seed=1)
    other.epoch = 1
    assert [sorted(step) for step in other] != whole


def test_empty_share_is_the_filler_without_weight():
    ids = SpecialIds(1, 2, 3, 4, 5, all=frozenset())
    filler = Instance([1, 4], [4, 4], [[7, 2]])
    batches, weight = learner.collate_step([], 2, ids, filler)
    assert weight == 0 and [batch.input_ids.tolist() for batch in batches] == [[[1, 4, 7, 2]]]
    batches, weight = learner.collate_step([filler] * 3, 2, ids, filler)
    assert weight == 1 and [len(batch.input_ids) for batch in batches] == [2, 1]


def test_local_rank_without_a_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for option in ("--local_rank", "--local-rank"):
        monkeypatch.setattr(sys, "argv", ["train.py", option, "0", "--device", "cpu"])
        with pytest.raises(UserError, match="RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT.*torchrun"):
            cli.join_processes("cpu", train.parse_settings().local_rank)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UserError, match="torchrun"):
        train.main()


# ------------------------------------------------------------------------------------------------------------
# Launchers
# ------------------------------------------------------------------------------------------------------------


def launched(folder: Path, launcher: list[str], options: list, script: Path = SCRIPT) -> subprocess.Popen:
    """train.py under a launcher, a module and its options; what they print is added to output.txt."""
    command = [sys.executable, "-m", *launcher, script, *options, "--device", "cpu"]
    command += ["--dataset_cache", folder / "cache.bin"]
    with open(folder / "output.txt", "a") as output:
        return subprocess.Popen(list(map(str, command)), stdout=output, stderr=output)


def mortal(folder: Path, steps: int) -> Path:
    """A train.py of which the second process is killed after so many steps, when it is launched for the first time."""
    paths = [str(SCRIPT.parent), str(Path(__file__).parent)]
    script = folder / "mortal_train.py"
    script.write_text(
        f"import os, signal, sys\nsys.path[:0] = {paths}\nimport cli, helpers, train\n"
        "if (os.environ['RANK'], os.environ['TORCHELASTIC_RESTART_COUNT']) == ('1', '0'):\n"
        f"    helpers.signal_after(signal.SIGKILL, {steps})\n"
        "cli.run_script(train.main)\n"
    )
    return script


def test_torchrun_restarts_and_goes_on(options, uninterrupted, tmp_path):
    """A process is killed; torchrun starts both again, and they continue the run by themselves."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max_restarts=1"]
    with launched(tmp_path, launcher, options(tmp_path, 2), mortal(tmp_path, 5)) as agent:
        status = agent.wait()
    output = (tmp_path / "output.txt").read_text()
    assert status == 0 and "going on with" in output, output
    assert_same_losses(losses(tmp_path), losses(uninterrupted(2)), within=1e-5)
    assert len(list((tmp_path / "runs").iterdir())) == 2  # one run, and `latest`


def test_a_process_that_dies_ends_the_run(options, tmp_path):
    launcher = ["torch.distributed.launch", "--nproc_per_node=2", f"--master_port={free_port()}"]
    with launched(tmp_path, launcher, options(tmp_path, 2), mortal(tmp_path, 3)) as agent:
        assert agent.wait() != 0
    assert "Signal 9 (SIGKILL)" in (tmp_path / "output.txt").read_text()


def test_two_nodes(options, uninterrupted, tmp_path):
    """Two torchrun agents, of one process each, that find each other by a rendezvous endpoint."""
    launcher = ["torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_id=7"]
    launcher += [f"--rdzv_endpoint=127.0.0.1:{free_port()}"]
    agents = [launched(tmp_path, launcher, options(tmp_path, 2)) for _ in range(2)]
    assert [agent.wait() for agent in agents] == [0, 0], (tmp_path / "output.txt").read_text()
    assert_same_losses(losses(tmp_path), losses(uninterrupted(2)), within=1e-5)


# ------------------------------------------------------------------------------------------------------------
# Mixed precision
# ------------------------------------------------------------------------------------------------------------


def test_levels_of_precision(options, tmp_path):
    """Each learns as O0 does; the run folder loads afterwards. O3 is only asked to learn and to stay finite."""
    last = {}
    for level in (["--fp16", "O0"], ["--fp16", "O1"], ["--fp16", "O2"], ["--fp16", "O3"], ["--bf16"]):
        folder = tmp_path / level[-1]
        training(folder, *options(folder), *level)
        found = list(losses(folder).values())
        assert all(map(math.isfinite, found)), found
        last[level[-1]] = sum(found[-6:]) / 6  # the last epoch
        first = sum(found[:6]) / 6
        assert last[level[-1]] < 0.9 * first
    for level in ("O1", "O2", "--bf16"):
        assert last[level] == pytest.approx(last["O0"], rel=0.05), last
    training(tmp_path / "again", *options(tmp_path / "again", model=tmp_path / "O2" / "runs" / "latest"))


def test_steps_that_are_not_finite_are_skipped_and_end_the_run(options, tmp_path):
    (error,) = errors(training(tmp_path, *options(tmp_path), "--lr", 2e9, status=2))
    assert "not finite in 10 steps in a row, up to step 11" in error
    assert [record["skipped"] for record in records(tmp_path) if "loss" in record] == list(range(10))


@pytest.mark.parametrize("kind", ["openai-gpt", "gpt2", "llama"])
def test_gradient_checkpointing_saves_memory_and_changes_nothing(kind, dialog_model, load):
    model, tokenizer = load(dialog_model(kind))
    batch = batches.collate([Instance([1, 2, 3, 4], [4, 4, 5, 5], [[7, 8], [9, 6]])], tokenizer.ids)
    model.train()

    def gradients() -> tuple[list[torch.Tensor], int]:
        """And the numbers that are kept for the backward pass."""
        kept = []
        model.zero_grad()
        torch.manual_seed(0)  # the same dropout
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            output = model(batch)
        (output.lm_nll.sum() + output.mc_logits[0, 0]).backward()
        return [parameter.grad for parameter in model.parameters()], sum(kept)

    expected, much = gradients()
    model.checkpoint_gradients()
    found, little = gradients()
    torch.testing.assert_close(found, expected)
    assert little < 0.7 * much


# ------------------------------------------------------------------------------------------------------------
# Stop and go on
# ------------------------------------------------------------------------------------------------------------


# Where a process is killed: when it enters a function (or has taken a step, "") for the so-manieth time, and then after
# a random number of calls below this one.
START = "train.main", 1, 3_000
CACHE = "utils.write_cache", 1, 400
STEP = "", 2, 15_000
SAVE = "train.save_checkpoint", 2, 4_000
EVALUATE = "train.Run.evaluate_and_save", 1, 40_000
KILLS = {
    1: [CACHE, START, CACHE, STEP, SAVE, STEP, EVALUATE, EVALUATE, START, SAVE, STEP, SAVE, EVALUATE, STEP, EVALUATE],
    2: [START, CACHE, STEP, SAVE, EVALUATE, START, SAVE, STEP, EVALUATE],
}


@pytest.mark.parametrize("world_size", KILLS)
def test_killed_at_random_moments(world_size, options, uninterrupted, tmp_path):
    """kill -9 amid anything: every loss is that of the run that nothing stopped, and nothing is left behind.

    Of two processes the second is killed, and the first one, which then waits for it in vain, a little later.
    """
    rng, run = random.Random(world_size), tmp_path / "runs" / "latest"

    def go_on(**how) -> str:
        # The dataset cache is made once, but is to be killed in, too.
        if (run / "training_args.json").exists():
            return resume(tmp_path, world_size=world_size, **how)
        return training(tmp_path, *options(tmp_path, world_size), world_size=world_size, **how)

    for function, times, calls in KILLS[world_size]:
        killed = {"number": signal.SIGKILL, "steps": times, "calls": rng.randrange(calls), "function": function}
        if function == CACHE[0]:
            for cache in tmp_path.glob("cache*.bin"):
                cache.unlink()
        go_on(status=-signal.SIGKILL if world_size == 1 else None, signalled=killed)
    go_on()
    assert_same_losses(losses(tmp_path), losses(uninterrupted(world_size)), within=1e-5)
    for found, expected in zip(validations(tmp_path), validations(uninterrupted(world_size)), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
    newest = [path.name for path in checkpoints.checkpoint_files(find_run(run))]
    assert newest == ["step-000000022.pt", "step-000000024.pt"]
    assert list(tmp_path.glob(".saving-*")) == list(find_run(run).rglob(".saving-*")) == []


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 128 + signal.SIGTERM)]
)
def test_batches_that_workers_had_ready_are_not_lost(number, status, options, uninterrupted, tmp_path):
    training(tmp_path, *options(tmp_path), signalled={"number": number, "steps": 9}, workers=2, status=status)
    resume(tmp_path, workers=2)  # at once: no worker of the killed run holds its folder
    assert_same_losses(losses(tmp_path), losses(uninterrupted(1)), within=1e-6)


def test_an_adapter_goes_on_from_a_checkpoint_of_what_is_trained(options, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    training(whole, *options(whole, 2), "--lora", 4, world_size=2)
    stop = {"number": signal.SIGKILL, "steps": 9}
    lora = "--lora", 4, "--lora_save", "adapter"
    training(killed, *options(killed, 2), *lora, world_size=2, status=None, signalled=stop)
    resume(killed, world_size=2)
    assert_same_losses(losses(killed), losses(whole), within=1e-5)
    folders = [find_run(folder / "runs" / "latest") for folder in (whole, killed)]
    adapters = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in folders]
    torch.testing.assert_close(adapters[1], adapters[0], rtol=1e-4, atol=1e-4)
    assert [(folder / "model.safetensors").exists() for folder in folders] == [True, False]
    assert ["holds an adapter alone" in (folder / "README.md").read_text() for folder in folders] == [False, True]
    state = torch.load(checkpoints.checkpoint_files(folders[0])[-1])["learner"]
    sizes = {name: tensor.numel() for name, tensor in state["model"].items() if "trainable_tokens_original" not in name}
    assert sum(sizes.values()) == sum(tensor.numel() for tensor in adapters[0].values()) + 5 * 32  # tied: twice there


def test_signals_save_and_another_number_of_processes_goes_on(options, uninterrupted, tmp_path):
    """SIGTERM and Ctrl-C end a run on two processes, and one process, whose steps are half as large, ends it."""
    start = lambda folder, **how: training(folder, *options(folder, 2), **how)  # noqa: E731
    for steps, number, status in ((2, signal.SIGTERM, 143), (7, signal.SIGINT, 130)):
        text = start(tmp_path, world_size=2, status=status, signalled={"number": number, "steps": steps})
        assert errors(text) == []
        assert f"torchrun --nproc_per_node=2 train.py --resume {find_run(tmp_path / 'runs' / 'latest')}" in text
        start = resume
    expected, last = losses(uninterrupted(2)), max(losses(tmp_path))
    assert_same_losses(losses(tmp_path), {step: expected[step] for step in range(1, last + 1)}, within=1e-5)
    epoch, done = (last - 1) // 6 + 1, min(21, ((last - 1) % 6 + 1) * 4)
    resume(tmp_path)  # two utterances a step
    steps = [record for record in records(tmp_path) if "loss" in record]
    expected_steps = last + math.ceil((21 - done) / 2) + (4 - epoch) * 11
    assert [record["step"] for record in steps] == list(range(1, expected_steps + 1))
    assert [record["epoch"] for record in validations(tmp_path)] == [1, 2, 3, 4]
    rates = [record["lr"] for record in steps]
    assert rates == sorted(rates, reverse=True) and 0 < rates[-1] < 3e-3 / 40


def test_a_launcher_that_is_gone_ends_the_run_with_a_save(options, uninterrupted, tmp_path):
    """torchrun itself is killed: its processes see it, and what they save is gone on with."""
    script = tmp_path / "lonely_train.py"
    script.write_text(
        f"import os, signal, sys\nsys.path[:0] = [{str(SCRIPT.parent)!r}]\nimport cli, train\n"
        "from torch.optim.optimizer import register_optimizer_step_post_hook\n"
        "steps, launcher = [], train.launcher()\n"
        "def count(*_):\n"
        "    steps.append(1)\n"
        "    if len(steps) == 3 and os.environ['RANK'] == '1':\n"
        "        os.kill(os.getppid(), signal.SIGKILL)\n"
        "        while train.launcher() == launcher: pass\n"
        "register_optimizer_step_post_hook(count)\n"
        "cli.run_script(train.main)\n"
    )
    command = ["torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    with launched(tmp_path, command, options(tmp_path, 2), script) as agent:
        assert agent.wait() == -signal.SIGKILL
    folder = find_run(tmp_path / "runs" / "latest")
    with files.lock(folder / ".run"):  # until its processes have ended
        assert [path.name for path in checkpoints.checkpoint_files(folder)][-1] == "step-000000003.pt"
    assert max(losses(tmp_path)) == 3
    resume(tmp_path, world_size=2)
    assert_same_losses(losses(tmp_path), losses(uninterrupted(2)), within=1e-5)


def end_by_two_signals() -> None:
    with train.StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.number == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()


def test_second_ctrl_c_ends_at_once():
    process = forkserver.Process(target=end_by_two_signals)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGINT  # which a shell shows as 130


def test_damaged_checkpoints_and_a_full_disk(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted(1) / "runs", tmp_path / "runs", symlinks=True)
    folder = find_run(tmp_path / "runs" / "latest")
    expected = losses(tmp_path)
    older, newest = checkpoints.checkpoint_files(folder)
    content = newest.read_bytes()
    newest.write_bytes(content[: len(content) // 2])
    # a file may be as large as half a checkpoint
    text = resume(tmp_path, largest_file=len(content) // 2, status=2)
    assert f"{newest} cannot be read" in text and "going on" in text and "after step 22" in text
    (error,) = errors(text)
    assert f"cannot write to {folder}/checkpoints: " in error
    assert list((folder / "checkpoints").iterdir()) == [older, newest] or list((folder / "checkpoints").iterdir()) == [
        newest,
        older,
    ]
    resume(tmp_path)
    assert_same_losses(losses(tmp_path), expected, within=1e-5)
    for path in (older, newest):
        path.write_bytes(b"")
    (error,) = errors(resume(tmp_path, status=2))
    assert "no checkpoint" in error


def test_options_of_a_resumed_run(uninterrupted, monkeypatch):
    """The saved ones hold; those that would change what a step computes are refused."""
    folder = uninterrupted(1) / "runs" / "latest"

    def parse(*options: str):
        monkeypatch.setattr(sys, "argv", ["train.py", "--resume", str(folder), *options])
        return train.parse_settings()

    settings = parse("--n_epochs", "9", "--lr", "3e-3")
    assert (settings.n_epochs, settings.lr, settings.gradient_accumulation_steps) == (9, 3e-3, 4)
    for options in (["--lr", "1e-3"], ["--seed", "1"], ["--fp16", "O1"], ["--model", "gpt2"]):
        with pytest.raises(UserError, match=f"{options[0]} .*was started with"):
            parse(*options)
    with pytest.raises(UserError, match="no training_args.json"):
        find_run(folder.parent)


def test_latest_is_a_link_or_else_a_text_file(tmp_path, monkeypatch):
    first, second = new_run_folder("a/gpt2", tmp_path), new_run_folder("gpt2", tmp_path)
    assert (tmp_path / "latest").readlink() == Path(second.name) and first != second

    def no_links(*_) -> None:
        raise OSError("symbolic links are not possible here")

    monkeypatch.setattr(Path, "symlink_to", no_links)
    third = new_run_folder("gpt2", tmp_path)
    (third / "training_args.json").write_text("{}")
    assert not (tmp_path / "latest").is_symlink() and find_run(tmp_path / "latest") == third


def point_and_be_killed(folder: Path) -> None:
    os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    runs.point_latest_to(folder)


def test_a_link_whose_making_was_killed_is_removed_by_the_next_who_uses_the_run(tmp_path):
    folder = new_run_folder("gpt2", tmp_path)
    process = forkserver.Process(target=point_and_be_killed, args=[folder])
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert sorted(tmp_path.iterdir()) == [folder, tmp_path / "latest"]
    left = set(folder.iterdir())
    with contextlib.ExitStack() as held:
        runs.hold_run(folder, held)
    (link_folder,) = left - set(folder.iterdir())
    assert link_folder.name.startswith(files.UNFINISHED)


def test_files_appear_whole_or_not_at_all(tmp_path):
    (tmp_path / "a").write_text("before")
    with pytest.raises(UserError, match=f"cannot write to {tmp_path}: No space left"), whole_files(tmp_path) as partial:
        (partial / "a").write_text("aft")
        raise OSError("No space left on device")
    assert (tmp_path / "a").read_text() == "before" and list(tmp_path.iterdir()) == [tmp_path / "a"]
    with whole_files(tmp_path) as partial:
        (partial / "a").write_text("after")
    assert (tmp_path / "a").read_text() == "after"
