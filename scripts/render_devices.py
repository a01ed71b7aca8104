"""docs/devices.md from the reports in docs/reports/, and from nothing else.

A report is what `python -m qwenrt.conformance --device X --json FILE` wrote on a machine (with --simulated where
something played the device), or `qwenrt selftest --json`, or `python -m qwenrt.conformance.gpu`. `--check` says whether
the document is up to date.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
REPORTS, DOCUMENT = ROOT / "docs" / "reports", ROOT / "docs" / "devices.md"
# Backends that come with the package, and whose devices they are for.
BACKENDS = {
    "cpu": "CPU",
    "cuda": "NVIDIA and AMD GPUs",
    "dcu": "Hygon DCU",
    "npu": "Ascend NPU",
}

PLAYED = {"measured": "", "simulated": " (simulated)"}
COLUMNS = ("report", "on", "kernels", "versions", "date", "commit", "result")

HEAD = """# What was shown on which device

`scripts/render_devices.py` writes this page from the reports in [reports/](reports/), and from nothing else. Of each
device and op it says:

- **measured**: `python -m qwenrt.conformance --device ...` ran on that hardware, every case was within its bounds
  ([adding_a_backend.md](adding_a_backend.md)), and the device's own code served some of them;
- **simulated**: the device's own code within the same bounds, but with something else in the device's place, which
  stands below under "on". That shows what the code computes, and neither its speed nor a race;
- **definition**: plain torch served every case, as the op is defined;
- **not measured**: there is no report. The op is the definition in plain torch, or code that was never run there.

To add a device, run the command with `--json docs/reports/NAME.json`, then `python scripts/render_devices.py`.
"""


def reports() -> list[dict[str, Any]]:
    found = []
    for path in sorted(REPORTS.glob("*.json")):
        found.append(json.loads(path.read_text(encoding="utf-8")) | {"file": path.name})
    return sorted(found, key=lambda report: (report.get("backend") or "", report["file"]))


def of_ops(report: dict[str, Any]) -> dict[str, str]:
    """Of each op in a report of the table: a word."""
    said: dict[str, str] = {}
    for op in dict.fromkeys(row["op"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["op"] == op]
        wrong = sum(len(row["wrong"]) for row in rows)
        own = any(how.startswith("own") for row in rows for how in row["served"])
        word = report["how"] if own else "definition"
        said[op] = f"**wrong in {wrong}**" if wrong else word
    return said


def named(report: dict[str, Any]) -> str:
    card = report.get("card") or {}
    return card.get("name") or report.get("processor") or report["device"]


def render() -> str:
    found = reports()
    tables = [report for report in found if report["kind"] == "conformance"]
    without = [name for name in BACKENDS if not any(report["backend"] == name for report in tables)]
    columns = [(named(report) + PLAYED[report["how"]], of_ops(report)) for report in tables]
    columns += [(BACKENDS[name], {}) for name in without]
    ops = list(dict.fromkeys(op for _, said in columns for op in said))
    lines = [HEAD, "## Ops", "", "| op | " + " | ".join(name for name, _ in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    lines += [
        f"| `{op}` | " + " | ".join(said.get(op, "not measured") for _, said in columns) + " |" for op in ops
    ]
    lines += ["", "## Reports", "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    lines += [row_of(report) for report in found]
    speeds = [report for report in found if report["kind"] == "gpu"]
    lines += ["", "## Speed", ""]
    lines += [line for report in speeds for line in speed_of(report)] or [
        "Not measured on any accelerator: no report of `python -m qwenrt.conformance.gpu` is here."
    ]
    return "\n".join(lines) + "\n"


def row_of(report: dict[str, Any]) -> str:
    by = f" (played by {report['by']})" if report.get("how") == "simulated" else ""
    versions = ", ".join(f"{name} {version}" for name, version in report["packages"].items() if version)
    commit = (report.get("commit") or "")[:10] or "none"
    cells = (f"[{report['file']}](reports/{report['file']})", named(report) + by, report["kernels"], versions)
    return f"| {' | '.join((*cells, report['date'][:10], commit, result_of(report)))} |"


def result_of(report: dict[str, Any]) -> str:
    if report["kind"] == "conformance":
        return f"{report['cases']} cases, {report['wrong']} wrong"
    if report["kind"] == "selftest":
        wrong = sum(bool(finding["wrong"]) for finding in report["findings"])
        return f"{len(report['findings'])} texts, {wrong} wrong"
    done = [phase["name"] for phase in report["phases"] if phase["state"] == "done"]
    return f"{len(done)} of {len(report['phases'])} phases: {', '.join(done) or 'none'}"


def speed_of(report: dict[str, Any]) -> list[str]:
    """A line for each phase of a run on an accelerator."""
    lines = [f"### {named(report)}, {report['date'][:10]}", ""]
    for phase in report["phases"]:
        figures = ", ".join(f"{name} {value:.4g}" for name, value in phase.get("figures", {}).items())
        lines.append(f"- {phase['name']}: {figures or phase['state']}")
    return [*lines, ""]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="1 where the document is not what the reports say"
    )
    options = parser.parse_args()
    text = render()
    if options.check:
        return int(DOCUMENT.read_text(encoding="utf-8") != text)
    DOCUMENT.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
