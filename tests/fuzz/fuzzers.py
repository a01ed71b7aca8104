"""What is fuzzed, each as a function of a source of random numbers: anything but success and QwenrtError is a fault.

`python -m tests.fuzz SECONDS [NAME ...]` runs them for longer than the tests do.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import qwenrt
from qwenrt.config import Environment, GenerationConfig, parse_model_config, read_json, read_model_config
from qwenrt.config.layers import num_active_parameters, num_parameters
from qwenrt.errors import QwenrtError
from qwenrt.finetune.settings import TrainingSettings
from qwenrt.loader.adapters import open_adapter, read_adapter, write_adapter
from qwenrt.loader.checkpoint.checkpoint import open_checkpoint
from qwenrt.loader.checkpoint.header import read_shard
from qwenrt.loader.hub.resolve import resolve
from qwenrt.loader.memory.footprint import Storage, memory_need
from qwenrt.text.chat.builtin_templates import TEMPLATES
from qwenrt.text.chat.chat_tokenizer import ChatTokenizer
from qwenrt.text.chat.formats import load_chat_format
from tests.conftest import write_tiny_checkpoint
from tests.fuzz.values import any_value, as_bytes, changed
from tests.loader.gguf.gguf_files import write_gguf
from tests.text.bpe_vocab import (
    FIRST,
    MERGES,
    RANKS,
    merges_txt,
    small_json,
    tokenizer_config,
    vocab_json,
    write,
)

_LATER: dict[str, Any] = {
    "model_type": "qwen2", "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96, "max_position_embeddings": 512,
    "rope_theta": 1e4, "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": True, "dtype": "bfloat16",
    "use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1, "eos_token_id": [1, 2],
    "attention_bias": False, "layer_types": ["full_attention", "sliding_attention"],
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
}  # fmt: skip
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
_QWEN1 = {
    "model_type": "qwen", "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "kv_channels": 16, "intermediate_size": 192, "seq_length": 64, "max_position_embeddings": 512,
    "rotary_pct": 1.0, "rotary_emb_base": 10000, "use_dynamic_ntk": True, "use_logn_attn": True, "no_bias": True,
}  # fmt: skip
_FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
_QUANTISED: tuple[dict[str, Any], ...] = (
    {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "desc_act": True,
        "sym": True,
        "dynamic": {"-:a": {}},
    },
    {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
    {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3", "activation_scheme": "dynamic"},
    {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"g": {"weights": _FLOAT8}},
    },
)
CONFIGS: tuple[dict[str, Any], ...] = (
    _QWEN1,
    _LATER,
    {**_LATER, "model_type": "qwen3"},
    {**_LATER, **_EXPERTS, "model_type": "qwen3_moe", "mlp_only_layers": [0]},
    {**_LATER, **_EXPERTS, "model_type": "qwen2_moe", "shared_expert_intermediate_size": 64},
    {"model_type": "qwen3_vl", "text_config": {**_LATER, "model_type": "qwen3_vl_text"}, "vision_config": {}},
    *({**_LATER, "quantization_config": quant} for quant in _QUANTISED),
)
_GENERATION = {
    "chat_format": "chatml", "eos_token_id": [1, 2], "pad_token_id": 1, "max_window_size": 100, "top_k": 20,
    "top_p": 0.8, "temperature": 0.7, "stop_words_ids": [[1]], "max_new_tokens": 16, "do_sample": True,
}  # fmt: skip
_HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "c": {"dtype": "U8", "shape": [0], "data_offsets": [32, 32]},
}
_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@contextlib.contextmanager
def _refusals_are_right() -> Iterator[None]:
    try:
        yield
    except QwenrtError as error:
        assert error.asked and str(error)
        str(error).encode("utf-8", "surrogatepass")


def config(rng: random.Random, scratch: Path) -> None:
    """config.json and generation_config.json, and the figures that are made of them."""
    (scratch / "config.json").write_bytes(as_bytes(rng, changed(rng, rng.choice(CONFIGS))))
    with _refusals_are_right():
        read = parse_model_config(read_json(scratch / "config.json"), rng.choice((None, *_QUANTISED)))
        for kernels in (False, True):
            need = memory_need(read, Storage(4, 2, 2, kernels, True), rng.choice((1, 512, 2**20)))
            assert need.total > 0 and num_active_parameters(read) <= num_parameters(read)
    (scratch / "generation_config.json").write_bytes(as_bytes(rng, changed(rng, _GENERATION)))
    with _refusals_are_right():
        GenerationConfig.from_dir(scratch)


def header(rng: random.Random, scratch: Path) -> None:
    """A safetensors file's header and the index over it."""
    raw = as_bytes(rng, changed(rng, _HEADER))
    length = rng.choice((len(raw), len(raw), len(raw), len(raw) + 1, rng.getrandbits(64)))
    data = bytes(rng.choice((32, 32, 32, 31, 0, 100)))
    (scratch / "model.safetensors").write_bytes(length.to_bytes(9, "little")[:8] + raw + data)
    with _refusals_are_right():
        shard = read_shard(scratch / "model.safetensors")
        assert all(0 <= e.begin <= e.end <= shard.size for e in shard.tensors)
    index = {"metadata": {"total_size": 32}, "weight_map": dict.fromkeys("abc", "model.safetensors")}
    (scratch / "model.safetensors.index.json").write_bytes(as_bytes(rng, changed(rng, index)))
    with _refusals_are_right():
        open_checkpoint(scratch)


def gguf(rng: random.Random, scratch: Path) -> None:
    """A GGUF file: its header, and the config and the tokenizer that are made of it."""
    raw = bytearray(_gguf_file())
    end = len(raw) - 512 * 64 * 2 if rng.random() < 0.9 else len(raw)  # mostly the header
    for _ in range(rng.choice((1, 1, 2, 5))):
        at, size = rng.randrange(end), rng.choice((1, 1, 4, 8))
        raw[at : at + size] = rng.choice((rng.randbytes(size), bytes(size), b"\xff" * size))
    path = scratch / "model.gguf"
    path.write_bytes(raw[: rng.choice((len(raw), len(raw), len(raw), rng.randrange(len(raw))))])
    with _refusals_are_right():
        directory = resolve(path, env=Environment(cache_dir=scratch / "cache"))
        open_checkpoint(directory)
        read_model_config(directory)
        ChatTokenizer.from_dir(directory)


@functools.cache
def _gguf_file() -> bytes:
    place = Path(tempfile.mkdtemp(prefix="qwenrt-fuzz-"))
    tensors = {"model.embed_tokens.weight": torch.ones(512, 64), "lm_head.weight": torch.ones(512, 64)}
    return write_gguf(place / "model.gguf", _LATER, tensors, "Q8_0", tokenizer=True).read_bytes()


def tokenizer(rng: random.Random, scratch: Path) -> None:
    """The files of a tokenizer in each of their forms, and of the template beside them."""
    form = rng.randrange(3)
    files: dict[str, bytes] = {"tokenizer_config.json": as_bytes(rng, _changed_settings(rng))}
    if form == 0:
        files["tokenizer.json"] = as_bytes(rng, changed(rng, small_json()))
    elif form == 1:
        files["vocab.json"] = as_bytes(
            rng, changed(rng, vocab_json(RANKS)) if rng.random() < 0.5 else vocab_json(RANKS)
        )
        files["merges.txt"] = _damaged(rng, merges_txt(MERGES).encode())
        files["added_tokens.json"] = as_bytes(rng, changed(rng, {"<|im_end|>": FIRST + 2}))
    else:
        files["qwen.tiktoken"] = _damaged(rng, _tiny_model().joinpath("qwen.tiktoken").read_bytes())
    if rng.random() < 0.3:
        files["config.json"] = as_bytes(rng, {"model_type": rng.choice(("qwen", "qwen2", "qwen3", 1, None))})
    for name, raw in files.items():
        (scratch / name).write_bytes(raw)
    with _refusals_are_right():
        made = ChatTokenizer.from_dir(scratch)
        ids = made.encode("hello world 你好 <|im_end|>\n\n  é")
        assert made.decode(ids) == made._nfc("hello world 你好 <|im_end|>\n\n  é")
        made.encode("hello <|im_end|>", allow_special=True)
    with _refusals_are_right():
        load_chat_format(scratch, "qwen2")


def _changed_settings(rng: random.Random) -> Any:
    settings = tokenizer_config(FIRST, chat_template=_TEMPLATE)
    return changed(rng, settings) if rng.random() < 0.5 else settings


def _damaged(rng: random.Random, raw: bytes) -> bytes:
    if rng.random() < 0.4:
        return raw
    changed_bytes = bytearray(raw)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(changed_bytes) + 1)
        changed_bytes[at : at + rng.choice((0, 1, 1, 200))] = rng.randbytes(rng.choice((0, 1, 1, 3)))
    return bytes(changed_bytes)


def arguments(rng: random.Random, scratch: Path) -> None:
    """Every argument of the public surface, one at a time."""
    call = rng.choice(_calls())
    value = any_value(rng)
    with _refusals_are_right():
        call(value)


@functools.cache
def _tiny_model() -> Path:
    return write_tiny_checkpoint(Path(tempfile.mkdtemp(prefix="qwenrt-fuzz-")) / "m")


@functools.cache
def _templated() -> ChatTokenizer:
    """The tokenizer of a later generation, with a template of its own."""
    files = {"tokenizer_json": small_json(), "chat_template_jinja": TEMPLATES["qwen3"], "config_json": _LATER}
    return ChatTokenizer.from_dir(write(Path(tempfile.mkdtemp(prefix="qwenrt-fuzz-")), **files))


@functools.cache
def _calls() -> list[Callable[[Any], Any]]:
    llm = qwenrt.load(str(_tiny_model()), progress=False)
    tokenizer, short = llm.tokenizer, {"max_tokens": 1, "temperature": 0}
    assert tokenizer is not None
    hello = [{"role": "user", "content": "a"}]
    call = {"function": {"name": "f", "arguments": "{}"}}
    calls: list[Callable[[Any], Any]] = [
        lambda v: llm.chat(v, **short),
        lambda v: llm.chat(messages=v, **short),
        lambda v: llm.chat(messages=[{"role": "user", "content": v}], **short),
        lambda v: llm.chat(messages=[{"role": v, "content": "a"}], **short),
        lambda v: llm.chat(
            messages=[*hello, {"role": "assistant", "tool_calls": [{**call, "id": v}]}], **short
        ),
        lambda v: llm.chat(messages=[*hello, {"role": "assistant", "tool_calls": v}], **short),
        lambda v: llm.chat("a", tools=[{"function": {"name": "f", "parameters": v}}], **short),
        lambda v: llm.chat("a", tools=[{"function": {"name": "f", "description": v}}], **short),
        lambda v: llm.chat("a", thinking_budget=v, **short),
        lambda v: llm.chat("a", sampling_params=v, **short),
        lambda v: list(llm.stream(v, **short)),
        lambda v: list(llm.stream("a", tools=v, **short)),
        lambda v: list(llm.stream(prompt_token_ids=v, **short)),
        lambda v: llm.generate(v, **short),
        lambda v: llm.generate("a", v, max_tokens=1),
        lambda v: llm.generate(prompt_token_ids=v, **short),
        lambda v: llm.logits(v),
        lambda v: llm.embed(v),
        lambda v: llm.embed("a", instruction=v),
        lambda v: llm.embed("a", normalize=v),
        lambda v: llm.rerank(v, ["a"]),
        lambda v: llm.rerank("a", v),
        lambda v: llm.rerank("a", ["b"], instruction=v),
        lambda v: tokenizer.encode(v),
        lambda v: tokenizer.encode("a", v),
        lambda v: tokenizer.decode(v),
        lambda v: tokenizer.decode([1], v),
        lambda v: tokenizer.decode([1], errors=v),
        lambda v: tokenizer.token_bytes(v),
        lambda v: tokenizer.token_id(v),
        lambda v: tokenizer.encode_chat(v),
        lambda v: tokenizer.encode_chat(hello, v),
        lambda v: tokenizer.encode_chat(hello, tools=v),
        lambda v: tokenizer.encode_chat(hello, max_window_size=v),
        lambda v: qwenrt.Tokenizer.from_dir(v),
        lambda v: qwenrt.load_tokenizer(v),
    ]
    calls += [
        lambda v: _templated().encode_chat(v),
        lambda v: _templated().encode_chat(hello, tools=v),
        lambda v: _templated().encode_chat(hello, tools=[{"function": {"name": "f", "parameters": v}}]),
        lambda v: _templated().encode_chat(
            [*hello, {"role": "assistant", "tool_calls": [{**call, "id": v}]}, hello[0]]
        ),
    ]
    for field in fields(TrainingSettings):
        calls.append(lambda v, name=field.name: TrainingSettings(**{name: v}))  # type: ignore[misc]
    for name in ("history", "system", "tools", "enable_thinking"):
        calls.append(lambda v, name=name: llm.chat("a", **{name: v}, **short))  # type: ignore[misc]
    for field in fields(qwenrt.SamplingParams):
        calls.append(lambda v, name=field.name: _generate_two(llm, {"max_tokens": 1, name: v}))  # type: ignore[misc]
    for name in (field.name for field in fields(qwenrt.LoadOptions)):
        calls.append(lambda v, name=name: _load(name, v))  # type: ignore[misc]
    return calls


def _generate_two(llm: qwenrt.LLM, params: dict[str, Any]) -> None:
    params = qwenrt.SamplingParams(**params)
    if params.max_tokens == 1:
        llm.generate(prompt_token_ids=[1, 2], sampling_params=params)


def _load(name: str, value: Any) -> None:
    """With a value for one setting; one that is as usual loads nothing, since a load takes its time."""
    from qwenrt.load_options import LoadOptions

    settings = LoadOptions(**{name: value})
    if name in ("device", "revision", "packed_cache", "source"):
        model, here = str(_tiny_model().resolve()), Path.cwd()
        with tempfile.TemporaryDirectory() as scratch:  # a text is a directory for packed_cache
            os.chdir(scratch)
            try:
                qwenrt.load(model, progress=False, offline=True, **{name: getattr(settings, name)}).close()
            finally:
                os.chdir(here)


def load(rng: random.Random, scratch: Path) -> None:
    """A whole load of a small checkpoint whose files were changed, and a token of it."""
    model = _tiny_model()
    for file in model.iterdir():
        raw = file.read_bytes()
        if file.suffix == ".json" and rng.random() < 0.6:
            raw = as_bytes(rng, changed(rng, json.loads(raw)))
        elif rng.random() < 0.1:
            raw = _damaged(rng, raw)
        (scratch / file.name).write_bytes(raw)
    with _refusals_are_right(), qwenrt.load(str(scratch), progress=False, max_model_len=64) as llm:
        llm.generate(prompt_token_ids=[1, 2], max_tokens=1)


_MOE_ADAPTER = ("self_attn.q_proj", 64, 64), ("mlp.experts.3.up_proj", 32, 64), ("mlp.gate", 8, 64)
_ADAPTER_CONFIG: dict[str, Any] = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "up_proj"], "bias": "none",
    "modules_to_save": ["lm_head"], "rank_pattern": {"layers.1.mlp": 3}, "alpha_pattern": {"(a|b)*c": 1.5},
    "exclude_modules": "(x+)*y", "layers_to_transform": [0, 1], "trainable_token_indices": {"embed_tokens": [1, 2]},
    "use_rslora": True, "use_dora": False, "fan_in_fan_out": False, "init_lora_weights": True, "lora_dropout": 0.1,
}  # fmt: skip


def adapter(rng: random.Random, scratch: Path) -> None:
    """A LoRA adapter: its config, and names, shapes, dtypes and values of its tensors."""
    shape = {**_LATER, **_EXPERTS, "model_type": "qwen3_moe", "tie_word_embeddings": rng.random() < 0.1}
    model = parse_model_config(shape, None)
    shapes: dict[str, list[int]] = {"lm_head.weight": [512, 64], "model.layers.0.mlp.experts.lora_A.weight": [16, 32],
                                    "model.layers.0.mlp.experts.lora_B.weight": [64, 16],
                                    "model.embed_tokens.token_adapter.trainable_tokens_delta": [2, 64]}  # fmt: skip
    for module, rows, columns in _MOE_ADAPTER:
        shapes[f"model.layers.0.{module}.lora_A.weight"] = [2, columns]
        shapes[f"model.layers.0.{module}.lora_B.weight"] = [rows, 2]
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        sizes = [max(0, size + rng.choice((-1, 1))) if rng.random() < 0.01 else size for size in shape]
        tensor = torch.full(sizes, rng.choice((0.5, 0.5, 0.5, float("nan"))) if rng.random() < 0.05 else 0.5)
        words = name.split(".")
        if rng.random() < 0.03:
            words[rng.randrange(len(words))] = rng.choice(
                ("base_layer", "default", "7", "", "weight", "lora_A")
            )
        if rng.random() < 0.98:
            prefix = rng.choice(("base_model.model.", "base_model.model.", ""))
            tensors[prefix + ".".join(words)] = tensor if rng.random() < 0.99 else tensor.to(torch.int32)
    save_file(tensors, scratch / "adapter_model.safetensors")
    said = changed(rng, _ADAPTER_CONFIG) if rng.random() < 0.5 else _ADAPTER_CONFIG
    (scratch / "adapter_config.json").write_bytes(as_bytes(rng, said))
    with _refusals_are_right():
        made = open_adapter(scratch, model)
        assert all(bool(t.isfinite().all()) for t in made.weights.tensors) and made.info.rank <= 3
        write_adapter(scratch / "again", model, made.weights)
        read_adapter(scratch / "again", model)


FUZZERS: dict[str, Callable[[random.Random, Path], None]] = {
    "config": config, "header": header, "gguf": gguf, "tokenizer": tokenizer, "arguments": arguments, "load": load,
    "adapter": adapter,
}  # fmt: skip


def run(name: str, seed: int) -> None:
    """One case of a fuzzer, in an empty directory."""
    logger = logging.getLogger("qwenrt")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with tempfile.TemporaryDirectory(prefix="qwenrt-fuzz-") as scratch:
            FUZZERS[name](random.Random(seed), Path(scratch))
    finally:
        logger.setLevel(before)
