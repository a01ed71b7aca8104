"""What the engine's thread runs: it takes what was submitted, computes, and hands out what came of it."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import os
import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

import torch

from qwenrt.engine.bridge import Bridge
from qwenrt.engine.engine import Engine
from qwenrt.engine.output_processor import RequestOutput
from qwenrt.engine.prefills import Prefills
from qwenrt.engine.requests import Request
from qwenrt.errors import BackendError, QwenrtError, RequestError
from qwenrt.outputs import Delta

logger = logging.getLogger("qwenrt")

_CLOSE_TIMEOUT = 2.0  # seconds a close waits for a step that is being computed
# Seconds that the interpreter's exit waits: a thread that is torn out of torch's code aborts the process.
_EXIT_TIMEOUT = 30.0
_IDLE = 0.0005  # seconds between two bits of work for which nobody waits


class Sink(Protocol):
    """Takes a request's outputs, in the engine's thread: it must not wait."""

    def put(self, output: RequestOutput, /) -> None: ...


@dataclass(frozen=True)
class Add:
    request: Request
    sink: Sink


@dataclass(frozen=True)
class Abort:
    request_id: str


@dataclass(frozen=True)
class EndThought:
    request_id: str


@dataclass(frozen=True)
class Compute:
    work: Callable[[Prefills], torch.Tensor]
    result: Future[torch.Tensor]


class _Wake:
    """Nothing to do but look whether the loop is to end, or anything waits for an idle moment."""


Message = Add | Abort | EndThought | Compute | _Wake


class Loop:
    """What the thread runs. It knows the engine and the sinks, not the AsyncEngine, which may be collected."""

    def __init__(self, engine: Engine, check: Callable[[], None]) -> None:
        self.pid, self._check = os.getpid(), check
        self.inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        # Guards `ended`: nothing is put for a loop that no longer reads. Re-entrant, as a collection may close
        # another engine, or this one, from anywhere.
        self.lock = threading.RLock()
        self.ended: QwenrtError | None = None
        self._engine: Engine | None = engine
        self._stop = threading.Event()
        self._exiting = False
        self._sinks: dict[str, Sink] = {}
        self._touched: set[Bridge] = set()  # by this step
        self._bridges: weakref.WeakValueDictionary[int, Bridge] = weakref.WeakValueDictionary()
        self.thread = threading.Thread(target=self.run, name="qwenrt-engine", daemon=True)

    def bridge_to(self, event_loop: asyncio.AbstractEventLoop) -> Bridge:
        """The one to this event loop, for as long as a request uses it."""
        with self.lock:
            bridge = self._bridges.get(id(event_loop))
            if bridge is None:  # its event loop lives as long as it does: no other can have the id
                bridge = Bridge(
                    event_loop, self._touched, lambda request_id: self.inbox.put(Abort(request_id))
                )
                self._bridges[id(event_loop)] = bridge
            return bridge

    def put(self, message: Add | Compute) -> None:
        """Hand the loop some work; raises what ended it where it has ended."""
        if os.getpid() != self.pid:
            raise forked()
        with self.lock:
            if self.ended is not None:
                raise again(self.ended)
            if self._exiting and not threading.current_thread().daemon:
                raise closed()
            if isinstance(message, Add):
                self._sinks[message.request.request_id] = message.sink
            self.inbox.put(message)

    def wake(self) -> None:
        """Let it look, at once, whether anything waits for an idle moment."""
        self.inbox.put(_Wake())

    def run(self) -> None:
        error: QwenrtError = closed()
        try:
            while not self._stop.is_set():
                self._turn()
        except QwenrtError as cause:
            error = cause
        except BaseException as cause:
            error = died(cause)
        if not self._exiting:
            self.end(error)
        if self._engine is not None:
            self._engine.close()
        self._engine = None

    def stop(self) -> None:
        """End the loop: running requests fail, the thread is waited for, though not for ever."""
        if os.getpid() != self.pid:
            return
        if self._exiting:
            return
        self._halt(_CLOSE_TIMEOUT)
        self.end(closed())

    def leave(self) -> None:
        """End the loop at the interpreter's exit, when only daemon threads are left: who waits is told nothing and ends
        with the process, where an error would be printed for each."""
        if os.getpid() == self.pid and self.ended is None:
            self._exiting = True
            self._halt(_EXIT_TIMEOUT)

    def _halt(self, timeout: float) -> None:
        self._stop.set()
        self.wake()
        if self.thread.is_alive() and self.thread is not threading.current_thread():
            self.thread.join(timeout)

    def end(self, error: QwenrtError) -> None:
        """Nothing is taken any more, and whoever waits is told why."""
        with self.lock:
            if self.ended is None:
                self.ended = error
        while True:
            try:
                message = self.inbox.get_nowait()
            except queue.Empty:
                break
            if isinstance(message, Compute) and message.result.set_running_or_notify_cancel():
                message.result.set_exception(error)
        for request_id, sink in list(self._sinks.items()):
            sink.put(RequestOutput(request_id, Delta("", finish_reason="error"), True, error))
        self._sinks.clear()
        self._flush()

    def _turn(self) -> None:
        """Take what was submitted, waiting only when there is nothing to compute; then one step."""
        engine = self._engine
        assert engine is not None
        if not engine.has_work:
            message = self._awaited(engine)
            engine.accounts.move()
            self._take(engine, message)
        # what comes meanwhile waits for a step, or steps would wait for ever
        for _ in range(self.inbox.qsize()):
            if self._stop.is_set():
                return
            try:
                message = self.inbox.get_nowait()
            except queue.Empty:
                break
            self._take(engine, message)
        if not engine.has_work or self._stop.is_set():
            return
        outputs = engine.step()
        self._check()
        for output in outputs:
            self._deliver(output)
        self._flush()

    def _awaited(self, engine: Engine) -> Message:
        """The next message. Until it comes, what waits for an idle moment is done bit by bit."""
        while engine.tend():
            with contextlib.suppress(queue.Empty):
                return self.inbox.get(timeout=_IDLE)
        return self.inbox.get()

    def _take(self, engine: Engine, message: Message) -> None:
        if isinstance(message, Abort):
            engine.abort(message.request_id)
        elif isinstance(message, EndThought):
            engine.end_thought(message.request_id)
        elif isinstance(message, Add):
            engine.enqueue(message.request)
        elif isinstance(message, Compute) and message.result.set_running_or_notify_cancel():
            try:
                computed = message.work(engine.prefills)
                self._check()
                if not self._exiting:  # a thread that is at work in torch when the interpreter ends aborts it
                    message.result.set_result(computed)
            except QwenrtError as error:
                message.result.set_exception(error)
            except Exception as cause:  # whoever asked waits for this answer and for no other
                found = f"{type(cause).__name__}: {str(cause)[:300]}"
                failed = BackendError("computing between two steps", found, "Load the model again.")
                failed.__cause__ = cause
                message.result.set_exception(failed)

    def _deliver(self, output: RequestOutput) -> None:
        sink = self._sinks.get(output.request_id)
        if sink is None:
            return
        try:
            sink.put(output)
        except Exception:
            logger.exception("the reader of %s failed: the request ends", output.request_id)
            self.inbox.put(Abort(output.request_id))
            del self._sinks[output.request_id]
            return
        if output.finished:
            del self._sinks[output.request_id]

    def _flush(self) -> None:
        while self._touched:
            try:
                bridge = self._touched.pop()
            except KeyError:  # another thread was faster
                break
            bridge.flush()


RUNNING: weakref.WeakSet[Loop] = weakref.WeakSet()


@atexit.register
def _leave_all() -> None:
    for loop in list(RUNNING):
        loop.leave()


def again(error: QwenrtError) -> QwenrtError:
    """The same error for one more reader: an exception belongs to the thread that raises it."""
    copy = type(error)(error.asked, error.found, error.remedy)
    copy.__cause__ = error.__cause__
    return copy


def closed() -> RequestError:
    return RequestError("using the model", "it was closed", "Load it again with qwenrt.load(...).")


def died(cause: BaseException | None = None) -> BackendError:
    """The engine's thread is gone."""
    found = "it is not running" if cause is None else f"ended with {type(cause).__name__}: {str(cause)[:300]}"
    error = BackendError("the engine's thread", found, "Load the model again.")
    error.__cause__ = cause
    return error


def forked() -> BackendError:
    return BackendError(
        "using a model in a forked process",
        f"process {os.getpid()} has no engine thread: a fork copies memory, not threads",
        "Load the model after the fork, or start processes with the 'spawn' method.",
    )
