"""Who waits how long when many come at once: the scheduler on a machine whose steps take what this says."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median

from qwenrt.engine.block_manager import BlockManager
from qwenrt.engine.scheduler import Scheduler
from qwenrt.engine.sequence import Sequence
from qwenrt.engine.step_target import StepTarget
from qwenrt.sampling_params import SamplingParams

PRICE = 0.005  # seconds for a token of a prompt
STEP = 512  # tokens


@dataclass
class Asked:
    """A request of ``words`` that comes at ``at`` and is answered with ``answer`` tokens, which come at ``tokens``."""

    at: float
    words: int
    answer: int
    tokens: list[float] = field(default_factory=list)

    @property
    def first(self) -> float:
        return self.tokens[0] - self.at

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in zip(self.tokens, self.tokens[1:], strict=False)]


def serve(asked: list[Asked], target_s: float = 0.25) -> None:
    """Everybody's tokens. A step takes 20 ms, 20 ms more for each row that decodes, and PRICE a token of prompts."""
    now = 0.0
    scheduler = Scheduler(BlockManager(2000, 16), 32, STEP, StepTarget(target_s, lambda: now))
    waiting = sorted(asked, key=lambda one: one.at)
    running: dict[int, Asked] = {}
    while waiting or scheduler.has_work:
        if not scheduler.has_work:
            now = max(now, waiting[0].at)
        while waiting and waiting[0].at <= now:
            number = len(running)
            running[number] = waiting.pop(0)
            ids = [number * 10_000 + i for i in range(running[number].words)]
            scheduler.add(Sequence(number, ids, SamplingParams()))
        batch = scheduler.schedule()
        began, rows = now, sum(seq.num_output > 0 for seq, _ in batch)
        tokens = sum(count for _, count in batch) - rows
        now += 0.02 + 0.02 * rows + PRICE * tokens
        for seq, count in batch:
            chooses = scheduler.launch(seq, count)
            scheduler.collect(seq, seq.num_computed, seq.epoch)
            if chooses:
                seq.in_flight -= 1
                seq.token_ids.append(0)
                running[seq.seq_id].tokens.append(now)
                if seq.num_output == running[seq.seq_id].answer:
                    scheduler.finish(seq)
        scheduler.target.done(began, rows, tokens)


def test_who_comes_together_waits_for_the_prompts_and_nothing_else() -> None:
    """One after the other, a few milliseconds apart, so that the first decodes before the others are read."""
    together = [Asked(0.004 * i, 90, 100) for i in range(16)]
    serve(together)
    reading = 16 * 90 * PRICE
    assert max(one.first for one in together) < 1.1 * reading
    longest = 0.02 + 0.02 * 16 + PRICE * STEP / 2
    for one in together:
        assert max(one.gaps) <= longest, "half a step of prompts at most"
        assert max(one.gaps[8:]) <= 2 * (0.02 + 0.02 * 16), "only the first tokens of an answer wait"


def test_a_long_prompt_does_not_hold_up_who_has_just_begun() -> None:
    chat, long = Asked(0.0, 40, 100), Asked(0.05, 8000, 1)
    serve([chat, long])
    assert max(chat.gaps) < 0.3


def test_a_long_prompt_among_many_answers_makes_no_gap_of_three_usual_ones() -> None:
    chats, long = [Asked(0.0, 90, 300) for _ in range(16)], Asked(20.0, 8000, 1)
    serve([*chats, long])
    gaps = sorted(gap for chat in chats for gap in chat.gaps)
    assert gaps[int(len(gaps) * 0.99)] < 3 * median(gaps)
    assert chats[0].tokens[0] < long.at < long.tokens[0] < chats[0].tokens[-1]


def test_who_comes_later_waits_for_small_chunks() -> None:
    early, late = [Asked(0.0, 64, 200) for _ in range(4)], [Asked(5.0, 400, 10) for _ in range(2)]
    serve([*early, *late])
    assert max(gap for one in early for gap in one.gaps[8:]) < 0.3
