"""Replies for many at once, and OpenAI's chat completions made of them. Nothing of HTTP: that is web.py's.

One worker thread computes the replies that are asked for, those that overlap as rows of one batch. Whoever asked only
waits for text, so conversations are never mixed, and a slow or vanished client never holds the model.
"""

import asyncio
import contextlib
import itertools
import json
import math
import random
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace

import msgspec

from cli import UserError, first_line, log
from conversation import Conversation
from dialogs import MAX_MESSAGE, Dialogs, check_message
from formats import decode
from generation import Generation, PrefixCache, Reply
from inputs import utterances_shown
from options import LARGEST, Decoding
from records import NO_JSON
from turns import joined_turns, split_sentences

MAX_CHOICES = 16
MAX_STOPS = 64
MAX_PERSONA = 100_000  # characters
MAX_ROWS = 32  # replies in a batch
MAX_DRAWN = 16_384  # tokens that may be drawn in a batch: its memory grows with them
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
# What is wanted, and how far it is
# ------------------------------------------------------------------------------------------------------------


class Unavailable(Exception):
    """A reply cannot be had. status: HTTP's; retry_after: seconds after which it may."""

    def __init__(self, status: int, message: str, retry_after: int | None = None):
        super().__init__(message)
        self.status, self.retry_after = status, retry_after


def stopping() -> Unavailable:
    return Unavailable(503, "the server is stopping")


@dataclass
class Ask:
    """What a reply is wanted to. Data only, so that the worker can see what may be computed together."""

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
    candidates: dict[str, Reply] = field(default_factory=dict)  # at the end: what the best was chosen from, best first
    usage: dict[str, int] = field(default_factory=dict)  # at the end: numbers of tokens
    warning: str = ""  # at the end: what of the request the model did not see


class Job:
    """A reply that is waited for: an async iterator of its `Progress`. Leaving its context gives the reply up."""

    def __init__(self, ask: Ask):
        self.ask, self.over = ask, False
        self.steps: asyncio.Queue = asyncio.Queue()
        self.loop = asyncio.get_running_loop()

    def put(self, step: Progress | Exception) -> None:
        """Hand a step to the waiting side's event loop, from the worker thread. An exception is raised there."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server is going down
            self.loop.call_soon_threadsafe(self.steps.put_nowait, step)

    def end(self, error: Exception | None = None) -> None:
        """Tell the waiting side that nothing more comes; once, and to nobody that has left."""
        if not self.over:
            self.put(error or StopAsyncIteration())
        self.over = True

    def __aiter__(self) -> "Job":
        return self

    async def __anext__(self) -> Progress:
        step = await self.steps.get()
        if isinstance(step, Exception):
            raise step
        return step

    async def newest(self) -> Progress:
        """The newest step, which holds what those before it did. Raises StopAsyncIteration at the end."""
        step = await anext(self)
        while not self.steps.empty():
            later = self.steps.get_nowait()
            if isinstance(later, Exception):  # the last one there is: for the next call
                self.steps.put_nowait(later)
                break
            step = later
        return step

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_) -> None:
        self.over = True


class Writing:
    """The replies of an `Ask` as token ids, and the texts of what is drawn of them."""

    def __init__(self, chat: Conversation, ask: Ask):
        self.ask, self.tokenizer = ask, chat.tokenizer
        *history, text = ask.dialog
        chat.resume(history[-chat.n_history :])
        message, self.begun = self.tokenizer.encode([text, ask.begun])
        self.n_begun = len(self.tokenizer.decode(self.begun))  # characters
        self.generation = chat.generation(message, self.begun)
        self.truncated, self.warning = chat.truncated, chat.truncation
        # The best of more replies than are wanted are known at the end only.
        self.ranked = ask.decoding.n_replies > ask.n
        self.done = False  # no reply grows any more

    def tell(self, job: Job, replies: list[Reply]) -> None:
        """Say how far the replies are; also their end, where it need not be waited for the others of the batch."""
        texts, stopped = self.texts(replies, self.tokenizer.decode_start)
        decoding = self.generation.decoding
        self.done = all(end or not reply.can_grow(decoding) for reply, end in zip(replies, stopped, strict=True))
        if self.done and not self.ranked:
            self.tell_end(job, replies)
        elif not self.done:
            texts = [""] * self.ask.n if self.ranked else [certain(text, self.ask.stop) for text in texts]
            job.put(Progress(texts, [None] * self.ask.n))

    def tell_end(self, job: Job, replies: list[Reply]) -> None:
        """Say the first `n` replies, which are whole. replies: all that were drawn, ranked where there are more."""
        given = replies[: self.ask.n]
        texts, stopped = self.texts(given, self.tokenizer.decode)
        finished = ["stop" if end or reply.complete else "length" for reply, end in zip(given, stopped, strict=True)]
        candidates: dict[str, Reply] = {}
        for reply in replies if self.ranked else ():
            candidates.setdefault(self.tokenizer.decode(reply.tokens), reply)
        prompt, completion = len(self.generation.prefixes[0][0]), sum(len(reply.tokens) for reply in given)
        usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        job.put(Progress(texts, finished, candidates, usage, self.warning))
        job.end()

    def texts(self, replies: list[Reply], decode: Callable[[list[int]], str]) -> tuple[list[str], list[bool]]:
        """The text of each after what was begun, up to a stop sequence, and whether there is one."""
        whole = (decode([*self.begun, *reply.tokens])[self.n_begun :] for reply in replies)
        ends = [cut(text, self.ask.stop) for text in whole]
        return [text for text, _ in ends], [stopped for _, stopped in ends]


def cut(text: str, stops: tuple[str, ...]) -> tuple[str, bool]:
    """A text up to the first stop sequence in it, and whether there is one."""
    end = min((place for stop in stops if (place := text.find(stop)) >= 0), default=None)
    return text[:end], end is not None


def certain(text: str, stops: tuple[str, ...]) -> str:
    """A text without an end that may be the beginning of a stop sequence: what can be shown already."""
    held = (length for stop in stops for length in range(1, len(stop)) if text.endswith(stop[:length]))
    return text[: len(text) - max(held, default=0)]


# ------------------------------------------------------------------------------------------------------------
# The worker
# ------------------------------------------------------------------------------------------------------------


class Worker:
    """Computes replies in a thread of its own: those that wait and are drawn alike together, as rows of one batch.

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
        self.truncated: set[str] = set()  # parts of requests that a warning was logged of
        self.closed = False
        self.seconds = 1.0  # that the last batch took
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def check_room(self) -> None:
        """Raise Unavailable where no more replies may wait."""
        with self.changed:
            if self.closed:
                raise stopping()
            if len(self._still_waiting()) >= self.max_queue:
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
        """The number of replies that were asked for before this one and are not written yet; 0 once this one is."""
        with self.changed:
            waiting = self._still_waiting()
            return waiting.index(job) + 1 if job in waiting else 0

    def close(self) -> None:
        """Give up all replies. Nothing is computed any more once this returns."""
        with self.changed:
            self.closed = True
            self.changed.notify()
        self.thread.join()

    def _work(self) -> None:
        while jobs := self._next_jobs():
            start = time.monotonic()
            try:
                self._run(jobs)
                failure = stopping()
            except Exception as error:  # a bug, or a full GPU: the worker goes on with the next jobs
                log.exception("a reply failed")
                failure = Unavailable(500, f"the reply failed: {first_line(error)}")
            for job in jobs:
                job.end(failure)
            self.seconds = time.monotonic() - start
            if len(jobs) > 1:  # those who were answered together, and ask again, are waited for a little
                time.sleep(min(0.05, self.seconds / 20))
        for job in self.waiting:
            job.end(stopping())

    def _next_jobs(self) -> list[Job]:
        """Wait for the next job; it, and those that can be computed with it. None once the worker is closed."""
        with self.changed:
            self.changed.wait_for(lambda: self._still_waiting() or self.closed)
            if self.closed:
                return []
            decoding = self.waiting[0].ask.decoding
            rows = min(MAX_ROWS, MAX_DRAWN // min(decoding.max_length, self.model.limit))
            jobs = [job for job in self.waiting if job.ask.decoding == decoding][: max(1, rows // decoding.n_replies)]
            self.waiting = [job for job in self.waiting if job not in jobs]
            return jobs

    def _still_waiting(self) -> list[Job]:
        """The queue, without those that nobody waits for any more."""
        self.waiting = [job for job in self.waiting if not job.over]
        return self.waiting

    def _run(self, jobs: list[Job]) -> None:
        """Draw a token of every reply at a time, for as long as anybody waits for one."""
        writings = [self._writing(job.ask) for job in jobs]
        generation = joined([writing.generation for writing in writings])
        for drawn in generation:
            for job, writing, replies in zip(jobs, writings, drawn, strict=True):
                if not job.over:
                    writing.tell(job, replies)
            if self.closed:
                return
            if all(job.over or writing.done for job, writing in zip(jobs, writings, strict=True)):
                break
        if len(jobs) == 1 or not all(job.over for job in jobs):  # alone: also to keep its prefix for the next turn
            for job, writing, replies in zip(jobs, writings, generation.finish(), strict=True):
                if not job.over:
                    writing.tell_end(job, replies)

    def _writing(self, ask: Ask) -> Writing:
        seed = (next(self.seeds) if ask.seed is None else ask.seed) % 2**63
        settings = ask.decoding, self.max_history, seed, self.prefix_cache
        writing = Writing(Conversation(self.model, self.tokenizer, ask.persona, *settings), ask)
        if not self.truncated.issuperset(writing.truncated):  # of each part once, as the terminal does
            log.warning(f"warning: {writing.warning}")
            self.truncated.update(writing.truncated)
        return writing


def joined(generations: list[Generation]) -> Generation:
    """The generations of a prefix each, which draw alike, as one. Each reply keeps its own generator of chance."""
    first, *others = generations
    if not others:
        return first
    prefixes = [prefix for each in generations for prefix in each.prefixes]
    return Generation(first.model, prefixes, first.decoding, [each.rows[0].generator for each in generations])


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


def read_request(body: bytes) -> ChatRequest:
    """A request from its JSON. Raises UserError."""
    try:
        fields = decode(body)
        for name, neutral in UNSUPPORTED.items():
            if fields.get(name) is not None and fields[name] not in neutral:
                raise UserError(f"{name} is not supported; leave it out")
        request = msgspec.convert(fields, ChatRequest, strict=False)  # 16.0 is whole: some libraries know no other
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
    told = [(message.role, text_of(message)) for message in request.messages]
    for role in {role for role, _ in told} - {"system", "developer", "user", "assistant", "tool", "function"}:
        raise UserError(f"messages: expected role system, user, assistant or tool, found {role[:40]!r}")
    systems = [text for role, text in told if role in ("system", "developer")]
    if sum(map(len, systems)) > MAX_PERSONA:
        raise UserError(f"messages: expected at most {MAX_PERSONA} characters of the role system, so shorten them")
    persona = split_sentences("\n".join(systems)) if systems else bot.persona
    turns = [turn for turn in told if turn[0] in ("user", "assistant") and turn[1].strip()]
    dialog = [(role, text) for role, text, _ in joined_turns(turns)]
    begun = check_message(dialog.pop()[1]) if dialog and dialog[-1][0] == "assistant" else ""
    if not dialog:
        raise UserError("messages: expected one of the user that is not empty")
    *history, message = [text for _, text in dialog[-utterances_shown(bot.max_history) :]]
    decoding = asked_decoding(request, bot.decoding)
    seed = None if request.seed == -1 else request.seed  # -1 is any, as in llama.cpp's server
    dialog = [*history, check_message(message)]
    return Ask(persona, dialog, decoding, seed, request.n or 1, begun, asked_stops(request))


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
        {
            "index": i,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": None,
            "finish_reason": reason,
        }
        for i, (text, reason) in enumerate(zip(end.texts, end.finished, strict=True))
    ]
    return {**about(model), "object": "chat.completion", "choices": choices, "usage": end.usage} | warning(end)


async def completion_events(job: Job, model: str, with_usage: bool) -> AsyncIterator[str]:
    """The answer piece by piece, as server-sent events. An error is one too, since the answer has begun."""
    head = {**about(model), "object": "chat.completion.chunk"}

    def event(i: int, delta: dict, reason: str | None = None, **more) -> str:
        choices = [{"index": i, "delta": delta, "finish_reason": reason}]
        return sse({**head, "choices": choices, **({"usage": None} if with_usage else {}), **more})

    with job:  # whoever reads no more needs no reply
        shown = [""] * job.ask.n
        for i in range(job.ask.n):
            yield event(i, {"role": "assistant", "content": ""})
        try:
            async for step in job:
                for i, (text, reason) in enumerate(zip(step.texts, step.finished, strict=True)):
                    piece, shown[i] = text[len(shown[i]) :], text
                    if piece or reason:
                        yield event(i, {"content": piece} if piece else {}, reason, **warning(step))
                if step.usage and with_usage:
                    yield sse({**head, "choices": [], "usage": step.usage})
        except Unavailable as error:
            yield sse(error_answer(error.status, str(error)))
        yield "data: [DONE]\n\n"


def warning(step: Progress) -> dict[str, str]:
    """What the model did not see of the request, in a field of its own beside OpenAI's."""
    return {"warning": step.warning} if step.warning else {}


def sse(data: dict) -> str:
    return f"data: {json.dumps(data)}\n\n"
