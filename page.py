"""The chat page of `interact.py --web`, made of Gradio's parts.

It keeps nothing on the server: a chat is what the browser shows, and comes with every event.
"""

import os
import random
import re
import zlib
from collections.abc import AsyncIterator
from dataclasses import asdict, replace
from pathlib import Path

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before it is imported: nothing is told to anyone

import gradio as gr

from cli import Decoding, UserError
from dialogs import check_message
from endpoint import MAX_PERSONA, Ask, Bot, Busy, Worker
from generation import Reply

# ------------------------------------------------------------------------------------------------------------
# What the page asks the server; what it does without it is in page.js
# ------------------------------------------------------------------------------------------------------------

# A chat is a list of messages as Gradio's Chatbot has them, oldest first. A last one that is pending is a reply that
# is written or, with a log, awaited.
WRITTEN = {"status": "pending"}
AWAITED = {"role": "assistant", "content": "…", "metadata": WRITTEN | {"log": "awaited"}}
JOINER = "\u2060"


def shown(text: str) -> str:
    """Text for the Chatbot, which takes it for HTML: a character without width keeps a tag or an entity text."""
    return re.sub(r"(?<=<)(?=[a-zA-Z/!?])|(?<=&)(?=#|[a-zA-Z]{2})", JOINER, text)


class Page:
    """What the page asks for. It keeps nothing, so that sessions cannot meet."""

    def __init__(self, worker: Worker, bot: Bot):
        self.worker, self.bot = worker, bot

    def ask(self, chat: list[dict], persona: str, values: tuple) -> Ask:
        """The reply wanted to the last message of a chat. values: of the OPTIONS. Raises UserError."""
        said = ["".join(part["text"] for part in message["content"]).replace(JOINER, "") for message in chat]
        sentences = [check_message(line) for line in persona.splitlines() if line.strip()]
        if len(sentences) > MAX_PERSONA:
            raise UserError(f"the persona has {len(sentences)} sentences; expected at most {MAX_PERSONA}")
        options = dict(zip(OPTIONS, values, strict=True))
        decoding = self.bot.decoding
        if options["n_replies"] > 1:
            decoding = replace(decoding, no_sample=False)
        for name, value in options.items():
            decoding = decoding.changed(name, str(value))
        return Ask(sentences, [*said[:-1], check_message(said[-1])], decoding)

    async def answer(self, chat: list[dict], persona: str, *values) -> AsyncIterator[tuple]:
        """Yields the chat, with the awaited reply as it grows, and the message box's buttons."""
        *chat, last = chat or [{}]
        if (last.get("metadata") or {}).get("status") != "pending":
            yield gr.skip(), gr.skip()
            return
        yield [*chat, AWAITED], gr.update(submit_btn=False, stop_btn="Stop")
        try:
            with self.worker.submit(self.ask(chat, persona, values)) as job:
                async for step in job:
                    reply = {"role": "assistant", "content": shown(step.texts[0])}
                    if step.candidates:
                        yield [*chat, reply | {"options": alternatives(step.candidates)}], gr.skip()
                    elif step.texts[0]:
                        yield [*chat, reply | {"metadata": WRITTEN}], gr.skip()
        except (UserError, Busy) as error:
            gr.Warning(str(error), title="")
            yield chat, gr.skip()

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


def alternatives(candidates: dict[str, Reply]) -> list[dict]:
    """The buttons under a reply, best first: every text that was drawn, where there are several."""
    scores = {text: f"head {r.mc_score:.2f}, likelihood {r.token_log_likelihood:.2f}" for text, r in candidates.items()}
    return [{"value": shown(text), "label": f"{text}  ({scores[text]})"} for text in scores if len(scores) > 1]


# ------------------------------------------------------------------------------------------------------------
# How the page looks
# ------------------------------------------------------------------------------------------------------------

CSS = """
.gradio-container { width: 100%; max-width: 1200px !important; margin: auto; }
#chat .icon-button-wrapper.top-panel { display: none; }
@media (max-width: 640px) { #chat { height: 60vh !important; } .gradio-container { padding: 8px !important; } }
"""
# Fonts by name: none is fetched.
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
SLIDERS = {name: option.metadata for name, option in Decoding.options().items() if option.metadata["slider"]}
OPTIONS = (*SLIDERS, "rerank")
SCRIPT = f"<script>{Path(__file__).with_name('page.js').read_text(encoding='utf-8')}</script>"


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


def chat_page(worker: Worker, bot: Bot) -> gr.Blocks:
    """The page: its parts, and which handler answers which event."""
    page = Page(worker, bot)
    hidden = {"api_visibility": "private", "show_progress": "hidden"}
    with gr.Blocks(title="Chat with a persona", analytics_enabled=False) as blocks:
        gr.Markdown("# Chat with a persona")
        with gr.Row():
            with gr.Column(scale=3, min_width=300):
                chat = gr.Chatbot(
                    elem_id="chat",
                    show_label=False,
                    height="65vh",
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
                with gr.Row():
                    new, download = (gr.Button(name, size="sm", min_width=90) for name in ("New chat", "Transcript"))
            with gr.Column(scale=1, min_width=260):
                persona, drawn, options = settings_column(bot)
        key = f"chat {bot.name} {zlib.crc32(persona.value.encode())}"
        saved = gr.BrowserState([[], persona.value], storage_key=key, secret=key)

        def in_browser(function: str, inputs: list, outputs: list) -> dict:
            """An event that a function of page.js answers."""
            js = f"(...values) => page.{function}(...values)"
            return {"fn": None, "inputs": inputs, "outputs": outputs, "js": js, **hidden}

        wanted = [
            box.submit(**in_browser("send", [chat, box], [chat, box])),
            chat.retry(**in_browser("again", [chat], [chat])),
            chat.edit(page.edit, chat, chat, **hidden),
        ]
        replies = [event.then(page.answer, [chat, persona, *options], [chat, box], **hidden) for event in wanted]
        for event in replies:  # also after it was cancelled
            event.then(**in_browser("settle", [chat, box], [chat, box]))
        box.stop(None, cancels=replies, **hidden)
        new.click(**in_browser("drop", [chat], [chat]), cancels=replies)
        chat.undo(**in_browser("undo", [chat, box], [chat, box]))
        chat.option_select(page.choose, chat, chat, **hidden)
        drawn.click(page.draw_persona, None, persona, **hidden)
        download.click(**in_browser("transcript", [chat, persona], []))
        gr.on([chat.change, persona.change], **in_browser("save", [chat, persona, saved], [saved]))
        blocks.load(**in_browser("restore", [chat, persona, saved], [chat, persona]))
    return blocks
