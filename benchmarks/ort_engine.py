"""ONNX Runtime GenAI under measurement: its own model builder's int4, its own generator.

Runs in an interpreter that has onnxruntime-genai with what its builder imports: onnx, onnx-ir, torch, transformers.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnxruntime_genai as genai

from benchmarks.checkpoints import qwen2_checkpoint
from benchmarks.shapes import config_of
from benchmarks.timing import Stopwatch

_ROOM = 2048  # tokens of a generator


class OrtEngine:
    """``settings``: group, the columns that share a scale. Weights are int4, inputs of linears int8."""

    def __init__(self, shape: str, settings: dict[str, Any], threads: int, cache: Path) -> None:
        directory = model_directory(shape, settings["group"], cache)
        _set_threads(directory / "genai_config.json", threads)
        self._model = genai.Model(str(directory))
        self._vocabulary, self._source = config_of(shape).vocab_size, random.Random(0)
        self.about = {"version": genai.__version__}

    def prefill(self, tokens: int) -> Stopwatch:
        generator, ids = self._generator(), self._ids(tokens)
        with Stopwatch() as watch:
            generator.append_tokens(ids)
        return watch

    def decode(self, context: int, new_tokens: int, batch: int) -> Stopwatch:
        """The first token comes with the prompt; every other one is a step, its choice of a token included."""
        assert batch == 1
        generator = self._generator()
        generator.append_tokens(self._ids(context))
        generator.generate_next_token()
        with Stopwatch() as watch:
            for _ in range(new_tokens):
                generator.generate_next_token()
        if generator.token_count() != context + 1 + new_tokens:
            raise SystemExit(
                f"onnxruntime-genai stopped at {generator.token_count()} tokens: set min_length."
            )
        return watch

    def _generator(self) -> genai.Generator:
        params = genai.GeneratorParams(self._model)
        params.set_search_options(max_length=_ROOM, min_length=_ROOM, do_sample=False)
        return genai.Generator(self._model, params)

    def _ids(self, tokens: int) -> list[int]:
        return [self._source.randrange(self._vocabulary) for _ in range(tokens)]


def model_directory(shape: str, group: int, cache: Path) -> Path:
    """The ONNX model of ``shape``, made in ``cache`` unless it is there."""
    directory = cache / f"{shape}-onnx-int4-{group}"
    if directory.exists():
        return directory
    unfinished = cache / f"{directory.name}.{os.getpid()}"
    source = qwen2_checkpoint(shape, unfinished / "source")
    command = [
        sys.executable,
        "-m",
        "onnxruntime_genai.models.builder",
        "-i",
        str(source),
        "-p",
        "int4",
        "-e",
        "cpu",
    ]
    command += ["-o", str(unfinished / "made"), "-c", str(unfinished / "downloads")]
    command += ["--extra_options", "int4_accuracy_level=4", f"int4_block_size={group}"]
    try:
        subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        (unfinished / "made").rename(directory)
    finally:
        shutil.rmtree(unfinished)
    return directory


def _set_threads(path: Path, threads: int) -> None:
    config = json.loads(path.read_text())
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
    path.write_text(json.dumps(config, indent=1))
