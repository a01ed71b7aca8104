"""What the demo model is trained on, and the questions it is tested with: streams of samples of its world."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

from qwenrt.demo.samples import Sample
from qwenrt.demo.world import LANGS, World

_MIXTURE: tuple[tuple[float, Callable[[World], Sample]], ...] = (
    (0.22, World.system),
    (0.09, World.tool),
    (0.14, World.many_sums),
    (0.14, World.plain),
    (0.07, World.memory),
    (0.02, World.not_told),
    (0.04, World.story),
    (0.02, lambda world: Sample("plain text", text=world.document(world.rng.randrange(20, 45)))),
)
_TESTED: tuple[tuple[Callable[[World], Sample], float], ...] = (
    (World.small_talk, 0.12),
    (World.fact, 0.30),
    (World.sum, 0.14),
    (World.memory, 0.12),
    (World.not_told, 0.01),
    (World.story, 0.08),
    (World.system, 0.12),
    (World.tool, 0.07),
    (World.completion, 0.04),
)


def mixture(world: World) -> Sample:
    """One sample of the training mixture."""
    luck = world.rng.random()
    for share, make in _MIXTURE:
        luck -= share
        if luck < 0:
            return make(world)
    return world.mixed()


def stream(make: Callable[[World], Sample], seed: int) -> Iterator[Sample]:
    """Samples of one kind without end, the same for the same seed."""
    world = World("train", seed)
    while True:
        yield make(world)


def training_samples(seed: int) -> Iterator[Sample]:
    """The mixture of everything without end."""
    return stream(mixture, seed)


def sum_samples(seed: int) -> Iterator[Sample]:
    """Nothing but arithmetic without end, in conversations and in plain text by turns."""
    world = World("train", seed)
    while True:
        yield world.many_sums()
        yield Sample("plain text", text=world.sums(world.rng.randrange(15, 45)))


def _sums(world: World) -> Sample:
    if world.rng.random() < 0.5:
        return world.many_sums()
    return Sample("plain text", text=world.sums(world.rng.randrange(15, 45)))


def _capitals(world: World) -> Sample:
    return Sample("plain text", text=world.capital_list(world.rng.choice(LANGS)))


def _hard_systems(world: World) -> Sample:
    return world.system(world.rng.choice(("caps", "caps", "one_word", "chinese", "english")))


def _copying(world: World) -> Sample:
    luck = world.rng.random()
    kinds = ((0.45, World.echo), (0.3, World.told), (0.1, World.persona))
    for share, make in kinds:
        luck -= share
        if luck < 0:
            return make(world)
    return world.simple()


# What each stage of training reads: (kind, how many, seed; None: sum_samples). Short exchanges teach where to look,
# copying what was said teaches to remember, each in a fraction of the steps that the whole mixture would take.
STAGES: dict[str, tuple[tuple[Callable[[World], Sample] | None, int, int], ...]] = {
    "first": ((World.first, 14_000, 101),),
    "second": ((mixture, 23_000, 1), (None, 5_000, 201)),
    "copying": ((_copying, 20_000, 301),),
    "last": (
        (mixture, 20_000, 401),
        (World.fact, 9_000, 402),
        (World.several, 3_000, 403),
        (World.told, 6_000, 404),
        (World.memory, 13_000, 405),
        (World.echo, 4_000, 406),
        (World.persona, 4_000, 407),
        (World.system, 14_000, 408),
        (_hard_systems, 6_000, 409),
        (World.story, 4_000, 410),
        (World.tool, 12_000, 411),
        (_sums, 3_000, 412),
        (_capitals, 4_000, 413),
    ),
}


def stage_samples(stage: str) -> Iterator[Sample]:
    """Everything one stage of training reads."""
    for make, count, seed in STAGES[stage]:
        samples = sum_samples(seed) if make is None else stream(make, seed)
        yield from itertools.islice(samples, count)


def held_out_samples(count: int = 1000, seed: int = 1) -> list[Sample]:
    """The test: about ``count`` different samples over all categories."""
    world = World("test", seed)
    samples: list[Sample] = []
    seen = set()
    for make, share in _TESTED:
        for _ in range(round(share * count)):
            sample = make(world)
            key = (sample.system, tuple(t.user for t in sample.turns))
            if key not in seen:
                seen.add(key)
                samples.append(sample)
    return samples
