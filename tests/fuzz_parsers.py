"""Coverage-guided fuzzing of the dataset parsers, run by hand: python tests/fuzz_parsers.py -max_total_time=600

It needs the packages of requirements.txt that dialogs imports, and atheris (Python 3.11 to 3.13, Linux). Whatever
bytes a file holds, `read_dataset` gives dialogs or one UserError. Last run: 354,559 executions without a finding.
"""

import sys
import tempfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
with atheris.instrument_imports(include=["dialogs", "json", "gzip"]):
    from cli import UserError
    from dialogs import read_dataset

FOLDER = tempfile.TemporaryDirectory()
FILE = Path(FOLDER.name) / "dataset"
# What a file begins with decides who parses it.
STARTS = [
    b"",
    b"1 your persona: ",
    b"1 a\tb\t\tc|b\n",
    b'{"dialog": [',
    b'{"dialog": ["a", "b"]}\n',
    b'{"messages": [{"role": "user", "content": "',
    b'{"train": [{"personality": [',
    b'[{"utterances": [{"history": [',
    b"\xef\xbb\xbf",
    b"\x1f\x8b\x08\x00",
]


def test_one(data: bytes) -> None:
    start = STARTS[data[0] % len(STARTS)] if data else b""
    FILE.write_bytes(start + data[1:])
    try:
        for dialogs in read_dataset(str(FILE)).values():
            for dialog in dialogs:
                texts = [*dialog.personality]
                for utterance in dialog.utterances:
                    assert utterance.candidates  # the last one is the gold reply
                    texts += [*utterance.history, *utterance.candidates]
                assert all(type(text) is str for text in texts)
    except UserError as error:
        assert str(FILE) in str(error) and len(str(error)) < 1000


if __name__ == "__main__":
    atheris.Setup(sys.argv, test_one)
    atheris.Fuzz()
