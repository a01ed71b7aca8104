"""The self-check at load finds every kernel of the list that is wrong, names it alone, and demotes no healthy one."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import qwenrt
from qwenrt.backends.cpu import CPUBackend, backend
from qwenrt.backends.cpu.activations import ACTIVATIONS
from qwenrt.backends.cpu.kernels import Kernels
from qwenrt.backends.cpu.linear import DENSE12, DENSE_BFLOAT16, QUANTIZED
from qwenrt.backends.selfcheck import REGIMES
from qwenrt.config.model import LinearAttentionConfig, ModelConfig, MoeConfig
from qwenrt.config.released import released_config
from qwenrt.errors import BackendError
from qwenrt.model import trial
from tests.backends.delta_mutants import DELTA_MUTANTS
from tests.backends.mutants import MUTANTS, Mutant
from tests.backends.step_mutants import STEP_MUTANTS
from tests.conftest import write_tiny_checkpoint
from tests.kernel_sets import KERNELS, needs_kernels

pytestmark = needs_kernels
SETS = () if KERNELS is None else KERNELS.isas

PLAIN = ModelConfig(
    model_type="qwen2",
    vocab_size=100,
    hidden_size=96,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=136,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    rotary_dim=16,
    train_length=2048,
    max_position_embeddings=4096,
)
DELTA = LinearAttentionConfig(2, 4, 16, 24, 4, frozenset({0, 2}))
EXPERTS = MoeConfig(8, 4, 40, shared_intermediate_size=48, dense_layers=frozenset({0}))


@dataclasses.dataclass(frozen=True)
class Model:
    config: ModelConfig = PLAIN
    form: tuple[int, int] = (16, 128)
    stored: torch.dtype = torch.bfloat16
    int8_cache: bool = False
    large: bool = False  # its matrices are treated as the large ones of real models


MODELS = {
    "plain": Model(),
    "linear attention": Model(
        dataclasses.replace(PLAIN, linear_attention=DELTA, attn_gate=True, zero_centred_norms=True)
    ),
    "half": Model(stored=torch.float16),
    "large": Model(large=True),
    "codes": Model(form=(4, 128)),
    "large codes": Model(form=(4, 32), large=True),
    "bytes": Model(form=(8, 32), large=True),
    "one group": Model(form=(4, -1)),
    "logn": Model(dataclasses.replace(PLAIN, use_logn_attn=True, use_dynamic_ntk=True)),
    "window": Model(dataclasses.replace(PLAIN, windows=(0, 64, 64))),
    "qk-norm": Model(dataclasses.replace(PLAIN, qkv_bias=False, qk_norm=True)),
    "int8-cache": Model(int8_cache=True),
    "experts": Model(dataclasses.replace(PLAIN, moe=EXPERTS)),
    "experts, int8": Model(dataclasses.replace(PLAIN, moe=EXPERTS), form=(8, 32), int8_cache=True),
    "tied": Model(dataclasses.replace(PLAIN, tie_word_embeddings=True)),
    "all biases": Model(dataclasses.replace(PLAIN, o_bias=True, mlp_bias=True), form=(4, 32)),
}


@pytest.fixture
def cpu() -> Iterator[CPUBackend]:
    """One thread: many small calls, on machines that have other work to do."""
    made = CPUBackend(torch.device("cpu"))
    made.configure(num_threads=1)
    yield made
    CPUBackend(torch.device("cpu")).configure()


def check(
    cpu: CPUBackend, model: Model, patch: pytest.MonkeyPatch, dtype: torch.dtype = torch.float32
) -> dict[str, str]:
    if model.large:
        patch.setattr(backend, "_WORTH_PACKING", 1 << 12)
        patch.setattr("qwenrt.backends.cpu.activations._LARGE", 1 << 12)
    form = model.form
    kinds = trial.Kinds(lambda spec: form if spec.quantizable else (16, 128), model.stored, model.int8_cache)
    return trial.check(model.config, cpu, dtype, kinds)


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("name", MODELS)
def test_nothing_healthy_is_demoted(
    cpu: CPUBackend, name: str, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu.configure(isa, num_threads=1)
    assert check(cpu, MODELS[name], monkeypatch) == {}


@pytest.mark.parametrize("activations", ["exact", "int16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["codes", "large", "bytes", "experts, int8"])
def test_nothing_healthy_is_demoted_by_choice(
    cpu: CPUBackend, name: str, dtype: torch.dtype, activations: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu.configure(num_threads=1, activations=activations)
    assert check(cpu, MODELS[name], monkeypatch, dtype) == {}


@pytest.mark.parametrize("mutant", [*MUTANTS, *STEP_MUTANTS, *DELTA_MUTANTS], ids=lambda mutant: mutant.name)
def test_a_wrong_kernel_is_found_and_no_other_is_blamed(
    cpu: CPUBackend, mutant: Mutant, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, met = getattr(Kernels, mutant.method), []

    def wrong(self: Kernels, *args: Any) -> Any:
        met.append(self)
        return mutant.wrong(right.__get__(self), *args)

    monkeypatch.setattr(Kernels, mutant.method, wrong)
    demoted = check(cpu, MODELS[mutant.model], monkeypatch)
    if mutant.op == "quantize_dense":  # looked at by the first weight that is rounded
        cpu.quantize_dense(torch.randn(24, 256), 4, 128, None, "a weight")
    else:
        assert cpu.demoted == demoted and demoted[mutant.op].startswith("self-check: ")
        # By its results: a mutant that cannot be called would be found by anything.
        assert not re.search("(TypeError|AttributeError|NameError|ArgumentError)", demoted[mutant.op])
    assert met, "the self-check does not call this kernel"
    assert list(cpu.demoted) == [mutant.op]


@pytest.mark.parametrize(
    ("bits", "method"), [(16, "dense12_linear"), (16, "dense16_linear"), (4, "quant_linear")]
)
def test_what_serves_a_real_model_is_what_was_looked_at(
    cpu: CPUBackend, bits: int, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels are chosen by sizes: at those of Qwen-1.8B the check must reach the kernels of large matrices, with every
    number of tokens and in the one call."""
    assert cpu.kernels is not None
    if method == "dense12_linear" and not cpu.kernels.serves12:
        pytest.skip(f"{cpu.kernels.isa} has no kernel for 12 bits")
    config = released_config("Qwen-1_8B")
    assert config is not None
    tokens, layers, steps = set(), [], []
    linear, forward = getattr(Kernels, method), Kernels.forward

    def rounds(x: torch.Tensor, w: Any, *rest: Any) -> bool:
        if bits < 16:
            return bool(rest[0].kind == ACTIVATIONS.index("int16"))
        return bool(rest[-1]) or not cpu.kernels.rounds_dense(torch.bfloat16)

    def seen(self: Kernels, x: torch.Tensor, *args: Any) -> Any:
        if rounds(x, *args):
            tokens.add(len(x))
        return linear(self, x, *args)

    def step(self: Kernels, given: Any, caches: Any, head: Any, struct: Any, *rest: Any) -> bool:
        layers[:] = list(given)
        steps.append(struct.tokens)
        return bool(forward(self, given, caches, head, struct, *rest))

    monkeypatch.setattr(Kernels, method, seen)
    monkeypatch.setattr(Kernels, "forward", step)
    kinds = trial.Kinds(lambda spec: (bits if spec.quantizable else 16, 128), torch.bfloat16, False)
    assert trial.check(config, cpu, torch.float32, kinds) == {}
    assert tokens >= set(REGIMES)
    assert max(steps) >= 33 and min(steps) == 1 and len(layers) == 2
    kind = {"dense12_linear": DENSE12, "dense16_linear": DENSE_BFLOAT16, "quant_linear": QUANTIZED}[method]
    assert any(linear.kind == kind for layer in layers for linear in (layer.qkv, layer.gate_up))
    if bits < 16:
        assert layers[0].gate_up.activations.kind == ACTIVATIONS.index("int16")


@pytest.mark.parametrize(
    ("method", "op"), [("forward", "stacks"), ("attend", "attention"), ("topk", "choose")]
)
def test_a_model_is_served_without_what_is_wrong_and_says_so(
    tmp_path: Path, method: str, op: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    directory = write_tiny_checkpoint(tmp_path / "model")

    def answer(**settings: str) -> tuple[list[int], str]:
        with qwenrt.load(directory, quantize="int4", progress=False, **settings) as llm:
            said = llm.generate(prompt_token_ids=[5, 6, 7], max_tokens=12, temperature=0.8, seed=3)
            return said.token_ids, llm.explain()

    wanted, healthy = answer()
    assert f"{op} " in healthy and "self-check" not in healthy
    mutant = next(m for m in (*MUTANTS, *STEP_MUTANTS) if m.method == method)
    right = getattr(Kernels, method)
    monkeypatch.setattr(Kernels, method, lambda self, *args: mutant.wrong(right.__get__(self), *args))
    got, explained = answer()
    assert got == wanted
    (line,) = {line for line in explained.splitlines() if line.startswith(f"{op} ")}
    assert "plain torch" in line and "self-check: " in line
    assert f"the {op} kernel of cpu is not used: self-check: " in caplog.text
    with pytest.raises(BackendError, match=f"kernel {op} of cpu: self-check: "):
        answer(fallback="error")
