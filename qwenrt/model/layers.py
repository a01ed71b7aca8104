"""One decoder layer: its weights, and how the six seams follow each other."""

from __future__ import annotations

from collections.abc import Callable

import torch

from qwenrt.backends.base import Backend
from qwenrt.backends.binding import OpSpec
from qwenrt.config import ModelConfig, MoeConfig
from qwenrt.ops.steps import DecodePlan, LayerKV, RotaryRows, StepPlan
from qwenrt.ops.types import Experts, LayerWeights, Packed


class Weights(dict[str, "Packed | torch.Tensor"]):
    """All weights of a model by name."""

    def packed(self, name: str) -> Packed:
        weight = self[name]
        assert isinstance(weight, Packed)
        return weight

    def tensor(self, name: str) -> torch.Tensor:
        weight = self[name]
        assert isinstance(weight, torch.Tensor)
        return weight

    def experts(self, prefix: str, moe: MoeConfig) -> Experts:
        """What the mixture of experts of one layer consists of."""
        names = [f"{prefix}.experts.{expert}" for expert in range(moe.num_experts)]
        shared = f"{prefix}.shared_expert"
        has_shared = moe.shared_intermediate_size > 0
        return Experts(
            router=self.tensor(f"{prefix}.router"),
            gate_up=[self.packed(f"{name}.gate_up_proj") for name in names],
            down=[self.packed(f"{name}.down_proj") for name in names],
            top_k=moe.top_k,
            norm_topk_prob=moe.norm_topk_prob,
            shared=(self.packed(f"{shared}.gate_up_proj"), self.packed(f"{shared}.down_proj"))
            if has_shared
            else None,
            shared_gate=self.tensor(f"{shared}_gate") if has_shared else None,
        )


class DecoderLayer:
    """h = x + attention(norm(x)); y = h + mlp(norm(h)), each step one bound seam of the backend."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        self.prefix = f"layers.{index}"
        self.moe = config.moe if config.is_moe(index) else None
        self.qk_norm = config.qk_norm
        self.heads = (config.num_heads, config.num_kv_heads, config.head_dim)
        self.scale = config.head_dim**-0.5
        self.eps = config.rms_norm_eps
        self.window = config.window(index)

    def bind(self, backend: Backend, dtype: torch.dtype, weights: Weights) -> None:
        """Take this layer's weights and choose the code of every seam once, by their shapes and kinds."""

        def bound(op: str, kind: str = "") -> Callable[..., torch.Tensor]:
            return backend.resolve(OpSpec(op, self.prefix, dtype, self.heads[2], kind))

        def linear(part: str) -> Packed:
            return weights.packed(f"{self.prefix}.{part}")

        def norm(part: str) -> torch.Tensor:
            return weights.tensor(f"{self.prefix}.{part}_norm")

        self.weights = w = LayerWeights(
            norm("input"),
            norm("post"),
            linear("qkv_proj"),
            linear("o_proj"),
            (linear("gate_up_proj"), linear("down_proj"))
            if self.moe is None
            else weights.experts(self.prefix, self.moe),
            (norm("q"), norm("k"), self.eps) if self.qk_norm else None,
            self.heads,
            self.eps,
            self.scale,
            self.window,
        )
        self._norm_linear = bound("norm_linear", w.qkv_proj.kind)
        self._rotary_store_kv = backend.resolve(OpSpec("rotary_store_kv", self.prefix, dtype, self.heads[2]))
        self._attention = bound("attention")
        self._o_add = bound("linear_add", w.o_proj.kind)
        if isinstance(w.mlp, Experts):
            self._norm_moe_add = bound("norm_moe_add", w.mlp.gate_up[0].kind)
        else:
            self._norm_gate_up_silu = bound("norm_gate_up_silu", w.mlp[0].kind)
            self._down_add = bound("linear_add", w.mlp[1].kind)

    def keys(self, x: torch.Tensor, rotary_dim: int) -> torch.Tensor:
        """x [T, D], a residual stream -> its keys [T, KVH, hd] before they are rotated."""
        w, tokens = self.weights, x.shape[0]
        qkv = self._norm_linear(x, w.input_norm, w.eps, w.qkv_proj)
        still = (
            torch.ones(tokens, rotary_dim, device=x.device),
            torch.zeros(tokens, rotary_dim, device=x.device),
        )
        plan = StepPlan([tokens], [tokens])
        keys: torch.Tensor = self._rotary_store_kv(qkv, w.heads, w.qk_norms, *still, None, None, plan)[1]
        return keys

    def bind_decode(self, backend: Backend, dtype: torch.dtype) -> str | None:
        """Choose the code of what decoding over DecodePlan asks for besides -> why it cannot be had, or None."""
        mlp = self.weights.mlp
        if isinstance(mlp, Experts):
            if (why := mlp.stack()) is not None:
                return f"{self.prefix}: {why}"
            kind = mlp.gate_up[0].kind
            self._norm_moe_add_each = backend.resolve(
                OpSpec("norm_moe_add_each", self.prefix, dtype, self.heads[2], kind)
            )
        self._decode_attention = backend.resolve(
            OpSpec("decode_attention", self.prefix, dtype, self.heads[2])
        )
        return None

    def forward(
        self, x: torch.Tensor, rotary: RotaryRows, plan: StepPlan | DecodePlan, kv: LayerKV | None
    ) -> torch.Tensor:
        """x [T, D] -> [T, D]; this step's keys and values go to ``kv``."""
        w, decodes = self.weights, isinstance(plan, DecodePlan)
        qkv = self._norm_linear(x, w.input_norm, w.eps, w.qkv_proj)
        q, k, v = self._rotary_store_kv(
            qkv, w.heads, w.qk_norms, rotary.cos, rotary.sin, rotary.q_scale, kv, plan
        )
        if decodes:
            attended = self._decode_attention(q, kv, plan, w.scale, w.window)
        else:
            attended = self._attention(q, k, v, kv, plan, w.scale, w.window)
        x = self._o_add(attended.flatten(1), w.o_proj, x)
        if isinstance(w.mlp, Experts):
            norm_moe_add = self._norm_moe_add_each if decodes else self._norm_moe_add
            return norm_moe_add(x, w.post_norm, w.eps, w.mlp)
        gate_up, down = w.mlp
        return self._down_add(self._norm_gate_up_silu(x, w.post_norm, w.eps, gate_up), down, x)
