"""What the kinds of cases share."""

from __future__ import annotations

import dataclasses
import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from qwenrt.conformance.compare import Finding
from qwenrt.conformance.subjects import Subject

# Tokens of a step: what multiplies none, one, a few, a tile or many of them is other code; the last ones end a tile.
TOKENS = (0, 1, 2, 3, 8, 16, 33, 130)
NORMAL = "normal"


class Checker(Protocol):
    """A case's values and what its definition makes of them, once for all backends."""

    def check(self, subject: Subject) -> Finding: ...


@dataclass(frozen=True)
class Case(ABC):
    """One row of the table: an op with all that is varied. A checker of it makes its values from its id alone."""

    op: str
    dtype: torch.dtype

    @property
    def kind(self) -> str:
        """What the printed table tells apart within an op."""
        return ""

    @property
    def id(self) -> str:
        fields = [(f.name, getattr(self, f.name)) for f in dataclasses.fields(self)]
        words = [word for name, value in fields if (word := _word(name, value))]
        return " ".join(words)

    @abstractmethod
    def checker(self) -> Checker:
        """Its values and what its definition makes of them."""


def _word(name: str, value: Any) -> str:
    if value is False or value in ("contiguous", NORMAL):
        return ""
    if value is True:
        return name.replace("_", " ")
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if name == "lens":
        return ",".join(f"{q}/{n}" for q, n in value)
    if isinstance(value, tuple):
        return f"{name} " + "x".join(map(str, value))
    return str(value) if isinstance(value, str) or name == "form" else f"{name} {value}"


def generator(case: Case) -> torch.Generator:
    """The numbers of a case, the same on every machine."""
    return torch.Generator().manual_seed(zlib.crc32(case.id.encode()))
