"""The completions of the requests in an engine: queued as sequences, given tokens one by one, and ended."""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass, field, replace

from qwenrt.config import ModelConfig
from qwenrt.engine.accounts import Accounts
from qwenrt.engine.adapters import Adapters
from qwenrt.engine.constraint import Constraint
from qwenrt.engine.drafts import Drafts
from qwenrt.engine.output_processor import OutputProcessor, RequestOutput
from qwenrt.engine.requests import Request
from qwenrt.engine.sampler import Sampler
from qwenrt.engine.scheduler import Scheduler
from qwenrt.engine.sequence import Sequence
from qwenrt.engine.thoughts import Thought
from qwenrt.errors import QwenrtError, RequestError
from qwenrt.model.rotary import ntk_alpha
from qwenrt.outputs import Delta, FinishReason, TokenLogprob
from qwenrt.text.tokenizer.tokenizer import Tokenizer


@dataclass
class Running:
    """A request in the engine and those of its n completions that go on."""

    request: Request
    open: dict[int, OutputProcessor] = field(default_factory=dict)  # by index


class Completions:
    """Who waits for tokens, and what each is told of them.

    What is told gathers until it is taken. Whoever ends gives back what it holds of the scheduler, the sampler and the
    drafts.
    """

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: Tokenizer | None,
        scheduler: Scheduler,
        sampler: Sampler,
        drafts: Drafts,
        accounts: Accounts,
        adapters: Adapters,
    ) -> None:
        self._config, self._tokenizer = config, tokenizer
        self._scheduler, self._sampler, self._drafts = scheduler, sampler, drafts
        self._accounts, self._adapters = accounts, adapters
        self.running: dict[str, Running] = {}  # by id
        self._next_deadline = math.inf  # no request's is earlier
        self._num_sequences = 0
        self._told: list[RequestOutput] = []

    def __bool__(self) -> bool:
        """Whether anyone waits, or anything was told that was not taken."""
        return bool(self.running or self._told)

    def take(self) -> list[RequestOutput]:
        """What was told since the last time."""
        told, self._told = self._told, []
        return told

    def queue(self, request: Request) -> None:
        """Queue n sequences for a checked request, the others waiting to share what the first computes."""
        if request.request_id in self.running:
            raise RequestError(
                f"request {request.request_id!r:.80}", "this id is in use", "Choose another, or pass none."
            )
        running = self.running[request.request_id] = Running(request)
        if request.adapter is not None:
            self._adapters.begin(request.adapter)
        self._next_deadline = min(self._next_deadline, request.deadline)
        seed = secrets.randbits(64) if request.params.seed is None else request.params.seed
        leader: Sequence | None = None
        for index in range(request.params.n):
            seq = self._sequence(request, index, seed, leader)
            if leader is None:
                leader = seq
                request.begun.append(seq)
            reply = request.replies[index] if request.replies else None
            thought = None if request.thought is None else Thought(request.thought)
            running.open[index] = OutputProcessor(
                seq, request.rules, self._tokenizer, request.skip_special_tokens, reply, thought
            )
            self._scheduler.add(seq)

    def _sequence(self, request: Request, index: int, seed: int, leader: Sequence | None) -> Sequence:
        params, prompt, rules = request.params, request.prompt_token_ids, request.rules
        most = rules.context_limit
        if params.max_tokens is not None:
            most = min(most, len(prompt) + params.max_tokens)
        constraint = None
        if params.grammar is not None and request.grammar is not None:
            constraint = Constraint(request.grammar, params.grammar, rules.ids)
        self._num_sequences += 1
        return Sequence(
            self._num_sequences - 1,
            prompt,
            params,
            ntk_alpha=ntk_alpha(len(prompt), self._config),
            adapter=0 if request.adapter is None else request.adapter.number,
            request_id=request.request_id,
            index=index,
            leader=leader if self._scheduler.blocks.prefix_caching else None,
            banned_until_min=tuple(rules.ids) if params.min_tokens else (),
            max_len=most,
            seed=seed,
            arrived=request.arrived,
            constraint=constraint,
        )

    def write(self, seq: Sequence, token: int, logprob: TokenLogprob | None) -> None:
        """The next token of a completion, and what closes its thought where that has to end with it."""
        processor = self.running[seq.request_id].open[seq.index]
        self._write(processor, token, logprob)
        self._keep_short(processor)

    def abort(self, request_id: str) -> bool:
        """Cancel a request: what it holds is free at once. False where it is not there."""
        if request_id not in self.running:
            return False
        self._accounts.cancelled += 1
        self.end(request_id, "abort")
        return True

    def end_thought(self, request_id: str) -> None:
        """The thoughts of a request end now, or as soon as they have begun: the closing words are written for them, and
        the answers follow. Changes nothing where none is open, or the request is not there."""
        running = self.running.get(request_id)
        for processor in [] if running is None else list(running.open.values()):
            if processor.thought is not None:
                processor.thought.end()
                self._keep_short(processor)

    def expire(self) -> None:
        """End the requests whose time is up."""
        now = self._accounts.clock()
        if now < self._next_deadline:
            return
        for request_id in [r for r, running in self.running.items() if running.request.deadline <= now]:
            self.end(request_id, "timeout")
        left = (running.request.deadline for running in self.running.values())
        self._next_deadline = min(left, default=math.inf)

    def end(
        self,
        request_id: str,
        reason: FinishReason,
        error: QwenrtError | None = None,
        discard_cache: bool = False,
    ) -> None:
        """Free what a request holds and tell its end; ``discard_cache``: its cache blocks may hold anything."""
        running = self._left(request_id)
        ends = list(running.open.values())
        for i, end in enumerate(ends):
            delta = end.end(reason)
            if discard_cache:
                self._scheduler.blocks.forget(end.seq)
            delta = self._ended(end.seq, delta)
            self._told.append(RequestOutput(request_id, delta, i == len(ends) - 1, error))

    # ---- inside

    def _left(self, request_id: str) -> Running:
        """A request is no longer here."""
        running = self.running.pop(request_id)
        if running.request.adapter is not None:
            self._adapters.end(running.request.adapter)
        return running

    def _write(self, processor: OutputProcessor, token: int, logprob: TokenLogprob | None = None) -> None:
        seq = processor.seq
        seq.token_ids.append(token)
        self._accounts.generated += 1
        if seq.marks.first_token is None:
            seq.marks.first_token = self._accounts.clock()
        try:
            delta = processor.push(token, logprob)
        except QwenrtError as error:  # a token the tokenizer does not know
            self.end(seq.request_id, "error", error)
        else:
            self._tell(seq, delta)

    def _keep_short(self, processor: OutputProcessor) -> None:
        """End a thought that has to end here: what closes it is written as if the model had drawn it."""
        seq, thought = processor.seq, processor.thought
        if thought is None or not thought.is_due or seq.is_finished:
            return
        most = self.running[seq.request_id].request.rules.context_limit
        if len(seq.token_ids) + len(thought.words) >= most:  # no answer could follow
            return
        seq.drop_in_flight()
        seq.num_forced += len(thought.words)
        seq.max_len = min(most, seq.max_len + len(thought.words))
        for token in thought.words:
            self._write(processor, token)
            if seq.is_finished:
                break

    def _tell(self, seq: Sequence, delta: Delta) -> None:
        if delta.finish_reason is None:
            self._told.append(RequestOutput(seq.request_id, delta))
            return
        delta = self._ended(seq, delta)
        running = self.running[seq.request_id]
        del running.open[seq.index]
        if not running.open:
            self._left(seq.request_id)
        self._told.append(RequestOutput(seq.request_id, delta, not running.open))

    def _ended(self, seq: Sequence, delta: Delta) -> Delta:
        """Free what a completion holds -> its last Delta, with its timing."""
        self._scheduler.finish(seq)
        self._sampler.forget(seq)
        self._drafts.forget(seq)
        assert delta.finish_reason is not None
        self._accounts.finished[delta.finish_reason] += 1
        return replace(delta, timing=seq.marks.timing(self._accounts.clock(), seq.num_output))
