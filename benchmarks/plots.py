"""The curves as pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import bounds
from benchmarks.render import PLOTS
from benchmarks.summary import points
from qwenrt.cli.plots import pyplot


def draw(results: Mapping[str, Any], directory: Path) -> dict[str, str]:
    """SVG files in ``directory`` -> their names by key of PLOTS; curves of one plot share a picture."""
    names, curves = {}, results["curves"]
    directory.mkdir(parents=True, exist_ok=True)

    def keep(figure: Any, key: str) -> None:
        names[key] = f"{key}.svg"
        figure.savefig(directory / names[key], metadata={"Date": None})
        pyplot().close(figure)

    if "bounds" in results:
        figure, axes = pyplot().subplots(figsize=(7, 4.5), layout="constrained")
        _scatter(axes, results["bounds"]["samples"])
        keep(figure, "bounds")
    for key, (title, x_label, y_label) in PLOTS.items():
        mine = [curve for curve in curves.values() if curve["plot"] == key]
        if not mine:
            continue
        figure, axes = pyplot().subplots(figsize=(7, 4), layout="constrained")
        for curve in mine:
            for label, line in points(curve).items():
                style = "-o" if label.startswith("qwenrt") else "--s"
                axes.plot(*zip(*line, strict=True), style, label=label, markersize=4)
        axes.set(title=title, xlabel=x_label, ylabel=y_label)
        if key != "context":  # there a straight line is what should be seen
            axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
        keep(figure, key)
    return names


def _scatter(axes: Any, samples: Sequence[Mapping[str, float]]) -> None:
    """Each sample's kernels out of memory, against the lesser of plain reading and the kernel out of the cache."""
    most = 0.0
    for name, label in bounds.FORMATS.items():
        limits = [bounds.lesser(found, name) / 1e9 for found in samples]
        reached = [found[f"{name}_memory"] / 1e9 for found in samples]
        axes.scatter(limits, reached, s=14, alpha=0.7, label=label)
        most = max(most, *limits, *reached)
    axes.plot((0, most), (0, most), "--", color="gray", linewidth=1, label="all of it")
    axes.set(
        title="One token's product with weights in memory",
        xlabel="the lesser of plain reading and the same out of the cache, GB/s",
        ylabel="GB/s",
    )
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
