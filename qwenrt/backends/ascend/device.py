"""From a device of torch_npu to the backend of its processor."""

from __future__ import annotations

import torch

from qwenrt.backends.ascend import calls, errors, soc
from qwenrt.backends.ascend.backend import A2Backend, AscendBackend
from qwenrt.backends.ascend.older import A910Backend, P310Backend
from qwenrt.errors import BackendError

_BACKENDS: dict[str, type[AscendBackend]] = {
    "A2": A2Backend,
    "A3": A2Backend,
    "310P": P310Backend,
    "910A": A910Backend,
}


def backend_of(device: torch.device) -> AscendBackend:
    """The backend of an "npu" device; torch_npu is imported already.

    Operators are not compiled anew for each shape, and no tensor is in a format that views do not read.
    Raises BackendError where the device cannot be used at all, CapacityError where none of its memory is free.
    """
    npu = torch.get_device_module("npu")
    try:
        npu.set_compile_mode(jit_compile=False)
        npu.config.allow_internal_format = False
        if device.index is None:  # torch_npu 2.9 does not say how much memory "npu" has, only "npu:0"
            device = torch.device("npu", npu.current_device())
        family = soc.family_of(npu.get_soc_version())
        draws_here = _sums_float64(device)
    except RuntimeError as error:
        kind, advice = errors.meaning(str(error)) or (BackendError, _ADVICE)
        found = f"the device does not answer ({errors.in_a_line(error)})"
        raise kind(f"device={str(device)!r}", found, advice) from error
    cls = _BACKENDS.get(family.name, AscendBackend)
    return cls(device, family=family, misfits=calls.misfits(), draws_here=draws_here)


_ADVICE = "`npu-smi info` says whether it is healthy and who uses it; `qwenrt doctor --device npu` what is installed."


def _sums_float64(device: torch.device) -> bool:
    """Some releases make float64 float32 without being asked."""
    small = 2.0**-40
    sums = torch.tensor([1.0, small], dtype=torch.float64).to(device).cumsum(0)
    return sums.dtype == torch.float64 and float(sums.cpu()[1]) == 1 + small
