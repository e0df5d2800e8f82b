"""The chat page in a real browser, and the endpoint with OpenAI's own client. Skipped where these are missing."""

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="pip install -r requirements-web.txt")

import interact
from dialogs import MAX_MESSAGE, read_dataset
from helpers import run_python

ROOT = Path(interact.__file__).parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def serve(make_model, load, tmp_path_factory):
    """`serve(*options)` starts `interact.py --web` with a tiny model that can talk for long; its address."""
    folder = tmp_path_factory.mktemp("web")
    model, tokenizer = load(make_model(folder / "base", "openai-gpt", n_positions=6000))
    model.save(folder)
    tokenizer.save(folder)

    def start(*options: str) -> str:
        command = [sys.executable, str(ROOT / "interact.py"), "--model", str(folder), "--web", "--port", "0"]
        command += ["--personality", "i like tea .", "--dataset_path", str(ROOT / "data" / "sample.json"), *options]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"endpoint: (http.*)/v1", line):
                address = found.group(1)
                start.processes[address], start.said[address] = process, lines
                threading.Thread(target=lines.extend, args=[process.stderr], daemon=True).start()  # it never blocks
                return address
        raise AssertionError("".join(lines))

    start.processes, start.said = {}, {}  # of each address; what its process wrote
    yield start
    for process in start.processes.values():
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def address(serve) -> str:
    return serve(
        "--max_queue", "2", "--max_length", "12", "--min_length", "12", "--top_p", "0", "--allow_host", "bot.test"
    )


@pytest.fixture(scope="module")
def endless(serve) -> str:
    """A server whose replies go on for as long as they are let."""
    return serve("--max_queue", "2", "--max_length", "9000", "--min_length", "9000")


@pytest.fixture
def client(address: str):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=address + "/v1", api_key="none", max_retries=0) as client:
        yield client


HELLO = [{"role": "user", "content": "hello"}]
BODY = json.dumps({"messages": HELLO}).encode()


def complete(client, messages=HELLO, **options):
    return client.chat.completions.create(model="tiny", messages=messages, **options)


# ------------------------------------------------------------------------------------------------------------
# The endpoint
# ------------------------------------------------------------------------------------------------------------


def test_completion(client) -> None:
    answer = complete(client, seed=3)
    (choice,) = answer.choices
    assert choice.message.role == "assistant" and choice.message.content
    assert choice.finish_reason == "length"
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12
    assert answer.model == "tiny" and answer.object == "chat.completion"
    assert complete(client, seed=3).choices[0].message.content == choice.message.content
    assert complete(client, seed=4).choices[0].message.content != choice.message.content
    assert len(client.models.list().data) == 1


def test_streamed_completion_is_the_same_text(client) -> None:
    whole = complete(client, seed=5, n=2)
    texts, finished, usage = ["", ""], [None, None], None
    chunks = 0
    for chunk in complete(client, seed=5, n=2, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            finished[choice.index] = choice.finish_reason or finished[choice.index]
            chunks += 1
    assert sorted(texts) == sorted(choice.message.content for choice in whole.choices)
    assert finished == ["length", "length"] and chunks > 8
    assert usage.prompt_tokens == whole.usage.prompt_tokens and usage.completion_tokens == 24


def test_system_message_is_the_persona(client) -> None:
    default = complete(client).usage.prompt_tokens
    none = complete(client, [{"role": "system", "content": ""}, *HELLO]).usage.prompt_tokens
    long = complete(client, [{"role": "system", "content": "i like fish. i like the sea."}, *HELLO])
    assert none < default < long.usage.prompt_tokens


def test_history_and_content_parts_are_read(client) -> None:
    earlier = [*HELLO, {"role": "assistant", "content": "hi, i like rain"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    assert complete(client, parts).usage == complete(client).usage
    assert complete(client, earlier + HELLO).usage.prompt_tokens > complete(client).usage.prompt_tokens
    eos = complete(client, [{"role": "user", "content": "<eos> <eos>"}]).usage.prompt_tokens
    assert eos > complete(client, [{"role": "user", "content": "a"}]).usage.prompt_tokens + 2


def send(address: str, path: str = "/v1/chat/completions", body: bytes | None = BODY, **headers: str):
    """Status, headers and parsed body of a request as curl would send it. headers: with _ for -."""
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        with urllib.request.urlopen(urllib.request.Request(address + path, body, headers)) as answer:
            return answer.status, answer.headers, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, json.load(error)


@pytest.mark.parametrize(
    ("status", "path", "body", "headers"),
    [
        (200, "/v1/chat/completions", BODY, {}),
        (200, "/v1/chat/completions", BODY, {"content_type": "application/json; charset=utf-8"}),
        (200, "/v1/chat/completions", BODY, {"host": "LOCALHOST:1", "content_type": "application/json"}),
        (200, "/v1/chat/completions", BODY, {"host": "bot.test"}),
        (200, "/v1/chat/completions", BODY, {"host": "[::1]:7860"}),
        (200, "/v1/models", None, {}),
        (200, "/health", None, {}),
        (400, "/v1/chat/completions", b'{"messages": []}', {}),
        (400, "/v1/chat/completions", b'{"messages": [], "x": ' + b"[" * 100_000, {}),
        (403, "/v1/models", None, {"host": "evil.test"}),
        (403, "/config", None, {"host": "evil.test:7860"}),
        (403, "/v1/models", None, {"host": "127.0.0.1.evil.test"}),
        (404, "/v1/models/other", None, {}),
        (404, "/v1/completions", BODY, {}),
        (404, "/v1/completions", None, {}),
        (404, "/gradio_api/upload", BODY, {}),
        (405, "/v1/chat/completions", None, {}),
        (405, "/v1/models", BODY, {}),
        (413, "/v1/chat/completions", b"x" * 1_000_001, {}),
        (415, "/v1/chat/completions", BODY, {"content_type": "text/plain"}),
        (415, "/v1/chat/completions", BODY, {"origin": "http://evil.test"}),
        (415, "/gradio_api/queue/join", BODY, {"content_type": "text/plain"}),
    ],
)
def test_what_is_answered_and_what_is_turned_away(address: str, status, path, body, headers) -> None:
    found, _, answer = send(address, path, body, **headers)
    assert found == status
    if status >= 400:
        assert answer["error"]["message"] and answer["error"]["type"] == "invalid_request_error"


def test_the_model_is_known_by_its_folder(address: str) -> None:
    (model,) = send(address, "/v1/models", None)[2]["data"]
    assert "/" not in model["id"] and model["created"] > 0
    assert send(address, f"/v1/models/{model['id']}", None)[2] == model


def test_an_api_key_is_asked_for(serve) -> None:
    address = serve("--api_key", "geheim")
    assert send(address, "/health", None)[0] == 200
    for headers in ({}, {"authorization": "Bearer x"}, {"authorization": "geheim"}):
        status, _, answer = send(address, **headers)
        assert status == 401 and answer["error"]["type"] == "authentication_error"
    assert send(address, authorization="Bearer geheim")[0] == 200
    assert send(address, "/config", None)[0] == 401, "the page asks for it too"


def test_a_client_that_leaves_amid_its_body_is_no_traceback(serve) -> None:
    address = serve()
    host, port = address.removeprefix("http://").split(":")
    for length in (10, 1000):
        with socket.create_connection((host, int(port))) as client:
            client.sendall(
                f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {length}\r\n\r\n{{".encode()
            )
    assert send(address)[0] == 200
    assert "Traceback" not in "".join(serve.said[address])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_server_and_tells_who_waits(serve, number) -> None:
    openai = pytest.importorskip("openai")
    address = serve("--max_length", "9000", "--min_length", "9000")
    client = openai.OpenAI(base_url=address + "/v1", api_key="none", max_retries=0)
    running = complete(client, stream=True)
    assert any(chunk.choices[0].delta.content for chunk in running)
    serve.processes[address].send_signal(number)
    with pytest.raises(openai.APIError, match="the server is stopping"):
        list(running)
    assert serve.processes[address].wait() == 128 + number
    said = "".join(serve.said[address])
    assert "Traceback" not in said and "terminate called" not in said


def test_simultaneous_conversations_are_not_mixed(client) -> None:
    """Replies of many at once are those of each alone."""

    def ask(i: int) -> str:
        message = {"role": "user", "content": ["hello", "i like the sea", "what do you do ?"][i]}
        return complete(client, [message], temperature=1.5, seed=i).choices[0].message.content

    alone = [ask(i) for i in range(3)]
    assert len(set(alone)) == 3
    with ThreadPoolExecutor(2) as pool:  # as many as may wait, however slow the machine is
        assert list(pool.map(ask, range(3))) == alone


def test_queue_is_bounded_and_vanished_clients_free_their_slots(endless: str) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=endless + "/v1", api_key="none", max_retries=0)

    def soon() -> None:
        """A short reply can be had, which the server may notice a little later."""
        while True:
            try:
                assert complete(client, max_tokens=1).usage.completion_tokens == 1
                return
            except openai.RateLimitError:
                time.sleep(0.2)

    running = complete(client, stream=True)
    assert any(chunk.choices[0].delta.content for chunk in running), "it is being written, far from its end"
    waiting = [complete(client, stream=True) for _ in range(2)]  # answered at once, with nothing in them yet
    with pytest.raises(openai.RateLimitError, match="2 replies are waited for") as refused:
        complete(client)
    assert int(refused.value.response.headers["retry-after"]) >= 1
    for stream in waiting:
        stream.close()
    running.close()
    soon()
    with pytest.raises(openai.APITimeoutError):  # not streamed: a client that hangs up
        complete(client.with_options(timeout=1))
    soon()


# ------------------------------------------------------------------------------------------------------------
# The page
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no chromium")
    options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, address: str):
    """`open_page(**options)` is the page in a browser window of its own."""
    contexts = []

    def start(url: str = address, **options):
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(0)  # none
        page.foreign = []
        page.on("request", lambda sent: page.foreign.append(sent.url))
        page.goto(url)
        page.locator("#message textarea").wait_for()
        return page

    yield start
    for context in contexts:
        context.close()


def bubbles(page) -> list[str]:
    shown = page.locator("#chat .message-content").all_inner_texts()
    return [text.replace("\u2060", "").strip() for text in shown]  # without what keeps tags text


def say(page, text: str) -> str:
    """Send a message; the reply once it is whole."""
    before = len(bubbles(page))
    page.locator("#message textarea").fill(text)
    page.locator("#message textarea").press("Enter")
    return finished(page, before + 2)


def streams(page) -> None:
    """Wait until the first reply has many words, far from its end. The empty chat's own words are no reply."""
    page.wait_for_function("document.querySelectorAll('#chat .message-content')[1]?.innerText.length > 60")


def finished(page, count: int) -> str:
    """The last of `count` bubbles, once no reply is written any more."""
    shown = "[...document.querySelectorAll('#chat .message-content')]"
    page.wait_for_function(f"{shown}.length == {count} && !{shown}.at(-1).innerText.startsWith('…')")
    page.get_by_role("button", name="Send").wait_for()
    return bubbles(page)[-1]


def test_conversation_in_the_browser(open_page, address: str, tmp_path: Path) -> None:
    page = open_page(viewport={"width": 1280, "height": 900})
    first = say(page, "hello there")
    assert first and bubbles(page) == ["hello there", first]
    script = "<script>document.title='x'</script><b>bold</b>"
    reply = say(page, script)
    assert bubbles(page)[2] == script, "markup is shown as text"
    assert page.title() != "x" and page.locator("#chat b").count() == 0

    page.get_by_role("button", name="Retry").click()
    page.wait_for_function("old => !document.querySelector('#chat').innerText.includes(old)", arg=reply)
    assert finished(page, 4) != reply
    page.get_by_role("button", name="Undo").click()
    page.wait_for_function("document.querySelectorAll('#chat .message-content').length == 2")
    assert page.locator("#message textarea").input_value() == script

    with page.expect_download() as download:
        page.get_by_role("button", name="Transcript").click()
    download.value.save_as(tmp_path / "chat.jsonl")
    (dialog,) = read_dataset(str(tmp_path / "chat.jsonl"))["all"]
    assert dialog.utterances[-1].history == ["hello there"] and dialog.personality == ["i like tea ."]

    assert all(url.startswith((address, "data:", "blob:")) for url in page.foreign), "only this machine is asked"


def test_empty_and_long_messages_in_the_browser(open_page) -> None:
    page = open_page()
    page.locator("#message textarea").fill("  ")
    page.locator("#message textarea").press("Enter")
    page.get_by_text("the message is empty").wait_for()
    page.locator("#message textarea").fill("y" * (MAX_MESSAGE + 1))
    page.locator("#message textarea").press("Enter")
    page.get_by_text(f"expected at most {MAX_MESSAGE}").wait_for()
    page.wait_for_function(f"document.querySelector('#message textarea').value.length == {MAX_MESSAGE + 1}")
    assert bubbles(page) == []
    assert say(page, "word " * 300)


def test_persona_is_edited_and_sessions_do_not_see_each_other(open_page, tmp_path: Path) -> None:
    page, other = open_page(), open_page()
    page.locator("#persona textarea").fill("i live on the moon .\n\ni eat cheese .")
    say(page, "who are you ?")
    assert bubbles(other) == [] and other.locator("#persona textarea").input_value() == "i like tea ."
    say(other, "and you ?")
    assert len(bubbles(page)) == len(bubbles(other)) == 2
    for each, personality in ((page, ["i live on the moon .", "i eat cheese ."]), (other, ["i like tea ."])):
        with each.expect_download() as download:
            each.get_by_role("button", name="Transcript").click()
        assert json.loads(Path(download.value.path()).read_text())["personality"] == personality
    page.get_by_role("button", name="Random persona").click()
    page.wait_for_function("!document.querySelector('#persona textarea').value.includes('moon')")
    page.reload()
    page.locator("#message textarea").wait_for()
    page.wait_for_function("document.querySelectorAll('#chat .message-content').length == 2")
    assert page.locator("#persona textarea").input_value() != "i like tea .", "kept, as the chat is"
    page.get_by_role("button", name="New chat").click()
    page.wait_for_function("document.querySelectorAll('#chat .message-content').length == 0")
    assert say(page, "hello again") and len(bubbles(page)) == 2


def test_page_fits_a_phone_and_a_closed_page_frees_the_model(endless: str, open_page) -> None:
    openai = pytest.importorskip("openai")
    page = open_page(endless, viewport={"width": 390, "height": 844}, has_touch=True, color_scheme="dark")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    page.locator("#message textarea").fill("talk")
    page.locator("#message textarea").press("Enter")
    streams(page)
    page.get_by_role("button", name="Stop").click()
    finished(page, 2)
    page.locator("#message textarea").fill("talk more")
    page.locator("#message textarea").press("Enter")
    page.wait_for_function("document.querySelectorAll('#chat .message-content').length == 4")
    page.context.close()
    with openai.OpenAI(base_url=endless + "/v1", api_key="none", max_retries=0) as client:
        assert complete(client, max_tokens=20).choices


def test_what_is_typed_during_a_reply_is_safe(endless: str, open_page) -> None:
    page = open_page(endless, viewport={"width": 1280, "height": 800})
    box, width = page.locator("#message textarea"), page.locator("#chat").bounding_box()["width"]
    box.fill("talk")
    box.press("Enter")
    streams(page)
    assert box.input_value() == ""
    box.press_sequentially("what is your favourite food ?", delay=40)
    box.press("Enter")
    assert box.input_value().strip() == "what is your favourite food ?", "neither erased nor sent"
    page.keyboard.press("Escape")  # stops the reply, as the button does
    finished(page, 2)
    assert box.input_value().strip() == "what is your favourite food ?"
    assert page.locator("#chat").bounding_box()["width"] == width > 700, "whatever is said"
    box.press("Enter")
    page.wait_for_function("document.querySelectorAll('#chat .message-content').length == 4")
    page.get_by_role("button", name="New chat").click()
    page.get_by_role("button", name="Send").wait_for()
    page.wait_for_timeout(500)  # for what the server had sent before it heard of it
    assert bubbles(page) == [], "the reply does not bring the old chat back"


def test_a_waiting_message_is_shown_with_its_place(endless: str, open_page) -> None:
    openai = pytest.importorskip("openai")
    page = open_page(endless)
    box = page.locator("#message textarea")
    with openai.OpenAI(base_url=endless + "/v1", api_key="none", max_retries=0) as client:
        running = complete(client, stream=True)
        assert any(chunk.choices[0].delta.content for chunk in running)
        box.fill("my turn")
        box.press("Enter")
        page.get_by_text("… 1 before you").wait_for()
        assert bubbles(page)[0] == "my turn" and box.input_value() == ""
        page.get_by_role("button", name="Stop").click()
        page.get_by_role("button", name="Send").wait_for()
        assert bubbles(page) == [] and box.input_value() == "my turn", "taken back"
        running.close()
        assert complete(client, max_tokens=1).choices, "its place in the queue is free"


def test_occupied_port_is_one_line(address: str, dialog_model) -> None:
    port = address.rsplit(":", 1)[1]
    options = ["--model", dialog_model("gpt2"), "--personality", "hi", "--web", "--port", port]
    ended = run_python("interact.py", *options)
    assert ended.returncode == 2
    assert re.search(rf"^error: cannot listen at 127.0.0.1:{port}.*--port$", ended.stderr, re.M)
    assert "Traceback" not in ended.stderr


def test_an_alternative_is_chosen_and_a_message_is_edited(serve, open_page) -> None:
    page = open_page(serve("--n_replies", "3", "--max_length", "6", "--temperature", "1.5"))
    reply = say(page, "hello")
    options = page.locator("#chat .option")
    first, second, *_ = (label.split(" (head ")[0].strip() for label in options.all_inner_texts())
    assert first == reply != second
    options.nth(1).click()
    page.get_by_text(second, exact=True).wait_for()
    assert bubbles(page) == ["hello", second]
    page.get_by_role("button", name="Edit").first.click()
    page.locator("#chat textarea").fill("good bye")
    page.get_by_role("button", name="Submit").click()
    page.wait_for_function("document.querySelectorAll('#chat .message-content')[0]?.innerText.trim() == 'good bye'")
    assert finished(page, 2) and bubbles(page)[0] == "good bye"
