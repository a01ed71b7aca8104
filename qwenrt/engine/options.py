"""How large an engine is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qwenrt.config.layers import num_snapshots
from qwenrt.errors import ConfigError
from qwenrt.load_options import MOST_DRAFT_TOKENS

STEP_TARGET_MS = 250  # on a CPU, unless something else is asked: four tokens a second still read as a flow


@dataclass(frozen=True)
class EngineOptions:
    """max_model_len: prompt and answer together, in tokens. max_num_seqs: sequences computed together;
    max_num_batched_tokens: tokens a step. The cache has ``num_blocks`` blocks of ``block_size`` tokens, or without a
    number max_num_seqs times max_model_len; a context can be no longer than it. ``depth``: how many steps may be under
    way when the next one is begun, 0 or 1; the backend's choice if not given. ``step_target_ms``: what a step in which
    somebody decodes shall take at most (`StepTarget`); 0 for no such target, None for 250 on a CPU and none elsewhere.
    ``prefix_store``: the directory of a `PrefixStore`, ``prefix_store_bytes`` what it may hold. ``num_snapshots``: how
    many states are kept beside those of running sequences, in a model with layers of linear attention; unless given, as
    config.layers says. ``draft_tokens``: how many tokens the head that guesses proposes for a sequence at a time, 0 for
    none; steps then do not overlap. ``max_adapters``: how many are in memory at once. Raises ConfigError."""

    max_model_len: int
    max_num_seqs: int = 16
    max_num_batched_tokens: int = 512
    block_size: int = 16
    kv_cache_dtype: str = "auto"
    num_blocks: int | None = None
    prefix_caching: bool = True
    depth: int | None = None
    step_target_ms: float | None = None
    prefix_store: Path | None = None
    prefix_store_bytes: int = 4 * 2**30
    num_snapshots: int | None = None
    draft_tokens: int = 0
    max_adapters: int = 16

    def __post_init__(self) -> None:
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size", "max_adapters"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(name, f"got {value!r}", "It must be an integer >= 1.")
        if self.depth is not None and (type(self.depth) is not int or self.depth not in (0, 1)):
            raise ConfigError("depth", f"got {self.depth!r}", "It must be 0 or 1.")
        kept = self.num_snapshots
        if kept is not None and (type(kept) is not int or kept < 0):
            raise ConfigError("num_snapshots", f"got {kept!r}", "It must be an integer >= 0.")
        guesses = self.draft_tokens
        if type(guesses) is not int or not 0 <= guesses <= MOST_DRAFT_TOKENS:
            needed = f"It must be an integer from 0 to {MOST_DRAFT_TOKENS}."
            raise ConfigError("draft_tokens", f"got {guesses!r}", needed)
        if guesses:
            object.__setattr__(self, "depth", 0)  # what guesses would follow has to be known
        target = self.step_target_ms
        if target is not None and (isinstance(target, bool) or not target >= 0):
            raise ConfigError("step_target_ms", f"got {target!r}", "It must be a number >= 0.")
        if self.num_blocks is None:
            blocks = self.max_num_seqs * -(-self.max_model_len // self.block_size)
            object.__setattr__(self, "num_blocks", blocks)

    def step_target_s(self, device: str) -> float | None:
        """What a step shall take at most on a kind of device, in seconds; None where there is no such target."""
        target = self.step_target_ms
        if target is None:
            target = STEP_TARGET_MS if device == "cpu" else 0
        return target / 1000 or None

    @property
    def snapshots(self) -> int:
        """num_snapshots, chosen."""
        return num_snapshots(self.max_num_seqs) if self.num_snapshots is None else self.num_snapshots

    @property
    def blocks(self) -> int:
        """num_blocks, chosen."""
        assert self.num_blocks is not None
        return self.num_blocks
