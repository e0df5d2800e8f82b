"""Replies for many at once, and OpenAI's chat completions made of them. Nothing of HTTP: that is web.py's.

One worker thread computes replies in the order in which they were asked for. Whoever asked only waits for text, so
conversations are never mixed, and a slow or vanished client never holds the model.
"""

import asyncio
import contextlib
import itertools
import json
import random
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace

import msgspec

from cli import Decoding, UserError, first_line
from conversation import Conversation
from dialogs import Dialogs, check_message
from generation import PrefixCache, Reply
from records import NO_JSON, dialog_of

MAX_PERSONA = 50  # sentences
MAX_CHOICES = 16
KEPT_PREFIXES = 8  # conversations whose keys and values stay in memory


@dataclass
class Bot:
    """Who is talked to, where a request says nothing else."""

    name: str  # of the model
    persona: list[str]
    decoding: Decoding
    max_history: int  # exchanges that the model sees
    seed: int
    dialogs: Dialogs  # where other personas are drawn from


# ------------------------------------------------------------------------------------------------------------
# Replies, one after the other
# ------------------------------------------------------------------------------------------------------------


class Busy(Exception):
    """Too many replies are waited for."""


@dataclass
class Ask:
    """What a reply is wanted to. Data only, so that a worker can see what waits and may compute it together."""

    persona: list[str]
    dialog: list[str]  # utterances, oldest first; the last one is the other person's
    decoding: Decoding
    seed: int | None = None  # None: another one each time
    n: int = 1  # replies wanted: the best of the decoding.n_replies that are drawn


@dataclass
class Progress:
    """How far the wanted replies are."""

    texts: list[str]
    finished: list[str | None]  # OpenAI's finish reason of each: None while it is written, "stop" or "length"
    candidates: dict[str, Reply] = field(default_factory=dict)  # at the end: all that were drawn, best first
    usage: dict[str, int] | None = None  # at the end: numbers of tokens


class Job:
    """A reply that is waited for: an async iterator of its `Progress`. Leaving its context gives the reply up."""

    def __init__(self, ask: Ask):
        self.ask, self.gone = ask, threading.Event()
        self.steps: asyncio.Queue = asyncio.Queue()
        self.loop = asyncio.get_running_loop()

    def put(self, step: Progress | Exception) -> None:
        """Hand a step to the waiting side's event loop, from the worker thread. An exception is raised there."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server is going down
            self.loop.call_soon_threadsafe(self.steps.put_nowait, step)

    def __aiter__(self) -> "Job":
        return self

    async def __anext__(self) -> Progress:
        step = await self.steps.get()
        if isinstance(step, Exception):
            raise step
        return step

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_) -> None:
        self.gone.set()


class Worker:
    """Computes replies in a thread of its own.

    Args:
        max_history: exchanges that the model sees.
        seed: of the replies whose `Ask` names none.
        max_queue: replies that may wait.
    """

    def __init__(self, model, tokenizer, max_history: int, seed: int, max_queue: int):
        self.model, self.tokenizer, self.max_history = model, tokenizer, max_history
        self.seeds, self.max_queue = itertools.count(seed), max_queue
        self.prefix_cache = PrefixCache(KEPT_PREFIXES)
        self.waiting: list[Job] = []
        self.changed = threading.Condition()
        threading.Thread(target=self._work, daemon=True).start()

    def submit(self, ask: Ask) -> Job:
        """Put a reply at the queue's end. Raises Busy."""
        job = Job(ask)
        with self.changed:
            self.waiting = [other for other in self.waiting if not other.gone.is_set()]
            if len(self.waiting) >= self.max_queue:
                raise Busy(f"{self.max_queue} replies are waited for already; try again in a moment")
            self.waiting.append(job)
            self.changed.notify()
        return job

    def _work(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting)
                job = self.waiting.pop(0)
            self._run(job)

    def _run(self, job: Job) -> None:
        end: Exception = StopAsyncIteration()
        try:
            for step in () if job.gone.is_set() else self._replies(job.ask):
                if job.gone.is_set():
                    break
                job.put(step)
        except Exception as error:  # the waiting side raises it; the worker goes on with the next job
            end = error
        job.put(end)

    def _replies(self, ask: Ask) -> Iterator[Progress]:
        """The replies as they grow: a step for every token. The only place that knows how replies are drawn."""
        seed = (next(self.seeds) if ask.seed is None else ask.seed) % 2**63
        settings = ask.decoding, self.max_history, seed, self.prefix_cache
        chat = Conversation(self.model, self.tokenizer, ask.persona, *settings)
        *history, text = ask.dialog
        chat.resume(history[-chat.n_history :])
        generation = chat.generation(*self.tokenizer.encode([text]))
        for (drawn,) in generation:
            # The best of more replies than are wanted are known at the end only.
            starts = [self.tokenizer.decode_start(reply.tokens) for reply in drawn] if len(drawn) == ask.n else []
            yield Progress(starts or [""] * ask.n, [None] * ask.n)
        (ranked,), (drawn,) = generation.finish(), generation.replies
        given = drawn if len(drawn) == ask.n else ranked[: ask.n]
        candidates: dict[str, Reply] = {}
        for reply in ranked:
            candidates.setdefault(self.tokenizer.decode(reply.tokens), reply)
        texts = [self.tokenizer.decode(reply.tokens) for reply in given]
        finished = ["stop" if reply.complete else "length" for reply in given]
        prompt, completion = len(generation.prefixes[0][0]), sum(len(reply.tokens) for reply in given)
        usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        yield Progress(texts, finished, candidates, usage)


# ------------------------------------------------------------------------------------------------------------
# OpenAI's requests
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


def read_request(body: bytes) -> ChatRequest:
    """A request from its JSON. Raises UserError."""
    try:
        return msgspec.json.decode(body, type=ChatRequest)
    except NO_JSON as error:
        raise UserError(f"not a chat completion request: {first_line(error)}") from error


def asked_reply(request: ChatRequest, persona: list[str], decoding: Decoding) -> Ask:
    """What a request asks for. Raises UserError.

    Args:
        persona, decoding: what holds where the request says nothing.
    """
    n = 1 if request.n is None else request.n
    if not 1 <= n <= MAX_CHOICES:
        raise UserError(f"n: expected 1 to {MAX_CHOICES}, found {n}")
    if not request.messages or request.messages[-1].role != "user":
        raise UserError("messages: expected the last one to have the role user")
    messages = []
    for message in request.messages:
        parts = message.content
        text = parts if isinstance(parts, str) else " ".join(part.text for part in parts)
        if message.role not in ("system", "developer", "user", "assistant"):
            raise UserError(f"messages: expected role system, user or assistant, got {message.role[:40]}")
        messages.append({"role": message.role, "content": text})
    check_message(messages[-1]["content"])
    # With a reply to come, as if it were a dialog to train on.
    dialog = dialog_of({"messages": [*messages, {"role": "assistant", "content": "..."}]})
    *history, text = dialog.utterances[-1].history
    if any(message.role in ("system", "developer") for message in request.messages):
        persona = dialog.personality[:MAX_PERSONA]
    return Ask(persona, [*history, check_message(text)], asked_decoding(request, decoding, n), request.seed, n)


def asked_decoding(request: ChatRequest, decoding: Decoding, n: int) -> Decoding:
    """How the request wants `n` replies to be drawn. Raises UserError."""
    if request.temperature is not None:
        decoding = replace(decoding, no_sample=False)
    limit = request.max_completion_tokens or request.max_tokens
    settings = {"temperature": request.temperature, "top_p": request.top_p, "max_length": limit}
    for name, value in settings.items():
        if value is not None:  # 0 means the likeliest there, and no filter or an error here
            decoding = decoding.changed(name, str(max(value, 1e-6) if name != "max_length" else value))
    return replace(decoding, n_replies=max(n, decoding.n_replies))


# ------------------------------------------------------------------------------------------------------------
# OpenAI's answers
# ------------------------------------------------------------------------------------------------------------


def about(model: str) -> dict:
    """What every part of one answer says of itself."""
    name = f"chatcmpl-{random.SystemRandom().getrandbits(64):016x}"
    return {"id": name, "created": int(time.time()), "model": model}


async def completion(job: Job, model: str) -> dict:
    """The whole answer."""
    with job:
        async for step in job:
            end = step
    choices = [
        {"index": i, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
        for i, (text, reason) in enumerate(zip(end.texts, end.finished, strict=True))
    ]
    return {**about(model), "object": "chat.completion", "choices": choices, "usage": end.usage}


async def completion_events(job: Job, model: str, with_usage: bool) -> AsyncIterator[str]:
    """The answer piece by piece, as server-sent events."""
    head = {**about(model), "object": "chat.completion.chunk"}

    def event(choices: list[dict], **more) -> str:
        return f"data: {json.dumps({**head, 'choices': choices, **more})}\n\n"

    with job:  # whoever reads no more needs no reply
        shown = [""] * job.ask.n
        for i in range(job.ask.n):
            yield event([{"index": i, "delta": {"role": "assistant", "content": ""}}])
        async for step in job:
            for i, (text, reason) in enumerate(zip(step.texts, step.finished, strict=True)):
                piece, shown[i] = text[len(shown[i]) :], text
                if piece or reason:
                    delta = {"content": piece} if piece else {}
                    yield event([{"index": i, "delta": delta, "finish_reason": reason}])
            if step.usage and with_usage:
                yield event([], usage=step.usage)
        yield "data: [DONE]\n\n"
