"""Deadlines, timings and counters by a clock that the tests set."""

from __future__ import annotations

from typing import Any

import pytest

from qwenrt.engine.engine import Engine
from qwenrt.engine.thoughts import ThoughtRules
from qwenrt.outputs import Timing
from qwenrt.sampling_params import SamplingParams
from tests.engine.conftest import ScriptedSampler, byte_tokenizer, last, make_engine, run, text, tokens

LONG = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def tick(self) -> None:
        self.now += 1.0


def clocked(**settings: Any) -> tuple[Engine, Clock]:
    clock = Clock()
    return make_engine(clock=clock, **settings), clock


def test_a_request_ends_at_its_deadline_in_every_state() -> None:
    engine, clock = clocked(max_num_seqs=2, max_num_batched_tokens=8)
    limited = LONG.with_(timeout=5)
    decoding = engine.add([1, 2], limited)
    prefilling = engine.add([3] * 120, limited)
    queued = engine.add([4], limited.with_(n=2))
    free = engine.add([5], LONG.with_(max_tokens=2))
    outputs = run(engine, clock.tick)
    whole = make_engine()
    whole.add([1, 2], LONG, request_id="r")
    told = tokens(outputs[decoding])
    assert 1 <= len(told) <= 6 and told == tokens(run(whole)["r"])[: len(told)]
    for name, count in ((decoding, len(told)), (prefilling, 0), (queued, 0)):
        end = last(outputs[name])
        assert end.finish_reason == "timeout" and outputs[name][-1].finished
        assert end.usage is not None and end.usage.completion_tokens == count
        assert end.timing is not None and end.timing.total_s == 5
    assert last(outputs[queued], 1).finish_reason == "timeout"
    assert last(outputs[free]).finish_reason == "length"
    assert engine.blocks.num_free == engine.blocks.num_blocks
    assert engine.stats()["finished"] == {"timeout": 4, "length": 1} and engine.stats()["cancelled"] == 0


def test_what_was_held_back_is_told_at_the_deadline() -> None:
    engine, clock = clocked(tokenizer=byte_tokenizer())
    ScriptedSampler(engine, list(b"abcSTxxxxxx"))
    name = engine.add([1], LONG.with_(timeout=5, stop="STOP", logprobs=0))
    outputs: list[Any] = []
    while text(outputs) != "abc" or engine.completions.running[name].open[0].seq.num_output < 5:
        outputs += engine.step()
    clock.now += 5
    outputs += engine.step()
    assert text(outputs) == "abcST" and last(outputs).finish_reason == "timeout"


def test_the_earliest_deadline_is_looked_at_though_others_ended() -> None:
    engine, clock = clocked()
    names = [engine.add([n], LONG.with_(timeout=t)) for n, t in ((1, 30), (2, 3), (3, 10))]
    engine.abort(names[1])
    ends = {}
    for _ in range(50):
        for output in engine.step():
            if output.finished:
                ends[output.request_id] = (output.delta.finish_reason, clock.now)
        clock.tick()
    assert ends == {
        names[1]: ("abort", 1000.0),
        names[2]: ("timeout", 1010.0),
        names[0]: ("timeout", 1030.0),
    }
    assert not engine.has_work


def test_a_completion_says_where_its_time_went() -> None:
    engine, clock = clocked(max_num_seqs=1)
    first = engine.add([1, 2], LONG.with_(max_tokens=3))
    second = engine.add([1, 2], LONG.with_(max_tokens=4))
    outputs = run(engine, clock.tick)
    late = engine.runner.depth  # a token is collected in the step after the one that computes it
    timing = last(outputs[first]).timing
    assert timing is not None and timing.queue_s == 0 and timing.first_token_s == late
    assert timing.total_s == 2 + late and timing.tokens_per_s == 1.0
    timing = last(outputs[second]).timing
    assert timing is not None and timing.queue_s >= 3 and timing.first_token_s == timing.queue_s + late
    assert timing.tokens_per_s == 1.0
    assert all(o.delta.timing is None for o in outputs[first][:-1])
    name = engine.add([1], LONG)
    clock.now += 7
    engine.abort(name)
    [end] = engine.step()
    assert end.delta.timing == Timing(queue_s=7.0, first_token_s=0.0, total_s=7.0, tokens_per_s=0.0)


def test_counters_say_what_was_found_and_computed() -> None:
    engine, clock = clocked()
    engine.add([7] * 40, LONG.with_(max_tokens=2))
    run(engine)
    stats = engine.stats()
    assert (stats["prompt_tokens_looked_up"], stats["prompt_tokens_found"]) == (40, 0)
    assert stats["prompt_tokens_computed"] == 40 and stats["generated_tokens"] == 2 and not stats["pending"]
    engine.add([7] * 40, LONG.with_(max_tokens=2))
    assert engine.stats()["pending"]
    engine.abort(engine.add([9], LONG))
    run(engine)
    stats = engine.stats()
    assert (stats["prompt_tokens_looked_up"], stats["prompt_tokens_found"]) == (80, 32)
    assert stats["prompt_tokens_computed"] == 48 and stats["cancelled"] == 1
    assert stats["finished"] == {"length": 2, "abort": 1}
    assert stats["last_step_age_s"] == 0.0
    clock.now += 9
    assert engine.stats()["last_step_age_s"] == 9.0


@pytest.mark.parametrize(
    ("salts", "found"), [(("", ""), 32), (("a", "a"), 32), (("a", "b"), 0), (("", "a"), 0)]
)
def test_prompts_share_blocks_only_with_their_salt(salts: tuple[str, str], found: int) -> None:
    engine = make_engine()
    for salt in salts:
        engine.add([7] * 40, LONG.with_(max_tokens=2, cache_salt=salt), request_id=salt + "!")
        outputs = run(engine)[salt + "!"]
    usage = last(outputs).usage
    assert usage is not None and usage.cached_tokens == found


def test_another_ntk_factor_shares_nothing_in_spite_of_the_salt() -> None:
    engine = make_engine(max_model_len=512, num_blocks=64)
    factors = {}
    for length in (40, 200):
        engine.add([7] * length, LONG.with_(max_tokens=1, cache_salt="a"), request_id=str(length))
        [running] = engine.completions.running.values()
        factors[length] = running.open[0].seq.root
        usage = last(run(engine)[str(length)]).usage
        assert usage is not None and usage.cached_tokens == 0
    assert factors[40] != factors[200] and {salt for _, salt, _ in factors.values()} == {"a"}


def test_a_thought_is_cut_at_its_budget_and_the_answer_goes_on_as_if_it_had_been_written() -> None:
    words = (7, 8, 500, 9)
    engine = make_engine(max_num_batched_tokens=4)
    name = engine.add(
        [1, 2, 3],
        LONG.with_(max_tokens=20, n=2),
        thought=ThoughtRules(None, 500, words, in_thought=True, budget=5),
    )
    outputs = run(engine)[name]
    free = make_engine()
    free.add([1, 2, 3], LONG.with_(max_tokens=5), request_id="r")
    thought = tokens(run(free)["r"])
    free.add([1, 2, 3, *thought, *words], LONG.with_(max_tokens=15), request_id="r")
    answer = tokens(run(free)["r"])
    for index in (0, 1):
        assert tokens(outputs, index) == [*thought, *words, *answer]
        usage = last(outputs, index).usage
        assert usage is not None and usage.completion_tokens == 24 and usage.reasoning_tokens == 8


def test_a_thought_that_no_answer_could_follow_is_left_alone() -> None:
    engine = make_engine(max_model_len=16, num_blocks=1)
    rules = ThoughtRules(None, 500, (7,) * 6, in_thought=True, budget=1)
    name = engine.add([1] * 9, LONG.with_(max_tokens=None), thought=rules)
    outputs = run(engine)[name]
    assert len(tokens(outputs)) == 7 and last(outputs).finish_reason == "length"
    usage = last(outputs).usage
    assert usage is not None and usage.reasoning_tokens == 7


def test_a_thought_that_has_not_begun_is_ended_when_it_does() -> None:
    engine = make_engine()
    ScriptedSampler(engine, [50, 499, 60, 61, 62])
    rules = ThoughtRules(499, 500, (500, 9), in_thought=False)
    params = LONG.with_(max_tokens=6, logprobs=0)
    name = engine.add([1], params, thought=rules)
    engine.end_thought(name)
    engine.end_thought("unknown")
    outputs = run(engine)[name]
    assert tokens(outputs)[:4] == [50, 499, 500, 9] and len(tokens(outputs)) == 8
    usage = last(outputs).usage
    assert usage is not None and usage.reasoning_tokens == 2
