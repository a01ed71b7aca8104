"""A thread around an Engine: any thread may submit, and any event loop; each reads its own answer piece by piece."""

from __future__ import annotations

import asyncio
import os
import queue
import weakref
from collections.abc import Callable, Iterator
from collections.abc import Sequence as List
from concurrent.futures import Future
from functools import partial
from typing import Any

import torch

from qwenrt.engine.adapters import Adapters
from qwenrt.engine.answers import AsyncAnswer, Handle
from qwenrt.engine.bridge import Mailbox
from qwenrt.engine.engine import Engine
from qwenrt.engine.loop import RUNNING, Abort, Add, Compute, Loop, Sink, again, closed, died, forked
from qwenrt.engine.output_processor import RequestOutput
from qwenrt.engine.prefills import Prefills
from qwenrt.errors import QwenrtError, RequestError
from qwenrt.sampling_params import SamplingParams
from qwenrt.structure import Grammar

_SHARE_TOKENS = 2048  # of texts that are read between two steps


def _shares(prompts: List[List[int]]) -> Iterator[List[List[int]]]:
    """The prompts in shares of about _SHARE_TOKENS, so that requests that run beside them are not held up."""
    share: list[List[int]] = []
    for prompt in prompts:
        if share and sum(map(len, share)) + len(prompt) > _SHARE_TOKENS:
            yield share
            share = []
        share.append(prompt)
    yield share


class AsyncEngine:
    """An Engine that runs by itself. Any number of threads may submit; it sleeps while there is nothing to do."""

    def __init__(self, engine: Engine, check: Callable[[], None] = lambda: None) -> None:
        """``check`` is called after each step, before anything of it is given out; what it raises ends the engine."""
        self._engine: Engine | None = engine
        self._loop = Loop(engine, check)
        self._loop.thread.start()
        self._stop = weakref.finalize(self, self._loop.stop)
        self._stop.atexit = False
        RUNNING.add(self._loop)

    def submit(self, prompt_token_ids: List[int], params: SamplingParams, **options: Any) -> Handle:
        """Queue a request, with the options of `Engine.check`; what is wrong with it is raised here and now."""
        sink: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()
        request = self._alive().check(prompt_token_ids, params, **options)
        self._loop.put(Add(request, sink))
        return Handle(request, sink, self._loop, self)

    def asubmit(self, prompt_token_ids: List[int], params: SamplingParams, **options: Any) -> AsyncAnswer:
        """The same from a running event loop, which alone may read the answer."""
        try:
            event_loop = asyncio.get_running_loop()
        except RuntimeError:
            raise RequestError(
                "an answer for asyncio", "no event loop runs in this thread", "Call it from a coroutine."
            ) from None
        request = self._alive().check(prompt_token_ids, params, **options)
        mailbox = Mailbox(request.request_id, self._loop.bridge_to(event_loop))
        self._loop.put(Add(request, mailbox))
        return AsyncAnswer(request, mailbox, self._loop, self)

    def submit_to(
        self, sink: Sink, prompt_token_ids: List[int], params: SamplingParams, **options: Any
    ) -> str:
        """The same for a sink of the caller's own, whose ``put`` gets every output in the engine's thread -> the
        request's id, for `abort`."""
        request = self._alive().check(prompt_token_ids, params, **options)
        self._loop.put(Add(request, sink))
        return request.request_id

    def abort(self, request_id: str) -> None:
        """End a request soon; harmless when it has ended."""
        self._loop.inbox.put(Abort(request_id))

    def compile(self, grammar: Grammar) -> None:
        """What `submit` would do with a grammar, done now in this thread and kept. Raises RequestError."""
        self._alive().grammars.compile(grammar)

    def build_grammars(self) -> None:
        """Make now, in this thread, what the first grammar would wait for. Raises RequestError."""
        self._alive().grammars.build()

    def logits(self, token_ids: List[int], adapter: str | None = None) -> torch.Tensor:
        """`Prefills.logits` between two steps -> float32 [num_tokens, vocab_size] on the CPU."""
        ids = list(token_ids)
        weights = None if adapter is None else self.adapters.find(adapter).weights
        return self._between_steps(lambda texts: texts.logits(ids, weights))

    @property
    def adapters(self) -> Adapters:
        """Those of the engine; any thread may load and unload."""
        return self._alive().adapters

    def unload_adapter(self, name: str) -> None:
        """`Adapters.unload`; what the cache holds of it is freed between two steps."""
        self.adapters.unload(name)
        self._loop.wake()

    def pooled(self, prompts: List[List[int]], pool: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """`Prefills.pooled`, a share of the prompts between any two steps -> float32 [len(prompts), ...] on the CPU."""
        works = [partial(Prefills.pooled, prompts=share, pool=pool) for share in _shares(prompts)]
        return torch.cat([self._between_steps(work) for work in works])

    def last_logits(self, prompts: List[List[int]], token_ids: List[int]) -> torch.Tensor:
        """`Prefills.last_logits`, a share of the prompts between any two steps -> [len(prompts), len(token_ids)]."""
        ids = list(token_ids)
        works = [partial(Prefills.last_logits, prompts=share, token_ids=ids) for share in _shares(prompts)]
        return torch.cat([self._between_steps(work) for work in works])

    def _between_steps(self, work: Callable[[Prefills], torch.Tensor]) -> torch.Tensor:
        self._alive()
        result: Future[torch.Tensor] = Future()
        self._loop.put(Compute(work, result))
        return result.result()

    def stats(self) -> dict[str, Any]:
        """`Engine.stats`; raises what ended the engine. ``pending`` is true as well while work waits for its turn."""
        stats = self._alive().stats()
        return {**stats, "pending": stats["pending"] or not self._loop.inbox.empty()}

    @property
    def failure(self) -> QwenrtError | None:
        """Why it serves no more; None while it does. Takes no lock and waits for nothing."""
        if self._loop.ended is not None:
            return self._loop.ended
        if self._engine is None:
            return closed()
        return None if self._loop.thread.is_alive() else died()

    def close(self) -> None:
        """Fail what is running, end the thread, let go of the model and the cache. Safe to call twice."""
        self._stop()
        self._engine = None

    def _alive(self) -> Engine:
        if os.getpid() != self._loop.pid:
            raise forked()
        engine, ended = self._engine, self._loop.ended
        if ended is not None:
            raise again(ended)
        if engine is None:
            raise closed()
        return engine
