"""Adapters in the engine: who gets which, what the cache shares, and how they come and go."""

from __future__ import annotations

import random

import pytest
import torch

from qwenrt.engine.async_engine import AsyncEngine
from qwenrt.engine.engine import Engine
from qwenrt.errors import CapacityError, CheckpointError, RequestError
from qwenrt.ops.types import AdapterWeights, LoraPair
from qwenrt.sampling_params import SamplingParams
from tests.adapters import random_adapter
from tests.engine.conftest import golden_model, last, make_engine, run, tokens

PROMPT = list(range(30, 70))
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


def weights(seed: int, name: str = "plain", **more: bool) -> AdapterWeights:
    return random_adapter(golden_model(name), seed, **more)


def engine_with(*names: str, model: str = "plain", **settings: object) -> Engine:
    engine = make_engine(model, **settings)
    for i, name in enumerate(names):
        engine.adapters.load(name, weights(i + 1, model))
    return engine


def answer(engine: Engine, adapter: str | None, prompt: list[int] = PROMPT) -> list[int]:
    request = engine.add(prompt, GREEDY, adapter=adapter)
    return tokens(run(engine)[request])


def expected(model: str, adapter: AdapterWeights | None, prompt: list[int] = PROMPT) -> list[int]:
    """By the whole text's logits, without a cache."""
    runner, ids = make_engine(model).runner, list(prompt)
    for _ in range(8):
        ids.append(int(runner.logits(ids, adapter)[-1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("model", ["plain", "qwen3_5_moe"])
def test_each_request_is_answered_with_its_own(model: str) -> None:
    engine = engine_with("a", "b", model=model, max_num_batched_tokens=24)
    wanted = {None: None, "a": weights(1, model), "b": weights(2, model)}
    requests = {engine.add(PROMPT, GREEDY, adapter=name): name for name in (None, "a", "b", "a")}
    outputs = run(engine)
    answers = [expected(model, adapter) for adapter in wanted.values()]
    assert len({tuple(one) for one in answers}) == 3
    for request, name in requests.items():
        assert tokens(outputs[request]) == answers[list(wanted).index(name)]
    assert engine.adapters.loaded["a"].served == 2 and engine.adapters.loaded["a"].running == 0


def test_answers_do_not_depend_on_who_is_beside_them() -> None:
    rng = random.Random(0)
    alone = {
        (name, n): answer(engine_with("a", "b"), name, PROMPT[:n]) for name in "ab" for n in (14, 30, 31)
    }
    engine = engine_with("a", "b", num_blocks=7, max_num_seqs=5, max_num_batched_tokens=20, max_model_len=100)
    asked = [rng.choice(list(alone)) for _ in range(12)]
    requests = [engine.add(PROMPT[:n], GREEDY, adapter=name) for name, n in asked]
    outputs = run(engine)
    assert engine.scheduler.num_preemptions > 0  # they were cut, thrown out and begun again
    for request, one in zip(requests, asked, strict=True):
        assert tokens(outputs[request]) == alone[one]


def test_completions_of_one_request_share_its_adapter_and_prompt() -> None:
    engine = engine_with("a")
    params = SamplingParams(temperature=1.0, n=3, seed=5, max_tokens=4, ignore_eos=True)
    request = engine.add(PROMPT, params, adapter="a")
    outputs = run(engine)[request]
    usage = last(outputs, 2).usage
    assert usage is not None and usage.cached_tokens >= 32
    single = engine_with("a")
    again = single.add(PROMPT, SamplingParams(**{**params.__dict__, "n": 1}), adapter="a")
    assert tokens(run(single)[again]) == tokens(outputs, 0)


def test_what_one_load_cached_no_other_finds() -> None:
    engine = engine_with("a", "b")

    def cached(adapter: str | None) -> int:
        request = engine.add(PROMPT, GREEDY, adapter=adapter)
        usage = last(run(engine)[request]).usage
        assert usage is not None
        return usage.cached_tokens

    assert [cached(name) for name in ("a", "a", "b", None, None, "a")] == [0, 32, 0, 0, 32, 32]
    engine.adapters.unload("a")
    engine.adapters.load("a", weights(3))
    assert cached("a") == 0
    assert answer(engine, "a") == expected("plain", weights(3))


def test_unloading_frees_blocks_and_memory() -> None:
    engine = engine_with("a")
    answer(engine, "a")
    answer(engine, None)
    before, number = engine.blocks.num_findable, engine.adapters.loaded["a"].number
    engine.adapters.unload("a")
    assert number not in engine.adapters.serving
    engine.tend()
    assert engine.blocks.num_findable == before // 2 and engine.blocks.num_free == engine.blocks.num_blocks
    assert answer(engine, None) == expected("plain", None)


def test_one_that_is_unloaded_ends_what_it_has_begun() -> None:
    engine = engine_with("a", max_num_batched_tokens=16)
    request = engine.add(PROMPT, GREEDY, adapter="a")
    checked = engine.check(PROMPT, GREEDY, adapter="a")
    engine.step()
    engine.adapters.unload("a")
    with pytest.raises(RequestError, match="loaded: none"):
        engine.add(PROMPT, GREEDY, adapter="a")
    engine.adapters.load("a", weights(2))
    engine.enqueue(checked)  # it was checked while the first was loaded
    outputs = run(engine)
    assert tokens(outputs[request]) == tokens(outputs[checked.request_id]) == expected("plain", weights(1))
    assert len(engine.adapters.serving) == 1


def test_a_cancelled_request_lets_go() -> None:
    engine = engine_with("a")
    request = engine.add(PROMPT, GREEDY, adapter="a")
    engine.step()
    engine.adapters.unload("a")
    engine.abort(request)
    run(engine)
    assert not engine.adapters.serving and not engine.adapters.loaded


def test_the_idle_one_that_was_used_longest_ago_makes_room() -> None:
    engine = engine_with("a", "b", max_adapters=2)
    answer(engine, "a")
    engine.adapters.load("c", weights(3))
    assert list(engine.adapters.loaded) == ["a", "c"]
    with pytest.raises(RequestError, match="loaded: 'a', 'c'; this one made room for 'c'"):
        engine.add(PROMPT, GREEDY, adapter="b")
    for name in "ac":
        engine.add(PROMPT, GREEDY, adapter=name)
    with pytest.raises(CapacityError, match="requests use all of them"):
        engine.adapters.load("d", weights(4))
    run(engine)
    assert not engine.adapters.loaded["a"].running


def test_loading_many_times_leaves_nothing_behind() -> None:
    engine = engine_with()
    for _ in range(1000):
        engine.adapters.load("a", AdapterWeights())
        engine.adapters.unload("a")
    assert not engine.adapters.serving and not engine.adapters.loaded
    assert len(engine.adapters.take_gone()) == 1000
    assert engine.adapters.load("a", AdapterWeights()).number == 1001


@pytest.mark.parametrize("name", ["", " a", "a\n", 7, "x" * 129])
def test_names_are_checked(name: object) -> None:
    with pytest.raises(RequestError, match="name of an adapter"):
        engine_with().adapters.load(name, AdapterWeights())  # type: ignore[arg-type]


def test_a_name_in_use_and_unknown_ones() -> None:
    engine = engine_with("a")
    with pytest.raises(RequestError, match="adapter of this name is loaded"):
        engine.adapters.load("a", AdapterWeights())
    for unknown in ("../a", "b", 3):
        with pytest.raises(RequestError, match="loaded: 'a'"):
            engine.add(PROMPT, GREEDY, adapter=unknown)
    with pytest.raises(RequestError, match="loaded: 'a'"):
        engine.adapters.unload("b")


def test_an_adapter_of_another_model_is_refused() -> None:
    engine = engine_with()
    d = golden_model("plain").config.hidden_size

    def pair(rows: int = 4, rank: int = 2, inputs: int = d, first: int = 0) -> LoraPair:
        return LoraPair(torch.zeros(rank, inputs), torch.zeros(rows, rank), first=first)

    for linears in (
        {"layers.99.qkv_proj": (pair(),)},
        {"layers.0.qkv_proj": (pair(inputs=d + 1),)},
        {"layers.0.qkv_proj": (pair(), pair(first=3))},
        {"layers.0.qkv_proj": (pair(first=10**6),)},
    ):
        with pytest.raises(CheckpointError, match="made for another model"):
            engine.adapters.load("a", AdapterWeights(linears))
    with pytest.raises(CapacityError, match="rank 600"):
        engine.adapters.load("a", AdapterWeights({"layers.0.qkv_proj": (pair(rank=600),)}))
    assert not engine.adapters.loaded


def test_any_thread_loads_and_unloads_while_others_are_served() -> None:
    engine = AsyncEngine(engine_with("a"))
    try:
        handle = engine.submit(PROMPT, GREEDY, adapter="a")
        engine.adapters.load("b", weights(2))
        other = engine.submit(PROMPT, GREEDY, adapter="b")
        engine.unload_adapter("a")
        answers = [[t for delta in one for t in delta.token_ids] for one in (handle, other)]
        assert answers == [expected("plain", weights(1)), expected("plain", weights(2))]
        logits = engine.logits(PROMPT, "b")
        assert int(logits[-1].argmax()) == answers[1][0]
        with pytest.raises(RequestError, match="loaded: 'b'"):
            engine.logits(PROMPT, "a")
    finally:
        engine.close()
