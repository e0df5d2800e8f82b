"""The chat page of `interact.py --web`, made of Gradio's parts.

It keeps nothing on the server: a chat is what the browser shows, and comes with every event.
"""

import asyncio
import html
import os
import random
import re
import zlib
from collections.abc import AsyncIterator
from dataclasses import asdict, replace
from pathlib import Path

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before it is imported: nothing is told to anyone

import gradio as gr

from cli import UserError
from dialogs import check_message
from generation import Reply
from options import Decoding
from worker import Ask, Bot, Job, Progress, Unavailable, Worker

# ------------------------------------------------------------------------------------------------------------
# What the page asks the server; what it does without it is in page.js
# ------------------------------------------------------------------------------------------------------------

# A chat is a list of messages as Gradio's Chatbot has them, oldest first. A last one that is pending is a reply that
# is written or, with a log, awaited.
WRITTEN = {"status": "pending"}
AWAITED = {"role": "assistant", "content": "…", "metadata": WRITTEN | {"log": "awaited"}}
JOINER = "\u2060"
REFRESH = 0.1  # seconds between two updates of the page, which a browser shows whole each time


def shown(text: str) -> str:
    """Text for the Chatbot, which takes it for HTML: a character without width keeps a tag or an entity text."""
    return re.sub(r"(?<=<)(?=[a-zA-Z/!?])|(?<=&)(?=#|[a-zA-Z]{2})", JOINER, text)


class Page:
    """What the page asks for. It keeps nothing, so that sessions cannot meet."""

    def __init__(self, worker: Worker):
        self.worker, self.bot = worker, worker.bot

    def ask(self, chat: list[dict], persona: str, values: tuple) -> Ask:
        """The reply wanted to the last message of a chat. values: of the OPTIONS. Raises UserError."""
        said = ["".join(part["text"] for part in message["content"]).replace(JOINER, "") for message in chat]
        sentences = [check_message(line) for line in persona.splitlines() if line.strip()]
        options = dict(zip(OPTIONS, values, strict=True))
        greedy = self.bot.decoding.no_sample and options["n_replies"] == 1
        decoding = replace(self.bot.decoding, no_sample=greedy, **options)
        return Ask(sentences, [*said[:-1], check_message(said[-1])], decoding)

    async def answer(self, chat: list[dict], persona: str, *values) -> AsyncIterator[tuple]:
        """Yields the chat, with the awaited reply as it grows, the message box's buttons and the note below it."""
        *chat, last = chat or [{}]
        if (last.get("metadata") or {}).get("status") != "pending":
            yield gr.skip(), gr.skip(), gr.skip()
            return
        yield [*chat, AWAITED], gr.update(submit_btn=False, stop_btn="Stop"), gr.skip()
        try:
            with self.worker.submit(self.ask(chat, persona, values)) as job:
                async for reply, note in self.growing(job):
                    yield [*chat, reply], gr.skip(), note
        except (UserError, Unavailable) as error:
            gr.Warning(str(error), title="")
            yield chat, gr.skip(), gr.skip()

    async def growing(self, job: Job) -> AsyncIterator[tuple[dict, str | dict]]:
        """The reply as the chat shows it next, and the note. One that waits tells its place each second.

        Gradio looks only between two steps whether the page is still open.
        """
        reply, note = AWAITED, gr.skip()
        while not job.ended:
            try:
                step = await asyncio.wait_for(job.newest(), 1)
            except TimeoutError:
                if "log" in reply["metadata"]:
                    ahead = self.worker.ahead(job)
                    reply = AWAITED | {"content": f"… {ahead} before you" if ahead else "…"}
            else:
                reply = bubble(step)
                if job.ended:
                    note = step.warning
            yield reply, note
            await asyncio.sleep(REFRESH)

    def edit(self, chat: list[dict], event: gr.EditData) -> list[dict]:
        """Begin anew from a message of the user that was changed."""
        return [*chat[: event.index], {"role": "user", "content": shown(event.value)}, AWAITED]

    def choose(self, chat: list[dict], event: gr.SelectData) -> list[dict]:
        """Put an alternative in the place of the last reply."""
        return [*chat[:-1], chat[-1] | {"content": event.value}]

    def draw_persona(self) -> str:
        try:
            return "\n".join(random.choice(self.bot.dialogs.personas))
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error


def bubble(step: Progress) -> dict:
    """The reply as the chat shows it."""
    ((text, finish_reason),) = step.choices
    if finish_reason:
        return {"role": "assistant", "content": shown(text), "options": alternatives(step.candidates)}
    return {"role": "assistant", "content": shown(text), "metadata": WRITTEN} if text else AWAITED


def alternatives(candidates: dict[str, Reply]) -> list[dict]:
    """The buttons under a reply, best first: every text that was drawn, where there are several."""
    buttons = []
    for text, reply in candidates.items():
        scores = f"head {reply.mc_score:.2f}, likelihood {reply.token_log_likelihood:.2f}"
        buttons.append({"value": shown(text), "label": f"{text}  ({scores})"})
    return buttons if len(buttons) > 1 else []


# ------------------------------------------------------------------------------------------------------------
# How the page looks
# ------------------------------------------------------------------------------------------------------------

CSS = """
#head { padding: 0; }
#head h1 { display: inline; margin-right: 12px; font-size: 1.6em; font-weight: bold; }
.gradio-container { width: 100%; max-width: 1200px !important; margin: auto; }
#chat { height: calc(100dvh - 250px) !important; min-height: 320px; }
#chat .top-panel { display: none; }  /* a bin, which "New chat" is too */
#chat .placeholder { padding: 0 16px; text-align: center; }
#chat .options { display: flex; flex-direction: column; margin: 0 16px; gap: 4px; }
#chat .option { text-align: left; padding: 8px 12px; min-height: 36px; max-width: 100%; }
#chat .icon-button { min-width: 30px; min-height: 30px; }
#chat .edit-textarea { min-width: min(420px, 60vw); min-height: 90px; }
button.sm, #message button { min-height: 36px; }
.label-wrap { padding: 3px 0; }
:is(button, textarea, input):focus-visible { outline: 2px solid var(--color-accent) !important; }
#message:focus-within { box-shadow: inset 0 0 0 2px var(--color-accent) !important; }
#note { padding: 0; font-size: 0.85em; }
#message textarea { outline: none !important; }
@media (max-width: 640px) { #chat { height: 60dvh !important; } .gradio-container { padding: 8px !important; } }
"""
# Fonts by name, so that none is fetched. Placeholders that can be read: 4.5 to 1 against their ground, or more.
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]).set(
    input_placeholder_color="#6b6b74", input_placeholder_color_dark="#a2a2ab"
)
SLIDERS = {name: option.metadata for name, option in Decoding.options().items() if option.metadata["slider"]}
OPTIONS = (*SLIDERS, "rerank")
# Part of every event that page.js answers, since the script may arrive after the page.
LOADED = "while (!window.page) await new Promise((resolve) => setTimeout(resolve, 20));"


def settings_column(bot: Bot) -> tuple[gr.Textbox, gr.Button, list]:
    """The persona, the button that draws another one, and the OPTIONS."""
    persona = gr.Textbox(
        "\n".join(bot.persona),
        label="Persona of the bot: a sentence in each line",
        lines=6,
        max_lines=12,
        elem_id="persona",
    )
    drawn = gr.Button("Random persona", size="sm")
    with gr.Accordion("How replies are drawn", open=False):
        values = asdict(bot.decoding)
        options = []
        for name, about in SLIDERS.items():
            low, high, step = about["slider"]
            value, label = max(low, values[name]), name.replace("_", " ").capitalize()
            options.append(gr.Slider(low, max(high, value), value, step=step, label=label, info=about["help"]))
        ways = [("head", "mc"), ("likelihood", "lm"), ("both", "both")]
        options.append(gr.Radio(ways, value=values["rerank"], label="Best reply by"))
    return persona, drawn, options


def look(bot: Bot) -> dict:
    """Theme, style and script of the page, for Gradio's launch."""
    # A chat with another model, or another persona to begin with, is another one.
    key = zlib.crc32("\n".join([bot.name, *bot.persona]).encode(errors="replace"))
    script = Path(__file__).with_name("page.js").read_text(encoding="utf-8")
    return {"theme": THEME, "css": CSS, "head": f"<script>const KEY = 'chat {key}';\n{script}</script>"}


def chat_column() -> tuple[gr.Chatbot, gr.Textbox, gr.HTML, gr.Button, gr.Button]:
    """The chat, the message box, the note of what the model did not see, and buttons: a new chat, a transcript."""
    chat = gr.Chatbot(
        elem_id="chat",
        show_label=False,
        placeholder="Say something to begin. The bot answers in the character of its persona.",
        render_markdown=False,
        latex_delimiters=[],
        buttons=["copy"],
        editable="user",
    )
    box = gr.Textbox(
        placeholder="Type a message",
        label="Message",
        show_label=False,
        autofocus=True,
        submit_btn="Send",
        max_lines=6,
        elem_id="message",
    )
    note = gr.HTML(elem_id="note", padding=False)
    with gr.Row():
        new, download = (gr.Button(name, size="sm", interactive=False) for name in ("New chat", "Transcript"))
    return chat, box, note, new, download


def chat_page(worker: Worker) -> gr.Blocks:
    """The page: its parts, and what answers their events."""
    page, bot = Page(worker), worker.bot
    hidden = {"api_visibility": "private", "show_progress": "hidden"}
    with gr.Blocks(title="Chat with a persona", analytics_enabled=False) as blocks:
        gr.HTML(f"<h1>Chat with a persona</h1>{html.escape(bot.name)}", elem_id="head")
        with gr.Row():
            with gr.Column(scale=3, min_width=300):
                chat, box, note, new, download = chat_column()
            with gr.Column(scale=1, min_width=260):
                persona, drawn, options = settings_column(bot)

        talk = [chat, box]

        def in_browser(function: str, inputs: list, outputs: list | None = None) -> dict:
            """An event that a function of page.js answers. outputs: by default the inputs, changed."""
            js = f"async (...values) => {{ {LOADED} return page.{function}(...values); }}"
            outputs = inputs if outputs is None else outputs
            return {"fn": None, "inputs": inputs, "outputs": outputs, "js": js, **hidden}

        wanted = [
            box.submit(**in_browser("send", talk)),
            chat.retry(**in_browser("again", [chat])),
            chat.edit(page.edit, chat, chat, **hidden),
        ]
        replies = [event.then(page.answer, [chat, persona, *options], [*talk, note], **hidden) for event in wanted]
        for event in replies:  # also after it was cancelled
            event.then(**in_browser("settle", talk))
        box.stop(None, cancels=replies, **hidden)
        new.click(**in_browser("drop", [chat]), cancels=replies)
        chat.undo(**in_browser("undo", talk))
        chat.option_select(page.choose, chat, chat, **hidden)
        drawn.click(page.draw_persona, None, persona, **hidden)
        download.click(**in_browser("transcript", [chat, persona], []))
        gr.on([chat.change, persona.change], **in_browser("save", [chat, persona], [new, download]))
        blocks.load(**in_browser("restore", [chat, persona]))
    return blocks
