"""Arguments, exit codes, run, pull, doctor and bench."""

from __future__ import annotations

import importlib
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from qwenrt import __version__
from qwenrt.backends.cpu.kernels import LIBRARY
from qwenrt.cli import COMMANDS, build_parser, imports
from qwenrt.errors import CheckpointError
from tests.cli import fake_llm

Qwenrt = Callable[..., Any]
NAMES = sorted(build_parser()._subparsers._group_actions[0].choices)  # type: ignore[union-attr,arg-type]


def test_version_and_help(qwenrt: Qwenrt) -> None:
    assert qwenrt("--version").out == f"qwenrt {__version__}\n"
    done = qwenrt()
    assert done.code == 0
    assert all(name in done.out for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_help_has_an_example_and_fits(name: str, qwenrt: Qwenrt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    done = qwenrt(name, "--help")
    assert done.code == 0
    assert f"  qwenrt {name}" in done.out[done.out.index("example") :]
    assert max(map(len, done.out.splitlines())) <= 80


@pytest.mark.parametrize("argv", [["fly"], ["run"], ["bench"], ["chat", "--dtype", "int3"]])
def test_wrong_usage_exits_with_2(argv: list[str], qwenrt: Qwenrt) -> None:
    done = qwenrt(*argv)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("usage: qwenrt")


def test_a_typed_error_is_one_message(fake: SimpleNamespace, qwenrt: Qwenrt) -> None:
    done = qwenrt("run", "nowhere", "hello")
    assert done.code == 1
    assert done.err == "qwenrt: error: model 'nowhere': no such model. Known are: demo.\n"


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        ("chat <&-", 0, ""),
        ("run demo - <&-", 1, "qwenrt: error: the prompt: it is empty"),
        ("run demo hello >&-", 1, "qwenrt: error: stdout is closed"),
        ("chat <&- >&-", 1, "qwenrt: error: stdout is closed"),
        ("run nowhere-at-all hello --offline 2>&-", 1, ""),
    ],
)
def test_a_stream_that_the_shell_closed(command: str, code: int, said: str) -> None:
    line = f"'{sys.executable}' -m qwenrt {command}"
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=200)
    assert done.returncode == code
    assert done.stderr.startswith(said) and "Traceback" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("command", ["run demo hello", "run demo hello --json", "estimate demo"])
def test_a_full_disk_under_stdout_is_said_in_a_sentence(command: str) -> None:
    line = f"'{sys.executable}' -m qwenrt {command} > /dev/full"
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    said = "qwenrt: error: writing the result: No space left on device. Make room, or send it elsewhere.\n"
    assert done.stderr.endswith(said) and "Traceback" not in done.stderr


def test_the_parser_imports_nothing_heavy() -> None:
    code = (
        "import sys, qwenrt.cli; qwenrt.cli.build_parser()\n"
        "print([m for m in 'torch numpy rich prompt_toolkit tiktoken jinja2'.split() if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_every_command_module_is_listed() -> None:
    assert len(COMMANDS) == len(NAMES)


# ---- run


def test_run_streams_a_turn(fake: SimpleNamespace, qwenrt: Qwenrt) -> None:
    done = qwenrt("run", "demo", "hello", "--seed", "3", "--system", "S")
    assert (done.code, done.out) == (0, "echo hello (0 turns, seed 3, top_p 0.8)\n")
    assert fake.llm.calls[0]["system"] == "S"


def test_run_reads_stdin(fake: SimpleNamespace, qwenrt: Qwenrt) -> None:
    assert "echo two\nlines (0" in qwenrt("run", "demo", "-", stdin="two\r\nlines\n").out
    assert "echo piped (0" in qwenrt("run", "demo", stdin="piped").out


def test_run_json_is_a_generation(fake: SimpleNamespace, qwenrt: Qwenrt) -> None:
    found = json.loads(qwenrt("run", "demo", "你好", "--json").out)
    assert found["text"] == "reply to 你好"
    assert found["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 1,
        "cached_tokens": 0,
        "reasoning_tokens": 0,
    }
    assert found["finish_reason"] == "stop"


@pytest.mark.parametrize(("chat_format", "options"), [("raw", []), ("chatml", ["--raw"])])
def test_run_continues_a_prompt(
    chat_format: str, options: list[str], monkeypatch: pytest.MonkeyPatch, qwenrt: Qwenrt
) -> None:
    fake_llm.install(monkeypatch, chat_format)
    assert qwenrt("run", "demo", "Once", *options).out == "Once and so on\n"
    assert json.loads(qwenrt("run", "demo", "Once", "--json", *options).out)["text"] == "Once and so on"


@pytest.mark.parametrize("stdin", [b"", b" \n", b"\xff\xfe"])
def test_run_refuses_an_empty_or_unreadable_prompt(stdin: bytes, fake: Any, qwenrt: Qwenrt) -> None:
    done = qwenrt("run", "demo", "-", stdin=stdin)
    assert done.code == 1
    assert "the prompt" in done.err
    assert not fake.loaded, "found before the model was loaded"


def test_run_ctrl_c_exits_with_130(fake: SimpleNamespace, qwenrt: Qwenrt) -> None:
    done = qwenrt("run", "demo", "/interrupt")
    assert (done.code, done.err) == (130, "")
    assert fake.llm.closed


@pytest.mark.parametrize("command", ["run demo /slow", "chat"])
def test_a_reader_that_goes_away_ends_it_in_silence(command: str) -> None:
    line = [sys.executable, "-m", "tests.cli.fake_llm", *command.split()]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(line, **pipes) as process:
        assert process.stdin is not None
        process.stdin.write(b"/slow\n")
        process.stdin.flush()
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(4) == b"echo"
        process.stdout.close()
        assert process.wait(timeout=200) == 1
        assert process.stderr.read() == b""


# ---- pull


def test_pull_prints_the_directory(monkeypatch: pytest.MonkeyPatch, qwenrt: Qwenrt, tmp_path: Path) -> None:
    asked: list[Any] = []

    def resolve(name: str, **arguments: Any) -> Path:
        asked.append((name, arguments))
        if name == "gone":
            raise CheckpointError("model 'gone'", "404", "Check the name.")
        return tmp_path

    hub: Any = ModuleType("qwenrt.loader.hub.resolve")
    hub.resolve = resolve
    monkeypatch.setitem(sys.modules, "qwenrt.loader.hub.resolve", hub)
    done = qwenrt("pull", "Qwen-7B", "--source", "modelscope", "--revision", "v1")
    assert (done.code, done.out) == (0, f"{tmp_path}\n")
    assert asked == [("Qwen-7B", {"source": "modelscope", "revision": "v1", "offline": None, "newest": True})]
    found = json.loads(qwenrt("pull", "Qwen-7B", "--json").out)
    assert found == {"model": "Qwen-7B", "directory": str(tmp_path)}
    assert qwenrt("pull", "gone").err == "qwenrt: error: model 'gone': 404. Check the name.\n"


# ---- doctor


def test_doctor_json(qwenrt: Qwenrt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    done = qwenrt("doctor", "--json")
    found = json.loads(done.out)
    assert done.code == 0
    assert found["qwenrt"] == __version__
    assert found["torch"]["version"] and found["torch"]["build"] and found["torch"]["error"] is None
    assert set(found["packages"]) == {
        "torch",
        "numpy",
        "safetensors",
        "tiktoken",
        "huggingface-hub",
        "jinja2",
    }
    assert found["machine"]["cores_allowed"] >= 1 and found["machine"]["memory_total_bytes"] > 2**20
    assert {b["name"]: b["usable"] for b in found["backends"]}["cpu"] is True
    assert found["backend"]["name"] and found["backend"]["why"]
    assert isinstance(found["cpu_kernels"], str)
    assert found["environment"]["hf_token"] == "set" and "secret" not in done.out
    assert all(set(problem) == {"what", "fix"} for problem in found["problems"])


def test_doctor_text_fits_a_terminal(qwenrt: Qwenrt) -> None:
    done = qwenrt("doctor", "--device", "cpu")
    assert done.code == 0
    for word in (
        "qwenrt",
        "torch",
        "processor",
        "memory",
        "device cpu",
        "CPU kernels",
        "downloads",
        "runs on",
    ):
        assert f"\n{word}" in f"\n{done.out}"
    assert "it was asked for" in " ".join(done.out.split())
    assert max(map(len, done.out.splitlines())) <= 80


def test_doctor_says_why_a_device_cannot_serve(qwenrt: Qwenrt) -> None:
    done = qwenrt("doctor", "--device", "npu")
    assert done.code == 1
    assert "nothing here: torch_npu cannot be imported" in " ".join(done.out.split())
    assert "Available here: cpu" in " ".join(done.out.split())


def test_doctor_reports_a_torch_that_cannot_be_imported(
    qwenrt: Qwenrt, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setitem(sys.modules, "torch", None)  # makes `import torch` raise ImportError
        found = json.loads(qwenrt("doctor", "--json").out)
        done = qwenrt("doctor")
    assert "import of torch halted" in found["torch"]["error"]
    assert any("torch cannot be imported" in p["what"] and "torch" in p["fix"] for p in found["problems"])
    assert done.code == 1
    assert "runs on         nothing here: no torch" in done.out


def test_doctor_names_missing_packages_and_the_command(
    qwenrt: Qwenrt, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = ("rich", "modelscope-hub", "tiktoken")
    version = imports.installed
    monkeypatch.setattr(imports, "installed", lambda name: None if name in absent else version(name))
    text = " ".join(qwenrt("doctor").out.split())
    assert "optional: rich not installed" in text and 'pip install "qwenrt[cli]"' in text
    assert 'pip install "qwenrt[modelscope]"' in text
    assert "tiktoken is not installed. Fix: pip install tiktoken" in text


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ("off", "switched off (QWENRT_KERNELS=off)"),
        ("neon", "Use auto or scalar."),
        ("scalar", "portable kernels"),
    ],
)
def test_doctor_looks_at_the_kernels_that_were_chosen(
    qwenrt: Qwenrt, monkeypatch: pytest.MonkeyPatch, chosen: str, said: str
) -> None:
    if platform.machine() in ("aarch64", "arm64") or not LIBRARY.is_file():
        pytest.skip("needs csrc on an x86")
    monkeypatch.setenv("QWENRT_KERNELS", chosen)
    found = json.loads(qwenrt("doctor", "--json").out)
    assert said in found["cpu_kernels"]
    assert found["backend"]["name"] == (None if chosen == "neon" else "cpu")
    assert any("'neon'" in problem["what"] for problem in found["problems"]) == (chosen == "neon")


def test_doctor_reports_a_bad_setting(qwenrt: Qwenrt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWENRT_NUM_THREADS", "many")
    found = json.loads(qwenrt("doctor", "--json").out)
    assert {"what": "QWENRT_NUM_THREADS is 'many'", "fix": "Set a number of threads, 1 to 1024."} in found[
        "problems"
    ]


# ---- bench

FIGURES = (
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
    "weight_bytes_per_token",
    "read_bandwidth_bytes_per_s",
    "bandwidth_fraction",
    "load_s",
    "peak_rss_bytes",
)
SMALL = ("--prompt-tokens", "8", "--new-tokens", "4", "--rounds", "2")


@pytest.fixture
def small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("qwenrt.cli.bench"), "_READ_BYTES", 2**20)


@pytest.mark.usefixtures("small_buffer")
def test_bench_json(fake: SimpleNamespace, qwenrt: Qwenrt) -> None:
    done = qwenrt("bench", "--shape", "Qwen-1_8B", "--quantize", "int4", "--batch", "2", *SMALL, "--json")
    found = json.loads(done.out)
    assert done.code == 0
    assert all(found[name] > 0 for name in FIGURES) and found["activations"] == "int16"
    model, arguments = fake.loaded[0]
    assert (model, arguments["quantize"]) == ("Qwen-1_8B", "int4") and "source" not in arguments
    prompts = [p for call in fake.llm.calls for p in map(tuple, call["prompt_token_ids"])]
    assert len(set(prompts)) == len(prompts) == 2 * (1 + 2 * 2), "no prompt repeats, so none is in a cache"
    assert [call["params"].max_tokens for call in fake.llm.calls] == [2, 1, 5, 1, 5]
    assert all(call["params"].ignore_eos for call in fake.llm.calls)


@pytest.mark.usefixtures("small_buffer")
@pytest.mark.parametrize("model", [("demo",), ("--model", "demo")])
def test_bench_text_fits_a_terminal(model: tuple[str, ...], fake: SimpleNamespace, qwenrt: Qwenrt) -> None:
    done = qwenrt("bench", *model, *SMALL)
    assert done.code == 0
    for word in ("prefill", "decode", "memory speed", "used by decode", "peak memory", "versions"):
        assert f"\n{word}" in done.out
    assert max(map(len, done.out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--rounds", "0"), "--rounds: got 0. It must be at least 1."),
        (("--prompt-tokens", "-3"), "--prompt-tokens: got -3."),
        (("--prompt-tokens", "5000"), "this model's context is 4096 tokens"),
    ],
)
def test_bench_refuses(options: tuple[str, ...], said: str, fake: SimpleNamespace, qwenrt: Qwenrt) -> None:
    done = qwenrt("bench", "--model", "demo", *options)
    assert done.code == 1
    assert said in done.err


# ---- eval


def test_eval(monkeypatch: pytest.MonkeyPatch, qwenrt: Qwenrt) -> None:
    asked: list[Any] = []

    class Report:
        def format(self, failures: int) -> str:
            return f"95 %, {failures} shown"

        def to_dict(self) -> dict[str, Any]:
            return {"accuracy": 0.95, "perplexity": float("nan")}

    def evaluate_demo(model: str, **arguments: Any) -> Report:
        asked.append((model, arguments))
        return Report()

    module: Any = ModuleType("qwenrt.evaluate")
    module.evaluate_demo = evaluate_demo
    monkeypatch.setitem(sys.modules, "qwenrt.evaluate", module)
    assert qwenrt("eval", "demo", "--failures", "2").out == "95 %, 2 shown\n"
    assert json.loads(qwenrt("eval", "--json", "--quick", "--samples", "9", "--device", "cpu").out) == {
        "accuracy": 0.95,
        "perplexity": None,
    }
    assert [model for model, _ in asked] == ["demo", "demo"]
    assert [a["compare"] for _, a in asked] == [True, False]
    assert asked[1][1]["samples"] == 9 and asked[1][1]["device"] == "cpu"
