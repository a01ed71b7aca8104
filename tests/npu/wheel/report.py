"""The conformance table on the soft device, as a report for docs/devices.md.

`make npu-check NPU_CHECK="--reports docs/reports"` writes one for each processor, by `python -m tests.npu.wheel.report
FILE` in the environment of tests/npu/check.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from qwenrt.backends import registry
from qwenrt.backends.ascend import AscendBackend
from qwenrt.conformance.facts import facts
from qwenrt.conformance.run import as_report, chosen, run
from qwenrt.conformance.subjects import Subject
from tests.npu.wheel import soft

BY = (
    "tests/npu: the real torch_npu over a stand-in for CANN, each op computed on the CPU, torch_npu's own from their "
    "documentation"
)


def main(file: Path) -> int:
    soft.install()
    backend = registry.create("npu")
    assert isinstance(backend, AscendBackend)
    outcomes = list(run(chosen([Subject("npu", backend)])))
    found = facts("npu")
    found["card"]["name"] += f" ({backend.family.name})"
    report = as_report(outcomes, found, BY)
    file.write_text(json.dumps(report, indent=1), encoding="utf-8")
    print(f"{file.name}: {report['cases']} cases, {report['wrong']} wrong")
    print("\n".join(f"WRONG  {one.case.id}: {one.why}" for one in outcomes if not one.finding.ok))
    return int(report["wrong"] > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
