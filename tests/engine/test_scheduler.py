"""The scheduler alone, without tensors: everyone advances, nobody overflows, every block comes back."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenrt.engine.block_manager import BlockManager
from qwenrt.engine.scheduler import Scheduler
from qwenrt.engine.sequence import Sequence, Status
from qwenrt.sampling_params import SamplingParams


def make(num_blocks: int = 16, size: int = 4, seqs: int = 4, budget: int = 8) -> Scheduler:
    return Scheduler(BlockManager(num_blocks, size), seqs, budget)


def sequence(seq_id: int, length: int, token: int | None = None) -> Sequence:
    ids = [token] * length if token is not None else [seq_id * 1000 + i for i in range(length)]
    return Sequence(seq_id, ids, SamplingParams())


def advance(scheduler: Scheduler, batch: list[tuple[Sequence, int]]) -> None:
    """What the engine does when a step is begun and when it is done, with made-up tokens."""
    for seq, count in batch:
        chooses = scheduler.launch(seq, count)
        seq.in_flight -= chooses
        scheduler.collect(seq, seq.num_computed, seq.epoch)
        if chooses:
            seq.token_ids.append(seq.seq_id)


def test_prompts_are_cut_and_decoding_goes_on_beside_them() -> None:
    scheduler = make(budget=8)
    short, long = sequence(0, 3), sequence(1, 20)
    scheduler.add(short)
    scheduler.add(long)
    seen = []
    for _ in range(4):
        batch = scheduler.schedule()
        seen.append([(seq.seq_id, count) for seq, count in batch])
        advance(scheduler, batch)
    assert seen == [[(0, 3), (1, 5)], [(0, 1), (1, 7)], [(0, 1), (1, 7)], [(0, 1), (1, 1)]]


def test_the_latest_gives_way_and_the_oldest_never_does() -> None:
    scheduler = make(num_blocks=4, size=2, budget=16)
    old, new = sequence(0, 3), sequence(1, 1)
    scheduler.add(old)
    scheduler.add(new)
    preempted = False
    for _ in range(5):
        batch = scheduler.schedule()
        assert old in [seq for seq, _ in batch]
        preempted |= new.status is Status.WAITING
        advance(scheduler, batch)
    assert preempted and scheduler.num_preemptions >= 1
    scheduler.finish(old)
    assert new in [seq for seq, _ in scheduler.schedule()]


def test_nobody_overtakes_one_that_waits_for_blocks() -> None:
    scheduler = make(num_blocks=4, size=4, budget=64)
    scheduler.add(sequence(0, 9))
    advance(scheduler, scheduler.schedule())
    scheduler.add(sequence(1, 9))
    scheduler.add(sequence(2, 1))
    assert [seq.seq_id for seq, _ in scheduler.schedule()] == [0]
    assert list(scheduler.waiting) == [1, 2]


def test_a_prompt_advances_however_many_decode() -> None:
    scheduler = make(num_blocks=64, seqs=100, budget=4)
    for i in range(4):
        scheduler.add(sequence(i, 1 if i < 3 else 30))
    for _ in range(4):
        advance(scheduler, scheduler.schedule())
    progress = [seq for seq in scheduler.running if seq.seq_id == 3]
    before = progress[0].num_computed
    advance(scheduler, scheduler.schedule())
    assert progress[0].num_computed > before


def test_siblings_wait_for_the_prompt_they_share() -> None:
    scheduler = make(num_blocks=32, budget=8)
    leader = sequence(0, 12, token=7)
    follower = Sequence(1, list(leader.token_ids), SamplingParams(), leader=leader)
    for seq in (leader, follower):
        scheduler.add(seq)
    advance(scheduler, scheduler.schedule())
    assert follower.status is Status.WAITING
    advance(scheduler, scheduler.schedule())
    assert [seq.seq_id for seq, _ in scheduler.schedule()] == [0, 1]
    assert follower.num_cached == 8


@pytest.mark.parametrize("status", ["waiting", "running"])
def test_a_leader_that_ends_early_lets_its_siblings_go(status: str) -> None:
    scheduler = make(budget=8)
    leader = sequence(0, 12, token=7)
    scheduler.add(leader)
    scheduler.add(Sequence(1, list(leader.token_ids), SamplingParams(), leader=leader))
    if status == "running":
        advance(scheduler, scheduler.schedule())
    scheduler.finish(leader)
    assert [seq.seq_id for seq, _ in scheduler.schedule()] == [1]


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_random_traffic_frees_every_block(data: st.DataObject) -> None:
    size, num_blocks = data.draw(st.integers(1, 4)), data.draw(st.integers(2, 12))
    capacity = size * num_blocks
    budget = data.draw(st.integers(1, 12))
    scheduler = make(num_blocks, size, data.draw(st.integers(1, 6)), budget)
    blocks = scheduler.blocks
    alive: dict[int, Sequence] = {}
    for step in range(data.draw(st.integers(1, 40))):
        action = data.draw(st.sampled_from(["add", "step", "step", "step", "abort"]))
        if action == "add":
            length = data.draw(st.integers(1, capacity - 1))
            seq = sequence(step, length, token=data.draw(st.integers(0, 1)))
            alive[step] = seq
            scheduler.add(seq)
        elif action == "abort" and alive:
            scheduler.finish(alive.pop(data.draw(st.sampled_from(sorted(alive)))))
        elif action == "step":
            one_step(scheduler, alive, budget, capacity)
        held = sum({b: 1 for seq in alive.values() for b in seq.block_table}.values())
        assert blocks.num_free == num_blocks - held
    for _ in range(3000):  # whatever is left comes to its end
        if not scheduler.has_work:
            break
        one_step(scheduler, alive, budget, capacity)
    assert not scheduler.has_work and not alive
    assert blocks.num_free == num_blocks


def one_step(scheduler: Scheduler, alive: dict[int, Sequence], budget: int, capacity: int) -> None:
    batch = scheduler.schedule()
    if alive:
        assert batch, "there is work, so something must advance"
    assert sum(count for _, count in batch) <= budget
    assert len(scheduler.running) <= scheduler.max_num_seqs
    assert len({seq.seq_id for seq, _ in batch}) == len(batch)
    for seq, count in batch:
        assert 0 < count <= seq.num_remaining
        assert seq.num_computed + count <= len(seq.block_table) * scheduler.blocks.block_size
    oldest = min(alive, default=None)
    if oldest is not None:
        assert oldest in [seq.seq_id for seq, _ in batch], "the oldest advances in every step"
    advance(scheduler, batch)
    for seq, _ in batch:
        if len(seq.token_ids) >= capacity:
            scheduler.finish(seq)
            del alive[seq.seq_id]


@pytest.mark.parametrize(
    ("prompt", "budget", "pieces"),
    [
        (520, 512, [488, 32]),  # 512 and 8 would leave a piece that kernels compute in another order
        (300, 256, [256, 44]),
        (544, 512, [512, 32]),
        (1024, 512, [512, 512]),
        (70, 64, [38, 32]),
        (65, 63, [33, 32]),
        (40, 38, [38, 2]),  # both would be short
        (9, 4, [4, 4, 1]),
    ],
)
def test_no_prompt_ends_in_a_short_piece_where_that_can_be(
    prompt: int, budget: int, pieces: list[int]
) -> None:
    scheduler = make(num_blocks=512, budget=budget)
    seq = sequence(1, prompt)
    scheduler.add(seq)
    got = []
    while seq.num_remaining > 0 and sum(got) < prompt:
        ((_, count),) = scheduler.schedule()
        got.append(count)
        scheduler.launch(seq, count)
    assert got == pieces
