"""Blocks: none lost, none doubly owned, shared ones found by content alone."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from qwenrt.engine.block_manager import BlockManager
from qwenrt.engine.sequence import Sequence
from qwenrt.sampling_params import SamplingParams


def sequence(seq_id: int, ids: list[int], alpha: int = 1) -> Sequence:
    return Sequence(seq_id, ids, SamplingParams(), ntk_alpha=alpha, request_id=str(seq_id))


def compute(manager: BlockManager, seq: Sequence) -> None:
    seq.num_computed = seq.num_stored = len(seq.token_ids)
    manager.commit(seq)


def test_a_prefix_is_shared_but_its_last_token_is_computed() -> None:
    manager = BlockManager(8, 4)
    first = sequence(0, list(range(8)))
    assert manager.admit(first)
    compute(manager, first)
    again, longer = sequence(1, list(range(8))), sequence(2, [*range(8), 9])
    assert manager.admit(again) and manager.admit(longer)
    assert again.num_computed == 4, "the second block holds the last token: not shared"
    assert longer.num_computed == 8
    assert longer.block_table[:2] == first.block_table
    assert again.block_table[0] == first.block_table[0] and again.block_table[1] != first.block_table[1]
    assert manager._users[first.block_table[0]] == 3


def test_another_ntk_factor_is_another_prefix() -> None:
    manager = BlockManager(8, 4)
    first = sequence(0, list(range(8)), alpha=1)
    manager.admit(first)
    compute(manager, first)
    other = sequence(1, list(range(8)), alpha=3)
    manager.admit(other)
    assert other.num_computed == 0


def test_equal_hashes_of_different_tokens_do_not_meet() -> None:
    colliding = 2**61 - 1  # hash(2**61 - 1) == hash(0)
    assert hash((0, 0, 0, 0)) == hash((colliding,) * 4)
    manager = BlockManager(8, 4)
    first = sequence(0, [0] * 5)
    manager.admit(first)
    compute(manager, first)
    other = sequence(1, [colliding] * 5)
    manager.admit(other)
    assert other.num_computed == 0


def test_the_same_tokens_behind_another_prefix_are_another_block() -> None:
    manager = BlockManager(8, 2)
    first = sequence(0, [1, 2, 3, 4, 5])
    manager.admit(first)
    compute(manager, first)
    other = sequence(1, [9, 9, 3, 4, 5])
    manager.admit(other)
    assert other.num_computed == 0


def test_least_recently_used_goes_first_and_ends_before_beginnings() -> None:
    manager = BlockManager(4, 2)
    for i, start in enumerate((10, 20)):
        seq = sequence(i, [start, start + 1, start + 2, start + 3])
        manager.admit(seq)
        compute(manager, seq)
        manager.free(seq)
    assert manager.num_free == 4 and manager.num_findable == 4
    manager.admit(sequence(2, [99]))  # takes one block: the end of the older sequence
    older, newer = sequence(3, [10, 11, 12, 13, 0]), sequence(4, [20, 21, 22, 23, 0])
    assert len(manager._match(older)) == 1
    assert len(manager._match(newer)) == 2


def asked(manager: BlockManager, seq_id: int, ids: list[int]) -> int:
    """A prompt comes, is computed and goes -> how many of its tokens were found."""
    seq = sequence(seq_id, ids)
    assert manager.admit(seq)
    found = seq.num_computed
    compute(manager, seq)
    manager.free(seq)
    return found


def test_side_requests_do_not_drive_out_the_conversation_that_goes_on() -> None:
    """An agent's conversation of 20,000 tokens beside its many small requests, in a cache of 1.3 times as much."""
    size, main = 16, list(range(20000))
    manager = BlockManager(26000 // size, size)
    asked(manager, 0, main)
    asked(manager, 1, [90001] * 300)  # the title
    turn = 2
    for after in range(5):
        main += [100000 + 500 * after + i for i in range(500)]
        found = asked(manager, turn, main)
        assert found >= len(main) - 500 - 2 * size, "a turn computes what is new"
        turn += 1
        for _ in range(4):
            asked(manager, turn, [10**6 + turn * 1000 + i for i in range(1000)])
            turn += 1
    for _ in range(50):  # the tool takes its time
        asked(manager, turn, [10**6 + turn * 1000 + i for i in range(1000)])
        turn += 1
    assert asked(manager, turn, [*main, 5]) >= len(main) - 500 - 2 * size


def test_side_requests_that_share_the_preamble_leave_the_conversation() -> None:
    size, preamble = 16, list(range(8000))
    manager = BlockManager(26000 // size, size)
    main = [*preamble, *range(50000, 62000)]
    asked(manager, 0, main)
    asked(manager, 1, [*main, 1, 2, 3])
    for turn in range(2, 60):
        assert asked(manager, turn, [*preamble, *[10**6 + turn * 1000 + i for i in range(1000)]]) == 8000
    assert asked(manager, 99, [*main, 1, 2, 3, 4]) >= len(main) - size


def test_a_conversation_that_has_ended_makes_room() -> None:
    size = 16
    manager = BlockManager(26000 // size, size)
    for turn in range(3):
        asked(manager, turn, list(range(24000)))
    for conversation in range(1, 4):
        words = [10**6 * conversation + i for i in range(20000)]
        asked(manager, 10 * conversation, words)
        assert asked(manager, 10 * conversation + 1, [*words, 1]) == 20000


def test_siblings_of_one_request_are_one_use() -> None:
    manager = BlockManager(8, 2)
    for index in range(3):
        seq = Sequence(index, [1, 2, 3], SamplingParams(), request_id="same", index=index)
        manager.admit(seq)
        compute(manager, seq)
        manager.free(seq)
    asked(manager, 7, [4, 5, 6])
    asked(manager, 8, [4, 5, 6])
    for i in range(6):
        asked(manager, 20 + i, [50 + i, 1, 1])
    assert asked(manager, 40, [4, 5, 6]) == 2, "used by two requests"
    assert asked(manager, 41, [1, 2, 3]) == 0, "used by one"


def test_distrusted_blocks_are_not_found_again() -> None:
    manager = BlockManager(4, 2)
    seq = sequence(0, [1, 2, 3, 4])
    manager.admit(seq)
    compute(manager, seq)
    manager.forget(seq)
    manager.free(seq)
    assert manager.num_free == 4 and manager.num_findable == 0
    assert not manager._match(sequence(1, [1, 2, 3, 4, 5]))


def test_admission_leaves_the_reserve_alone() -> None:
    manager = BlockManager(4, 2)
    assert not manager.admit(sequence(0, [1, 2, 3]), reserve=3)
    assert manager.num_free == 4
    assert manager.admit(sequence(1, [1, 2, 3]), reserve=2)


def check(manager: BlockManager, held: list[Sequence], size: int) -> None:
    """Each block has as many users as tables it is in; the rest is free; no two sequences write one block."""
    counts = [0] * manager.num_blocks
    for seq in held:
        assert len(seq.block_table) == len(set(seq.block_table))
        for block in seq.block_table:
            counts[block] += 1
    assert counts == [manager._users[block] for block in range(manager.num_blocks)]
    assert manager.num_free == counts.count(0)
    for seq in held:
        for block in seq.block_table[seq.num_computed // size :]:
            assert counts[block] == 1, "a block that is still written to is shared"


class Lives:
    """Sequences that come, grow, are computed and go, and what each block holds by then."""

    def __init__(self, data: st.DataObject) -> None:
        self.draw = data.draw
        self.size = self.draw(st.integers(1, 4))
        self.manager = BlockManager(self.draw(st.integers(1, 12)), self.size, self.draw(st.booleans()))
        self.held: list[Sequence] = []
        self.contents: dict[int, tuple[int, ...]] = {}

    def admit(self, seq_id: int) -> None:
        seq = sequence(seq_id, self.draw(st.lists(st.integers(0, 1), min_size=1, max_size=12)))
        free = self.manager.num_free
        if not self.manager.admit(seq):
            assert self.manager.num_free == free and not seq.block_table
            return
        self.held.append(seq)
        assert seq.num_computed < len(seq.token_ids)
        for i, block in enumerate(seq.block_table[: seq.num_computed // self.size]):
            assert self.contents[block] == tuple(seq.token_ids[: (i + 1) * self.size])

    def change(self, action: str) -> None:
        seq = self.draw(st.sampled_from(self.held))
        if action == "grow" and seq.num_remaining == 0:
            seq.token_ids.append(self.draw(st.integers(0, 1)))
            if not self.manager.grow(seq):
                seq.token_ids.pop()
        elif action == "compute":
            for i in range(seq.num_computed // self.size, len(seq.block_table)):
                self.contents[seq.block_table[i]] = tuple(seq.token_ids[: (i + 1) * self.size])
            compute(self.manager, seq)
        elif action in ("free", "forget"):
            if action == "forget":
                self.manager.forget(seq)
            self.manager.free(seq)
            self.held.remove(seq)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_random_lives_lose_no_block(data: st.DataObject) -> None:
    lives = Lives(data)
    for step in range(data.draw(st.integers(1, 40))):
        action = data.draw(st.sampled_from(["admit", "admit", "grow", "compute", "free", "forget"]))
        if action == "admit":
            lives.admit(step)
        elif lives.held:
            lives.change(action)
        check(lives.manager, lives.held, lives.size)
    for seq in lives.held:
        lives.manager.free(seq)
    assert lives.manager.num_free == lives.manager.num_blocks
