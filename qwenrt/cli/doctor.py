"""qwenrt doctor: versions, devices, the kernels that serve and why, and what is missing with its fix."""

from __future__ import annotations

import argparse
import platform
import sys
import textwrap
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from qwenrt import __version__
from qwenrt.backends.dcu import software
from qwenrt.cli import imports, machine, npu, report
from qwenrt.cli.options import example
from qwenrt.cli.terminal import Terminal, counted, readable_bytes
from qwenrt.config import Environment
from qwenrt.config.environment import of_process, set_for_process
from qwenrt.errors import QwenrtError, RequestError

REQUIRED = ("torch", "numpy", "safetensors", "tiktoken", "huggingface-hub", "jinja2")
EXTRAS = {  # extra -> (its packages, what it is for)
    "cli": (("rich", "prompt-toolkit"), "colours and line editing in the terminal"),
    "modelscope": (("modelscope-hub",), "downloads from ModelScope"),
}
_WIDTH = 80


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="versions, devices and kernels, and how to get what is missing",
        description="Report versions, devices and the kernels that serve here and why; what is missing, and the fix.",
        **example("examples:\n  qwenrt doctor\n  qwenrt doctor --device cuda --json\n"),
    )
    parser.add_argument("--device", default="auto", help="the device to examine (default: auto)")
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    parser.add_argument(
        "--report",
        type=Path,
        metavar="FILE",
        help="prove all that can be proven on the device (minutes to an hour) and write it to a file to send in",
    )
    parser.set_defaults(command=doctor)


def doctor(args: argparse.Namespace) -> int:
    """0 where the device can serve, 1 where it cannot; with --report, where something is not as it should be."""
    terminal = Terminal()
    if args.report is not None:
        try:
            fine = report.write(args.device, args.report, terminal.say)
        except OSError as error:
            raise RequestError(
                f"--report {args.report}", str(error), "Name a file that can be written."
            ) from error
        terminal.say(f"written to {args.report}: send it with an issue, or look at it")
        return int(not fine)
    with redirect_stdout(sys.stderr):  # where torch_npu prints when it is imported
        found = examine(args.device)
    if args.json:
        terminal.result(found)
    else:
        _show(found, terminal)
    return 0 if found["backend"]["name"] else 1


def examine(device: str = "auto") -> dict[str, Any]:
    """All findings, ready for JSON. Nothing here raises: a failure is a finding."""
    problems: list[dict[str, str]] = []  # each: what, fix
    found: dict[str, Any] = {
        "qwenrt": __version__,
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "packages": {name: imports.installed(name) for name in REQUIRED},
        "extras": _extras(problems),
        "machine": machine.describe(),
        "torch": _torch(problems),
    }
    found["ascend"], missing = npu.installed(device, problems)
    for name, version in found["packages"].items():
        if version is None:
            problems.append({"what": f"{name} is not installed", "fix": f"pip install {name}"})
    _dcu_packages(problems)
    environment = _environment(problems)
    found["environment"] = _settings(environment)
    usable = found["torch"]["error"] is None and not npu.is_deadly(problems)
    found["backends"] = _backends(problems) if usable else []
    found["cpu_kernels"] = _cpu_kernels(environment, problems) if usable else None
    found["backend"] = (
        _chosen(device, environment, problems)
        if usable
        else {"name": None, "why": "no torch" if found["torch"]["error"] else "a broken torch_npu"}
    )
    serves = found["backend"]["name"] == "npu"
    found["operators"] = npu.operators(problems) if serves else {}
    if not serves:
        problems[:0] = missing  # the cause of others, as a rule
    else:
        found["ascend"]["card"] = npu.card(found["backend"]["device"], problems)
    found["problems"] = problems
    return found


def _extras(problems: list[dict[str, str]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for extra, (packages, purpose) in EXTRAS.items():
        versions = {name: imports.installed(name) for name in packages}
        missing = [name for name, version in versions.items() if version is None]
        found[extra] = {"packages": versions, "for": purpose, "missing": missing}
        if missing:
            what = f"optional: {' and '.join(missing)} not installed ({purpose})"
            problems.append({"what": what, "fix": f'pip install "qwenrt[{extra}]"'})
    return found


def _torch(problems: list[dict[str, str]]) -> dict[str, Any]:
    """The torch that is installed; one that cannot be imported is a finding, not a crash."""
    found: dict[str, Any] = dict.fromkeys(("version", "build", "threads", "path", "error"))
    found["devices"] = []
    if "torch" not in sys.modules:  # tried where it can do no harm first
        found["error"] = _try_torch(problems)
        if found["error"] is not None:
            return found
    try:
        import torch

        found |= {"version": torch.__version__, "path": str(Path(torch.__file__).parent)}
        found["build"] = _build(torch)
        found["threads"] = torch.get_num_threads()
    except Exception as error:  # a broken install may raise anything
        found["error"] = f"{type(error).__name__}: {error}"
        fix = "pip install --force-reinstall torch, or your device vendor's build of it"
        problems.append({"what": f"torch cannot be imported ({found['error'][:300]})", "fix": fix})
        return found
    try:
        found["devices"] = _devices(torch)
    except Exception as error:  # a driver that does not fit may say so here; the CPU can still serve
        what = f"torch cannot ask its devices ({type(error).__name__}: {str(error)[:300]})"
        problems.append({"what": what, "fix": "update the device's driver, or take a torch that fits it"})
    _unused_hardware(found, problems)
    return found


def _try_torch(problems: list[dict[str, str]]) -> str | None:
    """What an import of torch says, in a process of its own, None where it works. If only a vendor's extension breaks
    it, this process goes on without."""
    environment = of_process()
    said = imports.failure("torch", environment)
    if said is None:
        return None
    what = f"torch {imports.installed('torch') or ''} cannot be imported ({said[:300]})"
    fix = imports.cure("torch", said)
    spoilt = imports.only_an_extension(environment)
    if spoilt:
        set_for_process(imports.NO_EXTENSIONS)
        (variable,) = imports.NO_EXTENSIONS.items()
        what += ": a vendor's extension that it loads by itself is broken"
        fix = f"mend that; until then {'='.join(variable)} makes torch, and qwenrt on other devices, start without it"
    problems.append({"what": what, "fix": fix})
    return None if spoilt else said


def _build(torch: Any) -> str:
    """For which device this torch was built."""
    if getattr(torch.version, "hip", None):
        return f"ROCm {torch.version.hip}"
    if torch.version.cuda:
        return f"CUDA {torch.version.cuda}"
    return "CPU only"


def _devices(torch: Any) -> list[dict[str, Any]]:
    """The accelerators torch sees, with their memory."""
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {"name": f"cuda:{index}", "model": properties.name, "memory_bytes": properties.total_memory}
        )
    return found


def _unused_hardware(found: dict[str, Any], problems: list[dict[str, str]]) -> None:
    """A device's driver is here, but this torch was not built for it."""
    build = found["build"]
    known = (
        ("NVIDIA", build.startswith("CUDA"), "the CUDA build of torch"),
        ("AMD or DCU", build.startswith("ROCm"), "the ROCm (or DTK) build of torch"),
        ("Ascend", imports.installed("torch-npu") is not None, "torch-npu"),
    )
    here = machine.drivers()
    for vendor, served, remedy in known:
        if vendor in here and not served:
            what = f"a driver for {vendor} devices is here, but torch ({build}) does not use it"
            problems.append({"what": what, "fix": f"install {remedy}"})


def _dcu_packages(problems: list[dict[str, str]]) -> None:
    """On a machine with Hygon's toolkit, packages that are not the vendor's; told by their versions alone."""
    version = imports.installed("torch") or ""
    if software.toolkit(version) is not None:
        for what, fix in software.problems(version, imports.installed("triton")):
            problems.append({"what": what, "fix": fix})


def _environment(problems: list[dict[str, str]]) -> Environment | None:
    try:
        return Environment.read()
    except QwenrtError as error:
        problems.append({"what": f"{error.asked} {error.found}", "fix": error.remedy})
        return None


def _settings(environment: Environment | None) -> dict[str, Any] | None:
    if environment is None:
        return None
    return {
        "cache_dir": str(environment.cache_dir),
        "hf_endpoint": environment.hf_endpoint,
        "hf_token": "set" if environment.hf_token else None,
        "modelscope_endpoint": environment.modelscope_endpoint,
        "offline": environment.offline,
        "backend": environment.backend,
        "num_threads": environment.num_threads,
        "activations": environment.activations,
    }


def _backends(problems: list[dict[str, str]]) -> list[dict[str, Any]]:
    try:
        from qwenrt.backends.registry import probe_all

        return [{"name": p.name, "usable": p.usable, "why": p.why} for p in probe_all()]
    except Exception as error:
        what = f"the devices cannot be examined ({type(error).__name__}: {error})"
        problems.append({"what": what, "fix": "reinstall qwenrt, or the plugin named above"})
        return []


def _cpu_kernels(environment: Environment | None, problems: list[dict[str, str]]) -> str:
    """One line: which kernels serve the CPU as it is set, and, if not the fast ones, why."""
    try:
        from qwenrt.backends.cpu import HOW_TO_BUILD, kernel_status

        status = str(kernel_status(environment.kernels if environment else "auto"))
        if status.endswith(HOW_TO_BUILD):
            what = "plain torch serves the CPU, which is slower than the C++ kernels"
            problems.append({"what": what, "fix": HOW_TO_BUILD})
        return status.removesuffix(f": {HOW_TO_BUILD}")
    except QwenrtError as error:
        return f"none, {error.found}. {error.remedy}"
    except Exception as error:
        return f"plain torch (the kernels cannot be loaded: {type(error).__name__}: {error})"


def _chosen(device: str, environment: Environment | None, problems: list[dict[str, str]]) -> dict[str, Any]:
    """Which backend load(device=...) would take here as it is set, and why."""
    preferred = environment.backend if environment else None
    try:
        from qwenrt.backends.registry import create

        backend = create(device, preferred)
        if environment:
            backend.configure(environment.kernels, environment.num_threads, environment.activations)
    except QwenrtError as error:
        fix = error.remedy.removesuffix(" `qwenrt doctor` says more.")
        problems.append({"what": f"{error.asked}: {error.found}", "fix": fix})
        return {"name": None, "device": device, "why": error.found, "kernels": None}
    except Exception as error:  # a plugin may raise anything, half a torch too
        why = f"{type(error).__name__}: {error}"
        what = f"device={device!r}: {why}"
        problems.append({"what": what, "fix": "choose another device, or fix its plugin"})
        return {"name": None, "device": device, "why": why, "kernels": None}
    if device != "auto":
        why = "it was asked for"
    else:
        why = "QWENRT_BACKEND says so" if preferred else "it is the first usable device above"
    return {"name": backend.name, "device": str(backend.device), "why": why, "kernels": backend.describe()}


# ---- for people


def _show(report: dict[str, Any], terminal: Terminal) -> None:
    def row(label: str, text: object, style: str = "") -> None:
        lines = textwrap.wrap(str(text), _WIDTH - 16, break_on_hyphens=False) or [""]
        terminal.say(f"{label:<15} {lines[0]}", style)
        for line in lines[1:]:
            terminal.say(" " * 16 + line, style)

    python, torch = report["python"], report["torch"]
    row("qwenrt", f"{report['qwenrt']}, Python {python['version']} ({python['executable']})")
    row(
        "torch",
        torch["error"] or f"{torch['version']} ({torch['build']}), {counted(torch['threads'], 'thread')}",
    )
    others = {name: version for name, version in report["packages"].items() if name != "torch"}
    row("packages", ", ".join(f"{name} {version or 'MISSING'}" for name, version in others.items()))
    for extra, found in report["extras"].items():
        versions = ", ".join(f"{name} {version or 'missing'}" for name, version in found["packages"].items())
        row(f"[{extra}]", versions)
    _show_machine(report["machine"], row)
    for device in torch["devices"]:
        row(device["name"], f"{device['model']}, {readable_bytes(device['memory_bytes'])}")
    for backend in report["backends"]:
        usable = "usable" if backend["usable"] else "not usable"
        row(
            f"device {backend['name']}",
            usable + ("" if backend["why"] == "available" else f": {backend['why']}"),
        )
    npu.show(report, row)
    if report["cpu_kernels"]:
        row("CPU kernels", report["cpu_kernels"])
    settings = report["environment"]
    if settings:
        row("downloads", f"kept in {settings['cache_dir']}")
        row("model hubs", _hubs(settings))
    chosen = report["backend"]
    if chosen["name"]:
        where = (
            chosen["device"]
            if chosen["device"] == chosen["name"]
            else f"{chosen['name']} ({chosen['device']})"
        )
        row("runs on", f"{where}, because {chosen['why']}: {chosen['kernels']}", "bold")
    else:
        row("runs on", f"nothing here: {chosen['why']}", "bold red")
    for problem in report["problems"]:
        row("to do", f"{problem['what']}. Fix: {problem['fix']}", "yellow")
    if not report["problems"]:
        row("to do", "nothing, all is well", "green")


def _show_machine(found: dict[str, Any], row: Any) -> None:
    row("system", found["system"])
    cores = f"{found['cores']} logical cores, {found['cores_allowed']} of them for this process"
    if found["cores_usable"]:
        cores += f"; qwenrt uses {found['cores_usable']} by default"
    row("processor", f"{found['processor'] or 'unknown'}; {cores}")
    if found["instruction_sets"]:
        row("instructions", " ".join(found["instruction_sets"]))
    if found["memory_total_bytes"]:
        free, total = (readable_bytes(found[f"memory_{kind}_bytes"]) for kind in ("free", "total"))
        row("memory", f"{free} free of {total} (containers' limits included)")


def _hubs(settings: dict[str, Any]) -> str:
    if settings["offline"]:
        return "offline: no network connection will be opened"
    hf = settings["hf_endpoint"] or "huggingface.co"
    token = " with a token" if settings["hf_token"] else ""
    return f"{hf}{token}, {settings['modelscope_endpoint'] or 'modelscope.cn'}"
