"""What a checkpoint holds against what a model wants: every tensor is accounted for before any of it is read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from qwenrt.config import ModelConfig, QuantConfig
from qwenrt.config.layers import LinearSpec
from qwenrt.errors import CheckpointError
from qwenrt.loader.checkpoint import Checkpoint
from qwenrt.loader.header import TensorEntry
from qwenrt.loader.names import NameTable
from qwenrt.ops.types import Packed

FLOATS = ("F16", "BF16", "F32", "F64")
FP8 = "F8_E4M3"
_SCALES = ("F16", "BF16", "F32")
_Expected = dict[str, tuple[tuple[int, ...], tuple[str, ...]]]  # kind -> (shape, dtypes)


class Loadable(Protocol):
    """What load_weights needs of a model: what it wants, and where to put it."""

    linear_specs: dict[str, LinearSpec]
    tensor_specs: dict[str, tuple[int, ...]]

    def set_linear(self, name: str, packed: Packed) -> None: ...

    def set_tensor(self, name: str, tensor: torch.Tensor) -> None: ...

    def get(self, name: str) -> Packed | torch.Tensor: ...


@dataclass
class Inventory:
    """Which checkpoint tensor fills which slot, and everything that is wrong with that.

    ``slots``: parameter -> (part, kind) -> checkpoint name.
    """

    slots: dict[str, dict[tuple[str, str], str]] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    incomplete: list[str] = field(default_factory=list)
    misshaped: list[str] = field(default_factory=list)

    def raise_problems(self, checkpoint: Checkpoint) -> None:
        """One CheckpointError for all that was found, if anything was."""
        found = [
            f"{len(names)} {what}: {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}"
            for what, names in (
                ("missing", self.missing),
                ("unexpected", self.unexpected),
                ("incomplete", self.incomplete),
                ("of the wrong shape or dtype", self.misshaped),
            )
            if names
        ]
        if found:
            raise CheckpointError(
                f"the {len(checkpoint.tensors)} tensors in {checkpoint.directory} are not the model that "
                "config.json describes",
                "; ".join(found),
                "Check that config.json and the weights come from the same repository and revision, then download "
                "the model again.",
            )


def take_inventory(
    checkpoint: Checkpoint, model: Loadable, config: ModelConfig, table: NameTable
) -> Inventory:
    """Compare the checkpoint's headers with what the model wants. Reads no data."""
    inventory = Inventory()
    wanted = model.linear_specs.keys() | model.tensor_specs.keys()
    for name in checkpoint.tensors:
        place = table.locate(name)
        if place is None or (not place.ignored and place.param not in wanted):
            inventory.unexpected.append(name)
        elif place.ignored or (config.tie_word_embeddings and place.param == "lm_head"):
            inventory.ignored.append(name)
        else:
            slots = inventory.slots.setdefault(place.param, {})
            if (place.part, place.kind) in slots:
                inventory.unexpected.append(f"{name} (the same as {slots[place.part, place.kind]})")
            slots[place.part, place.kind] = name
    if config.tie_word_embeddings and "embed_tokens" in inventory.slots:
        inventory.slots["lm_head"] = inventory.slots["embed_tokens"]
    check = _SlotCheck(checkpoint, config, table, inventory)
    for param, shape in model.tensor_specs.items():
        check.tensor(param, shape)
    for spec in model.linear_specs.values():
        check.linear(spec)
    return inventory


def parts_of(spec: LinearSpec, slots: dict[tuple[str, str], str]) -> Sequence[tuple[str, int]]:
    """The parts a checkpoint stores a linear in: one block for all of it, or the spec's own parts."""
    whole = len(spec.parts) == 1 or any(part == "" for part, _ in slots)
    return (("", spec.out_features),) if whole else spec.parts


class _SlotCheck:
    """Checks the slots of one parameter after the other; what is wrong goes into the inventory."""

    def __init__(
        self, checkpoint: Checkpoint, config: ModelConfig, table: NameTable, inventory: Inventory
    ) -> None:
        self.entries, self.config, self.table, self.inventory = checkpoint.tensors, config, table, inventory

    def tensor(self, param: str, shape: tuple[int, ...]) -> None:
        name = self.inventory.slots.get(param, {}).get(("", "weight"))
        if name is None:
            self.inventory.missing.append(self.table.source(param))
        else:
            self._shape(name, shape, FLOATS)

    def linear(self, spec: LinearSpec) -> None:
        slots = self.inventory.slots.get(spec.name, {})
        parts = parts_of(spec, slots or {(part, ""): "" for part in self.table.parts(spec.name)})
        present = [part for part, _ in parts if any(p == part for p, _ in slots)]
        if present and len(present) < len(parts):
            absent = ", ".join(self.table.source(spec.name, p) for p, _ in parts if p not in present)
            self.inventory.incomplete.append(f"{spec.name} lacks {absent}")
            return
        for part, rows in parts:
            self._part(spec, part, rows, {kind: name for (p, kind), name in slots.items() if p == part})

    def _part(self, spec: LinearSpec, part: str, rows: int, kinds: dict[str, str]) -> None:
        quant = self.config.quant
        packed = {kind: name for kind, name in kinds.items() if kind not in ("weight", "bias")}
        if packed and quant is None:
            self.inventory.unexpected += [
                f"{n} (config.json has no quantization_config)" for n in packed.values()
            ]
            return
        expected: _Expected = {"weight": ((rows, spec.in_features), FLOATS)}
        if quant is not None and self._is_quantised(quant, kinds):
            expected = _quantised(quant, rows, spec.in_features, kinds)
        if spec.bias or (quant is not None and "bias" in kinds):
            expected["bias"] = ((rows,), FLOATS)
        for kind, (shape, dtypes) in expected.items():
            if kind in kinds:
                self._shape(kinds[kind], shape, dtypes)
            else:
                self.inventory.missing.append(self.table.source(spec.name, part, kind))
        self.inventory.unexpected += [name for kind, name in kinds.items() if kind not in expected]

    def _is_quantised(self, quant: QuantConfig, kinds: dict[str, str]) -> bool:
        """Modules may be left dense: by what the file holds, not by the names a config lists."""
        if quant.method == "fp8":
            return "weight" in kinds and self.entries[kinds["weight"]].dtype == FP8
        return bool(kinds.keys() - {"weight", "bias"})

    def _shape(self, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
        entry = self.entries[name]
        if name.endswith(".weight_scale") and entry.shape in ((), (1,), (*shape, 1)):
            return  # one number for the whole matrix, or a column
        if entry.shape != shape:
            note = ""
            if shape == (self.config.vocab_size, self.config.hidden_size) and entry.shape[1:] == shape[1:]:
                note = f" (config.json says vocab_size {self.config.vocab_size})"
            self.inventory.misshaped.append(f"{name} {list(entry.shape)}, expected {list(shape)}{note}")
        elif entry.dtype not in dtypes:
            self.inventory.misshaped.append(f"{name} {entry.dtype}, expected {' or '.join(dtypes)}")


def _quantised(quant: QuantConfig, rows: int, columns: int, kinds: dict[str, str]) -> _Expected:
    """What a quantised module [rows, columns] consists of on disk."""
    if quant.method == "fp8":
        weight: _Expected = {"weight": ((rows, columns), (FP8,))}
        if quant.block is None:
            return weight | {"weight_scale": ((rows,), _SCALES)}
        blocks = (math.ceil(rows / quant.block[0]), math.ceil(columns / quant.block[1]))
        return weight | {"weight_scale_inv": (blocks, _SCALES)}
    group = columns if quant.group_size == -1 else min(quant.group_size, columns)
    groups, word = math.ceil(columns / group), 32 // quant.bits
    expected: _Expected = {
        "qweight": ((math.ceil(columns / word), rows), ("I32",)),
        "qzeros": ((groups, math.ceil(rows / word)), ("I32",)),
        "scales": ((groups, rows), _SCALES),
    }
    if quant.method == "awq":  # packed along the outputs
        expected["qweight"] = ((columns, math.ceil(rows / word)), ("I32",))
    elif "g_idx" in kinds:
        expected["g_idx"] = ((columns,), ("I32", "I64"))
    return expected


def unstacked(checkpoint: Checkpoint, config: ModelConfig, table: NameTable) -> Checkpoint:
    """The same files with every tensor that holds a module of all experts seen as one matrix for each expert.

    Some writers keep [experts, in, out], others [experts, out, in]: a shape that fits only one tells which. What
    fits neither stays whole, and is found to be unexpected.
    """
    moe = config.moe
    if moe is None:
        return checkpoint
    d, i = config.hidden_size, moe.intermediate_size
    stacks: dict[str, tuple[str, tuple[int, int]]] = {}  # name -> one expert's name and its shape
    for name, entry in checkpoint.tensors.items():
        path = table.expert_of(name)
        if path is not None:
            shape = (d, i) if "down" in path else (2 * i, d)
            if entry.shape in ((moe.num_experts, *shape), (moe.num_experts, *shape[::-1])):
                stacks[name] = path, shape
    transposed = any(checkpoint.tensors[name].shape[1:] != shape for name, (_, shape) in stacks.items())
    tensors: dict[str, TensorEntry] = {}
    for name, entry in checkpoint.tensors.items():
        if name not in stacks:
            tensors[name] = entry
            continue
        path, shape = stacks[name]
        size = entry.nbytes // moe.num_experts
        for expert in range(moe.num_experts):
            own, begin = path.replace("{e}", str(expert)), entry.begin + expert * size
            tensors[own] = TensorEntry(
                own, entry.dtype, shape, begin, begin + size, entry.shard, transposed=transposed
            )
    return replace(checkpoint, tensors=tensors)
