"""GGUF files of random weights for llama.cpp: written in F16, then quantised by llama.cpp's own quantiser.

Runs in llama.cpp's interpreter: needs gguf and numpy, and llama_cpp for anything but F16.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.shapes import config_of

if TYPE_CHECKING:
    import numpy

    from qwenrt.config import ModelConfig

WEIGHTS = ("F16", "Q4_0", "Q8_0")
_KEPT_BYTES = 8 * 2**30  # a larger F16 file is deleted once it is quantised


def model_file(shape: str, weights: str, cache: Path, threads: int) -> Path:
    """The file of ``shape`` with ``weights``, made in ``cache`` unless it is there."""
    path = cache / f"{shape}-{weights}.gguf"
    if path.exists():
        return path
    cache.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    try:
        if weights == "F16":
            write_f16(config_of(shape), unfinished)
        else:
            source = model_file(shape, "F16", cache, threads)
            _quantize(source, unfinished, weights, threads)
            if source.stat().st_size > _KEPT_BYTES:
                source.unlink()
        unfinished.rename(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def tensors(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes [rows, columns] of llama.cpp's network: its "qwen", or its "qwen35"."""
    hidden, inner = config.hidden_size, config.intermediate_size
    yield "token_embd.weight", (config.vocab_size, hidden)
    for n in range(config.num_layers):
        after = "ffn_norm" if config.linear_attention is None else "post_attention_norm"
        yield f"blk.{n}.attn_norm.weight", (hidden,)
        for name, shape in _mixer(config, n):
            yield f"blk.{n}.{name}", shape
        yield f"blk.{n}.{after}.weight", (hidden,)
        yield f"blk.{n}.ffn_gate.weight", (inner, hidden)
        yield f"blk.{n}.ffn_up.weight", (inner, hidden)
        yield f"blk.{n}.ffn_down.weight", (hidden, inner)
    yield "output_norm.weight", (hidden,)
    if not config.tie_word_embeddings:
        yield "output.weight", (config.vocab_size, hidden)


def _mixer(config: ModelConfig, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """What mixes the tokens of a layer."""
    hidden, delta = config.hidden_size, config.linear_attention
    width, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    if delta is None:
        yield "attn_qkv.weight", (3 * hidden, hidden)
        yield "attn_qkv.bias", (3 * hidden,)
    elif not config.is_linear(layer):
        yield "attn_q.weight", (2 * width, hidden)  # with its gate
        yield "attn_k.weight", (kv, hidden)
        yield "attn_v.weight", (kv, hidden)
        yield "attn_q_norm.weight", (config.head_dim,)
        yield "attn_k_norm.weight", (config.head_dim,)
    else:
        heads, values = delta.num_value_heads, delta.num_value_heads * delta.value_dim
        channels = 2 * delta.num_key_heads * delta.key_dim + values
        yield "attn_qkv.weight", (channels, hidden)
        yield "attn_gate.weight", (values, hidden)
        yield "ssm_conv1d.weight", (channels, delta.conv_kernel)
        yield "ssm_dt.bias", (heads,)
        yield "ssm_a", (heads,)
        yield "ssm_beta.weight", (heads, hidden)
        yield "ssm_alpha.weight", (heads, hidden)
        yield "ssm_norm.weight", (delta.value_dim,)
        yield "ssm_out.weight", (hidden, values)
        return
    yield "attn_output.weight", (hidden, width)


def write_f16(config: ModelConfig, path: Path) -> None:
    """Matrices in F16, vectors in F32, no vocabulary but its size."""
    import gguf
    import numpy

    delta = config.linear_attention
    writer = gguf.GGUFWriter(path, "qwen" if delta is None else "qwen35")
    writer.add_name("random weights")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    # Qwen-1 and llama.cpp count both halves
    writer.add_feed_forward_length((2 if delta is None else 1) * config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.rotary_dim)
    if delta is not None:
        writer.add_rope_dimension_sections([11, 11, 10, 0])
        writer.add_ssm_conv_kernel(delta.conv_kernel)
        writer.add_ssm_state_size(delta.key_dim)
        writer.add_ssm_group_count(delta.num_key_heads)
        writer.add_ssm_time_step_rank(delta.num_value_heads)
        writer.add_ssm_inner_size(delta.num_value_heads * delta.value_dim)
        writer.add_array(
            "qwen35.attention.recurrent_layers", [*map(config.is_linear, range(config.num_layers))]
        )
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    for name, shape in tensors(config):
        dtype = _dtype(name, shape)
        nbytes = int(numpy.prod(shape)) * dtype.itemsize
        writer.add_tensor_info(name, shape, dtype, nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    source = numpy.random.default_rng(0)
    for name, shape in tensors(config):
        writer.write_tensor_data(_values(name, shape, source))
    writer.close()


def _dtype(name: str, shape: tuple[int, ...]) -> numpy.dtype:
    import numpy

    return numpy.dtype(numpy.float16 if len(shape) == 2 and "conv1d" not in name else numpy.float32)


def _values(name: str, shape: tuple[int, ...], source: numpy.random.Generator) -> numpy.ndarray:
    """Random rows of size 1/sqrt(columns). 512 of them repeat, which makes no difference to a kernel's speed."""
    import numpy

    if len(shape) == 1:
        value = 0 if name.endswith("bias") else -1 if name.endswith("ssm_a") else 1
        return numpy.full(shape, value, dtype=numpy.float32)
    rows, columns = shape
    block = source.standard_normal((min(rows, 512), columns), dtype=numpy.float32) / columns**0.5
    return numpy.tile(block.astype(_dtype(name, shape)), (-(-rows // 512), 1))[:rows]


def _quantize(source: Path, into: Path, weights: str, threads: int) -> None:
    """What llama.cpp's quantiser makes of it by default: Q4_0 keeps the head in Q6_K."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = threads
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{weights}")
    status = llama_cpp.llama_model_quantize(bytes(source), bytes(into), ctypes.byref(params))
    if status != 0:
        raise SystemExit(f"llama.cpp could not quantise {source} to {weights} (status {status}).")
