"""The measuring kernels compile ahead of time, where there is a Triton: no device is needed for that."""

from __future__ import annotations

from typing import Any

import pytest

triton = pytest.importorskip("triton")

READ = {"x": "*i32", "out": "*i32"}, {"BLOCK": 4096, "STEPS": 16}, {"num_warps": 8}


def compiled(name: str, signature: dict[str, str], constants: dict[str, Any], **options: Any) -> str:
    """A kernel's PTX for sm_90, its pointers aligned as torch's are."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from qwenrt.conformance.gpu import kernels

    names = [*signature, *constants]
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(signature))}
    values = {(names.index(name),): value for name, value in constants.items()}
    kinds = signature | dict.fromkeys(constants, "constexpr")
    source = ASTSource(getattr(kernels, name), kinds, values, aligned)
    text: str = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    return text


def test_the_reading_kernel_loads_sixteen_bytes_at_a_time() -> None:
    text = compiled("_read", READ[0], READ[1], **READ[2])
    assert text.count("ld.global.v4") >= 4 and "ld.global.b32" not in text


@pytest.mark.parametrize("pdl", [False, True])
def test_chained_kernels_wait_for_the_one_before(pdl: bool) -> None:
    options = {"num_warps": 4, **({"launch_pdl": True} if pdl else {})}
    for name, constants in (("_empty", {}), ("_dependent", {"BLOCK": 1024, "STEPS": 2})):
        text = compiled(name, {"x": "*i32"}, {**constants, "PDL": pdl}, **options)
        assert text.count("griddepcontrol") == 2 * pdl
