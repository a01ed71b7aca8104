"""Each backend has its own instruction set, threads and rounding, whatever others are told; and what a call of the
library answers is never passed over."""

from __future__ import annotations

import ast
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qwenrt.backends.cpu import CPUBackend, attention, dense12, kernels, library, rounding
from qwenrt.backends.cpu.activations import EXACT
from qwenrt.backends.cpu.decoder import Layer, StepStruct
from qwenrt.backends.cpu.delta_net import DeltaNet
from qwenrt.backends.cpu.elementwise import Rotary
from qwenrt.backends.cpu.lora import Lora
from qwenrt.config import Environment
from qwenrt.errors import BackendError
from qwenrt.llm import LLM
from qwenrt.load_options import LoadOptions
from qwenrt.loading import load_with
from tests.backends.test_cpu_kernels import random_weight
from tests.kernel_sets import KERNELS, SETS, needs_kernels

CPU = torch.device("cpu")
pytestmark = needs_kernels
two_sets = pytest.mark.skipif(len(SETS) < 2, reason="this machine has one instruction set")


def backend_with(isa: str, threads: int = 1, activations: str = "exact") -> CPUBackend:
    made = CPUBackend(CPU)
    made.configure(isa, threads, activations)
    return made


@two_sets
def test_a_second_backend_changes_nothing_of_the_first() -> None:
    weight, x = random_weight(300, 512, 4, 128), torch.randn(5, 512)
    first = backend_with(SETS[0], 2)
    w = first.pack_linear(weight, torch.float32)
    before, said = first.linear(x, w), first.describe()
    second = backend_with("scalar", 1, "int8")
    assert not torch.equal(second.linear(x, w), before)  # the settings show
    assert torch.equal(first.linear(x, w), before) and first.describe() == said
    assert second.describe() == "portable kernels, 1 thread"
    second.configure("off")
    assert torch.equal(first.linear(x, w), before)


@two_sets
def test_a_second_model_changes_nothing_of_the_first() -> None:
    ids = list(range(40, 80))

    def load(isa: str, threads: str, activations: str) -> LLM:
        options = LoadOptions(
            device="cpu", dtype="float32", quantize="int4", activations=activations, progress=False
        )
        environment = {"QWENRT_KERNELS": isa, "QWENRT_NUM_THREADS": threads}
        return load_with("demo", options, Environment.read(environment))

    with load(SETS[0], "2", "exact") as first:
        before, said = first.logits(ids), first.stats()
        with load("scalar", "1", "int8") as second:
            other = second.logits(ids)
            assert not torch.equal(other, before)
            assert torch.equal(first.logits(ids), before)
            assert torch.equal(second.logits(ids), other)
        assert torch.equal(first.logits(ids), before)
        assert {k: v for k, v in first.stats().items() if k in ("kernels", "activations", "backend")} == {
            k: v for k, v in said.items() if k in ("kernels", "activations", "backend")
        }


@two_sets
def test_backends_with_different_settings_compute_beside_each_other() -> None:
    weight, x = random_weight(200, 512, 8, 128), torch.randn(9, 512)
    ways = [backend_with(isa, 1 + i % 3, how) for i, isa in enumerate(SETS) for how in ("exact", "int16")]
    w = ways[0].pack_linear(weight, torch.float32)
    wanted = [way.linear(x, w) for way in ways]
    wrong: list[str] = []

    def ask(i: int) -> None:
        for _ in range(10):
            if not torch.equal(ways[i].linear(x, w), wanted[i]):
                wrong.append(ways[i].describe())

    threads = [threading.Thread(target=ask, args=(i % len(ways),)) for i in range(2 * len(ways))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(200)
    assert not wrong


# ---- what calls answer


def _calls(k: kernels.Kernels) -> dict[str, Callable[[], Any]]:
    """Every function of the library that answers with a status -> a call of it."""
    x, weight = torch.randn(2, 64), torch.randn(8, 64).bfloat16()
    canonical = random_weight(8, 64, 4, 32)
    assert canonical.codes is not None
    packed, words = kernels.pack_quantized(k, canonical), torch.empty(8, 8, dtype=torch.int32)
    in12 = dense12.Dense12()
    sequences, cache = attention.Sequences(), attention.Cache()
    layers, caches = (Layer * 1)(), (attention.Cache * 1)()
    return {
        "linear": lambda: k.quant_linear(x, packed, EXACT),
        "pack": lambda: k.pack(canonical.codes, words, 32, 4),
        "repack": lambda: k.repack(words, None, words, canonical),
        "quantize": lambda: k.quantize(rounding.Rounding()),
        "dense12_pack": lambda: k.pack12(weight, in12),
        "dense12_pack_others": lambda: k.pack12_others(weight, in12),
        "dense12_unpack": lambda: k.unpack12(in12, weight, 0),
        "attention": lambda: k.attend(sequences, cache, x.view(2, 4, 16), x, 1.0, 0),
        "rms_norm": lambda: k.rms_norm(x, x[0], 1e-6),
        "silu_and_mul": lambda: k.silu_and_mul(x),
        "gate_output": lambda: k.gate_output(x.view(2, 4, 16), x.view(2, 4, 16)),
        "rotary_store": lambda: k.rotary_store(Rotary(), None, 2),
        "delta_net": lambda: k.delta_net(DeltaNet(), sequences),
        "lora": lambda: k.lora((Lora * 1)(), x, torch.zeros(2, 8)),
        "forward": lambda: k.forward(layers, caches, None, StepStruct(), x, None),
        "argmax_finite": lambda: k.argmax_finite(x),
        "topk": lambda: k.topk(x[0], 1.0, 1.0, 3, False),
    }


@pytest.mark.parametrize(
    "name", sorted({*library._COMPUTE, "argmax_finite"} - {"rounds_dense", "dense12_serves", "read"})
)
def test_no_call_passes_over_what_the_library_answers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert KERNELS is not None
    call = _calls(KERNELS)[name]
    for status, error in ((2, MemoryError), (3, BackendError), (9, BackendError)):
        monkeypatch.setattr(KERNELS._library, f"qwenrt_{name}", lambda *_, answer=status: answer)
        with pytest.raises(
            error, match="no memory for" if status == 2 else rf"\(status {status}\).* report it"
        ):
            call()


def test_arguments_that_cannot_be_are_refused_by_the_library() -> None:
    assert KERNELS is not None
    with pytest.raises(BackendError, match="an argument that cannot be"):
        KERNELS.rotary_store(Rotary(head_dim=7), None, 1)
    with pytest.raises(BackendError, match="an argument that cannot be"):
        KERNELS.delta_net(DeltaNet(key_heads=2, value_heads=3), attention.Sequences())
    with pytest.raises(BackendError, match="an argument that cannot be"):
        KERNELS.quantize(rounding.Rounding(bits=3))
    with pytest.raises(
        kernels.KernelsUnavailable, match=r"'avx9' were asked for; this CPU and build have .*scalar"
    ):
        KERNELS.using("avx9")


def test_nothing_here_relies_on_assert() -> None:
    """`python -O` leaves assertions away: they may tell a type checker what is not None, and no more."""
    for path in Path(kernels.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Assert):
                assert "is not None" in ast.unparse(node.test), f"{path.name}:{node.lineno}"
