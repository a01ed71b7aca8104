"""Embeddings, rerank and score: OpenAI's, and what Jina, Cohere and vLLM made of the same."""

from __future__ import annotations

import base64
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import UNSET

from qwenrt.errors import shown
from qwenrt.text.dialects import decoding
from qwenrt.text.dialects.answers import new_id
from qwenrt.text.dialects.decoding import at_most, bad, said
from qwenrt.text.dialects.dimensions import shortened
from qwenrt.text.dialects.openai_bodies import error_body as error_body
from qwenrt.text.dialects.openai_completions import TextsOrIds, texts_or_ids
from qwenrt.text.dialects.openai_fields import Flag, Text, Whole

MAX_INPUTS = 2048  # OpenAI's own limit; of documents and pairs as well


class EmbeddingRequest(msgspec.Struct, kw_only=True):
    """The body of POST /v1/embeddings. ``instruction`` and ``prompt_name`` are our own: as LLM.embed has them."""

    input: TextsOrIds
    model: Text = UNSET
    encoding_format: Text = UNSET
    dimensions: Whole = UNSET
    instruction: Text = UNSET
    prompt_name: Text = UNSET


class Document(msgspec.Struct):
    text: str


class RerankRequest(msgspec.Struct, kw_only=True):
    """The body of POST /v1/rerank."""

    query: str
    documents: list[str | Document]
    model: Text = UNSET
    top_n: Whole = UNSET
    return_documents: Flag = UNSET
    instruction: Text = UNSET


class ScoreRequest(msgspec.Struct, kw_only=True):
    """The body of POST /v1/score."""

    text_1: str | list[str]
    text_2: str | list[str]
    model: Text = UNSET
    instruction: Text = UNSET


@dataclass(frozen=True)
class EmbeddingAsk:
    """inputs: texts, or their token ids. dimensions: how many of a vector's first values are wanted, None for all."""

    inputs: list[str | list[int]]
    model: str = ""
    as_base64: bool = False
    dimensions: int | None = None
    instruction: str | None = None
    prompt_name: str | None = None


@dataclass(frozen=True)
class RerankAsk:
    """top_n: how many of the best documents are told. instruction: None is the model's own task."""

    query: str
    documents: list[str]
    top_n: int
    model: str = ""
    return_documents: bool = True
    instruction: str | None = None


@dataclass(frozen=True)
class ScoreAsk:
    """pairs: of a query and a document."""

    pairs: list[tuple[str, str]]
    model: str = ""
    instruction: str | None = None


# ---- embeddings


def decode_embeddings(body: bytes) -> EmbeddingRequest:
    """The request in a body. Raises Problem."""
    return decoding.decode(body, EmbeddingRequest)


def read_embeddings(request: EmbeddingRequest) -> EmbeddingAsk:
    """Raises Problem."""
    form = said(request.encoding_format) or "float"
    if form not in ("float", "base64"):
        raise bad("encoding_format", f"got {shown(form)}", "Known are float and base64.")
    if said(request.instruction) is not None and said(request.prompt_name) is not None:
        raise bad("instruction", "prompt_name is there too", "Send one of the two.")
    return EmbeddingAsk(
        texts_or_ids(request.input, "input", MAX_INPUTS),
        said(request.model) or "",
        form == "base64",
        said(request.dimensions),
        said(request.instruction),
        said(request.prompt_name),
    )


def embeddings_body(
    ask: EmbeddingAsk, vectors: Sequence[Sequence[float]], model: str, prompt_tokens: int
) -> dict[str, Any]:
    """vectors: one of each input, float32 values. In base64 they are little-endian. Raises Problem for dimensions that
    they do not have."""
    vectors = shortened(vectors, ask.dimensions)
    written: Sequence[Any] = [_base64(vector) for vector in vectors] if ask.as_base64 else vectors
    data = [{"object": "embedding", "index": i, "embedding": one} for i, one in enumerate(written)]
    return {"object": "list", "data": data, "model": model, "usage": _usage(prompt_tokens)}


def _base64(vector: Sequence[float]) -> str:
    floats = array("f", vector)
    if sys.byteorder == "big":
        floats.byteswap()
    return base64.b64encode(floats.tobytes()).decode()


def _usage(prompt_tokens: int) -> dict[str, int]:
    return {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens}


# ---- rerank and score


def decode_rerank(body: bytes) -> RerankRequest:
    """The request in a body. Raises Problem."""
    return decoding.decode(body, RerankRequest)


def read_rerank(request: RerankRequest) -> RerankAsk:
    """Raises Problem."""
    at_most("documents", request.documents, MAX_INPUTS)
    top_n = said(request.top_n)
    if not request.documents:
        raise bad("documents", "it is empty", "Send at least one document.")
    if top_n is not None and top_n < 1:
        raise bad("top_n", f"got {shown(top_n)}", "It must be at least 1.")
    documents = [one if isinstance(one, str) else one.text for one in request.documents]
    return RerankAsk(
        request.query,
        documents,
        len(documents) if top_n is None else min(top_n, len(documents)),
        said(request.model) or "",
        request.return_documents is not False,
        said(request.instruction),
    )


def rerank_body(ask: RerankAsk, scores: Sequence[float], model: str, prompt_tokens: int) -> dict[str, Any]:
    """scores: of each document; the best come first, equal ones in the order they were sent."""
    results: list[dict[str, Any]] = []
    for index in sorted(range(len(scores)), key=lambda i: -scores[i])[: ask.top_n]:
        result: dict[str, Any] = {"index": index, "relevance_score": scores[index]}
        if ask.return_documents:
            result["document"] = {"text": ask.documents[index]}
        results.append(result)
    return {"id": new_id("rerank-"), "model": model, "usage": _usage(prompt_tokens), "results": results}


def decode_score(body: bytes) -> ScoreRequest:
    """The request in a body. Raises Problem."""
    return decoding.decode(body, ScoreRequest)


def read_score(request: ScoreRequest) -> ScoreAsk:
    """One text and many, or as many of each. Raises Problem."""
    left = [request.text_1] if isinstance(request.text_1, str) else request.text_1
    right = [request.text_2] if isinstance(request.text_2, str) else request.text_2
    for param, texts in (("text_1", left), ("text_2", right)):
        at_most(param, texts, MAX_INPUTS)
        if not texts:
            raise bad(param, "it is empty", "Send at least one text.")
    if len(left) == 1:
        left = left * len(right)
    if len(left) != len(right):
        found = f"{len(left)} texts beside {len(right)} in text_2"
        raise bad("text_1", found, "Send one, or as many as there are in text_2.")
    return ScoreAsk(list(zip(left, right, strict=True)), said(request.model) or "", said(request.instruction))


def score_body(scores: Sequence[float], model: str, created: int, prompt_tokens: int) -> dict[str, Any]:
    """scores: of each pair."""
    data = [{"index": i, "object": "score", "score": score} for i, score in enumerate(scores)]
    return {
        "id": new_id("score-"),
        "object": "list",
        "created": created,
        "model": model,
        "data": data,
        "usage": _usage(prompt_tokens),
    }
