"""What is installed for Hygon's devices, told by names and versions: nothing of it is imported, torch neither."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

_TAG = re.compile(r"dtk-?(\d\d)\.?(\d\d)")
_PLACES = ("/opt/dtk", "/opt/rocm")  # the latter may lead to the former
_INSTALL = "take the vendor's image, or its wheels for this DTK (their versions end in +das...dtkNNNN)"


def toolkit(torch_version: str, seen: Sequence[str] | None = None) -> str | None:
    """The DTK here, "26.04" or "" where its version is not told; None where none is seen. ``seen``: paths and programs
    in place of this machine's."""
    named = _TAG.search(torch_version)
    if named:
        return ".".join(named.groups())
    if "das" in torch_version.partition("+")[2].split("."):
        return ""
    for place in _places() if seen is None else seen:
        if "dtk" in place or "hy-smi" in place:
            at = _TAG.search(place)
            return ".".join(at.groups()) if at else ""
    return None


def _places() -> list[str]:
    """The real paths of toolkits, and the vendor's program."""
    found = [str(Path(place).resolve()) for place in _PLACES if Path(place).exists()]
    return found + [tool for tool in (shutil.which("hy-smi"),) if tool]


def version_of(package: str) -> str | None:
    """Of an installed package, without importing it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def is_vendors(version: str) -> bool:
    """Whether a version is of a build for DTK: "3.5.1+das.opt1.dtk2604"."""
    return _TAG.search(version) is not None or "das" in version.partition("+")[2].split(".")


def problems(torch_version: str, triton_version: str | None) -> list[tuple[str, str]]:
    """What is wrong with a Hygon machine's packages: (what, how to mend it)."""
    found = []
    if not is_vendors(torch_version):
        what = f"torch {torch_version} is no build for Hygon's DTK, and may have replaced one"
        found.append((what, _INSTALL))
    if triton_version is not None and not is_vendors(triton_version):
        what = f"Triton {triton_version} is not the vendor's build: it knows no gfx928, gfx936 or gfx938"
        found.append((what, _INSTALL))
    tags = {_TAG.search(version) for version in (torch_version, triton_version or "")} - {None}
    numbers = {tag.groups() for tag in tags if tag is not None}
    if len(numbers) > 1:
        what = f"torch {torch_version} and Triton {triton_version} are for different DTKs"
        found.append((what, _INSTALL))
    return found
