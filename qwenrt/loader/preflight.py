"""How much memory a model needs, from its config alone, and a refusal before any of it is allocated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from qwenrt.config import ModelConfig, QuantConfig
from qwenrt.errors import CapacityError

if TYPE_CHECKING:
    import torch

    from qwenrt.backends.base import Backend

GIB = 2**30
_ROUNDED = {"int8": QuantConfig(8, 128), "int4": QuantConfig(4, 128)}  # what quantize= makes of dense weights
_LOGIT_ROWS = 16  # rows of float32 logits that are alive at once, with their sorted copies
_FIXED = 64 * 2**20  # buffers of the engine, the tokenizer, the kernels


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes a model takes: its weights, the cache for the tokens asked for, and what computing needs besides."""

    weights: int
    cache: int
    workspace: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.workspace


def linear_shapes(config: ModelConfig) -> Iterator[tuple[int, int]]:
    """(out_features, in_features) of the four linears of one layer."""
    d, i, q = config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim
    yield q + 2 * config.num_kv_heads * config.head_dim, d
    yield d, q
    yield 2 * i, d
    yield d, i


def _linear_bytes(rows: int, columns: int, dtype_bytes: int, quant: QuantConfig | None) -> int:
    """One linear without its bias; quantised: codes, float16 scales, int16 zeros, and the order of the inputs."""
    if quant is None:
        return rows * columns * dtype_bytes
    group = columns if quant.group_size == -1 else min(quant.group_size, columns)
    codes = rows * -(-columns * quant.bits // 8)
    return codes + -(-columns // group) * rows * (2 + 2) + (4 * columns if quant.desc_act else 0)


def weight_bytes(config: ModelConfig, dtype_bytes: int, quantize: str | None = None) -> int:
    """Bytes of all weights once packed: ``dtype_bytes`` an element, linears as the checkpoint or ``quantize`` says."""
    quant = config.quant or (_ROUNDED[quantize] if quantize else None)
    d = config.hidden_size
    shapes = list(linear_shapes(config))
    layer = sum(_linear_bytes(rows, columns, dtype_bytes, quant) for rows, columns in shapes)
    biases = sum(rows for rows, _ in shapes) if config.mlp_bias else shapes[0][0]
    layer += (biases + 2 * d) * dtype_bytes
    vocabulary = config.vocab_size * d * (1 if config.tie_word_embeddings else 2)
    return config.num_layers * layer + (vocabulary + d) * dtype_bytes


def cache_bytes(config: ModelConfig, tokens: int, dtype_bytes: int, kv_cache_dtype: str = "auto") -> int:
    """Bytes of the KV cache for ``tokens``; int8 keeps a float32 scale and zero for each token and head."""
    per_head = config.head_dim + 8 if kv_cache_dtype == "int8" else config.head_dim * dtype_bytes
    return 2 * config.num_layers * config.num_kv_heads * per_head * tokens


def memory_need(
    config: ModelConfig,
    dtype_bytes: int,
    cache_tokens: int,
    *,
    quantize: str | None = None,
    kv_cache_dtype: str = "auto",
    batch_tokens: int = 512,
    weight_itemsize: int | None = None,
) -> MemoryNeed:
    """What loading and running take. ``cache_tokens``: of all sequences together; ``batch_tokens``: computed at once;
    ``weight_itemsize``: bytes of a dense weight where it is kept in another dtype than ``dtype_bytes`` are of.

    The larger of the load's peak above the weights (the biggest linear, once more) and a step's activations counts
    as workspace.
    """
    largest = max(rows * columns for rows, columns in linear_shapes(config)) * dtype_bytes
    widest = max(rows + columns for rows, columns in linear_shapes(config))
    step = 4 * batch_tokens * widest * dtype_bytes + _LOGIT_ROWS * config.vocab_size * 4
    return MemoryNeed(
        weight_bytes(config, weight_itemsize or dtype_bytes, quantize),
        cache_bytes(config, cache_tokens, dtype_bytes, kv_cache_dtype),
        max(largest, step) + _FIXED,
    )


def preflight(
    config: ModelConfig,
    backend: Backend,
    dtype: torch.dtype,
    *,
    quantize: str | None = None,
    max_model_len: int,
    kv_cache_dtype: str = "auto",
    cache_tokens: int | None = None,
    stored: str | None = None,
) -> MemoryNeed:
    """Compare what the model needs with what the device has free (in a container, what that may use).

    ``cache_tokens`` defaults to one sequence of ``max_model_len``; ``stored``: the dtype of the files' dense weights.
    Raises CapacityError with the figures and what would fit; nothing has been allocated then. Weights that stay
    mapped files count in full: a cache of the system could drop them, and every token would then read them from the
    disk again.
    """
    free, total = backend.memory()
    tokens = cache_tokens or max_model_len
    kept = backend.weight_dtype(stored, dtype).itemsize
    needed = partial(memory_need, config, dtype.itemsize, tokens, weight_itemsize=kept)
    need = needed(quantize=quantize, kv_cache_dtype=kv_cache_dtype)
    if need.total <= free:
        return need
    token_bytes = partial(cache_bytes, config, 1, dtype.itemsize)
    levels = [quantize]
    if config.quant is None:
        levels += [level for level in ("int8", "int4") if level != quantize and quantize != "int4"]
    options = _what_fits(needed, token_bytes, tokens, free, levels, kv_cache_dtype)
    remedy = f"This would fit: {'; '.join(options)}." if options else "No setting makes this model fit here."
    raise CapacityError(
        f"loading this model on {backend.device} with {tokens} tokens of cache",
        f"it needs {_gib(need.total)} (weights {_gib(need.weights)}, cache {_gib(need.cache)}, "
        f"workspace {_gib(need.workspace)}), and {_gib(free)} of {_gib(total)} are free",
        remedy + ("" if options else " Use a smaller model or a machine with more memory."),
    )


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.2f} GiB"


def _what_fits(
    needed: Callable[..., MemoryNeed],
    token_bytes: Callable[[str], int],
    tokens: int,
    free: int,
    levels: list[str | None],
    kv_cache_dtype: str,
) -> list[str]:
    """Changes of one or two settings that fit into ``free`` bytes, the mildest first; ``levels[0]`` is as asked."""
    found: list[str] = []
    for level in levels:
        named = [] if level == levels[0] else [f'quantize="{level}"']
        for kv in dict.fromkeys((kv_cache_dtype, "int8")):
            words = named + ([] if kv == kv_cache_dtype else ['kv_cache_dtype="int8"'])
            need = needed(quantize=level, kv_cache_dtype=kv)
            if words and need.total <= free:
                found.append(" with ".join(words))
                break
            shorter = (free - need.weights - need.workspace) // token_bytes(kv) // 16 * 16
            if kv == kv_cache_dtype and 256 <= shorter < tokens:
                found.append(" with ".join([*named, f"max_model_len={shorter}"]))
    return found
