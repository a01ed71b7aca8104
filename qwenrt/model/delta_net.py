"""A gated delta net in a layer: in place of keys and values of every token, one state of fixed size."""

from __future__ import annotations

import torch

from qwenrt.backends.base import Backend
from qwenrt.backends.binding import OpSpec
from qwenrt.config import ModelConfig
from qwenrt.model.linears import linear_add, norm_linear
from qwenrt.model.weights import Weights
from qwenrt.ops.steps import DecodePlan, LayerCache, LayerState, RotaryRows, StepPlan, TrailPart
from qwenrt.ops.types import DeltaWeights


class DeltaNet:
    """x + out_proj(delta_net(in_proj(norm(x)))), over the state of each sequence."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        delta = config.linear_attention
        assert delta is not None
        self.prefix, self._eps = f"layers.{index}", config.rms_norm_eps
        self._heads = (delta.num_key_heads, delta.num_value_heads, delta.key_dim, delta.value_dim)
        self._tiled = delta.tiled

    def bind(
        self, backend: Backend, dtype: torch.dtype, weights: Weights, norm: torch.Tensor
    ) -> DeltaWeights:
        """Take the weights, ``norm`` [D] being that of the layer's input, and choose the code of every seam."""
        prefix = self.prefix
        self.weights = w = DeltaWeights(
            weights.packed(f"{prefix}.in_proj"),
            weights.packed(f"{prefix}.rates_proj"),
            weights.packed(f"{prefix}.out_proj"),
            weights.tensor(f"{prefix}.conv").squeeze(1).t().contiguous(),
            weights.tensor(f"{prefix}.log_decay"),
            weights.tensor(f"{prefix}.decay_bias"),
            weights.tensor(f"{prefix}.out_norm"),
            self._heads,
            self._tiled,
        )
        inputs, rates = f"{prefix}.in_proj", f"{prefix}.rates_proj"
        self._norm_in = norm_linear(backend, inputs, dtype, 0, w.in_proj, norm, self._eps)
        self._norm_rates = norm_linear(backend, rates, dtype, 0, w.rates_proj, norm, self._eps)
        self._delta_net = backend.resolve(OpSpec("delta_net", prefix, dtype))
        self._out_add = linear_add(backend, f"{prefix}.out_proj", dtype, 0, w.out_proj)
        return w

    def bind_decode(self, backend: Backend, dtype: torch.dtype) -> str | None:
        """Choose the code of decoding over DecodePlan -> why it cannot be had, or None."""
        self._decode_delta_net = backend.resolve(OpSpec("decode_delta_net", self.prefix, dtype))
        return None

    def add(
        self, x: torch.Tensor, rotary: RotaryRows, plan: StepPlan | DecodePlan, cache: LayerCache | None
    ) -> torch.Tensor:
        """x [T, D] -> x and what its tokens read [T, D]; ``cache`` holds the state, which moves on."""
        assert cache is None or isinstance(cache, LayerState)
        w = self.weights
        projected, rates = self._norm_in(x, plan), self._norm_rates(x, plan)
        if isinstance(plan, DecodePlan):
            read = self._decode_delta_net(projected, rates, w, self._eps, cache, plan)
        elif plan.trail and cache is not None:
            read = self._read_along(plan.trail, projected, rates, cache)
        else:
            read = self._delta_net(projected, rates, w, self._eps, cache, plan)
        return self._out_add(read, x, plan)

    def _read_along(
        self, trail: list[TrailPart], projected: torch.Tensor, rates: torch.Tensor, cache: LayerState
    ) -> torch.Tensor:
        """The same where states are wanted after each of several tokens: each part of the step goes on from a copy."""
        w = self.weights
        _, value_heads, _, value_dim = w.heads
        read = projected.new_empty(projected.shape[0], value_heads * value_dim)
        for part in trail:
            for source, target in part.copies:
                cache.copy(source, target)
            own = self._delta_net(projected[part.rows], rates[part.rows], w, self._eps, cache, part.plan)
            read[part.rows] = own
        return read
