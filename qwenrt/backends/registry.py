"""From a device's name to one backend: "auto", "cpu", "cuda:1", "npu", "dcu", or a plugin's name."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch

from qwenrt.backends.base import Backend
from qwenrt.errors import BackendError, shown

PLUGIN_GROUP = "qwenrt.backends"  # entry point: name = "module:BackendClass"


@dataclass(frozen=True)
class Probe:
    """What was found for one backend: usable or not, and why."""

    name: str
    usable: bool
    why: str


def _accelerator(module: str) -> Callable[[], str | None]:
    """A check that torch.<module> sees a device; the reason where it does not."""

    def check() -> str | None:
        if module == "npu":
            try:
                importlib.import_module("torch_npu")
            except Exception as error:  # a broken vendor install must not break the CPU
                return f"torch_npu cannot be imported ({type(error).__name__}: {str(error)[:120]})"
        runtime = getattr(torch, module, None)
        if runtime is None or not runtime.is_available():
            return f"this torch ({torch.__version__}) sees no {module} device"
        return None

    return check


def _dcu() -> str | None:
    missing = _accelerator("cuda")()
    if missing is not None:
        return missing
    if torch.version.hip is None:
        return f"this torch ({torch.__version__}) is not a ROCm or DTK build"
    profiles = importlib.import_module("qwenrt.backends.cuda.profiles")
    found = profiles.profile_of(torch.device("cuda"))
    if found.vendor != "hygon":
        return f"the device is AMD's {found.arch} and no DTK is here; its name is cuda"
    return None


@dataclass(frozen=True)
class _BuiltIn:
    torch_device: str
    backend: str  # module:what makes one of a torch.device
    missing: Callable[[], str | None]


# In the order "auto" tries them.
_BUILT_IN = {
    "cuda": _BuiltIn("cuda", "qwenrt.backends.cuda:CudaBackend", _accelerator("cuda")),
    "npu": _BuiltIn("npu", "qwenrt.backends.ascend:backend_of", _accelerator("npu")),
    "dcu": _BuiltIn("cuda", "qwenrt.backends.dcu.backend:DcuBackend", _dcu),
    "cpu": _BuiltIn("cpu", "qwenrt.backends.cpu:CPUBackend", lambda: None),
}


def probe_all() -> list[Probe]:
    """Every backend there is, built in or plugged in, with whether it can serve here; plug-ins are imported for it."""
    return [*_probes(), *map(_probe, _plugins().values())]


def _probes() -> list[Probe]:
    found = []
    for name, built_in in _BUILT_IN.items():
        missing = built_in.missing()
        found.append(Probe(name, missing is None, missing or "available"))
    return found


def _probe(point: metadata.EntryPoint) -> Probe:
    try:
        missing = _missing(_plugin(point.value, point.name))
    except BackendError as error:
        missing = error.found
    return Probe(point.name, missing is None, f"plugin {point.value}" + (f": {missing}" if missing else ""))


def _missing(plugin: type[Backend]) -> str | None:
    """Why a plug-in cannot serve here, or None; what it raises is a reason too."""
    try:
        return plugin.missing()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"


def create(device: str | torch.device = "auto", preferred: str | None = None) -> Backend:
    """The backend for ``device``. "auto" is ``preferred`` (the user's setting) or the first that is usable.

    Raises BackendError that lists what is available here.
    """
    if isinstance(device, torch.device):
        device = str(device)
    if not isinstance(device, str) or not device:
        raise BackendError(f"device={shown(device)}", "not a device name", _advice())
    if device == "auto":
        device = preferred or device
    if device == "auto":
        device = next(p.name for p in _probes() if p.usable)
    name, _, index = device.partition(":")
    # torch keeps the number in a byte: 300 would silently be device 44.
    if index and not (index.isdecimal() and len(index) <= 3 and int(index) < 128):
        raise BackendError(f"device={device!r}", f"{index!r} is not a device number", _advice())
    if name in _plugins():
        plugin = _plugin(_plugins()[name].value, name)
        why = _missing(plugin)
        if why is not None:
            raise BackendError(f"device={device!r}", why, _advice())
        return plugin(_torch_device(plugin.device_type, index))
    if name == "cuda" and _dcu() is None:
        name = "dcu"  # torch calls it cuda, and so do users
    built_in = _BUILT_IN.get(name)
    if built_in is None:
        raise BackendError(f"device={device!r}", "no such backend", _advice())
    missing = built_in.missing()
    if missing is not None:
        raise BackendError(f"device={device!r}", missing, _advice())
    torch_device = _torch_device(built_in.torch_device, index)
    count = 1 if name == "cpu" else torch.get_device_module(torch_device).device_count()
    if int(index or 0) >= count:
        raise BackendError(f"device={device!r}", f"the last {name} device is number {count - 1}", _advice())
    made: Backend = _imported(built_in.backend, name)(torch_device)
    return made


def _torch_device(kind: str, index: str) -> torch.device:
    return torch.device(kind, int(index)) if index else torch.device(kind)


def _plugins() -> dict[str, metadata.EntryPoint]:
    return {point.name: point for point in metadata.entry_points(group=PLUGIN_GROUP)}


def _imported(dotted: str, name: str) -> Any:
    module, _, attribute = dotted.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:
        raise BackendError(
            f"loading backend {name!r} from {dotted}",
            f"{type(error).__name__}: {str(error)[:200]}",
            "Reinstall the plugin, or choose another device.",
        ) from error


def _plugin(dotted: str, name: str) -> type[Backend]:
    cls = _imported(dotted, name)
    if not (isinstance(cls, type) and issubclass(cls, Backend)):
        raise BackendError(
            f"loading backend {name!r} from {dotted}",
            "not a subclass of qwenrt.backends.base.Backend",
            "Ask the plugin's author for a version that fits this qwenrt.",
        )
    if cls.api != Backend.api:
        raise BackendError(
            f"loading backend {name!r} from {dotted}",
            f"it is written for interface {cls.api} of backends, and this qwenrt has {Backend.api}",
            "Install a version of the plugin that fits this qwenrt.",
        )
    return cls


def _advice() -> str:
    usable = [*(p.name for p in _probes() if p.usable), *_plugins()]
    return f'Available here: {", ".join(usable)}; "auto" takes the first. `qwenrt doctor` says more.'
