"""From a checked checkpoint to a model with packed weights: place, merge, pack, and account for every tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from qwenrt.backends.base import Backend
from qwenrt.config import ModelConfig
from qwenrt.errors import CapacityError, CheckpointError, ConfigError
from qwenrt.loader.checkpoint import Checkpoint, TensorReader, open_checkpoint
from qwenrt.loader.names import NameTable, table_for
from qwenrt.loader.progress import ByteBar
from qwenrt.model.layers import LinearSpec
from qwenrt.ops import packing
from qwenrt.ops.types import CanonicalWeight, Packed

QUANTIZE_BITS = {"int8": 8, "int4": 4}
QUANTIZE_GROUP = 128
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")  # torch's words, CPU and devices
_FLOATS = ("F16", "BF16", "F32", "F64")
_CHECKED_WHOLE = 4 * 2**20  # bytes up to which a tensor is searched for NaN in full
_CHECKED_PART = 2**20  # bytes at its begin, middle and end that are searched in a larger one


class Loadable(Protocol):
    """What load_weights needs of a model: what it wants, and where to put it."""

    linear_specs: dict[str, LinearSpec]
    tensor_specs: dict[str, tuple[int, ...]]

    def set_linear(self, name: str, packed: Packed) -> None: ...

    def set_tensor(self, name: str, tensor: torch.Tensor) -> None: ...


@dataclass(frozen=True)
class LoadReport:
    """What was loaded: tensors and bytes of the checkpoint, names that were known and skipped."""

    num_tensors: int
    nbytes: int
    ignored: tuple[str, ...]


def load_weights(
    model: Loadable,
    source: str | Path | Checkpoint,
    config: ModelConfig,
    backend: Backend,
    dtype: torch.dtype,
    *,
    quantize: str | None = None,
    quantize_head: bool = False,
    progress: bool | None = None,
) -> LoadReport:
    """Fill ``model`` from a checkpoint, each linear packed by ``backend`` as soon as its parts are read.

    ``quantize`` "int8" or "int4" rounds dense linears at load; lm_head only with ``quantize_head``. On the CPU a
    dense tensor that already has ``dtype`` and needs no merge stays a view of the file. ``progress`` None shows a
    bar on a terminal only. Before any data is read every tensor is accounted for: one CheckpointError lists what is
    missing, unexpected, incomplete or mis-shaped. ConfigError: ``quantize`` makes no sense. CapacityError: memory
    ran out. Values are searched for NaN and infinity in full in small tensors, in samples of large ones.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    bits = quantize_bits(quantize, config)
    table = table_for(config.model_type)
    inventory = take_inventory(checkpoint, model, config, table)
    inventory.raise_problems(checkpoint)
    loader = _Loader(TensorReader(checkpoint), config, backend, dtype, bits, quantize_head)
    try:
        with ByteBar("loading weights", checkpoint.nbytes, progress) as bar:
            for name in model.tensor_specs:
                model.set_tensor(name, loader.tensor(inventory.slots[name]["", "weight"]))
                bar.add(loader.take_bytes())
            for name, spec in model.linear_specs.items():
                model.set_linear(name, loader.linear(spec, inventory.slots[name]))
                bar.add(loader.take_bytes())
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in _NO_MEMORY):
            raise
        raise _out_of_memory(checkpoint, error) from error
    return LoadReport(len(checkpoint.tensors), checkpoint.nbytes, tuple(inventory.ignored))


def quantize_bits(quantize: str | None, config: ModelConfig) -> int | None:
    """Bits that dense weights are rounded to at load, or None. Raises ConfigError when that makes no sense."""
    if quantize is None:
        return None
    if quantize not in QUANTIZE_BITS:
        raise ConfigError(f"quantize={quantize!r}", "not a known way", 'Use None, "int8" or "int4".')
    bits = QUANTIZE_BITS[quantize]
    if config.quant is None:
        return bits
    if config.quant.bits == bits:
        return None
    raise ConfigError(
        f"quantize={quantize!r}",
        f"the checkpoint is already quantised to {config.quant.bits} bits",
        "Load it without quantize, or load the model's dense release.",
    )


def _out_of_memory(checkpoint: Checkpoint, error: BaseException) -> CapacityError:
    return CapacityError(
        f"loading {checkpoint.nbytes / 2**30:.1f} GiB of weights",
        f"memory ran out ({str(error).splitlines()[0][:160] if str(error) else 'MemoryError'})",
        'Close other programs, load with quantize="int4", or use a smaller model.',
    )


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
            self._shape(name, shape, _FLOATS)

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
        quant, k = self.config.quant, spec.in_features
        packed = {kind: name for kind, name in kinds.items() if kind not in ("weight", "bias")}
        shapes: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {}
        if packed and quant is None:
            self.inventory.unexpected += [
                f"{n} (config.json has no quantization_config)" for n in packed.values()
            ]
            return
        if packed and quant is not None:
            group = k if quant.group_size == -1 else min(quant.group_size, k)
            groups, word = math.ceil(k / group), 32 // quant.bits
            shapes = {
                "qweight": ((math.ceil(k / word), rows), ("I32",)),
                "qzeros": ((groups, math.ceil(rows / word)), ("I32",)),
                "scales": ((groups, rows), ("F16", "BF16", "F32")),
            }
            if "g_idx" in packed:
                shapes["g_idx"] = ((k,), ("I32", "I64"))
        else:
            shapes["weight"] = ((rows, k), _FLOATS)
        if spec.bias or (quant is not None and "bias" in kinds):
            shapes["bias"] = ((rows,), _FLOATS)
        for kind, (shape, dtypes) in shapes.items():
            if kind in kinds:
                self._shape(kinds[kind], shape, dtypes)
            else:
                self.inventory.missing.append(self.table.source(spec.name, part, kind))
        self.inventory.unexpected += [name for kind, name in kinds.items() if kind not in shapes]

    def _shape(self, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
        entry = self.entries[name]
        if entry.shape != shape:
            note = ""
            if shape == (self.config.vocab_size, self.config.hidden_size) and entry.shape[1:] == shape[1:]:
                note = f" (config.json says vocab_size {self.config.vocab_size})"
            self.inventory.misshaped.append(f"{name} {list(entry.shape)}, expected {list(shape)}{note}")
        elif entry.dtype not in dtypes:
            self.inventory.misshaped.append(f"{name} {entry.dtype}, expected {' or '.join(dtypes)}")


class _Loader:
    """Reads, merges and packs; remembers how many bytes were read."""

    def __init__(
        self,
        reader: TensorReader,
        config: ModelConfig,
        backend: Backend,
        dtype: torch.dtype,
        bits: int | None,
        quantize_head: bool,
    ) -> None:
        self.reader, self.config, self.backend, self.dtype = reader, config, backend, dtype
        self.bits, self.quantize_head = bits, quantize_head
        self._bytes = 0

    def take_bytes(self) -> int:
        taken, self._bytes = self._bytes, 0
        return taken

    def _read(self, name: str | None) -> torch.Tensor | None:
        if name is None:
            return None
        tensor = self.reader.tensor(name)
        self._bytes += tensor.nbytes
        if tensor.is_floating_point():
            _check_finite(name, tensor)
        return tensor

    def tensor(self, name: str) -> torch.Tensor:
        """A norm or the embedding, in the model's dtype, on its device."""
        tensor = self._read(name)
        assert tensor is not None
        result = tensor.to(self.backend.device, self.dtype)
        self.reader.release(name)
        return result

    def linear(self, spec: LinearSpec, slots: dict[tuple[str, str], str]) -> Packed:
        parts = parts_of(spec, slots)
        if any(kind == "qweight" for _, kind in slots):
            weights = [self._gptq_or_dense(spec, part, rows, slots) for part, rows in parts]
            merged = packing.merge(weights)
            packed = self._pack(spec, weights if merged is None else [merged])
        else:
            weight = self._dense(spec, parts, slots)
            if self.bits is not None and (
                spec.quantizable or (self.quantize_head and spec.name == "lm_head")
            ):
                assert weight.dense is not None
                weight = packing.quantize_dense(
                    weight.dense, self.bits, QUANTIZE_GROUP, weight.bias, name=spec.name
                )
            packed = self._pack(spec, [weight])
        for name in slots.values():
            self.reader.release(name)
        return packed

    def _pack(self, spec: LinearSpec, weights: list[CanonicalWeight]) -> Packed:
        """One weight as the backend wants it; several that share no form, side by side."""
        packed = [self.backend.pack_linear(weight, self.dtype) for weight in weights]
        if len(packed) == 1:
            return packed[0]
        return Packed("parts", spec.out_features, spec.in_features, {"parts": packed})

    def _dense(
        self, spec: LinearSpec, parts: Sequence[tuple[str, int]], slots: dict[tuple[str, str], str]
    ) -> CanonicalWeight:
        """The whole linear as one matrix: the file's own memory for a single part, else one merge buffer."""
        biases = [self._bias(spec, slots, part) for part, _ in parts]
        if len(parts) == 1:
            return CanonicalWeight(dense=self._read(slots[parts[0][0], "weight"]), bias=biases[0])
        buffer: torch.Tensor | None = None
        row = 0
        for part, rows in parts:
            name = slots[part, "weight"]
            tensor = self._read(name)
            assert tensor is not None
            if buffer is None:
                kept = self.dtype if self.bits is None else tensor.dtype
                buffer = torch.empty(spec.out_features, spec.in_features, dtype=kept)
            buffer[row : row + rows] = tensor
            self.reader.release(name)
            row += rows
        bias: torch.Tensor | None = None
        if any(part is not None for part in biases):
            pairs = zip(biases, parts, strict=True)
            bias = torch.cat(
                [torch.zeros(rows, dtype=self.dtype) if b is None else b for b, (_, rows) in pairs]
            )
        return CanonicalWeight(dense=buffer, bias=bias)

    def _gptq_or_dense(
        self, spec: LinearSpec, part: str, rows: int, slots: dict[tuple[str, str], str]
    ) -> CanonicalWeight:
        if (part, "weight") in slots:
            return CanonicalWeight(
                dense=self._read(slots[part, "weight"]), bias=self._bias(spec, slots, part)
            )
        assert self.config.quant is not None
        qweight, qzeros, scales = (self._read(slots[part, kind]) for kind in ("qweight", "qzeros", "scales"))
        assert qweight is not None and qzeros is not None and scales is not None
        return packing.unpack_gptq(
            qweight,
            qzeros,
            scales,
            self._read(slots.get((part, "g_idx"))),
            self._bias(spec, slots, part),
            quant=self.config.quant,
            in_features=spec.in_features,
            out_features=rows,
            name=f"{spec.name}.{part}" if part else spec.name,
        )

    def _bias(self, spec: LinearSpec, slots: dict[tuple[str, str], str], part: str) -> torch.Tensor | None:
        """The bias of a part; zeros where the network has no bias (AutoGPTQ wrote them everywhere) count as none."""
        bias = self._read(slots.get((part, "bias")))
        return bias if bias is not None and (spec.bias or bool(bias.any())) else None


def _check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raise CheckpointError for NaN or infinity: everywhere in a small tensor, in three samples of a large one."""
    flat = tensor.reshape(-1)
    if tensor.nbytes <= _CHECKED_WHOLE:
        samples = [flat]
    else:
        size = _CHECKED_PART // tensor.itemsize
        starts = (0, (flat.numel() - size) // 2, flat.numel() - size)
        samples = [flat[start : start + size] for start in starts]
    bad = sum(int((~torch.isfinite(sample)).sum()) for sample in samples)
    if bad:
        raise CheckpointError(
            f"tensor {name!r} is damaged",
            f"{bad} of {sum(sample.numel() for sample in samples)} values that were looked at are NaN or infinite",
            "Download the model again; if it was trained here, an earlier step of it may be sound.",
        )
