"""What the demo model is trained on, and the questions it is tested with: streams of samples of its world."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from qwenrt.demo.world import Sample, World

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


def _mixed(world: World) -> Sample:
    """One sample of the training mixture."""
    luck = world.rng.random()
    for share, make in _MIXTURE:
        luck -= share
        if luck < 0:
            return make(world)
    return world.mixed()


def first_samples(seed: int) -> Iterator[Sample]:
    """The first stage of training without end: short exchanges."""
    world = World("train", seed)
    while True:
        yield world.first()


def sum_samples(seed: int) -> Iterator[Sample]:
    """Nothing but arithmetic without end: what needs the most practice."""
    world = World("train", seed)
    while True:
        yield world.many_sums()
        yield Sample("plain text", text=world.sums(world.rng.randrange(15, 45)))


def training_samples(seed: int) -> Iterator[Sample]:
    """Training without end, the same for the same seed."""
    world = World("train", seed)
    while True:
        yield _mixed(world)


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
