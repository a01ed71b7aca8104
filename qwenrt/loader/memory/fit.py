"""Which settings let a model fit into a memory: the planning behind `qwenrt estimate`. Needs no torch."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from qwenrt.config import ModelConfig
from qwenrt.config.layers import num_parameters
from qwenrt.config.model import DTYPE_BYTES
from qwenrt.loader.memory.footprint import GIB, MemoryNeed, Storage, memory_need
from qwenrt.loader.memory.preflight import largest_that

MOST_USERS = 4096
# What a process takes before it holds a model: Python and torch on the host, the driver's context on a device.
_RUNTIME = {"cpu": 256 * 2**20}
_CONTEXT = GIB // 2
_X86 = ("x86_64", "amd64")  # whose kernels keep bfloat16 in 12 bits
_FILLS_MEMORY = (
    0.7  # dense float32 models above this share of the free memory are computed in bfloat16 on a CPU
)


@dataclass(frozen=True)
class Workload:
    """What is to be served: ``users`` sequences of ``context`` tokens at once, or up to ``sequences`` shorter ones."""

    context: int
    users: int = 1
    sequences: int = 1


@dataclass(frozen=True)
class Option:
    """One way to load: how much it needs for the workload, and how far each of its two numbers could go.

    ``longest``: the largest context for the users asked for; ``most_users``: at the context asked for. 0 where not
    even one fits.
    """

    quantize: str | None
    kv_cache_dtype: str
    need: MemoryNeed
    longest: int
    most_users: int


@dataclass(frozen=True)
class DeviceLayout:
    """A model on a device: the dtype it computes in, how it is kept, and what the process takes beside it."""

    dtype: str
    storage: Storage
    runtime: int


def device_layout(
    config: ModelConfig, device: str, dtype: str, free: int | None, quantize: str | None = None
) -> DeviceLayout:
    """What loading with dtype="auto" or the one named does on a device, its own kernels taken to be there.

    A CPU computes in float32 unless a dense model would then fill most of the ``free`` memory, and keeps dense
    weights in the file's 16 bits; other devices compute in the file's dtype.
    """
    stored = config.dtype or "bfloat16"
    stored_bytes = DTYPE_BYTES[stored]
    coded = config.quant is not None and config.quant.has_codes
    name = device.partition(":")[0]
    if name != "cpu":
        dtype = stored if dtype == "auto" else dtype
        itemsize = DTYPE_BYTES[dtype]
        return DeviceLayout(dtype, Storage(itemsize, itemsize, stored_bytes, captured=True), _CONTEXT)
    if dtype == "auto":
        small = free is None or num_parameters(config) * stored_bytes <= _FILLS_MEMORY * free
        dtype = "float32" if coded or quantize or small else "bfloat16"
    itemsize = DTYPE_BYTES[dtype]
    dense = stored_bytes if dtype == "float32" else itemsize
    twelve = stored == "bfloat16" and dtype == "float32" and platform.machine().lower() in _X86
    storage = Storage(itemsize, dense, stored_bytes, kernels=True, on_host=True, twelve=twelve)
    return DeviceLayout(dtype, storage, _RUNTIME["cpu"])


def options(
    config: ModelConfig,
    layout_of: Callable[[str | None], DeviceLayout],
    work: Workload,
    free: int,
    batch_tokens: int,
    draft_tokens: int = 0,
) -> list[Option]:
    """Every way to load, from the most to the least exact, each with what would fit into ``free`` bytes.
    ``layout_of``: quantize -> DeviceLayout; ``draft_tokens``: guessed for each, if the config has the head for it."""
    coded = config.quant is not None and config.quant.has_codes
    found = []
    for quantize in (None,) if coded else (None, "int8", "int4"):
        layout = layout_of(quantize)
        needed = partial(
            memory_need, config, layout.storage, batch_tokens=batch_tokens, draft_tokens=draft_tokens
        )
        room = free - layout.runtime
        for kv in ("auto", "int8"):
            found.append(_option(needed, quantize, kv, work, room, config.max_position_embeddings))
    return found


def _option(
    needed: Callable[..., MemoryNeed],
    quantize: str | None,
    kv: str,
    work: Workload,
    room: int,
    positions: int,
) -> Option:
    def need(context: int, users: int) -> MemoryNeed:
        settings = {"quantize": quantize, "kv_cache_dtype": kv}
        return needed(context, users=users, sequences=work.sequences, **settings)

    longest = largest_that(lambda n: need(n, work.users).total <= room, 1, positions)
    most_users = largest_that(lambda n: need(work.context, n).total <= room, 1, MOST_USERS)
    return Option(quantize, kv, need(work.context, work.users), longest, most_users)
