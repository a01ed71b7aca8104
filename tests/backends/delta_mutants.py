"""Wrong ways of a layer of linear attention, in the words of `mutants`."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from tests.backends.mutants import Wrong, but, mutants, read, sequences_with

_KEPT: list[Any] = []


def floats(address: int, count: int) -> list[float]:
    return list((ctypes.c_float * count).from_address(address))


def channels(net: Any) -> int:
    return int(2 * net.key_heads * net.key_dim + net.value_heads * net.value_dim)


def with_(**fields: Callable[[Any], Any]) -> Wrong:
    """The kernel with other fields; a list stands for an array of floats."""

    def wrong(right: Wrong, net: Any, sequences: Any) -> Any:
        made = {name: change(net) for name, change in fields.items()}
        for name, value in made.items():
            if isinstance(value, list):
                _KEPT.append((ctypes.c_float * len(value))(*value))
                made[name] = ctypes.addressof(_KEPT[-1])
            elif isinstance(value, ctypes.Array):
                _KEPT.append(value)
                made[name] = ctypes.addressof(value)
        return right(but(net, **made), sequences)

    return wrong


def every_step_begins(right: Wrong, net: Any, sequences: Any) -> Any:
    lens = read(sequences.q_lens, sequences.count)
    return right(net, sequences_with(kv_lens=lambda _: lens)(sequences))


def state_stays(name: str, size: Callable[[Any], int]) -> Wrong:
    """What a step leaves in the states is forgotten."""

    def wrong(right: Wrong, net: Any, sequences: Any) -> Any:
        count = (max(read(net.slots, sequences.count)) + 1) * size(net) * 4
        before = ctypes.string_at(getattr(net, name), count)
        done = right(net, sequences)
        ctypes.memmove(getattr(net, name), before, count)
        return done

    return wrong


DELTA_MUTANTS = mutants("delta_net", "delta_net", "linear attention")(
    {
        "taps in the wrong order": with_(
            conv=lambda net: [
                x
                for tap in reversed(range(net.taps))
                for x in floats(net.conv, net.taps * channels(net))[
                    tap * channels(net) : (tap + 1) * channels(net)
                ]
            ]
        ),
        "decays of other heads": with_(log_decay=lambda net: floats(net.log_decay, net.value_heads)[::-1]),
        "decay bias ignored": with_(decay_bias=lambda net: [0.0] * net.value_heads),
        "norm ignored": with_(out_norm=lambda net: [1.0] * net.value_dim),
        "key heads of other value heads": with_(tiled=lambda net: 1 - net.tiled),
        "eps": with_(eps=lambda net: 1.0),
        "b for a": with_(rates=lambda net: net.rates + 4 * net.value_heads),
        "every step begins": every_step_begins,
        "convolution's inputs are not kept": state_stays(
            "conv_states", lambda net: (net.taps - 1) * channels(net)
        ),
        "state is not kept": state_stays(
            "delta_states", lambda net: net.value_heads * net.key_dim * net.value_dim
        ),
    }
)
