"""Whether a package can be imported, found out in a process of its own: a broken one may end the process, or hang."""

from __future__ import annotations

import re
import subprocess
import sys
import traceback
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

_TIMEOUT_S = 120.0
_AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
NO_EXTENSIONS = {_AUTOLOAD: "0"}  # torch loads no vendor's extension by itself
# What an import says -> how that is mended; the first that fits. Libraries are named as loaders name them.
_CURES = (
    (("compiled using NumPy 1",), 'this torch was built for NumPy 1: pip install "numpy<2"'),
    (
        ("Two accelerators",),
        "torch_npu serves beside no GPU: install the CPU's build of torch (index https://download.pytorch.org/whl/cpu)",
    ),
    (
        ("undefined symbol: acl", "undefined symbol: Hccl", "undefined symbol: ge"),
        "CANN is older or newer than torch_npu wants: install the two that belong together",
    ),
    (
        ("undefined symbol", "version `"),
        "packages of different builds are mixed: install them from one source",
    ),
    (
        ("libascend_hal", "libdrv"),
        "this is the driver's: install it (Ascend HDK), or in a container mount /usr/local/Ascend/driver; "
        "LD_LIBRARY_PATH has to have its lib64/driver and lib64/common",
    ),
    (("libgalaxyhip", "libhsa-runtime", "libamdhip64"), "source /opt/dtk/env.sh (or ROCm's), then try again"),
    (
        ("libascend", "libhccl", "libopapi", "libge_", "libacl", "libgraph", "torch_npu", "CANN"),
        "source /usr/local/Ascend/cann/set_env.sh (up to CANN 8.3: .../ascend-toolkit/set_env.sh), then try again; "
        "if that has no such library either, install CANN again",
    ),
    (
        ("libcu", "libnv", "libnccl"),
        "a CUDA library of torch's is missing: pip install --force-reinstall torch, or install the CPU's build",
    ),
    (
        ("takes more than",),
        "it may only be slow (a busy machine, a disk over the network): try again; where it never ends, a driver hangs",
    ),
    (("Killed", "SIGKILL", "MemoryError"), "there was not enough memory: free some, or raise the limit"),
)
_ERROR = re.compile(r"[\w.]*(Error|Exception)\b")
_OTHERWISE = "pip install --force-reinstall {}, or your device vendor's build of it"


def installed(package: str) -> str | None:
    """The version of a package, by what is written of it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def failure(package: str, environment: Mapping[str, str], timeout_s: float = _TIMEOUT_S) -> str | None:
    """What an import of ``package`` says in a process with that environment, in a line; None where it works."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", f"import {package}"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            env=dict(environment),
        )
    except subprocess.TimeoutExpired:
        return f"importing it takes more than {timeout_s:g} seconds"
    except OSError as error:
        return f"no process could be started: {error.strerror or error}"
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    # torch_npu's errors end in a line of numbers, behind the one that says what it is
    last = next((line for line in reversed(lines) if _ERROR.match(line)), (lines or [""])[-1])
    if done.returncode < 0:
        return f"importing it ends the process by signal {-done.returncode}{': ' if last else ''}{last}"
    return last or f"importing it ends the process with exit status {done.returncode}"


def cure(package: str, said: str) -> str:
    """How to mend an import that failed so."""
    known = next((remedy for words, remedy in _CURES if any(word in said for word in words)), None)
    return known or _OTHERWISE.format(package)


def said_of_torch(error: BaseException) -> str | None:
    """What there is to say where ``error`` ended torch's import in this process; None where it did not."""
    files = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    if "torch" in sys.modules or not any(file.parts[-2:] == ("torch", "__init__.py") for file in files):
        return None
    said = str(error.__cause__ or error).strip()
    extension = re.search(r"backend extension: (\w+)", str(error))
    if extension is None:
        return f"importing torch: {said}. {cure('torch', said)}. qwenrt doctor says more."
    package = extension[1]
    return (
        f"importing torch, which loads {package} by itself: {said}. {cure(package, said)}. Until then {_AUTOLOAD}=0 "
        "makes torch start without it. qwenrt doctor says more."
    )


def only_an_extension(environment: Mapping[str, str]) -> bool:
    """Whether a torch that cannot be imported can without the vendors' extensions that it loads by itself."""
    return failure("torch", {**environment, **NO_EXTENSIONS}) is None
