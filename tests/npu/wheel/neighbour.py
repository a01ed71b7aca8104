"""One of several processes on a card, for test_sharing.py: loads a model, and says on each line of input what is free.

`python -m tests.npu.wheel.neighbour MODEL`; the lines are "close" and "end".
"""

from __future__ import annotations

import json
import sys

import qwenrt
from qwenrt import assembly
from qwenrt.backends import registry
from tests.npu.wheel import soft


def main(model: str) -> None:
    soft.install()
    assembly._selfcheck = lambda *given: None  # type: ignore[assignment]  # which takes most of a load on a CPU
    card = registry.create("npu")

    def say(**found: object) -> None:
        print(json.dumps(found | {"free": card.memory()[0]}), flush=True)

    before = card.memory()[0]
    sizes = {"max_model_len": 256, "max_num_seqs": 4096}  # as much cache as a process takes
    llm = qwenrt.load(model, device="npu", dtype="float16", progress=False, **sizes)
    answer = llm.generate(prompt_token_ids=[5, 6, 7], sampling_params=qwenrt.SamplingParams(max_tokens=3))
    say(before=before, cache=llm.stats()["cache_bytes"], tokens=len(answer.token_ids))
    for line in sys.stdin:
        if line.strip() == "end":
            return
        llm.close()
        say()


if __name__ == "__main__":
    main(sys.argv[1])
