"""What guesses by a model's own head (MTP) gain, for a given share of right ones: python -m benchmarks.mtp.

Random weights guess nothing right. So the head does its work, and its guesses are replaced by ones that are right with
the probability asked for (`benchmarks.forced_drafts`). Answers with and without guesses are written in turn; seconds
are of the wall clock, or, which other processes disturb less, of the processor, with one thread. A figure is the median
over the rounds of without / with.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.forced_drafts import Knowing

if TYPE_CHECKING:
    from qwenrt.engine.engine import Engine
    from qwenrt.llm import LLM


@dataclass(frozen=True)
class Answer:
    """``seconds`` of wall clock and of the processor after the first token; steps, guesses, right ones."""

    wall: float
    cpu: float
    steps: int
    guessed: int
    right: int
    tokens: list[int]


def main(arguments: Sequence[str] | None = None) -> int:
    """The table, in Markdown."""
    add = (
        parser := argparse.ArgumentParser(prog="python -m benchmarks.mtp", description=__doc__)
    ).add_argument
    add("--shape", default="Qwen3.5-0.8B")
    add("--quantize", default="int4")
    add("--quantize-head", default=None)
    add("--activations", default="auto")
    add("--context", type=int, default=64, help="tokens before the answers (default: 64)")
    add("--tokens", type=int, default=64, help="of an answer (default: 64)")
    add("--drafts", default="1,2,3", help="numbers of guesses (default: 1,2,3)")
    add("--shares", default="0,0.5,0.8", help="of right guesses (default: 0,0.5,0.8)")
    add("--rounds", type=int, default=3)
    add("--threads", type=int, default=1)
    asked = parser.parse_args(arguments)
    os.environ["QWENRT_NUM_THREADS"] = str(asked.threads)
    counts = [int(count) for count in asked.drafts.split(",")]
    shares = [float(share) for share in asked.shares.split(",")]

    from qwenrt.loading import load_random

    settings = {name: getattr(asked, name) for name in ("quantize", "quantize_head", "activations")}
    with load_random(
        asked.shape, **settings, draft="mtp", draft_tokens=max(counts), max_num_seqs=1,
        max_model_len=asked.context + asked.tokens + 16, progress=False,
    ) as llm:  # fmt: skip
        print(
            f"{asked.shape}, {asked.quantize or 'stored'}, {llm.stats()['kernels']}, {asked.threads} threads\n"
        )
        print("| guesses | share | of guesses right | tokens a step | gain, processor | gain, wall clock |")
        print("|---|---|---|---|---|---|")
        for count in counts:
            for share in shares:
                print(row(llm, asked, count, share), flush=True)
    return 0


def row(llm: LLM, asked: argparse.Namespace, count: int, share: float) -> str:
    """One line: a number of guesses at one share."""
    gains: list[tuple[float, float]] = []
    guessed = right = steps = 0
    for number in range(asked.rounds):
        source = random.Random(number)
        prompt = [source.randrange(100_000) for _ in range(asked.context)]
        plain = answer(llm, prompt, asked.tokens, None, 0)
        drafted = answer(llm, prompt, asked.tokens, plain.tokens, count, share)
        gains.append((plain.cpu / drafted.cpu, plain.wall / drafted.wall))
        guessed, right, steps = guessed + drafted.guessed, right + drafted.right, steps + drafted.steps
    cpu, wall = (statistics.median(column) for column in zip(*gains, strict=True))
    each = asked.rounds * (asked.tokens - 1) / steps
    found = right / max(guessed, 1)
    return f"| {count} | {share:g} | {found:.2f} of {guessed} | {each:.2f} | {cpu:.2f} | {wall:.2f} |"


def answer(
    llm: LLM, prompt: list[int], tokens: int, known: list[int] | None, count: int, share: float = 0
) -> Answer:
    """One answer; with ``known``, its tokens, ``count`` of them are guessed at a time. It is written in this thread, as
    the engine's own waits for requests."""
    from qwenrt.sampling_params import SamplingParams

    engine: Engine = llm._assembled.engine._alive()
    drafts, head = engine.drafts, engine.drafts.head
    assert head is not None
    if known is None:
        drafts.head, engine.scheduler.drafts = None, None
    else:
        head.most = count
        drafts.head = Knowing(head, lambda seq: [*prompt, *known], share)
    before, written, began = engine.stats(), list[int](), (0.0, 0.0)
    try:
        engine.add(prompt, SamplingParams(temperature=0, ignore_eos=True, max_tokens=tokens))
        while engine.has_work:
            for output in engine.step():
                written += output.delta.token_ids
            if began[0] == 0 and written:
                before, began = engine.stats(), (time.perf_counter(), time.process_time())
        ended = time.perf_counter(), time.process_time()
    finally:
        drafts.head, engine.scheduler.drafts = head, drafts
    took = {
        name: engine.stats()[name] - before[name] for name in ("steps", "guessed_tokens", "right_guesses")
    }
    return Answer(ended[0] - began[0], ended[1] - began[1], *took.values(), tokens=written)


if __name__ == "__main__":
    sys.exit(main())
