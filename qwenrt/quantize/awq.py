"""AWQ: inputs that are large are multiplied up in the weights before these are rounded, and down where they come from.

After "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration" (Lin et al., 2023, section 3.2):
a factor for each input, its size to a power that is searched for. The error of a matrix's outputs comes from the sum of
x x^T over its inputs, not from running the layer again, and the size of an input is the root of its mean square.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from qwenrt.config import ModelConfig
from qwenrt.config.layers import LinearSpec, is_zero_centred, layer_tensors
from qwenrt.loader.checkpoint.inventory import parts_of
from qwenrt.loader.weights import WeightReader
from qwenrt.ops.types import CanonicalWeight
from qwenrt.ops.weights import dequantize
from qwenrt.quantize.solver import Grid, relative_error, rounded

_POWERS = tuple(i / 20 for i in range(20))  # of an input's size; 0 leaves the weights as they are
_LEAST = 1e-4  # of a factor


@dataclass(frozen=True)
class Fold:
    """Linears that read the same values, whose factors are taken back where these come from: in the norm of the name
    ``source``, or in the rows ``part`` of the linear ``source``. ``others``: names of weights that read them too and
    stay dense."""

    readers: tuple[str, ...]
    source: str
    part: str | None = None
    others: tuple[str, ...] = ()


def folds_of(config: ModelConfig, index: int, specs: Mapping[str, LinearSpec], coded: set[str]) -> list[Fold]:
    """What can be scaled in layer ``index``, of whose linears ``specs`` those in ``coded`` are rounded. Values reach
    o_proj head by head: only where each has a head of its own can their factors be taken back."""
    prefix = next(iter(specs)).rsplit(".", 1)[0]
    norms: dict[str, list[str]] = {f"{prefix}.input_norm": [], f"{prefix}.post_norm": []}
    folds: list[Fold] = []
    for name in specs:
        role, owner = name.rpartition(".")[2], name.rpartition(".")[0]
        if role in ("qkv_proj", "in_proj", "rates_proj"):
            norms[f"{prefix}.input_norm"].append(name)
        elif role == "gate_up_proj":
            norms[f"{prefix}.post_norm"].append(name)
        elif role == "down_proj":
            folds.append(Fold((name,), f"{owner}.gate_up_proj", "up"))
        elif role == "o_proj" and config.num_kv_heads == config.num_heads:
            folds.append(Fold((name,), f"{owner}.qkv_proj", "v"))
    gates = [
        name for name in layer_tensors(config, index) if name.endswith((".router", ".shared_expert_gate"))
    ]
    for norm, names in norms.items():
        readers = tuple(name for name in names if name in coded)
        left = [name for name in names if name not in coded]
        if readers and all(name.endswith(".rates_proj") for name in left):
            others = (*left, *(gates if norm.endswith(".post_norm") else ()))
            folds.append(Fold(readers, norm, others=others))
    return [
        fold for fold in folds if coded.issuperset(fold.readers) and (not fold.part or fold.source in coded)
    ]


def search(linears: Sequence[tuple[torch.Tensor, torch.Tensor]], grid: Grid) -> torch.Tensor:
    """The factors float32 [K] of inputs that several linears read, each a weight float32 [N, K] and the sum float32
    [K, K] of x x^T over its inputs: those of least error of all outputs, ones where none is better."""
    sizes = torch.stack([hessian.diagonal() for _, hessian in linears]).sum(0).sqrt()
    plain = replace(grid, clip=False)
    best, least = torch.ones_like(sizes), float("inf")
    if not bool((sizes > 0).any()):
        return best
    for power in _POWERS:
        factors = sizes.pow(power).clamp_(min=_LEAST)
        factors /= (factors.max() * factors.min()).sqrt()
        error = 0.0
        for weight, hessian in linears:
            made = dequantize(rounded(weight * factors, plain), torch.float32) / factors
            difference = weight - made
            error += float(((difference @ hessian) * difference).sum())
        if error < least:
            best, least = factors, error
    return best


class Scaling:
    """One layer's factors: for each linear those of its inputs, and what its rows are divided by; and the tensors of
    the file that change, ``changed``, by their names in it."""

    def __init__(self, reader: WeightReader, specs: Mapping[str, LinearSpec]) -> None:
        self._reader, self._specs = reader, specs
        self._inputs: dict[str, torch.Tensor] = {}
        self._rows: dict[str, torch.Tensor] = {}
        self.changed: dict[str, torch.Tensor] = {}

    def take(self, fold: Fold, factors: torch.Tensor) -> None:
        """Note the factors of a fold; those of a norm as exactly as the file can hold its quotient."""
        if fold.part is None:
            factors = self._divide_norm(fold.source, factors)
        else:
            self._divide_rows(fold.source, fold.part, factors)
        for name in fold.readers:
            self._inputs[name] = factors
        for name in fold.others:
            for (_, kind), slot in self._reader.inventory.slots[name].items():
                if kind == "weight":
                    tensor = self._stored(slot)
                    self.changed[slot] = (tensor.float() * factors).to(tensor.dtype)

    def rounded(
        self, name: str, weight: torch.Tensor, hessian: torch.Tensor, grid: Grid
    ) -> tuple[CanonicalWeight, float]:
        """The codes of a linear, whose weight was float32 [N, K], and the relative error of its outputs."""
        rows = self._rows.get(name, torch.ones(len(weight)))[:, None]
        inputs = self._inputs.get(name, torch.ones(weight.shape[1]))
        made = rounded(weight * inputs / rows, grid, hessian.diagonal() / inputs.square())
        seen = dequantize(made, torch.float32) * rows / inputs
        return made, relative_error(weight, seen, hessian)

    def _stored(self, slot: str) -> torch.Tensor:
        return self.changed.get(slot, self._reader.reader.tensor(slot))

    def _divide_norm(self, norm: str, factors: torch.Tensor) -> torch.Tensor:
        slot = self._reader.inventory.slots[norm]["", "weight"]
        shift = float(is_zero_centred(self._reader.config, norm))
        stored = self._reader.reader.tensor(slot)
        before = stored.float() + shift
        after = (before / factors - shift).to(stored.dtype)
        exact = before / (after.float() + shift)
        usable = torch.isfinite(exact) & (exact > 0)
        self.changed[slot] = torch.where(usable, after, stored)
        return torch.where(usable, exact, torch.ones_like(exact))

    def _divide_rows(self, name: str, part: str, factors: torch.Tensor) -> None:
        spec = self._specs[name]
        self._rows[name] = torch.cat(
            [factors if own == part else torch.ones(rows) for own, rows in spec.parts]
        )
        slots, first = self._reader.inventory.slots[name], 0
        for own, rows in parts_of(spec, slots):
            slot = slots.get((own, "bias"))
            if slot is not None:
                bias = self._reader.reader.tensor(slot)
                self.changed[slot] = (bias.float() / self._rows[name][first : first + rows]).to(bias.dtype)
            first += rows
