"""From a bound socket to exit code 0: starts uvicorn, and ends it in order when a signal comes."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal

import uvicorn

from qwenrt.errors import ConfigError, QwenrtError
from qwenrt.server.protocols import Limits, protocol_class
from qwenrt.server.settings import ServeSettings

log = logging.getLogger("qwenrt.server")
accepting = logging.getLogger("qwenrt.server.accepting")

_STOPPING = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGBREAK") if hasattr(signal, name)
)
_RELOADING = getattr(signal, "SIGHUP", None)
_TICKS_A_SECOND = 10  # of uvicorn's main loop
_AFTER_ABORT = 5.0  # seconds that aborted answers have to say so
_BACKLOG = 2048  # connections that the system keeps until they are accepted
_ACCEPTED_AT_ONCE = 128  # by the event loop
_OTHER_DESCRIPTORS = 256  # a model's files, the loop's own, libraries'


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class Hooks:
    """What happens to the server, for those who have something to do then. All are called on the event loop, but
    ``closing``, which a signal's handler calls: it may set a flag and no more.

    started: requests are accepted. look: about once a second. closing: a signal came, the server is not ready from now
    on. drain: new work is refused. abort: what still runs is to end now, with the event that says so. reload: SIGHUP.
    """

    started: Callable[[], object] = _nothing
    look: Callable[[], object] = _nothing
    closing: Callable[[], object] = _nothing
    drain: Callable[[], object] = _nothing
    abort: Callable[[], object] = _nothing
    reload: Callable[[], object] = _nothing


def bind(settings: ServeSettings) -> list[socket.socket]:
    """The sockets that the server will listen at, not listening yet. Raises ConfigError in one sentence: in use, not
    this machine's, not permitted. For localhost there may be two, of both kinds of address."""
    hosts = ["127.0.0.1", "::1"] if settings.host == "localhost" else [settings.host]
    bound: list[socket.socket] = []
    for host in hosts:
        port = bound[0].getsockname()[1] if bound else settings.port
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            bound.append(_bound(family, host, port))
        except OSError as error:
            if bound:  # ::1 where this machine has no such address, or somebody else has its port
                log.info("not listening at ::1: %s", error.strerror)
                continue
            raise _cannot_bind(host, port, error) from error
    return bound


def _bound(family: socket.AddressFamily, host: str, port: int) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        # elsewhere than on Windows, ports of the dead can be taken
        if hasattr(socket, "SO_EXCLUSIVEADDRUSE"):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6 and host == "::1":
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((host, port))
        return sock
    except BaseException:
        sock.close()
        raise


def _cannot_bind(host: str, port: int, error: OSError) -> ConfigError:
    known = {
        errno.EADDRINUSE: (
            "another program has this port",
            "Stop it, or choose another port with --port (0 takes a free one).",
        ),
        errno.EADDRNOTAVAIL: (
            "this machine has no such address",
            "Use 127.0.0.1, or 0.0.0.0 for all that it has.",
        ),
        errno.EACCES: (
            "this user may not have this port",
            "Choose one of 1024 or above with --port.",
        ),
    }
    found, remedy = known.get(
        error.errno or 0, (error.strerror or str(error), "Choose another address or port.")
    )
    return ConfigError(f"listening at {host}, port {port}", found, remedy)


class Server(uvicorn.Server):
    """uvicorn's server with another end.

    The first SIGTERM or SIGINT: not ready at once, new work refused, what runs may end within ``settings.drain``; then
    it is aborted; then the connections are closed. The next one: all of this now. uvicorn would raise the signal again
    at the end, and the process would die of it; here it exits with 0.
    """

    def __init__(self, config: uvicorn.Config, settings: ServeSettings, hooks: Hooks) -> None:
        super().__init__(config)
        self._settings, self._hooks = settings, hooks
        self._stopping = self._reloading = False
        self._leaves_at: float | None = None
        self._aborted = False

    def stop(self) -> None:
        """As the first signal does; from any thread."""
        if not self._stopping:
            self._stopping = True
            self._hooks.closing()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal's handler."""
        if sig == _RELOADING:
            self._reloading = True
        elif self._stopping:
            self.should_exit = self.force_exit = True
        else:
            self.stop()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:  # type: ignore[override]
        """Within the block signals are ours."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        taken = _STOPPING if _RELOADING is None else (*_STOPPING, _RELOADING)
        before = {sig: signal.signal(sig, self.handle_exit) for sig in taken}
        try:
            yield
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept."""
        await super().startup(sockets=sockets)
        _accept_calmly(sockets or ())
        self._hooks.started()

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second -> whether the main loop ends."""
        if self._reloading:
            self._reloading = False
            _reload(self._hooks.reload)
        if counter % _TICKS_A_SECOND == 0:
            self._hooks.look()
        return await super().on_tick(counter) or (self._stopping and self._drained(time.monotonic()))

    def _drained(self, now: float) -> bool:
        """One more look at the end: whether nothing runs any more, or it has had its time."""
        if self._leaves_at is None:
            self._leaves_at = now + self._settings.drain
            if running := len(self._tasks()):
                log.info("stopping: %d requests may end within %g s", running, self._settings.drain)
            self._hooks.drain()
        if not self._tasks():
            return True
        if now < self._leaves_at:
            return False
        if self._aborted:
            return True
        self._aborted, self._leaves_at = True, now + _AFTER_ABORT
        log.warning("stopping: %d requests are aborted", len(self._tasks()))
        self._hooks.abort()
        return False

    def _tasks(self) -> set[asyncio.Task[None]]:
        return self.server_state.tasks


def _accept_calmly(sockets: Sequence[socket.socket]) -> None:
    """Where no file descriptor is left for another connection, say so in a line a second.

    asyncio tries again after a second, but first as often as connections may wait, with a traceback for each failure:
    megabytes of them, and a server that stands where nobody reads what it says. So asyncio is told of fewer connections
    than the system keeps.
    """

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        ended = isinstance(error, ValueError) and all(sock.fileno() < 0 for sock in sockets)
        if str(context.get("message")).startswith("socket.accept()"):
            accepting.warning("a connection waits: it cannot be accepted now (%s)", error)
        elif not (
            ended and "file descriptor: -1" in str(error)
        ):  # else it would have tried again after the end
            loop.default_exception_handler(context)

    accepting.addFilter(_ONCE_A_SECOND)
    asyncio.get_running_loop().set_exception_handler(handle)
    for sock in sockets:
        sock.listen(_BACKLOG)


def _reload(reload: Callable[[], object]) -> None:
    try:
        log.info("SIGHUP: %s keys", reload())
    except QwenrtError as error:
        log.error("SIGHUP: the keys stay as they were. %s", error)


def allow_descriptors(connections: int) -> None:
    """Let this process have a file descriptor for each connection, as far as the system lets it."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + _OTHER_DESCRIPTORS
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    if most < wanted:
        log.warning("this process may have %d open files, fewer than %d connections need", most, connections)


class _OnceASecond(logging.Filter):
    """The same warning once a second: strangers cause uvicorn's, as fast as they can send."""

    def __init__(self) -> None:
        super().__init__()
        self._said: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        now = time.monotonic()
        if record.levelno != logging.WARNING or now - self._said.get(record.msg, -1.0) >= 1:
            self._said = {record.msg: now}
            return True
        return False


_ONCE_A_SECOND = _OnceASecond()


def server_of(
    app: Any,
    settings: ServeSettings,
    hooks: Hooks | None = None,
    *,
    parser: Literal["auto", "h11", "httptools"] = "auto",
    loop: str = "auto",
) -> Server:
    """A server for an ASGI app, to be run by `Server.run(sockets)` or, within a running event loop, `Server.serve`."""
    logging.getLogger("uvicorn.error").addFilter(_ONCE_A_SECOND)
    config = uvicorn.Config(
        app,
        http=protocol_class(Limits.of(settings), parser),
        ws="none",
        loop=loop,
        lifespan="auto",
        log_config=None,
        log_level=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # what a stranger's header says of its address is not believed
        backlog=_ACCEPTED_AT_ONCE,
        timeout_keep_alive=65,  # longer than clients keep a connection, so that none meets one just closed
        timeout_graceful_shutdown=2,  # what is left by then had its time
        h11_max_incomplete_event_size=settings.max_header + (64 << 10),  # `protocols` counts, and answers 431
    )
    return Server(config, settings, hooks or Hooks())


def run(
    app: Any,
    settings: ServeSettings,
    hooks: Hooks | None = None,
    *,
    sockets: Sequence[socket.socket] | None = None,
    parser: Literal["auto", "h11", "httptools"] = "auto",
    loop: str = "auto",
) -> None:
    """Serve until a signal ends it, then return. ``sockets``: what `bind` gave, for those who bind before they load a
    model; else they are bound here. Raises ConfigError where that fails."""
    allow_descriptors(settings.max_connections)
    bound = list(sockets) if sockets is not None else bind(settings)
    try:
        server_of(app, settings, hooks, parser=parser, loop=loop).run(sockets=bound)
    finally:
        for sock in bound:
            sock.close()
