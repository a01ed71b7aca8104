"""Kernels that are wrong in one way each, as what is written in their files and what could be written by mistake."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qwenrt.conformance.case import Case


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
            "the nibbles of a byte swapped": ("quads, quads >> 4", "quads >> 4, quads"),
            "the bytes of a word swapped": ("pairs, pairs >> 8", "pairs >> 8, pairs"),
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
