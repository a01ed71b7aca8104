"""Whole texts read at once, beside the requests and without a trace in the cache: logits, embeddings, scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from qwenrt.engine.failures import typed
from qwenrt.engine.model_runner import ModelRunner
from qwenrt.engine.requests import Bounds
from qwenrt.errors import RequestError
from qwenrt.ops.types import AdapterWeights


class Prefills:
    """What a model says of texts that it does not go on with. As an engine, not safe for threads."""

    def __init__(self, runner: ModelRunner, bounds: Bounds) -> None:
        self._runner, self._bounds = runner, bounds

    def logits(self, token_ids: Sequence[int], adapter: AdapterWeights | None = None) -> torch.Tensor:
        """The logits after each token of a text -> float32 [num_tokens, vocab_size] on the CPU."""
        self._runner.model.needs_head("logits")
        ids = self._checked(token_ids, "logits of {} tokens")
        try:
            return self._runner.logits(ids, adapter)
        except Exception as error:
            asked = f"computing the logits of {len(ids)} tokens"
            raise typed(error, asked, self._runner.model.backend) from error

    def pooled(
        self, prompts: Sequence[Sequence[int]], pool: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """``pool`` of each prompt's final states [n, D] -> float32 [len(prompts), ...] on the CPU."""
        return self._read(prompts, lambda states: torch.stack(list(map(pool, states))).float().cpu())

    def last_logits(self, prompts: Sequence[Sequence[int]], token_ids: Sequence[int]) -> torch.Tensor:
        """The logits of ``token_ids`` after each prompt -> float32 [len(prompts), len(token_ids)] on the CPU."""
        model = self._runner.model
        model.needs_head("logits")
        ids = self._bounds.check_ids(token_ids)
        model.needs_causal("scoring what comes next")
        return self._read(
            prompts, lambda states: model.logits(torch.stack([s[-1] for s in states]))[:, ids].cpu()
        )

    def _read(
        self, prompts: Sequence[Sequence[int]], read: Callable[[list[torch.Tensor]], torch.Tensor]
    ) -> torch.Tensor:
        if not prompts:
            raise RequestError("reading texts", "an empty list", "Pass at least one text.")
        checked = [self._checked(prompt, "reading a text of {} tokens") for prompt in prompts]
        try:
            return read(self._runner.hidden(checked))
        except Exception as error:
            longest = max(map(len, checked))
            asked = f"reading {len(checked)} texts of up to {longest} tokens"
            raise typed(error, asked, self._runner.model.backend) from error

    def _checked(self, token_ids: Sequence[int], asked: str) -> list[int]:
        """A text that the context holds. Raises RequestError, which tells what was ``asked`` of how many tokens."""
        ids = self._bounds.check_ids(token_ids)
        if len(ids) > self._bounds.max_model_len:
            raise RequestError(
                asked.format(len(ids)),
                f"the context is {self._bounds.max_model_len} tokens",
                "Shorten the text, or load with a larger max_model_len.",
            )
        return ids
