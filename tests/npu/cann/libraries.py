"""The shared libraries that torch_npu's wheel wants, made of stand_in.c and of the names in the wheel itself.

`python -m tests.npu.cann.libraries DIRECTORY WHEEL`, WHEEL being the unpacked wheel's directory;
needs a C compiler and nm.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from tests.npu.wheels import compiled, undefined

WITH_CODE = ("libascendcl", "libacl_op_compiler")
EMPTY = ("libge_runner", "libgraph", "libacl_tdt_channel")
# Operators are found by name when they are first called: each tells its name to a hook that a test may set.
_OPAPI = """#include <stdlib.h>
static void (*hook)(const char *) = 0;
void stand_in_hook(void (*h)(const char *)) { hook = h; }
int aclDestroyAclOpExecutor(void *p) { return 0; }
"""
_CREATED = ("Tensor", "Scalar", "IntArray", "BoolArray", "FloatArray", "TensorList", "ScalarList")


def build(directory: Path, wheel: Path) -> None:
    """Write the libraries into ``directory``."""
    directory.mkdir(parents=True, exist_ok=True)
    source = Path(__file__).with_name("stand_in.c").read_text(encoding="utf-8")
    library = wheel / "torch_npu" / "lib" / "libtorch_npu.so"
    for name in WITH_CODE:
        compiled(directory / f"{name}.so", source, "c")
    for name in EMPTY:
        compiled(directory / f"{name}.so", f"int {name}_is_a_stand_in;", "c")
    compiled(directory / "libhccl.so", _hccl(library), "c")
    compiled(directory / "libopapi.so", _opapi(library.read_bytes()), "c")
    wanted = sorted({symbol.decode() for symbol in re.findall(rb"_ZN3atb[A-Za-z0-9_]+", _other(wheel))})
    compiled(directory / "libatb.so", "\n".join(f"int {name}(void) {{ return 1; }}" for name in wanted), "c")


def _hccl(library: Path) -> str:
    """What is between ranks, of which releases link some by name: not supported (5)."""
    names = sorted(name for name in undefined(library) if name.startswith("Hccl"))
    return "\n".join(["int libhccl_is_a_stand_in;", *(f"int {name}(void) {{ return 5; }}" for name in names)])


def _other(wheel: Path) -> bytes:
    """The library for ATB, which releases have under one name or another."""
    found = [path for path in (wheel / "torch_npu" / "lib").glob("*.so") if "atb" in path.name]
    return b"".join(path.read_bytes() for path in found)


def _opapi(library: bytes) -> str:
    names = {match.decode() for match in re.findall(rb"aclnn[A-Z][A-Za-z0-9_]{3,}", library)}
    names = {name.removesuffix("GetWorkspaceSize") for name in names}
    lines = [_OPAPI]
    for name in sorted(names):
        lines.append(f"int {name}GetWorkspaceSize(void) {{ return 0; }}")
        lines.append(f'int {name}(void) {{ if (hook) hook("{name}"); return 0; }}')
    for kind in _CREATED:
        lines.append(f"void *aclCreate{kind}(void) {{ return malloc(8); }}")
        lines.append(f"int aclDestroy{kind}(void *p) {{ free(p); return 0; }}")
    return "\n".join(lines)


if __name__ == "__main__":
    build(Path(sys.argv[1]), Path(sys.argv[2]))
