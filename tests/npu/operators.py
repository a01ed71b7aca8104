"""The operators of torch_npu that are called, as their documentation defines them, on the CPU.

Written from that documentation and from reports, not from the code that calls them. What hardware refuses, or answers
wrongly in silence, is refused here: a simulator that takes everything would only confirm what the caller believes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

HALF = (torch.float16, torch.bfloat16)


def require(condition: bool, complaint: str) -> None:
    if not condition:
        raise RuntimeError(f"simulated operator: {complaint}")


def rms_norm(
    x: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    require(x.numel() > 0, "empty tensor")
    require(gamma.dtype in (x.dtype, torch.float32), f"gamma {gamma.dtype} beside x {x.dtype}")
    require(x.shape[-1:] == gamma.shape, "gamma is not x's last dimension")
    x32 = x.float()
    rstd = torch.rsqrt(x32.square().mean(-1, keepdim=True) + epsilon)
    return (x32 * rstd * gamma.float()).to(x.dtype), rstd


def rotary_mul(
    x: torch.Tensor, r1: torch.Tensor, r2: torch.Tensor, rotary_mode: str = "half", rotate: Any = None
) -> torch.Tensor:
    require(x.dim() == 4 and x.numel() > 0, "x has to have 4 dimensions and elements")
    batch, tokens, heads, dim = x.shape
    require(r1.shape == r2.shape == (batch, tokens, 1, dim), f"cos {list(r1.shape)} beside x {list(x.shape)}")
    require(rotary_mode == "half" and dim % 2 == 0 and dim < 896, f"mode {rotary_mode}, {dim} channels")
    require(batch < 1000 and heads < 1000, "1000 heads or more")
    cos, sin = (
        r1.to(x.dtype).float(),
        r2.to(x.dtype).float(),
    )  # of another dtype they are rounded to that of x
    first, second = x.float().chunk(2, -1)
    return (x.float() * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)


def swiglu(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    require(x.is_contiguous() and x.numel() > 0 and x.shape[dim] % 2 == 0, "not contiguous, empty or odd")
    gate, up = x.float().chunk(2, dim)
    return (torch.nn.functional.silu(gate) * up).to(x.dtype)


def scatter_nd_update_(x: torch.Tensor, indices: torch.Tensor, updates: torch.Tensor) -> torch.Tensor:
    require(indices.shape == (len(updates), 1), f"indices {list(indices.shape)}")
    require(indices.dtype in (torch.int32, torch.int64) and updates.dtype == x.dtype, "dtypes")
    require(x.shape[1:] == updates.shape[1:], "rows of another shape")
    rows = indices[:, 0].long()
    require(len(rows.unique()) == len(rows), "an index twice: which one is written is not defined")
    require(bool(((rows >= 0) & (rows < len(x))).all()), "an index outside")
    x[rows] = updates
    return x


def weight_quant_batchmatmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    antiquant_scale: torch.Tensor,
    antiquant_offset: torch.Tensor | None = None,
    quant_scale: torch.Tensor | None = None,
    quant_offset: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    antiquant_group_size: int = 0,
    inner_precise: int = 0,
    weight_dtype: int | None = None,
) -> torch.Tensor:
    require(x.dtype in HALF and x.dim() == 2 and x.numel() > 0, f"x {x.dtype} {list(x.shape)}")
    require(antiquant_scale.dtype == x.dtype, "scales of another dtype than x")
    require(weight.is_contiguous() and x.is_contiguous(), "not contiguous")
    if weight.dtype == torch.int32:
        words = weight.long()
        nibbles = torch.stack([words >> 4 * i & 15 for i in range(8)], -1).flatten(1)
        codes = torch.where(nibbles > 7, nibbles - 16, nibbles)
    else:
        require(weight.dtype == torch.int8, f"weight {weight.dtype}")
        codes = weight.long()
    inputs, outputs = codes.shape
    require(x.shape[1] == inputs and max(inputs, outputs) <= 65535, f"matrix of {inputs} x {outputs}")
    group = antiquant_group_size
    require(group == 0 or (group % 32 == 0 and 32 <= group < inputs), f"groups of {group} of {inputs}")
    columns = (-(-inputs // group), outputs) if group else (outputs,)
    require(antiquant_scale.shape == columns, f"scales {list(antiquant_scale.shape)}, not {list(columns)}")

    def rows(side: torch.Tensor) -> torch.Tensor:
        wide = side.float().view(-1, outputs)
        return wide.repeat_interleave(group or inputs, 0)[:inputs]

    values = codes.float()
    if antiquant_offset is not None:
        require(antiquant_offset.shape == columns and antiquant_offset.dtype == x.dtype, "offsets")
        values = values + rows(antiquant_offset)
    dense = (values * rows(antiquant_scale)).to(x.dtype)  # the offset is added first
    y = x.float() @ dense.float()
    if bias is not None:
        wanted = torch.float32 if x.dtype == torch.bfloat16 else torch.float16
        require(bias.dtype == wanted and bias.shape == (outputs,), f"bias {bias.dtype}, not {wanted}")
        y = y + bias.float()
    return y.to(x.dtype)


def grouped_matmul(
    x: list[torch.Tensor],
    weight: list[torch.Tensor],
    *,
    antiquant_scale: list[torch.Tensor] | None = None,
    antiquant_offset: list[torch.Tensor] | None = None,
    group_list: torch.Tensor | None = None,
    split_item: int = 0,
    group_type: int = -1,
    group_list_type: int = 0,
    **others: Any,
) -> list[torch.Tensor]:
    require(len(x) == len(weight) == 1 and not any(others.values()), "one x and one weight are simulated")
    require((split_item, group_type, group_list_type) == (2, 0, 1), "modes")
    require(group_list is not None and group_list.dtype == torch.int64, "counts int64")
    counts = group_list.tolist()
    require(1 < len(counts) <= 1024, f"{len(counts)} groups")
    require(sum(counts) == len(x[0]) and len(counts) == len(weight[0]), "counts are not of all rows")
    matrices = weight[0]
    if matrices.dtype == torch.int32:
        words = matrices.long()
        nibbles = torch.stack([words >> 4 * i & 15 for i in range(8)], -1).flatten(2)
        codes = torch.where(nibbles > 7, nibbles - 16, nibbles).float()
        experts, inputs, outputs = codes.shape
        require(antiquant_scale is not None and antiquant_offset is not None, "scales and offsets of codes")
        (scale,), (offset,) = antiquant_scale, antiquant_offset
        require(scale.dtype == offset.dtype == x[0].dtype and scale.shape == offset.shape, "scales")
        groups = scale.shape[1] if scale.dim() == 3 else 1
        require(
            scale.shape in ((experts, outputs), (experts, groups, outputs)), f"scales {list(scale.shape)}"
        )
        require(inputs % groups == 0, f"{groups} groups of {inputs} inputs")
        scale, offset = (
            side.float().view(experts, groups, outputs).repeat_interleave(inputs // groups, 1)
            for side in (scale, offset)
        )
        matrices = ((codes + offset) * scale).to(x[0].dtype)
    else:
        require(matrices.dtype == x[0].dtype and antiquant_scale is antiquant_offset is None, "dtypes")
    require(x[0].is_contiguous(), "x is not contiguous")
    parts = [part.float() @ w.float() for part, w in zip(x[0].split(counts), matrices, strict=True)]
    return [torch.cat(parts).to(x[0].dtype)]


def fused_infer_attention_score(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    atten_mask: torch.Tensor | None = None,
    actual_seq_lengths: list[int] | None = None,
    actual_seq_lengths_kv: list[int] | None = None,
    block_table: torch.Tensor | None = None,
    num_heads: int = 1,
    scale: float = 1.0,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    sparse_mode: int = 0,
    block_size: int = 0,
    key_antiquant_mode: int = 0,
    value_antiquant_mode: int = 0,
    **others: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Layout BSND, sparse_mode 3, keys and values whole or in pages, these of int8 as well; everything else has been
    reported wrong or is not simulated."""
    antiquant = {name: others.pop(name) for name in list(others) if name.split("_")[0] in ("key", "value")}
    antiquant = {name: x for name, x in antiquant.items() if x is not None}
    open_ended = {name: others.pop(name, 2147483647) for name in ("pre_tokens", "next_tokens")}
    require(set(open_ended.values()) == {2147483647} and not any(others.values()), "others")
    require(input_layout == "BSND" and query.dim() == 4 and query.is_contiguous(), f"layout {input_layout}")
    batch, tokens, heads, dim = query.shape
    kv_heads = num_key_value_heads or num_heads
    require(heads == num_heads and heads % kv_heads == 0 and heads // kv_heads <= 64, "heads")
    require(dim <= 512 and dim % 8 == 0 and heads * dim < 65535, f"head size {dim}")
    require(key.dtype == value.dtype and key.shape == value.shape, "keys and values")
    require(query.dtype in HALF and key.dtype in (query.dtype, torch.int8), f"{query.dtype} over {key.dtype}")
    lengths = actual_seq_lengths_kv
    require(lengths is not None and len(lengths) >= batch, "a length for each sequence")
    mask = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
    require(
        sparse_mode == 3 and atten_mask is not None, "without sparse_mode 3 long prompts were reported wrong"
    )
    require(
        atten_mask.shape == mask.shape and torch.equal(atten_mask.bool(), mask), "1 hides: above the diagonal"
    )
    require(actual_seq_lengths in (None, [tokens] * batch), "lengths of queries")
    modes = key_antiquant_mode, value_antiquant_mode
    if block_table is None:
        require(block_size == 0 and key.dtype == query.dtype and modes == (0, 0), "codes are in pages")
        require(
            key.shape[0] == batch and key.shape[2:] == (kv_heads, dim) and key.is_contiguous(), "layout BSND"
        )
        longest = key.shape[1]
    else:
        require(block_size % 128 == 0 and 128 <= block_size <= 512, f"blocks of {block_size}")
        require(key.shape[1:] == (block_size, kv_heads * dim), f"pages {list(key.shape)}")
        require(block_table.dtype == torch.int32 and len(block_table) == batch, "table")
        longest = block_table.shape[1] * block_size
        require((key.dtype == torch.int8) == bool(antiquant), "scales are of codes")
        if antiquant:
            require(
                tokens == 1 and dim % 32 == 0, "codes in pages are for one query, and heads of 32 channels"
            )
            key, value = _codes(key, value, modes, antiquant, kv_heads)
    out = torch.empty_like(query)
    for b, length in enumerate(lengths[:batch]):
        require(tokens <= length <= longest, f"length {length}")
        pages = None if block_table is None else block_table[b, : -(-length // block_size)].long()
        k, v = (
            (side[b] if pages is None else side[pages])
            .reshape(-1, kv_heads, dim)[:length]
            .float()
            .repeat_interleave(heads // kv_heads, 1)
            for side in (key, value)
        )
        scores = torch.einsum("shd,thd->hst", query[b].float() * scale, k)
        unseen = torch.ones(tokens, length, dtype=torch.bool).triu(length - tokens + 1)
        weights = scores.masked_fill(unseen, -torch.inf).softmax(-1)
        out[b] = torch.einsum("hst,thd->shd", weights, v).to(out.dtype)
    return out, query.new_empty(0)


def _codes(
    key: torch.Tensor,
    value: torch.Tensor,
    modes: tuple[int, int],
    antiquant: dict[str, torch.Tensor],
    kv_heads: int,
) -> list[torch.Tensor]:
    """Mode 5: scales and offsets of each token and head, in pages as well. The offset is added first."""
    require(modes == (5, 5), f"modes {modes}")
    blocks, block_size, _ = key.shape
    made = []
    for name, codes in (("key", key), ("value", value)):
        scale, offset = (antiquant.pop(f"{name}_antiquant_{part}") for part in ("scale", "offset"))
        for side in (scale, offset):
            require(side.shape == (blocks, kv_heads, block_size), f"scales {list(side.shape)}")
            require(side.dtype == torch.float32 and side.is_contiguous(), "scales float32")
        by_head = codes.view(blocks, block_size, kv_heads, -1).float()
        values = (by_head + offset.transpose(1, 2).unsqueeze(-1)) * scale.transpose(1, 2).unsqueeze(-1)
        made.append(values.flatten(2))
    require(not antiquant, "others of keys or values")
    return made


def format_cast(x: torch.Tensor, acl_format: int) -> torch.Tensor:
    """To NZ (29), in whole tiles, or back to ND (2). What lies where is the device's affair."""
    require(acl_format in (2, 29) and x.dim() == 2 and x.dtype in HALF, f"format {acl_format}")
    require(acl_format == 2 or all(size % 16 == 0 for size in x.shape), "tiles that are not whole")
    return x.clone()


OPERATORS: dict[str, Callable[..., Any]] = {
    "npu_rms_norm": rms_norm,
    "npu_rotary_mul": rotary_mul,
    "npu_swiglu": swiglu,
    "npu_scatter_nd_update_": scatter_nd_update_,
    "npu_weight_quant_batchmatmul": weight_quant_batchmatmul,
    "npu_grouped_matmul": grouped_matmul,
    "npu_format_cast": format_cast,
    "npu_fused_infer_attention_score": fused_infer_attention_score,
}
