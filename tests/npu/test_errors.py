"""What CANN's and torch_npu's errors are made of."""

from __future__ import annotations

import pytest

from qwenrt.backends.ascend.errors import meaning
from qwenrt.errors import BackendError, CapacityError


@pytest.mark.parametrize(
    ("said", "kind", "what"),
    [
        (
            "rtStreamSynchronize failed, error code is 507014 aicore timeout",
            BackendError,
            "QWENRT_KERNELS=off",
        ),
        ("error code is 507056, link error", BackendError, "reset it"),
        ("EL0004: Failed to allocate memory", CapacityError, "npu-smi info"),
        ("NPU out of memory. Tried to allocate 2.00 GiB", CapacityError, 'kv_cache_dtype="int8"'),
        ("call aclnnAdd failed, error code is 561112", BackendError, "package of operators"),
        ("call aclnnFusedInferAttentionScoreV2 failed, error code is 161002", BackendError, "--report FILE"),
        ("ERR02200 DIST call hccl api failed", BackendError, "set_env.sh"),
    ],
)
def test_each_says_what_to_do(said: str, kind: type[Exception], what: str) -> None:
    found = meaning(said)
    assert found is not None and found[0] is kind and what in found[1]


def test_of_others_nothing_is_claimed() -> None:
    assert meaning("The size of tensor a (3) must match the size of tensor b (4)") is None
