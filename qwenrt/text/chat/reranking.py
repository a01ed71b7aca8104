"""The prompt of Qwen3-Reranker."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwenrt.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from qwenrt.text.tokenizer.tokenizer import Tokenizer

DEFAULT_TASK = "Given a web search query, retrieve relevant passages that answer the query"
_JUDGE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
_VERDICT = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


def rerank_prompt(tokenizer: Tokenizer, query: str, document: str, instruction: str) -> list[int]:
    """The ids of the question whether a document answers a query; the next token is the verdict."""
    for name, value in (("query", query), ("a document", document), ("instruction", instruction)):
        _require_text(name, value)
    body = f"<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}"
    head = tokenizer.encode(_JUDGE, allow_special=True)
    return [*head, *tokenizer.encode(body), *tokenizer.encode(_VERDICT, allow_special=True)]


def verdict_ids(tokenizer: Tokenizer) -> tuple[int, int]:
    """The ids of "no" and "yes". ConfigError for a vocabulary that has no single token for one of them."""
    ids = [tokenizer.encode(word) for word in ("no", "yes")]
    missing = [word for word, pieces in zip(("no", "yes"), ids, strict=True) if len(pieces) != 1]
    if tokenizer.token_id("<think>") is None:
        missing.append("<think>")
    if missing:
        raise ConfigError(
            "reranking with this model",
            f"it was not trained to rerank: its vocabulary has no single token for {', '.join(missing)}",
            "Load a Qwen3-Reranker model.",
        )
    return ids[0][0], ids[1][0]


def _require_text(what: str, value: object) -> None:
    if not isinstance(value, str):
        raise RequestError(what, f"got {type(value).__name__}", "Pass a str.")
