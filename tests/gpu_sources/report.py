"""Reports of the kernels for GPUs on a machine without one, for docs/devices.md: the table of qwenrt.conformance with
Triton's interpreter, and for Gluon the shim, in the device's place. `make gpu-sources GPU_SOURCES=--reports`."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from tests.gpu_sources import interpreter, shim  # isort: skip  # noqa: F401  before any kernel is made

import torch

from qwenrt.backends.cuda.kernels import stream
from qwenrt.backends.cuda.overrides import TritonBackend
from qwenrt.backends.cuda.profiles import _AMD, _HYGON, Profile
from qwenrt.backends.cuda.tables import TILES, Tiles
from qwenrt.conformance import cases
from qwenrt.conformance.case import Case
from qwenrt.conformance.facts import facts
from qwenrt.conformance.run import Outcome, as_report, run
from qwenrt.conformance.subjects import Subject
from tests.gpu_sources import test_gluon, test_numerics

REPORTS = Path(__file__).parents[2] / "docs" / "reports"


@dataclass(frozen=True)
class Played:
    """One architecture: whose it is, and what a report calls it. ``gluon``: its linears of few tokens are in Gluon."""

    backend: str
    profile: Profile
    name: str
    gluon: bool = False

    @property
    def by(self) -> str:
        """What stands in its place."""
        parts = [f"Triton {metadata.version('triton')}'s interpreter"]
        parts += ["tests/gpu_sources/shim.py for Gluon"] if self.gluon else []
        return ", ".join(parts)

    def subject(self) -> Subject:
        backend = (test_gluon.Streaming if self.gluon else TritonBackend)(torch.device("cpu"))
        units = self.profile.matrix and self.profile.bfloat16
        backend.tiles = dataclasses.replace(test_numerics.TILES, matrix_units=units)
        return Subject(self.profile.arch, backend)


EVERY = {
    "cuda-sm_90-simulated": Played("cuda", Profile("nvidia", "sm_90", 32), "NVIDIA sm_90", gluon=True),
    "cuda-gfx942-simulated": Played("cuda", _AMD["gfx942"], "AMD gfx942"),
    "dcu-gfx906-simulated": Played("dcu", _HYGON["gfx906"], "Hygon gfx906"),
    "dcu-gfx936-simulated": Played("dcu", _HYGON["gfx936"], "Hygon gfx936"),
}


def outcomes(played: Played) -> Iterator[Outcome]:
    """Of every op of the table cases of each kind; and of linears in Gluon those that reach it."""
    subject = played.subject()
    for op in cases.names():
        todo: list[Case] = test_numerics.few(test_numerics.of(op, subject))
        yield from run((case, [subject]) for case in todo)
        print(f"{played.name}: {op}, {len(todo)} cases", flush=True)
    if played.gluon:
        usual: Tiles = subject.backend.tiles  # type: ignore[attr-defined]
        for op in test_gluon.OPS:
            for case, warps in test_gluon.cases(op):
                few = {"wide": warps, "wide_from": 0, "rows": 1 << 15}
                subject.backend.tiles = dataclasses.replace(TILES, **few)  # type: ignore[attr-defined]
                yield from run([(case, [subject])])
        subject.backend.tiles = usual  # type: ignore[attr-defined]


def report(played: Played) -> dict[str, Any]:
    kernels = "Triton kernels" + (", linears in Gluon" if played.gluon else "")
    kernels += "" if played.profile.matrix and played.profile.bfloat16 else ", products by sums"
    found = facts("cpu") | {
        "device": played.profile.arch,
        "backend": played.backend,
        "kernels": kernels,
        "card": {"name": played.name, "wave": played.profile.wave},
    }
    return as_report([*outcomes(played)], found, played.by)


def main(names: list[str]) -> int:
    """Those of ``names``, or all."""
    stream.launch = shim.run  # type: ignore[assignment]
    wrong = 0
    for name in names or EVERY:
        made = report(EVERY[name])
        wrong += made["wrong"]
        print(f"{name}: {made['cases']} cases, {made['wrong']} wrong", flush=True)
        (REPORTS / f"{name}.json").write_text(json.dumps(made, indent=1), encoding="utf-8")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
