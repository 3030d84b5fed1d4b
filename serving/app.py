"""The HTTP face: routes, who may call them, how errors look."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from anyio import CapacityLimiter, to_thread
from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from serving import chat
from serving.errors import ApiError
from serving.metrics import Metrics
from serving.schema import ChatRequest
from serving.settings import ServingSettings
from serving.versions import NothingServed, Served, Versions

log = logging.getLogger(__name__)

# Decoding images and tokenising is short, heavy work: a few at a time keep the event loop and
# the engine's thread breathing.
_PREPARERS = 2


class _Stream(StreamingResponse):
    """A stream that calls `done` however it ends, even when it never began."""

    def __init__(self, content: AsyncIterator[str], done: Callable[[], None]) -> None:
        super().__init__(
            content, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )
        self._done = done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._done()


def create_app(settings: ServingSettings, versions: Versions) -> FastAPI:
    """The server over a `Versions`; it looks for versions while it runs."""
    metrics = Metrics(versions)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        watcher = asyncio.create_task(versions.watch(settings.poll_seconds))
        try:
            yield
        finally:
            watcher.cancel()
            await versions.close()

    app = FastAPI(title="Sailyard endpoint", lifespan=lifespan, docs_url=None, redoc_url=None)
    _errors(app)
    _open_routes(app, versions, metrics)
    _chat_routes(app, settings, versions, metrics)
    return app


def _errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> JSONResponse:
        headers = {"Retry-After": "1"} if error.status in (429, 503) else None
        return JSONResponse(error.body(), error.status, headers=headers)

    @app.exception_handler(HTTPException)
    async def not_a_route(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return JSONResponse(
            ApiError(message, status=error.status_code, code="not_found").body(), error.status_code
        )

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(
            ApiError("internal error, see the server's log", status=500, code="internal").body(),
            500,
        )


def _open_routes(app: FastAPI, versions: Versions, metrics: Metrics) -> None:
    @app.get("/health")
    async def health() -> JSONResponse:
        """Alive? A version whose engine has died is not."""
        served = versions.current
        alive = served is None or served.engine.alive
        return JSONResponse({"status": "ok" if alive else "engine stopped"}, 200 if alive else 503)

    @app.get("/ready")
    async def ready() -> JSONResponse:
        """Is a version loaded, and which."""
        status = versions.status()
        return JSONResponse(status, 200 if status["ready"] else 503)

    @app.get("/metrics")
    async def figures() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)


def _chat_routes(
    app: FastAPI, settings: ServingSettings, versions: Versions, metrics: Metrics
) -> None:
    preparers = CapacityLimiter(_PREPARERS)
    guarded = [Depends(_key_check(settings))]

    def listed(served: Served) -> list[dict[str, Any]]:
        common = {"object": "model", "created": int(served.since), "owned_by": "sailyard"}
        limits = {"max_model_len": served.context, "root": served.name, "digest": served.digest}
        names = dict.fromkeys((settings.alias, served.name))
        return [{"id": name, **common, **limits} for name in names]

    @app.get("/v1/models", dependencies=guarded)
    async def models() -> dict[str, Any]:
        served = versions.current
        return {"object": "list", "data": listed(served) if served else []}

    @app.get("/v1/models/{name}", dependencies=guarded)
    async def model(name: str) -> dict[str, Any]:
        served = versions.current
        for entry in listed(served) if served else []:
            if entry["id"] == name:
                return entry
        raise _unknown_model(name, settings, served)

    @app.post("/admin/reload", dependencies=guarded)
    async def reload(request: Request) -> JSONResponse:
        """Look the alias up now. Only from this machine."""
        if not _is_loopback(request):
            raise ApiError("/admin is open to this machine only", status=403, code="forbidden")
        changed = await versions.refresh()
        return JSONResponse(
            {"changed": changed, **versions.status()}, 500 if versions.last_error else 200
        )

    @app.post("/v1/chat/completions", dependencies=guarded)
    async def completions(request: Request) -> Response:
        started = time.perf_counter()
        try:
            response = await _complete(request, started, settings, versions, metrics, preparers)
        except ApiError as error:
            metrics.requests.labels(str(error.status)).inc()
            raise
        metrics.requests.labels("200").inc()
        return response


async def _complete(
    request: Request,
    started: float,
    settings: ServingSettings,
    versions: Versions,
    metrics: Metrics,
    preparers: CapacityLimiter,
) -> Response:
    asked = _parse(await _body(request, settings))
    try:
        served = versions.lease()
    except NothingServed as error:
        raise ApiError(str(error), status=503, code="no_model") from error
    exchange: chat.Exchange | None = None

    def done() -> None:
        versions.release(served)
        if exchange is not None:
            exchange.ticket.cancel()
            _count(exchange, metrics)

    try:
        if asked.model not in (settings.alias, served.name):
            raise _unknown_model(asked.model, settings, served)
        prompt = await to_thread.run_sync(chat.prepare, asked, served, settings, limiter=preparers)
        exchange = chat.begin(prompt, served, started)
        if asked.stream:
            usage = bool(asked.stream_options and asked.stream_options.include_usage)
            return _Stream(chat.streamed(exchange, usage), done)
        reply = await _unless_gone(request, chat.whole(exchange))
    except BaseException:
        done()
        raise
    done()
    return JSONResponse(reply)


async def _unless_gone(request: Request, work: Awaitable[dict[str, Any]]) -> dict[str, Any]:
    """Wait for the reply, but not for a client that has hung up."""
    reply = asyncio.ensure_future(work)

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    hung_up = asyncio.create_task(gone())
    try:
        await asyncio.wait({reply, hung_up}, return_when=asyncio.FIRST_COMPLETED)
        if not reply.done():
            raise ApiError("the client hung up", status=499, code="client_closed_request")
        return reply.result()
    finally:
        reply.cancel()
        hung_up.cancel()


def _count(exchange: chat.Exchange, metrics: Metrics) -> None:
    metrics.prompt_tokens.inc(exchange.prompt.num_tokens)
    metrics.completion_tokens.inc(exchange.num_tokens)
    if exchange.first_token_at is not None:
        metrics.first_token_seconds.observe(exchange.first_token_at - exchange.started)
    if exchange.finish is not None:
        metrics.request_seconds.observe(time.perf_counter() - exchange.started)


async def _body(request: Request, settings: ServingSettings) -> bytes:
    too_large = ApiError(
        f"the body is larger than {settings.max_body_bytes} bytes; send fewer or smaller images",
        status=413,
        code="body_too_large",
    )
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > settings.max_body_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(settings.body_seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > settings.max_body_bytes:
                    raise too_large
    except TimeoutError as error:
        raise ApiError("the body did not arrive in time", status=408, code="timeout") from error
    return bytes(body)


def _parse(body: bytes) -> ChatRequest:
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        # "Text or list of parts" reports both readings; the longest path is the one meant.
        first = max(error.errors(include_url=False), key=lambda found: len(found["loc"]))
        where = _path(body, first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise ApiError(f"{where}: {message}" if where else message, param=where or None) from error


def _path(body: bytes, loc: tuple[int | str, ...]) -> str:
    """Where in the body, as in messages[0].content[1].text.

    pydantic's path also names the types it tried; only the steps that the body really has (and a
    missing last one) are kept.
    """
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    path = ""
    for depth, step in enumerate(loc):
        if isinstance(step, int) and isinstance(data, list) and step < len(data):
            data = data[step]
            path += f"[{step}]"
        elif isinstance(data, dict) and (step in data or depth == len(loc) - 1):
            data = data.get(step)
            path += f".{step}" if path else str(step)
    return path


def _unknown_model(name: str, settings: ServingSettings, served: Served | None) -> ApiError:
    names = dict.fromkeys((settings.alias, served.name)) if served else {}
    known = " or ".join(map(repr, names)) or "nothing yet"
    return ApiError(
        f"no model {name!r} here; this server has {known}",
        status=404,
        code="model_not_found",
        param="model",
    )


def _key_check(settings: ServingSettings) -> Callable[[Request], None]:
    def check(request: Request) -> None:
        if settings.api_key is None:
            return
        wanted = f"Bearer {settings.api_key.get_secret_value()}"
        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), wanted.encode()):
            raise ApiError(
                "missing or wrong API key; send it as 'Authorization: Bearer <key>'",
                status=401,
                code="invalid_api_key",
            )

    return check


def _is_loopback(request: Request) -> bool:
    try:
        return request.client is not None and ipaddress.ip_address(request.client.host).is_loopback
    except ValueError:
        return False
