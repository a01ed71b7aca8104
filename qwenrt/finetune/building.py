"""From a directory and settings to a run: the weights read, what is trained of them, in which precision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from qwenrt.config import ModelConfig
from qwenrt.config.layers import is_wide
from qwenrt.errors import ConfigError, RequestError
from qwenrt.finetune.data import Corpus
from qwenrt.finetune.network import (
    Network,
    TrainingBackend,
    balance_weight,
    check_length,
    distinct_tensors,
    initialise,
    initializer_range,
    replace_tensors,
)
from qwenrt.finetune.optimizer import Optimizer
from qwenrt.finetune.settings import TrainingSettings
from qwenrt.finetune.state import fingerprint
from qwenrt.finetune.trainer import Trainer
from qwenrt.loader.checkpoint.as_stored import as_stored
from qwenrt.loader.checkpoint.checkpoint import Checkpoint, open_checkpoint
from qwenrt.loader.weights import load_weights
from qwenrt.model.qwen import Qwen

COMPUTES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bfloat16-pure": torch.bfloat16,
    "float16": torch.float16,
}
_LOW_PRECISION = ("bfloat16", "float16", "bfloat16-pure")


@dataclass(frozen=True)
class Base:
    """What is trained: a directory, its configuration as its files have it, and its weights (None: random ones)."""

    source: Path
    config: ModelConfig
    checkpoint: Checkpoint | None

    @classmethod
    def open(cls, source: Path, config: ModelConfig, settings: TrainingSettings) -> Base:
        """Reads headers. Raises ConfigError for a network that cannot be trained."""
        if not config.is_causal or not config.has_head:
            raise ConfigError(
                f"fine-tuning {source}", "it embeds texts only", "Train a model that generates them."
            )
        if settings.from_scratch:
            checkpoint, stored = None, config
        else:
            checkpoint = open_checkpoint(source)
            stored = as_stored(config, checkpoint)
        if stored.quant is not None and settings.method != "lora":
            raise ConfigError(
                f"fine-tuning {source}",
                f"its weights are quantised ({stored.quant.name})",
                'Fine-tune the unquantised checkpoint, or train an adapter (method="lora", --method lora).',
            )
        if settings.from_scratch and stored.linear_attention is not None:
            raise RequestError(
                "from_scratch=True", "this network has gated delta nets", "Give trained weights."
            )
        return cls(source, stored, checkpoint)


def resolved_precision(settings: TrainingSettings, device: torch.device) -> str:
    """ "auto": float32 on a CPU, bfloat16 elsewhere."""
    if settings.precision != "auto":
        return settings.precision
    return "float32" if device.type == "cpu" else "bfloat16"


def build(
    base: Base,
    corpus: Corpus,
    settings: TrainingSettings,
    device: torch.device | None = None,
    *,
    identity: Mapping[str, object] | None = None,
    held_out: Corpus | None = None,
) -> Trainer:
    """A run that trains all parameters. Raises CheckpointError and ConfigError for the model's files."""
    device = device or torch.device("cpu")
    config, precision = base.config, resolved_precision(settings, device)
    check_length(config, max(map(corpus.length, range(len(corpus)))))
    pure, compute = precision == "bfloat16-pure", COMPUTES[precision]
    routers = settings.router != "frozen"
    weight = balance_weight(base.source, config, routers)
    backend = TrainingBackend(device, balancing=weight > 0)
    model = read_weights(base, backend, compute, torch.float32 if not pure else compute, settings)
    origin = fingerprint(model)
    exact = distinct_tensors(model)
    trained = {name for name in exact if routers or not name.endswith((".router", ".shared_expert_gate"))}
    if compute != torch.float32 and not pure:
        rounded = {
            id(tensor): tensor.to(compute if not is_wide(config, name) else tensor.dtype)
            for name, tensor in exact.items()
        }
        replace_tensors(model, lambda name, tensor: rounded[id(tensor)])
    parameters = {name: t for name, t in distinct_tensors(model).items() if name in trained}
    optimizer = Optimizer(parameters, settings, scaled=compute == torch.float16, pure=pure)
    for name in parameters:
        if optimizer.masters[name] is not parameters[name]:
            optimizer.masters[name].copy_(exact[name])
    model.bind()
    network = Network(
        model,
        backend,
        recompute=settings.recompute == "all",
        balance=weight / max(1, config.num_moe_layers),
        rebinds=config.linear_attention is not None,
    )
    about = {"model": origin, "computed_in": precision, **(identity or {})}
    return Trainer(network, optimizer, corpus, settings, about, held_out)


def read_weights(
    base: Base,
    backend: TrainingBackend,
    compute: torch.dtype,
    kept: torch.dtype,
    settings: TrainingSettings,
    quantize: str | None = None,
) -> Qwen:
    """The network that computes in ``compute``, its weights in ``kept`` and the run's own: loaded ones may be views of
    the file, which training must not write to."""
    model = Qwen(base.config, backend, compute)
    if base.checkpoint is None:
        initialise(model, settings.seed, initializer_range(base.source))
        if kept != torch.float32:
            replace_tensors(model, lambda name, tensor: tensor.to(kept))
        return model
    load_weights(model, base.checkpoint, base.config, backend, kept, quantize=quantize, progress=False)
    if backend.device.type == "cpu":
        replace_tensors(model, lambda name, tensor: tensor.clone())
    return model
