"""The memory of training: weights, what is kept for each trained number, activations and logits. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from qwenrt.config import ModelConfig
from qwenrt.config.layers import layer_linears, num_active_parameters, num_parameters
from qwenrt.errors import CapacityError
from qwenrt.loader.memory.footprint import GIB, Storage, weight_bytes

LOGIT_BYTES = 256 * 2**20  # of logits and their gradients that are alive at once
_LIBRARIES = 300 * 2**20  # what torch takes besides, with room for the largest temporary


@dataclass(frozen=True)
class TrainingNeed:
    """Bytes: ``weights`` as the network computes with them; ``trained``: float32 masters, gradients and two moments;
    ``activations`` kept for the gradients; ``logits`` of a part of the learned tokens."""

    weights: int
    trained: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return self.weights + self.trained + self.activations + self.logits + _LIBRARIES

    def format(self) -> str:
        """In a few lines of text."""
        rows = {
            "weights": (self.weights, "as the network computes with them"),
            "trained": (self.trained, "gradients, moments, and float32 beside 16 bits"),
            "activations": (self.activations, "kept for the gradients"),
            "logits": (self.logits, "of a part of the learned tokens at a time"),
            "total": (self.total, "with what the libraries take"),
        }
        return "\n".join(f"{name:<12} {gib(size):>12}   {text}" for name, (size, text) in rows.items())


def lora_numbers(config: ModelConfig, rank: int) -> int:
    """Numbers of an adapter with pairs of one rank at all linears of the layers."""
    total = 0
    for layer in range(config.num_layers):
        for spec in layer_linears(config, layer):
            if spec.quantizable:
                whole = config.model_type == "qwen" and spec.name.endswith("qkv_proj")
                parts = [spec.out_features] if whole else [rows for _, rows in spec.parts]
                total += sum(rank * (rows + spec.in_features) for rows in parts)
    return total


def training_need(
    config: ModelConfig,
    itemsize: int,
    *,
    lora: int | None = None,
    tokens: int = 4096,
    recompute: bool = False,
    quantize: str | None = None,
    pure: bool = False,
    moments: int = 4,
    parts: int = 1,
    shares_weights: bool = True,
) -> TrainingNeed:
    """``itemsize``: bytes of what the network computes in; ``lora``: numbers of an adapter, None where all parameters
    are trained; ``tokens``: computed at a time; ``pure``: nothing is kept in float32; ``moments``: bytes of each of the
    two, of which 2 leave gradients in what is computed in; ``parts``: in how many processes the network is, each with a
    part of what is trained and, where ``shares_weights``, of the weights."""
    storage = Storage(activation=itemsize, dense=itemsize, stored=2, kernels=False, on_host=False)
    numbers = num_parameters(config) if lora is None else lora
    gradient = itemsize if moments == 2 and lora is None and parts == 1 else 4
    each = gradient + 2 * moments + (4 if itemsize < 4 or lora is not None or parts > 1 else 0)
    if pure:
        each = 3 * itemsize + (itemsize if parts > 1 else 0)
    layer = tokens * activation_bytes(config, itemsize, lora is not None)
    kept = (
        layer * config.num_layers
        if not recompute
        else layer + tokens * config.num_layers * _stream(config, itemsize)
    )
    logits = min(LOGIT_BYTES, 3 * 4 * tokens * config.vocab_size)
    weights, trained = weight_bytes(config, storage, quantize), numbers * each
    if parts > 1:
        weights = _gathered(config, itemsize, weights, parts, shares_weights, lora is not None)
        trained = -(-trained // parts) if lora is None else trained
    return TrainingNeed(weights, trained, kept, logits)


def _gathered(
    config: ModelConfig, itemsize: int, whole: int, parts: int, shares_weights: bool, adapted: bool
) -> int:
    """Bytes of weights as they are computed with where each process has a part: all of them, or embedding, head and two
    layers (one is gathered while another is computed); and of a frozen base its part."""
    root = (1 if config.tie_word_embeddings else 2) * config.vocab_size * config.hidden_size * itemsize
    root = min(root, whole)
    gathered = root + 2 * (whole - root) // config.num_layers if shares_weights else whole
    return min(gathered, whole) + (-(-whole // parts) if adapted else 0)


def _stream(config: ModelConfig, itemsize: int) -> int:
    return config.hidden_size * max(itemsize, 2)


def activation_bytes(config: ModelConfig, itemsize: int, adapted: bool) -> int:
    """Bytes that a layer keeps for the gradients of one token: two norms in float32 and their results, queries and keys
    before and after rotation, values, what was attended to, the MLP's inner width four times; what experts read and
    give; with an adapter the inputs of all linears in float32."""
    d, inner = config.hidden_size, config.intermediate_size
    if config.moe is not None:
        inner = config.moe.intermediate_size * config.moe.top_k + config.moe.shared_intermediate_size
    heads, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    if config.linear_attention is not None:
        heads = max(heads, 2 * config.linear_attention.channels)
    norms = 2 * (4 + itemsize) * d
    attention = 8 * (heads + kv) + 4 * itemsize * (heads + kv)
    mlp = 4 * itemsize * inner
    if config.moe is not None:
        mlp += config.moe.top_k * d * (2 * itemsize + 8)
    pairs = 4 * (2 * d + heads + inner) if adapted and itemsize < 4 else 0
    return norms + attention + mlp + pairs


def training_flops(config: ModelConfig, tokens: int, length: int, adapted: bool, recompute: bool) -> float:
    """Operations of a step: forward and backward, of an adapter without the gradients of weights; attention besides."""
    passes = (4 if adapted else 6) + (2 if recompute else 0)
    active = num_active_parameters(config) - config.vocab_size * config.hidden_size
    return float(tokens) * (passes * active + 6 * config.num_layers * config.hidden_size * length)


def check_fits(
    need: TrainingNeed,
    free: int,
    total: int,
    device: str,
    *,
    lora: bool,
    recompute: bool,
    halves: bool = False,
    shares: bool = False,
) -> None:
    """CapacityError where training needs more than there is: nothing has been read then. ``halves``: moments might be
    of 16 bits; ``shares``: there are several processes, which might share the weights out."""
    if need.total <= free:
        return
    ways = ["a smaller micro_tokens"]
    if not recompute:
        ways.insert(0, 'recompute="all"')
    if shares:
        ways.append('shard="all"')
    if not lora:
        ways += ['moments="bfloat16"'] if halves else []
        ways.append('an adapter (method="lora")')
    else:
        ways.append('quantize="int4"')
    raise CapacityError(
        f"training on {device}",
        f"it needs {gib(need.total)} (weights {gib(need.weights)}, trained {gib(need.trained)}, activations "
        f"{gib(need.activations)}, logits {gib(need.logits)}), and {gib(free)} of {gib(total)} are free",
        f"Use {', '.join(ways)}, or a machine with more memory.",
    )


def gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= GIB // 10 else f"{nbytes / 2**20:.1f} MiB"
