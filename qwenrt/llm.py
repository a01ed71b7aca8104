"""A loaded model: chat, stream, generate, logits. Read this first.

``load`` turns a name into an LLM; an LLM turns what it is asked into requests for its engine. One engine thread
serves all callers, so any thread may use one LLM.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, overload

from qwenrt.adapting import Adaptable
from qwenrt.answering import (
    COMPLETION,
    Messages,
    Pairs,
    Past,
    Prepared,
    TurnOptions,
    checked_budget,
    deltas_of,
    generation_of,
)
from qwenrt.arguments import as_token_ids
from qwenrt.asynchronous import Asynchronous
from qwenrt.config import GenerationConfig, ModelConfig
from qwenrt.errors import QwenrtError, RequestError
from qwenrt.load_options import LoadOptions
from qwenrt.other_names import takes_no_tokenizer, unknown_attribute
from qwenrt.outputs import Delta, Generation
from qwenrt.retrieval import Retrieval
from qwenrt.sampling_params import SamplingChanges, SamplingParams
from qwenrt.text.chat.conversations import as_history
from qwenrt.text.chat.efforts import Thinking, ThoughtWish
from qwenrt.text.chat.messages import given_tools

if TYPE_CHECKING:
    import torch
    from typing_extensions import Unpack

    from qwenrt.assembly import Assembled
    from qwenrt.engine.answers import AsyncAnswer, Handle
    from qwenrt.text.chat.chat_tokenizer import ChatTokenizer

logger = logging.getLogger("qwenrt")


class LLM(Asynchronous, Retrieval, Adaptable):
    """One model in memory. Made by `load`; usable from any thread; a context manager that frees it at the end."""

    def __init__(self, assembled: Assembled) -> None:
        self._assembled: Assembled | None = assembled
        self.name: str = assembled.name
        self.config: ModelConfig = assembled.config
        self.generation_config: GenerationConfig = assembled.prompter.generation
        self._prompter = assembled.prompter
        self.summary: str = assembled.summary
        self.backend = assembled.backend
        self.device = assembled.backend.device
        self.options: LoadOptions = assembled.options  # how it was loaded
        self.max_model_len: int = assembled.max_model_len  # tokens of prompt and answer together

    # ---- chat

    @overload
    def chat(
        self, query: str, history: Past = None, system: str | None = None, **options: Unpack[TurnOptions]
    ) -> tuple[str, Pairs]: ...

    @overload
    def chat(
        self,
        query: str,
        history: Past = None,
        system: str | None = None,
        *,
        tools: Messages,
        **options: Unpack[TurnOptions],
    ) -> Generation: ...

    @overload
    def chat(
        self, *, messages: Messages, tools: Messages | None = None, **options: Unpack[TurnOptions]
    ) -> Generation: ...

    @takes_no_tokenizer
    def chat(
        self,
        query: str | None = None,
        history: Any = None,
        system: str | None = None,
        *,
        messages: Messages | None = None,
        tools: Messages | None = None,
        enable_thinking: bool | None = None,
        thinking_budget: int | None = None,
        reasoning_effort: str | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        parallel_tool_calls: bool = True,
        adapter: str | None = None,
        sampling_params: SamplingParams | None = None,
        **sampling: Any,
    ) -> Any:
        """One turn of a conversation.

        With ``query``: -> (response, history), the new pair appended to a copy of ``history``; ``system`` is not part
        of it (None: the model's own default). With ``messages`` (OpenAI's shape) or ``tools``: -> Generation, whose
        ``message`` is ready to append. ``enable_thinking``: for models that can answer with and without a thought, None
        takes their default. ``thinking_budget``: the longest thought, in tokens; then the answer begins; refused for
        models that do not think. ``reasoning_effort``: from "none" to "max", what the model is told where it was taught
        to listen (Qwen3.8), else a budget. ``tool_choice``: "auto" (None), "none", or a call that is required, of any
        tool ("required") or of one ({"type": "function", "function": {"name": ...}}). ``parallel_tool_calls``: if off,
        an answer ends with its first call. ``adapter``: the name of one that is loaded. ``sampling`` changes single
        fields of ``sampling_params`` or of the checkpoint's own defaults.
        """
        prepared, result = self._turn(
            query,
            history,
            system,
            messages,
            tools,
            enable_thinking=enable_thinking,
            thinking_budget=thinking_budget,
            reasoning_effort=reasoning_effort,
            tool_choice=tool_choice,
            parallel_tool_calls=parallel_tool_calls,
            adapter=adapter,
            sampling_params=sampling_params,
            **sampling,
        )
        handle = self.submit(prepared)
        return result(generation_of(deltas_of(handle), prepared.reader, handle.replies))

    @takes_no_tokenizer
    def stream(
        self,
        query: str | None = None,
        history: Past = None,
        system: str | None = None,
        *,
        messages: Messages | None = None,
        tools: Messages | None = None,
        prompt_token_ids: Sequence[int] | None = None,
        enable_thinking: bool | None = None,
        thinking_budget: int | None = None,
        reasoning_effort: str | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        parallel_tool_calls: bool = True,
        adapter: str | None = None,
        sampling_params: SamplingParams | None = None,
        **sampling: Unpack[SamplingChanges],
    ) -> Iterator[Delta]:
        """The same turn piece by piece. Leaving the loop, or closing the iterator, cancels the request.

        ``prompt_token_ids`` instead of a query or messages: continue these, as `generate` does.
        A Delta's text is what is meant for a reader; thoughts are its ``reasoning``, and the last Delta carries the
        calls of ``tools``.
        """
        prepared = self.prepare(
            query,
            history,
            system,
            messages=messages,
            tools=tools,
            prompt_token_ids=prompt_token_ids,
            enable_thinking=enable_thinking,
            thinking_budget=thinking_budget,
            reasoning_effort=reasoning_effort,
            tool_choice=tool_choice,
            parallel_tool_calls=parallel_tool_calls,
            adapter=adapter,
            sampling_params=sampling_params,
            **sampling,
        )
        return deltas_of(self.submit(prepared))

    # ---- completion

    @overload
    def generate(
        self,
        prompt: str,
        sampling_params: SamplingParams | None = None,
        *,
        adapter: str | None = None,
        **sampling: Unpack[SamplingChanges],
    ) -> Generation: ...

    @overload
    def generate(
        self,
        prompt: list[str] | tuple[str, ...],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | None = None,
        **sampling: Unpack[SamplingChanges],
    ) -> list[Generation]: ...

    @overload
    def generate(
        self,
        prompt: None = None,
        sampling_params: SamplingParams | None = None,
        *,
        prompt_token_ids: Sequence[int],
        adapter: str | None = None,
        **sampling: Unpack[SamplingChanges],
    ) -> Generation: ...

    @overload
    def generate(
        self,
        prompt: None = None,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        prompt_token_ids: Sequence[Sequence[int]],
        adapter: str | None = None,
        **sampling: Unpack[SamplingChanges],
    ) -> list[Generation]: ...

    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        prompt_token_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        adapter: str | None = None,
        **sampling: Any,
    ) -> Any:
        """Continue a text, or token ids: -> Generation. A list of prompts -> a list of Generations, one engine run.

        Control tokens in a text stay plain text. ``sampling_params`` may be a list, one for each prompt. ``adapter``:
        the name of one that is loaded.
        """
        each, single = self._completions(prompt, sampling_params, prompt_token_ids, adapter, sampling)
        handles: list[Handle] = []
        try:
            for prepared in each:
                handles.append(self.submit(prepared))
            done = [generation_of(handle) for handle in handles]
        except BaseException:  # a bad prompt, or Ctrl-C: none of the other requests goes on in the background
            for handle in handles:
                handle.cancel()
            raise
        return done[0] if single else done

    def logits(self, token_ids: Sequence[int], *, adapter: str | None = None) -> torch.Tensor:
        """The model's logits after each token -> float32 [num_tokens, vocab_size] on the CPU; one prefill. ``adapter``:
        the name of one that is loaded."""
        logits: torch.Tensor = self._alive().engine.logits(as_token_ids(token_ids), adapter)
        return logits

    # ---- in two steps

    def prepare(
        self,
        query: str | None = None,
        history: Any = None,
        system: str | None = None,
        *,
        messages: Messages | None = None,
        tools: Messages | None = None,
        prompt: str | None = None,
        prompt_token_ids: Sequence[int] | None = None,
        enable_thinking: bool | None = None,
        thinking_budget: int | None = None,
        reasoning_effort: str | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        parallel_tool_calls: bool = True,
        adapter: str | None = None,
        most_prompt_tokens: int | None = None,
        sampling_params: SamplingParams | None = None,
        **sampling: Any,
    ) -> Prepared:
        """What `stream` asks of the engine with these arguments: rendered, tokenised and checked, for `submit` or
        `asubmit`. ``prompt``: a text to continue, as `generate` does, instead of a conversation.

        Asks nothing of the engine, so it may run in any thread while that computes. Raises RequestError; Overlong
        where texts have clearly more than ``most_prompt_tokens``, without reading all of them.
        """
        params, tools = self._params(sampling_params, sampling), given_tools(tools)
        if prompt is None and prompt_token_ids is None:
            chat, reader, budget = self._alive().prompter.chat_prompt(
                query,
                as_history(history),
                system,
                messages,
                tools,
                ThoughtWish(enable_thinking, thinking_budget, reasoning_effort),
                tool_choice,
                parallel_tool_calls,
                most_prompt_tokens,
            )
            budget = checked_budget(budget, reader)
            self._compile(params)  # by itself, so that an error tells its place
            self._compile(reader.held(params))
            return Prepared(chat.token_ids, params, reader, chat.stop, budget, adapter)
        if query is not None or messages is not None or tools:
            given = "prompt" if prompt_token_ids is None else "prompt_token_ids"
            raise RequestError("one answer", f"{given} beside a chat", "Pass one of the two.")
        if prompt_token_ids is not None:
            prompt_token_ids = as_token_ids(prompt_token_ids)
        elif not isinstance(prompt, str):
            raise RequestError("prompt", f"got {type(prompt).__name__}", "Pass a string.")
        [ids], _ = self._alive().prompter.completion_prompts(prompt, prompt_token_ids, most_prompt_tokens)
        self._compile(params)
        budget = checked_budget(thinking_budget, COMPLETION)
        return Prepared(ids, params, thinking_budget=budget, adapter=adapter)

    def submit(self, prepared: Prepared) -> Handle:
        """Begin to compute what was prepared -> an iterator over its Deltas, which can `cancel` and `end_thought`.

        Raises RequestError or CapacityError where it does not fit the model.
        """
        params, options = self._options(prepared)
        return self._alive().engine.submit(prepared.prompt_token_ids, params, **options)

    def asubmit(self, prepared: Prepared) -> AsyncAnswer:
        """The same from a running event loop -> an asynchronous iterator, for a task of that loop."""
        params, options = self._options(prepared)
        return self._alive().engine.asubmit(prepared.prompt_token_ids, params, **options)

    # ---- about it

    @property
    def tokenizer(self) -> ChatTokenizer:
        """What makes token ids of texts, and texts of them. Raises RequestError where the checkpoint has none, so that
        the model takes and gives token ids alone."""
        return self._prompter.needs_tokenizer("llm.tokenizer")

    @property
    def has_tokenizer(self) -> bool:
        """Whether texts go in and out; else token ids alone."""
        return self._prompter.tokenizer is not None

    @property
    def can_chat(self) -> bool:
        """Whether it knows conversations: a Qwen-1 base model does not. Of later ones all do that have a tokenizer and
        can generate."""
        return self._prompter.can_chat

    @property
    def thinking(self) -> Thinking:
        """Whether answers begin with a thought: "never", "always", or "optional" where the caller may choose."""
        return self._prompter.thinking

    @property
    def takes_tools(self) -> bool:
        """Whether its conversations may have tools."""
        return self._prompter.takes_tools

    def explain(self) -> str:
        """A table: what serves each operation in how many places, and why where it is not the device's own kernel; then
        the bytes of the weights; then the adapters that are loaded."""
        from qwenrt import summary

        alive = self._alive()
        adapters = summary.adapters(alive.engine.adapters.loaded)
        return "\n".join([alive.summary, *summary.table(alive.backend, alive.model), *adapters])

    def stats(self) -> dict[str, Any]:
        """Figures of the engine (running, waiting, free blocks, ...) and of the model (bytes, limits)."""
        from qwenrt import summary

        alive = self._alive()
        return {
            **alive.engine.stats(),
            "max_model_len": alive.max_model_len,
            "weight_bytes": alive.model.weight_bytes,
            "weight_bytes_per_token": alive.model.weight_bytes_per_token,
            "load_s": alive.load_s,
            "dtype": str(alive.dtype).removeprefix("torch."),
            "kernels": alive.backend.describe(),
            "activations": "+".join(summary.roundings(alive.backend, alive.model)),
        }

    @property
    def failure(self) -> QwenrtError | None:
        """Why it cannot be used any more: it was closed, or its engine's thread has ended; None while it can. Waits for
        nothing."""
        assembled = self._assembled
        return self._closed() if assembled is None else assembled.engine.failure

    def close(self) -> None:
        """End all requests and give the memory back. Safe to call twice; any use afterwards is a RequestError."""
        assembled, self._assembled = self._assembled, None
        if assembled is not None:
            assembled.engine.close()
            backend = assembled.backend
            del assembled
            gc.collect()  # layers and what they are bound to hold each other
            backend.empty_cache()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<qwenrt.LLM {self.name}{'' if self._assembled else ' (closed)'}>"

    if not TYPE_CHECKING:  # or a checker would take any name

        def __getattr__(self, name: str) -> Any:
            raise unknown_attribute("LLM", name)

    # ---- inside

    def _alive(self) -> Assembled:
        assembled = self._assembled
        if assembled is None:
            raise self._closed()
        return assembled

    def _closed(self) -> RequestError:
        return RequestError(f"using {self.name}", "it was closed", "Load it again with qwenrt.load(...).")

    def _turn(
        self,
        query: str | None,
        history: Any,
        system: str | None,
        messages: Messages | None,
        tools: Messages | None,
        **asked: Any,
    ) -> tuple[Prepared, Callable[[Generation], Any]]:
        """One turn of a chat, and what its caller gets of the answer."""
        past, tools = as_history(history), given_tools(tools)
        prepared = self.prepare(query, past, system, messages=messages, tools=tools, **asked)
        pair = messages is None and tools is None
        if pair and prepared.params.n != 1:
            found = f"n={prepared.params.n}"
            raise RequestError("chat(query)", found, "Use chat(messages=...) for several answers.")

        def result(generation: Generation) -> Any:
            if not pair:
                return generation
            response = generation.text.strip()
            return response, [*past, (query, response)]

        return prepared, result

    def _completions(
        self,
        prompt: object,
        sampling_params: object,
        prompt_token_ids: object,
        adapter: str | None,
        sampling: Mapping[str, Any],
    ) -> tuple[list[Prepared], bool]:
        """Each of the prompts that `generate` was given, and whether it was a single one."""
        prompts, single = self._alive().prompter.completion_prompts(prompt, prompt_token_ids)
        if not isinstance(sampling_params, Sequence):
            params = self._params(sampling_params, sampling)
            self._compile(params)
            return [Prepared(ids, params, adapter=adapter) for ids in prompts], single
        if len(sampling_params) != len(prompts):
            found = f"{len(sampling_params)} for {len(prompts)} prompts"
            raise RequestError(
                "a list of sampling_params", found, "Give one for each prompt, or one for all."
            )
        each = [self._params(params, sampling) for params in sampling_params]
        for params in each:
            self._compile(params)
        pairs = zip(prompts, each, strict=True)
        return [Prepared(ids, params, adapter=adapter) for ids, params in pairs], single

    def _params(self, given: object, changes: Mapping[str, Any]) -> SamplingParams:
        if given is not None and not isinstance(given, SamplingParams):
            raise RequestError(
                "sampling_params", f"got {type(given).__name__}", "Pass qwenrt.SamplingParams(...)."
            )
        params = self.generation_config.sampling if given is None else given
        return self._prompter.seeing_control_tokens(params.with_(**changes) if changes else params)

    def build_grammars(self) -> None:
        """Make what all grammars share, so that the first request with one does not wait for it; in this thread, beside
        others. Raises RequestError where llguidance is missing."""
        self._alive().engine.build_grammars()

    def _compile(self, params: SamplingParams) -> None:
        """Compile the grammar of a request, which is then at hand when it is submitted, from whatever thread."""
        if params.grammar is not None:
            self._alive().engine.compile(params.grammar)

    def _options(self, prepared: Prepared) -> tuple[SamplingParams, dict[str, Any]]:
        """What the engine is told beside the prompt."""
        params, options = prepared.options(self._prompter.tokenizer)
        return params, {**options, "stop_sequences": self.generation_config.stop_words_ids}
