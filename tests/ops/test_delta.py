"""The ops of linear attention: the loop beside its formula in float64 and its form by chunks; cuts; gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from qwenrt.ops import delta
from qwenrt.ops.steps import LayerState, StepPlan

NK, NV, DK, DV, TAPS = 2, 6, 8, 4, 4
CHANNELS = 2 * NK * DK + NV * DV


def inputs(tokens: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    q, k = torch.randn(tokens, NK, DK), torch.randn(tokens, NK, DK)
    v, beta, g = torch.randn(tokens, NV, DV), torch.rand(tokens, NV), -torch.rand(tokens, NV)
    return tuple(x.to(dtype) for x in (q, k, v, beta, g))


def by_the_formula(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, beta: torch.Tensor, g: torch.Tensor
) -> torch.Tensor:
    """As the paper has it, in float64: forget, predict, write, read."""
    q, k, v, beta, g = (x.double() for x in (q, k, v, beta, g))
    heads = []
    for head in range(NV):
        read = []
        s = torch.zeros(DK, DV, dtype=torch.float64)
        for t in range(len(q)):
            query, key = (x[t, head // (NV // NK)] for x in (q, k))
            query, key = (
                query / (query.square().sum() + 1e-6).sqrt(),
                key / (key.square().sum() + 1e-6).sqrt(),
            )
            s = s * g[t, head].exp()
            s = s + torch.outer(key, beta[t, head] * (v[t, head] - s.T @ key))
            read.append(s.T @ query / DK**0.5)
        heads.append(torch.stack(read))
    return torch.stack(heads, dim=1)


def empty_state(slots: int) -> LayerState:
    return LayerState(
        torch.full((slots, TAPS - 1, CHANNELS), torch.nan), torch.full((slots, NV, DK, DV), torch.nan)
    )


@pytest.mark.parametrize("tokens", [1, 7, 8, 64, 70, 130])
def test_it_is_the_formula(tokens: int) -> None:
    made = inputs(tokens)
    o = delta.gated_delta(*made, None, StepPlan([tokens], [tokens]))
    torch.testing.assert_close(o.double(), by_the_formula(*made), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("first", [0, 1, 63, 64, 100])
@pytest.mark.parametrize("size", [1, 16, 64, 100])
def test_chunks_give_what_the_loop_gives(size: int, first: int) -> None:
    q, k, v, beta, g = inputs(130)
    each = NV // NK
    unit = [F.normalize(x, dim=-1).repeat_interleave(each, dim=1) for x in (q, k)]
    rows = unit[0] * DK**-0.5, unit[1], v, beta, g, torch.randn(NV, DK, DV)
    for by_chunks, by_tokens in zip(delta.by_chunks(*rows, first, size), delta.by_tokens(*rows), strict=True):
        torch.testing.assert_close(by_chunks, by_tokens, atol=1e-5, rtol=1e-4)


def test_cuts_where_chunks_begin_do_not_change_a_bit() -> None:
    made, state = inputs(150), empty_state(1)
    whole = delta.gated_delta(*made, None, StepPlan([150], [150]))
    pieces = [
        delta.gated_delta(*(x[a:b] for x in made), state, StepPlan([b - a], [b], state_slots=[0]))
        for a, b in ((0, 64), (64, 128), (128, 150))
    ]
    assert torch.equal(torch.cat(pieces), whole)


def test_what_is_forgotten_at_once_overflows_nothing() -> None:
    q, k, v, beta, g = inputs(80)
    assert torch.isfinite(delta.gated_delta(q, k, v, beta, g * 200, None, StepPlan([80], [80]))).all()
    unit = [F.normalize(x, dim=-1).repeat_interleave(NV // NK, dim=1) for x in (q, k)]
    o, s = delta.by_chunks(*unit, v, beta, g * 200, torch.zeros(NV, DK, DV))
    assert torch.isfinite(o).all() and torch.isfinite(s).all()


@pytest.mark.parametrize("cuts", [[1] * 40, [3, 1, 20, 16], [39, 1]])
def test_however_a_prompt_is_cut_it_reads_the_same(cuts: list[int]) -> None:
    """In another slot, beside a second sequence, with whatever lies in the slots before."""
    x, weight, made = torch.randn(40, CHANNELS), torch.randn(TAPS, CHANNELS), inputs(40)
    other = torch.randn(40, CHANNELS), inputs(40)
    whole = StepPlan([40], [40])
    conv, read = delta.causal_conv(x, weight, None, whole), delta.gated_delta(*made, None, whole)
    state, done = empty_state(3), 0
    for count in cuts:
        here = slice(done, done + count)
        done += count
        plan = StepPlan([count, count], [done, done], state_slots=[2, 0])
        both = [torch.cat((a[here], b[here])) for a, b in zip((x, *made), (other[0], *other[1]), strict=True)]
        mixed = delta.causal_conv(both[0], weight, state, plan)
        # torch's exp has another last bit at the end of a tensor
        torch.testing.assert_close(mixed[:count], conv[here], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(
            delta.gated_delta(*both[1:], state, plan)[:count], read[here], atol=1e-6, rtol=1e-5
        )
    assert torch.isnan(state.delta[1]).all()  # of no sequence


def test_the_convolution_is_torchs_of_what_came_before() -> None:
    x, weight = torch.randn(20, CHANNELS), torch.randn(TAPS, CHANNELS)
    padded = F.pad(x.T, (TAPS - 1, 0)).unsqueeze(0)
    wanted = F.silu(F.conv1d(padded, weight.T.unsqueeze(1), groups=CHANNELS))[0].T
    torch.testing.assert_close(delta.causal_conv(x, weight, None, StepPlan([20], [20])), wanted)


def test_no_tokens_no_result() -> None:
    plan = StepPlan([0], [0], state_slots=[0])
    assert delta.causal_conv(
        torch.empty(0, CHANNELS), torch.ones(TAPS, CHANNELS), empty_state(1), plan
    ).shape == (0, CHANNELS)
    assert delta.gated_delta(*inputs(0), empty_state(1), plan).shape == (0, NV, DV)


def test_what_is_read_stays_float32_beside_16_bits() -> None:
    """It leaves float16's range in long texts; only its norm brings it back."""
    q, k, v, beta, g = inputs(10)
    halves = [x.half() for x in (q, k, v)]
    o = delta.gated_delta(*halves, beta, g, None, StepPlan([10], [10]))
    assert o.dtype == torch.float32
    z = torch.randn(10, NV, DV).half()
    normed = delta.gated_norm(o * 1e6, z, torch.ones(DV), 1e-6)
    assert normed.dtype == torch.float16 and torch.isfinite(normed).all()


@pytest.mark.parametrize("longer", [3, 70])
def test_gradients_pass(longer: int) -> None:
    tokens, plan = 2 + longer, StepPlan([2, longer], [2, longer])
    made = [x.requires_grad_() for x in inputs(tokens)]
    delta.gated_delta(*made, None, plan).sum().backward()
    exact = [x.detach().clone().requires_grad_() for x in made]
    torch.cat(
        [by_the_formula(*(x[part] for x in exact)) for part in (slice(2), slice(2, tokens))]
    ).sum().backward()
    for ours, theirs in zip(made, exact, strict=True):
        assert ours.grad is not None and theirs.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4)
    x, weight = (t.requires_grad_() for t in (torch.randn(tokens, CHANNELS), torch.randn(TAPS, CHANNELS)))
    delta.causal_conv(x, weight, None, plan).sum().backward()
    assert x.grad is not None and weight.grad is not None and x.grad[1].abs().sum() > 0
