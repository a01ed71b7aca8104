"""The server's tests. It runs in threads of its own, which may open no connection, no program and no file to write."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

SERVER_THREAD = "qwenrt-server"  # the names of threads in which the server's own code runs begin so
ENGINE_THREAD = "qwenrt-engine"

_CONNECTING = (
    "socket.connect",
    "socket.sendto",
    "socket.sendmsg",
)  # not even to this machine; see tests/every_process
_PROGRAMS = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.posix_spawn",
    "os.spawn",
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC


class Outside:
    """What the server tried that it must not, as an audit hook saw it."""

    def __init__(self) -> None:
        self.tried: list[str] = []
        self.may_write: list[str] = []  # where a test's server keeps something, such as prefixes
        self.watching = False
        sys.addaudithook(self._see)  # there is no way to take one back, so there is one

    def _see(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.watching:
            return
        if not threading.current_thread().name.startswith((SERVER_THREAD, ENGINE_THREAD)):
            return
        if event in _CONNECTING:
            self._no(f"{event} {args[1]!r}")
        elif event in _PROGRAMS:
            self._no(f"{event} {args[0]!r}")
        elif event == "open" and isinstance(args[2], int) and args[2] & _WRITING:
            path = str(args[0])
            own = "__pycache__" in path or path == os.devnull  # Python's, of modules imported late
            if not (own or path.startswith(tuple(self.may_write))):
                self._no(f"open {path!r} to write")

    def _no(self, what: str) -> None:
        self.tried.append(what)
        raise PermissionError(f"no part of the server may do this: {what}")


_OUTSIDE = Outside()


@pytest.fixture(autouse=True)
def outside() -> Iterator[Outside]:
    """Watches each test of this directory. A test whose server keeps files somewhere adds that to ``may_write``; one
    that shows the watch itself clears ``tried``."""
    _OUTSIDE.tried.clear()
    _OUTSIDE.may_write.clear()
    _OUTSIDE.watching = True
    yield _OUTSIDE
    _OUTSIDE.watching = False
    assert not _OUTSIDE.tried
