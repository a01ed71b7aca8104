"""Results -> figures: rates, ratios, fractions of the bandwidth. Pure; reads what measure.py wrote."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

DISTURBED = 0.1  # a round counts if others had no more than this share of the cores


@dataclass(frozen=True)
class Summary:
    """Medians over the rounds that count; ``ratios`` and ``fractions`` of every round.

    Rates are tokens per second. A ratio is qwenrt's rate by the peer's. A fraction is the bytes of weights and
    cache that decoding has to read, by what was read in the same time in the same round; None where nothing says
    how many bytes that is.
    """

    ours: float
    peer: float
    ratios: tuple[float, ...]
    fractions: tuple[float, ...] | None
    reads: tuple[float, ...]
    foreign: float
    disturbed: int
    all_disturbed: bool

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def fraction(self) -> float | None:
        return statistics.median(self.fractions) if self.fractions else None


def disturbance(measured: Mapping[str, float]) -> float:
    """The larger share of the cores that other processes had while one of the two engines was measured."""
    return max(measured["ours_foreign"], measured["peer_foreign"])


def undisturbed(rounds: Sequence[Mapping[str, float]]) -> list[Mapping[str, float]]:
    """The rounds in which other processes used little of the machine, whatever was measured."""
    return [r for r in rounds if disturbance(r) <= DISTURBED]


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
    """The figures of one row, from the undisturbed rounds if there are any, else from all."""
    work, measured = result["work"], result["rounds"]
    rounds = undisturbed(measured) or measured
    tokens, nbytes = tokens_of(work), bytes_read(work, result["ours"]["about"])
    return Summary(
        ours=tokens / statistics.median(r["ours_s"] for r in rounds),
        peer=tokens / statistics.median(r["peer_s"] for r in rounds),
        ratios=tuple(r["peer_s"] / r["ours_s"] for r in rounds),
        fractions=None
        if nbytes is None
        else tuple(nbytes / r["ours_s"] / r["read_bytes_per_s"] for r in rounds),
        reads=tuple(r["read_bytes_per_s"] for r in rounds),
        foreign=max(disturbance(r) for r in rounds),
        disturbed=len(measured) - len(undisturbed(measured)),
        all_disturbed=not undisturbed(measured),
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
