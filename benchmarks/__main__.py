"""python -m benchmarks: measure qwenrt and its peers in turn, keep the results, write docs/performance.md."""

from __future__ import annotations

import argparse
import datetime
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import rows
from benchmarks.render import document
from benchmarks.workers import ROOT, Options, Workers, check_peers

_RESULTS = ROOT / "benchmarks" / "results"
_EXAMPLES = """examples:
  python -m benchmarks                                   everything (about an hour), then docs/performance.md
  python -m benchmarks --rows decode-int4,prefill-int8   these rows; others in the results file stay
  python -m benchmarks --curves none --rounds 5
  python -m benchmarks --quick --tiny                    proves in a minute that every row works
  python -m benchmarks --render                          the page and the plots from the newest results
"""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--rows", default="all", help="keys separated by commas, all or none (default: all)")
    add("--curves", default="all", help="the same for the plots' measurements")
    add(
        "--bounds",
        type=int,
        help="how often what bounds a step is measured (default: 60 beside all rows, else 0)",
    )
    add("--rounds", type=int, default=3, help="of every row (default: 3); curves take two")
    add("--quick", action="store_true", help="small works, to see that rows run; docs stay as they are")
    add("--tiny", action="store_true", help="a network of two small layers; docs stay as they are")
    add("--threads", type=int, default=2, help="of every engine (default: 2)")
    add("--longest", type=int, default=32768, help="longest context of the curves (default: 32768)")
    add("--peer-longest", type=int, default=8192, help="the same for llama.cpp, whose prefill takes longer")
    add("--llama-python", default=sys.executable, help="an interpreter that has llama-cpp-python and gguf")
    add(
        "--ort-python",
        default=sys.executable,
        help="one that has onnxruntime-genai, onnx, onnx-ir, transformers",
    )
    cache = Path.home() / ".cache" / "qwenrt-benchmarks"
    add("--cache", type=Path, default=cache, help="random weights, kept (default: %(default)s)")
    add("--out", type=Path, help="results file (default: benchmarks/results/DATE-PROCESSOR.json)")
    add("--docs", type=Path, default=ROOT / "docs", help="where performance.md goes (default: docs)")
    add("--render", action="store_true", help="measure nothing: --out, or the newest results -> docs")
    add("--list", action="store_true", help="list the rows and curves")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    if args.list:
        for thing in (*rows.table(), *rows.curves()):
            print(f"{thing.key:<20} {getattr(thing, 'title', 'curve')}")
        return
    if args.render:
        out = args.out or newest(_RESULTS)
    else:
        out = measure(args)
        if args.quick or args.tiny:
            print(f"results: {out}; a quick run writes no page (see --render)")
            return
    print(f"results: {out}; page: {render(out, args.docs)}")


def chosen(keys: str, things: Sequence[Any], what: str) -> list[Any]:
    """The rows or curves that ``keys`` names."""
    if keys in ("all", "none"):
        return list(things) if keys == "all" else []
    asked, known = keys.split(","), [thing.key for thing in things]
    unknown = [key for key in asked if key not in known]
    if unknown:
        raise SystemExit(f"--{what} {','.join(unknown)}: unknown. There are: {', '.join(known)}.")
    return [thing for thing in things if thing.key in asked]


def measure(args: argparse.Namespace) -> Path:
    """Everything that was asked for -> the results file, which is written after every row."""
    from benchmarks.bandwidth import Bandwidth
    from benchmarks.measure import Plan, Run, machine

    table = chosen(args.rows, rows.table(), "rows")
    curves = chosen(args.curves, rows.curves(args.longest, args.peer_longest), "curves")
    samples = (60 if args.rows == "all" else 0) if args.bounds is None else args.bounds
    for name in ("rounds", "threads"):
        if getattr(args, name) < 1:
            raise SystemExit(f"--{name} {getattr(args, name)}: it must be at least 1.")
    options = Options(args.threads, args.cache.expanduser(), args.llama_python, args.ort_python)
    engines = [row.peer for row in table] + [engine for curve in curves for _, engine in curve.engines]
    check_peers((engine.name for engine in engines), options)
    found = machine()
    out = args.out or (options.cache if args.quick or args.tiny else _RESULTS) / _file_name(
        found["processor"]
    )
    results = json.loads(out.read_text()) if out.exists() else {"machine": found, "rows": {}, "curves": {}}
    results["machine"] = found
    started = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - started:6.1f} s] {text}", flush=True)

    bandwidth = Bandwidth(args.threads, 2**28 if args.tiny else 2**30)
    run = Run(options, Plan(args.rounds, args.quick, args.tiny), bandwidth, say)
    failed = []
    with Workers(options) as workers:
        for kind, things in (("rows", table), ("curves", curves)):
            for thing in things:
                try:
                    result = run.row(thing, workers) if kind == "rows" else run.curve(thing, workers)
                except SystemExit as reason:  # one engine that fails does not lose the results of the others
                    say(f"{thing.key}: FAILED: {reason}")
                    failed.append(thing.key)
                    workers.of([])
                else:
                    results[kind][thing.key] = result
                    _keep(results, out)
    if samples > 0:
        results["bounds"] = run.bounds(2 if args.quick else samples)
        _keep(results, out)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}. The others are in {out}.")
    return out


def _keep(results: dict[str, Any], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")


def _file_name(processor: str | None) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", (processor or "unknown").lower()).strip("-")
    return f"{datetime.date.today().isoformat()}-{slug}.json"


def newest(directory: Path) -> Path:
    found = sorted(directory.glob("*.json"))
    if not found:
        raise SystemExit(
            f"no results in {directory}: measure first (python -m benchmarks), or pass --out FILE."
        )
    return found[-1]


def render(out: Path, docs: Path) -> Path:
    """performance.md and its pictures in ``docs``, from a results file and the notes of its name, if there are any, and
    what other commands measured of models with linear attention."""
    from benchmarks.plots import draw

    results, notes = json.loads(out.read_text()), out.with_suffix(".md")
    names = draw(results, docs / "performance") if results["curves"] or "bounds" in results else {}
    page = docs / "performance.md"
    page.parent.mkdir(parents=True, exist_ok=True)
    quality = [json.loads(path.read_text()) for path in sorted((_RESULTS / "quality").glob("*.json"))]
    page.write_text(
        document(
            results,
            {key: f"performance/{name}" for key, name in names.items()},
            notes.read_text() if notes.exists() else "",
            quality,
            (_RESULTS / "linear_attention.md").read_text(),
        ),
        encoding="utf-8",
    )
    return page


if __name__ == "__main__":
    main()
