"""The linears of a layer as its parts call them: the seam that was bound for one; or, in a step with tokens whose
adapter changes it, the same out of primitives, with what the adapter adds."""

from __future__ import annotations

from collections.abc import Callable

import torch

from qwenrt.backends import adapted
from qwenrt.backends.base import Backend
from qwenrt.backends.binding import OpSpec
from qwenrt.ops.steps import DecodePlan, StepPlan
from qwenrt.ops.types import Packed

Plan = StepPlan | DecodePlan
BehindNorm = Callable[[torch.Tensor, Plan], torch.Tensor]
OntoStream = Callable[[torch.Tensor, torch.Tensor, Plan], torch.Tensor]


def norm_linear(
    backend: Backend, name: str, dtype: torch.dtype, head_dim: int, w: Packed, norm: torch.Tensor, eps: float
) -> BehindNorm:
    """From the residual stream [T, D] to the outputs [T, N] of the linear ``name`` behind a norm."""
    spec = OpSpec("norm_linear", name.rpartition(".")[0], dtype, head_dim, w.kind)
    seam, ops = backend.resolve(spec), backend.bound(spec)

    def outputs(x: torch.Tensor, plan: Plan) -> torch.Tensor:
        if spans := plan.spans_of(name):
            return adapted.norm_linear(ops, x, norm, eps, w, spans)
        y: torch.Tensor = seam(x, norm, eps, w)
        return y

    return outputs


def norm_gate_up_silu(
    backend: Backend, name: str, dtype: torch.dtype, head_dim: int, w: Packed, norm: torch.Tensor, eps: float
) -> BehindNorm:
    """From the residual stream [T, D] to what the MLP's second linear reads [T, I], by the linear ``name``."""
    spec = OpSpec("norm_gate_up_silu", name.rpartition(".")[0], dtype, head_dim, w.kind)
    seam, ops = backend.resolve(spec), backend.bound(spec)

    def inner(x: torch.Tensor, plan: Plan) -> torch.Tensor:
        if spans := plan.spans_of(name):
            return adapted.norm_gate_up_silu(ops, x, norm, eps, w, spans)
        y: torch.Tensor = seam(x, norm, eps, w)
        return y

    return inner


def linear_add(backend: Backend, name: str, dtype: torch.dtype, head_dim: int, w: Packed) -> OntoStream:
    """From the inputs [T, K] of the linear ``name`` and the residual stream [T, D] to their sum."""
    spec = OpSpec("linear_add", name.rpartition(".")[0], dtype, head_dim, w.kind)
    seam, ops = backend.resolve(spec), backend.bound(spec)

    def added(x: torch.Tensor, residual: torch.Tensor, plan: Plan) -> torch.Tensor:
        if spans := plan.spans_of(name):
            return adapted.linear_add(ops, x, w, residual, spans)
        y: torch.Tensor = seam(x, w, residual)
        return y

    return added
