"""At load, every override of a primitive runs once at the model's shapes against its definition; a wrong one goes.

Nobody in the field notices a silently wrong kernel, so this takes about a tenth of a second of every load to do so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch

from qwenrt.backends.base import PRIMITIVES, SEAMS, Backend, OpSpec
from qwenrt.ops import reference
from qwenrt.ops.types import CanonicalWeight, StepPlan

# Largest error allowed, relative to the largest value of the definition's result.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}

_LARGE = 1 << 20  # weights


def check(
    backend: Backend,
    dtype: torch.dtype,
    heads: tuple[int, int, int],
    linears: Iterable[tuple[int, int, int, int]],
) -> dict[str, str]:
    """Run each native primitive, and the seam around rotary, against its definition and demote those that differ
    -> what was demoted and why.

    ``heads``: (H, KVH, hd). ``linears``: the distinct (out_features, in_features, bits, group_size) of the model.
    """
    checks: dict[str, Callable[[], float]] = {
        "linear": lambda: max((_linear(backend, dtype, *shape) for shape in _samples(linears)), default=0.0),
        "store_kv": lambda: _store_kv(backend, dtype, heads),
        "attention": lambda: _attention(backend, dtype, heads),
        "rms_norm": lambda: _elementwise(backend, dtype, "rms_norm"),
        "silu_and_mul": lambda: _elementwise(backend, dtype, "silu_and_mul"),
        "rotary": lambda: _rotary(backend, dtype, heads),
        "rotary_store_kv": lambda: _rotary_store_kv(backend, dtype, heads),
    }
    bad = {}
    for op in (*PRIMITIVES, *SEAMS):
        spec = OpSpec(op, "self-check", dtype, heads[2])
        if getattr(getattr(type(backend), op), "native", None) is None or op not in checks:
            continue
        if backend.why_not(op, spec) is not None:
            continue
        try:
            error = checks[op]()
            wrong = not error <= TOLERANCE[dtype] + backend.rounding(op)  # NaN is wrong as well
            why = f"self-check: differs from its definition by {error:.2g} (relative)"
        except Exception as failure:  # a kernel that cannot even run must not stop the load
            wrong, why = True, f"self-check: {type(failure).__name__}: {str(failure)[:160]}"
        if wrong:
            bad[op] = backend.demoted[op] = why
    return bad


def _relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        return float("inf")
    scale = wanted.float().abs().max().clamp_min(1e-6)
    error = float((got.float() - wanted.float()).abs().max() / scale)
    return float("inf") if math.isnan(error) else error  # a NaN would be lost in the max() of several


def _generator(backend: Backend) -> Callable[..., torch.Tensor]:
    source = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=source).to(backend.device)

    return normal


def random_weight(
    out_features: int, in_features: int, bits: int, group_size: int, seed: int = 0
) -> CanonicalWeight:
    """A random weight of a given shape and kind, with values of about 1 / sqrt(in_features)."""
    source = torch.Generator().manual_seed(seed)
    spread = in_features**-0.5
    if bits == 16:
        return CanonicalWeight(dense=torch.randn(out_features, in_features, generator=source) * spread)
    group = in_features if group_size == -1 else group_size
    groups = -(-in_features // group)
    codes = torch.randint(0, 2**bits, (in_features, out_features), dtype=torch.uint8, generator=source)
    scales = (torch.rand(groups, out_features, generator=source) + 0.5) * spread * 4 / 2**bits
    zeros = torch.randint(0, 2**bits, scales.shape, dtype=torch.int16, generator=source)
    return CanonicalWeight(codes=codes, scales=scales.half(), zeros=zeros, bits=bits, group_size=group)


def _samples(linears: Iterable[tuple[int, int, int, int]]) -> list[tuple[int, int, int, int]]:
    """Whole inputs, and rows enough to meet every code path: several threads, and what a backend does in large linears.

    Of many linears of a model the same rows are left."""
    return sorted({(min(n, max(256, -(-_LARGE // k))), k, bits, group) for n, k, bits, group in linears})


def _linear(backend: Backend, dtype: torch.dtype, rows: int, k: int, bits: int, group_size: int) -> float:
    weight = random_weight(rows, k, bits, group_size)
    native, defined = backend.pack_linear(weight, dtype), reference.pack(weight, dtype, backend.device)
    x = _generator(backend)(4, k).to(dtype)
    wanted = reference.linear(x, defined)  # once: the definition takes most of the time
    parts = (slice(0, 1), slice(1, 4))  # of one token and of several
    return max(_relative(backend.linear(x[part], native), wanted[part]) for part in parts)


def _store_kv(backend: Backend, dtype: torch.dtype, heads: tuple[int, int, int]) -> float:
    """Four tokens to slots of two blocks, out of order and one nowhere; the other slots must keep what they hold."""
    _, num_kv_heads, head_dim = heads
    normal = _generator(backend)
    k, v = (normal(4, num_kv_heads, head_dim).to(dtype) for _ in range(2))
    slots = torch.tensor([17, 5, -1, 2], device=backend.device)
    native, defined = (backend.alloc_kv(1, 2, 16, num_kv_heads, head_dim, dtype, False)[0] for _ in range(2))
    for tensor in (native.k, native.v, defined.k, defined.v):
        tensor.fill_(1)
    backend.store_kv(k, v, native, slots)
    reference.store_kv(k, v, defined, slots)
    return max(_relative(native.k, defined.k), _relative(native.v, defined.v))


def _attention(backend: Backend, dtype: torch.dtype, heads: tuple[int, int, int]) -> float:
    """A ragged batch of a decode step over 513 tokens and a cut prompt, with NaN in every unused slot."""
    num_heads, num_kv_heads, head_dim = heads
    normal, size, lens = _generator(backend), 16, [(1, 513), (5, 21)]
    blocks = [
        list(range(40, 40 - -(-kv // size), -1)) if i == 0 else [50, 51] for i, (_, kv) in enumerate(lens)
    ]
    kv = backend.alloc_kv(1, 64, size, num_kv_heads, head_dim, dtype, False)[0]
    kv.k.fill_(float("nan"))
    kv.v.fill_(float("nan"))
    every = [table[p // size] * size + p % size for (_, n), table in zip(lens, blocks) for p in range(n)]
    history_k, history_v = (normal(len(every), num_kv_heads, head_dim).to(dtype) for _ in range(2))
    reference.store_kv(history_k, history_v, kv, torch.tensor(every, device=backend.device))
    ends, start = [], 0
    for q_len, kv_len in lens:
        ends += list(range(start + kv_len - q_len, start + kv_len))
        start += kv_len
    index = torch.tensor(ends, device=backend.device)
    plan = backend.plan([q for q, _ in lens], [n for _, n in lens], blocks, [every[i] for i in ends])
    q = normal(len(ends), num_heads, head_dim).to(dtype)
    args = (q, history_k[index], history_v[index], kv)
    scale = head_dim**-0.5
    plain = StepPlan(plan.q_lens, plan.kv_lens, plan.slots, blocks)
    return _relative(backend.attention(*args, plan, scale), reference.attention(*args, plain, scale))


def _elementwise(backend: Backend, dtype: torch.dtype, op: str) -> float:
    x = _generator(backend)(3, 512).to(dtype)
    if op == "silu_and_mul":
        return _relative(backend.silu_and_mul(x), reference.silu_and_mul(x))
    weight = _generator(backend)(512).to(dtype)
    return _relative(backend.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6))


def _rotary(backend: Backend, dtype: torch.dtype, heads: tuple[int, int, int]) -> float:
    x = _generator(backend)(3, heads[0], heads[2]).to(dtype)
    angles = _generator(backend)(3, heads[2] // 2).repeat(1, 2)
    return _relative(
        backend.rotary(x, angles.cos(), angles.sin()), reference.rotary(x, angles.cos(), angles.sin())
    )


def _rotary_store_kv(backend: Backend, dtype: torch.dtype, heads: tuple[int, int, int]) -> float:
    """Three tokens through norms, rotation, LogN and both kinds of cache; what is stored is compared as well."""
    num_heads, num_kv_heads, head_dim = heads
    normal = _generator(backend)
    qkv = normal(3, (num_heads + 2 * num_kv_heads) * head_dim).to(dtype)
    norms = (normal(head_dim).to(dtype), normal(head_dim).to(dtype), 1e-6)
    angles, q_scale = normal(3, head_dim // 2).repeat(1, 2), normal(3).abs() + 0.5
    offset, factor = normal(num_kv_heads, head_dim), normal(num_kv_heads, head_dim).abs().exp2()
    worst = 0.0
    for quantized in (False, True):
        plan, results = backend.plan([3], [3], [[1]], [16, 17, 18]), []
        for rotary_store_kv in (backend.rotary_store_kv, Backend(backend.device).rotary_store_kv):
            kv = backend.alloc_kv(1, 2, 16, num_kv_heads, head_dim, dtype, quantized)[0]
            if quantized:
                kv.k_offset, kv.k_factor = offset, factor
            turned = rotary_store_kv(qkv, heads, norms, angles.cos(), angles.sin(), q_scale, kv, plan)
            stored = reference.load_kv(kv, [1], 3, dtype)
            results.append(torch.cat([part.flatten() for part in (*turned, *stored)]))
        # a code that falls between two may be rounded either way: half a step, which is looked at more kindly
        worst = max(worst, _relative(*results) / (100 if quantized else 1))
    return worst
