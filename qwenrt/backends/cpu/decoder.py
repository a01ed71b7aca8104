"""The stack of csrc/: all decoder layers and the head of a step in one call, between whose ops no Python runs."""

from __future__ import annotations

import ctypes
import math
from array import array
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import torch

from qwenrt.backends.cpu import delta_net
from qwenrt.backends.cpu.attention import Cache, address, cache_struct, sequences_struct
from qwenrt.backends.cpu.delta_net import DeltaNet
from qwenrt.backends.cpu.linear import Linear, elsewhere, of_parts
from qwenrt.backends.cpu.lora import Loras
from qwenrt.backends.stack import (
    Device,
    Outcome,
    StackParts,
    adapters_of,
    chosen_from,
    copy_states,
    plan_of,
    token_ids,
)
from qwenrt.ops.steps import LayerCache, LayerKV, LayerState, RotaryRows, Step, StepPlan
from qwenrt.ops.types import AttentionWeights, DeltaWeights, Experts, Head, LayerWeights, Packed


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


class DeltaLayer(ctypes.Structure):
    """QwenrtDeltaLayer of csrc/abi/qwenrt_forward.h."""

    _fields_ = (("net", DeltaNet), ("rates", Linear))


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
        ("delta", ctypes.c_void_p),
        ("num_heads", ctypes.c_int64),
        ("num_kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("gated", ctypes.c_int64),
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
        ("state_slots", ctypes.c_void_p),
        ("state_trail", ctypes.c_void_p),
        ("instead", ctypes.c_void_p),
        ("loras", ctypes.c_void_p),
        ("lora_count", ctypes.c_int64),
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


class LinearDevice(Device, Protocol):
    """A Device that computes linears by themselves."""

    def linear(self, x: torch.Tensor, w: Packed) -> torch.Tensor: ...


class Unserved(Exception):
    """A part of a layer is of a kind that the kernels know nothing of: which one."""


def _floats(tensor: torch.Tensor | None) -> int | None:
    """The address of float32 numbers as they lie; Unserved for others."""
    if tensor is not None and (tensor.dtype != torch.float32 or not tensor.is_contiguous()):
        raise Unserved(
            f"no kernel for a {str(tensor.dtype).removeprefix('torch.')} weight beside the linears"
        )
    return address(tensor)


_Instead = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
_OK, _NOT_SERVED = 0, 4  # of csrc/abi/qwenrt_cpu.h


def _instead(
    linear: Callable[[torch.Tensor, Packed], torch.Tensor],
    weights: dict[int, Packed],
    failures: list[BaseException],
) -> Any:
    """QwenrtInstead: ``linear`` of one of ``weights``, which are found by where their matrix lies. What it raises goes
    to ``failures``: the library cannot pass it on."""

    def floats(at: int, *shape: int) -> torch.Tensor:
        memory = (ctypes.c_float * math.prod(shape)).from_address(at)
        return torch.frombuffer(memory, dtype=torch.float32).view(shape)

    def compute(struct: int, x: int, y: int, tokens: int) -> int:
        try:
            w = weights[Linear.from_address(struct).matrix]
            result = linear(floats(x, tokens, w.in_features), w)
            floats(y, tokens, w.out_features).copy_(result)
        except BaseException as error:
            failures.append(error)
            return _NOT_SERVED
        return _OK

    return _Instead(compute)


class _Structs:
    """Layers in the structs of csrc/. ``memory``: those that others point at, to be kept as long; ``weights``: those of
    the linears, by where their matrix lies."""

    def __init__(self, linear_of: LinearOf) -> None:
        self._linear_of = linear_of
        self.memory: list[object] = []
        self.weights: dict[int, Packed] = {}

    def layer(self, w: LayerWeights, cache: LayerCache) -> Layer:
        """Raises Unserved."""
        if isinstance(w.mixer, AttentionWeights):
            mixer = self._attention(w.mixer)
        elif isinstance(cache, LayerState):
            mixer = self._delta_net(w.mixer, w.eps, cache)
        else:
            raise Unserved("linear attention without states")
        if isinstance(w.mlp, Experts):
            mlp: dict[str, Any] = {"experts": self._kept(self._experts(w.mlp))}
        else:
            mlp = {"gate_up": self._linear(w.mlp[0]), "down": self._linear(w.mlp[1])}
        norms = {"input_norm": _floats(w.input_norm), "post_norm": _floats(w.post_norm)}
        return Layer(**norms, **mixer, **mlp, eps=w.eps)

    def _attention(self, w: AttentionWeights) -> dict[str, Any]:
        q_norm, k_norm, _ = w.qk_norms or (None, None, 0.0)
        return {
            "q_norm": _floats(q_norm),
            "k_norm": _floats(k_norm),
            "qkv": self._linear(w.qkv_proj),
            "o": self._linear(w.o_proj),
            **dict(zip(("num_heads", "num_kv_heads", "head_dim"), w.heads, strict=True)),
            "window": w.window,
            "gated": w.gated,
            "scale": w.scale,
        }

    def _delta_net(self, w: DeltaWeights, eps: float, state: LayerState) -> dict[str, Any]:
        if not delta_net.serves(w):
            raise Unserved(
                f"no kernel for linear attention of {w.conv.shape[0]} taps and heads of {w.heads[2:]}"
            )
        for tensor in (w.conv, w.log_decay, w.decay_bias, w.out_norm):
            _floats(tensor)
        delta = DeltaLayer(delta_net.net_struct(w, eps, state), self._linear(w.rates_proj))
        return {"qkv": self._linear(w.in_proj), "o": self._linear(w.out_proj), "delta": self._kept(delta)}

    def head(self, head: Head) -> HeadStruct | None:
        """None where the kernels know nothing of one."""
        if head.linear.kind == "parts":
            return None
        try:
            return HeadStruct(_floats(head.norm), self._linear(head.linear), head.eps)
        except Unserved:
            return None

    def _linear(self, w: Packed) -> Linear:
        if w.kind != "parts":
            linear = self._linear_of(w)
        elif w.bias is not None:  # the loader gives each part its own
            linear = None
        else:
            parts = w.data["parts"]
            linear = of_parts(self._array(parts), len(parts), w.out_features, w.in_features)
        if linear is None:
            linear = elsewhere(self._kept(ctypes.c_byte()), w.out_features, w.in_features)
        self.weights[linear.matrix] = w
        return linear

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

    def _kept(self, struct: ctypes.Structure | ctypes.Array[Linear] | ctypes.c_byte) -> int:
        self.memory.append(struct)
        return ctypes.addressof(struct)


class DecoderStack:
    """Steps of a float32 model on the CPU in one call, ``forward`` of the kernels. Keeps what they point at alive.

    A linear that the kernels know nothing of is computed as the seams compute it: float32 weights, for which torch has
    products of its own. So is one that refuses its inputs as not finite: the seams keep one sequence's away from the
    others. A head in parts follows by the seams.
    """

    name = "one call"

    def __init__(
        self,
        backend: LinearDevice,
        parts: StackParts,
        linear_of: LinearOf,
        forward: Forward,
        rounds_queries: bool,
        no_lora: str | None = None,
    ) -> None:
        """``rounds_queries``: as ``rounded`` of cache_struct; ``no_lora``: why steps with adapters are not served.
        Raises Unserved where a part is of a kind that the kernels know nothing of."""
        self._backend, self._parts, self._forward, self._no_lora = backend, parts, forward, no_lora
        structs, head = _Structs(linear_of), parts.network.head
        weights = list(parts.network.layer_weights)
        layers = [structs.layer(w, kv) for w, kv in zip(weights, parts.cache, strict=True)]
        self._layers, self._head = (Layer * len(layers))(*layers), structs.head(head)
        caches = [
            cache_struct(kv, rounds_queries) if isinstance(kv, LayerKV) else Cache() for kv in parts.cache
        ]
        self._caches = (Cache * len(caches))(*caches)
        self._failures: list[BaseException] = []
        instead = _instead(backend.linear, structs.weights, self._failures)
        self._instead = ctypes.cast(instead, ctypes.c_void_p).value
        self._pointed_at = structs.memory, weights, head, instead
        self._loras = Loras(_linears_of(layers, structs.weights))

    def why_not(self, step: Step) -> str | None:
        if self._no_lora is not None and any(step.adapters):
            return f"adapters: {self._no_lora}"
        if any(self._parts.adapters[number].experts_of for number in step.adapters if number):
            return "a sequence has an adapter for experts"
        return None if step.num_tokens else "a step without tokens"

    def note(self) -> str:
        return ""

    def run(self, step: Step, before: Outcome | None = None) -> Outcome:
        network, backend, cache = self._parts.network, self._backend, self._parts.cache
        plan = plan_of(backend, step, self._parts.block_size)
        plan.adapters = adapters = adapters_of(step, self._parts.adapters)
        copy_states(cache, step.state_copies)
        x = network.embed(token_ids(backend, step, before), adapters).contiguous()
        rotary, rows = network.rotary(plan, step.ntk_alphas), step.logit_rows
        of_rows = None if adapters is None or not adapters.in_head else adapters.at(rows)
        here = rows and self._head is not None and of_rows is None
        logits = torch.empty(len(rows), network.vocab_size) if here else None
        self._compute(x, rotary, plan, rows, logits)
        copy_states(cache, step.states_kept)
        if rows and logits is None:
            logits = network.logits(network.final_norm(x[rows]), of_rows)
        outcome = chosen_from(
            self, backend, x[:0] if logits is None else logits, step.draws, self._parts.vocabulary
        )
        return replace(outcome, stream=x)

    def _compute(
        self,
        x: torch.Tensor,
        rotary: RotaryRows,
        plan: StepPlan,
        rows: list[int],
        logits: torch.Tensor | None,
    ) -> None:
        """x float32 [T, D] -> the residual stream after the layers in its place, and the ``logits`` of its ``rows``
        where they are given; states move on."""
        assert plan.slots is not None
        sequences, wanted = sequences_struct(plan), (ctypes.c_int64 * len(rows))(*rows)
        cos, sin, states = rotary.cos.contiguous(), rotary.sin.contiguous(), array("q", plan.state_slots)
        trail = _trail(plan)
        loras = None if plan.adapters is None else self._loras.of(plan.adapters)
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
            states.buffer_info()[0] if states else None,
            trail.buffer_info()[0] if trail else None,
            self._instead,
            None if loras is None else loras.ctypes.data,
            0 if loras is None else len(loras),
        )
        if not self._forward(self._layers, self._caches, self._head, struct, x, logits):
            raise self._failures.pop()


def _linears_of(layers: list[Layer], weights: dict[int, Packed]) -> dict[str, tuple[int, Packed]]:
    """Where the matrices of the layers' linears lie, by the names that adapters have for them; ``weights``: by where
    they lie."""
    found: dict[str, int] = {}
    for i, layer in enumerate(layers):
        linears = {"qkv_proj": layer.qkv, "o_proj": layer.o}
        if layer.delta:
            rates = DeltaLayer.from_address(layer.delta).rates
            linears = {"in_proj": layer.qkv, "out_proj": layer.o, "rates_proj": rates}
        if not layer.experts:
            linears |= {"gate_up_proj": layer.gate_up, "down_proj": layer.down}
        found |= {f"layers.{i}.{name}": linear.matrix for name, linear in linears.items()}
    return {name: (matrix, weights[matrix]) for name, matrix in found.items()}


def _trail(plan: StepPlan) -> array[int]:
    """Of each token the slot that the state after it is left in, -1 where it stays in its sequence's; empty where all
    do."""
    flat: array[int] = array("q")
    if any(plan.state_trails):
        for q_len, trail in zip(plan.q_lens, plan.state_trails, strict=True):
            flat.extend([*[-1] * (q_len - len(trail)), *trail])
    return flat
