"""What is installed for Ascend devices, read from files and names: nothing of it is imported, torch neither."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

_PAIRS = Path(__file__).with_name("pairs.json")
_INSTALLED = Path("usr/local/Ascend")
_DRIVER = ("driver/version.info",)
_TOOLKITS = ("cann", "latest", "ascend-toolkit/latest")  # below _INSTALLED, the newest way first
_CANN = (
    *(f"{where}/ascend_toolkit_install.info" for where in ("aarch64-linux", "x86_64-linux", "share/info")),
    *("version.cfg", "version.info", "toolkit/version.info", "compiler/version.info", "opp/version.info"),
)
_KERNELS = "opp/built-in/op_impl/ai_core/tbe/kernel"  # a directory for each family of processors
_MANAGER, _CARDS = "dev/davinci_manager", "davinci[0-9]*"
# CANN's own number is version_dir in a version.info, whose Version is a part's, and behind ":" in version.cfg.
_NUMBERS = [
    re.compile(before + r"(\d+\.\d+(?:\.[0-9A-Za-z]+)*)", re.MULTILINE)
    for before in (r"^version_dir=\D*", r"^\w+_running_version=\[(?:[^\]:]*:)?", r"^[Vv]ersion=")
]
_SOURCE = (
    "source /usr/local/Ascend/cann/set_env.sh (up to CANN 8.3: .../ascend-toolkit/set_env.sh), then try again"
)
_INTO_CONTAINER = (
    "a container needs --device /dev/davinci0 /dev/davinci_manager /dev/devmm_svm /dev/hisi_hdc and "
    "/usr/local/Ascend/driver (docs/deploying.md)"
)


@dataclass
class Software:
    """Versions, None for what is not there. ``problems``: (what does not fit, how to mend it); ``missing``: the same of
    what seems not to be there, which is no problem where a device answers all the same."""

    torch_npu: str | None
    torch: str | None
    driver: str | None
    cann: str | None
    problems: list[tuple[str, str]] = field(default_factory=list)
    missing: list[tuple[str, str]] = field(default_factory=list)


def look(root: Path = Path("/"), variables: Mapping[str, str] = {}) -> Software:
    """What is here; ``variables`` are the environment's."""
    home = root / _INSTALLED
    named = [
        Path(variables[name]) for name in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME") if name in variables
    ]
    toolkits = [*named, *(home / name for name in _TOOLKITS)]
    here = ((toolkit, version) for toolkit in toolkits if (version := _version(toolkit, _CANN)) is not None)
    toolkit, cann = next(here, (None, None))
    found = Software(_package("torch-npu"), _package("torch"), _version(home, _DRIVER), cann)
    if found.torch_npu is None:
        if found.driver is not None:
            found.problems.append(
                (f"driver {found.driver} is here, but not torch_npu", _install(found.torch))
            )
        return found
    found.problems += _mismatches(found)
    found.missing += _of_toolkit(toolkit, found.cann, variables)
    found.missing += _of_driver(root, found.driver)
    cards = variables.get("ASCEND_RT_VISIBLE_DEVICES")
    if cards is not None:
        what = f"ASCEND_RT_VISIBLE_DEVICES={cards!r} hides all other cards"
        found.missing.append((what, "name cards that `npu-smi info` lists, counted from 0, or unset it"))
    return found


def _of_toolkit(
    toolkit: Path | None, version: str | None, variables: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    """What CANN lacks."""
    if toolkit is None:
        yield (
            "no CANN: none below /usr/local/Ascend, and ASCEND_HOME_PATH names none",
            f"install CANN, then {_SOURCE}",
        )
        return
    if "ASCEND_OPP_PATH" not in variables:
        yield f"CANN {version} in {toolkit} is not set up here (no ASCEND_OPP_PATH)", _SOURCE
    if (toolkit / "opp").is_dir() and not any((toolkit / _KERNELS).glob("ascend*")):
        what = f"CANN {version} in {toolkit} has no compiled operators"
        fix = "install its package of operators for this processor (kernels up to CANN 8.3, ops later)"
        yield what, fix


def _of_driver(root: Path, version: str | None) -> Iterator[tuple[str, str]]:
    """What lies between the driver and this process."""
    manager, cards = root / _MANAGER, sorted((root / "dev").glob(_CARDS))
    if not manager.exists():
        what = "no driver: there is no /dev/davinci_manager" + (
            f", though {version} is installed" if version else ""
        )
        yield what, f"install driver and firmware (Ascend HDK), or load it again; {_INTO_CONTAINER}"
    elif not cards:
        yield (
            "no card: the driver is here, but no /dev/davinci0 and the like",
            f"`npu-smi info` lists cards; {_INTO_CONTAINER}",
        )
    elif shut := [
        f"/dev/{node.name}" for node in (manager, *cards) if not os.access(node, os.R_OK | os.W_OK)
    ]:
        what = f"this user may not open {', '.join(shut)}"
        yield what, "add the user to the group HwHiAiUser (a container: --group-add), then log in again"


def _package(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _version(home: Path, files: tuple[str, ...]) -> str | None:
    """That of the first of these files that can be read and says one."""
    for name in files:
        try:
            with open(home / name, encoding="utf-8", errors="replace") as file:
                text = file.read(1 << 16)
        except OSError:
            continue
        said = next((number for pattern in _NUMBERS if (number := pattern.search(text))), None)
        if said is not None:
            return said.group(1)
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
    if found.cann is not None and wanted is not None and _first(found.cann, 2) != wanted:
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
