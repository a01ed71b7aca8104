"""What `/metrics` says. The names are ours, stable and few; no label comes from a request.

Counters are counted here, not in the engine, or carried on where its own begin anew: they survive an engine that
failed.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from qwenrt.outputs import Usage

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
DIALECTS = (
    "openai_chat",
    "openai_completions",
    "openai_responses",
    "anthropic",
    "ollama",
    "dashscope",
    "other",
)
OUTCOMES = (
    *("stop", "length", "tool_calls", "timeout", "abort", "error"),
    *("cancelled", "invalid", "denied", "queue_full", "queue_timeout", "unavailable"),
)
_CREATED = re.compile(rb"(# (HELP|TYPE) )?qwenrt_[a-z_]*_created[ {]")
_SCRAPE_KEPT = 0.5  # seconds that one text serves all who ask
_WAITS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)  # seconds
_BETWEEN = (0.002, 0.005, 0.01, 0.02, 0.04, 0.07, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5)  # seconds
_SIZES = tuple(float(1 << n) for n in range(8, 25, 2))  # bytes: 256 to 16 Mi

# key of an engine's stats -> (name, help); counters only grow, gauges are what is the case
ENGINE_COUNTERS: dict[str, tuple[str, str]] = {
    "preemptions": (
        "qwenrt_preemptions",
        "Sequences that gave up their cache blocks to others and began again",
    ),
    "steps": ("qwenrt_steps", "Steps of the engine"),
    "cancelled": ("qwenrt_cancelled", "Requests that were cancelled in the engine"),
    "prompt_tokens_looked_up": (
        "qwenrt_prefix_lookup_tokens",
        "Prompt tokens that were looked for in the cache",
    ),
    "prompt_tokens_found": ("qwenrt_prefix_hit_tokens", "Prompt tokens that were found in the cache"),
    "prompt_tokens_computed": (
        "qwenrt_prompt_tokens_computed",
        "Prompt tokens that were computed, some again",
    ),
    "guessed_tokens": ("qwenrt_drafted_tokens", "Tokens that were guessed"),
    "right_guesses": ("qwenrt_accepted_tokens", "Guessed tokens that the model confirmed"),
    "stored_blocks_read": ("qwenrt_stored_blocks_read", "Blocks that came from the prefix store"),
    "stored_blocks_written": ("qwenrt_stored_blocks_written", "Blocks that were written to the prefix store"),
    "grammar_compiles": ("qwenrt_grammar_compiles", "Grammars that were compiled"),
}
ENGINE_GAUGES: dict[str, tuple[str, str]] = {
    "running": ("qwenrt_sequences_running", "Sequences that a step computes"),
    "waiting": ("qwenrt_sequences_waiting", "Sequences that wait in the engine"),
    "total_blocks": ("qwenrt_cache_blocks", "Blocks of the cache"),
    "free_blocks": (
        "qwenrt_cache_blocks_free",
        "Blocks of the cache that nothing is kept in, or nothing that runs",
    ),
    "cached_blocks": (
        "qwenrt_cache_blocks_findable",
        "Blocks of the cache that a prompt may find its beginning in",
    ),
    "last_step_age_s": ("qwenrt_step_age_seconds", "Seconds since the last step ended"),
}


class Metrics:
    """The figures of one server, in a registry of their own.

    ``engine``: what the engine counts, by the keys above, unknown ones left out; asked when somebody scrapes, and what
    it said last is repeated where it fails. ``queue``: (requests that wait, tokens that these are expected to cost).
    The other methods may be called from one thread; those of a stream once for each wake, not for each token.
    """

    def __init__(
        self,
        engine: Callable[[], Mapping[str, float]] = dict,
        queue: Callable[[], tuple[int, int]] = lambda: (0, 0),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self._clock, self._text, self._until = clock, b"", float("-inf")
        self._count()
        self._time()
        waiting = Gauge("qwenrt_queue_requests", "Requests that wait for their turn", registry=self.registry)
        waiting.set_function(lambda: queue()[0])
        tokens = Gauge("qwenrt_queue_tokens", "Tokens that waiting requests may cost", registry=self.registry)
        tokens.set_function(lambda: queue()[1])
        self.registry.register(_Engine(engine))

    def _count(self) -> None:
        where = self.registry
        requests = Counter(
            "qwenrt_requests",
            "Requests that ended, by dialect and how",
            ("dialect", "outcome"),
            registry=where,
        )
        self._requests = {(d, o): requests.labels(d, o) for d in DIALECTS for o in OUTCOMES}
        active = Gauge("qwenrt_requests_active", "Requests that have begun and not ended", registry=where)
        self._active = active
        kinds = ("prompt", "cached", "generated", "reasoning")
        tokens = Counter("qwenrt_tokens", "Tokens: of prompts, those of them from the cache, of answers, "
                         "those of them in thoughts", ("kind",), registry=where)  # fmt: skip
        self._tokens = [tokens.labels(kind) for kind in kinds]
        self._call_errors = Counter(
            "qwenrt_call_errors", "Calls of tools that could not be read", registry=where
        )
        self._denied = Counter(
            "qwenrt_denied", "Requests that the guard refused", ("status",), registry=where
        )

    def _time(self) -> None:
        where = self.registry
        self.queue_wait = Histogram(
            "qwenrt_queue_wait_seconds", "Waiting for a turn", buckets=_WAITS, registry=where
        )
        self.first_token = Histogram(
            "qwenrt_first_token_seconds", "From a request to its first token", buckets=_WAITS, registry=where
        )
        self.between_tokens = Histogram(
            "qwenrt_between_tokens_seconds",
            "From one piece of an answer to the next",
            buckets=_BETWEEN,
            registry=where,
        )
        self.answer = Histogram(
            "qwenrt_answer_seconds", "From a request to the end of its answer", buckets=_WAITS, registry=where
        )
        self.body_bytes = Histogram(
            "qwenrt_request_body_bytes", "Sizes of requests' bodies", buckets=_SIZES, registry=where
        )

    def begin(self, body_bytes: int) -> None:
        """A request has been read."""
        self._active.inc()
        self.body_bytes.observe(body_bytes)

    def end(
        self, dialect: str, outcome: str, seconds: float, usage: Usage | None = None, call_errors: int = 0
    ) -> None:
        """A request that was begun has ended. A name that is not among DIALECTS is "other"; an outcome that is not
        among OUTCOMES is "error"."""
        self._active.dec()
        self._ended(dialect, outcome)
        self.answer.observe(seconds)
        if call_errors:
            self._call_errors.inc(call_errors)
        if usage is not None:
            counts = (
                usage.prompt_tokens,
                usage.cached_tokens,
                usage.completion_tokens,
                usage.reasoning_tokens,
            )
            for counter, count in zip(self._tokens, counts):
                counter.inc(count)

    def refused(self, dialect: str, outcome: str) -> None:
        """A request ended before it was begun."""
        self._ended(dialect, outcome)

    def denied(self, status: int) -> None:
        """The guard let a request not pass."""
        self._denied.labels(str(status)).inc()

    def _ended(self, dialect: str, outcome: str) -> None:
        place = (dialect if dialect in DIALECTS else "other", outcome if outcome in OUTCOMES else "error")
        self._requests[place].inc()

    def text(self) -> bytes:
        """The exposition, of now or of half a second ago: a storm of scrapes costs what one does."""
        now = self._clock()
        if now >= self._until:
            lines = generate_latest(self.registry).splitlines(keepends=True)
            # when each counter was made, which would be as many lines again
            self._text = b"".join(line for line in lines if not _CREATED.match(line))
            self._until = now + _SCRAPE_KEPT
        return self._text


class _Engine(Collector):
    """An engine's own counters. Those that begin anew, with another engine, go on from where they were."""

    def __init__(self, stats: Callable[[], Mapping[str, float]]) -> None:
        self._stats = stats
        self._last: dict[str, float] = {}
        self._before: dict[str, float] = {}  # what earlier engines had counted

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        try:
            now: Mapping[str, float] = self._stats()
        except Exception:  # it has failed, which /health tells; its counters stay
            now = {key: value for key, value in self._last.items() if key in ENGINE_COUNTERS}
        for key, (name, about) in ENGINE_COUNTERS.items():
            if key in now:
                if now[key] < self._last.get(key, 0):
                    self._before[key] = self._before.get(key, 0) + self._last[key]
                yield CounterMetricFamily(name, about, value=now[key] + self._before.get(key, 0))
        for key, (name, about) in ENGINE_GAUGES.items():
            if key in now:
                yield GaugeMetricFamily(name, about, value=now[key])
        self._last = {**self._last, **now}
