"""Linear attention in C++: near its definition, and the same bits however a prompt is cut, batched, or shared between
threads, on every instruction set."""

from __future__ import annotations

import pytest
import torch

from qwenrt.backends.base import Backend
from qwenrt.backends.cpu import delta_net
from qwenrt.ops.steps import LayerState, StepPlan
from qwenrt.ops.types import DeltaWeights, Packed
from tests.kernel_sets import KERNELS, SETS, needs_kernels

pytestmark = [needs_kernels, pytest.mark.parametrize("isa", SETS)]

# key heads, value heads, key_dim, value_dim; taps: as released, three value heads a key head, odd ones, many taps
SHAPES = (((2, 4, 128, 128), 4), ((2, 6, 16, 24), 4), ((3, 3, 7, 8), 2), ((1, 5, 33, 40), 8))
EPS = 1e-6


def weights(heads: tuple[int, int, int, int], taps: int, *, tiled: bool = False) -> DeltaWeights:
    nk, nv, dk, dv = heads
    none = Packed("dense", 0, 0, {})
    decay = torch.linspace(-6, 2, nv)  # from heads that forget in a thousand tokens to those that do in one
    conv, bias, norm = torch.randn(taps, 2 * nk * dk + nv * dv), torch.randn(nv), 1 + torch.randn(dv) / 4
    return DeltaWeights(none, none, none, conv, decay, bias, norm, heads, tiled)


def inputs(w: DeltaWeights, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    nv, dv = w.heads[1], w.heads[3]
    return torch.randn(tokens, w.conv.shape[1] + nv * dv), torch.randn(tokens, 2 * nv)


def states(w: DeltaWeights, slots: int) -> LayerState:
    """Slots of no sequence hold anything."""
    _, nv, dk, dv = w.heads
    conv = torch.full((slots, w.conv.shape[0] - 1, w.conv.shape[1]), torch.nan)
    return LayerState(conv, torch.full((slots, nv, dk, dv), torch.nan))


def run(
    isa: str,
    given: tuple[torch.Tensor, torch.Tensor],
    w: DeltaWeights,
    state: LayerState,
    plan: StepPlan,
    threads: int = 2,
) -> torch.Tensor:
    assert KERNELS is not None and delta_net.serves(w)
    plan.block_table = [[] for _ in plan.q_lens]
    return delta_net.delta_net(KERNELS.using(isa, threads).delta_net, *given, w, EPS, state, plan)


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize(("heads", "taps"), SHAPES)
def test_it_is_near_its_definition(
    heads: tuple[int, int, int, int], taps: int, tiled: bool, isa: str
) -> None:
    w, backend = weights(heads, taps, tiled=tiled), Backend(torch.device("cpu"))
    ours, theirs = states(w, 3), states(w, 3)
    for q_lens, kv_lens in (([40, 1], [40, 1]), ([0, 9], [40, 10]), ([1, 1], [41, 11])):
        given = inputs(w, sum(q_lens))
        wanted = backend.delta_net(*given, w, EPS, theirs, StepPlan(q_lens, kv_lens, state_slots=[2, 0]))
        got = run(isa, given, w, ours, StepPlan(q_lens, kv_lens, state_slots=[2, 0]))
        torch.testing.assert_close(got, wanted, atol=2e-4, rtol=1e-4)
    for slot in (0, 2):
        torch.testing.assert_close(ours.delta[slot], theirs.delta[slot], atol=1e-4, rtol=1e-4)
        assert torch.equal(ours.conv[slot], theirs.conv[slot])
    assert torch.isnan(ours.delta[1]).all() and torch.isnan(ours.conv[1]).all()


@pytest.mark.parametrize("cuts", [[1] * 37, [3, 1, 17, 16], [36, 1]])
@pytest.mark.parametrize(("heads", "taps"), SHAPES[:3])
def test_cuts_company_and_threads_change_no_bit(
    heads: tuple[int, int, int, int], taps: int, cuts: list[int], isa: str
) -> None:
    w = weights(heads, taps)
    state = states(w, 2)
    given, beside = inputs(w, 37), inputs(w, 37)
    whole = run(isa, given, w, state, StepPlan([37], [37], state_slots=[1]), threads=1)
    state, done = states(w, 5), 0
    for count in cuts:
        here = slice(done, done + count)
        done += count
        both = tuple(torch.cat((b[here], a[here])) for a, b in zip(given, beside, strict=True))
        plan = StepPlan([count, count], [done, done], state_slots=[4, 0])
        assert torch.equal(run(isa, (both[0], both[1]), w, state, plan)[count:], whole[here])


def test_sizes_that_it_does_not_know_are_left_to_the_definition(isa: str) -> None:
    for heads, taps in (((1, 1, 8, 12), 4), ((1, 1, 8, 264), 4), ((1, 1, 264, 8), 4), ((1, 1, 8, 8), 9)):
        assert not delta_net.serves(weights(heads, taps))
