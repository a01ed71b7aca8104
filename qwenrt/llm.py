"""A loaded model: chat, stream, generate, logits. Read this first.

``load`` turns a name into an LLM; an LLM turns what it is asked into requests for its engine. One engine thread
serves all callers, so any thread may use one LLM.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from os import PathLike, fspath
from types import TracebackType
from typing import TYPE_CHECKING, Any

from qwenrt.answering import Answer, Reading, deltas_of, generation_of
from qwenrt.arguments import as_integer, as_list, flag
from qwenrt.config import Environment, GenerationConfig, ModelConfig
from qwenrt.errors import ConfigError, RequestError, memory_errors, shown
from qwenrt.loader.device_memory import check_room_for_torch
from qwenrt.outputs import Delta
from qwenrt.sampling_params import SamplingParams
from qwenrt.text.chat_template import Prompt, build_chat
from qwenrt.text.conversations import as_history
from qwenrt.text.message_checks import given_tools
from qwenrt.text.messages import DEFAULT_SYSTEM
from qwenrt.text.reply_style import ReplyStyle
from qwenrt.text.retrieval import DEFAULT_TASK, rerank_prompt, verdict_ids

if TYPE_CHECKING:
    import torch

    from qwenrt.assembly import Assembled
    from qwenrt.engine.async_engine import Handle
    from qwenrt.text.replies import ReplyStream
    from qwenrt.text.tokenizer import Tokenizer

logger = logging.getLogger("qwenrt")
History = list[tuple[str, str]]


def load(
    model: str | PathLike[str] = "demo",
    *,
    device: str = "auto",
    dtype: str = "auto",
    source: str = "auto",
    revision: str | None = None,
    offline: bool | None = None,
    quantize: str | None = None,
    quantize_head: str | None = None,
    kv_cache_dtype: str = "auto",
    activations: str = "auto",
    max_model_len: int | None = None,
    max_num_seqs: int = 16,
    max_num_batched_tokens: int = 512,
    fallback: str = "warn",
    progress: bool | None = None,
    packed_cache: bool | str | PathLike[str] | None = None,
) -> LLM:
    """Load a model, wherever it is, for whatever device is there.

    model: an alias ("Qwen-7B-Chat"), a repository ("Qwen/Qwen-7B-Chat"), a local directory, or "demo" (built in).
    device: "auto" | "cpu" | "cuda" | "cuda:1" | "npu" | "dcu" | a plugin's name.
    dtype: "auto" | "float32" | "bfloat16" | "float16", of activations and of weights that are not quantised.
    source: "auto" | "huggingface" | "modelscope"; revision: a branch, tag or commit; offline: True opens no socket.
    quantize: None | "int8" | "int4": round dense weights at load. kv_cache_dtype: "auto" | "int8". quantize_head: as
        quantize, the output layer; one that is the embedding too is then there twice: faster, more memory.
    activations: "auto" | "exact" | "int16" | "int8", what the CPU's kernels round the inputs of quantised linears to;
        all but "exact" also let prompts be multiplied with large 16-bit weights in fixed point (about 1e-4).
    max_model_len: longest prompt and answer together, in tokens; None takes what the model and the memory allow.
    max_num_seqs: how many requests are computed together; max_num_batched_tokens: how many tokens a step.
    fallback: "warn" | "error" | "silent", where a device's own kernel cannot serve.
    progress: None shows bars and one summary line on a terminal's stderr; True or False decides.
    packed_cache: True or a directory keeps packed weights on disk, so that the next load maps them; None leaves it to
    QWENRT_PACKED_CACHE.

    Raises CheckpointError, ConfigError, BackendError or CapacityError, each saying what to do.
    """
    settings: dict[str, Any] = {name: value for name, value in locals().items() if name != "model"}
    collecting = gc.isenabled()
    gc.disable()  # a million objects are made and none is garbage: looking for some would take a fifth of a start
    try:
        with memory_errors(f"loading {shown(model)}"):
            check_room_for_torch()
            from qwenrt.assembly import Settings, assemble

            return LLM(assemble(_name(model), Settings(**settings), Environment.read()))
    finally:
        if collecting:
            gc.enable()


def load_random(shape: str | ModelConfig, **settings: Any) -> LLM:
    """Random weights of a released shape ("Qwen-1_8B", "Qwen-7B", ...), without a tokenizer: for benchmarks.

    ``settings`` as for `load`, but for those that concern a download.
    """
    with memory_errors(f"loading {shown(shape)}"):
        check_room_for_torch()
        from qwenrt.assembly import Settings, assemble_random

        return LLM(assemble_random(shape, Settings(**settings), Environment.read()))


def load_tokenizer(model: str | PathLike[str]) -> Tokenizer:
    """A model's tokenizer alone, by any name `load` takes; needs no torch."""
    from qwenrt.loader.hub import resolve
    from qwenrt.text.tokenizer import load_tokenizer as from_directory

    return from_directory(resolve(_name(model), env=Environment.read(), weights=False))


class LLM:
    """One model in memory. Made by `load`; usable from any thread; a context manager that frees it at the end."""

    def __init__(self, assembled: Assembled) -> None:
        self._assembled: Assembled | None = assembled
        self.name: str = assembled.name
        self.config: ModelConfig = assembled.config
        self.generation_config: GenerationConfig = assembled.generation
        self.tokenizer: Tokenizer | None = assembled.tokenizer
        self.summary: str = assembled.summary
        self.backend = assembled.backend
        self.device = assembled.backend.device

    # ---- chat

    def chat(
        self,
        query: str | None = None,
        history: Any = None,
        system: str | None = None,
        *,
        messages: Sequence[Mapping[str, Any]] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        enable_thinking: bool | None = None,
        thinking_budget: int | None = None,
        sampling_params: SamplingParams | None = None,
        **sampling: Any,
    ) -> Any:
        """One turn of a conversation.

        With ``query``: -> (response, history), the new pair appended to a copy of ``history``; ``system`` is not part
        of it (None: the model's own default). With ``messages`` (OpenAI's shape) or ``tools``: -> Generation, whose
        ``message`` is ready to append. ``enable_thinking``: for models that can do either, None takes their default.
        ``thinking_budget``: tokens after which a thought is brought to its end; refused for models that do not think.
        ``sampling`` changes single fields of
        ``sampling_params`` or of the checkpoint's own defaults.
        """
        past, tools = as_history(history), given_tools(tools)
        prompt, reading = self._chat_prompt(query, past, system, messages, tools, enable_thinking)
        params = self._params(sampling_params, sampling)
        pair = messages is None and tools is None
        if pair and params.n != 1:
            raise RequestError("chat(query)", f"n={params.n}", "Use chat(messages=...) for several answers.")
        answer = self._answer(prompt, params, reading, thinking_budget)
        generation = answer.generation()
        if not pair:
            return generation
        response = generation.text.strip()
        assert query is not None
        return response, [*past, (query, response)]

    def stream(
        self,
        query: str | None = None,
        history: Any = None,
        system: str | None = None,
        *,
        messages: Sequence[Mapping[str, Any]] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        prompt_token_ids: Sequence[int] | None = None,
        enable_thinking: bool | None = None,
        thinking_budget: int | None = None,
        sampling_params: SamplingParams | None = None,
        **sampling: Any,
    ) -> Iterator[Delta]:
        """The same turn piece by piece. Leaving the loop, or closing the iterator, cancels the request.

        ``prompt_token_ids`` instead of a query or messages: continue these, as `generate` does.
        A Delta's text is what is meant for a reader; thoughts are its ``reasoning``, and the last Delta carries the
        calls of ``tools``.
        """
        params, tools = self._params(sampling_params, sampling), given_tools(tools)
        if prompt_token_ids is not None:
            if query is not None or messages is not None or tools:
                raise RequestError("stream", "prompt_token_ids beside a chat", "Pass one of the two.")
            return deltas_of(self._submit(_token_ids(prompt_token_ids), params))
        prompt, reading = self._chat_prompt(
            query, as_history(history), system, messages, tools, enable_thinking
        )
        return iter(self._answer(prompt, params, reading, thinking_budget))

    # ---- completion

    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        prompt_token_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        **sampling: Any,
    ) -> Any:
        """Continue a text, or token ids: -> Generation. A list of prompts -> a list of Generations, one engine run.

        Control tokens in a text stay plain text. ``sampling_params`` may be a list, one for each prompt.
        """
        prompts, single = self._prompts(prompt, prompt_token_ids)
        if isinstance(sampling_params, Sequence):
            if len(sampling_params) != len(prompts):
                found = f"{len(sampling_params)} for {len(prompts)} prompts"
                raise RequestError(
                    "a list of sampling_params", found, "Give one for each prompt, or one for all."
                )
            each = [self._params(p, sampling) for p in sampling_params]
        else:
            each = [self._params(sampling_params, sampling)] * len(prompts)
        handles: list[Handle] = []
        try:
            for ids, params in zip(prompts, each, strict=True):
                handles.append(self._submit(ids, params))
            done = [generation_of(handle) for handle in handles]
        except BaseException:  # one bad prompt, or Ctrl-C: nothing of the others goes on in the background
            for handle in handles:
                handle.cancel()
            raise
        return done[0] if single else done

    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """The model's logits after each token -> float32 [num_tokens, vocab_size] on the CPU; one prefill."""
        logits: torch.Tensor = self._alive().engine.logits(_token_ids(token_ids))
        return logits

    # ---- retrieval

    def embed(
        self,
        texts: str | Sequence[str],
        *,
        instruction: str | None = None,
        prompt_name: str | None = None,
        normalize: bool | None = None,
    ) -> torch.Tensor:
        """Embeddings of texts -> float32 [len(texts), D] on the CPU, or [D] of a single text.

        By the checkpoint's own recipe (modules.json and what it names, as sentence-transformers writes them); without
        one as Qwen3-Embedding does it: the final state of the last token, of length 1; a model that was made to write
        says so in a warning. ``normalize``: whether the
        length is 1, None as the recipe says. Queries have an ``instruction`` ("Given a question, retrieve passages that
        answer it") or one of the model's own prompts, by ``prompt_name``; documents mostly none.
        """
        tokenizer = self._needs_tokenizer("embed")
        listed = [texts] if isinstance(texts, str) else as_list("texts", texts)
        if not listed:
            raise RequestError("embed", "an empty list", "Pass at least one text.")
        normalize = None if normalize is None else flag("normalize", normalize)
        alive = self._alive()
        vectors = alive.embedder.embed(alive.engine, tokenizer, listed, instruction, prompt_name, normalize)
        return vectors[0] if isinstance(texts, str) else vectors

    def rerank(self, query: str, documents: Sequence[str], *, instruction: str = DEFAULT_TASK) -> list[float]:
        """How well each document answers the query, from 0 to 1, in the order of ``documents``.

        As Qwen3-Reranker does it: the probability of "yes" against "no" as the next token of its question.
        """
        tokenizer = self._needs_tokenizer("rerank")
        listed = as_list("documents", documents)
        if not listed:
            return []
        prompts = [rerank_prompt(tokenizer, query, document, instruction) for document in listed]
        logits = self._alive().engine.last_logits(prompts, verdict_ids(tokenizer))
        scores: list[float] = logits.softmax(-1)[:, 1].tolist()
        return scores

    # ---- about it

    @property
    def can_chat(self) -> bool:
        """Whether it knows conversations: a Qwen-1 base model does not, of later ones all with a tokenizer do that
        generate."""
        if self.config.model_type == "qwen":
            return self.generation_config.chat_format == "chatml"
        return self.tokenizer is not None and self.config.is_causal and self.config.has_head

    def explain(self) -> str:
        """Which code serves which op of which layers, bytes of the weights, and why not the fast one."""
        return self._alive().explain()

    def stats(self) -> dict[str, Any]:
        """Figures of the engine (running, waiting, free blocks, ...) and of the model (bytes, limits)."""
        alive = self._alive()
        return {
            **alive.engine.stats(),
            "max_model_len": alive.max_model_len,
            "weight_bytes": alive.model.weight_bytes,
            "weight_bytes_per_token": alive.model.weight_bytes_per_token,
            "load_s": alive.load_s,
            "dtype": str(alive.dtype).removeprefix("torch."),
            "kernels": alive.backend.describe(),
            "activations": alive.activations,
        }

    def close(self) -> None:
        """End all requests and give the memory back. Safe to call twice; any use afterwards is a RequestError."""
        assembled, self._assembled = self._assembled, None
        if assembled is not None:
            assembled.engine.close()
            backend = assembled.backend
            del assembled
            backend.empty_cache()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<qwenrt.LLM {self.name}{'' if self._assembled else ' (closed)'}>"

    # ---- inside

    def _alive(self) -> Assembled:
        if self._assembled is None:
            raise RequestError(f"using {self.name}", "it was closed", "Load it again with qwenrt.load(...).")
        return self._assembled

    def _chat_prompt(
        self,
        query: str | None,
        history: History,
        system: str | None,
        messages: Sequence[Mapping[str, Any]] | None,
        tools: Sequence[Mapping[str, Any]] | None,
        enable_thinking: bool | None,
    ) -> tuple[Prompt, Reading]:
        if (query is None) == (messages is None):
            found = "both a query and messages" if messages is not None else "neither a query nor messages"
            raise RequestError("chat", found, "Pass chat(query, history=...) or chat(messages=[...]).")
        enable_thinking = None if enable_thinking is None else flag("enable_thinking", enable_thinking)
        tokenizer = self._needs_tokenizer("chat")
        if self.generation_config.chat_format == "raw":
            raise RequestError(
                f"chatting with {self.name}",
                "it is a base model (chat_format 'raw'), which continues texts and knows no conversation",
                "Use generate(prompt), or load the -Chat release of the model.",
            )
        chat_format = self._alive().chat_format
        if isinstance(chat_format, ConfigError):
            raise chat_format
        assert chat_format is not None
        is_qwen1 = self.config.model_type == "qwen"
        window = self.generation_config.max_window_size if is_qwen1 else None
        if messages is None:
            assert query is not None
            if is_qwen1 and not tools and not enable_thinking:
                system = DEFAULT_SYSTEM if system is None else system
                return Prompt(build_chat(tokenizer, query, history, system, window)), Reading()
            messages = [] if system is None else [{"role": "system", "content": system}]
            for user, assistant in history:
                messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
            messages += [{"role": "user", "content": query}]
        prompt = chat_format.prompt(
            tokenizer, messages, tools, enable_thinking=enable_thinking, max_window_size=window
        )
        thinking = chat_format.style.thinking
        if (
            thinking == "open" and not prompt.in_thought
        ):  # the template can also leave the thought to the model
            thinking = "hybrid"
        calls = chat_format.style.calls
        if tools and calls == "none":  # the template has a place for tools and names no tags: the common form
            calls = "hermes"
        style = ReplyStyle(calls if tools else "none", thinking)
        return prompt, Reading(style, prompt.in_thought, tools)

    def _answer(
        self, prompt: Prompt, params: SamplingParams, reading: Reading, thinking_budget: int | None
    ) -> Answer:
        """The answers to a chat prompt, asked for."""
        submit = partial(self._submit, stop=prompt.stop)
        tokenizer = self._needs_tokenizer("chat")
        return Answer(submit, prompt.token_ids, params, reading, thinking_budget, tokenizer)

    def _needs_tokenizer(self, asked: str) -> Tokenizer:
        self._alive()
        if self.tokenizer is None:
            raise RequestError(
                f"{asked} with {self.name}",
                "it has no tokenizer file (tokenizer.json, vocab.json with merges.txt, or qwen.tiktoken)",
                "Pass generate(prompt_token_ids=...), or add the file to the directory.",
            )
        return self.tokenizer

    def _params(self, given: SamplingParams | None, changes: Mapping[str, Any]) -> SamplingParams:
        if given is not None and not isinstance(given, SamplingParams):
            raise RequestError(
                "sampling_params", f"got {type(given).__name__}", "Pass qwenrt.SamplingParams(...)."
            )
        params = self.generation_config.sampling if given is None else given
        return self._seeing_control_tokens(params.with_(**changes) if changes else params)

    def _seeing_control_tokens(self, params: SamplingParams) -> SamplingParams:
        """A stop string that is a control token, which is left out of every text, ends one by its id."""
        hidden = self.tokenizer.special_tokens if self.tokenizer is not None and params.stop else {}
        ids = [hidden[stop] for stop in params.stop if stop in hidden]
        for stop in params.stop:
            inside = next((form for form in hidden if form in stop and stop not in hidden), None)
            if inside is not None:
                logger.warning(
                    "stop %s is never found: %s is left out of texts; it would end one by itself",
                    shown(stop),
                    inside,
                )
        return params.with_(stop_token_ids=(*params.stop_token_ids, *ids)) if ids else params

    def _prompts(self, prompt: object, prompt_token_ids: object) -> tuple[list[list[int]], bool]:
        """The prompts as token ids, and whether a single one was given."""
        if (prompt is None) == (prompt_token_ids is None):
            found = "neither" if prompt is None else "both"
            raise RequestError("generate", f"{found} of prompt and prompt_token_ids", "Pass one of the two.")
        if prompt_token_ids is not None:
            listed = as_list("prompt_token_ids", prompt_token_ids)
            if listed and as_integer(listed[0]) is None:
                return [_token_ids(ids) for ids in listed], False
            return [_token_ids(listed)], True
        tokenizer = self._needs_tokenizer("generate from text")
        texts = [prompt] if isinstance(prompt, str) else as_list("prompt", prompt)
        for text in texts:
            if not isinstance(text, str):
                raise RequestError(
                    "prompt", f"got {type(text).__name__}", "Pass a string or a list of strings."
                )
        return [[*tokenizer.prefix_ids, *tokenizer.encode(text)] for text in texts], isinstance(prompt, str)

    def _submit(
        self,
        ids: list[int],
        params: SamplingParams,
        replies: Sequence[ReplyStream] = (),
        *,
        stop: Sequence[str] = (),
    ) -> Handle:
        if stop:
            params = replace(params, stop=(*params.stop, *stop))
        sequences = self.generation_config.stop_words_ids
        return self._alive().engine.submit(ids, params, stop_sequences=sequences, replies=replies)


def _name(model: object) -> str:
    text = fspath(model) if isinstance(model, PathLike) else model
    if not isinstance(text, str) or not text:
        raise RequestError(
            "a model's name", f"got {shown(model)}", "Pass a name, a repository or a directory."
        )
    return text


def _token_ids(ids: object) -> list[int]:
    return [_token_id(token) for token in as_list("token ids", ids)]


def _token_id(token: object) -> int:
    number = as_integer(token)
    if number is None:
        raise RequestError("token ids", f"one is {shown(token)}", "Token ids are integers.")
    return number
