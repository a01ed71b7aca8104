"""What /metrics says, that it says it cheaply, and that it survives what it counts."""

from __future__ import annotations

import re
import time

from prometheus_client.parser import text_string_to_metric_families

from qwenrt.outputs import Usage
from qwenrt.server.metrics import DIALECTS, ENGINE_COUNTERS, ENGINE_GAUGES, OUTCOMES, Metrics

NAMES = {
    *("qwenrt_requests", "qwenrt_requests_active", "qwenrt_tokens", "qwenrt_call_errors", "qwenrt_denied"),
    *(
        "qwenrt_queue_requests",
        "qwenrt_queue_tokens",
        "qwenrt_queue_wait_seconds",
        "qwenrt_first_token_seconds",
    ),
    *("qwenrt_between_tokens_seconds", "qwenrt_answer_seconds", "qwenrt_request_body_bytes"),
    *("qwenrt_preemptions", "qwenrt_steps", "qwenrt_cancelled", "qwenrt_prefix_lookup_tokens"),
    *("qwenrt_prefix_hit_tokens", "qwenrt_prompt_tokens_computed", "qwenrt_stored_blocks_read"),
    *(
        "qwenrt_stored_blocks_written",
        "qwenrt_drafted_tokens",
        "qwenrt_accepted_tokens",
        "qwenrt_grammar_compiles",
    ),
    *(
        "qwenrt_sequences_running",
        "qwenrt_sequences_waiting",
        "qwenrt_cache_blocks",
        "qwenrt_cache_blocks_free",
    ),
    *("qwenrt_cache_blocks_findable", "qwenrt_step_age_seconds"),
}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        self.now += 1  # each scrape is a new one
        return self.now


def figures(metrics: Metrics) -> dict[str, float]:
    """sample with its labels -> value"""
    found = {}
    for family in text_string_to_metric_families(metrics.text().decode()):
        for sample in family.samples:
            labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def all_stats() -> dict[str, float]:
    return {key: 1.0 for key in (*ENGINE_COUNTERS, *ENGINE_GAUGES)}


def test_the_names_are_those_that_are_documented() -> None:
    families = text_string_to_metric_families(Metrics(all_stats, clock=Clock()).text().decode())
    assert {family.name for family in families} == NAMES


def test_requests_are_counted_by_dialect_and_outcome_and_by_nothing_they_say() -> None:
    metrics = Metrics(clock=Clock())
    metrics.begin(1000)
    assert figures(metrics)["qwenrt_requests_active"] == 1
    metrics.end("anthropic", "tool_calls", 1.5, Usage(100, 20, 60, 5), call_errors=2)
    metrics.refused("ollama", "queue_full")
    metrics.refused('x"} 1\nforged 5', "model\nname")
    found = figures(metrics)
    assert found["qwenrt_requests_total{dialect=anthropic,outcome=tool_calls}"] == 1
    assert found["qwenrt_requests_total{dialect=ollama,outcome=queue_full}"] == 1
    assert found["qwenrt_requests_total{dialect=other,outcome=error}"] == 1
    kinds = {"prompt": 100, "cached": 60, "generated": 20, "reasoning": 5}
    assert {kind: found[f"qwenrt_tokens_total{{kind={kind}}}"] for kind in kinds} == kinds
    assert found["qwenrt_requests_active"] == 0 and found["qwenrt_call_errors_total"] == 2
    assert found["qwenrt_request_body_bytes_bucket{le=1024.0}"] == 1
    labels = {m for line in metrics.text().decode().splitlines() for m in re.findall(r'(\w+)="', line)}
    assert labels == {"dialect", "outcome", "kind", "le"}
    assert sum(key.startswith("qwenrt_requests_total") for key in found) == len(DIALECTS) * len(OUTCOMES)


def test_the_queue_and_the_engine_are_asked_when_somebody_scrapes() -> None:
    queue = [3, 4000]
    stats = {"running": 5.0, "free_blocks": 17.0, "preemptions": 2.0, "unknown": 9.0}
    metrics = Metrics(lambda: stats, lambda: (queue[0], queue[1]), Clock())
    found = figures(metrics)
    assert (found["qwenrt_queue_requests"], found["qwenrt_queue_tokens"]) == (3, 4000)
    assert (found["qwenrt_sequences_running"], found["qwenrt_cache_blocks_free"]) == (5, 17)
    assert found["qwenrt_preemptions_total"] == 2 and not any("unknown" in name for name in found)
    queue[0] = 0
    assert figures(metrics)["qwenrt_queue_requests"] == 0


def test_counters_survive_an_engine_that_failed() -> None:
    stats: dict[str, float] = {"preemptions": 7, "running": 3}

    def read() -> dict[str, float]:
        if not stats:
            raise RuntimeError("the engine has ended")
        return dict(stats)

    metrics = Metrics(read, clock=Clock())
    assert figures(metrics)["qwenrt_preemptions_total"] == 7
    stats.clear()
    found = figures(metrics)
    assert found["qwenrt_preemptions_total"] == 7 and "qwenrt_sequences_running" not in found
    stats["preemptions"] = 2  # another engine, which begins anew
    assert figures(metrics)["qwenrt_preemptions_total"] == 9
    stats["preemptions"] = 5
    assert figures(metrics)["qwenrt_preemptions_total"] == 12


def test_a_storm_of_scrapes_costs_one() -> None:
    asked = []
    metrics = Metrics(lambda: asked.append(1) or {}, clock=lambda: 5.0)  # type: ignore[func-returns-value]
    texts = {metrics.text() for _ in range(1000)}
    assert len(texts) == len(asked) == 1


def test_two_servers_in_a_process_count_apart() -> None:
    one, other = Metrics(clock=Clock()), Metrics(clock=Clock())
    one.refused("ollama", "invalid")
    assert figures(other)["qwenrt_requests_total{dialect=ollama,outcome=invalid}"] == 0


def test_what_a_stream_counts_is_cheap() -> None:
    """A magnitude, not a deadline: one observation for each wake, which has a token or more."""
    metrics = Metrics()
    began = time.process_time()
    for _ in range(20_000):
        metrics.between_tokens.observe(0.03)
    assert (time.process_time() - began) / 20_000 < 50e-6
