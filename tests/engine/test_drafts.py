"""Guesses that a step checks: the tokens are those that come without."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenrt.backends.stack import Outcome
from qwenrt.engine.drafts import LookUp
from qwenrt.engine.engine import Engine
from qwenrt.engine.output_processor import RequestOutput
from qwenrt.ops.steps import Step
from qwenrt.sampling_params import SamplingParams
from tests.engine.conftest import byte_tokenizer, last, make_engine, run, text, tokens
from tests.engine.test_schedules import ToyStack

REPEATS = [5, 6, 7, 8, 9, 10, 5, 6, 7, 8, 9, 10, 5, 6, 7]


def test_what_followed_last_time_is_guessed() -> None:
    assert LookUp().guess([1, 2, 3, 4, 5, 1, 2], 3) == [3, 4, 5]
    assert LookUp().guess([1, 2, 3, 9, 2, 8, 1, 2], 1) == [3], "the longer occurrence"
    assert LookUp().guess([7, 2, 3, 1, 2, 8, 1, 2], 2) == [8, 1]
    assert LookUp().guess([1, 2, 3, 4], 4) == []
    assert LookUp().guess([1, 1, 1], 4) == [1, 1, 1, 1], "what was guessed goes on"


def test_how_many_are_guessed_adapts() -> None:
    lookup, ids = LookUp(), [1, 2, 3, 4] * 20
    sizes = []
    for _ in range(3):
        sizes.append(len(lookup.guess(ids, 99)))
        lookup.checked(sizes[-1], sizes[-1], len(ids))
    assert sizes == [4, 8, 15]
    lookup.checked(15, 3, len(ids))
    assert len(lookup.guess(ids, 99)) == 4
    for _ in range(3):
        lookup.checked(len(lookup.guess(ids, 99)), 0, len(ids))
    assert lookup.guess(ids, 99) == []
    ids += [1, 2, 3, 4] * 2
    assert len(lookup.guess(ids, 99)) == 1, "it is tried again"
    lookup.checked(1, 0, len(ids))
    assert lookup.guess([*ids, *[1, 2, 3, 4] * 3], 99) == [], "the pause grows"


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 3), max_size=80), st.integers(0, 20), st.integers(0, 79))
def test_a_look_up_that_grew_with_its_text_guesses_as_a_new_one(
    ids: list[int], most: int, start: int
) -> None:
    grown = LookUp()
    grown.guess(ids[:start], most)
    guessed = grown.guess(ids, most)
    assert guessed == LookUp().guess(ids, most) and len(guessed) <= min(most, 4)


RULES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 0.7, "top_k": 3, "seed": 3},
    "several": {"temperature": 0.9, "top_p": 0.9, "seed": 4, "n": 3},
    "short": {"temperature": 0, "max_tokens": 5},
    "min_tokens": {"temperature": 0, "min_tokens": 6, "stop_token_ids": [7]},
    "penalties": {"temperature": 0, "repetition_penalty": 1.2},
    "logprobs": {"temperature": 0, "logprobs": 2},
}


def answers(engine: Engine, draft: str | None, **rules: Any) -> list[tuple[list[int], Any]]:
    params = SamplingParams(**{"max_tokens": 60, **rules}, draft=draft)
    name = engine.add(REPEATS, params)
    outputs = run(engine)[name]
    return [(tokens(outputs, i), last(outputs, i).finish_reason) for i in range(params.n)]


@pytest.mark.parametrize("rule", RULES)
def test_the_tokens_are_those_without(rule: str) -> None:
    wanted = answers(make_engine("plain", depth=0), None, **RULES[rule])
    engine = make_engine("plain", depth=0)
    assert answers(engine, "lookup", **RULES[rule]) == wanted
    assert engine.blocks.num_free == engine.blocks.num_blocks
    if rule in ("penalties", "logprobs"):
        assert engine.drafts.num_guessed > 0, "what the host chooses is guessed as well"


def test_nothing_is_guessed_where_steps_overlap() -> None:
    engine = make_engine("plain", depth=1)
    assert answers(engine, "lookup", temperature=0) == answers(engine, None, temperature=0)
    assert engine.drafts.num_guessed == 0


class Periodic(ToyStack):
    """A world in which the next token depends on all that came, and repeats itself much."""

    def run(self, step: Step, before: Outcome | None = None) -> Outcome:
        ids, place, chosen = list(step.token_ids), 0, []
        for q_len, kv_len, table in zip(step.q_lens, step.kv_lens, step.tables, strict=True):
            for j in range(q_len):
                p = kv_len - q_len + j
                self.cache[table[p // self.block_size] * self.block_size + p % self.block_size] = ids[
                    place + j
                ]
            place += q_len
        place = 0
        for q_len, kv_len, table in zip(step.q_lens, step.kv_lens, step.tables, strict=True):
            for j in range(q_len):
                if place + j in step.logit_rows:
                    slots = [
                        table[p // self.block_size] * self.block_size + p % self.block_size
                        for p in range(kv_len - q_len + j + 1)
                    ]
                    chosen.append(follower([self.cache[slot] for slot in slots]))
            place += q_len
        self.calls += 1
        found = torch.tensor(chosen, dtype=torch.int64)
        logits = torch.full((len(chosen), 512), -1.0)
        logits[torch.arange(len(chosen)), found] = 1.0
        return Outcome(found, lambda: found, logits, self)


def follower(ids: list[int]) -> int:
    """Mostly the token six before; now and then something that depends on the whole text."""
    mixed = sum((i + 1) * token for i, token in enumerate(ids))
    return mixed % 40 if mixed % 11 == 0 or len(ids) < 6 else ids[-6]


def written(prompt: list[int], params: SamplingParams, most: int) -> tuple[list[int], str]:
    ids, reason = list(prompt), ""
    while not reason:
        ids.append(follower(ids))
        count = len(ids) - len(prompt)
        if ids[-1] in params.stop_token_ids:
            reason = "stop"
        elif count == params.max_tokens or len(ids) == most:
            reason = "length"
    return ids[len(prompt) :], reason


def play(seed: int) -> Engine:
    """Random requests, cancels and shortage of blocks over the toy: each gets its own tokens, each once."""
    rng = random.Random(seed)
    size, context = rng.choice([1, 2, 4, 16]), 96
    blocks = -(-context // size) * rng.choice([1, 1, 2])
    engine = make_engine(
        "plain", max_model_len=context, max_num_seqs=rng.randint(1, 6), block_size=size, num_blocks=blocks,
        max_num_batched_tokens=rng.choice([3, 8, 64]), prefix_caching=rng.random() < 0.7, depth=0,
    )  # fmt: skip
    toy = Periodic(size, (blocks + 8) * size, lambda: "")
    engine.runner.stacks = [toy]
    asked: dict[str, tuple[list[int], SamplingParams]] = {}
    outputs: dict[str, list[RequestOutput]] = {}
    aborted = set()
    for _ in range(rng.randint(5, 60)):
        action = rng.random()
        if action < 0.25:
            prompt = [3, 1, 2, 0, 4, 5] * rng.randint(1, 6) + [
                rng.randrange(6) for _ in range(rng.randint(0, 4))
            ]
            params = SamplingParams(
                temperature=0,
                max_tokens=rng.choice([1, 3, 20, None]),
                n=rng.choice([1, 1, 2]),
                stop_token_ids=[rng.randrange(40) for _ in range(rng.randint(0, 2))],
                draft=rng.choice(["lookup", "lookup", None]),
            )
            asked[engine.add(prompt, params)] = prompt, params
        elif action < 0.3 and asked:
            name = rng.choice(sorted(asked))
            aborted.add(name) if engine.abort(name) else None
        else:
            note(engine, outputs)
    for _ in range(3000):
        if not engine.has_work:
            break
        note(engine, outputs)
    assert engine.blocks.num_free == engine.blocks.num_blocks
    for name, (prompt, params) in asked.items():
        wanted = written(prompt, params, context)
        for index in range(params.n):
            own = [o for o in outputs[name] if o.delta.index == index]
            reason = own[-1].delta.finish_reason
            if name in aborted and reason == "abort":
                assert tokens(own, index) == wanted[0][: len(tokens(own, index))]
            else:
                assert (tokens(own, index), reason) == wanted
                assert sum(o.delta.finish_reason is not None for o in own) == 1
    return engine


def note(engine: Engine, outputs: dict[str, list[RequestOutput]]) -> None:
    for output in engine.step():
        outputs.setdefault(output.request_id, []).append(output)
    for seq in engine.scheduler.running:
        assert seq.num_stored <= seq.num_computed < seq.num_known and not seq.guess
        assert seq.num_committed * engine.blocks.block_size <= seq.num_stored


def test_random_requests_get_their_tokens() -> None:
    engines = [play(seed) for seed in range(150)]
    assert sum(engine.scheduler.num_preemptions for engine in engines) > 10
    right = sum(engine.drafts.num_right for engine in engines)
    guessed = sum(engine.drafts.num_guessed for engine in engines)
    assert 0.3 * guessed < right < guessed


def test_a_text_that_repeats_takes_fewer_steps() -> None:
    steps = {}
    for draft in (None, "lookup"):
        engine = make_engine("plain", depth=0)
        toy = Periodic(16, (engine.blocks.num_blocks + 8) * 16, lambda: "")
        engine.runner.stacks = [toy]
        engine.add([3, 1, 2, 0, 4, 5] * 4, SamplingParams(temperature=0, max_tokens=100, draft=draft))
        run(engine)
        steps[draft] = toy.calls
    assert steps["lookup"] < 0.5 * steps[None]


def test_what_was_rejected_is_in_no_shared_block() -> None:
    """Prompts that share a beginning find it after an answer whose guesses were wrong at times."""
    engine = make_engine("plain", depth=0, block_size=2)
    toy = Periodic(2, (engine.blocks.num_blocks + 8) * 2, lambda: "")
    engine.runner.stacks = [toy]
    prompt = [3, 1, 2, 0, 4, 5] * 4
    params = SamplingParams(temperature=0, max_tokens=90, draft="lookup")
    name = engine.add(prompt, params)
    first = tokens(run(engine)[name])
    assert 0 < engine.drafts.num_right < engine.drafts.num_guessed
    for cut in (10, 30, 60, 89):
        name = engine.add([*prompt, *first[:cut]], params.with_(max_tokens=90 - cut))
        outputs = run(engine)[name]
        assert tokens(outputs) == first[cut:]
        usage = last(outputs).usage
        assert usage is not None and usage.cached_tokens >= len(prompt) + cut - 3


def test_a_stop_string_ends_inside_guesses() -> None:
    tokenizer = byte_tokenizer()
    told = {}
    for draft in (None, "lookup"):
        engine = make_engine("plain", tokenizer, depth=0)
        toy = Periodic(16, (engine.blocks.num_blocks + 8) * 16, lambda: "")
        engine.runner.stacks = [toy]
        params = SamplingParams(temperature=0, max_tokens=100, draft=draft, stop=["\x04\x05\x03\x01"])
        name = engine.add([3, 1, 2, 0, 4, 5] * 4, params)
        outputs = run(engine)[name]
        told[draft] = text(outputs), tokens(outputs), last(outputs).finish_reason
    assert told["lookup"] == told[None]
