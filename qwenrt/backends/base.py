"""The backend of any torch device: every op is its definition. Vendors subclass it and override what they do
better; the rest keeps working."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from qwenrt.backends.binding import PRIMITIVES, SEAMS, WHOLES, Binding, Limits, OpSpec
from qwenrt.backends.graphs import EagerGraphs, Graphs, GraphStack
from qwenrt.backends.stack import DecodeLayers, Network, SeamStack, Stack, StackParts
from qwenrt.config import LinearAttentionConfig, ModelConfig
from qwenrt.config.layers import BLOCK_SIZE, kv_bytes_per_token
from qwenrt.errors import BackendError, QwenrtError
from qwenrt.ops import delta, lora, quantization, reference
from qwenrt.ops.steps import (
    DecodePlan,
    Draw,
    DrawTensors,
    LayerCache,
    LayerKV,
    LayerState,
    StepPlan,
    Vocabulary,
)
from qwenrt.ops.types import PLAIN, CanonicalWeight, DeltaWeights, Experts, LoraSpan, Packed

_HEADROOM_BITS = (
    6  # outputs up to 64 times the largest float16; products below 2^-18 lose bits, which none notices
)


@dataclass
class Backend:
    """Runs every op as defined, on any torch device.

    Shapes as in ops/reference.py: T flat tokens, H query heads, KVH key heads, hd head_dim.
    ``demoted``: op -> why its override is not trusted on this machine; the definition serves instead.
    """

    device: torch.device
    bindings: list[Binding] = field(default_factory=list)
    demoted: dict[str, str] = field(default_factory=dict)
    # of the model that was set up last: not held, as they hold it and its cache
    serving: list[weakref.ref[Stack]] = field(default_factory=list, init=False)
    # Why none but the seams serves that model, where it could be otherwise.
    seams_because: str = field(default="", init=False)
    dtype: torch.dtype | None = field(default=None, init=False)  # of the activations, once an op is bound
    block_size: int = field(default=BLOCK_SIZE, init=False)  # tokens of a block of the cache
    api: ClassVar[int] = 1  # of this class, for plug-ins: it changes when they have to
    name: ClassVar[str] = "torch"
    device_type: ClassVar[str] = "cpu"  # of torch, for plugins
    layout_id: ClassVar[str] = "torch-v1"
    stackable: ClassVar[tuple[str, ...]] = PLAIN  # kinds of which linear_of_each takes many at once

    @classmethod
    def missing(cls) -> str | None:
        """Why a plug-in's device is not here, or None. Cheap, and asked before one is made."""
        return None

    # ---- which code serves

    def provides(self, need: str) -> str | None:
        """None where the named condition (a library, an instruction set) holds, else the reason it does not."""
        return f"{need} is not available"

    def resolve(self, spec: OpSpec) -> Callable[..., Any]:
        """The bound function for one use of an op, chosen once at model build and noted in ``bindings``: a method of
        `bound`."""
        bound = self.bound(spec)
        why_not_seam = self.why_not(spec.op, spec)
        seam_serves = self._native(spec.op) is not None and why_not_seam is None
        for op in (spec.op,) if seam_serves else SEAMS.get(spec.op, (spec.op,)):
            limits, why = self._native(op), self.why_not(op, spec)
            serves = limits is not None and why is None
            note = limits.note if limits is not None and serves else why or why_not_seam or ""
            self.bindings.append(Binding(op, spec.where, spec.kind, serves, note))
        method: Callable[..., Any] = getattr(bound, spec.op)
        return method

    def bound(self, spec: OpSpec) -> Backend:
        """A copy of this backend in which every override that does not serve a use is replaced by its definition, so
        that a seam composes what really serves."""
        bound = copy.copy(self)
        bound.dtype = spec.dtype
        for op in (*PRIMITIVES, *SEAMS):
            if self._native(op) is not None and self.why_not(op, spec) is not None:
                setattr(bound, op, getattr(Backend, op).__get__(bound))
        return bound

    def _native(self, op: str) -> Limits | None:
        return getattr(getattr(type(self), op), "native", None)

    def overrides(self, op: str) -> bool:
        """Whether this backend has code of its own for one of PRIMITIVES, SEAMS or WHOLES."""
        if op in WHOLES:
            return getattr(type(self), op) is not getattr(Backend, op)
        return self._native(op) is not None

    def demote(self, op: str, why: str) -> None:
        """From now on the definition serves in place of this backend's own ``op``; ``bindings`` say why."""
        self.demoted[op] = why
        if op in WHOLES:  # called as they are; the others are bound by `resolve`
            setattr(self, op, getattr(Backend, op).__get__(self))

    def note_wholes(self, stacks: list[Stack]) -> None:
        """Say in ``bindings`` which of WHOLES serve, and note ``stacks``, those of a model, as the ones ``serving``."""
        self.serving = [weakref.ref(stack) for stack in stacks]
        self.bindings[:] = [binding for binding in self.bindings if binding.op not in WHOLES]
        for op in filter(self.overrides, WHOLES):
            serves = op not in self.demoted and (op != "stacks" or len(stacks) > 1)
            note = f"whole steps by {stacks[0].name}" if serves else self.seams_because
            note = note if op == "stacks" else ""
            self.bindings.append(Binding(op, "model", "", serves, self.demoted.get(op, note)))

    def why_not(self, op: str, spec: OpSpec) -> str | None:
        """The reason this backend's override of ``op`` does not serve a use; None where it does or there is none."""
        limits = self._native(op)
        if limits is None:
            return None
        if op in self.demoted:
            return self.demoted[op]
        if limits.dtypes and spec.dtype not in limits.dtypes:
            return f"no {str(spec.dtype).removeprefix('torch.')} kernel"
        if limits.head_dim and spec.head_dim and spec.head_dim not in limits.head_dim:
            return f"no kernel for head_dim {spec.head_dim}"
        if limits.kinds and spec.kind and spec.kind not in limits.kinds:
            return f"no {spec.kind} kernel"
        return next((why for need in limits.needs if (why := self.provides(need)) is not None), None)

    # ---- primitives

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return reference.rms_norm(x, weight, eps, self.dtype)

    def linear(self, x: torch.Tensor, w: Packed) -> torch.Tensor:
        return reference.linear(x, w)

    def rotary(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return reference.rotary(x, cos, sin)

    def store_kv(self, k: torch.Tensor, v: torch.Tensor, kv: LayerKV, slots: torch.Tensor) -> None:
        reference.store_kv(k, v, kv, slots)

    def attention(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        kv: LayerKV | None,
        plan: StepPlan,
        scale: float,
        window: int = 0,
    ) -> torch.Tensor:
        return reference.attention(q, k, v, kv, plan, scale, window)

    def decode_attention(
        self, q: torch.Tensor, kv: LayerKV, plan: DecodePlan, scale: float, window: int = 0
    ) -> torch.Tensor:
        return reference.decode_attention(q, kv, plan, scale, window)

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return reference.silu_and_mul(gate_up)

    def gate_output(self, attended: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return reference.gate_output(attended, gate)

    def causal_conv(
        self, x: torch.Tensor, weight: torch.Tensor, state: LayerState | None, plan: StepPlan
    ) -> torch.Tensor:
        return delta.causal_conv(x, weight, state, plan)

    def gated_delta(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        beta: torch.Tensor,
        g: torch.Tensor,
        state: LayerState | None,
        plan: StepPlan,
        tiled: bool = False,
    ) -> torch.Tensor:
        return delta.gated_delta(q, k, v, beta, g, state, plan, tiled)

    def gated_norm(self, o: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return delta.gated_norm(o, z, weight, eps)

    def add_lora(
        self, y: torch.Tensor, x: torch.Tensor, spans: Sequence[LoraSpan], bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return lora.add_lora(y, x, spans, bias)

    # ---- seams: what a decoder layer calls

    def norm_linear(self, x: torch.Tensor, norm: torch.Tensor, eps: float, w: Packed) -> torch.Tensor:
        """[T, D] -> [T, N] = linear(rms_norm(x))."""
        return self.linear(self.rms_norm(x, norm, eps), w)

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
        """qkv [T, (H + 2 KVH) hd] -> rotated q [T, H, hd] and k, v [T, KVH, hd], k and v stored as well.

        ``heads``: (H, KVH, hd). ``qk_norms``: weights [hd] of the norms of each query and each key head before they
        are rotated, and their eps. ``q_scale`` [T] multiplies each token's rotated query (LogN), in q's dtype. q and
        k are those that the cache takes, where it codes keys channel by channel (reference.fit_to_codes).
        """
        num_heads, num_kv_heads, head_dim = heads
        rows = qkv.view(qkv.shape[0], num_heads + 2 * num_kv_heads, head_dim)
        qk, v = rows.split_with_sizes([num_heads + num_kv_heads, num_kv_heads], dim=1)
        if qk_norms is not None:
            q_norm, k_norm, eps = qk_norms
            q, k = qk.split_with_sizes([num_heads, num_kv_heads], dim=1)
            qk = torch.cat((self.rms_norm(q, q_norm, eps), self.rms_norm(k, k_norm, eps)), dim=1)
        q, k = self.rotary(qk, cos, sin).split_with_sizes([num_heads, num_kv_heads], dim=1)
        if q_scale is not None:
            q = q * q_scale.to(q.dtype)[:, None, None]
        q, k = reference.fit_to_codes(q, k, kv)
        if kv is not None and plan.slots is not None:
            self.store_kv(k, v, kv, plan.slots)
        return q, k, v

    def delta_net(
        self,
        projected: torch.Tensor,
        rates: torch.Tensor,
        w: DeltaWeights,
        eps: float,
        state: LayerState | None,
        plan: StepPlan,
    ) -> torch.Tensor:
        """projected [T, C + nv dv] (queries, keys, values and z) and rates [T, 2 nv] (b and a) -> what the tokens read
        of their sequence's state, normed and gated [T, nv dv]; the state moves on."""
        mixed, z = delta.split_gate(projected, w.heads)
        mixed = self.causal_conv(mixed, w.conv, state, plan)
        beta, g = delta.rates(rates, w.log_decay, w.decay_bias)
        o = self.gated_delta(*delta.split_heads(mixed, w.heads), beta, g, state, plan, w.tiled)
        return self.gated_norm(o, z, w.out_norm, eps).flatten(1)

    def decode_delta_net(
        self,
        projected: torch.Tensor,
        rates: torch.Tensor,
        w: DeltaWeights,
        eps: float,
        state: LayerState,
        plan: DecodePlan,
    ) -> torch.Tensor:
        """As delta_net of one token of each sequence, whose states' slots the device alone knows."""
        mixed, z = delta.split_gate(projected, w.heads)
        mixed = delta.decode_conv(mixed, w.conv, state, plan)
        beta, g = delta.rates(rates, w.log_decay, w.decay_bias)
        o = delta.decode_delta(*delta.split_heads(mixed, w.heads), beta, g, state, plan, w.tiled)
        return self.gated_norm(o, z, w.out_norm, eps).flatten(1)

    def linear_add(self, x: torch.Tensor, w: Packed, residual: torch.Tensor) -> torch.Tensor:
        """residual + linear(x), both [T, D]; a float32 residual beside float16 activations is not overflowed."""
        return residual + self.wide_linear(x, w, residual.dtype)

    def norm_gate_up_silu(self, x: torch.Tensor, norm: torch.Tensor, eps: float, w: Packed) -> torch.Tensor:
        """[T, D] -> [T, I] = silu_and_mul(linear(rms_norm(x)))."""
        return self.silu_and_mul(self.linear(self.rms_norm(x, norm, eps), w))

    def norm_moe_add(self, x: torch.Tensor, norm: torch.Tensor, eps: float, w: Experts) -> torch.Tensor:
        """[T, D] -> [T, D] = x + the weighted sum of each token's experts over rms_norm(x).

        Experts are added in the order of their numbers, so that a token's sum is the same in every batch.
        """
        normed = self.rms_norm(x, norm, eps)
        logits = reference.router_logits(normed, w.router)
        weights, chosen = reference.route(logits, w.top_k, w.norm_topk_prob)
        total = torch.zeros_like(x)
        for expert in sorted(set(chosen.flatten().tolist())):
            token, rank = (chosen == expert).nonzero(as_tuple=True)
            y = self._mlp(normed.index_select(0, token), w.gate_up[expert], w.down[expert], x.dtype)
            total = total.index_add(0, token, y * weights[token, rank].unsqueeze(-1))
        return x + self.shared_expert(normed, w, total)

    def shared_expert(self, normed: torch.Tensor, w: Experts, total: torch.Tensor) -> torch.Tensor:
        """``total`` [T, D] and what the expert that serves every token adds, where there is one."""
        if w.shared is None or w.shared_gate is None:
            return total
        gate = torch.sigmoid(F.linear(normed, w.shared_gate.to(normed.dtype)))
        return total + gate * self._mlp(normed, *w.shared, total.dtype)

    def _mlp(self, x: torch.Tensor, gate_up: Packed, down: Packed, dtype: torch.dtype) -> torch.Tensor:
        """[T, D] -> [T, D] in ``dtype``: one expert."""
        return self.wide_linear(self.silu_and_mul(self.linear(x, gate_up)), down, dtype)

    def norm_moe_add_each(self, x: torch.Tensor, norm: torch.Tensor, eps: float, w: Experts) -> torch.Tensor:
        """As norm_moe_add of few tokens, and the device is not asked which experts: ``w.stacked``."""
        assert w.stacked is not None
        gate_up, down = w.stacked
        normed = self.rms_norm(x, norm, eps)
        logits = reference.router_logits(normed, w.router)
        weights, chosen = reference.route(logits, w.top_k, w.norm_topk_prob)
        chosen, order = chosen.sort(dim=-1)
        weights = weights.gather(1, order).unsqueeze(-1)
        total = torch.zeros_like(x)
        for rank in range(w.top_k):
            inner = self.silu_and_mul(self.linear_of_each(normed, gate_up, chosen[:, rank]))
            scaled = inner if x.dtype == normed.dtype else inner * 2.0**-_HEADROOM_BITS
            y = self.linear_of_each(scaled, down, chosen[:, rank]).to(x.dtype)
            total = total + (y if x.dtype == normed.dtype else y * 2.0**_HEADROOM_BITS) * weights[:, rank]
        return x + self.shared_expert(normed, w, total)

    def linear_of_each(self, x: torch.Tensor, w: Packed, which: torch.Tensor) -> torch.Tensor:
        """reference.linear_of_each, of kinds that are ``stackable``."""
        return reference.linear_of_each(x, w, which)

    def wide_linear(self, x: torch.Tensor, w: Packed, dtype: torch.dtype) -> torch.Tensor:
        """linear(x) for a sum in ``dtype``. Some float16 models have outputs beyond 65504 at a few tokens: where the
        sum is wider than x, x is scaled down before the product and the output up after it, both exactly."""
        if dtype == x.dtype or w.bias is not None:
            return self.linear(x, w)
        return self.linear(x * 2.0**-_HEADROOM_BITS, w).to(dtype) * 2.0**_HEADROOM_BITS

    # ---- whole steps

    def stacks(self, parts: StackParts) -> list[Stack]:
        """What computes whole steps of a model, best first; the last one serves every step."""
        seams = SeamStack(self, parts)
        graphs = None if "stacks" in self.demoted else self.graphs()
        return [seams] if graphs is None else [GraphStack(self, parts, graphs, seams), seams]

    def decode_layers(self, network: Network) -> DecodeLayers | None:
        """What computes the layers of a captured step better than its seams one by one, of a model that it serves."""
        return None

    def graphs(self) -> Graphs | None:
        """How this device captures a step that decodes; None where nothing is gained: it computes as it is told."""
        return None if self.device.type == "cpu" else EagerGraphs()

    @property
    def depth(self) -> int:
        """How many steps may be under way when the next one is begun: 1 where the device computes by itself."""
        return 0 if self.device.type == "cpu" else 1

    def choose(self, logits: torch.Tensor, draws: list[Draw], vocabulary: Vocabulary) -> torch.Tensor:
        """A token of each row of logits float32 [R, V >= vocabulary.size] -> int64 [R] on the device, NOT_FINITE where
        a row is not finite, as reference.choose. Logits may be changed."""
        logits = logits[:, : vocabulary.size]
        unused = vocabulary.unused_on(logits.device)
        if all(draw.greedy for draw in draws):
            return self.choose_rows(logits, None, 0, unused)
        width = max(draw.width(logits.shape[1]) for draw in draws)
        return self.choose_rows(logits, DrawTensors.of(draws, logits.device), width, unused)

    def choose_rows(
        self, logits: torch.Tensor, draw: DrawTensors | None, width: int, unused: torch.Tensor | None
    ) -> torch.Tensor:
        """reference.choose, of draws that are on the device: what a captured step chooses with."""
        return reference.choose(logits, draw, width, unused)

    # ---- layouts

    def pack_linear(self, weight: CanonicalWeight, dtype: torch.dtype) -> Packed:
        """A weight in this backend's layout and on its device. A dense one that fits already is not copied."""
        return reference.pack(weight, dtype, self.device)

    def quantize_dense(
        self, weight: torch.Tensor, bits: int, group_size: int, bias: torch.Tensor | None, name: str
    ) -> CanonicalWeight:
        """quantization.quantize_dense of a dense weight that is not on a device yet; overrides give the same bits."""
        return quantization.quantize_dense(weight, bits, group_size, bias, name=name)

    def packs_words(self) -> bool:
        """Whether pack_linear takes codes in the ``words`` of a GPTQ file; else they come unpacked."""
        return False

    def packing_id(self) -> str:
        """What decides, beside a weight and a dtype, which bits pack_linear makes of it: kept weights are of one id."""
        kernels = " without its linear" if "linear" in self.demoted else ""
        return f"{self.name} {self.layout_id}{kernels}"

    def restore_packed(self, packed: Packed) -> str | None:
        """Put back what pack_linear added to ``packed.data`` beside tensors, numbers, texts and lists of these.

        ``packed`` comes from a file: a backend whose kernels trust its shapes checks them here -> why it cannot be
        used, or None.
        """
        known = ("dense", "w4a16", "w8a16", "parts")
        return None if packed.kind in known else f"{self.name} has no weights of kind {packed.kind[:40]!r}"

    def alloc_cache(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        *,
        num_blocks: int,
        block_size: int,
        num_states: int,
        quantized: bool,
    ) -> list[LayerCache]:
        """The memory of a model's sequences: for each layer pages of keys and values, or states."""
        shape = (config.num_kv_layers, num_blocks, block_size, config.num_kv_heads, config.head_dim)
        pages: Iterator[LayerCache] = iter(self.alloc_kv(*shape, dtype, quantized))
        states: Iterator[LayerCache] = iter(())
        delta = config.linear_attention
        if delta is not None:
            states = iter(self.alloc_states(config.num_linear_layers, num_states, delta, dtype))
        return [next(states if config.is_linear(i) else pages) for i in range(config.num_layers)]

    def alloc_kv(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        quantized: bool,
    ) -> list[LayerKV]:
        """An empty paged cache for each layer; what an unused slot holds must never matter."""
        shape = (num_blocks, block_size, num_kv_heads, head_dim)
        layers = []
        for _ in range(num_layers):
            if quantized:
                sides = [self.empty_kv(shape[:3], torch.float32) for _ in range(4)]
                layers.append(LayerKV(*(self.empty_kv(shape, torch.uint8) for _ in range(2)), *sides))
            else:
                layers.append(LayerKV(*(self.empty_kv(shape, dtype) for _ in range(2))))
        return layers

    def alloc_states(
        self, num_layers: int, slots: int, delta: LinearAttentionConfig, dtype: torch.dtype
    ) -> list[LayerState]:
        """Room for ``slots`` sequences' states in each layer of linear attention; what an unused slot holds must never
        matter."""
        matrices = (slots, delta.num_value_heads, delta.key_dim, delta.value_dim)
        return [
            LayerState(
                self.empty_kv((slots, delta.conv_kernel - 1, delta.channels), dtype),
                self.empty_kv(matrices, torch.float32),
            )
            for _ in range(num_layers)
        ]

    def empty_kv(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised memory of a cache, on the device."""
        return torch.empty(shape, dtype=dtype, device=self.device)

    def kv_bytes_per_token(
        self, num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, quantized: bool
    ) -> int:
        """What alloc_kv takes for one slot of all layers."""
        return kv_bytes_per_token(num_layers, num_kv_heads, head_dim, dtype.itemsize, quantized)

    # ---- the device

    def send(self, values: list[int] | np.ndarray) -> torch.Tensor:
        """Numbers of the host on the device, integers as int64, without waiting for it."""
        host = (
            torch.tensor(values, dtype=torch.int64) if isinstance(values, list) else torch.from_numpy(values)
        )
        if self.device.type == "cpu":
            return host
        return host.to(self.device, non_blocking=True)

    def fetch(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Begin to bring a tensor to the host -> what waits for it, and for nothing that is asked later, and gives
        it."""
        if tensor.device.type == "cpu":
            return lambda: tensor
        host = tensor.to("cpu", non_blocking=True)
        module = torch.get_device_module(tensor.device)
        done = module.Event()
        done.record(module.current_stream(tensor.device))  # of its device, whichever is the current one

        def wait() -> torch.Tensor:
            done.synchronize()
            return host

        return wait

    def configure(
        self, kernels: str = "auto", num_threads: int | None = None, activations: str = "auto"
    ) -> None:
        """The user's settings for a device that has such choices; before any weight is packed."""

    def activations_of(self, w: Packed) -> str:
        """What a linear's inputs are rounded to before they are multiplied: "int8", "int16", "exact" for nothing; ""
        where there is no choice."""
        return ""

    def rounding(self, op: str) -> float:
        """The error, relative to the largest value of the result, that the user's settings allow an op on purpose."""
        return 0.0

    def weight_dtype(self, stored: str | None, dtype: torch.dtype) -> torch.dtype:
        """What dense weights ``stored`` in one dtype are kept in for activations in ``dtype``."""
        return dtype

    def default_dtype(self, stored: str | None, nbytes_float32: int, quantized: bool) -> torch.dtype:
        """The dtype "auto" means: what the checkpoint is ``stored`` in, float16 where the device has no bfloat16.

        ``nbytes_float32``: what the weights would take in float32; ``quantized``: whether they are GPTQ's.
        """
        if stored in ("float16", "float32"):
            return torch.float16 if stored == "float16" else torch.float32
        # asked of torch.cuda and torch_npu by this name; a V100 or a 910A says no
        supported = getattr(torch.get_device_module(self.device), "is_bf16_supported", lambda: True)
        return torch.bfloat16 if supported() else torch.float16

    def check_dtype(self, dtype: torch.dtype) -> None:
        """Raises BackendError where the device cannot compute in ``dtype``; found out by trying."""
        try:
            probe = torch.ones(2, 2, dtype=dtype, device=self.device)
            (probe @ probe).sum().item()
        except RuntimeError as error:
            name = str(dtype).removeprefix("torch.")
            raise BackendError(
                f"dtype={name!r} on {self.device}", str(error)[:200], 'Use dtype="float32" or dtype="auto".'
            ) from error

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes of the device's memory."""
        module = torch.get_device_module(self.device)
        free, total = module.mem_get_info(self.device)
        return int(free), int(total)

    def read(self, memory: torch.Tensor) -> None:
        """Read int64 ``memory`` once, as fast as the device can: what a bandwidth is measured with."""
        memory.sum().item()

    def synchronize(self) -> None:
        """Waits until the device has done all it was given."""
        if self.device.type != "cpu":
            torch.get_device_module(self.device).synchronize(self.device)

    def empty_cache(self) -> None:
        """Gives memory that is no longer used back to the system."""
        if self.device.type != "cpu":
            torch.get_device_module(self.device).empty_cache()

    def meaning(self, said: str) -> tuple[type[QwenrtError], str] | None:
        """(the kind of error, what to do) of what an exception of this device's software says; None where nothing is
        known of it."""
        return None

    def describe(self) -> str:
        """One phrase for the line that is printed at load: which kernels serve here."""
        return "plain torch"
