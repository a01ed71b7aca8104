"""310P and 910A: float16, and attention in torch's own ops: fused ones are not made for them, or not trusted there.

Their half-precision numbers saturate, so what a query must not see gets the smallest number and not minus infinity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from qwenrt.backends.ascend import fused, packing
from qwenrt.backends.ascend.backend import AscendBackend
from qwenrt.backends.binding import native
from qwenrt.ops import reference
from qwenrt.ops.steps import LayerKV, StepPlan
from qwenrt.ops.types import Packed

_QUERIES = 1024  # of a prompt that are computed at once: their scores are float32
_PADDED = 2  # times the keys of sequences that go together, at most, with what fills them up
_READ = 1 << 26  # elements of keys that are read at once
_FLOATS = (torch.float16, torch.float32)


@dataclass
class A910Backend(AscendBackend):
    """Atlas training cards of the first generation (910A, 910ProA, 910ProB). No operator multiplies codes here: they
    become float16 matrices at load."""

    uncoded: ClassVar[bool] = True

    @native(dtypes=_FLOATS, needs=("npu_rms_norm",))
    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        if not x.numel() or x.requires_grad:
            return reference.rms_norm(x, weight, eps, self.dtype)
        return fused.rms_norm(x, weight, eps, self.dtype)

    @native(dtypes=_FLOATS, head_dim=(128,), needs=("npu_rotary_mul",))
    def rotary(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        # Larger products of tokens and channels are outside of what the operator is documented for here.
        if cos.shape[-1] != 128 or not 0 < len(x) <= 1024 or x.requires_grad:
            return reference.rotary(x, cos, sin)
        return fused.rotary(x, cos, sin)

    @native(dtypes=_FLOATS, needs=("npu_scatter_nd_update_",))
    def store_kv(self, k: torch.Tensor, v: torch.Tensor, kv: LayerKV, slots: torch.Tensor) -> None:
        (reference if kv.quantized or not k.numel() else fused).store_kv(k, v, kv, slots)

    @native(dtypes=(torch.float16,), note="matrix products, softmax in float32")
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
        if kv is None or not plan.causal or q.requires_grad:
            return reference.attention(q, k, v, kv, plan, scale, window)
        return attention(q, kv, plan, scale, window)


@dataclass
class P310Backend(A910Backend):
    """Atlas inference cards (310P, 300I Duo): as A910Backend, but codes are multiplied, those of 4 bits as 8."""

    code_bits: ClassVar[dict[int, int]] = {4: 8, 8: 8}
    nz: bool = True  # plain weights would be turned into it for every product

    @native(
        dtypes=(torch.float16,),
        kinds=("dense", "parts", packing.NZ, "npu_int8"),
        needs=("npu_weight_quant_batchmatmul",),
    )
    def linear(self, x: torch.Tensor, w: Packed) -> torch.Tensor:
        if w.kind == "parts":
            y = torch.cat([self.linear(x, part) for part in w.data["parts"]], dim=-1)
            return y if w.bias is None else y + w.bias
        if w.kind not in packing.KINDS.values():
            return (fused.nz_linear if w.kind == packing.NZ else reference.linear)(x, w)
        return fused.linear(x, w) if x.numel() else x.new_empty(len(x), w.out_features)


def attention(q: torch.Tensor, kv: LayerKV, plan: StepPlan, scale: float, window: int) -> torch.Tensor:
    """As reference.attention over a cache. Neighbours that decode go together: each op is launched by the host."""
    if "runs" not in plan.made:
        plan.made["runs"] = _runs(plan, kv)
        plan.made["tables"] = [_table(plan, run, q.device) for run in plan.made["runs"]]
    out, first = [], 0
    for run, tables in zip(plan.made["runs"], plan.made["tables"], strict=True):
        tokens = sum(plan.q_lens[i] for i in run)
        here = q[first : first + tokens]
        first += tokens
        if tables is not None:
            table, lens = tables
            out.append(_decode(here, kv, table, lens, scale, window))
        else:
            keys, values = reference.load_kv(kv, plan.block_table[run[0]], plan.kv_lens[run[0]], q.dtype)
            out.append(_attend(here, keys, values, scale, window))
    if not out:
        return q.new_empty(q.shape)
    return out[0] if len(out) == 1 else torch.cat(out)


def _runs(plan: StepPlan, kv: LayerKV) -> list[list[int]]:
    """The sequences that have tokens, in lists: neighbours of one token each together, as far as their lengths are
    alike and what is read of them fits. Codes are read of one sequence at a time."""
    runs: list[list[int]] = []
    row = kv.k.shape[2] * kv.k.shape[3]
    for i, q_len in enumerate(plan.q_lens):
        lens = [plan.kv_lens[j] for j in (*runs[-1], i)] if runs else []
        padded = len(lens) * max(lens, default=0)
        alike = padded <= _PADDED * sum(lens) and padded * row <= _READ and not kv.quantized
        if q_len == 1 and runs and plan.q_lens[runs[-1][0]] == 1 and alike:
            runs[-1].append(i)
        elif q_len:
            runs.append([i])
    return runs


def _table(plan: StepPlan, run: list[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Of sequences that go together the blocks int64 [B, W] and the lengths int64 [B, 1]; None of a lone one."""
    if len(run) == 1:
        return None
    width = max(len(plan.block_table[i]) for i in run)
    rows = [plan.block_table[i] + [0] * (width - len(plan.block_table[i])) for i in run]
    lengths = [[plan.kv_lens[i]] for i in run]
    table, lens = (torch.tensor(side).to(device, non_blocking=True) for side in (rows, lengths))
    return table, lens


def _decode(
    q: torch.Tensor, kv: LayerKV, table: torch.Tensor, lens: torch.Tensor, scale: float, window: int
) -> torch.Tensor:
    """q [B, H, hd], the last token of each of B sequences -> [B, H, hd]. What else is in their blocks is not seen,
    whatever it is."""
    batch, kv_heads = len(q), kv.k.shape[2]
    keys, values = (side[table].flatten(1, 2).transpose(1, 2) for side in (kv.k, kv.v))  # [B, KVH, M, hd]
    at = torch.arange(keys.shape[2], device=q.device)
    unseen = at >= lens
    if window:
        unseen = unseen | (at < lens - window)
    scaled = (q.float() * scale).to(q.dtype).view(batch, kv_heads, -1, q.shape[-1])
    scores = (scaled @ keys.transpose(-1, -2)).float()
    weights = scores.masked_fill(unseen[:, None, None], torch.finfo(torch.float32).min).softmax(-1)
    seen = values.masked_fill(unseen[:, None, :, None], 0)
    return (weights.to(q.dtype) @ seen).flatten(1, 2)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int) -> torch.Tensor:
    """q [n, H, hd] over k, v [m, KVH, hd], the last query over all keys -> [n, H, hd], some queries at a time."""
    tokens, kv_heads = len(k), k.shape[1]
    groups = q.shape[1] // kv_heads
    keys, values = (side.transpose(0, 1).unsqueeze(1) for side in (k, v))  # [KVH, 1, m, hd]
    scaled = (q.float() * scale).to(q.dtype).view(len(q), kv_heads, groups, -1).permute(1, 2, 0, 3)
    at = torch.arange(tokens, device=q.device)
    parts = []
    for first in range(0, len(q), _QUERIES):
        some = scaled[:, :, first : first + _QUERIES]
        scores = (some @ keys.transpose(-1, -2)).float()
        last = tokens - len(q) + first + torch.arange(some.shape[2], device=q.device)[:, None]
        unseen = at > last
        if window:
            unseen = unseen | (at <= last - window)
        weights = scores.masked_fill(unseen, torch.finfo(torch.float32).min).softmax(-1)
        parts.append((weights.to(q.dtype) @ values).permute(2, 0, 1, 3).flatten(1, 2))
    return torch.cat(parts)
