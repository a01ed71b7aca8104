"""The command line around a real (tiny, untrained) model: nothing is faked here."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwenrt.loading import load
from tests.cli.fake_llm import FakeLLM
from tests.cli.test_terminal import CTRL_C, ENTER, PROMPT, Talk
from tests.conftest import GOLDEN

Qwenrt = Callable[..., Any]


@pytest.fixture(scope="module")
def tiny_chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A golden checkpoint with a vocabulary of single bytes and ChatML: a chat model that babbles."""
    directory = tmp_path_factory.mktemp("tiny chat 模型")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / "ntk_logn" / name, directory)
    lines = [f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256)]
    (directory / "qwen.tiktoken").write_text("".join(lines), encoding="ascii")
    settings = {"chat_format": "chatml", "eos_token_id": 256, "max_new_tokens": 12, "top_p": 0.8}
    (directory / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return directory


def test_bench_on_a_golden(qwenrt: Qwenrt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwenrt.cli.bench._READ_BYTES", 2**20)
    options = "--prompt-tokens 20 --new-tokens 5 --rounds 1 --batch 2 --dtype float32 --json"
    done = qwenrt("bench", "--model", str(GOLDEN / "ntk_logn"), *options.split())
    found = json.loads(done.out)
    assert done.code == 0
    weights = 3 * (64 * 192 + 192 + 64 * 64 + 3 * 64 * 176 + 128) + 64 + 512 * 64  # all but the embedding
    assert found["weight_bytes_per_token"] == 4 * (weights + 64)
    for name in ("prefill_tokens_per_s", "decode_tokens_per_s", "bandwidth_fraction", "load_s"):
        assert found[name] > 0


def test_the_fake_has_what_the_real_model_has(tiny_chat: Path) -> None:
    fake = FakeLLM()
    with load(tiny_chat, progress=False) as real:
        for name in (name for name in dir(fake) if not name.startswith("_")):
            assert hasattr(real, name) or name in ("calls", "closed", "closed_streams"), name
        stats = real.stats()
        assert {name: type(value) for name, value in fake.stats().items()} == {
            name: type(stats[name]) for name in fake.stats()
        }
        assert type(fake.generation_config) is type(real.generation_config) and fake.device == real.device


def test_the_fake_takes_no_call_that_the_real_model_would_not() -> None:
    fake = FakeLLM()
    for call in (
        lambda: fake.chat(message=[]),
        lambda: fake.generate("a", tokens=[1], sampling=3, prompts=2),
    ):
        with pytest.raises(TypeError):
            call()


def test_run_repeats_with_a_seed(tiny_chat: Path, qwenrt: Qwenrt) -> None:
    first = qwenrt("run", str(tiny_chat), "hi", "--seed", "5")
    again = qwenrt("run", str(tiny_chat), "hi", "--seed", "5")
    assert first.code == 0 and first.out and first.out == again.out
    found = json.loads(qwenrt("run", str(tiny_chat), "hi", "--seed", "5", "--json").out)
    assert found["text"] == first.out.removesuffix("\n")
    assert len(found["token_ids"]) == found["usage"]["completion_tokens"] <= 12
    raw = json.loads(qwenrt("run", str(tiny_chat), "hi", "--seed", "5", "--json", "--raw").out)
    assert raw["usage"]["prompt_tokens"] == 2, "the bare prompt, without ChatML around it"
    assert qwenrt("run", str(tiny_chat), "hi", "--seed", "5", "--raw").out == raw["text"] + "\n"


def test_a_piped_conversation(tiny_chat: Path, qwenrt: Qwenrt, tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    lines = f"hello\nand you?\n:save {saved}\n"
    first = qwenrt("chat", str(tiny_chat), stdin=lines)
    again = qwenrt("chat", str(tiny_chat), stdin=lines)
    assert first.code == 0 and first.out == again.out
    assert [user for user, _ in json.loads(saved.read_text(encoding="utf-8"))["history"]] == [
        "hello",
        "and you?",
    ]


def test_pull_knows_a_directory(tiny_chat: Path, qwenrt: Qwenrt) -> None:
    assert qwenrt("pull", str(tiny_chat)).out == f"{tiny_chat}\n"


def test_ctrl_c_stops_the_real_engine(tiny_chat: Path) -> None:
    settings = ":conf max_tokens=100000 ignore_eos=True temperature=0"
    talk = Talk("chat", str(tiny_chat), "--max-model-len", "8000", module="qwenrt")
    try:
        talk.until(PROMPT)
        talk.type(settings + ENTER)
        talk.until("ignore_eos = True", PROMPT)
        talk.type("hello" + ENTER)
        talk.until("Qwen>")
        talk.type(CTRL_C)
        talk.until("topped", PROMPT)  # before or after its first word
        talk.type(":clh" + ENTER)
        talk.until("Forgot", PROMPT)
        talk.type(":conf max_tokens=3" + ENTER)
        talk.until("max_tokens = 3", PROMPT)
        talk.type("hello again" + ENTER)
        talk.until("was cut at max_tokens", PROMPT)
        talk.type(":his" + ENTER)
        talk.until("History (1)")
        talk.type(":q" + ENTER)
        assert talk.code() == 0
    finally:
        talk.close()


def test_finetune_then_run(tiny_chat: Path, qwenrt: Qwenrt, tmp_path: Path) -> None:
    data = tmp_path / "texts.jsonl"
    data.write_text(json.dumps({"text": "hi, yes"}), encoding="utf-8")
    out = tmp_path / "trained"
    options = "--epochs 2 --learning-rate 0.001 --batch-tokens 64 --max-length 32 --threads 1"
    done = qwenrt("finetune", str(tiny_chat), str(data), str(out), *options.split(), "--json")
    assert done.code == 0
    report = json.loads(done.out)
    assert (report["steps"], report["output_dir"]) == (2, str(out))
    assert qwenrt("run", str(out), "hi").code == 0


def test_finetune_explains_bad_data(tiny_chat: Path, qwenrt: Qwenrt, tmp_path: Path) -> None:
    done = qwenrt("finetune", str(tiny_chat), str(tmp_path / "none.jsonl"), str(tmp_path / "out"))
    assert done.code == 1
    assert done.err.startswith("qwenrt: error: training data") and "none.jsonl" in done.err
    done = qwenrt("finetune", str(tiny_chat), "x", str(tmp_path / "out"), "--epochs", "0")
    assert (done.code, "epochs=0" in done.err) == (1, True)
