"""Results -> docs/performance.md. Every figure comes from the results; nothing is measured here."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import bounds, rows
from benchmarks.rows import Row
from benchmarks.summary import Summary, summarise, verdict

PLOTS = {
    "context": ("Decode time against context", "tokens in the cache", "ms per token"),
    "batch": ("Decode throughput against batch", "sequences at once", "tokens per second"),
    "prompt": ("Prefill speed against prompt length", "tokens of the prompt", "tokens per second"),
}
# Why each curve has the shape that it has; bends without a reason here are faults.
_REASONS = {
    "context": "Of a step, the weights cost the same behind every context; attention reads the whole cache, in chunks "
    "of 256 tokens that threads share, and grows with it in a straight line. One or two chunks leave less to share: "
    "there a token of context costs up to twice as much. Points are minutes apart, and the memory's speed changes.",
    "batch": "Two sequences cost little more than one and four less than twice as much: each weight is read once. From "
    "then on the multiplications bound it and it stays about level, below a prompt of as many tokens: every sequence "
    "needs the whole head for its next token, a prompt needs it once.",
    "prompt": "Tokens are multiplied 128 at a time, and weights are unpacked once for all of them: up to there it "
    "rises. Beyond 512 it falls, because attention's share grows with the length.",
}
_ACTIVATIONS = {
    "int8": "activations int8",
    "int16": "activations int16",
    "exact": "activations float32",
    "auto": "activations auto",
}
_MARKS = {"goal": "✓ goal", "floor": "✓ floor", "below": "below floor"}
_INTRODUCTION = """# Performance

Written by `make benchmarks` from `benchmarks/results/`; `python -m benchmarks --render` writes it again without
measuring. Everything runs on one machine, in one run, in turn: read the memory, qwenrt, read the memory, the peer, and
again. A ratio is taken within a round, where both had the same machine; the table gives the median of the rounds.
Absolute figures of a shared machine drift, ratios much less.
"""
_BOUNDS_ARE = """\
One answer is bound by what the memory delivers and by how fast instructions take weights in. On a shared machine both
change within seconds: neighbours use the same memory, and the other halves of the same cores. So plain reading was
measured in turn with the kernels of a step: with weights that lie in the cache, where instructions alone bound them,
and with weights in memory. A kernel can be no faster than the lesser of the two."""
_EARLIER_INT4 = """\
**Rows of int4 in groups of 128 are older than the present default**, which rounds in groups of 32: 4.5 bits a weight
in place of 4.25, and much nearer to the exact model (below). They stand until they are measured again; nothing is said
about its speed beside peers yet.
"""
_QUALITY_IS = """\
Four texts of this repository (its README in two languages, two source files) go through a released model as its file
has it, and with the linears of its layers rounded; embedding and head stay as they are. The mean divergence
(Kullback-Leibler, in nats a token, with its standard error) says how far the next token's probabilities are from the
exact ones. Bits are those of a weight with its scales and zeros. Q4_0 is llama.cpp's form, with the codes and scales of
its own quantiser, multiplied by the same kernels. `int4` and `int8` are what `quantize=` makes; the other groups are
qwenrt's own rounding as well. The files hold weights that were once rounded to about five bits in blocks of 32
(scripts/fetch_models.py), which suits blocks of 32. On normally distributed weights, which nothing suits, the root mean
square of what rounding moves them by is 7.7 % of theirs for `int4` and 8.6 % for Q4_0 (8.7 % in groups of 64, 9.5 % of
128). Perplexity looks at the one token that came next, divergence at all that might have: with so few tokens the
former is uncertain by 1 to 2 % for four bits (the square root of twice the divergence a token, over that of the number
of tokens), and less than that between two rows says nothing.
`python -m benchmarks.quality DIR --json benchmarks/results/quality/NAME.json` measures again."""
_INT4_TRIED = """\
What else was tried for `int4`, at the same bytes, on the 21 linears of three layers (3, 11, 20) of the 0.5B model, 32
rows each; inputs are those of 1,024 tokens of other texts. Squared errors are beside those of seven shares from 1.0 to
0.72 of a group's range, the design before this one; each is the geometric mean over the linears.

| a group's scale and zero | weights | outputs | |
|---|---|---|---|
| seven shares, 1.0 to 0.72 | 1.00 | 1.00 | before |
| seven shares, 1.1 to 0.86 | 0.98 | 0.99 | `int4`; 46 shares give the same to 0.2 % |
| the same, zeros one higher and one lower as well | 0.97 | 0.98 | three times the work |
| the same, codes chosen again for the scale found | 0.97 | 0.99 | twice the work |
| errors weighted by the weight's size | 1.04 | 1.00 | |
| ... by that plus the group's root mean square, as llama.cpp's k-quants | 1.00 | 0.99 | |
| ... by the norm's weight of each input | 0.99 | 1.05 | a large one stands before an input that is small |
| ... by its square | 1.03 | 1.19 | |
| ... by each input's mean square in these texts | 1.05 | 0.86 | load would run the exact model over texts first |
| Q4_0 | 1.90 | 1.74 | |

What remains is in the inputs: a seventh, for texts that somebody chooses and a load that computes as well as reads.
"""
_METHOD = """## How it is measured

- **qwenrt** is the whole engine: token ids in, sampled token ids out, scheduler and sampler included. Prefill is a new
  random prompt to its first token. Decode is the difference of a long and a short answer to the same prompts, which
  are in the prefix cache.
- **llama.cpp** is `llama_decode` and `llama_synchronize` of the PyPI package `llama-cpp-python` through its low-level
  API, with random token ids: neither sampling nor Python between the steps is charged to it. Its files are random
  weights of the same shape in its own `qwen` architecture, written with `gguf` in F16 and quantised by
  `llama_model_quantize`, which keeps the head of a Q4_0 file in Q6_K. Weights are repacked by llama.cpp as it sees fit
  (its default), prompts go in batches of 512, flash attention is automatic, and on where the cache is Q8_0.
- **torch** is the same network in bfloat16: `F.linear`, `scaled_dot_product_attention`, a cache of keys and values.
- **onnxruntime-genai** runs the same network as Qwen2 writes it, made int4 (head included, groups of 128,
  `int4_accuracy_level=4`: inputs of linears in int8) by its own model builder, offline, from a random checkpoint. Its
  steps include its choice of a token. No floor or goal is set against it.
- Random weights take as long as trained ones: no kernel looks at values, but for activations int8, which leave blocks
  with large values at int16; for massive activations, whose blocks are gone through twice; and for bfloat16 weights,
  which lie in 12 bits where 16 upper bytes have nearly all of them. How many these are depends on the model. What
  rounding costs is measured apart, on trained ones.
- **Fraction of read** is the bytes of weights (and of the cache of keys and values) that a step has to read, by what
  qwenrt's own reading loop reads in the same time over 1 GiB with the same threads, in the same round; the larger of
  the two medians of five around qwenrt's turn. Of bfloat16 weights that is 12 bits each; llama.cpp and torch read 16.
- **int8 head** means `quantize_head="int8"`; otherwise the head is bfloat16. Activations are what the inputs of
  quantised linears are rounded to; beside bfloat16, int16 means that prompts are multiplied in fixed point of 14 bits
  (the result differs by 1.4e-4, where activations in float16 make it 2.1e-4) and single tokens in float32.
- **Start** is a fresh Python until it has loaded a checkpoint from disk and computed one token, pages and packed
  weights cached by an earlier start; more than half of it is `import torch`.
- "Others" is the largest share of the cores that other processes, or other machines on the same host, had during a
  measurement. A round with more than 10 % of it is disturbed: it is measured again, and does not count unless all
  rounds were.

## What is not in the table

- openvino-genai: its models come out of another package's exporter (optimum-intel), and no export of a random network
  of this shape was tried; so nothing is said about its speed here.
- Dynamic NTK and LogN, which Qwen-1 applies in long contexts: llama.cpp's `qwen` architecture leaves them out, qwenrt
  computes them.
"""


def document(
    results: Mapping[str, Any],
    plots: Mapping[str, str],
    notes: str = "",
    quality: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The whole page. ``plots``: key of PLOTS -> path of the picture relative to the page. ``notes``: what somebody
    found out about these results, a profile's figures say. ``quality``: what benchmarks/quality.py found."""
    known = {row.key: row for row in rows.table()}
    found = [(known[key], value) for key, value in results["rows"].items() if key in known]
    found.sort(key=lambda pair: list(known).index(pair[0].key))
    summaries = [(row, value, summarise(value)) for row, value in found]
    parts = [_INTRODUCTION, _machine(results), _table(summaries)]
    if any(_is_earlier_int4(value["ours"]) for _, value, _ in summaries):
        parts.append(_EARLIER_INT4)
    if quality:
        parts.append(_quality(quality))
    missing = [
        f"{row.title} ({row.ours.shape}, {row.key})"
        for key, row in known.items()
        if key not in results["rows"]
    ]
    if missing:
        parts.append(f"Not measured yet: {'; '.join(missing)}.\n")
    parts.append(_rounds(summaries))
    if plots:
        curves = {key: path for key, path in plots.items() if key in PLOTS}
        pictures = (f"![{PLOTS[k][0]}]({path})\n\n{_wrapped(_REASONS[k])}\n" for k, path in curves.items())
        parts.append("## How it grows\n\n" + "\n".join(pictures))
    if "bounds" in results:
        parts.append(_bounds(results["bounds"], plots.get("bounds")))
    if notes:
        parts.append(notes)
    return "\n".join([*parts, _METHOD])


def _quality(models: Sequence[Mapping[str, Any]]) -> str:
    parts = ["## What rounding costs", _QUALITY_IS]
    for found in models:
        lines = [
            f"{found['model']}, {found['tokens']} tokens of each text, {found['when'][:10]}; perplexity "
            f"{found['perplexity']:.3f} without rounding:",
            "",
            "| weights | bits | mean divergence | likeliest token the same | perplexity |",
            "|---|---|---|---|---|",
        ]
        for way, q in found["ways"].items():
            divergence = f"{q['divergence']:.4f} ± {q['error']:.4f}"
            same = f"{100 * q['agreement']:.1f} %"
            lines.append(f"| {way} | {q['bits']:.2f} | {divergence} | {same} | {q['perplexity']:.3f} |")
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, _INT4_TRIED])


def _bounds(found: Mapping[str, Any], picture: str | None) -> str:
    samples = found["samples"]
    measured = f"{len(samples)} times, one after the other, {found['when'][:10]}, commit {found['commit']}:"
    parts = ["## What bounds it", _BOUNDS_ARE, measured, bounds.table(samples).rstrip()]
    if picture:
        parts.append(f"![One token's product with weights in memory]({picture})")
    return "\n\n".join(parts) + "\n"


def _wrapped(text: str) -> str:
    return "\n".join(textwrap.wrap(text, 120))


def _machine(results: Mapping[str, Any]) -> str:
    m = results["machine"]
    measured = [*results["rows"].values(), *results["curves"].values()]
    commits = sorted({r["commit"] for r in measured})
    days = sorted({r["when"][:10] for r in measured})
    threads = sorted({r["threads"] for r in measured})
    versions = {}
    for result in results["rows"].values():
        for side in ("ours", "peer"):
            about = result[side]["about"]
            if "version" in about:
                versions[result[side]["name"]] = about["version"]
    memory = f"{m['memory_total_bytes'] / 2**30:.0f} GiB"
    lines = [
        f"- Machine: {m['processor']}, {m['cores_usable']} cores, {memory}, {m['system']}",
        f"- Instruction sets: {', '.join(m['instruction_sets'])}",
        f"- Threads: {', '.join(map(str, threads))}; {m['python']}",
        "- Versions: " + ", ".join(f"{name} {version}" for name, version in sorted(versions.items())),
        f"- Commit {', '.join(commits)}, measured {' to '.join(dict.fromkeys((days[0], days[-1])))}",
    ]
    if any(r["quick"] or r["tiny"] for r in measured):
        lines.append("- **Some of this is a quick run that only proves that the harness works.**")
    return "\n".join(lines) + "\n"


def _table(summaries: list[tuple[Row, Mapping[str, Any], Summary]]) -> str:
    lines = [
        "## Against peers",
        "",
        "Tokens per second (start: seconds). Floor and goal are what this project asks of itself.",
        "",
        "| | qwenrt with | peer | qwenrt | peer | ratio | floor / goal | | fraction of read | floor / goal | |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += ["| " + " | ".join(_cells(*each)) + " |" for each in summaries]
    return "\n".join(lines) + "\n"


def _cells(row: Row, result: Mapping[str, Any], summary: Summary) -> list[str]:
    judged = not (result["quick"] or result["tiny"] or summary.all_disturbed)
    cells = [f"{_title(result['work'])} ({result['ours']['shape']})", _settings(result["ours"])]
    cells.append(_peer(result["peer"]))
    if row.work.kind == "start":
        ours, peer = 1 / summary.ours, 1 / summary.peer
        cells += [f"{ours:.2f} s", f"{peer:.2f} s", f"{summary.ratio:.2f}"]
        return [*cells, *_wanted(ours, row.start, judged, " s"), "", "", ""]
    cells += [f"{summary.ours:.1f}", f"{summary.peer:.1f}", f"**{summary.ratio:.2f}**"]
    cells += _wanted(summary.ratio, row.ratio, judged)
    if summary.fraction is None:
        return [*cells, "", "", ""]
    return [*cells, f"{summary.fraction:.2f}", *_wanted(summary.fraction, row.fraction, judged)]


def _title(work: Mapping[str, Any]) -> str:
    if work["kind"] == "start":
        return "process start to first token"
    if work["kind"] == "prefill":
        return f"prefill of {work['tokens']} tokens"
    behind = f" behind {work['tokens']} tokens" if work["tokens"] > 64 else ""
    together = f" of {work['batch']} sequences" if work["batch"] > 1 else ""
    return f"decode{together}{behind}"


def _wanted(value: float, wanted: tuple[float, float] | None, judged: bool, unit: str = "") -> list[str]:
    if wanted is None:
        return ["", ""]
    mark = _MARKS[verdict(value, *wanted)] if judged else "not judged"
    return [f"{wanted[0]:g}{unit} / {wanted[1]:g}{unit}", mark]


def _settings(ours: Mapping[str, Any]) -> str:
    settings = ours["settings"]
    left_out = ours["about"].get("left_out", [])
    words = [settings.get("quantize") or "bf16"]
    if _is_earlier_int4(ours):
        words[0] += " (groups of 128)"
    if settings.get("quantize_head") and "quantize_head" not in left_out:
        words.append(f"{settings['quantize_head']} head")
    words.append(_ACTIVATIONS[settings.get("activations", "auto")])
    if settings.get("kv_cache_dtype") == "int8":
        words.append("int8 cache")
    return ", ".join(words)


def _is_earlier_int4(ours: Mapping[str, Any]) -> bool:
    """Whether a row is older than groups of 32: engines now say in what groups they round."""
    return ours["settings"].get("quantize") == "int4" and "rounded" not in ours["about"]


def _peer(peer: Mapping[str, Any]) -> str:
    settings = peer["settings"]
    weights = {"torch": "eager bf16", "onnxruntime-genai": "int4"}.get(peer["name"]) or settings["weights"]
    words = [f"{peer['name']} {weights}"]
    if settings.get("cache"):
        words.append(f"{settings['cache']} cache")
    return ", ".join(words)


def _rounds(summaries: list[tuple[Row, Mapping[str, Any], Summary]]) -> str:
    lines = [
        "## Every round",
        "",
        "| | ratios | fractions of read | read, GB/s | others | disturbed |",
        "|---|---|---|---|---|---|",
    ]
    for row, _, summary in summaries:
        cells = [
            row.key,
            " ".join(f"{ratio:.2f}" for ratio in summary.ratios),
            " ".join(f"{fraction:.2f}" for fraction in summary.fractions or ()),
            " ".join(f"{read / 1e9:.1f}" for read in summary.reads),
            f"{summary.foreign:.0%}",
            str(summary.disturbed or ""),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
