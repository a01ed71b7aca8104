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
    """Names and shapes [rows, columns] of llama.cpp's "qwen" network."""
    hidden, inner = config.hidden_size, config.intermediate_size
    yield "token_embd.weight", (config.vocab_size, hidden)
    for n in range(config.num_layers):
        yield f"blk.{n}.attn_norm.weight", (hidden,)
        yield f"blk.{n}.attn_qkv.weight", (3 * hidden, hidden)
        yield f"blk.{n}.attn_qkv.bias", (3 * hidden,)
        yield f"blk.{n}.attn_output.weight", (hidden, hidden)
        yield f"blk.{n}.ffn_norm.weight", (hidden,)
        yield f"blk.{n}.ffn_gate.weight", (inner, hidden)
        yield f"blk.{n}.ffn_up.weight", (inner, hidden)
        yield f"blk.{n}.ffn_down.weight", (hidden, inner)
    yield "output_norm.weight", (hidden,)
    yield "output.weight", (config.vocab_size, hidden)


def write_f16(config: ModelConfig, path: Path) -> None:
    """Matrices in F16, vectors in F32, no vocabulary but its size."""
    import gguf
    import numpy

    writer = gguf.GGUFWriter(path, "qwen")
    writer.add_name("random weights")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(2 * config.intermediate_size)  # Qwen-1 and llama.cpp count both halves
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    for name, shape in tensors(config):
        dtype = numpy.dtype(numpy.float16 if len(shape) == 2 else numpy.float32)
        nbytes = int(numpy.prod(shape)) * dtype.itemsize
        writer.add_tensor_info(name, shape, dtype, nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    source = numpy.random.default_rng(0)
    for name, shape in tensors(config):
        writer.write_tensor_data(_values(name, shape, source))
    writer.close()


def _values(name: str, shape: tuple[int, ...], source: numpy.random.Generator) -> numpy.ndarray:
    """Random rows of size 1/sqrt(columns). 512 of them repeat, which makes no difference to a kernel's speed."""
    import numpy

    if len(shape) == 1:
        fill = numpy.zeros if name.endswith("bias") else numpy.ones
        return fill(shape, dtype=numpy.float32)
    rows, columns = shape
    block = source.standard_normal((min(rows, 512), columns), dtype=numpy.float32) / columns**0.5
    return numpy.tile(block.astype(numpy.float16), (-(-rows // 512), 1))[:rows]


def _quantize(source: Path, into: Path, weights: str, threads: int) -> None:
    """What llama.cpp's quantiser makes of it by default: Q4_0 keeps the head in Q6_K."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = threads
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{weights}")
    status = llama_cpp.llama_model_quantize(bytes(source), bytes(into), ctypes.byref(params))
    if status != 0:
        raise SystemExit(f"llama.cpp could not quantise {source} to {weights} (status {status}).")
