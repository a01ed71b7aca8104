"""A model that answers by rule, in place of qwenrt.loading: what the command line does around a model is tested.

It takes no call that the real one would not take: `as_the_real` holds each against the signature in its place.
"""

from __future__ import annotations

import functools
import inspect
import os
import signal
import sys
import time
import types
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from qwenrt.config import GenerationConfig, parse_model_config
from qwenrt.errors import CheckpointError, RequestError
from qwenrt.llm import LLM
from qwenrt.loading import load, load_random
from qwenrt.outputs import Delta, Generation, Timing, Usage
from qwenrt.sampling_params import SamplingParams

CONFIG = parse_model_config(
    {
        "hidden_size": 8,
        "num_attention_heads": 1,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "seq_length": 64,
    }
)

TIMING = Timing(queue_s=0.1, first_token_s=0.5, total_s=1.5, tokens_per_s=2.0)

Fake = TypeVar("Fake", bound=Callable[..., Any])


def as_the_real(real: Callable[..., Any]) -> Callable[[Fake], Fake]:
    """A function in the place of ``real``: TypeError where that one would not take the call."""
    signature = inspect.signature(real)

    def held(fake: Fake) -> Fake:
        @functools.wraps(fake)
        def call(*args: Any, **kwargs: Any) -> Any:
            signature.bind(*args, **kwargs)
            return fake(*args, **kwargs)

        return call  # type: ignore[return-value]

    return held


class FakeLLM:
    """Echoes. "/slow" writes words for a minute or until SIGUSR1, "/never" waits as long, "/interrupt" is cut by
    Ctrl-C, "/fail" fails, "/escape" writes control characters, "/long" runs into max_tokens, "/think" thinks first."""

    name = "fake"
    summary = "fake on cpu"
    config = CONFIG

    def __init__(self, chat_format: str = "chatml") -> None:
        self.generation_config = GenerationConfig(chat_format=chat_format, sampling=SamplingParams(top_p=0.8))
        self.can_chat = chat_format == "chatml"
        self.calls: list[dict[str, Any]] = []
        self.closed_streams = 0
        self.closed = False

    @as_the_real(LLM.stream)
    def stream(self, query: str, history: Any = None, system: str = "", **rest: Any) -> Iterator[Delta]:
        self.calls.append({"query": query, "history": history, "system": system, **rest})
        return self._stream(query, history or [], rest["sampling_params"])

    def _stream(self, query: str, history: Any, params: SamplingParams) -> Iterator[Delta]:
        try:
            if query == "/fail":
                raise RequestError("a query", "it fails", "Ask another one.")
            if query == "/think":
                yield Delta("", reasoning="Let me ")
                yield Delta("", reasoning="think.")
            if query == "/never":
                time.sleep(60)
            yield Delta("echo ")
            if query == "/interrupt":
                raise KeyboardInterrupt
            if query == "/slow":
                told: list[int] = []
                signal.signal(signal.SIGUSR1, lambda number, frame: told.append(number))
                for _ in range(3000):
                    if told:
                        break
                    time.sleep(0.02)
                    yield Delta("word ")
            text = {"/escape": "\x1b[2Jred\x07", "/smile": "\U0001f642"}.get(query, query)
            yield Delta(f"{text} ({len(history)} turns, seed {params.seed}, top_p {params.top_p})")
            yield Delta(
                "",
                finish_reason="length" if query == "/long" else "stop",
                usage=Usage(5, 2, 4),
                timing=TIMING,
            )
        finally:
            self.closed_streams += 1

    @as_the_real(LLM.prepare)
    def prepare(
        self, *, prompt: str, sampling_params: SamplingParams, adapter: str | None = None
    ) -> tuple[str, SamplingParams]:
        return prompt, sampling_params

    @as_the_real(LLM.submit)
    def submit(self, prepared: tuple[str, SamplingParams]) -> Iterator[Delta]:
        prompt, params = prepared
        self.calls.append({"prompt": prompt, "params": params})
        return iter([Delta(f"{prompt} and "), Delta("so on", finish_reason="length")])

    @as_the_real(LLM.chat)
    def chat(
        self, *, messages: list[dict[str, str]], sampling_params: SamplingParams, adapter: str | None = None
    ) -> Generation:
        text = f"reply to {messages[-1]['content']}"
        return Generation(text, [1], "stop", Usage(3, 1), message={"role": "assistant", "content": text})

    @as_the_real(LLM.generate)
    def generate(
        self,
        prompt: Any = None,
        sampling_params: Any = None,
        *,
        prompt_token_ids: Any = None,
        adapter: str | None = None,
    ) -> Any:
        self.calls.append({"prompt": prompt, "prompt_token_ids": prompt_token_ids, "params": sampling_params})
        if prompt_token_ids is not None:
            count = sampling_params.max_tokens
            time.sleep(0.001 * count)
            return [Generation("", [0] * count, "length", Usage(1, count)) for _ in prompt_token_ids]
        return Generation(f"{prompt} and so on", [1], "length", Usage(2, 1))

    @property
    def backend(self) -> Any:
        import torch

        from qwenrt.backends.base import Backend

        return Backend(torch.device("cpu"))

    @property
    def device(self) -> Any:
        import torch

        return torch.device("cpu")

    def stats(self) -> dict[str, Any]:
        return {
            "weight_bytes_per_token": 1000,
            "max_model_len": 4096,
            "load_s": 0.5,
            "kernels": "none",
            "activations": "int16",
            "dtype": "float32",
        }

    def __enter__(self) -> FakeLLM:
        return self

    def __exit__(self, *exc: object) -> None:
        self.closed = True


def install(monkeypatch: Any = None, chat_format: str = "chatml") -> types.SimpleNamespace:
    """Put the fake in the place of qwenrt.loading. Returns .llm and .loaded (the arguments of each load)."""
    made = types.SimpleNamespace(llm=FakeLLM(chat_format), loaded=[])

    def fake_load(model: str = "demo", **arguments: Any) -> FakeLLM:
        made.loaded.append((model, arguments))
        if model == "nowhere":
            raise CheckpointError("model 'nowhere'", "no such model", "Known are: demo.")
        return made.llm

    module: Any = types.ModuleType("qwenrt.loading")
    module.load, module.load_random = as_the_real(load)(fake_load), as_the_real(load_random)(fake_load)
    if monkeypatch is None:
        sys.modules["qwenrt.loading"] = module
    else:
        monkeypatch.setitem(sys.modules, "qwenrt.loading", module)
    return made


if __name__ == "__main__":  # a process to talk to through a pseudo-terminal
    from qwenrt.cli import main

    install()
    if os.environ.get("WITHOUT_EXTRAS"):  # as if rich and prompt-toolkit were not installed
        sys.modules.update(dict.fromkeys(("rich", "prompt_toolkit")))  # type: ignore[arg-type]
    raise SystemExit(main(sys.argv[1:]))
