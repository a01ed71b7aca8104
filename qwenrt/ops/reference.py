"""The definition of every op in plain torch: any device, differentiable where training needs it, slow.

Rounding is part of a definition. All tokens are flat, [num_tokens, ...]; zero tokens in, zero tokens out.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from qwenrt.ops.steps import NOT_FINITE, DecodePlan, DrawTensors, LayerKV, StepPlan
from qwenrt.ops.types import CanonicalWeight, Packed
from qwenrt.ops.weights import code_tensors

_SHARE = 64  # blocks of each row's table that decode_attention reads at a time


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """x [..., D], weight [D] -> [..., D] in the weight's dtype. The norm is float32; its result is rounded to that
    dtype first and then multiplied by the weight in it (the order Qwen was trained with). Where ``dtype`` is another
    than the weight's, which is float32 then, all of it is float32 and rounded to ``dtype`` at the end (as norms whose
    file has their weights less 1 were trained)."""
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return (normed.to(weight.dtype) * weight).to(dtype or weight.dtype)


def linear(x: torch.Tensor, w: Packed) -> torch.Tensor:
    """x [T, K] -> [T, N] = x Wᵀ + bias. Quantised weights are multiplied as their dequantised values, also in the
    gradient of x."""
    if w.kind == "parts":
        y: torch.Tensor = torch.cat([linear(x, part) for part in w.data["parts"]], dim=-1)
        return y if w.bias is None else y + w.bias
    if w.kind == "dense":
        return F.linear(*_whole_tiles(x, w.data["weight"]), w.bias)
    y = _FrozenLinear.apply(x, w)  # type: ignore[no-untyped-call]
    return y if w.bias is None else y + w.bias


class _FrozenLinear(torch.autograd.Function):
    """x [T, K] times a quantised weight. For the gradient of x it keeps the codes alone, which are there anyway, and
    dequantises them again."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: Packed) -> torch.Tensor:
        ctx.w = w
        perm = w.data.get("perm")
        if perm is not None:
            x = x.index_select(-1, perm)
        return F.linear(*_whole_tiles(x, dequantize(w, x.dtype).t()))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        perm = ctx.w.data.get("perm")
        of_x = F.linear(*_whole_tiles(grad, dequantize(ctx.w, grad.dtype)))
        return of_x if perm is None else torch.empty_like(of_x).index_copy_(-1, perm.long(), of_x), None


_TILE = 32  # inputs that AMX multiplies at once


def _whole_tiles(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x and a weight [N, K] for torch's product of bfloat16 on a CPU with AMX, which reads past the end of rows that
    are no multiple of a tile: NaN behind a row, be it the next one's, would get into its result."""
    if x.dtype != torch.bfloat16 or x.device.type != "cpu":
        return x, weight
    missing = -x.shape[-1] % _TILE
    if missing == 0:
        return x.contiguous(), weight
    return F.pad(x, (0, missing)), F.pad(weight, (0, missing))


def pack(weight: CanonicalWeight, dtype: torch.dtype, device: torch.device) -> Packed:
    """A canonical weight in the layout ``linear`` reads: dense in ``dtype`` (not copied where it is so already),
    int8 codes as they are, int4 codes two to a byte along K (even row in the low half)."""
    bias = None if weight.bias is None else weight.bias.to(device, dtype)
    shape = (weight.out_features, weight.in_features)
    if weight.dense is not None:
        return Packed("dense", *shape, {"weight": weight.dense.to(device, dtype)}, bias)
    codes, scales, zeros = code_tensors(weight)
    if weight.bits == 4:
        codes = F.pad(codes, (0, 0, 0, codes.shape[0] % 2))
        codes = codes[0::2] | (codes[1::2] << 4)
    data = {
        "codes": codes.to(device),
        "scales": scales.to(device),
        "zeros": zeros.to(device),
        "perm": None if weight.perm is None else weight.perm.to(device),
    }
    if weight.offsets is not None:
        data["offsets"] = weight.offsets.to(device)
    kind = f"w{weight.bits}a16"
    return Packed(kind, *shape, data, bias, bits=weight.bits, group_size=weight.group_size)


def dequantize(w: Packed, dtype: torch.dtype) -> torch.Tensor:
    """Packed "w8a16" or "w4a16" -> W [K, N] in ``dtype``, rows in the order of the codes (see perm).

    scale * (code - zero): the difference is exact and so, in float32, is its product with a 16-bit scale; it is
    rounded once, to ``dtype``. Where there are offsets, they are added to that in float32.
    """
    codes, scales, zeros = w.data["codes"], w.data["scales"], w.data["zeros"]
    if w.bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), dim=1).flatten(0, 1)[: w.in_features]
    group = torch.arange(w.in_features, device=codes.device) // w.group_size
    step = codes.to(torch.int16) - zeros.to(torch.int16).index_select(0, group)
    values: torch.Tensor = step.float() * scales.float().index_select(0, group)
    if "offsets" in w.data:
        values += w.data["offsets"].index_select(0, group)
    return values.to(dtype)


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [T, H, hd]; cos, sin float32 [T, rotary_dim], each token's row, both halves alike -> [T, H, hd].

    Half rotation: y = x cos + (-x₂, x₁) sin on the first rotary_dim channels, the rest passes. Computed in
    float32 and rounded once.
    """
    dim = cos.shape[-1]
    head = x[..., :dim].float()
    x1, x2 = head.chunk(2, dim=-1)
    turned = torch.cat((-x2, x1), dim=-1)
    head = (head * cos.unsqueeze(1) + turned * sin.unsqueeze(1)).to(x.dtype)
    return head if dim == x.shape[-1] else torch.cat((head, x[..., dim:]), dim=-1)


def split_gate(qkv: torch.Tensor, heads: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, (2 H + 2 KVH) hd], each query head followed by its gate -> qkv [T, (H + 2 KVH) hd], and gates [T, H, hd].
    ``heads``: (H, KVH, hd)."""
    num_heads, _, head_dim = heads
    rows = qkv.view(qkv.shape[0], -1, head_dim)
    queries, gates = rows[:, : 2 * num_heads].view(-1, num_heads, 2, head_dim).unbind(2)
    return torch.cat((queries, rows[:, 2 * num_heads :]), dim=1).flatten(1), gates


def gate_output(attended: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """[T, H, hd] * sigmoid(gate [T, H, hd]), each in its dtype."""
    return attended * torch.sigmoid(gate)


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """[T, 2I] -> [T, I] = silu(first half) * second half, each in gate_up's dtype."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def router_logits(x: torch.Tensor, router: torch.Tensor) -> torch.Tensor:
    """x [T, D], router [E, D] -> [T, E] in x's dtype: how much each token asks for each expert."""
    return F.linear(x, router.to(x.dtype))


def route(logits: torch.Tensor, top_k: int, norm_topk_prob: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [T, E] -> (weights [T, k] in their dtype, experts int64 [T, k]).

    The softmax is float32 and over all experts; the k largest are kept and, with ``norm_topk_prob``, made to sum
    to 1 before they are rounded.
    """
    weights, experts = logits.float().softmax(-1).topk(top_k, dim=-1)
    if norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights.to(logits.dtype), experts


def quantize_kv(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [T, H, hd] -> codes uint8 [T, H, hd], scale and zero float32 [T, H].

    Asymmetric, per token and head, round to nearest: x ≈ scale * code + zero with zero = min and
    scale = (max - min) / 255. A constant row is exact (all codes 0, scale 0).
    """
    x32 = x.float()
    low, high = x32.amin(-1), x32.amax(-1)
    scale = (high - low) / 255
    step = torch.where(scale > 0, scale, torch.ones_like(scale))
    codes = ((x32 - low.unsqueeze(-1)) / step.unsqueeze(-1)).round_().clamp_(0, 255).to(torch.uint8)
    return codes, scale, low


def signed_codes(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What quantize_kv gives, in the form of int8 codes: x ≈ scale * (code + zero); a constant row has the scale 1."""
    step = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (codes.to(torch.int16) - 128).to(torch.int8), step, zero / step + 128


def dequantize_kv(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """The inverse: codes [..., hd] of either form, scale and zero [...] -> [..., hd] in ``dtype``."""
    scale, zero = scale.unsqueeze(-1), zero.unsqueeze(-1)
    if codes.dtype == torch.int8:
        return ((codes.float() + zero) * scale).to(dtype)
    return (codes.float() * scale + zero).to(dtype)


def fit_to_codes(q: torch.Tensor, k: torch.Tensor, kv: LayerKV | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotated q [T, H, hd] and k [T, KVH, hd] -> q * factor in q's dtype, and (k - offset) / factor, which is what the
    codes of ``kv`` are made of, in float32; both as they are where it has no factors.

    One range of codes serves all channels of a key, so a channel that is large at every token costs the others their
    digits. The factor takes its size and moves to the query; the offset takes its middle. A score loses q · offset
    by that, which is the same for all keys that the query sees: softmax does not notice.
    """
    if kv is None or kv.k_offset is None or kv.k_factor is None:
        return q, k
    by_query = kv.k_factor.repeat_interleave(q.shape[1] // k.shape[1], dim=0)
    return q * by_query.to(q.dtype), (k.float() - kv.k_offset) / kv.k_factor


def store_kv(k: torch.Tensor, v: torch.Tensor, kv: LayerKV, slots: torch.Tensor) -> None:
    """Write k, v [T, KVH, hd] of this step to their slots, int64 [T]. Changes ``kv``."""
    if kv.quantized:
        for x, codes, scale, zero in ((k, kv.k, kv.k_scale, kv.k_zero), (v, kv.v, kv.v_scale, kv.v_zero)):
            assert scale is not None and zero is not None
            made = quantize_kv(x)
            if codes.dtype == torch.int8:
                made = signed_codes(*made)
            for target, value in zip((codes, scale, zero), made, strict=True):
                _put(target, slots, value)
    else:
        _put(kv.k, slots, k)
        _put(kv.v, slots, v)


def _put(cache: torch.Tensor, slots: torch.Tensor, values: torch.Tensor) -> None:
    """Write values [T, ...] to their slots of [num_blocks, block_size, ...], which may lie transposed."""
    if cache.is_contiguous():
        cache.view(-1, *cache.shape[2:]).index_copy_(0, slots, values)
    else:
        cache[slots // cache.shape[1], slots % cache.shape[1]] = values


def load_kv(
    kv: LayerKV, blocks: list[int], length: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first ``length`` cached keys and values of the sequence that owns ``blocks`` -> [length, KVH, hd] x 2."""
    used, first = blocks[: -(-length // kv.block_size)], blocks[0]
    consecutive = used == list(range(first, first + len(used)))  # as a lone sequence's are: nothing to gather
    index = None if consecutive else torch.tensor(used, device=kv.k.device)

    def rows(cache: torch.Tensor) -> torch.Tensor:
        if index is None:
            return cache[first : first + len(used)].flatten(0, 1)[:length]
        return cache.index_select(0, index).flatten(0, 1)[:length]

    if not kv.quantized:
        return rows(kv.k), rows(kv.v)
    assert kv.k_scale is not None and kv.k_zero is not None
    assert kv.v_scale is not None and kv.v_zero is not None
    return (
        dequantize_kv(rows(kv.k), rows(kv.k_scale), rows(kv.k_zero), dtype),
        dequantize_kv(rows(kv.v), rows(kv.v_scale), rows(kv.v_zero), dtype),
    )


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv: LayerKV | None,
    plan: StepPlan,
    scale: float,
    window: int = 0,
) -> torch.Tensor:
    """Causal attention of each sequence over its history and itself.

    q [T, H, hd]; k, v [T, KVH, hd] of this step, already stored in ``kv`` where there is a cache -> [T, H, hd].
    Query j of a sequence sees its keys 0 .. kv_len - q_len + j, of these the last ``window``
    if it is not 0. Without history the step's own k and v serve;
    a quantised cache is always read back, so that a token sees the same values however the prompt was cut.
    Where the plan is not causal, each query sees all keys of its sequence, or those at most ``window`` tokens away.
    """
    fresh = kv is None or not (plan.has_history or kv.quantized)
    if not plan.causal and kv is not None:
        raise ValueError("attention that is not causal has no cache")
    lens = plan.q_lens
    if fresh and len(lens) > 1 and len(set(lens)) == 1 and lens[0] > 0:
        qs, ks, vs = (x.view(len(lens), lens[0], *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        return _attend(qs, ks, vs, scale, window, plan.causal).transpose(1, 2).flatten(0, 1)
    out, start = [], 0
    for i, (q_len, kv_len) in enumerate(zip(lens, plan.kv_lens, strict=True)):
        here = slice(start, start + q_len)
        start += q_len
        if q_len == 0:
            continue
        if fresh:
            keys, values = k[here], v[here]
        else:
            assert kv is not None
            keys, values = load_kv(kv, plan.block_table[i], kv_len, q.dtype)
        qs, ks, vs = (x.transpose(0, 1).unsqueeze(0) for x in (q[here], keys, values))
        out.append(_attend(qs, ks, vs, scale, window, plan.causal)[0].transpose(0, 1))
    return torch.cat(out) if out else q.new_empty(q.shape)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int, causal: bool
) -> torch.Tensor:
    """q [B, H, n, hd], k, v [B, KVH, m, hd], n <= m; the last query sees all keys (bottom-right aligned), or the
    last ``window`` of them. Not causal (n = m): every query sees all keys, or those at most ``window`` away."""
    n, m = q.shape[2], k.shape[2]
    if window and m > window + n - 1:  # keys that no query sees
        k, v = k[:, :, m - window - n + 1 :], v[:, :, m - window - n + 1 :]
        m = k.shape[2]
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    if n == 1:  # decoding: torch's fused kernel takes 2 (float32) to 7 (bfloat16) times as long on a CPU
        weights = ((q.float() * scale) @ k.float().transpose(-1, -2)).softmax(-1)
        return (weights @ v.float()).to(q.dtype)
    mask = None
    if not causal:
        if window:
            mask = torch.ones(n, n, dtype=torch.bool, device=q.device).tril(window).triu(-window)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    if n < m or 0 < window < n:
        mask = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)
        if window:
            mask = mask.triu(m - n - window + 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)


def decode_attention(
    q: torch.Tensor, kv: LayerKV, plan: DecodePlan, scale: float, window: int = 0
) -> torch.Tensor:
    """As attention, for one token of each sequence whose key and value are in ``kv``: q [B, H, hd] -> [B, H, hd].

    No length is the host's: every slot of every row of the table is looked at, and those not in use are masked,
    whatever they hold. So it can be captured.
    """
    rows, heads, head_dim = q.shape
    kv_heads, slots = kv.k.shape[2], plan.table.shape[1] * kv.block_size
    at = torch.arange(slots, device=q.device)
    unseen = at > plan.position[:, None]
    if window:
        unseen = unseen | (at <= plan.position[:, None] - window)
    # A share of the table at a time: all rows are as long as the longest one's table.
    shares = list(
        zip(torch.split(plan.table, _SHARE, 1), torch.split(unseen, _SHARE * kv.block_size, 1), strict=True)
    )

    def read(
        side: tuple[torch.Tensor | None, ...], table: torch.Tensor, unseen: torch.Tensor
    ) -> torch.Tensor:
        x, *codes = (None if part is None else part[table].flatten(1, 2) for part in side)
        assert x is not None
        if codes[0] is not None and codes[1] is not None:
            x = dequantize_kv(x, codes[0], codes[1], q.dtype)
        return x.float().masked_fill(unseen[:, :, None, None], 0.0).transpose(1, 2)

    scaled = (q.float() * scale).reshape(rows, kv_heads, heads // kv_heads, head_dim)
    scores = [scaled @ read((kv.k, kv.k_scale, kv.k_zero), *share).transpose(-1, -2) for share in shares]
    every = torch.cat(scores, -1) if len(scores) > 1 else scores[0]
    weights = every.masked_fill(unseen[:, None, None, :], -torch.inf).softmax(-1)
    parts = zip(torch.split(weights, _SHARE * kv.block_size, -1), shares, strict=True)
    out, *others = (part @ read((kv.v, kv.v_scale, kv.v_zero), *share) for part, share in parts)
    for other in others:
        out = out + other
    return out.reshape(rows, heads, head_dim).to(q.dtype)


def decode_slots(plan_table: torch.Tensor, position: torch.Tensor, block_size: int) -> torch.Tensor:
    """Where the tokens at ``position`` int64 [B] go, by their rows of the table int64 [B, W] -> slots int64 [B]."""
    block = plan_table.gather(1, (position // block_size).unsqueeze(1)).squeeze(1)
    return block * block_size + position % block_size


def choose(
    logits: torch.Tensor, draw: DrawTensors | None, width: int, unused: torch.Tensor | None = None
) -> torch.Tensor:
    """One token of each row of logits float32 [R, V] -> int64 [R], NOT_FINITE where a row is not finite.

    Ids ``unused`` int64 are never chosen. A row's token is the first of its largest logits at temperature 0 (all rows
    where ``draw`` is None). Else logits are divided by the temperature, and kept are: the top_k largest (0: all); of
    these, as they fall, those before which less than top_p of their probability lies, the first always; of these, those
    at least min_p times as likely as the first. Of equal ones the lower id comes first. The kept tokens' probabilities
    are summed in the order of ids, in float64, and the token where the sum passes ``uniform`` of the whole is taken: a
    last-bit difference in the logits can hardly change it, a neighbour in the batch not at all.

    ``width``: how many of a row's largest are sorted, at least Draw.width of each row. No shape depends on data and
    nothing waits for the device, so it can be captured.
    """
    finite = logits.isfinite().all(-1)
    if unused is not None:
        logits = logits.index_fill(1, unused, -torch.inf)
    tokens = logits.argmax(-1)
    if draw is not None:
        tokens = torch.where(draw.temperature > 0, _drawn(logits, draw, width), tokens)
    return torch.where(finite, tokens, NOT_FINITE)


def _drawn(logits: torch.Tensor, draw: DrawTensors, width: int) -> torch.Tensor:
    """`choose` of rows with a temperature; what it gives of others, and of rows with NaN, means nothing."""
    vocab = logits.shape[1]
    # The largest becomes 0 first, so that a tiny temperature cannot overflow.
    scaled = (logits - logits.amax(-1, keepdim=True)) / draw.temperature.clamp(min=1e-8).unsqueeze(1)
    kept = scaled >= draw.min_p.log().unsqueeze(1)
    mass = scaled.exp().double()
    if width:
        kept = kept & _among_first(scaled, mass, draw, width)
    total = mass.masked_fill(~kept, 0.0).cumsum(-1)
    whole = total[:, -1:]
    # A product rounded up to the whole would point behind the last token.
    goal = torch.minimum(draw.uniform.unsqueeze(1) * whole, whole.nextafter(torch.zeros_like(whole)))
    return torch.searchsorted(total, goal, right=True).clamp(max=vocab - 1).squeeze(1)


def _among_first(scaled: torch.Tensor, mass: torch.Tensor, draw: DrawTensors, width: int) -> torch.Tensor:
    """Which of each row [R, V] top_k and top_p keep -> bool [R, V]."""
    best = scaled.topk(width).values
    rank = torch.arange(width, device=scaled.device)
    counts = torch.where(draw.top_k > 0, draw.top_k, scaled.shape[1]).unsqueeze(1)
    first = best.exp().double().masked_fill(rank >= counts, 0.0)
    every = torch.where(draw.top_k > 0, first.sum(-1), mass.sum(-1)).unsqueeze(1)
    before = first.cumsum(-1) - first
    top_p = draw.top_p.double().unsqueeze(1)
    counted = (rank < counts) & ((before < top_p * every) | (top_p >= 1) | (rank == 0))
    count = counted.sum(-1, keepdim=True)
    last = best.gather(1, count - 1)
    # Of those equal to the last one, as many as are left, the lower ids first.
    equal = scaled == last
    left = count - (best > last).sum(-1, keepdim=True)
    kept = (scaled > last) | (equal & (equal.cumsum(-1) <= left))
    return kept | ((draw.top_k == 0) & (draw.top_p >= 1)).unsqueeze(1)


def advance(ids: torch.Tensor, position: torch.Tensor, tokens: torch.Tensor) -> None:
    """The tokens that were chosen are the next input: ids int64 [R] and position int64 [R] change in their place. A row
    that is not finite goes on with any token; what comes of it is dropped."""
    ids.copy_(tokens.clamp(min=0))
    position.add_(1)


def linear_of_each(x: torch.Tensor, w: Packed, which: torch.Tensor) -> torch.Tensor:
    """x [T, K], ``w`` with a leading axis of E linears of one kind and shape (types.stacked), ``which``
    int64 [T] -> [T, N]: token t by linear which[t]. Nothing waits for the device, so it can be captured."""
    if w.kind == "parts":
        y = torch.cat([linear_of_each(x, part, which) for part in w.data["parts"]], dim=-1)
        return y if w.bias is None else y + w.bias[which]
    data = {name: value[which] for name, value in w.data.items() if isinstance(value, torch.Tensor)}
    bias = None if w.bias is None else w.bias[which]
    if w.kind == "dense":
        y = torch.einsum("tk,tnk->tn", x, data["weight"])
    else:
        if "perm" in data:
            x = x.gather(1, data["perm"].long())
        y = torch.einsum("tk,tkn->tn", x, _dequantize_each(w, data, x.dtype))
    return y if bias is None else y + bias


def _dequantize_each(w: Packed, data: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """As dequantize, of tensors with a leading axis -> [T, K, N]."""
    codes = data["codes"]
    if w.bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), dim=2).flatten(1, 2)[:, : w.in_features]
    group = torch.arange(w.in_features, device=codes.device) // w.group_size
    step = codes.to(torch.int16) - data["zeros"].to(torch.int16).index_select(1, group)
    values = step.float() * data["scales"].float().index_select(1, group)
    if "offsets" in data:
        values += data["offsets"].index_select(1, group)
    return values.to(dtype)
