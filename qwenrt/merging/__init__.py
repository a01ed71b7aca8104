"""LoRA adapters merged into the model that they were trained on: a complete new checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwenrt.errors import RequestError
from qwenrt.loader.hub.resolve import source_of
from qwenrt.merging.dense import AdapterPath, MergeReport, merge_dense
from qwenrt.merging.requantized import RequantizedReport, merge_and_quantize
from qwenrt.quantize.settings import SELF

__all__ = ["MergeReport", "RequantizedReport", "merge"]


def merge(
    model: str | Path,
    adapters: AdapterPath | Sequence[AdapterPath],
    output_dir: str | Path,
    *,
    dtype: str = "auto",
    requantize: str | None = None,
    calibration: str | Path | Sequence[Any] = SELF,
    strict: bool = False,
    moe_layout: str | None = None,
    overwrite: bool = False,
    progress: bool | None = None,
    **settings: Any,
) -> MergeReport | RequantizedReport:
    """Write ``model``, a directory or a name, with ``adapters`` merged into it to ``output_dir``: complete, and in 16
    or 32 bits also where the base is quantised.

    ``adapters``: directories of peft's, or (directory, weight); of several the changes are added. Sums are float32 and
    rounded once, to the dtype that a weight has, or to ``dtype`` ("float32", "bfloat16", "float16"). ``requantize``
    "gptq", "awq" or "rtn" quantises the result, with ``calibration`` and ``settings`` as `quantize` takes them,
    measures what that does to the adapter, and refuses a result that is nearer to the base than to the adapted model.
    ``strict`` refuses adapters that lack what their config lists; ``moe_layout``: see read_adapter. Raises RequestError
    for what is asked, ConfigError and CheckpointError for the files.
    """
    merging: dict[str, Any] = {"dtype": dtype, "strict": strict, "moe_layout": moe_layout}
    if requantize is not None:
        return merge_and_quantize(
            model, adapters, output_dir, calibration=calibration, overwrite=overwrite, progress=progress,
            merging=merging, settings={"method": requantize, **settings},
        )  # fmt: skip
    if settings:
        found = f"{', '.join(settings)} without requantize"
        raise RequestError("merging", found, 'Give requantize="gptq", or leave them out.')
    return merge_dense(
        source_of(model), adapters, Path(output_dir), overwrite=overwrite, progress=progress, **merging
    )
