"""`python -m qwenrt.conformance.gpu --out DIR --budget 500`: what only an accelerator can show, in nine minutes.

It needs the torch and the Triton that are there, nothing else, and sets nothing on the device. report.json in DIR is
written again after each phase; a phase that did not run is "not measured".
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from qwenrt.conformance.facts import facts
from qwenrt.conformance.gpu import driver, phases, report
from qwenrt.conformance.gpu.report import FAILED, Notes
from qwenrt.errors import QwenrtError


def main(arguments: Sequence[str] | None = None) -> int:
    """0: no phase failed or found anything wrong; 1: one did; 2: there is no such device."""
    names = [phase.name for phase in driver.PHASES]
    parser = argparse.ArgumentParser(prog="python -m qwenrt.conformance.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the report goes")
    parser.add_argument("--budget", type=float, default=500, metavar="S", help="seconds (default: 500)")
    parser.add_argument("--device", default="cuda", help="as for qwenrt.load (default: cuda)")
    parser.add_argument("--only", action="append", choices=names, help="this phase; may be repeated")
    # What the process of a phase is told: until when, by the clock, as its start takes time too.
    parser.add_argument("--phase", choices=names, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.phase is not None:
        notes = Notes(driver.notes_of(options.out))
        phases.WORK[options.phase](notes, options.device, options.until - time.time(), options.out)
        notes.keep()
        return 0
    here = facts(options.device)
    if here["backend"] is None:
        print(here["kernels"], file=sys.stderr)
        return 2
    chosen = [phase for phase in driver.PHASES if not options.only or phase.name in options.only]
    results = driver.run(chosen, options.out, options.budget, options.device, here)
    print("\n".join([f"{here['kernels']}; torch {here['packages']['torch']}", *report.printed(results)]))
    return int(any(result.findings or result.state == FAILED for result in results))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except QwenrtError as error:
        sys.exit(str(error))
