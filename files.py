"""What lies on this disk: writing whole files, downloads, archives, finding a model's files."""

import contextlib
import gzip
import hashlib
import io
import os
import re
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from cli import UserError, first_line

FINETUNED_URL = "https://s3.amazonaws.com/models.huggingface.co/transfer-learning-chatbot/gpt_personachat_cache.tar.gz"
HUB_NAMES = {"openai-gpt": "openai-community/openai-gpt", "gpt2": "openai-community/gpt2"}


# ------------------------------------------------------------------------------------------------------------
# Paths and whole files
# ------------------------------------------------------------------------------------------------------------


def typed_path(name: str) -> Path:
    """A path as people type it: ~ is the home folder."""
    return Path(os.path.expanduser(name))  # pathlib's raises where there is no such user


def is_url(name: str) -> bool:
    return name.lower().startswith(("http://", "https://"))


def cache_folder() -> Path:
    """Where downloads are kept: `$XDG_CACHE_HOME/improvedflend`, by default `~/.cache/improvedflend`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "improvedflend"


def make_folder(folder: Path) -> None:
    """Create a folder and its parents; a failure is a `UserError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create the folder {folder}: {error.strerror}; choose one you can write to") from error


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold `path`.lock while the body runs, so that two processes never prepare the same thing at once."""
    make_folder(path.parent)
    try:
        held = FileLock(str(path) + ".lock")
        held.acquire()
    except OSError as error:
        raise UserError(f"cannot write beside {path}: {error.strerror}; choose a folder you can write to") from error
    with held:
        yield


UNFINISHED = ".saving-"  # begins the names of the folders that `whole_files` writes in


@contextlib.contextmanager
def whole_files(folder: Path) -> Iterator[Path]:
    """A temporary folder whose files move into `folder` when the body is done: each appears there whole or not at all.

    Raises:
        UserError: something could not be written; what `folder` held before is untouched.
    """
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=UNFINISHED) as partial:
            yield Path(partial)
            mask = os.umask(0)
            os.umask(mask)
            for file in sorted(os.listdir(partial)):
                with open(Path(partial, file), "rb+") as written:
                    os.fsync(written.fileno())  # on the disk before it has its name: machines lose power
                Path(partial, file).chmod(0o666 & ~mask)  # as a new file's are: safetensors makes its own private
                os.replace(Path(partial, file), folder / file)
    except UserError:
        raise
    except Exception as error:  # safetensors and torch have their own errors for a full disk
        raise UserError(f"cannot write to {folder}: {first_line(error)}; free some space or choose another") from error


def remove_unfinished(folder: Path) -> None:
    """Remove what a process that was killed while it wrote has left in `folder`."""
    for leftover in folder.glob(UNFINISHED + "*"):
        shutil.rmtree(leftover, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------------
# Downloads and archives
# ------------------------------------------------------------------------------------------------------------


class Part(io.BufferedWriter):
    """What is here of a download. A server that breaks off and can only begin anew is given up after a few times."""

    anew = 0

    def truncate(self, size: int | None = None) -> int:
        self.anew += 1
        if self.anew > 5:
            raise OSError("the connection breaks off each time")
        return super().truncate(size)


def download(url: str, instead: str) -> Path:
    """Fetch `url` into the cache folder, once; a part left by an earlier attempt is continued.

    Raises:
        UserError: it cannot be fetched; `instead` tells the user what to pass in its place.
    """
    last = Path(re.split("[?#]", url)[0]).name[-50:]  # file systems take names of 255 bytes, four to a character
    name = f"{hashlib.sha256(os.fsencode(url)).hexdigest()[:16]}-{last or 'file'}"
    path = cache_folder() / name
    if path.exists():
        return path
    from huggingface_hub.file_download import http_get  # heavy: only where something is fetched
    from huggingface_hub.utils import HfHubHTTPError
    from huggingface_hub.utils import logging as hub_logging

    hub_logging.set_verbosity_error()
    part = path.with_name(name + ".incomplete")
    with lock(path):
        if path.exists():  # another process fetched it while this one waited
            return path
        try:
            with Part(io.FileIO(part, "ab")) as file:
                try:
                    http_get(url, file, resume_size=file.tell(), displayed_filename=path.name[17:])
                except HfHubHTTPError as error:
                    if error.response.status_code != 416:  # 416: nothing lies behind what we hold; start anew
                        raise
                    file.truncate(0)
                    http_get(url, file, displayed_filename=path.name[17:])
            os.replace(part, path)
        except Exception as error:  # the network's errors have many types, and all mean the same to the user
            raise UserError(f"cannot fetch {url}: {first_line(error)}; {instead}") from error
    return path


def forget(path: Path) -> None:
    """Remove a file that is not what it should be, where it was downloaded: the next attempt fetches it anew."""
    if path.parent == cache_folder():
        with contextlib.suppress(OSError):
            path.unlink()


class Unzipped(gzip.GzipFile):
    """A gzip file, read in pieces until it proves a bomb: text and weights pack to a tenth, a bomb to a thousandth."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.bound = self.left = 100 * path.stat().st_size + 100 * 2**20

    def read(self, size: int) -> bytes:
        data = super().read(size)
        self.left -= len(data)
        if self.left < 0:
            raise UserError(
                f"{self.name} unpacks to more than {self.bound >> 20} MB, a hundred times its size; "
                "if that is right, unpack it yourself"
            )
        return data


def extract(archive: Path, folder: str) -> None:
    """Write the files of a .tar.gz to `folder`. Links, devices and paths that lead outside are refused."""
    with Unzipped(archive) as unzipped, tarfile.open(fileobj=unzipped, mode="r|") as tar:
        for member in tar:
            if not (member.isfile() or member.isdir()) or member.issparse():
                raise UserError(f"{archive}: '{member.name}' is a link or a device; expected plain files")
            if member.name.startswith("/"):
                raise UserError(f"{archive}: '{member.name}' leads outside; expected relative paths")
            tar.extract(member, folder, filter="data")
        while unzipped.read(2**20):  # behind the last file comes the checksum of all
            pass


def unpack(archive: Path) -> Path:
    """Unpack a model's .tar.gz beside the cache's other files, once, and return the folder with its config.json."""
    stat = archive.stat()
    key = hashlib.sha256(f"{archive.resolve()}{stat.st_size}{stat.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = cache_folder() / f"{key}-{archive.name.split('.tar')[0]}"
    with lock(folder):
        if not folder.exists():
            try:
                with tempfile.TemporaryDirectory(dir=folder.parent, prefix=folder.name + ".") as partial:
                    extract(archive, partial)
                    os.replace(partial, folder)
            except (UserError, tarfile.TarError, EOFError, OSError, zlib.error) as error:
                if not isinstance(error, OSError) or isinstance(error, gzip.BadGzipFile):  # not for want of room
                    forget(archive)
                if isinstance(error, UserError):
                    raise
                raise UserError(
                    f"{archive} cannot be unpacked: {first_line(error)}; expected a .tar.gz, whole, and room for it"
                ) from error
    configs = sorted(folder.rglob("config.json"), key=lambda path: len(path.parts))
    if not configs:
        forget(archive)
        raise UserError(f"{archive} holds no config.json; expected an archive of a model folder")
    return configs[0].parent


# ------------------------------------------------------------------------------------------------------------
# Finding a model's files
# ------------------------------------------------------------------------------------------------------------


@dataclass
class ModelFiles:
    """A model on this machine: a folder, and the name of the .gguf file in it if it is one."""

    folder: Path
    gguf: str | None = None

    @property
    def has_weights(self) -> bool:
        return bool(self.gguf) or any(self.folder.glob("*.safetensors")) or any(self.folder.glob("pytorch_model*.bin"))

    @property
    def has_tokenizer(self) -> bool:
        names = (
            "tokenizer.json",
            "vocab.json",
            "tokenizer.model",
            "spiece.model",
            "vocab.txt",
            "tokenizer_config.json",
        )
        return bool(self.gguf) or any((self.folder / name).exists() for name in names)


def find_finetuned_model(name: str) -> ModelFiles:
    """As `find_model`, for talking and evaluating: there openai-gpt is the published model fine-tuned from it."""
    return find_model(FINETUNED_URL if name == "openai-gpt" else name)


def find_model(name: str) -> ModelFiles:
    """The files of a model given by folder, .gguf or .tar.gz file, URL of one, short name or hub id.

    Raises:
        UserError: there is no such file, or it cannot be fetched.
    """
    path = download(name, "pass --model a local folder or file") if is_url(name) else typed_path(name)
    if os.path.isdir(path):  # pathlib's raises for names that are too long
        if not os.path.exists(path / "config.json"):
            raise UserError(f"{path} holds no config.json; expected a model folder, such as one that train.py wrote")
        files = ModelFiles(path)
        if not files.has_weights and os.path.exists(path / "training_args.json"):
            raise UserError(
                f"{path} holds no weights, as before a run's first evaluation; "
                f"go on with it: python train.py --resume {path}"
            )
        return files
    if os.path.isfile(path):
        try:
            with open(path, "rb") as file:
                magic = file.read(4)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}; choose a model that you can read") from error
        if magic == b"GGUF":
            return ModelFiles(path.parent, gguf=path.name)
        if magic[:2] == b"\x1f\x8b":
            return ModelFiles(unpack(path))
        if path.name == "latest":  # a text file, where links are not possible
            return find_model(str(find_run(name)))
        forget(path)
        raise UserError(f"{path} is neither a .gguf nor a .tar.gz file; expected one of these or a model folder")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(("/", ".gguf", ".gz")) or "\\" in name:
        raise UserError(f"no such model: {name}; expected a folder, a .tar.gz or .gguf file, a URL or a hub id")
    return ModelFiles(fetch_from_hub(HUB_NAMES.get(name, name)))


def fetch_from_hub(repo: str) -> Path:
    """A snapshot of a hub repository's config, tokenizer and weights (safetensors, or .bin where there are none)."""
    from huggingface_hub import snapshot_download  # heavy: only where something is fetched

    texts = ["*.json", "*.txt", "*.model"]
    try:
        folder = Path(snapshot_download(repo, allow_patterns=[*texts, "*.safetensors"], ignore_patterns=["*/*"]))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(repo, allow_patterns=["pytorch_model*.bin"])
    except Exception as error:  # the hub's and the network's errors have many types; all mean the same to the user
        raise UserError(
            f"cannot fetch '{repo}' from the hub: {first_line(error)}; pass --model a local folder"
        ) from error
    return folder


def find_run(name: str) -> Path:
    """The run folder of that name, which may be `.../latest`. Raises UserError where train.py left none there."""
    folder = typed_path(name)
    try:
        if folder.is_file():
            folder = folder.parent / folder.read_text(encoding="utf-8").strip()
        folder = folder.resolve()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {folder}: {first_line(error)}; expected a run folder of train.py") from error
    if not (folder / "training_args.json").is_file():
        raise UserError(f"{folder} holds no training_args.json; expected a run folder of train.py, such as runs/latest")
    return folder
