"""What a user types, and the repository it means: Qwen3-4B, qwen3:4b, Qwen/Qwen3-4B, in any case.

The table of released names (released_names.txt) is data with a date. A name that is not in it, but has the form of one,
is asked of the hub as it is typed.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from qwenrt.errors import CheckpointError
from qwenrt.loader.hub.gguf_files import is_tag

OWNER = "Qwen"
_TABLE = Path(__file__).with_name("released_names.txt")
_REPO = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}")
# The form of a name that may have been released after the table was written.
_LATER = re.compile(
    r"(?:qwen(?:1\.5|2|2\.5|3|3\.[0-9])|qwq)-[a-z0-9][a-z0-9._-]{0,60}[a-z0-9]", re.IGNORECASE
)
# Qwen2.5-Coder-0.5B-Instruct: family Qwen2.5-Coder, size 0.5B, variant Instruct
_PARTS = re.compile(
    r"(?P<family>.+?)-(?P<size>(?:[0-9]+(?:[._][0-9]+)?[BT]|MoE)(?:-A[0-9.]+B)?)(?:-(?P<variant>.+))?",
    re.IGNORECASE,
)
_TAGGED = re.compile(
    r"(?:library/)?(?P<family>[a-z0-9][a-z0-9._-]{0,60}):(?P<tag>[a-z0-9._-]{1,80})", re.IGNORECASE
)
# Ollama's spellings of families whose repositories are spelled otherwise.
_FAMILIES = {"qwen2.5vl": "qwen2.5-vl", "codeqwen": "codeqwen1.5"}
_GGUF = re.compile(r"(?:^|-)(i?q[1-8](?:_[a-z0-9]+)*)$", re.IGNORECASE)
_SIXTEEN_BITS = re.compile(r"-(?:fp16|bf16|f16)$", re.IGNORECASE)
_ROUNDED = re.compile(r"-(?:(?:gptq-)?int[48]|awq|fp8)$", re.IGNORECASE)
# the variant that a name without one means, before the one without a variant
_TO_TALK_TO = ("instruct", "chat")
_ALIKE = 0.55  # how much of two names must be equal for one to be offered in place of the other


@dataclass(frozen=True)
class Meant:
    """The repository that a name means. ``note``: what the name does not say by itself, "" where there is nothing.
    ``gguf``: which of its GGUF files, "" where the name says none."""

    repo: str
    note: str = ""
    gguf: str = ""


@dataclass(frozen=True)
class _Parts:
    """A released name and what it is made of, in lower case."""

    name: str
    family: str
    size: str
    variant: str


def understand(name: str, at_hand: Iterable[str] = ()) -> Meant:
    """The repository that ``name`` means. ``at_hand``: repositories on this machine, which may be of any owner.

    Raises CheckpointError, with the nearest names, for what is no name, and for one that could mean several models.
    """
    at_hand = list(at_hand)
    repo, _, tag = name.partition(":")
    if is_tag(tag) and (_is_repository(repo) or repo.lower().endswith("-gguf")):
        whole = repo if "/" in repo else f"{OWNER}/{repo}"
        return Meant({_folded(one): one for one in at_hand}.get(_folded(whole), whole), gguf=tag)
    spelled = {_folded(repo): repo for repo in at_hand}.get(_folded(name))
    owner, _, bare = name.rpartition("/")
    if owner.lower() in ("", OWNER.lower()) and ":" not in bare:
        known = _by_folded().get(_folded(bare))
        if known is not None:
            return Meant(f"{OWNER}/{known}", about_base(known))
    if spelled is not None:
        return Meant(spelled)
    if _is_repository(name):
        return Meant(name)
    tagged = _TAGGED.fullmatch(name)
    if tagged is not None:
        return _of_tag(name, tagged["family"].lower(), tagged["tag"].lower(), at_hand)
    sizes = _sizes(name.lower())
    if sizes:
        return _of_tag(name, name.lower(), "latest", at_hand)
    if _LATER.fullmatch(name) and ".." not in name:
        return Meant(f"{OWNER}/{name}")
    raise _unknown(name, "it is no directory, no known name, and not of the form 'owner/name'", at_hand)


def nearest(name: str, at_hand: Iterable[str] = (), most: int = 3) -> list[str]:
    """The names most like ``name``, best first: of models on this machine and of released ones. Those of the same
    family or size come before those that are merely spelled alike, quantised ones last unless one is asked for."""
    asked = _folded(name.rpartition("/")[2])
    matcher = difflib.SequenceMatcher(b=asked, autojunk=False)
    alike = []
    for place, candidate in enumerate(dict.fromkeys([*map(short, at_hand), *released()])):
        text = _folded(candidate.rpartition("/")[2])
        matcher.set_seq1(text)
        if min(matcher.real_quick_ratio(), matcher.quick_ratio()) < _ALIKE:
            continue
        if (ratio := matcher.ratio()) >= _ALIKE:
            one, other = _PARTS.fullmatch(asked), _PARTS.fullmatch(text)
            shared = one and other and (one["family"] == other["family"]) + (one["size"] == other["size"])
            rounded = _ROUNDED.search(text) is not None and _ROUNDED.search(asked) is None
            alike.append((0.15 * rounded - 0.2 * (shared or 0) - ratio, place, candidate))
    return [candidate for _, _, candidate in sorted(alike)[:most]]


def did_you_mean(name: str, at_hand: Iterable[str] = ()) -> str:
    """The sentence of an error about a name: the nearest ones, or what a name looks like."""
    close = nearest(name, at_hand)
    if close:
        return f"Did you mean {_either(close)}?"
    return (
        f"Names are such as Qwen3-4B, qwen3:4b, Qwen-7B-Chat (known: those of {table_date()}) or owner/name."
    )


def short(repo: str) -> str:
    """The shortest name that means a repository."""
    owner, _, bare = repo.rpartition("/")
    return _by_folded().get(_folded(bare), repo) if owner.lower() == OWNER.lower() else repo


@cache
def released() -> tuple[str, ...]:
    """The names of the table, in the order of release."""
    lines = _TABLE.read_text(encoding="utf-8").splitlines()
    return tuple(line for line in lines if line and not line.startswith("#"))


@cache
def table_date() -> str:
    """Year and month of the table."""
    return _TABLE.read_text(encoding="utf-8").partition("# date: ")[2].partition("\n")[0]


# ---- names with a tag, as Ollama writes them


def _of_tag(name: str, family: str, tag: str, at_hand: Sequence[str]) -> Meant:
    """family:size or family:size-variant. Without a size the family's only one, else an error that lists them."""
    family = _FAMILIES.get(family, family)
    if family == "qwen":
        raise CheckpointError(
            f"cannot load the model {name[:120]!r}",
            "with other tools this name is Qwen1.5, and here it would be the first Qwen",
            "Give the whole name, as Qwen1.5-7B-Chat or Qwen-7B-Chat.",
        )
    gguf = _GGUF.search(tag)
    if gguf is not None:
        plain = f"{family}:{tag[: gguf.start()]}".rstrip(":")
        raise CheckpointError(
            f"cannot load the model {name[:120]!r}",
            f"{name[-len(gguf[1]) :]} is a quantisation of GGUF files; those released as safetensors are others",
            f"Load {plain} and round its weights at load: quantize='int4' or 'int8' (--quantize int4). Of a GGUF "
            f"repository the whole name is needed: Qwen/Qwen3-4B-GGUF:{gguf[1].upper()}.",
        )
    tag = _SIXTEEN_BITS.sub("", tag)
    members = [parts for parts in _parts() if parts.family == family]
    sizes = _sizes(family)
    if not members:
        raise _unknown(name, f"no released models are known as {family}", at_hand)
    if tag == "latest":
        if len(sizes) > 1:
            some = ", ".join(f"{family}:{size}" for size in sizes)
            raise CheckpointError(
                f"cannot load the model {name[:120]!r}",
                f"it comes in {len(sizes)} sizes",
                f"Choose one: {some}.",
            )
        tag = sizes[0]
    for parts in members:
        for size in dict.fromkeys((parts.size, parts.size.partition("-")[0])):
            if tag == size:
                return _of_size(name, [one for one in members if one.size == parts.size])
            if tag in (f"{size}-{parts.variant}", f"{size}-base", f"{size}-text") and _is_variant(
                parts, tag, size
            ):
                return Meant(f"{OWNER}/{parts.name}", about_base(parts.name))
    raise _unknown(name, f"{family} has no release {tag}", at_hand)


def _is_variant(parts: _Parts, tag: str, size: str) -> bool:
    """Whether a tag names this variant. "base" and "text" are also what a plain name is beside one to talk to."""
    variant = tag.removeprefix(size).removeprefix("-")
    return parts.variant == variant or (
        variant in ("base", "text") and (parts.variant == "base" or _talking_sibling(parts.name) is not None)
    )


def _of_size(name: str, members: Sequence[_Parts]) -> Meant:
    """The release that a size alone means: the one to talk to. The note says which, and which others there are."""
    rank = {variant: place for place, variant in enumerate((*_TO_TALK_TO, ""))}
    chosen = min(members, key=lambda one: rank.get(one.variant, len(rank)))
    others = [one.name for one in members if one is not chosen and not _ROUNDED.search(one.name)]
    beside = f"; others of this size: {', '.join(others)}" if others else ""
    return Meant(f"{OWNER}/{chosen.name}", f"{name} is {OWNER}/{chosen.name}{beside}")


def about_base(name: str) -> str:
    """What is said where a name is that of a base model with a sibling to talk to, which only the name tells apart."""
    sibling = _talking_sibling(name)
    return (
        ""
        if sibling is None
        else f"{name} is a base model, which continues texts; {sibling} answers questions"
    )


def _talking_sibling(name: str) -> str | None:
    """The release to talk to beside a base model; None for a model that is none."""
    own = next((parts for parts in _parts() if parts.name == name), None)
    if own is None or own.variant not in ("", "base"):
        return None
    of_size = [one for one in _parts() if (one.family, one.size) == (own.family, own.size)]
    wanted = ("",) if own.variant == "base" else _TO_TALK_TO
    return next((one.name for one in of_size if one.variant in wanted), None)


# ---- the table, and texts


@cache
def _by_folded() -> dict[str, str]:
    return {_folded(name): name for name in released()}


@cache
def _parts() -> tuple[_Parts, ...]:
    found = []
    for name in released():
        match = _PARTS.fullmatch(name)
        if match is not None:
            texts = (match[key] or "" for key in ("family", "size", "variant"))
            found.append(_Parts(name, *(text.lower().replace("_", ".") for text in texts)))
    return tuple(found)


def _sizes(family: str) -> list[str]:
    return list(dict.fromkeys(parts.size for parts in _parts() if parts.family == family))


def _folded(name: str) -> str:
    """A name as it is compared: in lower case, 1_8B and 1.8B alike, a tag as a part of the name."""
    return name.lower().replace("_", ".").replace(":", "-")


def _is_repository(name: str) -> bool:
    wrong = ".." in name or "--" in name or name.endswith((".git", "-", "."))
    return _REPO.fullmatch(name) is not None and not wrong


def _unknown(name: str, found: str, at_hand: Sequence[str]) -> CheckpointError:
    return CheckpointError(f"cannot load the model {name[:120]!r}", found, did_you_mean(name, at_hand))


def _either(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
