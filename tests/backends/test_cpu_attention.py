"""Attention of csrc/: the same bits in every batch, cut and number of threads. That they are right is seen by
qwenrt.conformance."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwenrt.backends.binding import OpSpec
from qwenrt.backends.cpu import CPUBackend
from qwenrt.ops import reference
from qwenrt.ops.steps import LayerKV, StepPlan
from tests.kernel_sets import SETS, needs_kernels

CPU = torch.device("cpu")
needs_kernels = needs_kernels


class Step:
    """A step over a cache of scattered blocks that holds NaN wherever no token is."""

    def __init__(
        self,
        cpu: CPUBackend,
        lens: list[tuple[int, int]],
        heads: tuple[int, int, int],
        *,
        size: int = 16,
        quantized: bool = False,
        seed: int = 0,
    ) -> None:
        num_heads, num_kv_heads, head_dim = heads
        needed = [-(-kv // size) for _, kv in lens]
        order = list(range(sum(needed) + 2))
        random.Random(seed).shuffle(order)
        blocks = [[order.pop() for _ in range(count)] for count in needed]
        self.kv = cpu.alloc_kv(1, sum(needed) + 2, size, num_kv_heads, head_dim, torch.float32, quantized)[0]
        floats = (self.kv.k_scale, self.kv.k_zero, self.kv.v_scale, self.kv.v_zero)
        for side in floats if quantized else (self.kv.k, self.kv.v):
            assert side is not None
            side.fill_(float("nan"))
        torch.manual_seed(seed)
        keys, values, slots = [], [], []
        for (q_len, kv_len), table in zip(lens, blocks, strict=True):
            k, v = torch.randn(2, kv_len, num_kv_heads, head_dim)
            places = [table[p // size] * size + p % size for p in range(kv_len)]
            reference.store_kv(k, v, self.kv, torch.tensor(places, dtype=torch.int64))
            keys.append(k[kv_len - q_len :])
            values.append(v[kv_len - q_len :])
            slots += places[kv_len - q_len :]
        empty = torch.empty(0, num_kv_heads, head_dim)
        self.k, self.v = torch.cat([empty, *keys]), torch.cat([empty, *values])
        self.q = torch.randn(len(slots), num_heads, head_dim)
        self.plan = StepPlan(
            [q for q, _ in lens], [n for _, n in lens], torch.tensor(slots, dtype=torch.int64), blocks
        )

    def part(self, i: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, LayerKV, StepPlan]:
        """One sequence of the step, alone."""
        start = sum(self.plan.q_lens[:i])
        here = slice(start, start + self.plan.q_lens[i])
        assert self.plan.slots is not None
        plan = StepPlan(
            [self.plan.q_lens[i]], [self.plan.kv_lens[i]], self.plan.slots[here], [self.plan.block_table[i]]
        )
        return self.q[here], self.k[here], self.v[here], self.kv, plan

    @property
    def args(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, LayerKV, StepPlan]:
        return self.q, self.k, self.v, self.kv, self.plan


def assert_close(got: torch.Tensor, wanted: torch.Tensor, atol: float = 5e-6) -> None:
    assert got.shape == wanted.shape and got.dtype == wanted.dtype
    assert torch.allclose(got, wanted, rtol=1e-5, atol=atol)


@needs_kernels
@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lens=st.lists(
        st.tuples(
            st.sampled_from([0, 1, 1, 2, 3, 5, 16, 17, 100, 210]),
            st.sampled_from([0, 1, 3, 30, 255, 256, 600]),
        ),
        max_size=5,
    ),
    num_kv_heads=st.sampled_from([1, 2, 3]),
    group=st.sampled_from([1, 2, 7, 8, 16]),
    head_dim=st.sampled_from([8, 32, 40, 64, 80, 96, 128, 256]),
    window=st.sampled_from([0, 0, 1, 7, 100, 300]),
    size=st.sampled_from([1, 5, 16, 24]),
    quantized=st.booleans(),
    isa=st.sampled_from(SETS),
    seed=st.integers(0, 99),
)
def test_sequences_of_a_ragged_step_are_the_same_alone(
    cpu: CPUBackend,
    lens: list[tuple[int, int]],
    num_kv_heads: int,
    group: int,
    head_dim: int,
    window: int,
    size: int,
    quantized: bool,
    isa: str,
    seed: int,
) -> None:
    cpu.configure(isa)
    lens = [(q, q + history) for q, history in lens]
    heads = (num_kv_heads * group, num_kv_heads, head_dim)
    step, scale = Step(cpu, lens, heads, size=size, quantized=quantized, seed=seed), head_dim**-0.5
    got = cpu.attention(*step.args, scale, window)
    start = 0
    for i, (q_len, _) in enumerate(lens):
        alone = cpu.attention(*step.part(i), scale, window)
        assert torch.equal(alone, got[start : start + q_len])
        start += q_len


@needs_kernels
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("isa", SETS)
def test_a_token_is_the_same_in_a_chunk_and_alone_and_with_any_threads(
    cpu: CPUBackend, isa: str, quantized: bool
) -> None:
    for window in (0, 300):
        step = Step(cpu, [(8, 1030)], (8, 2, 64), quantized=quantized)
        cpu.configure(isa, num_threads=1)
        whole = cpu.attention(*step.args, 0.125, window)
        cpu.configure(isa, num_threads=3)
        assert torch.equal(cpu.attention(*step.args, 0.125, window), whole)
        assert step.plan.slots is not None
        for j in range(8):
            plan = StepPlan([1], [1023 + j], step.plan.slots[j : j + 1], step.plan.block_table)
            one = slice(j, j + 1)
            args = (step.q[one], step.k[one], step.v[one], step.kv, plan)
            assert torch.equal(cpu.attention(*args, 0.125, window), whole[one])


@needs_kernels
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("heads", [(4, 4, 128), (8, 1, 80), (14, 2, 64)])
def test_threads_change_no_bit_of_long_queries(
    cpu: CPUBackend, heads: tuple[int, int, int], quantized: bool
) -> None:
    for q_len, history, window in ((513, 0, 0), (513, 700, 0), (300, 90, 50), (300, 900, 300), (17, 2000, 0)):
        step, scale = Step(cpu, [(q_len, q_len + history)], heads, quantized=quantized, size=24), 0.1
        cpu.configure(num_threads=1)
        got = cpu.attention(*step.args, scale, window)
        cpu.configure(num_threads=3)
        assert torch.equal(cpu.attention(*step.args, scale, window), got)


@needs_kernels
@pytest.mark.parametrize("isa", SETS)
def test_a_long_prompt_in_pieces_is_the_same_as_whole(cpu: CPUBackend, isa: str) -> None:
    cpu.configure(isa)
    step = Step(cpu, [(240, 300)], (4, 2, 32))
    whole = cpu.attention(*step.args, 0.2)
    assert step.plan.slots is not None
    for first, last, same in ((0, 100, True), (100, 230, True), (230, 240, False)):
        here = slice(first, last)
        plan = StepPlan([last - first], [60 + last], step.plan.slots[here], step.plan.block_table)
        got = cpu.attention(step.q[here], step.k[here], step.v[here], step.kv, plan, 0.2)
        assert torch.equal(got, whole[here]) if same else torch.allclose(got, whole[here], atol=1e-5)


@needs_kernels
def test_torch_serves_nothing_that_is_in_the_cache(cpu: CPUBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step(cpu, [(1, 20), (0, 5), (16, 16), (200, 230)], (4, 2, 32))
    wanted = reference.attention(*step.args, 0.2)

    def refuse(*_: object, **__: object) -> torch.Tensor:
        raise AssertionError("the definition was asked")

    monkeypatch.setattr(reference, "attention", refuse)
    assert_close(cpu.attention(*step.args, 0.2), wanted)


@needs_kernels
@pytest.mark.parametrize("isa", SETS)
def test_a_query_that_is_not_finite_says_so_and_scores_may_be_huge(cpu: CPUBackend, isa: str) -> None:
    cpu.configure(isa)
    for bad in (float("nan"), float("inf"), -float("inf")):
        step = Step(cpu, [(1, 20), (3, 40)], (4, 2, 32))
        step.q[0] = bad
        got = cpu.attention(*step.args, 0.2)
        assert bool(got[0].isnan().all()) and bool(got[1:].isfinite().all())
    huge = Step(cpu, [(1, 40)], (4, 2, 32))
    huge.q *= 1e6  # scores of a million: one key takes all the weight
    assert_close(cpu.attention(*huge.args, 1.0), reference.attention(*huge.args, 1.0))


@needs_kernels
@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("heads", [(4, 1, 256), (6, 1, 128), (7, 1, 64), (3, 3, 32), (2, 1, 40), (2, 1, 16)])
def test_codes_are_multiplied_as_defined(cpu: CPUBackend, isa: str, heads: tuple[int, int, int]) -> None:
    """In integers where a head is whole vectors; queries and weights have 16 bits then, which one key whose weight is
    all but 1 beside many that are nearly 0 shows best."""
    cpu.configure(isa)
    step = Step(cpu, [(1, 700), (3, 40), (16, 257)], heads, quantized=True)
    for size in (1.0, 8.0):
        step.q = torch.randn_like(step.q) * size
        for window in (0, 77):
            wanted = reference.attention(*step.args, 0.1, window)
            assert_close(
                cpu.attention(*step.args, 0.1, window), wanted, atol=4e-4 * float(wanted.abs().max())
            )


@needs_kernels
@pytest.mark.parametrize("isa", SETS)
def test_a_coded_token_that_is_not_finite_spoils_those_that_see_it(cpu: CPUBackend, isa: str) -> None:
    cpu.configure(isa)
    for side in ("k_scale", "k_zero", "v_scale", "v_zero"):
        step = Step(cpu, [(1, 20), (1, 40)], (4, 2, 32), quantized=True)
        getattr(step.kv, side).view(-1, 2)[step.plan.block_table[0][0] * 16 + 3] = float("nan")
        got = cpu.attention(*step.args, 0.2)
        assert bool(got[0].isnan().all()) and bool(got[1].isfinite().all())


@needs_kernels
def test_training_and_what_has_no_cache_keep_the_definition(cpu: CPUBackend) -> None:
    q, k, v = torch.randn(5, 4, 16), torch.randn(5, 2, 16), torch.randn(5, 2, 16)
    q.requires_grad_()
    plan = StepPlan([5], [5])
    out = cpu.attention(q, k, v, None, plan, 0.25)
    assert torch.equal(out, reference.attention(q, k, v, None, plan, 0.25))
    out.sum().backward()
    assert q.grad is not None and bool(q.grad.any())


@needs_kernels
def test_limits_are_named(cpu: CPUBackend) -> None:
    def why(dtype: torch.dtype, head_dim: int) -> str | None:
        return cpu.why_not("attention", OpSpec("attention", "layers.0", dtype, head_dim))

    assert why(torch.float32, 128) is None
    assert why(torch.bfloat16, 128) == "no bfloat16 kernel"
    assert why(torch.float32, 12) == "no kernel for head_dim 12"
    cpu.configure("off")
    assert why(torch.float32, 128) == "the kernels are switched off (QWENRT_KERNELS=off)"
