"""What all tests share: fixed seeds, one thread, no network, the recorded checkpoints."""

from __future__ import annotations

import base64
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
from safetensors.torch import save_file

from tests import kernel_sets
from tests.every_process.sitecustomize import REPORT

# What this machine has of models is no part of a test; children inherit it.
os.environ["HF_HUB_CACHE"] = os.environ["MODELSCOPE_CACHE"] = str(Path(__file__).parent / "no-such-directory")
_REPORT = tempfile.NamedTemporaryFile()  # noqa: SIM115 - as long as this process
os.environ[REPORT] = _REPORT.name
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, (str(Path(__file__).parent / "every_process"), os.environ.get("PYTHONPATH")))
)
GOLDEN = Path(__file__).parent / "golden"
DENSE_GOLDENS = ("plain", "ntk_only", "logn_only", "ntk_logn", "big_base")
GPTQ_GOLDENS = ("gptq_int4", "gptq_int8", "gptq_int4_act_order")

HYBRID_GOLDENS = ("qwen3_next", "qwen3_5", "qwen3_5_vl", "qwen3_5_moe")  # with layers of linear attention


class _TorchRandom:
    """torch's generator, which hypothesis resets before each example: a function of its arguments alone."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


_TORCH_RANDOM = _TorchRandom()  # hypothesis holds it weakly
hypothesis.register_random(_TORCH_RANDOM)
# What fixtures make for many tests is made before any of these: one thread for it too. Models this small gain nothing
# by a second one, and what runs beside (pytest -n) loses the core on which it spins.
torch.set_num_threads(1)
# The same examples in every run and on every machine; `--hypothesis-profile=search` looks for others.
UNTIMED = [hypothesis.HealthCheck.too_slow]  # on a machine that others use, small examples take long as well
hypothesis.settings.register_profile("same", derandomize=True, suppress_health_check=UNTIMED)
hypothesis.settings.register_profile("search", derandomize=False, suppress_health_check=UNTIMED)
hypothesis.settings.load_profile("same")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(kernel_sets.report())


@pytest.fixture(autouse=True)
def _same_every_time() -> Iterator[None]:
    """Seed, default dtype and thread count are reset around every test."""
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(1)


class Outward:
    """What a test, or a Python that it started, tried with other machines."""

    def told(self) -> list[str]:
        """Each of these tries; from now on they are known."""
        return _REPORT.read().decode().splitlines()


@pytest.fixture(autouse=True)
def outward(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Outward]:
    """A test that is not marked `network` reaches no other machine, nor does a Python that it starts."""
    if request.node.get_closest_marker("network"):
        monkeypatch.delenv(REPORT)
    watched = Outward()
    yield watched
    assert not watched.told()


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """The directory of tiny checkpoints with recorded logits and tokens."""
    return GOLDEN


def write_tiny_checkpoint(
    directory: Path, *, chat_format: str = "chatml", seed: int = 0, **config: object
) -> Path:
    """A random Qwen-1 directory with a tokenizer of single bytes: 464 real ids in 512 rows."""
    directory.mkdir(parents=True, exist_ok=True)
    values = {
        "model_type": "qwen",
        "vocab_size": 512,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "kv_channels": 16,
        "intermediate_size": 192,
        "seq_length": 64,
        "max_position_embeddings": 512,
    } | config
    (directory / "config.json").write_text(json.dumps(values))
    generation = {"chat_format": chat_format, "eos_token_id": 256, "pad_token_id": 256, "max_new_tokens": 16}
    (directory / "generation_config.json").write_text(json.dumps(generation))
    lines = [f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256)]
    (directory / "qwen.tiktoken").write_text("".join(lines))
    source = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=source) * 0.15

    d, i, v = values["hidden_size"], values["intermediate_size"] // 2, values["vocab_size"]
    tensors = {
        "transformer.wte.weight": normal(v, d),
        "transformer.ln_f.weight": torch.ones(d),
        "lm_head.weight": normal(v, d),
    }
    for n in range(values["num_hidden_layers"]):
        tensors |= {
            f"transformer.h.{n}.ln_1.weight": torch.ones(d),
            f"transformer.h.{n}.ln_2.weight": torch.ones(d),
            f"transformer.h.{n}.attn.c_attn.weight": normal(3 * d, d),
            f"transformer.h.{n}.attn.c_attn.bias": normal(3 * d),
            f"transformer.h.{n}.attn.c_proj.weight": normal(d, d),
            f"transformer.h.{n}.mlp.w1.weight": normal(i, d),
            f"transformer.h.{n}.mlp.w2.weight": normal(i, d),
            f"transformer.h.{n}.mlp.c_proj.weight": normal(d, i),
        }
    save_file(tensors, directory / "model.safetensors")
    return directory


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random chat checkpoint with a tokenizer."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "chat model 模型.v1")
