"""What a checkpoint's files say about the network, which counts more than config.json. Needs no torch."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from qwenrt.config import ModelConfig
from qwenrt.config.layers import LinearSpec, head_linear, kinds_of_layers, layer_linears, mtp_linears
from qwenrt.config.quant import Correction, QuantConfig
from qwenrt.errors import ConfigError
from qwenrt.loader.checkpoint.checkpoint import Checkpoint, same_bytes
from qwenrt.loader.checkpoint.formats import FP8, StoredLinear, format_of
from qwenrt.loader.checkpoint.header import TensorEntry
from qwenrt.loader.checkpoint.names import table_for
from qwenrt.ops.ggml_types import CODED

_NUMBER = re.compile(r"\.[0-9]+")
logger = logging.getLogger("qwenrt")


def as_stored(config: ModelConfig, checkpoint: Checkpoint) -> ModelConfig:
    """``config``, corrected by the files: whether the head is the embedding, and which linears have another
    format than its quantisation says. Estimates of memory and loading itself use the result.

    Reads headers and, where a config says that head and embedding are one and the file has both, those two.
    """
    tensors = _tensors(config, checkpoint)
    config = _with_head(config, checkpoint, tensors)
    config = _with_mtp(config, checkpoint, tensors)
    if config.quant is None:
        return config
    if not any(map(_is_quantised, tensors.values())):
        logger.warning(
            "config.json says that %s is quantised (%s), and all of its weights are dense: it is loaded as dense",
            checkpoint.directory,
            config.quant.method,
        )
        return replace(config, quant=None)
    if not config.quant.has_codes:
        return config
    corrections = tuple(_corrections(config, config.quant, tensors))
    return replace(config, quant=replace(config.quant, corrections=corrections))


_Tensors = dict[tuple[str, str], dict[str, TensorEntry]]  # (parameter, part) -> kind -> tensor


def _tensors(config: ModelConfig, checkpoint: Checkpoint) -> _Tensors:
    table, found = table_for(config.model_type, config.with_mtp), _Tensors()
    for name, entry in checkpoint.tensors.items():
        slot = table.locate(name)
        if slot is not None and not slot.ignored:
            found.setdefault((slot.param, slot.part), {})[slot.kind] = entry
    return found


# ---- the head


def _with_head(config: ModelConfig, checkpoint: Checkpoint, tensors: _Tensors) -> ModelConfig:
    """The config with tied embeddings or not, as the file has them. A head in the file is used, whatever the flag
    says, unless it is a copy of the embedding; without one the embedding is used if the config says so; else there is
    no head."""
    embedding = tensors.get(("embed_tokens", ""), {}).get("weight")
    head = tensors.get(("lm_head", ""), {})
    if not head and embedding is not None and not config.tie_word_embeddings:
        logger.warning(
            "%s has no lm_head, and config.json says that it is not the embedding: texts can be embedded, not written",
            checkpoint.directory,
        )
        return replace(config, tie_word_embeddings=True, has_head=False)
    if not config.tie_word_embeddings or not head or embedding is None:
        return config
    dense = head.get("weight")
    if dense is not None and len(head) == 1 and (not dense.nbytes or same_bytes(dense, embedding)):
        return config
    logger.warning(
        "config.json says that head and embedding are one (tie_word_embeddings), and lm_head of %s is another "
        "matrix than embed_tokens: the file's own head serves",
        checkpoint.directory,
    )
    return replace(config, tie_word_embeddings=False)


def _with_mtp(config: ModelConfig, checkpoint: Checkpoint, tensors: _Tensors) -> ModelConfig:
    """The head that guesses the token after next, if it is asked for and there: one layer, with the embedding and the
    head of the model itself. Raises ConfigError."""
    if not config.with_mtp:
        return config
    found = ""
    if ("mtp.fc", "") not in tensors:
        found = f"{checkpoint.directory} has no MTP head: among its {len(checkpoint.tensors)} tensors is no mtp.fc"
    elif any(param.startswith("mtp.layers.1.") for param, _ in tensors):
        found = (
            f"the MTP head of {checkpoint.directory} has several layers, and those that are known have one"
        )
    if found:
        remedy = 'Load it without draft="mtp" (a request may ask for draft="lookup"), or take a release that has it.'
        raise ConfigError('draft="mtp"', found, remedy)
    return replace(config, mtp_layers=1)


# ---- formats


def _is_quantised(kinds: dict[str, TensorEntry]) -> bool:
    weight = kinds.get("weight")
    coded = weight is not None and (weight.dtype == FP8 or weight.dtype in CODED)
    return coded or bool(kinds.keys() - {"weight", "bias"})


def _corrections(config: ModelConfig, quant: QuantConfig, tensors: _Tensors) -> Iterator[Correction]:
    """How many matrices more or fewer of which format there are than ``quant`` says: of those left dense, and of those
    with other bits or groups; the head, which it counts as dense. Where head and embedding are one matrix in codes,
    the head keeps them and the embedding, which is dense, comes to it."""
    specs, found = _specs(config), Counter[tuple[int, int, int, int, int]]()
    embedding = tensors.get(("embed_tokens", ""), {}).get("weight")
    if config.tie_word_embeddings and config.has_head and embedding is not None and embedding.dtype in CODED:
        kind = CODED[embedding.dtype]
        form = kind.bits, kind.group_size, kind.group_bytes
        found[(config.vocab_size, config.hidden_size, *form)] += 1
    for (param, part), kinds in tensors.items():
        spec = specs.get(_NUMBER.sub("", param))
        if spec is None:
            continue
        stated = (quant.bits, quant.group_size, quant.group_bytes) if spec.quantizable else (16, 0, 0)
        rows = dict(spec.parts).get(part, spec.out_features)
        found_format = format_of(
            StoredLinear(param, rows, spec.in_features, {k: kinds[k] for k in kinds if k != "bias"}), quant
        )
        own = stated
        if not isinstance(found_format, str):
            own = (found_format.bits, found_format.group_size, found_format.group_bytes)
        if own != stated:
            found[(rows, spec.in_features, *own)] += 1
            found[(rows, spec.in_features, *stated)] -= 1
    return (Correction(*form[:4], number, form[4]) for form, number in found.items() if number)


def _specs(config: ModelConfig) -> dict[str, LinearSpec]:
    """The linears by name without the numbers of layer and expert, in which they do not differ."""
    one = config if config.moe is None else replace(config, moe=replace(config.moe, num_experts=1, top_k=1))
    specs = [head_linear(config)]
    for layer, _ in kinds_of_layers(config):
        specs += layer_linears(one, layer)
    specs += mtp_linears(one)
    return {_NUMBER.sub("", spec.name): spec for spec in specs}
