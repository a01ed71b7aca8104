"""At load, a few steps of a small random model of the same kinds, through what will serve and through the definitions.

`qwenrt.backends.selfcheck` looks at each op first; here is what only a step shows: which layer's weights, cache, window
and norms an op is given, whose logits are wanted, and each stack that computes steps as a whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from qwenrt.backends import selfcheck
from qwenrt.backends.base import Backend
from qwenrt.backends.binding import PRIMITIVES, SEAMS
from qwenrt.backends.graphs import GraphStack
from qwenrt.backends.stack import Outcome, Stack, StackParts
from qwenrt.config import ModelConfig
from qwenrt.config.layers import LinearSpec, is_wide
from qwenrt.config.released import released_config
from qwenrt.errors import BackendError
from qwenrt.model.qwen import Qwen
from qwenrt.model.rotary import ntk_alpha
from qwenrt.ops.steps import FROM_BEFORE, Draw, LayerCache, LayerKV, LayerState, Step, Vocabulary
from qwenrt.ops.types import CanonicalWeight, Packed
from qwenrt.ops.weights import dequantize

FormOf = Callable[[LinearSpec], tuple[int, int]]

# Ops by themselves are within the self-check's tolerance; a few layers make more of what is left.
_LAYERS_ADD = 5.0
# of captured steps alone, and in no check of ops by themselves
_CAPTURED = ("norm_moe_add_each", "decode_delta_net")
_SAME_KERNELS = 1e-4  # a stack beside the seams in float32
# A token between two experts, or a value between two codes, may go either way by the last digit of what is before.
_EITHER_WAY = 0.3

# Three sequences by their block ids, and how many tokens of each a step has: prompts in chunks, of which one is longer
# than what kernels take at once, then decoding: all, then without the first, whose places the others take, then one of
# them into a new block; at last one token alone. Blocks 0 and 8 are nobody's.
_TABLES = ((9, 2, 6, 4), (1, 7), (5, 3))
_STEPS = ((21, 5, 0), (35, 1, 0), (1, 1, 14), (1, 1, 1), (0, 1, 1), (0, 1, 1), (0, 1, 0))
_LOGIT_ROWS = ((), (16, 34, 35), (0, 1, 15), (0, 1, 2), (0, 1), (0, 1), (0,))
# For each sequence of a step the row of the step before that chose its token, -1 where it is the host's.
_FED = ((-1, -1), (-1, -1), (-1, -1, -1), (0, 1, 2), (1, -1), (0, 1), (0,))
_TOKENS = [sum(step[i] for step in _STEPS) for i in range(len(_TABLES))]
_NUM_BLOCKS = max(map(max, _TABLES)) + 1
_LONGEST = 64  # tokens of a sequence, in blocks of 16 or more


@dataclass(frozen=True)
class Kinds:
    """What the model's weights and cache are beside its config. ``form_of``: bits (16: dense) and group size of a
    linear; ``stored``: the dtype of dense ones in the file."""

    form_of: FormOf
    stored: torch.dtype
    int8_cache: bool


def check(config: ModelConfig, backend: Backend, dtype: torch.dtype, kinds: Kinds) -> dict[str, str]:
    """Demote what differs from its definition at this model's shapes: ops by themselves, ops in steps of a small model,
    stacks -> what was demoted and why.

    torch computes on one thread meanwhile: what there is to compute is small, and its threads would wait for each other
    and beside the backend's. On a busy machine that took ten times as long.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _check(config, backend, dtype, kinds)
    finally:
        torch.set_num_threads(threads)


def _check(config: ModelConfig, backend: Backend, dtype: torch.dtype, kinds: Kinds) -> dict[str, str]:
    specs = Qwen(config, backend, dtype).linear_specs.values()
    shapes = {(spec.out_features, spec.in_features, *kinds.form_of(spec)) for spec in specs}
    if config.quant is not None:  # linears, and parts of merged ones, that lie in another form than it says
        others = config.quant.corrections
        shapes |= {each[:4] for each in others if each.number > 0}
    heads = (config.num_heads, config.num_kv_heads, config.head_dim)
    bad = selfcheck.check(backend, dtype, heads, shapes, kinds.stored)
    return bad | _check_steps(_Weights(_small(config), kinds), backend, dtype, kinds.int8_cache)


def _check_steps(weights: _Weights, backend: Backend, dtype: torch.dtype, int8_cache: bool) -> dict[str, str]:
    """Seams beside definitions over a plain cache, as reading and storing codes was looked at; other stacks beside the
    seams over the cache that serves."""
    bad: dict[str, str] = {}
    has_experts = weights.config.moe is not None
    plain = Backend(backend.device)
    plain.block_size = backend.block_size
    wanted = _run(weights.model(plain, dtype), False)
    allowed = _LAYERS_ADD * (selfcheck.TOLERANCE[dtype] + backend.rounding("linear"))
    if has_experts and (dtype != torch.float32 or backend.rounding("linear")):
        allowed += _EITHER_WAY

    def by_seams() -> tuple[Qwen, _Run]:
        model = weights.model(backend, dtype)
        return model, _run(model, False, wanted)

    made: list[tuple[Qwen, _Run]] = []

    def seams() -> float:
        made[:] = [by_seams()]
        return _difference(made[0][1], wanted)

    if any(map(backend.overrides, (*PRIMITIVES, *SEAMS))):
        why = selfcheck.complaint(seams, allowed)
        if why is not None:
            bad |= _blame(backend, seams, allowed, f"{why} in steps of a small model")
    model, beside = made[0] if made else by_seams()
    others = len(backend.stacks(_parts(model, int8_cache))) - 1
    expected = _run(model, True) if int8_cache and others else beside
    same = _SAME_KERNELS if dtype == torch.float32 else selfcheck.TOLERANCE[dtype]
    for index in range(others):

        def apart(index: int = index) -> float:
            return _difference(_run(model, int8_cache, expected, index), expected)

        wrong = _blame_stack(backend, apart, same + _EITHER_WAY * (int8_cache and has_experts))
        bad |= wrong
        if "stacks" in wrong:
            break
    return bad


def _blame_stack(backend: Backend, run: Callable[[], float], allowed: float) -> dict[str, str]:
    """Where steps by a stack are wrong, demote the op of captured steps without which they are right, or else every
    stack but the seams."""
    why = selfcheck.complaint(run, allowed)
    if why is None:
        return {}
    for op in _CAPTURED:
        if not backend.overrides(op) or op in backend.demoted:
            continue
        backend.demote(op, why)
        if selfcheck.complaint(run, allowed) is None:
            return {op: why}
        del backend.demoted[op]
    backend.demote("stacks", why)
    return {"stacks": why}


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
    kinds: dict[tuple[bool, bool, bool], int] = {}
    for i in range(config.num_layers):
        kinds.setdefault((bool(config.window(i)), config.is_moe(i), config.is_linear(i)), i)
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
    delta = config.linear_attention
    if delta is not None:
        key_heads = min(delta.num_key_heads, 2)
        delta = dataclasses.replace(
            delta,
            num_key_heads=key_heads,
            num_value_heads=key_heads * (delta.num_value_heads // delta.num_key_heads),
            layers=frozenset(at for at, i in enumerate(chosen) if config.is_linear(i)),
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
        linear_attention=delta,
        with_mtp=False,  # its layer is of a kind that is here
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
            if name.endswith("log_decay"):
                tensor -= 4  # much of what was written some tokens ago is still there
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
            model.set_tensor(
                name, tensor.to(backend.device, torch.float32 if is_wide(self.config, name) else dtype)
            )
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
    return CanonicalWeight(dense=dequantize(weight, dtype), bias=weight.bias)


def captured_stack(backend: Backend, dtype: torch.dtype) -> GraphStack:
    """Of a plain small model, its stack of captured steps: for whoever looks at these alone."""
    config = released_config("Qwen-1_8B")
    assert config is not None
    kinds = Kinds(lambda spec: (16, 128), torch.bfloat16, False)
    stack = backend.stacks(_parts(_Weights(_small(config), kinds).model(backend, dtype), False))[0]
    if not isinstance(stack, GraphStack):
        raise BackendError(f"captured steps on {backend.device}", "none", "Its graphs() gives none.")
    return stack


# ---- its steps


@dataclass(frozen=True)
class _Run:
    """What the steps gave, the tokens that each fed to the next, and the cache of each layer after them."""

    logits: list[torch.Tensor]
    tokens: list[list[int | None]]
    cache: list[LayerCache]


def _parts(model: Qwen, int8_cache: bool) -> StackParts:
    """The small model over a cache whose slots all hold 1, with a spare block for each row of a step, and a spare
    state behind those of sequences."""
    config, rows = model.config, len(_TABLES) + 1
    cache = model.backend.alloc_cache(
        config,
        model.dtype,
        num_blocks=_NUM_BLOCKS + rows,
        block_size=model.backend.block_size,
        num_states=rows + 1,
        quantized=int8_cache,
    )
    for layer in cache:
        selfcheck.fill_cache(layer, 1.0)
    if int8_cache:
        model.fit_key_codes(cache)
    spare = list(range(_NUM_BLOCKS, _NUM_BLOCKS + rows))
    return StackParts(model, cache, Vocabulary(config.vocab_size), rows, _LONGEST, spare, rows)


@torch.no_grad()
def _run(model: Qwen, int8_cache: bool, wanted: _Run | None = None, index: int = -1) -> _Run:
    """The steps, by the stack of a model with an ``index``, or by the seams where it says that it serves none. Where
    the tokens it chose are not the ``wanted`` ones, those are what the next step is fed: two may be as likely."""
    parts = _parts(model, int8_cache)
    stacks = model.backend.stacks(parts)
    before: Outcome | None = None
    logits, tokens = [], []
    for i, step in enumerate(_steps(model.config, model.backend.block_size)):
        stack: Stack = stacks[index] if stacks[index].why_not(step) is None else stacks[-1]
        before = stack.run(step, before)
        if before.served_by is not stack:
            raise RuntimeError(f"{stack.name} does not serve a step that it should")
        logits.append(before.logits.clone())
        tokens.append(before.tokens())
        own = Backend(model.backend.device).choose(before.logits.clone(), _drawn(step), parts.vocabulary)
        if step.draws and own.tolist() != before.chosen.tolist():
            raise RuntimeError(f"{stack.name} chooses other tokens than its logits say")
        if wanted is not None and tokens[-1] != wanted.tokens[i]:
            tokens[-1] = wanted.tokens[i]
            chosen = model.backend.send([token or 0 for token in wanted.tokens[i]])
            before = dataclasses.replace(before, chosen=chosen)
    return _Run(logits, tokens, [_without_spare(layer) for layer in parts.cache])


def _without_spare(kv: LayerCache) -> LayerCache:
    if isinstance(kv, LayerState):
        return LayerState(*(tensor[:-1] for tensor in kv.tensors))
    sides = ("k", "v", "k_scale", "k_zero", "v_scale", "v_zero")
    cut = {side: tensor[:_NUM_BLOCKS] for side in sides if (tensor := getattr(kv, side)) is not None}
    return dataclasses.replace(kv, **cut)


def _drawn(step: Step) -> list[Draw]:
    return [draw for draw in step.draws if draw is not None]


def _steps(config: ModelConfig, block_size: int) -> Iterator[Step]:
    alphas = [ntk_alpha(tokens, config) for tokens in _TOKENS]
    done = [0] * len(_TABLES)
    for lens, rows, fed in zip(_STEPS, _LOGIT_ROWS, _FED, strict=True):
        here = [i for i, q_len in enumerate(lens) if q_len]
        done = [a + b for a, b in zip(done, lens, strict=True)]
        ids: list[int] = []
        for i, row in zip(here, fed, strict=True):
            ids += [(7 * p + 131 * i) % config.vocab_size for p in range(done[i] - lens[i], done[i])]
            if row >= 0:
                ids[-1] = FROM_BEFORE
        yield Step(
            [lens[i] for i in here],
            [done[i] for i in here],
            [list(_TABLES[i][: -(-done[i] // block_size)]) for i in here],
            [alphas[i] for i in here],
            ids,
            list(rows),
            [Draw() if row % 2 else Draw(0.8, top_k=5, uniform=0.4) for row in rows],
            list(fed),
            [len(_TABLES) - i for i in here] if config.linear_attention is not None else [],
        )


def _difference(got: _Run, wanted: _Run) -> float:
    return max(_errors(got, wanted))


def _errors(got: _Run, wanted: _Run) -> Iterator[float]:
    for a, b, rows in zip(got.logits, wanted.logits, _LOGIT_ROWS, strict=True):
        yield selfcheck.relative(a, b) if rows else 0.0
    for ours, theirs in zip(got.cache, wanted.cache, strict=True):
        if isinstance(ours, LayerState) and isinstance(theirs, LayerState):
            yield from map(selfcheck.relative, ours.tensors, theirs.tensors)
        elif isinstance(ours, LayerKV) and isinstance(theirs, LayerKV):
            yield selfcheck.cache_error(ours, theirs)
