"""A checkpoint that is cut while it is mapped: a typed error, where the system would end the process."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from qwenrt.loader.checkpoint.mapping import Watch, map_file
from tests.conftest import write_tiny_checkpoint
from tests.kernel_sets import needs_kernels

ROOT = Path(__file__).parents[3]
pytestmark = needs_kernels


def python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)


@pytest.mark.parametrize(
    ("left", "use"),
    [(0, "llm.generate(prompt_token_ids=[5, 6], max_tokens=4)"), (5000, "llm.logits([5, 6])")],
    ids=["generate", "logits"],
)
def test_a_file_that_is_cut_while_it_serves(tmp_path: Path, left: int, use: str) -> None:
    model = write_tiny_checkpoint(tmp_path / "m")
    code = f"""
        import os, sys, qwenrt
        llm = qwenrt.load(sys.argv[1], dtype="float32", progress=False)
        other = qwenrt.load("demo", progress=False)
        {use}
        os.truncate(sys.argv[1] + "/model.safetensors", {left})
        for _ in range(2):
            try:
                {use}
                print("answered")
            except qwenrt.CheckpointError as error:
                print(error.found)
        assert other.generate("a", max_tokens=1).token_ids  # one that was loaded from other files goes on
    """
    done = python(code, model)
    assert done.returncode == 0, done.stderr
    found = (
        f"the file was cut or overwritten while it was mapped: 543488 bytes when it was loaded, {left} now"
    )
    size = (model / "model.safetensors").stat().st_size
    assert (
        size == left
        and [line.split(":")[0] for line in done.stdout.splitlines()] == [found.split(":")[0]] * 2
    )
    assert done.stdout.splitlines()[0].endswith(f"{left} now")


def test_a_file_that_is_replaced_goes_on_serving(tmp_path: Path) -> None:
    model = write_tiny_checkpoint(tmp_path / "m")
    code = """
        import os, sys, time, qwenrt
        from qwenrt.loader.checkpoint import mapping
        mapping._LOOKS_EVERY = 0.0
        file = sys.argv[1] + "/model.safetensors"
        with qwenrt.load(sys.argv[1], dtype="float32", progress=False) as llm:
            before = llm.logits([5, 6])
            open(file + ".new", "wb").close()
            os.replace(file + ".new", file)
            assert (llm.logits([5, 6]) == before).all()
    """
    done = python(code, model)
    assert (done.returncode, done.stderr) == (0, "")


def test_other_faults_go_to_whoever_had_the_signal_before(tmp_path: Path) -> None:
    code = """
        import faulthandler, mmap, os, sys
        faulthandler.enable()
        from pathlib import Path
        from qwenrt.loader.checkpoint.mapping import map_file
        path = Path(sys.argv[1])
        path.write_bytes(b"x" * 8192)
        ours = map_file(path.open("rb"), path)
        foreign = mmap.mmap(os.open(path, os.O_RDONLY), 8192, prot=mmap.PROT_READ)
        os.truncate(path, 0)
        assert ours[5000] == 0
        foreign[5000]
    """
    done = python(code, tmp_path / "f")
    assert done.returncode < 0 and "Bus error" in done.stderr and "foreign[5000]" not in done.stdout


def test_a_place_is_given_back_with_its_mapping(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"x" * 100)
    watch = Watch()
    with watch.collecting():
        for _ in range(3):
            with path.open("rb") as file:
                map_file(file, path)
    assert len({guarded.place for guarded in watch.files}) == 1
    os.truncate(path, 0)
    watch.check()  # what is no longer mapped is no loss
