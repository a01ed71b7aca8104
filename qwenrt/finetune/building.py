"""From a directory and settings to a run: the weights read, what is trained of them, in which precision."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from qwenrt.config import GenerationConfig, ModelConfig
from qwenrt.config.layers import is_wide
from qwenrt.errors import CheckpointError, ConfigError, RequestError, shown
from qwenrt.files import is_there
from qwenrt.finetune.data import Corpus
from qwenrt.finetune.lora import LoraSettings, TrainedAdapter, never_learned
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
from qwenrt.finetune.processes import Group
from qwenrt.finetune.settings import TrainingSettings
from qwenrt.finetune.state import fingerprint
from qwenrt.finetune.trainer import Trainer
from qwenrt.loader.adapters import BaseWeights
from qwenrt.loader.checkpoint.as_stored import as_stored
from qwenrt.loader.checkpoint.checkpoint import Checkpoint, open_checkpoint
from qwenrt.loader.checkpoint.gguf.directory import NOTE
from qwenrt.loader.weights import load_weights
from qwenrt.model.qwen import Qwen
from qwenrt.text.chat.chat_tokenizer import ChatTokenizer
from qwenrt.text.chat.training_form import IGNORE

logger = logging.getLogger("qwenrt")

COMPUTES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bfloat16-pure": torch.bfloat16,
    "float16": torch.float16,
}


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
        if is_there(source / NOTE, CheckpointError):
            remedy = "Train the checkpoint in safetensors that it was made of."
            raise ConfigError(f"fine-tuning {source}", "its weights are in a GGUF file", remedy)
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
    recompute: bool | None = None,
    group: Group | None = None,
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
        recompute=settings.recompute == "all" if recompute is None else recompute,
        balance=weight / max(1, config.num_moe_layers),
        rebinds=config.linear_attention is not None,
    )
    about = {"model": origin, "computed_in": precision, **(identity or {})}
    return Trainer(network, optimizer, corpus, settings, about, held_out, group)


def build_adapter(
    base: Base,
    corpus: Corpus,
    settings: TrainingSettings,
    lora: LoraSettings,
    tokenizer: ChatTokenizer,
    device: torch.device | None = None,
    *,
    talks: bool = True,
    recompute: bool | None = None,
    group: Group | None = None,
    identity: Mapping[str, object] | None = None,
    held_out: Corpus | None = None,
) -> tuple[Trainer, TrainedAdapter]:
    """A run that trains an adapter; the base stays as it is, in 16 bits or in codes. ``talks``: whether conversations
    are in the data."""
    device = device or torch.device("cpu")
    config, precision = base.config, resolved_precision(settings, device)
    check_length(config, max(map(corpus.length, range(len(corpus)))))
    if precision == "bfloat16-pure" or settings.router == "trained" or base.checkpoint is None:
        asked = (
            "from_scratch" if base.checkpoint is None else f"precision={precision}, router={settings.router}"
        )
        raise RequestError(
            f"training an adapter with {asked}", "adapters have no use for it", "Leave it out."
        )
    if lora.dora and lora.quantize:
        found = "DoRA's magnitudes are those of the weights in the file"
        raise RequestError(f"dora with quantize={lora.quantize}", found, "Leave one of the two out.")
    compute = COMPUTES[precision]
    backend = TrainingBackend(device)
    model = read_weights(base, backend, compute, compute, settings, lora.quantize, own=False)
    model.bind()
    tokens, whole = rows_to_train(base, model, corpus, lora, tokenizer, talks)
    weights = BaseWeights(base.checkpoint, config)

    def norms(param: str) -> torch.Tensor:
        found: torch.Tensor = torch.linalg.vector_norm(weights.weight(param), dim=1)
        return found

    adapter = TrainedAdapter(model, lora, settings.seed, tokens, whole, norms)
    optimizer = Optimizer(adapter.parameters, settings, scaled=compute == torch.float16, rates=adapter.rates)
    recompute = settings.recompute == "all" if recompute is None else recompute
    network = Network(model, backend, recompute=recompute, balance=0.0, rebinds=False)
    network.adapter = adapter.weights
    about = {**asdict(lora), "model": fingerprint(model), "computed_in": precision, **(identity or {})}
    return Trainer(network, optimizer, corpus, settings, about, held_out, group), adapter


def rows_to_train(
    base: Base, model: Qwen, corpus: Corpus, lora: LoraSettings, tokenizer: ChatTokenizer, talks: bool
) -> tuple[list[int], tuple[str, ...]]:
    """(tokens of which the rows of embedding and head are trained, which of the two is trained whole). Warns of learned
    tokens that the base never had to say and that are not among them."""
    head = model.lm_head.data.get("weight")
    learned = set(corpus.labels[corpus.labels != IGNORE].tolist())
    new = (
        never_learned(head, learned)
        if isinstance(head, torch.Tensor) and model.lm_head.kind == "dense"
        else []
    )
    if lora.keep_modules == "all" or (
        lora.keep_modules == "auto"
        and lora.train_tokens is None
        and talks
        and not knows_turns(base, tokenizer)
    ):
        return [], ("embed_tokens", "lm_head")
    if lora.train_tokens == "auto":
        return new, ()
    tokens = []
    for token in lora.train_tokens or ():
        number = tokenizer.token_id(token) if isinstance(token, str) else token
        if number is None or not 0 <= number < model.vocab_size:
            remedy = 'Give tokens as the tokenizer has them, or "auto".'
            raise RequestError(f"train_tokens={shown(token)}", "no such token", remedy)
        tokens.append(number)
    if left := [token for token in new if token not in tokens]:
        logger.warning(
            "%d of the tokens to be learned were never said by the base, and no adapter of the layers can teach them: "
            '%s. Train their rows as well: train_tokens="auto" (--train-tokens auto).',
            len(left),
            ", ".join(repr(tokenizer.decode([token])) for token in left[:12]),
        )
    return tokens, ()


def knows_turns(base: Base, tokenizer: ChatTokenizer) -> bool:
    """Whether the base was trained on conversations: a Qwen-1 says so; a later one ends texts where turns end."""
    generation = GenerationConfig.from_dir(base.source)
    if base.config.model_type == "qwen":
        return generation.chat_format == "chatml"
    return tokenizer.im_end_id in (*generation.eos_token_ids, *base.config.eos_token_ids)


def read_weights(
    base: Base,
    backend: TrainingBackend,
    compute: torch.dtype,
    kept: torch.dtype,
    settings: TrainingSettings,
    quantize: str | None = None,
    own: bool = True,
) -> Qwen:
    """The network that computes in ``compute``, its weights in ``kept`` and the run's ``own``: loaded ones may be views
    of the file, which training must not write to."""
    model = Qwen(base.config, backend, compute)
    if base.checkpoint is None:
        initialise(model, settings.seed, initializer_range(base.source))
        if kept != torch.float32:
            replace_tensors(model, lambda name, tensor: tensor.to(kept))
        return model
    load_weights(model, base.checkpoint, base.config, backend, kept, quantize=quantize, progress=False)
    if own and backend.device.type == "cpu":
        replace_tensors(model, lambda name, tensor: tensor.clone())
    return model
