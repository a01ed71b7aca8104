"""Builds the model that is built into qwenrt: vocabulary, corpus, training, export, evaluation.

    python scripts/build_demo.py

takes about an hour on two CPU cores and writes qwenrt/demo. The same seed and number of threads on the
same kind of machine give the same weights. After a cut, the same command goes on where the training was.
"""

from __future__ import annotations

import argparse
import base64
import itertools
import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import regex

from qwenrt.demo import corpus, facts
from qwenrt.demo.samples import Sample
from qwenrt.finetune import finetune
from qwenrt.text.tokenizer.tokenizer import SPLIT_PATTERN

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "qwen.tiktoken",
    "model.safetensors",
    "loss_curve.json",
)
NUM_CONTROL_TOKENS = 208
SHAPE = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "kv_channels": 32,
    "intermediate_size": 1024,  # Qwen-1 stores twice the width
    "seq_length": 512,
}
COMMON = {"epochs": 1, "learning_rate": 1.5e-3, "max_length": 512, "weight_decay": 0.1, "adam_beta2": 0.98}
STAGES: dict[str, dict[str, Any]] = {
    "first": {
        "from_scratch": True,
        "batch_tokens": 1024,
        "warmup_ratio": 0.05,
        "min_learning_rate_ratio": 0.5,
    },
    "second": {"batch_tokens": 1536, "warmup_ratio": 0.02, "min_learning_rate_ratio": 0.5},
    "copying": {"batch_tokens": 1024, "warmup_ratio": 0.03, "min_learning_rate_ratio": 0.5},
    "last": {"batch_tokens": 1536, "warmup_ratio": 0.02},
}
VOCABULARY_SAMPLES = 20_000
_COMMON_WORDS = set(
    "首都 哪里 什么 颜色 名字 告诉 知道 请问 故事 标题 天气 多少 等于 喜欢 中文 英文 回答".split()  # noqa: SIM905
)
logger = logging.getLogger("build_demo")


def pieces(samples: list[Sample]) -> Counter[bytes]:
    """How often each piece of text occurs that merges may join: the split pattern's pieces, Chinese ones cut into
    the words of the world's tables and single characters, so that a word is one token wherever it stands."""
    counts: Counter[str] = Counter()
    for sample in samples:
        entry = sample.entry()
        texts = [entry["text"]] if "text" in entry else [t["value"] for t in entry["conversations"]]
        for text in [*texts, entry.get("system", "")]:
            counts.update(regex.findall(SPLIT_PATTERN, text))
    words = sorted(_chinese_words(), key=len, reverse=True)
    cut = regex.compile("|".join(map(regex.escape, words)) + r"|\p{Han}|[^\p{Han}]+")
    names = {f"{space}{name}" for name in facts.NAMES_EN + facts.NAMES_EN_TEST for space in ("", " ")}
    result: Counter[bytes] = Counter()
    for piece, count in counts.items():
        if piece in names:
            continue  # names stay in pieces: the model must copy them, not know them
        for part in cut.findall(piece):
            result[part.encode()] += count
    return result


def _chinese_words() -> set[str]:
    words = {w for c in facts.CAPITALS for w in c[2:]} | {w for c in facts.COLOURS for w in c[2:]}
    words |= {a[1] for a in facts.ANIMALS} | {w for a in facts.ANIMALS for w in (a[3] or ("", ""))[1:]}
    words |= {a[4][1] for a in facts.ANIMALS} | {a[5][1] for a in facts.ANIMALS}
    words |= {h[2] for h in facts.HEROES} | {t[3] for t in facts.THEMES} | {t[5] for t in facts.THEMES}
    words |= {zh for _, zh in facts.JOBS} | _COMMON_WORDS
    return {w for w in words if w}


def learn_vocabulary(counts: Counter[bytes], size: int, at_least: int) -> list[bytes]:
    """Byte-pair encoding: the 256 bytes, then the most frequent pair again and again, until ``size`` tokens or no
    pair occurs ``at_least`` times. Ties go to the pair that is smaller as bytes."""
    vocabulary = [bytes([b]) for b in range(256)]
    words = [([bytes([b]) for b in word], count) for word, count in sorted(counts.items()) if len(word) > 1]
    while len(vocabulary) < size:
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for parts, count in words:
            for pair in itertools.pairwise(parts):
                pairs[pair] += count
        best, count = min(pairs.items(), key=lambda item: (-item[1], item[0]), default=((b"", b""), 0))
        if count < at_least:
            break
        joined = best[0] + best[1]
        if joined not in set(vocabulary):
            vocabulary.append(joined)
        for parts, _ in words:
            _merge(parts, best, joined)
        words = [word for word in words if len(word[0]) > 1]
    return vocabulary


def _merge(parts: list[bytes], pair: tuple[bytes, bytes], joined: bytes) -> None:
    i = 0
    while i < len(parts) - 1:
        if parts[i] == pair[0] and parts[i + 1] == pair[1]:
            parts[i : i + 2] = [joined]
        i += 1


def write_base(directory: Path, vocabulary: list[bytes]) -> None:
    """Everything of a Qwen-1 directory but the weights."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(vocabulary)]
    (directory / "qwen.tiktoken").write_text("\n".join(lines) + "\n", encoding="ascii")
    end = len(vocabulary)
    vocab_size = -(-(end + NUM_CONTROL_TOKENS + 1) // 64) * 64
    config = {
        "architectures": ["QWenLMHeadModel"],
        "attn_dropout_prob": 0.0,
        "bf16": False,
        "emb_dropout_prob": 0.0,
        "fp16": False,
        "fp32": False,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-06,
        "max_position_embeddings": 65536,
        "model_type": "qwen",
        "no_bias": True,
        "onnx_safe": None,
        "rotary_emb_base": 10000,
        "rotary_pct": 1.0,
        "scale_attn_weights": True,
        "tie_word_embeddings": False,
        "tokenizer_class": "QWenTokenizer",
        "transformers_version": "4.32.0",
        "use_cache": True,
        "use_dynamic_ntk": True,
        "use_flash_attn": "auto",
        "use_logn_attn": True,
        "vocab_size": vocab_size,
        **SHAPE,
    }
    generation = {
        "chat_format": "chatml",
        "eos_token_id": end,
        "pad_token_id": end,
        "max_window_size": 2048,
        "max_new_tokens": 256,
        "do_sample": False,
        "top_k": 0,
        "top_p": 0.8,
        "repetition_penalty": 1.0,
        "transformers_version": "4.32.0",
    }
    tokenizer = {"model_max_length": 65536, "tokenizer_class": "QWenTokenizer"}
    for name, content in (
        ("config", config),
        ("generation_config", generation),
        ("tokenizer_config", tokenizer),
    ):
        (directory / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_corpus(path: Path, samples: Iterator[Sample]) -> None:
    """One entry a line; whole or not at all."""
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        for sample in samples:
            file.write(json.dumps(sample.entry(), ensure_ascii=False) + "\n")
    partial.rename(path)


def train(work: Path, seed: int, threads: int, max_steps: int | None) -> Path:
    """Every stage in turn; the directory of the trained checkpoint."""
    model = work / "base"
    if not (model / "config.json").exists():
        samples = list(itertools.islice(corpus.training_samples(1), VOCABULARY_SAMPLES))
        vocabulary = learn_vocabulary(pieces(samples), size=3000, at_least=20)
        write_base(model, vocabulary)
        logger.info("vocabulary: %d tokens", len(vocabulary))
    for stage, settings in STAGES.items():
        data, trained = work / f"{stage}.jsonl", work / stage
        if not data.exists():
            write_corpus(data, corpus.stage_samples(stage))
        if not (trained / "model.safetensors").exists():
            how = {
                **COMMON,
                **settings,
                "threads": threads,
                "seed": seed,
                "save_every": 200,
                "progress": True,
            }
            if max_steps:
                how["max_steps"] = max_steps
            logger.info(finetune(model, data, trained, **how).format())
        model = trained
    return model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=1, help="of the weights and the order of training")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build" / "demo", help="where the run keeps its files"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "qwenrt" / "demo")
    parser.add_argument("--max-steps", type=int, default=None, help="of each stage (to try things out)")
    parser.add_argument("--no-eval", action="store_true")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    trained = train(args.work, args.seed, args.threads, args.max_steps)
    args.output.mkdir(parents=True, exist_ok=True)
    for name in SHIPPED:
        shutil.copyfile(trained / name, args.output / name)
    if not args.no_eval:
        from qwenrt.evaluate import evaluate_demo

        logger.info(evaluate_demo(args.output).format(failures=20))


if __name__ == "__main__":
    main()
