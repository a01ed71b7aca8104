"""Capture by torch.cuda: what is asked of it and in which order, that a graph is enough for every kind of model, what
happens where it fails. What only a device shows is in tests/test_devices.py."""

from __future__ import annotations

import dataclasses
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qwenrt import summary
from qwenrt.backends import registry
from qwenrt.backends.base import Backend
from qwenrt.backends.cuda import CudaBackend
from qwenrt.backends.cuda.graphs import CudaGraphs
from qwenrt.backends.graphs import GraphStack, StepTensors
from qwenrt.loader.memory.footprint import Storage, memory_need
from qwenrt.loader.memory.preflight import storage_of
from qwenrt.model import trial
from tests.backends.test_graphs import MODELS, check, small_stack
from tests.fake_cuda import FakeCuda, OnCPU, install
from tests.steps import step_of
from tests.test_architecture import MODULES as FILES

CPU = torch.device("cpu")
ONE, TWO = step_of([3], [1], [1], [[4]]), step_of([3, 4], [1] * 2, [1] * 2, [[4], [5]])


@pytest.mark.parametrize(
    "name", ["plain", "codes", "logn", "window", "int8-cache", "experts, int8", "linear attention"]
)
def test_recorded_operations_are_all_that_a_step_needs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay runs the operations of the capture over their memory, and none of the body's Python."""
    fake = install(monkeypatch, FakeCuda())
    backend = OnCPU(CPU)
    assert check(backend, MODELS[name]) == {} and not backend.demoted
    assert fake.graphs and all(graph.replays for graph in fake.graphs)


def test_what_a_capture_asks_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = install(monkeypatch, FakeCuda())
    ran: list[str] = []
    graphs = CudaGraphs(CPU, (1, 2))
    for _ in range(2):
        graphs.capture(lambda: ran.append(fake.current_stream().name))
    around = ["side1 waits for main", "main waits for side1", "captures on side1, pool (0, 7), thread_local"]
    assert fake.log == ["empties", "memory", *around, "memory"] * 2
    assert ran == ["side1"] * 6, "twice to warm up, then captured, on one stream"
    assert fake.current_stream().name == "main"
    assert graphs.note() == "captured in 2 graphs, which took 1.9 MiB"


@pytest.mark.parametrize(
    ("fails", "why"),
    [
        ("begin", "RuntimeError: the device has no graphs"),
        ("end", "RuntimeError: operation failed due to a previous error during capture"),
        ("body", "ZeroDivisionError: division by zero"),
    ],
)
def test_where_a_capture_fails_the_cause_is_named_and_the_seams_serve(
    fails: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = install(monkeypatch, FakeCuda(fails))
    captured, seams, _ = small_stack(OnCPU(CPU))
    if fails == "body":
        body, runs = captured.body, list[int]()

        def broken(*key: Any) -> None:
            runs.append(1)
            body(*key)
            assert len(runs) <= 2 or 1 / 0

        monkeypatch.setattr(captured, "body", broken)
    outcome = captured.run(ONE)
    assert outcome.served_by is seams and fake.current_stream().name == "main"
    assert captured.note() == f"steps that decode go op by op: a capture failed: {why}"
    assert captured.why_not(ONE) == f"a capture failed: {why}"


def test_explain_says_what_was_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeCuda())
    backend = OnCPU(CPU)
    captured, seams, weights = small_stack(backend)
    backend.note_wholes([captured, seams])
    model = weights.model(backend, torch.float32)
    backend.note_wholes([captured, seams])
    assert "no step that decodes was asked for yet" in summary.table(backend, model)
    for step in (ONE, TWO, ONE):
        captured.run(step)
    wanted = "steps that decode, of up to 1, 2 sequences: captured in 2 graphs, which took 1.9 MiB"
    assert wanted in summary.table(backend, model)
    assert backend.describe() == "plain torch on NVIDIA H200 (sm_90), decoding captured"


def test_a_step_waits_for_the_stream_of_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Any] = []
    event = SimpleNamespace(record=events.append, synchronize=lambda: events.append("waited"))
    module = SimpleNamespace(Event=lambda: event, current_stream=lambda device: f"stream of {device}")
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)
    far = SimpleNamespace(device=torch.device("cuda:1"), to=lambda *_, **__: torch.tensor([5]))
    assert int(Backend(torch.device("cuda:1")).fetch(far)()) == 5  # type: ignore[arg-type]
    assert events == ["stream of cuda:1", "waited"]


def test_what_is_sent_goes_by_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeCuda())
    pinned: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self.clone())
    sent = OnCPU(CPU).send([1, 2])
    assert sent.tolist() == [1, 2] and sent.dtype == torch.int64 and len(pinned) == 1


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_an_emulated_bfloat16_is_not_chosen(
    native: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = install(monkeypatch, FakeCuda(capability=(8, 0) if native else (7, 5)))
    monkeypatch.setattr(torch, "get_device_module", lambda _: fake)
    assert OnCPU(CPU).default_dtype("bfloat16", 0, False) == dtype
    assert OnCPU(CPU).default_dtype("float32", 0, False) == torch.float32
    assert OnCPU(CPU).profile.arch == ("sm_80" if native else "sm_75")


def test_the_registry_gives_it_and_memory_is_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = install(monkeypatch, FakeCuda())
    monkeypatch.setattr(torch, "get_device_module", lambda _: fake)
    for name in ("auto", "cuda", "cuda:0"):
        backend = registry.create(name)
        assert type(backend) is CudaBackend and backend.memory() == (10_000_000, 20_000_000)
    assert backend.depth == 1


def test_what_captured_steps_keep_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeCuda())
    config = MODELS["logn"].config
    plain, captured = (
        memory_need(config, Storage(2, 2, captured=kept), 4096, users=2, sequences=8)
        for kept in (False, True)
    )
    more = captured.total - plain.total
    logits, rotary = 8 * config.vocab_size * 4, 2 * 2 * 4096 * config.rotary_dim * 4  # of two NTK factors
    assert logits + rotary < more < logits + rotary + 2 * 2**20
    assert storage_of(OnCPU(CPU), torch.bfloat16, None).captured
    assert not storage_of(Backend(CPU), torch.bfloat16, None).captured


class Elsewhere(TorchDispatchMode):
    """Refuses the host's memory where an op is asked of a device: a capture has no way to bring it there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, out)):
            assert not isinstance(tensor, torch.Tensor) or tensor.device.type != "cpu", f"{func} on the host"
        return out


@pytest.mark.parametrize("name", ["plain", "codes", "logn", "experts, int8", "linear attention"])
def test_a_body_on_a_device_touches_nothing_of_the_host(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that holds nothing, so that no op can wait for what it holds."""
    install(monkeypatch, FakeCuda())
    model, device = dataclasses.replace(MODELS[name], int8_cache=False), torch.device("meta")
    kinds = trial.Kinds(lambda spec: model.form if spec.quantizable else (16, 128), model.stored, False)
    backend = CudaBackend(device)
    made = trial._Weights(trial._small(model.config), kinds).model(backend, torch.bfloat16)
    parts = trial._parts(made, False)
    stack = backend.stacks(parts)[0]
    assert isinstance(stack, GraphStack)
    stack.tensors, stack._unused = (
        StepTensors(parts, device),
        torch.zeros(2, dtype=torch.int64, device=device),
    )
    stack._rotary = made.rotary_table(parts.max_model_len)
    with torch.no_grad(), Elsewhere():
        for rows, width in ((1, None), (4, 16)):
            stack.body(rows, 4, width)


def test_a_bandwidth_is_never_that_of_a_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Triton half of the memory is copied, which moves as many bytes."""
    install(monkeypatch, FakeCuda())
    backend, ran, waited = OnCPU(CPU), list[str](), list[str]()
    monkeypatch.setattr(backend, "synchronize", lambda: waited.append("yes"))

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            ran.append(func.name())
            return func(*args, **(kwargs or {}))

    memory = torch.ones(64, dtype=torch.int64)
    with Names():
        backend.read(memory)
    assert "aten::copy_" in ran and not any("sum" in name for name in ran) and waited


def test_a_machine_without_a_gpu_imports_nothing_for_one() -> None:
    """But what tells Hygon's packages by their versions, which imports nothing itself."""
    gpus = r"^\s*(?:from|import) (qwenrt\.backends\.cuda|qwenrt\.backends\.dcu(?! import software)|triton)"
    for path in FILES:
        if not {"cuda", "dcu", "gpu"} & set(path.parts):
            found = re.search(gpus, path.read_text(), re.M)
            assert found is None, f"{path}: {found}"
