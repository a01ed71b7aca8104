"""The network with adapters: what it gives is what the merged weights give, for each token by its own."""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest
import torch

from qwenrt.backends.base import Backend
from qwenrt.config import read_model_config
from qwenrt.loader.weights import load_weights
from qwenrt.model.qwen import Qwen
from qwenrt.ops.steps import StepPlan
from qwenrt.ops.types import AdapterSpan, AdapterWeights, StepAdapters, TokenRows
from tests.adapters import merged, on_parameters, random_adapter
from tests.conftest import GOLDEN

NAMES = ("plain", "qwen3_next", "qwen3_5", "qwen3_5_moe")


@cache
def model_of(name: str) -> Qwen:
    config = read_model_config(GOLDEN / name)
    backend = Backend(torch.device("cpu"))
    model = Qwen(config, backend, torch.float32)
    load_weights(model, GOLDEN / name, config, backend, torch.float32, progress=False)
    model.bind()
    return model


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 100, (count,), generator=torch.Generator().manual_seed(seed))


def logits(model: Qwen, ids: torch.Tensor, lens: list[int], spans: list[AdapterSpan]) -> torch.Tensor:
    adapters = StepAdapters(tuple(spans)) if spans else None
    plan = StepPlan(lens, lens, adapters=adapters)
    return model.logits(model.forward(ids, plan, [1] * len(lens)), adapters)


@pytest.mark.parametrize("full", [False, True], ids=["pairs", "full"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_each_sequence_is_as_its_merged_model(name: str, full: bool) -> None:
    model, ids = model_of(name), tokens(12)
    first, second = random_adapter(model, 1, full=full), random_adapter(model, 2, full=full, skip=("k", "up"))
    spans = [AdapterSpan(first, 0, 5), AdapterSpan(second, 9, 12)]
    got = logits(model, ids, [5, 4, 3], spans)
    wanted = [
        logits(merged(model, first), ids[:5], [5], []),
        logits(model, ids[5:9], [4], []),
        logits(merged(model, second), ids[9:], [3], []),
    ]
    torch.testing.assert_close(got, torch.cat(wanted), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(wanted[0], logits(model, ids[:5], [5], []), atol=0.1)  # it changes something


@torch.no_grad()
def test_a_kept_head_and_embedding_serve_their_own_tokens() -> None:
    model, ids, gen = model_of("plain"), tokens(9), torch.Generator().manual_seed(5)
    shape = model.embed_tokens.shape
    whole = AdapterWeights(
        embed=TokenRows(torch.randn(shape, generator=gen)), head=TokenRows(torch.randn(shape, generator=gen))
    )
    assert whole.embed is not None and whole.head is not None
    every = torch.arange(shape[0])
    by_rows = dataclasses.replace(
        whole, embed=TokenRows(whole.embed.rows, every), head=TokenRows(whole.head.rows, every)
    )
    for spans in ([(0, 9)], [(3, 9)], [(2, 4), (6, 7)]):
        got = logits(model, ids, [9], [AdapterSpan(whole, *span) for span in spans])
        wanted = logits(model, ids, [9], [AdapterSpan(by_rows, *span) for span in spans])
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["plain", "qwen3_5_moe"])
def test_gradients_are_those_of_the_merged_weights(name: str) -> None:
    model, ids = model_of(name), tokens(10)
    adapter = on_parameters(random_adapter(model, 3, full=True))
    wanted = tokens(10, 1)

    def gradients(adapter: AdapterWeights, model: Qwen, spans: list[AdapterSpan]) -> list[torch.Tensor]:
        loss = torch.nn.functional.cross_entropy(logits(model, ids, [6, 4], spans), wanted)
        parameters = [t for pairs in adapter.linears.values() for p in pairs for t in (p.a, p.b)]
        return list(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))

    got = gradients(adapter, model, [AdapterSpan(adapter, 0, 10)])
    for mine, theirs in zip(got, gradients(adapter, merged(model, adapter), []), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_tokens_have_the_same_bits_beside_other_adapters() -> None:
    model, ids = model_of("plain"), tokens(40)
    mine, other = random_adapter(model, 1), random_adapter(model, 2, rank=8)
    alone = logits(model, ids[:20], [20], [AdapterSpan(mine, 0, 20)])
    beside = logits(model, ids, [20, 20], [AdapterSpan(mine, 0, 20), AdapterSpan(other, 20, 40)])
    assert torch.equal(alone, beside[:20])
