"""What flows between the model, the ops and the backends."""

from __future__ import annotations

from dataclasses import dataclass, field
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
    N = out_features, K = in_features; ``bias`` [N] or None.
    Instead of ``codes`` there may be ``words``, which weights.with_codes unpacks: matrices int32
    [ceil(K * bits / 32), n] side by side as GPTQ files have them, 32 / bits codes of one output in a word, lowest
    bits first, in the order of x.
    """

    dense: torch.Tensor | None = None
    codes: torch.Tensor | None = None
    scales: torch.Tensor | None = None
    zeros: torch.Tensor | None = None
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


@dataclass
class LayerWeights:
    """All that one decoder layer is made of: its norms [D], its linears, and what does not change between steps.

    ``qk_norms``: weights [hd] of the norms of each query and each key head, and their eps. ``heads``: (H, KVH, hd).
    ``scale`` multiplies scores; of its keys a query sees the last ``window`` (0: all). ``mlp``: gate_up_proj [2I, D]
    and down_proj [D, I], or experts.
    """

    input_norm: torch.Tensor
    post_norm: torch.Tensor
    qkv_proj: Packed
    o_proj: Packed
    mlp: tuple[Packed, Packed] | Experts
    qk_norms: tuple[torch.Tensor, torch.Tensor, float] | None
    heads: tuple[int, int, int]
    eps: float
    scale: float
    window: int


@dataclass
class Head:
    """What follows the layers: the final norm [D], and the linear that gives the logits."""

    norm: torch.Tensor
    eps: float
    linear: Packed


@dataclass
class StepInputs:
    """What every layer of a step shares: each token's rows of cos and sin, LogN's factors, and the plan."""

    cos: torch.Tensor  # [T, rotary_dim] float32
    sin: torch.Tensor
    q_scale: torch.Tensor | None  # [T] float32
    plan: StepPlan


@dataclass
class LayerKV:
    """One layer's paged cache. Slot s lives at block s // block_size, row s % block_size.

    ``k``, ``v`` [num_blocks, block_size, num_kv_heads, head_dim] in the activation dtype, or uint8 codes with
    ``k_scale``, ``k_zero``, ``v_scale``, ``v_zero`` float32 [num_blocks, block_size, num_kv_heads]:
    x = scale * code + zero (zero is the smallest value of that token and head).
    ``k_offset``, ``k_factor`` float32 [num_kv_heads, head_dim], beside codes only: x then is (k - k_offset) / k_factor
    of a rotated key k, and the query that reads it is multiplied by k_factor (reference.fit_to_codes).
    """

    k: torch.Tensor
    v: torch.Tensor
    k_scale: torch.Tensor | None = None
    k_zero: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None
    v_zero: torch.Tensor | None = None
    k_offset: torch.Tensor | None = None
    k_factor: torch.Tensor | None = None

    @property
    def quantized(self) -> bool:
        return self.k_scale is not None

    @property
    def block_size(self) -> int:
        return int(self.k.shape[1])


@dataclass
class StepPlan:
    """One step over a batch of B sequences and T flat tokens, the same for every layer.

    ``q_lens``, ``kv_lens``: tokens of each sequence computed now, and in the cache after this step (history
    included); sum(q_lens) == T. Token j of sequence b has position kv_lens[b] - q_lens[b] + j.
    ``slots`` int64 [T]: where each token's key and value go (-1: nowhere). ``block_table``: per sequence, its
    block ids. A plan without a cache (``slots is None``) attends over the step's own tokens only: training,
    `logits()` and embeddings; there ``causal`` may be False, and each token sees all of its sequence.
    """

    q_lens: list[int]
    kv_lens: list[int]
    slots: torch.Tensor | None = None
    block_table: list[list[int]] = field(default_factory=list)
    causal: bool = True
    extra: dict[str, Any] = field(default_factory=dict)  # what the backend's plan() adds for itself

    @property
    def num_tokens(self) -> int:
        return sum(self.q_lens)

    @property
    def has_history(self) -> bool:
        return any(q != kv for q, kv in zip(self.q_lens, self.kv_lens, strict=True))
