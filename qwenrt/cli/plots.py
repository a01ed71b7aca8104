"""Pictures of measurements, with matplotlib (the extra `plot`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenrt.cli.options import check_can_write
from qwenrt.errors import ConfigError

if TYPE_CHECKING:
    from qwenrt.load_test.running import LoadRun

FORMS = (".svg", ".png", ".pdf")


def check_can_draw(path: Path) -> None:
    """Raises ConfigError where nothing could be drawn to ``path``, before anything is measured for it."""
    if path.suffix not in FORMS:
        raise ConfigError(f"--plot {path}", "its name has another end", f"Use one of {', '.join(FORMS)}.")
    check_can_write("--plot", path)
    pyplot()


def draw_run(
    path: Path, found: dict[str, Any], run: LoadRun, count: Callable[[str], int] | None = None
) -> None:
    """A load test: how latencies are distributed, and how many tokens came in each second. ``count``: counts tokens
    where the server told none."""
    from qwenrt.load_test.figures import LATENCIES, latencies, tokens_by_second

    figure, (left, right) = pyplot().subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name, values in latencies(run, count).items():
        ms = sorted(1000 * value for value in values)
        if ms:
            shares = [(number + 1) / len(ms) for number in range(len(ms))]
            left.step([ms[0], *ms], [0, *shares], where="post", label=LATENCIES[name])
    left.set(xscale="log", xlabel="ms", ylabel="share that took at most this long", title="Latencies")
    left.legend(fontsize="small")
    seconds = tokens_by_second(run, count)
    right.step([*seconds, len(seconds)], [*seconds.values(), 0], where="post")
    right.set(xlabel="seconds", ylabel="answer tokens", title="Tokens in each second", ylim=(0, None))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    rate = found["request_rate"]
    when = f"{found['max_concurrency']} clients" if rate == "inf" else f"{rate:g} requests/s"
    figure.suptitle(f"{found['model_id']}: {found['workload']['name']}, {when}")
    _keep(figure, path)


def draw_profile(path: Path, title: str, rows: Sequence[dict[str, Any]]) -> None:
    """A table of speed and memory: a bar for each precision, in two halves."""
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(9, 1.5 + 0.5 * len(rows)), layout="constrained")
    names = [row["label"] for row in rows]
    halves = (
        (left, [row["tokens_per_s"] for row in rows], "tokens a second", "{:.1f}"),
        (right, [(row["memory_bytes"] or 0) / 2**30 for row in rows], "memory at its peak, GiB", "{:.2f}"),
    )
    for axes, values, label, form in halves:
        bars = axes.barh(names, values)
        axes.bar_label(bars, fmt=form, padding=3)
        axes.set(xlabel=label, xlim=(0, max(values) * 1.2 or 1))
        axes.invert_yaxis()
    right.set_yticklabels([])
    figure.suptitle(title)
    _keep(figure, path)


def draw_training(path: Path, curve: dict[str, Any]) -> None:
    """The losses of a training run, as loss_curve.json has them: of what is learned, and on what is held out."""
    figure, axes = pyplot().subplots(figsize=(7, 4), layout="constrained")
    axes.plot(*zip(*curve["loss"], strict=True), label="learned", linewidth=1)
    if curve["held_out"]:
        axes.plot(*zip(*curve["held_out"], strict=True), label="held out", marker="o", markersize=4)
    low = min(loss for _, loss in (*curve["loss"], *curve["held_out"]))
    axes.set(xlabel="step", ylabel="loss", yscale="log" if low > 0 else "linear")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.suptitle(f"{curve['tokens']} tokens in {curve['seconds']:.0f} s")
    _keep(figure, path)


def pyplot() -> Any:
    """matplotlib's, set so that the same results give the same picture. Raises ConfigError without it."""
    try:
        import matplotlib
    except ImportError:
        raise ConfigError(
            "a plot", "matplotlib is not installed", 'Install it: pip install "qwenrt[plot]"'
        ) from None
    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "qwenrt"
    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text
    from matplotlib import pyplot

    return pyplot


def _keep(figure: Any, path: Path) -> None:
    undated = {"metadata": {"Date": None}} if path.suffix == ".svg" else {}
    figure.savefig(path, dpi=120, **undated)
    pyplot().close(figure)
