"""The CPU's backend: linears through the kernels of csrc/ where they were built, the rest in plain torch."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from qwenrt.backends.base import Backend
from qwenrt.backends.binding import OpSpec, native
from qwenrt.backends.cpu import attention as paged
from qwenrt.backends.cpu import (
    delta_net,
    dense12,
    elementwise,
    linear,
    lora,
    resources,
    sampling,
    torch_threads,
)
from qwenrt.backends.cpu.activations import ACTIVATIONS, EXACT, rounded_to, rounds_dense, rule_of
from qwenrt.backends.cpu.decoder import DecoderStack, Unserved
from qwenrt.backends.cpu.huge_pages import huge_buffer
from qwenrt.backends.cpu.kernels import (
    BLOCK,
    Kernels,
    dequantize_blocks,
    native_kind,
    pack_quantized,
    restore_quantized,
    words_per_group,
)
from qwenrt.backends.cpu.library import HOW_TO_BUILD, KernelsUnavailable
from qwenrt.backends.cpu.linear import Linear
from qwenrt.backends.cpu.rounding import quantize, rounds_alike
from qwenrt.backends.stack import Stack, StackParts
from qwenrt.errors import BackendError
from qwenrt.ops import quantization, reference
from qwenrt.ops.steps import DecodePlan, Draw, LayerKV, LayerState, StepPlan, Vocabulary
from qwenrt.ops.types import AttentionWeights, CanonicalWeight, DeltaWeights, LoraSpan, Packed
from qwenrt.ops.weights import with_codes

logger = logging.getLogger("qwenrt")

KERNEL_CHOICES = ("auto", "off", "amx", "avx512vnni", "avx2", "neondot", "neon", "scalar")
# Largest errors seen are a third of these, relative to the largest value of a linear's result.
_ROUNDING = {"exact": 0.0, "int16": 2e-4, "auto": 2e-4, "int8": 3e-2}
_ROUNDING_OF_QUERIES = (
    3e-4  # likewise of attention's over an int8 cache, beside whose codes they have 16 bits
)
# Activations below are never too large for the kernels to sum, whatever the group's size.
_SURELY_SUMMED = 1e29
_DENSE16 = "dense16"  # data["weight"] bfloat16 or float16 [N, K], multiplied in float32
_QUANTIZED = (native_kind(4), native_kind(8))
_WORTH_PACKING = 1 << 20  # weights of a dense linear from which on 12 bits save time
_CHUNK_ELEMENTS = 1 << 22  # elements of a weight that exist in float32 at once
_PADDING_WORTH = 1.25  # groups that do not fill their words may cost this factor of memory, not more


@functools.cache
def _load() -> Kernels | KernelsUnavailable:
    try:
        return Kernels()
    except KernelsUnavailable as reason:
        return reason


def kernel_status(kernels: str = "auto") -> str:
    """One line: which kernels serve the CPU and, if not the compiled ones, why and how to get them. ``kernels``: what
    the user chose; BackendError where that cannot be."""
    cpu = CPUBackend(torch.device("cpu"))
    cpu.configure(kernels)
    if cpu.kernels is None:
        return f"plain torch: {cpu.unavailable}"
    return f"{cpu.describe()}; QWENRT_KERNELS can be {', '.join(cpu.kernels.isas)} or off (now {cpu.kernels.isa})"


@dataclass
class CPUBackend(Backend):
    """Int4 and int8 linears are computed from packed codes, dense ones from 16-bit weights where they are stored so.

    ``activations`` says what the inputs of quantised linears are: "exact" (float32), rounded to "int16" (the result
    differs by about 3e-5 of its size), "auto" (int16 in linears of 2^20 weights or more, exact in smaller ones), or
    "int8" (about 5e-3; of 4-bit weights where that is harmless, int16 elsewhere). All but "exact" let 32 tokens and
    more be multiplied with 16-bit weights of that size in fixed point (about 1e-4), where that is faster, and 16 with
    bfloat16 ones as sums of two bfloat16 (about 5e-6) on AMX.
    Dense 16-bit weights of a float32 model stay in 16 bits, which loses nothing. ``kernels`` is None where
    plain torch serves instead, and ``unavailable`` says why.
    """

    kernels: Kernels | None = field(default=None, init=False)
    unavailable: str = field(default="", init=False)
    threads: int = field(default=1, init=False)
    activations: str = field(default="auto", init=False)
    _checked: set[tuple[str, int]] = field(default_factory=set, init=False, repr=False)
    name: ClassVar[str] = "cpu"
    layout_id: ClassVar[str] = "cpu-rows8-v3"

    def __post_init__(self) -> None:
        self.configure()

    def configure(
        self, kernels: str = "auto", num_threads: int | None = None, activations: str = "auto"
    ) -> None:
        """Choose the kernels (one of KERNEL_CHOICES), the threads and what activations are rounded
        to ("auto", "exact", "int16", "int8"); before any weight is packed.

        All of it is this backend's alone: others keep theirs, and so do models that were built before. Threads, where
        they are given, are also what torch computes with in this process (not in a forked child, where torch keeps to
        one); by default they are as many as torch's, and no more than the cores that affinity and cgroup leave us.
        Raises BackendError for a choice that cannot be.
        """
        if kernels not in KERNEL_CHOICES:
            known = ", ".join(KERNEL_CHOICES)
            raise BackendError(f"CPU kernels {kernels!r}", "no such choice", f"Use one of: {known}.")
        if activations not in ("auto", *ACTIVATIONS):
            known = ", ".join(("auto", *ACTIVATIONS))
            raise BackendError(f"activations {activations!r}", "no such choice", f"Use one of: {known}.")
        self.activations = activations
        stands_for = torch_threads.use(num_threads)
        self.threads = num_threads or min(resources.usable_cores(), stands_for)
        self.kernels = None
        if kernels == "off":
            self.unavailable = "the kernels are switched off (QWENRT_KERNELS=off)"
            return
        library = _load()
        if isinstance(library, KernelsUnavailable):
            if kernels != "auto":
                raise BackendError(f"CPU kernels {kernels!r}", str(library), "Use auto for plain torch.")
            self.unavailable = str(library)
            return
        try:
            self.kernels = library.using(kernels, self.threads)
        except KernelsUnavailable as error:
            raise BackendError(f"CPU kernels {kernels!r}", str(error), "Use auto or scalar.") from error
        self.threads, self.unavailable = self.kernels.threads, ""

    # ---- which code serves

    def provides(self, need: str) -> str | None:
        return (self.unavailable or None) if need == "csrc" else super().provides(need)

    def why_not(self, op: str, spec: OpSpec) -> str | None:
        if op in self.demoted:
            return self.demoted[op]
        # Dense float32 linears are torch's own at its best: no kernel is missing there.
        if op == "linear" and spec.kind in ("dense", _DENSE16, dense12.KIND, "parts"):
            return None
        if op == "linear" and spec.kind in ("w4a16", "w8a16") and self.kernels is not None:
            return "its groups do not fill the kernel's 32-bit words"
        return super().why_not(op, spec)

    def rounding(self, op: str) -> float:
        if op == "attention":
            return _ROUNDING_OF_QUERIES if self._rounds_queries else 0.0
        return _ROUNDING[self.activations] if op == "linear" else 0.0

    @property
    def _rounds_queries(self) -> bool:
        """Whether attention over an int8 cache multiplies in 16 bits."""
        return self.activations != "exact"

    # ---- linear

    @native(needs=("csrc",))
    def linear(self, x: torch.Tensor, w: Packed) -> torch.Tensor:
        if w.kind in _QUANTIZED:
            if x.requires_grad:
                y: torch.Tensor = _QuantLinear.apply(x, w, self.kernels)  # type: ignore[no-untyped-call]
                return y
            return self._quantized(x, w)
        if w.kind in (_DENSE16, dense12.KIND):
            return self._dense(x, w)
        if w.kind == "parts":
            y = torch.cat([self.linear(x, part) for part in w.data["parts"]], dim=-1)
            return y if w.bias is None else y + w.bias
        return reference.linear(x, w)

    def activations_of(self, w: Packed) -> str:
        if w.kind in _QUANTIZED:
            return rounded_to(self.activations, w)
        return "int16" if self._rounds_dense(w) else ""

    def _rounds_dense(self, w: Packed) -> bool:
        if self.kernels is None or w.kind not in (_DENSE16, dense12.KIND):
            return False
        dtype = w.data["weight"].dtype if w.kind == _DENSE16 else torch.bfloat16
        return self.kernels.rounds_dense(dtype) and rounds_dense(self.activations, w)

    def _quantized(self, x: torch.Tensor, w: Packed) -> torch.Tensor:
        assert self.kernels is not None
        x32, how = x.to(torch.float32).contiguous(), rule_of(self.activations, w)
        y = self.kernels.quant_linear(x32, w, how)
        if y is None:  # the tokens that the kernel refuses alone; the others of the batch keep their result
            y, refused = _quantized_torch(x32, w), ~(x32.abs().amax(-1) < _SURELY_SUMMED)
            others = self.kernels.quant_linear(x32[~refused], w, how)
            if others is not None:  # else torch's stands for all
                y[~refused] = others
        return y.to(x.dtype)

    def _dense(self, x: torch.Tensor, w: Packed) -> torch.Tensor:
        weight: torch.Tensor | None = w.data.get("weight")
        if self.kernels is not None and not x.requires_grad:
            rounded = self._rounds_dense(w)
            if weight is None:
                return self.kernels.dense12_linear(x.contiguous(), w, rounded)
            return self.kernels.dense16_linear(x.contiguous(), weight, w.bias, rounded)
        rows = max(1, _CHUNK_ELEMENTS // max(1, w.in_features))
        starts = range(0, w.out_features, rows)
        parts = (self._dense_rows(w, i, min(i + rows, w.out_features)) for i in starts)
        y = torch.cat([F.linear(x, part.to(x.dtype)) for part in parts], dim=-1)
        return y if w.bias is None else y + w.bias

    def _dense_rows(self, w: Packed, first: int, last: int) -> torch.Tensor:
        """Rows of a dense weight as they were stored -> 16 bits [last - first, K]."""
        if w.kind == _DENSE16:
            weight: torch.Tensor = w.data["weight"]
            return weight[first:last]
        assert self.kernels is not None
        return dense12.unpack(self.kernels, w, first, last)

    def pack_linear(self, weight: CanonicalWeight, dtype: torch.dtype) -> Packed:
        """As Backend.pack_linear; in the kernels' layout where they serve."""
        if self.kernels is None or "linear" in self.demoted:
            return super().pack_linear(with_codes(weight), dtype)
        if weight.dense is None:
            padded = words_per_group(weight.group_size, weight.bits) * 32 / weight.bits
            if padded > weight.group_size * _PADDING_WORTH:
                return super().pack_linear(with_codes(weight), dtype)
            return pack_quantized(self.kernels, weight)
        dense = weight.dense
        if dtype != torch.float32 or dense.dtype not in (torch.bfloat16, torch.float16):
            return super().pack_linear(weight, dtype)
        bias = None if weight.bias is None else weight.bias.to(torch.float32).contiguous()
        dense = dense.contiguous()
        if dense.dtype == torch.bfloat16 and dense.numel() >= _WORTH_PACKING and not weight.shared:
            packed = dense12.pack(self.kernels, dense, bias) if self.kernels.serves12 else None
            if packed is not None:
                return packed
        return Packed(_DENSE16, weight.out_features, weight.in_features, {"weight": dense}, bias)

    def quantize_dense(
        self, weight: torch.Tensor, bits: int, group_size: int, bias: torch.Tensor | None, name: str
    ) -> CanonicalWeight:
        """As Backend.quantize_dense, the codes in words; what cannot be rounded is left to the definition to refuse."""
        quantization.groups_of((weight.shape[0], weight.shape[1]), bits, group_size, name)
        if self.kernels is not None and self._rounds_alike(self.kernels, bits):
            rounded = quantize(self.kernels, weight, bits, group_size, bias, name)
            if rounded is not None:
                return rounded
        return super().quantize_dense(weight, bits, group_size, bias, name)

    def _rounds_alike(self, kernels: Kernels, bits: int) -> bool:
        """The self-check of quantize_dense, made by the first weight of a kind: most loads round none."""
        if "quantize_dense" not in self.demoted and (kernels.isa, bits) not in self._checked:
            if not rounds_alike(kernels, bits):
                self.demoted["quantize_dense"] = why = f"its {bits}-bit codes differ from their definition's"
                logger.error("the quantize_dense kernel of %s is not used: %s", self.name, why)
            self._checked.add((kernels.isa, bits))
        return "quantize_dense" not in self.demoted

    def packs_words(self) -> bool:
        return self.kernels is not None and "linear" not in self.demoted

    def packing_id(self) -> str:
        """As Backend.packing_id; the instruction set stands in it so that a layout may come to depend on it."""
        kernels = "plain torch" if self.kernels is None else self.kernels.isa
        return f"{super().packing_id()} {kernels}"

    def restore_packed(self, packed: Packed) -> str | None:
        if packed.kind in _QUANTIZED and self.kernels is not None:
            return restore_quantized(packed)
        if packed.kind == dense12.KIND and self.kernels is not None:
            return dense12.restore(packed)
        if packed.kind == _DENSE16:
            weight, shape = packed.data.get("weight"), (packed.out_features, packed.in_features)
            if not isinstance(weight, torch.Tensor) or weight.dtype not in (torch.bfloat16, torch.float16):
                return f"weight of {_DENSE16} is not in 16 bits"
            if weight.shape != shape or not weight.is_contiguous():
                return f"weight of {_DENSE16} is not {list(shape)}"
            bias = packed.bias
            if bias is not None and (bias.dtype != torch.float32 or bias.shape != shape[:1]):
                return f"bias of {_DENSE16} is not float32 [{shape[0]}]"
            return None
        return super().restore_packed(packed)

    # ---- between the linears

    @native(dtypes=(torch.float32,), head_dim=paged.HEAD_DIMS, needs=("csrc",))
    def attention(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        kv: LayerKV | None,
        plan: StepPlan,
        scale: float,
        window: int = 0,
    ) -> torch.Tensor:
        assert self.kernels is not None
        return paged.attention(self.kernels.attend, q, k, v, kv, plan, scale, window, self._rounds_queries)

    @native(dtypes=(torch.float32,), needs=("csrc",))
    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        if not elementwise.served(x, weight):
            return reference.rms_norm(x, weight, eps)
        assert self.kernels is not None
        return self.kernels.rms_norm(x.contiguous(), weight, eps)

    @native(dtypes=(torch.float32,), needs=("csrc",))
    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        if not elementwise.served(gate_up):
            return reference.silu_and_mul(gate_up)
        assert self.kernels is not None
        return self.kernels.silu_and_mul(gate_up.contiguous())

    @native(dtypes=(torch.float32,), head_dim=paged.HEAD_DIMS, needs=("csrc",))
    def rotary_store_kv(
        self,
        qkv: torch.Tensor,
        heads: tuple[int, int, int],
        qk_norms: tuple[torch.Tensor, torch.Tensor, float] | None,
        cos: torch.Tensor,
        sin: torch.Tensor,
        q_scale: torch.Tensor | None,
        kv: LayerKV | None,
        plan: StepPlan | DecodePlan,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if not elementwise.served(qkv, *(qk_norms[:2] if qk_norms else ())):
            return super().rotary_store_kv(qkv, heads, qk_norms, cos, sin, q_scale, kv, plan)
        assert self.kernels is not None
        call = self.kernels.rotary_store
        return elementwise.rotary_store_kv(call, qkv, heads, qk_norms, cos, sin, q_scale, kv, plan)

    @native(dtypes=(torch.float32,), needs=("csrc",))
    def gate_output(self, attended: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        if not elementwise.served(attended, gate):
            return reference.gate_output(attended, gate)
        assert self.kernels is not None
        return elementwise.gate_output(self.kernels.gate_output, attended, gate)

    @native(dtypes=(torch.float32,), needs=("csrc",))
    def delta_net(
        self,
        projected: torch.Tensor,
        rates: torch.Tensor,
        w: DeltaWeights,
        eps: float,
        state: LayerState | None,
        plan: StepPlan,
    ) -> torch.Tensor:
        if (
            state is None
            or not plan.state_slots
            or not delta_net.serves(w)
            or not elementwise.served(projected, rates)
        ):
            return super().delta_net(projected, rates, w, eps, state, plan)
        assert self.kernels is not None
        return delta_net.delta_net(self.kernels.delta_net, projected, rates, w, eps, state, plan)

    @native(dtypes=(torch.float32,), needs=("csrc",))
    def add_lora(
        self, y: torch.Tensor, x: torch.Tensor, spans: Sequence[LoraSpan], bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        own = (t for span in spans for pair in span.pairs for t in pair.tensors)
        if not elementwise.served(y, x, *own):
            return super().add_lora(y, x, spans, bias)
        assert self.kernels is not None
        return lora.add_lora(self.kernels.lora, y, x, spans, bias)

    # ---- whole steps

    def stacks(self, parts: StackParts) -> list[Stack]:
        """As Backend.stacks; first the one call, where the kernels serve every op of every layer."""
        stacks = super().stacks(parts)
        self.seams_because = "" if self.kernels is None else self._why_not_one_call(parts) or ""
        if self.kernels is None or self.seams_because:
            return stacks
        try:
            forward = self.kernels.forward
            no_lora = self.why_not("add_lora", OpSpec("add_lora", "", torch.float32))
            return [
                DecoderStack(self, parts, self._linear_struct, forward, self._rounds_queries, no_lora),
                *stacks,
            ]
        except Unserved as reason:
            self.seams_because = str(reason)
            return stacks

    def _why_not_one_call(self, parts: StackParts) -> str | None:
        """Which op of these layers the kernels do not serve, whatever their linears are."""
        network = parts.network
        uses = {("linear", 0), ("rms_norm", 0), ("silu_and_mul", 0)}
        for mixer in (w.mixer for w in network.layer_weights):
            if isinstance(mixer, AttentionWeights):
                ops = ("attention", "rotary_store_kv", *(("gate_output",) if mixer.gated else ()))
                uses |= {(op, mixer.heads[2]) for op in ops}
            else:
                uses.add(("delta_net", 0))
        if network.dtype != torch.float32:
            return f"no {str(network.dtype).removeprefix('torch.')} kernel"
        whys = ((op, self.why_not(op, OpSpec(op, "", network.dtype, dim))) for op, dim in sorted(uses))
        return next((f"{op}: {why}" for op, why in whys if why is not None), None)

    def _linear_struct(self, w: Packed) -> Linear | None:
        if w.kind in _QUANTIZED:
            return linear.quantized(w, rule_of(self.activations, w))
        if w.kind == dense12.KIND:
            return linear.dense12(w, self._rounds_dense(w))
        if w.kind == _DENSE16:
            return linear.dense16(w.data["weight"], w.bias, self._rounds_dense(w))
        return None

    def empty_kv(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """As Backend.empty_kv, on huge pages: on small ones the first token of a slot takes a page fault for each half
        of each layer."""
        return huge_buffer(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)

    def choose(self, logits: torch.Tensor, draws: list[Draw], vocabulary: Vocabulary) -> torch.Tensor:
        if self.kernels is None or logits.stride(1) != 1:
            return super().choose(logits, draws, vocabulary)
        return sampling.choose(self.kernels, logits, draws, vocabulary)

    # ---- the device

    def weight_dtype(self, stored: str | None, dtype: torch.dtype) -> torch.dtype:
        """Weights stored in 16 bits stay so beside float32 activations where our kernels multiply them."""
        if self.kernels is None or "linear" in self.demoted or dtype != torch.float32:
            return dtype
        return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(stored or "", dtype)

    def default_dtype(self, stored: str | None, nbytes_float32: int, quantized: bool) -> torch.dtype:
        """float32, which CPUs compute fastest, unless a dense model would fill most of the memory with it."""
        nbytes = nbytes_float32 * self.weight_dtype(stored, torch.float32).itemsize // 4
        if quantized or nbytes <= 0.7 * self.memory()[0]:
            return torch.float32
        return torch.bfloat16

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes that this process may use: the machine's or its container's."""
        return resources.memory()

    def empty_cache(self) -> None:
        resources.give_back_free_pages()

    def read(self, memory: torch.Tensor) -> None:
        """As Backend.read, with the threads that serve the linears."""
        if self.kernels is None:
            super().read(memory)
        else:
            self.kernels.read(memory)

    def describe(self) -> str:
        """Which kernels serve here, with how many threads, or why plain torch does; the details, and how to get them,
        are said once, where it is said what they would serve."""
        if self.kernels is None:
            return f"plain torch: {self.unavailable.removesuffix(f': {HOW_TO_BUILD}').partition(' (')[0]}"
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        name = {"avx512vnni": "AVX-512", "scalar": "portable"}.get(self.kernels.isa, self.kernels.isa.upper())
        return f"{name} kernels, {threads}"


def _row_chunks(w: Packed) -> range:
    """First blocks of chunks of a quantised weight that are small enough to exist in float32."""
    blocks = -(-w.out_features // BLOCK)
    return range(0, blocks, max(1, _CHUNK_ELEMENTS // (BLOCK * max(1, w.in_features))))


def _quantized_torch(x: torch.Tensor, w: Packed) -> torch.Tensor:
    """The same product in plain torch, for what the kernel refuses: infinities and NaN follow torch's
    rules."""
    starts, blocks = _row_chunks(w), -(-w.out_features // BLOCK)
    x = x.to(torch.float32)
    parts = [x @ dequantize_blocks(w, b, min(b + starts.step, blocks)).t() for b in starts]
    y = torch.cat(parts, dim=-1)
    return y if w.bias is None else y + w.bias


class _QuantLinear(torch.autograd.Function):
    """Gradients through a frozen quantised weight, which is dequantised again in pieces on the way back.

    Activations are never rounded here: training sees the exact product.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: Packed, kernels: Kernels) -> torch.Tensor:
        ctx.weight = w
        y = kernels.quant_linear(x.detach().to(torch.float32).contiguous(), w, EXACT)
        return (_quantized_torch(x, w) if y is None else y).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        w, grad = ctx.weight, grads[0].to(torch.float32)
        starts, blocks = _row_chunks(w), -(-w.out_features // BLOCK)
        total = grad.new_zeros(grad.shape[0], w.in_features)
        for b in starts:
            rows = slice(b * BLOCK, min(b + starts.step, blocks) * BLOCK)
            total += grad[:, rows] @ dequantize_blocks(w, b, min(b + starts.step, blocks))
        return total.to(grads[0].dtype), None, None
