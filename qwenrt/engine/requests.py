"""What is asked of an engine, checked before anything is computed: everything that can be wrong is found here."""

from __future__ import annotations

import math
from collections.abc import Sequence as List
from dataclasses import dataclass, field

from qwenrt.engine.adapters import LoadedAdapter
from qwenrt.engine.grammar import Compiled
from qwenrt.engine.output_processor import StopRules
from qwenrt.engine.sequence import Sequence
from qwenrt.engine.thoughts import ThoughtRules
from qwenrt.errors import CapacityError, RequestError, shown
from qwenrt.sampling_params import SamplingParams
from qwenrt.text.replies.parser import ReplyStream

MAX_STOP_SEQUENCES = 256


@dataclass(frozen=True)
class Progress:
    """Tokens of a prompt: those that were found in the cache, those that need no more computing."""

    cached: int
    done: int

    @classmethod
    def of(cls, seq: Sequence) -> Progress:
        """Of a sequence that the engine's thread may be changing."""
        cached = seq.num_cached or 0
        done = seq.prompt_len if seq.num_output else min(seq.num_stored, seq.prompt_len)
        return cls(cached, max(cached, done))


@dataclass(frozen=True)
class Request:
    """A checked request: what `Engine.check` makes and `Engine.enqueue` takes. ``arrived``: by the engine's clock.
    ``begun``: its first completion, once the engine has it."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    rules: StopRules
    skip_special_tokens: bool
    replies: tuple[ReplyStream, ...] = ()
    thought: ThoughtRules | None = None
    grammar: Compiled | None = None
    arrived: float = 0.0
    adapter: LoadedAdapter | None = None
    begun: list[Sequence] = field(default_factory=list)

    @property
    def deadline(self) -> float:
        """When it ends as it is, by the engine's clock."""
        return math.inf if self.params.timeout is None else self.arrived + self.params.timeout


@dataclass(frozen=True)
class Bounds:
    """What a request must keep to. ``max_model_len``: tokens of prompt and answer; ``num_blocks`` of ``block_size``
    tokens are in the cache; ``finds_text``: whether there is a tokenizer, to find stop strings with."""

    vocab_size: int
    max_model_len: int
    num_blocks: int
    block_size: int
    finds_text: bool

    @property
    def context_limit(self) -> int:
        """Tokens that a sequence can come to have."""
        return min(self.max_model_len, self.num_blocks * self.block_size)

    def check_params(self, params: object) -> SamplingParams:
        """Raises RequestError."""
        if not isinstance(params, SamplingParams):
            raise RequestError(
                "sampling_params", f"got {type(params).__name__}", "Pass a qwenrt.SamplingParams."
            )
        if params.stop and not self.finds_text:
            raise RequestError(
                f"stop={list(params.stop)!r:.80}",
                "this model has no tokenizer to find text with",
                "Use stop_token_ids.",
            )
        outside = [i for i in params.logit_bias or () if i >= self.vocab_size]
        if outside:
            raise RequestError(
                f"logit_bias for token {shown(outside[0])}",
                f"the vocabulary has {self.vocab_size} ids",
                f"Ids go from 0 to {self.vocab_size - 1}.",
            )
        return params

    def check_stops(self, stop_sequences: List[List[int]]) -> list[tuple[int, ...]]:
        """Raises RequestError."""
        sequences = [_stop_sequence(s) for s in stop_sequences]
        if len(sequences) > MAX_STOP_SEQUENCES:
            raise RequestError(
                "stop_sequences",
                f"{len(sequences)} of them",
                f"At most {MAX_STOP_SEQUENCES} are searched for.",
            )
        return sequences

    def check_prompt(self, prompt_token_ids: List[int]) -> list[int]:
        """Token ids with room for one more behind them. Raises RequestError, or CapacityError where the cache can never
        hold them."""
        prompt = self.check_ids(prompt_token_ids)
        if len(prompt) > self.max_model_len - 1:
            raise RequestError(
                f"a prompt of {len(prompt)} tokens",
                f"the context is {self.max_model_len} tokens, one of them for the answer",
                "Shorten the prompt, or load with a larger max_model_len.",
            )
        if len(prompt) > self.context_limit - 1:
            raise CapacityError(
                f"a prompt of {len(prompt)} tokens",
                f"the KV cache holds {self.context_limit} tokens in {self.num_blocks} blocks",
                'Shorten the prompt, free memory before loading, or set kv_cache_dtype="int8".',
            )
        return prompt

    def check_ids(self, token_ids: List[int]) -> list[int]:
        """One token id or more. Raises RequestError."""
        if isinstance(token_ids, (str, bytes)) or not isinstance(token_ids, List):
            raise RequestError(
                "prompt token ids", f"got {type(token_ids).__name__}", "Pass a list of integers."
            )
        ids = list(token_ids)
        if not ids:
            raise RequestError("prompt token ids", "an empty list", "Pass at least one token.")
        for i in ids:
            if type(i) is not int or not 0 <= i < self.vocab_size:
                raise RequestError(
                    f"prompt token id {shown(i)}",
                    f"the vocabulary has {self.vocab_size} ids",
                    f"Ids are integers from 0 to {self.vocab_size - 1}.",
                )
        return ids


def _stop_sequence(sequence: object) -> tuple[int, ...]:
    ok = (
        isinstance(sequence, List)
        and not isinstance(sequence, (str, bytes))
        and 0 < len(sequence) <= MAX_STOP_SEQUENCES
        and all(type(i) is int and i >= 0 for i in sequence)
    )
    if not ok:
        raise RequestError(
            "stop_sequences", f"one is {sequence!r:.80}", "Each must be a non-empty list of token ids."
        )
    assert isinstance(sequence, List)
    return tuple(sequence)
