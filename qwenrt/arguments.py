"""Values as callers pass them, numpy's and torch's among them, turned into Python's own or refused.

A public function takes what plainly means the right thing (`np.int64(3)` is 3) and raises RequestError for anything
else, whatever happens when a stranger's object is compared, counted or shown.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Iterable, Mapping, Set
from typing import Any

from qwenrt.errors import ConfigError, QwenrtError, RequestError, shown


def as_integer(value: object) -> int | None:
    """``value`` as an integer; None where it is none. Truth values are no integers."""
    try:
        if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
            return None
        return operator.index(value)  # type: ignore[arg-type]
    except Exception:  # an object may do anything when it is asked
        return None


def as_number(value: object) -> float | None:
    """``value`` as a finite number; None where it is none. Truth values are no numbers."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        number = float(value)
    except Exception:
        return None
    return number if math.isfinite(number) else None


def flag(name: str, value: object, error: type[QwenrtError] = RequestError) -> bool:
    """A truth value, Python's or numpy's; else ``error``."""
    if isinstance(value, bool) or type(value).__name__ in ("bool", "bool_"):
        return bool(value)
    raise error(name, f"got {shown(value)}", "It must be True or False.")


def as_list(name: str, value: object) -> list[Any]:
    """A list, tuple, array, tensor or other iterable as a list; text is none, and neither is what has no order of its
    own or would lose its values: sets and mappings."""
    given = type(value).__name__
    try:
        if hasattr(value, "tolist") and not isinstance(value, type):  # a tensor or an array
            value = value.tolist()
        if isinstance(value, Iterable) and not isinstance(value, (str, bytes, bytearray, Set, Mapping)):
            return list(value)
    except Exception as error:  # an object may do anything when it is asked
        found = f"{given}, which cannot be gone through ({type(error).__name__})"
        raise RequestError(name, f"got {found}", "Pass a list.") from error
    raise RequestError(name, f"got {given}", "Pass a list.")


def as_token_ids(ids: object) -> list[int]:
    """A caller's token ids as Python's integers. RequestError names one that is none."""
    numbers = []
    for token in as_list("token ids", ids):
        number = as_integer(token)
        if number is None:
            raise RequestError("token ids", f"one is {shown(token)}", "Token ids are integers.")
        numbers.append(number)
    return numbers


def one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """Raise ConfigError unless ``value`` is one of a few texts, or None where that is among them."""
    if not (value is None or isinstance(value, str)) or value not in allowed:
        choices = ", ".join(map(repr, allowed))
        raise ConfigError(f"{name}={shown(value)}", "unknown", f"Use one of {choices}.")


def size(name: str, value: object) -> int:
    """A number of tokens or sequences. Raises ConfigError."""
    number = as_integer(value)
    if number is None or not 1 <= number <= 2**24:
        raise ConfigError(
            f"{name}={shown(value)}", "not a usable number", f"Use an integer from 1 to {2**24}."
        )
    return number
