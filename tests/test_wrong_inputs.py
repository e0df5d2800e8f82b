"""Inputs gone wrong: each row an input and the exact line it gets. What other files' tables hold is not repeated."""

# ruff: noqa: E501 (lines are as long as what is printed)

import contextlib
import gzip
import io
import json
import os
import pickle
import re
import resource
import shutil
import sys
import tarfile
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import checkpoints
import convai_evaluation
import interact
import train
from cli import UserError, explain_errors, run_script
from conversation import Conversation
from dialogs import Dialogs, read_dataset
from files import download, typed_path, unpack
from helpers import (
    CONTENT,
    DIALOG,
    IDS,
    TURNS,
    CountingTokenizer,
    Handler,
    json_lines,
    kept,
    member,
    read,
    rewrite_json,
    write_tar,
)
from inputs import Instances
from model_files import find_model
from options import Decoding
from records import EXPECTED, FORMATS
from transcript import Transcript
from utils import DialogTokenizer, learn_bpe, load_dataset, load_tokenizer

MEGABYTES = 10 * 2**20


@pytest.fixture
def ended(monkeypatch, capsys):
    """`ended(script, *arguments)` runs a script's main as the command does: its exit status and standard error."""

    def ended(script, *arguments) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            run_script(script.main)
        return exit.value.code, capsys.readouterr().err

    return ended


@contextlib.contextmanager
def full_disk(largest: int):
    """Files can be this large while the body runs."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    ("error", "kinds", "line"),
    [
        (OSError(2, "No such file", "x"), [OSError], "cannot read x: No such file; expected y"),
        (ValueError("this:\n  that\nmore"), [OSError, ValueError], "cannot read x: this: that; expected y"),
        (ValueError(), [], "cannot read x: ValueError; expected y"),
        (UserError("what to do"), [], "what to do"),
        (KeyError("z"), [OSError], None),
        (KeyboardInterrupt(), [], None),
    ],
)
def test_an_error_is_explained_in_one_line(error, kinds, line):
    with pytest.raises(UserError if line else type(error)) as caught:
        with explain_errors("cannot read x", "expected y", *kinds):
            raise error
    assert str(caught.value) == line or not line


# ------------------------------------------------------------------------------------------------------------
# Options
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "arguments", "line"),
    [
        (train, "--n_epochs x", "argument --n_epochs: expected a whole number of at least 0, found 'x'"),
        (train, "--n_epochs 1.5", "argument --n_epochs: expected a whole number of at least 0, found '1.5'"),
        (train, "--num_candidates 0", "argument --num_candidates: expected a whole number of at least 1, found '0'"),
        (train, "--lr -1", "argument --lr: expected a number of at least 0, found '-1'"),
        (train, "--lr nan", "argument --lr: expected a number of at least 0, found 'nan'"),
        (train, "--lr inf", "argument --lr: expected a number of at least 0 and at most 2147483647, found 'inf'"),
        (train, "--max_norm=-inf", "argument --max_norm: expected a number of at least 0, found '-inf'"),
        (train, "--max_history -2", "argument --max_history: expected a whole number of at least -1, found '-2'"),
        (train, "--seed -1", "argument --seed: expected a whole number of at least 0, found '-1'"),
        (
            train,
            "--seed 99999999999999999999",
            "argument --seed: expected a whole number of at least 0 and at most 2147483647, "
            "found '99999999999999999999'",
        ),
        (train, "--batch 4", "unrecognized arguments: --batch 4"),
        (train, "--lr", "argument --lr: expected one argument"),
        (interact, "--top_p 3", "argument --top_p: expected a number of at most 1.0, found '3'"),
        (interact, "--top_p x", "argument --top_p: expected a number of at most 1.0, found 'x'"),
        (interact, "--top_k x", "argument --top_k: expected a whole number, found 'x'"),
        (interact, "--temperature 0", "argument --temperature: expected a number of at least 1e-06, found '0'"),
        (interact, "--max_length 0", "argument --max_length: expected a whole number of at least 1, found '0'"),
        (
            interact,
            "--n_replies 65",
            "argument --n_replies: expected a whole number of at least 1 and at most 64, found '65'",
        ),
        (convai_evaluation, "--limit -1", "argument --limit: expected a whole number of at least 0, found '-1'"),
        (
            convai_evaluation,
            "--eval_type bleu",
            "argument --eval_type: expected one of hits@1, ppl, f1, all, found 'bleu'",
        ),
    ],
)
def test_options_out_of_range(script, arguments, line, ended):
    status, said = ended(script, *arguments.split())
    assert (status, said) == (2, f"error: {line} (see: python {script.__name__}.py --help)\n")


@pytest.mark.parametrize(
    ("script", "arguments", "line"),
    [
        (train, "--fp16 O1 --bf16", "--fp16 O1 and --bf16 are two precisions; give one of them"),
        (interact, "--personality a --personality_file b", "--personality and --personality_file do not go together"),
        (interact, "--transcript a --web", "--transcript and --web do not go together"),
    ],
)
def test_options_that_exclude_each_other(script, arguments, line, ended):
    assert ended(script, *arguments.split()) == (
        2,
        f"error: {line.removesuffix('; give one of them')}; give one of them\n",
    )


@pytest.mark.parametrize("wrong", [{"lr": "1"}, {"n_epochs": 1.5}, {"n_epochs": True}, {"fp16": "O4"}, {"model": None}])
def test_settings_are_checked_wherever_they_come_from(wrong):
    (name,) = wrong
    with pytest.raises(UserError, match=f"^{name}: expected .*, found {re.escape(repr(wrong[name]))}$"):
        train.TrainingSettings(**wrong)


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps", "meta", "hpu", "cpu:-1", "gpu", ""])
@pytest.mark.parametrize("script", [train, interact, convai_evaluation])
def test_devices_that_are_not_there(script, device, ended):
    if torch.cuda.is_available() and device.startswith("cuda") or torch.mps.is_available() and device == "mps":
        pytest.skip("it is there")
    status, said = ended(script, "--device", device)
    assert (status, said.count("\n")) == (2, 1)
    assert said.startswith(f"error: --device {device} cannot be used here: ".replace("  ", " "))
    assert said.endswith("; try --device cpu\n")
    assert len(said) < 400


@pytest.mark.parametrize(
    ("script", "arguments", "line"),
    [
        (train, "--model {0}/none", "no such model: {0}/none; expected a folder, a .tar.gz or .gguf file, a URL or a hub id"),
        (train, "--model ~nobody/none", "no such model: ~nobody/none; expected a folder, a .tar.gz or .gguf file, a URL or a hub id"),
        (train, "--model /proc/self/mem", "cannot read /proc/self/mem: Input/output error; choose a model that you can read"),
        (train, "--model file:///etc/passwd", "no such model: file:///etc/passwd; expected a folder, a .tar.gz or .gguf file, a URL or a hub id"),
        (train, "--resume {0}", "{0} holds no training_args.json; expected a run folder of train.py, such as runs/latest"),
        (interact, "--personality_file {0}/none", "cannot read --personality_file {0}/none: [Errno 2] No such file or directory: '{0}/none'; expected UTF-8 text"),
        (interact, "--personality_file {0}", "cannot read --personality_file {0}: [Errno 21] Is a directory: '{0}'; expected UTF-8 text"),
        (interact, "--personality_file {0}/bytes", "cannot read --personality_file {0}/bytes: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte; expected UTF-8 text"),
        (interact, "--dataset_path {0}/none", "no such dataset: {0}/none; pass --dataset_path a file, a URL or a hub id; or give a persona with --personality 'i like cats.'"),
        (interact, "--personality a --transcript {0}", "cannot write --transcript {0}: Is a directory; choose a file you can"),
        (interact, "--personality a --transcript {0}/bytes", "--transcript {0}/bytes holds something else; expected a new file or dialogs in JSON lines"),
    ],
)  # fmt: skip
def test_files_that_options_name(script, arguments, line, tmp_path, ended, monkeypatch):
    (tmp_path / "bytes").write_bytes(b"\xff\x1b[2J")
    status, said = ended(script, *arguments.format(tmp_path).split())
    assert (status, said) == (2, f"error: {line.format(tmp_path)}\n")
    assert [file.name for file in tmp_path.iterdir()] == ["bytes"]
    assert (tmp_path / "bytes").read_bytes() == b"\xff\x1b[2J"


# ------------------------------------------------------------------------------------------------------------
# Datasets
# ------------------------------------------------------------------------------------------------------------


def utterance(**changes) -> str:
    return json.dumps(
        {"train": [{"personality": ["x"], "utterances": [{"history": ["a"], "candidates": ["b"]} | changes]}]}
    )


GOOD = json_lines(TURNS)
DEEP = "maximum recursion depth exceeded while deserializing an object"


@pytest.mark.parametrize(
    ("content", "line"),
    [
        # a wrong type
        (utterance(history=3), ", $.train[0]: Expected `array`, got `int` - at `$.utterances[0].history`"),
        (utterance(candidates=[["b"]]), ", $.train[0]: Expected `str`, got `array` - at `$.utterances[0].candidates[0]`"),
        ('[{"utterances": {}}]', ", $[0]: Expected `array`, got `object` - at `$.utterances`"),
        ('[{"personality": [3], "dialog": []}]', ", $[0]: Expected `str`, got `int` - at `$.personality[0]`"),
        ('{"dialog": 3}\n', ", line 1: Expected `array`, got `int` - at `$.dialog`"),
        ('{"messages": [3]}\n', ", line 1: Expected `str | object`, got `int` - at `$.messages[0]`"),
        ('{"messages": [{"role": "user", "content": [3]}]}\n', ", line 1: Expected `str`, got `int` - at `$.messages[0].content[0]`"),
        ('{"train": {"0": []}}', ", $.train: Expected `array`, got `object`"),
        ("[NaN]", ": JSON is malformed: invalid character (byte 1)"),
        ("null", ": begins with b'null'"),
        ("1 a\tb\ntwo c\td\n", ", line 2: expected a line number first, found 'two'"),
        ("1 a\tb\n-2 c\td\n", ", line 2: expected a line number first, found '-2'"),
        ("1.5 a\tb\n", ", line 1: expected a line number first, found '1.5'"),
        # a missing key
        ('{"train": [{"personality": [], "utterances": [{"candidates": ["a"]}]}]}', ", $.train[0]: Object missing required field `history` - at `$.utterances[0]`"),
        ('{"personality": ["x"]}\n', ", line 1: has the keys personality; {EXPECTED} - at `$`"),
        (json.dumps({f"k{i}": [] for i in range(9999)}), ", line 1: has the keys k0, k1, k2, k3, k4, k5, k6, k7, k8, k9, k10, k11, k12, k13, k14, k15, k16, k17, k18, k19, k20, ...; {EXPECTED} - at `$`"),
        # an empty list where the gold reply must be
        (utterance(candidates=[]), ", $.train[0]: Expected `array` of length >= 1 - at `$.utterances[0].candidates`"),
        # bytes that are no text
        (b"\0" * 100, r": begins with b'\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00'"),
        (b'{"dialog": ["a\0", "b"]}\n', ": JSON is malformed: invalid character (byte 14)"),
        (GOOD.encode() + b'{"dialog": ["a\0", "b"]}\n', ", line 2: JSON is malformed: invalid character (byte 14)"),
        (b"1 hi\thello\n2 \xc3\tx\n", ", line 2: not UTF-8 (invalid continuation byte); save the file as UTF-8"),
        (b"\xef\xbb\xbf", ": begins with b''"),
        # a terminal's commands are not passed on
        ("1 a\tb\n\x1b[31mred c\td\n", ", line 2: expected a line number first, found '[31mred'"),
        # long and deep
        ("1" * 5000 + " a\tb\n", ", line 1: expected a line number first, found '11111111111111111111'"),
        ("1 a\tb\n" + "x" * MEGABYTES, f", line 2: expected a line number first, found '{'x' * 20}'"),
        (GOOD + "[" * MEGABYTES, f", line 2: {DEEP}"),
        ("[" * MEGABYTES, f": {DEEP}"),
        ('[{"x": ' + "[" * MEGABYTES, f": {DEEP}"),
        (GOOD + '{"x": ' + "[" * MEGABYTES, f", line 2: {DEEP}"),
        ('{"dialog": ["' + "x" * MEGABYTES, ": Input data was truncated"),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_datasets_that_cannot_be_read(content, line, write, ended):
    path = write(content)
    status, said = ended(interact, "--dataset_path", path)
    line = line.format(EXPECTED=EXPECTED)
    tail = "" if "save the file" in line else f"; {FORMATS}"
    assert (status, said) == (2, f"error: {path}{line}{tail}; or give a persona with --personality 'i like cats.'\n")


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda data: data[:-12], "Compressed file ended before the end-of-stream marker was reached"),
        (lambda data: data[:9], "Compressed file ended before the end-of-stream marker was reached"),
        (lambda data: data[:-8] + bytes(8), "CRC check failed 0x0 != {crc}"),
        (lambda data: data[:12] + b"\xff\xff" + data[14:], "Error -3 while decompressing data: {zlib}"),
        (lambda data: data + b"more", "Not a gzipped file (b'mo')"),
    ],
    ids=["cut", "only-a-header", "another-checksum", "overwritten", "something-behind-it"],
)
def test_gzip_files_that_are_damaged(damage, line, write):
    path = write(damage(gzip.compress(GOOD.encode() * 9)))
    with pytest.raises(UserError) as caught:
        read(path)
    start, _, _ = line.partition("{")  # what follows is zlib's
    assert str(caught.value).startswith(f"cannot read {path}: {start}")
    assert str(caught.value).endswith("; expected a whole, readable file")


def dialogs_of(*lists: list[str]) -> list:
    return [(list(texts[:-1]), texts[-1]) for texts in lists]


# What looks strange and is right: each row a file and its (history, gold reply) pairs.
STRANGE = {
    "one-candidate": (utterance(candidates=["only"]), dialogs_of(["a", "only"])),
    "no-gold-reply": (json_lines({"dialog": ["hi"]}) + "", []),
    "no-gold-reply-parlai": ("1 hi\n2 there\n", []),
    "no-dialogs": ("[]", []),
    "no-utterances": ('[{"utterances": []}]', []),
    "no-turns": ('{"dialog": []}\n{"messages": []}\n', []),
    "numbers-alone": ("1\n2\n", []),
    "empty-texts": ('{"dialog": ["", ""]}\n', []),
    "half-an-emoji": (r'{"dialog": ["\ud800", "b"]}', dialogs_of(["\ufffd", "b"])),
    "10-MB-role": ('{"messages": [{"role": "' + "x" * MEGABYTES + '", "content": "a"}]}', []),
    "duplicated-numbers": ("1 a\tb\n1 c\td\n1 e\tf\n", dialogs_of(["a", "b"], ["c", "d"], ["e", "f"])),
    "numbers-with-gaps": ("3 a\tb\n9 c\td\n", dialogs_of(["a", "b"], ["a", "b", "c", "d"])),
    "other-digits": ("1 a\tb\n٢ c\td\n", dialogs_of(["a", "b"], ["a", "b", "c", "d"])),
    "escaped-nul": (r'{"dialog": ["a\u0000", "b"]}', dialogs_of(["a\0", "b"])),
    "nul-in-parlai": ("1 a\0\tb\n", dialogs_of(["a\0", "b"])),
    "key-given-twice": ('{"train": [], "train": [{"dialog": ["a", "b"]}]}', dialogs_of(["a", "b"])),
    "keys-of-others": ('{"dialog": ["a", "b"], "id": 7, "meta": {"x": [null]}}\n', dialogs_of(["a", "b"])),
    "10-MB-turns": (json_lines({"dialog": ["x" * MEGABYTES, "b"]}), dialogs_of(["x" * MEGABYTES, "b"])),
    "10-MB-parlai": (f"1 {'x' * MEGABYTES}\tb\n", dialogs_of(["x" * MEGABYTES, "b"])),
    "10-MB-candidate": (utterance(candidates=["x" * MEGABYTES, "b"]), dialogs_of(["a", "b"])),
}


@pytest.mark.parametrize("name", STRANGE)
def test_datasets_that_are_strange_and_right(name, write):
    content, expected = STRANGE[name]
    for data in (content.encode(), gzip.compress(b"\xef\xbb\xbf" + content.replace("\n", "\r\n").encode(), 1)):
        (dialogs,) = read(write(data)).values()
        found = [(turn.history, turn.candidates[-1]) for dialog in dialogs for turn in dialog.utterances]
        assert str(found)[:999] == str(expected)[:999]
        assert hash(str(found)) == hash(str(expected))  # no difference of 10 MB is to be printed


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (json_lines({"dialog": ["a", "b"]}), "{0} holds 1 dialog; expected one to train on and one to validate on, or --valid_path"),
        ("1\n2\n", "{0} holds 0 dialog; expected one to train on and one to validate on, or --valid_path"),
        (json_lines({"dialog": ["a"]}, {"dialog": []}), f"the validation split of {{0}} holds no reply; {FORMATS}"),
        ('{"train": [{"dialog": ["a", "b"]}], "valid": []}', f"the validation split of {{0}} holds no reply; {FORMATS}"),
    ],
    ids=["one-dialog", "no-dialog", "no-reply", "empty-validation"],
)  # fmt: skip
def test_datasets_that_hold_too_little(content, line, write, tmp_path, ended, make_model):
    path, model = write(content), make_model(tmp_path / "model", "gpt2")
    status, said = ended(train, "--model", model, "--dataset_path", path, "--dataset_cache", tmp_path / "cache.bin")
    *_, last = said.splitlines()  # behind the progress bars
    assert (status, last) == (2, f"error: {line.format(path)}")
    assert not list(tmp_path.glob("cache_*.bin")) and not list(tmp_path.glob(".saving-*"))


LANGUAGES = {
    "emoji": ["🙂👍🏽", "👩‍👩‍👧‍👦🏳️‍🌈 nice"],
    "chinese": ["你好吗", "我很好。谢谢你"],
    "right-to-left": ["مرحبا بالعالم", "שלום, מה שלומך?"],
    "combining": ["e\u0301a\u0308 n\u0303", "z̷̢̛a̶͝l̸̛g̵o̶"],
    "direction": ["\u202eabc\u202c", "\u2066x\u2069 y"],
}


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("kind", ["learned", "openai-gpt", "gpt2"])
def test_every_language_is_read_tokenised_and_kept(language, kind, write, tmp_path, tiny):
    texts = LANGUAGES[language]
    tokenizer = (
        DialogTokenizer(learn_bpe(texts, 300)) if kind == "learned" else load_tokenizer(find_model(str(tiny(kind))))
    )
    path = write(json_lines(*[{"personality": texts, "dialog": texts}] * 2))
    split = load_dataset(Dialogs(path), tokenizer, str(tmp_path / "cache.bin"), progress=False)["train"]
    assert split.persona_texts(0) == texts
    assert (split.history_texts(0), split.gold_text(0)) == (texts[:1], texts[1])
    instance = Instances(split, tokenizer.ids, 2, 512)[0]
    assert not {tokenizer.ids.eos, tokenizer.ids.speaker1} & set(instance.candidates[-1][:-1])
    if kind != "openai-gpt":  # whose vocabulary is English letters
        assert tokenizer.hf.decode(instance.candidates[-1][:-1], clean_up_tokenization_spaces=False) == texts[1]


@pytest.mark.parametrize("sentences", [0, 1, 200])
@pytest.mark.parametrize("num_candidates", [1, 2, 99])
def test_personas_of_any_size_and_more_candidates_than_there_are(sentences, num_candidates, write, tmp_path):
    persona = [f"fact {i}." for i in range(sentences)]
    path = write(json_lines(*({"personality": persona, "dialog": ["hi", f"a{i}"]} for i in range(9))))
    split = load_dataset(Dialogs(path), CountingTokenizer(), str(tmp_path / "cache.bin"), progress=False)["train"]
    for limit in (16, 128, 4096):
        instance = Instances(split, IDS, 2, limit, num_candidates, permutations=3)[2 * len(split)]
        assert len(instance.candidates) == min(num_candidates, 8)  # one of nine dialogs is held out
        assert len(instance.prefix) + max(map(len, instance.candidates)) <= limit
        expected = sum(map(len, persona)) if limit == 4096 else None
        assert expected in (None, sum(token < IDS.bos or token > 94 for token in instance.prefix) - len("hi"))


# ------------------------------------------------------------------------------------------------------------
# Archives and bombs
# ------------------------------------------------------------------------------------------------------------


def write_bomb(path: Path, info: tarfile.TarInfo) -> Path:
    """A .tar.gz of one member that is all zeros."""
    info.size = 200 * 2**20
    path.write_bytes(gzip.compress(info.tobuf()) + 200 * gzip.compress(bytes(2**20)))
    return path


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE], ids=["file", "header"])
def test_an_archive_that_is_a_bomb_is_refused_and_leaves_nothing(kind, tmp_path, cache, ended):
    path = write_bomb(tmp_path / "model.tar.gz", member("config.json", kind))
    bound = 100 * (path.stat().st_size + 2**20) >> 20
    status, said = ended(interact, "--personality", "hi", "--model", path)
    line = f"{path} unpacks to more than {bound} MB, a hundred times its size; if that is right, unpack it yourself"
    assert (status, said) == (2, f"error: {line}\n")
    assert kept(cache) == []


def test_a_dataset_that_is_a_bomb_is_refused(tmp_path):
    path = write_bomb(tmp_path / "bomb", member(""))
    with pytest.raises(UserError, match=f"^{path} unpacks to more than 1.. MB, a hundred times its size; "):
        read_dataset(str(path))


def test_a_sparse_member_is_refused(tmp_path, cache):
    info = member("config.json", tarfile.GNUTYPE_SPARSE)
    path = write_tar(tmp_path / "model.tar.gz", info)
    with pytest.raises(UserError):
        unpack(path)
    assert kept(cache) == []


# ------------------------------------------------------------------------------------------------------------
# Models
# ------------------------------------------------------------------------------------------------------------


class Malice:
    """Unpickled, it makes the folder `evil`."""

    def __reduce__(self):
        return os.mkdir, ("evil",)


def config(**changes):
    return lambda folder: rewrite_json(folder / "config.json", **changes)


def weights(name: str, alter=None, rename: str = ""):
    """Replace a tensor by what `alter` makes of it, give it another name, or drop it."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        old = tensors.pop(name, torch.ones(2))
        if alter or rename:
            tensors[rename or name] = (alter or torch.clone)(old.clone()).contiguous()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def content(name: str, data: bytes):
    """Weights in that file alone."""

    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(data)

    return change


def without(*names: str):
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


def saved(value) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def pop_nothing(tensor: torch.Tensor) -> torch.Tensor:
    tensor[-1] = float("nan")
    return tensor


LOOP: dict = {}
LOOP["model"] = LOOP
REMOTE = {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}, "trust_remote_code": True}
ANEW = "; fetch the model again, or use an earlier checkpoint"
COPY = "; copy them into it, or fetch the model again"
CONVERT = "; convert it to safetensors, as transformers 4 does (from_tf=True or from_flax=True)"
NOTHING_ELSE = (
    "; expected safetensors or a state dict of torch; to train from scratch nothing but config.json and a tokenizer"
)
VOCABULARY = "; copy that of the base model into it (tokenizer.json, or vocab.json and merges.txt)"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
PICKLE = "its pickle is damaged, or holds more than tensors, such as code to run; expected whole files of tensors"
WRONG_MODELS = {
    "remote-code": (config(model_type="evil", **REMOTE), "{0}/config.json names the model type 'evil', which transformers does not know and asks for code of its own (auto_map), which is never run; use another model, such as gpt2"),
    "unknown": (config(model_type="evil"), "{0}/config.json names the model type 'evil', which transformers does not know; use another model, such as gpt2"),
    "type-is-a-list": (config(model_type=[]), "{0}/config.json names the model type '[]', which transformers does not know; use another model, such as gpt2"),
    "wrong-type": (config(n_layer="2"), "{0}/config.json: Validation error for field 'n_layer': TypeError: Field 'n_layer' expected int, got str (value: '2'); expected a configuration of transformers"),
    "deep": (lambda folder: (folder / "config.json").write_text("[" * 99999), "cannot read {0}/config.json: maximum recursion depth exceeded while decoding a JSON array from a unicode string; expected a model's configuration in JSON"),
    "no-layers": (config(n_layer=0), "{0}/config.json: n_layer is 0; expected 1 to 10000"),
    "a-million-layers": (config(n_layer=10**6), "{0}/config.json: n_layer is 1000000; expected 1 to 10000"),
    "no-width": (config(n_embd=0), "{0}/config.json: n_embd is 0; expected 1 to 1000000"),
    "less-than-no-heads": (config(n_head=-4), "{0}/config.json: n_head is -4; expected 1 to 10000"),
    "no-positions": (config(n_positions=0), "the weights in {0} have wrong shapes in 1 tensors, such as transformer.wpe.weight (128, 32) for (0, 32)" + ANEW),
    "text-config": (config(text_config={}), "{0}/config.json: its text_config is a dict; expected a configuration of transformers"),
    "indivisible": (config(n_head=5), "cannot load the weights in {0}: `embed_dim` must be divisible by num_heads (got `embed_dim`: 32 and `num_heads`: 5).; expected whole files of tensors"),
    "more-layers": (config(n_layer=3), "the weights in {0} lack 12 tensors, such as transformer.h.2.attn.c_attn.bias" + ANEW),
    "missing": (weights("transformer.ln_f.bias"), "the weights in {0} lack 1 tensors, such as transformer.ln_f.bias" + ANEW),
    "smaller-vocabulary": (config(vocab_size=100), "the weights in {0} have wrong shapes in 1 tensors, such as transformer.wte.weight (320, 32) for (100, 32)" + ANEW),
    "larger-vocabulary": (config(vocab_size=600), "the weights in {0} have wrong shapes in 1 tensors, such as transformer.wte.weight (320, 32) for (600, 32)" + ANEW),
    "other-shape": (weights("transformer.ln_f.bias", lambda old: old[:3]), "the weights in {0} have wrong shapes in 1 tensors, such as transformer.ln_f.bias (3,) for (32,)" + ANEW),
    "nan": (weights("transformer.wte.weight", pop_nothing), "the weights in {0} hold nan or infinity in 1 tensors, such as transformer.wte.weight" + ANEW),
    "infinity": (weights("transformer.wpe.weight", lambda old: old / 0), "the weights in {0} hold nan or infinity in 1 tensors, such as transformer.wpe.weight" + ANEW),
    "too-large": (weights("transformer.wte.weight", lambda old: old * 1e38), "the model's weights give numbers that are not finite; use an earlier checkpoint of it"),
    "code": (content("pytorch_model.bin", saved({"x": Malice()})), "cannot load the weights in {0}/pytorch_model.bin: " + PICKLE),
    "code-in-an-old-file": (content("pytorch_model.bin", pickle.dumps({"x": Malice()})), "cannot load the weights in {0}/pytorch_model.bin: " + PICKLE),
    "code-under-another-name": (content("checkpoint_3.pth", saved({"model": {}, "x": Malice()})), "cannot load the weights in {0}/checkpoint_3.pth: " + PICKLE),
    "no-tensors": (content("pytorch_model.bin", saved([1, 2])), "cannot load the weights in {0}/pytorch_model.bin: a list; expected whole files of tensors"),
    "some-tensors": (content("x.pt", saved({"x": torch.ones(1), "epoch": 3})), "cannot load the weights in {0}/x.pt: epoch is a int; expected whole files of tensors"),
    "empty-bin": (content("pytorch_model.bin", b""), "cannot load the weights in {0}/pytorch_model.bin: EOFError; expected whole files of tensors"),
    "empty": (content("model.safetensors", b""), "cannot load the weights in {0}/model.safetensors: Error while deserializing header: header too small; expected whole files of tensors"),
    "pointer": (content("model.safetensors", POINTER), "{0}/model.safetensors is a Git LFS pointer, not the file itself; run git lfs pull in {0}"),
    "vocabulary-is-a-pointer": (lambda folder: (folder / "vocab.json").write_bytes(POINTER), "{0}/vocab.json is a Git LFS pointer, not the file itself; run git lfs pull in {0}"),
    "shard-of-three": (content("model-00002-of-00003.safetensors", b""), "{0} lacks 2 of the 3 files of its weights, such as model-00001-of-00003.safetensors" + COPY),
    "index-alone": (content("pytorch_model.bin.index.json", b'{"weight_map": {"a": "x.bin", "b": "x.bin"}}'), "{0} lacks 1 of the 1 files of its weights, such as x.bin" + COPY),
    "index-of-numbers": (content("model.safetensors.index.json", b'{"weight_map": {"a": 1, "b": "x"}}'), "cannot read {0}/model.safetensors.index.json: it names no files; expected an index of transformers"),
    "history-in-words": (lambda folder: rewrite_json(folder / "tokenizer_config.json", max_history="x"), "{0}/tokenizer_config.json: max_history: expected a whole number of at least -1, found 'x'"),
    "index-of-nothing": (content("model.safetensors.index.json", b"{}"), "cannot read {0}/model.safetensors.index.json: 'weight_map'; expected an index of transformers"),
    "index-of-no-files": (content("model.safetensors.index.json", b'{"weight_map": {}}'), "cannot read {0}/model.safetensors.index.json: it names no files; expected an index of transformers"),
    "wrapped-in-itself": (content("pytorch_model.bin", saved(LOOP)), "cannot load the weights in {0}/pytorch_model.bin: model is a dict; expected whole files of tensors"),
    "a-setting-that-is-a-function": (config(to_dict=1), "{0}/config.json: to_dict is no setting; expected a configuration of transformers"),
    "token-types-in-words": (lambda folder: rewrite_json(folder / "tokenizer_config.json", token_types="no"), "cannot read the tokenizer in {0}: token_types is 'no', not true or false; expected one of transformers'"),
    "two-checkpoints": (lambda folder: (content("checkpoint_1.pth", b"")(folder), (folder / "checkpoint_2.pt").touch()), "{0} holds weights in 2 files, such as checkpoint_1.pth and checkpoint_2.pt; rename the one to use to pytorch_model.bin"),
    "flax": (content("flax_model.msgpack", b""), "{0} holds no weights that are read here, but flax_model.msgpack" + CONVERT),
    "tensorflow": (content("tf_model.h5", POINTER), "{0} holds no weights that are read here, but tf_model.h5" + CONVERT),
    "tensorflow-checkpoint": (content("model.ckpt.index", b""), "{0} holds no weights that are read here, but model.ckpt.index" + CONVERT),
    "gguf-inside": (content("q8.gguf", b"GGUF"), "{0} holds no weights that are read here, but q8.gguf; pass that file itself as --model"),
    "adapter": (content("adapter_model.safetensors", b""), "{0} holds no weights that are read here, but adapter_model.safetensors; an adapter needs its base; merge the two, as peft's merge_and_unload does, and save the result"),
    "optimizer": (content("optimizer.pt", b""), "{0} holds no weights that are read here, but optimizer.pt" + NOTHING_ELSE),
    "of-the-original": (content("model_training_args.bin", b""), "{0} holds no weights that are read here, but model_training_args.bin" + NOTHING_ELSE),
    "whatever": (content("weights.dat", b""), "{0} holds no weights that are read here, but weights.dat" + NOTHING_ELSE),
    "in-a-folder": (lambda folder: (folder / "best").mkdir() or (folder / "model.safetensors").rename(folder / "best" / "model.safetensors"), "{0} holds no weights that are read here, but best" + NOTHING_ELSE),
    "other-names": (weights("transformer.ln_f.bias", rename="norm.bias"), "the weights in {0} lack 1 tensors, such as transformer.ln_f.bias, and hold 1 others, such as norm.bias" + ANEW),
    "no-tokenizer": (without("vocab.json", "merges.txt", "tokenizer_config.json"), "{0} holds weights but no tokenizer" + VOCABULARY),
    "no-vocabulary": (without("vocab.json", "merges.txt"), "the tokenizer in {0} is empty" + VOCABULARY),
    "half-a-vocabulary": (without("merges.txt"), "cannot read the tokenizer in {0}: `vocab` and `merges` must be both be from memory or both filenames; expected one of transformers'"),
    "small-vocabulary": (lambda folder: ((folder / "vocab.json").write_text('{"a": 0, "b": 1}'), (folder / "merges.txt").write_text("")), "the tokenizer in {0} has 2 tokens for an embedding of 320" + VOCABULARY),
    "none": (lambda folder: (folder / "model.safetensors").unlink(), "{0} holds no weights; train it first: python train.py --model {0}"),
}  # fmt: skip


@pytest.fixture
def damaged(tiny, tmp_path, monkeypatch):
    """`damaged(change)` is a copy of a small GPT-2's folder after `change`, in a working folder of its own."""
    monkeypatch.chdir(tmp_path)

    def damaged(change) -> Path:
        shutil.copytree(tiny("gpt2"), tmp_path / "model")
        change(tmp_path / "model")
        return tmp_path / "model"

    return damaged


@pytest.mark.parametrize("name", WRONG_MODELS)
def test_models_that_cannot_be_used(name, damaged, ended, tmp_path):
    change, line = WRONG_MODELS[name]
    folder = damaged(change)
    status, said = ended(interact, "--personality", "hi", "--model", folder)
    assert (status, said) == (2, f"error: {line.format(folder)}\n")
    assert not (tmp_path / "evil").exists()


def shard(folder: Path) -> None:
    """The weights in two files, as they were saved in parts, without an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for number, names in enumerate((list(tensors)[:5], list(tensors)[5:]), 1):
        save_file({name: tensors[name] for name in names}, folder / f"model-0000{number}-of-00002.safetensors")


def repack(name: str, wrap=lambda tensors: tensors):
    """The weights in a file of torch alone, wrapped as some training scripts do it."""

    def change(folder: Path) -> None:
        content(name, saved(wrap(load_file(folder / "model.safetensors"))))(folder)

    return change


def renamed(**names: str):
    def change(folder: Path) -> None:
        for old, new in names.items():
            next(folder.glob(f"{old}.*")).rename(folder / new)

    return change


def prefixed(prefix: str):
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


WHOLE_MODELS = {
    "shards": shard,
    "shard-of-none": renamed(model="model-00001-of-00000.safetensors"),
    "another-name": renamed(model="best.safetensors"),
    "original-checkpoint": repack("checkpoint_mymodel_28215.pt"),
    "pth": repack("checkpoint_mymodel_3.pth"),
    "ckpt": repack("last.ckpt", lambda tensors: {"epoch": 3, "state_dict": tensors}),
    "wrapped": repack("pytorch_model.bin", lambda tensors: {"model": tensors, "optimizer": {}, "step": 7}),
    "wrapped-twice": repack("ckpt.pt", lambda tensors: {"model": {"state_dict": tensors}}),
    "DataParallel": repack("pytorch_model.bin", prefixed("module.")),
    "compiled": repack("pytorch_model.bin", prefixed("module._orig_mod.")),
    "body-compiled": repack("x.pt", lambda found: {k.replace("former.h", "former._orig_mod.h"): v for k, v in found.items()}),
    "OpenAI's-names": renamed(vocab="encoder.json", merges="vocab.bpe"),
    "other-things-beside": lambda folder: [(folder / name).touch() for name in ("optimizer.pt", "training_args.bin", "a.h5", "b.pt")],
    "tuples-asked-for": config(return_dict=False),
    "better-than-half": lambda folder: (folder / "pytorch_model-00002-of-00002.bin").touch(),
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE_MODELS)
def test_models_that_are_whole_in_their_own_way(name, damaged, tiny, load, caplog):
    model, tokenizer = load(damaged(WHOLE_MODELS[name]))
    right, right_tokenizer = load(tiny("gpt2"))
    for parameter in ("transformer.wte.weight", "transformer.h.1.attn.c_attn.weight"):
        torch.testing.assert_close(model.lm.get_parameter(parameter)[:320], right.lm.get_parameter(parameter)[:320])
    assert tokenizer.encode(["hello you !"]) == right_tokenizer.encode(["hello you !"])
    assert not caplog.messages


def test_a_tokenizer_without_a_vocabulary_is_not_trained_from_scratch(tiny, damaged, write, ended):
    folder = damaged(without("model.safetensors", "vocab.json", "merges.txt"))
    status, said = ended(train, "--model", folder, "--dataset_path", write(json_lines(TURNS, TURNS)))
    assert (status, said.splitlines()[-1]) == (2, f"error: the tokenizer in {folder} is empty{VOCABULARY}")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (weights("adapter.weight", lambda old: old), "{0} holds 1 tensors this model has no place for, such as adapter.weight"),
        (config(n_layer=1), "{0} holds 11 tensors this model has no place for, such as transformer.h.1.attn.c_attn.weight"),
        (config(**REMOTE), "{0}/config.json asks for code of its own (auto_map), which is never run; using the gpt2 of transformers"),
    ],
)  # fmt: skip
def test_models_with_something_left_over(change, line, damaged, load, caplog, tmp_path):
    folder = damaged(change)
    (folder / "evil.py").write_text("import os; os.mkdir('evil')")
    model, _ = load(folder)
    assert caplog.messages == [f"warning: {line.format(folder)}"]
    model.save(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    assert not (tmp_path / "evil").exists()


SCRATCH = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "vocab_size": 300}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"vocab_size": "x"}, "{0}/config.json: vocab_size is 'x'; expected 5 to 1000000, as a vocabulary is learned"),
        ({"vocab_size": -1}, "{0}/config.json: vocab_size is -1; expected 5 to 1000000, as a vocabulary is learned"),
        ({"vocab_size": 10**9}, "{0}/config.json: vocab_size is 1000000000; expected 5 to 1000000, as a vocabulary is learned"),
        ({"n_head": 3}, "{0}/config.json: `embed_dim` must be divisible by num_heads (got `embed_dim`: 16 and `num_heads`: 3).; expected sizes of which a model can be made"),
        ({"n_positions": 10}, "the model in {0} takes 10 tokens at once; expected at least 16"),
        ({"model_type": "t5"}, "a t5 model is not a causal language model; expected one, such as gpt2"),
    ],
    ids=str,
)  # fmt: skip
def test_configurations_of_which_no_model_can_be_made(changes, line, tmp_path, write, ended):
    folder, path = tmp_path / "model", write(json_lines(TURNS, TURNS))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SCRATCH | changes))
    status, said = ended(train, "--model", folder, "--dataset_path", path, "--dataset_cache", tmp_path / "cache.bin")
    assert (status, said.splitlines()[-1]) == (2, f"error: {line.format(folder)}")


def test_a_configuration_of_a_model_larger_than_memory(tiny, damaged, load):
    folder = damaged(config(n_layer=9999, n_embd=10**6))
    with pytest.raises(UserError, match=f"^{folder}/config.json: a model of these sizes takes at least [0-9]+ GB, and"):
        load(folder)


def high_id(folder: Path) -> None:
    """A vocabulary with an id of 2**31 - 1."""
    vocabulary = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(vocabulary | {"zebra": 2**31 - 1}))


def test_adapters_that_name_each_other(tmp_path, ended):
    for name, base in (("a", "b"), ("b", "a")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(
            json.dumps({"base_model_name_or_path": str(tmp_path / base)})
        )
    status, said = ended(interact, "--personality", "hi", "--model", tmp_path / "a")
    assert status == 2
    assert re.fullmatch(
        f"error: the base that {tmp_path}/[ab]/adapter_config.json names is an adapter of this one; expected a model\n",
        said,
    )


def test_no_path_holds_a_nul():
    with pytest.raises(UserError, match="expected one without a NUL"):
        typed_path("a\0b")


def test_a_model_whose_numbers_are_not_finite_says_nothing(tiny, load):
    model, tokenizer = load(tiny("gpt2"))
    chat = Conversation(model, tokenizer, ["hi"], Decoding(), 2, 0)
    weight = model.lm.transformer.ln_f.weight.data
    before = weight.clone()
    try:
        weight.fill_(float("nan"))
        with pytest.raises(UserError, match="numbers that are not finite"):
            chat.reply("hello")
    finally:
        weight.copy_(before)


def test_a_tokenizer_with_ids_far_apart(damaged, load):
    folder = damaged(high_id)
    with pytest.raises(UserError, match=f"^the tokenizer in {folder} has an id of 2147483647 for "):
        load(folder)


def replacing(pattern: str, content: str, kind: str = "String") -> dict:
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def in_a_row(steps: str, *rules: dict) -> dict:
    return {"type": "Sequence", steps: rules}


GROWS = "cannot read the tokenizer in {0}: its rules can make a text more than 10000 times as long; expected one of transformers'"
CUT_OFF = {"type": "Precompiled", "precompiled_charsmap": "/////////////w=="}
NEVER = {"type": "Split", "pattern": {"Regex": "(a+)+$|(a|aa)+c"}, "behavior": "Isolated", "invert": False}
HOSTILE_TOKENIZERS = {
    "explodes": ({"normalizer": in_a_row("normalizers", *[replacing("a", "aaaa")] * 30)}, GROWS),
    "explodes-between": ({"normalizer": in_a_row("normalizers", *[replacing("x*", "a", "Regex")] * 30)}, GROWS),
    "explodes-by-a-pattern": ({"normalizer": in_a_row("normalizers", *[replacing(r"\p{L}*", "a", "Regex")] * 30)}, GROWS),
    "explodes-in-a-sequence": ({"normalizer": in_a_row("normalizers", in_a_row("normalizers", *[{"type": "Prepend", "prepend": "ab"}] * 9))}, GROWS),
    "explodes-when-read": ({"decoder": in_a_row("decoders", *[replacing("a", "aaaa")] * 30)}, GROWS),
    "cut-off": ({"normalizer": CUT_OFF}, "cannot read the tokenizer in {0}: its table of characters is cut off; expected one of transformers'"),
    "panics": ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "cannot read the tokenizer in {0}: chunk size must be non-zero; expected one of transformers'"),
    "no-rules": ({"normalizer": [1]}, "cannot read the tokenizer in {0}: Expected `object | null`, got `array` - at `$.normalizer`; expected one of transformers'"),
}  # fmt: skip


def with_rules(**rules):
    """A tokenizer.json with these rules, which transformers takes as they are."""

    def change(folder: Path) -> None:
        tokenizer = json.loads(AutoTokenizer.from_pretrained(folder).backend_tokenizer.to_str())
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer | rules))
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))

    return change


@pytest.mark.parametrize("name", HOSTILE_TOKENIZERS)
def test_a_tokenizer_that_would_end_the_process(name, damaged, ended):
    rules, line = HOSTILE_TOKENIZERS[name]
    folder = damaged(with_rules(**rules))
    status, said = ended(interact, "--personality", "hi", "--model", folder)
    assert (status, said) == (2, f"error: {line.format(folder)}\n")


def test_a_tokenizer_that_fails_with_some_texts(damaged, load):
    """By a pattern that never ends, and by a rule for what is read."""
    rules = {"pre_tokenizer": NEVER, "decoder": {"type": "Strip", "content": "a", "start": 0, "stop": 10**9}}
    folder = damaged(with_rules(**rules))
    _, tokenizer = load(folder)
    for fails in (
        lambda: tokenizer.encode(["hi", "a" * 40 + "!"]),
        lambda: tokenizer.decode(tokenizer.encode(["a"])[0]),
    ):
        with pytest.raises(UserError, match=f"^the tokenizer in {folder} fails: .*; use another, or mend its rules$"):
            fails()


def test_ordinary_rules_of_a_tokenizer_pass(damaged, load):
    llama = in_a_row("normalizers", {"type": "Prepend", "prepend": "▁"}, replacing(" ", "▁"))
    albert = in_a_row(
        "normalizers", replacing("``", '"'), {"type": "NFKD"}, {"type": "Lowercase"}, replacing(" {2,}", " ", "Regex")
    )
    load(damaged(with_rules(normalizer=in_a_row("normalizers", llama, albert))))


def loop(path: Path) -> None:
    path.symlink_to("other")
    path.with_name("other").symlink_to(path.name)


LATEST = {
    "loops": loop,
    "too-long": lambda path: path.write_text("x" * 5000),
    "nul": lambda path: path.write_text("a\0b"),
    "bytes": lambda path: path.write_bytes(b"\xff"),
    "itself": lambda path: path.write_text("latest"),
}


@pytest.mark.parametrize("name", LATEST)
def test_a_link_to_the_latest_run_that_leads_nowhere(name, tmp_path, ended):
    LATEST[name](tmp_path / "latest")
    status, said = ended(train, "--resume", tmp_path / "latest")
    assert (status, said.count("\n"), said.split(": ")[0]) == (2, 1, "error")
    assert "expected a run folder of train.py" in said


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ('{"n_epochs": "x"}', "n_epochs"),
        ('{"n_epochs": -1}', "n_epochs"),
        ('{"lr": NaN}', "lr"),
        ('{"seed": 1.5}', "seed"),
        ('{"bf16": 1}', "bf16"),
        ('{"model": ["gpt2"]}', "model"),
        ('{"dataset_digest": 3}', "dataset_digest"),
        ('{"no_such": 3}', "no_such"),
        ("[1]", "expected what train.py wrote"),
        ("[" * 99999, "expected what train.py wrote"),
    ],
)
def test_settings_of_a_run_that_were_changed_by_hand(content, key, tmp_path, ended):
    (tmp_path / "training_args.json").write_text(content)
    status, said = ended(train, "--resume", tmp_path)
    assert (status, said.count("\n")) == (2, 1) and key in said
    assert said.startswith(f"error: cannot read {tmp_path}/training_args.json: ")


def test_a_checkpoint_to_resume_from_runs_no_code(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    path = tmp_path / "checkpoints" / "step-1.pt"
    path.write_bytes(saved({"learner": Malice()}))
    with pytest.raises(UserError) as caught:
        checkpoints.newest_checkpoint(tmp_path, None)
    assert str(caught.value) == f"no checkpoint in {tmp_path}/checkpoints can be read; start a new run"
    reason = "its pickle is damaged, or holds more than tensors, such as code to run"
    assert caplog.messages == [f"warning: {path} cannot be read ({reason}); trying the one before it"]
    assert not (tmp_path / "evil").exists() and path.exists()


# ------------------------------------------------------------------------------------------------------------
# URLs
# ------------------------------------------------------------------------------------------------------------


class Liar(Handler):
    def do_GET(self):  # noqa: N802
        answer = self.server.answer
        if answer.startswith("to "):
            self.send_response(302)
            self.send_header("Location", answer[3:].format(self.server.url))
            self.end_headers()
        elif answer == "stall":
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            self.server.stalled.wait()
        else:
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT) + int(answer)))
            self.end_headers()
            self.wfile.write(CONTENT)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("to file:///etc/passwd", "Request URL has an unsupported protocol 'file://'."),
        ("to ftp://127.0.0.1/x", "Request URL has an unsupported protocol 'ftp://'."),
        ("to gopher://127.0.0.1/x", "Request URL has an unsupported protocol 'gopher://'."),
        (
            "to data:text/plain,x",
            "Invalid URL in location header: For absolute URLs, path must be empty or begin with '/'.",
        ),
        ("to {}", "Exceeded maximum allowed redirects."),
        ("stall", "timed out"),
        ("10", "the connection breaks off each time"),
    ],
)
def test_urls_that_lead_astray(answer, reason, server, cache, monkeypatch, ended):
    if answer == "stall":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.05)
    server.RequestHandlerClass, server.stalled, server.answer = Liar, threading.Event(), answer
    server.handle_error = lambda *_: None  # that its client has gone
    try:
        status, said = ended(convai_evaluation, "--model", server.url)
    finally:
        server.stalled.set()
    lines = [line for line in said.splitlines() if not line.startswith("data.json:")]  # the progress bar
    assert (status, lines) == (2, [f"error: cannot fetch {server.url}: {reason}; pass --model a local folder or file"])
    assert all(name.endswith(".incomplete") for name in kept(cache))


def test_names_in_urls_that_no_file_can_have(server, cache):
    assert download(f"{server.url}/{'x' * 300}", "").read_bytes() == CONTENT
    with pytest.raises(UserError, match="^cannot fetch http://127.0.0.1.*; pass another$"):
        download("http://127.0.0.1:1/\udcff", "pass another")


# ------------------------------------------------------------------------------------------------------------
# Disks
# ------------------------------------------------------------------------------------------------------------


class Destroyer(CountingTokenizer):
    """Removes the cache's folder while it tokenises."""

    def encode(self, texts):
        shutil.rmtree(self.name)
        return super().encode(texts)


@pytest.mark.parametrize(
    ("folder", "largest", "tokenizer", "line"),
    [
        ("file", None, None, "cannot create the folder {0}: File exists; choose one you can write to"),
        ("/proc/nothing", None, None, "cannot create the folder {0}: No such file or directory; choose one you can write to"),
        ("/sys", None, None, "cannot write beside {0}/cache_{1}.bin: Permission denied; choose a folder you can write to"),
        ("full", 100, None, "cannot write to {0}: Error while serializing: I/O error: File too large (os error 27); free some space or choose another"),
        ("gone", None, Destroyer, "cannot write to {0}: No such file or directory; free some space or choose another"),
    ],
)  # fmt: skip
def test_a_dataset_cache_that_cannot_be_written(folder, largest, tokenizer, line, write, tmp_path):
    path, folder = write(json_lines(TURNS, TURNS)), tmp_path / folder
    (tmp_path / "file").touch()
    with pytest.raises(UserError) as caught, full_disk(largest) if largest else contextlib.nullcontext():
        load_dataset(
            Dialogs(path), (tokenizer or CountingTokenizer)(str(folder)), f"{folder}/cache.bin", progress=False
        )
    said = str(caught.value)
    assert said == line.format(folder, said.partition("cache_")[2][:12])
    assert (
        not folder.is_relative_to(tmp_path) or not folder.is_dir() or {f.suffix for f in folder.iterdir()} <= {".lock"}
    )
    assert len(read(path)["all"]) == 2


def test_a_download_onto_a_full_disk_is_continued_later(server, cache):
    with full_disk(10000), pytest.raises(UserError) as caught:
        download(server.url, "free some space")
    assert str(caught.value) == f"cannot fetch {server.url}: File too large; free some space"
    assert download(server.url, "").read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=10000-"]


def test_a_download_cache_that_is_removed_midway(server, cache, monkeypatch):
    whole = Handler.do_GET

    def removing(self):
        shutil.rmtree(cache)
        whole(self)

    monkeypatch.setattr(Handler, "do_GET", removing)
    with pytest.raises(UserError) as caught:
        download(server.url, "try again")
    assert str(caught.value).startswith(f"cannot fetch {server.url}: No such file or directory; try again")
    monkeypatch.setattr(Handler, "do_GET", whole)
    assert download(server.url, "").read_bytes() == CONTENT


def test_unpacking_onto_a_full_disk_leaves_nothing(tmp_path, cache):
    path = write_tar(tmp_path / "model.tar.gz", "config.json")
    with full_disk(1), pytest.raises(UserError) as caught:
        unpack(path)
    line = f"{path} cannot be unpacked: File too large; expected a .tar.gz, whole, and room for it"
    assert str(caught.value) == line
    assert kept(cache) == []
    assert (unpack(path) / "config.json").exists()


def test_a_transcript_on_a_full_disk_keeps_its_whole_lines(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text(GOOD)
    transcript = Transcript(str(path))
    chat = SimpleNamespace(persona=[], history=["hi", "hello " * 99])
    with full_disk(len(GOOD) + 50), pytest.raises(UserError) as caught:
        transcript.add(chat)
    assert str(caught.value) == f"cannot write --transcript {path}: File too large; choose a file you can"
    assert path.read_text() == GOOD
    transcript.add(chat)
    assert read(str(path))["all"][0] == DIALOG and len(read(str(path))["all"]) == 2


def test_a_transcript_that_cannot_be_cut_back(tmp_path, monkeypatch):
    path = tmp_path / "chats.jsonl"
    transcript = Transcript(str(path))

    def fails(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "truncate", fails)
    with full_disk(10), pytest.raises(UserError, match=f"cannot write --transcript {path}: File too large"):
        transcript.add(SimpleNamespace(persona=[], history=["hi", "hello"]))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe: File or stream is not seekable.; choose a file you can"):
        Transcript(str(tmp_path / "pipe"))


def test_a_name_too_long_to_save_a_chat_in(tmp_path, dialog_model, load):
    terminal = interact.TerminalChat(Conversation(*load(dialog_model("gpt2")), [], Decoding(), 2, 0), None, Dialogs(""))
    terminal.chat.resume(["hi", "hello"])
    with pytest.raises(UserError, match=f"cannot write to {tmp_path}: .*File name too long"):
        terminal.do_save(str(tmp_path / ("x" * 300)))


def test_a_full_gpu_is_one_line(ended, monkeypatch):
    def fill():
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation")

    monkeypatch.setattr(train, "parse_settings", fill)
    line = "CUDA out of memory. Tried to allocate 2.00 GiB.; try smaller batches, or another --device (see the README)"
    assert ended(train) == (2, f"error: {line}\n")


def test_saving_a_chat_on_a_full_disk_keeps_what_was_saved(tmp_path, dialog_model, load, capsys):
    model, tokenizer = load(dialog_model("gpt2"))
    chat = Conversation(model, tokenizer, ["i like cats."], Decoding(), 2, 0)
    terminal, path = interact.TerminalChat(chat, None, Dialogs("")), tmp_path / "chat.json"
    chat.resume(["hi", "hello"])
    terminal.do_save(str(path))
    before = path.read_text()
    chat.resume(["hi", "hello", "x" * 9999, "bye"])
    with full_disk(len(before)), pytest.raises(UserError) as caught:
        terminal.do_save(str(path))
    line = f"cannot write to {tmp_path}: File too large; free some space or choose another"
    assert str(caught.value) == line
    assert path.read_text() == before and [file.name for file in tmp_path.glob("*chat*")] == ["chat.json"]
