"""The stack of csrc/: all decoder layers and the head of a step in one call, between whose ops no Python runs."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch

from qwenrt.backends.cpu.attention import Cache, address, cache_struct, sequences_struct
from qwenrt.backends.cpu.linear import Linear, of_parts
from qwenrt.backends.stack import Device, Outcome, SeamStack, StackParts, chosen_from, plan_of, token_ids
from qwenrt.ops.steps import LayerKV, RotaryRows, Step, StepPlan
from qwenrt.ops.types import AttentionWeights, Experts, Head, LayerWeights, Packed


class ExpertsStruct(ctypes.Structure):
    """QwenrtExperts of csrc/abi/qwenrt_forward.h."""

    _fields_ = (
        ("router", ctypes.c_void_p),
        ("gate_up", ctypes.c_void_p),
        ("down", ctypes.c_void_p),
        ("shared_gate", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("top_k", ctypes.c_int64),
        ("norm_topk_prob", ctypes.c_int64),
    )


class Layer(ctypes.Structure):
    """QwenrtLayer of csrc/abi/qwenrt_forward.h."""

    _fields_ = (
        ("input_norm", ctypes.c_void_p),
        ("post_norm", ctypes.c_void_p),
        ("q_norm", ctypes.c_void_p),
        ("k_norm", ctypes.c_void_p),
        ("qkv", Linear),
        ("o", Linear),
        ("gate_up", Linear),
        ("down", Linear),
        ("experts", ctypes.c_void_p),
        ("num_heads", ctypes.c_int64),
        ("num_kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("eps", ctypes.c_float),
        ("scale", ctypes.c_float),
    )


class StepStruct(ctypes.Structure):
    """QwenrtStep of csrc/abi/qwenrt_forward.h."""

    _fields_ = (
        ("sequences", ctypes.c_void_p),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("q_scale", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("rotary_dim", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("logit_rows", ctypes.c_void_p),
        ("logit_row_count", ctypes.c_int64),
    )


class HeadStruct(ctypes.Structure):
    """QwenrtHead of csrc/abi/qwenrt_forward.h."""

    _fields_ = (
        ("norm", ctypes.c_void_p),
        ("linear", Linear),
        ("eps", ctypes.c_float),
    )


LinearOf = Callable[[Packed], "Linear | None"]
Forward = Callable[
    [
        "ctypes.Array[Layer]",
        "ctypes.Array[Cache]",
        "HeadStruct | None",
        StepStruct,
        torch.Tensor,
        "torch.Tensor | None",
    ],
    bool,
]


class _Unserved(Exception):
    """A part of a layer is of a kind that the kernel knows nothing of."""


def _floats(tensor: torch.Tensor | None) -> int | None:
    """The address of float32 numbers as they lie; _Unserved for others."""
    if tensor is not None and (tensor.dtype != torch.float32 or not tensor.is_contiguous()):
        raise _Unserved
    return address(tensor)


class _Structs:
    """Layers in the structs of csrc/. ``memory``: those that others point at, to be kept as long."""

    def __init__(self, linear_of: LinearOf) -> None:
        self._linear_of = linear_of
        self.memory: list[object] = []

    def layer(self, w: LayerWeights) -> Layer:
        """Raises _Unserved."""
        mixer = w.mixer
        if not isinstance(mixer, AttentionWeights) or mixer.gated:
            raise _Unserved
        q_norm, k_norm, _ = mixer.qk_norms or (None, None, w.eps)
        norms = [_floats(norm) for norm in (w.input_norm, w.post_norm, q_norm, k_norm)]
        qkv, o = self._linear(mixer.qkv_proj), self._linear(mixer.o_proj)
        if isinstance(w.mlp, Experts):
            mlp, experts = (Linear(), Linear()), self._kept(self._experts(w.mlp))
        else:
            mlp, experts = (self._linear(w.mlp[0]), self._linear(w.mlp[1])), None
        return Layer(*norms, qkv, o, *mlp, experts, *mixer.heads, mixer.window, w.eps, mixer.scale)

    def head(self, head: Head) -> HeadStruct | None:
        """None where the kernels know nothing of one."""
        if head.linear.kind == "parts":
            return None
        try:
            return HeadStruct(_floats(head.norm), self._linear(head.linear), head.eps)
        except _Unserved:
            return None

    def _linear(self, w: Packed) -> Linear:
        if w.kind != "parts":
            if (linear := self._linear_of(w)) is None:
                raise _Unserved
            return linear
        if w.bias is not None:  # the loader gives each part its own
            raise _Unserved
        parts = w.data["parts"]
        return of_parts(self._array(parts), len(parts), w.out_features, w.in_features)

    def _array(self, weights: list[Packed]) -> int:
        return self._kept((Linear * len(weights))(*map(self._linear, weights)))

    def _experts(self, w: Experts) -> ExpertsStruct:
        gate_up, down, gate = w.gate_up, w.down, w.shared_gate
        if w.shared is not None and gate is not None:
            gate_up, down = [*gate_up, w.shared[0]], [*down, w.shared[1]]
        else:
            gate = None
        counts = (len(w.down), w.top_k, int(w.norm_topk_prob))
        return ExpertsStruct(
            _floats(w.router), self._array(gate_up), self._array(down), _floats(gate), *counts
        )

    def _kept(self, struct: ctypes.Structure | ctypes.Array[Linear]) -> int:
        self.memory.append(struct)
        return ctypes.addressof(struct)


class DecoderStack:
    """Steps of a float32 model on the CPU in one call, ``forward`` of the kernels. Keeps what they point at alive.

    A head that the kernels know nothing of follows by the seams. Where the call finds numbers that are not finite it
    gives up, and the seams compute the whole step: they keep one sequence's away from the others.
    """

    name = "one call"

    def __init__(
        self, backend: Device, parts: StackParts, structs: _Structs, forward: Forward, seams: SeamStack
    ) -> None:
        """Raises _Unserved where a part is of a kind that the kernels know nothing of."""
        self._backend, self._parts, self._forward, self._seams = backend, parts, forward, seams
        weights, head = list(parts.network.layer_weights), parts.network.head
        layers = [structs.layer(w) for w in weights]
        self._layers, self._head = (Layer * len(layers))(*layers), structs.head(head)
        self._pointed_at = structs.memory, weights, head
        caches = [cache_struct(kv) for kv in parts.cache if isinstance(kv, LayerKV)]
        self._caches = (Cache * len(caches))(*caches)

    @classmethod
    def of(
        cls, backend: Device, parts: StackParts, linear_of: LinearOf, forward: Forward, seams: SeamStack
    ) -> DecoderStack | None:
        """None where a layer has a part that the kernels know nothing of."""
        try:
            return cls(backend, parts, _Structs(linear_of), forward, seams)
        except _Unserved:
            return None

    def why_not(self, step: Step) -> str | None:
        return None if step.num_tokens else "a step without tokens"

    def note(self) -> str:
        return ""

    def run(self, step: Step, before: Outcome | None = None) -> Outcome:
        network, backend = self._parts.network, self._backend
        plan = plan_of(backend, step, self._parts.block_size)
        x = network.embed(token_ids(backend, step, before)).contiguous()
        rotary, rows = network.rotary(plan, step.ntk_alphas), step.logit_rows
        logits = torch.empty(len(rows), network.vocab_size) if rows and self._head is not None else None
        if not self._compute(x, rotary, plan, rows, logits):
            return self._seams.run(step, before)
        if rows and logits is None:
            logits = network.logits(network.final_norm(x[rows]))
        return chosen_from(
            self, backend, x[:0] if logits is None else logits, step.draws, self._parts.vocabulary
        )

    def _compute(
        self,
        x: torch.Tensor,
        rotary: RotaryRows,
        plan: StepPlan,
        rows: list[int],
        logits: torch.Tensor | None,
    ) -> bool:
        """x float32 [T, D] -> the residual stream after the layers in its place, and the ``logits`` of its ``rows``
        where they are given; False where it gave up."""
        assert plan.slots is not None
        sequences, wanted = sequences_struct(plan), (ctypes.c_int64 * len(rows))(*rows)
        cos, sin = rotary.cos.contiguous(), rotary.sin.contiguous()
        struct = StepStruct(
            ctypes.addressof(sequences),
            cos.data_ptr(),
            sin.data_ptr(),
            address(rotary.q_scale),
            plan.slots.data_ptr(),
            cos.shape[1],
            x.shape[0],
            ctypes.addressof(wanted),
            0 if logits is None else len(rows),
        )
        return self._forward(self._layers, self._caches, self._head, struct, x, logits)
