"""What `qwenrt doctor` finds of Ascend devices: what is installed, whether it starts, which operators serve."""

from __future__ import annotations

import sys
from typing import Any

from qwenrt.cli import imports, machine
from qwenrt.cli.terminal import counted, readable_bytes
from qwenrt.config.environment import of_process


def installed(
    device: str, problems: list[dict[str, str]]
) -> tuple[dict[str, Any] | None, list[dict[str, str]]]:
    """What is installed for Ascend devices, where there are any or one is asked for; and what is a problem too if none
    answers."""
    if (
        imports.installed("torch-npu") is None
        and "Ascend" not in machine.drivers()
        and device.partition(":")[0] != "npu"
    ):
        return None, []
    found = machine.beside("backends/ascend/software.py").look(variables=of_process())
    problems += [{"what": what, "fix": fix} for what, fix in found.problems]
    missing = [{"what": what, "fix": fix} for what, fix in found.missing]
    return {name: getattr(found, name) for name in ("torch_npu", "driver", "cann")}, missing


def is_deadly(problems: list[dict[str, str]]) -> bool:
    """Whether importing torch_npu, which looking for devices does, would end this process."""
    if imports.installed("torch-npu") is None or "torch_npu" in sys.modules:
        return False
    said = imports.failure("torch_npu", of_process())
    if said is not None:
        what = f"torch_npu cannot be imported ({said[:300]})"
        problems.append({"what": what, "fix": imports.cure("torch_npu", said)})
    return said is not None and "ends the process" in said


def card(device: str, problems: list[dict[str, str]]) -> dict[str, Any] | None:
    """The card that serves: its name, its memory, and what of that is free now, beside others who use it."""
    import torch

    runtime = torch.get_device_module("npu")
    try:
        free, total = runtime.mem_get_info(torch.device(device))
        model = runtime.get_device_name(torch.device(device))
    except RuntimeError as error:
        what = f"{device} does not say what it is ({' '.join(str(error).split())[:200]})"
        problems.append({"what": what, "fix": "`npu-smi info` says whether it is healthy and who uses it"})
        return None
    cards = runtime.device_count()
    return {"name": device, "cards": cards, "model": model, "free_bytes": free, "total_bytes": total}


def operators(problems: list[dict[str, str]]) -> dict[str, str]:
    """Of each fused operator of torch_npu: in which releases it is as here, or why it is not used."""
    from qwenrt.backends.ascend import calls

    found, misfits = {}, calls.misfits()
    for op in calls.CALLS:
        schema = calls.installed(op)
        known = calls.releases_with(op, schema) if schema is not None else ()
        found[op] = misfits.get(op) or (
            f"as in torch_npu {', '.join(known)}" if known else "a form not seen before"
        )
    for why in misfits.values():
        problems.append(
            {"what": f"{why}: its definition serves", "fix": "another torch_npu, or none: it is slower"}
        )
    return found


def show(report: dict[str, Any], row: Any) -> None:
    """Rows of what is installed, of the card and of the operators; ``row`` is told a name and what is said of it."""
    if report["ascend"]:
        here = {name: report["ascend"][name] or "not found" for name in ("torch_npu", "cann", "driver")}
        row("Ascend", ", ".join(f"{name} {version}" for name, version in here.items()))
        if card := report["ascend"].get("card"):
            free, total = readable_bytes(card["free_bytes"]), readable_bytes(card["total_bytes"])
            row(
                card["name"],
                f"{card['model']}, {free} of {total} free; {counted(card['cards'], 'card')} in all",
            )
    for op, releases in report["operators"].items():
        row("operator", f"{op}: {releases}")
