"""Datasets of the hub by their id, from a server here that answers as the hub does."""

import hashlib
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest

from helpers import run_python

pytest.importorskip("pyarrow")
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402

READ = """
import sys
from cli import UserError
from dialogs import read_dataset
try:
    print({split: [dialog.personality for dialog in dialogs] for split, dialogs in read_dataset(sys.argv[1]).items()})
except UserError as error:
    print(error)
"""


def parquet(persona: str) -> bytes:
    row = {
        "personality": [persona],
        "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}],
    }
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([row]), file)
    return file.getvalue()


# (repository, branch) -> files
REPOSITORIES = {
    ("me/plain", "main"): {
        "README.md": b"",
        "data/train-00000-of-00001.parquet": parquet("trained"),
        "data/validation-00000-of-00001.parquet": parquet("validated"),
    },
    ("me/json", "main"): {"train.jsonl": b"{}"},
    ("me/json", "refs/convert/parquet"): {"default/train/0000.parquet": parquet("converted")},
    ("me/two", "main"): {"one/train/0000.parquet": parquet("one"), "two/train/0000.parquet": parquet("two")},
    ("me/two", "v2"): {"one/train/0000.parquet": parquet("newer")},
    ("me/unsplit", "main"): {"chats.parquet": parquet("whole")},
    ("me/none", "main"): {"notes.txt": b"x"},
    ("me/none", "refs/convert/parquet"): {},
}
REPOSITORIES |= {  # by its commit, too
    (repo, hashlib.sha1(f"{repo}{branch}".encode()).hexdigest()): files
    for (repo, branch), files in REPOSITORIES.items()
}


class Hub(BaseHTTPRequestHandler):
    def do_GET(self):  # noqa: N802
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "datasets"]:
            repo, what, branch = "/".join(parts[2:4]), parts[4], "/".join(parts[5:]) or "main"
            files = REPOSITORIES.get((repo, branch))
            commit = hashlib.sha1(f"{repo}{branch}".encode()).hexdigest()
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": "0"}
                for name, content in (files or {}).items()
            ]
            names = [{"rfilename": name} for name in files or {}]
            answer = tree if what == "tree" else {"id": repo, "sha": commit, "siblings": names}
            return self.answer(404 if files is None else 200, json.dumps(answer).encode())
        repo, commit, name = "/".join(parts[1:3]), parts[4], "/".join(parts[5:])
        content = REPOSITORIES[repo, commit][name]
        return self.answer(200, content, {"ETag": hashlib.sha1(content).hexdigest(), "X-Repo-Commit": commit})

    do_HEAD = do_GET  # noqa: N815

    def answer(self, status: int, content: bytes, headers: dict | None = None) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Length": len(content),
            "Content-Type": "application/json",
            **(headers or {}),
        }.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """`hub(name)`: what is read of a dataset of that id."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        home = str(tmp_path_factory.mktemp("hub"))
        environment = {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": home,
            "NO_PROXY": "127.0.0.1",
        }
        yield lambda name: run_python("-c", READ, name, env=environment | {"PATH": ""}).stdout.strip()
        server.shutdown()


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("me/plain", "{'train': [['trained']], 'valid': [['validated']]}"),
        ("me/json", "{'train': [['converted']]}"),
        ("me/unsplit", "{'all': [['whole']]}"),
        ("me/two:two", "{'train': [['two']]}"),
        ("me/two:one@v2", "{'train': [['newer']]}"),
        ("me/two", "the dataset 'me/two' has the configurations one, two; pass 'me/two:NAME'"),
        ("me/two:three", "the dataset 'me/two' has no configuration three, but one, two"),
        ("me/none", "the dataset 'me/none' holds no parquet files, nor has the hub made any; download its files"),
    ],
)
def test_a_dataset_of_the_hub(name, read, hub):
    assert hub(name) == read


def test_a_dataset_that_the_hub_does_not_have(hub):
    assert hub("me/absent").startswith("cannot fetch the dataset 'me/absent' from the hub: ")
