"""A merged model quantised again, and whether anything of the adapter is left in it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qwenrt.config import read_json
from qwenrt.config.adapter import FILE
from qwenrt.config.layers import layer_linears, layer_tensors
from qwenrt.errors import CheckpointError, RequestError
from qwenrt.files import is_there, read
from qwenrt.loader.adapters.names import WEIGHTS
from qwenrt.loader.checkpoint.digest import add_shard
from qwenrt.loader.checkpoint.directory import write_json
from qwenrt.loader.checkpoint.header import read_shard
from qwenrt.loader.checkpoint.writing import claim_directory
from qwenrt.loader.hub.resolve import source_of
from qwenrt.merging.dense import AdapterPath, MergeReport, asked_for, base_of, check_target, merge_dense
from qwenrt.ops.types import Packed
from qwenrt.quantize import QuantizeReport, QuantizeSettings, quantize
from qwenrt.quantize.calibration import all_texts, divided
from qwenrt.quantize.finished import claimed
from qwenrt.quantize.layer import batches_of, next_tokens
from qwenrt.quantize.report import Effect

_NEARER = 0.98  # the result has to be nearer to the adapted model by that: else what rounding adds drowns the adapter
_HEAD_TOKENS = 128  # whose logits are computed at once
_MERGED, _MAX_CONFIG = "merged.json", 2**24
logger = logging.getLogger("qwenrt")


@dataclass(frozen=True)
class RequantizedReport:
    """A merged and quantised checkpoint. ``perplexity`` of texts that were held out: of the base, of it with the
    adapters ("merged"), of the result. ``from_merged``, ``from_base``: the KL divergence of the result's predictions
    from those, nats a token."""

    merged: MergeReport
    quantized: QuantizeReport
    perplexity: dict[str, float]
    from_merged: float
    from_base: float

    def format(self) -> str:
        """The result in a few lines of text."""
        return "\n".join((self.merged.format(), self.quantized.format(), self.effect()))

    def effect(self) -> str:
        """What quantising did to the adapter, in words."""
        ppl = self.perplexity
        return (
            f"perplexity of the base {ppl['base']:.4g}, with the adapter {ppl['merged']:.4g}, quantised again "
            f"{ppl['result']:.4g}; KL divergence from the adapted model {self.from_merged:.3g}, from the base "
            f"{self.from_base:.3g}"
        )


def merge_and_quantize(
    model: str | Path,
    adapters: AdapterPath | Sequence[AdapterPath],
    output_dir: str | Path,
    *,
    calibration: str | Path | Sequence[Any],
    overwrite: bool,
    progress: bool | None,
    merging: dict[str, Any],
    settings: dict[str, Any],
) -> RequantizedReport:
    """The merged model in codes. RequestError where it is no nearer to the adapted model than to the base. What is done
    lies in a directory beside ``output_dir`` until all is, and the same call goes on from there."""
    target, source = Path(output_dir), source_of(model)
    check_target(source, target)
    options, asked = QuantizeSettings(**settings), asked_for(adapters)
    claim_directory(target, overwrite, lambda names: False)
    about = {**_digests(source, asked), "merging": merging, "settings": asdict(options)}
    with _workplace(target.parent / f".{target.name}-merging", about) as place:
        dense, made = place / "merged", place / "result"
        merged = _read_report(place / _MERGED)
        if merged is None:
            merged = merge_dense(source, adapters, dense, overwrite=True, progress=progress, **merging)
            write_json(place / _MERGED, json.loads(json.dumps(asdict(merged), default=str)))
        texts = all_texts(dense, calibration, options, progress, place / "texts.json")
        quantized = quantize(dense, made, calibration=texts, overwrite=True, progress=progress, **settings)
        (_, from_merged, from_base), perplexities = compare((dense, source, made), divided(texts)[1])
        names = ("merged", "base", "result")
        report = RequantizedReport(
            replace(merged, output_dir=target), replace(quantized, output_dir=target),
            dict(zip(names, perplexities, strict=True)), from_merged, from_base,
        )  # fmt: skip
        if from_merged > _NEARER * from_base:
            raise RequestError(
                f"quantising the merged model to {options.bits} bits",
                f"{report.effect()}: rounding takes away what the adapter does",
                "Use more bits (--bits 8), leave --requantize out, or serve the adapter beside the quantised base "
                "(--adapter).",
            )
        for file in sorted(made.iterdir()):
            os.replace(file, target / file.name)
    return report


def _digests(source: Path, adapters: Sequence[tuple[Path, float]]) -> dict[str, Any]:
    """What tells this base and these adapters from others."""
    each = []
    for path, share in adapters:
        digest = hashlib.sha256(read(path / FILE, _MAX_CONFIG, CheckpointError))
        add_shard(digest, read_shard(path / WEIGHTS))
        each.append([digest.hexdigest(), share])
    return {"base": base_of(source).digest, "adapters": each}


@contextmanager
def _workplace(place: Path, about: dict[str, Any]) -> Iterator[Path]:
    """A directory that is there until the work in it is done or refused; what a cut run left of the same work too."""
    file, about = place / "about.json", json.loads(json.dumps(about))
    with claimed(place) as lock:
        if not (is_there(file, CheckpointError) and read_json(file) == about):
            for other in place.iterdir():
                if other != lock:
                    logger.info("%s is of other work: it is done anew", other)
                    shutil.rmtree(other) if other.is_dir() else other.unlink()
        write_json(file, about)
        try:
            yield place
        except RequestError:  # it would be refused again
            shutil.rmtree(place)
            raise
    shutil.rmtree(place)


def _read_report(path: Path) -> MergeReport | None:
    """Of the merge that a cut run had done."""
    if not is_there(path, CheckpointError):
        return None
    said = read_json(path)
    adapters = tuple((Path(where), float(share)) for where, share in said["adapters"])
    worst = None if said["worst"] is None else (str(said["worst"][0]), float(said["worst"][1]))
    return MergeReport(**{**said, "output_dir": path.parent, "adapters": adapters, "worst": worst})


def compare(
    directories: Sequence[Path], texts: Sequence[Sequence[int]]
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Of three checkpoints: the KL divergences of the second from the first, of the third from the first, and of the
    third from the second, nats a token; and the perplexity of each. One layer of one of them is in memory at a time."""
    states = [_Streamed(directory, texts) for directory in directories]
    effect, other = Effect(), Effect()
    for start in range(0, states[0].tokens, _HEAD_TOKENS):
        logits = [each.logits(slice(start, start + _HEAD_TOKENS)) for each in states]
        width = min(each.shape[1] for each in logits)
        logits = [each[:, :width] for each in logits]
        targets = states[0].targets[start : start + _HEAD_TOKENS]
        effect.add(logits, targets)
        other.add([logits[1], logits[1], logits[2]], targets)
    second, third = effect.mean_divergences()
    return (second, third, other.mean_divergences()[1]), effect.perplexities()


class _Streamed:
    """Texts behind the last layer of a checkpoint in any format, computed in float32."""

    def __init__(self, directory: Path, texts: Sequence[Sequence[int]]) -> None:
        base = base_of(directory)
        model, reader = base.model, base.reader
        batches = batches_of(model, texts)
        with torch.no_grad():
            model.set_tensor("embed_tokens", reader.tensor("embed_tokens"))
            states = [model.embed(batch.ids) for batch in batches]
            for index, layer in enumerate(model.layers):
                tensors = [*layer_tensors(model.config, index)]
                linears = {spec.name: spec for spec in layer_linears(model.config, index)}
                for name in tensors:
                    model.set_tensor(name, reader.tensor(name))
                for name, spec in linears.items():
                    model.set_linear(name, reader.linear(spec))
                model.backend.bindings.clear()
                layer.bind(model.backend, torch.float32, model.weights)
                states = [
                    layer.forward(x, model.rotary(batch.plan, batch.alphas), batch.plan, None)
                    for x, batch in zip(states, batches, strict=True)
                ]
                for name in (*tensors, *linears):
                    del model.weights[name]
            tied = model.embed_tokens if model.config.tie_word_embeddings else None
            self._head: Packed = reader.linear(model.linear_specs["lm_head"], tied)
            norm = reader.tensor("norm")
            hidden = [model.backend.rms_norm(x, norm, model.config.rms_norm_eps) for x in states]
        self._hidden, self._backend = torch.cat(hidden), model.backend
        self.targets = torch.cat([next_tokens(batch) for batch in batches])
        self.tokens = len(self.targets)

    def logits(self, rows: slice) -> torch.Tensor:
        """float32 [T, V]"""
        with torch.no_grad():
            return self._backend.linear(self._hidden[rows], self._head).float()
