"""What lies on this disk: writing whole files, downloads, archives, finding a model's files."""

import contextlib
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from filelock import FileLock

from cli import UserError, explain_errors

FINETUNED_URL = "https://s3.amazonaws.com/models.huggingface.co/transfer-learning-chatbot/gpt_personachat_cache.tar.gz"
HUB_NAMES = {"openai-gpt": "openai-community/openai-gpt", "gpt2": "openai-community/gpt2"}


def typed_path(name: str) -> Path:
    """A path as people type it: ~ is the home folder."""
    return Path(os.path.expanduser(name))  # pathlib's own raises where there is no such user


def is_url(name: str) -> bool:
    return name.lower().startswith(("http://", "https://"))


def cache_folder() -> Path:
    """Where downloads are kept: `$XDG_CACHE_HOME/improvedflend`, by default `~/.cache/improvedflend`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "improvedflend"


def make_folder(folder: Path) -> None:
    """Create a folder and its parents. Raises UserError where that is not possible."""
    with explain_errors(f"cannot create the folder {folder}", "choose one you can write to", OSError):
        folder.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold `path`.lock while the body runs, so that two processes never prepare the same thing at once."""
    make_folder(path.parent)
    with explain_errors(f"cannot write beside {path}", "choose a folder you can write to", OSError):
        held = FileLock(f"{path}.lock").acquire()
    with held:
        yield


UNFINISHED = ".saving-"  # begins the names of the folders that `whole_files` writes in


@contextlib.contextmanager
def whole_files(folder: Path) -> Iterator[Path]:
    """A temporary folder whose files move into `folder` after the body: each appears there whole or not at all.

    Raises UserError where something cannot be written, with what `folder` held before untouched.
    """
    with explain_errors(f"cannot write to {folder}", "free some space or choose another"):  # safetensors has its own
        with tempfile.TemporaryDirectory(dir=folder, prefix=UNFINISHED) as unfinished:
            yield Path(unfinished)
            mask = os.umask(0)
            os.umask(mask)
            for file in sorted(Path(unfinished).iterdir()):
                with open(file, "rb+") as written:
                    os.fsync(written.fileno())  # on the disk before it has its name: machines lose power
                file.chmod(0o666 & ~mask)  # as any new file: safetensors makes its own private
                os.replace(file, folder / file.name)


def remove_unfinished(folder: Path) -> None:
    """Remove what a process left in `folder` that was killed while it wrote."""
    for leftover in folder.glob(UNFINISHED + "*"):
        shutil.rmtree(leftover, ignore_errors=True)


class PartialDownload(io.BufferedWriter):
    """A download so far. A server without range support restarts from zero; after five restarts we give up."""

    restarts = 0

    def truncate(self, size: int | None = None) -> int:
        self.restarts += 1
        if self.restarts > 5:
            raise OSError("the connection breaks off each time")
        return super().truncate(size)


def download(url: str, instead: str) -> Path:
    """Fetch `url` into the cache folder, once. What an earlier attempt left of it is continued.

    Raises UserError where it cannot be fetched; `instead` tells the user what to pass in its place.
    """
    last = Path(re.split("[?#]", url)[0]).name[-50:]  # file systems take names of 255 bytes, four to a character
    path = cache_folder() / f"{hashlib.sha256(os.fsencode(url)).hexdigest()[:16]}-{last or 'file'}"
    if path.exists():
        return path
    from huggingface_hub.file_download import http_get  # heavy: only where something is fetched
    from huggingface_hub.utils import HfHubHTTPError, logging

    logging.set_verbosity_error()
    get = partial(http_get, url, displayed_filename=path.name[17:])
    incomplete = path.with_name(path.name + ".incomplete")
    with lock(path), explain_errors(f"cannot fetch {url}", instead):
        if path.exists():  # another process fetched it while this one waited
            return path
        with PartialDownload(io.FileIO(incomplete, "ab")) as file:
            try:
                get(file, resume_size=file.tell())
            except HfHubHTTPError as error:
                if error.response.status_code != 416:  # 416: nothing follows what we hold, so it is of another file
                    raise
                file.truncate(0)
                get(file)
        os.replace(incomplete, path)
    return path


def forget(path: Path) -> None:
    """Delete a bad download so that the next run fetches it again. Files outside our cache are left alone."""
    if path.parent == cache_folder():
        with contextlib.suppress(OSError):
            path.unlink()


class Unzipped(gzip.GzipFile):
    """A gzip file that is not a bomb: text and weights pack to a tenth, a bomb to a thousandth. Read it in pieces."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.limit = 100 * path.stat().st_size + 100 * 2**20  # bytes

    def read(self, size: int) -> bytes:
        data = super().read(size)
        if self.tell() > self.limit:
            raise UserError(
                f"{self.name} unpacks to more than {self.limit >> 20} MB, a hundred times its size; "
                "if that is right, unpack it yourself"
            )
        return data


BAD_ARCHIVE = (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError)


def extract(archive: Path, folder: Path) -> None:
    """Unpack a .tar.gz of plain files to `folder`, which appears whole or not at all."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=folder.name + ".") as unfinished:
        with Unzipped(archive) as unzipped, tarfile.open(fileobj=unzipped, mode="r|") as tar:
            for member in tar:
                plain = (member.isfile() or member.isdir()) and not member.issparse()
                if not plain or member.name.startswith("/"):
                    raise UserError(
                        f"{archive}: '{member.name}' is a link or a device, or leads outside; expected files"
                    )
                tar.extract(member, unfinished, filter="data")
            while unzipped.read(2**20):  # the checksum comes after the last file
                pass
        os.replace(unfinished, folder)


def unpack(archive: Path) -> Path:
    """Unpack a model's .tar.gz beside the downloads, once, and return the folder with its config.json."""
    stat = archive.stat()
    key = hashlib.sha256(f"{archive.resolve()}{stat.st_size}{stat.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = cache_folder() / f"{key}-{archive.name.split('.tar')[0]}"
    expected = "expected a .tar.gz, whole, and room for it"
    with lock(folder), explain_errors(f"{archive} cannot be unpacked", expected, OSError, *BAD_ARCHIVE):
        if not folder.exists():
            try:
                extract(archive, folder)
            except (UserError, *BAD_ARCHIVE):  # but not for want of room
                forget(archive)
                raise
    configs = sorted(folder.rglob("config.json"), key=lambda path: len(path.parts))
    if not configs:
        forget(archive)
        raise UserError(f"{archive} holds no config.json; expected an archive of a model folder")
    return configs[0].parent


# ------------------------------------------------------------------------------------------------------------
# A model's files
# ------------------------------------------------------------------------------------------------------------

TENSORS = re.compile(r"\.(safetensors|bin|pt|pth|ckpt)$")
# They end alike and are no weights: what trainers and this toolkit leave beside them.
NO_WEIGHTS = re.compile(r"training_args|optimizer|scheduler|scaler|rng_state|adapter_model|dataset_cache")
# transformers' own names, which need no guess
USUAL = re.compile(r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?")
# What may lie beside a config.json of which a model is made from scratch.
TEXTS = re.compile(
    r"^(\.|README|NOTICE|LICEN[CS]E)|\.(json|jsonl|txt|csv|log|md|py|ya?ml|png|svg|jinja|model|bpe|spm|vocab|tiktoken)$"
)
# What to do with weights that are not read here.
INSTEAD = {
    r"^adapter_model": "an adapter needs its base; merge the two, as peft's merge_and_unload does, and save the result",
    r"\.gguf$": "pass that file itself as --model",
    r"\.(h5|msgpack)$|\.ckpt\b": "convert it to safetensors, as transformers 4 does (from_tf=True or from_flax=True)",
    r"": "expected safetensors or a state dict of torch; to train from scratch nothing but config.json and a tokenizer",
}


@dataclass
class ModelFiles:
    """A model on this machine: a folder, and the name of the .gguf file in it if it is one."""

    folder: Path
    gguf: str | None = None

    def has(self, *patterns: str) -> bool:
        return bool(self.gguf) or any(any(self.folder.glob(pattern)) for pattern in patterns)

    @property
    def weights(self) -> list[Path]:
        """The files of the weights; none where there are none. Raises UserError as `find_weights` does."""
        return [self.folder / self.gguf] if self.gguf else find_weights(self.folder)

    @property
    def has_weights(self) -> bool:
        return bool(self.weights)

    @property
    def has_tokenizer(self) -> bool:
        names = "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.*", "merges.txt", "spiece.model"
        return self.has(*names) or bool(self.openai_vocabulary)

    @property
    def openai_vocabulary(self) -> dict[str, str]:
        """The files of a BPE vocabulary under OpenAI's own names, by transformers' arguments for them."""
        patterns = {"vocab_file": "encoder*.json", "merges_file": "vocab*.bpe"}
        return {argument: str(path) for argument, name in patterns.items() for path in self.folder.glob(name)}


def find_weights(folder: Path) -> list[Path]:
    """The files of a folder that hold a model's weights: one, or all shards. transformers' own names go first.

    Raises:
        UserError: shards are missing, a file is a Git LFS pointer, or several files may be the ones.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    usual = [name for name in names if USUAL.fullmatch(name)]
    others = [name for name in names if TENSORS.search(name) and not NO_WEIGHTS.search(name)]
    sets = {shards(folder / name) for name in usual or others}
    whole = [files for files in sets if files <= set(names)]
    if sets and not whole:
        files = min(sets, key=sorted)
        missing = sorted(files - set(names))
        raise UserError(
            f"{folder} lacks {len(missing)} of the {len(files)} files of its weights, such as {missing[0]}; "
            "copy them into it, or fetch the model again"
        )
    if len(whole) > 1 and not usual:
        raise UserError(
            f"{folder} holds weights in {len(whole)} files, such as {others[0]} and {others[-1]}; "
            "rename the one to use to pytorch_model.bin"
        )
    # safetensors before pickles, one file before shards
    first = min(whole, key=lambda files: (min(files).endswith(".bin"), len(files)), default=())
    paths = [folder / name for name in sorted(first)]
    refuse_pointers(*paths)
    return paths


def shards(path: Path) -> frozenset[str]:
    """The names of all files that belong together with one, or with those that an index names."""
    if path.name.endswith(".index.json"):
        with explain_errors(f"cannot read {path}", "expected an index of transformers"):
            return frozenset(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
    numbered = re.fullmatch(r"(.+)-\d{5}-of-(\d{5})(\.\w+)", path.name)
    if not numbered:
        return frozenset([path.name])
    start, count, end = numbered.groups()
    return frozenset(f"{start}-{number:05}-of-{count}{end}" for number in range(1, int(count) + 1))


def refuse_pointers(*paths: Path) -> None:
    """Raise UserError where a file is the text that Git leaves in the place of a large one."""
    for path in paths:
        with (
            explain_errors(f"cannot read {path}", "choose a model that you can read", OSError),
            open(path, "rb") as file,
        ):
            if file.read(24) == b"version https://git-lfs.":
                raise UserError(f"{path} is a Git LFS pointer, not the file itself; run git lfs pull in {path.parent}")


def check_folder(folder: Path) -> ModelFiles:
    """The files of a model's folder.

    Raises:
        UserError: it holds no configuration, or what there is besides is neither weights nor nothing.
    """
    files = ModelFiles(folder)
    if not files.has("config.json"):
        raise UserError(f"{folder} holds no config.json; expected a model folder, such as one that train.py wrote")
    refuse_pointers(*(path for name in ("*.json", "*.txt", "*.model", "*.bpe") for path in folder.glob(name)))
    if files.has_weights:
        return files
    if files.has("training_args.json"):
        reason = "as before a run's first evaluation"
        raise UserError(f"{folder} holds no weights, {reason}; go on with it: python train.py --resume {folder}")
    # Only of a configuration alone is a model made from scratch: what else is there may be its weights.
    for path in sorted(folder.iterdir()):
        if not TEXTS.search(path.name):
            advice = next(text for pattern, text in INSTEAD.items() if re.search(pattern, path.name))
            raise UserError(f"{folder} holds no weights that are read here, but {path.name}; {advice}")
    return files


def find_finetuned_model(name: str) -> ModelFiles:
    """As `find_model`, for talking and evaluating: there openai-gpt is the published model fine-tuned from it."""
    return find_model(FINETUNED_URL if name == "openai-gpt" else name)


# Names that nobody means for the hub: ./x, ~/x, a/b/c, x/, a\b, x.gguf, x.tar.gz.
LIKE_A_PATH = re.compile(r"^[./~]|/.*/|/$|\\|\.gguf$|\.gz$")


def find_model(name: str) -> ModelFiles:
    """The files of a model given by folder, .gguf or .tar.gz file, URL of one, short name or hub id.

    Raises UserError where there is no such file, or it cannot be fetched.
    """
    path = download(name, "pass --model a local folder or file") if is_url(name) else typed_path(name)
    if os.path.isfile(path):  # pathlib's own raises for names that are too long
        return find_model_in_file(path)
    if not os.path.isdir(path):
        if LIKE_A_PATH.search(name):
            raise UserError(f"no such model: {name}; expected a folder, a .tar.gz or .gguf file, a URL or a hub id")
        return check_folder(fetch_from_hub(HUB_NAMES.get(name, name)))
    return check_folder(path)


def find_model_in_file(path: Path) -> ModelFiles:
    refuse_pointers(path)
    with open(path, "rb") as file:
        magic = file.read(4)
    if magic == b"GGUF":
        return ModelFiles(path.parent, gguf=path.name)
    if magic[:2] == b"\x1f\x8b":
        return check_folder(unpack(path))
    if path.name == "latest":  # a text file, where links are not possible
        return find_model(str(find_run(str(path))))
    forget(path)
    raise UserError(f"{path} is neither a .gguf nor a .tar.gz file; expected one of these or a model folder")


def fetch_from_hub(repo: str) -> Path:
    """A snapshot of a hub repository's config, tokenizer and weights (safetensors, or .bin where there are none)."""
    from huggingface_hub import snapshot_download  # heavy: only where something is fetched

    texts = ["*.json", "*.txt", "*.model", "*.jinja"]
    # The hub's errors have many types, as the network's.
    with explain_errors(f"cannot fetch '{repo}' from the hub", "pass --model a local folder"):
        folder = Path(snapshot_download(repo, allow_patterns=[*texts, "*.safetensors"], ignore_patterns=["*/*"]))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(repo, allow_patterns=["pytorch_model*.bin"])
            if not any(folder.glob("pytorch_model*.bin")):
                raise UserError(f"'{repo}' has neither safetensors nor pytorch_model.bin on the hub; use another model")
    return folder


def find_run(name: str) -> Path:
    """The run folder of that name, which may be `.../latest`. Raises UserError where train.py left none there."""
    folder = typed_path(name)
    with explain_errors(f"cannot read {folder}", "expected a run folder of train.py", OSError, UnicodeDecodeError):
        if folder.is_file():
            folder = folder.parent / folder.read_text(encoding="utf-8").strip()
        folder = folder.resolve()
    if not (folder / "training_args.json").is_file():
        raise UserError(f"{folder} holds no training_args.json; expected a run folder of train.py, such as runs/latest")
    return folder
