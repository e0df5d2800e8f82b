"""What lies on this disk: writing whole files, downloads, archives."""

import contextlib
import errno
import glob
import gzip
import hashlib
import io
import os
import shutil
import socket
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

from filelock import FileLock, Timeout

from cli import UserError, explain_errors, log


def typed_path(name: str | Path) -> Path:
    """A path as people type it: ~ is the home folder. Raises UserError for what no path holds."""
    if "\0" in os.fspath(name):
        raise UserError(f"{name!r} is no path; expected one without a NUL")
    return Path(os.path.expanduser(name))  # pathlib's own raises where there is no such user


def is_url(name: str) -> bool:
    return name.lower().startswith(("http://", "https://"))


def cache_folder() -> Path:
    """Where downloads are kept, as the XDG standard says."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "improvedflend"


def state_folder() -> Path:
    """Where what was typed is kept, as the XDG standard says."""
    return Path(os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")) / "improvedflend"


def make_folder(folder: Path) -> None:
    """Create a folder and its parents. Raises UserError where that is not possible."""
    with explain_errors(f"cannot create the folder {folder}", "choose one you can write to", OSError):
        folder.mkdir(parents=True, exist_ok=True)


NO_LOCKS = errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP  # what file systems answer that have none
warn_once = cache(log.warning)  # of each text


@contextlib.contextmanager
def lock(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold `path`.lock while the body runs, so that two processes never write the same thing at once.

    The system releases it when this process dies. Where the file system has no locks, a warning says so.
    Raises UserError where it cannot be written, or where another process holds it and this one is not to `wait`.
    """
    folder, file = path.parent, Path(f"{path}.lock")
    make_folder(folder)
    # Without `fallback_to_soft`: a file that stands for a lock would stay when its process is killed.
    held = FileLock(file, fallback_to_soft=False)
    with explain_errors(f"cannot write beside {path}", "choose a folder you can write to", OSError):
        try:
            held.acquire(blocking=wait)
            if not wait:
                file.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        except Timeout as error:
            holder = file.read_text(encoding="utf-8", errors="replace") or "another process"
            raise UserError(f"{folder} is in use by {holder}; wait until it ends, or stop it") from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            warn_once(f"warning: the file system of {folder} has no locks; never let two processes write there at once")
    try:
        yield
    finally:
        held.release()


UNFINISHED = ".saving-"  # begins the names of temporary folders


def unfinished_folder(folder: Path, owner: str = "") -> tempfile.TemporaryDirectory:
    """A temporary folder inside `folder`. owner: who writes there, where several do, for `remove_unfinished`."""
    return tempfile.TemporaryDirectory(dir=folder, prefix=f"{UNFINISHED}{owner}.")


def remove_unfinished(folder: Path, owner: str = "") -> None:
    """Remove the temporary folders of an owner that was killed. Call it under the lock under which they are made."""
    prefix = glob.escape(f"{UNFINISHED}{owner}.")
    for leftover in folder.glob(f"{prefix}*/"):
        shutil.rmtree(leftover, ignore_errors=True)


@contextlib.contextmanager
def whole_files(folder: Path, owner: str = "") -> Iterator[Path]:
    """An `unfinished_folder` whose files move into `folder` after the body: each appears there whole or not at all.

    Raises UserError where something cannot be written, with what `folder` held before untouched.
    """
    with explain_errors(f"cannot write to {folder}", "free some space or choose another"):  # safetensors has its own
        with unfinished_folder(folder, owner) as unfinished:
            yield Path(unfinished)
            mask = os.umask(0)  # it can only be read by being set
            os.umask(mask)
            for file in sorted(Path(unfinished).iterdir()):
                with open(file, "rb+") as written:
                    os.fsync(written.fileno())  # on the disk before it has its name: machines lose power
                file.chmod(0o666 & ~mask)  # as any new file: safetensors makes its own private
                os.replace(file, folder / file.name)


class PartialDownload(io.BufferedWriter):
    """A download so far. A server without range support restarts from zero; after five restarts we give up."""

    restarts = 0

    def truncate(self, size: int | None = None) -> int:  # huggingface_hub calls it to restart
        self.restarts += 1
        if self.restarts > 5:
            raise OSError("the connection breaks off each time")
        return super().truncate(size)


def cache_place(identity: str, name: str) -> Path:
    """Where in the cache folder to keep what has this identity, under a name that people can read."""
    key = hashlib.sha256(os.fsencode(identity)).hexdigest()[:16]
    return cache_folder() / f"{key}-{name[-50:]}"  # file systems take names of 255 bytes, four to a character


def cached_path(url: str) -> Path:
    """Where a download of `url` is kept, if there is one."""
    path = url.partition("#")[0].partition("?")[0]
    return cache_place(url, Path(path).name or "file")


def download(url: str, instead: str) -> Path:
    """Fetch `url` into the cache folder, once. A download that broke off is continued.

    Raises UserError where it cannot be fetched; `instead` tells the user what to pass in its place.
    """
    path = cached_path(url)
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
    with unfinished_folder(folder.parent, folder.name) as unfinished:
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
    folder = cache_place(f"{archive.resolve()}{stat.st_size}{stat.st_mtime_ns}", archive.name.partition(".tar")[0])
    expected = "expected a .tar.gz, whole, and room for it"
    with lock(folder), explain_errors(f"{archive} cannot be unpacked", expected, OSError, *BAD_ARCHIVE):
        remove_unfinished(folder.parent, folder.name)
        try:
            if not folder.exists():
                extract(archive, folder)
            configs = sorted(folder.rglob("config.json"), key=lambda path: len(path.parts))
            if not configs:
                raise UserError(f"{archive} holds no config.json; expected an archive of a model folder")
        except (UserError, *BAD_ARCHIVE):  # not where there was no room for it
            forget(archive)
            raise
    return configs[0].parent
