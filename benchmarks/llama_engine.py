"""llama.cpp under measurement, through the low-level API of llama-cpp-python.

Only llama_decode and llama_synchronize are timed; the next token is random, so no sampling is charged to it.
"""

from __future__ import annotations

import ctypes
import random
from pathlib import Path
from typing import Any

import llama_cpp

from benchmarks.gguf_files import model_file
from benchmarks.shapes import config_of
from benchmarks.timing import Stopwatch

_STEP = 512  # tokens of a prompt computed at once, as in qwenrt


class LlamaEngine:
    """``settings``: weights (Q4_0, Q8_0, F16), cache (F16, Q8_0), context in tokens per sequence, sequences."""

    def __init__(self, shape: str, settings: dict[str, Any], threads: int, cache: Path) -> None:
        path = model_file(shape, settings["weights"], cache, threads)
        config = config_of(shape)
        self._vocabulary, self._source = config.vocab_size, random.Random(0)
        self._has_states = config.linear_attention is not None
        self._silence = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._silence, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            bytes(path), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise SystemExit(f"llama.cpp could not load {path}: delete it, and it is written again.")
        self._sequences = settings.get("sequences", 1)
        params = self._parameters(settings, threads)
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise SystemExit(f"llama.cpp made no context of {params.n_ctx} tokens: is there enough memory?")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch = llama_cpp.llama_batch_init(_STEP, 0, 1)
        self._filled = (0, 0)  # tokens of each sequence, number of sequences
        self.about = {
            "version": llama_cpp.__version__,
            "system": llama_cpp.llama_print_system_info().decode().strip(),
            "model_bytes": llama_cpp.llama_model_size(self._model),
            "flash_attention": "on" if settings.get("cache") == "Q8_0" else "auto",
        }

    def _parameters(self, settings: dict[str, Any], threads: int) -> llama_cpp.llama_context_params:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = settings.get("context", 2048 if self._sequences == 1 else 256) * self._sequences
        params.n_seq_max = self._sequences
        params.n_batch = params.n_ubatch = _STEP
        params.n_threads = params.n_threads_batch = threads
        if settings.get("cache", "F16") == "Q8_0":
            params.type_k = params.type_v = llama_cpp.GGML_TYPE_Q8_0
            params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        return params

    def prefill(self, tokens: int) -> Stopwatch:
        self._clear()
        with Stopwatch() as watch:
            self._prompt(0, tokens)
        return watch

    def decode(self, context: int, new_tokens: int, batch: int) -> Stopwatch:
        """The prompts are computed once and kept; what earlier steps added to them is taken away. From the states of
        linear attention nothing can be taken: with these, prompts are computed every time."""
        if self._filled != (context, batch):
            self._clear()
            for sequence in range(batch):
                self._prompt(sequence, context)
            self._filled = (context, batch)
        watch = Stopwatch()
        for step in range(new_tokens):
            rows = [(self._token(), context + step, sequence, True) for sequence in range(batch)]
            self._fill_batch(rows)
            with watch:
                self._compute()
        if self._has_states:
            self._clear()
            return watch
        for sequence in range(batch):
            if not llama_cpp.llama_memory_seq_rm(self._memory, sequence, context, -1):
                raise SystemExit(f"llama.cpp could not shorten sequence {sequence} to {context} tokens.")
        return watch

    def _clear(self) -> None:
        llama_cpp.llama_memory_clear(self._memory, True)
        self._filled = (0, 0)

    def _prompt(self, sequence: int, tokens: int) -> None:
        for start in range(0, tokens, _STEP):
            end = min(start + _STEP, tokens)
            self._fill_batch([(self._token(), at, sequence, at == tokens - 1) for at in range(start, end)])
            self._compute()

    def _token(self) -> int:
        return self._source.randrange(self._vocabulary)

    def _fill_batch(self, rows: list[tuple[int, int, int, bool]]) -> None:
        """Rows of (token, position, sequence, whether its logits are wanted)."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for index, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[index], batch.pos[index] = token, position
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
            batch.logits[index] = wanted

    def _compute(self) -> None:
        status = llama_cpp.llama_decode(self._context, self._batch)
        llama_cpp.llama_synchronize(self._context)
        if status != 0:
            raise SystemExit(f"llama_decode of {self._batch.n_tokens} tokens gave {status}.")
