"""At load, every override runs against its definition at the model's shapes; a wrong one goes.

Nobody in the field notices a silently wrong kernel, so a part of a second of every load goes into this. Here ops are
looked at one by one, in each regime that their code has; ``qwenrt.model.trial`` looks at whole steps of a small model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator

import torch

from qwenrt.backends.base import Backend
from qwenrt.backends.binding import OpSpec
from qwenrt.config.quant import ROUNDED
from qwenrt.ops import lora, quantization, reference
from qwenrt.ops.steps import DecodePlan, Draw, DrawTensors, LayerCache, LayerKV, StepPlan, Vocabulary
from qwenrt.ops.types import CanonicalWeight, LoraPair, LoraSpan, Packed
from qwenrt.ops.weights import with_codes

# Largest error allowed, relative to the largest value of the definition's result.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
# Tokens of a step: what multiplies one, a few, a tile or many of them is other code, and the last ones end a tile.
REGIMES = (1, 2, 3, 8, 16, 33, 130)

_LARGE = 1 << 20  # weights of a linear, from which on backends may choose other code
_FEW_ROWS = 43  # of a weight, for what would take long beside many


def check(
    backend: Backend,
    dtype: torch.dtype,
    heads: tuple[int, int, int],
    linears: Iterable[tuple[int, int, int, int]],
    stored: torch.dtype = torch.bfloat16,
) -> dict[str, str]:
    """Run each override of an op against its definition and demote those that differ -> what was demoted and why.

    ``heads``: (H, KVH, hd). ``linears``: the distinct (out_features, in_features, bits, group_size) of the model;
    those of 16 bits are ``stored`` in that dtype.
    """
    checks: dict[str, Callable[[], float]] = {
        "linear": lambda: _worst(_linears(backend, dtype, linears, stored)),
        "norm_linear": lambda: _worst(_seams(backend, "norm_linear", dtype, linears, stored)),
        "linear_add": lambda: _worst(_seams(backend, "linear_add", dtype, linears, stored)),
        "norm_gate_up_silu": lambda: _worst(_seams(backend, "norm_gate_up_silu", dtype, linears, stored)),
        "store_kv": lambda: _worst(_store_kv(backend, dtype, heads)),
        "attention": lambda: _worst(_attention(backend, dtype, heads)),
        "rms_norm": lambda: _worst(_rms_norm(backend, dtype)),
        "silu_and_mul": lambda: _worst(_silu_and_mul(backend, dtype)),
        "gate_output": lambda: _worst(_gate_output(backend, dtype, heads)),
        "add_lora": lambda: _worst(_add_lora(backend, dtype)),
        "rotary": lambda: _worst(_rotary(backend, dtype, heads)),
        "rotary_store_kv": lambda: _worst(_rotary_store_kv(backend, dtype, heads)),
        "decode_attention": lambda: _worst(_decode_attention(backend, dtype, heads)),
        "choose": lambda: _worst(_choose(backend)),
        "choose_rows": lambda: _worst(_choose_rows(backend)),
    }
    bad = {}
    for op, run in checks.items():
        if not backend.overrides(op) or backend.why_not(op, OpSpec(op, "", dtype, heads[2])) is not None:
            continue
        why = complaint(run, TOLERANCE[dtype] + backend.rounding(op))
        if why is not None:
            bad[op] = why
            backend.demote(op, why)
    return bad


def complaint(run: Callable[[], float], allowed: float) -> str | None:
    """What is wrong with code whose largest relative error ``run`` finds, or None."""
    try:
        error = run()
    except Exception as failure:  # a kernel that cannot even run must not stop the load
        return f"self-check: {type(failure).__name__}: {str(failure)[:160]}"
    if error <= allowed:
        return None
    return f"self-check: differs from its definition by {error:.2g} (relative)"


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference, relative to the largest value of ``wanted``, or to the smallest with all of its dtype's
    digits; infinite where one is NaN, or where dtype or shape differ."""
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        return math.inf
    if not got.numel():
        return 0.0
    digits = torch.finfo(wanted.dtype).tiny if wanted.is_floating_point() else 0.0
    scale = wanted.float().abs().max().clamp_min(max(1e-6, digits))
    error = float((got.float() - wanted.float()).abs().max() / scale)
    return math.inf if math.isnan(error) else error  # a NaN would be lost in the max() of several


def cache_error(got: LayerKV, wanted: LayerKV) -> float:
    """As `relative`, of all that two caches hold. A value halfway between two codes may have either."""
    worst = 0.0
    for side in ("k", "v"):
        codes = getattr(got, side), getattr(wanted, side)
        if not wanted.quantized:
            worst = max(worst, relative(*codes))
            continue
        for part in ("scale", "zero"):
            worst = max(worst, relative(getattr(got, f"{side}_{part}"), getattr(wanted, f"{side}_{part}")))
        apart = (codes[0].int() - codes[1].int()).abs()
        # one in a hundred is as much as float32 is allowed
        beside = float((apart == 1).float().mean()) * 0.01
        worst = max(worst, beside, (int(apart.max()) - 1) / 255)
    return worst


def fill_cache(cache: LayerCache, value: float) -> None:
    """Make every slot hold ``value``; a code is 1, with that scale and zero."""
    for tensor in cache.tensors:
        tensor.fill_(value if tensor.is_floating_point() else 1)


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
    scales = scales.half()
    if bits == 4 and group <= ROUNDED["int4"].group_size:  # as rounding at load makes them
        scales = quantization.narrow_scales(scales.float(), zeros, bits)
    return CanonicalWeight(codes=codes, scales=scales, zeros=zeros, bits=bits, group_size=group)


def _worst(errors: Iterator[float]) -> float:
    return max(errors, default=0.0)


def _generator(backend: Backend) -> Callable[..., torch.Tensor]:
    source = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=source).to(backend.device)

    return normal


# ---- linears


def _linears(
    backend: Backend,
    dtype: torch.dtype,
    linears: Iterable[tuple[int, int, int, int]],
    stored: torch.dtype,
) -> Iterator[float]:
    """Every shape, and of each kind of weight one in all the forms that files give it. Whole inputs, and rows enough to
    meet every code path: several threads, a last block that is not full, and what a backend does in large linears."""
    seen = set()
    shapes = sorted(
        {(min(n, max(128, -(-_LARGE // k)) + 5), k, bits, group) for n, k, bits, group in linears}
    )
    tokens = _generator(backend)(max(REGIMES), max((k for _, k, _, _ in shapes), default=1))
    tokens[2::7, 0] = 700
    for n, k, bits, group in shapes:
        forms = [_with_quiet_input(random_weight(n, k, bits, group), stored)]
        if (bits, group) not in seen:
            seen.add((bits, group))
            forms += _other_forms(forms[0])
        for form in forms:
            yield from _linear(backend, dtype, form, tokens[:, :k].to(dtype).contiguous())


def _with_quiet_input(weight: CanonicalWeight, stored: torch.dtype) -> CanonicalWeight:
    """The first input counts for next to nothing, so that a massive value there shows what its neighbours lose. A dense
    weight has also a few values far above the others."""
    if weight.codes is not None and weight.zeros is not None:
        weight.codes[0] = weight.zeros[0].to(torch.uint8)
        return weight
    dense = weight.dense
    assert dense is not None
    dense[::7, dense.shape[1] // 2] = 32 * dense.shape[1] ** -0.5
    dense[:, 0] *= 2.0**-10
    return CanonicalWeight(dense=dense.to(stored), bias=_bias(weight))


def _bias(weight: CanonicalWeight) -> torch.Tensor:
    return torch.linspace(-1, 1, weight.out_features)


def _other_forms(weight: CanonicalWeight) -> list[CanonicalWeight]:
    """Of a dense weight: with another use. Of codes: words of a GPTQ file with act-order, one zero for all and a bias;
    and a few rows of them with scales that need float32, with zeros and with offsets as GGUF has them."""
    if weight.codes is None or weight.scales is None or weight.zeros is None:
        return [dataclasses.replace(weight, shared=True)]
    rows, inputs, bits = weight.out_features, weight.in_features, weight.bits
    source = torch.Generator().manual_seed(2)
    words = torch.randint(-(2**31), 2**31 - 1, (-(-inputs * bits // 32), rows), generator=source)
    part, middle = rows // 16 * 8, 1 << bits - 1
    words[0] = (words[0] >> bits << bits) + middle  # the first input, as above
    sym = dataclasses.replace(
        weight,
        codes=None,
        words=(words[:, :part].int(), words[:, part:].int()),
        num_inputs=inputs,
        zeros=torch.full_like(weight.zeros, middle),
        perm=torch.randperm(inputs, generator=source).int(),
        bias=_bias(weight),
    )
    few = slice(0, _FEW_ROWS)
    fine = dataclasses.replace(
        weight,
        codes=weight.codes[:, few].contiguous(),
        scales=weight.scales[:, few].float() * (1 + 2.0**-15),
        zeros=weight.zeros[:, few].contiguous(),
    )
    return [sym, fine, _with_offsets(fine)]


def _with_offsets(weight: CanonicalWeight) -> CanonicalWeight:
    """About the same values by offsets, which are no whole numbers of steps but in the first group, whose first input
    stays quiet. Of several groups the last one has the scale 0, as files have for a group of one value."""
    assert weight.scales is not None and weight.zeros is not None
    offsets = -weight.scales * (weight.zeros + 0.3)
    offsets[0] = -weight.scales[0] * weight.zeros[0]
    scales = weight.scales.clone()
    if len(scales) > 1:
        scales[-1] = 0.0
    return dataclasses.replace(weight, scales=scales, zeros=None, offsets=offsets)


def _linear(
    backend: Backend, dtype: torch.dtype, weight: CanonicalWeight, x: torch.Tensor
) -> Iterator[float]:
    """Every number of tokens of x [T, K], some of which have a massive value in the first input."""
    codes = with_codes(weight)
    native = backend.pack_linear(weight if backend.packs_words() else codes, dtype)
    plain = reference.pack(codes, dtype, backend.device)
    wanted = reference.linear(x, plain)  # once: the definition takes most of the time
    for tokens in REGIMES:
        yield relative(backend.linear(x[-tokens:], native), wanted[-tokens:])
    if weight.dense is None and weight.out_features > _FEW_ROWS:
        return
    # Weights are read back for training, and for tokens that a kernel refuses; these alone are spoilt.
    yield relative(backend.linear(x[-3:].clone().requires_grad_(), native).detach(), wanted[-3:])
    x, wanted = x[-33:].clone(), wanted[-33:]
    x[0, -1] = math.inf
    got = backend.linear(x, native)
    yield relative(got[1:], wanted[1:])
    yield math.inf if bool(got[0].isfinite().any()) else 0.0


def _seams(
    backend: Backend,
    op: str,
    dtype: torch.dtype,
    linears: Iterable[tuple[int, int, int, int]],
    stored: torch.dtype,
) -> Iterator[float]:
    """A linear with what a layer asks for beside it, of one token and of several, of each kind of weight."""
    defined, kinds = Backend(backend.device), {(bits, group): (n, k) for n, k, bits, group in linears}
    for (bits, group), (n, k) in kinds.items():
        n = min(n, _FEW_ROWS + 1)
        weight = _with_quiet_input(random_weight(n, k, bits, group), stored)
        native, plain = (b.pack_linear(weight, dtype) for b in (backend, defined))
        x, residual = (_generator(backend)(3, size).to(dtype) for size in (k, n))
        norm = _generator(backend)(k).to(dtype)

        def call(b: Backend, w: Packed, rows: slice, x=x, norm=norm, residual=residual) -> torch.Tensor:  # type: ignore[no-untyped-def]
            args = (x[rows], w, residual[rows]) if op == "linear_add" else (x[rows], norm, 1e-6, w)
            result: torch.Tensor = getattr(b, op)(*args)
            return result

        for rows in (slice(1), slice(3)):
            yield relative(call(backend, native, rows), call(defined, plain, rows))


# ---- attention and its cache


def _store_kv(backend: Backend, dtype: torch.dtype, heads: tuple[int, int, int]) -> Iterator[float]:
    """Tokens to slots of several blocks, out of order; other slots must keep what they hold."""
    _, num_kv_heads, head_dim = heads
    normal = _generator(backend)
    slots = _slots(backend)
    k, v = (normal(len(slots), num_kv_heads, head_dim).to(dtype) for _ in range(2))
    for quantized in (False, True):
        native, defined = _two_caches(backend, dtype, heads, quantized)
        backend.store_kv(k, v, native, slots)
        reference.store_kv(k, v, defined, slots)
        yield cache_error(native, defined)


def _slots(backend: Backend) -> torch.Tensor:
    """Where 33 tokens go in a cache of four blocks: late ones first."""
    return backend.send(list(range(60, 27, -1)))


def _two_caches(
    backend: Backend, dtype: torch.dtype, heads: tuple[int, int, int], quantized: bool, blocks: int = 4
) -> list[LayerKV]:
    made = [
        backend.alloc_kv(1, blocks, backend.block_size, *heads[1:], dtype, quantized)[0] for _ in range(2)
    ]
    for kv in made:
        fill_cache(kv, 1.0)
    return made


def _rotary(backend: Backend, dtype: torch.dtype, heads: tuple[int, int, int]) -> Iterator[float]:
    x = _generator(backend)(33, heads[0], heads[2]).to(dtype)
    angles = _generator(backend)(33, heads[2] // 2).repeat(1, 2)
    yield relative(
        backend.rotary(x, angles.cos(), angles.sin()), reference.rotary(x, angles.cos(), angles.sin())
    )


def _rotary_store_kv(backend: Backend, dtype: torch.dtype, heads: tuple[int, int, int]) -> Iterator[float]:
    """33 tokens with and without norms and LogN into both kinds of cache; what is stored is compared as well."""
    num_heads, num_kv_heads, head_dim = heads
    normal, slots = _generator(backend), _slots(backend)
    tokens = len(slots)
    qkv = normal(tokens, (num_heads + 2 * num_kv_heads) * head_dim).to(dtype)
    qkv[1] *= 1e-3  # as small as eps
    norms = (normal(head_dim).to(dtype), normal(head_dim).to(dtype), 1e-6)
    angles, q_scale = normal(tokens, head_dim // 2).repeat(1, 2), normal(tokens).abs() + 0.5
    plan = StepPlan([tokens], [61], slots, [[0, 1, 2, 3]])
    offset, factor = normal(num_kv_heads, head_dim), normal(num_kv_heads, head_dim).abs().exp2()
    defined = Backend(backend.device)
    for qk_norms, scale, quantized in ((norms, q_scale, False), (None, None, False), (None, q_scale, True)):
        args = (qkv, heads, qk_norms, angles.cos(), angles.sin(), scale)
        ours, theirs = _two_caches(backend, dtype, heads, quantized)
        for kv in (ours, theirs) if quantized else ():
            kv.k_offset, kv.k_factor = offset, factor
        got = backend.rotary_store_kv(*args, ours, plan)
        wanted = defined.rotary_store_kv(*args, theirs, plan)
        yield from map(relative, got, wanted)
        yield cache_error(ours, theirs)


# Of each sequence of a step: how many tokens it has now, and in the cache.
_LENGTHS = ((1, 700), (5, 300), (33, 290), (16, 21), (1, 16), (200, 200))


def _attention(backend: Backend, dtype: torch.dtype, heads: tuple[int, int, int]) -> Iterator[float]:
    """Long and short, decoded and cut prompts in one step, over both kinds of cache, with NaN in every unused slot; all
    keys, and a window that begins inside of a block."""
    head_dim, num_kv_heads = heads[2], min(heads[1], 2)
    num_heads = num_kv_heads * (heads[0] // heads[1])
    normal, block = _generator(backend), backend.block_size
    sizes = [-(-kv_len // block) for _, kv_len in _LENGTHS]
    order = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(1)).tolist()
    tables = [[order.pop() for _ in range(size)] for size in sizes]
    every = [
        [table[p // block] * block + p % block for p in range(n)]
        for (_, n), table in zip(_LENGTHS, tables, strict=True)
    ]
    q_lens, kv_lens = [q for q, _ in _LENGTHS], [n for _, n in _LENGTHS]
    now = [slots[-q:] for q, slots in zip(q_lens, every, strict=True)]
    keys, values = (normal(sum(kv_lens), num_kv_heads, head_dim).to(dtype) for _ in range(2))
    index = torch.tensor([slot for slots in every for slot in slots], device=backend.device)
    plan = StepPlan(q_lens, kv_lens, backend.send([slot for slots in now for slot in slots]), tables)
    q = normal(plan.num_tokens, num_heads, head_dim).to(dtype)
    assert plan.slots is not None
    places = {slot: i for i, slot in enumerate(index.tolist())}
    step = torch.tensor([places[slot] for slot in plan.slots.tolist()], device=backend.device)
    for quantized in (False, True):
        kv = backend.alloc_kv(1, sum(sizes), block, num_kv_heads, head_dim, dtype, quantized)[0]
        fill_cache(kv, math.nan)
        reference.store_kv(keys, values, kv, index)
        for window in (0, 20):
            args = (q, keys[step], values[step], kv)
            scale = head_dim**-0.5
            got = backend.attention(*args, plan, scale, window)
            yield relative(got, reference.attention(*args, plan, scale, window))


def _decode_attention(backend: Backend, dtype: torch.dtype, heads: tuple[int, int, int]) -> Iterator[float]:
    """A token of each of three sequences over both kinds of cache, with NaN in unused slots and blocks of others behind
    those in use; all keys, and a window."""
    head_dim, num_kv_heads = heads[2], min(heads[1], 2)
    num_heads = num_kv_heads * (heads[0] // heads[1])
    normal, block = _generator(backend), backend.block_size
    lengths = (1, 2 * block + 5, 4 * block)
    table = torch.randperm(12, generator=torch.Generator().manual_seed(1)).view(3, 4).to(backend.device)
    position = backend.send([length - 1 for length in lengths])
    plan = DecodePlan(position, table, reference.decode_slots(table, position, block))
    slots = [int(table[i, p // block]) * block + p % block for i, n in enumerate(lengths) for p in range(n)]
    keys, values = (normal(len(slots), num_kv_heads, head_dim).to(dtype) for _ in range(2))
    q = normal(len(lengths), num_heads, head_dim).to(dtype)
    for quantized in (False, True):
        kv = backend.alloc_kv(1, 12, block, num_kv_heads, head_dim, dtype, quantized)[0]
        fill_cache(kv, math.nan)
        reference.store_kv(keys, values, kv, backend.send(slots))
        for window in (0, 20):
            args = (q, kv, plan, head_dim**-0.5, window)
            yield relative(backend.decode_attention(*args), reference.decode_attention(*args))


# ---- between the linears


def _rows(backend: Backend, dtype: torch.dtype) -> torch.Tensor:
    """Rows from nearly nothing to very large, longer than whatever a kernel takes at once, and not a multiple of it."""
    x = _generator(backend)(max(REGIMES), 1004)
    return (x * torch.logspace(-3, 1.5, len(x), device=x.device)[:, None]).to(dtype)


def _each_row(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """As `relative`, each row by itself."""
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        return math.inf
    return max(map(relative, got, wanted))


def _rms_norm(backend: Backend, dtype: torch.dtype) -> Iterator[float]:
    x = _rows(backend, dtype)
    weight = _generator(backend)(x.shape[1]).to(dtype)
    for part in (x[-1:], x):
        yield _each_row(backend.rms_norm(part, weight, 1e-6), reference.rms_norm(part, weight, 1e-6))


def _silu_and_mul(backend: Backend, dtype: torch.dtype) -> Iterator[float]:
    x = _rows(backend, dtype)
    for part in (x[-1:], x):
        yield _each_row(backend.silu_and_mul(part), reference.silu_and_mul(part))


def _gate_output(backend: Backend, dtype: torch.dtype, heads: tuple[int, int, int]) -> Iterator[float]:
    """Gates between queries, as the linear gives them."""
    num_heads, _, head_dim = heads
    source = _generator(backend)
    attended = source(19, num_heads, head_dim).to(dtype)
    gates = (4 * source(19, num_heads, 2, head_dim)).to(dtype)[:, :, 1]
    for rows in (slice(18, 19), slice(0, 19)):
        got, wanted = (ops.gate_output(attended[rows], gates[rows]) for ops in (backend, reference))
        yield relative(got, wanted)


def _add_lora(backend: Backend, dtype: torch.dtype) -> Iterator[float]:
    """Tokens of two adapters and of none: one with two plain pairs, of which the first does not begin the linear's
    rows; one with all that an adapter may have. Widths and ranks are no multiples of what a kernel takes at once."""
    source = _generator(backend)
    x, y, bias = source(35, 1004).to(dtype), source(35, 203).to(dtype), source(203).to(dtype)

    def pair(first: int, rows: int, rank: int, full: bool) -> LoraPair:
        a, b = source(rank, 1004) / 32, source(rank, rows).t()
        return LoraPair(
            a, b, 0.5, first, 1 + source(rows) / 4 if full else None, source(rows) if full else None
        )

    plain, full = (pair(5, 70, 16, False), pair(90, 113, 3, False)), (pair(0, 203, 9, True),)
    for cuts in ((0, 1, 1, 2), (0, 17, 18, 35), (0, 2, 6, 9)):
        spans = [LoraSpan(plain, *cuts[:2]), LoraSpan(full, *cuts[2:])]
        args = (y[: cuts[-1]], x[: cuts[-1]], spans, bias)
        yield _each_row(backend.add_lora(*args), lora.add_lora(*args))


# ---- choosing tokens


def _logits(backend: Backend) -> torch.Tensor:
    """Rows of logits: the largest is the first, the last, twice there; infinity, NaN and its opposite."""
    logits = _generator(backend)(6, 2011)
    size = logits.shape[1]
    for row, places in enumerate([(0,), (size - 1,), (700, 1500)]):
        logits[row, list(places)] = 9.0
    logits[3, 1234], logits[4, size - 1], logits[5, 3] = math.inf, math.nan, -math.inf
    return logits


# Ways to draw, each with several numbers: all tokens, the largest few, those that hold a share, and cuts between
# equals.
_DRAWS = [
    Draw(temperature, top_k, top_p, min_p, uniform)
    for temperature, top_k, top_p, min_p in (
        (0.7, 65, 1.0, 0.0),
        (0.7, 0, 0.6, 0.0),
        (1.3, 40, 0.9, 0.01),
        (1.0, 0, 1.0, 0.0),
    )
    for uniform in (0.02, 0.3, 0.55, 0.8, 0.97, 0.9999)
]


def _choose(backend: Backend) -> Iterator[float]:
    """Greedy tokens of rows of all sorts, ids without a token among them; and drawn ones of a flat row, in which each
    number has its own token."""
    logits = _logits(backend)
    size = logits.shape[1]
    unused = frozenset({0, 700, size - 1})
    for vocabulary in (Vocabulary(size), Vocabulary(size - 1), Vocabulary(size, unused)):
        yield _same_tokens(backend, logits, [Draw()] * len(logits), vocabulary)
    row = logits[1].clamp(max=3.0) / 2  # a few equal ones at the top, and most of the mass in the middle
    flat = row.expand(len(_DRAWS), size)
    for vocabulary in (Vocabulary(size), Vocabulary(size, unused)):
        yield _same_tokens(backend, flat, _DRAWS, vocabulary)


def _choose_rows(backend: Backend) -> Iterator[float]:
    """The same rows with draws that lie on the device."""
    logits, size = _logits(backend), 2011
    row = (logits[1].clamp(max=3.0) / 2).expand(len(_DRAWS), size).contiguous()
    draw, unused = DrawTensors.of(_DRAWS, backend.device), backend.send([0, 700, size - 1])
    for x, how, width in ((logits, None, 0), (row, draw, size)):
        wanted = reference.choose(x, how, width, unused)
        got = backend.choose_rows(x.clone(), how, width, unused)
        yield 0.0 if got.shape == wanted.shape and bool((got == wanted).all()) else math.inf


def _same_tokens(backend: Backend, logits: torch.Tensor, draws: list[Draw], vocabulary: Vocabulary) -> float:
    got = backend.choose(logits.clone(), draws, vocabulary)
    wanted = Backend(backend.device).choose(logits.clone(), draws, vocabulary)
    return 0.0 if got.shape == wanted.shape and bool((got == wanted).all()) else math.inf
