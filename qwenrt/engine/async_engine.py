"""A thread around an Engine: any thread may submit, and reads its own answer piece by piece."""

from __future__ import annotations

import atexit
import os
import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from collections.abc import Sequence as List
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from qwenrt.engine.engine import Engine
from qwenrt.engine.output_processor import RequestOutput
from qwenrt.engine.requests import Request
from qwenrt.errors import BackendError, QwenrtError, RequestError
from qwenrt.outputs import Delta
from qwenrt.sampling_params import SamplingParams
from qwenrt.text.replies.parser import ReplyStream

_SHARE_TOKENS = 2048  # of texts that are read between two steps
_CLOSE_TIMEOUT = 2.0  # seconds a close waits for a step that is being computed
_EXIT_TIMEOUT = (
    30.0  # seconds the interpreter's exit does: a thread that is torn out of torch's code aborts the process
)


@dataclass(frozen=True)
class _Add:
    request: Request
    sink: queue.SimpleQueue[RequestOutput]


@dataclass(frozen=True)
class _Abort:
    request_id: str


@dataclass(frozen=True)
class _Compute:
    work: Callable[[Engine], torch.Tensor]
    result: Future[torch.Tensor]


def _shares(prompts: List[List[int]]) -> Iterator[List[List[int]]]:
    """The prompts in shares of about _SHARE_TOKENS, so that requests that run beside them are not held up."""
    share: list[List[int]] = []
    for prompt in prompts:
        if share and sum(map(len, share)) + len(prompt) > _SHARE_TOKENS:
            yield share
            share = []
        share.append(prompt)
    yield share


class _Wake:
    """Nothing to do but look whether the loop is to end."""


class Handle(Iterator[Delta]):
    """One submitted request. Iterating yields its Deltas as they come and raises what made it fail.

    `cancel`, or forgetting the handle, frees what the request holds.
    """

    def __init__(
        self, request_id: str, sink: queue.SimpleQueue[RequestOutput], loop: _Loop, engine: AsyncEngine
    ) -> None:
        self.request_id = request_id
        self._sink, self._pid = sink, loop.pid
        self._engine: AsyncEngine | None = engine  # one that nobody else holds lives until the answer is read
        self._done = False
        self._cancel = weakref.finalize(self, loop.inbox.put, _Abort(request_id))
        self._cancel.atexit = False

    def __iter__(self) -> Handle:
        return self

    def __next__(self) -> Delta:
        if self._done:
            raise StopIteration
        if os.getpid() != self._pid:
            raise _forked()
        output = self._sink.get()
        if output.finished or output.error is not None:
            self._done = True
            self._engine = None
            self._cancel.detach()
        if output.error is not None:
            raise _again(output.error)
        return output.delta

    def cancel(self) -> None:
        """End the request soon; its last Delta has finish_reason "abort". Harmless when it has ended."""
        self._cancel()


class _Loop:
    """What the thread runs. It knows the engine and the sinks, not the AsyncEngine, which may be collected."""

    def __init__(self, engine: Engine, check: Callable[[], None]) -> None:
        self.pid, self._check = os.getpid(), check
        self.inbox: queue.SimpleQueue[_Add | _Abort | _Compute | _Wake] = queue.SimpleQueue()
        # Guards `ended`: nothing is put for a loop that no longer reads. Re-entrant, as a collection may close
        # another engine, or this one, from anywhere.
        self.lock = threading.RLock()
        self.ended: QwenrtError | None = None
        self._engine: Engine | None = engine
        self._stop = threading.Event()
        self._exiting = False
        self._sinks: dict[str, queue.SimpleQueue[RequestOutput]] = {}
        self.thread = threading.Thread(target=self.run, name="qwenrt-engine", daemon=True)

    def put(self, message: _Add | _Compute) -> None:
        """Hand the loop some work; raises what ended it where it has ended."""
        if os.getpid() != self.pid:
            raise _forked()
        with self.lock:
            if self.ended is not None:
                raise _again(self.ended)
            if self._exiting and not threading.current_thread().daemon:
                raise _closed()
            if isinstance(message, _Add):
                self._sinks[message.request.request_id] = message.sink
            self.inbox.put(message)

    def run(self) -> None:
        error: QwenrtError = _closed()
        try:
            while not self._stop.is_set():
                self._turn()
        except QwenrtError as cause:
            error = cause
        except BaseException as cause:
            error = BackendError(
                "the engine's thread",
                f"ended with {type(cause).__name__}: {str(cause)[:300]}",
                "Load the model again.",
            )
            error.__cause__ = cause
        if not self._exiting:
            self.end(error)
        self._engine = None

    def stop(self) -> None:
        """End the loop: running requests fail, the thread is waited for, though not for ever."""
        if os.getpid() != self.pid:
            return
        if self._exiting:
            return
        self._halt(_CLOSE_TIMEOUT)
        self.end(_closed())

    def leave(self) -> None:
        """End the loop at the interpreter's exit, when only daemon threads are left: who waits is told nothing and ends
        with the process, where an error would be printed for each."""
        if os.getpid() == self.pid and self.ended is None:
            self._exiting = True
            self._halt(_EXIT_TIMEOUT)

    def _halt(self, timeout: float) -> None:
        self._stop.set()
        self.inbox.put(_Wake())
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
            if isinstance(message, _Compute) and message.result.set_running_or_notify_cancel():
                message.result.set_exception(error)
        for request_id, sink in list(self._sinks.items()):
            sink.put(RequestOutput(request_id, Delta("", finish_reason="abort"), True, error))
        self._sinks.clear()

    def _turn(self) -> None:
        """Take what was submitted, waiting only when there is nothing to compute; then one step."""
        engine = self._engine
        assert engine is not None
        if not engine.has_work:
            self._take(engine, self.inbox.get())
        for _ in range(
            self.inbox.qsize()
        ):  # what comes meanwhile waits for a step, or steps would wait for ever
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

    def _take(self, engine: Engine, message: _Add | _Abort | _Compute | _Wake) -> None:
        if isinstance(message, _Abort):
            engine.abort(message.request_id)
        elif isinstance(message, _Add):
            engine.enqueue(message.request)
        elif isinstance(message, _Compute) and message.result.set_running_or_notify_cancel():
            try:
                computed = message.work(engine)
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
        sink.put(output)
        if output.finished:
            del self._sinks[output.request_id]


_RUNNING: weakref.WeakSet[_Loop] = weakref.WeakSet()


@atexit.register
def _leave_all() -> None:
    for loop in list(_RUNNING):
        loop.leave()


class AsyncEngine:
    """An Engine that runs by itself. Any number of threads may submit; it sleeps while there is nothing to do."""

    def __init__(self, engine: Engine, check: Callable[[], None] = lambda: None) -> None:
        """``check`` is called after each step, before anything of it is given out; what it raises ends the engine."""
        self._engine: Engine | None = engine
        self._loop = _Loop(engine, check)
        self._loop.thread.start()
        self._stop = weakref.finalize(self, self._loop.stop)
        self._stop.atexit = False
        _RUNNING.add(self._loop)

    def submit(
        self,
        prompt_token_ids: List[int],
        params: SamplingParams,
        *,
        stop_sequences: List[List[int]] = (),
        skip_special_tokens: bool = True,
        replies: List[ReplyStream] = (),
    ) -> Handle:
        """Queue a request; what is wrong with it is raised here and now, as by Engine.add."""
        request = self._alive().check(
            prompt_token_ids,
            params,
            stop_sequences=stop_sequences,
            skip_special_tokens=skip_special_tokens,
            replies=replies,
        )
        sink: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()
        self._loop.put(_Add(request, sink))
        return Handle(request.request_id, sink, self._loop, self)

    def logits(self, token_ids: List[int]) -> torch.Tensor:
        """Engine.logits between two steps -> float32 [num_tokens, vocab_size] on the CPU."""
        ids = list(token_ids)
        return self._between_steps(lambda engine: engine.logits(ids))

    def pooled(self, prompts: List[List[int]], pool: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Engine.pooled, a share of the prompts between any two steps -> float32 [len(prompts), ...] on the CPU."""
        works = [partial(Engine.pooled, prompts=share, pool=pool) for share in _shares(prompts)]
        return torch.cat([self._between_steps(work) for work in works])

    def last_logits(self, prompts: List[List[int]], token_ids: List[int]) -> torch.Tensor:
        """Engine.last_logits, a share of the prompts between any two steps -> [len(prompts), len(token_ids)]."""
        ids = list(token_ids)
        works = [partial(Engine.last_logits, prompts=share, token_ids=ids) for share in _shares(prompts)]
        return torch.cat([self._between_steps(work) for work in works])

    def _between_steps(self, work: Callable[[Engine], torch.Tensor]) -> torch.Tensor:
        self._alive()
        result: Future[torch.Tensor] = Future()
        self._loop.put(_Compute(work, result))
        return result.result()

    def stats(self) -> dict[str, Any]:
        """The engine's counters."""
        return self._alive().stats()

    def close(self) -> None:
        """Fail what is running, end the thread, let go of the model and the cache. Safe to call twice."""
        self._stop()
        self._engine = None

    def _alive(self) -> Engine:
        if os.getpid() != self._loop.pid:
            raise _forked()
        engine, ended = self._engine, self._loop.ended
        if ended is not None:
            raise _again(ended)
        if engine is None:
            raise _closed()
        return engine


def _again(error: QwenrtError) -> QwenrtError:
    """The same error for one more reader: an exception belongs to the thread that raises it."""
    copy = type(error)(error.asked, error.found, error.remedy)
    copy.__cause__ = error.__cause__
    return copy


def _closed() -> RequestError:
    return RequestError("using the model", "it was closed", "Load it again with qwenrt.load(...).")


def _forked() -> BackendError:
    return BackendError(
        "using a model in a forked process",
        f"process {os.getpid()} has no engine thread: a fork copies memory, not threads",
        "Load the model after the fork, or start processes with the 'spawn' method.",
    )
