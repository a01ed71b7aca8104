"""Random schedules of an engine against plain Python: with steps under way, failures, cancels, deadlines, preemptions,
stops and thoughts that are ended, every completion gets its own tokens, each once, and every block comes back."""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from qwenrt.backends.stack import Outcome
from qwenrt.engine.block_manager import BlockManager
from qwenrt.engine.completions import Completions
from qwenrt.engine.engine import Engine
from qwenrt.engine.model_runner import ModelRunner
from qwenrt.engine.options import EngineOptions
from qwenrt.engine.scheduler import Scheduler
from qwenrt.engine.sequence import Sequence, Status
from qwenrt.engine.thoughts import ThoughtRules
from qwenrt.errors import BackendError, QwenrtError
from qwenrt.ops.steps import FROM_BEFORE, NOT_FINITE, Step
from qwenrt.sampling_params import SamplingParams
from tests.engine.conftest import golden_model

VOCAB = 40
CONTEXT = 48
CLOSING = 13
WORDS = (31, 32, CLOSING, 33)


def next_token(tokens: list[int]) -> int:
    """What follows a text in this world: all of it matters."""
    return hashlib.blake2b(bytes(tokens), digest_size=2).digest()[0] % VOCAB


@dataclass
class ToyStack:
    """Computes in plain Python over a cache of tokens: what comes of a step depends on each slot that its tables lead
    to. It answers late, and at times wrongly: ``faults`` says how for each call."""

    block_size: int
    num_slots: int
    faults: Callable[[], str]
    name: str = "toy"
    cache: list[int] = field(default_factory=list)
    calls: int = 0

    def __post_init__(self) -> None:
        self.cache = [255] * self.num_slots

    def why_not(self, step: Step) -> str | None:
        return None

    def run(self, step: Step, before: Outcome | None = None) -> Outcome:
        fault, self.calls = self.faults(), self.calls + 1
        ids, place, chosen = list(step.token_ids), 0, []
        for q_len, kv_len, table, fed in zip(step.q_lens, step.kv_lens, step.tables, step.fed, strict=True):
            if ids[place + q_len - 1] == FROM_BEFORE:
                assert before is not None and 0 <= fed < len(before.chosen)
                ids[place + q_len - 1] = max(0, int(before.chosen[fed]))
            slots = [
                table[p // self.block_size] * self.block_size + p % self.block_size for p in range(kv_len)
            ]
            for j in range(q_len):
                self.cache[slots[kv_len - q_len + j]] = ids[place + j] if fault != "refuses" else 255
                if place + j in step.logit_rows:
                    chosen.append(next_token([self.cache[slot] for slot in slots[: kv_len - q_len + j + 1]]))
            place += q_len
        if fault == "refuses":
            raise RuntimeError("the device is lost")
        if fault == "not finite" and chosen:
            chosen[0] = NOT_FINITE
        tokens = torch.tensor(chosen, dtype=torch.int64)

        def fetched() -> torch.Tensor:
            if fault == "raises":
                raise RuntimeError("found late")
            return tokens

        logits = torch.full((len(chosen), 512), -1.0)
        for row, token in zip(logits, chosen, strict=True):
            row[token] = torch.nan if token == NOT_FINITE else 1.0
        return Outcome(tokens, fetched, logits, self)


@dataclass
class Asked:
    prompt: list[int]
    params: SamplingParams
    thought: ThoughtRules | None
    arrived: float
    told: dict[int, list[int]]
    ends: dict[int, str]
    cuts: dict[int, int] = field(default_factory=dict)  # by index: where its thought was to end
    error: QwenrtError | None = None


class Schedule:
    """One engine and all that was asked of it."""

    def __init__(self, seed: int, depth: int) -> None:
        self.rng = rng = random.Random(seed)
        size = rng.choice([1, 2, 4, 16])
        blocks = -(-CONTEXT // size) * rng.choice([1, 1, 2, 3])
        options = EngineOptions(
            max_model_len=CONTEXT,
            max_num_seqs=rng.randint(1, 5),
            max_num_batched_tokens=rng.choice([1, 3, 8, 64]),
            block_size=size,
            num_blocks=blocks,
            prefix_caching=rng.random() < 0.7,
            depth=depth,
        )
        self.now = 0.0
        self.engine = Engine(golden_model("plain"), None, options, clock=lambda: self.now)
        self.faulty = rng.random() < 0.3
        self.toy = ToyStack(size, blocks * size, self.fault)
        self.engine.runner.stacks = [self.toy]
        self.engine.runner.first_overflow = lambda ids, alpha: "layers.0"  # type: ignore[method-assign]
        self.asked: dict[str, Asked] = {}

    def fault(self) -> str:
        if not self.faulty or self.rng.random() < 0.85:
            return ""
        return self.rng.choice(["refuses", "raises", "not finite"])

    def add(self) -> None:
        rng = self.rng
        shared = [7, 1, 7, 1, 2] * 7
        prompt = shared[: rng.randint(1, 35)] + [rng.randrange(4) for _ in range(rng.randint(0, 3))]
        params = SamplingParams(
            temperature=0,
            max_tokens=rng.choice([1, 2, 5, 12, None]),
            n=rng.choice([1, 1, 2, 3]),
            stop_token_ids=[rng.randrange(VOCAB) for _ in range(rng.randint(0, 3))],
            logprobs=rng.choice([None, None, 0]),  # then the host chooses
            timeout=rng.choice([None, None, None, 2, 30]),
            cache_salt=rng.choice(["", "", "another"]),
            draft=rng.choice([None, "lookup"]),
        )
        thought = None
        if rng.random() < 0.5:
            thought = ThoughtRules(None, CLOSING, WORDS, True, rng.choice([None, 1, 2, 5]))
        name = self.engine.add(prompt, params, thought=thought)
        self.asked[name] = Asked(prompt, params, thought, self.now, {i: [] for i in range(params.n)}, {})

    def end_thought(self) -> None:
        name = self.rng.choice(sorted(self.asked))
        asked = self.asked[name]
        self.engine.end_thought(name)
        for index, told in asked.told.items():
            asked.cuts.setdefault(index, max(1, len(told)))

    def step(self) -> None:
        self.now += self.rng.choice([0, 0, 1])
        for output in self.engine.step():
            asked, index = self.asked[output.request_id], output.delta.index
            assert index not in asked.ends, "something after the end"
            asked.told[index] += output.delta.token_ids
            asked.error = asked.error or output.error
            if output.delta.finish_reason:
                asked.ends[index] = output.delta.finish_reason
            if output.delta.finish_reason == "timeout":
                assert asked.params.timeout is not None
                assert self.now >= asked.arrived + asked.params.timeout
        self.check()

    def check(self) -> None:
        engine = self.engine
        for asked in self.asked.values():
            if len(asked.ends) < asked.params.n and asked.params.timeout is not None:
                assert self.now < asked.arrived + asked.params.timeout, "it outlived its time"
        alive = [*engine.scheduler.running, *engine.scheduler.waiting.values()]
        held = {block for seq in alive for block in seq.block_table}
        assert engine.blocks.num_free == engine.blocks.num_blocks - len(held)
        owners = {(block, seq.params.cache_salt) for seq in alive for block in seq.block_table}
        assert len(owners) == len(held), "a block is shared in spite of the salt"
        for seq in alive:
            assert 0 <= seq.in_flight <= engine.runner.depth
            assert seq.num_stored <= seq.num_computed <= seq.num_known

    def end(self) -> None:
        for _ in range(3000):
            if not self.engine.has_work:
                break
            self.step()
        assert not self.engine.has_work
        assert self.engine.blocks.num_free == self.engine.blocks.num_blocks
        for asked in self.asked.values():
            for index, told in asked.told.items():
                self.compare(asked, index, told, asked.ends[index])

    def compare(self, asked: Asked, index: int, told: list[int], end: str) -> None:
        """What a completion was told is what plain Python writes, to its end or to where it was cut off."""
        wanted, reason = written(asked, index)
        if end in ("abort", "error", "timeout"):
            assert told == wanted[: len(told)] and len(told) < len(wanted)
            assert asked.error is None or (self.faulty and isinstance(asked.error, BackendError))
        else:
            assert (told, end) == (wanted, reason)


def written(asked: Asked, index: int) -> tuple[list[int], str]:
    """The tokens of a completion that nothing cuts off, and why it ends."""
    text, params = list(asked.prompt), asked.params
    start, forced, cut = len(text), 0, CONTEXT
    if asked.thought is not None:
        cut = asked.cuts.get(index, CONTEXT)
        if asked.thought.budget is not None:
            most = min(params.max_tokens or CONTEXT, CONTEXT - start - len(WORDS))
            cut = min(cut, max(1, min(asked.thought.budget, most - max(1, most // 4))))
    while True:
        text.append(next_token(text))
        if text[-1] in params.stop_token_ids:
            return text[start:], "stop"
        if len(text) - start - forced == params.max_tokens or len(text) == CONTEXT:
            return text[start:], "length"
        is_due = CLOSING not in text[start:] and len(text) - start >= cut
        if is_due and len(text) + len(WORDS) < CONTEXT:
            forced = len(WORDS)
            for word in WORDS:
                text.append(word)
                if word in params.stop_token_ids:
                    return text[start:], "stop"


def play(seed: int, depth: int) -> Schedule:
    schedule = Schedule(seed, depth)
    for _ in range(schedule.rng.randint(1, 40)):
        action = schedule.rng.random()
        if action < 0.3:
            schedule.add()
        elif action < 0.4 and schedule.asked:
            schedule.engine.abort(schedule.rng.choice(sorted(schedule.asked)))
        elif action < 0.5 and schedule.asked:
            schedule.end_thought()
        else:
            schedule.step()
    schedule.end()
    return schedule


@pytest.mark.parametrize("depth", [0, 1])
def test_every_completion_gets_its_own_tokens_each_once(depth: int) -> None:
    played = [play(seed, depth) for seed in range(150)]
    assert sum(s.engine.scheduler.num_preemptions for s in played) > 20
    every = [asked for s in played for asked in s.asked.values()]
    assert sum(asked.error is not None for asked in every) > 20
    assert sum("timeout" in asked.ends.values() for asked in every) > 20
    assert (
        sum(
            list(WORDS) == told[i : i + len(WORDS)]
            for a in every
            for told in a.told.values()
            for i in range(9)
        )
        > 100
    )
    if depth == 0:
        return
    together = sum(s.toy.calls for s in played)
    assert together > 1000


def finished_ones_stay(right: Callable[..., Any], scheduler: Scheduler, seq: Sequence) -> None:
    right(scheduler, seq)
    seq.status = Status.RUNNING


def fed_by_another(right: Callable[..., Any], runner: ModelRunner, *args: Any) -> Any:
    step, rows = right(runner, *args)
    fed = [row for row in step.fed if row >= 0]
    turned = dict(zip(fed, fed[1:] + fed[:1], strict=True))
    return dataclasses.replace(step, fed=[turned.get(row, -1) for row in step.fed]), rows


def without_late_ones(right: Callable[..., Any], blocks: BlockManager, seq: Sequence) -> bool:
    kept, seq.in_flight = seq.in_flight, 0
    grown = right(blocks, seq)
    seq.in_flight = kept
    return bool(grown)


# Wrong ways to keep account of steps under way: (class, its method, what it does instead).
MUTANTS: dict[str, tuple[type, str, Callable[..., Any]]] = {
    "a late token not dropped": (Scheduler, "finish", finished_ones_stay),
    "a token of another row": (ModelRunner, "step_of", fed_by_another),
    "no slot for a late token": (BlockManager, "grow", without_late_ones),
    "begun anew while a token is under way": (Sequence, "held_back", lambda right, seq: False),
    "a token in the place of a forced one": (Sequence, "drop_in_flight", lambda right, seq: None),
    "a salt that does not count": (Sequence, "root", lambda right, seq: (seq.ntk_alpha, "")),
    "deadlines never looked at": (Completions, "expire", lambda right, completions: None),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_wrong_accounts_are_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, method, wrong = MUTANTS[name]
    right = getattr(owner, method)
    if isinstance(right, property):
        monkeypatch.setattr(owner, method, property(lambda self: wrong(right, self)))
    else:
        monkeypatch.setattr(owner, method, lambda self, *args: wrong(right, self, *args))
    for seed in range(400):
        try:
            play(seed, depth=1)
        except (AssertionError, KeyError, IndexError, ValueError):
            return
    pytest.fail("400 schedules passed")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("depth", [0, 1])
def test_ten_thousand_schedules(depth: int) -> None:
    for seed in range(1000, 6000):
        play(seed, depth)
