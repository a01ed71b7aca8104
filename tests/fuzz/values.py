"""Values that nobody expects, and changes of JSON and of bytes that a damaged or hostile file may have."""

from __future__ import annotations

import copy
import json
import random
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import torch

WORDS = (
    "",
    "a",
    "gptq",
    "yarn",
    "auto",
    "float16",
    "\ud800",
    "\ue000",
    "<|im_end|>",
    "0",
    "-1",
    "a\0b",
    "é" * 300,
)


class Hostile:
    """Fails at whatever is asked of it."""

    def _fails(self, *_: object) -> Any:
        raise RuntimeError("no")

    __repr__ = __str__ = __len__ = __eq__ = __bool__ = __index__ = __float__ = _fails
    __hash__ = object.__hash__


def number(rng: random.Random) -> int | float:
    return rng.choice(
        (
            *(0, 1, -1, 2, 3, 8, 127, 2**20, 2**31, 2**63, 2**64, -(2**63), 10**400, -(10**400), 10**4000),
            *(0.5, 1.0, -0.0, 1e-320, 1e308, float("inf"), float("-inf"), float("nan")),
        )
    )


def deep(rng: random.Random) -> Any:
    value: Any = rng.choice(WORDS)
    for _ in range(rng.choice((3, 82, 95, 300, 20_000))):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return value


def json_value(rng: random.Random, level: int = 0) -> Any:
    kind = rng.randrange(9 if level < 3 else 5)
    if kind < 2:
        return number(rng)
    if kind < 5:
        return rng.choice((None, True, False, *WORDS))
    if kind == 5 and level == 0 and rng.random() < 0.2:
        return [rng.choice((0, "a", None, []))] * rng.choice((10, 5000))
    inner = (json_value(rng, level + 1) for _ in range(rng.randrange(4)))
    return list(inner) if kind < 7 else {rng.choice(WORDS): value for value in inner}


def any_value(rng: random.Random) -> Any:
    """Of Python, numpy or torch, of any type, size and depth."""
    kind = rng.randrange(8)
    if kind < 3:
        return json_value(rng)
    if kind == 3:
        return deep(rng)
    if kind == 4:
        dtype = rng.choice((np.int64, np.float32, np.bool_, object, "U3", np.complex64))
        return np.zeros(rng.choice(((), 0, 1, 3, (2, 2))), dtype)[...]
    if kind == 5:
        dtype = rng.choice((torch.int64, torch.float32, torch.bool, torch.bfloat16))
        return torch.ones(rng.choice(((), (0,), (1,), (3,), (2, 2))), dtype=dtype)
    loop: list[Any] = []
    loop.append(loop)
    return rng.choice(
        (
            *(Hostile(), Hostile, object(), b"x", bytearray(b"x"), {1}, 1j, range(3), loop, iter((1,)), len),
            *(torch.float32, torch.device("cpu"), np.float32, np.dtype("int8"), np.int64(3), np.float32(0.5)),
            *(np.str_("a"), Fraction(1, 3), Fraction(10**400), Decimal("1.5"), Decimal("nan"), [Hostile()]),
            *({Hostile(): 1}, {"a": Hostile()}, {np.int64(3): np.float32(1)}, {3: float("nan")}, 10**5000),
        )
    )


def changed(rng: random.Random, value: Any) -> Any:
    """A copy of JSON-like data with one to four places of it replaced, removed, doubled or exchanged."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 4)):
        _change(rng, value)
    return value


def _change(rng: random.Random, value: Any) -> None:
    places = []
    waiting = [value]
    while waiting and len(places) < 400:
        each = waiting.pop(rng.randrange(len(waiting)))
        keys = list(each) if isinstance(each, dict) else list(range(len(each)))
        places += [(each, key) for key in (keys if len(keys) < 40 else rng.sample(keys, 40))]
        waiting += [each[key] for key in keys if isinstance(each[key], (dict, list))]
    if not places:
        return
    where, key = rng.choice(places)
    other, name = rng.choice(places)
    kind = rng.randrange(6)
    if kind < 3:
        where[key] = json_value(rng)
    elif kind == 3:
        where[key] = copy.deepcopy(other[name])
    elif kind == 4 and isinstance(where, dict):
        where[rng.choice((*WORDS, str(name)))] = json_value(rng)
    elif len(where) > 0 and key in (where if isinstance(where, dict) else range(len(where))):
        del where[key]


def as_bytes(rng: random.Random, value: Any) -> bytes:
    """JSON text of a value, now and then with bytes changed, cut out or put in."""
    raw = bytearray(json.dumps(value).encode())
    for _ in range(rng.choice((0, 0, 0, 1, 3))):
        at = rng.randrange(len(raw) + 1)
        raw[at : at + rng.choice((0, 1, 1, 40))] = rng.randbytes(rng.choice((0, 1, 1, 3)))
    return bytes(raw)
