"""How the prompts that are being computed share a step: numbers only."""

from __future__ import annotations

# Tokens; kernels compute pieces below in another order, and their last bits would tell of the cut.
_SHORT = 32
_SHARE = 2 * _SHORT  # the least that a turn gives, so that a piece and what it leaves are both not short


def shares(remaining: list[int], budget: int, most: int) -> list[int]:
    """How many tokens of each prompt a step takes, 0 where it is not its turn; ``remaining`` in the order of turns.

    As many prompts as get _SHARE tokens each, one at least, have equal shares of ``budget``; what one does not need
    goes to the others. A share is cut by up to _SHORT - 1 tokens where it would leave a short piece. ``most``: what the
    shares may come to, where a few tokens beyond the budget finish a prompt whose rest would be short.
    """
    taken = [0] * len(remaining)
    left = budget
    turns = _turns(remaining, budget)
    for place, i in enumerate(sorted(turns, key=remaining.__getitem__)):
        share = left // (len(turns) - place)
        taken[i] = _piece(remaining[i], share, share)
        left -= taken[i]
    beyond = most - budget
    least = _SHORT if budget >= _SHORT else 1
    for i, rest in enumerate(remaining):
        if left <= 0:
            break
        count = _piece(rest, taken[i] + left, taken[i] + left + beyond)
        if taken[i] or count == rest or count >= least:
            left -= count - taken[i]
            taken[i] = count
    return taken


def _turns(remaining: list[int], budget: int) -> list[int]:
    """The first prompts that have room beside each other."""
    turns: list[int] = []
    needed = 0
    for i, rest in enumerate(remaining):
        needed += min(rest, _SHARE)
        if turns and needed > budget:
            break
        turns.append(i)
    return turns


def _piece(remaining: int, budget: int, most: int) -> int:
    """How many of a prompt's ``remaining`` tokens a step takes: what is left over is none or a piece that is not short,
    where the budget, or all of them within ``most``, allows it."""
    count = min(remaining, budget)
    missing = _SHORT - (remaining - count)
    if not 0 < missing < _SHORT:
        return count
    if count - missing >= _SHORT:
        return count - missing
    return remaining if remaining <= most else count
