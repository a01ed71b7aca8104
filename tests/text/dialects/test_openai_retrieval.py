"""Embeddings, rerank and score."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenrt.text.dialects import ollama_answers
from qwenrt.text.dialects import openai_retrieval as retrieval
from qwenrt.text.dialects.answers import Served, json_bytes
from qwenrt.text.dialects.openai_retrieval import EmbeddingAsk, RerankAsk, ScoreAsk
from qwenrt.text.dialects.problem import Problem
from tests.text.dialects.strategies import JSON, unhurried

READERS: dict[str, Callable[[bytes], Any]] = {
    "embeddings": lambda body: retrieval.read_embeddings(retrieval.decode_embeddings(body)),
    "rerank": lambda body: retrieval.read_rerank(retrieval.decode_rerank(body)),
    "score": lambda body: retrieval.read_score(retrieval.decode_score(body)),
}


def ask(route: str, **fields: Any) -> Any:
    return READERS[route](json.dumps(fields).encode())


READ = [
    ("embeddings", {"input": "a", "model": "m", "user": "u"}, EmbeddingAsk(["a"], "m")),
    ("embeddings", {"input": ["a", "<|im_end|>"]}, EmbeddingAsk(["a", "<|im_end|>"])),
    ("embeddings", {"input": [1, 2], "encoding_format": "base64"}, EmbeddingAsk([[1, 2]], as_base64=True)),
    ("embeddings", {"input": [[1], [2]], "dimensions": 4}, EmbeddingAsk([[1], [2]], dimensions=4)),
    ("embeddings", {"input": ["a"] * 2048, "encoding_format": None}, EmbeddingAsk(["a"] * 2048)),
    ("embeddings", {"input": "a", "instruction": "i"}, EmbeddingAsk(["a"], instruction="i")),
    ("embeddings", {"input": "a", "prompt_name": "query"}, EmbeddingAsk(["a"], prompt_name="query")),
    ("rerank", {"query": "q", "documents": ["a", {"text": "b", "id": 1}]}, RerankAsk("q", ["a", "b"], 2)),
    ("rerank", {"query": "q", "documents": ["a"], "top_n": 5}, RerankAsk("q", ["a"], 1)),
    (
        "rerank",
        {
            "query": "q",
            "documents": ["a", "b"],
            "top_n": 1,
            "return_documents": False,
            "instruction": "i",
            "model": "m",
        },
        RerankAsk("q", ["a", "b"], 1, "m", False, "i"),
    ),
    ("score", {"text_1": "q", "text_2": ["a", "b"]}, ScoreAsk([("q", "a"), ("q", "b")])),
    ("score", {"text_1": ["q", "r"], "text_2": ["a", "b"]}, ScoreAsk([("q", "a"), ("r", "b")])),
    ("score", {"text_1": "q", "text_2": "a", "instruction": "i"}, ScoreAsk([("q", "a")], "", "i")),
]


@pytest.mark.parametrize(("route", "fields", "read_as"), READ, ids=[f"{r} {f!r:.40}" for r, f, _ in READ])
def test_requests_are_read(route: str, fields: dict[str, Any], read_as: Any) -> None:
    assert ask(route, **fields) == read_as


BAD = [
    ("embeddings", {}, "input"),
    ("embeddings", {"input": []}, "input"),
    ("embeddings", {"input": ["a"] * 2049}, "input"),
    ("embeddings", {"input": ["a", 1]}, "input[1]"),
    ("embeddings", {"input": [[-1]]}, "input[0][0]"),
    ("embeddings", {"input": "a", "encoding_format": "hex"}, "encoding_format"),
    ("embeddings", {"input": "a", "dimensions": "4"}, "dimensions"),
    ("embeddings", {"input": "a", "instruction": "i", "prompt_name": "p"}, "instruction"),
    ("rerank", {"documents": ["a"]}, "query"),
    ("rerank", {"query": "q", "documents": []}, "documents"),
    ("rerank", {"query": "q", "documents": [{"content": "a"}]}, "documents[0].text"),
    ("rerank", {"query": "q", "documents": ["a"] * 2049}, "documents"),
    ("rerank", {"query": "q", "documents": ["a"], "top_n": 0}, "top_n"),
    ("score", {"text_1": "q"}, "text_2"),
    ("score", {"text_1": [], "text_2": "a"}, "text_1"),
    ("score", {"text_1": ["q", "r"], "text_2": ["a", "b", "c"]}, "text_1"),
    ("score", {"text_1": ["q", "r"], "text_2": "a"}, "text_1"),
    ("score", {"text_1": "q", "text_2": ["a"] * 2049}, "text_2"),
]


@pytest.mark.parametrize(("route", "fields", "param"), BAD, ids=[f"{r} {f!r:.40}" for r, f, _ in BAD])
def test_what_is_wrong_is_named(route: str, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(Problem) as caught:
        ask(route, **fields)
    assert (caught.value.status, caught.value.param) == (400, param)


@unhurried
@given(
    st.sampled_from(sorted(READERS)),
    st.dictionaries(
        st.sampled_from(["input", "query", "documents", "text_1", "text_2", "top_n", "dimensions"]), JSON
    ),
)
def test_any_object_is_read_or_a_problem(route: str, fields: dict[str, Any]) -> None:
    try:
        assert ask(route, **fields) is not None
    except Problem as found:
        assert found.status == 400


def test_vectors_are_cut_alike_for_clients_of_openai_and_ollama() -> None:
    vectors = [[3.0, 4.0, 0.5, 1.0], [0.0, 0.0, 1.0, 0.0]]
    for dimensions, wanted in ((None, vectors), (4, vectors), (2, [[0.6, 0.8], [0.0, 0.0]])):
        asked = EmbeddingAsk(["a", "b"], dimensions=dimensions)
        told = retrieval.embeddings_body(asked, vectors, "m", 5)["data"]
        assert [one["embedding"] for one in told] == wanted
        assert ollama_answers.embed_body(Served("m", "r"), vectors, dimensions)["embeddings"] == wanted
    for dimensions in (5, 0, -1, 10**30):
        problems = []
        for refused in (
            lambda: retrieval.embeddings_body(EmbeddingAsk(["a"], dimensions=dimensions), vectors, "m", 5),  # noqa: B023
            lambda: ollama_answers.embed_body(Served("m", "r"), vectors, dimensions),  # noqa: B023
        ):
            with pytest.raises(Problem) as caught:
                refused()
            assert caught.value.param == "dimensions" and "1 to 4" in caught.value.message
            problems.append(str(caught.value))
        assert problems[0] == problems[1]


def test_embeddings_are_numbers_or_base64_of_the_same_floats() -> None:
    vectors = [[0.5, -1.25], [1e-3, 3.0]]
    plain = json.loads(json_bytes(retrieval.embeddings_body(EmbeddingAsk(["a", "b"]), vectors, "m", 5)))
    assert plain == {
        "object": "list",
        "data": [
            {"object": "embedding", "index": 0, "embedding": [0.5, -1.25]},
            {"object": "embedding", "index": 1, "embedding": [1e-3, 3.0]},
        ],
        "model": "m",
        "usage": {"prompt_tokens": 5, "total_tokens": 5},
    }
    packed = retrieval.embeddings_body(EmbeddingAsk(["a", "b"], as_base64=True), vectors, "m", 5)
    raw = [base64.b64decode(one["embedding"]) for one in packed["data"]]
    assert [list(struct.unpack("<2f", one)) for one in raw] == [[0.5, -1.25], [pytest.approx(1e-3), 3.0]]


def test_the_best_documents_come_first() -> None:
    body = retrieval.rerank_body(RerankAsk("q", ["a", "b", "c"], 2), [0.1, 0.9, 0.9], "m", 12)
    assert body["results"] == [
        {"index": 1, "relevance_score": 0.9, "document": {"text": "b"}},
        {"index": 2, "relevance_score": 0.9, "document": {"text": "c"}},
    ]
    assert body["usage"] == {"prompt_tokens": 12, "total_tokens": 12}
    bare = retrieval.rerank_body(RerankAsk("q", ["a"], 1, return_documents=False), [0.1], "m", 1)
    assert bare["results"] == [{"index": 0, "relevance_score": 0.1}]


def test_scores_are_in_the_order_of_their_pairs() -> None:
    body = retrieval.score_body([0.2, 0.1], "m", 1_700_000_000, 3)
    assert body["data"] == [
        {"index": 0, "object": "score", "score": 0.2},
        {"index": 1, "object": "score", "score": 0.1},
    ]
    assert (body["object"], body["model"], body["created"]) == ("list", "m", 1_700_000_000)
