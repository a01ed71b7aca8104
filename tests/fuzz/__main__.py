"""python -m tests.fuzz SECONDS [NAME ...]: each fuzzer for so long; prints the seeds of what fails."""

from __future__ import annotations

import random
import resource
import sys
import time
import traceback

from tests.fuzz.fuzzers import FUZZERS, run

SLOW = 5.0  # seconds a case may take


def main(seconds: float, names: list[str]) -> int:
    faults = 0
    for name in names or list(FUZZERS):
        end, cases, slowest = time.monotonic() + seconds, 0, (0.0, 0)
        while time.monotonic() < end:
            seed = random.SystemRandom().getrandbits(63)
            started = time.monotonic()
            try:
                run(name, seed)
            except Exception:
                faults += 1
                print(
                    f"{name}: seed {seed}",
                    *traceback.format_exc().splitlines()[-7:],
                    sep="\n    ",
                    flush=True,
                )
            cases, slowest = cases + 1, max(slowest, (time.monotonic() - started, seed))
        faults += slowest[0] > SLOW
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        print(
            f"{name}: {cases} cases, slowest {slowest[0]:.2f} s (seed {slowest[1]}), peak {peak} MiB",
            flush=True,
        )
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main(float(sys.argv[1]), sys.argv[2:]))
