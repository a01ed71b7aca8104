"""Attention in a layer: from the residual stream to what its tokens have seen, seam by seam."""

from __future__ import annotations

import torch

from qwenrt.backends.base import Backend
from qwenrt.backends.binding import OpSpec
from qwenrt.config import ModelConfig
from qwenrt.config.layers import layer_prefix
from qwenrt.model.linears import linear_add, norm_linear
from qwenrt.model.weights import Weights
from qwenrt.ops import reference
from qwenrt.ops.steps import DecodePlan, LayerCache, LayerKV, RotaryRows, StepPlan
from qwenrt.ops.types import AttentionWeights


class Attention:
    """x + o_proj(attention(rotary(qkv_proj(norm(x))))), over the keys and values of every token before."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        self.prefix = layer_prefix(config, index)
        self._qk_norm, self._gated, self._eps = config.qk_norm, config.attn_gate, config.rms_norm_eps
        self._heads = (config.num_heads, config.num_kv_heads, config.head_dim)
        self._window = config.window(index) if index < config.num_layers else 0

    def bind(
        self, backend: Backend, dtype: torch.dtype, weights: Weights, norm: torch.Tensor
    ) -> AttentionWeights:
        """Take the weights, ``norm`` [D] being that of the layer's input, and choose the code of every seam."""
        prefix, heads = self.prefix, self._heads
        norms = None
        if self._qk_norm:
            norms = weights.tensor(f"{prefix}.q_norm"), weights.tensor(f"{prefix}.k_norm"), self._eps
        self.weights = w = AttentionWeights(
            weights.packed(f"{prefix}.qkv_proj"),
            weights.packed(f"{prefix}.o_proj"),
            norms,
            heads,
            heads[2] ** -0.5,
            self._window,
            self._gated,
        )
        qkv = f"{prefix}.qkv_proj"
        self._norm_qkv = norm_linear(backend, qkv, dtype, heads[2], w.qkv_proj, norm, self._eps)
        self._rotary_store_kv = backend.resolve(OpSpec("rotary_store_kv", prefix, dtype, heads[2]))
        self._attention = backend.resolve(OpSpec("attention", prefix, dtype, heads[2]))
        if self._gated:
            self._gate_output = backend.resolve(OpSpec("gate_output", prefix, dtype, heads[2]))
        self._o_add = linear_add(backend, f"{prefix}.o_proj", dtype, heads[2], w.o_proj)
        return w

    def bind_decode(self, backend: Backend, dtype: torch.dtype) -> str | None:
        """Choose the code of decoding over DecodePlan -> why it cannot be had, or None."""
        spec = OpSpec("decode_attention", self.prefix, dtype, self._heads[2])
        self._decode_attention = backend.resolve(spec)
        return None

    def keys(self, x: torch.Tensor, rotary_dim: int) -> torch.Tensor:
        """x [T, D], a residual stream -> its keys [T, KVH, hd] before they are rotated."""
        w, tokens = self.weights, x.shape[0]
        still = (
            torch.ones(tokens, rotary_dim, device=x.device),
            torch.zeros(tokens, rotary_dim, device=x.device),
        )
        plan = StepPlan([tokens], [tokens])
        qkv, _ = self._qkv(x, plan)
        keys: torch.Tensor = self._rotary_store_kv(qkv, w.heads, w.qk_norms, *still, None, None, plan)[1]
        return keys

    def _qkv(self, x: torch.Tensor, plan: StepPlan | DecodePlan) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Queries, keys and values [T, (H + 2 KVH) hd]; and the output's gate [T, H, hd], or None."""
        qkv = self._norm_qkv(x, plan)
        return reference.split_gate(qkv, self.weights.heads) if self.weights.gated else (qkv, None)

    def add(
        self, x: torch.Tensor, rotary: RotaryRows, plan: StepPlan | DecodePlan, cache: LayerCache | None
    ) -> torch.Tensor:
        """x [T, D] -> x and what its tokens attended to [T, D]; this step's keys and values go to ``cache``."""
        assert cache is None or isinstance(cache, LayerKV)
        w = self.weights
        qkv, gate = self._qkv(x, plan)
        q, k, v = self._rotary_store_kv(
            qkv, w.heads, w.qk_norms, rotary.cos, rotary.sin, rotary.q_scale, cache, plan
        )
        if isinstance(plan, DecodePlan):
            attended = self._decode_attention(q, cache, plan, w.scale, w.window)
        else:
            attended = self._attention(q, k, v, cache, plan, w.scale, w.window)
        if gate is not None:
            attended = self._gate_output(attended, gate)
        return self._o_add(attended.flatten(1), x, plan)
