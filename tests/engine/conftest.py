"""Engines over the recorded tiny checkpoints, and over a backend that can be made to fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qwenrt.backends.base import Backend, native
from qwenrt.config import read_model_config
from qwenrt.engine.engine import Engine
from qwenrt.engine.output_processor import RequestOutput
from qwenrt.loader.weights import load_weights
from qwenrt.model.qwen import Qwen
from qwenrt.outputs import Delta
from qwenrt.text.tokenizer.tokenizer import Tokenizer
from tests.conftest import GOLDEN


class FaultyBackend(Backend):
    """The definitions, until ``fault`` is set: it sees the attention's result and may raise or change it."""

    fault: Callable[[torch.Tensor], torch.Tensor] | None = None

    @native()
    def attention(self, *args: Any) -> torch.Tensor:
        out = super().attention(*args)
        fault = FaultyBackend.fault
        return out if fault is None else fault(out)


def load_model(directory: Path, backend: Backend) -> Qwen:
    config = read_model_config(directory)
    model = Qwen(config, backend, torch.float32)
    load_weights(model, directory, config, backend, torch.float32, progress=False)
    model.bind()
    return model


@cache
def golden_model(name: str) -> Qwen:
    return load_model(GOLDEN / name, FaultyBackend(torch.device("cpu")))


@cache
def golden_record(name: str) -> dict[str, torch.Tensor]:
    tensors = load_file(GOLDEN / name / "golden.safetensors")
    return {key: value for key, value in tensors.items() if not key.startswith("dequant.")}


@cache
def byte_tokenizer() -> Tokenizer:
    """256 bytes and the control tokens, 464 ids: <|endoftext|> is 256."""
    return Tokenizer({bytes([i]): i for i in range(256)})


def make_engine(name: str = "ntk_logn", tokenizer: Tokenizer | None = None, **settings: Any) -> Engine:
    model = golden_model(name)
    return Engine(model, model.backend, tokenizer, **{"max_model_len": 256, **settings})


def run(engine: Engine, between: Callable[[], None] | None = None) -> dict[str, list[RequestOutput]]:
    """Step until nothing is left -> every request's outputs."""
    outputs: dict[str, list[RequestOutput]] = {}
    while engine.has_work:
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
        if between is not None:
            between()
    return outputs


def tokens(outputs: list[RequestOutput], index: int = 0) -> list[int]:
    return [t for o in outputs if o.delta.index == index for t in o.delta.token_ids]


def text(outputs: list[RequestOutput], index: int = 0) -> str:
    return "".join(o.delta.text for o in outputs if o.delta.index == index)


def last(outputs: list[RequestOutput], index: int = 0) -> Delta:
    return [o.delta for o in outputs if o.delta.index == index][-1]


@pytest.fixture(autouse=True)
def _no_fault() -> Iterator[None]:
    yield
    FaultyBackend.fault = None


class ScriptedSampler:
    """Stands in for an engine's sampler: every sequence writes the given tokens, then the last one for ever."""

    def __init__(self, engine: Engine, script: list[int]) -> None:
        self.script = script
        self._sample = engine.sampler.sample
        engine.sampler.sample = self  # type: ignore[assignment]

    def __call__(self, logits: torch.Tensor, seqs: list[Any]) -> Any:
        sampled = self._sample(logits, seqs)
        sampled.token_ids = [self.script[min(s.num_output, len(self.script) - 1)] for s in seqs]
        return sampled
