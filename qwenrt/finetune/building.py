"""From a directory and settings to a run: the weights read, what is trained of them, in which precision."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
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
from qwenrt.finetune.places import Fingerprint, fingerprint, names_of, places_of
from qwenrt.finetune.processes import Group
from qwenrt.finetune.settings import TrainingSettings
from qwenrt.finetune.sharding import Sharding
from qwenrt.finetune.trainer import Trainer
from qwenrt.loader.adapters import BaseWeights
from qwenrt.loader.checkpoint.as_stored import as_stored
from qwenrt.loader.checkpoint.checkpoint import Checkpoint, open_checkpoint
from qwenrt.loader.checkpoint.gguf.directory import NOTE
from qwenrt.loader.weights import load_weights, open_weights
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
    if compute == torch.float16 and settings.moments != "float32":
        found = "gradients, which are scaled up there, would be kept in 16 bits"
        raise RequestError(f'moments="{settings.moments}" with precision="float16"', found, 'Use "bfloat16".')
    weight = balance_weight(base.source, config, settings.router != "frozen")
    backend = TrainingBackend(device)
    sharding: Sharding | None = None
    if is_shared_out(settings, group):
        assert group is not None
        rounds = compute if compute != torch.float32 and not pure else None
        sharding = Sharding(group, device, settings.shard, rounds)
        model, origin, parameters = _shared_out(base, backend, compute, pure, settings, sharding)
        exact = parameters
    else:
        model, origin, parameters, exact = _whole(base, backend, compute, pure, settings)
    optimizer = Optimizer(parameters, settings, scaled=compute == torch.float16, pure=pure, sharding=sharding)
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
        sharding=sharding,
    )
    about = {"model": origin, "computed_in": precision, **(identity or {})}
    return Trainer(network, optimizer, corpus, settings, about, held_out, group)


def is_shared_out(settings: TrainingSettings, group: Group | None) -> bool:
    """Whether the processes share out the weights: one alone has them all."""
    return settings.shard != "no" and group is not None and group.size > 1


def _is_trained(settings: TrainingSettings, name: str) -> bool:
    return settings.router != "frozen" or not name.endswith((".router", ".shared_expert_gate"))


def _whole(
    base: Base, backend: TrainingBackend, compute: torch.dtype, pure: bool, settings: TrainingSettings
) -> tuple[Qwen, str, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(the network, its fingerprint, what is trained of it, the same in float32)."""
    model = read_weights(base, backend, compute, torch.float32 if not pure else compute, settings)
    origin = fingerprint(model)
    exact = distinct_tensors(model)
    if compute != torch.float32 and not pure:
        rounded = {
            id(tensor): tensor.to(compute if not is_wide(base.config, name) else tensor.dtype)
            for name, tensor in exact.items()
        }
        replace_tensors(model, lambda name, tensor: rounded[id(tensor)])
    parameters = {name: t for name, t in distinct_tensors(model).items() if _is_trained(settings, name)}
    return model, origin, parameters, exact


def _shared_out(
    base: Base,
    backend: TrainingBackend,
    compute: torch.dtype,
    pure: bool,
    settings: TrainingSettings,
    sharding: Sharding,
) -> tuple[Qwen, str, dict[str, torch.Tensor]]:
    """(the network, its fingerprint, this process's parts of what is trained). What is float32 in any case, a few norms
    of some networks, every process has whole."""
    config, kept = base.config, torch.float32 if not pure else compute
    own: dict[str, torch.Tensor] = {}

    def share(model: Qwen, index: int | None) -> None:
        places = list(places_of(model, names_of(model, index)))
        trained = {place.name for place in places if _is_trained(settings, place.name)}
        wide = {place.name for place in places if is_wide(config, place.name)}
        for place in places:
            if place.name in wide:
                place.put(place.tensor.clone())
                own.update({place.name: place.tensor} if place.name in trained else {})
        sharding.add(model, index, trained, wide)

    model, origin = _layer_by_layer(base, backend, compute, kept, settings, None, share)
    share(model, None)
    return model, origin, {**own, **sharding.parts}


def _layer_by_layer(
    base: Base,
    backend: TrainingBackend,
    compute: torch.dtype,
    kept: torch.dtype,
    settings: TrainingSettings,
    quantize: str | None,
    share: Callable[[Qwen, int], None],
) -> tuple[Qwen, str]:
    """(the network, its fingerprint), each layer given to ``share`` as soon as it is read."""
    origin = Fingerprint(base.config)
    if base.checkpoint is None:
        model, reader = read_weights(base, backend, compute, kept, settings), None
    else:
        model = Qwen(base.config, backend, compute)
        reader = open_weights(model, base.checkpoint, base.config, backend, kept, quantize)
    for index in (*range(base.config.num_layers), None):
        names = names_of(model, index)
        for name in names if reader is not None else ():
            assert reader is not None
            if name in model.tensor_specs:
                model.set_tensor(name, reader.tensor(name))
            else:
                tied = name == "lm_head" and base.config.tie_word_embeddings
                head = model.embed_tokens if tied else None
                model.set_linear(name, reader.linear(model.linear_specs[name], head))
        origin.add(places_of(model, names))
        if index is not None:
            share(model, index)
    return model, origin.value


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
    shared, routes = is_shared_out(settings, group), settings.router == "trained"
    _check_adapter(base, settings, lora, precision, shared)
    assert base.checkpoint is not None
    compute = COMPUTES[precision]
    backend = TrainingBackend(device)
    sharding: Sharding | None = None
    if shared:
        assert group is not None
        sharding = Sharding(group, device, settings.shard, None)

        def share(model: Qwen, index: int) -> None:
            assert sharding is not None
            sharding.add(model, index, (), routers_of(model) if routes else ())

        model, origin = _layer_by_layer(base, backend, compute, compute, settings, lora.quantize, share)
    else:
        model = read_weights(base, backend, compute, compute, settings, lora.quantize, own=False)
        origin = fingerprint(model)
    tokens, whole = rows_to_train(base, model, corpus, lora, tokenizer, talks)
    weights = BaseWeights(base.checkpoint, config)

    def norms(param: str) -> torch.Tensor:
        found: torch.Tensor = torch.linalg.vector_norm(weights.weight(param), dim=1)
        return found

    routers = routers_of(model) if routes else ()
    adapter = TrainedAdapter(model, lora, settings.seed, tokens, whole, norms, routers)
    if sharding is not None:
        sharding.add(model, None, (), ())
    model.bind()
    optimizer = Optimizer(adapter.parameters, settings, scaled=compute == torch.float16, rates=adapter.rates)
    recompute = settings.recompute == "all" if recompute is None else recompute
    balance = balance_weight(base.source, config, routes) / max(1, config.num_moe_layers)
    network = Network(model, backend, recompute=recompute, balance=balance, rebinds=False, sharding=sharding)
    network.adapter = adapter.weights
    about = {**asdict(lora), "model": origin, "computed_in": precision, **(identity or {})}
    return Trainer(network, optimizer, corpus, settings, about, held_out, group), adapter


def _check_adapter(
    base: Base, settings: TrainingSettings, lora: LoraSettings, precision: str, shared: bool
) -> None:
    """RequestError for what an adapter cannot be trained with."""
    for wrong, asked, found, remedy in (
        (
            base.checkpoint is None,
            "from_scratch",
            "there are no weights for it to lie beside",
            "Leave it out.",
        ),
        (
            precision == "bfloat16-pure",
            'precision="bfloat16-pure"',
            "what is trained of an adapter is small, and float32",
            'Use "bfloat16".',
        ),
        (
            settings.router == "trained" and base.config.moe is None,
            'router="trained"',
            "this model has no experts",
            "Leave it out.",
        ),
        (
            lora.dora and lora.quantize is not None,
            f'dora and quantize="{lora.quantize}"',
            "DoRA's magnitudes are those of the weights in the file",
            "Leave one of the two out.",
        ),
        (
            lora.dora and shared,
            f'dora and shard="{settings.shard}"',
            "DoRA's norms are those of whole weights",
            "Leave one of the two out.",
        ),
    ):
        if wrong:
            raise RequestError(f"training an adapter with {asked}", found, remedy)


def routers_of(model: Qwen) -> tuple[str, ...]:
    """What chooses experts, by the model's names."""
    return tuple(name for name in model.tensor_specs if name.endswith(".router"))


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
