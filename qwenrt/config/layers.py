"""What a decoder layer is made of, in names and shapes: the one list that model, loader and estimates read."""

from __future__ import annotations

from dataclasses import dataclass

from qwenrt.config.model import ModelConfig


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

    @property
    def value_rows(self) -> int:
        return dict(self.parts).get("v", 0)


def layer_linears(config: ModelConfig, layer: int) -> list[LinearSpec]:
    """The linears of a layer, in the order they are used."""
    prefix, d = f"layers.{layer}", config.hidden_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention = [
        LinearSpec(f"{prefix}.qkv_proj", d, (("q", q), ("k", kv), ("v", kv)), bias=config.qkv_bias),
        LinearSpec(f"{prefix}.o_proj", q, (("o", d),), bias=config.o_bias),
    ]
    moe = config.moe
    if moe is None or not config.is_moe(layer):
        return [*attention, *_mlp_linears(prefix, d, config.intermediate_size, config.mlp_bias)]
    shared = moe.shared_intermediate_size
    return [
        *attention,
        *(_mlp_linears(f"{prefix}.shared_expert", d, shared) if shared else ()),
        *(
            spec
            for expert in range(moe.num_experts)
            for spec in _mlp_linears(f"{prefix}.experts.{expert}", d, moe.intermediate_size)
        ),
    ]


def _mlp_linears(prefix: str, d: int, i: int, bias: bool = False) -> list[LinearSpec]:
    return [
        LinearSpec(f"{prefix}.gate_up_proj", d, (("gate", i), ("up", i)), bias=bias),
        LinearSpec(f"{prefix}.down_proj", i, (("down", d),), bias=bias),
    ]


def layer_tensors(config: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    """The other weights of a layer and their shapes: norms, and what chooses the experts."""
    d, prefix = config.hidden_size, f"layers.{layer}"
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}.input_norm": (d,), f"{prefix}.post_norm": (d,)}
    if config.qk_norm:
        shapes |= {f"{prefix}.q_norm": (config.head_dim,), f"{prefix}.k_norm": (config.head_dim,)}
    if config.moe is not None and config.is_moe(layer):
        shapes[f"{prefix}.router"] = (config.moe.num_experts, d)
        if config.moe.shared_intermediate_size:
            shapes[f"{prefix}.shared_expert_gate"] = (1, d)
    return shapes
