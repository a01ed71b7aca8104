"""The guard before every route: ids, paths, hosts, origins, keys and sizes, in that order.

ASGI through and through, so that a stream's pieces pass it without a task or a queue of their own.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from qwenrt.errors import shown
from qwenrt.server.failures import log_failure
from qwenrt.server.gates import (
    Headers,
    Hosts,
    Origins,
    coded,
    declared_length,
    plain_path,
    presented_keys,
    request_id,
    values,
    with_defaults,
)
from qwenrt.server.keys import HIGHEST_PRIORITY, Keyring
from qwenrt.server.settings import ServeSettings
from qwenrt.text.dialects.problem import Problem

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Render = Callable[[Problem, str, str], tuple[int, Sequence[tuple[bytes, bytes]], bytes]]

log = logging.getLogger("qwenrt.server")
access = logging.getLogger("qwenrt.server.access")

_OPEN = {
    ("GET", "/health"),
    ("HEAD", "/health"),
    ("GET", "/ready"),
    ("HEAD", "/ready"),
    ("GET", "/"),
    ("HEAD", "/"),
}
_WATCHED = ("/health", "/ready", "/metrics")  # asked again and again by monitors
_MOST_BODIES = 32  # of the largest size, at the same time: each waits in memory for its turn
_DEFAULTS = {
    b"x-content-type-options": b"nosniff",
    b"cache-control": b"no-store",
    b"referrer-policy": b"no-referrer",
    b"x-frame-options": b"DENY",
}


class Guard:
    """An ASGI app before another one.

    What passes has, in ``scope["state"]``: ``request_id``; ``caller``, a name for the key that was presented ("" where
    there are none), for salts, turns and what is kept for somebody; ``max_priority``, the highest that its requests
    may have; ``administers``, whether it may load and unload adapters. ``render`` writes a Problem in the dialect of a
    path, for the request of an id -> (status, headers, body). ``denied`` is told the status of each request that ends
    here.
    """

    def __init__(
        self,
        app: App,
        settings: ServeSettings,
        keyring: Keyring,
        render: Render,
        *,
        denied: Callable[[int], object] = lambda status: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._denied = denied
        self.app, self._settings, self._keyring, self._render, self._clock = (
            app,
            settings,
            keyring,
            render,
            clock,
        )
        self._hosts, self._origins = Hosts(settings), Origins(settings)
        self._denials = _Denials(clock)
        self._bodies = _Bodies(_MOST_BODIES * settings.max_body)

    def reload(self) -> int:
        """Read the key file again -> how many keys there are. Raises ConfigError, and those from before stay."""
        return self._keyring.reload()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        headers: Headers = scope["headers"]
        state = scope.setdefault("state", {})
        state["request_id"] = request_id(headers)
        state["caller"], state["max_priority"] = "", self._settings.max_priority
        state["administers"] = not self._keyring
        cors = self._origins.headers(headers)
        exchange = _Exchange(scope, receive, send, self._settings.max_body, cors, self._bodies)
        began = self._clock()
        try:
            if not await self._refused(scope, headers, exchange):
                await self._served(scope, exchange)
        finally:
            self._bodies.held -= exchange.held
            level = logging.DEBUG if scope["path"] in _WATCHED else logging.INFO
            if access.isEnabledFor(level):
                path, seconds = shown(scope["path"], 200), self._clock() - began
                said = state["request_id"], scope["method"], path, exchange.status or "-", seconds
                access.log(level, "%s %s %s %s in %.3f s", *said)

    async def _served(self, scope: Scope, exchange: _Exchange) -> None:
        try:
            await self.app(scope, exchange.receive, exchange.send)
        except Exception as error:
            if isinstance(error, Problem) and exchange.overrun:
                await self._refuse(scope, error, exchange)
                return
            log_failure(scope["state"]["request_id"], error, self._settings.log_prompts)
            if exchange.status is not None:
                if not exchange.complete:
                    raise _Broken from None
                return
            await self._refuse(scope, Problem.of(error), exchange)

    async def _refused(self, scope: Scope, headers: Headers, exchange: _Exchange) -> bool:
        """Whether a request ends here; what it asks for is not looked at."""
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        method = scope["method"]
        preflight = self._origins.preflight(headers) if method == "OPTIONS" else None
        if not plain_path(scope["path"]):
            problem, status = Problem("not_found", "There is nothing at this path."), 404
        elif not self._hosts.known(headers):
            problem, status = _of_host(headers), 403
        elif self._origins.refused(method, headers):
            problem, status = _of_origin(headers), 403
        elif preflight is not None:
            await exchange.respond(204, preflight, b"")
            return True
        elif (method, path) not in _OPEN and not self._has_key(scope, headers):
            problem, status = _of_key(headers), 401
        elif sum(len(name) + len(value) + 4 for name, value in headers) > self._settings.max_header:
            found = f"The request's header has more than {self._settings.max_header} bytes."
            problem, status = Problem("invalid_request", found), 431
        elif values(headers, b"transfer-encoding") and values(headers, b"content-length"):
            found = "The request says the length of its body in two ways. Send one."  # a proxy may believe the other
            problem, status = Problem("invalid_request", found), 400
        elif coded(headers):
            found = "The request's body is compressed. Send it as it is, without Content-Encoding."
            problem, status = Problem("invalid_request", found), 415
        elif (declared_length(headers) or 0) > self._settings.max_body:
            problem, status = too_large(self._settings.max_body), 413
        else:
            return False
        self._denied(status)
        await self._refuse(scope, problem, exchange, status)
        return True

    def _has_key(self, scope: Scope, headers: Headers) -> bool:
        """Whether a request has a key where one is needed; writes down whose it is."""
        if not self._keyring:
            return True
        key = self._keyring.find(presented_keys(headers))
        if key is None:
            self._denials.add(scope.get("client"))
            return False
        state = scope["state"]
        state["caller"], state["administers"] = key.caller, key.admin
        state["max_priority"] = min(key.priority, state["max_priority"], HIGHEST_PRIORITY)
        return True

    async def _refuse(
        self, scope: Scope, problem: Problem, exchange: _Exchange, status: int | None = None
    ) -> None:
        usual, headers, body = self._render(problem, scope["path"], scope["state"]["request_id"])
        asks = {b"www-authenticate": b'Bearer realm="qwenrt"'} if problem.kind == "unauthorized" else {}
        await exchange.respond(status or usual, with_defaults(headers, asks), body)


class _Broken(Exception):
    """An answer cannot be ended as it was begun, so its connection has to be closed; why is in the log."""


class _Bodies:
    """The bodies of all requests that are here, in bytes."""

    def __init__(self, most: int) -> None:
        self.most, self.held = most, 0


class _Exchange:
    """One request and its answer, as they pass: counts the body, completes the headers."""

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, limit: int, cors: Headers, bodies: _Bodies
    ) -> None:
        self._receive, self._send, self._limit, self._cors = receive, send, limit, list(cors)
        self._bodies, self.held = bodies, 0
        self._request_id = scope["state"]["request_id"].encode()
        self._headers: Headers = scope["headers"]
        self._length = declared_length(self._headers)
        self._came, self._whole = 0, self._length == 0
        self.overrun = self.complete = False
        self.status: int | None = None

    async def receive(self) -> Message:
        """The next message of the client; raises Problem where its body has become too large."""
        message = await self._receive()
        if message["type"] == "http.request":
            self._came += len(message.get("body", b""))
            self._whole = not message.get("more_body", False)
            if self._came > self._limit:
                self.overrun = True
                raise too_large(self._limit)
            self.held += len(message.get("body", b""))
            self._bodies.held += len(message.get("body", b""))
            if self._bodies.held > self._bodies.most:
                self.overrun = True
                raise _too_many(self._bodies.most)
        return message

    async def send(self, message: Message) -> None:
        """A message to the client, its headers completed."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            defaults = {**_DEFAULTS, b"x-request-id": self._request_id}
            if self.overrun:  # whoever writes the answer, the rest of the body is not waited for
                defaults[b"connection"] = b"close"
            message = {
                **message,
                "headers": with_defaults([*message.get("headers", ()), *self._cors], defaults),
            }
        await self._send(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self.complete = True

    async def respond(self, status: int, headers: Headers, body: bytes) -> None:
        """The whole answer to a request that ends at the guard, if none was begun. Where there is more of its body, the
        connection is closed, but not at once: a client that writes first and reads then would find it reset instead
        of an answer."""
        if self.status is not None:
            raise _Broken
        head = with_defaults(headers, {b"content-length": str(len(body)).encode()} if status != 204 else {})
        if self._whole:
            await self.send({"type": "http.response.start", "status": status, "headers": head})
            await self.send({"type": "http.response.body", "body": body, "more_body": False})
            return
        head = with_defaults(head, {b"connection": b"close"})
        await self.send({"type": "http.response.start", "status": status, "headers": head})
        await self.send({"type": "http.response.body", "body": body, "more_body": True})
        came = 0
        while not values(self._headers, b"expect") and came <= self._limit:
            message = await self._receive()
            came += len(message.get("body", b""))
            if message["type"] != "http.request" or not message.get("more_body", False):
                break
        await self.send({"type": "http.response.body", "body": b"", "more_body": False})


class _Denials:
    """The log of requests without a key: one line a second, however many there are."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._said, self._count = clock, float("-inf"), 0

    def add(self, client: Any) -> None:
        self._count += 1
        now = self._clock()
        if now - self._said >= 1:
            address = client[0] if client else "nowhere"
            log.warning("%d requests without a valid key, the last from %s", self._count, shown(address))
            self._said, self._count = now, 0


def too_large(limit: int) -> Problem:
    """The problem of a body that is larger than ``limit`` bytes."""
    return Problem(
        "too_large", f"The request's body has more than {limit} bytes. Send less, or start with --max-body."
    )


def _too_many(most: int) -> Problem:
    found = f"The bodies of the requests that are here have {most} bytes together, as many as they may."
    return Problem("unavailable", f"{found} Come again in a moment.", retry_after=1)


def _of_host(headers: Headers) -> Problem:
    name = shown(b", ".join(values(headers, b"host")).decode("latin-1"))
    return Problem(
        "forbidden", f"This server is not known as {name}. Start it with --allow-host and that name."
    )


def _of_origin(headers: Headers) -> Problem:
    name = shown(b", ".join(values(headers, b"origin")).decode("latin-1") or "another site")
    return Problem(
        "forbidden", f"Pages of {name} may not use this server. Start it with --allow-origin for them."
    )


def _of_key(headers: Headers) -> Problem:
    found = "is not one of this server's" if presented_keys(headers) else "is missing"
    return Problem(
        "unauthorized", f"The API key {found}. Send it as `Authorization: Bearer KEY` or `x-api-key: KEY`."
    )
