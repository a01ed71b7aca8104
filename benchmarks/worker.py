"""A process that holds one engine and measures when it is asked: JSON lines in, JSON lines out.

``python -m benchmarks.worker '{"name": ..., "shape": ..., "settings": {...}, "threads": 2, "cache": DIR}'``. The
first line it writes says what was loaded. Then each line it reads is a work ({"kind", "tokens", "new_tokens",
"batch"}), and each answer has the seconds it took. Between two works it sleeps in read().
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, Protocol

from benchmarks.rows import Work
from benchmarks.timing import Stopwatch


class Measured(Protocol):
    """What an engine does for its worker; both methods may prepare unmeasured, and must start from scratch."""

    about: dict[str, Any]

    def prefill(self, tokens: int) -> Stopwatch:
        """A new random prompt of ``tokens`` to the logits of its last token."""

    def decode(self, context: int, new_tokens: int, batch: int) -> Stopwatch:
        """``new_tokens`` single steps of ``batch`` sequences that hold ``context`` tokens each."""


def load(asked: dict[str, Any]) -> Measured:
    arguments = asked["shape"], asked["settings"], asked["threads"]
    if asked["name"] == "qwenrt":
        from benchmarks.qwenrt_engine import QwenrtEngine

        return QwenrtEngine(*arguments)
    if asked["name"] == "llama.cpp":
        from benchmarks.llama_engine import LlamaEngine

        return LlamaEngine(*arguments, cache=Path(asked["cache"]))
    from benchmarks.torch_engine import TorchEngine

    return TorchEngine(*arguments)


def measure(engine: Measured, work: Work) -> Stopwatch:
    if work.kind == "prefill":
        return engine.prefill(work.tokens)
    return engine.decode(work.tokens, work.new_tokens, work.batch)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    engine = load(json.loads(sys.argv[1]))
    measure(engine, Work("prefill", 8))
    measure(engine, Work("decode", 17, 2))
    answer({"about": engine.about})
    for line in sys.stdin:
        watch = measure(engine, Work(**json.loads(line)))
        answer({"seconds": watch.seconds, "foreign": round(watch.foreign, 3)})


if __name__ == "__main__":
    main()
