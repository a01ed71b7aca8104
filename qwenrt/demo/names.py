"""Names of people and of things that nobody has, made up so that they are learned to be copied, not known by heart."""

# ruff: noqa: SIM905
from __future__ import annotations

import random

from qwenrt.demo import facts

_ONSETS = (
    "b br c ch cl cr d dr f fl fr g gl gr h j k kl kr l m n p ph pl pr qu r rh s sc sh sk sl sm sn sp st str t th tr "
    "v w wh y z"
).split()
_NUCLEI = "a a a e e e i i i o o u ai au ea ee ei eo ia ie io oa oe oo ou ua y".split()
_CODAS = (
    "b c ck d f g k l ll lf ld lt m n nd ng nn nt p r rd rl rn rs rt s sh ss st t th tt v w x y z".split()
)


def english_name(rng: random.Random) -> str:
    """A name for training: a real one, or one of three ways to make one up; never a name of the test."""
    makers = (_listed, _crossed, _crossed, _sliced, _sliced, _spelled, _spelled)
    while True:
        name = rng.choice(makers)(rng)
        if 2 <= len(name) <= 9 and name not in facts.NAMES_EN_TEST:
            return name


def _listed(rng: random.Random) -> str:
    return rng.choice(facts.NAMES_EN)


def _crossed(rng: random.Random) -> str:
    """The front of one name and the back of another."""
    front, back = rng.choice(facts.NAMES_EN), rng.choice(facts.NAMES_EN)
    return front[: rng.randrange(1, len(front))] + back[rng.randrange(1, len(back)) :]


def _sliced(rng: random.Random) -> str:
    """Two or three slices of words of the world: every way of spelling that its vocabulary knows."""
    return sliced_word(rng).capitalize()


def _spelled(rng: random.Random) -> str:
    """Syllables of all kinds."""
    syllables = [
        rng.choice((*_ONSETS, "")) + rng.choice(_NUCLEI) + rng.choice((*_CODAS, "", "", "", ""))
        for _ in range(rng.choice((1, 2, 2, 2, 3)))
    ]
    return ("".join(syllables) + rng.choice(("", "", "", "a", "e", "y"))).capitalize()


def sliced_word(rng: random.Random) -> str:
    """Two or three slices of words of the world, in lower case."""
    words = [w for c in facts.CAPITALS for w in c[:2]] + [a[0] for a in facts.ANIMALS] + facts.NAMES_EN
    parts = []
    for _ in range(rng.choice((2, 2, 3))):
        word = rng.choice(words).replace(" ", "").lower()
        start = rng.randrange(max(1, len(word) - 2))
        parts.append(word[start : start + rng.choice((1, 2, 2, 3, 4))])
    return "".join(parts)
