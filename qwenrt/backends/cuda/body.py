"""The layers of a step that decodes, in five launches each: linears by kernels/stream.py, attention by attend.py.

A norm is no launch of its own: who writes the residual stream multiplies it by the next norm's weight as well, in the
order in which the next linear reads, and leaves sums of its squares; that linear divides by their root.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from qwenrt.backends.cuda import streaming
from qwenrt.backends.cuda.tables import Tiles
from qwenrt.backends.stack import Network
from qwenrt.ops.steps import DecodePlan, LayerCache, LayerKV, RotaryRows
from qwenrt.ops.types import AttentionWeights, LayerWeights, Packed

if TYPE_CHECKING:
    from qwenrt.backends.cuda.kernels.stream import Next, Normed


def why_not(network: Network) -> str | None:
    """Why a model's layers are not computed here, in few words; None where they are."""
    for i, layer in enumerate(network.layer_weights):
        mixer, mlp = layer.mixer, layer.mlp
        if not isinstance(mixer, AttentionWeights) or mixer.gated or not isinstance(mlp, tuple):
            return f"layer {i} is no plain one"
        for w in (mixer.qkv_proj, mixer.o_proj, *mlp):
            if (why := streaming.why_not(w, network.dtype)) is not None:
                return f"layer {i}: {why}"
    return None


class Body:
    """Of one model, of ``few`` rows at most. ``most``: rows that it serves; torch multiplies more by dense weights."""

    def __init__(self, network: Network, tiles: Tiles, few: int) -> None:
        self._network, self._tiles, self._rows = network, tiles, few
        self._counts: torch.Tensor | None = None  # of splits that have arrived: all 0 between launches
        self._layers: list[tuple[LayerWeights, AttentionWeights, Packed, Packed]] = []
        for layer in network.layer_weights:
            assert isinstance(layer.mixer, AttentionWeights) and isinstance(layer.mlp, tuple)
            self._layers.append((layer, layer.mixer, *layer.mlp))
        dense = any(
            w.kind == "dense" for _, mixer, *mlp in self._layers for w in (mixer.qkv_proj, mixer.o_proj, *mlp)
        )
        self.most = self._tiles.dense_tokens if dense else few

    def logits(
        self, x: torch.Tensor, rotary: RotaryRows, plan: DecodePlan, cache: Sequence[LayerCache]
    ) -> torch.Tensor:
        """The residual stream before the layers [T, D] -> logits float32 [T, V]."""
        first, mixer, _, _ = self._layers[0]
        dtype, eps = self._network.dtype, first.eps
        half: Normed | None = streaming.normed(x, first.input_norm, eps, mixer.qkv_proj, dtype, self._tiles)
        for i, (layer, mixer, gate_up, down) in enumerate(self._layers):
            kv = cache[i]
            assert half is not None and isinstance(kv, LayerKV)
            attended = self._attend(self._linear(half, mixer.qkv_proj), mixer, rotary, plan, kv)
            x, half = self._add(attended, mixer.o_proj, x, self._next(layer.post_norm, layer.eps, gate_up))
            assert half is not None
            inner = self._linear(half, gate_up, pair=True, place=streaming.place(down))
            x, half = self._add(inner, down, x, self._after(i, len(x)))
        head = self._network.head
        if half is None:
            return self._network.logits(self._network.final_norm(x))
        return self._linear(half, head.linear).float()

    def _attend(
        self, qkv: torch.Tensor, w: AttentionWeights, rotary: RotaryRows, plan: DecodePlan, kv: LayerKV
    ) -> torch.Tensor:
        """[T, (H + 2 KVH) hd] -> [T, H hd] as o_proj reads it."""
        from qwenrt.backends.cuda.kernels.attend import attend

        if self._counts is None:
            self._counts = torch.zeros(self._rows * w.heads[0], dtype=torch.int32, device=qkv.device)
        args = (qkv, w.heads, w.qk_norms, rotary, kv, plan, w.scale, w.window)
        return streaming.in_order(attend(*args, self._counts, self._tiles).flatten(1), w.o_proj)

    def _after(self, i: int, rows: int) -> Next | None:
        """What reads a layer's result: the next layer, or the head where it is computed here."""
        if i + 1 < len(self._layers):
            layer, mixer, _, _ = self._layers[i + 1]
            return self._next(layer.input_norm, layer.eps, mixer.qkv_proj)
        head = self._network.head
        few = rows <= self._tiles.dense_tokens or head.linear.kind != "dense"
        if not few or streaming.why_not(head.linear, self._network.dtype) is not None:
            return None
        return self._next(head.norm, head.eps, head.linear)

    def _next(self, norm: torch.Tensor, eps: float, w: Packed) -> Next:
        from qwenrt.backends.cuda.kernels.stream import Next

        return Next(norm, eps, self._network.dtype, streaming.place(w))

    def _linear(
        self, half: Normed, w: Packed, pair: bool = False, place: torch.Tensor | None = None
    ) -> torch.Tensor:
        from qwenrt.backends.cuda.kernels import stream

        warps = streaming.warps(w, self._tiles)
        return stream.linear(half, w, warps, self._network.dtype, pair=pair, place=place, pdl=self._tiles.pdl)

    def _add(
        self, x: torch.Tensor, w: Packed, residual: torch.Tensor, following: Next | None
    ) -> tuple[torch.Tensor, Normed | None]:
        from qwenrt.backends.cuda.kernels import stream

        warps = streaming.warps(w, self._tiles)
        return stream.linear_add(x, w, warps, residual, following, pdl=self._tiles.pdl)
