"""qwenrt under measurement: the whole engine, from token ids to sampled token ids."""

from __future__ import annotations

import dataclasses
import os
import random
from typing import Any

from benchmarks.shapes import config_of
from benchmarks.timing import Stopwatch


class QwenrtEngine:
    """``settings`` are those of `qwenrt.load`; one that this version does not know is left out and named."""

    def __init__(self, shape: str, settings: dict[str, Any], threads: int) -> None:
        os.environ["QWENRT_NUM_THREADS"] = str(threads)
        import torch

        import qwenrt
        from qwenrt.config.quant import rounding_description
        from qwenrt.load_options import LoadOptions
        from qwenrt.loading import load_random

        known = {field.name for field in dataclasses.fields(LoadOptions)}
        self.llm = load_random(config_of(shape), **{k: v for k, v in settings.items() if k in known})
        stats = self.llm.stats()
        config = self.llm.config
        int8_cache = settings.get("kv_cache_dtype") == "int8"
        dtype = getattr(torch, stats["dtype"])
        heads = config.num_layers, config.num_kv_heads, config.head_dim
        self.about = {
            "version": qwenrt.__version__,
            "torch": torch.__version__,
            "left_out": sorted(set(settings) - known),
            "rounded": rounding_description(settings.get("quantize")),
            "kv_bytes_per_token": self.llm.backend.kv_bytes_per_token(*heads, dtype, int8_cache),
            **{k: stats[k] for k in ("weight_bytes_per_token", "load_s", "dtype", "kernels")},
        }
        self._source = random.Random(0)

    def prefill(self, tokens: int) -> Stopwatch:
        return self._generate([self._prompt(self._source, tokens)], 1)

    def decode(self, context: int, new_tokens: int, batch: int) -> Stopwatch:
        """The difference of a long and a short answer to prompts that are in the prefix cache."""
        prompts = [self._prompt(random.Random(index), context) for index in range(batch)]
        self._generate(prompts, 1)
        short = self._generate(prompts, 1)
        whole = self._generate(prompts, 1 + new_tokens)
        whole.seconds = max(whole.seconds - short.seconds, 1e-9)
        return whole

    def _prompt(self, source: random.Random, tokens: int) -> list[int]:
        vocabulary = min(self.llm.config.vocab_size, 151643)  # ordinary tokens only
        return [source.randrange(vocabulary) for _ in range(tokens)]

    def _generate(self, prompts: list[list[int]], new_tokens: int) -> Stopwatch:
        from qwenrt.sampling_params import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
        with Stopwatch() as watch:
            done = self.llm.generate(prompt_token_ids=prompts, sampling_params=params)
        written = {len(generation.token_ids) for generation in done}
        if written != {new_tokens}:
            raise SystemExit(
                f"{new_tokens} tokens were asked of qwenrt, it wrote {written}: raise max_model_len."
            )
        return watch
