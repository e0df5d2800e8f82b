"""OpenAI's chat completions: requests in, answers out. The worker computes the replies; HTTP is web.py's."""

import json
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

import msgspec

from cli import UserError, explain_errors
from dialogs import MAX_MESSAGE, check_message
from formats import decode
from inputs import utterances_shown
from options import LARGEST, Decoding, Settings, option
from records import NO_JSON
from turns import ROLE_OF, SIDES, joined_turns, split_sentences
from worker import Ask, Bot, Job, Progress, Unavailable

MAX_CHOICES = 16
MAX_STOPS = 64
MAX_PERSONA = 100_000  # characters


# ------------------------------------------------------------------------------------------------------------
# OpenAI's requests
# ------------------------------------------------------------------------------------------------------------


class ContentPart(msgspec.Struct):
    type: str = "text"
    text: str | None = None


class ChatMessage(msgspec.Struct):
    role: str
    content: str | list[ContentPart] | None = None


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool | None = None


@dataclass(frozen=True)
class ChatRequest(Settings):
    """The part of OpenAI's request that has a meaning here. None: as the server was started."""

    messages: list[ChatMessage]
    model: str = ""
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    n: int = option(1, "replies", low=1, high=MAX_CHOICES)
    seed: int = -1  # any, as in llama.cpp's server
    stop: str | list[str] = ""
    temperature: float | None = option(None, "0: the likeliest token", low=0, high=2)
    top_p: float | None = option(None, "0: the likeliest token", low=0, high=1)
    top_k: int | None = option(None, "as other local servers have it, besides OpenAI's", low=-1)
    repetition_penalty: float | None = None  # also theirs; bounds: those of `Decoding`
    max_tokens: int | None = None
    max_completion_tokens: int | None = None


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
    """A request from its JSON. A null is as good as nothing. Raises UserError."""
    with explain_errors("not a chat completion request", "see OpenAI's reference of chat completions", *NO_JSON):
        fields = {name: value for name, value in decode(body).items() if value is not None}
        for name, value in fields.items():
            if name in UNSUPPORTED and value not in UNSUPPORTED[name]:
                raise UserError(f"{name} is not supported; leave it out")
        return msgspec.convert(fields, ChatRequest, strict=False)  # 16.0 is whole: some libraries know no other


def asked_reply(request: ChatRequest, bot: Bot) -> Ask:
    """What a request asks for. Raises UserError.

    As in other local servers (llama.cpp's, ollama) a last message of the assistant is the beginning of the reply,
    and only its continuation is answered. Messages without text, and those of tools, are left out.
    """
    systems, turns = [], []
    for message in request.messages:
        role, text = role_of(message), text_of(message)
        if role == "system":
            systems.append(text)
        elif role in SIDES and text.strip():
            turns.append((role, text))
    if sum(map(len, systems)) > MAX_PERSONA:
        raise UserError(f"messages: expected at most {MAX_PERSONA} characters of the role system, so shorten them")
    persona = split_sentences("\n".join(systems)) if systems else bot.persona
    dialog = [text for _, text, _ in joined_turns(turns)]
    begun = ""
    if turns and turns[-1][0] == "assistant":
        begun = check_message(dialog.pop())
    if not dialog:
        raise UserError("messages: expected one of the user that is not empty")
    *history, message = dialog[-utterances_shown(bot.max_history) :]
    dialog = [*history, check_message(message)]
    decoding = asked_decoding(request, bot.decoding)
    seed = None if request.seed == -1 else request.seed
    return Ask(persona, dialog, decoding, seed, request.n, begun, asked_stops(request.stop))


def role_of(message: ChatMessage) -> str:
    """Who speaks: user, assistant, system or tool. Raises UserError for an unknown role."""
    role = ROLE_OF.get(message.role.lower())
    if role is None:
        raise UserError(f"messages: expected role system, user, assistant or tool, found {message.role[:40]!r}")
    return role


def text_of(message: ChatMessage) -> str:
    """The text of a message, whose content may have parts. Raises UserError where it is no text."""
    if not isinstance(message.content, list):
        return message.content or ""
    for part in message.content:
        if part.type != "text":
            raise UserError(f"messages: content of the type {part.type!r} is not supported; send text")
    return " ".join(part.text for part in message.content if part.text)


def asked_stops(stop: str | list[str]) -> tuple[str, ...]:
    """The stop sequences of a request. Raises UserError."""
    stops = [stop] if isinstance(stop, str) else stop
    if len(stops) > MAX_STOPS or any(len(each) > MAX_MESSAGE for each in stops):
        raise UserError(f"stop: expected at most {MAX_STOPS} texts of at most {MAX_MESSAGE} characters")
    return tuple(filter(None, stops))


def asked_decoding(request: ChatRequest, decoding: Decoding) -> Decoding:
    """How a request wants replies to be drawn. Raises UserError."""
    asked = {name: getattr(request, name, None) for name in Decoding.options()}  # called the same in both
    changes = {name: value for name, value in asked.items() if value is not None}
    for name in changes.keys() & {"temperature", "top_p"}:  # 0 is the likeliest token; the options have no such value
        changes[name] = max(changes[name], 1e-6)
    if "temperature" in changes:  # who gives one wants a reply that is drawn
        changes["no_sample"] = False
    limit = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    if limit is not None:  # 0 or less is as long as the model can, as in llama-cpp-python and ollama
        changes["max_length"] = limit if 0 < limit < LARGEST else LARGEST
    return replace(decoding, n_replies=max(request.n, decoding.n_replies), **changes)


# ------------------------------------------------------------------------------------------------------------
# OpenAI's answers
# ------------------------------------------------------------------------------------------------------------

ERROR_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


def error_answer(status: int, message: str) -> dict:
    kind = "invalid_request_error" if status < 500 else "server_error"
    kind = ERROR_TYPES.get(status, kind)
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def about(model: str) -> dict:
    """What every part of one answer says of itself."""
    return {"id": f"chatcmpl-{secrets.token_hex(8)}", "created": int(time.time()), "model": model}


async def completion(job: Job, model: str) -> dict:
    """The whole answer."""
    with job:
        async for step in job:
            end = step
    choices = []
    for i, (text, finish_reason) in enumerate(end.choices):
        message = {"role": "assistant", "content": text, "refusal": None}
        choices.append({"index": i, "message": message, "logprobs": None, "finish_reason": finish_reason})
    return {**about(model), "object": "chat.completion", "choices": choices, "usage": end.usage} | warning(end)


async def completion_events(job: Job, model: str, with_usage: bool) -> AsyncIterator[str]:
    """The answer piece by piece, as server-sent events. An error is one too, since the answer has begun."""
    head = {**about(model), "object": "chat.completion.chunk"}
    if with_usage:  # as OpenAI has it, in every chunk but the last
        head["usage"] = None

    def event(index: int, delta: dict, finish_reason: str | None = None) -> dict:
        return {**head, "choices": [{"index": index, "delta": delta, "finish_reason": finish_reason}]}

    with job:  # whoever reads no more needs no reply
        sent = [""] * job.ask.n  # of each choice, so far
        for i in range(job.ask.n):
            yield sse(event(i, {"role": "assistant", "content": ""}))
        try:
            async for step in job:
                for i, (text, finish_reason) in enumerate(step.choices):
                    piece, sent[i] = text.removeprefix(sent[i]), text
                    if piece or finish_reason:
                        delta = {"content": piece} if piece else {}
                        yield sse(event(i, delta, finish_reason) | warning(step))
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
