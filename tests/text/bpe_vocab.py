"""The files of the later generations, written from the ranks of a vocabulary."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from qwenrt.errors import ConfigError, QwenrtError
from qwenrt.text.chat.chat_tokenizer import ChatTokenizer
from qwenrt.text.tokenizer.merges import FORMS_OF_BYTES
from qwenrt.text.tokenizer.vocabulary import SPLIT_PATTERN

# What Qwen3 adds to the 151643 ordinary tokens, in order; the first fourteen are control tokens.
CONTROL = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
]
SHOWN = [
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
]
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}


def small_bpe_ranks() -> dict[bytes, int]:
    """273 tokens that merges can make; small_ranks has one that none can."""
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [
        t.encode() for t in ("he", "ll", "hell", "hello", " w", "or", " wor", "ld", " world", "  ", "\n\n")
    ]
    tokens += [
        b"\xe4\xbd",
        "你".encode(),
        "好".encode()[:2],
        "好".encode(),
        "你好".encode(),
        "éé".encode()[1:3],
    ]
    return {token: rank for rank, token in enumerate(tokens)}


def form(token: bytes) -> str:
    return "".join(FORMS_OF_BYTES[byte] for byte in token)


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """One merge for each token: what is left of its bytes before the step that makes it."""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda entry: entry[1]):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            joined = [ranks.get(a + b, rank) for a, b in pairwise(parts)]
            at = joined.index(min(joined))
            assert joined[at] < rank, token
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


def added_tokens(first_id: int, shown: list[str] = SHOWN) -> list[dict[str, Any]]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": first_id + i, "content": content, **flags, "special": content in CONTROL}
        for i, content in enumerate([*CONTROL, *shown])
    ]


def vocab_json(ranks: dict[bytes, int]) -> dict[str, int]:
    return {form(token): rank for token, rank in ranks.items()}


def merges_txt(merges: list[tuple[bytes, bytes]]) -> str:
    return "#version: 0.2\n" + "".join(f"{form(a)} {form(b)}\n" for a, b in merges)


def tokenizer_json(
    ranks: dict[bytes, int],
    merges: list[tuple[bytes, bytes]],
    added: list[dict[str, Any]] | None = None,
    pattern: str = SPLIT_PATTERN,
) -> dict[str, Any]:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens(len(ranks)) if added is None else added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                {**BYTE_LEVEL},
            ],
        },
        "post_processor": {**BYTE_LEVEL},
        "decoder": {**BYTE_LEVEL},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab_json(ranks),
            "merges": [[form(a), form(b)] for a, b in merges],
        },
    }


def tokenizer_config(first_id: int, eos: Any = "<|im_end|>", **more: Any) -> dict[str, Any]:
    decoder = {
        str(entry["id"]): {k: v for k, v in entry.items() if k != "id"} for entry in added_tokens(first_id)
    }
    return {
        "added_tokens_decoder": decoder,
        "bos_token": None,
        "eos_token": eos,
        "pad_token": "<|endoftext|>",
        **more,
    }


def write(directory: Path, **files: Any) -> Path:
    """``vocab_json=...`` becomes vocab.json, ``merges_txt=...`` merges.txt; what is not text becomes JSON."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        stem, _, suffix = name.rpartition("_")
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        (directory / f"{stem}.{suffix}").write_bytes(text.encode())
    return directory


RANKS = small_bpe_ranks()
MERGES = merges_of(RANKS)
FIRST = len(RANKS)  # id of <|endoftext|> in the small vocabulary


def pair_of(directory: Path, **files: Any) -> Path:
    return write(directory, **{"vocab_json": vocab_json(RANKS), "merges_txt": merges_txt(MERGES), **files})


def small_json(**changes: Any) -> dict[str, Any]:
    file = tokenizer_json(RANKS, MERGES)
    for name, value in changes.items():
        place: Any = file
        *path, last = name.split("__")
        for key in path:
            place = place[int(key) if key.isdigit() else key]
        place[int(last) if last.isdigit() else last] = value
    return file


def load_json(directory: Path, **changes: Any) -> ChatTokenizer:
    return ChatTokenizer.from_dir(write(directory, tokenizer_json=small_json(**changes)))


def refused(directory: Path, found: str, error: type[QwenrtError] = ConfigError) -> None:
    with pytest.raises(error, match=found) as caught:
        ChatTokenizer.from_dir(directory)
    assert caught.value.remedy and str(directory) in str(caught.value)
