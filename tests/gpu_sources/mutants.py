"""Kernels that are wrong in one way each, as what is written in their files and what could be written by mistake."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qwenrt.conformance.case import Case
from qwenrt.conformance.weights import MAIN_FORMS

INT4 = next(form for form in MAIN_FORMS if form.name.startswith("int4"))


def _all(case: Case) -> bool:
    return True


@dataclass(frozen=True)
class Mutant:
    """``shows``: the cases of ``op`` in which it can be seen; the first ones suffice for the others."""

    name: str
    module: str
    right: str
    wrong: str
    op: str
    shows: Callable[[Case], bool] = _all


def having(**values: object) -> Callable[[Case], bool]:
    return lambda case: all(getattr(case, name) == value for name, value in values.items())


def _kind(*words: str) -> Callable[[Case], bool]:
    return lambda case: any(word in case.kind for word in words)


def _linears(table: dict[str, tuple[str, str]], op: str, shows: Callable[[Case], bool]) -> list[Mutant]:
    return [Mutant(name, "portable", right, wrong, op, shows) for name, (right, wrong) in table.items()]


def _between(
    table: dict[str, tuple[str, str]], op: str, shows: Callable[[Case], bool] = _all
) -> list[Mutant]:
    return [Mutant(name, "between", right, wrong, op, shows) for name, (right, wrong) in table.items()]


MUTANTS = [
    *_linears(
        {
            "the nibbles of a byte swapped": ("eights, eights >> 4", "eights >> 4, eights"),
            "the halves of a word swapped": ("fours, fours >> 16", "fours >> 16, fours"),
            "the bytes of a half swapped": ("words, words >> 8", "words >> 8, words"),
            "zeros one too large": ("(zeros + 8388608.0)", "(zeros + 8388609.0)"),
            "the scale of the next group": (
                "at, inside = rows[:, None] * groups + g[None, :]",
                "at, inside = rows[:, None] * groups + tl.minimum(g + 1, groups - 1)[None, :]",
            ),
            "the last row of a tile": (
                "tl.store(y_ptr + at, sums.to(dtype), mask=at < N)",
                "tl.store(y_ptr + at, sums.to(dtype), mask=at < N - 1)",
            ),
        },
        "linear",
        _kind("int4 group 32"),
    ),
    *_linears(
        {
            "act-order ignored": ("place = tl.load(perm_ptr + k, mask=k < K, other=0)", "place = k"),
            "inputs behind the last one": (
                "& (k[None, :] < K), other=0.0)",
                "& (k[None, :] < K + 1), other=0.0)",
            ),
        },
        "linear",
        _kind("act-order", "int4 group 20", "int4 offsets"),
    ),
    *_linears(
        {
            "the bias forgotten": ("sums += tl.load(bias_ptr + rows).to(tl.float32)\n", "sums += 0.0\n"),
            "a row too far": (
                "tl.program_id(0) * BN + tl.arange(0, BN), N - 1)",
                "tl.program_id(0) * BN + tl.arange(0, BN) + 1, N - 1)",
            ),
        },
        "linear",
        _kind("dense"),
    ),
    *_linears(
        {
            "gate and up swapped": ("gate, up = tl.split", "up, gate = tl.split"),
            "the norm's weight of its neighbour": ("tl.load(norm_ptr + k,", "tl.load(norm_ptr + K - 1 - k,"),
            "eps forgotten": ("/ K + eps)", "/ K + 1.0)"),
        },
        "norm_gate_up_silu",
        _kind("dense"),
    ),
    *_linears(
        {"the residual of the first row": ("tl.load(residual_ptr + at,", "tl.load(residual_ptr + 0 * at,")},
        "linear_add",
        _kind("dense"),
    ),
    *_linears(
        {
            "the first expert for all": (
                "tl.load(which_ptr + j).to(tl.int64)",
                "tl.load(which_ptr).to(tl.int64)",
            ),
            "the next token's experts": ("(j // RANKS) * K", "(j % RANKS) * K"),
        },
        "norm_moe_add_each",
        having(norm_topk=True),
    ),
    *_between(
        {
            "the wrong half turns": (
                "tl.where(d < half, -partner, partner)",
                "tl.where(d < half, partner, -partner)",
            ),
            "LogN ignored": ("query = (query * by)", "query = (query * 1.0)"),
        },
        "rotary_store_kv",
        having(log_n=True),
    ),
    *_between(
        {
            "keys normed as queries": ("tl.where(is_query, q_weight, k_weight)", "q_weight"),
        },
        "rotary_store_kv",
        having(head_norms=True),
    ),
    *_between(
        {
            "a slot too far": (
                "tl.load(slots_ptr + token, mask=inside, other=0) * KVH",
                "(tl.load(slots_ptr + token, mask=inside, other=0) ^ 1) * KVH",
            ),
            "values rotated": ("tl.where(is_value, passed, y.to", "tl.where(token < 0, passed, y.to"),
        },
        "rotary_store_kv",
        having(cache="float cache", block_size=16),
    ),
    *_between(
        {
            "codes of 256 steps": ("tl.div_rn(high - low, 255.0)", "tl.div_rn(high - low, 256.0)"),
            "codes cut off": ("(steps + 12582912.0) - 12582912.0", "tl.floor(steps)"),
        },
        "rotary_store_kv",
        having(cache="int8 cache"),
    ),
    *_between({"eps forgotten in norms": ("/ width + eps)", "/ width)")}, "rms_norm"),
    *_between({"up without its last": ("gate_at + width", "gate_at + width - 1")}, "silu_and_mul"),
    *(
        Mutant(name, "attention", right, wrong, "decode_attention", shows)
        for name, right, wrong, shows in (
            ("a key too few", ".to(tl.int32) + 1", ".to(tl.int32)", _all),
            (
                "a key too many",
                "high = tl.minimum(low + per_split, length)",
                "high = tl.minimum(low + per_split, length + 1)",
                _all,
            ),
            ("a window of one more", "length - window, 0)", "length - window - 1, 0)", having(window=20)),
            ("the block before", "at // SLOTS, mask=seen", "(at + 1) // SLOTS, mask=seen", _all),
            ("zeros of keys forgotten", "scores += q_sum *", "scores += 0.0 *", _kind("int8")),
            (
                "a split forgotten",
                "tl.sum(out * weight[:, :, None], 1)",
                "tl.sum(out * (weight * (share > 0))[:, :, None], 1)",
                lambda case: "1/513" in case.id,
            ),
            (
                "the neighbour's key head",
                "kv_head = first_head // (H // KVH)",
                "kv_head = KVH - 1 - first_head // (H // KVH)",
                having(heads=(4, 2, 80)),
            ),
        )
    ),
    Mutant(
        "the last of equal ones",
        "choose",
        "tl.min(tl.where(logits == best, ids, vocab), 0)",
        "tl.max(tl.where(logits == best, ids, 0), 0)",
        "choose",
    ),
    Mutant("NaN unseen", "choose", 'tl.where(spoilt, float("nan"), best)', "best", "choose"),
    Mutant(
        "ids without a token",
        "choose",
        "mask=chosen, other=1) == 0",
        "mask=chosen, other=1) <= 1",
        "choose",
        having(gaps=True),
    ),
]
MUTANTS += [
    Mutant(name, "delta", right, wrong, "decode_delta_net", having(heads=(2, 6, 16, 24)))
    for name, right, wrong in (
        (
            "a state of nobody as a beginning",
            "begun = tl.load(position_ptr + row) + 0 * i > 0",
            "begun = i >= 0",
        ),
        (
            "another's state",
            "tl.load(states_ptr + row) * NV + head",
            "(tl.load(states_ptr + row) ^ 1) * NV + head",
        ),
        ("the inputs that were kept in their old places", "kept + (j - 1) * channels", "kept + j * channels"),
        ("nothing forgotten", "s * forget + k[:, None]", "s + k[:, None]"),
        ("what was written unread", "+ tl.sum(k * q, 0) * d", "+ 0.0 * d"),
        ("key heads of neighbours", "head // (NV // NK)", "head % NK"),
        ("a's place taken for b's", "rates_stride + NV + head", "rates_stride + head"),
        ("the gate not gated", "weight * tl.div_rn(z, 1.0 + tl.exp(-z))", "weight * z"),
        ("a norm of padding too", "tl.sum(o * o, 0) / DV", "tl.sum(o * o, 0) / BV"),
    )
]
MUTANTS += [
    Mutant(name, "experts", right, wrong, "norm_moe_add", shows)
    # None of them reads outside of memory, which would end the interpreter.
    for shows, name, right, wrong in (
        (
            having(norm_topk=True, form=INT4),
            "the last token of an expert",
            "here = i < end",
            "here = i < end - 1",
        ),
        (
            having(norm_topk=True, form=INT4),
            "a tile's first token of all",
            "(tile - first_tile) * BT",
            "0 * BT",
        ),
        (having(norm_topk=True, form=INT4), "a rank's token", "asked // RANKS", "asked // (RANKS * 2)"),
        (
            having(norm_topk=True, experts=(6, 2)),
            "the least likely experts",
            "left == tl.max(left, 0)",
            "left == tl.min(tl.where(left < 0, 2.0, left), 0)",
        ),
        (
            having(norm_topk=True, experts=(6, 2)),
            "shares that are no shares",
            "share = tl.div_rn(share, tl.sum(share, 0)",
            "share = tl.div_rn(share, 1.0",
        ),
        (
            having(norm_topk=True, form=INT4),
            "the residual twice",
            "total = x + total",
            "total = x + x + total",
        ),
        (
            having(norm_topk=True, form=INT4),
            "results in the order of experts",
            "(i if RANKS else asked)",
            "i",
        ),
        (
            having(norm_topk=True, form=INT4),
            "scales of the first expert",
            "scales_ptr += which * N * groups",
            "scales_ptr += 0 * N * groups",
        ),
        (
            having(norm_topk=True, form=INT4),
            "an expert's gate and up swapped",
            "gate, up = tl.split",
            "up, gate = tl.split",
        ),
    )
]


def _stream(name: str, right: str, wrong: str, op: str = "linear") -> Mutant:
    return Mutant(name, "stream", right, wrong, op)


GLUON = [
    # of layouts: numbers that meet others than they should
    _stream("halves of a word swapped", "gl.join(low.to", "gl.join(high.to"),
    _stream("inputs of neighbouring steps", ".permute(0, 2, 4, 5, 3, 6, 1)", ".permute(0, 2, 5, 4, 3, 6, 1)"),
    _stream(
        "weights of neighbouring steps",
        ".permute(0, 1, 2, 3, 4, 6, 7, 5, 8)",
        ".permute(0, 1, 2, 3, 4, 7, 6, 5, 8)",
    ),
    _stream(
        "codes of neighbouring steps",
        "(words, words >> 8), gl.join(words >> 4",
        "(words, words >> 4), gl.join(words >> 8",
    ),
    _stream("a row too far", "+ r) * 8 + g, half - 1)", "+ r) * 8 + g + 1, half - 1)"),
    _stream("halves of rows swapped", "row = in_half + h * half", "row = in_half + (1 - h) * half"),
    _stream(
        "the scale of another row", "+ sr // 16 * 8 + sr % 8, half", "+ sr // 16 * 8 + (sr + 1) % 8, half"
    ),
    _stream(
        "the scale of the next group",
        "at_group, here = s_at + unit,",
        "at_group, here = s_at - sk + gl.minimum(unit + sk + 1, units - 1),",
    ),
    _stream("zeros one too large", "halves = (base + part,", "halves = (base + part + 1,"),
    _stream("zeros of groups added", "moved = -scale * moved", "moved = scale * moved"),
    _stream("high and low bits swapped", "product += 16.0 * high", "product = 16.0 * product + high"),
    _stream("offsets forgotten", "product += moved[:, :, None]", "product += 0.0 * moved[:, :, None]"),
    _stream("the last unit twice", "x = gl.where(unit + xk < units, x, 0.0)", "x = x"),
    _stream("units late by one", "w0, w1 = w1, w2", "w0, w1 = w2, w1"),
    _stream(
        "the first token for all",
        "token = gl.minimum(gl.program_id(1) * C + c, T - 1)",
        "token = gl.minimum(0 * c, T - 1)",
    ),
    _stream(
        "the last row of a tile",
        "inside = (in_half < N // 2)[:, None]",
        "inside = (in_half < N // 2 - 1)[:, None]",
    ),
    _stream("the bias of the other half", "gl.load(bias_ptr + row,", "gl.load(bias_ptr + in_half,"),
    _stream("the warps' sums not added", "y = gl.sum(total, 0)", "y = gl.sum(total[:1], 0)"),
    _stream("gate and up swapped", "gate, up = gl.split", "up, gate = gl.split", "norm_gate_up_silu"),
    _stream("the sum of squares of one part", "range(0, parts, BLOCK)", "range(0, 0, BLOCK)", "norm_linear"),
    _stream("headroom forgotten", "/ width + eps) * headroom", "/ width + eps)", "norm_linear"),
    _stream(
        "the residual of the first token",
        "gl.load(residual_ptr + to,",
        "gl.load(residual_ptr + row[:, None],",
        "linear_add",
    ),
]
