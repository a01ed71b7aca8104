"""One file for whoever has a device that this project has not: what is installed, and all that can be proven there.

Each part is a command in a process of its own with a limit, so that one that crashes or hangs costs only itself. The
file is written again after each.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qwenrt import __version__
from qwenrt.errors import QwenrtError
from qwenrt.files import is_there, opened

# name -> (arguments of Python, seconds); {device} and {json} are put in, the latter where the command writes a file.
PARTS: dict[str, tuple[tuple[str, ...], float]] = {
    "doctor": (("-m", "qwenrt", "doctor", "--device", "{device}", "--json"), 300),
    "selftest": (
        ("-m", "qwenrt", "selftest", "demo", "--device", "{device}", "--dtype", "auto", "--json"),
        600,
    ),
    "eval": (("-m", "qwenrt", "eval", "demo", "--device", "{device}", "--json"), 900),
    "conformance": (("-m", "qwenrt.conformance", "--device", "{device}", "--json", "{json}"), 1800),
}
_SAID = 2000  # characters of what a command said last


def write(
    device: str,
    path: Path,
    say: Callable[[str], None],
    parts: dict[str, tuple[tuple[str, ...], float]] = PARTS,
) -> bool:
    """Run all parts on ``device`` and write ``path`` -> whether each ended well. Raises OSError for a path that cannot
    be written."""
    report: dict[str, Any] = {"kind": "report", "qwenrt": __version__, "device": device, "parts": {}}
    path.write_text(json.dumps(report, indent=1), encoding="utf-8")
    for name, (arguments, limit_s) in parts.items():
        say(f"{name} (at most {limit_s / 60:g} minutes) ...")
        report["parts"][name] = found = _run(arguments, limit_s, device)
        path.write_text(json.dumps(report, indent=1, ensure_ascii=False), encoding="utf-8")
        say(f"{name}: {found['ended']}, {found['seconds']:.0f} s")
    return all(part["ended"] == "exit status 0" for part in report["parts"].values())


def _run(arguments: Sequence[str], limit_s: float, device: str) -> dict[str, Any]:
    """How a command ended, how long it took, and what it found: its JSON, or what it said last."""
    with tempfile.TemporaryDirectory() as directory:
        file, began = Path(directory) / "found.json", time.monotonic()
        command = [sys.executable, *(part.format(device=device, json=file) for part in arguments)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=limit_s, check=False
            )
        except subprocess.TimeoutExpired as over:
            said = (
                over.stderr.decode(errors="replace") if isinstance(over.stderr, bytes) else over.stderr or ""
            )
            return {"ended": "its time was over", "seconds": limit_s, "said": said[-_SAID:]}
        ended = f"exit status {done.returncode}" if done.returncode >= 0 else f"signal {-done.returncode}"
        found = {"ended": ended, "seconds": time.monotonic() - began, "said": done.stderr[-_SAID:]}
        try:
            if is_there(file, QwenrtError):
                with opened(file, QwenrtError) as written:
                    return found | {"found": json.load(written)}
            # torch_npu may print before, when it is imported
            begins = max(0, f"\n{done.stdout}".find("\n{"))
            return found | {"found": json.loads(done.stdout[begins:])}
        except (OSError, ValueError, QwenrtError):
            return found | {"said": (done.stdout + done.stderr)[-_SAID:]}
