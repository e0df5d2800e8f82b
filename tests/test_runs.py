"""What a training withstands and tells: the end of its terminal, a log without bars."""

import os
import signal
from types import SimpleNamespace

import pytest

import progress
import utils
from cpu import cpu_has_bf16
from helpers import CountingTokenizer, run_python
from processes import StopSignal
from progress import ProgressLines, progress_bar
from turns import Dialog, Utterance

MANY_SHAPES = """
import torch
from cli import run_script

def memory():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

def main():
    layer = torch.nn.Linear(512, 512, dtype=torch.bfloat16)
    for rows in range(1, 1400):
        layer(torch.ones(rows, 512, dtype=torch.bfloat16)).sum().backward()
        if rows == 50:
            before = memory()
    print(memory() - before)

run_script(main)
"""


@pytest.fixture
def clock():
    """A clock that stands still until a test moves it: `clock.now`, in seconds."""

    class Clock:
        now = 1000.0

        def __call__(self) -> float:
            return self.now

    return Clock()


@pytest.fixture
def told(monkeypatch) -> list[str]:
    lines = []
    monkeypatch.setattr(progress.log, "info", lines.append)
    return lines


def test_a_log_gets_a_line_every_half_minute_and_at_the_end(clock, told):
    bar = ProgressLines(desc="train [1/3]", total=100, unit="step", initial=1, clock=clock)
    for step in range(1, 101):
        clock.now += 4
        bar.set_postfix({"loss": 3 - step / 100})
        bar.update(step - bar.n)
    bar.close()
    bar.close()
    assert len(told) == 400 // 32 + 1
    assert told[0] == "train [1/3]: 8 of 100, loss 2.92, 0.25 step/s, 06:08 left"
    assert told[-1] == "train [1/3]: 100 of 100, loss 2, 0.25 step/s"


def test_lines_of_what_goes_on_or_has_no_end(clock, told):
    bar = ProgressLines(desc="train", total=1000, unit="step", clock=clock)
    bar.update(600)  # of an earlier run: they tell nothing about the rate
    clock.now += 40
    bar.update(4)
    assert told == ["train: 604 of 1000, 0.1 step/s, 1:06:00 left"]
    items = list(ProgressLines(iter("abc"), "read", unit=" dialogs", clock=clock))
    assert items == list("abc") and told[1:] == ["read: 3"]


def test_the_rate_of_tokenising_is_that_of_the_work(clock, told, monkeypatch):
    """Of 25 strings, ten at a time, each ten in 40 s."""
    monkeypatch.setattr(utils, "CHUNK", 10)
    monkeypatch.setattr(
        utils, "progress_bar", lambda *args, disable, **options: ProgressLines(*args, clock=clock, **options)
    )

    class SlowTokenizer(CountingTokenizer):
        def encode(self, texts):
            clock.now += 40
            return super().encode(texts)

    dialog = Dialog([str(number) for number in range(24)], [Utterance([], ["hello"])])
    utils.tokenize_dataset(SimpleNamespace(splits={"train": [], "valid": [dialog]}), SlowTokenizer(), progress=True)
    lines = [line for line in told if line.startswith("tokenise")]
    assert lines == [
        "tokenise: 10 of 25",
        "tokenise: 20 of 25, 0.25 strings/s, 00:20 left",
        "tokenise: 25 of 25, 0.188 strings/s",
    ]


def test_a_terminal_has_bars_and_a_log_has_lines(monkeypatch, capsys, told):
    for terminal in (True, False):
        monkeypatch.setattr("sys.stderr.isatty", lambda terminal=terminal: terminal)
        assert list(progress_bar([1, 2], "read", unit=" dialogs")) == [1, 2]
        assert list(progress_bar([1, 2], "hidden", disable=True)) == [1, 2]
        assert ("2/2 [" in capsys.readouterr().err) == terminal
    (line,) = told
    assert line.startswith("read: 2 of 2")


def test_a_closed_terminal_is_a_stop_unless_it_is_ignored():
    for before, number in ((signal.SIG_DFL, signal.SIGHUP), (signal.SIG_IGN, 0)):
        signal.signal(signal.SIGHUP, before)
        try:
            with StopSignal() as stop:
                os.kill(os.getpid(), signal.SIGHUP)
                assert (stop.number, stop.asked) == (number, bool(number))
            assert signal.getsignal(signal.SIGHUP) is before
        finally:
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)


def test_a_terminal_that_is_gone_raises_nothing():
    kept = os.dup(1), os.dup(2)
    reading, writing = os.pipe()
    os.close(reading)  # nobody reads it: as a terminal that is closed, a write fails
    os.dup2(writing, 2)
    try:
        StopSignal().note(signal.SIGHUP, None)
        os.write(2, b"lost"), os.write(1, b"lost")
    finally:
        for number, fd in enumerate(kept, 1):
            os.dup2(fd, number)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def test_a_launcher_that_is_gone_is_a_stop(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    stop = StopSignal()
    assert not stop.asked
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert stop.asked


@pytest.mark.skipif(not cpu_has_bf16(), reason="the processor does not compute in bfloat16")
def test_memory_does_not_grow_with_the_shapes_that_were_seen():
    """oneDNN, and torch before it, keep a kernel for each shape: of 1,300 of them more than a gigabyte."""
    ended = run_python("-c", MANY_SHAPES)
    assert float(ended.stdout) < 400e6, ended.stderr
