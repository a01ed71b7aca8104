"""The fused operators of torch_npu that are called here, and whether the installed torch_npu takes these calls.

Releases differ in arguments and defaults (schemas.txt has those that are known). So nothing that decides a result is
left to a default, and each schema is looked at before anything is bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

SCHEMAS = Path(__file__).parent / "schemas.txt"


@dataclass(frozen=True)
class Call:
    """What is passed by position, as torch spells types; what is passed by name; and how many results come back.

    The first argument's name is "self" or "input", by release: tensors go by position.
    """

    positions: tuple[str, ...]
    names: Mapping[str, str]
    results: int


_ATTENTION = {
    "atten_mask": "Tensor",
    "actual_seq_lengths": "List[int]",
    "actual_seq_lengths_kv": "List[int]",
    "block_table": "Tensor",
    "num_heads": "int",
    "scale": "float",
    "pre_tokens": "int",
    "next_tokens": "int",
    "input_layout": "str",
    "num_key_value_heads": "int",
    "sparse_mode": "int",
    "inner_precise": "int",
    "block_size": "int",
}
_CODES = {
    f"{side}_antiquant_{part}": "int" if part == "mode" else "Tensor"
    for side in ("key", "value")
    for part in ("scale", "offset", "mode")
}
_GROUPED = {"group_list": "Tensor", "split_item": "int", "group_type": "int", "group_list_type": "int"}
# The operator, and after a space what it is called for.
INT8_CACHE = "npu_fused_infer_attention_score of int8 keys"
INT4_EXPERTS = "npu_grouped_matmul of int4 weights"
CALLS = {
    "npu_rms_norm": Call(("Tensor", "Tensor"), {"epsilon": "float"}, 2),
    "npu_rotary_mul": Call(("Tensor",) * 3, {"rotary_mode": "str"}, 1),
    "npu_swiglu": Call(("Tensor",), {"dim": "int"}, 1),
    "npu_scatter_nd_update_": Call(("Tensor",) * 3, {}, 1),
    "npu_weight_quant_batchmatmul": Call(
        ("Tensor",) * 3,
        {
            "antiquant_offset": "Tensor",
            "bias": "Tensor",
            "antiquant_group_size": "int",
            "inner_precise": "int",
        },
        1,
    ),
    "npu_format_cast": Call(("Tensor", "int"), {}, 1),
    "npu_grouped_matmul": Call(("List[Tensor]",) * 2, _GROUPED, 1),
    INT4_EXPERTS: Call(
        ("List[Tensor]",) * 2,
        _GROUPED | {"antiquant_scale": "List[Tensor]", "antiquant_offset": "List[Tensor]"},
        1,
    ),
    "npu_fused_infer_attention_score": Call(("Tensor",) * 3, _ATTENTION, 2),
    INT8_CACHE: Call(("Tensor",) * 3, _ATTENTION | _CODES, 2),
}


def installed(op: str) -> Any | None:
    """The schema of one of CALLS in this process's torch, None where it has none."""
    packet = getattr(torch.ops.npu, operator(op), None)
    return None if packet is None else packet.default._schema


def misfits(schema_of: Callable[[str], Any | None] = installed) -> dict[str, str]:
    """Operator -> why it cannot be called as it is here; those that can be are not named."""
    found = {}
    for op, call in CALLS.items():
        schema = schema_of(operator(op))
        why = f"torch_npu has no {operator(op)}" if schema is None else _misfit(call, schema)
        if why is not None:
            found[op] = why if schema is None else f"{operator(op)} of this torch_npu {why}"
    return found


def operator(op: str) -> str:
    """The name in torch of what CALLS calls ``op``."""
    return op.partition(" ")[0]


def _misfit(call: Call, schema: Any) -> str | None:
    count, arguments = len(call.positions), schema.arguments
    leading = [_plain(argument) for argument in arguments[:count] if not argument.kwarg_only]
    if tuple(leading) != call.positions:
        return f"takes {', '.join(leading) or 'nothing'} first, not {', '.join(call.positions)}"
    others = {argument.name: argument for argument in arguments[count:]}
    for name, kind in call.names.items():
        if name not in others:
            return f"has no argument {name}"
        if _plain(others[name]) != kind:
            return f"wants {name} as {_plain(others[name])}, not {kind}"
    for name, argument in others.items():
        if name not in call.names and not argument.has_default_value():
            return f"wants an argument {name}"
    if len(schema.returns) != call.results:
        return f"gives {len(schema.returns)} results, not {call.results}"
    return None


def _plain(argument: Any) -> str:
    """An argument's type without what does not matter to a caller: that it may be None, or symbolic."""
    kind = str(argument.type).replace("SymInt", "int")
    return kind.removeprefix("Optional[").removesuffix("]") if kind.startswith("Optional[") else kind


def known_schemas() -> Iterator[tuple[str, tuple[str, ...], str]]:
    """(operator, releases of torch_npu, schema) of schemas.txt."""
    for line in SCHEMAS.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            releases, _, schema = line.partition(" | ")
            yield schema.partition("(")[0], tuple(releases.split()), schema


def releases_with(op: str, schema: Any) -> tuple[str, ...]:
    """The known releases of torch_npu in which an operator has this schema; none where it has not been seen."""
    found: list[str] = []
    for name, releases, text in known_schemas():
        if name == operator(op) and torch._C.parse_schema(f"npu::{text}") == schema:
            found += releases
    return tuple(found)
