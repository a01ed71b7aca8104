"""The parent's side of the worker processes: start, ask, close."""

from __future__ import annotations

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
_INSTALL = "Install it with: {python} -m pip install llama-cpp-python gguf (or pass --llama-python)."


@dataclass(frozen=True)
class Options:
    """What holds for the whole run."""

    threads: int
    cache: Path  # model files of the peers
    llama_python: str

    def python(self, engine: Engine) -> str:
        return self.llama_python if engine.name == "llama.cpp" else sys.executable


def check_llama(options: Options) -> None:
    """Says before anything is measured that llama.cpp is missing, and how to get it."""
    command = [options.llama_python, "-c", "import llama_cpp, gguf"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise SystemExit(
            f"llama.cpp cannot run in {options.llama_python}: {reason}. "
            + _INSTALL.format(python=options.llama_python)
        )


class Worker:
    """One engine in its own process. ``about`` is what it said of itself once it was loaded."""

    def __init__(self, engine: Engine, options: Options) -> None:
        asked = engine.described() | {"threads": options.threads, "cache": str(options.cache)}
        command = [options.python(engine), "-m", "benchmarks.worker", json.dumps(asked)]
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
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()


class Workers:
    """The workers that are loaded now. No more than the next measurement needs: memory is for the models."""

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
