"""What each phase does. Each is called in a process of its own: (notes, device, seconds, directory)."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qwenrt.backends import registry
from qwenrt.backends.graphs import EagerGraphs, GraphStack
from qwenrt.config import Environment
from qwenrt.config.layers import kv_bytes_per_token, layer_linears
from qwenrt.config.released import released_config
from qwenrt.conformance import selftest
from qwenrt.conformance.gpu import compiling, driver, peers, timing, tuning
from qwenrt.conformance.gpu.report import Notes, write
from qwenrt.conformance.run import chosen, run
from qwenrt.conformance.subjects import at_hand
from qwenrt.errors import QwenrtError
from qwenrt.llm import LLM
from qwenrt.loading import load_random
from qwenrt.model import trial
from qwenrt.ops.steps import Draw, Step
from qwenrt.sampling_params import SamplingParams

_SPARE_S = 3.0  # left for writing and ending
_REPLAYS = 1000
_PROMPT_STEP = 2048  # tokens of prompts in a step: what a GPU needs to be busy
_SHAPES = {  # (outputs, inputs) of a layer's linears and the head
    "1.8B": ((6144, 2048), (2048, 2048), (11008, 2048), (2048, 5504), (151936, 2048)),
    "7B": ((12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008), (151936, 4096)),
}
_HEAD = 100_000  # outputs of a head, which stays dense


@dataclass(frozen=True)
class Load:
    """Answers of a model of released shape: so many at once, each behind a prompt of so many tokens."""

    shape: str
    quantize: str | None = None
    rows: int = 1
    prompt: int = 1024
    cache: str = "auto"

    def __str__(self) -> str:
        cache = "" if self.cache == "auto" else f", {self.cache} cache"
        return f"{self.shape} {self.quantize or 'bfloat16'}{cache}, {self.rows} at {self.prompt} tokens"


_USUAL = (Load("Qwen-7B"), Load("Qwen-7B", "int4"), Load("Qwen-1_8B"), Load("Qwen-1_8B", "int4"))
# Of what a user feels most to what is nice to know.
_MODELS = (
    *_USUAL,
    Load("Qwen-7B", "int8"),
    Load("Qwen-7B", prompt=32_000, cache="int8"),
    Load("Qwen-7B", prompt=4096),
    Load("Qwen-7B", "int4", prompt=4096),
    Load("Qwen3.5-4B"),
    *(Load("Qwen-1_8B", rows=rows, prompt=256) for rows in (8, 32)),
    Load("Qwen3-30B-A3B"),
)


def limits(notes: Notes, device: str, seconds: float, out: Path) -> None:
    """What the memory and the units for products give, and what a launch in a graph costs: every fraction is of these.
    The bandwidth is the larger of a copy's and our own reading kernel's."""
    del out
    here = torch.device(registry.create(device).device)
    timing.bandwidth(notes, here)
    timing.products(notes, here)
    timing.launches(notes, here)


def compile_all(notes: Notes, device: str, seconds: float, out: Path) -> None:
    """Every kernel of a decoding step, for the phases behind this one; compile.json has what the compiler said."""
    del seconds
    backend = registry.create(device)
    if (why := backend.provides("triton")) is not None:
        notes.detail["triton"] = why
        return
    made: list[compiling.Made] = []
    for kernel in compiling.every(device):
        made.append(kernel)
        if kernel.why or kernel.spilt:
            notes.wrong(f"{kernel.kernel}: {kernel.why or f'{kernel.spilt} bytes are spilt'}")
        if len(made) % 20 == 0:
            notes.figure("launches compiled", len(made))
    notes.figure("launches compiled", len(made))
    notes.figure("most registers", max((kernel.registers for kernel in made), default=0))
    write(out / "compile.json", [vars(kernel) for kernel in made])


def ops(notes: Notes, device: str, seconds: float, out: Path) -> None:
    """The table of ops, as far as the time goes: the combinations in which any two values meet, op by op."""
    del out
    end, count, wrong = time.monotonic() + seconds - _SPARE_S, 0, 0
    subjects = at_hand(device)[1:]  # the definitions on the CPU are looked at wherever there is one
    for outcome in run(chosen(subjects)):
        count += 1
        if not outcome.finding.ok:
            wrong += 1
            notes.wrong(f"{outcome.subject}: {outcome.case.id}: {outcome.why}")
        if count % 50 == 0:
            notes.figure("cases", count)
        if time.monotonic() > end:
            notes.detail["stopped at"] = outcome.case.op
            break
    notes.figure("cases", count)
    notes.figure("wrong cases", wrong)


def replays(notes: Notes, device: str, seconds: float, out: Path) -> None:
    """The same steps of a small model again and again: a graph gives its body's bits, and the same ones each time."""
    del out
    end = time.monotonic() + seconds - _SPARE_S
    backend = registry.create(device)
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        captured, eager = _small(backend, dtype), _small(backend, dtype)
        eager._graphs = EagerGraphs()
        steps = [_step(position) for position in (1, 2, 3)]
        wanted = [eager.run(step).logits.clone() for step in steps]
        count = apart = 0
        while count < _REPLAYS and time.monotonic() < end:
            for step, right in zip(steps, wanted, strict=True):
                outcome = captured.run(step)
                if outcome.served_by is not captured:
                    notes.wrong(f"{name}: {captured.note()}")
                    return
                apart += not torch.equal(outcome.logits, right)
                count += 1
        notes.figure(f"replays in {name}", count)
        if apart:
            notes.wrong(f"{name}: {apart} of {count} replays give other bits than the body")
    notes.detail["captured"] = captured.note()
    early(notes, backend)


def early(notes: Notes, backend: Any) -> None:
    """Where launches may begin before the one before them has ended: the same bits as where they may not."""
    if not getattr(backend, "gluon", False) or not backend.profile.pdl:
        notes.detail["early launches"] = "not on this device"
        return
    waiting, stacks = backend.tiles, []
    for pdl in (False, True):
        backend.tiles = dataclasses.replace(waiting, pdl=pdl)
        stacks.append(_small(backend, torch.bfloat16))
    backend.tiles = waiting
    steps = [_step(position) for position in (1, 2, 3)]
    wanted = [stacks[0].run(step).logits.clone() for step in steps]
    apart = count = 0
    for _ in range(_REPLAYS // 10):
        for step, right in zip(steps, wanted, strict=True):
            outcome = stacks[1].run(step)
            if outcome.served_by is not stacks[1]:
                notes.wrong(f"early launches: {stacks[1].note()}")
                return
            apart += not torch.equal(outcome.logits, right)
            count += 1
    notes.figure("replays with early launches", count)
    if apart:
        notes.wrong(f"{apart} of {count} replays with early launches give other bits")


def _small(backend: Any, dtype: torch.dtype) -> GraphStack:
    return trial.captured_stack(backend, dtype)


def _step(position: int) -> Step:
    draws: list[Draw | None] = [Draw()] * 3
    return Step([1] * 3, [position] * 3, [[4], [5], [6]], [1] * 3, [3, 4, 5], [0, 1, 2], draws, [-1] * 3)


def models(notes: Notes, device: str, seconds: float, out: Path) -> None:
    """The built-in model in each way to load, beside what its definitions gave on a CPU; then in 16 bits."""
    del seconds, out
    digests = selftest.kept_digests(selftest.DEMO)
    for dtype in ("float32", "bfloat16", "float16"):
        if dtype != "float32":
            digests = {**digests, "ways": {"as it is": digests["ways"]["as it is"]}}
        for finding in selftest.compare("demo", digests, device=device, dtype=dtype):
            name = f"{dtype}, {finding.way}: error"
            notes.figure(name, max(finding.error, notes.figures.get(name, 0.0)))
            if finding.wrong:
                notes.wrong(f"{dtype}, {finding.way}, text {finding.text}: {finding.wrong}")


def sanitizer(notes: Notes, device: str, seconds: float, out: Path) -> None:
    """NVIDIA's compute-sanitizer over one step of one layer, where it is on the path: two threads that meet in shared
    memory without a barrier. Its page goes to sanitizer.txt."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        notes.detail["compute-sanitizer"] = "not on the path"
        return
    page = _under([program, "--tool", "racecheck"], device, seconds, out / "sanitizer.txt")
    hazards = re.search(r"RACECHECK SUMMARY: (\d+) hazards?", page)
    if hazards is None:
        notes.detail["compute-sanitizer"] = "no summary in sanitizer.txt"
        return
    notes.figure("hazards", int(hazards.group(1)))
    if int(hazards.group(1)):
        notes.wrong(f"{hazards.group(1)} hazards in one step: see sanitizer.txt")


def _under(command: list[str], device: str, seconds: float, page: Path) -> str:
    """One step under another program -> what that said, which is kept in ``page`` as well."""
    step = f"from qwenrt.conformance.gpu import phases; phases.one_step({device!r})"
    with page.open("w", encoding="utf-8") as said:
        subprocess.run(
            [*command, sys.executable, "-c", step], stdout=said, timeout=max(1.0, seconds - _SPARE_S)
        )
    return page.read_text(encoding="utf-8", errors="replace")


def engine(notes: Notes, device: str, seconds: float, out: Path, loads: Sequence[Load] = _MODELS) -> None:
    """Answers and prompts of released shapes with random weights, beside what phase "limits" found."""
    end = time.monotonic() + seconds - _SPARE_S
    for load in loads:
        if time.monotonic() > end:
            return
        try:
            options = {"quantize": load.quantize, "max_num_seqs": load.rows, "kv_cache_dtype": load.cache}
            options |= {"max_model_len": load.prompt + 256, "max_num_batched_tokens": _PROMPT_STEP}
            with load_random(load.shape, device=device, dtype="bfloat16", progress=False, **options) as llm:
                _speeds(notes, llm, load, timing.measured_bandwidth(out), timing.measured_products(out))
                notes.detail[str(load)] = llm.explain()
        except Exception as error:  # the other models still count
            notes.wrong(f"{load}: {type(error).__name__}: {str(error)[:200]}")


def engine_tuned(notes: Notes, device: str, seconds: float, out: Path) -> None:
    """The usual ones again, with the table that phase "tuning" has kept."""
    engine(notes, device, seconds, out, _USUAL)


def _speeds(notes: Notes, llm: LLM, load: Load, bandwidth: float, products: float) -> None:
    """After a first answer, which captures: the time to a first token, and that of each of the next ones; the bytes of
    weights and cache that a step reads, of the bandwidth; the operations of a prompt's linears, of the rate of
    products."""
    name, rows, prompt = str(load), load.rows, load.prompt
    few, many = 1, 65
    taken: dict[int, float] = {}
    for tokens in (many, few, many):  # other prompts each time: none is found in the cache
        prompts = [
            [(7 * i + 13 * row + 31 * len(taken)) % 1000 for i in range(prompt)] for row in range(rows)
        ]
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        at = time.perf_counter()
        llm.generate(prompt_token_ids=prompts, sampling_params=params)
        taken[tokens] = time.perf_counter() - at
    step = (taken[many] - taken[few]) / (many - few)
    notes.figure(f"{name}: prompt tokens/s", rows * prompt / taken[few])
    notes.figure(f"{name}: tokens/s", rows / step)
    config = released_config(load.shape)
    assert config is not None
    if rows == 1 and bandwidth:
        sizes = config.num_paged_layers, config.num_kv_heads, config.head_dim
        cached = (prompt + many // 2) * kv_bytes_per_token(*sizes, 2, load.cache == "int8")
        share = (llm.stats()["weight_bytes_per_token"] + cached) / step / bandwidth
        notes.figure(f"{name}: weights and cache read, of the bandwidth", share)
    if products and config.moe is None:
        weights = sum(
            spec.out_features * spec.in_features
            for i in range(config.num_layers)
            for spec in layer_linears(config, i)
        )
        share = 2 * weights * rows * prompt / taken[few] / products
        notes.figure(f"{name}: a prompt's linears, of the rate of products", share)


def tune(notes: Notes, device: str, seconds: float, out: Path) -> None:
    """What `qwenrt tune` does for both models, in 16 and 4 bits: kept where loads look for it, and in tuned.json."""
    backend: Any
    backend, end = registry.create(device), time.monotonic() + seconds - _SPARE_S
    try:
        clock = tuning.clock_of(backend)
    except QwenrtError as error:
        notes.detail["tuning"] = error.found
        return

    def note(choice: tuning.Choice) -> None:
        bits, rows, columns = choice.shape
        notes.figure(
            f"{bits} bits, {rows} x {columns}: time beside that of no table", choice.best_s / choice.usual_s
        )

    shapes = [
        (bits, rows, columns)
        for bits in (4, 16)
        for rows, columns in _SHAPES["7B"] + _SHAPES["1.8B"]
        if bits == 16 or rows < _HEAD
    ]
    in_time = (shape for shape in shapes if time.monotonic() < end)
    result, path = tuning.keep(backend, in_time, clock, Environment.read().cache_dir, None, note)
    shutil.copyfile(path, out / "tuned.json")
    notes.figure("early launches, of the time without", result.early)


def linears(notes: Notes, device: str, seconds: float, out: Path) -> None:
    """One token by the kernels of ours, and by torch's own product, which they have to pass, shape by shape."""
    end = time.monotonic() + seconds - _SPARE_S
    backend: Any = registry.create(device)
    here, bandwidth = torch.device(backend.device), timing.measured_bandwidth(out)
    clock = tuning.DeviceClock(here) if getattr(backend, "gluon", False) else None
    for model, shapes in _SHAPES.items():
        for rows, columns in shapes:
            if time.monotonic() > end:
                return
            name = f"{model} {rows} x {columns}"
            timing.linear(notes, here, name, (rows, columns), bandwidth)
            for bits in (16, 8, 4) if rows < _HEAD else (16,):
                shape = (bits, rows, columns)
                taken = None if clock is None else clock(shape, backend.tiles.warps(*shape), False)
                if taken is not None and bandwidth:
                    share = rows * columns * bits / 8 / taken / bandwidth
                    notes.figure(f"{name}, {bits} bits, of the bandwidth", share)


def beside(notes: Notes, device: str, seconds: float, out: Path) -> None:
    """The same work by what else is installed here."""
    del seconds
    here, bandwidth = torch.device(registry.create(device).device), timing.measured_bandwidth(out)
    for rows, columns in _SHAPES["7B"][:-1]:
        peers.int4(notes, here, f"7B {rows} x {columns}", (rows, columns), bandwidth)
    for tokens in (1024, 8192):
        peers.attention(notes, here, tokens)
    measured = driver.figures_of(out, "engine, tuned") or driver.figures_of(out, "engine")
    peers.transformers(notes, here, measured.get(f"{Load('Qwen-1_8B')}: tokens/s", 0.0))


def profile(notes: Notes, device: str, seconds: float, out: Path) -> None:
    """NVIDIA's profiler over one step of one layer, where it is on the path; its page goes to ncu.txt."""
    program = shutil.which("ncu")
    if program is None:
        notes.detail["ncu"] = "not on the path"
        return
    command = [program, "--set", "full", "--clock-control", "none", "--launch-count", "60", "--page", "raw"]
    _under(command, device, seconds, out / "ncu.txt")
    notes.detail["ncu"] = "ncu.txt"


def one_step(device: str) -> None:
    """What the profiler looks at: a decoding step of a small model, asked for op by op."""
    stack = _small(registry.create(device), torch.bfloat16)
    stack._graphs = EagerGraphs()
    stack.run(_step(1))


WORK: dict[str, Callable[[Notes, str, float, Path], None]] = {
    "limits": limits,
    "compile": compile_all,
    "ops": ops,
    "replays": replays,
    "models": models,
    "sanitizer": sanitizer,
    "engine": engine,
    "tuning": tune,
    "engine, tuned": engine_tuned,
    "linears": linears,
    "peers": beside,
    "profile": profile,
}
