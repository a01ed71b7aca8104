"""The Qwen network over a backend's seams: embeddings, decoder layers, final norm, head."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from qwenrt.backends.base import Backend, OpSpec
from qwenrt.config import ModelConfig
from qwenrt.errors import CheckpointError
from qwenrt.model.layers import DecoderLayer, LinearSpec, StepInputs, layer_linears
from qwenrt.model.rotary import RotaryTables, logn_scale
from qwenrt.ops.types import LayerKV, Packed, StepPlan


class Qwen:
    """Built without weights; the loader sets each one, then ``bind`` chooses the kernels.

    ``linear_specs`` and ``tensor_specs`` say what must be set. Weights are plain tensors: give the dense ones
    requires_grad and ``forward`` without a cache is differentiable.
    """

    def __init__(self, config: ModelConfig, backend: Backend, dtype: torch.dtype) -> None:
        self.config, self.backend, self.dtype = config, backend, dtype
        self.layers = [DecoderLayer(config, f"layers.{i}") for i in range(config.num_layers)]
        self.linear_specs: dict[str, LinearSpec] = {
            spec.name: spec for layer in self.layers for spec in layer_linears(config, layer.prefix)
        }
        head = LinearSpec(
            "lm_head", config.hidden_size, (("lm_head", config.vocab_size),), False, quantizable=False
        )
        self.linear_specs["lm_head"] = head
        width = (config.hidden_size,)
        self.tensor_specs: dict[str, tuple[int, ...]] = {
            "embed_tokens": (config.vocab_size, config.hidden_size)
        }
        for layer in self.layers:
            self.tensor_specs[f"{layer.prefix}.input_norm"] = width
            self.tensor_specs[f"{layer.prefix}.post_norm"] = width
        self.tensor_specs["norm"] = width
        self.embed_tokens: torch.Tensor
        self.norm: torch.Tensor
        self.lm_head: Packed
        self._rotary = RotaryTables(config, backend.device)

    # ---- weights

    def set_linear(self, name: str, packed: Packed) -> None:
        """Install the packed weight of ``linear_specs[name]``."""
        spec = self.linear_specs[name]
        got, wanted = (packed.out_features, packed.in_features), (spec.out_features, spec.in_features)
        if got != wanted:
            raise CheckpointError(f"weight {name}", f"shape {list(got)}", f"It must be {list(wanted)}.")
        self._set(name, packed)

    def set_tensor(self, name: str, tensor: torch.Tensor) -> None:
        """Install a norm or the embedding, already on the device and in the model's dtype."""
        wanted = self.tensor_specs[name]
        if tuple(tensor.shape) != wanted:
            raise CheckpointError(
                f"weight {name}", f"shape {list(tensor.shape)}", f"It must be {list(wanted)}."
            )
        self._set(name, tensor)

    def _set(self, name: str, value: Packed | torch.Tensor) -> None:
        if name.startswith("layers."):
            _, index, attribute = name.split(".")
            setattr(self.layers[int(index)], attribute, value)
        else:
            setattr(self, name, value)

    def get(self, name: str) -> Packed | torch.Tensor:
        """The weight that was set under a name of ``linear_specs`` or ``tensor_specs``."""
        value: Packed | torch.Tensor
        if name.startswith("layers."):
            _, index, attribute = name.split(".")
            value = getattr(self.layers[int(index)], attribute)
        else:
            value = getattr(self, name)
        return value

    def linears(self) -> Iterator[Packed]:
        """Every packed linear, in the order of ``linear_specs``."""
        for name in self.linear_specs:
            packed = self.get(name)
            assert isinstance(packed, Packed)
            yield packed

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every dense weight and bias by name ("layers.0.qkv_proj.weight", ".bias", "norm", ...)."""
        for name in self.tensor_specs:
            tensor = self.get(name)
            assert isinstance(tensor, torch.Tensor)
            yield name, tensor
        for name, packed in zip(self.linear_specs, self.linears(), strict=True):
            if packed.kind == "dense":
                yield f"{name}.weight", packed.data["weight"]
            if packed.bias is not None:
                yield f"{name}.bias", packed.bias

    def bind(self) -> None:
        """Choose the code of every op, once, when all weights are set."""
        self.backend.bindings.clear()
        for layer in self.layers:
            layer.bind(self.backend, self.dtype)
        self._final_norm = self.backend.resolve(OpSpec("rms_norm", "norm", self.dtype))
        self._head = self.backend.resolve(OpSpec("linear", "lm_head", self.dtype, kind=self.lm_head.kind))

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights as they are packed."""
        tensors = sum(self.get(name).nbytes for name in self.tensor_specs)
        return tensors + sum(packed.nbytes for packed in self.linears())

    # ---- the network

    def forward(
        self,
        token_ids: torch.Tensor,
        plan: StepPlan,
        alphas: list[int],
        kv: list[LayerKV] | None = None,
    ) -> torch.Tensor:
        """token_ids int64 [T], ``alphas`` the NTK factor of each sequence -> hidden states [T, D] after the
        final norm. ``kv``: one cache per layer, or None to attend over this step's tokens alone."""
        positions = torch.cat(
            [
                torch.arange(kv_len - q_len, kv_len)
                for q_len, kv_len in zip(plan.q_lens, plan.kv_lens, strict=True)
            ]
            or [torch.empty(0, dtype=torch.int64)]
        )
        longest = max(plan.kv_lens, default=1)
        q_scale = logn_scale(positions, self.config) if longest > self.config.train_length else None
        if q_scale is not None:
            q_scale = q_scale.to(token_ids.device)
        spans = list(zip(plan.q_lens, alphas, strict=True))
        cos, sin = self._rotary.rows(positions.to(token_ids.device), spans, longest)
        step = StepInputs(cos, sin, q_scale, plan)
        x = F.embedding(token_ids, self.embed_tokens)
        for i, layer in enumerate(self.layers):
            x = layer.forward(x, step, None if kv is None else kv[i])
        hidden: torch.Tensor = self._final_norm(x, self.norm, self.config.rms_norm_eps)
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [M, D] -> float32 [M, vocab_size]; rows past the real vocabulary are there too."""
        logits: torch.Tensor = self._head(hidden, self.lm_head)
        return logits.float()
