"""How many kernels a device is told to launch for one token, and how often it is waited for: that bounds fast ones."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qwenrt.backends.base import Backend
from qwenrt.backends.graphs import GraphStack
from qwenrt.backends.selfcheck import random_weight
from qwenrt.backends.stack import StackParts
from qwenrt.config.released import released_config
from qwenrt.model.qwen import Qwen
from qwenrt.ops.steps import Vocabulary
from tests.capture import VIEWS, FakeGraphs, GraphBackend
from tests.steps import step_of

WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "item"}


class Launches(TorchDispatchMode):
    """Counts kernels, and what waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITS:
            self.waits[name] += 1
        elif name not in VIEWS and name != "lift_fresh":
            self.kernels[name] += 1
        return func(*args, **(kwargs or {}))


def parts(backend: Backend, bits: int) -> StackParts:
    """The 24 layers of Qwen-1.8B, narrow, in bfloat16."""
    released = released_config("Qwen-1_8B")
    assert released is not None
    sizes = {"hidden_size": 256, "num_heads": 2, "num_kv_heads": 2, "head_dim": 128, "intermediate_size": 256}
    config = dataclasses.replace(released, vocab_size=512, **sizes)
    model = Qwen(config, backend, torch.bfloat16)
    for name, shape in model.tensor_specs.items():
        tensor = torch.ones(shape) if len(shape) == 1 else torch.randn(shape)
        model.set_tensor(name, tensor.bfloat16())
    for name, spec in model.linear_specs.items():
        weight = random_weight(spec.out_features, spec.in_features, bits if spec.quantizable else 16, 128)
        bias = torch.zeros(spec.out_features) if spec.bias else None
        packed = backend.pack_linear(dataclasses.replace(weight, bias=bias), torch.bfloat16)
        model.set_linear(name, packed)
    model.bind()
    kv = backend.alloc_kv(config.num_layers, 9, 16, 2, 128, torch.bfloat16, False)
    return StackParts(model, kv, Vocabulary(config.vocab_size), 1, 128, [8])


@pytest.mark.parametrize(("bits", "by_seams", "captured"), [(16, 1050, 1300), (4, 2325, 2575)])
def test_one_token_of_24_layers(bits: int, by_seams: int, captured: int) -> None:
    backend = GraphBackend(torch.device("cpu"))
    stacks = backend.stacks(parts(backend, bits))
    step = step_of([7], [1], [41], [[3, 4, 5]])
    with torch.no_grad(), Launches() as seams:
        stacks[-1].run(step)
    graph = stacks[0]
    assert isinstance(graph, GraphStack) and isinstance(graph._graphs, FakeGraphs)
    with torch.no_grad():
        outcome = graph.run(step)
    assert outcome.served_by is graph
    assert not seams.waits
    assert seams.kernels.total() <= by_seams
    assert graph._graphs.launches.total() <= captured
