"""Kernels that are wrong in one way each: what the self-check at load must find. The list is the lasting part.

A mutant wraps one method of `Kernels`, which is where the loaded library is called: it gets the right method and its
arguments, and gives what a wrong kernel would have given. ``op`` is what must be demoted for it, and nothing else;
``model`` names the model that shows it. Here are single ops; `step_mutants` has the one call for all layers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from qwenrt.ops.types import Packed

Wrong = Callable[..., Any]  # (right, *arguments) -> result


@dataclass(frozen=True)
class Mutant:
    name: str
    method: str
    wrong: Wrong
    op: str
    model: str = "plain"


def mutants(method: str, op: str, model: str = "plain") -> Callable[[dict[str, Wrong]], list[Mutant]]:
    """Mutants of one method by their names."""
    return lambda table: [
        Mutant(f"{method}: {name}", method, wrong, op, model) for name, wrong in table.items()
    ]


def but(struct: Any, **fields: Any) -> Any:
    """A copy of a ctypes struct with other values in some fields."""
    copy = type(struct).from_buffer_copy(struct)
    for name, value in fields.items():
        setattr(copy, name, value)
    return copy


def numbers(values: list[int]) -> Any:
    return (ctypes.c_int64 * len(values))(*values)


def read(address: int, count: int) -> list[int]:
    return list((ctypes.c_int64 * count).from_address(address)) if count else []


# ---- linears


def of_tokens(fewest: int, most: int, method: str, model: str) -> Mutant:
    def wrong(right: Wrong, x: torch.Tensor, *args: Any) -> Any:
        y = right(x, *args)
        return y * 1.01 if y is not None and fewest <= len(x) <= most else y

    return Mutant(f"{method}: scale off at {fewest} to {most} tokens", method, wrong, "linear", model)


def output(change: Callable[[torch.Tensor], Any], enough: int = 1) -> Wrong:
    """A kernel whose result is changed in place where there are so many tokens."""

    def wrong(right: Wrong, x: torch.Tensor, *args: Any) -> Any:
        y = right(x, *args)
        if y is not None and len(y) >= enough:  # None: it refused the numbers
            change(y)
        return y

    return wrong


def matrix(**fields: Any) -> Wrong:
    """A linear that misreads its packed matrix; a callable makes a field's value of the struct."""

    def wrong(right: Wrong, x: torch.Tensor, w: Packed, *args: Any) -> Any:
        native = w.data["native"]
        made = {name: value(native) if callable(value) else value for name, value in fields.items()}
        data = {**w.data, "native": but(native, **made)}
        misread = Packed(w.kind, w.out_features, w.in_features, data, w.bias, w.bits, w.group_size)
        return right(x, misread, *args)

    return wrong


def without_last_input(right: Wrong, x: torch.Tensor, *args: Any) -> Any:
    x = x.clone()
    x[:, -1] = 0
    return right(x, *args)


def massive_costs_neighbours(right: Wrong, x: torch.Tensor, *args: Any) -> Any:
    """One scale for a block with a massive value."""
    step = x[:, :32].abs().amax(1, keepdim=True) / 32639
    some = step > x.abs().mean(1, keepdim=True) / 500
    return right(torch.where(some, torch.cat(((x[:, :32] / step).round() * step, x[:, 32:]), 1), x), *args)


def words_of(right: Wrong, codes: torch.Tensor, words: torch.Tensor, *args: Any) -> Any:
    return right(codes.flip(0).contiguous(), words, *args)


def misplaced(right: Wrong, w: torch.Tensor, into: Any) -> Any:
    right(w, into)
    if into.inputs:
        ctypes.memset(into.inputs, 0, 4)


def fields_of(structs: Any, **fields: Callable[[Any], Any]) -> Any:
    """Copies of ctypes structs, with values made of each in some fields."""
    made = [but(one, **{name: value(one) for name, value in fields.items()}) for one in structs]
    return type(structs)(*made)


def pairs(**fields: Callable[[Any], Any]) -> Wrong:
    """A kernel that misreads what an adapter has for a linear."""
    return lambda right, loras, x, y: right(fields_of(loras, **fields), x, y)


LINEARS = [
    *(
        of_tokens(*tokens, method, model)
        for method, model in (
            ("quant_linear", "codes"),
            ("dense16_linear", "plain"),
            ("dense12_linear", "large"),
        )
        for tokens in ((1, 1), (2, 2), (3, 3), (8, 8), (16, 16), (33, 33), (130, 130))
    ),
    *mutants("quant_linear", "linear", "codes")(
        {
            "codes: zero + 1": matrix(zero=lambda w: w.zero + 1),
            "codes: zeros ignored": matrix(zeros=None),
            "codes: perm ignored": matrix(perm=None),
            "codes: bias ignored": matrix(bias=None),
            "codes: float32 scales read as float16": matrix(scales_are_float=0),
            "codes: last row of weights": output(lambda y: y[:, -1].zero_()),
            "codes: last token of many": output(lambda y: y[-1].zero_(), 9),
            "codes: last input ignored": without_last_input,
            "codes: infinity unnoticed": lambda right, x, *rest: right(x.clamp(max=1e3), *rest),
            "codes: massive values cost neighbours": massive_costs_neighbours,
        }
    ),
    *mutants("pack", "linear", "codes")(
        {
            "codes: inputs in the wrong order": words_of,
        }
    ),
    *mutants("repack", "linear", "codes")(
        {
            "words: perm ignored": lambda right, stored, perm, words, weight: right(
                stored, None, words, weight
            ),
            "words: first input's codes lost": lambda right, stored, *rest: right(
                torch.cat((torch.zeros_like(stored[:1]), stored[1:])).contiguous(), *rest
            ),
        }
    ),
    *mutants("dense16_linear", "linear")(
        {
            "16 bits: a row of zeros": output(lambda y: y[:, 5].zero_()),
            "16 bits: last row of weights": output(lambda y: y[:, -1].zero_()),
            "16 bits: last token of many": output(lambda y: y[-1].zero_(), 9),
            "16 bits: last input ignored": without_last_input,
            "16 bits: infinity unnoticed": lambda right, x, *rest: right(x.clamp(max=1e3), *rest),
            "16 bits: bias ignored": lambda right, x, weight, bias, *rest: right(x, weight, None, *rest),
        }
    ),
    *mutants("dense16_linear", "linear", "half")(
        {
            "16 bits: float16 read as bfloat16": lambda right, x, weight, *rest: right(
                x, weight.view(torch.bfloat16), *rest
            ),
        }
    ),
    *mutants("dense12_linear", "linear", "large")(
        {
            "12 bits: a row of zeros": output(lambda y: y[:, 5].zero_()),
            "12 bits: last token of many": output(lambda y: y[-1].zero_(), 9),
            "12 bits: bias ignored": matrix(bias=None),
            "12 bits: exponent + 1": matrix(smallest=lambda w: w.smallest + 1),
            "12 bits: weights without a code ignored": matrix(first=lambda w: _zeros(w.out_features + 1)),
        }
    ),
    *mutants("pack12_others", "linear", "large")(
        {
            "12 bits: an input's place is wrong": misplaced,
        }
    ),
    *mutants("unpack12", "linear", "large")(
        {
            "12 bits: a row not read back": lambda right, w, out, first: (
                right(w, out, first),
                out[-1].zero_(),
            ),
        }
    ),
    *mutants("pack12", "linear", "large")(
        {
            "12 bits: inputs off by one": lambda right, weight, into: right(weight.roll(1, 1), into),
        }
    ),
]

_kept: dict[int, Any] = {}


def _zeros(count: int) -> int:
    """The address of so many int32, which stay."""
    memory = _kept.setdefault(count, (ctypes.c_int32 * count)())
    return ctypes.addressof(memory)


# ---- rounding at load


def rounded(field: str, number: Any, more: int = 1) -> Wrong:
    """The first number of a result is another one."""

    def wrong(right: Wrong, rounding: Any) -> Any:
        done = right(rounding)
        number.from_address(getattr(rounding, field)).value += more
        return done

    return wrong


ROUNDING = [
    *mutants("quantize", "quantize_dense")(
        {
            "rounding: clips not tried": lambda right, r: right(but(r, num_clips=1)),
            "rounding: a code": rounded("words", ctypes.c_uint32),
            "rounding: a zero": rounded("zeros", ctypes.c_int16),
            "rounding: a scale by a thirtieth": rounded("scales", ctypes.c_int32, 1 << 18),
            "rounding: zeros in the middle": lambda right, r: right(but(r, sym=1)),
            "rounding: float16 as bfloat16": lambda right, r: right(but(r, dtype=r.dtype % 2)),
        }
    ),
]


# ---- between the linears


def attention(
    sequences: Callable[[Any], Any] = lambda s: s,
    cache: Callable[[Any], Any] = lambda c: c,
    scale: float = 1.0,
    window: Callable[[int], int] = lambda w: w,
    after: Callable[[torch.Tensor], Any] = lambda out: None,
) -> Wrong:
    def wrong(right: Wrong, seqs: Any, kv: Any, q: Any, out: torch.Tensor, factor: float, size: int) -> None:
        out.zero_()
        kept = sequences(seqs)  # with the memory it points at
        right(kept, cache(kv), q, out, factor * scale, window(size))
        after(out)

    return wrong


def sequences_with(**fields: Callable[[list[int]], list[int]]) -> Callable[[Any], Any]:
    """Sequences whose lists are changed; ``blocks`` are those of all."""

    def change(s: Any) -> Any:
        count, kv_lens = s.count, read(s.kv_lens, s.count)
        tables = read(s.tables, count)
        sizes = {"blocks": tables[-1] + -(-kv_lens[-1] // 16)}
        made = {
            name: numbers(f(read(getattr(s, name), sizes.get(name, count)))) for name, f in fields.items()
        }
        copy = but(s, **{name: ctypes.addressof(memory) for name, memory in made.items()})
        copy.memory = made
        return copy

    return change


def one_less(values: list[int]) -> list[int]:
    return [max(1, value - 1) for value in values]


def eps_off(right: Wrong, x: Any, weight: Any, eps: float) -> Any:
    return right(x, weight, eps * 100)


BETWEEN = [
    *mutants("attend", "attention")(
        {
            "window + 1": attention(window=lambda w: w and w + 1),
            "window - 1": attention(window=lambda w: w and w - 1),
            "window ignored": attention(window=lambda w: 0),
            "kv_len - 1": attention(sequences_with(kv_lens=one_less)),
            "last sequence forgotten": attention(lambda s: but(s, count=s.count - 1)),
            "a block of another sequence": attention(sequences_with(blocks=lambda b: b[:1] + b[:-1])),
            "scale of scores": attention(scale=1.01),
            "last query of many": attention(after=lambda out: out[-1].zero_()),
            "last head": attention(after=lambda out: out[:, -1].zero_()),
            "keys for values": attention(cache=lambda c: but(c, v=c.k)),
            "int8 keys: zero of values": attention(cache=lambda c: but(c, k_zero=c.v_zero)),
            "int8 values: scale of keys": attention(cache=lambda c: but(c, v_scale=c.k_scale)),
        }
    ),
    *mutants("rms_norm", "rms_norm")(
        {
            "eps of a norm": eps_off,
            "a norm's weight ignored": lambda right, x, w, eps: right(x, torch.ones_like(w), eps),
            "a norm's last row of many": output(lambda y: y[-1].zero_(), 9),
            "a norm's last column": output(lambda y: y[..., -1].zero_()),
            "mean over one less": lambda right, x, w, eps: right(x, w, eps) * (1 - 1 / x.shape[-1]) ** 0.5,
        }
    ),
    *mutants("silu_and_mul", "silu_and_mul")(
        {
            "silu of the wrong half": lambda right, x: right(x.roll(x.shape[1] // 2, 1)),
            "sigmoid for silu": lambda right, x: x.chunk(2, 1)[0].sigmoid() * x.chunk(2, 1)[1],
            "silu's last row of many": output(lambda y: y[-1].zero_(), 9),
            "silu's last column": output(lambda y: y[:, -1].zero_()),
        }
    ),
    *mutants("lora", "add_lora")(
        {
            "an adapter's scale": pairs(scale=lambda pair: pair.scale * 1.01),
            "an adapter's last rank ignored": pairs(rank=lambda pair: max(0, pair.rank - 1)),
            "DoRA ignored": pairs(row_scale=lambda _: None),
            "DoRA scales the linear's bias": pairs(bias=lambda _: None),
            "an adapter's bias ignored": pairs(added=lambda _: None),
            "pairs of the first rows": pairs(first_row=lambda _: 0),
            "an adapter for the token before": pairs(first_token=lambda pair: max(0, pair.first_token - 1)),
            "an adapter's last token": pairs(
                last_token=lambda pair: max(pair.first_token, pair.last_token - 1)
            ),
            "tokens beyond a tile": lambda right, loras, x, y: right(
                fields_of(loras, last_token=lambda pair: min(pair.last_token, pair.first_token + 16)), x, y
            ),
            "an adapter sees no last input": lambda right, loras, x, y: right(
                loras, torch.cat((x[:, :-1], torch.zeros_like(x[:, -1:])), 1), y
            ),
        }
    ),
    *mutants("gate_output", "gate_output")(
        {
            "gates ignored": lambda right, x, gate: x.clone(),
            "silu for a gate's sigmoid": lambda right, x, gate: right(x, gate) * gate,
            "gates of the next head": lambda right, x, gate: right(x, gate.roll(1, 1)),
            "gates of the first token": lambda right, x, gate: right(x, gate[:1].expand_as(gate)),
            "gates' last channel": output(lambda y: y[..., -1].zero_()),
        }
    ),
]


def rotary(cache: Callable[[Any], Any] = lambda c: c, **fields: Callable[[Any], Any]) -> Wrong:
    """The seam's kernel that misreads a field; a value is made of the struct."""

    def wrong(right: Wrong, struct: Any, kv: Any, tokens: int) -> Any:
        struct.tokens = tokens
        kept = {name: value(struct) for name, value in fields.items()}
        memory = {name: v for name, v in kept.items() if isinstance(v, ctypes.Array)}
        kept.update({name: ctypes.addressof(v) for name, v in memory.items()})
        return right(but(struct, **kept), None if kv is None else cache(kv), tokens)

    return wrong


def stored(change: Callable[[int], int]) -> Callable[[Any], Any]:
    """The slots of the step's tokens."""

    def change_all(struct: Any) -> Any:
        return numbers([change(slot) for slot in read(struct.slots, struct.tokens)] if struct.slots else [0])

    return change_all


ROTARY = [
    *mutants("rotary_store", "rotary_store_kv")(
        {
            "LogN ignored": rotary(q_scale=lambda s: None),
            "norms of heads ignored": rotary(q_norm=lambda s: None, k_norm=lambda s: None),
            "keys by the norm of queries": rotary(k_norm=lambda s: s.q_norm),
            "eps of heads": rotary(eps=lambda s: s.eps * 100),
            "cos for sin": rotary(sin=lambda s: s.cos),
            "half of the channels turned": rotary(rotary_dim=lambda s: s.rotary_dim // 2),
            "stale slot": rotary(slots=stored(lambda slot: slot % 16)),
            "next slot": rotary(slots=stored(lambda slot: slot + 1)),
            "int8: middle of keys ignored": rotary(cache=lambda c: but(c, k_offset=_zeros(4096))),
            "int8: factor of keys ignored": rotary(cache=lambda c: but(c, k_offset=None, k_factor=None)),
            "nothing stored": rotary(cache=lambda c: None),
            "keys and values swapped": rotary(cache=lambda c: but(c, k=c.v, v=c.k)),
            "int8: zeros swapped": rotary(cache=lambda c: but(c, k_zero=c.v_zero, v_zero=c.k_zero)),
            "int8: scales swapped": rotary(cache=lambda c: but(c, k_scale=c.v_scale, v_scale=c.k_scale)),
        }
    ),
]


# ---- choosing tokens


def second(right: Wrong, logits: torch.Tensor) -> Any:
    return right(logits.where(logits != logits.amax(1, keepdim=True), -1e9))


def late(right: Wrong, logits: torch.Tensor) -> Any:
    """Of equal ones the last."""
    size = logits.shape[1]
    found = right(logits.flip(1).contiguous())
    return [(size - 1 - token, largest, finite) for token, largest, finite in found]


def top(change: Callable[[torch.Tensor, torch.Tensor, float], Any], **instead: Any) -> Wrong:
    def wrong(right: Wrong, row: Any, largest: float, heat: float, k: int, with_whole: bool) -> Any:
        given = {"largest": largest, "heat": heat, "k": k, **instead}
        return change(*right(row, given["largest"], given["heat"], given["k"], with_whole))

    return wrong


CHOOSING = [
    *mutants("argmax_finite", "choose")(
        {
            "second likeliest": second,
            "last logit ignored": lambda right, x: right(x[:, :-1].contiguous()),
            "last of equal ones": late,
            "NaN unnoticed": lambda right, x: [(*found[:2], True) for found in right(x)],
            "first row only": lambda right, x: right(x[:1]) * len(x),
        }
    ),
    *mutants("topk", "choose")(
        {
            "heat ignored": top(lambda *found: found, heat=1.0),
            "ids off by one": top(lambda values, ids, whole: (values, ids - 1, whole)),
            "one of them twice": top(
                lambda v, ids, whole: (v, ids.index_fill(1, torch.tensor([64]), int(ids[0, 0])), whole)
            ),
            "last one too small": top(
                lambda v, ids, whole: (v - (torch.arange(65) == 64).float(), ids, whole)
            ),
            "mass of the largest alone": top(lambda v, ids, whole: (v, ids, float(v.logsumexp(1)))),
        }
    ),
]


MUTANTS = [*LINEARS, *ROUNDING, *BETWEEN, *ROTARY, *CHOOSING]
