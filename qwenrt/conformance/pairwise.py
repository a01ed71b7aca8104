"""A few combinations of many axes, in which every two values of two axes meet."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Axes = Mapping[str, Sequence[Any]]


def product(axes: Axes) -> Iterator[dict[str, Any]]:
    """Every combination."""
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def pairs(axes: Axes) -> list[dict[str, Any]]:
    """The same combinations in every run, about as many as the product of the two longest axes.

    Greedy: a row begins with the first two values that have not met, and takes of every other axis the value that has
    met fewest of those in the row; of equal ones the one used least.
    """
    names = sorted(axes, key=lambda name: -len(axes[name]))
    if len(names) == 1:
        return [{names[0]: value} for value in axes[names[0]]]
    met: set[tuple[int, int, int, int]] = set()
    used = {(a, i): 0 for a, name in enumerate(names) for i in range(len(axes[name]))}
    rows = []
    for a, b in itertools.combinations(range(len(names)), 2):
        for i, j in itertools.product(range(len(axes[names[a]])), range(len(axes[names[b]]))):
            if (a, i, b, j) in met:
                continue
            row = {a: i, b: j}
            for c in range(len(names)):
                if c not in row:
                    row[c] = min(
                        range(len(axes[names[c]])),
                        key=lambda v: (sum(_pair(c, v, d, w) in met for d, w in row.items()), used[c, v]),
                    )
            met |= {_pair(c, row[c], d, row[d]) for c, d in itertools.combinations(range(len(names)), 2)}
            for c, v in row.items():
                used[c, v] += 1
            rows.append({name: axes[name][row[names.index(name)]] for name in axes})
    return rows


def _pair(a: int, i: int, b: int, j: int) -> tuple[int, int, int, int]:
    return (a, i, b, j) if a < b else (b, j, a, i)
