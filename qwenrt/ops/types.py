"""Weights, in the one form that files are brought to and as a backend packs them; and what adapters make of them."""

from __future__ import annotations

import dataclasses
import re
from bisect import bisect_left
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch


@dataclass(frozen=True)
class CanonicalWeight:
    """One linear's weight in the one form every checkpoint format is brought to.

    Dense: ``dense`` [N, K]. Quantised: ``codes`` uint8 [K, N] (one code a byte), ``scales`` [G, N],
    ``zeros`` int16 [G, N] (true zeros, 0 to 2**bits: 2**(bits-1) when symmetric), ``bits`` 4 or 8,
    ``group_size`` rows of K share a scale, G = ceil(K / group_size). Row k of ``codes`` multiplies
    x[..., perm[k]] where ``perm`` (int32 [K]) is given (act-order, already sorted by group), else x[..., k].
    W[n, perm[k]] = scales[k // group_size, n] * (codes[k, n] - zeros[k // group_size, n]).
    In place of ``zeros`` there may be ``offsets`` float32 [G, N], as GGUF has them: W = scales * codes + offsets.
    N = out_features, K = in_features; ``bias`` [N] or None.
    Instead of ``codes`` there may be ``words``, which weights.with_codes unpacks: matrices int32
    [ceil(K * bits / 32), n] side by side as GPTQ files have them, 32 / bits codes of one output in a word, lowest
    bits first, in the order of x.
    """

    dense: torch.Tensor | None = None
    codes: torch.Tensor | None = None
    scales: torch.Tensor | None = None
    zeros: torch.Tensor | None = None
    offsets: torch.Tensor | None = None
    bits: int = 16
    group_size: int = 0
    perm: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    words: tuple[torch.Tensor, ...] = ()
    num_inputs: int = 0  # K beside ``words``, whose last rows may be half full
    shared: bool = False  # ``dense`` has another use: in any other layout it would be there twice

    @property
    def in_features(self) -> int:
        if self.words:
            return self.num_inputs
        return self.dense.shape[1] if self.dense is not None else self.codes.shape[0]  # type: ignore[union-attr]

    @property
    def out_features(self) -> int:
        if self.words:
            return sum(words.shape[1] for words in self.words)
        return self.dense.shape[0] if self.dense is not None else self.codes.shape[1]  # type: ignore[union-attr]


@dataclass
class Packed:
    """One linear's weight as its backend wants it. ``kind`` says how; only that backend reads ``data``.

    ``role``: which linear of a layer it is ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"), or "lm_head"; set by
    the model it belongs to. ``value_rows``: how many rows of qkv_proj give values; they are its last ones.

    kinds of the plain-torch backend: "dense" (``data["weight"]`` [N, K]), "w8a16" and "w4a16" (the tensors of
    CanonicalWeight under their names, int4 codes two to a byte along K), "parts" (``data["parts"]``: a list of
    Packed whose outputs are concatenated).
    """

    kind: str
    out_features: int
    in_features: int
    data: dict[str, Any]
    bias: torch.Tensor | None = None
    bits: int = 16
    group_size: int = 0
    role: str = ""
    value_rows: int = 0

    @property
    def nbytes(self) -> int:
        total = 0 if self.bias is None else self.bias.nbytes
        for value in self.data.values():
            if isinstance(value, torch.Tensor):
                total += value.nbytes
            elif isinstance(value, list):
                total += sum(part.nbytes for part in value)
        return total


PLAIN = ("dense", "w4a16", "w8a16", "parts")  # kinds of the plain-torch backend


@dataclass
class Experts:
    """A mixture of experts: ``router`` [E, D] scores them, a token goes to the ``top_k`` best.

    ``gate_up`` [2I, D] and ``down`` [D, I] are each expert's linears; ``shared`` (gate_up, down), weighted by
    sigmoid(``shared_gate`` [1, D] x), serves every token as well.
    """

    router: torch.Tensor
    gate_up: list[Packed]
    down: list[Packed]
    top_k: int
    norm_topk_prob: bool
    shared: tuple[Packed, Packed] | None = None
    shared_gate: torch.Tensor | None = None
    stacked: tuple[Packed, Packed] | None = (
        None  # gate_up and down of all experts, where they can be told apart late
    )

    def stack(self, stackable: tuple[str, ...] = PLAIN) -> str | None:
        """Set ``stacked``: all experts' tensors in one, of which each expert's become views. The reason where their
        kinds or shapes differ, or are none of ``stackable``; then nothing changes."""
        if self.stacked is None:
            made = [stacked(side, stackable) for side in (self.gate_up, self.down)]
            if made[0] is None or made[1] is None:
                kinds = sorted({packed.kind for packed in (*self.gate_up, *self.down)})
                return f"experts of kinds {', '.join(kinds)} cannot be stacked"
            self.stacked = made[0], made[1]
        return None


def stacked(weights: list[Packed], stackable: tuple[str, ...] = PLAIN) -> Packed | None:
    """Linears of one kind and shape as one with a leading axis, for Backend.linear_of_each; their own tensors become
    views of its. None where they cannot be."""
    first = weights[0]
    if any(_form(w) != _form(first) for w in weights) or first.kind not in stackable:
        return None
    whole = dataclasses.replace(first, data=_numbers(first))
    if first.kind == "parts":
        parts = [
            stacked(list(side), stackable) for side in zip(*(w.data["parts"] for w in weights), strict=True)
        ]
        if None in parts:
            return None
        whole.data["parts"] = parts
    for name, tensor in first.data.items():
        if isinstance(tensor, torch.Tensor):
            whole.data[name] = torch.stack([w.data[name] for w in weights])
            for w, view in zip(weights, whole.data[name], strict=True):
                w.data[name] = view
    if first.bias is not None:
        whole.bias = torch.stack([w.bias for w in weights if w.bias is not None])
        for w, view in zip(weights, whole.bias, strict=True):
            w.bias = view
    return whole


def _form(w: Packed) -> tuple[object, ...]:
    """What must be alike for linears to be stacked."""
    tensors = {
        name: (value.shape, value.dtype) for name, value in w.data.items() if isinstance(value, torch.Tensor)
    }
    parts = tuple(part.kind for part in w.data.get("parts", ()))
    return w.kind, tensors, _numbers(w), parts, w.group_size, w.bias is None


def _numbers(w: Packed) -> dict[str, Any]:
    """What of ``data`` is the same for all that are stacked."""
    return {name: value for name, value in w.data.items() if value is None or isinstance(value, int)}


@dataclass(frozen=True)
class AttentionWeights:
    """What attention in one layer is made of.

    ``qk_norms``: weights [hd] of the norms of each query and each key head, and their eps. ``heads``: (H, KVH, hd).
    ``scale`` multiplies scores; of its keys a query sees the last ``window`` (0: all). ``gated``: qkv_proj gives each
    query head's gate behind it, which multiplies what it attended to.
    """

    qkv_proj: Packed
    o_proj: Packed
    qk_norms: tuple[torch.Tensor, torch.Tensor, float] | None
    heads: tuple[int, int, int]
    scale: float
    window: int
    gated: bool


@dataclass(frozen=True)
class DeltaWeights:
    """What a gated delta net in one layer is made of.

    ``in_proj`` gives queries, keys, values and the output's gate z, ``rates_proj`` b and a of each value head.
    ``conv`` [K, C]; ``log_decay`` and ``decay_bias`` float32 [num_value_heads]; ``out_norm`` float32 [value_dim].
    ``heads``: (key heads, value heads, key_dim, value_dim); ``tiled``: value head h reads key head h mod key heads, not
    h // (value heads / key heads).
    """

    in_proj: Packed
    rates_proj: Packed
    out_proj: Packed
    conv: torch.Tensor
    log_decay: torch.Tensor
    decay_bias: torch.Tensor
    out_norm: torch.Tensor
    heads: tuple[int, int, int, int]
    tiled: bool = False


@dataclass(frozen=True)
class LayerWeights:
    """All that one decoder layer is made of: its norms [D] and their eps, what mixes tokens, and the MLP: gate_up_proj
    [2I, D] and down_proj [D, I], or experts."""

    input_norm: torch.Tensor
    post_norm: torch.Tensor
    mixer: AttentionWeights | DeltaWeights
    mlp: tuple[Packed, Packed] | Experts
    eps: float


@dataclass
class Head:
    """What follows the layers: the final norm [D], and the linear that gives the logits."""

    norm: torch.Tensor
    eps: float
    linear: Packed


@dataclass(frozen=True)
class LoraPair:
    """What an adapter makes of one part of a linear, which may be one of several fused: Wx + c becomes
    row_scale * (Wx + scale * B(Ax)) + c + bias in the part's rows.

    ``a`` [r, K] and ``b`` [rows, r], float32 whatever the model is; ``first``: the part's first row in the linear.
    ``row_scale`` float32 [rows] or None: DoRA's magnitudes over the norms of the rows of W + scale BA. ``bias`` float32
    [rows] or None. ``dropout``: the share of x that A does not see, in training. r is 0 where only the bias is new.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float = 1.0
    first: int = 0
    row_scale: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    dropout: float = 0.0

    @property
    def rows(self) -> slice:
        """Those of the linear that it changes."""
        return slice(self.first, self.first + self.b.shape[0])

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All that it consists of."""
        return [t for t in (self.a, self.b, self.row_scale, self.bias) if t is not None]


@dataclass(frozen=True)
class TokenRows:
    """Rows [n, D] of the embedding or of the head in place of the model's: those of the tokens ``ids`` int64 [n], which
    rise, or of all (None)."""

    rows: torch.Tensor
    ids: torch.Tensor | None = None

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All that it consists of."""
        return [self.rows] if self.ids is None else [self.rows, self.ids]


@dataclass(frozen=True, eq=False)
class AdapterWeights:
    """All that one adapter changes, on the model's device. Two are equal if they are one and the same.

    ``linears``: by the model's own names ("layers.0.qkv_proj", "layers.0.experts.3.down_proj", "lm_head"; see
    Qwen.linear_specs), the pairs of a linear's parts, which rise and do not overlap. ``embed``, ``head``: rows in place
    of the model's. ``embed_pair``: a pair for the embedding, ``a`` [r, V], ``b`` [D, r]: token t gains
    scale * B A[:, t]. ``routers``: matrices [E, D] in place of the model's, by its names ("layers.0.router").
    """

    linears: dict[str, tuple[LoraPair, ...]] = field(default_factory=dict)
    embed: TokenRows | None = None
    head: TokenRows | None = None
    embed_pair: LoraPair | None = None
    routers: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All that it consists of."""
        pairs = [pair for pairs in self.linears.values() for pair in pairs]
        others = (self.embed, self.head, self.embed_pair)
        found = [t for part in (*pairs, *others) if part is not None for t in part.tensors]
        return [*found, *self.routers.values()]

    @cached_property
    def experts_of(self) -> frozenset[str]:
        """The layers, as linears' names begin, whose experts it changes, or what chooses them."""
        found = (re.match(r"(.*)\.(experts\.\d+|shared_expert)\.", name) for name in self.linears)
        routed = (name.removesuffix(".router") for name in self.routers)
        return frozenset((*(match[1] for match in found if match), *routed))


@dataclass(frozen=True)
class LoraSpan:
    """The pairs of a linear for the rows ``first`` to ``last`` - 1 of its inputs."""

    pairs: tuple[LoraPair, ...]
    first: int
    last: int


@dataclass(frozen=True)
class AdapterSpan:
    """The adapter of the tokens ``first`` to ``last`` - 1 of a step."""

    adapter: AdapterWeights
    first: int
    last: int


@dataclass(frozen=True)
class StepAdapters:
    """Which tokens of a step have an adapter: ``spans`` rise and do not overlap. Each sequence has its own, so that
    what is computed for it does not depend on the others."""

    spans: tuple[AdapterSpan, ...]

    def of(self, name: str) -> tuple[LoraSpan, ...]:
        """What they add to a linear; empty where that stays the model's own."""
        found = ((span.adapter.linears.get(name), span) for span in self.spans)
        return tuple(LoraSpan(pairs, span.first, span.last) for pairs, span in found if pairs)

    @property
    def in_head(self) -> bool:
        """Whether any of them changes the logits of a hidden state."""
        return any(span.adapter.head is not None or "lm_head" in span.adapter.linears for span in self.spans)

    def in_experts(self, layer: str) -> bool:
        """Whether any of them changes the experts of a layer, by what its linears' names begin with."""
        return any(layer in span.adapter.experts_of for span in self.spans)

    def at(self, tokens: list[int]) -> StepAdapters:
        """The same of some of the step's tokens, which rise, by their places in ``tokens``."""
        places = ((s.adapter, bisect_left(tokens, s.first), bisect_left(tokens, s.last)) for s in self.spans)
        return StepAdapters(tuple(AdapterSpan(*place) for place in places if place[1] < place[2]))
