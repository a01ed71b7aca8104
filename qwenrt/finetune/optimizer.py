"""AdamW over what is trained: in float32 whatever the network computes in, or in bfloat16 alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from qwenrt.errors import RequestError
from qwenrt.finetune.processes import Group
from qwenrt.finetune.settings import TrainingSettings
from qwenrt.finetune.sharding import Sharding

MOMENTS = ("exp_avg", "exp_avg_sq")
_FIRST_SCALE, _CLEAN_STEPS, _LEAST_SCALE = 2.0**16, 1000, 2.0**-14
_EPS = 1e-8


class Optimizer:
    """``parameters``: what the network computes with, by name. ``masters``: the same in float32 where a parameter is in
    16 bits, which the updates are made to and the parameter is rounded from; a parameter that is float32 is its own.
    Gradients of several backward passes are summed in float32.

    ``rates``: by how much a parameter's learning rate differs from the others'. ``pure``: no masters: moments and
    parameters stay in bfloat16, rounded up or down by chance, so that small changes count on the average. With
    ``settings.moments`` "bfloat16" moments alone are kept so, and gradients as the parameters are, of all passes.

    ``sharding``: parameters that it has are this process's parts, and what is asked of all of them is asked of all
    processes.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.Tensor],
        settings: TrainingSettings,
        *,
        scaled: bool = False,
        pure: bool = False,
        rates: Mapping[str, float] | None = None,
        sharding: Sharding | None = None,
    ) -> None:
        self.parameters, self.settings, self.pure = dict(parameters), settings, pure
        self.sharding, rounded = sharding, pure or settings.moments == "bfloat16"
        self.masters: dict[str, torch.Tensor] = {}
        for name, parameter in self.parameters.items():
            parameter.requires_grad_()
            if parameter.dtype == torch.float32 or pure:
                self.masters[name] = parameter
            else:
                self.masters[name] = master = parameter.detach().float()
                if not rounded:
                    parameter.register_post_accumulate_grad_hook(_into(master))  # type: ignore[no-untyped-call]
        self._moments = torch.bfloat16 if rounded else None
        self._graded = self.parameters if rounded else self.masters  # whose gradients they are
        groups: dict[tuple[bool, float], list[torch.Tensor]] = {}
        for name, master in self.masters.items():
            factor = (rates or {}).get(name, 1.0)
            groups.setdefault((master.dim() > 1, factor), []).append(master)
        self._adamw = (RoundedAdamW if rounded else torch.optim.AdamW)(
            [
                {"params": params, "weight_decay": settings.weight_decay if decays else 0.0, "factor": factor}
                for (decays, factor), params in sorted(
                    groups.items(), key=lambda item: (not item[0][0], item[0][1])
                )
            ],
            lr=settings.peak_rate,
            betas=(0.9, settings.adam_beta2),
            eps=_EPS,
            **({} if rounded else {"fused": True}),
        )
        self.scale, self.clean, self.updates = (_FIRST_SCALE if scaled else 1.0), 0, 0
        self._scaled = scaled

    def set_master(self, name: str, value: torch.Tensor) -> None:
        """Set a parameter, and what it is rounded from."""
        with torch.no_grad():
            self.masters[name].copy_(self._own(name, value))
            if self.masters[name] is not self.parameters[name]:
                self.parameters[name].copy_(self.masters[name])

    def complete(self) -> None:
        """Give everything that has no gradient, as an expert that no token went to, one of zeros: all count the same
        updates then, in whatever process and after whatever cut."""
        if self.sharding is not None:
            self.sharding.take_gradients()
        for tensor in self._graded.values():
            if tensor.grad is None:
                tensor.grad = torch.zeros_like(tensor)

    def gradients(self, shared: bool | None = None) -> list[torch.Tensor]:
        """Those there are, in one order; of parameters that are ``shared`` out, or of others, alone."""
        return [
            tensor.grad
            for name, tensor in self._graded.items()
            if tensor.grad is not None and shared in (None, self._is_shared(name))
        ]

    def _is_shared(self, name: str) -> bool:
        return self.sharding is not None and name in self.sharding.parts

    def _own(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        return self.sharding.own_part(whole) if self.sharding and self._is_shared(name) else whole

    def norm(self) -> float:
        """Of all gradients together. They are those of the loss itself from here on; NaN or infinite where one is."""
        gradients = self.gradients()
        if not gradients:
            return 0.0
        if self.scale != 1.0:
            torch._foreach_mul_(gradients, 1.0 / self.scale)
        whole, parts = _norm(self.gradients(shared=False)), _norm(self.gradients(shared=True))
        if self.sharding is not None:
            squares = parts.square().to(gradients[0].device)
            self.sharding.group.sum([squares])
            parts = squares.sqrt().cpu()
        return float(torch.stack([whole, parts]).norm())

    def overflowed(self, norm: float) -> bool:
        """Whether float16's range was left, which is no error there: the step is skipped and the scale halved. Raises
        RequestError where that has not helped."""
        if not self._scaled or math.isfinite(norm):
            return False
        self.scale, self.clean = self.scale / 2, 0
        if self.scale < _LEAST_SCALE:
            found = "gradients leave float16's range whatever they are scaled by"
            raise RequestError('precision="float16"', found, 'Use "bfloat16" or "float32".')
        self.forget()
        return True

    def step(self, rate: float, norm: float) -> None:
        """Update everything; gradients are cut to max_grad_norm."""
        share = self.settings.max_grad_norm / (norm + 1e-6)
        if share < 1.0 and not isinstance(self._adamw, RoundedAdamW):
            torch._foreach_mul_(self.gradients(), share)
        for group in self._adamw.param_groups:
            group["lr"] = rate * group["factor"]
        if isinstance(self._adamw, RoundedAdamW):
            among = Group() if self.sharding is None else self.sharding.group
            self._adamw.seed = (self.settings.seed * 2**31 + self.updates) * among.size + among.rank
            self._adamw.share = min(1.0, share)
            self._adamw.gradients = {master: self._graded[name].grad for name, master in self.masters.items()}
        self._adamw.step()
        self.updates += 1
        self.forget()
        with torch.no_grad():
            for name, master in self.masters.items():
                if master is not self.parameters[name]:
                    self.parameters[name].copy_(master)
        if self._scaled:
            self.clean += 1
            if self.clean == _CLEAN_STEPS:
                self.scale, self.clean = self.scale * 2, 0

    def forget(self) -> None:
        """Drop the gradients."""
        for name, master in self.masters.items():
            master.grad = self.parameters[name].grad = None

    # ---- its state

    def tensors(self) -> dict[str, torch.Tensor]:
        """Masters and moments by name. Where they are shared out, all processes have to ask, and the first one gets
        them."""
        found = self.weights()
        for name, master in self.masters.items():
            state = self._adamw.state.get(master)
            for moment in MOMENTS:
                own = state[moment] if state else torch.zeros_like(master.detach(), dtype=self._moments)
                found[f"{moment}.{name}"] = self._whole(name, own)
        return found

    def weights(self) -> dict[str, torch.Tensor]:
        """Masters alone."""
        return {f"weight.{name}": self._whole(name, master.detach()) for name, master in self.masters.items()}

    def _whole(self, name: str, own: torch.Tensor) -> torch.Tensor:
        return self.sharding.whole_tensor(name, own) if self.sharding and self._is_shared(name) else own

    def about(self) -> dict[str, Any]:
        """The rest of its state, in numbers."""
        return {"updates": self.updates, "scale": self.scale, "clean": self.clean}

    def restore(self, tensors: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> None:
        """Go on from what `tensors` and `about` gave."""
        self.updates, self.scale, self.clean = about["updates"], about["scale"], about["clean"]
        for name, master in self.masters.items():
            self.set_master(name, tensors[f"weight.{name}"])
            state: dict[str, Any] = {
                moment: self._own(name, tensors[f"{moment}.{name}"]).to(master.device, copy=True)
                for moment in MOMENTS
            }
            on = (
                "cpu" if isinstance(self._adamw, RoundedAdamW) else master.device
            )  # as the fused code keeps it
            self._adamw.state[master] = {"step": torch.tensor(float(self.updates), device=on), **state}


def _into(master: torch.Tensor) -> Any:
    """What moves a parameter's gradient to its master as soon as it is there."""

    def move(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        if master.grad is None:
            master.grad = parameter.grad.float()
        else:
            master.grad += parameter.grad
        parameter.grad = None

    return move


def _norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    """Of all of them together, float32 on the host."""
    if not gradients:
        return torch.zeros(())
    if all(gradient.dtype == torch.float32 for gradient in gradients):
        norms = list(torch._foreach_norm(gradients))
    else:
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
    whole: torch.Tensor = torch.stack(norms).norm()
    return whole.cpu()


class RoundedAdamW(torch.optim.Optimizer):
    """AdamW whose moments, and parameters that are so, are bfloat16: computed in float32, rounded to either neighbour
    with the probability of its nearness. ``seed``: of the next step; ``gradients`` of the parameters, in any dtype,
    which count by their ``share``."""

    seed, share = 0, 1.0

    def __init__(self, groups: Any, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._generators: dict[torch.device, torch.Generator] = {}
        self.gradients: dict[torch.Tensor, torch.Tensor | None] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for device in {p.device for group in self.param_groups for p in group["params"]}:
            generator = self._generators.setdefault(device, torch.Generator(device))
            generator.manual_seed(self.seed % 2**63)
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = self.gradients.get(parameter)
                if gradient is not None:
                    self._update(parameter, gradient.float() * self.share, group)
        self.gradients = {}

    def _update(self, parameter: torch.Tensor, gradient: torch.Tensor, group: Mapping[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state |= {moment: torch.zeros_like(parameter, dtype=torch.bfloat16) for moment in MOMENTS}
        state["step"] += 1
        count, (beta1, beta2) = float(state["step"]), group["betas"]
        mean = state["exp_avg"].float().lerp_(gradient, 1 - beta1)
        square = state["exp_avg_sq"].float().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        deviation = (square / (1 - beta2**count)).sqrt_().add_(group["eps"])
        value = parameter.float().mul_(1 - group["lr"] * group["weight_decay"])
        value.addcdiv_(mean, deviation, value=-group["lr"] / (1 - beta1**count))
        for target, exact in ((parameter, value), (state["exp_avg"], mean), (state["exp_avg_sq"], square)):
            self._round(target, exact)

    def _round(self, target: torch.Tensor, exact: torch.Tensor) -> None:
        if target.dtype != torch.bfloat16:
            target.copy_(exact)
            return
        generator = self._generators[exact.device]
        chance = torch.randint(
            0, 2**16, exact.shape, dtype=torch.int32, device=exact.device, generator=generator
        )
        bits = (exact.contiguous().view(torch.int32) + chance) & -(2**16)
        target.copy_(bits.view(torch.float32))
