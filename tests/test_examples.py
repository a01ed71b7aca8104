"""Every example runs as a user would run it, on the built-in model, and says what it should."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SAYS = {
    "quickstart.py": ["Paris"],
    "base_completion.py": ["乌兰巴托", "tokens]"],
    "batch.py": ["Tokyo", "7", "巴黎"],
    "system_prompt.py": ["Rome"],
    "tool_use.py": ["calls get_weather", "Paris", "21"],
}


def test_every_example_is_tested() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*SAYS, "fastapi_app.py", "finetune_capitals.py"}


@pytest.mark.parametrize("name", sorted(SAYS))
def test_example(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "utf8", str(EXAMPLES / name)], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    for words in SAYS[name]:
        assert words in done.stdout, f"{words!r} is not in:\n{done.stdout}"


def test_capitals_in_another_form(tmp_path: Path) -> None:
    words = [sys.executable, str(EXAMPLES / "finetune_capitals.py"), str(tmp_path / "data"), "--form", "json"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200)
    assert "train.jsonl: 105 conversations" in done.stdout, done.stderr
    held_out = (tmp_path / "data" / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(held_out) == 36 and "capital" in json.loads(held_out[0])["messages"][1]["content"]


def test_the_app_streams_and_refuses() -> None:
    pytest.importorskip("fastapi")
    import httpx

    spec = importlib.util.spec_from_file_location("fastapi_app", EXAMPLES / "fastapi_app.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    sys.modules["fastapi_app"] = example  # where pydantic looks for names
    spec.loader.exec_module(example)
    asked = {"messages": [{"role": "user", "content": "What is the capital of France?"}]}

    async def main() -> None:
        transport = httpx.ASGITransport(example.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://app") as client:
            whole = (await client.post("/chat", json={**asked, "stream": False})).json()
            assert "Paris" in whole["message"]["content"]
            reply = await client.post("/chat", json=asked)
            pieces = [json.loads(line[6:]) for line in reply.text.splitlines() if line]
            assert "".join(piece["text"] for piece in pieces) == whole["message"]["content"]
            assert pieces[-1]["finish_reason"] == "stop"
            refused = await client.post("/chat", json={"messages": []})
            assert refused.status_code == 400 and "user message" in refused.text

    try:
        asyncio.run(main())
    finally:
        example.llm.close()
        del sys.modules["fastapi_app"]
