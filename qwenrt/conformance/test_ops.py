"""Each op of each backend at hand: every case is within its bounds and writes to none of its inputs."""

from __future__ import annotations

import pytest

from qwenrt.conformance import cases
from qwenrt.conformance.run import chosen, run
from qwenrt.conformance.subjects import Subject, at_hand


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each op and each subject that it differs on."""
    subjects = at_hand(str(metafunc.config.getoption("device", default="cpu")))
    linear = {op.name for op in cases.OPS if op.linear}
    pairs = [(op, s.name) for op in cases.names() for s in subjects if op in linear or not s.linears_only]
    metafunc.parametrize(("op", "subject"), pairs)


@pytest.fixture(scope="module")
def subjects(request: pytest.FixtureRequest) -> list[Subject]:
    return at_hand(str(request.config.getoption("device", default="cpu")))


def test_an_op_is_as_defined(
    op: str, subject: str, subjects: list[Subject], request: pytest.FixtureRequest
) -> None:
    full = bool(request.config.getoption("full", default=False))
    todo = [(case, [who]) for case, here in chosen(subjects, full=full, ops=[op]) for who in here]
    mine = [(case, here) for case, here in todo if here[0].name == subject]
    assert mine
    wrong = [f"{outcome.case.id}: {outcome.why}" for outcome in run(mine) if not outcome.finding.ok]
    assert not wrong, f"{len(wrong)} of {len(mine)} cases\n" + "\n".join(wrong[:20])
