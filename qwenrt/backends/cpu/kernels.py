"""The compiled kernels of csrc/, called through ctypes; layouts of quantised weights are made here too."""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import itertools
import math
from pathlib import Path

import torch

from qwenrt.backends.cpu import linear
from qwenrt.backends.cpu.activations import Activations
from qwenrt.backends.cpu.attention import Cache, Sequences
from qwenrt.backends.cpu.decoder import DeltaLayer, ExpertsStruct, HeadStruct, Layer, StepStruct
from qwenrt.backends.cpu.delta_net import DeltaNet
from qwenrt.backends.cpu.dense12 import Dense12
from qwenrt.backends.cpu.elementwise import Rotary
from qwenrt.backends.cpu.huge_pages import huge_buffer
from qwenrt.backends.cpu.library import LIBRARY, KernelsUnavailable, check, finite, load, served
from qwenrt.backends.cpu.lora import Lora
from qwenrt.backends.cpu.rounding import Rounding
from qwenrt.ops.quantization import zeros_in_scales
from qwenrt.ops.types import CanonicalWeight, Packed
from qwenrt.ops.weights import with_codes

BLOCK = 8  # output rows stored together
ZEROS_IN_SCALES = -1  # in place of a zero that all groups share: see csrc/abi/qwenrt_cpu.h


class _QuantMatrix(ctypes.Structure):
    """QwenrtQuantMatrix of csrc/abi/qwenrt_cpu.h."""

    _fields_ = (
        ("words", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("perm", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("out_features", ctypes.c_int64),
        ("in_features", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("group_size", ctypes.c_int64),
        ("words_per_group", ctypes.c_int64),
        ("bits", ctypes.c_int32),
        ("zero", ctypes.c_int32),
        ("scales_are_float", ctypes.c_int32),
        ("zeros_are_float", ctypes.c_int32),
    )


STRUCTS = (  # that csrc shares with Python
    Activations,
    _QuantMatrix,
    Dense12,
    linear.Linear,
    Rounding,
    Sequences,
    Cache,
    Rotary,
    DeltaNet,
    DeltaLayer,
    ExpertsStruct,
    Layer,
    StepStruct,
    HeadStruct,
    Lora,
)


class Kernels:
    """The loaded library with one instruction set and a number of threads, which every call is given: others may
    compute with other ones beside it. Calls release the GIL; calls from several threads take turns inside. Whatever a
    call answers is checked: besides what is said of each, MemoryError and BackendError as `library.check`."""

    def __init__(self, path: Path = LIBRARY, isa: str = "auto", threads: int = 1) -> None:
        """Raises KernelsUnavailable where the library is missing, damaged or of another version, or `isa` is not one of
        ``isas`` nor "auto", their first. ``threads`` share a call, the caller's included."""
        self._library = load(path, STRUCTS)
        self._handle = self._open(isa, threads)

    def using(self, isa: str = "auto", threads: int = 1) -> Kernels:
        """The same library with another set or number of threads; this one stays as it is."""
        other = copy.copy(self)
        other._handle = self._open(isa, threads)
        return other

    def _open(self, isa: str, threads: int) -> int:
        here = self.isas
        name = here[0] if isa == "auto" else isa
        if name not in here:
            have = ", ".join(here)
            raise KernelsUnavailable(f"kernels for {isa!r} were asked for; this CPU and build have {have}")
        return int(self._library.qwenrt_open(name.encode(), threads))

    @property
    def isa(self) -> str:
        """The instruction set that computes, one of ``isas``."""
        name: bytes = self._library.qwenrt_isa(self._handle)
        return name.decode()

    @property
    def threads(self) -> int:
        """That share a call: fewer than were asked for where the system started no more."""
        return int(self._library.qwenrt_threads(self._handle))

    @property
    def isas(self) -> tuple[str, ...]:
        """The instruction sets that this CPU and build run, best first."""
        names = map(self._library.qwenrt_isa_at, itertools.count())
        return tuple(name.decode() for name in itertools.takewhile(bool, names))

    def read(self, memory: torch.Tensor) -> int:
        """Read int64 ``memory`` [n] once with all threads -> its sum modulo 2**64."""
        return int(self._library.qwenrt_read(self._handle, memory.data_ptr(), memory.numel()))

    def quant_linear(self, x: torch.Tensor, w: Packed, activations: Activations) -> torch.Tensor | None:
        """x float32 [T, K] contiguous -> float32 [T, N]; None where x is not finite or too large to sum.

        ``activations``: what x is rounded to on the way.
        """
        y, status = self._linear(x, linear.quantized(w, activations))
        return y if finite(status, f"the activations of {x.shape[0]} tokens") else None

    def dense16_linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, rounded: bool = False
    ) -> torch.Tensor:
        """x float32 [T, K] contiguous, weight bfloat16 or float16 [N, K] -> float32 [T, N]; ``rounded``: many tokens
        may be rounded on the way, where that is faster."""
        y, status = self._linear(x, linear.dense16(weight, bias, rounded))
        check(status, f"the activations of {x.shape[0]} tokens")
        return y

    def dense12_linear(self, x: torch.Tensor, w: Packed, rounded: bool = False) -> torch.Tensor:
        """x float32 [T, K] contiguous -> float32 [T, N]; ``rounded`` as of dense16_linear."""
        y, status = self._linear(x, linear.dense12(w, rounded))
        check(status, f"the activations of {x.shape[0]} tokens")
        return y

    def _linear(self, x: torch.Tensor, w: linear.Linear) -> tuple[torch.Tensor, int]:
        """The product, and the library's answer, which is for the caller to check."""
        y = torch.empty(x.shape[0], w.out_features)
        pointers = ctypes.addressof(w), x.data_ptr(), y.data_ptr()
        return y, int(self._library.qwenrt_linear(self._handle, *pointers, x.shape[0]))

    def pack(self, codes: torch.Tensor, words: torch.Tensor, group_size: int, bits: int) -> None:
        """codes uint8 [K, N] -> words, allocated by the caller as pack_quantized says."""
        pointers = codes.data_ptr(), words.data_ptr()
        status = self._library.qwenrt_pack(self._handle, *pointers, *codes.shape, group_size, bits)
        check(status, "packed codes")

    def repack(
        self, stored: torch.Tensor, perm: torch.Tensor | None, words: torch.Tensor, weight: CanonicalWeight
    ) -> None:
        """One of ``weight.words`` [ceil(K * bits / 32), n] -> words, allocated by the caller as pack_quantized says."""
        if stored.dtype != torch.int32 or not stored.is_contiguous():
            raise ValueError(f"words of {stored.dtype}, strides {stored.stride()}: int32 in rows are wanted")
        status = self._library.qwenrt_repack(
            self._handle,
            stored.data_ptr(),
            None if perm is None else perm.data_ptr(),
            words.data_ptr(),
            weight.in_features,
            stored.shape[1],
            weight.group_size,
            weight.bits,
        )
        check(status, "repacked words")

    def quantize(self, rounding: Rounding) -> bool:
        """Round what ``rounding`` points at; False where a weight or a scale is not finite."""
        status = self._library.qwenrt_quantize(self._handle, ctypes.addressof(rounding))
        return finite(status, "a few rows of weights")

    def rounds_dense(self, dtype: torch.dtype) -> bool:
        """Whether its instruction set rounds the inputs of ``rounded`` linears with 16-bit weights of a kind."""
        return bool(self._library.qwenrt_rounds_dense(self._handle, int(dtype == torch.float16)))

    @property
    def serves12(self) -> bool:
        """Whether its instruction set gains from bfloat16 in 12 bits."""
        return bool(self._library.qwenrt_dense12_serves(self._handle))

    def pack12(self, weight: torch.Tensor, into: Dense12) -> bool:
        """weight bfloat16 [N, K], contiguous -> the chunks and rows' beginnings that ``into`` points at; False where
        2^31 weights or more have no code."""
        status = self._library.qwenrt_dense12_pack(self._handle, weight.data_ptr(), ctypes.addressof(into))
        return served(status, "weights in 12 bits")

    def pack12_others(self, weight: torch.Tensor, into: Dense12) -> None:
        """Then the same weight -> the inputs and weights that ``into`` points at."""
        pointers = weight.data_ptr(), ctypes.addressof(into)
        check(self._library.qwenrt_dense12_pack_others(self._handle, *pointers), "weights without a code")

    def unpack12(self, w: Dense12, out: torch.Tensor, first: int) -> None:
        """Rows of w from ``first`` on -> out bfloat16 [rows, K], contiguous."""
        pointers, last = (ctypes.addressof(w), out.data_ptr()), first + out.shape[0]
        check(self._library.qwenrt_dense12_unpack(self._handle, *pointers, first, last), "rows of 16 bits")

    def attend(
        self,
        sequences: Sequences,
        cache: Cache,
        q: torch.Tensor,
        out: torch.Tensor,
        scale: float,
        window: int,
    ) -> None:
        """Rows of ``sequences`` of q [T, H, hd] float32, a token's heads contiguous -> ``out``, contiguous."""
        at, into, stride, heads = q.data_ptr(), out.data_ptr(), q.stride(0), q.shape[1]
        pointers = ctypes.addressof(sequences), ctypes.addressof(cache)
        status = self._library.qwenrt_attention(
            self._handle, *pointers, at, stride, heads, into, scale, window
        )
        check(status, "the partial sums of attention")

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x float32 [..., D] contiguous, weight float32 [D] -> float32 [..., D]."""
        out, dim = torch.empty(x.shape), x.shape[-1]
        pointers = x.data_ptr(), weight.data_ptr(), out.data_ptr()
        check(self._library.qwenrt_rms_norm(self._handle, *pointers, x.numel() // dim, dim, eps), "a norm")
        return out

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """float32 [T, 2I] contiguous -> float32 [T, I]."""
        tokens, inner = gate_up.shape[0], gate_up.shape[1] // 2
        out = torch.empty(tokens, inner)
        pointers = gate_up.data_ptr(), out.data_ptr()
        check(self._library.qwenrt_silu_and_mul(self._handle, *pointers, tokens, inner), "silu")
        return out

    def gate_output(self, attended: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """attended float32 [T, H, hd] contiguous, gate likewise, a head's channels contiguous -> float32 [T, H, hd]."""
        out = torch.empty(attended.shape)
        pointers = attended.data_ptr(), gate.data_ptr(), gate.stride(0), gate.stride(1), out.data_ptr()
        check(self._library.qwenrt_gate_output(self._handle, *pointers, *attended.shape), "gated outputs")
        return out

    def rotary_store(self, rotary: Rotary, cache: Cache | None, tokens: int) -> None:
        """Rotate what ``rotary`` points at and, with a cache, store keys and values."""
        into = None if cache is None else ctypes.addressof(cache)
        status = self._library.qwenrt_rotary_store(self._handle, ctypes.addressof(rotary), into, tokens)
        check(status, "rotated queries and keys")

    def delta_net(self, net: DeltaNet, sequences: Sequences) -> None:
        """Compute what ``net`` points at, and move the sequences' states on."""
        status = self._library.qwenrt_delta_net(
            self._handle, ctypes.addressof(net), ctypes.addressof(sequences)
        )
        check(status, "linear attention")

    def lora(self, loras: ctypes.Array[Lora], x: torch.Tensor, y: torch.Tensor) -> None:
        """x float32 [T, K] contiguous, y float32 [T, N] contiguous -> in y's place what ``loras`` make of it."""
        status = self._library.qwenrt_lora(
            self._handle, ctypes.addressof(loras), len(loras), x.data_ptr(), x.shape[1], y.data_ptr(),
            y.shape[1], y.shape[0],
        )  # fmt: skip
        check(status, "what adapters add")

    def forward(
        self,
        layers: ctypes.Array[Layer],
        caches: ctypes.Array[Cache],
        head: HeadStruct | None,
        step: StepStruct,
        x: torch.Tensor,
        logits: torch.Tensor | None,
    ) -> bool:
        """x float32 [T, D], contiguous, through all layers in its place, and then the ``logits`` of the step's rows;
        False where what the step names to compute a linear ``instead`` has failed."""
        pointers = ctypes.addressof(layers), ctypes.addressof(caches)
        last = None if head is None else ctypes.addressof(head)
        into = None if logits is None else logits.data_ptr()
        status = self._library.qwenrt_forward(
            self._handle, *pointers, len(layers), last, ctypes.addressof(step), x.data_ptr(), into
        )
        return served(status, f"the activations of {x.shape[0]} tokens")

    def argmax_finite(self, logits: torch.Tensor) -> list[tuple[int, float, bool]]:
        """logits float32 [B, V], each row contiguous -> of each row the first of its largest numbers, that number, and
        whether all are finite."""
        token, most = ctypes.c_int64(), ctypes.c_float()
        into = ctypes.addressof(token), ctypes.addressof(most)
        at, stride, (rows, size) = logits.data_ptr(), 4 * logits.stride(0), logits.shape
        found = []
        for row in range(rows):
            status = self._library.qwenrt_argmax_finite(at + row * stride, size, *into)
            found.append((token.value, most.value, finite(status, "the largest logit")))
        return found

    def topk(
        self, row: torch.Tensor, largest: float, temperature: float, k: int, return_logsumexp: bool
    ) -> tuple[torch.Tensor, torch.Tensor, float] | None:
        """As Backend.top of row float32 [V], contiguous; None where fewer than k of it are not NaN."""
        values, ids = torch.empty(1, k), torch.empty(1, k, dtype=torch.int64)
        logsumexp = ctypes.c_float()
        into = values.data_ptr(), ids.data_ptr(), ctypes.addressof(logsumexp) if return_logsumexp else None
        at, size = row.data_ptr(), row.shape[0]
        status = self._library.qwenrt_topk(self._handle, at, size, largest, temperature, k, *into)
        chosen = served(status, f"the choice among {size} tokens")
        return (values, ids, logsumexp.value) if chosen else None


def native_kind(bits: int) -> str:
    """Packed.kind of the layout the compiled kernels read."""
    return f"w{bits}a16-rows{BLOCK}"


def words_per_group(group_size: int, bits: int) -> int:
    return math.ceil(group_size * bits / 32)


def pack_quantized(kernels: Kernels, weight: CanonicalWeight) -> Packed:
    """Canonical codes in the layout of csrc/abi/qwenrt_cpu.h.

    data: ``words`` int32 [blocks, groups * words_per_group, 8], ``scales`` float16 (float32 where that
    loses bits) [blocks, groups, 8], ``zeros`` int16 likewise, or float32 of a weight with offsets (absent where all are
    ``zero``, or where that is ZEROS_IN_SCALES), ``perm`` int32 [K], and ``native``, the struct that points at them.
    """
    if any(words.shape[1] % BLOCK for words in weight.words[:-1]):
        weight = with_codes(weight)  # a block would hold rows of two
    weight = _with_float_zeros(weight)
    assert weight.scales is not None and weight.zeros is not None
    columns, rows = weight.in_features, weight.out_features
    bits, size, groups = weight.bits, weight.group_size, weight.scales.shape[0]
    per_group = words_per_group(size, bits)
    blocks = math.ceil(rows / BLOCK)
    shape = (blocks, groups * per_group, BLOCK)
    words = huge_buffer(4 * math.prod(shape)).view(torch.int32).view(shape)
    perm = None if weight.perm is None else weight.perm.to(torch.int32).contiguous()
    if weight.codes is not None:
        kernels.pack(weight.codes.contiguous(), words, size, bits)
    first = 0
    for stored in weight.words:
        kernels.repack(stored.contiguous(), perm, words[first // BLOCK :], weight)
        first += stored.shape[1]
    data: dict[str, torch.Tensor | int | _QuantMatrix] = {"words": words}
    scales = weight.scales.to(torch.float16)
    exact = bool((scales.to(torch.float32) == weight.scales.to(torch.float32)).all())
    data["scales"] = _by_block(scales if exact else weight.scales.to(torch.float32), blocks)
    data["zero"] = zero = int(weight.zeros[0, 0]) if weight.zeros.numel() else 0
    if weight.zeros.dtype == torch.float32:
        data |= {"zero": 0, "zeros": _by_block(weight.zeros, blocks)}
    elif not bool((weight.zeros == zero).all()):
        inside = bits == 4 and exact and zeros_in_scales(scales, weight.zeros)
        data |= {"zero": ZEROS_IN_SCALES} if inside else {"zeros": _by_block(weight.zeros, blocks)}
    if perm is not None:
        data["perm"] = perm
    bias = None if weight.bias is None else weight.bias.to(torch.float32).contiguous()
    packed = Packed(native_kind(bits), rows, columns, data, bias, bits, size)
    _point(packed)
    return packed


def _with_float_zeros(weight: CanonicalWeight) -> CanonicalWeight:
    """scale * code + offset as scale * (code - zero), zeros float32: a kernel then needs no second way to add up.

    The zero is rounded to float32, so that an offset may differ in its last digit. Where a scale is 0 its group is the
    offset alone: code 0, zero 1 of the scale -offset.
    """
    if weight.offsets is None:
        return weight
    assert weight.codes is not None and weight.scales is not None
    scales, codes = weight.scales.float(), weight.codes
    empty = scales == 0
    zeros = -weight.offsets / torch.where(empty, 1.0, scales)
    # an offset out of all proportion to its scale would overflow: there the codes are as good as nothing
    empty |= ~zeros.isfinite()
    if bool(empty.any()):
        scales, zeros = torch.where(empty, -weight.offsets, scales), torch.where(empty, 1.0, zeros)
        inside = empty.repeat_interleave(weight.group_size, dim=0)[: codes.shape[0]]
        codes = codes.masked_fill(inside, 0)
    return dataclasses.replace(weight, codes=codes, scales=scales, zeros=zeros, offsets=None)


def _by_block(tensor: torch.Tensor, blocks: int) -> torch.Tensor:
    """[R, rows] -> [blocks, R, 8], rows padded with zeros."""
    tensor = torch.nn.functional.pad(tensor, (0, blocks * BLOCK - tensor.shape[1]))
    return tensor.view(-1, blocks, BLOCK).transpose(0, 1).contiguous()


def _point(packed: Packed) -> None:
    def address(tensor: torch.Tensor | None) -> int | None:
        return None if tensor is None else tensor.data_ptr()

    packed.data["native"] = _QuantMatrix(
        words=address(packed.data["words"]),
        scales=address(packed.data["scales"]),
        zeros=address(packed.data.get("zeros")),
        perm=address(packed.data.get("perm")),
        bias=address(packed.bias),
        out_features=packed.out_features,
        in_features=packed.in_features,
        groups=packed.data["scales"].shape[1],
        group_size=packed.group_size,
        words_per_group=words_per_group(packed.group_size, packed.bits),
        bits=packed.bits,
        zero=packed.data["zero"],
        scales_are_float=int(packed.data["scales"].dtype == torch.float32),
        zeros_are_float=int("zeros" in packed.data and packed.data["zeros"].dtype == torch.float32),
    )


def restore_quantized(packed: Packed) -> str | None:
    """Point ``native`` at the tensors of a pack_quantized that was kept in a file -> None, or why they do not fit:
    the kernels trust what they are pointed at."""
    bits, size, zero = packed.bits, packed.group_size, packed.data.get("zero")
    if bits not in (4, 8) or packed.kind != native_kind(bits) or size < 1 or packed.in_features < 1:
        return f"{packed.kind[:40]!r} of {bits} bits, groups of {size}"
    in_scales = zero == ZEROS_IN_SCALES and bits == 4
    if not isinstance(zero, int) or not (in_scales or 0 <= zero <= 1 << bits):
        return f"its zero is {zero!r}"
    blocks, groups = math.ceil(packed.out_features / BLOCK), math.ceil(packed.in_features / size)
    by_group, floats = (blocks, groups, BLOCK), (torch.float16, torch.float32)[: 1 if in_scales else 2]
    allowed: dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]] = {
        "words": ((blocks, groups * words_per_group(size, bits), BLOCK), (torch.int32,)),
        "scales": (by_group, floats),
        "zeros": (by_group, (torch.int16, torch.float32)),
        "perm": ((packed.in_features,), (torch.int32,)),
        "bias": ((packed.out_features,), (torch.float32,)),
    }
    for name, (shape, dtypes) in allowed.items():
        tensor = packed.bias if name == "bias" else packed.data.get(name)
        if tensor is None and name not in ("words", "scales"):
            continue
        if not isinstance(tensor, torch.Tensor) or tensor.shape != shape or tensor.dtype not in dtypes:
            return f"{name} of {packed.kind} is not {dtypes[0]} {list(shape)}"
        if not tensor.is_contiguous() or tensor.data_ptr() % tensor.itemsize:
            return f"{name} of {packed.kind} is not laid out as it must be"
    perm = packed.data.get("perm")
    if perm is not None and not (int(perm.min()) >= 0 and int(perm.max()) < packed.in_features):
        return f"perm of {packed.kind} leads outside of its {packed.in_features} inputs"
    _point(packed)
    return None


def dequantize_blocks(w: Packed, first: int, last: int) -> torch.Tensor:
    """Blocks [first, last) of a native weight -> float32 [rows, K], columns in the order of x."""
    native: _QuantMatrix = w.data["native"]
    per_word, blocks = 32 // w.bits, last - first
    words = w.data["words"][first:last]
    shifts = torch.arange(0, 32, w.bits, dtype=torch.int32)[:, None]
    codes = ((words.unsqueeze(2) >> shifts) & (2**w.bits - 1)).to(torch.float32)
    codes = codes.view(blocks, native.groups, native.words_per_group * per_word, BLOCK)[:, :, : w.group_size]
    zeros = w.data["scales"].view(torch.int16) & 15 if native.zero < 0 else w.data.get("zeros")
    zero = native.zero if zeros is None else zeros[first:last].unsqueeze(2).to(torch.float32)
    values: torch.Tensor = (codes - zero) * w.data["scales"][first:last].unsqueeze(2).to(torch.float32)
    values = values.flatten(1, 2)[:, : w.in_features].transpose(1, 2).flatten(0, 1)
    rows = min(last * BLOCK, w.out_features) - first * BLOCK
    perm = w.data.get("perm")
    values = values[:rows]
    return values if perm is None else torch.empty_like(values).index_copy_(1, perm.long(), values)
