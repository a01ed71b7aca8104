"""Which tensors a checkpoint holds, and which a model needs: every tensor is accounted for before any of it is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from qwenrt.config import ModelConfig
from qwenrt.config.layers import LinearSpec, num_parameters
from qwenrt.errors import CheckpointError
from qwenrt.loader.checkpoint.checkpoint import Checkpoint
from qwenrt.loader.checkpoint.formats import CODE_BITS, FLOATS, StoredLinear, WeightFormat, format_of
from qwenrt.loader.checkpoint.header import TensorEntry
from qwenrt.loader.checkpoint.names import NameTable
from qwenrt.ops.ggml_types import CODED
from qwenrt.ops.types import Packed

_REMEDY = (
    "Compare config.json and the files with the model's page. If they are one revision, complete, and as their author "
    "wrote them, this version does not support them."
)


class Loadable(Protocol):
    """What load_weights needs of a model: which weights it wants, and how they are set."""

    linear_specs: dict[str, LinearSpec]
    tensor_specs: dict[str, tuple[int, ...]]

    def set_linear(self, name: str, packed: Packed) -> None: ...

    def set_tensor(self, name: str, tensor: torch.Tensor) -> None: ...

    def get(self, name: str) -> Packed | torch.Tensor: ...


@dataclass
class Inventory:
    """Which checkpoint tensor fills which parameter, and everything that is wrong.

    ``slots``: parameter -> (part, kind) -> checkpoint name. ``formats``: (parameter, part) -> the linear in the file
    and the format it has there.
    """

    slots: dict[str, dict[tuple[str, str], str]] = field(default_factory=dict)
    formats: dict[tuple[str, str], tuple[StoredLinear, WeightFormat]] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    incomplete: list[str] = field(default_factory=list)
    misshaped: list[str] = field(default_factory=list)
    unsupported: list[str] = field(default_factory=list)

    def raise_problems(self, checkpoint: Checkpoint) -> None:
        """Raise one CheckpointError that lists all problems, if there are any."""
        found = [
            f"{len(names)} {what}: {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}"
            for what, names in (
                ("missing", self.missing),
                ("unexpected", self.unexpected),
                ("incomplete", self.incomplete),
                ("of the wrong shape or dtype", self.misshaped),
                ("in a format that is not supported", self.unsupported),
            )
            if names
        ]
        if found:
            raise CheckpointError(
                f"the {len(checkpoint.tensors)} tensors in {checkpoint.directory} are not the model that "
                "config.json describes",
                "; ".join(found),
                _REMEDY,
            )


def check_size(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Refuse files that are far too small for the model of config.json, before anything of its size is allocated.

    At least half of what its parameters take in codes of the fewest bits that are read, whatever config.json says of
    their format, which the headers tell; a head may be missing.
    """
    parameters = num_parameters(config) - config.vocab_size * config.hidden_size
    least = parameters * min(CODE_BITS) // 16
    if least > checkpoint.nbytes:
        raise CheckpointError(
            f"the {len(checkpoint.tensors)} tensors in {checkpoint.directory} are not the model that "
            "config.json describes",
            f"{parameters} parameters cannot be in {checkpoint.nbytes} bytes of tensors",
            "Check that config.json and the weights come from the same repository and revision.",
        )


def take_inventory(
    checkpoint: Checkpoint, model: Loadable, config: ModelConfig, table: NameTable
) -> Inventory:
    """Compare the checkpoint's headers with the weights that the model needs. Reads no data."""
    inventory = Inventory()
    wanted = model.linear_specs.keys() | model.tensor_specs.keys()
    for name in checkpoint.tensors:
        slot = table.locate(name)
        if slot is None or (not slot.ignored and slot.param not in wanted):
            inventory.unexpected.append(name)
        elif slot.ignored:
            inventory.ignored.append(name)
        else:
            slots = inventory.slots.setdefault(slot.param, {})
            if (slot.part, slot.kind) in slots:
                inventory.unexpected.append(f"{name} (the same as {slots[slot.part, slot.kind]})")
            slots[slot.part, slot.kind] = name
    if config.tie_word_embeddings:
        _tie_embeddings(inventory)
    check = _TensorCheck(checkpoint, config, table, inventory)
    for param, shape in model.tensor_specs.items():
        check.tensor(param, shape)
    for spec in model.linear_specs.values():
        check.linear(spec)
    return inventory


def parts_of(spec: LinearSpec, slots: dict[tuple[str, str], str]) -> Sequence[tuple[str, int]]:
    """The parts a checkpoint stores a linear in: one block for all of it, or the spec's own parts."""
    whole = len(spec.parts) == 1 or any(part == "" for part, _ in slots)
    return (("", spec.out_features),) if whole else spec.parts


class _TensorCheck:
    """Checks the tensors of one parameter after the other; problems go into the inventory."""

    def __init__(
        self, checkpoint: Checkpoint, config: ModelConfig, table: NameTable, inventory: Inventory
    ) -> None:
        self.entries, self.config, self.table, self.inventory = checkpoint.tensors, config, table, inventory

    def tensor(self, param: str, shape: tuple[int, ...]) -> None:
        slots = self.inventory.slots.get(param, {})
        if len(shape) == 2 and param != "embed_tokens":  # routers and gates may be in any format of a linear
            self._part(param, "", shape, {kind: name for (_, kind), name in slots.items()}, bias=False)
        elif ("", "weight") not in slots:
            self.inventory.missing.append(self.table.source(param))
        else:
            coded = tuple(CODED) if param == "embed_tokens" else ()
            self._shape(slots["", "weight"], (shape,), (*FLOATS, *coded))

    def linear(self, spec: LinearSpec) -> None:
        slots = self.inventory.slots.get(spec.name, {})
        parts = parts_of(spec, slots or {(part, ""): "" for part in self.table.parts(spec.name)})
        present = [part for part, _ in parts if any(p == part for p, _ in slots)]
        if present and len(present) < len(parts):
            absent = ", ".join(self.table.source(spec.name, p) for p, _ in parts if p not in present)
            self.inventory.incomplete.append(f"{spec.name} lacks {absent}")
            return
        read = {part for part, _ in parts}
        self.inventory.unexpected += [name for (part, _), name in slots.items() if part not in read]
        for part, rows in parts:
            kinds = {kind: name for (p, kind), name in slots.items() if p == part}
            self._part(spec.name, part, (rows, spec.in_features), kinds, bias=spec.bias)

    def _part(
        self, param: str, part: str, shape: tuple[int, int], kinds: dict[str, str], *, bias: bool
    ) -> None:
        linear = self._stored(param, part, shape, kinds)
        found = format_of(linear, self.config.quant)
        if isinstance(found, str):
            first = next(iter(linear.tensors))
            self.inventory.unsupported.append(f"{kinds[first].removesuffix(f'.{first}')} ({found})")
            return
        self.inventory.formats[param, part] = linear, found
        expected = found.expected(linear)
        if bias or (self.config.quant is not None and "bias" in kinds):
            expected["bias"] = ((shape[:1],), FLOATS)
        for kind, (shapes, dtypes) in expected.items():
            if kind in kinds:
                self._shape(kinds[kind], shapes, dtypes)
            else:
                self.inventory.missing.append(self.table.source(param, part, kind))
        self.inventory.unexpected += [name for kind, name in kinds.items() if kind not in expected]

    def _stored(self, param: str, part: str, shape: tuple[int, int], kinds: dict[str, str]) -> StoredLinear:
        name = f"{param}.{part}" if part and part != param else param
        return StoredLinear(name, *shape, {k: self.entries[n] for k, n in kinds.items() if k != "bias"})

    def _shape(self, name: str, shapes: Sequence[tuple[int, ...]], dtypes: tuple[str, ...]) -> None:
        entry, shape = self.entries[name], shapes[0]
        if entry.shape not in shapes:
            note = ""
            if shape == (self.config.vocab_size, self.config.hidden_size) and entry.shape[1:] == shape[1:]:
                note = f" (config.json says vocab_size {self.config.vocab_size})"
            self.inventory.misshaped.append(f"{name} {list(entry.shape)}, expected {list(shape)}{note}")
        elif entry.dtype not in dtypes:
            self.inventory.misshaped.append(
                f"{name} {entry.dtype}, expected {' or '.join(dtypes[: len(FLOATS)])}"
            )


def _tie_embeddings(inventory: Inventory) -> None:
    """Embedding and head are one matrix, under whichever of the two names the file has it."""
    slots = inventory.slots
    if "embed_tokens" not in slots and "lm_head" in slots:
        slots["embed_tokens"] = slots["lm_head"]
    elif "embed_tokens" in slots:
        inventory.ignored += slots.get("lm_head", {}).values()
        slots["lm_head"] = slots["embed_tokens"]


def split_experts(checkpoint: Checkpoint, config: ModelConfig, table: NameTable) -> Checkpoint:
    """The same files with every tensor that holds a linear of all experts seen as one matrix for each expert.

    Some writers keep [experts, in, out], others [experts, out, in]: a shape that fits only one decides. What fits
    neither is kept as it is, and found to be unexpected.
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
