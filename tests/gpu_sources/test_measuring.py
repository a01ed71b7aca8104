"""The chained kernels that launches are measured with, compiled ahead of time."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.gpu_sources


def compiled(name: str, signature: dict[str, str], constants: dict[str, Any], **options: Any) -> str:
    """A kernel's PTX for sm_90, its pointers aligned as torch's are."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from qwenrt.conformance.gpu import kernels

    names = [*signature, *constants]
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(signature))}
    values = {(names.index(name),): value for name, value in constants.items()}
    kinds = signature | dict.fromkeys(constants, "constexpr")
    source = ASTSource(getattr(kernels, name), kinds, values, aligned)
    text: str = compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    return text


@pytest.mark.parametrize("pdl", [False, True])
def test_chained_kernels_wait_for_the_one_before(pdl: bool) -> None:
    options = {"num_warps": 4, **({"launch_pdl": True} if pdl else {})}
    for name, constants in (("_empty", {}), ("_dependent", {"BLOCK": 1024, "STEPS": 2})):
        text = compiled(name, {"x": "*i32"}, {**constants, "PDL": pdl}, **options)
        assert text.count("griddepcontrol") == 2 * pdl
