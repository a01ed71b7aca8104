"""From the start of a process to its first token, for qwenrt and llama.cpp."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import tempfile
from typing import Any

from benchmarks.checkpoints import qwen1_checkpoint
from benchmarks.rows import Engine
from benchmarks.timing import Stopwatch
from benchmarks.workers import ROOT, Options

_PROMPT = [1, 2, 3, 4, 5, 6, 7, 8]
_QWENRT = """
import sys, json, qwenrt
settings = json.loads(sys.argv[2])
llm = qwenrt.load(sys.argv[1], **settings)
done = llm.generate(prompt_token_ids={prompt}, temperature=0, max_tokens=1, ignore_eos=True)
assert len(done.token_ids) == 1
print(flush=True)
"""
_LLAMA = """
import sys, json
from pathlib import Path
from benchmarks.llama_engine import LlamaEngine
settings = json.loads(sys.argv[2])
engine = LlamaEngine(sys.argv[1], settings, int(sys.argv[3]), Path(sys.argv[4]))
engine.prefill({tokens})
print(flush=True)
"""


class Starter:
    """Measures like a Worker, but every measurement is a process of its own. The first one is not counted: it
    fills the page cache and, where the engine has one, its cache of packed weights."""

    def __init__(self, engine: Engine, options: Options) -> None:
        settings = dict(engine.settings)
        python = options.python(engine.name)
        self._environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        if engine.name == "qwenrt":
            settings = {k: v for k, v in settings.items() if k in _known_settings()}
            self._environment["QWENRT_NUM_THREADS"] = str(options.threads)
            self._environment["QWENRT_PACKED_CACHE"] = str(options.cache / "packed")
            directory = qwen1_checkpoint(engine.shape, options.cache)
            code, what = _QWENRT.format(prompt=_PROMPT), str(directory)
        else:
            code, what = _LLAMA.format(tokens=len(_PROMPT)), engine.shape
        more = [what, json.dumps(settings), str(options.threads), str(options.cache)]
        self._command = [python, "-c", code, *more]
        first = self.ask()
        self.about: dict[str, Any] = {"first_start_s": first["seconds"]}

    def ask(self, work: object = None) -> dict[str, Any]:
        """Until the process says that it has its token; how long it takes to end is not counted."""
        before, whole, until_token = children_seconds(), Stopwatch(), Stopwatch()
        with whole, tempfile.TemporaryFile() as errors:
            with until_token:
                process = subprocess.Popen(
                    self._command, env=self._environment, stdout=subprocess.PIPE, stderr=errors, cwd=ROOT
                )
                assert process.stdout is not None
                said = process.stdout.readline()
            process.communicate()
            if process.returncode != 0 or not said:
                errors.seek(0)
                raise SystemExit(f"a fresh process failed:\n{errors.read().decode(errors='replace')[-2000:]}")
        used = (children_seconds() - before) / whole.seconds / (os.cpu_count() or 1)
        return {"seconds": until_token.seconds, "foreign": round(max(0.0, whole.foreign - used), 3)}


def children_seconds() -> float:
    """CPU seconds of the processes that this one has waited for."""
    times = os.times()
    return times.children_user + times.children_system


def _known_settings() -> set[str]:
    from qwenrt.load_options import LoadOptions

    return {field.name for field in dataclasses.fields(LoadOptions)}
