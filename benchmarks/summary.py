"""Results -> figures: rates, ratios, fractions of the bandwidth. Pure; reads what measure.py wrote."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Summary:
    """Medians over the rounds; ``ratios`` and ``fractions`` of every round.

    Rates are tokens per second. A ratio is qwenrt's rate by the peer's. A fraction is the bytes of weights and
    cache that decoding has to read, by what was read in the same time in the same round; None where nothing says
    how many bytes that is.
    """

    ours: float
    peer: float
    ratios: tuple[float, ...]
    fractions: tuple[float, ...] | None
    bandwidth: float
    foreign: float

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def fraction(self) -> float | None:
        return statistics.median(self.fractions) if self.fractions else None


def tokens_of(work: Mapping[str, Any]) -> int:
    """How many tokens one measurement computes."""
    if work["kind"] == "start":
        return 1
    per_sequence = work["tokens"] if work["kind"] == "prefill" else work["new_tokens"]
    return int(per_sequence * work["batch"])


def bytes_read(work: Mapping[str, Any], about: Mapping[str, Any]) -> float | None:
    """What decoding has to read from memory: the weights at every step, and the cache of every sequence."""
    if work["kind"] != "decode" or "weight_bytes_per_token" not in about:
        return None
    context = work["tokens"] + work["new_tokens"] / 2
    per_step = about["weight_bytes_per_token"] + work["batch"] * context * about["kv_bytes_per_token"]
    return float(work["new_tokens"] * per_step)


def summarise(result: Mapping[str, Any]) -> Summary:
    """The figures of one row."""
    work, rounds = result["work"], result["rounds"]
    tokens, nbytes = tokens_of(work), bytes_read(work, result["ours"]["about"])
    return Summary(
        ours=tokens / statistics.median(r["ours_s"] for r in rounds),
        peer=tokens / statistics.median(r["peer_s"] for r in rounds),
        ratios=tuple(r["peer_s"] / r["ours_s"] for r in rounds),
        fractions=nbytes and tuple(nbytes / r["ours_s"] / r["read_bytes_per_s"] for r in rounds),
        bandwidth=statistics.median(r["read_bytes_per_s"] for r in rounds),
        foreign=max(max(r["ours_foreign"], r["peer_foreign"]) for r in rounds),
    )


def verdict(value: float, floor: float, goal: float) -> str:
    """Where a measured value stands; a goal below its floor means that less is better."""
    if goal < floor:
        value, floor, goal = -value, -floor, -goal
    return "goal" if value >= goal else "floor" if value >= floor else "below"


def points(curve: Mapping[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """A curve's lines: label -> [(x, y)], y in milliseconds per token (context) or tokens per second (others)."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for label, seconds in curve["seconds"].items():
        for value, rounds in seconds.items():
            tokens = tokens_of(dict(curve["work"]) | {curve["varied"]: int(value)})
            rate = tokens / statistics.median(rounds)
            y = 1000 / rate if curve["plot"] == "context" else rate
            lines.setdefault(label, []).append((int(value), y))
    return lines
