"""Another program's name for an option is an error that says the right one, in Python and on the command line."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qwenrt
from qwenrt.errors import QwenrtError
from qwenrt.load_options import LoadOptions
from qwenrt.other_names import ATTRIBUTES, OPTIONS, UnknownName, advice_for_option
from qwenrt.sampling_params import SamplingChanges, SamplingParams
from qwenrt.server.settings import ServeSettings

ROOT = Path(__file__).parents[1]
SAMPLING = {field.name for field in dataclasses.fields(SamplingParams)}
LOADING = {field.name for field in dataclasses.fields(LoadOptions)}
SERVING = {field.name for field in dataclasses.fields(ServeSettings)}


def test_the_table_names_what_there_is() -> None:
    known = SAMPLING | LOADING | SERVING | {"sampling_params", "prompt_token_ids", "system"}
    assert {here.option for here in OPTIONS.values()} - {""} <= known
    for name, here in OPTIONS.items():
        assert here.option != name and here.in_python().endswith("."), name
        assert here.on_command_line().endswith("."), name


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_every_name_of_the_table_is_answered(name: str) -> None:
    for call, known in ((qwenrt.load, LOADING), (LoadOptions, LOADING), (SamplingParams, SAMPLING)):
        if name in known:
            continue
        with pytest.raises(UnknownName) as caught:
            call(**{name: 1})
        assert isinstance(caught.value, QwenrtError) and isinstance(caught.value, (ValueError, TypeError))
        assert name in str(caught.value) and caught.value.remedy == OPTIONS[name].in_python()
    if name not in SAMPLING:
        with pytest.raises(ValueError, match=f"sampling parameter '{name}': unknown"):
            SamplingParams().with_(**{name: 1})


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: qwenrt.load(torch_dtype="auto"), "load(torch_dtype=...): unknown. Use dtype."),
        (lambda: qwenrt.load(load_in_4bit=True), 'load(load_in_4bit=...): unknown. Use quantize="int4".'),
        (lambda: qwenrt.load(devise="cpu"), "load(devise=...): unknown. Did you mean device? Known are: "),
        (lambda: qwenrt.load(temperature=0), "It belongs to an answer: pass it to chat, stream or generate"),
        (lambda: LoadOptions(n_ctx=9), "LoadOptions(n_ctx=...): unknown. Use max_model_len."),
        (
            lambda: SamplingParams(max_new_tokens=9),
            "SamplingParams(max_new_tokens=...): unknown. Use max_tokens.",
        ),
        (
            lambda: SamplingParams().with_(do_sample=False),
            "'do_sample': unknown. Use temperature=0. That is do_sample=",
        ),
        (lambda: SamplingParams().with_(toppp=1), "unknown. Did you mean top_p? Known are: "),
        (lambda: SamplingParams().with_(device="cpu"), "It belongs to the model: pass it to qwenrt.load."),
    ],
)
def test_what_is_said(call: Callable[[], Any], said: str) -> None:
    with pytest.raises(UnknownName) as caught:
        call()
    assert said in str(caught.value)


@pytest.mark.parametrize("name", sorted(ATTRIBUTES))
def test_methods_and_classes_of_others(name: str) -> None:
    if name not in qwenrt.__all__:  # quantize is the model's own word too
        with pytest.raises(AttributeError, match=rf"module 'qwenrt' has no attribute '{name}'\. (Use|Leave)"):
            getattr(qwenrt, name)
    with pytest.raises(AttributeError, match=rf"LLM has no attribute '{name}'\. (Use|Leave)"):
        getattr(object.__new__(qwenrt.LLM), name)


@pytest.mark.parametrize("name", ["chat", "stream"])
@pytest.mark.parametrize("rest", [{}, {"history": None}])
def test_a_tokenizer_first_as_in_qwens_own_code(name: str, rest: dict[str, None]) -> None:
    method = getattr(object.__new__(qwenrt.LLM), name)
    with pytest.raises(UnknownName, match=r"the model has its tokenizer\.$") as caught:
        method(qwenrt.load_tokenizer("demo"), "你好", **rest)
    assert str(caught.value).startswith(f"{name}(tokenizer, ...): a tokenizer in the place of the question.")
    assert list(inspect.signature(method).parameters)[:3] == ["query", "history", "system"]


def test_any_other_attribute_is_as_ever() -> None:
    with pytest.raises(AttributeError, match=r"^LLM has no attribute 'nonsense'$"):
        _ = object.__new__(qwenrt.LLM).nonsense
    assert not hasattr(qwenrt, "__wrapped__") and not hasattr(object.__new__(qwenrt.LLM), "_no_such")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("run demo x --max-new-tokens 5", "--max-new-tokens: Use --max-tokens."),
        ("chat --load-in-4bit", "--load-in-4bit: Use --quantize int4."),
        ("chat -c DIR", "-c: The model comes first, without a name"),
        ("chat --cpu-only", "--cpu-only: Use --device cpu."),
        ("serve --server-port=80 --tensor-parallel-size 2", "--server-port=80: Use --port."),
        ("chat --local-files-only", "--local-files-only: Use --offline."),
    ],
)
def test_on_the_command_line(argv: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    from qwenrt.cli import build_parser

    with pytest.raises(SystemExit) as left:
        build_parser().parse_args(argv.split())
    assert left.value.code == 2
    told = capsys.readouterr().err
    assert said in told and "unrecognized arguments" in told


def test_an_option_that_nobody_has_gets_no_advice() -> None:
    assert advice_for_option("--made-up") is None and advice_for_option("-x") is None


def test_dtypes_of_torch_by_object_and_by_name() -> None:
    from qwenrt.cli import build_parser
    from qwenrt.cli.options import load_arguments

    for given in (torch.bfloat16, "torch.bfloat16", "bfloat16"):
        assert LoadOptions(dtype=given).dtype == "bfloat16"  # type: ignore[arg-type]
    for words in ("run m x --dtype torch.float16", "estimate demo --dtype torch.float16"):
        assert build_parser().parse_args(words.split()).dtype == "float16"
    assert (
        load_arguments(build_parser().parse_args(["chat", "--dtype", "torch.float32"]))["dtype"] == "float32"
    )
    with pytest.raises(QwenrtError, match="dtype='int7'"):
        LoadOptions(dtype="torch.int7")  # type: ignore[arg-type]


def test_keywords_of_an_answer_are_the_fields_of_sampling_params() -> None:
    types = {field.name: field.type for field in dataclasses.fields(SamplingParams)}
    assert {n: getattr(t, "__forward_arg__", t) for n, t in SamplingChanges.__annotations__.items()} == types


def test_wrapping_changes_no_signature() -> None:
    assert list(inspect.signature(SamplingParams).parameters) == [
        f.name for f in dataclasses.fields(SamplingParams)
    ]
    assert (ROOT / "qwenrt" / "py.typed").exists()
    assert re.match(r"Load a model", qwenrt.load.__doc__ or "")
