"""The scheduler alone, without tensors: everyone advances, nobody overflows, every block comes back."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenrt.engine.block_manager import BlockManager
from qwenrt.engine.scheduler import Scheduler, common_length
from qwenrt.engine.sequence import Sequence, Status
from qwenrt.engine.shares import shares
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
    waited: dict[int, int] = {}
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
            one_step(scheduler, alive, waited, budget, capacity)
        held = sum({b: 1 for seq in alive.values() for b in seq.block_table}.values())
        assert blocks.num_free == num_blocks - held
    for _ in range(3000):  # whatever is left comes to its end
        if not scheduler.has_work:
            break
        one_step(scheduler, alive, waited, budget, capacity)
    assert not scheduler.has_work and not alive
    assert blocks.num_free == num_blocks


def one_step(
    scheduler: Scheduler, alive: dict[int, Sequence], waited: dict[int, int], budget: int, capacity: int
) -> None:
    batch = scheduler.schedule()
    if alive:
        assert batch, "there is work, so something must advance"
    assert sum(count for _, count in batch) <= budget
    assert len(scheduler.running) <= scheduler.max_num_seqs
    assert len({seq.seq_id for seq, _ in batch}) == len(batch)
    for seq, count in batch:
        assert 0 < count <= seq.num_remaining
        assert seq.num_computed + count <= len(seq.block_table) * scheduler.blocks.block_size
    computed = {seq.seq_id for seq, _ in batch}
    for seq in scheduler.running:
        assert seq.seq_id in computed or seq.num_remaining > 0
        waited[seq.seq_id] = 0 if seq.seq_id in computed else waited.get(seq.seq_id, 0) + 1
        assert waited[seq.seq_id] < scheduler.max_num_seqs, "everyone who runs advances, in turns"
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


def test_a_chat_passes_a_long_prompt() -> None:
    scheduler = make(num_blocks=1024, size=16, budget=128)
    long, chat = sequence(0, 8000), sequence(1, 90)
    scheduler.add(long)
    advance(scheduler, scheduler.schedule())
    scheduler.add(chat)
    steps = 0
    while chat.num_output == 0:
        batch = scheduler.schedule()
        assert long in [seq for seq, _ in batch]
        advance(scheduler, batch)
        steps += 1
    assert steps == 2
    assert long.num_computed >= 128 + 2 * 64 - 31


def test_newcomers_do_not_starve_a_long_prompt() -> None:
    """Little is computed in a step, and there is always a short prompt that has just come."""
    scheduler = make(num_blocks=4096, size=16, seqs=8, budget=40)
    scheduler.target = Fixed(32)  # type: ignore[assignment]
    long = sequence(0, 640)
    scheduler.add(long)
    for step in range(1, 200):
        scheduler.add(sequence(step, 30))
        batch = scheduler.schedule()
        advance(scheduler, batch)
        for seq, _ in batch:
            if seq is not long and seq.num_output == 2:
                scheduler.finish(seq)
        if long.num_output:
            break
    assert step <= 8 * 20 + 8


class Fixed:
    """A target that allows the same number of tokens in each step."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def chunk(self, rows: int, most: int) -> int:
        return min(self.tokens, most)


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.integers(1, 9000), min_size=1, max_size=40),
    st.integers(1, 600),
    st.integers(0, 100),
)
def test_every_prompt_has_its_share(remaining: list[int], budget: int, beyond: int) -> None:
    counts = shares(remaining, budget, budget + beyond)
    assert sum(counts) <= budget + min(beyond, 31)
    assert all(0 <= count <= rest for count, rest in zip(counts, remaining, strict=True))
    had = [i for i, count in enumerate(counts) if count]
    assert had[0] == 0, "whoever is first in the order of turns advances"
    in_turn = next((i for i, count in enumerate(counts) if not count), len(counts))
    equal = budget // max(in_turn, 1)
    for count, rest in zip(counts[:in_turn], remaining, strict=False):
        assert count >= min(rest, equal) - 31
    if sum(counts) < budget - 31 * len(had):
        assert all(rest - count == 0 or rest - count >= 32 for count, rest in zip(counts, remaining))
        assert len(had) == len(counts) or budget - sum(counts) < 64
    if budget >= 64 and beyond >= 31:
        for count, rest in zip(counts, remaining, strict=True):
            assert count in (0, rest) or (count >= 32 and rest - count >= 32)


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_prompts_that_arrive_at_random_all_advance(data: st.DataObject) -> None:
    budget = data.draw(st.integers(1, 300))
    lengths = data.draw(st.lists(st.integers(1, 2000), min_size=1, max_size=12))
    arrivals = data.draw(st.lists(st.integers(0, 20), min_size=len(lengths), max_size=len(lengths)))
    scheduler = make(num_blocks=2048, size=16, seqs=12, budget=max(budget, 12))
    scheduler.target = Fixed(budget)  # type: ignore[assignment]
    seqs = [sequence(i, length) for i, length in enumerate(lengths)]
    waited = dict.fromkeys(range(len(seqs)), 0)
    for step in range(20000):
        for i, at in enumerate(sorted(arrivals)):
            if at == step:
                scheduler.add(seqs[i])
        batch = scheduler.schedule()
        assert sum(count for _, count in batch) <= scheduler.max_num_batched_tokens
        computed = {seq.seq_id for seq, _ in batch}
        prompts = sum(seq.num_output == 0 for seq in scheduler.running)
        for seq in scheduler.running:
            waited[seq.seq_id] = 0 if seq.seq_id in computed else waited[seq.seq_id] + 1
            assert waited[seq.seq_id] <= len(seqs) and (prompts > 1 or not waited[seq.seq_id])
        advance(scheduler, batch)
        for seq in [seq for seq in scheduler.running if seq.num_output == 3]:
            scheduler.finish(seq)
        if step > 20 and not scheduler.has_work:
            break
    assert all(seq.status is Status.FINISHED for seq in seqs)


def test_the_same_beginning_is_computed_once() -> None:
    scheduler = make(num_blocks=512, size=16, budget=256)
    first, second = sequence(0, 1000, token=5), sequence(1, 900, token=5)
    other = sequence(2, 40)
    for seq in (first, second, other):
        scheduler.add(seq)
    computed = 0
    while not second.num_output:
        batch = scheduler.schedule()
        computed += sum(count for _, count in batch)
        advance(scheduler, batch)
        assert other.num_output, "nobody else waits for it"
    assert second.num_cached == 896
    assert computed < 1000 + 40 + 4 + 20


def test_a_beginning_that_is_given_up_is_not_waited_for() -> None:
    scheduler = make(num_blocks=512, size=16, budget=256)
    first, second = sequence(0, 1000, token=5), sequence(1, 900, token=5)
    scheduler.add(first)
    scheduler.add(second)
    advance(scheduler, scheduler.schedule())
    assert second.held_back
    scheduler.finish(first)
    assert second in [seq for seq, _ in scheduler.schedule()]


@pytest.mark.parametrize(
    ("a", "b", "same"), [([], [1], 0), ([1, 2], [1, 2], 2), ([1, 2, 3], [1, 2, 4, 5], 2)]
)
def test_common_length(a: list[int], b: list[int], same: int) -> None:
    assert common_length(a, b) == common_length(b, a) == same
