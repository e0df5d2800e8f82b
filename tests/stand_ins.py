"""What stands in for what is far away when test_readme.py runs the README's commands.

A folder that is all of PATH has a program for each function of PROGRAMS below. It runs this file with its name and
its arguments, and the function does what the program would: the scripts run as they are, in a Python of their own;
nothing is installed, built or uploaded. What is neither here nor in ALLOWED is "command not found".
"""

import argparse
import contextlib
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import types
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path

ALLOWED = ("mkdir", "id")  # beside what bash has built in


def write_programs(folder: Path) -> None:
    """A folder to be all of PATH."""
    folder.mkdir()
    for name in PROGRAMS:
        program = folder / name
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" {name} "$@"\n')
        program.chmod(0o755)
    for name in ALLOWED:
        (folder / name).symlink_to(shutil.which(name))


def check(holds: bool, what: str) -> None:
    if not holds:
        sys.exit(f"stand-in: {what}")


# ------------------------------------------------------------------------------------------------------------
# Python
# ------------------------------------------------------------------------------------------------------------


def python(arguments: list[str]) -> None:
    """The scripts run as they are; of the benchmarks, whose work takes minutes, the options are read."""
    arguments = arguments[arguments[0] == "-u" :]
    if arguments[0] == "-m":
        module, *options = arguments[1:]
        if module.startswith("torch.distributed."):
            launch(module, options)
        check(module == "benchmarks", f"nothing stands in for python -m {module}")
        if module == "benchmarks":
            only_read_options()
        run_module(module, options)
    else:
        script = Path(arguments[0])
        sys.argv, sys.path[0] = arguments, str(script.parent)
        if script.with_name("files.py").exists():
            download_from_near()
        if "--web" in arguments:
            without_gradio()
        if script.name == "fuzz_parsers.py":
            without_atheris()
        runpy.run_path(str(script), run_name="__main__")


def run_module(module: str, options: list[str]) -> None:
    sys.argv, sys.path[0] = [module, *options], ""
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def only_read_options() -> None:
    parse = argparse.ArgumentParser.parse_args
    argparse.ArgumentParser.parse_args = lambda self: sys.exit(parse(self) is None)


def download_from_near() -> None:
    """Every host is the server that test_readme.py has, a folder for each of them."""
    import files

    download = files.download
    files.download = lambda url, instead: download(url.replace("https:/", os.environ["FAR"]), instead)


def without_gradio() -> None:
    """--web ends where it would serve, saying where."""
    for name in ("gradio", "web"):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__spec__ = ModuleSpec(name, None)
    sys.modules["web"].check_address = lambda web: None
    sys.modules["web"].Bot = lambda *parts: parts
    sys.modules["web"].serve = lambda model, tokenizer, bot, web: print(f"http://{web.host}:{web.port}")


def without_atheris() -> None:
    """A fuzz of a few inputs that nobody mutates."""
    atheris = sys.modules["atheris"] = types.ModuleType("atheris")
    atheris.instrument_imports = lambda **_: contextlib.nullcontext()

    def setup(arguments: list[str], test_one: Callable[[bytes], None]) -> None:
        check(bool(re.fullmatch(r"-max_total_time=\d+", arguments[1])), "libFuzzer has the option -max_total_time")
        atheris.Fuzz = lambda: [test_one(bytes([i]) + b"]}") for i in range(20)]

    atheris.Setup = setup


def torchrun(arguments: list[str]) -> None:
    launch("torch.distributed.run", arguments)


def launch(module: str, options: list[str]) -> None:
    """torch's own launcher, with two processes for eight; on two machines, one process on each, both of them here."""
    check("--nproc_per_node=8" in options, "expected eight processes")
    nodes = 2 if "--nnodes=2" in options else 1
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    changes = {
        "--nproc_per_node=8": f"--nproc_per_node={2 // nodes}",
        "--rdzv_endpoint=first-host:29500": f"--rdzv_endpoint=127.0.0.1:{port}",
    }
    options = [changes.get(option, option) for option in options]
    if nodes == 1:
        options.insert(0, f"--master_port={port}")  # the usual one may be taken
    agents = [subprocess.Popen([sys.executable, "-m", module, *options]) for _ in range(nodes)]
    sys.exit(max([agent.wait() for agent in agents]))


# ------------------------------------------------------------------------------------------------------------
# Other programs
# ------------------------------------------------------------------------------------------------------------


def pip(arguments: list[str]) -> None:
    """Nothing is installed; what is asked for must be pinned as in the requirements, or be known to exist."""
    parser = argparse.ArgumentParser()
    parser.add_argument("action", choices=["install"])
    parser.add_argument("-r", action="append", default=[])
    parser.add_argument("--index-url", choices=["https://download.pytorch.org/whl/cpu"])
    parser.add_argument("names", nargs="*")
    asked = parser.parse_intermixed_args(arguments)
    pins = [line for file in Path().glob("requirements*.txt") for line in file.read_text().splitlines()]
    for name in asked.names:
        check(
            name in [*pins, "tensorboard", "atheris"],
            f"{name} is not pinned so in the requirements, nor known to exist",
        )
    for name in asked.r:
        check(Path(name).is_file(), f"{name} does not exist")


def docker(arguments: list[str]) -> None:
    """Flags and build arguments are those that docker and the Dockerfile have; the command in the container runs here,
    where the repository is, as its files are the image's."""
    dockerfile = Path("Dockerfile").read_text()
    parser = argparse.ArgumentParser(allow_abbrev=False)
    actions = parser.add_subparsers(dest="action", required=True)
    build = actions.add_parser("build", allow_abbrev=False)
    build.add_argument("-t", required=True)
    build.add_argument("--build-arg", action="append", default=[])
    build.add_argument("folder", choices=["."])
    run = actions.add_parser("run", allow_abbrev=False)
    run.add_argument("--rm", action="store_true")
    run.add_argument("-it", action="store_true")
    run.add_argument("-v", action="append", default=[])
    run.add_argument("--user", choices=[f"{os.getuid()}:{os.getgid()}"])
    run.add_argument("--gpus", choices=["all"])
    run.add_argument("--ipc", choices=["host"])
    run.add_argument("image", choices=re.findall(r"^docker build -t (\S+)", Path("README.md").read_text(), re.M))
    run.add_argument("command", nargs=argparse.REMAINDER)
    asked = parser.parse_args(arguments)
    if asked.action == "build":
        for argument in asked.build_arg:
            name, _, value = argument.partition("=")
            check(f"\nARG {name}=" in dockerfile, f"the Dockerfile has no argument {name}")
            check(name != "TORCH" or bool(re.fullmatch(r"cpu|cu\d+", value)), f"pytorch.org has no build {value}")
        return
    home = re.search(r"^WORKDIR (\S+)$", dockerfile, re.MULTILINE)[1]
    for mount in asked.v:
        source, target = mount.split(":")[:2]
        check(os.path.exists(source), f"docker would make {source}, as root")
        check(target.startswith(home + "/"), f"{target} is not where the image works")
    if asked.command == ["bash"]:
        print(*sorted(os.listdir()))
    else:
        PROGRAMS[asked.command[0]](asked.command[1:])


def hf(arguments: list[str]) -> None:
    """The hub's own command line, up to what it would upload: printed, a file a line."""
    from huggingface_hub import HfApi
    from huggingface_hub.cli.hf import main
    from huggingface_hub.utils import filter_repo_objects

    def upload_folder(self, *, folder_path, ignore_patterns, **_):
        files = [str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file()]
        print("\n".join(filter_repo_objects(files, ignore_patterns=ignore_patterns)))
        sys.exit()

    check(arguments[0] == "upload", "nothing stands in for hf but upload")
    HfApi.create_repo = lambda self, repo_id, **_: types.SimpleNamespace(repo_id=repo_id)
    HfApi.upload_folder = upload_folder
    sys.argv = ["hf", *arguments]
    main()
    check(False, "nothing was uploaded")


def llama_server(arguments: list[str]) -> None:
    check(arguments[0] == "-m" and Path(arguments[1]).read_bytes()[:4] == b"GGUF", "expected -m and a GGUF file")


def ollama(arguments: list[str]) -> None:
    """A model is made of a file that the Modelfile names, beside it."""
    action, name, *options = arguments
    check(action == "create" and bool(name) and options[0] == "-f", "nothing stands in for ollama but create -f")
    first, *_ = (file := Path(options[1])).read_text().splitlines()
    check((file.parent / first.removeprefix("FROM ./")).is_file(), f"{first}: no such file")


def tensorboard(arguments: list[str]) -> None:
    check(arguments[0] == "--logdir" and any(Path(arguments[1]).rglob("events.*")), "there are no events to show")


def pytest(arguments: list[str]) -> None:
    check(all(Path(name).exists() for name in arguments), f"one of {arguments} does not exist")


def ruff(arguments: list[str]) -> None:
    check(arguments in (["check", "."], ["format", "--check", "."]), f"nothing stands in for ruff {arguments}")


PROGRAMS = {"python": python, "python3": python, "llama-server": llama_server} | {
    function.__name__: function for function in (torchrun, pip, docker, hf, ollama, tensorboard, pytest, ruff)
}


if __name__ == "__main__":
    program = PROGRAMS[sys.argv[1]]
    program(sys.argv[2:])
