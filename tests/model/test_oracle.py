"""Every generation after Qwen-1 against transformers: tiny random models, logits to 1e-4 and greedy tokens exactly."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from qwenrt.sampling_params import SamplingParams
from tests.model.tiny_models import MOE, QWEN2_MOE, YARN, build, greedy, load

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen1.5, as many key heads as heads": ("Qwen2", {"num_key_value_heads": 6}),
    "qwen2": ("Qwen2", {}),
    "qwen2, tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2, a window on some layers": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "qwen2, a window that is switched off": (
        "Qwen2",
        {"use_sliding_window": False, "sliding_window": 7, "max_window_layers": 1},
    ),
    "qwen2.5, yarn": ("Qwen2", {"rope_parameters": YARN}),
    "qwen2.5, yarn without rounding, own factor": (
        "Qwen2",
        {
            "rope_parameters": {
                **YARN,
                "truncate": False,
                "attention_factor": 1.3,
                "beta_fast": 16,
                "beta_slow": 2,
            }
        },
    ),
    "qwen1.5 moe": ("Qwen2Moe", {**QWEN2_MOE, "num_key_value_heads": 6}),
    "qwen2 moe, dense layers between, normalised": (
        "Qwen2Moe",
        {**QWEN2_MOE, "decoder_sparse_step": 2, "norm_topk_prob": True},
    ),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3, tied, heads wider than the model": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3, biases": ("Qwen3", {"head_dim": 16, "attention_bias": True}),
    "qwen3, yarn and a window": (
        "Qwen3",
        {
            "head_dim": 16,
            "rope_parameters": YARN,
            "use_sliding_window": True,
            "sliding_window": 9,
            "max_window_layers": 1,
        },
    ),
    "qwen3 moe": ("Qwen3Moe", {**MOE, "head_dim": 16, "norm_topk_prob": True}),
    "qwen3 moe, one dense layer, not normalised": (
        "Qwen3Moe",
        {**MOE, "head_dim": 16, "mlp_only_layers": [1], "norm_topk_prob": False},
    ),
}
PROMPTS = [[5, 17, 3, 99, 42, 8, 120, 7, 64, 31, 2, 77], [11, 150, 3], list(range(20, 60)), [190]]
NEW_TOKENS = 12


@pytest.fixture(scope="module", params=list(MODELS), ids=lambda name: name.replace(" ", "_").replace(",", ""))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    kind, changes = MODELS[request.param]
    directory = tmp_path_factory.mktemp("model")
    oracle = build(kind, changes, directory)
    yield oracle, directory
    gc.collect()


def test_logits_and_greedy_tokens(pair: Any) -> None:
    """Prefill alone, then the cache, batched, in chunks of 5 tokens."""
    oracle, directory = pair
    with load(directory) as llm:
        for prompt in PROMPTS:
            with torch.no_grad():
                wanted = oracle(torch.tensor([prompt])).logits[0]
            assert float((llm.logits(prompt) - wanted).abs().max()) <= 1e-4
        wanted_tokens = [greedy(oracle, prompt, NEW_TOKENS) for prompt in PROMPTS]
        params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)
        batched = llm.generate(prompt_token_ids=PROMPTS, sampling_params=params)
        assert [g.token_ids for g in batched] == wanted_tokens
    with load(directory, max_num_batched_tokens=5, max_num_seqs=2) as llm:
        chunked = llm.generate(prompt_token_ids=PROMPTS, sampling_params=params)
        assert [g.token_ids for g in chunked] == wanted_tokens
