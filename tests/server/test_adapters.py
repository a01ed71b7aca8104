"""Adapters over HTTP: chosen by a request's model in every dialect, listed, and loaded by an administrator."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import qwenrt
from qwenrt.errors import ConfigError
from qwenrt.server import app
from qwenrt.server.keys import Key
from qwenrt.server.settings import ServeSettings
from tests.adapters import save_qwen1_adapter
from tests.server.asking import ask
from tests.server.test_app import ANSWER, DIALECTS, QUESTION
from tests.server.wire import Serving, serving

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
MODELS = "/v1/models"


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[qwenrt.LLM]:
    with qwenrt.load("demo", progress=False, max_model_len=2048) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, llm: qwenrt.LLM) -> Path:
    """With the adapters "law" and "tone", a file, a link, and an adapter beside it that is out of reach."""
    outside = tmp_path_factory.mktemp("served")
    inside = outside / "adapters"
    for seed, path in enumerate((inside / "law", inside / "tone", outside / "secret")):
        save_qwen1_adapter(path, llm.config, seed)
    (inside / "file").write_text("")
    (inside / "link").symlink_to(outside / "secret")
    (inside / "empty").mkdir()
    return inside


@pytest.fixture
def served(llm: qwenrt.LLM, directory: Path) -> Iterator[Serving]:
    llm.load_adapter(directory / "law")
    with serving(app(llm, ServeSettings(adapter_directory=directory))) as running:
        yield running
    for name in llm.adapters:
        llm.unload_adapter(name)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_model_of_a_request_chooses(served: Serving, llm: qwenrt.LLM, dialect: str) -> None:
    path, body, text_of = DIALECTS[dialect]
    wanted = llm.chat(QUESTION, adapter="law", temperature=0, max_tokens=10)[0]
    limits: dict[str, Any] = {"max_tokens": 10, "max_output_tokens": 10, "temperature": 0}
    options = {"options": {"num_predict": 10, "temperature": 0}}
    inside = {"parameters": {"max_tokens": 10, "temperature": 0.0, "top_k": 1}}
    asked = {
        **body,
        "model": "law",
        **{"ollama": options, "generate": options, "dashscope": inside}.get(dialect, {}),
    }
    if dialect in ("chat", "messages"):
        asked |= {"max_tokens": 10, "temperature": 0}
    elif dialect == "responses":
        asked |= {"max_output_tokens": limits["max_output_tokens"], "temperature": 0}
    status, _, answer = ask(served, path, asked)
    assert status == 200, answer
    assert text_of(answer).strip() == wanted != ANSWER
    if "model" in answer:
        assert answer["model"] == "law"
    for name in ("demo", "demo:latest"):  # as Ollama's clients may say it
        status, _, answer = ask(served, path, {**asked, "model": name})
        assert status == 200 and text_of(answer).strip() == ANSWER


def test_lists_have_them(served: Serving) -> None:
    models = ask(served, MODELS)[2]
    assert [model["id"] for model in models["data"]] == ["demo", "law"]
    assert [model["parent"] for model in models["data"]] == [None, "demo"]
    assert ask(served, f"{MODELS}/law")[2]["parent"] == "demo"
    assert [model["name"] for model in ask(served, "/api/tags")[2]["models"]] == ["demo", "law"]
    assert ask(served, "/api/show", {"model": "law:latest"})[0] == 200
    assert ask(served, "/server_info")[2]["adapters"] == ["law"]
    status, _, problem = ask(served, "/v1/completions", {"model": "other", "prompt": "x"})
    assert status == 404 and "Served: demo, law" in problem["error"]["message"]


def test_an_administrator_loads_and_unloads(served: Serving, llm: qwenrt.LLM) -> None:
    status, _, said = ask(served, LOAD, {"lora_name": "t", "lora_path": "tone"})
    assert (status, said) == (200, b"Success: adapter t is loaded.") and list(llm.adapters) == ["law", "t"]
    assert ask(served, LOAD, {"lora_name": "t", "lora_path": "tone"})[0] == 400  # the name is in use
    assert ask(served, UNLOAD, {"lora_name": "t"})[0] == 200 and list(llm.adapters) == ["law"]
    status, _, problem = ask(served, UNLOAD, {"lora_name": "t"})
    assert status == 404 and "Loaded: law" in problem["error"]["message"]
    assert ask(served, LOAD, {"lora_path": "tone"})[0] == 200 and list(llm.adapters) == ["law", "tone"]
    status, _, problem = ask(served, LOAD, {"lora_name": "demo", "lora_path": "tone"})
    assert status == 400 and "name of the model itself" in problem["error"]["message"]


@pytest.mark.parametrize(
    "path",
    ["../secret", "link", "file", "law/", "./law", ".", "..", "", "/etc", "none", "law\0", "LAW", "x" * 5000],
)
def test_nothing_outside_of_the_directory_can_be_named(served: Serving, llm: qwenrt.LLM, path: str) -> None:
    status, _, problem = ask(served, LOAD, {"lora_name": "t", "lora_path": path})
    assert status == 404 and "there is no adapter" in problem["error"]["message"]
    absolute = str(Path(llm.adapters["law"].path))
    assert ask(served, LOAD, {"lora_name": "t", "lora_path": absolute})[0] == 404
    assert list(llm.adapters) == ["law"]


def test_files_that_are_no_adapter_are_said_so(served: Serving) -> None:
    status, _, problem = ask(served, LOAD, {"lora_path": "empty"})
    assert status == 400 and "adapter_config.json" in problem["error"]["message"]
    for body in (b"{", {"lora_path": 3}, {}, []):
        assert ask(served, LOAD, body)[0] == 400


def test_only_keys_that_say_so_administer(llm: qwenrt.LLM, directory: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("boss priority=3 admin\nclient\n")
    keys.chmod(0o600)
    with serving(app(llm, ServeSettings(adapter_directory=directory, api_key_file=keys))) as served:
        for key, status in (("client", 403), ("boss", 200)):
            bearer = {"authorization": f"Bearer {key}"}
            assert ask(served, LOAD, {"lora_path": "tone"}, **bearer)[0] == status
            assert ask(served, UNLOAD, {"lora_name": "tone"}, **bearer)[0] == status
        assert ask(served, LOAD, {"lora_path": "tone"})[0] == 401
        described = ask(served, "/openapi.json", authorization="Bearer boss")[2]["paths"]
        assert {LOAD, UNLOAD} <= described.keys()
    assert Key.of("k", admin=True).admin and not Key.of("k").admin


def test_the_routes_are_off_by_default_and_never_open(llm: qwenrt.LLM, directory: Path) -> None:
    with serving(app(llm, ServeSettings())) as served:
        assert ask(served, LOAD, {"lora_path": "tone"})[0] == 404
    with pytest.raises(ConfigError, match="anybody could load and unload"):
        ServeSettings(host="0.0.0.0", i_know_this_is_open=True, adapter_directory=directory)
