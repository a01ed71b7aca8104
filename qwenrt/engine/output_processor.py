"""From drawn tokens to Deltas: when a completion ends, and which text it may show."""

from __future__ import annotations

from collections.abc import Sequence as List
from contextlib import suppress
from dataclasses import dataclass

from qwenrt.engine.sequence import Sequence
from qwenrt.engine.thoughts import Thought
from qwenrt.errors import QwenrtError
from qwenrt.outputs import Delta, FinishReason, TokenLogprob, Usage
from qwenrt.text.replies.parser import Piece, Reply, ReplyStream, joined
from qwenrt.text.tokenizer.detokenizer import Detokenizer
from qwenrt.text.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class RequestOutput:
    """What one step gave one completion. ``finished``: nothing more comes for the whole request; with ``error``
    it failed."""

    request_id: str
    delta: Delta
    finished: bool = False
    error: QwenrtError | None = None


@dataclass(frozen=True)
class StopRules:
    """When a completion ends by itself: on one of ``ids``, or when its output ends with one of ``sequences``."""

    ids: frozenset[int]
    sequences: tuple[tuple[int, ...], ...] = ()
    context_limit: int = 2**31

    @classmethod
    def build(cls, ids: List[int], sequences: List[List[int]], context_limit: int) -> StopRules:
        """A sequence of one token is a stop id."""
        single = [sequence[0] for sequence in sequences if len(sequence) == 1]
        longer = tuple(dict.fromkeys(tuple(s) for s in sequences if len(s) > 1))
        return cls(frozenset([*ids, *single]), longer, context_limit)


class OutputProcessor:
    """Watches one completion: decides after each token whether it ends, and detokenises what is not a stop.

    Tokens that may yet turn out to begin a stop sequence are held back from the text. Without a tokenizer the
    text stays empty. ``reply``: takes thoughts and calls out of the text, and knows stop strings of its own, which are
    about what is left of it. ``thought``: counts the tokens of its thought.
    """

    def __init__(
        self,
        seq: Sequence,
        rules: StopRules,
        tokenizer: Tokenizer | None,
        skip_special_tokens: bool,
        reply: ReplyStream | None = None,
        thought: Thought | None = None,
    ) -> None:
        self.seq, self._rules, self._reply, self.thought = seq, rules, reply, thought
        params = seq.params
        self._detokenizer = (
            None
            if tokenizer is None
            else Detokenizer(tokenizer, tuple(params.stop), skip_special_tokens, params.min_tokens)
        )
        self._held: list[int] = []

    def push(self, token: int, logprob: TokenLogprob | None) -> Delta:
        """The token was appended to the sequence -> what the caller may see of it, and whether it is the end.

        Raises RequestError or BackendError where a grammar that it is held to cannot be followed any further.
        """
        if self.thought is not None:
            self.thought.push(token)
        constraint = self.seq.constraint
        complete = constraint is not None and constraint.take(token)
        text, reason = self._read(token)
        if reason is None and complete:
            reason = "stop"
        if reason is None:
            reason = self._too_long()
        if reason is not None:
            text += self._finish()
            if self._detokenizer is not None and self._detokenizer.stopped:
                reason = "stop"
        logprobs = [logprob] if logprob is not None else None
        return self._delta(text, [token], reason, logprobs)

    def end(self, reason: FinishReason) -> Delta:
        """The end of a completion that was cancelled, failed, or ran out of time; of these only the last one tells what
        was held back."""
        text = ""
        if reason == "timeout":
            with suppress(QwenrtError):  # a token the tokenizer does not know
                text = self._finish()
        return self._delta(text, [], reason, None)

    def _read(self, token: int) -> tuple[str, FinishReason | None]:
        if token in self._rules.ids:
            return "", "stop"
        if not self._rules.sequences:
            return self._decode([token])
        self._held.append(token)
        length = self._ends_with_stop()
        if length:
            del self._held[-length:]
            return "", "stop"
        keep = self._may_begin_stop()
        certain, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return self._decode(certain)

    def _ends_with_stop(self) -> int:
        """Length of the longest stop sequence the held tokens end with; all of it is still held."""
        if self.seq.num_output < self.seq.params.min_tokens:
            return 0
        held = tuple(self._held)
        return max((len(s) for s in self._rules.sequences if held[-len(s) :] == s), default=0)

    def _may_begin_stop(self) -> int:
        """Length of the longest end of the held tokens that begins a stop sequence."""
        held = tuple(self._held)
        return max(
            (
                n
                for s in self._rules.sequences
                for n in range(1, min(len(s) - 1, len(held)) + 1)
                if held[-n:] == s[:n]
            ),
            default=0,
        )

    def _decode(self, tokens: list[int]) -> tuple[str, FinishReason | None]:
        if self._detokenizer is None:
            return "", None
        text = ""
        for token in tokens:
            text += self._detokenizer.add(token)
            if self._detokenizer.stopped:
                self._held = []
                return text, "stop"
        return text, None

    def _finish(self) -> str:
        text, _ = self._decode(self._held)
        self._held = []
        return text if self._detokenizer is None else text + self._detokenizer.finish()

    def _too_long(self) -> FinishReason | None:
        seq, limit = self.seq, self.seq.params.max_tokens
        if limit is not None and seq.num_output - seq.num_forced >= limit:
            return "length"
        return "length" if len(seq.token_ids) >= self._rules.context_limit else None

    def _delta(
        self, text: str, tokens: list[int], reason: FinishReason | None, logprobs: list[TokenLogprob] | None
    ) -> Delta:
        seq = self.seq
        piece, whole = Piece(text), Reply(text)
        if self._reply is not None:
            piece = self._reply.push(text, searched=seq.num_output > seq.params.min_tokens)
            if self._reply.stopped:
                reason = "stop"
            if reason is not None:
                rest, whole = self._reply.finish(cut_off=reason != "stop")
                piece = joined(piece, rest)
                reason = whole.finish_reason("stop" if self._reply.stopped else reason)
        usage = None
        if reason is not None:
            thought = 0 if self.thought is None else self.thought.num_tokens
            usage = Usage(seq.prompt_len, seq.num_output, seq.num_cached or 0, thought)
        return Delta(
            piece.content,
            tokens,
            reason,
            seq.index,
            logprobs,
            usage,
            whole.tool_calls or None,
            piece.reasoning,
            piece.calls,
            broken_calls=whole.broken_calls,
        )
