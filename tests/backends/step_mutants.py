"""Wrong ways of the one call for all layers, in the words of `mutants`."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch

from qwenrt.backends.cpu.attention import Sequences
from qwenrt.backends.cpu.decoder import DeltaLayer, ExpertsStruct
from qwenrt.backends.cpu.kernels import _QuantMatrix
from qwenrt.backends.cpu.linear import Linear
from tests.backends.mutants import Wrong, but, mutants, numbers, one_less, read, sequences_with


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


def logit_rows(change: Callable[[list[int]], list[int]]) -> Callable[[Any], Any]:
    return lambda struct: numbers(change(read(struct.logit_rows, struct.logit_row_count)))


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


def delta(**fields: Callable[[Any], Any]) -> Wrong:
    """The layers of linear attention with other values in some fields of their net."""

    def change(layer: Any) -> Any:
        if not layer.delta:
            return None
        struct = DeltaLayer.from_address(layer.delta)
        _KEPT.append(but(struct, net=but(struct.net, **{name: f(struct.net) for name, f in fields.items()})))
        return ctypes.addressof(_KEPT[-1])

    return step(layers=each(delta=change))


def state_slots(change: Callable[[list[int]], list[int]]) -> Callable[[Any], Any]:
    return lambda struct: numbers(
        change(read(struct.state_slots, Sequences.from_address(struct.sequences).count))
    )


def turned(name: str) -> Callable[[Any], Any]:
    """The linears of one side of the experts, each of the next expert; a shared one stays last."""

    def change(struct: Any) -> Any:
        first, *others = list((Linear * struct.count).from_address(getattr(struct, name)))
        whole = (Linear * (struct.count + bool(struct.shared_gate))).from_address(getattr(struct, name))
        return array([*others, first, *list(whole)[struct.count :]])

    return change


def array(linears: list[Any]) -> Any:
    return (Linear * len(linears))(*linears)


def parts(change: Callable[[list[Any]], list[Any]]) -> Wrong:
    """The parts of qkv where it has any."""
    kept: list[Any] = []

    def qkv(layer: Any) -> Any:
        if not layer.qkv.part_count:
            return layer.qkv
        kept.append(array(change(list((Linear * layer.qkv.part_count).from_address(layer.qkv.matrix)))))
        return but(layer.qkv, matrix=ctypes.addressof(kept[-1]))

    return step(layers=each(qkv=qkv))


def first_row_again(x: torch.Tensor, logits: torch.Tensor | None) -> None:
    if logits is not None:
        logits[-1] = logits[0]


def _no_memory() -> bool:
    raise MemoryError("no memory for the activations")


_KEPT: list[Any] = []


def _zero_off(linear: Any) -> Any:
    """Codes whose zeros are not read."""
    struct = but(_QuantMatrix.from_address(linear.matrix), zeros=None)
    _KEPT.append(struct)
    return but(linear, matrix=ctypes.addressof(struct))


STEP_MUTANTS = [
    *mutants("forward", "stacks")(
        {
            "last layer skipped": step(layers=lambda a: a[:-1]),
            "first layer skipped": step(layers=lambda a: a[1:], caches=lambda c: c[1:]),
            "layers in the wrong order": step(layers=lambda a: a[::-1]),
            "first layer twice": step(layers=lambda a: [a[0], *a[:-1]]),
            "caches swapped": step(caches=lambda c: c[::-1]),
            "one cache for all": step(caches=lambda c: c[:1] * len(c)),
            "keys and values swapped": step(caches=lambda c: [but(a, k=a.v, v=a.k) for a in c]),
            "input norm after attention": step(layers=each(post_norm=lambda a: a.input_norm)),
            "qkv bias of another layer": step(
                layers=lambda a: [but(a[0], qkv=but(a[0].qkv, bias=a[1].qkv.bias)), *a[1:]]
            ),
            "qkv bias ignored": step(layers=each(qkv=lambda a: but(a.qkv, bias=None))),
            "scale of scores": step(layers=each(scale=lambda a: a.scale * 1.01)),
            "eps": step(layers=each(eps=lambda a: a.eps * 1000)),
            "stale slot": step(slots=slots(lambda slot: slot % 16)),
            "next slot": step(slots=slots(lambda slot: slot ^ 1)),
            "kv_len - 1": step(sequences=sequences(kv_lens=one_less)),
            "block table of another": step(sequences=sequences(blocks=lambda b: b[::-1])),
            "cos for sin": step(sin=lambda s: s.cos),
            "half of the channels turned": step(rotary_dim=lambda s: s.rotary_dim // 2),
            "wrong row of logits": step(
                logit_rows=logit_rows(lambda rows: [max(0, row - 1) for row in rows])
            ),
            "last row of logits is the first": step(after=first_row_again),
            "logits of the first token": step(logit_rows=logit_rows(lambda rows: [0] * len(rows))),
            "norm of the head": step(head=lambda h: but(h, eps=1.0)),
            "one logit missing": step(after=lambda x, logits: logits is not None and logits[:, -1].zero_()),
            "nothing is computed": lambda right, *args: True,
            "no memory": lambda right, *args: _no_memory(),
        }
    ),
    *mutants("forward", "stacks", "logn")(
        {
            "LogN ignored": step(q_scale=lambda s: None),
        }
    ),
    *mutants("forward", "stacks", "qk-norm")(
        {
            "norms of heads ignored": step(layers=each(q_norm=lambda a: None, k_norm=lambda a: None)),
            "keys by the norm of queries": step(layers=each(k_norm=lambda a: a.q_norm)),
        }
    ),
    *mutants("forward", "stacks", "linear attention")(
        {
            "states of another sequence": step(state_slots=state_slots(lambda slots: slots[::-1])),
            "one state for all": step(state_slots=state_slots(lambda slots: slots[:1] * len(slots))),
            "key heads of other value heads": delta(tiled=lambda net: 1 - net.tiled),
            "decays for their bias": delta(decay_bias=lambda net: net.log_decay),
            "a tap fewer": delta(taps=lambda net: net.taps - 1),
            "eps of linear attention": delta(eps=lambda net: 1.0),
            "gates ignored": step(layers=each(gated=lambda a: 0)),
        }
    ),
    *mutants("forward", "stacks", "window")(
        {
            "window ignored": step(layers=each(window=lambda a: 0)),
            "window + 1": step(layers=each(window=lambda a: a.window and a.window + 1)),
            "window - 1": step(layers=each(window=lambda a: a.window and a.window - 1)),
            "window in every layer": step(
                layers=lambda a: [but(b, window=max(c.window for c in a)) for b in a]
            ),
        }
    ),
    *mutants("forward", "stacks", "int8-cache")(
        {
            "int8: fit of keys ignored": step(
                caches=lambda c: [but(a, k_offset=None, k_factor=None) for a in c]
            ),
            "int8: scale of keys for values": step(caches=lambda c: [but(a, v_scale=a.k_scale) for a in c]),
            "int8: zeros swapped": step(
                caches=lambda c: [but(a, v_zero=a.k_zero, k_zero=a.v_zero) for a in c]
            ),
            "int8: caches swapped": step(caches=lambda c: c[::-1]),
        }
    ),
    *mutants("forward", "stacks", "experts")(
        {
            "wrong expert": experts(down=turned("down")),
            "gate of another expert": experts(gate_up=turned("gate_up")),
            "one expert fewer": experts(top_k=lambda e: e.top_k - 1),
            "weights of experts sum to 1": experts(norm_topk_prob=lambda e: 1 - e.norm_topk_prob),
            "shared expert ignored": experts(shared_gate=lambda e: None),
            "router's rows off by one": experts(count=lambda e: e.count - 1, shared_gate=lambda e: None),
        }
    ),
    *mutants("forward", "stacks", "codes")(
        {
            "keys and values of qkv's parts": parts(lambda p: [p[0], p[2], p[1]]),
            "zero + 1 in one layer": step(layers=lambda a: [but(a[0], o=_zero_off(a[0].o)), *a[1:]]),
        }
    ),
]
