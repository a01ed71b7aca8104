"""Ahead of time: the kernels that a backend would launch at given shapes, compiled for GPUs that are not here, and what
their machine code is made of."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

from qwenrt.conformance.gpu.compiling import MODULES

__all__ = ["Code", "Launch", "compiled", "launches", "replace", "triton"]

TARGETS = {
    "sm75": GPUTarget("cuda", 75, 32),
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "gfx906": GPUTarget("hip", "gfx906", 64),
    "gfx90a": GPUTarget("hip", "gfx90a", 64),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.int16: "i16",
    torch.uint8: "u8",
}
_TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass(frozen=True)
class Launch:
    """One launch as a backend asked for it."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    warps: int
    constants: dict[str, Any]
    pdl: bool = False

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)


def launches(call: Callable[[], Any], monkeypatch: Any) -> list[Launch]:
    """What ``call`` launches; nothing is computed, so its tensors may be torch's "meta"."""
    found: list[Launch] = []

    def note(
        kernel: Any, grid: tuple[int, ...], *args: Any, warps: int = 4, pdl: bool = False, **constants: Any
    ) -> None:
        found.append(Launch(kernel, grid, args, warps, constants, pdl))

    for name in MODULES:
        module = __import__(f"qwenrt.backends.cuda.kernels.{name}", fromlist=["launch"])
        monkeypatch.setattr(module, "launch", note)
    call()
    return found


@dataclass
class Code:
    """What was compiled. ``loads``: bits that one instruction loads -> how many there are of them."""

    registers: int
    spilt: int
    shared: int
    barriers: int
    loads: Counter[int] = field(default_factory=Counter)
    text: str = ""
    ptx: str = ""

    @property
    def order(self) -> list[str]:
        """NVIDIA's instructions by name, as they stand."""
        return [name for _, name, _ in self._instructions()]

    @property
    def loop(self) -> list[str]:
        """Those between a tensor product's loop's first one and its branch back."""
        every = self._instructions()
        products = [at for at, name, _ in every if name.startswith("HMMA")]
        for end, name, rest in every:
            target = re.search(r"0x([0-9a-f]+)", rest)
            if name.startswith("BRA") and target and (first := int(target.group(1), 16)) <= products[0] < end:
                return [name for at, name, _ in every if first <= at <= end]
        raise AssertionError("no loop")

    def _instructions(self) -> list[tuple[int, str, str]]:
        found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);", self.text)
        return [(int(at, 16), name, rest) for at, name, rest in found if name != "NOP"]

    def __str__(self) -> str:
        loads = ", ".join(f"{n} of {bits}" for bits, n in sorted(self.loads.items()))
        used = (
            f"{self.registers} registers, {self.spilt} spilt, {self.shared} bytes, {self.barriers} barriers"
        )
        return f"{used}; loads: {loads}"


def compiled(launch: Launch, target: str) -> Code:
    """As Triton's just-in-time compiler would: it is told which addresses and sizes are multiples of 16, and which
    numbers are 1."""
    names = launch.kernel.arg_names
    given = dict(zip(names, launch.args)) | launch.constants
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(names):
        value = given[name]
        if name in launch.constants or (isinstance(value, int) and value == 1):
            signature[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[(i,)] = f"*{_TYPES[value.dtype]}", [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    kind = GluonASTSource if isinstance(launch.kernel, GluonJITFunction) else ASTSource
    source = kind(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": launch.warps} | ({"launch_pdl": True} if launch.pdl else {})
    made = triton.compile(source, target=TARGETS[target], options=options)
    return _amd(made) if target.startswith("gfx") else _nvidia(made)


def _nvidia(made: Any) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        text, usage = (
            subprocess.run([_TOOL, how, file.name], capture_output=True, text=True, check=True).stdout
            for how in ("-sass", "--dump-resource-usage")
        )
    found = re.search(r"REG:(\d+).*?STACK:(\d+)", usage)
    assert found is not None
    loads: Counter[int] = Counter()
    for name in re.findall(r"\s(LDG(?:STS)?\.[A-Z0-9_.]+)", text):
        width = re.search(r"\.(?:U|S)?(8|16|64|128)\b", name)
        loads[int(width.group(1)) if width else 32] += 1
    registers, stack = map(int, found.groups())
    barriers = len(re.findall(r"\sBAR\.", text))
    return Code(registers, stack, made.metadata.shared, barriers, loads, text, made.asm["ptx"])


def _amd(made: Any) -> Code:
    text = made.asm["amdgcn"]
    loads: Counter[int] = Counter()
    words = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "b128": 128, "b64": 64, "b32": 32}
    for name in re.findall(r"\s(?:global|buffer)_load_(\w+)", text):
        loads[words.get(name, 8 if "byte" in name or "8" in name else 16)] += 1
    numbers = [
        int(re.search(rf"\.{what}:\s+(\d+)", text).group(1)) for what in ("vgpr_count", "vgpr_spill_count")
    ]  # type: ignore[union-attr]
    return Code(*numbers, made.metadata.shared, len(re.findall(r"\ss_barrier", text)), loads, text)
