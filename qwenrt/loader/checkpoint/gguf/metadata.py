"""The metadata of a GGUF file, key by key: each value of the type that it must have, or an error that names the key."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenrt.errors import ConfigError, shown

_REMEDY = "Convert the model again with a current llama.cpp, or fetch another file of it."


@dataclass(frozen=True)
class Metadata:
    """``values``: as the reader found them, texts as bytes; ``path``: for messages."""

    path: Path
    values: Mapping[str, object]

    def bad(self, key: str, found: str, remedy: str = _REMEDY) -> ConfigError:
        return ConfigError(f"reading {key} of {self.path.name}", found, remedy)

    def has(self, key: str) -> bool:
        return key in self.values

    def text(self, key: str, default: str | None = None) -> str:
        return self._decoded(key, self._needed(key, default))

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._needed(key, default)
        if type(value) is not int:
            raise self.bad(key, f"it is {shown(value)}, not an integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite one, to seven digits: files hold float32, which writes 1e-6 as 9.99999997e-07."""
        value = self._needed(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            raise self.bad(key, f"it is {shown(value)}, not a number")
        return float(f"{value:.7g}")

    def flag(self, key: str, default: bool) -> bool:
        value = self._needed(key, default)
        if type(value) is not bool:
            raise self.bad(key, f"it is {shown(value)}, not true or false")
        return value

    def texts(self, key: str) -> list[str]:
        values = self._list(key)
        try:
            return [value.decode() for value in values]
        except (UnicodeDecodeError, AttributeError):
            number = next(i for i, value in enumerate(values) if not _is_text(value))
            raise self.bad(key, f"element {number} is {shown(values[number])}, not a text") from None

    def integers(self, key: str) -> list[int]:
        values = self._list(key)
        if not all(type(value) is int for value in values):
            raise self.bad(key, f"it is a list of {shown(values[0])} and more, not of integers")
        return values

    def flags(self, key: str) -> list[bool]:
        values = self._list(key)
        if not all(type(value) is bool for value in values):
            raise self.bad(key, f"it is a list of {shown(values[0])} and more, not of true and false")
        return values

    def one_for_all(self, key: str, default: int | None = None) -> int:
        """A number, or a list of it for each layer."""
        if not isinstance(self.values.get(key), list):
            return self.integer(key, default)
        values = self.integers(key)
        if len(set(values)) != 1:
            raise self.bad(
                key, f"it differs from layer to layer: {shown(values)}", "No Qwen that runs here has that."
            )
        return values[0]

    def _needed(self, key: str, default: object) -> object:
        value = self.values.get(key, default)
        if value is None:
            raise self.bad(key, "there is none")
        return value

    def _list(self, key: str) -> list[Any]:
        value = self._needed(key, None)
        if not isinstance(value, list):
            raise self.bad(key, f"it is {shown(value)}, not a list")
        return value

    def _decoded(self, key: str, value: object) -> str:
        if isinstance(value, str):
            return value
        if not _is_text(value):
            raise self.bad(key, f"it is {shown(value)}, not a text")
        assert isinstance(value, bytes)
        return value.decode()


def _is_text(value: object) -> bool:
    if not isinstance(value, bytes):
        return False
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True
