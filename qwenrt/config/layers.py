"""What a network is made of, in names, shapes and bytes: what model, loader and estimates read. Needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from qwenrt.config.model import ModelConfig
from qwenrt.errors import ConfigError

MOST_ROWS = 16  # of a step, those of guesses included: more cost a CPU as much as steps of their own
BLOCK_SIZE = 16  # tokens; a sequence takes whole blocks of the cache
# states kept so that beginnings are found again: for each sequence; of all, where room is short
_SNAPSHOTS, _FEW = 3, 4


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


def layer_prefix(config: ModelConfig, layer: int) -> str:
    """What the names of a layer's weights begin with; those behind the decoder's are of the head that guesses."""
    own = layer - config.num_layers
    return f"layers.{layer}" if own < 0 else f"mtp.layers.{own}"


def layer_linears(config: ModelConfig, layer: int) -> list[LinearSpec]:
    """The linears of a layer, in the order they are used."""
    prefix, d = layer_prefix(config, layer), config.hidden_size
    mixer = _delta_linears(config, prefix) if config.is_linear(layer) else _attention_linears(config, prefix)
    moe = config.moe
    if moe is None or not config.is_moe(layer):
        return [*mixer, *_mlp_linears(prefix, d, config.intermediate_size, config.mlp_bias)]
    shared = moe.shared_intermediate_size
    return [
        *mixer,
        *(_mlp_linears(f"{prefix}.shared_expert", d, shared) if shared else ()),
        *(
            spec
            for expert in range(moe.num_experts)
            for spec in _mlp_linears(f"{prefix}.experts.{expert}", d, moe.intermediate_size)
        ),
    ]


def _attention_linears(config: ModelConfig, prefix: str) -> list[LinearSpec]:
    """Where the output has a gate, q_proj gives each head's query and then its gate."""
    d, kv = config.hidden_size, config.num_kv_heads * config.head_dim
    heads = config.num_heads * config.head_dim
    q = 2 * heads if config.attn_gate else heads
    return [
        LinearSpec(f"{prefix}.qkv_proj", d, (("q", q), ("k", kv), ("v", kv)), bias=config.qkv_bias),
        LinearSpec(f"{prefix}.o_proj", heads, (("o", d),), bias=config.o_bias),
    ]


def _delta_linears(config: ModelConfig, prefix: str) -> list[LinearSpec]:
    """What a gated delta net is made of: queries, keys, values and z, the gate of its output; then b and a, of which
    what it writes and forgets is made: a few rows that decide what is remembered, and are never rounded."""
    delta, d = config.linear_attention, config.hidden_size
    assert delta is not None
    heads = delta.num_value_heads
    parts: tuple[tuple[str, int], ...] = (("qkv", delta.channels), ("z", delta.values))
    rates: tuple[tuple[str, int], ...] = (("b", heads), ("a", heads))
    if delta.grouped:
        rates = (("ba", 2 * heads),)
        parts = parts if delta.converted else (("qkvz", delta.channels + delta.values),)
    return [
        LinearSpec(f"{prefix}.in_proj", d, parts, bias=False),
        LinearSpec(f"{prefix}.rates_proj", d, rates, bias=False, quantizable=False),
        LinearSpec(f"{prefix}.out_proj", delta.values, (("out", d),), bias=False),
    ]


def file_rows(config: ModelConfig, param: str, part: str) -> list[int] | None:
    """The order in which the rows of a linear's part are taken from the file, None for that of the file.

    Qwen3-Next has them by key head: its query, its key, its value heads, their z; and their b, their a.
    """
    delta, name = config.linear_attention, param.rpartition(".")[2]
    if delta is None or not delta.grouped or part or name not in ("in_proj", "rates_proj"):
        return None
    each = delta.num_value_heads // delta.num_key_heads
    k, v = delta.key_dim, each * delta.value_dim
    sizes = (k, k, v, v) if name == "in_proj" else (each, each)
    rows: list[int] = []
    for i, size in enumerate(sizes):
        for head in range(delta.num_key_heads):
            first = head * sum(sizes) + sum(sizes[:i])
            rows.extend(range(first, first + size))
    return rows


def _mlp_linears(prefix: str, d: int, i: int, bias: bool = False) -> list[LinearSpec]:
    return [
        LinearSpec(f"{prefix}.gate_up_proj", d, (("gate", i), ("up", i)), bias=bias),
        LinearSpec(f"{prefix}.down_proj", i, (("down", d),), bias=bias),
    ]


def layer_tensors(config: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    """The other weights of a layer and their shapes: norms, what chooses the experts, and of a gated delta net its
    convolution and how fast each head forgets."""
    d, prefix = config.hidden_size, layer_prefix(config, layer)
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}.input_norm": (d,), f"{prefix}.post_norm": (d,)}
    delta = config.linear_attention
    if delta is not None and config.is_linear(layer):
        shapes |= {
            f"{prefix}.conv": (delta.channels, 1, delta.conv_kernel),
            f"{prefix}.log_decay": (delta.num_value_heads,),
            f"{prefix}.decay_bias": (delta.num_value_heads,),
            f"{prefix}.out_norm": (delta.value_dim,),
        }
    elif config.qk_norm:
        shapes |= {f"{prefix}.q_norm": (config.head_dim,), f"{prefix}.k_norm": (config.head_dim,)}
    if config.moe is not None and config.is_moe(layer):
        shapes[f"{prefix}.router"] = (config.moe.num_experts, d)
        if config.moe.shared_intermediate_size:
            shapes[f"{prefix}.shared_expert_gate"] = (1, d)
    return shapes


def with_mtp(config: ModelConfig, draft: str | None, name: str) -> ModelConfig:
    """The network with the head that guesses if that is how tokens are drafted. Raises ConfigError where config.json
    has none; ``name``: of the model, for that."""
    if draft != "mtp":
        return config
    if not config.mtp_layers:
        raise ConfigError(
            'draft="mtp"',
            f"{name} has no MTP head (mtp_num_hidden_layers is 0 or absent in config.json)",
            'Leave draft out: a request may ask for draft="lookup", which needs no head.',
        )
    return replace(config, with_mtp=True)


def mtp_linears(config: ModelConfig) -> list[LinearSpec]:
    """The linears of the head that guesses the token after next, none where it is not loaded: ``fc`` brings an
    embedding and a hidden state, side by side, to one; then come the layer's."""
    if not config.num_mtp_layers:
        return []
    d = config.hidden_size
    return [
        LinearSpec("mtp.fc", 2 * d, (("fc", d),), bias=False),
        *layer_linears(config, config.num_layers),
    ]


def mtp_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The other weights of that head and their shapes."""
    if not config.num_mtp_layers:
        return {}
    norms = ("mtp.embedding_norm", "mtp.hidden_norm", "mtp.norm")
    return dict.fromkeys(norms, (config.hidden_size,)) | layer_tensors(config, config.num_layers)


def head_linear(config: ModelConfig) -> LinearSpec:
    """What gives the logits. It stays dense unless it is quantised by name."""
    return LinearSpec(
        "lm_head", config.hidden_size, (("lm_head", config.vocab_size),), bias=False, quantizable=False
    )


def is_zero_centred(config: ModelConfig, name: str) -> bool:
    """Whether the file has a tensor less 1: all norms but that of a delta net's output."""
    return config.zero_centred_norms and name.endswith("norm") and not name.endswith("out_norm")


def is_wide(config: ModelConfig, name: str) -> bool:
    """Whether a tensor is float32 whatever the model computes in: norms that the file has less 1, as 16 bits do not
    hold their sum, and what decides how fast a delta net forgets."""
    return is_zero_centred(config, name) or name.endswith((".log_decay", ".decay_bias", ".out_norm"))


def kinds_of_layers(config: ModelConfig) -> list[tuple[int, int]]:
    """(a layer, how many have its shapes), of each kind: with attention or a delta net, with one MLP or experts."""
    kinds: dict[tuple[bool, bool], list[int]] = {}
    for layer in range(config.num_layers):
        kinds.setdefault((config.is_linear(layer), config.is_moe(layer)), []).append(layer)
    return [(layers[0], len(layers)) for layers in kinds.values()]


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
    total += sum(map(math.prod, mtp_tensors(config).values()))
    total += sum(
        spec.num_parameters * (experts if ".experts." in spec.name else 1) for spec in mtp_linears(one)
    )
    return total + config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)


def kv_bytes_per_token(num_layers: int, num_kv_heads: int, head_dim: int, itemsize: int, int8: bool) -> int:
    """Bytes that one token takes in the cache of all layers, keys and values together, in elements of ``itemsize`` or
    in int8, where each head has a float32 scale and zero beside its codes."""
    return 2 * num_layers * num_kv_heads * (head_dim + 8 if int8 else head_dim * itemsize)


def state_bytes(config: ModelConfig, itemsize: int) -> int:
    """Bytes of one sequence's state in all layers that keep one: float32 matrices, and the last tokens before the
    convolution in elements of ``itemsize``."""
    delta = config.linear_attention
    if delta is None:
        return 0
    matrices = delta.num_value_heads * delta.key_dim * delta.value_dim * 4
    return len(delta.layers) * (matrices + (delta.conv_kernel - 1) * delta.channels * itemsize)


def num_snapshots(sequences: int, affordable: int | None = None) -> int:
    """How many states are kept beside those of the running sequences: three for each, or as many as are
    ``affordable``, a few at least."""
    most = _SNAPSHOTS * sequences
    return most if affordable is None else min(most, max(_FEW, affordable))


def num_trail_states(sequences: int, guesses: int) -> int:
    """How many states are written beside those of the running sequences while a step checks up to ``guesses`` tokens of
    each: one after each of them, for as many sequences as a step has rows for."""
    return guesses * min(sequences, MOST_ROWS // (guesses + 1))


def least_state_bytes(config: ModelConfig, itemsize: int, sequences: int, guesses: int = 0) -> int:
    """Bytes of the states that are set up for ``sequences`` that may run together, however short memory is: what
    estimates, the check before loading and the choice of a context count with. ``guesses``: checked in a step of each,
    if the network has the head for that."""
    trail = num_trail_states(sequences, guesses) if config.num_mtp_layers else 0
    return (sequences + num_snapshots(sequences, 0) + trail) * state_bytes(config, itemsize)
