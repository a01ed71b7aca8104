"""qwenrt.load(..., device="npu") from end to end on the soft device, graphs and their updates included."""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

import qwenrt
from qwenrt import assembly
from qwenrt.backends import registry
from qwenrt.backends.ascend import calls, fused
from qwenrt.backends.ascend.graphs import _Captured
from qwenrt.engine.failures import typed
from qwenrt.errors import BackendError, CapacityError, QwenrtError
from qwenrt.loading import load_random
from qwenrt.ops.steps import LayerKV, StepPlan
from tests.npu.operators import OPERATORS
from tests.npu.wheel.soft import Soft, SoftGraph

GOLDEN = Path(__file__).parents[2] / "golden"
LAYERS = json.loads(Path(__file__).with_name("layers.json").read_text(encoding="utf-8"))
GREEDY = qwenrt.SamplingParams(max_tokens=10, temperature=0, ignore_eos=True)


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the self-check, which takes most of a load on a CPU and has a test of its own."""
    monkeypatch.setattr(assembly, "_selfcheck", lambda *given: None)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[_Captured]:
    """What is captured."""
    captured: list[_Captured] = []
    init = _Captured.__init__

    def noted(self: _Captured, *given: Any) -> None:
        init(self, *given)
        captured.append(self)

    monkeypatch.setattr(_Captured, "__init__", noted)
    return captured


@pytest.mark.parametrize("model", ["gptq_int4", "plain", "logn_only", "gptq_int8", "gptq_int4_act_order"])
def test_recorded_models_give_the_tokens_of_the_cpu(model: str, unchecked: None, family: str) -> None:
    prompts = [list(range(5, 40)), list(range(100, 108)), [7]]
    with qwenrt.load(
        str(GOLDEN / model), device="npu", dtype="float16", max_model_len=256, progress=False
    ) as npu:
        got = [answer.token_ids for answer in npu.generate(prompt_token_ids=prompts, sampling_params=GREEDY)]
        told = npu.explain()
    with qwenrt.load(str(GOLDEN / model), device="cpu", max_model_len=256, progress=False) as cpu:
        for prompt, answer in zip(prompts, got, strict=True):
            logits = cpu.logits([*prompt, *answer[:-1]])[len(prompt) - 1 :]
            chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
            assert float((logits.amax(1) - chosen).max()) < 0.02  # the likeliest, or as likely within float16
    assert ("captured in" in told) == (family in ("A2", "A3"))
    assert not [line for line in told.splitlines() if line.startswith("attention") and "plain" in line]


def test_an_int8_cache_is_read_by_fused_attention(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """Its own check at load and the self-check included; graphs are told lengths as over numbers."""
    if family not in ("A2", "A3"):
        pytest.skip("the definition reads it there")
    before, dtypes, attend = len(Soft.log), set(), fused.decode_attention

    def noted(q: torch.Tensor, kv: LayerKV, *others: Any) -> torch.Tensor:
        dtypes.add(kv.k.dtype)
        return attend(q, kv, *others)

    monkeypatch.setattr(fused, "decode_attention", noted)
    with qwenrt.load("demo", device="npu", kv_cache_dtype="int8", max_model_len=512, progress=False) as llm:
        answer, _ = llm.chat("What is the capital of France?", temperature=0)
        told = " ".join(llm.explain().split())
    assert "Paris" in answer and "self-check" not in told and torch.int8 in dtypes
    assert "npu::npu_fused_infer_attention_score" in Soft.log[before:]


def test_the_demo_is_loaded_with_every_check_and_answers(family: str) -> None:
    with qwenrt.load("demo", device="npu", max_model_len=512, progress=False) as llm:
        answer, _ = llm.chat("What is the capital of France?", temperature=0)
        drawn, _ = llm.chat("What is the capital of France?", temperature=0.2, seed=1)
        lines = [line for line in llm.explain().splitlines() if "self-check" in line]
    assert "Paris" in answer and "Paris" in drawn and lines == []
    gc.collect()
    assert torch.get_device_module("npu").memory_allocated() < 8 << 20  # what is closed is given back


def test_replays_are_told_the_lengths_of_each_step(
    unchecked: None, graphs: list[_Captured], family: str
) -> None:
    if family not in ("A2", "A3"):
        pytest.skip("nothing is captured there")
    options = {"device": "npu", "dtype": "float16", "max_model_len": 256, "max_num_seqs": 4}
    with qwenrt.load(str(GOLDEN / "plain"), progress=False, **options) as llm:
        llm.generate(prompt_token_ids=[[5, 6, 7], list(range(9, 139))], sampling_params=GREEDY)
        alone = [
            llm.generate(prompt_token_ids=[ids], sampling_params=GREEDY)[0].token_ids
            for ids in ([5, 6, 7], list(range(9, 139)))
        ]
        both = llm.generate(prompt_token_ids=[[5, 6, 7], list(range(9, 139))], sampling_params=GREEDY)
        assert re.search(
            r"to tell them lengths takes the host \d+\.\d\d ms a step", " ".join(llm.explain().split())
        )
    assert [answer.token_ids for answer in both] == alone
    updates = [graph._graph.updates for graph in graphs if isinstance(graph._graph, SoftGraph)]
    of_two = next(lengths for lengths in updates if lengths and len(lengths[0]) == 2)
    steps = [after[0] - before[0] for before, after in pairwise(of_two)]
    assert steps.count(1) >= 7 and all(step in (1, -9, -8) for step in steps)
    assert {length for lengths in of_two for length in lengths} >= {5, 132}


def test_what_one_layer_launches(unchecked: None, family: str) -> None:
    with qwenrt.load(
        str(GOLDEN / "gptq_int4"), device="npu", dtype="float16", max_model_len=256, progress=False
    ) as llm:
        model = llm._alive().model
        cache = model.backend.alloc_cache(
            model.config,
            model.dtype,
            num_blocks=4,
            block_size=model.backend.block_size,
            num_states=0,
            quantized=False,
        )
        slots = model.backend.send([3, model.backend.block_size + 1])
        plan = StepPlan([1, 1], [4, 2], slots, [[0], [1]])
        rotary = model.rotary(plan, [1, 1])
        x = model.embed(model.backend.send([5, 6]))
        x = model.layers[0].forward(x, rotary, plan, cache[0])
        first = len(Soft.log)
        model.layers[1].forward(x, rotary, plan, cache[1])
        launched = Soft.log[first:]
    assert launched == LAYERS[family]


# ---- faults


def test_a_missing_operator_is_served_by_its_definition_and_named(
    unchecked: None, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    monkeypatch.setitem(calls.CALLS, "npu_rms_norm", calls.Call(("Tensor",) * 2, {"new": "int"}, 2))
    with qwenrt.load(
        str(GOLDEN / "plain"), device="npu", dtype="float16", max_model_len=256, progress=False
    ) as llm:
        assert "npu_rms_norm of this torch_npu has no argument new" in " ".join(llm.explain().split())
        assert len(llm.generate(prompt_token_ids=[5, 6], sampling_params=GREEDY).token_ids) == 10


def test_an_operator_that_answers_wrongly_is_not_used(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    right = OPERATORS["npu_rms_norm"]
    monkeypatch.setitem(
        Soft.broken, "npu_rms_norm", lambda x, gamma, **named: right(x, torch.ones_like(gamma), **named)
    )
    with qwenrt.load("demo", device="npu", max_model_len=256, progress=False) as llm:
        assert "Paris" in llm.chat("What is the capital of France?", temperature=0)[0]
        assert "self-check: differs" in " ".join(llm.explain().split())


@pytest.mark.parametrize(
    ("said", "kind", "what"),
    [
        (
            "ERR02200 DIST call hccl api failed: 507015 aicore exception",
            BackendError,
            "ASCEND_LAUNCH_BLOCKING=1",
        ),
        (
            "ACL stream synchronize failed, error code:507054 HBM MULTI BIT ECC ERROR",
            BackendError,
            "npu-smi info",
        ),
        ("synchronize failed, error code:507010 lost heartbeat", BackendError, "ASCEND_RT_VISIBLE_DEVICES"),
        (
            "NPU out of memory. Tried to allocate 4.00 GiB (NPU 0; 64 GiB total)",
            CapacityError,
            "share the card",
        ),
        ("ERR02005 DIST internal error, HCCL function error: HcclGetRootInfo", BackendError, "between cards"),
        ("of this nothing is known", BackendError, 'load with device="cpu"'),
    ],
)
def test_what_fails_in_an_answer_ends_in_an_error_that_says_what_to_do(
    said: str,
    kind: type[QwenrtError],
    what: str,
    unchecked: None,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
) -> None:
    def dies(*given: Any, **named: Any) -> Any:
        raise RuntimeError(said)

    with qwenrt.load(
        str(GOLDEN / "plain"), device="npu", dtype="float16", max_model_len=256, progress=False
    ) as llm:
        monkeypatch.setitem(Soft.broken, "npu_rms_norm", dies)
        with pytest.raises(kind) as raised:
            llm.generate(prompt_token_ids=[5, 6], sampling_params=GREEDY)
        assert said[:40] in raised.value.found and what in raised.value.remedy
        monkeypatch.delitem(Soft.broken, "npu_rms_norm")  # as a device that came back
        assert len(llm.generate(prompt_token_ids=[5, 6], sampling_params=GREEDY).token_ids) == 10


def test_torch_npu_says_itself_that_memory_is_out(family: str) -> None:
    """Its own words, for an allocation beyond what the card has."""
    with _disable_current_modes(), pytest.raises(RuntimeError) as raised:
        torch.empty(8 << 30, dtype=torch.uint8, device="npu")
    error = typed(raised.value, "a large tensor", registry.create("npu"))
    assert isinstance(error, CapacityError) and "npu-smi info" in error.remedy


def test_a_card_that_dies_while_it_is_waited_for_is_an_error(family: str) -> None:
    """torch_npu's words for a code of CANN's, in a process of its own: there is no going on after it."""
    code = (
        "import torch, torch_npu\nfrom qwenrt.backends.ascend.errors import meaning\n"
        "x = torch.empty(4, device='npu')\nimport os\nos.environ['STAND_IN_FAILS'] = '507054'\n"
        "import ctypes\nctypes.CDLL(None).setenv(b'STAND_IN_FAILS', b'507054', 1)\n"
        "try:\n    torch.npu.synchronize()\nexcept RuntimeError as error:\n"
        "    print(meaning(str(error))[1])\n    os._exit(0)\nos._exit(3)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and "The card itself has failed" in done.stdout, done.stderr[-600:]


def test_without_hccl_doctor_says_what_is_missing_and_loading_ends_in_an_error(
    tmp_path: Path, family: str
) -> None:
    """A half-installed CANN: all libraries but one. Nothing crashes, and the way out is named."""
    here = Path(os.environ["LD_LIBRARY_PATH"])
    for library in here.glob("*.so"):
        if library.name != "libhccl.so":
            (tmp_path / library.name).symlink_to(library)
    environment = os.environ | {"LD_LIBRARY_PATH": str(tmp_path)}
    as_usual = {name: value for name, value in environment.items() if not name.startswith("TORCH_DEVICE_")}
    load = (
        "import qwenrt\ntry:\n    qwenrt.load('demo', device='npu')\n"
        "except qwenrt.errors.BackendError as error:\n    print(error)\n"
    )
    for command in (["-m", "qwenrt", "doctor", "--device", "npu"], ["-c", load]):
        done = subprocess.run(
            [sys.executable, *command],
            capture_output=True,
            text=True,
            timeout=150,
            env=as_usual if "doctor" in command else environment,
        )
        said = " ".join((done.stdout + done.stderr).split())
        assert done.returncode == (1 if "doctor" in command else 0), said[-800:]
        assert "libhccl.so" in said and ("set_env.sh" in said or "qwenrt doctor" in said)


def test_doctor_says_what_a_dying_card_is(family: str) -> None:
    if family != "A2":
        pytest.skip("looked at there")
    command = [sys.executable, "-m", "qwenrt", "doctor", "--device", "npu", "--json"]
    environment = os.environ | {"STAND_IN_FAILS": "507054"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, env=environment)
    problems = json.loads(done.stdout)["problems"]
    (said,) = (problem for problem in problems if "507054" in problem["what"])
    assert done.returncode == 1 and said["fix"].startswith("The card itself has failed")


def test_too_little_memory_is_said_before_any_is_taken(unchecked: None) -> None:
    with pytest.raises(CapacityError, match=r"it needs .* are free"):
        load_random("Qwen-7B", device="npu", progress=False)


def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(BackendError, match="the last npu device is number 0"):
        registry.create("npu:3")
