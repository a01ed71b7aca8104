"""Rounds of A B A B with the memory's read bandwidth beside them."""

from __future__ import annotations

import dataclasses
import datetime
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any, Protocol

from benchmarks import bounds, rows
from benchmarks.bandwidth import Bandwidth
from benchmarks.rows import Curve, Engine, Row, Work
from benchmarks.start import Starter
from benchmarks.summary import disturbance, undisturbed
from benchmarks.workers import ROOT, Options, Workers

_PATIENCE = 3  # this many times the rounds at most, where others disturb them


class Asked(Protocol):
    """A Worker, or what measures like one."""

    about: dict[str, Any]

    def ask(self, work: Work) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class Plan:
    """How thoroughly to measure."""

    rounds: int
    quick: bool
    tiny: bool

    def work(self, work: Work) -> Work:
        return rows.quick(work) if self.quick else work

    def engine(self, engine: Engine) -> Engine:
        return rows.tiny(engine) if self.tiny else engine


class Run:
    """One run of the command: its workers, its bandwidth, where it says how far it is."""

    def __init__(
        self, options: Options, plan: Plan, bandwidth: Bandwidth, say: Callable[[str], None]
    ) -> None:
        self.options, self.plan, self.bandwidth, self.say = options, plan, bandwidth, say

    def row(self, row: Row, workers: Workers) -> dict[str, Any]:
        """A row's rounds, and everything that was true of them."""
        work = self.plan.work(row.work)
        ours, peer = self.plan.engine(row.ours), self.plan.engine(row.peer)
        self.say(f"{row.key}: loading")
        if work.kind == "start":
            workers.of([])
            a, b = (Starter(engine, self.options) for engine in (ours, peer))
        else:
            a, b = workers.of([ours, peer])
        found: list[dict[str, float]] = []
        while len(undisturbed(found)) < self.plan.rounds and len(found) < _PATIENCE * self.plan.rounds:
            found.append(self._round(a, b, work))
            took = f"qwenrt {found[-1]['ours_s']:.3f} s, {peer.name} {found[-1]['peer_s']:.3f} s"
            again = (
                "" if undisturbed(found[-1:]) else f"; others had {disturbance(found[-1]):.0%} of the cores"
            )
            self.say(f"{row.key}: round {len(found)}: {took}{again}")
        return {
            **self._circumstances(),
            "work": dataclasses.asdict(work),
            "ours": ours.described() | {"about": a.about},
            "peer": peer.described() | {"about": b.about},
            "rounds": found,
        }

    def _round(self, ours: Asked, peer: Asked, work: Work) -> dict[str, float]:
        before = self.bandwidth.bytes_per_s()
        a = ours.ask(work)
        between = self.bandwidth.bytes_per_s()
        b = peer.ask(work)
        return {
            "ours_s": a["seconds"],
            "peer_s": b["seconds"],
            "ours_foreign": a["foreign"],
            "peer_foreign": b["foreign"],
            "read_bytes_per_s": max(before, between),
        }

    def curve(self, curve: Curve, workers: Workers) -> dict[str, Any]:
        """Seconds of every engine at every value: {label: {value: [seconds of each round]}}."""
        self.say(f"{curve.key}: loading")
        engines = [self.plan.engine(engine) for _, engine in curve.engines]
        loaded = list(zip((label for label, _ in curve.engines), workers.of(engines), strict=True))
        seconds: dict[str, dict[str, list[float]]] = {label: {} for label, _ in loaded}
        for value in curve.values[:2] if self.plan.quick else curve.values:
            work = dataclasses.replace(curve.work, **{curve.varied: value})
            work = dataclasses.replace(work, new_tokens=min(work.new_tokens, 4 if self.plan.quick else 99))
            for _ in range(min(self.plan.rounds, 2)):
                for label, worker in loaded:
                    if worker.engine.name == "qwenrt" or value in curve.peer_values:
                        seconds[label].setdefault(str(value), []).append(worker.ask(work)["seconds"])
            shown = ", ".join(
                f"{k} {statistics.median(v[str(value)]):.3f} s" for k, v in seconds.items() if str(value) in v
            )
            self.say(f"{curve.key}: {value}: {shown}")
        work = dataclasses.asdict(curve.work) | {"new_tokens": work.new_tokens}
        return {
            **self._circumstances(),
            "plot": curve.plot,
            "varied": curve.varied,
            "work": work,
            "seconds": seconds,
        }

    def bounds(self, samples: int) -> dict[str, Any]:
        """What bounds the kernels of a decode step, ``samples`` times."""
        measured, found = bounds.sample(self.bandwidth), []
        for number in range(1, samples + 1):
            found.append(measured())
            if number % 20 == 0 or number == samples:
                self.say(f"bounds: {number} of {samples}")
        return {**self._circumstances(), "samples": found}

    def _circumstances(self) -> dict[str, Any]:
        return {
            "when": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "commit": commit(),
            "threads": self.options.threads,
            "quick": self.plan.quick,
            "tiny": self.plan.tiny,
        }


def commit() -> str:
    """The tree that was measured; "+" behind it where files differ from the commit."""

    def git(*words: str) -> str:
        try:
            return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        except OSError:
            return ""

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "qwenrt", "csrc", "benchmarks/*.py")
    return (git("rev-parse", "--short=10", "HEAD") or "unknown") + ("+" if changed else "")


def machine() -> dict[str, Any]:
    """Processor, cores, memory, system and the versions that every engine shares."""
    from qwenrt import __version__
    from qwenrt.cli.machine import describe

    found = describe()
    kept = ("system", "processor", "cores_usable", "instruction_sets", "memory_total_bytes")
    python = f"{platform.python_implementation()} {sys.version.split()[0]}"
    return {key: found[key] for key in kept} | {"python": python, "qwenrt": __version__}
