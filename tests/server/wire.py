"""A server in a thread of its own, and a client that sends bytes: what tests over sockets need."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from qwenrt.server.lifecycle import Hooks, Server, bind, server_of
from qwenrt.server.settings import ServeSettings
from tests.server.conftest import SERVER_THREAD

PATIENCE = 30.0  # seconds until a test gives up; what it waits for takes milliseconds
STARTS = 200.0  # the same for the start and the end of a process that imports torch


def until(condition: Callable[[], object], patience: float = PATIENCE) -> Any:
    """Wait until something is so, and return it."""
    end = time.monotonic() + patience
    while not (value := condition()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)
    return value


class Serving:
    """A server that runs."""

    def __init__(self, server: Server, port: int) -> None:
        self.server, self.port = server, port
        self.url = f"http://127.0.0.1:{port}"

    def wire(self, sent: bytes = b"", **options: int) -> Wire:
        """A new connection that has sent something."""
        wire = Wire(self.port, **options)
        wire.send(sent)
        return wire

    @property
    def connections(self) -> int:
        return len(self.server.server_state.connections)

    @property
    def tasks(self) -> int:
        return len(self.server.server_state.tasks)


class Wire:
    """One connection, in bytes."""

    def __init__(self, port: int, *, receive_buffer: int = 0) -> None:
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(PATIENCE)
        self.socket.connect(("127.0.0.1", port))
        self.came = b""

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def read_until(self, end: bytes) -> bytes:
        """What came up to and with ``end``; later bytes are kept."""
        while end not in self.came:
            piece = self.socket.recv(65536)
            assert piece, f"closed before {end!r}, after {self.came!r}"
            self.came += piece
        found, _, self.came = self.came.partition(end)
        return found + end

    def response(self) -> tuple[int, dict[str, str], bytes]:
        """One whole response: status, headers, body."""
        head = self.read_until(b"\r\n\r\n").decode("latin-1").split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
        status = int(head[0].split()[1])
        if status < 200:
            return status, headers, b""
        if headers.get("transfer-encoding") == "chunked":
            body = b""
            while (size := int(self.read_until(b"\r\n"), 16)) > 0:
                body += self._exactly(size + 2)[:-2]
            self.read_until(b"\r\n")
            return status, headers, body
        return status, headers, self._exactly(int(headers.get("content-length", "0")))

    def _exactly(self, count: int) -> bytes:
        while len(self.came) < count:
            piece = self.socket.recv(65536)
            assert piece, "closed within a body"
            self.came += piece
        found, self.came = self.came[:count], self.came[count:]
        return found

    def rest(self) -> bytes:
        """All that comes until the other side closes; a reset is an end as well."""
        try:
            while piece := self.socket.recv(65536):
                self.came += piece
        except ConnectionResetError:
            pass
        return self.came

    def ended(self) -> bool:
        """Whether the other side closes without another byte."""
        try:
            return self.socket.recv(1) == b""
        except ConnectionResetError:
            return True

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@contextmanager
def serving(
    app: Any, settings: ServeSettings | None = None, *, hooks: Hooks | None = None, parser: Any = "auto"
) -> Iterator[Serving]:
    """``app`` behind a port of this machine, with uvicorn's ``parser`` and asyncio's own loop, whose connections
    Python's audit hooks see."""
    settings = settings or ServeSettings(port=0, drain=0)
    sockets = bind(settings)
    server = server_of(app, settings, hooks, parser=parser, loop="asyncio")
    failed: list[BaseException] = []

    def serve() -> None:
        try:
            asyncio.run(server.serve(sockets=sockets))
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=serve, name=f"{SERVER_THREAD}-loop", daemon=True)
    thread.start()
    until(lambda: server.started or failed)
    assert not failed, failed
    try:
        yield Serving(server, sockets[0].getsockname()[1])
    finally:
        server.stop()
        thread.join(PATIENCE)
        assert not thread.is_alive()
        for sock in sockets:
            sock.close()
        assert not failed, failed


def request(
    method: str = "GET", path: str = "/", headers: dict[str, str] | None = None, body: bytes | None = None
) -> bytes:
    """A request in bytes."""
    lines = {"host": "localhost", **(headers or {})}
    if body is not None:
        lines.setdefault("content-length", str(len(body)))
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + (body or b"")
