"""Which Ascend processor this is, by the integer that its driver gives, and what that family is known to have."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Processors that want the same code. ``bfloat16``: whether they compute in it; ``saturates``: whether a number too
    large becomes the largest one instead of infinity."""

    name: str
    first: int
    last: int
    bfloat16: bool
    saturates: bool


# torch.npu.get_soc_version(). Names mislead: "Ascend910B" is a 910A (104); what is called 910B is 220 to 225.
FAMILIES = (
    Family("910A", 100, 104, False, True),
    Family("310P", 200, 205, False, True),
    Family("A2", 220, 225, True, False),
    Family("A3", 250, 256, True, False),
)
UNKNOWN = Family("unknown", -1, -1, False, False)


def family_of(soc: int) -> Family:
    """The family of a processor's number, UNKNOWN where it is none of those that this project has code for."""
    return next((family for family in FAMILIES if family.first <= soc <= family.last), UNKNOWN)
