"""Log-probabilities as clients read them."""

from __future__ import annotations

import json

from qwenrt.outputs import TokenLogprob
from qwenrt.text.dialects.answers import json_bytes
from qwenrt.text.dialects.logprobs import LEAST, logprob_entries


def test_tokens_have_text_bytes_and_their_likeliest_alternatives_first() -> None:
    given = [TokenLogprob(1, -0.5, {2: -3.0, 1: -0.5, 3: float("-inf")}), TokenLogprob(2, -0.25)]
    entries = logprob_entries(given, lambda token: (f"t{token}", bytes([token])))
    assert [entry["token"] for entry in entries] == ["t1", "t2"]
    assert entries[0]["bytes"] == [1] and entries[0]["logprob"] == -0.5
    assert [(top["token"], top["logprob"]) for top in entries[0]["top_logprobs"]] == [
        ("t1", -0.5),
        ("t2", -3.0),
        ("t3", LEAST),
    ]
    assert entries[1]["top_logprobs"] == []
    assert json.loads(json_bytes(entries)) == entries


def test_without_a_tokenizer_the_numbers_are_told() -> None:
    assert logprob_entries([TokenLogprob(7, -1.0)], None) == [
        {"token": "", "logprob": -1.0, "bytes": [], "top_logprobs": []}
    ]
