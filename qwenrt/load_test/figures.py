"""From answers to figures, under the names that `vllm bench serve` gives them in its files of results."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from qwenrt.errors import RequestError
from qwenrt.load_test.client import Answer
from qwenrt.load_test.pacing import ClosedLoop
from qwenrt.load_test.running import LoadRun

Counting = Callable[[str], int]  # a text's tokens

LATENCIES = {
    "ttft": "first token (TTFT)",
    "tpot": "each later token (TPOT)",
    "itl": "between events (ITL)",
    "e2el": "whole answer (E2EL)",
}
LATE_S = 0.005  # beyond which the client's own loop spoils the figures
BUSY = 0.7  # share of a core from which on the client itself may be what is measured


def figures(
    run: LoadRun,
    *,
    percentiles: Sequence[float] = (99.0,),
    goals: Mapping[str, float] | None = None,
    count: Counting | None = None,
) -> dict[str, Any]:
    """The figures of a run; None where there is nothing to tell them from.

    TTFT, TPOT, ITL and E2EL are in ms. TTFT: to the first event with text. TPOT: of each answer the time from then to
    its end, over its tokens less one; an answer that came in one event has none, and keeps a goal for it. ITL: the gaps
    between events with text of all answers, however many tokens each carries. ``goals``: of "ttft", "tpot", "e2el" in
    ms, for request_goodput. ``count``: counts tokens where the server told none.
    """
    good = _good(run)
    outputs = [_output_tokens(answer, count) for answer in good]
    inputs = [_input_tokens(answer, count) for answer in good]
    seconds = run.seconds
    found: dict[str, Any] = {
        "num_prompts": run.planned,
        **_pace(run),
        "duration": seconds,
        "completed": len(good),
        "failed": len(run.answers) - len(good),
        "not_sent": run.planned - len(run.answers),
        "total_input_tokens": _sum(inputs),
        "total_cached_tokens": _sum([answer.cached_tokens for answer in good]),
        "total_output_tokens": _sum(outputs),
        "tokens_counted_by": _counted_by(good, count),
        "tokens_per_event": _ratio(_sum(outputs), sum(len(answer.pieces) for answer in good)),
        "request_throughput": _ratio(len(good), seconds),
        "request_goodput": _ratio(_reached(good, outputs, goals or {}), seconds),
        "output_throughput": _ratio(_sum(outputs), seconds),
        "total_token_throughput": _ratio(_sum([*inputs, *outputs]), seconds),
        "max_output_tokens_per_s": max(tokens_by_second(run, count).values(), default=None),
        "max_concurrent_requests": _most_at_once(good),
    }
    for name, values in latencies(run, count).items():
        found |= _distribution(name, values, percentiles)
    return found | {"failures": failures(run.answers), "client": _client(run, _sum(outputs))}


def latencies(run: LoadRun, count: Counting | None = None) -> dict[str, list[float]]:
    """By their short names, all in seconds: one of each answer, but of ITL one of each gap."""
    good = _good(run)
    per_token = [_per_token(answer, _output_tokens(answer, count)) for answer in good]
    return {
        "ttft": [answer.pieces[0] for answer in good],
        "tpot": [seconds for seconds in per_token if seconds is not None],
        "itl": [gap for answer in good for gap in _gaps(answer)],
        "e2el": [answer.seconds for answer in good],
    }


def tokens_by_second(run: LoadRun, count: Counting | None = None) -> dict[int, float]:
    """Answer tokens of each second since the first request; those of an answer are spread evenly over its events. Empty
    where they are not known."""
    good = _good(run)
    outputs = [_output_tokens(answer, count) for answer in good]
    if not good or None in outputs:
        return {}
    began, found = min(answer.sent for answer in good), dict[int, float]()
    for answer, tokens in zip(good, outputs):
        for piece in answer.pieces:
            second = int(answer.sent + piece - began)
            found[second] = found.get(second, 0.0) + (tokens or 0) / len(answer.pieces)
    return {second: found.get(second, 0.0) for second in range(max(found) + 1)}


def details(run: LoadRun, count: Counting | None = None) -> dict[str, Any]:
    """The lists of each request, in the order in which they ended; seconds."""
    return {
        "input_lens": [_input_tokens(answer, count) for answer in run.answers],
        "output_lens": [_output_tokens(answer, count) for answer in run.answers],
        "ttfts": [answer.pieces[0] if answer.pieces else None for answer in run.answers],
        "itls": [_gaps(answer) for answer in run.answers],
        "latencies": [answer.seconds for answer in run.answers],
        "start_times": [answer.sent for answer in run.answers],
        "errors": [
            f"{answer.failure.kind}: {answer.failure.said}" if answer.failure else ""
            for answer in run.answers
        ],
    }


def failures(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """Each kind of failure: how many, and what the first of them said."""
    failed = [answer.failure for answer in answers if answer.failure is not None]
    first = {failure.kind: failure.said for failure in reversed(failed)}
    counted = Counter(failure.kind for failure in failed)
    return [{"kind": kind, "count": n, "first": first[kind]} for kind, n in counted.most_common()]


def warnings(found: Mapping[str, Any]) -> list[str]:
    """What of the client itself spoils the figures."""
    client, said = found["client"], []
    if client["lag_p99_ms"] is not None and client["lag_p99_ms"] > LATE_S * 1000:
        said.append(
            f"This client was late by {client['lag_p99_ms']:.0f} ms (99th percentile): as much may be in every "
            "latency. Run it on a machine or core that is free."
        )
    if client["share_of_a_core"] > BUSY:
        said.append(
            f"This client used {100 * client['share_of_a_core']:.0f} % of a core: it may be what was measured. "
            "Use several at once, or fewer requests."
        )
    if found["tokens_counted_by"] == "nobody" and found["completed"]:
        said.append(
            "The server tells no usage: tokens are not counted. Give --tokenizer MODEL to count them here."
        )
    return said


def parse_goals(pairs: Sequence[str]) -> dict[str, float]:
    """["ttft:500", "tpot:50"] -> {"ttft": 500.0, "tpot": 50.0}, in ms."""
    goals = {}
    for pair in pairs:
        found = re.fullmatch(r"(ttft|tpot|e2el):(\d+(?:\.\d+)?)", pair)
        if found is None:
            raise RequestError(
                "--goodput", f"got {pair!r}", "Give ttft:MS, tpot:MS or e2el:MS, such as ttft:500."
            )
        goals[found[1]] = float(found[2])
    return goals


def _distribution(
    name: str, values: Sequence[float], percentiles: Sequence[float]
) -> dict[str, float | None]:
    """In ms; None for each where there are no values."""
    ms = np.asarray(values, dtype=np.float64) * 1000
    found: dict[str, float | None] = {
        f"mean_{name}_ms": float(ms.mean()) if len(ms) else None,
        f"median_{name}_ms": float(np.median(ms)) if len(ms) else None,
        f"std_{name}_ms": float(ms.std()) if len(ms) else None,
    }
    for p in percentiles:
        found[f"p{p:g}_{name}_ms"] = float(np.percentile(ms, p)) if len(ms) else None
    return found


def _pace(run: LoadRun) -> dict[str, Any]:
    if isinstance(run.pace, ClosedLoop):
        return {"request_rate": "inf", "burstiness": 1.0, "max_concurrency": run.pace.clients}
    burstiness = run.pace.burstiness
    shown = "inf" if math.isinf(burstiness) else burstiness
    return {"request_rate": run.pace.rate, "burstiness": shown, "max_concurrency": None}


def _good(run: LoadRun) -> list[Answer]:
    return [answer for answer in run.answers if answer.failure is None]


def _output_tokens(answer: Answer, count: Counting | None) -> int | None:
    if answer.output_tokens is not None or count is None:
        return answer.output_tokens
    calls = "".join(call["function"]["name"] + call["function"]["arguments"] for call in answer.calls)
    return count(answer.reasoning + answer.text + calls)


def _input_tokens(answer: Answer, count: Counting | None) -> int | None:
    if answer.prompt_tokens is not None or count is None:
        return answer.prompt_tokens
    return count(answer.request.prompt)


def _counted_by(good: Sequence[Answer], count: Counting | None) -> str:
    told = sum(answer.output_tokens is not None for answer in good)
    if good and told == len(good):
        return "the server"
    if count is None:
        return "nobody"
    return "the server and the tokenizer" if told else "the tokenizer"


def _sum(counts: Sequence[int | None]) -> int | None:
    """None where one is not known: the sum of some would be a wrong figure."""
    known = [n for n in counts if n is not None]
    return sum(known) if len(known) == len(counts) and known else None


def _ratio(above: float | None, below: float) -> float | None:
    return above / below if above is not None and below else None


def _gaps(answer: Answer) -> list[float]:
    return [later - earlier for earlier, later in zip(answer.pieces, answer.pieces[1:])]


def _per_token(answer: Answer, tokens: int | None) -> float | None:
    if tokens is None or tokens < 2 or len(answer.pieces) < 2:
        return None
    return (answer.seconds - answer.pieces[0]) / (tokens - 1)  # to the end: the last tokens may have no text


def _reached(good: Sequence[Answer], outputs: Sequence[int | None], goals: Mapping[str, float]) -> int | None:
    """How many answers keep all goals; None where there are no goals, or one for tokens that nobody counted."""
    if not goals or ("tpot" in goals and None in outputs):
        return None

    def keeps(answer: Answer, tokens: int | None) -> bool:
        took = {
            "ttft": answer.pieces[0],
            "tpot": _per_token(answer, tokens) or 0.0,
            "e2el": answer.seconds,
        }
        return all(took[name] * 1000 <= goal for name, goal in goals.items())

    return sum(keeps(answer, tokens) for answer, tokens in zip(good, outputs))


def _most_at_once(good: Sequence[Answer]) -> int:
    ends = [(answer.sent + answer.seconds, -1) for answer in good]
    most = now = 0
    for _, change in sorted([*((answer.sent, 1) for answer in good), *ends]):
        now += change
        most = max(most, now)
    return most


def _client(run: LoadRun, tokens: int | None) -> dict[str, float | None]:
    """What this process itself did: its processor time, and how late its loop was."""
    return {
        "cpu_s": run.cpu_s,
        "share_of_a_core": run.cpu_s / run.seconds if run.seconds else 0.0,
        "cpu_us_per_token": 1e6 * run.cpu_s / tokens if tokens else None,
        "lag_p99_ms": 1000 * float(np.percentile(run.lags, 99)) if run.lags else None,
    }
