"""What `interact.py --web` serves: the chat page and the endpoint, over HTTP."""

import asyncio
import ipaddress
import os
import secrets
import signal
import socket
import tempfile
import threading
import time
from contextlib import AbstractContextManager
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route

from cli import UserError, explain_errors, log
from endpoint import asked_reply, completion, completion_events, error_answer, read_request
from page import Page, look
from worker import Bot, Job, Unavailable, Worker

MAX_BODY = 1_000_000  # bytes of a request
BODY_SECONDS = 30  # that a request may take to arrive


async def refuse(_: Request, error: UserError | Unavailable | HTTPException) -> JSONResponse:
    """The answer to a request that failed, in OpenAI's form."""
    status, message, headers = 400, str(error), None
    if isinstance(error, HTTPException):
        status, message, headers = error.status_code, error.detail, error.headers
    elif isinstance(error, Unavailable):
        status = error.status
        if error.retry_after:
            headers = {"Retry-After": str(error.retry_after)}
    return JSONResponse(error_answer(status, message), status, headers)


# ------------------------------------------------------------------------------------------------------------
# Who may ask
# ------------------------------------------------------------------------------------------------------------


class Guard:
    """Turns away what no route should see; reads the body of what it lets in.

    A page of another site, open in a browser on this machine, must not use the bot. It can reach this server under a
    name of its own that it lets point here, which the Host header tells; and it can post what is no JSON without the
    browser's asking first, which the content type tells. curl sends JSON as a form, but no Origin as browsers do.

    Args:
        hosts: names that this server is known by.
        api_key: what the endpoint asks for; empty: nothing.
    """

    def __init__(self, app, hosts: set[str], api_key: str):
        self.app, self.hosts, self.api_key = app, hosts, api_key

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":  # the server's start and end
            return await self.app(scope, receive, send)
        request = Request(scope, receive)
        try:
            self.check(request)
            if request.method == "POST":
                receive = replay(await read_body(request), receive)
        except HTTPException as error:
            response = await refuse(request, error)
            return await response(scope, receive, send)
        except ClientDisconnect:  # amid its body: nobody reads an answer
            return None
        return await self.app(scope, receive, send)

    def check(self, request: Request) -> None:
        """Raise HTTPException for a request that is not to be answered."""
        path, headers = request.url.path, request.headers
        if not is_known(headers.get("host", ""), self.hosts):
            raise HTTPException(403, "this server is not known by the name in Host; start it with --allow_host NAME")
        if path.endswith("/upload"):
            raise HTTPException(404, "nothing can be uploaded")
        if request.method == "POST" and not (is_json(headers) or path == "/login"):
            raise HTTPException(415, "expected the content type application/json")
        needs_key = self.api_key and path.startswith("/v1/")  # the page asks its visitors itself: `auth` in `serve`
        if needs_key and not same(headers.get("authorization", ""), f"Bearer {self.api_key}"):
            raise HTTPException(401, "expected the server's API key", {"WWW-Authenticate": "Bearer"})


def is_known(host: str, hosts: set[str]) -> bool:
    """Whether a Host header names this server. An address does: only a name can be made to point elsewhere."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name in hosts or bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def is_json(headers) -> bool:
    """Whether a body is JSON, or may be: what curl and plain programs send where nothing is said."""
    kind = headers.get("content-type", "").split(";")[0].strip().lower()
    from_browser = "origin" in headers or "sec-fetch-site" in headers
    return kind == "application/json" or (kind in ("", "application/x-www-form-urlencoded") and not from_browser)


def same(one: str, other: str) -> bool:
    """Whether two texts are equal, in a time that does not tell where they differ."""
    return secrets.compare_digest(one.encode(), other.encode())


async def read_body(request: Request) -> bytes:
    """The body of a request. Raises HTTPException for one that is too large or too slow.

    One that is too large is read to its end, and not kept: a client that still sends would not see the answer.
    """
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                body += part[: MAX_BODY + 1 - len(body)]  # the byte that is one too many tells that there are more
    except TimeoutError:
        raise HTTPException(408, f"the request took longer than {BODY_SECONDS} seconds to arrive") from None
    if len(body) > MAX_BODY:
        raise HTTPException(413, f"the request has more than {MAX_BODY} bytes; send fewer messages")
    return bytes(body)


def replay(body: bytes, receive):
    """An ASGI `receive` for a body that was read already. After it comes what else the client does: it leaves."""
    whole = iter([{"type": "http.request", "body": body}])

    async def next_message() -> dict:
        return next(whole, None) or await receive()

    return next_message


# ------------------------------------------------------------------------------------------------------------
# The endpoint
# ------------------------------------------------------------------------------------------------------------


async def whole_completion(job: Job, model: str, request: Request) -> Response:
    """An answer at once; given up when the client is gone, which Starlette tells only who asks."""
    answer = asyncio.ensure_future(completion(job, model))
    while not (await asyncio.wait([answer], timeout=0.2))[0]:
        if await request.is_disconnected():
            answer.cancel()
            return Response()
    return JSONResponse(answer.result())


def endpoint(worker: Worker) -> Starlette:
    """What is under /v1, as OpenAI's clients expect it."""
    bot = worker.bot
    model = {"id": bot.name, "object": "model", "created": int(time.time()), "owned_by": "local"}

    async def complete(request: Request) -> Response:
        asked = read_request(await request.body())
        job = worker.submit(asked_reply(asked, bot))
        name = asked.model or bot.name
        if not asked.stream:
            return await whole_completion(job, name, request)
        events = completion_events(job, name, bool(asked.stream_options.include_usage))
        return StreamingResponse(events, media_type="text/event-stream")

    async def list_models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [model]})

    async def show_model(request: Request) -> Response:
        if request.path_params["name"] != bot.name:
            raise HTTPException(404, f"there is one model, {bot.name}")
        return JSONResponse(model)

    routes = [
        Route("/chat/completions", complete, methods=["POST"]),
        Route("/models", list_models),
        Route("/models/{name:path}", show_model),
    ]
    return Starlette(routes=routes, exception_handlers=dict.fromkeys((UserError, Unavailable, HTTPException), refuse))


async def health(_: Request) -> Response:
    return JSONResponse({"status": "ok"})


# ------------------------------------------------------------------------------------------------------------
# The server
# ------------------------------------------------------------------------------------------------------------


def listening(web) -> AbstractContextManager:
    """Around what listens at the address: where nobody can, that is one line for the user."""
    return explain_errors(f"cannot listen at {web.host}:{web.port}", "try another --port", OSError)


def check_address(web) -> None:
    """Raise UserError where nobody can listen at the address: before a model is loaded."""
    with listening(web):
        family, _, _, _, address = socket.getaddrinfo(web.host, web.port, type=socket.SOCK_STREAM)[0]
        socket.create_server(address, family=family).close()


def leave(number: int, _) -> None:
    """Answer a signal: a second one ends the process at once."""
    signal.signal(number, signal.SIG_DFL)
    raise SystemExit(128 + number)


def serve(model, tokenizer, bot: Bot, web) -> None:
    """Serve page and endpoint until a signal. web: interact.py's options of that name."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)
    worker = Worker(model, tokenizer, bot, web.max_queue)
    api_key = web.api_key or os.environ.get("IMPROVEDFLEND_API_KEY", "")
    hosts = {name.lower() for name in ("localhost", socket.gethostname(), web.host, *(web.allow_host or []))}
    routes = [Mount("/v1", endpoint(worker)), Route("/health", health)]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # for nobody else to read, and gone with the server
        # The worker's queue is the only one: Gradio's would let a reply wait behind those of other pages.
        blocks = Page(worker).blocks.queue(max_size=None, default_concurrency_limit=None)
        with listening(web):
            _, url, shared = blocks.launch(
                server_name=web.host,
                server_port=web.port or None,
                share=web.share,
                prevent_thread_lock=True,  # it returns, and serves from a thread
                quiet=True,
                auth=(lambda _, password: same(password, api_key)) if api_key else None,
                auth_message="Any name; the password is the server's API key.",
                footer_links=[],
                run_history=False,
                ssr_mode=False,  # needs Node
                app_kwargs={"routes": routes, "middleware": [Middleware(Guard, hosts=hosts, api_key=api_key)]},
                **look(bot),
            )
        if shared:
            hosts.add(urlsplit(shared).hostname)
        log.info(f"Chat page: {url}" + (f" and, for everyone, {shared}" if shared else ""))
        log.info(f"OpenAI-compatible endpoint: {url}v1")
        try:
            threading.Event().wait()
        finally:
            worker.close()  # what is waited for ends with an error, and an interpreter may not end within torch
            blocks.close(verbose=False)
            log.info("Stopped.")
