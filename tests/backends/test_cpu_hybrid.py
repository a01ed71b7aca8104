"""Layers of linear attention, and attention with gates, in the one call: the bits of the seams, however a prompt is cut
and with whomever it is computed; and the states that this leaves."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import qwenrt
from qwenrt.backends.cpu import CPUBackend
from qwenrt.config.model import LinearAttentionConfig, MoeConfig
from qwenrt.model.qwen import Qwen
from qwenrt.ops.steps import LayerState
from tests.backends.test_cpu_decoder import DENSE, WEIGHTS, Cache, build, check
from tests.backends.test_cpu_experts import ROUNDED_AGAIN
from tests.conftest import GOLDEN, HYBRID_GOLDENS
from tests.kernel_sets import SETS, needs_kernels

pytestmark = needs_kernels
DELTA = LinearAttentionConfig(2, 4, 16, 24, 4, frozenset({0, 2}))
HYBRID = dataclasses.replace(
    DENSE, qk_norm=True, attn_gate=True, rotary_dim=8, zero_centred_norms=True, linear_attention=DELTA
)


def states(cache: Cache) -> list[torch.Tensor]:
    """What the sequences' slots hold, layer by layer."""
    layers = [layer for layer in cache.layers if isinstance(layer, LayerState)]
    return [tensor[cache.state_slots] for layer in layers for tensor in layer.tensors]


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    delta=st.sampled_from([(2, 4, 16, 24, 4), (1, 3, 33, 8, 2), (3, 3, 8, 40, 8)]),
    tiled=st.booleans(),
    gated=st.booleans(),
    head_dim=st.sampled_from([8, 16, 40]),
    linear=st.sampled_from([{0, 2}, {0, 1, 2}, {1}]),
    form=st.sampled_from(WEIGHTS),
    activations=st.sampled_from(["exact", "int16", "int8"]),
    int8=st.booleans(),
    isa=st.sampled_from(SETS),
)
def test_every_kind_of_hybrid_layer(
    cpu: CPUBackend,
    delta: tuple[int, int, int, int, int],
    tiled: bool,
    gated: bool,
    head_dim: int,
    linear: set[int],
    form: str,
    activations: str,
    int8: bool,
    isa: str,
) -> None:
    config = dataclasses.replace(
        HYBRID,
        head_dim=head_dim,
        attn_gate=gated,
        linear_attention=LinearAttentionConfig(*delta, frozenset(linear), converted=tiled),
    )
    cpu.configure(isa, num_threads=1, activations=activations)
    check(build(cpu, config, form), int8=int8)


@pytest.mark.parametrize("activations", ["exact", "int16"])
def test_hybrid_layers_with_experts(cpu: CPUBackend, activations: str) -> None:
    cpu.configure(num_threads=1, activations=activations)
    config = dataclasses.replace(HYBRID, moe=MoeConfig(6, 2, 24, 40, True, frozenset()))
    check(build(cpu, config), most=ROUNDED_AGAIN[activations])


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize(("activations", "int8"), [("int16", False), ("int8", True)])
def test_cuts_company_and_threads_change_no_bit(
    cpu: CPUBackend, isa: str, activations: str, int8: bool
) -> None:
    cpu.configure(isa, num_threads=1, activations=activations)
    model = build(cpu, HYBRID)
    torch.manual_seed(1)
    whole = Cache(model, [60], int8)
    wanted = whole.step([(0, 60)])
    cpu.configure(isa, num_threads=2, activations=activations)
    for cut in ([0, 33, 60], [0, 17, 40, 60]):  # more than 16: attention sums fewer in another order
        cache = Cache(model, [50, 60], int8)
        cache.tokens[1] = whole.tokens[0]
        pieces = [
            cache.step([(min(a, 50), min(b, 50)), (a, b)])[min(b, 50) - min(a, 50) :]
            for a, b in itertools.pairwise(cut)
        ]
        assert cache.served_by == "one call" and torch.equal(torch.cat(pieces), wanted), cut
        for ours, theirs in zip(states(cache), states(whole), strict=True):
            assert torch.equal(ours[1], theirs[0])


# ---- what is not finite


def beside_a_bad_token(model: Qwen, *, seams: bool) -> tuple[torch.Tensor, Cache]:
    """A step of two sequences, of which the first has a token that is not finite in its middle; then their next one."""
    torch.manual_seed(2)
    cache = Cache(model, [5, 5])
    cache.tokens = [torch.tensor([1, 2, 9, 4, 3]), torch.tensor([5, 6, 7, 8, 3])]
    logits = [cache.step([(0, 4), (0, 4)], seams=seams), cache.step([(4, 5), (4, 5)], seams=seams)]
    return torch.cat(logits), cache


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("activations", ["exact", "int8"])
def test_what_is_not_finite_is_computed_once_and_as_by_the_seams(
    cpu: CPUBackend, bad: float, activations: str
) -> None:
    """A step computed again from its beginning would find states that have moved on already."""
    cpu.configure(num_threads=1, activations=activations)
    model = build(cpu, HYBRID)
    model.embed_tokens[9, 3] = bad
    whole, ours = beside_a_bad_token(model, seams=False)
    seams, theirs = beside_a_bad_token(model, seams=True)
    assert ours.served_by == "one call" and theirs.served_by == "seams"
    assert torch.equal(whole.isnan(), seams.isnan())
    assert torch.equal(whole.nan_to_num(), seams.nan_to_num())
    assert bool(whole[4:8].isfinite().all()) and bool(whole[9].isfinite().all())
    for a, b in zip(states(ours), states(theirs), strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


def test_what_computing_it_raises_comes_through(cpu: CPUBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(cpu, HYBRID)
    model.embed_tokens[9, 3] = float("nan")
    cache = Cache(model, [1])
    cache.tokens = [torch.tensor([9])]

    def no_memory(*_: object) -> torch.Tensor:
        raise MemoryError("none is left")

    monkeypatch.setattr(CPUBackend, "_quantized", no_memory)
    with pytest.raises(MemoryError, match="none is left"):
        cache.step([(0, 1)])


# ---- who serves


def test_explain_says_why_the_seams_serve(cpu: CPUBackend) -> None:
    model = build(cpu, dataclasses.replace(HYBRID, linear_attention=dataclasses.replace(DELTA, value_dim=12)))
    cache = Cache(model, [3])
    assert len(cpu.stacks(cache.parts)) == 1
    assert cpu.seams_because == "no kernel for linear attention of 4 taps and heads of (16, 12)"
    model = build(cpu, HYBRID)
    stacks = cpu.stacks(Cache(model, [3]).parts)
    assert [stack.name for stack in stacks] == ["one call", "seams"] and cpu.seams_because == ""
    cpu.demote("gate_output", "self-check: it differs")
    stacks = cpu.stacks(Cache(model, [3]).parts)
    cpu.note_wholes(stacks)
    (note,) = [binding for binding in cpu.bindings if binding.op == "stacks"]
    assert len(stacks) == 1 and not note.native and note.why == "gate_output: self-check: it differs"


@pytest.mark.parametrize("name", HYBRID_GOLDENS)
def test_checkpoints_answer_the_same_both_ways(tmp_path: Path, name: str) -> None:
    """Prompts in pieces, snapshots found and preempted sequences: in one call as by the seams."""
    for file in (GOLDEN / name).iterdir():
        if file.name != "golden.safetensors" and file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    for file in (GOLDEN / name).glob("model*.safetensors"):
        tensors = load_file(file)
        save_file({k: v.bfloat16() for k, v in tensors.items()}, tmp_path / file.name, {"format": "pt"})
    record = load_file(GOLDEN / name / "golden.safetensors")
    prompts = [record[key].tolist() for key in sorted(record) if key.endswith(".ids")][:3]
    answers = []
    for one_call in (True, False):
        with qwenrt.load(
            tmp_path,
            device="cpu",
            dtype="float32",
            quantize="int4",
            activations="exact",
            max_num_batched_tokens=24,
            max_model_len=256,
            progress=False,
        ) as llm:
            stacks = llm._alive().engine._alive().runner.stacks
            assert [stack.name for stack in stacks] == ["one call", "seams"]
            if not one_call:
                del stacks[0]
            made = [
                llm.generate(prompt_token_ids=prompt, max_tokens=20, temperature=0).token_ids
                for prompt in (*prompts, prompts[-1])
            ]
            answers.append(made)
    assert answers[0] == answers[1]
