"""Records what transformers answers in float32: python -m tests.real.record 0.5B [--cache DIR].

Writes tests/real/recorded/SIZE.json: for each prompt its token ids as transformers makes them, the greedy continuation
until it ends or until two tokens are so close that rounding could decide between them, and how likely each token was.
qwenrt proposes the continuation, so that transformers computes each text once, not once a token: a token stands in the
file because it is transformers' likeliest after those before it. Where qwenrt is wrong, the right token ends the list.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import qwenrt
from qwenrt import SamplingParams
from scripts.fetch_models import RELEASES, cache_directory
from tests.real.prompts import CHATS, NEW_TOKENS, TEXTS

RECORDED = Path(__file__).parent / "recorded"
_DECIDED = 5e-3  # by which the best logit must exceed the second


def proposed(directory: Path, prompts: dict[str, list[int]]) -> dict[str, list[int]]:
    """qwenrt's greedy continuations."""
    params = SamplingParams(temperature=0.0, repetition_penalty=1.0, max_tokens=NEW_TOKENS)
    settings: dict[str, Any] = {"dtype": "float32", "activations": "exact", "max_model_len": 8192}
    with qwenrt.load(str(directory), max_num_seqs=2, **settings) as llm:
        outs = llm.generate(prompt_token_ids=list(prompts.values()), sampling_params=params)
    return {name: list(out.token_ids) for name, out in zip(prompts, outs, strict=True)}


@torch.no_grad()
def decided(model: Any, ids: list[int], continuation: list[int]) -> dict[str, Any]:
    """As much of a continuation as is the model's own."""
    kept = len(continuation)
    logits = model(torch.tensor([ids + continuation[:-1]]), use_cache=False, logits_to_keep=kept).logits[0]
    tokens: list[int] = []
    likelihoods: list[float] = []
    for row, token in zip(logits.float(), continuation, strict=True):
        best = row.topk(2)
        if float(best.values[0] - best.values[1]) < _DECIDED:
            break
        tokens.append(int(best.indices[0]))
        likelihoods.append(round(float(row.log_softmax(-1)[tokens[-1]]), 5))
        if tokens[-1] != token:
            break
    return {"prompt": ids, "tokens": tokens, "logprobs": likelihoods}


def main() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: TID251 (the oracle)

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("size", choices=tuple(RELEASES))
    parser.add_argument("--cache", type=Path, default=cache_directory())
    parser.add_argument("--without", default="", help="prompts to leave out, separated by commas")
    args = parser.parse_args()
    directory = args.cache / RELEASES[args.size].name
    tokenizer = AutoTokenizer.from_pretrained(directory)
    prompts = {
        name: list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
        for name, messages in CHATS.items()
    }
    prompts |= {name: list(tokenizer(text)["input_ids"]) for name, text in TEXTS.items()}
    prompts = {name: ids for name, ids in prompts.items() if name not in args.without.split(",")}
    continuations = proposed(directory, prompts)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    answers = {}
    for name, ids in prompts.items():
        answers[name] = decided(model, ids, continuations[name])
        same = answers[name]["tokens"] == continuations[name]
        print(name, len(ids), same, repr(tokenizer.decode(answers[name]["tokens"])), flush=True)
    RECORDED.mkdir(exist_ok=True)
    path = RECORDED / f"{args.size}.json"
    path.write_text(json.dumps(answers, separators=(",", ":")) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
