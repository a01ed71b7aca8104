"""Ops by kernels in Triton, for every device that it compiles for: what CUDA and HIP backends override.

Triton is not required: where it cannot be imported, every op is its definition.
"""

from __future__ import annotations

import functools
import importlib
from functools import cached_property
from typing import ClassVar

import torch

from qwenrt.backends.base import Backend
from qwenrt.backends.binding import OpSpec, native
from qwenrt.backends.cuda import body, packing, streaming
from qwenrt.backends.cuda.tables import TILES, Tiles
from qwenrt.backends.stack import DecodeLayers, Network
from qwenrt.ops import reference
from qwenrt.ops.steps import DecodePlan, DrawTensors, LayerKV, LayerState, StepPlan
from qwenrt.ops.types import PLAIN, CanonicalWeight, DeltaWeights, Experts, Packed
from qwenrt.ops.weights import with_codes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FEW = (
    64  # tokens up to which codes are multiplied as they are; beyond, the matrix is dequantised once for all
)
# what body.py's launches stand for
_OF_LAYERS = (
    *("linear", "rms_norm", "silu_and_mul", "norm_linear", "linear_add", "norm_gate_up_silu"),
    *("rotary_store_kv", "decode_attention"),
)
_MATRIX = 1 << 14  # numbers of a delta net's matrix, of one head, that the registers of a program hold
_KINDS = ("dense", *packing.KINDS.values())  # of weights that kernels have
_AT_ONCE = 1 << 27  # weights of a dequantised matrix that exist at once


@functools.cache
def missing_triton() -> str | None:
    """Why kernels in Triton cannot be made here, or None."""
    try:
        importlib.import_module("qwenrt.backends.cuda.kernels.portable")
    except Exception as error:  # vendors' builds fail in ways of their own
        return f"Triton cannot be used here ({type(error).__name__}: {str(error)[:120]})"
    return None


class TritonBackend(Backend):
    """Decoding by kernels of our own. Prompts are torch's: its products, over matrices dequantised from codes, and its
    attention."""

    switched_off = False
    stackable: ClassVar[tuple[str, ...]] = (*PLAIN, *packing.KINDS.values())

    @cached_property
    def tiles(self) -> Tiles:
        """How much the programs of each kernel do at once."""
        return TILES

    @cached_property
    def gluon(self) -> bool:
        """Whether linears of few tokens go by kernels in Gluon."""
        return False

    def configure(
        self, kernels: str = "auto", num_threads: int | None = None, activations: str = "auto"
    ) -> None:
        """As Backend.configure; ``kernels`` "off": every op as defined."""
        self.switched_off = kernels == "off"

    def provides(self, need: str) -> str | None:
        if need != "triton":
            return super().provides(need)
        return "the kernels are switched off (QWENRT_KERNELS=off)" if self.switched_off else missing_triton()

    def why_not(self, op: str, spec: OpSpec) -> str | None:
        why = super().why_not(op, spec)
        if why is None and op == "linear" and spec.kind in ("w4a16", "w8a16"):
            return "its groups of inputs are no multiple of 8"
        return why

    # ---- linears

    @native(dtypes=DTYPES, needs=("triton",))
    def linear(self, x: torch.Tensor, w: Packed) -> torch.Tensor:
        if w.kind == "parts":
            y = torch.cat([self.linear(x, part) for part in w.data["parts"]], dim=-1)
            return y if w.bias is None else y + w.bias
        if self._streams(x, w, x.dtype):
            from qwenrt.backends.cuda.kernels import stream

            how = streaming.warps(w, self.tiles)
            return stream.linear(streaming.in_order(x, w), w, how, x.dtype, pdl=self.tiles.pdl)
        if self._alone(x, w):
            return self._token(x, w, x.dtype)
        if w.kind not in packing.KINDS.values():
            return reference.linear(x, w)
        from qwenrt.backends.cuda.kernels import portable

        if len(x) == 0:
            return x.new_empty(0, w.out_features)
        if len(x) <= FEW and not x.requires_grad and self.tiles.matrix_units:
            tile = self.tiles.product[next(size for size in self.tiles.product if size >= len(x))]
            return portable.tokens(x.contiguous(), w, tile)
        return self._many(x, w)

    def _streams(self, x: torch.Tensor, w: Packed, dtype: torch.dtype) -> bool:
        """Whether tokens x, in ``dtype`` where they meet the weight, are multiplied by kernels in Gluon."""
        most = self.tiles.dense_tokens if w.kind == "dense" else FEW
        few = self.gluon and 0 < len(x) <= most and not x.requires_grad
        return few and streaming.why_not(w, dtype) is None

    def _alone(self, x: torch.Tensor, w: Packed) -> bool:
        """Whether x is one token, of which sums are made by a kernel."""
        if len(x) != 1 or x.requires_grad or w.out_features == 0:
            return False
        if w.kind == "dense":
            return x.dtype in DTYPES and bool(w.data["weight"].is_contiguous())
        return w.kind in packing.KINDS.values()

    def _token(
        self,
        x: torch.Tensor,
        w: Packed,
        dtype: torch.dtype,
        norm: tuple[torch.Tensor, float] | None = None,
        pair: bool = False,
        residual: torch.Tensor | None = None,
        which: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x [1, K] by ``w``, or x [T, K] by experts ``which`` int64 [J], J / T of them for each token."""
        from qwenrt.backends.cuda.kernels import portable

        tile = self.tiles.dense if w.kind == "dense" else self.tiles.codes[w.bits]
        weight, eps = norm or (None, 0.0)
        residual = None if residual is None else residual.contiguous()
        ranks = 0 if which is None else len(which) // max(1, len(x))
        fused = portable.Fused(weight, eps, pair, residual, which, ranks)
        return portable.token(x.contiguous(), w, tile, dtype, fused)

    def _many(self, x: torch.Tensor, w: Packed) -> torch.Tensor:
        """By torch's product over a matrix that is dequantised, some rows at a time where it is very large."""
        from qwenrt.backends.cuda.kernels import portable

        if w.data["perm"] is not None:
            x = x.index_select(-1, w.data["perm"])
        parts = []
        for some in packing.in_rows(w, max(1, _AT_ONCE // w.in_features)):
            matrix = portable.matrix(some, x.dtype, self.tiles.matrix)
            dense = Packed("dense", some.out_features, some.in_features, {"weight": matrix}, some.bias)
            parts.append(reference.linear(x, dense))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    @native(dtypes=DTYPES, needs=("triton",))
    def norm_linear(self, x: torch.Tensor, norm: torch.Tensor, eps: float, w: Packed) -> torch.Tensor:
        dtype = self.dtype or norm.dtype
        if self._streams(x, w, dtype):
            return self._stream_normed(x, norm, eps, w, dtype)
        if not self._alone(x, w):
            return self.linear(self.rms_norm(x, norm, eps), w)
        return self._token(x, w, dtype, (norm, eps))

    def _stream_normed(
        self,
        x: torch.Tensor,
        norm: torch.Tensor,
        eps: float,
        w: Packed,
        dtype: torch.dtype,
        pair: bool = False,
    ) -> torch.Tensor:
        from qwenrt.backends.cuda.kernels import stream

        half = streaming.normed(x, norm, eps, w, dtype, self.tiles)
        return stream.linear(half, w, streaming.warps(w, self.tiles), dtype, pair=pair, pdl=self.tiles.pdl)

    @native(dtypes=DTYPES, needs=("triton",))
    def norm_gate_up_silu(self, x: torch.Tensor, norm: torch.Tensor, eps: float, w: Packed) -> torch.Tensor:
        dtype = self.dtype or norm.dtype
        if self._streams(x, w, dtype):
            return self._stream_normed(x, norm, eps, w, dtype, pair=True)
        if not self._alone(x, w):
            return self.silu_and_mul(self.linear(self.rms_norm(x, norm, eps), w))
        return self._token(x, w, dtype, (norm, eps), pair=True)

    @native(dtypes=DTYPES, needs=("triton",))
    def linear_add(self, x: torch.Tensor, w: Packed, residual: torch.Tensor) -> torch.Tensor:
        if self._streams(x, w, x.dtype):
            from qwenrt.backends.cuda.kernels import stream

            tokens, how = streaming.in_order(x, w), streaming.warps(w, self.tiles)
            return stream.linear_add(tokens, w, how, residual.contiguous(), pdl=self.tiles.pdl)[0]
        if not self._alone(x, w):
            return residual + self.wide_linear(x, w, residual.dtype)
        return self._token(x, w, residual.dtype, residual=residual)

    def linear_of_each(self, x: torch.Tensor, w: Packed, which: torch.Tensor) -> torch.Tensor:
        if w.kind == "parts":
            y = torch.cat([self.linear_of_each(x, part, which) for part in w.data["parts"]], dim=-1)
            return y if w.bias is None else y + w.bias[which]
        if w.kind in PLAIN:
            return super().linear_of_each(x, w, which)
        return self._token(x, w, x.dtype, which=which.contiguous())

    @native(dtypes=DTYPES, kinds=_KINDS, needs=("triton",))
    def norm_moe_add(self, x: torch.Tensor, norm: torch.Tensor, eps: float, w: Experts) -> torch.Tensor:
        """Where there are units for products, as norm_moe_add_each: the host learns nothing of the routes."""
        few = not self.tiles.matrix_units or x.requires_grad or len(x) == 0
        if few or w.stack(self.stackable) is not None or not self._stacked(w):
            return super().norm_moe_add(x, norm, eps, w)
        return self.norm_moe_add_each(x, norm, eps, w)

    @staticmethod
    def _stacked(w: Experts) -> bool:
        """Whether all of a layer's experts are of kinds that kernels have."""
        return w.stacked is not None and all(side.kind in _KINDS for side in w.stacked)

    @native(dtypes=DTYPES, kinds=_KINDS, needs=("triton",))
    def norm_moe_add_each(self, x: torch.Tensor, norm: torch.Tensor, eps: float, w: Experts) -> torch.Tensor:
        """The choice of experts, gate and up of all, down of all, and their sum: a launch each."""
        if not self._stacked(w):
            return super().norm_moe_add_each(x, norm, eps, w)
        from qwenrt.backends.cuda.kernels import experts

        assert w.stacked is not None
        normed = self.rms_norm(x, norm, eps)
        logits = reference.router_logits(normed, w.router)
        chosen, share = experts.route(logits, w.top_k, w.norm_topk_prob)
        if len(x) >= self.tiles.grouped_from and self.tiles.matrix_units:
            pairs, (inwards, down) = experts.by_expert(chosen, len(w.gate_up)), w.stacked
            tiles = [self.tiles.experts[16 if one.kind == "dense" else one.bits] for one in w.stacked]
            inner = experts.linear(normed, inwards, pairs, tiles[0], normed.dtype, pair=True)
            y = experts.linear(inner, down, pairs, tiles[1], x.dtype)
        else:
            which = chosen.flatten()
            inner = self._token(normed, w.stacked[0], normed.dtype, pair=True, which=which)
            y = self._token(inner, w.stacked[1], torch.float32, which=which)
        if w.shared is None:
            return experts.combine(y, share, x.dtype, x)
        return x + self.shared_expert(normed, w, experts.combine(y, share, x.dtype, None))

    def pack_linear(self, weight: CanonicalWeight, dtype: torch.dtype) -> Packed:
        """As Backend.pack_linear; codes by rows, where a kernel has their groups."""
        if weight.dense is None and self.packs_codes():
            packed = packing.pack(with_codes(weight), dtype, self.device)
            if packed is not None:
                return packed
        return super().pack_linear(with_codes(weight), dtype)

    def packs_codes(self) -> bool:
        """Whether codes are packed for the kernels."""
        return "linear" not in self.demoted and self.provides("triton") is None

    def packing_id(self) -> str:
        """As Backend.packing_id; without Triton codes lie as plain torch wants them."""
        return f"{super().packing_id()} {'rows32-v2' if self.packs_codes() else 'torch'}"

    def restore_packed(self, packed: Packed) -> str | None:
        if packed.kind in packing.KINDS.values() and self.packs_codes():
            return packing.why_not_restored(packed)
        return super().restore_packed(packed)

    # ---- between the linears

    @native(dtypes=DTYPES, needs=("triton",))
    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        if x.requires_grad or weight.requires_grad:
            return super().rms_norm(x, weight, eps)
        from qwenrt.backends.cuda.kernels import between

        return between.rms_norm(x, weight, eps, self.dtype, self.tiles.rows)

    @native(dtypes=DTYPES, needs=("triton",))
    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        if gate_up.requires_grad:
            return super().silu_and_mul(gate_up)
        from qwenrt.backends.cuda.kernels import between

        return between.silu_and_mul(gate_up, self.tiles.rows)

    @native(dtypes=DTYPES, needs=("triton",))
    def rotary_store_kv(
        self,
        qkv: torch.Tensor,
        heads: tuple[int, int, int],
        qk_norms: tuple[torch.Tensor, torch.Tensor, float] | None,
        cos: torch.Tensor,
        sin: torch.Tensor,
        q_scale: torch.Tensor | None,
        kv: LayerKV | None,
        plan: StepPlan | DecodePlan,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if qkv.requires_grad:
            return super().rotary_store_kv(qkv, heads, qk_norms, cos, sin, q_scale, kv, plan)
        from qwenrt.backends.cuda.kernels import between

        return between.rotary_store_kv(
            qkv, heads, qk_norms, cos, sin, q_scale, kv, plan.slots, self.tiles.rows
        )

    @native(dtypes=DTYPES, needs=("triton",))
    def decode_attention(
        self, q: torch.Tensor, kv: LayerKV, plan: DecodePlan, scale: float, window: int = 0
    ) -> torch.Tensor:
        from qwenrt.backends.cuda.kernels import attention

        return attention.decode_attention(q, kv, plan, scale, window, self.tiles)

    @native(dtypes=DTYPES, needs=("triton",))
    def decode_delta_net(
        self,
        projected: torch.Tensor,
        rates: torch.Tensor,
        w: DeltaWeights,
        eps: float,
        state: LayerState,
        plan: DecodePlan,
    ) -> torch.Tensor:
        *_, dk, dv = w.heads
        if dk * dv > _MATRIX:
            return super().decode_delta_net(projected, rates, w, eps, state, plan)
        from qwenrt.backends.cuda.kernels import delta

        return delta.decode_delta_net(projected, rates, w, eps, state, plan, self.tiles.state_warps)

    # ---- whole steps

    def decode_layers(self, network: Network) -> DecodeLayers | None:
        distrusted = {*_OF_LAYERS} & self.demoted.keys()
        if not self.gluon or distrusted or body.why_not(network) is not None:
            return None
        return body.Body(network, self.tiles, FEW)

    def choose_rows(
        self, logits: torch.Tensor, draw: DrawTensors | None, width: int, unused: torch.Tensor | None
    ) -> torch.Tensor:
        if draw is not None or self.provides("triton") is not None:
            return super().choose_rows(logits, draw, width, unused)
        from qwenrt.backends.cuda.kernels import choose

        return choose.largest(logits, unused, self.tiles.vocabulary)
