"""A run that is killed at any moment goes on to the same bytes."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time

import pytest
from safetensors.torch import load_file

from qwenrt.finetune import finetune
from tests.finetune.test_finetune import ENTRIES, base, same

__all__ = ["base"]
HOW = {
    "learning_rate": 5e-3,
    "batch_tokens": 128,
    "max_length": 96,
    "threads": 1,
    "device": "cpu",
    "progress": False,
    "save_every": 1,
    "eval_data": 0.3,
    "eval_every": 3,
}


def stamp(file):
    return file.stat().st_mtime_ns if file.exists() else None


@pytest.mark.parametrize(
    ("method", "kills", "epochs"),
    [("lora", 2, 8), *(pytest.param(m, 10, 40, marks=pytest.mark.slow) for m in ("full", "lora"))],
)
def test_kills_change_nothing(base, tmp_path, method, kills, epochs):
    source, how = base, {**HOW, "epochs": epochs, "method": method}
    if method == "lora":
        source = tmp_path / "model"
        finetune(base, ENTRIES, source, epochs=1, from_scratch=True, threads=1, progress=False, max_length=96)
    else:
        how["from_scratch"] = True
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    finetune(source, ENTRIES, whole, **how)
    rng, killed = random.Random(7), 0
    # forked, so that each has torch at once
    fork = multiprocessing.get_context("fork")
    while killed < kills:
        state = cut / "training_state.safetensors"
        before = stamp(state)
        process = fork.Process(target=finetune, args=(source, ENTRIES, cut), kwargs=how)
        process.start()
        while process.is_alive() and stamp(state) == before:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.03)  # somewhere in the steps behind a state, or while one is written
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        killed += 1
        if process.exitcode == 0:
            break
    finetune(source, ENTRIES, cut, **{**how, "overwrite": not (cut / "training_state.safetensors").exists()})
    assert killed >= min(kills, 3)
    (file,) = whole.glob("*.safetensors")
    assert same(load_file(cut / file.name), load_file(file))  # all bits; a header's order is the library's
    wanted, found = (json.loads((d / "loss_curve.json").read_text()) for d in (whole, cut))
    assert {**found, "seconds": 0} == {**wanted, "seconds": 0}
