"""From the start of a process to its first token, for qwenrt and llama.cpp."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.rows import Engine
from benchmarks.shapes import config_of
from benchmarks.timing import Stopwatch
from benchmarks.workers import ROOT, Options

if TYPE_CHECKING:
    import torch

_PROMPT = [1, 2, 3, 4, 5, 6, 7, 8]
_QWENRT = """
import sys, json, qwenrt
settings = json.loads(sys.argv[2])
llm = qwenrt.load(sys.argv[1], **settings)
done = llm.generate(prompt_token_ids={prompt}, temperature=0, max_tokens=1, ignore_eos=True)
assert len(done.token_ids) == 1
"""
_LLAMA = """
import sys, json
from pathlib import Path
from benchmarks.llama_engine import LlamaEngine
settings = json.loads(sys.argv[2])
engine = LlamaEngine(sys.argv[1], settings, int(sys.argv[3]), Path(sys.argv[4]))
engine.prefill({tokens})
"""


class Starter:
    """Measures like a Worker, but every measurement is a process of its own. The first one is not counted: it
    fills the page cache and, where the engine has one, its cache of packed weights."""

    def __init__(self, engine: Engine, options: Options) -> None:
        settings = dict(engine.settings)
        python = options.python(engine)
        self._environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        if engine.name == "qwenrt":
            settings = {k: v for k, v in settings.items() if k in _known_settings()}
            self._environment["QWENRT_NUM_THREADS"] = str(options.threads)
            self._environment["QWENRT_PACKED_CACHE"] = str(options.cache / "packed")
            directory = checkpoint(engine.shape, options.cache)
            code, what = _QWENRT.format(prompt=_PROMPT), str(directory)
        else:
            code, what = _LLAMA.format(tokens=len(_PROMPT)), engine.shape
        more = [what, json.dumps(settings), str(options.threads), str(options.cache)]
        self._command = [python, "-c", code, *more]
        first = self.ask()
        self.about: dict[str, Any] = {"first_start_s": first["seconds"]}

    def ask(self, work: object = None) -> dict[str, Any]:
        before = children_seconds()
        with Stopwatch() as watch:
            done = subprocess.run(
                self._command, env=self._environment, capture_output=True, text=True, cwd=ROOT
            )
        if done.returncode != 0:
            raise SystemExit(f"a fresh process failed:\n{done.stderr[-2000:]}")
        used = (children_seconds() - before) / watch.seconds / (os.cpu_count() or 1)
        return {"seconds": watch.seconds, "foreign": round(max(0.0, watch.foreign - used), 3)}


def children_seconds() -> float:
    """CPU seconds of the processes that this one has waited for."""
    times = os.times()
    return times.children_user + times.children_system


def _known_settings() -> set[str]:
    from qwenrt.assembly import Settings

    return {field.name for field in dataclasses.fields(Settings)}


def checkpoint(shape: str, cache: Path) -> Path:
    """A checkpoint directory of random bfloat16 weights, made in ``cache`` unless it is there."""
    directory = cache / f"{shape}-checkpoint"
    if not (directory / "config.json").exists():
        from safetensors.torch import save_file

        directory.mkdir(parents=True, exist_ok=True)
        save_file(dict(_tensors(shape)), directory / "model.safetensors")
        (directory / "config.json").write_text(json.dumps(config_json(shape)))
    return directory


def config_json(shape: str) -> dict[str, Any]:
    c = config_of(shape)
    return {
        "model_type": "qwen",
        "hidden_size": c.hidden_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "intermediate_size": 2 * c.intermediate_size,
        "vocab_size": c.vocab_size,
        "seq_length": c.train_length,
        "max_position_embeddings": c.max_position_embeddings,
        "bf16": True,
        "tie_word_embeddings": False,
    }


def _tensors(shape: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor under the name that a Qwen-1 checkpoint gives it."""
    import torch

    from qwenrt.loader.names import QWEN1

    c = config_of(shape)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        block = (torch.randn(min(rows, 512), columns) / columns**0.5).bfloat16()
        return block.repeat(-(-rows // 512), 1)[:rows].contiguous()

    def ones() -> torch.Tensor:
        return torch.ones(c.hidden_size, dtype=torch.bfloat16)

    torch.manual_seed(0)
    yield QWEN1.source("embed_tokens"), matrix(c.vocab_size, c.hidden_size)
    for n in range(c.num_layers):
        layer = f"layers.{n}."
        yield QWEN1.source(layer + "input_norm"), ones()
        yield QWEN1.source(layer + "qkv_proj"), matrix(3 * c.hidden_size, c.hidden_size)
        yield (
            QWEN1.source(layer + "qkv_proj", kind="bias"),
            torch.zeros(3 * c.hidden_size, dtype=torch.bfloat16),
        )
        yield QWEN1.source(layer + "o_proj"), matrix(c.hidden_size, c.hidden_size)
        yield QWEN1.source(layer + "post_norm"), ones()
        for part in ("gate", "up"):
            yield (
                QWEN1.source(layer + "gate_up_proj", part),
                matrix(c.intermediate_size, c.hidden_size),
            )
        yield QWEN1.source(layer + "down_proj"), matrix(c.hidden_size, c.intermediate_size)
    yield QWEN1.source("norm"), ones()
    yield QWEN1.source("lm_head"), matrix(c.vocab_size, c.hidden_size)
