"""The pipeline a tokenizer.json describes, checked step by step: what is not Qwen's is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenrt.config import read_json
from qwenrt.errors import ConfigError
from qwenrt.text.tokenizer.vocabulary import MAX_TOKEN_ID, SPLIT_PATTERN

# Qwen3.5 keeps combining marks with their word.
_WITH_MARKS = SPLIT_PATTERN.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(
    r" ?[^\s\p{L}", r" ?[^\s\p{L}\p{M}"
)
KNOWN_PATTERNS = (SPLIT_PATTERN, _WITH_MARKS)
_REMEDY = (
    "Only byte-level BPE with one of Qwen's split patterns is supported: this is another kind of tokenizer."
)


@dataclass(frozen=True)
class TokenizerJson:
    """vocab, merges, added_tokens: as the file has them, unchecked. pattern, nfc, ignore_merges: checked.

    ignore_merges: a piece that is a token is that token, whatever the merges make of it.
    """

    path: Path
    vocab: Mapping[str, object]
    merges: list[object]
    added_tokens: object
    pattern: str
    nfc: bool
    ignore_merges: bool
    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...] | None


def read_tokenizer_json(path: Path) -> TokenizerJson:
    """Read the file. ConfigError names the step of its pipeline that this package does not have."""
    file = read_json(path)
    model = _object(file.get("model"), path, "model")
    _check_model(model, path)
    vocab, merges = _object(model.get("vocab"), path, "model.vocab"), model.get("merges")
    if not isinstance(merges, list):
        raise _bad(path, "model.merges", f"a JSON {type(merges).__name__}, not a list")
    _check_byte_level(file.get("decoder"), path, "decoder")
    before, after = _around_a_text(file.get("post_processor"), path)
    return TokenizerJson(
        path,
        vocab,
        merges,
        file.get("added_tokens") or [],
        pattern=_pattern(file.get("pre_tokenizer"), path),
        nfc=_composes(file.get("normalizer"), path),
        ignore_merges=model.get("ignore_merges") is True,
        prefix_ids=before,
        suffix_ids=after,
    )


def _check_model(model: Mapping[str, Any], path: Path) -> None:
    # The oldest files name no type; theirs is told from its fields.
    if model.get("type", "BPE" if "merges" in model else None) != "BPE":
        raise _bad(path, "model.type", f"{model.get('type')!r:.40}, not 'BPE'")
    for name in (
        "dropout",
        "unk_token",
        "continuing_subword_prefix",
        "end_of_word_suffix",
        "fuse_unk",
        "byte_fallback",
    ):
        if model.get(name):
            raise _bad(path, f"model.{name}", f"{model[name]!r:.60}, which no Qwen has")
    if not isinstance(model.get("ignore_merges"), bool | None):
        raise _bad(path, "model.ignore_merges", f"{model['ignore_merges']!r:.60}, not true or false")


def _composes(normalizer: object, path: Path) -> bool:
    if normalizer is None:
        return False
    steps = _steps(normalizer, "normalizers", path, "normalizer")
    for where, step in steps:
        if step.get("type") != "NFC":
            raise _bad(path, where, f"{step.get('type')!r:.40}, not NFC")
    return bool(steps)


def _pattern(pre_tokenizer: object, path: Path) -> str:
    """The regular expression of a Split that is followed by a ByteLevel without one of its own."""
    steps = _steps(pre_tokenizer, "pretokenizers", path, "pre_tokenizer")
    types = [step.get("type") for _, step in steps]
    if types != ["Split", "ByteLevel"]:
        raise _bad(path, "pre_tokenizer", f"{' + '.join(map(str, types)):.100}, not Split + ByteLevel")
    (where, split), (where_bytes, byte_level) = steps
    _check_byte_level(byte_level, path, where_bytes)
    # Absent, both default to true.
    for name in ("add_prefix_space", "use_regex"):
        if byte_level.get(name, True) is not False:
            raise _bad(path, f"{where_bytes}.{name}", f"{byte_level.get(name)!r:.40}, not false")
    if split.get("behavior") != "Isolated" or split.get("invert", False) is not False:
        found = f"behavior {split.get('behavior')!r:.40}, invert {split.get('invert')!r:.40}"
        raise _bad(path, where, f"{found}, not 'Isolated' and false")
    pattern = split.get("pattern")
    regex = pattern.get("Regex") if isinstance(pattern, dict) else None
    if regex not in KNOWN_PATTERNS:
        raise _bad(
            path, f"{where}.pattern", f"{pattern!r:.200} is none of the {len(KNOWN_PATTERNS)} known ones"
        )
    return str(regex)


def _around_a_text(processor: object, path: Path) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """The ids that the post-processor puts before and after a text; None for the latter where it has no template."""
    before: tuple[int, ...] = ()
    after: tuple[int, ...] | None = None
    if processor is None:
        return before, after
    for where, step in _steps(processor, "processors", path, "post_processor"):
        if step.get("type") == "TemplateProcessing":
            outer, inner = _template_ids(step, path, where)
            before, after = outer + before, (after or ()) + inner
        else:
            _check_byte_level(step, path, where)
    return before, after


def _template_ids(step: Mapping[str, Any], path: Path, where: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    single, known = step.get("single"), step.get("special_tokens")
    sides: list[list[int]] = [[]]
    for piece in single if isinstance(single, list) else []:
        if isinstance(piece, dict) and "Sequence" in piece:
            sides.append([])
            continue
        special = piece.get("SpecialToken") if isinstance(piece, dict) else None
        name = special.get("id") if isinstance(special, dict) else None
        token = known.get(name) if isinstance(known, dict) and isinstance(name, str) else None
        ids = token.get("ids") if isinstance(token, dict) else None
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i <= MAX_TOKEN_ID for i in ids):
            raise _bad(path, where, f"a template with the unknown piece {piece!r:.100}")
        sides[-1] += ids
    if len(sides) != 2:
        raise _bad(path, where, f"a template with the text {len(sides) - 1} times, not once: {single!r:.100}")
    return tuple(sides[0]), tuple(sides[1])


def _check_byte_level(step: object, path: Path, where: str) -> None:
    found = step.get("type") if isinstance(step, dict) else step
    if found != "ByteLevel":
        raise _bad(path, where, f"{found!r:.60}, not ByteLevel")


def _steps(step: object, name: str, path: Path, where: str) -> list[tuple[str, Mapping[str, Any]]]:
    """The steps of a Sequence, or the one step that is none, each with its place in the file."""
    one = _object(step, path, where)
    if one.get("type") != "Sequence":
        return [(where, one)]
    steps = one.get(name)
    if not isinstance(steps, list):
        raise _bad(path, f"{where}.{name}", f"a JSON {type(steps).__name__}, not a list")
    return [
        (f"{where}.{name}[{i}]", _object(each, path, f"{where}.{name}[{i}]")) for i, each in enumerate(steps)
    ]


def _object(value: object, path: Path, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise _bad(path, where, f"a JSON {type(value).__name__}, not an object")
    return value


def _bad(path: Path, where: str, found: str) -> ConfigError:
    return ConfigError(f"reading {path}, {where}", found, _REMEDY)
