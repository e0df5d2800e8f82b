"""Progress where nobody watches: lines, and few of them."""

import logging

from progress import ProgressLines, track


class Clock:
    """Seconds that pass when they are told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_line_every_thirty_seconds_and_at_the_end(caplog):
    caplog.set_level(logging.INFO, "improvedflend")
    clock = Clock()
    lines = ProgressLines(100, "train [1/3]", "steps", clock)
    for _ in range(100):
        clock.now += 0.5
        lines.set_postfix({"loss": 3.14159})
        lines.update()
    lines.close()
    assert caplog.messages == [
        "train [1/3]: 60/100 steps, loss 3.142, 2 steps/s, 00:20 left",
        "train [1/3]: 100/100 steps, loss 3.142, 2 steps/s, 00:00 left",
    ]


def test_a_loop_of_unknown_length_says_what_it_did(caplog):
    caplog.set_level(logging.INFO, "improvedflend")
    assert list(track(iter("abc"), "read train", "dialogs")) == ["a", "b", "c"]
    (line,) = caplog.messages
    assert line.startswith("read train: 3 dialogs, ")


def test_nothing_is_said_where_another_process_does(caplog):
    caplog.set_level(logging.INFO, "improvedflend")
    assert list(track([1, 2], "read train", "dialogs", shown=False)) == [1, 2] and not caplog.messages
