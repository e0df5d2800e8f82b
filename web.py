"""A chat page (Gradio) and an OpenAI-compatible endpoint, /v1/chat/completions, for `interact.py --web`.

One worker thread generates one reply at a time, in the order in which they were asked for; page and endpoint only
wait for pieces of text. So sessions are never mixed, and a slow or vanished client never holds the model.
"""

import asyncio
import contextlib
import html
import itertools
import json
import os
import random
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before it is imported: nothing is told to anyone

import gradio as gr
import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from cli import Decoding, UserError, first_line, log
from dialogs import NO_JSON, Dialogs, Message, Record, check_message, dialog_of
from generation import Conversation, PrefixCache

MAX_BODY = 1_000_000  # bytes of a request
MAX_PERSONA = 50  # sentences
MAX_CHOICES = 16


# ------------------------------------------------------------------------------------------------------------
# One reply at a time
# ------------------------------------------------------------------------------------------------------------


class Busy(Exception):
    """Too many replies are waited for."""


class Job:
    """A reply that is waited for: an async iterator of what `work` yields in the worker thread.

    Whoever waits sets `gone` when it does not any more; `work` is given the function that tells so.
    """

    def __init__(self, work: Callable[[Callable[[], bool]], Iterator]):
        self.work = work
        self.gone = threading.Event()  # the client vanished, or asked to stop
        self.pieces: asyncio.Queue = asyncio.Queue()
        self.loop = asyncio.get_running_loop()

    def run(self) -> None:
        """In the worker thread: hand each piece to the waiting side's event loop."""
        end: Exception | None = None
        try:
            for piece in () if self.gone.is_set() else self.work(self.gone.is_set):
                self._hand_over(piece, None)
        except Exception as error:  # the waiting side raises it; the worker goes on with the next job
            end = error
        self._hand_over(None, end or StopAsyncIteration())

    def _hand_over(self, piece, end: Exception | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server is going down
            self.loop.call_soon_threadsafe(self.pieces.put_nowait, (piece, end))

    def __aiter__(self) -> "Job":
        return self

    async def __anext__(self):
        piece, end = await self.pieces.get()
        if end is not None:
            raise end
        return piece


class Worker:
    """Runs jobs one after the other in a thread; at most `max_queue` wait."""

    def __init__(self, max_queue: int):
        self.max_queue, self.waiting, self.changed = max_queue, [], threading.Condition()
        threading.Thread(target=self._run, daemon=True).start()

    def submit(self, work: Callable[[Callable[[], bool]], Iterator]) -> Job:
        job = Job(work)
        with self.changed:
            if sum(not other.gone.is_set() for other in self.waiting) >= self.max_queue:
                raise Busy(f"{self.max_queue} replies are waited for already; try again in a moment")
            self.waiting.append(job)
            self.changed.notify()
        return job

    def _run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting)
                job = self.waiting.pop(0)
            job.run()


@dataclass
class Server:
    """What page and endpoint share."""

    model: object
    tokenizer: object
    persona: list[str]
    decoding: Decoding
    max_history: int
    seed: int
    name: str
    dialogs: Dialogs
    worker: Worker
    prefix_cache: PrefixCache = field(default_factory=lambda: PrefixCache(8))
    count: Iterator[int] = field(default_factory=itertools.count)

    def conversation(self, persona: list[str] | None = None, seed: int | None = None) -> Conversation:
        """A new conversation, with replies drawn in its own way."""
        seed = (self.seed + next(self.count)) % 2**63 if seed is None else seed % 2**63
        persona = self.persona if persona is None else persona
        settings = self.decoding, self.max_history, seed, self.prefix_cache
        return Conversation(self.model, self.tokenizer, persona, *settings)


# ------------------------------------------------------------------------------------------------------------
# The endpoint
# ------------------------------------------------------------------------------------------------------------


class TextPart(msgspec.Struct):
    text: str
    type: str = "text"


class ChatMessage(msgspec.Struct):
    role: str
    content: str | list[TextPart]


class StreamOptions(msgspec.Struct):
    include_usage: bool = False


class ChatRequest(msgspec.Struct):
    """The part of OpenAI's request that has a meaning here; the rest is ignored."""

    messages: list[ChatMessage]
    model: str = ""
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    seed: int | None = None


def api_error(status: int, message: str) -> JSONResponse:
    kind = "rate_limit_error" if status == 429 else "invalid_request_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": None}}, status)


async def read_request(request: Request) -> ChatRequest:
    """The request's body. Raises UserError for one that is too large or wrong."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise UserError(f"the request is larger than {MAX_BODY} bytes; send fewer messages")
    try:
        return msgspec.json.decode(body, type=ChatRequest)
    except NO_JSON as error:
        raise UserError(f"not a chat completion request: {first_line(error)}") from error


def requested(server: Server, asked: ChatRequest) -> tuple[Conversation, str, int]:
    """The conversation so far, what is said to the bot and the number of choices. Raises UserError."""
    n = 1 if asked.n is None else asked.n
    if not 1 <= n <= MAX_CHOICES:
        raise UserError(f"n: expected 1 to {MAX_CHOICES}, found {n}")
    if not asked.messages or asked.messages[-1].role != "user":
        raise UserError("messages: expected the last one to have the role user")
    messages = []
    for message in asked.messages:
        parts = message.content
        text = parts if isinstance(parts, str) else " ".join(part.text for part in parts)
        messages.append(Message(message.role, text))
    try:  # with a reply to come, as if it were a dialog to train on
        dialog = dialog_of(Record(messages=[*messages, Message("assistant", "")]))
    except ValueError as error:
        raise UserError(f"messages: {first_line(error)}") from error
    *history, text = dialog.utterances[-1].history
    has_system = any(message.role in ("system", "developer") for message in asked.messages)
    chat = server.conversation(dialog.personality[:MAX_PERSONA] if has_system else None, asked.seed)
    chat.resume(history[-chat.n_history :])
    limit = asked.max_completion_tokens or asked.max_tokens
    settings = {"temperature": asked.temperature, "top_p": asked.top_p, "max_length": limit}
    for name, value in settings.items():
        if value is not None:  # 0 means the likeliest there, and no filter or an error here
            chat.decoding = chat.decoding.changed(name, str(max(value, 1e-6) if name != "max_length" else value))
    if asked.temperature is not None:
        chat.decoding = replace(chat.decoding, no_sample=False)
    chat.decoding = replace(chat.decoding, n_replies=max(n, chat.decoding.n_replies))
    return chat, check_message(text), n


def choices(chat: Conversation, text: str, n: int, stopped: Callable[[], bool]) -> Iterator[tuple]:
    """In the worker: (choice, piece of its text, how it finished or None), at last the usage."""
    generation = chat.generation(*chat.tokenizer.encode([text]))
    shown = [""] * n
    for (drawn,) in generation:
        if stopped():
            return
        for i, reply in enumerate(drawn) if len(drawn) == n else ():  # else the best are known at the end only
            start = chat.tokenizer.decode_start(reply.tokens)
            yield i, start[len(shown[i]) :], None
            shown[i] = start
    (ranked,), (drawn,) = generation.finish(), generation.replies
    given = drawn if len(drawn) == n else ranked[:n]
    for i, reply in enumerate(given):
        yield i, chat.tokenizer.decode(reply.tokens)[len(shown[i]) :], "stop" if reply.complete else "length"
    prompt, completion = len(generation.prefixes[0][0]), sum(len(reply.tokens) for reply in given)
    yield {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}, None, None


def sse(data: dict) -> str:
    return f"data: {json.dumps(data)}\n\n"


async def stream_completion(job: Job, about: dict, n: int, with_usage: bool) -> AsyncIterator[str]:
    """The events of a streamed answer."""
    about = {**about, "object": "chat.completion.chunk"}
    try:
        for i in range(n):
            yield sse({**about, "choices": [{"index": i, "delta": {"role": "assistant", "content": ""}}]})
        async for index, piece, finish in job:
            if isinstance(index, dict):
                if with_usage:
                    yield sse({**about, "choices": [], "usage": index})
            elif piece or finish:
                delta = {"content": piece} if piece else {}
                yield sse({**about, "choices": [{"index": index, "delta": delta, "finish_reason": finish}]})
        yield "data: [DONE]\n\n"
    finally:
        job.gone.set()  # whoever reads no more needs no reply


async def whole_completion(job: Job, about: dict, n: int, request: Request) -> Response:
    """An answer at once; given up when the client is gone."""

    async def watch() -> None:
        while not await request.is_disconnected():
            await asyncio.sleep(0.2)
        job.gone.set()

    watching = asyncio.create_task(watch())
    texts, finished, usage = [""] * n, ["stop"] * n, None
    try:
        async for index, piece, finish in job:
            if isinstance(index, dict):
                usage = index
            else:
                texts[index], finished[index] = texts[index] + piece, finish
    finally:
        watching.cancel()
        job.gone.set()
    answers = [
        {"index": i, "message": {"role": "assistant", "content": texts[i]}, "finish_reason": finished[i]}
        for i in range(n)
    ]
    return JSONResponse({**about, "object": "chat.completion", "choices": answers, "usage": usage})


def api_routes(server: Server) -> list[Route]:
    """/v1/chat/completions and /v1/models, as OpenAI's clients expect them."""

    async def complete(request: Request) -> Response:
        try:
            asked = await read_request(request)
            chat, text, n = await asyncio.to_thread(requested, server, asked)
            job = server.worker.submit(lambda stopped: choices(chat, text, n, stopped))
        except UserError as error:
            return api_error(400, str(error))
        except Busy as error:
            return api_error(429, str(error))
        name = asked.model or server.name
        about = {
            "id": f"chatcmpl-{random.SystemRandom().getrandbits(64):016x}",
            "created": int(time.time()),
            "model": name,
        }
        if not asked.stream:
            return await whole_completion(job, about, n, request)
        with_usage = asked.stream_options is not None and asked.stream_options.include_usage
        return StreamingResponse(stream_completion(job, about, n, with_usage), media_type="text/event-stream")

    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": server.name, "object": "model", "owned_by": "local"}]})

    return [Route("/v1/chat/completions", complete, methods=["POST"]), Route("/v1/models", models)]


# ------------------------------------------------------------------------------------------------------------
# The page
# ------------------------------------------------------------------------------------------------------------

CSS = """
.gradio-container { max-width: 1200px !important; margin: auto; }
#alternatives td { white-space: normal; }
@media (max-width: 640px) { #chat { height: 60vh !important; } .gradio-container { padding: 8px !important; } }
"""
SLIDERS = {name: option.metadata for name, option in Decoding.options().items() if option.metadata["slider"]}


class Session:
    """One open page: its conversation, and the reply that it waits for."""

    def __init__(self, server: Server):
        self.server, self.chat = server, server.conversation()
        self.job: Job | None = None

    def stop(self) -> None:
        if self.job is not None:
            self.job.gone.set()

    def bubbles(self, turn: tuple[str, str] | None = None, again: bool = False) -> list[dict]:
        """What the page shows: what was said, and a turn that is not finished, which replaces the last with `again`."""
        shown = self.chat.record()["messages"][: -2 if again else None]
        shown += [
            {"role": role, "content": text} for role, text in zip(("user", "assistant"), turn or (), strict=False)
        ]
        return [{**message, "content": html.escape(message["content"], quote=False)} for message in shown]

    def alternatives(self) -> list[list]:
        """The rows of the table under the chat."""
        candidates = self.chat.turns[-1].candidates if self.chat.turns else []
        return [[text, round(r.mc_score, 2), round(r.token_log_likelihood, 2)] for text, r in candidates]

    async def answer(self, text: str, persona: str, options: dict, again: bool) -> AsyncIterator[str]:
        """The reply to `text` as it grows; with `again` in the place of the last one. Raises UserError, Busy."""
        if self.job is not None:
            raise UserError("a reply is being written; wait for it or stop it")
        sentences = [line.strip() for line in persona.splitlines() if line.strip()]
        if len(sentences) > MAX_PERSONA:
            raise UserError(f"the persona has {len(sentences)} sentences; expected at most {MAX_PERSONA}")
        sentences = [check_message(sentence) for sentence in sentences]
        decoding = self.server.decoding
        if options["n_replies"] > 1:
            decoding = replace(decoding, no_sample=False)
        for name, value in options.items():
            decoding = decoding.changed(name, str(value))

        def work(stopped: Callable[[], bool]) -> Iterator[str]:  # the only place where a conversation changes
            self.chat.decoding = decoding
            if self.chat.persona != sentences:
                self.chat.persona = sentences
            if again:
                self.chat.turns.pop()
            yield from self.chat.stream(text, stopped)

        self.job = self.server.worker.submit(work)
        reply = ""
        try:
            async for piece in self.job:
                reply += piece
                yield reply
        finally:
            self.job.gone.set()
            self.job = None


def page(server: Server, folder: Path) -> gr.Blocks:
    """The chat page. folder: where transcripts to download are written."""
    sessions: dict[str, Session] = {}

    def session(request: gr.Request) -> Session:
        return sessions.setdefault(request.session_hash, Session(server))

    def leave(request: gr.Request) -> None:
        if (left := sessions.pop(request.session_hash, None)) is not None:
            left.stop()
        (folder / f"chat-{request.session_hash}.jsonl").unlink(missing_ok=True)

    def transcript(request: gr.Request) -> str | None:
        """The conversation as a file of training data."""
        path = folder / f"chat-{request.session_hash}.jsonl"
        path.write_text(json.dumps(session(request).chat.record(), ensure_ascii=False) + "\n", "utf-8", "replace")
        return str(path)

    async def answer(request: gr.Request, text: str, again: bool, persona: str, options: tuple):
        """Yields (message box, bubbles, alternatives, transcript); after a mistake the text stays in the box."""
        own, keep = session(request), gr.skip() if again else text
        turns = len(own.chat.turns)
        try:
            text = check_message(text)
            before = own.bubbles(again=again)
            async for reply in own.answer(text, persona, dict(zip([*SLIDERS, "rerank"], options, strict=True)), again):
                yield "", before + own.bubbles((text, reply or "…"))[-2:], gr.skip(), gr.skip()
        except (UserError, Busy) as error:
            gr.Warning(str(error), title="")
            yield keep, own.bubbles(), own.alternatives(), gr.skip()
            return
        kept = len(own.chat.turns) > turns or again
        yield gr.skip() if kept else keep, own.bubbles(), own.alternatives(), transcript(request)

    async def send(request: gr.Request, text: str, persona: str, *options):
        async for shown in answer(request, text, False, persona, options):
            yield shown

    async def retry(request: gr.Request, persona: str, *options):
        own = session(request)
        if not own.chat.turns:
            gr.Info("There is no message yet.", title="")
            return
        async for shown in answer(request, own.chat.turns[-1].text, True, persona, options):
            yield shown

    def undo(request: gr.Request):
        own = session(request)
        if own.job is not None or not own.chat.turns:
            gr.Info("Wait for the reply, or stop it." if own.job else "There is no message yet.", title="")
            return gr.skip(), own.bubbles(), own.alternatives(), gr.skip()
        return own.chat.turns.pop().text, own.bubbles(), own.alternatives(), transcript(request)

    def reset(request: gr.Request):
        own = sessions.pop(request.session_hash, None)
        if own is not None:
            own.stop()
        return "", [], [], None

    def stop(request: gr.Request) -> None:
        session(request).stop()

    def draw_persona() -> str:
        try:
            return "\n".join(random.choice(server.dialogs.personas))
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error

    with gr.Blocks(title="Chat with a persona", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        gr.Markdown("# Chat with a persona")
        with gr.Row():
            with gr.Column(scale=3, min_width=300):
                chat = gr.Chatbot(
                    elem_id="chat", label="Conversation", height="65vh", render_markdown=False, buttons=[]
                )
                with gr.Row():
                    box = gr.Textbox(
                        placeholder="Type a message", label="Message", show_label=False, autofocus=True,
                        submit_btn=True, lines=1, max_lines=6, elem_id="message",
                    )  # fmt: skip
                with gr.Row():
                    names = ["Another reply", "Undo", "Stop", "New chat"]
                    again, back, halt, new = (gr.Button(name, size="sm", min_width=90) for name in names)
                    download = gr.DownloadButton("Transcript", size="sm", min_width=90)
                with gr.Accordion("Alternatives of the last reply, best first", open=False):
                    table = gr.Dataframe(
                        headers=["Reply", "Head", "Likelihood"], datatype=["str", "number", "number"],
                        interactive=False, wrap=True, show_label=False, elem_id="alternatives",
                        column_count=3, column_widths=["70%", "15%", "15%"],
                    )  # fmt: skip
            with gr.Column(scale=1, min_width=260):
                persona = gr.Textbox(
                    "\n".join(server.persona), label="Persona of the bot: a sentence in each line", lines=6,
                    max_lines=12, elem_id="persona",
                )  # fmt: skip
                drawn = gr.Button("Random persona", size="sm")
                with gr.Accordion("How replies are drawn", open=False):
                    values = asdict(server.decoding)
                    options = []
                    for name, about in SLIDERS.items():
                        low, high, step = about["slider"]
                        value = min(max(values[name], low), high)
                        label = name.replace("_", " ").capitalize()
                        options.append(gr.Slider(low, high, value, step=step, label=label, info=about["help"]))
                    ways = [("head", "mc"), ("likelihood", "lm"), ("both", "both")]
                    options.append(gr.Radio(ways, value=server.decoding.rerank, label="Best reply by"))
        shown = [box, chat, table, download]
        hidden = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": None}
        box.submit(send, [box, persona, *options], shown, **hidden)
        again.click(retry, [persona, *options], shown, **hidden)
        back.click(undo, None, shown, **hidden)
        halt.click(stop, None, None, **hidden)
        gr.on([new.click, chat.clear], reset, None, shown, **hidden)
        drawn.click(draw_persona, None, persona, **hidden)
        blocks.unload(leave)
    return blocks


def serve(settings, web, model, tokenizer, dialogs: Dialogs, persona: list[str], decoding: Decoding, seed: int) -> None:
    """Serve page and endpoint until Ctrl-C. settings, web: interact.py's."""
    about = (settings.max_history, seed, settings.model, dialogs)
    server = Server(model, tokenizer, persona, decoding, *about, Worker(web.max_queue))
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["monospace"]}  # by name: none is fetched
    with tempfile.TemporaryDirectory() as folder:
        blocks = page(server, Path(folder)).queue(max_size=None, default_concurrency_limit=None)
        try:
            _, url, shared = blocks.launch(
                server_name=web.host, server_port=web.port or None, share=web.share, prevent_thread_lock=True,
                quiet=True, footer_links=[], allowed_paths=[folder], ssr_mode=False, theme=gr.themes.Default(**fonts),
                css=CSS, app_kwargs={"routes": api_routes(server)},
            )  # fmt: skip
        except OSError as error:
            raise UserError(
                f"cannot listen at {web.host}:{web.port}: {first_line(error)}; try another --port"
            ) from error
        log.info(f"Chat page: {url}" + (f" and, for everyone, {shared}" if shared else ""))
        log.info(f"OpenAI-compatible endpoint: {url}v1")
        try:
            threading.Event().wait()
        finally:
            blocks.close()
