"""Which code serves an op: what an override states about itself, one use of an op, and what came of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

Method = TypeVar("Method", bound=Callable[..., Any])

# What a backend may override: the primitive ops; the seams of a decoder layer that compose them; and what a whole step
# is asked for, which is called as it is.
PRIMITIVES = (
    *("rms_norm", "linear", "rotary", "store_kv", "attention", "decode_attention", "silu_and_mul"),
    "gate_output",  # of attention with gates
    *("causal_conv", "gated_delta", "gated_norm"),  # of layers of linear attention
    "add_lora",  # of steps with adapters
)
SEAMS = {
    "norm_linear": ("rms_norm", "linear"),
    "rotary_store_kv": ("rotary", "store_kv"),
    "delta_net": ("causal_conv", "gated_delta", "gated_norm"),
    "decode_delta_net": ("gated_norm",),
    "linear_add": ("linear",),
    "norm_gate_up_silu": ("rms_norm", "linear", "silu_and_mul"),
    "norm_moe_add": ("rms_norm", "linear", "silu_and_mul"),
    "norm_moe_add_each": ("rms_norm", "linear", "silu_and_mul"),
}
WHOLES = ("stacks", "choose", "choose_rows")


@dataclass(frozen=True)
class Limits:
    """What an override serves, as data. Empty means no limit. ``needs``: conditions the backend checks by name."""

    dtypes: tuple[torch.dtype, ...] = ()
    head_dim: tuple[int, ...] = ()
    kinds: tuple[str, ...] = ()  # Packed.kind of the weight
    needs: tuple[str, ...] = ()
    note: str = ""


def native(
    *,
    dtypes: tuple[torch.dtype, ...] = (),
    head_dim: tuple[int, ...] = (),
    kinds: tuple[str, ...] = (),
    needs: tuple[str, ...] = (),
    note: str = "",
) -> Callable[[Method], Method]:
    """Marks a method as this device's own code and states where it serves; elsewhere the definition does."""
    limits = Limits(dtypes, head_dim, kinds, needs, note)

    def mark(method: Method) -> Method:
        method.native = limits  # type: ignore[attr-defined]
        return method

    return mark


@dataclass(frozen=True)
class OpSpec:
    """One use of an op at model build: which op, in which layer, with what shape facts."""

    op: str
    where: str
    dtype: torch.dtype
    head_dim: int = 0
    kind: str = ""


@dataclass(frozen=True)
class Binding:
    """Which code serves one use of an op: the backend's own or the definition, and why not its own."""

    op: str
    where: str
    kind: str
    native: bool
    why: str = ""
