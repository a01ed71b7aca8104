"""What `qwenrt tune` measured on this machine: the user's own part of tables.py, a small JSON file for each kind of
device and version of Triton, as what is best with one is not with another."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from qwenrt.backends.cuda.tables import Tiles, Warps
from qwenrt.config.fields import read_json
from qwenrt.errors import BackendError, shown
from qwenrt.files import is_there

logger = logging.getLogger("qwenrt")
Shape = tuple[int, int, int]  # bits (16: dense), outputs and inputs of a linear
FORMAT = 1
_KIND = "qwenrt tune"
_MOST_WARPS = 16
_MOST_LINEARS = 4096
_REMEDY = "Remove it, or run `qwenrt tune` again."


@dataclass(frozen=True)
class Tuned:
    """``device``: its name, as torch says it; ``linears``: the warps of those in Gluon."""

    device: str
    triton: str
    linears: dict[Shape, Warps] = field(default_factory=dict)
    pdl: bool = False

    def over(self, tiles: Tiles) -> Tiles:
        """The table with these in the place of its guesses."""
        return dataclasses.replace(tiles, own=tiles.own | self.linears, pdl=self.pdl)

    def beside(self, older: Tuned, seen: Iterable[Shape]) -> Tuned:
        """This, and of what was found before all but the shapes ``seen`` since."""
        kept = {shape: warps for shape, warps in older.linears.items() if shape not in seen}
        return dataclasses.replace(self, linears=kept | self.linears)


def version_of_triton() -> str:
    """Of the package that is installed, which may be a vendor's; "none" without one."""
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "none"


def path_in(directory: Path, device: str, triton: str) -> Path:
    """Where it is kept: in QWENRT_HOME, by names that files may have."""
    name = re.sub(r"[^A-Za-z0-9.+-]+", "-", f"{device}, Triton {triton}").strip("-")
    return directory / "tuned" / f"{name[:120]}.json"


def write(path: Path, tuned: Tuned) -> None:
    """As a whole, or not at all. Raises BackendError where it cannot be written."""
    rows = [
        {
            "bits": bits,
            "outputs": outputs,
            "inputs": inputs,
            "row_warps": warps.rows,
            "input_warps": warps.inputs,
        }
        for (bits, outputs, inputs), warps in sorted(tuned.linears.items())
    ]
    value = {
        "kind": _KIND,
        "format": FORMAT,
        "device": tuned.device,
        "triton": tuned.triton,
        "pdl": tuned.pdl,
    }
    beside = path.with_suffix(".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps({**value, "linears": rows}, indent=1), encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        remedy = "Make room or choose another file with --out."
        raise BackendError(f"writing {path}", error.strerror or str(error), remedy) from error


def read(path: Path) -> Tuned:
    """From a file that anyone may have written. Raises BackendError that says what is wrong with it."""
    value = read_json(path, BackendError)
    if value.get("kind") != _KIND or value.get("format") != FORMAT:
        found = f"kind {shown(value.get('kind'))}, format {shown(value.get('format'))}"
        raise BackendError(f"reading {path}", f"{found}, not {_KIND!r} of format {FORMAT}", _REMEDY)
    device, triton, pdl, rows = (value.get(name) for name in ("device", "triton", "pdl", "linears"))
    named = isinstance(device, str) and isinstance(triton, str) and isinstance(pdl, bool)
    if not named or not isinstance(rows, list) or len(rows) > _MOST_LINEARS:
        raise BackendError(f"reading {path}", "a device, a Triton, pdl or linears of another type", _REMEDY)
    return Tuned(str(device), str(triton), dict(_linear(path, row) for row in rows), bool(pdl))


def _linear(path: Path, row: Any) -> tuple[Shape, Warps]:
    names = ("bits", "outputs", "inputs", "row_warps", "input_warps")
    numbers = [row.get(name) for name in names] if isinstance(row, dict) else []
    whole = [n for n in numbers if isinstance(n, int) and not isinstance(n, bool) and 0 < n < 1 << 24]
    powers = len(whole) == len(names) and all(n & (n - 1) == 0 for n in whole[3:])
    if not powers or whole[0] not in (4, 8, 16) or whole[3] * whole[4] > _MOST_WARPS:
        found = f"{shown(row)}: bits are 4, 8 or 16, warps powers of two, {_MOST_WARPS} at most"
        raise BackendError(f"reading {path}", found, _REMEDY)
    bits, outputs, inputs, row_warps, input_warps = whole
    return (bits, outputs, inputs), Warps(row_warps, input_warps)


def tiles(usual: Tiles, directory: Path, device: str, triton: str) -> Tiles:
    """``usual`` with what was measured on such a device, where there is something; a file that is wrong is passed over,
    with a warning."""
    path = path_in(directory, device, triton)
    try:
        if not is_there(path, BackendError):
            return usual
        found = read(path)
    except BackendError as error:
        logger.warning("the kernels' table of this user is not used: %s", error)
        return usual
    if (found.device, found.triton) != (device, triton):
        logger.warning("%s is of %s with Triton %s, and not used", path, found.device, found.triton)
        return usual
    return found.over(usual)
