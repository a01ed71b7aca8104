"""The Qwen network over a backend's seams: embeddings, decoder layers, final norm, head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from qwenrt.backends.base import Backend
from qwenrt.backends.binding import OpSpec
from qwenrt.backends.stack import RotaryTable
from qwenrt.config import ModelConfig
from qwenrt.config.layers import (
    LinearSpec,
    head_linear,
    layer_linears,
    layer_tensors,
    mtp_linears,
    mtp_tensors,
)
from qwenrt.errors import CheckpointError, RequestError
from qwenrt.model.key_codes import fit_key_codes, random_tokens
from qwenrt.model.layers import DecoderLayer
from qwenrt.model.mtp import MtpHead
from qwenrt.model.rotary import RotaryTables, logn_scale, ntk_alpha
from qwenrt.model.weights import Weights
from qwenrt.ops.lora import adapted_embedding, adapted_logits
from qwenrt.ops.steps import DecodePlan, LayerCache, LayerKV, RotaryRows, StepPlan
from qwenrt.ops.types import Experts, Head, LayerWeights, Packed, StepAdapters


class Qwen:
    """Built without weights; the loader sets each one, then ``bind`` chooses the kernels.

    ``linear_specs`` and ``tensor_specs`` say what must be set. Weights are plain tensors: give the dense ones
    requires_grad and ``forward`` without a cache is differentiable.
    """

    def __init__(self, config: ModelConfig, backend: Backend, dtype: torch.dtype) -> None:
        self.config, self.backend, self.dtype = config, backend, dtype
        self.layers = [DecoderLayer(config, i) for i in range(config.num_layers)]
        self.mtp = MtpHead(config) if config.num_mtp_layers else None
        d, vocab = config.hidden_size, config.vocab_size
        self.linear_specs: dict[str, LinearSpec] = {
            spec.name: spec for i in range(config.num_layers) for spec in layer_linears(config, i)
        }
        self.linear_specs |= {spec.name: spec for spec in (*mtp_linears(config), head_linear(config))}
        self.tensor_specs: dict[str, tuple[int, ...]] = {"embed_tokens": (vocab, d)}
        for i in range(config.num_layers):
            self.tensor_specs |= layer_tensors(config, i)
        self.tensor_specs |= mtp_tensors(config)
        self.tensor_specs["norm"] = (d,)
        self.weights = Weights()
        self._rotary = RotaryTables(config, backend.device)

    # ---- weights

    def set_linear(self, name: str, packed: Packed) -> None:
        """Install the packed weight of ``linear_specs[name]``."""
        spec = self.linear_specs[name]
        got, wanted = (packed.out_features, packed.in_features), (spec.out_features, spec.in_features)
        if got != wanted:
            raise CheckpointError(f"weight {name}", f"shape {list(got)}", f"It must be {list(wanted)}.")
        _name_parts(packed, spec)
        self.weights[name] = packed

    def set_tensor(self, name: str, tensor: torch.Tensor) -> None:
        """Install a norm, a router or the embedding, already on the device. The embedding may be of another dtype
        than the model's: its rows are converted when they are read."""
        wanted = self.tensor_specs[name]
        if tuple(tensor.shape) != wanted:
            raise CheckpointError(
                f"weight {name}", f"shape {list(tensor.shape)}", f"It must be {list(wanted)}."
            )
        self.weights[name] = tensor

    def get(self, name: str) -> Packed | torch.Tensor:
        """The weight that was set under a name of ``linear_specs`` or ``tensor_specs``."""
        return self.weights[name]

    @property
    def embed_tokens(self) -> torch.Tensor:
        return self.weights.tensor("embed_tokens")

    @property
    def lm_head(self) -> Packed:
        return self.weights.packed("lm_head")

    def needs_causal(self, asked: str) -> None:
        """RequestError where tokens see what follows them: such a model cannot say what comes next."""
        if not self.config.is_causal:
            found = (
                "its tokens see what follows them (is_causal is false in config.json): it embeds texts only"
            )
            raise RequestError(asked, found, "Use embed(), or load a model that generates.")

    def needs_head(self, asked: str) -> None:
        """Raise RequestError where the checkpoint has no head to give logits."""
        if not self.config.has_head:
            found = "this checkpoint has no lm_head, and config.json says that it is not the embedding"
            remedy = "It makes embeddings (embed). If it should write texts, its lm_head.weight was left out."
            raise RequestError(asked, found, remedy)

    def linears(self) -> Iterator[Packed]:
        """Every packed linear, in the order of ``linear_specs``."""
        for name in self.linear_specs:
            yield self.weights.packed(name)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every dense weight and bias by name ("layers.0.qkv_proj.weight", ".bias", "norm", ...)."""
        for name in self.tensor_specs:
            yield name, self.weights.tensor(name)
        for name, packed in zip(self.linear_specs, self.linears(), strict=True):
            if packed.kind == "dense":
                yield f"{name}.weight", packed.data["weight"]
            if packed.bias is not None:
                yield f"{name}.bias", packed.bias

    def bind(self) -> None:
        """Choose the code of every op, once, when all weights are set."""
        self.backend.bindings.clear()
        for layer in self.layers:
            layer.bind(self.backend, self.dtype, self.weights)
        if self.mtp is not None:
            self.mtp.bind(self.backend, self.dtype, self.weights)
        self.head = Head(self.weights.tensor("norm"), self.config.rms_norm_eps, self.lm_head)
        self._final_norm = self.backend.resolve(OpSpec("rms_norm", "norm", self.dtype))
        self._head = self.backend.resolve(OpSpec("linear", "lm_head", self.dtype, kind=self.lm_head.kind))

    def bind_decode(self) -> str | None:
        """Choose the code of steps over DecodePlan too -> why this model has none, or None."""
        whys = (layer.bind_decode(self.backend, self.dtype) for layer in self.layers)
        return next((why for why in whys if why is not None), None)

    @property
    def layer_weights(self) -> list[LayerWeights]:
        """What each decoder layer is made of."""
        return [layer.weights for layer in self.layers]

    @property
    def vocab_size(self) -> int:
        """Rows of the head, padding included."""
        return self.config.vocab_size

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights as they are packed."""
        total = sum(self.weights.tensor(name).nbytes for name in self.tensor_specs)
        total += sum(packed.nbytes for packed in self.linears())
        return total - (self.embed_tokens.nbytes if self._head_is_embedding else 0)

    @property
    def weight_bytes_per_token(self) -> int:
        """Bytes of weights that computing one token reads: of the embedding one row, of the experts the chosen."""
        total = self.weight_bytes
        if not self._head_is_embedding:
            total -= self.embed_tokens.nbytes - self.embed_tokens[0].nbytes
        for layer in (*self.layers, *(() if self.mtp is None else (self.mtp.layer,))):
            mlp = layer.weights.mlp
            if isinstance(mlp, Experts):
                experts = sum(packed.nbytes for packed in (*mlp.gate_up, *mlp.down))
                total -= experts * (len(mlp.down) - mlp.top_k) // len(mlp.down)
        return total

    @property
    def guess_cost(self) -> float:
        """What a guess by the head for them costs, as a share of a step of one token, as far as bytes of weights tell:
        that head and the output layer, and the experts that a step reads for one token more that it checks."""
        assert self.mtp is not None
        own = sum(self.weights.packed(spec.name).nbytes for spec in mtp_linears(self.config))
        experts = of_guess = 0
        for layer in (*self.layers, self.mtp.layer):
            mlp = layer.weights.mlp
            if isinstance(mlp, Experts):
                every = sum(packed.nbytes for packed in (*mlp.gate_up, *mlp.down))
                chosen = every * mlp.top_k // len(mlp.down)
                if layer is self.mtp.layer:
                    of_guess = chosen - every
                else:
                    experts += chosen
        plain = self.weight_bytes_per_token - own - of_guess
        return (own + of_guess + self.lm_head.nbytes + experts) / plain

    @property
    def _head_is_embedding(self) -> bool:
        weight = self.lm_head.data.get("weight")
        return isinstance(weight, torch.Tensor) and weight.data_ptr() == self.embed_tokens.data_ptr()

    def fit_key_codes(self, kv: Sequence[LayerCache], of_mtp: LayerKV | None = None) -> None:
        """Lay the codes of an int8 cache over this model's keys, before anything is stored in it; ``of_mtp``: that of
        the head that guesses."""
        tokens = random_tokens(self.config.hidden_size).to(self.backend.device, self._stream_dtype)
        layers, caches = list(self.layers), list(kv)
        if self.mtp is not None and of_mtp is not None:
            layers, caches = [*layers, self.mtp.layer], [*caches, of_mtp]
        fit_key_codes(layers, caches, self._rotary, tokens, self.config)

    # ---- the network

    def forward(
        self,
        token_ids: torch.Tensor,
        plan: StepPlan,
        ntk_alphas: list[int],
        kv: Sequence[LayerCache] | None = None,
    ) -> torch.Tensor:
        """token_ids int64 [T], ``ntk_alphas`` the NTK factor of each sequence -> hidden states [T, D] after the
        final norm. ``kv``: one cache per layer, or None to attend over this step's tokens alone."""
        embedded = self.embed(token_ids, plan.adapters)
        x = self.run_layers(embedded, self.rotary(plan, ntk_alphas), plan, kv)
        return self.final_norm(x)

    def states(
        self, token_ids: torch.Tensor, plan: StepPlan, ntk_alphas: list[int]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """forward without a cache, step by step: (name of a part, the residual stream [T, D] after it), the final norm
        last."""
        x, rotary = self.embed(token_ids, plan.adapters), self.rotary(plan, ntk_alphas)
        yield "embed_tokens", x
        for layer in self.layers:
            x = layer.forward(x, rotary, plan, None)
            yield layer.prefix, x
        yield "norm", self.final_norm(x)

    def embed(self, token_ids: torch.Tensor, adapters: StepAdapters | None = None) -> torch.Tensor:
        """int64 [T] -> the residual stream before the layers [T, D], with what ``adapters`` make of it. That of a
        float16 model is float32: some of these models leave float16's range."""
        x = F.embedding(token_ids, self.embed_tokens).to(self.dtype)
        if adapters is not None:
            x = adapted_embedding(x, token_ids, adapters)
        return x.to(self._stream_dtype)

    @property
    def _stream_dtype(self) -> torch.dtype:
        return torch.float32 if self.dtype == torch.float16 else self.dtype

    def rotary(self, plan: StepPlan, ntk_alphas: list[int]) -> RotaryRows:
        """What the positions of a step's tokens do to queries and keys."""
        spans = [
            (kv_len - q_len, kv_len, alpha)
            for q_len, kv_len, alpha in zip(plan.q_lens, plan.kv_lens, ntk_alphas, strict=True)
        ]
        cos, sin = self._rotary.rows(spans)
        q_scale = None
        if self.config.use_logn_attn and max(plan.kv_lens, default=1) > self.config.train_length:
            positions = torch.tensor([p for start, end, _ in spans for p in range(start, end)])
            q_scale = logn_scale(positions, self.config)
        return RotaryRows(cos, sin, None if q_scale is None else q_scale.to(self.backend.device))

    def rotary_table(self, length: int) -> RotaryTable:
        """The same of every position below ``length``, for each NTK factor of a prompt no longer than that."""
        alphas = sorted({ntk_alpha(n, self.config) for n in range(1, length + 1)})
        parts = [self._rotary.rows([(0, length, alpha)]) for alpha in alphas]
        q_scale = logn_scale(torch.arange(length), self.config)
        rows = RotaryRows(
            torch.cat([cos for cos, _ in parts]),
            torch.cat([sin for _, sin in parts]),
            None if q_scale is None else q_scale.to(self.backend.device),
        )
        return RotaryTable(rows, {alpha: i * length for i, alpha in enumerate(alphas)})

    def run_layers(
        self,
        x: torch.Tensor,
        rotary: RotaryRows,
        plan: StepPlan | DecodePlan,
        kv: Sequence[LayerCache] | None,
    ) -> torch.Tensor:
        """The residual stream before the layers -> after them [T, D]."""
        for i, layer in enumerate(self.layers):
            x = layer.forward(x, rotary, plan, None if kv is None else kv[i])
        return x

    def final_norm(self, x: torch.Tensor) -> torch.Tensor:
        """The residual stream after the layers -> hidden states [T, D]."""
        y: torch.Tensor = self._final_norm(x, self.head.norm, self.head.eps)
        return y

    def guess(
        self,
        token_ids: torch.Tensor,
        hidden: torch.Tensor,
        plan: StepPlan,
        ntk_alphas: list[int],
        cache: LayerKV | None = None,
    ) -> torch.Tensor:
        """By the head that guesses the token after next: ``token_ids`` int64 [T] follow those that ``hidden`` [T, D] is
        of, whose positions ``plan`` has -> what `logits` makes logits of [T, D], for the tokens after ``token_ids``.
        ``cache``: the head's own, or None to attend over this step's tokens alone."""
        assert self.mtp is not None
        rotary = self.rotary(plan, ntk_alphas)
        return self.mtp.forward(self.embed(token_ids), hidden, rotary, plan, cache)

    def logits(self, hidden: torch.Tensor, adapters: StepAdapters | None = None) -> torch.Tensor:
        """hidden [M, D] -> float32 [M, vocab_size]; rows past the real vocabulary are there too. ``adapters``: of these
        M rows."""
        if adapters is not None:
            return adapted_logits(hidden, lambda rows: self._head(rows, self.lm_head), adapters)
        logits: torch.Tensor = self._head(hidden, self.lm_head)
        return logits.float()


def _name_parts(packed: Packed, spec: LinearSpec) -> None:
    """Tell a weight, and the parts that it may have, what they are."""
    packed.role, packed.value_rows = spec.name.rpartition(".")[2], spec.value_rows
    left = spec.value_rows
    for part in reversed(packed.data.get("parts", ())):
        part.role, part.value_rows = packed.role, min(left, part.out_features)
        left -= part.value_rows
