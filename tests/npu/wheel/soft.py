"""A soft device: what torch_npu is asked to compute is computed on the CPU, over the same bytes.

torch_npu allocates and views (tests/npu/cann has the libraries it links against); every other op is taken down by its
schema and computed by torch's CPU kernel, or by tests/npu/operators.py where the op is torch_npu's own.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from tests.npu.operators import HALF, OPERATORS, require

# What makes a view or memory: torch_npu's own.
_LEFT_TO_TORCH_NPU = {
    f"aten::{name}"
    for name in (
        *("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "set_", "resize_"),
        *(
            "view",
            "_unsafe_view",
            "_reshape_alias",
            "as_strided",
            "t",
            "transpose",
            "permute",
            "expand",
            "unfold",
        ),
        *(
            "slice",
            "select",
            "narrow",
            "unsqueeze",
            "squeeze",
            "split",
            "split_with_sizes",
            "unbind",
            "detach",
            "alias",
        ),
        *("is_pinned", "_pin_memory", "record_stream", "view_as_real", "lift_fresh", "chunk"),
    )
}
_ASKS_THE_DEVICE = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::item",
    "aten::is_nonzero",
    "aten::equal",
}


_PRODUCTS = {"aten::linear", "aten::matmul", "aten::mm", "aten::addmm", "aten::bmm"}
Recorded = tuple[
    Callable[..., Any], tuple[Any, ...], dict[str, Any], Any
]  # an op, its arguments, what it gave


def fusion_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    heads: int,
    layout: str,
    pse: Any = None,
    padding_mask: Any = None,
    atten_mask: torch.Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = 0,
    next_tockens: int = 0,
    inner_precise: int = 0,
    prefix: Any = None,
    actual_seq_qlen: Any = None,
    actual_seq_kvlen: Any = None,
    sparse_mode: int = 0,
    *others: Any,
    **named: Any,
) -> tuple[Any, ...]:
    """What torch_npu makes of torch's scaled_dot_product_attention: layout BNSD; a mask hides where it is True."""
    require(
        layout == "BNSD" and sparse_mode in (0, 2, 3) and keep_prob == 1,
        f"{layout}, {sparse_mode}, {keep_prob}",
    )
    rows, columns = query.shape[2], key.shape[2]
    hidden = torch.zeros(rows, columns, dtype=torch.bool)
    if sparse_mode:
        hidden = torch.ones(rows, columns, dtype=torch.bool).triu(1 + (columns - rows) * (sparse_mode == 3))
    elif atten_mask is not None:
        hidden = atten_mask.bool()
    scores = (query.float() * scale) @ key.float().transpose(-1, -2)
    out = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value.float()
    nothing = query.new_empty(0)
    return (out.to(query.dtype), *([nothing] * 5))


def _matmul_backward(
    grad: torch.Tensor, x: torch.Tensor, y: torch.Tensor, mask: list[bool]
) -> tuple[Any, ...]:
    """Of the product of two matrices."""
    require(grad.dim() == x.dim() == y.dim() == 2, "gradients of matrices alone")
    return grad @ y.t() if mask[0] else None, x.t() @ grad if mask[1] else None


def older_fusion_attention(*given: Any, **named: Any) -> tuple[Any, ...]:
    """The same as torch_npu 2.9 calls it: what training would need of the random numbers are plain ones."""
    return (*fusion_attention(*given, **named)[:4], 0, 0, 0)


_OPERATORS = OPERATORS | {
    "npu_fusion_attention_v3": fusion_attention,
    "npu_fusion_attention": older_fusion_attention,
}
# What torch_npu 2.9 makes of ops of torch before they are dispatched.
_OF_TORCH = {"npu::_npu_dtype_cast": "aten::_to_copy", "npu::npu_dtype_cast": "aten::_to_copy"}


def on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """The same bytes as a tensor of the CPU."""
    if tensor.device.type != "npu":
        return tensor
    storage = tensor.untyped_storage()
    if storage.nbytes() == 0:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
    buffer = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    base = torch.frombuffer(buffer, dtype=torch.uint8)
    whole = torch.empty(0, dtype=tensor.dtype)
    return whole.set_(base.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


def on_npu(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in the device's memory."""
    made = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="npu")
    on_cpu(made).copy_(tensor)
    return made


class Soft(TorchDispatchMode):
    """``log``: the ops that were computed, in order. ``recording``: calls that a captured graph consists of, or None.
    ``broken``: op -> what computes it in place of its definition, for faults."""

    log: ClassVar[list[str]] = []
    recording: ClassVar[list[Recorded] | None] = None
    broken: ClassVar[dict[str, Callable[..., Any]]] = {}
    kept: ClassVar[TorchDispatchMode | None] = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func._schema.name
        wanted = kwargs.get("device")
        here = any(x.device.type == "npu" for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor))
        to_npu = wanted is not None and torch.device(wanted).type == "npu"
        if not (here or to_npu) or name in _LEFT_TO_TORCH_NPU or name.startswith("prim"):
            return func(*args, **kwargs)
        name = _OF_TORCH.get(name, name)
        Soft.log.append(name)
        if Soft.recording is not None:
            if name in _ASKS_THE_DEVICE or (name == "aten::_to_copy" and not to_npu and wanted is not None):
                raise RuntimeError(f"{name} in a capture: the host would wait for the device")
            done = _compute(func, name, args, dict(kwargs))
            Soft.recording.append((func, args, kwargs, done))
            return done
        return _compute(func, name, args, kwargs)


def _compute(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    if name == "aten::copy_":
        on_cpu(args[0]).copy_(on_cpu(args[1]))
        return args[0]
    if name == "aten::_to_copy":
        source = args[0]
        target = torch.device(kwargs.get("device") or source.device)
        dtype = kwargs.get("dtype") or (args[1] if len(args) > 1 else source.dtype)
        moved = on_cpu(source).to(dtype=dtype, copy=True)
        return on_npu(moved) if target.type == "npu" else moved
    if "device" in kwargs:
        kwargs["device"] = torch.device("cpu")
    kwargs.pop("pin_memory", None)
    schema, own = func._schema, name.removeprefix("npu::")
    if name == "aten::matmul_backward":  # which torch_npu has, and no CPU kernel
        func = _matmul_backward
    compute = Soft.broken.get(own) or (_OPERATORS[own] if name.startswith("npu::") else func)
    given, named = tree_map_only(torch.Tensor, on_cpu, (args, kwargs))
    half = given[0].dtype if name in _PRODUCTS and given[0].dtype in HALF else None
    if half:  # CPUs of some releases sum them in half precision, or read past the end of a row
        given = tree_map_only(torch.Tensor, torch.Tensor.float, given)
    out = compute(*given, **named)
    if half:
        out = out.to(half)
    changed = [
        i for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write
    ]
    if changed:  # in place, and over the same bytes
        first = schema.arguments[changed[0]].name
        return args[changed[0]] if changed[0] < len(args) else kwargs[first]
    return tree_map_only(torch.Tensor, on_npu, out)


class SoftGraph:
    """In place of torch.npu.NPUGraph: the calls of a capture, made again over the same memory."""

    def __init__(self) -> None:
        self.calls: list[Recorded] = []
        self.updates: list[list[int]] = []

    def update(self, cpu_update_input: list[dict[str, Any]]) -> None:
        """As torch_npu: what was named when it was captured, one dict for every recorded attention."""
        (new,) = cpu_update_input
        self.updates.append(new["actual_seq_lengths_kv"])
        for func, _, kwargs, _ in self.calls:
            if func._schema.name == "npu::npu_fused_infer_attention_score":
                kwargs |= {key: value for key, value in new.items() if key in kwargs}

    def replay(self) -> None:
        for func, args, kwargs, before in self.calls:
            name = func._schema.name
            after = _compute(func, _OF_TORCH.get(name, name), args, dict(kwargs))
            for old, new in zip(tree_leaves(before), tree_leaves(after), strict=True):
                if isinstance(old, torch.Tensor) and old is not new:
                    on_cpu(old).copy_(on_cpu(new))


@contextmanager
def soft_capture(
    npu_graph: SoftGraph,
    pool: Any = None,
    auto_dispatch_capture: bool = False,
    capture_error_mode: str = "global",
) -> Iterator[None]:
    """In place of torch.npu.graph."""
    assert auto_dispatch_capture and Soft.recording is None
    Soft.recording = npu_graph.calls
    try:
        yield
    finally:
        Soft.recording = None


class _Graph:
    """torch.npu.graph is a class whose arguments are looked at."""

    def __init__(
        self,
        npu_graph: SoftGraph,
        pool: Any = None,
        auto_dispatch_capture: bool = False,
        capture_error_mode: str = "",
    ) -> None:
        self._context = soft_capture(npu_graph, pool, auto_dispatch_capture, capture_error_mode)

    def __enter__(self) -> None:
        self._context.__enter__()

    def __exit__(self, *raised: Any) -> None:
        self._context.__exit__(*raised)


def install() -> None:
    """From now on every thread of this process computes softly."""
    import torch_npu  # noqa: F401

    run = threading.Thread.run

    def softly(self: threading.Thread) -> None:
        with Soft():
            run(self)

    threading.Thread.run = softly  # type: ignore[method-assign]
    npu = torch.get_device_module("npu")
    npu.NPUGraph, npu.graph, npu.graph_pool_handle = SoftGraph, _Graph, object
    mode = Soft()
    mode.__enter__()
    Soft.kept = mode  # torch 2.9 does not hold the mode that it is told to enter again
