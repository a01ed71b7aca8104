"""Guesses by a model's own head, over states that cannot be taken back: the tokens are those that come without.

The recorded checkpoint is random, so its head is hardly ever right: here its guesses are replaced by ones that are
right as often as a test wants.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from functools import cache
from typing import Any

import pytest
import torch

from benchmarks.forced_drafts import Knowing
from qwenrt.engine.engine import Engine
from qwenrt.engine.output_processor import RequestOutput
from qwenrt.engine.sequence import Sequence
from qwenrt.errors import BackendError, ConfigError
from qwenrt.ops.steps import LayerState
from qwenrt.sampling_params import SamplingParams
from qwenrt.structure import Grammar
from tests.engine import conftest
from tests.engine.conftest import (
    FaultyBackend,
    byte_tokenizer,
    golden_record,
    last,
    make_engine,
    run,
    text,
    tokens,
)
from tests.engine.test_linear_attention import assert_nothing_is_lost

NAME = "qwen3_5_vl"
LONG = 20  # tokens of an answer
RULES: dict[str, SamplingParams] = {
    "greedy": SamplingParams(temperature=0, max_tokens=LONG),
    "sampled": SamplingParams(temperature=0.9, top_k=20, top_p=0.9, seed=7, max_tokens=LONG),
    "several": SamplingParams(temperature=1.1, seed=8, n=2, max_tokens=LONG),
    "stopped": SamplingParams(temperature=0, stop_token_ids=[40, 41, 42, 43], max_tokens=LONG),
    "penalties": SamplingParams(temperature=0, presence_penalty=1.5, max_tokens=LONG),
    "all": SamplingParams(
        temperature=0.9,
        top_k=20,
        seed=9,
        repetition_penalty=1.3,
        frequency_penalty=0.4,
        min_tokens=6,
        logit_bias={3: 2.0, 5: -9.0},
        stop_token_ids=[*range(30, 60)],
        logprobs=2,
        max_tokens=LONG,
    ),
    "logprobs": SamplingParams(temperature=0, logprobs=1, max_tokens=LONG),
}


def prompt_of(key: str) -> list[int]:
    return golden_record(NAME)[f"{key}.ids"].tolist()


def answers(outputs: list[RequestOutput]) -> list[tuple[list[int], Any]]:
    indices = sorted({o.delta.index for o in outputs})
    return [(tokens(outputs, i), last(outputs, i).finish_reason) for i in indices]


@cache
def outputs_alone(key: str, rule: str) -> list[RequestOutput]:
    """What a request gets where nothing is guessed."""
    engine = make_engine(NAME, depth=0)
    name = engine.add(prompt_of(key), RULES[rule])
    return run(engine)[name]


def alone(key: str, rule: str) -> list[tuple[list[int], Any]]:
    return answers(outputs_alone(key, rule))


def guessing(share: float, most: int = 2, seed: int = 0, **settings: Any) -> Engine:
    """An engine whose guesses are right as often as ``share`` says, and never rest. Its requests are named by key and
    rule."""
    engine = make_engine(NAME, draft_tokens=most, **settings)
    never_resting(engine.drafts.head)
    assert engine.drafts.head is not None
    engine.drafts.head = Knowing(engine.drafts.head, text_of, share, seed)
    return engine


def never_resting(head: Any) -> None:
    """Any share of right guesses is worth them."""
    head._worth = 0.0


def text_of(seq: Sequence) -> list[int]:
    key, rule = seq.request_id.split()[:2]
    return [*prompt_of(key), *alone(key, rule)[seq.index][0]]


def ask(engine: Engine, key: str, rule: str, suffix: str = "") -> str:
    return engine.add(prompt_of(key), RULES[rule], request_id=f"{key} {rule} {suffix}")


@pytest.fixture(autouse=True, scope="module")
def backend_kind() -> None:
    """In place of the package's, which runs every test twice: steps do not overlap here on any device."""


@pytest.mark.parametrize(("share", "most"), [(0, 1), (0.5, 3), (1, 2)])
def test_together_each_gets_its_tokens(share: float, most: int) -> None:
    engine = guessing(share, most)
    names = [ask(engine, key, rule) for key in ("1", "2") for rule in RULES]
    outputs = run(engine)
    for name in names:
        assert answers(outputs[name]) == alone(*name.split())
    assert_nothing_is_lost(engine)
    assert engine.blocks.num_free == engine.blocks.num_blocks
    guessed, right = engine.drafts.num_guessed, engine.drafts.num_right
    ends = len(names) + 2  # a guess behind the end of an answer counts as wrong
    assert guessed > 15 and (
        right >= guessed - ends if share == 1 else right == 0 if share == 0 else 5 < right < guessed
    )
    for rule in ("penalties", "all"):  # what the host chooses is guessed as well
        timing = last(outputs[f"1 {rule} "]).timing
        assert timing is not None and timing.drafted_tokens > 0
    for key in ("1", "2"):
        wanted, found = (
            [entry for o in answer for entry in o.delta.logprobs or ()]
            for answer in (outputs_alone(key, "logprobs"), outputs[f"{key} logprobs "])
        )
        assert [entry.token_id for entry in found] == [entry.token_id for entry in wanted]
        assert [e.logprob for e in found] == pytest.approx([e.logprob for e in wanted], abs=1e-4)


def test_right_guesses_save_steps_and_are_counted() -> None:
    engine = guessing(1, most=3)
    name = ask(engine, "2", "greedy")
    timing = last(run(engine)[name]).timing
    assert timing is not None and timing.accepted_tokens == engine.stats()["right_guesses"] > LONG / 2
    assert engine.stats()["steps"] < LONG / 2


@pytest.mark.parametrize(
    ("share", "worth", "least", "most"), [(0, 0.5, 1, 2), (1, 0.5, 8, 20), (0, 0, 10, 20)]
)
def test_guesses_rest_where_they_are_not_worth_it(share: float, worth: float, least: int, most: int) -> None:
    engine = guessing(share, most=1)
    engine.drafts.head._head._worth = worth  # type: ignore[union-attr]
    ask(engine, "2", "greedy")
    run(engine)
    assert least <= engine.drafts.num_guessed <= most


def play(seed: int) -> Engine:
    """Requests that come, are cancelled, and lack blocks."""
    rng = random.Random(seed)
    size = rng.choice([2, 3, 8])
    engine = guessing(
        rng.choice([0.3, 0.6, 0.9]), rng.randint(1, 4), seed, max_model_len=100, block_size=size,
        max_num_seqs=rng.randint(2, 5), max_num_batched_tokens=rng.choice([8, 40, 200]),
        num_blocks=-(-100 // size), num_snapshots=rng.choice([0, 1, 3, 12]),
        prefix_caching=rng.random() < 0.8,
    )  # fmt: skip
    outputs: dict[str, list[RequestOutput]] = {}
    wanted = set()
    for number in range(rng.randint(2, 7)):
        rule = rng.choice(["greedy", "several", "all"])
        name = ask(engine, rng.choice(["1", "2"]), rule, str(number))
        steps = rng.randint(0, 8)
        for output in (output for _ in range(steps) for output in engine.step()):
            outputs.setdefault(output.request_id, []).append(output)
        if rng.random() < 0.3:
            engine.abort(name)
        else:
            wanted.add(name)
    for name, rest in run(engine).items():
        outputs.setdefault(name, []).extend(rest)
    for name in wanted:
        assert answers(outputs[name]) == alone(*name.split()[:2])
    assert_nothing_is_lost(engine)
    assert engine.blocks.num_free == engine.blocks.num_blocks
    return engine


@pytest.mark.parametrize("seeds", [(1, 12), pytest.param(range(13, 60), marks=pytest.mark.slow)])
def test_however_requests_are_mixed_cancelled_and_preempted(seeds: Iterable[int]) -> None:
    engines = [play(seed) for seed in seeds]
    assert sum(engine.scheduler.num_preemptions for engine in engines) > 0
    assert sum(engine.drafts.num_right for engine in engines) > 50


def test_a_chat_that_grows_finds_what_could_be_found() -> None:
    """Also where a block of an answer ended at a guess."""
    plain, engine = make_engine(NAME, max_model_len=512), make_engine(NAME, max_model_len=512, draft_tokens=2)
    texts: dict[str, list[int]] = {}
    never_resting(engine.drafts.head)
    assert engine.drafts.head is not None
    engine.drafts.head = Knowing(engine.drafts.head, lambda seq: texts[seq.request_id], 0.7)
    source = torch.Generator().manual_seed(3)
    said, found, could, before = prompt_of("2"), 0, 0, 0
    for turn in range(4):
        params = RULES["greedy"].with_(max_tokens=20 + turn)
        plain.add(said, params.with_(cache_salt=str(turn)), request_id="r")
        wanted = tokens(run(plain)["r"])
        texts[str(turn)] = [*said, *wanted]
        engine.add(said, params, request_id=str(turn))
        outputs = run(engine)[str(turn)]
        assert tokens(outputs) == wanted
        usage = last(outputs).usage
        assert usage is not None
        found, could = found + usage.cached_tokens, could + max(0, before - 1) // 16 * 16
        said = [*said, *wanted]
        before = len(said)
        said += torch.randint(0, 120, (11,), generator=source).tolist()
    assert found >= 0.95 * could and engine.drafts.num_right > 20


@pytest.mark.parametrize(
    "settings", [{}, {"max_num_batched_tokens": 3}, {"max_num_seqs": 1, "block_size": 3}]
)
def test_the_head_guesses_what_was_recorded(settings: dict[str, Any]) -> None:
    """However a prompt is cut, and when it is found in the cache."""
    engine, record = make_engine(NAME, draft_tokens=1, **settings), golden_record(NAME)
    for key in ("1", "batch.2", "batch.2"):
        guesses: dict[int, int] = {}  # by the number of tokens before

        head = engine.drafts.head
        assert head is not None

        def guess(asked: Any, running: Any, inner: Any = head.guess, to: dict[int, int] = guesses) -> Any:
            found = inner(asked, running)
            to |= {len(seq.token_ids): own[0] for (seq, _), own in zip(asked, found, strict=True) if own}
            return found

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(head, "guess", guess)
            engine.add(prompt_of(key), RULES["greedy"].with_(max_tokens=3))
            run(engine)
        assert int(record[f"mtp.{key}.logits"][-1].argmax()) == guesses[len(prompt_of(key)) + 1]


def test_stop_strings_and_grammars() -> None:
    pytest.importorskip("llguidance")
    told = {}
    for share in (None, 0.8):
        engine = (
            make_engine(NAME, byte_tokenizer(), depth=0)
            if share is None
            else guessing(share, tokenizer=byte_tokenizer())
        )
        said = bytes(alone("2", "greedy")[0][0][5:8]).decode()
        held = RULES["greedy"].with_(grammar=Grammar.regex("[a-z]{3,9}"))
        stopped = RULES["greedy"].with_(stop=[said])
        for rule, params in (("held", held), ("greedy", stopped)):
            engine.add(prompt_of("2"), params, request_id=f"2 {rule} ")
        outputs = run(engine)
        told[share] = [(text(own), *answers(own)) for _, own in sorted(outputs.items())]
        assert len(told[share][0][0]) == 5, "cut before the stop string"
    assert told[0.8] == told[None]


@pytest.mark.parametrize("kind", [conftest.FaultyGraphBackend, FaultyBackend])
def test_int8_pages_and_devices_that_would_be_ahead(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conftest, "_backend_kind", kind)
    engine = guessing(1, kv_cache_dtype="int8")
    assert engine.runner.depth == 0
    plain = make_engine(NAME, depth=0, kv_cache_dtype="int8")
    wanted = {}
    for key in ("1", "2"):
        wanted[key] = plain.add(prompt_of(key), RULES["greedy"].with_(max_tokens=8))
    found = run(plain)
    names = {key: ask(engine, key, "greedy") for key in wanted}
    outputs = run(engine)
    for key, name in wanted.items():
        assert tokens(outputs[names[key]])[:8] == tokens(found[name])
    assert engine.drafts.num_right > 5


def test_what_unused_slots_hold_does_not_matter() -> None:
    engine = guessing(0.7)
    for layer in engine.runner.cache.layers:
        for tensor in layer.tensors if isinstance(layer, LayerState) else ():
            tensor.fill_(torch.nan)
    name = ask(engine, "2", "sampled")
    assert answers(run(engine)[name]) == alone("2", "sampled")


def test_a_state_that_was_poisoned_is_found_by_nobody() -> None:
    engine = guessing(1)
    bad = ask(engine, "2", "greedy")
    for _ in range(5):
        engine.step()
    FaultyBackend.fault = lambda out: out * torch.nan
    assert isinstance(run(engine)[bad][-1].error, BackendError)
    FaultyBackend.fault = None
    assert_nothing_is_lost(engine)
    assert answers(run(engine).get("", [])) == []
    name = ask(engine, "2", "greedy", "again")
    assert answers(run(engine)[name]) == alone("2", "greedy")


def test_answers_go_on_where_the_head_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine(NAME, draft_tokens=2)

    def fails(*args: Any) -> torch.Tensor:
        raise RuntimeError("out of something")

    monkeypatch.setattr(engine.runner.model.mtp, "forward", fails)
    name = ask(engine, "2", "greedy")
    assert answers(run(engine)[name]) == alone("2", "greedy")
    assert engine.drafts.num_guessed == 0
    assert [record.message for record in caplog.records] == [
        "the MTP head failed: nothing is guessed from here on"
    ]


def test_only_its_own_request_ends_where_the_choice_behind_a_guess_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = guessing(1)
    sample, steps = engine.sampler.sample, [0]

    def fails(logits: torch.Tensor, seqs: list[Sequence]) -> Any:
        steps.append(engine.stats()["steps"])
        if steps[-1] == steps[-2]:  # the second time in one step
            raise RuntimeError("out of something")
        return sample(logits, seqs)

    monkeypatch.setattr(engine.sampler, "sample", fails)
    bad, other = ask(engine, "2", "penalties"), ask(engine, "1", "greedy")
    outputs = run(engine)
    assert isinstance(outputs[bad][-1].error, BackendError)
    assert answers(outputs[other]) == alone("1", "greedy")
    assert_nothing_is_lost(engine)
    assert engine.blocks.num_free == engine.blocks.num_blocks


def test_a_model_without_the_head_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r'draft_tokens=2: the model was built without its MTP head.*draft="mtp"'
    ):
        conftest.Engine(conftest.golden_model(NAME), None, conftest.EngineOptions(64, draft_tokens=2))
