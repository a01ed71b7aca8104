"""Adapters by the public face: loaded from files, asked for by name, listed, let go."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import qwenrt
from qwenrt.cli import build_parser, main
from qwenrt.cli.options import first_adapter
from qwenrt.errors import CheckpointError, ConfigError, RequestError
from tests.adapters import save_qwen1_adapter

QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the adapters "law" and "tone" for the built-in model."""
    directory = tmp_path_factory.mktemp("adapters")
    with qwenrt.load("demo", progress=False) as llm:
        for seed, name in enumerate(("law", "tone")):
            save_qwen1_adapter(directory / name, llm.config, seed)
    return directory


@pytest.fixture(scope="module")
def llm(files: Path) -> Iterator[qwenrt.LLM]:
    with qwenrt.load("demo", progress=False, adapters={"law": files / "law"}) as loaded:
        assert loaded.load_adapter(files / "tone") == "tone"
        yield loaded


def test_each_way_of_asking_takes_an_adapter(llm: qwenrt.LLM) -> None:
    plain, by_law = (
        llm.chat(QUESTION, adapter=name, temperature=0, max_tokens=8)[0] for name in (None, "law")
    )
    assert plain == ANSWER != by_law
    asked = {"adapter": "law", "temperature": 0, "max_tokens": 8}
    assert "".join(delta.text for delta in llm.stream(QUESTION, **asked)).strip() == by_law  # type: ignore[arg-type]
    text, _ = asyncio.run(llm.achat(QUESTION, **asked))  # type: ignore[arg-type]
    assert text == by_law
    ids = llm.tokenizer.encode("The capital of")
    wanted = [int(llm.logits(ids, adapter=name)[-1].argmax()) for name in (None, "law", "tone")]
    assert len(set(wanted)) == 3
    got = [
        llm.generate(prompt_token_ids=ids, adapter=n, temperature=0, max_tokens=1)
        for n in (None, "law", "tone")
    ]
    assert [one.token_ids[0] for one in got] == wanted
    many = asyncio.run(
        llm.agenerate(prompt_token_ids=[ids, ids], adapter="tone", temperature=0, max_tokens=1)
    )
    assert [one.token_ids[0] for one in many] == [wanted[2]] * 2


def test_what_is_loaded_is_listed(llm: qwenrt.LLM, files: Path) -> None:
    info = llm.adapters["law"]
    assert list(llm.adapters) == ["law", "tone"] and info.rank == 4 and info.path == files / "law"
    explained = llm.explain()
    assert "adapter law: rank 4; changes c_attn; digest" in explained and " requests" in explained


def test_a_name_that_is_none_of_them(llm: qwenrt.LLM, files: Path) -> None:
    for name in ("Law", str(files / "law"), "../law"):
        with pytest.raises(RequestError, match="loaded: 'law', 'tone'"):
            llm.chat(QUESTION, adapter=name)
    with pytest.raises(RequestError, match="adapter of this name is loaded"):
        llm.load_adapter(files / "law")
    with pytest.raises(RequestError, match="got int"):
        llm.load_adapter(3)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="no such directory"):
        llm.load_adapter(files / "none")
    assert list(llm.adapters) == ["law", "tone"]


def test_the_base_keeps_its_bits_beside_adapters(llm: qwenrt.LLM) -> None:
    ids = llm.tokenizer.encode("the quick brown fox")
    before = llm.logits(ids)
    alone = llm.chat(QUESTION, temperature=0)[0]
    handles = [
        llm.submit(llm.prepare(QUESTION, adapter=name, temperature=0, max_tokens=12))
        for name in ("law", None, "tone", None)
    ]
    texts = ["".join(delta.text for delta in handle).strip() for handle in handles]
    assert texts[1] == texts[3] == alone == ANSWER
    assert torch.equal(llm.logits(ids), before)


def test_unloaded_and_loaded_again(llm: qwenrt.LLM, files: Path) -> None:
    asked = {"temperature": 0, "max_tokens": 6}
    first = llm.chat(QUESTION, adapter="tone", **asked)[0]  # type: ignore[arg-type]
    llm.unload_adapter("tone")
    with pytest.raises(RequestError, match="loaded: 'law'"):
        llm.chat(QUESTION, adapter="tone")
    llm.load_adapter(files / "law", "tone")  # another one under the old name
    assert (
        llm.chat(QUESTION, adapter="tone", **asked)[0]
        == llm.chat(QUESTION, adapter="law", **asked)[0]
        != first
    )  # type: ignore[arg-type]
    llm.unload_adapter("tone")
    llm.load_adapter(files / "tone")


def test_an_adapter_that_cannot_be_loaded_leaves_no_model(files: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        qwenrt.load("demo", progress=False, adapters={"x": files / "x"})
    for wrong in ({3: "x"}, ["law"], "law"):
        with pytest.raises(ConfigError, match=r"must be \{name: directory"):
            qwenrt.load("demo", adapters=wrong)  # type: ignore[arg-type]


def test_the_command_line_names_adapters(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("chat demo", "run demo hello", "serve demo"):
        named = ["--adapter", f"a={files / 'law'}", "--adapter", str(files / "tone")]
        given = build_parser().parse_args([*command.split(), *named])
        assert given.adapters == [("a", str(files / "law")), ("tone", str(files / "tone"))]
        assert first_adapter(given) == "a"
    assert first_adapter(argparse.Namespace(adapters=[])) is None
    limits = ["--temperature", "0", "--max-tokens", "8"]
    assert main(["run", "demo", QUESTION, "--adapter", f"a={files / 'law'}", *limits]) == 0
    assert ANSWER not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        build_parser().parse_args(["run", "demo", "--adapter", "=x"])
