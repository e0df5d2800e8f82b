"""The chat page of `interact.py --web`, made of Gradio's parts.

It keeps nothing on the server: a chat is what the browser shows, and comes with every event.
"""

import asyncio
import contextlib
import html
import os
import random
import re
import zlib
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before it is imported: nothing is told to anyone

import gradio as gr

from cli import UserError
from dialogs import check_message
from generation import Reply
from options import Decoding
from worker import Ask, Bot, Choice, Job, Progress, Unavailable, Worker

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


def alternatives(candidates: dict[str, Reply]) -> list[dict]:
    """The buttons under a reply, best first: every text that was drawn, where there are several."""
    buttons = []
    for text, reply in candidates.items():
        scores = f"head {reply.mc_score:.2f}, likelihood {reply.token_log_likelihood:.2f}"
        buttons.append({"value": shown(text), "label": f"{text}  ({scores})"})
    return buttons if len(buttons) > 1 else []


# ------------------------------------------------------------------------------------------------------------
# How it looks
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


def look(bot: Bot) -> dict:
    """Theme, style and script of the page, for Gradio's launch."""
    # A chat with another model, or another persona to begin with, is another one.
    key = zlib.crc32("\n".join([bot.name, *bot.persona]).encode(errors="replace"))
    script = Path(__file__).with_name("page.js").read_text(encoding="utf-8")
    return {"theme": THEME, "css": CSS, "head": f"<script>const KEY = 'chat {key}';\n{script}</script>"}


# ------------------------------------------------------------------------------------------------------------
# The page
# ------------------------------------------------------------------------------------------------------------

# Begins what page.js answers, since the script may arrive after the page.
LOADED = "while (!window.page) await new Promise((resolve) => setTimeout(resolve, 20));"
HIDDEN = {"api_visibility": "private", "show_progress": "hidden"}  # of every event


class Page:
    """The page's parts, and what answers their events. It keeps nothing of a chat, so that sessions cannot meet."""

    def __init__(self, worker: Worker):
        self.worker, self.bot = worker, worker.bot
        with gr.Blocks(title="Chat with a persona", analytics_enabled=False) as self.blocks:
            gr.HTML(f"<h1>Chat with a persona</h1>{html.escape(self.bot.name)}", elem_id="head")
            with gr.Row():
                with gr.Column(scale=3, min_width=300):
                    self.add_chat()
                with gr.Column(scale=1, min_width=260):
                    self.add_settings()
            self.add_events()

    def add_chat(self) -> None:
        self.chat = gr.Chatbot(
            elem_id="chat",
            show_label=False,
            placeholder="Say something to begin. The bot answers in the character of its persona.",
            render_markdown=False,
            latex_delimiters=[],
            buttons=["copy"],
            editable="user",
        )
        self.box = gr.Textbox(
            placeholder="Type a message",
            label="Message",
            show_label=False,
            autofocus=True,
            submit_btn="Send",
            max_lines=6,
            elem_id="message",
        )
        self.note = gr.HTML(elem_id="note", padding=False)  # what the model did not see
        with gr.Row():
            self.new = gr.Button("New chat", size="sm", interactive=False)
            self.download = gr.Button("Transcript", size="sm", interactive=False)

    def add_settings(self) -> None:
        self.persona = gr.Textbox(
            "\n".join(self.bot.persona),
            label="Persona of the bot: a sentence in each line",
            lines=6,
            max_lines=12,
            elem_id="persona",
        )
        self.draw = gr.Button("Random persona", size="sm")
        self.options = []  # in the order of OPTIONS
        with gr.Accordion("How replies are drawn", open=False):
            for name, about in SLIDERS.items():
                low, high, step = about["slider"]
                # An option of the command line may lie beyond what its slider shows.
                value = max(low, getattr(self.bot.decoding, name))
                label = name.replace("_", " ").capitalize()
                self.options.append(gr.Slider(low, max(high, value), value, step=step, label=label, info=about["help"]))
            ways = [("head", "mc"), ("likelihood", "lm"), ("both", "both")]
            self.options.append(gr.Radio(ways, value=self.bot.decoding.rerank, label="Best reply by"))

    def add_events(self) -> None:
        chat, talk, kept = self.chat, [self.chat, self.box], [self.chat, self.persona]
        wanted = [
            in_browser(self.box.submit, "send", talk),
            in_browser(chat.retry, "again", [chat]),
            chat.edit(self.edit, chat, chat, **HIDDEN),
        ]
        replies = [event.then(self.answer, [*kept, *self.options], [*talk, self.note], **HIDDEN) for event in wanted]
        for event in replies:  # also after it was cancelled
            in_browser(event.then, "settle", talk)
        self.box.stop(None, cancels=replies, **HIDDEN)
        in_browser(self.new.click, "drop", [chat], cancels=replies)
        in_browser(chat.undo, "undo", talk)
        chat.option_select(self.choose, chat, chat, **HIDDEN)
        self.draw.click(self.draw_persona, None, self.persona, **HIDDEN)
        in_browser(self.download.click, "transcript", kept, [])
        changed = partial(gr.on, [chat.change, self.persona.change])
        in_browser(changed, "save", kept, [self.new, self.download])
        in_browser(self.blocks.load, "restore", kept)

    async def answer(self, chat: list[dict], persona: str, *values) -> AsyncIterator[dict]:
        """The awaited reply as it grows: what of the page is to change.

        Gradio looks only between two steps whether the page is still open, so there is one each second at least.
        """
        *messages, last = chat or [{}]
        if (last.get("metadata") or {}).get("status") != "pending":
            yield gr.skip()
            return
        yield {self.box: gr.update(submit_btn=False, stop_btn="Stop")}
        try:
            with self.worker.submit(self.ask(messages, persona, values)) as job:
                step = Progress([Choice("", None)])
                while not job.ended:
                    with contextlib.suppress(TimeoutError):
                        # Not `wait_for`: until Python 3.12 it forgets a Stop that comes together with a step.
                        async with asyncio.timeout(1):
                            step = await job.newest()
                    changes = {self.chat: [*messages, self.bubble(step, job)]}
                    if job.ended:
                        changes[self.note] = step.warning
                    yield changes
                    await asyncio.sleep(REFRESH)
        except (UserError, Unavailable) as error:
            gr.Warning(str(error), title="")
            yield {self.chat: messages}

    def ask(self, chat: list[dict], persona: str, values: tuple) -> Ask:
        """The reply wanted to the last message of a chat. values: of the OPTIONS. Raises UserError."""
        texts = []
        for message in chat:
            text = "".join(part["text"] for part in message["content"])
            texts.append(text.replace(JOINER, ""))
        sentences = [check_message(line) for line in persona.splitlines() if line.strip()]
        options = dict(zip(OPTIONS, values, strict=True))
        # There is no slider for it, and several replies cannot be drawn with it.
        greedy = self.bot.decoding.no_sample and options["n_replies"] == 1
        decoding = replace(self.bot.decoding, no_sample=greedy, **options)
        return Ask(sentences, [*texts[:-1], check_message(texts[-1])], decoding)

    def bubble(self, step: Progress, job: Job) -> dict:
        """The reply as the chat shows it. One that waits tells its place."""
        ((text, finish_reason),) = step.choices
        if finish_reason:
            return {"role": "assistant", "content": shown(text), "options": alternatives(step.candidates)}
        if text:
            return {"role": "assistant", "content": shown(text), "metadata": WRITTEN}
        ahead = self.worker.ahead(job)
        return AWAITED | {"content": f"… {ahead} before you"} if ahead else AWAITED

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


def in_browser(event: Callable, function: str, inputs: list, outputs: list | None = None, **more):
    """Let a function of page.js answer an event. outputs: by default the inputs, changed."""
    js = f"async (...values) => {{ {LOADED} return page.{function}(...values); }}"
    outputs = inputs if outputs is None else outputs
    return event(None, inputs, outputs, js=js, **HIDDEN, **more)
