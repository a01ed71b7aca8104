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
    "context": "In every step the weights take the same time, whatever the context. Attention reads the whole "
    "cache, in chunks of 256 tokens that the threads share, so its time grows linearly. With one or two "
    "chunks there is less to share, and a token of context costs up to twice as much. The points were "
    "measured minutes apart, and the memory's speed changes.",
    "batch": "Two sequences take little longer than one, and four less than twice as long, because each weight "
    "is read once. From there on multiplications are the limit and the throughput stays about level, "
    "below that of a prompt with as many tokens: every sequence needs the whole output layer for its "
    "next token, a prompt needs it once.",
    "prompt": "128 tokens are multiplied at a time, and weights are unpacked once for all of them, so the speed "
    "rises up to there. Beyond 512 tokens it falls, because attention's share grows with the length.",
}
_ACTIVATIONS = {
    "int8": "activations int8",
    "int16": "activations int16",
    "exact": "activations float32",
    "auto": "activations auto",
}
_MARKS = {"goal": "✓ goal", "floor": "✓ floor", "below": "below floor"}
_INTRODUCTION = """# Performance

`make benchmarks` writes this page from `benchmarks/results/`; `python -m benchmarks --render` writes it again without
measuring. Everything is measured on one machine in one run, in turn: memory bandwidth, qwenrt, memory bandwidth, the
peer, and again. A ratio compares the two engines within one round, under the same conditions; the table gives the
median over the rounds. Absolute figures drift on a shared machine, ratios much less.
"""
_BOUNDS_ARE = """\
Two things limit a single answer: the memory bandwidth, and how fast instructions process weights. On a shared machine
both change within seconds, because other virtual machines use the same memory and the other hardware threads of the
same cores. So three things were measured in turn: plain reading of memory, the kernels of a step with weights in the
cache, where only instructions limit them, and the kernels with weights in memory. A kernel cannot be faster than the
lower of the first two."""
_EARLIER_INT4 = """\
**Rows of int4 in groups of 128 are older than the present default**, which rounds in groups of 32: 4.5 bits a weight
in place of 4.25, and much nearer to the exact model (below). They stand until they are measured again; nothing is
said about its speed beside peers yet.
"""
_QUALITY_IS = """\
Four texts of this repository (its README in two languages, two source files) are read by a released model as its file
has it, and again with the linear layers rounded; embedding and output layer stay as they are. The mean divergence
(Kullback-Leibler, in nats a token, with its standard error) says how far the probabilities of the next token are from
the exact ones. The bits are those of a weight including its share of scales and zero points. Q4_0 is llama.cpp's
format, with the codes and scales of llama.cpp's quantiser, multiplied by the same kernels. `int4` and `int8` are what
`quantize=` makes; the other group sizes are qwenrt's own rounding as well. The weights in these files were rounded to
about five bits in blocks of 32 before (scripts/fetch_models.py), which favours blocks of 32. Normally distributed
weights favour none: there the root mean square of the rounding error, relative to that of the weights, is 7.7 % for
`int4` and 8.6 % for Q4_0 (8.7 % in groups of 64, 9.5 % in groups of 128). Perplexity looks at the one token that came
next, divergence at all that might have come: with so few tokens perplexity is uncertain by 1 to 2 % for four bits (the
square root of twice the divergence per token, divided by that of the number of tokens), and a smaller difference
between two rows means nothing. `python -m benchmarks.quality DIR --json benchmarks/results/quality/NAME.json` measures
again."""
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
_LAUNCHES = """## Kernels for one token

An asynchronous device waits for whoever tells it what to do. Counted on the 24 layers of Qwen-1.8B, in
bfloat16 and with int4 weights, for one token of one sequence by the definitions in plain torch
(`tests/backends/test_launches.py`):

| | bfloat16 | int4 | waits for the device |
|---|---|---|---|
| before steps had stacks | 1067 | 2339 | 24 |
| the layers' operations one by one | 1040 | 2312 | 0 |
| a captured step (`GraphStack`), choice of the token included | 1281 | 2553 | 0 |

What is captured launches more kernels, since it looks at whole rows of the block table, but the host asks for them
all at once. None of this has been timed on a GPU yet. Steps on a CPU are one call of the C++ library and launch none.
"""
_METHOD = """## How it is measured

- **qwenrt** is the whole engine: token ids in, sampled token ids out, scheduler and sampler included. Prefill is a
  new random prompt to its first token. Decode is the difference of a long and a short answer to the same prompts,
  which are in the prefix cache.
- **llama.cpp** is `llama_decode` and `llama_synchronize` of the PyPI package `llama-cpp-python` through its low-level
  API, with random token ids: neither sampling nor Python between the steps counts in its time. Its files are random
  weights of the same shape in its own `qwen` or `qwen35` architecture, written with `gguf` in F16 and quantised by
  `llama_model_quantize`, which keeps the head of a Q4_0 file in Q6_K. Weights are repacked by llama.cpp as it sees
  fit (its default), prompts go in batches of 512, flash attention is automatic, and on where the cache is Q8_0.
  `QWENRT_KERNELS=avx2` measures a machine without AVX-512 where `LLAMA_CPP_LIB_PATH` names a build of llama.cpp for
  AVX2 alone; a results file says which instruction sets each used.
- **torch** is the same network in bfloat16: `F.linear`, `scaled_dot_product_attention`, a cache of keys and values.
- **onnxruntime-genai** runs the same network in Qwen2's format. Its own model builder makes it int4 (output layer
  included, groups of 128, `int4_accuracy_level=4`: inputs of linears in int8), offline, from a random checkpoint. Its
  steps include the choice of a token. No floor or goal is set against it.
- Random weights take as long as trained ones, with three exceptions where a kernel's work depends on values:
  activations in int8, which leave blocks with large values in int16; outliers among activations, whose blocks are
  multiplied twice; and bfloat16 weights, which are kept in 12 bits where 16 upper bytes cover nearly all of them. How
  many these are depends on the model. What rounding costs is measured separately, on trained weights.
- **Fraction of read** is the number of bytes of weights (and of the KV cache) that a step has to read, divided by
  what qwenrt's own reading loop reads in the same time over 1 GiB with the same threads, in the same round: the
  larger of the two medians of five around qwenrt's turn. A bfloat16 weight counts 12 bits for qwenrt, 16 for
  llama.cpp and torch.
- **int8 head** means `quantize_head="int8"`; otherwise the output layer (head) is bfloat16. "Activations" says what
  the inputs of quantised linears are rounded to. With bfloat16 weights, int16 means that prompts are multiplied in
  fixed point of 14 bits (the result differs by 1.4e-4; activations in float16 would make it 2.1e-4) and single tokens
  in float32.
- **Start** is the time from a fresh Python process until it has loaded a checkpoint from disk and computed one token,
  with files and packed weights cached by an earlier start; more than half of it is `import torch`.
- "Others" is the largest share of the cores that other processes, or other virtual machines on the same host, used
  during a measurement. A round with more than 10 % is disturbed: it is measured again, and does not count unless all
  rounds were disturbed.

## What is not in the table

- openvino-genai: its models are made by the exporter of another package (optimum-intel), and exporting a random
  network of this shape was not tried, so there are no figures for it.
- Dynamic NTK and LogN, which Qwen-1 applies in long contexts: llama.cpp's `qwen` architecture leaves them out, qwenrt
  computes them.
"""


def document(
    results: Mapping[str, Any],
    plots: Mapping[str, str],
    notes: str = "",
    quality: Sequence[Mapping[str, Any]] = (),
    more: str = "",
) -> str:
    """The whole page. ``plots``: key of PLOTS -> path of the picture relative to the page. ``notes``: what was
    found out about these results, such as figures of a profile. ``quality``: what benchmarks/quality.py found.
    ``more``: sections of other measurements."""
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
    return "\n".join([*parts, *([more] if more else []), _LAUNCHES, _METHOD])


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
