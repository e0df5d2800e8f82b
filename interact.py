"""Talk to a fine-tuned model in the terminal, or with --web in a browser."""

import contextlib
import glob
import importlib.util
import json
import os
import random
import shutil
import signal
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from cli import (
    CommonSettings,
    Decoding,
    Parser,
    Settings,
    UserError,
    check_device,
    kind_of,
    log,
    option,
    printable,
    run_script,
)
from dialogs import Dialogs, check_message, read_dataset, read_persona
from files import find_finetuned_model, typed_path, whole_files
from formats import is_record
from utils import load_tokenizer


@dataclass(frozen=True)
class ChatSettings(CommonSettings):
    """Options of interact.py."""

    personality: list[str] | None = option(None, "a sentence of the persona; can be repeated")
    personality_file: str = option("", "a text file with a sentence of the persona in each line")
    transcript: str = option("", "a JSON lines file to which each turn is added, as training data")
    web: bool = option(False, "a chat page and an OpenAI-compatible endpoint, not a prompt")

    def __post_init__(self):
        super().__post_init__()
        for one, other in (("personality", "personality_file"), ("transcript", "web")):
            if getattr(self, one) and getattr(self, other):
                raise UserError(f"--{one} and --{other} do not go together; give one of them")


@dataclass(frozen=True)
class WebSettings(Settings):
    """With --web."""

    host: str = option("127.0.0.1", "address to listen at; 0.0.0.0: all of this machine's")
    port: int = option(7860, "0: any free one", low=0, high=65535)
    max_queue: int = option(16, "replies that may wait; more are refused", low=1)
    share: bool = option(False, "also a public link, through Gradio's server")


def parse_settings() -> tuple[ChatSettings, Decoding, WebSettings]:
    classes = ChatSettings, Decoding, WebSettings
    args = Parser(__doc__, *classes).parse_args()
    settings, decoding, web = (each.from_args(args) for each in classes)
    if settings.web and importlib.util.find_spec("gradio") is None:
        raise UserError("--web needs packages that are not installed: pip install -r requirements-web.txt")
    return settings, decoding, web


# ------------------------------------------------------------------------------------------------------------
# Personas
# ------------------------------------------------------------------------------------------------------------


def choose_persona(settings: ChatSettings, dialogs: Dialogs) -> list[str]:
    """The persona given by the options, or one drawn from the dataset."""
    if settings.personality:
        return settings.personality
    if settings.personality_file:
        return read_persona(settings.personality_file, "--personality_file")
    try:
        return random.choice(dialogs.personas)
    except UserError as error:
        raise UserError(f"{error}; or give a persona with --personality 'i like cats.'") from error


def box(title: str, lines: list[str]) -> str:
    """Lines in a frame that is open to the right, wrapped to the terminal's width."""
    width = min(shutil.get_terminal_size().columns, 80)
    unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    top, side, bottom, dash = "╭│╰─" if unicode else "+|+-"
    body = [f"{side} {part}" for line in lines for part in textwrap.wrap(printable(line), width - 2)]
    edge = max(map(len, [title + "  ", *body]))
    return "\n".join([f"{top}{dash} {title} ".ljust(edge, dash), *body, bottom + dash * (edge - 1)])


# ------------------------------------------------------------------------------------------------------------
# What is typed
# ------------------------------------------------------------------------------------------------------------


def typed_lines() -> Iterator[str]:
    """What the user says, line by line until Ctrl-D; a prompt, a history of lines and completion at a terminal only."""
    terminal = sys.stdin.isatty()
    if terminal:
        try:
            import readline  # gives input() arrow keys and history
        except ImportError:  # Windows has none; input() has line editing of its own there
            pass
        else:
            complete_with(readline)
    while True:
        try:
            line = input(">>> " if terminal else "")
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise UserError(f"the input is not {error.encoding} text; send text in that encoding") from error
        if line.strip():
            yield line.strip()
        elif terminal:
            print("Please type something (/help lists the commands, Ctrl-D ends the chat).")
        else:
            print()  # a line per turn: an empty one has an empty reply


def complete_with(readline) -> None:
    """Let the tab key complete commands, their arguments and file names."""

    def complete(word: str, count: int) -> str | None:
        before = readline.get_line_buffer()[: readline.get_begidx()].split()
        return [*completions(before, word), None][count]

    readline.set_completer_delims(" ")
    readline.set_completer(complete)
    libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")


def completions(before: list[str], word: str) -> list[str]:
    """What the last word of a command may become, after the words before it."""
    if before in (["/save"], ["/load"], ["/persona", "set"]):
        paths = glob.glob(glob.escape(os.path.expanduser(word)) + "*")
        return sorted(path + os.sep if os.path.isdir(path) else path for path in paths)
    of_option = {
        ("/set", name): ("on", "off") if kind_of(known) is bool else known.metadata["choices"]
        for name, known in Decoding.options().items()
    }
    choices = of_option | {
        (): sorted({usage.split()[0] for usage in COMMANDS}) if word.startswith("/") else [],
        ("/persona",): ["add", "set", "random"],
        ("/set",): list(Decoding.options()),
    }
    return [choice + " " for choice in choices.get(tuple(before), ()) if choice.startswith(word)]


@contextlib.contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Ctrl-C in the body sets what the given function tells, so that no computation is torn; a second one raises."""
    pressed = []

    def press(*_) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(True)

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


# ------------------------------------------------------------------------------------------------------------
# What is kept
# ------------------------------------------------------------------------------------------------------------


class Transcript:
    """A JSON lines file, each turn of the chat a line: a reply with its persona and history, for training."""

    def __init__(self, name: str):
        self.path = typed_path(name)
        with self.opened() as file:
            file.seek(0)
            first = file.readline()
        if first.strip() and not is_record(first):
            raise UserError(f"--transcript {name} holds something else; expected a new file or dialogs in JSON lines")
        self.starts: list[int] = []  # of the lines of this chat

    @contextlib.contextmanager
    def opened(self) -> Iterator[BinaryIO]:
        """The file; where writing fails, it is left as it was."""
        end = None
        try:
            with open(self.path, "a+b") as file:
                end = file.seek(0, os.SEEK_END)
                yield file
        except OSError as error:
            if end is not None:
                with contextlib.suppress(OSError):  # what cannot be written may not be cut either
                    os.truncate(self.path, end)
            raise UserError(
                f"cannot write --transcript {self.path}: {error.strerror or error}; choose a file you can"
            ) from error

    def add(self, chat) -> None:
        *history, reply = chat.history
        record = {"personality": chat.persona, "utterances": [{"history": history, "candidates": [reply]}]}
        with self.opened() as file:
            end = file.tell()
            if end:
                file.seek(end - 1)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write(json.dumps(record, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
        self.starts.append(end)

    def take_back(self) -> None:
        """Drop the last line: its turn was undone."""
        if self.starts:
            with self.opened() as file:
                file.truncate(self.starts.pop())


def last_dialog(name: str) -> tuple[list[str], list[str]]:
    """Persona and utterances of the last dialog in a file of any format that the toolkit reads."""
    last = None
    for dialogs in read_dataset(name).values():
        for dialog in dialogs:
            last = dialog
    if last is None:
        raise UserError(f"{name} holds no dialog; choose another file")
    replies = last.utterances[-1:]
    return last.personality, [text for reply in replies for text in (*reply.history, reply.candidates[-1])]


# ------------------------------------------------------------------------------------------------------------
# The chat
# ------------------------------------------------------------------------------------------------------------

COMMANDS = {
    "/help": "show this",
    "/persona": "show the bot's persona",
    "/persona add TEXT": "add a sentence to it",
    "/persona set FILE": "take the lines of a text file",
    "/persona random": "draw one from the dataset",
    "/reset": "forget what was said",
    "/undo": "take back the last message and its reply",
    "/retry": "another reply to the last message",
    "/candidates": "the alternatives of the last reply, best first, with their scores",
    "/set": "show the decoding options",
    "/set OPTION VALUE": "change one, as in /set temperature 0.9",
    "/save FILE": "write this chat as training data",
    "/load FILE": "go on with the last dialog in a file",
    "/quit": "end the chat, like Ctrl-D",
}


def warn_of_truncation(chat, known: set[str]) -> None:
    """Say what of the chat the model did not see; once of each part, of which `known` are said already."""
    if not known.issuperset(chat.truncated):
        log.warning(f"warning: {chat.truncation}; a shorter persona leaves more room")
        known.update(chat.truncated)


class Terminal:
    """A chat with a person at a terminal: lines that begin with / are commands, methods named do_... here."""

    def __init__(self, chat, transcript: Transcript | None, dialogs: Dialogs):
        self.chat, self.transcript, self.dialogs = chat, transcript, dialogs
        self.saved: set[Path] = set()
        self.truncated: set[str] = set()  # what the user was told of

    def run(self) -> None:
        self.show_persona()
        print("Type a message, or /help for what else you can do.")
        for line in typed_lines():
            try:
                if line.startswith("/") and not line.startswith("//"):
                    if line.split()[0] == "/quit":
                        return
                    self.command(*line.split(None, 1))
                else:
                    self.say(check_message(line.removeprefix("/") if line.startswith("//") else line))
            except UserError as error:
                print(printable(str(error)))

    def command(self, name: str, rest: str = "") -> None:
        action = getattr(self, "do_" + name[1:], None)
        if action is None:
            names = " ".join(sorted({usage.split()[0] for usage in COMMANDS}))
            raise UserError(f"no command {printable(name)}; there are {names} (// begins a text with /)")
        action(rest.strip())

    def say(self, text: str) -> None:
        """Print the reply to `text` as it is made."""
        turns = len(self.chat.turns)
        with interrupts() as stopped:
            for piece in self.chat.stream(text, stopped):
                print(piece, end="", flush=True)
        print("" if len(self.chat.turns) > turns else "(stopped before the first word; the message is forgotten)")
        warn_of_truncation(self.chat, self.truncated)
        if self.transcript and len(self.chat.turns) > turns:
            self.transcript.add(self.chat)

    def show_persona(self) -> None:
        print(box("Persona", self.chat.persona or ["(none)"]))

    def take_back(self) -> str:
        """Drop the last turn; what the user said in it."""
        if not self.chat.turns or self.chat.turns[-1].text is None:
            raise UserError("there is no message yet; type one")
        if self.transcript:
            self.transcript.take_back()
        return self.chat.turns.pop().text

    def do_help(self, _: str) -> None:
        for usage, what in COMMANDS.items():
            print(f"{usage:18} {what}")
        print("A line that begins with // is text that begins with /. Ctrl-C stops a reply; at the prompt, the chat.")

    def do_persona(self, rest: str) -> None:
        action, _, value = rest.partition(" ")
        value = value.strip()
        if action == "add" and value:
            self.chat.persona = [*self.chat.persona, check_message(value)]
        elif action == "set" and value:
            self.chat.persona = read_persona(value, "/persona set")
        elif rest == "random":
            self.chat.persona = random.choice(self.dialogs.personas)
        elif rest:
            raise UserError("expected /persona, /persona add TEXT, /persona set FILE or /persona random")
        self.show_persona()

    def do_reset(self, _: str) -> None:
        self.chat.turns = []
        if self.transcript:
            self.transcript.starts = []  # what was said stays there
        print("Forgotten; the persona is kept.")

    def do_undo(self, _: str) -> None:
        print(f"Taken back: {printable(self.take_back())}")

    def do_retry(self, _: str) -> None:
        self.say(self.take_back())

    def do_candidates(self, _: str) -> None:
        if not self.chat.turns or not self.chat.turns[-1].candidates:
            raise UserError("there is no reply with alternatives yet; type a message")
        print("   head  log-likelihood per token")
        for text, reply in self.chat.turns[-1].candidates:
            print(f"{reply.mc_score:7.2f} {reply.token_log_likelihood:6.2f}  {text}")
        if self.chat.decoding.n_replies == 1:
            print("Only one is drawn: /set n_replies 8 draws eight and gives the best.")

    def do_set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        options = asdict(self.chat.decoding)
        if name and (value or name not in options):
            self.chat.decoding = self.chat.decoding.changed(name, value.strip())
            options = asdict(self.chat.decoding)
        for shown in [name] if name else options:
            value = options[shown]
            print(f"{shown} {('off', 'on')[value] if isinstance(value, bool) else value}")

    def do_save(self, name: str) -> None:
        path = typed_path(name)
        if not name or (os.path.exists(path) and path not in self.saved):  # pathlib's raises for a name too long
            raise UserError(f"{name} exists; choose another name" if name else "expected /save FILE")
        text = json.dumps(self.chat.record(), ensure_ascii=False) + "\n"
        with whole_files(path.parent) as partial:  # what an earlier /save wrote stands until this is written
            (partial / path.name).write_text(text, encoding="utf-8", errors="replace")
        self.saved.add(path)
        print(f"Saved {len(self.chat.history)} utterances in {name}")

    def do_load(self, name: str) -> None:
        if not name:
            raise UserError("expected /load FILE")
        self.chat.persona, dialog = last_dialog(name)
        self.chat.resume(dialog)
        if self.transcript:
            self.transcript.starts = []
        self.show_persona()
        for turn in self.chat.turns[-3:]:
            print("" if turn.text is None else f"> {printable(turn.text)}", printable(turn.reply), sep="\n")


def answer_lines(chat, transcript: Transcript | None) -> None:
    """A line per turn in, a line per reply out: every line is text."""
    log.info("Persona: " + " ".join(map(printable, chat.persona)))
    truncated: set[str] = set()
    for line in typed_lines():
        print(chat.reply(line), flush=True)
        warn_of_truncation(chat, truncated)
        if transcript:
            transcript.add(chat)


def main() -> None:
    settings, decoding, web_settings = parse_settings()
    device = check_device(settings.device)
    seed = settings.seed or random.SystemRandom().randrange(1, 2**31)
    random.seed(seed)
    dialogs = Dialogs(settings.dataset_path)
    persona = choose_persona(settings, dialogs)
    transcript = Transcript(settings.transcript) if settings.transcript else None

    files = find_finetuned_model(settings.model)
    tokenizer = load_tokenizer(files, settings.pre_tokenizer)

    # Heavy: after all that can be told to be wrong at once.
    from conversation import Conversation
    from cpu import optimize_for_cpu_inference
    from model import load_model

    model = load_model(files, tokenizer, device)
    if settings.bf16:
        model.bfloat16()
    optimize_for_cpu_inference(model)
    if not tokenizer.fine_tuned:
        log.warning("warning: this model was not fine-tuned on dialogs, so expect nonsense; train it with train.py")
    # spaCy, which openai-gpt's text is cut with, takes half a second to import: while the user reads and types.
    threading.Thread(target=tokenizer.encode, args=(persona,)).start()
    if settings.web:
        from endpoint import Bot
        from web import serve

        bot = Bot(settings.model, persona, decoding, settings.max_history, seed, dialogs)
        serve(model, tokenizer, bot, web_settings)
        return
    chat = Conversation(model, tokenizer, persona, decoding, settings.max_history, seed)
    sys.stdout.reconfigure(errors="replace")  # a reply may hold what the terminal's encoding has not
    try:
        if sys.stdin.isatty():
            Terminal(chat, transcript, dialogs).run()
        else:
            answer_lines(chat, transcript)
    except KeyboardInterrupt:
        pass  # Ctrl-C ends the chat like Ctrl-D
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would only tear the way out
    if sys.stdin.isatty():
        print()


if __name__ == "__main__":
    run_script(main)
