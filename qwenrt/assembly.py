"""From a model's name and the user's options to a model with its engine: find, check, load, bind, start."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from qwenrt import load_options, summary
from qwenrt.backends import registry
from qwenrt.backends.base import Backend
from qwenrt.backends.binding import Binding
from qwenrt.config import Environment, ModelConfig, read_model_config
from qwenrt.config.environment import packed_cache_in
from qwenrt.config.layers import (
    LinearSpec,
    least_state_bytes,
    num_parameters,
    num_snapshots,
    state_bytes,
    with_mtp,
)
from qwenrt.config.quant import rounded_group
from qwenrt.config.released import names_like, released_config
from qwenrt.embedding import Embedder
from qwenrt.engine.async_engine import AsyncEngine
from qwenrt.engine.engine import Engine
from qwenrt.engine.options import EngineOptions
from qwenrt.errors import BackendError, ConfigError
from qwenrt.load_options import LoadOptions
from qwenrt.loader.adapters import BaseWeights
from qwenrt.loader.checkpoint.as_stored import as_stored
from qwenrt.loader.checkpoint.checkpoint import Checkpoint, open_checkpoint
from qwenrt.loader.checkpoint.inventory import check_size
from qwenrt.loader.checkpoint.mapping import Watch
from qwenrt.loader.hub.resolve import resolve
from qwenrt.loader.memory.preflight import preflight
from qwenrt.loader.progress import is_shown
from qwenrt.loader.random_weights import fill_with_random_weights
from qwenrt.loader.weights import CODES_BECOME, QUANTIZE_BITS, bits_of, load_weights, quantize_bits
from qwenrt.model import trial
from qwenrt.model.qwen import Qwen
from qwenrt.ops.ggml_types import CODED
from qwenrt.prompting import Prompter

logger = logging.getLogger("qwenrt")

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in load_options.DTYPES}
CACHE_SHARE = 0.25  # of the memory left beside the weights; a lone sequence of max_model_len may take more
SNAPSHOT_SHARE = (
    0.1  # of the memory left beside the weights, for states that can be found again; a few may take more
)
# The longest context that is set up unless the user asks for more, or its cache takes so few bytes.
LONGEST_BY_CHOICE = 32768
LITTLE_CACHE = 1 << 29


@dataclass
class Assembled:
    """A model that is ready to serve, and what was decided on the way."""

    name: str
    config: ModelConfig
    prompter: Prompter
    embedder: Embedder
    model: Qwen
    backend: Backend
    engine: AsyncEngine
    dtype: torch.dtype
    max_model_len: int
    load_s: float
    summary: str
    options: LoadOptions
    base: (
        BaseWeights | None
    )  # the checkpoint, for adapters that depend on its weights; None where they are random


def assemble(
    name: str, options: LoadOptions, environment: Environment, backend: Backend | None = None
) -> Assembled:
    """Find the files, check them and the memory, load the weights, bind the operations, start the engine.

    ``backend``: None takes that of ``options.device``.
    """
    started = time.perf_counter()
    backend = _configured(
        backend or registry.create(options.device, environment.backend), options, environment
    )
    directory = resolve(
        name,
        source=options.source,
        revision=options.revision,
        offline=options.offline,
        env=environment,
        progress=options.progress,
    )
    config = replace(read_model_config(directory), with_mtp=options.draft == "mtp")
    checkpoint = open_checkpoint(directory)
    check_size(checkpoint, config)
    config = as_stored(config, checkpoint)
    prompter = Prompter.load(name, directory, config, merge_system_messages=options.merge_system_messages)
    embedder = Embedder.load(directory, config)

    def fill(model: Qwen, dtype: torch.dtype) -> None:
        load_weights(
            model,
            checkpoint,
            config,
            backend,
            dtype,
            quantize=options.quantize,
            quantize_head=options.quantize_head,
            progress=options.progress,
            packed_cache=_packed_cache(options, environment),
        )

    base = BaseWeights(checkpoint, config)
    return _build(prompter, embedder, backend, options, fill, _stored_dtype(checkpoint), started, base)


def assemble_random(shape: str | ModelConfig, options: LoadOptions, environment: Environment) -> Assembled:
    """The same with random weights of a released shape and no tokenizer."""
    started = time.perf_counter()
    config = shape if isinstance(shape, ModelConfig) else _shape_config(shape)
    config = with_mtp(config, options.draft, shape if isinstance(shape, str) else "this shape")
    backend = _configured(registry.create(options.device, environment.backend), options, environment)

    def fill(model: Qwen, dtype: torch.dtype) -> None:
        fill_with_random_weights(
            model, config, backend, dtype, quantize=options.quantize, quantize_head=options.quantize_head
        )

    prompter = Prompter(shape if isinstance(shape, str) else "random weights", config)
    return _build(prompter, Embedder(), backend, options, fill, "bfloat16", started)


def _packed_cache(options: LoadOptions, environment: Environment) -> Path | None:
    if options.packed_cache is None:
        return environment.packed_cache
    return packed_cache_in(options.packed_cache, environment.cache_dir)


def _configured(backend: Backend, options: LoadOptions, environment: Environment) -> Backend:
    activations = environment.activations if options.activations == "auto" else options.activations
    backend.configure(environment.kernels, environment.num_threads, activations)
    return backend


def _shape_config(name: str) -> ModelConfig:
    """The config of a released shape."""
    config = released_config(name)
    if config is None:
        raise ConfigError(f"shape {name[:120]!r}", "unknown", names_like(name))
    return config


def _build(
    prompter: Prompter,
    embedder: Embedder,
    backend: Backend,
    options: LoadOptions,
    fill: Callable[[Qwen, torch.dtype], None],
    stored: str | None,
    started: float,
    base: BaseWeights | None = None,
) -> Assembled:
    """``fill``: gives the parameters their values; ``stored``: the dtype of the file's dense weights."""
    config, tokenizer = prompter.config, prompter.tokenizer
    bits = quantize_bits(options.quantize, config)
    dtype = choose_dtype(str(options.dtype), config, backend, stored, options.quantize)
    longest = options.max_model_len or _longest_that_fits(config, backend, dtype, options)
    preflight(
        config,
        backend,
        dtype,
        quantize=options.quantize,
        max_model_len=longest,
        kv_cache_dtype=options.kv_cache_dtype,
        sequences=options.max_num_seqs,
        stored=stored,
        batch_tokens=options.max_num_batched_tokens,
        draft_tokens=options.draft_tokens,
    )
    _selfcheck(config, backend, dtype, options, bits, stored)
    model = Qwen(config, backend, dtype)
    watch = Watch()
    with watch.collecting():
        fill(model, dtype)
    backend.empty_cache()  # of what loading needed besides
    model.bind()
    engine = Engine(
        model,
        tokenizer,
        _engine_options(config, backend, dtype, options, longest),
        eos_token_ids=prompter.end_token_ids,
        vocab_limit=None if tokenizer is None else tokenizer.vocab_size,
    )
    _report_fallbacks(backend, options.fallback)
    load_s = time.perf_counter() - started
    cache = "int8" if options.kv_cache_dtype == "int8" else str(dtype).removeprefix("torch.")
    line = summary.line(prompter.name, backend, model, cache=cache, context=longest, load_s=load_s)
    logger.info(line)
    if is_shown(options.progress):
        sys.stderr.write(line + "\n")
    served = AsyncEngine(engine, watch.check)
    return Assembled(
        prompter.name,
        config,
        prompter,
        embedder,
        model,
        backend,
        served,
        dtype,
        longest,
        load_s,
        line,
        options,
        base,
    )


def _engine_options(
    config: ModelConfig, backend: Backend, dtype: torch.dtype, options: LoadOptions, longest: int
) -> EngineOptions:
    """How large the engine is, by what was asked for and by the memory that the weights left."""
    return EngineOptions(
        max_model_len=longest,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        block_size=backend.block_size,
        kv_cache_dtype=options.kv_cache_dtype,
        num_blocks=_num_blocks(config, backend, dtype, options, longest),
        step_target_ms=options.step_target_ms,
        prefix_store=None if options.prefix_store is None else Path(options.prefix_store),
        prefix_store_bytes=options.prefix_store_bytes,
        num_snapshots=_num_snapshots(config, backend, dtype, options),
        draft_tokens=options.draft_tokens if options.draft == "mtp" else 0,
        max_adapters=options.max_adapters,
    )


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
    """The dtype most of a checkpoint's bytes are in; of GGUF's codes, what they become where they are made dense."""
    names = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"} | dict.fromkeys(CODED, CODES_BECOME)
    sizes: dict[str, int] = {}
    for entry in checkpoint.tensors.values():
        if entry.dtype in names:
            sizes[names[entry.dtype]] = sizes.get(names[entry.dtype], 0) + entry.nbytes
    return max(sizes, key=sizes.__getitem__) if sizes else None


def _cache_token_bytes(
    config: ModelConfig, backend: Backend, dtype: torch.dtype, options: LoadOptions
) -> int:
    return backend.kv_bytes_per_token(
        config.num_paged_layers, config.num_kv_heads, config.head_dim, dtype, options.kv_cache_dtype == "int8"
    )


def _longest_that_fits(
    config: ModelConfig, backend: Backend, dtype: torch.dtype, options: LoadOptions
) -> int:
    """The longest context, up to the model's own and LONGEST_BY_CHOICE or LITTLE_CACHE, whose cache is at most half of
    what is free now, the states of sequences included."""
    per_token = max(1, _cache_token_bytes(config, backend, dtype, options))
    longest = min(config.max_position_embeddings, max(LONGEST_BY_CHOICE, LITTLE_CACHE // per_token))
    states = least_state_bytes(config, dtype.itemsize, options.max_num_seqs, options.draft_tokens)
    fits = max(0, backend.memory()[0] // 2 - states) // per_token
    return max(min(longest, fits // backend.block_size * backend.block_size), min(longest, 256))


def _num_blocks(
    config: ModelConfig, backend: Backend, dtype: torch.dtype, options: LoadOptions, longest: int
) -> int:
    """Blocks of the cache: every sequence at full length, if a share of the free memory holds that; one at least."""
    per_token = _cache_token_bytes(config, backend, dtype, options)
    one, all_of_them = longest, longest * options.max_num_seqs
    affordable = int(backend.memory()[0] * CACHE_SHARE) // max(1, per_token)
    return -(-max(one, min(all_of_them, affordable)) // backend.block_size)


def _num_snapshots(config: ModelConfig, backend: Backend, dtype: torch.dtype, options: LoadOptions) -> int:
    """States kept beside those of running sequences: as many as a share of the free memory holds, within limits."""
    one = state_bytes(config, dtype.itemsize)
    affordable = int(backend.memory()[0] * SNAPSHOT_SHARE) // one if one else 0
    return num_snapshots(options.max_num_seqs, affordable)


def _selfcheck(
    config: ModelConfig,
    backend: Backend,
    dtype: torch.dtype,
    options: LoadOptions,
    bits: int | None,
    stored: str | None,
) -> None:
    """Compare the backend's kernels with their definitions; ``bits``: what dense linears are rounded to."""
    coded = config.quant if config.quant is not None and config.quant.has_codes else None
    bits = coded.bits if coded else bits
    head_bits = QUANTIZE_BITS.get(options.quantize_head or "")

    def form_of(spec: LinearSpec) -> tuple[int, int]:
        own = bits_of(spec, bits, head_bits) or 16
        return own, coded.group_size if coded and spec.quantizable else rounded_group(own)

    kinds = trial.Kinds(
        form_of=form_of,
        stored=DTYPES[stored or "bfloat16"],
        int8_cache=options.kv_cache_dtype == "int8",
    )
    for op, why in trial.check(config, backend, dtype, kinds).items():
        logger.error("the %s kernel of %s is not used: %s", op, backend.name, why)
        if options.fallback == "error":
            raise BackendError(
                f"kernel {op} of {backend.name}", why, 'Load with fallback="warn" to go without it.'
            )


def _report_fallbacks(backend: Backend, fallback: str) -> None:
    """Say once for each reason which native kernels do not serve; or refuse. That steps go op by op because of what a
    model is made of is no fault: `explain` says so."""
    reasons: dict[str, list[Binding]] = {}
    for binding in backend.bindings:
        chosen = binding.op == "stacks" and binding.op not in backend.demoted
        if not binding.native and binding.why and not chosen:
            reasons.setdefault(binding.why, []).append(binding)
    for why, unserved in reasons.items():
        line = f"{_named(unserved)} in plain torch, which is slower: {why}"
        if fallback == "error":
            raise BackendError("fallback='error'", line, "`qwenrt doctor` says how to get the kernel.")
        if fallback == "warn":
            logger.warning(line)


def _named(bindings: list[Binding]) -> str:
    """ "linear runs (3 places: layers.0.o_proj, ...)"; of several operations their names alone."""
    *ops, last = sorted({binding.op for binding in bindings})
    if ops:
        return f"{', '.join(ops)} and {last} run"
    where = bindings[0].where + (", ..." if len(bindings) > 1 else "")
    return f"{last} runs ({len(bindings)} {'places' if len(bindings) > 1 else 'place'}: {where})"
