"""One list of options: LoadOptions, the signature and help of `qwenrt.load`, and the command line."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import qwenrt
from qwenrt.cli import build_parser
from qwenrt.cli.options import RUN_OPTIONS, SOURCE_OPTIONS, load_arguments
from qwenrt.errors import ConfigError
from qwenrt.load_options import ABOUT, CHOICES, LoadOptions
from tests.fuzz.values import Hostile

DEFAULTS = {field.name: field.default for field in dataclasses.fields(LoadOptions)}
# Options of Python alone: what a command does decides them.
SERVING = {"step_target_ms", "prefix_store", "prefix_store_bytes", "merge_system_messages", "max_adapters"}
NOT_ON_THE_COMMAND_LINE = {"max_num_seqs", "max_num_batched_tokens", "progress", "adapters", *SERVING}


def test_load_takes_every_option_with_its_type_and_default() -> None:
    parameters = dict(inspect.signature(qwenrt.load).parameters)
    assert parameters.pop("model").default == "demo"
    assert {name: p.default for name, p in parameters.items()} == DEFAULTS
    types = {field.name: field.type for field in dataclasses.fields(LoadOptions)}
    assert {name: p.annotation for name, p in parameters.items()} == types
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters.values())


def test_every_option_is_described() -> None:
    assert list(ABOUT) == list(DEFAULTS) and CHOICES.keys() < DEFAULTS.keys()
    described = inspect.getdoc(qwenrt.load) or ""
    assert all(f"{name}: {about}." in described for name, about in ABOUT.items())


def test_load_hands_on_every_option(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {
        "device": "cuda:1", "dtype": "bfloat16", "source": "modelscope", "revision": "v1", "offline": True,
        "quantize": "int4", "quantize_head": "int8", "kv_cache_dtype": "int8", "activations": "int16",
        "max_model_len": 64, "max_num_seqs": 2, "max_num_batched_tokens": 8, "fallback": "error", "progress": False,
        "packed_cache": Path("x"), "step_target_ms": 90, "prefix_store": Path("y"), "prefix_store_bytes": 2**30,
        "draft": "mtp", "draft_tokens": 3,
        "merge_system_messages": True, "adapters": {"a": "b"}, "max_adapters": 2,
    }  # fmt: skip
    assert given.keys() == DEFAULTS.keys() and all(given[name] != DEFAULTS[name] for name in given)
    taken: list[Any] = []
    monkeypatch.setattr("qwenrt.loading.load_with", lambda *arguments: taken.append(arguments))
    qwenrt.load("m", **given)
    assert taken == [("m", LoadOptions(**given))]


@pytest.mark.parametrize("command", ["chat", "run demo", "bench --model demo", "eval"])
def test_the_command_line_has_the_same_defaults(command: str) -> None:
    assert {*RUN_OPTIONS, *SOURCE_OPTIONS} == DEFAULTS.keys() - NOT_ON_THE_COMMAND_LINE
    assert LoadOptions(**load_arguments(build_parser().parse_args(command.split()))) == LoadOptions()


def test_the_command_line_gives_each_option() -> None:
    words = "run m x --device cpu --dtype bfloat16 --quantize int4 --quantize-head int8 --kv-cache-dtype int8"
    words += " --activations exact --max-model-len 64 --fallback error --packed-cache --source modelscope"
    words += " --revision v1 --offline --draft mtp --draft-tokens 2"
    assert LoadOptions(**load_arguments(build_parser().parse_args(words.split()))) == LoadOptions(
        device="cpu", dtype="bfloat16", quantize="int4", quantize_head="int8", kv_cache_dtype="int8",
        activations="exact", max_model_len=64, fallback="error", packed_cache=True, source="modelscope", revision="v1",
        offline=True, draft="mtp", draft_tokens=2,
    )  # fmt: skip
    named = build_parser().parse_args(["run", "m", "x", "--packed-cache", "here"])
    assert LoadOptions(**load_arguments(named)).packed_cache == "here"


def test_an_estimate_has_the_same_choices() -> None:
    asked = build_parser().parse_args(["estimate", "demo"])
    assert (asked.device, asked.dtype, asked.kv, asked.quantize) == ("auto", "auto", "auto", "none")
    for option in ("--kv", "--kv-cache-dtype"):
        assert build_parser().parse_args(["estimate", "demo", option, "int8"]).kv == "int8"


def test_the_options_of_finetune_are_its_settings() -> None:
    """Of a room that needs torch, so that the command line names them again: names, choices and defaults are
    compared."""
    from qwenrt.cli.finetuning import _LORA, _SETTINGS, _SWITCHES
    from qwenrt.finetune import finetune
    from qwenrt.finetune.lora import LoraSettings
    from qwenrt.finetune.settings import TrainingSettings
    from qwenrt.text.chat.training_form import FormSettings

    classes = (TrainingSettings, FormSettings, LoraSettings)
    known = {field.name: field for one in classes for field in dataclasses.fields(one)}
    types = {name: kind for one in classes for name, kind in typing.get_type_hints(one).items()}
    assert {name: types[name] for name in _SWITCHES} == dict.fromkeys(_SWITCHES, bool)
    signature = inspect.signature(finetune).parameters
    for name, (kind, choices, default, _) in (_SETTINGS | _LORA).items():
        if name not in known:
            assert signature[name].annotation.removesuffix(" | None") == kind.__name__
            continue
        own = known[name].default
        assert own is None or kind(default) == own
        args = typing.get_args(types[name])
        if choices is not None:
            assert choices == tuple(
                w for arg in args for w in ([arg] if isinstance(arg, str) else typing.get_args(arg))
            )
        assert kind is str or kind in (types[name], *args)


def test_values_of_other_libraries_become_pythons_own() -> None:
    options = LoadOptions(
        dtype=torch.bfloat16,  # type: ignore[arg-type]
        device=torch.device("cuda", 1),  # type: ignore[arg-type]
        max_model_len=np.int64(64),  # type: ignore[arg-type]
        offline=np.bool_(True),  # type: ignore[arg-type]
    )
    assert options == LoadOptions(dtype="bfloat16", device="cuda:1", max_model_len=64, offline=True)
    assert type(options.max_model_len) is int and type(options.offline) is bool


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_value_that_an_option_cannot_have_is_refused_by_its_name(name: str) -> None:
    values: list[Any] = [np.float32, np.array(["int8", "int4"]), torch.ones(2), Hostile(), 0.5, b"auto", [1]]
    if DEFAULTS[name] is not None:
        values.append(None)
    if name not in ("max_model_len", "max_num_seqs", "max_num_batched_tokens"):
        values.append(10**5000)
    for value in values:
        with pytest.raises(ConfigError, match=rf"^{name}[=:].*(Use|must be) "):
            LoadOptions(**{name: value})


def test_what_would_have_been_right_is_said() -> None:
    with pytest.raises(ConfigError) as caught:
        LoadOptions(quantize="int3")
    assert str(caught.value) == "quantize='int3': unknown. Use one of None, 'int8', 'int4'."
    with pytest.raises(ConfigError, match=r"max_num_seqs=0: not a usable number. Use an integer from 1 to"):
        LoadOptions(max_num_seqs=0)
    with pytest.raises(TypeError, match="max_tokens"):
        LoadOptions(max_tokens=5)  # type: ignore[call-arg]
