"""The GGUF models among a repository's files, and which of them a tag means: Qwen/Qwen3-4B-GGUF:Q4_K_M."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from qwenrt.errors import CheckpointError
from qwenrt.loader.checkpoint.gguf.directory import part_of

SUFFIX = ".gguf"
# What people call a file's types, which stands at the end of its name: Q4_K_M, IQ4_XS, UD-Q4_K_XL, BF16, MXFP4_MOE.
_TYPES = r"(?:ud-)?(?:i?q[1-8](?:_[a-z0-9]+)*|mxfp4(?:_[a-z0-9]+)*|tq[12]_0|bf16|fp?16|fp?32)"
_AT_THE_END = re.compile(rf"(?:^|[-._])({_TYPES})$", re.IGNORECASE)
_TAG = re.compile(rf"{_TYPES}|[A-Za-z0-9_][A-Za-z0-9_.-]{{0,95}}\.gguf", re.IGNORECASE)


def is_tag(text: str) -> bool:
    """Whether a text can stand for a GGUF file: the types in it, or its whole name."""
    return _TAG.fullmatch(text) is not None


def models(names: Iterable[str]) -> dict[str, list[str]]:
    """The models among files of these names: by tag, in capitals, the file or all parts of the set that are there, in
    their order. Where two have the same types, or a name tells none, the tag is the file's name. What lies in folders,
    and vision towers (mmproj), are no models."""
    sets: dict[str, list[str]] = {}
    for name in sorted(names):
        if name.lower().endswith(SUFFIX) and "/" not in name and not name.lower().startswith("mmproj"):
            part = part_of(name)
            sets.setdefault(name[: -len(SUFFIX)] if part is None else part[0], []).append(name)
    tags: dict[str, list[str]] = {}
    for stem in sets:
        types = _AT_THE_END.search(stem)
        tags.setdefault(stem + SUFFIX if types is None else types[1].upper(), []).append(stem)
    return {
        (tag if len(stems) == 1 else stem + SUFFIX): sets[stem]
        for tag, stems in tags.items()
        for stem in stems
    }


def chosen(names: Iterable[str], tag: str, repo: str, asked: str) -> list[str]:
    """The files of the model that ``tag`` means among a repository's. Raises CheckpointError with the nearest tags."""
    found = models(names)
    wanted = tag.lower()
    for known, files in found.items():
        if wanted == known.lower() or (wanted.endswith(SUFFIX) and wanted in map(str.lower, files)):
            part = part_of(files[0])
            if part is not None and len(files) != part[2]:
                lacking = f"{len(files)} of the {part[2]} parts of {known} are there"
                raise CheckpointError(asked, lacking, "Choose another file, or ask again later.")
            return files
    if not found:
        raise CheckpointError(asked, "it has no GGUF files beside its README", f"Load {repo} without :{tag}.")
    close = difflib.get_close_matches(tag.upper(), found, 3, 0.5)
    meant = f"Did you mean {' or '.join(f'{repo}:{one}' for one in close)}?" if close else said(repo, found)
    listed = ", ".join(found) if len(found) <= 24 else f"{', '.join([*found][:24])}, ..."
    raise CheckpointError(asked, f"none of its {len(found)} GGUF models is {tag}: {listed}", meant)


def said(repo: str, found: Iterable[str]) -> str:
    """How one of the tags is asked for."""
    tags = list(found)
    usual = next((tag for tag in ("Q4_K_M", "Q8_0") if tag in tags), tags[0])
    return f"Say which file, as {repo}:{usual}."
