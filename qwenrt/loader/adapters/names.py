"""What peft calls an adapter's tensors: the module's own path in the model, then what the tensor is for it."""

from __future__ import annotations

import re
from dataclasses import dataclass

PREFIX = "base_model.model."
WEIGHTS, PICKLED = "adapter_model.safetensors", "adapter_model.bin"
_WRAPPERS = re.compile(r"_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.")
_NAME = r"(?:\.[A-Za-z0-9_-]+)?"  # of the adapter, which some programs leave in
# what follows a module's path -> what the tensor is; the first that fits counts
_KINDS = (
    (rf"lora_A{_NAME}\.weight", "a"),
    (rf"lora_B{_NAME}\.weight", "b"),
    (rf"lora_B{_NAME}\.bias", "b_bias"),
    (rf"lora_embedding_A{_NAME}", "embedding_a"),
    (rf"lora_embedding_B{_NAME}", "embedding_b"),
    (rf"lora_magnitude_vector{_NAME}(?:\.weight)?", "magnitude"),
    (rf"token_adapter\.trainable_tokens_delta{_NAME}", "token_rows"),
    (r"(?:token_adapter\.)?base_layer\.weight", "base"),
    (r"base_layer\.bias|bias", "bias"),
    (rf"(?:original_module\.|modules_to_save{_NAME}\.)?weight", "whole"),
)
_RULES = [(re.compile(rf"(?P<module>.+?)\.(?:{kind})"), name) for kind, name in _KINDS]


@dataclass(frozen=True)
class Piece:
    """What one tensor is: ``module`` is its owner's path in the model, ``kind`` what it is for that. "a" and "b": a
    pair; "b_bias": the bias of B; "embedding_a", "embedding_b": a pair for the embedding; "magnitude": DoRA's;
    "token_rows": new rows of some tokens; "base": the base's own weight, saved beside; "bias": a new bias; "whole": a
    whole module's weight."""

    module: str
    kind: str


def piece_of(name: str) -> Piece | None:
    """What the tensor ``name`` is; None where peft writes none like it."""
    path = _WRAPPERS.sub("", name.removeprefix(PREFIX)).removeprefix(PREFIX)
    for pattern, kind in _RULES:
        if found := pattern.fullmatch(path):
            return Piece(found["module"], kind)
    return None
