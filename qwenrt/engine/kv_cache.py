"""The memory of one engine's sequences: keys and values in pages, and states; the tensors themselves."""

from __future__ import annotations

import torch

from qwenrt.backends.base import Backend
from qwenrt.config import ModelConfig
from qwenrt.config.layers import state_bytes
from qwenrt.errors import CapacityError, ConfigError
from qwenrt.ops.steps import LayerKV

KV_CACHE_DTYPES = ("auto", "int8")


class KVCache:
    """``layers``: for each decoder layer a LayerKV, ``num_blocks`` blocks of ``block_size`` slots each, and behind them
    ``spare_blocks``, which no sequence owns; or a LayerState of ``num_states`` slots, and where there are spare blocks
    of one more, ``spare_state``. ``of_mtp``: the pages of the head that guesses, None where there is none.

    ``kv_cache_dtype`` "auto" keeps the activation dtype, "int8" codes each token and head with its own range.
    """

    def __init__(
        self,
        config: ModelConfig,
        backend: Backend,
        dtype: torch.dtype,
        *,
        kv_cache_dtype: str,
        block_size: int,
        num_blocks: int,
        num_spare: int = 0,
        num_states: int = 0,
    ) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self.spare_blocks = list(range(num_blocks, num_blocks + num_spare))
        self.spare_state = num_states
        num_states += bool(num_states and num_spare)
        every = num_blocks + num_spare
        self.nbytes = every * block_bytes(config, backend, dtype, kv_cache_dtype, block_size)
        self.nbytes += num_states * state_bytes(config, dtype.itemsize)
        try:
            self.layers = backend.alloc_cache(
                config,
                dtype,
                num_blocks=every,
                block_size=block_size,
                num_states=num_states,
                quantized=kv_cache_dtype == "int8",
            )
            self.of_mtp = self._pages_of_mtp(config, backend, dtype, every, kv_cache_dtype == "int8")
        except (RuntimeError, MemoryError) as error:
            states_too = f" and {num_states} states" if num_states else ""
            smaller = "max_num_seqs or max_model_len" if num_states else "max_model_len or cache"
            raise CapacityError(
                f"a KV cache of {num_blocks} blocks of {block_size} tokens{states_too} ({self.nbytes} bytes)",
                str(error)[:200],
                f'Set a smaller {smaller}, or kv_cache_dtype="int8".',
            ) from error

    def _pages_of_mtp(
        self, config: ModelConfig, backend: Backend, dtype: torch.dtype, blocks: int, quantized: bool
    ) -> LayerKV | None:
        """They begin as zeros: where a prompt was found in the cache, a slot of it may not have been written."""
        if not config.num_mtp_layers:
            return None
        shape = (1, blocks, self.block_size, config.num_kv_heads, config.head_dim)
        (pages,) = backend.alloc_kv(*shape, dtype, quantized)
        for tensor in pages.tensors:
            tensor.zero_()
        return pages

    def parts(self, block: int) -> list[torch.Tensor]:
        """All that is kept of the tokens of one block: views of each layer's tensors, one after the other."""
        return [
            tensor[block] for layer in self.layers if isinstance(layer, LayerKV) for tensor in layer.paged
        ]


def block_bytes(
    config: ModelConfig, backend: Backend, dtype: torch.dtype, kv_cache_dtype: str, block_size: int
) -> int:
    """What one block takes in all layers. Raises ConfigError for an unknown ``kv_cache_dtype``."""
    if kv_cache_dtype not in KV_CACHE_DTYPES:
        raise ConfigError(
            "kv_cache_dtype", f"got {kv_cache_dtype!r}", f"It must be one of: {', '.join(KV_CACHE_DTYPES)}."
        )
    per_token = backend.kv_bytes_per_token(
        config.num_paged_layers, config.num_kv_heads, config.head_dim, dtype, kv_cache_dtype == "int8"
    )
    return per_token * block_size
