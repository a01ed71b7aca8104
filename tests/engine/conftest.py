"""Engines over the recorded tiny checkpoints, and over a backend that can be made to fail."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qwenrt.backends.base import Backend
from qwenrt.backends.binding import native
from qwenrt.config import read_model_config
from qwenrt.engine.engine import Engine
from qwenrt.engine.options import EngineOptions
from qwenrt.engine.output_processor import RequestOutput
from qwenrt.engine.sampler import Sampled
from qwenrt.engine.sequence import Sequence
from qwenrt.loader.weights import load_weights
from qwenrt.model.qwen import Qwen
from qwenrt.outputs import Delta
from qwenrt.text.tokenizer.tokenizer import Tokenizer
from tests.capture import GraphBackend
from tests.conftest import GOLDEN

Fault = Callable[[torch.Tensor], torch.Tensor]


class FaultyBackend(Backend):
    """The definitions, until ``fault`` is set: it sees the attention's result and may raise or change it."""

    fault: Fault | None = None

    @native()
    def attention(self, *args: Any) -> torch.Tensor:
        out = super().attention(*args)
        return out if FaultyBackend.fault is None else FaultyBackend.fault(out)


class FaultyGraphBackend(FaultyBackend, GraphBackend):
    """The same with steps that are captured."""

    @native()
    def decode_attention(self, *args: Any) -> torch.Tensor:
        out = super().decode_attention(*args)
        return out if FaultyBackend.fault is None else FaultyBackend.fault(out)


@pytest.fixture(
    autouse=True, scope="package", params=[FaultyBackend, FaultyGraphBackend], ids=["seams", "graphs"]
)
def backend_kind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test of this package twice: each step at once by the seams; and decoding steps captured, with one step
    under way when the next is begun."""
    global _backend_kind
    _backend_kind = request.param
    yield
    _backend_kind = FaultyBackend


_backend_kind: type[FaultyBackend] = FaultyBackend


def load_model(directory: Path, backend: Backend, with_mtp: bool = False) -> Qwen:
    config = dataclasses.replace(read_model_config(directory), with_mtp=with_mtp)
    model = Qwen(config, backend, torch.float32)
    load_weights(model, directory, config, backend, torch.float32, progress=False)
    model.bind()
    return model


def golden_model(name: str, with_mtp: bool = False) -> Qwen:
    return _golden_model(name, _backend_kind, with_mtp)


@cache
def _golden_model(name: str, kind: type[FaultyBackend], with_mtp: bool) -> Qwen:
    return load_model(GOLDEN / name, kind(torch.device("cpu")), with_mtp)


@cache
def golden_record(name: str) -> dict[str, torch.Tensor]:
    tensors = load_file(GOLDEN / name / "golden.safetensors")
    return {key: value for key, value in tensors.items() if not key.startswith("dequant.")}


@cache
def byte_tokenizer() -> Tokenizer:
    """256 bytes and the control tokens, 464 ids: <|endoftext|> is 256."""
    return Tokenizer({bytes([i]): i for i in range(256)})


def make_engine(name: str = "ntk_logn", tokenizer: Tokenizer | None = None, **settings: Any) -> Engine:
    model = golden_model(name, bool(settings.get("draft_tokens")))
    known = {field.name for field in dataclasses.fields(EngineOptions)}
    options = {name: value for name, value in settings.items() if name in known}
    others = {name: value for name, value in settings.items() if name not in known}
    return Engine(model, tokenizer, EngineOptions(**{"max_model_len": 256, **options}), **others)


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


class HostSampler:
    """An engine's sampler that leaves no token to the device: ``sample`` sees all logits."""

    def __init__(self, engine: Engine) -> None:
        self._sampler = engine.sampler
        engine.sampler = self  # type: ignore[assignment]

    def draw_of(self, seq: Sequence) -> None:
        return None

    def sample(self, logits: torch.Tensor, seqs: list[Sequence]) -> Sampled:
        return self._sampler.sample(logits, seqs)


class ScriptedSampler(HostSampler):
    """Every sequence writes the given tokens, then the last one for ever."""

    def __init__(self, engine: Engine, script: list[int]) -> None:
        super().__init__(engine)
        self.script = script

    def sample(self, logits: torch.Tensor, seqs: list[Sequence]) -> Sampled:
        sampled = super().sample(logits, seqs)
        sampled.token_ids = [self.script[min(s.num_output, len(self.script) - 1)] for s in seqs]
        return sampled


class RecordingSampler(HostSampler):
    """Keeps the logits that every token was taken from, per completion."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.rows: dict[tuple[str, int], list[torch.Tensor]] = {}

    def sample(self, logits: torch.Tensor, seqs: list[Sequence]) -> Sampled:
        for row, seq in zip(logits, seqs, strict=True):
            self.rows.setdefault((seq.request_id, seq.index), []).append(row.clone())
        return super().sample(logits, seqs)
