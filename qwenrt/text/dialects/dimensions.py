"""Vectors with fewer dimensions than the model's, for all clients alike: the first values, at length 1 again."""

from __future__ import annotations

import math
from collections.abc import Sequence

from qwenrt.errors import shown
from qwenrt.text.dialects.decoding import bad


def shortened(vectors: Sequence[Sequence[float]], dimensions: int | None) -> Sequence[Sequence[float]]:
    """``dimensions``: None leaves them as they are. Raises Problem for what they do not have."""
    if dimensions is None or not vectors:
        return vectors
    size = len(vectors[0])
    if not 1 <= dimensions <= size:
        found = f"got {shown(dimensions)}, this model's vectors have {size}"
        raise bad("dimensions", found, f"Ask for 1 to {size}, or leave it out.")
    return vectors if dimensions == size else [_cut(vector, dimensions) for vector in vectors]


def _cut(vector: Sequence[float], dimensions: int) -> list[float]:
    length = math.hypot(*vector[:dimensions])
    return [value / (length or 1.0) for value in vector[:dimensions]]
