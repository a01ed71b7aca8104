"""All weights of a model, by name."""

from __future__ import annotations

import torch

from qwenrt.config import MoeConfig
from qwenrt.ops.types import Experts, Packed


class Weights(dict[str, "Packed | torch.Tensor"]):
    """All weights of a model by name."""

    def packed(self, name: str) -> Packed:
        weight = self[name]
        assert isinstance(weight, Packed)
        return weight

    def tensor(self, name: str) -> torch.Tensor:
        weight = self[name]
        assert isinstance(weight, torch.Tensor)
        return weight

    def experts(self, prefix: str, moe: MoeConfig) -> Experts:
        """What the mixture of experts of one layer consists of."""
        names = [f"{prefix}.experts.{expert}" for expert in range(moe.num_experts)]
        shared = f"{prefix}.shared_expert"
        has_shared = moe.shared_intermediate_size > 0
        return Experts(
            router=self.tensor(f"{prefix}.router"),
            gate_up=[self.packed(f"{name}.gate_up_proj") for name in names],
            down=[self.packed(f"{name}.down_proj") for name in names],
            top_k=moe.top_k,
            norm_topk_prob=moe.norm_topk_prob,
            shared=(self.packed(f"{shared}.gate_up_proj"), self.packed(f"{shared}.down_proj"))
            if has_shared
            else None,
            shared_gate=self.tensor(f"{shared}_gate") if has_shared else None,
        )
