"""A checkpoint quantised from end to end: what is written, that it is read again, and that a cut loses nothing."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import qwenrt
from qwenrt.cli import main
from qwenrt.errors import CheckpointError, ConfigError, QwenrtError, RequestError
from qwenrt.quantize import REPORT, QuantizeReport, quantize
from qwenrt.quantize.finished import PARTS, FinishedLayers, sample
from tests.model import tiny_models

DEMO = Path(qwenrt.__file__).parent / "demo"
TEXTS = [[(number * 37 + place * place * 11 + place) % 190 for place in range(48)] for number in range(24)]


def made(source: Path, target: Path, **settings: Any) -> QuantizeReport:
    return quantize(source, target, **{"calibration": TEXTS, "group_size": 32, "progress": False, **settings})


def logits(directory: Path, ids: list[int], **settings: Any) -> torch.Tensor:
    with tiny_models.load(directory, activations="exact", **settings) as llm:
        return llm.logits(ids)


def divergence(directory: Path, source: Path) -> float:
    """KL of a model from its source over texts that calibrated neither, in nats a token."""
    texts = [
        [(number * 53 + place * place * 7 + 3 * place) % 190 for place in range(60)] for number in range(5)
    ]
    logs = []
    for each in (source, directory):
        with tiny_models.load(each, activations="exact") as llm:
            logs.append(F.log_softmax(torch.cat([llm.logits(ids) for ids in texts]), -1))
    return float(F.kl_div(logs[1], logs[0], log_target=True, reduction="batchmean"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 whose sizes are multiples of 32, tied, with a file beside its weights."""
    directory = tmp_path_factory.mktemp("models") / "qwen3"
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_attention_heads": 4}
    tiny_models.build("Qwen3", {**sizes, "tie_word_embeddings": True, "initializer_range": 0.1}, directory)
    (directory / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    return directory


def test_the_result_is_complete_and_nearer_than_rounding(source: Path, tmp_path: Path) -> None:
    report = made(source, tmp_path / "int4")
    rounding = made(source, tmp_path / "rounded", method="rtn")
    directory = report.output_dir
    names = {file.name for file in directory.iterdir()}
    assert names >= {
        "config.json",
        "quantize_config.json",
        "model.safetensors",
        "chat_template.jinja",
        REPORT,
    }
    assert PARTS not in names
    assert not report.fallbacks and len(report.linears) == 3 * 4
    assert report.result_bytes < report.source_bytes / 2
    assert divergence(directory, source) < 0.8 * divergence(rounding.output_dir, source)
    assert report.divergence["result"] < 0.8 * report.divergence["rounded"]
    assert rounding.divergence["result"] == rounding.divergence["rounded"]
    assert "held out" in report.format()


def test_its_files_are_as_other_programs_want_them(source: Path, tmp_path: Path) -> None:
    made(source, tmp_path / "out", act_order="full", bits=8)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    module = "model.layers.0.self_attn.k_proj"
    kinds = {
        name.rpartition(".")[2]: tensor for name, tensor in tensors.items() if name.startswith(f"{module}.")
    }
    assert {kind: (t.dtype, tuple(t.shape)) for kind, t in kinds.items()} == {
        "qweight": (torch.int32, (16, 32)),
        "qzeros": (torch.int32, (2, 8)),
        "scales": (torch.float16, (2, 32)),
        "g_idx": (torch.int32, (64,)),
    }
    assert set(kinds["qzeros"].flatten().tolist()) == {0x7F7F7F7F}
    original = load_file(source / "model.safetensors")
    assert torch.equal(tensors["model.norm.weight"], original["model.norm.weight"])
    for name in ("config.json", "quantize_config.json"):
        about = json.loads((tmp_path / "out" / name).read_text())
        about = about.get("quantization_config", about)
        assert (about["quant_method"], about["bits"], about["desc_act"], about["sym"]) == (
            "gptq",
            8,
            True,
            True,
        )
    assert divergence(tmp_path / "out", source) < 1e-3


@pytest.mark.parametrize("kind", ["plain", "qwen3_5_moe", "qwen3_next", "Qwen3Moe"])
def test_every_generation(kind: str, golden_dir: Path, tmp_path: Path) -> None:
    """Fused, grouped and stacked linears, experts, delta nets; what the format cannot hold stays dense and is named."""
    if kind == "Qwen3Moe":
        directory = tmp_path / "source"
        sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_attention_heads": 4}
        experts = {**tiny_models.MOE, "moe_intermediate_size": 32}
        tiny_models.build(kind, {**sizes, **experts, "initializer_range": 0.1}, directory)
    else:
        directory = golden_dir / kind
    texts = [[token % 120 for token in text] for text in TEXTS]
    report = made(directory, tmp_path / "out", bits=8, calibration=texts)
    assert {linear.method for linear in report.linears} <= {"gptq", "rtn"} and len(report.linears) >= 3
    ids = texts[3]
    expected = logits(directory, ids)
    error, usual = (
        float((each - expected).norm())
        for each in (logits(tmp_path / "out", ids), logits(directory, ids, quantize="int8"))
    )
    assert error < 2 * usual
    with tiny_models.load(tmp_path / "out") as llm:
        assert "int8" in llm.explain()


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_run_that_is_cut_goes_on_to_the_same_bytes(
    method: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = made(source, tmp_path / "whole", method=method).output_dir
    write = FinishedLayers.write
    target = tmp_path / "cut"

    def cut_after(layer: int) -> Callable[..., None]:
        def written(self: FinishedLayers, index: int, *rest: Any) -> None:
            write(self, index, *rest)
            if index == layer:
                raise KeyboardInterrupt

        return written

    for layer in (0, 1):
        monkeypatch.setattr(FinishedLayers, "write", cut_after(layer))
        with pytest.raises(KeyboardInterrupt):
            made(source, target, method=method)
        assert (target / PARTS).is_dir()
        assert not (target / "config.json").exists()  # which nobody takes for a model
    monkeypatch.setattr(FinishedLayers, "write", write)
    made(source, target, method=method)
    for name in ("model.safetensors", "config.json"):
        assert (target / name).read_bytes() == (whole / name).read_bytes()


def test_layers_of_another_run_are_not_gone_on_with(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("qwenrt.quantize.write_directory", stop)
        with pytest.raises(KeyboardInterrupt):
            made(source, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"other settings.*resume=False"):
        made(source, tmp_path / "out", bits=8)
    with pytest.raises(CheckpointError, match="other calibration texts"):
        made(source, tmp_path / "out", calibration=TEXTS[::-1])
    layer = tmp_path / "out" / PARTS / "layer-00001.safetensors"
    layer.write_bytes(layer.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"layer-00001.*Delete it"):
        made(source, tmp_path / "out")
    made(source, tmp_path / "out", bits=8, resume=False)


@pytest.mark.parametrize("size", [1, 17, 2**24 + 3, 151936 * 896])
def test_the_fingerprint_takes_the_first_and_the_last_of_any_size(size: int) -> None:
    ends = torch.zeros(1).expand(size)  # takes no memory
    assert sample(ends).shape == (16,)
    if size < 2**20:
        assert sample(torch.arange(size))[[0, -1]].tolist() == [0, size - 1]


def test_a_second_process_waits_for_the_first(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / PARTS).mkdir(parents=True)
    with (tmp_path / "out" / PARTS / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="another process"):
            made(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"bits": 3}, r"bits=3.*Use 4 or 8"),
        ({"method": "hqq"}, r"method='hqq'.*Use gptq, awq or rtn"),
        ({"group_size": 48}, "group_size=48"),
        ({"damp": 0}, "damp=0"),
        ({"samples": True}, "samples=True"),
        ({"calibration": TEXTS[:4]}, "4 texts of at least 8 tokens"),
        ({"calibration": [[1, 2]] * 30}, "0 texts of at least 8 tokens"),
        ({"calibration": [[1] * 20, [2.5]] * 3}, "Token ids are integers"),
        ({"calibration": [[1] * 20, [200] * 20] * 9}, r"text 2 has the token 200.*vocabulary of 200"),
        ({"calibration": "nowhere.jsonl"}, "nowhere.jsonl"),
    ],
)
def test_what_makes_no_sense_is_said_at_once(
    source: Path, tmp_path: Path, settings: dict[str, Any], found: str
) -> None:
    with pytest.raises(RequestError, match=found):
        made(source, tmp_path / "out", **settings)


def test_directories_that_must_not_be_written_to(source: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="own directory"):
        made(source, source, overwrite=True)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RequestError, match="1 files already"):
        made(source, tmp_path)
    made(source, tmp_path, overwrite=True, method="rtn")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_what_is_quantised_already_is_refused(golden_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"quantised already.*dense checkpoint"):
        made(golden_dir / "gptq_int4", tmp_path / "out")


def test_constant_inputs_are_rounded(source: Path, tmp_path: Path) -> None:
    """Texts of one token alone: what the first layer sees has a Hessian of rank one."""
    report = made(source, tmp_path / "out", calibration=[[7] * 40] * 20)
    assert all(linear.error is not None and linear.error < 0.3 for linear in report.linears)
    logits(tmp_path / "out", TEXTS[0])


def test_few_texts_are_warned_of(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made(source, tmp_path / "out", calibration=[text[:12] for text in TEXTS[:6]])
    assert "calibrate linears of up to 96 inputs" in caplog.text


def test_the_built_in_model_writes_its_own_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--samples", "12", "--sample-length", "72", "--one-pass"]
    assert main(["quantize", "demo", str(tmp_path / "out"), *settings, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["divergence"]["result"] < report["divergence"]["rounded"]
    with qwenrt.load(tmp_path / "out", progress=False) as llm:
        assert llm.chat("What is the capital of France?")[0] == "The capital of France is Paris."


def test_what_the_model_wrote_is_kept_when_a_run_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []

    def write(*_: Any) -> list[list[int]]:
        written.append(1)
        return [[(number * 31 + place * 7) % 500 for place in range(32)] for number in range(8)]

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qwenrt.quantize.calibration.write_texts", write)
    settings: dict[str, Any] = {"method": "rtn", "progress": False}
    with monkeypatch.context() as patched:
        patched.setattr("qwenrt.quantize._check_ids", stop)
        with pytest.raises(KeyboardInterrupt):
            quantize(DEMO, tmp_path / "out", **settings)
        with pytest.raises(CheckpointError, match="other settings"):  # said before anything is written anew
            quantize(DEMO, tmp_path / "out", bits=8, **settings)
    assert written == [1]
    kept = quantize(DEMO, tmp_path / "out", **settings)
    assert written == [1] and kept.held_out_tokens > 0
    shutil.rmtree(tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr("qwenrt.quantize._check_ids", stop)
        with pytest.raises(KeyboardInterrupt):
            quantize(DEMO, tmp_path / "out", **settings)
    quantize(DEMO, tmp_path / "out", resume=False, **settings)
    assert written == [1, 1, 1]


def test_a_file_of_conversations_calibrates(tmp_path: Path) -> None:
    talk = {
        "conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hello! I am a toy."}]
    }
    lines = [json.dumps(talk), *(json.dumps({"text": "A wolf says howl. " * 9}) for _ in range(9))]
    (tmp_path / "talks.jsonl").write_text("\n".join(lines))
    (tmp_path / "story.txt").write_text("A sheep says baa. " * 60)
    for name in ("talks.jsonl", "story.txt"):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        quantize(
            DEMO,
            tmp_path / "out",
            calibration=tmp_path / name,
            method="rtn",
            sample_length=32,
            progress=False,
        )
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"messages": [{"role": "tool", "content": "x"}]}))
    with pytest.raises(QwenrtError, match=r"entry 1.*'tool'"):
        quantize(DEMO, tmp_path / "other", calibration=bad, progress=False)
