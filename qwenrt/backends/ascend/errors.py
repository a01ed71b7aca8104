"""What CANN's and torch_npu's errors mean, and what to do. Numbers are those of CANN's acl_rt.h and of aclnn, its
operators."""

from __future__ import annotations

from qwenrt.errors import BackendError, CapacityError, QwenrtError

_Kind = type[QwenrtError]

# What is said -> the kind of error and what to do; the first that fits.
_KNOWN: tuple[tuple[tuple[str, ...], _Kind, str], ...] = (
    (
        ("507010", "507053", "507054", "507055", "507056", "507899", "ECC ERROR", "heartbeat"),
        BackendError,
        "The card itself has failed, and this process cannot use it any more. `npu-smi info` says whether it is "
        "healthy: reset it or take another one (ASCEND_RT_VISIBLE_DEVICES), then start again.",
    ),
    (
        ("507011", "507014", "507015", "507016", "507017", "507018", "507034", "507035", "507046", "aicore"),
        BackendError,
        "An operator failed on the device, on which this process can compute nothing more: start it again. "
        "ASCEND_LAUNCH_BLOCKING=1 names the operator, QWENRT_KERNELS=off does without fused ones, and "
        "`qwenrt doctor --device npu` says whether driver, CANN and torch_npu fit each other.",
    ),
    (
        ("out of memory", "207001", "EL0004"),
        CapacityError,
        "`npu-smi info` shows which processes share the card. End them or choose another card "
        "(ASCEND_RT_VISIBLE_DEVICES), or lower max_model_len, max_num_seqs or max_num_batched_tokens, or set "
        'kv_cache_dtype="int8".',
    ),
    (
        ("561003", "561107", "561108", "561109", "561112", "561113"),
        BackendError,
        "CANN does not find its compiled operators for this processor. Source CANN's set_env.sh, which says where they "
        "are, and install the package of operators (kernels up to CANN 8.3, ops later) for this processor, of the "
        "toolkit's version.",
    ),
    (
        ("161001", "161002", "561001", "561002"),
        BackendError,
        "An operator of this CANN refuses a call: its shapes, dtypes or formats. QWENRT_KERNELS=off does without fused "
        "ones; `qwenrt doctor --device npu --report FILE` makes a file that says which, to send in with an issue.",
    ),
    (
        ("HCCL", "hccl", "ERR02"),
        BackendError,
        "This is communication between cards, of which qwenrt uses one: choose it with ASCEND_RT_VISIBLE_DEVICES, and "
        "source CANN's set_env.sh, which has libhccl.so.",
    ),
)


def meaning(said: str) -> tuple[_Kind, str] | None:
    """(the kind of error, what to do) of what an exception says; None where nothing is known of it."""
    known = (entry for entry in _KNOWN if any(words in said for words in entry[0]))
    return next(((kind, remedy) for _, kind, remedy in known), None)


def in_a_line(error: Exception) -> str:
    """What an exception says, without the table of versions and the traceback that torch_npu adds."""
    return " ".join(str(error).split()).partition(" [ERROR] ")[0][:300]
