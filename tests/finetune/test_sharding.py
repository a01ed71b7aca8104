"""Weights that two processes share out are trained as in one process, and a run goes on with another number of them."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qwenrt.config import read_model_config
from qwenrt.errors import RequestError
from qwenrt.finetune import finetune
from qwenrt.finetune.building import Base, build, build_adapter
from qwenrt.finetune.lora import LoraSettings
from qwenrt.finetune.processes import Group, in_processes
from qwenrt.finetune.settings import TrainingSettings
from qwenrt.finetune.state import STATE_FILE
from tests.conftest import GOLDEN
from tests.finetune.test_finetune import CONFIG, ENTRIES, QUICK, base, same, weights
from tests.finetune.test_lora import NoTokens
from tests.finetune.test_networks import SHAPES, corpus_of

__all__ = ["base"]
CPU = torch.device("cpu")
CUT, STEPS = 3, 6
# what is trained -> (directory, settings of the run, of an adapter or None)
RUNS = {
    "tied": ("qwen2", {"recompute": "all"}, None),
    "experts": ("qwen3_moe", {"shard": "optimizer", "micro_tokens": 9}, None),
    "sixteen": ("qwen3_5", {"precision": "bfloat16"}, None),
    "adapter": ("plain", {}, {"train_tokens": (3, 5)}),
    "codes": ("gptq_int4_act_order", {"recompute": "all"}, {}),
}


def built(root: Path, kind: str, group: Group | None):
    name, how, lora = RUNS[kind]
    source = root / name if name in SHAPES else GOLDEN / name
    options = TrainingSettings(**{
        "method": "full" if lora is None else "lora", "from_scratch": name in SHAPES, "max_length": 64,
        "learning_rate": 1e-3, "batch_tokens": 20, "epochs": 2, "shard": "all", "moments": "float32", **how,
    })  # fmt: skip
    found = Base.open(source, read_model_config(source), options)
    corpus = corpus_of(min(150, found.config.vocab_size))
    if lora is None:
        return build(found, corpus, options, group=group)
    settings = LoraSettings(rank=4, alpha=8, keep_modules="none", **lora)
    return build_adapter(found, corpus, options, settings, NoTokens(7), group=group)[0]


def train(run, steps: int):
    """The losses of so many steps, and what was measured before."""
    begun = run.loss(list(range(len(run.corpus))))
    left = run.remaining()
    return [begun, *(run.train_step(next(left)) for _ in range(steps))]


def in_each(root: Path, kinds: list[str]):
    """Half of a run, whose state is kept, and the other half of the runs of one process; what came of them."""
    group, found = Group(torch.distributed.get_rank(), 2), {}
    torch.set_num_threads(1)
    for kind in kinds:
        run = built(root, kind, group)
        losses = train(run, CUT)
        run.save_state(root / f"{kind}.two")
        run = built(root, kind, group)
        run.load_state(root / f"{kind}.one")
        losses += train(run, STEPS - CUT)[1:]
        run.save_state(root / f"{kind}.end")
        held = sum(part.numel() for part in run.optimizer.masters.values())
        found[kind] = losses, held, run.network.first_not_finite(*_sample(run))
    return found


def _sample(run):
    ids, _, lengths = run.corpus.take([0, 1])
    return ids, lengths


@pytest.mark.parametrize(
    "kinds",
    [("tied", "experts", "codes"), pytest.param(("sixteen", "adapter"), marks=pytest.mark.slow)],
    ids=",".join,
)
def test_two_processes_with_a_part_each_learn_what_one_learns(tmp_path, kinds):
    for name, shape in SHAPES.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(shape))
    wanted = {}
    for kind in kinds:
        run = built(tmp_path, kind, None)
        losses = train(run, CUT)
        run.save_state(tmp_path / f"{kind}.one")
        losses += train(run, STEPS - CUT)[1:]
        wanted[kind] = losses, run.optimizer.tensors()
        run.optimizer.forget()
    found = in_processes(2, CPU, in_each, {"root": tmp_path, "kinds": list(kinds)})
    for kind, (losses, tensors) in wanted.items():
        exact = kind != "sixteen"
        their_losses, held, bad = found[kind]
        theirs = load_file(tmp_path / f"{kind}.end")
        assert their_losses == pytest.approx(losses, rel=1e-5 if exact else 0.02), kind
        assert bad is None and theirs.keys() == tensors.keys()
        total = sum(t.numel() for name, t in tensors.items() if name.startswith("weight."))
        assert held <= (0.55 * total if RUNS[kind][2] is None else total), kind
        for name, tensor in tensors.items():
            close = (2e-6, 1e-5) if exact else (3e-2, 0.1)
            assert torch.allclose(theirs[name], tensor, atol=close[0], rtol=close[1]), (kind, name)
        if exact:  # and what two left off, one finishes
            run = built(tmp_path, kind, None)
            run.load_state(tmp_path / f"{kind}.two")
            train(run, STEPS - CUT)
            for name, tensor in run.optimizer.tensors().items():
                assert torch.allclose(tensor, tensors[name], atol=2e-6, rtol=1e-5), (kind, name)


@pytest.mark.slow
def test_a_run_that_shares_out_its_weights_writes_the_same_files(base, tmp_path):
    (base / "config.json").write_text(json.dumps({**CONFIG, "torch_dtype": "float32"}))
    how = {**QUICK, "epochs": 6, "device": "cpu", "learning_rate": 1e-3, "save_every": 3, "eval_data": 0.3}
    one = finetune(base, ENTRIES, tmp_path / "one", **how)
    two = finetune(base, ENTRIES, tmp_path / "two", **how, processes=2, shard="all")
    assert [loss for _, loss in two.losses] == pytest.approx([loss for _, loss in one.losses], rel=1e-5)
    assert two.best_step == one.best_step
    wanted, found = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.allclose(found[name], tensor, atol=2e-6, rtol=1e-5) for name, tensor in wanted.items())
    assert {f.name for f in (tmp_path / "two").iterdir()} == {f.name for f in (tmp_path / "one").iterdir()}


@pytest.mark.slow
def test_one_goes_on_where_one_of_two_was_killed(base, tmp_path):
    how = {**QUICK, "epochs": 100, "device": "cpu", "learning_rate": 1e-3, "shard": "all"}
    state = tmp_path / "cut" / STATE_FILE
    run = multiprocessing.get_context("fork").Process(
        target=finetune,
        args=(base, ENTRIES, tmp_path / "cut"),
        kwargs={**how, "save_every": 1, "processes": 2},
    )
    run.start()
    while run.is_alive() and not state.exists():
        time.sleep(0.01)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    spawned = [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(spawned[1], signal.SIGKILL)
    run.join(200)  # it ends with an error, and does not wait for ever
    assert run.exitcode == 1 and state.exists() and not (tmp_path / "cut" / "model.safetensors").exists()
    finetune(base, ENTRIES, tmp_path / "whole", **how)
    finetune(base, ENTRIES, tmp_path / "cut", **how)
    wanted, found = weights(tmp_path / "whole"), weights(tmp_path / "cut")  # stored in bfloat16
    for name, tensor in wanted.items():
        assert torch.allclose(found[name], tensor, atol=5e-6, rtol=2**-7), name  # one step of it
        assert (found[name] != tensor).sum() <= max(1, tensor.numel() // 100), name


def test_one_process_shares_nothing_out_and_what_cannot_be_is_said(base, tmp_path, monkeypatch):
    finetune(base, ENTRIES, tmp_path / "whole", epochs=1, **QUICK)
    finetune(base, ENTRIES, tmp_path / "alone", epochs=1, shard="all", **QUICK)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "alone"))
    monkeypatch.delattr("torch.distributed.fsdp.FSDPModule.set_force_sum_reduction_for_comms")
    with pytest.raises(RequestError, match=r"torch .* has no fully_shard"):
        finetune(base, ENTRIES, tmp_path / "old", epochs=1, shard="all", processes=2, **QUICK)
    with pytest.raises(RequestError, match="no, optimizer, all"):
        TrainingSettings(shard="some")
