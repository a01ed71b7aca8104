"""A whole stack of decoder layers, and the head, in one call of csrc/: between two ops of a step no Python runs."""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Callable

import torch

from qwenrt.backends.cpu import attention
from qwenrt.backends.cpu.attention import Cache, address, cache_struct
from qwenrt.backends.cpu.linear import Linear, of_parts
from qwenrt.ops.types import Experts, Head, LayerKV, LayerWeights, Packed, StepInputs


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


class Step(ctypes.Structure):
    """QwenrtStep of csrc/abi/qwenrt_forward.h."""

    _fields_ = (
        ("sequences", ctypes.c_void_p),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("q_scale", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("rotary_dim", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("due", ctypes.c_void_p),
        ("due_count", ctypes.c_int64),
    )


class HeadStruct(ctypes.Structure):
    """QwenrtHead of csrc/abi/qwenrt_forward.h."""

    _fields_ = (
        ("norm", ctypes.c_void_p),
        ("linear", Linear),
        ("eps", ctypes.c_float),
    )


LinearOf = Callable[[Packed], "Linear | None"]
Run = Callable[
    [
        "ctypes.Array[Layer]",
        "ctypes.Array[Cache]",
        "HeadStruct | None",
        Step,
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
        q_norm, k_norm, _ = w.qk_norms or (None, None, w.eps)
        norms = [_floats(norm) for norm in (w.input_norm, w.post_norm, q_norm, k_norm)]
        qkv, o = self._linear(w.qkv_proj), self._linear(w.o_proj)
        if isinstance(w.mlp, Experts):
            mlp, experts = (Linear(), Linear()), self._kept(self._experts(w.mlp))
        else:
            mlp, experts = (self._linear(w.mlp[0]), self._linear(w.mlp[1])), None
        return Layer(*norms, qkv, o, *mlp, experts, *w.heads, w.window, w.eps, w.scale)

    def head(self, head: Head) -> HeadStruct | None:
        """None where the kernel knows nothing of one."""
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
    """Layers and head as the kernel is told of them. Keeps what they point at alive."""

    def __init__(
        self,
        layers: list[LayerWeights],
        head: Head,
        structs: tuple[list[Layer], HeadStruct | None],
        memory: list[object],
        run: Run,
    ) -> None:
        self._pointed_at, self._run = (layers, head, memory), run
        self._layers, self._head = (Layer * len(structs[0]))(*structs[0]), structs[1]
        self._vocabulary, self.has_head = head.linear.out_features, structs[1] is not None
        self._held: tuple[list[LayerKV], ctypes.Array[Cache]] = ([], (Cache * 0)())

    @classmethod
    def of(cls, layers: list[LayerWeights], head: Head, linear_of: LinearOf, run: Run) -> DecoderStack | None:
        """None where a layer has a part that the kernel knows nothing of."""
        made = _Structs(linear_of)
        try:
            structs = [made.layer(w) for w in layers]
        except _Unserved:
            return None
        return cls(layers, head, (structs, made.head(head)), made.memory, run)

    def __call__(
        self, x: torch.Tensor, step: StepInputs, kv: list[LayerKV], due: list[int] | None = None
    ) -> torch.Tensor | None:
        """As Stack of x float32 [T, D], which is changed; None for a step that the seams must serve."""
        plan = step.plan
        division = attention.divide(plan)
        if division is None or not division.native.count or plan.slots is None:
            return None
        if x.requires_grad or kv[0].k.dtype not in (torch.float32, torch.uint8):
            return None
        held, caches = self._held
        if len(held) != len(kv) or not all(map(operator.is_, held, kv)):
            caches = (Cache * len(kv))(*(cache_struct(layer) for layer in kv))
            self._held = list(kv), caches
        x, asked = x.contiguous(), due or []
        wanted = (ctypes.c_int64 * len(asked))(*asked)
        logits = torch.empty(len(asked), self._vocabulary) if asked else None
        struct = Step(
            ctypes.addressof(division.native),
            step.cos.data_ptr(),
            step.sin.data_ptr(),
            address(step.q_scale),
            plan.slots.data_ptr(),
            step.cos.shape[1],
            x.shape[0],
            ctypes.addressof(wanted),
            len(asked),
        )
        if not self._run(self._layers, caches, self._head, struct, x, logits):
            return None
        return x if logits is None else logits
