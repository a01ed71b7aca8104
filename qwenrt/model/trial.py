"""At load, a few steps of a small random model of the same kinds, through what will serve and through the definitions.

`qwenrt.backends.selfcheck` looks at each op first; here is what only a step shows: which layer's weights, cache, window
and norms an op is given, which tokens are due, and the one call for all layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from qwenrt.backends import selfcheck
from qwenrt.backends.base import PRIMITIVES, SEAMS, Backend
from qwenrt.config import ModelConfig
from qwenrt.config.layers import LinearSpec
from qwenrt.model.qwen import Qwen
from qwenrt.model.rotary import ntk_alpha
from qwenrt.ops import packing
from qwenrt.ops.types import CanonicalWeight, LayerKV, Packed, StepPlan

FormOf = Callable[[LinearSpec], tuple[int, int]]

# Ops by themselves are within the self-check's tolerance; a few layers make more of what is left.
_LAYERS_ADD = 5.0
_SAME_KERNELS = 1e-4  # the one call beside the seams
# A token between two experts, or a value between two codes, may go either way by the last digit of what is before.
_EITHER_WAY = 0.3

_BLOCK = 16
# Three sequences by their block ids, and how many tokens of each a step has: prompts in chunks, of which one is longer
# than what kernels take at once, then decoding; at last one token alone.
_TABLES = ((9, 2, 6, 4), (1, 7), (5,))
_STEPS = ((21, 5, 0), (35, 1, 0), (1, 1, 11), (0, 1, 0))
_DUE = ((), (16, 34, 35), (0, 1, 12), (0,))  # tokens of each step whose logits are wanted
_TOKENS = [sum(step[i] for step in _STEPS) for i in range(len(_TABLES))]


@dataclass(frozen=True)
class Kinds:
    """What the model's weights and cache are beside its config. ``form_of``: bits (16: dense) and group size of a
    linear; ``stored``: the dtype of dense ones in the file."""

    form_of: FormOf
    stored: torch.dtype
    int8_cache: bool


def check(config: ModelConfig, backend: Backend, dtype: torch.dtype, kinds: Kinds) -> dict[str, str]:
    """Demote what differs from its definition at this model's shapes: ops by themselves, ops in steps of a small model,
    the one call for all layers -> what was demoted and why."""
    specs = Qwen(config, backend, dtype).linear_specs.values()
    shapes = {(spec.out_features, spec.in_features, *kinds.form_of(spec)) for spec in specs}
    if config.quant is not None:  # linears, and parts of merged ones, that lie in another form than it says
        others = config.quant.corrections
        shapes |= {
            (rows, columns, bits, group) for rows, columns, bits, group, number in others if number > 0
        }
    heads = (config.num_heads, config.num_kv_heads, config.head_dim)
    bad = selfcheck.check(backend, dtype, heads, shapes, kinds.stored)
    return bad | _check_steps(_Weights(_small(config), kinds), backend, dtype, kinds.int8_cache)


def _check_steps(weights: _Weights, backend: Backend, dtype: torch.dtype, int8_cache: bool) -> dict[str, str]:
    """Seams beside definitions over a plain cache, as reading and storing codes was looked at; the one call beside the
    seams over the cache that serves."""
    bad: dict[str, str] = {}
    has_experts = weights.config.moe is not None
    wanted = _run(weights.model(Backend(backend.device), dtype), False, _by_seams)
    allowed = _LAYERS_ADD * (selfcheck.TOLERANCE[dtype] + backend.rounding("linear"))
    if has_experts and (dtype != torch.float32 or backend.rounding("linear")):
        allowed += _EITHER_WAY

    def by_seams() -> tuple[Qwen, _Outcome]:
        model = weights.model(backend, dtype)
        return model, _run(model, False, _by_seams)

    made: list[tuple[Qwen, _Outcome]] = []

    def seams() -> float:
        made[:] = [by_seams()]
        return _difference(made[0][1], wanted)

    if any(map(backend.overrides, (*PRIMITIVES, *SEAMS))):
        why = selfcheck.complaint(seams, allowed)
        if why is not None:
            bad |= _blame(backend, seams, allowed, f"{why} in steps of a small model")
    model, beside = made[0] if made else by_seams()
    if model.fused:
        expected = _run(model, True, _by_seams) if int8_cache else beside
        why = selfcheck.complaint(
            lambda: _difference(_run(model, int8_cache, _at_once), expected),
            _SAME_KERNELS + _EITHER_WAY * (int8_cache and has_experts),
        )
        if why is not None:
            bad["fuse_layers"] = why
            backend.demote("fuse_layers", why)
    return bad


def _blame(backend: Backend, run: Callable[[], float], allowed: float, why: str) -> dict[str, str]:
    """Demote the op without which the steps are right; all of them where no single one is the cause."""
    suspects = [op for op in (*SEAMS, *PRIMITIVES) if backend.overrides(op) and op not in backend.demoted]
    for op in suspects:
        backend.demote(op, why)
        if selfcheck.complaint(run, allowed) is None:
            return {op: why}
        del backend.demoted[op]
    for op in suspects:
        backend.demote(op, why)
    return dict.fromkeys(suspects, why)


# ---- the small model


def _small(config: ModelConfig) -> ModelConfig:
    """A few layers, one of each kind the model has and two at least, with its own head_dim and groups; windows, and the
    length from which positions are changed, that its few tokens reach."""
    kinds: dict[tuple[bool, bool], int] = {}
    for i in range(config.num_layers):
        kinds.setdefault((bool(config.window(i)), config.is_moe(i)), i)
    chosen = [*kinds.values()] if len(kinds) > 1 else [*kinds.values()] * 2
    kv_heads = min(config.num_kv_heads, 2)
    moe = config.moe
    if moe is not None:
        count = min(moe.num_experts, 8)
        moe = dataclasses.replace(
            moe,
            num_experts=count,
            top_k=min(moe.top_k, max(1, count // 2)),
            intermediate_size=min(moe.intermediate_size, 128),
            shared_intermediate_size=min(moe.shared_intermediate_size, 256),
            dense_layers=frozenset(at for at, i in enumerate(chosen) if not config.is_moe(i)),
        )
    return dataclasses.replace(
        config,
        vocab_size=min(config.vocab_size, 2048),
        hidden_size=min(config.hidden_size, 512),
        num_layers=len(chosen),
        num_heads=kv_heads * (config.num_heads // config.num_kv_heads),
        num_kv_heads=kv_heads,
        intermediate_size=min(config.intermediate_size, 1024),
        train_length=min(config.train_length, 16),
        windows=tuple(min(config.window(i), 20) for i in chosen) if config.windows else (),
        moe=moe,
        quant=None,
    )


class _Weights:
    """Random weights of a small model, from which it is built for any backend."""

    def __init__(self, config: ModelConfig, kinds: Kinds) -> None:
        self.config, self._taken = config, 0
        self._pool = torch.randn((1 << 20) + 4099, generator=torch.Generator().manual_seed(0))
        whole = Qwen(config, Backend(torch.device("cpu")), torch.float32)
        self.tensors = {
            name: 1 + self._normal(*shape) / 4 if len(shape) == 1 else self._normal(*shape)
            for name, shape in whole.tensor_specs.items()
        }
        for name, tensor in self.tensors.items():
            if name.endswith(("router", "gate")):
                tensor *= 4 * config.hidden_size**-0.5
        self.tensors["embed_tokens"] = self.tensors["embed_tokens"].to(kinds.stored)
        self.linears = {
            name: self._linear(spec, *kinds.form_of(spec), kinds.stored)
            for name, spec in whole.linear_specs.items()
        }

    def _normal(self, *shape: int) -> torch.Tensor:
        """The next numbers of the pool, which is larger than a matrix and read round and round."""
        count = torch.Size(shape).numel()
        parts, left = [], count
        while left:
            part = self._pool[self._taken : self._taken + left]
            parts.append(part)
            left -= part.numel()
            self._taken = (self._taken + part.numel()) % self._pool.numel()
        return torch.cat(parts).view(shape)

    def _linear(
        self, spec: LinearSpec, bits: int, group_size: int, stored: torch.dtype
    ) -> list[CanonicalWeight]:
        """The whole, or of codes in the last layer its parts by themselves, as act-order has them."""
        if spec.name == "lm_head" and self.config.tie_word_embeddings and bits == 16:
            return [CanonicalWeight(dense=self.tensors["embed_tokens"], shared=True)]
        apart = bits < 16 and spec.name.startswith(f"layers.{self.config.num_layers - 1}.")
        made = []
        for rows in [rows for _, rows in spec.parts] if apart else [spec.out_features]:
            bias = self._normal(rows) if spec.bias else None
            if bits == 16:
                dense = (self._normal(rows, spec.in_features) * spec.in_features**-0.5).to(stored)
                made.append(CanonicalWeight(dense=dense, bias=bias))
                continue
            group = spec.in_features if group_size == -1 else min(group_size, spec.in_features)
            weight = selfcheck.random_weight(rows, spec.in_features, bits, group, seed=self._taken + rows)
            self._taken = (self._taken + rows) % self._pool.numel()
            perm = None
            if apart:
                perm = torch.arange(spec.in_features, dtype=torch.int32).roll(rows % spec.in_features + 1)
            made.append(dataclasses.replace(weight, bias=bias, perm=perm))
        return made

    def model(self, backend: Backend, dtype: torch.dtype) -> Qwen:
        """For plain torch, codes become the dense matrices that they stand for."""
        model = Qwen(self.config, backend, dtype)
        for name, tensor in self.tensors.items():
            model.set_tensor(name, tensor.to(backend.device, dtype))
        plain = type(backend) is Backend
        for name, spec in model.linear_specs.items():
            packed = [
                backend.pack_linear(_dense(weight, dtype) if plain else weight, dtype)
                for weight in self.linears[name]
            ]
            if len(packed) > 1:
                packed = [Packed("parts", spec.out_features, spec.in_features, {"parts": packed})]
            model.set_linear(name, packed[0])
        model.bind()
        return model


def _dense(weight: CanonicalWeight, dtype: torch.dtype) -> CanonicalWeight:
    return CanonicalWeight(dense=packing.dequantize(weight, dtype), bias=weight.bias)


# ---- its steps


@dataclass(frozen=True)
class _Outcome:
    """What the steps gave, and the cache of each layer after them."""

    states: list[torch.Tensor]
    kv: list[LayerKV]


Way = Callable[[Qwen, torch.Tensor, StepPlan, list[int], list[LayerKV], list[int]], torch.Tensor]


def _by_seams(
    model: Qwen,
    ids: torch.Tensor,
    plan: StepPlan,
    alphas: list[int],
    kv: list[LayerKV],
    due: list[int],
) -> torch.Tensor:
    hidden = model.by_seams(ids, plan, alphas, kv)
    return model.logits(hidden[due]) if due else hidden


def _at_once(
    model: Qwen,
    ids: torch.Tensor,
    plan: StepPlan,
    alphas: list[int],
    kv: list[LayerKV],
    due: list[int],
) -> torch.Tensor:
    """As _by_seams; an error where the one call does not serve a step."""
    got = model.at_once(ids, plan, alphas, kv, due)
    if got is None:
        raise RuntimeError("the one call for all layers does not serve a step that it should")
    return got


def _run(model: Qwen, int8_cache: bool, way: Way) -> _Outcome:
    config, backend = model.config, model.backend
    blocks = max(map(max, _TABLES)) + 1
    shape = (config.num_layers, blocks, _BLOCK, config.num_kv_heads, config.head_dim)
    kv = backend.alloc_kv(*shape, model.dtype, int8_cache)
    for layer in kv:
        selfcheck.fill_cache(layer, 1.0)
    if int8_cache:
        model.fit_key_codes(kv)
    alphas = [ntk_alpha(tokens, config) for tokens in _TOKENS]
    states, done = [], [0] * len(_TABLES)
    for lens, due in zip(_STEPS, _DUE, strict=True):
        here = [i for i, q_len in enumerate(lens) if q_len]
        slots = [
            _TABLES[i][p // _BLOCK] * _BLOCK + p % _BLOCK
            for i in here
            for p in range(done[i], done[i] + lens[i])
        ]
        done = [a + b for a, b in zip(done, lens, strict=True)]
        tables = [list(_TABLES[i][: -(-done[i] // _BLOCK)]) for i in here]
        plan = backend.plan([lens[i] for i in here], [done[i] for i in here], tables, slots)
        ids = (torch.tensor(slots) * 7 + len(slots)) % config.vocab_size
        args = (ids.to(backend.device), plan, [alphas[i] for i in here], kv, list(due))
        states.append(way(model, *args))
    return _Outcome(states, kv)


def _difference(got: _Outcome, wanted: _Outcome) -> float:
    return max(_errors(got, wanted))


def _errors(got: _Outcome, wanted: _Outcome) -> Iterator[float]:
    for a, b in zip(got.states, wanted.states, strict=True):
        yield selfcheck.relative(a, b)
    for ours, theirs in zip(got.kv, wanted.kv, strict=True):
        yield selfcheck.cache_error(ours, theirs)
