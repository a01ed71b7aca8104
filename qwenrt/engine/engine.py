"""The one loop: schedule, compute, sample, stop, detokenise. Requests in, Deltas out; one thread at a time."""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Callable, Iterable
from collections.abc import Sequence as List
from dataclasses import dataclass, field
from typing import Any

import torch

from qwenrt.backends.base import Backend
from qwenrt.engine.block_manager import BlockManager
from qwenrt.engine.kv_cache import KVCache, block_bytes
from qwenrt.engine.model_runner import ModelRunner
from qwenrt.engine.output_processor import OutputProcessor, RequestOutput, StopRules
from qwenrt.engine.sampler import Sampled, Sampler
from qwenrt.engine.scheduler import Scheduler
from qwenrt.engine.sequence import Sequence, Status
from qwenrt.errors import BackendError, CapacityError, ConfigError, QwenrtError, RequestError, shown
from qwenrt.model.qwen import Qwen
from qwenrt.model.rotary import ntk_alpha
from qwenrt.outputs import Delta
from qwenrt.sampling_params import SamplingParams
from qwenrt.text.replies.parser import ReplyStream
from qwenrt.text.tokenizer.tokenizer import Tokenizer

MAX_STOP_SEQUENCES = 256


@dataclass(frozen=True)
class Request:
    """A checked request: what `Engine.check` makes and `Engine.enqueue` takes."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    rules: StopRules
    skip_special_tokens: bool
    replies: tuple[ReplyStream, ...] = ()


@dataclass
class _Running:
    """A request in the engine and those of its n completions that go on."""

    request: Request
    open: dict[int, OutputProcessor] = field(default_factory=dict)  # by index


class Engine:
    """Many requests over one model: continuous batching, chunked prefill, a paged cache with shared prefixes.

    eos_token_ids: end a text unless ignore_eos. vocab_limit: the real size of the vocabulary, ids from there on
    are never drawn (None: no padding), nor are ids that the tokenizer has no token for. max_model_len: prompt
    and answer together, in tokens. max_num_seqs: sequences computed together; max_num_batched_tokens: tokens a
    step. The cache has ``num_blocks`` blocks of ``block_size`` tokens, or as many as ``cache_bytes`` holds;
    without either, max_num_seqs times max_model_len. A context can be no longer than the cache.

    Not safe for threads: AsyncEngine puts a thread around it. `check` may be called from any thread.
    """

    def __init__(
        self,
        model: Qwen,
        backend: Backend,
        tokenizer: Tokenizer | None,
        *,
        eos_token_ids: Iterable[int] = (),
        vocab_limit: int | None = None,
        max_model_len: int,
        max_num_seqs: int = 16,
        max_num_batched_tokens: int = 512,
        block_size: int = 16,
        kv_cache_dtype: str = "auto",
        num_blocks: int | None = None,
        cache_bytes: int | None = None,
        prefix_caching: bool = True,
    ) -> None:
        sizes = {
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": max_num_batched_tokens,
            "block_size": block_size,
        }
        for name, value in sizes.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(name, f"got {value!r}", "It must be an integer >= 1.")
        per_block = block_bytes(model.config, backend, model.dtype, kv_cache_dtype, block_size)
        if num_blocks is None:
            num_blocks = max_num_seqs * -(-max_model_len // block_size)
            num_blocks = num_blocks if cache_bytes is None else min(num_blocks, cache_bytes // per_block)
        if num_blocks < 1:
            raise CapacityError(
                "a KV cache",
                f"{cache_bytes} bytes hold no block of {block_size} tokens ({per_block} bytes)",
                'Give it more memory, or set kv_cache_dtype="int8".',
            )
        self._config, self._tokenizer = model.config, tokenizer
        self._eos = tuple(eos_token_ids)
        self.max_model_len = max_model_len
        self.context_limit = min(max_model_len, num_blocks * block_size)
        cache = KVCache(
            model.config,
            backend,
            model.dtype,
            kv_cache_dtype=kv_cache_dtype,
            block_size=block_size,
            num_blocks=num_blocks,
        )
        if kv_cache_dtype == "int8":
            model.fit_key_codes(cache.layers)
        self.cache_bytes = cache.nbytes
        self.runner = ModelRunner(model, backend, cache)
        self.blocks = BlockManager(num_blocks, block_size, prefix_caching)
        self.scheduler = Scheduler(self.blocks, max_num_seqs, max_num_batched_tokens)
        size = min(vocab_limit or model.config.vocab_size, model.config.vocab_size)
        self.sampler = Sampler(vocab_limit, _absent_ids(tokenizer, size), backend)
        self.num_generated = 0
        self._ids = itertools.count()
        self._seq_ids = itertools.count()
        self._requests: dict[str, _Running] = {}
        self._outbox: list[RequestOutput] = []

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
    ) -> Request:
        """Everything that can be wrong with a request is found here; changes nothing.

        ``stop_sequences``: token sequences that end the output when it ends with one; they are cut from the text.
        ``replies``: what reads each of the n completions, where they are answers with thoughts or calls. Raises
        RequestError, or CapacityError where the cache can never hold it.
        """
        if not isinstance(params, SamplingParams):
            raise RequestError(
                "sampling_params", f"got {type(params).__name__}", "Pass a qwenrt.SamplingParams."
            )
        self.runner.model.needs_head("generating")
        self.runner.model.needs_causal("generating")
        prompt = self._check_prompt(prompt_token_ids)
        if params.stop and self._tokenizer is None:
            raise RequestError(
                f"stop={list(params.stop)!r:.80}",
                "this model has no tokenizer to find text with",
                "Use stop_token_ids.",
            )
        outside = [i for i in params.logit_bias or () if i >= self._config.vocab_size]
        if outside:
            raise RequestError(
                f"logit_bias for token {shown(outside[0])}",
                f"the vocabulary has {self._config.vocab_size} ids",
                f"Ids go from 0 to {self._config.vocab_size - 1}.",
            )
        sequences = [_stop_sequence(s) for s in stop_sequences]
        if len(sequences) > MAX_STOP_SEQUENCES:
            raise RequestError(
                "stop_sequences",
                f"{len(sequences)} of them",
                f"At most {MAX_STOP_SEQUENCES} are searched for.",
            )
        ends = (*params.stop_token_ids, *(() if params.ignore_eos else self._eos))
        rules = StopRules.build(ends, sequences, self.context_limit)
        request_id = f"request-{next(self._ids)}" if request_id is None else request_id
        return Request(request_id, prompt, params, rules, skip_special_tokens, tuple(replies))

    def enqueue(self, request: Request) -> None:
        """Queue a checked request: n sequences, the others waiting to share what the first computes."""
        if request.request_id in self._requests:
            raise RequestError(
                f"request {request.request_id!r:.80}", "this id is in use", "Choose another, or pass none."
            )
        running = self._requests[request.request_id] = _Running(request)
        leader: Sequence | None = None
        for index in range(request.params.n):
            seq = Sequence(
                next(self._seq_ids),
                request.prompt_token_ids,
                request.params,
                alpha=ntk_alpha(len(request.prompt_token_ids), self._config),
                request_id=request.request_id,
                index=index,
                leader=leader if self.blocks.prefix_caching else None,
                banned_until_min=tuple(request.rules.ids) if request.params.min_tokens else (),
            )
            leader = leader or seq
            reply = request.replies[index] if request.replies else None
            running.open[index] = OutputProcessor(
                seq, request.rules, self._tokenizer, request.skip_special_tokens, reply
            )
            self.scheduler.add(seq)

    def abort(self, request_id: str) -> bool:
        """Cancel: its blocks are free at once, the next step reports the end. False where it is not there."""
        if request_id not in self._requests:
            return False
        self._end_request(request_id, None)
        return True

    @property
    def has_work(self) -> bool:
        """Whether `step` would compute or report anything."""
        return bool(self._requests or self._outbox)

    # ---- the loop

    def step(self) -> list[RequestOutput]:
        """Compute one batch -> what each completion in it gained, and the ends of cancelled requests.

        A failure within the computation ends the requests of this batch with a typed error; the others go on.
        """
        batch = self.scheduler.schedule()
        if batch:
            try:
                due, sampled = self._compute(batch)
            except Exception as error:
                self._fail(batch, error)
            else:
                self._postprocess(batch, due, sampled)
        outputs, self._outbox = self._outbox, []
        return outputs

    def logits(self, token_ids: List[int]) -> torch.Tensor:
        """The logits after each token of a text -> float32 [num_tokens, vocab_size] on the CPU; leaves no trace."""
        self.runner.model.needs_head("logits")
        ids = self._check_ids(token_ids)
        if len(ids) > self.max_model_len:
            raise RequestError(
                f"logits of {len(ids)} tokens",
                f"the context is {self.max_model_len} tokens",
                "Shorten the text, or load with a larger max_model_len.",
            )
        try:
            return self.runner.logits(ids)
        except Exception as error:
            raise _typed(error, f"computing the logits of {len(ids)} tokens") from error

    def pooled(self, prompts: List[List[int]], pool: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """``pool`` of each prompt's final states [n, D] -> float32 [len(prompts), ...] on the CPU; leaves no trace."""
        return self._prefilled(prompts, lambda states: torch.stack(list(map(pool, states))).float().cpu())

    def last_logits(self, prompts: List[List[int]], token_ids: List[int]) -> torch.Tensor:
        """The logits of ``token_ids`` after each prompt -> float32 [len(prompts), len(token_ids)] on the CPU."""
        self.runner.model.needs_head("logits")
        ids = self._check_ids(token_ids)
        self.runner.model.needs_causal("scoring what comes next")

        def read(states: list[torch.Tensor]) -> torch.Tensor:
            return self.runner.model.logits(torch.stack([s[-1] for s in states]))[:, ids].cpu()

        return self._prefilled(prompts, read)

    def _prefilled(
        self, prompts: List[List[int]], read: Callable[[list[torch.Tensor]], torch.Tensor]
    ) -> torch.Tensor:
        if not prompts:
            raise RequestError("reading texts", "an empty list", "Pass at least one text.")
        checked = [self._check_ids(prompt) for prompt in prompts]
        longest = max(map(len, checked))
        if longest > self.max_model_len:
            raise RequestError(
                f"reading a text of {longest} tokens",
                f"the context is {self.max_model_len} tokens",
                "Shorten the text, or load with a larger max_model_len.",
            )
        try:
            return read(self.runner.hidden(checked))
        except Exception as error:
            raise _typed(error, f"reading {len(checked)} texts of up to {longest} tokens") from error

    def stats(self) -> dict[str, int]:
        """Counters for people and monitors; reading them from another thread is harmless."""
        return {
            "running": len(self.scheduler.running),
            "waiting": len(self.scheduler.waiting),
            "free_blocks": self.blocks.num_free,
            "total_blocks": self.blocks.num_blocks,
            "cached_blocks": self.blocks.num_findable,
            "block_size": self.blocks.block_size,
            "cache_bytes": self.cache_bytes,
            "preemptions": self.scheduler.num_preemptions,
            "generated_tokens": self.num_generated,
        }

    # ---- inside

    def _compute(self, batch: list[tuple[Sequence, int]]) -> tuple[list[Sequence], Sampled]:
        logits = self.runner.step(batch)
        due = [seq for seq, count in batch if count == seq.num_remaining]
        if logits is None:
            return due, Sampled([], [])
        return due, self.sampler.sample(logits, due)

    def _postprocess(self, batch: list[tuple[Sequence, int]], due: list[Sequence], sampled: Sampled) -> None:
        failed = {
            seq.request_id: seq for seq, token in zip(due, sampled.token_ids, strict=True) if token is None
        }
        for seq in failed.values():
            self._end_request(seq.request_id, self._non_finite(seq), distrust=True)
        for seq, count in batch:
            if seq.status is Status.RUNNING:
                self.scheduler.advance(seq, count)
        for seq, token, logprob in zip(due, sampled.token_ids, sampled.logprobs, strict=True):
            if token is None or seq.status is not Status.RUNNING:
                continue
            seq.token_ids.append(token)
            self.num_generated += 1
            try:
                delta = self._requests[seq.request_id].open[seq.index].push(token, logprob)
            except QwenrtError as error:  # a token the tokenizer does not know
                self._end_request(seq.request_id, error)
            else:
                self._report(seq, delta)

    def _report(self, seq: Sequence, delta: Delta) -> None:
        if delta.finish_reason is None:
            self._outbox.append(RequestOutput(seq.request_id, delta))
            return
        self._release(seq)
        running = self._requests[seq.request_id]
        del running.open[seq.index]
        if not running.open:
            del self._requests[seq.request_id]
        self._outbox.append(RequestOutput(seq.request_id, delta, not running.open))

    def _fail(self, batch: list[tuple[Sequence, int]], error: Exception) -> None:
        count = sum(n for _, n in batch)
        typed = _typed(error, f"computing {count} tokens of {len(batch)} sequences")
        typed.__cause__ = error
        traceback.clear_frames(error.__traceback__)  # whoever keeps the error does not keep its tensors
        for request_id in dict.fromkeys(seq.request_id for seq, _ in batch):
            self._end_request(request_id, typed, distrust=True)

    def _end_request(self, request_id: str, error: QwenrtError | None, distrust: bool = False) -> None:
        """Free what a request holds and report its end; ``distrust``: its cache blocks may hold anything."""
        running = self._requests.pop(request_id)
        ends = list(running.open.values())
        for i, end in enumerate(ends):
            seq = end.seq
            delta = end.abort()
            if distrust:
                self.blocks.forget(seq)
            self._release(seq)
            self._outbox.append(RequestOutput(request_id, delta, i == len(ends) - 1, error))

    def _release(self, seq: Sequence) -> None:
        self.scheduler.finish(seq)
        self.sampler.forget(seq)

    def _non_finite(self, seq: Sequence) -> BackendError:
        """The error that names the layer where the numbers of a sequence overflowed."""
        try:
            where = self.runner.first_overflow(seq.token_ids, seq.alpha)
        except Exception as error:  # the computation itself is in doubt here: say what is known
            where = f"a part that could not be found ({type(error).__name__})"
        return BackendError(
            f"the token after {len(seq.token_ids)} tokens of request {seq.request_id}",
            f"non-finite logits; the first such numbers come out of {where}",
            'The numbers overflowed: load with dtype="float32" or "bfloat16", or check the weights.',
        )

    def _check_prompt(self, prompt_token_ids: List[int]) -> list[int]:
        prompt = self._check_ids(prompt_token_ids)
        if len(prompt) > self.max_model_len - 1:
            raise RequestError(
                f"a prompt of {len(prompt)} tokens",
                f"the context is {self.max_model_len} tokens, one of them for the answer",
                "Shorten the prompt, or load with a larger max_model_len.",
            )
        if len(prompt) > self.context_limit - 1:
            raise CapacityError(
                f"a prompt of {len(prompt)} tokens",
                f"the KV cache holds {self.context_limit} tokens in {self.blocks.num_blocks} blocks",
                'Shorten the prompt, free memory before loading, or set kv_cache_dtype="int8".',
            )
        return prompt

    def _check_ids(self, token_ids: List[int]) -> list[int]:
        if isinstance(token_ids, (str, bytes)) or not isinstance(token_ids, List):
            raise RequestError(
                "prompt token ids", f"got {type(token_ids).__name__}", "Pass a list of integers."
            )
        ids = list(token_ids)
        if not ids:
            raise RequestError("prompt token ids", "an empty list", "Pass at least one token.")
        size = self._config.vocab_size
        for i in ids:
            if type(i) is not int or not 0 <= i < size:
                raise RequestError(
                    f"prompt token id {shown(i)}",
                    f"the vocabulary has {size} ids",
                    f"Ids are integers from 0 to {size - 1}.",
                )
        return ids


def _absent_ids(tokenizer: Tokenizer | None, size: int) -> list[int]:
    """The ids below ``size`` that lie in gaps of an extended vocabulary: they have no token."""
    if tokenizer is None:
        return []
    return [i for i in tokenizer.unused_ids() if i < size]


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


def _typed(error: Exception, asked: str) -> QwenrtError:
    """What went wrong in a computation, as an error that says what to do."""
    if isinstance(error, QwenrtError):
        return error
    found = f"{type(error).__name__}: {str(error)[:300]}"
    out_of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    if out_of_memory or "out of memory" in found.lower() or "can't allocate memory" in found.lower():
        remedy = 'Lower max_num_batched_tokens or max_num_seqs, or set kv_cache_dtype="int8".'
        return CapacityError(asked, found, remedy)
    return BackendError(asked, found, 'If it happens again, load with device="cpu" to compare.')
