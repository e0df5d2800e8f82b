"""Draw a chat as a terminal window: python images/chat.py OPTIONS_OF_INTERACT -- LINES_TO_TYPE > images/chat.svg"""

import os
import pty
import re
import shlex
import subprocess
import sys
import textwrap
from html import escape
from pathlib import Path

COLUMNS, WIDTH, HEIGHT = 84, 8.6, 21  # of the terminal in characters; of a character in pixels
PROMPT = ">>> "


def chat(options: list[str], lines: list[str]) -> str:
    """What the screen shows after the lines were typed, each when the prompt asks for it, and Ctrl-D."""
    ours, theirs = pty.openpty()
    script = Path(__file__).resolve().parents[1] / "interact.py"
    environment = os.environ | {"TERM": "dumb", "COLUMNS": str(COLUMNS), "PYTHONIOENCODING": "utf-8"}
    with subprocess.Popen([sys.executable, script, *options], stdin=theirs, stdout=theirs, env=environment) as process:
        os.close(theirs)
        screen, typed = b"", [line.encode() + b"\n" for line in lines] + [b"\x04"]
        try:
            while read := os.read(ours, 4096):
                screen += read
                if screen.endswith(PROMPT.encode()) and typed:
                    os.write(ours, typed.pop(0))
        except OSError:  # the other side has closed
            pass
    if process.returncode:
        sys.exit(process.returncode)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", screen.decode())
    return text.rstrip().removesuffix(PROMPT.rstrip()).rstrip()


def drawn(command: str, screen: str) -> str:
    """An SVG of a terminal window in which the command was typed and the screen appeared."""
    typed = " \\\n".join(textwrap.wrap(f"$ {command}", COLUMNS - 2, subsequent_indent="    "))
    rows = [("#7ee787", line) for line in typed.splitlines()]
    for line in screen.splitlines():
        # as terminal.py colours them: the frame and what the program says grey, the prompt green
        grey = line[:1] in ("╭", "│", "╰") or line.startswith("Type a message")
        colour = "#8b949e" if grey else "#e6edf3"
        rows += [(colour, line[i : i + COLUMNS]) for i in range(0, max(len(line), 1), COLUMNS)]
    width, height = COLUMNS * WIDTH + 40, len(rows) * HEIGHT + 66
    texts = [f'<text y="{58 + HEIGHT * i}" fill="{c}">{escape(row)}</text>' for i, (c, row) in enumerate(rows)]
    prompt = escape(PROMPT)
    texts = [text.replace(f">{prompt}", f'><tspan fill="#7ee787">{prompt}</tspan>', 1) for text in texts]
    lights = zip((22, 42, 62), ("#ff5f56", "#ffbd2e", "#27c93f"), strict=True)
    lights = [f'<circle cx="{x}" cy="20" r="6" fill="{colour}"/>' for x, colour in lights]
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" width="{width:.0f}">
<rect width="100%" height="100%" rx="10" fill="#0d1117"/>
{"".join(lights)}
<g transform="translate(20 0)" xml:space="preserve" style="white-space: pre" font-size="14"
   font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, DejaVu Sans Mono, monospace">
{chr(10).join(texts)}
</g>
</svg>"""


if __name__ == "__main__":
    at = sys.argv.index("--")
    options, lines = sys.argv[1:at], sys.argv[at + 1 :]
    print(drawn(f"python interact.py {shlex.join(options)}", chat(options, lines)))
