"""The head that guesses the token after next (multi-token prediction): one layer over the model's own states."""

from __future__ import annotations

import torch

from qwenrt.backends.base import Backend
from qwenrt.backends.binding import OpSpec
from qwenrt.config import ModelConfig
from qwenrt.model.layers import DecoderLayer
from qwenrt.model.weights import Weights
from qwenrt.ops.steps import LayerKV, RotaryRows, StepPlan


class MtpHead:
    """y = norm(layer(fc([norm(e) | norm(h)]))): of a text's token i, h is its hidden state and e the embedding of token
    i + 1; the model's head then gives the logits of token i + 2. y is an h of the same kind, so the head can go on from
    its own guess. The layer has keys and values of its own: those of (h_i, e_i+1) are its token i.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.layer = DecoderLayer(config, config.num_layers)
        self._eps = config.rms_norm_eps

    def bind(self, backend: Backend, dtype: torch.dtype, weights: Weights) -> None:
        """Take the weights and choose the code of every op."""
        self._norms = [weights.tensor(f"mtp.{name}") for name in ("embedding_norm", "hidden_norm", "norm")]
        self._fc = weights.packed("mtp.fc")
        self._rms_norm = backend.resolve(OpSpec("rms_norm", "mtp.norm", dtype))
        self._linear = backend.resolve(OpSpec("linear", "mtp.fc", dtype, kind=self._fc.kind))
        self.layer.bind(backend, dtype, weights)

    def forward(
        self,
        embedded: torch.Tensor,
        hidden: torch.Tensor,
        rotary: RotaryRows,
        plan: StepPlan,
        cache: LayerKV | None,
    ) -> torch.Tensor:
        """``embedded`` [T, D] of the tokens that follow, in the dtype of the residual stream, and ``hidden`` [T, D]
        after the final norm, or what this gave before -> [T, D], for the model's head."""
        of_embedding, of_hidden, final = self._norms
        both = (
            self._rms_norm(embedded, of_embedding, self._eps),
            self._rms_norm(hidden, of_hidden, self._eps),
        )
        x = self._linear(torch.cat(both, dim=-1), self._fc).to(embedded.dtype)
        y: torch.Tensor = self._rms_norm(self.layer.forward(x, rotary, plan, cache), final, self._eps)
        return y
