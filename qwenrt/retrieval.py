"""What a loaded model does for search: embeddings of texts, and how well documents answer a query."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qwenrt.arguments import as_list, flag
from qwenrt.errors import RequestError
from qwenrt.text.chat.reranking import DEFAULT_TASK, rerank_prompt, verdict_ids

if TYPE_CHECKING:
    import torch

    from qwenrt.assembly import Assembled


class Retrieval(ABC):
    """The part of an `LLM` that is asked for vectors and scores, not for text."""

    max_model_len: int

    @abstractmethod
    def _alive(self) -> Assembled:
        """The model with its engine. RequestError where it was closed."""

    def embed(
        self,
        texts: str | Sequence[str],
        *,
        instruction: str | None = None,
        prompt_name: str | None = None,
        normalize: bool | None = None,
    ) -> torch.Tensor:
        """Embeddings of texts -> float32 [len(texts), D] on the CPU, or [D] of a single text.

        Computed as the checkpoint's modules.json and the files it names say (the format of sentence-transformers);
        without one as in Qwen3-Embedding: the final state of the last token, normalised to length 1; a model that was
        made to write says so in a warning. ``normalize``: whether vectors have length 1, None as the files say.
        Queries have an ``instruction`` ("Given a question, retrieve passages that answer it") or one of the model's
        own prompts, by ``prompt_name``; documents mostly none.
        """
        listed = [texts] if isinstance(texts, str) else as_list("texts", texts)
        vectors, _ = self.embed_counted(listed, instruction, prompt_name, normalize)
        return vectors[0] if isinstance(texts, str) else vectors

    def embed_counted(
        self,
        texts: Sequence[str | list[int]],
        instruction: str | None = None,
        prompt_name: str | None = None,
        normalize: bool | None = None,
        *,
        truncate: bool | None = None,
    ) -> tuple[torch.Tensor, int]:
        """As `embed`, of texts or of their token ids -> float32 [len(texts), D], and how many tokens were read.

        truncate: whether a text that is too long is cut, also to the context, or refused; None cuts where the
        checkpoint's files say at how many tokens, and refuses one that is longer than the context.
        """
        alive = self._alive()
        tokenizer = alive.prompter.needs_tokenizer("embed")
        if not texts:
            raise RequestError("embed", "an empty list", "Pass at least one text.")
        normalize = None if normalize is None else flag("normalize", normalize)
        longest = None if truncate is None else self.max_model_len
        return alive.embedder.embed(
            *(alive.engine, tokenizer, texts, instruction, prompt_name, normalize),
            longest=longest,
            truncate=truncate is not False,
        )

    def rerank(self, query: str, documents: Sequence[str], *, instruction: str = DEFAULT_TASK) -> list[float]:
        """How well each document answers the query, from 0 to 1, in the order of ``documents``.

        As Qwen3-Reranker does it: the probability of "yes" against "no" as the next token of its question.
        """
        pairs = [(query, document) for document in as_list("documents", documents)]
        return self.scores_counted(pairs, instruction)[0]

    def scores_counted(
        self, pairs: Sequence[tuple[str, str]], instruction: str = DEFAULT_TASK
    ) -> tuple[list[float], int]:
        """As `rerank`, of (query, document) pairs: a score of each, and how many tokens were read."""
        alive = self._alive()
        tokenizer = alive.prompter.needs_tokenizer("rerank")
        if not pairs:
            return [], 0
        prompts = [rerank_prompt(tokenizer, query, document, instruction) for query, document in pairs]
        logits = alive.engine.last_logits(prompts, verdict_ids(tokenizer))
        scores: list[float] = logits.softmax(-1)[:, 1].tolist()
        return scores, sum(map(len, prompts))
