"""The one loop: schedule, compute, sample, stop, detokenise. Requests in, Deltas out; one thread at a time."""

from __future__ import annotations

import itertools
import time
import traceback
from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as List
from functools import partial
from typing import Any

from qwenrt.config.layers import num_trail_states
from qwenrt.engine.accounts import Accounts, Clock
from qwenrt.engine.adapters import Adapters
from qwenrt.engine.block_manager import BlockManager
from qwenrt.engine.completions import Completions
from qwenrt.engine.drafts import Drafts
from qwenrt.engine.failures import typed
from qwenrt.engine.grammar import Grammars
from qwenrt.engine.kv_cache import KVCache
from qwenrt.engine.launched import Launched, Row, Span
from qwenrt.engine.model_runner import ModelRunner
from qwenrt.engine.mtp import MtpDrafts
from qwenrt.engine.options import EngineOptions
from qwenrt.engine.output_processor import RequestOutput, StopRules
from qwenrt.engine.prefills import Prefills
from qwenrt.engine.prefix_store import PrefixStore, open_store
from qwenrt.engine.requests import Bounds, Request
from qwenrt.engine.sampler import Sampled, Sampler
from qwenrt.engine.scheduler import Scheduler
from qwenrt.engine.sequence import Sequence, Status
from qwenrt.engine.states import States
from qwenrt.engine.step_target import StepTarget
from qwenrt.engine.thoughts import ThoughtRules
from qwenrt.errors import BackendError, ConfigError
from qwenrt.model.qwen import Qwen
from qwenrt.ops.steps import Vocabulary
from qwenrt.outputs import TokenLogprob
from qwenrt.sampling_params import SamplingParams
from qwenrt.text.replies.parser import ReplyStream
from qwenrt.text.tokenizer.tokenizer import Tokenizer


class Engine:
    """Many requests over one model: continuous batching, chunked prefill, a paged cache with shared prefixes.

    eos_token_ids: end a text unless ignore_eos. vocab_limit: the real size of the vocabulary, ids from there on
    are never drawn (None: no padding), nor are ids that the tokenizer has no token for. clock: seconds, for deadlines
    and timings.

    Not safe for threads: AsyncEngine puts a thread around it. `check` may be called from any thread.
    """

    def __init__(
        self,
        model: Qwen,
        tokenizer: Tokenizer | None,
        options: EngineOptions,
        *,
        eos_token_ids: Iterable[int] = (),
        vocab_limit: int | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        backend = model.backend
        self._eos = tuple(eos_token_ids)
        self.grammars = Grammars(tokenizer)
        rows = min(options.max_num_seqs, options.max_num_batched_tokens)
        states = _states_of(model, options)
        cache = _cache_of(model, options, states, rows)
        size = min(vocab_limit or model.config.vocab_size, model.config.vocab_size)
        vocabulary = Vocabulary(size, frozenset(_unused_ids(tokenizer, size)))
        self._bounds = Bounds(
            model.config.vocab_size,
            options.max_model_len,
            options.blocks,
            options.block_size,
            tokenizer is not None,
        )
        self.cache_bytes = cache.nbytes
        self.adapters = Adapters(model, options.max_adapters)
        self.runner = ModelRunner(
            model,
            backend,
            cache,
            vocabulary,
            max_num_seqs=rows,
            max_model_len=self._bounds.context_limit,
            depth=options.depth,
            states=states,
            adapters=self.adapters.serving,
        )
        self.blocks = BlockManager(options.blocks, options.block_size, options.prefix_caching, states)
        self.target = StepTarget(options.step_target_s(backend.device.type))
        self.scheduler = Scheduler(
            self.blocks, options.max_num_seqs, options.max_num_batched_tokens, self.target
        )
        self.sampler = Sampler(vocabulary, backend)
        self.drafts = self._drafts(model, cache, options)
        # Without a trail of states (`States`) a wrong guess could not be taken back out of one.
        if self.runner.depth == 0 and (states is None or options.draft_tokens):
            self.scheduler.drafts = self.drafts
        self.accounts = Accounts(clock)
        self._clock = clock
        self.completions = Completions(
            model.config, tokenizer, self.scheduler, self.sampler, self.drafts, self.accounts, self.adapters
        )
        self.prefills = Prefills(self.runner, self._bounds)
        self.store = self._store(model, cache, options)
        self._ids = itertools.count()
        self._launched: deque[Launched] = deque()

    def _drafts(self, model: Qwen, cache: KVCache, options: EngineOptions) -> Drafts:
        drafts = Drafts()
        if options.draft_tokens:
            drafts.head = MtpDrafts(
                model,
                cache.of_mtp,
                options.draft_tokens,
                choose=self.sampler.guess,
                reach=self.scheduler.reach,
            )
        return drafts

    def _store(self, model: Qwen, cache: KVCache, options: EngineOptions) -> PrefixStore | None:
        if options.prefix_store is None or not options.prefix_caching:
            return None
        how = getattr(model.backend, "activations", "")
        store = open_store(options.prefix_store, options.prefix_store_bytes, model, cache, activations=how)
        self.scheduler.on_admit = partial(store.admitted, blocks=self.blocks)
        return store

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and answer together."""
        return self._bounds.max_model_len

    @property
    def context_limit(self) -> int:
        """The same, as far as the cache reaches."""
        return self._bounds.context_limit

    # ---- requests

    def add(self, prompt_token_ids: List[int], params: SamplingParams, **options: Any) -> str:
        """Queue a request, checked as `check` does -> its id."""
        request = self.check(prompt_token_ids, params, **options)
        self.enqueue(request)
        return request.request_id

    def check(
        self,
        prompt_token_ids: List[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        stop_sequences: List[List[int]] = (),
        skip_special_tokens: bool = True,
        replies: List[ReplyStream] = (),
        thought: ThoughtRules | None = None,
        adapter: str | None = None,
    ) -> Request:
        """Everything that can be wrong with a request is found here; changes nothing.

        ``stop_sequences``: token sequences that end the output when it ends with one; they are cut from the text.
        ``replies``: what reads each of the n completions, where they are answers with thoughts or calls; ``thought``:
        how their thoughts look and how long they may be. ``adapter``: the name of a loaded one. Raises RequestError, or
        CapacityError where the cache can never hold it.
        """
        self._bounds.check_params(params)
        self.runner.model.needs_head("generating")
        self.runner.model.needs_causal("generating")
        prompt = self._bounds.check_prompt(prompt_token_ids)
        sequences = self._bounds.check_stops(stop_sequences)
        ends = (*params.stop_token_ids, *(() if params.ignore_eos else self._eos))
        rules = StopRules.build(ends, sequences, self.context_limit)
        request_id = f"request-{next(self._ids)}" if request_id is None else request_id
        grammar = None if params.grammar is None else self.grammars.compile(params.grammar)
        if thought is not None:
            room = self.context_limit - len(prompt) - len(thought.words)
            thought = thought.within(room if params.max_tokens is None else min(room, params.max_tokens))
        return Request(
            request_id,
            prompt,
            params,
            rules,
            skip_special_tokens,
            tuple(replies),
            thought,
            grammar,
            self._clock(),
            None if adapter is None else self.adapters.find(adapter),
        )

    def enqueue(self, request: Request) -> None:
        """Queue a checked request."""
        self.completions.queue(request)

    def abort(self, request_id: str) -> bool:
        """Cancel: its blocks are free at once, the next step reports the end. False where it is not there."""
        return self.completions.abort(request_id)

    def end_thought(self, request_id: str) -> None:
        """The thoughts of a request end now, or as soon as they have begun."""
        self.completions.end_thought(request_id)

    @property
    def has_work(self) -> bool:
        """Whether `step` would compute or report anything."""
        return bool(self.completions or self._launched)

    # ---- the loop

    def step(self) -> list[RequestOutput]:
        """Begin to compute one batch, and finish those begun before -> what each completion gained, and the ends of
        requests that were cancelled or whose time is up.

        A failure within the computation ends the requests of its batch with a typed error; the others go on.
        """
        self.completions.expire()
        self._forget_adapters()
        if self.store is not None:
            self.store.read(self.scheduler, any(not seq.is_read for seq in self.scheduler.running))
        begun = self._launch()
        # The host chooses some of its tokens: the next step cannot begin before.
        waits = begun is None or None in begun.draws
        for _ in range(len(self._launched) - (0 if waits else self.runner.depth)):
            self._collect(self._launched.popleft())
        self.accounts.move()
        if self.store is not None:
            self.store.tend(self.blocks, idle=False)
        return self.completions.take()

    def tend(self) -> bool:
        """Do some of what waits for an idle moment -> whether there is more."""
        self._forget_adapters()
        return self.store is not None and self.store.tend(self.blocks, idle=True)

    def close(self) -> None:
        """Let go of what is outside of this process."""
        if self.store is not None:
            self.store.close(self.blocks)
            self.store = None

    def stats(self) -> dict[str, Any]:
        """Figures for people and monitors, those of `Accounts` among them; any thread may read them.
        ``pending``: whether there is work, so that ``last_step_age_s`` should stay small."""
        return {
            "running": len(self.scheduler.running),
            "waiting": len(self.scheduler.waiting),
            "free_blocks": self.blocks.num_free,
            "total_blocks": self.blocks.num_blocks,
            "cached_blocks": self.blocks.num_findable,
            "block_size": self.blocks.block_size,
            "cache_bytes": self.cache_bytes,
            "preemptions": self.scheduler.num_preemptions,
            "stored_blocks_read": 0 if self.store is None else self.store.num_read,
            "stored_blocks_written": 0 if self.store is None else self.store.num_written,
            "grammar_compiles": self.grammars.num_compiled,
            "guessed_tokens": self.drafts.num_guessed,
            "right_guesses": self.drafts.num_right,
            "pending": self.has_work,
            **self.accounts.read(),
        }

    # ---- inside

    def _forget_adapters(self) -> None:
        for number in self.adapters.take_gone():
            self.blocks.forget_adapter(number)

    def _launch(self) -> Launched | None:
        """Begin to compute what is scheduled now; None where nothing is, or where it failed."""
        began = self.target.clock()
        batch = self.scheduler.schedule()
        if not batch:
            return None
        self._note_launch(batch)
        try:
            outcome, draws = self.runner.launch(batch, self.sampler.draw_of)
        except Exception as error:
            self._fail(batch, error)
            return None
        rows: list[Row] = []
        spans: list[Span] = []
        for seq, count in batch:
            spans.append(Span(seq, seq.epoch, seq.num_computed, count + len(seq.guess)))
            guesses, seq.guess = seq.guess, []
            seq.marks.guessed += len(guesses)
            if self.scheduler.launch(seq, count):
                rows += [Row(seq, seq.course, guess) for guess in (None, *guesses)]
        stored = [(seq, seq.num_computed, seq.epoch) for seq, _ in batch]
        self._launched.append(Launched(batch, stored, rows, draws, outcome, began, spans))
        return self._launched[-1]

    def _note_launch(self, batch: list[tuple[Sequence, int]]) -> None:
        accounts, now = self.accounts, self._clock()
        accounts.steps += 1
        for seq, count in batch:
            accounts.prompt_tokens_computed += max(0, min(count, seq.prompt_len - seq.num_computed))
            if seq.marks.began is None:
                seq.marks.began = now
                accounts.prompt_tokens_looked_up += seq.prompt_len
                accounts.prompt_tokens_found += seq.num_cached or 0

    def _collect(self, done: Launched) -> None:
        """Wait for a step, and give its tokens to those sequences that still go on."""
        for row in done.rows:
            row.seq.in_flight -= row.guess is None and row.seq.course == row.course
        try:
            sampled = self._sampled(done)
        except Exception as error:
            self._fail(done.batch, error)
            return
        self.target.done(done.began, done.num_decoding, done.num_prompt_tokens)
        for row, token in zip(done.rows, sampled.token_ids, strict=True):
            if token is None and row.guess is None and row.is_wanted:
                self._give_up(row.seq)
        for seq, num_stored, epoch in done.stored:
            self.scheduler.collect(seq, num_stored, epoch)
        self._give_out(done, sampled)

    def _give_out(self, done: Launched, sampled: Sampled) -> None:
        """Each sequence its next token, and those after its guesses as long as these were right. Where the host
        chooses, what follows a guess is chosen now, since it may depend on the tokens before it."""
        checked: dict[Sequence, list[bool]] = {}  # of each guess of a sequence, whether it was right
        holds = True
        for at, (row, token, logprob) in enumerate(
            zip(done.rows, sampled.token_ids, sampled.logprobs, strict=True)
        ):
            seq = row.seq
            if row.guess is None:
                holds = row.is_wanted
            else:
                holds = holds and row.is_right
                checked.setdefault(seq, []).append(holds)
            if not holds:
                continue
            if row.guess is not None:  # its key and value are in the cache
                seq.marks.right += 1
                self.scheduler.collect_guess(seq, len(checked[seq]) - 1)
                if done.draws[at] is None:
                    token, logprob = self._chosen(done, at)
            if token is None:
                self._give_up(seq)
                continue
            self.completions.write(seq, token, logprob)
        for seq, right in checked.items():
            self.drafts.checked(seq, len(right), sum(right))
            self.scheduler.settle(seq, sum(right))
        self.drafts.computed(done)

    def _give_up(self, seq: Sequence) -> None:
        """End the request of a sequence whose numbers overflowed."""
        if not seq.is_finished:
            self.completions.end(seq.request_id, "error", self._non_finite(seq), discard_cache=True)

    def _chosen(self, done: Launched, row: int) -> tuple[int | None, TokenLogprob | None]:
        """The token of one row that the host chooses, and what is said of it. None where it failed: its sequence ends
        as where its logits are not finite."""
        try:
            found = self.sampler.sample(done.outcome.logits[[row]], [done.rows[row].seq])
        except Exception as error:
            self._fail([(done.rows[row].seq, 1)], error)
            return None, None
        return found.token_ids[0], found.logprobs[0]

    def _sampled(self, done: Launched) -> Sampled:
        """What a step chose, and what the host chooses from its logits: not of rows behind a guess."""
        ours = [row for row, draw in enumerate(done.draws) if draw is None]
        ours = [row for row in ours if done.rows[row].guess is None and done.rows[row].is_wanted]
        for row in ours:  # while a device computes
            if (constraint := done.rows[row].seq.constraint) is not None:
                constraint.allowed()
        sampled = Sampled(done.outcome.tokens(), [None] * len(done.rows))
        if ours:
            found = self.sampler.sample(done.outcome.logits[ours], [done.rows[row].seq for row in ours])
            for row, token, logprob in zip(ours, found.token_ids, found.logprobs, strict=True):
                sampled.token_ids[row], sampled.logprobs[row] = token, logprob
        return sampled

    def _fail(self, batch: list[tuple[Sequence, int]], error: Exception) -> None:
        count = sum(n for _, n in batch)
        failure = typed(
            error, f"computing {count} tokens of {len(batch)} sequences", self.runner.model.backend
        )
        failure.__cause__ = error
        traceback.clear_frames(error.__traceback__)  # whoever keeps the error does not keep its tensors
        for request_id in dict.fromkeys(
            seq.request_id for seq, _ in batch if seq.status is not Status.FINISHED
        ):
            self.completions.end(request_id, "error", failure, discard_cache=True)

    def _non_finite(self, seq: Sequence) -> BackendError:
        """The error that names the layer where the numbers of a sequence overflowed."""
        try:
            where = self.runner.first_overflow(seq.token_ids, seq.ntk_alpha, seq.adapter)
        except Exception as error:  # the computation itself is in doubt here: say what is known
            where = f"a part that could not be found ({type(error).__name__})"
        return BackendError(
            f"the token after {len(seq.token_ids)} tokens of request {seq.request_id}",
            f"non-finite logits; the first such numbers come out of {where}",
            'The numbers overflowed: load with dtype="float32" or "bfloat16", or check the weights.',
        )


def _cache_of(model: Qwen, options: EngineOptions, states: States | None, rows: int) -> KVCache:
    """``rows``: sequences of a step, of which a captured one stores even those that are not there."""
    cache = KVCache(
        model.config,
        model.backend,
        model.dtype,
        kv_cache_dtype=options.kv_cache_dtype,
        block_size=options.block_size,
        num_blocks=options.blocks,
        num_spare=0 if model.backend.graphs() is None else rows,
        num_states=0 if states is None else states.num_slots,
    )
    if options.kv_cache_dtype == "int8":
        model.fit_key_codes(cache.layers, cache.of_mtp)
    return cache


def _states_of(model: Qwen, options: EngineOptions) -> States | None:
    """Where sequences keep their states, of a model that has any."""
    if model.config.linear_attention is None:
        return None
    _check_stateful(options)
    kept = options.snapshots if options.prefix_caching else 0
    trail = num_trail_states(options.max_num_seqs, options.draft_tokens)
    return States(options.max_num_seqs, kept, options.block_size, trail)


def _check_stateful(options: EngineOptions) -> None:
    """Raise ConfigError for what a model with layers of linear attention does not have."""
    if options.prefix_store is not None:
        raise ConfigError(
            f"prefix_store={str(options.prefix_store)!r:.120}",
            "this model has layers of linear attention, whose states are not kept on disk",
            "Load it without prefix_store: prefixes are shared in memory all the same.",
        )


def _unused_ids(tokenizer: Tokenizer | None, size: int) -> list[int]:
    """The ids below ``size`` that lie in gaps of an extended vocabulary: they have no token."""
    if tokenizer is None:
        return []
    return [i for i in tokenizer.unused_ids() if i < size]
