"""Where a network keeps its tensors, so that others can be put there; and what tells weights from other weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from qwenrt.model.qwen import Qwen
from qwenrt.ops.types import Packed

_HASHED = 2**18  # numbers of a tensor that are hashed


@dataclass(frozen=True)
class Place:
    """One tensor of a network, by its name: "norm", "layers.0.qkv_proj.weight", "layers.0.qkv_proj.codes"."""

    name: str
    owner: Any
    key: str

    @property
    def tensor(self) -> torch.Tensor:
        found = self.owner.bias if isinstance(self.owner, Packed) else self.owner[self.key]
        assert isinstance(found, torch.Tensor)
        return found

    def put(self, tensor: torch.Tensor) -> None:
        """Another one in its place."""
        if isinstance(self.owner, Packed):
            self.owner.bias = tensor
        else:
            self.owner[self.key] = tensor


def places_of(model: Qwen, names: Iterable[str]) -> Iterator[Place]:
    """All tensors of the weights called ``names`` (of Qwen.tensor_specs and linear_specs), codes too."""
    for name in names:
        held = model.weights[name]
        if isinstance(held, torch.Tensor):
            yield Place(name, model.weights, name)
        else:
            yield from _of_packed(name, held)


def _of_packed(name: str, packed: Packed) -> Iterator[Place]:
    for key, value in packed.data.items():
        if isinstance(value, torch.Tensor):
            yield Place(f"{name}.{key}", packed.data, key)
        elif isinstance(value, list):
            for number, part in enumerate(value):
                yield from _of_packed(f"{name}.{number}", part)
    if packed.bias is not None:
        yield Place(f"{name}.bias", packed, "bias")


def names_of(model: Qwen, index: int | None) -> list[str]:
    """Names of a layer's weights, or of those that no layer has."""
    names = (*model.tensor_specs, *model.linear_specs)
    if index is not None:
        return [name for name in names if name.startswith(f"{model.layers[index].prefix}.")]
    return [name for name in names if not name.startswith(tuple(f"{each.prefix}." for each in model.layers))]


class Fingerprint:
    """Of a configuration and of weights, in whatever order they come; of large tensors every n-th number."""

    def __init__(self, about: object) -> None:
        self._about, self._each = repr(about), dict[str, str]()

    def add(self, places: Iterable[Place]) -> None:
        for place in places:
            tensor = place.tensor
            flat = tensor.detach().flatten()
            sampled = flat[:: max(1, flat.numel() // _HASHED)].cpu().contiguous()
            digest = hashlib.sha256(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(sampled.view(torch.uint8).numpy().data)
            self._each[place.name] = digest.hexdigest()

    @property
    def value(self) -> str:
        return hashlib.sha256(repr((self._about, sorted(self._each.items()))).encode()).hexdigest()


def fingerprint(model: Qwen) -> str:
    """That of a whole network."""
    made = Fingerprint(model.config)
    made.add(places_of(model, (*model.tensor_specs, *model.linear_specs)))
    return made.value
