"""From a name to a loaded model: `qwenrt.load` and its kin."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

from qwenrt.config import Environment, ModelConfig
from qwenrt.errors import RequestError, memory_errors, shown
from qwenrt.llm import LLM
from qwenrt.load_options import (
    ABOUT,
    Activations,
    AnyDevice,
    AnyDType,
    Draft,
    Fallback,
    KVCacheDType,
    LoadOptions,
    Quantize,
    Source,
)
from qwenrt.loader.memory.device import check_room_for_torch
from qwenrt.other_names import says_right_names

if TYPE_CHECKING:
    from qwenrt.backends.base import Backend
    from qwenrt.text.chat.chat_tokenizer import ChatTokenizer


@says_right_names
def load(
    model: str | PathLike[str] = "demo",
    *,
    device: AnyDevice = "auto",
    dtype: AnyDType = "auto",
    source: Source = "auto",
    revision: str | None = None,
    offline: bool | None = None,
    quantize: Quantize | None = None,
    quantize_head: Quantize | None = None,
    kv_cache_dtype: KVCacheDType = "auto",
    activations: Activations = "auto",
    max_model_len: int | None = None,
    max_num_seqs: int = 16,
    max_num_batched_tokens: int = 512,
    fallback: Fallback = "warn",
    progress: bool | None = None,
    packed_cache: bool | str | PathLike[str] | None = None,
    step_target_ms: int | None = None,
    prefix_store: str | PathLike[str] | None = None,
    prefix_store_bytes: int = 4 * 2**30,
    draft: Draft | None = None,
    draft_tokens: int = 1,
    merge_system_messages: bool = False,
    adapters: Mapping[str, str | PathLike[str]] | None = None,
    max_adapters: int = 16,
) -> LLM:
    """Load a model from wherever it is, for whatever device is there.

    model: a name ("Qwen3-4B", "qwen3:4b"), a repository ("Qwen/Qwen3-4B"), a local directory, a GGUF file (one of
    its parts, if it is split), or "demo" (built in).
    The other arguments are the fields of `LoadOptions`; `help(qwenrt.load)` lists what each of them means.

    Raises CheckpointError, ConfigError, BackendError or CapacityError, each saying what to do.
    """
    options = LoadOptions(
        device=device,
        dtype=dtype,
        source=source,
        revision=revision,
        offline=offline,
        quantize=quantize,
        quantize_head=quantize_head,
        kv_cache_dtype=kv_cache_dtype,
        activations=activations,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        fallback=fallback,
        progress=progress,
        packed_cache=packed_cache,
        step_target_ms=step_target_ms,
        prefix_store=prefix_store,
        prefix_store_bytes=prefix_store_bytes,
        draft=draft,
        draft_tokens=draft_tokens,
        merge_system_messages=merge_system_messages,
        adapters=adapters,
        max_adapters=max_adapters,
    )
    return load_with(model, options)


if load.__doc__ is not None:  # python -OO has none
    load.__doc__ += "\n" + "".join(f"    {name}: {about}.\n" for name, about in ABOUT.items())


def load_with(
    model: str | PathLike[str],
    options: LoadOptions,
    environment: Environment | None = None,
    backend: Backend | None = None,
) -> LLM:
    """As `load`, with its options in one piece. ``environment``: None reads the process's own; ``backend``: None takes
    that of ``options.device``."""
    collecting = gc.isenabled()
    gc.disable()  # loading makes a million objects that all stay: collections would take a fifth of its time
    try:
        with memory_errors(f"loading {shown(model)}"):
            check_room_for_torch()
            from qwenrt.assembly import assemble

            llm = LLM(assemble(_name(model), options, environment or Environment.read(), backend))
    finally:
        if collecting:
            gc.enable()
    return _with_adapters(llm, options)


def load_random(shape: str | ModelConfig, **options: Any) -> LLM:
    """Random weights of a released shape ("Qwen-1_8B", "Qwen-7B", ...), without a tokenizer: for benchmarks.

    ``options``: the fields of LoadOptions; those that concern a download have no effect.
    """
    checked = LoadOptions(**options)
    with memory_errors(f"loading {shown(shape)}"):
        check_room_for_torch()
        from qwenrt.assembly import assemble_random

        return _with_adapters(LLM(assemble_random(shape, checked, Environment.read())), checked)


def load_tokenizer(model: str | PathLike[str]) -> ChatTokenizer:
    """A model's tokenizer alone, by any name `load` takes; needs no torch."""
    from qwenrt.loader.hub.resolve import resolve
    from qwenrt.text.chat.chat_tokenizer import ChatTokenizer

    return ChatTokenizer.from_dir(resolve(_name(model), env=Environment.read(), weights=False))


def _with_adapters(llm: LLM, options: LoadOptions) -> LLM:
    try:
        for name, path in (options.adapters or {}).items():
            llm.load_adapter(path, name)
    except BaseException:
        llm.close()
        raise
    return llm


def _name(model: object) -> str:
    text = fspath(model) if isinstance(model, PathLike) else model
    if not isinstance(text, str) or not text:
        raise RequestError(
            "a model's name", f"got {shown(model)}", "Pass a name, a repository, a directory or a GGUF file."
        )
    return text
