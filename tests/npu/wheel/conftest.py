"""What needs torch_npu's real wheel over the stand-in for CANN; `make npu-check` runs it, one processor a process."""

from __future__ import annotations

import ctypes
import os

import pytest
import torch


def _is_a_stand_in() -> bool:
    """Whether CANN here is tests/npu/cann/stand_in.c: on a real device these tests would compute nothing."""
    try:
        message = ctypes.CDLL("libascendcl.so").aclGetRecentErrMsg
    except (OSError, AttributeError):
        return False
    message.restype = ctypes.c_char_p
    return bool(message() == b"stand-in for CANN")


STAND_IN = _is_a_stand_in()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "npu/wheel" in item.path.as_posix():
            item.add_marker(pytest.mark.npu)
            if not STAND_IN:
                item.add_marker(pytest.mark.skip(reason="make npu-check runs it"))


if STAND_IN:
    from tests.npu.wheel import soft

    soft.install()


@pytest.fixture
def family() -> str:
    """Of the processor that the stand-in says it is."""
    from qwenrt.backends.ascend.soc import family_of

    return family_of(torch.get_device_module("npu").get_soc_version()).name


@pytest.fixture
def processor() -> str:
    return os.environ.get("STAND_IN_SOC", "Ascend910B1")
