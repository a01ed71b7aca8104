"""The engine over recorded checkpoints with layers of linear attention: however requests are mixed, cut, preempted,
cancelled or found in the cache, each gets its own tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from qwenrt.errors import BackendError, ConfigError
from qwenrt.ops.steps import LayerState
from qwenrt.sampling_params import SamplingParams
from tests.conftest import HYBRID_GOLDENS
from tests.engine.conftest import (
    FaultyBackend,
    RecordingSampler,
    golden_record,
    last,
    make_engine,
    run,
    tokens,
)

GREEDY = SamplingParams(temperature=0, max_tokens=13)


def keys_of(name: str) -> list[str]:
    return sorted(key.removesuffix(".ids") for key in golden_record(name) if key.endswith(".ids"))


def prompt_of(name: str, key: str) -> list[int]:
    return golden_record(name)[f"{key}.ids"].tolist()


def check(name: str, key: str, outputs: Any) -> None:
    assert tokens(outputs)[:12] == golden_record(name)[f"{key}.new_tokens"].tolist()


@pytest.mark.parametrize(
    ("name", "chunk"), [*((name, chunk) for name in HYBRID_GOLDENS for chunk in (7, 512)), ("qwen3_5", 1)]
)
def test_recorded_tokens_and_logits_together(name: str, chunk: int) -> None:
    engine = make_engine(name, max_num_batched_tokens=chunk, prefix_caching=False)
    rows = RecordingSampler(engine).rows
    for key in keys_of(name):
        engine.add(prompt_of(name, key), GREEDY, request_id=key)
    outputs = run(engine)
    for key in keys_of(name):
        check(name, key, outputs[key])
        recorded = golden_record(name)[f"{key}.step_logits"]
        torch.testing.assert_close(torch.stack(rows[key, 0]), recorded, atol=2e-4, rtol=0)


@settings(deadline=None, max_examples=8, phases=[Phase.generate])
@given(st.data())
def test_any_mix_gives_what_each_gives_alone(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(HYBRID_GOLDENS), "name")
    block_size = data.draw(st.sampled_from([3, 8, 16]), "block_size")
    engine = make_engine(
        name,
        max_model_len=160,
        block_size=block_size,
        max_num_seqs=data.draw(st.integers(1, 5), "max_num_seqs"),
        max_num_batched_tokens=data.draw(st.sampled_from([5, 40, 200]), "max_num_batched_tokens"),
        num_blocks=-(-160 // block_size) * data.draw(st.sampled_from([1, 2]), "contexts"),
        num_snapshots=data.draw(st.sampled_from([0, 1, 3, 12]), "num_snapshots"),
    )
    expected: dict[str, str] = {}
    outputs: dict[str, list[Any]] = {}

    def step(times: int) -> None:
        for output in (output for _ in range(times) for output in engine.step()):
            outputs.setdefault(output.request_id, []).append(output)

    for _ in range(data.draw(st.integers(1, 7), "requests")):
        key = data.draw(st.sampled_from(keys_of(name)), "key")
        n = data.draw(st.integers(1, 2), "n")
        request_id = engine.add(prompt_of(name, key), GREEDY.with_(n=n))
        if data.draw(st.booleans(), "cancelled"):
            step(data.draw(st.integers(0, 4), "steps before the end"))
            engine.abort(request_id)
        else:
            expected[request_id] = key
        step(data.draw(st.integers(0, 6), "steps"))
    for request_id, rest in run(engine).items():
        outputs.setdefault(request_id, []).extend(rest)
    for request_id, key in expected.items():
        for index in {o.delta.index for o in outputs[request_id]}:
            mine = [o for o in outputs[request_id] if o.delta.index == index]
            assert tokens(mine, index)[:12] == golden_record(name)[f"{key}.new_tokens"].tolist()
    assert_nothing_is_lost(engine)


def assert_nothing_is_lost(engine: Any) -> None:
    """Every slot is free or holds a snapshot that can be found."""
    states = engine.blocks.states
    held = [*states._free, *states._snapshots.values()]
    assert sorted(held) == list(range(states.num_slots))
    assert states._num_pending == 0


@pytest.mark.parametrize("name", HYBRID_GOLDENS)
def test_the_same_prompt_is_found_up_to_its_last_kept_state(name: str) -> None:
    engine = make_engine(name)
    rows = RecordingSampler(engine).rows
    for request_id in ("cold", "warm"):
        engine.add(prompt_of(name, "3"), GREEDY, request_id=request_id)
        outputs = run(engine)[request_id]
        check(name, "3", outputs)
        usage = last(outputs).usage
        assert usage is not None and usage.cached_tokens == (0 if request_id == "cold" else 96)
    torch.testing.assert_close(torch.stack(rows["warm", 0]), torch.stack(rows["cold", 0]), atol=2e-4, rtol=0)


def test_a_chat_that_grows_finds_what_could_be_found() -> None:
    engine, fresh = make_engine("qwen3_5", max_model_len=512), make_engine("qwen3_5", max_model_len=512)
    source = torch.Generator().manual_seed(3)
    text = prompt_of("qwen3_5", "2")
    found = could = before = 0
    for turn in range(5):
        params = GREEDY.with_(max_tokens=20 + turn)
        engine.add(text, params, request_id="r")
        outputs = run(engine)["r"]
        fresh.add(text, params.with_(cache_salt=str(turn)), request_id="r")  # finds nothing
        assert tokens(run(fresh)["r"]) == tokens(outputs)
        usage = last(outputs).usage
        assert usage is not None
        if turn:
            found += usage.cached_tokens
            could += (before - 1) // 16 * 16
        text = [*text, *tokens(outputs)]
        before = len(text)
        text += torch.randint(0, 120, (11,), generator=source).tolist()
    assert found >= 0.95 * could


def test_prompts_that_share_a_beginning_find_its_state_where_they_part() -> None:
    engine = make_engine("qwen3_next", max_model_len=400)
    source = torch.Generator().manual_seed(1)
    shared = torch.randint(0, 120, (150,), generator=source).tolist()
    cached = []
    for _ in range(3):
        own = torch.randint(0, 120, (60,), generator=source).tolist()
        engine.add(shared + own, GREEDY, request_id="r")
        usage = last(run(engine)["r"]).usage
        assert usage is not None
        cached.append(usage.cached_tokens)
    # the second one parts from the first after 150 tokens, and keeps the state there
    assert cached == [0, 0, 144]


def test_prompts_that_begin_alike_at_once_compute_the_beginning_once() -> None:
    engine = make_engine("qwen3_5_moe", max_model_len=400, max_num_batched_tokens=64)
    source = torch.Generator().manual_seed(1)
    shared = torch.randint(0, 120, (160,), generator=source).tolist()
    for i in range(3):
        engine.add([*shared, *[i + 1] * 40], GREEDY, request_id=str(i))
    outputs = run(engine)
    found = [usage.cached_tokens for i in range(3) if (usage := last(outputs[str(i)]).usage) is not None]
    assert found == [0, 160, 160]


@pytest.mark.parametrize("name", HYBRID_GOLDENS)
def test_after_preemption(name: str) -> None:
    engine = make_engine(name, max_model_len=160, block_size=8, num_blocks=20, max_num_batched_tokens=64)
    keys = ["1", "batch.0", "2"]
    for key in keys:
        engine.add(prompt_of(name, key), GREEDY.with_(max_tokens=40), request_id=key)
    outputs = run(engine)
    assert engine.stats()["preemptions"] > 0
    for key in keys:
        check(name, key, outputs[key])
    assert_nothing_is_lost(engine)


def test_what_unused_slots_hold_does_not_matter() -> None:
    engine = make_engine("qwen3_5", max_num_batched_tokens=40)
    for layer in engine.runner.cache.layers:
        for tensor in layer.tensors:
            tensor.fill_(torch.nan)
    for key in keys_of("qwen3_5"):
        engine.add(prompt_of("qwen3_5", key), GREEDY, request_id=key)
    outputs = run(engine)
    for key in keys_of("qwen3_5"):
        check("qwen3_5", key, outputs[key])


def test_a_state_that_was_poisoned_is_found_by_nobody() -> None:
    engine = make_engine("qwen3_5_vl")
    FaultyBackend.fault = lambda out: out * torch.nan
    engine.add(prompt_of("qwen3_5_vl", "3"), GREEDY, request_id="bad")
    assert isinstance(run(engine)["bad"][-1].error, BackendError)
    FaultyBackend.fault = None
    assert_nothing_is_lost(engine)
    engine.add(prompt_of("qwen3_5_vl", "3"), GREEDY, request_id="good")
    outputs = run(engine)["good"]
    check("qwen3_5_vl", "3", outputs)
    usage = last(outputs).usage
    assert usage is not None and usage.cached_tokens == 0


def test_its_memory_does_not_grow_with_the_context() -> None:
    short, long = (make_engine("qwen3_5", max_model_len=n, num_blocks=8) for n in (64, 256))
    states = [layer for layer in short.runner.cache.layers if isinstance(layer, LayerState)]
    assert len(states) == 4
    assert short.cache_bytes == long.cache_bytes
    assert short.cache_bytes == sum(t.nbytes for layer in short.runner.cache.layers for t in layer.tensors)


def test_a_store_on_disk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="states are not kept on disk"):
        make_engine("qwen3_5", prefix_store=tmp_path)
