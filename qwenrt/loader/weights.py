"""From a checked checkpoint to a model with packed weights: every tensor is accounted for, read, merged and packed."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from qwenrt.backends.base import Backend
from qwenrt.config import ModelConfig
from qwenrt.config.layers import LinearSpec, file_rows, is_wide, is_zero_centred
from qwenrt.config.model import DTYPE_BYTES
from qwenrt.config.quant import ROUNDED, rounded_group, rounding_description
from qwenrt.errors import CapacityError, CheckpointError, memory_ran_out
from qwenrt.loader.checkpoint.checkpoint import TORCH_DTYPES, Checkpoint, TensorReader, open_checkpoint
from qwenrt.loader.checkpoint.formats import Fp8, ReadOptions
from qwenrt.loader.checkpoint.inventory import Inventory, Loadable, parts_of, split_experts, take_inventory
from qwenrt.loader.checkpoint.names import table_for
from qwenrt.loader.memory.footprint import codes_of
from qwenrt.loader.packed_cache.cache import PackedCache
from qwenrt.loader.progress import ByteBar
from qwenrt.ops import ggml
from qwenrt.ops.ggml_types import CODED
from qwenrt.ops.types import CanonicalWeight, Packed
from qwenrt.ops.weights import dequantize, merge, take_rows

QUANTIZE_BITS = {name: form.bits for name, form in ROUNDED.items()}
_DTYPE_NAMES: dict[torch.dtype, str] = {getattr(torch, name): name for name in DTYPE_BYTES}
_FLOAT16_OVERFLOW = 65520.0  # from here on values become infinite in float16
CODES_BECOME = (
    "float16"  # GGUF's codes, where they are made dense: finer than bfloat16, and weights are small
)
_SCANNED_WHOLE = 4 * 2**20  # bytes up to which a tensor is searched for NaN in full
_SCANNED_PART = 2**20  # bytes at the beginning, middle and end of a larger one that are searched
logger = logging.getLogger("qwenrt")


@dataclass(frozen=True)
class LoadReport:
    """What was loaded: bytes of the checkpoint, names of tensors that are known and not needed; whether packed weights
    of an earlier load were mapped."""

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

    ``quantize`` "int8" or "int4" rounds dense linears at load, ``quantize_head`` likewise lm_head, which is left as it
    is otherwise. On the CPU a dense tensor that already has ``dtype`` and needs no merge stays a view of the file.
    ``progress`` None shows a bar on a terminal only. ``packed_cache``: a directory where packed weights are kept, from
    which the next load maps them. Before any data is read every tensor is accounted for: one CheckpointError lists
    what is missing, unexpected, incomplete or mis-shaped. ConfigError: ``quantize`` contradicts the checkpoint.
    CapacityError: memory ran out. ``config`` is what as_stored() made of it. Values are searched for NaN and infinity
    in full in small tensors, in samples of large ones.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    bits = quantize_bits(quantize, config)
    table = table_for(config.model_type, config.with_mtp)
    checkpoint = split_experts(checkpoint, config, table)
    inventory = take_inventory(checkpoint, model, config, table)
    inventory.raise_problems(checkpoint)
    report = LoadReport(checkpoint.nbytes, tuple(inventory.ignored))
    cache: PackedCache | None = None
    if packed_cache is not None:
        settings = {"layers": rounding_description(quantize), "head": rounding_description(quantize_head)}
        if config.with_mtp:
            settings["mtp"] = settings["layers"]
        cache = PackedCache.of(packed_cache, checkpoint, config, backend, dtype, settings)
        if cache.load_into(model, checkpoint, backend):
            return dataclasses.replace(report, mapped=True)
    head_bits = QUANTIZE_BITS.get(quantize_head or "") if config.has_head else None
    loader = WeightReader(TensorReader(checkpoint), inventory, config, backend, dtype, bits, head_bits)
    if config.quant is not None and config.quant.method == "fp8":
        served = f"int{bits}" if bits else _DTYPE_NAMES[loader.weight_dtype(torch.bfloat16)]
        logger.info("FP8 weights are turned into %s at load: no FP8 kernel serves here", served)
    try:
        with ByteBar("loading weights", checkpoint.nbytes, progress) as bar:
            for name in model.tensor_specs:
                model.set_tensor(name, loader.tensor(name))
                bar.add(loader.take_bytes())
            for name, spec in model.linear_specs.items():
                tied = model.get("embed_tokens") if name == "lm_head" and config.tie_word_embeddings else None
                model.set_linear(name, loader.linear(spec, tied))
                bar.add(loader.take_bytes())
    except (MemoryError, OSError, RuntimeError) as error:
        if not memory_ran_out(error):
            raise
        raise _out_of_memory(checkpoint, error) from error
    if cache is not None:
        cache.save(model, loader.reader)
    return report


def open_weights(
    model: Loadable,
    checkpoint: Checkpoint,
    config: ModelConfig,
    backend: Backend,
    dtype: torch.dtype,
    quantize: str | None = None,
) -> WeightReader:
    """The weights of a checkpoint one by one, for who cannot have all at once. Before any is read every tensor is
    accounted for, as in load_weights."""
    table = table_for(config.model_type)
    checkpoint = split_experts(checkpoint, config, table)
    inventory = take_inventory(checkpoint, model, config, table)
    inventory.raise_problems(checkpoint)
    bits = quantize_bits(quantize, config)
    return WeightReader(TensorReader(checkpoint), inventory, config, backend, dtype, bits)


def quantize_bits(quantize: str | None, config: ModelConfig) -> int | None:
    """Bits that dense weights are rounded to at load, or None. Raises ConfigError where the checkpoint is quantised to
    others."""
    codes = codes_of(config, quantize)
    return None if codes is None or quantize is None or codes is config.quant else codes.bits


def bits_of(spec: LinearSpec, bits: int | None, head_bits: int | None) -> int | None:
    """Bits that one dense linear is rounded to: those of the layers, or of lm_head; None where it is left as it is."""
    return bits if spec.quantizable else head_bits if spec.name == "lm_head" else None


def _out_of_memory(checkpoint: Checkpoint, error: BaseException) -> CapacityError:
    return CapacityError(
        f"loading {checkpoint.nbytes / 2**30:.1f} GiB of weights",
        f"memory ran out ({str(error).splitlines()[0][:160] if str(error) else 'MemoryError'})",
        'Close other programs, load with quantize="int4", or use a smaller model.',
    )


class WeightReader:
    """One weight after the other, read, merged and packed; remembers how many bytes were read. ``bits`` and
    ``head_bits``: what dense linears and lm_head are rounded to, None where they are left as they are."""

    def __init__(
        self,
        reader: TensorReader,
        inventory: Inventory,
        config: ModelConfig,
        backend: Backend,
        dtype: torch.dtype,
        bits: int | None = None,
        head_bits: int | None = None,
    ) -> None:
        self.reader, self.inventory, self.config = reader, inventory, config
        self.backend, self.dtype = backend, dtype
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
        if tensor.is_floating_point() and tensor.dtype != torch.float8_e4m3fn:  # checked as it is converted
            _check_finite(name, tensor)
        return tensor

    def weight_dtype(self, stored: torch.dtype) -> torch.dtype:
        """The dtype in which dense weights of the dtype ``stored`` are kept."""
        return self.backend.weight_dtype(_DTYPE_NAMES.get(stored), self.dtype)

    def tensor(self, param: str) -> torch.Tensor:
        """A norm, a router or the embedding on the model's device; the embedding, of which only rows are read, as
        dense weights are kept, GGUF's codes in 16 bits."""
        slots = self.inventory.slots[param]
        if (param, "") in self.inventory.formats:  # a router or a gate, in whatever format the file has it
            weight = self._canonical(param, "", ReadOptions(keep_words=False, fp8_dtype=torch.float32))
            tensor = dequantize(weight, None if weight.dense is not None else torch.float32)
            if weight.bias is not None:
                remedy = "No Qwen has one there: this version does not support such a model."
                raise CheckpointError(f"reading {param}", f"it has a bias, {slots['', 'bias']}", remedy)
        else:
            read = self._read(slots["", "weight"])
            assert read is not None
            kind = self.reader.dtype(slots["", "weight"])
            tensor = (
                read if kind not in CODED else ggml.dequantize(kind, read, self._dtype_of_codes(), name=param)
            )
        dtype = self.weight_dtype(tensor.dtype) if param == "embed_tokens" else self.dtype
        if is_wide(self.config, param):
            dtype = torch.float32
            tensor = self._as_computed(param, tensor.float())
        _check_range(param, tensor, dtype)
        result = tensor.to(self.backend.device, dtype)
        self._release(slots)
        return result

    def _as_computed(self, param: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor that stays float32, as the network wants it."""
        delta = self.config.linear_attention
        if delta is None or not delta.converted:
            return tensor + 1 if is_zero_centred(self.config, param) else tensor
        if not param.endswith(".log_decay"):
            return tensor
        largest = float(tensor.max())
        if largest > 0:
            found = f"a decay, which is -exp of what was trained, is {largest:.3g}"
            raise CheckpointError(f"reading {param}", found, "Fetch another file of the model.")
        return (-tensor).log()

    def linear(self, spec: LinearSpec, tied: Packed | torch.Tensor | None = None) -> Packed:
        """One packed linear from its parts, each in its own format, or from the embedding it is ``tied`` to."""
        slots = self.inventory.slots[spec.name]
        parts = parts_of(spec, slots)
        bits = bits_of(spec, self.bits, self.head_bits)
        if isinstance(tied, torch.Tensor) and not self._becomes_codes(spec, parts[0][0]):
            packed = self._pack(spec, [self._rounded(spec, CanonicalWeight(dense=tied, shared=True), bits)])
        elif any(self._becomes_codes(spec, part) for part, _ in parts):
            options = ReadOptions(self.backend.packs_words(), None if self.bits == 8 else self._fp8_dtype())
            weights = [self._canonical(spec.name, part, options, spec.bias) for part, _ in parts]
            weights = [w if w.dense is None else self._rounded(spec, w, bits) for w in weights]
            merged = merge(weights)
            packed = self._pack(spec, weights if merged is None else [merged])
        else:
            packed = self._pack(spec, [self._rounded(spec, self._dense(spec, parts), bits)])
        self._release(slots)
        return packed

    def _release(self, slots: dict[tuple[str, str], str]) -> None:
        for name in slots.values():
            self.reader.release(name)

    def _rounded(self, spec: LinearSpec, weight: CanonicalWeight, bits: int | None) -> CanonicalWeight:
        """A dense weight as it is, or rounded to ``bits``."""
        if bits is None:
            return weight
        assert weight.dense is not None
        return self.backend.quantize_dense(weight.dense, bits, rounded_group(bits), weight.bias, spec.name)

    def _pack(self, spec: LinearSpec, weights: list[CanonicalWeight]) -> Packed:
        """One weight as the backend wants it; several that cannot be merged, side by side."""
        for weight in weights:
            if weight.dense is not None:
                _check_range(spec.name, weight.dense, self.weight_dtype(weight.dense.dtype))
            if weight.bias is not None:
                _check_range(f"{spec.name}.bias", weight.bias, self.dtype)
        packed = [self.backend.pack_linear(weight, self.dtype) for weight in weights]
        if len(packed) == 1:
            return packed[0]
        return Packed("parts", spec.out_features, spec.in_features, {"parts": packed})

    def _dense(self, spec: LinearSpec, parts: Sequence[tuple[str, int]]) -> CanonicalWeight:
        """The whole linear as one matrix: a view of the file for a single part, else one merge buffer."""
        options = ReadOptions(keep_words=False, fp8_dtype=self._fp8_dtype())
        if len(parts) == 1:
            return self._canonical(spec.name, parts[0][0], options, spec.bias)
        dtype = self._merged_dtype(spec, parts)
        buffer = torch.empty(spec.out_features, spec.in_features, dtype=dtype)
        biases: list[torch.Tensor | None] = []
        row = 0
        for part, rows in parts:
            weight = self._canonical(spec.name, part, options, spec.bias)
            assert weight.dense is not None
            _check_range(spec.name, weight.dense, dtype)
            buffer[row : row + rows] = weight.dense
            biases.append(weight.bias)
            self.reader.release(self.inventory.slots[spec.name][part, "weight"])
            row += rows
        bias: torch.Tensor | None = None
        if any(part is not None for part in biases):
            pairs = zip(biases, parts, strict=True)
            bias = torch.cat(
                [torch.zeros(rows, dtype=self.dtype) if b is None else b for b, (_, rows) in pairs]
            )
        return CanonicalWeight(dense=buffer, bias=bias)

    def _merged_dtype(self, spec: LinearSpec, parts: Sequence[tuple[str, int]]) -> torch.dtype:
        """The dtype that holds every part: a float32 part beside bfloat16 ones is not rounded."""
        found: torch.dtype | None = None
        for part, _ in parts:
            linear, format_ = self.inventory.formats[spec.name, part]
            stored = getattr(torch, TORCH_DTYPES[linear.tensors["weight"].dtype])
            own = self._fp8_dtype() if isinstance(format_, Fp8) else stored
            own = own if self.bits is not None else self.weight_dtype(own)
            found = own if found is None else torch.promote_types(found, own)
        assert found is not None
        return found

    def _dtype_of_codes(self) -> torch.dtype:
        """The dtype of an embedding that is codes in the file."""
        return self.weight_dtype(getattr(torch, CODES_BECOME))

    def _fp8_dtype(self) -> torch.dtype:
        """The dtype that FP8 values become: that of dense weights, or float32 where they are rounded to codes next."""
        return self.weight_dtype(torch.bfloat16) if self.bits is None else torch.float32

    def _becomes_codes(self, spec: LinearSpec, part: str) -> bool:
        _, format_ = self.inventory.formats[spec.name, part]
        return format_.bits < 16 or (isinstance(format_, Fp8) and self.bits == 8)

    def _canonical(self, param: str, part: str, options: ReadOptions, bias: bool = False) -> CanonicalWeight:
        """One part in its own format. Its bias; zeros where the network has none (AutoGPTQ wrote them everywhere)
        count as none."""
        slots = self.inventory.slots[param]
        linear, format_ = self.inventory.formats[param, part]
        given = self._read(slots.get((part, "bias")))
        kept = given if given is not None and (bias or bool(given.any())) else None
        weight = format_.read(linear, lambda kind: self._read(slots.get((part, kind))), kept, options)
        rows = file_rows(self.config, param, part)
        return weight if rows is None else take_rows(weight, rows)


def _check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raise CheckpointError for NaN or infinity: everywhere in a small tensor, in three samples of a large one."""
    flat = tensor.reshape(-1)
    if tensor.nbytes <= _SCANNED_WHOLE:
        samples = [flat]
    else:
        size = _SCANNED_PART // tensor.itemsize
        starts = (0, (flat.numel() - size) // 2, flat.numel() - size)
        samples = [flat[start : start + size] for start in starts]
    if not all(map(all_finite, samples)):
        bad = sum(int((~torch.isfinite(sample)).sum()) for sample in samples)
        raise CheckpointError(
            f"tensor {name!r} is damaged",
            f"{bad} of {sum(sample.numel() for sample in samples)} values that were scanned are NaN or infinite",
            "Compare its sha256 with the model page's: where they agree, training or conversion broke it; use an "
            "earlier step or another release.",
        )


def all_finite(values: torch.Tensor) -> bool:
    """In a twentieth of the time that looking at each value takes: the least and the largest are NaN where any is."""
    if values.itemsize == 1 or not values.numel():  # there is no such thing for the 8-bit ones
        return bool(values.isfinite().all())
    return all(bool(end.isfinite()) for end in torch.aminmax(values))


def _check_range(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    """Raise CheckpointError where float16 would make infinities of a tensor's values."""
    if dtype != torch.float16 or tensor.dtype == torch.float16:
        return
    parts = (tensor[start : start + 4096] for start in range(0, len(tensor), 4096))
    largest = max((float(part.abs().max()) for part in parts if part.numel()), default=0.0)
    if largest >= _FLOAT16_OVERFLOW:
        raise CheckpointError(
            f"loading {name!r} in float16",
            f"it has values of up to {largest:.3g}, and float16 ends at {torch.finfo(dtype).max:g}",
            'Load the model with dtype="bfloat16" or "float32".',
        )
