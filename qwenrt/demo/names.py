"""Names that nobody has, made up so that a name is learned to be copied rather than known by heart."""

from __future__ import annotations

import random

from qwenrt.demo import facts


def crossed_name(rng: random.Random) -> str:
    """The front of one name and the back of another: spelled like a name, and known by nobody."""
    front, back = rng.choice(facts.NAMES_EN), rng.choice(facts.NAMES_EN)
    name = front[: rng.randrange(1, len(front))] + back[rng.randrange(1, len(back)) :]
    return name if name not in facts.NAMES_EN_TEST else crossed_name(rng)


def sliced_name(rng: random.Random) -> str:
    """Two slices of words of the world: every way of spelling that its vocabulary knows."""
    words = [w for c in facts.CAPITALS for w in c[:2]] + [a[0] for a in facts.ANIMALS] + facts.NAMES_EN
    parts = []
    for _ in range(rng.choice((2, 2, 3))):
        word = rng.choice(words).replace(" ", "").lower()
        start = rng.randrange(max(1, len(word) - 2))
        parts.append(word[start : start + rng.choice((1, 2, 2, 3, 4))])
    name = "".join(parts).capitalize()
    return name if name not in facts.NAMES_EN_TEST else sliced_name(rng)


def made_up_name(rng: random.Random) -> str:
    """A name nobody has, so that names are learned to be copied rather than known by heart."""
    syllables = "".join(
        rng.choice("bdfghjklmnprstvwz") + rng.choice("aeiou") for _ in range(rng.choice((2, 2, 3)))
    )
    name = (syllables + rng.choice(("", "", "n", "s", "r", "l", "x"))).capitalize()
    return name if name not in facts.NAMES_EN_TEST else made_up_name(rng)
