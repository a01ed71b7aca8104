"""What is installed for Ascend devices, read from files and names: nothing of it is imported, torch neither."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

_PAIRS = Path(__file__).with_name("pairs.json")
_INSTALLED = Path("usr/local/Ascend")
_DRIVER = ("driver/version.info",)
_CANN = (
    *("cann/version.cfg", "cann/version.info", "latest/version.cfg", "ascend-toolkit/latest/version.cfg"),
    *("ascend-toolkit/latest/toolkit/version.info", "ascend-toolkit/latest/compiler/version.info"),
)
_NUMBER = re.compile(r"(\d+\.\d+(?:\.[0-9A-Za-z]+)*)")


@dataclass
class Software:
    """Versions, None for what is not there; ``problems``: (what does not fit, how to mend it)."""

    torch_npu: str | None
    torch: str | None
    driver: str | None
    cann: str | None
    problems: list[tuple[str, str]] = field(default_factory=list)


def look(root: Path = Path("/")) -> Software:
    """What is here."""
    home = root / _INSTALLED
    found = Software(_package("torch-npu"), _package("torch"), _version(home, _DRIVER), _version(home, _CANN))
    if found.torch_npu is None:
        if found.driver is not None:
            found.problems.append(
                (f"driver {found.driver} is here, but not torch_npu", _install(found.torch))
            )
        return found
    found.problems += _mismatches(found)
    return found


def _package(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _version(home: Path, files: tuple[str, ...]) -> str | None:
    """The first number of the first of these files that can be read and has one."""
    for name in files:
        try:
            with open(home / name, encoding="utf-8", errors="replace") as file:
                text = file.read(1 << 16)
        except OSError:
            continue
        number = _NUMBER.search(text)
        if number is not None:
            return number.group(1)
    return None


def _mismatches(found: Software) -> list[tuple[str, str]]:
    """Versions that the vendor does not say to fit each other."""
    assert found.torch_npu is not None
    with open(_PAIRS, encoding="utf-8") as file:
        pairs = json.load(file)
    problems = []
    if found.torch is not None and _first(found.torch, 3) != _first(found.torch_npu, 3):
        what = f"torch_npu {found.torch_npu} beside torch {found.torch}: it fits {_first(found.torch_npu, 3)} alone"
        problems.append((what, _install(found.torch)))
    wanted = pairs["cann_of_torch_npu"].get(found.torch_npu)
    if found.cann is None:
        where = f"{_INSTALLED} (or where ASCEND_HOME_PATH says)"
        problems.append((f"no CANN in /{where}", "install CANN" + (f" {wanted}" if wanted else "")))
    elif wanted is not None and _first(found.cann, 2) != wanted:
        what = f"torch_npu {found.torch_npu} is made for CANN {wanted}, and {found.cann} is here"
        problems.append(
            (what, "if operators are refused or the self-check finds them wrong, install that pair")
        )
    oldest = pairs["oldest_driver_of_cann"].get(_first(found.cann or "", 2))
    if oldest is not None and found.driver is not None and _numbers(found.driver) < _numbers(oldest):
        what = f"driver {found.driver} is older than {oldest}, the first that CANN {found.cann} names"
        problems.append((what, "update driver and firmware (Ascend HDK); errors 507xxx come of this"))
    return problems


def _first(version: str, parts: int) -> str:
    return ".".join(version.partition("+")[0].split(".")[:parts])


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())


def _install(torch: str | None) -> str:
    fitting = f"=={_first(torch, 3)}.*" if torch else ""
    return f'pip install "torch-npu{fitting}", the one for this torch'
