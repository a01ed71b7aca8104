"""What a decode step of one sequence does outside the kernels, counted instead of timed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qwenrt.backends.cpu.backend import CPUBackend
from qwenrt.config import parse_model_config
from qwenrt.engine.engine import Engine
from qwenrt.engine.options import EngineOptions
from qwenrt.model.qwen import Qwen
from qwenrt.ops.types import CanonicalWeight
from qwenrt.sampling_params import SamplingParams

VOCAB = 50000
CONFIG = {
    "model_type": "qwen",
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "seq_length": 512,
    "kv_channels": 16,
}
PARALLEL = 32768  # elements from which on torch wakes its other threads (at::internal::GRAIN_SIZE)
NO_WORK = {"alias", "detach", "empty", "new_empty", "select", "slice", "unsqueeze", "view"}


class Ops(TorchDispatchMode):
    """Counts what torch is asked, and notes the ops that compute over many elements."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.large: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.count += 1
        # Of an embedding the rows that are looked up count, not the table.
        tensors = [x for x in (out, *(args if name != "embedding" else ())) if isinstance(x, torch.Tensor)]
        if name not in NO_WORK and any(x.numel() >= PARALLEL for x in tensors):
            self.large.append(name)
        return out


def engine() -> Engine:
    backend = CPUBackend(torch.device("cpu"))
    if backend.kernels is None:
        pytest.skip(backend.unavailable)
    model = Qwen(parse_model_config(CONFIG), backend, torch.float32)
    source = torch.Generator().manual_seed(0)
    for name, shape in model.tensor_specs.items():
        model.set_tensor(name, torch.randn(*shape, generator=source) * 0.5)
    for name, spec in model.linear_specs.items():
        dense = (torch.randn(spec.out_features, spec.in_features, generator=source) * 0.3).bfloat16()
        bias = torch.zeros(spec.out_features) if spec.bias else None
        model.set_linear(name, backend.pack_linear(CanonicalWeight(dense=dense, bias=bias), torch.float32))
    model.bind()
    return Engine(model, None, EngineOptions(max_model_len=64, max_num_seqs=2))


@pytest.mark.parametrize(
    ("rule", "most"),
    [
        ({"temperature": 0}, 10),
        ({"temperature": 0.3, "top_p": 0.5}, 80),
        ({"temperature": 0.7, "top_k": 20, "top_p": 0.8}, 80),
    ],
)
def test_a_decode_step_asks_torch_little_and_nothing_over_the_vocabulary(
    rule: dict[str, Any], most: int
) -> None:
    decoding = engine()
    decoding.add([1, 2, 3], SamplingParams(max_tokens=12, seed=0, **rule))
    decoding.step()
    for _ in range(8):
        with Ops() as ops:
            decoding.step()
        assert not ops.large
        assert ops.count <= most, ops.count
