"""The stack of layers that runs in one call against the seams: the same kernels, so the same bits."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import qwenrt
from qwenrt.backends.cpu import CPUBackend
from qwenrt.backends.stack import StackParts
from qwenrt.config.model import ModelConfig
from qwenrt.model.qwen import Qwen
from qwenrt.ops.steps import Vocabulary
from qwenrt.ops.types import AdapterWeights, CanonicalWeight, Packed
from tests.adapters import random_adapter
from tests.conftest import write_tiny_checkpoint
from tests.kernel_sets import SETS, needs_kernels
from tests.steps import run_step, step_of

CPU = torch.device("cpu")
pytestmark = needs_kernels
SIZE = 4  # of a block
DENSE = ModelConfig(
    model_type="qwen2",
    vocab_size=100,
    hidden_size=48,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=72,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    rotary_dim=16,
    train_length=64,
    max_position_embeddings=256,
)
WEIGHTS = ("int4", "int8", "bfloat16", "float16", "mixed")


def weight(n: int, k: int, form: str, bias: torch.Tensor | None) -> CanonicalWeight:
    if not form.startswith("int"):
        dense = (torch.randn(n, k) * k**-0.5).to(getattr(torch, form))
        return CanonicalWeight(dense=dense, bias=bias)
    bits, groups = int(form[3:]), -(-k // 32)
    return CanonicalWeight(
        codes=torch.randint(0, 2**bits, (k, n), dtype=torch.uint8),
        scales=(torch.rand(groups, n) * 8 * k**-0.5 / 2**bits).half(),
        zeros=torch.randint(2 ** (bits - 1) - 1, 2 ** (bits - 1) + 2, (groups, n), dtype=torch.int16),
        bits=bits,
        group_size=32,
        bias=bias,
    )


def build(cpu: CPUBackend, config: ModelConfig, form: str = "int4") -> Qwen:
    """A random model; "mixed": another form for each linear, and merged ones whose parts differ."""
    model = Qwen(config, cpu, torch.float32)
    for name, shape in model.tensor_specs.items():
        tensor = torch.randn(shape)
        model.set_tensor(name, 1 + tensor * 0.2 if len(shape) == 1 else tensor)
    for i, (name, spec) in enumerate(model.linear_specs.items()):
        bias = torch.randn(spec.out_features) if spec.bias else None
        chosen = WEIGHTS[i % 4] if form == "mixed" else form
        if form == "mixed" and len(spec.parts) > 1 and i % 3:
            packed = parts(cpu, [rows for _, rows in spec.parts], spec.in_features, bias)
        else:
            packed = cpu.pack_linear(weight(spec.out_features, spec.in_features, chosen, bias), torch.float32)
        model.set_linear(name, packed)
    model.bind()
    return model


def parts(cpu: CPUBackend, rows: list[int], k: int, bias: torch.Tensor | None) -> Packed:
    """A merged weight as the loader makes it of parts of several forms."""
    biases = [None] * len(rows) if bias is None else bias.split(rows)
    weights = [weight(n, k, WEIGHTS[i], b) for i, (n, b) in enumerate(zip(rows, biases, strict=True))]
    return Packed("parts", sum(rows), k, {"parts": [cpu.pack_linear(w, torch.float32) for w in weights]})


class Cache:
    """A model's cache of scattered blocks, NaN where no token is, and the steps of sequences over it."""

    def __init__(self, model: Qwen, lengths: list[int], int8: bool = False) -> None:
        config = model.config
        blocks = [-(-length // SIZE) for length in lengths]
        ids = list(range(sum(blocks) + 1))
        random.Random(3).shuffle(ids)
        self.model = model
        self.tables = [[ids.pop() for _ in range(count)] for count in blocks]
        self.state_slots = list(range(len(lengths), 0, -1)) if config.linear_attention is not None else []
        self.layers = model.backend.alloc_cache(
            config,
            torch.float32,
            num_blocks=sum(blocks) + 1,
            block_size=SIZE,
            num_states=len(lengths) + 1,
            quantized=int8,
        )
        for tensor in (tensor for layer in self.layers for tensor in layer.tensors):
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
        self.tokens = [torch.randint(0, config.vocab_size, (length,)) for length in lengths]
        self.parts = StackParts(model, self.layers, Vocabulary(config.vocab_size), len(lengths), 256)

    def step(
        self, spans: list[tuple[int, int]], rows: list[int] | None = None, seams: bool = False
    ) -> torch.Tensor:
        """The logits of tokens [start, end) of each sequence, or of those ``rows`` of them, by the best stack or by the
        seams; ``served_by`` then says which stack computed them."""
        ids = torch.cat([x[a:b] for x, (a, b) in zip(self.tokens, spans, strict=True)]).tolist()
        lens = [b - a for a, b in spans], [b for _, b in spans]
        slots = self.state_slots
        outcome = run_step(
            self.model, self.layers, ids, *lens, self.tables, rows=rows, seams=seams, state_slots=slots
        )
        self.served_by = outcome.served_by.name
        return outcome.logits


def both_ways(
    model: Qwen, lengths: list[int], steps: list[list[tuple[int, int]]], *, int8: bool = False
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(in one call, by the seams) of each step, each way with a cache of its own."""
    caches = []
    for _ in range(2):
        torch.manual_seed(5)
        caches.append(Cache(model, lengths, int8))
    results = []
    for spans in steps:
        results.append((caches[0].step(spans), caches[1].step(spans, seams=True)))
        assert caches[0].served_by == "one call" and caches[1].served_by == "seams"
    return results


LENGTHS = [9, 21, 1]
STEPS = [
    [(0, 7), (0, 16), (0, 0)],  # prompts, one of them in two pieces
    [(7, 8), (16, 20), (0, 1)],
    [(8, 9), (20, 21), (1, 1)],
]


def check(model: Qwen, *, int8: bool = False, most: float = 0.0) -> None:
    """``most``: what the ways may differ by, as a share of the largest number."""
    for whole, seams in both_ways(model, LENGTHS, STEPS, int8=int8):
        assert bool(whole.isfinite().all())
        assert float((whole - seams).abs().max()) <= most * float(seams.abs().max())


# ---- the same bits


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kv_heads=st.sampled_from([1, 2, 3, 6]),
    head_dim=st.sampled_from([8, 16, 40]),
    form=st.sampled_from(WEIGHTS),
    biases=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    qk_norm=st.booleans(),
    windows=st.sampled_from([(), (0, 5, 3)]),
    logn=st.booleans(),
    activations=st.sampled_from(["exact", "int16", "int8"]),
    int8=st.booleans(),
    isa=st.sampled_from(SETS),
)
def test_every_kind_of_layer(
    cpu: CPUBackend,
    kv_heads: int,
    head_dim: int,
    form: str,
    biases: tuple[bool, bool, bool],
    qk_norm: bool,
    windows: tuple[int, ...],
    logn: bool,
    activations: str,
    int8: bool,
    isa: str,
) -> None:
    qkv, o, mlp = biases
    config = dataclasses.replace(
        DENSE,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rotary_dim=head_dim if qk_norm else head_dim // 2,
        qkv_bias=qkv,
        o_bias=o,
        mlp_bias=mlp,
        qk_norm=qk_norm,
        windows=windows,
        use_logn_attn=logn,
        train_length=8,
    )
    cpu.configure(isa, activations=activations)
    check(build(cpu, config, form), int8=int8)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_and_batches_change_no_bit(cpu: CPUBackend, threads: int) -> None:
    config = dataclasses.replace(DENSE, hidden_size=256, intermediate_size=512)
    cpu.configure(activations="int16")  # exact sums depend on how many tokens a tile has
    model = build(cpu, config)
    wanted = both_ways(model, LENGTHS, STEPS)
    cpu.configure(num_threads=threads, activations="int16")
    for (whole, _), (before, _) in zip(both_ways(model, LENGTHS, STEPS), wanted, strict=True):
        assert torch.equal(whole, before)
    cache = Cache(model, [12])
    whole = cache.step([(0, 12)])
    alone = torch.cat([cache.step([(i, i + 1)]) for i in range(12)])
    assert torch.equal(alone, whole)


# ---- the head


@pytest.mark.parametrize("form", ["int4", "int8", "bfloat16", "float32", "parts"])
@pytest.mark.parametrize("rows", [[11], [0, 3, 11], [9, 2], list(range(12))])
def test_logits_of_some_tokens(cpu: CPUBackend, form: str, rows: list[int]) -> None:
    model = build(cpu, DENSE)
    if form == "parts":
        head = parts(cpu, [60, 40], DENSE.hidden_size, None)
    else:
        head = cpu.pack_linear(weight(100, DENSE.hidden_size, form, None), torch.float32)
    model.set_linear("lm_head", head)
    model.bind()
    whole, seams = Cache(model, [9, 3]), Cache(model, [9, 3])
    seams.tokens = whole.tokens
    logits = whole.step([(0, 9), (0, 3)], rows)
    assert whole.served_by == "one call"
    assert torch.equal(logits, seams.step([(0, 9), (0, 3)], rows, seams=True))
    last = [(8, 9), (2, 3)]
    assert torch.equal(whole.step(last), seams.step(last, seams=True))  # the caches hold the same


def test_logits_of_a_token_that_is_not_finite_stand_beside_those_of_another(cpu: CPUBackend) -> None:
    model = build(cpu, DENSE)
    model.embed_tokens[9, 3] = float("nan")
    cache = Cache(model, [4, 4])
    cache.tokens = [torch.tensor([1, 2, 9, 4]), torch.tensor([5, 6, 7, 8])]
    bad, good = cache.step([(0, 4), (0, 4)], [3, 7])
    assert cache.served_by == "one call" and bool(good.isfinite().all()) and not bool(bad.isfinite().any())


# ---- what the stack does not serve


def test_long_prompts_beside_short_ones_go_through_the_stack(cpu: CPUBackend) -> None:
    model = build(cpu, DENSE)
    cache = Cache(model, [70, 3])
    whole = cache.step([(0, 70), (0, 3)])
    assert cache.served_by == "one call"
    assert torch.equal(cache.step([(0, 70), (0, 3)], seams=True), whole)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("activations", ["exact", "int16", "int8"])
def test_what_is_not_finite_is_computed_as_by_the_seams_and_left_to_its_own_sequence(
    cpu: CPUBackend, bad: float, activations: str
) -> None:
    cpu.configure(activations=activations)
    model = build(cpu, DENSE)
    clean = Cache(model, [4, 4])
    clean.tokens = [torch.tensor([1, 2, 3, 4]), torch.tensor([5, 6, 7, 8])]
    wanted = clean.step([(0, 4), (0, 4)])
    model.embed_tokens[9, 3] = bad
    cache = Cache(model, [4, 4])
    cache.tokens = [torch.tensor([1, 2, 9, 4]), torch.tensor([5, 6, 7, 8])]
    got = cache.step([(0, 4), (0, 4)])
    assert cache.served_by == "one call"
    by_seams = cache.step([(0, 4), (0, 4)], seams=True)
    assert torch.equal(got.nan_to_num(), by_seams.nan_to_num())
    assert bool(got[2].isfinite().all()) == (bad == 3e38)
    # What is not finite may spoil its own sequence, earlier tokens of the step included, but no other.
    for here in [slice(4, 8)] if bad != 3e38 else [slice(0, 2), slice(4, 8)]:
        if activations == "exact":  # sums in the order of another number of tokens
            assert torch.allclose(got[here], wanted[here], rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(got[here], wanted[here])


def test_what_demotes_an_op_demotes_the_one_call(cpu: CPUBackend) -> None:
    model = build(cpu, DENSE)
    assert len(cpu.stacks(Cache(model, [1]).parts)) == 2
    model.backend.demoted["rms_norm"] = "it was wrong"
    assert len(cpu.stacks(Cache(model, [1]).parts)) == 1


@pytest.mark.parametrize("plain", [{"layers.1.o_proj"}, {"layers.0.qkv_proj", "layers.1.down_proj"}, set()])
def test_weights_that_the_kernels_know_nothing_of_are_asked_for_within_the_call(
    cpu: CPUBackend, plain: set[str]
) -> None:
    """Some linears in float32, one of them in parts; without names, all of them."""
    model = build(cpu, DENSE)
    for name, spec in model.linear_specs.items():
        if plain and name not in plain:
            continue
        shape = (spec.out_features, spec.in_features)
        bias = torch.randn(spec.out_features) if spec.bias else None
        packed = cpu.pack_linear(weight(*shape, "float32", bias), torch.float32)
        if name == "layers.0.qkv_proj":
            rows = [shape[0] - 16, 16]
            forms = [
                weight(n, shape[1], form, None if bias is None else torch.randn(n))
                for n, form in zip(rows, ("int4", "float32"))
            ]
            made = [cpu.pack_linear(w, torch.float32) for w in forms]
            packed = Packed("parts", shape[0], shape[1], {"parts": made})
        model.set_linear(name, packed)
    model.bind()
    whole, seams = Cache(model, [9, 3]), Cache(model, [9, 3])
    seams.tokens = whole.tokens
    for lens, rows in (([(0, 9), (0, 3)], [8, 11]), ([(8, 9), (2, 3)], [0, 1])):
        logits = whole.step(lens, rows)
        assert whole.served_by == "one call"
        assert torch.equal(logits, seams.step(lens, rows, seams=True))


Q, KV = DENSE.num_heads * DENSE.head_dim, DENSE.num_kv_heads * DENSE.head_dim


@pytest.mark.parametrize(
    ("rows", "values"),
    [([Q, KV, KV], [0, 0, KV]), ([Q, 2 * KV], [0, KV]), ([Q + KV + 8, KV - 8], [8, KV - 8])],
)
def test_parts_of_qkv_know_which_rows_are_values(cpu: CPUBackend, rows: list[int], values: list[int]) -> None:
    model = Qwen(DENSE, cpu, torch.float32)
    whole = parts(cpu, rows, DENSE.hidden_size, None)
    model.set_linear("layers.0.qkv_proj", whole)
    made = whole.data["parts"]
    assert all(w.role == "qkv_proj" for w in (whole, *made))
    assert whole.value_rows == KV and [part.value_rows for part in made] == values
    other = cpu.pack_linear(weight(DENSE.hidden_size, Q, "int4", None), torch.float32)
    model.set_linear("layers.0.o_proj", other)
    assert other.role == "o_proj" and other.value_rows == 0


# ---- caches, models and threads that come and go


def in_threads(*tasks: Callable[[], None]) -> None:
    errors: list[BaseException] = []

    def run(task: Callable[[], None]) -> None:
        try:
            task()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(200)
    assert not errors and not any(thread.is_alive() for thread in threads)


def test_models_side_by_side_and_in_threads_of_their_own(tmp_path: Path) -> None:
    directories = [write_tiny_checkpoint(tmp_path / str(seed), seed=seed) for seed in range(2)]

    def load(directory: Path) -> qwenrt.LLM:
        return qwenrt.load(directory, device="cpu", dtype="float32", quantize="int4", progress=False)

    prompt, wanted = [3, 4, 5, 6], []
    for directory in directories:
        with load(directory) as llm:
            wanted.append(llm.generate(prompt_token_ids=prompt, max_tokens=20, temperature=0).token_ids)
    assert wanted[0] != wanted[1]
    with load(directories[0]) as a, load(directories[1]) as b:
        for llm in (a, b):
            stacks = llm._alive().engine._alive().runner.stacks
            assert [stack.name for stack in stacks] == ["one call", "seams"]

        def ask(llm: qwenrt.LLM, tokens: list[int]) -> None:
            for _ in range(3):
                got = llm.generate(prompt_token_ids=prompt, max_tokens=20, temperature=0)
                assert got.token_ids == tokens

        ask(a, wanted[0])
        ask(b, wanted[1])
        in_threads(lambda: ask(a, wanted[0]), lambda: ask(b, wanted[1]))
        a.close()
        gc.collect()
        ask(b, wanted[1])  # what the other model's memory becomes does not matter


def test_a_stack_keeps_the_weights_it_points_at(cpu: CPUBackend) -> None:
    model = build(cpu, DENSE, "mixed")
    cache = Cache(model, [6])
    wanted = cache.step([(0, 6)])
    again = Cache(model, [6])
    stack = cpu.stacks(again.parts)[0]
    model.layers.clear()
    norm = model.weights["norm"], model.weights["embed_tokens"]
    model.weights.clear()
    model.weights["norm"], model.weights["embed_tokens"] = norm
    gc.collect()
    filler = [torch.full((48, 48), float("nan")) for _ in range(200)]  # takes what was freed
    step = step_of(cache.tokens[0].tolist(), [6], [6], again.tables)
    assert stack.name == "one call" and torch.equal(stack.run(step).logits, wanted)
    del filler


# ---- how a prompt is cut


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize(("activations", "int8"), [("int16", True), ("int8", False), ("int8", True)])
@pytest.mark.parametrize("form", ["int4", "int8"])
def test_pieces_of_more_than_16_tokens_change_no_bit(
    cpu: CPUBackend, isa: str, activations: str, int8: bool, form: str
) -> None:
    cpu.configure(isa, num_threads=1, activations=activations)
    model = build(cpu, DENSE, form)
    cache, tokens = Cache(model, [90], int8), torch.randint(0, DENSE.vocab_size, (90,))
    cache.tokens = [tokens]
    wanted = cache.step([(0, 90)])
    for cut in ([0, 45, 90], [0, 17, 34, 51, 68, 90], [0, 73, 90]):
        cache = Cache(model, [90], int8)
        cache.tokens = [tokens]
        pieces = [cache.step([(a, b)]) for a, b in itertools.pairwise(cut)]
        assert torch.equal(torch.cat(pieces), wanted), cut


# ---- adapters


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("form", ["mixed", "int4"])
@pytest.mark.parametrize("full", [False, True], ids=["pairs", "full"])
@torch.no_grad()
def test_adapters_are_added_in_the_call(cpu: CPUBackend, form: str, full: bool, isa: str) -> None:
    """By their definition up to the order of sums; who has none keeps his bits."""
    cpu.configure(isa, 2, "exact")
    model = build(cpu, dataclasses.replace(DENSE, qkv_bias=True), form)
    adapters = {seed: random_adapter(model, seed, rank=5 * seed, full=full) for seed in (1, 2)}

    def logits(q: list[int], own: list[int], seams: bool = False) -> torch.Tensor:
        torch.manual_seed(5)
        cache = Cache(model, q)
        parts = dataclasses.replace(cache.parts, adapters=adapters)
        step = dataclasses.replace(
            step_of(torch.cat(cache.tokens).tolist(), q, q, cache.tables), adapters=own
        )
        stack = cpu.stacks(parts)[-1 if seams else 0]
        assert stack.why_not(step) is None and stack.name == ("seams" if seams else "one call")
        return stack.run(step).logits

    q, own = [17, 18, 20, 19], [1, 0, 2, 1]
    whole, seams = logits(q, own), logits(q, own, seams=True)
    assert float((whole - seams).abs().max()) <= 2e-4 * float(seams.abs().max())
    plain = logits(q, [0, 0, 0, 0])
    assert torch.equal(whole[17:35], plain[17:35]) and not torch.allclose(whole[:17], plain[:17], atol=0.01)


@torch.no_grad()
def test_adapters_for_experts_go_by_the_seams(cpu: CPUBackend) -> None:
    cpu.configure("auto", 1)
    model = build(cpu, DENSE)
    some = AdapterWeights({"layers.0.experts.3.down_proj": ()})
    parts = dataclasses.replace(Cache(model, [4]).parts, adapters={1: some, 2: AdapterWeights()})
    step = dataclasses.replace(step_of([1, 2], [2], [2], [[0]]), adapters=[1])
    stack = cpu.stacks(parts)[0]
    assert "experts" in (stack.why_not(step) or "")
    assert stack.why_not(dataclasses.replace(step, adapters=[2])) is None
