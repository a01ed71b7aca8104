"""A refusal before any memory is taken, where the model does not fit into what the device has free."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from qwenrt.config import ModelConfig
from qwenrt.config.layers import BLOCK_SIZE
from qwenrt.errors import CapacityError
from qwenrt.loader.memory.footprint import BATCH_TOKENS, GIB, MemoryNeed, Storage, memory_need

if TYPE_CHECKING:
    import torch

    from qwenrt.backends.base import Backend

_SHORTEST = 256  # tokens of context that are worth offering


def preflight(
    config: ModelConfig,
    backend: Backend,
    dtype: torch.dtype,
    *,
    quantize: str | None = None,
    max_model_len: int,
    kv_cache_dtype: str = "auto",
    users: int = 1,
    sequences: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    draft_tokens: int = 0,
    stored: str | None = None,
) -> MemoryNeed:
    """Compare what the model needs with what the device has free (in a container, what that may use).

    The cache is counted for ``users`` sequences of ``max_model_len``, and for the states of ``sequences`` that may run
    together (None: of the users); ``batch_tokens``: computed in one step; ``draft_tokens``: guessed for each sequence;
    ``stored``: the dtype of the files' dense weights. Raises CapacityError with the figures and what would fit; nothing
    has been allocated then. Weights that stay mapped files count in full: a cache of the system could drop them, and
    every token would then read them from the disk again.
    """
    free, total = backend.memory()
    storage = storage_of(backend, dtype, stored)
    sequences = users if sequences is None else sequences
    needed = partial(
        memory_need, config, storage, users=users, batch_tokens=batch_tokens, draft_tokens=draft_tokens
    )
    need = needed(max_model_len, sequences=sequences, quantize=quantize, kv_cache_dtype=kv_cache_dtype)
    if need.total <= free:
        return need
    levels = [quantize]
    if config.quant is None or not config.quant.has_codes:
        levels += [level for level in ("int8", "int4") if level != quantize and quantize != "int4"]
    options = _what_fits(partial(needed, sequences=sequences), max_model_len, free, levels, kv_cache_dtype)
    states = ""
    if config.linear_attention is not None:
        as_asked = partial(needed, max_model_len, quantize=quantize, kv_cache_dtype=kv_cache_dtype)
        fewer = largest_that(lambda n: as_asked(sequences=n).total <= free, users, sequences)
        options = [f"max_num_seqs={fewer}"] * (fewer >= users) + options
        states = f" and the states of {sequences} sequences"
    remedy = f"This would fit: {'; '.join(options)}." if options else "No setting makes this model fit here."
    raise CapacityError(
        f"loading this model on {backend.device} with {users * max_model_len} tokens of cache{states}",
        f"it needs {_gib(need.total)} (weights {_gib(need.weights)}, cache {_gib(need.cache)}, "
        f"workspace {_gib(need.workspace)}), and {_gib(free)} of {_gib(total)} are free",
        remedy + ("" if options else " Use a smaller model or a machine with more memory."),
    )


def storage_of(backend: Backend, dtype: torch.dtype, stored: str | None) -> Storage:
    """How a backend keeps a model with activations in ``dtype`` whose file is ``stored`` in a dtype of that name."""
    kernels, kept = getattr(backend, "kernels", None), backend.weight_dtype(stored, dtype)
    return Storage(
        activation=dtype.itemsize,
        dense=kept.itemsize,
        stored=4 if stored == "float32" else 2,
        kernels=kernels is not None and "linear" not in backend.demoted,
        on_host=backend.device.type == "cpu",
        dense_codes=bool(getattr(backend, "dense_codes", False)),
        least_bits=int(getattr(backend, "least_bits", 4)),
        captured=backend.graphs() is not None,
        twelve=stored == "bfloat16" and kept != dtype and kernels is not None and kernels.serves12,
    )


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.2f} GiB"


def largest_that(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The largest number from ``low`` to ``high`` that ``fits``, where smaller ones fit too; below ``low`` if none."""
    low -= 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _longest(needed: Callable[[int], MemoryNeed], free: int, context: int) -> int:
    """The largest context up to ``context`` that fits into ``free`` bytes, in whole blocks."""
    return largest_that(lambda n: needed(n).total <= free, 1, context) // BLOCK_SIZE * BLOCK_SIZE


def _what_fits(
    needed: Callable[..., MemoryNeed], context: int, free: int, levels: list[str | None], kv_cache_dtype: str
) -> list[str]:
    """Changes of one or two settings that fit into ``free`` bytes, the mildest first; ``levels[0]`` is as asked."""
    found: list[str] = []
    for level in levels:
        named = [] if level == levels[0] else [f'quantize="{level}"']
        for kv in dict.fromkeys((kv_cache_dtype, "int8")):
            words = named + ([] if kv == kv_cache_dtype else ['kv_cache_dtype="int8"'])
            fitting = partial(needed, quantize=level, kv_cache_dtype=kv)
            if words and fitting(context).total <= free:
                found.append(" with ".join(words))
                break
            shorter = _longest(fitting, free, context)
            if kv == kv_cache_dtype and _SHORTEST <= shorter < context:
                found.append(" with ".join([*named, f"max_model_len={shorter}"]))
    return found
