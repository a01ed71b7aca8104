"""The shared libraries that torch_npu's wheel wants, made of stand_in.c and of the names in the wheel itself.

`python libraries.py DIRECTORY WHEEL`, WHEEL being the unpacked wheel's directory; needs a C compiler.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

WITH_CODE = ("libascendcl", "libacl_op_compiler")
EMPTY = ("libhccl", "libge_runner", "libgraph", "libacl_tdt_channel")
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
    library = (wheel / "torch_npu" / "lib" / "libtorch_npu.so").read_bytes()
    for name in WITH_CODE:
        _compile(directory, name, source)
    for name in EMPTY:
        _compile(directory, name, f"int {name}_is_a_stand_in;")
    _compile(directory, "libopapi", _opapi(library))
    wanted = sorted({symbol.decode() for symbol in re.findall(rb"_ZN3atb[A-Za-z0-9_]+", _other(wheel))})
    _compile(directory, "libatb", "\n".join(f"int {name}(void) {{ return 1; }}" for name in wanted))


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


def _compile(directory: Path, name: str, source: str) -> None:
    flags = ["-O1", "-w", "-shared", "-fPIC", "-x", "c", "-", f"-Wl,-soname,{name}.so"]
    subprocess.run(["cc", *flags, "-o", str(directory / f"{name}.so")], input=source, text=True, check=True)


if __name__ == "__main__":
    build(Path(sys.argv[1]), Path(sys.argv[2]))
