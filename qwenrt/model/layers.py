"""One decoder layer: which weights it has, and how the six seams follow each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from qwenrt.backends.base import Backend, OpSpec
from qwenrt.config import ModelConfig
from qwenrt.ops.types import LayerKV, Packed, StepPlan


@dataclass(frozen=True)
class LinearSpec:
    """One linear: its input width, the parts its rows are made of (name, rows), and whether it has a bias."""

    name: str
    in_features: int
    parts: tuple[tuple[str, int], ...]
    bias: bool
    quantizable: bool = True

    @property
    def out_features(self) -> int:
        return sum(rows for _, rows in self.parts)


def layer_linears(config: ModelConfig, prefix: str) -> list[LinearSpec]:
    """The four linears of a layer, in the order they are used."""
    d, i = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    bias = config.linear_bias
    return [
        LinearSpec(f"{prefix}.qkv_proj", d, (("q", q), ("k", kv), ("v", kv)), bias=True),
        LinearSpec(f"{prefix}.o_proj", q, (("o", d),), bias=bias),
        LinearSpec(f"{prefix}.gate_up_proj", d, (("gate", i), ("up", i)), bias=bias),
        LinearSpec(f"{prefix}.down_proj", i, (("down", d),), bias=bias),
    ]


@dataclass
class StepInputs:
    """What every layer of a step shares: the rows of cos and sin, LogN's factors, and the plan."""

    cos: torch.Tensor  # [T, rotary_dim] float32
    sin: torch.Tensor
    q_scale: torch.Tensor | None  # [T] float32
    plan: StepPlan


class DecoderLayer:
    """h = x + attention(norm(x)); y = h + mlp(norm(h)), each step one bound seam of the backend."""

    def __init__(self, config: ModelConfig, prefix: str) -> None:
        self.prefix = prefix
        self.heads = (config.num_heads, config.num_kv_heads, config.head_dim)
        self.scale = config.head_dim**-0.5
        self.eps = config.rms_norm_eps
        self.input_norm: torch.Tensor
        self.post_norm: torch.Tensor
        self.qkv_proj: Packed
        self.o_proj: Packed
        self.gate_up_proj: Packed
        self.down_proj: Packed

    def bind(self, backend: Backend, dtype: torch.dtype) -> None:
        """Choose the code of every seam once, by the shapes and kinds of this layer's weights."""

        def bound(op: str, kind: str = "") -> Callable[..., torch.Tensor]:
            return backend.resolve(OpSpec(op, self.prefix, dtype, self.heads[2], kind))

        self._norm_linear = bound("norm_linear", self.qkv_proj.kind)
        self._rotary_store_kv = backend.resolve(OpSpec("rotary_store_kv", self.prefix, dtype, self.heads[2]))
        self._attention = bound("attention")
        self._o_add = bound("linear_add", self.o_proj.kind)
        self._norm_gate_up_silu = bound("norm_gate_up_silu", self.gate_up_proj.kind)
        self._down_add = bound("linear_add", self.down_proj.kind)

    def forward(self, x: torch.Tensor, step: StepInputs, kv: LayerKV | None) -> torch.Tensor:
        """x [T, D] -> [T, D]; this step's keys and values go to ``kv``."""
        qkv = self._norm_linear(x, self.input_norm, self.eps, self.qkv_proj)
        q, k, v = self._rotary_store_kv(qkv, self.heads, step.cos, step.sin, step.q_scale, kv, step.plan)
        attended = self._attention(q, k, v, kv, step.plan, self.scale).flatten(1)
        x = self._o_add(attended, self.o_proj, x)
        hidden = self._norm_gate_up_silu(x, self.post_norm, self.eps, self.gate_up_proj)
        return self._down_add(hidden, self.down_proj, x)
