"""Replies for many at once, and OpenAI's chat completions made of them. Nothing of HTTP: that is web.py's.

One worker thread computes replies in the order in which they were asked for. Whoever asked only waits for text, so
conversations are never mixed, and a slow or vanished client never holds the model.
"""

import asyncio
import contextlib
import itertools
import json
import math
import random
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from cli import LARGEST, Decoding, UserError, first_line, log
from dialogs import MAX_MESSAGE, Dialogs, check_message
from generation import Conversation, PrefixCache, Reply
from records import NO_JSON, split_sentences

MAX_CHOICES = 16
MAX_STOPS = 64
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


class Unavailable(Exception):
    """A reply cannot be had. status: HTTP's; retry_after: seconds after which it may."""

    def __init__(self, status: int, message: str, retry_after: int | None = None):
        super().__init__(message)
        self.status, self.retry_after = status, retry_after


@dataclass
class Ask:
    """What a reply is wanted to. Data only, so that a worker can see what waits and may compute it together."""

    persona: list[str]
    dialog: list[str]  # utterances, oldest first; the last one is the other person's
    decoding: Decoding
    seed: int | None = None  # None: another one each time
    n: int = 1  # replies wanted: the best of the decoding.n_replies that are drawn
    begun: str = ""  # how the replies begin
    stop: tuple[str, ...] = ()  # a reply ends before the first of these texts


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
        self.closed = False
        self.seconds = 1.0  # that the last reply took
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def check_room(self) -> None:
        """Raise Unavailable where no more replies may wait."""
        with self.changed:
            self.waiting = [job for job in self.waiting if not job.gone.is_set()]
            if self.closed:
                raise Unavailable(503, "the server is stopping")
            if len(self.waiting) >= self.max_queue:
                message = f"{self.max_queue} replies are waited for already; try again in a moment"
                raise Unavailable(429, message, max(1, math.ceil(self.seconds)))

    def submit(self, ask: Ask) -> Job:
        """Put a reply at the queue's end. Raises Unavailable."""
        job = Job(ask)
        with self.changed:
            self.check_room()
            self.waiting.append(job)
            self.changed.notify()
        return job

    def ahead(self, job: Job) -> int:
        """The number of replies that are computed before this one."""
        with self.changed:
            waiting = [other for other in self.waiting if not other.gone.is_set()]
            return waiting.index(job) + 1 if job in waiting else 0

    def close(self) -> None:
        """Give up all replies. Nothing is computed any more once this returns."""
        with self.changed:
            self.closed = True
            self.changed.notify()
        self.thread.join()

    def _work(self) -> None:
        """The one place where jobs are taken and computed."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting or self.closed)
                if self.closed:
                    break
                job = self.waiting.pop(0)
            self._run(job)
        for job in self.waiting:
            job.put(Unavailable(503, "the server is stopping"))

    def _run(self, job: Job) -> None:
        start, end = time.monotonic(), StopAsyncIteration()
        try:
            for step in () if job.gone.is_set() else self._replies(job.ask):
                if job.gone.is_set() or self.closed:
                    end = Unavailable(503, "the server is stopping")
                    break
                job.put(step)
        except Exception as error:  # a bug, or a full GPU: the worker goes on with the next job
            log.exception("a reply failed")
            end = Unavailable(500, f"the reply failed: {first_line(error)}")
        job.put(end)
        self.seconds = time.monotonic() - start

    def _replies(self, ask: Ask) -> Iterator[Progress]:
        """The replies as they grow: a step for every token. The only place that knows how replies are drawn."""
        seed = (next(self.seeds) if ask.seed is None else ask.seed) % 2**63
        settings = ask.decoding, self.max_history, seed, self.prefix_cache
        chat = Conversation(self.model, self.tokenizer, ask.persona, *settings)
        *history, text = ask.dialog
        chat.resume(history[-chat.n_history :])
        message, begun = self.tokenizer.encode([text, ask.begun])
        begun_text = self.tokenizer.decode(begun)

        def written(replies: list[Reply], decode) -> tuple[list[str], list[bool]]:
            """The text of each after what was begun, up to a stop sequence, and whether there is one."""
            texts = [decode([*begun, *reply.tokens])[len(begun_text) :] for reply in replies]
            return tuple(zip(*(cut(text, ask.stop) for text in texts), strict=True))

        generation = chat.generation(message, begun)
        for (drawn,) in generation:
            texts, stopped = written(drawn, self.tokenizer.decode_start)
            # The best of more replies than are wanted are known at the end only.
            texts = [certain(text, ask.stop) for text in texts] if len(drawn) == ask.n else [""] * ask.n
            yield Progress(texts, [None] * ask.n)
            if all(stopped):
                break
        (ranked,), (drawn,) = generation.finish(), generation.replies
        given = drawn if len(drawn) == ask.n else ranked[: ask.n]
        candidates: dict[str, Reply] = {}
        for reply in ranked:
            candidates.setdefault(self.tokenizer.decode(reply.tokens), reply)
        texts, stopped = written(given, self.tokenizer.decode)
        finished = ["stop" if end or reply.complete else "length" for reply, end in zip(given, stopped, strict=True)]
        prompt, completion = len(generation.prefixes[0][0]), sum(len(reply.tokens) for reply in given)
        usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        yield Progress(list(texts), finished, candidates, usage)


def cut(text: str, stops: tuple[str, ...]) -> tuple[str, bool]:
    """A text up to the first stop sequence in it, and whether there is one."""
    end = min((place for stop in stops if (place := text.find(stop)) >= 0), default=None)
    return text[:end], end is not None


def certain(text: str, stops: tuple[str, ...]) -> str:
    """A text without an end that may be the beginning of a stop sequence: what can be shown already."""
    held = (length for stop in stops for length in range(1, len(stop)) if text.endswith(stop[:length]))
    return text[: len(text) - max(held, default=0)]


# ------------------------------------------------------------------------------------------------------------
# OpenAI's requests
# ------------------------------------------------------------------------------------------------------------


class ContentPart(msgspec.Struct):
    type: str = "text"
    text: str | None = None


class ChatMessage(msgspec.Struct):
    role: str
    content: str | list[ContentPart] | None = None


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class ChatRequest(msgspec.Struct):
    """The part of OpenAI's request that has a meaning here. A null is as good as nothing."""

    messages: list[ChatMessage]
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None  # this one and the next are what other local servers have besides
    repetition_penalty: float | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None


# The lowest and highest value, where they are not those of the option of the same name. 0 is the likeliest token.
BOUNDS = {"n": (1, MAX_CHOICES), "temperature": (0, 2), "top_p": (0, 1), "top_k": (-1, LARGEST)}
# What would change a reply and is not to be had, with the values that ask for nothing.
UNSUPPORTED = {
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto", "none"),
    "function_call": ("auto", "none"),
    "modalities": (["text"],),
    "audio": (),
    "min_p": (0,),
    "min_tokens": (0,),
    "typical_p": (1,),
    "mirostat": (0,),
    "grammar": ("",),
    "json_schema": ({},),
}


def number(text: str) -> float:
    """A JSON number with a point. One that is whole is a whole number: some libraries know no others."""
    value = float(text)
    return int(value) if value.is_integer() else value


def read_request(body: bytes) -> ChatRequest:
    """A request from its JSON. Raises UserError."""
    try:
        fields = msgspec.json.Decoder(dict[str, Any], float_hook=number).decode(body)
        for name, neutral in UNSUPPORTED.items():
            if fields.get(name) is not None and fields[name] not in neutral:
                raise UserError(f"{name} is not supported; leave it out")
        request = msgspec.convert(fields, ChatRequest)
    except NO_JSON as error:
        raise UserError(f"not a chat completion request: {first_line(error)}") from error
    for name, (low, high) in BOUNDS.items():
        value = getattr(request, name)
        if value is not None and not low <= value <= high:
            raise UserError(f"{name}: expected {low} to {high}, found {value}")
    return request


def asked_reply(request: ChatRequest, bot: Bot) -> Ask:
    """What a request asks for. Raises UserError.

    As in other local servers (llama.cpp's, ollama) a last message of the assistant is the beginning of the reply,
    and only its continuation is answered. Messages without text, and those of tools, are left out.
    """
    persona, turns = None, []
    for message in request.messages:
        text = text_of(message)
        if message.role in ("system", "developer"):
            persona = [*(persona or []), *split_sentences(text)]
        elif message.role in ("user", "assistant"):
            turns += [(message.role, text)] if text.strip() else []
        elif message.role not in ("tool", "function"):
            raise UserError(f"messages: expected role system, user, assistant or tool, found {message.role!r}")
    # Utterances alternate: two messages of one speaker in a row are one.
    spoken = itertools.groupby(turns, key=lambda turn: turn[0])
    dialog = [(role, " ".join(text for _, text in each)) for role, each in spoken]
    begun = dialog.pop()[1] if dialog and dialog[-1][0] == "assistant" else ""
    if not dialog:
        raise UserError("messages: expected one of the user that is not empty")
    texts = [text for _, text in dialog[-2 * bot.max_history - 1 :]]
    texts[-1] = check_message(texts[-1])
    if persona is None:
        persona = bot.persona
    decoding = asked_decoding(request, bot.decoding)
    return Ask(persona, texts, decoding, request.seed, request.n or 1, begun, asked_stops(request))


def text_of(message: ChatMessage) -> str:
    """The text of a message, whose content may have parts. Raises UserError where it is no text."""
    parts = message.content if isinstance(message.content, list) else [ContentPart(text=message.content)]
    for part in parts:
        if part.type != "text":
            raise UserError(f"messages: content of the type {part.type!r} is not supported; send text")
    return " ".join(part.text for part in parts if part.text)


def asked_stops(request: ChatRequest) -> tuple[str, ...]:
    """The stop sequences of a request. Raises UserError."""
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if len(stops) > MAX_STOPS or any(len(stop) > MAX_MESSAGE for stop in stops):
        raise UserError(f"stop: expected at most {MAX_STOPS} texts of at most {MAX_MESSAGE} characters")
    return tuple(stop for stop in stops if stop)


def asked_decoding(request: ChatRequest, decoding: Decoding) -> Decoding:
    """How a request wants replies to be drawn. Raises UserError."""
    limit = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    if limit is not None:  # 0 or less is as long as the model can, as in llama-cpp-python and ollama
        limit = min(limit, LARGEST) if limit > 0 else LARGEST
    changes = {
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "repetition_penalty": request.repetition_penalty,
        "max_length": limit,
        "n_replies": max(request.n or 1, decoding.n_replies),
    }
    changes = {name: value for name, value in changes.items() if value is not None}
    for name in changes.keys() & {"temperature", "top_p"}:  # 0 is the likeliest token; the options have no such value
        changes[name] = max(changes[name], 1e-6)
    if "temperature" in changes:
        changes["no_sample"] = False
    return replace(decoding, **changes)


# ------------------------------------------------------------------------------------------------------------
# OpenAI's answers
# ------------------------------------------------------------------------------------------------------------

ERROR_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


def error_answer(status: int, message: str) -> dict:
    kind = ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


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
    """The answer piece by piece, as server-sent events. An error is one too, since the answer has begun."""
    head = {**about(model), "object": "chat.completion.chunk"}

    def event(choices: list[dict], usage: dict | None = None) -> str:
        return sse({**head, "choices": choices} | ({"usage": usage} if with_usage else {}))

    with job:  # whoever reads no more needs no reply
        shown = [""] * job.ask.n
        for i in range(job.ask.n):
            yield event([{"index": i, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
        try:
            async for step in job:
                for i, (text, reason) in enumerate(zip(step.texts, step.finished, strict=True)):
                    piece, shown[i] = text[len(shown[i]) :], text
                    if piece or reason:
                        delta = {"content": piece} if piece else {}
                        yield event([{"index": i, "delta": delta, "finish_reason": reason}])
                if step.usage and with_usage:
                    yield event([], step.usage)
        except Unavailable as error:
            yield sse(error_answer(error.status, str(error)))
        yield "data: [DONE]\n\n"


def sse(data: dict) -> str:
    return f"data: {json.dumps(data)}\n\n"
