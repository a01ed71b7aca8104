"""The seams of linears in steps some of whose tokens have adapters, made of a backend's primitives: beside the products
of the model's own weights, which all tokens share, each span of tokens gets what its adapter adds.

``ops`` is the backend as it is bound for the linear, or for the first of two (Backend.bound).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from qwenrt.backends.base import Backend
from qwenrt.ops import reference
from qwenrt.ops.lora import with_spans
from qwenrt.ops.types import Experts, LoraSpan, Packed, StepAdapters

Spans = Sequence[LoraSpan]


def whole_bias(w: Packed) -> torch.Tensor | None:
    """A linear's bias [N], also where its parts have their own."""
    parts = w.data.get("parts")
    if not parts or w.bias is not None:
        return w.bias
    biases = [whole_bias(part) for part in parts]
    if all(bias is None for bias in biases):
        return None
    like = next(bias for bias in biases if bias is not None)
    pairs = zip(parts, biases, strict=True)
    return torch.cat([like.new_zeros(p.out_features) if b is None else b for p, b in pairs])


def _bias_for(w: Packed, spans: Spans) -> torch.Tensor | None:
    """What ``add_lora`` asks of a linear's bias: only factors of rows must leave it alone."""
    scaled = any(pair.row_scale is not None for span in spans for pair in span.pairs)
    return whole_bias(w) if scaled else None


def norm_linear(
    ops: Backend, x: torch.Tensor, norm: torch.Tensor, eps: float, w: Packed, spans: Spans
) -> torch.Tensor:
    """Backend.norm_linear, and what ``spans`` add."""
    normed = ops.rms_norm(x, norm, eps)
    return ops.add_lora(ops.linear(normed, w), normed, spans, _bias_for(w, spans))


def linear_add(
    ops: Backend, x: torch.Tensor, w: Packed, residual: torch.Tensor, spans: Spans
) -> torch.Tensor:
    """Backend.linear_add, and what ``spans`` add."""
    return residual + _wide(ops, x, w, residual.dtype, spans)


def norm_gate_up_silu(
    ops: Backend, x: torch.Tensor, norm: torch.Tensor, eps: float, w: Packed, spans: Spans
) -> torch.Tensor:
    """Backend.norm_gate_up_silu, and what ``spans`` add."""
    return ops.silu_and_mul(norm_linear(ops, x, norm, eps, w, spans))


def norm_moe_add(
    ops: Backend,
    x: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    w: Experts,
    prefix: str,
    adapters: StepAdapters,
) -> torch.Tensor:
    """Backend.norm_moe_add of the layer whose linears' names begin with ``prefix``, and what ``adapters`` add to its
    experts. Tokens go where the model's router sends them, or their adapter's."""
    normed = ops.rms_norm(x, norm, eps)
    weights, chosen = _routed(normed, w, f"{prefix}.router", adapters)
    total = torch.zeros_like(x)
    for expert in sorted(set(chosen.flatten().tolist())):
        token, rank = (chosen == expert).nonzero(as_tuple=True)
        own, name = adapters.at(token.tolist()), f"{prefix}.experts.{expert}"
        y = _mlp(ops, normed.index_select(0, token), (w.gate_up[expert], w.down[expert]), x.dtype, name, own)
        total = total.index_add(0, token, y * weights[token, rank].unsqueeze(-1))
    if w.shared is not None and w.shared_gate is not None:
        gate = torch.sigmoid(F.linear(normed, w.shared_gate.to(normed.dtype)))
        total = total + gate * _mlp(ops, normed, w.shared, x.dtype, f"{prefix}.shared_expert", adapters)
    return x + total


def _routed(
    normed: torch.Tensor, w: Experts, name: str, adapters: StepAdapters
) -> tuple[torch.Tensor, torch.Tensor]:
    """reference.route, by the routers that the tokens have."""
    own = [span for span in adapters.spans if name in span.adapter.routers]
    logits = with_spans(
        reference.router_logits(normed, w.router),
        own,
        lambda span, here: reference.router_logits(normed[here], span.adapter.routers[name]),
    )
    return reference.route(logits, w.top_k, w.norm_topk_prob)


def _mlp(
    ops: Backend,
    x: torch.Tensor,
    linears: tuple[Packed, Packed],
    dtype: torch.dtype,
    name: str,
    adapters: StepAdapters,
) -> torch.Tensor:
    gate_up, down = linears
    spans = adapters.of(f"{name}.gate_up_proj")
    inner = ops.add_lora(ops.linear(x, gate_up), x, spans, _bias_for(gate_up, spans))
    return _wide(ops, ops.silu_and_mul(inner), down, dtype, adapters.of(f"{name}.down_proj"))


def _wide(ops: Backend, x: torch.Tensor, w: Packed, dtype: torch.dtype, spans: Spans) -> torch.Tensor:
    return ops.add_lora(ops.wide_linear(x, w, dtype), x, spans, _bias_for(w, spans))
