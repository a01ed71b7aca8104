"""What all writers share."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from qwenrt.text.dialects.answers import json_bytes, sse
from tests.text.dialects.strategies import unhurried

LINE_ENDS = "a\nb\rc\x0bd\x0ce\x1cf\x1dg\x1eh\x85i\u2028j\u2029k"


@unhurried
@given(st.text() | st.dictionaries(st.text(), st.text()))
def test_json_is_one_line_by_everybodys_lines(value: object) -> None:
    data = json_bytes(value)
    assert json.loads(data) == value and len(data.decode().splitlines()) == 1


def test_every_end_of_a_line_is_escaped() -> None:
    data = json_bytes({LINE_ENDS: LINE_ENDS})
    assert json.loads(data) == {LINE_ENDS: LINE_ENDS} and len(data.decode().splitlines()) == 1
    assert len(sse(LINE_ENDS, "x").decode().splitlines()) == 3
    assert "·é杭" in json_bytes("·é杭").decode()
