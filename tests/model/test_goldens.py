"""Recorded logits of tiny checkpoints: the network without a cache, dense and GPTQ."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qwenrt.backends.base import Backend
from qwenrt.config import read_model_config
from qwenrt.loader.weights import load_weights
from qwenrt.model.qwen import Qwen
from qwenrt.model.rotary import ntk_alpha
from qwenrt.ops.steps import StepPlan
from tests.conftest import DENSE_GOLDENS, GPTQ_GOLDENS, HYBRID_GOLDENS


def load(directory: Path) -> Qwen:
    config = read_model_config(directory)
    backend = Backend(torch.device("cpu"))
    model = Qwen(config, backend, torch.float32)
    load_weights(model, directory, config, backend, torch.float32, progress=False)
    model.bind()
    return model


@pytest.mark.parametrize("name", DENSE_GOLDENS + GPTQ_GOLDENS + HYBRID_GOLDENS)
@torch.inference_mode()
def test_logits_are_the_recorded_ones(golden_dir: Path, name: str) -> None:
    model = load(golden_dir / name)
    golden = load_file(golden_dir / name / "golden.safetensors")
    keys = sorted({key.rsplit(".", 1)[0] for key in golden if not key.startswith(("dequant.", "mtp."))})
    atol = 2e-4 if name in HYBRID_GOLDENS else 1e-4  # random delta nets amplify rounding a hundredfold
    assert keys
    for key in keys:
        prompt, new = golden[f"{key}.ids"].long(), golden[f"{key}.new_tokens"].long()
        ids = torch.cat((prompt, new))
        alpha = ntk_alpha(len(prompt), model.config)  # of the prompt alone, whatever it grows to
        logits = model.logits(model.forward(ids, StepPlan([len(ids)], [len(ids)]), [alpha]))
        steps = logits[len(prompt) - 1 :]
        torch.testing.assert_close(logits[: len(prompt)], golden[f"{key}.prefill_logits"], atol=atol, rtol=0)
        torch.testing.assert_close(steps, golden[f"{key}.step_logits"], atol=atol, rtol=0)
        assert steps[:-1].argmax(-1).tolist() == new.tolist()


def test_tokens_of_one_sequence_do_not_see_the_others(golden_dir: Path) -> None:
    model = load(golden_dir / "ntk_logn")
    lens = [5, 40, 0, 33]
    ids = torch.randint(0, 500, (sum(lens),))
    alphas = [ntk_alpha(max(n, 1), model.config) for n in lens]
    together = model.forward(ids, StepPlan(lens, lens), alphas)
    start = 0
    for n, alpha in zip(lens, alphas, strict=True):
        alone = model.forward(ids[start : start + n], StepPlan([n], [n]), [alpha])
        torch.testing.assert_close(together[start : start + n], alone, atol=1e-5, rtol=1e-5)
        start += n
