"""Kernels that are wrong in one way each: what the self-check at load must find. The list is the lasting part.

A mutant wraps one method of `Kernels`, which is where the loaded library is called: it gets the right method and its
arguments, and gives what a wrong kernel would have given. ``op`` is what must be demoted for it, and nothing else;
``model`` names the model that shows it. Words of the list: a *step* is the one call for all layers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from qwenrt.backends.cpu.attention import Sequences
from qwenrt.backends.cpu.decoder import ExpertsStruct, Layer, Linear
from qwenrt.ops.types import Packed

Wrong = Callable[..., Any]  # (right, *arguments) -> result


@dataclass(frozen=True)
class Mutant:
    name: str
    method: str
    wrong: Wrong
    op: str
    model: str = "plain"


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
        return y * 1.01 if fewest <= len(x) <= most else y

    return Mutant(f"{method}: scale off at {fewest} to {most} tokens", method, wrong, "linear", model)


def output(change: Callable[[torch.Tensor], Any], enough: int = 1) -> Wrong:
    """A kernel whose result is changed in place where there are so many tokens."""

    def wrong(right: Wrong, x: torch.Tensor, *args: Any) -> Any:
        y = right(x, *args)
        if len(y) >= enough:
            change(y)
        return y

    return wrong


def matrix(**fields: Any) -> Wrong:
    """A linear that misreads its packed matrix; a callable makes a field's value of the struct."""

    def wrong(right: Wrong, x: torch.Tensor, w: Packed, *args: Any) -> Any:
        native = w.data["native"]
        made = {name: value(native) if callable(value) else value for name, value in fields.items()}
        data = {**w.data, "native": but(native, **made)}
        return right(x, Packed(w.kind, w.out_features, w.in_features, data, w.bias, w.bits, w.group_size))

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
    Mutant("codes: zero + 1", "quant_linear", matrix(zero=lambda w: w.zero + 1), "linear", "codes"),
    Mutant("codes: zeros ignored", "quant_linear", matrix(zeros=None), "linear", "codes"),
    Mutant("codes: perm ignored", "quant_linear", matrix(perm=None), "linear", "codes"),
    Mutant("codes: bias ignored", "quant_linear", matrix(bias=None), "linear", "codes"),
    Mutant("codes: float32 scales read as float16", "quant_linear", matrix(scales_are_float=0), "linear", "codes"),
    Mutant("codes: last row of weights", "quant_linear", output(lambda y: y[:, -1].zero_()), "linear", "codes"),
    Mutant("codes: last token of many", "quant_linear", output(lambda y: y[-1].zero_(), 9), "linear", "codes"),
    Mutant("codes: last input ignored", "quant_linear", without_last_input, "linear", "codes"),
    Mutant("codes: massive values cost neighbours", "quant_linear", massive_costs_neighbours, "linear", "codes"),
    Mutant("codes: inputs in the wrong order", "pack", words_of, "linear", "codes"),
    Mutant(
        "words: perm ignored",
        "repack",
        lambda right, stored, perm, words, weight: right(stored, None, words, weight),
        "linear",
        "codes",
    ),
    Mutant(
        "words: first input's codes lost",
        "repack",
        lambda right, stored, *rest: right(
            torch.cat((torch.zeros_like(stored[:1]), stored[1:])).contiguous(), *rest
        ),
        "linear",
        "codes",
    ),
    Mutant("16 bits: a row of zeros", "dense16_linear", output(lambda y: y[:, 5].zero_()), "linear"),
    Mutant("16 bits: last row of weights", "dense16_linear", output(lambda y: y[:, -1].zero_()), "linear"),
    Mutant("16 bits: last token of many", "dense16_linear", output(lambda y: y[-1].zero_(), 9), "linear"),
    Mutant("16 bits: last input ignored", "dense16_linear", without_last_input, "linear"),
    Mutant(
        "16 bits: bias ignored",
        "dense16_linear",
        lambda right, x, weight, bias, *rest: right(x, weight, None, *rest),
        "linear",
    ),
    Mutant(
        "16 bits: float16 read as bfloat16",
        "dense16_linear",
        lambda right, x, weight, *rest: right(x, weight.view(torch.bfloat16), *rest),
        "linear",
        "half",
    ),
    Mutant("12 bits: a row of zeros", "dense12_linear", output(lambda y: y[:, 5].zero_()), "linear", "large"),
    Mutant("12 bits: last token of many", "dense12_linear", output(lambda y: y[-1].zero_(), 9), "linear", "large"),
    Mutant("12 bits: bias ignored", "dense12_linear", matrix(bias=None), "linear", "large"),
    Mutant("12 bits: exponent + 1", "dense12_linear", matrix(smallest=lambda w: w.smallest + 1), "linear", "large"),
    Mutant(
        "12 bits: weights without a code ignored",
        "dense12_linear",
        matrix(first=lambda w: _zeros(w.out_features + 1)),
        "linear",
        "large",
    ),
    Mutant("12 bits: an input's place is wrong", "pack12_others", misplaced, "linear", "large"),
]

_kept: dict[int, Any] = {}


def _zeros(count: int) -> int:
    """The address of so many int32, which stay."""
    memory = _kept.setdefault(count, (ctypes.c_int32 * count)())
    return ctypes.addressof(memory)


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
        made = {name: numbers(f(read(getattr(s, name), sizes.get(name, count)))) for name, f in fields.items()}
        copy = but(s, **{name: ctypes.addressof(memory) for name, memory in made.items()})
        copy.memory = made
        return copy

    return change


def one_less(values: list[int]) -> list[int]:
    return [max(1, value - 1) for value in values]


def eps_off(right: Wrong, x: Any, weight: Any, eps: float) -> Any:
    return right(x, weight, eps * 100)


BETWEEN = [
    Mutant("window + 1", "attend", attention(window=lambda w: w and w + 1), "attention"),
    Mutant("window - 1", "attend", attention(window=lambda w: w and w - 1), "attention"),
    Mutant("window ignored", "attend", attention(window=lambda w: 0), "attention"),
    Mutant("kv_len - 1", "attend", attention(sequences_with(kv_lens=one_less)), "attention"),
    Mutant("last sequence forgotten", "attend", attention(lambda s: but(s, count=s.count - 1)), "attention"),
    Mutant("a block of another sequence", "attend", attention(sequences_with(blocks=lambda b: b[:1] + b[:-1])), "attention"),
    Mutant("scale of scores", "attend", attention(scale=1.01), "attention"),
    Mutant("last query of many", "attend", attention(after=lambda out: out[-1].zero_()), "attention"),
    Mutant("last head", "attend", attention(after=lambda out: out[:, -1].zero_()), "attention"),
    Mutant("keys for values", "attend", attention(cache=lambda c: but(c, v=c.k)), "attention"),
    Mutant("int8 keys: zero of values", "attend", attention(cache=lambda c: but(c, k_zero=c.v_zero)), "attention"),
    Mutant("int8 values: scale of keys", "attend", attention(cache=lambda c: but(c, v_scale=c.k_scale)), "attention"),
    Mutant("eps of a norm", "rms_norm", eps_off, "rms_norm"),
    Mutant("a norm's weight ignored", "rms_norm", lambda right, x, w, eps: right(x, torch.ones_like(w), eps), "rms_norm"),
    Mutant("a norm's last row of many", "rms_norm", output(lambda y: y[-1].zero_(), 9), "rms_norm"),
    Mutant("a norm's last column", "rms_norm", output(lambda y: y[..., -1].zero_()), "rms_norm"),
    Mutant(
        "mean over one less",
        "rms_norm",
        lambda right, x, w, eps: right(x, w, eps) * (1 - 1 / x.shape[-1]) ** 0.5,
        "rms_norm",
    ),
    Mutant("silu of the wrong half", "silu_and_mul", lambda right, x: right(x.roll(x.shape[1] // 2, 1)), "silu_and_mul"),
    Mutant("sigmoid for silu", "silu_and_mul", lambda right, x: x.chunk(2, 1)[0].sigmoid() * x.chunk(2, 1)[1], "silu_and_mul"),
    Mutant("silu's last row of many", "silu_and_mul", output(lambda y: y[-1].zero_(), 9), "silu_and_mul"),
    Mutant("silu's last column", "silu_and_mul", output(lambda y: y[:, -1].zero_()), "silu_and_mul"),
]


def rotary(cache: Callable[[Any], Any] = lambda c: c, **fields: Callable[[Any], Any]) -> Wrong:
    """The seam's kernel that misreads a field; a value is made of the struct."""

    def wrong(right: Wrong, struct: Any, kv: Any, tokens: int) -> Any:
        kept = {name: value(struct) for name, value in fields.items()}
        memory = {name: v for name, v in kept.items() if isinstance(v, ctypes.Array)}
        kept.update({name: ctypes.addressof(v) for name, v in memory.items()})
        return right(but(struct, **kept), None if kv is None else cache(kv), tokens)

    return wrong


def stored(change: Callable[[int], int]) -> Callable[[Any], Any]:
    """The slots of the 33 tokens that the self-check of the seam stores."""
    return lambda struct: numbers([change(slot) for slot in read(struct.slots, 33)] if struct.slots else [0])


ROTARY = [
    Mutant("LogN ignored", "rotary_store", rotary(q_scale=lambda s: None), "rotary_store_kv"),
    Mutant("norms of heads ignored", "rotary_store", rotary(q_norm=lambda s: None, k_norm=lambda s: None), "rotary_store_kv"),
    Mutant("keys by the norm of queries", "rotary_store", rotary(k_norm=lambda s: s.q_norm), "rotary_store_kv"),
    Mutant("eps of heads", "rotary_store", rotary(eps=lambda s: s.eps * 100), "rotary_store_kv"),
    Mutant("cos for sin", "rotary_store", rotary(sin=lambda s: s.cos), "rotary_store_kv"),
    Mutant("half of the channels turned", "rotary_store", rotary(rotary_dim=lambda s: s.rotary_dim // 2), "rotary_store_kv"),
    Mutant("stale slot", "rotary_store", rotary(slots=stored(lambda slot: slot % 16)), "rotary_store_kv"),
    Mutant("nowhere is a slot", "rotary_store", rotary(slots=stored(lambda slot: max(slot, 0))), "rotary_store_kv"),
    Mutant("next slot", "rotary_store", rotary(slots=stored(lambda slot: slot + 1)), "rotary_store_kv"),
    Mutant("nothing stored", "rotary_store", rotary(cache=lambda c: None), "rotary_store_kv"),
    Mutant("keys and values swapped", "rotary_store", rotary(cache=lambda c: but(c, k=c.v, v=c.k)), "rotary_store_kv"),
    Mutant("int8: zeros swapped", "rotary_store", rotary(cache=lambda c: but(c, k_zero=c.v_zero, v_zero=c.k_zero)), "rotary_store_kv"),
    Mutant("int8: scales swapped", "rotary_store", rotary(cache=lambda c: but(c, k_scale=c.v_scale, v_scale=c.k_scale)), "rotary_store_kv"),
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
    Mutant("second likeliest", "likeliest", second, "likeliest"),
    Mutant("last logit ignored", "likeliest", lambda right, x: right(x[:, :-1].contiguous()), "likeliest"),
    Mutant("last of equal ones", "likeliest", late, "likeliest"),
    Mutant("NaN unnoticed", "likeliest", lambda right, x: [(*found[:2], True) for found in right(x)], "likeliest"),
    Mutant("first row only", "likeliest", lambda right, x: right(x[:1]) * len(x), "likeliest"),
    Mutant("heat ignored", "top", top(lambda *found: found, heat=1.0), "top"),
    Mutant("ids off by one", "top", top(lambda values, ids, whole: (values, ids - 1, whole)), "top"),
    Mutant("one of them twice", "top", top(lambda v, ids, whole: (v, ids.index_fill(1, torch.tensor([64]), int(ids[0, 0])), whole)), "top"),
    Mutant("last one too small", "top", top(lambda v, ids, whole: (v - (torch.arange(65) == 64), ids, whole)), "top"),
    Mutant("mass of the largest alone", "top", top(lambda v, ids, whole: (v, ids, float(v.logsumexp(1)))), "top"),
]


# ---- the one call


def step(
    layers: Callable[[list[Any]], list[Any]] = lambda layers: layers,
    caches: Callable[[list[Any]], list[Any]] = lambda caches: caches,
    head: Callable[[Any], Any] = lambda head: head,
    after: Callable[[torch.Tensor, torch.Tensor | None], Any] = lambda x, logits: None,
    **fields: Callable[[Any], Any],
) -> Wrong:
    """The one call with other layers, caches or head, with other fields of its step, or with results changed after."""

    def wrong(right: Wrong, given: Any, kv: Any, last: Any, struct: Any, x: Any, logits: Any) -> bool:
        made = {name: value(struct) for name, value in fields.items()}
        memory = {name: v for name, v in made.items() if isinstance(v, (ctypes.Array, ctypes.Structure))}
        made.update({name: ctypes.addressof(v) for name, v in memory.items()})
        some, stores = layers([but(layer) for layer in given]), caches([but(cache) for cache in kv])
        arrays = (type(some[0]) * len(some))(*some), (type(stores[0]) * len(stores))(*stores)
        done = right(*arrays, last and head(last), but(struct, **made), x, logits)
        after(x, logits)
        return bool(done)

    return wrong


def each(**fields: Callable[[Any], Any]) -> Callable[[list[Any]], list[Any]]:
    """Every layer with other values in some fields."""
    return lambda layers: [but(a, **{name: f(a) for name, f in fields.items()}) for a in layers]


def sequences(**lists: Callable[[list[int]], list[int]]) -> Callable[[Any], Any]:
    return lambda struct: sequences_with(**lists)(Sequences.from_address(struct.sequences))


def slots(change: Callable[[int], int]) -> Callable[[Any], Any]:
    return lambda struct: numbers([change(slot) for slot in read(struct.slots, struct.tokens)])


def due(change: Callable[[list[int]], list[int]]) -> Callable[[Any], Any]:
    return lambda struct: numbers(change(read(struct.due, struct.due_count)))


def experts(**fields: Callable[[Any], Any]) -> Wrong:
    kept: list[Any] = []

    def change(layer: Any) -> Any:
        if not layer.experts:
            return None
        struct = ExpertsStruct.from_address(layer.experts)
        made = {name: f(struct) for name, f in fields.items()}
        kept.extend(v for v in made.values() if isinstance(v, ctypes.Array))
        made = {n: ctypes.addressof(v) if isinstance(v, ctypes.Array) else v for n, v in made.items()}
        kept.append(but(struct, **made))
        return ctypes.addressof(kept[-1])

    return step(layers=each(experts=change))


def mlps(struct: Any, name: str) -> list[Any]:
    shared = 1 if struct.shared_gate else 0
    return list((Linear * (struct.count + shared)).from_address(getattr(struct, name)))


def array(linears: list[Any]) -> Any:
    return (Linear * len(linears))(*linears)


def parts(change: Callable[[list[Any]], list[Any]]) -> Wrong:
    """The parts of qkv where it has any."""
    kept: list[Any] = []

    def qkv(layer: Any) -> Any:
        if not layer.qkv.part_count:
            return layer.qkv
        kept.append(array(change(list((Linear * layer.qkv.part_count).from_address(layer.qkv.parts)))))
        return but(layer.qkv, parts=ctypes.addressof(kept[-1]))

    return step(layers=each(qkv=qkv))


def first_row_again(x: torch.Tensor, logits: torch.Tensor | None) -> None:
    if logits is not None:
        logits[-1] = logits[0]


STEPS = [
    (name, wrong, model)
    for name, wrong, model in (
        ("last layer skipped", step(layers=lambda a: a[:-1]), "plain"),
        ("first layer skipped", step(layers=lambda a: a[1:], caches=lambda c: c[1:]), "plain"),
        ("layers in the wrong order", step(layers=lambda a: a[::-1]), "plain"),
        ("first layer twice", step(layers=lambda a: [a[0], *a[:-1]]), "plain"),
        ("caches swapped", step(caches=lambda c: c[::-1]), "plain"),
        ("one cache for all", step(caches=lambda c: c[:1] * len(c)), "plain"),
        ("keys and values swapped", step(caches=lambda c: [but(a, k=a.v, v=a.k) for a in c]), "plain"),
        ("input norm after attention", step(layers=each(post_norm=lambda a: a.input_norm)), "plain"),
        ("qkv bias of another layer", step(layers=lambda a: [but(a[0], qkv=but(a[0].qkv, bias=a[1].qkv.bias)), *a[1:]]), "plain"),
        ("qkv bias ignored", step(layers=each(qkv=lambda a: but(a.qkv, bias=None))), "plain"),
        ("scale of scores", step(layers=each(scale=lambda a: a.scale * 1.01)), "plain"),
        ("eps", step(layers=each(eps=lambda a: a.eps * 1000)), "plain"),
        ("stale slot", step(slots=slots(lambda slot: slot % 16)), "plain"),
        ("next slot", step(slots=slots(lambda slot: slot ^ 1)), "plain"),
        ("kv_len - 1", step(sequences=sequences(kv_lens=one_less)), "plain"),
        ("block table of another", step(sequences=sequences(blocks=lambda b: b[::-1])), "plain"),
        ("cos for sin", step(sin=lambda s: s.cos), "plain"),
        ("half of the channels turned", step(rotary_dim=lambda s: s.rotary_dim // 2), "plain"),
        ("wrong row of logits", step(due=due(lambda rows: [max(0, row - 1) for row in rows])), "plain"),
        ("last row of logits is the first", step(after=first_row_again), "plain"),
        ("logits of the first token", step(due=due(lambda rows: [0] * len(rows))), "plain"),
        ("norm of the head", step(head=lambda h: but(h, eps=1.0)), "plain"),
        ("one logit missing", step(after=lambda x, logits: logits is not None and logits[:, -1].zero_()), "plain"),
        ("nothing is served", lambda right, *args: False, "plain"),
        ("no memory", lambda right, *args: _no_memory(), "plain"),
        ("LogN ignored", step(q_scale=lambda s: None), "logn"),
        ("norms of heads ignored", step(layers=each(q_norm=lambda a: None, k_norm=lambda a: None)), "qk-norm"),
        ("keys by the norm of queries", step(layers=each(k_norm=lambda a: a.q_norm)), "qk-norm"),
        ("window ignored", step(layers=each(window=lambda a: 0)), "window"),
        ("window + 1", step(layers=each(window=lambda a: a.window and a.window + 1)), "window"),
        ("window - 1", step(layers=each(window=lambda a: a.window and a.window - 1)), "window"),
        ("window in every layer", step(layers=lambda a: [but(b, window=max(c.window for c in a)) for b in a]), "window"),
        ("int8: scale of keys for values", step(caches=lambda c: [but(a, v_scale=a.k_scale) for a in c]), "int8-cache"),
        ("int8: zeros swapped", step(caches=lambda c: [but(a, v_zero=a.k_zero, k_zero=a.v_zero) for a in c]), "int8-cache"),
        ("int8: caches swapped", step(caches=lambda c: c[::-1]), "int8-cache"),
        ("wrong expert", experts(down=lambda e: array((lambda m: [m[1], m[0], *m[2:]])(mlps(e, "down")))), "experts"),
        ("gate of another expert", experts(gate_up=lambda e: array((lambda m: [*m[1:], m[0]] if not e.shared_gate else [*m[1:-1], m[0], m[-1]])(mlps(e, "gate_up")))), "experts"),
        ("one expert fewer", experts(top_k=lambda e: e.top_k - 1), "experts"),
        ("weights of experts sum to 1", experts(norm_topk_prob=lambda e: 1 - e.norm_topk_prob), "experts"),
        ("shared expert ignored", experts(shared_gate=lambda e: None), "experts"),
        ("router's rows off by one", experts(count=lambda e: e.count - 1, shared_gate=lambda e: None), "experts"),
        ("keys and values of qkv's parts", parts(lambda p: [p[0], p[2], p[1]]), "codes"),
        ("zero + 1 in one layer", step(layers=lambda a: [but(a[0], o=_zero_off(a[0].o)), *a[1:]]), "codes"),
    )
]  # fmt: skip


def _no_memory() -> bool:
    raise MemoryError("no memory for the activations")


def _zero_off(linear: Any) -> Any:
    """Codes whose zeros are not read."""
    from qwenrt.backends.cpu.kernels import _QuantMatrix

    struct = but(_QuantMatrix.from_address(linear.quant), zeros=None)
    _kept[id(struct)] = struct
    return but(linear, quant=ctypes.addressof(struct))


MUTANTS = [
    *LINEARS,
    *BETWEEN,
    *ROTARY,
    *CHOOSING,
    *(Mutant(f"step: {name}", "decoder", wrong, "fuse_layers", model) for name, wrong, model in STEPS),
]
