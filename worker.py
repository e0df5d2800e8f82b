"""Replies for many at once: those that overlap are rows of one batch, which one worker thread computes.

Whoever asked only waits for text, so conversations are never mixed, and a slow or vanished client never holds the
model.
"""

import asyncio
import contextlib
import itertools
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

from cli import first_line, log
from conversation import Conversation, distinct
from dialogs import Dialogs
from generation import Generation, PrefixCache, Reply
from model import DialogModel
from options import Decoding
from utils import DialogTokenizer

MAX_ROWS = 32  # replies in a batch
MAX_DRAWN = 16_384  # tokens that may be drawn in a batch: its memory grows with them
STOPPING = 503, "the server is stopping"
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


@dataclass
class Ask:
    """A request for replies to a dialog. Data only, so that the worker can see what may be computed together."""

    persona: list[str]
    dialog: list[str]  # utterances, oldest first; the last one is the other person's
    decoding: Decoding
    seed: int | None = None  # None: another one each time
    n: int = 1  # replies wanted: the best of the decoding.n_replies that are drawn
    begun: str = ""  # how the replies begin
    stop: tuple[str, ...] = ()  # a reply ends before the first of these texts


class Choice(NamedTuple):
    """A reply as far as it can be shown."""

    text: str
    finish_reason: str | None  # OpenAI's: "stop" or "length"; None while the reply is written


@dataclass
class Progress:
    """How far the wanted replies are."""

    choices: list[Choice]
    usage: dict[str, int] = field(default_factory=dict)  # in the last step, and only there: numbers of tokens
    candidates: dict[str, Reply] = field(default_factory=dict)  # at the end: what the best was chosen from, best first
    warning: str = ""  # at the end: what of the request the model did not see


class Job:
    """An `Ask` that is waited for: an async iterator of its `Progress`. Leaving its context gives it up.

    Two threads meet here: the worker's puts steps, the event loop's takes them. So there are two flags: the last step
    may be put long before it is taken.
    """

    def __init__(self, ask: Ask):
        self.ask = ask
        self.over = False  # nothing more is put: the last step was, or nobody waits for it
        self.ended = False  # the last step was taken, so none is to be waited for
        self.steps: asyncio.Queue[Progress | Exception] = asyncio.Queue()
        self.loop = asyncio.get_running_loop()

    def put(self, step: Progress | Exception) -> None:
        """Hand over a step, unless the job is over. An exception ends it, and is raised where it is taken."""
        if self.over:
            return
        self.over = isinstance(step, Exception) or bool(step.usage)
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server is going down
            self.loop.call_soon_threadsafe(self.steps.put_nowait, step)

    def __aiter__(self) -> "Job":
        return self

    async def __anext__(self) -> Progress:
        if self.ended:
            raise StopAsyncIteration
        step = await self.steps.get()
        if isinstance(step, Exception):
            raise step
        self.ended = bool(step.usage)
        return step

    async def newest(self) -> Progress:
        """The newest step, which holds what those before it did. Raises StopAsyncIteration after the end."""
        step = await anext(self)
        # What is there is taken at once: were others let run between two steps, a fast model would put the next one.
        while not self.steps.empty():
            step = await anext(self)
        return step

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_) -> None:
        self.over = True


class Writing:
    """The replies of a job while they are drawn: token ids in, the job's steps out."""

    def __init__(self, job: Job, chat: Conversation):
        self.job, self.ask, self.chat = job, job.ask, chat
        *history, text = self.ask.dialog
        chat.resume(history[-chat.n_history :])
        message, self.begun = chat.tokenizer.encode([text, self.ask.begun])
        self.n_begun = len(chat.tokenizer.decode(self.begun))  # characters
        self.generation = chat.generation(message, self.begun)
        # The best of more replies than are wanted are known only when all are drawn and scored. They are drawn to their
        # own ends, past stop sequences too: were they cut off together, their scores would depend on the batch.
        self.ranked = self.ask.decoding.n_replies > self.ask.n

    def choice(self, reply: Reply, decode: Callable[[list[int]], str]) -> Choice:
        """The text of a reply after what was begun, as far as it can be shown, and why it ends there if it does."""
        whole = decode([*self.begun, *reply.tokens])[self.n_begun :]
        text = before_stops(whole, self.ask.stop)
        if reply.complete or text != whole:
            return Choice(text, "stop")
        if reply.can_grow(self.generation.decoding):
            return Choice(certain(text, self.ask.stop), None)
        return Choice(text, "length")

    def tell(self, replies: list[Reply]) -> None:
        """Say how far the replies are; also their end, which need not wait for the others of the batch."""
        if self.job.over or self.ranked:
            return
        choices = [self.choice(reply, self.chat.tokenizer.decode_start) for reply in replies]
        if all(choice.finish_reason for choice in choices):
            self.tell_end(replies)
        else:  # those that have ended wait for the others
            self.job.put(Progress([Choice(text, None) for text, _ in choices]))

    def tell_end(self, replies: list[Reply]) -> None:
        """Say the first `n` replies, which are whole. replies: all that were drawn, ranked where there are more."""
        decode = self.chat.tokenizer.decode
        wanted = replies[: self.ask.n]
        choices = [self.choice(reply, decode) for reply in wanted]
        candidates = distinct(replies, decode) if self.ranked else {}
        ((prompt, _),) = self.generation.prefixes
        drawn = sum(len(reply.tokens) for reply in wanted)
        usage = {"prompt_tokens": len(prompt), "completion_tokens": drawn, "total_tokens": len(prompt) + drawn}
        self.job.put(Progress(choices, usage, candidates, self.chat.truncation))


def before_stops(text: str, stops: tuple[str, ...]) -> str:
    """A text up to the first stop sequence in it."""
    return min((text.partition(stop)[0] for stop in stops), key=len, default=text)


def certain(text: str, stops: tuple[str, ...]) -> str:
    """A text without an end that a stop sequence may begin with: what can be shown already."""
    for start in range(len(text)):
        end = text[start:]
        if any(stop.startswith(end) for stop in stops):
            return text[:start]
    return text


# ------------------------------------------------------------------------------------------------------------
# The worker
# ------------------------------------------------------------------------------------------------------------


class Worker:
    """Computes replies in a thread of its own: those that wait and are drawn alike together, as rows of one batch.

    Args:
        max_queue: replies that may wait.
    """

    def __init__(self, model: DialogModel, tokenizer: DialogTokenizer, bot: Bot, max_queue: int):
        self.model, self.tokenizer, self.bot = model, tokenizer, bot
        self.max_queue = max_queue
        self.seeds = itertools.count(bot.seed)  # of the replies whose `Ask` names none
        self.prefix_cache = PrefixCache(KEPT_PREFIXES)
        self.waiting: list[Job] = []
        self.warned: set[str] = set()  # of what was truncated: see `Conversation`
        self.seconds = 1.0  # that the last batch took
        self.closed = False
        self.lock = threading.Lock()  # of `waiting` and `closed`
        self.thread = ThreadPoolExecutor(1)  # a batch uses all cores by itself

    def submit(self, ask: Ask) -> Job:
        """Put a reply at the queue's end. Raises Unavailable where no more may wait."""
        job = Job(ask)
        with self.lock:
            if self.closed:
                raise Unavailable(*STOPPING)
            if len(self._still_waiting()) >= self.max_queue:
                message = f"{self.max_queue} replies are waited for already; try again in a moment"
                raise Unavailable(429, message, max(1, math.ceil(self.seconds)))
            self.waiting.append(job)
            self.thread.submit(self._work)
        return job

    def ahead(self, job: Job) -> int:
        """The number of replies that were asked for before this one and are not written yet; 0 once this one is."""
        with self.lock:
            waiting = self._still_waiting()
            return waiting.index(job) + 1 if job in waiting else 0

    def close(self) -> None:
        """Give up all replies. Nothing is computed any more once this returns."""
        with self.lock:
            self.closed = True
        self.thread.shutdown()

    def _work(self) -> None:
        """Compute the reply that waits longest, and others with it. There is a call for each reply, so none is left."""
        jobs = self._next_jobs()
        if not jobs:  # it was computed with another one, or nobody waits for it any more
            return
        start = time.monotonic()
        failure = Unavailable(*STOPPING)  # of those that do not end
        try:
            if not self.closed:
                self._run(jobs)
        except Exception as error:  # a bug, or a full GPU: the worker goes on with the next jobs
            log.exception("a reply failed")
            failure = Unavailable(500, f"the reply failed: {first_line(error)}")
        for job in jobs:
            job.put(failure)
        self.seconds = time.monotonic() - start
        if len(jobs) > 1:  # those who were answered together, and ask again, are waited for a little
            time.sleep(min(0.05, self.seconds / 20))

    def _next_jobs(self) -> list[Job]:
        """Take the reply that waits longest from the queue, and those that can be computed with it."""
        with self.lock:
            waiting = self._still_waiting()
            if not waiting:
                return []
            decoding = waiting[0].ask.decoding
            longest = min(decoding.max_length, self.model.limit)
            rows = min(MAX_ROWS, MAX_DRAWN // longest)
            rows_of_job = max(decoding.n_replies, decoding.num_beams)
            alike = [job for job in waiting if job.ask.decoding == decoding]
            jobs = alike[: max(1, rows // rows_of_job)]
            self.waiting = [job for job in waiting if job not in jobs]
            return jobs

    def _still_waiting(self) -> list[Job]:
        """The queue, without those that nobody waits for any more."""
        self.waiting = [job for job in self.waiting if not job.over]
        return self.waiting

    def _run(self, jobs: list[Job]) -> None:
        """Draw a token of every reply at a time, for as long as anybody waits for one."""
        writings = [self._writing(job) for job in jobs]
        generation = joined([writing.generation for writing in writings])
        for drawn in generation:
            for writing, replies in zip(writings, drawn, strict=True):
                writing.tell(replies)
            if self.closed:
                return
            if all(job.over for job in jobs):
                break
        if len(jobs) == 1 or not all(job.over for job in jobs):  # alone: also to keep its prefix for the next turn
            for writing, replies in zip(writings, generation.finish(), strict=True):
                writing.tell_end(replies)

    def _writing(self, job: Job) -> Writing:
        ask = job.ask
        seed = next(self.seeds) if ask.seed is None else ask.seed
        seed %= 2**63  # torch takes no more
        settings = ask.decoding, self.bot.max_history, seed, self.prefix_cache
        chat = Conversation(self.model, self.tokenizer, ask.persona, *settings)
        chat.warned = self.warned
        writing = Writing(job, chat)
        chat.warn_of_truncation()
        return writing


def joined(generations: list[Generation]) -> Generation:
    """The generations of a prefix each, which draw alike, as one. Each reply keeps its own generator of chance."""
    first = generations[0]
    prefixes = [prefix for each in generations for prefix in each.prefixes]
    generators = [each.rows[0].generator for each in generations]
    return Generation(first.model, prefixes, first.decoding, generators, first.prefix_cache)
