"""The clients' loops and the figures, in virtual time: every number is exact."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

pytest.importorskip("h11")
pytest.importorskip("msgspec")

from qwenrt.errors import RequestError
from qwenrt.load_test.client import CONNECT, Answer, Failure
from qwenrt.load_test.figures import details, figures, parse_goals, warnings
from qwenrt.load_test.pacing import ClosedLoop, OpenLoop
from qwenrt.load_test.running import LoadRun
from qwenrt.load_test.workloads import Conversation, Request, Turn
from tests.load_test.virtual_time import run_in_virtual_time


def one_each(count: int, turns: int = 1, new_tokens: int = 4) -> list[Conversation]:
    return [Conversation([Turn("user", f"{i}.{t}", new_tokens) for t in range(turns)]) for i in range(count)]


@dataclass
class Even:
    """A server that needs ``first`` seconds to a first token and ``each`` to every other, however many ask."""

    first: float = 0.5
    each: float = 0.1
    failures: dict[int, Failure] = field(default_factory=dict)  # by the number of the request
    retry_after: float = 0.0
    listens: bool = True
    sent: list[float] = field(default_factory=list)
    at_once: list[int] = field(default_factory=list)
    _now: int = 0

    async def ask(self, request: Request) -> Answer:
        clock = asyncio.get_running_loop().time
        answer = Answer(request, clock())
        self.sent.append(clock())
        number = len(self.sent) - 1
        self._now += 1
        self.at_once.append(self._now)
        try:
            if number in self.failures:
                answer.failure, answer.retry_after = self.failures[number], self.retry_after
                return answer
            for place in range(request.new_tokens):
                await asyncio.sleep(self.each if place else self.first)
                answer.pieces.append(clock() - answer.sent)
            answer.seconds = clock() - answer.sent
            answer.text, answer.prompt_tokens, answer.output_tokens = "text", 10, request.new_tokens
            return answer
        finally:
            self._now -= 1

    async def alive(self) -> bool:
        return self.listens


def go(conversations: list[Conversation], server: Even, pace: ClosedLoop | OpenLoop) -> LoadRun:
    async def whole() -> LoadRun:
        run = LoadRun(conversations, server, pace)
        await run.go()
        return run

    return run_in_virtual_time(whole())


def test_a_closed_loop_keeps_its_clients_busy() -> None:
    server = Even()
    run = go(one_each(6), server, ClosedLoop(2))
    assert max(server.at_once) == 2 and len(run.answers) == 6
    assert server.sent == pytest.approx([0, 0, 0.8, 0.8, 1.6, 1.6])
    assert run.seconds == pytest.approx(2.4)


def test_an_open_loop_waits_for_nobody() -> None:
    server, pace = Even(first=100.0), OpenLoop(rate=5, burstiness=0.5, seed=2)
    run = go(one_each(20), server, pace)
    assert server.sent == pytest.approx(pace.starts(20)) and max(server.at_once) == 20
    assert max(run.lags) == pytest.approx(0, abs=1e-6), "nothing is late where time is virtual"


def test_later_turns_wait_for_the_answer_before() -> None:
    server = Even()
    go(one_each(2, turns=3), server, OpenLoop(1.0, math.inf))
    # Two conversations of three requests: at 1 request a second one begins every three seconds.
    assert sorted(server.sent) == pytest.approx([3, 3.8, 4.6, 6, 6.8, 7.6])


def test_a_conversation_ends_where_a_turn_fails_and_the_others_go_on() -> None:
    server = Even(failures={1: Failure("HTTP 500", "oops")})
    run = go(one_each(2, turns=3), server, ClosedLoop(1))
    found = figures(run)
    assert (found["completed"], found["failed"], found["not_sent"]) == (4, 1, 1)
    assert found["failures"] == [{"kind": "HTTP 500", "count": 1, "first": "oops"}]


def test_who_is_refused_rests_as_long_as_it_was_told_but_not_for_ever() -> None:
    refused = {0: Failure("HTTP 429", "full")}
    assert go_and_see(refused, 7.0) == pytest.approx([0, 7])
    assert go_and_see(refused, 3600.0) == pytest.approx([0, 30])


def go_and_see(failures: dict[int, Failure], retry_after: float) -> list[float]:
    server = Even(failures=failures, retry_after=retry_after)
    go(one_each(2), server, ClosedLoop(1))
    return server.sent


def test_a_server_that_has_gone_ends_the_run_and_what_came_is_kept() -> None:
    server = Even(failures={3: Failure(CONNECT, "Connection refused")}, listens=False)
    run = go(one_each(10), server, ClosedLoop(1))
    found = figures(run)
    assert run.gone == "Connection refused"
    assert (found["completed"], found["failed"], found["not_sent"]) == (3, 1, 6)
    assert found["mean_ttft_ms"] == pytest.approx(500)


def test_one_lost_connection_is_no_lost_server() -> None:
    run = go(one_each(4), Even(failures={1: Failure(CONNECT, "reset")}), ClosedLoop(2))
    assert not run.gone and figures(run)["completed"] == 3


def test_a_run_that_is_cut_short_keeps_what_came() -> None:
    async def whole() -> LoadRun:
        run = LoadRun(one_each(10), Even(), ClosedLoop(1))
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(run.go(), 2.0)
        return run

    run = run_in_virtual_time(whole())
    assert len(run.answers) == 2 and run.seconds == pytest.approx(2.0) and figures(run)["not_sent"] == 8


def answered(first: float, gaps: Sequence[float], tokens: int, sent: float = 0.0) -> Answer:
    request = Request(({"role": "user", "content": "a b c"},), tokens)
    pieces = [float(piece) for piece in np.cumsum([first, *gaps])]
    answer = Answer(request, sent, pieces=pieces, seconds=pieces[-1] + 0.05, text="some text")
    answer.prompt_tokens, answer.output_tokens, answer.cached_tokens = 10, tokens, 4
    return answer


def ended(answers: list[Answer], seconds: float = 10.0) -> LoadRun:
    run = LoadRun(one_each(len(answers)), Even(), ClosedLoop(4))
    run.answers, run.seconds, run.cpu_s = answers, seconds, 1.0
    return run


def test_figures_are_numpy_s_of_the_definitions() -> None:
    source = np.random.default_rng(0)
    answers = [
        answered(float(source.uniform(0.1, 2)), source.uniform(0, 0.3, 20).tolist(), 63, sent=float(number))
        for number in range(40)
    ]
    found = figures(ended(answers), percentiles=(50, 90, 99.9))
    values = {
        "ttft": [a.pieces[0] for a in answers],
        "tpot": [(a.seconds - a.pieces[0]) / 62 for a in answers],
        "itl": np.concatenate([np.diff(a.pieces) for a in answers]),
        "e2el": [a.seconds for a in answers],
    }
    for name, seconds in values.items():
        ms = np.array(seconds) * 1000
        told = [found[f"{of}_{name}_ms"] for of in ("mean", "median", "std", "p50", "p90", "p99.9")]
        assert told == pytest.approx([ms.mean(), np.median(ms), ms.std(), *np.percentile(ms, [50, 90, 99.9])])
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (400, 40 * 63)
    assert found["output_throughput"] == pytest.approx(252) and found["request_throughput"] == 4
    assert found["total_token_throughput"] == pytest.approx(292) and found["total_cached_tokens"] == 160
    assert found["tokens_per_event"] == pytest.approx(3), (
        "several tokens in an event are counted, not guessed"
    )


def test_the_keys_are_those_of_vllm_bench_serve() -> None:
    found = figures(ended([answered(0.5, [0.1], 2)]))
    assert found.keys() >= {
        *("num_prompts", "request_rate", "burstiness", "max_concurrency", "duration", "completed", "failed"),
        *("total_input_tokens", "total_output_tokens", "request_throughput", "request_goodput"),
        *(
            "output_throughput",
            "total_token_throughput",
            "max_output_tokens_per_s",
            "max_concurrent_requests",
        ),
        *(
            f"{of}_{name}_ms"
            for of in ("mean", "median", "std", "p99")
            for name in ("ttft", "tpot", "itl", "e2el")
        ),
    }
    assert details(ended([answered(0.5, [0.1], 2)])).keys() >= {
        *("input_lens", "output_lens", "ttfts", "itls", "start_times", "errors"),
    }


def test_the_busiest_second_and_how_many_at_once() -> None:
    run = ended(
        [answered(0.5, [0.1] * 3, 8), answered(0.2, [1.0], 4, sent=0.5), answered(0.1, [0.1], 2, sent=9)]
    )
    found = figures(run)
    assert found["max_output_tokens_per_s"] == pytest.approx(10), "8 of the first, 2 of the second"
    assert found["max_concurrent_requests"] == 2


def test_tokens_that_nobody_counted_are_not_known() -> None:
    quiet = answered(0.5, [0.1], 2)
    quiet.output_tokens = quiet.prompt_tokens = None
    run = ended([answered(0.5, [0.1], 2), quiet])
    found = figures(run)
    assert found["tokens_counted_by"] == "nobody" and found["total_output_tokens"] is None
    assert found["output_throughput"] is None and found["mean_ttft_ms"] == pytest.approx(500)
    assert any("--tokenizer" in warning for warning in warnings(found))
    found = figures(run, count=lambda text: len(text.split()))
    assert found["tokens_counted_by"] == "the server and the tokenizer" and found["total_output_tokens"] == 4


def test_an_answer_in_one_event_has_no_time_per_token() -> None:
    found = figures(ended([answered(0.5, [], 9)]))
    assert found["mean_tpot_ms"] is None and found["mean_itl_ms"] is None
    assert found["mean_ttft_ms"] == pytest.approx(500) and found["tokens_per_event"] == 9


def test_no_answer_at_all() -> None:
    failed = Answer(Request((), 1), 0.0, failure=Failure("HTTP 503", "no"))
    found = figures(ended([failed]))
    assert (found["completed"], found["failed"], found["request_throughput"]) == (0, 1, 0)
    assert found["mean_ttft_ms"] is found["total_output_tokens"] is found["max_output_tokens_per_s"] is None


def test_goodput_counts_who_keeps_all_goals() -> None:
    run = ended([answered(0.1, [0.1], 2), answered(0.1, [0.9], 2), answered(0.9, [0.1], 2)])
    assert figures(run, goals=parse_goals(["ttft:500", "tpot:200"]))["request_goodput"] == pytest.approx(0.1)
    assert figures(run, goals=parse_goals(["ttft:500"]))["request_goodput"] == pytest.approx(0.2)
    assert figures(run)["request_goodput"] is None
    run.answers[1].output_tokens = None  # then nobody knows whether it kept the second
    assert figures(run, goals=parse_goals(["ttft:500", "tpot:200"]))["request_goodput"] is None
    assert figures(run, goals=parse_goals(["ttft:500"]))["request_goodput"] == pytest.approx(0.2)
    with pytest.raises(RequestError, match="--goodput: got 'itl:5'"):
        parse_goals(["itl:5"])


def test_a_client_that_is_the_bottleneck_says_so() -> None:
    run = ended([answered(0.5, [0.1], 2)], seconds=1.0)
    run.lags = [0.0] * 50 + [0.2] * 50
    said = warnings(figures(run))
    assert len(said) == 2 and "late by 200 ms" in said[0] and "100 % of a core" in said[1]
    run.lags, run.cpu_s = [0.001] * 100, 0.1
    assert warnings(figures(run)) == []
