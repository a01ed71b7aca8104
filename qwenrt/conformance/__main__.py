"""`python -m qwenrt.conformance`: what a device's backend computes, beside the definitions."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from qwenrt.conformance import cases
from qwenrt.conformance.facts import facts
from qwenrt.conformance.run import Outcome, as_report, chosen, printed, run, summarise
from qwenrt.conformance.subjects import at_hand
from qwenrt.errors import QwenrtError


def main(arguments: Sequence[str] | None = None) -> int:
    """0: every case is within its bounds; 1: one is not; 2: there is no such device."""
    parser = argparse.ArgumentParser(prog="python -m qwenrt.conformance", description=__doc__)
    parser.add_argument(
        "--device", default="cpu", help="as for qwenrt.load: cpu, cuda:1, npu, a plugin's name"
    )
    parser.add_argument("--full", action="store_true", help="every combination instead of every pair: long")
    parser.add_argument("--op", action="append", choices=cases.names(), help="this op only; may be repeated")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table to a file as well")
    parser.add_argument(
        "--simulated", metavar="BY", help="what played the device, as the report has to say: not the hardware"
    )
    options = parser.parse_args(arguments)
    try:
        subjects = at_hand(options.device)
    except QwenrtError as error:
        print(error, file=sys.stderr)
        return 2
    print("backends: " + ", ".join(subject.name for subject in subjects))
    outcomes: list[Outcome] = []
    for outcome in run(chosen(subjects, full=options.full, ops=options.op or ())):
        outcomes.append(outcome)
        if not outcome.finding.ok:
            print(f"WRONG  {outcome.subject}: {outcome.case.id}: {outcome.why}", flush=True)
    rows = summarise(outcomes)
    print("\n".join(printed(rows)))
    wrong = sum(not outcome.finding.ok for outcome in outcomes)
    print(f"{len(outcomes)} cases, {wrong} wrong")
    if options.json is not None:
        report = as_report(outcomes, facts(options.device), options.simulated)
        options.json.write_text(json.dumps(report, indent=1), encoding="utf-8")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
