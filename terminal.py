"""What a person types at a terminal and sees there: the prompt, its history, colours, wrapped text, a status line."""

import contextlib
import json
import os
import re
import select
import shutil
import signal
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

from cli import UserError, printable
from files import state_folder

# ------------------------------------------------------------------------------------------------------------
# Colours
# ------------------------------------------------------------------------------------------------------------

GREEN, GREY = "32", "90"  # of the prompt; of what is neither typed nor a reply


def obeys_escapes() -> bool:
    """Whether standard output is a terminal that obeys escape sequences, instead of showing them."""
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def coloured(text: str, colour: str) -> str:
    """`text` in a colour, where there are colours and NO_COLOR (https://no-color.org) does not forbid them."""
    if not obeys_escapes() or os.environ.get("NO_COLOR"):
        return text
    return f"\x1b[{colour}m{text}\x1b[0m"


# ------------------------------------------------------------------------------------------------------------
# Words, whole ones in each line
# ------------------------------------------------------------------------------------------------------------


def char_width(char: str) -> int:
    """The columns that a character takes: two for Chinese, Japanese, Korean and emoji, none for accents put on top."""
    if unicodedata.east_asian_width(char) in "WF":
        return 2
    if unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 1


def text_width(text: str) -> int:
    return sum(map(char_width, text))


def columns() -> int:
    """How many columns a line may fill; as many as it likes where the output is not a terminal.

    Asked anew for each word, as a window may be resized. The last column stays free: terminals differ in what a line
    break after it does.
    """
    if not sys.stdout.isatty():
        return sys.maxsize
    return max(shutil.get_terminal_size().columns - 1, 1)


class Wrapper:
    """Breaks text that comes in pieces into lines, between words and beside wide characters.

    A word is held back until it ends, as nobody can know before whether it fits its line.

    Args:
        columns: gives the columns of a line.
    """

    def __init__(self, columns: Callable[[], int] = columns):
        self.columns, self.column, self.word = columns, 0, ""

    def feed(self, piece: str) -> str:
        """More text; what of the text may be printed now."""
        lines = ""
        for char in piece:
            if char.isspace() or char_width(char) == 2:
                lines += self.finish() + self._place(char)
            else:
                self.word += char
        return lines

    def finish(self) -> str:
        """The word that was held back."""
        word, self.word = self.word, ""
        if text_width(word) <= self.columns():
            return self._place(word)
        # It is wider than a whole line, so it has to be broken somewhere.
        return "".join(map(self._place, word))

    def _place(self, text: str) -> str:
        """`text`, after a line break where it does not fit; a space there is the line break."""
        self.column += text_width(text)
        if text != "\n" and self.column <= self.columns():
            return text
        text = text.strip()
        self.column = text_width(text)
        return "\n" + text


def wrapped(text: str, width: int | None = None) -> list[str]:
    """The lines of a text, by default as wide as the terminal."""
    wrapper = Wrapper() if width is None else Wrapper(lambda: max(width, 2))  # 2: of a wide character
    lines = wrapper.feed(text) + wrapper.finish()
    return [line.rstrip() for line in lines.split("\n")]


def hanging(head: str, text: str) -> str:
    """`text` after `head`, and below its own beginning where it takes more lines."""
    lines = wrapped(text, columns() - len(head))
    indented = "\n" + " " * len(head)
    return head + indented.join(lines)


def box(title: str, lines: list[str]) -> str:
    """Lines in a frame that is open to the right, wrapped to the terminal's width."""
    width = min(shutil.get_terminal_size().columns, 80)
    unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    top, side, bottom, dash = "╭│╰─" if unicode else "+|+-"
    texts = wrapped(printable("\n".join(lines)), width - 2)
    edge = 2 + max(map(text_width, [title + "  ", *texts]))
    head = coloured(f"{top}{dash} {title} ".ljust(edge, dash), GREY)
    body = [f"{coloured(side, GREY)} {text}" for text in texts]
    foot = coloured(bottom.ljust(edge, dash), GREY)
    return "\n".join([head, *body, foot])


def show(text: str) -> None:
    """Print what somebody said."""
    print(*wrapped(printable(text)), sep="\n")


def notice(text: str) -> None:
    """Print what the program says of itself."""
    lines = wrapped(printable(text))
    print(coloured("\n".join(lines), GREY))


def show_status(text: str) -> None:
    """Show what is being waited for, in the place of what this line holds; "" leaves it empty."""
    if obeys_escapes():
        line = coloured(text[: columns()], GREY)
        print(f"\r\x1b[K{line}", end="", flush=True)


def print_stream(pieces: Iterator[str], waiting: str) -> str:
    """Print a text as it comes, a piece for each token and a last one that is none; how fast it came, in words.

    Args:
        waiting: what is shown until the first word, where {} is how many tokens are drawn.
    """
    wrapper = Wrapper()
    started = time.perf_counter()
    seconds = []  # from the start to each piece
    begun = False  # a word stands in the place of what was waited for
    show_status(waiting.format(0))
    try:
        for piece in pieces:
            seconds.append(time.perf_counter() - started)
            lines = wrapper.feed(piece)
            if not begun:
                begun = bool(lines)
                show_status("" if begun else waiting.format(len(seconds)))
            print(lines, end="", flush=True)
    finally:
        if not begun:
            show_status("")
    print(wrapper.finish())
    tokens = len(seconds) - 1
    speed = tokens / max(seconds[-1], 1e-6)
    return f"{tokens} tokens in {seconds[-1]:.1f} s ({speed:.1f} tokens/s), the first after {seconds[0]:.1f} s"


# ------------------------------------------------------------------------------------------------------------
# The history of what was typed
# ------------------------------------------------------------------------------------------------------------

MAX_HISTORY = 1000  # messages that are remembered
MAX_HISTORY_SIZE = 2**20  # bytes of the file; a longer one is rewritten


class History:
    """What was typed, here and in earlier chats: a file of JSON strings, one a line, that only its owner can read.

    Each message is written at once, so that chats side by side, and chats that are killed, keep theirs. Where nothing
    can be written (a home of somebody else's, or none) there is a history of this chat alone.
    """

    def __init__(self, path: Path):
        # A user without a home has a ~ in the path. To open a pipe would wait for its other side.
        usable = path.is_absolute() and (os.path.isfile(path) or not os.path.lexists(path))
        self.path = path if usable else Path(os.devnull)

    def read(self) -> list[str]:
        """The last messages, oldest first. Lines that are damaged are left out."""
        messages = []
        with contextlib.suppress(OSError):
            data = self.path.read_bytes()
            for line in data.splitlines()[-MAX_HISTORY:]:
                if line.startswith(b'"'):
                    with contextlib.suppress(ValueError):
                        messages.append(json.loads(line))
            if len(data) > MAX_HISTORY_SIZE:
                os.truncate(self.path, 0)
                self.append(*messages)
        return messages

    def append(self, *messages: str) -> None:
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with open(os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "w") as file:
                file.writelines(json.dumps(message) + "\n" for message in messages)


def set_up_readline(history: History, complete_line: Callable[[list[str], str], list[str]]) -> Callable[[str], None]:
    """Give input() arrow keys, a history and the tab key; the function that adds a message to that history.

    Args:
        complete_line: what the last word of a line may become, from the words before it and that word.
    """
    try:
        import readline
    except ImportError:  # Windows has none; input() has line editing of its own there
        return lambda message: None

    def complete(word: str, count: int) -> str | None:
        before = readline.get_line_buffer()[: readline.get_begidx()].split()
        return [*complete_line(before, word), None][count]

    def recall(message: str) -> None:
        with contextlib.suppress(ValueError):  # the encoding of this terminal may lack its characters
            readline.add_history(printable(message))

    def remember(message: str) -> None:
        recall(message)
        history.append(message)

    readline.set_completer_delims(" ")
    readline.set_completer(complete)
    libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")
    readline.set_auto_history(False)  # a message of several lines is one entry
    for message in history.read():
        recall(message)
    return remember


# ------------------------------------------------------------------------------------------------------------
# The prompt
# ------------------------------------------------------------------------------------------------------------

PROMPT, MORE = ">>> ", "... "
QUOTES = '"""'
PASTED_WITHIN = 0.02  # seconds: no hand types a line so soon after another


class Prompt:
    """Messages and commands as a person types them.

    Several lines that are pasted at once are one message. Where readline knows what is pasted (bracketed paste), they
    come as one line; elsewhere, by what follows at once.

    Args:
        is_command: whether a line is a command. A command is one line, also among pasted ones.
        complete_line: see `set_up_readline`.
    """

    def __init__(self, is_command: Callable[[str], bool], complete_line: Callable[[list[str], str], list[str]]):
        self.is_command = is_command
        self.terminal = sys.stdin.isatty()
        self.lines: list[str] = []  # pasted, and not taken yet
        self.remember: Callable[[str], None] = lambda message: None
        if self.terminal:
            self.remember = set_up_readline(History(state_folder() / "chat_history"), complete_line)

    def message(self) -> str:
        """The next message or command; "" for an empty line. Raises EOFError on Ctrl-D, KeyboardInterrupt on Ctrl-C."""
        try:
            first = self._line(PROMPT)
            quoted = first.lstrip().startswith(QUOTES)
            text = self._quoted(first) if quoted else self._pasted(first)
        except KeyboardInterrupt:
            self.lines = []
            raise
        if text:
            self.remember(text)
        # What was quoted is text, also where it looks like a command.
        return "/" + text if quoted and text.startswith("/") else text

    def _line(self, prompt: str) -> str:
        if not self.lines:
            # readline counts columns: what takes none, such as an escape sequence, must stand between \1 and \2.
            prompt = re.sub(r"\x1b\[\d+m", "\1\\g<0>\2", coloured(prompt, GREEN))
            self.lines = input(prompt).replace("\r", "\n").split("\n")
        return self.lines.pop(0)

    def _follows(self) -> bool:
        """Whether a line that was pasted with the last one waits."""
        if self.lines or not self.terminal or os.name == "nt":
            return bool(self.lines)
        return bool(select.select([sys.stdin], [], [], PASTED_WITHIN)[0])

    def _pasted(self, first: str) -> str:
        """A line and those that were pasted with it, up to a command, which waits for the next call, or to Ctrl-D."""
        lines = [first]
        with contextlib.suppress(EOFError):
            while not self.is_command(lines[-1]) and self._follows():
                lines.append(self._line(MORE))
        if len(lines) > 1 and self.is_command(lines[-1]):
            self.lines.insert(0, lines.pop())
        return "\n".join(lines).strip()

    def _quoted(self, first: str) -> str:
        """The lines up to closing quotes, or to Ctrl-D."""
        text = first.lstrip().removeprefix(QUOTES)
        try:
            while not text.rstrip().endswith(QUOTES):
                text += "\n" + self._line(MORE)
        except EOFError:
            print()
        return text.rstrip().removesuffix(QUOTES).strip()


@contextlib.contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Ctrl-C in the body sets what the given function tells, so that no computation is torn; a second one raises.

    What is typed meanwhile is not shown in the middle of what the body prints: it waits for the next prompt.
    """
    pressed = threading.Event()

    def press(*_) -> None:
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    before = signal.signal(signal.SIGINT, press)
    try:
        with keys_not_shown():
            yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def keys_not_shown() -> Iterator[None]:
    """The terminal neither shows nor edits what is typed in the body; Ctrl-C and Ctrl-Z still work."""
    if not sys.stdin.isatty() or os.name == "nt":
        yield
        return
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin, termios.TCSADRAIN)
        yield
    finally:
        with contextlib.suppress(termios.error):  # a terminal that was closed meanwhile
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def piped_lines() -> Iterator[str]:
    """The lines of an input that is not a terminal."""
    try:
        for line in sys.stdin:
            yield line.strip()
    except UnicodeDecodeError as error:
        raise UserError(f"the input is not {error.encoding} text; send text in that encoding") from error
