"""The engine against the recorded checkpoints: however requests are mixed and cut, each gets its own tokens."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenrt.model.rotary import ntk_alpha
from qwenrt.ops.steps import StepPlan
from qwenrt.sampling_params import SamplingParams
from tests.conftest import DENSE_GOLDENS, GPTQ_GOLDENS
from tests.engine.conftest import (
    RecordingSampler,
    golden_model,
    golden_record,
    last,
    make_engine,
    run,
    tokens,
)

GREEDY = SamplingParams(temperature=0, max_tokens=24)


def keys_of(name: str) -> list[str]:
    return sorted({key.rsplit(".", 1)[0] for key in golden_record(name)})


@pytest.mark.parametrize("name", DENSE_GOLDENS + GPTQ_GOLDENS)
def test_recorded_tokens_and_logits_alone_and_together(name: str) -> None:
    golden = golden_record(name)
    keys = keys_of(name)
    for alone in (True, False):
        engine = make_engine(name, max_num_batched_tokens=64, prefix_caching=False)
        rows = RecordingSampler(engine).rows
        for key in keys:
            count = len(golden[f"{key}.new_tokens"])
            params = GREEDY.with_(max_tokens=count + 1)
            engine.add(golden[f"{key}.ids"].tolist(), params, request_id=key)
            if alone:
                check_recorded(golden, key, run(engine)[key], rows[key, 0])
        if not alone:
            outputs = run(engine)
            for key in keys:
                check_recorded(golden, key, outputs[key], rows[key, 0])


def check_recorded(golden: dict[str, torch.Tensor], key: str, outputs: Any, rows: list[torch.Tensor]) -> None:
    torch.testing.assert_close(torch.stack(rows), golden[f"{key}.step_logits"], atol=1e-4, rtol=0)
    assert tokens(outputs)[:-1] == golden[f"{key}.new_tokens"].tolist()
    assert last(outputs).finish_reason == "length"


def test_logits_of_a_text_are_the_recorded_ones() -> None:
    engine, golden = make_engine("ntk_logn"), golden_record("ntk_logn")
    for key in keys_of("ntk_logn"):
        logits = engine.prefills.logits(golden[f"{key}.ids"].tolist())
        torch.testing.assert_close(logits, golden[f"{key}.prefill_logits"], atol=1e-4, rtol=0)


@cache
def decided_prompts() -> list[tuple[list[int], list[int]]]:
    """Prompts that share beginnings and cross NTK's steps, and their greedy tokens as far as the likeliest token
    leads by more than rounding can change."""
    model = golden_model("ntk_logn")
    source = torch.Generator().manual_seed(5)
    base = torch.randint(0, 512, (90,), generator=source).tolist()
    prompts = [base[:n] for n in (1, 5, 17, 31, 32, 33, 48, 64, 65, 80)]
    prompts += [[*base[:n], 7, 8, 9] for n in (16, 31, 40)]
    found = []
    for prompt in prompts:
        alpha, ids = ntk_alpha(len(prompt), model.config), list(prompt)
        while len(ids) < len(prompt) + 12:
            plan = StepPlan([len(ids)], [len(ids)])
            best = model.logits(model.forward(torch.tensor(ids), plan, [alpha])[-1:]).topk(2)
            if best.values[0, 0] - best.values[0, 1] < 1e-3:
                break
            ids.append(int(best.indices[0, 0]))
        if len(ids) > len(prompt):
            found.append((prompt, ids[len(prompt) :]))
    assert len(found) >= 10
    return found


@settings(deadline=None, max_examples=12)
@given(st.data())
def test_any_mix_gives_what_each_gives_alone(data: st.DataObject) -> None:
    prompts = decided_prompts()
    block_size = data.draw(st.sampled_from([1, 3, 8, 16, 32]), "block_size")
    engine = make_engine(
        "ntk_logn",
        max_model_len=112,
        block_size=block_size,
        max_num_seqs=data.draw(st.integers(1, 6), "max_num_seqs"),
        max_num_batched_tokens=data.draw(st.sampled_from([1, 7, 32, 200]), "max_num_batched_tokens"),
        num_blocks=-(-112 // block_size) * data.draw(st.sampled_from([1, 2, 4]), "contexts"),
        prefix_caching=data.draw(st.booleans(), "prefix_caching"),
    )
    chosen = data.draw(st.lists(st.integers(0, len(prompts) - 1), min_size=1, max_size=6), "prompts")
    expected: dict[str, list[int]] = {}
    outputs: dict[str, list[Any]] = {}
    for which in chosen:
        prompt, wanted = prompts[which]
        n = data.draw(st.integers(1, 2))
        request_id = engine.add(prompt, SamplingParams(temperature=0, max_tokens=len(wanted), n=n))
        expected[request_id] = wanted
        for _ in range(data.draw(st.integers(0, 3))):
            for output in engine.step():
                outputs.setdefault(output.request_id, []).append(output)
    for request_id, rest in run(engine).items():
        outputs.setdefault(request_id, []).extend(rest)
    for request_id, wanted in expected.items():
        for index in {o.delta.index for o in outputs[request_id]}:
            assert tokens(outputs[request_id], index) == wanted
        assert [o.finished for o in outputs[request_id]].count(True) == 1
        assert outputs[request_id][-1].finished
    assert engine.blocks.num_free == engine.blocks.num_blocks


def test_preempted_sequences_go_on_where_they_were() -> None:
    prompts = [(p, wanted) for p, wanted in decided_prompts() if len(wanted) == 12][-3:]
    engine = make_engine("ntk_logn", max_model_len=96, block_size=4, num_blocks=27, prefix_caching=False)
    for i, (prompt, _) in enumerate(prompts):
        engine.add(prompt, SamplingParams(temperature=0, max_tokens=12), request_id=str(i))
    outputs = run(engine)
    assert engine.stats()["preemptions"] > 0
    for i, (_, wanted) in enumerate(prompts):
        assert tokens(outputs[str(i)]) == wanted


def test_a_shared_prefix_is_reported_and_changes_nothing() -> None:
    engine, golden = make_engine("ntk_logn"), golden_record("ntk_logn")
    prompt = golden["6.ids"].tolist()
    rows = RecordingSampler(engine).rows
    engine.add(prompt, GREEDY, request_id="cold")
    cold = run(engine)["cold"]
    engine.add(prompt, GREEDY, request_id="warm")
    warm = run(engine)["warm"]
    usage = last(warm).usage
    assert usage is not None and usage.cached_tokens == 96 and usage.prompt_tokens == 100
    cold_usage = last(cold).usage
    assert cold_usage is not None and cold_usage.cached_tokens == 0
    assert tokens(warm) == tokens(cold) == golden["6.new_tokens"].tolist()
    torch.testing.assert_close(torch.stack(rows["warm", 0]), torch.stack(rows["cold", 0]), atol=1e-4, rtol=0)


def test_a_prefix_rotated_by_another_ntk_factor_is_not_shared() -> None:
    engine = make_engine("ntk_logn")
    long = golden_record("ntk_logn")["6.ids"].tolist()  # 100 tokens: alpha 7
    engine.add(long, GREEDY.with_(max_tokens=1))
    run(engine)
    engine.add(long[:20], GREEDY, request_id="short")  # alpha 1
    usage = last(run(engine)["short"]).usage
    assert usage is not None and usage.cached_tokens == 0


def test_several_completions_share_their_prompt() -> None:
    engine = make_engine("ntk_logn")
    prompt = golden_record("ntk_logn")["3.ids"].tolist()
    engine.add(prompt, SamplingParams(n=3, seed=1, max_tokens=8), request_id="r")
    outputs = run(engine)["r"]
    assert len({tuple(tokens(outputs, i)) for i in range(3)}) == 3
    used = [last(outputs, i).usage for i in range(3)]
    assert [u.cached_tokens for u in used if u] == [0, 32, 32]
    assert [u.completion_tokens for u in used if u] == [8, 8, 8]


def test_a_seed_means_the_same_tokens_in_any_company() -> None:
    prompt = golden_record("ntk_logn")["3.ids"].tolist()
    params = SamplingParams(seed=7, temperature=1.3, top_k=50, top_p=0.95, max_tokens=16)
    alone = make_engine("ntk_logn")
    alone.add(prompt, params, request_id="r")
    expected = tokens(run(alone)["r"])
    crowd = make_engine("ntk_logn", max_num_batched_tokens=9, block_size=4, num_blocks=30, max_model_len=64)
    crowd.add(prompt[:30], SamplingParams(max_tokens=20), request_id="a")
    crowd.add(prompt, params, request_id="r")
    crowd.add(prompt[:9], SamplingParams(n=2, max_tokens=20), request_id="b")
    outputs = run(crowd)
    assert crowd.stats()["preemptions"] > 0
    assert tokens(outputs["r"]) == expected
    again = make_engine("ntk_logn")
    again.add(prompt, params.with_(seed=None), request_id="r")
    assert tokens(run(again)["r"]) != expected


def test_what_unused_slots_hold_does_not_matter() -> None:
    engine, golden = make_engine("ntk_logn", max_num_batched_tokens=7), golden_record("ntk_logn")
    for layer in engine.runner.cache.layers:
        layer.k.fill_(torch.nan)
        layer.v.fill_(torch.nan)
    engine.add(golden["5.ids"].tolist(), GREEDY, request_id="r")
    assert tokens(run(engine)["r"]) == golden["5.new_tokens"].tolist()


def test_an_int8_cache_stays_close_and_does_not_depend_on_the_cutting() -> None:
    golden = golden_record("ntk_logn")
    rows: list[torch.Tensor] = []
    for budget in (128, 7):
        engine = make_engine("ntk_logn", kv_cache_dtype="int8", max_num_batched_tokens=budget)
        recorded = RecordingSampler(engine).rows
        engine.add(golden["6.ids"].tolist(), GREEDY.with_(max_tokens=1), request_id="r")
        run(engine)
        rows.append(recorded["r", 0][0])
    torch.testing.assert_close(rows[0], rows[1], atol=1e-3, rtol=0)
    exact = golden["6.step_logits"][0]
    assert (rows[0] - exact).abs().max() < 0.05 * exact.std()
    plain = make_engine("ntk_logn", num_blocks=8).cache_bytes
    assert make_engine("ntk_logn", num_blocks=8, kv_cache_dtype="int8").cache_bytes < 0.5 * plain
