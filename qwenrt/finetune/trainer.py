"""One training run: the network in float32, AdamW, and a state from which a run that was cut goes on."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open

from qwenrt.arguments import as_integer, as_number, flag
from qwenrt.backends.base import Backend
from qwenrt.config import ModelConfig, read_json
from qwenrt.errors import CheckpointError, ConfigError, QwenrtError, RequestError, shown
from qwenrt.finetune.data import IGNORE, Corpus
from qwenrt.finetune.interrupt import held_interrupt
from qwenrt.loader.checkpoint.as_stored import as_stored
from qwenrt.loader.checkpoint.checkpoint import open_checkpoint
from qwenrt.loader.checkpoint.header import read_shard
from qwenrt.loader.checkpoint.writing import save_atomically
from qwenrt.loader.weights import load_weights
from qwenrt.model.qwen import Qwen
from qwenrt.ops.steps import StepPlan
from qwenrt.ops.types import Packed

STATE_FILE = "training_state.safetensors"  # in the output directory while training goes on
CURVE_FILE = "loss_curve.json"
LEAST_CHANGE = (
    0.01  # of a weight's usual size; a run that can change less leaves what the model says as it was
)


@dataclass(frozen=True)
class TrainingSettings:
    """What decides the result of a training run (`finetune` says what each means)."""

    epochs: int = 5
    max_steps: int | None = None
    decay_steps: int | None = None
    learning_rate: float = 1e-5
    min_learning_rate_ratio: float = 0.0
    batch_tokens: int = 4096
    max_length: int = 512
    warmup_ratio: float = 0.01
    weight_decay: float = 0.1
    adam_beta2: float = 0.95
    max_grad_norm: float = 1.0
    seed: int = 0
    from_scratch: bool = False

    def __post_init__(self) -> None:
        counts = {name: getattr(self, name) for name in ("epochs", "batch_tokens", "max_length")}
        optional = {name: getattr(self, name) for name in ("max_steps", "decay_steps")}
        counts |= {name: steps for name, steps in optional.items() if steps is not None}
        for name, value in counts.items():
            object.__setattr__(self, name, whole_number(name, value, 1))
        object.__setattr__(self, "seed", whole_number("seed", self.seed, 0))
        object.__setattr__(self, "from_scratch", flag("from_scratch", self.from_scratch))
        limits = {
            "learning_rate": (0.0, 10.0),
            "min_learning_rate_ratio": (0.0, 1.0),
            "warmup_ratio": (0.0, 1.0),
            "weight_decay": (0.0, 10.0),
            "adam_beta2": (0.0, 0.999999),
            "max_grad_norm": (1e-6, 1e6),
        }
        for name, (low, high) in limits.items():
            given = getattr(self, name)
            number = as_number(given)
            if number is None or not low <= number <= high:
                raise RequestError(
                    f"{name}={shown(given)}",
                    "not a number in range",
                    f"Use a number from {low:g} to {high:g}.",
                )
            object.__setattr__(self, name, number)


def whole_number(name: str, value: object, least: int) -> int:
    """An integer from ``least`` to 2^31. Raises RequestError."""
    number = as_integer(value)
    if number is None or not least <= number <= 2**31:
        remedy = f"Use an integer of at least {least}."
        raise RequestError(f"{name}={shown(value)}", "not a usable number", remedy)
    return number


class Trainer:
    """One run: the model in float32, AdamW, and where in the corpus it is."""

    def __init__(
        self,
        source: Path,
        config: ModelConfig,
        corpus: Corpus,
        settings: TrainingSettings,
        pad_id: int,
        threads: int | None = None,
    ) -> None:
        if config.quant is not None:
            raise ConfigError(
                f"fine-tuning {source}",
                f"its weights are quantised ({config.quant.name})",
                "Fine-tune the unquantised checkpoint.",
            )
        if config.model_type != "qwen":
            raise ConfigError(
                f"fine-tuning {source}",
                f"its model_type is {config.model_type!r}",
                "Only Qwen-1 is fine-tuned: later ones have other chat templates, some a head tied to the embedding.",
            )
        self.corpus, self.settings, self.pad_id, self.threads = corpus, settings, pad_id, threads
        backend = Backend(torch.device("cpu"))
        self.model = Qwen(config, backend, torch.float32)
        if settings.from_scratch:
            initialise(self.model, settings.seed, _initializer_range(source))
        else:
            checkpoint = open_checkpoint(source)
            stored = as_stored(config, checkpoint)
            load_weights(self.model, checkpoint, stored, backend, torch.float32, progress=False)
            self._own_weights()
        self.model.bind()
        self.parameters = dict(self.model.tensors())
        self._origin = self._digest()
        for parameter in self.parameters.values():
            parameter.requires_grad_()
        decayed = [p for p in self.parameters.values() if p.dim() > 1]
        others = [p for p in self.parameters.values() if p.dim() == 1]
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        betas = (0.9, settings.adam_beta2)
        self.optimizer = torch.optim.AdamW(
            groups, lr=settings.learning_rate, betas=betas, weight_decay=settings.weight_decay, fused=True
        )
        self.schedule: list[list[list[int]]] = []
        steps = 0
        for epoch in range(settings.epochs):
            if settings.max_steps is None or steps < settings.max_steps:
                self.schedule.append(corpus.batches(settings.seed, epoch, settings.batch_tokens))
                steps += len(self.schedule[-1])
        self.total_steps = min(steps, settings.max_steps or steps)
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.losses: list[tuple[int, float]] = []

    def _own_weights(self) -> None:
        """Copy the weights: loaded ones may be views of the file, which training must not write to."""
        for name in self.model.tensor_specs:
            tensor = self.model.get(name)
            assert isinstance(tensor, torch.Tensor)
            self.model.set_tensor(name, tensor.clone())
        for name in self.model.linear_specs:
            packed = self.model.get(name)
            assert isinstance(packed, Packed)
            packed.data["weight"] = packed.data["weight"].clone()
            packed.bias = None if packed.bias is None else packed.bias.clone()

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then a cosine down to min_learning_rate_ratio."""
        steps = self.settings.decay_steps or self.total_steps
        warmup = max(1, round(self.settings.warmup_ratio * steps))
        if step < warmup:
            return self.settings.learning_rate * (step + 1) / warmup
        done = min(1.0, (step - warmup) / max(1, steps - warmup))
        low = self.settings.min_learning_rate_ratio
        return self.settings.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done)))

    def too_short_to_learn(self) -> str | None:
        """A warning where all steps together can hardly change the model, else None. AdamW moves a weight by about the
        learning rate in each step, whatever the gradient."""
        change = sum(map(self.learning_rate, range(self.total_steps)))
        matrices = [p.detach() for p in self.parameters.values() if p.dim() > 1]
        usual = math.sqrt(sum(float(p.square().sum()) for p in matrices) / sum(p.numel() for p in matrices))
        if change >= LEAST_CHANGE * usual:
            return None
        return (
            f"With a learning_rate of {self.settings.learning_rate:g} all the steps ({self.total_steps}) change "
            f"a weight by about {change:.1g}, where {usual:.1g} is usual: the model will say what it said before. Use "
            f"more epochs, a smaller batch_tokens (steps in an epoch now: {len(self.schedule[0])}) or a larger "
            "learning_rate."
        )

    def loss(self, batch: list[int]) -> tuple[torch.Tensor, int]:
        """Mean next-token cross-entropy over the labelled tokens of a batch, and the batch's real tokens."""
        ids, labels = self.corpus.take(batch, self.pad_id)
        rows, width = ids.shape
        plan = StepPlan([width] * rows, [width] * rows)
        hidden = self.model.forward(ids.flatten(), plan, [1] * rows)  # training is without NTK and LogN
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE).flatten()
        chosen = (targets != IGNORE).nonzero().squeeze(1)
        logits = self.model.logits(hidden.index_select(0, chosen))
        return F.cross_entropy(logits, targets.index_select(0, chosen)), sum(map(self.corpus.length, batch))

    def train_step(self, batch: list[int]) -> float:
        """One update; the loss before it."""
        rate = self.learning_rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss, tokens = self.loss(batch)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise QwenrtError(
                f"training step {self.step + 1}", f"the loss is {value}", "Use a smaller learning_rate."
            )
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += tokens
        return value

    def remaining(self) -> Iterator[list[int]]:
        """The batches from this step to the end."""
        batches = [batch for epoch in self.schedule for batch in epoch]
        yield from batches[self.step : self.total_steps]

    def run(self, target: Path, save_every: int | None, progress: bool | None) -> None:
        """All remaining steps, with a bar, keeping the state every ``save_every`` steps."""
        from tqdm import tqdm

        every = max(1, self.total_steps // 200)
        pending: list[float] = []
        disable = None if progress is None else not progress
        began, before = time.monotonic(), self.seconds
        bar = tqdm(total=self.total_steps, initial=self.step, desc="training", unit="step", disable=disable)
        with bar, held_interrupt() as interrupt:
            for batch in self.remaining():
                pending.append(self.train_step(batch))
                self.seconds = before + time.monotonic() - began
                bar.update()
                if self.step % every == 0 or self.step == self.total_steps:
                    self.losses.append((self.step, sum(pending) / len(pending)))
                    pending.clear()
                    speed = self.tokens / max(self.seconds, 1e-9)
                    bar.set_postfix_str(f"loss {self.losses[-1][1]:.3f}, {speed:.0f} tokens/s")
                keep = interrupt.pressed or (save_every and self.step % save_every == 0)
                if keep and self.step < self.total_steps:
                    self.save_state(target / STATE_FILE)
                    self.save_curve(target)
                    if interrupt.pressed:
                        raise KeyboardInterrupt(
                            f"stopped after step {self.step} of {self.total_steps}; they are kept in "
                            f"{target / STATE_FILE}, and the same call goes on from there"
                        )

    def save_curve(self, target: Path) -> None:
        """The losses so far, for a plot."""
        curve = {
            "steps": self.step,
            "total_steps": self.total_steps,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 1),
            "settings": asdict(self.settings),
            "loss": [[step, round(loss, 5)] for step, loss in self.losses],
        }
        partial = target / f"{CURVE_FILE}.partial"
        partial.write_text(json.dumps(curve, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, target / CURVE_FILE)

    # ---- the state that is kept, so that little is lost when a run is cut

    def identity(self) -> dict[str, object]:
        """Everything that decides the result, by name: what must be the same for a run to be continued."""
        return {
            **asdict(self.settings),
            "threads": self.threads,
            "data": self.corpus.digest(),
            "model": self._origin,
        }

    def _digest(self) -> str:
        """Of the weights and the configuration that training begins with."""
        digest = hashlib.sha256(repr(self.model.config).encode())
        for name, parameter in self.parameters.items():
            digest.update(name.encode())
            digest.update(parameter.detach().contiguous().numpy().data)
        return digest.hexdigest()

    def save_state(self, path: Path) -> None:
        """Weights, both moments and the position, in one file that is replaced whole."""
        tensors = {f"weight.{name}": p.detach() for name, p in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for moment in ("exp_avg", "exp_avg_sq"):
                tensors[f"{moment}.{name}"] = self.optimizer.state[parameter][moment]
        about = {"step": self.step, "tokens": self.tokens, "seconds": self.seconds, "losses": self.losses}
        save_atomically(tensors, path, {"identity": json.dumps(self.identity()), "state": json.dumps(about)})

    def load_state(self, path: Path) -> None:
        """Go on from what save_state wrote. CheckpointError where it belongs to another run or is damaged."""
        try:
            read_shard(path)  # a regular file whose header holds what it says
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            about, identity = json.loads(metadata["state"]), dict(json.loads(metadata["identity"]))
        except Exception as error:  # the library has no base class of its own
            raise CheckpointError(
                f"resuming from {path}", f"not readable ({str(error)[:80]})", "Delete it to begin anew."
            ) from error
        other = [
            f"another {name}" if name in ("data", "model") else f"{name}={shown(identity.get(name))}"
            for name, value in self.identity().items()
            if identity.get(name) != value
        ]
        if other:
            raise CheckpointError(
                f"resuming from {path}",
                f"it belongs to a run with {', '.join(other)}",
                "Use the same, another output directory, or resume=False (--no-resume).",
            )
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"weight.{name}"])
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(about["step"])),
                    "exp_avg": tensors[f"exp_avg.{name}"],
                    "exp_avg_sq": tensors[f"exp_avg_sq.{name}"],
                }
        self.step, self.tokens, self.seconds = about["step"], about["tokens"], about["seconds"]
        self.losses = [(int(step), float(loss)) for step, loss in about["losses"]]


def initialise(model: Qwen, seed: int, spread: float = 0.02) -> None:
    """Random weights: normal with deviation ``spread``, less where a residual is fed; norms 1, biases 0. Queries and
    keys begin at 1 / sqrt(hidden_size), so that attention is not flat, and the head begins as a copy of the embedding,
    so that what is read can be said: a small model then learns to copy in a fraction of the steps."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: tuple[int, ...], deviation: float) -> torch.Tensor:
        return torch.empty(shape).normal_(0.0, deviation, generator=generator)

    for name, shape in model.tensor_specs.items():
        model.set_tensor(name, normal(shape, spread) if len(shape) > 1 else torch.ones(shape))
    for name, spec in model.linear_specs.items():
        deviation = spread
        if name.endswith(("o_proj", "down_proj")):
            deviation = spread / math.sqrt(2 * model.config.num_layers)
        elif name.endswith("qkv_proj"):
            deviation = spec.in_features**-0.5
        weight = normal((spec.out_features, spec.in_features), deviation)
        if name == "lm_head":
            weight = model.embed_tokens.clone()
        bias = torch.zeros(spec.out_features) if spec.bias else None
        model.set_linear(name, Packed("dense", spec.out_features, spec.in_features, {"weight": weight}, bias))


def _initializer_range(source: Path) -> float:
    value = read_json(source / "config.json").get("initializer_range", 0.02)
    return float(value) if isinstance(value, (int, float)) and 0 < value < 1 else 0.02
