"""Talk to a fine-tuned model in the terminal, or with --web in a browser."""

import glob
import importlib.util
import os
import random
import signal
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cli import UserError, check_device, log, printable, run_script
from dialogs import PERSONACHAT_URL, Dialogs, check_message
from files import cached_path, is_url
from model_files import decoding_defaults, find_finetuned_model
from options import CommonSettings, Decoding, Parser, Settings, kind_of, option
from personas import read_persona
from terminal import GREEN, Prompt, box, coloured, hanging, interrupts, notice, piped_lines, print_stream, show
from transcript import SavedChat, Transcript, last_dialog
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
    allow_host: list[str] | None = option(None, "another name that the server may be asked by; can be repeated")
    api_key: str | None = option(None, "what clients must show; default: the variable IMPROVEDFLEND_API_KEY")


def parse_settings(defaults: dict[str, Any] | None = None) -> tuple[ChatSettings, Decoding, WebSettings]:
    """The options of the command line. defaults: values, by name, of options that it does not give."""
    classes = ChatSettings, Decoding, WebSettings
    parser = Parser(__doc__, *classes)
    parser.set_defaults(**(defaults or {}))
    args = parser.parse_args()
    settings, decoding, web = (each.from_args(args) for each in classes)
    if settings.web and importlib.util.find_spec("gradio") is None:  # to import it would take seconds
        raise UserError("--web needs packages that are not installed: pip install -r requirements-web.txt")
    return settings, decoding, web


def model_name(model: str) -> str:
    """What a model is called: a folder or a file by its own name, since where it lies is nobody's business."""
    return Path(model).resolve().name if is_url(model) or os.path.exists(model) else model


# ------------------------------------------------------------------------------------------------------------
# Personas
# ------------------------------------------------------------------------------------------------------------


SAMPLE = Path(__file__).with_name("data") / "sample.json"


def persona_source(dataset_path: str) -> Dialogs:
    """The dialogs that personas are drawn from.

    Without a dataset these are PersonaChat's where it was downloaded before, else those of our own sample: 209 MB are
    much for a persona.
    """
    if not dataset_path and SAMPLE.is_file() and not cached_path(PERSONACHAT_URL).exists():
        dataset_path = str(SAMPLE)
    return Dialogs(dataset_path)


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
    "/candidates N": "take the N-th of them in place of the reply",
    "/set": "show the decoding options",
    "/set OPTION VALUE": "change one, as in /set temperature 0.9",
    "/stats": "how fast the last reply was, and how much of the context is used",
    "/save FILE": "add this chat to a file of training data",
    "/load FILE": "go on with the last dialog in a file",
    "/quit": "end the chat, like Ctrl-D",
}
NAMES = sorted({usage.split()[0] for usage in COMMANDS})
SYNONYMS = {"/?": "/help", "/clear": "/reset", "/regen": "/retry", "/bye": "/quit", "/exit": "/quit"}
KEYS = (
    'Several pasted lines are one message; so is what stands between two lines of """. A line that begins with // is '
    "text that begins with /. Ctrl-C stops a reply, or clears the line. Ctrl-D or /bye ends the chat."
)


def is_command(line: str) -> bool:
    """Whether a typed line is a command, if perhaps one that does not exist."""
    return line.lstrip().startswith("/") and not line.lstrip().startswith("//")


def completions(before: list[str], word: str) -> list[str]:
    """What the last word of a command may become, after the words before it."""
    options, choices = Decoding.options(), []
    match before:
        case [] if word:
            choices = NAMES
        case ["/persona"]:
            choices = ["add", "set", "random"]
        case ["/set"]:
            choices = options
        case ["/set", name] if name in options:
            choices = ["on", "off"] if kind_of(options[name]) is bool else options[name].metadata["choices"]
        case ["/save"] | ["/load"] | ["/persona", "set"]:  # no space follows: a path may go on
            paths = glob.glob(glob.escape(os.path.expanduser(word)) + "*")
            return sorted(path + os.sep if os.path.isdir(path) else path for path in paths)
    return [choice + " " for choice in choices if choice.startswith(word)]


class TerminalChat:
    """A chat with a person at a terminal: lines that begin with / are commands, methods named do_... here."""

    def __init__(self, chat, transcript: Transcript | None, dialogs: Dialogs):
        self.chat, self.transcript, self.dialogs = chat, transcript, dialogs
        self.saved: dict[str, SavedChat] = {}  # files that hold this chat
        self.pace = ""  # of the last reply, in words

    def run(self) -> None:
        self.show_persona()
        notice("Type a message, or /help for what else you can do.")
        prompt = Prompt(is_command, completions)
        while True:
            try:
                line = prompt.message()
                if is_command(line):
                    self.command(*line.split(None, 1))
                elif line:
                    self.say(check_message(line.removeprefix("/") if line.startswith("//") else line))
                else:
                    notice("Please type something (/help lists the commands, Ctrl-D ends the chat).")
            except UserError as error:
                notice(str(error))
            except KeyboardInterrupt:
                print()
                notice("Ctrl-D or /bye ends the chat.")
            except EOFError:  # Ctrl-D, or /quit
                return

    def command(self, name: str, rest: str = "") -> None:
        action = getattr(self, "do_" + SYNONYMS.get(name, name)[1:], None)
        if action is None:
            raise UserError(f"no command {printable(name)}; there are {' '.join(NAMES)} (// begins a text with /)")
        action(rest.strip())

    def say(self, text: str) -> None:
        """Print the reply to `text` as it is made."""
        chat, waiting = self.chat, "..."
        n, longest = chat.decoding.n_replies, chat.decoding.max_length
        if n > 1:
            waiting = f"... {n} replies, of which the best is given: {{}} of at most {longest} tokens"
        n_turns = len(chat.turns)
        with interrupts() as stopped:
            self.pace = print_stream(chat.stream(text, stopped), waiting)
        answered = len(chat.turns) > n_turns  # also where Ctrl-C cut the reply short
        if not answered:
            notice("(stopped before the first word; the message is forgotten)")
        chat.warn_of_truncation()
        if answered and self.transcript:
            self.transcript.add(chat)

    def show_persona(self) -> None:
        print(box("Persona", self.chat.persona or ["(none)"]))

    def take_back(self) -> str:
        """Drop the last turn; what the user said in it."""
        if not self.chat.turns or self.chat.turns[-1].text is None:  # the bot spoke first
            raise UserError("there is no message yet; type one")
        if self.transcript:
            self.transcript.take_back()
        return self.chat.turns.pop().text

    def begin_anew(self) -> None:
        """What is said from now on is another chat in the files that this one is kept in."""
        self.saved = {}
        if self.transcript:
            self.transcript.end_chat()

    def do_help(self, _: str) -> None:
        for usage, what in COMMANDS.items():
            others = " or ".join(other for other, name in SYNONYMS.items() if name == usage)
            print(hanging(f"{usage:18} ", what + (f"; also {others}" if others else "")))
        show(KEYS)

    def do_persona(self, rest: str) -> None:
        match rest.split(None, 1):
            case ["add", text]:
                self.chat.persona = [*self.chat.persona, check_message(text)]
            case ["set", name]:
                self.chat.persona = read_persona(name, "/persona set")
            case ["random"]:
                self.chat.persona = random.choice(self.dialogs.personas)
            case [_, *_]:
                raise UserError("expected /persona, /persona add TEXT, /persona set FILE or /persona random")
        self.show_persona()

    def do_reset(self, _: str) -> None:
        self.chat.turns = []
        self.begin_anew()
        notice("Forgotten; the persona is kept.")

    def do_undo(self, _: str) -> None:
        notice(f"Taken back: {self.take_back()}")

    def do_retry(self, _: str) -> None:
        self.say(self.take_back())

    def do_candidates(self, number: str) -> None:
        candidates = self.chat.turns[-1].candidates if self.chat.turns else []
        if not candidates:
            raise UserError("there is no reply with alternatives yet; type a message")
        if number:
            self.take_candidate(number)
            return
        print("      head  log-likelihood per token")
        for place, (text, reply) in enumerate(candidates, 1):
            scores = f"{reply.mc_score:7.2f} {reply.token_log_likelihood:6.2f}  "
            print(hanging(f"{place:2} {scores}", text))
        if self.chat.decoding.n_replies == 1:
            notice("Only one is drawn: /set n_replies 8 draws eight and gives the best.")

    def take_candidate(self, number: str) -> None:
        """Put an alternative, by its number in the list, in the place of the last reply."""
        turn = self.chat.turns[-1]
        numbered = {str(place): candidate for place, candidate in enumerate(turn.candidates, 1)}
        if number not in numbered:
            raise UserError(f"expected a number from 1 to {len(numbered)}, found '{number}'")
        turn.reply, reply = numbered[number]
        turn.ids = [*turn.ids[:-1], reply.tokens]
        if self.transcript:
            self.transcript.take_back()  # its line holds the reply that was given first
            self.transcript.add(self.chat)
        show(turn.reply)

    def do_set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        if name and (value or name not in Decoding.options()):
            self.chat.decoding = self.chat.decoding.changed(name, value.strip())
        for known, value in asdict(self.chat.decoding).items():
            if name in ("", known):
                if isinstance(value, bool):
                    value = "on" if value else "off"
                print(known, value)

    def do_stats(self, _: str) -> None:
        if self.pace:
            print(f"last reply: {self.pace}")
        ((tokens, _),) = self.chat.generation([]).prefixes  # of a message without words
        used = f"{len(tokens)} of the model's {self.chat.model.limit} tokens"
        print(f"context: {used}, for the persona and what was said last")

    def do_save(self, name: str) -> None:
        if not name:
            raise UserError("expected /save FILE")
        if not self.chat.turns:
            raise UserError("there is nothing to save yet; type a message")
        file = self.saved.setdefault(name, SavedChat(name))
        file.write(self.chat.record())
        notice(f"Saved {len(self.chat.history)} utterances in {name}")

    def do_load(self, name: str) -> None:
        if not name:
            raise UserError("expected /load FILE")
        self.chat.persona, dialog = last_dialog(name)
        self.chat.resume(dialog)
        self.begin_anew()
        self.show_persona()
        for turn in self.chat.turns[-3:]:  # enough to go on from
            if turn.text is not None:
                print(coloured("> ", GREEN), end="")
            show(turn.text or "")
            show(turn.reply)

    def do_quit(self, _: str) -> None:
        raise EOFError


def answer_lines(chat, transcript: Transcript | None) -> None:
    """A line per turn in, a line per reply out: every line is text, and an empty one has an empty reply."""
    log.info("Persona: " + " ".join(map(printable, chat.persona)))
    for line in piped_lines():
        if not line:
            print(flush=True)
            continue
        print(chat.reply(check_message(line)).replace("\n", " "), flush=True)
        chat.warn_of_truncation()
        if transcript:
            transcript.add(chat)


def main() -> None:
    settings, decoding, web_settings = parse_settings()
    device = check_device(settings.device)
    if settings.web:
        import web  # here alone: the terminal needs no Gradio

        web.check_address(web_settings)  # before a model is loaded
    seed = settings.seed or random.SystemRandom().randrange(1, 2**31)
    random.seed(seed)
    dialogs = persona_source(settings.dataset_path)
    persona = choose_persona(settings, dialogs)
    transcript = Transcript(settings.transcript) if settings.transcript else None

    files = find_finetuned_model(settings.model)
    if sys.stdin.isatty():
        log.info(f"loading {settings.model} ...")
    tokenizer = load_tokenizer(files, settings.pre_tokenizer)
    max_history = tokenizer.choose_max_history(settings.max_history)
    if tokenizer.fine_tuned:  # a base model's are for other texts
        decoding = parse_settings(decoding_defaults(files))[1]

    # Heavy: after all that can be told to be wrong at once.
    from conversation import Conversation
    from cpu import optimize_for_cpu_inference
    from loading import load_model

    model = load_model(files, tokenizer, device)
    if settings.bf16:
        model.bfloat16()
    optimize_for_cpu_inference(model)
    if not tokenizer.fine_tuned:
        log.warning("warning: this model was not fine-tuned on dialogs, so expect nonsense; train it with train.py")
    # spaCy, which openai-gpt's text is cut with, takes half a second to import: while the user reads and types.
    threading.Thread(target=tokenizer.encode, args=(persona,)).start()
    if settings.web:
        bot = web.Bot(model_name(settings.model), persona, decoding, max_history, seed, dialogs)
        web.serve(model, tokenizer, bot, web_settings)
        return
    chat = Conversation(model, tokenizer, persona, decoding, max_history, seed)
    sys.stdout.reconfigure(errors="replace")  # a reply may hold what the terminal's encoding has not
    try:
        if sys.stdin.isatty():
            sys.stdin.reconfigure(errors="replace")  # a key may send what is no text
            TerminalChat(chat, transcript, dialogs).run()
            print()
        else:
            answer_lines(chat, transcript)
    except BrokenPipeError:  # who reads the replies has left, as head does: end in silence, as cat does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left would be written at the exit
        sys.exit(128 + 13)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C now would only tear the way out


if __name__ == "__main__":
    run_script(main)
