"""What `interact.py --web` serves: the chat page, and the HTTP of the OpenAI-compatible endpoint."""

import asyncio
import os
import tempfile
import threading

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from cli import UserError, first_line, log
from endpoint import Bot, Busy, Job, Worker, asked_reply, completion, completion_events, read_request
from page import CSS, SCRIPT, THEME, chat_page

MAX_BODY = 1_000_000  # bytes of a request


# ------------------------------------------------------------------------------------------------------------
# The endpoint
# ------------------------------------------------------------------------------------------------------------


def api_error(status: int, message: str) -> JSONResponse:
    kind = "rate_limit_error" if status == 429 else "invalid_request_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": None}}, status)


async def read_body(request: Request) -> bytes:
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise UserError(f"the request is larger than {MAX_BODY} bytes; send fewer messages")
    return body


async def whole_completion(job: Job, model: str, request: Request) -> Response:
    """An answer at once; given up when the client is gone."""

    async def watch() -> None:
        while not await request.is_disconnected():
            await asyncio.sleep(0.2)
        job.gone.set()

    watching = asyncio.create_task(watch())
    try:
        return JSONResponse(await completion(job, model))
    finally:
        watching.cancel()


def api_routes(worker: Worker, bot: Bot) -> list[Route]:
    """/v1/chat/completions and /v1/models, as OpenAI's clients expect them."""

    async def complete(request: Request) -> Response:
        try:
            asked = read_request(await read_body(request))
            job = worker.submit(await asyncio.to_thread(asked_reply, asked, bot.persona, bot.decoding))
        except UserError as error:
            return api_error(400, str(error))
        except Busy as error:
            return api_error(429, str(error))
        name = asked.model or bot.name
        if not asked.stream:
            return await whole_completion(job, name, request)
        with_usage = asked.stream_options is not None and asked.stream_options.include_usage
        return StreamingResponse(completion_events(job, name, with_usage), media_type="text/event-stream")

    async def models(_: Request) -> Response:
        model = {"id": bot.name, "object": "model", "owned_by": "local"}
        return JSONResponse({"object": "list", "data": [model]})

    return [Route("/v1/chat/completions", complete, methods=["POST"]), Route("/v1/models", models)]


# ------------------------------------------------------------------------------------------------------------
# The server
# ------------------------------------------------------------------------------------------------------------


def serve(model, tokenizer, bot: Bot, web) -> None:
    """Serve page and endpoint until Ctrl-C. web: interact.py's options of that name."""
    worker = Worker(model, tokenizer, bot.max_history, bot.seed, web.max_queue)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        blocks = chat_page(worker, bot).queue(max_size=None, default_concurrency_limit=None)
        try:
            _, url, shared = blocks.launch(
                server_name=web.host,
                server_port=web.port or None,
                share=web.share,
                prevent_thread_lock=True,
                quiet=True,
                footer_links=[],
                ssr_mode=False,
                theme=THEME,
                css=CSS,
                head=SCRIPT,
                app_kwargs={"routes": api_routes(worker, bot)},
            )
        except OSError as error:
            raise UserError(
                f"cannot listen at {web.host}:{web.port}: {first_line(error)}; try another --port"
            ) from error
        log.info(f"Chat page: {url}" + (f" and, for everyone, {shared}" if shared else ""))
        log.info(f"OpenAI-compatible endpoint: {url}v1")
        try:
            threading.Event().wait()
        finally:
            blocks.close(verbose=False)
