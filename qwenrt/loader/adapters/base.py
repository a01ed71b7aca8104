"""What an adapter asks of the model that it was trained on: the rows of its weights, and whether it is that one."""

from __future__ import annotations

from functools import cached_property

import torch

from qwenrt.backends.base import Backend
from qwenrt.config import ModelConfig
from qwenrt.loader.checkpoint.checkpoint import Checkpoint
from qwenrt.loader.checkpoint.digest import digest_of
from qwenrt.loader.weights import WeightReader, open_weights
from qwenrt.model.qwen import Qwen
from qwenrt.ops import reference
from qwenrt.ops.types import Packed


class BaseWeights:
    """The weights of a checkpoint as float32 matrices, whatever their format, one at a time. ``config``: what
    as_stored() made of it. Nothing is read before it is asked for."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig) -> None:
        self.checkpoint, self.config = checkpoint, config
        self._last: tuple[str, Packed] | None = None

    @cached_property
    def model(self) -> Qwen:
        """The network without weights: which there are."""
        return Qwen(self.config, Backend(torch.device("cpu")), torch.float32)

    @cached_property
    def reader(self) -> WeightReader:
        return open_weights(self.model, self.checkpoint, self.config, self.model.backend, torch.float32)

    @cached_property
    def digest(self) -> str:
        """What tells this checkpoint from others."""
        return digest_of(self.checkpoint)

    def weight(self, param: str) -> torch.Tensor:
        """float32 [N, K], or of another shape where ``param`` is no matrix; rows in the model's order."""
        if param not in self.model.linear_specs:
            return self.reader.tensor(param).float()
        return _dense(self._packed(param))

    def bias(self, param: str) -> torch.Tensor | None:
        """float32 [N], None where the linear has none."""
        bias = self._packed(param).bias
        return None if bias is None else bias.float()

    def _packed(self, param: str) -> Packed:
        if self._last is None or self._last[0] != param:
            tied = self.config.tie_word_embeddings and param == "lm_head"
            embedding = self.reader.tensor("embed_tokens") if tied else None
            self._last = param, self.reader.linear(self.model.linear_specs[param], embedding)
        return self._last[1]


def _dense(packed: Packed) -> torch.Tensor:
    """What a weight of the plain-torch backend stands for, float32 [N, K]."""
    if packed.kind == "parts":
        return torch.cat([_dense(part) for part in packed.data["parts"]])
    if packed.kind == "dense":
        weight: torch.Tensor = packed.data["weight"]
        return weight.float()
    rows = reference.dequantize(packed, torch.float32)
    perm = packed.data.get("perm")
    if perm is not None:
        ordered = torch.empty_like(rows)
        ordered[perm.long()] = rows
        rows = ordered
    return rows.t().contiguous()
