"""The sampler against plain definitions of what each parameter does."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenrt.backends.base import Backend
from qwenrt.engine.sampler import Sampler, uniform_at
from qwenrt.engine.sequence import Sequence
from qwenrt.ops import reference
from qwenrt.ops.steps import NOT_FINITE, Draw, DrawTensors, Vocabulary
from qwenrt.sampling_params import SamplingParams

CPU = Backend(torch.device("cpu"))


def sampler(size: int = 10**6, unused: tuple[int, ...] = ()) -> Sampler:
    return Sampler(Vocabulary(size, frozenset(unused)), CPU)


def draw(logits: torch.Tensor, params: list[SamplingParams], uniforms: list[float]) -> torch.Tensor:
    draws = [
        Draw(p.temperature, p.top_k, p.top_p, p.min_p, uniform)
        for p, uniform in zip(params, uniforms, strict=True)
    ]
    return CPU.choose(logits, draws, Vocabulary(logits.shape[1]))


def sequence(
    params: SamplingParams, prompt: list[int] | None = None, output: list[int] | None = None
) -> Sequence:
    seq = Sequence(0, prompt or [0], params)
    seq.token_ids += output or []
    return seq


def kept_by_definition(logits: torch.Tensor, params: SamplingParams) -> set[int]:
    """Which tokens of a row [V] may be drawn, one filter after the other, by sorting everything."""
    probs = (logits.double() / params.temperature).softmax(-1)
    order = probs.argsort(descending=True).tolist()
    if params.top_k:
        order = order[: params.top_k]
    total, kept, mass = sum(float(probs[i]) for i in order), [], 0.0
    for i in order:
        if mass / total >= params.top_p and params.top_p < 1:
            break
        kept.append(i)
        mass += float(probs[i])
    best = float(probs[order[0]])
    return {i for i in kept if float(probs[i]) >= params.min_p * best}


def reachable(logits: torch.Tensor, params: SamplingParams) -> Counter[int]:
    """What a fine comb of uniforms draws."""
    comb = [(i + 0.5) / 4000 for i in range(4000)]
    rows = logits.expand(len(comb), -1)
    return Counter(draw(rows, [params] * len(comb), comb).tolist())


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 1000),
    st.sampled_from([0, 1, 2, 5, 24, 100]),
    st.sampled_from([0.05, 0.3, 0.8, 0.99, 1.0]),
    st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    st.sampled_from([0.3, 1.0, 2.0]),
)
def test_what_is_drawn_is_what_the_definitions_keep(
    seed: int, top_k: int, top_p: float, min_p: float, temperature: float
) -> None:
    logits = torch.randn(24, generator=torch.Generator().manual_seed(seed)) * 2
    params = SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p, temperature=temperature)
    kept = kept_by_definition(logits, params)
    counts = reachable(logits, params)
    assert set(counts) <= kept
    probs = (logits.double() / temperature).softmax(-1)
    mass = sum(float(probs[i]) for i in kept)
    for token in kept:
        share = float(probs[token]) / mass
        assert abs(counts[token] / 4000 - share) < 2e-3


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 1000),
    st.sampled_from([0.0, 2.0, 1.0]),
    st.sampled_from([1, 3, 8]),
    st.sampled_from([0.4, 0.9, 1.0]),
)
def test_how_many_are_sorted_changes_no_token(seed: int, steps: float, top_k: int, top_p: float) -> None:
    """Nor that values are equal where the cut falls: of these the lower ids are kept."""
    row = torch.randn(40, generator=torch.Generator().manual_seed(seed)) * 2
    row = (row * steps).round() / steps if steps else row
    order = row.sort(descending=True, stable=True).indices[:top_k].tolist()
    draws = [Draw(1.0, top_k, top_p, 0.0, (i + 0.5) / 50) for i in range(50)]
    rows, columns = row.expand(50, -1), DrawTensors.of(draws, row.device)
    wanted = reference.choose(rows, columns, top_k)
    assert set(wanted.tolist()) <= set(order)
    for width in (top_k + 1, 20, 40):
        assert torch.equal(reference.choose(rows, columns, width), wanted)


def test_a_row_draws_by_temperature_and_its_neighbour_takes_the_largest() -> None:
    rows = torch.tensor([[0.0, 3.0, 3.0], [0.0, 3.0, 3.0], [0.0, torch.nan, 1.0], [0.0, torch.inf, 1.0]])
    draws = [Draw(), Draw(1.0, uniform=0.99), Draw(), Draw(1.0, uniform=0.5)]
    tokens = CPU.choose(rows, draws, Vocabulary(3))
    assert tokens.tolist() == [1, 2, NOT_FINITE, NOT_FINITE]


def test_rows_are_drawn_each_by_its_own_parameters() -> None:
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(3)).expand(4, -1).contiguous()
    params = [
        SamplingParams(),
        SamplingParams(top_k=3),
        SamplingParams(top_p=0.5, temperature=0.7),
        SamplingParams(min_p=0.2),
    ]
    uniforms = [0.1, 0.9, 0.4, 0.99]
    together = draw(logits, params, uniforms).tolist()
    for i in range(4):
        assert draw(logits[i : i + 1], params[i : i + 1], uniforms[i : i + 1]).tolist() == [together[i]]


def test_extreme_numbers_draw_the_likeliest_and_nothing_impossible() -> None:
    logits = torch.tensor([[3e38, -3e38, 0.0], [0.0, 100.0, -3e38]])
    cold = SamplingParams(temperature=1e-30)
    assert draw(logits, [cold, cold], [0.999, 0.0]).tolist() == [0, 1]
    almost_one = math.nextafter(1.0, 0.0)
    padded = torch.tensor([[0.0, 0.0, -3e38]])
    assert draw(padded, [SamplingParams()], [almost_one]).tolist() == [1]
    assert draw(torch.tensor([[-3e38, 0.0, 0.0]]), [SamplingParams()], [0.0]).tolist() == [1]


def test_padding_ids_are_never_drawn() -> None:
    three = sampler(3)
    logits = torch.tensor([[0.0, 1.0, 0.5, 9.0, 9.0]])
    greedy = sequence(SamplingParams(temperature=0, logprobs=4))
    sampled = three.sample(logits.clone(), [greedy])
    assert sampled.token_ids == [1]
    entry = sampled.logprobs[0]
    assert entry is not None and set(entry.top) == {0, 1, 2}
    assert sum(math.exp(p) for p in entry.top.values()) == pytest.approx(1.0)
    hot = SamplingParams(temperature=100.0, seed=0, logit_bias={4: 100.0})
    assert many(three, logits, hot) == {0, 1, 2}


def many(
    of: Sampler, logits: torch.Tensor, params: SamplingParams, prompt: list[int] | None = None
) -> set[Any]:
    """What a row draws with many numbers."""
    seqs = [Sequence(i, prompt or [0], params, index=i, seed=7) for i in range(50)]
    return set(of.sample(logits.expand(50, -1).clone(), seqs).token_ids)


@pytest.mark.parametrize("rule", [{}, {"top_p": 0.99}, {"top_k": 4}, {"min_p": 0.01}])
def test_ids_without_a_token_are_never_drawn(rule: dict[str, Any]) -> None:
    five = sampler(5, unused=(1, 3))
    logits = torch.tensor([[0.0, 9.0, 0.5, 9.0, 1.0, 9.0]])
    bias = {1: 100.0, 3: 100.0}
    penalties = {"repetition_penalty": 0.1, "presence_penalty": -5.0}
    greedy = sequence(SamplingParams(temperature=0, logprobs=5, logit_bias=bias, **penalties), [1, 3])
    sampled = five.sample(logits.clone(), [greedy])
    assert sampled.token_ids == [4]
    entry = sampled.logprobs[0]
    assert entry is not None and list(entry.top) == [4, 2, 0]
    assert sum(math.exp(p) for p in entry.top.values()) == pytest.approx(1.0)
    hot = SamplingParams(temperature=100.0, seed=0, logit_bias=bias, **rule)
    assert many(five, logits, hot, [1, 3]) == {0, 2, 4}
    draws = [Draw(100.0, hot.top_k, hot.top_p, hot.min_p, (i + 0.5) / 50) for i in range(50)]
    assert set(
        CPU.choose(logits.expand(50, -1).clone(), draws, Vocabulary(5, frozenset({1, 3}))).tolist()
    ) == {0, 2, 4}


def penalised(
    params: SamplingParams, logits: list[float], prompt: list[int], output: list[int]
) -> list[float]:
    """The logits after bias and penalties, through the sampler's own path."""
    row = torch.tensor(logits)
    sampler()._edit(row, sequence(params, prompt, output))
    return row.tolist()


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (SamplingParams(repetition_penalty=2.0), [1.0, -2.0, 3.0, 0.5]),
        (SamplingParams(presence_penalty=0.5), [2.0, -1.5, 3.0, 0.5]),
        (SamplingParams(frequency_penalty=0.5), [2.0, -2.0, 3.0, 0.5]),
        (SamplingParams(repetition_penalty=2.0, presence_penalty=1.0), [1.0, -3.0, 3.0, 0.5]),
        (SamplingParams(logit_bias={0: -1.5, 3: 2.0}), [0.5, -1.0, 3.0, 2.5]),
        (SamplingParams(logit_bias={0: -3.0}, repetition_penalty=2.0), [-2.0, -2.0, 3.0, 0.5]),
    ],
)
def test_bias_and_penalties(params: SamplingParams, expected: list[float]) -> None:
    assert penalised(params, [2.0, -1.0, 3.0, 0.5], [0], [1, 1]) == pytest.approx(expected)


@pytest.mark.parametrize("top_p", [1.0, 0.9])
@pytest.mark.parametrize("penalty", [1e-38, 1e-40, 1e-300])
def test_the_smallest_penalty_still_draws_a_token(penalty: float, top_p: float) -> None:
    logits = torch.tensor([[2.0, 1.0, 3.0, 0.0]])
    seq = sequence(SamplingParams(repetition_penalty=penalty, top_p=top_p, seed=0), [1, 0, 3])
    assert sampler().sample(logits, [seq]).token_ids[0] in (0, 1)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.integers(1, 10))
def test_counts_grown_step_by_step_are_those_counted_at_once(ids: list[int], prompt_len: int) -> None:
    params = SamplingParams(repetition_penalty=1.3, presence_penalty=0.2, frequency_penalty=0.1)
    prompt, output = ids[:prompt_len], ids[prompt_len:]
    logits = torch.linspace(-2, 2, 8)  # ids 8 and 9 are padding
    grown, seq = sampler(), sequence(params, prompt)
    row = logits.clone()
    grown._edit(row, seq)
    for token in output:
        seq.token_ids.append(token)
        row = logits.clone()
        grown._edit(row, seq)
    expected = logits.clone()
    for token in {t for t in ids if t < 8}:
        value, count = float(logits[token]), output.count(token)
        value = value / 1.3 if value > 0 else value * 1.3
        expected[token] = value - 0.2 * (count > 0) - 0.1 * count
    torch.testing.assert_close(row, expected)


def test_rows_that_are_not_finite_are_named_and_the_others_drawn() -> None:
    logits = torch.randn(4, 10)
    logits[0, 3] = torch.nan
    logits[2, 1] = torch.inf
    rows: list[Any] = [sequence(SamplingParams(logprobs=1)) for _ in range(4)]
    sampled = sampler().sample(logits, rows)
    assert [token is None for token in sampled.token_ids] == [True, False, True, False]
    assert [entry is None for entry in sampled.logprobs] == [True, False, True, False]


def test_a_number_belongs_to_a_seed_a_completion_and_a_position() -> None:
    assert uniform_at(5, 0, 9) == uniform_at(5, 0, 9)
    others = [uniform_at(*key) for key in ((5, 1, 9), (6, 0, 9), (5, 0, 10), (-5, 0, 9), (5 + 2**32, 0, 9))]
    assert len({uniform_at(5, 0, 9), *others}) == 6
    assert uniform_at(-1, 0, 0) == uniform_at(2**64 - 1, 0, 0)


def test_numbers_are_even_and_do_not_follow_from_each_other() -> None:
    numbers = torch.tensor([uniform_at(3, index, position) for index in range(20) for position in range(500)])
    assert bool((numbers >= 0).all()) and bool((numbers < 1).all())
    counts = torch.histc(numbers, bins=20, min=0, max=1)
    assert float(((counts - 500) ** 2 / 500).sum()) < 50  # chi-square of 19 degrees: 1 in 10,000
    following = torch.corrcoef(torch.stack([numbers[:-1], numbers[1:]]))[0, 1]
    assert abs(float(following)) < 0.04


@pytest.mark.parametrize(
    ("params", "here"),
    [
        (SamplingParams(temperature=0), True),
        (SamplingParams(top_k=3, top_p=0.9, min_p=0.1), True),
        (SamplingParams(logprobs=0), False),
        (SamplingParams(logit_bias={1: 2.0}), False),
        (SamplingParams(repetition_penalty=1.1), False),
        (SamplingParams(min_tokens=2), False),
    ],
)
def test_what_takes_more_than_logits_is_left_to_the_host(params: SamplingParams, here: bool) -> None:
    seq = Sequence(0, [1, 2], params, banned_until_min=(5,), seed=3)
    draw = sampler().draw_of(seq)
    assert (draw is not None) == here
    if draw is not None and not params.greedy:
        assert draw == Draw(params.temperature, 3, 0.9, 0.1, uniform_at(3, 0, 2))
    seq.token_ids += [7, 8]
    assert (sampler().draw_of(seq) is None) == (not here and not params.min_tokens)
