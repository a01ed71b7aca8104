"""Kernels in Gluon on a CPU: their own code, over other names. Layouts mean nothing here, as every conversion between
them is asserted to move nothing when a kernel is compiled; what is left is a program of tensors.

It looks at what no device tells: every address lies inside its tensor, no place is written twice in a launch, and of a
kernel that may begin before its predecessor has ended, nothing but weights is read before it waits.
"""

from __future__ import annotations

import itertools
import re
import types
from typing import Any

import torch
from triton.experimental.gluon._runtime import GluonJITFunction

_EARLY = ("w_ptr",)  # what may be read before a kernel waits for the one before it


class Tensor(torch.Tensor):
    """What a kernel computes with: never changed in place."""

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> Any:
        return self.contiguous().view(dtype) if bitcast else super().to(dtype)

    def __iadd__(self, other: Any) -> Any:
        return self + other

    def __isub__(self, other: Any) -> Any:
        return self - other

    def __imul__(self, other: Any) -> Any:
        return self * other


class Memory:
    """A tensor that a pointer leads to, and which of its numbers were written."""

    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        assert tensor.is_contiguous(), f"{name} does not lie in one piece"
        self.name, self.numbers = name, tensor.view(-1)
        self.written = torch.zeros(tensor.numel(), dtype=torch.bool)


class Pointer:
    """Places in a memory."""

    def __init__(self, memory: Memory, offset: Any = 0) -> None:
        self.memory, self.offset = memory, offset
        self.dtype = types.SimpleNamespace(element_ty=memory.numbers.dtype)

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.memory, self.offset + other)

    def places(self, mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(where, whether) of each number; whatever is not looked at is at 0."""
        where = torch.as_tensor(self.offset)
        asked = torch.ones_like(where, dtype=torch.bool) if mask is None else torch.as_tensor(mask)
        where, asked = torch.broadcast_tensors(where, asked)
        found = where[asked]
        outside = (found < 0) | (found >= len(self.memory.numbers))
        assert not bool(outside.any()), f"{self.memory.name} is read or written outside of it"
        return torch.where(asked, where, 0).long(), asked


def _instructions(text: str, value: torch.Tensor) -> torch.Tensor:
    """Those of PTX that kernels have, over int32: $1 is ``value``, $0 the result."""
    known = {"$1": value}

    def number(name: str) -> torch.Tensor:
        if name in known:
            return known[name]
        bits = int(name, 16)
        return torch.full_like(value, bits - (1 << 32) if bits >> 31 else bits)

    def halves(name: str, dtype: torch.dtype) -> torch.Tensor:
        return number(name).contiguous().view(dtype).float()

    for line in re.sub(r"[{}]|\.reg .*?;", "", text).split(";"):
        if not line.strip():
            continue
        what, rest = line.split(None, 1)
        to, *of = (word.strip() for word in rest.split(","))
        if what == "mov.b32":
            known[to] = number(of[0])
        elif what == "lop3.b32" and of[3] == "0xEA":
            known[to] = (number(of[0]) & number(of[1])) | number(of[2])
        elif what == "sub.f16x2":
            a, b = (halves(name, torch.float16) for name in of)
            known[to] = (a - b).half().view(torch.int32)
        elif what == "fma.rn.bf16x2":
            a, b, c = (halves(name, torch.bfloat16) for name in of)
            known[to] = (a * b + c).bfloat16().view(torch.int32)
        else:
            # whoever writes a kernel with another instruction gives it its meaning above: a guess would prove nothing
            raise ValueError(f"inline assembly that the shim has no meaning for: {line.strip()}")
    return known["$0"]


class Language(types.SimpleNamespace):
    """Gluon's language for one program."""

    constexpr, int16, int32, int64 = int, torch.int16, torch.int32, torch.int64
    float16, bfloat16, float32 = torch.float16, torch.bfloat16, torch.float32

    def __init__(self, program: tuple[int, ...], waits: bool) -> None:
        self._program, self.waiting = program, waits
        for layout in ("NVMMADistributedLayout", "DotOperandLayout", "BlockedLayout", "SliceLayout"):
            setattr(self, layout, lambda *_, **__: None)

    def program_id(self, axis: int) -> int:
        return self._program[axis]

    def load(self, at: Pointer, mask: Any = None, other: Any = 0, **_: Any) -> Any:
        assert not self.waiting or at.memory.name in _EARLY, f"{at.memory.name} is read too early"
        where, asked = at.places(mask)
        found = at.memory.numbers[where]
        return torch.where(asked, found, torch.as_tensor(other).to(found.dtype)).as_subclass(Tensor)

    def store(self, at: Pointer, value: Any, mask: Any = None) -> None:
        assert not self.waiting, f"{at.memory.name} is written too early"
        where, asked = at.places(mask)
        value = torch.broadcast_to(torch.as_tensor(value), where.shape)
        assert value.dtype == at.memory.numbers.dtype, f"{value.dtype} into {at.memory.name}"
        places = where[asked]
        assert len(places.unique()) == len(places), f"{at.memory.name} is written twice by one program"
        assert not bool(at.memory.written[places].any()), f"{at.memory.name} is written by two programs"
        at.memory.written[places] = True
        at.memory.numbers[places] = value[asked].as_subclass(torch.Tensor)

    def arange(self, first: int, end: int, layout: Any = None) -> Any:
        return torch.arange(first, end, dtype=torch.int32).as_subclass(Tensor)

    def full(self, shape: Any, value: float, dtype: torch.dtype, layout: Any = None) -> Any:
        return torch.full(tuple(shape), value, dtype=dtype).as_subclass(Tensor)

    def zeros(self, shape: Any, dtype: torch.dtype, layout: Any = None) -> Any:
        return self.full(shape, 0, dtype)

    def convert_layout(self, value: Any, layout: Any, assert_trivial: bool = False) -> Any:
        assert assert_trivial, "a conversion that may move numbers is not run here"
        return value

    def inline_asm_elementwise(self, text: str, constraints: str, values: Any, **_: Any) -> Any:
        return _instructions(text, values[0].as_subclass(torch.Tensor)).as_subclass(Tensor)

    minimum = staticmethod(lambda a, b: a.clamp(max=b))
    join = staticmethod(lambda a, b: torch.stack((a, b), -1))
    split = staticmethod(lambda a: (a[..., 0], a[..., 1]))
    where = staticmethod(torch.where)
    exp, rsqrt = staticmethod(torch.exp), staticmethod(torch.rsqrt)
    sum = staticmethod(lambda a, axis: a.sum(axis))


def _product(a: torch.Tensor, b: torch.Tensor, total: torch.Tensor) -> Any:
    assert a.dtype == b.dtype and a.shape[-1] == b.shape[-2], f"{a.dtype} {a.shape}, {b.dtype} {b.shape}"
    return a.float() @ b.float() + total


def run(
    kernel: Any, grid: tuple[int, ...], *args: Any, warps: int = 4, pdl: bool = False, **constants: Any
) -> None:
    """As kernels/launch.py: one program after the other."""
    memories = {
        arg.data_ptr(): Memory(name, arg)
        for name, arg in reversed([*zip(kernel.arg_names, args)])
        if isinstance(arg, torch.Tensor)
    }
    given = {
        name: Pointer(Memory(name, arg) if name in _EARLY else memories[arg.data_ptr()])
        if isinstance(arg, torch.Tensor)
        else arg
        for name, arg in zip(kernel.arg_names, args)
    }
    for program in itertools.product(*map(range, grid)):
        language = Language((*program, 0, 0), constants.get("PDL", False))
        names: dict[str, Any] = {"gl": language, "mma_v2": _product, "axis": lambda layout, kept: None}
        names["gdc_launch_dependents"] = lambda: None
        names["gdc_wait"] = lambda language=language: setattr(language, "waiting", False)
        names["range"] = range
        for name, value in kernel.fn.__globals__.items():
            if isinstance(value, GluonJITFunction):
                names[name] = types.FunctionType(value.fn.__code__, names, name, value.fn.__defaults__)
        types.FunctionType(kernel.fn.__code__, names, kernel.fn.__name__)(**given, **constants)
