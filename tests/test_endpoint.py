"""OpenAI's requests in, answers out, and the worker that computes them: without HTTP, for which see test_web.py."""

import asyncio
import json
from dataclasses import replace
from string import ascii_letters
from types import SimpleNamespace

import pytest

import endpoint
from cli import UserError
from dialogs import MAX_MESSAGE
from endpoint import asked_reply, completion, completion_events, read_request
from options import Decoding
from worker import MAX_ROWS, Ask, Bot, Unavailable, Worker, joined

BOT = Bot("tiny", ["i like tea ."], Decoding(max_length=12, min_length=12), max_history=1, seed=1, dialogs=None)
HELLO = {"role": "user", "content": "hello"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}


def asked(*messages: dict, **fields) -> Ask:
    return asked_reply(read_request(json.dumps({"messages": messages or [HELLO], **fields}).encode()), BOT)


@pytest.fixture
def worker(dialog_model, load):
    worker = Worker(*load(dialog_model("gpt2")), BOT, max_queue=20)
    yield worker
    worker.close()


def answers(worker: Worker, *asks: Ask) -> list[dict]:
    """The answers to requests that are made at once."""

    async def run() -> list[dict]:
        return await asyncio.gather(*[completion(job, "tiny") for job in map(worker.submit, asks)])

    return asyncio.run(run())


def chunks(worker: Worker, ask: Ask) -> list[dict]:
    """The events of a streamed answer."""

    async def run() -> list[str]:
        return [event async for event in completion_events(worker.submit(ask), "tiny", with_usage=False)]

    *events, done = asyncio.run(run())
    assert done == "data: [DONE]\n\n"
    return [json.loads(event.removeprefix("data: ")) for event in events]


def text_of(answer: dict) -> str:
    return answer["choices"][0]["message"]["content"]


# ------------------------------------------------------------------------------------------------------------
# Requests
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "persona", "dialog", "begun"),
    [
        ([HELLO], BOT.persona, ["hello"], ""),
        ([{"role": "system", "content": "I am Dr. No. I swim."}, HELLO], ["I am Dr. No.", "I swim."], ["hello"], ""),
        ([HELLO, {"role": "system", "content": "i swim ."}], ["i swim ."], ["hello"], ""),
        ([{"role": "developer", "content": ""}, HELLO], [], ["hello"], ""),
        (
            [{"role": "human", "content": "a"}, {"role": "AI", "content": "b"}, HELLO],
            BOT.persona,
            ["a", "b", "hello"],
            "",
        ),
        ([HELLO, {"role": "assistant", "content": "well ,"}], BOT.persona, ["hello"], "well ,"),
        ([HELLO, CALL, {"role": "tool", "content": "7"}, HELLO], BOT.persona, ["hello hello"], ""),
        ([HELLO, {"role": "function", "content": "7"}, {"role": "assistant"}], BOT.persona, ["hello"], ""),
        ([HELLO, {"role": "assistant", "content": "7"}, HELLO], BOT.persona, ["hello", "7", "hello"], ""),
        ([{"role": "user", "content": []}, {**HELLO, "content": ""}, HELLO], BOT.persona, ["hello"], ""),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}] * 2}], BOT.persona, ["a a"], ""),
        ([{"role": "user", "content": "a \ud83d"}], BOT.persona, ["a \ufffd"], ""),
        ([HELLO, {"role": "assistant", "content": "7"}] * 9 + [HELLO], BOT.persona, ["hello", "7", "hello"], ""),
    ],
)
def test_what_messages_ask_for(messages, persona, dialog, begun):
    ask = asked(*messages)
    assert (ask.persona, ask.dialog, ask.begun) == (persona, dialog, begun)


@pytest.mark.parametrize(
    ("fields", "changes"),
    [
        (dict.fromkeys(["stream", "model", "n", "seed", "stop", "temperature", "top_p", "max_tokens", "tools"]), {}),
        (dict.fromkeys(endpoint.UNSUPPORTED), {}),
        ({"logprobs": False, "logit_bias": {}, "presence_penalty": 0.0, "response_format": {"type": "text"}}, {}),
        ({"max_tokens": 16.0, "top_k": 5.0}, {"max_length": 16, "top_k": 5}),
        ({"max_tokens": 16, "max_completion_tokens": 8}, {"max_length": 8}),
        ({"max_tokens": -1}, {"max_length": 2**31 - 1}),
        ({"max_completion_tokens": 0}, {"max_length": 2**31 - 1}),
        ({"temperature": 0, "top_p": 0}, {"temperature": 1e-6, "top_p": 1e-6}),
        ({"n": 2, "repetition_penalty": 1.5}, {"n_replies": 2, "repetition_penalty": 1.5}),
    ],
)
def test_what_fields_ask_for(fields, changes):
    ask = asked(**fields)
    assert ask.decoding == replace(BOT.decoding, **changes)
    assert (ask.stop, ask.seed, ask.n) == ((), None, fields.get("n") or 1)


def test_a_seed_and_stop_sequences():
    assert asked(seed=3, stop="a").stop == ("a",) and asked(seed=3).seed == 3
    assert asked(seed=-1, stop=["a", ""]).stop == ("a",) and asked(seed=-1).seed is None


@pytest.mark.parametrize(
    ("messages", "fields", "said"),
    [
        *(([], {name: 0.5}, f"^{name} is not supported") for name in endpoint.UNSUPPORTED),
        ([], {"logprobs": True}, "logprobs"),
        ([], {"logit_bias": {"5": -100}}, "logit_bias"),
        ([], {"response_format": {"type": "json_object"}}, "response_format"),
        ([], {"n": 0}, "n: expected a whole number of at least 1 and at most 16, found 0"),
        ([], {"temperature": -1}, "temperature: expected a number of at least 0 and at most 2"),
        ([], {"temperature": 2.5}, "temperature: expected a number of at least 0 and at most 2"),
        ([], {"top_p": 3}, "top_p: expected a number of at least 0 and at most 1"),
        ([], {"repetition_penalty": 0}, "repetition_penalty: expected"),
        ([], {"stop": ["a"] * 99}, "stop: expected at most 64"),
        ([], {"max_tokens": 1.5}, "max_tokens"),
        ([], {"stop": 3}, "stop"),
        ([{"role": "x", "content": "x"}], {}, "found 'x'"),
        ([{"role": "user", "content": " "}], {}, "of the user that is not empty"),
        ([{"role": "system", "content": "x"}], {}, "of the user that is not empty"),
        ([{"role": "system", "content": "x" * 100_001}, HELLO], {}, "100000 characters of the role system"),
        ([{"role": "user", "content": "x" * (MAX_MESSAGE + 1)}], {}, "characters; expected at most"),
        ([{"role": "user", "content": 3}], {}, "not a chat completion request"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], {}, "image_url"),
    ],
)
def test_a_wrong_request_is_told_what_is_wrong(messages, fields, said):
    with pytest.raises(UserError, match=said):
        asked(*messages, **fields)


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"messages": ' + b"[" * 100_000, b'{"messages": NaN}', b"\xff"])
def test_what_is_no_request(body):
    with pytest.raises(UserError, match="not a chat completion request"):
        read_request(body)


# ------------------------------------------------------------------------------------------------------------
# Replies
# ------------------------------------------------------------------------------------------------------------


def test_every_chunk_has_a_finish_reason_and_together_they_are_the_answer(worker):
    ask = asked(seed=5)
    events = chunks(worker, ask)
    choices = [choice for event in events for choice in event["choices"]]
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["length"]
    whole = text_of(*answers(worker, ask))
    assert whole and "".join(choice["delta"].get("content", "") for choice in choices) == whole


def test_a_reply_ends_before_a_stop_sequence(worker):
    """Wherever it lies: in a token, across tokens, at the beginning; streamed or not."""
    whole = text_of(*answers(worker, asked(seed=5)))
    for start in range(len(whole) - 2):
        for stop in (whole[start], whole[start : start + 3], whole[start:]):
            ask = asked(seed=5, stop=["\nUser:", stop])
            answer, *_ = answers(worker, ask)
            assert text_of(answer) == whole[: whole.index(stop)]
            assert answer["choices"][0]["finish_reason"] == "stop"
            choices = [event["choices"][0] for event in chunks(worker, ask)]
            assert "".join(choice["delta"].get("content", "") for choice in choices) == text_of(answer)
            assert choices[-1]["finish_reason"] == "stop"
    assert text_of(*answers(worker, asked(seed=5, stop=["\nUser:"]))) == whole


def test_a_begun_reply_goes_on(worker):
    begun = {"role": "assistant", "content": "i like the"}
    answer, other = answers(worker, asked(HELLO, begun, seed=5), asked(seed=5))
    assert answer["usage"]["prompt_tokens"] > other["usage"]["prompt_tokens"]
    assert text_of(answer) and not text_of(answer).startswith("i like the")


def test_what_the_model_does_not_see_is_said(worker):
    long = {"role": "system", "content": "i like fish . " * 900}
    answer, short = answers(worker, asked(long, HELLO), asked(HELLO))
    assert "tokens of the persona" in answer["warning"] and "warning" not in short
    assert [event["warning"] for event in chunks(worker, asked(long, HELLO)) if "warning" in event] == [
        answer["warning"]
    ]


def test_replies_that_overlap_are_computed_together(worker, monkeypatch):
    """Those that are drawn alike, and each is what it is alone: its text, its length, its stop sequence."""
    sizes = []
    monkeypatch.setattr("worker.joined", lambda parts: sizes.append(len(parts)) or joined(parts))
    messages = [{"role": "user", "content": "hello " * i} for i in range(1, 7)]
    asks = [asked(message, seed=i, n=2, stop=["e"] * (i % 2)) for i, message in enumerate(messages)]
    alone = [answers(worker, ask)[0] for ask in asks]
    assert sizes == [1] * 6
    together = answers(worker, *asks, asked(temperature=0.1))
    assert max(sizes) >= 5 and sum(sizes) == 13
    for one, other in zip(alone, together, strict=False):
        assert one["choices"] == other["choices"] and one["usage"] == other["usage"]


def test_the_best_of_several_does_not_depend_on_the_batch(worker, monkeypatch):
    """Its stop sequences end all of its replies long before those of the request beside it."""
    sizes = []
    monkeypatch.setattr("worker.joined", lambda parts: sizes.append(len(parts)) or joined(parts))
    several = replace(BOT.decoding, n_replies=4)
    stopped, other = (replace(asked(seed=3, stop=stop), decoding=several) for stop in (list(ascii_letters), "\n"))
    (alone,) = answers(worker, stopped)
    _, together, _ = answers(worker, other, stopped, other)
    assert max(sizes) > 1
    assert (together["choices"], together["usage"]) == (alone["choices"], alone["usage"])


def test_a_batch_of_beam_searches_is_as_small_as_its_rows_ask_for(worker, monkeypatch):
    sizes = []
    monkeypatch.setattr("worker.joined", lambda parts: sizes.append(len(parts)) or joined(parts))
    ask = replace(asked(), decoding=Decoding(num_beams=MAX_ROWS // 2, max_length=2))
    answers(worker, *[ask] * 5)
    assert sum(sizes) == 5 and max(sizes) <= 2


def test_the_best_of_several(worker):
    """One is wanted and four are drawn: the best is known at the end, and its alternatives with it."""
    ask = replace(asked(seed=3), decoding=replace(BOT.decoding, n_replies=4))

    async def run() -> list:
        with worker.submit(ask) as job:
            return [step async for step in job]

    (end,) = asyncio.run(run())
    assert len(end.candidates) > 1 and end.choices[0].text == next(iter(end.candidates))


def test_a_full_queue_a_failure_and_a_stopping_server(worker, monkeypatch):
    async def run() -> None:
        endless = asked(max_tokens=-1)
        running = worker.submit(replace(endless, decoding=replace(endless.decoding, min_length=9000)))
        await anext(running)
        worker.max_queue = 2
        waiting = [worker.submit(asked()) for _ in range(2)]
        assert [worker.ahead(job) for job in (running, *waiting)] == [0, 1, 2]
        with pytest.raises(Unavailable) as full:
            worker.submit(asked())
        assert full.value.status == 429 and full.value.retry_after >= 1
        with waiting[0], running:  # whoever leaves frees a place
            pass
        assert worker.ahead(waiting[1]) <= 1
        await completion(waiting[1], "tiny")
        monkeypatch.setattr("worker.joined", None)  # a bug
        with pytest.raises(Unavailable, match="failed"):
            await completion(worker.submit(asked()), "tiny")
        worker.close()
        with pytest.raises(Unavailable, match="stopping"):
            worker.submit(asked())

    asyncio.run(run())


def test_an_error_after_the_beginning_is_an_event(worker, monkeypatch):
    monkeypatch.setattr("worker.joined", lambda _: SimpleNamespace())
    *_, event = chunks(worker, asked())
    assert event["error"]["type"] == "server_error"
