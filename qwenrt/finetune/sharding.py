"""A network that the processes of a run share out: each keeps a part of every weight, and those of a layer are gathered
while it is computed. torch's fully_shard does it (FSDP2), which also sums the gradients and gives each its part."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from qwenrt.errors import RequestError
from qwenrt.finetune.places import Place, names_of, places_of
from qwenrt.finetune.processes import Group
from qwenrt.model.qwen import Qwen
from qwenrt.ops.types import Head

SHARDS = ("no", "optimizer", "all")


def check_can_shard() -> None:
    """RequestError where this torch cannot."""
    try:
        from torch.distributed.fsdp import FSDPModule

        can = hasattr(FSDPModule, "set_force_sum_reduction_for_comms")
    except ImportError:
        can = False
    if not can:
        found = f"torch {torch.__version__} has no fully_shard that sums gradients"
        raise RequestError(
            "sharing out the weights (shard)", found, "Use torch 2.9 or later, or leave it out."
        )


class Unit(nn.Module):
    """Tensors of a network that are whole while some work is done with them. ``idle``: some may have no part in it, as
    experts that no token goes to; their gradients are zeros then, as each process must have the same."""

    def __init__(self, places: Iterable[Place], trained: Collection[str], idle: bool = False) -> None:
        super().__init__()
        shared: dict[int, list[Place]] = {}
        for place in places:  # a tensor may have two, as a tied head's
            shared.setdefault(id(place.tensor), []).append(place)
        self._places = list(shared.values())
        for number, (first, *_) in enumerate(self._places):
            tensor, learns = first.tensor, first.name in trained
            self.register_parameter(f"p{number}", nn.Parameter(tensor.detach(), requires_grad=learns))
        self._idle = idle

    @property
    def named(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by the names of the tensors that they are."""
        found = {places[0].name: getattr(self, f"p{i}") for i, places in enumerate(self._places)}
        return {name: parameter for name, parameter in found.items() if parameter.requires_grad}

    def leave(self) -> None:
        """Shapes alone stay in the network."""
        for first, *others in self._places:
            empty = torch.empty_like(first.tensor, device="meta")
            for place in (first, *others):
                place.put(empty)

    def forward(self, work: Callable[..., Any], *arguments: Any) -> Any:
        for number, places in enumerate(self._places):
            for place in places:
                place.put(getattr(self, f"p{number}"))
        made = work(*arguments)
        if not self._idle or not torch.is_grad_enabled():
            return made
        nothing = torch.stack(
            [p.flatten()[0].float() for p in self.parameters(recurse=False) if p.requires_grad]
        )
        first, *rest = made
        return first + (0.0 * nothing.sum()).to(first.dtype), *rest


class Sharding:
    """The parts of this process. ``compute``: what the network computes in where that is not what parts are kept in.
    ``gathers`` "all": weights are gathered again for the gradients; "optimizer": they stay from one to the other."""

    def __init__(self, group: Group, device: torch.device, gathers: str, compute: torch.dtype | None) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        if device.type != "cpu":
            torch.get_device_module(device).set_device(device)
        self.group, self._units = group, nn.ModuleList()
        self._mesh = init_device_mesh(device.type, (group.size,))
        reduced = torch.float32 if compute is not None else None
        policy = MixedPrecisionPolicy(compute, reduced, cast_forward_inputs=False)
        self._shard = partial(fully_shard, mesh=self._mesh, mp_policy=policy)
        self._gathers_again = gathers == "all"
        self._parameters: dict[str, Any] = {}
        self.parts: dict[str, torch.Tensor] = {}

    def add(self, model: Qwen, index: int | None, trained: Collection[str], whole: Collection[str]) -> None:
        """Share out a layer, whose weights are set, or last (None) what is in no layer: embedding, norm and head, which
        are gathered for a whole pass. Tensors that are ``whole`` stay so in all processes."""
        names = names_of(model, index)
        places = [p for p in places_of(model, names) if p.name not in whole and p.tensor.dim() > 0]
        sparse = index is not None and model.layers[index].moe is not None
        unit = Unit(places, trained, idle=sparse and bool(trained))
        if index is None:
            self._root, self._model = unit, model
            unit.layers = self._units
        self._shard(unit, reshard_after_forward=self._gathers_again and index is not None)
        self._sums(unit)
        if index is not None:
            self._units.append(unit)

    def _sums(self, unit: Unit) -> None:
        """Gradients are summed over the processes, not averaged: the loss is divided by all tokens already."""
        sharded: Any = unit
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
        unit.leave()
        for name, parameter in unit.named.items():
            self._parameters[name] = parameter
            self.parts[name] = parameter.detach().to_local()  # type: ignore[attr-defined]

    # ---- a pass

    def layer(self, index: int, work: Callable[..., Any], *arguments: Any) -> Any:
        """``work`` with a layer's weights, within `whole`."""
        return self._units[index](work, *arguments)

    def whole(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """``work``, a pass through the network, with what is in no layer."""

        def bound(*given: Any) -> Any:
            model = self._model
            model.head = Head(model.weights.tensor("norm"), model.config.rms_norm_eps, model.lm_head)
            return work(*given)

        made = self._root(bound, *arguments)
        if not torch.is_grad_enabled():
            self._root.reshard()  # type: ignore[operator]  # else they are those of this pass in the next one
        return made

    # ---- what the optimizer has of it

    def take_gradients(self) -> None:
        """Add the gradients of the passes so far to those of this process's parts."""
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                continue
            own, part = parameter.grad.to_local(), self.parts[name]
            part.grad = own if part.grad is None else part.grad + own
            parameter.grad = None

    def whole_tensor(self, name: str, part: torch.Tensor) -> torch.Tensor:
        """All processes' parts of what belongs to the parameter ``name`` -> the whole, on the host, in the first
        process; only its shape in the others. All have to ask for it."""
        from torch.distributed.tensor import DTensor, Shard

        shape = self._parameters[name].shape
        strides = torch.empty(shape, device="meta").stride()
        shared = DTensor.from_local(
            part, self._mesh, [Shard(0)], run_check=False, shape=shape, stride=strides
        )
        whole: torch.Tensor = shared.full_tensor()
        return whole.cpu() if self.group.rank == 0 else torch.empty_like(whole, device="meta")

    def own_part(self, whole: torch.Tensor) -> torch.Tensor:
        """This process's part of a tensor."""
        rows = -(-len(whole) // self.group.size)
        return whole[self.group.rank * rows : (self.group.rank + 1) * rows]
