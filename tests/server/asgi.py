"""One request to an ASGI application in this process, its client in the hands of the test."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote


class Exchange:
    """A request and what came of it. ``body``: bytes, or what becomes JSON; None for none.

    ``at_send`` is called with each message before it is taken, and may raise as a server's send does, or hang up. Where
    the body ``ends`` not, more of it never comes.
    """

    def __init__(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
        at_send: Callable[[Exchange, dict[str, Any]], object] = lambda exchange, message: None,
        ends: bool = True,
    ) -> None:
        self._ends = ends
        self._raw: bytes | None
        self.body_given = self._raw = (
            b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        )
        self.method, self.headers_given = method, headers or {}
        given = {"host": "localhost", "content-length": str(len(self.body_given)), **self.headers_given}
        plain, _, query = path.partition("?")
        self.scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": unquote(plain),
            "raw_path": plain.encode("utf-8", "replace"),
            "query_string": query.encode(),
            "root_path": "",
            "headers": [(name.encode(), value.encode("latin-1")) for name, value in given.items()],
            "client": ("127.0.0.1", 50000),
            "server": ("127.0.0.1", 8000),
        }
        self._gone, self._at_send = asyncio.Event(), at_send
        self.sent: list[dict[str, Any]] = []

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"]) if self.sent else 0

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode("latin-1") for name, value in self.sent[0]["headers"]}

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent[1:])

    @property
    def whole(self) -> bool:
        """Whether the answer has its end."""
        return bool(self.sent) and not self.sent[-1].get("more_body", self.sent[-1]["type"].endswith("start"))

    @property
    def left(self) -> bool:
        return self._gone.is_set()

    def hang_up(self) -> None:
        self._gone.set()

    async def receive(self) -> dict[str, Any]:
        if self._raw is not None:
            raw, self._raw = self._raw, None
            return {"type": "http.request", "body": raw, "more_body": not self._ends}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        self._at_send(self, message)
        self.sent.append(message)
        for _ in range(3):  # as a server's does that waits for its client: others have a turn
            await asyncio.sleep(0)

    async def run(self, app: Any) -> Exchange:
        await app(self.scope, self.receive, self.send)
        return self


async def asked(app: Any, method: str, path: str, body: Any = None, **headers: str) -> Exchange:
    """The answer to one request."""
    return await Exchange(method, path, body, headers).run(app)
