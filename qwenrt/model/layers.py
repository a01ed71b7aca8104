"""One decoder layer: what mixes its tokens, and its MLP."""

from __future__ import annotations

import torch

from qwenrt.backends import adapted
from qwenrt.backends.base import Backend
from qwenrt.backends.binding import OpSpec
from qwenrt.config import ModelConfig
from qwenrt.config.layers import layer_prefix
from qwenrt.model.attention import Attention
from qwenrt.model.delta_net import DeltaNet
from qwenrt.model.linears import linear_add, norm_gate_up_silu
from qwenrt.model.weights import Weights
from qwenrt.ops.steps import DecodePlan, LayerCache, RotaryRows, StepPlan
from qwenrt.ops.types import Experts, LayerWeights, Packed


class DecoderLayer:
    """h = x + mixer(norm(x)); y = h + mlp(norm(h)), each step one bound seam of the backend."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        self.prefix = layer_prefix(config, index)
        self.moe = config.moe if config.is_moe(index) else None
        self.eps, self._head_dim = config.rms_norm_eps, config.head_dim
        self.mixer = (DeltaNet if config.is_linear(index) else Attention)(config, index)

    def bind(self, backend: Backend, dtype: torch.dtype, weights: Weights) -> None:
        """Take this layer's weights and choose the code of every seam once, by their shapes and kinds."""
        prefix = self.prefix
        mlp: tuple[Packed, Packed] | Experts
        if self.moe is None:
            mlp = weights.packed(f"{prefix}.gate_up_proj"), weights.packed(f"{prefix}.down_proj")
        else:
            mlp = weights.experts(prefix, self.moe)
        norms = weights.tensor(f"{prefix}.input_norm"), weights.tensor(f"{prefix}.post_norm")
        mixer = self.mixer.bind(backend, dtype, weights, norms[0])
        self.weights = LayerWeights(*norms, mixer, mlp, self.eps)

        if isinstance(mlp, Experts):
            spec = OpSpec("norm_moe_add", prefix, dtype, self._head_dim, mlp.gate_up[0].kind)
            self._norm_moe_add, self._moe_ops = backend.resolve(spec), backend.bound(spec)
        else:
            into, out, hd = f"{prefix}.gate_up_proj", f"{prefix}.down_proj", self._head_dim
            self._inner = norm_gate_up_silu(backend, into, dtype, hd, mlp[0], norms[1], self.eps)
            self._down_add = linear_add(backend, out, dtype, hd, mlp[1])

    def bind_decode(self, backend: Backend, dtype: torch.dtype) -> str | None:
        """Choose the code of what decoding over DecodePlan asks for besides -> why it cannot be had, or None."""
        mlp = self.weights.mlp
        if isinstance(mlp, Experts):
            if (why := mlp.stack(backend.stackable)) is not None:
                return f"{self.prefix}: {why}"
            kind = mlp.gate_up[0].kind
            self._norm_moe_add_each = backend.resolve(
                OpSpec("norm_moe_add_each", self.prefix, dtype, self._head_dim, kind)
            )
        return self.mixer.bind_decode(backend, dtype)

    def forward(
        self, x: torch.Tensor, rotary: RotaryRows, plan: StepPlan | DecodePlan, cache: LayerCache | None
    ) -> torch.Tensor:
        """x [T, D] -> [T, D]; what this step adds to a sequence's memory goes to ``cache``."""
        return self.add_mlp(self.mixer.add(x, rotary, plan, cache), plan)

    def add_mlp(self, x: torch.Tensor, plan: StepPlan | DecodePlan) -> torch.Tensor:
        """x [T, D] -> x + mlp(norm(x)): the second half of a layer."""
        w = self.weights
        if isinstance(w.mlp, Experts):
            if plan.adapters is not None and plan.adapters.in_experts(self.prefix):
                arguments = x, w.post_norm, w.eps, w.mlp, self.prefix, plan.adapters
                return adapted.norm_moe_add(self._moe_ops, *arguments)
            norm_moe_add = self._norm_moe_add_each if isinstance(plan, DecodePlan) else self._norm_moe_add
            y: torch.Tensor = norm_moe_add(x, w.post_norm, w.eps, w.mlp)
            return y
        return self._down_add(self._inner(x, plan), x, plan)
