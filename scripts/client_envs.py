"""Makes the environments of clients that cannot live beside each other, for the tests with the marker `agents`.

    python scripts/client_envs.py                  all that are missing, 1.5 GB on the disk
    python scripts/client_envs.py openai-2 npm     these
    python scripts/client_envs.py --newest         all again, with what is newest: how a moving dialect is noticed
    python scripts/client_envs.py --list           what there is, and where

Each is a virtual environment, or a directory that npm filled, below the directory that QWENRT_CLIENT_ENVS names
(~/.cache/qwenrt-clients without it). Programs that npm brings do not run their installation scripts. Needs pip and, for
"npm" and "axe", npm with Node.js 20 or later.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

CACHE = "QWENRT_CLIENT_ENVS"  # environment variable: where the environments lie
NPM, AXE = "npm", "axe"  # the two that are not Python's: agents, and what judges the page's accessibility
# What each environment has. The versions are those that the tests were last seen to pass with.
CLIENTS: dict[str, tuple[str, ...]] = {
    "openai-0": ("openai==0.28.1",),
    "openai-2": ("openai==2.54.0",),
    "langchain": ("langchain-openai==1.7.4",),
    "litellm": ("litellm==1.110.2",),
    "checks": ("llm-comply==0.5.0", "schemathesis==4.32.5"),
    AXE: ("axe-core@4.14.1",),
    NPM: ("@anthropic-ai/claude-code@2.1.197", "@openai/codex@0.171.0", "@qwen-code/qwen-code@0.15.10"),
}
_MADE = "made-of.txt"  # in each environment, written last: what it has


def cache_directory() -> Path:
    """Where the environments are kept unless somebody says otherwise."""
    chosen = os.environ.get(CACHE)
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "qwenrt-clients"


def made_of(name: str, cache: Path) -> list[str]:
    """What an environment was made of; [] where it is missing or was not finished."""
    try:
        return (cache / name / _MADE).read_text().splitlines()
    except OSError:
        return []


def make(name: str, cache: Path, newest: bool = False) -> Path:
    """Make an environment, unless it is there as wanted -> its directory. Raises CalledProcessError where pip or npm
    does not succeed."""
    wanted = [_any_version(package) for package in CLIENTS[name]] if newest else list(CLIENTS[name])
    directory = cache / name
    if made_of(name, cache) == wanted and not newest:
        return directory
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    for command in _commands(name, directory, wanted):
        subprocess.run(command, check=True)
    (directory / _MADE).write_text("\n".join(wanted) + "\n")
    return directory


def _commands(name: str, directory: Path, packages: Sequence[str]) -> list[list[str]]:
    if name in (NPM, AXE):
        options = ["--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
        return [["npm", "install", "--prefix", str(directory), *options, *packages]]
    install = [str(directory / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    return [[sys.executable, "-m", "venv", str(directory)], [*install, *packages]]


def _any_version(package: str) -> str:
    """The package without its version; of a line that is kept for its own sake, the newest of that line."""
    if "==" not in package:
        return package.rpartition("@")[0] + "@latest"
    name, _, version = package.partition("==")
    major = int(version.partition(".")[0])
    return f"{name}>={major},<{major + 1}" if name == "openai" else name


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CLIENTS)}; all without one")
    parser.add_argument("--newest", action="store_true", help="make them again, with the newest versions")
    parser.add_argument("--list", action="store_true", help="only say what there is")
    args = parser.parse_args()
    unknown = sorted(set(args.names) - set(CLIENTS))
    if unknown:
        parser.error(f"{', '.join(unknown)}: not one of {', '.join(CLIENTS)}")
    cache = cache_directory()
    for name in args.names or CLIENTS:
        if not args.list:
            make(name, cache, args.newest)
        print(f"{cache / name}: {', '.join(made_of(name, cache)) or 'not made'}")


if __name__ == "__main__":
    main()
