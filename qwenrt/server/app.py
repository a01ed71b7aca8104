"""The ASGI application around a loaded model: its routes, and whatever goes wrong as a body of the dialect in use."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from qwenrt.server.admission import Admission
from qwenrt.server.guard import Guard
from qwenrt.server.health import Health
from qwenrt.server.metrics import Metrics
from qwenrt.server.problems import rendered, response
from qwenrt.server.routes import routes
from qwenrt.server.service import Service
from qwenrt.server.settings import ServeSettings
from qwenrt.server.streams import ClientGone
from qwenrt.server.writing import Writing, problem_of
from qwenrt.text.dialects.problem import Problem

if TYPE_CHECKING:
    from qwenrt.llm import LLM


class Server:
    """An ASGI application that serves one LLM. `app` makes it.

    The LLM stays the caller's: it is not closed when the server ends. ``health`` and ``service`` are for whoever runs
    it. May be mounted in another application.
    """

    def __init__(self, llm: LLM, settings: ServeSettings) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.admission = Admission(settings, slots=llm.max_num_seqs)
        self.service = Service(llm, settings, self.admission, self.metrics)
        self.writing = Writing(self.service)
        self.health = Health(llm, settings)
        self._app: ASGIApp = Guard(self._starlette(), settings, rendered)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)

    def _starlette(self) -> Starlette:
        return Starlette(
            routes=routes(self),
            exception_handlers={
                Problem: _problem,
                HTTPException: _http_error,
                ClientGone: _nobody,
                Exception: _unforeseen,
            },
            lifespan=self._lifespan,
        )

    @asynccontextmanager
    async def _lifespan(self, _: Any) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await self.writing.kept.close()


def app(
    llm: LLM, settings: ServeSettings | None = None, *, api_keys: Iterable[str] = (), **choices: Any
) -> Server:
    """An ASGI application around a loaded model: mount it, test it in-process, or run it with uvicorn.

    settings: a ServeSettings, or its fields as keywords. api_keys: texts; without any, no request needs a key.
    Raises ConfigError.
    """
    if settings is None:
        settings = ServeSettings(api_keys=tuple(api_keys), **choices)
    return Server(llm, settings)
