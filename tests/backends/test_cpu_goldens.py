"""The recorded logits and tokens, through the CPU's own kernels: one token at a time, and all at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qwenrt.backends.cpu import CPUBackend
from qwenrt.config import Environment, read_model_config
from qwenrt.load_options import LoadOptions
from qwenrt.loader.weights import load_weights
from qwenrt.loading import load_with
from qwenrt.model.qwen import Qwen
from qwenrt.model.rotary import ntk_alpha
from qwenrt.ops.types import Packed
from tests.conftest import GPTQ_GOLDENS
from tests.kernel_sets import SETS, needs_kernels
from tests.steps import run_step

pytestmark = needs_kernels
BLOCK_SIZE = 16


@pytest.fixture(params=SETS)
def cpu(request: pytest.FixtureRequest) -> CPUBackend:
    """The backend with the kernels of each instruction set."""
    backend = CPUBackend(torch.device("cpu"))
    backend.configure(request.param)
    return backend


@pytest.mark.parametrize("name", GPTQ_GOLDENS)
@torch.inference_mode()
def test_recorded_logits_hold_through_the_kernels(golden_dir: Path, name: str, cpu: CPUBackend) -> None:
    config = read_model_config(golden_dir / name)
    model = Qwen(config, cpu, torch.float32)
    load_weights(model, golden_dir / name, config, cpu, torch.float32, progress=False)
    model.bind()
    assert config.quant is not None
    for weight, kind in (("layers.0.qkv_proj", f"w{config.quant.bits}a16-rows8"), ("lm_head", "dense16")):
        packed = model.get(weight)
        assert isinstance(packed, Packed) and packed.kind == kind
    assert all(b.native for b in cpu.bindings if b.op == "linear")
    golden = load_file(golden_dir / name / "golden.safetensors")
    prompt, new = golden["0.ids"].long(), golden["0.new_tokens"].long()
    total = len(prompt) + len(new)
    table = [list(range(-(-total // BLOCK_SIZE)))]
    kv = cpu.alloc_kv(
        config.num_layers,
        len(table[0]),
        BLOCK_SIZE,
        config.num_kv_heads,
        config.head_dim,
        torch.float32,
        False,
    )
    alpha = ntk_alpha(len(prompt), config)
    logits, done = [], 0
    for ids in (prompt, *new.split(1)):
        done += len(ids)
        logits.append(run_step(model, kv, ids.tolist(), [len(ids)], [done], table, [alpha]).logits)
    torch.testing.assert_close(logits[0], golden["0.prefill_logits"], atol=1e-4, rtol=0)
    steps = torch.cat([logits[0][-1:], *logits[1:]])
    torch.testing.assert_close(steps, golden["0.step_logits"], atol=1e-4, rtol=0)
    assert steps[:-1].argmax(-1).tolist() == new.tolist()


def test_an_answer_is_the_same_bits_however_a_long_prompt_was_cut() -> None:
    """With rounded activations and an int8 cache, where each last bit would show."""
    answers = []
    for budget in (512, 290, 100):  # 300 tokens whole, and 268 + 32, 100 + 100 + 68 + 32
        options = LoadOptions(
            device="cpu",
            dtype="float32",
            quantize="int4",
            quantize_head="int4",
            kv_cache_dtype="int8",
            activations="int16",
            max_num_batched_tokens=budget,
            progress=False,
        )
        with load_with("demo", options, Environment.read({})) as llm:
            out = llm.generate(
                prompt_token_ids=list(range(300, 600)), max_tokens=2, temperature=0, logprobs=5
            )
            answers.append((out.token_ids, out.logprobs))
    assert all(answer == answers[0] for answer in answers)
