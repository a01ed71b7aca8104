"""From a name and the user's settings to a model with its engine: resolve, check, load, bind."""

from __future__ import annotations

import dataclasses
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch

from qwenrt import summary
from qwenrt.arguments import flag, one_of, size
from qwenrt.backends import registry, selfcheck
from qwenrt.backends.base import Backend
from qwenrt.backends.binding import Binding
from qwenrt.config import Environment, GenerationConfig, ModelConfig, read_model_config
from qwenrt.config.environment import packed_cache_in
from qwenrt.config.layers import BLOCK_SIZE, LinearSpec, num_parameters
from qwenrt.config.quant import rounded_group
from qwenrt.config.released import RELEASED, released_config
from qwenrt.embedding import Embedder
from qwenrt.engine.async_engine import AsyncEngine
from qwenrt.engine.engine import Engine, EngineOptions
from qwenrt.errors import BackendError, CheckpointError, ConfigError
from qwenrt.files import is_there
from qwenrt.loader.checkpoint.as_stored import as_stored
from qwenrt.loader.checkpoint.checkpoint import Checkpoint, open_checkpoint
from qwenrt.loader.checkpoint.inventory import check_size
from qwenrt.loader.checkpoint.mapping import Watch
from qwenrt.loader.hub.resolve import resolve
from qwenrt.loader.memory.preflight import preflight
from qwenrt.loader.weights import QUANTIZE_BITS, bits_of, load_weights, quantize_bits
from qwenrt.model import trial
from qwenrt.model.qwen import Qwen
from qwenrt.ops.types import CanonicalWeight
from qwenrt.text.chat.chat_tokenizer import ChatTokenizer
from qwenrt.text.chat.formats import ChatFormat, load_chat_format
from qwenrt.text.tokenizer.tokenizer import TOKENIZER_FILES

logger = logging.getLogger("qwenrt")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KV_CACHE_DTYPES = ("auto", "int8")
ACTIVATIONS = ("auto", "exact", "int16", "int8")
FALLBACKS = ("warn", "error", "silent")
CACHE_SHARE = 0.25  # of the memory left beside the weights; a lone sequence of max_model_len may take more
LONGEST_BY_CHOICE = 32768  # the longest context that is set up unless the user asks for more


@dataclass(frozen=True)
class Settings:
    """What a user may set when loading; `qwenrt.load` says what each means."""

    device: str = "auto"
    dtype: str = "auto"
    source: str = "auto"
    revision: str | None = None
    offline: bool | None = None
    quantize: str | None = None
    quantize_head: str | None = None
    kv_cache_dtype: str = "auto"
    activations: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 16
    max_num_batched_tokens: int = 512
    fallback: str = "warn"
    progress: bool | None = None
    packed_cache: bool | str | PathLike[str] | None = None

    def __post_init__(self) -> None:
        choices: dict[str, tuple[object, ...]] = {
            "dtype": ("auto", *DTYPES),
            "source": ("auto", "huggingface", "modelscope"),
            "quantize": (None, "int8", "int4"),
            "quantize_head": (None, "int8", "int4"),
            "kv_cache_dtype": KV_CACHE_DTYPES,
            "activations": ACTIVATIONS,
            "fallback": FALLBACKS,
        }
        changes: dict[str, object] = {}
        if isinstance(self.dtype, torch.dtype):
            changes["dtype"] = str(self.dtype).removeprefix("torch.")
        for name, allowed in choices.items():
            one_of(name, changes.get(name, getattr(self, name)), allowed)
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens"):
            if name != "max_model_len" or self.max_model_len is not None:
                changes[name] = size(name, getattr(self, name))
        told = [name for name in ("offline", "progress") if getattr(self, name) is not None]
        changes |= {name: flag(name, getattr(self, name)) for name in told}
        for name, value in changes.items():
            object.__setattr__(self, name, value)


@dataclass
class Assembled:
    """A model that is ready to serve, and what was decided on the way."""

    name: str
    config: ModelConfig
    generation: GenerationConfig
    tokenizer: ChatTokenizer | None
    chat_format: ChatFormat | ConfigError | None  # an error: why nobody can chat with it
    embedder: Embedder
    model: Qwen
    backend: Backend
    engine: AsyncEngine
    dtype: torch.dtype
    max_model_len: int
    quantize: str | None
    load_s: float
    summary: str = ""

    @property
    def activations(self) -> str:
        """What inputs of linears are rounded to: "int16", "int8+int16", ...; "" where no backend rounds any."""
        pieces = (piece for linear in self.model.linears() for piece in linear.data.get("parts", [linear]))
        return "+".join(sorted({self.backend.activations_of(piece) for piece in pieces} - {""}))

    def explain(self) -> str:
        """The line at load, and a table: op, kind of weight, what serves it in how many places, and why or with which
        note."""
        return "\n".join([self.summary, *summary.table(self.backend, self.model)])


def assemble(name: str, settings: Settings, environment: Environment) -> Assembled:
    """Resolve a name, check its files and the memory, load the weights, bind the ops, start the engine."""
    started = time.perf_counter()
    backend = _backend(settings, environment)
    directory = resolve(
        name,
        source=settings.source,
        revision=settings.revision,
        offline=settings.offline,
        env=environment,
        progress=settings.progress,
    )
    config, generation = read_model_config(directory), GenerationConfig.from_dir(directory)
    checkpoint = open_checkpoint(directory)
    check_size(checkpoint, config)
    config = as_stored(config, checkpoint)
    tokenizer = _tokenizer(directory, config)
    chat_format = _chat_format(directory, config, generation, tokenizer)
    text = _Text(generation, tokenizer, chat_format, Embedder.load(directory, config))

    def fill(model: Qwen, dtype: torch.dtype) -> None:
        load_weights(
            model,
            checkpoint,
            config,
            backend,
            dtype,
            quantize=settings.quantize,
            quantize_head=settings.quantize_head,
            progress=settings.progress,
            packed_cache=_packed_cache(settings, environment),
        )

    stored = _stored_dtype(checkpoint)
    return _build(name, config, text, backend, settings, fill, stored, started)


def assemble_random(shape: str | ModelConfig, settings: Settings, environment: Environment) -> Assembled:
    """The same with random weights of a released shape and no tokenizer: for benchmarks, without a download."""
    started = time.perf_counter()
    config = shape if isinstance(shape, ModelConfig) else shape_config(shape)
    backend = _backend(settings, environment)
    bits, head_bits = (
        quantize_bits(settings.quantize, config),
        QUANTIZE_BITS.get(settings.quantize_head or ""),
    )
    made: dict[tuple[int, int, int], CanonicalWeight] = {}  # experts are many and of one shape

    def random_linear(rows: int, columns: int, bits: int) -> CanonicalWeight:
        shape = (rows, columns, bits)
        if shape not in made:
            if len(made) > 1:
                made.clear()
            made[shape] = _random_rows(*shape)
        return made[shape]

    def fill(model: Qwen, dtype: torch.dtype) -> None:
        for name, dims in model.tensor_specs.items():
            tensor = torch.ones(dims) if len(dims) == 1 else _random_rows(dims[0], dims[1], 16).dense
            assert tensor is not None
            kept = backend.weight_dtype("bfloat16", dtype) if name == "embed_tokens" else dtype
            model.set_tensor(name, tensor.to(backend.device, kept))
        for name, spec in model.linear_specs.items():
            own = bits_of(spec, bits, head_bits) or 16
            weight = random_linear(spec.out_features, spec.in_features, own)
            if name == "lm_head" and config.tie_word_embeddings and own == 16:
                weight = CanonicalWeight(dense=model.embed_tokens, shared=True)
            bias = torch.zeros(spec.out_features) if spec.bias else None
            model.set_linear(name, backend.pack_linear(dataclasses.replace(weight, bias=bias), dtype))

    name = shape if isinstance(shape, str) else "random weights"
    text = _Text(GenerationConfig(), None, None, Embedder())
    return _build(name, config, text, backend, settings, fill, "bfloat16", started)


def _random_rows(rows: int, columns: int, bits: int) -> CanonicalWeight:
    """Random weights as a checkpoint would hold them (dense ones in bfloat16); rows repeat, which no kernel sees."""
    block = selfcheck.random_weight(min(rows, 512), columns, bits, rounded_group(bits), seed=rows)
    times = -(-rows // 512)
    if block.dense is not None:
        return CanonicalWeight(dense=block.dense.bfloat16().repeat(times, 1)[:rows])
    codes, scales, zeros = (
        tensor.repeat(1, times)[:, :rows].contiguous()
        for tensor in (block.codes, block.scales, block.zeros)
        if tensor is not None
    )
    return dataclasses.replace(block, codes=codes, scales=scales, zeros=zeros)


def _packed_cache(settings: Settings, environment: Environment) -> Path | None:
    if settings.packed_cache is None:
        return environment.packed_cache
    return packed_cache_in(settings.packed_cache, environment.cache_dir)


def _backend(settings: Settings, environment: Environment) -> Backend:
    backend = registry.create(settings.device, environment.backend)
    activations = environment.activations if settings.activations == "auto" else settings.activations
    backend.configure(environment.kernels, environment.num_threads, activations)
    return backend


def shape_config(name: str) -> ModelConfig:
    """The config of a released shape."""
    config = released_config(name)
    if config is None:
        raise ConfigError(f"shape {name!r}", "unknown", f"Known shapes are: {', '.join(RELEASED)}.")
    return config


@dataclass(frozen=True)
class _Text:
    """What a checkpoint says about texts."""

    generation: GenerationConfig
    tokenizer: ChatTokenizer | None
    chat_format: ChatFormat | ConfigError | None
    embedder: Embedder


def _build(
    name: str,
    config: ModelConfig,
    text: _Text,
    backend: Backend,
    settings: Settings,
    fill: Callable[[Qwen, torch.dtype], None],
    stored: str | None,
    started: float,
) -> Assembled:
    quantize_bits(settings.quantize, config)
    dtype = choose_dtype(settings.dtype, config, backend, stored, settings.quantize)
    longest = settings.max_model_len or min(config.max_position_embeddings, LONGEST_BY_CHOICE)
    if settings.max_model_len is None:
        longest = _longest_that_fits(config, backend, dtype, settings, longest)
    preflight(
        config,
        backend,
        dtype,
        quantize=settings.quantize,
        max_model_len=longest,
        kv_cache_dtype=settings.kv_cache_dtype,
        stored=stored,
        batch_tokens=settings.max_num_batched_tokens,
    )
    _selfcheck(config, backend, dtype, settings, stored)
    model = Qwen(config, backend, dtype)
    watch = Watch()
    with watch.collecting():
        fill(model, dtype)
    backend.empty_cache()  # of what loading needed besides
    model.bind()
    options = EngineOptions(
        max_model_len=longest,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        block_size=BLOCK_SIZE,
        kv_cache_dtype=settings.kv_cache_dtype,
        num_blocks=_num_blocks(config, backend, dtype, settings, longest),
    )
    engine = Engine(
        model,
        text.tokenizer,
        options,
        eos_token_ids=_eos(config, text),
        vocab_limit=None if text.tokenizer is None else text.tokenizer.vocab_size,
    )
    _report_fallbacks(backend.bindings, settings.fallback)
    built = Assembled(
        name,
        config,
        text.generation,
        text.tokenizer,
        text.chat_format,
        text.embedder,
        model,
        backend,
        AsyncEngine(engine, watch.check),
        dtype,
        longest,
        settings.quantize,
        time.perf_counter() - started,
    )
    cache = "int8" if settings.kv_cache_dtype == "int8" else str(dtype).removeprefix("torch.")
    rounded, load_s = built.activations, built.load_s
    built.summary = summary.line(
        name, backend, model, rounded=rounded, cache=cache, context=longest, load_s=load_s
    )
    logger.info(built.summary)
    if settings.progress or (settings.progress is None and sys.stderr is not None and sys.stderr.isatty()):
        sys.stderr.write(built.summary + "\n")
    return built


def choose_dtype(
    wanted: str, config: ModelConfig, backend: Backend, stored: str | None, quantize: str | None = None
) -> torch.dtype:
    """The activations' dtype: what the user wants if the device can, else the backend's choice."""
    if wanted != "auto":
        backend.check_dtype(DTYPES[wanted])
        return DTYPES[wanted]
    coded = quantize is not None or (config.quant is not None and config.quant.has_codes)
    return backend.default_dtype(config.dtype or stored, num_parameters(config) * 4, coded)


def _stored_dtype(checkpoint: Checkpoint) -> str | None:
    """The dtype most of a checkpoint's bytes are in."""
    names = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
    sizes: dict[str, int] = {}
    for entry in checkpoint.tensors.values():
        if entry.dtype in names:
            sizes[names[entry.dtype]] = sizes.get(names[entry.dtype], 0) + entry.nbytes
    return max(sizes, key=sizes.__getitem__) if sizes else None


def _tokenizer(directory: Path, config: ModelConfig) -> ChatTokenizer | None:
    """The checkpoint's tokenizer; None for one without (ids in, ids out)."""
    if not any(is_there(directory / name, CheckpointError) for name in TOKENIZER_FILES):
        logger.warning("%s has no tokenizer file: only token ids can go in and out", directory)
        return None
    tokenizer = ChatTokenizer.from_dir(directory)
    if tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(
            f"loading {directory}",
            f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, the model has {config.vocab_size} rows",
            "The vocabulary is of another model, or tokens were added to it and the model was not resized.",
        )
    return tokenizer


def _chat_format(
    directory: Path, config: ModelConfig, generation: GenerationConfig, tokenizer: ChatTokenizer | None
) -> ChatFormat | ConfigError | None:
    """How the checkpoint is talked to. A template that cannot be used does not keep anybody from completing texts."""
    if tokenizer is None:
        return None
    try:
        return load_chat_format(directory, config.model_type, generation.chat_format)
    except ConfigError as error:
        logger.warning("no chat with this model: %s", error)
        return error


def _eos(config: ModelConfig, text: _Text) -> tuple[int, ...]:
    """Every id that ends a text, whichever file names it; a chat model's turns end with <|im_end|> as well."""
    ids = [*text.generation.eos_token_ids, *config.eos_token_ids]
    tokenizer = text.tokenizer
    if tokenizer is not None:
        ids.append(tokenizer.eod_id)
        if tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        if text.generation.chat_format == "chatml":
            ids += [i for i in (tokenizer.im_end_id, tokenizer.im_start_id) if i is not None]
    return tuple(dict.fromkeys(ids))


def _cache_token_bytes(config: ModelConfig, backend: Backend, dtype: torch.dtype, settings: Settings) -> int:
    return backend.kv_bytes_per_token(
        config.num_layers, config.num_kv_heads, config.head_dim, dtype, settings.kv_cache_dtype == "int8"
    )


def _longest_that_fits(
    config: ModelConfig, backend: Backend, dtype: torch.dtype, settings: Settings, longest: int
) -> int:
    """The longest context, up to ``longest``, whose cache is at most half of what is free now."""
    fits = backend.memory()[0] // 2 // _cache_token_bytes(config, backend, dtype, settings)
    return max(min(longest, fits // BLOCK_SIZE * BLOCK_SIZE), min(longest, 256))


def _num_blocks(
    config: ModelConfig, backend: Backend, dtype: torch.dtype, settings: Settings, longest: int
) -> int:
    """Blocks of the cache: every sequence at full length, if a share of the free memory holds that; one at least."""
    per_token = _cache_token_bytes(config, backend, dtype, settings)
    one, all_of_them = longest, longest * settings.max_num_seqs
    affordable = int(backend.memory()[0] * CACHE_SHARE) // per_token
    return -(-max(one, min(all_of_them, affordable)) // BLOCK_SIZE)


def _selfcheck(
    config: ModelConfig, backend: Backend, dtype: torch.dtype, settings: Settings, stored: str | None
) -> None:
    coded = config.quant if config.quant is not None and config.quant.has_codes else None
    bits = coded.bits if coded else quantize_bits(settings.quantize, config)
    head_bits = QUANTIZE_BITS.get(settings.quantize_head or "")

    def form_of(spec: LinearSpec) -> tuple[int, int]:
        own = bits_of(spec, bits, head_bits) or 16
        return own, coded.group_size if coded and spec.quantizable else rounded_group(own)

    kinds = trial.Kinds(
        form_of=form_of,
        stored=DTYPES[stored or "bfloat16"],
        int8_cache=settings.kv_cache_dtype == "int8",
    )
    for op, why in trial.check(config, backend, dtype, kinds).items():
        logger.error("the %s kernel of %s is not used: %s", op, backend.name, why)
        if settings.fallback == "error":
            raise BackendError(
                f"kernel {op} of {backend.name}", why, 'Load with fallback="warn" to go without it.'
            )


def _report_fallbacks(bindings: list[Binding], fallback: str) -> None:
    """Say once for each reason which native kernel does not serve; or refuse."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for binding in bindings:
        if not binding.native and binding.why:
            reasons.setdefault((binding.op, binding.why), []).append(binding.where)
    for (op, why), places in reasons.items():
        line = f"{op} runs as plain torch in {len(places)} places ({places[0]}, ...): {why}"
        if fallback == "error":
            raise BackendError("fallback='error'", line, "`qwenrt doctor` says how to get the kernel.")
        if fallback == "warn":
            logger.warning(line)
