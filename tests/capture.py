"""What a device that captures steps would refuse, found on the CPU; and graphs that capture nothing but keep the
rules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qwenrt.backends.base import Backend
from qwenrt.backends.graphs import Graph, GraphStack
from qwenrt.backends.stack import Stack, StackParts
from qwenrt.model.qwen import Qwen
from qwenrt.ops.steps import Step
from qwenrt.ops.types import DeltaWeights, Packed

# Ops that wait for the device, whose result has a shape that data decides, or that bring numbers of the host.
_REFUSED = {
    "_local_scalar_dense",
    "equal",
    "is_nonzero",
    "item",
    "lift_fresh",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "_unique2",
}
VIEWS = {
    "alias",
    "as_strided",
    "chunk",
    "detach",
    "empty",
    "empty_like",
    "expand",
    "new_empty",
    "permute",
    "select",
    "slice",
    "split",
    "split_with_sizes",
    "squeeze",
    "t",
    "transpose",
    "unbind",
    "unsqueeze",
    "_unsafe_view",
    "view",
}


class NotCapturable(AssertionError):
    """A step's body did what cannot be captured."""


class CaptureGuard(TorchDispatchMode):
    """Refuses what a captured body must not do: wait for the device, make a shape that depends on data, read numbers of
    the host or a tensor that is neither ``allowed`` nor made within; and counts the kernels that are launched."""

    def __init__(self, allowed: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self._known = {tensor.untyped_storage().data_ptr() for tensor in allowed if tensor.numel()}
        self._made: list[torch.Tensor] = []  # kept: freed memory would come back under a known address

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in _REFUSED:
            raise NotCapturable(f"{name} waits for the device, or depends on what it holds")
        for tensor in _tensors((args, kwargs)):
            if tensor.numel() and tensor.untyped_storage().data_ptr() not in self._known:
                raise NotCapturable(f"{name} reads a tensor {list(tensor.shape)} that may have moved since")
        if name in ("index", "index_put", "index_put_") and any(
            t.dtype == torch.bool for t in _tensors(args[1])
        ):
            raise NotCapturable(f"{name} by a mask has as many rows as data says")
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            self._made.append(tensor)
            if tensor.numel():
                self._known.add(tensor.untyped_storage().data_ptr())
        if name not in VIEWS:
            self.launches[name] += 1
        return out

    @property
    def count(self) -> int:
        """Kernels launched."""
        return sum(self.launches.values())


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def tensors_of(packed: Packed) -> Iterator[torch.Tensor]:
    """All memory of a weight, its parts' too."""
    yield from _tensors(packed.data)
    if packed.bias is not None:
        yield packed.bias
    for part in packed.data.get("parts", ()):
        yield from tensors_of(part)


def memory_of(stack: GraphStack) -> list[torch.Tensor]:
    """What the body of a stack may read: its tensors, weights, cache and tables."""
    parts, model = stack._parts, stack._parts.network
    assert isinstance(model, Qwen) and stack.tensors is not None
    found = [*stack.tensors.all]
    for weight in model.weights.values():
        found += tensors_of(weight) if isinstance(weight, Packed) else [weight]
    for layer in model.layer_weights:
        for side in getattr(layer.mlp, "stacked", None) or ():
            found += tensors_of(side)
        if isinstance(layer.mixer, DeltaWeights):
            found += _tensors(list(vars(layer.mixer).values()))
    rows = stack._rotary.rows
    found += [rows.cos, rows.sin, *([] if rows.q_scale is None else [rows.q_scale])]
    found += [] if stack._unused is None else [stack._unused]
    return found + [tensor for layer in parts.cache for tensor in layer.tensors]


class _Fake:
    def __init__(self, graphs: FakeGraphs, body: Callable[[], None]) -> None:
        self._graphs, self._body = graphs, body

    def replay(self, step: Step) -> None:
        stack = self._graphs.stack
        assert stack is not None and stack._rows is not None
        held = stack._rows._held
        kept = {name: numbers.copy() for name, numbers in held.items()}
        for numbers in held.values():
            numbers.fill(77)  # what the host knows is nothing that a graph could see
        with CaptureGuard(memory_of(stack)) as guard:
            self._body()
        for name, numbers in kept.items():
            held[name][:] = numbers
        self._graphs.replays += 1
        self._graphs.launches = guard.launches


class FakeGraphs:
    """Runs the body twice to capture it, as devices do to warm up, and again at each replay, where it must find all
    that it reads in memory that does not move."""

    def __init__(self, sizes: tuple[int, ...] = (1, 2, 4, 8, 16)) -> None:
        self.sizes = sizes
        self.stack: GraphStack | None = None
        self.captures = self.replays = 0
        self.launches: Counter[str] = Counter()

    def capture(self, body: Callable[[], None]) -> Graph:
        assert self.stack is not None
        for _ in range(2):
            with CaptureGuard(memory_of(self.stack)):
                body()
        self.captures += 1
        return _Fake(self, body)

    def note(self) -> str:
        return f"captured {self.captures} times"


class GraphBackend(Backend):
    """The definitions, on a CPU that plays a device that captures steps and computes by itself."""

    depth = 1  # type: ignore[assignment]

    def graphs(self) -> FakeGraphs:
        return FakeGraphs()

    def stacks(self, parts: StackParts) -> list[Stack]:
        made = super().stacks(parts)
        for stack in made:
            if isinstance(stack, GraphStack):
                assert isinstance(stack._graphs, FakeGraphs)
                stack._graphs.stack = stack
        return made
