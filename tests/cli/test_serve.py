"""`qwenrt serve` before it serves: what is wrong is told in one sentence, and no model is loaded for it."""

from __future__ import annotations

import importlib.util
import os
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qwenrt.cli import serve
from qwenrt.load_options import LoadOptions
from qwenrt.loading import load, load_tokenizer
from qwenrt.server.settings import ServeSettings

pytest.importorskip("starlette")

Qwenrt = Callable[..., Any]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--port", "http"], "--port"),
        (["--max-body", "much"], "not a number of bytes"),
        (["--queue-timeout", "soon"], "not a time"),
        (["--made-up"], "--made-up"),
    ],
)
def test_an_option_that_is_none_exits_with_2(
    argv: list[str], said: str, fake: SimpleNamespace, qwenrt: Qwenrt
) -> None:
    done = qwenrt("serve", *argv)
    assert done.code == 2 and done.out == "" and said in done.err.splitlines()[-1]
    assert not fake.loaded


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--port", "70000"], "port=70000"),
        (["--max-queue", "-1"], "max_queue=-1"),
        (["--queue-timeout", "0"], "queue_timeout=0"),
        (["--host", "example.com"], "host='example.com'"),
        (["--allow-origin", "*"], "allow_origins='*'"),
        (["--allow-host", "*"], "allow_hosts='*'"),
        (["--served-model-name", ""], "served_model_names=''"),
        (["--api-key-file", "/nowhere/keys"], "keys"),
        (["--api-key-file", "~nobody-here/keys"], "there is no such home directory"),
        (["--host", "0.0.0.0"], "there is no API key"),
        (["--host", "::"], "there is no API key"),
        (["--host", "192.0.2.1", "--i-know-this-is-open"], "this machine has no such address"),
    ],
)
def test_what_cannot_be_served_is_one_sentence(
    argv: list[str], said: str, fake: SimpleNamespace, qwenrt: Qwenrt
) -> None:
    done = qwenrt("serve", *argv)
    assert done.code == 1 and done.out == "" and not fake.loaded
    assert done.err.startswith("qwenrt: error: ") and said in done.err
    assert done.err.count("\n") == 1 and "Traceback" not in done.err


def test_a_key_file_that_others_may_read_is_refused(
    fake: SimpleNamespace, qwenrt: Qwenrt, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("secret-key-that-is-long-enough\n")
    os.chmod(keys, 0o644)
    done = qwenrt("serve", "--host", "0.0.0.0", "--api-key-file", str(keys))
    assert done.code == 1 and done.err.count("\n") == 1 and "secret-key" not in done.err and not fake.loaded


def test_a_port_that_another_program_has(fake: SimpleNamespace, qwenrt: Qwenrt) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = qwenrt("serve", "--port", str(port))
    assert done.code == 1 and not fake.loaded
    assert done.err.startswith(
        f"qwenrt: error: listening at 127.0.0.1, port {port}: another program has this port."
    )
    assert done.err.count("\n") == 1


def test_packages_that_are_missing_are_named_with_the_command(
    fake: SimpleNamespace, qwenrt: Qwenrt, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "starlette" else find(name, *rest)
    )
    done = qwenrt("serve")
    assert done.code == 1 and not fake.loaded
    assert "starlette is not installed" in done.err and 'pip install "qwenrt[server]"' in done.err
    assert done.err.count("\n") == 1


def test_a_model_that_is_not_there_leaves_no_port_taken(fake: SimpleNamespace, qwenrt: Qwenrt) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    done = qwenrt("serve", "nowhere", "--port", str(port))
    assert done.code == 1 and "no such model" in done.err and done.err.count("\n") == 1
    with socket.socket() as again:
        again.bind(("127.0.0.1", port))


@pytest.mark.parametrize(("context", "warned"), [(8192, True), (32768, True), (65536, False)])
def test_what_is_said_at_the_start(context: int, warned: bool) -> None:
    blocks = {"max_model_len": context, "total_blocks": context, "block_size": 4}
    llm: Any = SimpleNamespace(
        stats=lambda: blocks,
        options=LoadOptions(max_num_seqs=16, progress=False),
        summary="one line",
        name="demo",
        tokenizer=load_tokenizer("demo"),
        has_tokenizer=True,
        adapters={"law": None},
    )
    said = serve._greeting(llm, ServeSettings(), "http://127.0.0.1:8000", "demo")
    assert "Adapters, asked for as the model: law." in said
    assert "Serving demo at http://127.0.0.1:8000" in said and "one line" in said and "toy" in said
    assert f"context of {context} tokens; 4 answers at once at full length, 16 shorter ones" in said
    assert ("they need a longer context" in said) is warned and "Other machines" not in said
    assert "Open http://127.0.0.1:8000/ in a browser" in said.splitlines()[1]
    llm.options = LoadOptions(max_num_seqs=16, progress=True)
    open_to_all = ServeSettings(host="0.0.0.0", api_keys=("sk-1",))
    said = serve._greeting(llm, open_to_all, serve._address("0.0.0.0", 8000), "demo")
    assert "one line" not in said, "it was told when the model was loaded"
    assert "0.0.0.0" not in said and "Other machines reach it at port 8000" in said and "YOUR-KEY" in said


def test_what_is_said_of_a_model_without_a_tokenizer(golden_dir: Path) -> None:
    with load(golden_dir / "plain", progress=False) as llm:
        said = serve._greeting(llm, ServeSettings(), "http://127.0.0.1:8000", "plain")
    assert said.splitlines()[-1].startswith("  It has no tokenizer file: ") and "Claude" not in said
