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
    run = _seam("norm_linear", backend, name, dtype, head_dim, w)
    return lambda x, plan: run(plan, x, norm, eps, w)


def norm_gate_up_silu(
    backend: Backend, name: str, dtype: torch.dtype, head_dim: int, w: Packed, norm: torch.Tensor, eps: float
) -> BehindNorm:
    """From the residual stream [T, D] to what the MLP's second linear reads [T, I], by the linear ``name``."""
    run = _seam("norm_gate_up_silu", backend, name, dtype, head_dim, w)
    return lambda x, plan: run(plan, x, norm, eps, w)


def linear_add(backend: Backend, name: str, dtype: torch.dtype, head_dim: int, w: Packed) -> OntoStream:
    """From the inputs [T, K] of the linear ``name`` and the residual stream [T, D] to their sum."""
    run = _seam("linear_add", backend, name, dtype, head_dim, w)
    return lambda x, residual, plan: run(plan, x, w, residual)


def _seam(
    op: str, backend: Backend, name: str, dtype: torch.dtype, head_dim: int, w: Packed
) -> Callable[..., torch.Tensor]:
    """The seam ``op`` of the linear ``name``, called with a step's plan before its own arguments; where the plan has
    adapters for the linear, the function of that name in backends/adapted.py."""
    spec = OpSpec(op, name.rpartition(".")[0], dtype, head_dim, w.kind)
    seam, ops, with_adapters = backend.resolve(spec), backend.bound(spec), getattr(adapted, op)

    def run(plan: Plan, *arguments: object) -> torch.Tensor:
        spans = plan.spans_of(name)
        y: torch.Tensor = with_adapters(ops, *arguments, spans) if spans else seam(*arguments)
        return y

    return run
