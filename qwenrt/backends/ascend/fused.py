"""The ops through fused operators of torch_npu. Layouts, masks and modes are always said: their defaults changed.

All operators are called by torch's dispatcher and known to it alone; qwenrt.backends.ascend.calls has how.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from qwenrt.backends.ascend.packing import KINDS, as_nd, dequantize
from qwenrt.ops import reference
from qwenrt.ops.steps import DecodePlan, LayerKV, StepPlan
from qwenrt.ops.types import Experts, Packed

PAGE = 128  # tokens of a block of the cache
PAGES = (128, 256, 384, 512)  # what attention over prompts takes
_MASK = 2048  # rows of the one causal mask that the operator lays over any length
_CAUSAL = 3  # sparse_mode: the last query sees all keys
_BY_TOKEN_AND_HEAD = (
    5  # antiquant_mode: scales and offsets float32 [num_blocks, KVH, block_size], found by the table
)
_HEADROOM_BITS = 6  # as Backend.linear_add: sums wider than float16


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype | None) -> torch.Tensor:
    """As reference.rms_norm, rounded once. Where x and weight differ, all of it is float32."""
    if x.dtype != weight.dtype:
        x, weight, dtype = x.float(), weight.float(), dtype or weight.dtype
    y: torch.Tensor = torch.ops.npu.npu_rms_norm(x.contiguous(), weight, epsilon=eps)[0]
    return y.to(dtype or weight.dtype)


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """As reference.rotary: in float32, since the operator would round cos and sin to the dtype of x."""
    dim = cos.shape[-1]
    head = x[..., :dim].float().unsqueeze(0).contiguous()
    rows = (table.view(1, -1, 1, dim).contiguous() for table in (cos, sin))
    turned = torch.ops.npu.npu_rotary_mul(head, *rows, rotary_mode="half")[0].to(x.dtype)
    return turned if dim == x.shape[-1] else torch.cat((turned, x[..., dim:]), dim=-1)


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """As reference.silu_and_mul, rounded once."""
    y: torch.Tensor = torch.ops.npu.npu_swiglu(gate_up.contiguous(), dim=-1)
    return y


def store_kv(k: torch.Tensor, v: torch.Tensor, kv: LayerKV, slots: torch.Tensor) -> None:
    """As reference.store_kv of a float cache."""
    for x, cache in ((k, kv.k), (v, kv.v)):
        by_slot = cache.view(-1, *cache.shape[2:])
        torch.ops.npu.npu_scatter_nd_update_(by_slot, slots.unsqueeze(1), x.to(cache.dtype).contiguous())


def linear(x: torch.Tensor, w: Packed) -> torch.Tensor:
    """As reference.linear of codes that packing.pack made. For training they are made a matrix: the operator has no
    gradient."""
    perm = w.data["perm"]
    if perm is not None:
        x = x.index_select(-1, perm)
    if x.requires_grad:
        y = torch.matmul(x, dequantize(w, x.dtype))
        return y if w.bias is None else y + w.bias
    out: torch.Tensor = torch.ops.npu.npu_weight_quant_batchmatmul(
        x.contiguous(),
        w.data["weight"],
        w.data["scale"],
        antiquant_offset=w.data["offset"],
        bias=w.data["bias"],
        antiquant_group_size=w.group_size,
        inner_precise=0,
    )
    return out


def nz_linear(x: torch.Tensor, w: Packed) -> torch.Tensor:
    """As reference.linear of a weight in NZ, which torch_npu's own product reads."""
    weight = w.data["weight"]
    return F.linear(x, as_nd(weight) if x.requires_grad else weight, w.bias)


def takes_grouped(w: Experts) -> bool:
    """Whether ``experts`` computes them: stacked, dense or in int4 whose groups are whole, without biases."""
    return w.stacked is not None and all(
        side.bias is None
        and side.data.get("bias") is None
        and side.kind in ("dense", KINDS[4])
        and not (side.group_size and side.in_features % side.group_size)
        for side in w.stacked
    )


def experts(
    normed: torch.Tensor, w: Experts, dtype: torch.dtype, silu_and_mul: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Of tokens normed [T, D] the weighted sum of their experts in ``dtype`` [T, D], experts in the order of their
    numbers (`takes_grouped`). Nothing waits for the device, so it can be captured."""
    assert w.stacked is not None
    gate_up, down = w.stacked
    logits = reference.router_logits(normed, w.router)
    weights, chosen = reference.route(logits, w.top_k, w.norm_topk_prob)
    ranks = chosen.float().argsort(dim=-1)  # integers are sorted by the host's processor there
    chosen, weights = chosen.gather(1, ranks), weights.gather(1, ranks)
    order = chosen.flatten().float().argsort(stable=True)  # (token, rank) by expert
    which = chosen.flatten().index_select(0, order)
    counts = (which[:, None] == torch.arange(len(w.gate_up), device=chosen.device)).sum(0)
    inner = silu_and_mul(_grouped(normed.index_select(0, order // w.top_k), gate_up, which, counts))
    wide = dtype != normed.dtype
    y = _grouped(inner * 2.0**-_HEADROOM_BITS if wide else inner, down, which, counts).to(dtype)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    y = y.index_select(0, back).view(*chosen.shape, -1)
    if wide:
        y = y * 2.0**_HEADROOM_BITS
    return (y * weights.unsqueeze(-1)).sum(1)


def _grouped(x: torch.Tensor, w: Packed, which: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """x [M, K], row i multiplied by the expert which[i], int64 [M], of those stacked in ``w`` -> [M, N]. Rows are in
    the order of experts, of whom each has counts[e] of them."""
    weight, codes = w.data["weight"], {}
    if w.kind == "dense":
        weight = weight.transpose(1, 2)
    else:
        if w.data["perm"] is not None:
            x = x.gather(1, w.data["perm"].index_select(0, which))
        if w.data["offset"] is None:  # which the operator wants beside scales
            w.data["offset"] = torch.zeros_like(w.data["scale"])
        codes = {"antiquant_scale": [w.data["scale"]], "antiquant_offset": [w.data["offset"]]}
    y: torch.Tensor = torch.ops.npu.npu_grouped_matmul(
        [x.contiguous()],
        [weight],
        group_list=counts,
        split_item=2,
        group_type=0,
        group_list_type=1,
        **codes,
    )[0]
    return y


# ---- attention over pages


@dataclass
class HostLengths:
    """What a captured step has in place of lengths, which the operator wants from the host.

    While ``capturing``, decoding is given the longest lengths there can be; ``rows`` then says how many lengths each
    replay has to bring, 0 where nothing asked for any.
    """

    capturing: bool = False
    rows: int = 0

    def of(self, plan: DecodePlan, longest: int) -> list[int]:
        """The lengths of a plan's sequences, this step's token included. Outside of a capture the device is asked."""
        if not self.capturing:
            return [position + 1 for position in plan.position.tolist()]
        self.rows = len(plan.position)
        return [longest] * self.rows


def serves(kv: LayerKV, window: int) -> bool:
    """Whether attention over this cache is the operator's: codes only in the form that it reads."""
    return not window and kv.block_size in PAGES and kv.k.dtype != torch.uint8


def causal_mask(device: torch.device) -> torch.Tensor:
    """True where a key is not seen: above the diagonal."""
    return torch.ones(_MASK, _MASK, dtype=torch.bool).triu(1).to(device)


def attention(q: torch.Tensor, kv: LayerKV, plan: StepPlan, scale: float, mask: torch.Tensor) -> torch.Tensor:
    """As reference.attention over a cache in pages. Neighbours with as many tokens go together."""
    if "runs" not in plan.made:
        plan.made["runs"] = _runs(plan, q.device)
    out, first = [], 0
    for q_len, kv_lens, tables, table in plan.made["runs"]:
        here = q[first : first + q_len * len(kv_lens)].view(len(kv_lens), q_len, *q.shape[1:])
        first += q_len * len(kv_lens)
        if kv.quantized and q_len > 1:  # the operator reads codes for one query of a sequence alone
            rows = zip(here, tables, kv_lens, strict=True)
            out += [_over(row, kv, blocks, length, scale, mask) for row, blocks, length in rows]
        else:
            out.append(_attend(here, kv, kv_lens, table, scale, mask).flatten(0, 1))
    if not out:
        return q.new_empty(q.shape)
    return out[0] if len(out) == 1 else torch.cat(out)


def _runs(plan: StepPlan, device: torch.device) -> list[tuple[int, list[int], list[list[int]], torch.Tensor]]:
    """Sequences that follow each other and have as many tokens: (how many, lengths with history, their blocks, these as
    a table int32)."""
    runs: list[tuple[int, list[int], list[list[int]]]] = []
    for q_len, kv_len, blocks in zip(plan.q_lens, plan.kv_lens, plan.block_table, strict=True):
        if q_len == 0:
            continue
        if not runs or runs[-1][0] != q_len:
            runs.append((q_len, [], []))
        runs[-1][1].append(kv_len)
        runs[-1][2].append(blocks)
    made = []
    for q_len, kv_lens, tables in runs:
        width = max(map(len, tables))
        rows = [table + [0] * (width - len(table)) for table in tables]
        table = torch.tensor(rows, dtype=torch.int32).to(device, non_blocking=True)
        made.append((q_len, kv_lens, tables, table))
    return made


def decode_attention(
    q: torch.Tensor, kv: LayerKV, plan: DecodePlan, scale: float, mask: torch.Tensor, lengths: HostLengths
) -> torch.Tensor:
    """As reference.decode_attention over a cache in pages; ``lengths`` are the host's."""
    if "table" not in plan.made:
        plan.made["table"] = plan.table.to(torch.int32).contiguous()
        plan.made["lengths"] = lengths.of(plan, plan.table.shape[1] * kv.block_size)
    table, kv_lens = plan.made["table"], plan.made["lengths"]
    return _attend(q.unsqueeze(1), kv, kv_lens, table, scale, mask).view(q.shape)


def _over(
    q: torch.Tensor, kv: LayerKV, blocks: list[int], length: int, scale: float, mask: torch.Tensor
) -> torch.Tensor:
    """q [S, H, hd] of one sequence whose last S tokens they are, over codes that are read back -> [S, H, hd]."""
    k, v = (side.unsqueeze(0) for side in reference.load_kv(kv, blocks, length, q.dtype))
    return _fused(q.unsqueeze(0), k, v, [length], scale, mask, k.shape[2])[0]


def _attend(
    q: torch.Tensor,
    kv: LayerKV,
    kv_lens: list[int],
    table: torch.Tensor,
    scale: float,
    mask: torch.Tensor,
) -> torch.Tensor:
    """q [B, S, H, hd] of B sequences whose last S tokens they are -> [B, S, H, hd]; over codes S is 1."""
    blocks, block_size, kv_heads, head_dim = kv.k.shape
    pages = (blocks, block_size, kv_heads * head_dim)
    paged = {"block_table": table, "block_size": block_size}
    if kv.quantized:
        for side, steps, zeros in (("key", kv.k_scale, kv.k_zero), ("value", kv.v_scale, kv.v_zero)):
            assert steps is not None and zeros is not None
            paged[f"{side}_antiquant_scale"] = steps.transpose(1, 2)
            paged[f"{side}_antiquant_offset"] = zeros.transpose(1, 2)
            paged[f"{side}_antiquant_mode"] = _BY_TOKEN_AND_HEAD
    return _fused(q, kv.k.view(pages), kv.v.view(pages), kv_lens, scale, mask, kv_heads, **paged)


def _fused(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_lens: list[int],
    scale: float,
    mask: torch.Tensor,
    kv_heads: int,
    **paged: Any,
) -> torch.Tensor:
    """q [B, S, H, hd]; k and v [B, M, KVH, hd], or pages with what ``paged`` says of them -> [B, S, H, hd]."""
    batch, tokens, heads, _ = q.shape
    out: torch.Tensor = torch.ops.npu.npu_fused_infer_attention_score(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        atten_mask=mask,
        actual_seq_lengths=[tokens] * batch,
        actual_seq_lengths_kv=kv_lens,
        num_heads=heads,
        scale=scale,
        pre_tokens=2147483647,
        next_tokens=2147483647,
        input_layout="BSND",
        num_key_value_heads=kv_heads,
        sparse_mode=_CAUSAL,
        inner_precise=0,
        **({"block_size": 0} | paged),
    )[0]
    return out
