"""SamplingParams: what is accepted, what is refused, and that a refusal names the field."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenrt.errors import RequestError
from qwenrt.sampling_params import SamplingParams


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", -1),
        ("temperature", 1e308),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_p", 0),
        ("top_p", 2),
        ("top_k", -5),
        ("top_k", 1.5),
        ("min_p", 1.5),
        ("repetition_penalty", 0),
        ("n", 0),
        ("n", 10**6),
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", 2**63 + 1),
        ("seed", "abc"),
        ("seed", 2**64),
        ("logprobs", 10**4),
        ("stop", [""]),
        ("stop", ["x"] * 1000),
        ("stop", "x" * 10**6),
        ("stop", [3]),
        ("stop", b"bytes"),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", "12"),
        ("logit_bias", {1: float("nan")}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {"1": 1.0}),
        ("logit_bias", [1]),
        ("ignore_eos", 1),
        ("min_tokens", -1),
    ],
)
def test_bad_values_are_named(field: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{field: value})
    assert field in str(caught.value)
    assert len(str(caught.value)) < 400


def test_min_tokens_must_fit_max_tokens() -> None:
    with pytest.raises(RequestError, match=r"at most max_tokens \(4\)"):
        SamplingParams(max_tokens=4, min_tokens=5)


def test_one_stop_string_is_a_list_of_one() -> None:
    assert SamplingParams(stop="a").stop == ("a",)
    assert SamplingParams(stop=["a", "b", "a"]).stop == ("a", "b")


def test_with_changes_fields_and_knows_their_names() -> None:
    assert SamplingParams().with_(top_k=3).top_k == 3
    with pytest.raises(RequestError, match=r"'max_new_tokens': unknown\. Use max_tokens\."):
        SamplingParams().with_(max_new_tokens=3)


def test_greedy() -> None:
    assert SamplingParams(temperature=0).greedy and SamplingParams(top_k=1).greedy
    assert not SamplingParams().greedy


_anything = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers() | st.text(max_size=3), max_size=3),
    st.dictionaries(st.integers(), st.floats(), max_size=3),
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(list(SamplingParams.__dataclass_fields__)), _anything, max_size=4))
def test_anything_is_accepted_or_refused_by_name(fields: dict[str, Any]) -> None:
    try:
        params = SamplingParams(**fields)
    except RequestError as error:
        assert any(name in str(error) for name in SamplingParams.__dataclass_fields__)
    else:
        assert params.temperature >= 0 and 0 < params.top_p <= 1 and params.n >= 1
