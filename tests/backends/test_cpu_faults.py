"""What goes wrong around the CPU's kernels: odd shapes, what is not finite, a machine that gives little, forks,
crowds of callers, a library replaced under a running process."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import qwenrt
from qwenrt.backends.cpu import CPUBackend, backend, kernels, resources
from qwenrt.errors import BackendError
from qwenrt.ops.types import CanonicalWeight, Packed
from qwenrt.ops.weights import dequantize
from tests.backends.test_cpu_kernels import float64_linear, random_weight
from tests.conftest import write_tiny_checkpoint
from tests.kernel_sets import SETS
from tests.steps import run_step

CPU = torch.device("cpu")
BUILT = not isinstance(backend._load(), kernels.KernelsUnavailable)
pytestmark = pytest.mark.skipif(not BUILT, reason="csrc was not built")
ROUNDING = {"exact": 1e-5, "int16": 1e-3, "int8": 5e-2}  # of the largest value of a result


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_tiny_checkpoint(tmp_path / "model")


def load(directory: Path, **settings: object) -> qwenrt.LLM:
    return qwenrt.load(directory, device="cpu", dtype="float32", quantize="int4", progress=False, **settings)


def answer(llm: qwenrt.LLM, count: int = 16) -> list[int]:
    tokens: list[int] = llm.generate(prompt_token_ids=[3, 4, 5, 6], max_tokens=count, temperature=0).token_ids
    return tokens


# ---- shapes and numbers


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("activations", list(ROUNDING))
@pytest.mark.parametrize("bits", [4, 8])
def test_inputs_that_fill_neither_group_nor_vector(
    cpu: CPUBackend, isa: str, activations: str, bits: int
) -> None:
    cpu.configure(isa, activations=activations)
    for n, k, group in ((1, 1, 32), (1, 33, 32), (7, 31, 32), (9, 129, 128), (1, 200, 128), (17, 65, -1)):
        weight = random_weight(n, k, bits, group)
        w = cpu.pack_linear(weight, torch.float32)
        for tokens in (0, 1, 5):
            x = torch.randn(tokens, k)
            y = cpu.linear(x, w)
            assert y.shape == (tokens, n)
            if tokens:
                wanted, size = float64_linear(x, weight)
                assert float(((y - wanted).abs() / size.amax()).max()) < ROUNDING[activations]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("activations", list(ROUNDING))
def test_a_bad_number_anywhere_spoils_its_own_token_only(
    cpu: CPUBackend, bad: float, activations: str
) -> None:
    cpu.configure(activations=activations)
    weight = random_weight(24, 160, 4, 32)
    w, x = cpu.pack_linear(weight, torch.float32), torch.randn(9, 160)
    clean = cpu.linear(x, w)
    for token, place in ((0, 0), (4, 31), (8, 159), (3, 77)):
        y = x.clone()
        y[token, place] = bad
        got = cpu.linear(y, w)
        dense = dequantize(weight, torch.float32)
        assert torch.equal(
            got[token].isfinite(),
            (y[token] @ dense.t() + weight.bias).isfinite(),  # type: ignore[operator]
        )
        others = [i for i in range(9) if i != token]
        tolerance = 1e-5 if activations == "exact" else 0.0  # exact sums follow the number of tokens
        assert torch.allclose(got[others], clean[others], rtol=tolerance, atol=tolerance)


# ---- what the machine gives


def test_an_instruction_set_that_is_missing_is_refused_with_words(
    cpu: CPUBackend, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cpu.kernels is not None
    missing = sorted({"amx", "avx512vnni", "avx2", "neondot", "neon"} - set(cpu.kernels.isas))
    assert missing  # no CPU has both families
    before = cpu.describe()
    for name in missing:
        with pytest.raises(BackendError, match=rf"'{name}' were asked for; this CPU and build have .*scalar"):
            cpu.configure(name)
        monkeypatch.setenv("QWENRT_KERNELS", name)
        with pytest.raises(BackendError, match="Use auto or scalar"):
            load(checkpoint)
    assert CPUBackend(CPU).describe() == before  # what serves elsewhere goes on serving
    monkeypatch.setenv("QWENRT_KERNELS", "scalar")
    with load(checkpoint) as llm:
        assert len(answer(llm)) == 16


def in_a_process(code: str, *arguments: object, cpus: set[int] | None = None) -> str:
    """What a fresh interpreter prints, kept to ``cpus``."""
    kept = f"import os; os.sched_setaffinity(0, {cpus})\n" if cpus else ""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    environment.pop("OMP_NUM_THREADS", None)
    done = subprocess.run(
        [sys.executable, "-c", kept + code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=200,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


GENERATE = """
import sys, qwenrt
with qwenrt.load(sys.argv[1], device="cpu", dtype="float32", quantize="int4", progress=False) as llm:
    tokens = llm.generate(prompt_token_ids=[3, 4, 5, 6], max_tokens=16, temperature=0).token_ids
    print(llm._alive().backend.threads, *tokens)
"""


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity here")
def test_one_core_serves_the_same_tokens_with_one_thread(cpu: CPUBackend, checkpoint: Path) -> None:
    with load(checkpoint) as llm:
        wanted = answer(llm)
    said = in_a_process(GENERATE, checkpoint, cpus={min(os.sched_getaffinity(0))}).split()
    assert said[0] == "1" and list(map(int, said[1:])) == wanted


def test_half_a_core_counts_as_one(tmp_path: Path) -> None:
    group = tmp_path / "sys/fs/cgroup/job"
    group.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/job\n")
    for quota, wanted in (("50000 100000", 1), ("max 100000", None), ("junk", None), ("150000 100000", 1)):
        (group / "cpu.max").write_text(f"{quota}\n")
        assert resources.usable_cores(tmp_path) == (wanted or resources.usable_cores(tmp_path / "nothing"))


@pytest.fixture
def half_a_core() -> Iterator[Path]:
    """A cgroup of version 2 with half a core, where this process may make one."""
    mount = Path("/sys/fs/cgroup")
    group = mount / f"qwenrt-test-{os.getpid()}"
    try:
        if "cpu" not in (mount / "cgroup.subtree_control").read_text().split():
            pytest.skip("the cpu controller of cgroups (version 2) is not handed down here")
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup can be made here: {error}")
    try:
        (group / "cpu.max").write_text("50000 100000")
        yield group
    finally:
        group.rmdir()


def test_a_cgroup_of_half_a_core(half_a_core: Path, checkpoint: Path) -> None:
    enter = f"import os; open('{half_a_core}/cgroup.procs', 'w').write(str(os.getpid()))\n"
    assert in_a_process(enter + GENERATE, checkpoint).split()[0] == "1"


# ---- processes and threads


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_child_of_a_process_that_loaded_computes_the_same(cpu: CPUBackend, checkpoint: Path) -> None:
    """The model's own step: the thread that serves an LLM's requests stays with the parent."""
    with load(checkpoint) as llm:
        wanted = answer(llm, 4)
        model = llm._alive().model

        def tokens() -> list[int]:
            ids = [3, 4, 5, 6]
            for _ in range(4):
                kv = model.backend.alloc_kv(2, 1, 16, 4, 16, torch.float32, False)
                outcome = run_step(model, kv, ids, [len(ids)], [len(ids)], [[0]], rows=[len(ids) - 1])
                assert outcome.served_by.name == "one call"
                ids.append(int(outcome.logits[:, : llm.tokenizer.vocab_size].argmax()))
            return ids[4:]

        assert tokens() == wanted
        child = os.fork()
        if child == 0:
            signal.alarm(200)
            os._exit(0 if tokens() == wanted else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert answer(llm, 4) == wanted


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_of_a_process_whose_torch_had_threads_loads_and_answers(checkpoint: Path) -> None:
    """torch waits for ever for the threads that a fork took from it: in the child it must not ask for any."""
    fork = """
import os, signal, torch
def of_many_threads(): return torch.ones(2000, 2000) @ torch.ones(2000, 2000)
import qwenrt
torch.set_num_threads(2)
with qwenrt.load("demo", device="cpu", progress=False): of_many_threads()
child = os.fork()
if child:
    raise SystemExit(os.waitpid(child, 0)[1])
signal.alarm(200)
of_many_threads()
"""
    wanted = in_a_process(GENERATE, checkpoint).split()
    said = in_a_process(fork + GENERATE, checkpoint).split()
    assert said[1:] == wanted[1:] and int(said[0]) == resources.usable_cores()


def in_threads(count: int, task: Callable[[int], None]) -> None:
    errors: list[BaseException] = []

    def run(i: int) -> None:
        try:
            task(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(200)
    assert not errors, errors[0]
    assert not any(thread.is_alive() for thread in threads)


def test_32_callers_of_one_model(checkpoint: Path) -> None:
    with load(checkpoint, activations="int16") as llm:
        wanted = answer(llm)

        def ask(_: int) -> None:
            assert answer(llm) == wanted

        in_threads(32, ask)


def test_32_callers_of_the_kernels(cpu: CPUBackend) -> None:
    cpu.configure(num_threads=2, activations="int16")
    weights = [cpu.pack_linear(random_weight(300, 512, bits, 128), torch.float32) for bits in (4, 8)]
    jobs: list[tuple[Packed, torch.Tensor]] = [
        (weights[i % 2], torch.randn(1 + i % 5, 512)) for i in range(32)
    ]
    wanted = [cpu.linear(x, w) for w, x in jobs]

    def compute(i: int) -> None:
        for _ in range(20):
            assert torch.equal(cpu.linear(jobs[i][1], jobs[i][0]), wanted[i])

    in_threads(32, compute)


# ---- the library


@pytest.mark.skipif(sys.platform == "win32", reason="Windows refuses to replace a library in use")
def test_a_library_that_is_replaced_while_it_serves(tmp_path: Path) -> None:
    """As an upgrade does it: another file under the same name. The process keeps what it has mapped."""
    library = tmp_path / kernels.LIBRARY.name
    shutil.copy(kernels.LIBRARY, library)
    served = kernels.Kernels(library)
    x = torch.randn(3, 64)
    weight = torch.randn(5, 64).bfloat16()
    wanted = served.dense16_linear(x, weight, None)
    (tmp_path / "new").write_bytes(b"not a library")
    os.replace(tmp_path / "new", library)
    assert torch.equal(served.dense16_linear(x, weight, None), wanted)
    with pytest.raises(kernels.KernelsUnavailable, match="is not a library"):
        kernels.Kernels(library)
    library.unlink()
    assert torch.equal(served.dense16_linear(x, weight, None), wanted)
    with pytest.raises(kernels.KernelsUnavailable, match="is missing"):
        kernels.Kernels(library)


@pytest.mark.parametrize("kernel", ["qwenrt_quant_linear", "qwenrt_dense16_linear"])
def test_no_memory_for_activations_is_an_error(
    cpu: CPUBackend, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cpu.kernels is not None
    w = random_weight(16, 64, 4, 32)
    if kernel == "qwenrt_dense16_linear":
        w = CanonicalWeight(dense=torch.randn(16, 64).bfloat16())
    packed = cpu.pack_linear(w, torch.float32)
    monkeypatch.setattr(cpu.kernels._library, kernel, lambda *_: 2)
    with pytest.raises(MemoryError, match="no memory for the activations"):
        cpu.linear(torch.randn(20, 64), packed)
