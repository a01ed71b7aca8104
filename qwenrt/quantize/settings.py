"""What a caller of `quantize` may choose, checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from qwenrt.arguments import as_integer, as_number, flag
from qwenrt.errors import RequestError, shown
from qwenrt.quantize.hessian import CAP
from qwenrt.quantize.solver import ActOrder, Grid

Method = Literal["gptq", "awq", "rtn"]
BITS, GROUP_SIZES = (4, 8), (32, 64, 128, -1)
SELF = "self"


@dataclass(frozen=True)
class QuantizeSettings:
    """How a checkpoint is quantised.

    method: "gptq" makes up for each weight's error in the weights after it, "awq" multiplies weights of large inputs up
    before they are rounded, "rtn" rounds to nearest and needs no texts.
    bits: 4 or 8 (awq: 4). group_size: inputs that share a scale, 32, 64, 128 or -1 for all.
    sym: the middle code is zero, which most kernels of other programs want; False is a little closer to the weights.
    None is False for awq, else True.
    act_order: "static" rounds the inputs that matter most first and leaves the groups where they are, "full" groups
    them in that order (AutoGPTQ's desc_act), "off" takes them as they come.
    damp: share of the mean of the Hessian's diagonal that is added to it. cap: a token weighs at most as if its norm
    were so many times the median; 0 weighs all alike. clip: try shares of each group's range.
    sequential: calibrate each linear on what the rounded ones before it in its layer make; False is faster.
    samples, sample_length: so many texts of at most so many tokens calibrate, and one in 16 of them, but four at least,
    measures only.
    """

    method: Method = "gptq"
    bits: int = 4
    group_size: int = 128
    sym: bool | None = None
    act_order: ActOrder = "static"
    damp: float = 0.01
    cap: float = CAP
    clip: bool = True
    sequential: bool = True
    samples: int = 128
    sample_length: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        _one_of("method", self.method, get_args(Method))
        _one_of("act_order", self.act_order, get_args(ActOrder))
        _one_of("bits", self.bits, BITS)
        _one_of("group_size", self.group_size, GROUP_SIZES)
        if self.sym is None:
            object.__setattr__(self, "sym", self.method != "awq")
        if self.method == "awq" and self.bits != 4:
            raise _bad("bits", self.bits, 'AWQ\'s format has 4 bits: use 4, or method="gptq".')
        for name in ("sym", "clip", "sequential"):
            object.__setattr__(self, name, flag(name, getattr(self, name)))
        for name, least, most in (("samples", 5, 2**20), ("sample_length", 16, 2**20), ("seed", 0, 2**31)):
            whole = as_integer(getattr(self, name))
            if whole is None or not least <= whole <= most:
                raise _bad(name, getattr(self, name), f"Use an integer from {least} to {most}.")
            object.__setattr__(self, name, whole)
        for name, low, high in (("damp", 1e-4, 0.1), ("cap", 0.0, 1e6)):
            number = as_number(getattr(self, name))
            if number is None or not low <= number <= high:
                raise _bad(name, getattr(self, name), f"Use a number from {low:g} to {high:g}.")
            object.__setattr__(self, name, number)

    @property
    def grid(self) -> Grid:
        return Grid(self.bits, self.group_size, bool(self.sym), self.clip)

    @property
    def calibrates(self) -> bool:
        """Whether the texts decide anything."""
        return self.method != "rtn"


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if isinstance(value, bool) or value not in allowed:
        raise _bad(name, value, f"Use {', '.join(map(str, allowed[:-1]))} or {allowed[-1]}.")


def _bad(name: str, value: object, remedy: str) -> RequestError:
    return RequestError(f"quantising with {name}={shown(value)}", "not a value it can have", remedy)
