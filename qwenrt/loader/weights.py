"""From a checked checkpoint to a model with packed weights: place, merge, pack, and account for every tensor."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from qwenrt.backends.base import Backend
from qwenrt.config import ModelConfig
from qwenrt.config.layers import LinearSpec
from qwenrt.errors import CapacityError, CheckpointError, ConfigError
from qwenrt.loader.checkpoint import Checkpoint, TensorReader, open_checkpoint
from qwenrt.loader.inventory import Loadable, parts_of, take_inventory, unstacked
from qwenrt.loader.names import table_for
from qwenrt.loader.packed_cache import PackedCache
from qwenrt.loader.progress import ByteBar
from qwenrt.ops import awq, fp8, packing
from qwenrt.ops.types import CanonicalWeight, Packed

QUANTIZE_BITS = {"int8": 8, "int4": 4}
QUANTIZE_GROUP = 128
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")  # torch's words, CPU and devices
_DTYPE_NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
_CHECKED_WHOLE = 4 * 2**20  # bytes up to which a tensor is searched for NaN in full
_CHECKED_PART = 2**20  # bytes at its begin, middle and end that are searched in a larger one
logger = logging.getLogger("qwenrt")


@dataclass(frozen=True)
class LoadReport:
    """What was loaded: tensors and bytes of the checkpoint, names that were known and skipped; whether packed weights
    of an earlier load were mapped."""

    num_tensors: int
    nbytes: int
    ignored: tuple[str, ...]
    mapped: bool = False


def load_weights(
    model: Loadable,
    source: str | Path | Checkpoint,
    config: ModelConfig,
    backend: Backend,
    dtype: torch.dtype,
    *,
    quantize: str | None = None,
    quantize_head: str | None = None,
    progress: bool | None = None,
    packed_cache: Path | None = None,
) -> LoadReport:
    """Fill ``model`` from a checkpoint, each linear packed by ``backend`` as soon as its parts are read.

    ``quantize`` "int8" or "int4" rounds dense linears at load, ``quantize_head`` likewise lm_head, which is left as
    it is otherwise. On the CPU a dense tensor that already has ``dtype`` and needs no merge stays a view of the
    file. ``progress`` None shows a bar on a terminal only. ``packed_cache``: a directory where packed weights are
    kept, from which the next load maps them. Before any data is read every tensor is accounted for: one
    CheckpointError lists what is missing, unexpected, incomplete or mis-shaped. ConfigError: ``quantize`` makes no
    sense. CapacityError: memory ran out. Values are searched for NaN and infinity in full in small tensors, in
    samples of large ones.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    bits = quantize_bits(quantize, config)
    table = table_for(config.model_type)
    checkpoint = unstacked(checkpoint, config, table)
    inventory = take_inventory(checkpoint, model, config, table)
    inventory.raise_problems(checkpoint)
    report = LoadReport(len(checkpoint.tensors), checkpoint.nbytes, tuple(inventory.ignored))
    cache: PackedCache | None = None
    if packed_cache is not None:
        way = {"layers": quantize, "head": quantize_head}
        cache = PackedCache.of(packed_cache, checkpoint, config, backend, dtype, way)
        if cache.fill(model, checkpoint, backend):
            return dataclasses.replace(report, mapped=True)
    head_bits = QUANTIZE_BITS.get(quantize_head or "")
    loader = _Loader(TensorReader(checkpoint), config, backend, dtype, bits, head_bits)
    if config.quant is not None and config.quant.method == "fp8":
        served = f"int{bits}" if bits else _DTYPE_NAMES[loader.kept(torch.bfloat16)]
        logger.info("FP8 weights are turned into %s at load: no FP8 kernel serves here", served)
    try:
        with ByteBar("loading weights", checkpoint.nbytes, progress) as bar:
            for name in model.tensor_specs:
                model.set_tensor(name, loader.tensor(name, inventory.slots[name]["", "weight"]))
                bar.add(loader.take_bytes())
            for name, spec in model.linear_specs.items():
                tied = model.get("embed_tokens") if name == "lm_head" and config.tie_word_embeddings else None
                model.set_linear(name, loader.linear(spec, inventory.slots[name], tied))
                bar.add(loader.take_bytes())
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in _NO_MEMORY):
            raise
        raise _out_of_memory(checkpoint, error) from error
    if cache is not None:
        cache.keep(model, loader.reader)
    return report


def quantize_bits(quantize: str | None, config: ModelConfig) -> int | None:
    """Bits that dense weights are rounded to at load, or None. Raises ConfigError when that makes no sense."""
    if quantize is None:
        return None
    if quantize not in QUANTIZE_BITS:
        raise ConfigError(f"quantize={quantize!r}", "not a known way", 'Use None, "int8" or "int4".')
    bits = QUANTIZE_BITS[quantize]
    if config.quant is None or not config.quant.has_codes:
        return bits
    if config.quant.bits == bits:
        return None
    raise ConfigError(
        f"quantize={quantize!r}",
        f"the checkpoint is already quantised to {config.quant.bits} bits",
        "Load it without quantize, or load the model's dense release.",
    )


def bits_of(spec: LinearSpec, bits: int | None, head_bits: int | None) -> int | None:
    """Bits that one dense linear is rounded to: those of the layers, or of lm_head; None where it is left as it is."""
    return bits if spec.quantizable else head_bits if spec.name == "lm_head" else None


def _out_of_memory(checkpoint: Checkpoint, error: BaseException) -> CapacityError:
    return CapacityError(
        f"loading {checkpoint.nbytes / 2**30:.1f} GiB of weights",
        f"memory ran out ({str(error).splitlines()[0][:160] if str(error) else 'MemoryError'})",
        'Close other programs, load with quantize="int4", or use a smaller model.',
    )


class _Loader:
    """Reads, merges and packs; remembers how many bytes were read."""

    def __init__(
        self,
        reader: TensorReader,
        config: ModelConfig,
        backend: Backend,
        dtype: torch.dtype,
        bits: int | None,
        head_bits: int | None,
    ) -> None:
        self.reader, self.config, self.backend, self.dtype = reader, config, backend, dtype
        self.bits, self.head_bits = bits, head_bits
        self._bytes = 0

    def take_bytes(self) -> int:
        taken, self._bytes = self._bytes, 0
        return taken

    def _read(self, name: str | None) -> torch.Tensor | None:
        if name is None:
            return None
        tensor = self.reader.tensor(name)
        self._bytes += tensor.nbytes
        if (
            tensor.is_floating_point() and tensor.dtype != torch.float8_e4m3fn
        ):  # fp8 is checked as it is converted
            _check_finite(name, tensor)
        return tensor

    def kept(self, stored: torch.dtype) -> torch.dtype:
        """What dense weights of a dtype are kept in beside the model's activations."""
        return self.backend.weight_dtype(_DTYPE_NAMES.get(stored), self.dtype)

    def tensor(self, param: str, name: str) -> torch.Tensor:
        """A norm, a router or the embedding on the model's device; the embedding, of which only rows are read, as
        dense weights are kept."""
        tensor = self._read(name)
        assert tensor is not None
        dtype = self.kept(tensor.dtype) if param == "embed_tokens" else self.dtype
        result = tensor.to(self.backend.device, dtype)
        self.reader.release(name)
        return result

    def linear(
        self, spec: LinearSpec, slots: dict[tuple[str, str], str], tied: Packed | torch.Tensor | None = None
    ) -> Packed:
        """One packed linear from its slots, or from the embedding it is ``tied`` to."""
        parts = parts_of(spec, slots)
        fp8_to_codes = self.bits == 8 and self._is_fp8(slots)
        if fp8_to_codes or any(kind == "qweight" for _, kind in slots):
            weights = [self._coded_or_dense(spec, part, rows, slots) for part, rows in parts]
            merged = packing.merge(weights)
            packed = self._pack(spec, weights if merged is None else [merged])
        else:
            tensor = tied if isinstance(tied, torch.Tensor) else None
            weight = (
                self._dense(spec, parts, slots)
                if tensor is None
                else CanonicalWeight(dense=tensor, shared=True)
            )
            bits = bits_of(spec, self.bits, self.head_bits)
            if bits is not None:
                assert weight.dense is not None
                weight = self.backend.quantize_dense(
                    weight.dense, bits, QUANTIZE_GROUP, weight.bias, spec.name
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
            return CanonicalWeight(dense=self._matrix(spec, slots, parts[0][0]), bias=biases[0])
        buffer: torch.Tensor | None = None
        row = 0
        for part, rows in parts:
            tensor = self._matrix(spec, slots, part)
            if buffer is None:
                kept = self.kept(tensor.dtype) if self.bits is None else tensor.dtype
                buffer = torch.empty(spec.out_features, spec.in_features, dtype=kept)
            buffer[row : row + rows] = tensor
            self.reader.release(slots[part, "weight"])
            row += rows
        bias: torch.Tensor | None = None
        if any(part is not None for part in biases):
            pairs = zip(biases, parts, strict=True)
            bias = torch.cat(
                [torch.zeros(rows, dtype=self.dtype) if b is None else b for b, (_, rows) in pairs]
            )
        return CanonicalWeight(dense=buffer, bias=bias)

    def _is_fp8(self, slots: dict[tuple[str, str], str]) -> bool:
        return any(kind.startswith("weight_scale") for _, kind in slots)

    def _matrix(self, spec: LinearSpec, slots: dict[tuple[str, str], str], part: str) -> torch.Tensor:
        """A part's dense matrix: as it is in the file, or FP8 values times their scales."""
        name = slots[part, "weight"]
        weight = self._read(name)
        assert weight is not None
        if weight.dtype != torch.float8_e4m3fn:
            return weight
        dtype = self.kept(torch.bfloat16) if self.bits is None else torch.float32
        scale, block = self._fp8_scale(slots, part)
        if block is None:
            return fp8.dequantize_fp8_channel(weight, scale, dtype, name=name)
        return fp8.dequantize_fp8_block(weight, scale, block, dtype, name=name)

    def _fp8_scale(
        self, slots: dict[tuple[str, str], str], part: str
    ) -> tuple[torch.Tensor, tuple[int, int] | None]:
        assert self.config.quant is not None
        block = self.config.quant.block
        scale = self._read(slots[part, "weight_scale" if block is None else "weight_scale_inv"])
        assert scale is not None
        return scale, block

    def _coded_or_dense(
        self, spec: LinearSpec, part: str, rows: int, slots: dict[tuple[str, str], str]
    ) -> CanonicalWeight:
        """A part in the integer codes of GPTQ or AWQ, one of FP8 rounded to such, or one that was left dense."""
        bias = self._bias(spec, slots, part)
        name = f"{spec.name}.{part}" if part else spec.name
        if (part, "weight") in slots:
            weight = self._read(slots[part, "weight"])
            assert weight is not None
            if weight.dtype == torch.float8_e4m3fn:
                return fp8.fp8_to_int8(weight, *self._fp8_scale(slots, part), bias, name=name)
            return CanonicalWeight(dense=weight, bias=bias)
        assert self.config.quant is not None
        qweight, qzeros, scales = (self._read(slots[part, kind]) for kind in ("qweight", "qzeros", "scales"))
        assert qweight is not None and qzeros is not None and scales is not None
        shape = {"in_features": spec.in_features, "out_features": rows}
        if self.config.quant.method == "awq":
            group = self.config.quant.group_size
            return awq.unpack_awq(qweight, qzeros, scales, bias, group_size=group, name=name, **shape)
        g_idx = self._read(slots.get((part, "g_idx")))
        return packing.unpack_gptq(
            qweight,
            qzeros,
            scales,
            g_idx,
            bias,
            quant=self.config.quant,
            name=name,
            keep_words=self.backend.packs_words(),
            **shape,
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
