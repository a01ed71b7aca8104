"""Experts in the stack of layers that runs in one call, against the seams."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from qwenrt.backends.cpu import CPUBackend
from qwenrt.config.model import MoeConfig
from tests.backends.test_cpu_decoder import (
    DENSE,
    LENGTHS,
    STEPS,
    WEIGHTS,
    Cache,
    both_ways,
    build,
    check,
)
from tests.kernel_sets import needs_kernels

pytestmark = needs_kernels
EXPERTS = dataclasses.replace(DENSE, moe=MoeConfig(6, 2, 24, 40, dense_layers=frozenset((1,))))

# Beside other sums in the router, an activation in the middle between two codes falls to the other.
ROUNDED_AGAIN = {"exact": 1e-5, "int16": 5e-3, "int8": 2e-2}


@pytest.mark.parametrize("form", WEIGHTS)
@pytest.mark.parametrize("activations", ["exact", "int16", "int8"])
def test_experts_with_dense_layers_between(cpu: CPUBackend, form: str, activations: str) -> None:
    """The router's sums are in another order than torch's: what follows is equal where its scores do not matter."""
    cpu.configure(activations=activations, num_threads=2)
    kinds = ((40, 2, True), (0, 6, False), (0, 1, True))
    for shared, top_k, norm in kinds if activations == "exact" else kinds[:1]:
        moe = MoeConfig(6, top_k, 24, shared, norm, frozenset((1,)))
        model = build(cpu, dataclasses.replace(DENSE, moe=moe), form)
        check(model, int8=top_k == 2, most=0.0 if norm and top_k == 1 else ROUNDED_AGAIN[activations])


@pytest.mark.parametrize(("count", "top_k"), [(6, 2), (7, 7), (40, 9), (130, 2), (65, 1)])
def test_experts_of_equal_scores_are_chosen_as_torch_does(cpu: CPUBackend, count: int, top_k: int) -> None:
    moe = MoeConfig(count, top_k, 8, 0, False)
    model = build(cpu, dataclasses.replace(DENSE, num_layers=1, moe=moe), "bfloat16")
    router = model.weights.tensor("layers.0.router")
    router.zero_()
    for whole, seams in both_ways(model, LENGTHS, STEPS):
        assert torch.allclose(whole, seams, rtol=1e-6, atol=1e-6)
    router[torch.arange(count), torch.arange(count) % 3] = 2.0  # three different scores, of no sum
    for whole, seams in both_ways(model, LENGTHS, STEPS):
        assert torch.allclose(whole, seams, rtol=1e-5, atol=1e-5)


def test_batches_and_threads_change_no_bit_of_experts(cpu: CPUBackend) -> None:
    cpu.configure(activations="int16", num_threads=2)
    model = build(cpu, dataclasses.replace(EXPERTS, hidden_size=512, moe=MoeConfig(8, 3, 128, 64)))
    cache = Cache(model, [20, 16])
    both = torch.cat([cache.step([(0, 10), (0, 16)]), cache.step([(10, 20), (16, 16)])])
    alone = torch.cat([cache.step([(i, i + 1), (16, 16)]) for i in range(20)])
    assert torch.equal(alone, torch.cat([both[:10], both[26:]]))
    cpu.configure(activations="int16", num_threads=1)
    assert torch.equal(cache.step([(0, 10), (0, 16)]), both[:26])


@pytest.mark.parametrize("form", ["bfloat16", "int4"])
def test_experts_of_a_token_that_is_not_finite(cpu: CPUBackend, form: str) -> None:
    cpu.configure(activations="int16")
    model = build(cpu, EXPERTS, form)
    first = Cache(model, [4, 4])
    first.tokens = [torch.tensor([1, 2, 3, 4]), torch.tensor([5, 6, 7, 8])]
    wanted = first.step([(0, 4), (0, 4)])
    model.embed_tokens[9] = float("nan")
    second = Cache(model, [4, 4])
    second.tokens = [torch.tensor([1, 2, 9, 4]), torch.tensor([5, 6, 7, 8])]
    got = second.step([(0, 4), (0, 4)])
    assert bool(got[2].isnan().all())
    for here in (slice(4, 8),):
        assert torch.allclose(got[here], wanted[here], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["Qwen2Moe", "Qwen3Moe"])
def test_checkpoints_with_experts_answer_the_same_both_ways(tmp_path: Path, kind: str) -> None:
    tiny_models = pytest.importorskip("tests.model.tiny_models", reason="needs transformers")
    moe = tiny_models.QWEN2_MOE if kind == "Qwen2Moe" else {**tiny_models.MOE, "head_dim": 8}
    tiny_models.build(kind, {**moe, "mlp_only_layers": [1]}, tmp_path)
    with tiny_models.load(tmp_path, quantize="int4", activations="exact") as llm:
        stacks, answers = llm._alive().engine._alive().runner.stacks, []
        assert [stack.name for stack in stacks] == ["one call", "seams"]
        for _ in range(2):
            answers.append(llm.generate(prompt_token_ids=[5, 6, 7], max_tokens=24, temperature=0).token_ids)
            del stacks[:-1]
    assert answers[0] == answers[1] and len(answers[0]) == 24
