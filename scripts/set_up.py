"""Makes the environment that `make chat` and `make test` use; says what it does, how large it is, how long it takes.

    python scripts/set_up.py                            .venv, with a torch for this machine and qwenrt[cli,server]
    python scripts/set_up.py --extras dev               what development needs
    python scripts/set_up.py --torch default            torch from where pip is set to look: on Linux the CUDA build
    python scripts/set_up.py --torch https://...        torch from an index of wheels: ROCm builds, a mirror

Needs only Python. A Python that has a torch already keeps it: the environment then sees the system's packages.
Otherwise `--torch auto` takes PyTorch's CPU build where no NVIDIA GPU is seen, a tenth of what the CUDA build is.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import queue
import re
import subprocess
import sys
import textwrap
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OLDEST = (3, 10)
# Where PyTorch itself publishes its CPU builds; TORCH= of the Makefile names another place.
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
ANSWERS_WITHIN = 5.0  # seconds that the index has to answer
WORTH_A_LINE = 5e6  # bytes of a download from which on it is named
UNITS = {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9}
HEARTBEAT = 30.0  # seconds after which, where lines stay, another one says that work goes on


class Failed(Exception):
    """A step could not be done; the text is for the reader."""


@dataclass
class Screen:
    """Lines about steps; on a terminal the last one is written over while a step goes on."""

    live: bool = field(default_factory=lambda: sys.stdout.isatty() and os.environ.get("TERM") != "dumb")
    _shown: int = 0
    _last: float = field(default_factory=time.monotonic)

    def line(self, text: str) -> None:
        self._clear()
        print(text, flush=True)
        self._last = time.monotonic()

    def now(self, text: str, started: float) -> None:
        """What goes on, since ``started``, by time.monotonic()."""
        seconds = time.monotonic() - started
        if self.live:
            self._clear()
            shown = f"      {text} ({seconds:.0f} s)"
            print(shown, end="", flush=True)
            self._shown = len(shown)
        elif time.monotonic() - self._last >= HEARTBEAT:
            self.line(f"      {text} ({seconds:.0f} s)")

    def _clear(self) -> None:
        if self._shown:
            print("\r" + " " * self._shown + "\r", end="")
            self._shown = 0


def drivers() -> list[str]:
    """Whose devices have a driver here, as `qwenrt doctor` finds them."""
    spec = importlib.util.spec_from_file_location("machine", ROOT / "qwenrt" / "cli" / "machine.py")
    assert spec is not None and spec.loader is not None
    machine = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(machine)
    found: list[str] = machine.drivers()
    return found


def answers(index: str) -> bool:
    """Whether an index of wheels is reached from here within ANSWERS_WITHIN, names that do not resolve included."""
    found: list[bool] = []

    def ask() -> None:
        request = urllib.request.Request(f"{index}/torch/", method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=ANSWERS_WITHIN):
                found.append(True)
        except (OSError, ValueError):
            found.append(False)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(ANSWERS_WITHIN)
    return found == [True]


def choose_torch(
    wish: str, platform: str, vendors: Sequence[str], answers: Callable[[str], bool] = answers
) -> tuple[str | None, str]:
    """(the index to take torch from, None for where pip is set to look; why, in a sentence).

    ``wish``: auto, cpu, default or an index's address; ``platform``: as sys.platform; ``vendors``: as `drivers`.
    """
    if wish == "default":
        return None, "from where pip is set to look"
    if wish.startswith(("https://", "http://", "file://")):
        return wish, f"from {wish}"
    if wish not in ("auto", "cpu"):
        raise Failed(f"TORCH={wish}: use auto, cpu, default, or the https:// address of an index of wheels.")
    if not platform.startswith("linux"):
        return None, "the build for this system, which brings no CUDA libraries"
    if wish == "auto" and "NVIDIA" in vendors:
        return None, "the CUDA build, several GB (an NVIDIA GPU is here; TORCH=cpu takes the small one)"
    why = "as asked" if wish == "cpu" else "no NVIDIA GPU is seen"
    others = [vendor for vendor in vendors if vendor != "NVIDIA"]
    if others and wish == "auto":
        why += f"; for {' and '.join(others)} devices install their vendor's torch for python3 first"
    if answers(CPU_INDEX):
        return CPU_INDEX, f"the CPU build ({why})"
    return None, (
        f"from where pip is set to look: {CPU_INDEX} does not answer within {ANSWERS_WITHIN:.0f} s.\n"
        "      On Linux that may be the CUDA build, several GB: Ctrl-C stops it, TORCH=https://... names another index."
    )


def lines_of(process: subprocess.Popen[str]) -> Iterator[str | None]:
    """What a process says, line by line; None for each second in which it says nothing."""
    said: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            said.put(line.rstrip())
        said.put(None)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    while True:
        try:
            line = said.get(timeout=1.0)
        except queue.Empty:
            yield None
            continue
        if line is None:
            return
        yield line


@dataclass
class Told:
    """What pip says in fewer words. ``downloaded``, ``found``: bytes so far, from elsewhere and on this machine."""

    screen: Screen
    started: float
    doing: str = "looking up packages"
    downloaded: float = 0.0
    found: float = 0.0
    lines: list[str] = field(default_factory=list)

    def hear(self, line: str | None) -> None:
        if line is not None:
            self.lines.append(line)
            self._understand(line.strip())
        self.screen.now(self.doing, self.started)

    def _understand(self, line: str) -> None:
        if match := re.match(
            r"(Downloading|Using cached) (\S+\.(?:whl|tar\.gz)) \(([\d.]+) (B|kB|MB|GB)\)", line
        ):
            name, size = match[2].rsplit("/", 1)[-1], float(match[3]) * UNITS[match[4]]
            name = "-".join(name.split("-")[:2])
            cached = match[1] != "Downloading"
            self.downloaded += 0 if cached else size
            self.found += size if cached else 0
            self.doing = f"{name}, {readable(size)}"
            if size >= WORTH_A_LINE:
                self.screen.line(
                    f"      {name}: {readable(size)}{' from the cache of pip' if cached else ''}"
                )
        elif match := re.match(r"Progress (\d+) of (\d+)", line):
            self.doing = (
                re.sub(r",.*", "", self.doing) + f", {readable(int(match[1]))} of {readable(int(match[2]))}"
            )
        elif match := re.match(r"Processing (?:file://)?(/\S+\.whl)", line):
            path = Path(match[1])
            size = path.stat().st_size if path.is_file() else 0
            self.found += size
            if size >= WORTH_A_LINE:
                self.screen.line(
                    f"      {'-'.join(path.name.split('-')[:2])}: {readable(size)} from this disk"
                )
        elif line.startswith("Installing collected packages"):
            self.doing = textwrap.shorten(
                f"installing {line.partition(':')[2].strip()}", 70, placeholder=" ..."
            )
        elif line.startswith("Running command Building") or line.startswith("Running command Preparing"):
            self.doing = "building qwenrt"
        elif line.startswith("qwenrt: "):
            self.doing = line.removeprefix("qwenrt: ")
            if not self.doing.startswith("compiled "):
                self.screen.line(f"      {self.doing}")

    def sizes(self) -> str:
        """What was downloaded, and what need not be."""
        found = f", {readable(self.found)} from this machine" if self.found else ""
        return f"{readable(self.downloaded)} downloaded{found}"


def readable(size: float) -> str:
    """12345678 -> "12 MB", as pip counts them."""
    for unit, worth in reversed(UNITS.items()):
        if size >= worth or unit == "B":
            return (
                f"{size / worth:.1f} {unit}"
                if size < 10 * worth and unit != "B"
                else f"{size / worth:.0f} {unit}"
            )
    raise AssertionError("B serves all that is left")


def pip(python: Path, arguments: Sequence[str], screen: Screen, index: str | None = None) -> Told:
    """`pip install`, told; raises Failed with the end of what pip said."""
    started = time.monotonic()
    told = Told(screen, started)
    environment = os.environ | {"PYTHONWARNINGS": "ignore", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    if index is not None:
        environment["PIP_INDEX_URL"] = index
    bar = ["--progress-bar", "raw" if _has_raw_progress(python) else "off"]
    command = [str(python), "-m", "pip", "install", "--verbose", "--no-input", *bar, *arguments]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
        env=environment,
        cwd=ROOT,
    )
    try:
        for line in lines_of(process):
            told.hear(line)
        status = process.wait()
    except BaseException:
        process.terminate()
        raise
    if status:
        errors = [line for line in told.lines if line.startswith("ERROR")] or told.lines[-20:]
        raise Failed("pip could not install it:\n" + "\n".join(errors))
    return told


def _has_raw_progress(python: Path) -> bool:
    version = subprocess.run([str(python), "-m", "pip", "--version"], capture_output=True, text=True).stdout
    match = re.match(r"pip (\d+)\.(\d+)", version)
    return match is not None and (int(match[1]), int(match[2])) >= (24, 1)


def torch_version(python: str | Path) -> str | None:
    """The version of the torch that a Python has."""
    found = "import torch; print(torch.__version__)"
    done = subprocess.run([str(python), "-c", found], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def python_of(environment: Path) -> Path:
    return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def make_environment(environment: Path, screen: Screen) -> None:
    """The virtual environment, unless it is there; it sees the system's packages where torch is one of them."""
    name, version = environment.name, ".".join(map(str, sys.version_info[:3]))
    if python_of(environment).exists():
        screen.line(f"[1/3] the environment {name} is there")
        return
    system = torch_version(sys.executable)
    seen = f", which sees the torch {system} that python3 has" if system else ""
    screen.line(f"[1/3] a virtual environment in {name}, Python {version}{seen}")
    command = [
        sys.executable,
        "-m",
        "venv",
        *(["--system-site-packages"] if system else []),
        str(environment),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = (done.stdout + done.stderr).strip()
        raise Failed(
            f"python -m venv failed. On Debian and Ubuntu: apt install python3-venv.\n{said[-1500:]}"
        )
    upgrade = [str(python_of(environment)), "-m", "pip", "install", "--quiet", "--upgrade", "pip"]
    subprocess.run(upgrade, capture_output=True)  # an old pip serves as well


def install_torch(python: Path, wish: str, screen: Screen) -> None:
    """A torch, unless there is one."""
    version = torch_version(python)
    if version is not None:
        screen.line(f"[2/3] torch {version} is there")
        return
    index, why = choose_torch(wish, sys.platform, drivers())
    screen.line(f"[2/3] torch, {why}")
    started = time.monotonic()
    try:
        told = pip(python, ["-c", "constraints.txt", "torch"], screen, index)
    except Failed as error:
        if "No matching distribution" not in str(error):
            raise
        screen.line(
            "      the version that development uses is not there for this Python: the newest one instead"
        )
        told = pip(python, ["torch>=2.1"], screen, index)
    seconds = time.monotonic() - started
    screen.line(f"      torch {torch_version(python)}: {told.sizes()}, {seconds:.0f} s")


def install_qwenrt(python: Path, extras: str, screen: Screen) -> None:
    """This source tree, editable, so that a change of it is seen at once."""
    screen.line(f"[3/3] qwenrt[{extras}] from this directory")
    started = time.monotonic()
    told = pip(python, ["-e", f".[{extras}]"], screen)
    screen.line(f"      qwenrt: {told.sizes()}, {time.monotonic() - started:.0f} s")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--venv", default=".venv", type=Path, help="where the environment lies (default: .venv)"
    )
    parser.add_argument(
        "--extras", default="cli,server", help="which of pyproject.toml's (default: cli,server)"
    )
    parser.add_argument(
        "--torch",
        default=os.environ.get("TORCH") or "auto",
        help="auto, cpu, default, or an index's address (default: what TORCH says in the environment, or auto)",
    )
    options = parser.parse_args(arguments)
    screen = Screen()
    if sys.version_info < OLDEST:
        version = sys.version.split()[0]
        screen.line(
            f"Python {version} is too old: qwenrt needs 3.10. Name another: make chat PYTHON=python3.12"
        )
        return 1
    python = python_of(Path(os.path.abspath(options.venv)))
    try:
        make_environment(python.parents[1], screen)
        install_torch(python, options.torch, screen)
        install_qwenrt(python, options.extras, screen)
    except Failed as error:
        screen.line(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        screen.line("stopped; what was downloaded stays in the cache of pip")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
