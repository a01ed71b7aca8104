"""Records what transformers answers in float32: python -m tests.real.record 0.5B [--cache DIR].

Writes tests/real/recorded/SIZE.json: for each prompt its token ids as transformers makes them, the greedy continuation
until it ends or until two tokens are so close that rounding could decide between them, and how likely each token was.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from scripts.fetch_models import RELEASES, cache_directory
from tests.real.prompts import CHATS, NEW_TOKENS, TEXTS

RECORDED = Path(__file__).parent / "recorded"
_DECIDED = 5e-3  # by which the best logit must exceed the second


@torch.no_grad()
def greedy(model: Any, ids: list[int], ends: set[int]) -> dict[str, Any]:
    tokens: list[int] = []
    likelihoods: list[float] = []
    cache, fed = None, ids
    while len(tokens) < NEW_TOKENS:
        out = model(torch.tensor([fed]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, logits = out.past_key_values, out.logits[0, -1].float()
        best = logits.topk(2)
        if float(best.values[0] - best.values[1]) < _DECIDED:
            break
        tokens.append(int(best.indices[0]))
        likelihoods.append(round(float(logits.log_softmax(-1)[tokens[-1]]), 5))
        if tokens[-1] in ends:
            break
        fed = tokens[-1:]
    return {"prompt": ids, "tokens": tokens, "logprobs": likelihoods}


def main() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: TID251 (the oracle)

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("size", choices=tuple(RELEASES))
    parser.add_argument("--cache", type=Path, default=cache_directory())
    args = parser.parse_args()
    directory = args.cache / RELEASES[args.size].name
    tokenizer = AutoTokenizer.from_pretrained(directory)
    prompts = {
        name: tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        for name, messages in CHATS.items()
    }
    prompts |= {name: tokenizer(text)["input_ids"] for name, text in TEXTS.items()}
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ends = set(model.generation_config.eos_token_id)
    answers = {}
    for name, ids in prompts.items():
        answers[name] = greedy(model, list(ids), ends)
        print(name, len(ids), tokenizer.decode(answers[name]["tokens"]), flush=True)
    RECORDED.mkdir(exist_ok=True)
    path = RECORDED / f"{args.size}.json"
    path.write_text(json.dumps(answers, separators=(",", ":")) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
