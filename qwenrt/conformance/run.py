"""Runs the table over backends, and says in another table what was found."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qwenrt.config.layers import BLOCK_SIZE
from qwenrt.conformance import cases
from qwenrt.conformance.case import Case, Checker
from qwenrt.conformance.compare import Finding, named
from qwenrt.conformance.subjects import DEFINITION, Subject


@dataclass(frozen=True)
class Outcome:
    case: Case
    subject: str
    finding: Finding

    @property
    def why(self) -> str:
        """What is wrong, or nothing."""
        return "; ".join(self.finding.complaints[:3])


def chosen(
    subjects: Sequence[Subject], *, full: bool = False, ops: Sequence[str] = ()
) -> Iterator[tuple[Case, list[Subject]]]:
    """The cases to run and on whom: ``full``, each on every subject; else those in which any two values meet. Where a
    case has blocks of the usual size, a backend gets those of its own, which it has code for."""
    if full:
        for case, linear in cases.table(ops):
            here = [subject for subject in subjects if linear or not subject.linears_only]
            for size in dict.fromkeys(subject.backend.block_size for subject in here):
                yield _in_blocks(case, size), [s for s in here if s.backend.block_size == size]
        return
    by_name = {subject.name: subject for subject in subjects}
    every = [subject.name for subject in subjects if not subject.linears_only]
    for case, name in cases.selection(every, [s.name for s in subjects if s.linears_only], ops):
        yield _in_blocks(case, by_name[name].backend.block_size), [by_name[name]]


def _in_blocks(case: Case, size: int) -> Case:
    if getattr(case, "block_size", None) != BLOCK_SIZE or size == BLOCK_SIZE:
        return case
    return dataclasses.replace(case, block_size=size)  # type: ignore[call-arg]


def run(todo: Iterable[tuple[Case, list[Subject]]]) -> Iterator[Outcome]:
    """Each case on its subjects. Whatever a backend raises is an outcome too. torch computes on one thread meanwhile:
    what there is to compute is small, and its threads would wait beside the backend's."""
    threads, lacking = torch.get_num_threads(), dict[tuple[str, torch.dtype], str]()
    torch.set_num_threads(1)
    try:
        for case, subjects in todo:
            checker = case.checker()
            for subject in subjects:
                key = (subject.name, case.dtype)
                if key not in lacking:
                    lacking[key] = subject.lacks(case.dtype)
                if lacking[key]:
                    yield Outcome(case, subject.name, Finding(served=[(case.op, False, lacking[key])]))
                else:
                    yield Outcome(case, subject.name, _look(checker, subject))
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def _look(checker: Checker, subject: Subject) -> Finding:
    try:
        return checker.check(subject)
    except Exception as error:  # the other cases still count
        return Finding(complaints=[f"{type(error).__name__}: {str(error)[:160]}"])


@dataclass
class Row:
    """Cases of one op, kind and dtype. ``worst``: the finding that used up most of what is allowed; ``served``: who has
    code of its own, and why others have not; ``wrong``: one line for each outcome that is."""

    op: str
    kind: str
    dtype: str
    count: int = 0
    worst: Finding = dataclasses.field(default_factory=Finding)
    served: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    wrong: list[str] = dataclasses.field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        self.count += 1
        if outcome.finding.share >= self.worst.share:
            self.worst = outcome.finding
        who = self.served.setdefault(named(outcome.finding.served), [])
        if outcome.subject not in who:
            who.append(outcome.subject)
        if not outcome.finding.ok:
            self.wrong.append(f"{outcome.subject}: {outcome.case.id}: {outcome.why}")

    def as_json(self) -> dict[str, Any]:
        return {
            "op": self.op,
            "kind": self.kind,
            "dtype": self.dtype,
            "cases": self.count,
            "error": self.worst.error,
            "bound": self.worst.bound,
            "served": self.served,
            "wrong": self.wrong,
        }


def summarise(outcomes: Iterable[Outcome]) -> list[Row]:
    """In the order of the table."""
    rows: dict[tuple[str, str, str], Row] = {}
    for outcome in outcomes:
        case = outcome.case
        key = (case.op, case.kind, str(case.dtype).removeprefix("torch."))
        rows.setdefault(key, Row(*key)).add(outcome)
    order = cases.names()
    return sorted(rows.values(), key=lambda row: order.index(row.op))


def as_report(
    outcomes: Sequence[Outcome], facts: dict[str, Any], simulated_by: str | None = None
) -> dict[str, Any]:
    """For JSON: what was found, on the machine of ``facts``. ``simulated_by``: what stood in the device's place."""
    how = {"how": "measured"} if simulated_by is None else {"how": "simulated", "by": simulated_by}
    wrong = sum(not outcome.finding.ok for outcome in outcomes)
    rows = [row.as_json() for row in summarise(outcomes)]
    return {"kind": "conformance", **how, **facts, "cases": len(outcomes), "wrong": wrong, "rows": rows}


def printed(rows: Sequence[Row]) -> Iterator[str]:
    """The table as lines of text; errors and bounds are relative to the largest value of a result."""
    cells = [("op", "kind", "dtype", "cases", "worst", "allowed", "own kernels")]
    for row in rows:
        served = [name for how, names in row.served.items() if how.startswith("own") for name in names]
        wrong = f"WRONG in {len(row.wrong)}: " if row.wrong else ""
        how = ", ".join(dict.fromkeys(_short(served))) or _reasons(row)
        cells.append(
            (
                row.op,
                row.kind,
                row.dtype,
                str(row.count),
                f"{row.worst.error:.1e}",
                f"{row.worst.bound:.1e}",
                wrong + how,
            )
        )
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]) - 1)]
    for line in cells:
        yield "  ".join((*(text.ljust(width) for text, width in zip(line, widths)), line[-1])).rstrip()


def _reasons(row: Row) -> str:
    """Why there is no kernel of its own, as the backends say."""
    whys = [how for how, names in row.served.items() if names != [DEFINITION]]
    return ", ".join(whys) or "definition"


def _short(names: Sequence[str]) -> Iterator[str]:
    """Subjects without what their activations are rounded to."""
    for name in names:
        yield " ".join(name.split()[:2])
