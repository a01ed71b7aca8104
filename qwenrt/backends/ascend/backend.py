"""What all Ascend processors share; fused.py has A2's and A3's operators, older.py what the older ones do instead."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from qwenrt.backends.ascend import calls, errors, fused, int8_cache, packing, soc
from qwenrt.backends.ascend.graphs import GreedyGraphStack, NPUGraphs, why_no_graphs
from qwenrt.backends.base import Backend
from qwenrt.backends.binding import PRIMITIVES, SEAMS, WHOLES, Binding, OpSpec, native
from qwenrt.backends.graphs import Graphs
from qwenrt.backends.stack import SeamStack, Stack, StackParts
from qwenrt.errors import QwenrtError
from qwenrt.ops import reference
from qwenrt.ops.steps import DecodePlan, Draw, LayerKV, StepPlan, Vocabulary
from qwenrt.ops.types import PLAIN, CanonicalWeight, Experts, Packed
from qwenrt.ops.weights import dequantize, with_codes

_HALF = (torch.float16, torch.bfloat16)
_ANY_CODES = OpSpec("linear", "", torch.float16, kind=packing.KINDS[8])


@dataclass
class AscendBackend(Backend):
    """Every op by its definition, on an Ascend processor; families that are known override it.

    ``misfits``: fused operators that the installed torch_npu does not have as they are called here, and why.
    ``draws_here``: whether the device sums float64, which drawing tokens needs; else the host draws.
    """

    family: soc.Family = soc.UNKNOWN
    misfits: dict[str, str] = field(default_factory=dict)
    draws_here: bool = True
    _uncoded: dict[str, str] = field(
        default_factory=dict, init=False, repr=False
    )  # kind -> why not multiplied as codes
    name: ClassVar[str] = "npu"
    device_type: ClassVar[str] = "npu"
    layout_id: ClassVar[str] = "npu-nd-v1"
    code_bits: ClassVar[dict[int, int]] = {}  # of a file's codes -> of those the operator multiplies
    uncoded: ClassVar[bool] = False  # codes that the operator does not multiply become a matrix at load
    nz: bool = (
        False  # whether dense weights are kept in NZ; where it is not the default, QWENRT_KERNELS=nz sets it
    )

    # ---- which code serves

    def configure(
        self, kernels: str = "auto", num_threads: int | None = None, activations: str = "auto"
    ) -> None:
        """``kernels``: "off" for the definitions alone, "nz" or "plain" for the format of dense weights; others are for
        other devices."""
        if kernels in ("nz", "plain"):
            self.nz = kernels == "nz"
        for op in (*PRIMITIVES, *SEAMS, *WHOLES) if kernels == "off" else ():
            if self.overrides(op):
                self.demote(op, "fused operators are switched off (QWENRT_KERNELS=off)")

    def provides(self, need: str) -> str | None:
        return self.misfits.get(need) if need in calls.CALLS else super().provides(need)

    def why_not(self, op: str, spec: OpSpec) -> str | None:
        why = super().why_not(op, spec)
        if why is not None and op == "linear" and op not in self.demoted and spec.kind in self._uncoded:
            return self._uncoded[spec.kind]
        return why

    # ---- layouts

    def pack_linear(self, weight: CanonicalWeight, dtype: torch.dtype) -> Packed:
        """As Backend.pack_linear; codes in the operator's layout where it computes exactly what they stand for."""
        if weight.dense is not None:
            packed = super().pack_linear(weight, dtype)
            return packing.in_nz(packed) if self._wants_nz(weight, dtype) else packed
        weight = with_codes(weight)
        why, bits = "no operator multiplies codes here", self.code_bits.get(weight.bits, 0)
        if bits:
            spec = OpSpec("linear", "", dtype, kind=packing.KINDS[bits])
            why = self.why_not("linear", spec) or packing.why_not(weight, dtype) or ""
        if not why:
            return packing.pack(weight, dtype, self.device, bits)
        self._uncoded[f"w{weight.bits}a16"] = why
        if self.uncoded:
            weight = CanonicalWeight(dense=dequantize(weight, dtype), bias=weight.bias)
        return super().pack_linear(weight, dtype)

    def _wants_nz(self, weight: CanonicalWeight, dtype: torch.dtype) -> bool:
        spec = OpSpec("linear", "", dtype, kind=packing.NZ)
        fits = self.nz and self.overrides("linear") and packing.fits_nz(weight, dtype)
        return fits and (self.why_not("linear", spec) or self.provides("npu_format_cast")) is None

    def restore_packed(self, packed: Packed) -> str | None:
        if packed.kind == packing.NZ:
            why = super().restore_packed(dataclasses.replace(packed, kind="dense"))
            if why is None:
                packed.data["weight"] = packing.in_nz(packed).data["weight"]
            return why
        if packed.kind in packing.KINDS.values():
            return packing.restore(packed)
        return super().restore_packed(packed)

    def packing_id(self) -> str:
        """As Backend.packing_id; families have layouts of their own."""
        return f"{super().packing_id()} {self.family.name}{' nz' if self.nz else ''}"

    @property
    def dense_codes(self) -> bool:
        """Whether every code becomes an element of a matrix."""
        return self.uncoded and (not self.code_bits or self.why_not("linear", _ANY_CODES) is not None)

    @property
    def least_bits(self) -> int:
        """What a code takes at least."""
        return self.code_bits.get(4, 4)

    # ---- the device

    def default_dtype(self, stored: str | None, nbytes_float32: int, quantized: bool) -> torch.dtype:
        """float16 for codes, whose scales are float16 and have to be exact; else bfloat16 where there is one."""
        if quantized or not self.family.bfloat16:
            return torch.float16
        return super().default_dtype(stored, nbytes_float32, quantized)

    def choose(self, logits: torch.Tensor, draws: list[Draw], vocabulary: Vocabulary) -> torch.Tensor:
        if self.draws_here or all(draw.greedy for draw in draws):
            return super().choose(logits, draws, vocabulary)
        chosen = Backend(torch.device("cpu")).choose(logits.cpu(), draws, vocabulary)
        return chosen.to(self.device)

    def graphs(self) -> Graphs | None:
        return None

    def meaning(self, said: str) -> tuple[type[QwenrtError], str] | None:
        return errors.meaning(said)

    def describe(self) -> str:
        """The family, and whether fused operators serve."""
        lacking = f", without {', '.join(sorted(self.misfits))}" if self.misfits else ""
        own = any(self.overrides(op) for op in ("attention", "rms_norm"))
        how = "fused operators" if own else "plain torch: this project has no code for the processor"
        return f"{self.family.name}, {how}{lacking if own else ''}"


@dataclass
class A2Backend(AscendBackend):
    """Atlas A2 and A3 (910B1 to 910B4, 910C)."""

    _lengths: fused.HostLengths = field(default_factory=fused.HostLengths, init=False, repr=False)
    _codes: dict[tuple[int, int, torch.dtype], str | None] = field(
        default_factory=dict, init=False, repr=False
    )
    code_bits: ClassVar[dict[int, int]] = {4: 4, 8: 8}
    stackable: ClassVar[tuple[str, ...]] = (
        *PLAIN,
        packing.KINDS[4],
    )  # int8: grouped for one scale an output alone

    def __post_init__(self) -> None:
        self.block_size, self._mask = fused.PAGE, fused.causal_mask(self.device)
        why = why_no_graphs()
        if why is not None:
            self.demoted["stacks"] = why

    @native(needs=("npu_rms_norm",))
    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        if not x.numel() or x.requires_grad:
            return reference.rms_norm(x, weight, eps, self.dtype)
        return fused.rms_norm(x, weight, eps, self.dtype)

    @native(needs=("npu_rotary_mul",), head_dim=tuple(range(2, 896, 2)))
    def rotary(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        if not x.numel() or x.requires_grad:
            return reference.rotary(x, cos, sin)
        return fused.rotary(x, cos, sin)

    @native(needs=("npu_swiglu",))
    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        if not gate_up.numel() or gate_up.requires_grad:
            return reference.silu_and_mul(gate_up)
        return fused.silu_and_mul(gate_up)

    @native(needs=("npu_scatter_nd_update_",))
    def store_kv(self, k: torch.Tensor, v: torch.Tensor, kv: LayerKV, slots: torch.Tensor) -> None:
        (reference if kv.quantized or not k.numel() else fused).store_kv(k, v, kv, slots)

    @native(
        dtypes=_HALF,
        kinds=("dense", "parts", packing.NZ, *packing.KINDS.values()),
        needs=("npu_weight_quant_batchmatmul",),
    )
    def linear(self, x: torch.Tensor, w: Packed) -> torch.Tensor:
        if w.kind == "parts":
            y = torch.cat([self.linear(x, part) for part in w.data["parts"]], dim=-1)
            return y if w.bias is None else y + w.bias
        if w.kind not in packing.KINDS.values():
            return (fused.nz_linear if w.kind == packing.NZ else reference.linear)(x, w)
        return fused.linear(x, w) if x.numel() else x.new_empty(len(x), w.out_features)

    @native(dtypes=_HALF, head_dim=tuple(range(16, 513, 16)), needs=("npu_fused_infer_attention_score",))
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
        if kv is None or not fused.serves(kv, window) or q.requires_grad:
            return reference.attention(q, k, v, kv, plan, scale, window)
        return fused.attention(q, kv, plan, scale, self._mask)

    @native(dtypes=_HALF, head_dim=tuple(range(16, 513, 16)), needs=("npu_fused_infer_attention_score",))
    def decode_attention(
        self, q: torch.Tensor, kv: LayerKV, plan: DecodePlan, scale: float, window: int = 0
    ) -> torch.Tensor:
        if not fused.serves(kv, window) or not q.numel():
            return reference.decode_attention(q, kv, plan, scale, window)
        return fused.decode_attention(q, kv, plan, scale, self._mask, self._lengths)

    def why_not(self, op: str, spec: OpSpec) -> str | None:
        why = super().why_not(op, spec)
        if why is None and op in ("norm_moe_add", "norm_moe_add_each") and spec.kind == packing.KINDS[4]:
            return self.provides(calls.INT4_EXPERTS)
        return why

    @native(dtypes=_HALF, kinds=("dense", packing.KINDS[4]), needs=("npu_grouped_matmul",))
    def norm_moe_add(self, x: torch.Tensor, norm: torch.Tensor, eps: float, w: Experts) -> torch.Tensor:
        if not fused.takes_grouped(w) or not x.numel() or x.requires_grad:
            return super().norm_moe_add(x, norm, eps, w)
        return self._grouped_experts(x, norm, eps, w)

    @native(dtypes=_HALF, kinds=("dense", packing.KINDS[4]), needs=("npu_grouped_matmul",))
    def norm_moe_add_each(self, x: torch.Tensor, norm: torch.Tensor, eps: float, w: Experts) -> torch.Tensor:
        if not fused.takes_grouped(w) or not x.numel():
            return super().norm_moe_add_each(x, norm, eps, w)
        return self._grouped_experts(x, norm, eps, w)

    def linear_of_each(self, x: torch.Tensor, w: Packed, which: torch.Tensor) -> torch.Tensor:
        if w.kind == packing.KINDS[4]:
            return packing.linear_of_each(x, w, which)
        return super().linear_of_each(x, w, which)

    def _grouped_experts(self, x: torch.Tensor, norm: torch.Tensor, eps: float, w: Experts) -> torch.Tensor:
        normed = self.rms_norm(x, norm, eps)
        return x + self.shared_expert(normed, w, fused.experts(normed, w, x.dtype, self.silu_and_mul))

    def alloc_kv(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        quantized: bool,
    ) -> list[LayerKV]:
        """As Backend.alloc_kv; codes in the form that attention reads, where it reads them rightly here."""
        if not quantized or self._no_codes(num_kv_heads, head_dim, dtype) is not None:
            return super().alloc_kv(
                num_layers, num_blocks, block_size, num_kv_heads, head_dim, dtype, quantized
            )
        shape = (num_blocks, block_size, num_kv_heads, head_dim)
        return [int8_cache.signed_cache(shape, self.empty_kv) for _ in range(num_layers)]

    def _no_codes(self, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> str | None:
        """Why attention over codes is the definition's, None where it is the operator's: looked at once for each shape,
        apart from attention over numbers, which must not fall with it."""
        key = num_kv_heads, head_dim, dtype
        if key not in self._codes:
            why = self.why_not("decode_attention", OpSpec("decode_attention", "", dtype, head_dim))
            why = why or self.provides(calls.INT8_CACHE)
            if why is None and head_dim % 32:
                why = f"head_dim {head_dim} is no multiple of 32"
            self._codes[key] = why or int8_cache.complaint_of(self._mask, *key)
            self.bindings.append(
                Binding(
                    "decode_attention", "int8 cache", "", self._codes[key] is None, self._codes[key] or ""
                )
            )
        return self._codes[key]

    def stacks(self, parts: StackParts) -> list[Stack]:
        if self.draws_here or "stacks" in self.demoted:
            return super().stacks(parts)
        seams = SeamStack(self, parts)
        return [GreedyGraphStack(self, parts, self.graphs(), seams), seams]

    def graphs(self) -> Graphs:
        return NPUGraphs(self._lengths)
