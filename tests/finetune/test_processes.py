"""Two processes on one run give what one gives; one that dies ends all."""

from __future__ import annotations

import json
import os
import time

import pytest
import torch

from qwenrt.errors import QwenrtError, RequestError
from qwenrt.finetune import finetune
from qwenrt.finetune.processes import Group, in_processes
from tests.finetune.test_finetune import CONFIG, ENTRIES, QUICK, base, weights

__all__ = ["base"]
CPU = torch.device("cpu")


def test_two_processes_learn_what_one_learns(base, tmp_path):
    (base / "config.json").write_text(json.dumps({**CONFIG, "torch_dtype": "float32"}))
    how = {
        **QUICK,
        "epochs": 12,
        "device": "cpu",
        "learning_rate": 1e-3,
        "eval_data": ENTRIES[:2],
        "save_every": 7,
    }
    one = finetune(base, ENTRIES, tmp_path / "one", **how)
    said = []
    two = finetune(base, ENTRIES, tmp_path / "two", **how, processes=2, say=said.append)
    assert (two.steps, two.tokens) == (one.steps, one.tokens) and len(said) == 1
    assert [loss for _, loss in two.losses] == pytest.approx([loss for _, loss in one.losses], rel=1e-5)
    wanted, found = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.allclose(found[name], tensor, atol=2e-6, rtol=1e-5) for name, tensor in wanted.items())
    assert {f.name for f in (tmp_path / "two").iterdir()} == {f.name for f in (tmp_path / "one").iterdir()}
    with pytest.raises(RequestError, match="holds 5 files already"):  # from the process that looked
        finetune(base, ENTRIES, tmp_path / "two", **how)


def dies(rank_that_dies):
    group = Group(torch.distributed.get_rank(), 2)
    if group.rank == rank_that_dies:
        os._exit(3)
    group.sum([torch.ones(1)])
    time.sleep(1000)  # what is not waited for


def test_a_process_that_dies_ends_all():
    with pytest.raises(QwenrtError, match=r"training in several processes: process [01] ended.*goes on"):
        in_processes(2, CPU, dies, {"rank_that_dies": 1})
