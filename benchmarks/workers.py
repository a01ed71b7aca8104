"""The parent's side of the worker processes: start, ask, close."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.rows import Engine, Work

ROOT = Path(__file__).parents[1]
# What a peer's interpreter must import, and where that comes from.
_NEEDS = {
    "llama.cpp": ("llama_cpp, gguf", "llama-cpp-python gguf", "--llama-python"),
    "onnxruntime-genai": (
        "onnxruntime_genai, onnx, onnx_ir, torch, transformers, safetensors",
        "onnxruntime-genai onnx onnx-ir torch transformers safetensors",
        "--ort-python",
    ),
}


@dataclass(frozen=True)
class Options:
    """What holds for the whole run."""

    threads: int
    cache: Path  # model files of the peers
    llama_python: str = sys.executable
    ort_python: str = sys.executable

    def python(self, name: str) -> str:
        """The interpreter that an engine runs in."""
        return {"llama.cpp": self.llama_python, "onnxruntime-genai": self.ort_python}.get(
            name, sys.executable
        )


def check_peers(names: Iterable[str], options: Options) -> None:
    """Say which peer is missing, and how to install it, before anything is measured."""
    for name in sorted(set(names) & set(_NEEDS)):
        modules, packages, option = _NEEDS[name]
        python = options.python(name)
        done = subprocess.run([python, "-c", f"import {modules}"], capture_output=True, text=True)
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise SystemExit(
                f"{name} cannot run in {python}: {reason}. Install it with: {python} -m pip install {packages} "
                f"(or pass {option}, or leave its rows out: --list shows them)."
            )


class Worker:
    """One engine in its own process. ``about`` is what it said of itself once it was loaded."""

    def __init__(self, engine: Engine, options: Options) -> None:
        asked = engine.described() | {"threads": options.threads, "cache": str(options.cache)}
        command = [options.python(engine.name), "-m", "benchmarks.worker", json.dumps(asked)]
        self.engine, self._log = engine, tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed with the worker)
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=self._log, text=True, cwd=ROOT
        )
        self.about: dict[str, Any] = self._answer()["about"]

    def ask(self, work: Work) -> dict[str, Any]:
        """-> {"seconds", "foreign"}; the second is the share of the cores that others had."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(dataclasses.asdict(work)) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer below says how it ended
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self._log.seek(0)
            raise SystemExit(
                f"the worker of {self.engine} ended with status {status}:\n{self._log.read()[-2000:]}"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it ended by itself
            self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()


class Workers:
    """The workers that are loaded now: no more than the next measurement needs, since models fill the memory."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._loaded: dict[Engine, Worker] = {}

    def of(self, engines: Iterable[Engine]) -> list[Worker]:
        wanted = list(engines)
        for engine in [e for e in self._loaded if e not in wanted]:
            self._loaded.pop(engine).close()
        for engine in wanted:
            if engine not in self._loaded:
                self._loaded[engine] = Worker(engine, self._options)
        return [self._loaded[engine] for engine in wanted]

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.of([])
