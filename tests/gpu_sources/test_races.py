"""Programs of one launch in whatever order they run: the same bits, and none touches what another may be writing."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from qwenrt.backends.cuda.tables import TILES
from qwenrt.ops import reference
from qwenrt.ops.steps import DecodePlan, LayerKV, RotaryRows
from tests.gpu_sources.mutants import Mutant
from tests.gpu_sources.test_numerics import mutated

pytestmark = pytest.mark.gpu_sources
HEADS, BLOCK = (4, 2, 16), 16
_FEW = {"keys": 16, "per_split": 16}  # four splits of each row


@pytest.fixture(scope="module")
def races() -> Any:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not here: make gpu-sources fetches it")
    from tests.gpu_sources import races

    return races


def attended(module: Any, int8: bool = False) -> list[torch.Tensor]:
    """attend over two rows of four splits each -> all that it wrote."""
    source = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=source)

    heads, kv_heads, head_dim = HEADS
    position, table = torch.tensor([60, 9]), torch.tensor([[4, 2, 6, 3], [1, 7, 5, 0]])
    plan = DecodePlan(position, table, reference.decode_slots(table, position, BLOCK))
    shape = (8, BLOCK, kv_heads, head_dim)
    kv = LayerKV(normal(*shape), normal(*shape))
    if int8:
        codes = [torch.randint(0, 256, shape, generator=source).to(torch.uint8) for _ in range(2)]
        kv = LayerKV(*codes, *(normal(*shape[:3]) for _ in range(4)))
    angles = normal(2, head_dim // 2).repeat(1, 2)
    counts = torch.zeros(2 * heads, dtype=torch.int32)
    qkv, turns = normal(2, (heads + 2 * kv_heads) * head_dim), RotaryRows(angles.cos(), angles.sin())
    tiles = TILES.__class__(**{**vars(TILES), **_FEW})
    y = module.attend(qkv, HEADS, None, turns, kv, plan, 0.25, 0, counts, tiles)
    return [y, counts, *kv.tensors]


@pytest.mark.parametrize("int8", [False, True], ids=["float cache", "int8 cache"])
def test_attention_in_one_launch_has_no_race(int8: bool, races: Any) -> None:
    from qwenrt.backends.cuda.kernels import attend

    with races.watched() as watch:
        wanted = attended(attend, int8)
    assert not watch.races and not wanted[1].any()
    for seed in range(2):
        with races.watched(seed) as watch:
            got = attended(attend, int8)
        assert not watch.races, watch.races[:3]
        assert all(map(torch.equal, got, wanted)), "another order gives other bits"


SAYS = "        tl.debug_barrier()  # every thread's part is there before one of them says so\n"
SEEN = "            tl.debug_barrier()\n"
MUTANTS = {
    "a counter without order": ('sem="acq_rel"', 'sem="relaxed"'),
    "parts that are not released": ('sem="acq_rel"', 'sem="acquire"'),
    "parts that are not acquired": ('sem="acq_rel"', 'sem="release"'),
    "threads whose parts may be under way": (SAYS, ""),
    "threads that go ahead of the one that counts": (SEEN, ""),
    "every split stores": ("stores = tl.where(last & (", "stores = tl.where((share >= 0) & ("),
    "the newest key read back": ("high = tl.minimum(low + per_split, position)", "high = position + 1"),
    "merged by every split": ("== SPLITS - 1:", ">= 0:"),
    "one row's counter for all": ("count = counts_ptr + row * (H // QUERIES)", "count = counts_ptr"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_race_is_found(name: str, races: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong = MUTANTS[name]
    module = mutated(Mutant(name, "attend", right, wrong, ""), tmp_path, monkeypatch)
    with races.watched(seed=1) as watch:
        attended(module)
    assert watch.races
