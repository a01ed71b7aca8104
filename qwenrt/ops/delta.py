"""The definition of the ops of linear attention (gated delta nets) in plain torch: any device, differentiable.

Sources: Yang, Kautz, Hatamizadeh, "Gated Delta Networks" (arXiv 2412.06464); and Qwen3-Next's and Qwen3.5's own code
for the order in which numbers are rounded. Tokens are flat; a plan says which belong to which sequence. A sequence's
state is carried from step to step: token by token where they are few, so that drafts and answers move it alike, and by
chunks where they are many.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F

from qwenrt.ops.steps import DecodePlan, LayerState, StepPlan

L2_EPS = 1e-6  # of queries and keys, whatever eps the norms have
CHUNK = 64  # tokens of a sequence, from its first one on, that are computed together in matrix products
_MANY = 8  # tokens of a step from where on that costs less than going through them


def _sequences(plan: StepPlan) -> Iterator[tuple[slice, int | None, int]]:
    """Of each sequence that has tokens: where they are, the slot of its state (None without a cache), and the position
    of the first."""
    start = 0
    slots: list[int] | list[None] = plan.state_slots or [None] * len(plan.q_lens)
    for q_len, kv_len, slot in zip(plan.q_lens, plan.kv_lens, slots, strict=True):
        if q_len:
            yield slice(start, start + q_len), slot, kv_len - q_len
        start += q_len


def split_gate(
    projected: torch.Tensor, heads: tuple[int, int, int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, C + nv dv] -> what goes into the convolution [T, C], and the output's gate z [T, nv, dv]. ``heads``: (nk, nv,
    dk, dv)."""
    _, nv, _, dv = heads
    mixed, z = projected.split_with_sizes((projected.shape[-1] - nv * dv, nv * dv), dim=-1)
    return mixed, z.reshape(-1, nv, dv)


def split_heads(
    mixed: torch.Tensor, heads: tuple[int, int, int, int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the convolution gives [T, C] -> q, k [T, nk, dk] and v [T, nv, dv]."""
    nk, nv, dk, dv = heads
    q, k, v = mixed.split_with_sizes((nk * dk, nk * dk, nv * dv), dim=-1)
    return q.reshape(-1, nk, dk), k.reshape(-1, nk, dk), v.reshape(-1, nv, dv)


def causal_conv(
    x: torch.Tensor, weight: torch.Tensor, state: LayerState | None, plan: StepPlan
) -> torch.Tensor:
    """silu of a causal convolution, channel by channel: x [T, C], weight [K, C] -> [T, C].

    u[t, c] = silu(sum over j < K of weight[j, c] x[t - K + 1 + j, c]), what is before a sequence's start being 0.
    Summed in float32 in this order and rounded once. ``state.conv`` gives the K - 1 tokens before, and takes the last.
    """
    taps, parts = weight.shape[0], []
    for here, slot, first in _sequences(plan):
        before = x.new_zeros(taps - 1, x.shape[1])
        if state is not None and slot is not None and first > 0:
            before = state.conv[slot].to(x.dtype)
        rows = torch.cat((before, x[here]))
        count = rows.shape[0] - taps + 1
        total = rows[:count].float() * weight[0].float()
        for j in range(1, taps):
            total = total + rows[j : j + count].float() * weight[j].float()
        parts.append(F.silu(total).to(x.dtype))
        if state is not None and slot is not None:
            state.conv[slot].copy_(rows[count:])
    return torch.cat(parts) if parts else x


def decode_conv(x: torch.Tensor, weight: torch.Tensor, state: LayerState, plan: DecodePlan) -> torch.Tensor:
    """As causal_conv, of one token of each sequence: x [B, C] -> [B, C]. Nothing is the host's."""
    rows = torch.cat((_held(state.conv, plan).to(x.dtype), x[:, None]), dim=1)
    total = rows[:, 0].float() * weight[0].float()
    for j in range(1, weight.shape[0]):
        total = total + rows[:, j].float() * weight[j].float()
    _hold(state.conv, plan, rows[:, 1:])
    return F.silu(total).to(x.dtype)


def _held(kept: torch.Tensor, plan: DecodePlan) -> torch.Tensor:
    """What each sequence has in ``kept`` [slots, ...] -> [B, ...]; 0 where it begins."""
    assert plan.states is not None
    begins = (plan.position == 0).view(-1, *[1] * (kept.dim() - 1))
    return kept.index_select(0, plan.states).masked_fill(begins, 0)


def _hold(kept: torch.Tensor, plan: DecodePlan, values: torch.Tensor) -> None:
    assert plan.states is not None
    kept.index_copy_(0, plan.states, values.to(kept.dtype))


def rates(
    ba: torch.Tensor, log_decay: torch.Tensor, decay_bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """ba [T, 2 nv] (b of each value head, then a) -> float32 beta = sigmoid(b), the share of what is predicted wrongly
    that is written, and g = -exp(log_decay) softplus(a + decay_bias) <= 0, what is forgotten: both [T, nv]."""
    b, a = ba.float().chunk(2, dim=-1)
    return torch.sigmoid(b), -log_decay.exp() * F.softplus(a + decay_bias)


def gated_delta(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor,
    state: LayerState | None,
    plan: StepPlan,
    tiled: bool = False,
) -> torch.Tensor:
    """The gated delta rule of each sequence: q, k [T, nk, dk], v [T, nv, dv], beta, g float32 [T, nv] -> o float32
    [T, nv, dv]. Value head h reads query and key head h // (nv / nk), or h mod nk where they are ``tiled``.

    Queries and keys are divided by their lengths, queries by sqrt(dk) as well. Then for each token, S [dk, dv] of each
    value head being 0 at a sequence's start and ' transposing:  S <- e^g S;  d = beta (v - S'k);  S <- S + k d';
    o = S'q.  S is read once for that: p = e^g S'k, s = e^g S'q, d = beta (v - p), o = s + (k'q) d, S <- e^g S + k d'.
    All of it is float32, and o stays so: it leaves float16's range in long texts. ``state.delta`` holds S. A step's
    bits depend on where it cuts a prompt, unless at multiples of CHUNK tokens.
    """
    q, k, v = _of_value_heads(q, k, v, tiled)
    parts = []
    for here, slot, first in _sequences(plan):
        if state is not None and slot is not None and first > 0:
            s = state.delta[slot].clone()
        else:
            s = v.new_zeros(v.shape[1], k.shape[2], v.shape[2])
        rows = (q[here], k[here], v[here], beta[here], g[here], s)
        o, s = by_tokens(*rows) if here.stop - here.start < _MANY else by_chunks(*rows, first)
        parts.append(o)
        if state is not None and slot is not None:
            state.delta[slot].copy_(s)
    return torch.cat(parts) if parts else v


def decode_delta(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor,
    state: LayerState,
    plan: DecodePlan,
    tiled: bool = False,
) -> torch.Tensor:
    """As gated_delta, of one token of each sequence, T = B. Nothing is the host's."""
    q, k, v = _of_value_heads(q, k, v, tiled)
    kq, both = torch.stack((k, q), dim=2), (k * q).sum(-1, keepdim=True)
    o, s = _one_token(kq, both, v, beta, g.exp(), _held(state.delta, plan))
    _hold(state.delta, plan, s)
    return o


def _of_value_heads(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tiled: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q and k [T, nk, dk] of unit length for each value head [T, nv, dk], q scaled, and v; all float32."""
    each = v.shape[1] // k.shape[1]
    q, k = (_unit(x.float()) for x in (q, k))
    q, k = (x.repeat(1, each, 1) if tiled else x.repeat_interleave(each, dim=1) for x in (q, k))
    return q * q.shape[-1] ** -0.5, k, v.float()


def _unit(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS)


def by_tokens(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor,
    s: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence, token by token: q, k [n, nv, dk] (of unit length, q scaled), v [n, nv, dv], beta, g [n, nv],
    S [nv, dk, dv], all float32 -> o [n, nv, dv], S."""
    decay = g.exp()
    kq = torch.stack((k, q), dim=2)  # [n, nv, 2, dk]
    both = (k * q).sum(-1, keepdim=True)
    out = []
    for t in range(q.shape[0]):
        o, s = _one_token(kq[t], both[t], v[t], beta[t], decay[t], s)
        out.append(o)
    return torch.stack(out), s


def _one_token(
    kq: torch.Tensor,
    both: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    decay: torch.Tensor,
    s: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """k beside q [..., nv, 2, dk] and their product [..., nv, 1], v [..., nv, dv], beta and e^g [..., nv],
    S [..., nv, dk, dv] -> o [..., nv, dv], S."""
    forget = decay[..., None]
    predicted, read = (torch.matmul(kq, s) * forget[..., None]).unbind(-2)
    d = beta[..., None] * (v - predicted)
    moved = s * forget[..., None] + kq[..., 0, :, None] * d[..., None, :]
    return read + both * d, moved


def by_chunks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor,
    s: torch.Tensor,
    first: int = 0,
    size: int = CHUNK,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, ``size`` tokens at a time in matrix products. Chunks begin at multiples of ``size``; the first token
    has the position ``first``. A token that is not finite spoils those before it in its chunk too.

    In a chunk, G being the sums of g up to each token and D_ij = e^(G_i - G_j) for j <= i, else 0:
    A = tril(diag(beta) K K' * D, -1);  (I + A) U = diag(beta) V;  (I + A) W = diag(beta e^G) K;  N = U - W S;
    O = diag(e^G) Q S + tril(Q K' * D) N;  S <- e^(G_last) S + (diag(e^(G_last - G)) K)' N.
    """
    parts = []
    edges = [0, *range(size - first % size, q.shape[0], size), q.shape[0]]
    for here in (slice(*pair) for pair in pairwise(edges)):
        q_, k_, v_ = (x[here].transpose(0, 1) for x in (q, k, v))
        b, total = beta[here].T, g[here].T.cumsum(-1)
        n = q_.shape[1]
        seen = torch.ones(n, n, dtype=torch.bool, device=q.device).tril()
        decay = (total[:, :, None] - total[:, None, :]).masked_fill(~seen, -torch.inf).exp()
        a = (b[:, :, None] * (k_ @ k_.mT) * decay).tril(-1)
        right = torch.cat((b[:, :, None] * v_, (b * total.exp())[:, :, None] * k_), dim=-1)
        eye = torch.eye(n, dtype=q.dtype, device=q.device)
        solved = torch.linalg.solve_triangular(eye + a, right, upper=False, unitriangular=True)
        u, w = solved.split_with_sizes((v_.shape[-1], k_.shape[-1]), dim=-1)
        written = u - w @ s
        out = (q_ * total.exp()[:, :, None]) @ s + ((q_ @ k_.mT) * decay).tril() @ written
        last = total[:, -1:]
        s = s * last.exp()[:, :, None] + (k_ * (last - total).exp()[:, :, None]).mT @ written
        parts.append(out.transpose(0, 1))
    return torch.cat(parts) if parts else v, s


def gated_norm(o: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """o float32 [T, nv, dv], z [T, nv, dv], weight float32 [dv] -> [T, nv, dv] in z's dtype: rms_norm of each head in
    float32, rounded; multiplied by the weight and silu(z) in float32, rounded again."""
    normed = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + eps)
    return (normed.to(z.dtype).float() * weight * F.silu(z.float())).to(z.dtype)
