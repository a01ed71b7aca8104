"""The ASGI application around a loaded model: its routes, and whatever goes wrong as a body of the dialect in use."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwenrt.errors import ConfigError, QwenrtError
from qwenrt.files import expanded
from qwenrt.server import (
    about,
    adapter_routes,
    agent_routes,
    dashscope_routes,
    ollama_routes,
    openai_routes,
    retrieval_routes,
)
from qwenrt.server.admission import Admission
from qwenrt.server.guard import Guard
from qwenrt.server.health import Health, Signs
from qwenrt.server.keys import Keyring
from qwenrt.server.lifecycle import Hooks
from qwenrt.server.metrics import Metrics
from qwenrt.server.parts import Parts
from qwenrt.server.problems import rendered
from qwenrt.server.service import Service
from qwenrt.server.settings import ServeSettings
from qwenrt.server.streams import ClientGone
from qwenrt.server.thought_key import thought_key
from qwenrt.server.writing import Writing
from qwenrt.text.dialects.problem import Kind, Problem
from qwenrt.text.dialects.signed_thoughts import SignedThoughts

if TYPE_CHECKING:
    from qwenrt.llm import LLM


class Server:
    """An ASGI application that serves one LLM. `qwenrt.server.app` makes it.

    The LLM stays the caller's: it is not closed when the server ends. May be mounted in another application.
    """

    def __init__(self, llm: LLM, settings: ServeSettings) -> None:
        self.llm, self.settings = llm, settings
        self.admission = Admission(
            llm.options.max_num_seqs, max_queue=settings.max_queue, queue_timeout=settings.queue_timeout
        )
        self.metrics = Metrics(llm.stats, self._queue)
        self.service = Service(llm, settings, self.admission, self.metrics)
        self.writing = Writing(self.service)
        self.health = Health(self._signs, settings.watchdog)
        self.health.loaded()
        thoughts = SignedThoughts(thought_key(_path(llm.options.prefix_store)))
        self._parts = Parts(settings, self.service, self.writing, self.health, thoughts)
        named = Named(self._starlette(), self.service.names[0])
        self._guard = Guard(named, settings, Keyring(settings), rendered, denied=self.metrics.denied)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._guard(scope, receive, send)

    def hooks(self, started: Any) -> Hooks:
        """What this application does when the program around it is stopped. ``started``: called when it can be
        asked."""

        def ready() -> None:
            threading.Thread(target=self._build_grammars, name="qwenrt-grammars", daemon=True).start()
            started()

        return Hooks(
            started=ready,
            look=self.health.look,
            closing=self.health.close,
            drain=self.admission.drain,
            abort=self._abort,
            reload=self._guard.reload,
        )

    def _build_grammars(self) -> None:
        with suppress(QwenrtError):  # without llguidance, or closed meanwhile: who asks for a grammar is told
            self.llm.build_grammars()

    def _abort(self) -> None:
        self.admission.abandon()
        for running in list(self.service.running.values()):
            running.cancel()

    def _queue(self) -> tuple[int, int]:
        figures = self.admission.figures()
        return figures.waiting, figures.waiting_tokens

    def _signs(self) -> Signs:
        failure = self.llm.failure
        if failure is not None:
            return Signs(False, str(failure))
        stats = self.llm.stats()
        return Signs(True, has_work=stats["pending"], steps=stats["steps"])

    def _starlette(self) -> Starlette:
        routes = [
            *about.routes(self._parts),
            *openai_routes.routes(self._parts),
            *agent_routes.routes(self._parts),
            *retrieval_routes.routes(self._parts),
            *dashscope_routes.routes(self._parts),
            *ollama_routes.routes(self._parts),
            *adapter_routes.routes(self._parts),
        ]
        handlers: Any = {
            Problem: _problem,
            HTTPException: _http_error,
            ClientGone: _nobody,
            ClientDisconnect: _nobody,
            Exception: self._unforeseen,
        }
        return Starlette(routes=routes, exception_handlers=handlers, lifespan=self._lifespan)

    async def _unforeseen(self, request: Request, error: Exception) -> Response:
        return await _problem(request, self.writing.problem_of(request.scope["state"]["request_id"], error))

    @asynccontextmanager
    async def _lifespan(self, _: Any) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await self.writing.kept.close()


class Named:
    """An ASGI application whose every answer says, in `x-qwenrt-model`, which model there is behind it."""

    def __init__(self, inner: ASGIApp, name: str) -> None:
        self._inner = inner
        self._header = b"x-qwenrt-model", name.encode("ascii", "backslashreplace")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), self._header]}
            await send(message)

        await self._inner(scope, receive, named)


def _path(directory: str | PathLike[str] | None) -> Path | None:
    return None if directory is None else expanded(directory, ConfigError)


_KINDS: dict[int, Kind] = {404: "not_found", 405: "method_not_allowed"}


async def _problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, Problem)
    status, headers, body = rendered(error, request.url.path, request.scope["state"]["request_id"])
    response = Response(body, status)
    response.raw_headers += list(headers)
    return response


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kind = _KINDS.get(error.status_code, "invalid_request")
    found = f"{request.method} {request.url.path[:200]} is not served here. /openapi.json lists what is."
    response = await _problem(request, Problem(kind, found))
    for name, value in (error.headers or {}).items():
        response.headers[name] = value
    return response


async def _nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=499)
