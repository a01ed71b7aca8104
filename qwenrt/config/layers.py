"""What a network is made of, in names, shapes and bytes: what model, loader and estimates read. Needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from qwenrt.config.model import ModelConfig

BLOCK_SIZE = 16  # tokens; a sequence takes whole blocks of the cache


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
    def num_parameters(self) -> int:
        return self.out_features * (self.in_features + self.bias)

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


def head_linear(config: ModelConfig) -> LinearSpec:
    """What gives the logits. It stays dense unless it is quantised by name."""
    return LinearSpec(
        "lm_head", config.hidden_size, (("lm_head", config.vocab_size),), bias=False, quantizable=False
    )


def kinds_of_layers(config: ModelConfig) -> list[tuple[int, int]]:
    """(a layer, how many have its shapes): of those with one MLP, and of those with experts."""
    sparse = config.num_moe_layers
    return [
        (next(n for n in range(config.num_layers) if config.is_moe(n) == is_moe), number)
        for is_moe, number in ((False, config.num_layers - sparse), (True, sparse))
        if number
    ]


def num_parameters(config: ModelConfig) -> int:
    """Parameters of the whole network, embeddings and head included."""
    return _parameters(config, 0 if config.moe is None else config.moe.num_experts)


def num_active_parameters(config: ModelConfig) -> int:
    """Those one token meets: as num_parameters, with only the experts it goes to."""
    return _parameters(config, 0 if config.moe is None else config.moe.top_k)


def _parameters(config: ModelConfig, experts: int) -> int:
    one = config if config.moe is None else replace(config, moe=replace(config.moe, num_experts=1))
    total = config.hidden_size  # the final norm
    for layer, number in kinds_of_layers(config):
        tensors = sum(map(math.prod, layer_tensors(config, layer).values()))
        linears = (
            spec.num_parameters * (experts if ".experts." in spec.name else 1)
            for spec in layer_linears(one, layer)
        )
        total += number * (tensors + sum(linears))
    return total + config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)


def kv_bytes_per_token(num_layers: int, num_kv_heads: int, head_dim: int, itemsize: int, int8: bool) -> int:
    """Bytes that one token takes in the cache of all layers, keys and values together, in elements of ``itemsize`` or
    in int8, where each head has a float32 scale and zero beside its codes."""
    return 2 * num_layers * num_kv_heads * (head_dim + 8 if int8 else head_dim * itemsize)
