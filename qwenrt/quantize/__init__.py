"""A dense checkpoint quantised by GPTQ or AWQ, layer by layer, on texts that show which errors matter."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qwenrt.called import as_function
from qwenrt.config import ModelConfig, read_model_config
from qwenrt.config.layers import LinearSpec
from qwenrt.errors import ConfigError, RequestError
from qwenrt.loader.checkpoint.as_stored import as_stored
from qwenrt.loader.checkpoint.checkpoint import open_checkpoint
from qwenrt.loader.checkpoint.writing import check_room, claim_directory
from qwenrt.loader.hub.resolve import source_of
from qwenrt.loader.weights import WeightReader, open_weights
from qwenrt.model.qwen import Qwen
from qwenrt.quantize.calibration import texts_for, warn_if_few
from qwenrt.quantize.finished import (
    PARTS,
    TEXTS,
    FinishedLayers,
    begin_anew,
    check_fingerprint,
    claimed,
    fingerprint,
    fingerprint_of_texts,
)
from qwenrt.quantize.layer import Recorder
from qwenrt.quantize.report import QuantizeReport
from qwenrt.quantize.run import Quantizer, is_quantized
from qwenrt.quantize.settings import SELF, QuantizeSettings
from qwenrt.quantize.writer import write_directory

__all__ = ["QuantizeReport", "QuantizeSettings", "quantize"]
REPORT = "quantize_report.json"
logger = logging.getLogger("qwenrt")
as_function(__name__)


def quantize(
    model: str | Path,
    output_dir: str | Path,
    *,
    calibration: str | Path | Sequence[Any] = SELF,
    resume: bool = True,
    overwrite: bool = False,
    progress: bool | None = None,
    **settings: Any,
) -> QuantizeReport:
    """Quantise the dense checkpoint ``model``, a directory or a name as of `load`, and write a complete new one to
    ``output_dir``, in GPTQ's or AWQ's format.

    ``calibration``: a JSON or JSON-lines file of conversations or texts, a file of plain text, a list of entries, of
    texts or of token ids, or "self": the model writes them. Keyword settings: see QuantizeSettings (``method``,
    ``bits``, ``group_size``, ``sym``, ``act_order``, ``samples``, ``sample_length``, ...). One layer is in memory at a
    time, in float32, and the residual stream of all texts. What the model wrote and each layer are kept when they are
    done, and the same call goes on after a cut (``resume``) with the same result. An ``output_dir`` that holds
    anything else is refused unless ``overwrite``. Raises RequestError for settings, texts
    and ``output_dir``, ConfigError and CheckpointError for the model's files.
    """
    began = time.monotonic()
    options = QuantizeSettings(**settings)
    source, target = source_of(model), Path(output_dir)
    config = read_model_config(source)
    checkpoint = open_checkpoint(source)
    config = as_stored(config, checkpoint)
    _check_source(source, config)
    backend = Recorder(torch.device("cpu"))
    network = Qwen(config, backend, torch.float32)
    reader = open_weights(network, checkpoint, config, backend, torch.float32)
    quantized = [spec for spec in network.linear_specs.values() if is_quantized(spec, options)]
    _claim(target, source, overwrite)
    with claimed(target) as parts, torch.no_grad():
        check_room(target, _room(config, quantized, options, checkpoint.nbytes))
        if not resume:
            begin_anew(parts)
        check_fingerprint(parts, fingerprint(reader, options))  # before the model writes for hours
        calibrating, held_out = texts_for(source, calibration, options, progress, parts / TEXTS)
        _check_ids([*calibrating, *held_out], config.vocab_size)
        if options.calibrates:
            warn_if_few(calibrating, max(spec.in_features for spec in quantized))
        check_fingerprint(parts, fingerprint_of_texts([*calibrating, *held_out]))
        finished = FinishedLayers(parts, options, config, reader.inventory)
        quantizer = _quantizer(network, reader, options, calibrating, held_out)
        linears = _run(quantizer, finished, progress)
        effect = quantizer.effect()
        nbytes = write_directory(
            source, target, reader, finished, quantized, options, sys.modules["qwenrt"].__version__
        )
    names = ("source", "rounded", "result")
    report = QuantizeReport(
        output_dir=target,
        linears=tuple(linears),
        calibration_tokens=sum(map(len, calibrating)) if options.calibrates else 0,
        held_out_tokens=effect.tokens,
        perplexity=dict(zip(names, effect.perplexities(), strict=True)),
        divergence=dict(zip(names[1:], effect.mean_divergences(), strict=True)),
        source_bytes=checkpoint.nbytes,
        result_bytes=nbytes,
        seconds=time.monotonic() - began,
    )
    text = json.dumps(dataclasses.asdict(report), indent=1, default=str)
    (target / REPORT).write_text(text + "\n", encoding="utf-8")
    shutil.rmtree(target / PARTS)
    return report


def _quantizer(
    model: Qwen,
    reader: WeightReader,
    options: QuantizeSettings,
    calibrating: Sequence[Sequence[int]],
    held_out: Sequence[Sequence[int]],
) -> Quantizer:
    """With the embedding set as it is stored: its rows are all that is read of it."""
    name = reader.inventory.slots["embed_tokens"]["", "weight"]
    embedding = reader.reader.tensor(name)
    model.set_tensor("embed_tokens", embedding)
    kept = torch.float32 if embedding.dtype == torch.float32 else torch.bfloat16
    return Quantizer(model, reader, options, calibrating, held_out, kept)


def _run(quantizer: Quantizer, finished: FinishedLayers, progress: bool | None) -> list[Any]:
    from tqdm import tqdm

    layers = quantizer.model.config.num_layers
    with tqdm(
        total=layers, desc="quantising", unit="layer", disable=None if progress is None else not progress
    ) as bar:
        return quantizer.run(finished, bar.set_postfix_str, bar.update)


def _check_source(source: Path, config: ModelConfig) -> None:
    asked = f"quantising {source}"
    if config.quant is not None and config.quant.method != "fp8":
        found = f"its weights are quantised already ({config.quant.name})"
        raise ConfigError(asked, found, "Give the dense checkpoint that it was made from.")
    if not config.has_head or not config.is_causal:
        found = "it makes embeddings and writes no texts"
        raise ConfigError(asked, found, 'Load it with quantize="int8" or "int4" instead.')


def _check_ids(texts: Sequence[Sequence[int]], vocab_size: int) -> None:
    for number, text in enumerate(texts, 1):
        wrong = next((token for token in text if not 0 <= token < vocab_size), None)
        if wrong is not None:
            found = f"text {number} has the token {wrong}, and the model a vocabulary of {vocab_size}"
            raise RequestError("calibrating", found, "Tokenise it with the model's own tokenizer.")


def _claim(target: Path, source: Path, overwrite: bool) -> None:
    """Create the output directory. RequestError where it is the model's own, holds other files, or cannot be written
    to."""
    if target.resolve() == source.resolve():
        found = "it is the model's own directory"
        raise RequestError(f"writing the new checkpoint to {target}", found, "Give another one.")
    claim_directory(target, overwrite, lambda names: PARTS in names)


def _room(
    config: ModelConfig, quantized: Sequence[LinearSpec], options: QuantizeSettings, source_bytes: int
) -> int:
    """Bytes that are written: the layers lie there twice for a while."""
    numbers = sum(spec.in_features * spec.out_features for spec in quantized)
    group = options.group_size if options.group_size > 0 else config.hidden_size
    codes = numbers * options.bits // 8 + numbers * (2 + options.bits // 8 + 1) // group
    return 2 * codes + max(0, source_bytes - numbers * 2)
