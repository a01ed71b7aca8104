"""The network that learns: the definitions of all ops on any device, and the loss of a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from qwenrt.backends.base import Backend
from qwenrt.config import ModelConfig, read_json
from qwenrt.errors import RequestError
from qwenrt.finetune.sharding import Sharding
from qwenrt.loader.memory.training import LOGIT_BYTES
from qwenrt.model.layers import DecoderLayer
from qwenrt.model.qwen import Qwen
from qwenrt.ops import reference
from qwenrt.ops.steps import LayerKV, RotaryRows, StepPlan
from qwenrt.ops.types import AdapterSpan, AdapterWeights, Experts, Packed, StepAdapters
from qwenrt.text.chat.training_form import IGNORE


class TrainingBackend(Backend):
    """The definitions, on any device."""

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
        """As the definition; neighbours of one length at once."""
        parts, start = [], 0
        for length, count in _runs(plan.q_lens):
            here = slice(start, start + length * count)
            start = here.stop
            alike = StepPlan([length] * count, [length] * count)
            parts.append(reference.attention(q[here], k[here], v[here], kv, alike, scale, window))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def balance(normed: torch.Tensor, router: torch.Tensor, top_k: int) -> torch.Tensor:
    """normed [T, D], router [E, D] -> E · Σ f_e P_e: f_e the share of tokens that went to expert e, P_e its mean
    probability."""
    scores = reference.router_logits(normed, router).float().softmax(-1)
    chosen = scores.detach().topk(top_k, dim=-1).indices
    share = torch.zeros_like(scores).scatter_(1, chosen, 1.0).mean(0)
    return scores.shape[1] * (share * scores.mean(0)).sum()


def _runs(lengths: list[int]) -> Iterator[tuple[int, int]]:
    """(length, how many neighbours have it), in turn."""
    start = 0
    for end in range(1, len(lengths) + 1):
        if end == len(lengths) or lengths[end] != lengths[start]:
            yield lengths[start], end - start
            start = end


class Network:
    """A model and the loss of a step of samples. ``recompute``: each layer's activations are computed again for its
    gradients, so that one layer's are kept at a time. ``rebinds``: a gated delta net's weights include a copy of a
    parameter, which is made anew in each step where that is trained. ``adapter``: makes the adapter that all tokens of
    a pass have; None: they have none. ``sharding``: where weights are shared out over processes, which then run as many
    passes as each other."""

    def __init__(
        self,
        model: Qwen,
        backend: TrainingBackend,
        *,
        recompute: bool,
        balance: float,
        rebinds: bool,
        sharding: Sharding | None = None,
    ) -> None:
        self.model, self.backend, self.recompute, self.balance = model, backend, recompute, balance
        self._rebinds, self.sharding = rebinds or sharding is not None, sharding
        self.adapter: Callable[[], AdapterWeights] | None = None

    def loss(
        self, ids: torch.Tensor, targets: torch.Tensor, lengths: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """ids, targets int64 [T] of samples of ``lengths``, on the host -> the sum of the cross-entropies of all tokens
        with a target, and the routers' balance, summed over layers (0 without)."""
        if self.sharding is None:
            return self._loss(ids, targets, lengths)
        made: tuple[torch.Tensor, torch.Tensor] = self.sharding.whole(self._loss, ids, targets, lengths)
        return made

    def _loss(
        self, ids: torch.Tensor, targets: torch.Tensor, lengths: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        plan = self._plan(lengths)
        x, balance = self._hidden(ids.to(self.backend.device), plan)
        chosen = (targets != IGNORE).nonzero().squeeze(1)
        picked, wanted = chosen.to(x.device), targets.index_select(0, chosen).to(x.device)
        return self._head_loss(x.index_select(0, picked), wanted, plan), balance

    def _plan(self, lengths: list[int]) -> StepPlan:
        plan = StepPlan(lengths, lengths)
        if self.adapter is not None:
            plan.adapters = StepAdapters((AdapterSpan(self.adapter(), 0, sum(lengths)),))
        return plan

    @torch.no_grad()
    def first_not_finite(self, ids: torch.Tensor, lengths: list[int]) -> str | None:
        """The first part of the network after which a number is not finite."""
        if self.sharding is None:
            return self._first_not_finite(ids, lengths)
        found: str | None = self.sharding.whole(self._first_not_finite, ids, lengths)
        return found

    def _first_not_finite(self, ids: torch.Tensor, lengths: list[int]) -> str | None:
        plan = self._plan(lengths)
        x = self.model.embed(ids.to(self.backend.device), plan.adapters)
        rotary = self.model.rotary(plan, [1] * len(lengths))
        if not x.isfinite().all():
            return "embed_tokens"
        for number, layer in enumerate(self.model.layers):
            x, _ = self._run(number, layer, x, rotary, plan)
            if not x.isfinite().all():
                return layer.prefix
        return None

    def _hidden(self, ids: torch.Tensor, plan: StepPlan) -> tuple[torch.Tensor, torch.Tensor]:
        model = self.model
        x, rotary = model.embed(ids, plan.adapters), model.rotary(plan, [1] * len(plan.q_lens))  # without NTK
        balance = torch.zeros((), device=x.device)
        for number, layer in enumerate(model.layers):
            x, share = self._run(number, layer, x, rotary, plan)
            balance = balance + share
        return model.final_norm(x), balance

    def _run(
        self, number: int, layer: DecoderLayer, x: torch.Tensor, rotary: RotaryRows, plan: StepPlan
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer, with its weights gathered and its activations computed again where that is asked for."""
        work: Callable[..., Any] = self._layer
        if self.recompute and torch.is_grad_enabled():
            work = partial(checkpoint, self._layer, use_reentrant=False)
        if self.sharding is not None:
            work = partial(self.sharding.layer, number, work)
        made: tuple[torch.Tensor, torch.Tensor] = work(layer, x, rotary, plan)
        return made

    def _logits(self, hidden: torch.Tensor, plan: StepPlan) -> torch.Tensor:
        adapters = plan.adapters
        if adapters is not None:
            adapters = StepAdapters((AdapterSpan(adapters.spans[0].adapter, 0, len(hidden)),))
        return self.model.logits(hidden, adapters)

    def _layer(
        self, layer: DecoderLayer, x: torch.Tensor, rotary: RotaryRows, plan: StepPlan
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._rebinds:
            self.backend.bindings.clear()
            layer.bind(self.backend, self.model.dtype, self.model.weights)
        x = layer.mixer.add(x, rotary, plan, None)
        share, weights = x.new_zeros((), dtype=torch.float32), layer.weights
        if self.balance and isinstance(weights.mlp, Experts):
            adapted = {} if plan.adapters is None else plan.adapters.spans[0].adapter.routers
            router = adapted.get(f"{layer.prefix}.router", weights.mlp.router)
            normed = self.backend.rms_norm(x, weights.post_norm, weights.eps)
            share = balance(normed, router, weights.mlp.top_k)
        return layer.add_mlp(x, plan), share

    def _head_loss(self, hidden: torch.Tensor, targets: torch.Tensor, plan: StepPlan) -> torch.Tensor:
        """The sum of cross-entropies, of so many rows at a time that their logits and what becomes of these fit."""
        rows = max(16, LOGIT_BYTES // (3 * 4 * self.model.vocab_size))

        def part(x: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(self._logits(x, plan), wanted, reduction="sum")

        chunks = list(zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True))
        if len(chunks) > 1 and torch.is_grad_enabled():
            pieces = [checkpoint(part, x, wanted, use_reentrant=False) for x, wanted in chunks]
        else:
            pieces = [part(x, wanted) for x, wanted in chunks]
        return torch.stack(pieces).sum()


def replace_tensors(model: Qwen, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    """Put another tensor in the place of each dense weight and bias; one that has two names, as a tied head, once."""
    made: dict[int, torch.Tensor] = {}
    kept: list[torch.Tensor] = []  # so that no id is given twice

    def changed(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            kept.append(tensor)
            made[id(tensor)] = change(name, tensor)
        return made[id(tensor)]

    for name in model.tensor_specs:
        tensor = model.get(name)
        assert isinstance(tensor, torch.Tensor)
        model.set_tensor(name, changed(name, tensor))
    for name in model.linear_specs:
        packed = model.get(name)
        assert isinstance(packed, Packed)
        if packed.kind == "dense":
            packed.data["weight"] = changed(f"{name}.weight", packed.data["weight"])
        if packed.bias is not None:
            packed.bias = changed(f"{name}.bias", packed.bias)


def distinct_tensors(model: Qwen) -> dict[str, torch.Tensor]:
    """Every dense weight and bias by name; one with two names under the first."""
    found: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.tensors():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor
    return found


def initialise(model: Qwen, seed: int, spread: float = 0.02) -> None:
    """Random weights: normal with deviation ``spread``, less where a residual is fed; norms 1, biases 0. Queries and
    keys begin at 1 / sqrt(hidden_size), so that attention is not flat, and the head begins as a copy of the embedding,
    so that what is read can be said: a small model then learns to copy in a fraction of the steps."""
    generator = torch.Generator().manual_seed(seed)
    device = model.backend.device

    def normal(shape: tuple[int, ...], deviation: float) -> torch.Tensor:
        return torch.empty(shape).normal_(0.0, deviation, generator=generator).to(device)

    for name, shape in model.tensor_specs.items():
        model.set_tensor(name, normal(shape, spread) if len(shape) > 1 else torch.ones(shape, device=device))
    for name, spec in model.linear_specs.items():
        deviation = spread
        if name.endswith(("o_proj", "down_proj")):
            deviation = spread / math.sqrt(2 * model.config.num_layers)
        elif name.endswith("qkv_proj"):
            deviation = spec.in_features**-0.5
        weight = normal((spec.out_features, spec.in_features), deviation)
        if name == "lm_head":
            weight = model.embed_tokens if model.config.tie_word_embeddings else model.embed_tokens.clone()
        bias = torch.zeros(spec.out_features, device=device) if spec.bias else None
        packed = Packed("dense", spec.out_features, spec.in_features, {"weight": weight}, bias)
        model.set_linear(name, packed)


def initializer_range(source: Path) -> float:
    """The spread of random weights that config.json names."""
    value = read_json(source / "config.json").get("initializer_range", 0.02)
    return float(value) if isinstance(value, (int, float)) and 0 < value < 1 else 0.02


def balance_weight(source: Path, config: ModelConfig, trained: bool) -> float:
    """By how much the routers' balance counts in the loss: as config.json says, 0 where routers are not trained."""
    if config.moe is None or not trained:
        return 0.0
    raw: dict[str, Any] = read_json(source / "config.json")
    value = raw.get("text_config", raw).get("router_aux_loss_coef", 0.001)
    return float(value) if isinstance(value, (int, float)) and 0 <= value <= 1 else 0.001


def check_length(config: ModelConfig, longest: int) -> None:
    """RequestError where samples would be longer than what positions were trained for."""
    if (config.use_dynamic_ntk or config.use_logn_attn) and longest > config.train_length:
        raise RequestError(
            f"training on {longest} tokens at a time",
            f"the model was trained on {config.train_length} tokens, and its positions beyond are stretched (NTK, "
            "LogN) by a factor that depends on the whole text, which training does not do",
            f"Use a max_length of at most {config.train_length}.",
        )
    if longest > config.max_position_embeddings:
        raise RequestError(
            f"training on {longest} tokens at a time",
            f"the model's context is {config.max_position_embeddings} tokens",
            "Use a max_length of at most as many.",
        )
